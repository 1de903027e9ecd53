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
// An agent is written against StateStore and is given a [NATSStore] in
// production and a [MemoryStore] in tests. Both keep the contract that the
// interface's comments spell out, and one suite of tests holds them to it.
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
// Beside the interface stand four additions, which both stores have: watches
// that end one by one ([ContextWatcher]), compare-and-set ([Updater]), a lock
// that is kept for as long as the work takes ([WithLock]), and fencing tokens
// ([Fenced]).
//
// # Keys
//
// A key is 1 to 1024 bytes of A-Z a-z 0-9 - _ / = and dot; it does not begin or
// end with a dot and holds no two dots in a row. That is what every NATS KV
// client in every language takes, so other tools can read the bucket. Any other
// key is [ErrInvalidKey], from every method of both stores; [ValidateKey] tells
// beforehand. Names of locks obey the same rule, and are a name space of their
// own: a lock is never visible through Get, Keys or Watch.
//
// Values are bytes, copied in and copied out. A nil value is stored as an empty
// one and read back as an empty slice that is not nil. A value over the store's
// limit is [ErrValueTooLarge]. By default the limit is 1 MiB less 1 KiB, which
// leaves room for headers in the largest message that a NATS server takes.
//
// # Patterns
//
// Keys and Watch take a pattern: a key, or the beginning of a key followed by
// one "*", or "*" alone. The star matches any rest, dots included and the empty
// rest too: "config.*" matches "config.foo" and "config.foo.bar", and "conf*"
// matches "conf". What could match no key is ErrInvalidKey. [MatchPattern]
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
// A Put replaces the TTL along with the value, so a heartbeat is a Put with a
// TTL, again and again. An expired key behaves exactly as a deleted one: the
// next Put starts a new key, with a new Created.
//
// # Watches
//
// A watch tells changes only: every Put, Delete and expiry of a matching key
// from the moment that Watch returns. To know a state and then follow it, call
// Watch first and read afterwards; what changes in between is told.
//
// For one key events come in the order of their revisions, none twice. The
// channel has no buffer, but behind it up to 1024 events wait for the reader, in
// order. A reader that falls further behind gets, of each key with events
// waiting, the newest one; it may miss states that were replaced, never the
// last one. It blocks no writer and no other reader, and memory is bounded by
// the number of keys that changed.
//
// A watch on a NATSStore outlives reconnects, server restarts and changes of
// the leader, and then tells what it missed. When it can no longer know what it
// missed it ends, by closing its channel, see [NATSStore]. So an agent handles a
// closed channel by starting over: Watch again, and read anew.
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
// refuse it. That is what the token of [Fenced] is for, and [Updater] makes any
// key of the store a resource that can refuse.
//
// Lock does not wait. [WithLock] does, keeps the lease refreshed, and cancels
// the work's context when the lease can no longer be counted on.
//
// # Errors
//
// Documented outcomes, such as [ErrNotFound], are the bare sentinel values, so
// that both == and errors.Is work. Anything else is a failure: it names the
// operation and the key and wraps its cause. A write that failed was not
// applied, unless errors.Is says [ErrOutcomeUnknown]: then its answer was lost,
// and it was applied or may be applied late, though never over a newer change.
//
// No call blocks without bound: it fails after five seconds without progress.
// What waits for longer, waits because its caller said so: WithLock, and the
// reader of a watch.
//
// # Concurrency
//
// All methods of stores and of locks are safe for concurrent use by several
// goroutines. One store for each process is enough, and several stores on one
// connection are fine. Close ends the store's watches and waits until their
// goroutines are gone; the connection stays open, it is its owner's.
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
// A NATSStore does not belong in a bubble: its server's clock is the real one.
// For tests against a real server, run one inside the test binary, as the
// examples here do.
package state
