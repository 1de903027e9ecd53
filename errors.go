package state

import (
	"errors"
	"fmt"
)

// The documented outcomes. Every method of every backend returns them bare, so that
// both == and errors.Is work, with the exceptions below. Anything else that a method
// returns names the operation and the key and wraps its cause.
var (
	// ErrNotFound is returned for a key that does not exist: never written,
	// deleted or expired.
	ErrNotFound = errors.New("key not found")

	// ErrClosed is returned by every method of a store after Close, except Close
	// itself, and by calls that Close ends; the error of a write in doubt wraps it,
	// and so does that of an Acquire or WithLock one of whose attempts is in doubt.
	// Unlock still works.
	ErrClosed = errors.New("store closed")

	// ErrLockHeld is returned by Lock while somebody holds the lock, and by
	// [Acquire] and [WithLock] if somebody held it when they last looked before their
	// context ended.
	ErrLockHeld = errors.New("lock already held")

	// ErrLockNotHeld is returned by Unlock when this holder no longer holds the
	// lock: it was unlocked before, its lease has lapsed, or it was taken away.
	// Refresh returns it after Unlock.
	ErrLockNotHeld = errors.New("lock not held")

	// ErrLockExpired is returned by Refresh once the lease has lapsed or the lock
	// was taken away, whether or not somebody else holds it by now; by Lock if the
	// lease lapsed before the answer arrived, by [Acquire] if that happened ten times
	// in a row, and by [Hold] if the lock was lost before its function ran. The error
	// of Hold and [WithLock] wraps it if the lock was lost while their function ran.
	ErrLockExpired = errors.New("lock expired")

	// ErrInvalidKey is returned for a key, lock name or pattern that
	// [ValidateKey] or the rules for patterns refuse.
	ErrInvalidKey = errors.New("invalid key")

	// ErrInvalidTTL is returned for a negative TTL. For a lock, and from KeepAlive,
	// zero is refused as well.
	ErrInvalidTTL = errors.New("invalid TTL")

	// ErrWatchClosed is returned by Watch when what would end a running watch
	// has happened before this one began: the connection is closed for good, or
	// the bucket is gone. A watch that is already running closes its channel
	// instead.
	ErrWatchClosed = errors.New("watch closed")
)

// What the additions to the documented API return, bare as well.
var (
	// ErrConflict is returned by Update and DeleteRevision when the key's
	// revision is not the given one. Nothing was written. [NATSStore] names an
	// exception, which needs a leader that was cut off.
	ErrConflict = errors.New("revision conflict")

	// ErrValueTooLarge is returned for a value that is larger than the store's
	// limit. Nothing was sent.
	ErrValueTooLarge = errors.New("value too large")

	// ErrStoreFull is returned for a write that would exceed what the store may
	// hold, such as the max_bytes of a bucket. Nothing was written. Delete still
	// works, unless the bucket refuses purges; DeleteRevision may need room.
	ErrStoreFull = errors.New("store full")
)

// ErrOutcomeUnknown is wrapped by the error of a write whose answer was lost
// and whose fate could not be determined in time: it was applied, or it may
// still take effect shortly, or it never will. An Update or a DeleteRevision can
// only ever take effect on the revision that it names. A write that failed with
// any other error was not applied.
var ErrOutcomeUnknown = errors.New("outcome unknown")

// errUnopened is what the methods of a zero store return.
var errUnopened = errors.New("state: the store was not opened: it is a zero value, not one from NewMemoryStore or NewNATSStore")

// isOutcome reports whether err is a documented outcome, which is always bare.
func isOutcome(err error) bool {
	switch err {
	case ErrNotFound, ErrConflict, ErrClosed, ErrWatchClosed, ErrInvalidKey, ErrInvalidTTL, ErrValueTooLarge, ErrStoreFull,
		ErrLockHeld, ErrLockExpired, ErrLockNotHeld, errUnopened:
		return true
	}
	return false
}

// opError adds the operation and the key to a failure.
func opError(verb, key string, err error) error {
	if err == nil || isOutcome(err) {
		return err
	}
	if errors.Is(err, ErrClosed) && !errors.Is(err, ErrOutcomeUnknown) {
		return ErrClosed
	}
	return fmt.Errorf("state: %s %q: %w", verb, key, err)
}
