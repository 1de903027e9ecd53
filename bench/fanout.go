package main

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const fanOutText = "The time from the beginning of a Put until the last watch has delivered its event. " +
	"*plain publish*: both are written by the same plain request. *8,000 changes*: as many keys, published at once, until the last " +
	"watch has delivered the last."

// A tally waits until a number of events have come.
type tally struct {
	left atomic.Int64
	last chan time.Time
}

func newTally() *tally { return &tally{last: make(chan time.Time, 1)} }

// event counts one event. The goroutines of the watches call it.
func (t *tally) event() {
	if t.left.Add(-1) == 0 {
		t.last <- time.Now()
	}
}

// wait returns when the last of the expected events came.
func (t *tally) wait() (time.Time, error) {
	select {
	case at := <-t.last:
		return at, nil
	case <-time.After(30 * time.Second):
		return time.Time{}, fmt.Errorf("%d events are missing", t.left.Load())
	}
}

// until makes a side of the time from the beginning of a write until so many
// events have come, which may be before the write is acknowledged.
func (t *tally) until(name string, events int, write func() error) side {
	return side{name, func(n int) (sum time.Duration, err error) {
		for range n {
			t.left.Store(int64(events))
			start := time.Now()
			if err := write(); err != nil {
				return 0, err
			}
			last, err := t.wait()
			if err != nil {
				return 0, err
			}
			sum += last.Sub(start)
		}
		return sum, nil
	}}
}

// watch adds a watch of ours to the tally.
func (t *tally) watch(s state.StateStore) error {
	events, err := s.Watch("watched.*")
	if err != nil {
		return err
	}
	go func() {
		for range events {
			t.event()
		}
	}()
	return nil
}

// watchKV adds a watch of nats.go's to the tally.
func (r *run) watchKV(t *tally, kv jetstream.KeyValue) error {
	watcher, err := kv.Watch(ctx, "watched.>", jetstream.UpdatesOnly())
	if err != nil {
		return err
	}
	r.stops = append(r.stops, func() { _ = watcher.Stop() })
	go func() {
		for range watcher.Updates() {
			t.event()
		}
	}()
	return nil
}

// fanOutGroup compares the time until all watches know of a change.
func fanOutGroup(r *run) error {
	for _, watches := range []int{1, 20, 100} {
		if err := r.fanOut(watches); err != nil {
			return err
		}
		r.close() // the watches of one count must not disturb the next
		r.nats = ""
	}
	return r.fanOutOfStores(300)
}

// fanOut measures watches of one store.
func (r *run) fanOut(watches int) error {
	s, _, err := r.openStore("state-watch")
	if err != nil {
		return err
	}
	kv, _, err := r.openKV("peer-watch", 0)
	if err != nil {
		return err
	}
	ours, theirs := newTally(), newTally()
	for range watches {
		if err := ours.watch(s); err != nil {
			return err
		}
		if err := r.watchKV(theirs, kv); err != nil {
			return err
		}
	}
	name, suffix := "Put to event", ""
	if watches > 1 {
		name, suffix = fmt.Sprintf("Put to the last event of %d watches", watches), fmt.Sprintf(" of %d watches", watches)
	}
	target := map[int]float64{1: 1.15, 20: 0.6, 100: 0.3}[watches]
	const peer = kvGo + " Watch"
	p := r.plan(4)
	err = r.add(name, p, []float64{target},
		ours.until(us, watches, func() error { return s.Put("watched.key", value, 0) }),
		theirs.until(peer, watches, func() error { _, err := kv.Put(ctx, "watched.key", value); return err }))
	if err != nil || watches > 20 {
		return err
	}
	nc, err := r.connect()
	if err != nil {
		return err
	}
	if watches == 1 {
		publish := func(bucket string) func() error {
			return func() error {
				_, err := nc.Request("$KV."+bucket+".watched.other", value, 5*time.Second)
				return err
			}
		}
		err = r.add("plain publish to event", p, []float64{1.15},
			ours.until(us, 1, publish("state-watch")), theirs.until(peer, 1, publish("peer-watch")))
		if err != nil {
			return err
		}
	}
	const changes = 8000
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	flood := func(bucket string) func() error {
		return func() error { return publishAll(js, "$KV."+bucket+".watched.", changes) }
	}
	return r.add("8,000 changes to the last event"+suffix, r.few(15, 1), nil,
		ours.until(us, watches*changes, flood("state-watch")), theirs.until(peer, watches*changes, flood("peer-watch")))
}

// publishAll writes so many keys without waiting for each.
func publishAll(js jetstream.JetStream, prefix string, keys int) error {
	for i := range keys {
		if _, err := js.PublishAsync(prefix+groupKey(i), value, jetstream.WithStallWait(time.Minute)); err != nil {
			return err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return nil
	case <-time.After(time.Minute):
		return errors.New("publishing takes too long")
	}
}

// fanOutOfStores measures stores on connections of their own, with one watch
// each.
func (r *run) fanOutOfStores(stores int) error {
	writer, _, err := r.openStore("state-stores")
	if err != nil {
		return err
	}
	kvWriter, _, err := r.openKV("peer-stores", 0)
	if err != nil {
		return err
	}
	ours, theirs := newTally(), newTally()
	for range stores {
		s, _, err := r.openStore("state-stores")
		if err != nil {
			return err
		}
		if err := ours.watch(s); err != nil {
			return err
		}
		kv, _, err := r.bindKV("peer-stores")
		if err != nil {
			return err
		}
		if err := r.watchKV(theirs, kv); err != nil {
			return err
		}
	}
	return r.add(fmt.Sprintf("Put to the last event of %d stores", stores), r.plan(6), []float64{1.1},
		ours.until(us, stores, func() error { return writer.Put("watched.key", value, 0) }),
		theirs.until(kvGo+" Watch", stores, func() error { _, err := kvWriter.Put(ctx, "watched.key", value); return err }))
}

// bindKV opens an existing bucket with nats.go, on a separate connection.
func (r *run) bindKV(bucket string) (jetstream.KeyValue, *nats.Conn, error) {
	nc, err := r.connect()
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, nil, err
	}
	kv, err := js.KeyValue(ctx, bucket)
	return kv, nc, err
}
