package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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
	// opTimeout is how long an operation goes on without progress, and
	// opLimit how long it goes on at all while others make progress at its cost.
	opTimeout = 5 * time.Second
	opLimit   = 10 * time.Second
	// minAttempt is the time that must be left for another attempt: cut short,
	// it would hide why the one before failed.
	minAttempt = 200 * time.Millisecond
	// checkInterval is how often a request that is not answered looks for the
	// reason.
	checkInterval = 250 * time.Millisecond
	// repeatInterval is how often a request is made again that a leader that is
	// being elected may never answer.
	repeatInterval = 500 * time.Millisecond
	// slowAfter is how long a ping must be on its way for the link to count as slow.
	slowAfter = time.Second
	// ackTimeout is how long a write that can be repeated safely waits for its
	// acknowledgement, and half of it is how long it does once that cannot be on
	// its way any more.
	ackTimeout = time.Second
	// goneAfter is how long a stream of several servers is not found before it
	// counts as gone: a server that is starting may not know it yet.
	goneAfter = time.Second
)

// The error codes of the JetStream API that mean something to us.
const (
	codeNoPeers        jetstream.ErrorCode = 10005
	codeMaxConsumers   jetstream.ErrorCode = 10026
	codeUnavailable    jetstream.ErrorCode = 10008
	codeNoMessage      jetstream.ErrorCode = 10037
	codeNoAccount      jetstream.ErrorCode = 10039
	codeAccountLimit   jetstream.ErrorCode = 10002
	codeAccountFull    jetstream.ErrorCode = 10047 // or memory: 10028
	codeMemoryFull     jetstream.ErrorCode = 10028
	codeStreamFailed   jetstream.ErrorCode = 10077
	codeNotCreated     jetstream.ErrorCode = 10049
	codeTooLarge       jetstream.ErrorCode = 10054
	codeNameInUse      jetstream.ErrorCode = 10058
	codeNoStream       jetstream.ErrorCode = 10059
	codeWrongSequence  jetstream.ErrorCode = 10071
	codeNotEnabled     jetstream.ErrorCode = 10076
	codeNoRollup       jetstream.ErrorCode = 10111
	codeStreamOffline  jetstream.ErrorCode = 10118
	codeOffline        jetstream.ErrorCode = 10119
	codeInactiveLimit  jetstream.ErrorCode = 10153
	codeWriteInFlight  jetstream.ErrorCode = 10164
	codeNoMessageTTL   jetstream.ErrorCode = 10166
	codeTooManyPending jetstream.ErrorCode = 10167
)

// apiCode returns the JetStream error code of err, 0 if it has none.
func apiCode(err error) jetstream.ErrorCode {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.ErrorCode
	}
	return 0
}

// passing reports whether a request that failed with err, and was not carried
// out, may succeed if it is made again.
func passing(err error) bool {
	switch apiCode(err) {
	case codeUnavailable, codeTooManyPending, codeOffline, codeStreamOffline:
		return true
	case codeNoPeers: // a busy server can briefly seem to be offline
		return strings.Contains(err.Error(), "offline")
	}
	return errors.Is(err, nats.ErrNoResponders) || errors.Is(err, nats.ErrDisconnected)
}

// errNoAnswer is the cause of a request that nobody answered.
var errNoAnswer = fmt.Errorf("no answer: %w", context.DeadlineExceeded)

// A retryBudget is the time that one operation has. An answer is progress, and
// gives it more.
type retryBudget struct {
	ctx   context.Context // the caller's
	begun time.Time
	since time.Time // when progress was made last
	sent  time.Time // when the first request was sent; zero if none was
	pause time.Duration

	started time.Time // when the operation began; begun moves while the link is slow
	slow    bool      // that it takes long has been logged
}

func newBudget(ctx context.Context) *retryBudget {
	now := time.Now()
	return &retryBudget{ctx: ctx, begun: now, since: now, started: now, pause: firstPause}
}

// firstPause is how long about an operation waits before its second attempt.
const firstPause = 500 * time.Microsecond

func (b *retryBudget) progress() { b.since = time.Now() }

// left returns how long the operation may still go on without progress.
func (b *retryBudget) left() time.Duration {
	return min(time.Until(b.since.Add(opTimeout)), time.Until(b.begun.Add(opLimit)))
}

