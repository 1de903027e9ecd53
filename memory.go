package state

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// defaultMaxValue is the documented limit of a value, "1MB".
	defaultMaxValue = 1 << 20
	// headerRoom is how much of a message is kept free for headers. NATS counts
	// them in, so that by default a value can have this much less than 1 MiB.
	headerRoom = 1 << 10
)

// MemoryStore implements StateStore using in-memory storage. It is useful for
// testing and single-process scenarios.
//
// It keeps the same contract as [NATSStore], and has its default limit for
// values. Deadlines are exact and follow the monotonic clock: steps of the wall
// clock do not move them. It runs one goroutine for each watch and no other,
// and one timer if something expires; inside a testing/synctest bubble an
// hour's TTL passes at once, and nothing is left running after Close.
type MemoryStore struct {
	epoch  time.Time
	first  timestamp     // the epoch
	quit   chan struct{} // closed by Close
	active sync.WaitGroup

	mu       sync.RWMutex // guards what follows
	closed   bool
	revision uint64
	items    map[string]*item
	keys     keyIndex
	expiries expiryQueue
	timer    *time.Timer // fires at wake
	wake     timestamp
	watches  watchIndex

	// Locks have revisions of their own, as they are a name space of their own.
	lockRevision uint64
	locks        map[string]*memoryLock
	lapses       expiryQueue
	lockWaiters  map[string][]chan struct{}
}

var (
	_ StateStore     = (*MemoryStore)(nil)
	_ Updater        = (*MemoryStore)(nil)
	_ ContextWatcher = (*MemoryStore)(nil)
)

// An item is a key's current entry. Its value, if small, is replaced in place as
// long as no event shares it.
type item struct {
	expiring
	entry
	shared bool
	quiet  uint64 // so many watches had been added when none was for this key
}

// smallValue is up to which size, in bytes, values are copied under the mutex.
const smallValue = 512

// set replaces the value, by a copy that was made before or by one made here.
func (it *item) set(value, made []byte) {
	switch {
	case made != nil:
		it.value = made
	case !it.shared && len(value) <= cap(it.value) && cap(it.value) <= smallValue:
		it.value = append(it.value[:0], value...)
		return
	default:
		it.value = cloneBytes(value)
	}
	it.shared = false
}

// A memoryLock is a lock that is or was held.
type memoryLock struct {
	expiring
	token uint64
}

// NewMemoryStore returns an empty store. It costs nothing until it is used, but
// should be closed like any other.
func NewMemoryStore() *MemoryStore {
	epoch := time.Now()
	return &MemoryStore{
		epoch:       epoch,
		first:       timestamp(epoch.UnixNano()),
		quit:        make(chan struct{}),
		items:       make(map[string]*item),
		locks:       make(map[string]*memoryLock),
		lockWaiters: make(map[string][]chan struct{}),
	}
}

// now returns the time by the store's clock, which never goes back.
func (s *MemoryStore) now() timestamp {
	return s.first + timestamp(time.Since(s.epoch))
}

// get returns the entry of a key that exists, with a value of the caller's own.
func (s *MemoryStore) get(key string) (*KeyValue, error) {
	s.mu.RLock()
	it := s.items[key]
	if it == nil {
		closed := s.closed
		s.mu.RUnlock()
		if closed {
			return nil, ErrClosed
		}
		if err := ValidateKey(key); err != nil {
			return nil, err
		}
		return nil, ErrNotFound
	}
	e, deadline := it.entry, it.deadline
	small := len(e.value) <= smallValue
	if small {
		e.value = cloneBytes(e.value)
	}
	s.mu.RUnlock()
	if deadline != 0 && deadline.passed(s.now()) {
		return nil, ErrNotFound // the timer is about to tell
	}
	if !small {
		e.value = cloneBytes(e.value) // large ones are never changed
	}
	return e.event(key, deadline), nil
}

// Get implements [StateStore].
func (s *MemoryStore) Get(key string) ([]byte, error) {
	e, err := s.get(key)
	if err != nil {
		return nil, err
	}
	return e.Value, nil
}

// GetKeyValue implements [StateStore].
func (s *MemoryStore) GetKeyValue(key string) (*KeyValue, error) {
	return s.get(key)
}

// Put implements [StateStore].
func (s *MemoryStore) Put(key string, value []byte, ttl time.Duration) error {
	_, err := s.put(key, value, ttl, nil)
	return err
}

// Update implements [Updater].
func (s *MemoryStore) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	return s.put(key, value, ttl, &revision)
}

// put writes an entry, if expected is not nil only on top of that revision.
func (s *MemoryStore) put(key string, value []byte, ttl time.Duration, expected *uint64) (uint64, error) {
	const limit = defaultMaxValue - headerRoom
	var made []byte
	if len(value) > smallValue && len(value) <= limit {
		made = cloneBytes(value)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, ErrClosed
	}
	if err := validatePut(key, value, ttl, limit); err != nil {
		return 0, err
	}
	now := s.sweep()
	it := s.items[key]
	if expected != nil {
		var current uint64
		if it != nil {
			current = it.revision
		}
		if current != *expected {
			return 0, ErrConflict
		}
	}
	if it == nil {
		it = &item{expiring: expiring{key: key}, entry: entry{created: now}}
		s.items[key] = it
		s.keys.add(key)
	}
	s.revision++
	it.set(value, made)
	it.revision, it.modified = s.revision, now
	if deadline := now.deadline(ttl); deadline != it.deadline {
		s.expiries.set(&it.expiring, deadline)
		s.schedule(now)
	}
	if it.quiet != s.watches.added && !s.watches.publish(key, it.share) {
		it.quiet = s.watches.added
	}
	return s.revision, nil
}

