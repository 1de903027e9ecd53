package state

import (
	"context"
	"math"
	"time"
)

// Modify changes the value of a key. It reads the key, calls fn with the entry, or
// with nil if the key does not exist, and writes what fn returns with
// [Store.Update]. If somebody else changed the key meanwhile, it starts over,
// until ctx ends. So fn may be called several times, and should have no side
// effects. The entry that fn gets is fn's own. Modify returns the new revision.
//
// An error of fn stops Modify and is returned as it is; nothing was written then.
// When ctx ends, the error wraps the context's. An error of the store is returned
// and not retried: after one that wraps [ErrOutcomeUnknown] the value may have
// been written. ctx replaces any context that store is bound to.
//
// On a NATSStore it costs two requests, or three for a new key, and two more each
// time that it starts over. Of several concurrent calls for one key each makes its
// change once (unless a conflict is reported of a write that was stored, which
// [NATSStore] describes). After a few conflicts a call pauses for some milliseconds.
func Modify(ctx context.Context, store Store, key string, fn func(old *KeyValue) (value []byte, ttl time.Duration, err error)) (uint64, error) {
	store = store.WithContext(ctx)
	retry := backoff{time.Millisecond, 50 * time.Millisecond}
	for conflicts := 0; ; conflicts++ {
		if conflicts > 2 {
			retry.wait(ctx, math.MaxInt64)
		}
		if err := ctx.Err(); err != nil {
			return 0, opError("modify", key, err)
		}
		old, err := store.GetKeyValue(key)
		var revision uint64
		switch {
		case err == nil:
			revision = old.Revision
		case err != ErrNotFound:
			return 0, err
		}
		value, ttl, err := fn(old)
		if err != nil {
			return 0, err
		}
		if revision, err = store.Update(key, value, ttl, revision); err != ErrConflict {
			return revision, err
		}
	}
}
