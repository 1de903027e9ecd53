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
// An agent is written against [Store], which is StateStore and what programs need
// beside it. It gets a [NATSStore] in production and a [MemoryStore] in tests. Both
// keep the contract that the comments of the two interfaces spell out, and one
// test suite runs on both.
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
// Most programs need more than these methods: a state and how it goes on, a key
// for as long as the process lives, a lock for as long as the work takes. These
// functions do it right, on any store:
//
//   - [Follow] returns the current entries and then every change.
//   - [NewCache] returns a local copy of entries, a [Cache], for fast reads.
//   - [Modify] changes a value on top of whatever it is.
//   - [KeepAlive] keeps a key alive until its context ends.
//   - [WithLock] runs a function while it holds a lock; [Acquire] and [Hold] are
//     its two halves.
//
// # Keys
//
// A key is 1 to 1024 bytes of A-Z a-z 0-9 - _ / = and dot; it does not begin or
// end with a dot and holds no two dots in a row. That is what every NATS KV
// client in every language takes, so other tools can read the bucket. Any other
// key is [ErrInvalidKey], from every method of both stores; [ValidateKey] checks
// one beforehand. Names of locks obey the same rule, and are a name space of their
// own: a lock is never visible through Get, Keys or Watch.
//
// Values are bytes, copied in and copied out. A nil value is stored as an empty
// one and read back as an empty slice that is not nil. A value over the store's
// limit is [ErrValueTooLarge]. By default the limit is 1 MiB less 1 KiB, which
// leaves room for headers in the largest message that a NATS server takes.
//
// An entry has a revision, which grows with every change in the store. Update and
// DeleteRevision of [Store] write only if it is still the given one, and return
// [ErrConflict] if it is not.
//
// # Patterns
//
// Keys, Entries and Watch take a pattern: a key, or the beginning of a key
// followed by one "*", or "*" alone. The star matches any rest, dots included and
// the empty rest too: "config.*" matches "config.foo" and "config.foo.bar", and
// "conf*" matches "conf". What could match no key is ErrInvalidKey. [MatchPattern]
// compares a pattern with a key.
//
// # TTL
//
// Every Put says how long the entry lives; 0 means for ever, or for the store's
// default TTL where [NATSStoreConfig] sets one. Any positive duration is
// honoured, from a nanosecond on. An entry is visible until its deadline by the
// store's clock, which for NATS is the server's: the clocks of the machines
// that agents run on do not matter. It is never gone before its deadline, and
// visible after it by no more than a network round trip.
//
// A Put replaces the TTL along with the value. An expired key behaves exactly as a
// deleted one: the next Put starts a new key, with a new Created. [KeepAlive]
// writes a key every third of its TTL, so that it expires when the process dies.
//
// A TTL says how long a death goes unnoticed. Choose one that is longer than a
// leader election of the servers, about ten seconds, and than your longest
// restart; else all agents seem to leave at once when a server restarts.
//
// # Watches
//
// A watch reports states, not a log: every Put, Delete and expiry of a matching
// key from the time that Watch returns, except that a state which was replaced
// before it could be delivered may be skipped. The last state of every key is
// always delivered. What a MemoryStore skips depends on the reader only; a bucket
// in NATS with a History of 1 does not hold what was replaced, so a NATSStore may
// skip what was replaced within milliseconds, or while the watch was cut off.
//
// For one key events come in the order of their revisions, none twice. The
// channel has no buffer, but behind it up to 1024 events wait for the reader, in
// order. A reader that falls further behind gets, of each key with events
// waiting, the newest one. It blocks no writer and no other reader, and memory is
// bounded by the number of keys that changed.
//
// A watch on a NATSStore outlives reconnects, server restarts and changes of
// the leader. When it can no longer know what it missed it ends, by closing its
// channel, see [NATSStore]. A watch of a store that WithContext returned also ends
// with its context.
//
// # Following
//
// To know a state and how it goes on, use [Follow] and not a bare Watch. It
// returns the current entries and then every later change without a gap, under the
// terms of a watch. If the watch ends, it starts over, compares, and delivers the
// differences. Its channel is closed when its context ends or the store is closed,
// and for no other reason.
//
// A [Cache] is a map that is kept up to date in this way. Its reads make no
// request; its AsOf says how old it may be, and its Wait waits for a revision.
//
// # Locks
//
// A lock is a lease. It lapses when its TTL passes without a Refresh, by the
// store's clock, so that a holder that died blocks nobody for longer; and it
// can be lost before Unlock, by a holder that was paused or cut off for longer
// than that. There is at most one holder at a time, under contention, crashes,
// restarts and partitions.
//
// The holder's own view is conservative: it counts its lease from before the
// request was sent, so that it sees it lapse before anybody else can be granted
// the lock. But it has to look. A holder that was paused between looking and
// acting acts too late, with any lock service there is; what it acts upon must
// refuse it. That is what the token of [Fenced] is for. A key of the store can
// refuse, too: with [Modify], or with Update of [Store].
//
// Lock does not wait. [WithLock] does, keeps the lease refreshed, and ends the
// work's context when the lease can no longer be counted on. LockHolder returns
// who holds a lock.
//
// # Errors
//
// Documented outcomes, such as [ErrNotFound], are the bare sentinel values, so
// that both == and errors.Is work. Anything else is a failure: it names the
// operation and the key and wraps its cause. A write that failed was not
// applied, unless errors.Is reports [ErrOutcomeUnknown]: then its answer was lost,
// and it was applied, or it may be applied shortly, or it never will be. An Update
// or DeleteRevision only ever takes effect on the revision that it names.
//
// No call blocks without bound: it fails after five seconds without progress, or
// when the context ends that the store is bound to by WithContext. Only Acquire,
// WithLock, Modify and KeepAlive, which take a context, and the reader of a watch
// wait for longer.
//
// # Concurrency
//
// All methods of stores, caches and locks are safe for concurrent use by several
// goroutines. One store for each process is enough, and several stores on one
// connection are fine. Close ends the store's calls and watches, and waits until
// its goroutines have finished; the connection stays open and belongs to its owner.
//
// # Testing
//
// A MemoryStore runs no goroutine unless somebody watches, and follows the
// clock of the bubble that it was made in. In a test under [testing/synctest] an
// hour's TTL, lease or watch passes at once, deadlines are exact, and nothing is
// left running after Close:
//
//	synctest.Test(t, func(t *testing.T) {
//		store := state.NewMemoryStore()
//		defer store.Close()
//		store.Put("agents.ada", []byte("alive"), time.Hour)
//		time.Sleep(time.Hour) // takes no time
//		_, err := store.Get("agents.ada") // state.ErrNotFound
//	})
//
// Its Client method returns another client of the same data, as each agent of a
// test opens its own. Package [example.com/state/statetest] wraps a store and
// makes it fail as production does.
//
// A NATSStore does not belong in a bubble: its server's clock is the real one.
// For tests against a real server, run one inside the test binary, as the
// examples here do.
package state
