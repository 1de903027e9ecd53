package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
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
	// shortestLife is the shortest time for which the server keeps a message.
	shortestLife = time.Second
	// watchLife is how long a server keeps the consumer of a feed that went
	// away without a word.
	watchLife = 10 * time.Second
	// attachPause is roughly the first pause before a feed attaches again;
	// maxAttachPause is the longest.
	attachPause    = 20 * time.Millisecond
	maxAttachPause = 500 * time.Millisecond
	// maxLag is how long a consumer may stay behind the leader without progress.
	maxLag = 10 * time.Second
	// refusedFor is how long a feed that is refused tries to attach again
	// before it ends.
	refusedFor = 2 * time.Second
	// staleFor is how long the leader of several servers may not have what a feed
	// has read already: one that was cut off continues to lead for up to 20 seconds.
	staleFor = 30 * time.Second
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
	ctx     context.Context // ends with the last watch, and with the store
	quit    context.CancelFunc

	ready chan struct{} // closed when it is attached, or has failed
	err   error         // why it has failed; set before ready is closed

	mu      sync.Mutex // guards what follows
	watches []*natsWatch
	posted  []func()
	ended   bool
	wake    chan struct{} // of one slot: something was posted

	refs int         // how many watches hold it; guarded by feeds.mu
	lost atomic.Bool // it ends because the servers have lost what it has reported

	// What follows is owned by run.

	attachment
	liveKeys
	stopping bool // it has come to its end
}

func newFeed(b *bucket, p pattern, maxCut time.Duration, follow bool) *feed {
	f := &feed{
		b: b, pattern: p, maxCut: maxCut,
		ready: make(chan struct{}), wake: make(chan struct{}, 1),
		attachment: attachment{lastContact: time.Now(), retry: backoff{attachPause, maxAttachPause}},
		liveKeys:   newLiveKeys(follow),
	}
	f.ctx, f.quit = context.WithCancel(b.life)
	return f
}

// An attachment is a feed's connection to the stream.
type attachment struct {
	source   *consumer // nil while it is cut off
	heard    bool      // the last one has delivered something
	held     bool      // what it delivers is not read: a message is being read from the leader
	epoch    *epoch    // of the connection that the source is on
	asked    int       // messages that the server may still send
	created  time.Time // the stream's, which distinguishes it from another of its name; never changed once the feed is ready
	openedAt timestamp // by the server's clock

	// gaps is how often the feed may have missed a message for good: it was attached
	// again, or the server had no request for longer than the shortest life.
	gaps     int
	pulledAt time.Time // when the last request was sent
	idle     time.Time // since when the server may have had none; zero if it has one

	cursor  uint64 // the last sequence that was dealt with
	pending uint64 // how many messages there were behind it
	targets []target

	retry         backoff   // the pauses between attempts to attach
	refusal       time.Time // since when attaching has been refused
	missing       time.Time // since when the bucket has not been found
	stale         time.Time // since when the leader has not had what was read here
	cut           time.Time // since when it is cut off
	lastContact   time.Time // when something came last
	lastContactAt timestamp // the same by the server's clock, which no pause of ours stops

	measuring    bool // it is being found out how far the feed has come
	measureAgain bool // and is to be once more

	suspected bool   // it is being found out whether the link is just slow
	laggard   string // the server that the source was on when it was given up because that lags

	readSeq      uint64    // how far the consumer has read the stream
	lastReadSeq  uint64    // and how far when it was last seen to make progress
	goalSeq      uint64    // the sequence that it must reach
	goalSeqSince time.Time // since when it has made no progress
}

// A target is a progress that holds once so many messages have been read from a
// consumer.
type target struct {
	source *consumer
	count  uint64
	progress
}

// Why a feed ends.
var (
	errBucketGone = errors.New("the bucket is gone")
	errWritesLost = errors.New("the servers have lost acknowledged writes")
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
		return errFeedEnded // the bucket was created again, which the feed will notice
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return errFeedEnded
	}
	w.beginAt(info.State.LastSeq, timestamp(info.Now.UnixNano()))
	return nil
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

