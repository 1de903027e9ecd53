package statetest_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"example.com/state"
	"example.com/state/statetest"
)

// bubble runs f in a bubble, with a store and a wrapped one of the same data.
func bubble(t *testing.T, f func(t *testing.T, below state.Store, s *statetest.Store)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		below := newMemory()
		s := statetest.Wrap(below)
		defer func() { assert.NoError(t, s.Close()) }()
		f(t, below, s)
	})
}

// took fails unless f takes exactly d.
func took(t *testing.T, d time.Duration, f func()) {
	t.Helper()
	began := time.Now()
	f()
	assert.Equal(t, d, time.Since(began))
}

func value(t *testing.T, s state.Store, key string) string {
	t.Helper()
	v, err := s.Get(key)
	if err == state.ErrNotFound { //nolint:errorlint // bare
		return "none"
	}
	require.NoError(t, err)
	return string(v)
}

func receive(t *testing.T, events <-chan *state.KeyValue) *state.KeyValue {
	t.Helper()
	select {
	case kv, open := <-events:
		require.True(t, open, "the watch has ended")
		return kv
	case <-time.After(24 * time.Hour):
		require.FailNow(t, "no event came")
		return nil
	}
}

// told fails unless the watch's next events are these, such as "k=v" or "k gone".
func told(t *testing.T, events <-chan *state.KeyValue, want ...string) {
	t.Helper()
	for _, want := range want {
		kv := receive(t, events)
		got := kv.Key + "=" + string(kv.Value)
		if kv.Operation == state.OpDelete {
			got = kv.Key + " gone"
		}
		require.Equal(t, want, got)
	}
}

// nothing fails if an event comes within d.
func nothing(t *testing.T, events <-chan *state.KeyValue, d time.Duration) {
	t.Helper()
	select {
	case kv, open := <-events:
		require.FailNow(t, "not quiet", "%v %v", kv, open)
	case <-time.After(d):
	}
}

var errBroken = errors.New("broken")

// TestFailForGood: what will not pass is not waited for.
func TestFailForGood(t *testing.T) {
	bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
		s.On(statetest.Any, "*").Always().Fail(nats.ErrConnectionClosed)
		took(t, 0, func() {
			err := state.KeepAlive(t.Context(), s, "k", time.Minute, func() []byte { return nil })
			assert.ErrorIs(t, err, nats.ErrConnectionClosed)
			_, err = state.Acquire(t.Context(), s, "l", time.Minute)
			assert.ErrorIs(t, err, nats.ErrConnectionClosed)
		})
	})
}

func TestFail(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Put, "agents.*").Fail(errBroken)
		require.NoError(t, s.Put("other", nil, 0))
		err := s.Put("agents.ada", []byte("1"), 0)
		require.ErrorIs(t, err, errBroken)
		assert.EqualError(t, err, `state: put "agents.ada": broken`)
		assert.NotErrorIs(t, err, state.ErrOutcomeUnknown)
		assert.Equal(t, "none", value(t, below, "agents.ada"))
		require.NoError(t, s.Put("agents.ada", []byte("2"), 0), "only the next one")

		for _, outcome := range []error{state.ErrValueTooLarge, state.ErrStoreFull, state.ErrConflict} {
			s.On(statetest.Update, "*").Fail(outcome)
			_, err := s.Update("k", nil, 0, 0)
			assert.True(t, err == outcome, "%v is not bare", err) //nolint:errorlint // bare
		}
		assert.Panics(t, func() { s.On(statetest.Put, "*").Fail(state.ErrOutcomeUnknown) })
	})
}

