package statetest_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.com/state"
	"example.com/state/statetest"
)

func mustWatch(t *testing.T, s state.Store, pattern string) <-chan *state.KeyValue {
	t.Helper()
	events, err := s.Watch(pattern)
	require.NoError(t, err)
	return events
}

func put(t *testing.T, s state.Store, key, value string) {
	t.Helper()
	require.NoError(t, s.Put(key, []byte(value), 0))
}

func TestWatchesEnd(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		config, agents := mustWatch(t, s, "config.*"), mustWatch(t, s, "agents.*")
		require.Equal(t, 2, s.Watches("*").Len())
		put(t, below, "config.a", "1")
		s.Watches("config.*").End()
		_, open := <-config
		for open {
			_, open = <-config // the event may have come first
		}
		assert.Equal(t, 1, s.Watches("*").Len())
		put(t, below, "agents.a", "1")
		told(t, agents, "agents.a=1")
		again := mustWatch(t, s, "config.*")
		put(t, below, "config.a", "2")
		told(t, again, "config.a=2")
	})
}

func TestWatchEndsAfter(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Watch, "*").End(2)
		first, second := mustWatch(t, s, "*"), mustWatch(t, s, "*")
		for _, v := range []string{"1", "2", "3", "4"} {
			put(t, below, "k", v)
		}
		told(t, first, "k=1", "k=2")
		_, open := <-first
		assert.False(t, open)
		told(t, second, "k=1", "k=2", "k=3", "k=4")
	})
}

// TestCutOff: the last state of every key comes, in the order of the changes.
func TestCutOff(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		put(t, below, "gone", "0")
		put(t, below, "expired", "0")
		events := mustWatch(t, s, "*")
		put(t, below, "a", "0")
		told(t, events, "a=0")
		s.Watches("*").CutOff(time.Minute)
		put(t, below, "a", "1")
		put(t, below, "b", "1")
		require.NoError(t, below.Delete("gone"))
		require.NoError(t, below.Put("expired", nil, time.Second))
		put(t, below, "a", "2")
		put(t, below, "c", "1")
		require.NoError(t, below.Delete("c"))
		nothing(t, events, time.Minute-1)
		took(t, 1, func() { told(t, events, "b=1", "gone gone", "a=2", "c gone", "expired gone") })
		put(t, below, "a", "3")
		put(t, below, "a", "4")
		told(t, events, "a=3", "a=4")

		s.Watches("*").CutOff(time.Hour + 1)
		nothing(t, events, time.Hour-1)
		took(t, 1, func() {
			_, open := <-events
			assert.False(t, open, "after so long it cannot tell what it missed")
		})

		events = mustWatch(t, s, "*")
		s.Watches("*").CutOff(2 * time.Hour)
		put(t, below, "a", "5")
		nothing(t, events, time.Minute)
		s.Heal()
		told(t, events, "a=5")
		s.Watches("*").CutOff(50 * time.Minute)
		nothing(t, events, 40*time.Minute)
		s.Watches("*").CutOff(50 * time.Minute)
		took(t, 20*time.Minute, func() {
			_, open := <-events
			assert.False(t, open, "an hour in all")
		})

		s.On(statetest.Watch, "*").CutOff(1, time.Minute)
		events = mustWatch(t, s, "*")
		put(t, below, "a", "5")
		told(t, events, "a=5")
		put(t, below, "a", "6")
		put(t, below, "a", "7")
		took(t, time.Minute, func() { told(t, events, "a=7") })
	})
}

func TestSkipReplaced(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		events := mustWatch(t, s, "*")
		s.Watches("*").SkipReplaced()
		put(t, below, "a", "1")
		put(t, below, "b", "1")
		nothing(t, events, time.Second/2)
		put(t, below, "a", "2")
		took(t, 0, func() { told(t, events, "b=1", "a=2") })
		put(t, below, "a", "3")
		put(t, below, "a", "4")
		told(t, events, "a=3", "a=4")

		s.Watches("*").SkipReplaced()
		time.Sleep(time.Hour)
		put(t, below, "a", "5")
		took(t, time.Second, func() { told(t, events, "a=5") })

		s.On(statetest.Watch, "*").SkipReplaced(1)
		events = mustWatch(t, s, "*")
		for _, v := range []string{"1", "2", "3", "4"} {
			put(t, below, "a", v)
			synctest.Wait()
		}
		told(t, events, "a=1")
	})
}

// TestUnreachableWatches: watches survive, and then deliver the last states.
func TestUnreachableWatches(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		events := mustWatch(t, s, "*")
		require.NoError(t, below.Put("short", nil, time.Minute))
		told(t, events, "short=")
		s.Unreachable(10 * time.Minute)
		for _, v := range []string{"1", "2", "3"} {
			put(t, below, "k", v)
		}
		took(t, 10*time.Minute, func() { told(t, events, "k=3", "short gone") })
		s.Unreachable(time.Hour)
		put(t, below, "k", "4")
		nothing(t, events, time.Minute)
		s.Heal()
		took(t, 0, func() { told(t, events, "k=4") })
	})
}
