package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/rpc"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// What an agent does, and how often.
const (
	heartbeat    = time.Second
	heartbeatTTL = 3 * time.Second
	leaderLease  = 3 * time.Second
	leaderPoll   = time.Second // how often a client without a lock service asks

	versionKey = "config.version"
	leaderKey  = "config.leader" // the leader writes its name there
	leaderLock = "leader"
)

func agentKey(id int) string { return fmt.Sprintf("agents.agent-%04d", id) }

// An agentClient is what an agent is built on: this package, or nats.go's KV.
type agentClient interface {
	beat(key string) error
	configure(key, value string) error
	// followConfig reports the configuration and its changes, until ctx ends.
	followConfig(ctx context.Context, changed func(key, value string)) error
	// followAgents reports the deaths of others, until ctx ends.
	followAgents(ctx context.Context, died func(key string)) error
	// lead waits for the leader's lock, writes the name to leaderKey, and keeps
	// the lock until ctx ends or it is lost.
	lead(ctx context.Context, name string) error
	close()
}

// newAgentClient makes a client of a kind, on a connection.
func newAgentClient(kind string, nc *nats.Conn) (agentClient, error) {
	if kind == us {
		s, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: "agents"})
		return &ourClient{s}, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, err
	}
	c := &kvClient{}
	for _, bucket := range []struct {
		kv  *jetstream.KeyValue
		cfg jetstream.KeyValueConfig
	}{
		{&c.config, jetstream.KeyValueConfig{Bucket: "config"}},
		// A KeyTTL can only be given to a new key and is lost with an Update, so
		// what is to be refreshed has the TTL of its bucket. The markers are what
		// tells a watch of an expiry.
		{&c.agents, jetstream.KeyValueConfig{Bucket: "agents", TTL: heartbeatTTL, LimitMarkerTTL: time.Minute}},
		{&c.locks, jetstream.KeyValueConfig{Bucket: "locks", TTL: leaderLease, LimitMarkerTTL: time.Minute}},
	} {
		*bucket.kv, err = js.KeyValue(ctx, bucket.cfg.Bucket)
		if errors.Is(err, jetstream.ErrBucketNotFound) {
			*bucket.kv, err = js.CreateKeyValue(ctx, bucket.cfg)
		}
		if err != nil {
			return nil, err
		}
	}
	return c, nil
}

// An ourClient is built on this package.
type ourClient struct{ store *state.NATSStore }

func (c *ourClient) beat(key string) error { return c.store.Put(key, value, heartbeatTTL) }

func (c *ourClient) configure(key, value string) error { return c.store.Put(key, []byte(value), 0) }

func (c *ourClient) followConfig(ctx context.Context, changed func(key, value string)) error {
	current, changes, err := state.Follow(ctx, c.store, "config.*")
	if err != nil {
		return err
	}
	for _, kv := range current {
		changed(kv.Key, string(kv.Value))
	}
	go func() {
		for kv := range changes {
			changed(kv.Key, string(kv.Value))
		}
	}()
	return nil
}

func (c *ourClient) followAgents(ctx context.Context, died func(key string)) error {
	_, changes, err := state.Follow(ctx, c.store, "agents.*")
	if err != nil {
		return err
	}
	go func() {
		for kv := range changes {
			if kv.Operation == state.OpDelete {
				died(kv.Key)
			}
		}
	}()
	return nil
}

func (c *ourClient) lead(ctx context.Context, name string) error {
	return state.WithLock(ctx, c.store, leaderLock, leaderLease, func(ctx context.Context, _ uint64) error {
		if err := c.configure(leaderKey, name); err != nil {
			return err
		}
		<-ctx.Done()
		return nil
	})
}

func (c *ourClient) close() { _ = c.store.Close() }

// A kvClient is built on nats.go's KV, as its users would.
type kvClient struct {
	config, agents, locks jetstream.KeyValue
}

func (c *kvClient) beat(key string) error {
	_, err := c.agents.Put(ctx, key, value)
	return err
}

func (c *kvClient) configure(key, value string) error {
	_, err := c.config.Put(ctx, key, []byte(value))
	return err
}

// follow reports the entries and later changes of a bucket.
func follow(ctx context.Context, kv jetstream.KeyValue, pattern string, changed func(jetstream.KeyValueEntry)) error {
	watcher, err := kv.Watch(ctx, pattern)
	if err != nil {
		return err
	}
	go func() {
		for {
			select {
			case entry, ok := <-watcher.Updates():
				if !ok {
					return
				}
				if entry != nil {
					changed(entry)
				}
			case <-ctx.Done():
				_ = watcher.Stop()
				return
			}
		}
	}()
	return nil
}

func (c *kvClient) followConfig(ctx context.Context, changed func(key, value string)) error {
	return follow(ctx, c.config, "config.>", func(entry jetstream.KeyValueEntry) {
		changed(entry.Key(), string(entry.Value()))
	})
}

func (c *kvClient) followAgents(ctx context.Context, died func(key string)) error {
	return follow(ctx, c.agents, "agents.>", func(entry jetstream.KeyValueEntry) {
		if entry.Operation() != jetstream.KeyValuePut {
			died(entry.Key())
		}
	})
}

