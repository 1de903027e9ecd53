package state_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"example.com/state"
)

// connect starts a NATS server inside this process, and connects to it. In
// production, call nats.Connect with the address of your servers.
func connect() (nc *nats.Conn, stop func()) {
	dir, err := os.MkdirTemp("", "state-example-")
	if err != nil {
		log.Fatal(err)
	}
	srv, err := server.NewServer(&server.Options{DontListen: true, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true})
	if err != nil {
		log.Fatal(err)
	}
	srv.Start()
	if nc, err = nats.Connect("", nats.InProcessServer(srv)); err != nil {
		log.Fatal(err)
	}
	return nc, func() {
		nc.Close()
		srv.Shutdown()
		srv.WaitForShutdown()
		os.RemoveAll(dir)
	}
}

// The same code runs on both stores.
func Example() {
	agent := func(store state.StateStore) {
		// Key-value operations
		store.Put("config.timeout", []byte("30s"), time.Hour)
		val, _ := store.Get("config.timeout")
		fmt.Printf("Timeout is %s\n", val)

		// Watch for changes
		ch, _ := store.Watch("config.*")
		go store.Put("config.timeout", []byte("1m"), time.Hour) // somebody else
		for kv := range ch {
			fmt.Printf("Key %s changed: %s\n", kv.Key, kv.Value)
			break
		}

		// Distributed locking
		lock, _ := store.Lock("resource.mutex", 30*time.Second)
		defer lock.Unlock()
		fmt.Printf("Holding %s\n", lock.Key())
		// ... critical section ...
	}

	// Testing: in memory.
	memory := state.NewMemoryStore()
	defer memory.Close()
	agent(memory)

	// Production: NATS JetStream KV, on a connection that the caller owns.
	nc, stop := connect()
	defer stop()
	store, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: "agent-state"})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	agent(store)

	// Output:
	// Timeout is 30s
	// Key config.timeout changed: 1m
	// Holding resource.mutex
	// Timeout is 30s
	// Key config.timeout changed: 1m
	// Holding resource.mutex
}

// An agent depends on Store, so that a unit test can give it a MemoryStore and the
// main function a NATSStore.
func ExampleStore() {
	announce := func(store state.Store, name, address string) error {
		return store.Put("agents."+name, []byte(address), 30*time.Second)
	}

	store := state.NewMemoryStore() // in production: state.NewNATSStore(...)
	defer store.Close()
	announce(store, "grace", "10.0.0.2:9000")
	announce(store, "ada", "10.0.0.1:9000")
	agents, err := store.Entries("agents.*")
	if err != nil {
		log.Fatal(err)
	}
	for _, kv := range agents {
		fmt.Printf("%s is at %s\n", kv.Key, kv.Value)
	}
	// Output:
	// agents.ada is at 10.0.0.1:9000
	// agents.grace is at 10.0.0.2:9000
}

func ExampleMemoryStore() {
	store := state.NewMemoryStore()
	defer store.Close()

	if err := store.Put("config.timeout", []byte("30s"), 0); err != nil {
		log.Fatal(err)
	}
	kv, err := store.GetKeyValue("config.timeout")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s = %s, revision %d\n", kv.Key, kv.Value, kv.Revision)

	err = store.Delete("config.timeout")
	fmt.Println(err)
	_, err = store.Get("config.timeout")
	fmt.Println(err, err == state.ErrNotFound)
	// Output:
	// config.timeout = 30s, revision 1
	// <nil>
	// key not found true
}

func ExampleNATSStore() {
	nc, stop := connect() // in production: nats.Connect(url, nats.MaxReconnects(-1))
	defer stop()

	cfg := state.DefaultNATSStoreConfig()
	cfg.Conn = nc
	store, err := state.NewNATSStore(cfg)
	if err != nil {
		log.Fatal(err) // says what is wrong with the server, the bucket or the permissions
	}
	defer store.Close()

	if err := store.Put("agents.ada", []byte("alive"), 30*time.Second); err != nil {
		log.Fatal(err)
	}
	keys, err := store.Keys("agents.*")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(keys)
	// Output: [agents.ada]
}

