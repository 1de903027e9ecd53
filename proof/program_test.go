package proof

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"example.com/state"
)

// A step is one call of a random program. It says all that is needed to run it,
// and prints as a line of a script.
type step struct {
	verb   string
	client int
	key    string // or pattern, or lock name
	value  string
	ttl    time.Duration // or how long to sleep
	which  int           // of the revisions, watches or locks so far
}

func (s step) String() string {
	on := fmt.Sprintf("client %d: %s", s.client, s.verb)
	switch s.verb {
	case "sleep":
		return fmt.Sprintf("sleep %v", s.ttl)
	case "put":
		return fmt.Sprintf("%s %q = %q for %v", on, s.key, s.value, s.ttl)
	case "update":
		return fmt.Sprintf("%s %q = %q for %v if it is %s", on, s.key, s.value, s.ttl, [...]string{"as it is", "missing", "as before"}[s.which])
	case "delete-revision":
		return fmt.Sprintf("%s %q if it is %s", on, s.key, [...]string{"as it is", "another one", "as before"}[s.which])
	case "modify":
		return fmt.Sprintf("%s %q by %q for %v", on, s.key, s.value, s.ttl)
	case "lock":
		return fmt.Sprintf("%s %q for %v", on, s.key, s.ttl)
	case "unlock", "refresh", "unwatch", "events":
		return fmt.Sprintf("%s #%d", s.verb, s.which)
	}
	return fmt.Sprintf("%s %q", on, s.key)
}

// A profile is what random programs are made of.
type profile struct {
	ttls   []time.Duration
	sleeps []time.Duration
	leases []time.Duration
	steps  int
}

var (
	// In a bubble time passes at once, and is exact.
	bubble = profile{
		ttls: []time.Duration{0, 0, 1, time.Microsecond, 10 * time.Millisecond, time.Second, time.Second + 1, time.Minute, time.Hour,
			24 * time.Hour, 1<<63 - 1, -1, -time.Hour},
		sleeps: []time.Duration{1, time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, time.Second, time.Minute - time.Second, time.Hour, 25 * time.Hour},
		leases: []time.Duration{1, 10 * time.Millisecond, time.Second, time.Minute, time.Hour, 1<<63 - 1, 0, -1},
		steps:  40,
	}
	// In real time deadlines are either far away or clearly passed.
	realTime = profile{
		ttls:   []time.Duration{0, 0, 0, shortTTL, shortTTL + 1, time.Hour, 1<<63 - 1, -1},
		sleeps: []time.Duration{shortTTL},
		leases: []time.Duration{shortTTL, shortTTL, shortTTL, time.Hour, 1<<63 - 1, 0},
		steps:  20,
	}
)

const (
	shortTTL = 1100 * time.Millisecond // which the server removes after 2 s
	// margin is how close to a deadline nothing may happen in real time.
	margin = 500 * time.Millisecond
	// lateness is how much later than its deadline something has gone for sure.
	lateness = 400 * time.Millisecond
)

var (
	someKeys     = []string{"a", "a.b", "a.b.c", "ab", "b", "A/=_-1", strings.Repeat("k", 1024), "", ".a", "a..b", "a b", "a*"}
	somePatterns = []string{"*", "a*", "a.*", "a.b*", "a", "a.b", "b", "zz*", "", "**", "a.*.b", ">", ".*", "a..*", "a."}
	verbs        = []string{"put", "put", "put", "put", "get", "entry", "delete", "delete", "update", "update", "delete-revision", "delete-revision", "modify", "keys", "entries", "holder", "watch", "events",
		"unwatch", "lock", "lock", "unlock", "refresh", "sleep", "sleep"}
)

func (p profile) program() *rapid.Generator[[]step] {
	one := rapid.Custom(func(t *rapid.T) step {
		s := step{verb: rapid.SampledFrom(verbs).Draw(t, "verb"), client: rapid.IntRange(0, 2).Draw(t, "client")}
		// Most keys are good ones, and few.
		s.key = rapid.SampledFrom(slices.Concat(someKeys[:5], someKeys[:3], someKeys)).Draw(t, "key")
		switch s.verb {
		case "put", "update", "modify":
			s.value = rapid.SampledFrom([]string{"", "x", "y", "\x00\xff"}).Draw(t, "value")
			s.ttl = rapid.SampledFrom(p.ttls).Draw(t, "ttl")
			if s.verb == "update" {
				s.which = rapid.IntRange(0, 2).Draw(t, "which")
			}
		case "delete-revision":
			s.which = rapid.IntRange(0, 2).Draw(t, "which")
		case "keys", "entries", "watch":
			s.key = rapid.SampledFrom(somePatterns).Draw(t, "pattern")
		case "lock":
			s.ttl = rapid.SampledFrom(p.leases).Draw(t, "lease")
		case "unlock", "refresh", "unwatch", "events":
			s.which = rapid.IntRange(0, 5).Draw(t, "which")
		case "sleep":
			s.ttl = rapid.SampledFrom(p.sleeps).Draw(t, "time")
		}
		return s
	})
	// Slices are mostly short, so a program is several of them.
	return rapid.Custom(func(t *rapid.T) (program []step) {
		for range 5 {
			program = append(program, rapid.SliceOfN(one, 0, p.steps).Draw(t, "steps")...)
		}
		return program
	})
}

