package state

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A recorder reads a watch to its end and holds what is told to the promises.
type recorder struct {
	t      *testing.T
	mu     sync.Mutex
	broken []string // promises
	events []*KeyValue
	last   map[string]*KeyValue
	ended  chan struct{}
}

func recordEvents(t *testing.T, events <-chan *KeyValue) *recorder {
	r := &recorder{t: t, last: map[string]*KeyValue{}, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		for kv := range events {
			r.add(kv)
		}
	}()
	return r
}

func (r *recorder) add(kv *KeyValue) {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := r.last[kv.Key]
	switch {
	case last == nil:
	case kv.Revision < last.Revision,
		kv.Revision == last.Revision && (last.Operation == OpDelete || kv.Operation == OpPut):
		r.breaks("%s at revision %d came after %s at revision %d", brief(kv), kv.Revision, brief(last), last.Revision)
	case kv.Operation == OpPut && last.Operation == OpDelete && kv.Revision > last.Revision && kv.Modified.Before(last.Modified):
		r.breaks("%s was told as gone at %v, but was written in time, at %v", kv.Key, last.Modified, kv.Modified)
	}
	r.last[kv.Key] = kv
	r.events = append(r.events, kv)
}

func (r *recorder) breaks(format string, args ...any) {
	r.broken = append(r.broken, fmt.Sprintf(format, args...))
}

func (r *recorder) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.events)
}

// state returns what somebody would believe who saw nothing but the events.
func (r *recorder) state() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	state := map[string]string{}
	for key, kv := range r.last {
		if kv.Operation == OpPut {
			state[key] = string(kv.Value)
		}
	}
	return state
}

// agrees waits until the recorder believes what the store has, and fails if a
// promise was broken on the way.
func (r *recorder) agrees(s StateStore, pattern string) {
	r.t.Helper()
	r.believes(s, pattern)
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.Empty(r.t, r.broken)
}

func (r *recorder) believes(s StateStore, pattern string) {
	r.t.Helper()
	var want, got map[string]string
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		want = map[string]string{}
		keys, err := s.Keys(pattern)
		require.NoError(r.t, err)
		for _, key := range keys {
			value, err := s.Get(key)
			if err != ErrNotFound { //nolint:errorlint // bare
				require.NoError(r.t, err)
				want[key] = string(value)
			}
		}
		if got = r.state(); assert.ObjectsAreEqual(want, got) {
			return
		}
	}
	require.Equal(r.t, want, got)
}

// TestWatchOutlivesRestart: the watch is back within a second of the server's
// return, and tells what happened meanwhile.
func TestWatchOutlivesRestart(t *testing.T) {
	srv := startRestartable(t)
	// A client that reconnects to a server that is going down waits for its
	// greeting, by default for two seconds.
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.Timeout(200*time.Millisecond)), Bucket: "b"})
	require.NoError(t, s.Put("k.expires", nil, time.Second))
	require.NoError(t, s.Put("k.stays", []byte("v"), 0))
	r := recordEvents(t, mustWatch(t, s, "k.*"))
	require.NoError(t, s.Put("k.1", []byte("before"), 0))
	require.NoError(t, s.Put("k.stays", []byte("told"), 0))
	soonest := time.Hour
	for restart := range 3 {
		stopServer(srv.Server)
		time.Sleep(600 * time.Millisecond)
		srv.start(t)
		up := time.Now()
		other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
		require.NoError(t, other.Put("k.1", fmt.Append(nil, restart), 0))
		before := r.count()
		require.NoError(t, other.Put("k.new", fmt.Append(nil, restart), 0))
		eventually(t, func() bool { return r.count() > before }, "event")
		t.Logf("the first event came %v after the server was up", time.Since(up))
		soonest = min(soonest, time.Since(up))
		require.NoError(t, other.Delete("k.new"))
		r.agrees(other, "k.*")
	}
	assert.Less(t, soonest, time.Second)
	_, err := s.Get("k.expires")
	refuses(t, ErrNotFound, err)
	eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.last["k.expires"] != nil
	}, "the expiry") // its deadline may have passed while the server was down
	r.mu.Lock()
	defer r.mu.Unlock()
	assert.Equal(t, "delete k.expires", brief(r.last["k.expires"]))
}

