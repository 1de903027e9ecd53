package state

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// patience is how long an operation goes on without progress.
	patience = 5 * time.Second
	// answerTime is how long one request waits for its answer. It is shorter,
	// so that there is time to find out what became of a lost one.
	answerTime = 2 * time.Second
)

// The error codes of the JetStream API that mean something to us.
const (
	codeUnavailable    jetstream.ErrorCode = 10008
	codeNoMessage      jetstream.ErrorCode = 10037
	codeNoAccount      jetstream.ErrorCode = 10039
	codeTooLarge       jetstream.ErrorCode = 10054
	codeNameInUse      jetstream.ErrorCode = 10058
	codeNoStream       jetstream.ErrorCode = 10059
	codeWrongSequence  jetstream.ErrorCode = 10071
	codeNotEnabled     jetstream.ErrorCode = 10076
	codeWriteInFlight  jetstream.ErrorCode = 10164
	codeHeaderTooLarge jetstream.ErrorCode = 10097
)

// apiCode returns the JetStream error code of err, 0 if it has none.
func apiCode(err error) jetstream.ErrorCode {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.ErrorCode
	}
	return 0
}

// transient reports whether a request that failed with err, and was not
// carried out, may succeed if it is made again.
func transient(err error) bool {
	return errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrDisconnected) ||
		errors.Is(err, nats.ErrReconnectBufExceeded) ||
		errors.Is(err, context.DeadlineExceeded) || apiCode(err) == codeUnavailable
}

// A call is one operation's time: it spaces out the requests that are made
// again, and ends them.
type call struct {
	ctx   context.Context
	end   time.Time
	pause time.Duration
	tries int
}

func newCall(ctx context.Context) *call {
	return &call{ctx: ctx, end: time.Now().Add(patience), pause: 500 * time.Microsecond}
}

// again waits for a moment, which is random and grows, and reports whether
// there is time left for another attempt.
func (c *call) again() bool {
	timer := time.NewTimer(c.pause/2 + mathrand.N(c.pause))
	defer timer.Stop()
	c.pause = min(2*c.pause, 100*time.Millisecond)
	select {
	case <-timer.C:
		return time.Now().Before(c.end)
	case <-c.ctx.Done():
		return false
	}
}

// retry is for an attempt that came too late. The first few are made at once:
// only who keeps losing makes room.
func (c *call) retry() bool {
	if c.tries++; c.tries > 3 {
		time.Sleep(mathrand.N(min(time.Duration(c.tries)*100*time.Microsecond, 5*time.Millisecond)))
	}
	return time.Now().Before(c.end)
}

// A link is a connection and its epochs. An epoch ends when the connection is
// back after a break: what was asked before may never be answered.
type link struct {
	nc    *nats.Conn
	epoch atomic.Pointer[epoch]
}

type epoch struct {
	ctx context.Context // done when the epoch is over
	end context.CancelFunc

	current atomic.Pointer[window]
}

// A window is a context that the requests of a short while share: one for each
// of them would be a third of what a request allocates.
type window struct {
	ctx    context.Context
	cancel context.CancelFunc
	until  time.Time
}

// windowLength is by how much a request may wait longer than answerTime.
const windowLength = answerTime / 4

// window returns a context that is done when answerTime has passed, or a little
// later, and when the epoch is over.
func (e *epoch) window() context.Context {
	now := time.Now()
	if w := e.current.Load(); w != nil && now.Before(w.until) {
		return w.ctx
	}
	w := &window{until: now.Add(windowLength)}
	w.ctx, w.cancel = context.WithTimeout(e.ctx, answerTime+windowLength)
	e.current.Store(w) // the one before ends by itself
	return w.ctx
}

func newLink(nc *nats.Conn) *link {
	l := &link{nc: nc}
	l.next()
	return l
}

// next begins the next epoch.
func (l *link) next() {
	e := new(epoch)
	e.ctx, e.end = context.WithCancel(context.Background())
	if last := l.epoch.Swap(e); last != nil {
		last.end()
	}
}

// follow keeps the epochs until quit.
func (l *link) follow(status chan nats.Status, quit <-chan struct{}) {
	defer l.nc.RemoveStatusListener(status)
	for {
		select {
		case _, open := <-status:
			l.next()
			if !open {
				return
			}
		case <-quit:
			return
		}
	}
}

