package state

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync/atomic"
	"time"
)

// A lockWaiter is a store that can wait for a lock without polling.
type lockWaiter interface {
	// awaitLock waits for a lock until ctx ends. It returns ErrLockHeld if
	// somebody held the lock when it last looked, and any other error of Lock at
	// once. ctx does not bound the Refresh of the lock.
	awaitLock(ctx context.Context, key string, ttl time.Duration) (Lock, error)
}

const (
	// The pause of Acquire after a failure and, on a store that is no lockWaiter,
	// between two looks at a lock.
	minLockPause = 5 * time.Millisecond
	maxLockPause = time.Second
	// maxLapsed is how many leases in a row may lapse before they can be used.
	maxLapsed = 10
)

// Acquire acquires a lock on any store. It waits while somebody holds the lock,
// and through outages, until ctx ends. Waiters are not queued: any of them may get
// the lock next.
//
// It returns these at once: [ErrClosed], [ErrInvalidKey], [ErrInvalidTTL], and the
// error of a connection that its owner has closed. It returns [ErrLockExpired] if
// ten leases in a row had lapsed when the answer arrived: the TTL is too short for
// the distance to the store. When ctx ends, it returns the bare [ErrLockHeld] if
// somebody held the lock when Acquire last looked, and otherwise an error that wraps
// the context's and the last failure. If an attempt may have acquired the lock, and
// it is not known to be free again, an error other than ErrLockHeld also wraps
// [ErrOutcomeUnknown].
//
// ctx replaces any context that store is bound to. It bounds the acquisition only:
// the lock can be refreshed after ctx has ended.
//
// On a NATSStore or MemoryStore a waiter does not poll: a release or the end of the
// lease wakes it. ([NATSStoreConfig] names the exceptions.) On a store that wraps one
// of them, Acquire calls LockHolder after pauses that grow to a second, and when the
// lease that it found ends. It tries again when nobody holds the lock. The LockHolder of
// such a store has to report the locks that its Lock acquires. A lock that is granted
// there as ctx ends is unlocked, which may take five seconds. On a StateStore without
// LockHolder, Acquire calls Lock again after each pause.
func Acquire(ctx context.Context, store StateStore, key string, ttl time.Duration) (Lock, error) {
	lock, _, err := acquire(ctx, store, key, ttl)
	return lock, err
}

// acquire is Acquire, and returns until when the lock can be counted on; zero if
// that is not known.
func acquire(ctx context.Context, store StateStore, key string, ttl time.Duration) (Lock, time.Time, error) {
	await := func() (Lock, time.Time, error) { return pollLock(ctx, store, key, ttl) }
	if waiter, ok := own[lockWaiter](store); ok {
		await = func() (Lock, time.Time, error) {
			lock, err := waiter.awaitLock(ctx, key, ttl)
			return lock, validUntil(lock), err
		}
	}
	retry := backoff{minLockPause, maxLockPause}
	var failure, doubt error // the last one, and the last one of unknown outcome
	for lapsed := 0; ctx.Err() == nil; retry.wait(ctx, math.MaxInt64) {
		lock, until, err := await()
		switch {
		case err == nil:
			return lock, until, nil
		case err == ErrLockHeld && ctx.Err() != nil:
			return nil, time.Time{}, err
		case final(err):
			return nil, time.Time{}, afterDoubt(err, doubt)
		case err == ErrLockExpired:
			if lapsed++; lapsed == maxLapsed {
				return nil, time.Time{}, err
			}
			failure, doubt = err, nil // it was granted: nothing is left of an earlier attempt
			continue
		case errors.Is(err, ErrOutcomeUnknown):
			failure, doubt = err, err
		case failure == nil || ctx.Err() == nil:
			failure = err // else it says only that ctx has ended
		}
		lapsed = 0
	}
	err := ctx.Err()
	switch {
	case failure == nil, failure == ErrLockExpired, failure == ErrLockHeld:
		failure = opError("lock", key, err)
	case !errors.Is(failure, err):
		failure = fmt.Errorf("state: lock %q: %w; the last failure: %w", key, err, failure)
	}
	return nil, time.Time{}, afterDoubt(failure, doubt)
}

// afterDoubt returns err, which also wraps the error of an earlier attempt of unknown
// outcome if there is one.
func afterDoubt(err, doubt error) error {
	if doubt == nil || errors.Is(err, ErrOutcomeUnknown) {
		return err
	}
	return fmt.Errorf("%w; an earlier attempt: %w", err, doubt)
}

// pollLock is awaitLock for any store. It also returns until when the lock can be
// counted on.
func pollLock(ctx context.Context, store StateStore, key string, ttl time.Duration) (Lock, time.Time, error) {
	full, _ := store.(Store)
	for retry := (backoff{minLockPause, maxLockPause}); ; {
		var lock Lock
		var err error
		asked := time.Now()
		if full == nil {
			lock, err = store.Lock(key, ttl)
		} else {
			lock, err = lockWithin(ctx, full, key, ttl)
		}
		if err != ErrLockHeld {
			return lock, asked.Add(ttl), err
		}
		if !awaitRelease(ctx, full, key, &retry) {
			return nil, time.Time{}, ErrLockHeld
		}
	}
}