// TestWatchOutlivesCuts: while the watch's connection is cut or stalled others
// write, delete, and let expire; afterwards it tells how things stand.
func TestWatchOutlivesCuts(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 20 {
		require.NoError(t, other.Put(fmt.Sprintf("k.old.%d", i), []byte("old"), 0))
	}
	r := recordEvents(t, mustWatch(t, s, "k.*"))
	for i := range 20 {
		require.NoError(t, other.Put(fmt.Sprintf("k.old.%d", i), []byte("told"), 0))
	}
	for round := range 4 {
		if round%2 == 0 {
			p.refuse(true)
			p.cut()
		} else {
			p.stall()
		}
		for i := range 5 {
			n := 5*round + i
			require.NoError(t, other.Put(fmt.Sprintf("k.%d.%d", round, i), []byte("new"), 0))
			require.NoError(t, other.Put(fmt.Sprintf("k.brief.%d", n), []byte("x"), 100*time.Millisecond))
			switch i {
			case 0:
				require.NoError(t, other.Delete(fmt.Sprintf("k.old.%d", n)))
			case 1: // a value gives way to one that expires within the cut
				require.NoError(t, other.Put(fmt.Sprintf("k.old.%d", n), []byte("short"), 100*time.Millisecond))
			case 2: // the same by somebody who leaves nothing behind, which only a cut shows
				if round%2 != 0 {
					continue
				}
				_, err := other.data.nc.Request("$JS.API.STREAM.PURGE.KV_b", fmt.Appendf(nil, `{"filter":"$KV.b.k.old.%d"}`, n), time.Second)
				require.NoError(t, err)
			case 3:
				require.NoError(t, other.Put(fmt.Sprintf("k.old.%d", n), []byte("again"), 0))
			}
		}
		time.Sleep(1500 * time.Millisecond)
		p.refuse(false)
		p.resume()
		if round == 3 {
			p.cut() // what was stalled is lost
		}
		r.agrees(other, "k.*")
	}
	assert.Contains(t, []string{"told", ""}, r.state()["k.old.19"])
}

