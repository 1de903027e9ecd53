package state

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Locks with many waiters, far from the server, and in buckets that cannot hold
// them.

// TestWaitingForALock: clients that wait for a lock cost the server next to
// nothing, and one of them has the lock soon after its release.
func TestWaitingForALock(t *testing.T) {
	if testing.Short() {
		t.Skip("ten seconds of waiting")
	}
	t.Parallel()
	const waiters, ttl, seconds, handovers = 50, 30 * time.Second, 10, 9
	srv := startServer(t, nil)
	monitor := connect(t, srv.ClientURL())
	bucket := newBucketName()
	open := func() *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket})
	}
	first := mustLock(t, open(), "l", ttl)

	ctx, cancel := context.WithCancel(context.Background())
	next := make(chan struct{})  // the holder may unlock
	held := make(chan time.Time) // when a waiter had the lock
	gone := make(chan time.Time, waiters)
	var wg sync.WaitGroup
	for range waiters {
		s := open()
		wg.Go(func() {
			err := WithLock(ctx, s, "l", ttl, func(ctx context.Context, _ uint64) error {
				select {
				case held <- time.Now():
				case <-ctx.Done():
					return nil
				}
				select {
				case <-next:
				case <-ctx.Done():
				}
				gone <- time.Now()
				return nil
			})
			if err != nil {
				assert.True(t, err == ErrLockHeld || errors.Is(err, context.Canceled), "%v", err) //nolint:errorlint // bare
			}
		})
	}
	defer wg.Wait()
	defer cancel()
	time.Sleep(3 * time.Second) // they have all been refused

	before := countMessages(t, srv, monitor)
	time.Sleep(seconds * time.Second)
	idle := countMessages(t, srv, monitor).since(before)
	perWaiter := float64(idle.all()) / seconds / waiters
	t.Logf("%d messages in and %d out in %d s: %.2f per second and waiter", idle.in, idle.out, seconds, perWaiter)
	assert.LessOrEqual(t, perWaiter, 0.3)

	var took []time.Duration
	released := time.Now()
	require.NoError(t, first.Unlock())
	for range handovers {
		select {
		case at := <-held:
			took = append(took, at.Sub(released))
		case <-time.After(20 * time.Second):
			require.FailNow(t, "nobody has the lock")
		}
		select {
		case next <- struct{}{}:
			released = <-gone
		case <-time.After(20 * time.Second):
			require.FailNow(t, "the holder has lost the lock")
		}
	}
	slices.Sort(took)
	t.Logf("handovers: median %v, at most %v", took[handovers/2], took[handovers-1])
	assert.Less(t, took[handovers/2], 500*time.Millisecond) // 250 ms on a quiet machine
}

// TestNextAmongManyWaiters: when a lock is released, or its lease lapses, one of
// the many who wait asks for it. All of them hear an attempt, so if all made one
// that would be the square of their number.
func TestNextAmongManyWaiters(t *testing.T) {
	t.Parallel()
	const waiters, ttl = 200, 3 * time.Second
	srv := startServer(t, nil)
	var asked atomic.Int64
	monitor := connect(t, srv.ClientURL())
	for _, subject := range []string{"$KV.b-locks.l", "$JS.API.STREAM.MSG.GET.KV_b-locks"} {
		_, err := monitor.Subscribe(subject, func(*nats.Msg) { asked.Add(1) })
		require.NoError(t, err)
	}
	require.NoError(t, monitor.Flush())
	open := func() *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	}
	var holder sync.Mutex
	var holding *nats.Conn
	next := make(chan bool) // the holder dies, or else unlocks
	held := make(chan struct{}, 10)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	defer wg.Wait()
	defer cancel()
	wait := func(s *NATSStore, ttl time.Duration) {
		lock, err := Acquire(ctx, s, "l", ttl)
		if err != nil {
			return
		}
		holder.Lock()
		holding = s.data.nc
		holder.Unlock()
		held <- struct{}{}
		select {
		case dies := <-next:
			if !dies {
				assert.NoError(t, lock.Unlock())
			}
		case <-ctx.Done():
		}
	}
	awaitHolder := func() {
		t.Helper()
		select {
		case <-held:
		case <-time.After(20 * time.Second):
			require.FailNow(t, "nobody has the lock")
		}
	}
	first := open()
	wg.Go(func() { wait(first, time.Minute) }) // it unlocks
	awaitHolder()
	for range waiters {
		s := open()
		wg.Go(func() { wait(s, ttl) })
	}
	eventually(t, func() bool { return asked.Load() >= waiters }, "they have all looked")
	least := map[bool]int64{true: math.MaxInt64, false: math.MaxInt64} // on a busy machine the chosen one can be late
	for i, dies := range []bool{false, true, false, true, false, true} {
		require.NoError(t, monitor.Flush())
		before := asked.Load()
		if dies {
			holder.Lock()
			holding.Close()
			holder.Unlock()
		}
		next <- dies
		awaitHolder()
		require.NoError(t, monitor.Flush())
		n := asked.Load() - before
		t.Logf("handover %d: %d requests", i, n)
		least[dies] = min(least[dies], n)
	}
	assert.LessOrEqual(t, least[false], int64(waiters/10), "requests after a release")
	assert.LessOrEqual(t, least[true], int64(waiters/10), "requests after the end of a lease")
}

