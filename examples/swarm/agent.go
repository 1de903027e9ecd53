package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"example.com/state"
)

const (
	leaderLease = 1500 * time.Millisecond // a dead leader is replaced after this time
	taskLease   = time.Second             // the task of a dead worker is taken over after this time
	heartbeat   = time.Second             // an agent that is silent for this long counts as dead
	planEvery   = 150 * time.Millisecond
	keepRecords = time.Minute // of terms, and of tasks that are done
)

// An Agent is one member of the swarm. It knows the others only from the store,
// which holds these keys:
//
//	agents.<name>    exists while the agent is alive
//	config.pace      is how long a task takes
//	leader.<term>    names the leader of a term, which is the lock's fencing token
//	tasks.<term>-<n> is "open" or "done by <name>"
//
// and the locks "leader" and "tasks.<term>-<n>".
type Agent struct {
	Name  string
	Store state.Store

	// Report receives failures. It is called from several goroutines.
	Report func(format string, args ...any)
	// Terms is called when the agent becomes the leader, and whenever it acts
	// as the leader.
	Terms func(Term)
	// Midway, unless nil, is called in the middle of every task.
	Midway func(task string)

	config      *state.Cache
	open        map[string]bool // tasks that are not done; owned by work
	stop        context.CancelFunc
	stopLeading context.CancelFunc
	leading     sync.WaitGroup
	running     sync.WaitGroup
}

// A Term is the time in which an agent was the leader. Until is when it last acted
// as the leader.
type Term struct {
	Leader         string
	Token          uint64
	Granted, Until time.Time
}

// Start starts the agent, which runs until Stop.
func (a *Agent) Start() (err error) {
	ctx, stop := context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			stop()
		}
	}()
	if a.config, err = state.NewCache(ctx, a.Store, "config.*"); err != nil {
		return err
	}
	tasks, changes, err := state.Follow(ctx, a.Store, "tasks.*")
	if err != nil {
		return err
	}
	leading, stopLeading := context.WithCancel(ctx)
	a.stop, a.stopLeading = stop, stopLeading
	a.running.Go(func() {
		alive := func() []byte { return []byte("alive") }
		if err := state.KeepAlive(ctx, a.Store, "agents."+a.Name, heartbeat, alive); err != nil {
			a.Report("heartbeat: %v", err)
		}
	})
	a.running.Go(func() { a.work(ctx, tasks, changes) })
	a.leading.Go(func() { a.campaign(leading) })
	return nil
}

// Resign makes the agent stop leading for good.
func (a *Agent) Resign() {
	a.stopLeading()
	a.leading.Wait()
}

// Stop ends the agent. It returns when its goroutines have finished.
func (a *Agent) Stop() {
	a.stop()
	a.leading.Wait()
	a.running.Wait()
	_ = a.config.Close() // never an error
}

// Pace returns how long a task takes, by the agent's cache.
func (a *Agent) Pace() time.Duration {
	value, _ := a.config.Get("config.pace")
	pace, _ := time.ParseDuration(string(value))
	return pace
}

// campaign leads whenever the agent gets the lock, until ctx ends.
func (a *Agent) campaign(ctx context.Context) {
	for ctx.Err() == nil {
		err := state.WithLock(ctx, a.Store, "leader", leaderLease, a.lead)
		if err != nil && ctx.Err() == nil {
			a.Report("leading: %v", err)
			sleep(ctx, 100*time.Millisecond)
		}
	}
}

// lead plans tasks until ctx ends, for instance because the lock was lost. The
// names of the tasks contain the token. A later leader has a higher token, so two
// leaders never plan tasks of the same name.
func (a *Agent) lead(ctx context.Context, token uint64) error {
	now := time.Now()
	term := Term{Leader: a.Name, Token: token, Granted: now, Until: now}
	a.Terms(term)
	if err := a.Store.Put(fmt.Sprintf("leader.%d", token), []byte(a.Name), keepRecords); err != nil {
		return err
	}
	for n := 1; sleep(ctx, planEvery); n++ {
		if now = time.Now(); ctx.Err() != nil {
			return nil
		}
		term.Until = now
		a.Terms(term)
		if err := a.Store.Put(fmt.Sprintf("tasks.%d-%d", token, n), []byte("open"), 0); err != nil {
			return err
		}
	}
	return nil
}

// work does open tasks until ctx ends.
func (a *Agent) work(ctx context.Context, tasks []*state.KeyValue, changes <-chan *state.KeyValue) {
	a.open = make(map[string]bool)
	for _, kv := range tasks {
		a.note(kv)
	}
	// An open task that was locked may be free again, because its worker died.
	look := time.NewTicker(taskLease / 2)
	defer look.Stop()
	for {
		select {
		case kv, ok := <-changes:
			if !ok {
				return
			}
			if a.note(kv) {
				a.do(ctx, kv.Key)
			}
		case <-look.C:
			for task := range a.open {
				a.do(ctx, task)
			}
		}
	}
}

// note updates the set of open tasks, and reports whether this one is open.
func (a *Agent) note(kv *state.KeyValue) (open bool) {
	if open = string(kv.Value) == "open"; open {
		a.open[kv.Key] = true
	} else {
		delete(a.open, kv.Key)
	}
	return open
}

// do does a task, unless another agent is doing it or has done it. If it fails,
// the task stays open and is tried again later.
//
// The lock keeps two agents from doing the same work. Update ensures that the task
// is marked as done only once, even if the lock is lost: it writes only if the
// task is unchanged since it was read under the lock.
func (a *Agent) do(ctx context.Context, task string) {
	lock, err := a.Store.WithContext(ctx).Lock(task, taskLease)
	if err == nil {
		err = state.Hold(ctx, lock, taskLease, func(ctx context.Context, _ uint64) error {
			kv, err := a.Store.GetKeyValue(task)
			if err == state.ErrNotFound || err == nil && !a.note(kv) {
				return nil
			}
			if err != nil {
				return err
			}
			halfway := sleep(ctx, a.Pace()/2) // the work
			if a.Midway != nil {
				a.Midway(task)
			}
			if !halfway || !sleep(ctx, a.Pace()/2) {
				return ctx.Err()
			}
			_, err = a.Store.Update(task, []byte(doneBy+a.Name), keepRecords, kv.Revision)
			return err
		})
	}
	switch {
	case err == nil:
		delete(a.open, task)
	case err == state.ErrLockHeld, err == state.ErrConflict, ctx.Err() != nil:
		// Another agent is doing it or has done it, or this agent stops.
	default:
		a.Report("task %s: %v", task, err)
	}
}

// doneBy begins the record of a task that is done.
const doneBy = "done by "

// doer returns the name of the agent that did a task.
func doer(kv *state.KeyValue) (name string, done bool) {
	return strings.CutPrefix(string(kv.Value), doneBy)
}

// sleep waits for d. It reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
