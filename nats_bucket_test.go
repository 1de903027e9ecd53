package state

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Buckets as operators make them, change them and delete them.

func mustCreateKV(t testing.TB, nc *nats.Conn, cfg jetstream.KeyValueConfig) jetstream.KeyValue {
	t.Helper()
	kv, err := newJetStream(t, nc).CreateKeyValue(context.Background(), cfg)
	require.NoError(t, err)
	return kv
}

// TestDefaultsLowerNothing: DefaultNATSStoreConfig, bound to a bucket that keeps
// more and takes larger values, leaves what is there and what it takes.
func TestDefaultsLowerNothing(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, func(o *server.Options) { o.MaxPayload = 8 << 20 }).ClientURL())
	ctx := context.Background()
	for _, history := range []uint8{5, 10} {
		bucket := newBucketName()
		kv := mustCreateKV(t, nc, jetstream.KeyValueConfig{Bucket: bucket, History: history, MaxValueSize: 4 << 20})
		large := make([]byte, 3<<20)
		for range history {
			_, err := kv.Put(ctx, "k", large[:2000])
			require.NoError(t, err)
		}
		_, err := kv.Put(ctx, "large", large)
		require.NoError(t, err)
		before := configOf(t, nc, "KV_"+bucket)
		before["allow_msg_ttl"] = true

		cfg := DefaultNATSStoreConfig()
		cfg.Conn, cfg.Bucket = nc, bucket
		s := openStore(t, cfg)
		assert.Equal(t, before, configOf(t, nc, "KV_"+bucket))
		revisions, err := kv.History(ctx, "k")
		require.NoError(t, err)
		assert.Len(t, revisions, int(history))
		assert.Len(t, mustGet(t, s, "large").Value, len(large))
		require.NoError(t, s.Put("k", []byte("ours"), 0))
		revisions, err = kv.History(ctx, "k")
		require.NoError(t, err)
		assert.Len(t, revisions, int(history))
		_, err = kv.Put(ctx, "large", large)
		require.NoError(t, err, "others' values are as large as before")
	}
}

// TestAccountWithConsumerLimit: where the account limits consumers, the store
// makes its buckets all the same, and works.
func TestAccountWithConsumerLimit(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	require.NoError(t, srv.GlobalAccount().UpdateJetStreamLimits(map[string]server.JetStreamAccountLimits{
		"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: 10},
	}))
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	events := mustWatch(t, s, "*")
	require.NoError(t, s.Put("k", nil, 0))
	assert.Equal(t, "put k", brief(receive(t, events)))
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"k"}, keys)
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
}

// TestSmallValues: a bucket whose operator allows a kibibyte takes values that
// leave room for the headers. Larger ones are refused before anything is sent.
func TestSmallValues(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	mustCreateKV(t, nc, jetstream.KeyValueConfig{Bucket: "b", MaxValueSize: 1024})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	for _, ttl := range []time.Duration{0, time.Hour + 1} {
		for range 2 { // a new key, and one to replace
			require.NoError(t, s.Put("k", make([]byte, 700), ttl))
			assert.Len(t, mustGet(t, s, "k").Value, 700)
		}
		revision, err := s.Update("k", make([]byte, 701), ttl, mustGet(t, s, "k").Revision)
		require.NoError(t, err)
		for _, size := range []int{1024, 1025, 1 << 20} {
			assert.Zero(t, spent(s, func() {
				refuses(t, ErrValueTooLarge, s.Put("k", make([]byte, size), ttl), size)
				refuses(t, ErrValueTooLarge, s.Put("new", make([]byte, size), ttl), size)
				_, err := s.Update("k", make([]byte, size), ttl, revision)
				refuses(t, ErrValueTooLarge, err, size)
			}), "requests for %d bytes", size)
		}
		assert.Len(t, mustGet(t, s, "k").Value, 701)
		require.NoError(t, s.Delete("k"))
	}
	_, err := s.Get("new")
	refuses(t, ErrNotFound, err)
}

