package state

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// NATSStoreConfig holds NATS KV store configuration.
type NATSStoreConfig struct {
	// Conn is the NATS connection to use. It stays the caller's: Close leaves
	// it open. A connection that gives up reconnecting ends the store's watches.
	Conn *nats.Conn
	// Bucket is the KV bucket name: letters, digits, "-" and "_". The bucket is
	// created if it does not exist. Locks are kept in a second one, with
	// "-locks" after the name, from the first Lock on.
	Bucket string
	// TTL is the default TTL for entries (0 = no default): what a Put with a
	// TTL of 0 gets.
	TTL time.Duration
	// History is the number of revisions to keep per key, at most 64. Default: 1
	// for a new bucket; what an existing one has is changed only if this is set.
	// The history of a key begins anew when it is deleted or written with a TTL:
	// nothing older may come back when that goes.
	History int
	// MaxValueSize is the maximum value size in bytes. Default: 1MB for a new
	// bucket; what an existing one has is changed only if this is set. The
	// server's max_payload less 1 KiB for headers is a limit, too.
	MaxValueSize int32
	// Replicas is how many servers keep a copy of a new bucket. Default: 1. An
	// existing bucket is left as it is.
	Replicas int
}

// DefaultNATSStoreConfig returns configuration with sensible defaults (Bucket
// "agent-state"). Conn is to be set.
func DefaultNATSStoreConfig() NATSStoreConfig {
	return NATSStoreConfig{
		Bucket:       "agent-state",
		History:      1,
		MaxValueSize: defaultMaxValue,
		Replicas:     1,
	}
}

// NATSStore implements StateStore using NATS JetStream KV.
//
// The bucket is a plain KV bucket: what the store writes, every other KV client
// reads, and the other way round. An existing bucket is bound as its operator
// made it, except that message TTLs are switched on. Two settings matter to
// what it promises:
//
//   - A bucket with a TTL of its own (MaxAge) keeps it: no entry lives longer,
//     whatever TTL it was put with. Entries end at that deadline as at one of
//     their own.
//   - A bucket with delete markers (SubjectDeleteMarkerTTL, which nats.go calls
//     LimitMarkerTTL) keeps them, since other clients may rely on them. On a
//     replicated bucket the server can then lose a write that is under way at
//     the timestamp when it removes the key's old value. The store keeps out of
//     the way: it has the server remove its values ten minutes after they have
//     expired, and a write that would be under way at such a timestamp waits for
//     the server, for two seconds at most.
//
// On several replicas every read is answered by the stream's leader. A leader
// that a network partition has cut off from the others goes on answering as one
// until it notices, which takes up to 20 seconds; to who is on its side of the
// partition, writes made on the other side are invisible for that long. What
// must not be wrong is decided by a Lock or an Update, which are always agreed
// on by a majority.
//
// An acknowledgement means that a majority of the replicas has the change. When
// they write it to the disk for good is the servers' sync_interval.
//
// A watch ends, by closing its channel, when the store is closed, when the
// connection is closed for good, when the bucket is gone or was made anew, and
// when the watch was cut off for longer than a deletion stays on the server, an
// hour. It outlives anything shorter, and then tells what it missed: the last
// state of every key that changed. Of a key that changed several times meanwhile
// as many revisions as the bucket's History are told, and a key that came and
// went may not be told at all.
//
// A bucket keeps no state that was replaced, and the server delivers a write
// some time after it has accepted it. So that a watch can tell also what was
// replaced by then, it listens to the writes themselves, on the bucket's
// subjects. When such a state was written it knows only roughly: its Modified
// lies between those of the states before and after it. Where the connection
// may not subscribe to these subjects, or the writer is another KV client, a
// state that was replaced within a few milliseconds may not be told.
//
// A watch keeps the names and revisions of the matching keys in memory.
//
// Right after a server was killed, not stopped, a bucket of one replica may
// have lost the deletions that other clients made with short-lived markers. The
// store's own outlive that.
type NATSStore struct {
	nc       *nats.Conn
	data     *bucket
	ttl      time.Duration
	maxValue int

	maxCut time.Duration // for how long a watch may be cut off

	life    context.Context // until Close
	end     context.CancelFunc
	active  sync.WaitGroup
	watches atomic.Int64 // how many are running
	locks   lockBucket

	mu     sync.Mutex // guards closed: nothing is added to active afterwards
	closed bool
}