// A requester makes requests on a connection. It publishes only while the
// connection is up: what the client library would hold back while it reconnects
// could take effect at any later time.
type requester struct {
	nc    *nats.Conn
	api   string // what the subjects of the JetStream API begin with
	route string // what the subjects of a bucket are published behind, usually ""
	log   *slog.Logger
	stats counters

	life   context.Context // until Close
	close  context.CancelFunc
	active sync.WaitGroup // what Close waits for
	letGo  chan struct{}  // closed when follow has let go of the connection
	maxMsg atomic.Int64   // the size of the largest message, by the last connection; 0 if unknown

	pool sync.Pool // of exchanges

	inbox string // what reply subjects begin with

	mu        sync.Mutex // guards what follows
	sub       *nats.Subscription
	closed    bool
	exchanges map[string]*exchange // by the reply subject that each waits on
	next      uint64
	epoch     *epoch
	pinging   bool
	pinged    time.Time // when the newest ping was sent that was answered
	ponged    time.Time // and when it was
	orphans   []string  // consumers to delete when connected, with their streams
}

// An epoch is a time during which the connection stays what it is: up or down.
type epoch struct {
	status nats.Status
	began  time.Time
	over   chan struct{}
}

func newEpoch(status nats.Status) *epoch { return &epoch{status, time.Now(), make(chan struct{})} }

// An exchange is a request that waits for its answer.
type exchange struct {
	reply  string
	answer chan *nats.Msg // buffered, so that receive never blocks on it
	timer  *time.Timer
}

func newExchange() any {
	x := &exchange{answer: make(chan *nats.Msg, 2), timer: time.NewTimer(time.Hour)}
	x.timer.Stop()
	return x
}

// A connection is the way to a JetStream API.
type connection struct {
	nc                *nats.Conn
	domain, apiPrefix string // at most one of them
	log               *slog.Logger
}

// newRequester subscribes to the answers and follows the connection's state.
func newRequester(c connection) (*requester, error) {
	status := c.nc.StatusChanged() // before the status is read: no change is missed
	r := &requester{
		nc: c.nc, api: "$JS.API.", log: c.log, letGo: make(chan struct{}),
		exchanges: make(map[string]*exchange), epoch: newEpoch(c.nc.Status()), pool: sync.Pool{New: newExchange},
	}
	switch {
	case c.domain != "":
		r.api = "$JS." + c.domain + ".API."
		r.route = r.api
	case c.apiPrefix != "":
		r.api = strings.TrimSuffix(c.apiPrefix, ".") + "."
		r.route = r.api
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.life, r.close = context.WithCancel(context.Background())
	r.inbox = r.nc.NewInbox() + "."
	var err error
	if r.sub, err = r.nc.Subscribe(r.inbox+"*", r.receive); err != nil {
		r.close()
		c.nc.RemoveStatusListener(status)
		return nil, err
	}
	_ = r.sub.SetPendingLimits(-1, -1)
	go r.follow(status)
	return r, nil
}

// resubscribe subscribes to the answers again, since none came: a server that
// takes the permission away ends the subscription for good.
func (r *requester) resubscribe() {
	sub, err := r.nc.Subscribe(r.inbox+"*", r.receive)
	if err != nil {
		return
	}
	_ = sub.SetPendingLimits(-1, -1)
	r.mu.Lock()
	if !r.closed {
		sub, r.sub = r.sub, sub
	}
	r.mu.Unlock()
	r.unsubscribe(sub)
}

// unsubscribe ends a subscription. While the connection is down it does not wait for
// that.
func (r *requester) unsubscribe(sub *nats.Subscription) {
	if r.up() {
		_ = sub.Unsubscribe()
		return
	}
	go func() { _ = sub.Unsubscribe() }()
}

// stop ends what newRequester began. If the client library is dialling, follow lets
// go of the connection once it has.
func (r *requester) stop() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.close()
	r.active.Wait()
	timer := time.NewTimer(checkInterval)
	defer timer.Stop()
	select {
	case <-r.letGo:
	case <-timer.C:
	}
}

// start runs f in a goroutine that stop waits for. After Close it runs nothing.
func (r *requester) start(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.active.Go(f)
	return true
}

