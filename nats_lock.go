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

// firstOp ends the operation that acquires a lock. Its owner's name comes before
// it. Those that refresh and release it count on.
const firstOp = ".0"

// giveBackPause is how long about a lock that may be held is not looked for.
const giveBackPause = 500 * time.Millisecond

// lockSettingsLife is how old the settings of the bucket of locks may be when a
// lock is granted: an operator may have made it unfit for locks.
const lockSettingsLife = time.Minute

// natsLocks are the locks of a store. Their records are kept in a bucket of
// their own beside the data: a separate name space, whose traffic no watch
// sees, and in which any KV tool shows who holds what.
//
// A record is only ever written on top of the one that its writer knows. A
// lease is a value with the lease's TTL, a released lock is a marker, so that
// nothing is ever removed by sequence: on several replicas that can succeed
// beside a conditional write of the same sequence.
type natsLocks struct {
	conn           connection
	data           *bucket
	owner          string // named in the records
	missesReleases bool   // some releases are not heard
	waits          lockWaits

	mu     sync.Mutex // guards bucket
	bucket *bucket    // nil until the first Lock
}

func newNATSLocks(conn connection, data *bucket, owner string) *natsLocks {
	if owner == "" {
		owner = processName()
	}
	return &natsLocks{
		conn: conn, data: data, owner: owner,
		missesReleases: conn.nc.Opts.NoEcho || conn.domain != "" || conn.apiPrefix != "",
	}
}

// open returns the bucket, which the first Lock creates with the replicas of the
// data's. It is always on disk.
func (s *natsLocks) open(budget *retryBudget) (*bucket, error) {
	if b := s.opened(); b != nil {
		var err error
		if time.Since(b.settings.Load().checked) > lockSettingsLife {
			_, err = b.info(budget)
		}
		if err == nil {
			err = b.validate(&b.settings.Load().streamConfig)
		}
		if !errors.Is(err, jetstream.ErrBucketNotFound) {
			return b, s.inBucket(b, err)
		}
		s.forget(b) // somebody has deleted it
	}
	b := s.newBucket()
	if err := b.open(budget); err != nil {
		return nil, s.inBucket(b, err)
	}
	return s.keep(b), nil
}

// bind is open for a bucket that need not exist.
func (s *natsLocks) bind(budget *retryBudget) (*bucket, error) {
	if b := s.opened(); b != nil {
		return b, nil
	}
	b := s.newBucket()
	info, err := b.info(budget)
	if err == nil {
		err = s.inBucket(b, b.validate(&info.config))
	}
	if err != nil {
		return nil, err
	}
	return s.keep(b), nil
}

func (s *natsLocks) newBucket() *bucket {
	return newBucket(s.data.requester, s.data.name+locksSuffix, bucketWant{
		replicas: s.data.settings.Load().Replicas, locks: true,
	})
}

func (s *natsLocks) inBucket(b *bucket, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("bucket %q: %w", b.name, err)
}

// keep returns the bucket that is used from now on: b, unless another goroutine
// was faster.
func (s *natsLocks) keep(b *bucket) *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bucket == nil {
		s.bucket = b
	}
	return s.bucket
}

// opened returns the bucket if there has been a Lock, else nil.
func (s *natsLocks) opened() *bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bucket
}

// forget makes the next Lock open the bucket again.
func (s *natsLocks) forget(b *bucket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bucket == b {
		s.bucket = nil
	}
}

// A natsLessor is a lessor for the locks that are kept in a bucket.
type natsLessor struct {
	s *natsLocks
	b *bucket
}

// lock acquires a lock that is free. If it is not, the record of its holder
// says until when. last is the lock's last record, zero if that is not known.
func (s *natsLocks) lock(ctx context.Context, key string, ttl time.Duration, last record) (l *lease, holder record, err error) {
	budget := newBudget(ctx)
	for again := false; ; again = true {
		b, err := s.open(budget)
		if err != nil {
			return nil, record{}, err
		}
		l, holder, err = s.acquire(ctx, budget, b, key, ttl, last)
		if !errors.Is(err, jetstream.ErrBucketNotFound) || again {
			return l, holder, err
		}
		s.forget(b) // somebody has deleted it
	}
}

func (s *natsLocks) acquire(ctx context.Context, budget *retryBudget, b *bucket, key string, ttl time.Duration, base record) (*lease, record, error) {
	// A release is worth remembering; whether a lease has lapsed, only the
	// server knows.
	if known := b.known(key); base.revision == 0 && known.deleted {
		base = known
	}
	owner := rand.Text()
	m := mutation{key: key, op: owner + firstOp, value: s.leaseData(ttl, 0), ttl: ttl}
	var asked time.Time // when the attempt that may have acquired it was sent
	for {
		budget.sent = time.Time{}
		r, err := b.commit(budget, m, base, ifUnchanged)
		if asked.IsZero() || err == nil && r.estimated { // else an earlier one may be what was found
			asked = budget.sent
		}
		if err == errMoved {
			if base, err = b.leaderLast(budget, key); err != nil {
				if b.replicated() { // of two leaders, the other one may have stored it
					s.giveBack(b, key, owner, ttl)
				}
				return nil, record{}, err
			}
			b.cache.learn(key, base)
			switch {
			case base.op == m.op: // one leader refused it, and another one stored it
				r = base
			case b.exists(budget, &base) || budget.left() <= minAttempt:
				return nil, base, ErrLockHeld
			default:
				continue
			}
		}
		if err != nil {
			if errors.Is(err, ErrOutcomeUnknown) {
				s.giveBack(b, key, owner, ttl)
			}
			return nil, record{}, err
		}
		l := newLease(ctx, natsLessor{s, b}, key, ttl, asked, r.revision)
		l.owner = owner
		return l, record{}, nil
	}
}

