package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/rpc"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const agentsText = "Every agent has a separate connection. It sends a heartbeat a second with a TTL of three seconds, follows `config.*`, " +
	"and waits for the leader's lock, a lease of three seconds. *Watching*: it also follows `agents.*` to know which agents live, " +
	"which takes a delivery for each heartbeat of each of them. No more than 20,000 of those a second are " +
	"asked of a machine that runs the server and all agents: of 300 agents 66 watch, of 1,000 agents 20, and what a watching one " +
	"costs is worked out from what they add; of up to 100 agents all watch. *Beside it*: nats.go's KV, with a bucket for each " +
	"TTL (its Update keeps no TTL of a key), markers so that a watch learns of expiries, and Create once a second for the lock. " +
	"A change is known to all after the beginning of its Put, a death after the end of the TTL, a new leader after the death " +
	"of the old one, of whose lease two to three seconds are left."

// A metric is something that is measured of a fleet.
type metric int

const (
	sentAlone metric = iota
	receivedAlone
	serverCPUAlone
	clientCPUAlone
	sent
	received
	serverCPU
	clientCPU
	serverMemory
	clientMemory
	changeKnown
	deathKnown
	leaderKnown
	metrics
)

var metricNames = [metrics]struct{ name, unit string }{
	{"messages sent per agent, not watching", "messages/s"},
	{"messages received per agent, not watching", "messages/s"},
	{"server CPU per agent, not watching", "CPU"},
	{"client CPU per agent, not watching", "CPU"},
	{"messages sent per agent", "messages/s"},
	{"messages received per agent", "messages/s"},
	{"server CPU per agent", "CPU"},
	{"client CPU per agent", "CPU"},
	{"server memory per agent", "bytes"},
	{"client memory per agent", "bytes"},
	{"a change is known to all", "ns"},
	{"a death is known to all", "ns"},
	{"a new leader is known to all", "ns"},
}

// agentsRow is the name of the row of a metric.
func agentsRow(agents int, m metric) string {
	return fmt.Sprintf("%s agents: %s", count(agents), metricNames[m].name)
}

// A point is what one size of the fleet has cost, for the plot.
type point struct {
	agents     int
	our, their [metrics]float64
}

// watchers returns how many agents follow the others: all, as long as that takes
// no more than 20,000 deliveries a second. A delivery takes 25 µs of CPU and
// more, of the server and the agent together.
func watchers(agents int) int { return min(agents, 20_000/agents) }

// agentsGroup compares what an agent costs, by the number of agents.
func agentsGroup(r *run) error {
	sizes, rounds, window := []int{10, 30, 100, 300, 1000}, 3, 3*time.Second
	if r.quick {
		sizes, rounds, window = []int{10, 100}, 1, 2*time.Second
	}
	kinds := []string{us, kvGo}
	for _, agents := range sizes {
		samples, err := r.measureFleets(kinds, agents, rounds, window)
		if err != nil {
			// What one size asks of the machine may be too much for it.
			reason, _, _ := strings.Cut(err.Error(), "\n")
			r.note("%s agents were not measured: %s.", count(agents), reason)
			log.Printf("%d agents: %v", agents, reason)
			continue
		}
		p := point{agents: agents}
		for m := range metrics {
			row := compare(agentsRow(agents, m), us, kvGo, samples[0][m], samples[1][m])
			row.unit = metricNames[m].unit
			p.our[m], p.their[m] = row.our, row.their
			if agents == 100 || agents == 1000 { // the tables have the others
				row.target = 1
				r.put(row)
			}
		}
		r.points = append(r.points, p)
		fmt.Fprintf(os.Stderr, "  %d agents: server CPU %s and %s\n", agents, duration(p.our[serverCPU]), duration(p.their[serverCPU]))
	}
	if len(r.points) == 0 {
		return errors.New("no number of agents was measured")
	}
	first, last := r.points[0], r.points[len(r.points)-1]
	flat := compare(fmt.Sprintf("server CPU per agent, not watching, of %s", count(last.agents)), us,
		fmt.Sprintf("ours, of %d", first.agents), last.our[serverCPUAlone:serverCPUAlone+1], first.our[serverCPUAlone:serverCPUAlone+1])
	flat.unit, flat.target = "CPU", 1.2
	r.put(flat)
	r.table(r.byAgents("Load per agent and second, ours / nats.go KV; not watching",
		sentAlone, receivedAlone, serverCPUAlone, clientCPUAlone))
	r.table(r.byAgents("The same of an agent that watches", sent, received, serverCPU, clientCPU))
	r.table(r.byAgents("Memory per agent, and times, ours / nats.go KV",
		serverMemory, clientMemory, changeKnown, deathKnown, leaderKnown))
	return nil
}

