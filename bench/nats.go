package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

var (
	ctx   = context.Background()
	value = make([]byte, 128)
)

const (
	us    = "state"
	kvGo  = "nats.go KV"
	kvTTL = time.Hour
)

// openStore returns a store, with a connection of its own. It is closed with r.
func (r *run) openStore(bucket string) (*state.NATSStore, *nats.Conn, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, nil, err
	}
	s, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: bucket, Replicas: r.replicas})
	if err != nil {
		return nil, nil, err
	}
	r.stops = append(r.stops, func() { _ = s.Close() })
	return s, nc, nil
}

// openKV returns a bucket of nats.go's, with a connection of its own. With a TTL
// for markers, keys can have TTLs.
func (r *run) openKV(bucket string, markers time.Duration) (jetstream.KeyValue, *nats.Conn, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: bucket, LimitMarkerTTL: markers, Replicas: r.replicas,
	})
	return kv, nc, err
}

// counter returns names that were not there before.
func counter(prefix string) func() string {
	n := 0
	return func() string {
		n++
		return fmt.Sprintf("%s.%d", prefix, n)
	}
}

// among returns a key of a fixed set, in turn.
func among(n int) func() string {
	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("key.%d", i)
	}
	i := 0
	return func() string {
		i++
		return keys[i%n]
	}
}

// natsGroup compares Get and Put, one at a time.
func natsGroup(r *run) error {
	s, _, err := r.openStore("state-kv")
	if err != nil {
		return err
	}
	kv, _, err := r.openKV("peer-kv", 0)
	if err != nil {
		return err
	}
	kvWithTTL, _, err := r.openKV("peer-kv-ttl", kvTTL)
	if err != nil {
		return err
	}
	nc, err := r.connect()
	if err != nil {
		return err
	}
	echo := timed("echo", func() error {
		_, err := nc.Request("echo", value, 5*time.Second)
		return err
	})

	p := r.plan(5)
	ours, theirs := among(1000), among(1000)
	for range 1000 {
		if err := s.Put(ours(), value, 0); err != nil {
			return err
		}
		if _, err := kv.Put(ctx, theirs(), value); err != nil {
			return err
		}
	}
	err = r.add("Get", p, []float64{1.05, 0},
		timed(us, func() error { _, err := s.Get(ours()); return err }),
		timed(kvGo, func() error { _, err := kv.Get(ctx, theirs()); return err }),
		echo)
	if err != nil {
		return err
	}
	err = r.add("Put, own key", p, []float64{1.05, 0},
		timed(us, func() error { return s.Put(ours(), value, 0) }),
		timed(kvGo+" Put", func() error { _, err := kv.Put(ctx, theirs(), value); return err }),
		echo)
	if err != nil {
		return err
	}
	// What nats.go offers with the same guarantee: on top of what is known.
	next, revisions := among(1000), make(map[string]uint64)
	for range 1000 {
		key := next()
		if revisions[key], err = kvWithTTL.Create(ctx, key, value); err != nil {
			return err
		}
	}
	return r.add("Put, own key", p, []float64{1.05},
		timed(us, func() error { return s.Put(ours(), value, 0) }),
		timed(kvGo+" Update", func() (err error) {
			key := next()
			revisions[key], err = kvWithTTL.Update(ctx, key, value, revisions[key])
			return err
		}))
}

// newKeysGroup compares Puts of new keys and with a TTL.
func newKeysGroup(r *run) error {
	s, _, err := r.openStore("state-new")
	if err != nil {
		return err
	}
	kv, _, err := r.openKV("peer-new", 0)
	if err != nil {
		return err
	}
	kvWithTTL, _, err := r.openKV("peer-new-ttl", kvTTL)
	if err != nil {
		return err
	}
	p := r.plan(4)
	ours, theirs := among(1000), among(1000)
	fresh, freshKV := counter("new"), counter("new")
	err = r.add("Put, new key", p, []float64{1.05},
		timed(us, func() error { return s.Put(fresh(), value, 0) }),
		timed(kvGo+" Put", func() error { _, err := kv.Put(ctx, freshKV(), value); return err }))
	if err != nil {
		return err
	}
	fresh, freshKV = counter("lasting"), counter("lasting")
	err = r.add("Put with TTL, new key", p, []float64{1.05},
		timed(us, func() error { return s.Put(fresh(), value, kvTTL) }),
		timed(kvGo+" Create, KeyTTL", func() error {
			_, err := kvWithTTL.Create(ctx, freshKV(), value, jetstream.KeyTTL(kvTTL))
			return err
		}))
	if err != nil {
		return err
	}
	// nats.go cannot give an existing key a TTL: its Put without one stands in.
	return r.add("Put with TTL, own key", p, []float64{1.05},
		timed(us, func() error { return s.Put(ours(), value, kvTTL) }),
		timed(kvGo+" Put, no TTL", func() error { _, err := kv.Put(ctx, theirs(), value); return err }))
}

// clients is how many goroutines work at once for the throughput.
const clients = 64

// together makes a side of an operation that all clients do at once. op is told
// which one it is done by.
func together(name string, op func(client int) error) side {
	return side{name, func(n int) (time.Duration, error) {
		var (
			wg     sync.WaitGroup
			left   atomic.Int64
			failed atomic.Pointer[error]
		)
		left.Store(int64(n))
		start := time.Now()
		for client := range clients {
			wg.Go(func() {
				for left.Add(-1) >= 0 {
					if err := op(client); err != nil {
						failed.Store(&err)
						return
					}
				}
			})
		}
		wg.Wait()
		if err := failed.Load(); err != nil {
			return 0, *err
		}
		return time.Since(start), nil
	}}
}

