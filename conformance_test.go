package state

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A backend is what the conformance suite asks of a backend.
type backend struct {
	// run runs one case, on the clock that the backend follows.
	run func(t *testing.T, f func(t *testing.T))
	// open makes a fresh and empty name space. Each dial is one more client of
	// it, on a connection of its own where there are connections.
	open func(t *testing.T) (dial func() Store)
}

// A conformanceCase is a sentence of the contract and what shows it.
type conformanceCase struct {
	name string
	rule string
	f    func(t *testing.T, dial func() Store)
}

// testConformance holds a backend to the contract.
func testConformance(t *testing.T, b backend) {
	for _, c := range slices.Concat(keyCases, metadataCases, ttlCases, keysCases, entriesCases, storeCases, watchCases, lockCases, updateCases, contextCases, functionCases, acquireCases, holdCases, withLockCases, followCases, cacheCases, closeCases) {
		t.Run(c.name, func(t *testing.T) {
			b.run(t, func(t *testing.T) {
				t.Cleanup(func() {
					if t.Failed() {
						t.Logf("the rule: %s", c.rule)
					}
				})
				c.f(t, b.open(t))
			})
		})
	}
}

// eventually waits until f holds. In a bubble that takes no time.
func eventually(t testing.TB, f func() bool, what string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return
		}
	}
	require.FailNow(t, "never happened: "+what)
}

// receive returns the next event, which must come.
func receive(t *testing.T, events <-chan *KeyValue) *KeyValue {
	t.Helper()
	select {
	case kv, ok := <-events:
		require.True(t, ok, "the watch has ended")
		return kv
	case <-time.After(20 * time.Second):
		require.FailNow(t, "no event came")
		return nil
	}
}

// ended waits until the watch has ended.
func ended(t *testing.T, events <-chan *KeyValue) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case _, ok := <-events:
			if !ok {
				return
			}
		case <-timeout:
			require.FailNow(t, "the watch does not end")
		}
	}
}

// deliversNext fails unless the watch's next event is a put of exactly key: so
// nothing that was caused before it has been told.
func deliversNext(t *testing.T, s StateStore, events <-chan *KeyValue, key string) {
	t.Helper()
	require.NoError(t, s.Put(key, []byte("barrier"), 0))
	require.Equal(t, "put "+key, brief(receive(t, events)))
}

func brief(kv *KeyValue) string { return kv.Operation.String() + " " + kv.Key }

func mustGet(t *testing.T, s StateStore, key string) *KeyValue {
	t.Helper()
	kv, err := s.GetKeyValue(key)
	require.NoError(t, err)
	return kv
}

// withLongerTTL runs a round with a TTL. A busy machine can let a short TTL lapse too
// soon. Then the round reports false, and runs again with twice the TTL. It runs three
// times at most and, in a bubble, where nothing is late, once.
func withLongerTTL(t *testing.T, ttl time.Duration, round func(ttl time.Duration) bool) {
	t.Helper()
	longest := 4 * ttl
	if time.Now().UTC().Year() == 2000 {
		longest = ttl
	}
	for ; !round(ttl); ttl *= 2 {
		require.Less(t, ttl, longest, "it lapses too soon, whatever its TTL")
	}
}

// soonest returns the shortest of several rounds. It makes no more than it needs to be
// within a limit, and n at most: a busy machine is late now and then.
func soonest(n int, limit time.Duration, round func(n int) time.Duration) time.Duration {
	best := round(0)
	for i := 1; i < n && best >= limit; i++ {
		best = min(best, round(i))
	}
	return best
}

// refusedOrLapsed requires that another client is refused a lock, unless its lease
// has lapsed, and reports which it is.
func refusedOrLapsed(t *testing.T, other Store, l Lock) (refused bool) {
	t.Helper()
	next, err := other.Lock(l.Key(), time.Minute)
	if err != nil {
		refuses(t, ErrLockHeld, err)
		return true
	}
	require.False(t, time.Now().Before(validUntil(l)), "it was granted while the lease ran")
	refuses(t, ErrLockExpired, l.Refresh())
	require.NoError(t, next.Unlock())
	return false
}

