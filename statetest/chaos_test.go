package statetest_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
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

var (
	seeds     = flag.Int("seeds", 1000, "how many seeds the tests under chaos run")
	firstSeed = flag.Uint64("seed", 0, "the first of them")
)

// A counter remembers who counted what, so that nothing is counted twice.
type counter struct {
	Total int
	Last  map[string]int // the last number that each agent counted
}

func readCounter(t *testing.T, s state.Store) counter {
	t.Helper()
	var c counter
	value, err := s.Get("counter")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(value, &c))
	return c
}

var errCounted = errors.New("counted already")

// increment counts the agent's number n, however often it is called.
func increment(s state.Store, agent string, n int) error {
	_, err := state.Modify(context.Background(), s, "counter", func(old *state.KeyValue) ([]byte, time.Duration, error) {
		c, err := parseCounter(old)
		if err != nil {
			return nil, 0, err
		}
		if c.Last[agent] >= n {
			return nil, 0, errCounted // an attempt of unknown outcome did it
		}
		c.Last[agent] = n
		c.Total++
		value, err := json.Marshal(c)
		return value, 0, err
	})
	if errors.Is(err, errCounted) {
		return nil
	}
	return err
}

// incrementBlindly counts once more, and perhaps twice if its outcome is unknown
// and it is called again.
func incrementBlindly(s state.Store) error {
	kv, err := s.GetKeyValue("counter")
	if err != nil && !errors.Is(err, state.ErrNotFound) {
		return err
	}
	c, err := parseCounter(kv)
	if err != nil {
		return err
	}
	c.Total++
	value, err := json.Marshal(c)
	if err != nil {
		return err
	}
	var revision uint64
	if kv != nil {
		revision = kv.Revision
	}
	_, err = s.Update("counter", value, 0, revision)
	return err
}

func parseCounter(kv *state.KeyValue) (counter, error) {
	c := counter{Last: map[string]int{}}
	if kv == nil {
		return c, nil
	}
	return c, json.Unmarshal(kv.Value, &c)
}

// programs are right. One in so many seeds is enough for those that take longer:
// who waits for a lock of a wrapped store asks every second.
var programs = map[string]struct {
	run   program
	oneIn int
}{
	"modify":     {modifying, 1},
	"register":   {registering, 1},
	"follow":     {following, 4},
	"cache":      {caching, 10},
	"keep-alive": {keepingAlive, 2},
	"hold":       {leading, 4},
	"with-lock": {func(t *testing.T, w *world) error {
		return holding(t, w, state.WithLock)
	}, 20},
	"acquire-and-hold": {func(t *testing.T, w *world) error {
		return holding(t, w, func(ctx context.Context, s state.StateStore, key string, ttl time.Duration, fn func(context.Context, uint64) error) error {
			lock, err := state.Acquire(ctx, s, key, ttl)
			if err != nil {
				return err
			}
			return state.Hold(ctx, lock, ttl, fn)
		})
	}, 20},
}

// TestPrograms: under chaos for a day, with any seed, the contract holds.
func TestPrograms(t *testing.T) {
	for name, p := range programs {
		t.Run(name, func(t *testing.T) {
			runs := *seeds / p.oneIn
			if testing.Short() {
				runs = max(runs/5, 1) // the race detector is about five times slower
			}
			met, end := 0, *firstSeed+uint64(runs)
			for seed := *firstSeed; seed < end; seed++ {
				faults, wrong := simulate(t, seed, statetest.DefaultRates(), p.run)
				met += len(faults)
				if wrong != nil || t.Failed() {
					t.Log(strings.Join(faults, "\n"))
					require.NoError(t, wrong, "seed %d", seed)
					require.FailNow(t, "failed", "seed %d", seed)
				}
			}
			assert.NotZero(t, met)
			t.Logf("%d seeds, %d faults", end-*firstSeed, met)
		})
	}
}

