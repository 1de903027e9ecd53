package state

import (
	"math"
	"time"
)

const (
	// stateLife is the greatest age of the stream's state that a feed relies on.
	// The state shows that the stream was purged, or created again.
	stateLife = 2 * time.Second
	// maxRelist is the longest time between a listing and the next search for keys
	// that were removed without a message, if the stream has changed.
	maxRelist = 10 * time.Minute
	// recentDeletionLife is how long a reportedDeletion is remembered.
	recentDeletionLife = 10 * time.Second
	// expiryPause is about how long a feed waits before it asks again about what
	// has expired. The pauses grow, up to maxExpiryPause.
	expiryPause    = 20 * time.Millisecond
	maxExpiryPause = time.Second
	// firstWindow is the number of expired keys that a feed first asks about at a
	// time. It grows when all were answered and shrinks when one was not: others may
	// ask about the same keys, and overload the server.
	firstWindow = 32
	// maxDoubts is how many times, about once a second, a feed rejects the answer of
	// a leader that knows less than the feed does: for longer than a leader that was
	// cut off continues to answer.
	maxDoubts = 30
	// maxOverdue is how long after a deadline a feed that is behind asks about it.
	maxOverdue = timestamp(400 * time.Millisecond)
)

// The liveKeys of a feed are the matching keys that exist as far as it has
// reported, and what it needs to find out when they do not exist any more.
type liveKeys struct {
	alive    map[string]*tracked
	expiries expiryQueue
	deferred time.Time // until when it does not look at what has expired
	overdue  bool      // something has expired, but there is more to read first
	again    backoff   // the pauses while what has expired cannot be found out
	window   int       // of how many keys it asks at a time
	asking   bool      // what has expired is being found out

	// Until the keys that existed before are listed, and during each later
	// listing, touched has the revisions that were read.
	expecting bool // the first listing comes from a Follow
	listed    bool // there was one
	listing   bool // there is one under way
	relist    bool // another one is to follow it
	listGaps  int  // how many gaps there were when the last one began
	touched   map[string]uint64

	recentDeletions map[string]reportedDeletion
	unconfirmed     map[string]awaited // keys with a newer revision that has not arrived

	// What was removed without a message is found out by the stream's state.
	floor     uint64 // no key alive has a revision below
	lastState *streamState
	looked    streamState // the state when last looked at
	changed   bool        // since the last listing
	shrunk    bool        // since the last listing, so that messages were removed
	lastList  time.Time
	listPause time.Duration // until the next listing of a stream that has shrunk
	maxAge    time.Duration // the bucket's, by which the deadlines of what is aged are; or mixedAges
	retrying  bool          // a listing has failed, and is to be made again
}

// An awaited is a key, and the revision of it that is to arrive; 0 if that is not known.
type awaited struct {
	t        *tracked
	revision uint64
}

// mixedAges stands for several ages.
const mixedAges = -1

func newLiveKeys(follow bool) liveKeys {
	return liveKeys{
		alive: make(map[string]*tracked), touched: make(map[string]uint64),
		recentDeletions: make(map[string]reportedDeletion), unconfirmed: make(map[string]awaited),
		expecting: follow, listPause: stateLife, floor: math.MaxUint64, window: firstWindow,
		again: backoff{expiryPause, maxExpiryPause},
	}
}

// A tracked is a key that exists.
type tracked struct {
	expiring
	revision uint64
	created  timestamp
	removal  timestamp // when the server removes it; none for 0
	unread   bool      // the revision was listed, and will be delivered
	aged     bool      // the deadline is that of the bucket's MaxAge, which may be changed
	doubts   uint8     // how often a leader has known less of it
	// gaps is the number of gaps when the key was last seen to exist, or the constant
	// replaced.
	gaps int
}

// replaced, as a number of gaps, says that the leader had a later record of the key.
const replaced = -1

// ended reports whether r, a later record of the key, shows that the value came to
// its deadline: r was written on condition that nothing had replaced the value, or
// it follows an expiry marker that was written on that condition. Any other record
// may follow a refresh that was missed. The deadline of what is aged may have been put
// off: what carries the time on at which the key was created has not followed its end.
func (t *tracked) ended(r *record) bool {
	lasted := t.aged && r.created == t.created
	return r.expired == t.revision || r.base == t.revision && t.deadline.passed(r.modified) && !lasted
}