// awaitRelease waits until a lock that is held may be free, and reports whether
// that happened before ctx ended. It does not try to acquire the lock: if ctx cut
// such an attempt short, nobody would know who holds it. With a nil store, which
// cannot say who holds the lock, awaitRelease returns after one pause.
func awaitRelease(ctx context.Context, store Store, key string, retry *backoff) bool {
	for end := (time.Time{}); ; { // of the lease that it found last
		pause, ends := retry.next(), false
		if left := time.Until(end); 0 < left && left < pause {
			pause, ends = left, true
		}
		sleep(ctx, pause)
		if store == nil || ctx.Err() != nil {
			return ctx.Err() == nil
		}
		info, err := store.WithContext(ctx).LockHolder(key)
		switch {
		case err == ErrNotFound:
			return true
		case err == nil:
			if ends && !info.Expires.After(end) {
				*retry = backoff{minLockPause, maxLockPause} // it is free soon
			}
			end = info.Expires
		default:
			return ctx.Err() == nil // the next attempt says why
		}
	}
}

// lockWithin is Lock, bounded by ctx. Unlike with store.WithContext(ctx), the
// Refresh of the lock is not.
func lockWithin(ctx context.Context, store Store, key string, ttl time.Duration) (Lock, error) {
	if err := ctx.Err(); err != nil {
		return nil, opError("lock", key, err)
	}
	call, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, cancel)
	lock, err := store.WithContext(call).Lock(key, ttl)
	if !stop() && err == nil {
		// Its Refresh is bound to a context that has ended.
		if err := lock.Unlock(); err != nil && err != ErrLockNotHeld {
			return nil, opError("lock", key, fmt.Errorf("%w: %w; %w", ErrOutcomeUnknown, ctx.Err(), err))
		}
		return nil, opError("lock", key, ctx.Err())
	}
	return lock, err
}

// validUntil returns until when a lock can be counted on, by the local clock; zero
// if it does not say.
func validUntil(lock Lock) time.Time {
	if l, ok := lock.(interface{ validUntil() time.Time }); ok {
		return l.validUntil()
	}
	return time.Time{}
}

// Hold runs fn while it holds a lock, keeps the lock refreshed for as long as fn
// runs, and unlocks it on every way out, panics included. ttl is the TTL that the
// lock was acquired with. A ttl of a few milliseconds cannot be kept up.
//
// fn starts with at least two thirds of the lease left. If less is left, or Hold
// cannot know, it refreshes the lock first. The context that fn gets ends with
// ctx. It also ends when the lease can no longer be counted on by the local clock,
// even if no packet gets through; its cause is then [ErrLockExpired]. fn should
// stop then, because somebody else may soon hold the lock. The token is the
// fencing token of [Fenced], or 0 if the lock has none; pass it to the resource
// that the lock protects.
//
// Hold returns:
//   - if fn was not called: ErrLockExpired or [ErrLockNotHeld] if the lock was
//     lost before, an error that wraps the context's if ctx ended before,
//     [ErrClosed], [ErrInvalidTTL], or the error of a connection that its owner has
//     closed.
//   - if the lease was lost while fn ran: an error for which errors.Is reports
//     ErrLockExpired. It also wraps the error of fn, unless that is the error of
//     fn's context.
//   - otherwise: what fn returned.
//
// Hold returns after fn and Unlock. While the server cannot be reached, that can
// be ten seconds after fn: a Refresh that is under way takes up to five, and so
// does Unlock. It can be five more if the lease ends meanwhile.
//
// It costs a request each third of the TTL and one to unlock.
func Hold(ctx context.Context, lock Lock, ttl time.Duration, fn func(ctx context.Context, token uint64) error) error {
	_, err := hold(ctx, lock, ttl, validUntil(lock), fn)
	return err
}

// WithLock is [Acquire] and then [Hold]: it runs fn while it holds the lock of key,
// on any store.
//
// WithLock returns:
//   - if ctx ended before fn could be called: the bare [ErrLockHeld] if somebody
//     held the lock when Acquire last looked, and otherwise an error that wraps
//     the context's. fn was not called.
//   - if the lock cannot be acquired: another error of Acquire, or of Hold if the
//     store or its connection was closed just then. fn was not called.
//     It is ErrLockExpired if ten leases in a row lapsed before fn could be called.
//   - if the lease was lost while fn ran: an error for which errors.Is reports
//     ErrLockExpired. It also wraps the error of fn, unless that is the error of
//     fn's context.
//   - otherwise: what fn returned.
func WithLock(ctx context.Context, store StateStore, key string, ttl time.Duration, fn func(ctx context.Context, token uint64) error) error {
	retry := backoff{minLockPause, maxLockPause}
	for lapsed := 1; ; lapsed++ {
		lock, until, err := acquire(ctx, store, key, ttl)
		if err != nil {
			return err
		}
		called, err := hold(ctx, lock, ttl, until, fn)
		if called || err != ErrLockExpired || lapsed == maxLapsed {
			return err
		}
		retry.wait(ctx, math.MaxInt64)
	}
}

