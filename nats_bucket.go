package state

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	// defaultMaxConsumers is how many consumers a new bucket may have, where the
	// account allows it: one for each pattern that a store watches. Where a
	// bucket does not say, servers allow 1000.
	defaultMaxConsumers = 100_000
	// settingsLife is how long the settings of a bucket are relied on where only
	// they make an answer right: an operator may change them.
	settingsLife = 2 * time.Second
)

// A bucket is a JetStream key-value bucket, with what this client knows of it.
type bucket struct {
	*requester
	name   string
	stream string // the stream that holds it
	prefix string // what a key is preceded by to make a subject
	want   bucketWant

	writer string // begins the ids of this client's writes
	writes atomic.Uint64

	settings atomic.Pointer[settings]
	checking atomic.Bool // a check of the settings is under way
	doubting atomic.Bool // settleDoubt is at work
	clock    serverClock
	cache    recordCache
	maxBatch atomic.Int32 // of a consumer's requests, as far as the server has refused more
}

// A bucketWant is what is wanted of a bucket. What is zero is left as it is.
type bucketWant struct {
	history  int
	maxValue int32
	replicas int  // of a new one
	locks    bool // it is to hold locks
}

// settings are what a bucket's operator decided, as they were at a time.
type settings struct {
	streamConfig
	created  time.Time // the stream's, which distinguishes it from another of its name
	checked  time.Time
	epoch    *epoch // of the connection that they came on
	mirrored bool   // mirrors of the stream are known
	alone    bool   // the stream's server is not part of a cluster
	state    *streamState
}

// A streamConfig is what we look at of a stream's configuration.
type streamConfig struct {
	Replicas    int             `json:"num_replicas"`
	PerKey      int64           `json:"max_msgs_per_subject"`
	MaxMsgs     int64           `json:"max_msgs"`
	MaxBytes    int64           `json:"max_bytes"`
	MaxMsgSize  int32           `json:"max_msg_size"`
	MaxAge      time.Duration   `json:"max_age"`
	MarkerTTL   time.Duration   `json:"subject_delete_marker_ttl"`
	Storage     string          `json:"storage"`
	Retention   string          `json:"retention"`
	Discard     string          `json:"discard"`
	AllowTTL    bool            `json:"allow_msg_ttl"`
	AllowDirect bool            `json:"allow_direct"`
	AllowRollup bool            `json:"allow_rollup_hdrs"`
	DenyPurge   bool            `json:"deny_purge"`
	Sealed      bool            `json:"sealed"`
	NoAck       bool            `json:"no_ack"`
	Subjects    []string        `json:"subjects"`
	Mirror      json.RawMessage `json:"mirror"`
	Sources     json.RawMessage `json:"sources"`
	Transform   json.RawMessage `json:"subject_transform"`
}

func (s *streamConfig) rollup() bool { return s.AllowRollup && !s.DenyPurge }

// A streamInfo is the answer to a request for a stream's state. It comes from
// the stream's leader.
type streamInfo struct {
	Config  json.RawMessage `json:"config"`
	Created time.Time       `json:"created"`
	Now     time.Time       `json:"ts"`
	State   streamState     `json:"state"`
	Cluster *struct {
		Name   string `json:"name"` // "" if the server is not part of one
		Leader string `json:"leader"`
	} `json:"cluster"`
	Alternates []struct {
		Name string `json:"name"`
	} `json:"alternates"`

	config streamConfig // from Config
}

// clustered reports whether the stream's server is part of a cluster.
func (i *streamInfo) clustered() bool { return i.Cluster != nil && i.Cluster.Name != "" }

type streamState struct {
	FirstSeq uint64 `json:"first_seq"`
	LastSeq  uint64 `json:"last_seq"`
	Messages uint64 `json:"messages"`
	Bytes    uint64 `json:"bytes"`
}

func newBucket(r *requester, name string, want bucketWant) *bucket {
	return &bucket{
		requester: r,
		name:      name, stream: "KV_" + name, prefix: "$KV." + name + ".", want: want,
		writer: rand.Text()[:12] + ".",
	}
}

// on returns the same bucket on another requester.
func (b *bucket) on(r *requester) *bucket {
	c := newBucket(r, b.name, b.want)
	c.settings.Store(b.settings.Load())
	c.clock.copy(&b.clock)
	return c
}

