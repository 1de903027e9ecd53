package proof

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
)

// A load is concurrent clients at work, whose every step is recorded.
type load struct {
	*history
	open func() (state.StateStore, error)

	keys, lockers, timers, watchers int // clients of each kind
	pace                            time.Duration
	epoch                           time.Duration // how long a key is used before the next one, so that histories stay short

	revisions sync.Map // of every revision that anybody was shown, what it was
	mu        sync.Mutex
	broken    []string // rules that were broken
	watched   []*watched
	acked     map[string]map[string]bool // the values whose writes were acknowledged, by key
	writes    map[string]map[string]bool // the values that were written, by key

	wrongLists []wrongList
	notes      []string

	lockCycles, ttlChecks, events, listings, estimates atomic.Int64
	cut                                                atomic.Bool // a client was cut off: events may be missing
}

func newLoad(open func() (state.StateStore, error)) *load {
	return &load{
		history: newHistory(), open: open,
		keys: 5, lockers: 4, timers: 1, watchers: 2,
		pace: time.Millisecond, epoch: time.Second,
		acked: map[string]map[string]bool{}, writes: map[string]map[string]bool{},
	}
}

func (l *load) broke(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.broken) < 20 {
		l.broken = append(l.broken, fmt.Sprintf(format, args...))
	}
}

// run opens the clients, has them work until ctx is done, and returns when all
// of them are through. ready is called when they are open.
func (l *load) run(ctx context.Context, ready func()) error {
	var stores []state.StateStore
	defer func() {
		for _, s := range stores {
			_ = s.Close()
		}
	}()
	total := l.keys + l.lockers + l.timers + l.watchers + 2
	for range total {
		s, err := l.open()
		if err != nil {
			return err
		}
		stores = append(stores, s)
	}
	reader := stores[total-1]
	watching, unwatch := context.WithCancel(context.Background())
	defer unwatch()
	watchStart := l.keys + l.lockers + l.timers
	for i := range l.watchers {
		w := &watched{pattern: []string{"*", "reg*", "reg.*"}[i%3], slow: i%2 == 1, seen: make(chan struct{}, 1)}
		events, err := stores[watchStart+i].(state.ContextWatcher).WatchContext(watching, w.pattern)
		if err != nil {
			return fmt.Errorf("watch: %w", err)
		}
		l.watched = append(l.watched, w)
		w.done.Go(func() { w.read(l, events) })
	}
	ready()
	var wg sync.WaitGroup
	for i := range l.keys {
		wg.Go(func() { l.useKeys(ctx, i, stores[i]) })
	}
	for i := range l.lockers {
		wg.Go(func() { l.useLocks(ctx, l.keys+i, stores[l.keys+i]) })
	}
	for i := range l.timers {
		for j := range 4 {
			wg.Go(func() { l.useTTLs(ctx, 100*j+l.keys+l.lockers+i, stores[l.keys+l.lockers+i]) })
		}
	}
	wg.Go(func() { l.useLists(ctx, total, stores[total-2], stores[total-3]) }) // on a watcher's connection
	wg.Wait()
	l.endWatches(reader)
	unwatch()
	for _, w := range l.watched {
		w.done.Wait()
	}
	return nil
}

// A revision is what a reader was shown of one.
type revision struct {
	key, value        string
	created, modified time.Time
	event             bool
}

// show holds what a reader was shown against what others were. An event of what
// was replaced at once has an estimate of when it was written.
func (l *load) show(kv *state.KeyValue, event bool) {
	is := revision{kv.Key, string(kv.Value), kv.Created, kv.Modified, event}
	if before, known := l.revisions.LoadOrStore(kv.Revision, is); known {
		was := before.(revision)
		same := was.modified.Equal(is.modified)
		if was.key != is.key || was.value != is.value || !was.created.Equal(is.created) || !same && !was.event && !event {
			l.broke("revision %d was %+v to one reader and %+v to another", kv.Revision, was, is)
		}
		if !same {
			l.estimates.Add(1)
		}
		if was.event && !event {
			l.revisions.Store(kv.Revision, is)
		}
	}
	if kv.Value == nil || kv.Created.IsZero() || kv.Modified.Before(kv.Created) || kv.Operation != state.OpPut || kv.Revision == 0 {
		l.broke("malformed entry %+v", kv)
	}
}

