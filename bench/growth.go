package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go"
)

// A table of how something grows.
type table struct {
	title string
	head  []string
	rows  [][]string
}

// memory returns what this process uses, when the garbage is gone.
func memory() float64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// resident returns the resident memory of a process.
func resident(pid int) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), "VmRSS:")
	kb, _ := strconv.ParseFloat(strings.Fields(rest + " 0")[0], 64)
	return kb * 1024
}

// cost measures one operation.
func (r *run) cost(op func() error) (float64, error) {
	p := plan{rounds: 15, chunk: 10 * time.Millisecond}
	if r.quick {
		p = plan{rounds: 5, chunk: 4 * time.Millisecond}
	}
	samples, err := measure(p, timed("", op))
	if err != nil {
		return 0, err
	}
	return median(samples[0]), nil
}

// costs measures several, and returns them in words.
func (r *run) costs(ops ...func() error) ([]string, error) {
	var words []string
	for _, op := range ops {
		ns, err := r.cost(op)
		if err != nil {
			return nil, err
		}
		words = append(words, duration(ns))
	}
	return words, nil
}

func keysOf(s state.StateStore, pattern string, want int) func() error {
	return func() error {
		found, err := s.Keys(pattern)
		if err == nil && len(found) != want {
			err = fmt.Errorf("Keys(%q): %d keys instead of %d", pattern, len(found), want)
		}
		return err
	}
}

func growthGroup(r *run) error {
	sizes := []int{100, 1000, 10_000, 100_000}
	if r.quick {
		sizes = sizes[:3]
	}
	for _, f := range []func(*run, []int) error{
		memoryKeysGrowth, natsKeysGrowth, memoryWatchGrowth, natsWatchGrowth, waitingGrowth,
	} {
		if err := f(r, sizes); err != nil {
			return err
		}
	}
	return nil
}

func some(s state.StateStore, n int) (get, put func() error) {
	i := 0
	next := func() string {
		i += 7
		return groupKey(i % n)
	}
	return func() error { _, err := s.Get(next()); return err },
		func() error { return s.Put(next(), value, 0) }
}

const fewKeys = 50

func fillFew(s state.StateStore) error {
	for i := range fewKeys {
		if err := s.Put(fmt.Sprintf("few.%d", i), value, 0); err != nil {
			return err
		}
	}
	return nil
}

func memoryKeysGrowth(r *run, sizes []int) error {
	t := table{"MemoryStore, by the number of keys (128-byte values)", []string{"keys", "Get", "Put", "Keys, 50 of them", "Keys, all", "memory a key"}, nil}
	for _, n := range sizes {
		before := memory()
		s := state.NewMemoryStore()
		for i := range n {
			if err := s.Put(groupKey(i), value, 0); err != nil {
				return err
			}
		}
		each := (memory() - before) / float64(n)
		if err := fillFew(s); err != nil {
			return err
		}
		get, put := some(s, n)
		words, err := r.costs(get, put, keysOf(s, "few.*", fewKeys), keysOf(s, "*", n+fewKeys))
		if err != nil {
			return err
		}
		t.rows = append(t.rows, append(append([]string{count(n)}, words...), size(each)))
		_ = s.Close()
	}
	r.table(t)
	return nil
}

func natsKeysGrowth(r *run, sizes []int) error {
	t := table{"NATSStore, by the number of keys (one replica, 128-byte values)", []string{"keys", "Get", "Put", "Keys, 50 of them", "Keys, all", "memory a key, client"}, nil}
	s, _, err := r.openStore("growth-keys")
	if err != nil {
		return err
	}
	if err := fillFew(s); err != nil {
		return err
	}
	before, have := memory(), 0
	for _, n := range sizes {
		if err := fill(s, have, n); err != nil {
			return err
		}
		have = n
		each := (memory() - before) / float64(n)
		get, put := some(s, n)
		words, err := r.costs(get, put, keysOf(s, "few.*", fewKeys), keysOf(s, "*", n+fewKeys))
		if err != nil {
			return err
		}
		t.rows = append(t.rows, append(append([]string{count(n)}, words...), size(each)))
	}
	r.table(t)
	return nil
}

