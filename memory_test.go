package state

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// bubbleProcs is the number of processors for a bubble; 0 leaves it as it is.
var bubbleProcs = 0

// bubble runs f in a bubble of testing/synctest. No parallel test may call it.
func bubble(t *testing.T, f func(*testing.T)) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(bubbleProcs))
	synctest.Test(t, f)
}

func TestMemoryStoreConformance(t *testing.T) { testConformance(t, memoryBackend()) }

func memoryBackend() backend {
	return backend{
		run: bubble,
		open: func(t *testing.T) func() Store {
			s := NewMemoryStore()
			t.Cleanup(func() { _ = s.Close() })
			return func() Store { return s.Client() }
		},
	}
}

// TestHoldEndsWithTheLease: if the lease is not refreshed, fn's context ends with
// it, to the nanosecond.
func TestHoldEndsWithTheLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		began := time.Now()
		err := WithLock(context.Background(), refreshless{s}, "l", time.Second, func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			assert.Equal(t, time.Second, time.Since(began))
			return nil
		})
		refuses(t, ErrLockExpired, err)
	})
}

// TestTinyTTLsPassInABubble: a TTL that cannot be kept up does not stop the clock
// of a bubble, which stands still while something runs.
func TestTinyTTLsPassInABubble(t *testing.T) {
	for _, ttl := range []time.Duration{1, 2, 3, time.Microsecond, time.Millisecond} {
		bubble(t, func(t *testing.T) {
			s := NewMemoryStore()
			defer s.Close()
			work := func(ctx context.Context, _ uint64) error {
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
				return nil
			}
			var renewals atomic.Int64
			counted := meddler{Store: s, granted: func(l Lock) Lock { return renewalsOf{l.(*lease), &renewals} }}
			refuses(t, ErrLockExpired, WithLock(context.Background(), counted, "counted", ttl, work), ttl)
			// One each millisecond, if the lease allows; none would come to an end.
			require.LessOrEqual(t, renewals.Load(), int64(2000), ttl)
			err := WithLock(context.Background(), s, "l", ttl, work)
			refuses(t, ErrLockExpired, err, ttl)
			require.NoError(t, WithLock(context.Background(), s, "l", ttl, func(context.Context, uint64) error { return nil }))

			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			require.NoError(t, KeepAlive(ctx, s, "k", ttl, func() []byte { return nil }))
			_, err = s.Get("k")
			refuses(t, ErrNotFound, err)
		})
	}
}

// A renewalsOf is a lock that counts how often it is refreshed, and is lost when that
// does not end.
type renewalsOf struct {
	*lease
	n *atomic.Int64
}

func (l renewalsOf) Refresh() error {
	if l.n.Add(1) > 2000 {
		return ErrLockExpired
	}
	return l.lease.Refresh()
}

// TestMemoryStoreZeroValue: no method of a store that was not opened panics.
func TestMemoryStoreZeroValue(t *testing.T) {
	var none *MemoryStore
	ctx := context.Background()
	for _, s := range []*MemoryStore{new(MemoryStore), none, new(MemoryStore).Client(), none.Client(), none.bind(ctx), new(MemoryStore).bind(ctx)} {
		var errs []error
		_, err := s.Get("k")
		errs = append(errs, err)
		_, err = s.GetKeyValue("k")
		errs = append(errs, err, s.Put("k", nil, 0), s.Delete("k"), s.DeleteRevision("k", 1), s.Close())
		_, err = s.Update("k", nil, 0, 0)
		errs = append(errs, err)
		_, err = s.Keys("*")
		errs = append(errs, err)
		_, err = s.Entries("*")
		errs = append(errs, err)
		_, err = s.Watch("*")
		errs = append(errs, err)
		_, err = s.Lock("l", time.Minute)
		errs = append(errs, err)
		_, err = s.LockHolder("l")
		errs = append(errs, err)
		_, err = Acquire(ctx, s, "l", time.Minute)
		errs = append(errs, err, KeepAlive(ctx, s, "k", time.Minute, func() []byte { return nil }))
		_, err = Modify(ctx, s, "k", nil)
		errs = append(errs, err)
		for i, err := range errs {
			assert.ErrorContains(t, err, "not opened", i)
		}
	}
}

