// Package state provides shared state management for distributed agent
// coordination. The [StateStore] interface enables key-value storage with TTL,
// watch notifications, and distributed locking across various backends (NATS
// JetStream KV, in-memory).
//
//   - Key-value operations: Get, Put, Delete with optional TTL
//   - Watch: subscribe to changes on key patterns
//   - Distributed locks: acquire/release with automatic expiry
//   - Multiple backends: NATS JetStream KV (production), in-memory (testing)
//
// Write an agent against [Store], which extends StateStore, and give it a
// [NATSStore] in production and a [MemoryStore] in tests. Both keep the contract
// in the comments of the two interfaces, and one test suite runs on both.
//
//	// Production: NATS JetStream KV, on a connection that the caller owns.
//	store, _ := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: "agent-state"})
//
//	// Testing: in memory.
//	store := state.NewMemoryStore()
//
//	// Key-value operations
//	store.Put("config.timeout", []byte("30s"), time.Hour)
//	val, _ := store.Get("config.timeout")
//
//	// Watch for changes
//	ch, _ := store.Watch("config.*")
//	for kv := range ch {
//		fmt.Printf("Key %s changed: %s\n", kv.Key, kv.Value)
//	}
//
//	// Distributed locking
//	lock, _ := store.Lock("resource.mutex", 30*time.Second)
//	defer lock.Unlock()
//	// ... critical section ...
//
// Most programs need more than these methods: a state and its later changes, a
// key that exists while the process lives, a lock that is kept while some work
// runs. These functions provide that, on any store:
//
//   - [Follow] returns the current entries and then delivers their changes.
//   - [NewCache] returns a local copy of entries, a [Cache], for fast reads.
//   - [Modify] reads a value, changes it and writes it back.
//   - [KeepAlive] keeps a key alive until its context ends.
//   - [WithLock] runs a function while it holds a lock; [Acquire] and [Hold] are
//     its two halves.
//
// # Keys
//
// A key is 1 to 1024 bytes of A-Z a-z 0-9 - _ / = and dot. It does not begin or
// end with a dot, and has no two dots in a row. NATS KV clients in every language
// accept such keys, so other tools can read the bucket. For any other key every
// method of both stores returns [ErrInvalidKey]; [ValidateKey] checks a key
// beforehand. Lock names obey the same rule, but are independent of keys: a lock
// is never visible through Get, Keys or Watch.
//
// Values are bytes, copied in and copied out. A nil value is stored as an empty
// one, and read back as an empty slice that is not nil. A value over the store's
// limit is refused with [ErrValueTooLarge]. By default the limit is 1 MiB less
// 1 KiB, which leaves room for headers in the largest message that a NATS server
// takes.
//
// An entry has a revision. Revisions grow with every change in the store. Update
// and DeleteRevision of [Store] write only if the entry still has the given
// revision, and return [ErrConflict] otherwise.
//
// # Patterns
//
// Keys, Entries and Watch take a pattern: a key, or the beginning of a key
// followed by one "*", or "*" alone. The star matches any suffix, dots included
// and the empty one too: "config.*" matches "config.foo" and "config.foo.bar", and
// "conf*" matches "conf". A pattern that could match no key is refused with
// ErrInvalidKey. [MatchPattern] compares a pattern with a key. A NATS server matches
// whole words only: for "conf*" it sends a NATSStore every key and change of the
// bucket, and for "a.conf*" all of "a.", of which the store drops the rest.
//
// # TTL
//
// Every Put says how long the entry lives. 0 means that it never expires, or that
// it has the store's default TTL where [NATSStoreConfig] sets one. Any positive
// duration is honoured, from a nanosecond on. An entry is visible until its
// deadline by the store's clock. For NATS that is the server's clock; the clocks
// of the machines that agents run on do not matter. An entry never expires early,
// and is visible for at most a network round trip after its deadline; a listing
// shows what existed when it began.
//
// A Put replaces the TTL along with the value. An expired key behaves exactly
// like a deleted one: the next Put starts a new key, with a new Created.
// [KeepAlive] writes a key every third of its TTL, so that it expires soon after
// the process dies.
//
// A TTL is how long an agent's death goes unnoticed. Choose one that is longer
// than a leader election of the servers, about ten seconds, and than your longest
// planned restart. Otherwise all agents seem to leave when a server restarts.
//
// # Watches
//
// A watch reports states, not a log. It delivers every Put, Delete and expiry of a
// matching key from the time that Watch returns, except that it may skip a state
// that was replaced before it could be delivered. It always delivers the last state
// of every key. A MemoryStore skips states only for a slow reader. A NATS bucket
// with a History of 1 does not keep replaced values, so a NATSStore may also skip a
// state that was replaced within milliseconds, or while the watch was cut off.
// [NATSStore] names what it may report late, or not at all. If a watch cannot know
// whether a missing key was refreshed before it expired, it reports the key as
// deleted, not as expired: the event then has its own revision and time.
//
// Events of one key come in the order of their revisions, without duplicates.
// The channel has no buffer, but events wait behind it, in order. Once 1,024 wait,
// a new event of a key takes the place of the newest one of that key that waits. So
// a slow reader blocks no writer and no other reader, and the number of keys that
// changed bounds the memory.
//
// A watch on a NATSStore survives reconnects, server restarts and leader changes.
// When it can no longer know what it missed, it ends by closing its channel; see
// [NATSStore]. A watch of a store that WithContext returned also ends with its
// context.
//
// # Following
//
// To know a state and its later changes, use [Follow] rather than a bare Watch.
// It returns the current entries and then delivers every later change without a
// gap, under the terms of a watch. If the watch ends, Follow starts over and
// delivers the differences. Its channel is closed only when its context ends or
// the store is closed.
//
// A [Cache] is a map that is kept up to date in this way. Its reads make no
// request. AsOf says how old the cache may be, and Wait waits until it has a
// revision.
//
// # Locks
//
// A lock is a lease. It lapses when its TTL passes without a Refresh, by the
// store's clock, so that a dead holder blocks nobody for longer. A holder that is
// paused or cut off for longer than the TTL loses the lock before Unlock. There
// is at most one holder at a time, under contention, crashes, restarts and
// partitions, as long as the servers lose no write that they have acknowledged;
// see [NATSStore].
//
// The holder counts its lease from before it sent the request. So it sees the
// lease lapse before the store can grant the lock to anybody else. This fails if
// its machine was suspended, because Go's clocks stand still then, or if the clock
// of the servers is set forward. The holder also has to look: if it is paused
// between looking and acting, it acts too late. That is so with any lock service.
// The resource has to refuse such an action, by the token of [Fenced]. A key in the
// store can refuse it, too, with [Modify] or Update of [Store].
//
// Lock does not wait. [WithLock] does. It also refreshes the lock, and cancels the
// function's context when the lease can no longer be counted on. LockHolder
// returns who holds a lock.
//
// # Errors
//
// Documented outcomes, such as [ErrNotFound], are the bare sentinel values, so
// that both == and errors.Is work. (There are two exceptions, which [ErrLockExpired]
// and [ErrClosed] describe.) Any other error is a failure: it names the
// operation and the key and wraps its cause. A write that failed was not applied,
// unless errors.Is reports [ErrOutcomeUnknown]: then its answer was lost, and the
// write was applied, or may be applied shortly, or never will be. An Update or
// DeleteRevision only ever takes effect on the revision that it names.
//
// No call blocks without bound. It fails after five seconds without an answer from
// the servers, after ten if they answer but cannot carry it out (a listing may take
// longer), or when the context ends that WithContext bound the store to. Only
// Acquire, Hold, WithLock, Modify, KeepAlive and Wait of a Cache, which take a
// context, and the reader of a watch wait for longer. Conn of [NATSStoreConfig] says
// when the client library may hold up a call.
//
// # Concurrency
//
// All methods of stores, caches and locks are safe for concurrent use by several
// goroutines. One store for each process is enough, and several stores may share
// a connection. Close ends the store's calls and watches, and waits until its
// goroutines have finished. Those of Follow and caches, which may be on any store,
// end soon after. It leaves the connection open.
//
// # Testing
//
// A MemoryStore runs no goroutine unless somebody watches. Inside a
// [testing/synctest] bubble it follows the bubble's clock: an hour's TTL, lease
// or watch passes at once, deadlines are exact, and nothing is left running after
// Close:
//
//	synctest.Test(t, func(t *testing.T) {
//		store := state.NewMemoryStore()
//		defer store.Close()
//		store.Put("agents.ada", []byte("alive"), time.Hour)
//		time.Sleep(time.Hour) // takes no time
//		_, err := store.Get("agents.ada") // state.ErrNotFound
//	})
//
// Its Client method returns another client of the same data; give each agent of a
// test its own. Package [example.com/state/statetest] wraps a store and makes it
// fail as production does. With -race, run tests that use bubbles with -cpu 1: on
// several processors the race detector crashes now and then (golang/go#78156).
//
// Do not use a NATSStore in a bubble: its server uses the real clock. To test
// against a real server, run one inside the test binary, as the examples here do.
package state
