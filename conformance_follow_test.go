package state

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A followed is what the reader of a Follow makes of it: the entries, with each
// change applied to them in turn.
type followed struct {
	entries map[string]*KeyValue
	latest  map[string]uint64 // the highest revision reported of each key
	changes <-chan *KeyValue
}

func mustFollow(t *testing.T, ctx context.Context, s Store, pattern string) *followed {
	t.Helper()
	current, changes, err := Follow(ctx, s, pattern)
	require.NoError(t, err)
	require.True(t, slices.IsSortedFunc(current, compareKeys), "sorted by key")
	f := &followed{map[string]*KeyValue{}, map[string]uint64{}, changes}
	for _, kv := range current {
		require.Equal(t, OpPut, kv.Operation)
		require.NotContains(t, f.entries, kv.Key, "once")
		require.True(t, MatchPattern(pattern, kv.Key))
		f.entries[kv.Key], f.latest[kv.Key] = kv, kv.Revision
	}
	return f
}

func compareKeys(x, y *KeyValue) int { return strings.Compare(x.Key, y.Key) }

// next returns the next change, which must come, and applies it.
func (f *followed) next(t *testing.T) *KeyValue {
	t.Helper()
	kv := receive(t, f.changes)
	f.apply(t, kv)
	return kv
}

func (f *followed) apply(t *testing.T, kv *KeyValue) {
	t.Helper()
	latest := f.latest[kv.Key]
	if kv.Operation == OpPut {
		require.Greater(t, kv.Revision, latest, "%s is old", brief(kv))
		f.entries[kv.Key] = kv
	} else {
		require.GreaterOrEqual(t, kv.Revision, latest, "%s is old", brief(kv))
		require.Contains(t, f.entries, kv.Key, "a deletion of what was not reported")
		require.Nil(t, kv.Value)
		require.True(t, kv.Created.IsZero())
		require.True(t, kv.Expires.IsZero())
		delete(f.entries, kv.Key)
	}
	f.latest[kv.Key] = kv.Revision
}

// agrees applies changes until the entries are what the store holds.
func (f *followed) agrees(t *testing.T, s Store, pattern string) {
	t.Helper()
	var want, got []*KeyValue
	same := func() bool {
		for {
			select {
			case kv, ok := <-f.changes:
				require.True(t, ok, "the channel was closed")
				f.apply(t, kv)
				continue
			case <-time.After(5 * time.Millisecond): // none comes now
			}
			break
		}
		want = mustEntries(t, s, pattern)
		got = slices.SortedFunc(maps.Values(f.entries), compareKeys)
		return sameEntries(want, got)
	}
	for end := time.Now().Add(20 * time.Second); !same(); {
		if time.Now().After(end) {
			require.Equal(t, want, got, "what was reported does not add up to what the store holds")
		}
	}
}

func sameEntries(x, y []*KeyValue) bool {
	return slices.EqualFunc(x, y, func(a, b *KeyValue) bool {
		return a.Key == b.Key && a.Revision == b.Revision && string(a.Value) == string(b.Value) &&
			a.Created.Equal(b.Created) && a.Modified.Equal(b.Modified) && a.Expires.Equal(b.Expires)
	})
}

// churn has each of some clients put, delete and let expire keys with a prefix
// until stop is called.
func churn(t *testing.T, prefix string, keys int, clients ...Store) (stop func()) {
	var quit atomic.Bool
	var wg sync.WaitGroup
	for w, s := range clients {
		wg.Go(func() {
			for i := w; !quit.Load(); i += len(clients) + 1 {
				key := fmt.Sprintf("%s%d", prefix, i*7%keys)
				switch i % 5 {
				case 0:
					assert.NoError(t, s.Delete(key))
				case 1:
					assert.NoError(t, s.Put(key, fmt.Append(nil, i), time.Duration(1+i%40)*5*time.Millisecond))
				default:
					assert.NoError(t, s.Put(key, fmt.Append(nil, i), 0))
				}
				time.Sleep(500 * time.Microsecond)
			}
		})
	}
	return sync.OnceFunc(func() { quit.Store(true); wg.Wait() })
}

