package statetest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"example.com/state"
)

// An Op is a method of a store or of a lock, or a set of them: Put|Update.
type Op uint

// The methods. Get stands for GetKeyValue, too.
const (
	Get Op = 1 << iota
	Put
	Update
	Delete
	DeleteRevision
	Keys
	Entries
	Watch
	Lock
	Refresh
	Unlock
	LockHolder
)

// Sets of methods.
const (
	Reads  = Get | Keys | Entries | LockHolder
	Writes = Put | Update | Delete | DeleteRevision
	Any    = Reads | Writes | Watch | Lock | Refresh | Unlock
)

var opNames = []string{
	"get", "put", "update", "delete", "delete revision", "keys", "entries",
	"watch", "lock", "refresh", "unlock", "lock holder",
}

// String returns the names of the methods, as errors have them.
func (op Op) String() string {
	var names []string
	for i, name := range opNames {
		if op&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "|")
}

// writes reports whether the outcome of a call of op can be unknown.
func (op Op) writes() bool { return op&(Writes|Lock|Refresh|Unlock) != 0 }

// On selects calls of the methods op whose key, lock name or pattern matches
// pattern, by [state.MatchPattern]. It selects only the next such call, unless
// Nth, Times, Always or For says otherwise. It has no effect until a method of
// Calls that returns a [Rule] is called.
//
//	s.On(statetest.Put, "agents.*").Fail(err)
//	s.On(statetest.Lock, "leader").Nth(3).LoseAnswer()
//	s.On(statetest.Reads, "*").For(time.Minute).Slow(time.Second)
//
// If several rules select a call, the one that was made first decides. Calls
// that fail because of their arguments, and those made after the context or the
// store has ended, do not count; those of a value that is too large do.
func (s *Store) On(op Op, pattern string) Calls {
	return Calls{s: s.core, op: op, pattern: pattern, nth: 1, times: 1}
}

// Calls are the calls that a fault affects, see [Store.On].
type Calls struct {
	s       *core
	op      Op
	pattern string
	nth     int
	times   int // -1 for all
	end     time.Time
}

// Nth selects the nth call from now on, and none before it.
func (c Calls) Nth(n int) Calls { c.nth = n; return c }

// Times selects n calls instead of one.
func (c Calls) Times(n int) Calls { c.times = n; return c }

// Always selects every call, until [Rule.Stop] or [Store.Heal].
func (c Calls) Always() Calls { c.times = -1; return c }

// For selects every call within d from now.
func (c Calls) For(d time.Duration) Calls {
	c.times, c.end = -1, time.Now().Add(d)
	return c
}

// Fail makes the call fail with err at once. Nothing is written. Documented
// outcomes, such as [state.ErrValueTooLarge], [state.ErrStoreFull] or
// [state.ErrConflict], are returned as they are; other errors are wrapped, as a
// store wraps them. Fail panics if err is a [state.ErrOutcomeUnknown], since
// nothing was written; use LoseAnswer, LoseRequest or ApplyLate for that.
func (c Calls) Fail(err error) *Rule {
	if errors.Is(err, state.ErrOutcomeUnknown) {
		panic("statetest: Fail with ErrOutcomeUnknown; use LoseAnswer, LoseRequest or ApplyLate")
	}
	return c.rule(effect{what: "failed: " + err.Error(), refuse: err})
}

// Deny makes the call fail as one for which the connection's user lacks a
// permission. The server does not answer such a request, so the call fails after
// five seconds, or when its context ends, with an error that wraps
// [context.DeadlineExceeded] and, if it writes, [state.ErrOutcomeUnknown]. Nothing
// is written.
func (c Calls) Deny() *Rule { return c.rule(denied) }

var denied = effect{what: "denied", lost: true, never: true, denied: true}

// LoseAnswer applies a write at once and loses its answer. The call fails after
// five seconds, or when its context ends. The error wraps
// [state.ErrOutcomeUnknown] or, if the call does not write,
// [context.DeadlineExceeded].
//
// After a Lock whose answer is lost, nobody holds the lock, and nobody can get it
// until the lease lapses. After such a Refresh, the lease lapses for its holder as
// if it had not been extended.
func (c Calls) LoseAnswer() *Rule {
	return c.rule(effect{what: "answer lost", lost: true})
}

// LoseRequest is LoseAnswer, but nothing is applied. The call hangs for five
// seconds, or until its context ends.
func (c Calls) LoseRequest() *Rule {
	return c.rule(effect{what: "request lost", lost: true, never: true})
}

// ApplyLate is LoseAnswer, but a write is applied only d after the call has
// failed, at most ten seconds. An Update or DeleteRevision is applied only if
// its revision is still the current one, and one of revision 0 only if the key has
// not existed since; a Put or Delete in any case; a Refresh or Unlock only if the lock
// has not changed since, and a Lock only if this Store has not changed it. ApplyLate
// on Unlock releases the lock late.
func (c Calls) ApplyLate(d time.Duration) *Rule { return c.rule(late(d)) }

