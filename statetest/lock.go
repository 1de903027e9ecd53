package statetest

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"example.com/state"
)

// Lock implements [state.StateStore]. The lock is a [state.Fenced] if that of
// the store below is.
func (s *Store) Lock(key string, ttl time.Duration) (state.Lock, error) {
	c := s.call(Lock, key)
	written := s.writesOf(key)
	below, err := run(c, checkLock(key, ttl), func(below state.Store) (state.Lock, error) {
		if c.late && s.writesOf(key) != written {
			return nil, state.ErrLockHeld // it comes to nothing on top of a later record
		}
		l, err := below.Lock(key, ttl)
		if err == nil {
			s.wrote(key)
		}
		return l, err
	})
	if err != nil {
		return nil, err
	}
	l := &lock{s: s, below: below, key: key, ttl: ttl, turn: make(chan struct{}, 1), until: c.sent.Add(ttl)}
	l.deaf.Store(c.deaf)
	if !time.Now().Before(l.until) {
		_ = below.Unlock()
		return nil, state.ErrLockExpired
	}
	s.mu.Lock()
	s.locks[key] = l
	s.mu.Unlock()
	if _, ok := below.(state.Fenced); ok {
		return fencedLock{l}, nil
	}
	return l, nil
}

// A lock is a lock of the store below and what its holder knows of it, which is
// less if answers were lost.
type lock struct {
	s     *Store
	below state.Lock
	key   string
	ttl   time.Duration
	deaf  atomic.Bool // no Refresh gets through

	turn     chan struct{} // of one slot: held while the store below is asked; guards what follows
	until    time.Time     // when the lease lapses, for all that the holder knows
	writes   int           // how many have been applied
	unsure   bool          // an answer was lost
	lost     bool          // that of an Unlock
	taken    bool          // it was taken away
	gone     bool          // it was unlocked below
	released bool          // and the holder knows
}

type fencedLock struct{ *lock }

// Token implements [state.Fenced].
func (l fencedLock) Token() uint64 { return l.below.(state.Fenced).Token() }

// Key implements [state.Lock].
func (l *lock) Key() string { return l.key }

// wrote notes that a write of a lock was applied.
func (s *core) wrote(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.written[key]++
}

// writesOf returns how many writes of a lock were applied.
func (s *core) writesOf(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written[key]
}

// wrote notes that a write of the lock was applied.
func (l *lock) wrote() {
	l.writes++
	l.s.wrote(l.key)
}

func (l *lock) lapsed() bool { return !time.Now().Before(l.until) }

// do has a turn with the lock.
func (l *lock) do(f func() error) error {
	l.turn <- struct{}{}
	defer func() { <-l.turn }()
	return f()
}

// Refresh implements [state.Lock].
func (l *lock) Refresh() error {
	var writes int
	err := l.do(func() error {
		writes = l.writes
		switch {
		case l.released:
			return state.ErrLockNotHeld
		case l.lapsed():
			return state.ErrLockExpired
		}
		return nil
	})
	if err != nil {
		return err
	}
	c := l.s.call(Refresh, l.key)
	if l.deaf.Load() {
		c.effect = effect{what: "request lost", lost: true, never: true}
	}
	extended := false
	refresh := func(state.Store) (struct{}, error) {
		return struct{}{}, l.do(func() error {
			if c.takeAway {
				l.takeAway()
			}
			switch {
			case l.gone && !l.lost:
				return state.ErrLockNotHeld // an Unlock is about to return
			case l.gone || l.taken:
				return state.ErrLockExpired
			case l.writes != writes:
				// This one is late and comes to nothing, or another one that
				// was made since did what this one was to do.
				return nil
			}
			err := l.below.Refresh()
			if err == nil {
				l.wrote()
				extended = true
			}
			return err
		})
	}
	if l.s.isClosed() {
		_, err = refresh(nil)
		return err
	}
	_, err = run(c, nil, refresh)
	return l.do(func() error {
		switch {
		case err == state.ErrLockExpired: //nolint:errorlint // bare
			l.until = time.Time{}
		case errors.Is(err, state.ErrOutcomeUnknown):
			l.unsure = true
		case err != nil:
		case l.lapsed():
			// The answer came too late. What it was must not matter.
			_ = l.below.Unlock()
			return state.ErrLockExpired
		case extended:
			if until := c.sent.Add(l.ttl); until.After(l.until) {
				l.until = until
			}
		}
		return err
	})
}

// Unlock implements [state.Lock].
func (l *lock) Unlock() error {
	var (
		writes int
		lapsed bool
	)
	err := l.do(func() error {
		writes, lapsed = l.writes, l.lapsed()
		if l.released || lapsed && !l.unsure {
			return state.ErrLockNotHeld
		}
		return nil
	})
	if err != nil {
		return err
	}
	c := l.s.call(Unlock, l.key)
	c.ctx = context.Background()
	unlock := func(state.Store) (struct{}, error) {
		return struct{}{}, l.do(func() error {
			if c.takeAway {
				l.takeAway()
			}
			switch {
			case l.taken:
				return state.ErrLockNotHeld
			case l.gone:
				return nil // an earlier attempt did it
			case c.late && l.writes != writes:
				return nil // it comes to nothing on top of a later record
			}
			err := l.below.Unlock()
			if err == nil {
				l.gone = true
				l.wrote()
			}
			return err
		})
	}
	if l.s.isClosed() {
		_, err = unlock(nil)
	} else {
		_, err = run(c, nil, unlock)
	}
	return l.do(func() error {
		switch {
		case errors.Is(err, state.ErrOutcomeUnknown):
			l.unsure, l.lost = true, true
		case err == nil && (l.released || lapsed):
			err = state.ErrLockNotHeld
			l.released = true
		case err == nil || err == state.ErrLockNotHeld: //nolint:errorlint // bare
			l.released = true
		}
		return err
	})
}

// TakeAway takes the lock of key away from a holder that acquired it from s, as an
// operator does by deleting its record. The lock is free at once. The holder
// notices only when Refresh returns [state.ErrLockExpired] or Unlock
// [state.ErrLockNotHeld]. TakeAway reports whether the lock was held.
func (s *Store) TakeAway(key string) bool {
	s.mu.Lock()
	l := s.locks[key]
	s.mu.Unlock()
	if l == nil {
		return false
	}
	var taken bool
	_ = l.do(func() error { taken = l.takeAway(); return nil })
	if taken {
		s.note(Lock.String(), key, 0, "taken away")
	}
	return taken
}

// takeAway is TakeAway for a caller that has the turn.
func (l *lock) takeAway() bool {
	if l.taken || l.gone || l.below.Unlock() != nil {
		return false
	}
	l.taken = true
	l.wrote()
	return true
}