var followCases = []conformanceCase{
	{"follow", "Follow returns the entries that match, sorted by key, and then every later change without a gap", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for _, key := range []string{"k.c", "k.a", "other", "k.b", "k"} {
			require.NoError(t, a.Put(key, []byte(key), 0))
		}
		require.NoError(t, a.Put("k.t", []byte("x"), time.Hour))
		require.NoError(t, a.Put("k.gone", nil, 0))
		require.NoError(t, a.Delete("k.gone"))
		current, changes, err := Follow(t.Context(), b, "k.*")
		require.NoError(t, err)
		assert.Equal(t, []string{"k.a", "k.b", "k.c", "k.t"}, keysOf(current))
		for _, kv := range current {
			assert.Equal(t, mustGet(t, a, kv.Key), kv)
		}
		require.NoError(t, a.Put("k.a", []byte("2"), time.Minute))
		assert.Equal(t, mustGet(t, a, "k.a"), receive(t, changes))
		require.NoError(t, a.Put("other", nil, 0))
		require.NoError(t, b.Put("k.new", []byte("new"), 0))
		assert.Equal(t, mustGet(t, a, "k.new"), receive(t, changes))
		before := mustGet(t, a, "k.b").Revision
		require.NoError(t, a.Delete("k.b"))
		kv := receive(t, changes)
		assert.Equal(t, "delete k.b", brief(kv))
		assert.Greater(t, kv.Revision, before)
		assert.Nil(t, kv.Value)
		deliversNext(t, a, changes, "k.end")

		current, _, err = Follow(t.Context(), b, "k.nothing.*")
		require.NoError(t, err)
		assert.NotNil(t, current)
		assert.Empty(t, current)
	}},
	{"follow-one-key", "Follow follows a single key as well, whether it exists or not", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		f := mustFollow(t, t.Context(), b, "k")
		require.Empty(t, f.entries)
		require.NoError(t, a.Put("k", []byte("1"), 0))
		require.NoError(t, a.Put("k.not", []byte("1"), 0))
		require.Equal(t, "put k", brief(f.next(t)))
		again := mustFollow(t, t.Context(), b, "k")
		require.Len(t, again.entries, 1)
		require.NoError(t, a.Delete("k"))
		require.Equal(t, "delete k", brief(f.next(t)))
		require.Equal(t, "delete k", brief(again.next(t)))
	}},
	{"follow-expiry", "an expiry is delivered although it has the revision of the value that was reported", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k.1", nil, 5*time.Second))
		f := mustFollow(t, t.Context(), b, "k.*")
		old := f.entries["k.1"]
		require.NotNil(t, old)
		require.NoError(t, a.Put("k.2", nil, 300*time.Millisecond))
		put := f.next(t)
		require.Equal(t, "put k.2", brief(put))
		for _, value := range []*KeyValue{put, old} {
			kv := f.next(t)
			assert.Equal(t, "delete "+value.Key, brief(kv))
			assert.Equal(t, value.Revision, kv.Revision)
			assert.True(t, kv.Modified.Equal(value.Expires), "its time is the deadline")
			// A key that was made again after its expiry is new.
			eventually(t, func() bool { _, err := a.Get(value.Key); return err != nil }, "expiry")
			require.NoError(t, a.Put(value.Key, []byte("again"), 0))
			require.Equal(t, "put "+value.Key, brief(f.next(t)))
		}
		f.agrees(t, a, "k.*")
	}},
	{"follow-errors", "Follow returns ErrInvalidKey, ErrClosed, or an error that wraps the context's", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, p := range badPatterns {
			current, changes, err := Follow(t.Context(), s, p)
			refuses(t, ErrInvalidKey, err, p)
			assert.Nil(t, current)
			assert.Nil(t, changes)
			_, err = NewCache(t.Context(), s, p)
			refuses(t, ErrInvalidKey, err, p)
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _, err := Follow(ctx, s, "k.*")
		assert.ErrorIs(t, err, context.Canceled)
		_, err = NewCache(ctx, s, "k.*")
		assert.ErrorIs(t, err, context.Canceled)
		require.NoError(t, s.Close())
		_, _, err = Follow(context.Background(), s, "k.*")
		refuses(t, ErrClosed, err)
		_, err = NewCache(context.Background(), s, "k.*")
		refuses(t, ErrClosed, err)
	}},
	{"follow-ends", "the channel is closed when ctx ends or the store is closed, and not with another Follow or client", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		ctx, cancel := context.WithCancel(context.Background())
		ends := mustFollow(t, ctx, b, "k.*")
		unread := mustFollow(t, ctx, b, "k.*")
		other := mustFollow(t, context.Background(), b, "k.*")
		mine := mustFollow(t, t.Context(), a, "k.*")
		require.NoError(t, a.Put("k.1", nil, 0))
		require.Equal(t, "put k.1", brief(ends.next(t)))
		cancel()
		ended(t, ends.changes)
		ended(t, unread.changes)
		require.Equal(t, "put k.1", brief(other.next(t)))
		require.NoError(t, a.Put("k.2", nil, 0))
		require.Equal(t, "put k.2", brief(other.next(t)))
		require.NoError(t, b.Close())
		ended(t, other.changes)
		require.NoError(t, a.Put("k.3", nil, 0))
		for i := range 3 {
			require.Equal(t, fmt.Sprintf("put k.%d", i+1), brief(mine.next(t)))
		}
	}},
	{"follow-own-bytes", "the entries and the events are the caller's own", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k.1", []byte("value"), 0))
		f, g := mustFollow(t, t.Context(), s, "k.*"), mustFollow(t, t.Context(), s, "k.*")
		f.entries["k.1"].Value[0] = 'X'
		f.entries["k.1"].Key = "X"
		assert.Equal(t, "value", string(g.entries["k.1"].Value))
		assert.Equal(t, "k.1", g.entries["k.1"].Key)
		require.NoError(t, s.Put("k.2", []byte("value"), 0))
		receive(t, f.changes).Value[0] = 'X'
		assert.Equal(t, "value", string(receive(t, g.changes).Value))
		assert.Equal(t, "value", string(mustGet(t, s, "k.2").Value))
		assert.Equal(t, "value", string(mustGet(t, s, "k.1").Value))
	}},
	{"follow-slow-reader", "a slow reader blocks nobody, and gets the last state of every key; memory is bounded by the number of keys that changed", func(t *testing.T, dial func() Store) {
		s := dial()
		slow, quick := mustFollow(t, t.Context(), s, "k.*"), mustFollow(t, t.Context(), s, "k.*")
		const puts, keys = 2000, 10
		for i := range puts {
			require.NoError(t, s.Put(fmt.Sprintf("k.%d", i%keys), fmt.Append(nil, i), 0))
		}
		require.NoError(t, s.Delete("k.0"))
		require.NoError(t, s.Put("k.last", nil, 0))
		for quick.entries["k.last"] == nil {
			quick.next(t)
		}
		time.Sleep(500 * time.Millisecond) // so that all is waiting
		n := 0
		for ; slow.entries["k.last"] == nil; n++ {
			slow.next(t)
		}
		assert.LessOrEqual(t, n, maxWaiting+2*keys+2)
		slow.agrees(t, s, "k.*")
	}},
	{"follow-around-the-start", "beside writers, deletions and expiries, the entries and the changes add up to exactly what the store holds, and nothing old comes after something newer", func(t *testing.T, dial func() Store) {
		const keys = 40
		reader, other := dial(), dial()
		stop := churn(t, "k.", keys, dial(), dial(), dial())
		defer stop()
		var all []*followed
		for i := range 12 {
			s := []Store{reader, other}[i%2]
			all = append(all, mustFollow(t, t.Context(), s, "k.*"))
			for range 20 {
				all[i/2].next(t) // while others start
			}
		}
		all = append(all, mustFollow(t, t.Context(), reader, "k.1*"), mustFollow(t, t.Context(), other, "k.7"))
		time.Sleep(50 * time.Millisecond)
		stop()
		for i, f := range all {
			pattern := "k.*"
			switch i {
			case 12:
				pattern = "k.1*"
			case 13:
				pattern = "k.7"
			}
			f.agrees(t, other, pattern)
		}
	}},
	{"follow-deaths", "nobody's death is missed", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		const n = 100
		f := mustFollow(t, t.Context(), b, "k.*")
		var late *followed
		for i := range n {
			require.NoError(t, a.Put(fmt.Sprintf("k.%d", i), nil, time.Duration(4000+i)*time.Millisecond))
			if i == n/2 {
				late = mustFollow(t, t.Context(), b, "k.*")
			}
		}
		for _, f := range []*followed{f, late} {
			expected := n
			if f == late {
				expected = len(f.entries) + n - 1 - n/2 // some may be dead by then
			}
			for died := 0; died < expected; {
				if f.next(t).Operation == OpDelete {
					died++
				}
			}
			require.Empty(t, f.entries)
		}
		deliversNext(t, a, f.changes, "k.end")
	}},
}

