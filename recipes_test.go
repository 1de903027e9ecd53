package state_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
)

// Recipes: each is the shortest correct program, and works on any store.

// An Instance is what an agent says about itself.
type Instance struct {
	Address string
	Load    int
}

// Register keeps an agent in the registry until ctx ends. If the agent dies,
// its entry expires.
func Register(ctx context.Context, store state.Store, name string, describe func() Instance) error {
	return state.KeepAlive(ctx, store, "agents."+name, 15*time.Second, func() []byte {
		data, _ := json.Marshal(describe())
		return data
	})
}

// FollowAgents calls changed for each agent that is present, joins or changes its
// metadata, and with nil for each agent that leaves. It runs until ctx ends.
func FollowAgents(ctx context.Context, store state.Store, changed func(name string, now *Instance)) error {
	current, changes, err := state.Follow(ctx, store, "agents.*")
	if err != nil {
		return err
	}
	known := make(map[string]string)
	report := func(kv *state.KeyValue) {
		name, now := kv.Key[len("agents."):], new(Instance)
		switch old, ok := known[name]; {
		case kv.Operation == state.OpDelete:
			delete(known, name)
			changed(name, nil)
		case ok && old == string(kv.Value): // only its TTL is new
		case json.Unmarshal(kv.Value, now) == nil:
			known[name] = string(kv.Value)
			changed(name, now)
		}
	}
	for _, kv := range current {
		report(kv)
	}
	for kv := range changes {
		report(kv)
	}
	return ctx.Err()
}

// A registry with metadata. Its readers follow which agents join and leave.
func ExampleFollow_registry() {
	store := state.NewMemoryStore()
	defer store.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	ada, leave := context.WithCancel(ctx)
	go Register(ada, store, "ada", func() Instance { return Instance{Address: "10.0.0.1:9000"} })
	_ = FollowAgents(ctx, store, func(name string, now *Instance) {
		if now != nil {
			fmt.Println(name, "is at", now.Address)
			leave()
			return
		}
		fmt.Println(name, "has left")
		cancel()
	})
	// Output:
	// ada is at 10.0.0.1:9000
	// ada has left
}

// Work does the tasks of a queue until ctx ends. To add a task, put it under a key
// "tasks.<id>"; the task is done when the key is gone. A worker claims a task with
// a lock. If it dies, its lease lapses, and another worker takes over. If a worker
// is paused for longer than its lease, two workers may do the same task; then only
// one of them deletes it.
func Work(ctx context.Context, store state.Store, lease time.Duration, do func(ctx context.Context, task []byte) error) error {
	tasks, changes, err := state.Follow(ctx, store, "tasks.*")
	if err != nil {
		return err
	}
	open := make(map[string]bool)
	attempt := func(key string) { // after any failure the task is still open
		lock, err := store.Lock(key, lease)
		if err != nil {
			return
		}
		err = state.Hold(ctx, lock, lease, func(ctx context.Context, _ uint64) error {
			kv, err := store.GetKeyValue(key)
			if err != nil {
				return err // ErrNotFound: another worker has done it
			}
			if err := do(ctx, kv.Value); err != nil {
				return err
			}
			return store.DeleteRevision(key, kv.Revision)
		})
		if err != nil && err != state.ErrNotFound {
			log.Printf("task %s: %v", key, err)
		}
	}
	for _, kv := range tasks {
		open[kv.Key] = true
		attempt(kv.Key)
	}
	again := time.NewTicker(lease / 2) // the worker of a task may have died
	defer again.Stop()
	for {
		select {
		case kv, ok := <-changes:
			switch {
			case !ok:
				return ctx.Err()
			case kv.Operation == state.OpDelete:
				delete(open, kv.Key)
			default:
				open[kv.Key] = true
				attempt(kv.Key)
			}
		case <-again.C:
			for key := range open {
				attempt(key)
			}
		}
	}
}

// A queue whose tasks are claimed by one worker, and by another one if that dies.
func ExampleHold_queue() {
	store := state.NewMemoryStore()
	defer store.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	store.Put("tasks.42", []byte("send the report"), 0)
	store.Lock("tasks.42", 50*time.Millisecond) // by a worker that dies

	var workers sync.WaitGroup
	for range 3 {
		workers.Go(func() {
			Work(ctx, store, time.Second, func(_ context.Context, task []byte) error {
				fmt.Printf("%s\n", task)
				cancel() // no more tasks in this example
				return nil
			})
		})
	}
	workers.Wait()
	fmt.Println(store.Keys("tasks.*"))
	// Output:
	// send the report
	// [] <nil>
}

// Lead runs work while it is the leader, again and again, until ctx ends. The
// context of work ends when the lease is lost.
func Lead(ctx context.Context, store state.Store, work func(ctx context.Context, token uint64) error) error {
	for ctx.Err() == nil {
		err := state.WithLock(ctx, store, "leader", 15*time.Second, work)
		if err != nil && !errors.Is(err, state.ErrLockExpired) && ctx.Err() == nil {
			return err
		}
	}
	return ctx.Err()
}

// Only leaders write a Schedule. It contains the last writer's token.
type Schedule struct {
	Token uint64
	Text  string
}

