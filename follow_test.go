package state

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

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

// losing is a store whose first Lock fails, and whose second one is granted, but the
// answer lost.
type losing struct {
	*MemoryStore
	first error
	locks int
	lost  func()
}

func (s *losing) WithContext(context.Context) Store { return s }

func (s *losing) Lock(string, time.Duration) (Lock, error) {
	if s.locks++; s.locks == 1 {
		return nil, s.first
	}
	s.lost()
	return nil, fmt.Errorf("%w: lost", ErrOutcomeUnknown)
}

// TestAcquireInDoubt: the context of an Acquire ends while its answer is lost. The
// caller may have the lock, so it is not said to be held by somebody else.
func TestAcquireInDoubt(t *testing.T) {
	t.Parallel()
	m := NewMemoryStore()
	t.Cleanup(func() { _ = m.Close() })
	for _, first := range []error{ErrLockHeld, errOutage, ErrLockExpired} {
		ctx, cancel := context.WithCancel(t.Context())
		_, err := Acquire(ctx, &losing{MemoryStore: m, first: first, lost: cancel}, "l", time.Minute)
		require.ErrorIs(t, err, ErrOutcomeUnknown)
		require.ErrorIs(t, err, context.Canceled)
	}
}
