package main

import (
	"context"
	"errors"
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

// openStore returns a store, with a connection of its own.
func (r *run) openStore(bucket string) (*state.NATSStore, *nats.Conn, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, nil, err
	}
	s, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: bucket})
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
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: bucket, LimitMarkerTTL: markers})
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
	return nil
}

// keysGroup compares listings of many keys.
func keysGroup(r *run) error {
	const n = 50_000
	s, kv, err := r.filled("list", n)
	if err != nil {
		return err
	}
	nc, err := r.connect()
	if err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	same, err := js.KeyValue(ctx, "state-list")
	if err != nil {
		return err
	}
	list := func(kv jetstream.KeyValue, filter string, want int) func() error {
		return func() error {
			lister, err := kv.ListKeysFiltered(ctx, filter)
			if err != nil {
				return err
			}
			got := 0
			for range lister.Keys() {
				got++
			}
			if got != want {
				return fmt.Errorf("%d keys instead of %d", got, want)
			}
			return nil
		}
	}
	keys := func(pattern string, want int) func() error {
		return func() error {
			got, err := s.Keys(pattern)
			if err == nil && len(got) != want {
				err = fmt.Errorf("%d keys instead of %d", len(got), want)
			}
			return err
		}
	}
	all, few := plan{rounds: 40}, r.plan(5)
	if r.quick {
		all.rounds = 7
	}
	const own, ours = kvGo + " ListKeysFiltered", kvGo + " ListKeysFiltered on our bucket"
	err = r.add("Keys, all of 50,000", all, []float64{0.8, 0.8},
		timed(us, keys("*", n)), timed(own, list(kv, ">", n)), timed(ours, list(same, ">", n)))
	if err != nil {
		return err
	}
	return r.add("Keys, 500 of 50,000", few, []float64{0.8, 0.8},
		timed(us, keys("group-007.*", n/100)),
		timed(own, list(kv, "group-007.>", n/100)), timed(ours, list(same, "group-007.>", n/100)))
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
	for i := range n {
		if _, err := js.PublishAsync("$KV.peer-"+name+"."+groupKey(i), value); err != nil {
			return nil, nil, err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return s, kv, nil
	case <-time.After(time.Minute):
		return nil, nil, errors.New("filling takes too long")
	}
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

// watchGroup compares the time from the beginning of a Put to its event.
func watchGroup(r *run) error {
	s, _, err := r.openStore("state-watch")
	if err != nil {
		return err
	}
	kv, _, err := r.openKV("peer-watch", 0)
	if err != nil {
		return err
	}
	events, err := s.Watch("watched.*")
	if err != nil {
		return err
	}
	watcher, err := kv.Watch(ctx, "watched.>", jetstream.UpdatesOnly())
	if err != nil {
		return err
	}
	defer func() { _ = watcher.Stop() }()

	ours, theirs := make(chan time.Time, 1), make(chan time.Time, 1)
	go func() {
		for range events {
			ours <- time.Now()
		}
	}()
	go func() {
		for range watcher.Updates() {
			theirs <- time.Now()
		}
	}()
	err = r.add("Put to event", r.plan(8), []float64{1},
		untilEvent(us, ours, func() error { return s.Put("watched.key", value, 0) }),
		untilEvent(kvGo+" Watch", theirs, func() error { _, err := kv.Put(ctx, "watched.key", value); return err }))
	if err != nil {
		return err
	}
	// The same, if what is written, and how, is the same.
	nc, err := r.connect()
	if err != nil {
		return err
	}
	publish := func(bucket string) func() error {
		return func() error {
			_, err := nc.Request("$KV."+bucket+".watched.other", value, 5*time.Second)
			return err
		}
	}
	return r.add("plain publish to event", r.plan(8), []float64{1},
		untilEvent(us, ours, publish("state-watch")), untilEvent(kvGo+" Watch", theirs, publish("peer-watch")))
}

// untilEvent makes a side of the time from the beginning of a Put until its
// event has come, which may be before the Put is acknowledged.
func untilEvent(name string, seen <-chan time.Time, put func() error) side {
	return side{name, func(n int) (sum time.Duration, err error) {
		for range n {
			start := time.Now()
			if err := put(); err != nil {
				return 0, err
			}
			select {
			case at := <-seen:
				sum += at.Sub(start)
			case <-time.After(10 * time.Second):
				return 0, errors.New("no event")
			}
		}
		return sum, nil
	}}
}
