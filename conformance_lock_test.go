package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var lockCases = []conformanceCase{
	{"lock", "Lock does not wait: ErrLockHeld if someone holds it", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		l := mustLock(t, a, "l", time.Minute)
		assert.Equal(t, "l", l.Key())
		for _, s := range []Store{a, b} {
			other, err := s.Lock("l", time.Minute)
			refuses(t, ErrLockHeld, err)
			assert.Nil(t, other)
		}
		require.NoError(t, mustLock(t, b, "l.other", time.Minute).Unlock())
		require.NoError(t, l.Unlock())
		l = mustLock(t, b, "l", time.Minute)
		_, err := a.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err)
		require.NoError(t, l.Unlock())
	}},
	{"unlock-twice", "Unlock returns ErrLockNotHeld when there is nothing of this holder's to release", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		l := mustLock(t, a, "l", time.Minute)
		require.NoError(t, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Refresh(), "after Unlock")
		next := mustLock(t, b, "l", time.Minute)
		refuses(t, ErrLockNotHeld, l.Unlock(), "somebody else's")
		_, err := a.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err)
		require.NoError(t, next.Unlock())
	}},
	{"lock-lapses", "a lease lapses when its TTL passes without a Refresh, and not before", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		const ttl = 300 * time.Millisecond
		before := time.Now()
		l := mustLock(t, a, "l", ttl)
		var next Lock
		for next == nil {
			var err error
			if next, err = b.Lock("l", time.Minute); err != nil {
				refuses(t, ErrLockHeld, err)
				time.Sleep(time.Millisecond)
			}
			require.Less(t, time.Since(before), 10*time.Second)
		}
		assert.GreaterOrEqual(t, time.Since(before), ttl, "early")
		refuses(t, ErrLockExpired, l.Refresh())
		refuses(t, ErrLockNotHeld, l.Unlock())
		_, err := a.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err, "the next holder's lock is untouched")
		require.NoError(t, next.Refresh())
		require.NoError(t, next.Unlock())
	}},
	{"refresh-after-lapse", "Refresh returns ErrLockExpired once the lease has lapsed, whether or not someone else has taken it", func(t *testing.T, dial func() Store) {
		s := dial()
		l := mustLock(t, s, "l", 50*time.Millisecond)
		time.Sleep(60 * time.Millisecond)
		refuses(t, ErrLockExpired, l.Refresh())
		refuses(t, ErrLockExpired, l.Refresh())
		refuses(t, ErrLockNotHeld, l.Unlock())
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	}},
	{"refresh", "Refresh restarts the TTL", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			l := mustLock(t, a, fmt.Sprintf("l.%d", ttl), ttl)
			for range 6 {
				time.Sleep(ttl / 3)
				if err := l.Refresh(); err != nil {
					refuses(t, ErrLockExpired, err)
					return false
				}
				if !refusedOrLapsed(t, b, l) {
					return false
				}
			}
			if err := l.Unlock(); err != nil {
				refuses(t, ErrLockNotHeld, err)
				return false
			}
			require.NoError(t, mustLock(t, b, l.Key(), time.Minute).Unlock())
			return true
		})
	}},
	{"locks-are-invisible", "a lock is never visible through Get, Keys or Watch", func(t *testing.T, dial func() Store) {
		s := dial()
		events := mustWatch(t, s, "*")
		require.NoError(t, s.Put("both", []byte("value"), 0))
		receive(t, events)
		before := mustGet(t, s, "both")
		for _, key := range []string{"l", "both"} {
			l := mustLock(t, s, key, time.Minute)
			require.NoError(t, l.Refresh())
			keys, err := s.Keys("*")
			require.NoError(t, err)
			assert.Equal(t, []string{"both"}, keys)
			if key == "both" {
				require.NoError(t, l.Unlock())
			}
		}
		_, err := s.Get("l")
		refuses(t, ErrNotFound, err)
		require.NoError(t, s.Delete("l"))
		_, err = s.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err, "Delete does not release it")
		assert.Equal(t, before, mustGet(t, s, "both"))
		deliversNext(t, s, events, "end")
	}},
	{"fencing", "the token is strictly greater for each next holder", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		var last uint64
		for i := range 12 {
			ttl := time.Minute
			if i%3 == 2 {
				ttl = 30 * time.Millisecond
			}
			l := mustLock(t, []Store{a, b}[i%2], "l", ttl).(Fenced)
			require.Greater(t, l.Token(), last)
			last = l.Token()
			switch i % 3 {
			case 0:
				require.NoError(t, l.Unlock())
			case 1:
				require.NoError(t, l.Refresh())
				require.Equal(t, last, l.Token())
				require.NoError(t, l.Unlock())
			case 2:
				time.Sleep(50 * time.Millisecond) // the holder crashes
			}
		}
	}},
	{"mutual-exclusion", "at most one holder at a time, under contention and crashes", func(t *testing.T, dial func() Store) {
		const clients, each = 8, 15
		const ttl = 4 * time.Second
		var seen witness
		var wg sync.WaitGroup
		for c := range clients {
			s := dial()
			require.NoError(t, mustLock(t, s, "first", time.Minute).Unlock()) // which opens what holds the locks
			wg.Go(func() {
				for i := range each {
					var l Lock
					var asked time.Time
					eventually(t, func() bool {
						var err error
						asked = time.Now()
						l, err = s.Lock("l", ttl)
						return err == nil
					}, "lock")
					work := seen.begin(l, asked, ttl)
					if !assert.NotNil(t, work) || c == 0 && i == 7 {
						continue // it crashes
					}
					assert.True(t, seen.end(work))
					assert.NoError(t, l.Unlock())
				}
			})
		}
		wg.Wait()
		assert.Zero(t, seen.violations)
		assert.Equal(t, clients*each, seen.cycles)
	}},
	{"refresh-races-unlock", "Refresh racing Unlock never resurrects a lock", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for range 30 {
			l := mustLock(t, a, "l", time.Minute)
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if err := l.Refresh(); err != nil {
						refuses(t, ErrLockNotHeld, err)
					}
				})
			}
			var unlocked atomic.Int32
			for range 2 {
				wg.Go(func() {
					if err := l.Unlock(); err != nil {
						refuses(t, ErrLockNotHeld, err)
					} else {
						unlocked.Add(1)
					}
				})
			}
			wg.Wait()
			require.EqualValues(t, 1, unlocked.Load())
			require.NoError(t, mustLock(t, b, "l", time.Minute).Unlock())
		}
	}},
}