// A machine runs programs on a store, step by step beside the model.
type machine struct {
	*model
	clients []state.Store
	exact   bool // the clock stands still while a call runs
	strict  bool // watches report every change

	watches []*machineWatch
	held    []*machineLock
	tokens  map[string]uint64
	before  map[string]uint64 // an older revision of a key
	log     []string          // what every call returned
	ended   []int             // how many entries and leases had come to their deadline at each step
	seen    map[string]seen   // by key
}

// seen is what a key's entry was when it was last read.
type seen struct {
	kv   *state.KeyValue
	born time.Time // when the key came into being, by the model
}

type machineWatch struct {
	pattern string
	events  <-chan *state.KeyValue
	end     context.CancelFunc
	due     map[string][]modelEvent // what it must tell yet, by key
	ended   bool
}

type machineLock struct {
	name  string
	lock  state.Lock
	lease *modelLease
	ttl   time.Duration
}

// errInconclusive is for a program that ran so slowly that a deadline passed
// during a call.
var errInconclusive = errors.New("too slow to tell")

// errSilent is for a watch that does not report what it must.
var errSilent = errors.New("it does not report")

func newMachine(exact bool, clients ...state.Store) *machine {
	m := &machine{model: newModel(), clients: clients, exact: exact, strict: exact, tokens: map[string]uint64{}, before: map[string]uint64{},
		seen: map[string]seen{}}
	m.model.advance(time.Now())
	return m
}

// run runs a program to its end, closes the clients, and returns what was wrong
// first.
func (m *machine) run(program []step) (err error) {
	i := 0
	defer func() {
		for _, w := range m.watches {
			w.end()
		}
		for _, c := range m.clients {
			_ = c.Close()
		}
		if err != nil && err != errInconclusive {
			script := ""
			for j, s := range program[:min(i+1, len(program))] {
				script += fmt.Sprintf("%3d  %v\n", j+1, s)
			}
			err = fmt.Errorf("%w\n%s", err, script)
		}
	}()
	var s step
	for i, s = range program {
		if err := m.step(s); err != nil {
			return err
		}
	}
	i++
	if err := m.settle(); err != nil {
		return err
	}
	for _, c := range m.clients {
		if err := c.Close(); err != nil {
			return fmt.Errorf("close: %w", err)
		}
	}
	m.closed = true
	for _, w := range m.watches {
		for range w.events {
			return fmt.Errorf("an event after Close")
		}
		w.ended = true // nothing is told any more
	}
	for _, verb := range []string{"put", "get", "entry", "delete", "update", "delete-revision", "modify", "keys", "entries", "holder", "watch", "lock"} {
		if err := m.step(step{verb: verb, key: "a", ttl: time.Hour}); err != nil {
			return fmt.Errorf("after Close: %w", err)
		}
	}
	return nil
}

// time brings the model's clock up to the real one. Nothing may happen just
// before a deadline, nor just after it, unless the clock is exact.
func (m *machine) time() {
	if !m.exact {
		for wait := true; wait; {
			wait = false
			for _, d := range m.deadlines() {
				if until := time.Until(d); until < margin && until > -lateness {
					time.Sleep(until + lateness + time.Millisecond)
					wait = true
				}
			}
		}
	}
	told := map[string]int{}
	for key, evs := range m.told {
		told[key] = len(evs)
	}
	m.advance(time.Now())
	m.owe(told)
}

func (m *machine) deadlines() (ds []time.Time) {
	for _, e := range m.entries {
		if !e.deadline.IsZero() {
			ds = append(ds, e.deadline)
		}
	}
	for _, l := range m.locks {
		if !l.released {
			ds = append(ds, l.deadline)
		}
	}
	return ds
}