// TestWhichCalls: a rule counts the calls that it selects, and no others.
func TestWhichCalls(t *testing.T) {
	calls := func(s *statetest.Store, n int) (failed []int) {
		for i := range n {
			if s.Put("k", nil, 0) != nil {
				failed = append(failed, i+1)
			}
			_ = s.Put("other", nil, 0)
			_, _ = s.Get("k")
			_ = s.Put("bad key", nil, 0)
			time.Sleep(time.Second)
		}
		return failed
	}
	for name, c := range map[string]struct {
		say  func(s *statetest.Store)
		want []int
	}{
		"next":   {func(s *statetest.Store) { s.On(statetest.Put, "k").Fail(errBroken) }, []int{1}},
		"nth":    {func(s *statetest.Store) { s.On(statetest.Put, "k").Nth(3).Fail(errBroken) }, []int{3}},
		"times":  {func(s *statetest.Store) { s.On(statetest.Put, "k").Nth(2).Times(3).Fail(errBroken) }, []int{2, 3, 4}},
		"always": {func(s *statetest.Store) { s.On(statetest.Put, "k").Nth(4).Always().Fail(errBroken) }, []int{4, 5, 6}},
		"for":    {func(s *statetest.Store) { s.On(statetest.Put, "k").For(2 * time.Second).Fail(errBroken) }, []int{1, 2}},
		"two": {func(s *statetest.Store) {
			s.On(statetest.Put, "k").Fail(errBroken)
			s.On(statetest.Put|statetest.Delete, "k").Fail(errBroken)
		}, []int{1, 2}},
		"stop":      {func(s *statetest.Store) { s.On(statetest.Put, "k").Always().Fail(errBroken).Stop() }, nil},
		"heal":      {func(s *statetest.Store) { s.On(statetest.Any, "*").Always().Fail(errBroken); s.Heal() }, nil},
		"other-op":  {func(s *statetest.Store) { s.On(statetest.Update|statetest.Reads, "*").Always().Fail(errBroken) }, nil},
		"other-key": {func(s *statetest.Store) { s.On(statetest.Put, "k.*").Always().Fail(errBroken) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
				c.say(s)
				assert.Equal(t, c.want, calls(s, 6))
			})
		})
	}
}

func TestRule(t *testing.T) {
	bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
		rule := s.On(statetest.Put, "k").Nth(2).Times(2).Fail(errBroken)
		go func() {
			for range 5 {
				time.Sleep(time.Second)
				_ = s.Put("k", nil, 0)
			}
		}()
		took(t, 2*time.Second, func() { <-rule.Happened() })
		assert.Equal(t, 1, rule.Count())
		time.Sleep(time.Minute)
		assert.Equal(t, 2, rule.Count())
	})
}

// TestArgumentsFirst: what a store refuses before it sends anything is refused
// whatever the state of the server.
func TestArgumentsFirst(t *testing.T) {
	bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
		rule := s.On(statetest.Any, "*").Always().LoseRequest()
		s.Unreachable(time.Hour)
		bad := func(want, err error) {
			t.Helper()
			assert.True(t, err == want, "%v", err) //nolint:errorlint // bare
		}
		took(t, 0, func() {
			for _, key := range []string{"", "a b", "a..b", ".a", "a.", "a*"} {
				_, err := s.Get(key)
				bad(state.ErrInvalidKey, err)
				bad(state.ErrInvalidKey, s.Put(key, nil, 0))
				bad(state.ErrInvalidKey, s.Delete(key))
				bad(state.ErrInvalidKey, s.DeleteRevision(key, 1))
				_, err = s.Update(key, nil, 0, 0)
				bad(state.ErrInvalidKey, err)
				_, err = s.Lock(key, time.Second)
				bad(state.ErrInvalidKey, err)
				_, err = s.LockHolder(key)
				bad(state.ErrInvalidKey, err)
			}
			for _, pattern := range []string{"", "a b", "a.*.b", "*a", "a..b*", ">"} {
				_, err := s.Keys(pattern)
				bad(state.ErrInvalidKey, err)
				_, err = s.Entries(pattern)
				bad(state.ErrInvalidKey, err)
				_, err = s.Watch(pattern)
				bad(state.ErrInvalidKey, err)
			}
			bad(state.ErrInvalidTTL, s.Put("k", nil, -1))
			_, err := s.Lock("k", 0)
			bad(state.ErrInvalidTTL, err)
		})
		assert.Zero(t, rule.Count())
		s.Heal()
		s.On(statetest.Put, "k").LoseAnswer()
		took(t, 0, func() { bad(state.ErrValueTooLarge, s.Put("k", make([]byte, 2<<20), 0)) })
	})
}

