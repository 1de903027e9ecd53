package state

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// maxPullBytes is the most bytes that a listing asks for at a time. It starts
	// with enough for any message: a server closes a connection when it cannot
	// write what it has to send within ten seconds.
	maxPullBytes = 4 << 20
	// fastPull is the longest that a request may take for the next one to ask for
	// more bytes.
	fastPull = 500 * time.Millisecond
)

// A consumer reads messages of a bucket in the order of the stream. It lives on
// one of the stream's servers, in memory, until it is stopped or forgotten.
type consumer struct {
	b     *bucket
	name  string
	sub   *nats.Subscription
	mail  chan *nats.Msg // what the server sends, without a goroutine in between
	batch int            // the most messages that one request asks for
	count uint64         // how many messages have been accepted
	bytes int            // how many the server may send for one request
	info  consumerInfo
	live  bool // the server has it

	request *nats.Msg // the last one for messages
	before  uint64    // how many messages had been accepted before it
	left    int       // how many bytes it may bring yet, if it is the only one
}

// statusRoom is how many statuses fit into a consumer's mail beside the messages
// that it has asked for.
const statusRoom = 64

type consumerInfo struct {
	Name      string    `json:"name"`
	Pending   uint64    `json:"num_pending"`
	Now       time.Time `json:"ts"`
	Delivered struct {
		Count uint64 `json:"consumer_seq"`
		Seq   uint64 `json:"stream_seq"`
	} `json:"delivered"`
	Cluster struct {
		Server string `json:"leader"` // where the consumer lives
	} `json:"cluster"`
}

// A consumerConfig is what we need of a JetStream consumer's configuration.
type consumerConfig struct {
	Name        string        `json:"name"`
	Deliver     string        `json:"deliver_policy"`
	StartSeq    uint64        `json:"opt_start_seq,omitempty"`
	Ack         string        `json:"ack_policy"`
	Replay      string        `json:"replay_policy"`
	Filter      string        `json:"filter_subject"`
	HeadersOnly bool          `json:"headers_only,omitempty"`
	Inactive    time.Duration `json:"inactive_threshold,omitempty"`
	Replicas    int           `json:"num_replicas"`
	Memory      bool          `json:"mem_storage"`
}

// A consumption says what a consumer is to read.
type consumption struct {
	filter      string // the subjects
	from        uint64 // the first sequence; 0 for the stream's first one
	headersOnly bool
	avoid       string        // a server that it is not to live on; "" for none
	batch       int           // how many messages may be under way
	life        time.Duration // how long the server keeps it when nobody asks any more
}

// maxPlacements is how many consumers are made at most until one is not on the server to
// avoid. The servers choose at random, but only among those that the others hear of.
const maxPlacements = 5

// consume makes a consumer. It costs one request, and two more each time that the
// servers put it on the one to avoid.
func (b *bucket) consume(budget *retryBudget, want consumption) (*consumer, error) {
	for n := 1; ; n++ {
		c, err := b.makeConsumer(budget, want)
		if err != nil || want.avoid == "" || c.info.Cluster.Server != want.avoid || n == maxPlacements {
			return c, err
		}
		c.stop()
	}
}

// makeConsumer makes a consumer on any server.
//
// The answer comes on the consumer's own subscription, which shows that it works.
func (b *bucket) makeConsumer(budget *retryBudget, want consumption) (*consumer, error) {
	c := &consumer{
		b: b, name: rand.Text(), batch: want.batch, mail: make(chan *nats.Msg, want.batch+statusRoom),
		bytes: b.maxPayload() + headerRoom + 2*maxKeyLen,
	}
	cfg := consumerConfig{
		Name: c.name, Deliver: "all", Ack: "none", Replay: "instant", Filter: want.filter,
		HeadersOnly: want.headersOnly, Inactive: want.life, Replicas: 1, Memory: true,
	}
	if want.from > 0 {
		cfg.Deliver, cfg.StartSeq = "by_start_sequence", want.from
	}
	e, err := b.connected(budget)
	if err != nil {
		return nil, err
	}
	if c.sub, err = b.nc.ChanSubscribe(b.nc.NewInbox(), c.mail); err != nil {
		return nil, err
	}
	err = c.create(budget, e, cfg)
	if apiCode(err) == codeInactiveLimit {
		cfg.Inactive = 0 // the stream has a limit, and that is its default
		err = c.create(budget, e, cfg)
	}
	if err != nil {
		c.stop()
		return nil, err
	}
	c.live = true
	b.stats.consumers.Add(1)
	return c, nil
}

