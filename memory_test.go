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
		open: func(t *testing.T) func() Store {
			s := NewMemoryStore()
			t.Cleanup(func() { _ = s.Close() })
			return func() Store { return s.Client() }
		},
	})
}

// TestHoldEndsWithTheLease: if the lease is not refreshed, fn's context ends with
// it, to the nanosecond.
func TestHoldEndsWithTheLease(t *testing.T) {
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