func TestDeny(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Any, "secret*").Always().Deny()
		took(t, 5*time.Second, func() {
			err := s.Put("secret", nil, 0)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
			assert.ErrorContains(t, err, `state: put "secret": `)
			assert.ErrorContains(t, err, "permissions violation")
		})
		assert.Equal(t, "none", value(t, below, "secret"))
		_, err := s.Watch("secret.*")
		assert.ErrorContains(t, err, "permissions violation")
	})
}

func TestLoseAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Put, "k").LoseAnswer()
		began := time.Now()
		took(t, 5*time.Second, func() {
			err := s.Put("k", []byte("1"), 0)
			assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.ErrorContains(t, err, `state: put "k": `)
		})
		kv, err := below.GetKeyValue("k")
		require.NoError(t, err)
		assert.True(t, kv.Modified.Equal(began), "it was applied at once")

		s.On(statetest.Update, "k").LoseAnswer()
		_, err = s.Update("k", []byte("2"), 0, kv.Revision+1)
		assert.ErrorIs(t, err, state.ErrOutcomeUnknown, "the answer that was lost is a conflict")
		assert.Equal(t, "1", value(t, below, "k"))

		s.On(statetest.DeleteRevision, "k").LoseAnswer()
		assert.ErrorIs(t, s.DeleteRevision("k", kv.Revision), state.ErrOutcomeUnknown)
		assert.Equal(t, "none", value(t, below, "k"))

		s.On(statetest.Get, "k").LoseAnswer()
		took(t, 5*time.Second, func() {
			_, err := s.Get("k")
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.NotErrorIs(t, err, state.ErrOutcomeUnknown)
		})
	})
}

// TestUntilTheContextEnds: every call ends when its context ends.
func TestUntilTheContextEnds(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		for name, say := range map[string]func(statetest.Calls){
			"request": func(c statetest.Calls) { c.LoseRequest() },
			"answer":  func(c statetest.Calls) { c.LoseAnswer() },
			"slow":    func(c statetest.Calls) { c.Slow(4 * time.Second) },
			"out":     func(c statetest.Calls) { c.Unreachable(time.Minute) },
		} {
			for _, op := range []statetest.Op{statetest.Get, statetest.Put, statetest.Lock, statetest.Watch} {
				say(s.On(op, "k"))
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				bound := s.WithContext(ctx)
				took(t, time.Second, func() {
					var err error
					switch op {
					case statetest.Get:
						_, err = bound.Get("k")
					case statetest.Put:
						err = bound.Put("k", nil, 0)
					case statetest.Lock:
						_, err = bound.Lock("k", time.Millisecond)
					case statetest.Watch:
						_, err = bound.Watch("k")
					}
					require.ErrorIs(t, err, context.DeadlineExceeded, "%s %s", name, op)
					writes := op == statetest.Put || op == statetest.Lock
					require.Equal(t, writes, errors.Is(err, state.ErrOutcomeUnknown), "%s %s", name, op)
				})
				cancel()
				s.Heal()
				time.Sleep(time.Minute)
			}
		}
	})
}

func TestApplyLate(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		first, err := below.Update("update", []byte("1"), 0, 0)
		require.NoError(t, err)
		require.NoError(t, below.Put("delete", []byte("1"), 0))
		s.On(statetest.Writes, "*").Times(4).ApplyLate(3 * time.Second)
		bytes := []byte("late")
		require.ErrorIs(t, s.Put("put", bytes, time.Minute), state.ErrOutcomeUnknown)
		bytes[0] = 'X' // they are the caller's again
		put := time.Now()
		require.Equal(t, "none", value(t, below, "put"))
		require.NoError(t, below.Put("put", []byte("newer"), 0))
		time.Sleep(3*time.Second - 1)
		require.Equal(t, "newer", value(t, below, "put"))
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		kv, err := below.GetKeyValue("put")
		require.NoError(t, err)
		assert.Equal(t, "late", string(kv.Value), "a Put goes over what came meanwhile")
		assert.True(t, kv.Modified.Equal(put.Add(3*time.Second)))

		for _, revision := range []uint64{first, first} {
			_, err := s.Update("update", []byte("2"), 0, revision)
			require.ErrorIs(t, err, state.ErrOutcomeUnknown)
		}
		second, err := below.Update("update", []byte("newer"), 0, mustRevision(t, below, "update"))
		require.NoError(t, err)
		require.ErrorIs(t, s.Delete("delete"), state.ErrOutcomeUnknown)
		time.Sleep(10 * time.Second)
		assert.Equal(t, second, mustRevision(t, below, "update"), "an Update never does")
		assert.Equal(t, "none", value(t, below, "delete"))

		s.On(statetest.Put, "put").ApplyLate(time.Hour)
		require.Error(t, s.Put("put", []byte("bounded"), 0))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		assert.Equal(t, "bounded", value(t, below, "put"))
	})
}