// note remembers an error for those who ask why.
func (l *load) note(client int, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, fmt.Sprintf("%.3f: client %d: ", float64(l.now())/1e9, client)+fmt.Sprintf(format, args...))
}

func (l *load) wrote(set map[string]map[string]bool, key, value string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if set[key] == nil {
		set[key] = map[string]bool{}
	}
	set[key][value] = true
}

// unexpected checks an error that is not one of the documented outcomes. It
// reports whether the outcome is unknown.
func (l *load) unexpected(verb string, err error) (unknown bool) {
	for _, bare := range []error{state.ErrNotFound, state.ErrClosed, state.ErrLockHeld, state.ErrLockNotHeld, state.ErrLockExpired,
		state.ErrInvalidKey, state.ErrInvalidTTL, state.ErrWatchClosed, state.ErrConflict, state.ErrValueTooLarge} {
		if errors.Is(err, bare) {
			l.broke("%s returned %q", verb, err)
		}
	}
	return errors.Is(err, state.ErrOutcomeUnknown)
}

// bounded checks that a call did not block for longer than promised.
func (l *load) bounded(verb string, call int64) {
	if took := time.Duration(l.now() - call); took > 11*time.Second {
		l.broke("%s took %v", verb, took)
	}
}

func (l *load) name(kind string) string {
	return fmt.Sprintf("%s.%d.%d", kind, l.now()/int64(l.epoch), rand.IntN(3))
}

func (l *load) rest(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d/2 + rand.N(d+1))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// useKeys reads and writes registers.
func (l *load) useKeys(ctx context.Context, client int, s state.StateStore) {
	type known struct {
		value    string
		revision uint64
	}
	seen := map[string]known{}
	ttls := []time.Duration{0, time.Hour, 90*time.Minute + 1}
	for n := 0; ctx.Err() == nil; n++ {
		key := l.name("reg")
		value := fmt.Sprintf("%d.%d", client, n)
		ttl := ttls[rand.IntN(len(ttls))]
		in, out := regInput{value: value}, regOutput{}
		var err error
		call := l.now()
		p := rand.IntN(100)
		if client == 0 {
			p = rand.IntN(40) // one only reads, so that it is never held up by a write
		}
		switch {
		case p < 40:
			in = regInput{verb: regGet}
			if p < 20 {
				var kv *state.KeyValue
				if kv, err = s.GetKeyValue(key); err == nil {
					l.show(kv, false)
					seen[key] = known{string(kv.Value), kv.Revision}
					out.value = string(kv.Value)
				}
			} else {
				var got []byte
				got, err = s.Get(key)
				out.value = string(got)
			}
			if err == state.ErrNotFound {
				seen[key] = known{}
				err = nil
			}
		case p < 65:
			in.verb = regPut
			l.wrote(l.writes, key, value)
			err = s.Put(key, []byte(value), ttl)
		case p < 78:
			in.verb, in.value = regDelete, ""
			err = s.Delete(key)
		default:
			last, ok := seen[key]
			if !ok {
				continue
			}
			in.verb, in.old = regUpdate, last.value
			l.wrote(l.writes, key, value)
			var revision uint64
			revision, err = s.(state.Updater).Update(key, []byte(value), ttl, last.revision)
			switch err {
			case nil:
				if revision <= last.revision {
					l.broke("update of %s: revision %d after %d", key, revision, last.revision)
				}
				seen[key] = known{value, revision}
			case state.ErrConflict:
				delete(seen, key)
				out.conflict, err = true, nil
			}
		}
		l.bounded(fmt.Sprint("register operation ", in.verb), call)
		switch {
		case err == nil:
			if in.verb == regPut || in.verb == regUpdate && !out.conflict {
				l.wrote(l.acked, key, value)
			}
			l.register(client, key, in, call, out)
		case l.unexpected("key "+key, err) && in.verb != regGet:
			out.unknown = true
			l.register(client, key, in, call, out)
		default:
			l.refuse()
		}
		l.rest(ctx, l.pace)
	}
}