// A reportedDeletion is the last deletion or expiry of a key that was reported: a marker
// for the same key may follow, of another client that deleted it at once, or of
// the server.
type reportedDeletion struct {
	created timestamp // of the key
	at      time.Time
}

// track takes over what a key has become by r, which was seen after so many gaps.
func (f *feed) track(key string, r *record, gaps int, unread bool) {
	t := f.alive[key]
	if t == nil {
		t = &tracked{expiring: expiring{key: key}}
		f.alive[key] = t
	}
	t.revision, t.created, t.removal, t.unread, t.aged = r.revision, r.created, r.removal, unread, r.aged
	t.doubts, t.gaps = 0, gaps
	f.floor = min(f.floor, r.revision)
	f.expiries.set(&t.expiring, r.deadline)
}

// reportDeletion reports that a key does not exist any more.
func (f *feed) reportDeletion(t *tracked, revision uint64, at timestamp) {
	f.expiries.drop(&t.expiring)
	delete(f.alive, t.key)
	delete(f.unconfirmed, t.key)
	f.recentDeletions[t.key] = reportedDeletion{t.created, time.Now()}
	if !f.listed || f.listing {
		f.touched[t.key] = max(f.touched[t.key], t.revision) // a listing may still have it
	}
	f.push(deletion(t.key, revision, at))
}

// list finds out what exists.
func (f *feed) list() {
	if f.listing {
		f.relist = true
		return
	}
	f.listing, f.relist, f.listGaps, f.changed, f.shrunk = true, false, f.gaps, false, false
	if f.listed {
		f.touched = make(map[string]uint64)
	}
	since := f.cursor
	f.b.start(func() {
		l, err := f.b.list(newBudget(f.ctx), f.pattern, false, since)
		f.post(func() { f.endListing(l, err) })
	})
}

// endListing takes over a listing, or makes another one if it has failed. A feed
// that is cut off will make one when it is back.
func (f *feed) endListing(l listing, err error) {
	f.listing = false
	switch {
	case err == nil:
		f.merge(l)
	case f.source != nil:
		f.retrying = true
		f.later(time.Second, func() {
			f.retrying = false
			f.list()
		})
		return
	}
	if f.relist {
		f.list()
	}
}

// firstListing gives a feed the listing that it expects of a Follow. If that has
// failed, the feed makes one itself.
func (f *feed) firstListing(l listing, err error) {
	f.post(func() {
		switch {
		case !f.expecting:
		case err == nil && !f.listed && !f.listing:
			f.listGaps = 0
			f.merge(l)
		case !f.created.IsZero() && !f.listed && !f.listing:
			f.list()
		}
		f.expecting = false
	})
}

// merge takes over what a listing found. What was read since the listing began
// is newer.
func (f *feed) merge(l listing) {
	over := f.openedAt // what had expired before is not reported
	if f.listed {
		over = l.now // what expired before was tracked: it was reported, or will be
	}
	var suspects []*tracked
	for key, t := range f.alive {
		if f.touched[key] == 0 && !t.deadline.passed(l.now) && !l.has(key) {
			suspects = append(suspects, t)
		}
	}
	if len(f.alive) == 0 {
		f.alive = make(map[string]*tracked, len(l.all))
	}
	for i := range l.all {
		r := &l.all[i]
		t := f.alive[r.key]
		switch {
		case t != nil && t.revision == r.revision:
			if t.gaps != replaced {
				t.gaps = max(t.gaps, f.listGaps)
			}
			if t.aged || r.aged {
				t.aged, t.removal = r.aged, r.removal
				f.expiries.set(&t.expiring, r.deadline)
			}
		case r.deleted, f.touched[r.key] >= r.revision, t != nil && t.revision > r.revision, r.deadline.passed(over):
		default:
			f.track(r.key, &r.record, f.listGaps, r.revision > f.cursor)
		}
	}
	f.listed, f.listing, f.lastList, f.maxAge = true, false, time.Now(), l.maxAge
	f.touched = make(map[string]uint64)
	f.verify(suspects)
}

