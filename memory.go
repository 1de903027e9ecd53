package state

import (
	"context"
	"slices"
	"sync"
	"time"
)

// MemoryStore implements [Store] using in-memory storage. It is useful for
// testing and single-process scenarios.
//
// It keeps the same contract as [NATSStore], and has its default limit for
// values. Deadlines are exact and follow the monotonic clock: steps of the wall
// clock do not move them. It runs one goroutine for each watch and no other,
// and one timer if something expires; inside a testing/synctest bubble an
// hour's TTL passes at once, and nothing is left running after Close.
type MemoryStore struct {
	client *memoryClient   // nil in a zero MemoryStore
	ctx    context.Context // what the store is bound to, see WithContext
}

// A memoryClient is what can be closed by itself.
type memoryClient struct {
	data   *memoryData
	quit   chan struct{} // closed when the client is
	active sync.WaitGroup

	// data.mu guards what follows.
	closed  bool
	follows map[*subscription]pattern // of what is being followed
}

// A memoryData is what the clients of a store share.
type memoryData struct {
	epoch time.Time
	first timestamp     // the epoch
	root  *memoryClient // of the store that NewMemoryStore returned

	mu       sync.RWMutex // guards what follows
	clients  map[*memoryClient]struct{}
	revision uint64
	items    map[string]*item // nil once root is closed
	keys     keyIndex
	expiries expiryQueue
	timer    *time.Timer // fires at wake
	wake     timestamp
	watches  watchIndex

	// Locks have revisions of their own, as they are a name space of their own.
	lockRevision uint64
	locks        map[string]*memoryLock
	lapses       expiryQueue
	waiters      map[string][]chan struct{} // of one slot: those that wait for a lock
}

var _ Store = (*MemoryStore)(nil)

// An item is a key's current entry. Its value, if small, is replaced in place as
// long as nothing else shares it.
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

// share returns the entry as an event.
func (it *item) share() *KeyValue {
	it.shared = true
	return it.event(it.key, it.deadline)
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
	d := &memoryData{
		epoch:   epoch,
		first:   timestamp(epoch.UnixNano()),
		clients: make(map[*memoryClient]struct{}),
		items:   make(map[string]*item),
		locks:   make(map[string]*memoryLock),
		waiters: make(map[string][]chan struct{}),
	}
	d.root = d.newClientLocked()
	return &MemoryStore{d.root, context.Background()}
}

// newClientLocked returns another client. While nobody else knows d, mu need not be
// held.
func (d *memoryData) newClientLocked() *memoryClient {
	c := &memoryClient{data: d, quit: make(chan struct{})}
	d.clients[c] = struct{}{}
	return c
}

// Client returns another client of the same data, which can be closed by itself:
// its calls and watches end then, and its locks can still be unlocked, or lapse.
// In a test it stands for what another agent opened. It is not bound to a
// context. Closing the store that NewMemoryStore returned closes all clients; a
// client of a closed store is closed.
func (s *MemoryStore) Client() *MemoryStore {
	if s == nil || s.client == nil {
		return new(MemoryStore)
	}
	d := s.client.data
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.newClientLocked()
	if d.root.closed || s.client.closed {
		d.closeLocked(c)
		delete(d.clients, c)
	}
	return &MemoryStore{c, context.Background()}
}

// WithContext implements [Store]. The result is a *MemoryStore.
func (s *MemoryStore) WithContext(ctx context.Context) Store { return s.bind(ctx) }

func (s *MemoryStore) bind(ctx context.Context) *MemoryStore {
	if s == nil {
		return new(MemoryStore)
	}
	if ctx == nil {
		ctx = context.Background()
	}
	return &MemoryStore{s.client, ctx}
}

// lock locks the data for a call, unless the call has to fail at once. The caller
// unlocks it.
func (s *MemoryStore) lock(op, key string) (*memoryData, error) {
	if s == nil || s.client == nil {
		return nil, errUnopened
	}
	ended := s.ctx.Err() // before the mutex is held, as it is not our code
	d := s.client.data
	d.mu.Lock()
	if err := s.admitLocked(op, key, ended); err != nil {
		d.mu.Unlock()
		return nil, err
	}
	return d, nil
}