func mustCache(t *testing.T, s Store, pattern string) *Cache {
	t.Helper()
	c, err := NewCache(t.Context(), s, pattern)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

var cacheCases = []conformanceCase{
	{"cache", "Get, GetKeyValue, Keys and Entries of a Cache are those of the store", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for _, key := range []string{"k.c", "k.a", "other", "k.b.1", "k.b.2", "k"} {
			require.NoError(t, a.Put(key, []byte(key), 0))
		}
		require.NoError(t, a.Put("k.t", nil, time.Hour))
		c := mustCache(t, b, "k.*")
		same := func() {
			t.Helper()
			for _, pattern := range []string{"k.*", "k.b.*", "k.b*", "k.a", "k.nothing*", "k.b.1"} {
				keys, err := a.Keys(pattern)
				require.NoError(t, err)
				cached, err := c.Keys(pattern)
				require.NoError(t, err)
				assert.Equal(t, keys, cached, pattern)
				entries, err := c.Entries(pattern)
				require.NoError(t, err)
				assert.NotNil(t, entries)
				assert.True(t, sameEntries(mustEntries(t, a, pattern), entries), pattern)
			}
			for _, key := range []string{"k.a", "k.c", "k.b.1", "k.t", "k.missing"} {
				value, err := a.Get(key)
				cached, cachedErr := c.Get(key)
				assert.Equal(t, value, cached, key)
				assert.Equal(t, err, cachedErr, key)
				kv, err := a.GetKeyValue(key)
				cachedKV, cachedErr := c.GetKeyValue(key)
				assert.Equal(t, kv, cachedKV, key)
				assert.Equal(t, err, cachedErr, key)
			}
		}
		same()
		revision, err := a.Update("k.a", []byte("2"), 0, mustGet(t, a, "k.a").Revision)
		require.NoError(t, err)
		require.NoError(t, a.Delete("k.c"))
		require.NoError(t, c.Wait(t.Context(), revision))
		last, err := a.Update("k.new", nil, 0, 0)
		require.NoError(t, err)
		require.NoError(t, c.Wait(t.Context(), last))
		same()
	}},
	{"cache-invalid-keys", "a key or pattern outside the cache's own is ErrInvalidKey, a missing key ErrNotFound", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("other", nil, 0))
		c := mustCache(t, s, "k.*")
		for _, key := range append([]string{"other", "k", "kk"}, badKeys...) {
			_, err := c.Get(key)
			refuses(t, ErrInvalidKey, err, key)
			_, err = c.GetKeyValue(key)
			refuses(t, ErrInvalidKey, err, key)
		}
		for _, pattern := range append([]string{"other", "*", "k*", "k", "o*", "kk.*"}, badPatterns...) {
			_, err := c.Keys(pattern)
			refuses(t, ErrInvalidKey, err, pattern)
			_, err = c.Entries(pattern)
			refuses(t, ErrInvalidKey, err, pattern)
		}
		for _, pattern := range []string{"k.*", "k.a*", "k.a", "k.a.*"} {
			keys, err := c.Keys(pattern)
			require.NoError(t, err, pattern)
			assert.Empty(t, keys)
			assert.NotNil(t, keys)
		}
		_, err := c.Get("k.missing")
		refuses(t, ErrNotFound, err)
		one := mustCache(t, s, "other")
		value, err := one.Get("other")
		require.NoError(t, err)
		assert.Equal(t, []byte{}, value, "empty and not nil")
		_, err = one.Keys("other*")
		refuses(t, ErrInvalidKey, err)
	}},
	{"cache-own-bytes", "what a Cache returns is the caller's own", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k.1", []byte("value"), 0))
		c := mustCache(t, s, "k.*")
		value, err := c.Get("k.1")
		require.NoError(t, err)
		value[0] = 'X'
		kv, err := c.GetKeyValue("k.1")
		require.NoError(t, err)
		assert.Equal(t, "value", string(kv.Value))
		kv.Value[0], kv.Key = 'X', "X"
		entries, err := c.Entries("k.*")
		require.NoError(t, err)
		assert.Equal(t, "value", string(entries[0].Value))
		assert.Equal(t, "k.1", entries[0].Key)
		entries[0].Value[0], entries[0].Revision = 'X', 0
		kv, err = c.GetKeyValue("k.1")
		require.NoError(t, err)
		assert.Equal(t, mustGet(t, s, "k.1"), kv)
	}},
	{"cache-expiry", "an expiry arrives in the cache", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k.1", nil, 5*time.Second))
		c := mustCache(t, b, "k.*")
		require.NoError(t, a.Put("k.2", nil, 4*time.Second))
		for _, key := range []string{"k.1", "k.2"} {
			eventually(t, func() bool { _, err := c.Get(key); return err == nil }, "the put arrives")
		}
		for _, key := range []string{"k.2", "k.1"} {
			eventually(t, func() bool { _, err := c.Get(key); return err == ErrNotFound }, "the expiry arrives") //nolint:errorlint // bare
		}
	}},
	{"cache-wait", "Wait waits until the cache has a change, the caller's own or another's", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		c := mustCache(t, b, "k.*")
		for i, s := range []Store{a, b, a, b, a, b} {
			for n := range 10 {
				key := fmt.Sprintf("k.%d.%d", i, n%3)
				revision, err := s.Update(key, fmt.Append(nil, n), 0, latest(t, s, key))
				require.NoError(t, err)
				require.NoError(t, c.Wait(t.Context(), revision))
				kv, err := c.GetKeyValue(key)
				require.NoError(t, err)
				require.Equal(t, revision, kv.Revision)
				require.NoError(t, c.Wait(t.Context(), revision), "it has it already")
			}
		}
		require.NoError(t, c.Wait(t.Context(), 0))
	}},
	{"cache-wait-replaced", "Wait returns although the change was replaced, deleted, or of another key", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		c := mustCache(t, b, "k.*")
		revision, err := a.Update("k.1", nil, 0, 0)
		require.NoError(t, err)
		require.NoError(t, a.Delete("k.1"))
		for i := range 600 {
			require.NoError(t, a.Put("k.2", fmt.Append(nil, i), 0))
		}
		require.NoError(t, c.Wait(t.Context(), revision))
		require.NoError(t, c.Wait(t.Context(), mustGet(t, a, "k.2").Revision))
		value, err := c.Get("k.2")
		require.NoError(t, err)
		assert.Equal(t, "599", string(value))
		// The newest change of all is one that is gone.
		revision, err = a.Update("k.3", nil, 0, 0)
		require.NoError(t, err)
		require.NoError(t, a.DeleteRevision("k.3", revision))
		require.NoError(t, c.Wait(t.Context(), revision))
		other, err := a.Update("other", nil, 0, 0)
		require.NoError(t, err)
		require.NoError(t, a.Put("k.4", nil, 0))
		require.NoError(t, c.Wait(t.Context(), other))
	}},
	{"cache-wait-future", "Wait for a revision that has not been written ends with the write, or with ctx, or with the cache", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k.1", nil, 0))
		c := mustCache(t, b, "k.*")
		const never = 1_000_000_000_000
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		assert.ErrorIs(t, c.Wait(ctx, never), context.DeadlineExceeded)
		waits := make(chan error, 2)
		revision := mustGet(t, a, "k.1").Revision
		future := revision + 20
		go func() { waits <- c.Wait(t.Context(), future) }()
		time.Sleep(10 * time.Millisecond)
		last := revision // of this key, up to the future; others may write, too
		for revision < future {
			var err error
			revision, err = a.Update("k.1", nil, 0, revision)
			require.NoError(t, err)
			if revision <= future {
				last = revision
			}
		}
		require.NoError(t, <-waits)
		kv, err := c.GetKeyValue("k.1")
		require.NoError(t, err)
		assert.GreaterOrEqual(t, kv.Revision, last)
		go func() { waits <- c.Wait(t.Context(), never) }()
		time.Sleep(10 * time.Millisecond)
		require.NoError(t, c.Close())
		refuses(t, ErrClosed, <-waits)
	}},
	{"cache-as-of", "every change that was acknowledged before AsOf is in the cache; AsOf advances, and is about two seconds ago at most", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		began := time.Now()
		c := mustCache(t, b, "k.*")
		require.False(t, c.AsOf().Before(began.Add(-time.Millisecond)), "NewCache returns once the cache is complete")
		stop := churn(t, "k.beside.", 10, dial())
		defer stop()
		last, freshest := c.AsOf(), time.Hour
		for i := range 4 {
			for n := range 20 {
				require.NoError(t, a.Put(fmt.Sprintf("k.%d", n), fmt.Append(nil, i), 0))
			}
			if i > 0 {
				require.NoError(t, a.Delete(fmt.Sprintf("k.gone.%d", i-1)))
			}
			require.NoError(t, a.Put(fmt.Sprintf("k.gone.%d", i), nil, 0))
			acknowledged := time.Now()
			oldest := time.Duration(0)
			eventually(t, func() bool {
				asOf := c.AsOf()
				assert.False(t, asOf.Before(last), "it goes back")
				oldest = max(oldest, time.Since(asOf))
				last = asOf
				return asOf.After(acknowledged)
			}, "AsOf advances")
			freshest = min(freshest, oldest)
			for n := range 20 {
				value, err := c.Get(fmt.Sprintf("k.%d", n))
				require.NoError(t, err)
				require.Equal(t, fmt.Sprint(i), string(value))
			}
			gone, err := c.Keys("k.gone.*")
			require.NoError(t, err)
			require.Equal(t, []string{fmt.Sprintf("k.gone.%d", i)}, gone)
		}
		assert.Less(t, freshest, 4*time.Second, "in the best round; on a busy machine it is older now and then")
	}},
	{"cache-adds-up", "beside writers, deletions and expiries the cache comes to exactly what the store holds", func(t *testing.T, dial func() Store) {
		reader := dial()
		stop := churn(t, "k.", 40, dial(), dial())
		defer stop()
		var all []*Cache
		for range 5 {
			all = append(all, mustCache(t, reader, "k.*"))
			time.Sleep(10 * time.Millisecond)
		}
		// No key goes back to an older revision, whoever reads.
		var readers sync.WaitGroup
		for _, c := range all {
			readers.Go(func() {
				seen := map[string]uint64{}
				for range 20 {
					entries, err := c.Entries("k.*")
					if assert.NoError(t, err) {
						for _, kv := range entries {
							assert.GreaterOrEqual(t, kv.Revision, seen[kv.Key])
							seen[kv.Key] = kv.Revision
						}
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		readers.Wait()
		stop()
		for _, c := range all {
			eventually(t, func() bool {
				entries, err := c.Entries("k.*")
				require.NoError(t, err)
				return sameEntries(mustEntries(t, reader, "k.*"), entries)
			}, "the cache agrees with the store")
		}
	}},
	{"cache-close", "after Close, after the end of ctx and after the store is closed every read is ErrClosed; Close leaves the store open", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k.1", nil, 0))
		ctx, cancel := context.WithCancel(context.Background())
		closes, cancelled, bereft := mustCache(t, s, "k.*"), (*Cache)(nil), mustCache(t, s, "k.*")
		cancelled, err := NewCache(ctx, s, "k.*")
		require.NoError(t, err)
		isClosed := func(c *Cache) {
			t.Helper()
			eventually(t, func() bool { _, err := c.Get("k.1"); return err != nil }, "it ends")
			_, err := c.Get("k.1")
			refuses(t, ErrClosed, err)
			_, err = c.GetKeyValue("k.1")
			refuses(t, ErrClosed, err)
			_, err = c.Keys("k.*")
			refuses(t, ErrClosed, err)
			_, err = c.Entries("k.*")
			refuses(t, ErrClosed, err)
			refuses(t, ErrClosed, c.Wait(context.Background(), 1_000_000_000_000))
			require.NoError(t, c.Close())
			require.NoError(t, c.Close(), "once more")
		}
		require.NoError(t, closes.Close())
		_, err = closes.Get("k.1")
		refuses(t, ErrClosed, err)
		isClosed(closes)
		cancel()
		isClosed(cancelled)
		_, err = bereft.Get("k.1")
		require.NoError(t, err)
		require.NoError(t, s.Put("k.1", nil, 0))
		require.NoError(t, s.Close())
		isClosed(bereft)
	}},
	{"cache-readers", "reads of a Cache do not block each other, and wait for nobody", func(t *testing.T, dial func() Store) {
		s := dial()
		require.NoError(t, s.Put("k.1", []byte("v"), 0))
		c := mustCache(t, s, "k.*")
		c.mu.Lock() // as while a change is being taken over
		defer c.mu.Unlock()
		var readers sync.WaitGroup
		for range 8 {
			readers.Go(func() {
				for range 100 {
					_, err := c.Get("k.1")
					assert.NoError(t, err)
					_, err = c.GetKeyValue("k.1")
					assert.NoError(t, err)
					_, err = c.Keys("k.*")
					assert.NoError(t, err)
					_, err = c.Entries("k.*")
					assert.NoError(t, err)
				}
			})
		}
		readers.Wait()
	}},
}

// latest returns a key's revision, 0 if it does not exist.
func latest(t *testing.T, s Store, key string) uint64 {
	t.Helper()
	kv, err := s.GetKeyValue(key)
	if err == ErrNotFound { //nolint:errorlint // bare
		return 0
	}
	require.NoError(t, err)
	return kv.Revision
}

// TestCacheAllocations: a read by the million costs the copy of the value that
// the caller gets, and no more.
func TestCacheAllocations(t *testing.T) {
	withoutRace(t)
	s := NewMemoryStore()
	defer s.Close()
	require.NoError(t, s.Put("config.limits", make([]byte, 100), 0))
	c := mustCache(t, s, "config.*")
	key := fmt.Sprint("config", ".limits")
	assert.Equal(t, 1.0, testing.AllocsPerRun(1000, func() {
		if _, err := c.Get(key); err != nil {
			t.Error(err)
		}
	}), "Get")
	assert.Equal(t, 2.0, testing.AllocsPerRun(1000, func() {
		if _, err := c.GetKeyValue(key); err != nil {
			t.Error(err)
		}
	}), "GetKeyValue")
}
