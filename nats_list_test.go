package state

import (
	"context"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestListFew compares the two ways to list, and says when there is but one.
func TestListFew(t *testing.T) {
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: newBucketName(), History: 3})
	put := func(key string, size int, ttl time.Duration) {
		t.Helper()
		require.NoError(t, s.Put(key, make([]byte, size), ttl))
	}
	for i := range 60 {
		for range 1 + i%3 {
			put(fmt.Sprintf("few.%d", i), 10, time.Duration(i%2)*time.Hour)
		}
		put(fmt.Sprintf("fewer-%d", i), 10, 0)
	}
	for i := range 10 {
		require.NoError(t, s.Delete(fmt.Sprintf("few.%d", 5*i)))
	}
	for i := range 70 {
		put(fmt.Sprintf("many.%d", i), 10, 0)
	}
	put("large.1", 600_000, 0)
	put("large.2", 600_000, 0)
	put("large.3", 10, 0)

	for prefix, few := range map[string]bool{
		"few.": true, "few": false, "few.1": true, "fewer-1": false, "none.": false,
		"many.": false, "large.": false, "": false,
	} {
		t.Run(prefix+"*", func(t *testing.T) {
			p := pattern{prefix, true}
			info, err := s.data.info(newBudget(context.Background()))
			require.NoError(t, err)
			want, err := s.data.listOnce(newBudget(context.Background()), p, info, true, new(string))
			require.NoError(t, err)
			got, ok := s.data.listFew(newBudget(context.Background()), p, info)
			require.Equal(t, few, ok)
			if ok {
				require.Equal(t, sortAndDedupe(want), sortAndDedupe(got))
			}
		})
	}
}

