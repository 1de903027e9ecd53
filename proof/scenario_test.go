package proof

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

// A scenario is a load on a kind of store, with what goes wrong meanwhile.
type scenario struct {
	name      string
	servers   int  // 0 for MemoryStore
	chaos     bool // package statetest has its faults happen to all stores, in a bubble
	processes bool
	account   bool                            // clients log in to an account
	fault     func(context.Context, *trouble) // nil for none
	distance  func() distance                 // between a client and its servers; nil for none
	options   func() []nats.Option            // of a client's connection
	adjust    func(*load)
	beside    func(context.Context, *trouble) // what else happens all the time; nil for nothing
}

// A trouble is what a fault works on.
type trouble struct {
	*cluster
	load    *load
	streams []string

	mu      sync.Mutex // guards what follows
	faults  int
	windows []window
	told    []string // what was done when
	notes   []string
}

func (f *trouble) tell(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.told = append(f.told, fmt.Sprintf("%.3f: ", float64(f.load.now())/1e9)+fmt.Sprintf(format, args...))
}

// note keeps something to be printed at the end.
func (f *trouble) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.notes = append(f.notes, fmt.Sprintf(format, args...))
}

func (f *trouble) about() []string {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.notes
}

// count counts one fault that was injected.
func (f *trouble) count() {
	f.mu.Lock()
	f.faults++
	f.mu.Unlock()
}

// stale notes that reads may be stale from a moment on, for as long as a leader
// that was cut off takes to notice.
func (f *trouble) stale(from, to int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.windows = append(f.windows, window{from, to})
}

// some returns one of the streams, and the number of its leader, or that of any
// server.
func (f *trouble) some() (stream string, number int) {
	stream = f.streams[rand.IntN(len(f.streams))]
	number = rand.IntN(len(f.nodes))
	if leader, _ := f.leader(stream); leader >= 0 && rand.IntN(3) > 0 {
		number = leader
	}
	return stream, number
}

func first(number int, _ bool) int { return number }

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// between returns a random duration.
func between(from, to time.Duration) time.Duration { return from + rand.N(to-from) }

// The faults. Each is over when it returns.

func stepDown(ctx context.Context, f *trouble) {
	stream, _ := f.some()
	if _, err := f.admin.Request("$JS.API.STREAM.LEADER.STEPDOWN."+stream, nil, 2*time.Second); err == nil {
		f.tell("%s steps down", stream)
		f.count()
	}
	sleep(ctx, between(200*time.Millisecond, time.Second))
}

func restart(kill bool) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		_, number := f.some()
		f.count()
		f.load.cut.Store(true)
		f.tell("stop server %d, kill: %v; locks are led by %d", number, kill, first(f.leader("KV_proof-locks")))
		f.nodes[number].stop(kill)
		sleep(ctx, between(200*time.Millisecond, 3*time.Second))
		f.tell("start server %d; locks are led by %d", number, first(f.leader("KV_proof-locks")))
		if err := f.nodes[number].start(); err != nil {
			f.load.broke("server %d does not start: %v", number, err)
		}
		f.recover(ctx, f.streams...)
	}
}

func pause(ctx context.Context, f *trouble) {
	_, number := f.some()
	f.count()
	f.load.cut.Store(true)
	from := f.load.now()
	f.tell("pause server %d", number)
	defer func() { f.tell("recovered from the pause of server %d", number) }()
	f.nodes[number].pause(between(300*time.Millisecond, 8*time.Second))
	if len(f.nodes) > 1 {
		// Whoever wakes up after a new leader was elected believes for a moment
		// that it still is the leader.
		f.stale(from, f.load.now()+int64(10*time.Second))
	}
	f.recover(ctx, f.streams...)
}

// isolateServer cuts a server off from the others but not from its clients.
func isolateServer(change func(*proxy), from, to time.Duration) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		_, number := f.some()
		f.count()
		f.load.cut.Store(true)
		began := f.load.now()
		f.tell("isolate server %d; locks are led by %d", number, first(f.leader("KV_proof-locks")))
		f.isolate(number, change)
		sleep(ctx, between(from, to))
		f.isolate(number, (*proxy).heal)
		f.tell("heal")
		f.stale(began, f.load.now()+int64(10*time.Second))
		f.recover(ctx, f.streams...)
	}
}

