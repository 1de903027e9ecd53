package state

import (
	"context"
	"math"
	"time"
)

// Follow returns the entries that match a pattern, sorted by key, and then every
// later change without a gap, as OpPut and OpDelete events under the terms of
// [StateStore.Watch]. It is the loop around Watch that most programs need: the
// current state, and then its changes. An older state is never delivered after a
// newer one, unless the servers have lost the newer one.
//
// If the watch ends, Follow starts over by itself, compares, and delivers the
// differences, deletions included. A deletion found in this way has the
// revision of the last value that was reported, and the time at which it was found.
// The channel is closed when ctx ends or the store is closed, and for no other
// reason, even if the connection is closed for good.
//
// Follow fails with the errors of Entries and, on a store that wraps another one,
// with [ErrWatchClosed]. It costs one listing when it starts, and no more than one
// after an outage. The entries and events are the caller's own. A slow reader blocks
// nobody, as for Watch. Follow remembers the names and revisions of the keys that
// exist.
func Follow(ctx context.Context, store Store, pattern string) (current []*KeyValue, changes <-chan *KeyValue, err error) {
	f := &following{store: store, pattern: pattern}
	src, err := f.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	current = src.takeCurrent()
	out := &followSink{reader: make(chan *KeyValue), versions: make(map[string]version, len(current))}
	f.sink = out
	for _, kv := range current {
		out.versions[kv.Key] = versionOf(kv)
	}
	go func() {
		defer close(out.reader)
		f.run(ctx, src)
	}()
	return current, out.reader, nil
}

// A version tells one value of a key from another, also from one of the same
// revision in a store that was created again.
type version struct {
	revision uint64
	modified int64 // in nanoseconds
}

func versionOf(kv *KeyValue) version { return version{kv.Revision, kv.Modified.UnixNano()} }

// replacedBy reports whether kv, which exists, is a later value. In a store that
// was created again revisions begin again.
func (v version) replacedBy(kv *KeyValue) bool {
	return kv.Revision > v.revision || kv.Modified.UnixNano() > v.modified
}

// A followSink keeps the changes until the reader of a Follow takes them.
type followSink struct {
	reader   chan *KeyValue
	waiting  queue
	head     *KeyValue // the next one for the reader; nil if it is still in waiting
	versions map[string]version
}

func (s *followSink) version(key string) (version, bool) {
	v, ok := s.versions[key]
	return v, ok
}

func (s *followSink) each(f func(key string, revision uint64)) {
	for key, v := range s.versions {
		f(key, v.revision)
	}
}

func (s *followSink) apply(ev *KeyValue) {
	if ev.Operation == OpDelete {
		delete(s.versions, ev.Key)
	} else {
		s.versions[ev.Key] = versionOf(ev)
	}
	s.waiting.push(ev)
}

func (s *followSink) next() (chan<- *KeyValue, *KeyValue) {
	if s.head == nil {
		if s.waiting.len() == 0 {
			return nil, nil
		}
		s.head = s.waiting.pop()
	}
	return s.reader, s.head
}

func (s *followSink) delivered() { s.head = nil }

func (s *followSink) startOver() {}

func (s *followSink) advance(progress) {}

// A sink is what a following keeps up to date. It holds the entries that exist
// according to the events delivered so far.
type sink interface {
	version(key string) (version, bool)
	each(f func(key string, revision uint64))
	apply(ev *KeyValue)
	// next returns what its reader is to take next, and over which channel; nil if
	// there is nothing. delivered says that it was taken.
	next() (chan<- *KeyValue, *KeyValue)
	delivered()
	// startOver says that the store may have been created again, so that the
	// revisions so far mean nothing any more.
	startOver()
	// advance says how far the sink is up to date.
	advance(p progress)
}

// A follower is a store that watches and lists in one pass. ctx bounds the
// requests. The source's subscription ends with the store; the caller stops it
// in any case.
type follower interface {
	follow(ctx context.Context, p pattern) (*source, error)
}

// A source is a watch, and what existed when it began.
type source struct {
	current []*KeyValue
	begun   time.Time // what was acknowledged before is in current
	asOf    uint64    // the newest revision that is known to be in what was listed
	newest  uint64    // the newest revision of an event
	listed  bool      // again since it began
	stop    func()
	// A store that is a follower has
	sub  *subscription
	ask  func()      // requests that it is marked soon how far sub has come
	lost func() bool // reports whether sub ended because the store lost acknowledged writes
	// and others have
	events <-chan *KeyValue
}

// takeCurrent returns what existed when the source began. The source forgets it:
// the entries live as long as the one who takes them needs them.
func (s *source) takeCurrent() []*KeyValue {
	current := s.current
	s.current = nil
	return current
}

// A following is what Follow and Cache have in common. One goroutine, that of
// run, owns it.
type following struct {
	store   Store
	pattern string
	sink    sink
	// asked has an element when somebody wants to know how far it has come; nil
	// if nobody ever does.
	asked chan struct{}
}

// open begins a watch and lists what exists.
func (f *following) open(ctx context.Context) (src *source, err error) {
	p, err := parsePattern(f.pattern)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, opError("follow", f.pattern, err)
	}
	begun := time.Now()
	if s, ok := own[follower](f.store); ok {
		if src, err = s.follow(ctx, p); err != nil {
			return nil, opError("follow", f.pattern, err)
		}
	} else if src, err = f.watchAndList(ctx); err != nil {
		return nil, err
	}
	src.begun = begun
	for _, kv := range src.current {
		src.asOf = max(src.asOf, kv.Revision)
	}
	return src, nil
}

