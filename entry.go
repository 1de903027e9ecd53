package state

import (
	"math"
	"time"
)

// A timestamp is a point on a store's clock: nanoseconds since 1970. Zero stands
// for none.
type timestamp int64

func (m timestamp) time() time.Time {
	if m == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(m)).UTC()
}

// deadline returns the end of a life of ttl from m on; none, if ttl is zero or
// the end lies beyond the range of a timestamp, which is the year 2262.
func (m timestamp) deadline(ttl time.Duration) timestamp {
	if ttl <= 0 || int64(m) > math.MaxInt64-int64(ttl) {
		return 0
	}
	return m + timestamp(ttl)
}

// passed reports whether the deadline m has passed at now. An entry is visible
// before its deadline, and at the deadline no more.
func (m timestamp) passed(now timestamp) bool { return m != 0 && m <= now }

// outlives reports whether something with the deadline m is still there when
// something with the deadline other has gone.
func (m timestamp) outlives(other timestamp) bool {
	return other != 0 && (m == 0 || m > other)
}

// An entry is one revision of a key's value.
type entry struct {
	value    []byte // never nil
	revision uint64
	created  timestamp
	modified timestamp
}

// event returns e as an event, which shares its value.
func (e *entry) event(key string, deadline timestamp) *KeyValue {
	return &KeyValue{
		Key:       key,
		Value:     e.value,
		Revision:  e.revision,
		Operation: OpPut,
		Created:   e.created.time(),
		Modified:  e.modified.time(),
		Expires:   deadline.time(),
	}
}

// deletion returns the event of a key's deletion at a time, or of its expiry.
func deletion(key string, revision uint64, at timestamp) *KeyValue {
	return &KeyValue{Key: key, Revision: revision, Operation: OpDelete, Modified: at.time()}
}

// cloneBytes returns a copy of b that is not nil.
func cloneBytes(b []byte) []byte {
	c := make([]byte, len(b))
	copy(c, b)
	return c
}