// TestSameSeedSameFaults: and another seed has others.
func TestSameSeedSameFaults(t *testing.T) {
	for name, p := range map[string]program{
		"modify":   modifying,
		"register": registering,
		"config":   configured(false),
		"lease":    leasing,
	} {
		t.Run(name, func(t *testing.T) {
			all := func(seeds ...uint64) (all []string) {
				for _, seed := range seeds {
					faults, wrong := simulate(t, seed, statetest.DefaultRates(), p)
					require.NoError(t, wrong)
					all = append(all, faults...)
				}
				require.NotEmpty(t, all)
				return all
			}
			first := all(1, 2, 3, 4, 5, 6, 7, 8, 9)
			require.Equal(t, first, all(1, 2, 3, 4, 5, 6, 7, 8, 9))
			require.NotEqual(t, first, all(11, 12, 13, 14, 15, 16, 17, 18, 19))
		})
	}
}

// TestChaosReports: when a test fails it logs the seed and the faults.
func TestChaosReports(t *testing.T) {
	for _, failed := range []bool{false, true} {
		bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
			test := &fakeTest{failed: failed}
			s.Chaos(test, 7, statetest.Rates{Fail: 1})
			require.Error(t, s.Put("k", nil, 0))
			test.cleanup()
			if !failed {
				assert.Empty(t, test.log)
				return
			}
			assert.Equal(t, []string{
				"statetest: seed 7: 1 faults",
				`0s put "k" #1: failed: nats: no responders available for request`,
			}, test.log)
		})
	}
}

type fakeTest struct {
	testing.TB
	failed  bool
	cleanup func()
	log     []string
}

func (f *fakeTest) Cleanup(cleanup func()) { f.cleanup = cleanup }
func (f *fakeTest) Failed() bool           { return f.failed }
func (f *fakeTest) Log(args ...any)        { f.log = append(f.log, fmt.Sprint(args...)) }
func (f *fakeTest) Logf(format string, args ...any) {
	f.log = append(f.log, fmt.Sprintf(format, args...))
}

