package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const distanceText = "The operations one at a time, through a proxy that delivers everything half a round-trip time later and limits no " +
	"throughput. The round trips are the time divided by that of a plain request through the same proxy (*echo*)."

// distanceGroup compares the operations when the server is far away.
func distanceGroup(r *run) error {
	if _, err := r.connect(); err != nil {
		return err
	}
	server := r.nats
	defer func() { r.nats = server }()
	trips := table{
		title: "Round trips of an operation, ours / nats.go KV",
		head:  []string{"RTT", "echo"},
	}
	for _, rtt := range []time.Duration{time.Millisecond, 5 * time.Millisecond, 20 * time.Millisecond} {
		var err error
		if r.nats, err = r.startProxy(server, rtt); err != nil {
			return err
		}
		basics, err := r.basics(fmt.Sprintf("%dms", rtt/time.Millisecond), r.few(9, 4))
		if err != nil {
			return err
		}
		line := []string{rtt.String(), duration(basics[0].echo)}
		for _, b := range basics {
			if len(trips.rows) == 0 {
				trips.head = append(trips.head, b.row.name)
			}
			line = append(line, fmt.Sprintf("%.1f / %.1f", b.our, b.their))
			b.row.name = fmt.Sprintf("RTT %v: %s", rtt, b.row.name)
			r.put(b.row)
		}
		trips.rows = append(trips.rows, line)
	}
	r.table(trips)
	return nil
}

// A basic is what was found of a basic operation.
type basic struct {
	row        row
	echo       float64 // what a plain request took
	our, their float64 // how many times that the operation took
}

// basics compares the basic operations, by a new store and by new buckets of
// nats.go's.
func (r *run) basics(suffix string, p plan) ([]basic, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, err
	}
	echo := timed("echo", func() error {
		_, err := nc.Request("echo", value, 5*time.Second)
		return err
	})
	s, _, err := r.openStore("state-" + suffix)
	if err != nil {
		return nil, err
	}
	kv, _, err := r.openKV("peer-"+suffix, 0)
	if err != nil {
		return nil, err
	}
	kvWithTTL, _, err := r.openKV("peer-ttl-"+suffix, kvTTL)
	if err != nil {
		return nil, err
	}
	if lock, err := s.Lock("first", lockTTL); err != nil { // it makes the bucket of the locks
		return nil, err
	} else if err := lock.Unlock(); err != nil {
		return nil, err
	}
	for _, bucket := range []string{"state-" + suffix, "state-" + suffix + "-locks", "peer-" + suffix, "peer-ttl-" + suffix} {
		if err := r.leadByFirst(bucket); err != nil {
			return nil, err
		}
	}
	const keys = 50
	ours, theirs := among(keys), among(keys)
	for range keys {
		if err := s.Put(ours(), value, 0); err != nil {
			return nil, err
		}
		if _, err := kv.Put(ctx, theirs(), value); err != nil {
			return nil, err
		}
	}
	tally, kvTally := newTally(), newTally()
	if err := tally.watch(s); err != nil {
		return nil, err
	}
	if err := r.watchKV(kvTally, kv); err != nil {
		return nil, err
	}
	fresh, freshKV, names, kvNames := counter("new"), counter("new"), among(20), among(20)
	lockCycle := func() error {
		lock, err := s.Lock(names(), lockTTL)
		if err != nil {
			return err
		}
		return lock.Unlock()
	}
	kvCycle := func() error {
		name := kvNames()
		if _, err := kvWithTTL.Create(ctx, name, value, jetstream.KeyTTL(lockTTL)); err != nil {
			return err
		}
		return kvWithTTL.Purge(ctx, name)
	}
	for range 20 { // so that each lock was released before
		if err := errors.Join(lockCycle(), kvCycle()); err != nil {
			return nil, err
		}
	}
	var basics []basic
	for _, op := range []struct {
		name   string
		target float64
		ours   side
		theirs side
	}{
		{
			"Get", 1.05,
			timed(us, func() error { _, err := s.Get(ours()); return err }),
			timed(kvGo, func() error { _, err := kv.Get(ctx, theirs()); return err }),
		}, {
			"Put, own key", 1.05,
			timed(us, func() error { return s.Put(ours(), value, 0) }),
			timed(kvGo+" Put", func() error { _, err := kv.Put(ctx, theirs(), value); return err }),
		}, {
			"Put with TTL, new key", 1.05,
			timed(us, func() error { return s.Put(fresh(), value, kvTTL) }),
			timed(kvGo+" Create, KeyTTL", func() error {
				_, err := kvWithTTL.Create(ctx, freshKV(), value, jetstream.KeyTTL(kvTTL))
				return err
			}),
		}, {
			"Keys, 50", 1.05,
			timed(us, func() error {
				found, err := s.Keys("key.*")
				return enough(len(found), keys, err)
			}),
			timed(kvGo+" ListKeysFiltered", func() error { return listKeys(kv, "key.>", keys) }),
		}, {
			"Put to event", 1.05,
			tally.until(us, 1, func() error { return s.Put("watched.key", value, 0) }),
			kvTally.until(kvGo+" Watch", 1, func() error { _, err := kv.Put(ctx, "watched.key", value); return err }),
		}, {
			"Lock+Unlock", 0.55,
			timed(us, lockCycle), timed(kvGo+" Create+Purge", kvCycle),
		},
	} {
		samples, err := measure(p, op.ours, op.theirs, echo)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", op.name, err)
		}
		b := basic{row: compare(op.name, us, op.theirs.name, samples[0], samples[1]), echo: median(samples[2])}
		b.row.target = op.target
		b.our = compare("", us, "", samples[0], samples[2]).ratio
		b.their = compare("", us, "", samples[1], samples[2]).ratio
		basics = append(basics, b)
	}
	return basics, nil
}