// A watch reports puts, deletions and expiries from the time that Watch returns.
// It does not report what exists already; Follow does.
func ExampleStateStore_watch() {
	store := state.NewMemoryStore()
	defer store.Close()

	changes, err := store.Watch("agents.*")
	if err != nil {
		log.Fatal(err)
	}
	store.Put("agents.grace", []byte("10.0.0.2"), time.Millisecond) // expires soon
	for kv := range changes {
		switch kv.Operation {
		case state.OpPut:
			fmt.Printf("%s %s is at %s\n", kv.Operation, kv.Key, kv.Value)
		case state.OpDelete:
			fmt.Printf("%s %s\n", kv.Operation, kv.Key)
			store.Close() // ends the watch
		}
	}
	// Output:
	// put agents.grace is at 10.0.0.2
	// delete agents.grace
}

// An entry has the TTL of its last Put.
func ExampleStateStore_ttl() {
	store := state.NewMemoryStore()
	defer store.Close()
	changes, err := store.Watch("sessions.*")
	if err != nil {
		log.Fatal(err)
	}

	store.Put("sessions.1", []byte("ada"), time.Hour)
	store.Put("sessions.1", []byte("ada"), time.Millisecond) // replaces the hour
	for kv := range changes {
		fmt.Println(kv.Operation, kv.Key)
		if kv.Operation == state.OpDelete {
			break // it has expired
		}
	}
	_, err = store.Get("sessions.1")
	fmt.Println(err)
	// Output:
	// put sessions.1
	// put sessions.1
	// delete sessions.1
	// key not found
}

// A lock is a lease: its holder refreshes it to keep it, and stops working when
// that fails. WithLock does both.
func ExampleLock() {
	store := state.NewMemoryStore()
	defer store.Close()

	lock, err := store.Lock("leader", 10*time.Second)
	if err != nil {
		log.Fatal(err)
	}
	_, err = store.Lock("leader", 10*time.Second)
	fmt.Println("somebody else:", err)

	fmt.Println("refresh:", lock.Refresh()) // ten seconds from now
	fmt.Println("unlock:", lock.Unlock())
	fmt.Println("unlock again:", lock.Unlock())
	// Output:
	// somebody else: lock already held
	// refresh: <nil>
	// unlock: <nil>
	// unlock again: lock not held
}

// Calls and watches of a store that is bound to a context end with the context.
func ExampleStore_WithContext() {
	store := state.NewMemoryStore()
	defer store.Close()

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changes, err := store.WithContext(ctx).Watch("config.*")
	if err != nil {
		log.Fatal(err)
	}
	store.Put("config.pace", []byte("brisk"), 0)
	for kv := range changes {
		fmt.Printf("%s is %s\n", kv.Key, kv.Value)
		cancel() // ends the watch: its channel is closed
	}
	// Output: config.pace is brisk
}

// Update claims a task. Revision 0 means that the key must not exist. If the owner
// dies, its claim expires.
func ExampleStore_Update() {
	store := state.NewMemoryStore()
	defer store.Close()

	revision, err := store.Update("claims.42", []byte("ada"), time.Minute, 0)
	fmt.Println("ada claims:", err)
	_, err = store.Update("claims.42", []byte("grace"), time.Minute, 0)
	fmt.Println("grace claims:", err)

	_, err = store.Update("claims.42", []byte("ada, halfway"), time.Minute, revision)
	fmt.Println("ada writes on top of her claim:", err)
	err = store.DeleteRevision("claims.42", revision)
	fmt.Println("ada deletes what she wrote first:", err)
	// Output:
	// ada claims: <nil>
	// grace claims: revision conflict
	// ada writes on top of her claim: <nil>
	// ada deletes what she wrote first: revision conflict
}

