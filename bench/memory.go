package main

import (
	"bytes"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"example.com/state"
	"github.com/jellydator/ttlcache/v3"
	gocache "github.com/patrickmn/go-cache"
)

const memoryText = "The caches share the caller's slice: who changes the bytes changes the cache. *copying* means that they are " +
	"made to copy on the way in and out, as MemoryStore does."

// A mapStore is the least that can hold values: a map and a mutex. It has no
// TTL.
type mapStore struct {
	mu sync.RWMutex
	m  map[string][]byte
}

func (s *mapStore) get(key string) ([]byte, bool) {
	s.mu.RLock()
	v, ok := s.m[key]
	s.mu.RUnlock()
	return v, ok
}

func (s *mapStore) put(key string, v []byte) {
	s.mu.Lock()
	s.m[key] = v
	s.mu.Unlock()
}

// scan looks at all keys, as must who has no index.
func (s *mapStore) scan(prefix string) []string {
	found := []string{}
	s.mu.RLock()
	for key := range s.m {
		if strings.HasPrefix(key, prefix) {
			found = append(found, key)
		}
	}
	s.mu.RUnlock()
	slices.Sort(found)
	return found
}

// A cache is what a MemoryStore is compared with.
type cache struct {
	name string
	ttl  bool // it has a TTL for each key
	get  func(key string) ([]byte, bool)
	put  func(key string, v []byte)
}

// read reads a key that exists.
func (c cache) read(key string) error {
	if v, ok := c.get(key); !ok || len(v) != len(value) {
		return fmt.Errorf("no %q", key)
	}
	return nil
}

// copying makes a cache do what a store must: nobody shares the bytes.
func (c cache) copying() cache {
	return cache{
		name: c.name + ", copying", ttl: c.ttl,
		get: func(key string) ([]byte, bool) {
			v, ok := c.get(key)
			return bytes.Clone(v), ok
		},
		put: func(key string, v []byte) { c.put(key, bytes.Clone(v)) },
	}
}

// caches returns the peers, as they come: they share the slice with the caller.
func (r *run) caches() []cache {
	tc := ttlcache.New(ttlcache.WithDisableTouchOnHit[string, []byte]())
	go tc.Start()
	r.stops = append(r.stops, tc.Stop)
	gc := gocache.New(gocache.NoExpiration, time.Minute)
	ms := &mapStore{m: make(map[string][]byte)}
	return []cache{
		{
			"go-cache", true,
			func(key string) ([]byte, bool) {
				v, ok := gc.Get(key)
				if !ok {
					return nil, false
				}
				return v.([]byte), true
			},
			func(key string, v []byte) { gc.Set(key, v, kvTTL) },
		}, {
			"ttlcache", true,
			func(key string) ([]byte, bool) {
				item := tc.Get(key)
				if item == nil {
					return nil, false
				}
				return item.Value(), true
			},
			func(key string, v []byte) { tc.Set(key, v, kvTTL) },
		}, {
			"mutex and map, no TTL", false,
			ms.get,
			ms.put,
		},
	}
}

// local makes a side of an operation on one of 1,000 keys.
func local(name string, op func(key string) error) side {
	next := among(1000)
	return timed(name, func() error { return op(next()) })
}