// hold is Hold of a lock that can be counted on until then, if that is not zero.
// It reports whether fn was called.
func hold(ctx context.Context, lock Lock, ttl time.Duration, until time.Time, fn func(ctx context.Context, token uint64) error) (called bool, err error) {
	r := &renewer{lock: lock, ttl: ttl, until: until}
	if err := r.ensureFresh(ctx); err != nil {
		_ = lock.Unlock()
		return false, err
	}
	held := r.start(ctx)
	defer r.release() // also when fn panics

	var token uint64
	if fenced, ok := lock.(Fenced); ok {
		token = fenced.Token()
	}
	err = fn(held, token)
	ended := held.Err()
	lost := r.lost.Load() // before the release, as a lease that ends now is no loss
	lost = r.release() || lost
	switch {
	case !lost:
		return true, err
	case err == nil, err == ErrLockExpired, err == ended:
		return true, ErrLockExpired
	}
	return true, fmt.Errorf("%w: %w", ErrLockExpired, err)
}

// A renewer keeps a lock refreshed while somebody works under it.
type renewer struct {
	lock  Lock
	ttl   time.Duration
	until time.Time // when the lease ends; owned by keep while that runs

	lost   atomic.Bool             // the lease can no longer be counted on
	cancel context.CancelCauseFunc // ends the context of the work
	expiry *time.Timer             // calls markLost at until

	released      bool
	stop, stopped chan struct{}
}

// refresh refreshes the lock.
func (r *renewer) refresh() error {
	asked := time.Now()
	err := r.lock.Refresh()
	if err == nil {
		// A Refresh that joins another one has been asked for earlier.
		if r.until = validUntil(r.lock); r.until.IsZero() {
			r.until = asked.Add(r.ttl)
		}
	}
	return err
}

// ensureFresh makes sure that at least two thirds of the lease are left.
func (r *renewer) ensureFresh(ctx context.Context) error {
	if r.ttl <= 0 {
		return ErrInvalidTTL
	}
	end := r.until
	if end.IsZero() {
		end = time.Now().Add(r.ttl) // at the latest, as it was acquired before
	}
	retry := backoff{max(min(r.ttl/20, minLockPause), minRenewal), maxLockPause}
	for slow := 0; ; {
		if err := ctx.Err(); err != nil {
			return opError("hold", r.lock.Key(), err)
		}
		if time.Until(r.until) >= r.ttl-r.ttl/3 {
			return nil
		}
		if slow == maxLapsed {
			return ErrLockExpired // whenever the answer comes, it is almost over
		}
		err := r.refresh()
		switch {
		case err == nil:
			slow++
			end = r.until
		case err == ErrLockExpired, err == ErrLockNotHeld, final(err):
			return err
		case !time.Now().Before(end):
			return ErrLockExpired
		default:
			retry.wait(ctx, time.Until(end))
		}
	}
}

// start begins to keep the lock refreshed. The context that it returns ends when
// the lock is lost.
func (r *renewer) start(ctx context.Context) context.Context {
	held, cancel := context.WithCancelCause(ctx)
	r.cancel = cancel
	r.stop, r.stopped = make(chan struct{}), make(chan struct{})
	r.expiry = time.AfterFunc(time.Until(r.until), r.markLost)
	go r.keep()
	return held
}

// markLost ends the work, as the lock is lost.
func (r *renewer) markLost() {
	r.lost.Store(true)
	r.cancel(ErrLockExpired)
}

// keep refreshes the lock every third of its TTL, and in short order after a
// failure, until it is stopped or the lock is lost.
func (r *renewer) keep() {
	defer close(r.stopped)
	next := func() time.Duration { // when a third of the lease is over
		return max(time.Until(r.until)-(r.ttl-r.ttl/3), minRenewal)
	}
	timer := time.NewTimer(next())
	defer timer.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-timer.C:
		}
		switch err := r.refresh(); {
		case err == nil:
			// The timer has fired already if Refresh took too long, and then
			// the lock is lost whatever Refresh says.
			if !r.expiry.Stop() {
				return
			}
			r.expiry.Reset(time.Until(r.until))
			timer.Reset(next())
		case err == ErrLockExpired, err == ErrLockNotHeld:
			r.markLost()
			return
		default:
			timer.Reset(max(min(r.ttl/20, 100*time.Millisecond), minRenewal))
		}
	}
}

// release stops the renewer and unlocks the lock, once. It reports whether the
// lock turned out to have been taken away. (That the lease ran out only now,
// when fn had returned already, is no loss.)
func (r *renewer) release() (lost bool) {
	if r.released {
		return false
	}
	r.released = true
	r.cancel(nil) // fn's context ends with fn
	close(r.stop)
	<-r.stopped
	r.expiry.Stop()
	return r.lock.Unlock() == ErrLockNotHeld && time.Now().Before(r.until)
}