// measureFleets measures fleets of all kinds, in turn. It returns the samples by
// kind and metric.
func (r *run) measureFleets(kinds []string, agents, rounds int, window time.Duration) ([][metrics][]float64, error) {
	samples := make([][metrics][]float64, len(kinds))
	for range rounds {
		for _, i := range rand.Perm(len(kinds)) {
			found, err := r.measureFleet(kinds[i], agents, window)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kinds[i], err)
			}
			for m, x := range found {
				samples[i][m] = append(samples[i][m], x)
			}
		}
	}
	return samples, nil
}

// byAgents makes a table of some metrics.
func (r *run) byAgents(title string, columns ...metric) table {
	t := table{title: title, head: []string{"agents", "of them watching"}}
	for _, m := range columns {
		name, _, _ := strings.Cut(metricNames[m].name, ",")
		t.head = append(t.head, strings.Replace(name, " per agent", "", 1))
	}
	for _, p := range r.points {
		watching := watchers(p.agents)
		if columns[0] == sentAlone {
			watching = 0
		}
		line := []string{count(p.agents), count(watching)}
		for _, m := range columns {
			our, their := row{unit: metricNames[m].unit}.figure(p.our[m]), row{unit: metricNames[m].unit}.figure(p.their[m])
			line = append(line, our+" / "+their)
		}
		t.rows = append(t.rows, line)
	}
	return t
}

// fleets are the processes with the agents, and the server.
type fleets struct {
	nc      *nats.Conn // to the server, for its usage
	clients []*rpc.Client
	agents  int
	note    func(format string, args ...any)
}

// measureFleet measures agents of one kind, with processes of their own.
func (r *run) measureFleet(kind string, agents int, window time.Duration) (found [metrics]float64, err error) {
	defer r.closeTo(len(r.stops))
	address, _, err := r.start("nats")
	if err != nil {
		return found, err
	}
	nc, err := nats.Connect(address)
	if err != nil {
		return found, err
	}
	r.stops = append(r.stops, nc.Close)
	admin, err := newAgentClient(kind, nc) // makes the buckets, and changes the configuration
	if err != nil {
		return found, err
	}
	r.stops = append(r.stops, admin.close)
	f := &fleets{nc: nc, agents: agents, note: func(format string, args ...any) {
		r.note("%d agents, %s: %s.", agents, kind, fmt.Sprintf(format, args...))
	}}
	for range 4 {
		p, err := r.spawn("fleet")
		if err != nil {
			return found, err
		}
		f.clients = append(f.clients, rpc.NewClient(struct {
			io.Reader
			io.WriteCloser
		}{p.stdout, p.stdin}))
	}
	_, before, err := f.usage(true)
	if err != nil {
		return found, err
	}
	serverBefore, err := serverUsage(nc, true)
	if err != nil {
		return found, err
	}

	// Without the watches of the others.
	err = f.all("Open", func(i int) any { return OpenArgs{kind, address, f.share(i, agents)} }, func() any { return new(struct{}) }, nil)
	if err != nil {
		return found, err
	}
	leader, err := f.await(Condition{})
	if err != nil {
		return found, err
	}
	if leader.Agents == 0 {
		return found, errors.New("there is no leader")
	}
	if err := f.window(window, &found, sentAlone, receivedAlone, serverCPUAlone, clientCPUAlone); err != nil {
		return found, err
	}

	// And with them.
	err = f.all("Watch", func(i int) any { return f.share(i, watchers(agents)) }, func() any { return new(struct{}) }, nil)
	if err != nil {
		return found, err
	}
	if err := f.window(window, &found, sent, received, serverCPU, clientCPU); err != nil {
		return found, err
	}
	share := float64(watchers(agents)) / float64(agents)
	for _, m := range []struct{ alone, watching metric }{
		{sentAlone, sent}, {receivedAlone, received}, {serverCPUAlone, serverCPU}, {clientCPUAlone, clientCPU},
	} {
		found[m.watching] = found[m.alone] + (found[m.watching]-found[m.alone])/share
	}
	var changes []float64
	for i := range 5 {
		version, start := fmt.Sprint(i), time.Now()
		if err := admin.configure(versionKey, version); err != nil {
			return found, err
		}
		known, err := f.await(Condition{Version: version})
		if err != nil {
			return found, err
		}
		changes = append(changes, float64(known.At.Sub(start)))
	}
	found[changeKnown] = median(changes)

	noticed, after, err := f.usage(true)
	if err != nil {
		return found, err
	}
	serverAfter, err := serverUsage(nc, true)
	if err != nil {
		return found, err
	}
	found[serverMemory] = (serverAfter.Memory - serverBefore.Memory) / float64(agents)
	found[clientMemory] = (after.Memory - before.Memory) / float64(agents)
	if noticed.Deaths > 0 || noticed.Errors > 0 {
		f.note("%d reports of deaths of agents that lived, of whom %d sent a heartbeat too late, and %d errors%s",
			noticed.Deaths, noticed.Lapses, noticed.Errors, strings.TrimSuffix(", such as "+noticed.Error, ", such as "))
	}

	// The leader dies.
	var died Death
	err = f.all("Kill", func(int) any { return leader.Value }, func() any { return new(Death) }, func(answer any) {
		if d := answer.(*Death); !d.Died.IsZero() {
			died = *d
		}
	})
	if err != nil {
		return found, err
	}
	if died.Died.IsZero() {
		return found, errors.New("the leader is not of the fleet")
	}
	dead, err := f.await(Condition{Dead: leader.Value})
	if err != nil {
		return found, err
	}
	next, err := f.await(Condition{NotLeader: leader.Value})
	if err != nil {
		return found, err
	}
	found[deathKnown] = float64(dead.At.Sub(died.LastBeat.Add(heartbeatTTL)))
	found[leaderKnown] = float64(next.At.Sub(died.Died))
	return found, nil
}