// TestOneWaiterOnACluster: the only waiter for a lock has it soon after its
// release, although it hears of that before the servers have stored it.
func TestOneWaiterOnACluster(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	const handovers, ttl = 50, 30 * time.Second
	c := startCluster(t)
	var stores []*NATSStore
	for _, srv := range c.servers {
		stores = append(stores, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3}))
	}
	holder := mustLock(t, stores[0], "l", ttl)
	for i := range handovers {
		s := stores[(i+1)%len(stores)]
		next := make(chan Lock, 1)
		go func() {
			lock, err := Acquire(context.Background(), s, "l", ttl)
			assert.NoError(t, err)
			next <- lock
		}()
		eventually(t, func() bool { return s.locks.waits.waiting("l") }, "it waits")
		require.NoError(t, holder.Unlock())
		select {
		case holder = <-next:
		case <-time.After(ttl / 3):
			require.FailNow(t, "the waiter has missed the release", "handover %d", i)
		}
	}
}

// TestReleaseBeforeTheSubscription: in a cluster, a release may be published where the
// waiter's subscription is not known yet. The waiter looks once more.
func TestReleaseBeforeTheSubscription(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	const ttl = time.Minute
	c := startCluster(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[1].ClientURL()), Bucket: "b", Replicas: 3})
	for i := 0; ; i++ {
		key := fmt.Sprintf("l.%d", i)
		holder := mustLock(t, other, key, ttl)
		ctx, cancel := context.WithTimeout(context.Background(), ttl/2)
		defer cancel()
		next := make(chan error, 1)
		began := time.Now()
		go func() {
			_, err := Acquire(ctx, s, key, ttl)
			next <- err
		}()
		eventually(t, func() bool { return s.locks.waits.waiting(key) }, "it waits")
		s.locks.waits.mu.Lock()
		subs := s.locks.waits.queue[key].subs
		s.locks.waits.mu.Unlock()
		for _, sub := range subs { // as if the release came before them
			require.NoError(t, sub.Unsubscribe())
		}
		require.NoError(t, holder.Unlock())
		if time.Since(began) > settleTime/2 {
			require.Less(t, i, 10, "the machine is too busy")
			cancel()
			<-next
			continue
		}
		require.NoError(t, <-next, "the waiter waits for the end of a lease that was given back")
		return
	}
}

