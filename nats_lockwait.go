package state

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// lockJitter is the time over which those who wait for a lock in different
	// processes spread their attempts after a release. A waiter that hears
	// the attempt of another one leaves the lock to it.
	lockJitter = 10 * time.Millisecond
	// yieldFor is how long a waiter leaves a lock to somebody whose attempt it
	// has heard, before it looks what became of that.
	yieldFor = time.Second
	// missedReleaseCheck is how often a waiter looks that cannot hear of a release.
	missedReleaseCheck = 2 * time.Second
)

// A lockWaits is the waiters for locks in a store. They do not poll, and of
// those who wait for one lock only the first one asks.
type lockWaits struct {
	mu    sync.Mutex // guards the map, and the waiters of each queue
	queue map[string]*lockQueue
}

// A lockQueue is the waiters for one lock. The first of them owns what is not
// guarded by the mutex of lockWaits.
type lockQueue struct {
	waiters []chan struct{} // each is closed when its turn comes
	held    bool            // the first one has last found the lock held; guarded by the mutex of lockWaits
	sub     *nats.Subscription
	heard   chan struct{} // of one slot: something below is new

	mu       sync.Mutex // guards what follows
	released bool       // a release was heard, and no attempt since
	claimed  time.Time  // when somebody else's attempt was heard
	claims   int        // how many have been heard since the last release
	crowd    int        // and how many after the releases before, at least
	refresh  string     // who refreshed the lease
	until    time.Time  // and until when, by that
}

// found notes whether the first waiter has found the lock held.
func (w *lockWaits) found(q *lockQueue, held bool) {
	w.mu.Lock()
	q.held = held
	w.mu.Unlock()
}

// seesHeld reports whether the first waiter has last found the lock held.
func (w *lockWaits) seesHeld(q *lockQueue) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return q.held
}

// released says that this process has released a lock.
func (w *lockWaits) released(key string) {
	w.mu.Lock()
	q := w.queue[key]
	w.mu.Unlock()
	if q != nil {
		q.note(func() { q.released = true })
	}
}

func (q *lockQueue) note(change func()) {
	q.mu.Lock()
	change()
	q.mu.Unlock()
	notify(q.heard)
}

// hear notes what is published to the lock's subject, on its way to the bucket,
// which may refuse it: so it is only ever a hint.
func (q *lockQueue) hear(msg *nats.Msg) {
	if msg.Header.Get(headerOperation) != "" {
		q.note(func() {
			q.released = true
			q.crowd, q.claims = max(q.claims, q.crowd/2), 0
		})
		return
	}
	st := decodeState(msg.Header.Get(headerState))
	q.note(func() {
		q.released = false
		q.claims++
		q.claimed = time.Now()
		q.refresh, q.until = holderOf(st.op), time.Now().Add(st.ttl)
	})
}

// spread returns by how much the attempts after a release are spread in
// addition, so that fewer are made the more there were before.
func (q *lockQueue) spread() time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return min(time.Duration(q.crowd)*2*time.Millisecond, 200*time.Millisecond)
}

// await waits for a lock until ctx ends. Other errors than ErrLockHeld are
// returned at once.
func (s *natsLocks) await(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	q, turn := s.waits.enter(s, key)
	defer s.waits.leave(key, q, turn)
	select {
	case <-turn:
	case <-ctx.Done():
		if s.waits.seesHeld(q) {
			return nil, ErrLockHeld
		}
		return nil, opError("lock", key, ctx.Err())
	case <-s.data.life.Done():
		return nil, ErrClosed
	}
	// An attempt is heard by all who wait, a look by nobody. So it looks first,
	// unless the lock was last released from here.
	held, look := false, !s.releasedHere(key)
	for {
		asked := time.Now()
		var l *lease
		var holder record
		var err error
		if look {
			if holder, err = s.holder(newBudget(ctx), key); err == nil {
				err = ErrLockHeld
			}
		}
		if err != ErrLockHeld { // it is free, or the attempt says why not
			l, holder, err = s.lock(ctx, key, ttl)
		}
		switch {
		case err == nil:
			l.ctx = context.Background() // ctx bounds only the wait
			return l.handOver()
		case err == ErrLockHeld:
			held, look = true, true
			s.waits.found(q, true)
		case ctx.Err() != nil && held:
			return nil, ErrLockHeld
		default:
			s.waits.found(q, false)
			return nil, s.data.writeError("lock", key, err)
		}
		if err := s.sleep(ctx, q, holder, time.Since(asked)); err != nil {
			return nil, err
		}
	}
}

