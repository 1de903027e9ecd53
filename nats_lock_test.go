package state

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestLateLockRequests: what was asked for while the connection was lost never
// takes effect later.
func TestLateLockRequests(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	refreshed := mustLock(t, s, "refreshed", 2*time.Second)
	released := mustLock(t, s, "released", 2*time.Second)
	require.NoError(t, mustLock(t, s, "wanted", time.Minute).Unlock())
	p.refuse(true)
	p.cut()
	eventually(t, func() bool { return !s.data.nc.IsConnected() }, "disconnect")
	var wg sync.WaitGroup
	wg.Go(func() { assert.Error(t, refreshed.Refresh()) })
	wg.Go(func() { assert.Error(t, released.Unlock()) })
	wg.Go(func() {
		_, err := s.Lock("wanted", time.Minute)
		assert.ErrorIs(t, err, nats.ErrDisconnected)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown)
	})
	wg.Wait()
	next := map[string]Lock{}
	for _, name := range []string{"refreshed", "released", "wanted"} {
		next[name] = mustLock(t, other, name, time.Minute)
	}
	p.refuse(false)
	require.NoError(t, s.Put("barrier", nil, 0))
	for name, l := range next {
		_, err := s.Lock(name, time.Minute)
		refuses(t, ErrLockHeld, err, name)
		require.NoError(t, l.Refresh(), name)
		require.NoError(t, l.Unlock(), name)
	}
	refuses(t, ErrLockExpired, refreshed.Refresh())
	refuses(t, ErrLockNotHeld, released.Unlock())
}

// TestLapsedLockIsNotHandedOver: a lease that ends before its answer is here is not
// a lock.
func TestLapsedLockIsNotHandedOver(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	for range 10 {
		_, err := s.Lock("l", time.Nanosecond)
		refuses(t, ErrLockExpired, err)
	}
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
}

// TestWaiterFindsALockFree: a waiter that has found the lock free does not say that
// it is held, whatever becomes of its attempt.
func TestWaiterFindsALockFree(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	q := &lockQueue{held: true}
	l, _, err := s.locks.ask(t.Context(), q, "l", time.Minute, true, true)
	require.NoError(t, err)
	require.False(t, s.locks.waits.seesHeld(q))
	_, _, err = s.locks.ask(t.Context(), q, "l", time.Minute, true, true)
	refuses(t, ErrLockHeld, err)
	require.NoError(t, l.Unlock())
}

// TestTakeOver: the next holder gets a crashed one's lock no earlier than the
// lease's end, and soon after it, for leases of all lengths.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	a := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	b := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	var wg sync.WaitGroup
	for _, ttl := range []time.Duration{
		50 * time.Millisecond, 200 * time.Millisecond, 900 * time.Millisecond, time.Second, 1300 * time.Millisecond, 3 * time.Second,
	} {
		wg.Go(func() {
			late := soonest(4, time.Second, func(n int) (late time.Duration) {
				name := fmt.Sprintf("%v.%d", ttl, n)
				var before, granted time.Time
				err := ErrLockExpired // while the answer takes longer than the lease
				for err == ErrLockExpired {
					before = time.Now()
					_, err = a.Lock(name, ttl)
					granted = time.Now()
				}
				assert.NoError(t, err)
				err = WithLock(context.Background(), b, name, time.Minute, func(context.Context, uint64) error {
					now := time.Now()
					assert.GreaterOrEqual(t, now.Sub(before), ttl, "%v: early", ttl)
					late = now.Sub(granted.Add(ttl))
					return nil
				})
				assert.NoError(t, err)
				return late
			})
			t.Logf("a lease of %v was taken over %v after its end", ttl, late.Round(time.Millisecond))
			assert.Less(t, late, time.Second)
		})
	}
	wg.Wait()
}

