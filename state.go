package state

import (
	"context"
	"time"
)

// StateStore provides distributed key-value storage with locking.
//
// All methods of a store and of its locks are safe for concurrent use. No
// method blocks without bound: one that waits for a server gives up after five
// seconds without progress.
type StateStore interface {
	// Get retrieves a value by key. It returns ErrNotFound if the key does not
	// exist and ErrInvalidKey if it cannot. A read sees every write that was
	// acknowledged before it began, by anyone; [NATSStore] names the one
	// exception, in a network partition. The bytes are the caller's own;
	// a value stored as nil or empty is an empty, non-nil slice.
	Get(key string) ([]byte, error)

	// GetKeyValue retrieves the full KeyValue entry, under the same terms as
	// Get.
	GetKeyValue(key string) (*KeyValue, error)

	// Put stores a copy of value. It replaces the key's value and TTL: the
	// entry is visible until ttl after it was written, by the store's clock,
	// then the key does not exist. If ttl is 0, the key never expires (or after
	// the store's default TTL, where its configuration sets one). It returns
	// ErrInvalidKey, ErrInvalidTTL for a negative ttl, and ErrValueTooLarge for
	// a value over the store's limit, before anything is sent. After any other
	// error nothing was written, unless errors.Is says ErrOutcomeUnknown.
	Put(key string, value []byte, ttl time.Duration) error

	// Delete removes a key. It returns nil if the key does not exist, and then
	// writes nothing and causes no event. Errors are as for Put.
	Delete(key string) error

	// Keys returns all keys matching a pattern, sorted. Every key that exists
	// throughout the call is in the answer, once; an incomplete answer is an
	// error. The pattern is a key, or the beginning of a key followed by one
	// "*", or "*" alone, see [MatchPattern]; ErrInvalidKey if it could match no
	// key. The slice is the caller's own, empty and not nil if nothing matches.
	Keys(pattern string) ([]string, error)

	// Watch watches for changes to keys matching a pattern, of the same form as
	// for Keys. Every Put, Delete and expiry of a matching key after Watch has
	// returned is told: OpPut carries the entry; OpDelete carries Key, Revision
	// and Modified, a nil Value and a zero Created. A deletion has a revision
	// of its own; an expiry, told at the deadline, has the revision of the
	// value that expired.
	//
	// For one key events come in the order of their revisions, none twice. A
	// slow reader blocks nobody: up to 1024 events wait in order; beyond that a
	// newer event of a key takes the place of that key's older one still
	// waiting. The last state of every key always arrives.
	//
	// The channel is closed when the watch ends: when the store is closed, or
	// when it can no longer tell whether it missed something (see the backend).
	// The events are the reader's own.
	Watch(pattern string) (<-chan *KeyValue, error)

	// Lock acquires a distributed lock with the given TTL, or returns
	// ErrLockHeld at once if somebody holds it. It returns ErrInvalidKey, and
	// ErrInvalidTTL if ttl is not positive; and ErrLockExpired if the lease has
	// lapsed by the time that the answer is here, so that it is of no use. Locks are a name space of their
	// own: they are not seen by Get, Keys or Watch.
	//
	// A lock is a lease: it lapses when its TTL passes without a Refresh, by
	// the store's clock, whatever its holder believes. See [Fenced] for what
	// that means to a holder that was paused.
	Lock(key string, ttl time.Duration) (Lock, error)

	// Close shuts down the store and releases resources: it ends all watches
	// and returns when their goroutines are gone. Afterwards every method
	// returns ErrClosed, except Close itself, which returns nil. Locks that are
	// still held can still be unlocked; otherwise they lapse.
	Close() error
}

// KeyValue represents a key-value entry with metadata.
type KeyValue struct {
	// Key is the entry key.
	Key string
	// Value is the entry value: never nil in an entry, always nil in an
	// OpDelete.
	Value []byte
	// Revision is a monotonic version number: it grows with every change in the
	// store, never repeats and never goes back.
	Revision uint64
	// Operation indicates the type of change.
	Operation Operation
	// Created is when the key was first created: when it came into being since
	// it was last absent, by the store's clock. Zero in an OpDelete.
	Created time.Time
	// Modified is when the key was last modified: when this revision was
	// written or, for an expiry, its deadline, by the store's clock.
	Modified time.Time
}

// Lock represents a distributed lock that somebody was granted.
type Lock interface {
	// Unlock releases the lock. It returns ErrLockNotHeld if there is nothing
	// of this holder's to release: it was released already, or the lease has
	// lapsed. It never releases somebody else's lock. After any other error it
	// may be called again.
	Unlock() error

	// Refresh extends the lock TTL: the lease runs for its full TTL again, from
	// before the request was sent. It returns ErrLockExpired if the lock has
	// expired, whether or not somebody else holds it by now, and ErrLockNotHeld
	// after Unlock. After any other error the lease runs on as it was; Refresh
	// may be called again.
	Refresh() error

	// Key returns the lock key, as it was given to StateStore.Lock.
	Key() string
}

// Operation is the type of change that an event tells.
type Operation int

const (
	// OpPut is the operation of an entry that was written.
	OpPut Operation = iota
	// OpDelete is the operation of a key that was deleted or expired.
	OpDelete
)

// String returns "put", "delete" or, for anything else, "unknown".
func (op Operation) String() string {
	switch op {
	case OpPut:
		return "put"
	case OpDelete:
		return "delete"
	}
	return "unknown"
}

// Fenced is a lock with a fencing token. The locks of both stores implement it.
//
// A lock is a lease, so its holder can lose it without noticing: it was paused,
// by the garbage collector, the scheduler or a closed laptop, for longer than
// its TTL, and goes on as if nothing had happened when somebody else already
// holds the lock. No lock service can prevent that; the resource that the lock
// protects can. It remembers the highest token that it has seen and refuses
// what comes with a lower one.
type Fenced interface {
	Lock
	// Token returns a number that is strictly greater for each next holder of
	// the lock of this name. It does not change with Refresh.
	Token() uint64
}

// Updater is the interface of a store with compare-and-set. Both stores
// implement it.
type Updater interface {
	// Update writes value, with the TTL, only if the key's revision is still
	// the given one; 0 means only if the key does not exist. It returns the new
	// revision, or ErrConflict if somebody was faster. An expired or deleted key
	// does not exist. Other errors are as for Put.
	Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error)
}

// ContextWatcher is the interface of a store whose watches can be ended one by
// one. Both stores implement it.
type ContextWatcher interface {
	// WatchContext is Watch until ctx is done: then the channel is closed, and
	// the watch's resources are released. If ctx is done already, it returns
	// the context's error.
	WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error)
}
