package state

import (
	"context"
	"slices"
	"sync"
	"time"
)

// A natsWatch is one watch of a feed. It gets what changed after it began.
type natsWatch struct {
	*subscription
	joining bool      // it has not begun: what it does not want is dropped then
	start   uint64    // the stream's last sequence when it began
	since   timestamp // by the server's clock
}

// wants reports whether an event is of a change after the watch began. That of
// an expiry has an older revision.
func (w *natsWatch) wants(ev *KeyValue) bool {
	return ev.Revision > w.start || ev.Operation == OpDelete && timestamp(ev.Modified.UnixNano()) > w.since
}

func (w *natsWatch) beginAt(start uint64, since timestamp) {
	w.joining, w.start, w.since = false, start, since
	w.discard(func(ev *KeyValue) bool { return !w.wants(ev) })
}

// startOf returns the stream's last sequence when a watch began.
func (f *feed) startOf(w *natsWatch) uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return w.start
}

// feeds are the feeds of a store, one for each pattern.
type feeds struct {
	b      *bucket
	maxCut time.Duration // for how long a feed may be cut off

	mu sync.Mutex // guards the map, and refs of each feed
	by map[pattern]*feed
}

func newFeeds(b *bucket) *feeds {
	return &feeds{b: b, maxCut: tombstoneTTL - time.Minute, by: make(map[pattern]*feed)}
}

// join returns a watch of a pattern that begins now, and its feed. The caller
// lets the feed go when it does not need it any more. One that follows gives a new
// feed its first listing.
func (s *feeds) join(ctx context.Context, p pattern, follow bool) (*feed, *natsWatch, error) {
	for {
		f, w, isNew := s.hold(p, follow)
		select {
		case <-f.ready:
		case <-ctx.Done():
		case <-s.b.life.Done():
		}
		err := ctx.Err()
		switch {
		case s.b.life.Err() != nil:
			err = ErrClosed
		case err != nil:
		case f.err != nil:
			err = f.err
		case !isNew:
			err = f.begin(ctx, w)
		}
		if err == nil {
			return f, w, nil
		}
		if isNew && follow {
			f.firstListing(listing{}, err)
		}
		s.leave(f, w)
		if err == errFeedEnded && !isNew {
			s.drop(f)
			continue // it was about to end when we came
		}
		return nil, nil, err
	}
}

// hold adds a watch to the feed of a pattern, which it makes if there is none.
func (s *feeds) hold(p pattern, follow bool) (f *feed, w *natsWatch, isNew bool) {
	w = &natsWatch{subscription: newSubscription(), joining: true}
	s.mu.Lock()
	defer s.mu.Unlock()
	f = s.by[p]
	if f == nil {
		isNew = true
		f = newFeed(s.b, p, s.maxCut, follow)
		s.by[p] = f
	}
	f.refs++
	f.mu.Lock()
	f.watches = append(f.watches, w)
	f.mu.Unlock()
	if isNew && !s.b.start(func() { f.run(); s.drop(f) }) {
		f.err = ErrClosed
		close(f.ready)
	}
	return f, w, isNew
}

// leave removes a watch from its feed, which ends with its last watch.
func (s *feeds) leave(f *feed, w *natsWatch) {
	w.end()
	f.mu.Lock()
	f.watches = slices.DeleteFunc(f.watches, func(x *natsWatch) bool { return x == w })
	f.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if f.refs--; f.refs == 0 {
		if s.by[f.pattern] == f {
			delete(s.by, f.pattern)
		}
		f.quit()
	}
}

// drop forgets a feed that has ended: the next watch makes another one.
func (s *feeds) drop(f *feed) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.by[f.pattern] == f {
		delete(s.by, f.pattern)
	}
}
