package proof

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
)

// A load is concurrent clients at work, whose every step is recorded.
type load struct {
	*history
	// open returns a store on a connection of its own, and a function that opens
	// further ones on this connection.
	open func() (s state.Store, again func() (state.Store, error), err error)

	keys, lockers, timers, watchers int // clients of each kind
	pace                            time.Duration
	epoch                           time.Duration // how long a key is used before the next one, so that histories stay short
	big                             int           // the size of the largest value, which is rare
	transfer                        time.Duration // how long what is in front of an event may take
	aged                            time.Duration // how old a cache may be, if that is more than four seconds
	catchUp                         time.Duration // how long watches may take to catch up at the end
	quiet                           bool          // no faults: calls that are cut short must return at once
	ages                            bool          // a max_age of an hour or two comes and goes
	evicts                          bool          // the bucket may remove any entry without a message
	endable                         bool          // watches may end
	allowed                         []error       // sentinels that are documented for what an operator does
	late                            time.Duration // how long a write of unknown outcome may be under way
	calm                            func()        // ends what goes wrong, before all is compared; or nil

	sightings sync.Map // of every revision that anybody was shown, what it was
	lag       atomic.Int64
	asleep    atomic.Int64 // since when measureLag sleeps
	mu        sync.Mutex   // guards what follows
	broken    []string     // rules that were broken
	watched   []*watched
	written   map[string][]*write          // by key, in the order of the calls
	values    map[string]map[string]*write // by key and value

	bulk     int64    // bytes of large values
	full     []window // when there may have been no room even for a deletion
	suspects []suspect
	notes    []string

	lockCycles, kept, ttlChecks, events, listings, cacheReads, cutShort atomic.Int64
	cut                                                                 atomic.Bool // a client was cut off
}

// A write is one that was tried.
type write struct {
	value     string // "" for a deletion
	ttl       time.Duration
	call, ret int64 // ret is never unless it was acknowledged
	refused   bool  // it failed, and said that it changed nothing
}

func newLoad(open func() (state.Store, func() (state.Store, error), error)) *load {
	return &load{
		history: newHistory(), open: open,
		keys: 5, lockers: 4, timers: 1, watchers: 4,
		pace: time.Millisecond, epoch: time.Second, catchUp: 20 * time.Second, late: 500 * time.Millisecond,
		written: map[string][]*write{}, values: map[string]map[string]*write{},
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
	var stores []state.Store
	defer func() {
		for _, s := range stores {
			_ = s.Close()
		}
	}()
	total := l.keys + l.lockers + l.timers + l.watchers + 2
	var again func() (state.Store, error)
	for range total {
		s, more, err := l.open()
		if err != nil {
			return err
		}
		stores = append(stores, s)
		again = more
	}
	reader := stores[total-1]
	watching, unwatch := context.WithCancel(context.Background())
	defer unwatch()
	watchStart := l.keys + l.lockers + l.timers
	for i := range l.watchers {
		w := &watched{pattern: []string{"*", "reg*", "*", "reg.*"}[i%4], slow: i%4 == 1, follow: i%4 > 1}
		if err := w.start(watching, l, stores[watchStart+i]); err != nil {
			return err
		}
		l.watched = append(l.watched, w)
	}
	cache, err := state.NewCache(watching, stores[watchStart], "*")
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	defer cache.Close()
	ready()
	var lag, wg sync.WaitGroup
	lag.Go(func() { l.measureLag(watching) }) // what expires at last is judged later
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
		wg.Go(func() { l.refreshKey(ctx, 1000+i, stores[l.keys+l.lockers+i]) })
		wg.Go(func() { l.refreshLate(ctx, 1100+i, stores[l.keys+l.lockers+i], stores[total-3]) })
	}
	wg.Go(func() { l.useLists(ctx, total, stores[total-2], stores[total-3]) }) // on a watcher's connection
	wg.Go(func() { l.useCache(ctx, total+1, stores[total-2], cache) })
	wg.Go(func() { l.closeStores(ctx, total+2, again) })
	wg.Wait()
	if l.calm != nil {
		l.calm()
	}
	l.endWatches(reader, cache)
	unwatch()
	for _, w := range l.watched {
		w.done.Wait()
	}
	lag.Wait()
	return nil
}

// lagStep is how long measureLag sleeps at a time.
const lagStep = 10 * time.Millisecond