// post queues do for run to execute. It reports false if the feed has ended.
func (f *feed) post(do func()) bool {
	f.mu.Lock()
	ended := f.ended
	if !ended {
		f.posted = append(f.posted, do)
	}
	f.mu.Unlock()
	notify(f.wake)
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
	for !f.stopping {
		var mail <-chan *nats.Msg
		var broken <-chan struct{}
		if f.source != nil {
			broken = f.epoch.over
			if !f.held {
				mail = f.source.mail
			}
		}
		select {
		case <-f.ctx.Done():
			return
		case <-f.wake:
			f.runPosted()
		case msg := <-mail:
			f.read(msg)
		case <-expiry.C:
			f.expire()
		case <-ticker.C:
			f.checkHealth()
		case <-broken:
			f.cutOff("the connection was lost")
		}
		if next := f.expiries.nextDue(); next != 0 && !f.asking && f.source != nil {
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
	f.stopping = true
	f.b.log.Warn("state: a watch ends", "bucket", f.b.name, "pattern", f.pattern.String(), "reason", err)
}

// A newSource is what a feed attaches to.
type newSource struct {
	info   *streamInfo
	source *consumer
	epoch  *epoch
}

// attach connects the feed to the stream: the first time from now on, else from
// where it was.
func (f *feed) attach() {
	from := origin{f.created.IsZero(), f.cursor, f.created, f.lastContactAt, f.maxCut, f.laggard}
	f.b.start(func() {
		a, err := f.connect(from)
		if !f.post(func() { f.attached(a, err) }) && a.source != nil {
			a.source.stop()
		}
	})
}

// An origin is where a feed attaches, as its fields were then.
type origin struct {
	first         bool // from now on
	cursor        uint64
	created       time.Time
	lastContactAt timestamp
	maxCut        time.Duration
	laggard       string
}

// connect makes the consumer, also if the connection is lost meanwhile. It owns
// nothing of the feed.
func (f *feed) connect(from origin) (a newSource, err error) {
	budget := newBudget(f.ctx)
	for {
		if a, err = f.tryToConnect(budget, from); err == nil || !passing(err) || !f.b.wait(budget) {
			return a, err
		}
		f.b.retrying(budget, f.b.filter(f.pattern))
	}
}

func (f *feed) tryToConnect(budget *retryBudget, from origin) (a newSource, err error) {
	if a.epoch, err = f.b.connected(budget); err != nil {
		return a, err
	}
	if a.info, err = f.b.info(budget); err != nil {
		return a, err
	}
	maxCut := from.maxCut
	if maxAge := a.info.config.MaxAge; maxAge > 0 {
		maxCut = min(maxCut, maxAge)
	}
	switch {
	case from.first:
		from.cursor = a.info.State.LastSeq
	case !from.created.Equal(a.info.Created):
		return a, errBucketGone
	case a.info.State.LastSeq < from.cursor && f.b.replicated():
		return a, errStaleLeader
	case a.info.State.LastSeq < from.cursor:
		return a, errWritesLost
	case timestamp(a.info.Now.UnixNano())-from.lastContactAt > timestamp(maxCut):
		return a, errCutTooLong
	}
	a.source, err = f.b.consume(budget, consumption{
		filter: f.b.filter(f.pattern), from: from.cursor + 1, avoid: from.laggard, batch: watchBatch, life: watchLife,
	})
	return a, err
}

// attached takes over a new connection, or decides what to do without.
func (f *feed) attached(a newSource, err error) {
	if err == nil {
		if !f.created.IsZero() {
			f.gaps++
		}
		f.source, f.epoch, f.asked, f.pending, f.idle, f.heard = a.source, a.epoch, 0, 0, time.Time{}, false
		f.goalSeq, f.goalSeqSince = 0, time.Now()
		f.noteContact()
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
	f.refusal, f.missing, f.stale, f.cut = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	for key, what := range f.unconfirmed {
		f.unconfirmed[key] = awaited{what.t, 0} // the servers may have lost what was on its way
	}
	f.looked = a.info.State
	if f.created.IsZero() {
		f.created, f.cursor, f.openedAt = a.info.Created, a.info.State.LastSeq, timestamp(a.info.Now.UnixNano())
		f.maxAge = a.info.config.MaxAge
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
	// The consumer does not deliver what existed before: that is listed.
	f.list()
}

// notAttached decides what to do after an attempt to attach has failed.
func (f *feed) notAttached(err error) {
	if f.created.IsZero() {
		f.err, f.stopping = err, true // it never began
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
	stale := since(&f.stale, err == errStaleLeader)
	refused := since(&f.refusal, apiCode(err) != 0 && !passing(err) || errors.Is(err, nats.ErrPermissionViolation))
	f.lost.Store(err == errWritesLost || stale > staleFor)
	switch {
	case f.lost.Load(), err == errBucketGone, err == errCutTooLong, f.b.isClosed(),
		gone > goneAfter, refused > refusedFor, time.Since(f.lastContact) > f.maxCut:
		f.endBecause(err)
		return
	}
	f.later(f.retry.next(), f.attach)
}

// later posts something after a time, unless the feed has ended.
func (f *feed) later(d time.Duration, do func()) {
	f.b.start(func() {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
			f.post(do)
		case <-f.ctx.Done():
		}
	})
}

// itLags is a reason to give a source up: another one on the same server would lag, too.
const itLags = "the consumer's server lags behind the leader"

// cutOff gives the source up and attaches again.
func (f *feed) cutOff(reason string) {
	f.laggard = ""
	if reason == itLags && f.source != nil && f.b.replicated() {
		f.laggard = f.source.info.Cluster.Server
	}
	f.detach()
	f.cut = time.Now()
	f.b.stats.cuts.Add(1)
	f.b.log.Warn("state: a watch was cut off", "bucket", f.b.name, "pattern", f.pattern.String(), "reason", reason)
	if f.heard || !f.b.up() {
		f.attach()
	} else {
		f.later(f.retry.next(), f.attach) // the next source may not work either
	}
}

func (f *feed) detach() {
	if f.source != nil {
		f.source.stop()
		f.source = nil
	}
	f.held, f.targets, f.measuring, f.measureAgain = false, nil, false, false
}

// noteContact notes that the feed is connected.
func (f *feed) noteContact() { f.lastContact, f.lastContactAt = time.Now(), f.b.clock.now() }

// pull keeps the server supplied with requests.
func (f *feed) pull() error {
	if f.asked > watchBatch/2 {
		return nil
	}
	f.pulledAt = time.Now()
	n, err := f.source.pull(pullRequest{Batch: watchBatch - f.asked, Expires: pullExpires, Heartbeat: heartbeat})
	f.asked += n
	return err
}

// checkHealth is what the feed does now and then.
func (f *feed) checkHealth() {
	s := f.b.settings.Load()
	switch {
	case f.b.isClosed():
		f.endBecause(nats.ErrConnectionClosed)
		return
	case f.source == nil:
		return
	case !s.created.Equal(f.created):
		f.endBecause(errBucketGone)
		return
	case time.Since(f.lastContact) > maxSilence:
		f.suspect("no heartbeat", func() bool { return time.Since(f.lastContact) > maxSilence })
		return
	case f.lags():
		f.suspect(itLags, f.lags)
		return
	}
	if len(f.unconfirmed) > 0 {
		f.recheck()
	}
	maps.DeleteFunc(f.recentDeletions, func(_ string, b reportedDeletion) bool { return time.Since(b.at) > recentDeletionLife })
	if !f.behind() && (f.lastState == nil || f.lastState.LastSeq <= max(f.readSeq, f.cursor)) {
		// What was written when the last state was taken has been read.
		f.detectRemovals(f.lastState)
		f.lastState = f.b.settings.Load().state
	}
	if time.Since(s.checked) > stateLife-heartbeat/2 {
		f.b.check()
	}
}

// suspect gives the source up if it delivers nothing although the connection works.
// If a large message is still arriving over a narrow link, it waits: giving up would
// only have the message sent again.
func (f *feed) suspect(reason string, still func() bool) {
	if f.suspected {
		return
	}
	f.suspected = true
	source := f.source
	f.b.start(func() {
		ctx, cancel := context.WithTimeout(f.ctx, time.Minute)
		defer cancel()
		// What the server had sent before this comes before its answer.
		err := f.b.nc.FlushWithContext(ctx)
		f.post(func() {
			f.suspected = false
			if err == nil && f.source == source && source != nil && len(source.mail) == 0 && still() {
				f.cutOff(reason)
			}
		})
	})
}

// lags reports whether the consumer is behind what the leader had and has not got
// on for a while: it may be on a replica that does not.
func (f *feed) lags() bool {
	if f.readSeq >= f.goalSeq || f.readSeq != f.lastReadSeq {
		f.lastReadSeq, f.goalSeqSince = f.readSeq, time.Now()
	}
	if f.readSeq >= f.goalSeq {
		f.goalSeq = f.b.settings.Load().state.LastSeq
	}
	return time.Since(f.goalSeqSince) > maxLag
}

// read deals with what the consumer sent: msg, and what has come since.
func (f *feed) read(msg *nats.Msg) {
	for msg != nil {
		if err := f.accept(msg); err != nil {
			f.cutOff(err.Error())
			return
		}
		if f.held {
			return
		}
		select {
		case msg = <-f.source.mail:
		default:
			msg = nil
		}
	}
	f.afterReading()
}

// afterReading is what the feed does when it has read what there was.
func (f *feed) afterReading() {
	if err := f.pull(); err != nil {
		f.cutOff(err.Error())
		return
	}
	f.reachTargets()
	if f.overdue && !f.behind() {
		f.expire()
	}
}

func (f *feed) accept(msg *nats.Msg) error {
	d, st, err := f.source.accept(msg)
	if err != nil {
		return err
	}
	if st.code == "0" {
		return nil
	}
	if !f.idle.IsZero() && time.Since(f.idle) > shortestLife {
		f.gaps++
	}
	f.idle = time.Time{}
	f.noteContact()
	switch {
	case st.code == "":
	case st.code == "100":
		f.worked()
		f.pending, f.readSeq = 0, max(f.readSeq, st.seq)
		return nil
	case st.code == "smaller":
		f.used(f.asked, f.pulledAt)
		return nil
	case st.code == "408":
		f.used(st.unsent, f.pulledAt.Add(pullExpires))
		return nil
	case st.ended:
		f.used(st.unsent, f.pulledAt)
		return nil
	default:
		return fmt.Errorf("status %s", st.code)
	}
	f.worked()
	f.b.clock.observe(d.written)
	f.used(1, f.pulledAt)
	f.pending, f.readSeq = d.pending, d.seq
	key, ok := f.b.key(f.pattern, msg.Subject)
	if ok && unreadable(msg) {
		f.readFromLeader(key, d.seq)
		return nil
	}
	f.cursor = d.seq
	if ok {
		f.report(key, decode(msg.Header, msg.Data, d.seq, d.written, f.currentAge()))
	}
	return nil
}

// worked notes that the source works.
func (f *feed) worked() { f.heard, f.retry.pause = true, attachPause }

// currentAge returns the bucket's MaxAge, and notes if other deadlines are by another
// one.
func (f *feed) currentAge() time.Duration {
	age := f.b.settings.Load().MaxAge
	if age != f.maxAge {
		f.maxAge = mixedAges
	}
	return age
}

// used notes that the server has used up some of what it was asked for, not before a
// time.
func (f *feed) used(n int, since time.Time) {
	if f.asked -= min(n, f.asked); f.asked == 0 {
		f.idle = since
	}
}

// readFromLeader reads a message from the leader because its headers could not be
// decoded, and reports it. What follows the message is read afterwards.
func (f *feed) readFromLeader(key string, seq uint64) {
	f.held = true
	source := f.source
	f.b.start(func() {
		budget := newBudget(f.ctx)
		msg, err := f.b.storedAt(budget, key, seq)
		if err != nil {
			_ = f.b.pause(budget, checkInterval, nil)
		}
		f.post(func() {
			switch {
			case f.source != source:
				// It was cut off, and gets the message again.
			case err != nil:
				f.cutOff(err.Error())
			default:
				f.held, f.cursor = false, seq
				if msg != nil {
					f.report(key, msg.record(f.currentAge()))
				}
				f.afterReading()
			}
		})
	})
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
	if r.deleted && r.expired != 0 {
		f.reportExpiry(key, t, &r)
		return
	}
	if t != nil && (t.ended(&r) || r.expiry) {
		// It had expired before this was written.
		at := t.deadline
		if at == 0 {
			at = r.modified
		}
		f.reportDeletion(t, t.revision, at)
		t = nil
	}
	switch {
	case !r.deleted:
		f.track(key, &r, f.gaps, false)
		f.push(r.event(key, r.deadline))
	case t != nil:
		f.reportDeletion(t, r.revision, r.modified)
	case f.unseen(key, &r):
		f.recentDeletions[key] = reportedDeletion{r.created, time.Now()}
		f.push(deletion(key, r.revision, r.modified))
	}
}

// reportExpiry reports the expiry that a watch has marked. The value may never have
// been delivered.
func (f *feed) reportExpiry(key string, t *tracked, r *record) {
	switch {
	case t != nil:
		f.reportDeletion(t, r.expired, r.replaced)
	case !f.listed && r.replaced > f.openedAt:
		f.push(deletion(key, r.expired, r.replaced)) // it existed before the feed, whose first listing is not complete
	}
}

// unseen reports whether a marker deleted a value that was never delivered: it
// was replaced by the marker before that, or it existed before the feed, which
// has not been listed yet. Our markers say when the key came into being. Other
// clients' do not, and may delete what does not exist.
func (f *feed) unseen(key string, r *record) bool {
	last, reported := f.recentDeletions[key]
	if r.op == "" {
		return !f.listed && !reported
	}
	return r.created != 0 && r.created != last.created
}

// askProgress finds out how far the feed has come, and marks it for the watches.
func (f *feed) askProgress() { f.post(f.measure) }

// measure is askProgress on the feed's goroutine. It makes one measurement at a time:
// what was acknowledged after that began may not be in it, and takes another one.
func (f *feed) measure() {
	source := f.source
	if source == nil {
		return
	}
	if f.measuring {
		f.measureAgain = true
		return
	}
	f.measuring = f.b.start(func() {
		at, err := f.measureProgress(source)
		f.post(func() {
			if f.source != source {
				return
			}
			again := f.measureAgain
			f.measuring, f.measureAgain = false, false
			if err == nil {
				f.targets = append(f.targets, at)
				f.reachTargets()
			}
			if again {
				f.measure()
			}
		})
	})
}

// measureProgress returns a target at which the consumer had nothing left to
// deliver of all that the leader had when asked: a message that was replaced
// before it could be delivered has been followed by what replaced it.
func (f *feed) measureProgress(source *consumer) (at target, err error) {
	asked, budget := time.Now(), newBudget(f.ctx)
	info, err := f.b.info(budget)
	if err != nil {
		return at, err
	}
	msg, err := f.b.leaderMsg(budget, f.b.filter(f.pattern))
	if err != nil {
		return at, err
	}
	var last uint64 // the last message that it has to come to
	if msg != nil {
		last = msg.Seq
	}
	for {
		var state consumerInfo
		if err := f.b.call(budget, "CONSUMER.INFO", f.b.stream+"."+source.name, nil, &state); err != nil {
			return at, err
		}
		if state.Pending == 0 && state.Delivered.Seq >= last {
			return target{source, state.Delivered.Count, progress{info.State.LastSeq, asked}}, nil
		}
		// It has more to deliver, or is on a replica that lags.
		if !f.b.wait(budget) || time.Since(asked) > opTimeout {
			return at, errNoAnswer
		}
	}
}

// reachTargets marks the progress that has been made.
func (f *feed) reachTargets() {
	if f.held {
		return
	}
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
