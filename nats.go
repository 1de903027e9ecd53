package state

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// NATSStoreConfig holds NATS KV store configuration.
type NATSStoreConfig struct {
	// Conn is the NATS connection to use. It belongs to the caller, and Close
	// leaves it open. A connection that gives up reconnecting ends the store's
	// watches, so connect with nats.MaxReconnects(-1). While the client library
	// writes to a link that takes nothing, no call can end: by default for a
	// minute, or for as long as nats.FlusherTimeout says. With nats.NoEcho, a waiter
	// for a lock polls as with a Domain.
	Conn *nats.Conn
	// Bucket is the KV bucket name: letters, digits, "-" and "_". The bucket is
	// created if it does not exist. Locks are kept in a second one, with
	// "-locks" after the name, which the first Lock creates. So a name must not
	// end with "-locks".
	Bucket string
	// TTL is the default TTL for entries (0 = no default): what a write with a
	// TTL of 0 gets. With a default, no entry is without one.
	TTL time.Duration
	// History is the number of revisions to keep per key, at most 64. Default: 1
	// for a new bucket. That of an existing bucket is raised to History, and
	// never lowered. Deleting a key, or writing it with a TTL, discards its
	// history, so that nothing older comes back.
	History int
	// MaxValueSize is the maximum value size in bytes. Default: 1MB for a new
	// bucket. That of an existing bucket is raised to MaxValueSize, and never
	// lowered; this store always keeps to MaxValueSize. The server's max_payload
	// less 1 KiB for headers is a limit, too.
	MaxValueSize int32
	// Replicas is how many servers keep a copy of a new bucket. Default: 1. An
	// existing bucket is left as it is.
	Replicas int
	// Domain is the JetStream domain of the bucket, as behind a leaf node. A
	// release that is published on one side of a leaf node may not be heard on
	// the other. So a waiter for a lock also checks every two seconds whether it
	// was released.
	Domain string
	// APIPrefix is what an account's import puts in place of "$JS.API", if the
	// bucket belongs to another account. Set at most one of Domain and APIPrefix.
	// The owner exports the service "$JS.API.>" with the response type stream,
	// and the services "$KV.<bucket>.>" and "$KV.<bucket>-locks.>". The account
	// of Conn imports them as "<prefix>.>", "<prefix>.$KV.<bucket>.>" and
	// "<prefix>.$KV.<bucket>-locks.>". A waiter for a lock checks every two
	// seconds, as with a Domain.
	APIPrefix string
	// Logger receives what operators need to know: a watch was cut off, is back
	// or ends; a Refresh found its lock gone; the outcome of a write is unknown; a
	// leader gave an old answer; settings changed; a request takes longer than a
	// second. Requests are not logged otherwise, nor are errors that a call
	// returns. Default: silent.
	Logger *slog.Logger
	// Owner is what LockHolder and the records of locks name as the holder.
	// Default: host name and process ID, as in "host:123".
	Owner string
}

// DefaultNATSStoreConfig returns configuration with sensible defaults (Bucket
// "agent-state"). The caller must set Conn. It sets MaxValueSize, so that a smaller
// limit of an existing bucket is raised; set that to 0 to keep the bucket's own.
func DefaultNATSStoreConfig() NATSStoreConfig {
	return NATSStoreConfig{
		Bucket:       "agent-state",
		History:      1,
		MaxValueSize: defaultMaxValue,
		Replicas:     1,
	}
}

