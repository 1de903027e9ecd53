package main

import (
	"errors"
	"io"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"example.com/state"
	"example.com/state/statetest"
)

// TestSwarmForAnHour runs agents for an hour, which takes a few seconds in memory
// and in a bubble. Every ten minutes the leader resigns.
func TestSwarmForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.NewMemoryStore()
		defer store.Close()
		w, err := Observe(store, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Put("config.pace", []byte("200ms"), 0); err != nil {
			t.Fatal(err)
		}

		var agents []*Agent
		for _, name := range []string{"ada", "grace", "alan", "barbara", "edsger", "tony"} {
			a := &Agent{Name: name, Store: store.Client(), Terms: w.Term, Tell: func(format string, args ...any) {
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
		memory := state.NewMemoryStore()
		defer memory.Close()
		w, err := Observe(memory, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		if err := memory.Put("config.pace", []byte("200ms"), 0); err != nil {
			t.Fatal(err)
		}
		store := statetest.Wrap(memory.Client())
		defer store.Close()
		var failures atomic.Int64
		a := &Agent{Name: "ada", Store: store, Terms: w.Term, Tell: func(string, ...any) { failures.Add(1) }}
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
