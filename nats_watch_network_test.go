package state

import (
	"context"
	"fmt"
	"slices"
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

// Watches far from the server, beside other clients' traffic, and in buckets
// that somebody else changes meanwhile.

// An observer reads a watch to its end and notes when each event arrived.
type observer struct {
	mu     sync.Mutex // guards what follows
	events []observation
	ended  bool
}

type observation struct {
	*KeyValue
	arrived time.Time
}

func observe(events <-chan *KeyValue) *observer {
	o := &observer{}
	go func() {
		for kv := range events {
			now := time.Now()
			o.mu.Lock()
			o.events = append(o.events, observation{kv, now})
			o.mu.Unlock()
		}
		o.mu.Lock()
		o.ended = true
		o.mu.Unlock()
	}()
	return o
}

// deletions returns the events of keys that are gone, by key.
func (o *observer) deletions(prefix string) map[string][]observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	found := map[string][]observation{}
	for _, e := range o.events {
		if e.Operation == OpDelete && strings.HasPrefix(e.Key, prefix) {
			found[e.Key] = append(found[e.Key], e)
		}
	}
	return found
}

// last returns the last event of a key, or nil.
func (o *observer) last(key string) *observation {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range slices.Backward(o.events) {
		if e.Key == key {
			return &e
		}
	}
	return nil
}

func (o *observer) hasEnded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ended
}

// within waits until f holds. It reports whether it did in time.
func within(limit time.Duration, f func() bool) bool {
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return f()
}

// TestWatchReportsDeathsBesideTraffic: an agent that dies is reported within a
// second of its deadline, however far the watch is from the server and however
// busy the other agents are, and nobody who lives is reported.
func TestWatchReportsDeathsBesideTraffic(t *testing.T) {
	if testing.Short() {
		t.Skip("seconds for each of several distances, and a cluster")
	}
	single, three := startServer(t, nil), startCluster(t)
	for _, c := range []struct {
		rtt                        time.Duration
		perSecond, deaths, servers int
	}{
		{500 * time.Microsecond, 1000, 10, 1},
		{2 * time.Millisecond, 500, 10, 1},
		{20 * time.Millisecond, 100, 10, 1},
		{2 * time.Millisecond, 500, 1000, 1},
		{500 * time.Microsecond, 1000, 10, 3},
		{2 * time.Millisecond, 500, 10, 3},
		{20 * time.Millisecond, 100, 10, 3},
		{2 * time.Millisecond, 500, 1000, 3},
	} {
		t.Run(fmt.Sprintf("%d deaths at %v beside %d a second on %d servers", c.deaths, c.rtt, c.perSecond, c.servers), func(t *testing.T) {
			near, far := single.ClientURL(), single.ClientURL()
			if c.servers == 3 {
				near, far = three.servers[0].ClientURL(), three.servers[1].ClientURL()
			}
			round := func(int) (latest time.Duration) {
				bucket := newBucketName()
				writer := openStore(t, NATSStoreConfig{Conn: connect(t, near), Bucket: bucket, Replicas: c.servers})
				nc, _ := connectAt(t, far, distance{rtt: c.rtt})
				watch := observe(mustWatch(t, openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket}), "agents.*"))
				stop := traffic{prefix: "agents.busy.", keys: 50, perSecond: c.perSecond, ttl: 30 * time.Second}.start(t, connect(t, near), bucket)

				const ttl = 2 * time.Second
				alive, wait := context.WithCancel(context.Background())
				defer wait()
				var agents sync.WaitGroup
				for i := range 5 { // agents that live and are refreshed in time
					agents.Go(func() {
						for alive.Err() == nil {
							assert.NoError(t, writer.Put(fmt.Sprintf("agents.alive.%d", i), nil, ttl))
							time.Sleep(ttl / 4)
						}
					})
				}
				var dying sync.WaitGroup
				for i := range 10 {
					dying.Go(func() {
						for n := i; n < c.deaths; n += 10 {
							assert.NoError(t, writer.Put(fmt.Sprintf("agents.dead.%d", n), nil, ttl))
						}
					})
				}
				dying.Wait()
				all := within(ttl+12*time.Second, func() bool { return len(watch.deletions("agents.dead.")) == c.deaths })
				wait()
				agents.Wait()
				stop()
				deaths := watch.deletions("agents.dead.")
				require.True(t, all, "%d of %d deaths were reported", len(deaths), c.deaths)
				for key, events := range deaths {
					require.Len(t, events, 1, key)
					late := events[0].arrived.Sub(events[0].Modified)
					require.GreaterOrEqual(t, late, time.Duration(0), "%s is reported early", key)
					latest = max(latest, late)
				}
				t.Logf("reported at most %v after the deadline", latest)
				// An agent that was late, on a busy machine, has created its entry anew.
				for key, events := range watch.deletions("agents.alive.") {
					for _, e := range events {
						kv, err := writer.GetKeyValue(key)
						if err == nil {
							assert.False(t, kv.Created.Before(e.Modified), "%s is reported dead at %v and has lived since %v", key, e.Modified, kv.Created)
						}
					}
				}
				assert.Empty(t, watch.deletions("agents.busy."))
				return latest
			}
			assert.Less(t, soonest(3, time.Second, round), time.Second)
		})
	}
}