func memoryWatchGrowth(r *run, sizes []int) error {
	t := table{"MemoryStore, by the number of watches", []string{"watches", "Put, none matches", "Put, all match", "a watch's share of that", "memory a watch"}, nil}
	for _, n := range append([]int{0, 1}, sizes...) {
		s := state.NewMemoryStore()
		before := memory()
		for i := range n {
			events, err := s.Watch(fmt.Sprintf("tenant-%d.*", i))
			if err != nil {
				return err
			}
			go drain(events)
		}
		each := "-"
		if n > 0 {
			each = size((memory() - before) / float64(n))
		}
		none, err := r.cost(func() error { return s.Put("tenant-1/key", value, 0) })
		if err != nil {
			return err
		}
		_ = s.Close()

		s = state.NewMemoryStore()
		for range n {
			events, err := s.Watch("tenant-*")
			if err != nil {
				return err
			}
			go drain(events)
		}
		all, err := r.cost(func() error { return s.Put("tenant-1/key", value, 0) })
		if err != nil {
			return err
		}
		_ = s.Close()
		share := "-"
		if n > 0 {
			share = duration(max(all-none, 0) / float64(n))
		}
		t.rows = append(t.rows, []string{count(n), duration(none), duration(all), share, each})
	}
	r.table(t)
	return nil
}

func drain(events <-chan *state.KeyValue) {
	for range events {
	}
}

// natsWatchGrowth stops earlier: each event is delivered to all watches.
func natsWatchGrowth(r *run, _ []int) error {
	sizes := []int{1, 10, 100, 1000}
	if r.quick {
		sizes = sizes[:3]
	}
	t := table{
		"NATSStore, by the number of watches of one pattern, which share a consumer on the server",
		[]string{"watches", "Watch", "Put, none matches", "Put to the last of all events", "memory a watch, client", "and server"}, nil,
	}
	for _, n := range sizes {
		address, pid, err := r.start("nats")
		if err != nil {
			return err
		}
		nc, err := nats.Connect(address)
		if err != nil {
			return err
		}
		s, err := state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: "growth-watches"})
		if err != nil {
			return err
		}
		if err := s.Put("other.key", value, 0); err != nil {
			return err
		}
		client, srv := memory(), resident(pid)
		seen := make(chan struct{}, n)
		start := time.Now()
		for range n {
			events, err := s.Watch("watched.*")
			if err != nil {
				return err
			}
			go func() {
				for range events {
					seen <- struct{}{}
				}
			}()
		}
		each := float64(time.Since(start)) / float64(n)
		client, srv = (memory()-client)/float64(n), (resident(pid)-srv)/float64(n)
		none, err := r.cost(func() error { return s.Put("other.key", value, 0) })
		if err != nil {
			return err
		}
		all, err := r.cost(func() error {
			if err := s.Put("watched.key", value, 0); err != nil {
				return err
			}
			for range n {
				select {
				case <-seen:
				case <-time.After(20 * time.Second):
					return errors.New("an event is missing")
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		t.rows = append(t.rows, []string{count(n), duration(each), duration(none), duration(all), size(client), size(srv)})
		_ = s.Close()
		nc.Close()
	}
	r.table(t)
	return nil
}

// waitingGrowth has a reader that does not read.
func waitingGrowth(r *run, sizes []int) error {
	t := table{
		"A watch whose reader does not read, by the number of changes (MemoryStore; the event queue is the same on NATS)",
		[]string{"changes", "Put, a key each", "memory an event", "Put, all of one key", "memory in all"}, nil,
	}
	for _, n := range sizes {
		words := []string{count(n)}
		for _, name := range []func(i int) string{groupKey, func(int) string { return "key" }} {
			s := state.NewMemoryStore()
			for i := range n { // so that what is counted is the events
				if err := s.Put(name(i), value, 0); err != nil {
					return err
				}
			}
			if _, err := s.Watch("*"); err != nil {
				return err
			}
			before, start := memory(), time.Now()
			for i := range n {
				if err := s.Put(name(i), value, 0); err != nil {
					return err
				}
			}
			took := float64(time.Since(start)) / float64(n)
			used := max(memory()-before, 0)
			if len(words) == 1 {
				used /= float64(n)
			}
			words = append(words, duration(took), size(used))
			_ = s.Close()
		}
		t.rows = append(t.rows, words)
	}
	r.table(t)
	return nil
}