// stallRoutes holds up all that the servers say to each other.
func stallRoutes(ctx context.Context, f *trouble) {
	f.count()
	f.load.cut.Store(true)
	began := f.load.now()
	f.tell("stall routes")
	for _, p := range f.routes {
		p.freeze()
	}
	sleep(ctx, between(100*time.Millisecond, 6*time.Second))
	for _, p := range f.routes {
		p.heal()
	}
	f.tell("heal")
	f.stale(began, f.load.now()+int64(10*time.Second))
	f.recover(ctx, f.streams...)
}

// cutClients cuts some clients off from all servers.
func cutClients(change func(*proxy)) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		f.count()
		f.load.cut.Store(true)
		f.cluster.mu.Lock()
		var links [][]*proxy
		for _, cl := range f.clients {
			if rand.IntN(2) == 0 {
				links = append(links, cl.links)
			}
		}
		f.cluster.mu.Unlock()
		f.tell("cut clients")
		defer func() { f.tell("heal") }()
		for _, l := range links {
			for _, p := range l {
				change(p)
			}
		}
		sleep(ctx, between(50*time.Millisecond, 5*time.Second))
		for _, l := range links {
			for _, p := range l {
				p.heal()
			}
		}
	}
}

// anything is one fault after another, of all kinds.
func anything(faults ...func(context.Context, *trouble)) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) { faults[rand.IntN(len(faults))](ctx, f) }
}

// A result is what came of a scenario.
type result struct {
	ops, refused, unknown int
	histories, undecided  int
	cycles, kept          int64
	ttls, events          int64
	listings, caches, cut int64
	faults                int
	stale                 []staleRead
	broken                []string
}

func (r *result) add(x result) {
	r.ops += x.ops
	r.refused += x.refused
	r.unknown += x.unknown
	r.histories += x.histories
	r.undecided += x.undecided
	r.cycles += x.cycles
	r.kept += x.kept
	r.ttls += x.ttls
	r.events += x.events
	r.listings += x.listings
	r.caches += x.caches
	r.cut += x.cut
	r.faults += x.faults
	r.stale = append(r.stale, x.stale...)
	r.broken = append(r.broken, x.broken...)
}

// little reports whether too little happened to say anything.
func (r result) little(sc scenario) bool {
	return r.ops < 30 || r.cycles < 3 || r.events < 10 || sc.fault != nil && r.faults == 0
}

// lacks reports whether something never happened that does within a minute, or within
// so many turns at a lock.
func (r result) lacks(sc scenario) bool {
	return r.little(sc) || 2*r.refused > r.ops || 100*r.undecided > r.histories || r.kept == 0 && r.cycles > 700 ||
		slices.Contains([]int64{r.ttls, r.listings, r.caches, r.cut}, 0)
}

func (r result) String() string {
	var latest time.Duration
	for _, s := range r.stale {
		latest = max(latest, s.after)
	}
	text := fmt.Sprintf("%d operations (%d failed cleanly, %d of unknown outcome), %d histories checked (%d undecided), %d lock cycles, %d locks held beyond their TTL, %d expiries, %d listings, %d events, %d reads of a cache, %d calls cut short, %d faults, %d broken rules",
		r.ops, r.refused, r.unknown, r.histories, r.undecided, r.cycles, r.kept, r.ttls, r.listings, r.events, r.caches, r.cut, r.faults, len(r.broken))
	if len(r.stale) > 0 {
		text += fmt.Sprintf(", %d stale reads through a leader cut off, the last %.1f s after the cut", len(r.stale), latest.Seconds())
	}
	return text
}