// TestWatchOfLivingKeysAsksNothing: nothing is asked for keys that are refreshed
// in time.
func TestWatchOfLivingKeysAsksNothing(t *testing.T) {
	t.Parallel()
	for name, stores := range map[string]int{"ten watches of one store": 1, "ten stores with a watch each": 10} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			const watches, keys, seconds = 10, 1000, 7
			bucket := newBucketName()
			var all []*observer
			for range stores {
				s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket})
				for range watches / stores {
					all = append(all, observe(mustWatch(t, s, "agents.*")))
				}
			}
			traffic{prefix: "agents.", keys: keys, perSecond: keys, ttl: 5 * time.Second}.start(t, connect(t, srv.ClientURL()), bucket)
			last := fmt.Sprintf("agents.%d", keys-1)
			eventually(t, func() bool { return all[watches-1].last(last) != nil }, "every key has been written")
			requests := countRequests(t, srv.ClientURL(), bucket)
			time.Sleep(seconds * time.Second)
			asked := requests.api.Load() + requests.other.Load()
			t.Logf("%d requests, and %d pulls, in %d s", asked, requests.pulls.Load(), seconds)
			if stores == 1 {
				asked += requests.pulls.Load() // else it is one for some hundred messages
			}
			assert.LessOrEqual(t, asked, int64(10*seconds))
			for _, watch := range all {
				assert.Empty(t, watch.deletions(""), "of living keys")
			}
		})
	}
}

// TestWatchAfterSilence: a key that was deleted long ago is written again. The
// watch reports it as soon as any other key.
func TestWatchAfterSilence(t *testing.T) {
	if testing.Short() {
		t.Skip("eleven seconds of silence")
	}
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	const n = 9
	var watches []<-chan *KeyValue
	for i := range n {
		watches = append(watches, mustWatch(t, s, fmt.Sprintf("k.%d.*", i)))
		key := fmt.Sprintf("k.%d.again", i)
		require.NoError(t, writer.Put(key, nil, 0))
		require.NoError(t, writer.Delete(key))
		for receive(t, watches[i]).Operation != OpDelete {
			continue // the put may have been skipped
		}
	}
	time.Sleep(11 * time.Second)
	latency := func(i int, key string) time.Duration {
		began := time.Now()
		require.NoError(t, writer.Put(key, nil, 0))
		require.Equal(t, "put "+key, brief(receive(t, watches[i])))
		return time.Since(began)
	}
	var again, fresh []time.Duration
	for i := range n {
		fresh = append(fresh, latency(i, fmt.Sprintf("k.%d.new", i)))
		again = append(again, latency(i, fmt.Sprintf("k.%d.again", i)))
	}
	slices.Sort(again)
	slices.Sort(fresh)
	t.Logf("median latency %v, of a new key %v", again[n/2], fresh[n/2])
	assert.Less(t, again[n/2], 10*fresh[n/2]+20*time.Millisecond)
}

