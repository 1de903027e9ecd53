package state

import (
	"slices"
	"sync"
)

// maxWaiting is how many events wait for a reader before newer ones take the
// place of older ones of the same key.
const maxWaiting = 1024

// A queue holds the events that wait for one reader, in the order in which it
// will get them.
type queue struct {
	events []*KeyValue // events[head:] wait
	head   int
	popped int // how many have left: events[head] is number popped

	// newest is the number of each waiting key's newest event. It is kept from
	// the moment that the queue is full until it is empty again, since a reader
	// that keeps up has no use for it.
	newest map[string]int
}

func (q *queue) len() int { return len(q.events) - q.head }

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
		q.newest[ev.Key] = q.popped + q.len()
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

// An outbox delivers events to the reader of one watch. Its backend pushes
// them, in order, from wherever they arise; push never waits. The goroutine of
// deliver is the only sender on the channel, and the one that closes it.
type outbox struct {
	reader chan *KeyValue
	wake   chan struct{} // of one slot: something changed below

	mu    sync.Mutex // guards queue and ended
	queue queue
	ended bool
}

func newOutbox() *outbox {
	return &outbox{reader: make(chan *KeyValue), wake: make(chan struct{}, 1)}
}

// push queues an event, which the caller must not change afterwards. Several
// outboxes may be given the same one: each reader gets a copy.
func (o *outbox) push(ev *KeyValue) {
	o.mu.Lock()
	o.queue.push(ev)
	first := o.queue.len() == 1
	o.mu.Unlock()
	if first {
		o.wakeUp()
	}
}

// end says that nothing will be pushed any more. What waits is still delivered.
func (o *outbox) end() {
	o.mu.Lock()
	o.ended = true
	o.mu.Unlock()
	o.wakeUp()
}

func (o *outbox) wakeUp() {
	select {
	case o.wake <- struct{}{}:
	default: // it is awake already
	}
}

// deliver runs until the watch is done, the store quits, or the outbox was ended
// and is empty. Then it closes the reader's channel.
func (o *outbox) deliver(done, quit <-chan struct{}) {
	defer close(o.reader)
	for {
		ev, ended := o.next()
		if ev == nil {
			if ended {
				return
			}
			select {
			case <-o.wake:
			case <-done:
				return
			case <-quit:
				return
			}
			continue
		}
		select {
		case o.reader <- ev:
		case <-done:
			return
		case <-quit:
			return
		}
	}
}

// next returns the next event as the reader's own, or nil if none waits.
func (o *outbox) next() (ev *KeyValue, ended bool) {
	o.mu.Lock()
	if o.queue.len() > 0 {
		ev = o.queue.pop()
	}
	ended = o.ended
	o.mu.Unlock()
	if ev != nil {
		own := *ev
		if own.Operation == OpPut {
			own.Value = cloneBytes(own.Value)
		}
		ev = &own
	}
	return ev, ended
}