// owe notes what the watches must tell since.
func (m *machine) owe(told map[string]int) {
	for key, evs := range m.told {
		for _, w := range m.watches {
			if !w.ended && matches(w.pattern, key) {
				w.due[key] = append(w.due[key], evs[told[key]:]...)
			}
		}
	}
}

func same(want, got error) error {
	if want != got { //nolint:errorlint // documented outcomes are bare
		return fmt.Errorf("it returned %v, and should return %v", got, want)
	}
	return nil
}

func (m *machine) step(s step) error {
	m.time()
	ended := m.expired
	for _, l := range m.locks {
		if !l.released && !l.deadline.After(m.now) {
			ended++
		}
	}
	m.ended = append(m.ended, ended)
	told := map[string]int{}
	for key, evs := range m.told {
		told[key] = len(evs)
	}
	began, due := m.now, m.deadlines()
	err := m.do(s)
	switch {
	case m.exact || s.verb == "sleep" || errors.Is(err, errSilent):
	case err == nil && time.Since(began) > lateness*3/4:
		return errInconclusive // a TTL may have begun later than the model's
	case passes(due, began) || passes(m.deadlines(), time.Now().Add(-lateness)):
		return errInconclusive
	}
	if err != nil {
		return fmt.Errorf("%v: %w", s, err)
	}
	m.owe(told)
	return nil
}

// passes reports whether a deadline has passed since a time, or is about to.
func passes(deadlines []time.Time, since time.Time) bool {
	return slices.ContainsFunc(deadlines, func(d time.Time) bool {
		return d.After(since) && time.Until(d) < 20*time.Millisecond
	})
}