// admitLocked returns why a call has to fail at once, if it has to; ended is the error
// of its context.
func (s *MemoryStore) admitLocked(op, key string, ended error) error {
	if s.client.closed {
		return ErrClosed
	}
	if ended != nil {
		return opError(op, key, ended)
	}
	return nil
}

// now returns the time by the store's clock, which never goes back.
func (d *memoryData) now() timestamp {
	return d.first + timestamp(time.Since(d.epoch))
}

// Get implements [StateStore].
func (s *MemoryStore) Get(key string) ([]byte, error) {
	e, _, err := s.read(key)
	return e.value, err
}

// GetKeyValue implements [StateStore].
func (s *MemoryStore) GetKeyValue(key string) (*KeyValue, error) {
	e, deadline, err := s.read(key)
	if err != nil {
		return nil, err
	}
	return e.event(key, deadline), nil
}

// read returns the entry of a key that exists, with a value of the caller's own,
// and its deadline.
func (s *MemoryStore) read(key string) (entry, timestamp, error) {
	if s == nil || s.client == nil {
		return entry{}, 0, errUnopened
	}
	ended := s.ctx.Err()
	d := s.client.data
	d.mu.RLock()
	if s.client.closed {
		d.mu.RUnlock()
		return entry{}, 0, ErrClosed
	}
	it := d.items[key]
	// The clock is read while the lock is held. Read later it could be past a
	// deadline that a Put has moved meanwhile.
	if ended != nil || it == nil || it.deadline != 0 && it.deadline.passed(d.now()) {
		d.mu.RUnlock()
		if ended != nil {
			return entry{}, 0, opError("get", key, ended)
		}
		if err := ValidateKey(key); err != nil {
			return entry{}, 0, err
		}
		return entry{}, 0, ErrNotFound
	}
	e, deadline := it.entry, it.deadline
	small := len(e.value) <= smallValue
	if small {
		e.value = cloneBytes(e.value)
	}
	d.mu.RUnlock()
	if !small {
		e.value = cloneBytes(e.value) // large ones are never changed
	}
	return e, deadline, nil
}

// Put implements [StateStore].
func (s *MemoryStore) Put(key string, value []byte, ttl time.Duration) error {
	_, err := s.put("put", key, value, ttl, nil)
	return err
}

// Update implements [Store]. It never writes over a value that has expired.
func (s *MemoryStore) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	return s.put("update", key, value, ttl, &revision)
}

// put writes an entry, if expected is not nil only on top of that revision.
func (s *MemoryStore) put(op, key string, value []byte, ttl time.Duration, expected *uint64) (uint64, error) {
	const limit = defaultMaxValue - headerRoom
	var made []byte
	if len(value) > smallValue && len(value) <= limit {
		made = cloneBytes(value)
	}
	d, err := s.lock(op, key)
	if err != nil {
		return 0, err
	}
	defer d.mu.Unlock()
	if err := validatePut(key, value, ttl, limit); err != nil {
		return 0, err
	}
	now := d.sweepLocked()
	it := d.items[key]
	if expected != nil && it.current() != *expected {
		return 0, ErrConflict
	}
	if it == nil {
		it = &item{expiring: expiring{key: key}, entry: entry{created: now}}
		d.items[key] = it
		d.keys.add(key)
	}
	d.revision++
	it.set(value, made)
	it.revision, it.modified = d.revision, now
	if deadline := now.deadline(ttl); deadline != it.deadline {
		d.expiries.set(&it.expiring, deadline)
		d.scheduleLocked(now)
	}
	if it.quiet != d.watches.added && !d.watches.publish(key, it.share) {
		it.quiet = d.watches.added
	}
	return d.revision, nil
}

