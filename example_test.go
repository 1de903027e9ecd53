package state_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"example.com/state"
)

// connect starts a NATS server inside this process, and connects to it. In
// production, that is nats.Connect and the address of your servers.
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

// An agent is written against StateStore. It runs unchanged on both stores.
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

// Registry is a part of some agent: it depends on the interface, so that its
// unit test gives it a MemoryStore and its main function a NATSStore.
type Registry struct{ Store state.StateStore }

// Announce says that the agent is alive, for the next half minute.
func (r Registry) Announce(name, address string) error {
	return r.Store.Put("agents."+name, []byte(address), 30*time.Second)
}

// Alive returns the names of the agents that are.
func (r Registry) Alive() (names []string, err error) {
	keys, err := r.Store.Keys("agents.*")
	for _, key := range keys {
		names = append(names, key[len("agents."):])
	}
	return names, err
}

// A component that depends on the interface is tested in memory.
func ExampleStateStore() {
	store := state.NewMemoryStore() // in production: state.NewNATSStore(...)
	defer store.Close()

	registry := Registry{Store: store}
	registry.Announce("grace", "10.0.0.2:9000")
	registry.Announce("ada", "10.0.0.1:9000")
	fmt.Println(registry.Alive())
	// Output: [ada grace] <nil>
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
		log.Fatal(err) // says in words what the server, the bucket or the permissions lack
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

// A watch tells puts, deletions and expiries. What exists already it does not
// tell: read it after Watch has returned, and nothing is missed in between.
func ExampleStateStore_watch() {
	store := state.NewMemoryStore()
	defer store.Close()
	store.Put("agents.ada", []byte("10.0.0.1"), time.Hour)

	changes, err := store.Watch("agents.*")
	if err != nil {
		log.Fatal(err)
	}
	known, _ := store.Keys("agents.*")
	fmt.Println("known", known)

	store.Put("agents.grace", []byte("10.0.0.2"), time.Millisecond) // it will expire
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
	// known [agents.ada]
	// put agents.grace is at 10.0.0.2
	// delete agents.grace
}

// An entry lives as long as the last Put says.
func ExampleStateStore_ttl() {
	store := state.NewMemoryStore()
	defer store.Close()
	changes, err := store.Watch("sessions.*")
	if err != nil {
		log.Fatal(err)
	}

	store.Put("sessions.1", []byte("ada"), time.Hour)
	store.Put("sessions.1", []byte("ada"), time.Millisecond) // not an hour any more
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

// A lock is a lease: whoever wants to keep it refreshes it, and stops when that
// fails.
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

// Each watch of a store can have an end of its own.
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
		cancel() // seen enough: the channel is closed, and nothing is left behind
	}
	// Output: config.pace is brisk
}

// Claim makes agent the owner of a task, unless somebody else is. One request,
// no lock: of all who try, one gets no ErrConflict. If the owner dies, the claim
// lapses with its TTL.
func Claim(store state.Store, task, agent string) (bool, error) {
	_, err := store.Update("claims."+task, []byte(agent), time.Minute, 0)
	if err == state.ErrConflict {
		return false, nil
	}
	return err == nil, err
}

func ExampleStore_Update() {
	store := state.NewMemoryStore()
	defer store.Close()

	// Claim a task: revision 0 means, only if the key does not exist.
	fmt.Println(Claim(store, "42", "ada"))
	fmt.Println(Claim(store, "42", "grace"))

	// Count: write on top of what was read, or read again.
	increment := func() error {
		for {
			var n int
			var revision uint64
			kv, err := store.GetKeyValue("done")
			switch {
			case err == nil:
				n, _ = strconv.Atoi(string(kv.Value))
				revision = kv.Revision
			case err != state.ErrNotFound:
				return err
			}
			_, err = store.Update("done", []byte(strconv.Itoa(n+1)), 0, revision)
			if err != state.ErrConflict {
				return err
			}
		}
	}
	for range 3 {
		increment()
	}
	done, _ := store.Get("done")
	fmt.Printf("%s tasks done\n", done)
	// Output:
	// true <nil>
	// false <nil>
	// 3 tasks done
}

// WithLock waits for the lock, keeps it while the function runs, and cancels
// the function's context when it was lost.
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

// Protected is a record that a lock protects. It holds the token of the last
// one who wrote it, and so it can refuse who held the lock before that.
type Protected struct {
	Store state.Store
	Key   string
}

// Write stores text on behalf of the lock's holder with that token.
func (p Protected) Write(token uint64, text string) error {
	var revision, highest uint64
	kv, err := p.Store.GetKeyValue(p.Key)
	switch {
	case err == nil:
		revision = kv.Revision
		fmt.Sscan(string(kv.Value), &highest)
	case err != state.ErrNotFound:
		return err
	}
	if token < highest {
		return fmt.Errorf("refused: token %d is older than %d", token, highest)
	}
	// Between the reading and the writing, nobody else may have written.
	_, err = p.Store.Update(p.Key, fmt.Appendf(nil, "%d %s", token, text), 0, revision)
	return err
}

// A holder that was paused for longer than its lease goes on as if it still
// held the lock. The record that the lock protects knows better.
func ExampleFenced() {
	store := state.NewMemoryStore()
	defer store.Close()
	record := Protected{store, "schedule"}

	lock, _ := store.Lock("scheduler", time.Millisecond)
	ada := lock.(state.Fenced)
	fmt.Println("ada writes:", record.Write(ada.Token(), "from ada"))

	// ada is paused: by the scheduler, a long garbage collection, a closed lid.
	// Her lease lapses, and grace gets the lock.
	var grace state.Fenced
	for grace == nil {
		if lock, err := store.Lock("scheduler", time.Minute); err == nil {
			grace = lock.(state.Fenced)
		}
	}
	fmt.Println("grace writes:", record.Write(grace.Token(), "from grace"))

	// ada wakes up in the middle of what she was doing.
	fmt.Println("ada writes:", record.Write(ada.Token(), "from ada"))
	fmt.Println("ada refreshes:", ada.Refresh())
	value, _ := store.Get("schedule")
	fmt.Printf("schedule: %s\n", value)
	// Output:
	// ada writes: <nil>
	// grace writes: <nil>
	// ada writes: refused: token 1 is older than 2
	// ada refreshes: lock expired
	// schedule: 2 from grace
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
