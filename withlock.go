package state

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// A releaseTeller is a store that can tell of the release of a lock. It is only
// a hint: it can come for nothing, and it can fail to come.
type releaseTeller interface {
	// onRelease returns a channel of one slot that is filled when the lock may
	// have been released, until stop is called.
	onRelease(key string) (released <-chan struct{}, stop func())
}

// The pause between two attempts of WithLock, when nothing tells it earlier.
const (
	minLockPause = 5 * time.Millisecond
	maxLockPause = 60 * time.Millisecond
)

// WithLock runs fn while it holds the lock of key, on any store. It waits for
// the lock until ctx is done, keeps it refreshed for as long as fn runs, and
// unlocks it on every way out, panics included. Those who wait are no queue:
// who comes first when it is released gets it.
//
// The context that fn gets ends with ctx, and at the timestamp from which the
// lease can no longer be counted on, by the local clock and even if no packet
// gets through; its cause is then [ErrLockExpired]. fn should stop then: soon
// somebody else may hold the lock. The token is the fencing token of [Fenced],
// or 0 if the store's locks have none; pass it on to what the lock protects.
//
// The error tells apart:
//   - The lock was not acquired before ctx ended: the bare [ErrLockHeld] if
//     somebody held it to the last, else an error that wraps the context's. fn
//     was not called.
//   - The lock could not be acquired: the error of Lock. fn was not called.
//   - The lease was lost while fn ran: errors.Is says ErrLockExpired, and the
//     error wraps what fn returned, if it returned an error.
//   - Otherwise it is what fn returned.
func WithLock(ctx context.Context, store StateStore, key string, ttl time.Duration, fn func(ctx context.Context, token uint64) error) error {
	lock, until, err := awaitLock(ctx, store, key, ttl)
	if err != nil {
		return err
	}
	held, lose := context.WithCancelCause(ctx)
	k := &renewer{
		lock: lock, ttl: ttl, until: until, lose: lose,
		stop: make(chan struct{}), stopped: make(chan struct{}),
	}
	k.expiry = time.AfterFunc(time.Until(until), func() { lose(ErrLockExpired) })
	go k.keep()
	defer k.release() // also when fn panics

	var token uint64
	if fenced, ok := lock.(Fenced); ok {
		token = fenced.Token()
	}
	err = fn(held, token)
	lost := context.Cause(held) == ErrLockExpired
	lost = k.release() || lost
	switch {
	case !lost:
		return err
	case err == nil, errors.Is(err, context.Canceled), errors.Is(err, ErrLockExpired):
		return ErrLockExpired
	}
	return errors.Join(ErrLockExpired, err)
}

// awaitLock acquires the lock and returns it with the timestamp up to which it can
// be counted on.
func awaitLock(ctx context.Context, store StateStore, key string, ttl time.Duration) (Lock, time.Time, error) {
	var released <-chan struct{}
	pause := minLockPause
	for {
		if err := ctx.Err(); err != nil {
			if released != nil {
				return nil, time.Time{}, ErrLockHeld
			}
			return nil, time.Time{}, fmt.Errorf("state: lock %q: %w", key, err)
		}
		asked := time.Now()
		lock, err := store.Lock(key, ttl)
		if err != ErrLockHeld {
			return lock, asked.Add(ttl), err
		}
		if released == nil {
			// From now on, and once more at once: it may have been released
			// before anybody listened.
			stop := func() {}
			if teller, ok := store.(releaseTeller); ok {
				released, stop = teller.onRelease(key)
			} else {
				released = make(chan struct{})
			}
			defer stop()
			continue
		}
		timer := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-released:
			pause = minLockPause
		case <-timer.C:
			pause = min(2*pause, maxLockPause)
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// A renewer keeps a lock refreshed while somebody works under it.
type renewer struct {
	lock   Lock
	ttl    time.Duration
	until  time.Time // owned by keep until it has stopped
	lose   context.CancelCauseFunc
	expiry *time.Timer // calls lose at until

	released      bool
	stop, stopped chan struct{}
}

// keep refreshes the lock every third of its TTL, and in short order after a
// failure, until it is told to stop or the lock is lost.
func (k *renewer) keep() {
	defer close(k.stopped)
	timer := time.NewTimer(k.ttl / 3)
	defer timer.Stop()
	for {
		select {
		case <-k.stop:
			return
		case <-timer.C:
		}
		asked := time.Now()
		switch err := k.lock.Refresh(); {
		case err == nil:
			// The timer has fired already if Refresh took too long, and then
			// the lock is lost whatever Refresh says.
			if !k.expiry.Stop() {
				return
			}
			k.until = asked.Add(k.ttl)
			k.expiry.Reset(time.Until(k.until))
			timer.Reset(k.ttl / 3)
		case err == ErrLockExpired || err == ErrLockNotHeld:
			k.lose(ErrLockExpired)
			return
		default:
			timer.Reset(min(k.ttl/20, 100*time.Millisecond))
		}
	}
}

// release stops the renewer and unlocks the lock, once. It reports whether the
// lock turned out to have been taken away. (That the lease ran out only now,
// when fn had returned already, is no loss.)
func (k *renewer) release() (lost bool) {
	if k.released {
		return false
	}
	k.released = true
	k.lose(nil) // fn's context ends with fn
	close(k.stop)
	<-k.stopped
	k.expiry.Stop()
	return k.lock.Unlock() == ErrLockNotHeld && time.Now().Before(k.until)
}