// follow begins a new epoch whenever the connection's state changes, until Close. It
// belongs to the requester, but Close does not wait for it if it has to wait for the
// client library.
func (r *requester) follow(status chan nats.Status) {
	defer close(r.letGo)
	defer func() {
		r.nc.RemoveStatusListener(status)
		_ = r.sub.Unsubscribe() // nobody replaces it any more
	}()
	check := time.NewTicker(checkInterval)
	defer check.Stop()
	for {
		if r.up() || r.isClosed() {
			check.Stop()
		} else {
			check.Reset(checkInterval)
		}
		select {
		case st, open := <-status:
			if !open {
				st = nats.CLOSED
			}
			r.begin(st)
			if !open {
				return
			}
		case <-check.C:
			// The client library drops an event if ten others wait.
			st := r.nc.Status()
			if (st == nats.CONNECTED || st == nats.CLOSED) && len(status) == 0 {
				r.begin(st)
			}
		case <-r.life.Done():
			return
		}
	}
}

// begin begins a new epoch.
func (r *requester) begin(status nats.Status) {
	r.mu.Lock()
	last := r.epoch
	r.epoch = newEpoch(status)
	var orphans []string
	if status == nats.CONNECTED {
		orphans, r.orphans = r.orphans, nil
	}
	r.mu.Unlock()
	close(last.over)
	for _, name := range orphans {
		r.deleteConsumer(name)
	}
}

// up reports whether the connection was up by the last news of it.
//
// While the connection is down, nothing but follow asks the client library for
// anything: it holds its mutex while it dials, and waits for the server's greeting.
func (r *requester) up() bool { return r.currentEpoch().status == nats.CONNECTED }

func (r *requester) currentEpoch() *epoch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.epoch
}

// current returns the current epoch and the connection's status.
func (r *requester) current() (*epoch, nats.Status) {
	e := r.currentEpoch()
	if e.status != nats.CONNECTED {
		return e, e.status
	}
	return e, r.nc.Status() // it may be draining
}

// isClosed reports whether the connection's owner has closed it.
func (r *requester) isClosed() bool {
	_, status := r.current()
	return status == nats.CLOSED
}

// maxPayload returns the size of the largest message that the server takes.
func (r *requester) maxPayload() int {
	if r.up() || r.maxMsg.Load() == 0 {
		r.maxMsg.Store(r.nc.MaxPayload())
	}
	return int(r.maxMsg.Load())
}

// connected waits until the connection is up, and returns its epoch.
func (r *requester) connected(budget *retryBudget) (*epoch, error) {
	for {
		e, status := r.current()
		switch status {
		case nats.CONNECTED:
			return e, nil
		case nats.CLOSED:
			return nil, nats.ErrConnectionClosed
		case nats.DRAINING_PUBS, nats.DRAINING_SUBS:
			return nil, nats.ErrConnectionDraining
		}
		if err := r.pause(budget, min(budget.left(), checkInterval), e.over); err != nil {
			return nil, err
		}
		if budget.left() <= 0 {
			return nil, nats.ErrDisconnected
		}
	}
}

// still waits until the connection is up, and reports whether that is still the same
// epoch.
func (r *requester) still(budget *retryBudget, e *epoch) bool {
	now, err := r.connected(budget)
	return err == nil && now == e
}

// wait pauses, randomly and for longer each time, and reports whether there is
// time left for another attempt.
func (r *requester) wait(budget *retryBudget) bool {
	pause := budget.pause/2 + mathrand.N(budget.pause)
	budget.pause = min(2*budget.pause, 100*time.Millisecond)
	return r.pause(budget, pause, nil) == nil && budget.left() > minAttempt
}

// pause waits for d, or until over is closed. It returns why the operation must
// not go on, nil if it may.
func (r *requester) pause(budget *retryBudget, d time.Duration, over <-chan struct{}) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-over:
	case <-budget.ctx.Done():
	case <-r.life.Done():
	}
	return r.ended(budget)
}

// ended returns why an operation must not go on, nil if it may.
func (r *requester) ended(budget *retryBudget) error {
	if r.life.Err() != nil {
		return ErrClosed
	}
	return budget.ctx.Err()
}

// receive hands an answer to the exchange that waits for it.
func (r *requester) receive(msg *nats.Msg) {
	r.mu.Lock()
	x := r.exchanges[msg.Subject]
	if x != nil {
		select {
		case x.answer <- msg:
		default: // it has what it waits for
		}
	}
	r.mu.Unlock()
}