// TestCreatedLate: a late Update that creates a key comes to nothing if the key has
// existed meanwhile.
func TestCreatedLate(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		for name, fault := range map[string]func(statetest.Calls) *statetest.Rule{
			"late":   func(c statetest.Calls) *statetest.Rule { return c.ApplyLate(3 * time.Second) },
			"behind": func(c statetest.Calls) *statetest.Rule { return c.ApplyBehind(3) },
			"slow":   func(c statetest.Calls) *statetest.Rule { return c.Slow(4 * time.Second) },
		} {
			for _, existed := range []bool{false, true} {
				fault(s.On(statetest.Update, name))
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				_, err := s.WithContext(ctx).Update(name, []byte("late"), 0, 0)
				cancel()
				require.ErrorIs(t, err, state.ErrOutcomeUnknown, name)
				want := "late"
				if existed {
					require.NoError(t, below.Put(name, nil, 0))
					require.NoError(t, below.Delete(name))
					want = "none"
				}
				time.Sleep(10 * time.Second)
				synctest.Wait()
				assert.Equal(t, want, value(t, below, name), "%s, %v", name, existed)
				require.NoError(t, below.Delete(name))
			}
		}

		// KeepAlive deletes its key for good.
		s.On(statetest.Update, "alive").ApplyLate(3 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.NoError(t, state.KeepAlive(ctx, s, "alive", time.Minute, func() []byte { return nil }))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		assert.Equal(t, "none", value(t, below, "alive"))
	})
}

func mustRevision(t *testing.T, s state.Store, key string) uint64 {
	t.Helper()
	kv, err := s.GetKeyValue(key)
	require.NoError(t, err)
	return kv.Revision
}

func TestApplyBehind(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Put, "k").Times(2).ApplyBehind(2)
		require.ErrorIs(t, s.Put("k", []byte("late"), 0), state.ErrOutcomeUnknown)
		require.NoError(t, below.Put("k", []byte("1"), 0))
		require.NoError(t, below.Put("other", []byte("1"), 0))
		synctest.Wait()
		require.Equal(t, "1", value(t, below, "k"))
		require.NoError(t, below.Put("k", []byte("2"), 0))
		synctest.Wait()
		assert.Equal(t, "late", value(t, below, "k"))

		require.NoError(t, s.Delete("k"))
		require.ErrorIs(t, s.Put("k", []byte("late"), 0), state.ErrOutcomeUnknown)
		time.Sleep(10*time.Second - 1)
		synctest.Wait()
		assert.Equal(t, "none", value(t, below, "k"))
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		assert.Equal(t, "late", value(t, below, "k"), "ten seconds later at the latest")
	})
}

