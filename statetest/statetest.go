package statetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

const (
	// opTimeout is how long an operation of a NATSStore goes on without
	// progress.
	opTimeout = 5 * time.Second
	// maxLate is how long after its call has failed a write is applied at the
	// latest.
	maxLate = 10 * time.Second
	// maxCutOff is for how long a watch can be cut off and still know what it
	// missed: for as long as a bucket keeps the markers of what was deleted.
	maxCutOff = time.Hour
)

// A Store is a [state.Store] that wraps another one, the store below. Without
// faults it behaves exactly as the store below.
//
// One Store stands for one process and its connection: its faults affect all who
// use it, and nobody who uses the store below in another way. To test several
// agents, give each a separate Store around a separate client, see
// [state.MemoryStore.Client].
//
// All methods are safe for concurrent use.
type Store struct {
	*core
	ctx   context.Context
	bound state.Store // the store below, bound to ctx
}

var _ state.Store = (*Store)(nil)

// A core is what a Store shares with those that WithContext returns.
type core struct {
	below  state.Store
	began  time.Time
	quit   chan struct{} // closed by Close
	active sync.WaitGroup

	mu      sync.Mutex // guards what follows
	closed  bool
	calls   map[site]int // how many calls there were
	rules   []*Rule
	chaos   *chaos
	faults  []Fault
	outage  gate
	pause   gate
	watches map[*watch]struct{}
	opened  map[string]int // how many watches of a pattern there were
	locks   map[string]*lock
	written map[string]int           // how many writes of a lock were applied
	pending map[*time.Timer]struct{} // writes that are still to be applied
}

// A site is where calls are counted.
type site struct {
	op  Op
	key string
}

// Wrap returns a Store around store. Closing it closes store. Close it even if what is
// below has been closed: its watches run until their events are read, or it is closed.
func Wrap(store state.Store) *Store {
	return &Store{
		core: &core{
			below:   store,
			began:   time.Now(),
			quit:    make(chan struct{}),
			calls:   make(map[site]int),
			watches: make(map[*watch]struct{}),
			opened:  make(map[string]int),
			locks:   make(map[string]*lock),
			written: make(map[string]int),
			pending: make(map[*time.Timer]struct{}),
		},
		ctx:   context.Background(),
		bound: store,
	}
}

// WithContext implements [state.Store]. The store that it returns is a *Store
// and shares everything with s, faults included.
func (s *Store) WithContext(ctx context.Context) state.Store {
	if ctx == nil {
		ctx = context.Background()
	}
	return &Store{core: s.core, ctx: ctx, bound: s.below.WithContext(ctx)}
}

// Get implements [state.StateStore].
func (s *Store) Get(key string) ([]byte, error) {
	return run(s.call(Get, key), state.ValidateKey(key), func(below state.Store) ([]byte, error) {
		return below.Get(key)
	})
}

// GetKeyValue implements [state.StateStore].
func (s *Store) GetKeyValue(key string) (*state.KeyValue, error) {
	return run(s.call(Get, key), state.ValidateKey(key), func(below state.Store) (*state.KeyValue, error) {
		return below.GetKeyValue(key)
	})
}

// Put implements [state.StateStore].
func (s *Store) Put(key string, value []byte, ttl time.Duration) error {
	value = bytes.Clone(value) // it may be written late
	_, err := run(s.call(Put, key), checkPut(key, ttl), func(below state.Store) (struct{}, error) {
		return struct{}{}, below.Put(key, value, ttl)
	})
	return err
}

// Update implements [state.Store].
func (s *Store) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	value = bytes.Clone(value)
	c := s.call(Update, key)
	c.creates = revision == 0
	return run(c, checkPut(key, ttl), func(below state.Store) (uint64, error) {
		return below.Update(key, value, ttl, revision)
	})
}

// Delete implements [state.StateStore].
func (s *Store) Delete(key string) error {
	_, err := run(s.call(Delete, key), state.ValidateKey(key), func(below state.Store) (struct{}, error) {
		return struct{}{}, below.Delete(key)
	})
	return err
}

// DeleteRevision implements [state.Store].
func (s *Store) DeleteRevision(key string, revision uint64) error {
	_, err := run(s.call(DeleteRevision, key), state.ValidateKey(key), func(below state.Store) (struct{}, error) {
		return struct{}{}, below.DeleteRevision(key, revision)
	})
	return err
}