// TestMemoryStoreClients: closing the store that NewMemoryStore returned closes
// all clients.
func TestMemoryStoreClients(t *testing.T) {
	bubble(t, func(t *testing.T) {
		root := NewMemoryStore()
		one := root.Client()
		two := one.Client()
		require.NoError(t, one.Put("k", []byte("v"), time.Hour))
		got, err := two.Get("k")
		require.NoError(t, err)
		require.Equal(t, "v", string(got))
		events := mustWatch(t, two, "*")
		l := mustLock(t, two, "l", time.Minute)
		require.NoError(t, one.Close())
		_, err = one.Get("k")
		refuses(t, ErrClosed, err)
		_, err = one.Client().Get("k")
		refuses(t, ErrClosed, err)
		require.NoError(t, two.Put("k", nil, 0), "it is not its client")
		receive(t, events)

		bound := root.WithContext(context.Background())
		require.NoError(t, bound.Close())
		ended(t, events)
		for _, s := range []Store{root, one, two, bound, root.Client(), two.Client()} {
			_, err := s.Get("k")
			refuses(t, ErrClosed, err)
			refuses(t, ErrClosed, s.Put("k", nil, 0))
			_, err = s.Watch("*")
			refuses(t, ErrClosed, err)
			require.NoError(t, s.Close())
		}
		refuses(t, ErrClosed, l.Refresh())
		require.NoError(t, l.Unlock())
	})
}

// TestMemoryStoreGetSeesRefreshedKeys: a key that is refreshed in time is never
// reported as missing, however late a reader is scheduled.
func TestMemoryStoreGetSeesRefreshedKeys(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8)) // so that the system, too, stops readers anywhere
	s := NewMemoryStore()
	defer s.Close()
	const ttl = time.Millisecond
	// A write that finds the key expired begins a gap, the next one ends it: their
	// number is odd in a gap.
	var writes, gaps atomic.Int64
	gaps.Store(1)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for revision := uint64(0); ; {
			select {
			case <-stop:
				return
			default:
			}
			next, err := s.Update("k", nil, ttl, revision)
			if revision == 0 || err == ErrConflict {
				gaps.Add(1)
			}
			revision = next // 0 after a conflict
			writes.Add(1)
		}
	})
	var missed, wrong atomic.Int64
	for range 16 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				before := gaps.Load()
				if _, err := s.Get("k"); err == nil || before%2 == 1 {
					continue
				}
				missed.Add(1)
				for n := writes.Load(); writes.Load() < n+2; { // until a write that began later has ended
					select {
					case <-stop:
						return
					default:
						runtime.Gosched()
					}
				}
				if gaps.Load() == before {
					wrong.Add(1)
				}
			}
		})
	}
	time.Sleep(time.Second)
	close(stop)
	wg.Wait()
	t.Logf("%d writes, %d gaps, %d reads found nothing", writes.Load(), gaps.Load(), missed.Load())
	assert.Zero(t, wrong.Load(), "reads that missed a key which existed throughout")
}

// TestMemoryStoreFollow is about the hook of Follow: what it returns and what it
// delivers is everything, once, and it ends when it is stopped and with its client.
func TestMemoryStoreFollow(t *testing.T) {
	bubble(t, func(t *testing.T) {
		root := NewMemoryStore()
		defer root.Close()
		for _, pattern := range []pattern{{"k.1", false}, {"k.", true}} {
			s := root.Client()
			require.NoError(t, s.Put("k.1", []byte("before"), 0))
			require.NoError(t, s.Put("k.1", []byte("value"), time.Hour))
			src, err := s.follow(context.Background(), pattern)
			require.NoError(t, err)
			sub, current, ask := src.sub, src.current, src.ask
			require.Equal(t, []*KeyValue{mustGet(t, s, "k.1")}, current)
			ev, _, ended := sub.next()
			require.Nil(t, ev)
			require.False(t, ended)

			began := time.Now()
			ask()
			_, p, _ := sub.next()
			require.Equal(t, current[0].Revision, p.revision)
			require.True(t, p.asOf.Equal(began))
			require.NoError(t, s.Put("k.1", []byte("after"), time.Minute))
			require.Equal(t, "value", string(current[0].Value))
			time.Sleep(time.Minute - 1)
			ask()
			ev, p, _ = sub.next()
			require.Equal(t, "after", string(ev.Value))
			require.Equal(t, ev.Revision, p.revision)
			time.Sleep(time.Nanosecond)
			ask() // it covers what expires at this moment
			ev, p, _ = sub.next()
			require.Equal(t, "delete k.1", brief(ev))
			require.False(t, p.asOf.IsZero())

			other, err := s.follow(context.Background(), pattern)
			require.NoError(t, err)
			src.stop()
			_, _, ended = sub.next()
			require.True(t, ended, "it was stopped")
			_, _, ended = other.sub.next()
			require.False(t, ended)
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			_, err = s.follow(ctx, pattern)
			require.ErrorIs(t, err, context.Canceled)
			require.NoError(t, s.Close())
			_, _, ended = other.sub.next()
			require.True(t, ended, "its client is closed")
			require.Zero(t, root.client.data.watches.len)
			other.stop()
			_, err = s.follow(context.Background(), pattern)
			refuses(t, ErrClosed, err)
		}
	})
}

