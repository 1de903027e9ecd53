package state

import (
	"slices"
	"testing"
	"testing/synctest"

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
			run: func(t *testing.T, f func(*testing.T)) { synctest.Test(t, f) },
			open: func(t *testing.T) func() Store {
				s := NewMemoryStore()
				t.Cleanup(func() { require.NoError(t, s.Close()) })
				return func() Store { return s.Client() }
			},
		})
	})
	t.Run("nats", func(t *testing.T) { run(t, natsBackend(1, startServer(t, nil))) })
}
