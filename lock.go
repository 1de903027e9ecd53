package state

import "time"

// A lessor is what a backend supplies for the locks that it grants. Both
// methods are called by one goroutine at a time for a lease.
type lessor interface {
	// extend restarts the lease's TTL. It returns ErrLockExpired if the lease
	// has lapsed or was taken away, and ErrClosed after Close.
	extend(l *lease) error
	// release ends the lease. It returns ErrLockNotHeld if nothing of it is
	// left.
	release(l *lease) error
}

// A lease is a lock from its holder's side, on every backend:
//
//	held --Unlock--> released
//	held --the TTL passes without a Refresh--> lapsed
//
// Nothing leads back. The holder's own view is conservative: it counts the TTL
// from before the request was sent, so it sees the lease lapse before the store
// does, and nobody else can have been granted the lock until then.
type lease struct {
	key    string
	ttl    time.Duration
	token  uint64 // the revision of the acquisition
	lessor lessor

	turn     chan struct{} // of one slot: held by Refresh and Unlock; guards what follows
	until    time.Time     // when the lease lapses, at the latest by the local clock
	lapsed   bool
	released bool

	// What the backend keeps here.
	revision uint64 // of the record, as far as it is known
	owner    string // tells this acquisition from any other
	unsure   bool   // the fate of a write is not known: the record may be a later one
	writes   int    // how many there have been since
}

var _ Fenced = (*lease)(nil)

// newLease returns the lease for a lock that was granted on a request made at
// asked.
func newLease(b lessor, key string, ttl time.Duration, asked time.Time, token uint64) *lease {
	return &lease{
		key: key, ttl: ttl, token: token, lessor: b, revision: token,
		turn:  make(chan struct{}, 1),
		until: asked.Add(ttl),
	}
}

// handOver returns the lease to its holder, unless it has lapsed on the way.
func (l *lease) handOver() (Lock, error) {
	if l.lapse(time.Now()) {
		_ = l.lessor.release(l)
		return nil, ErrLockExpired
	}
	return l, nil
}

func (l *lease) Key() string   { return l.key }
func (l *lease) Token() uint64 { return l.token }

func (l *lease) Refresh() error {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	if l.released {
		return ErrLockNotHeld
	}
	asked := time.Now()
	if l.lapse(asked) {
		return ErrLockExpired
	}
	err := l.lessor.extend(l)
	switch {
	case err == ErrLockExpired:
		l.lapsed = true
	case err == nil && l.lapse(time.Now()):
		// The answer came after the lease had lapsed for all that the holder
		// knew. It may have been granted in time, but that must not matter.
		_ = l.lessor.release(l)
		return ErrLockExpired
	case err == nil:
		l.until = asked.Add(l.ttl)
	}
	return err
}

func (l *lease) Unlock() error {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	if l.released || l.lapse(time.Now()) && !l.unsure {
		return ErrLockNotHeld
	}
	err := l.lessor.release(l)
	if err == nil || err == ErrLockNotHeld {
		l.released = true
	}
	if err == nil && l.lapsed {
		return ErrLockNotHeld // only the rest of an extension that came to nothing
	}
	return err
}

// lapse reports whether the lease has lapsed, and makes it so for good.
func (l *lease) lapse(now time.Time) bool {
	if !now.Before(l.until) {
		l.lapsed = true
	}
	return l.lapsed
}