// A bucket is a JetStream key-value bucket, with what this client knows of it.
type bucket struct {
	*link
	name   string
	stream string // the stream that holds it
	prefix string // what a key is preceded by to make a subject
	writer string // begins the ids of this client's writes
	writes atomic.Uint64

	created time.Time // the stream's, which tells it from another of its name
	setup   atomic.Pointer[bucketSetup]
	clock   serverClock
	known   memo
	turns   turns
}

// A bucketSetup is what its operator decided.
type bucketSetup struct {
	Replicas    int           `json:"num_replicas"`
	PerKey      int64         `json:"max_msgs_per_subject"`
	MaxMsgSize  int32         `json:"max_msg_size"`
	MaxAge      time.Duration `json:"max_age"`
	MarkerTTL   time.Duration `json:"subject_delete_marker_ttl"`
	Storage     string        `json:"storage"`
	AllowTTL    bool          `json:"allow_msg_ttl"`
	AllowDirect bool          `json:"allow_direct"`
	AllowRollup bool          `json:"allow_rollup_hdrs"`
	DenyPurge   bool          `json:"deny_purge"`
	Subjects    []string      `json:"subjects"`
}

func (s *bucketSetup) rollup() bool { return s.AllowRollup && !s.DenyPurge }

// A streamInfo is the answer to a request for a stream's state. It comes from
// the stream's leader.
type streamInfo struct {
	Config  json.RawMessage `json:"config"`
	Created time.Time       `json:"created"`
	Now     time.Time       `json:"ts"`
	State   struct {
		LastSeq uint64 `json:"last_seq"`
	} `json:"state"`
	Cluster *struct {
		Leader string `json:"leader"`
	} `json:"cluster"`

	setup bucketSetup // from Config
}

func newBucket(l *link, name string) *bucket {
	return &bucket{
		link:   l,
		name:   name,
		stream: "KV_" + name,
		prefix: "$KV." + name + ".",
		writer: rand.Text(),
		known:  memo{limit: memoLimit},
	}
}

// nextOp returns an id that no other write has.
func (b *bucket) nextOp() string {
	return string(strconv.AppendUint(append(make([]byte, 0, 64), b.writer...), b.writes.Add(1), 36))
}

// ask makes one request and waits for its answer. Its error is the cause alone.
func (b *bucket) ask(c *call, msg *nats.Msg) (*nats.Msg, error) {
	timeout := min(answerTime, time.Until(c.end))
	if timeout <= 0 {
		return nil, b.explain(context.DeadlineExceeded, msg.Subject)
	}
	answer, err := b.request(c.ctx, msg, timeout)
	if err != nil {
		return nil, b.explain(err, msg.Subject)
	}
	return answer, nil
}

func (b *bucket) request(ctx context.Context, msg *nats.Msg, timeout time.Duration) (*nats.Msg, error) {
	epoch := b.epoch.Load()
	if ctx.Done() == nil && timeout == answerTime {
		ctx = epoch.window()
	} else {
		limited, cancel := context.WithTimeout(epoch.ctx, timeout)
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		ctx = limited
	}
	answer, err := b.nc.RequestMsgWithContext(ctx, msg)
	if err != nil && err == ctx.Err() && epoch.ctx.Err() != nil {
		err = nats.ErrDisconnected
	}
	return answer, err
}

// explain adds to a request that got no answer that it was refused for lack of
// permission, which the server tells apart from it.
func (b *bucket) explain(err error, subject string) error {
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if denied := b.nc.LastError(); errors.Is(denied, nats.ErrPermissionViolation) {
		if text := denied.Error(); strings.Contains(text, subject) || strings.Contains(text, "_INBOX") {
			return fmt.Errorf("%w: %w", denied, err)
		}
	}
	return fmt.Errorf("no answer from %s: %w", subject, err)
}

// api makes a request of the JetStream API that may be repeated, until it is
// answered or out of time.
func (b *bucket) api(c *call, verb, object string, req, answer any) error {
	var data []byte
	if req != nil {
		var err error
		if data, err = json.Marshal(req); err != nil {
			return err
		}
	}
	msg := &nats.Msg{Subject: "$JS.API." + verb + "." + object, Data: data}
	for {
		err := b.apiOnce(c, msg, answer)
		if err == nil || !transient(err) || errors.Is(err, nats.ErrPermissionViolation) || !c.again() {
			return err
		}
	}
}

