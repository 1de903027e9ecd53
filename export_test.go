package state

import "testing"

// MemoryConformance runs the conformance suite on stores in memory that wrap
// returns, for tests outside the package.
func MemoryConformance(t *testing.T, wrap func(Store) Store) {
	testConformance(t, wrapped(memoryBackend(), wrap))
}

// NATSConformance does the same on a server.
func NATSConformance(t *testing.T, wrap func(Store) Store) {
	testConformance(t, wrapped(natsBackend(1, startServer(t, nil)), wrap))
}

func wrapped(b backend, wrap func(Store) Store) backend {
	open := b.open
	b.open = func(t *testing.T) func() Store {
		dial := open(t)
		return func() Store {
			s := wrap(dial())
			t.Cleanup(func() { _ = s.Close() })
			return s
		}
	}
	return b
}