// TestWatchPurgedByHand: an operator purges the stream. The watch reports that
// the keys are gone, or it ends.
func TestWatchPurgedByHand(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		purge []jetstream.StreamPurgeOpt
		gone  []string
		limit time.Duration
	}{
		"everything":  {nil, []string{"k.1", "k.2", "k.expiring"}, 10 * time.Second},
		"one subject": {[]jetstream.StreamPurgeOpt{jetstream.WithPurgeSubject("$KV.b.k.1")}, []string{"k.1"}, 20 * time.Second},
	} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, reported before: %v", name, known), func(t *testing.T) {
				t.Parallel()
				nc := connect(t, startServer(t, nil).ClientURL())
				s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
				var watch *observer
				if known {
					watch = observe(mustWatch(t, s, "k.*"))
				}
				require.NoError(t, s.Put("k.1", nil, 0))
				require.NoError(t, s.Put("k.2", nil, 0))
				require.NoError(t, s.Put("k.expiring", nil, time.Hour))
				if !known {
					watch = observe(mustWatch(t, s, "k.*"))
				}
				require.NoError(t, s.Put("k.last", nil, 0))
				eventually(t, func() bool { return watch.last("k.last") != nil }, "the last event")
				listedFeed(t, s, pattern{"k.", true})
				stream, err := newJetStream(t, nc).Stream(context.Background(), "KV_b")
				require.NoError(t, err)
				require.NoError(t, stream.Purge(context.Background(), c.purge...))
				purged := time.Now()
				told := func() bool {
					if watch.hasEnded() {
						return true
					}
					for _, key := range c.gone {
						if last := watch.last(key); last == nil || last.Operation != OpDelete {
							return false
						}
					}
					return true
				}
				require.True(t, within(c.limit, told), "neither deletions nor the end")
				t.Logf("%v after the purge; the watch has ended: %v", time.Since(purged), watch.hasEnded())
				if !watch.hasEnded() && len(c.purge) > 0 {
					assert.Empty(t, watch.deletions("k.2"), "of a key that is there")
				}
			})
		}
	}
}

// TestWatchPurgedBesideAWrite: an operator purges a key, and another is written
// before the watch has looked, so that the stream has as many messages as before.
// The watch finds out when it lists the next time.
func TestWatchPurgedBesideAWrite(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	watch := observe(mustWatch(t, s, "k.*"))
	require.NoError(t, s.Put("k.1", nil, 0))
	require.NoError(t, s.Put("k.2", nil, 0))
	purged := mustGet(t, s, "k.2").Revision
	p, err := parsePattern("k.*")
	require.NoError(t, err)
	feed := s.feeds.by[p]
	hasLooked := func(seq uint64) bool {
		looked := make(chan bool)
		feed.post(func() { looked <- feed.listed && feed.looked.LastSeq == seq })
		return <-looked
	}
	eventually(t, func() bool { return hasLooked(purged) }, "the feed has looked")
	stream, err := newJetStream(t, nc).Stream(context.Background(), "KV_b")
	require.NoError(t, err)
	require.NoError(t, stream.Purge(context.Background(), jetstream.WithPurgeSubject("$KV.b.k.2")))
	require.NoError(t, s.Put("k.3", nil, 0))
	eventually(t, func() bool { return hasLooked(purged + 1) }, "the feed has looked again")
	feed.post(func() { feed.lastList = feed.lastList.Add(-maxRelist) })
	eventually(t, func() bool { return watch.last("k.2").Operation == OpDelete }, "the purge is found out")
	assert.Equal(t, purged, watch.last("k.2").Revision)
	for _, key := range []string{"k.1", "k.3"} {
		assert.Equal(t, OpPut, watch.last(key).Operation, key)
	}
}

