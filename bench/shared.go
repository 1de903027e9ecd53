package main

import (
	"fmt"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go/jetstream"
)

const sharedText = "Keys that several clients write, each with a separate store and connection."

// sharedGroup compares Puts of keys that others write, too.
func sharedGroup(r *run) error {
	if err := r.turns(); err != nil {
		return err
	}
	for _, rtt := range []time.Duration{0, 10 * time.Millisecond} {
		if err := r.oneKey(rtt); err != nil {
			return err
		}
	}
	return nil
}

// turns has two clients write the same keys in turn, so that each Put replaces
// what the other one wrote.
func (r *run) turns() error {
	var ours [2]*state.NATSStore
	var theirs [2]jetstream.KeyValue
	var err error
	for i := range 2 {
		if ours[i], _, err = r.openStore("state-turns"); err != nil {
			return err
		}
		if theirs[i], _, err = r.openKV("peer-turns", 0); err != nil {
			return err
		}
	}
	turn, turnKV := 0, 0
	return r.add("Put of what another client wrote", r.plan(4), []float64{2.6},
		timed(us, func() error {
			turn++
			return ours[turn%2].Put("turns.key", value, 0)
		}),
		timed(kvGo+" Put", func() error {
			turnKV++
			_, err := theirs[turnKV%2].Put(ctx, "turns.key", value)
			return err
		}))
}

// oneKey has 64 clients write one key, at a distance from the server.
func (r *run) oneKey(rtt time.Duration) error {
	name := fmt.Sprintf("%d clients, one key: Put", clients)
	if rtt > 0 {
		name += fmt.Sprintf(", RTT %v", rtt)
		_, err := r.connect()
		if err != nil {
			return err
		}
		server := r.nats
		defer func() { r.nats = server }()
		if r.nats, err = r.startProxy(server, rtt); err != nil {
			return err
		}
	}
	ours, theirs := make([]*state.NATSStore, clients), make([]jetstream.KeyValue, clients)
	var err error
	for i := range clients {
		if ours[i], _, err = r.openStore("state-one-key"); err != nil {
			return err
		}
		if theirs[i], _, err = r.openKV("peer-one-key", 0); err != nil {
			return err
		}
	}
	p := r.plan(4)
	p.chunk *= 10
	p.rounds = max(p.rounds/10, 5)
	sides := []side{
		together(us, func(client int) error { return ours[client].Put("one.key", value, 0) }),
		together(kvGo+" Put", func(client int) error { _, err := theirs[client].Put(ctx, "one.key", value); return err }),
	}
	samples, err := measure(p, sides...)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	row := compare(name, us, sides[1].name, throughput(samples[0]), throughput(samples[1]))
	row.unit, row.atLeast, row.target = "op/s", true, 0.3
	r.put(row)
	return nil
}