// Keys implements [state.StateStore].
func (s *Store) Keys(pattern string) ([]string, error) {
	return run(s.call(Keys, pattern), checkPattern(pattern), func(below state.Store) ([]string, error) {
		return below.Keys(pattern)
	})
}

// Entries implements [state.Store].
func (s *Store) Entries(pattern string) ([]*state.KeyValue, error) {
	return run(s.call(Entries, pattern), checkPattern(pattern), func(below state.Store) ([]*state.KeyValue, error) {
		return below.Entries(pattern)
	})
}

// LockHolder implements [state.Store].
func (s *Store) LockHolder(key string) (*state.LockInfo, error) {
	return run(s.call(LockHolder, key), state.ValidateKey(key), func(below state.Store) (*state.LockInfo, error) {
		return below.LockHolder(key)
	})
}

// Close implements [state.StateStore]. It closes the store below. A write that
// is still on its way is not applied any more.
func (s *Store) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.quit)
		for timer := range s.pending {
			if timer.Stop() {
				s.active.Done()
			}
		}
		clear(s.pending)
	}
	s.mu.Unlock()
	err := s.below.Close()
	s.active.Wait()
	return err
}

func checkPut(key string, ttl time.Duration) error {
	if err := state.ValidateKey(key); err != nil {
		return err
	}
	return state.ValidateTTL(ttl)
}

func checkLock(key string, ttl time.Duration) error {
	if err := state.ValidateKey(key); err != nil {
		return err
	}
	if ttl <= 0 {
		return state.ErrInvalidTTL
	}
	return nil
}

func checkPattern(pattern string) error {
	prefix, wild := strings.CutSuffix(pattern, "*")
	switch {
	case wild && prefix == "":
		return nil
	case wild && strings.HasSuffix(prefix, "."):
		prefix += "x" // the beginning of a key
	}
	return state.ValidateKey(prefix)
}

// A call is one call of a method of a Store or of one of its locks.
type call struct {
	s     *Store
	ctx   context.Context
	op    Op
	key   string
	begun time.Time
	sent  time.Time // when its request began
	late  bool      // it is carried out after it has failed
	// creates says that it is an Update of a key that does not exist. A late one comes
	// to nothing once the key has existed: what is left of a deletion refuses it.
	creates bool
	effect
}

// An effect is what happens to a call. The zero effect is none.
type effect struct {
	what   string        // says it in the list of faults
	pause  time.Duration // the process stands still for so long first
	outage time.Duration // the connection breaks for so long
	refuse error         // it fails with it, nothing is applied
	travel time.Duration // how long the request is on its way
	answer time.Duration // how long the answer is
	lost   bool          // no answer comes
	giveUp time.Duration // how long it waits for the lost answer; 0 stands for opTimeout
	never  bool          // and it is not applied
	denied bool          // for lack of permission
	delay  time.Duration // or so long after the call has failed
	behind int           // or after so many changes of the key, too

	takeAway bool // the lock turns out to have been taken away
	deaf     bool // no Refresh of the lock that is granted gets through
	opens    watchEffect
}

func (s *Store) call(op Op, key string) *call {
	now := time.Now()
	return &call{s: s, ctx: s.ctx, op: op, key: key, begun: now, sent: now}
}

