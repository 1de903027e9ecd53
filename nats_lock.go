package state

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// locksSuffix ends the name of the bucket that holds the locks of another.
const locksSuffix = "-locks"

// A lockBucket holds the records of locks, in a bucket of their own beside the
// data: a name space of its own, whose traffic no watch sees, and in which any
// KV tool shows who holds what.
//
// A record is only ever written on top of the one that its writer knows. A
// lease is a value with the lease's TTL, a released lock is a marker, so that
// nothing is ever removed by sequence: on several replicas that can succeed
// beside a conditional write of the same sequence.
type lockBucket struct {
	mu     sync.Mutex // guards bucket
	bucket *bucket    // nil until the first Lock
}

// open returns the bucket, which the first Lock creates like the data's.
func (l *lockBucket) open(c *call, data *bucket) (*bucket, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bucket != nil {
		return l.bucket, nil
	}
	setup := data.setup.Load()
	b := newBucket(data.link, data.name+locksSuffix)
	if err := b.open(c, bucketWant{replicas: setup.Replicas, storage: setup.Storage}); err != nil {
		return nil, fmt.Errorf("bucket %q: %w", b.name, err)
	}
	l.bucket = b
	return b, nil
}

func (l *lockBucket) forget(b *bucket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bucket == b {
		l.bucket = nil
	}
}

// A natsLessor is a lessor for the locks that are kept in a bucket.
type natsLessor struct {
	s *NATSStore
	b *bucket
}

// Lock implements [StateStore]. The lock is a [Fenced]. Somebody who should not
// hold it any more can be deposed by deleting the key from the bucket of locks.
func (s *NATSStore) Lock(key string, ttl time.Duration) (Lock, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	if err := validateLock(key, ttl); err != nil {
		return nil, err
	}
	c := newCall(context.Background())
	b, err := s.locks.open(c, s.data)
	if err != nil {
		return nil, opError("lock", key, err)
	}
	l, err := s.acquire(c, b, key, ttl)
	if err != nil {
		if errors.Is(err, nats.ErrNoResponders) {
			s.locks.forget(b) // it may be gone, and is made anew next time
		}
		return nil, opError("lock", key, err)
	}
	return l.handOver()
}

func (s *NATSStore) acquire(c *call, b *bucket, key string, ttl time.Duration) (*lease, error) {
	if err := b.turns.take(key); err != nil {
		return nil, err
	}
	defer b.turns.give(key)

	// A release is worth remembering; whether a lease has lapsed, only the
	// server tells.
	last := b.known.recall(key)
	if last == nil || !last.deleted {
		last = &record{}
	}
	owner := rand.Text()
	var asked time.Time
	acquire := func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if b.exists(c, last) {
			return nil, record{}, ErrLockHeld
		}
		if !w.doubtful {
			asked = time.Now()
		}
		msg, next := w.value(last, leaseData(owner, ttl), ttl)
		return msg, next, nil
	}
	r, err := b.commit(c, write{key: key, op: owner + ".0", last: last, decide: acquire, idempotent: true})
	if err != nil {
		return nil, err
	}
	l := newLease(natsLessor{s, b}, key, ttl, asked, r.revision)
	l.owner = owner
	return l, nil
}

// onRelease listens for what is published to the lock's subject, on its way to
// the bucket. It needs no consumer, and whoever may not listen just waits.
func (s *NATSStore) onRelease(key string) (<-chan struct{}, func()) {
	released := make(chan struct{}, 1)
	sub, err := s.nc.Subscribe("$KV."+s.data.name+locksSuffix+"."+key, func(msg *nats.Msg) {
		if msg.Header.Get(headerOperation) == "" {
			return
		}
		select {
		case released <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return released, func() {}
	}
	return released, func() { _ = sub.Unsubscribe() }
}

// leaseData is the value of a lease's record, which is for people to read.
func leaseData(owner string, ttl time.Duration) []byte {
	host, _ := os.Hostname()
	return leaseValue{Owner: fmt.Sprintf("%s:%d", host, os.Getpid()), Nonce: owner, TTL: ttl.String()}.encode()
}

// renew writes the next record of a lease on top of its last one. While it is
// not sure which that is, the server is asked first.
func (n natsLessor) renew(l *lease, decide decision) (record, error) {
	if err := n.b.turns.take(l.key); err != nil {
		return record{}, err
	}
	defer n.b.turns.give(l.key)
	l.writes++
	op := fmt.Sprintf("%s.%d", l.owner, l.writes)
	last := &record{
		entry:    entry{revision: l.revision},
		deadline: n.b.clock.now().deadline(time.Until(l.until)),
		op:       op,
	}
	if l.unsure {
		last = nil
	}
	own := func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if owner, _, _ := strings.Cut(last.op, "."); owner != l.owner {
			if w.doubtful && time.Now().Before(l.until) {
				// Nobody else can have got it before the lease's end, unless
				// the attempt whose answer was lost has released it.
				return nil, record{}, errReleased
			}
			return nil, record{}, errNothing
		}
		return decide(c, last, w)
	}
	return n.b.commit(newCall(context.Background()), write{
		key: l.key, op: op, last: last, decide: own, idempotent: true,
	})
}

func (n natsLessor) extend(l *lease) error {
	if err := n.s.begin(); err != nil {
		return err
	}
	r, err := n.renew(l, func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if !n.b.exists(c, last) {
			return nil, record{}, errNothing
		}
		msg, next := w.value(last, leaseData(l.owner, l.ttl), l.ttl)
		return msg, next, nil
	})
	switch {
	case err == nil:
		l.revision, l.unsure = r.revision, false
		return nil
	case err == errNothing, err == errReleased:
		return ErrLockExpired
	}
	l.unsure = true
	return opError("refresh", l.key, err)
}

func (n natsLessor) release(l *lease) error {
	_, err := n.renew(l, func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if last.deleted {
			// An earlier attempt of ours did it, unless somebody else did.
			return nil, record{}, errReleased
		}
		msg, next := w.marker(last, coverLife)
		return msg, next, nil
	})
	switch err {
	case nil, errReleased:
		return nil
	case errNothing:
		return ErrLockNotHeld
	}
	l.unsure = true
	return opError("unlock", l.key, err)
}

// errReleased is the decision of a release that finds it done.
var errReleased = errors.New("released already")