// TestWatchRefreshRemoved: an entry is refreshed in time, but that is held up on
// its way to the watch, and at the old deadline the server has it no more.
func TestWatchRefreshRemoved(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	ctx := context.Background()
	stream, err := newJetStream(t, other.data.nc).Stream(ctx, "KV_b")
	require.NoError(t, err)
	for round := range 3 {
		withLongerTTL(t, time.Second, func(ttl time.Duration) (inTime bool) {
			key := fmt.Sprintf("k.%d.%v", round, ttl)
			events := mustWatch(t, s, key)
			require.NoError(t, other.Put(key, []byte("old"), ttl))
			old := receive(t, events)
			p.stall()
			defer p.resume()
			require.NoError(t, other.Put(key, []byte("new"), ttl))
			refreshed, err := other.GetKeyValue(key)
			if err != nil || refreshed.Modified.Sub(old.Modified) >= ttl {
				return false
			}
			eventually(t, func() bool {
				for c := range stream.ListConsumers(ctx).Info() {
					if c.Config.FilterSubject == "$KV.b."+key && c.Delivered.Stream >= refreshed.Revision {
						return true
					}
				}
				return false
			}, "the delivery")
			require.NoError(t, stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.b."+key)))
			time.Sleep(ttl + 300*time.Millisecond)
			p.resume()
			assert.Equal(t, "put "+key, brief(receive(t, events)))
			gone := receive(t, events)
			assert.Equal(t, "delete "+key, brief(gone))
			assert.Equal(t, refreshed.Revision, gone.Revision)
			assert.Equal(t, refreshed.Modified.Add(ttl), gone.Modified)
			return true
		})
	}
}

// TestWatchOnReplicas: step-downs, and the death of the server that hosts the
// watch's consumer. Nothing is lost, nothing doubled.
func TestWatchOnReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster and its elections")
	}
	t.Parallel()
	c := startCluster(t)
	urls := func(first int) string {
		var all []string
		for i := range 3 {
			all = append(all, c.servers[(first+i)%3].ClientURL())
		}
		return strings.Join(all, ",")
	}
	watcher := openStore(t, NATSStoreConfig{Conn: connect(t, urls(0), nats.DontRandomize()), Bucket: "b", Replicas: 3})
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, urls(1), nats.DontRandomize()), Bucket: "b"})
	var all []*recorder
	for range 3 { // their consumers are on different servers
		all = append(all, recordEvents(t, mustWatch(t, watcher, "k.*")))
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	for w := range 3 {
		wg.Go(func() {
			for i := 0; !stop.Load(); i++ {
				_ = writer.Put(fmt.Sprintf("k.%d.%d", w, i), []byte("v"), 0)
				if i%3 == 0 {
					_ = writer.Delete(fmt.Sprintf("k.%d.%d", w, i/2))
				}
				_ = writer.Put(fmt.Sprintf("k.beat.%d", w), nil, 300*time.Millisecond)
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	for range 3 {
		time.Sleep(400 * time.Millisecond)
		c.stepDown(t, watcher.data.nc, "b")
	}
	time.Sleep(300 * time.Millisecond)
	for i := 2; i > 0; i-- { // not the one that the watcher is connected to
		stopServer(c.servers[i])
		time.Sleep(3 * time.Second)
		c.restart(t, i)
		c.settle(t)
	}
	stop.Store(true)
	wg.Wait()
	time.Sleep(500 * time.Millisecond) // the heartbeats expire
	for _, r := range all {
		r.agrees(watcher, "k.*")
	}
	t.Logf("%d events", all[0].count())
}

// onReplicas runs a test on one server and on three, with two stores that are
// not on the same of these.
func onReplicas(t *testing.T, test func(t *testing.T, writer, watcher *NATSStore)) {
	for replicas, servers := range map[int][]*server.Server{1: {startServer(t, nil)}, 3: startCluster(t).servers} {
		t.Run(fmt.Sprint(replicas, " replicas"), func(t *testing.T) {
			writer := openStore(t, NATSStoreConfig{Conn: connect(t, servers[0].ClientURL()), Bucket: "b", Replicas: replicas})
			watcher := openStore(t, NATSStoreConfig{Conn: connect(t, servers[len(servers)-1].ClientURL()), Bucket: "b"})
			test(t, writer, watcher)
		})
	}
}

// TestWatchBurst: clients change one key as fast as they can. States that were
// replaced before the server's consumer came to them may be skipped; what is
// delivered is exact and in order, and the last state arrives.
func TestWatchBurst(t *testing.T) {
	t.Parallel()
	onReplicas(t, func(t *testing.T, writer, watcher *NATSStore) {
		r := recordEvents(t, mustWatch(t, watcher, "k*"))
		const each = 1000
		var wg sync.WaitGroup
		for w, s := range []*NATSStore{writer, watcher} {
			wg.Go(func() {
				for i := range each {
					var ttl time.Duration
					switch i % 10 {
					case 5:
						ttl = time.Minute
					case 9:
						assert.NoError(t, s.Delete("k"))
					}
					assert.NoError(t, s.Put("k", fmt.Append(nil, w, i), ttl))
				}
			})
		}
		wg.Wait()
		r.agrees(watcher, "*")
		r.mu.Lock()
		defer r.mu.Unlock()
		delivered := map[string]int{}
		modified := time.Time{}
		for _, kv := range r.events {
			require.False(t, kv.Modified.Before(modified), "revision %d was written before the one before", kv.Revision)
			modified = kv.Modified
			if kv.Operation == OpPut {
				delivered[string(kv.Value)]++
				require.Equal(t, 1, delivered[string(kv.Value)], "of %s", kv.Value)
			}
		}
		require.Equal(t, mustGet(t, watcher, "k"), r.last["k"], "what is delivered is the entry")
		t.Logf("%d events", len(r.events))
	})
}

// TestWatchRefreshedAtTheDeadline: refreshes that arrive around the deadline.
// Either the entry was refreshed in time, and no expiry is told, or it expired
// and is a new one.
func TestWatchRefreshedAtTheDeadline(t *testing.T) {
	t.Parallel()
	onReplicas(t, func(t *testing.T, writer, watcher *NATSStore) {
		require.Empty(t, refreshAtTheDeadline(t, writer, watcher))
	})
}

// refreshAtTheDeadline returns the promises that were broken.
func refreshAtTheDeadline(t *testing.T, writer, watcher *NATSStore) []string {
	const ttl = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	events, err := watcher.WithContext(ctx).Watch("k.*")
	require.NoError(t, err)
	r := recordEvents(t, events)
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			key := fmt.Sprintf("k.%d", w)
			for i := range 40 {
				began := time.Now()
				assert.NoError(t, writer.Put(key, fmt.Append(nil, i), ttl))
				time.Sleep(time.Until(began.Add(ttl + time.Duration(i%9-5)*300*time.Microsecond)))
			}
		})
	}
	wg.Wait()
	time.Sleep(2 * ttl)
	r.believes(watcher, "k.*")
	r.mu.Lock()
	defer r.mu.Unlock()
	type put struct {
		n       int
		created time.Time
	}
	last := map[string]put{}
	expiries, judged := 0, 0
	for _, kv := range r.events {
		if kv.Operation == OpDelete {
			expiries++
			delete(last, kv.Key)
			continue
		}
		n, err := strconv.Atoi(string(kv.Value))
		require.NoError(t, err)
		// A value that was replaced before it was delivered may have been a new key.
		before, ok := last[kv.Key]
		if ok && n == before.n+1 {
			if judged++; !before.created.Equal(kv.Created) {
				r.breaks("%s is a new key at revision %d, though no expiry was told", kv.Key, kv.Revision)
			}
		}
		last[kv.Key] = put{n, kv.Created}
	}
	t.Logf("%d events, %d of them expiries; %d refreshes", len(r.events), expiries, judged)
	require.Positive(t, judged)
	return r.broken
}

// TestWatchEnds: the end is told by closing the channel.
func TestWatchEnds(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	t.Run("bucket deleted", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, nil).ClientURL())
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		events := mustWatch(t, s, "*")
		require.NoError(t, newJetStream(t, nc).DeleteKeyValue(ctx, "b"))
		ended(t, events)
		_, err := s.Watch("*")
		refuses(t, ErrWatchClosed, err)
	})
	t.Run("bucket created again", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, nil).ClientURL())
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		for range 10 {
			require.NoError(t, s.Put("k", nil, 0))
		}
		events := mustWatch(t, s, "*")
		require.NoError(t, newJetStream(t, nc).DeleteKeyValue(ctx, "b"))
		again := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		ended(t, events)
		events = mustWatch(t, again, "*")
		require.NoError(t, s.Put("k", []byte("in the new one"), 0), "by who knew the old one")
		assert.Equal(t, "in the new one", string(receive(t, events).Value))
	})
	t.Run("connection closed", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, nil).ClientURL())
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		events := mustWatch(t, s, "*")
		nc.Close()
		ended(t, events)
		_, err := s.Watch("*")
		refuses(t, ErrWatchClosed, err)
		_, err = s.Get("k")
		assert.ErrorIs(t, err, nats.ErrConnectionClosed)
		err = s.Put("k", nil, 0)
		assert.ErrorIs(t, err, nats.ErrConnectionClosed)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown, "it cannot have been applied")
		require.NoError(t, s.Close())
	})
	t.Run("connection gives up", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, nil)
		nc := connect(t, srv.ClientURL(), nats.MaxReconnects(3))
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		events := mustWatch(t, s, "*")
		stopServer(srv)
		ended(t, events)
	})
	t.Run("cut off for too long", func(t *testing.T) {
		t.Parallel()
		s, p := viaProxy(t, startServer(t, nil).ClientURL(), "b", 1)
		s.feeds.maxCut = 500 * time.Millisecond // instead of an hour
		events := mustWatch(t, s, "*")
		time.Sleep(1200 * time.Millisecond) // idle is not cut off
		deliversNext(t, s, events, "k")
		p.refuse(true)
		p.cut()
		time.Sleep(time.Second)
		p.refuse(false)
		ended(t, events)
	})
	t.Run("nobody reads", func(t *testing.T) {
		t.Parallel()
		s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
		events := mustWatch(t, s, "*")
		for range 100 {
			require.NoError(t, s.Put("k", nil, 0))
		}
		require.NoError(t, s.Close())
		ended(t, events)
	})
}

