package state

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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
	Pending uint64    `json:"num_pending"`
	Now     time.Time `json:"ts"`
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

// consumerLife is for how long a server keeps a consumer that nobody asks for
// messages, because its reader is gone without a word.
const consumerLife = 10 * time.Second

// consume makes a consumer of the messages on the filter's subjects, from a
// sequence on or, if that is 0, from the first. At most room deliveries may be
// asked for at a time.
func (b *bucket) consume(c *call, filter string, from uint64, headersOnly bool, room int) (*consumer, error) {
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
		HeadersOnly: headersOnly, Inactive: consumerLife, Replicas: 1, Memory: true,
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
	// listWait is how long a listing waits at the end of the stream, to be sure
	// that it is the end or for what a replica that lags has not got yet.
	listWait = 20 * time.Millisecond
)

// A listed is the last record of a key, without its value.
type listed struct {
	key      string
	revision uint64
	created  moment
	deadline moment
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
	for c := newCall(ctx); ; {
		all, err := b.listOnce(ctx, p)
		if err == nil {
			return tidyList(all), nil
		}
		if !errors.Is(err, errStartOver) || !c.again() {
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

// errStartOver is for a listing that was cut short by something that passes.
var errStartOver = errors.New("the listing was cut short")

// listOnce lists with one consumer. That reads the stream from its first
// message to its last one, so that every key comes: either it stays where it
// is, or it moves to the end. That the end was reached is what the server says
// when it ends a request that does not wait, and that had got something or was
// given a little time; all other signs can err.
//
// With replicas the consumer may be on one that lags. The list is complete when
// it has come to the last message that the leader had before, or to a later one.
func (b *bucket) listOnce(ctx context.Context, p pattern) (all []listed, err error) {
	var (
		filter = b.filter(p)
		setup  = b.setup.Load()
		upTo   uint64 // what must have come
		last   uint64 // what has come
	)
	if setup.Replicas > 1 {
		last, err := b.leaderMsg(newCall(ctx), filter)
		if err != nil || last == nil {
			return nil, err
		}
		upTo = last.Seq
	}
	r, err := b.consume(newCall(ctx), filter, 0, true, listBatch)
	if err != nil {
		return nil, err
	}
	defer r.stop()
	if r.info.Pending == 0 && upTo == 0 {
		return nil, nil
	}
	all = make([]listed, 0, r.info.Pending)

	epoch := b.epoch.Load().ctx
	timer := time.NewTimer(patience)
	defer timer.Stop()
	req := pullRequest{Batch: listBatch, NoWait: true}
	for waits := 0; waits < 50; {
		if err := r.pull(req); err != nil {
			return nil, err
		}
		got, status := 0, ""
		for got < req.Batch && status == "" {
			timer.Reset(patience)
			var msg *nats.Msg
			select {
			case msg = <-r.msgs:
			case <-timer.C:
				return nil, b.explain(context.DeadlineExceeded, "$JS.API.CONSUMER.MSG.NEXT."+b.stream)
			case <-epoch.Done():
				return nil, fmt.Errorf("%w: %w", errStartOver, nats.ErrDisconnected)
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			var d delivery
			if d, status, err = r.accept(msg); err != nil {
				return nil, fmt.Errorf("%w: %w", errStartOver, err)
			}
			if status != "" {
				break
			}
			got, last = got+1, d.seq
			if key, ok := b.key(p, msg.Subject); ok {
				rec := decode(msg.Header, nil, d.seq, d.written, setup.MaxAge)
				all = append(all, listed{key, d.seq, rec.created, rec.deadline, rec.deleted})
			}
		}
		switch {
		case status == "":
			// There may be more.
		case status != "404" && status != "408":
			return nil, fmt.Errorf("%w: %s", errStartOver, status)
		case got > 0 || req.Expires > 0:
			if last >= upTo {
				return all, nil
			}
			waits++
			req.Expires = listWait
		default:
			req.Expires = listWait
		}
	}
	return nil, fmt.Errorf("%w: a replica lags", errStartOver)
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
