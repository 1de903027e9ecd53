package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/state"
)

// A Witness follows the whole store. It prints what happens, and records it for
// the checks at the end.
type Witness struct {
	Ended chan struct{} // closed when the store is closed

	began time.Time

	mu     sync.Mutex // guards what follows
	out    io.Writer
	alive  map[string]bool
	leader string // of the last term that was announced
	pace   string
	tasks  map[string]bool // true if done
	doers  map[string]int  // how many tasks each agent did
	twice  []string        // tasks that were done once more
	terms  map[uint64]Term // of the agents of this process
}

// Observe returns a witness that follows the store until that is closed.
func Observe(store state.Store, out io.Writer) (*Witness, error) {
	w := &Witness{
		Ended: make(chan struct{}),
		began: time.Now(), out: out,
		alive: make(map[string]bool), tasks: make(map[string]bool), doers: make(map[string]int),
		terms: make(map[uint64]Term),
	}
	current, changes, err := state.Follow(context.Background(), store, "*")
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(w.Ended)
		for _, kv := range current {
			w.take(kv)
		}
		for kv := range changes {
			w.take(kv)
		}
	}()
	return w, nil
}

// Say prints a line about an agent, or about the swarm.
func (w *Witness) Say(who, format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.say(who, format, args...)
}

func (w *Witness) say(who, format string, args ...any) {
	fmt.Fprintf(w.out, "%6.2fs  %-9s %s\n", time.Since(w.began).Seconds(), who, fmt.Sprintf(format, args...))
}

func (w *Witness) take(kv *state.KeyValue) {
	w.mu.Lock()
	defer w.mu.Unlock()
	kind, name, _ := strings.Cut(kv.Key, ".")
	put := kv.Operation == state.OpPut
	switch {
	case kind == "agents" && put:
		if !w.alive[name] {
			w.alive[name] = true
			w.say(name, "joins")
		}
	case kind == "agents":
		delete(w.alive, name)
		w.say(name, "is gone: its heartbeat has stopped")
	case kind == "config" && put:
		w.pace = string(kv.Value)
		w.say("config", "from now on a task takes %s", kv.Value)
	case kind == "leader" && put:
		w.leader = string(kv.Value)
		w.say(w.leader, "leads; its fencing token is %s", name)
	case kind == "tasks" && put:
		done := w.tasks[name]
		if who, ok := doer(kv); ok {
			if done {
				w.twice = append(w.twice, name)
			}
			w.doers[who]++
			w.say(who, "did task %s", name)
			done = true
		}
		w.tasks[name] = done
	}
}

// Term records a term as the leader of an agent of this process.
func (w *Witness) Term(t Term) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.terms[t.Token] = t
}

// Leader returns the name of the leader.
func (w *Witness) Leader() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leader
}

// Pace returns the value of config.pace.
func (w *Witness) Pace() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pace
}

// Alive returns the names of the agents that send heartbeats, sorted.
func (w *Witness) Alive() (names []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name := range w.alive {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Done reports whether a task is done.
func (w *Witness) Done(task string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.tasks[task]
}

// Tasks returns how many tasks were planned, how many were done, and which of
// them more than once.
func (w *Witness) Tasks() (planned, done int, twice []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range w.tasks {
		if d {
			done++
		}
	}
	return len(w.tasks), done, slices.Clone(w.twice)
}

// DoneBy returns how many tasks an agent did.
func (w *Witness) DoneBy(name string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.doers[name]
}

// Terms returns the recorded terms, in order.
func (w *Witness) Terms() (terms []Term) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.terms {
		terms = append(terms, t)
	}
	slices.SortFunc(terms, func(x, y Term) int { // in a bubble several can begin at the same instant
		return cmp.Or(x.Granted.Compare(y.Granted), cmp.Compare(x.Token, y.Token))
	})
	return terms
}

// Await waits until f holds, and reports whether it did in time.
func Await(timeout time.Duration, f func() bool) bool {
	for end := time.Now().Add(timeout); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// A checklist is the summary of a run.
type checklist struct {
	lines  []string
	failed bool
}

func (c *checklist) check(ok bool, format string, args ...any) {
	mark := "ok    "
	if !ok {
		mark = "FAILED"
		c.failed = true
	}
	c.lines = append(c.lines, mark+" "+fmt.Sprintf(format, args...))
}

// terms checks that no agent became the leader while another one led.
func (c *checklist) terms(terms []Term, atLeast int) {
	ok := len(terms) >= atLeast
	tokens := []string{}
	for i, t := range terms {
		tokens = append(tokens, fmt.Sprint(t.Token))
		ok = ok && (i == 0 || t.Token > terms[i-1].Token && !t.Granted.Before(terms[i-1].Until))
	}
	c.check(ok, "one leader at a time: each term began after the last one; their tokens are %s", strings.Join(tokens, ", "))
}

func (c *checklist) print(out io.Writer) (ok bool) {
	fmt.Fprintln(out)
	for _, line := range c.lines {
		fmt.Fprintln(out, line)
	}
	return !c.failed
}
