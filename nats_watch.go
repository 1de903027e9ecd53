package state

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// watchBatch is how many messages a watch asks for at a time.
	watchBatch = 512
	// heartbeat is how often the server says that there is nothing to say. A
	// watch that hears nothing for a little more than two of them looks for
	// another server.
	heartbeat   = time.Second
	maxSilence  = 2*heartbeat + 200*time.Millisecond
	pullExpires = 30 * time.Second
	// watchLife is for how long a server keeps the consumer of a watch that is
	// gone without a word.
	watchLife = 10 * time.Second
)

// A natsWatch is one watch. One goroutine, that of run, owns it: it reads what
// the consumer delivers, keeps track of the keys that exist, and pushes events
// to the subscription, whose goroutine hands them to the reader.
type natsWatch struct {
	s       *NATSStore
	b       *bucket
	pattern pattern
	box     *subscription

	hearsay *hearsay
	source  *consumer       // nil while it is cut off
	epoch   context.Context // done when the connection has been broken since
	asked   int             // messages that the server may still send
	heard   time.Time       // when something came last
	heardAt timestamp       // the same by the server's clock, which no pause of ours stops
	cursor  uint64          // the last sequence that was dealt with
	created time.Time       // the stream's, which tells it from another of its name

	// alive are the matching keys that exist for all that was told, and when
	// they end. What ends is on the expiryQueue.
	alive       map[string]*tracked
	expiryQueue expiryQueue
	pause       time.Time // until when it does not look at what has ended
}

// A tracked is a key that exists.
type tracked struct {
	expiring
	revision uint64
	created  timestamp
}

// ended reports whether the key had come to its deadline when r, a later record
// of it, was written. What was written in between may have been missed: a
// record of the same creation tells that it never ended.
func (t *tracked) ended(r *record) bool {
	return (t.deadline.passed(r.modified) || r.expiry) && t.created != r.created
}

// WatchContext implements [ContextWatcher].
func (s *NATSStore) WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	p, err := parsePattern(pattern)
	if err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w := &natsWatch{
		s: s, b: s.data, pattern: p, box: newSubscription(), heard: time.Now(),
		alive: make(map[string]*tracked),
	}
	reader := make(chan *KeyValue)
	if w.hearsay, err = s.data.listen(p); err == nil {
		err = w.attach(ctx)
	}
	if err != nil {
		w.end()
		if apiCode(err) == codeNoStream || s.nc.IsClosed() {
			return nil, ErrWatchClosed
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, opError("watch", pattern, err)
	}
	// The lock makes sure that Close waits for what is started here.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		w.end()
		return nil, ErrClosed
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	s.active.Go(func() {
		defer stop()
		defer cancel()
		w.box.deliver(reader, ctx.Done(), s.life.Done())
	})
	s.active.Go(func() {
		s.watches.Add(1)
		defer s.watches.Add(-1)
		w.run(ctx)
	})
	return reader, nil
}

// Why a watch ends.
var (
	errBucketGone = errors.New("the bucket is gone")
	errCutTooLong = errors.New("cut off for too long")
)

// attach connects the watch to the stream: the first time from now on, else
// from where it was.
func (w *natsWatch) attach(ctx context.Context) error {
	w.epoch = w.b.epoch.Load().ctx
	info, err := w.b.info(newCall(ctx))
	if err != nil {
		return err
	}
	first, resumedAt := w.created.IsZero(), w.cursor
	switch {
	case first:
		w.created, w.cursor = info.Created, info.State.LastSeq
		w.hearsay.start = w.cursor
	case !w.created.Equal(info.Created) || info.State.LastSeq < w.cursor:
		return errBucketGone
	case timestamp(info.Now.UnixNano())-w.heardAt > timestamp(w.maxCut()):
		return errCutTooLong
	}
	w.hearsay.from = info.State.LastSeq
	source, err := w.b.consume(newCall(ctx), w.b.filter(w.pattern), w.cursor+1, false, watchBatch, watchLife)
	if err != nil {
		return err
	}
	w.source, w.asked = source, 0
	if err := w.pull(); err != nil {
		return err
	}
	// What exists, and until when, no event tells.
	all, err := w.b.list(ctx, w.pattern)
	if err != nil {
		return err
	}
	w.hear()
	if first {
		now := w.b.clock.now()
		for _, l := range all {
			if !l.deleted && l.revision <= w.cursor && !l.deadline.passed(now) {
				w.track(l.key, l.revision, l.created, l.deadline)
			}
		}
		return nil
	}
	w.missed(all, resumedAt)
	return nil
}

