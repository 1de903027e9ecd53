package state

import (
	"bytes"
	"context"
	"errors"
	"math"
	"slices"
	"time"
)

const (
	// minRenewal is the shortest time between two renewals of a key or a lock. A
	// TTL that needs more cannot be kept up.
	minRenewal = time.Millisecond
	// deleteTimeout is how long KeepAlive tries to delete its key.
	deleteTimeout = 5 * time.Second
	// maxInDoubt is how many writes of unknown outcome KeepAlive remembers at most.
	maxInDoubt = 16
)

// KeepAlive keeps a key alive until ctx ends: it writes the key at once and then
// every third of ttl, each time with what value returns. It continues through
// outages. If the key expires or is deleted meanwhile, KeepAlive writes it again.
//
// When ctx ends, KeepAlive deletes the revision that it wrote last, and returns nil. If
// somebody else has written or deleted the key since, it leaves the key alone. If it
// cannot delete within five seconds, it returns an error, and the key expires. A write
// that the end of ctx cuts short may still be applied. So if the key is not there then,
// even if somebody deleted it, KeepAlive writes it once more to delete it for good.
//
// Before ctx ends it returns only errors that are permanent: [ErrInvalidKey],
// [ErrInvalidTTL] if ttl is not positive, [ErrValueTooLarge], [ErrClosed], and
// that of a connection which its owner has closed. Then the key is left to expire.
// Any other failure is retried: several times within ttl if it comes at once. (A
// call that gets no answer takes up to five seconds.) A ttl of a few milliseconds
// cannot be kept up.
//
// A key should have one owner. KeepAlive overwrites what it finds, so the value of
// a key with two of them alternates. While the outcome of a write is unknown,
// KeepAlive treats the same value as its own, even if somebody else wrote it. To
// decide who owns a key, take a lock; see [WithLock].
//
// On a NATSStore it costs two requests at first, or three for a new key, one each
// third of ttl, and one at the end, or up to three more if that cuts a write short.
// ctx replaces any context that store is bound to. value is called in the caller's
// goroutine; its result is not retained.
func KeepAlive(ctx context.Context, store Store, key string, ttl time.Duration, value func() []byte) error {
	if ttl <= 0 {
		return ErrInvalidTTL
	}
	k := &keptKey{key: key}
	bound := store.WithContext(ctx)
	soon := max(min(ttl/20, time.Second), minRenewal)
	for ctx.Err() == nil {
		var asked time.Time
		retry := backoff{soon, max(min(ttl/10, time.Second), soon)}
		for conflicts := 0; ctx.Err() == nil; {
			asked = time.Now()
			err := k.write(bound, ttl, value)
			if err == nil {
				break
			}
			if final(err) {
				return err
			}
			if err == ErrConflict {
				if conflicts++; conflicts == 1 {
					continue // somebody wrote or deleted it, and not just now
				}
			}
			retry.wait(ctx, math.MaxInt64)
		}
		sleep(ctx, time.Until(asked.Add(max(ttl/3, minRenewal))))
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), deleteTimeout)
	defer cancel()
	return k.delete(last, store.WithContext(last), ttl)
}

// A keptKey is the key of a KeepAlive, as far as that knows it.
type keptKey struct {
	key      string
	revision uint64 // of the last write that was acknowledged; 0 for none
	// current is the revision to write on, if known is true.
	current uint64
	known   bool
	// inDoubt has the values of the last writes whose fate is not known, each once.
	inDoubt [][]byte
}

// write writes the key on top of what it is now.
func (k *keptKey) write(store Store, ttl time.Duration, value func() []byte) error {
	if err := k.read(store); err != nil {
		return err
	}
	next := value()
	revision, err := store.Update(k.key, next, ttl, k.current)
	switch {
	case err == nil:
		k.revision, k.current = revision, revision
		k.inDoubt = nil // had they not been applied by now, they never would be
	case err == ErrConflict:
		k.known = false
	case errors.Is(err, ErrOutcomeUnknown):
		k.known = false
		if !k.doubts(next) {
			k.inDoubt = append(k.inDoubt, bytes.Clone(next))
			k.inDoubt = k.inDoubt[max(0, len(k.inDoubt)-maxInDoubt):]
		}
	}
	return err
}

// doubts reports whether a write of the value is in doubt.
func (k *keptKey) doubts(value []byte) bool {
	return slices.ContainsFunc(k.inDoubt, func(v []byte) bool { return bytes.Equal(v, value) })
}

// read finds out the current revision, unless it is known. If it is another one
// than before, with the value of a write in doubt, it is taken for ours.
func (k *keptKey) read(store Store) error {
	if k.known {
		return nil
	}
	kv, err := store.GetKeyValue(k.key)
	switch {
	case err == ErrNotFound:
		k.current = 0
	case err != nil:
		return err
	default:
		if kv.Revision != k.current && k.doubts(kv.Value) {
			k.revision = kv.Revision
			k.inDoubt = nil
		}
		k.current = kv.Revision
	}
	k.known = true
	return nil
}

// delete deletes the revision that was written last, if it is still there. If the
// key is not there, a write in doubt may create it yet: another write prevents that.
func (k *keptKey) delete(ctx context.Context, store Store, ttl time.Duration) error {
	retry := backoff{20 * time.Millisecond, time.Second}
	for k.revision != 0 || k.inDoubt != nil {
		err := k.read(store)
		if err == nil && k.current == 0 && k.inDoubt != nil {
			err = k.write(store, ttl, func() []byte { return k.inDoubt[0] })
		}
		if err == nil {
			if k.revision == 0 || k.current != k.revision {
				return nil
			}
			err = store.DeleteRevision(k.key, k.revision)
			if err == ErrConflict && k.inDoubt != nil {
				k.known = false // the write in doubt may have been applied just now
				continue
			}
			if err == nil || err == ErrConflict {
				return nil
			}
		}
		if final(err) || ctx.Err() != nil {
			return err
		}
		retry.wait(ctx, math.MaxInt64)
	}
	return nil
}