// TestHistoryRaisedMeanwhile: another client has the bucket keep more revisions
// while the store is open. When a TTL ends, no older value comes back.
func TestHistoryRaisedMeanwhile(t *testing.T) {
	if testing.Short() {
		t.Skip("waits until the server has removed values")
	}
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	for _, key := range []string{"ttl", "twice", "deleted"} {
		require.NoError(t, s.Put(key, []byte("durable"), 0))
	}
	js := newJetStream(t, nc)
	stream, err := js.Stream(ctx, "KV_b")
	require.NoError(t, err)
	config := stream.CachedInfo().Config
	config.MaxMsgsPerSubject = 10
	_, err = js.UpdateStream(ctx, config)
	require.NoError(t, err)
	kv := mustKV(t, nc, "b")
	_, err = kv.Put(ctx, "ttl", []byte("durable, too"))
	require.NoError(t, err)
	require.NoError(t, s.Put("ttl", []byte("short"), time.Second))
	require.NoError(t, s.Put("twice", []byte("short"), 5*time.Second))
	require.NoError(t, s.Put("twice", []byte("shorter"), 500*time.Millisecond))
	require.NoError(t, s.Delete("deleted"))
	for _, key := range []string{"ttl", "twice"} {
		eventually(t, func() bool { _, err := s.Get(key); return err == ErrNotFound }, "expiry") //nolint:errorlint // bare
		history, err := kv.History(ctx, key)
		if err == nil {
			assert.Len(t, history, 1, "nothing is behind it")
		}
	}
	// The server removes "ttl" after the time that it is to hide what was there.
	for _, key := range []string{"ttl", "twice", "deleted"} {
		_, err := s.Get(key)
		refuses(t, ErrNotFound, err, key)
	}
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Empty(t, keys)
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(">"))
	require.NoError(t, err)
	for subject, messages := range info.State.Subjects {
		assert.EqualValues(t, 1, messages, subject)
	}
}

// TestBucketMadeAnewWithoutTTLs: a bucket is deleted and created again with the
// defaults of nats.go, under which servers refuse TTLs. The store works again
// without being opened again.
func TestBucketMadeAnewWithoutTTLs(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	fresh := openStore(t, NATSStoreConfig{Conn: connect(t, nc.ConnectedUrl()), Bucket: "b"})
	for _, key := range []string{"known", "deleted", "expiring"} {
		require.NoError(t, s.Put(key, []byte("old"), time.Hour))
	}
	require.NoError(t, s.Delete("deleted"))
	require.NoError(t, mustLock(t, s, "released", time.Minute).Unlock())
	held := mustLock(t, s, "held", time.Minute)

	for _, bucket := range []string{"b", "b-locks"} {
		require.NoError(t, js.DeleteKeyValue(ctx, bucket))
		mustCreateKV(t, nc, jetstream.KeyValueConfig{Bucket: bucket})
	}
	began := time.Now()
	for _, store := range []*NATSStore{s, fresh} {
		for _, key := range []string{"known", "deleted", "new"} {
			require.NoError(t, store.Put(key, []byte("v"), time.Minute), key)
			assert.False(t, mustGet(t, store, key).Expires.IsZero())
		}
	}
	_, err := s.Get("expiring")
	refuses(t, ErrNotFound, err)
	_, err = s.Update("expiring", []byte("v"), time.Minute, 0)
	require.NoError(t, err)
	assert.ErrorIs(t, held.Refresh(), ErrLockExpired)
	for _, name := range []string{"released", "new", "held"} {
		l, err := s.Lock(name, time.Minute)
		require.NoError(t, err, name)
		_, err = fresh.Lock(name, time.Minute)
		refuses(t, ErrLockHeld, err, name)
		require.NoError(t, l.Refresh(), name)
		require.NoError(t, l.Unlock(), name)
	}
	assert.Less(t, time.Since(began), 5*time.Second)
}