func (b *bucket) apiOnce(c *call, msg *nats.Msg, answer any) error {
	reply, err := b.ask(c, msg)
	if err != nil {
		return err
	}
	var failed struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(reply.Data, &failed); err != nil {
		return fmt.Errorf("answer from %s: %w", msg.Subject, err)
	}
	if failed.Error != nil {
		return failed.Error
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(reply.Data, answer); err != nil {
		return fmt.Errorf("answer from %s: %w", msg.Subject, err)
	}
	return nil
}

// info asks the leader for the stream's state, and takes what it says of its
// clock and of the bucket's setup.
func (b *bucket) info(c *call) (*streamInfo, error) {
	return b.infoBy(c, "STREAM.INFO", nil)
}

// infoBy makes a request that is answered by a stream info.
func (b *bucket) infoBy(c *call, verb string, req any) (*streamInfo, error) {
	for {
		var info streamInfo
		asked, reconnects := time.Now(), b.nc.Stats().Reconnects
		if err := b.api(c, verb, b.stream, req, &info); err != nil {
			return nil, err
		}
		if info.Cluster != nil && info.Cluster.Leader == "" {
			// Without a leader every member answers, for itself.
			if !c.again() {
				return nil, fmt.Errorf("stream %s has no leader", b.stream)
			}
			continue
		}
		if err := json.Unmarshal(info.Config, &info.setup); err != nil {
			return nil, fmt.Errorf("configuration of stream %s: %w", b.stream, err)
		}
		b.clock.set(moment(info.Now.UnixNano()), asked, reconnects)
		b.setup.Store(&info.setup)
		return &info, nil
	}
}

// last reads the last record of a key: from anybody if one server is all there
// is, else from the leader. It sees every write acknowledged before.
func (b *bucket) last(c *call, key string) (record, error) {
	setup := b.setup.Load()
	if setup.Replicas > 1 || !setup.AllowDirect {
		return b.leaderLast(c, key)
	}
	msg := &nats.Msg{Subject: "$JS.API.DIRECT.GET." + b.stream + "." + b.prefix + key}
	for {
		answer, err := b.ask(c, msg)
		if err == nil {
			switch status := answer.Header.Get("Status"); status {
			case "":
				r, err := directRecord(answer, setup.MaxAge)
				b.clock.observe(r.modified)
				return r, err
			case "404":
				return record{}, nil
			default:
				return record{}, fmt.Errorf("direct get: %s %s", status, answer.Header.Get("Description"))
			}
		}
		if errors.Is(err, nats.ErrNoResponders) {
			// The stream is gone, or not up yet; only the API tells which.
			return b.leaderLast(c, key)
		}
		if !transient(err) || !c.again() {
			return record{}, err
		}
	}
}

// leaderLast reads the last record of a key from the stream's leader.
//
// A leader that was cut off answers with what it had then. It is found out if
// this client knows of something newer.
func (b *bucket) leaderLast(c *call, key string) (record, error) {
	for {
		var r record
		msg, err := b.leaderMsg(c, b.prefix+key)
		if err == nil && msg != nil {
			r, err = msg.record(b.setup.Load().MaxAge)
			b.clock.observe(r.modified)
		}
		if err != nil {
			return record{}, err
		}
		known := b.known.recall(key)
		if known == nil || known.revision <= r.revision {
			return r, nil
		}
		// Or it was removed, or the stream is another one by now.
		info, err := b.info(c)
		if err != nil {
			return record{}, err
		}
		if info.State.LastSeq >= known.revision || !b.created.Equal(info.Created) {
			b.known.forget(key)
			return r, nil
		}
		if !c.again() {
			return record{}, errStaleLeader
		}
	}
}

var errStaleLeader = errors.New("the stream's leader has not got what it had acknowledged: it was cut off from the others")

// leaderMsg reads the last message on a subject, which may have wildcards. It
// returns nil if there is none.
func (b *bucket) leaderMsg(c *call, subject string) (*storedMsg, error) {
	var req = struct {
		LastFor string `json:"last_by_subj"`
	}{subject}
	var answer struct {
		Message *storedMsg `json:"message"`
	}
	err := b.api(c, "STREAM.MSG.GET", b.stream, req, &answer)
	if apiCode(err) == codeNoMessage {
		return nil, nil
	}
	return answer.Message, err
}

// settled returns the last record of a key, when no write is under way that may
// already have its time. On several replicas such a write has been proposed but
// is not stored yet, and a read does not see it. A write that is conditional on
// what cannot be does: the leader refuses it, and tells why. It is addressed to
// a subject that is no key.
func (b *bucket) settled(c *call, key string) (record, error) {
	if b.setup.Load().Replicas <= 1 {
		return b.last(c, key)
	}
	probe := &nats.Msg{Subject: b.prefix + ":probe", Header: nats.Header{
		headerExpected:        {strconv.Itoa(math.MaxInt64)},
		headerExpectedSubject: {b.prefix + key},
	}}
	for {
		switch _, o, err := b.send(c, probe); o {
		case busy, unavailable:
			if !c.again() {
				return record{}, err
			}
		case lost:
			return record{}, err
		default:
			// It is settled, or we may not write.
			return b.leaderLast(c, key)
		}
	}
}

// expired reports whether a deadline has passed by the server's clock, of which
// a lower bound is known. Where that is close to the deadline or might be
// wrong, the server is asked first.
func (b *bucket) expired(c *call, deadline moment) bool {
	if deadline == 0 {
		return false
	}
	now, slack, stale := b.clock.read(b.nc)
	if stale && deadline.passed(now+slack) {
		if _, err := b.info(c); err == nil {
			now, _, _ = b.clock.read(b.nc)
		}
	}
	return deadline.passed(now)
}

// An outcome is what became of a message that was to be stored.
type outcome int

const (
	stored      outcome = iota
	conflicting         // refused: the key's last revision is another one
	busy                // refused: another write to the key is under way
	unavailable         // not stored; may be sent again
	refused             // not stored; sending it again is no use
	lost                // stored or not, or not yet
)

// send has the server store a message, and returns its sequence or, if it was
// conflicting, that of the key's last message, as far as the server told.
func (b *bucket) send(c *call, msg *nats.Msg) (seq uint64, o outcome, err error) {
	if b.nc.IsClosed() {
		return 0, refused, nats.ErrConnectionClosed
	}
	reply, err := b.ask(c, msg)
	if err != nil {
		switch {
		case errors.Is(err, nats.ErrNoResponders), errors.Is(err, nats.ErrReconnectBufExceeded):
			return 0, unavailable, err
		case errors.Is(err, nats.ErrMaxPayload):
			return 0, refused, ErrValueTooLarge
		case errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), msg.Subject):
			return 0, refused, err
		case errors.Is(err, nats.ErrConnectionDraining), errors.Is(err, nats.ErrBadSubject),
			errors.Is(err, nats.ErrHeadersNotSupported):
			return 0, refused, err
		}
		return 0, lost, err
	}
	if seq, ok := ackedSeq(reply.Data); ok {
		return seq, stored, nil
	}
	var ack struct {
		Seq   uint64              `json:"seq"`
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, lost, fmt.Errorf("acknowledgement: %w", err)
	}
	if ack.Error == nil {
		return ack.Seq, stored, nil
	}
	switch ack.Error.ErrorCode {
	case codeWrongSequence:
		_, text, _ := strings.Cut(ack.Error.Description, ": ")
		last, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			last = ^uint64(0) // it did not tell
		}
		return last, conflicting, ack.Error
	case codeWriteInFlight:
		return 0, busy, ack.Error
	case codeUnavailable:
		return 0, unavailable, ack.Error
	case codeTooLarge:
		return 0, refused, ErrValueTooLarge
	}
	return 0, refused, ack.Error
}