var errDeposed = errors.New("somebody else leads now")

// WriteSchedule writes the schedule for the leader with that token. It refuses a
// leader that was replaced while it was paused.
func WriteSchedule(ctx context.Context, store state.Store, token uint64, text string) error {
	_, err := state.Modify(ctx, store, "schedule", func(old *state.KeyValue) ([]byte, time.Duration, error) {
		var last Schedule
		if old != nil {
			if err := json.Unmarshal(old.Value, &last); err != nil {
				return nil, 0, err
			}
		}
		if token < last.Token {
			return nil, 0, errDeposed
		}
		data, err := json.Marshal(Schedule{token, text})
		return data, 0, err
	})
	return err
}

// A leader with a fenced write.
func ExampleWithLock_leader() {
	store := state.NewMemoryStore()
	defer store.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	var first uint64
	_ = Lead(ctx, store, func(ctx context.Context, token uint64) error {
		if first == 0 {
			first = token
			fmt.Println("the first leader writes:", WriteSchedule(ctx, store, token, "at noon"))
			return nil // resigns
		}
		fmt.Println("the next leader writes:", WriteSchedule(ctx, store, token, "at night"))
		fmt.Println("the first leader writes:", WriteSchedule(ctx, store, first, "at noon"))
		cancel()
		return nil
	})
	// Output:
	// the first leader writes: <nil>
	// the next leader writes: <nil>
	// the first leader writes: somebody else leads now
}

// Configuration that is read a million times per second, without a request.
func ExampleNewCache_configuration() {
	store := state.NewMemoryStore()
	defer store.Close()
	ctx := context.Background()
	store.Put("config.limit", []byte("10"), 0)

	config, err := state.NewCache(ctx, store, "config.*") // complete from here on
	if err != nil {
		log.Fatal(err)
	}
	defer config.Close()
	sum := 0
	for range 1000 {
		value, _ := config.Get("config.limit") // state.ErrNotFound if there is none
		limit, _ := strconv.Atoi(string(value))
		sum += limit
	}
	fmt.Println(sum)

	// The cache lags a little. To be sure that it has a certain change, wait for
	// its revision.
	revision, _ := state.Modify(ctx, store, "config.limit", func(*state.KeyValue) ([]byte, time.Duration, error) {
		return []byte("20"), 0, nil
	})
	_ = config.Wait(ctx, revision)
	value, _ := config.Get("config.limit")
	fmt.Printf("%s\n", value)
	// Output:
	// 10000
	// 20
}

// AtMost runs fn, with at most n callers of the same name at a time on all
// machines. Each place is a lock.
func AtMost(ctx context.Context, store state.Store, name string, n int, fn func(ctx context.Context, token uint64) error) error {
	const lease = 10 * time.Second
	for {
		for _, place := range rand.Perm(n) {
			lock, err := store.Lock(fmt.Sprintf("%s.%d", name, place), lease)
			if err == nil {
				return state.Hold(ctx, lock, lease, fn)
			}
			if err != state.ErrLockHeld {
				return err
			}
		}
		// Wait for one of them, but not for ever: another may be free sooner.
		wait, cancel := context.WithTimeout(ctx, time.Second)
		lock, err := state.Acquire(wait, store, fmt.Sprintf("%s.%d", name, rand.N(n)), lease)
		cancel()
		switch {
		case err == nil:
			return state.Hold(ctx, lock, lease, fn)
		case ctx.Err() != nil:
			return ctx.Err()
		case err != state.ErrLockHeld && !errors.Is(err, context.DeadlineExceeded):
			return err
		}
	}
}

// A semaphore: at most three at a time.
func ExampleAcquire_semaphore() {
	store := state.NewMemoryStore()
	defer store.Close()

	var running, most, all atomic.Int64
	var callers sync.WaitGroup
	for range 10 {
		callers.Go(func() {
			err := AtMost(context.Background(), store, "downloads", 3, func(context.Context, uint64) error {
				n := running.Add(1)
				defer running.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				all.Add(1)
				return nil
			})
			if err != nil {
				log.Fatal(err)
			}
		})
	}
	callers.Wait()
	fmt.Println(all.Load(), most.Load() <= 3)
	// Output: 10 true
}

// Count adds to a counter and returns its new value.
func Count(ctx context.Context, store state.Store, key string, add int) (n int, err error) {
	_, err = state.Modify(ctx, store, key, func(old *state.KeyValue) ([]byte, time.Duration, error) {
		n = 0
		if old != nil {
			if n, err = strconv.Atoi(string(old.Value)); err != nil {
				return nil, 0, err
			}
		}
		n += add
		return []byte(strconv.Itoa(n)), 0, nil
	})
	return n, err
}

// A counter that loses no count, however many callers there are.
func ExampleModify_counter() {
	store := state.NewMemoryStore()
	defer store.Close()
	ctx := context.Background()

	var counting sync.WaitGroup
	for range 8 {
		counting.Go(func() { Count(ctx, store, "visits", 2) })
	}
	counting.Wait()
	fmt.Println(Count(ctx, store, "visits", 0))
	// Output: 16 <nil>
}
