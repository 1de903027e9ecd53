package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
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
	// hasty is how often that is halved for the first request of those that may
	// be repeated: one that comes between two leaders is never answered.
	hasty = 2
	// enough is what time must be left for another attempt: cut short, it would
	// hide why the one before failed.
	enough = 200 * time.Millisecond
	// goneFor is for how long a stream must not be found to be taken for gone.
	goneFor = time.Second
)

// The error codes of the JetStream API that mean something to us.
const (
	codeUnavailable   jetstream.ErrorCode = 10008
	codeNoMessage     jetstream.ErrorCode = 10037
	codeNoAccount     jetstream.ErrorCode = 10039
	codeTooLarge      jetstream.ErrorCode = 10054
	codeNameInUse     jetstream.ErrorCode = 10058
	codeNoStream      jetstream.ErrorCode = 10059
	codeWrongSequence jetstream.ErrorCode = 10071
	codeNotEnabled    jetstream.ErrorCode = 10076
	codeWriteInFlight jetstream.ErrorCode = 10164
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
	begun time.Time
	end   time.Time
	pause time.Duration
	tries int
}

func newCall(ctx context.Context) *call {
	now := time.Now()
	return &call{ctx: ctx, begun: now, end: now.Add(patience), pause: firstPause}
}

// firstPause is how long about a call waits before its second attempt.
const firstPause = 500 * time.Microsecond

// progress gives the call more time, but not for ever: the server answers, and
// it is others who get on. Who waited longer each time would never get a turn.
func (c *call) progress() {
	c.pause = firstPause
	c.end = time.Now().Add(patience)
	if last := c.begun.Add(2 * patience); c.end.After(last) {
		c.end = last
	}
}

// again waits for a timestamp, which is random and grows, and reports whether
// there is time left for another attempt.
func (c *call) again() bool {
	timer := time.NewTimer(c.pause/2 + mathrand.N(c.pause))
	defer timer.Stop()
	c.pause = min(2*c.pause, 100*time.Millisecond)
	select {
	case <-timer.C:
		return time.Until(c.end) > enough
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
	return time.Until(c.end) > enough
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

	windows [hasty + 1]atomic.Pointer[window] // by how often answerTime is halved
}

// A window is a context that the requests of a short while share: one for each
// of them would be a third of what a request allocates.
type window struct {
	ctx    context.Context
	cancel context.CancelFunc
	until  time.Time
}

// window returns a context that is done when a request has waited long enough,
// or up to a quarter longer, and when the epoch is over.
func (e *epoch) window(halved int) context.Context {
	current, wait, now := &e.windows[halved], answerTime>>halved, time.Now()
	if w := current.Load(); w != nil && now.Before(w.until) {
		return w.ctx
	}
	w := &window{until: now.Add(wait / 4)}
	w.ctx, w.cancel = context.WithTimeout(e.ctx, wait+wait/4)
	current.Store(w) // the one before ends by itself
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

// ask makes one request and waits for its answer, for answerTime or, halved so
// often, less. Its error is the cause alone.
func (b *bucket) ask(c *call, msg *nats.Msg, halved int) (*nats.Msg, error) {
	left := time.Until(c.end)
	if left <= 0 {
		return nil, b.explain(context.DeadlineExceeded, msg.Subject)
	}
	epoch := b.epoch.Load()
	var ctx context.Context
	if wait := answerTime >> halved; c.ctx.Done() == nil && wait <= left {
		ctx = epoch.window(halved)
	} else {
		limited, cancel := context.WithTimeout(epoch.ctx, min(wait, left))
		defer cancel()
		defer context.AfterFunc(c.ctx, cancel)()
		ctx = limited
	}
	answer, err := b.nc.RequestMsgWithContext(ctx, msg)
	switch {
	case err == nil:
		return answer, nil
	case err == ctx.Err() && epoch.ctx.Err() != nil:
		err = nats.ErrDisconnected
	}
	return nil, b.explain(err, msg.Subject)
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
	for halved := hasty; ; {
		err := b.apiOnce(c, msg, answer, halved)
		if apiCode(err) == codeNoStream && b.replicated() && time.Since(c.begun) < goneFor && c.again() {
			continue // one of the servers has not heard of it yet
		}
		if err == nil || !transient(err) || errors.Is(err, nats.ErrPermissionViolation) || !c.again() {
			return err
		}
		if errors.Is(err, context.DeadlineExceeded) {
			halved = max(halved-1, 0)
		}
	}
}

func (b *bucket) apiOnce(c *call, msg *nats.Msg, answer any, halved int) error {
	reply, err := b.ask(c, msg, halved)
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
