package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// watchBatch is how many messages a feed asks for at a time.
	watchBatch = 512
	// heartbeat is how often the server says that there is nothing to say. A
	// feed that hears nothing for a little more than two of them looks for
	// another server.
	heartbeat   = time.Second
	maxSilence  = 2*heartbeat + 200*time.Millisecond
	pullExpires = 30 * time.Second
	// watchLife is how long a server keeps the consumer of a feed that went
	// away without a word.
	watchLife = 10 * time.Second
	// stateLife is how old a feed lets its knowledge of the stream become. It
	// notices by it that the stream was purged, or made anew.
	stateLife = 2 * time.Second
	// maxLag is how long a consumer may stay behind the leader without getting on.
	maxLag = 10 * time.Second
	// refusedFor is how long a feed that is refused tries to attach again
	// before it ends.
	refusedFor = 2 * time.Second
	// maxRelist is the longest time between two listings that look for keys
	// which were removed without a trace, when they find none.
	maxRelist = 10 * time.Minute
)

// A feed follows a pattern of a bucket for all watches of it in a store. One
// goroutine, that of run, owns it: it reads what the consumer delivers, keeps
// track of the keys that exist, and pushes events to the watches. It never
// waits for an answer: requests are made by other goroutines, which post what to
// do with the answer.
type feed struct {
	b       *bucket
	pattern pattern
	maxCut  time.Duration
	quit    chan struct{} // closed when the last watch has gone

	ready chan struct{} // closed when it is attached, or has failed
	err   error         // why it has failed; set before ready is closed

	mu      sync.Mutex // guards what follows
	watches []*natsWatch
	posted  []func()
	ended   bool
	wake    chan struct{} // of one slot: something was posted

	refs int // how many watches hold it; guarded by feeds.mu

	// What follows is owned by run.

	source    *consumer // nil while it is cut off
	epoch     *epoch    // of the connection that the source is on
	asked     int       // messages that the server may still send
	attempts  int       // to attach, in a row
	refusal   time.Time // since when attaching has been refused
	missing   time.Time // since when the bucket has not been found
	cut       time.Time // since when it is cut off
	heard     time.Time // when something came last
	heardAt   timestamp // the same by the server's clock, which no pause of ours stops
	cursor    uint64    // the last sequence that was dealt with
	pending   uint64    // how many messages there were behind it
	position  uint64    // how far the consumer has read the stream
	passed    uint64    // and how far when it was last seen to get on
	goal      uint64    // what it has to come to
	goalSince time.Time // since when it has not got on
	created   time.Time // the stream's, which distinguishes it from another of its name; never changed once the feed is ready
	openedAt  timestamp // by the server's clock
	expecting bool      // the first listing comes from a Follow

	// alive are the matching keys that exist as far as was reported, and when
	// they expire. Until the keys that existed before are listed, touched has
	// what was read since the feed began.
	alive     map[string]*tracked
	expiries  expiryQueue
	listed    bool
	listing   bool
	touched   map[string]uint64
	buried    map[string]burial
	deferred  time.Time           // until when it does not look at what has expired
	asking    bool                // what has expired is being found out
	doubtful  map[string]*tracked // keys with a newer revision that has not arrived
	floor     uint64              // no key alive has a revision below
	messages  uint64              // in the stream, when last looked at
	nextList  time.Time           // when to look for keys that were removed, at the earliest
	listPause time.Duration
	targets   []target
	lastState *streamState
	over      bool // it has come to its end
}

// A tracked is a key that exists.
type tracked struct {
	expiring
	revision uint64
	created  timestamp
	unread   bool // the revision was listed, and will be delivered
}

// A target is a progress that holds once so many messages have been read from a
// consumer.
type target struct {
	source *consumer
	count  uint64
	progress
}