// current returns the revision of a key's item; 0 if there is none.
func (it *item) current() uint64 {
	if it == nil {
		return 0
	}
	return it.revision
}

// Delete implements [StateStore].
func (s *MemoryStore) Delete(key string) error {
	return s.delete("delete", key, nil)
}

// DeleteRevision implements [Store].
func (s *MemoryStore) DeleteRevision(key string, revision uint64) error {
	return s.delete("delete revision", key, &revision)
}

// delete removes a key, if expected is not nil only that revision of it.
func (s *MemoryStore) delete(op, key string, expected *uint64) error {
	d, err := s.lock(op, key)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if err := ValidateKey(key); err != nil {
		return err
	}
	now := d.sweepLocked()
	it := d.items[key]
	if expected != nil && (it == nil || it.revision != *expected) {
		return ErrConflict
	}
	if it == nil {
		return nil
	}
	d.revision++
	d.removeLocked(it, d.revision, now)
	d.expiries.drop(&it.expiring)
	d.scheduleLocked(now)
	return nil
}

// removeLocked makes a key disappear, and publishes that.
func (d *memoryData) removeLocked(it *item, revision uint64, at timestamp) {
	delete(d.items, it.key)
	d.keys.remove(it.key)
	d.watches.publish(it.key, func() *KeyValue { return deletion(it.key, revision, at) })
}

// sweepLocked removes what has expired, so that what follows finds the store as its
// clock says it is.
func (d *memoryData) sweepLocked() (now timestamp) {
	now = d.now()
	for t := d.expiries.due(now); t != nil; t = d.expiries.due(now) {
		it := d.items[t.key]
		d.removeLocked(it, it.revision, it.deadline)
	}
	return now
}

// scheduleLocked has the timer fire for the next expiry.
func (d *memoryData) scheduleLocked(now timestamp) {
	next := d.expiries.next()
	if next == d.wake {
		return
	}
	d.wake = next
	switch {
	case next == 0:
		d.timer.Stop()
	case d.timer == nil:
		d.timer = time.AfterFunc(time.Duration(next-now), d.expire)
	default:
		d.timer.Reset(time.Duration(next - now))
	}
}

// expire is the timer's callback. It may also run for an earlier time than the
// one that the timer was last set to.
func (d *memoryData) expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.root.closed {
		return
	}
	now := d.sweepLocked()
	d.wake = 0 // it has fired
	d.scheduleLocked(now)
}

// lockIndexed locks the data for a call that needs the index of keys, and has the
// index built if there is none. The caller unlocks it.
func (s *MemoryStore) lockIndexed(op, pattern string) (*memoryData, error) {
	for {
		d, err := s.lock(op, pattern)
		if err != nil {
			return nil, err
		}
		if building := d.keys.building; building != nil {
			d.mu.Unlock()
			select {
			case <-building:
			case <-s.ctx.Done():
			case <-s.client.quit:
			}
			continue
		}
		if !d.keys.made {
			err = d.keys.build(d.items, func(work func()) error {
				d.mu.Unlock()
				if work != nil {
					work()
				}
				ended := s.ctx.Err()
				d.mu.Lock()
				return s.admitLocked(op, pattern, ended)
			})
		}
		if err != nil {
			d.mu.Unlock()
			return nil, err
		}
		d.keys.ask(len(d.items))
		d.sweepLocked()
		return d, nil
	}
}

// Keys implements [StateStore]. Each page of the answer is a consistent
// snapshot; writers can run between two pages.
func (s *MemoryStore) Keys(pattern string) ([]string, error) {
	p, err := s.parse("keys", pattern)
	if err != nil {
		return nil, err
	}
	found := []string{}
	if !p.wild {
		d, err := s.lock("keys", pattern)
		if err != nil {
			return nil, err
		}
		defer d.mu.Unlock()
		if d.sweepLocked(); d.items[pattern] != nil {
			found = append(found, pattern)
		}
		return found, nil
	}
	for first, more := "", true; more; {
		d, err := s.lockIndexed("keys", pattern)
		if err != nil {
			return nil, err
		}
		more = false
		page := len(found) + indexStep
		for key := range d.keys.from(p.prefix, first) {
			if more = len(found) == page; more {
				break
			}
			found = append(found, key)
		}
		d.mu.Unlock()
		if more {
			first = found[len(found)-1] + "\x00" // the next possible key
			found = slices.Grow(found, indexStep)
		}
	}
	return found, nil
}

