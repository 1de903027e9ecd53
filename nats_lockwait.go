package state

import (
	"context"
	"crypto/rand"
	"errors"
	"math"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// standbyDelay is how much longer than the waiter that the server has chosen
	// the others wait: they hear its attempt first, and leave the lock to it.
	standbyDelay = 20 * time.Millisecond
	// standbySpread is the time over which they spread their attempts after that,
	// most of them towards its end.
	standbySpread = 100 * time.Millisecond
	// yieldFor is how long a waiter leaves a lock to somebody whose attempt it
	// has heard, before it looks what became of that.
	yieldFor = time.Second
	// releasePause is how soon a waiter looks again that has heard a release
	// which the leader has not stored yet. It looks again after ever longer pauses.
	releasePause = 2 * time.Millisecond
	// patience is how many times longer than the chosen waiter the others pause.
	patience = 10
	// missedReleaseCheck is how often a waiter looks that cannot hear of a release.
	missedReleaseCheck = 2 * time.Second
	// waiterGroup is the queue group of those who wait for a lock: what is
	// published to the lock's subject chooses one of them.
	waiterGroup = "waiters"
)

// A lockWaits is the waiters for locks in a store. They do not poll, and of
// those who wait for one lock only the first one asks.
type lockWaits struct {
	mu    sync.Mutex // guards the map, and the waiters of each queue
	queue map[string]*lockQueue
}

// A lockQueue is the waiters for one lock. The first of them owns what is not
// guarded by a mutex.
//
// All queues of a lock, one in each process, hear what is published to its
// subject, and the server chooses one of them to be the next with each message.
// After a release, or the end of a lease, that one asks at once. The others stand
// by: an attempt is heard by all, so that many attempts at once would cost the
// square of their number.
type lockQueue struct {
	waiters []chan struct{}      // each is closed when its turn comes
	held    bool                 // the first one has last found the lock held; guarded by the mutex of lockWaits
	subs    []*nats.Subscription // none where that is not allowed
	news    chan struct{}        // of one slot: something below is new

	mu     sync.Mutex // guards what follows
	heard  lockNews   // the last
	chosen string     // the operation with which the server chose this queue
}