// create makes the request until it is answered. The request is idempotent.
func (c *consumer) create(budget *retryBudget, e *epoch, cfg consumerConfig) error {
	data, err := json.Marshal(struct {
		Stream string         `json:"stream_name"`
		Config consumerConfig `json:"config"`
	}{c.b.stream, cfg})
	if err != nil {
		return err
	}
	subject := c.b.api + "CONSUMER.CREATE." + c.b.stream + "." + c.name + "." + cfg.Filter
	for {
		answer, err := c.ask(budget, e, subject, data)
		if err != nil {
			return err
		}
		if noResponders(answer) {
			err = nats.ErrNoResponders
		} else if err = decodeAnswer(answer.Data, &c.info); err == nil {
			budget.progress()
			if c.info.Name == c.name {
				return nil
			}
			err = nats.ErrNoResponders // the server is stopping, and has stopped the consumer
		}
		if !passing(err) {
			return err
		}
		if err := c.b.waitAfter(budget, err); err != nil {
			return err
		}
		c.b.retrying(budget, subject)
	}
}

// ask makes a request that is answered on the consumer's own subscription.
func (c *consumer) ask(budget *retryBudget, e *epoch, subject string, data []byte) (*nats.Msg, error) {
	msg := &nats.Msg{Subject: subject, Reply: c.sub.Subject, Data: data}
	if err := c.b.publish(msg); err != nil {
		return nil, err
	}
	timer := time.NewTimer(checkInterval)
	defer timer.Stop()
	w := newWaiter(c.b.requester, budget, e, msg, repeatable, timer)
	w.unique = true // the consumer's name is in it
	for {
		answer, err := await(&w, c.mail)
		if err != nil || answer.Reply == "" {
			return answer, err
		}
	}
}

// A pullRequest asks a consumer for messages.
type pullRequest struct {
	Batch     int           `json:"batch"`
	MaxBytes  int           `json:"max_bytes,omitempty"`
	Expires   time.Duration `json:"expires,omitempty"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
	NoWait    bool          `json:"no_wait,omitempty"`
}

// pull asks for messages, of which the server may allow fewer at a time. It
// returns how many it asked for.
func (c *consumer) pull(req pullRequest) (int, error) {
	req.Batch = min(req.Batch, c.batch)
	if most := int(c.b.maxBatch.Load()); most > 0 {
		req.Batch = min(req.Batch, most)
	}
	req.MaxBytes, c.before, c.left = c.bytes, c.count, c.bytes
	data, err := json.Marshal(req)
	if err != nil {
		return 0, err
	}
	if !c.b.up() {
		return 0, nats.ErrDisconnected
	}
	c.request = &nats.Msg{Subject: c.b.api + "CONSUMER.MSG.NEXT." + c.b.stream + "." + c.name, Reply: c.sub.Subject, Data: data}
	return req.Batch, c.b.publish(c.request)
}

// A status is what the server sends in place of a message.
type status struct {
	// code is the server's, "" for a message, and a word of our own where that says
	// several things: pending for a request beside another one, bytes for one that
	// has brought its bytes, smaller for one that was too large.
	code   string
	unsent int  // how many messages a request that has ended did not bring
	ended  bool // a request has ended
	// seq is how far the consumer has read the stream, in a heartbeat.
	seq uint64
}

var errDisorder = errors.New("deliveries are missing")

// accept reads what the server sent: a delivery, or a status.
func (c *consumer) accept(msg *nats.Msg) (delivery, status, error) {
	if msg.Reply == "" {
		return delivery{}, c.status(msg), nil
	}
	d, ok := parseDelivery(msg.Reply)
	if !ok {
		return d, status{}, fmt.Errorf("delivery with the reply subject %q", msg.Reply)
	}
	c.count++
	c.left -= msg.Size()
	if d.count != c.count {
		return d, status{}, errDisorder
	}
	return d, status{}, nil
}

func (c *consumer) status(msg *nats.Msg) status {
	st := status{code: msg.Header.Get("Status")}
	if st.code == "" {
		st.code = "0" // an answer to a request that was answered already
		return st
	}
	if pending := msg.Header.Get("Nats-Pending-Messages"); pending != "" {
		st.unsent, _ = strconv.Atoi(pending)
		st.ended = true
	}
	if st.code == "100" {
		if count, _ := strconv.ParseUint(msg.Header.Get("Nats-Last-Consumer"), 10, 64); count == c.count {
			st.seq, _ = strconv.ParseUint(msg.Header.Get("Nats-Last-Stream"), 10, 64)
		}
	}
	text := msg.Header.Get("Description")
	switch {
	case st.code == "408" && text == "Requests Pending":
		st.code = "pending"
	case st.code == "409" && text == "Message Size Exceeds MaxBytes":
		st.code = "bytes"
		if c.count == c.before {
			c.bytes *= 2 // the message is larger than any may be now
		}
	case st.code == "409" && strings.HasPrefix(text, "Exceeded MaxRequestBatch of "):
		if most, err := strconv.Atoi(text[len("Exceeded MaxRequestBatch of "):]); err == nil && most > 0 {
			c.b.maxBatch.Store(int32(min(most, 1<<20)))
			st.code = "smaller"
		}
	}
	return st
}

// stop ends the consumer, on the server too as soon as that can be reached; it
// does not wait for that.
func (c *consumer) stop() {
	c.b.unsubscribe(c.sub)
	if c.live {
		c.b.stats.consumers.Add(-1)
	}
	c.b.deleteConsumer(c.b.stream + "." + c.name)
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