// nextOp returns an id that no other write has.
func (b *bucket) nextOp() string {
	return string(strconv.AppendUint(append(make([]byte, 0, 32), b.writer...), b.writes.Add(1), 36))
}

// own reports whether this client made a write.
func (b *bucket) own(op string) bool { return strings.HasPrefix(op, b.writer) }

// replicated reports whether the stream is known to be on several servers.
func (b *bucket) replicated() bool { return b.settings.Load().Replicas > 1 }

// maxValue returns the size of the largest value that the bucket takes. The
// exact limit of a message is checked when it is made.
func (b *bucket) maxValue() int {
	limit := b.maxPayload() - headerRoom
	if most := b.settings.Load().MaxMsgSize; most > 0 {
		limit = min(limit, int(most))
	}
	return max(limit, 0)
}

// info asks the leader for the stream's state, and notes what it says of its
// clock and of the bucket's settings.
func (b *bucket) info(budget *retryBudget) (*streamInfo, error) {
	return b.infoBy(budget, "STREAM.INFO", nil)
}

// infoBy makes a request that is answered by a stream info.
func (b *bucket) infoBy(budget *retryBudget, verb string, req any) (*streamInfo, error) {
	for {
		var info streamInfo
		asked := time.Now()
		e := b.currentEpoch()
		if err := b.streamCall(budget, verb, b.stream, req, &info); err != nil {
			return nil, err
		}
		if info.Cluster != nil && info.Cluster.Leader == "" {
			// Without a leader every member answers, for itself.
			if err := b.waitAfter(budget, fmt.Errorf("stream %s has no leader", b.stream)); err != nil {
				return nil, err
			}
			continue
		}
		if err := b.noteInfo(&info, asked, e); err != nil {
			return nil, err
		}
		return &info, nil
	}
}

// noteInfo notes what a stream info says that was asked for at a time.
func (b *bucket) noteInfo(info *streamInfo, asked time.Time, e *epoch) error {
	if err := json.Unmarshal(info.Config, &info.config); err != nil {
		return fmt.Errorf("configuration of stream %s: %w", b.stream, err)
	}
	b.clock.set(timestamp(info.Now.UnixNano()), asked, e)
	now := &settings{
		streamConfig: info.config, created: info.Created, checked: asked, epoch: e,
		mirrored: len(info.Alternates) > 1, alone: !info.clustered(), state: &info.State,
	}
	last := b.settings.Load()
	for ; last == nil || !last.checked.After(asked); last = b.settings.Load() {
		if b.settings.CompareAndSwap(last, now) {
			break
		}
	}
	switch {
	case last == nil:
	case last.checked.After(asked):
		return nil // an answer to a later question has come before
	case !last.created.Equal(now.created):
		b.cache.clear()
		b.log.Warn("state: the bucket was deleted and created again", "bucket", b.name)
	case last.Replicas != now.Replicas, last.PerKey != now.PerKey, last.MaxAge != now.MaxAge, last.AllowTTL != now.AllowTTL:
		b.log.Info("state: settings of the bucket changed", "bucket", b.name, "replicas", now.Replicas, "history", now.PerKey, "max_age", now.MaxAge)
	}
	return nil
}

// streamCall is call about the bucket's stream. A stream that is gone is
// jetstream.ErrBucketNotFound.
func (b *bucket) streamCall(budget *retryBudget, verb, object string, req, answer any) error {
	for asked := time.Now(); ; {
		err := b.call(budget, verb, object, req, answer)
		if apiCode(err) != codeNoStream {
			return err
		}
		// In a cluster, a server that is starting may not have heard of it yet.
		err = fmt.Errorf("%w: %w", jetstream.ErrBucketNotFound, err)
		if s := b.settings.Load(); s == nil || !b.elections() || time.Since(asked) > goneAfter || budget.left() <= minAttempt {
			return err
		}
		if ended := b.pause(budget, checkInterval, nil); ended != nil {
			return ended
		}
	}
}

// check looks at the settings in the background if they are not fresh.
func (b *bucket) check() {
	if b.checking.CompareAndSwap(false, true) {
		if !b.start(func() {
			defer b.checking.Store(false)
			_, _ = b.info(newBudget(b.life))
		}) {
			b.checking.Store(false)
		}
	}
}