func late(d time.Duration) effect {
	d = max(min(d, maxLate), 1)
	return effect{what: fmt.Sprintf("answer lost, applied %v later", d), lost: true, delay: d}
}

// ApplyBehind is ApplyLate, but the write is applied after n further changes of
// its key by anyone, and at the latest ten seconds after the call has failed.
func (c Calls) ApplyBehind(n int) *Rule { return c.rule(behind(n)) }

func behind(n int) effect {
	return effect{what: fmt.Sprintf("answer lost, applied after %d changes", n), lost: true, behind: n}
}

// Slow makes the call take d. The call takes effect after half of that time. A
// call that would take five seconds or more fails after five, as with LoseAnswer.
func (c Calls) Slow(d time.Duration) *Rule { return c.rule(slow(d)) }

func slow(d time.Duration) effect {
	e := effect{what: fmt.Sprintf("slow by %v", d), travel: d / 2, answer: d - d/2}
	if d >= opTimeout {
		e.lost = true
	}
	return e
}

// Unreachable breaks the connection for d, as [Store.Unreachable] does, while the
// call is in progress, so that it gets no answer. If it writes and the connection
// is not back in five seconds, it fails with [state.ErrOutcomeUnknown]; nothing
// was written.
func (c Calls) Unreachable(d time.Duration) *Rule { return c.rule(unreachable(d)) }

func unreachable(d time.Duration) effect {
	return effect{what: fmt.Sprintf("unreachable for %v", d), outage: d}
}

// Pause pauses the process for d, as [Store.Pause] does, at the worst time: after
// the call has checked its context, and before it sends its request. A write is
// applied d later even if its context has ended in the meantime; it then fails
// with the context's error.
//
// If you pause the holder of a lock at its next write for longer than the TTL, it
// writes although somebody else may hold the lock. The write must carry the
// fencing token, and the resource must refuse it.
func (c Calls) Pause(d time.Duration) *Rule { return c.rule(pause(d)) }

func pause(d time.Duration) effect {
	return effect{what: fmt.Sprintf("paused for %v", d), pause: d}
}

// TakeAway takes the lock away from its holder just before the call, a Refresh or
// Unlock. See [Store.TakeAway].
func (c Calls) TakeAway() *Rule {
	return c.rule(effect{what: "taken away", takeAway: true})
}

// Lapse makes the call, a Lock, grant a lock that cannot be refreshed: each
// Refresh fails after five seconds, as with LoseRequest. The holder can see the
// lease lapse only by its local clock.
func (c Calls) Lapse() *Rule {
	return c.rule(effect{what: "refreshes will be lost", deaf: true})
}

// End makes the call, a Watch, return a watch that delivers n events and then
// ends instead of delivering another one.
func (c Calls) End(n int) *Rule {
	return c.rule(effect{what: fmt.Sprintf("ends after %d events", n), opens: watchEffect{set: true, after: n, end: true}})
}

// CutOff makes the call, a Watch, return a watch that delivers n events and is
// cut off for d instead of delivering another one. Then it delivers the last state
// of every key that changed.
func (c Calls) CutOff(n int, d time.Duration) *Rule {
	return c.rule(effect{what: fmt.Sprintf("cut off after %d events for %v", n, d), opens: watchEffect{set: true, after: n, cut: d}})
}

// SkipReplaced makes the call, a Watch, return a watch that skips a state which
// is replaced within a second, after n events.
func (c Calls) SkipReplaced(n int) *Rule {
	return c.rule(effect{what: fmt.Sprintf("skips a replaced state after %d events", n), opens: watchEffect{set: true, after: n, skip: true}})
}

func (c Calls) rule(e effect) *Rule {
	r := &Rule{calls: c, effect: e, left: c.times, happened: make(chan struct{})}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.rules = append(c.s.rules, r)
	return r
}

// A Rule is what happens to some calls.
type Rule struct {
	calls    Calls
	effect   effect
	happened chan struct{}

	// Guarded by the store's mu.
	seen, hits, left int
}

// Stop ends the rule. Faults that it has already caused continue.
func (r *Rule) Stop() {
	s := r.calls.s
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rules = slices.DeleteFunc(s.rules, func(other *Rule) bool { return other == r })
}

// Happened returns a channel that is closed when the rule affects its first call,
// before that call returns.
func (r *Rule) Happened() <-chan struct{} { return r.happened }

// Count returns how many calls the rule has affected.
func (r *Rule) Count() int {
	r.calls.s.mu.Lock()
	defer r.calls.s.mu.Unlock()
	return r.hits
}