// TestWaitEndsDuringAnAttempt: a wait that ends after its attempt to acquire the
// lock was sent does not say that somebody else held the lock. Nobody else has to
// wait for the lease's end.
func TestWaitEndsDuringAnAttempt(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	far, _ := connectAt(t, srv.ClientURL(), distance{rtt: 400 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: far, Bucket: "b"})
	near := connect(t, srv.ClientURL())
	var err error
	for attempts := 1; err == nil; attempts++ {
		require.LessOrEqual(t, attempts, 5, "its answer was there before the end of its context")
		holder := mustLock(t, openStore(t, NATSStoreConfig{Conn: near, Bucket: "b"}), "l", time.Minute)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		failed := make(chan error, 1)
		go func() {
			lock, err := Acquire(ctx, s, "l", time.Minute)
			if err == nil {
				assert.NoError(t, lock.Unlock())
			}
			failed <- err
		}()
		eventually(t, func() bool { return s.locks.waits.waiting("l") }, "it waits")
		sub, failure := near.Subscribe("$KV.b-locks.l", func(msg *nats.Msg) {
			if len(msg.Data) > 0 {
				cancel() // its answer takes another 200 ms
			}
		})
		require.NoError(t, failure)
		require.NoError(t, near.Flush())
		require.NoError(t, holder.Unlock())
		err = <-failed
		require.NoError(t, sub.Unsubscribe())
	}
	assert.ErrorIs(t, err, ErrOutcomeUnknown)
	assert.ErrorIs(t, err, context.Canceled)
	// The attempt has acquired the lock, which the store gives back.
	next := openStore(t, NATSStoreConfig{Conn: near, Bucket: "b"})
	within, end := context.WithTimeout(context.Background(), 20*time.Second)
	defer end()
	lock, err := Acquire(within, next, "l", time.Minute)
	require.NoError(t, err)
	require.NoError(t, lock.Unlock())
}

// waiting reports whether somebody waits for a lock that was found held.
func (w *lockWaits) waiting(key string) bool {
	w.mu.Lock()
	q := w.queue[key]
	w.mu.Unlock()
	return q != nil && w.seesHeld(q)
}

// TestWaitAfterAnOutage: a waiter that an outage has kept waiting for an answer has
// the lock soon after the lease's end all the same.
func TestWaitAfterAnOutage(t *testing.T) {
	if testing.Short() {
		t.Skip("an outage, and a lease that lapses")
	}
	t.Parallel()
	const outage, ttl = 3 * time.Second, 6 * time.Second
	srv := startRestartable(t)
	url := srv.ClientURL()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, url), Bucket: "b"})
	held := time.Now()
	mustLock(t, openStore(t, NATSStoreConfig{Conn: connect(t, url), Bucket: "b"}), "l", ttl)
	acquired := make(chan time.Time, 1)
	go func() {
		if _, err := Acquire(context.Background(), s, "l", ttl); assert.NoError(t, err) {
			acquired <- time.Now()
		}
	}()
	eventually(t, func() bool { return s.locks.waits.waiting("l") }, "it waits")
	stopServer(srv.Server)
	time.Sleep(outage)
	srv.start(t)
	t.Cleanup(func() { stopServer(srv.Server) })
	at := <-acquired
	assert.Less(t, at.Sub(held), ttl+7*time.Second) // ttl+3 s on a quiet machine
}

// TestWaitersOfAProcessAskOnce: however many wait for a lock in one store, they
// cost the server what one of them does.
func TestWaitersOfAProcessAskOnce(t *testing.T) {
	t.Parallel()
	const waiters, ttl, seconds = 100, 4 * time.Second, 5
	srv := startServer(t, nil)
	holder := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	held := make(chan struct{})
	release := make(chan struct{})
	wg.Go(func() {
		assert.NoError(t, WithLock(context.Background(), openStore(t, NATSStoreConfig{Conn: holder, Bucket: "b"}), "l", ttl,
			func(context.Context, uint64) error { close(held); <-release; return nil }))
	})
	<-held
	var ran atomic.Int64
	for range waiters {
		wg.Go(func() {
			_ = WithLock(ctx, s, "l", ttl, func(context.Context, uint64) error { ran.Add(1); return nil })
		})
	}
	time.Sleep(time.Second) // they have all been refused
	before := countMessages(t, srv, holder)
	time.Sleep(seconds * time.Second)
	idle := countMessages(t, srv, holder).since(before)
	t.Logf("%d messages in and %d out in %d s", idle.in, idle.out, seconds)
	// Two requests and their answers for each TTL, and what the holder publishes
	// every third of one.
	assert.LessOrEqual(t, idle.all(), int64(2*seconds*(4+3)*time.Second/ttl))
	close(release)
	eventually(t, func() bool { return ran.Load() >= 10 }, "one after the other has the lock")
}