// ended reports whether the key had come to its deadline when r, a later record
// of it, was written. What was written in between may have been missed: a
// record of the same creation shows that it never ended.
func (t *tracked) ended(r *record) bool {
	return (t.deadline.passed(r.modified) || r.expiry) && t.created != r.created
}

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
// lets the feed go when it does not need it any more. With listing, the caller
// gives a new feed its first listing, by list.
func (s *feeds) join(ctx context.Context, p pattern, listing bool) (*feed, *natsWatch, error) {
	for {
		f, w, isNew := s.hold(p, listing)
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
		s.leave(f, w)
		if err == errFeedEnded && !isNew {
			s.drop(f)
			continue // it was about to end when we came
		}
		return nil, nil, err
	}
}

// hold adds a watch to the feed of a pattern, which it makes if there is none.
func (s *feeds) hold(p pattern, listing bool) (f *feed, w *natsWatch, isNew bool) {
	w = &natsWatch{subscription: newSubscription(), joining: true}
	s.mu.Lock()
	defer s.mu.Unlock()
	f = s.by[p]
	if f == nil {
		isNew = true
		f = &feed{
			b: s.b, pattern: p, maxCut: s.maxCut, expecting: listing,
			quit: make(chan struct{}), ready: make(chan struct{}), wake: make(chan struct{}, 1),
			alive: make(map[string]*tracked), touched: make(map[string]uint64), doubtful: make(map[string]*tracked), buried: make(map[string]burial),
			heard: time.Now(), listPause: stateLife, floor: math.MaxUint64,
		}
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
		close(f.quit)
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

// Why a feed ends.
var (
	errBucketGone = errors.New("the bucket is gone")
	errCutTooLong = errors.New("cut off for too long")
	errFeedEnded  = errors.New("the feed has ended")
)

// begin has a watch of a running feed begin now: it asks for the stream's last
// sequence, and drops what came before.
func (f *feed) begin(ctx context.Context, w *natsWatch) error {
	info, err := f.b.info(newBudget(ctx))
	if err != nil {
		return err
	}
	if !info.Created.Equal(f.created) {
		return errFeedEnded // the bucket was made anew, which the feed will notice
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return errFeedEnded
	}
	w.beginAt(info.State.LastSeq, timestamp(info.Now.UnixNano()))
	return nil
}

func (w *natsWatch) beginAt(start uint64, since timestamp) {
	w.joining, w.start, w.since = false, start, since
	w.discard(func(ev *KeyValue) bool { return !w.wants(ev) })
}

// push hands an event to the watches that want it.
func (f *feed) push(ev *KeyValue) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, w := range f.watches {
		if w.joining || w.wants(ev) {
			w.push(ev)
		}
	}
}

// post has run do something. It reports whether run still does.
func (f *feed) post(do func()) bool {
	f.mu.Lock()
	ended := f.ended
	if !ended {
		f.posted = append(f.posted, do)
	}
	f.mu.Unlock()
	select {
	case f.wake <- struct{}{}:
	default:
	}
	return !ended
}

// run is the feed's loop.
func (f *feed) run() {
	defer f.finish()
	f.attach()
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	expiry := time.NewTimer(time.Hour)
	defer expiry.Stop()
	for !f.over {
		var mail, broken <-chan struct{}
		if f.source != nil {
			mail, broken = f.source.wake, f.epoch.over
		}
		select {
		case <-f.quit:
			return
		case <-f.b.life.Done():
			return
		case <-f.wake:
			f.runPosted()
		case <-mail:
			f.read()
		case <-expiry.C:
			f.expire()
		case <-ticker.C:
			f.look()
		case <-broken:
			f.cutOff("the connection was lost")
		}
		if next := f.expiries.next(); next != 0 && !f.asking && f.source != nil {
			expiry.Reset(max(time.Duration(next-f.b.clock.now()), time.Until(f.deferred), 0))
		}
	}
}

// finish ends what is left of the feed.
func (f *feed) finish() {
	f.mu.Lock()
	f.ended = true
	watches := slices.Clone(f.watches)
	f.mu.Unlock()
	f.runPosted() // a new source may be among it
	f.detach()
	for _, w := range watches {
		w.end()
	}
	select {
	case <-f.ready:
	default:
		f.err = errFeedEnded
		close(f.ready)
	}
}

// runPosted does what was posted.
func (f *feed) runPosted() {
	f.mu.Lock()
	posted := f.posted
	f.posted = nil
	f.mu.Unlock()
	for _, do := range posted {
		do()
	}
}

// endBecause has the loop end.
func (f *feed) endBecause(err error) {
	f.over = true
	f.b.log.Warn("state: a watch ends", "bucket", f.b.name, "pattern", f.pattern.String(), "reason", err)
}

// An attachment is a feed's new connection to the stream.
type attachment struct {
	info   *streamInfo
	source *consumer
	epoch  *epoch
}

// attach connects the feed to the stream: the first time from now on, else from
// where it was.
func (f *feed) attach() {
	first, cursor, created, heardAt, maxCut := f.created.IsZero(), f.cursor, f.created, f.heardAt, f.maxCut
	f.b.start(func() {
		a, err := f.connect(first, cursor, created, heardAt, maxCut)
		if !f.post(func() { f.attached(a, err) }) && a.source != nil {
			a.source.stop()
		}
	})
}

// connect makes the consumer. It owns nothing of the feed.
func (f *feed) connect(first bool, cursor uint64, created time.Time, heardAt timestamp, maxCut time.Duration) (a attachment, err error) {
	t := newBudget(f.b.life)
	if a.epoch, err = f.b.connected(t); err != nil {
		return a, err
	}
	if a.info, err = f.b.info(t); err != nil {
		return a, err
	}
	if maxAge := a.info.config.MaxAge; maxAge > 0 {
		maxCut = min(maxCut, maxAge)
	}
	switch {
	case first:
		cursor = a.info.State.LastSeq
	case !created.Equal(a.info.Created) || a.info.State.LastSeq < cursor:
		return a, errBucketGone
	case timestamp(a.info.Now.UnixNano())-heardAt > timestamp(maxCut):
		return a, errCutTooLong
	}
	a.source, err = f.b.consume(t, f.b.filter(f.pattern), cursor+1, false, watchLife)
	return a, err
}

// attached takes over a new connection, or decides what to do without.
func (f *feed) attached(a attachment, err error) {
	if err == nil {
		f.source, f.epoch, f.asked, f.pending = a.source, a.epoch, 0, 0
		f.goal, f.goalSince = 0, time.Now()
		f.hear()
		err = f.pull()
	}
	if err != nil {
		f.detach()
		f.notAttached(err)
		return
	}
	if !f.cut.IsZero() {
		f.b.log.Info("state: a watch is back", "bucket", f.b.name, "pattern", f.pattern.String(), "after", time.Since(f.cut).Round(time.Millisecond))
	}
	f.attempts, f.refusal, f.missing, f.cut = 0, time.Time{}, time.Time{}, time.Time{}
	f.messages = a.info.State.Messages
	if f.created.IsZero() {
		f.created, f.cursor, f.openedAt = a.info.Created, a.info.State.LastSeq, timestamp(a.info.Now.UnixNano())
		f.mu.Lock()
		for _, w := range f.watches {
			w.beginAt(f.cursor, f.openedAt)
		}
		f.mu.Unlock()
		close(f.ready)
		if f.expecting {
			return
		}
	}
	// What exists, and until when, no message says.
	f.list()
}

// notAttached decides what to do after an attempt to attach has failed.
func (f *feed) notAttached(err error) {
	if f.created.IsZero() {
		f.err, f.over = err, true // it never began
		close(f.ready)
		return
	}
	now := time.Now()
	since := func(at *time.Time, holds bool) time.Duration {
		switch {
		case !holds:
			*at = time.Time{}
			return 0
		case at.IsZero():
			*at = now
		}
		return now.Sub(*at)
	}
	gone := since(&f.missing, errors.Is(err, jetstream.ErrBucketNotFound))
	refused := since(&f.refusal, apiCode(err) != 0 && !passing(err) || errors.Is(err, nats.ErrPermissionViolation))
	switch {
	case err == errBucketGone, err == errCutTooLong, f.b.nc.IsClosed(),
		gone > goneAfter, refused > refusedFor, time.Since(f.heard) > f.maxCut:
		f.endBecause(err)
		return
	}
	pause := min(20*time.Millisecond<<min(f.attempts, 5), 500*time.Millisecond)
	f.attempts++
	f.later(pause/2+rand.N(pause), f.attach)
}

// later posts something after a time, unless the feed has ended.
func (f *feed) later(d time.Duration, do func()) {
	f.b.start(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			f.post(do)
		case <-f.quit:
		case <-f.b.life.Done():
		}
	})
}

