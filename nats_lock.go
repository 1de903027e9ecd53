package state

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// locksSuffix ends the name of the bucket that holds the locks of another.
const locksSuffix = "-locks"

// lockSettingsLife is how old the settings of the bucket of locks may be when a
// lock is granted: an operator may have made it unfit for locks.
const lockSettingsLife = time.Minute

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

// open returns the bucket, which the first Lock creates with the replicas of the
// data's. It is always on disk.
func (l *lockBucket) open(t *retryBudget, data *bucket) (*bucket, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.bucket; b != nil {
		s := b.settings.Load()
		if time.Since(s.checked) > lockSettingsLife {
			b.check()
		}
		return b, b.suitable(&s.streamConfig)
	}
	b := newBucket(data.requester, data.name+locksSuffix, bucketWant{
		replicas: data.settings.Load().Replicas, locks: true,
	})
	if err := b.open(t); err != nil {
		return nil, fmt.Errorf("bucket %q: %w", b.name, err)
	}
	l.bucket = b
	return b, nil
}

// forget has the bucket made anew.
func (l *lockBucket) forget(b *bucket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bucket == b {
		l.bucket = nil
	}
}

// A natsLessor is a lessor for the locks that are kept in a bucket.
type natsLessor struct {
	s *natsCore
	b *bucket
}

// lock acquires a lock that is free. If it is not, the record of its holder
// says until when.
func (s *natsCore) lock(ctx context.Context, key string, ttl time.Duration) (l *lease, holder record, err error) {
	t := newBudget(ctx)
	for again := false; ; again = true {
		b, err := s.locks.open(t, s.data)
		if err != nil {
			return nil, record{}, err
		}
		l, holder, err = s.acquire(ctx, t, b, key, ttl)
		if !errors.Is(err, jetstream.ErrBucketNotFound) || again {
			return l, holder, err
		}
		s.locks.forget(b) // somebody has deleted it
	}
}

func (s *natsCore) acquire(ctx context.Context, t *retryBudget, b *bucket, key string, ttl time.Duration) (*lease, record, error) {
	// A release is worth remembering; whether a lease has lapsed, only the
	// server knows.
	base := b.known(key)
	if !base.deleted {
		base = record{}
	}
	owner := rand.Text()
	m := mutation{key: key, op: owner + ".0", value: s.leaseData(ttl, 0), ttl: ttl}
	for {
		asked := time.Now()
		r, err := b.commit(t, m, base, ifUnchanged)
		if err == nil {
			l := newLease(ctx, natsLessor{s, b}, key, ttl, asked, r.revision)
			l.owner = owner
			return l, record{}, nil
		}
		if err != errMoved {
			return nil, record{}, err
		}
		if base, err = b.leaderLast(t, key); err != nil {
			return nil, record{}, err
		}
		b.cache.learn(key, base)
		if b.exists(t, &base) || t.left() <= minAttempt {
			return nil, base, ErrLockHeld
		}
	}
}

// leaseData is the value of a lease's record.
func (s *natsCore) leaseData(ttl time.Duration, token uint64) []byte {
	return leaseValue{Owner: s.owner, TTL: ttl.String(), Token: padded(token)}.encode()
}

// holderOf returns who made the acquisition that a record belongs to.
func holderOf(op string) string {
	owner, _, _ := strings.Cut(op, ".")
	return owner
}

// info returns what a lock's record says of its holder.
func (r *record) lockInfo(key string) *LockInfo {
	info := &LockInfo{Key: key, Token: r.revision, Expires: r.deadline.time()}
	var v leaseValue
	if json.Unmarshal(r.value, &v) == nil {
		info.Owner = v.Owner
		if token, err := strconv.ParseUint(v.Token, 10, 64); err == nil && token != 0 {
			info.Token = token
		}
	}
	return info
}

// holder returns the record of a lock that is held, or ErrNotFound. Where there
// is no bucket, nothing was ever locked.
func (s *natsCore) holder(t *retryBudget, key string) (record, error) {
	s.locks.mu.Lock()
	b := s.locks.bucket
	s.locks.mu.Unlock()
	if b == nil {
		b = newBucket(s.data.requester, s.data.name+locksSuffix, bucketWant{locks: true})
		if _, err := b.info(t); err != nil {
			return record{}, notFoundIfGone(err)
		}
	}
	r, err := b.leaderLast(t, key)
	if err != nil {
		return record{}, notFoundIfGone(err)
	}
	if !b.exists(t, &r) {
		return record{}, ErrNotFound
	}
	return r, nil
}

func notFoundIfGone(err error) error {
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return ErrNotFound
	}
	return err
}

// write writes the next record of a lease on top of its last one. While it is
// not sure which that is, it reads it first. It returns errMoved if the last
// record is not the lease's.
func (n natsLessor) write(t *retryBudget, l *lease, m mutation) (record, error) {
	l.writes++
	m.key, m.op = l.key, fmt.Sprintf("%s.%d", l.owner, l.writes)
	base := n.b.cache.recall(l.key) // with a deadline: the next record does not have to hide it
	if base.revision != l.revision {
		base = record{entry: entry{revision: l.revision}}
	}
	if l.unsure {
		var err error
		if base, err = n.b.leaderLast(t, l.key); err != nil {
			return record{}, err
		}
		if holderOf(base.op) != l.owner {
			return record{}, errMoved
		}
		if base.deleted {
			return base, nil // an earlier attempt of Unlock did it
		}
	}
	return n.b.commit(t, m, base, ifUnchanged)
}

func (n natsLessor) extend(ctx context.Context, l *lease) error {
	if n.s.data.life.Err() != nil {
		return ErrClosed
	}
	r, err := n.write(newBudget(ctx), l, mutation{value: n.s.leaseData(l.ttl, l.token), ttl: l.ttl})
	switch {
	case err == nil && r.deleted, err == errMoved, errors.Is(err, jetstream.ErrBucketNotFound):
		n.s.data.log.Warn("state: a lease was lost", "lock", l.key, "token", l.token)
		return ErrLockExpired
	case err == nil:
		l.revision, l.unsure = r.revision, false
		return nil
	}
	l.unsure = true
	return opError("refresh", l.key, err)
}

func (n natsLessor) release(ctx context.Context, l *lease) error {
	if n.s.data.life.Err() != nil {
		// The store was closed, and its requester with it.
		r, err := newRequester(n.s.cfg)
		if err != nil {
			return opError("unlock", l.key, err)
		}
		defer r.stop()
		n.b = n.b.on(r)
	}
	_, err := n.write(newBudget(ctx), l, mutation{marker: true, ttl: minTombstoneTTL})
	switch {
	case err == nil:
		n.s.waits.released(l.key)
		return nil
	case err == errMoved, errors.Is(err, jetstream.ErrBucketNotFound):
		return ErrLockNotHeld
	}
	l.unsure = true
	return opError("unlock", l.key, err)
}