// parse parses a pattern for a call, unless the call has to fail anyhow.
func (s *MemoryStore) parse(op, text string) (pattern, error) {
	d, err := s.lock(op, text)
	if err != nil {
		return pattern{}, err
	}
	d.mu.Unlock()
	return parsePattern(text)
}

// Entries implements [Store]. It is a snapshot: all entries are as they were at
// one point in time. Values are copied after that, when writers go on.
func (s *MemoryStore) Entries(pattern string) ([]*KeyValue, error) {
	p, err := s.parse("entries", pattern)
	if err != nil {
		return nil, err
	}
	d, err := s.lockFor("entries", p)
	if err != nil {
		return nil, err
	}
	all := d.collectLocked(p)
	d.mu.Unlock()
	return copies(all), nil
}

// lockFor locks the data for a call that needs all entries of a pattern. The
// caller unlocks it.
func (s *MemoryStore) lockFor(op string, p pattern) (*memoryData, error) {
	if p.wild {
		return s.lockIndexed(op, p.prefix+"*")
	}
	d, err := s.lock(op, p.prefix)
	if err == nil {
		d.sweepLocked()
	}
	return d, err
}

// A collected is an item as it was when it was collected. It shares the value.
type collected struct {
	entry
	key      string
	deadline timestamp
}

// collectLocked returns what matches a pattern, sorted by key.
func (d *memoryData) collectLocked(p pattern) []collected {
	var all []collected
	add := func(key string) {
		it := d.items[key]
		it.shared = true
		all = append(all, collected{it.entry, key, it.deadline})
	}
	if !p.wild {
		if d.items[p.prefix] != nil {
			add(p.prefix)
		}
		return all
	}
	all = make([]collected, 0, d.keys.count(p.prefix))
	for key := range d.keys.from(p.prefix, "") {
		add(key)
	}
	return all
}

// copies returns the entries that were collected, with values of their own.
func copies(all []collected) []*KeyValue {
	entries := make([]*KeyValue, len(all))
	for i := range all {
		e := &all[i]
		entries[i] = e.event(e.key, e.deadline)
		entries[i].Value = cloneBytes(e.value)
	}
	return entries
}

// Watch implements [StateStore]. It ends with the store and with the context that
// the store is bound to, and for no other reason.
func (s *MemoryStore) Watch(pattern string) (<-chan *KeyValue, error) {
	p, err := s.parse("watch", pattern)
	if err != nil {
		return nil, err
	}
	d, err := s.lock("watch", pattern)
	if err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	d.sweepLocked() // what expired before is not reported
	sub := newSubscription()
	reader := make(chan *KeyValue)
	d.watches.add(p, sub)
	s.client.active.Go(func() {
		defer close(reader)
		sub.deliver(reader, s.ctx.Done(), s.client.quit)
		d.mu.Lock()
		d.watches.remove(p, sub)
		d.mu.Unlock()
	})
	return reader, nil
}

func (s *MemoryStore) self() StateStore { return s }

// follow implements [follower].
func (s *MemoryStore) follow(ctx context.Context, p pattern) (*source, error) {
	d, err := s.bind(ctx).lockFor("follow", p)
	if err != nil {
		return nil, err
	}
	all := d.collectLocked(p)
	c, sub := s.client, newSubscription()
	d.watches.add(p, sub)
	if c.follows == nil {
		c.follows = make(map[*subscription]pattern)
	}
	c.follows[sub] = p
	d.mu.Unlock()
	return &source{
		current: copies(all),
		sub:     sub,
		ask: func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.sweepLocked() // what has expired by now is part of the progress
			sub.advance(progress{revision: d.revision, asOf: time.Now()})
		},
		stop: func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.endFollowLocked(c, sub)
		},
	}, nil
}