// NATSStore implements StateStore, and Store, using NATS JetStream KV.
//
// The bucket is an ordinary KV bucket: other KV clients read what the store
// writes, and the store reads what they write. An existing bucket keeps the
// settings that its operator chose, except that the store switches message TTLs
// on and raises History and MaxValueSize, see [NATSStoreConfig]. Two settings
// matter to the contract:
//
//   - A bucket that has a TTL itself (MaxAge) keeps it. No entry lives longer,
//     even if its own TTL is longer; it then expires like any other.
//   - A bucket with delete markers (SubjectDeleteMarkerTTL, which nats.go calls
//     LimitMarkerTTL) keeps them, since other clients may rely on them. On a
//     replicated bucket the server can then lose a write that is under way when
//     it removes the key's old value. To avoid that, the store has the server
//     remove its values ten minutes after they have expired, and a write that
//     would be under way at such a time waits for the server, for two seconds at
//     most.
//
// The settings may change while the store is open. It notices within seconds while
// it watches or lists, and within a minute while it writes; if it only reads from a
// cluster, not before. For up to two seconds after the replicas of a bucket are
// raised from one, a Get may miss what others have just written. While the bucket is
// deleted, methods that use it return an error that errors.Is reports as
// [jetstream.ErrBucketNotFound], except for Watch, which returns [ErrWatchClosed].
// They work again when the bucket is back.
//
// On several replicas the stream's leader answers every read. A watch may report a
// change shortly before the leader has applied it: a Get right after the event may
// not see the change yet. (An Update on top of it waits for that.) A leader that a
// network partition has cut off from the other servers continues to answer until
// it notices, which takes up to 20 seconds. For that long, clients on its side of
// the partition do not see writes made on the other side. The same can happen
// without a partition if a server gets no processor time for seconds, so that the
// others elect another leader before it notices. Where that must not happen, use a
// Lock or an Update: a majority always decides that one of them succeeds. (That it is
// refused, with [ErrLockHeld] or [ErrConflict], may rest on what such a leader says.)
//
// When such a leader is back, and before it gives way, it can refuse a conditional
// write that the new leader stores. If another client replaces that write within
// milliseconds, Update and DeleteRevision return [ErrConflict], though the write was
// stored. The outcome of a lock's Refresh or Unlock is unknown then.
//
// A majority also decides whether a watched key has expired or was purged. The watch
// that notices it first writes a deletion. The servers store the deletion only if
// nothing was written to the key since, and all watches report what was stored. The
// deletion stays for two seconds, or for as long as what it replaces. On one replica
// only a watch that was cut off does this, about keys that were gone when it came back.
//
// A watch cannot write the deletion to a bucket that is full, has delete markers or a
// TTL of its own, or takes only messages of some hundred bytes. Nor can it if an older
// revision of the key comes back, because another client wrote the one that expired.
// In these cases a watch may report an expiry that only a leader confirms that was cut
// off. It may also report the expiry of a value whose refresh was under way, or was
// missed while the watch was cut off.
//
// An acknowledgement means that a majority of the replicas has the change. The
// servers' sync_interval says when they sync it to the disk. Machines that lose
// power before that can lose it. Then a lock can have two holders, and revisions
// and fencing tokens can repeat.
//
// A watch ends, by closing its channel, when the store is closed, when the
// connection is closed for good, when the bucket is deleted, when the server
// refuses to let the watch continue, and when the watch was cut off for about an
// hour, or for as long as the bucket's own TTL if that is shorter. It survives a
// shorter cut, and then delivers the last state of every key that changed. It may not
// mention a key that was created and deleted meanwhile. Keys that an operator purges
// are reported as deleted, usually with the revision of their last value. That happens
// within seconds if the whole stream is purged, and otherwise when the watch lists the
// bucket again, in about ten minutes at the latest. The same is true of a key that is
// deleted while the bucket is too full to hold the deletion.
//
// All watches of one pattern in a store share one consumer on the server. The
// store keeps the names and revisions of the matching keys in memory. It lists the keys
// that exist when the first of these watches begins. A key can expire, and be removed
// by the server about two seconds later, before this listing reaches it. Its expiry is
// not reported then. Use [Follow] where that matters.
//
// When the server of a bucket with one replica is killed, deletions that other
// clients made with short-lived markers may be lost. The store's own deletions
// are not.
type NATSStore struct {
	*natsCore
	ctx context.Context // of WithContext; nil for none
}

// A natsCore is what a store and those that WithContext returns share.
type natsCore struct {
	data     *bucket
	ttl      time.Duration
	maxValue int
	locks    *natsLocks
	feeds    *feeds
}

var _ Store = (*NATSStore)(nil)

// NewNATSStore binds to a bucket, and creates it if it does not exist. It fails
// within seconds with an error that says what is wrong: the configuration or the
// connection is bad, JetStream is not enabled, the server is older than 2.11 and
// has no message TTLs (2.11.2 is the oldest that is tested), or a permission is
// missing. It does not detect 2.14.0 to 2.14.3, which may refuse all writes after
// one at the instant of an expiry. For a bucket that exists and suits it costs one
// request.
func NewNATSStore(cfg NATSStoreConfig) (*NATSStore, error) {
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	conn := connection{nc: cfg.Conn, domain: cfg.Domain, apiPrefix: cfg.APIPrefix, log: cfg.Logger}
	r, err := newRequester(conn)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	data := newBucket(r, cfg.Bucket, cfg.want())
	if err := data.open(newBudget(context.Background())); err != nil {
		r.stop()
		return nil, fmt.Errorf("state: bucket %q: %w", cfg.Bucket, err)
	}
	s := &natsCore{
		data:     data,
		ttl:      cfg.TTL,
		maxValue: data.maxValue(),
		locks:    newNATSLocks(conn, data, cfg.Owner),
		feeds:    newFeeds(data),
	}
	if cfg.MaxValueSize > 0 {
		s.maxValue = min(s.maxValue, int(cfg.MaxValueSize))
	}
	return &NATSStore{natsCore: s}, nil
}

