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
	// acknowledged before it began, by anyone; [NATSStore] names the exceptions.
	// The bytes are the caller's own; a value stored as nil or empty is an empty,
	// non-nil slice.
	Get(key string) ([]byte, error)

	// GetKeyValue retrieves the full KeyValue entry, under the same terms as
	// Get.
	GetKeyValue(key string) (*KeyValue, error)

	// Put stores a copy of value. It replaces the key's value and TTL: the
	// entry is visible until ttl after it was written, by the store's clock,
	// then the key does not exist. If ttl is 0, the key never expires (or expires
	// after the store's default TTL, if one is configured). Put is
	// unconditional: it never fails because others write the same key.
	//
	// It returns ErrInvalidKey, ErrInvalidTTL for a negative ttl, and
	// ErrValueTooLarge for a value over the store's limit, before anything is
	// sent. After any other error nothing was written, unless errors.Is reports
	// ErrOutcomeUnknown.
	Put(key string, value []byte, ttl time.Duration) error

	// Delete removes a key. It returns nil if the key does not exist, and then
	// writes nothing and causes no event. It is unconditional, as Put is; errors
	// are as for Put.
	Delete(key string) error

	// Keys returns all keys matching a pattern, sorted. Every key that exists
	// throughout the call is in the answer, once; an incomplete answer is an
	// error. The pattern is a key, or the beginning of a key followed by one
	// "*", or "*" alone, see [MatchPattern]; ErrInvalidKey if it could match no
	// key. The slice is the caller's own, empty and not nil if nothing matches.
	Keys(pattern string) ([]string, error)

	// Watch watches for changes to keys matching a pattern, of the same form as
	// for Keys. It reports state, not a log: it delivers every Put, Delete and
	// expiry of a matching key made after Watch has returned, except that a
	// state which was replaced before it could be delivered may be skipped. The
	// last state of every key is always delivered; [NATSStore] names what it may
	// report late, or not at all.
	//
	// OpPut carries the entry. OpDelete carries Key, Revision and Modified, a
	// nil Value and zero Created and Expires. A deletion has a revision of its
	// own; an expiry, delivered at the deadline, has the revision of the value
	// that expired. A value that was refreshed in time is not reported as expired
	// ([NATSStore] names the exceptions). For one key, events come in the order
	// of their revisions, without duplicates.
	//
	// A slow reader blocks nobody: once 1,024 events wait, a new event of a key
	// takes the place of the newest one of that key that waits, so memory is bounded
	// by the number of keys that changed.
	//
	// The channel is closed when the watch ends: when the store is closed, or
	// when the watch can no longer tell whether it missed something (see the
	// backend). [Follow] starts over by itself. The events are the reader's own.
	Watch(pattern string) (<-chan *KeyValue, error)

	// Lock acquires a distributed lock with the given TTL, or returns
	// ErrLockHeld at once if somebody holds it. It returns ErrInvalidKey,
	// ErrInvalidTTL if ttl is not positive, and ErrLockExpired if the lease has
	// lapsed by the time that the answer arrives. Locks are a name space of
	// their own: they are not visible through Get, Keys or Watch. [Acquire]
	// waits for a lock, [WithLock] also keeps it.
	//
	// A lock is a lease: it lapses when its TTL passes without a Refresh, by
	// the store's clock, whatever its holder believes. See [Fenced] for what
	// that means to a holder that was paused.
	Lock(key string, ttl time.Duration) (Lock, error)

	// Close shuts down the store and releases resources: it ends all watches
	// and returns when their goroutines have finished. Calls in progress return
	// ErrClosed promptly, or an error that wraps ErrOutcomeUnknown as well if
	// they were writing. Afterwards every method returns ErrClosed, except
	// Close itself, which returns nil. Locks that are still held can still be
	// unlocked; otherwise they lapse.
	Close() error
}