// run makes a call: apply carries it out on the store below, at once or, if it is
// a write, perhaps after run has returned. If the arguments are invalid, no fault is
// counted: the store below says why.
func run[T any](c *call, invalid error, apply func(below state.Store) (T, error)) (T, error) {
	var none T
	s := c.s
	if s.isClosed() {
		return none, state.ErrClosed
	}
	if c.ctx.Err() != nil || invalid != nil || !s.admit(c) {
		return apply(s.bound)
	}
	if err := s.hold(c); err != nil {
		return none, err
	}
	c.sent = time.Now()
	applyLate := func() { _, _ = apply(s.below) }
	if c.creates && (c.delay > 0 || c.travel > 0) {
		changes, stop := s.changes(c.key)
		defer func() {
			if !c.late {
				stop()
			}
		}()
		applyLate = func() {
			defer stop()
			select {
			case <-changes:
			default:
				_, _ = apply(s.below)
			}
		}
	}
	switch {
	case c.refuse != nil:
		return none, c.failed(c.refuse)

	case c.lost && !c.op.writes():
		if err := s.wait(c.ctx, c.timeout()); err != nil {
			return none, c.interrupted(err, false)
		}
		return none, c.failed(c.noAnswer())

	case c.lost:
		switch {
		case c.never:
		case c.behind > 0:
			changes, stop := s.changes(c.key)
			defer func() { s.laterBehind(c, changes, stop, applyLate) }()
		case c.delay > 0:
			defer func() { s.later(c, c.delay, applyLate) }()
		default:
			if _, err := apply(s.below); local(err) {
				return none, err
			}
		}
		if err := s.wait(c.ctx, c.timeout()); err != nil {
			return none, c.interrupted(err, true)
		}
		return none, c.failed(fmt.Errorf("%w: %w", state.ErrOutcomeUnknown, c.noAnswer()))

	case c.travel > 0 || c.answer > 0:
		err := s.wait(c.ctx, c.travel)
		if err == nil {
			err = s.reach(c, true)
		}
		if err != nil {
			if c.op.writes() {
				s.later(c, max(c.travel-time.Since(c.sent), 0), applyLate)
			}
			return none, c.interrupted(err, true)
		}
		value, failure := apply(s.bound)
		if local(failure) {
			return none, failure
		}
		if err = s.wait(c.ctx, c.answer); err == nil {
			err = s.reach(c, true)
		}
		if err != nil {
			return none, c.interrupted(err, true)
		}
		return value, failure
	}
	if c.pause > 0 && c.ctx.Err() != nil && c.op.writes() {
		// The process stood still between the store's look at the context and
		// the request, which went out when the process went on.
		if _, err := apply(s.below); local(err) {
			return none, err
		}
		return none, c.interrupted(c.ctx.Err(), true)
	}
	return apply(s.bound)
}

var (
	errNoAnswer     = fmt.Errorf("no answer: %w", context.DeadlineExceeded)
	errDenied       = fmt.Errorf("%w (the connection last reported: %w)", errNoAnswer, nats.ErrPermissionViolation)
	errNotConnected = nats.ErrDisconnected
	errUnavailable  = nats.ErrNoResponders
)

// local reports whether err is what a store says before it sends anything.
func local(err error) bool {
	return err == state.ErrValueTooLarge || err == state.ErrClosed || //nolint:errorlint // bare
		err == state.ErrInvalidKey || err == state.ErrInvalidTTL
}

func (c *call) timeout() time.Duration {
	if c.giveUp > 0 {
		return c.giveUp
	}
	return opTimeout
}

// noAnswer returns why no answer comes.
func (c *call) noAnswer() error {
	if c.denied {
		return errDenied
	}
	return errNoAnswer
}

// failed returns the error of the call: err itself if it is a documented
// outcome.
func (c *call) failed(err error) error {
	for _, bare := range []error{
		state.ErrNotFound, state.ErrClosed, state.ErrLockHeld, state.ErrLockNotHeld, state.ErrLockExpired,
		state.ErrInvalidKey, state.ErrInvalidTTL, state.ErrWatchClosed, state.ErrConflict,
		state.ErrValueTooLarge, state.ErrStoreFull,
	} {
		if err == bare { //nolint:errorlint // bare
			return err
		}
	}
	return fmt.Errorf("state: %s %q: %w", c.op, c.key, err)
}

// interrupted returns the error of a call that was ended by err before its
// answer was here.
func (c *call) interrupted(err error, sent bool) error {
	switch {
	case sent && c.op.writes() && !errors.Is(err, state.ErrOutcomeUnknown):
		err = fmt.Errorf("%w: %w", state.ErrOutcomeUnknown, err)
	case err == state.ErrClosed: //nolint:errorlint // bare
		return err
	}
	return c.failed(err)
}

func (s *core) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// wait waits for d, or until ctx ends or the store is closed, and says so.
func (s *core) wait(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-s.quit:
		return state.ErrClosed
	}
}

// A gate is closed until a time.
type gate struct {
	until time.Time
	moved chan struct{} // closed when until changes; nil if nobody waits
}

// shut keeps the gate closed until a time at least. The caller holds mu.
func (g *gate) shut(until time.Time) {
	if until.After(g.until) {
		g.move(until)
	}
}