func (m *machine) do(s step) error {
	c := m.clients[s.client%len(m.clients)]
	note := func(format string, args ...any) { m.log = append(m.log, s.String()+": "+fmt.Sprintf(format, args...)) }
	switch s.verb {
	case "sleep":
		time.Sleep(s.ttl)
	case "put":
		want, got := m.put(s.key, s.value, s.ttl), c.Put(s.key, []byte(s.value), s.ttl)
		note("%v", got)
		if err := same(want, got); err != nil || got != nil || !m.gaps {
			return err
		}
		kv, err := c.GetKeyValue(s.key)
		if err != nil {
			return fmt.Errorf("read it: %w", err)
		}
		if !m.adopt(s.key, kv.Revision) {
			return fmt.Errorf("it has revision %d, which should be at least %d", kv.Revision, m.revision)
		}
	case "get":
		e, want := m.get(s.key)
		value, got := c.Get(s.key)
		note("%q %v", value, got)
		if err := same(want, got); err != nil || got != nil {
			return err
		}
		if string(value) != e.value || value == nil {
			return fmt.Errorf("it returned %#v instead of %q", value, e.value)
		}
	case "entry":
		return m.entry(c, s.key)
	case "delete":
		want, got := m.delete(s.key), c.Delete(s.key)
		note("%v", got)
		return same(want, got)
	case "update":
		revision := m.choose(s)
		wantRevision, want := m.update(s.key, s.value, s.ttl, revision)
		gotRevision, got := c.Update(s.key, []byte(s.value), s.ttl, revision)
		note("%d %v", gotRevision, got)
		if err := same(want, got); err != nil {
			return err
		}
		if got == nil && !m.adopt(s.key, gotRevision) || got != nil && gotRevision != 0 {
			return fmt.Errorf("it returned revision %d instead of %d", gotRevision, wantRevision)
		}
	case "delete-revision":
		revision := m.choose(s)
		if s.which == 1 {
			revision = m.revision + 1
		}
		want, got := m.deleteRevision(s.key, revision), c.DeleteRevision(s.key, revision)
		note("%v", got)
		return same(want, got)
	case "modify":
		var old *modelEntry
		if e, err := m.get(s.key); err == nil {
			copied := *e
			old = &copied
		}
		seen, called := (*state.KeyValue)(nil), 0
		gotRevision, got := state.Modify(context.Background(), c, s.key, func(kv *state.KeyValue) ([]byte, time.Duration, error) {
			called++
			seen = kv
			value := []byte(s.value)
			if kv != nil {
				value = append(kv.Value[:min(len(kv.Value), 3):min(len(kv.Value), 3)], value...)
			}
			return value, s.ttl, nil
		})
		value := s.value
		if old != nil {
			value = old.value[:min(len(old.value), 3)] + value
		}
		want := m.put(s.key, value, s.ttl)
		note("%d %v", gotRevision, got)
		if err := same(want, got); err != nil || got != nil {
			return err
		}
		if called != 1 || (seen == nil) != (old == nil) || seen != nil && seen.Revision != old.revision || !m.adopt(s.key, gotRevision) {
			return fmt.Errorf("it called %d times with %+v, and returned revision %d instead of %d", called, seen, gotRevision, m.revision)
		}
	case "entries":
		wantKeys, want := m.keys(s.key)
		entries, got := c.Entries(s.key)
		note("%d %v", len(entries), got)
		if err := same(want, got); err != nil || got != nil {
			return err
		}
		if len(entries) != len(wantKeys) || entries == nil {
			return fmt.Errorf("it returned %d entries instead of %q", len(entries), wantKeys)
		}
		for i, kv := range entries {
			if err := m.compare(kv, wantKeys[i]); err != nil {
				return err
			}
		}
	case "holder":
		l, want := m.holder(s.key)
		info, got := c.LockHolder(s.key)
		note("%v", got)
		if err := same(want, got); err != nil || got != nil {
			return err
		}
		if info.Key != s.key || info.Token != m.tokens[s.key] || info.Owner == "" || m.exact && !info.Expires.Equal(l.deadline) && !info.Expires.IsZero() {
			return fmt.Errorf("it returned %+v instead of token %d until %v", info, m.tokens[s.key], l.deadline)
		}
	case "keys":
		wantKeys, want := m.keys(s.key)
		gotKeys, got := c.Keys(s.key)
		note("%q %v", gotKeys, got)
		if err := same(want, got); err != nil {
			return err
		}
		if !slices.Equal(wantKeys, gotKeys) || got == nil && gotKeys == nil {
			return fmt.Errorf("it returned %q instead of %q", gotKeys, wantKeys)
		}
	case "watch":
		_, want := m.keys(s.key)
		ctx, cancel := context.WithCancel(context.Background())
		events, got := c.WithContext(ctx).Watch(s.key)
		note("%v", got)
		if err := same(want, got); err != nil || got != nil {
			cancel()
			return err
		}
		m.watches = append(m.watches, &machineWatch{pattern: s.key, events: events, end: cancel, due: map[string][]modelEvent{}})
	case "events":
		if len(m.watches) > 0 {
			return m.watches[s.which%len(m.watches)].drain(m)
		}
	case "unwatch":
		if len(m.watches) > 0 {
			w := m.watches[s.which%len(m.watches)]
			w.end()
			w.ended = true
			for range w.events { //nolint:revive // until it is closed
			}
		}
	case "lock":
		lease, want := m.lock(s.key, s.ttl)
		lock, got := c.Lock(s.key, s.ttl)
		note("%v", got)
		if err := same(want, got); err != nil || got != nil {
			return err
		}
		token := lock.(state.Fenced).Token()
		if token <= m.tokens[s.key] || lock.Key() != s.key {
			return fmt.Errorf("it has token %d after %d, key %q", token, m.tokens[s.key], lock.Key())
		}
		m.tokens[s.key] = token
		m.held = append(m.held, &machineLock{s.key, lock, lease, s.ttl})
	case "unlock", "refresh":
		if len(m.held) == 0 {
			return nil
		}
		l := m.held[s.which%len(m.held)]
		if s.verb == "unlock" {
			want, got := m.unlock(l.lease), l.lock.Unlock()
			note("%v", got)
			return same(want, got)
		}
		want, got := m.refresh(l.lease, l.ttl), l.lock.Refresh()
		note("%v", got)
		return same(want, got)
	default:
		panic("no such verb: " + s.verb)
	}
	return nil
}

// entry compares a key's entry with the model's. The times are the store's:
// they must be the model's where the clock is exact, and else fit together.
func (m *machine) entry(c state.Store, key string) error {
	_, want := m.get(key)
	kv, got := c.GetKeyValue(key)
	m.log = append(m.log, fmt.Sprintf("entry %q: %v", key, got))
	if err := same(want, got); err != nil || got != nil {
		return err
	}
	return m.compare(kv, key)
}

// choose returns the revision that a step names.
func (m *machine) choose(s step) (revision uint64) {
	if e := m.entries[s.key]; e != nil {
		switch s.which {
		case 0:
			revision = e.revision
		case 2:
			revision = m.before[s.key]
		}
		m.before[s.key] = e.revision
	}
	return revision
}

