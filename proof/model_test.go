package proof

import (
	"slices"
	"time"

	"example.com/state"
)

// A model is the contract, for one caller at a time: what every call must
// return, and what every watch must tell. It is told the time; where the real
// clock is used, nothing happens close to a deadline.
type model struct {
	now      time.Time
	revision uint64
	entries  map[string]*modelEntry
	locks    map[string]*modelLease
	told     map[string][]modelEvent // by key, all that a watch from the beginning is told
	expired  int                     // how many entries have expired
	closed   bool
	gaps     bool // the store may write a deletion for each expiry, which takes a revision
	gap      int  // how many revisions it has taken
}

type modelEntry struct {
	value                       string
	revision                    uint64
	created, modified, deadline time.Time // no deadline: zero
}

type modelLease struct {
	deadline time.Time
	released bool
}

type modelEvent struct {
	op       state.Operation
	revision uint64
	value    string
	least    bool // the revision is at least that
}

func newModel() *model {
	return &model{entries: map[string]*modelEntry{}, locks: map[string]*modelLease{}, told: map[string][]modelEvent{}}
}

func deadline(now time.Time, ttl time.Duration) time.Time {
	if ttl == 0 {
		return time.Time{}
	}
	return now.Add(ttl)
}

// advance lets time pass: what has reached its deadline is gone.
func (m *model) advance(now time.Time) {
	m.now = now
	for key, e := range m.entries {
		if !e.deadline.IsZero() && !e.deadline.After(now) {
			delete(m.entries, key)
			m.expired++
			m.tell(key, modelEvent{op: state.OpDelete, revision: e.revision})
		}
	}
}

func (m *model) tell(key string, ev modelEvent) { m.told[key] = append(m.told[key], ev) }

func (m *model) get(key string) (*modelEntry, error) {
	switch {
	case m.closed:
		return nil, state.ErrClosed
	case !validKey(key):
		return nil, state.ErrInvalidKey
	case m.entries[key] == nil:
		return nil, state.ErrNotFound
	}
	return m.entries[key], nil
}

func (m *model) put(key, value string, ttl time.Duration) error {
	switch {
	case m.closed:
		return state.ErrClosed
	case !validKey(key):
		return state.ErrInvalidKey
	case ttl < 0:
		return state.ErrInvalidTTL
	}
	m.revision++
	e := &modelEntry{value, m.revision, m.now, m.now, deadline(m.now, ttl)}
	if old := m.entries[key]; old != nil {
		e.created = old.created
	}
	m.entries[key] = e
	m.tell(key, modelEvent{op: state.OpPut, revision: e.revision, value: value})
	return nil
}

// adopt gives the entry that was put last the revision that the store gave it. It
// reports whether it could.
func (m *model) adopt(key string, revision uint64) bool {
	if m.gaps {
		m.gap += int(revision) - int(m.revision)
	}
	if revision < m.revision || revision > m.revision && (!m.gaps || m.gap > m.expired) {
		return false
	}
	told := m.told[key]
	m.revision, m.entries[key].revision, told[len(told)-1].revision = revision, revision, revision
	return true
}

func (m *model) update(key, value string, ttl time.Duration, revision uint64) (uint64, error) {
	if !m.closed && validKey(key) && ttl >= 0 {
		var current uint64
		if e := m.entries[key]; e != nil {
			current = e.revision
		}
		if current != revision {
			return 0, state.ErrConflict
		}
	}
	if err := m.put(key, value, ttl); err != nil {
		return 0, err
	}
	return m.revision, nil
}

func (m *model) delete(key string) error {
	_, err := m.get(key)
	switch err {
	case nil:
		m.revision++
		delete(m.entries, key)
		m.tell(key, modelEvent{op: state.OpDelete, revision: m.revision, least: m.gaps})
	case state.ErrNotFound:
		err = nil
	}
	return err
}

func (m *model) deleteRevision(key string, revision uint64) error {
	e, err := m.get(key)
	switch {
	case err == state.ErrNotFound, err == nil && e.revision != revision:
		return state.ErrConflict
	case err != nil:
		return err
	}
	return m.delete(key)
}

func (m *model) holder(name string) (*modelLease, error) {
	switch l := m.locks[name]; {
	case m.closed:
		return nil, state.ErrClosed
	case !validKey(name):
		return nil, state.ErrInvalidKey
	case l != nil && !l.released && l.deadline.After(m.now):
		return l, nil
	}
	return nil, state.ErrNotFound
}

func (m *model) keys(pattern string) ([]string, error) {
	if m.closed {
		return nil, state.ErrClosed
	}
	if !validPattern(pattern) {
		return nil, state.ErrInvalidKey
	}
	keys := []string{}
	for key := range m.entries {
		if matches(pattern, key) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys, nil
}

func (m *model) lock(name string, ttl time.Duration) (*modelLease, error) {
	switch {
	case m.closed:
		return nil, state.ErrClosed
	case !validKey(name):
		return nil, state.ErrInvalidKey
	case ttl <= 0:
		return nil, state.ErrInvalidTTL
	}
	if l := m.locks[name]; l != nil && !l.released && l.deadline.After(m.now) {
		return nil, state.ErrLockHeld
	}
	m.locks[name] = &modelLease{deadline: m.now.Add(ttl)}
	return m.locks[name], nil
}

func (m *model) unlock(l *modelLease) error {
	if l.released || !l.deadline.After(m.now) {
		return state.ErrLockNotHeld
	}
	l.released = true
	return nil
}

func (m *model) refresh(l *modelLease, ttl time.Duration) error {
	switch {
	case l.released:
		return state.ErrLockNotHeld
	case !l.deadline.After(m.now):
		return state.ErrLockExpired
	case m.closed:
		return state.ErrClosed
	}
	l.deadline = m.now.Add(ttl)
	return nil
}

// What keys and patterns are, said once more and as simply as can be.

func validKey(key string) bool {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_/=."
	if len(key) < 1 || len(key) > 1024 {
		return false
	}
	for i := range len(key) {
		if !slices.Contains([]byte(letters), key[i]) || i > 0 && key[i-1:i+1] == ".." {
			return false
		}
	}
	return key[0] != '.' && key[len(key)-1] != '.'
}

// validPattern: some key matches it, and its star is the last byte.
func validPattern(pattern string) bool {
	if pattern == "" || pattern[len(pattern)-1] != '*' {
		return validKey(pattern)
	}
	prefix := pattern[:len(pattern)-1]
	return validKey(prefix) || validKey(prefix+"x")
}

func matches(pattern, key string) bool {
	if n := len(pattern) - 1; n >= 0 && pattern[n] == '*' {
		return len(key) >= n && key[:n] == pattern[:n]
	}
	return pattern == key
}