func (cfg *NATSStoreConfig) validate() error {
	switch {
	case cfg.Conn == nil:
		return errors.New("NATSStoreConfig.Conn is nil")
	case cfg.Conn.IsClosed():
		return fmt.Errorf("NATSStoreConfig.Conn: %w", nats.ErrConnectionClosed)
	case !validBucket(cfg.Bucket):
		return fmt.Errorf("bucket name %q: must be letters, digits, - and _, and not empty", cfg.Bucket)
	case strings.HasSuffix(cfg.Bucket, locksSuffix):
		return fmt.Errorf("bucket name %q: a bucket whose name ends with %q holds the locks of another one", cfg.Bucket, locksSuffix)
	case cfg.TTL < 0:
		return fmt.Errorf("NATSStoreConfig.TTL is %v: must not be negative", cfg.TTL)
	case cfg.History < 0 || cfg.History > 64:
		return fmt.Errorf("NATSStoreConfig.History is %d: must be 1 to 64, or 0 for the default", cfg.History)
	case cfg.MaxValueSize < 0:
		return fmt.Errorf("NATSStoreConfig.MaxValueSize is %d: must not be negative", cfg.MaxValueSize)
	case cfg.Replicas < 0 || cfg.Replicas > 5:
		return fmt.Errorf("NATSStoreConfig.Replicas is %d: must be 1 to 5, or 0 for the default", cfg.Replicas)
	case cfg.Domain != "" && cfg.APIPrefix != "":
		return errors.New("NATSStoreConfig.Domain and APIPrefix are both set: a bucket has at most one of them")
	case strings.ContainsAny(cfg.Domain+cfg.APIPrefix, " \t\r\n*>"):
		return fmt.Errorf("NATSStoreConfig.Domain %q, APIPrefix %q: must not hold spaces or wildcards", cfg.Domain, cfg.APIPrefix)
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
	return bucketWant{history: cfg.History, replicas: cfg.Replicas, maxValue: cfg.MaxValueSize}
}

// begin starts an operation that is refused after Close.
func (s *NATSStore) begin(verb, key string) (context.Context, error) {
	if s == nil || s.natsCore == nil {
		return nil, errUnopened
	}
	if s.data.life.Err() != nil {
		return nil, ErrClosed
	}
	if s.ctx == nil {
		return context.Background(), nil
	}
	if err := s.ctx.Err(); err != nil {
		return nil, opError(verb, key, err)
	}
	return s.ctx, nil
}

// WithContext implements [Store].
func (s *NATSStore) WithContext(ctx context.Context) Store {
	if s == nil {
		return new(NATSStore)
	}
	return &NATSStore{natsCore: s.natsCore, ctx: ctx}
}

func (s *NATSStore) self() StateStore { return s }

// Get implements [StateStore]. It costs one request, or two if the key does not
// exist, and up to two more if the value's deadline has passed within the last
// second.
func (s *NATSStore) Get(key string) ([]byte, error) {
	r, err := s.get(key)
	if err != nil {
		return nil, err
	}
	return r.value, nil
}

// GetKeyValue implements [StateStore], at the cost of Get.
func (s *NATSStore) GetKeyValue(key string) (*KeyValue, error) {
	r, err := s.get(key)
	if err != nil {
		return nil, err
	}
	return r.event(key, r.deadline), nil
}

func (s *NATSStore) get(key string) (record, error) {
	ctx, err := s.begin("get", key)
	if err != nil {
		return record{}, err
	}
	if err := ValidateKey(key); err != nil {
		return record{}, err
	}
	r, err := s.data.entryOf(newBudget(ctx), key)
	return r, opError("get", key, err)
}

// Put implements [StateStore]. It costs one request if the key is new or this
// store wrote it last. It costs two if others write it, too, or this store at the same
// time, and three when the store finds that out. If the last value has expired or is
// about to, it costs up to three, or four if somebody replaces that value meanwhile. All
// writes to a bucket together cost one more each minute, in the background, for the
// server's time. If a new key is the first write in five minutes, its next Put costs one
// more.
func (s *NATSStore) Put(key string, value []byte, ttl time.Duration) error {
	ctx, m, err := s.beginPut("put", key, value, ttl)
	if err != nil {
		return err
	}
	_, err = s.data.put(newBudget(ctx), m)
	return s.data.writeError("put", key, err)
}

// Update implements [Store]. It costs one request, two if this store has not seen
// the revision, and three to create a key that another client has deleted or
// that has expired. On several replicas, an [ErrConflict] of a key that was removed
// costs up to two more, and one of a revision that no leader has takes 1.5 seconds: a
// watch may report a revision before the leader has it.
func (s *NATSStore) Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error) {
	ctx, m, err := s.beginPut("update", key, value, ttl)
	if err != nil {
		return 0, err
	}
	r, err := s.data.update(newBudget(ctx), m, revision)
	return r.revision, s.data.writeError("update", key, err)
}