// TestWatchThatCannotAttachEnds: what a watch needs is taken away for good. It
// ends rather than stay open and silent.
func TestWatchThatCannotAttachEnds(t *testing.T) {
	t.Parallel()
	const limit = 15 * time.Second
	t.Run("permission", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		options := func(denied ...string) *server.Options {
			return &server.Options{
				Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true,
				Users: []*server.User{
					{Username: "operator", Password: "p"},
					{Username: "u", Password: "p", Permissions: &server.Permissions{
						Publish: &server.SubjectPermission{Allow: []string{">"}, Deny: denied},
					}},
				},
			}
		}
		srv := runServer(t, options())
		nc := connect(t, srv.ClientURL(), nats.UserInfo("u", "p"))
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		watch := observe(mustWatch(t, s, "*"))
		require.NoError(t, s.Put("k", nil, 0))
		eventually(t, func() bool { return watch.last("k") != nil }, "an event")
		reconnects := nc.Stats().Reconnects
		require.NoError(t, srv.ReloadOptions(options("$JS.API.CONSUMER.CREATE.>")))
		require.NoError(t, nc.ForceReconnect())
		eventually(t, func() bool { return nc.Stats().Reconnects > reconnects && nc.IsConnected() }, "a reconnect")
		// The server may have kept the consumer. It is taken away as well.
		operator := newJetStream(t, connect(t, srv.ClientURL(), nats.UserInfo("operator", "p")))
		deleteConsumers(t, operator, "KV_b")
		assert.True(t, within(limit, watch.hasEnded), "open and silent")
	})
	t.Run("limit of consumers", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, nil)
		js := newJetStream(t, connect(t, srv.ClientURL()))
		const most = 5
		stream, err := js.CreateStream(context.Background(), jetstream.StreamConfig{
			Name: "KV_b", Subjects: []string{"$KV.b.>"}, MaxMsgsPerSubject: 1, MaxConsumers: most,
			AllowRollup: true, AllowDirect: true, AllowMsgTTL: true, Discard: jetstream.DiscardNew,
		})
		require.NoError(t, err)
		s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
		watch := observe(mustWatch(t, s, "*"))
		require.NoError(t, s.Put("k", nil, 0))
		eventually(t, func() bool { return watch.last("k") != nil }, "an event")
		eventually(t, func() bool { // others take all the places
			deleteConsumers(t, js, "KV_b")
			for i := range most {
				_, _ = stream.CreateOrUpdateConsumer(context.Background(), jetstream.ConsumerConfig{Durable: fmt.Sprintf("other-%d", i)})
			}
			return len(consumers(t, js, "KV_b", "other-")) == most
		}, "no place is left")
		assert.True(t, within(limit, watch.hasEnded), "open and silent")
	})
}

// consumers returns the names of a stream's consumers that begin with prefix.
func consumers(t testing.TB, js jetstream.JetStream, stream, prefix string) []string {
	t.Helper()
	var names []string
	for _, c := range consumerInfos(t, js, stream) {
		if strings.HasPrefix(c.Name, prefix) {
			names = append(names, c.Name)
		}
	}
	return names
}

func consumerInfos(t testing.TB, js jetstream.JetStream, stream string) (infos []*jetstream.ConsumerInfo) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := js.Stream(ctx, stream)
	require.NoError(t, err)
	all := s.ListConsumers(ctx)
	for info := range all.Info() {
		infos = append(infos, info)
	}
	require.NoError(t, all.Err())
	return infos
}

// deleteConsumers deletes the consumers of a stream, except those of the test.
func deleteConsumers(t testing.TB, js jetstream.JetStream, stream string) {
	t.Helper()
	for _, name := range consumers(t, js, stream, "") {
		if !strings.HasPrefix(name, "other-") {
			_ = js.DeleteConsumer(context.Background(), stream, name)
		}
	}
}

// TestWatchNoEcho: a connection that does not get its own messages back still
// gets the store's own changes.
func TestWatchNoEcho(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.NoEcho()), Bucket: "b"})
	watch := observe(mustWatch(t, s, "*"))
	const n = 500
	want := map[string]string{}
	for i := range n {
		key := fmt.Sprintf("k.%d", i)
		for round := range 3 {
			require.NoError(t, s.Put(key, fmt.Append(nil, round), 0))
		}
		want[key] = "put 2"
		if i%10 == 0 {
			require.NoError(t, s.Delete(key))
			want[key] = "delete "
		}
	}
	var wg sync.WaitGroup
	for i := range 20 { // so busy that the server skips some of these values
		for n := range 25 {
			want[fmt.Sprintf("gone.%d.%d", i, n)] = "delete "
		}
		wg.Go(func() {
			for n := range 25 {
				key := fmt.Sprintf("gone.%d.%d", i, n)
				assert.NoError(t, s.Put(key, nil, 0))
				assert.NoError(t, s.Delete(key))
			}
		})
	}
	wg.Wait()
	require.NoError(t, s.Put("last", nil, 0))
	eventually(t, func() bool { return watch.last("last") != nil }, "the last event")
	missed := 0
	for key, state := range want {
		last := watch.last(key)
		if last == nil || fmt.Sprintf("%v %s", last.Operation, last.Value) != state {
			missed++
		}
	}
	assert.Zero(t, missed, "of %d last states", len(want))
}

