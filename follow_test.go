package state

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"
	"weak"

	"github.com/stretchr/testify/require"
)

// A plain is a store of which nothing is known but the interface, as somebody
// else's wrapper is.
type plain struct{ Store }

// TestFollowOfAnyStore holds Follow and Cache to their rules on a store of which
// only the methods of Store are known.
func TestFollowOfAnyStore(t *testing.T) {
	run := func(t *testing.T, b backend) {
		open := b.open
		b.open = func(t *testing.T) func() Store {
			dial := open(t)
			return func() Store { return plain{dial()} }
		}
		for _, c := range slices.Concat(followCases, cacheCases) {
			t.Run(c.name, func(t *testing.T) {
				b.run(t, func(t *testing.T) { c.f(t, b.open(t)) })
			})
		}
	}
	t.Run("memory", func(t *testing.T) {
		run(t, backend{
			run: bubble,
			open: func(t *testing.T) func() Store {
				s := NewMemoryStore()
				t.Cleanup(func() { require.NoError(t, s.Close()) })
				return func() Store { return s.Client() }
			},
		})
	})
	t.Run("nats", func(t *testing.T) { run(t, natsBackend(1, startServer(t, nil))) })
}

// spaced is a store that gives its user a name space in another one: what it does
// not replace, it has from the store that it embeds.
type spaced struct{ *MemoryStore }

const space = "space."

func (s spaced) WithContext(ctx context.Context) Store {
	return spaced{s.MemoryStore.WithContext(ctx).(*MemoryStore)}
}

func (s spaced) Watch(pattern string) (<-chan *KeyValue, error) {
	return s.MemoryStore.Watch(space + pattern)
}

func (s spaced) Entries(pattern string) ([]*KeyValue, error) {
	return s.MemoryStore.Entries(space + pattern)
}

func (s spaced) Lock(key string, ttl time.Duration) (Lock, error) {
	return s.MemoryStore.Lock(space+key, ttl)
}

func (s spaced) LockHolder(key string) (*LockInfo, error) {
	return s.MemoryStore.LockHolder(space + key)
}

// TestStoresThatEmbed: Follow, NewCache and Acquire use the methods of a store that
// embeds one of this package, not those of the embedded one.
func TestStoresThatEmbed(t *testing.T) {
	t.Parallel()
	m := NewMemoryStore()
	t.Cleanup(func() { _ = m.Close() })
	require.NoError(t, m.Put("other", nil, 0))
	require.NoError(t, m.Put(space+"k", nil, 0))
	s := spaced{m}
	current, changes, err := Follow(t.Context(), s, "*")
	require.NoError(t, err)
	require.Len(t, current, 1)
	require.NoError(t, m.Put("other", nil, 0))
	require.NoError(t, m.Put(space+"k2", nil, 0))
	require.Equal(t, space+"k2", receive(t, changes).Key)
	c, err := NewCache(t.Context(), s, "*")
	require.NoError(t, err)
	entries, err := c.Entries("*")
	require.NoError(t, err)
	require.Len(t, entries, 2)
	l, err := Acquire(t.Context(), s, "l", time.Minute)
	require.NoError(t, err)
	require.Equal(t, space+"l", l.Key())
}

// losing is a store whose Locks fail with these errors.
type losing struct {
	*MemoryStore
	errs []error
	last func() // called before the last of them is returned
}

func (s *losing) WithContext(context.Context) Store { return s }

func (s *losing) Lock(string, time.Duration) (Lock, error) {
	err := s.errs[0]
	if s.errs = s.errs[1:]; len(s.errs) == 0 {
		s.last()
	}
	return nil, err
}

// A stuck is a lock that cannot be unlocked.
type stuck struct{ Lock }

func (stuck) Unlock() error { return errOutage }

// TestAcquireInDoubt: the answer to an attempt of Acquire is lost, and it ends before
// another attempt succeeds. Its error says that the caller may have the lock.
func TestAcquireInDoubt(t *testing.T) {
	t.Parallel()
	m := NewMemoryStore()
	t.Cleanup(func() { _ = m.Close() })
	for _, c := range []struct {
		errs  []error
		says  error
		doubt bool
	}{
		{[]error{ErrLockHeld, errDoubt}, context.Canceled, true},
		{[]error{errOutage, errDoubt}, context.Canceled, true},
		{[]error{ErrLockExpired, errDoubt}, context.Canceled, true},
		{[]error{errDoubt, errOutage, errOutage}, context.Canceled, true},
		{[]error{errDoubt, ErrClosed}, ErrClosed, true},
		{[]error{errDoubt, ErrLockExpired, errOutage}, context.Canceled, false},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := Acquire(ctx, &losing{MemoryStore: m, errs: c.errs, last: cancel}, "l", time.Minute)
		require.ErrorIs(t, err, c.says)
		require.Equal(t, c.doubt, errors.Is(err, ErrOutcomeUnknown), "%v: %v", c.errs, err)
	}

	// The lock is granted as ctx ends, and cannot be given back.
	ctx, cancel := context.WithCancel(t.Context())
	_, err := Acquire(ctx, meddler{Store: m, granted: func(l Lock) Lock { cancel(); return stuck{l} }}, "l", time.Minute)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, err, ErrOutcomeUnknown)
}

// TestFollowKeepsNoEntries: what Follow lists belongs to its caller alone, and a
// cache keeps only the last value of a key.
func TestFollowKeepsNoEntries(t *testing.T) {
	t.Parallel()
	// replaced returns the first entry of a cache, once there is another.
	replaced := func(c *Cache, replace func()) weak.Pointer[KeyValue] {
		kv, _ := c.entries.Load("k")
		first := weak.Make(kv.(*KeyValue))
		replace()
		eventually(t, func() bool { kv, _ := c.entries.Load("k"); return kv.(*KeyValue) != first.Value() }, "the next value")
		return first
	}
	collected := func(kv weak.Pointer[KeyValue]) func() bool {
		return func() bool { runtime.GC(); return kv.Value() == nil }
	}
	for name, s := range map[string]Store{
		"memory": NewMemoryStore(),
		"nats":   openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"}),
		"plain":  plain{NewMemoryStore()},
	} {
		defer s.Close()
		require.NoError(t, s.Put("k", []byte("1"), 0))
		current, changes, err := Follow(t.Context(), s, "k")
		require.NoError(t, err)
		listed := weak.Make(current[0])
		current = nil
		eventually(t, collected(listed), name+": the entry that was listed is free")
		runtime.KeepAlive(changes)

		c, err := NewCache(t.Context(), s, "k")
		require.NoError(t, err)
		first := replaced(c, func() { require.NoError(t, s.Put("k", []byte("2"), 0)) })
		eventually(t, collected(first), name+": the value that was replaced is free")
		c.Close()
	}
}