// ackedSeq reads an acknowledgement as servers write it,
//
//	{"stream":"KV_bucket","seq":12}
//
// without the cost of a JSON decoder. It does not understand anything else: not
// an error, and not what is merely JSON of the same meaning. No string can look
// like its field, since a quote within one is escaped.
func ackedSeq(ack []byte) (seq uint64, ok bool) {
	if bytes.Contains(ack, []byte(`"error":`)) {
		return 0, false
	}
	_, rest, _ := bytes.Cut(ack, []byte(`,"seq":`))
	for i, c := range rest {
		switch {
		case '0' <= c && c <= '9' && i < 19:
			seq = seq*10 + uint64(c-'0')
		case c == ',' || c == '}':
			return seq, i > 0 && ack[len(ack)-1] == '}'
		default:
			return 0, false
		}
	}
	return 0, false
}

// A decision makes the message to be written on top of a key's last record, or
// returns the error for which nothing is written. The record that it returns is
// what the message will be, as far as that is known before.
type decision func(last *record, w entryWriter) (*nats.Msg, record, error)

var errLeaving = errors.New("the server is about to remove the key's last value, and has not")

// certain returns r, unless its deadline is only guessed, and that matters now.
func (b *bucket) certain(r *record) *record {
	if r == nil || !r.guessed || r.deadline == 0 {
		return r
	}
	if now, slack, _ := b.clock.read(b.nc); r.deadline.passed(now + slack + moment(guessMargin)) {
		return nil
	}
	return r
}