// beginPut checks what Put and Update are given.
func (s *NATSStore) beginPut(verb, key string, value []byte, ttl time.Duration) (context.Context, mutation, error) {
	ctx, err := s.begin(verb, key)
	if err != nil {
		return nil, mutation{}, err
	}
	if err := validatePut(key, value, ttl, s.maxValue); err != nil {
		return nil, mutation{}, err
	}
	if ttl == 0 {
		ttl = s.ttl
	}
	return ctx, mutation{key: key, op: s.data.nextOp(), value: value, ttl: ttl}, nil
}

// Delete implements [StateStore]. It costs one request if this store wrote the key
// last or the key does not exist. Otherwise it costs two, or three if others write
// the key meanwhile. In a full bucket it costs up to three more.
func (s *NATSStore) Delete(key string) error {
	ctx, m, err := s.beginDelete("delete", key)
	if err != nil {
		return err
	}
	return s.data.writeError("delete", key, s.data.remove(newBudget(ctx), m))
}

// DeleteRevision implements [Store]. It costs one request, or two if this store
// has not seen the revision.
func (s *NATSStore) DeleteRevision(key string, revision uint64) error {
	ctx, m, err := s.beginDelete("delete revision", key)
	if err != nil {
		return err
	}
	if revision == 0 {
		return ErrConflict
	}
	_, err = s.data.update(newBudget(ctx), m, revision)
	return s.data.writeError("delete revision", key, err)
}

func (s *NATSStore) beginDelete(verb, key string) (context.Context, mutation, error) {
	ctx, err := s.begin(verb, key)
	if err != nil {
		return nil, mutation{}, err
	}
	if err := ValidateKey(key); err != nil {
		return nil, mutation{}, err
	}
	return ctx, mutation{key: key, op: s.data.nextOp(), marker: true, ttl: tombstoneTTL}, nil
}

// Keys implements [StateStore]. It costs about four requests, and one more for
// each 16,384 keys or 4 MiB. For a single key it costs one.
func (s *NATSStore) Keys(pattern string) ([]string, error) {
	ctx, p, err := s.beginPattern("keys", pattern)
	if err != nil {
		return nil, err
	}
	keys, err := s.data.keys(newBudget(ctx), p)
	return keys, opError("keys", pattern, err)
}

// Entries implements [Store], at the cost of Keys.
func (s *NATSStore) Entries(pattern string) ([]*KeyValue, error) {
	ctx, p, err := s.beginPattern("entries", pattern)
	if err != nil {
		return nil, err
	}
	l, err := s.data.list(newBudget(ctx), p, true, 0)
	if err != nil {
		return nil, opError("entries", pattern, err)
	}
	return l.entries(), nil
}

func (s *NATSStore) beginPattern(verb, text string) (context.Context, pattern, error) {
	ctx, err := s.begin(verb, text)
	if err != nil {
		return nil, pattern{}, err
	}
	p, err := parsePattern(text)
	return ctx, p, err
}

// Watch implements [StateStore]. See [NATSStore] for when it ends. It costs three
// requests, and then those of Keys in the background. If the store watches the
// pattern already, it costs one. All watches of a pattern together receive a
// message for each change and one per second. While it watches anything, the
// store makes one request every two seconds, and a few more to keep messages
// coming.
func (s *NATSStore) Watch(pattern string) (<-chan *KeyValue, error) {
	ctx, p, err := s.beginPattern("watch", pattern)
	if err != nil {
		return nil, err
	}
	f, w, err := s.feeds.join(ctx, p, false)
	if err != nil {
		return nil, s.watchError(pattern, err)
	}
	reader := make(chan *KeyValue)
	if !s.data.start(func() {
		s.data.stats.watches.Add(1)
		defer s.data.stats.watches.Add(-1)
		defer close(reader)
		w.deliver(reader, ctx.Done(), s.data.life.Done())
		s.feeds.leave(f, w)
	}) {
		s.feeds.leave(f, w)
		return nil, ErrClosed
	}
	return reader, nil
}

