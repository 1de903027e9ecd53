package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
)

const (
	leaderLease = 1500 * time.Millisecond // a dead leader is missed for no longer
	taskLease   = time.Second             // nor is a dead worker; no task takes as long
	heartbeat   = time.Second             // an agent that is silent for so long is gone
	planEvery   = 150 * time.Millisecond
	keepRecords = time.Minute // of tasks and terms, for those who want to know
)

// An Agent is one member of the swarm. All that it knows of the others it knows
// from the store:
//
//	agents.<name>   is there while the agent is alive
//	config.pace     is how long a task takes
//	leader.<term>   is who led, or leads; the term is the lock's fencing token
//	tasks.<term>-<n> is "open" or "done by <name>"
//
// and the locks "leader" and "tasks.<term>-<n>".
type Agent struct {
	Name  string
	Store state.Store

	// Tell is told what goes wrong.
	Tell func(format string, args ...any)
	// Terms is told of each grant and each extension of the leader's lease.
	Terms func(Term)
	// Midway, unless nil, is called in the middle of every task.
	Midway func(task string)

	pace        atomic.Int64
	stop        context.CancelFunc
	stopLeading context.CancelFunc
	leading     sync.WaitGroup
	running     sync.WaitGroup
}

// A Term is what an agent knows of its being the leader: nobody else is before
// Until.
type Term struct {
	Leader         string
	Token          uint64
	Granted, Until time.Time
}

// Start sets the agent to work.
func (a *Agent) Start() {
	ctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	a.running.Go(func() { a.again(ctx, "heartbeat", a.beat) })
	a.running.Go(func() { a.again(ctx, "configuration", a.follow) })
	a.running.Go(func() { a.again(ctx, "work", a.work) })

	leading, stopLeading := context.WithCancel(ctx)
	a.stopLeading = stopLeading
	a.leading.Go(func() { a.again(leading, "leading", a.campaign) })
}

// Resign makes the agent stop leading, and not try again.
func (a *Agent) Resign() {
	a.stopLeading()
	a.leading.Wait()
}

// Stop ends the agent. It returns when nothing of it runs any more.
func (a *Agent) Stop() {
	a.stop()
	a.leading.Wait()
	a.running.Wait()
}

// Pace is how long a task takes, for all that the agent has heard.
func (a *Agent) Pace() time.Duration { return time.Duration(a.pace.Load()) }

// again runs a part of the agent until ctx is done. Whatever fails, it starts
// over from what the store says: no part remembers anything.
func (a *Agent) again(ctx context.Context, name string, part func(context.Context) error) {
	for {
		err := part(ctx)
		if ctx.Err() != nil {
			return
		}
		a.Tell("%s: %v", name, err)
		sleep(ctx, 100*time.Millisecond)
	}
}

// beat says that the agent is alive, again and again. When it stops, so do all
// others know, a heartbeat later.
func (a *Agent) beat(ctx context.Context) error {
	key := "agents." + a.Name
	for {
		if err := a.Store.Put(key, []byte("alive"), heartbeat); err != nil {
			return err
		}
		if !sleep(ctx, heartbeat/3) {
			return a.Store.Delete(key)
		}
	}
}

var errWatchEnded = errors.New("the watch has ended")

// follow keeps the agent's configuration up to date: first Watch, then Get, so
// that no change is missed in between.
func (a *Agent) follow(ctx context.Context) error {
	changes, err := a.Store.WithContext(ctx).Watch("config.pace")
	if err != nil {
		return err
	}
	value, err := a.Store.Get("config.pace")
	if err != nil && err != state.ErrNotFound {
		return err
	}
	for {
		if pace, err := time.ParseDuration(string(value)); err == nil {
			a.pace.Store(int64(pace))
		}
		kv, ok := <-changes
		if !ok {
			return errWatchEnded
		}
		value = kv.Value
	}
}

// campaign tries to become the leader.
func (a *Agent) campaign(ctx context.Context) error {
	for {
		asked := time.Now()
		lock, err := a.Store.Lock("leader", leaderLease)
		switch {
		case err == nil:
			if err := a.lead(ctx, lock, asked); err != nil {
				return err
			}
		case err != state.ErrLockHeld:
			return err
		}
		if !sleep(ctx, leaderLease/15) {
			return nil
		}
	}
}