var (
	_ StateStore     = (*NATSStore)(nil)
	_ Updater        = (*NATSStore)(nil)
	_ ContextWatcher = (*NATSStore)(nil)
)

// NewNATSStore binds to a bucket, which it creates if there is none. It fails
// within seconds, and says in words what is wrong: the configuration, the
// connection, JetStream is not enabled, the server is older than 2.11 and has
// no message TTLs, or a permission is missing.
func NewNATSStore(cfg NATSStoreConfig) (*NATSStore, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	data := newBucket(newLink(cfg.Conn), cfg.Bucket)
	if err := data.open(newCall(context.Background()), cfg.want()); err != nil {
		return nil, fmt.Errorf("state: bucket %q: %w", cfg.Bucket, err)
	}
	s := &NATSStore{
		nc:       cfg.Conn,
		data:     data,
		ttl:      cfg.TTL,
		maxValue: data.maxValue(),
		maxCut:   markerLife - time.Minute,
	}
	s.life, s.end = context.WithCancel(context.Background())
	if cfg.MaxValueSize > 0 {
		s.maxValue = min(s.maxValue, int(cfg.MaxValueSize))
	}
	status := s.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	s.active.Go(func() { data.follow(status, s.life.Done()) })
	return s, nil
}

func (cfg *NATSStoreConfig) validate() error {
	switch {
	case cfg.Conn == nil:
		return errors.New("NATSStoreConfig.Conn is nil")
	case cfg.Conn.IsClosed():
		return fmt.Errorf("NATSStoreConfig.Conn: %w", nats.ErrConnectionClosed)
	case !validBucket(cfg.Bucket):
		return fmt.Errorf("bucket name %q: must be letters, digits, - and _, and not empty", cfg.Bucket)
	case cfg.TTL < 0:
		return fmt.Errorf("NATSStoreConfig.TTL is %v: must not be negative", cfg.TTL)
	case cfg.History < 0 || cfg.History > 64:
		return fmt.Errorf("NATSStoreConfig.History is %d: must be 1 to 64, or 0 for the default", cfg.History)
	case cfg.MaxValueSize < 0:
		return fmt.Errorf("NATSStoreConfig.MaxValueSize is %d: must not be negative", cfg.MaxValueSize)
	case cfg.Replicas < 0 || cfg.Replicas > 5:
		return fmt.Errorf("NATSStoreConfig.Replicas is %d: must be 1 to 5, or 0 for the default", cfg.Replicas)
	}
	return nil
}

func validBucket(name string) bool {
	for _, c := range []byte(name) {
		if !keyByte[c] || c == '/' || c == '=' || c == '.' {
			return false
		}
	}
	return name != ""
}

// want says what the caller set of a bucket.
func (cfg *NATSStoreConfig) want() bucketWant {
	w := bucketWant{history: cfg.History, replicas: cfg.Replicas}
	if cfg.MaxValueSize > 0 {
		w.maxMsgSize = int32(min(int64(cfg.MaxValueSize)+headerRoom, 1<<31-1))
	}
	return w
}

// maxValue returns the size of the largest value that the bucket takes.
func (b *bucket) maxValue() int {
	limit := int(b.nc.MaxPayload()) - headerRoom
	if most := b.setup.Load().MaxMsgSize; most > 0 {
		limit = min(limit, int(most)-headerRoom)
	}
	return max(limit, 0)
}

// begin starts an operation that is refused after Close.
func (s *NATSStore) begin() error {
	if s.life.Err() != nil {
		return ErrClosed
	}
	return nil
}

// get returns the record of a key that exists.
func (s *NATSStore) get(key string) (record, error) {
	if err := s.begin(); err != nil {
		return record{}, err
	}
	if err := ValidateKey(key); err != nil {
		return record{}, err
	}
	c := newCall(context.Background())
	r, err := s.data.last(c, key)
	if err != nil {
		return record{}, opError("get", key, err)
	}
	s.data.known.learn(key, r)
	if !s.data.exists(c, &r) {
		return record{}, ErrNotFound
	}
	return r, nil
}

// Get implements [StateStore].
func (s *NATSStore) Get(key string) ([]byte, error) {
	r, err := s.get(key)
	if err != nil {
		return nil, err
	}
	return r.value, nil
}

