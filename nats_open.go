package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// maxConsumers is how many consumers a new bucket may have: one for each watch,
// of all clients. Where a bucket does not say, servers allow 1000.
const maxConsumers = 100_000

// A bucketWant is what is wanted of a bucket. What is zero is not applied to an
// existing one.
type bucketWant struct {
	history    int
	maxMsgSize int32
	replicas   int    // of a new one
	storage    string // of a new one
}

var errNoTTL = errors.New("the server has no message TTLs: nats-server 2.11 or later is needed")

// open binds to the bucket, or creates it.
func (b *bucket) open(c *call, want bucketWant) error {
	if old(b.nc.ConnectedServerVersion()) {
		return errNoTTL
	}
	info, err := b.info(c)
	if apiCode(err) == codeNoStream {
		info, err = b.create(c, want)
	}
	if err != nil {
		return openError(err)
	}
	if err := b.suitable(&info.setup); err != nil {
		return err
	}
	if info, err = b.adapt(c, info, want); err != nil {
		return openError(err)
	}
	if !info.setup.AllowTTL {
		return errNoTTL
	}
	b.created = info.Created
	if info.setup.PerKey != 1 && !info.setup.rollup() {
		return errors.New("the bucket keeps a history and denies purges: a deleted key could come back")
	}
	return nil
}

// old reports whether a server version is one without message TTLs.
func old(version string) bool {
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
func (b *bucket) create(c *call, want bucketWant) (*streamInfo, error) {
	storage := jetstream.FileStorage
	if want.storage == "memory" {
		storage = jetstream.MemoryStorage
	}
	maxMsgSize := want.maxMsgSize
	if maxMsgSize == 0 {
		maxMsgSize = defaultMaxValue + headerRoom
	}
	info, err := b.infoBy(c, "STREAM.CREATE", jetstream.StreamConfig{
		Name:              b.stream,
		Subjects:          []string{b.prefix + ">"},
		MaxMsgsPerSubject: int64(max(want.history, 1)),
		MaxMsgSize:        maxMsgSize,
		Replicas:          max(want.replicas, 1),
		Storage:           storage,
		Discard:           jetstream.DiscardNew,
		DenyDelete:        true,
		AllowRollup:       true,
		AllowDirect:       true,
		AllowMsgTTL:       true,
		MaxConsumers:      maxConsumers,
		MaxMsgs:           -1,
		MaxBytes:          -1,
		Duplicates:        2 * time.Minute,
	})
	for apiCode(err) == codeNameInUse || apiCode(err) == codeNoStream && c.again() {
		info, err = b.info(c) // somebody was faster
	}
	return info, err
}

// suitable reports why a stream cannot be used as a bucket.
func (b *bucket) suitable(setup *bucketSetup) error {
	if !slices.Contains(setup.Subjects, b.prefix+">") {
		return fmt.Errorf("the stream %s is not a bucket that can be written to: its subjects are %q", b.stream, setup.Subjects)
	}
	return nil
}

// adapt changes of an existing bucket what must be otherwise, and nothing else:
// also what this version of the client does not know of stays as it is.
func (b *bucket) adapt(c *call, info *streamInfo, want bucketWant) (*streamInfo, error) {
	changes := map[string]any{}
	if !info.setup.AllowTTL {
		changes["allow_msg_ttl"] = true
	}
	if want.history != 0 && int64(want.history) != info.setup.PerKey {
		changes["max_msgs_per_subject"] = want.history
	}
	if want.maxMsgSize != 0 && want.maxMsgSize != info.setup.MaxMsgSize {
		changes["max_msg_size"] = want.maxMsgSize
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
	return b.infoBy(c, "STREAM.UPDATE", config)
}
