package state

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// memoLimit is how many keys a client remembers the last record of, at least.
const memoLimit = 32768

// A memo remembers what this client last knew of a key. It is never more than
// a guess: a write that is based on it is conditional on it.
type memo struct {
	limit int

	mu         sync.Mutex // guards what follows
	young, old map[string]record
}

// learn takes note of a key's record, without its value.
func (m *memo) learn(key string, r record) {
	r.value = nil
	m.mu.Lock()
	defer m.mu.Unlock()
	if known, ok := m.find(key); ok && known.revision > r.revision {
		return
	}
	if len(m.young) >= m.limit {
		m.old, m.young = m.young, nil
	}
	if m.young == nil {
		m.young = make(map[string]record)
	}
	m.young[key] = r
}

func (m *memo) find(key string) (record, bool) {
	if r, ok := m.young[key]; ok {
		return r, true
	}
	r, ok := m.old[key]
	return r, ok
}

// recall returns what is known of a key, nil if nothing is.
func (m *memo) recall(key string) *record {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.find(key); ok {
		return &r
	}
	return nil
}

func (m *memo) forget(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.young, key)
	delete(m.old, key)
}

// turns lets the writers of one key in line, first come first served, instead
// of having them collide at the server.
type turns struct {
	mu    sync.Mutex
	lines map[string][]chan struct{} // an entry for each key that is being written
}

// take waits until it is the caller's turn, who must give it back. It fails if
// that takes longer than an operation may.
func (t *turns) take(key string) error {
	t.mu.Lock()
	if t.lines == nil {
		t.lines = make(map[string][]chan struct{})
	}
	line, taken := t.lines[key]
	if !taken {
		t.lines[key] = nil
		t.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	t.lines[key] = append(line, mine)
	t.mu.Unlock()

	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-mine:
		return nil
	case <-timer.C:
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, ch := range t.lines[key] {
		if ch == mine {
			t.lines[key] = append(t.lines[key][:i:i], t.lines[key][i+1:]...)
			return fmt.Errorf("waited behind other writers of the key: %w", context.DeadlineExceeded)
		}
	}
	return nil // it became our turn just now
}

// give passes the turn on.
func (t *turns) give(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	line := t.lines[key]
	if len(line) == 0 {
		delete(t.lines, key)
		return
	}
	t.lines[key] = line[1:]
	close(line[0])
}