// cutOff gives the source up and attaches again.
func (f *feed) cutOff(reason string) {
	f.detach()
	f.cut = time.Now()
	f.b.stats.cuts.Add(1)
	f.b.log.Warn("state: a watch was cut off", "bucket", f.b.name, "pattern", f.pattern.String(), "reason", reason)
	f.attach()
}

func (f *feed) detach() {
	if f.source != nil {
		f.source.stop()
		f.source = nil
	}
	f.targets = nil
}

// hear notes that the feed is connected.
func (f *feed) hear() { f.heard, f.heardAt = time.Now(), f.b.clock.now() }

// pull keeps the server supplied with requests.
func (f *feed) pull() error {
	if f.asked > watchBatch/2 {
		return nil
	}
	n, err := f.source.pull(pullRequest{Batch: watchBatch - f.asked, Expires: pullExpires, Heartbeat: heartbeat})
	f.asked += n
	return err
}

// look is what the feed does now and then.
func (f *feed) look() {
	s := f.b.settings.Load()
	switch {
	case f.b.nc.IsClosed():
		f.endBecause(nats.ErrConnectionClosed)
		return
	case f.source == nil:
		return
	case !s.created.Equal(f.created):
		f.endBecause(errBucketGone)
		return
	case time.Since(f.heard) > maxSilence:
		f.cutOff("no heartbeat")
		return
	case f.lags():
		f.cutOff("the consumer's server lags behind the leader")
		return
	}
	if len(f.doubtful) > 0 {
		f.recheck()
	}
	maps.DeleteFunc(f.buried, func(_ string, b burial) bool { return time.Since(b.at) > burialLife })
	if !f.behind() {
		// By now, what was written when the last state was taken has been read.
		f.lookAtState(f.lastState)
		f.lastState = f.b.state.Load()
	}
	if time.Since(s.checked) > stateLife-heartbeat/2 {
		f.b.check()
	}
}

