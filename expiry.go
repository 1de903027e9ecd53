package state

import "container/heap"

// An expiring is something with a key that ends at a deadline, and its place in an
// expiryQueue.
type expiring struct {
	key      string
	deadline timestamp
	listed   timestamp // the deadline it is listed under: never later than deadline
	index    int       // 1-based; 0 if it is not in the expiryQueue
}

// An expiryQueue is a set of expiring things, ordered by deadline.
//
// A deadline that moves into the future is not moved in the expiryQueue until its
// old place comes up: what is refreshed again and again costs nothing here.
type expiryQueue []*expiring

// set gives t a deadline, none for 0.
func (a *expiryQueue) set(t *expiring, deadline timestamp) {
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
func (a *expiryQueue) drop(t *expiring) {
	if t.index != 0 {
		heap.Remove(a, t.index-1)
	}
}

// next returns the timestamp at which to call due again; 0 for never. Nothing is
// due before it.
func (a expiryQueue) next() timestamp {
	if len(a) == 0 {
		return 0
	}
	return a[0].listed
}

// anyDue reports whether something ends at now or before.
func (a *expiryQueue) anyDue(now timestamp) bool {
	for len(*a) > 0 && (*a)[0].listed.passed(now) {
		t := (*a)[0]
		if t.deadline.passed(now) {
			return true
		}
		t.listed = t.deadline
		heap.Fix(a, 0)
	}
	return false
}

// due takes out and returns the first of what ends at now or before; nil if
// nothing does.
func (a *expiryQueue) due(now timestamp) *expiring {
	if !a.anyDue(now) {
		return nil
	}
	return heap.Pop(a).(*expiring)
}

// The methods of heap.Interface.

func (a expiryQueue) Len() int           { return len(a) }
func (a expiryQueue) Less(i, j int) bool { return a[i].listed < a[j].listed }
func (a expiryQueue) Swap(i, j int) {
	a[i], a[j] = a[j], a[i]
	a[i].index, a[j].index = i+1, j+1
}
func (a *expiryQueue) Push(x any) {
	t := x.(*expiring)
	*a = append(*a, t)
	t.index = len(*a)
}
func (a *expiryQueue) Pop() any {
	last := len(*a) - 1
	t := (*a)[last]
	(*a)[last] = nil
	*a = (*a)[:last]
	t.index = 0
	return t
}