// watchAndList is follow for any store.
func (f *following) watchAndList(ctx context.Context) (src *source, err error) {
	src = new(source)
	ctx, src.stop = context.WithCancel(ctx)
	bound := f.store.WithContext(ctx)
	if src.events, err = bound.Watch(f.pattern); err == nil {
		src.current, err = bound.Entries(f.pattern)
	}
	if err != nil {
		src.stop()
		return nil, err
	}
	return src, nil
}

// run keeps the sink up to date until ctx ends or the store is closed.
func (f *following) run(ctx context.Context, src *source) {
	for {
		f.read(ctx, src)
		src.stop()
		lost := src.lost != nil && src.lost()
		if src = f.reopen(ctx); src == nil {
			return
		}
		f.reconcile(src.takeCurrent(), lost)
		f.sink.startOver()
		f.sink.advance(progress{src.asOf, src.begun})
	}
}

// reopen opens another source, however long that takes. It returns nil if ctx
// ends or the store is closed. Meanwhile the reader gets what waits for it.
func (f *following) reopen(ctx context.Context) *source {
	opened := make(chan *source)
	go func() {
		defer close(opened)
		for retry := (backoff{20 * time.Millisecond, time.Second}); ctx.Err() == nil; retry.wait(ctx, math.MaxInt64) {
			src, err := f.open(ctx)
			if err == nil {
				opened <- src
			}
			if err == nil || err == ErrClosed {
				return
			}
		}
	}()
	for {
		reader, head := f.sink.next()
		select {
		case reader <- head:
			f.sink.delivered()
		case src := <-opened:
			return src
		}
	}
}

// read takes over what a source delivers, until it ends.
func (f *following) read(ctx context.Context, src *source) {
	var tick <-chan time.Time
	if f.asked != nil {
		ticker := time.NewTicker(progressInterval)
		defer ticker.Stop()
		tick = ticker.C
	}
	for {
		var wake <-chan struct{}
		if src.sub != nil {
			if f.take(src) {
				return
			}
			wake = src.sub.wake
		}
		reader, head := f.sink.next()
		select {
		case reader <- head:
			f.sink.delivered()
		case <-wake:
		case ev, ok := <-src.events:
			if !ok {
				return
			}
			if !f.confirm(ctx, src, ev) {
				return
			}
		case <-tick:
			f.ask(ctx, src)
		case <-f.asked:
			f.ask(ctx, src)
		case <-ctx.Done():
			return
		}
	}
}

// take takes over all that waits in a subscription. It reports whether that has
// ended.
func (f *following) take(src *source) (ended bool) {
	for {
		ev, p, ended := src.sub.next()
		if ev != nil {
			f.change(src, ev)
		}
		if !p.asOf.IsZero() {
			f.sink.advance(p)
		}
		if ev == nil {
			return ended
		}
	}
}

// progressInterval is how often a following finds out how far it has come.
const progressInterval = time.Second

// ask finds out how far the following has come. A store that cannot say so is
// listed once more.
func (f *following) ask(ctx context.Context, src *source) {
	if src.ask != nil {
		src.ask()
		return
	}
	begun := time.Now()
	current, err := f.store.WithContext(ctx).Entries(f.pattern)
	if err != nil {
		return
	}
	f.reconcile(current, false)
	// Whatever is gone by now may have had the newest revision.
	src.asOf = max(src.asOf, src.newest)
	for _, kv := range current {
		src.asOf = max(src.asOf, kv.Revision)
	}
	src.listed = true
	f.sink.advance(progress{src.asOf, begun})
}

// confirm is change for an event of a store that is no follower. If the source
// was listed again since it began, a put of a key that does not exist may be
// older than the listing, and its deletion still be under way: then the store
// is asked. It reports whether the source is still good.
func (f *following) confirm(ctx context.Context, src *source, ev *KeyValue) bool {
	if _, exists := f.sink.version(ev.Key); src.listed && ev.Operation == OpPut && !exists {
		kv, err := f.store.WithContext(ctx).GetKeyValue(ev.Key)
		switch {
		case err == ErrNotFound:
			return true
		case err != nil:
			return false
		case kv.Revision > ev.Revision:
			ev = kv
		}
	}
	f.change(src, ev)
	return true
}

// change passes an event on, unless it is older than what is known. An expiry
// has the revision of the value that expired.
func (f *following) change(src *source, ev *KeyValue) {
	src.newest = max(src.newest, ev.Revision)
	known, exists := f.sink.version(ev.Key)
	switch {
	case ev.Operation == OpDelete && (!exists || ev.Revision < known.revision):
	case ev.Operation == OpPut && exists && ev.Revision <= known.revision:
	case ev.Operation == OpPut && !exists && ev.Revision <= src.asOf:
		// It was gone again when the entries were listed.
	default:
		f.sink.apply(ev)
	}
}

// reconcile passes on what differs from the entries that exist now. If the store has
// lost what it acknowledged, they may be older than what is known.
func (f *following) reconcile(current []*KeyValue, lost bool) {
	there := make(map[string]bool, len(current))
	for _, kv := range current {
		there[kv.Key] = true
		known, exists := f.sink.version(kv.Key)
		if !exists || known.replacedBy(kv) || lost && known != versionOf(kv) {
			f.sink.apply(kv)
		}
	}
	found := timestamp(time.Now().UnixNano())
	var gone []*KeyValue
	f.sink.each(func(key string, revision uint64) {
		if !there[key] {
			gone = append(gone, deletion(key, revision, found))
		}
	})
	for _, ev := range gone {
		f.sink.apply(ev)
	}
}