// TestHolderAmongWaiters: a holder keeps its lease however many others wait for
// it in the same process.
func TestHolderAmongWaiters(t *testing.T) {
	if testing.Short() {
		t.Skip("ten seconds of a lease")
	}
	t.Parallel()
	srv := startServer(t, nil)
	nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 10 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	// A machine that stops briefly can cost a holder its lease once.
	kept := false
	for round := 0; round < 3 && !kept; round++ {
		kept = holdAmongWaiters(t, s, fmt.Sprintf("l.%d", round))
	}
	assert.True(t, kept, "the lease was lost each time")
}

// holdAmongWaiters holds a lock while 200 wait for it, and reports whether the lease
// lasted.
func holdAmongWaiters(t *testing.T, s Store, lock string) (kept bool) {
	const ttl = 2 * time.Second
	waiting, stop := context.WithCancel(context.Background())
	var waiters sync.WaitGroup
	defer waiters.Wait()
	defer stop()
	err := WithLock(context.Background(), s, lock, ttl, func(ctx context.Context, _ uint64) error {
		for range 200 {
			waiters.Go(func() {
				_ = WithLock(waiting, s, lock, ttl, func(context.Context, uint64) error { return nil })
			})
		}
		began := time.Now()
		select {
		case <-ctx.Done():
			t.Logf("the lease was lost after %v: %v", time.Since(began), context.Cause(ctx))
		case <-time.After(10 * time.Second):
			kept = true
		}
		return nil
	})
	if !kept {
		require.Error(t, err)
	}
	return kept && err == nil // or it was lost in the end
}

// TestWaitersDoNotGiveUp: whoever waits for a lock waits until its context ends.
func TestWaitersDoNotGiveUp(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 20 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	mustLock(t, other, "l", time.Minute)
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	const n = 300
	var early, wrong atomic.Int64
	var sample atomic.Value
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			err := WithLock(ctx, s, "l", 2*time.Second, func(context.Context, uint64) error { return nil })
			if ctx.Err() == nil {
				early.Add(1)
				sample.Store(fmt.Sprint(err))
			}
			if err != ErrLockHeld && !errors.Is(err, context.DeadlineExceeded) { //nolint:errorlint // bare
				wrong.Add(1)
				sample.Store(fmt.Sprint(err))
			}
		})
	}
	wg.Wait()
	assert.Less(t, time.Since(deadlineOf(ctx)), 6*time.Second, "they end with their context")
	assert.Zero(t, early.Load(), "of %d waiters gave up early, one with: %v", n, sample.Load())
	assert.Zero(t, wrong.Load(), "of %d waiters got another error, one of them: %v", n, sample.Load())
}

func deadlineOf(ctx context.Context) time.Time {
	deadline, _ := ctx.Deadline()
	return deadline
}

// TestBucketsThatCannotHoldLocks: a bucket that would drop a record of a lock is
// refused, in words.
func TestBucketsThatCannotHoldLocks(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	js := newJetStream(t, connect(t, srv.ClientURL()))
	for name, c := range map[string]struct {
		change func(*jetstream.StreamConfig)
		says   string
	}{
		"max-age": {func(cfg *jetstream.StreamConfig) { cfg.MaxAge, cfg.Duplicates = 2*time.Second, 2*time.Second }, "(?i)max.?age|ttl"},
		"memory":  {func(cfg *jetstream.StreamConfig) { cfg.Storage = jetstream.MemoryStorage }, "(?i)memory|storage"},
		"markers": {func(cfg *jetstream.StreamConfig) { cfg.SubjectDeleteMarkerTTL = time.Second }, "(?i)marker"},
		"history": {func(cfg *jetstream.StreamConfig) {
			cfg.MaxMsgsPerSubject, cfg.AllowRollup, cfg.DenyPurge = 5, false, true
		}, "history"},
		"drops-oldest": {func(cfg *jetstream.StreamConfig) { cfg.Discard, cfg.MaxBytes = jetstream.DiscardOld, 4096 }, "(?i)discard|max.?bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := jetstream.StreamConfig{
				Name: "KV_" + name + "-locks", Subjects: []string{"$KV." + name + "-locks.>"}, MaxMsgsPerSubject: 1,
				AllowRollup: true, AllowDirect: true, AllowMsgTTL: true, Discard: jetstream.DiscardNew,
			}
			c.change(&cfg)
			_, err := js.CreateStream(context.Background(), cfg)
			require.NoError(t, err)
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: name})
			_, err = s.Lock("l", time.Minute)
			require.Error(t, err)
			assert.ErrorContains(t, err, name+"-locks")
			assert.Regexp(t, c.says, err.Error())
			// A store that first waits for the lock finds out as well.
			second := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: name})
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			_, err = Acquire(ctx, second, "l", time.Minute)
			require.Error(t, err)
			assert.Regexp(t, c.says, err.Error())
			require.NoError(t, s.Put("k", nil, 0), "the data can be written all the same")
		})
	}
	t.Run("data in memory", func(t *testing.T) {
		t.Parallel()
		_, err := js.CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "volatile", Storage: jetstream.MemoryStorage})
		require.NoError(t, err)
		s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "volatile"})
		mustLock(t, s, "l", time.Minute)
		stream, err := js.Stream(context.Background(), "KV_volatile-locks")
		require.NoError(t, err)
		assert.Equal(t, jetstream.FileStorage, stream.CachedInfo().Config.Storage)
	})
}

