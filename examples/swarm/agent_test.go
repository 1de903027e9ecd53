package main

import (
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"example.com/state"
)

// TestSwarmForAnHour runs agents for an hour, which in memory and in a bubble
// takes less than a second. Every ten minutes the leader resigns.
func TestSwarmForAnHour(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := state.NewMemoryStore()
		defer store.Close()
		w := NewWitness(io.Discard)
		events, err := store.Watch("*")
		if err != nil {
			t.Fatal(err)
		}
		go w.Watch(events)
		if err := store.Put("config.pace", []byte("200ms"), 0); err != nil {
			t.Fatal(err)
		}

		var agents []*Agent
		for _, name := range []string{"ada", "grace", "alan", "barbara", "edsger", "tony"} {
			a := &Agent{Name: name, Store: store, Terms: w.Term, Tell: func(format string, args ...any) {
				t.Errorf(name+": "+format, args...)
			}}
			agents = append(agents, a)
			a.Start()
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
		time.Sleep(time.Minute) // to do what is left
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
