package state

import (
	"context"
	"crypto/rand"
	"errors"
	"math"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// standbyDelay is how long the other waiters give the one that the server has
	// chosen. Once they hear its attempt, they do not try themselves. Where nobody
	// was chosen, the delay is shortDelay.
	standbyDelay = 500 * time.Millisecond
	shortDelay   = 20 * time.Millisecond
	// standbySpread is the time over which they spread their attempts after that,
	// most of them towards its end.
	standbySpread = 100 * time.Millisecond
	// maxTrip is the longest trip to the server that counts: what takes longer was
	// kept waiting for another reason.
	maxTrip = 500 * time.Millisecond
	// yieldFor is how long a waiter leaves a lock to somebody whose attempt it
	// has heard, before it checks whether the attempt succeeded.
	yieldFor = time.Second
	// maxYields is how often in a row a store that had to wait for a lock lets
	// others go first when it waits again.
	maxYields = 16
	// releasePause is how soon a waiter checks again that has heard a release
	// which the leader has not stored yet. The pauses grow.
	releasePause = 2 * time.Millisecond
	// unchosenFactor is how many times longer than the chosen waiter the others
	// pause.
	unchosenFactor = 10
	// missedReleaseCheck is how often a waiter that cannot hear releases checks.
	missedReleaseCheck = 2 * time.Second
	// settleTime is about how long a subscription takes to reach all servers of a cluster.
	// A waiter looks again then.
	settleTime = time.Second
	// waiterGroup is the queue group of those who wait for a lock: what is
	// published to the lock's subject chooses one of them.
	waiterGroup = "waiters"
)

// lockWaits are the waiters for locks in a store. They poll only where they may miss
// releases, and of those who wait for the same lock only the first one asks.
type lockWaits struct {
	mu    sync.Mutex // guards the map, and waiters and held of each queue
	queue map[string]*lockQueue
}

// A lockQueue is the waiters for one lock. The first of them owns what is not
// guarded by a mutex.
//
// All queues of a lock, one in each store, hear what is published to its subject.
// With each message the server chooses one of them. When the lock is released, or
// its lease ends, the one that was chosen last asks at once. The others stand by:
// all of them hear an attempt, so many attempts at once would cost the square of
// their number.
type lockQueue struct {
	waiters []chan struct{}      // each is closed when its turn comes; guarded by lockWaits.mu
	held    bool                 // what the first one found when it last asked; guarded by lockWaits.mu
	subs    []*nats.Subscription // none if the connection has refused to subscribe
	since   time.Time            // when it subscribed
	news    chan struct{}        // of one slot: something below is new

	mu        sync.Mutex // guards what follows
	released  lockNews   // the last release that was heard,
	refreshed lockNews   // the last refresh,
	claimed   lockNews   // and the last attempt to acquire the lock
	heard     string     // the operation that was heard last
	chosen    string     // the operation with which the server last chose this queue
}

// A lockNews is what was published to a lock's subject, on its way to the bucket,
// which may refuse it: so it is only ever a hint.
type lockNews struct {
	at    time.Time // zero for none
	op    string    // the operation, "" for another client's
	until time.Time // the end of the lease
}

// noteHeld notes whether the first waiter has found the lock held.
func (w *lockWaits) noteHeld(q *lockQueue, held bool) {
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

// released says that this store has released a lock, where that is not heard.
func (w *lockWaits) released(key string) {
	w.mu.Lock()
	q := w.queue[key]
	w.mu.Unlock()
	if q != nil {
		q.note(func() {
			q.chosen = rand.Text()
			q.heard, q.released = q.chosen, lockNews{at: time.Now(), op: q.chosen}
		})
	}
}

func (q *lockQueue) note(change func()) {
	q.mu.Lock()
	change()
	q.mu.Unlock()
	notify(q.news)
}

// hear notes a message that all queues of the lock get.
func (q *lockQueue) hear(msg *nats.Msg) {
	st := decodeState(msg.Header.Get(headerState))
	now := time.Now()
	news := lockNews{now, st.op, now.Add(st.ttl)}
	q.note(func() {
		q.heard = st.op
		switch {
		case msg.Header.Get(headerOperation) != "":
			q.released = news
		case strings.HasSuffix(st.op, firstOp):
			q.claimed = news
		default:
			q.refreshed = news
		}
	})
}

// choose notes a message that only this one of them gets.
func (q *lockQueue) choose(msg *nats.Msg) {
	st := decodeState(msg.Header.Get(headerState))
	q.note(func() { q.chosen = st.op })
}

// claimedSince reports whether somebody else has tried to acquire the lock.
func (q *lockQueue) claimedSince(at time.Time) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.claimed.at.After(at)
}