// run runs a scenario for a while.
func (sc scenario) run(t *testing.T, d time.Duration) (r result) {
	t.Helper()
	var l *load
	var f *trouble
	switch {
	case sc.chaos:
		synctest.Test(t, func(t *testing.T) {
			c := newChaos()
			l = c.load
			sc.work(t, l, nil, 60*d) // which takes little time in a bubble
			r.faults = c.faults()
		})
	case sc.servers == 0:
		s := state.NewMemoryStore()
		defer s.Close()
		again := func() (state.Store, error) { return s.Client(), nil }
		l = newLoad(func() (state.Store, func() (state.Store, error), error) { return s.Client(), again, nil })
		l.pace = 100 * time.Microsecond
		l.epoch = 100 * time.Millisecond
		sc.work(t, l, nil, d)
	default:
		var a *account
		if sc.account {
			a = usual()
		}
		c := startClusterWith(t, sc.servers, sc.processes, a)
		c.distance, c.options = sc.distance, sc.options
		l = newLoad(func() (state.Store, func() (state.Store, error), error) { return c.open("proof") })
		f = &trouble{cluster: c, load: l, streams: []string{"KV_proof", "KV_proof-locks"}}
		sc.work(t, l, f, d)
	}
	var windows []window
	if f != nil {
		windows, r.faults = f.windows, f.faults
	}
	for _, s := range f.about() {
		t.Logf("%s: %s", sc.name, s)
	}
	v := l.check(windows, 20*time.Second)
	r.histories, r.undecided, r.stale = v.histories, v.undecided, v.stale
	r.broken = append(l.broken, v.faults...)
	for _, w := range l.suspects {
		if i := slices.IndexFunc(windows, func(x window) bool { return w.ret >= x.from && w.call <= x.to }); i >= 0 {
			r.stale = append(r.stale, staleRead{w.text, time.Duration(w.ret - windows[i].from)})
		} else {
			r.broken = append(r.broken, w.text)
		}
	}
	r.listings, r.caches, r.cut = l.listings.Load(), l.cacheReads.Load(), l.cutShort.Load()
	r.ops, r.refused, r.unknown = l.done, l.refused, l.unknown
	r.cycles, r.kept, r.ttls, r.events = l.lockCycles.Load(), l.kept.Load(), l.ttlChecks.Load(), l.events.Load()
	t.Logf("%s: %v", sc.name, r)
	for _, s := range r.stale {
		t.Logf("%s: stale, %.3f s after the cut: %s", sc.name, s.after.Seconds(), s.text)
	}
	if len(r.broken) > 0 {
		t.Errorf("%s:\n%s", sc.name, strings.Join(r.broken, "\n"))
		l.explain(t, r.broken, f)
	}
	return r
}