// TestManyWatchesCostOne: fifty watches of one pattern in one store cost the
// server what one does.
func TestManyWatchesCostOne(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	var all []*observer
	for range 50 {
		all = append(all, observe(mustWatch(t, s, "k.*")))
	}
	arrived := func(key string) {
		t.Helper()
		require.NoError(t, s.Put(key, nil, 0))
		eventually(t, func() bool {
			for _, watch := range all {
				if watch.last(key) == nil {
					return false
				}
			}
			return true
		}, "an event for each watch")
	}
	arrived("k.first")
	time.Sleep(time.Second) // the watches may still be reading what existed

	const seconds, puts = 5, 200
	before := countMessages(t, srv)
	time.Sleep(seconds * time.Second)
	idle := countMessages(t, srv).since(before)
	t.Logf("idle: %d messages in and %d out in %d s", idle.in, idle.out, seconds)
	assert.LessOrEqual(t, idle.out, int64(5*seconds), "messages out of an idle store")

	before = countMessages(t, srv)
	began := time.Now()
	for i := range puts - 1 {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), nil, 0))
	}
	arrived("k.last")
	busy := countMessages(t, srv).since(before)
	t.Logf("%d messages in and %d out for %d Puts", busy.in, busy.out, puts)
	assert.LessOrEqual(t, busy.out, int64(3*puts)+int64(5*(time.Since(began).Seconds()+1)), "messages out for %d Puts", puts)
	assert.LessOrEqual(t, len(consumers(t, newJetStream(t, connect(t, srv.ClientURL())), "KV_b", "")), 1)
}

// TestWatchOpensAtOnce: opening a watch costs the same beside many keys as
// beside none.
func TestWatchOpensAtOnce(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	sizes := []int{0, 5000}
	requests, received := map[int]uint64{}, map[int]uint64{}
	for _, size := range sizes {
		bucket := newBucketName()
		// So far away that what is asked for after Watch has not come yet.
		nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 400 * time.Millisecond})
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket})
		fillBucket(t, nc, bucket, "k.", size)
		require.NoError(t, s.Put("last", nil, 0))
		// The bucket's streams and inboxes are in use before it counts.
		_, err := s.Get("last")
		require.NoError(t, err)
		before := nc.Stats()
		mustWatch(t, s, "*")
		after := nc.Stats()
		requests[size] = after.OutMsgs - before.OutMsgs
		received[size] = after.InMsgs - before.InMsgs
		t.Logf("beside %d keys: %d requests, %d messages received", size, requests[size], received[size])
	}
	assert.LessOrEqual(t, requests[5000], requests[0]+1)
	// What existed is read after Watch has returned.
	assert.Less(t, received[5000], uint64(1000))
}

// TestFlappingConnectionLeavesNoConsumers: a connection that is cut again and
// again leaves no consumers behind.
func TestFlappingConnectionLeavesNoConsumers(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	js := newJetStream(t, connect(t, srv.ClientURL()))
	nc, p := connectAt(t, srv.ClientURL(), distance{})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, s.Put("k.1", nil, time.Hour))
	var all []*observer
	for range 50 {
		all = append(all, observe(mustWatch(t, s, "k.*")))
	}
	const cuts = 50
	for range cuts {
		before := nc.Stats().Reconnects
		p.cut()
		eventually(t, func() bool { return nc.Stats().Reconnects > before && nc.IsConnected() }, "a reconnect")
		time.Sleep(10 * time.Millisecond) // the watches begin to attach again
	}
	require.NoError(t, s.Put("k.2", nil, 0))
	for _, watch := range all {
		eventually(t, func() bool { return watch.last("k.2") != nil }, "an event")
	}
	// A request to delete a consumer may be lost with its connection, now and then. Then
	// the server deletes it after its inactive threshold.
	left := func(life time.Duration) (n int) {
		for _, c := range consumerInfos(t, js, "KV_b") {
			if c.Config.InactiveThreshold <= life {
				n++
			}
		}
		return n
	}
	atMost := func(most int, life, after time.Duration) {
		assert.True(t, within(after, func() bool { return left(life) <= most }), "%d consumers are left for one pattern", left(life))
	}
	atMost(cuts/2, listLife, 3*time.Second)
	atMost(1, watchLife, 3*watchLife)
	atMost(1, listLife, 3*listLife) // those of listings, too
	require.NoError(t, s.Close())
	atMost(0, listLife, 3*watchLife)
}