// lags reports whether the consumer is behind what the leader had and has not got
// on for a while: it may be on a replica that does not.
func (f *feed) lags() bool {
	if f.position >= f.goal || f.position != f.passed {
		f.passed, f.goalSince = f.position, time.Now()
	}
	if f.position >= f.goal {
		f.goal = f.b.state.Load().LastSeq
	}
	return time.Since(f.goalSince) > maxLag
}

// lookAtState looks for keys that were removed without a message: what is older
// than the stream's first message is gone, and a stream that has fewer messages
// than before may have lost any.
func (f *feed) lookAtState(st *streamState) {
	if !f.listed || st == nil {
		return
	}
	if st.FirstSeq > f.floor {
		suspects := []*tracked{}
		f.floor = st.FirstSeq
		for _, t := range f.alive {
			if t.revision < st.FirstSeq {
				suspects = append(suspects, t)
			}
		}
		f.suspect(suspects)
	}
	fewer := st.Messages < f.messages
	f.messages = st.Messages
	if fewer && len(f.alive) > 0 && time.Now().After(f.nextList) {
		f.list()
		f.nextList = time.Now().Add(f.listPause)
		f.listPause = min(2*f.listPause, maxRelist)
	}
}

// read deals with what the consumer sent.
func (f *feed) read() {
	for _, msg := range f.source.take() {
		if err := f.accept(msg); err != nil {
			f.cutOff(err.Error())
			return
		}
	}
	if err := f.pull(); err != nil {
		f.cutOff(err.Error())
		return
	}
	f.reachTargets()
}