// work has the load work for a while, and faults happen to it.
func (sc scenario) work(t *testing.T, l *load, f *trouble, d time.Duration) {
	t.Helper()
	l.quiet = sc.fault == nil && !sc.chaos
	if sc.adjust != nil {
		sc.adjust(l)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var wg, faults sync.WaitGroup
	if sc.fault != nil {
		// A server that stands still can hold a write which nobody waits for any more.
		l.calm = func() {
			faults.Wait()
			time.Sleep(l.late)
		}
	}
	err := l.run(ctx, func() {
		time.AfterFunc(d, cancel)
		if sc.beside != nil {
			wg.Go(func() { sc.beside(ctx, f) })
		}
		if sc.fault == nil {
			return
		}
		faults.Go(func() {
			sleep(ctx, time.Second)
			for ctx.Err() == nil {
				sc.fault(ctx, f)
				sleep(ctx, between(300*time.Millisecond, 2*time.Second))
			}
		})
	})
	wg.Wait()
	faults.Wait()
	if err != nil {
		t.Errorf("%s: %v", sc.name, err)
	}
}

// explain shows when there were faults, and what was done to the locks that are
// spoken of.
func (l *load) explain(t *testing.T, broken []string, f *trouble) {
	t.Helper()
	if f != nil {
		t.Logf("faults:\n  %s", strings.Join(f.told, "\n  "))
		t.Logf("began at %v; what the stores logged:\n%s", l.began.Format(time.RFC3339Nano), &f.cluster.journal)
	}
	shown := map[string]bool{}
	for _, text := range broken {
		name, _, _ := strings.Cut(strings.TrimPrefix(text, "lock "), " ")
		name = strings.TrimSuffix(name, ":")
		if ops := l.locks[name]; len(ops) > 0 && !shown[name] && len(shown) < 5 {
			shown[name] = true
			t.Logf("lock %s:\n%s", name, script(lockModel, slices.Clone(ops)))
			for _, note := range l.notes {
				if strings.Contains(note, name+" ") {
					t.Log(note)
				}
			}
		}
	}
}

var scenarios = []scenario{
	{name: "memory"},
	{name: "memory-chaos", chaos: true},
	{name: "one-server", servers: 1},
	{name: "one-server-far", servers: 1, distance: far, adjust: atADistance},
	{name: "one-server-narrow", servers: 1, distance: narrow, adjust: func(l *load) {
		atADistance(l)
		l.big, l.pace, l.catchUp, l.watchers = largest, 50*time.Millisecond, 90*time.Second, 2
		l.transfer = 8 * time.Second // of the largest value, beside the rest
	}},
	{name: "one-server-traffic", servers: 1, beside: traffic, adjust: func(l *load) { l.timers = 4 }},
	{name: "one-server-far-traffic", servers: 1, distance: far, beside: traffic, adjust: func(l *load) {
		atADistance(l)
		l.timers, l.aged = 4, 7*time.Second // see README, "Found, and not fixed"
	}},
	{name: "one-server-busy", servers: 1, beside: burn},
	{name: "one-server-connections", servers: 1, options: anyOptions},
	{name: "one-server-connections-cut", servers: 1, options: anyOptions, fault: cutClients((*proxy).sever)},
	{name: "one-server-numbers", servers: 1, beside: numbers, adjust: func(l *load) { l.keys, l.lockers = 2, 2 }},
	{name: "one-server-far-numbers", servers: 1, distance: far, beside: both(numbers, traffic), adjust: func(l *load) {
		atADistance(l)
		l.keys, l.lockers = 2, 2
	}},
	{name: "one-server-operators", servers: 1, fault: operate(
		raiseHistory, setMaxAge, mirror, stepBack), adjust: func(l *load) { l.ages = true }},
	{name: "one-server-account", servers: 1, account: true, adjust: limited, fault: anything(
		deny("$KV.proof.>"), deny("$KV.proof-locks.>"), deny("$JS.API.STREAM.>"), deny("$JS.API.CONSUMER.>"), deny("$JS.API.DIRECT.>"),
		replaceCredentials, limit("max_file: 1K, max_memory: 1K"), limit("max_file: 1G, max_memory: 1G, max_consumers: 1"),
		setting("max_msg_size", 10), setting("max_msgs", 1), setting("max_bytes", 1),
	)},
	{name: "three-servers-operators", servers: 3, fault: operate(
		replicas, raiseHistory, setMaxAge, mirror, stepBack), adjust: func(l *load) { l.ages = true }},
	{name: "three-servers-far", servers: 3, distance: far, adjust: atADistance},
	{name: "three-servers-traffic", servers: 3, beside: traffic, adjust: func(l *load) { l.timers = 4 }},
	{name: "one-server-restarts", servers: 1, fault: restart(false)},
	{name: "one-server-kills", servers: 1, processes: true, fault: restart(true)},
	{name: "one-server-pauses", servers: 1, processes: true, fault: pause},
	{name: "one-server-clients-frozen", servers: 1, fault: cutClients((*proxy).freeze)},
	{name: "one-server-clients-cut", servers: 1, fault: cutClients((*proxy).sever)},
	{name: "three-servers", servers: 3},
	{name: "three-servers-step-downs", servers: 3, fault: stepDown},
	{name: "three-servers-restarts", servers: 3, fault: restart(false)},
	{name: "three-servers-kills", servers: 3, processes: true, fault: restart(true)},
	{name: "three-servers-pauses", servers: 3, processes: true, fault: pause},
	{name: "three-servers-isolated-silently", servers: 3, fault: isolateServer((*proxy).freeze, 2*time.Second, 16*time.Second)},
	{name: "three-servers-isolated-cut", servers: 3, fault: isolateServer((*proxy).sever, 2*time.Second, 16*time.Second)},
	{name: "three-servers-routes-stalled", servers: 3, fault: stallRoutes},
	{name: "three-servers-clients-frozen", servers: 3, fault: cutClients((*proxy).freeze)},
	{name: "three-servers-anything", servers: 3, processes: true, fault: anything(
		stepDown, restart(false), restart(true), pause, stallRoutes,
		isolateServer((*proxy).freeze, time.Second, 10*time.Second), isolateServer((*proxy).sever, time.Second, 10*time.Second),
		cutClients((*proxy).freeze), cutClients((*proxy).sever),
	)},
	{name: "three-servers-far-anything", servers: 3, processes: true, distance: far, beside: traffic, adjust: atADistance, fault: anything(
		stepDown, restart(false), restart(true), pause, cutClients((*proxy).freeze), cutClients((*proxy).sever),
	)},
}