// refresh looks at the settings after something has contradicted what was
// believed of them, and makes the bucket fit again.
func (b *bucket) refresh(budget *retryBudget) error {
	info, err := b.info(budget)
	if err == nil {
		err = b.prepare(budget, info)
	}
	return err
}

var errNoTTL = errors.New("the server has no message TTLs: nats-server 2.11 or later is needed")

// open binds to the bucket, or creates it.
func (b *bucket) open(budget *retryBudget) error {
	if _, err := b.connected(budget); err != nil {
		return openError(err)
	}
	if lacksMessageTTL(b.nc.ConnectedServerVersion()) {
		return errNoTTL
	}
	info, err := b.info(budget)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		info, err = b.create(budget)
	}
	if err != nil {
		return openError(err)
	}
	return b.prepare(budget, info)
}

// prepare makes sure that a stream can serve as the bucket, and changes of it what
// must be otherwise.
func (b *bucket) prepare(budget *retryBudget, info *streamInfo) error {
	if err := b.validate(&info.config); err != nil {
		return err
	}
	info, err := b.updateStream(budget, info)
	if err != nil {
		return openError(err)
	}
	if !info.config.AllowTTL {
		return errNoTTL
	}
	if info.config.PerKey != 1 && !info.config.rollup() {
		return errors.New("the bucket keeps a history and denies purges: a deleted key could come back")
	}
	return nil
}

// lacksMessageTTL reports whether a server version is one without message TTLs.
func lacksMessageTTL(version string) bool {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	x, err1 := strconv.Atoi(major)
	y, err2 := strconv.Atoi(minor)
	return err1 == nil && err2 == nil && (x < 2 || x == 2 && y < 11)
}

// openError says in words what the usual reasons are.
func openError(err error) error {
	switch code := apiCode(err); {
	case code == codeNotEnabled, code == codeNoAccount:
		return fmt.Errorf("JetStream is not enabled for this account: %w", err)
	case errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("JetStream is not enabled on the server, or not reachable: %w", err)
	}
	return err
}

// create makes the bucket as an ordinary KV bucket, but with message TTLs and
// without delete markers: these can lose writes, see [NATSStore].
func (b *bucket) create(budget *retryBudget) (*streamInfo, error) {
	maxValue := b.want.maxValue
	if maxValue == 0 {
		maxValue = defaultMaxValue
	}
	config := jetstream.StreamConfig{
		Name:              b.stream,
		Subjects:          []string{b.prefix + ">"},
		MaxMsgsPerSubject: int64(max(b.want.history, 1)),
		MaxMsgSize:        withHeaders(maxValue),
		Replicas:          max(b.want.replicas, 1),
		Storage:           jetstream.FileStorage,
		Discard:           jetstream.DiscardNew,
		DenyDelete:        true,
		AllowRollup:       true,
		AllowDirect:       true,
		AllowMsgTTL:       true,
		MaxConsumers:      defaultMaxConsumers,
		MaxMsgs:           -1,
		MaxBytes:          -1,
		Duplicates:        2 * time.Minute,
	}
	if b.want.locks {
		// Revisions are the fencing tokens of locks. They must go on growing if
		// the bucket is deleted and created again, so they start at the time, which
		// grows faster: a bucket does not take a million writes per second.
		config.FirstSeq = uint64(time.Now().UnixMicro())
	}
	info, err := b.infoBy(budget, "STREAM.CREATE", config)
	if apiCode(err) == codeMaxConsumers {
		config.MaxConsumers = -1 // the account has a limit
		info, err = b.infoBy(budget, "STREAM.CREATE", config)
	}
	for apiCode(err) == codeNotCreated {
		// A server of the cluster was not ready, or a server is still removing the
		// directories of a stream that was the account's last.
		if err := b.waitAfter(budget, err); err != nil {
			return nil, err
		}
		info, err = b.infoBy(budget, "STREAM.CREATE", config)
	}
	if apiCode(err) == codeNameInUse {
		info, err = b.info(budget) // somebody was faster
	}
	for apiCode(err) == codeNoStream {
		if err := b.waitAfter(budget, err); err != nil {
			return nil, err
		}
		info, err = b.info(budget)
	}
	return info, err
}