// compare holds an entry against the model's.
func (m *machine) compare(kv *state.KeyValue, key string) error {
	e := m.entries[key]
	if kv.Key != key || kv.Operation != state.OpPut || string(kv.Value) != e.value || kv.Value == nil || kv.Revision != e.revision {
		return fmt.Errorf("it returned %+v instead of %q at revision %d", kv, e.value, e.revision)
	}
	if m.exact {
		if !kv.Created.Equal(e.created) || !kv.Modified.Equal(e.modified) || !kv.Expires.Equal(e.deadline) && !kv.Expires.IsZero() {
			return fmt.Errorf("created %v, modified %v and expires %v instead of %v, %v and %v", kv.Created, kv.Modified, kv.Expires, e.created, e.modified, e.deadline)
		}
		return nil
	}
	near := func(x, y time.Time) bool { return x.Sub(y).Abs() < 5*time.Second }
	if !near(kv.Created, e.created) || !near(kv.Modified, e.modified) || kv.Modified.Before(kv.Created) {
		return fmt.Errorf("created %v and modified %v instead of about %v and %v", kv.Created, kv.Modified, e.created, e.modified)
	}
	if last, ok := m.seen[key]; ok {
		switch {
		case e.revision == last.kv.Revision && (!kv.Created.Equal(last.kv.Created) || !kv.Modified.Equal(last.kv.Modified)):
			return fmt.Errorf("revision %d was %v and %v and is now %v and %v", e.revision, last.kv.Created, last.kv.Modified, kv.Created, kv.Modified)
		case e.revision > last.kv.Revision && !kv.Modified.After(last.kv.Modified):
			return fmt.Errorf("revision %d was modified at %v, and %d at %v", last.kv.Revision, last.kv.Modified, e.revision, kv.Modified)
		case e.created.Equal(last.born) && !kv.Created.Equal(last.kv.Created):
			return fmt.Errorf("created %v is now created %v", last.kv.Created, kv.Created)
		case !e.created.Equal(last.born) && !kv.Created.After(last.kv.Modified):
			return fmt.Errorf("created again at %v, after %v", kv.Created, last.kv.Modified)
		}
	}
	m.seen[key] = seen{kv, e.created}
	return nil
}

// drain takes what the watch must tell, and nothing else.
func (w *machineWatch) drain(m *machine) error {
	if w.ended {
		return nil
	}
	for w.owes() {
		select {
		case kv, open := <-w.events:
			if !open {
				return fmt.Errorf("watch %s has ended", w.pattern)
			}
			if err := w.match(m, kv); err != nil {
				return err
			}
		case <-time.After(10 * time.Second):
			return fmt.Errorf("watch %s: %w: %v", w.pattern, errSilent, w.due)
		}
	}
	if m.exact {
		synctest.Wait()
		select {
		case kv := <-w.events:
			return fmt.Errorf("watch %s tells %v of %s at revision %d, and should tell nothing", w.pattern, kv.Operation, kv.Key, kv.Revision)
		default:
		}
	}
	return nil
}

func (w *machineWatch) owes() bool {
	for _, evs := range w.due {
		if len(evs) > 0 {
			return true
		}
	}
	return false
}

// match compares an event with what is due. A MemoryStore reports every change to
// a reader that keeps up; a NATSStore may leave out what was replaced.
func (w *machineWatch) match(m *machine, kv *state.KeyValue) error {
	due := w.due[kv.Key]
	for skipped, next := range due {
		if kv.Operation == next.op && (kv.Revision == next.revision || next.least && kv.Revision > next.revision) && string(kv.Value) == next.value &&
			(kv.Value == nil) == (next.op == state.OpDelete) && kv.Created.IsZero() == (next.op == state.OpDelete) && !kv.Modified.IsZero() {
			w.due[kv.Key] = due[skipped+1:]
			return nil
		}
		if m.strict {
			break
		}
	}
	return fmt.Errorf("watch %s reports %+v of %s, of which %+v are due", w.pattern, kv, kv.Key, due)
}

// settle checks that the watches have told everything, and nothing else.
func (m *machine) settle() error {
	m.time()
	for _, w := range m.watches {
		if err := w.drain(m); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	// What they should not tell would come before this.
	for _, key := range []string{"a", "a.b", "b", "end"} {
		if err := m.step(step{verb: "put", key: key, value: "end"}); err != nil {
			return err
		}
	}
	for _, w := range m.watches {
		if err := w.drain(m); err != nil {
			return fmt.Errorf("at the end: %w", err)
		}
	}
	return m.step(step{verb: "keys", key: "*"})
}

// slowChecks is how many programs each of the parallel tests on servers runs.
const slowChecks = 2

// checks sets how many programs rapid runs, unless the command line does. It is
// read when a check begins, so it must not be called while tests run in parallel.
func checks(n int) {
	if !checksGiven() {
		_ = flag.Set("rapid.checks", strconv.Itoa(n))
	}
}

var checksGiven = sync.OnceValue(func() (given bool) {
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "rapid.checks" })
	return given
})