// guessMargin is how long before its deadline a guess is not good enough: the
// deadline must not pass while a write that takes it for granted is on its way.
const guessMargin = 200 * time.Millisecond

// A write is what commit is to do.
type write struct {
	key    string
	op     string   // its id, which no other write has
	last   *record  // what is believed to be the key's last record; nil if nothing is
	decide decision // may be called several times
	// idempotent says that it does no harm to be stored twice: once nobody
	// knows when, and undone by somebody else since.
	idempotent bool
}

// commit writes one message to a key, on top of exactly the record that decide
// was shown. It returns the bare errors of decide; after any other nothing was
// written, unless it wraps ErrOutcomeUnknown.
func (b *bucket) commit(c *call, do write) (record, error) {
	setup := b.setup.Load()
	w := entryWriter{
		subject: b.prefix + do.key,
		op:      do.op,
		history: setup.PerKey != 1,
		rollup:  setup.rollup(),
		markers: setup.MarkerTTL > 0,
	}
	var (
		last    = b.certain(do.last)
		doubt   error  // why an attempt may have been stored, if one may
		doubtOn uint64 // the revision that it was to be on top of
		began   = time.Now()
	)
	fail := func(err error) (record, error) {
		if doubt != nil {
			return record{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, doubt)
		}
		return record{}, err
	}
	for {
		if last == nil {
			found, err := b.leaderLast(c, do.key)
			if err != nil {
				return fail(err)
			}
			b.known.forget(do.key)
			b.known.learn(do.key, found)
			if found.op == do.op {
				return found, nil
			}
			if doubt != nil && found.revision != doubtOn {
				// If it was stored, something else is there by now; if not, it
				// never will be.
				if !do.idempotent {
					return fail(nil)
				}
				doubt = nil
			}
			last = &found
		}
		if w.markers && last.leaving(b.clock.now()) {
			// The marker that the server puts in its place would remove what is
			// written meanwhile, too.
			if time.Sleep(100 * time.Millisecond); time.Now().After(c.end) {
				return fail(errLeaving)
			}
			last = nil
			continue
		}
		w.doubtful = doubt != nil
		msg, next, err := do.decide(last, w)
		if err != nil {
			return fail(err)
		}
		if doubt != nil && next.deadline.passed(next.modified+moment(time.Since(began))) {
			return fail(nil) // it may have been stored, and have expired since
		}
		seq, o, err := b.send(c, msg)
		if o == stored {
			next.revision = seq
			b.known.learn(do.key, next)
			return next, nil
		}
		switch o {
		case conflicting:
			if last = nil; seq == 0 && doubt == nil && setup.Replicas <= 1 {
				last = &record{} // it is gone
			}
			if !c.retry() {
				return fail(err)
			}
			continue
		case refused:
			return fail(err)
		case lost:
			doubt, doubtOn, last = err, last.revision, nil
		case busy:
			last = nil
		case unavailable:
		}
		if !c.again() {
			return fail(err)
		}
	}
}

// A serverClock estimates the clock of the stream's leader from below: it may
// be late, by the time that an answer took to arrive, and it is never early.
// Between samples it follows the local monotonic clock, so that neither the
// offset of the local wall clock nor its steps matter.
type serverClock struct {
	mu         sync.Mutex // guards what follows
	base       moment     // the server's clock, when
	at         time.Time  // its answer arrived
	trip       time.Duration
	reconnects uint64
}