// releasedHere reports whether this process was the last to hold a lock, as far
// as it knows, and has released it.
func (s *natsLocks) releasedHere(key string) bool {
	b := s.opened()
	if b == nil {
		return false
	}
	last := b.known(key)
	return last.deleted && last.estimated
}

// sleep waits until the lock may be free.
func (s *natsLocks) sleep(ctx context.Context, q *lockQueue, holder record, trip time.Duration) error {
	owner := holderOf(holder.op)
	until := time.Now().Add(time.Duration(holder.deadline - s.lockClock()))
	switch {
	case holder.deleted:
		until = time.Now().Add(yieldFor) // it was free, and somebody else was faster
	case holder.deadline == 0:
		until = time.Now().Add(time.Hour)
	}
	e, _ := s.data.current()
	jitter := rand.N(lockJitter + 2*trip + q.spread())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for began := time.Now(); ; {
		q.mu.Lock()
		if q.refresh == owner && q.until.After(until) {
			until = q.until
		}
		wake := until.Add(jitter)
		switch {
		case q.released:
			wake = time.Now().Add(jitter)
			q.released = false
			until = time.Now()
		case q.claimed.After(began) && q.refresh != owner:
			// Somebody else tries. Look later whether it got the lock.
			wake = q.claimed.Add(yieldFor + rand.N(yieldFor))
		}
		q.mu.Unlock()
		if q.sub == nil || s.missesReleases {
			wake = earlier(wake, began.Add(missedReleaseCheck))
		}
		timer.Reset(time.Until(wake))
		select {
		case <-q.heard:
		case <-timer.C:
			return nil
		case <-e.over:
			return nil // what happens while the connection is down is not heard
		case <-ctx.Done():
			return ErrLockHeld
		case <-s.data.life.Done():
			return ErrClosed
		}
	}
}

func earlier(x, y time.Time) time.Time {
	if y.Before(x) {
		return y
	}
	return x
}

// lockClock returns the clock of the bucket of locks.
func (s *natsLocks) lockClock() timestamp {
	if b := s.opened(); b != nil {
		return b.clock.now()
	}
	return s.data.clock.now()
}

// enter joins the waiters for a lock. turn is closed when the caller is the
// first of them.
func (w *lockWaits) enter(s *natsLocks, key string) (q *lockQueue, turn chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	turn = make(chan struct{})
	q = w.queue[key]
	if q == nil {
		q = &lockQueue{heard: make(chan struct{}, 1)}
		if w.queue == nil {
			w.queue = make(map[string]*lockQueue)
		}
		w.queue[key] = q
		// It needs no consumer. A client that may not listen waits for the
		// lease's end.
		q.sub, _ = s.data.nc.Subscribe("$KV."+s.data.name+locksSuffix+"."+key, q.hear)
	}
	if q.waiters = append(q.waiters, turn); len(q.waiters) == 1 {
		close(turn)
	}
	return q, turn
}

// leave lets the next one ask.
func (w *lockWaits) leave(key string, q *lockQueue, turn chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, x := range q.waiters {
		if x == turn {
			q.waiters = append(q.waiters[:i:i], q.waiters[i+1:]...)
			if i == 0 && len(q.waiters) > 0 {
				close(q.waiters[0])
			}
			break
		}
	}
	if len(q.waiters) == 0 {
		delete(w.queue, key)
		if q.sub != nil {
			_ = q.sub.Unsubscribe()
		}
	}
}