// TestLocksBucketMadeUnfit: once the settings that a store knows are a minute old, it
// grants no lock in a bucket that was made unfit for locks since.
func TestLocksBucketMadeUnfit(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx, js := t.Context(), newJetStream(t, nc)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	alterStream(t, js, "KV_b-locks", func(cfg *jetstream.StreamConfig) {
		cfg.MaxAge, cfg.Duplicates = 10*time.Second, 10*time.Second
	})
	old := *s.locks.opened().settings.Load()
	old.checked = old.checked.Add(-2 * lockSettingsLife)
	s.locks.opened().settings.Store(&old)
	_, err := s.Lock("l", time.Minute)
	assert.ErrorContains(t, err, "max_age")
	// Or it is gone.
	s.locks.opened().settings.Store(&old)
	require.NoError(t, js.DeleteStream(ctx, "KV_b-locks"))
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
}

// TestLocksBucketDeleted: the bucket of the locks is deleted, while somebody
// listens to everything. Locks work again, and their tokens grow on.
func TestLocksBucketDeleted(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	_, err := nc.Subscribe(">", func(*nats.Msg) {})
	require.NoError(t, err)
	js := newJetStream(t, nc)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	var token uint64
	for range 3 { // so that the next tokens are not larger by chance
		for range 5 {
			l := mustLock(t, s, "l", time.Minute)
			token = l.(Fenced).Token()
			require.NoError(t, l.Unlock())
		}
		require.NoError(t, js.DeleteStream(context.Background(), "KV_b-locks"))
		for _, store := range []StateStore{s, other} {
			var l Lock
			var err error
			require.True(t, within(5*time.Second, func() bool {
				l, err = store.Lock("l", time.Minute)
				return err == nil
			}), "%v", err)
			assert.Greater(t, l.(Fenced).Token(), token)
			token = max(token, l.(Fenced).Token())
			require.NoError(t, l.Unlock())
		}
	}
}

// TestRefreshNearTheEnd: a lease is refreshed just before its end, also if what
// the store knows of the server's clock came over a slow link.
func TestRefreshNearTheEnd(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	const ttl, left = 2 * time.Second, 150 * time.Millisecond
	for i := range 4 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			bucket := newBucketName()
			near := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket})
			require.NoError(t, mustLock(t, near, "first", time.Minute).Unlock())
			nc, p := connectAt(t, srv.ClientURL(), distance{rtt: 400 * time.Millisecond})
			s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket})
			require.NoError(t, mustLock(t, s, "first", time.Minute).Unlock())
			p.move(distance{})
			require.NoError(t, s.Put("near", nil, 0)) // nothing is on its way any more
			until := time.Now().Add(ttl)
			l := mustLock(t, s, "l", ttl)
			time.Sleep(time.Until(until) - left)
			if err := l.Refresh(); err != nil {
				require.False(t, time.Now().Before(until), "%v, %v before the end of the lease", err, time.Until(until))
				require.Equal(t, ErrLockExpired, err)
				return // on a busy machine
			}
			require.NoError(t, l.Unlock())
		})
	}
}