// TestStallDuringListing: after a listing that was held up, listings cost what
// they did before.
func TestStallDuringListing(t *testing.T) {
	if testing.Short() {
		t.Skip("a stall of seconds")
	}
	t.Parallel()
	srv := startServer(t, nil)
	near := connect(t, srv.ClientURL())
	nc, p := connectAt(t, srv.ClientURL(), distance{rtt: 40 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	fillBucket(t, near, "b", "many.", 5000)
	fillBucket(t, near, "b", "few.", 10)

	list := func(pattern string, want int) {
		keys, err := s.Keys(pattern)
		require.NoError(t, err)
		require.Len(t, keys, want)
	}
	// cost is that of the cheapest of a few listings: beside one the store may
	// look at the settings.
	type bill struct {
		requests int
		messages int64
		took     time.Duration
	}
	cost := func(pattern string, want int) bill {
		least := bill{1 << 30, 1 << 30, time.Hour}
		for range 5 {
			before, began := countMessages(t, srv, near), time.Now()
			requests := spent(s, func() { list(pattern, want) })
			took := time.Since(began)
			messages := countMessages(t, srv, near).since(before).all()
			least = bill{min(least.requests, requests), min(least.messages, messages), min(least.took, took)}
		}
		return least
	}
	asked := make(chan string, 10_000) // what the server has been asked
	_, err := near.Subscribe("$JS.API.>", func(msg *nats.Msg) { asked <- msg.Subject })
	require.NoError(t, err)
	require.NoError(t, near.Flush())
	patterns := map[string]int{"many.*": 5000, "few.*": 10}
	before := map[string]bill{} // of either, before the first stall
	for pattern, want := range patterns {
		before[pattern] = cost(pattern, want)
	}
	for pattern, want := range patterns {
		for _, held := range []string{"STREAM.INFO.", "DIRECT.GET.", "CONSUMER.CREATE.", "CONSUMER.MSG.NEXT."} {
			for len(asked) > 0 {
				<-asked
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				keys, err := s.Keys(pattern)
				assert.NoError(t, err)
				assert.Len(t, keys, want)
			}()
			for waiting := true; waiting; {
				select {
				case subject := <-asked:
					waiting = !strings.HasPrefix(subject, "$JS.API."+held)
				case <-done: // it needs no such request
					waiting = false
				}
			}
			p.stall() // the answer is on its way
			time.Sleep(2 * time.Second)
			p.resume()
			<-done
		}
	}
	for pattern, want := range patterns {
		before, later := before[pattern], cost(pattern, want)
		assert.LessOrEqual(t, later.requests, before.requests, pattern)
		assert.LessOrEqual(t, later.messages, before.messages+2, pattern)
		assert.Less(t, later.took, 4*before.took+50*time.Millisecond, pattern)
	}
}

// TestBucketIsGone: every method says so soon, in the same way, and works again
// when the bucket is back.
func TestBucketIsGone(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	methods := func(key string, revision uint64) map[string]func() error {
		return map[string]func() error{
			"get":             func() error { _, err := s.Get(key); return err },
			"get key value":   func() error { _, err := s.GetKeyValue(key); return err },
			"put":             func() error { return s.Put(key, nil, 0) },
			"put with TTL":    func() error { return s.Put(key, nil, time.Minute) },
			"delete":          func() error { return s.Delete(key) },
			"update":          func() error { _, err := s.Update(key, nil, 0, revision); return err },
			"claim":           func() error { _, err := s.Update(key+"-new", nil, 0, 0); return err },
			"delete revision": func() error { return s.DeleteRevision(key, max(revision, 1)) },
			"keys":            func() error { _, err := s.Keys("*"); return err },
			"keys of one":     func() error { _, err := s.Keys(key); return err },
			"entries":         func() error { _, err := s.Entries("*"); return err },
		}
	}
	for round := range 2 {
		require.NoError(t, s.Put("known", nil, 0))
		revision := mustGet(t, s, "known").Revision
		watch := mustWatch(t, s, "known")
		require.NoError(t, js.DeleteKeyValue(ctx, "b"))
		for key, revision := range map[string]uint64{"known": revision, "unknown": 0} {
			for name, method := range methods(key, revision) {
				began := time.Now()
				err := method()
				require.ErrorIs(t, err, jetstream.ErrBucketNotFound, "%s %s in round %d", name, key, round)
				assert.NotErrorIs(t, err, ErrOutcomeUnknown, "%s %s", name, key)
				assert.Less(t, time.Since(began), 2500*time.Millisecond, "%s %s", name, key)
			}
		}
		began := time.Now()
		_, err := s.Watch("*")
		refuses(t, ErrWatchClosed, err)
		assert.Less(t, time.Since(began), 2500*time.Millisecond)
		ended(t, watch)

		mustCreateKV(t, nc, jetstream.KeyValueConfig{Bucket: "b"})
		for _, key := range []string{"known", "unknown", "other"} {
			_, err := s.Get(key)
			refuses(t, ErrNotFound, err, key)
			require.NoError(t, s.Put(key, []byte("back"), 0), key)
			require.NoError(t, s.Put(key, []byte("back"), time.Minute), key)
			kv := mustGet(t, s, key)
			revision, err := s.Update(key, []byte("v"), 0, kv.Revision)
			require.NoError(t, err, key)
			require.NoError(t, s.DeleteRevision(key, revision), key)
			require.NoError(t, s.Delete(key), key)
		}
		events := mustWatch(t, s, "*")
		deliversNext(t, s, events, "watched")
		keys, err := s.Keys("*")
		require.NoError(t, err)
		assert.Equal(t, []string{"watched"}, keys)
		entries, err := s.Entries("*")
		require.NoError(t, err)
		assert.Len(t, entries, 1)
	}
}

// TestCreatedAfterMaxAge: a bucket's own TTL ends a value that was written without
// one. The next value is a new key, also before the server has removed the last.
func TestCreatedAfterMaxAge(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	_, err = js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "b", TTL: time.Second})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	checked := 0
	for i := range 5 {
		require.NoError(t, s.Put("k", fmt.Append(nil, i), 0))
		first, err := other.GetKeyValue("k")
		if err != nil { // the machine was busy
			refuses(t, ErrNotFound, err)
			continue
		}
		eventually(t, func() bool { _, err := other.Get("k"); return err == ErrNotFound }, "the end of the value")
		require.NoError(t, s.Put("k", fmt.Append(nil, i), 0))
		kv, err := other.GetKeyValue("k")
		if err != nil {
			refuses(t, ErrNotFound, err)
			continue
		}
		checked++
		// It may be an estimate, which is never late.
		require.False(t, kv.Created.Before(first.Created.Add(500*time.Millisecond)), "created %v, after the end at %v", kv.Created, first.Expires)
		require.NoError(t, s.Delete("k"))
	}
	require.Positive(t, checked)
}