// lead plans tasks for as long as the lease can be kept.
func (a *Agent) lead(ctx context.Context, lock state.Lock, asked time.Time) error {
	defer lock.Unlock() // or the others wait for the lease to lapse
	// The token is the term's number: whoever leads later has a higher one, and
	// can plan nothing under the same names.
	term := Term{Leader: a.Name, Token: lock.(state.Fenced).Token(), Granted: time.Now(), Until: asked.Add(leaderLease)}
	defer func() {
		if now := time.Now(); now.Before(term.Until) {
			term.Until = now // it gives the rest away
		}
		a.Terms(term)
	}()
	a.Terms(term)
	if err := a.Store.Put(fmt.Sprintf("leader.%d", term.Token), []byte(a.Name), keepRecords); err != nil {
		return err
	}
	refresh, plan := time.NewTicker(leaderLease/3), time.NewTicker(planEvery)
	defer refresh.Stop()
	defer plan.Stop()
	for n := 1; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-refresh.C:
			asked := time.Now()
			if err := lock.Refresh(); err != nil {
				return err
			}
			term.Until = asked.Add(leaderLease)
			a.Terms(term)
		case <-plan.C:
			if !time.Now().Before(term.Until) {
				return state.ErrLockExpired // for all that this agent can know
			}
			if err := a.Store.Put(fmt.Sprintf("tasks.%d-%d", term.Token, n), []byte("open"), keepRecords); err != nil {
				return err
			}
			n++
		}
	}
}

// work does the tasks that nobody else does.
func (a *Agent) work(ctx context.Context) error {
	changes, err := a.Store.WithContext(ctx).Watch("tasks.*")
	if err != nil {
		return err
	}
	keys, err := a.Store.Keys("tasks.*")
	if err != nil {
		return err
	}
	open := make(map[string]bool)
	for _, key := range keys {
		open[key] = true // or done; it will turn out
	}
	// Now and then it looks whether somebody died over a task.
	look := time.NewTicker(taskLease / 2)
	defer look.Stop()
	for {
		var candidates []string
		select {
		case kv, ok := <-changes:
			if !ok {
				return errWatchEnded
			}
			if string(kv.Value) != "open" {
				delete(open, kv.Key)
				continue
			}
			open[kv.Key] = true
			candidates = []string{kv.Key}
		case <-look.C:
			for task := range open {
				candidates = append(candidates, task)
			}
		}
		for _, task := range candidates {
			done, err := a.do(ctx, task)
			if err != nil || ctx.Err() != nil {
				return err
			}
			if done {
				delete(open, task)
			}
		}
	}
}

// do does a task, unless somebody else does it or has done it. It reports
// whether the task is done.
//
// The lock keeps two agents from doing the same work. That it is done only once,
// whatever happens to locks and agents, is decided by the last line: it writes
// only on top of the "open" that was read under the lock.
func (a *Agent) do(ctx context.Context, task string) (done bool, err error) {
	lock, err := a.Store.Lock(task, taskLease)
	if err == state.ErrLockHeld {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer lock.Unlock()
	kv, err := a.Store.GetKeyValue(task)
	if err == state.ErrNotFound || err == nil && string(kv.Value) != "open" {
		return true, nil
	}
	if err != nil {
		return false, err
	}

	sleep(ctx, a.Pace()/2) // the work
	if a.Midway != nil {
		a.Midway(task)
	}
	if !sleep(ctx, a.Pace()/2) {
		return false, nil // stopped in the middle of it: somebody else will do it
	}

	_, err = a.Store.Update(task, []byte(doneBy+a.Name), keepRecords, kv.Revision)
	if err == state.ErrConflict {
		return true, nil
	}
	return err == nil, err
}

// doneBy begins the record of a task that is done.
const doneBy = "done by "

// doer returns who did a task, by its record.
func doer(kv *state.KeyValue) (name string, done bool) {
	return strings.CutPrefix(string(kv.Value), doneBy)
}

// sleep waits, and reports whether it did so to the end.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