// GetKeyValue implements [StateStore].
func (s *NATSStore) GetKeyValue(key string) (*KeyValue, error) {
	r, err := s.get(key)
	if err != nil {
		return nil, err
	}
	return r.event(key, r.deadline), nil
}

// Put implements [StateStore].
func (s *NATSStore) Put(key string, value []byte, ttl time.Duration) error {
	last := func() *record {
		if last := s.data.known.recall(key); last != nil {
			return last
		}
		return &record{} // a key that is not known is tried as a new one
	}
	_, err := s.put("put", key, value, ttl, last, func(*call, *record) error { return nil })
	return err
}

// Update implements [Updater].
func (s *NATSStore) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	last := func() *record {
		last := s.data.known.recall(key)
		switch {
		case revision != 0 && (last == nil || last.revision != revision):
			return nil
		case revision == 0 && (last == nil || last.exists(s.data.clock.now())):
			return &record{}
		}
		return last
	}
	r, err := s.put("update", key, value, ttl, last, func(c *call, last *record) error {
		var current uint64
		if s.data.exists(c, last) {
			current = last.revision
		}
		if current != revision {
			return ErrConflict
		}
		return nil
	})
	return r.revision, err
}

// put writes a value, if allowed agrees to what it replaces.
func (s *NATSStore) put(verb, key string, value []byte, ttl time.Duration, believed func() *record, allowed func(*call, *record) error) (record, error) {
	if err := s.begin(); err != nil {
		return record{}, err
	}
	if err := validatePut(key, value, ttl, s.maxValue); err != nil {
		return record{}, err
	}
	if ttl == 0 {
		ttl = s.ttl
	}
	return s.write(verb, key, believed, func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if err := allowed(c, last); err != nil {
			return nil, record{}, err
		}
		msg, next := w.value(last, value, ttl)
		return msg, next, nil
	})
}

// errNothing is the decision of a deletion that has nothing to delete.
var errNothing = errors.New("nothing to delete")

// Delete implements [StateStore].
func (s *NATSStore) Delete(key string) error {
	if err := s.begin(); err != nil {
		return err
	}
	if err := ValidateKey(key); err != nil {
		return err
	}
	believed := func() *record {
		last := s.data.known.recall(key)
		if last != nil && !last.exists(s.data.clock.now()) {
			return nil // somebody may have made it since
		}
		return last
	}
	_, err := s.write("delete", key, believed, func(c *call, last *record, w entryWriter) (*nats.Msg, record, error) {
		if !s.data.exists(c, last) {
			return nil, record{}, errNothing
		}
		msg, next := w.marker(last, markerLife)
		return msg, next, nil
	})
	if err == errNothing {
		return nil
	}
	return err
}

// write is what Put, Update and Delete have in common. The bare errors of
// decide stay bare.
func (s *NATSStore) write(verb, key string, believed func() *record, decide decision) (record, error) {
	if err := s.data.turns.take(key); err != nil {
		return record{}, opError(verb, key, err)
	}
	defer s.data.turns.give(key)
	r, err := s.data.commit(newCall(context.Background()), write{
		key: key, op: s.data.nextOp(), last: believed(), decide: decide, chained: true,
	})
	return r, opError(verb, key, err)
}

// opError adds to an error what was to be done, unless it is a documented one.
func opError(verb, key string, err error) error {
	switch err {
	case nil, ErrConflict, ErrValueTooLarge, ErrLockHeld, errNothing:
		return err
	}
	return fmt.Errorf("state: %s %q: %w", verb, key, err)
}

// Keys implements [StateStore].
func (s *NATSStore) Keys(pattern string) ([]string, error) {
	if err := s.begin(); err != nil {
		return nil, err
	}
	p, err := parsePattern(pattern)
	if err != nil {
		return nil, err
	}
	keys, err := s.data.keys(context.Background(), p)
	return keys, opError("keys", pattern, err)
}

// Watch implements [StateStore]. See [NATSStore] for when it ends.
func (s *NATSStore) Watch(pattern string) (<-chan *KeyValue, error) {
	return s.WatchContext(context.Background(), pattern)
}

// Close implements [StateStore]. The connection stays open.
func (s *NATSStore) Close() error {
	s.mu.Lock()
	s.closed = true
	s.end()
	s.mu.Unlock()
	s.active.Wait()
	return nil
}
