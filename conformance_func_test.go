package state

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A meddler is a store that behaves as another one does, except where a test says
// otherwise. It stands for what a user may wrap around a store.
type meddler struct {
	Store
	// fail returns the error of a call in place of the store. With one that wraps
	// ErrOutcomeUnknown the call is made all the same, unless it is errLost.
	fail func(op, key string) error
	// updated is called after each Update that succeeded.
	updated func()
	// granted may replace a lock.
	granted func(l Lock) Lock
}

func (m meddler) WithContext(ctx context.Context) Store {
	m.Store = m.Store.WithContext(ctx)
	return m
}

func (m meddler) failed(op, key string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(op, key)
}

func (m meddler) GetKeyValue(key string) (*KeyValue, error) {
	if err := m.failed("get", key); err != nil {
		return nil, err
	}
	return m.Store.GetKeyValue(key)
}

func (m meddler) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	err := m.failed("update", key)
	if err != nil {
		if errors.Is(err, ErrOutcomeUnknown) && err != errLost { //nolint:errorlint // bare
			_, _ = m.Store.Update(key, value, ttl, revision)
		}
		return 0, err
	}
	next, err := m.Store.Update(key, value, ttl, revision)
	if err == nil && m.updated != nil {
		m.updated()
	}
	return next, err
}

func (m meddler) DeleteRevision(key string, revision uint64) error {
	if err := m.failed("delete", key); err != nil {
		return err
	}
	return m.Store.DeleteRevision(key, revision)
}

func (m meddler) LockHolder(key string) (*LockInfo, error) {
	if err := m.failed("holder", key); err != nil {
		return nil, err
	}
	return m.Store.LockHolder(key)
}

func (m meddler) Lock(key string, ttl time.Duration) (Lock, error) {
	if err := m.failed("lock", key); err != nil {
		return nil, err
	}
	l, err := m.Store.Lock(key, ttl)
	if err == nil && m.granted != nil {
		l = m.granted(l)
	}
	return l, err
}

var (
	errOutage = errors.New("no packet gets through")
	errDoubt  = fmt.Errorf("no answer: %w", ErrOutcomeUnknown)
	errLost   = fmt.Errorf("no answer to what never arrived: %w", ErrOutcomeUnknown)
)

// failing returns a meddler whose next calls of op fail with these errors.
func failing(s Store, op string, errs ...error) meddler {
	var mu sync.Mutex
	return meddler{Store: s, fail: func(called, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		if called != op || len(errs) == 0 {
			return nil
		}
		err := errs[0]
		errs = errs[1:]
		return err
	}}
}

// failingFive returns a meddler all of whose calls fail. The fifth one calls cancel.
func failingFive(s Store, cancel func()) meddler {
	tries := 0
	return meddler{Store: s, fail: func(string, string) error {
		if tries++; tries == 5 {
			cancel()
		}
		return errOutage
	}}
}