// await waits for a lock until ctx ends. Other errors than ErrLockHeld are
// returned at once.
func (s *natsLocks) await(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	q, turn := s.waits.enter(key)
	defer s.leave(key, q, turn)
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
	if q.subs == nil {
		if _, err := s.data.connected(newBudget(ctx)); err != nil {
			return nil, s.data.writeError("lock", key, err)
		}
		q.subscribe(s.data.nc, "$KV."+s.data.name+locksSuffix+"."+key)
	}
	// Every waiter receives an attempt, but nobody notices a read. So the waiter reads
	// first, unless this store released the lock last. If this store had to wait for
	// the lock then, it lets the others go first: they may not have received the
	// release yet.
	last := s.releasedHere(key)
	look := last == nil || last.yields > 0
	if look && last != nil {
		if err := s.data.pause(newBudget(ctx), standby(0), nil); err != nil {
			return nil, opError("lock", key, err)
		}
	}
	for held := false; ; held, look = true, true {
		asked := time.Now()
		l, holder, err := s.ask(ctx, q, key, ttl, look, held)
		switch {
		case err == nil:
			s.waits.noteHeld(q, true) // by this store
			switch {
			case held:
				l.yields = maxYields
			case last != nil:
				l.yields = max(last.yields-1, 0) // the others may have been late
			}
			l.ctx = context.Background() // ctx bounds only the wait
			return l.handOver(ctx)
		case err == ErrLockHeld:
			s.waits.noteHeld(q, true)
		case ctx.Err() != nil && s.waits.seesHeld(q) && !errors.Is(err, ErrOutcomeUnknown):
			return nil, ErrLockHeld
		default:
			s.waits.noteHeld(q, false)
			return nil, s.data.writeError("lock", key, err)
		}
		if err := s.sleep(ctx, q, holder, asked); err != nil {
			return nil, err
		}
	}
}

// ask tries to acquire a lock. If it is to look first, it only does so if the lock
// is free and, where it was held before, nobody else tries meanwhile.
func (s *natsLocks) ask(ctx context.Context, q *lockQueue, key string, ttl time.Duration, look, held bool) (*lease, record, error) {
	var last record
	if look {
		asked, budget := time.Now(), newBudget(ctx)
		b, err := s.bind(budget)
		if err == nil {
			last, err = b.leaderLast(budget, key)
		}
		switch {
		case err == nil && b.exists(budget, &last):
			return nil, last, ErrLockHeld
		case err == nil && held && q.claimedSince(asked):
			return nil, record{}, ErrLockHeld
		case err == nil:
			s.waits.noteHeld(q, false)
		}
		// It seems to be free, or the attempt says why not.
	}
	return s.lock(ctx, key, ttl, last)
}

// releasedHere returns the record of a lock's release if this store was the last
// to hold the lock, as far as it knows, or nil.
func (s *natsLocks) releasedHere(key string) *record {
	b := s.opened()
	if b == nil {
		return nil
	}
	if last := b.known(key); last.deleted && last.estimated {
		return &last
	}
	return nil
}