// watchError is the error of a watch that could not begin.
func (s *NATSStore) watchError(pattern string, err error) error {
	if errors.Is(err, jetstream.ErrBucketNotFound) || s.data.isClosed() {
		return ErrWatchClosed
	}
	return opError("watch", pattern, err)
}

// follow implements [follower]. It costs no more requests than Watch does.
func (s *NATSStore) follow(ctx context.Context, p pattern) (*source, error) {
	if s == nil || s.natsCore == nil {
		return nil, errUnopened
	}
	f, w, err := s.feeds.join(ctx, p, true)
	if err != nil {
		return nil, err
	}
	l, err := s.data.list(newBudget(ctx), p, true, f.startOf(w))
	f.firstListing(l, err)
	if err != nil {
		s.feeds.leave(f, w)
		return nil, err
	}
	s.data.stats.watches.Add(1)
	return &source{
		current: l.entries(),
		sub:     w.subscription,
		ask:     f.askProgress,
		lost:    f.lost.Load,
		stop: func() {
			s.data.stats.watches.Add(-1)
			s.feeds.leave(f, w)
		},
	}, nil
}

// Lock implements [StateStore]. The lock is a [Fenced]. To take the lock away from
// its holder, delete its key from the bucket of locks.
//
// It costs one request, two if the lock is held, three if another client released
// it in the last ten minutes, and up to four if its last lease has just lapsed.
// The store's first Lock costs one more to find the bucket of locks, or two to
// create it. Later ones cost one more when the store has not looked at the settings of
// that bucket for a minute.
func (s *NATSStore) Lock(key string, ttl time.Duration) (Lock, error) {
	end := time.Now().Add(opLimit)
	ctx, err := s.beginLock(key, ttl)
	if err != nil {
		return nil, err
	}
	l, _, err := s.locks.lock(ctx, key, ttl, record{})
	if err != nil {
		return nil, s.data.writeError("lock", key, err)
	}
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	return l.handOver(ctx)
}

func (s *NATSStore) beginLock(key string, ttl time.Duration) (context.Context, error) {
	ctx, err := s.begin("lock", key)
	if err == nil {
		err = validateLock(key, ttl)
	}
	return ctx, err
}

// awaitLock implements lockWaiter.
func (s *NATSStore) awaitLock(ctx context.Context, key string, ttl time.Duration) (Lock, error) {
	if _, err := s.WithContext(context.Background()).(*NATSStore).beginLock(key, ttl); err != nil {
		return nil, err
	}
	return s.locks.await(ctx, key, ttl)
}

// LockHolder implements [Store]. It costs one request, one more while the store
// has not used the bucket of locks yet, and up to two more if the lease has lapsed
// within the last second. In a cluster where nothing was ever locked it takes a
// second and about five requests: only then is a bucket of locks that is not found
// taken for one that does not exist.
func (s *NATSStore) LockHolder(key string) (*LockInfo, error) {
	ctx, err := s.begin("lock holder", key)
	if err != nil {
		return nil, err
	}
	if err := ValidateKey(key); err != nil {
		return nil, err
	}
	r, err := s.locks.holder(newBudget(ctx), key)
	if err != nil {
		return nil, opError("lock holder", key, err)
	}
	return r.lockInfo(key), nil
}

// Stats returns the store's counters. It costs no request.
func (s *NATSStore) Stats() Stats {
	if s == nil || s.natsCore == nil {
		return Stats{}
	}
	c := &s.data.stats
	return Stats{
		Requests:        c.requests.Load(),
		Retries:         c.retries.Load(),
		Conflicts:       c.conflicts.Load(),
		UnknownOutcomes: c.unknown.Load(),
		WatchCuts:       c.cuts.Load(),
		Watches:         int(c.watches.Load()),
		Consumers:       int(c.consumers.Load()),
		CachedKeys:      s.data.cache.len(),
	}
}

// Close implements [StateStore]. The connection stays open.
func (s *NATSStore) Close() error {
	if s == nil || s.natsCore == nil {
		return errUnopened
	}
	s.data.stop()
	return nil
}
