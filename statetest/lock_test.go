package statetest_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.com/state"
	"example.com/state/statetest"
)

func mustLock(t *testing.T, s state.Store, key string, ttl time.Duration) state.Fenced {
	t.Helper()
	l, err := s.Lock(key, ttl)
	require.NoError(t, err)
	return l.(state.Fenced)
}

func bare(t *testing.T, want, err error) {
	t.Helper()
	assert.True(t, err == want, "%v instead of %v", err, want) //nolint:errorlint // bare
}

// held fails unless the lock is held below.
func held(t *testing.T, below state.Store, key string) {
	t.Helper()
	_, err := below.Lock(key, time.Second)
	bare(t, state.ErrLockHeld, err)
}

// free fails unless the lock is free below.
func free(t *testing.T, below state.Store, key string) {
	t.Helper()
	l, err := below.Lock(key, time.Second)
	require.NoError(t, err)
	require.NoError(t, l.Unlock())
}

func TestTakeAway(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		l := mustLock(t, s, "l", time.Hour)
		held(t, below, "l")
		assert.True(t, s.TakeAway("l"))
		assert.False(t, s.TakeAway("l"))
		assert.False(t, s.TakeAway("other"))
		next := mustLock(t, s, "l", time.Hour)
		assert.Greater(t, next.Token(), l.Token())
		bare(t, state.ErrLockExpired, l.Refresh())
		bare(t, state.ErrLockNotHeld, l.Unlock())
		held(t, below, "l")

		s.On(statetest.Refresh, "l").Nth(2).TakeAway()
		require.NoError(t, next.Refresh())
		bare(t, state.ErrLockExpired, next.Refresh())
		free(t, below, "l")
		bare(t, state.ErrLockNotHeld, next.Unlock())

		last := mustLock(t, s, "l", time.Hour)
		s.On(statetest.Unlock, "l").TakeAway()
		bare(t, state.ErrLockNotHeld, last.Unlock())
		free(t, below, "l")
	})
}

func TestLapse(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Lock, "l").Lapse()
		l := mustLock(t, s, "l", time.Minute)
		for range 11 {
			took(t, 5*time.Second, func() { assert.ErrorIs(t, l.Refresh(), state.ErrOutcomeUnknown) })
		}
		time.Sleep(5*time.Second - 1)
		held(t, below, "l")
		time.Sleep(time.Nanosecond)
		free(t, below, "l")
		bare(t, state.ErrLockExpired, l.Refresh())
		bare(t, state.ErrLockNotHeld, l.Unlock())
	})
}

// TestLostRefresh: the lease was extended, and its holder counts on the one
// that it knows of.
func TestLostRefresh(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		l := mustLock(t, s, "l", time.Minute)
		time.Sleep(30 * time.Second)
		s.On(statetest.Refresh, "l").LoseAnswer()
		assert.ErrorIs(t, l.Refresh(), state.ErrOutcomeUnknown)
		time.Sleep(25 * time.Second)
		bare(t, state.ErrLockExpired, l.Refresh())
		held(t, below, "l")
		bare(t, state.ErrLockNotHeld, l.Unlock())
		free(t, below, "l") // the rest of the extension was released

		l = mustLock(t, s, "l", time.Minute)
		s.On(statetest.Refresh, "l").LoseAnswer()
		assert.ErrorIs(t, l.Refresh(), state.ErrOutcomeUnknown)
		require.NoError(t, l.Refresh(), "it may be called again")
		time.Sleep(59 * time.Second)
		require.NoError(t, l.Refresh())
		require.NoError(t, l.Unlock())
		bare(t, state.ErrLockNotHeld, l.Unlock())
		bare(t, state.ErrLockNotHeld, l.Refresh())
	})
}

// TestSlowRefresh: an answer that comes after the lease has lapsed for all that
// its holder knew is too late, and nobody is kept waiting for it.
func TestSlowRefresh(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		l := mustLock(t, s, "l", 10*time.Second)
		time.Sleep(7 * time.Second)
		s.On(statetest.Refresh, "l").Slow(4 * time.Second)
		took(t, 4*time.Second, func() { bare(t, state.ErrLockExpired, l.Refresh()) })
		free(t, below, "l")
		bare(t, state.ErrLockNotHeld, l.Unlock())

		// It counts from before the request was sent.
		l = mustLock(t, s, "l", 10*time.Second)
		s.On(statetest.Refresh, "l").Slow(4 * time.Second)
		require.NoError(t, l.Refresh())
		time.Sleep(6*time.Second - 1)
		require.NoError(t, l.Refresh())
		time.Sleep(10 * time.Second)
		bare(t, state.ErrLockExpired, l.Refresh())
	})
}