// Who holds a lock, and for how long?
func ExampleStore_LockHolder() {
	store := state.NewMemoryStore()
	defer store.Close()

	lock, err := store.Lock("leader", time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	info, err := store.LockHolder("leader")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(info.Key, info.Owner != "", info.Token == lock.(state.Fenced).Token(), time.Until(info.Expires) <= time.Minute)
	lock.Unlock()
	_, err = store.LockHolder("leader")
	fmt.Println(err == state.ErrNotFound)
	// Output:
	// leader true true true
	// true
}

// Follow returns the current entries and then delivers their changes, even after a
// watch has ended.
func ExampleFollow() {
	store := state.NewMemoryStore()
	defer store.Close()
	store.Put("agents.ada", []byte("10.0.0.1"), 0)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	current, changes, err := state.Follow(ctx, store, "agents.*")
	if err != nil {
		log.Fatal(err)
	}
	for _, kv := range current {
		fmt.Printf("%s is at %s\n", kv.Key, kv.Value)
	}
	store.Put("agents.grace", []byte("10.0.0.2"), 0)
	store.Delete("agents.ada")
	for kv := range changes {
		fmt.Println(kv.Operation, kv.Key)
		if kv.Operation == state.OpDelete {
			cancel() // closes the channel
		}
	}
	// Output:
	// agents.ada is at 10.0.0.1
	// put agents.grace
	// delete agents.ada
}

// KeepAlive keeps a key until its context ends.
func ExampleKeepAlive() {
	store := state.NewMemoryStore()
	defer store.Close()
	changes, err := store.Watch("agents.*")
	if err != nil {
		log.Fatal(err)
	}

	ctx, leave := context.WithCancel(context.Background())
	defer leave()
	go state.KeepAlive(ctx, store, "agents.ada", time.Minute, func() []byte { return []byte("10.0.0.1") })
	for kv := range changes {
		fmt.Println(kv.Operation, kv.Key)
		if kv.Operation == state.OpDelete {
			break
		}
		leave()
	}
	// Output:
	// put agents.ada
	// delete agents.ada
}

// WithLock waits for the lock, keeps it while the function runs, and cancels the
// function's context if the lock is lost.
func ExampleWithLock() {
	store := state.NewMemoryStore()
	defer store.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := state.WithLock(ctx, store, "deploy", 10*time.Second, func(ctx context.Context, token uint64) error {
		_, err := store.Lock("deploy", time.Second)
		fmt.Println("meanwhile:", err)
		return ctx.Err() // work that watches ctx
	})
	switch {
	case errors.Is(err, state.ErrLockHeld):
		fmt.Println("somebody else deploys")
	case errors.Is(err, state.ErrLockExpired):
		fmt.Println("the lock was lost on the way")
	case err != nil:
		fmt.Println("the work failed:", err)
	default:
		fmt.Println("deployed")
	}
	// Output:
	// meanwhile: lock already held
	// deployed
}

// A Resource is what a lock protects outside the store, such as a file server. It
// refuses tokens lower than the highest one that it has seen.
type Resource struct{ highest uint64 }

// Write accepts a write from the holder with that token.
func (r *Resource) Write(token uint64) error {
	if token < r.highest {
		return fmt.Errorf("refused: token %d is older than %d", token, r.highest)
	}
	r.highest = token
	return nil
}

// A holder that was paused for longer than its lease continues as if it still held
// the lock. The resource that the lock protects refuses its writes.
func ExampleFenced() {
	store := state.NewMemoryStore()
	defer store.Close()
	var resource Resource

	lock, _ := store.Lock("scheduler", 100*time.Millisecond)
	ada := lock.(state.Fenced)
	fmt.Println("ada writes:", resource.Write(ada.Token()))

	// The scheduler, a long garbage collection or a closed laptop pauses ada. Her
	// lease lapses, and grace gets the lock.
	lock, _ = state.Acquire(context.Background(), store, "scheduler", time.Minute)
	grace := lock.(state.Fenced)
	fmt.Println("grace writes:", resource.Write(grace.Token()))

	// ada resumes in the middle of her work.
	fmt.Println("ada writes:", resource.Write(ada.Token()))
	fmt.Println("ada refreshes:", ada.Refresh())
	// Output:
	// ada writes: <nil>
	// grace writes: <nil>
	// ada writes: refused: token 1 is older than 2
	// ada refreshes: lock expired
}

func ExampleValidateKey() {
	for _, key := range []string{"config.timeout", "agents/eu-1/ada", "config..timeout", "two words"} {
		fmt.Printf("%s: %v\n", key, state.ValidateKey(key))
	}
	// Output:
	// config.timeout: <nil>
	// agents/eu-1/ada: <nil>
	// config..timeout: invalid key
	// two words: invalid key
}

func ExampleMatchPattern() {
	fmt.Println(state.MatchPattern("config.*", "config.db.timeout"))
	fmt.Println(state.MatchPattern("conf*", "conf"))
	fmt.Println(state.MatchPattern("config", "config.timeout"))
	// Output:
	// true
	// true
	// false
}