// mustLock acquires a lock that is free. A lease can be shorter than the answer
// takes on a machine that is busy; then it tries again.
func mustLock(t *testing.T, s StateStore, key string, ttl time.Duration) Lock {
	t.Helper()
	for range 100 {
		l, err := s.Lock(key, ttl)
		if err != ErrLockExpired { //nolint:errorlint // bare
			require.NoError(t, err)
			return l
		}
	}
	require.FailNow(t, "no lease lasts until its answer is here")
	return nil
}

func mustWatch(t *testing.T, s StateStore, pattern string) <-chan *KeyValue {
	t.Helper()
	events, err := s.Watch(pattern)
	require.NoError(t, err)
	return events
}

// refuses fails unless err is the sentinel itself: users compare with ==.
func refuses(t *testing.T, sentinel, err error, msg ...any) {
	t.Helper()
	assert.True(t, err == sentinel, "got %v (%T), want the bare %q %v", err, err, sentinel, msg) //nolint:errorlint // bare is what is tested
}

var goodKeys = []string{
	"a", "Z", "0", "-", "_", "/", "=", "a.b", "config.timeout", "a/b=c_d-e", "-.-", "a.b.c.d.e.f",
	strings.Repeat("k", 1024), strings.Repeat("ab.", 341) + "c",
}

var badKeys = []string{
	"", ".", ".a", "a.", "a..b", "..", "a b", " a", "a ", "a\tb", "a\nb", "a*", "*", "a.*", ">", "a.>", "a:b", "a,b",
	"a\\b", "a\x00b", "ä", "日本", "a\xffb", "a#b", "a$b", "a%b", "a+b", "a@b", "~", "(a)", strings.Repeat("k", 1025),
}

var badPatterns = []string{
	"", "a b", "a.*.b", "*a", "a..b*", ">", "a.>", "**", "a**", ".", ".*", "a.", "a*b", "a..*", "ä*", " *",
	strings.Repeat("k", 1025), strings.Repeat("k", 1025) + "*", strings.Repeat("k", 1023) + ".*",
}

