package state

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func mustEntries(t *testing.T, s Store, pattern string) []*KeyValue {
	t.Helper()
	entries, err := s.Entries(pattern)
	require.NoError(t, err)
	return entries
}

func keysOf(entries []*KeyValue) []string {
	keys := []string{}
	for _, kv := range entries {
		keys = append(keys, kv.Key)
	}
	return keys
}

var entriesCases = []conformanceCase{
	{"entries", "Entries returns the entries of all keys matching a pattern, once, sorted, as GetKeyValue would return them", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		assert.NotNil(t, mustEntries(t, a, "*"))
		assert.Empty(t, mustEntries(t, a, "*"))
		all := []string{"conf", "config", "config.a", "config.a.b", "config.b", "configs", "other"}
		for i, key := range all {
			require.NoError(t, a.Put(all[len(all)-1-i], nil, 0))
			require.NoError(t, b.Put(key, fmt.Append(nil, "value of ", key), time.Duration(i%2)*time.Hour))
		}
		require.NoError(t, a.Put("config.a", nil, 0)) // an empty value
		for _, pattern := range []string{"*", "config.*", "config*", "config", "config.a*", "config.a.b.*", "nothing", "nothing.*"} {
			entries := mustEntries(t, b, pattern)
			want := slices.DeleteFunc(slices.Clone(all), func(key string) bool { return !MatchPattern(pattern, key) })
			require.Equal(t, append([]string{}, want...), keysOf(entries), pattern)
			for _, kv := range entries {
				require.Equal(t, mustGet(t, a, kv.Key), kv, pattern)
				require.NotNil(t, kv.Value)
			}
		}
	}},
	{"entries-without-the-gone", "deleted and expired keys are not among the entries; those made again are", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for i := range 40 {
			require.NoError(t, a.Put(fmt.Sprintf("k.%02d", i), nil, 0))
		}
		mustEntries(t, b, "*")
		want := []string{}
		for i := range 40 {
			key := fmt.Sprintf("k.%02d", i)
			switch i % 4 {
			case 0:
				require.NoError(t, a.Delete(key))
			case 1:
				require.NoError(t, a.Put(key, nil, time.Millisecond))
			case 2:
				require.NoError(t, b.Delete(key))
				require.NoError(t, a.Put(key, nil, 0))
				want = append(want, key)
			default:
				want = append(want, key)
			}
		}
		time.Sleep(20 * time.Millisecond)
		assert.Equal(t, want, keysOf(mustEntries(t, b, "*")))
		assert.Equal(t, want, keysOf(mustEntries(t, a, "k.*")))
	}},
	{"entries-are-copies", "the entries are the caller's own", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k", []byte("hello"), 0))
		for _, pattern := range []string{"k", "*"} {
			first, second := mustEntries(t, s, pattern), mustEntries(t, s, pattern)
			require.NoError(t, s.Put("k", []byte("HELLO"), 0)) // it may be replaced in place
			require.Equal(t, "hello", string(first[0].Value))
			copy(first[0].Value, "xxxxx")
			require.Equal(t, "hello", string(second[0].Value))
			require.Equal(t, "HELLO", string(mustGet(t, s, "k").Value))
			require.NoError(t, s.Put("k", []byte("hello"), 0))
		}
	}},
	{"entries-under-writers", "every key that exists throughout the call is among the entries, once, and complete: a key whose last change is not newer than the newest revision returned is there", func(t *testing.T, dial func() Store) {
		const n = 100
		reader := dial()
		for i := range n {
			require.NoError(t, reader.Put(fmt.Sprintf("k.%03d", i), []byte("value 0"), 0))
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		var mu sync.Mutex
		created := map[string]uint64{}
		for w := range 3 {
			s := dial()
			wg.Go(func() {
				for i := 0; !stop.Load(); i++ {
					assert.NoError(t, s.Put(fmt.Sprintf("k.%03d", (w+i*7)%n), fmt.Append(nil, "value ", i), 0))
					if i%10 == 0 && i < 500 {
						key := fmt.Sprintf("new.%d.%d", w, i)
						revision, err := s.Update(key, []byte("value"), 0, 0)
						assert.NoError(t, err)
						mu.Lock()
						created[key] = revision
						mu.Unlock()
					}
					time.Sleep(time.Microsecond)
				}
			})
		}
		for range 20 {
			mu.Lock()
			before := len(created)
			mu.Unlock()
			entries := mustEntries(t, reader, "*")
			keys := keysOf(entries)
			require.True(t, slices.IsSorted(keys))
			require.Len(t, slices.Compact(slices.Clone(keys)), len(keys))
			require.GreaterOrEqual(t, len(keys), n+before)
			newest := uint64(0)
			for _, kv := range entries {
				require.Contains(t, string(kv.Value), "value")
				newest = max(newest, kv.Revision)
			}
			mu.Lock()
			for key, revision := range created {
				if _, there := slices.BinarySearch(keys, key); revision <= newest {
					require.True(t, there, "%s of revision %d, among entries up to %d", key, revision, newest)
				}
			}
			mu.Unlock()
		}
		stop.Store(true)
		wg.Wait()
	}},
}