// TestKeysOfFewUnderWrites has the keys overwritten that are listed.
func TestKeysOfFewUnderWrites(t *testing.T) {
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: newBucketName()})
	var want []string
	for i := range 40 {
		want = append(want, fmt.Sprintf("few.%02d", i))
		require.NoError(t, s.Put(want[i], nil, 0))
	}
	done := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 4 {
		writers.Go(func() {
			for i := w; ; i += 4 {
				select {
				case <-done:
					return
				default:
					if err := s.Put(want[i%40], []byte(fmt.Sprint(i)), time.Hour); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 200 {
		got, err := s.Keys("few.*")
		require.NoError(t, err)
		require.True(t, slices.Equal(want, got), "%v", got)
	}
	close(done)
	writers.Wait()
}

// TestKeysTakeOneBatch: a listing of all keys of a small bucket asks for messages
// once. To ask again, in order to see the end, would wait for a heartbeat.
func TestKeysTakeOneBatch(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for n := range 1100 {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", n), nil, 0))
		switch n + 1 {
		case 1, 100, 1000, 1023, 1024, 1100:
			const once = 3 // for the state of the stream, the consumer, and its messages
			assert.Equal(t, once, spent(s, func() {
				keys, err := s.Keys("*")
				require.NoError(t, err)
				require.Len(t, keys, n+1)
			}), "requests for %d keys", n+1)
		}
	}
}

// TestKeysWithHistory: a server that delivers the last revisions of keys stops short
// at one that was removed meanwhile, as it does at the end. Nothing is missing.
func TestKeysWithHistory(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	js := newJetStream(t, connect(t, srv.ClientURL()))
	for _, replaced := range [][]int{{0}, {3}, {9}, {0, 1, 2, 3}, {2, 3, 4, 8, 9}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}} {
		t.Run(fmt.Sprint(replaced), func(t *testing.T) {
			t.Parallel()
			cfg := NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: newBucketName(), History: 3}
			near := openStore(t, cfg)
			cfg.Conn, _ = connectAt(t, srv.ClientURL(), distance{rtt: 40 * time.Millisecond})
			far := openStore(t, cfg)
			var want []string
			for i := range 10 {
				want = append(want, fmt.Sprintf("k.%d", i))
				for range 1 + i%3 {
					require.NoError(t, near.Put(want[i], []byte("a value"), 0))
				}
			}
			require.NoError(t, near.Put("other", nil, 0))
			stream, err := js.Stream(t.Context(), "KV_"+cfg.Bucket)
			require.NoError(t, err)
			config := stream.CachedInfo().Config
			config.AllowDirect = false // or few keys are listed otherwise
			_, err = js.UpdateStream(t.Context(), config)
			require.NoError(t, err)
			for pattern, want := range map[string][]string{"k.*": want, "*": append(slices.Clone(want), "other")} {
				created, err := near.data.nc.SubscribeSync("$JS.API.CONSUMER.CREATE.KV_" + cfg.Bucket + ".>")
				require.NoError(t, err)
				require.NoError(t, near.data.nc.Flush())
				listed := make(chan struct{})
				go func() {
					defer close(listed)
					got, err := far.Keys(pattern)
					assert.NoError(t, err)
					assert.Equal(t, want, got)
				}()
				// The listing has its consumer, and does not have its messages yet, unless
				// the machine is too slow to notice.
				_, err = created.NextMsg(20 * time.Second)
				require.NoError(t, err)
				require.NoError(t, created.Unsubscribe())
				eventually(t, func() bool {
					select {
					case <-listed:
						return true
					default:
					}
					info, err := stream.Info(t.Context())
					return err == nil && info.State.Consumers > 0
				}, "a consumer")
				for _, i := range replaced {
					require.NoError(t, near.Put(fmt.Sprintf("k.%d", i), []byte("another"), time.Hour))
				}
				<-listed
				eventually(t, func() bool {
					info, err := stream.Info(t.Context())
					return err == nil && info.State.Consumers == 0
				}, "no consumer")
			}
		})
	}
}

// TestLargeListingWithHistory: nor where one request has brought all the bytes that
// it may.
func TestLargeListingWithHistory(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", History: 3})
	const keys = 800
	for i := range keys {
		for n := range 1 + i%3 {
			require.NoError(t, s.Put(fmt.Sprintf("k.%03d", i), append(make([]byte, 8192), byte(n)), 0))
		}
	}
	entries, err := s.Entries("*")
	require.NoError(t, err)
	require.Len(t, entries, keys)
	for i, kv := range entries {
		require.Equal(t, fmt.Sprintf("k.%03d", i), kv.Key)
		require.Equal(t, byte(i%3), kv.Value[8192], "the last revision")
	}
}

// TestWatchesOverANarrowLink: a server closes a connection over which what it sends
// does not get in time, so the watches of a store do not ask for much at once.
func TestWatchesOverANarrowLink(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) { o.WriteDeadline = 2 * time.Second }) // by default, ten
	near, far, p := openNearAndFar(t, srv, distance{rtt: 2 * time.Millisecond})
	const keys, patterns = 10, 6
	var watches []*observer
	for i := range patterns {
		watches = append(watches, observe(mustWatch(t, far, "abcdef.g"[:i]+"*")))
	}
	p.move(distance{rtt: 2 * time.Millisecond, bandwidth: 4 << 20})
	for i := range keys {
		require.NoError(t, near.Put(fmt.Sprintf("abcdef.g.%d", i), make([]byte, 400<<10), 0))
	}
	for _, w := range watches {
		eventually(t, func() bool { return w.last(fmt.Sprintf("abcdef.g.%d", keys-1)) != nil }, "all of it")
	}
	require.Zero(t, far.data.nc.Stats().Reconnects)
}

// relay passes on what a store with the APIPrefix "through" sends to a server.
func relay(t *testing.T, srv *server.Server, pass func(nc *nats.Conn, msg *nats.Msg)) {
	t.Helper()
	nc := connect(t, srv.ClientURL())
	_, err := nc.Subscribe("through.>", func(msg *nats.Msg) {
		subject := strings.TrimPrefix(msg.Subject, "through.")
		if !strings.HasPrefix(subject, "$KV.") {
			subject = "$JS.API." + subject
		}
		pass(nc, &nats.Msg{Subject: subject, Reply: msg.Reply, Header: msg.Header, Data: msg.Data})
	})
	require.NoError(t, err)
	require.NoError(t, nc.Flush())
}