// TestNothingIsLeftBehind: no goroutine after Close, no consumer after a watch
// or a listing.
func TestNothingIsLeftBehind(t *testing.T) {
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s, err := NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, err)
	require.NoError(t, s.Put("k", nil, time.Hour))
	time.Sleep(100 * time.Millisecond)
	before := runtime.NumGoroutine()

	ctx, cancel := context.WithCancel(context.Background())
	for i := range 30 {
		_, err := s.WithContext(ctx).Watch(fmt.Sprint("k.", i))
		require.NoError(t, err)
		mustWatch(t, s, "*")
		_, err = s.Keys("*")
		require.NoError(t, err)
	}
	for range 10 {
		require.NoError(t, s.Put("k", nil, 0))
	}
	cancel()
	count := func() int {
		stream, err := newJetStream(t, nc).Stream(context.Background(), "KV_b")
		require.NoError(t, err)
		return stream.CachedInfo().State.Consumers
	}
	eventually(t, func() bool { return count() == 1 }, "one consumer is left, for the watches of one pattern")
	require.NoError(t, s.Close())
	eventually(t, func() bool { return count() == 0 }, "all consumers are gone")
	eventually(t, func() bool { return runtime.NumGoroutine() <= before }, "all goroutines are gone")
}

// TestThousandWatches: a thousand watches on one store work, all of them.
func TestThousandWatches(t *testing.T) {
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	const n = 1000
	watches := make([]<-chan *KeyValue, n)
	for i := range n {
		watches[i] = mustWatch(t, s, fmt.Sprintf("k.%d.*", i))
	}
	wide := mustWatch(t, s, "*")
	for i := range n {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d.x", i), fmt.Append(nil, i), 0))
	}
	for i := range n {
		assert.Equal(t, fmt.Sprint(i), string(receive(t, watches[i]).Value))
		assert.Equal(t, fmt.Sprint(i), string(receive(t, wide).Value))
	}
	began := time.Now()
	require.NoError(t, s.Close())
	assert.Less(t, time.Since(began), 10*time.Second)
}

// joinFeed has a watch join the feed of all keys, for a test that looks inside.
func joinFeed(t *testing.T, s *NATSStore) (*feed, *natsWatch) {
	t.Helper()
	f, w, err := s.feeds.join(t.Context(), pattern{wild: true}, true)
	require.NoError(t, err)
	t.Cleanup(func() { s.feeds.leave(f, w) })
	return f, w
}

// joinFeedOnReplicas is joinFeed on a new store, of a bucket on three servers.
func joinFeedOnReplicas(t *testing.T) (*NATSStore, *feed, *natsWatch) {
	t.Helper()
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startCluster(t).servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	f, w := joinFeed(t, s)
	return s, f, w
}

// feedOf returns the feed of a pattern that a store watches.
func feedOf(s *NATSStore, p pattern) *feed {
	s.feeds.mu.Lock()
	defer s.feeds.mu.Unlock()
	return s.feeds.by[p]
}

// listedFeed returns the feed of a pattern that a store watches, once it knows what
// exists.
func listedFeed(t testing.TB, s *NATSStore, p pattern) *feed {
	t.Helper()
	f := feedOf(s, p)
	eventually(t, func() bool { return f.holds(func() bool { return f.listed }) }, "the watch knows what exists")
	return f
}

