package statetest_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.com/state"
	"example.com/state/statetest"
)

func ExampleWrap() {
	store := statetest.Wrap(state.NewMemoryStore())
	defer store.Close()

	store.On(statetest.Put, "agents.*").Nth(2).Fail(errors.New("out of luck"))
	for range 3 {
		fmt.Println(store.Put("agents.ada", []byte("alive"), time.Minute))
	}
	// Output:
	// <nil>
	// state: put "agents.ada": out of luck
	// <nil>
}

func ExampleCalls_LoseAnswer() {
	store := statetest.Wrap(state.NewMemoryStore())
	defer store.Close()

	store.On(statetest.Put, "job").LoseAnswer()
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := store.WithContext(ctx).Put("job", []byte("done"), 0)
	value, _ := store.Get("job")
	fmt.Printf("%t, and it is %q\n", errors.Is(err, state.ErrOutcomeUnknown), value)
	// Output: true, and it is "done"
}

func ExampleStore_TakeAway() {
	store := statetest.Wrap(state.NewMemoryStore())
	defer store.Close()

	lock, _ := store.Lock("leader", time.Minute)
	store.TakeAway("leader") // as an operator does who deletes its record
	fmt.Println(lock.Refresh())
	// Output: lock expired
}

func ExampleWatches_End() {
	store := statetest.Wrap(state.NewMemoryStore())
	defer store.Close()

	events, _ := store.Watch("config.*")
	store.Watches("config.*").End()
	_, open := <-events
	fmt.Println(open)
	// Output: false
}

// The agent of the tests below, and the tests that one would want to copy.

// lead works while it is the leader, and campaigns again whenever it is not.
func lead(ctx context.Context, store state.Store, work func(ctx context.Context, token uint64) error) {
	for ctx.Err() == nil {
		if err := state.WithLock(ctx, store, "leader", time.Minute, work); err != nil {
			time.Sleep(time.Second)
		}
	}
}

// TestSurvivesLosingItsLock: an agent whose lock is taken away stops its work,
// and goes on when it holds the lock again, with a higher token.
func TestSurvivesLosingItsLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := statetest.Wrap(state.NewMemoryStore())
		defer store.Close()
		store.On(statetest.Refresh, "leader").Nth(3).TakeAway()

		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		var tokens []uint64
		lead(ctx, store, func(ctx context.Context, token uint64) error {
			tokens = append(tokens, token)
			<-ctx.Done()
			return ctx.Err()
		})
		require.Len(t, tokens, 2)
		assert.Greater(t, tokens[1], tokens[0])
	})
}

// TestStopsWhenCutOff: an agent that cannot refresh its lock stops before
// anybody else can hold it.
func TestStopsWhenCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := state.NewMemoryStore()
		defer data.Close()
		store := statetest.Wrap(data.Client())
		defer store.Close()

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var working atomic.Bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			lead(ctx, store, func(ctx context.Context, _ uint64) error {
				working.Store(true)
				defer working.Store(false)
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		synctest.Wait()
		require.True(t, working.Load())
		store.Unreachable(10 * time.Minute)
		_, err := state.Acquire(ctx, data, "leader", time.Minute)
		require.NoError(t, err)
		synctest.Wait() // it is told at the very end of its lease
		assert.False(t, working.Load())
		cancel()
		<-done
	})
}

// TestNeedsItsFencingToken: an agent that sleeps past its lease, after it has
// looked whether it holds the lock and before it writes, writes nothing over what
// its successor wrote.
func TestNeedsItsFencingToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		data := state.NewMemoryStore()
		defer data.Close()
		store := statetest.Wrap(data.Client())
		defer store.Close()
		// The work of both: take over the account, then write only what is based
		// on that.
		work := func(store state.Store, who string) func(context.Context, uint64) error {
			return func(ctx context.Context, token uint64) error {
				revision, err := state.Modify(ctx, store, "account", func(*state.KeyValue) ([]byte, time.Duration, error) {
					return fmt.Append(nil, "taken over by ", who), 0, nil
				})
				if err != nil {
					return err
				}
				_, err = store.Update("account", []byte("written by "+who), 0, revision)
				return err
			}
		}
		store.On(statetest.Update, "account").Nth(2).Pause(5 * time.Minute)
		paused := make(chan error, 1)
		go func() {
			paused <- state.WithLock(t.Context(), store, "leader", time.Minute, work(store, "the first"))
		}()
		synctest.Wait()
		require.NoError(t, state.WithLock(t.Context(), data, "leader", time.Minute, work(data, "the second")))
		require.ErrorIs(t, <-paused, state.ErrConflict)
		value, err := data.Get("account")
		require.NoError(t, err)
		assert.Equal(t, "written by the second", string(value))
	})
}

// TestUnderChaos: whatever happens, the counter counts everything once. If it
// fails, the log says with which seed and after which faults.
func TestUnderChaos(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := statetest.Wrap(state.NewMemoryStore())
				defer store.Close()
				store.Chaos(t, seed, statetest.DefaultRates())
				for n := range 50 {
					for increment(store, "ada", n+1) != nil {
						time.Sleep(time.Second)
					}
				}
				store.Heal()
				require.Equal(t, 50, readCounter(t, store).Total)
			})
		})
	}
}
