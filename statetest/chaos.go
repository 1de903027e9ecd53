package statetest

import (
	"hash/fnv"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"
)

// Rates are the probabilities, between 0 and 1, of the faults of Chaos: for each
// call that the fault can affect or, for watches, for each event.
type Rates struct {
	Fail        float64 // a call fails and is not applied
	Deny        float64 // a call is refused for lack of permission
	Slow        float64 // a call takes up to five seconds
	LoseRequest float64 // a call is not answered, and not applied
	LoseAnswer  float64 // a write is applied, and its answer lost
	ApplyLate   float64 // a write is not answered, and applied late, perhaps after other writes

	Unreachable float64       // the connection breaks
	MaxOutage   time.Duration // for how long at the most
	Pause       float64       // the process is paused
	MaxPause    time.Duration // for how long at the most

	TakeAway float64 // a Refresh or Unlock finds that the lock was taken away
	Lapse    float64 // a Lock grants a lock whose refreshes will be lost

	EndWatch     float64       // a watch ends
	CutOff       float64       // a watch is cut off
	MaxCutOff    time.Duration // for how long at the most
	SkipReplaced float64       // a watch skips a replaced state
}

// DefaultRates returns rates at which about one write in twelve and one read in
// twenty meet a fault: much more often than in production, but rarely enough for a
// program to make progress.
func DefaultRates() Rates {
	return Rates{
		Fail:         0.01,
		Slow:         0.02,
		LoseRequest:  0.01,
		LoseAnswer:   0.02,
		ApplyLate:    0.02,
		Unreachable:  0.003,
		MaxOutage:    30 * time.Second,
		Pause:        0.003,
		MaxPause:     time.Minute,
		TakeAway:     0.01,
		Lapse:        0.01,
		EndWatch:     0.02,
		CutOff:       0.02,
		MaxCutOff:    30 * time.Second,
		SkipReplaced: 0.02,
	}
}

// Chaos causes a random mix of faults at the given rates, from now until
// [Store.Heal]. Rules of [Store.On] take precedence. If t fails, the seed and the
// faults are logged when it ends; t may be nil.
//
// What happens to a call depends only on the seed, the method, the key and the
// number of such calls before it. So a program that makes the same calls meets the
// same faults, and in a testing/synctest bubble at the same times: run a test that
// failed again with the seed that it logged. Choices that the program itself leaves
// open stay random: which of two goroutines that are ready at the same time runs
// first, and the order in which it ranges over a map. Give each Store of a test a
// different seed, and start no two agents at the same time.
func (s *Store) Chaos(t testing.TB, seed uint64, rates Rates) {
	s.mu.Lock()
	s.chaos = &chaos{seed, rates}
	s.mu.Unlock()
	if t == nil {
		return
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		faults := s.Faults()
		t.Logf("statetest: seed %d: %d faults", seed, len(faults))
		for _, f := range faults {
			t.Log(f)
		}
	})
}

type chaos struct {
	seed  uint64
	rates Rates
}

// dice returns the generator for one decision.
func (c *chaos) dice(what, key string, number, n int) *rand.Rand {
	h := fnv.New64a()
	for _, part := range []string{what, key, strconv.Itoa(number), strconv.Itoa(n)} {
		_, _ = h.Write([]byte(part))
		_, _ = h.Write([]byte{0})
	}
	return rand.New(rand.NewPCG(c.seed, h.Sum64()))
}

// decide returns what happens to the nth call of an op with a key.
func (c *chaos) decide(op Op, key string, n int) effect {
	dice := c.dice(op.String(), key, 0, n)
	r := c.rates
	p := dice.Float64()
	happens := func(ops Op, rate float64) bool {
		if op&ops == 0 {
			return false
		}
		p -= rate
		return p < 0
	}
	const writes = Writes | Lock | Refresh | Unlock
	switch {
	case happens(Any, r.Fail):
		return effect{what: "failed: " + errUnavailable.Error(), refuse: errUnavailable}
	case happens(Any, r.Deny):
		return denied
	case happens(Any, r.Slow):
		return slow(upTo(dice, opTimeout-1))
	case happens(Any, r.LoseRequest):
		return effect{what: "request lost", lost: true, never: true, giveUp: answerTimeout(dice)}
	case happens(writes, r.LoseAnswer):
		return effect{what: "answer lost", lost: true, giveUp: answerTimeout(dice)}
	case happens(writes, r.ApplyLate):
		e := late(upTo(dice, maxLate))
		if op&Writes != 0 && dice.IntN(2) == 0 {
			e = behind(1 + dice.IntN(3))
		}
		e.giveUp = answerTimeout(dice)
		return e
	case happens(Any, r.Unreachable):
		return unreachable(upTo(dice, r.MaxOutage))
	case happens(Any, r.Pause):
		return pause(upTo(dice, r.MaxPause))
	case happens(Refresh|Unlock, r.TakeAway):
		return effect{what: "taken away", takeAway: true}
	case happens(Lock, r.Lapse):
		return effect{what: "refreshes will be lost", deaf: true}
	}
	return effect{}
}

// upTo returns a duration of up to limit, of all orders of magnitude.
func upTo(dice *rand.Rand, limit time.Duration) time.Duration {
	u := dice.Float64()
	return max(time.Duration(u*u*u*float64(limit)).Truncate(time.Microsecond), time.Microsecond)
}

// answerTimeout returns how long a call waits for an answer that does not come. It
// takes less than five seconds if it learns that somebody else has written since,
// so that nobody can tell any more.
func answerTimeout(dice *rand.Rand) time.Duration {
	if dice.IntN(2) == 0 {
		return opTimeout
	}
	return upTo(dice, opTimeout)
}

// strikes returns what happens to a watch instead of the event that has come.
func (s *core) strikes(w *watch) (watchEffect, string) {
	s.mu.Lock()
	c := s.chaos
	s.mu.Unlock()
	if c == nil {
		return watchEffect{}, ""
	}
	dice := c.dice("event", w.pattern, w.number, w.events)
	r := c.rates
	p := dice.Float64()
	happens := func(rate float64) bool { p -= rate; return p < 0 }
	switch {
	case happens(r.EndWatch):
		return watchEffect{end: true}, "ended"
	case happens(r.CutOff):
		d := upTo(dice, r.MaxCutOff)
		return watchEffect{cut: d}, "cut off for " + d.String()
	case happens(r.SkipReplaced):
		return watchEffect{skip: true}, "skips a replaced state"
	}
	return watchEffect{}, ""
}
