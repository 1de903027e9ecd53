package main

import (
	"context"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go/jetstream"
)

const openingText = "The time until Watch has returned, beside 50,000 keys that exist."

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
			events, err := watchUntil(watching, m.ours, "*")
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
	return r.add("Watch beside 50,000 keys", r.few(25, 1), []float64{5, 5},
		ours, theirs(peer+onOurs, m.same), theirs(peer, m.theirs))
}

// watchUntil opens a watch that ends with ctx.
func watchUntil(ctx context.Context, s *state.NATSStore, pattern string) (<-chan *state.KeyValue, error) {
	if bound, ok := any(s).(state.Store); ok {
		return bound.WithContext(ctx).Watch(pattern)
	}
	return any(s).(interface {
		WatchContext(ctx context.Context, pattern string) (<-chan *state.KeyValue, error)
	}).WatchContext(ctx, pattern)
}