// TestWithLockOutlivesRestart: WithLock keeps a lock across a restart of the
// server that is shorter than the lease.
func TestWithLockOutlivesRestart(t *testing.T) {
	t.Parallel()
	srv := startRestartable(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	started := make(chan uint64)
	done := make(chan error)
	go func() {
		done <- WithLock(context.Background(), s, "l", 6*time.Second, func(ctx context.Context, token uint64) error {
			started <- token
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(14 * time.Second): // more than two leases
				return nil
			}
		})
	}()
	token := <-started
	began := time.Now()
	for range 2 {
		time.Sleep(800 * time.Millisecond)
		stopServer(srv.Server)
		time.Sleep(500 * time.Millisecond)
		srv.start(t)
	}
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for time.Since(began) < 9*time.Second { // one lease and a half
		_, err := other.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err)
		time.Sleep(100 * time.Millisecond)
	}
	require.NoError(t, <-done)
	assert.Greater(t, mustLock(t, other, "l", time.Minute).(Fenced).Token(), token)
}

// TestWithLockIsCutOff: when no packet gets through, fn is told all the same,
// and nobody else has the lock before the timestamp at which it is.
func TestWithLockIsCutOff(t *testing.T) {
	t.Parallel()
	const ttl = time.Second
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	var asked time.Time
	held, told, done := make(chan struct{}), make(chan time.Time, 1), make(chan error, 1)
	go func() {
		asked = time.Now()
		done <- WithLock(context.Background(), s, "l", ttl, func(ctx context.Context, _ uint64) error {
			p.stall()
			close(held)
			<-ctx.Done()
			told <- time.Now()
			return context.Cause(ctx)
		})
	}()
	<-held
	var taken time.Time
	require.NoError(t, WithLock(context.Background(), other, "l", time.Minute, func(context.Context, uint64) error {
		taken = time.Now()
		return nil
	}))
	assert.GreaterOrEqual(t, taken.Sub(asked), ttl)
	select {
	case at := <-told:
		t.Logf("told after %v, taken over after %v", at.Sub(asked), taken.Sub(asked))
	case <-time.After(opTimeout):
		t.Error("not told")
	}
	p.resume()
	refuses(t, ErrLockExpired, <-done)
}

// TestMutualExclusionUnderFaults: eight clients on three replicas, holders that
// crash, leaders that step down, servers that stop and come back, clients that
// are cut off. Nobody works while another one counts on the lock.
func TestMutualExclusionUnderFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster and its elections")
	}
	t.Parallel()
	c := startCluster(t)
	setUp := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	require.NoError(t, mustLock(t, setUp, "warm", time.Minute).Unlock())

	const clients = 8
	var (
		proxies                      []*proxy
		seen                         witness
		failures, refreshes, crashes atomic.Int64
		stop                         atomic.Bool
		wg                           sync.WaitGroup
		lease                        = 1500 * time.Millisecond
	)
	for i := range clients {
		// Each knows of one server only, through a proxy of its own.
		p := startProxy(t, strings.TrimPrefix(c.servers[i%3].ClientURL(), "nats://"))
		proxies = append(proxies, p)
		nc := connect(t, p.url(), nats.IgnoreDiscoveredServers())
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		wg.Go(func() {
			for n := 0; !stop.Load(); n++ {
				asked := time.Now()
				l, err := s.Lock("l", lease)
				if err != nil {
					if err != ErrLockHeld { //nolint:errorlint // bare
						failures.Add(1)
					}
					time.Sleep(time.Millisecond)
					continue
				}
				work := seen.begin(l, asked, lease)
				if work == nil {
					continue
				}
				if n%5 == 4 { // it works on with a refresh
					asked := time.Now()
					if l.Refresh() == nil {
						refreshes.Add(1)
						seen.extend(work, asked, lease)
					}
				}
				if !seen.end(work) {
					continue
				}
				if n%200 == 199 {
					crashes.Add(1)
					continue
				}
				_ = l.Unlock()
			}
		})
	}
	time.Sleep(500 * time.Millisecond)
	for i := range 3 {
		for range 2 {
			_, _ = setUp.data.nc.Request("$JS.API.STREAM.LEADER.STEPDOWN.KV_b-locks", nil, 5*time.Second)
			time.Sleep(500 * time.Millisecond)
		}
		proxies[i].cut()
		proxies[i+3].stall()
		time.Sleep(500 * time.Millisecond)
		proxies[i+3].resume()
		if i > 0 {
			stopServer(c.servers[i])
			time.Sleep(time.Second)
			c.restart(t, i)
			c.settle(t)
		}
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d cycles, %d refreshes, %d crashes, %d calls that failed", seen.cycles, refreshes.Load(), crashes.Load(), failures.Load())
	assert.Zero(t, seen.violations)
	assert.Greater(t, seen.cycles, 50, "hardly anybody got the lock")
	assert.NotZero(t, refreshes.Load())
}

