package state

import (
	"slices"
	"sync"
	"time"
)

// maxWaiting is how many events wait for a reader before newer ones replace
// older ones of the same key.
const maxWaiting = 1024

// A queue holds the events that wait for one reader, in the order in which the
// reader will get them.
type queue struct {
	events []*KeyValue // events[head:] wait
	head   int
	popped int // how many have left: events[head] is number popped

	// newest is the number of each waiting key's newest event. It is kept from
	// when the queue is full until it is empty again: a reader that keeps up
	// does not need it.
	newest map[string]int
}

func (q *queue) len() int { return len(q.events) - q.head }

// end returns the number of the next event that is pushed.
func (q *queue) end() int { return q.popped + q.len() }

func (q *queue) push(ev *KeyValue) {
	if q.len() >= maxWaiting {
		if q.newest == nil {
			q.newest = make(map[string]int)
			for i, waiting := range q.events[q.head:] {
				q.newest[waiting.Key] = q.popped + i
			}
		}
		if n, ok := q.newest[ev.Key]; ok {
			q.events[q.head+n-q.popped] = ev
			return
		}
	}
	if q.newest != nil {
		q.newest[ev.Key] = q.end()
	}
	if q.head > 0 && len(q.events) == cap(q.events) && q.head >= q.len() {
		// Half of it is free: use that before growing.
		q.events = slices.Delete(q.events, 0, q.head)
		q.head = 0
	}
	q.events = append(q.events, ev)
}

func (q *queue) pop() *KeyValue {
	ev := q.events[q.head]
	q.events[q.head] = nil
	q.head++
	if q.newest[ev.Key] == q.popped {
		delete(q.newest, ev.Key)
	}
	q.popped++
	if q.len() == 0 {
		q.newest = nil
		q.head = 0
		if q.events = q.events[:0]; cap(q.events) > maxWaiting {
			q.events = nil
		}
	}
	return ev
}

// A progress says how far a watch has come: every change up to revision, and
// every change that was acknowledged before asOf by the local clock, has been
// delivered or replaced by a later one that has.
type progress struct {
	revision uint64
	asOf     time.Time
}

// A mark is a progress that holds once the events before number at have left
// the queue.
type mark struct {
	progress
	at int
}

// A subscription is one watch from its reader's side. Its backend pushes events,
// in order, from wherever they arise; push never waits. One goroutine takes them
// out: that of deliver, which hands them to the channel of a Watch, or one that
// calls next.
type subscription struct {
	wake chan struct{} // of one slot: something changed below

	mu    sync.Mutex // guards what follows
	queue queue
	ended bool
	// marks are the oldest and the newest progress that the reader has not come
	// to. Those in between are of no use: a reader that is behind reaches the
	// oldest one first, and there are newer ones when it does.
	marks []mark
}

func newSubscription() *subscription {
	return &subscription{wake: make(chan struct{}, 1)}
}

// push queues an event, which the caller must not change afterwards. Several
// subscriptions may be given the same one: each reader gets a copy.
func (s *subscription) push(ev *KeyValue) {
	s.mu.Lock()
	s.queue.push(ev)
	first := s.queue.len() == 1
	s.mu.Unlock()
	if first {
		s.wakeUp()
	}
}

// advance queues a progress behind the events that wait.
func (s *subscription) advance(p progress) {
	s.mu.Lock()
	m := mark{p, s.queue.end()}
	if len(s.marks) < 2 {
		s.marks = append(s.marks, m)
	} else {
		s.marks[1] = m
	}
	s.mu.Unlock()
	s.wakeUp()
}

// discard removes the events that wait and for which drop returns true.
func (s *subscription) discard(drop func(*KeyValue) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	waiting := s.queue
	s.queue = queue{}
	for waiting.len() > 0 {
		if ev := waiting.pop(); !drop(ev) {
			s.queue.push(ev)
		}
	}
	for i := range s.marks {
		s.marks[i].at = s.queue.end()
	}
}

// end says that nothing will be pushed any more. What waits is still delivered.
func (s *subscription) end() {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	s.wakeUp()
}

func (s *subscription) wakeUp() { notify(s.wake) }