// measureLag notes by how much too late the processor lets a goroutine go on:
// deadlines of this load are that much later.
func (l *load) measureLag(ctx context.Context) {
	for ctx.Err() == nil {
		l.asleep.Store(l.now())
		l.rest(ctx, 0)
		time.Sleep(lagStep)
		l.lag.Store(max(l.lag.Load(), l.overslept()))
	}
	l.asleep.Store(never)
}

// overslept returns how much longer than lagStep the present sleep of measureLag has
// lasted.
func (l *load) overslept() int64 { return l.now() - l.asleep.Load() - int64(lagStep) }

// slack is how much later than promised something may be, as far as the
// processor is to blame.
func (l *load) slack() time.Duration { return 5 * time.Duration(max(l.lag.Load(), l.overslept())) }

// note remembers an error for those who ask why.
func (l *load) note(client int, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, fmt.Sprintf("%.3f: client %d: ", float64(l.now())/1e9, client)+fmt.Sprintf(format, args...))
}

// write records that a value is about to be written, "" for a deletion.
func (l *load) write(key, value string, ttl time.Duration) *write {
	w := &write{value: value, ttl: ttl, call: l.now(), ret: never}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.written[key] = append(l.written[key], w)
	if value != "" {
		if l.values[key] == nil {
			l.values[key] = map[string]*write{}
		}
		l.values[key][value] = w
	}
	return w
}

// acked records that a write was acknowledged.
func (l *load) acked(w *write) {
	ret := l.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	w.ret = ret
}

// refusedWrite records that a write failed and says that it changed nothing.
func (l *load) refusedWrite(w *write) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.refused = true
}