// detectRemovals looks for keys that were removed without a message: what is older
// than the stream's first message is gone, and a stream that has fewer messages
// than before may have lost any. One that has as many or more may too, if others
// were added meanwhile.
func (f *feed) detectRemovals(st *streamState) {
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
		f.verify(suspects)
	}
	f.changed = f.changed || st.LastSeq != f.looked.LastSeq || st.Messages != f.looked.Messages
	f.shrunk = f.shrunk || st.Messages < f.looked.Messages
	f.looked = *st
	since := time.Since(f.lastList)
	if f.listing || len(f.alive) == 0 || !(f.shrunk && since > f.listPause || f.changed && since > maxRelist) {
		return
	}
	f.list()
	f.listPause = min(2*f.listPause, maxRelist)
}

// expire finds out which of the keys that are due were refreshed in time: a
// refresh may be on its way to here, or still on its way into the stream.
func (f *feed) expire() {
	now := f.b.clock.now()
	if f.source == nil || f.asking || !f.expiries.anyDue(now) {
		return
	}
	if f.overdue = f.behind() && !f.expiries.anyDue(now-maxOverdue); f.overdue {
		// What is on its way here may be refreshes: nothing need be asked then.
		f.deferred = time.Now().Add(expiryPause)
		return
	}
	f.asking = true
	f.b.start(func() {
		// The server's clock may have been set back, or another server leads now.
		budget := newBudget(f.ctx)
		info, err := f.b.info(budget)
		f.post(func() {
			if err != nil {
				f.asking = false
				f.deferred = time.Now().Add(checkInterval)
				return
			}
			if f.source == nil || !info.Created.Equal(f.created) {
				f.asking = false // it is cut off, or the bucket is another one
				return
			}
			altered := info.config.MaxAge != f.maxAge
			if altered {
				// A listing finds out when what is aged ends now.
				f.deferred = time.Now().Add(checkInterval)
				if !f.listing && !f.retrying {
					f.list()
				}
			}
			f.probe(f.due(timestamp(info.Now.UnixNano()), f.window, altered), true, f.expired)
		})
	})
}

// behind reports whether there is something to read that was there when the last
// message was delivered.
func (f *feed) behind() bool { return f.held || f.pending > 0 || len(f.source.mail) > 0 }

// due takes out what has come to its deadline, at most so many keys, and without what is
// aged if that has other deadlines now.
func (f *feed) due(now timestamp, most int, altered bool) []*tracked {
	var due, aged []*tracked
	for len(due) < most {
		next := f.expiries.due(now)
		if next == nil {
			break
		}
		if t := f.alive[next.key]; altered && t.aged {
			aged = append(aged, t)
		} else {
			due = append(due, t)
		}
	}
	for _, t := range aged {
		f.expiries.set(&t.expiring, t.deadline)
	}
	return due
}

// A finding is what the leader has of a key that the feed asked about.
type finding struct {
	t        *tracked
	revision uint64    // that the key had for the feed when it was asked,
	deadline timestamp // and its deadline
	probeResult
}

// probe asks the leader for the last sequences of keys, which are over or seem to
// be gone.
func (f *feed) probe(keys []*tracked, over bool, then func([]finding)) {
	findings, questions := make([]finding, len(keys)), make([]question, len(keys))
	for i, t := range keys {
		findings[i] = finding{t: t, revision: t.revision, deadline: t.deadline}
		questions[i] = f.question(t, over)
	}
	if len(keys) == 0 {
		then(findings)
		return
	}
	e, gaps := f.epoch, f.gaps
	f.b.start(func() {
		for i, result := range f.b.probe(newBudget(f.ctx), e, questions) {
			findings[i].probeResult = result
		}
		f.post(func() {
			for i := range findings {
				if findings[i].last == 0 && f.gaps != gaps {
					findings[i].known = false // a refresh may have been missed meanwhile
				}
			}
			then(findings)
		})
	})
}