// giveBack releases a lock in the background that an attempt of unknown outcome may
// have acquired, or may acquire yet: nobody knows that it is held.
func (s *natsLocks) giveBack(b *bucket, key, owner string, ttl time.Duration) {
	s.data.start(func() {
		lessor := natsLessor{s, b}
		l := newLease(s.data.life, lessor, key, ttl, time.Now(), 0)
		l.owner, l.inDoubt = owner, true
		for end := time.Now().Add(lockTimeout); ; {
			err := lessor.release(s.data.life, l)
			if err == nil || s.data.pause(newBudget(s.data.life), giveBackPause, nil) != nil || time.Now().After(end) {
				return
			}
		}
	})
}

// leaseData is the value of a lease's record.
func (s *natsLocks) leaseData(ttl time.Duration, token uint64) []byte {
	return leaseValue{Owner: s.owner, TTL: ttl.String(), Token: padded(token)}.encode()
}

// holderOf returns who made the acquisition that a record belongs to.
func holderOf(op string) string {
	owner, _, _ := strings.Cut(op, ".")
	return owner
}

// lockInfo returns what a lock's record says about its holder.
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

// holder returns the record of a lock that is held, or else ErrNotFound. Where
// there is no bucket, nothing was ever locked.
func (s *natsLocks) holder(budget *retryBudget, key string) (r record, err error) {
	var held bool
	b, err := s.bind(budget)
	for asked := time.Now(); errors.Is(err, jetstream.ErrBucketNotFound) && s.data.elections() && time.Since(asked) < goneAfter; {
		// The server that answered may not have heard of it yet.
		if err = s.data.pause(budget, checkInterval, nil); err == nil {
			b, err = s.bind(budget)
		}
	}
	if err == nil {
		r, held, err = b.lookUp(budget, key, b.leaderLast)
	}
	if errors.Is(err, jetstream.ErrBucketNotFound) || err == nil && !held {
		err = ErrNotFound
	}
	return r, err
}

// write writes the next record of a lease on top of its last one. While it is
// not sure which that is, it reads it first, and again if an earlier attempt has
// arrived since. It returns errMoved if the last record is not the lease's.
func (n natsLessor) write(budget *retryBudget, l *lease, m mutation) (record, error) {
	l.writes++
	m.key, m.op, m.exclusive = l.key, fmt.Sprintf("%s.%d", l.owner, l.writes), true
	base := n.lastOf(l)
	for {
		if l.inDoubt {
			var err error
			if base, err = n.b.leaderLast(budget, l.key); err != nil {
				return record{}, err
			}
			if holderOf(base.op) != l.owner {
				return record{}, errMoved
			}
			if base.deleted {
				return base, nil // an earlier attempt of Unlock did it
			}
		}
		r, err := n.b.commit(budget, m, base, ifUnchanged)
		if err != errMoved || !l.inDoubt {
			return r, err
		}
	}
}

// lastOf returns the last record of a lease, as far as its holder knows.
func (n natsLessor) lastOf(l *lease) record {
	return record{
		entry:    entry{revision: l.revision},
		deadline: n.b.clock.now().deadline(time.Until(l.validUntil())),
	}
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
		l.revision, l.inDoubt = r.revision, false
		return nil
	}
	l.doubt(err)
	return n.b.writeError("refresh", l.key, err)
}

func (n natsLessor) release(ctx context.Context, l *lease) error {
	err := ErrClosed
	if n.s.data.life.Err() == nil {
		err = n.end(ctx, l)
	}
	if errors.Is(err, ErrClosed) && ctx.Err() == nil {
		// The store was closed, now or before, and its requester with it.
		r, failed := newRequester(n.s.conn)
		if failed != nil {
			return opError("unlock", l.key, failed)
		}
		defer r.stop()
		n.b = n.b.on(r)
		n.b.cache.learn(l.key, n.lastOf(l))
		err = n.end(ctx, l)
	}
	if err == ErrLockNotHeld {
		return err
	}
	return n.b.writeError("unlock", l.key, err)
}

// end is release while the lessor's requester is open.
func (n natsLessor) end(ctx context.Context, l *lease) error {
	r, err := n.write(newBudget(ctx), l, mutation{marker: true, ttl: minTombstoneTTL})
	switch {
	case err == nil:
		if l.yields > 0 {
			r.yields = l.yields
			n.b.cache.learn(l.key, r)
		}
		if n.s.missesReleases {
			n.s.waits.released(l.key)
		}
	case err == errMoved, errors.Is(err, jetstream.ErrBucketNotFound):
		return ErrLockNotHeld
	default:
		l.doubt(err)
	}
	return err
}

// doubt notes that a write of the lease failed, of which the outcome may be unknown.
func (l *lease) doubt(err error) {
	l.inDoubt = l.inDoubt || errors.Is(err, ErrOutcomeUnknown)
}
