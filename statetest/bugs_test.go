package statetest_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.com/state"
	"example.com/state/statetest"
)

// A program runs agents on stores that chaos was let loose upon, and returns
// what it found to be wrong.
type program func(t *testing.T, w *world) error

// A world is a bubble with a store below and the agents' stores around it.
type world struct {
	below  *state.MemoryStore
	seed   uint64
	rates  statetest.Rates
	agents []*statetest.Store
}

// agent returns the store of one more agent. No two agents begin at the same
// time, so that it is not the scheduler who decides which is first.
func (w *world) agent() *statetest.Store {
	time.Sleep(12_345_678)
	s := statetest.Wrap(w.below.Client())
	s.Chaos(nil, w.seed<<8+uint64(len(w.agents)), w.rates)
	w.agents = append(w.agents, s)
	return s
}

func (w *world) heal() {
	for _, s := range w.agents {
		s.Heal()
	}
}

// faults returns what happened to all agents.
func (w *world) faults() (all []string) {
	for i, s := range w.agents {
		for _, f := range s.Faults() {
			all = append(all, fmt.Sprintf("agent %d: %v", i, f))
		}
	}
	return all
}

// record returns what returns, when nothing is on its way any more, all that has
// become of a key. The reader keeps up, so it gets every change.
func record(t *testing.T, w *world, key string) func() []*state.KeyValue {
	t.Helper()
	events, err := w.below.Watch(key)
	require.NoError(t, err)
	var all []*state.KeyValue
	done := make(chan struct{})
	go func() {
		defer close(done)
		for kv := range events {
			all = append(all, kv)
		}
	}()
	return func() []*state.KeyValue {
		w.heal()
		time.Sleep(time.Minute)
		assert.NoError(t, w.below.Close())
		<-done
		return all
	}
}

// simulate runs a program in a bubble and returns the faults, and what it
// found to be wrong.
func simulate(t *testing.T, seed uint64, rates statetest.Rates, p program) (faults []string, wrong error) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{below: state.NewMemoryStore(), seed: seed, rates: rates}
		wrong = p(t, w)
		faults = w.faults()
		for _, s := range w.agents {
			assert.NoError(t, s.Close())
		}
		assert.NoError(t, w.below.Close())
	})
	return faults, wrong
}

// TestBugsAreFound: each bug is found within a hundred seeds, and what does not
// have it passes all of them.
func TestBugsAreFound(t *testing.T) {
	for name, p := range map[string]func(buggy bool) program{
		"no-fencing-check":               ledger,
		"watch-not-restarted":            configured,
		"put-repeated-of-unknown-effect": counting,
	} {
		t.Run(name, func(t *testing.T) {
			const seeds = 100
			found := false
			for seed := range uint64(seeds) {
				if !found {
					_, wrong := simulate(t, seed, statetest.DefaultRates(), p(true))
					if found = wrong != nil; found {
						t.Logf("found with seed %d: %v", seed, wrong)
					}
				}
				faults, wrong := simulate(t, seed, statetest.DefaultRates(), p(false))
				if wrong != nil {
					t.Log(strings.Join(faults, "\n"))
					require.NoError(t, wrong, "without the bug, seed %d", seed)
				}
			}
			assert.True(t, found)
		})
	}
}

// ledger has leaders write their tokens to a ledger. One that has slept past
// its lease must not write over the entry of a later one.
func ledger(buggy bool) program {
	return func(t *testing.T, w *world) error {
		write := func(s state.Store, token uint64) error {
			mine := strconv.FormatUint(token, 10)
			if buggy {
				return s.Put("ledger", []byte(mine), 0)
			}
			kv, err := s.GetKeyValue("ledger")
			if errors.Is(err, state.ErrNotFound) {
				kv, err = &state.KeyValue{Value: []byte("0")}, nil
			}
			if err != nil {
				return err
			}
			if last, _ := strconv.ParseUint(string(kv.Value), 10, 64); last > token {
				return errors.New("fenced off")
			}
			_, err = s.Update("ledger", []byte(mine), 0, kv.Revision)
			return err
		}
		history := record(t, w, "ledger")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		var agents sync.WaitGroup
		for range 3 {
			s := w.agent()
			agents.Go(func() {
				for ctx.Err() == nil {
					_ = state.WithLock(ctx, s, "leader", 10*time.Second, func(ctx context.Context, token uint64) error {
						for range 5 {
							if ctx.Err() != nil {
								return ctx.Err()
							}
							_ = write(s, token)
							time.Sleep(time.Second)
						}
						return nil
					})
					time.Sleep(time.Second)
				}
			})
		}
		agents.Wait()
		last := uint64(0)
		for _, kv := range history() {
			token, _ := strconv.ParseUint(string(kv.Value), 10, 64)
			if token < last {
				return fmt.Errorf("the leader with token %d wrote after the one with %d", token, last)
			}
			last = token
		}
		return nil
	}
}

// configured has an agent follow its configuration.
func configured(buggy bool) program {
	return func(t *testing.T, w *world) error {
		const key = "config.timeout"
		s := w.agent()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var (
			mu      sync.Mutex
			current string
			agent   sync.WaitGroup
		)
		set := func(value []byte) {
			mu.Lock()
			defer mu.Unlock()
			current = string(value)
		}
		follow := func() error {
			events, err := s.WithContext(ctx).Watch(key)
			if err != nil {
				return err
			}
			value, err := s.WithContext(ctx).Get(key)
			if err != nil && !errors.Is(err, state.ErrNotFound) {
				return err
			}
			set(value)
			for kv := range events {
				set(kv.Value)
			}
			return nil
		}
		agent.Go(func() {
			for ctx.Err() == nil {
				if err := follow(); err == nil && buggy {
					return
				}
				time.Sleep(1_234_567_891) // never when the value changes
			}
		})
		for i := range 100 {
			time.Sleep(10 * time.Second)
			put(t, w.below, key, strconv.Itoa(i))
		}
		time.Sleep(time.Second)
		w.heal()
		time.Sleep(time.Minute)
		mu.Lock()
		got := current
		mu.Unlock()
		cancel()
		agent.Wait()
		if want := "99"; got != want {
			return fmt.Errorf("the agent goes by configuration %q, which is %q", got, want)
		}
		return nil
	}
}

// counting has agents count what they have done.
func counting(buggy bool) program {
	return func(t *testing.T, w *world) error {
		const agents, each = 3, 30
		var group sync.WaitGroup
		for i := range agents {
			s := w.agent()
			count := func(n int) error { return increment(s, fmt.Sprint("agent-", i), n) }
			if buggy {
				count = func(int) error { return incrementBlindly(s) }
			}
			group.Go(func() {
				for n := range each {
					for count(n+1) != nil {
						time.Sleep(time.Second)
					}
					time.Sleep(time.Minute)
				}
			})
		}
		group.Wait()
		time.Sleep(time.Minute)
		if got := readCounter(t, w.below).Total; got != agents*each {
			return fmt.Errorf("counted %d of %d", got, agents*each)
		}
		return nil
	}
}