// TestListingBehindTheLeader: the server of a listing's consumer can lag behind the
// leader, and have nothing to deliver of what the leader has. The listing asks again.
func TestListingBehindTheLeader(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	srv := startCluster(t).servers[0]
	var late atomic.Int64
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.MSG.NEXT.") && late.Add(-1) >= 0 {
			nothing := nats.Header{"Status": {"404"}, "Description": {"No Messages"}}
			msg = &nats.Msg{Subject: msg.Reply, Header: nothing}
		}
		_ = nc.PublishMsg(msg)
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3, APIPrefix: "through"})
	want := []string{"k.1", "k.2", "k.3"}
	for _, key := range want {
		require.NoError(t, s.Put(key, nil, 0))
	}
	late.Store(3)
	keys, err := s.Keys("k.*")
	require.NoError(t, err)
	assert.Equal(t, want, keys)
	assert.Negative(t, late.Load())
}

// TestListingOnAStoppingServer: a server that is stopping can answer that it has made
// a consumer and not say which, or that the consumer has nothing to deliver. That is
// not an empty bucket.
func TestListingOnAStoppingServer(t *testing.T) {
	t.Parallel()
	pending := regexp.MustCompile(`"num_pending":\s*[0-9]+`)
	for name, change := range map[string]func(answer []byte) []byte{
		"no-consumer": func([]byte) []byte { return []byte(`{"type":"io.nats.jetstream.api.v1.consumer_create_response"}`) },
		"no-messages": func(answer []byte) []byte { return pending.ReplaceAll(answer, []byte(`"num_pending":0`)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			var changed atomic.Bool
			relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
				if strings.Contains(msg.Subject, "CONSUMER.CREATE") && changed.CompareAndSwap(false, true) {
					go func() {
						reply := msg.Reply
						answer, err := nc.RequestMsg(msg, 5*time.Second)
						if assert.NoError(t, err) {
							assert.NoError(t, nc.Publish(reply, change(answer.Data)))
						}
					}()
					return
				}
				_ = nc.PublishMsg(msg)
			})
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
			require.NoError(t, s.Put("k", nil, 0))
			keys, err := s.Keys("*")
			require.NoError(t, err)
			require.True(t, changed.Load())
			require.Equal(t, []string{"k"}, keys)
		})
	}
}

// TestPullOfExactlyItsBytes: a server says that a request has ended for its bytes,
// except if what it brought comes to exactly these.
func TestPullOfExactlyItsBytes(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 8 {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), []byte("value"), 0))
	}
	run := func(bytes int) (l *listRun, got, asked int) {
		l = &listRun{b: s.data, pattern: pattern{wild: true}, batch: 20, timer: time.NewTimer(time.Hour)}
		l.epoch = s.data.currentEpoch()
		budget := newBudget(t.Context())
		var err error
		l.source, err = s.data.consume(budget, consumption{filter: "$KV.b.>", batch: 20, life: time.Minute})
		require.NoError(t, err)
		defer l.source.stop()
		if bytes > 0 {
			l.source.bytes = bytes
		}
		asked = l.source.bytes
		got, _, err = l.pull(budget)
		require.NoError(t, err)
		return l, got, asked
	}
	all, got, asked := run(0)
	require.Equal(t, 8, got)
	l, got, _ := run((asked - all.source.left) / 8 * 5)
	require.Equal(t, 5, got)
	require.Zero(t, l.source.left)
}

// TestWatchOfALargeValue: a value that takes a narrow link longer than the watch
// waits for a heartbeat is not asked for again.
func TestWatchOfALargeValue(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	near, far, p := openNearAndFar(t, srv, distance{rtt: 2 * time.Millisecond})
	require.NoError(t, near.Put("first", nil, 0))
	events := mustWatch(t, far, "*")
	listedFeed(t, far, pattern{wild: true})
	p.move(distance{rtt: 2 * time.Millisecond, bandwidth: 250 << 10})
	large := make([]byte, 1<<20-headerRoom)
	before := sentTo(t, srv, far.data.nc)
	for i := range 2 {
		require.NoError(t, near.Put(fmt.Sprint(i), large, 0))
	}
	for i := range 2 {
		ev := <-events
		require.Equal(t, fmt.Sprint(i), ev.Key)
		require.Len(t, ev.Value, len(large))
	}
	require.Less(t, sentTo(t, srv, far.data.nc)-before, int64(11*2*len(large)/10), "bytes")
	require.Zero(t, far.Stats().WatchCuts)
}