// endFollowLocked ends a subscription of a client's follow, once.
func (d *memoryData) endFollowLocked(c *memoryClient, sub *subscription) {
	if p, ok := c.follows[sub]; ok {
		delete(c.follows, sub)
		d.watches.remove(p, sub)
		sub.end()
	}
}

// Lock implements [StateStore]. The lock is a [Fenced].
func (s *MemoryStore) Lock(key string, ttl time.Duration) (Lock, error) {
	l, _, err := s.grant(key, ttl, nil)
	if err != nil {
		return nil, err
	}
	return l.handOver(s.ctx)
}

// grant acquires a lock that is free. If it is held, grant returns ErrLockHeld
// and the deadline of the lease, and queues wake, if it is not nil, to be filled
// when it is worth asking again. The same, without a deadline, if it is the turn of
// others in the queue.
func (s *MemoryStore) grant(key string, ttl time.Duration, wake chan struct{}) (*lease, timestamp, error) {
	asked := time.Now()
	d, err := s.lock("lock", key)
	if err != nil {
		return nil, 0, err
	}
	defer d.mu.Unlock()
	if err := validateLock(key, ttl); err != nil {
		return nil, 0, err
	}
	now := d.now()
	for t := d.lapses.due(now); t != nil; t = d.lapses.due(now) {
		delete(d.locks, t.key)
	}
	if held := d.locks[key]; held != nil {
		d.addWaiterLocked(key, wake)
		return nil, held.deadline, ErrLockHeld
	}
	if waiting := d.waiters[key]; wake != nil && len(waiting) > 0 && waiting[0] != wake {
		// Otherwise a client that released the lock and waits for it again would
		// always get it first.
		d.addWaiterLocked(key, wake)
		d.wakeFirstLocked(key)
		return nil, 0, ErrLockHeld
	}
	d.lockRevision++
	held := &memoryLock{expiring: expiring{key: key}, token: d.lockRevision}
	d.locks[key] = held
	d.lapses.set(&held.expiring, now.deadline(ttl))
	d.dropWaiterLocked(key, wake)
	d.wakeFirstLocked(key) // it waits for another lease's end
	return newLease(s.ctx, s, key, ttl, asked, held.token), 0, nil
}

// awaitLock implements [lockWaiter]. A release and each new lease wake the first
// waiter, so that it always knows when the current lease ends.
func (s *MemoryStore) awaitLock(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	if err := ctx.Err(); err != nil {
		return nil, opError("lock", key, err)
	}
	s = s.bind(context.Background())
	wake := make(chan struct{}, 1)
	for {
		l, deadline, err := s.grant(key, ttl, wake)
		if err == nil {
			return l.handOver(ctx)
		}
		if err == ErrLockHeld {
			var lapse <-chan time.Time
			if deadline != 0 {
				lapse = time.After(time.Duration(deadline - s.client.data.now()))
			}
			select {
			case <-wake:
			case <-lapse:
			case <-ctx.Done():
			case <-s.client.quit:
				err = ErrClosed
			}
			if end, bounded := ctx.Deadline(); bounded && !time.Now().Before(end) {
				<-ctx.Done() // its timer may be a little behind
			}
			if err == ErrLockHeld && ctx.Err() == nil {
				continue
			}
		}
		if s.client != nil && !s.client.data.leave(key, wake) && err == ErrLockHeld {
			err = opError("lock", key, ctx.Err())
		}
		return nil, err
	}
}

// leave ends the wait of a waiter, who may have been woken. The next one takes
// its place. leave reports whether somebody holds the lock.
func (d *memoryData) leave(key string, wake chan struct{}) (held bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dropWaiterLocked(key, wake)
	d.wakeFirstLocked(key)
	l := d.locks[key]
	return l != nil && !l.deadline.passed(d.now())
}

