package state

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// A hearsay is what a watch overhears of the writes to its keys, on their way
// to the stream, which may accept them or not.
//
// The server's consumer loads a message some time after it was stored. With a
// history of 1 it does not find it any more if the key was written again
// meanwhile, and delivers only the later one. That one names what it replaced,
// though, see [headerOp]: so it is known which of the overheard writes was
// accepted, as which revision.
type hearsay struct {
	b       *bucket
	pattern pattern
	sub     *nats.Subscription
	news    chan struct{} // has an element if something was heard since

	mu   sync.Mutex // guards what follows
	keys map[string]*rumours
	size int // the bytes of all of them

	// These are the watch's.
	start uint64    // what was written earlier is not told
	from  uint64    // what was written later has been overheard
	deaf  time.Time // until when it does not wait for what ought to have been
}

// rumours are the writes to one key that may have been accepted since a
// revision of it was told.
type rumours struct {
	told   uint64
	toldAt timestamp // when that was written
	heard  []rumour
	last   time.Time // when something was heard or told
}

type rumour struct {
	msg  *nats.Msg
	op   string
	on   uint64    // what it replaced if it was accepted: this revision,
	prev string    // by this write, if that is known
	at   timestamp // when it was heard, about when it was written
	// revision is what it became if it was accepted.
	revision uint64
}

const (
	// hearsayLife is for how long a rumour is kept that is not confirmed.
	hearsayLife = 10 * time.Second
	// maxHearsay is how many bytes of rumours are kept.
	maxHearsay = 16 << 20
	// rumourDelay is for how long a rumour may be under way when what replaced
	// it has arrived: on several servers they take different ways.
	rumourDelay = 300 * time.Millisecond
)

// listen begins to overhear what is written to the keys that match the pattern.
func (b *bucket) listen(p pattern) (*hearsay, error) {
	h := &hearsay{b: b, pattern: p, news: make(chan struct{}, 1), keys: make(map[string]*rumours)}
	var err error
	h.sub, err = b.nc.Subscribe(b.filter(p), h.hear)
	return h, err
}

// stop ends it.
func (h *hearsay) stop() {
	if h.sub != nil {
		_ = h.sub.Unsubscribe()
	}
}

// newRumour reads what a message says of itself.
func newRumour(msg *nats.Msg) rumour {
	on, _ := strconv.ParseUint(msg.Header.Get(headerExpected), 10, 64)
	op, prev := decodeOp(msg.Header.Get(headerOp))
	return rumour{msg: msg, op: op, on: on, prev: prev}
}

// hear takes note of a write.
func (h *hearsay) hear(msg *nats.Msg) {
	key, ok := h.b.key(h.pattern, msg.Subject)
	w := newRumour(msg)
	if !ok || w.op == "" {
		return
	}
	w.at = h.b.clock.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.of(key)
	if w.on < r.told {
		return // too late to be accepted, or told already
	}
	if h.size += msg.Size(); h.size > maxHearsay {
		h.keys, h.size = make(map[string]*rumours), 0
		return
	}
	r.heard = append(r.heard, w)
	select {
	case h.news <- struct{}{}:
	default:
	}
}

func (h *hearsay) of(key string) *rumours {
	r := h.keys[key]
	if r == nil {
		r = &rumours{}
		h.keys[key] = r
	}
	r.last = time.Now()
	return r
}

// missed returns the writes to a key that were accepted after revision since
// but were not delivered, oldest first, given what was delivered then. It waits
// a timestamp for what ought to have been heard.
func (h *hearsay) missed(ctx context.Context, key string, since uint64, delivered *nats.Msg) []rumour {
	last := newRumour(delivered)
	if last.on <= since || last.prev == "" {
		return nil
	}
	missed, all := h.trace(key, since, last)
	if all || time.Now().Before(h.deaf) {
		return missed
	}
	timer := time.NewTimer(rumourDelay)
	defer timer.Stop()
	for {
		select {
		case <-h.news:
			if missed, all = h.trace(key, since, last); all {
				return missed
			}
		case <-timer.C:
			h.deaf = time.Now().Add(hearsayLife) // it may be that nothing arrives
			return missed
		case <-ctx.Done():
			return missed
		}
	}
}

// trace follows the writes back from the one that was delivered. It reports
// whether it got to revision since, or to where nobody can know further.
func (h *hearsay) trace(key string, since uint64, last rumour) (missed []rumour, all bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.of(key)
	since = max(since, r.told, h.start)
	w := last
	for w.on > since && w.prev != "" {
		before := r.find(w.prev, w.on)
		if before == nil {
			break
		}
		before.revision = w.on
		w = *before
		missed = append(missed, w)
	}
	slices.Reverse(missed)
	at := r.toldAt
	for i := range missed {
		next := last
		if i+1 < len(missed) {
			next = missed[i+1]
		}
		at = missed[i].written(at, next.msg.Header)
		missed[i].at = at
	}
	return missed, w.on <= max(since, h.from) || w.prev == ""
}

// written estimates when the write was stored, given when the one before it was,
// and the headers of the one after it, whose writer knew when the key had come
// into being: so whether what this one replaced had come to its deadline is not
// left to the estimate.
func (w *rumour) written(before timestamp, next nats.Header) timestamp {
	hdr := w.msg.Header
	created, deadline := decodeCreated(hdr.Get(headerCreated))
	at := max(before, w.at, created+1)
	known, ends := decodeCreated(next.Get(headerCreated))
	switch {
	case ends == 0 && (hdr.Get(headerTTL) != "" || hdr.Get(headerExact) != "" || hdr.Get(headerOperation) != ""):
		return at // the next one is a new key for all that its writer knew
	case known != created:
		return max(before, known) // it made the key, then
	case deadline != 0:
		return min(at, deadline-1)
	}
	return at
}

// find returns the write that became a revision.
func (r *rumours) find(op string, revision uint64) *rumour {
	i := slices.IndexFunc(r.heard, func(w rumour) bool { return w.op == op && w.on < revision })
	if i < 0 {
		return nil
	}
	return &r.heard[i]
}

// settle forgets what cannot be accepted any more now that a revision of the
// key is told.
func (h *hearsay) settle(key string, revision uint64, written timestamp) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.of(key)
	r.told, r.toldAt = revision, written
	r.heard = slices.DeleteFunc(r.heard, func(w rumour) bool {
		if w.on >= revision {
			return false
		}
		h.size -= w.msg.Size()
		return true
	})
}

// contested reports whether a write was heard of that would have replaced a
// revision, and is neither confirmed nor forgotten yet.
func (h *hearsay) contested(key string, revision uint64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.keys[key]
	return r != nil && slices.ContainsFunc(r.heard, func(w rumour) bool { return w.on == revision })
}

// sweep forgets the keys of which nothing was heard for a while.
func (h *hearsay) sweep() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, r := range h.keys {
		if time.Since(r.last) > hearsayLife {
			for _, w := range r.heard {
				h.size -= w.msg.Size()
			}
			delete(h.keys, key)
		}
	}
}