// lapseSlack is how much later than its TTL a lease may end, with servers that
// are busy or gone for a while.
const lapseSlack = 20 * time.Second

// useLocks takes and releases locks, and holds what they protect against two
// holders.
func (l *load) useLocks(ctx context.Context, client int, s state.StateStore) {
	for n := 0; ctx.Err() == nil; n++ {
		name := fmt.Sprintf("lock.%d.%d", l.now()/int64(time.Second), rand.IntN(3))
		ttl := 100*time.Millisecond + rand.N(900*time.Millisecond)
		call := l.now()
		lock, err := s.Lock(name, ttl)
		l.bounded("lock", call)
		switch {
		case err == nil:
			l.hold(ctx, client, name, ttl, call, lock)
		case err == state.ErrLockHeld:
			l.lock(client, name, lockInput{verb: lockHeld}, call, l.now(), false)
		case err == state.ErrLockExpired || l.unexpected("lock", err):
			// It may have been held for a while, or will be. (ErrLockExpired says
			// that the lease had lapsed before it could be handed over.)
			token := uint64(nobodyKnows) + uint64(client)<<32 + uint64(n)
			l.lock(client, name, lockInput{lockTake, token}, call, never, true)
			l.lock(client, name, lockInput{lockLapse, token}, call+int64(ttl), never, false)
		default:
			l.refuse()
		}
		l.rest(ctx, 2*l.pace)
	}
}

