package state

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// A consumer reads messages of a bucket in the order of the stream. It lives on
// one of the stream's servers, in memory, until it is stopped or forgotten.
type consumer struct {
	b     *bucket
	name  string
	inbox *nats.Subscription
	msgs  chan *nats.Msg
	count uint64 // how many messages have come
	info  consumerInfo
}

type consumerInfo struct {
	Pending   uint64    `json:"num_pending"`
	Now       time.Time `json:"ts"`
	Delivered struct {
		Count uint64 `json:"consumer_seq"`
	} `json:"delivered"`
}

// consumerConfig is what we need of a JetStream consumer's configuration.
type consumerConfig struct {
	Name        string        `json:"name"`
	Deliver     string        `json:"deliver_policy"`
	StartSeq    uint64        `json:"opt_start_seq,omitempty"`
	Ack         string        `json:"ack_policy"`
	Replay      string        `json:"replay_policy"`
	Filter      string        `json:"filter_subject"`
	HeadersOnly bool          `json:"headers_only,omitempty"`
	Inactive    time.Duration `json:"inactive_threshold"`
	Replicas    int           `json:"num_replicas"`
	Memory      bool          `json:"mem_storage"`
}

// consume makes a consumer of the messages on the filter's subjects, from a
// sequence on or, if that is 0, from the first. At most room deliveries may be
// asked for at a time. The server keeps it for life when nobody asks any more.
func (b *bucket) consume(c *call, filter string, from uint64, headersOnly bool, room int, life time.Duration) (*consumer, error) {
	r := &consumer{b: b, name: rand.Text(), msgs: make(chan *nats.Msg, room+64)}
	var err error
	if r.inbox, err = b.nc.ChanSubscribe(b.nc.NewInbox(), r.msgs); err != nil {
		return nil, err
	}
	req := struct {
		Stream string         `json:"stream_name"`
		Config consumerConfig `json:"config"`
	}{b.stream, consumerConfig{
		Name: r.name, Deliver: "all", Ack: "none", Replay: "instant", Filter: filter,
		HeadersOnly: headersOnly, Inactive: life, Replicas: 1, Memory: true,
	}}
	if from > 0 {
		req.Config.Deliver, req.Config.StartSeq = "by_start_sequence", from
	}
	if err := b.api(c, "CONSUMER.CREATE", b.stream+"."+r.name+"."+filter, req, &r.info); err != nil {
		r.stop()
		return nil, err
	}
	return r, nil
}

// pull asks for messages.
func (r *consumer) pull(req pullRequest) error {
	data, err := json.Marshal(req)
	if err != nil {
		return err
	}
	return r.b.nc.PublishRequest("$JS.API.CONSUMER.MSG.NEXT."+r.b.stream+"."+r.name, r.inbox.Subject, data)
}