// expect begins an exchange.
func (r *requester) expect() *exchange {
	x := r.pool.Get().(*exchange)
	r.register(x)
	return x
}

// register gives an exchange its own reply subject.
func (r *requester) register(x *exchange) {
	r.mu.Lock()
	r.next++
	x.reply = r.inbox + strconv.FormatUint(r.next, 36)
	r.exchanges[x.reply] = x
	r.mu.Unlock()
}

func (r *requester) unregister(x *exchange) {
	r.mu.Lock()
	delete(r.exchanges, x.reply)
	r.mu.Unlock()
}

// forget ends an exchange. An answer that comes later is dropped.
func (r *requester) forget(x *exchange) {
	r.unregister(x)
	x.timer.Stop()
	for {
		select {
		case <-x.answer:
			continue
		default:
		}
		break
	}
	r.pool.Put(x)
}

// repetition says what may be done about a request that is not answered.
type repetition int

const (
	once       repetition = iota // wait: it must not be made twice
	resolvable                   // give up soon: its fate can be looked up
	repeatable                   // make it again: it changes nothing
)

// do makes a request and returns its answer. If it fails, the request was not
// sent, or it was answered by nobody (nats.ErrNoResponders), or its answer is
// lost: that is when the error wraps errNoAnswer, nats.ErrDisconnected after
// the request was sent, or the end of the budget's context.
//
// An answer that is on its way is waited for, however narrow the link: the
// request is not abandoned while anything arrives and the server has not been
// heard since.
func (r *requester) do(budget *retryBudget, msg *nats.Msg, rep repetition) (answer *nats.Msg, sent bool, err error) {
	if err := r.ended(budget); err != nil {
		return nil, false, err
	}
	e, err := r.connected(budget)
	if err != nil {
		return nil, false, err
	}
	x := r.expect()
	defer r.forget(x)
	msg.Reply = x.reply
	if budget.sent.IsZero() {
		budget.sent = time.Now()
	}
	if err := r.publish(msg); err != nil {
		return nil, !refusedHere(err), err
	}
	w := newWaiter(r, budget, e, msg, rep, x.timer)
	for {
		answer, err := await(&w, x.answer)
		if err != nil {
			return nil, true, err
		}
		if !noResponders(answer) {
			budget.progress()
			return answer, true, nil
		}
		if w.copies--; w.copies == 0 { // else another copy may be answered
			return nil, false, nats.ErrNoResponders
		}
	}
}

// doMany makes a request that is answered by several messages, at most as many
// as given, of which last recognises the last one.
func (r *requester) doMany(budget *retryBudget, msg *nats.Msg, most int, last func(*nats.Msg) bool) ([]*nats.Msg, error) {
	budget = newBudget(budget.ctx)
	e, err := r.connected(budget)
	if err != nil {
		return nil, err
	}
	x := &exchange{answer: make(chan *nats.Msg, most)}
	r.register(x)
	defer r.unregister(x)
	msg.Reply = x.reply
	if err := r.publish(msg); err != nil {
		return nil, err
	}
	timer := time.NewTimer(checkInterval)
	defer timer.Stop()
	w := newWaiter(r, budget, e, msg, once, timer)
	for answers := []*nats.Msg(nil); ; {
		answer, err := await(&w, x.answer)
		if err != nil {
			return nil, err
		}
		budget.progress()
		budget.begun = time.Now() // however many they are
		if answers = append(answers, answer); last(answer) || len(answers) == most {
			return answers, nil
		}
	}
}

func (r *requester) publish(msg *nats.Msg) error {
	r.stats.requests.Add(1)
	return r.nc.PublishMsg(msg)
}

// refusedHere reports whether the client library has refused a message before
// any of it was written.
func refusedHere(err error) bool {
	for _, refusal := range []error{
		nats.ErrMaxPayload, nats.ErrBadSubject, nats.ErrHeadersNotSupported, nats.ErrConnectionClosed,
		nats.ErrConnectionDraining, nats.ErrReconnectBufExceeded, nats.ErrInvalidConnection,
	} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return false
}

// noResponders reports whether an answer is the server's word that nobody
// listens.
func noResponders(msg *nats.Msg) bool {
	return len(msg.Data) == 0 && statusOf(msg) == "503"
}