const (
	sampleLife = 10 * time.Second
	// maxDrift is by how much clocks may run at different speeds: 1 in so many.
	maxDrift = 5000
)

// set takes a sample: base was the server's time after asked.
func (c *serverClock) set(base moment, asked time.Time, reconnects uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.reconnects == reconnects && now.Sub(c.at) < sampleLife {
		// Both are lower bounds: the higher one is the better one.
		if old := c.estimate(now); old > base {
			return
		}
	}
	c.base, c.at, c.trip, c.reconnects = base, now, now.Sub(asked), reconnects
}

// observe takes note of the time at which the server wrote something that has
// arrived here: its clock is past that. A time that the clock cannot have got
// to is another server's, and tells nothing.
func (c *serverClock) observe(written moment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	ahead := written - c.estimate(now)
	if ahead > 0 && ahead <= c.slack(now) {
		c.base += ahead
		c.trip -= min(c.trip, time.Duration(ahead))
	}
}

func (c *serverClock) estimate(now time.Time) moment {
	passed := now.Sub(c.at)
	return c.base + moment(passed-passed/maxDrift)
}

// slack returns by how much the server's clock may be past the estimate.
func (c *serverClock) slack(now time.Time) moment {
	return moment(c.trip + 2*now.Sub(c.at)/maxDrift)
}

// now returns the lower bound of the server's clock.
func (c *serverClock) now() moment {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.estimate(time.Now())
}

// read returns the lower bound, by how much the server's clock may be past it,
// and whether the sample is old.
func (c *serverClock) read(nc *nats.Conn) (now moment, slack moment, stale bool) {
	reconnects := nc.Stats().Reconnects
	c.mu.Lock()
	defer c.mu.Unlock()
	local := time.Now()
	stale = local.Sub(c.at) > sampleLife || c.reconnects != reconnects
	return c.estimate(local), c.slack(local), stale
}

// memoLimit is how many keys a client remembers the last record of, at least.
const memoLimit = 8192

// A memo remembers what this client last knew of a key. It is never more than
// a guess: a write that is based on it is conditional on it.
type memo struct {
	limit int

	mu         sync.Mutex // guards what follows
	young, old map[string]record
}

// learn takes note of a key's record, without its value.
func (m *memo) learn(key string, r record) {
	r.value = nil
	m.mu.Lock()
	defer m.mu.Unlock()
	if known, ok := m.find(key); ok && known.revision > r.revision {
		return
	}
	if len(m.young) >= m.limit {
		m.old, m.young = m.young, nil
	}
	if m.young == nil {
		m.young = make(map[string]record)
	}
	m.young[key] = r
}

func (m *memo) find(key string) (record, bool) {
	if r, ok := m.young[key]; ok {
		return r, true
	}
	r, ok := m.old[key]
	return r, ok
}

// recall returns what is known of a key, nil if nothing is.
func (m *memo) recall(key string) *record {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.find(key); ok {
		return &r
	}
	return nil
}

func (m *memo) forget(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.young, key)
	delete(m.old, key)
}

// turns lets the writers of one key in line, first come first served, instead
// of having them collide at the server.
type turns struct {
	mu    sync.Mutex
	lines map[string][]chan struct{} // an entry for each key that is being written
}

// take waits until it is the caller's turn, who must give it back. It fails if
// that takes longer than an operation may.
func (t *turns) take(key string) error {
	t.mu.Lock()
	if t.lines == nil {
		t.lines = make(map[string][]chan struct{})
	}
	line, taken := t.lines[key]
	if !taken {
		t.lines[key] = nil
		t.mu.Unlock()
		return nil
	}
	mine := make(chan struct{})
	t.lines[key] = append(line, mine)
	t.mu.Unlock()

	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-mine:
		return nil
	case <-timer.C:
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, ch := range t.lines[key] {
		if ch == mine {
			t.lines[key] = append(t.lines[key][:i:i], t.lines[key][i+1:]...)
			return fmt.Errorf("waited behind other writers of the key: %w", context.DeadlineExceeded)
		}
	}
	return nil // it became our turn just now
}

// give passes the turn on.
func (t *turns) give(key string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	line := t.lines[key]
	if len(line) == 0 {
		delete(t.lines, key)
		return
	}
	t.lines[key] = line[1:]
	close(line[0])
}