func (l *load) hold(ctx context.Context, client int, name string, ttl time.Duration, call int64, lock state.Lock) {
	ret := l.now()
	g := &grant{client: client, token: lock.(state.Fenced).Token(), call: call, ret: ret, ttl: ttl, until: call + int64(ttl), over: ret + int64(ttl), latest: ret + int64(ttl+lapseSlack)}
	l.lock(client, name, lockInput{lockTake, g.token}, call, ret, false)
	l.grant(name, g)
	l.lockCycles.Add(1)
	if ret >= g.until {
		// Its lease was counted from the call or, if that took several attempts,
		// from a later one. A refresh that comes too late without having asked
		// anybody shows that the lock had lapsed when it was handed out.
		began := time.Now()
		if err := lock.Refresh(); err == state.ErrLockExpired && time.Since(began) < 100*time.Microsecond {
			l.broke("lock %s: called for at %.3f for %v, token %d was handed out at %.3f when it had lapsed", name, float64(call)/1e9, ttl, g.token, float64(ret)/1e9)
		}
	}
	if lock.Key() != name {
		l.broke("the lock of %s calls itself %s", name, lock.Key())
	}
	lapse := func() { // it may have lapsed, for all that the holder knows
		l.lock(client, name, lockInput{lockLapse, g.token}, g.until, g.latest, false)
	}
	refreshes, unsure := 0, false
	if rand.IntN(8) == 0 {
		refreshes = 1 + rand.IntN(3)
	}
	sleeper := rand.IntN(40) == 0 // it refreshes when it is too late
	if sleeper {
		refreshes = 1
	}
	for range refreshes {
		if sleeper {
			l.rest(ctx, 2*ttl)
		} else {
			l.rest(ctx, rand.N(ttl/2))
		}
		call := l.now()
		err := lock.Refresh()
		ret := l.now()
		l.bounded("refresh", call)
		switch {
		case err == nil:
			if ret >= g.over {
				l.broke("lock %s: a refresh succeeded at %.3f, when the lease was over at %.3f", name, float64(ret)/1e9, float64(g.over)/1e9)
			}
			l.lock(client, name, lockInput{lockRefresh, g.token}, call, ret, false)
			l.mu.Lock()
			g.until, g.over, g.latest = call+int64(ttl), ret+int64(ttl), ret+int64(ttl+lapseSlack)
			l.mu.Unlock()
		case err == state.ErrLockExpired:
			if ret < g.until {
				l.broke("lock %s: a refresh came too late at %.3f, though the lease runs until %.3f", name, float64(ret)/1e9, float64(g.until)/1e9)
			}
		case err == state.ErrLockNotHeld:
			l.broke("lock %s: refresh returned ErrLockNotHeld before Unlock", name)
		default:
			l.note(client, "refresh of %s since %.3f: %v", name, float64(call)/1e9, err)
			unsure = true
			if l.unexpected("refresh", err) {
				g.latest = never
			}
		}
	}
	switch p := rand.IntN(40); {
	case p == 0: // a holder that dies
		lapse()
		return
	case p == 1: // one that sleeps for too long
		l.rest(ctx, ttl)
	}
	for try := 0; ; try++ {
		call := l.now()
		err := lock.Unlock()
		ret := l.now()
		l.bounded("unlock", call)
		l.mu.Lock()
		g.until = min(g.until, call)
		l.mu.Unlock()
		switch {
		case err == nil:
			if call >= g.over && !unsure {
				l.broke("lock %s: an unlock succeeded at %.3f, when the lease was over at %.3f", name, float64(ret)/1e9, float64(g.over)/1e9)
			}
			in := lockInput{lockRelease, g.token}
			if try == 0 {
				l.lock(client, name, in, call, ret, false)
				return
			}
			// An earlier attempt may have done it.
			l.lock(client, name, in, call, ret, true)
			lapse()
			return
		case err == state.ErrLockNotHeld:
			if ret < g.call+int64(ttl) && try == 0 {
				l.broke("lock %s: nothing to unlock at %.3f, though the lease runs from %.3f for %v", name, float64(ret)/1e9, float64(g.call)/1e9, ttl)
			}
			lapse()
			return
		}
		l.note(client, "unlock of %s since %.3f: %v", name, float64(call)/1e9, err)
		if l.unexpected("unlock", err) {
			l.lock(client, name, lockInput{lockRelease, g.token}, call, never, true)
		}
		if try == 2 || ctx.Err() != nil {
			lapse()
			return
		}
	}
}

// useTTLs writes keys that expire, each client its own ones, and reads them
// until they are gone: not before their deadline, and not long after it.
func (l *load) useTTLs(ctx context.Context, client int, s state.StateStore) {
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("ttl.%d.%d", client, n%5)
		value := fmt.Sprintf("%d.%d", client, n)
		ttl := 1 + rand.N(1500*time.Millisecond)
		l.wrote(l.writes, key, value)
		before := time.Now()
		err := s.Put(key, []byte(value), ttl)
		after := time.Now()
		if err != nil {
			l.unexpected("put", err)
			// It may come late, so this key is not used again.
			n += 1000 * 5
			l.rest(ctx, 50*time.Millisecond)
			continue
		}
		l.wrote(l.acked, key, value)
		for ctx.Err() == nil {
			asked := time.Now()
			got, err := s.Get(key)
			told := time.Now()
			switch {
			case err == nil && string(got) == value:
				if late := asked.Sub(after) - ttl; late > 0 && told.Sub(asked) < 100*time.Millisecond && late > 2*time.Second {
					l.broke("key %s was read %v after its end", key, late)
				}
			case err == nil:
				l.broke("key %s is %q instead of %q", key, got, value)
			case err == state.ErrNotFound:
				if told.Sub(before) < ttl {
					l.broke("key %s was gone after %v of %v", key, told.Sub(before), ttl)
				}
			}
			if err == state.ErrNotFound {
				l.ttlChecks.Add(1)
				break
			}
			l.rest(ctx, 20*time.Millisecond)
		}
	}
}