// TestLocksOutliveKill: a lease and a release outlive a kill -9 of the server.
func TestLocksOutliveKill(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a real server process")
	}
	t.Parallel()
	p := startProcess(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, p.url()), Bucket: "b"})
	held := mustLock(t, s, "held", time.Minute)
	require.NoError(t, mustLock(t, s, "released", time.Minute).Unlock())
	token := held.(Fenced).Token()
	for range 2 {
		p.kill()
		p.start(t)
		_, err := s.Lock("held", time.Minute)
		refuses(t, ErrLockHeld, err)
		l := mustLock(t, s, "released", time.Minute)
		assert.Greater(t, l.(Fenced).Token(), token)
		require.NoError(t, l.Unlock())
		require.NoError(t, held.Refresh())
	}
	require.NoError(t, held.Unlock())
}

// TestLeaseLife walks through the life of a lease with a lessor that fails as
// it is told to.
func TestLeaseLife(t *testing.T) { bubble(t, leaseLife) }

func leaseLife(t *testing.T) {
	broken := errors.New("broken")
	b := &fakeLessor{}
	l := newLease(context.Background(), b, "l", 100*time.Millisecond, time.Now(), 7)
	b.extendErr = broken
	assert.Equal(t, broken, l.Refresh())
	b.extendErr = nil
	require.NoError(t, l.Refresh(), "after a failure it may be called again")
	b.releaseErr = broken
	assert.Equal(t, broken, l.Unlock())
	b.releaseErr = nil
	require.NoError(t, l.Unlock())
	refuses(t, ErrLockNotHeld, l.Unlock())
	refuses(t, ErrLockNotHeld, l.Refresh())

	// An answer that comes after the lease's end by the holder's own clock is
	// too late, whatever it says: the rest of it is given up.
	released := b.released
	l = newLease(context.Background(), b, "l", 50*time.Millisecond, time.Now(), 8)
	b.delay = 80 * time.Millisecond
	refuses(t, ErrLockExpired, l.Refresh())
	assert.Equal(t, released+1, b.released)
	refuses(t, ErrLockExpired, l.Refresh())
	refuses(t, ErrLockNotHeld, l.Unlock())

	// The lease counts from before the request was sent.
	l = newLease(context.Background(), b, "l", time.Minute, time.Now().Add(-time.Minute), 9)
	refuses(t, ErrLockExpired, l.Refresh())
}

// A fakeLessor stands for a backend in a test of what is above it.
type fakeLessor struct {
	extendErr, releaseErr error
	delay                 time.Duration
	released              int
}

func (f *fakeLessor) extend(context.Context, *lease) error {
	time.Sleep(f.delay)
	return f.extendErr
}

func (f *fakeLessor) release(context.Context, *lease) error {
	if f.releaseErr == nil {
		f.released++
	}
	return f.releaseErr
}

var lockCycles = flag.Int64("lock-cycles", 5_000, "how many cycles TestMutualExclusionAtLength makes")

// TestMutualExclusionAtLength: eight clients on connections of their own, four
// goroutines each, on eight locks, with holders that crash.
func TestMutualExclusionAtLength(t *testing.T) {
	srv := startServer(t, nil)
	const clients, each, locks = 8, 4, 8
	const lease = 300 * time.Millisecond
	var (
		seen                  [locks]witness
		cycles, crashes, held atomic.Int64
		wg                    sync.WaitGroup
	)
	began := time.Now()
	for c := range clients {
		s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
		for g := range each {
			wg.Go(func() {
				for n := int64(c*each + g + 1); cycles.Load() < *lockCycles; n++ {
					i := n % locks
					asked := time.Now()
					l, err := s.Lock(fmt.Sprintf("l.%d", i), lease)
					if err == ErrLockHeld || err == ErrLockExpired { //nolint:errorlint // bare
						held.Add(1)
						continue
					}
					if !assert.NoError(t, err) {
						return
					}
					cycles.Add(1)
					work := seen[i].begin(l, asked, lease)
					if work == nil {
						continue
					}
					if n%8 == 0 {
						time.Sleep(100 * time.Microsecond) // it works
					}
					seen[i].end(work)
					if n%500 == 0 {
						crashes.Add(1)
						continue
					}
					if err := l.Unlock(); err != nil {
						refuses(t, ErrLockNotHeld, err)
					}
				}
			})
		}
	}
	wg.Wait()
	t.Logf("%d cycles in %v, %d crashes, %d attempts on a lock that was held", cycles.Load(), time.Since(began), crashes.Load(), held.Load())
	for i := range seen {
		assert.Zero(t, seen[i].violations, "of lock %d", i)
	}
}

