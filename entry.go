package state

import (
	"container/heap"
	"math"
	"time"
)

// A moment is a point on a store's clock: nanoseconds since 1970. Zero stands
// for none.
type moment int64

func (m moment) time() time.Time {
	if m == 0 {
		return time.Time{}
	}
	return time.Unix(0, int64(m)).UTC()
}

// deadline returns the end of a life of ttl from m on; none, if ttl is zero or
// the end lies beyond the range of a moment, which is the year 2262.
func (m moment) deadline(ttl time.Duration) moment {
	if ttl <= 0 || int64(m) > math.MaxInt64-int64(ttl) {
		return 0
	}
	return m + moment(ttl)
}

// passed reports whether the deadline m has passed at now. An entry is visible
// before its deadline, and at the deadline no more.
func (m moment) passed(now moment) bool { return m != 0 && m <= now }

// outlives reports whether something with the deadline m is still there when
// something with the deadline other has gone.
func (m moment) outlives(other moment) bool {
	return other != 0 && (m == 0 || m > other)
}

// An entry is one revision of a key's value.
type entry struct {
	value    []byte // never nil
	revision uint64
	created  moment
	modified moment
}

// event returns e as an event, which shares its value.
func (e *entry) event(key string) *KeyValue {
	return &KeyValue{
		Key:       key,
		Value:     e.value,
		Revision:  e.revision,
		Operation: OpPut,
		Created:   e.created.time(),
		Modified:  e.modified.time(),
	}
}

// deletion returns the event of a key's deletion at a time, or of its expiry.
func deletion(key string, revision uint64, at moment) *KeyValue {
	return &KeyValue{Key: key, Revision: revision, Operation: OpDelete, Modified: at.time()}
}

// cloneBytes returns a copy of b that is not nil.
func cloneBytes(b []byte) []byte {
	c := make([]byte, len(b))
	copy(c, b)
	return c
}

// A timed is something with a key that ends at a deadline, and its place in an
// agenda.
type timed struct {
	key      string
	deadline moment
	listed   moment // the deadline it is listed under: never later than deadline
	index    int    // 1-based; 0 if it is not in the agenda
}

// An agenda is a set of timed things, ordered by deadline.
//
// A deadline that moves into the future is not moved in the agenda until its
// old place comes up: what is refreshed again and again costs nothing here.
type agenda []*timed

// set gives t a deadline, none for 0.
func (a *agenda) set(t *timed, deadline moment) {
	t.deadline = deadline
	switch {
	case deadline == 0:
		a.drop(t)
	case t.index == 0:
		t.listed = deadline
		heap.Push(a, t)
	case deadline < t.listed:
		t.listed = deadline
		heap.Fix(a, t.index-1)
	}
}

// drop takes t out.
func (a *agenda) drop(t *timed) {
	if t.index != 0 {
		heap.Remove(a, t.index-1)
	}
}

// next returns the moment at which to call due again; 0 for never. Nothing is
// due before it.
func (a agenda) next() moment {
	if len(a) == 0 {
		return 0
	}
	return a[0].listed
}

// due takes out and returns the first of what ends at now or before; nil if
// nothing does.
func (a *agenda) due(now moment) *timed {
	for len(*a) > 0 && (*a)[0].listed.passed(now) {
		t := (*a)[0]
		if t.deadline.passed(now) {
			heap.Pop(a)
			return t
		}
		t.listed = t.deadline
		heap.Fix(a, 0)
	}
	return nil
}

// The methods of heap.Interface.

func (a agenda) Len() int           { return len(a) }
func (a agenda) Less(i, j int) bool { return a[i].listed < a[j].listed }
func (a agenda) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].index, a[j].index = i+1, j+1
}
func (a *agenda) Push(x any) {
	t := x.(*timed)
	*a = append(*a, t)
	t.index = len(*a)
}
func (a *agenda) Pop() any {
	last := len(*a) - 1
	t := (*a)[last]
	(*a)[last] = nil
	*a = (*a)[:last]
	t.index = 0
	return t
}