// TestPlainLocks: a lock without a fencing token stays one.
func TestPlainLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := statetest.Wrap(tokenless{state.NewMemoryStore()})
		defer s.Close()
		l, err := s.Lock("l", time.Minute)
		require.NoError(t, err)
		_, fenced := l.(state.Fenced)
		assert.False(t, fenced)
		assert.Equal(t, "l", l.Key())
		require.NoError(t, l.Refresh())
		require.NoError(t, l.Unlock())
	})
}

type tokenless struct{ state.Store }

func (s tokenless) Lock(key string, ttl time.Duration) (state.Lock, error) {
	l, err := s.Store.Lock(key, ttl)
	return struct{ state.Lock }{l}, err
}

func TestLostUnlock(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		l := mustLock(t, s, "l", time.Minute)
		s.On(statetest.Unlock, "l").LoseAnswer()
		assert.ErrorIs(t, l.Unlock(), state.ErrOutcomeUnknown)
		free(t, below, "l")
		assert.NoError(t, l.Unlock(), "the first attempt did it")
		bare(t, state.ErrLockNotHeld, l.Unlock())

		l = mustLock(t, s, "l", time.Minute)
		s.On(statetest.Unlock, "l").LoseAnswer()
		assert.ErrorIs(t, l.Unlock(), state.ErrOutcomeUnknown)
		bare(t, state.ErrLockExpired, l.Refresh())
		bare(t, state.ErrLockNotHeld, l.Unlock())

		l = mustLock(t, s, "l", time.Minute)
		s.On(statetest.Unlock, "l").LoseRequest()
		assert.ErrorIs(t, l.Unlock(), state.ErrOutcomeUnknown)
		held(t, below, "l")
		require.NoError(t, l.Refresh())
		require.NoError(t, l.Unlock())
		free(t, below, "l")
	})
}

func TestHandedOverLate(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		l := mustLock(t, s, "l", time.Minute)
		s.On(statetest.Unlock, "l").ApplyLate(3 * time.Second)
		assert.ErrorIs(t, l.Unlock(), state.ErrOutcomeUnknown)
		time.Sleep(3*time.Second - 1)
		held(t, below, "l")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		free(t, below, "l")

		// A release that is late releases nothing that came after it.
		l = mustLock(t, s, "l", time.Minute)
		s.On(statetest.Unlock, "l").ApplyLate(3 * time.Second)
		assert.ErrorIs(t, l.Unlock(), state.ErrOutcomeUnknown)
		require.NoError(t, l.Refresh())
		time.Sleep(30 * time.Second)
		held(t, below, "l")
		require.NoError(t, l.Unlock())

		// Nor does a late refresh bring back what was released.
		l = mustLock(t, s, "l", time.Minute)
		s.On(statetest.Refresh, "l").ApplyLate(3 * time.Second)
		assert.ErrorIs(t, l.Refresh(), state.ErrOutcomeUnknown)
		require.NoError(t, l.Unlock())
		time.Sleep(30 * time.Second)
		free(t, below, "l")
	})
}

func TestLostLock(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Lock, "l").LoseAnswer()
		began := time.Now()
		_, err := s.Lock("l", time.Minute)
		assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
		_, err = s.Lock("l", time.Minute)
		bare(t, state.ErrLockHeld, err)
		time.Sleep(time.Until(began.Add(time.Minute)))
		free(t, below, "l")

		s.On(statetest.Lock, "l").ApplyLate(time.Second)
		_, err = s.Lock("l", time.Minute)
		assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
		free(t, below, "l")
		time.Sleep(time.Second)
		synctest.Wait()
		held(t, below, "l")
		time.Sleep(time.Minute)
		free(t, below, "l")

		s.On(statetest.Lock, "l").ApplyLate(time.Second)
		_, err = s.Lock("l", time.Minute)
		assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
		time.Sleep(time.Second)
		synctest.Wait()
		free(t, below, "l") // the late one was for the record before

		// The lease is counted from before the request was sent.
		s.On(statetest.Lock, "l").Slow(2 * time.Second)
		_, err = s.Lock("l", time.Second)
		bare(t, state.ErrLockExpired, err)
		free(t, below, "l")
		s.On(statetest.Lock, "l").Slow(2 * time.Second)
		l := mustLock(t, s, "l", 10*time.Second)
		time.Sleep(8 * time.Second)
		bare(t, state.ErrLockExpired, l.Refresh())
	})
}

// TestPausePastTheLease: the holder looks, sleeps past its lease, and writes.
func TestPausePastTheLease(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Put, "account").Pause(2 * time.Minute)
		err := state.WithLock(t.Context(), s, "l", time.Minute, func(ctx context.Context, _ uint64) error {
			assert.NoError(t, ctx.Err())
			err := s.Put("account", []byte("paused"), 0)
			assert.Error(t, ctx.Err())
			return err
		})
		bare(t, state.ErrLockExpired, err)
		assert.Equal(t, "paused", value(t, below, "account"))
	})
}
