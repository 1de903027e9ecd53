package proof

import (
	"math/rand/v2"
	"sync"
	"time"

	"example.com/state"
	"example.com/state/statetest"
)

// A chaos is a load on stores that package statetest has faults happen to: these
// must be such as the contract allows.
type chaos struct {
	load   *load
	memory *state.MemoryStore
	rates  statetest.Rates

	mu     sync.Mutex // guards what follows
	begun  bool
	stores []*statetest.Store
}

// newChaos returns a chaos. It is called in a bubble, where the
// hours pass at once.
func newChaos() *chaos {
	c := &chaos{memory: state.NewMemoryStore(), rates: statetest.DefaultRates()}
	c.rates.TakeAway = 0 // no operator is at work
	c.rates.MaxPause = 5 * time.Second
	c.rates.MaxOutage = 10 * time.Second
	c.load = newLoad(func() (state.Store, func() (state.Store, error), error) {
		s, err := c.open()
		return s, c.open, err
	})
	l := c.load
	l.pace, l.epoch = 50*time.Millisecond, 2*time.Second
	l.endable, l.late, l.calm = true, 30*time.Second, c.heal
	l.cut.Store(true)
	l.lag.Store(int64(c.rates.MaxPause)) // a process that stands still is late
	time.AfterFunc(time.Second, c.begin)
	return c
}

// open returns one more store.
func (c *chaos) open() (state.Store, error) {
	s := statetest.Wrap(c.memory.Client())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stores = append(c.stores, s)
	if c.begun {
		s.Chaos(nil, rand.Uint64(), c.rates)
	}
	return s, nil
}

// begin has faults happen from now on.
func (c *chaos) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun = true
	for _, s := range c.stores {
		s.Chaos(nil, rand.Uint64(), c.rates)
	}
}

// heal ends all faults, and waits until no write is under way.
func (c *chaos) heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.stores {
		s.Heal()
	}
	time.Sleep(c.load.late)
}

// faults returns how many faults there were, and closes the store below.
func (c *chaos) faults() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, s := range c.stores {
		n += len(s.Faults())
	}
	_ = c.memory.Close()
	return n
}