// wakeFirstLocked wakes the first waiter, if there is one. It stays in the queue until
// it has got the lock or gives up.
func (d *memoryData) wakeFirstLocked(key string) {
	if waiting := d.waiters[key]; len(waiting) > 0 {
		notify(waiting[0])
	}
}

// addWaiterLocked puts a waiter into the queue, unless it is nil or there
// already.
func (d *memoryData) addWaiterLocked(key string, wake chan struct{}) {
	if wake != nil && !slices.Contains(d.waiters[key], wake) {
		d.waiters[key] = append(d.waiters[key], wake)
	}
}

// dropWaiterLocked takes a waiter out of the queue, if it is there.
func (d *memoryData) dropWaiterLocked(key string, wake chan struct{}) {
	rest := slices.DeleteFunc(d.waiters[key], func(c chan struct{}) bool { return c == wake })
	if len(rest) > 0 {
		d.waiters[key] = rest
	} else {
		delete(d.waiters, key)
	}
}

// heldByLocked returns the lock that the lease is for, unless it has lapsed.
func (d *memoryData) heldByLocked(l *lease) *memoryLock {
	held := d.locks[l.key]
	if held == nil || held.token != l.token || held.deadline.passed(d.now()) {
		return nil
	}
	return held
}

// extend implements [lessor].
func (s *MemoryStore) extend(ctx context.Context, l *lease) error {
	ended := ctx.Err()
	d := s.client.data
	d.mu.Lock()
	defer d.mu.Unlock()
	held := d.heldByLocked(l)
	if held == nil {
		return ErrLockExpired
	}
	if err := s.admitLocked("refresh", l.key, ended); err != nil {
		return err
	}
	d.lapses.set(&held.expiring, d.now().deadline(l.ttl))
	return nil
}

// release implements [lessor]. It works whatever has ended.
func (s *MemoryStore) release(_ context.Context, l *lease) error {
	d := s.client.data
	d.mu.Lock()
	defer d.mu.Unlock()
	held := d.heldByLocked(l)
	if held == nil {
		return ErrLockNotHeld
	}
	d.lapses.drop(&held.expiring)
	delete(d.locks, l.key)
	d.wakeFirstLocked(l.key)
	return nil
}

// LockHolder implements [Store]. All locks have this process for an owner.
func (s *MemoryStore) LockHolder(key string) (*LockInfo, error) {
	d, err := s.lock("lock holder", key)
	if err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	if err := ValidateKey(key); err != nil {
		return nil, err
	}
	held := d.locks[key]
	if held == nil || held.deadline.passed(d.now()) {
		return nil, ErrNotFound
	}
	return &LockInfo{Key: key, Owner: processName(), Token: held.token, Expires: held.deadline.time()}, nil
}

// Close implements [StateStore]. If it is the store that NewMemoryStore returned,
// the entries are gone with it.
func (s *MemoryStore) Close() error {
	if s == nil || s.client == nil {
		return errUnopened
	}
	d := s.client.data
	ending := []*memoryClient{s.client}
	d.mu.Lock()
	if s.client == d.root {
		for c := range d.clients {
			d.closeLocked(c)
			ending = append(ending, c)
		}
		if d.timer != nil {
			d.timer.Stop()
		}
		d.items, d.keys, d.expiries = nil, keyIndex{}, nil
	} else {
		d.closeLocked(s.client)
	}
	d.mu.Unlock()
	for _, c := range ending {
		c.active.Wait()
	}
	d.mu.Lock()
	delete(d.clients, s.client)
	d.mu.Unlock()
	return nil
}

// closeLocked closes a client, once. The caller waits for active after that.
func (d *memoryData) closeLocked(c *memoryClient) {
	if c.closed {
		return
	}
	c.closed = true
	close(c.quit)
	for sub := range c.follows {
		d.endFollowLocked(c, sub)
	}
}
