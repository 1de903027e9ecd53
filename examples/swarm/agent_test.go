package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/state"
	"example.com/state/statetest"
)

// observed returns a store that holds the usual pace, and a witness of it.
func observed(t *testing.T) (*state.MemoryStore, *Witness) {
	t.Helper()
	store := state.NewMemoryStore()
	w, err := Observe(store, io.Discard)
	if err == nil {
		err = store.Put("config.pace", []byte("200ms"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return store, w
}

// TestSwarmForAnHour runs agents for an hour, which takes a few seconds in memory
// and in a bubble. Every ten minutes the leader resigns.
func TestSwarmForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, w := observed(t)
		defer store.Close()

		var agents []*Agent
		for _, name := range []string{"ada", "grace", "alan", "barbara", "edsger", "tony"} {
			a := &Agent{Name: name, Store: store.Client(), Terms: w.Term, Report: func(format string, args ...any) {
				t.Errorf(name+": "+format, args...)
			}}
			agents = append(agents, a)
			if err := a.Start(); err != nil {
				t.Fatal(err)
			}
		}
		var led []string
		for range agents {
			time.Sleep(10 * time.Minute)
			leader := w.Leader()
			led = append(led, leader)
			for _, a := range agents {
				if a.Name == leader {
					a.Resign() // somebody else may lead before it returns
				}
			}
		}
		time.Sleep(time.Minute) // the agents finish the open tasks
		for _, a := range agents {
			a.Stop()
		}
		synctest.Wait()

		slices.Sort(led)
		if len(slices.Compact(led)) != len(agents) {
			t.Errorf("the leaders were %v", led)
		}
		planned, done, twice := w.Tasks()
		if planned < 20_000 || done != planned || len(twice) > 0 {
			t.Errorf("%d tasks were planned, %d were done, %v twice", planned, done, twice)
		}
		var c checklist
		if c.terms(w.Terms(), len(agents)); c.failed {
			t.Errorf("%v", c.lines)
		}
		if alive := w.Alive(); len(alive) > 0 {
			t.Errorf("%v are still there", alive)
		}
	})
}

// TestSwarmOutlivesFailures makes all locks and then all watches of an agent fail
// for a while. The agent then continues, and leaks no goroutines.
func TestSwarmOutlivesFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory, w := observed(t)
		defer memory.Close()
		store := statetest.Wrap(memory.Client())
		defer store.Close()
		var failures atomic.Int64
		a := &Agent{Name: "ada", Store: store, Terms: w.Term, Report: func(string, ...any) { failures.Add(1) }}
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		_, before, _ := w.Tasks()
		goroutines := runtime.NumGoroutine()

		store.On(statetest.Lock|statetest.Refresh, "*").For(10 * time.Minute).Fail(errors.New("no lock today"))
		time.Sleep(5 * time.Minute)
		store.Watches("*").End()
		if err := memory.Put("config.pace", []byte("100ms"), 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Minute)
		if failures.Load() == 0 {
			t.Error("nothing failed")
		}
		if n := runtime.NumGoroutine(); n > goroutines+10 {
			t.Errorf("%d goroutines became %d", goroutines, n)
		}
		if _, after, _ := w.Tasks(); after < before+200 {
			t.Errorf("%d tasks were done before, %d in all", before, after)
		}
		if pace := a.Pace(); pace != 100*time.Millisecond {
			t.Errorf("the pace is %v", pace)
		}
		a.Stop()
	})
}

var seeds = flag.Int("seeds", 10, "how many seeds the swarm runs with under chaos")

// TestSwarmUnderChaos has every kind of fault happen to the agents' stores for ten
// minutes. No task is lost and none is done twice, and one agent leads at a time.
func TestSwarmUnderChaos(t *testing.T) {
	for seed := range uint64(*seeds) {
		if faults, wrong := runUnderChaos(t, seed, func(s state.Store) state.Store { return s }); len(wrong) > 0 {
			t.Fatalf("seed %d: %q; the last of %d faults:\n%s", seed, wrong, len(faults), strings.Join(faults[max(len(faults)-50, 0):], "\n"))
		}
	}
}

// TestChaosFindsLateWorkers: agents that write the result of a task without regard
// to its revision, which is their fencing token, do some tasks twice.
func TestChaosFindsLateWorkers(t *testing.T) {
	for seed := range uint64(100) {
		if _, wrong := runUnderChaos(t, seed, func(s state.Store) state.Store { return unfenced{s} }); len(wrong) > 0 {
			t.Logf("seed %d: %q", seed, wrong)
			return
		}
	}
	t.Error("not found in a hundred seeds")
}

// An unfenced store writes whatever the revision is.
type unfenced struct{ state.Store }

func (s unfenced) Update(key string, value []byte, ttl time.Duration, _ uint64) (uint64, error) {
	return 0, s.Put(key, value, ttl)
}

// runUnderChaos runs a swarm whose agents use what wrap makes of their stores. It
// returns the faults, and what was found to be wrong.
func runUnderChaos(t *testing.T, seed uint64, wrap func(state.Store) state.Store) (faults, wrong []string) {
	synctest.Test(t, func(t *testing.T) {
		memory, w := observed(t)
		defer memory.Close()
		var agents []*Agent
		var stores []*statetest.Store
		for i, name := range []string{"ada", "grace", "alan", "barbara"} {
			store := statetest.Wrap(memory.Client())
			store.Chaos(nil, seed<<8+uint64(i), statetest.DefaultRates())
			a := &Agent{Name: name, Store: wrap(store), Terms: w.Term, Report: func(string, ...any) {}}
			for a.Start() != nil {
				time.Sleep(time.Second)
			}
			agents, stores = append(agents, a), append(stores, store)
		}
		time.Sleep(10 * time.Minute)
		for _, s := range stores {
			s.Heal()
			for _, f := range s.Faults() {
				faults = append(faults, fmt.Sprint(f))
			}
		}
		for _, a := range agents {
			a.Resign()
		}
		finished := Await(10*time.Minute, func() bool { planned, done, _ := w.Tasks(); return planned == done })
		for i, a := range agents {
			a.Stop()
			stores[i].Close()
		}

		var c checklist
		planned, done, twice := w.Tasks()
		c.check(len(faults) > 0, "%d faults", len(faults))
		c.check(finished && done > 100, "%d tasks were planned, %d were done", planned, done)
		c.check(len(twice) == 0, "%d tasks were done twice", len(twice))
		c.terms(w.Terms(), 2)
		for _, line := range c.lines {
			if strings.HasPrefix(line, "FAILED") {
				wrong = append(wrong, line)
			}
		}
	})
	return faults, wrong
}