// TestHoldJoinsARefresh: a refresh of Hold joins one that the work has begun before.
// The lease counts from that one, and so does what Hold counts on.
func TestHoldJoinsARefresh(t *testing.T) {
	t.Parallel()
	s, p := viaProxy(t, startServer(t, nil).ClientURL(), "b", 1)
	lock, err := s.Lock("l", time.Minute)
	require.NoError(t, err)
	l := lock.(*lease)
	p.holdAnswers(true)
	refreshed := make(chan error, 1)
	go func() { refreshed <- lock.Refresh() }()
	eventually(t, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.refresh != nil
	}, "a refresh under way")
	r := &renewer{lock: lock, ttl: time.Minute}
	go func() { refreshed <- r.refresh() }()
	time.Sleep(50 * time.Millisecond) // time for the second refresh to join the first
	p.holdAnswers(false)
	require.NoError(t, <-refreshed)
	require.NoError(t, <-refreshed)
	require.False(t, r.until.After(l.validUntil()), "%v after the end", r.until.Sub(l.validUntil()))
}

// TestRefreshBesideBurners: on a busy machine, too, Refresh reports that a lease
// has lapsed only when it has. It does not run beside other tests.
func TestRefreshBesideBurners(t *testing.T) {
	url := startServerProcess(t)
	const ttl, length = 300 * time.Millisecond, 4 * time.Second
	var quit atomic.Bool
	var burners, holders sync.WaitGroup
	for range 4 {
		burners.Go(func() {
			for !quit.Load() {
			}
		})
	}
	defer burners.Wait()
	defer quit.Store(true)
	var refreshes, lapsed atomic.Int64
	for i := range 4 {
		s := openStore(t, NATSStoreConfig{Conn: connect(t, url), Bucket: "b"})
		holders.Go(func() {
			for end := time.Now().Add(length); time.Now().Before(end); {
				until := time.Now().Add(ttl)
				l, err := s.Lock(fmt.Sprint("l.", i), ttl)
				if err == ErrLockHeld || err == ErrLockExpired { //nolint:errorlint // bare
					continue
				}
				if !assert.NoError(t, err) {
					return
				}
				for n := 0; err == nil && time.Now().Before(end); n++ {
					if n%5 == 4 { // close to the lease's end
						time.Sleep(time.Until(until) - ttl/5)
					}
					asked := time.Now()
					if err = l.Refresh(); err == nil {
						until = asked.Add(ttl)
						refreshes.Add(1)
					}
				}
				if err == ErrLockExpired { //nolint:errorlint // bare
					lapsed.Add(1)
					early := time.Until(until)
					assert.LessOrEqual(t, early, time.Duration(0), "the lease runs for another %v", early)
				}
				_ = l.Unlock()
			}
		})
	}
	holders.Wait()
	t.Logf("%d refreshes, %d leases lapsed", refreshes.Load(), lapsed.Load())
	assert.NotZero(t, refreshes.Load())
}

// TestStalledRefreshes: nothing gets through. Each Refresh and the Unlock give
// up after five seconds of their own.
func TestStalledRefreshes(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc, p := connectAt(t, srv.ClientURL(), distance{})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	l := mustLock(t, s, "l", time.Minute)
	p.stall()
	var wg sync.WaitGroup
	call := func(name string, f func() error) {
		wg.Go(func() {
			began := time.Now()
			err := f()
			assert.Error(t, err, name)
			assert.Less(t, time.Since(began), 8*time.Second, name)
		})
	}
	for i := range 6 {
		call(fmt.Sprintf("Refresh %d", i), l.Refresh)
	}
	time.Sleep(100 * time.Millisecond) // so that the Unlock comes after them
	call("Unlock", l.Unlock)
	wg.Wait()
	p.resume()
	eventually(t, func() bool {
		err := l.Unlock()
		return err == nil || err == ErrLockNotHeld //nolint:errorlint // bare
	}, "an Unlock") // the first may have got through after all
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
}