// TestWatchBesideSubscriptionLimit: a connection has as many subscriptions as
// the server allows. A watch needs none, or it fails in words.
func TestWatchBesideSubscriptionLimit(t *testing.T) {
	t.Parallel()
	const most = 10
	srv := startServer(t, func(o *server.Options) { o.MaxSubs = most })
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, s.Put("k", nil, 0))
	held := func() int {
		conns, err := srv.Connz(nil)
		require.NoError(t, err)
		return int(conns.Conns[0].NumSubs)
	}
	for i := 0; held() < most; i++ {
		_, err := nc.Subscribe(fmt.Sprintf("other.%d", i), func(*nats.Msg) {})
		require.NoError(t, err)
		require.NoError(t, nc.Flush())
	}
	began := time.Now()
	events, err := s.Watch("*")
	if err != nil {
		assert.ErrorContains(t, err, "subscriptions")
		assert.Less(t, time.Since(began), 8*time.Second)
		return
	}
	watch := observe(events)
	require.NoError(t, s.Put("k", nil, 0))
	assert.True(t, within(10*time.Second, func() bool { return watch.last("k") != nil || watch.hasEnded() }), "open and silent")
}

// TestLimitsOfConsumersAndPulls: Keys and Watch work within the limits that an
// operator sets for consumers and their pulls.
func TestLimitsOfConsumersAndPulls(t *testing.T) {
	t.Parallel()
	const keys = 1000
	works := func(t *testing.T, s StateStore, idle time.Duration) {
		t.Helper()
		watch := observe(mustWatch(t, s, "*"))
		for i := range keys {
			require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), nil, time.Hour))
		}
		found, err := s.Keys("*")
		require.NoError(t, err)
		assert.Len(t, found, keys)
		second := observe(mustWatch(t, s, "*")) // beside keys that exist
		require.NoError(t, s.Put("dying", nil, time.Second))
		for _, o := range []*observer{watch, second} {
			eventually(t, func() bool { last := o.last("dying"); return last != nil && last.Operation == OpDelete }, "an expiry")
		}
		for i := range keys {
			assert.NotNil(t, watch.last(fmt.Sprintf("k.%d", i)))
		}
		time.Sleep(idle)
		require.NoError(t, s.Put("last", nil, 0))
		for _, o := range []*observer{watch, second} {
			eventually(t, func() bool { return o.last("last") != nil }, "an event after the silence")
		}
	}
	t.Run("consumers live five seconds", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, nil).ClientURL())
		_, err := newJetStream(t, nc).CreateStream(context.Background(), jetstream.StreamConfig{
			Name: "KV_b", Subjects: []string{"$KV.b.>"}, MaxMsgsPerSubject: 1,
			AllowRollup: true, AllowDirect: true, AllowMsgTTL: true, Discard: jetstream.DiscardNew,
			ConsumerLimits: jetstream.StreamConsumerLimits{InactiveThreshold: 5 * time.Second},
		})
		require.NoError(t, err)
		works(t, openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"}), 6*time.Second)
	})
	t.Run("pulls of 256 messages", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, func(o *server.Options) { o.JetStreamLimits.MaxRequestBatch = 256 })
		works(t, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"}), 0)
	})
}