// TestMemoryStoreWaitersAreForgotten: nothing is left of those who waited for a
// lock.
func TestMemoryStoreWaitersAreForgotten(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		l := mustLock(t, s, "l", time.Minute)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for i := range 10 {
			waiter, ctx := s.Client(), ctx
			if i == 0 {
				ctx = context.Background()
			}
			wg.Go(func() {
				l, err := Acquire(ctx, waiter, "l", time.Minute)
				if i == 0 {
					assert.NoError(t, err)
					assert.NoError(t, l.Unlock())
				} else {
					refuses(t, ErrLockHeld, err)
				}
			})
		}
		synctest.Wait()
		require.Len(t, s.client.data.waiters["l"], 10)
		before := time.Now()
		cancel()
		synctest.Wait()
		require.Len(t, s.client.data.waiters["l"], 1)
		require.NoError(t, l.Unlock())
		wg.Wait()
		require.Equal(t, before, time.Now(), "a release wakes at once")
		require.Empty(t, s.client.data.waiters)
	})
}

// TestMemoryStoreWaiterEndsAsTheLockIsFree: the context of a waiter ends after a
// release that it has not heard of.
func TestMemoryStoreWaiterEndsAsTheLockIsFree(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		l := mustLock(t, s, "l", time.Minute)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			_, err := Acquire(ctx, s.Client(), "l", time.Minute)
			ended <- err
		}()
		synctest.Wait()
		d := s.client.data
		d.mu.Lock()
		waiting := d.waiters["l"]
		delete(d.waiters, "l") // so that nobody is woken
		d.mu.Unlock()
		require.Len(t, waiting, 1)
		require.NoError(t, l.Unlock())
		cancel()
		err := <-ended
		require.ErrorIs(t, err, context.Canceled)
		require.NotErrorIs(t, err, ErrLockHeld)
	})
}

// TestMemoryStoreWaiterEndsWithTheLease: a lease ends at the time at which the context
// of a waiter does. The waiter does not get the lock any more.
func TestMemoryStoreWaiterEndsWithTheLease(t *testing.T) {
	for range 20 {
		bubble(t, func(t *testing.T) {
			s := NewMemoryStore()
			defer s.Close()
			mustLock(t, s, "l", time.Minute)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			_, err := Acquire(ctx, s.Client(), "l", time.Minute)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			_, err = s.LockHolder("l")
			refuses(t, ErrNotFound, err)
		})
	}
}

// TestMemoryStoreWaitersLearnOfALaterLease: those who wait for the end of a lease
// get the lock when a later and shorter one has ended.
func TestMemoryStoreWaitersLearnOfALaterLease(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		first := mustLock(t, s, "l", time.Hour)
		began := time.Now()
		var wg sync.WaitGroup
		for range 5 {
			client := s.Client()
			wg.Go(func() { // it dies as soon as it has the lock
				_, err := Acquire(context.Background(), client, "l", time.Second)
				assert.NoError(t, err)
				assert.NoError(t, client.Close())
			})
		}
		synctest.Wait()
		require.NoError(t, first.Unlock())
		wg.Wait()
		require.Equal(t, 4*time.Second, time.Since(began), "one lease after another")
	})
}

// TestMemoryStoreWaiterClosed: a waiter whose client is closed as it is woken
// leaves its turn to the next one.
func TestMemoryStoreWaiterClosed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		for range 200 {
			held := mustLock(t, s, "l", time.Hour)
			began := time.Now()
			var wg sync.WaitGroup
			wait := func(client *MemoryStore) {
				wg.Go(func() {
					l, err := Acquire(context.Background(), client, "l", time.Hour)
					if err == nil {
						err = l.Unlock()
					}
					if err != nil {
						refuses(t, ErrClosed, err)
					}
				})
				synctest.Wait()
			}
			closing := s.Client()
			wait(closing)
			wait(s)
			require.NoError(t, held.Unlock())
			require.NoError(t, closing.Close())
			wg.Wait()
			require.Equal(t, began, time.Now())
		}
	})
}