// useLists has one client write and delete keys that nobody else does, and
// another one list them, which must see exactly what there is.
func (l *load) useLists(ctx context.Context, client int, writer, reader state.StateStore) {
	const prefix = "list."
	want := []string{}
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("%s%d", prefix, n)
		value := fmt.Sprintf("%d.%d", client, n)
		l.wrote(l.writes, key, value)
		err := writer.Put(key, []byte(value), 0)
		if err == nil {
			l.wrote(l.acked, key, value)
			want = append(want, key)
			if len(want) > 10 {
				gone := rand.IntN(len(want))
				if err = writer.Delete(want[gone]); err == nil {
					want = slices.Delete(want, gone, gone+1)
				}
			}
		}
		if err != nil {
			// Nobody knows what there is, so it is found out: another writer's
			// keys are none of these.
			l.unexpected("write", err)
			for range 20 {
				l.rest(ctx, 500*time.Millisecond) // what comes late has come then
				if got, err := writer.Keys(prefix + "*"); err == nil {
					want = got
					break
				}
			}
			continue
		}
		call := l.now()
		got, err := reader.Keys(prefix + "*")
		l.bounded("keys", call)
		slices.Sort(want)
		switch {
		case err != nil:
			l.unexpected("keys", err)
		case !slices.Equal(got, want):
			l.list(call, fmt.Sprintf("keys %q instead of %q", got, want))
		default:
			l.listings.Add(1)
		}
		l.rest(ctx, 5*l.pace)
	}
}

// list notes a listing that is not right. Within a window that may be excused.
func (l *load) list(call int64, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrongLists = append(l.wrongLists, wrongList{call, l.now(), text})
}

type wrongList struct {
	call, ret int64
	text      string
}

// A watched is a watch and what it told.
type watched struct {
	pattern string
	slow    bool
	done    sync.WaitGroup
	seen    chan struct{} // of one slot: there is more

	mu     sync.Mutex // guards what follows
	events map[string][]*state.KeyValue
	last   time.Time
	ended  bool
}