// value returns a value that no other write has.
func (l *load) value(client, n int) string {
	value := fmt.Sprintf("%d.%d", client, n)
	if l.big > 0 && rand.IntN(20) == 0 {
		size := rand.IntN(l.big>>rand.IntN(8) - len(value))
		if rand.IntN(10) == 0 {
			size = l.big - len(value) - len(".")
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.bulk+int64(size) > int64(l.big)+l.now()/int64(time.Second)*bulkRate {
			return value
		}
		l.bulk += int64(size)
		value += "." + strings.Repeat("x", size)
	}
	return value
}

// bulkRate is how many bytes of large values are written in a second after the
// first ones, so that a watch over the narrowest link keeps up.
const bulkRate = 64 << 10

// unexpected checks an error that is not one of the documented outcomes. It
// reports whether the outcome is unknown.
func (l *load) unexpected(verb string, err error) (unknown bool) {
	if errors.Is(err, state.ErrClosed) && errors.Is(err, state.ErrOutcomeUnknown) {
		return true
	}
	for _, bare := range []error{state.ErrNotFound, state.ErrClosed, state.ErrLockHeld, state.ErrLockNotHeld, state.ErrLockExpired,
		state.ErrInvalidKey, state.ErrInvalidTTL, state.ErrWatchClosed, state.ErrConflict, state.ErrValueTooLarge, state.ErrStoreFull} {
		if errors.Is(err, bare) && !slices.Contains(l.allowed, bare) {
			l.broke("%s returned %q", verb, err)
		}
	}
	return errors.Is(err, state.ErrOutcomeUnknown)
}

// bounded checks that a call did not block for longer than promised.
func (l *load) bounded(verb string, call int64) {
	limit := 11 * time.Second
	if verb == "listing" {
		limit += 15 * time.Second // it may start over for five seconds, and its messages give it more time
	}
	if took := time.Duration(l.now() - call); took > limit+l.slack() {
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
func (l *load) useKeys(ctx context.Context, client int, s state.Store) {
	type known struct {
		value    string
		revision uint64
	}
	seen := map[string]known{}
	ttls := []time.Duration{0, time.Hour, 90*time.Minute + 1}
	for n := 0; ctx.Err() == nil; n++ {
		key := l.name("reg")
		value := l.value(client, n)
		ttl := ttls[rand.IntN(len(ttls))]
		in, out := regInput{value: value}, regOutput{}
		var err error
		var w *write // of a value, or a deletion
		bound, end := s, func(int64, error) {}
		if rand.IntN(20) == 0 {
			bound, end = l.bind(s)
		}
		call := l.now()
		p := rand.IntN(100)
		if client == 0 {
			p = rand.IntN(40) // one only reads, so that it is never held up by a write
		}
		switch {
		case p < 20:
			in = regInput{verb: regGet}
			var kv *state.KeyValue
			if kv, err = bound.GetKeyValue(key); err == nil {
				l.show(kv)
				seen[key] = known{string(kv.Value), kv.Revision}
				out.value = string(kv.Value)
			}
		case p < 35:
			in = regInput{verb: regGet}
			var got []byte
			got, err = bound.Get(key)
			out.value = string(got)
		case p < 40:
			in = regInput{verb: regGet} // as a listing of the one key
			var got []*state.KeyValue
			if got, err = bound.Entries(key); err == nil && len(got) == 1 {
				l.show(got[0])
				out.value = string(got[0].Value)
			} else if err == nil && len(got) > 1 {
				l.broke("entries of %s: %d of them", key, len(got))
			}
		case p < 62:
			in.verb = regPut
			w = l.write(key, value, ttl)
			err = bound.Put(key, []byte(value), ttl)
		case p < 72:
			in.verb, in.value = regDelete, ""
			w = l.write(key, "", 0)
			err = bound.Delete(key)
		case p < 78: // a deletion of a revision is an update to nothing
			last := seen[key]
			if last.revision == 0 {
				continue
			}
			in = regInput{verb: regUpdate, old: last.value}
			w = l.write(key, "", 0)
			delete(seen, key)
			if err = bound.DeleteRevision(key, last.revision); err == state.ErrConflict {
				out.conflict, err = true, nil
			}
		case p < 86:
			in.verb = regUpdate
			w = l.write(key, value, ttl)
			var revision uint64
			var old *state.KeyValue
			revision, err = l.modify(bound, key, func(kv *state.KeyValue) ([]byte, time.Duration, error) {
				if old = kv; kv != nil {
					l.show(kv)
				}
				return []byte(value), ttl, nil
			})
			if old != nil {
				in.old = string(old.Value)
				if err == nil && revision <= old.Revision {
					l.broke("modify of %s: revision %d after %d", key, revision, old.Revision)
				}
			}
		default:
			last, ok := seen[key]
			if !ok {
				continue
			}
			in.verb, in.old = regUpdate, last.value
			w = l.write(key, value, ttl)
			var revision uint64
			revision, err = bound.Update(key, []byte(value), ttl, last.revision)
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
		if err == state.ErrNotFound && in.verb == regGet {
			seen[key] = known{}
			err = nil
		}
		l.bounded(fmt.Sprint("register operation ", in.verb), call)
		end(call, err)
		switch {
		case err == nil:
			switch {
			case w == nil:
			case out.conflict:
				l.refusedWrite(w)
			default:
				l.acked(w)
			}
			l.register(client, key, in, call, out)
		case l.unexpected("key "+key, err) && in.verb != regGet:
			out.unknown = true
			l.register(client, key, in, call, out)
		default:
			if w != nil {
				l.refusedWrite(w)
			}
			l.refuse()
		}
		l.rest(ctx, l.pace)
	}
}

// modify is state.Modify with the context that the store is bound to, if it is.
func (l *load) modify(s state.Store, key string, fn func(*state.KeyValue) ([]byte, time.Duration, error)) (uint64, error) {
	ctx := context.Background()
	if b, ok := s.(boundStore); ok {
		ctx = b.ctx
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return state.Modify(ctx, s, key, fn)
}

// A boundStore knows what it is bound to.
type boundStore struct {
	state.Store
	ctx context.Context
}

// bind returns a store whose calls are cut short at a random time, and what
// checks how they were.
func (l *load) bind(s state.Store) (state.Store, func(call int64, err error)) {
	ctx, cancel := context.WithTimeout(context.Background(), rand.N(4*l.pace+time.Millisecond))
	return boundStore{s.WithContext(ctx), ctx}, func(call int64, err error) {
		defer cancel()
		over, _ := ctx.Deadline()
		if late := time.Since(over); late > time.Second+l.slack() && l.quiet {
			l.broke("a call whose context had ended went on for %v", late)
		}
		if err == nil || ctx.Err() == nil || l.unexpectedly(err) {
			return
		}
		l.cutShort.Add(1)
		if l.quiet && !errors.Is(err, context.DeadlineExceeded) {
			l.broke("a call was cut short by its context and returned %q", err)
		}
	}
}

// unexpectedly reports whether an error is a documented outcome.
func (l *load) unexpectedly(err error) bool {
	return err == state.ErrConflict || err == state.ErrNotFound //nolint:errorlint // bare
}

// closeStores opens stores and closes them while they are used.
func (l *load) closeStores(ctx context.Context, client int, open func() (state.Store, error)) {
	for n := 0; ctx.Err() == nil; n++ {
		s, err := open()
		if err != nil {
			l.rest(ctx, 200*time.Millisecond)
			continue
		}
		var wg sync.WaitGroup
		closing := make(chan struct{})
		for i := range 4 {
			wg.Go(func() {
				for j := 0; ; j++ {
					key, value := l.name("reg"), fmt.Sprintf("%d.%d.%d.%d", client, n, i, j)
					w := l.write(key, value, 0)
					call := l.now()
					err := s.Put(key, []byte(value), 0)
					l.bounded("put", call)
					in, out := regInput{verb: regPut, value: value}, regOutput{}
					switch {
					case err == nil:
						l.acked(w)
						l.register(client+10*i, key, in, call, out)
					case err == state.ErrClosed: //nolint:errorlint // bare
						l.refusedWrite(w)
						l.refuse()
						select {
						case <-closing:
						default:
							l.broke("put returned %q before Close", err)
						}
						return
					case l.unexpected("put", err):
						out.unknown = true
						l.register(client+10*i, key, in, call, out)
					default:
						l.refusedWrite(w)
						l.refuse()
					}
					l.rest(ctx, 4*l.pace)
				}
			})
		}
		l.rest(ctx, 50*time.Millisecond)
		close(closing)
		began := time.Now()
		if err := s.Close(); err != nil {
			l.broke("close: %v", err)
		}
		wg.Wait()
		if took := time.Since(began); took > 2*time.Second+10*l.pace+l.slack() {
			l.broke("calls went on for %v after Close", took)
		}
		l.rest(ctx, 500*time.Millisecond)
	}
}

// lapseSlack is how much later than its TTL a lease may end, with servers that
// are busy or gone for a while.
const lapseSlack = 20 * time.Second

// useLocks takes and releases locks, and holds what they protect against two
// holders.
func (l *load) useLocks(ctx context.Context, client int, s state.Store) {
	for n := 0; ctx.Err() == nil; n++ {
		name := fmt.Sprintf("lock.%d.%d", l.now()/int64(time.Second), rand.IntN(3))
		ttl := 100*time.Millisecond + rand.N(900*time.Millisecond)
		token := uint64(nobodyKnows) + uint64(client)<<32 + uint64(n) // if it is not known
		call := l.now()
		// It may have been held for a while, or will be, as often as it was asked for.
		inDoubt := func(times int) {
			for i := range times {
				token := token + uint64(i)<<24
				l.lock(client, name, lockInput{lockTake, token}, call, never, true)
				l.lock(client, name, lockInput{lockLapse, token}, call, never, false) // or is given back
			}
		}
		switch p := rand.IntN(10); {
		case p == 0:
			l.awaitAndHold(client, s, name, ttl, inDoubt)
		case p == 1:
			l.askHolder(client, s, name)
		default:
			lock, err := s.Lock(name, ttl)
			l.bounded("lock", call)
			switch {
			case err == nil:
				l.hold(ctx, client, name, ttl, call, lock)
			case err == state.ErrLockHeld:
				l.lock(client, name, lockInput{verb: lockHeld}, call, l.now(), false)
			case err == state.ErrLockExpired || l.unexpected("lock", err):
				// (ErrLockExpired says that the lease had lapsed before it could be
				// handed over.)
				inDoubt(1)
			default:
				l.refuse()
			}
		}
		l.rest(ctx, 2*l.pace)
	}
}

// askHolder asks who holds a lock.
func (l *load) askHolder(client int, s state.Store, name string) {
	call := l.now()
	info, err := s.LockHolder(name)
	l.bounded("lock holder", call)
	switch {
	case err == nil:
		if info.Key != name || info.Owner == "" {
			l.broke("lock %s: its holder is %+v", name, info)
		}
		l.lock(client, name, lockInput{lockHolder, info.Token}, call, l.now(), false)
	case err == state.ErrNotFound: //nolint:errorlint // bare
		l.lock(client, name, lockInput{verb: lockFree}, call, l.now(), false)
		info, err := s.LockHolder(name) // if that was wrong, it matters for how long
		l.note(client, "%s had no holder for the one who asked at %.3f; asked again, it has %+v, %v", name, float64(call)/1e9, info, err)
	default:
		l.unexpected("lock holder", err)
		l.refuse()
	}
}

// awaitAndHold waits for a lock and works under it for a while. Whatever it
// refreshes it does by itself.
func (l *load) awaitAndHold(client int, s state.Store, name string, ttl time.Duration, inDoubt func(int)) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*ttl)
	defer cancel()
	call := l.now()
	if !l.quiet {
		inDoubt(3) // of the attempts only the last one is known
	}
	lock, err := state.Acquire(ctx, s, name, ttl)
	lapsed := l.now()-call >= int64(ttl) // a lease may have, before its answer came
	if l.quiet && lapsed {
		inDoubt(3)
	}
	if over, _ := ctx.Deadline(); l.quiet && time.Since(over) > time.Second+l.slack() {
		l.broke("lock %s: Acquire went on for %v after its context had ended", name, time.Since(over))
	}
	if err != nil {
		switch {
		case err == state.ErrLockHeld: //nolint:errorlint // bare
		case err == state.ErrLockExpired, errors.Is(err, state.ErrOutcomeUnknown): //nolint:errorlint // bare
			if l.quiet && !lapsed {
				inDoubt(1)
			}
		case !errors.Is(err, context.DeadlineExceeded):
			l.unexpected("acquire", err)
		}
		l.refuse()
		return
	}
	token := lock.(state.Fenced).Token()
	got := l.now()
	g := &grant{client: client, token: token, call: call, ret: got, ttl: ttl, until: got, over: got + int64(ttl), latest: never}
	l.lock(client, name, lockInput{lockTake, token}, call, got, false)
	l.grant(name, g)
	l.lockCycles.Add(1)

	// It relies on the lock for as long as its context goes on, unless it was not
	// given the processor in time to see it end. The timer that ends the context can
	// be late, too: beside burning goroutines one in seventy was, by up to 12 ms.
	const timerLate = 50 * time.Millisecond
	relied := got
	work := time.Now().Add(rand.N(2 * ttl))
	err = state.Hold(context.Background(), lock, ttl, func(ctx context.Context, given uint64) error {
		if given != token {
			l.broke("lock %s: held with token %d instead of %d", name, given, token)
		}
		for paused := false; time.Now().Before(work); {
			began := time.Now()
			time.Sleep(2 * time.Millisecond)
			paused = paused || time.Since(began) > 20*time.Millisecond
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !paused {
				relied = max(relied, l.now()-int64(time.Since(began)+timerLate))
			}
		}
		return nil
	})
	switch {
	case err == nil && relied >= got+int64(ttl):
		l.kept.Add(1)
	case err != nil && err != state.ErrLockExpired && err != state.ErrLockNotHeld && err != state.ErrClosed: //nolint:errorlint // bare
		l.unexpected("hold", err)
	}
	l.mu.Lock()
	g.until = relied
	l.mu.Unlock()
	l.lock(client, name, lockInput{lockLapse, token}, relied, never, false)
}

func (l *load) hold(ctx context.Context, client int, name string, ttl time.Duration, call int64, lock state.Lock) {
	ret := l.now()
	g := &grant{client: client, token: lock.(state.Fenced).Token(), call: call, ret: ret, ttl: ttl, until: call + int64(ttl), over: ret + int64(ttl), latest: ret + int64(ttl+lapseSlack)}
	l.lock(client, name, lockInput{lockTake, g.token}, call, ret, false)
	l.grant(name, g)
	l.lockCycles.Add(1)
	if ret >= g.until+int64(l.slack()) {
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
			if call >= g.over {
				l.broke("lock %s: a refresh that was called for at %.3f succeeded, when the lease was over at %.3f", name, float64(call)/1e9, float64(g.over)/1e9)
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
func (l *load) useTTLs(ctx context.Context, client int, s state.Store) {
	given := 0 // how many sets of keys were given up
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("ttl.%d.%d.%d", client, given, n%5)
		value := fmt.Sprintf("%d.%d", client, n)
		ttl := 1 + rand.N(1500*time.Millisecond)
		w := l.write(key, value, ttl)
		before := time.Now()
		err := s.Put(key, []byte(value), ttl)
		after := time.Now()
		if err != nil {
			l.unexpected("put", err)
			given++ // it may come late, so this key is not used again
			l.rest(ctx, 50*time.Millisecond)
			continue
		}
		l.acked(w)
		for ctx.Err() == nil {
			asked := time.Now()
			got, err := s.Get(key)
			told := time.Now()
			switch {
			case err == nil && string(got) == value:
				if late := asked.Sub(after) - ttl; late > 0 && told.Sub(asked) < 100*time.Millisecond && late > 2*time.Second+l.slack() {
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

// refreshKey keeps a key alive, that no watch must report as expired unless a
// write came too late.
func (l *load) refreshKey(ctx context.Context, client int, s state.Store) {
	key := fmt.Sprintf("ttl.live.%d", client)
	for n := 0; ctx.Err() == nil; n++ {
		value := fmt.Sprintf("%d.%d", client, n)
		w := l.write(key, value, time.Second)
		switch err := s.Put(key, []byte(value), time.Second); {
		case err == nil:
			l.acked(w)
		default:
			l.unexpected("put", err)
		}
		l.rest(ctx, 300*time.Millisecond)
	}
}

// refreshLate writes keys again and again, each time shortly before the deadline,
// while another client reads them: as long as the writes come in time, no read may
// miss the key.
func (l *load) refreshLate(ctx context.Context, client int, s, reader state.Store) {
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("ttl.late.%d.%d", client, n)
		ttl := 100*time.Millisecond + rand.N(400*time.Millisecond)
		var revision uint64
		put := func(i int) (w *write, ok bool) {
			value := fmt.Sprintf("%d.%d.%d", client, n, i)
			w = l.write(key, value, ttl)
			var err error
			if revision, err = s.Update(key, []byte(value), ttl, revision); err != nil {
				if err != state.ErrConflict { //nolint:errorlint // bare
					l.unexpected("update", err)
				}
				return w, false
			}
			l.acked(w)
			return w, true
		}
		w, ok := put(0)
		if !ok {
			l.rest(ctx, 50*time.Millisecond)
			continue
		}
		since, until := w.ret, w.call+int64(ttl) // when the key exists for certain
		done := make(chan struct{})
		missed := make(chan []suspect, 1)
		go func() { missed <- l.readUntil(done, reader, key) }()
		for i := 1; i < 20 && ctx.Err() == nil; i++ {
			early := rand.N(ttl/2) >> rand.IntN(4)
			time.Sleep(time.Duration(until-l.now()) - early)
			next, ok := put(i)
			if !ok || next.ret >= until {
				break
			}
			l.ttlChecks.Add(1)
			until = next.call + int64(ttl)
		}
		close(done)
		for _, miss := range <-missed {
			if miss.call >= since && miss.ret <= until {
				l.suspectFrom(miss)
			}
		}
	}
}

// readUntil reads a key, in one way after another, until done is closed. It
// returns the reads that did not find the key.
func (l *load) readUntil(done <-chan struct{}, s state.Store, key string) (missed []suspect) {
	type read struct {
		name, verb string // the verb that bounds it
		f          func() (found int, err error)
	}
	get := read{"Get", "read", func() (int, error) { _, err := s.Get(key); return 1, err }}
	reads := []read{
		get, {"Keys of the key", "read", func() (int, error) { keys, err := s.Keys(key); return len(keys), err }},
		get, {"Keys", "listing", func() (int, error) { keys, err := s.Keys(key + "*"); return len(keys), err }},
		get, {"Entries", "listing", func() (int, error) { entries, err := s.Entries(key + "*"); return len(entries), err }},
	}
	for n := 0; ; n++ {
		select {
		case <-done:
			return missed
		case <-time.After(5 * l.pace):
		}
		read, call := reads[n%len(reads)], l.now()
		found, err := read.f()
		ret := l.now()
		l.bounded(read.verb, call)
		switch {
		case err == state.ErrNotFound, err == nil && found == 0: //nolint:errorlint // bare
			missed = append(missed, suspect{call, ret, fmt.Sprintf("%s did not find %s from %.6f to %.6f", read.name, key, float64(call)/1e9, float64(ret)/1e9)})
		case err != nil:
			l.unexpected(read.name, err)
		}
	}
}

// useCache has a client write keys of its own, and holds a cache against what
// was acknowledged.
func (l *load) useCache(ctx context.Context, client int, s state.Store, cache *state.Cache) {
	const key = "cache.key"
	type done struct {
		at       time.Time
		revision uint64
	}
	var acked []done
	for n := 0; ctx.Err() == nil; n++ {
		value := fmt.Sprintf("%d.%d", client, n)
		w := l.write(key, value, 0)
		err := s.Put(key, []byte(value), 0)
		if err != nil {
			l.unexpected("put", err)
			l.rest(ctx, 100*time.Millisecond)
			continue
		}
		at := time.Now()
		l.acked(w)
		if kv, err := s.GetKeyValue(key); err == nil {
			acked = append(acked, done{at, kv.Revision})
		} else {
			l.unexpected("get", err)
			continue
		}
		last := acked[len(acked)-1]
		if n%4 == 0 {
			wait, cancel := context.WithTimeout(ctx, 10*time.Second)
			err := cache.Wait(wait, last.revision)
			cancel()
			if kv, got := cache.GetKeyValue(key); err == nil && (got != nil || kv.Revision < last.revision) {
				l.broke("cache: it has reached revision %d and holds %+v, %v", last.revision, kv, got)
			} else if err != nil && ctx.Err() == nil && l.quiet {
				l.broke("cache: %v", err)
			}
		}
		asOf := cache.AsOf()
		kv, err := cache.GetKeyValue(key)
		if age := time.Since(asOf); l.quiet && age > max(4*time.Second, l.aged)+l.transfer+l.slack() {
			l.broke("cache: it is as of %v ago", age)
		}
		for i := len(acked) - 1; i >= 0; i-- {
			if !acked[i].at.Before(asOf) {
				continue
			}
			if err != nil || kv.Revision < acked[i].revision {
				l.suspect(l.now(), fmt.Sprintf("cache: as of %v it holds %+v, %v; revision %d was acknowledged %v before", asOf, kv, err, acked[i].revision, asOf.Sub(acked[i].at)))
			}
			l.cacheReads.Add(1)
			acked = acked[i:]
			break
		}
		if err == nil {
			l.show(kv)
		}
		l.rest(ctx, 20*l.pace)
	}
}

// useLists has one client write and delete keys that nobody else does, and
// another one list them, which must see exactly what there is.
func (l *load) useLists(ctx context.Context, client int, writer, reader state.Store) {
	const prefix = "list."
	want := []string{}
	held := map[string]string{}
	for n := 0; ctx.Err() == nil; n++ {
		key := fmt.Sprintf("%s%d", prefix, n)
		value := fmt.Sprintf("%d.%d", client, n)
		held[key] = value
		w := l.write(key, value, 0)
		err := writer.Put(key, []byte(value), 0)
		if err == nil {
			l.acked(w)
			want = append(want, key)
			if len(want) > 10 {
				gone := rand.IntN(len(want))
				l.write(want[gone], "", 0)
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
				l.rest(ctx, l.late) // what comes late has come then
				if got, err := writer.Keys(prefix + "*"); err == nil {
					want = got
					break
				}
			}
			continue
		}
		call := l.now()
		var got []string
		if n%2 == 0 {
			got, err = reader.Keys(prefix + "*")
		} else {
			var entries []*state.KeyValue
			entries, err = reader.Entries(prefix + "*")
			for _, kv := range entries {
				l.show(kv)
				if string(kv.Value) != held[kv.Key] {
					l.broke("entries: %s is %q instead of %q", kv.Key, kv.Value, held[kv.Key])
				}
				got = append(got, kv.Key)
			}
		}
		l.bounded("listing", call)
		slices.Sort(want)
		switch {
		case err != nil:
			l.unexpected("keys", err)
		case !slices.Equal(got, want):
			l.suspect(call, fmt.Sprintf("from %.3f on, %q were listed instead of %q", float64(call)/1e9, got, want))
		default:
			l.listings.Add(1)
		}
		l.rest(ctx, 5*l.pace)
	}
}

// suspect notes a read that is not right. Within a window that may be excused.
func (l *load) suspect(call int64, text string) { l.suspectFrom(suspect{call, l.now(), text}) }

func (l *load) suspectFrom(s suspect) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.suspects = append(l.suspects, s)
}

type suspect struct {
	call, ret int64
	text      string
}