// TestRates: each happens if it is certain, and to what it can happen to.
func TestRates(t *testing.T) {
	const d = time.Minute
	for what, c := range map[string]struct {
		rates statetest.Rates
		ops   statetest.Op // to which it happens, of these below
	}{
		"failed":                 {statetest.Rates{Fail: 1}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"denied":                 {statetest.Rates{Deny: 1}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"slow by":                {statetest.Rates{Slow: 1}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"request lost":           {statetest.Rates{LoseRequest: 1}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"answer lost":            {statetest.Rates{LoseAnswer: 1}, statetest.Put | statetest.Lock | statetest.Refresh},
		"answer lost, applied":   {statetest.Rates{ApplyLate: 1}, statetest.Put | statetest.Lock | statetest.Refresh},
		"unreachable for":        {statetest.Rates{Unreachable: 1, MaxOutage: d}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"paused for":             {statetest.Rates{Pause: 1, MaxPause: d}, statetest.Get | statetest.Put | statetest.Lock | statetest.Refresh | statetest.Watch},
		"taken away":             {statetest.Rates{TakeAway: 1}, statetest.Refresh},
		"refreshes will be lost": {statetest.Rates{Lapse: 1}, statetest.Lock},
		"ended":                  {statetest.Rates{EndWatch: 1}, 0},
		"cut off for":            {statetest.Rates{CutOff: 1, MaxCutOff: d}, 0},
		"skips a replaced state": {statetest.Rates{SkipReplaced: 1}, 0},
	} {
		t.Run(what, func(t *testing.T) {
			bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
				l := mustLock(t, s, "l", 100*time.Hour)
				_ = mustWatch(t, s, "*")
				s.Chaos(nil, 1, c.rates)
				for op, call := range map[statetest.Op]func(){
					statetest.Get:     func() { _, _ = s.Get("k") },
					statetest.Put:     func() { _ = s.Put("k", nil, 0) },
					statetest.Lock:    func() { _, _ = s.Lock("free", time.Second) },
					statetest.Refresh: func() { _ = l.Refresh() },
					statetest.Watch:   func() { _, _ = s.Watch("k") },
				} {
					time.Sleep(time.Second)
					before := len(s.Faults())
					call()
					if c.ops&op == 0 {
						continue
					}
					faults := s.Faults()[before:]
					require.NotEmpty(t, faults, op)
					assert.Equal(t, op.String(), faults[0].Op)
					assert.Contains(t, faults[0].What, what)
				}
				if c.ops == 0 {
					put(t, below, "k", "1")
					synctest.Wait()
					require.NotEmpty(t, s.Faults())
					assert.Equal(t, "event", s.Faults()[0].Op)
					assert.Contains(t, s.Faults()[0].What, what)
				}
			})
		})
	}
}

const day = 24 * time.Hour

// modifying has agents count with Modify.
func modifying(t *testing.T, w *world) error {
	const agents, each = 3, 24
	var group sync.WaitGroup
	for i := range agents {
		s := w.agent()
		group.Go(func() {
			for n := range each {
				for increment(s, fmt.Sprint(i), n+1) != nil {
					time.Sleep(time.Second)
				}
				time.Sleep(day / each)
			}
		})
	}
	group.Wait()
	c := readCounter(t, w.below)
	if c.Total != agents*each {
		return fmt.Errorf("counted %d of %d", c.Total, agents*each)
	}
	for agent, n := range c.Last {
		if n != each {
			return fmt.Errorf("agent %s counted up to %d of %d", agent, n, each)
		}
	}
	return nil
}

// keepingAlive has an agent keep its record alive.
func keepingAlive(t *testing.T, w *world) error {
	const ttl = 10 * time.Minute
	s := w.agent()
	for _, life := range []time.Duration{day / 2, day / 2} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- state.KeepAlive(ctx, s, "agents.ada", ttl, func() []byte { return []byte("alive") })
		}()
		time.Sleep(life)
		if len(done) > 0 {
			cancel()
			return fmt.Errorf("KeepAlive gave up: %w", <-done)
		}
		s.Heal()
		time.Sleep(ttl) // whatever happened is over
		if _, err := w.below.Get("agents.ada"); err != nil {
			cancel()
			return fmt.Errorf("the agent lives, its record: %w", err)
		}
		s.Chaos(nil, w.seed, w.rates)
		cancel()
		<-done // an error if it could not delete the record
		time.Sleep(ttl + time.Minute)
		if _, err := w.below.Get("agents.ada"); !errors.Is(err, state.ErrNotFound) {
			return fmt.Errorf("the agent is gone, its record is not: %v", err) //nolint:errorlint // may be nil
		}
	}
	return nil
}

// holding has agents work under a lock in turn.
func holding(t *testing.T, w *world, withLock func(context.Context, state.StateStore, string, time.Duration, func(context.Context, uint64) error) error) error {
	const agents, ttl = 3, time.Minute
	var (
		mu     sync.Mutex
		holder context.Context // of who counts on holding the lock
		last   uint64
		wrong  error
		terms  int
		group  sync.WaitGroup
	)
	ctx, cancel := context.WithTimeout(t.Context(), day)
	defer cancel()
	begin := func(ctx context.Context, token uint64) {
		time.Sleep(time.Nanosecond) // whoever is told now that its lease is over has been told
		mu.Lock()
		defer mu.Unlock()
		if holder != nil && holder.Err() == nil && wrong == nil {
			wrong = fmt.Errorf("two count on holding the lock, the one with token %d and the one with %d", last, token)
		}
		if token <= last && wrong == nil {
			wrong = fmt.Errorf("token %d was granted after %d", token, last)
		}
		holder, last = ctx, token
		terms++
	}
	work := func(ctx context.Context, token uint64) error {
		begin(ctx, token)
		select {
		case <-ctx.Done():
		case <-time.After(3*time.Minute + 7*time.Second):
		}
		mu.Lock()
		defer mu.Unlock()
		if holder == ctx {
			holder = nil
		}
		return ctx.Err()
	}
	for range agents {
		s := w.agent()
		group.Go(func() {
			for ctx.Err() == nil {
				_ = withLock(ctx, s, "leader", ttl, work)
				time.Sleep(17 * time.Minute)
			}
		})
	}
	group.Wait()
	if wrong != nil {
		return wrong
	}
	w.heal()
	time.Sleep(ttl + time.Minute)
	if terms < 100 {
		return fmt.Errorf("the lock was held %d times", terms)
	}
	for _, s := range w.agents {
		l, err := s.Lock("leader", ttl)
		if err != nil {
			return fmt.Errorf("the lock is not free: %w", err)
		}
		if err := l.Unlock(); err != nil {
			return err
		}
	}
	return nil
}

// registering compares all that is acknowledged with a model of a register with
// compare-and-set: no acknowledged write is lost, none goes over another revision,
// and whatever failed, unless its outcome is unknown, did not happen.
func registering(t *testing.T, w *world) error {
	const agents, each = 3, 48
	type write struct {
		on, revision uint64 // revision is 0 if the outcome is unknown
		value        string
		failed       bool
	}
	var (
		mu     sync.Mutex
		writes = map[string]write{}
		group  sync.WaitGroup
	)
	history := record(t, w, "register")
	for i := range agents {
		s := w.agent()
		group.Go(func() {
			for n := range each {
				kv, err := s.GetKeyValue("register")
				var on uint64
				switch {
				case err == nil:
					on = kv.Revision
				case !errors.Is(err, state.ErrNotFound):
					time.Sleep(time.Minute)
					continue
				}
				value := fmt.Sprint(i, ".", n)
				revision, err := s.Update("register", []byte(value), 0, on)
				mu.Lock()
				writes[value] = write{on, revision, value, err != nil && !errors.Is(err, state.ErrOutcomeUnknown)}
				mu.Unlock()
				time.Sleep(day / each)
			}
		})
	}
	group.Wait()
	var last uint64
	for _, kv := range history() {
		did, known := writes[string(kv.Value)]
		switch {
		case !known:
			return fmt.Errorf("nobody wrote %q, or twice", kv.Value)
		case did.failed:
			return fmt.Errorf("the write of %q failed, and it was written", kv.Value)
		case did.on != last:
			return fmt.Errorf("%q was to be written on %d, and was on %d", kv.Value, did.on, last)
		case did.revision != 0 && did.revision != kv.Revision:
			return fmt.Errorf("%q was acknowledged as %d, and is %d", kv.Value, did.revision, kv.Revision)
		}
		delete(writes, did.value)
		last = kv.Revision
	}
	for _, did := range writes {
		if did.revision != 0 {
			return fmt.Errorf("the acknowledged write of %q is lost", did.value)
		}
	}
	return nil
}

// leading has an agent that is alone work under a lock.
func leading(t *testing.T, w *world) error {
	const ttl = 10 * time.Minute
	s := w.agent()
	ctx, cancel := context.WithTimeout(t.Context(), day)
	defer cancel()
	terms := 0
	for ctx.Err() == nil {
		lock, err := s.WithContext(ctx).Lock("leader", ttl)
		if err == nil {
			err = state.Hold(ctx, lock, ttl, func(ctx context.Context, _ uint64) error {
				terms++
				select {
				case <-ctx.Done():
				case <-time.After(41*time.Minute + time.Millisecond): // never when it refreshes
				}
				return ctx.Err()
			})
		}
		if err != nil {
			time.Sleep(time.Minute)
		}
	}
	if terms < 24 {
		return fmt.Errorf("it had the lock %d times", terms)
	}
	return nil
}

// leasing has agents take turns with a lock and keep it, without the help of
// Acquire and Hold, which vary their pauses at random.
func leasing(t *testing.T, w *world) error {
	const agents, ttl = 3, 10 * time.Minute
	var group sync.WaitGroup
	begun := time.Now()
	for range agents {
		s := w.agent()
		group.Go(func() {
			for time.Since(begun) < day {
				lock, err := s.Lock("leader", ttl)
				for n := 0; err == nil && n < 5; n++ {
					time.Sleep(ttl / 3)
					err = lock.Refresh()
				}
				if err == nil {
					err = lock.Unlock()
				}
				if err != nil {
					time.Sleep(time.Minute)
				}
				time.Sleep(ttl)
			}
		})
	}
	group.Wait()
	return nil
}