// withHeaders returns the size of the messages that hold values of a size. The
// server counts headers in.
func withHeaders(maxValue int32) int32 {
	return int32(min(int64(maxValue)+headerRoom, math.MaxInt32))
}

// validate reports why a stream cannot serve as the bucket.
func (b *bucket) validate(c *streamConfig) error {
	switch {
	case !slices.Contains(c.Subjects, b.prefix+">"):
		return fmt.Errorf("the stream %s is not a bucket that can be written to: its subjects are %q", b.stream, c.Subjects)
	case b.want.locks:
		return validateForLocks(c)
	}
	return nil
}

// validateForLocks reports why a bucket cannot hold locks: a record must stay
// until its lease has lapsed, whatever happens, and go for no other reason.
func validateForLocks(c *streamConfig) error {
	var reason string
	switch {
	case c.Storage != "file":
		reason = "it is in memory, so a restart of the server would forget who holds a lock"
	case c.MaxAge > 0:
		reason = fmt.Sprintf("its max_age of %v would end leases early", c.MaxAge)
	case c.MarkerTTL > 0:
		reason = "its delete markers can remove newer records"
	case c.Discard == "old" && (c.MaxMsgs > 0 || c.MaxBytes > 0):
		reason = "it discards old records when it is full"
	case c.PerKey != 1 && !c.rollup():
		reason = "it keeps a history and denies purges, so an older lease could come back"
	case c.Retention != "" && c.Retention != "limits":
		reason = fmt.Sprintf("its retention is %q", c.Retention)
	case c.Sealed:
		reason = "it is sealed"
	case c.NoAck:
		reason = "it does not acknowledge writes"
	case present(c.Mirror), present(c.Sources), present(c.Transform):
		reason = "it is a mirror, has sources or transforms subjects"
	case c.MaxMsgSize > 0 && c.MaxMsgSize < headerRoom:
		reason = fmt.Sprintf("its largest message is %d bytes", c.MaxMsgSize)
	default:
		return nil
	}
	return fmt.Errorf("the bucket cannot hold locks: %s", reason)
}

func present(field json.RawMessage) bool {
	return len(field) > 0 && string(field) != "null" && string(field) != "[]"
}

// updateStream raises what the caller set higher than an existing bucket has it, and
// switches message TTLs on. It lowers nothing, and leaves all else as it is,
// also what this version of the client does not know of.
func (b *bucket) updateStream(budget *retryBudget, info *streamInfo) (*streamInfo, error) {
	changes := map[string]any{}
	if !info.config.AllowTTL {
		changes["allow_msg_ttl"] = true
	}
	if has := info.config.PerKey; has > 0 && int64(b.want.history) > has {
		changes["max_msgs_per_subject"] = b.want.history
	}
	if has := info.config.MaxMsgSize; has > 0 && b.want.maxValue > has {
		changes["max_msg_size"] = withHeaders(b.want.maxValue)
	}
	if len(changes) == 0 {
		return info, nil
	}
	config := map[string]json.RawMessage{}
	if err := json.Unmarshal(info.Config, &config); err != nil {
		return nil, err
	}
	for field, value := range changes {
		config[field], _ = json.Marshal(value)
	}
	return b.infoBy(budget, "STREAM.UPDATE", config)
}

// exists reports whether a record is that of a key that exists, provided that
// nobody has replaced it: it may have been read before its deadline, and replaced
// since.
func (b *bucket) exists(budget *retryBudget, r *record) bool {
	return r.revision != 0 && !r.deleted && !b.expired(budget, r.deadline)
}

func (b *bucket) expired(budget *retryBudget, deadline timestamp) bool {
	return deadline != 0 && deadline.passed(b.clockFor(budget, deadline))
}

// clockFor returns the server's clock, of which a lower bound is known. Where that
// cannot say whether a deadline has passed, the server is asked.
func (b *bucket) clockFor(budget *retryBudget, deadline timestamp) timestamp {
	clock := b.readClock()
	if !clock.decides(deadline) {
		if info, err := b.info(budget); err == nil {
			return timestamp(info.Now.UnixNano())
		}
	}
	return clock.now
}

func (b *bucket) readClock() clockReading { return b.clock.read(b.currentEpoch()) }