// TestInDoubtBesideItsOwnRefresh: a Refresh of unknown outcome arrives after a later
// call has read the lock and before it writes. The lock is still this holder's.
func TestInDoubtBesideItsOwnRefresh(t *testing.T) {
	t.Parallel()
	for name, call := range map[string]func(Lock) error{"Unlock": Lock.Unlock, "Refresh": Lock.Refresh} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			var late atomic.Pointer[nats.Msg] // the Refresh
			relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
				if late.Load() == nil || !strings.HasPrefix(msg.Subject, "$JS.API.STREAM.MSG.GET") {
					_ = nc.PublishMsg(msg)
					return
				}
				go func() {
					refresh, reply := late.Swap(nil), msg.Reply
					answer, err := nc.RequestMsg(msg, 5*time.Second)
					if !assert.NoError(t, err) {
						return
					}
					if _, err = nc.RequestMsg(refresh, 5*time.Second); assert.NoError(t, err) {
						_ = nc.Publish(reply, answer.Data)
					}
				}()
			})
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
			l := mustLock(t, s, "l", time.Minute).(*lease)
			is, err := newJetStream(t, connect(t, srv.ClientURL())).Stream(context.Background(), "KV_b-locks")
			require.NoError(t, err)
			last, err := is.GetLastMsgForSubject(context.Background(), "$KV.b-locks.l")
			require.NoError(t, err)
			l.inDoubt = true
			late.Store(&nats.Msg{Subject: last.Subject, Header: last.Header, Data: last.Data})
			late.Load().Header.Del(headerExpected)
			require.NoError(t, call(l))
			require.Nil(t, late.Load(), "it has arrived")
			holder, err := s.LockHolder("l")
			if name == "Unlock" {
				refuses(t, ErrNotFound, err)
				return
			}
			require.NoError(t, err)
			assert.Equal(t, l.Token(), holder.Token)
			require.NoError(t, l.Unlock())
		})
	}
}

// TestStoreOnABucketOfLocks: a bucket that holds the locks of another one is no
// bucket for data.
func TestStoreOnABucketOfLocks(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "app"})
	l := mustLock(t, s, "l", time.Minute)
	intruder, err := NewNATSStore(NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "app-locks"})
	if err == nil {
		require.NoError(t, intruder.Close())
	}
	require.ErrorContains(t, err, `"app-locks"`)
	assert.Regexp(t, "(?i)(hold|keep).* locks", err.Error())
	require.NoError(t, l.Refresh())
	require.NoError(t, l.Unlock())
}

// TestReadsAfterALeadersDeath: when the leader of three has died, reads work
// again as soon as writes do.
func TestReadsAfterALeadersDeath(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster and its elections")
	}
	t.Parallel()
	servers := startProcessCluster(t)
	at := func(i int) string { return servers[i%3].url() }
	openStore(t, NATSStoreConfig{Conn: connect(t, at(0)), Bucket: "b", Replicas: 3})
	stream, err := newJetStream(t, connect(t, at(0))).Stream(context.Background(), "KV_b")
	require.NoError(t, err)
	var leader int
	_, err = fmt.Sscanf(stream.CachedInfo().Cluster.Leader, "s%d", &leader)
	require.NoError(t, err)
	survivor := at(leader + 1)
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, survivor), Bucket: "b"})
	require.NoError(t, writer.Put("k", nil, 0))
	var readers []*NATSStore
	for range 12 {
		readers = append(readers, openStore(t, NATSStoreConfig{Conn: connect(t, survivor), Bucket: "b"}))
	}
	servers[leader].kill() // who is stopped hands over
	died := time.Now()
	recovery := func(f func() error) time.Duration {
		for f() != nil {
			if time.Since(died) > 60*time.Second {
				break
			}
		}
		return time.Since(died)
	}
	var write time.Duration
	reads := make([]time.Duration, len(readers))
	var wg sync.WaitGroup
	wg.Go(func() { write = recovery(func() error { return writer.Put("k", nil, 0) }) })
	for i, s := range readers {
		wg.Go(func() {
			time.Sleep(time.Duration(i) * 400 * time.Millisecond) // all phases of a read
			reads[i] = recovery(func() error { _, err := s.Get("k"); return err })
		})
	}
	wg.Wait()
	t.Logf("Put works again after %v, Get after %v", write, reads)
	assert.Less(t, slices.Max(reads), write+4*time.Second)
	assert.Less(t, write, 30*time.Second)
}