// TestWatchReportsExpiryNearItsOpening: keys whose deadlines pass just after
// Watch has returned are reported, also beside many others.
func TestWatchReportsExpiryNearItsOpening(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	far, _ := connectAt(t, srv.ClientURL(), distance{rtt: 100 * time.Millisecond}) // where a listing takes its time
	watching := openStore(t, NATSStoreConfig{Conn: far, Bucket: "b"})
	deadlines := map[string]time.Time{}
	for i := range 100 { // some deadline passes soon after Watch, however long that takes
		key, ttl := fmt.Sprintf("dying.%d", i), 2*time.Second // the server counts whole seconds
		require.NoError(t, s.Put(key, nil, ttl))
		deadlines[key] = mustGet(t, s, key).Modified.Add(ttl)
		time.Sleep(20 * time.Millisecond)
	}
	events := mustWatch(t, watching, "*")
	opened := time.Now()
	watch := observe(events)
	sure, soonest := 0, time.Hour
	for key, deadline := range deadlines {
		left := deadline.Sub(opened)
		if left < 20*time.Millisecond {
			continue
		}
		sure++
		soonest = min(soonest, left)
		assert.True(t, within(left+5*time.Second, func() bool { return watch.last(key) != nil }),
			"%s had %v left when Watch returned and is not reported", key, left)
	}
	require.NotZero(t, sure, "Watch took longer than all deadlines")
	t.Logf("%d deadlines, the first of them %v after Watch", sure, soonest)
	for key, events := range watch.deletions("dying.") {
		assert.Len(t, events, 1, key)
		assert.WithinDuration(t, deadlines[key], events[0].Modified, 0, key)
	}
}

// TestWatchBehindAStaleLeader: a watch comes back, and the leader of several servers
// does not have what the watch has read: it was cut off. The watch waits for one that
// does, and does not take the bucket for another one.
func TestWatchBehindAStaleLeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	events, err := s.Watch("k.*")
	require.NoError(t, err)
	require.NoError(t, s.Put("k.0", nil, 0))
	require.Equal(t, "put k.0", brief(receive(t, events)))
	f := feedOf(s, pattern{"k.", true})
	require.True(t, f.post(func() {
		f.cursor += 3 // as if it had read so much more
		f.cutOff("a test")
	}))
	eventually(t, func() bool { return f.holds(func() bool { return !f.stale.IsZero() }) }, "a stale leader")
	for i := range 4 {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), nil, 0))
	}
	for receive(t, events).Key != "k.3" {
	}
}

// TestSourceThatNeverWorks: a watch attaches, and then the server refuses what it asks
// for. It does not attach again and again without a pause.
func TestSourceThatNeverWorks(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	var refused atomic.Bool
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.MSG.NEXT.") && refused.Load() {
			msg = &nats.Msg{Subject: msg.Reply, Header: nats.Header{"Status": {"503"}}}
		}
		_ = nc.PublishMsg(msg)
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
	refused.Store(true)
	began := time.Now()
	events := mustWatch(t, s, "*")
	eventually(t, func() bool { return s.Stats().WatchCuts >= 8 }, "it is cut off again and again")
	assert.Greater(t, time.Since(began), 700*time.Millisecond, "8 times")
	refused.Store(false)
	require.NoError(t, s.Put("k", nil, 0))
	assert.Equal(t, "put k", brief(receive(t, events)))
}

// TestOneMeasurementAtATime: however many want to know how far a watch has come, it
// asks the server once, and once more for those that came later.
func TestOneMeasurementAtATime(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	var asked atomic.Int64
	first := make(chan *nats.Msg, 1)
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.INFO.") && asked.Add(1) == 1 {
			first <- msg
			return
		}
		_ = nc.PublishMsg(msg)
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
	f, w := joinFeed(t, s)
	for range 50 {
		f.askProgress()
	}
	msg := <-first
	require.True(t, f.holds(func() bool { return f.measuring }))
	for range 50 {
		f.askProgress()
	}
	require.True(t, f.holds(func() bool { return f.measureAgain }))
	assert.EqualValues(t, 1, asked.Load())
	require.NoError(t, connect(t, srv.ClientURL()).PublishMsg(msg))
	eventually(t, func() bool { return f.holds(func() bool { return !f.measuring }) }, "the measurements end")
	assert.EqualValues(t, 2, asked.Load())
	_, p, _ := w.next()
	assert.False(t, p.asOf.IsZero())
}
