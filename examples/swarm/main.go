// Swarm shows what package state is for: a few agents share nothing but a store,
// and keep working together when some of them die.
//
//	go run ./examples/swarm
//
// runs five agents for about ten seconds on a NATS server inside this process,
// each with its own connection and store. One agent holds a lock, leads and plans
// tasks. All agents do tasks, each task under a lock, send heartbeats, and read a
// setting from a cache. Then the leader is cut off in the middle of its term, and
// a worker in the middle of a task. At the end the run checks itself; its exit
// code is 1 if a check fails.
//
//	go run ./examples/swarm -nats nats://host:4222
//
// connects such agents to a real server, until they are interrupted. Several such
// processes, on several machines, form one swarm: kill any of them.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"example.com/state"
)

var (
	url    = flag.String("nats", "", "address of the servers to join, instead of one inside this process")
	agents = flag.Int("agents", 5, "number of agents, at least 3")
	pace   = flag.Duration("pace", 0, "how long a task takes, from now on and for the whole swarm")
	length = flag.Duration("for", 0, "with -nats: when to leave, instead of when interrupted")
	bucket = flag.String("bucket", "swarm", "the bucket that the swarm shares")
)

func main() {
	flag.Parse()
	run := demonstrate
	if *url != "" {
		run = join
	}
	ok, err := run(os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "swarm:", err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

// A member is an agent and its connection.
type member struct {
	*Agent
	nc   *nats.Conn
	dead bool
}

// A Swarm is the agents of this process, and their witness.
type Swarm struct {
	*Witness
	members []*member
	nc      *nats.Conn
	store   *state.NATSStore
}

func open(url string) (*nats.Conn, *state.NATSStore, error) {
	nc, err := nats.Connect(url, nats.MaxReconnects(-1))
	if err != nil {
		return nil, nil, err
	}
	store, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: *bucket})
	if err != nil {
		nc.Close()
		return nil, nil, err
	}
	return nc, store, nil
}

// gather starts the agents and the witness.
func gather(out io.Writer, url string, pace time.Duration, names []string) (*Swarm, error) {
	s := &Swarm{}
	var err error
	if s.nc, s.store, err = open(url); err != nil {
		return nil, err
	}
	if s.Witness, err = Observe(s.store, out); err != nil {
		return nil, err
	}
	if err := s.configure(pace); err != nil {
		return nil, err
	}
	for _, name := range names {
		nc, store, err := open(url)
		if err != nil {
			return nil, err
		}
		m := &member{nc: nc}
		m.Agent = &Agent{Name: name, Store: store, Terms: s.Term, Report: func(format string, args ...any) {
			if !nc.IsClosed() {
				s.Say(name, format, args...)
			}
		}}
		s.members = append(s.members, m)
	}
	return s, nil
}

func (s *Swarm) start() error {
	for _, m := range s.members {
		if err := m.Start(); err != nil {
			return err
		}
	}
	return nil
}

// configure sets the swarm's pace. 0 keeps the current one, or sets the default if
// there is none.
func (s *Swarm) configure(pace time.Duration) error {
	_, err := state.Modify(context.Background(), s.store, "config.pace", func(old *state.KeyValue) ([]byte, time.Duration, error) {
		switch {
		case pace > 0:
			return []byte(pace.String()), 0, nil
		case old != nil:
			return old.Value, 0, nil
		}
		return []byte("200ms"), 0, nil
	})
	return err
}

// cut closes an agent's connection without warning: the agent cannot unlock or
// delete anything.
func (s *Swarm) cut(m *member, why string) {
	m.nc.Close()
	m.dead = true
	s.Say("****", "%s is cut off %s", m.Name, why)
	go func() { // it may be the caller
		m.Store.Close()
		m.Stop()
	}()
}

func (s *Swarm) living() (living []*member) {
	for _, m := range s.members {
		if !m.dead {
			living = append(living, m)
		}
	}
	return living
}

// disband stops all agents, the leader first, and closes what was opened.
func (s *Swarm) disband() error {
	for _, m := range s.living() {
		m.Resign()
	}
	// Nobody plans any more. The agents finish the tasks that were planned.
	tasks, err := state.NewCache(context.Background(), s.store, "tasks.*")
	if err != nil {
		return err
	}
	Await(10*time.Second, func() bool {
		all, err := tasks.Entries("tasks.*")
		return err == nil && !slices.ContainsFunc(all, func(kv *state.KeyValue) bool { return string(kv.Value) == "open" })
	})
	for _, m := range s.members {
		m.Stop()
		m.Store.Close()
		m.nc.Close()
	}
	Await(5*time.Second, func() bool {
		return !slices.ContainsFunc(s.members, func(m *member) bool { return slices.Contains(s.Alive(), m.Name) })
	})
	s.store.Close() // ends the cache and the witness's changes, too
	<-s.Ended
	s.nc.Close()
	return nil
}