// TestListingOfARequestThatGoesOn: a server that begins to stop says that requests
// have ended, and goes on with them. The next one is refused beside it, which is not
// the end of the listing.
func TestListingOfARequestThatGoesOn(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	var first atomic.Pointer[nats.Msg] // of the requests for messages
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		held := first.Load()
		switch {
		case !strings.Contains(msg.Subject, "CONSUMER.MSG.NEXT"):
		case held == nil:
			first.Store(msg)
			assert.NoError(t, nc.PublishMsg(&nats.Msg{Subject: msg.Reply, Header: nats.Header{
				"Status": {"409"}, "Description": {"Server Shutdown"}, "Nats-Pending-Messages": {"10"},
			}}))
			return
		case held.Reply == msg.Reply: // the next request of the same consumer
			assert.NoError(t, nc.PublishMsg(held))
			assert.NoError(t, nc.Flush())
			time.Sleep(200 * time.Microsecond)
		}
		_ = nc.PublishMsg(msg)
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
	near := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	const keys = 2000
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			for i := w; i < keys; i += 8 {
				assert.NoError(t, near.Put(fmt.Sprintf("k.%d", i), nil, 0))
			}
		})
	}
	writers.Wait()
	for range 30 {
		got, err := s.Keys("*")
		require.NoError(t, err)
		require.Len(t, got, keys)
		first.Store(nil)
	}
}

// TestListingOfOneKeyIsNotStale: what Follow lists of a single key has everything
// that came before its watch, whichever leader answers.
func TestListingOfOneKeyIsNotStale(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	first, err := s.Update("k", nil, 0, 0)
	require.NoError(t, err)
	found := make(chan listing, 1)
	go func() {
		l, err := s.data.list(newBudget(t.Context()), pattern{prefix: "k"}, true, first+1)
		assert.NoError(t, err)
		found <- l
	}()
	time.Sleep(50 * time.Millisecond) // long enough for an answer without it
	second, err := s.Update("k", nil, 0, first)
	require.NoError(t, err)
	l := <-found
	require.Len(t, l.all, 1)
	require.Equal(t, second, l.all[0].revision)
}

// TestListingAvoidsALaggard: a listing that met a server which lags does not go there
// again.
func TestListingAvoidsALaggard(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	srv := startCluster(t).servers[0]
	var (
		lags    atomic.Bool
		laggard string          // the server
		there   map[string]bool // the consumers on it
		met     atomic.Int64    // how many of them were asked for messages
	)
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		subject := strings.Split(msg.Subject, ".")
		switch {
		case !lags.Load():
		case strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.CREATE."):
			var made consumerInfo
			answer := request(t, nc, msg)
			assert.NoError(t, json.Unmarshal(answer, &made))
			if laggard == "" {
				laggard, there = made.Cluster.Server, make(map[string]bool)
			}
			there[made.Name] = made.Cluster.Server == laggard
			_ = nc.Publish(msg.Reply, answer)
			return
		case strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.MSG.NEXT.") && there[subject[len(subject)-1]]:
			met.Add(1)
			for range 50 {
				_ = nc.PublishMsg(&nats.Msg{Subject: msg.Reply, Header: nats.Header{"Status": {"100"}}})
			}
			return
		case strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.MSG.NEXT."):
			// A relay does not hear that a new consumer cannot be reached yet. This
			// request is refused as soon as it can.
			for {
				if _, err := nc.Request(msg.Subject, []byte("{"), time.Second); err == nil {
					break
				}
			}
		}
		_ = nc.PublishMsg(msg)
	})
	s, _ := openThrough(t, srv)
	for i := range 300 {
		require.NoError(t, s.Put(fmt.Sprint("k.", i), nil, 0))
	}
	lags.Store(true)
	repeated := int64(0)
	for range 60 {
		before := met.Load()
		keys, err := s.Keys("k.*")
		require.NoError(t, err)
		require.Len(t, keys, 300)
		repeated += max(met.Load()-before-1, 0)
	}
	assert.LessOrEqual(t, repeated, int64(2), "by chance: five consumers in a row can be there")
}