// holds reports whether a condition holds for a feed, which has not ended.
func (f *feed) holds(condition func() bool) bool {
	answer := make(chan bool, 1)
	if !f.post(func() { answer <- condition() }) {
		return false
	}
	select {
	case holds := <-answer:
		return holds
	case <-f.ctx.Done():
		return false
	}
}

// TestListingFailsAfterACut: a feed that was cut off and is back, while it still
// lists what exists, lists again if that fails. Otherwise it would never report the
// expiry of a key that existed before.
func TestListingFailsAfterACut(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	require.NoError(t, s.Put("k", nil, time.Minute))
	f, _ := joinFeed(t, s)
	eventuallyHolds := func(condition func() bool, what string) {
		eventually(t, func() bool { return f.holds(condition) }, what)
	}
	f.post(func() {
		f.expecting, f.listing = false, true
		f.cutOff("a test")
	})
	eventuallyHolds(func() bool { return f.source != nil }, "it is back")
	f.post(func() { f.endListing(listing{}, errStartOver) })
	eventuallyHolds(func() bool { return f.listed && f.alive["k"] != nil }, "it has listed again")
}

// TestExpiryBeforeDelivery: a value that was listed and has expired, and is still
// to be delivered, is not reported as expired before that.
func TestExpiryBeforeDelivery(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	f, _ := joinFeed(t, s)
	alive := make(chan bool, 1)
	require.True(t, f.post(func() {
		f.track("k", &record{entry: entry{revision: 9}, deadline: 1}, f.gaps, true)
		f.expired([]finding{{f.alive["k"], 9, f.alive["k"].deadline, probeResult{last: 9, known: true}}})
		alive <- f.alive["k"] != nil
	}))
	require.True(t, <-alive)
}

// TestDeletionOfTheUnseen: a value is deleted before it was delivered. The deletion
// is reported all the same.
func TestDeletionOfTheUnseen(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	events := mustWatch(t, s, "*")
	f := listedFeed(t, s, pattern{wild: true})
	require.NoError(t, s.Put("k", nil, 0))
	created := receive(t, events).Created.UnixNano()
	require.NoError(t, s.Delete("k"))
	require.Equal(t, "delete k", brief(receive(t, events)))
	for _, unseen := range []struct {
		created timestamp
		told    bool
	}{{timestamp(created), false}, {timestamp(created + 1), true}} {
		require.True(t, f.post(func() {
			f.report("k", record{entry: entry{revision: 9, created: unseen.created, modified: unseen.created + 1}, deleted: true, op: "another"})
		}))
		if unseen.told {
			require.Equal(t, "delete k", brief(receive(t, events)))
		}
	}
	require.NoError(t, s.Put("end", nil, 0))
	require.Equal(t, "put end", brief(receive(t, events)))
}

// TestExpiryRequests: what a watch asks when keys expire, as the README says.
func TestExpiryRequests(t *testing.T) {
	t.Parallel()
	const keys = 50
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	watch := observe(mustWatch(t, s, "k.*"))
	listedFeed(t, s, pattern{"k.", true})
	requests := spent(s, func() {
		for i := range keys {
			require.NoError(t, writer.Put(fmt.Sprintf("k.%d", i), nil, time.Second))
		}
		eventually(t, func() bool { return watch.last(fmt.Sprintf("k.%d", keys-1)) != nil }, "all puts")
		eventually(t, func() bool {
			for i := range keys {
				if watch.last(fmt.Sprintf("k.%d", i)).Operation != OpDelete {
					return false
				}
			}
			return true
		}, "all expiries")
	})
	assert.GreaterOrEqual(t, requests, keys)
	assert.LessOrEqual(t, requests, 2*keys+5, "and what it asks now and then")
}