var updateCases = []conformanceCase{
	{"update", "Update writes only if the key's revision is still the given one", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		first, err := a.Update("k", []byte("1"), 0, 0)
		require.NoError(t, err)
		kv := mustGet(t, b, "k")
		assert.Equal(t, first, kv.Revision)
		second, err := b.Update("k", []byte("2"), 0, first)
		require.NoError(t, err)
		assert.Greater(t, second, first)
		for _, revision := range []uint64{0, 1 << 40, first} {
			_, err = a.Update("k", []byte("x"), 0, revision)
			refuses(t, ErrConflict, err, revision)
		}
		now := mustGet(t, a, "k")
		assert.Equal(t, "2", string(now.Value))
		assert.Equal(t, second, now.Revision)
		assert.True(t, now.Created.Equal(kv.Created))
		// The writer of the last revision is refused a stale one, too.
		_, err = b.Update("k", []byte("x"), 0, first)
		refuses(t, ErrConflict, err)
		_, err = b.Update("k", []byte("3"), 0, second)
		require.NoError(t, err)
	}},
	{"update-of-the-gone", "an expired or deleted key does not exist", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		_, err := a.Update("k", nil, 0, 7)
		refuses(t, ErrConflict, err)
		first, err := a.Update("k", []byte("1"), 0, 0)
		require.NoError(t, err)
		require.NoError(t, b.Delete("k"))
		_, err = a.Update("k", []byte("x"), 0, first)
		refuses(t, ErrConflict, err)
		second, err := a.Update("k", []byte("2"), 60*time.Millisecond, 0)
		require.NoError(t, err)
		assert.Greater(t, second, first+1)
		for _, s := range []Store{a, b} { // each may see it a round trip late
			eventually(t, func() bool { _, err := s.Get("k"); return err != nil }, "expiry")
		}
		_, err = a.Update("k", []byte("x"), 0, second)
		refuses(t, ErrConflict, err, "by who wrote it")
		_, err = b.Update("k", []byte("x"), 0, second)
		refuses(t, ErrConflict, err, "by who did not")
		third, err := b.Update("k", []byte("3"), 0, 0)
		require.NoError(t, err)
		assert.Greater(t, third, second)
	}},
	{"update-ttl", "Update sets the TTL", func(t *testing.T, dial func() Store) {
		s := dial()
		events := mustWatch(t, s, "k")
		first, err := s.Update("k", []byte("1"), time.Hour, 0)
		require.NoError(t, err)
		assert.Equal(t, first, receive(t, events).Revision)
		second, err := s.Update("k", []byte("2"), 50*time.Millisecond, first)
		require.NoError(t, err)
		assert.Equal(t, second, receive(t, events).Revision)
		expiry := receive(t, events)
		assert.Equal(t, "delete k", brief(expiry))
		assert.Equal(t, second, expiry.Revision)
	}},
	{"update-counts", "no acknowledged Update is lost, and only one of several wins", func(t *testing.T, dial func() Store) {
		const clients, each = 4, 15
		var wg sync.WaitGroup
		for range clients {
			s := dial()
			wg.Go(func() {
				for range each {
					eventually(t, func() bool {
						var n int
						var revision uint64
						if kv, err := s.GetKeyValue("counter"); err == nil {
							revision = kv.Revision
							_, _ = fmt.Sscan(string(kv.Value), &n)
						} else {
							refuses(t, ErrNotFound, err)
						}
						_, err := s.Update("counter", fmt.Append(nil, n+1), 0, revision)
						if err != nil {
							refuses(t, ErrConflict, err)
						}
						return err == nil
					}, "update")
				}
			})
		}
		wg.Wait()
		assert.Equal(t, fmt.Sprint(clients*each), string(mustGet(t, dial(), "counter").Value))
	}},
}