func (f *feed) accept(msg *nats.Msg) error {
	d, st, err := f.source.accept(msg)
	if err != nil {
		return err
	}
	if st.code == "0" {
		return nil
	}
	f.hear()
	switch {
	case st.code == "":
	case st.code == "100":
		f.pending, f.position = 0, max(f.position, st.seq)
		return nil
	case st.code == "smaller":
		f.asked = 0
		return nil
	case st.ended:
		f.asked -= min(st.unsent, f.asked)
		return nil
	default:
		return fmt.Errorf("status %s", st.code)
	}
	f.b.clock.observe(d.written)
	f.asked--
	f.cursor, f.pending, f.position = d.seq, d.pending, d.seq
	if key, ok := f.b.key(f.pattern, msg.Subject); ok {
		f.report(key, decode(msg.Header, msg.Data, d.seq, d.written, f.b.settings.Load().MaxAge))
	}
	return nil
}

// report pushes the events that a record of a key amounts to, given what was
// reported before.
func (f *feed) report(key string, r record) {
	t := f.alive[key]
	if t != nil && (r.revision < t.revision || r.revision == t.revision && !t.unread) {
		return
	}
	if !f.listed || f.listing {
		f.touched[key] = r.revision
	}
	if t != nil && t.ended(&r) {
		// It had expired before this was written.
		at := t.deadline
		if at == 0 {
			at = r.modified
		}
		f.gone(t, t.revision, at)
		t = nil
	}
	switch {
	case !r.deleted:
		f.track(key, &r, false)
		f.push(r.event(key, r.deadline))
	case t != nil:
		f.gone(t, r.revision, r.modified)
	case f.unseen(key, &r):
		f.buried[key] = burial{r.created, time.Now()}
		f.push(deletion(key, r.revision, r.modified))
	}
}

// unseen reports whether a marker deleted a value that was never delivered: it
// was replaced by the marker before that, or it existed before the feed, which
// has not been listed yet. Our markers say when the key came into being. Other
// clients' do not, and may delete what does not exist.
func (f *feed) unseen(key string, r *record) bool {
	last, reported := f.buried[key]
	if r.op == "" {
		return !f.listed && !reported
	}
	return r.created != 0 && r.created != last.created
}

// A burial is the last deletion or expiry of a key that was reported: a marker
// for the same key may follow, of another client that deleted it at once, or of
// the server.
type burial struct {
	created timestamp // of the key
	at      time.Time
}

// burialLife is how long a burial is remembered.
const burialLife = 10 * time.Second

func (f *feed) track(key string, r *record, unread bool) {
	t := f.alive[key]
	if t == nil {
		t = &tracked{expiring: expiring{key: key}}
		f.alive[key] = t
	}
	t.revision, t.created, t.unread = r.revision, r.created, unread
	f.floor = min(f.floor, r.revision)
	f.expiries.set(&t.expiring, r.deadline)
}

// gone reports that a key does not exist any more.
func (f *feed) gone(t *tracked, revision uint64, at timestamp) {
	f.expiries.drop(&t.expiring)
	delete(f.alive, t.key)
	delete(f.doubtful, t.key)
	f.buried[t.key] = burial{t.created, time.Now()}
	if !f.listed || f.listing {
		f.touched[t.key] = max(f.touched[t.key], t.revision) // a listing may still have it
	}
	f.push(deletion(t.key, revision, at))
}