// sleep waits until the lock may be free. holder is the record that a request made
// at asked has found, zero if the lock was free and somebody else was faster.
func (s *natsLocks) sleep(ctx context.Context, q *lockQueue, holder record, asked time.Time) error {
	answered := time.Now()
	found := foundLock{
		asked: asked, answered: answered,
		owner: holderOf(holder.op), until: answered.Add(time.Duration(holder.deadline - s.lockClock())),
		standby: standby(answered.Sub(asked)), yield: yieldFor + mathrand.N(yieldFor),
	}
	switch {
	case holder.revision == 0, holder.deleted:
		found.until = answered.Add(yieldFor)
	case holder.deadline == 0:
		found.until = answered.Add(time.Hour)
	}
	e, status := s.data.current()
	settled := e.began.Add(settleTime)
	if since := q.since.Add(settleTime); since.After(settled) {
		settled = since
	}
	settling := status == nats.CONNECTED && asked.Before(settled) && s.data.elections()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		wake := q.wake(&found)
		if len(q.subs) == 0 || s.missesReleases {
			wake = earlier(wake, answered.Add(missedReleaseCheck))
		}
		if settling {
			wake = earlier(wake, settled)
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
	chosen := q.chosen != "" && q.chosen == q.heard
	wait := func(d time.Duration) time.Duration {
		if chosen {
			return d
		}
		return d * unchosenFactor
	}
	free := found.until // from when on the lock may be free
	if q.refreshed.by(found.owner) && q.refreshed.until.After(free) {
		free = q.refreshed.until
	}
	tried := free.Add(-maxTrip) // an earlier attempt is refused; free is an estimate
	switch r := &q.released; {
	case r.at.After(found.asked):
		free, tried = r.at, r.at
	case r.at.After(q.refreshed.at) && (r.op == "" || r.by(found.owner)):
		// The request has overtaken the holder's release, or that by an operator:
		// the leader had not stored it yet.
		free = earlier(free, found.answered.Add(wait(max(releasePause, found.answered.Sub(r.at)))))
		tried = r.at
	}
	wake := free
	if c := &q.claimed; c.at.After(found.answered) && c.at.After(tried) {
		// Somebody else has tried when it was free, and almost always succeeds. The
		// chosen waiter checks whether it did.
		wake = earlier(c.until, c.at.Add(wait(found.yield)))
	}
	switch {
	case chosen:
		return wake
	case q.heard != "":
		wake = wake.Add(standbyDelay) // somebody else was
	}
	return wake.Add(found.standby)
}

// by reports whether the news is of the acquisition of an owner.
func (n *lockNews) by(owner string) bool { return !n.at.IsZero() && holderOf(n.op) == owner }

// standby returns how long a waiter stands by where nobody was chosen; trip is how
// long its last request took. Nobody knows how many others stand by. So the times
// are random, and later ones are exponentially more likely: however many waiters
// there are, only a few of them have asked when the others hear the first attempt.
func standby(trip time.Duration) time.Duration {
	const lambda = 8 // for up to e^8 waiters
	trip = min(trip, maxTrip)
	fraction := math.Log1p(mathrand.Float64()*math.Expm1(lambda)) / lambda
	return shortDelay + 2*trip + time.Duration(fraction*float64(standbySpread+4*trip))
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
func (w *lockWaits) enter(key string) (q *lockQueue, turn chan struct{}) {
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
	}
	if q.waiters = append(q.waiters, turn); len(q.waiters) == 1 {
		close(turn)
	}
	return q, turn
}

// subscribe has the queue hear of the lock. It needs no consumer. A client that
// lacks the permission hears nothing, and looks when the lease should end.
func (q *lockQueue) subscribe(nc *nats.Conn, subject string) {
	sub, err := nc.Subscribe(subject, q.hear)
	if err != nil {
		return
	}
	q.subs, q.since = append(q.subs, sub), time.Now()
	if sub, err = nc.QueueSubscribe(subject, waiterGroup, q.choose); err == nil {
		q.subs = append(q.subs, sub)
	}
}

// leave takes a waiter out, and ends the subscriptions with the last one: without
// the mutex, as the connection may be stalled.
func (s *natsLocks) leave(key string, q *lockQueue, turn chan struct{}) {
	if s.waits.remove(key, q, turn) {
		for _, sub := range q.subs {
			s.data.unsubscribe(sub)
		}
	}
}

// remove takes a waiter out. If it was the first one, it is the next one's turn. It
// reports whether nobody is left.
func (w *lockWaits) remove(key string, q *lockQueue, turn chan struct{}) (empty bool) {
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
	if len(q.waiters) > 0 {
		return false
	}
	delete(w.queue, key)
	return true
}