var keyCases = []conformanceCase{
	{"put-get", "Get returns what Put stored", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for i, key := range goodKeys {
			value := fmt.Appendf(nil, "value %d", i)
			require.NoError(t, a.Put(key, value, 0), key)
			got, err := b.Get(key)
			require.NoError(t, err, key)
			assert.Equal(t, value, got, key)
			assert.NoError(t, ValidateKey(key), key)
		}
		for _, key := range goodKeys {
			require.NoError(t, b.Delete(key), key)
			_, err := a.Get(key)
			refuses(t, ErrNotFound, err, key)
		}
	}},
	{"get-missing", "Get returns ErrNotFound if the key does not exist", func(t *testing.T, dial func() Store) {
		s := dial()
		_, err := s.Get("missing")
		refuses(t, ErrNotFound, err)
		kv, err := s.GetKeyValue("missing")
		refuses(t, ErrNotFound, err)
		assert.Nil(t, kv)
	}},
	{"bad-keys", "anything else is ErrInvalidKey from every method", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, key := range badKeys {
			refuses(t, ErrInvalidKey, ValidateKey(key), key)
			_, err := s.Get(key)
			refuses(t, ErrInvalidKey, err, key)
			_, err = s.GetKeyValue(key)
			refuses(t, ErrInvalidKey, err, key)
			refuses(t, ErrInvalidKey, s.Put(key, nil, 0), key)
			refuses(t, ErrInvalidKey, s.Delete(key), key)
			_, err = s.Update(key, nil, 0, 0)
			refuses(t, ErrInvalidKey, err, key)
			refuses(t, ErrInvalidKey, s.DeleteRevision(key, 1), key)
			_, err = s.Lock(key, time.Minute)
			refuses(t, ErrInvalidKey, err, key)
			_, err = s.LockHolder(key)
			refuses(t, ErrInvalidKey, err, key)
		}
	}},
	{"bad-patterns", "Keys, Entries and Watch return ErrInvalidKey for anything that could match no key", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, p := range badPatterns {
			_, err := s.Keys(p)
			refuses(t, ErrInvalidKey, err, p)
			_, err = s.Watch(p)
			refuses(t, ErrInvalidKey, err, p)
			_, err = s.Entries(p)
			refuses(t, ErrInvalidKey, err, p)
		}
	}},
	{"values-are-copied", "bytes are copied in and copied out", func(t *testing.T, dial func() Store) {
		s := dial()
		events, others := mustWatch(t, s, "k"), mustWatch(t, s, "*")
		in := []byte("hello")
		require.NoError(t, s.Put("k", in, 0))
		copy(in, "xxxxx")
		out, err := s.Get("k")
		require.NoError(t, err)
		require.Equal(t, "hello", string(out))
		copy(out, "yyyyy")
		kv := mustGet(t, s, "k")
		require.Equal(t, "hello", string(kv.Value))
		copy(kv.Value, "zzzzz")
		copy(receive(t, events).Value, "wwwww")
		assert.Equal(t, "hello", string(receive(t, others).Value))
		out, err = s.Get("k")
		require.NoError(t, err)
		assert.Equal(t, "hello", string(out))
		_ = append(out[:0:len(out)], "overwritten"...)
		assert.Equal(t, "hello", string(mustGet(t, s, "k").Value))
	}},
	{"empty-values", "nil and empty are stored alike and read back as an empty, non-nil slice", func(t *testing.T, dial func() Store) {
		s := dial()
		events := mustWatch(t, s, "*")
		for i, value := range [][]byte{nil, {}} {
			key := fmt.Sprintf("empty.%d", i)
			require.NoError(t, s.Put(key, value, 0))
			got, err := s.Get(key)
			require.NoError(t, err)
			assert.NotNil(t, got)
			assert.Empty(t, got)
			kv := mustGet(t, s, key)
			assert.NotNil(t, kv.Value)
			assert.Empty(t, kv.Value)
			ev := receive(t, events)
			assert.NotNil(t, ev.Value)
			assert.Empty(t, ev.Value)
		}
	}},
	{"any-bytes", "a value is any bytes", func(t *testing.T, dial func() Store) {
		s := dial()
		all := make([]byte, 256)
		for i := range all {
			all[i] = byte(i)
		}
		require.NoError(t, s.Put("k", all, 0))
		got, err := s.Get("k")
		require.NoError(t, err)
		assert.Equal(t, all, got)
	}},
	{"large-values", "a value larger than the store's limit is refused before anything is sent", func(t *testing.T, dial func() Store) {
		s := dial()
		largest := bytes.Repeat([]byte("x"), 1<<20-1024)
		require.NoError(t, s.Put("k", largest, time.Hour+time.Nanosecond))
		got, err := s.Get("k")
		require.NoError(t, err)
		assert.True(t, bytes.Equal(largest, got))
		before := mustGet(t, s, "k").Revision
		for _, more := range []int{1, 1024, 1025, 1 << 20, 16 << 20} {
			refuses(t, ErrValueTooLarge, s.Put("k", make([]byte, len(largest)+more), 0), more)
			_, err := s.Update("k", make([]byte, len(largest)+more), 0, before)
			refuses(t, ErrValueTooLarge, err, more)
		}
		assert.Equal(t, before, mustGet(t, s, "k").Revision)
	}},
	{"delete", "Delete removes a key, and is silent on missing keys: no error, no event, nothing written", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		events := mustWatch(t, b, "*")
		require.NoError(t, a.Delete("never"))
		require.NoError(t, a.Put("k", []byte("v"), 0))
		put := receive(t, events)
		require.NoError(t, b.Delete("k"))
		deleted := receive(t, events)
		assert.Equal(t, "delete k", brief(deleted))
		require.NoError(t, a.Delete("k"))
		require.NoError(t, b.Delete("k"))
		_, err := a.Get("k")
		refuses(t, ErrNotFound, err)
		deliversNext(t, a, events, "k")
		// Had the deletes of nothing been written, they would have taken
		// revisions.
		assert.Equal(t, []uint64{1, 2}, []uint64{deleted.Revision - put.Revision, mustGet(t, b, "k").Revision - put.Revision})
	}},
}