// list finds out what exists.
func (f *feed) list() {
	if f.listing {
		return
	}
	f.listing = true
	if f.listed {
		f.touched = make(map[string]uint64)
	}
	source := f.source
	f.b.start(func() {
		l, err := f.b.list(newBudget(f.b.life), f.pattern, false)
		f.post(func() {
			f.listing = false
			switch {
			case err == nil:
				f.merge(l)
			case f.source == source && source != nil:
				f.later(time.Second, f.list)
			}
		})
	})
}

// merge takes over what a listing found. What was read since the listing began
// is newer.
func (f *feed) merge(l listing) {
	over := f.openedAt // what had expired before is not reported
	if f.listed {
		over = l.now // what expired before was tracked: it was reported, or will be
	}
	there := make(map[string]bool, len(l.all))
	for i := range l.all {
		r := &l.all[i]
		there[r.key] = true
		t := f.alive[r.key]
		if r.deleted || f.touched[r.key] >= r.revision || t != nil && t.revision >= r.revision || r.deadline.passed(over) {
			continue
		}
		f.track(r.key, &r.record, r.revision > f.cursor)
	}
	var suspects []*tracked
	for key, t := range f.alive {
		if !there[key] && f.touched[key] == 0 && !t.deadline.passed(l.now) {
			suspects = append(suspects, t)
		}
	}
	f.listed, f.listing = true, false
	f.touched = make(map[string]uint64)
	f.suspect(suspects)
}

// expire finds out which of the keys that are due were refreshed in time: a
// refresh may be on its way to here, or still on its way into the stream.
func (f *feed) expire() {
	now := f.b.clock.now()
	if f.source == nil || f.asking || !f.expiries.anyDue(now) {
		return
	}
	if f.behind() && !f.expiries.anyDue(now-maxOverdue) {
		// What is on its way here may be refreshes: nothing need be asked then.
		f.deferred = time.Now().Add(20 * time.Millisecond)
		return
	}
	f.asking = true
	f.b.start(func() {
		// The server's clock may have been set back, or another server leads now.
		t := newBudget(f.b.life)
		info, err := f.b.info(t)
		f.post(func() {
			if err != nil {
				f.asking = false
				f.deferred = time.Now().Add(checkInterval)
				return
			}
			f.probe(f.due(timestamp(info.Now.UnixNano())), f.expired)
		})
	})
}

// maxOverdue is how long after a deadline a feed that is behind asks about it.
const maxOverdue = timestamp(400 * time.Millisecond)

// behind reports whether there is something to read that was there when the last
// message was delivered.
func (f *feed) behind() bool { return f.pending > 0 || f.source.hasMail() }

// due takes out what has come to its deadline.
func (f *feed) due(now timestamp) []*tracked {
	var due []*tracked
	for t := f.expiries.due(now); t != nil; t = f.expiries.due(now) {
		due = append(due, f.alive[t.key])
	}
	return due
}

// A finding is what the leader has of a key that the feed asked about.
type finding struct {
	t        *tracked
	revision uint64 // that the key had for the feed when it was asked
	probeResult
}

// probe asks the leader for the last sequences of keys.
func (f *feed) probe(keys []*tracked, then func([]finding)) {
	findings, names := make([]finding, len(keys)), make([]string, len(keys))
	for i, t := range keys {
		findings[i], names[i] = finding{t: t, revision: t.revision}, t.key
	}
	if len(keys) == 0 {
		then(findings)
		return
	}
	f.b.start(func() {
		for i, result := range f.b.probe(newBudget(f.b.life), names) {
			findings[i].probeResult = result
		}
		f.post(func() { then(findings) })
	})
}

