package state

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var watchCases = []conformanceCase{
	{"watch", "every Put, Delete and expiry of a matching key made after Watch has returned is delivered", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k.before", []byte("x"), 0))
		events := mustWatch(t, b, "k.*")
		require.NoError(t, a.Put("k.1", []byte("one"), 0))
		first := receive(t, events)
		assert.Equal(t, "put k.1", brief(first))
		assert.Equal(t, "one", string(first.Value))
		assert.False(t, first.Modified.Before(first.Created))
		require.NoError(t, a.Put("other", []byte("x"), 0))
		require.NoError(t, a.Put("k.1", []byte("two"), 0))
		second := receive(t, events)
		assert.Equal(t, "two", string(second.Value))
		assert.Greater(t, second.Revision, first.Revision)
		assert.True(t, second.Created.Equal(first.Created))
		require.NoError(t, a.Delete("k.1"))
		third := receive(t, events)
		assert.Equal(t, "delete k.1", brief(third))
		assert.Greater(t, third.Revision, second.Revision)
		assert.Nil(t, third.Value)
		assert.True(t, third.Created.IsZero())
		assert.False(t, third.Modified.Before(second.Modified))
		require.NoError(t, a.Delete("k.before"))
		assert.Equal(t, "delete k.before", brief(receive(t, events)))
		deliversNext(t, a, events, "k.end")
	}},
	{"watch-patterns", "the star matches any rest, dots included and the empty rest too", func(t *testing.T, dial func() Store) {
		s := dial()
		keys := []string{"conf", "config", "config.a", "config.a.b", "config.ab", "other.config.a", "z"}
		watches := map[string]<-chan *KeyValue{}
		for _, p := range []string{"*", "conf*", "config", "config.*", "config.a*", "config.a.*", "nothing.*"} {
			watches[p] = mustWatch(t, s, p)
		}
		delivered := func(what, key string) {
			for p, events := range watches {
				if MatchPattern(p, key) {
					assert.Equal(t, what+" "+key, brief(receive(t, events)), p)
				}
			}
		}
		for _, key := range keys {
			require.NoError(t, s.Put(key, nil, 0))
			delivered("put", key)
			require.NoError(t, s.Delete(key))
			delivered("delete", key)
		}
		for p, events := range watches {
			if p == "*" {
				deliversNext(t, s, events, "end")
			}
		}
	}},
	{"watch-nothing-before", "no event for what was acknowledged before", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for i := range 30 {
			key := fmt.Sprintf("k.%d", i%3)
			require.NoError(t, a.Put(key, []byte("before"), 0))
			ctx, cancel := context.WithCancel(context.Background())
			events := mustWatch(t, b.WithContext(ctx), "k.*")
			require.NoError(t, a.Put(key, []byte("after"), 0))
			kv := receive(t, events)
			require.Equal(t, "after", string(kv.Value))
			cancel()
		}
	}},
	{"watch-expiry", "an expiry is delivered at the deadline and has the revision of the value that expired", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "*")
		require.NoError(t, a.Put("k", []byte("v"), 200*time.Millisecond))
		put := receive(t, events)
		expiry := receive(t, events)
		assert.Equal(t, "delete k", brief(expiry))
		assert.Equal(t, put.Revision, expiry.Revision)
		assert.Nil(t, expiry.Value)
		assert.True(t, expiry.Created.IsZero())
		assert.True(t, expiry.Modified.Equal(put.Modified.Add(200*time.Millisecond)), "its time is the deadline")
		eventually(t, func() bool { _, err := a.Get("k"); return err != nil }, "expiry") // maybe a round trip later
		require.NoError(t, a.Delete("k"))                                                // silent: it is gone already
		deliversNext(t, a, events, "k")
	}},
	{"watch-expiry-of-the-old", "expiries of values put before the watch began are delivered, too", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			require.NoError(t, a.Put("k.1", nil, ttl))
			require.NoError(t, a.Put("k.2", nil, ttl*4/3))
			require.NoError(t, a.Put("k.3", nil, 0))
			require.NoError(t, a.Put("x", nil, ttl))
			wide, exact := mustWatch(t, b, "k.*"), mustWatch(t, b, "k.2")
			one, errOne := a.GetKeyValue("k.1")
			two, errTwo := a.GetKeyValue("k.2")
			if errOne != nil || errTwo != nil {
				return false
			}
			first, second := receive(t, wide), receive(t, wide)
			if first.Key == "k.2" { // the other watch was the first to notice
				first, second = second, first
			}
			assert.Equal(t, "delete k.1", brief(first))
			assert.Equal(t, one.Revision, first.Revision)
			assert.Equal(t, "delete k.2", brief(second))
			assert.Equal(t, two.Revision, second.Revision)
			assert.Equal(t, second, receive(t, exact))
			deliversNext(t, a, wide, "k.4")
			return true
		})
	}},
	{"watch-expired-before", "what had expired before the watch began is not delivered", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k", nil, time.Millisecond))
		eventually(t, func() bool { _, err := a.Get("k"); return err != nil }, "expiry")
		events := mustWatch(t, b, "*")
		deliversNext(t, a, events, "k")
	}},
	{"watch-refreshed", "a value that was refreshed in time is never reported as expired", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, 1500*time.Millisecond, func(ttl time.Duration) bool {
			key := fmt.Sprintf("k.%d", ttl)
			require.NoError(t, a.Put(key, nil, ttl))
			last, err := a.GetKeyValue(key)
			if err != nil {
				return false
			}
			events := mustWatch(t, b, key+"*")
			for range 8 {
				time.Sleep(ttl / 4)
				require.NoError(t, a.Put(key, nil, ttl))
				kv := receive(t, events)
				if brief(kv) == "delete "+key { // then the next Put creates a new key
					require.True(t, receive(t, events).Created.After(last.Created), "it was refreshed in time")
					return false
				}
				require.Equal(t, "put "+key, brief(kv))
				require.Greater(t, kv.Revision, last.Revision)
				last = kv
			}
			kv := receive(t, events)
			assert.Equal(t, "delete "+key, brief(kv))
			assert.Equal(t, last.Revision, kv.Revision)
			return true
		})
	}},
	{"watch-put-after-expiry", "a Put after the deadline comes after the expiry, as a new key", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "*")
		var last *KeyValue
		for i := range 5 {
			require.NoError(t, a.Put("k", nil, 50*time.Millisecond))
			kv := receive(t, events)
			require.Equal(t, "put k", brief(kv))
			if last != nil {
				require.False(t, kv.Created.Before(last.Created), i)
			}
			last = kv
			eventually(t, func() bool { _, err := a.Get("k"); return err != nil }, "expiry")
			if i%2 == 0 {
				require.NoError(t, a.Put("k", nil, 0)) // at once, the expiry is hardly delivered yet
				expiry := receive(t, events)
				require.Equal(t, "delete k", brief(expiry))
				require.Equal(t, last.Revision, expiry.Revision)
				last = receive(t, events)
				require.Equal(t, "put k", brief(last))
				mustGet(t, a, "k") // so that it knows when that was
				require.NoError(t, a.Delete("k"))
			}
			require.Equal(t, "delete k", brief(receive(t, events)))
		}
	}},
	{"watch-many-expiries", "every expiry is delivered, once", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "*")
		const n = 200
		for i := range n {
			require.NoError(t, a.Put(fmt.Sprintf("k.%d", i), nil, time.Second))
		}
		delivered := map[string]int{}
		for len(delivered) < n {
			if kv := receive(t, events); kv.Operation == OpDelete {
				delivered[kv.Key]++
			}
		}
		deliversNext(t, a, events, "end")
		for key, times := range delivered {
			assert.Equal(t, 1, times, key)
		}
	}},
	{"watch-order", "for one key events come in the order of their revisions, without duplicates; what is delivered is exact; the last state of every key is always delivered", func(t *testing.T, dial func() Store) {
		const writers, each = 4, 100
		reader := dial()
		events := mustWatch(t, reader, "k.*")
		var wg sync.WaitGroup
		var mu sync.Mutex
		written := map[uint64]string{} // key and value by revision, where that is known
		for w := range writers {
			s := dial()
			wg.Go(func() {
				for i := range each {
					value := fmt.Append(nil, w, i)
					own, shared := fmt.Sprintf("k.own.%d.%d", w, i), fmt.Sprintf("k.shared.%d", (w+i)%3)
					revision, err := s.Update(own, value, 0, 0)
					assert.NoError(t, err)
					mu.Lock()
					written[revision] = own + "=" + string(value)
					mu.Unlock()
					if i%10 == 9 {
						assert.NoError(t, s.Delete(shared))
					}
					assert.NoError(t, s.Put(shared, append([]byte(shared+" "), value...), 0))
				}
			})
		}
		wg.Wait()
		require.NoError(t, reader.Put("k.end", nil, 0))
		last := map[string]*KeyValue{}
		for last["k.end"] == nil {
			kv := receive(t, events)
			if before := last[kv.Key]; before != nil {
				require.Greater(t, kv.Revision, before.Revision, kv.Key)
			}
			last[kv.Key] = kv
			switch {
			case kv.Operation == OpDelete:
				require.Contains(t, kv.Key, "k.shared.")
				require.Nil(t, kv.Value)
			case strings.HasPrefix(kv.Key, "k.own."):
				require.Equal(t, written[kv.Revision], kv.Key+"="+string(kv.Value), "invented")
			case strings.HasPrefix(kv.Key, "k.shared."):
				require.Contains(t, string(kv.Value), kv.Key+" ")
			}
		}
		entries, err := reader.Entries("k.*")
		require.NoError(t, err)
		require.Len(t, entries, writers*each+3+1)
		for _, kv := range entries {
			// What was written once was not replaced, so it was not skipped.
			require.Equal(t, kv, last[kv.Key])
		}
	}},
	{"watch-slow-reader", "a slow reader gets the last state of every key, and nothing is skipped but what was replaced; memory is bounded by the number of keys that changed", func(t *testing.T, dial func() Store) {
		s := dial()
		slow, quick := mustWatch(t, s, "*"), mustWatch(t, s, "*")
		const puts, keys = 2000, 10
		for i := range maxWaiting {
			require.NoError(t, s.Put(fmt.Sprintf("once.%d", i), nil, 0))
		}
		for i := range puts {
			require.NoError(t, s.Put(fmt.Sprintf("k.%d", i%keys), fmt.Append(nil, i), 0))
		}
		require.NoError(t, s.Delete("k.0"))
		require.NoError(t, s.Put("last", nil, 0))
		for receive(t, quick).Key != "last" {
		}
		time.Sleep(500 * time.Millisecond) // so that all is waiting

		for i := range maxWaiting {
			require.Equal(t, fmt.Sprintf("put once.%d", i), brief(receive(t, slow)), "in order")
		}
		last := map[string]*KeyValue{}
		n := 0
		for last["last"] == nil {
			kv := receive(t, slow)
			if before := last[kv.Key]; before != nil {
				require.Greater(t, kv.Revision, before.Revision)
			}
			last[kv.Key] = kv
			n++
		}
		assert.LessOrEqual(t, n, 2*keys+2, "memory is bounded by the keys")
		assert.Equal(t, "delete k.0", brief(last["k.0"]))
		for i := 1; i < keys; i++ {
			assert.Equal(t, fmt.Sprint(puts-keys+i), string(last[fmt.Sprintf("k.%d", i)].Value))
		}
	}},
	{"watch-two-readers", "a slow reader blocks no other, and each gets all", func(t *testing.T, dial func() Store) {
		s := dial()
		stuck := mustWatch(t, s, "*")
		other := mustWatch(t, s, "*")
		for i := range 100 {
			require.NoError(t, s.Put(fmt.Sprint(i), nil, 0))
			require.Equal(t, fmt.Sprint(i), receive(t, other).Key)
		}
		for i := range 100 {
			require.Equal(t, fmt.Sprint(i), receive(t, stuck).Key)
		}
	}},
	{"watch-context", "a watch ends with the context that its store is bound to, and the others go on", func(t *testing.T, dial func() Store) {
		s := dial()
		ctx, cancel := context.WithCancel(context.Background())
		bound := s.WithContext(ctx)
		some, idle, other := mustWatch(t, bound, "k"), mustWatch(t, bound, "*"), mustWatch(t, s, "*")
		require.NoError(t, s.Put("k", nil, 0))
		receive(t, other)
		receive(t, some)
		cancel()
		ended(t, some)
		ended(t, idle)
		require.NoError(t, s.Put("k", nil, 0))
		receive(t, other)
		_, err := bound.Watch("*")
		assert.ErrorIs(t, err, context.Canceled)
	}},
}