// TestNextLook: when a waiter looks again, by what it has found and heard, and
// whether the server has chosen it.
func TestNextLook(t *testing.T) {
	asked := time.Now()
	at := func(seconds float64) time.Time { return asked.Add(time.Duration(seconds * float64(time.Second))) }
	chosen := func(q *lockQueue) *lockQueue {
		q.chosen = q.heard
		return q
	}
	release := func(seconds float64, op string) *lockQueue {
		return &lockQueue{heard: op, released: lockNews{at: at(seconds), op: op}}
	}
	refresh := func(seconds float64, op string, until float64) *lockQueue {
		return &lockQueue{heard: op, refreshed: lockNews{at(seconds), op, at(until)}}
	}
	claim := func(seconds float64, op string, until float64) *lockQueue {
		return &lockQueue{heard: op, claimed: lockNews{at(seconds), op, at(until)}}
	}
	after := func(q, before *lockQueue) *lockQueue {
		if q.released.at.IsZero() {
			q.released = before.released
		}
		if q.refreshed.at.IsZero() {
			q.refreshed = before.refreshed
		}
		if q.claimed.at.IsZero() {
			q.claimed = before.claimed
		}
		return q
	}
	for name, c := range map[string]struct {
		q    *lockQueue
		want float64
	}{
		"nothing was heard":                     {&lockQueue{}, 10.1},
		"a release, and it is next":             {chosen(release(3, "x.4")), 3},
		"a release, and another one is next":    {release(3, "x.4"), 3.6},
		"a release while it was looking":        {chosen(release(0.5, "x.4")), 0.5},
		"a release that was not stored yet":     {chosen(release(-1, "x.4")), 3},
		"the same, and another one is next":     {release(-1, "x.4"), 10.6},
		"a release by somebody before":          {chosen(release(-1, "w.4")), 10},
		"an operator's deletion":                {release(3, ""), 3.1},
		"a refresh, and it is next":             {chosen(refresh(3, "x.4", 13)), 13},
		"a refresh, and another one is next":    {refresh(3, "x.4", 13), 13.6},
		"a refresh with a shorter lease":        {chosen(refresh(3, "x.4", 5)), 10},
		"an attempt during the lease":           {chosen(claim(3, "y.0", 33)), 10},
		"an attempt after a refresh":            {chosen(after(claim(3, "y.0", 33), refresh(2, "x.4", 12))), 12},
		"an attempt at its end, and it is next": {chosen(claim(9.9, "y.0", 33)), 10.9},
		"the same, and another one is next ":    {claim(9.9, "y.0", 33), 20.5},
		"an attempt after a release":            {chosen(after(claim(3, "y.0", 33), release(2.9, "x.4"))), 4},
		"a release after an attempt":            {chosen(after(release(3.1, "y.1"), claim(3, "y.0", 33))), 3.1},
		"an attempt for a short lease":          {chosen(after(claim(3, "y.0", 3.5), release(2.9, "x.4"))), 3.5},
		"an attempt while it was looking":       {chosen(claim(0.5, "y.0", 33)), 10},
	} {
		found := foundLock{
			asked: asked, answered: at(1), owner: "x", until: at(10),
			standby: 100 * time.Millisecond, yield: time.Second,
		}
		assert.InDelta(t, c.want, c.q.wake(&found).Sub(asked).Seconds(), 1e-6, name)
	}
}