// parallel makes a side of the same, done by all processors at once.
func parallel(name string, op func(key string) error) side {
	keys := make([]string, 1000)
	next := among(1000)
	for i := range keys {
		keys[i] = next()
	}
	return side{name, func(n int) (time.Duration, error) {
		var (
			wg     sync.WaitGroup
			failed atomic.Pointer[error]
			procs  = runtime.GOMAXPROCS(0)
			each   = (n + procs - 1) / procs
		)
		start := time.Now()
		for p := range procs {
			wg.Go(func() {
				for i := range each {
					if err := op(keys[(i+p*137)%len(keys)]); err != nil {
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

// memoryGroup compares MemoryStore with other things in memory.
func memoryGroup(r *run) error {
	s := state.NewMemoryStore()
	r.stops = append(r.stops, func() { _ = s.Close() })
	peers := r.caches()
	next := among(1000)
	for range 1000 {
		key := next()
		if err := s.Put(key, value, kvTTL); err != nil {
			return err
		}
		for _, c := range peers {
			c.put(key, bytes.Clone(value))
		}
	}

	get := func(key string) error { _, err := s.Get(key); return err }
	put := func(key string) error { return s.Put(key, value, kvTTL) }
	for _, how := range []struct {
		name string
		make func(string, func(string) error) side
	}{{"alone", local}, {"parallel", parallel}} {
		for _, what := range []struct {
			name string
			ours func(string) error
			peer func(cache) func(string) error
		}{
			{"Get", get, func(c cache) func(string) error { return c.read }},
			{"Put with TTL", put, func(c cache) func(string) error {
				return func(key string) error { c.put(key, value); return nil }
			}},
		} {
			sides := []side{how.make(us, what.ours)}
			for _, c := range peers {
				sides = append(sides, how.make(c.name, what.peer(c)), how.make(c.name+", copying", what.peer(c.copying())))
			}
			samples, err := measure(r.plan(2.5), sides...)
			if err != nil {
				return err
			}
			r.putPeers("memory: "+what.name+", "+how.name, peers, samples)
		}
	}
	if err := r.memoryKeys(); err != nil {
		return err
	}
	return r.memoryWatches()
}

// putPeers adds a row for each peer, as it comes and copying. The target is for
// the fastest of those that have a TTL for each key, of either kind.
func (r *run) putPeers(name string, peers []cache, samples [][]float64) {
	var rows []row
	fastest := [2]int{-1, -1}
	for i, c := range peers {
		for kind, suffix := range []string{"", ", copying"} {
			rows = append(rows, compare(name, us, c.name+suffix, samples[0], samples[1+2*i+kind]))
			at := len(rows) - 1
			if c.ttl && (fastest[kind] < 0 || rows[at].their < rows[fastest[kind]].their) {
				fastest[kind] = at
			}
		}
	}
	for _, at := range fastest {
		rows[at].target = 1
	}
	for _, row := range rows {
		r.put(row)
	}
}

// memoryKeys measures the index of names: what it gains in Keys and costs in
// Put.
func (r *run) memoryKeys() error {
	const n, few = 100_000, 100
	s := state.NewMemoryStore()
	plain := &mapStore{m: make(map[string][]byte)}
	r.stops = append(r.stops, func() { _ = s.Close() })
	put := func(key string) error {
		plain.put(key, value)
		return s.Put(key, value, 0)
	}
	for i := range n - few {
		if err := put(groupKey(i)); err != nil {
			return err
		}
	}
	for i := range few {
		if err := put(fmt.Sprintf("few.%d", i)); err != nil {
			return err
		}
	}
	samples, err := measure(r.plan(2),
		timed("full scan", func() error {
			if len(plain.scan("few.")) != few {
				return fmt.Errorf("not %d keys", few)
			}
			return nil
		}),
		timed(us, func() error {
			found, err := s.Keys("few.*")
			if err == nil && len(found) != few {
				err = fmt.Errorf("%d keys instead of %d", len(found), few)
			}
			return err
		}),
		timed(us+", keys coming and going", func() error {
			for i := range 10 {
				if err := s.Put(fmt.Sprintf("few.new.%d", i), value, 0); err != nil {
					return err
				}
			}
			for i := range 10 {
				if err := s.Delete(fmt.Sprintf("few.new.%d", i)); err != nil {
					return err
				}
			}
			_, err := s.Keys("few.*")
			return err
		}))
	if err != nil {
		return err
	}
	speedup := compare("memory: 100 keys of 100,000, times faster", us, "full scan", samples[1], samples[0])
	speedup.ratio, speedup.low, speedup.high = 1/speedup.ratio, 1/speedup.high, 1/speedup.low
	speedup.target, speedup.atLeast = 20, true
	r.put(speedup)
	churn := compare("memory: the same after 10 came and went", us, "full scan", samples[2], samples[0])
	churn.ratio, churn.low, churn.high = 1/churn.ratio, 1/churn.high, 1/churn.low
	churn.atLeast = true
	r.put(churn)

	// The cost: a store that was never listed has no index.
	return r.add("memory: Put of a new key, with the index", r.plan(2), nil,
		r.newKeys(us+", listed before", true), r.newKeys(us+", never listed", false))
}

// newKeys makes a side of putting keys that were not there.
func (r *run) newKeys(name string, listed bool) side {
	return side{name, func(n int) (time.Duration, error) {
		keys := make([]string, n)
		for i := range keys {
			keys[i] = groupKey(i)
		}
		s := state.NewMemoryStore()
		defer s.Close()
		if err := s.Put("first", value, 0); err != nil {
			return 0, err
		}
		if listed {
			if _, err := s.Keys("first*"); err != nil {
				return 0, err
			}
		}
		start := time.Now()
		for i, key := range keys {
			if err := s.Put(key, value, 0); err != nil {
				return 0, err
			}
			if listed && i%200 == 0 { // else the index is given up
				if _, err := s.Keys("first*"); err != nil {
					return 0, err
				}
			}
		}
		return time.Since(start), nil
	}}
}

// memoryWatches compares a Put beside many watches that do not match with one
// beside none.
func (r *run) memoryWatches() error {
	const n = 5000
	watched, alone := state.NewMemoryStore(), state.NewMemoryStore()
	r.stops = append(r.stops, func() { _, _ = watched.Close(), alone.Close() })
	for i := range n {
		pattern := fmt.Sprintf("tenant-%d.*", i)
		if i%2 == 0 {
			pattern = fmt.Sprintf("tenant-%d.config", i)
		}
		if _, err := watched.Watch(pattern); err != nil {
			return err
		}
	}
	keys := make(map[string]bool)
	for i := range 1000 {
		keys[fmt.Sprintf("tenant-%d/key", i*7)] = true
	}
	names := slices.Sorted(maps.Keys(keys))
	put := func(s *state.MemoryStore) func() error {
		i := 0
		return func() error {
			i++
			return s.Put(names[i%len(names)], value, 0)
		}
	}
	return r.add("memory: Put beside 5,000 watches of other keys", r.plan(3), []float64{1.2},
		timed(us, put(watched)), timed("beside none", put(alone)))
}
