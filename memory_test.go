package state

import (
	"testing"
	"testing/synctest"
)

func TestMemoryStoreConformance(t *testing.T) {
	testConformance(t, backend{
		run: func(t *testing.T, f func(*testing.T)) { synctest.Test(t, f) },
		open: func(t *testing.T) func() StateStore {
			s := NewMemoryStore()
			t.Cleanup(func() { _ = s.Close() })
			return func() StateStore { return s }
		},
	})
}