var withLockCases = []conformanceCase{
	{"with-lock", "WithLock runs fn while it holds the lock and unlocks it after", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			key := fmt.Sprintf("l.%d", ttl)
			held := false
			err := WithLock(context.Background(), a, key, ttl, func(ctx context.Context, token uint64) error {
				assert.NotZero(t, token)
				time.Sleep(ttl * 5 / 3) // longer than the lease
				_, err := b.Lock(key, time.Minute)
				if held = ctx.Err() == nil; held {
					refuses(t, ErrLockHeld, err)
				}
				return nil
			})
			if err != nil || !held {
				refuses(t, ErrLockExpired, err)
				return false
			}
			require.NoError(t, mustLock(t, b, key, time.Minute).Unlock())
			return true
		})
	}},
	{"with-lock-errors", "the error tells apart: not acquired in time, fn's own error, lost on the way", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		l := mustLock(t, a, "l", time.Minute)
		never := func(context.Context, uint64) error { t.Error("called"); return nil }
		heldToTheEnd(t, func(ctx context.Context) error { return WithLock(ctx, b, "l", time.Minute, never) })
		over, cancel := context.WithTimeout(context.Background(), 0)
		defer cancel()
		assert.ErrorIs(t, WithLock(over, b, "free", time.Minute, never), context.DeadlineExceeded)
		refuses(t, ErrInvalidTTL, WithLock(context.Background(), b, "free", 0, never))
		refuses(t, ErrInvalidKey, WithLock(context.Background(), b, "a b", time.Minute, never))
		require.NoError(t, l.Unlock())

		own := errors.New("its own")
		err := WithLock(context.Background(), b, "l", time.Minute, func(context.Context, uint64) error { return own })
		refuses(t, own, err)
		require.NoError(t, mustLock(t, a, "l", time.Minute).Unlock())
	}},
	{"with-lock-panics", "WithLock unlocks when fn panics", func(t *testing.T, dial func() Store) {
		s := dial()
		assert.PanicsWithValue(t, "oops", func() {
			_ = WithLock(context.Background(), s, "l", time.Minute, func(context.Context, uint64) error { panic("oops") })
		})
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	}},
	{"with-lock-waits", "WithLock waits for the lock, one at a time, with growing tokens", func(t *testing.T, dial func() Store) {
		var inside, violations atomic.Int32
		var last uint64
		var wg sync.WaitGroup
		for range 6 {
			s := dial()
			wg.Go(func() {
				for range 3 {
					assert.NoError(t, WithLock(context.Background(), s, "l", 5*time.Second, func(_ context.Context, token uint64) error {
						if inside.Add(1) != 1 || token <= last {
							violations.Add(1)
						}
						last = token
						time.Sleep(time.Millisecond)
						inside.Add(-1)
						return nil
					}))
				}
			})
		}
		wg.Wait()
		assert.Zero(t, violations.Load())
	}},
	{"with-lock-takes-over", "a dead holder blocks nobody for longer than its lease", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		before := time.Now()
		mustLock(t, a, "l", 300*time.Millisecond)
		require.NoError(t, WithLock(context.Background(), b, "l", time.Minute, func(context.Context, uint64) error {
			assert.GreaterOrEqual(t, time.Since(before), 300*time.Millisecond)
			return nil
		}))
	}},
	{"with-lock-cancel", "fn's context ends with its parent", func(t *testing.T, dial func() Store) {
		s := dial()
		ctx, cancel := context.WithCancel(context.Background())
		err := WithLock(ctx, s, "l", time.Minute, func(ctx context.Context, _ uint64) error {
			cancel()
			<-ctx.Done()
			return ctx.Err()
		})
		refuses(t, context.Canceled, err)
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	}},
	{"with-lock-lost", "fn's context ends when the lease can no longer be counted on", func(t *testing.T, dial func() Store) {
		s := dial()
		before := time.Now()
		err := WithLock(context.Background(), refreshless{s}, "l", 200*time.Millisecond, func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			assert.GreaterOrEqual(t, time.Since(before), 200*time.Millisecond)
			assert.Less(t, time.Since(before), 5*time.Second)
			refuses(t, ErrLockExpired, context.Cause(ctx))
			return ctx.Err()
		})
		refuses(t, ErrLockExpired, err)
		own := errors.New("its own")
		err = WithLock(context.Background(), refreshless{s}, "l", 500*time.Millisecond, func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			return own
		})
		assert.ErrorIs(t, err, ErrLockExpired)
		assert.ErrorIs(t, err, own)
		err = WithLock(context.Background(), refreshless{s}, "l", 500*time.Millisecond, func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			return nil
		})
		refuses(t, ErrLockExpired, err)
	}},
	{"with-lock-outages", "WithLock waits through outages, and for as long as ctx allows", func(t *testing.T, dial func() Store) {
		s := dial()
		ran := 0
		run := func(context.Context, uint64) error { ran++; return nil }
		m := failing(s, "lock", errOutage, errDoubt, errOutage, ErrLockHeld, errOutage)
		require.NoError(t, WithLock(context.Background(), m, "l", time.Minute, run))
		assert.Equal(t, 1, ran)
		ctx, cancel := context.WithCancel(context.Background())
		err := WithLock(ctx, failingFive(s, cancel), "l", time.Minute, run)
		assert.ErrorIs(t, err, context.Canceled)
		assert.ErrorIs(t, err, errOutage)
		assert.Equal(t, 1, ran)
	}},
	{"with-lock-late", "a lease that lapsed before fn was called is no loss: WithLock takes the lock again", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, lapsed := range []bool{false, true} {
			withLongerTTL(t, 500*time.Millisecond, func(ttl time.Duration) bool {
				late := ttl * 2 / 3
				if lapsed {
					late = ttl + 20*time.Millisecond
				}
				first, ran := true, 0
				var end time.Time // of the first lease, unless it is refreshed
				m := meddler{Store: s, granted: func(l Lock) Lock {
					if first { // it is handed over late
						if info, err := s.LockHolder("l"); err == nil {
							end = info.Expires
						}
						time.Sleep(late)
					}
					first = false
					return l
				}}
				var left time.Duration
				err := WithLock(context.Background(), m, "l", ttl, func(ctx context.Context, _ uint64) error {
					ran++
					if info, err := s.LockHolder("l"); err == nil {
						left = time.Until(info.Expires)
						assert.True(t, info.Expires.After(end), "fn was called on what was left of the first lease")
					}
					time.Sleep(ttl / 4)
					return ctx.Err()
				})
				assert.Equal(t, 1, ran)
				if err != nil {
					refuses(t, ErrLockExpired, err)
				}
				return err == nil && left >= ttl/2
			})
		}
	}},
	{"with-lock-always-late", "if ten leases in a row lapse before fn can be called, WithLock returns ErrLockExpired", func(t *testing.T, dial func() Store) {
		granted := 0
		m := meddler{Store: dial(), granted: func(l Lock) Lock {
			granted++
			time.Sleep(210 * time.Millisecond)
			return l
		}}
		refuses(t, ErrLockExpired, WithLock(context.Background(), m, "l", 200*time.Millisecond, func(context.Context, uint64) error {
			t.Error("called")
			return nil
		}))
		assert.Equal(t, 10, granted)
	}},
	{"with-lock-nested", "an inner lock is not lost because the outer one is", func(t *testing.T, dial func() Store) {
		s := dial()
		withLongerTTL(t, 300*time.Millisecond, func(ttl time.Duration) (called bool) {
			refuses(t, ErrLockExpired, WithLock(context.Background(), refreshless{s}, "outer", ttl, func(ctx context.Context, _ uint64) error {
				err := WithLock(ctx, s, "inner", time.Minute, func(ctx context.Context, _ uint64) error {
					called = true
					<-ctx.Done()
					refuses(t, ErrLockExpired, context.Cause(ctx))
					return nil
				})
				if called {
					require.NoError(t, err)
				}
				return nil
			}))
			return called
		})
	}},
	{"paused-holder", "a paused holder is fenced off by the resource that the lock protects", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		// The register is the resource: it takes a write only from a token that
		// is not lower than the highest it has seen.
		write := func(s Store, token uint64, what string) error {
			for {
				var revision, highest uint64
				if kv, err := s.GetKeyValue("register"); err == nil {
					revision = kv.Revision
					_, _ = fmt.Sscan(string(kv.Value), &highest)
				}
				if token < highest {
					return errors.New("stale token")
				}
				if _, err := s.Update("register", fmt.Appendf(nil, "%d %s", token, what), 0, revision); err != ErrConflict { //nolint:errorlint // bare
					return err
				}
			}
		}
		paused := mustLock(t, a, "l", 100*time.Millisecond).(Fenced)
		require.NoError(t, write(a, paused.Token(), "before the pause"))
		time.Sleep(150 * time.Millisecond) // it is stopped for longer than its lease
		next := mustLock(t, b, "l", time.Minute).(Fenced)
		require.NoError(t, write(b, next.Token(), "by the next"))
		assert.Error(t, write(a, paused.Token(), "after the pause"))
		refuses(t, ErrLockExpired, paused.Refresh())
		assert.Contains(t, string(mustGet(t, a, "register").Value), "by the next")
	}},
}