// throughputGroup compares what 64 goroutines get done.
func throughputGroup(r *run) error {
	s, _, err := r.openStore("state-rate")
	if err != nil {
		return err
	}
	kv, _, err := r.openKV("peer-rate", 0)
	if err != nil {
		return err
	}
	nc, err := r.connect()
	if err != nil {
		return err
	}
	keys := make([]string, clients)
	for i := range keys {
		keys[i] = fmt.Sprintf("client-%d", i)
		if err := s.Put(keys[i], value, 0); err != nil {
			return err
		}
		if _, err := kv.Put(ctx, keys[i], value); err != nil {
			return err
		}
	}
	// What nats.go writes with an expectation has a header, as all of ours has;
	// that costs the server time when it is read.
	updated, _, err := r.openKV("peer-rate-update", 0)
	if err != nil {
		return err
	}
	revisions := make([]uint64, clients)
	for i, key := range keys {
		if revisions[i], err = updated.Create(ctx, key, value); err != nil {
			return err
		}
	}
	p := r.plan(5)
	p.chunk *= 5
	p.rounds = max(p.rounds/5, 5)
	echo := together("echo", func(int) error { _, err := nc.Request("echo", value, 5*time.Second); return err })
	for _, op := range []struct {
		name  string
		sides []side
	}{
		{"64 goroutines: Get", []side{
			together(us, func(client int) error { _, err := s.Get(keys[client]); return err }),
			together(kvGo, func(client int) error { _, err := kv.Get(ctx, keys[client]); return err }),
			together(kvGo+", written by Create", func(client int) error { _, err := updated.Get(ctx, keys[client]); return err }),
			echo,
		}},
		{"64 goroutines: Put", []side{
			together(us, func(client int) error { return s.Put(keys[client], value, 0) }),
			together(kvGo+" Put", func(client int) error { _, err := kv.Put(ctx, keys[client], value); return err }),
			together(kvGo+" Update", func(client int) error {
				revision, err := updated.Update(ctx, keys[client], value, revisions[client])
				revisions[client] = revision
				return err
			}),
			echo,
		}},
	} {
		samples, err := measure(p, op.sides...)
		if err != nil {
			return fmt.Errorf("%s: %w", op.name, err)
		}
		for i, theirs := range op.sides[1:] {
			row := compare(op.name, us, theirs.name, throughput(samples[0]), throughput(samples[i+1]))
			row.unit, row.atLeast = "op/s", true
			if theirs.name != "echo" {
				row.target = 0.95
			}
			r.put(row)
		}
	}
	return r.headers(p)
}

// headers measures what headers cost a read: for each header that the server
// adds to an answer it copies those that are there.
func (r *run) headers(p plan) error {
	s, nc, err := r.openStore("state-headers")
	if err != nil {
		return err
	}
	for range 2 { // the second Put says when the key was created, too
		if err := s.Put("key", value, kvTTL); err != nil {
			return err
		}
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	stream, err := js.Stream(ctx, "KV_state-headers")
	if err != nil {
		return err
	}
	written, err := stream.GetLastMsgForSubject(ctx, "$KV.state-headers.key")
	if err != nil {
		return err
	}
	ours := nats.Header{
		"Nats-TTL": written.Header["Nats-TTL"], "Nats-Expected-Last-Subject-Sequence": {"0"}, "State": written.Header["State"],
	}
	three := nats.Header{
		"Nats-TTL": ours["Nats-TTL"], "Nats-Expected-Last-Subject-Sequence": {"0"},
		"State-Op": {nats.NewInbox()[7:29]}, "State-Created": {"1764100000123456789"}, "State-TTL": {"3600000000000"},
	}
	var sides []side
	for _, written := range []struct {
		name    string
		headers nats.Header
	}{{"one header of ours", ours}, {"three, as it was", three}, {"no header at all", nil}} {
		bucket := fmt.Sprintf("headers-%d", len(written.headers))
		kv, _, err := r.openKV(bucket, kvTTL)
		if err != nil {
			return err
		}
		for i := range clients {
			msg := &nats.Msg{Subject: fmt.Sprintf("$KV.%s.client-%d", bucket, i), Header: written.headers, Data: value}
			if _, err := js.PublishMsg(ctx, msg); err != nil {
				return err
			}
		}
		sides = append(sides, together(written.name, func(client int) error {
			_, err := kv.Get(ctx, fmt.Sprintf("client-%d", client))
			return err
		}))
	}
	samples, err := measure(p, sides...)
	if err != nil {
		return err
	}
	for i, theirs := range sides[1:] {
		row := compare("64 goroutines: nats.go KV Get of a value", sides[0].name, theirs.name, throughput(samples[0]), throughput(samples[i+1]))
		row.unit, row.atLeast = "op/s", true
		r.put(row)
	}
	return nil
}

func groupKey(i int) string { return fmt.Sprintf("group-%03d.key-%06d", i%100, i) }

// filled returns buckets with n keys each.
func (r *run) filled(name string, n int) (*state.NATSStore, jetstream.KeyValue, error) {
	s, _, err := r.openStore("state-" + name)
	if err != nil {
		return nil, nil, err
	}
	kv, nc, err := r.openKV("peer-"+name, 0)
	if err != nil {
		return nil, nil, err
	}
	if err := fill(s, 0, n); err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	return s, kv, publishAll(js, "$KV.peer-"+name+".", n)
}

// fill puts the keys from one number up to another, from many goroutines.
func fill(s state.StateStore, from, to int) error {
	next := atomic.Int64{}
	next.Store(int64(from))
	_, err := together(us, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= to {
				return nil
			}
			if err := s.Put(groupKey(i), value, 0); err != nil {
				return err
			}
		}
	}).do(clients)
	return err
}