func TestSlow(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		s.On(statetest.Any, "k").Times(2).Slow(4 * time.Second)
		began := time.Now()
		took(t, 4*time.Second, func() { require.NoError(t, s.Put("k", []byte("1"), 0)) })
		kv, err := below.GetKeyValue("k")
		require.NoError(t, err)
		assert.Equal(t, 2*time.Second, kv.Modified.Sub(began), "it is written halfway")
		took(t, 4*time.Second, func() { assert.Equal(t, "1", value(t, s, "k")) })

		s.On(statetest.Put, "k").Slow(time.Minute)
		took(t, 5*time.Second, func() { assert.ErrorIs(t, s.Put("k", nil, 0), state.ErrOutcomeUnknown) })

		// Whoever stops waiting does not stop what is on its way.
		s.On(statetest.Put, "k").Slow(4 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		took(t, time.Second, func() {
			assert.ErrorIs(t, s.WithContext(ctx).Put("k", []byte("2"), 0), state.ErrOutcomeUnknown)
		})
		assert.Equal(t, "", value(t, below, "k"))
		time.Sleep(time.Second)
		synctest.Wait()
		assert.Equal(t, "2", value(t, below, "k"))
	})
}

func TestUnreachable(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		require.NoError(t, s.Put("k", []byte("1"), 0))
		l, err := s.Lock("l", time.Hour)
		require.NoError(t, err)
		reads := map[string]func(s state.Store) error{
			`get "k"`:         func(s state.Store) error { _, err := s.Get("k"); return err },
			`keys "*"`:        func(s state.Store) error { _, err := s.Keys("*"); return err },
			`entries "*"`:     func(s state.Store) error { _, err := s.Entries("*"); return err },
			`watch "*"`:       func(s state.Store) error { _, err := s.Watch("*"); return err },
			`lock holder "l"`: func(s state.Store) error { _, err := s.LockHolder("l"); return err },
		}
		writes := map[string]func(s state.Store) error{
			`put "k"`:             func(s state.Store) error { return s.Put("k", []byte("2"), 0) },
			`update "k"`:          func(s state.Store) error { _, err := s.Update("k", []byte("2"), 0, 1); return err },
			`delete "k"`:          func(s state.Store) error { return s.Delete("k") },
			`delete revision "k"`: func(s state.Store) error { return s.DeleteRevision("k", 1) },
			`lock "free"`:         func(s state.Store) error { _, err := s.Lock("free", time.Second); return err },
			`refresh "l"`:         func(state.Store) error { return l.Refresh() },
			`unlock "l"`:          func(state.Store) error { return l.Unlock() },
		}
		s.Unreachable(10 * time.Minute)
		for name, f := range reads {
			took(t, 5*time.Second, func() {
				err := f(s)
				assert.ErrorContains(t, err, "state: "+name+": nats: server is disconnected")
				assert.ErrorIs(t, err, nats.ErrDisconnected)
			})
		}
		for name, f := range writes {
			took(t, 5*time.Second, func() {
				err := f(s)
				assert.EqualError(t, err, "state: "+name+": nats: server is disconnected")
			})
		}
		assert.Equal(t, "1", value(t, below, "k"))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		took(t, time.Second, func() {
			err := s.WithContext(ctx).Put("k", nil, 0)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.NotErrorIs(t, err, state.ErrOutcomeUnknown, "it was not sent")
		})
		cancel()

		s.Heal()
		s.Unreachable(4 * time.Second)
		took(t, 4*time.Second, func() { assert.NoError(t, s.Put("k", []byte("3"), 0)) })
		require.NoError(t, l.Refresh())

		s.On(statetest.Put, "k").Unreachable(time.Minute)
		took(t, 5*time.Second, func() {
			assert.ErrorIs(t, s.Put("k", []byte("4"), 0), state.ErrOutcomeUnknown, "it was sent")
		})
		assert.Equal(t, "3", value(t, below, "k"))
		s.Heal()
		s.On(statetest.Put, "k").Unreachable(3 * time.Second)
		took(t, 3*time.Second, func() { assert.NoError(t, s.Put("k", []byte("5"), 0)) })

		// What is on its way when the connection breaks.
		s.On(statetest.Put, "k").Slow(2 * time.Second)
		time.AfterFunc(500*time.Millisecond, func() { s.Unreachable(time.Minute) })
		took(t, 5*time.Second, func() {
			assert.ErrorIs(t, s.Put("k", []byte("6"), 0), state.ErrOutcomeUnknown)
		})
		time.Sleep(time.Minute)
		require.NoError(t, l.Unlock())
	})
}