var metadataCases = []conformanceCase{
	{"metadata", "Created is when the key came into being, Modified is when this revision was written", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k", []byte("1"), 0))
		first := mustGet(t, b, "k")
		assert.Equal(t, "k", first.Key)
		assert.Equal(t, OpPut, first.Operation)
		assert.False(t, first.Created.IsZero())
		assert.False(t, first.Modified.Before(first.Created))
		assert.WithinDuration(t, time.Now(), first.Created, time.Minute)
		assert.WithinDuration(t, first.Created, first.Modified, time.Minute)
		time.Sleep(5 * time.Millisecond)
		for i := range 3 {
			// The second writer has never seen the key, then knows it.
			require.NoError(t, b.Put("k", []byte("2"), 0))
			require.NoError(t, a.Put("k", []byte("3"), 0))
			next := mustGet(t, a, "k")
			assert.True(t, next.Created.Equal(first.Created), "round %d: created %v, then %v", i, first.Created, next.Created)
			assert.True(t, next.Modified.After(first.Modified))
			assert.Greater(t, next.Revision, first.Revision)
		}
	}},
	{"created-is-the-same-for-all", "Created stays, whoever wrote and whoever reads", func(t *testing.T, dial func() Store) {
		a, b, reader := dial(), dial(), dial()
		events := mustWatch(t, reader, "k")
		require.NoError(t, a.Put("k", []byte("1"), 0))
		first := receive(t, events)
		// The writer has never read what it wrote, the reader has.
		require.NoError(t, a.Put("k", []byte("2"), time.Hour))
		assert.True(t, first.Created.Equal(receive(t, events).Created))
		require.NoError(t, b.Put("k", []byte("3"), 0))
		assert.True(t, first.Created.Equal(receive(t, events).Created))
		assert.True(t, first.Created.Equal(mustGet(t, reader, "k").Created))
	}},
	{"recreate-after-delete", "Created is new after a delete, and the revision goes on", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		require.NoError(t, a.Put("k", []byte("1"), 0))
		first := mustGet(t, a, "k")
		time.Sleep(5 * time.Millisecond)
		require.NoError(t, b.Delete("k"))
		require.NoError(t, a.Put("k", []byte("2"), 0))
		second := mustGet(t, b, "k")
		assert.True(t, second.Created.After(first.Created))
		assert.Greater(t, second.Revision, first.Revision+1, "the deletion has a revision of its own")
	}},
	{"recreate-after-expiry", "an expired entry behaves exactly as a deleted one: a following Put starts a new key", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		withLongerTTL(t, time.Second, func(ttl time.Duration) (inTime bool) {
			key := fmt.Sprint("k.", int64(ttl))
			require.NoError(t, a.Put(key, []byte("1"), ttl))
			first, err := a.GetKeyValue(key)
			if err != nil {
				refuses(t, ErrNotFound, err)
				return false
			}
			require.NoError(t, a.Put(key, []byte("2"), ttl))
			second, err := b.GetKeyValue(key)
			if err != nil {
				refuses(t, ErrNotFound, err)
				return false
			}
			if !second.Modified.Before(first.Expires) {
				return false
			}
			assert.True(t, second.Created.Equal(first.Created))
			eventually(t, func() bool { _, err := b.Get(key); return err == ErrNotFound }, "expiry") //nolint:errorlint // bare
			require.NoError(t, a.Put(key, []byte("3"), 0))
			third := mustGet(t, b, key)
			assert.True(t, third.Created.After(first.Created))
			assert.Greater(t, third.Revision, first.Revision)
			return true
		})
	}},
	{"revisions-grow", "Revision grows with every change in the store and never repeats", func(t *testing.T, dial func() Store) {
		clients := []Store{dial(), dial()}
		var last uint64
		for i := range 40 {
			s, key := clients[i%2], fmt.Sprintf("k.%d", i%3)
			if i%5 == 4 {
				require.NoError(t, s.Delete(key))
			}
			require.NoError(t, s.Put(key, nil, 0))
			revision := mustGet(t, clients[(i+1)%2], key).Revision
			require.Greater(t, revision, last)
			last = revision
		}
	}},
	{"concurrent-writers", "every acknowledged Put is one revision, and Created stays exact", func(t *testing.T, dial func() Store) {
		const writers, each = 4, 25
		reader := dial()
		require.NoError(t, reader.Put("k", nil, 0))
		created := mustGet(t, reader, "k")
		var wg sync.WaitGroup
		for range writers {
			s := dial()
			for range 2 { // two goroutines share a store
				wg.Go(func() {
					for range each {
						assert.NoError(t, s.Put("k", []byte("x"), 0))
					}
				})
			}
		}
		wg.Wait()
		last := mustGet(t, reader, "k")
		assert.True(t, created.Created.Equal(last.Created))
		assert.Equal(t, created.Revision+2*writers*each, last.Revision)
	}},
}