// aged makes what the store knows of the server's clock as old as given.
func (c *serverClock) aged(by time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.base -= timestamp(by)
	c.at = c.at.Add(-by)
}

// TestCreatedByAnOldClock: a store that has only written for a day estimates the
// server's clock badly. It does not tell when a key came into being then, and has the
// server asked for its time.
func TestCreatedByAnOldClock(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	s.data.clock.aged(24 * time.Hour)
	s.data.checking.Store(true) // so that the server is not asked yet
	require.NoError(t, s.Put("k", nil, time.Hour))
	s.data.checking.Store(false)
	first := mustGet(t, s, "k")
	assert.Equal(t, first.Modified, first.Created)
	require.NoError(t, s.Put("k", nil, time.Hour))
	eventually(t, func() bool { return s.data.readClock().age < renewSample }, "the server is asked for its time")
	for range 3 {
		require.NoError(t, s.Put("k", nil, time.Hour))
		assert.Equal(t, first.Created, mustGet(t, s, "k").Created)
	}
	before := s.Stats().Requests
	require.NoError(t, s.Put("k", nil, time.Hour))
	assert.Equal(t, before+1, s.Stats().Requests)
}

// TestMarkerIsForgotten: a write does not count on a marker that the server has
// removed, so that it costs one request.
func TestMarkerIsForgotten(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, s.Put("k", nil, 0))
	require.NoError(t, s.Delete("k"))
	marker := s.data.cache.recall("k")
	require.True(t, marker.deleted)
	read, err := s.data.leaderLast(newBudget(t.Context()), "k")
	require.NoError(t, err)
	for _, r := range []record{marker, read} { // as it was written, and as it is read
		assert.InDelta(t, tombstoneTTL, time.Duration(r.removal-r.modified), float64(time.Second))
	}
	stream, err := newJetStream(t, nc).Stream(t.Context(), "KV_b")
	require.NoError(t, err)
	require.NoError(t, stream.Purge(t.Context())) // as the server does then
	marker.removal = s.data.clock.now() - timestamp(3*time.Second)
	s.data.cache.learn("k", marker)
	before := s.Stats().Requests
	require.NoError(t, s.Put("k", nil, 0))
	assert.Equal(t, before+1, s.Stats().Requests)
}