// meets counts a call, if the rule is about it, and reports whether the rule
// decides what happens to it, unless another one did. The store's mu is held.
func (r *Rule) meets(c *call, decided bool) bool {
	if r.calls.op&c.op == 0 || !state.MatchPattern(r.calls.pattern, c.key) {
		return false
	}
	if !r.calls.end.IsZero() && !c.begun.Before(r.calls.end) {
		r.left = 0
		return false
	}
	if r.seen++; r.seen < r.calls.nth || decided || r.left == 0 {
		return false
	}
	if r.left > 0 {
		r.left--
	}
	if r.hits++; r.hits == 1 {
		close(r.happened)
	}
	return true
}

// admit counts a call, decides what happens to it, and reports whether that is
// anything.
func (s *core) admit(c *call) bool {
	s.mu.Lock()
	if len(s.rules) > 0 {
		decided := c.what != ""
		for _, r := range s.rules {
			if r.meets(c, decided) {
				c.effect, decided = r.effect, true
			}
		}
		s.rules = slices.DeleteFunc(s.rules, func(r *Rule) bool { return r.left == 0 })
	}
	at := site{c.op, c.key}
	s.calls[at]++
	if c.what == "" && s.chaos != nil {
		c.effect = s.chaos.decide(c.op, c.key, s.calls[at])
	}
	if c.what != "" {
		s.noteLocked(c.op.String(), c.key, s.calls[at], c.what)
	}
	held := s.gatesLocked()
	s.mu.Unlock()
	if c.pause > 0 {
		s.stop(c.pause)
	}
	if c.outage > 0 {
		s.disconnect(c.outage)
	}
	return c.what != "" || held
}

func (s *core) gatesLocked() bool {
	now := time.Now()
	return now.Before(s.pause.until) || now.Before(s.outage.until)
}

// Unreachable breaks the connection to the server for d from now. In this time
// calls fail as those of a NATSStore do, after five seconds without a connection
// or when their context ends. The error of writes does not wrap
// [state.ErrOutcomeUnknown], since they were not sent; only a write that is in
// progress when the connection breaks fails with ErrOutcomeUnknown. A call that
// begins less than five seconds before the end succeeds. Watches are cut off, see
// [Watches.CutOff]; leases lapse.
func (s *Store) Unreachable(d time.Duration) {
	s.note("", "", 0, unreachable(d).what)
	s.disconnect(d)
}

func (s *core) disconnect(d time.Duration) {
	s.mu.Lock()
	s.outage.shut(time.Now().Add(d))
	s.mu.Unlock()
	s.cutOff("*", d)
}

// Pause pauses the process for d from now, as a garbage collection, the scheduler
// or a closed laptop can. Until the pause is over, calls wait, even if their
// context ends, and watches deliver nothing. The program's timers are not paused,
// since they follow the test's clock. In a real process that was paused they fire
// late, but never earlier than here.
func (s *Store) Pause(d time.Duration) {
	s.note("", "", 0, pause(d).what)
	s.stop(d)
}

func (s *core) stop(d time.Duration) {
	s.mu.Lock()
	s.pause.shut(time.Now().Add(d))
	s.mu.Unlock()
	s.cutOff("*", d)
}

// Heal ends all faults that On, Unreachable, Pause, CutOff and Chaos began. Late
// writes are still applied.
func (s *Store) Heal() {
	s.mu.Lock()
	now := time.Now()
	s.rules, s.chaos = nil, nil
	s.outage.move(now)
	s.pause.move(now)
	for _, l := range s.locks {
		l.deaf.Store(false)
	}
	s.mu.Unlock()
	for _, w := range s.running("*") {
		w.do((*watch).heal)
	}
}

// A Fault is something that a Store did to a program.
type Fault struct {
	At   time.Duration // since Wrap
	Op   string        // the method, or "event" for what happened to a watch; empty if to all
	Key  string        // the key, lock name or pattern
	N    int           // the number of the call of the method with this key, or of the event
	What string
}

// String returns, for example, `1m30s put "counter" #3: answer lost`.
func (f Fault) String() string {
	if f.Op == "" {
		return fmt.Sprintf("%v %s", f.At, f.What)
	}
	return fmt.Sprintf("%v %s %q #%d: %s", f.At, f.Op, f.Key, f.N, f.What)
}

// Faults returns the faults so far, in the order in which they happened. Faults of
// the same time are sorted.
func (s *Store) Faults() []Fault {
	s.mu.Lock()
	faults := slices.Clone(s.faults)
	s.mu.Unlock()
	slices.SortFunc(faults, func(a, b Fault) int {
		if a.At != b.At {
			return int(max(min(a.At-b.At, 1), -1))
		}
		return strings.Compare(a.String(), b.String())
	})
	return faults
}

func (s *core) note(op, key string, n int, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noteLocked(op, key, n, what)
}

func (s *core) noteLocked(op, key string, n int, what string) {
	s.faults = append(s.faults, Fault{time.Since(s.began), op, key, n, what})
}
