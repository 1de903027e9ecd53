package state

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
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

// TestWithLockTellsAtTheEnd: if the lease is not refreshed, fn is told at its
// end, to the nanosecond.
func TestWithLockTellsAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewMemoryStore()
		defer s.Close()
		began := time.Now()
		err := WithLock(context.Background(), refreshless{s}, "l", time.Second, func(ctx context.Context, _ uint64) error {
			<-ctx.Done()
			assert.Equal(t, time.Second, time.Since(began))
			return nil
		})
		refuses(t, ErrLockExpired, err)
	})
}
