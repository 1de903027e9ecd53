package state

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

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
	noFew   atomic.Bool // a listing of few keys was not answered
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

// replicated reports whether the stream is known to be on several servers.
func (b *bucket) replicated() bool {
	setup := b.setup.Load()
	return setup != nil && setup.Replicas > 1
}

func (s *bucketSetup) rollup() bool { return s.AllowRollup && !s.DenyPurge }

// A streamInfo is the answer to a request for a stream's state. It comes from
// the stream's leader.
type streamInfo struct {
	Config  json.RawMessage `json:"config"`
	Created time.Time       `json:"created"`
	Now     time.Time       `json:"ts"`
	State   struct {
		LastSeq  uint64 `json:"last_seq"`
		Messages uint64 `json:"messages"`
		Bytes    uint64 `json:"bytes"`
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
		writer: rand.Text()[:16],
		known:  memo{limit: memoLimit},
	}
}

// nextOp returns an id that no other write has.
func (b *bucket) nextOp() string {
	return string(strconv.AppendUint(append(make([]byte, 0, 64), b.writer...), b.writes.Add(1), 36))
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
		b.clock.set(timestamp(info.Now.UnixNano()), asked, reconnects)
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
		answer, err := b.ask(c, msg, 0)
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
	var suspect time.Time
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
		switch {
		case known == nil || known.revision <= r.revision, !b.replicated():
			return r, nil
		case r.revision == 0 && !known.exists(b.clock.now()):
			return r, nil // it has gone since
		}
		// Or it was removed by hand, or the stream is another one by now. While
		// one leader takes over from another they answer in turn: only time
		// tells.
		info, err := b.info(c)
		if err != nil {
			return record{}, err
		}
		if suspect.IsZero() {
			suspect = time.Now()
		}
		if !b.created.Equal(info.Created) || info.State.LastSeq >= known.revision && time.Since(suspect) > staleFor {
			b.known.forget(key)
			return r, nil
		}
		if !c.again() {
			return record{}, errStaleLeader
		}
	}
}

// staleFor is for how long an answer is doubted that is older than what is
// known.
const staleFor = 1500 * time.Millisecond

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
	if !b.replicated() {
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

// exists reports whether a record is that of a key that exists now.
func (b *bucket) exists(c *call, r *record) bool {
	return r.revision != 0 && !r.deleted && !b.expired(c, r.deadline)
}

// expired reports whether a deadline has passed by the server's clock, of which
// a lower bound is known. Where that does not decide it, is close to the
// deadline or might be wrong, the server is asked first.
func (b *bucket) expired(c *call, deadline timestamp) bool {
	if deadline == 0 {
		return false
	}
	now, slack, age := b.clock.read(b.nc)
	maybe, surely := deadline.passed(now+slack), deadline.passed(now-closeCall)
	open := !surely && (age > freshSample || !deadline.passed(now))
	if maybe && (age >= sampleLife || open) {
		if info, err := b.info(c); err == nil {
			now = timestamp(info.Now.UnixNano())
		}
	}
	return deadline.passed(now)
}