var functionCases = []conformanceCase{
	{"modify", "Modify writes what fn makes of the entry, or of nil if the key does not exist, and returns the new revision", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		ctx := context.Background()
		var first *KeyValue
		for i := range 3 {
			revision, err := Modify(ctx, []Store{a, b}[i%2], "k", func(old *KeyValue) ([]byte, time.Duration, error) {
				if i == 0 {
					assert.Nil(t, old)
				} else {
					assert.Equal(t, first, old)
				}
				return fmt.Append(nil, i), time.Hour, nil
			})
			require.NoError(t, err)
			first = mustGet(t, a, "k")
			assert.Equal(t, revision, first.Revision)
			assert.Equal(t, fmt.Sprint(i), string(first.Value))
			assert.True(t, first.Expires.Equal(first.Modified.Add(time.Hour)))
		}
		own := errors.New("its own")
		_, err := Modify(ctx, a, "k", func(*KeyValue) ([]byte, time.Duration, error) { return []byte("x"), 0, own })
		refuses(t, own, err)
		assert.Equal(t, first, mustGet(t, a, "k"))
		nothing := func(*KeyValue) ([]byte, time.Duration, error) { return nil, 0, nil }
		_, err = Modify(ctx, a, "a b", nothing)
		refuses(t, ErrInvalidKey, err)
		_, err = Modify(ctx, a, "k", func(*KeyValue) ([]byte, time.Duration, error) { return nil, -1, nil })
		refuses(t, ErrInvalidTTL, err)
		_, err = Modify(ctx, a, "k", func(*KeyValue) ([]byte, time.Duration, error) { return make([]byte, 2<<20), 0, nil })
		refuses(t, ErrValueTooLarge, err)
		require.NoError(t, a.Close())
		_, err = Modify(ctx, a, "k", nothing)
		refuses(t, ErrClosed, err)
	}},
	{"modify-counts", "no change of a Modify is lost", func(t *testing.T, dial func() Store) {
		const clients, each = 5, 15
		var wg sync.WaitGroup
		for range clients {
			s := dial()
			wg.Go(func() {
				for range each {
					_, err := Modify(context.Background(), s, "counter", func(old *KeyValue) ([]byte, time.Duration, error) {
						var n int
						if old != nil {
							_, _ = fmt.Sscan(string(old.Value), &n)
						}
						return fmt.Append(nil, n+1), 0, nil
					})
					assert.NoError(t, err)
				}
			})
		}
		wg.Wait()
		assert.Equal(t, fmt.Sprint(clients*each), string(mustGet(t, dial(), "counter").Value))
	}},
	{"modify-starts-over", "Modify starts over after a conflict until ctx ends, and then wraps the context's error", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		calls := 0
		_, err := Modify(ctx, a, "k", func(*KeyValue) ([]byte, time.Duration, error) {
			require.NoError(t, b.Put("k", []byte("theirs"), 0)) // always in between
			if calls++; calls == 6 {
				cancel()
			}
			return []byte("mine"), 0, nil
		})
		assert.ErrorIs(t, err, context.Canceled)
		assert.Equal(t, 6, calls)
		assert.Equal(t, "theirs", string(mustGet(t, a, "k").Value))
	}},
	{"modify-unknown", "a write of unknown outcome is returned and never repeated", func(t *testing.T, dial func() Store) {
		s := dial()
		calls := 0
		_, err := Modify(context.Background(), failing(s, "update", errDoubt), "k", func(*KeyValue) ([]byte, time.Duration, error) {
			calls++
			return []byte("v"), 0, nil
		})
		assert.ErrorIs(t, err, ErrOutcomeUnknown)
		assert.Equal(t, 1, calls)
		_, err = Modify(context.Background(), failing(s, "get", errOutage), "k", nil)
		assert.ErrorIs(t, err, errOutage)
	}},
	{"keep-alive", "KeepAlive writes the key at once and then every third of the TTL; when ctx ends it deletes the key and returns nil", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			events := mustWatch(t, b, "*")
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error)
			n, began := 0, time.Now()
			go func() {
				done <- KeepAlive(ctx, a, "k", ttl, func() []byte {
					n++
					return fmt.Append(nil, n)
				})
			}()
			var first, last *KeyValue
			for before := 0; before < 6; { // longer than the TTL
				kv := receive(t, events)
				if brief(kv) == "delete k" {
					cancel()
					require.NoError(t, <-done)
					return false
				}
				require.Equal(t, "put k", brief(kv))
				value, err := strconv.Atoi(string(kv.Value))
				require.NoError(t, err)
				require.Greater(t, value, before)
				before = value
				require.True(t, kv.Expires.Equal(kv.Modified.Add(ttl)))
				if first == nil {
					first = kv
				}
				assert.True(t, kv.Created.Equal(first.Created))
				last = kv
			}
			assert.GreaterOrEqual(t, time.Since(began), 5*ttl/3, "and none too soon")
			cancel()
			require.NoError(t, <-done)
			deleted := receive(t, events)
			for brief(deleted) == "put k" { // it was late
				last, deleted = deleted, receive(t, events)
			}
			assert.Equal(t, "delete k", brief(deleted))
			_, err := b.Get("k")
			refuses(t, ErrNotFound, err)
			if deleted.Revision == last.Revision {
				return false // it expired
			}
			require.NoError(t, KeepAlive(ctx, a, "k", time.Minute, nil), "nothing is written after ctx has ended")
			deliversNext(t, b, events, "end")
			return true
		})
	}},
	{"keep-alive-spares-others", "KeepAlive deletes only what it wrote last", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, b.Put("k", []byte("left by another"), 0))
		events := mustWatch(t, b, "k")
		for _, theirs := range []func() error{
			func() error { return b.Put("k", []byte("theirs"), 0) },
			func() error { return b.Delete("k") },
		} {
			ctx, cancel := context.WithCancel(context.Background())
			done, updated := make(chan error), make(chan struct{}, 1)
			s := meddler{Store: a, updated: func() { updated <- struct{}{} }}
			go func() { done <- KeepAlive(ctx, s, "k", time.Hour, func() []byte { return []byte("mine") }) }()
			<-updated // or the write would be in doubt when ctx ends
			require.Equal(t, "mine", string(receive(t, events).Value))
			require.NoError(t, theirs())
			receive(t, events)
			cancel()
			require.NoError(t, <-done)
			deliversNext(t, b, events, "k")
		}
	}},
	{"keep-alive-takes-over", "KeepAlive writes its key again after somebody deleted or replaced it", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "k")
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		done := make(chan error)
		go func() { done <- KeepAlive(ctx, a, "k", 6*time.Second, func() []byte { return []byte("mine") }) }()
		next := func(value string) {
			eventually(t, func() bool { return string(receive(t, events).Value) == value }, value)
			if value == "mine" { // on several servers an event may come before it can be read
				eventually(t, func() bool { got, err := b.Get("k"); return err == nil && string(got) == value }, value)
			}
		}
		next("mine")
		require.NoError(t, b.Delete("k"))
		next("")
		next("mine")
		require.NoError(t, b.Put("k", []byte("theirs"), 0))
		next("theirs")
		next("mine")
		cancel()
		require.NoError(t, <-done)
		_, err := b.Get("k")
		refuses(t, ErrNotFound, err)
	}},
	{"keep-alive-errors", "KeepAlive returns the errors that do not pass", func(t *testing.T, dial func() Store) {
		s := dial()
		ctx := context.Background()
		value := func() []byte { return nil }
		refuses(t, ErrInvalidTTL, KeepAlive(ctx, s, "k", 0, value))
		refuses(t, ErrInvalidTTL, KeepAlive(ctx, s, "k", -1, value))
		refuses(t, ErrInvalidKey, KeepAlive(ctx, s, "a b", time.Minute, value))
		refuses(t, ErrValueTooLarge, KeepAlive(ctx, s, "k", time.Minute, func() []byte { return make([]byte, 2<<20) }))
		_, err := s.Get("k")
		refuses(t, ErrNotFound, err)
		done := make(chan error)
		go func() { done <- KeepAlive(ctx, s, "k", 300*time.Millisecond, value) }()
		eventually(t, func() bool { _, err := s.Get("k"); return err == nil }, "the first write")
		require.NoError(t, s.Close())
		refuses(t, ErrClosed, <-done)
	}},
	{"keep-alive-outages", "KeepAlive goes on through outages and writes of unknown outcome, and deletes what it wrote in the end", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for name, failures := range map[string][]error{
			"update":          {errOutage, nil, errOutage, errOutage, nil, nil, errOutage},
			"update in doubt": {errDoubt, nil, errDoubt, errDoubt, nil},
			"get":             {errOutage, errOutage},
			"delete":          {errOutage, errDoubt, errOutage},
		} {
			op, _, _ := strings.Cut(name, " ")
			withLongerTTL(t, 900*time.Millisecond, func(ttl time.Duration) bool {
				return keepsAlive(t, failing(a, op, failures...), b, ttl, name)
			})
		}

		// The last write is in doubt when ctx ends.
		for _, before := range [][]error{{errDoubt}, {nil, errDoubt}} {
			ctx, cancel := context.WithCancel(context.Background())
			n := 0
			m := failing(a, "update", before...)
			inner := m.fail
			m.fail = func(op, key string) error {
				err := inner(op, key)
				if err != nil {
					cancel()
				}
				return err
			}
			require.NoError(t, KeepAlive(ctx, m, "k", 300*time.Millisecond, func() []byte { n++; return fmt.Append(nil, n) }))
			require.Equal(t, len(before), n)
			_, err := b.Get("k")
			refuses(t, ErrNotFound, err, before)
			cancel()
		}

		// The last two are, and the first of them arrives late.
		ctx, cancel := context.WithCancel(context.Background())
		n := 0
		m := meddler{Store: a, fail: func(op, key string) error {
			if op != "update" {
				return nil
			}
			if n == 2 {
				_, err := b.Update(key, []byte("1"), time.Minute, 0)
				assert.NoError(t, err)
				cancel()
			}
			return errLost
		}}
		require.NoError(t, KeepAlive(ctx, m, "k", time.Minute, func() []byte { n++; return fmt.Append(nil, n) }))
		require.Equal(t, 2, n)
		_, err := b.Get("k")
		refuses(t, ErrNotFound, err)
	}},
}