// TestExpiriesOnReplicas: what has ended is reported there when a majority has
// agreed, by one marker however many watch. Where none may be written the watches
// do without.
func TestExpiriesOnReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	const keys = 40
	c := startCluster(t)
	js := newJetStream(t, connect(t, c.servers[0].ClientURL()))
	ctx := t.Context()
	name := func(i int) string { return fmt.Sprintf("k.%d", i) }

	// expire writes the keys, calls end, and waits until all watches have reported
	// that the keys ended. It returns the number of messages that were stored besides
	// the keys and those that end wrote, whose number end returns.
	expire := func(t *testing.T, config jetstream.KeyValueConfig, ttl time.Duration, end func(*NATSStore) int) (messages int) {
		config.Replicas = 3
		placed(t, func() error { _, err := js.CreateKeyValue(ctx, config); return err })
		var stores []*NATSStore
		var watches []*observer
		for _, srv := range c.servers {
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: config.Bucket})
			stores, watches = append(stores, s), append(watches, observe(mustWatch(t, s, "k.*")))
		}
		var err error
		revisions := make(map[string]uint64)
		for i := range keys {
			revisions[name(i)], err = stores[0].Update(name(i), []byte("v"), ttl, 0)
			require.NoError(t, err)
		}
		for _, w := range watches {
			eventually(t, func() bool { return w.last(name(keys-1)) != nil }, "all puts")
		}
		written := keys + end(stores[1])
		for _, w := range watches {
			for key := range revisions {
				eventually(t, func() bool { last := w.last(key); return last != nil && last.Operation == OpDelete }, "an end")
			}
		}
		for _, w := range watches {
			for key, revision := range revisions {
				ends := w.deletions(key)[key]
				require.Len(t, ends, 1, "once")
				if ttl > 0 || config.TTL > 0 {
					require.Equal(t, revision, ends[0].Revision)
				} else {
					require.Greater(t, ends[0].Revision, revision)
				}
			}
		}
		info, err := stores[0].data.info(newBudget(ctx))
		require.NoError(t, err)
		return int(info.State.LastSeq) - written
	}
	nothing := func(*NATSStore) int { return 0 }
	const ttl = 3 * time.Second // all watches see the puts before
	// free waits until a key is free for other clients: any replica may answer them.
	free := func(t *testing.T, kv jetstream.KeyValue, key string) {
		eventually(t, func() bool { _, err := kv.Create(ctx, key, nil); return err == nil }, "it is free")
	}

	t.Run("ttl", func(t *testing.T) {
		require.Equal(t, keys, expire(t, jetstream.KeyValueConfig{Bucket: "ttl"}, ttl, nothing))
		kv, err := js.KeyValue(ctx, "ttl")
		require.NoError(t, err)
		for i := range keys {
			free(t, kv, name(i))
		}
	})
	t.Run("over what lives longer", func(t *testing.T) {
		// Otherwise what hides the older values stays for ten minutes.
		s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "longer", Replicas: 3})
		kv, err := js.KeyValue(ctx, "longer")
		require.NoError(t, err)
		watch := observe(mustWatch(t, s, "k.*"))
		for i := range keys {
			_, err := kv.Put(ctx, name(i), []byte("durable"))
			require.NoError(t, err)
			require.NoError(t, s.Put(name(i), []byte("short"), time.Second))
		}
		for i := range keys {
			eventually(t, func() bool { last := watch.last(name(i)); return last != nil && last.Operation == OpDelete }, "an expiry")
			free(t, kv, name(i))
		}
	})
	t.Run("history", func(t *testing.T) {
		require.Equal(t, keys, expire(t, jetstream.KeyValueConfig{Bucket: "history", History: 5}, ttl, nothing))
	})
	t.Run("purged", func(t *testing.T) {
		require.Equal(t, keys, expire(t, jetstream.KeyValueConfig{Bucket: "purged"}, 0, func(*NATSStore) int {
			st, err := js.Stream(ctx, "KV_purged")
			require.NoError(t, err)
			require.NoError(t, st.Purge(ctx))
			return 0
		}))
	})
	t.Run("max-age", func(t *testing.T) {
		// Nothing is written over what may live on when the setting is changed.
		require.Zero(t, expire(t, jetstream.KeyValueConfig{Bucket: "max-age", TTL: 2 * time.Second}, 0, nothing))
	})
	t.Run("markers", func(t *testing.T) {
		require.Zero(t, expire(t, jetstream.KeyValueConfig{Bucket: "markers", LimitMarkerTTL: time.Hour}, ttl, nothing))
	})
	t.Run("full", func(t *testing.T) {
		// The watches ask with probes, which are never stored and show writes under way.
		// Reads do not show these.
		var probes atomic.Int64
		sub, err := js.Conn().Subscribe("$KV.full.:probe", func(*nats.Msg) { probes.Add(1) })
		require.NoError(t, err)
		defer func() { assert.NoError(t, sub.Unsubscribe()) }()
		require.Zero(t, expire(t, jetstream.KeyValueConfig{Bucket: "full", MaxBytes: 64 << 10}, 8*time.Second, func(s *NATSStore) (written int) {
			for size, i := 4096, 0; size > 0; i++ {
				if err := s.Put(fmt.Sprintf("more.%d", i), make([]byte, size), 0); err == ErrStoreFull {
					size /= 2
				} else {
					require.NoError(t, err)
					written++
				}
			}
			return written
		}))
		eventually(t, func() bool { return probes.Load() >= keys }, "a probe for each key")
	})
}

// markEnd writes the marker that a watch leaves of what has ended, on a server on which
// none does by itself, and returns its revision.
func markEnd(t *testing.T, s *NATSStore, key string, base record) uint64 {
	t.Helper()
	e := s.data.currentEpoch()
	result := s.data.ask(newBudget(context.Background()), e, []question{{key: key, base: base, mark: true}})[0]
	require.True(t, result.known)
	require.Greater(t, result.last, base.revision, "it was stored")
	return result.last
}