// TestReadAsksAgainBetweenLeaders: what comes between two leaders is never answered. A
// read asks again often enough to be answered within its time.
func TestReadAsksAgainBetweenLeaders(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	srv := startCluster(t).servers[0]
	const unanswered = 4 // so many requests take half of the five seconds that a read has
	var electing atomic.Bool
	var asked atomic.Int64
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if electing.Load() && strings.HasPrefix(msg.Subject, "$JS.API.STREAM.MSG.GET") && asked.Add(1) <= unanswered {
			return
		}
		_ = nc.PublishMsg(msg)
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3, APIPrefix: "through"})
	require.NoError(t, s.Put("k", []byte("v"), 0))
	electing.Store(true)
	value, err := s.Get("k")
	require.NoError(t, err, "after %d requests", asked.Load())
	assert.Equal(t, "v", string(value))
	assert.InDelta(t, unanswered+1, asked.Load(), 1, "the last one is asked again if its answer is late")
}

// startProcessCluster runs three servers in processes of their own, named s0 to
// s2, that can be killed.
func startProcessCluster(t testing.TB) []*process {
	t.Helper()
	bin, err := serverBinary()
	require.NoError(t, err)
	var servers []*process
	var routes []string
	for range 3 {
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", freePort(t)))
		servers = append(servers, &process{bin: bin, dir: t.TempDir(), port: freePort(t)})
	}
	for i, p := range servers {
		p.cmd = exec.Command(bin, "-n", fmt.Sprintf("s%d", i), "-a", "127.0.0.1", "-p", fmt.Sprint(p.port), "-js", "-sd", p.dir,
			"-cluster_name", "test", "-cluster", routes[i], "-routes", strings.Join(routes, ","))
		require.NoError(t, p.cmd.Start())
		t.Cleanup(p.kill)
	}
	for _, p := range servers {
		var nc *nats.Conn
		eventually(t, func() bool {
			var err error
			nc, err = nats.Connect(p.url())
			return err == nil
		}, "the server process starts")
		eventually(t, func() bool {
			answer, err := nc.Request("$JS.API.STREAM.CREATE.probe", []byte(`{"name":"probe","subjects":["probe"],"num_replicas":3}`), 5*time.Second)
			return err == nil && !strings.Contains(string(answer.Data), `"error"`)
		}, "a stream")
		require.True(t, within(30*time.Second, func() bool {
			answer, err := nc.Request("$JS.API.STREAM.INFO.probe", nil, 5*time.Second)
			return err == nil && strings.Count(string(answer.Data), `"current":true`) == 2
		}), "a replicated stream")
		nc.Close()
	}
	return servers
}

// TestZeroNATSStore: the methods of a store that was not opened fail.
func TestZeroNATSStore(t *testing.T) {
	for name, f := range map[string]func(s *NATSStore) error{
		"Get":         func(s *NATSStore) error { _, err := s.Get("k"); return err },
		"GetKeyValue": func(s *NATSStore) error { _, err := s.GetKeyValue("k"); return err },
		"Put":         func(s *NATSStore) error { return s.Put("k", nil, 0) },
		"Update":      func(s *NATSStore) error { _, err := s.Update("k", nil, 0, 0); return err },
		"Delete":      func(s *NATSStore) error { return s.Delete("k") },
		"Keys":        func(s *NATSStore) error { _, err := s.Keys("*"); return err },
		"Watch":       func(s *NATSStore) error { _, err := s.Watch("*"); return err },
		"Lock":        func(s *NATSStore) error { _, err := s.Lock("l", time.Minute); return err },
	} {
		t.Run(name, func(t *testing.T) {
			assert.NotPanics(t, func() { assert.Error(t, f(&NATSStore{})) })
		})
	}
	assert.NotPanics(t, func() { _ = (&NATSStore{}).Close() })
}