// keepsAlive keeps a key alive with s, as other sees it, and reports whether the key
// never expired.
func keepsAlive(t *testing.T, s, other Store, ttl time.Duration, name string) bool {
	t.Helper()
	events := mustWatch(t, other, "k")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	n := 0
	go func() {
		done <- KeepAlive(ctx, s, "k", ttl, func() []byte { n++; return fmt.Append(nil, n) })
	}()
	lived := true
	for range 6 {
		for brief(receive(t, events)) != "put k" {
			lived = false // only an expiry deletes it
		}
	}
	cancel()
	require.NoError(t, <-done, name)
	_, err := other.Get("k")
	refuses(t, ErrNotFound, err, name)
	for brief(receive(t, events)) != "delete k" {
	}
	deliversNext(t, other, events, "k")
	require.NoError(t, other.Delete("k"))
	return lived
}

// heldToTheEnd requires that acquire waits for a lock that is held until its context
// ends, and then says so. A busy machine may need longer for the first attempt.
func heldToTheEnd(t *testing.T, acquire func(ctx context.Context) error, args ...any) {
	t.Helper()
	var err error
	for _, wait := range []time.Duration{200 * time.Millisecond, 10 * time.Second} {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		err = acquire(ctx)
		assert.Error(t, ctx.Err(), "it did not wait")
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	refuses(t, ErrLockHeld, err, args...)
}

var acquireCases = []conformanceCase{
	{"acquire", "Acquire waits for a lock until it is released", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for name, s := range map[string]StateStore{"itself": b, "wrapped": meddler{Store: b}, "a StateStore": struct{ StateStore }{b}} {
			l := mustLock(t, a, "l", time.Minute)
			got := make(chan Lock, 1)
			go func() {
				l, err := Acquire(context.Background(), s, "l", time.Minute)
				assert.NoError(t, err, name)
				got <- l
			}()
			time.Sleep(30 * time.Millisecond)
			assert.Empty(t, got, name)
			require.NoError(t, l.Unlock())
			next := <-got
			require.NotNil(t, next, name)
			assert.Equal(t, "l", next.Key())
			assert.Greater(t, next.(Fenced).Token(), l.(Fenced).Token())
			_, err := a.Lock("l", time.Minute)
			refuses(t, ErrLockHeld, err, name)
			require.NoError(t, next.Unlock())
		}
	}},
	{"acquire-takes-over", "Acquire gets the lock when the lease of a dead holder ends, and not before; not while it is refreshed", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for name, s := range map[string]Store{"itself": b, "wrapped": meddler{Store: b}} {
			withLongerTTL(t, 400*time.Millisecond, func(ttl time.Duration) bool {
				l := mustLock(t, a, "l", ttl)
				refreshed, inTime := time.Now(), true
				var wg sync.WaitGroup
				wg.Go(func() {
					for range 3 {
						time.Sleep(ttl / 4)
						asked := time.Now()
						if err := l.Refresh(); err != nil {
							refuses(t, ErrLockExpired, err, name)
							inTime = false
							return
						}
						refreshed = asked
					}
				})
				next, err := Acquire(context.Background(), s, "l", time.Minute)
				took := time.Now()
				require.NoError(t, err, name)
				wg.Wait()
				refuses(t, ErrLockExpired, l.Refresh())
				require.NoError(t, next.Unlock())
				if inTime {
					assert.GreaterOrEqual(t, took.Sub(refreshed), ttl, name)
				}
				return inTime && took.Sub(refreshed) < ttl+2*time.Second
			})
		}
	}},
	{"acquire-takes-turns", "a client that waited for a lock, releases it and waits again does not starve the other waiters", func(t *testing.T, dial func() Store) {
		stores := []Store{dial(), dial(), dial()}
		for _, s := range stores {
			if _, ok := own[lockWaiter](s); !ok {
				t.Skip("a store that wraps another one is asked again and again")
			}
			if s, ok := s.(*NATSStore); ok && s.locks.missesReleases {
				t.Skip("its waiters look every two seconds")
			}
		}
		const enough, most = 5, 200
		var had [2]atomic.Int64
		var wg sync.WaitGroup
		first := mustLock(t, stores[2], "l", time.Minute)
		for i := range had {
			s := stores[i]
			wg.Go(func() {
				for had[0].Load() < enough || had[1].Load() < enough {
					l, err := Acquire(context.Background(), s, "l", time.Minute)
					if !assert.NoError(t, err) || had[i].Add(1) > most {
						assert.Fail(t, "one of two has it all the time", "%d and %d times", had[0].Load(), had[1].Load())
						return
					}
					time.Sleep(time.Millisecond) // it does something
					assert.NoError(t, l.Unlock())
				}
			})
		}
		time.Sleep(200 * time.Millisecond) // both wait
		require.NoError(t, first.Unlock())
		wg.Wait()
	}},
	{"acquire-errors", "when ctx ends Acquire returns the bare ErrLockHeld if somebody held the lock when it last looked, else an error that wraps the context's", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		l := mustLock(t, a, "l", time.Minute)
		require.NoError(t, mustLock(t, b, "first", time.Minute).Unlock()) // which opens what holds the locks
		for name, s := range map[string]Store{"itself": b, "wrapped": meddler{Store: b}} {
			heldToTheEnd(t, func(ctx context.Context) error {
				_, err := Acquire(ctx, s, "l", time.Minute)
				return err
			}, name)
			over, cancel := context.WithTimeout(context.Background(), 0)
			_, err := Acquire(over, s, "free", time.Minute)
			assert.ErrorIs(t, err, context.DeadlineExceeded, name)
			cancel()
			_, err = Acquire(context.Background(), s, "l", 0)
			refuses(t, ErrInvalidTTL, err, name)
			_, err = Acquire(context.Background(), s, "a b", time.Minute)
			refuses(t, ErrInvalidKey, err, name)
		}
		_, err := a.LockHolder("free")
		refuses(t, ErrNotFound, err)
		require.NoError(t, l.Unlock())
	}},
	{"acquire-wrapped", "on a store that wraps another one, Acquire only looks while somebody holds the lock, and so knows how it ended", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for _, freed := range []bool{false, true} { // at the last look
			l := mustLock(t, a, "l", time.Minute)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			tries, looks := 0, 0
			_, err := Acquire(ctx, meddler{Store: b, fail: func(op, _ string) error {
				switch op {
				case "lock":
					tries++
				case "holder":
					if looks++; looks == 4 {
						cancel()
						if freed {
							return ErrNotFound
						}
					}
				}
				return nil
			}}, "l", time.Minute)
			if freed {
				assert.ErrorIs(t, err, context.Canceled)
				assert.NotErrorIs(t, err, ErrOutcomeUnknown)
			} else {
				refuses(t, ErrLockHeld, err)
			}
			assert.Equal(t, 4, looks)
			assert.Equal(t, 1, tries)
			require.NoError(t, l.Unlock())
		}
	}},
	{"acquire-outages", "Acquire waits through outages; the error of ctx then wraps the last failure", func(t *testing.T, dial func() Store) {
		s := dial()
		l, err := Acquire(context.Background(), failing(s, "lock", errOutage, errDoubt, ErrLockExpired, ErrLockHeld, errOutage), "l", time.Minute)
		require.NoError(t, err)
		require.NoError(t, l.Unlock())
		ctx, cancel := context.WithCancel(context.Background())
		_, err = Acquire(ctx, failingFive(s, cancel), "l", time.Minute)
		assert.ErrorIs(t, err, context.Canceled)
		assert.ErrorIs(t, err, errOutage)
	}},
	{"acquire-tiny-ttl", "Acquire gives up with ErrLockExpired after ten leases in a row that lapsed on their way", func(t *testing.T, dial func() Store) {
		asked := 0
		_, err := Acquire(context.Background(), meddler{Store: dial(), fail: func(op, _ string) error {
			if op == "lock" {
				asked++
			}
			return ErrLockExpired
		}}, "l", time.Nanosecond)
		refuses(t, ErrLockExpired, err)
		assert.Equal(t, 10, asked)
	}},
	{"acquire-context", "ctx bounds the acquisition, and not Refresh of the lock", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for name, s := range map[string]Store{"itself": a, "wrapped": meddler{Store: a}} {
			ended, cancel := context.WithCancel(context.Background())
			ctx, end := context.WithCancel(context.Background())
			bound := s.WithContext(ended)
			cancel()
			l, err := Acquire(ctx, bound, "l", time.Minute)
			require.NoError(t, err, name)
			end()
			require.NoError(t, l.Refresh(), name)
			_, err = b.Lock("l", time.Minute)
			refuses(t, ErrLockHeld, err)
			require.NoError(t, l.Unlock(), name)
		}
	}},
	{"acquire-many", "many wait for one lock, and each gets it; one that gives up takes it from no other", func(t *testing.T, dial func() Store) {
		var inside, violations, got atomic.Int32
		var wg sync.WaitGroup
		clients := []Store{dial(), dial(), dial()}
		l := mustLock(t, clients[0], "l", time.Minute)
		for i := range 24 {
			s := clients[i%3]
			wg.Go(func() {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				if i%4 == 3 {
					time.AfterFunc(time.Duration(i)*3*time.Millisecond, cancel)
				}
				l, err := Acquire(ctx, s, "l", 20*time.Second)
				if err != nil {
					assert.Equal(t, 3, i%4, "%v", err)
					return
				}
				got.Add(1)
				if inside.Add(1) != 1 {
					violations.Add(1)
				}
				time.Sleep(time.Millisecond)
				inside.Add(-1)
				assert.NoError(t, l.Unlock())
			})
		}
		time.Sleep(50 * time.Millisecond)
		require.NoError(t, l.Unlock())
		wg.Wait()
		assert.Zero(t, violations.Load())
		assert.GreaterOrEqual(t, got.Load(), int32(18))
	}},
	{"close-ends-waiting", "Close ends calls in progress, such as Acquire, with ErrClosed", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		l := mustLock(t, a, "l", time.Minute)
		for _, wrap := range []func(Store) Store{
			func(s Store) Store { return s },
			func(s Store) Store { return meddler{Store: s} },
		} {
			s := dial()
			done := make(chan error)
			go func() {
				_, err := Acquire(context.Background(), wrap(s), "l", time.Minute)
				done <- err
			}()
			go func() {
				_, err := Acquire(context.Background(), wrap(s), "l", time.Minute)
				done <- err
			}()
			time.Sleep(20 * time.Millisecond)
			require.NoError(t, s.Close())
			refuses(t, ErrClosed, <-done)
			refuses(t, ErrClosed, <-done)
		}
		require.NoError(t, l.Unlock())
		next, err := Acquire(context.Background(), b, "l", time.Minute)
		require.NoError(t, err)
		require.NoError(t, next.Unlock())
	}},
}