// TestExpiryOfWhatWasMissed: a watch that was cut off while a value was refreshed,
// and until the refresh had expired in its turn, does not report that the value
// expired. It reports the expiry of the refresh, or that the key is gone, or the
// value that replaced it all.
func TestExpiryOfWhatWasMissed(t *testing.T) {
	purge := func(t *testing.T, s *NATSStore) {
		stream, err := newJetStream(t, s.data.nc).Stream(t.Context(), "KV_b")
		require.NoError(t, err)
		require.NoError(t, stream.Purge(t.Context()))
	}
	put := func(t *testing.T, s *NATSStore, value string) uint64 {
		require.NoError(t, s.Put("k", []byte(value), 0))
		kv, err := s.GetKeyValue("k")
		require.NoError(t, err)
		return kv.Revision
	}
	// Each follows the expiry of the second value, and returns what revision it wrote.
	for name, then := range map[string]func(*testing.T, *NATSStore, record) uint64{
		"marked": func(t *testing.T, s *NATSStore, second record) uint64 { return markEnd(t, s, "k", second) },
		"marked as gone": func(t *testing.T, s *NATSStore, _ record) uint64 {
			purge(t, s)
			return markEnd(t, s, "k", record{})
		},
		"gone":     func(t *testing.T, s *NATSStore, _ record) uint64 { purge(t, s); return 0 },
		"replaced": func(t *testing.T, s *NATSStore, _ record) uint64 { return put(t, s, "third") },
		"followed": func(t *testing.T, s *NATSStore, _ record) uint64 { purge(t, s); return put(t, s, "third") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			withLongerTTL(t, 500*time.Millisecond, func(ttl time.Duration) bool {
				srv := startServer(t, nil)
				near, far, proxy := openNearAndFar(t, srv, distance{})
				events := mustWatch(t, far, "k")
				require.NoError(t, near.Put("k", []byte("first"), ttl))
				first := <-events
				require.Equal(t, "first", string(first.Value))
				proxy.refuse(true)
				proxy.cut()
				require.NoError(t, near.Put("k", []byte("second"), ttl+100*time.Millisecond))
				second, err := near.data.leaderLast(newBudget(context.Background()), "k")
				require.NoError(t, err)
				if !second.created.time().Equal(first.Created) {
					return false // the first value has expired
				}
				eventually(t, func() bool { _, err := near.Get("k"); return err == ErrNotFound }, "its end")
				want := then(t, near, second)
				proxy.refuse(false)
				ev := <-events
				switch name {
				case "marked":
					require.Equal(t, OpDelete, ev.Operation)
					require.Equal(t, second.revision, ev.Revision)
					require.Equal(t, int64(second.deadline), ev.Modified.UnixNano())
				case "gone":
					require.Equal(t, OpDelete, ev.Operation)
					require.Greater(t, ev.Revision, second.revision)
					require.Greater(t, ev.Modified.UnixNano(), int64(second.deadline))
				case "marked as gone":
					require.Equal(t, OpDelete, ev.Operation)
					require.Equal(t, want, ev.Revision)
				default:
					require.Equal(t, "third", string(ev.Value))
					require.Equal(t, want, ev.Revision)
					return true
				}
				put(t, near, "third")
				require.Equal(t, "third", string((<-events).Value))
				return true
			})
		})
	}
}

// TestExpiryNeedsAMajority: a watch of several servers does not report an expiry on
// the word of one of them, which may not have the refresh, or not even what expired.
func TestExpiryNeedsAMajority(t *testing.T) {
	s, f, w := joinFeedOnReplicas(t)
	require.NoError(t, s.Put("other", nil, 0))
	last := mustGet(t, s, "other").Revision
	next := func(key string) (ev *KeyValue) {
		eventually(t, func() bool {
			for ev == nil || ev.Key != key {
				if ev, _, _ = w.next(); ev == nil {
					return false
				}
			}
			return true
		}, "an event")
		return ev
	}
	t.Run("listed", func(t *testing.T) { // and not delivered yet
		require.True(t, f.post(func() {
			f.track("k", &record{entry: entry{revision: last}, deadline: 1}, f.gaps, true)
			f.expire()
		}))
		ev := next("k")
		require.Equal(t, OpDelete, ev.Operation)
		require.Greater(t, ev.Revision, last, "a majority has accepted it")
	})
	t.Run("unknown to a leader", func(t *testing.T) {
		require.NoError(t, s.Put("k", []byte("v"), time.Hour))
		require.Equal(t, OpPut, next("k").Operation)
		require.True(t, f.post(func() {
			k := f.alive["k"]
			f.expired([]finding{{k, k.revision, k.deadline, probeResult{last: k.revision - 1, known: true}}})
		}))
		require.NoError(t, s.Put("k", []byte("refreshed"), time.Hour))
		require.Equal(t, "refreshed", string(next("k").Value))
	})
}

// TestLaggardIsAvoided: a feed whose consumer was on a server that lags behind the
// leader attaches to one on another server. The server that lags may do so for long.
func TestLaggardIsAvoided(t *testing.T) {
	s, f, w := joinFeedOnReplicas(t)
	server := func() (name string) {
		eventually(t, func() bool {
			return f.holds(func() bool {
				if f.source != nil {
					name = f.source.info.Cluster.Server
				}
				return f.source != nil
			})
		}, "it is attached")
		return name
	}
	same := 0
	for range 40 {
		lagged := server()
		require.NotEmpty(t, lagged)
		require.True(t, f.post(func() { f.heard = true; f.cutOff(itLags) }))
		if server() == lagged {
			same++ // the servers choose at random, so this is possible
		}
	}
	assert.LessOrEqual(t, same, 4)
	require.NoError(t, s.Put("k", nil, 0))
	eventually(t, func() bool { ev, _, _ := w.next(); return ev != nil && ev.Key == "k" }, "an event")
}