// refreshless is a store whose locks cannot be refreshed, as if no packet got
// through.
type refreshless struct{ StateStore }

func (s refreshless) Lock(key string, ttl time.Duration) (Lock, error) {
	l, err := s.StateStore.Lock(key, ttl)
	if err != nil {
		return nil, err
	}
	return unreachable{l}, nil
}

type unreachable struct{ Lock }

func (unreachable) Refresh() error { return errors.New("no packet gets through") }

var closeCases = []conformanceCase{
	{"use-after-close", "after Close every method is ErrClosed", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k", nil, 0))
		require.NoError(t, s.Close())
		for _, key := range []string{"k", "other", "a b", ""} {
			_, err := s.Get(key)
			refuses(t, ErrClosed, err, key)
			_, err = s.GetKeyValue(key)
			refuses(t, ErrClosed, err, key)
			refuses(t, ErrClosed, s.Put(key, nil, 0), key)
			refuses(t, ErrClosed, s.Put(key, nil, -1), key)
			refuses(t, ErrClosed, s.Delete(key), key)
			_, err = s.Keys(key)
			refuses(t, ErrClosed, err, key)
			_, err = s.Watch(key)
			refuses(t, ErrClosed, err, key)
			_, err = s.Lock(key, time.Minute)
			refuses(t, ErrClosed, err, key)
			_, err = s.Update(key, nil, 0, 0)
			refuses(t, ErrClosed, err, key)
			refuses(t, ErrClosed, s.DeleteRevision(key, 1), key)
			_, err = s.Entries(key)
			refuses(t, ErrClosed, err, key)
			_, err = s.LockHolder(key)
			refuses(t, ErrClosed, err, key)
			_, err = s.WithContext(context.Background()).Get(key)
			refuses(t, ErrClosed, err, key)
		}
		refuses(t, ErrClosed, WithLock(context.Background(), s, "l", time.Minute, nil))
		require.NoError(t, s.Close(), "idempotent")
	}},
	{"close-ends-watches", "Close ends watches, read or not, and returns when their goroutines are gone", func(t *testing.T, dial func() Store) {
		s := dial()
		read, unread := mustWatch(t, s, "*"), mustWatch(t, s, "*")
		for range 50 {
			require.NoError(t, s.Put("k", nil, 0))
		}
		receive(t, read)
		require.NoError(t, s.Close())
		for _, events := range []<-chan *KeyValue{read, unread} {
			for range events { //nolint:revive // until it is closed
			}
		}
	}},
	{"close-concurrently", "all methods are safe for concurrent use, Close too", func(t *testing.T, dial func() Store) {
		s := dial()
		var wg sync.WaitGroup
		bare := func(err error) {
			switch err {
			case nil, ErrClosed, ErrNotFound, ErrLockHeld, ErrLockNotHeld, ErrLockExpired:
			default: // a write that was under way
				assert.ErrorIs(t, err, ErrClosed)
				assert.ErrorIs(t, err, ErrOutcomeUnknown)
			}
		}
		for i := range 4 {
			wg.Go(func() {
				for range 20 {
					key := fmt.Sprint("k.", i%2)
					bare(s.Put(key, nil, time.Second))
					_, err := s.Get(key)
					bare(err)
					_, err = s.Keys("*")
					bare(err)
					if events, err := s.Watch("*"); err != nil {
						bare(err)
					} else if i == 0 {
						go func() {
							for range events { //nolint:revive // until it is closed
							}
						}()
					}
					if l, err := s.Lock(key, time.Second); err != nil {
						bare(err)
					} else {
						bare(l.Unlock())
					}
					bare(s.Delete(key))
				}
			})
		}
		time.Sleep(30 * time.Millisecond)
		for range 2 {
			wg.Go(func() { assert.NoError(t, s.Close()) })
		}
		wg.Wait()
	}},
	{"unlock-after-close", "locks still held can still be unlocked, and are not refreshed", func(t *testing.T, dial func() Store) {
		s := dial()
		l := mustLock(t, s, "l", time.Minute)
		lapsed := mustLock(t, s, "lapsed", 20*time.Millisecond)
		time.Sleep(30 * time.Millisecond)
		require.NoError(t, s.Close())
		refuses(t, ErrClosed, l.Refresh())
		require.NoError(t, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Refresh())
		refuses(t, ErrLockExpired, lapsed.Refresh())
		refuses(t, ErrLockNotHeld, lapsed.Unlock())
	}},
}