func (w *watched) read(l *load, events <-chan *state.KeyValue) {
	for kv := range events {
		l.events.Add(1)
		w.mu.Lock()
		if w.events == nil {
			w.events = map[string][]*state.KeyValue{}
		}
		w.last = time.Now()
		told := w.events[kv.Key]
		w.check(l, told, kv)
		w.events[kv.Key] = append(told, kv)
		w.mu.Unlock()
		if w.slow && rand.IntN(200) == 0 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
}

// check holds an event against the rules for each one.
func (w *watched) check(l *load, told []*state.KeyValue, kv *state.KeyValue) {
	if !state.MatchPattern(w.pattern, kv.Key) {
		l.broke("watch %s told of %s", w.pattern, kv.Key)
	}
	var last *state.KeyValue
	if len(told) > 0 {
		last = told[len(told)-1]
	}
	if kv.Operation == state.OpPut {
		l.show(kv, true)
		if last != nil && kv.Modified.Before(last.Modified) {
			l.broke("watch %s: %s: revision %d was written at %v, and %d before it at %v", w.pattern, kv.Key, kv.Revision, kv.Modified, last.Revision, last.Modified)
		}
		if last != nil && kv.Revision <= last.Revision {
			l.broke("watch %s: %s: revision %d after %d", w.pattern, kv.Key, kv.Revision, last.Revision)
		}
		l.mu.Lock()
		known := l.writes[kv.Key][string(kv.Value)]
		l.mu.Unlock()
		if !known {
			l.broke("watch %s: %s: nobody wrote %q", w.pattern, kv.Key, kv.Value)
		}
		return
	}
	if kv.Value != nil || !kv.Created.IsZero() || kv.Modified.IsZero() || kv.Revision == 0 {
		l.broke("watch %s: malformed deletion %+v", w.pattern, kv)
	}
	if last == nil {
		return
	}
	if last.Operation == state.OpDelete && kv.Revision <= last.Revision || kv.Revision < last.Revision {
		l.broke("watch %s: %s: deletion %d after %v %d", w.pattern, kv.Key, kv.Revision, last.Operation, last.Revision)
	}
	if kv.Revision == last.Revision && kv.Modified.Before(last.Modified) {
		l.broke("watch %s: %s: expired before it was written", w.pattern, kv.Key)
	}
}

// endWatches waits until the watches have caught up, and compares what they
// told with what was written, and with what there is.
func (l *load) endWatches(reader state.StateStore) {
	// A barrier: what was written before comes before it. It is written until
	// that succeeds, since servers may just be coming back.
	const barrier = "reg.end"
	value := "end"
	l.wrote(l.writes, barrier, value)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := reader.Put(barrier, []byte(value), 0)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			l.broke("no write succeeds any more: %v", err)
			return
		}
	}
	keys, err := reader.Keys("*")
	for end := time.Now().Add(20 * time.Second); err != nil && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		keys, err = reader.Keys("*")
	}
	if err != nil {
		l.broke("keys: %v", err)
		return
	}
	if !slices.IsSorted(keys) || len(slices.Compact(slices.Clone(keys))) != len(keys) {
		l.broke("keys are not sorted, or not unique: %q", keys)
	}
	final := map[string]*state.KeyValue{}
	for _, key := range keys {
		kv, err := reader.GetKeyValue(key)
		if err != nil && err != state.ErrNotFound {
			l.broke("get %s: %v", key, err)
		}
		if err == nil {
			l.show(kv, false)
			final[key] = kv
		} else if key[:3] == "reg" {
			l.broke("%s is listed but not there", key)
		}
	}
	for _, w := range l.watched {
		if problem := w.settle(final); problem != "" {
			l.broke("watch %s: %s", w.pattern, problem)
		}
		if l.cut.Load() {
			continue
		}
		w.mu.Lock()
		l.mu.Lock()
		for key, values := range l.acked {
			if !state.MatchPattern(w.pattern, key) {
				continue
			}
			told := map[string]bool{}
			for _, kv := range w.events[key] {
				told[string(kv.Value)] = true
			}
			for value := range values {
				// A slow reader is spared what was replaced.
				if !told[value] && !(w.slow && (len(w.events[key]) > 0 || final[key] == nil)) {
					l.broken = append(l.broken, fmt.Sprintf("watch %s: %s: %q was not told", w.pattern, key, value))
				}
			}
		}
		l.mu.Unlock()
		w.mu.Unlock()
	}
}

// settle waits until the last event of each key is its final state, and says
// what is wrong otherwise.
func (w *watched) settle(final map[string]*state.KeyValue) (problem string) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if problem = w.differs(final); problem == "" {
			return ""
		}
	}
	return problem
}

func (w *watched) differs(final map[string]*state.KeyValue) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return "it has ended"
	}
	for key, kv := range final {
		if !state.MatchPattern(w.pattern, key) || key[:3] == "ttl" {
			continue
		}
		told := w.events[key]
		if len(told) == 0 {
			return fmt.Sprintf("%s, which is at revision %d, was not told of", key, kv.Revision)
		}
		if last := told[len(told)-1]; last.Revision != kv.Revision || last.Operation != state.OpPut || string(last.Value) != string(kv.Value) || !last.Modified.Equal(kv.Modified) {
			return fmt.Sprintf("%s is at revision %d, the last event was %v %d", key, kv.Revision, last.Operation, last.Revision)
		}
	}
	for key, told := range w.events {
		last := told[len(told)-1]
		if last.Operation == state.OpPut && (final[key] == nil || key[:3] == "ttl") {
			return fmt.Sprintf("%s is gone, the last event was put %d", key, last.Revision)
		}
	}
	return ""
}