// share returns the entry as an event.
func (it *item) share() *KeyValue {
	it.shared = true
	return it.event(it.key, it.deadline)
}

// Delete implements [StateStore].
func (s *MemoryStore) Delete(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if err := ValidateKey(key); err != nil {
		return err
	}
	now := s.sweep()
	it := s.items[key]
	if it == nil {
		return nil
	}
	s.revision++
	s.remove(it, s.revision, now)
	s.expiries.drop(&it.expiring)
	s.schedule(now)
	return nil
}

// remove makes a key disappear, and tells. The caller holds mu.
func (s *MemoryStore) remove(it *item, revision uint64, at timestamp) {
	delete(s.items, it.key)
	s.keys.remove(it.key)
	s.watches.publish(it.key, func() *KeyValue { return deletion(it.key, revision, at) })
}

// sweep removes what has expired, so that what follows finds the store as its
// clock says it is. The caller holds mu.
func (s *MemoryStore) sweep() (now timestamp) {
	now = s.now()
	for t := s.expiries.due(now); t != nil; t = s.expiries.due(now) {
		it := s.items[t.key]
		s.remove(it, it.revision, it.deadline)
	}
	return now
}

// schedule has the timer fire for the next expiry. The caller holds mu.
func (s *MemoryStore) schedule(now timestamp) {
	next := s.expiries.next()
	if next == s.wake {
		return
	}
	s.wake = next
	switch {
	case next == 0:
		s.timer.Stop()
	case s.timer == nil:
		s.timer = time.AfterFunc(time.Duration(next-now), s.expire)
	default:
		s.timer.Reset(time.Duration(next - now))
	}
}

// expire is what the timer calls, when it was set and sometimes when it was set
// before that.
func (s *MemoryStore) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	now := s.sweep()
	s.wake = 0 // it has fired
	s.schedule(now)
}

// Keys implements [StateStore].
func (s *MemoryStore) Keys(pattern string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	p, err := parsePattern(pattern)
	if err != nil {
		return nil, err
	}
	s.sweep()
	if !p.wild {
		if s.items[pattern] == nil {
			return []string{}, nil
		}
		return []string{pattern}, nil
	}
	return s.keys.withPrefix(p.prefix, s.items), nil
}

// Watch implements [StateStore]. It ends with the store and for no other
// reason.
func (s *MemoryStore) Watch(pattern string) (<-chan *KeyValue, error) {
	return s.WatchContext(context.Background(), pattern)
}

// WatchContext implements [ContextWatcher].
func (s *MemoryStore) WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	p, err := parsePattern(pattern)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.sweep() // what expired before is not told
	box := newSubscription()
	reader := make(chan *KeyValue)
	s.watches.add(p, box)
	s.active.Go(func() {
		box.deliver(reader, ctx.Done(), s.quit)
		s.mu.Lock()
		s.watches.remove(p, box)
		s.mu.Unlock()
	})
	return reader, nil
}

// Lock implements [StateStore]. The lock is a [Fenced].
func (s *MemoryStore) Lock(key string, ttl time.Duration) (Lock, error) {
	l, err := s.grant(key, ttl)
	if err != nil {
		return nil, err
	}
	return l.handOver()
}

func (s *MemoryStore) grant(key string, ttl time.Duration) (*lease, error) {
	asked := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if err := validateLock(key, ttl); err != nil {
		return nil, err
	}
	now := s.now()
	for t := s.lapses.due(now); t != nil; t = s.lapses.due(now) {
		delete(s.locks, t.key)
	}
	if s.locks[key] != nil {
		return nil, ErrLockHeld
	}
	s.lockRevision++
	held := &memoryLock{expiring: expiring{key: key}, token: s.lockRevision}
	s.locks[key] = held
	s.lapses.set(&held.expiring, now.deadline(ttl))
	return newLease(s, key, ttl, asked, held.token), nil
}

// heldBy returns the lock that the lease is for, unless it has lapsed. The
// caller holds mu.
func (s *MemoryStore) heldBy(l *lease, now timestamp) *memoryLock {
	held := s.locks[l.key]
	if held == nil || held.token != l.token || held.deadline.passed(now) {
		return nil
	}
	return held
}

func (s *MemoryStore) extend(l *lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	held := s.heldBy(l, now)
	if held == nil {
		return ErrLockExpired
	}
	if s.closed {
		return ErrClosed
	}
	s.lapses.set(&held.expiring, now.deadline(l.ttl))
	return nil
}

func (s *MemoryStore) release(l *lease) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	held := s.heldBy(l, s.now())
	if held == nil {
		return ErrLockNotHeld
	}
	s.lapses.drop(&held.expiring)
	delete(s.locks, l.key)
	for _, ch := range s.lockWaiters[l.key] {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
	return nil
}

func (s *MemoryStore) onRelease(key string) (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	s.mu.Lock()
	s.lockWaiters[key] = append(s.lockWaiters[key], ch)
	s.mu.Unlock()
	return ch, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		rest := slices.DeleteFunc(s.lockWaiters[key], func(c chan struct{}) bool { return c == ch })
		if s.lockWaiters[key] = rest; len(rest) == 0 {
			delete(s.lockWaiters, key)
		}
	}
}

// Close implements [StateStore]. The entries are gone with it.
func (s *MemoryStore) Close() error {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.quit)
		if s.timer != nil {
			s.timer.Stop()
		}
		s.items, s.keys, s.expiries = nil, keyIndex{}, nil
	}
	s.mu.Unlock()
	s.active.Wait()
	return nil
}