var ttlCases = []conformanceCase{
	{"bad-ttls", "negative is ErrInvalidTTL; for Lock 0 is too", func(t *testing.T, dial func() Store) {
		s := dial()
		for _, ttl := range []time.Duration{-1, -time.Second, math.MinInt64} {
			refuses(t, ErrInvalidTTL, ValidateTTL(ttl))
			refuses(t, ErrInvalidTTL, s.Put("k", nil, ttl))
			_, err := s.Update("k", nil, ttl, 0)
			refuses(t, ErrInvalidTTL, err)
			_, err = s.Lock("k", ttl)
			refuses(t, ErrInvalidTTL, err)
		}
		_, err := s.Lock("k", 0)
		refuses(t, ErrInvalidTTL, err)
		assert.NoError(t, ValidateTTL(0))
		assert.NoError(t, ValidateTTL(1))
		_, err = s.Get("k")
		refuses(t, ErrNotFound, err)
	}},
	{"ttl-expires", "an entry is visible until its deadline and not after it", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		const ttl = 300 * time.Millisecond
		before := time.Now()
		require.NoError(t, a.Put("k", []byte("v"), ttl))
		after := time.Now()
		for {
			_, err := b.Get("k")
			now := time.Now()
			if err != nil {
				refuses(t, ErrNotFound, err)
				assert.GreaterOrEqual(t, now.Sub(before), ttl, "early")
				break
			}
			require.Less(t, now.Sub(after), ttl+2*time.Second, "it stays")
			time.Sleep(time.Millisecond)
		}
		eventually(t, func() bool { // another client may see it a round trip late
			keys, err := a.Keys("*")
			return err == nil && len(keys) == 0
		}, "expiry")
	}},
	{"ttl-replaced-and-cleared", "a Put replaces the TTL along with the value", func(t *testing.T, dial func() Store) {
		s := dial()
		withLongerTTL(t, time.Second, func(ttl time.Duration) bool {
			events := mustWatch(t, s, "*")
			inTime := true
			put := func(key string, ttl time.Duration) {
				require.NoError(t, s.Put(key, nil, ttl))
				kv := receive(t, events)
				for kv.Operation == OpDelete {
					inTime = false
					kv = receive(t, events)
				}
				assert.Equal(t, "put "+key, brief(kv))
			}
			put("longer", ttl)
			put("cleared", ttl)
			put("shorter", time.Hour)
			put("longer", time.Hour)
			put("cleared", 0)
			put("shorter", ttl+50*time.Millisecond) // ends after the first deadlines of the other keys
			assert.Equal(t, "delete shorter", brief(receive(t, events)))
			keys, err := s.Keys("*")
			require.NoError(t, err)
			assert.Equal(t, []string{"cleared", "longer"}, keys)
			return inTime
		})
	}},
	{"tiny-ttls", "any positive duration is honoured, from a nanosecond", func(t *testing.T, dial func() Store) {
		s := dial()
		events := mustWatch(t, s, "*")
		for _, ttl := range []time.Duration{1, time.Microsecond, time.Millisecond} {
			require.NoError(t, s.Put("k", []byte("v"), ttl))
			assert.Equal(t, "put k", brief(receive(t, events)))
			assert.Equal(t, "delete k", brief(receive(t, events)))
			_, err := s.Get("k")
			refuses(t, ErrNotFound, err)
		}
	}},
	{"huge-ttls", "any positive duration is honoured, to the largest time.Duration", func(t *testing.T, dial func() Store) {
		s := dial()
		for i, ttl := range []time.Duration{math.MaxInt64, math.MaxInt64 - 1, 290 * 365 * 24 * time.Hour, 101 * 365 * 24 * time.Hour, 99*365*24*time.Hour + 1} {
			key := fmt.Sprintf("k.%d", i)
			require.NoError(t, s.Put(key, []byte("v"), ttl))
			l := mustLock(t, s, key, ttl)
			require.NoError(t, l.Refresh())
			_, err := s.Lock(key, ttl)
			refuses(t, ErrLockHeld, err)
			time.Sleep(300 * time.Millisecond)
			_, err = s.Get(key)
			require.NoError(t, err, ttl)
			require.NoError(t, l.Unlock(), ttl)
		}
	}},
	{"fractional-ttl", "a TTL is not cut to whole seconds", func(t *testing.T, dial func() Store) {
		s := dial()
		const ttl = 1300 * time.Millisecond
		for round := 1; ; round++ { // again if the machine was busy
			before := time.Now()
			require.NoError(t, s.Put("k", nil, ttl))
			eventually(t, func() bool { _, err := s.Get("k"); return err != nil }, "expiry")
			took := time.Since(before)
			require.GreaterOrEqual(t, took, ttl)
			if took < 1900*time.Millisecond {
				return
			}
			require.Less(t, round, 4, "it lives for %v", took)
		}
	}},
}