// statusOf returns the status that the server sent in place of a message, "" if
// this is a message. Those that were stored can have any header: a real status
// comes without data and without the sequence that every message has.
func statusOf(msg *nats.Msg) string {
	if len(msg.Data) > 0 || len(msg.Header["Nats-Sequence"]) > 0 {
		return ""
	}
	return msg.Header.Get("Status")
}

// A waiter waits for what a request brings, and decides what to do about it if
// nothing comes.
type waiter struct {
	r      *requester
	budget *retryBudget
	epoch  *epoch
	msg    *nats.Msg // the request
	rep    repetition
	timer  *time.Timer
	copies int       // how often the request was sent
	first  time.Time // when it was sent first
	sent   time.Time // and when last
	heard  time.Time // since when the answer is known not to be on its way; zero until then
	in     uint64    // messages that had come in by the last check
	seen   bool      // in is known
	unique bool      // no other request has the subject: what the connection reports of it is of this one
}

// newWaiter returns the waiter for a request that was just sent. It uses the
// timer, which the caller stops.
func newWaiter(r *requester, budget *retryBudget, e *epoch, msg *nats.Msg, rep repetition, timer *time.Timer) waiter {
	now := time.Now()
	timer.Reset(checkInterval)
	return waiter{r: r, budget: budget, epoch: e, msg: msg, rep: rep, timer: timer, copies: 1, first: now, sent: now}
}

// await returns what arrives next, or why nothing will.
func await[T any](w *waiter, arrivals <-chan T) (arrival T, err error) {
	for {
		select {
		case arrival := <-arrivals:
			return arrival, nil
		case <-w.timer.C:
		case <-w.epoch.over:
		case <-w.budget.ctx.Done():
		case <-w.r.life.Done():
		}
		select {
		case arrival := <-arrivals:
			return arrival, nil // it is here, whatever else has happened
		default:
		}
		switch {
		case w.r.life.Err() != nil:
			return arrival, ErrClosed
		case w.budget.ctx.Err() != nil:
			return arrival, w.budget.ctx.Err()
		case w.r.currentEpoch() != w.epoch:
			if w.r.isClosed() {
				return arrival, nats.ErrConnectionClosed
			}
			return arrival, nats.ErrDisconnected
		}
		if w.unique {
			if refusal := w.r.refusal(w.msg.Subject); refusal != nil {
				return arrival, fmt.Errorf("%s: %w", w.msg.Subject, refusal)
			}
		}
		switch w.check() {
		case giveUp:
			w.r.resubscribe()
			return arrival, w.r.explain(errNoAnswer, w.msg.Subject)
		case repeatNow:
			if w.r.publish(w.msg) == nil {
				w.copies++
			}
		}
		w.timer.Reset(checkInterval)
	}
}

type verdict int

const (
	waitOn verdict = iota
	repeatNow
	giveUp
)

// check looks whether the answer may be on its way: a ping that was sent after
// the request is answered behind everything that the server had sent before.
func (w *waiter) check() verdict {
	now := time.Now()
	in := w.r.nc.Stats().InMsgs
	moving := w.seen && in != w.in
	w.in, w.seen = in, true
	w.r.slow(w.budget, w.first, "state: a request is not answered", w.msg.Subject)
	if w.heard.IsZero() {
		if w.heard = w.r.heardSince(w.sent); w.heard.Sub(w.sent) > repeatInterval {
			w.budget.progress() // the link was slow until then
		}
	}
	if !w.heard.IsZero() {
		// It is not on its way; it is late, or lost.
		quiet := now.Sub(w.heard)
		switch {
		case w.rep == repeatable && now.Sub(w.sent) >= repeatInterval && quiet >= repeatInterval/3 && w.r.elections():
			if w.budget.left() <= minAttempt {
				return giveUp
			}
			w.sent, w.heard = now, time.Time{}
			w.r.retrying(w.budget, w.msg.Subject)
			return repeatNow
		case w.rep == resolvable && now.Sub(w.sent) >= ackTimeout && quiet >= ackTimeout/2:
			return giveUp
		}
	} else if moving && now.Sub(w.sent) > slowAfter {
		w.budget.progress()
		// The link is slow, nobody else is in the way: this time does not count.
		w.budget.begun = w.budget.begun.Add(checkInterval)
	}
	if w.budget.left() <= 0 {
		return giveUp
	}
	return waitOn
}