// missed compares what exists with what existed when the watch was cut off. A
// key that is not there any more, and left no message either, was removed by
// the server or by hand.
func (w *natsWatch) missed(all []listed, resumedAt uint64) {
	there := make(map[string]bool, len(all))
	for _, l := range all {
		there[l.key] = true
	}
	now := w.b.clock.now()
	for key, t := range w.alive {
		switch {
		case there[key] || t.revision > resumedAt:
		case !t.deadline.passed(now):
			w.gone(t, t.revision, now)
		case t.index == 0: // expire took it for replaced
			w.gone(t, t.revision, t.deadline)
		}
	}
}

// hear takes note that the watch is connected.
func (w *natsWatch) hear() {
	w.heard, w.heardAt = time.Now(), w.b.clock.now()
}

// maxCut is for how long the watch may be cut off: a deletion must still be
// there when it comes back.
func (w *natsWatch) maxCut() time.Duration {
	if maxAge := w.b.setup.Load().MaxAge; maxAge > 0 {
		return min(w.s.maxCut, maxAge)
	}
	return w.s.maxCut
}

func (w *natsWatch) detach() {
	if w.source != nil {
		w.source.stop()
		w.source = nil
	}
}

func (w *natsWatch) end() {
	w.detach()
	w.hearsay.stop()
}

// pull keeps the server supplied with requests.
func (w *natsWatch) pull() error {
	if w.asked > watchBatch/2 {
		return nil
	}
	batch := watchBatch - w.asked
	w.asked += batch
	return w.source.pull(pullRequest{Batch: batch, Expires: pullExpires, Heartbeat: heartbeat})
}

func (w *natsWatch) track(key string, revision uint64, created, deadline timestamp) {
	t := w.alive[key]
	if t == nil {
		t = &tracked{expiring: expiring{key: key}}
		w.alive[key] = t
	}
	t.revision, t.created = revision, created
	w.expiryQueue.set(&t.expiring, deadline)
}

// gone tells that a key does not exist any more.
func (w *natsWatch) gone(t *tracked, revision uint64, at timestamp) {
	w.expiryQueue.drop(&t.expiring)
	delete(w.alive, t.key)
	w.box.push(deletion(t.key, revision, at))
}

// run is the watch's loop.
func (w *natsWatch) run(ctx context.Context) {
	defer w.box.end()
	defer w.end()
	silence := time.NewTicker(heartbeat)
	defer silence.Stop()
	expiry := time.NewTimer(0)
	defer expiry.Stop()
	for {
		var msgs chan *nats.Msg
		if w.source != nil {
			msgs = w.source.msgs
		}
		var err error
		select {
		case <-ctx.Done():
			return
		case msg := <-msgs:
			err = w.take(ctx, msg)
		case <-expiry.C:
			err = w.expire(ctx)
		case <-silence.C:
			w.hearsay.sweep()
			if w.s.nc.IsClosed() {
				return
			}
			if time.Since(w.heard) > maxSilence {
				err = errors.New("no heartbeat")
			}
		case <-w.epoch.Done():
			err = nats.ErrDisconnected
			if n := w.s.watches.Load(); n > 10 { // they all come back now
				w.sleep(ctx, rand.N(time.Duration(n)*time.Millisecond))
			}
		}
		if err != nil && !w.reattach(ctx) {
			return
		}
		if next := w.expiryQueue.next(); next != 0 {
			expiry.Reset(max(time.Duration(next-w.b.clock.now()), time.Until(w.pause), 0))
		} else {
			expiry.Stop()
		}
	}
}

func (w *natsWatch) sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// reattach connects the watch again after trouble. It reports whether the watch
// goes on.
func (w *natsWatch) reattach(ctx context.Context) bool {
	var missing time.Time // since when the bucket is not found
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		w.detach()
		if ctx.Err() != nil || w.s.nc.IsClosed() {
			return false
		}
		if w.s.nc.IsConnected() {
			switch err := w.attach(ctx); {
			case err == nil:
				return true
			case err == errBucketGone, err == errCutTooLong:
				return false
			case apiCode(err) != codeNoStream:
				missing = time.Time{}
			case missing.IsZero():
				missing = time.Now() // servers that are coming up may not know it yet
			case time.Since(missing) > goneFor:
				return false
			}
		}
		if time.Since(w.heard) > w.maxCut() {
			return false
		}
		if w.epoch.Err() != nil {
			pause = 20 * time.Millisecond
		}
		w.sleep(ctx, pause/2+rand.N(pause))
	}
}