// Store is what both stores implement: StateStore and what programs need beside
// it. Depend on it rather than on a backend.
type Store interface {
	StateStore

	// Update writes value, with the TTL, only if the key's revision is still
	// the given one; 0 means only if the key does not exist. It returns the new
	// revision, or ErrConflict, and then nothing was written. An expired or
	// deleted key does not exist. Other errors are as for Put.
	//
	// A NATSStore checks the deadline of the value that it replaces before it
	// sends the request. An Update that reaches the server after this deadline
	// and before the server has removed the value succeeds: the server compares
	// revisions, not times. A watch then reports the expiry and a new key.
	Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error)

	// DeleteRevision deletes the key only if its current revision is the given
	// one. Otherwise, and if the key does not exist, it returns ErrConflict and
	// nothing was written. Other errors are as for Put. On NATS it costs one
	// request, or two if the store has not seen the revision.
	DeleteRevision(key string, revision uint64) error

	// Entries returns the entries of all keys matching a pattern, sorted by key:
	// every key that exists throughout the call, once, as GetKeyValue would
	// return it; an incomplete answer is an error. A key whose last change is
	// not newer than the newest revision returned is in the answer if it exists.
	// It is one pass, however many entries there are. The entries are the
	// caller's own. Patterns and errors are as for Keys.
	Entries(pattern string) ([]*KeyValue, error)

	// LockHolder returns who holds a lock, or ErrNotFound if nobody does. It is
	// a read, under the terms of Get; by the time that it returns, the holder
	// may be another one.
	LockHolder(key string) (*LockInfo, error)

	// WithContext returns the same store bound to ctx, in place of any context
	// it was bound to before; nil is none. It costs no goroutine and no request.
	// Calls and watches end when ctx ends. The error of a call then wraps the
	// context's error, and ErrOutcomeUnknown if the call may have written.
	//
	// For a lock, ctx bounds Lock and Refresh, but not Unlock. A Refresh whose
	// answer came after the lease had lapsed may take five seconds more to give the
	// lock back. Close closes the store itself.
	WithContext(ctx context.Context) Store
}

// KeyValue represents a key-value entry with metadata.
type KeyValue struct {
	// Key is the entry key.
	Key string
	// Value is the entry value: never nil in an entry, always nil in an
	// OpDelete.
	Value []byte
	// Revision is a monotonic version number: each write and each deletion in the
	// store has a greater one than any before. The event of an expiry has the
	// revision of the value that expired. A bucket that is deleted and created
	// again begins with new revisions.
	Revision uint64
	// Operation indicates the type of change.
	Operation Operation
	// Created is when the key was first created: when it came into being since
	// it was last absent, by the store's clock. Zero in an OpDelete.
	Created time.Time
	// Modified is when the key was last modified: when this revision was
	// written or, for an expiry, its deadline, by the store's clock.
	Modified time.Time
	// Expires is the deadline by the store's clock: from then on the key does
	// not exist. Zero means never; it is also zero in an OpDelete.
	Expires time.Time
}

// Lock represents a distributed lock that was granted to its holder.
type Lock interface {
	// Unlock releases the lock. It returns ErrLockNotHeld if there is nothing
	// of this holder's to release: it was released already, or the lease has
	// lapsed. It never releases somebody else's lock. After any other error it
	// may be called again. It takes at most five seconds, even if a Refresh is in
	// progress.
	Unlock() error

	// Refresh extends the lock TTL: the lease runs for its full TTL again, from
	// before the request was sent. It returns ErrLockExpired if the lock has
	// expired or was taken away, whether or not somebody else holds it by now, and
	// ErrLockNotHeld after Unlock. After any other error the lease runs on as it
	// was; Refresh may be called again. Concurrent calls share one request.
	Refresh() error

	// Key returns the lock key, as it was given to StateStore.Lock.
	Key() string
}

// LockInfo describes who holds a lock.
type LockInfo struct {
	// Key is the lock key.
	Key string
	// Owner names the holder: NATSStoreConfig.Owner, by default host and
	// process ID.
	Owner string
	// Token is the holder's fencing token, see [Fenced].
	Token uint64
	// Expires is when the lease lapses unless it is refreshed, by the store's
	// clock. It is zero if that is later than 2262.
	Expires time.Time
}

// Operation is the type of change that an event reports.
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
	// the lock of this name, as long as the store loses no write that it has
	// acknowledged. It does not change with Refresh.
	Token() uint64
}

// self is a method of the stores of this package. A type that embeds one of them
// has all its methods, too, and may have replaced those that others rely on.
type self interface{ self() StateStore }

// own returns a store as a T if it is one of this package and implements that.
func own[T any](store StateStore) (t T, ok bool) {
	if s, is := store.(self); is && s.self() == store {
		t, ok = store.(T)
	}
	return t, ok
}