var storeCases = []conformanceCase{
	{"delete-revision", "DeleteRevision deletes the key only if its current revision is the given one, else it is ErrConflict", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		refuses(t, ErrConflict, a.DeleteRevision("k", 1), "a key that does not exist")
		refuses(t, ErrConflict, a.DeleteRevision("k", 0), "a key that does not exist")
		first, err := a.Update("k", []byte("1"), 0, 0)
		require.NoError(t, err)
		second, err := b.Update("k", []byte("2"), 0, first)
		require.NoError(t, err)
		events := mustWatch(t, b, "*")
		for _, s := range []Store{a, b} {
			for _, revision := range []uint64{0, first, second + 1, 1 << 40} {
				refuses(t, ErrConflict, s.DeleteRevision("k", revision), revision)
			}
		}
		require.Equal(t, second, mustGet(t, a, "k").Revision)
		require.NoError(t, a.DeleteRevision("k", second))
		deleted := receive(t, events)
		assert.Equal(t, "delete k", brief(deleted), "and nothing came of the others")
		assert.Greater(t, deleted.Revision, second)
		_, err = b.Get("k")
		refuses(t, ErrNotFound, err)
		for _, revision := range []uint64{second, deleted.Revision} {
			refuses(t, ErrConflict, a.DeleteRevision("k", revision), "a deleted key")
			refuses(t, ErrConflict, b.DeleteRevision("k", revision), "a deleted key")
		}
		third, err := b.Update("k", []byte("3"), 50*time.Millisecond, 0)
		require.NoError(t, err)
		assert.Equal(t, third, receive(t, events).Revision)
		assert.Equal(t, "delete k", brief(receive(t, events)))
		for _, s := range []Store{a, b} { // each may see it a round trip late
			eventually(t, func() bool { _, err := s.Get("k"); return err != nil }, "expiry")
			refuses(t, ErrConflict, s.DeleteRevision("k", third), "an expired key")
		}
		deliversNext(t, a, events, "k")
	}},
	{"delete-revision-race", "of several that delete one revision, and one that replaces it, one wins", func(t *testing.T, dial func() Store) {
		clients := []Store{dial(), dial(), dial()}
		for i := range 10 {
			key := fmt.Sprintf("k.%d", i)
			revision, err := clients[0].Update(key, nil, 0, 0)
			require.NoError(t, err)
			var won atomic.Int32
			var wg sync.WaitGroup
			for n, s := range clients {
				wg.Go(func() {
					var err error
					if n == 0 {
						_, err = s.Update(key, nil, 0, revision)
					} else {
						err = s.DeleteRevision(key, revision)
					}
					if err == nil {
						won.Add(1)
					} else {
						refuses(t, ErrConflict, err)
					}
				})
			}
			wg.Wait()
			require.EqualValues(t, 1, won.Load())
		}
	}},
	{"expires", "Expires is the deadline by the store's clock; zero means never, and in an OpDelete", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "*")
		for i, ttl := range []time.Duration{0, time.Hour, 90*time.Minute + time.Nanosecond, 90*time.Second + 500*time.Millisecond, 0, time.Minute} {
			require.NoError(t, a.Put("k", fmt.Append(nil, i), ttl))
			kv := mustGet(t, b, "k")
			if ttl == 0 {
				require.True(t, kv.Expires.IsZero())
			} else {
				require.True(t, kv.Expires.Equal(kv.Modified.Add(ttl)), "%v after %v", kv.Expires, kv.Modified)
			}
			require.Equal(t, kv, receive(t, events))
			require.Equal(t, kv, mustGet(t, a, "k"))
			require.Equal(t, []*KeyValue{kv}, mustEntries(t, a, "*"))
		}
		require.NoError(t, b.Delete("k"))
		deleted := receive(t, events)
		assert.Equal(t, "delete k", brief(deleted))
		assert.True(t, deleted.Expires.IsZero())
		require.NoError(t, a.Put("short", nil, 50*time.Millisecond))
		put, expired := receive(t, events), receive(t, events)
		assert.Equal(t, "delete short", brief(expired))
		assert.True(t, expired.Expires.IsZero())
		assert.True(t, expired.Modified.Equal(put.Expires))
	}},
	{"unconditional", "Put and Delete never fail because others write the same key", func(t *testing.T, dial func() Store) {
		const writers, each = 6, 30
		var wg sync.WaitGroup
		for w := range writers {
			s := dial()
			wg.Go(func() {
				for i := range each {
					assert.NoError(t, s.Put("k", fmt.Append(nil, w), time.Duration(i%2)*time.Minute))
					if i%3 == w%3 {
						assert.NoError(t, s.Delete("k"))
					}
					if _, err := s.Update("k", []byte("x"), 0, uint64(i)); err != nil {
						refuses(t, ErrConflict, err)
					}
				}
			})
		}
		wg.Wait()
	}},
	{"lock-holder", "LockHolder returns who holds a lock, or ErrNotFound if nobody does", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		_, err := b.LockHolder("l")
		refuses(t, ErrNotFound, err)
		require.NoError(t, a.Put("l", nil, 0)) // a key is no lock
		_, err = b.LockHolder("l")
		refuses(t, ErrNotFound, err)
		l := mustLock(t, a, "l", time.Hour)
		info, err := b.LockHolder("l")
		require.NoError(t, err)
		assert.Equal(t, "l", info.Key)
		assert.Equal(t, l.(Fenced).Token(), info.Token)
		assert.NotEmpty(t, info.Owner)
		assert.WithinDuration(t, time.Now().Add(time.Hour), info.Expires, time.Minute)
		time.Sleep(5 * time.Millisecond)
		require.NoError(t, l.Refresh())
		refreshed, err := a.LockHolder("l")
		require.NoError(t, err)
		assert.True(t, refreshed.Expires.After(info.Expires))
		assert.Equal(t, info.Token, refreshed.Token)
		assert.Equal(t, info.Owner, refreshed.Owner)
		require.NoError(t, l.Unlock())
		_, err = b.LockHolder("l")
		refuses(t, ErrNotFound, err)
		mustLock(t, b, "l", 50*time.Millisecond)
		eventually(t, func() bool { _, err := a.LockHolder("l"); return err == ErrNotFound }, "the end of the lease")
		next := mustLock(t, b, "l", time.Minute)
		info, err = a.LockHolder("l")
		require.NoError(t, err)
		assert.Equal(t, next.(Fenced).Token(), info.Token)
	}},
}