// share returns the IDs below n of the agents of one process.
func (f *fleets) share(process, n int) []int {
	ids := []int{}
	for id := process; id < n; id += len(f.clients) {
		ids = append(ids, id)
	}
	return ids
}

// all calls a method of all processes at once.
func (f *fleets) all(method string, args func(process int) any, reply func() any, use func(reply any)) error {
	calls := make([]*rpc.Call, len(f.clients))
	for i, c := range f.clients {
		calls[i] = c.Go("Fleet."+method, args(i), reply(), make(chan *rpc.Call, 1))
	}
	var errs []error
	for _, call := range calls {
		<-call.Done
		errs = append(errs, call.Error)
		if call.Error == nil && use != nil {
			use(call.Reply)
		}
	}
	return errors.Join(errs...)
}

// await waits until all agents know something, and returns when the last one
// came to know it.
func (f *fleets) await(c Condition) (last Known, err error) {
	err = f.all("Await", func(int) any { return c }, func() any { return new(Known) }, func(reply any) {
		known := reply.(*Known)
		last.Agents += known.Agents
		last.Missing += known.Missing
		if known.Value != "" {
			last.Value = known.Value
		}
		if known.At.After(last.At) {
			last.At = known.At
		}
	})
	if last.Missing > 0 {
		f.note("%d of %d do not come to know within %v that %v", last.Missing, last.Missing+last.Agents, knownWithin, c)
	}
	return last, err
}

// usage sums up what the agents' processes have used.
func (f *fleets) usage(memoryToo bool) (sum FleetUsage, total Usage, err error) {
	err = f.all("Usage", func(int) any { return memoryToo }, func() any { return new(FleetUsage) }, func(reply any) {
		u := reply.(*FleetUsage)
		sum.In += u.In
		sum.Out += u.Out
		sum.Deaths += u.Deaths
		sum.Lapses += u.Lapses
		if sum.Errors += u.Errors; u.Error != "" {
			sum.Error = u.Error
		}
		total.CPU += u.CPU
		total.Memory += u.Memory
	})
	return sum, total, err
}

// window measures for a while what an agent costs in a second, once things have
// settled.
func (f *fleets) window(d time.Duration, found *[metrics]float64, out, in, server, client metric) error {
	time.Sleep(d / 2)
	type reading struct {
		at     time.Time
		fleet  FleetUsage
		total  Usage
		server Usage
	}
	read := func() (x reading, err error) {
		if x.fleet, x.total, err = f.usage(false); err != nil {
			return x, err
		}
		x.at = time.Now()
		x.server, err = serverUsage(f.nc, false)
		return x, err
	}
	from, err := read()
	if err != nil {
		return err
	}
	time.Sleep(d)
	to, err := read()
	if err != nil {
		return err
	}
	each := to.at.Sub(from.at).Seconds() * float64(f.agents)
	found[out] = float64(to.fleet.Out-from.fleet.Out) / each
	found[in] = float64(to.fleet.In-from.fleet.In) / each
	found[server] = float64(to.server.CPU-from.server.CPU) / each
	found[client] = float64(to.total.CPU-from.total.CPU) / each
	return nil
}