// take deals with what the consumer sent.
func (w *natsWatch) take(ctx context.Context, msg *nats.Msg) error {
	d, status, err := w.source.accept(msg)
	if err != nil {
		return err
	}
	w.hear()
	switch status {
	case "":
	case "100": // heartbeat
		return nil
	case "408": // the request's time is up
		unsent, _ := strconv.Atoi(msg.Header.Get("Nats-Pending-Messages"))
		w.asked -= unsent
		return w.pull()
	default:
		return fmt.Errorf("status %s", status)
	}
	w.b.clock.observe(d.written)
	w.asked--
	w.cursor = d.seq
	if key, ok := w.b.key(w.pattern, msg.Subject); ok {
		w.tellMissed(ctx, key, msg, d)
		w.tell(key, decode(msg.Header, msg.Data, d.seq, d.written, w.b.setup.Load().MaxAge))
	}
	return w.pull()
}

// tellMissed tells what was replaced by what was delivered now, before it was
// delivered itself.
func (w *natsWatch) tellMissed(ctx context.Context, key string, msg *nats.Msg, d delivery) {
	var since uint64
	if t := w.alive[key]; t != nil {
		since = t.revision
	}
	for _, m := range w.hearsay.missed(ctx, key, since, msg) {
		w.tell(key, decode(m.msg.Header, m.msg.Data, m.revision, min(m.at, d.written), w.b.setup.Load().MaxAge))
	}
	w.hearsay.settle(key, d.seq, d.written)
}

// tell pushes the events that a record of a key amounts to, given what was told
// before.
func (w *natsWatch) tell(key string, r record) {
	t := w.alive[key]
	if t != nil && r.revision <= t.revision {
		return
	}
	if t != nil && t.ended(&r) {
		// It had expired before this was written.
		at := t.deadline
		if at == 0 {
			at = r.modified
		}
		w.gone(t, t.revision, at)
		t = nil
	}
	if !r.deleted {
		w.track(key, r.revision, r.created, r.deadline)
		w.box.push(r.event(key, r.deadline))
	} else if t != nil {
		w.gone(t, r.revision, r.modified)
	}
}

// expire tells the expiries that are due, if the leader has nothing newer of
// the key: a refresh may be on its way to here, or still on its way into the
// stream.
func (w *natsWatch) expire(ctx context.Context) error {
	if w.source == nil {
		return nil
	}
	if next := w.expiryQueue.next(); next == 0 || !next.passed(w.b.clock.now()) {
		return nil
	}
	// The server's clock may have been set back, or another server leads now.
	info, err := w.b.info(newCall(ctx))
	if err != nil {
		return err
	}
	now := timestamp(info.Now.UnixNano())
	var due []*tracked
	for t := w.expiryQueue.due(now); t != nil; t = w.expiryQueue.due(now) {
		due = append(due, w.alive[t.key])
	}
	if len(due) == 0 {
		return nil
	}
	latest, err := w.latest(ctx, due)
	arrived := false // all that the stream has for the watch
	for _, r := range latest {
		if r.revision == 0 && err == nil {
			// The server has removed it, or else what had replaced it.
			arrived, err = w.source.drained(newCall(ctx))
			break
		}
	}
	for _, t := range due {
		last, known := latest[t.key]
		switch {
		case known && last.revision > t.revision:
			// It was replaced, in time or not: what will come tells.
		case known && last.revision == t.revision,
			known && last.revision == 0 && arrived && !w.contested(t):
			w.gone(t, t.revision, t.deadline)
		default:
			// Not learnt, or from a leader that is none any more, or a replacement
			// may be on its way to here. Ask again.
			w.expiryQueue.set(&t.expiring, t.deadline)
			w.pause = time.Now().Add(20 * time.Millisecond)
		}
	}
	return err
}

// contested reports whether what was overheard may have replaced an entry: on
// several servers the consumer's may be behind.
func (w *natsWatch) contested(t *tracked) bool {
	return w.b.replicated() && w.hearsay.contested(t.key, t.revision)
}

// latest returns the last records of the keys, of those that it could learn.
func (w *natsWatch) latest(ctx context.Context, due []*tracked) (map[string]record, error) {
	var (
		mu     sync.Mutex // guards what follows
		latest = make(map[string]record, len(due))
		failed error
		rest   = due
	)
	next := func() *tracked {
		mu.Lock()
		defer mu.Unlock()
		if len(rest) == 0 || failed != nil {
			return nil
		}
		t := rest[0]
		rest = rest[1:]
		return t
	}
	ask := func() {
		for t := next(); t != nil; t = next() {
			r, err := w.b.settled(newCall(ctx), t.key)
			mu.Lock()
			if err != nil {
				failed = err
			} else {
				latest[t.key] = r
			}
			mu.Unlock()
		}
	}
	// Together they ask in a fraction of the time that one would take if a
	// thousand keys end at once.
	var askers sync.WaitGroup
	for range min(len(due)-1, 7) {
		askers.Go(ask)
	}
	ask()
	askers.Wait()
	return latest, failed
}
