package state

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"
)

// A lessor is what a backend supplies for the locks that it grants. Its methods
// are called by one goroutine at a time for a lease.
type lessor interface {
	// extend restarts the lease's TTL. It returns ErrLockExpired if the lease
	// has lapsed or was taken away, and ErrClosed after Close.
	extend(ctx context.Context, l *lease) error
	// release ends the lease. It returns ErrLockNotHeld if nothing of it is
	// left. It works after Close, too.
	release(ctx context.Context, l *lease) error
}

// lockTimeout is how long Refresh and Unlock take at most, whatever they wait
// for. A Refresh that was granted too late takes as long again to give it back.
const lockTimeout = 5 * time.Second

// A lease is a lock from its holder's side, on every backend:
//
//	held --Unlock--> released
//	held --the TTL passes without a Refresh--> lapsed
//
// Nothing leads back. The holder's own view is conservative: it counts the TTL
// from before the request was sent, so it sees the lease lapse before the store
// does, and nobody else can have been granted the lock until then. Whether the
// lease is still running is decided by this view alone.
type lease struct {
	key    string
	ttl    time.Duration
	token  uint64 // the revision of the acquisition
	lessor lessor
	ctx    context.Context // bounds Refresh

	mu       sync.Mutex // guards what follows
	until    time.Time  // when the lease lapses, at the latest by the local clock
	lapsed   bool
	released bool
	refresh  *sharedRefresh // the one under way, nil if none is

	turn chan struct{} // of one slot: held by the call that talks to the lessor; guards what follows

	// What the backend keeps here.
	revision uint64 // of the record, as far as it is known
	owner    string // distinguishes this acquisition from any other
	inDoubt  bool   // the fate of a write is not known: the record may be a later one
	writes   int    // how many there have been since
	// yields is how often the holder, when it waits again after a release, lets
	// others go first: it had to wait for the lock.
	yields int
}

// A sharedRefresh is a Refresh whose result serves all who asked meanwhile.
type sharedRefresh struct {
	done chan struct{} // closed when err is set
	err  error
}

var _ Fenced = (*lease)(nil)

// newLease returns the lease for a lock that was granted on a request made at
// asked.
func newLease(ctx context.Context, b lessor, key string, ttl time.Duration, asked time.Time, token uint64) *lease {
	return &lease{
		key: key, ttl: ttl, token: token, lessor: b, ctx: ctx, revision: token,
		turn:  make(chan struct{}, 1),
		until: asked.Add(ttl),
	}
}

// handOver returns the lease to its holder, unless it has lapsed on the way.
// ctx bounds giving it back: for the store it lapses a round trip later anyway.
func (l *lease) handOver(ctx context.Context) (Lock, error) {
	if !time.Now().Before(l.validUntil()) {
		l.giveBack(ctx)
		return nil, ErrLockExpired
	}
	return l, nil
}

// giveBack releases what is of no use to the holder any more.
func (l *lease) giveBack(ctx context.Context) {
	l.mu.Lock()
	l.lapsed = true
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	_ = l.lessor.release(ctx, l)
}

func (l *lease) Key() string   { return l.key }
func (l *lease) Token() uint64 { return l.token }

// validUntil returns until when the holder can count on the lease, by the local
// clock.
func (l *lease) validUntil() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until
}

func (l *lease) Refresh() error {
	l.mu.Lock()
	if err := l.lostLocked(time.Now()); err != nil {
		l.mu.Unlock()
		return err
	}
	shared := l.refresh
	if shared == nil {
		shared = &sharedRefresh{done: make(chan struct{})}
		l.refresh = shared
		l.mu.Unlock()
		shared.err = l.extend()
		l.mu.Lock()
		l.refresh = nil
		l.mu.Unlock()
		close(shared.done)
		return shared.err
	}
	l.mu.Unlock()
	<-shared.done // within the time of one call
	return shared.err
}

// lostLocked returns why the lease cannot be refreshed, nil if it can.
func (l *lease) lostLocked(now time.Time) error {
	switch {
	case l.released:
		return ErrLockNotHeld
	case l.lapseLocked(now):
		return ErrLockExpired
	}
	return nil
}

func (l *lease) extend() error {
	ctx, cancel := context.WithTimeout(l.ctx, lockTimeout)
	defer cancel()
	select {
	case l.turn <- struct{}{}:
	default:
		select {
		case l.turn <- struct{}{}:
		case <-ctx.Done():
			return opError("refresh", l.key, ctx.Err()) // an Unlock is under way
		}
	}
	defer func() { <-l.turn }()
	asked := time.Now()
	l.mu.Lock()
	err := l.lostLocked(asked)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	err = l.lessor.extend(ctx, l)
	l.mu.Lock()
	switch {
	case err == ErrLockExpired:
		l.lapsed = true
	case err == nil && l.lapseLocked(time.Now()):
		// The answer came after the lease had lapsed as far as the holder knew.
		// It may have been granted in time, but that must not matter. The server
		// may hold it for long yet, so giveBack does not share the time of Refresh.
		l.mu.Unlock()
		l.giveBack(context.Background())
		return ErrLockExpired
	case err == nil:
		l.until = asked.Add(l.ttl)
	}
	l.mu.Unlock()
	return err
}

func (l *lease) Unlock() error {
	ctx, cancel := context.WithTimeout(context.Background(), lockTimeout)
	defer cancel()
	select {
	case l.turn <- struct{}{}:
	case <-ctx.Done():
		return opError("unlock", l.key, ctx.Err()) // a Refresh is under way
	}
	defer func() { <-l.turn }()
	l.mu.Lock()
	over := l.released || l.lapseLocked(time.Now()) && !l.inDoubt
	l.mu.Unlock()
	if over {
		return ErrLockNotHeld
	}
	err := l.lessor.release(ctx, l)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil || err == ErrLockNotHeld {
		l.released = true
	}
	if err == nil && l.lapsed {
		return ErrLockNotHeld // only the rest of an extension that came to nothing
	}
	return err
}

// lapseLocked reports whether the lease has lapsed, and makes it so for good.
func (l *lease) lapseLocked(now time.Time) bool {
	if !now.Before(l.until) {
		l.lapsed = true
	}
	return l.lapsed
}

// processName names this process as the owner of a lock: host and process ID.
func processName() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s:%d", host, os.Getpid())
}