// lead tries to create the lock until it can, then updates it. One that is not
// updated expires with the TTL of its bucket.
func (c *kvClient) lead(ctx context.Context, name string) error {
	ticker := time.NewTicker(leaderPoll)
	defer ticker.Stop()
	for {
		revision, err := c.locks.Create(ctx, leaderLock, []byte(name))
		switch {
		case err == nil:
			return c.keepLead(ctx, name, revision, ticker)
		case !errors.Is(err, jetstream.ErrKeyExists):
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// keepLead updates the lock at every tick.
func (c *kvClient) keepLead(ctx context.Context, name string, revision uint64, ticker *time.Ticker) error {
	if err := c.configure(leaderKey, name); err != nil {
		return err
	}
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
		var err error
		if revision, err = c.locks.Update(ctx, leaderLock, []byte(name), revision); err != nil {
			return err
		}
	}
}

func (c *kvClient) close() {}

// An agent is one client of the fleet.
type agent struct {
	id     int
	nc     *nats.Conn
	client agentClient
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	failed func(error) // reports an error of an agent that was not killed

	beating  sync.Mutex // held during a heartbeat
	lastBeat time.Time  // guarded by beating; when the last acknowledged one was sent

	lapses atomic.Int64 // how often a heartbeat was acknowledged too late

	mu       sync.Mutex // guards what follows
	watching bool       // follows the others
	version  sighting
	leader   sighting
	dead     map[string]sighting
}

// A sighting is what an agent has come to know, and when.
type sighting struct {
	value string
	at    time.Time
}

func openAgent(id int, kind, url string, failed func(error)) (*agent, error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return nil, err
	}
	a := &agent{id: id, nc: nc, dead: make(map[string]sighting), failed: failed}
	if a.client, err = newAgentClient(kind, nc); err != nil {
		return nil, err
	}
	a.ctx, a.cancel = context.WithCancel(ctx)
	err = a.persist(func() error { return a.client.followConfig(a.ctx, a.changed) })
	if err != nil {
		return nil, err
	}
	if err := a.persist(a.beat); err != nil {
		return nil, err
	}
	a.wg.Go(a.keepBeating)
	a.wg.Go(func() {
		for a.ctx.Err() == nil {
			if err := a.client.lead(a.ctx, agentKey(a.id)); err != nil && a.ctx.Err() == nil {
				a.failed(fmt.Errorf("leader's lock: %w", err))
				time.Sleep(100 * time.Millisecond)
			}
		}
	})
	return a, nil
}

// persist does something until it succeeds or knownWithin has passed.
func (a *agent) persist(do func() error) error {
	deadline := time.Now().Add(knownWithin)
	for {
		err := do()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		a.failed(err)
	}
}

func (a *agent) changed(key, value string) {
	seen := sighting{value, time.Now()}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch key {
	case versionKey:
		a.version = seen
	case leaderKey:
		a.leader = seen
	}
}

func (a *agent) beat() error {
	a.beating.Lock()
	defer a.beating.Unlock()
	if a.ctx.Err() != nil {
		return nil
	}
	sent := time.Now()
	if err := a.client.beat(agentKey(a.id)); err != nil {
		return err
	}
	if !a.lastBeat.IsZero() && time.Since(a.lastBeat) > heartbeatTTL {
		a.lapses.Add(1)
	}
	a.lastBeat = sent
	return nil
}

// keepBeating sends a heartbeat a second. Not all agents do so at the same time.
func (a *agent) keepBeating() {
	timer := time.NewTimer(rand.N(heartbeat))
	defer timer.Stop()
	next := time.Now()
	for {
		select {
		case <-timer.C:
		case <-a.ctx.Done():
			return
		}
		if err := a.beat(); err != nil && a.ctx.Err() == nil {
			a.failed(fmt.Errorf("heartbeat: %w", err))
		}
		if next = next.Add(heartbeat); time.Since(next) > heartbeat {
			next = time.Now()
		}
		timer.Reset(time.Until(next))
	}
}

// watch has the agent follow the living agents. An agent that cannot is reported, and goes
// on without.
func (a *agent) watch() {
	err := a.persist(func() error {
		return a.client.followAgents(a.ctx, func(key string) {
			seen := sighting{key, time.Now()}
			a.mu.Lock()
			defer a.mu.Unlock()
			a.dead[key] = seen
		})
	})
	if err != nil {
		a.failed(err)
		return
	}
	a.mu.Lock()
	a.watching = true
	a.mu.Unlock()
}

// kill lets the agent die, between two heartbeats. It returns when the last one
// was sent.
func (a *agent) kill() time.Time {
	a.beating.Lock()
	defer a.beating.Unlock()
	a.nc.Close() // first, so that what ends with the context can tell nobody
	a.cancel()
	return a.lastBeat
}

// close ends what kill has left. It waits for the agent's goroutines.
func (a *agent) close() {
	a.cancel()
	a.wg.Wait()
	a.client.close()
}

// A Fleet is a process with some of the agents. The process that measures calls
// its methods, over the standard input and output.
type Fleet struct {
	mu     sync.Mutex // guards what follows
	agents []*agent
	errors int
	err    error
}

// serveFleet runs a fleet until the standard input ends.
func serveFleet() {
	f := &Fleet{}
	server := rpc.NewServer()
	if err := server.Register(f); err != nil {
		log.Fatal(err)
	}
	server.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	for _, a := range f.agents {
		a.nc.Close()
	}
}

func (f *Fleet) failed(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.errors++
	f.err = err
}

// OpenArgs say which agents to open.
type OpenArgs struct {
	Kind, URL string
	IDs       []int
}

// Open opens agents, a few at a time.
func (f *Fleet) Open(args OpenArgs, _ *struct{}) error {
	return each(args.IDs, func(id int) error {
		a, err := openAgent(id, args.Kind, args.URL, f.failed)
		if err != nil {
			return fmt.Errorf("agent %d: %w", id, err)
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.agents = append(f.agents, a)
		return nil
	})
}

// each calls do for every ID, for eight at a time.
func each(ids []int, do func(id int) error) error {
	var (
		wg   sync.WaitGroup
		next = make(chan int)
		errs = make([]error, 8)
	)
	for i := range errs {
		wg.Go(func() {
			for id := range next {
				if errs[i] == nil {
					errs[i] = do(id)
				}
			}
		})
	}
	for _, id := range ids {
		next <- id
	}
	close(next)
	wg.Wait()
	return errors.Join(errs...)
}

// Watch has agents follow who is alive.
func (f *Fleet) Watch(ids []int, _ *struct{}) error {
	return each(ids, func(id int) error {
		for _, a := range f.alive() {
			if a.id == id {
				a.watch()
				return nil
			}
		}
		return fmt.Errorf("no agent %d", id)
	})
}

func (f *Fleet) alive() []*agent {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*agent(nil), f.agents...)
}

// FleetUsage is what the agents of a process have used and noticed so far.
type FleetUsage struct {
	Usage
	In, Out uint64 // messages
	Deaths  int    // that were reported to agents
	Lapses  int    // how often a heartbeat was acknowledged later than the TTL after the last one
	Errors  int
	Error   string // the last one
}

// Usage returns what the agents have used.
func (f *Fleet) Usage(memoryToo bool, answer *FleetUsage) error {
	*answer = FleetUsage{Usage: used(memoryToo)}
	for _, a := range f.alive() {
		stats := a.nc.Stats()
		answer.In += stats.InMsgs
		answer.Out += stats.OutMsgs
		a.mu.Lock()
		answer.Deaths += len(a.dead)
		a.mu.Unlock()
		answer.Lapses += int(a.lapses.Load())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if answer.Errors = f.errors; f.err != nil {
		answer.Error = f.err.Error()
	}
	return nil
}

// A Condition is what all agents should come to know: that this is the version,
// that this agent is dead, or that somebody else is the leader.
type Condition struct{ Version, Dead, NotLeader string }

func (c Condition) String() string {
	switch {
	case c.Version != "":
		return "the version is " + c.Version
	case c.Dead != "":
		return c.Dead + " is dead"
	case c.NotLeader != "":
		return c.NotLeader + " does not lead any more"
	}
	return "there is a leader"
}

// Known is what the last agent came to know, and when. Those who are missing
// did not come to know it within knownWithin.
type Known struct {
	Value           string
	At              time.Time
	Agents, Missing int
}

const knownWithin = 20 * time.Second

// known returns whether the agent knows.
func (a *agent) known(c Condition) (seen sighting, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case c.Version != "":
		return a.version, a.version.value == c.Version
	case c.Dead != "":
		seen, ok = a.dead[c.Dead]
		return seen, ok
	}
	return a.leader, a.leader.value != "" && a.leader.value != c.NotLeader
}

func (a *agent) watches() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.watching
}

// Await waits until all agents know, or knownWithin has passed.
func (f *Fleet) Await(c Condition, answer *Known) error {
	*answer = Known{}
	deadline := time.Now().Add(knownWithin)
	for _, a := range f.alive() {
		if c.Dead != "" && !a.watches() {
			continue
		}
		for {
			if seen, ok := a.known(c); ok {
				answer.Agents++
				if seen.at.After(answer.At) {
					answer.Value, answer.At = seen.value, seen.at
				}
				break
			}
			if now := time.Now(); now.After(deadline) {
				answer.Missing++
				answer.At = now
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	return nil
}

// Death is when an agent sent its last heartbeat, and when it died. It is zero
// if the agent is not of this process.
type Death struct{ LastBeat, Died time.Time }

// Kill lets an agent die.
func (f *Fleet) Kill(name string, answer *Death) error {
	*answer = Death{}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, a := range f.agents {
		if agentKey(a.id) == name {
			*answer = Death{a.kill(), time.Now()}
			f.agents = append(f.agents[:i:i], f.agents[i+1:]...)
			go a.close()
			return nil
		}
	}
	return nil
}