// limited is a lock that can be refreshed so many times, and then no more.
type limited struct {
	Lock
	left *atomic.Int32
}

func (l limited) Refresh() error {
	if l.left.Add(-1) < 0 {
		return errOutage
	}
	return l.Lock.Refresh()
}

func limit(l Lock, n int32) limited {
	left := new(atomic.Int32)
	left.Store(n)
	return limited{l, left}
}

var holdCases = []conformanceCase{
	{"hold", "Hold refreshes a lock while fn runs and unlocks it afterwards", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		own := errors.New("its own")
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			l := mustLock(t, a, fmt.Sprintf("l.%d", ttl), ttl)
			ended := false
			err := Hold(context.Background(), l, ttl, func(ctx context.Context, token uint64) error {
				assert.Equal(t, l.(Fenced).Token(), token)
				time.Sleep(ttl * 5 / 3) // longer than the lease
				_, err := b.Lock(l.Key(), time.Minute)
				if ended = ctx.Err() != nil; !ended {
					refuses(t, ErrLockHeld, err)
				}
				return own
			})
			if ended || errors.Is(err, ErrLockExpired) {
				assert.ErrorIs(t, err, ErrLockExpired)
				return false
			}
			refuses(t, own, err)
			refuses(t, ErrLockNotHeld, l.Unlock())
			require.NoError(t, mustLock(t, b, l.Key(), time.Minute).Unlock())
			return true
		})
	}},
	{"hold-starts-fresh", "fn starts with at least two thirds of the lease left", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, thirds := range []time.Duration{0, 2} { // of the lease are used
			withLongerTTL(t, 1200*time.Millisecond, func(ttl time.Duration) bool {
				l := mustLock(t, s, fmt.Sprintf("lost.%d.%d", thirds, ttl), ttl) // the store sees it lapse a little later
				time.Sleep(thirds * ttl / 3)
				var began time.Time
				err := Hold(context.Background(), limit(l, 1), ttl, func(ctx context.Context, _ uint64) error {
					began = time.Now()
					<-ctx.Done()
					return nil
				})
				refuses(t, ErrLockExpired, err)
				if began.IsZero() {
					return false
				}
				assert.GreaterOrEqual(t, time.Since(began), ttl*2/3, thirds)
				return true
			})
			// The same of the store's own lock: it is not lost before its first
			// refresh is due.
			withLongerTTL(t, 1200*time.Millisecond, func(ttl time.Duration) bool {
				l := mustLock(t, s, fmt.Sprintf("kept.%d.%d", thirds, ttl), ttl)
				time.Sleep(thirds * ttl / 3)
				err := Hold(context.Background(), l, ttl, func(ctx context.Context, _ uint64) error {
					time.Sleep(ttl / 4)
					return ctx.Err()
				})
				if err != nil {
					refuses(t, ErrLockExpired, err)
				}
				return err == nil
			})
		}
	}},
	{"hold-lost-before", "fn is not called if the lock was lost before", func(t *testing.T, dial func() Store) {
		s := dial()
		never := func(context.Context, uint64) error { t.Error("called"); return nil }
		l := mustLock(t, s, "l", 50*time.Millisecond)
		time.Sleep(60 * time.Millisecond)
		refuses(t, ErrLockExpired, Hold(context.Background(), l, 50*time.Millisecond, never))
		l = mustLock(t, s, "l", time.Minute)
		require.NoError(t, l.Unlock())
		refuses(t, ErrLockNotHeld, Hold(context.Background(), struct{ Lock }{l}, time.Minute, never))
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		l = mustLock(t, s, "l", time.Minute)
		assert.ErrorIs(t, Hold(ctx, l, time.Minute, never), context.Canceled)
		l = mustLock(t, s, "l", time.Minute) // it was unlocked
		refuses(t, ErrInvalidTTL, Hold(context.Background(), l, 0, never))
		l = mustLock(t, s, "l", time.Minute)
		require.NoError(t, s.Close())
		refuses(t, ErrClosed, Hold(context.Background(), struct{ Lock }{l}, time.Minute, never))
		refuses(t, ErrLockNotHeld, l.Unlock())
	}},
	{"hold-lost", "when the lease is lost fn's context ends with the cause ErrLockExpired, and fn's own error is kept", func(t *testing.T, dial func() Store) {
		s := dial()
		lose := func(own error) (err error) {
			withLongerTTL(t, 300*time.Millisecond, func(ttl time.Duration) (called bool) {
				l := mustLock(t, s, rand.Text(), ttl) // another key, as the store sees the last lease lapse a little later
				err = Hold(context.Background(), limit(l, 1), ttl, func(ctx context.Context, _ uint64) error {
					called = true
					<-ctx.Done()
					refuses(t, ErrLockExpired, context.Cause(ctx))
					return own
				})
				return called
			})
			return err
		}
		for _, own := range []error{errOutage, fmt.Errorf("half done: %w", context.Canceled)} {
			err := lose(own)
			assert.ErrorIs(t, err, ErrLockExpired)
			assert.ErrorIs(t, err, own)
		}
		for _, own := range []error{nil, context.Canceled, ErrLockExpired} { // they say nothing more
			refuses(t, ErrLockExpired, lose(own))
		}
	}},
	{"hold-panics", "Hold unlocks when fn panics", func(t *testing.T, dial func() Store) {
		s := dial()
		l := mustLock(t, s, "l", time.Minute)
		assert.PanicsWithValue(t, "oops", func() {
			_ = Hold(context.Background(), l, time.Minute, func(context.Context, uint64) error { panic("oops") })
		})
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
	}},
	{"hold-nested", "an inner lock is not lost because the outer one is", func(t *testing.T, dial func() Store) {
		s := dial()
		own := errors.New("its own")
		var err error
		withLongerTTL(t, 300*time.Millisecond, func(ttl time.Duration) (called bool) {
			outer := mustLock(t, s, fmt.Sprint("outer.", ttl), ttl)
			err = Hold(context.Background(), limit(outer, 1), ttl, func(ctx context.Context, _ uint64) error {
				inner := mustLock(t, s, "inner", time.Minute)
				err := Hold(ctx, inner, time.Minute, func(ctx context.Context, _ uint64) error {
					called = true
					<-ctx.Done()
					refuses(t, ErrLockExpired, context.Cause(ctx))
					return nil
				})
				if !called {
					return err
				}
				require.NoError(t, err)
				again := mustLock(t, s, "inner", time.Minute)
				refuses(t, own, Hold(context.WithoutCancel(ctx), again, time.Minute, func(context.Context, uint64) error { return own }))
				return own
			})
			return called
		})
		assert.ErrorIs(t, err, ErrLockExpired)
		assert.ErrorIs(t, err, own)
	}},
}