// waitAfter waits before another attempt of what failed with err. If there is to be
// none it returns why: that the call was ended, or else err.
func (r *requester) waitAfter(budget *retryBudget, err error) error {
	if r.wait(budget) {
		return nil
	}
	if ended := r.ended(budget); ended != nil {
		return ended
	}
	return err
}

// retrying notes that an operation makes a request once more. It logs, once, that
// it has done so for longer than a second.
func (r *requester) retrying(budget *retryBudget, subject string) {
	r.stats.retries.Add(1)
	r.slow(budget, budget.started, "state: a request is repeated", subject)
}

func (r *requester) slow(budget *retryBudget, since time.Time, what, subject string) {
	if d := time.Since(since); d >= time.Second && !budget.slow {
		budget.slow = true
		r.log.Warn(what, "subject", subject, "after", d.Round(time.Millisecond))
	}
}

// elections reports whether the stream may be between two leaders.
func (r *requester) elections() bool { return r.nc.ConnectedClusterName() != "" }

// heardSince returns when the server answered a ping that was sent after a time.
// If it has not, heardSince sends one and returns zero.
func (r *requester) heardSince(sent time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pinged.After(sent) {
		return r.ponged
	}
	if !r.pinging && !r.closed {
		r.pinging = true
		r.active.Go(func() {
			ctx, cancel := context.WithTimeout(r.life, time.Minute)
			defer cancel()
			asked := time.Now()
			err := r.nc.FlushWithContext(ctx)
			r.mu.Lock()
			defer r.mu.Unlock()
			if r.pinging = false; err == nil {
				r.pinged, r.ponged = asked, time.Now()
			}
		})
	}
	return time.Time{}
}

// explain adds to the error of a request that got no answer what the connection
// reported last: a refusal for lack of permission comes apart from the request.
// It is a hint, and proves nothing about this request.
func (r *requester) explain(err error, subject string) error {
	err = fmt.Errorf("%s: %w", subject, err)
	last := r.nc.LastError()
	if r.refusal(subject) != nil || errors.Is(last, nats.ErrMaxSubscriptionsExceeded) ||
		errors.Is(last, nats.ErrPermissionViolation) && strings.Contains(last.Error(), "_INBOX") {
		err = fmt.Errorf("%w (the connection last reported: %w)", err, last)
	}
	return err
}

// refusal returns what the connection reported last, if that is that it may not
// publish to the subject, or nil.
func (r *requester) refusal(subject string) error {
	last := r.nc.LastError()
	if errors.Is(last, nats.ErrPermissionViolation) && strings.Contains(last.Error(), `"`+subject+`"`) {
		return last
	}
	return nil
}

// call makes a request of the JetStream API that changes nothing, or that may
// be made twice, until it is answered.
func (r *requester) call(budget *retryBudget, verb, object string, req, answer any) error {
	var data []byte
	if req != nil {
		var err error
		if data, err = json.Marshal(req); err != nil {
			return err
		}
	}
	msg := &nats.Msg{Subject: r.api + verb + "." + object, Data: data}
	for {
		reply, _, err := r.do(budget, msg, repeatable)
		if err == nil {
			err = decodeAnswer(reply.Data, answer)
		}
		if err == nil || !passing(err) {
			return err
		}
		if err := r.waitAfter(budget, err); err != nil {
			return err
		}
		r.retrying(budget, msg.Subject)
	}
}

// decodeAnswer reads the answer to a request of the JetStream API.
func decodeAnswer(data []byte, answer any) error {
	var failed struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(data, &failed); err != nil {
		return fmt.Errorf("answer of the JetStream API: %w", err)
	}
	if failed.Error != nil {
		return failed.Error
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("answer of the JetStream API: %w", err)
	}
	return nil
}

// deleteConsumer has the server delete a consumer, now or when the connection
// is back. It waits for nothing. If the request is lost with the connection, the
// server deletes the consumer when nobody has used it for a while.
func (r *requester) deleteConsumer(name string) {
	if r.up() {
		_ = r.nc.Publish(r.api+"CONSUMER.DELETE."+name, nil)
		return
	}
	r.mu.Lock()
	r.orphans = append(r.orphans, name)
	r.mu.Unlock()
}