// A lockNews is what was published to a lock's subject, on its way to the bucket,
// which may refuse it: so it is only ever a hint.
type lockNews struct {
	at       time.Time
	op       string    // the operation
	released bool      // it is a release
	until    time.Time // otherwise, the end of the lease
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

// released says that this process has released a lock, where that is not heard.
func (w *lockWaits) released(key string) {
	w.mu.Lock()
	q := w.queue[key]
	w.mu.Unlock()
	if q != nil {
		q.note(func() {
			q.chosen = rand.Text()
			q.heard = lockNews{at: time.Now(), op: q.chosen, released: true}
		})
	}
}

func (q *lockQueue) note(change func()) {
	q.mu.Lock()
	change()
	q.mu.Unlock()
	notify(q.news)
}

// hear notes what all waiters hear.
func (q *lockQueue) hear(msg *nats.Msg) {
	st := decodeState(msg.Header.Get(headerState))
	now := time.Now()
	q.note(func() {
		q.heard = lockNews{now, st.op, msg.Header.Get(headerOperation) != "", now.Add(st.ttl)}
	})
}

// choose notes what was sent to one of them only.
func (q *lockQueue) choose(msg *nats.Msg) {
	st := decodeState(msg.Header.Get(headerState))
	q.note(func() { q.chosen = st.op })
}

// claimedSince reports whether somebody else has tried to acquire the lock.
func (q *lockQueue) claimedSince(at time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.heard.at.After(at) && !q.heard.released
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
			holder, err = s.holder(newBudget(ctx), key)
			switch {
			case err == nil:
				err = ErrLockHeld
			case held && err == ErrNotFound && q.claimedSince(asked):
				holder, err = record{deleted: true}, ErrLockHeld
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
		case ctx.Err() != nil && held && !errors.Is(err, ErrOutcomeUnknown):
			return nil, ErrLockHeld
		default:
			s.waits.found(q, false)
			return nil, s.data.writeError("lock", key, err)
		}
		if err := s.sleep(ctx, q, holder, asked); err != nil {
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

// sleep waits until the lock may be free. holder is what was found of it, by a
// request at the time asked.
func (s *natsLocks) sleep(ctx context.Context, q *lockQueue, holder record, asked time.Time) error {
	answered := time.Now()
	found := foundLock{
		asked: asked, answered: answered,
		owner: holderOf(holder.op), until: answered.Add(time.Duration(holder.deadline - s.lockClock())),
		standby: standby(answered.Sub(asked)), yield: yieldFor + mathrand.N(yieldFor),
	}
	switch {
	case holder.deleted:
		found.until = answered.Add(yieldFor) // it was free, and somebody else was faster
	case holder.deadline == 0:
		found.until = answered.Add(time.Hour)
	}
	e, _ := s.data.current()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wake := q.wake(&found)
		if len(q.subs) == 0 || s.missesReleases {
			wake = earlier(wake, answered.Add(missedReleaseCheck))
		}
		timer.Reset(time.Until(wake))
		select {
		case <-q.news:
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

// A foundLock is what the first waiter found, and how it waits after that.
type foundLock struct {
	asked, answered time.Time
	owner           string    // who held the lock
	until           time.Time // and until when
	standby         time.Duration
	yield           time.Duration
}

// wake returns when to look again, by what was found and heard.
func (q *lockQueue) wake(found *foundLock) time.Time {
	q.mu.Lock()
	defer q.mu.Unlock()
	heard, chosen := &q.heard, q.chosen != "" && q.chosen == q.heard.op
	wake := found.until
	switch {
	case heard.released && heard.at.After(found.asked):
		wake = heard.at
	case heard.released && holderOf(heard.op) == found.owner:
		// The question has overtaken the release, which the leader still had to
		// store.
		pause := max(releasePause, found.answered.Sub(heard.at))
		if !chosen {
			pause *= patience
		}
		wake = earlier(wake, found.answered.Add(pause))
	case heard.released:
		// It was a release before what was found, or a refused one.
	case holderOf(heard.op) == found.owner:
		if heard.until.After(wake) {
			wake = heard.until // it was refreshed
		}
	case heard.at.After(found.answered):
		// Somebody else tries, and almost always succeeds. One looks whether it did.
		yield := found.yield
		if !chosen {
			yield *= patience
		}
		wake = earlier(heard.until, heard.at.Add(yield))
	}
	if !chosen {
		wake = wake.Add(found.standby)
	}
	return wake
}

// standby returns how long a waiter stands by that is not chosen, and whose
// request has taken a while. Nobody knows how many others stand by: as exponentially
// more of them choose a later moment, few have begun when the first is heard, and
// one alone does not wait for long.
func standby(trip time.Duration) time.Duration {
	const lambda = 8 // for up to e^8 waiters
	moment := math.Log1p(mathrand.Float64()*math.Expm1(lambda)) / lambda
	return standbyDelay + 2*trip + time.Duration(moment*float64(standbySpread+4*trip))
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
		q = &lockQueue{news: make(chan struct{}, 1)}
		if w.queue == nil {
			w.queue = make(map[string]*lockQueue)
		}
		w.queue[key] = q
		// It needs no consumer. A client that may not listen waits for the
		// lease's end.
		q.subscribe(s.data.nc, "$KV."+s.data.name+locksSuffix+"."+key)
	}
	if q.waiters = append(q.waiters, turn); len(q.waiters) == 1 {
		close(turn)
	}
	return q, turn
}

func (q *lockQueue) subscribe(nc *nats.Conn, subject string) {
	sub, err := nc.Subscribe(subject, q.hear)
	if err != nil {
		return
	}
	q.subs = append(q.subs, sub)
	if sub, err = nc.QueueSubscribe(subject, waiterGroup, q.choose); err == nil {
		q.subs = append(q.subs, sub)
	}
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
		for _, sub := range q.subs {
			_ = sub.Unsubscribe()
		}
	}
}