// demonstrate runs a swarm on a server in this process, and cuts two agents off.
func demonstrate(out io.Writer) (ok bool, err error) {
	dir, err := os.MkdirTemp("", "swarm-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true,
	})
	if err != nil {
		return false, err
	}
	srv.Start()
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	if !srv.ReadyForConnections(20 * time.Second) {
		return false, fmt.Errorf("the server does not start")
	}

	names := []string{"ada", "grace", "alan", "barbara", "edsger"}
	for n := len(names); n < *agents; n++ {
		names = append(names, fmt.Sprintf("agent-%d", n+1))
	}
	s, err := gather(out, srv.ClientURL(), *pace, names[:max(*agents, 3)])
	if err != nil {
		return false, err
	}
	var c checklist

	// The worker that is cut off: the first one to reach the middle of a task
	// after due is set.
	var due atomic.Bool
	victim := make(chan string, 1)
	var orphan string
	for _, m := range s.members {
		m.Midway = func(task string) {
			if s.Leader() != m.Name && due.CompareAndSwap(true, false) {
				s.cut(m, "in the middle of "+task)
				orphan = strings.TrimPrefix(task, "tasks.")
				victim <- m.Name
			}
		}
	}

	if err := s.start(); err != nil {
		return false, err
	}
	c.check(Await(10*time.Second, func() bool { return s.Leader() != "" && len(s.Alive()) == len(s.members) }),
		"%d agents joined, and %s leads", len(s.Alive()), s.Leader())

	time.Sleep(1500 * time.Millisecond)
	if err := s.configure(100 * time.Millisecond); err != nil {
		return false, err
	}
	c.check(s.agree(), "every agent knows the new pace: %s", s.Pace())

	// The leader.
	time.Sleep(1200 * time.Millisecond)
	first := s.Leader()
	cutAt := time.Now()
	for _, m := range s.members {
		if m.Name == first {
			s.cut(m, "while it leads")
		}
	}
	c.check(Await(10*time.Second, func() bool { return s.Leader() != first }), "%s was cut off, and %s leads", first, s.Leader())
	terms := s.Terms()
	took := terms[len(terms)-1].Granted.Sub(cutAt)
	c.check(took < leaderLease+4*time.Second, "that took %v; the lease is %v", took.Round(time.Millisecond), leaderLease)

	// A worker.
	time.Sleep(500 * time.Millisecond)
	due.Store(true)
	name := <-victim
	c.check(Await(10*time.Second, func() bool { return s.Done(orphan) }),
		"%s was cut off, and somebody else did its task %s", name, orphan)

	var living []string
	for _, m := range s.living() {
		living = append(living, m.Name)
	}
	slices.Sort(living)
	c.check(Await(10*time.Second, func() bool { return slices.Equal(s.Alive(), living) }),
		"the heartbeats show the living agents: %s", strings.Join(living, ", "))
	time.Sleep(time.Second)

	if err := s.disband(); err != nil {
		return false, err
	}
	planned, done, twice := s.Tasks()
	c.check(done == planned && done > 0, "%d tasks were planned, %d were done", planned, done)
	c.check(len(twice) == 0, "%d tasks were done twice", len(twice))
	c.terms(s.Terms(), 2)
	return c.print(out), nil
}

// join runs agents that join a swarm on another server.
func join(out io.Writer) (ok bool, err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if *length > 0 {
		ctx, stop = context.WithTimeout(ctx, *length)
		defer stop()
	}
	host, _ := os.Hostname()
	if host, _, _ = strings.Cut(host, "."); state.ValidateKey(host) != nil {
		host = "agent"
	}
	var names []string
	for n := range *agents {
		names = append(names, fmt.Sprintf("%s-%d-%d", host, os.Getpid(), n+1))
	}
	s, err := gather(out, *url, *pace, names)
	if err != nil {
		return false, err
	}
	if err := s.start(); err != nil {
		return false, err
	}
	<-ctx.Done()
	stop() // a second interrupt kills

	// One process cannot check the whole swarm.
	var c checklist
	c.check(Await(5*time.Second, func() bool {
		return !slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(s.Alive(), name) })
	}), "all %d agents of this process are among the %d living ones", len(names), len(s.Alive()))
	c.check(s.agree(), "they know the pace: %s", s.Pace())
	if err := s.disband(); err != nil {
		return false, err
	}
	ours := 0
	for _, name := range names {
		ours += s.DoneBy(name)
	}
	_, done, twice := s.Tasks()
	c.check(ours <= done, "they did %d of %d tasks", ours, done)
	c.check(len(twice) == 0, "%d tasks were done twice", len(twice))
	if terms := s.Terms(); len(terms) > 0 {
		c.terms(terms, 1)
	}
	return c.print(out), nil
}

// agree waits until all agents know the pace in the store, and reports whether
// they do.
func (s *Swarm) agree() bool {
	value, err := s.store.Get("config.pace")
	if err != nil {
		return false
	}
	return Await(5*time.Second, func() bool {
		return !slices.ContainsFunc(s.living(), func(m *member) bool { return m.Pace().String() != string(value) })
	})
}
