package main

import (
	"context"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go/jetstream"
)

const openingText = "The time until Watch or Follow has returned, beside 50,000 keys that exist; for WatchAll, until it has delivered them."

// openingGroup compares the time that it takes to open a watch.
func openingGroup(r *run) error {
	m, err := r.manyBuckets("open")
	if err != nil {
		return err
	}
	// Whoever opens a watch ends it before the next one takes his turn.
	ours := side{us, func(n int) (sum time.Duration, err error) {
		for range n {
			watching, end := context.WithCancel(ctx)
			start := time.Now()
			events, err := m.ours.WithContext(watching).Watch("*")
			sum += time.Since(start)
			end()
			if err != nil {
				return 0, err
			}
			for range events {
			}
		}
		return sum, nil
	}}
	theirs := func(name string, kv jetstream.KeyValue) side {
		return side{name, func(n int) (sum time.Duration, err error) {
			for range n {
				start := time.Now()
				watcher, err := kv.Watch(ctx, ">", jetstream.UpdatesOnly())
				sum += time.Since(start)
				if err != nil {
					return 0, err
				}
				if err := watcher.Stop(); err != nil {
					return 0, err
				}
			}
			return sum, nil
		}}
	}
	const peer = kvGo + " Watch, UpdatesOnly"
	err = r.add("Watch beside 50,000 keys", r.few(25, 1), []float64{5, 5},
		ours, theirs(peer+onOurs, m.same), theirs(peer, m.theirs))
	if err != nil {
		return err
	}
	follow := side{us, func(n int) (sum time.Duration, err error) {
		for range n {
			following, end := context.WithCancel(ctx)
			start := time.Now()
			current, changes, err := state.Follow(following, m.ours, "*")
			sum += time.Since(start)
			end()
			if err := enough(len(current), manyKeys, err); err != nil {
				return 0, err
			}
			for range changes {
			}
		}
		return sum, nil
	}}
	return r.add("Follow of 50,000 keys", r.few(25, 1), []float64{1.2, 1.2}, follow,
		timed(kvGo+" WatchAll"+onOurs, func() error { return watchAll(m.same, manyKeys) }),
		timed(kvGo+" WatchAll", func() error { return watchAll(m.theirs, manyKeys) }))
}