// expired reports the expiries of keys that were due, by what the leader has.
func (f *feed) expired(findings []finding) {
	f.asking = false
	for _, found := range findings {
		t := found.t
		switch {
		case f.alive[t.key] != t || t.revision != found.revision:
			// It was refreshed, or is gone, as has been reported.
		case !found.known:
			// A write is under way, or nobody leads. Ask again.
			f.expiries.set(&t.expiring, t.deadline)
			f.deferred = time.Now().Add(20 * time.Millisecond)
		case found.last > t.revision:
			// It was replaced, in time or not: what is on its way here decides.
			f.doubtful[t.key] = t
		default:
			f.gone(t, t.revision, t.deadline)
		}
	}
}

// suspect looks whether keys that seem to have been removed without a message
// still exist.
func (f *feed) suspect(suspects []*tracked) {
	if len(suspects) == 0 {
		return
	}
	f.probe(suspects, func(findings []finding) {
		if f.settle(findings) {
			f.listPause = stateLife // there may be more removals
		}
	})
}

// settle deals with keys that may have been removed without a message, by what
// the leader has. It reports whether any was.
func (f *feed) settle(findings []finding) (removed bool) {
	for _, found := range findings {
		t := found.t
		switch {
		case f.alive[t.key] != t || t.revision != found.revision:
			// It was refreshed, or is gone, as has been reported.
		case !found.known, found.last > t.revision:
			f.doubtful[t.key] = t
		case found.last == 0:
			f.gone(t, t.revision, f.removedAt(t))
			removed = true
		case t.deadline != 0:
			f.expiries.set(&t.expiring, t.deadline) // no newer write was accepted
		}
	}
	return removed
}

// removedAt returns when a key was removed, of which only the absence is known.
func (f *feed) removedAt(t *tracked) timestamp {
	if now := f.b.clock.now(); !t.deadline.passed(now) {
		return now
	}
	return t.deadline
}

// recheck asks again about keys whose newer revision has not arrived: it may
// have been removed since.
func (f *feed) recheck() {
	var again []*tracked
	for key, t := range f.doubtful {
		delete(f.doubtful, key)
		if f.alive[key] == t {
			again = append(again, t)
		}
	}
	if len(again) == 0 {
		return
	}
	f.probe(again, func(findings []finding) { f.settle(findings) })
}

// askProgress finds out how far the feed has come, and marks it for the
// watches. What it marks is a moment at which the consumer had nothing left to
// deliver of all that the leader had when asked: a message that was replaced
// before it could be delivered has been followed by what replaced it.
func (f *feed) askProgress(ctx context.Context) {
	f.post(func() {
		source := f.source
		if source == nil {
			return
		}
		f.b.start(func() {
			asked, t := time.Now(), newBudget(ctx)
			info, err := f.b.info(t)
			if err != nil {
				return
			}
			msg, err := f.b.leaderMsg(t, f.b.filter(f.pattern))
			if err != nil {
				return
			}
			var last uint64 // the last message that it has to come to
			if msg != nil {
				last = msg.Seq
			}
			for {
				var at consumerInfo
				if err := f.b.call(t, "CONSUMER.INFO", f.b.stream+"."+source.name, nil, &at); err != nil {
					return
				}
				if at.Pending == 0 && at.Delivered.Seq >= last {
					f.post(func() {
						f.targets = append(f.targets, target{source, at.Delivered.Count, progress{info.State.LastSeq, asked}})
						f.reachTargets()
					})
					return
				}
				// It has more to deliver, or is on a replica that lags.
				if !t.wait(f.b.life) || time.Since(asked) > opTimeout {
					return
				}
			}
		})
	})
}

// reachTargets marks the progress that has been made.
func (f *feed) reachTargets() {
	f.targets = slices.DeleteFunc(f.targets, func(at target) bool {
		if at.source != f.source {
			return true
		}
		if f.source.count < at.count {
			return false
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, w := range f.watches {
			w.advance(at.progress)
		}
		return true
	})
}