type pullRequest struct {
	Batch     int           `json:"batch"`
	Expires   time.Duration `json:"expires,omitempty"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
	NoWait    bool          `json:"no_wait,omitempty"`
}

var errDisorder = errors.New("deliveries are missing")

// accept reads a message: either what is delivered, or the status that the
// server sends instead.
func (r *consumer) accept(msg *nats.Msg) (d delivery, status string, err error) {
	if status := msg.Header.Get("Status"); status != "" && msg.Reply == "" {
		return d, status, nil
	}
	d, ok := parseDelivery(msg.Reply)
	if !ok {
		return d, "", fmt.Errorf("delivery with the reply subject %q", msg.Reply)
	}
	r.count++
	if d.count != r.count {
		return d, "", errDisorder
	}
	return d, "", nil
}

// drained reports whether all that the stream has for the consumer has come.
func (r *consumer) drained(c *call) (bool, error) {
	var info consumerInfo
	err := r.b.api(c, "CONSUMER.INFO", r.b.stream+"."+r.name, nil, &info)
	return err == nil && info.Pending == 0 && info.Delivered.Count == r.count, err
}

// stop ends the consumer, on the server too as far as that can be reached; it
// does not wait for that.
func (r *consumer) stop() {
	_ = r.inbox.Unsubscribe()
	if r.b.nc.IsConnected() {
		_ = r.b.nc.Publish("$JS.API.CONSUMER.DELETE."+r.b.stream+"."+r.name, nil)
	}
}

// filter returns the subjects of all keys that match the pattern, and as few
// others as the server can tell apart.
func (b *bucket) filter(p pattern) string {
	if !p.wild {
		return b.prefix + p.prefix
	}
	return b.prefix + p.prefix[:strings.LastIndexByte(p.prefix, '.')+1] + ">"
}

// key returns the key of a message that matches the pattern.
func (b *bucket) key(p pattern, subject string) (string, bool) {
	key, ok := strings.CutPrefix(subject, b.prefix)
	return key, ok && p.matches(key) && ValidateKey(key) == nil
}

const (
	// listBatch is how many keys a listing asks for at a time.
	listBatch = 16384
	// listBeat is how long a listing waits at the end of the stream, to be told
	// that it is the end.
	listBeat = 50 * time.Millisecond
	// listLife is for how long the server keeps a listing's consumer. After that
	// time it ends what looks like a request without use; a listing that takes
	// half of it does not know any more what the end of one means.
	listLife = 10 * time.Minute
	// fewBytes is the most that a listing of few keys may bring of values.
	fewBytes = 1 << 20
	// smallMsg is up to which size, on average, messages are cheaper sent as they
	// are than made anew without their values.
	smallMsg = 512
)

// A listed is the last record of a key, without its value.
type listed struct {
	key      string
	revision uint64
	created  timestamp
	deadline timestamp
	deleted  bool
}

// list returns the last record of every key that matches the pattern, markers
// and what has expired included, sorted by key. It sees every write that was
// acknowledged before. The consumer may be on a server that fails meanwhile;
// then it starts over.
func (b *bucket) list(ctx context.Context, p pattern) ([]listed, error) {
	if !p.wild {
		r, err := b.last(newCall(ctx), p.prefix)
		if err != nil || r.revision == 0 {
			return nil, err
		}
		return []listed{{p.prefix, r.revision, r.created, r.deadline, r.deleted}}, nil
	}
	for tries := 1; ; tries++ {
		info, err := b.info(newCall(ctx))
		if err != nil {
			return nil, err
		}
		if all, ok := b.listFew(ctx, p, info); ok {
			return tidyList(all), nil
		}
		all, err := b.listOnce(ctx, p, info)
		if err == nil {
			return tidyList(all), nil
		}
		if !errors.Is(err, errStartOver) || tries == 5 || !newCall(ctx).again() {
			return nil, err
		}
	}
}

// tidyList sorts a listing and leaves the last record of each key.
func tidyList(all []listed) []listed {
	slices.SortFunc(all, func(x, y listed) int {
		if c := strings.Compare(x.key, y.key); c != 0 {
			return c
		}
		return cmp.Compare(y.revision, x.revision)
	})
	return slices.CompactFunc(all, func(x, y listed) bool { return x.key == y.key })
}

// listFew lists with one request that the server answers from its index, if few
// keys match. A consumer, which reads on through the stream, costs less for each
// key but something for every other one that it passes. It reports whether it
// could: on one replica, where what answers is the leader, and if the answer
// came whole.
func (b *bucket) listFew(ctx context.Context, p pattern, info *streamInfo) (all []listed, ok bool) {
	most := int(min(max(info.State.Messages/32, 64), 1024)) // 1024 is the server's limit
	if info.setup.Replicas > 1 || !info.setup.AllowDirect || p.prefix == "" || b.noFew.Load() {
		return nil, false
	}
	req, err := json.Marshal(struct {
		LastOf   []string `json:"multi_last"`
		Batch    int      `json:"batch"`
		MaxBytes int      `json:"max_bytes"`
	}{[]string{b.filter(p)}, most, fewBytes})
	if err != nil {
		return nil, false
	}
	epoch := b.epoch.Load().ctx
	msgs := make(chan *nats.Msg, most+1)
	inbox, err := b.nc.ChanSubscribe(b.nc.NewInbox(), msgs)
	if err != nil {
		return nil, false
	}
	defer func() { _ = inbox.Unsubscribe() }()
	if b.nc.PublishRequest("$JS.API.DIRECT.GET."+b.stream, inbox.Subject, req) != nil {
		return nil, false
	}
	timer := time.NewTimer(answerTime)
	defer timer.Stop()
	for got, want := 0, 0; ; got++ {
		var msg *nats.Msg
		select {
		case msg = <-msgs:
		case <-timer.C:
			// Whoever may not ask should not have to wait for it each time.
			b.noFew.Store(got == 0)
			return nil, false
		case <-epoch.Done():
			return nil, false
		case <-ctx.Done():
			return nil, false
		}
		switch msg.Header.Get("Status") {
		case "":
		case "204": // the end
			return all, got > 0 && got == want
		case "404":
			return nil, got == 0 && msg.Header.Get("Description") == "No Results"
		default:
			return nil, false // too many
		}
		if got == 0 {
			pending, err := strconv.Atoi(msg.Header.Get("Nats-Num-Pending"))
			if err != nil || pending >= most {
				return nil, false
			}
			want = pending + 1
		}
		rec, err := directRecord(msg, info.setup.MaxAge)
		if err != nil {
			return nil, false
		}
		if key, ok := b.key(p, msg.Header.Get("Nats-Subject")); ok {
			all = append(all, listed{key, rec.revision, rec.created, rec.deadline, rec.deleted})
		}
	}
}

// errStartOver is for a listing that was cut short by something that passes.
var errStartOver = errors.New("the listing was cut short")

// listOnce lists with one consumer. That reads the stream from its first
// message to its last one, so that every key comes: either it stays where it
// is, or it moves to the end. That the end was reached is what the server says
// when it ends a request that does not wait, after it had got something; or
// when it sends a heartbeat for one that had got nothing. All other signs can
// err: the number of pending messages, the end of a request's time, and even
// the end of a request that does not wait, once the server looks whether the
// consumer is still in use.
//
// With replicas the consumer may be on one that lags. The list is complete when
// it has come to the last message that the leader had before, or to a later one.
func (b *bucket) listOnce(ctx context.Context, p pattern, info *streamInfo) (all []listed, err error) {
	var (
		filter = b.filter(p)
		small  = info.State.Bytes <= smallMsg*info.State.Messages
		epoch  = b.epoch.Load().ctx
		upTo   uint64 // what must have come
		last   uint64 // what has come
	)
	if info.setup.Replicas > 1 {
		last, err := b.leaderMsg(newCall(ctx), filter)
		if err != nil || last == nil {
			return nil, err
		}
		upTo = last.Seq
	}
	began := time.Now()
	r, err := b.consume(newCall(ctx), filter, 0, !small, listBatch, listLife)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	if r.info.Pending == 0 && upTo == 0 {
		return nil, nil
	}
	all = make([]listed, 0, r.info.Pending)

	req := pullRequest{Batch: listBatch, NoWait: true, Expires: patience, Heartbeat: listBeat}
	for waits := 0; ; {
		if err := r.pull(req); err != nil {
			return nil, err
		}
		got, status := 0, ""
		for got < req.Batch && status == "" {
			msg, err := r.next(ctx, epoch)
			if err != nil {
				return nil, err
			}
			var d delivery
			if d, status, err = r.accept(msg); err != nil {
				return nil, fmt.Errorf("%w: %w", errStartOver, err)
			}
			if status == "100" && got == 0 && last < upTo {
				// The replica lags: the request waits on for what is missing.
				if waits++; waits > 40 {
					return nil, fmt.Errorf("%w: a replica lags", errStartOver)
				}
				status = ""
			}
			if status == "100" && got > 0 {
				status = "" // the next message took its time
			}
			if status != "" || d.seq == 0 {
				continue
			}
			got, last = got+1, d.seq
			if key, ok := b.key(p, msg.Subject); ok {
				rec := decode(msg.Header, nil, d.seq, d.written, info.setup.MaxAge)
				all = append(all, listed{key, d.seq, rec.created, rec.deadline, rec.deleted})
			}
		}
		switch {
		case status == "" || status == "408":
			// There may be more.
		case status != "404" && status != "100":
			return nil, fmt.Errorf("%w: %s", errStartOver, status)
		case time.Since(began) > listLife/2:
			return nil, errors.New("the listing takes too long to be told from an incomplete one")
		case last >= upTo:
			return all, nil
		}
	}
}

// next returns the consumer's next message.
func (r *consumer) next(ctx, epoch context.Context) (*nats.Msg, error) {
	select {
	case msg := <-r.msgs: // as a rule it is there
		return msg, nil
	default:
	}
	timer := time.NewTimer(patience + time.Second)
	defer timer.Stop()
	select {
	case msg := <-r.msgs:
		return msg, nil
	case <-timer.C:
		return nil, r.b.explain(context.DeadlineExceeded, "$JS.API.CONSUMER.MSG.NEXT."+r.b.stream)
	case <-epoch.Done():
		return nil, fmt.Errorf("%w: %w", errStartOver, nats.ErrDisconnected)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// keys returns the keys that exist and match the pattern, sorted.
func (b *bucket) keys(ctx context.Context, p pattern) ([]string, error) {
	all, err := b.list(ctx, p)
	if err != nil {
		return nil, err
	}
	keys := make([]string, 0, len(all))
	c := newCall(ctx)
	for _, l := range all {
		if !l.deleted && !b.expired(c, l.deadline) {
			keys = append(keys, l.key)
		}
	}
	return keys, nil
}