// question returns what to ask about a key that is over or seems to be gone. A marker
// must prove the answer where one server's word is not enough: a replica may be cut
// off, and after a gap the feed may have missed a refresh that has since expired as
// well.
func (f *feed) question(t *tracked, over bool) question {
	replicated := f.b.replicated()
	missed := t.gaps != f.gaps
	prove := f.b.marks() && (replicated || missed)
	q := question{key: t.key}
	if !over || t.unread {
		q.mark = prove // whether it is gone
		return q
	}
	q.base = record{entry: entry{revision: t.revision}, deadline: t.deadline, removal: t.removal}
	q.mark = prove && replicated && !t.aged // no marker takes the place of what may live on
	q.markGone = q.mark || prove && missed
	return q
}

// expired reports the expiries of keys that were due, by what the leader has.
func (f *feed) expired(findings []finding) {
	f.asking = false
	unsettled := false
	for _, found := range findings {
		t := found.t
		switch {
		case f.alive[t.key] != t || t.revision != found.revision:
			// It was refreshed, or is gone, as has been reported.
		case t.deadline != found.deadline:
			// A listing has found another one.
		case found.underWay && f.b.replicated() && f.b.marks():
			// Maybe the marker of another store.
			f.unconfirmed[t.key] = awaited{t, 0}
		case !found.known, t.unread && found.last == t.revision:
			// A write is under way, nobody leads, the value has not been delivered
			// yet, the server is overloaded, or there was a gap. Ask again.
			f.expiries.set(&t.expiring, t.deadline)
			unsettled = true
		case found.last > t.revision:
			// It was replaced, in time or not: what is on its way here decides.
			f.unconfirmed[t.key] = awaited{t, found.last}
			t.gaps = replaced
		case found.last != 0 && found.last < t.revision && f.b.replicated() && t.doubts < maxDoubts:
			// A leader that was cut off is back, and does not know it yet. Or an older
			// revision has come back.
			t.doubts++
			f.unconfirmed[t.key] = awaited{t, 0}
		default:
			f.reportDeletion(t, t.revision, t.deadline)
		}
	}
	if !unsettled {
		f.again.pause = expiryPause
		if len(findings) < f.window {
			f.window = firstWindow // that was all
		} else {
			f.window = min(2*f.window, probeWindow)
		}
		return
	}
	f.window = max(f.window/4, 1)
	f.deferred = time.Now().Add(f.again.next())
}

// verify looks whether keys that seem to have been removed without a message
// still exist.
func (f *feed) verify(suspects []*tracked) {
	if len(suspects) == 0 {
		return
	}
	f.probe(suspects, false, func(findings []finding) {
		if f.applyVerified(findings) {
			f.listPause = stateLife // there may be more removals
		}
	})
}

// applyVerified deals with keys that may have been removed without a message, by what
// the leader has. It reports whether any was.
func (f *feed) applyVerified(findings []finding) (removed bool) {
	for _, found := range findings {
		t := found.t
		switch {
		case f.alive[t.key] != t || t.revision != found.revision:
			// It was refreshed, or is gone, as has been reported.
		case !found.known:
			f.unconfirmed[t.key] = awaited{t, 0}
		case found.last > t.revision:
			f.unconfirmed[t.key] = awaited{t, found.last}
			t.gaps = replaced
		case found.last == 0:
			f.reportDeletion(t, t.revision, f.removedAt(t))
			removed = true
		case t.deadline != 0:
			f.expiries.set(&t.expiring, t.deadline) // no newer write was accepted
		}
	}
	return removed
}

// removedAt returns the time to report for a key that is known only to be absent: its
// deadline if that has passed, and otherwise now.
func (f *feed) removedAt(t *tracked) timestamp {
	if now := f.b.clock.now(); !t.deadline.passed(now) {
		return now
	}
	return t.deadline
}

// recheck asks again about keys whose newer revision has not arrived, though the
// consumer has come so far: it may have been removed since.
func (f *feed) recheck() {
	var again []*tracked
	for key, what := range f.unconfirmed {
		switch {
		case f.alive[key] != what.t:
			delete(f.unconfirmed, key)
		case what.revision <= max(f.readSeq, f.cursor):
			delete(f.unconfirmed, key)
			again = append(again, what.t)
		}
	}
	if len(again) == 0 {
		return
	}
	f.probe(again, false, func(findings []finding) { f.applyVerified(findings) })
}