// TestGaps: a feed notices that the server had no request of it for so long that a
// value may have come and gone.
func TestGaps(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	f, w := joinFeed(t, s)
	gaps := make(chan int)
	after := func(since time.Duration) int {
		require.True(t, f.post(func() { f.used(f.asked, time.Now().Add(-since)) }))
		require.NoError(t, s.Put("k", nil, 0))
		eventually(t, func() bool { ev, _, _ := w.next(); return ev != nil }, "an event")
		require.True(t, f.post(func() { gaps <- f.gaps; f.gaps = 0 }))
		return <-gaps
	}
	require.Equal(t, 1, after(2*shortestLife))
	eventually(t, func() bool { return after(0) == 0 }, "no gap, unless the machine stands still")
}

// TestExpiryMarkedNearTheOpening: what another store has marked before a watch has
// listed what existed is reported, if it expired after the watch began.
func TestExpiryMarkedNearTheOpening(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	near, far, _ := openNearAndFar(t, srv, distance{rtt: 200 * time.Millisecond})
	require.NoError(t, near.Put("before", nil, time.Millisecond))
	before, err := near.data.leaderLast(newBudget(context.Background()), "before")
	require.NoError(t, err)
	require.NoError(t, near.Put("k", nil, 5*time.Second)) // it is replaced sooner
	base, err := near.data.leaderLast(newBudget(context.Background()), "k")
	require.NoError(t, err)
	events := mustWatch(t, far, "*")
	base.deadline = base.modified.deadline(time.Since(base.modified.time()))
	markEnd(t, near, "before", before)
	markEnd(t, near, "k", base)
	ev := <-events
	require.Equal(t, OpDelete, ev.Operation)
	require.Equal(t, "k", ev.Key)
	require.Equal(t, base.revision, ev.Revision)
	require.Equal(t, int64(base.deadline), ev.Modified.UnixNano())
}

// TestManyExpiriesOnReplicas: many stores find at the same time that many keys have
// expired. Each key is marked once, and a store asks about it a few times.
func TestManyExpiriesOnReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	const stores, keys = 9, 1000
	c := startCluster(t)
	open := func(i int) *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[i%3].ClientURL()), Bucket: "b", Replicas: 3})
	}
	writer := open(0)
	var all []*NATSStore
	var watches []*observer
	asked := uint64(0)
	for i := range stores {
		s := open(i)
		all, watches = append(all, s), append(watches, observe(mustWatch(t, s, "*")))
		asked -= s.Stats().Requests
	}
	before, err := writer.data.info(newBudget(t.Context()))
	require.NoError(t, err)
	var writers sync.WaitGroup
	for w := range 16 {
		writers.Go(func() {
			for i := w; i < keys; i += 16 {
				assert.NoError(t, writer.Put(fmt.Sprintf("k.%d", i), nil, 4*time.Second))
			}
		})
	}
	writers.Wait()
	var late time.Duration
	for _, w := range watches {
		eventually(t, func() bool { return len(w.deletions("k.")) == keys }, "all expiries")
		for _, ends := range w.deletions("k.") {
			require.Len(t, ends, 1)
			late = max(late, ends[0].arrived.Sub(ends[0].Modified))
		}
	}
	for _, s := range all {
		asked += s.Stats().Requests
	}
	after, err := writer.data.info(newBudget(t.Context()))
	require.NoError(t, err)
	require.EqualValues(t, 2*keys, after.State.LastSeq-before.State.LastSeq, "a value and one marker for each")
	t.Logf("%d stores asked %.1f times for each key, and reported it at most %v after its deadline", stores, float64(asked)/stores/keys, late)
	require.Less(t, asked, uint64(4*stores*keys))
}

// TestAwaitedRevisions: the leader has a newer revision of a key, which is on its way
// here. The feed asks about the key again when its consumer has come so far, not before.
func TestAwaitedRevisions(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	for i := range 50 {
		require.NoError(t, s.Put(fmt.Sprint("k.", i), nil, time.Hour))
	}
	mustWatch(t, s, "*")
	f := listedFeed(t, s, pattern{wild: true})
	const far = 1 << 40
	require.True(t, f.holds(func() bool {
		for key, k := range f.alive {
			f.unconfirmed[key] = awaited{k, far}
		}
		for range 20 {
			f.recheck()
		}
		return len(f.unconfirmed) == 50
	}), "it waits for all of them")
	require.True(t, f.holds(func() bool {
		for key, k := range f.alive {
			f.unconfirmed[key] = awaited{k, f.cursor}
		}
		f.recheck()
		return len(f.unconfirmed) == 0
	}), "it asks about all of them")
}