var keysCases = []conformanceCase{
	{"keys", "Keys returns all keys matching a pattern, once, sorted", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		keys, err := a.Keys("*")
		require.NoError(t, err)
		assert.NotNil(t, keys)
		assert.Empty(t, keys)
		all := []string{"conf", "config", "config.a", "config.a.b", "config.b", "configs", "other", "other.config.a"}
		for i, key := range all {
			// Twice each, so that a double would show.
			require.NoError(t, a.Put(all[len(all)-1-i], nil, 0))
			require.NoError(t, b.Put(key, nil, time.Hour))
		}
		for pattern, want := range map[string][]string{
			"*":            all,
			"config.*":     {"config.a", "config.a.b", "config.b"},
			"config*":      {"config", "config.a", "config.a.b", "config.b", "configs"},
			"conf*":        {"conf", "config", "config.a", "config.a.b", "config.b", "configs"},
			"config":       {"config"},
			"config.a":     {"config.a"},
			"config.a*":    {"config.a", "config.a.b"},
			"config.a.*":   {"config.a.b"},
			"config.a.b.*": {},
			"nothing":      {},
			"nothing.*":    {},
			"o*":           {"other", "other.config.a"},
		} {
			got, err := b.Keys(pattern)
			require.NoError(t, err, pattern)
			assert.NotNil(t, got, pattern)
			assert.Equal(t, want, append([]string{}, got...), pattern)
			for _, key := range all {
				assert.Equal(t, slices.Contains(want, key), MatchPattern(pattern, key), "%s %s", pattern, key)
			}
		}
	}},
	{"keys-without-the-gone", "deleted and expired keys are not listed; those made again are", func(t *testing.T, dial func() Store) {
		a, b := dial(), dial()
		for i := range 400 {
			require.NoError(t, a.Put(fmt.Sprintf("k.%03d", i), nil, 0))
		}
		_, err := b.Keys("*")
		require.NoError(t, err)
		want := []string{}
		for i := range 400 {
			key := fmt.Sprintf("k.%03d", i)
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
		for _, pattern := range []string{"*", "k.*", "k*"} {
			got, err := b.Keys(pattern)
			require.NoError(t, err)
			assert.Equal(t, want, got)
		}
	}},
	{"keys-under-writers", "every key that exists throughout the call is in the answer, once", func(t *testing.T, dial func() Store) {
		const n = 300
		reader := dial()
		for i := range n {
			require.NoError(t, reader.Put(fmt.Sprintf("k.%03d", i), nil, 0))
		}
		var stop atomic.Bool
		var wg sync.WaitGroup
		for w := range 3 {
			s := dial()
			wg.Go(func() {
				for i := w; !stop.Load(); i++ {
					assert.NoError(t, s.Put(fmt.Sprintf("k.%03d", i*7%n), []byte("x"), 0))
					time.Sleep(time.Microsecond)
				}
			})
		}
		for range 20 {
			keys, err := reader.Keys("*")
			require.NoError(t, err)
			assert.Len(t, keys, n)
			assert.True(t, slices.IsSorted(keys))
			assert.Len(t, slices.Compact(keys), n)
		}
		stop.Store(true)
		wg.Wait()
	}},
}