var contextCases = []conformanceCase{
	{"context-ends-calls", "every call of a bound store fails when its context has ended, with an error that wraps the context's, and writes nothing", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k", []byte("v"), 0))
		before := mustGet(t, s, "k")
		ctx, cancel := context.WithCancel(context.Background())
		bound := s.WithContext(ctx)
		require.NoError(t, bound.Put("other", nil, 0))
		got, err := bound.Get("k")
		require.NoError(t, err)
		assert.Equal(t, "v", string(got))
		cancel()
		deadline, cancel := context.WithDeadline(context.Background(), time.Now().Add(-time.Second))
		defer cancel()
		for want, bound := range map[error]Store{context.Canceled: bound, context.DeadlineExceeded: s.WithContext(deadline)} {
			fails := func(what string, err error) {
				t.Helper()
				assert.ErrorIs(t, err, want, what)
				assert.NotErrorIs(t, err, ErrOutcomeUnknown, what)
			}
			_, err := bound.Get("k")
			fails("Get", err)
			_, err = bound.GetKeyValue("missing")
			fails("GetKeyValue", err)
			fails("Put", bound.Put("k", nil, 0))
			fails("Delete", bound.Delete("k"))
			_, err = bound.Update("k", nil, 0, before.Revision)
			fails("Update", err)
			fails("DeleteRevision", bound.DeleteRevision("k", before.Revision))
			for _, pattern := range []string{"k", "*"} {
				_, err = bound.Keys(pattern)
				fails("Keys", err)
				_, err = bound.Entries(pattern)
				fails("Entries", err)
				_, err = bound.Watch(pattern)
				fails("Watch", err)
			}
			_, err = bound.Lock("l", time.Minute)
			fails("Lock", err)
			_, err = bound.LockHolder("l")
			fails("LockHolder", err)
		}
		assert.Equal(t, before, mustGet(t, s, "k"))
		_, err = s.LockHolder("l")
		refuses(t, ErrNotFound, err)
	}},
	{"context-replaced", "a context takes the place of the one that the store was bound to before, and leaves the store alone", func(t *testing.T, dial func() Store) {
		s := dial()
		ctx, cancel := context.WithCancel(context.Background())
		bound := s.WithContext(ctx)
		events := mustWatch(t, bound.WithContext(context.Background()), "*")
		cancel()
		require.NoError(t, bound.WithContext(context.Background()).Put("k", nil, 0))
		require.NoError(t, s.Put("l", nil, 0))
		assert.Equal(t, "put k", brief(receive(t, events)))
		assert.Equal(t, "put l", brief(receive(t, events)))
	}},
	{"context-none", "a nil context is none", func(t *testing.T, dial func() Store) {
		s := dial()
		var none context.Context
		bound := s.WithContext(none)
		require.NoError(t, bound.Put("k", []byte("v"), 0))
		assert.Equal(t, "v", string(mustGet(t, bound, "k").Value))
		require.NoError(t, mustLock(t, bound, "l", time.Minute).Unlock())
	}},
	{"context-of-a-lock", "the context bounds Lock and Refresh; Unlock works after it has ended", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		ctx, cancel := context.WithCancel(context.Background())
		bound := a.WithContext(ctx)
		l, lapsing := mustLock(t, bound, "l", time.Minute), mustLock(t, bound, "lapsing", 200*time.Millisecond)
		require.NoError(t, l.Refresh())
		cancel()
		assert.ErrorIs(t, l.Refresh(), context.Canceled)
		assert.ErrorIs(t, l.Refresh(), context.Canceled)
		_, err := b.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err)
		require.NoError(t, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Unlock())
		refuses(t, ErrLockNotHeld, l.Refresh())
		require.NoError(t, mustLock(t, b, "l", time.Minute).Unlock())
		time.Sleep(250 * time.Millisecond)
		refuses(t, ErrLockExpired, lapsing.Refresh())
		refuses(t, ErrLockNotHeld, lapsing.Unlock())
		ctx, cancel = context.WithCancel(context.Background())
		l = mustLock(t, a.WithContext(ctx), "l", time.Minute)
		cancel()
		require.NoError(t, a.Close())
		for range 20 {
			refuses(t, ErrClosed, l.Refresh(), "that the store is closed comes first")
		}
	}},
	{"context-close", "Close of a bound store closes the store itself, also after its context has ended", func(t *testing.T, dial func() Store) {
		s, other := dial(), dial()
		events := mustWatch(t, s, "*")
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		require.NoError(t, s.WithContext(ctx).Close())
		ended(t, events)
		_, err := s.Get("k")
		refuses(t, ErrClosed, err)
		_, err = s.WithContext(context.Background()).Get("k")
		refuses(t, ErrClosed, err)
		require.NoError(t, s.Close())
		require.NoError(t, other.Put("k", nil, 0), "another client goes on")
	}},
	{"close-one-client", "the watches and calls of other clients go on after one is closed", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k", []byte("v"), 0))
		of, mine := mustWatch(t, a, "*"), mustWatch(t, b, "*")
		l := mustLock(t, a, "l", time.Minute)
		require.NoError(t, a.Close())
		ended(t, of)
		got, err := b.Get("k")
		require.NoError(t, err)
		assert.Equal(t, "v", string(got))
		deliversNext(t, b, mine, "k")
		_, err = b.Lock("l", time.Minute)
		refuses(t, ErrLockHeld, err)
		require.NoError(t, l.Unlock())
		require.NoError(t, mustLock(t, b, "l", time.Minute).Unlock())
	}},
}