// TestMemoryStoreModel runs random programs on a MemoryStore, in bubbles.
func TestMemoryStoreModel(t *testing.T) {
	checks(5_000)
	defer checks(slowChecks)
	rapid.Check(t, func(rt *rapid.T) {
		program := bubble.program().Draw(rt, "program")
		var err error
		synctest.Test(t, func(*testing.T) {
			s := state.NewMemoryStore()
			defer s.Close()
			err = newMachine(true, s.Client(), s.Client(), s.Client()).run(program)
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

// TestNATSStoreModel runs random programs on a NATSStore, in real time and by
// three clients, on one server and on three.
func TestNATSStoreModel(t *testing.T) {
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprintf("servers-%d", servers), func(t *testing.T) { testModel(t, servers, false) })
	}
}

// TestBothModel runs random programs on both stores at once, and compares what
// they returned.
func TestBothModel(t *testing.T) { testModel(t, 1, true) }

// testModel runs random programs, many at a time, since each of them sleeps
// most of the time.
func testModel(t *testing.T, servers int, both bool) {
	t.Parallel()
	const parallel = 16
	c := startCluster(t, servers, false)
	var buckets, conclusive, inconclusive atomic.Int64
	programs := func(t *testing.T) {
		for i := range parallel {
			conns := make([]*client, 3)
			for j := range conns {
				var err error
				if conns[j], err = c.connect(); err != nil {
					t.Fatal(err)
				}
			}
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				rapid.Check(t, func(rt *rapid.T) {
					program := realTime.program().Draw(rt, "program")
					bucket := fmt.Sprintf("model-%d", buckets.Add(1))
					var clients []state.Store
					for _, cl := range conns {
						var s *state.NATSStore
						if err := eventually(20*time.Second, func() (err error) {
							s, err = state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: bucket, Replicas: servers})
							return err
						}); err != nil {
							rt.Fatal(err)
						}
						clients = append(clients, s)
					}
					if servers > 1 { // making the bucket of locks takes longer than a deadline allows
						if err := eventually(20*time.Second, func() error {
							lock, err := clients[0].Lock("first", time.Minute)
							if err == nil {
								err = lock.Unlock()
							}
							return err
						}); err != nil {
							rt.Fatal(err)
						}
					}
					m := newMachine(false, clients...)
					m.gaps = servers > 1 // the deletions that take the place of what has expired
					var side sync.WaitGroup
					var sideErr error
					memory := state.NewMemoryStore()
					defer memory.Close()
					sideMachine := newMachine(false, memory.Client(), memory.Client(), memory.Client())
					sideMachine.strict = true
					if both {
						side.Go(func() { sideErr = sideMachine.run(program) })
					}
					err := m.run(program)
					side.Wait()
					for _, stream := range []string{bucket, bucket + "-locks"} {
						_, _ = c.admin.Request("$JS.API.STREAM.DELETE.KV_"+stream, nil, 5*time.Second)
					}
					// A deadline may also have passed between the same two steps on one
					// store only.
					if err == errInconclusive || sideErr == errInconclusive ||
						both && err == nil && sideErr == nil && !slices.Equal(m.ended, sideMachine.ended) {
						inconclusive.Add(1)
						return
					}
					conclusive.Add(1)
					if err != nil {
						rt.Fatal(err)
					}
					if !both {
						return
					}
					if sideErr != nil {
						rt.Fatalf("on MemoryStore: %v", sideErr)
					}
					if !slices.Equal(m.log, sideMachine.log) {
						rt.Fatalf("the stores differ:\nNATSStore:\n%s\nMemoryStore:\n%s", strings.Join(m.log, "\n"), strings.Join(sideMachine.log, "\n"))
					}
				})
			})
		}
	}
	t.Run("programs", programs)
	if conclusive.Load() == 0 { // on a busy machine
		t.Run("programs again", programs)
	}
	t.Logf("%d programs, %d were too slow to tell", conclusive.Load(), inconclusive.Load())
	if conclusive.Load() == 0 {
		t.Error("every program was too slow to tell")
	}
}