func (g *gate) move(until time.Time) {
	g.until = until
	if g.moved != nil {
		close(g.moved)
		g.moved = nil
	}
}

// left returns how long the gate is still closed, and a channel that is closed when
// this changes. The caller holds mu.
func (g *gate) left() (time.Duration, <-chan struct{}) {
	left := time.Until(g.until)
	if left <= 0 {
		return 0, nil
	}
	if g.moved == nil {
		g.moved = make(chan struct{})
	}
	return left, g.moved
}

// pass waits until the gate is open, for at most limit if that is not 0, and
// reports whether it is. It returns early, with an error, as wait does.
func (s *core) pass(ctx context.Context, g *gate, limit time.Duration) (open bool, err error) {
	end := time.Now().Add(limit)
	for {
		s.mu.Lock()
		left, moved := g.left()
		s.mu.Unlock()
		if left <= 0 {
			return true, nil
		}
		if limit != 0 {
			if left = min(left, time.Until(end)); left <= 0 {
				return false, nil
			}
		}
		timer := time.NewTimer(left)
		select {
		case <-timer.C:
		case <-moved:
		case <-ctx.Done():
			err = ctx.Err()
		case <-s.quit:
			err = state.ErrClosed
		}
		timer.Stop()
		if err != nil {
			return false, err
		}
	}
}

// hold makes a call wait for as long as the process stands still and then the
// connection is broken, and returns the error with which it fails then.
func (s *Store) hold(c *call) error {
	if _, err := s.pass(context.Background(), &s.pause, 0); err != nil {
		return err
	}
	c.begun = time.Now()
	if c.pause > 0 {
		if c.ctx.Err() != nil {
			if !c.op.writes() {
				return c.interrupted(c.ctx.Err(), false)
			}
			return nil
		}
	} else if err := c.ctx.Err(); err != nil {
		return c.interrupted(err, false)
	}
	if err := s.reach(c, c.outage > 0); err != nil {
		return c.interrupted(err, c.outage > 0)
	}
	return nil
}

// reach waits until the server can be reached, for no longer than the call may
// take. Of a call that was sent already nobody knows then what became of it.
func (s *Store) reach(c *call, sent bool) error {
	left := max(opTimeout-time.Since(c.begun), 1)
	open, err := s.pass(c.ctx, &s.outage, left)
	switch {
	case err != nil || open:
		return err
	case c.op.writes() && sent:
		return fmt.Errorf("%w: %w", state.ErrOutcomeUnknown, errNotConnected)
	}
	return errNotConnected
}

// later applies the write of a call after a time, unless the store is closed before.
func (s *core) later(c *call, after time.Duration, apply func()) {
	c.late = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return // and with it the store below, and what is open there
	}
	s.active.Add(1)
	var timer *time.Timer
	timer = time.AfterFunc(min(after, maxLate), func() {
		defer s.active.Done()
		s.mu.Lock()
		delete(s.pending, timer)
		closed := s.closed
		s.mu.Unlock()
		if !closed {
			apply()
		}
	})
	s.pending[timer] = struct{}{}
}

// changes returns the changes of a key from now on, or nil if it cannot.
func (s *core) changes(key string) (<-chan *state.KeyValue, context.CancelFunc) {
	ctx, stop := context.WithCancel(context.Background())
	changes, err := s.below.WithContext(ctx).Watch(key)
	if err != nil {
		return nil, stop // then the write is applied after maxLate
	}
	return changes, stop
}

// laterBehind applies the write of a call after as many changes as that says, and at
// the latest after maxLate, unless the store is closed before.
func (s *core) laterBehind(c *call, changes <-chan *state.KeyValue, stop context.CancelFunc, apply func()) {
	c.late = true
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		stop()
		return
	}
	s.active.Go(func() {
		defer stop()
		timer := time.NewTimer(maxLate)
		defer timer.Stop()
		for behind := c.behind; behind > 0; {
			select {
			case _, open := <-changes:
				switch {
				case !open:
					changes = nil // the store below is about to be closed
				case c.creates:
					return
				default:
					behind--
				}
			case <-timer.C:
				behind = 0
			case <-s.quit:
				return
			}
		}
		apply()
	})
}