func TestPause(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		events, err := s.Watch("*")
		require.NoError(t, err)
		s.Pause(time.Hour)
		require.NoError(t, below.Put("other", []byte("0"), 0))
		took(t, time.Hour, func() { require.NoError(t, s.Put("k", []byte("1"), 0)) })
		told(t, events, "other=0", "k=1")

		// In the worst place: the context was alive when it was looked at.
		s.On(statetest.Put, "k").Pause(time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		took(t, time.Minute, func() {
			err := s.WithContext(ctx).Put("k", []byte("2"), 0)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.ErrorIs(t, err, state.ErrOutcomeUnknown)
		})
		assert.Equal(t, "2", value(t, below, "k"))

		// And everybody else stands still, too.
		s.On(statetest.Put, "k").Pause(time.Minute)
		go func() { _ = s.Put("k", nil, 0) }()
		synctest.Wait()
		ctx, cancel = context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		took(t, time.Minute, func() {
			err := s.WithContext(ctx).Put("k", []byte("3"), 0)
			assert.ErrorIs(t, err, context.DeadlineExceeded)
			assert.NotErrorIs(t, err, state.ErrOutcomeUnknown, "it had not begun")
		})
		synctest.Wait()
		assert.Equal(t, "", value(t, below, "k"))
	})
}

// TestClose: it ends what is going on, promptly, and leaves nothing behind.
func TestClose(t *testing.T) {
	bubble(t, func(t *testing.T, below state.Store, s *statetest.Store) {
		events, err := s.Watch("*")
		require.NoError(t, err)
		l, err := s.Lock("l", time.Hour)
		require.NoError(t, err)
		s.On(statetest.Put, "late").ApplyLate(10 * time.Second)
		require.Error(t, s.Put("late", nil, 0))
		s.On(statetest.Put, "behind").ApplyBehind(10)
		require.Error(t, s.Put("behind", nil, 0))
		s.On(statetest.Reads|statetest.Writes|statetest.Refresh, "*").Times(3).LoseRequest()
		results := make(chan error, 4)
		go func() { _, err := s.Get("k"); results <- err }()
		synctest.Wait()
		go func() { results <- s.Put("k", nil, 0) }()
		synctest.Wait()
		go func() { results <- l.Refresh() }()
		synctest.Wait()
		s.Pause(time.Hour)
		go func() { _, err := s.Keys("*"); results <- err }()
		synctest.Wait()
		took(t, 0, func() {
			require.NoError(t, s.Close())
			for range 4 {
				err := <-results
				assert.ErrorIs(t, err, state.ErrClosed)
				if errors.Is(err, state.ErrOutcomeUnknown) {
					assert.ErrorContains(t, err, "state: ")
				} else {
					assert.True(t, err == state.ErrClosed, "%v", err) //nolint:errorlint // bare
				}
			}
			for range events { //nolint:revive // until it ends
			}
			_, err := s.Get("k")
			assert.True(t, err == state.ErrClosed) //nolint:errorlint // bare
			_, err = s.Watch("k")
			assert.True(t, err == state.ErrClosed) //nolint:errorlint // bare
			assert.True(t, l.Refresh() == state.ErrClosed)
			assert.NoError(t, l.Unlock(), "it can still be unlocked")
			assert.True(t, l.Unlock() == state.ErrLockNotHeld) //nolint:errorlint // bare
			assert.NoError(t, s.Close())
		})
	})
}

// TestWithContextShares: a bound store is the same store.
func TestWithContextShares(t *testing.T) {
	bubble(t, func(t *testing.T, _ state.Store, s *statetest.Store) {
		s.On(statetest.Put, "k").Nth(2).Fail(errBroken)
		bound, ok := s.WithContext(t.Context()).(*statetest.Store)
		require.True(t, ok)
		require.NoError(t, s.Put("k", nil, 0))
		require.ErrorIs(t, bound.Put("k", nil, 0), errBroken)
		assert.Equal(t, s.Faults(), bound.Faults())
		require.Len(t, s.Faults(), 1)
		assert.Equal(t, `0s put "k" #2: failed: broken`, s.Faults()[0].String())
	})
}

func newMemory() state.Store { return state.NewMemoryStore() }