// notify fills a channel of one slot, which says that something is new.
func notify(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // that has been said
	}
}

// deliver hands the events to reader until done or quit is closed, or until the
// subscription has ended and is empty.
func (s *subscription) deliver(reader chan<- *KeyValue, done, quit <-chan struct{}) {
	for {
		ev, _, ended := s.next()
		if ev == nil {
			if ended {
				return
			}
			select {
			case <-s.wake:
			case <-done:
				return
			case <-quit:
				return
			}
			continue
		}
		select {
		case reader <- ev:
		case <-done:
			return
		case <-quit:
			return
		}
	}
}

// next takes out the next event, which is the caller's own, or nil if none
// waits: then wake says when to call again. It also returns the progress that
// holds once the caller has dealt with the event, zero if there is none, and
// whether the subscription has ended and is empty.
func (s *subscription) next() (ev *KeyValue, p progress, ended bool) {
	s.mu.Lock()
	if s.queue.len() > 0 {
		ev = s.queue.pop()
	}
	for len(s.marks) > 0 && s.marks[0].at <= s.queue.popped {
		p = s.marks[0].progress
		s.marks = s.marks[1:]
	}
	ended = s.ended && s.queue.len() == 0 && ev == nil
	s.mu.Unlock()
	if ev != nil {
		own := *ev
		if own.Operation == OpPut {
			own.Value = cloneBytes(own.Value)
		}
		ev = &own
	}
	return ev, p, ended
}

// A watchIndex finds the watches that match a key, at a cost that does not grow
// with the number of those that do not.
type watchIndex struct {
	len   int
	added uint64 // how many have been added
	exact map[string][]*subscription
	wild  trie
}

// A trie holds what watches the keys that begin with the path to it.
type trie struct {
	subs     []*subscription
	branches []branch
}

type branch struct {
	c    byte
	trie *trie
}

func (t *trie) branch(c byte) *trie {
	for i := range t.branches {
		if t.branches[i].c == c {
			return t.branches[i].trie
		}
	}
	return nil
}

func (x *watchIndex) add(p pattern, sub *subscription) {
	x.len++
	x.added++
	if !p.wild {
		if x.exact == nil {
			x.exact = make(map[string][]*subscription)
		}
		x.exact[p.prefix] = append(x.exact[p.prefix], sub)
		return
	}
	t := &x.wild
	for i := range len(p.prefix) {
		next := t.branch(p.prefix[i])
		if next == nil {
			next = new(trie)
			t.branches = append(t.branches, branch{p.prefix[i], next})
		}
		t = next
	}
	t.subs = append(t.subs, sub)
}

func (x *watchIndex) remove(p pattern, sub *subscription) {
	x.len--
	if !p.wild {
		if rest := without(x.exact[p.prefix], sub); len(rest) > 0 {
			x.exact[p.prefix] = rest
		} else {
			delete(x.exact, p.prefix)
		}
		return
	}
	x.wild.remove(p.prefix, sub)
}

// remove takes sub out, and the branches that are bare then.
func (t *trie) remove(path string, sub *subscription) {
	if path == "" {
		t.subs = without(t.subs, sub)
		return
	}
	next := t.branch(path[0])
	next.remove(path[1:], sub)
	if len(next.subs) == 0 && len(next.branches) == 0 {
		t.branches = slices.DeleteFunc(t.branches, func(b branch) bool { return b.c == path[0] })
	}
}

func without(subs []*subscription, sub *subscription) []*subscription {
	return slices.DeleteFunc(subs, func(b *subscription) bool { return b == sub })
}

// publish pushes an event to all that watch key, and reports whether somebody does.
// The event is made only then.
func (x *watchIndex) publish(key string, event func() *KeyValue) bool {
	if x.len == 0 {
		return false
	}
	var ev *KeyValue
	push := func(subs []*subscription) {
		if ev == nil && len(subs) > 0 {
			ev = event()
		}
		for _, sub := range subs {
			sub.push(ev)
		}
	}
	push(x.exact[key])
	t := &x.wild
	push(t.subs)
	for i := range len(key) {
		if t = t.branch(key[i]); t == nil {
			break
		}
		push(t.subs)
	}
	return ev != nil
}
