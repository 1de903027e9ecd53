package state

import (
	"context"
	"errors"
	"fmt"
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

// Writes and reads far from the server, over narrow links, and beside other
// clients that write the same keys.

// spent returns how many requests a store makes while f runs.
func spent(s *NATSStore, f func()) int {
	before := s.Stats().Requests
	f()
	return int(s.Stats().Requests - before)
}

// TestWritesBesideFastWriter: a key is written faster than a round trip takes.
// A Put or a Delete does not fail for losing a race, and is done in three
// requests.
func TestWritesBesideFastWriter(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	near := connect(t, srv.ClientURL())
	nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 10 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	opened, looks := time.Now(), 0
	for _, tr := range []traffic{
		{prefix: "durable", keys: 1, perSecond: 500},
		{prefix: "short", keys: 1, perSecond: 500, ttl: time.Minute},
	} {
		stop := tr.start(t, near, "b")
		key := tr.prefix + "0"
		eventually(t, func() bool { _, err := s.Get(key); return err == nil }, "traffic")
		for round := range 20 {
			for what, write := range map[string]func() error{
				"put":          func() error { return s.Put(key, []byte("ours"), 0) },
				"put with TTL": func() error { return s.Put(key, []byte("ours"), time.Minute) },
				"delete":       func() error { return s.Delete(key) },
			} {
				began := time.Now()
				requests := spent(s, func() { require.NoError(t, write(), "%s %s %d", what, key, round) })
				if requests == 4 {
					requests = 3
					looks++ // at the settings, by the way
				}
				require.LessOrEqual(t, requests, 3, "%s %s %d", what, key, round)
				require.Less(t, time.Since(began), 5*time.Second, "%s %s %d", what, key, round)
			}
		}
		stop()
		// When the others are silent, writes are what they are on a quiet key.
		require.NoError(t, s.Put(key, []byte("last"), 0))
		assert.Equal(t, "last", string(mustGet(t, s, key).Value))
		require.NoError(t, s.Delete(key))
		_, err := s.Get(key)
		refuses(t, ErrNotFound, err)
	}
	assert.LessOrEqual(t, looks, 1+int(time.Since(opened)/settingsLife))
}

// TestManyClientsPutOneKey: every Put succeeds and costs three requests at most.
func TestManyClientsPutOneKey(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	const clients, puts = 64, 20
	var stores []*NATSStore
	var before uint64
	opened := time.Now()
	for range clients {
		s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
		stores = append(stores, s)
		before += s.Stats().Requests
	}
	var wg sync.WaitGroup
	var looks atomic.Int64
	for i, s := range stores {
		wg.Go(func() {
			for n := range puts {
				began := time.Now()
				requests := spent(s, func() {
					assert.NoError(t, s.Put("k", fmt.Appendf(nil, "%d.%d", i, n), time.Duration(n%2)*time.Minute))
				})
				if requests == 4 {
					requests = 3
					looks.Add(1) // at the settings, by the way
				}
				if !assert.LessOrEqual(t, requests, 3) {
					return
				}
				assert.Less(t, time.Since(began), 4*time.Second)
			}
		})
	}
	wg.Wait()
	var after, retries uint64
	for _, s := range stores {
		after += s.Stats().Requests
		retries += s.Stats().Retries
	}
	assert.LessOrEqual(t, after-before, uint64(3*clients*puts))
	assert.LessOrEqual(t, int(looks.Load()), clients*int(time.Since(opened)/settingsLife))
	assert.Zero(t, retries)
	value := string(mustGet(t, stores[0], "k").Value)
	assert.True(t, strings.HasSuffix(value, fmt.Sprintf(".%d", puts-1)), "somebody's last value is the last one, not %s", value)
}

// TestPutsInTurn: a Put of a key that another client wrote last costs two
// requests, once the store knows that others write it, too.
func TestPutsInTurn(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	stores := [2]*NATSStore{}
	for i := range stores {
		stores[i] = openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	}
	for n := range 30 {
		for i, s := range stores {
			lookAtSettings(t, s)
			requests := spent(s, func() { require.NoError(t, s.Put("k", fmt.Appendf(nil, "%d.%d", i, n), 0)) })
			most := 2
			if n < 2 {
				most = 3 // it does not know yet
			}
			require.LessOrEqual(t, requests, most, "put %d of store %d", n, i)
		}
	}
	// One that is left alone with the key pays for one again.
	s := stores[0]
	for range 2 {
		require.NoError(t, s.Put("k", nil, 0))
	}
	lookAtSettings(t, s)
	assert.Equal(t, 1, spent(s, func() { require.NoError(t, s.Put("k", nil, 0)) }))
}

// serveWithoutSecrets runs a server on which the user "u" must not write keys
// that end with ".secret".
func serveWithoutSecrets(t *testing.T) (url string, admin, user nats.Option) {
	t.Helper()
	srv := startServer(t, func(o *server.Options) {
		o.Users = []*server.User{
			{Username: "admin", Password: "p"},
			{Username: "u", Password: "p", Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Allow: []string{">"}, Deny: []string{"$KV.*.*.secret"}},
			}},
		}
	})
	return srv.ClientURL(), nats.UserInfo("admin", "p"), nats.UserInfo("u", "p")
}

// TestPutWithoutPermissionEnds: the server refuses the message apart from the
// request, so the Put waits for an answer. It ends, and says why.
func TestPutWithoutPermissionEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("a write that waits for its answer in vain")
	}
	t.Parallel()
	url, admin, user := serveWithoutSecrets(t)
	openStore(t, NATSStoreConfig{Conn: connect(t, url, admin), Bucket: "b"})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, url, user), Bucket: "b"})
	for _, events := range []string{"none", "many"} {
		if events == "many" { // what else arrives does not mean that the answer will
			traffic{prefix: "busy.", keys: 1, perSecond: 100}.start(t, connect(t, url, admin), "b")
			observe(mustWatch(t, s, "busy.*"))
		}
		done := make(chan error, 1)
		go func() { done <- s.Put("config.secret", []byte("v"), 0) }()
		select {
		case err := <-done:
			require.ErrorIs(t, err, nats.ErrPermissionViolation, events)
		case <-time.After(opLimit + opTimeout):
			require.FailNow(t, "the Put does not end", events)
		}
		_, err := s.Get("config.secret")
		refuses(t, ErrNotFound, err)
	}
}

// TestLostAnswerAfterPermissionError: what the connection reported last is an
// earlier refusal whose text contains the subject. It does not make a write
// refused whose answer is lost.
func TestLostAnswerAfterPermissionError(t *testing.T) {
	if testing.Short() {
		t.Skip("writes that wait for their answers in vain")
	}
	t.Parallel()
	url, adminUser, user := serveWithoutSecrets(t)
	admin := openStore(t, NATSStoreConfig{Conn: connect(t, url, adminUser), Bucket: "b"})
	for _, c := range []struct {
		key      string
		existed  bool
		resolved bool // the answers arrive in time
	}{
		{"new", false, false},
		{"new-resolved", false, true},
		{"existing", true, false},
		{"existing-resolved", true, true},
	} {
		t.Run(c.key, func(t *testing.T) {
			t.Parallel()
			nc, p := connectAt(t, url, distance{}, user)
			s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
			if c.existed {
				require.NoError(t, s.Put(c.key, []byte("before"), 0))
			}
			require.NoError(t, nc.Publish("$KV.b."+c.key+".secret", nil))
			require.NoError(t, nc.Flush())
			require.ErrorIs(t, nc.LastError(), nats.ErrPermissionViolation)
			require.ErrorContains(t, nc.LastError(), "$KV.b."+c.key)

			p.holdAnswers(true)
			done := make(chan error, 1)
			go func() { done <- s.Put(c.key, []byte("ours"), 0) }()
			eventually(t, func() bool {
				value, err := admin.Get(c.key)
				return err == nil && string(value) == "ours"
			}, "the value is stored")
			if c.resolved {
				p.cut() // the answer is lost
				p.holdAnswers(false)
			}
			err := <-done
			if c.resolved {
				require.NoError(t, err)
			} else {
				require.ErrorIs(t, err, ErrOutcomeUnknown)
			}
			assert.Equal(t, "ours", string(mustGet(t, admin, c.key).Value))
		})
	}
}

// TestClaimWhileDisconnected: a claim that fails while the connection is down
// does not appear when it returns, not even after somebody else's has expired.
func TestClaimWhileDisconnected(t *testing.T) {
	if testing.Short() {
		t.Skip("a disconnection of seconds")
	}
	t.Parallel()
	srv := startServer(t, nil)
	nc, p := connectAt(t, srv.ClientURL(), distance{})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	require.NoError(t, s.Put("deleted", []byte("first"), 0))

	p.refuse(true)
	p.cut()
	eventually(t, func() bool { return !nc.IsConnected() }, "disconnect")
	var wg sync.WaitGroup
	for _, write := range []func() error{
		func() error { _, err := s.Update("claim", []byte("late"), 0, 0); return err },
		func() error { return s.Put("put", []byte("late"), 0) },
		func() error { return s.Put("put-ttl", []byte("late"), time.Hour) },
		func() error { return s.Delete("deleted") },
	} {
		wg.Go(func() {
			err := write()
			assert.ErrorIs(t, err, nats.ErrDisconnected)
			assert.NotErrorIs(t, err, ErrOutcomeUnknown)
		})
	}
	wg.Wait()
	keys := []string{"claim", "put", "put-ttl"}
	for _, key := range keys {
		_, err := other.Update(key, []byte("theirs"), time.Second, 0)
		require.NoError(t, err, key)
	}
	eventually(t, func() bool { // also from the server, where it would be in the way
		for _, key := range keys {
			r, err := other.data.leaderLast(newBudget(context.Background()), key)
			if err != nil || r.revision != 0 {
				return false
			}
		}
		return true
	}, "expiry")
	p.refuse(false)
	eventually(t, nc.IsConnected, "reconnect")
	require.NoError(t, s.Put("barrier", nil, 0)) // what was held back comes before
	require.NoError(t, nc.Flush())
	for _, key := range keys {
		_, err := other.Get(key)
		refuses(t, ErrNotFound, err, key)
	}
	assert.Equal(t, "first", string(mustGet(t, other, "deleted").Value))
}

// TestReadsBesideMirror: a mirror answers direct gets as well, and lags. No
// acknowledged Put is missed.
func TestReadsBesideMirror(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	js := newJetStream(t, nc)
	before := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, before.Put("k", nil, 0))
	_, err := js.CreateStream(context.Background(), jetstream.StreamConfig{
		Name: "KV_b-mirror", Mirror: &jetstream.StreamSource{Name: "KV_b"},
		MaxMsgsPerSubject: 1, AllowDirect: true, MirrorDirect: true,
	})
	require.NoError(t, err)
	after := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for n := range 1500 {
		writer, key := before, fmt.Sprintf("k%d", n%3)
		if n%2 == 1 {
			writer = after
		}
		value := fmt.Sprint(n)
		require.NoError(t, writer.Put(key, []byte(value), 0))
		for i, reader := range []*NATSStore{before, after} {
			got, err := reader.Get(key)
			require.NoError(t, err)
			require.Equal(t, value, string(got), "read %d of store %d", n, i)
		}
		if n%10 == 0 {
			require.NoError(t, writer.Delete(key))
			for _, reader := range []*NATSStore{before, after} {
				_, err := reader.Get(key)
				require.True(t, err == ErrNotFound, "after the deletion: %v", err) //nolint:errorlint // bare
			}
		}
	}
}

// TestReadsWhileReplicasAreAdded: a store misses none of its own Puts while its
// bucket grows to three replicas, and none of others' once it can have noticed.
func TestReadsWhileReplicasAreAdded(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	c := startCluster(t)
	admin := connect(t, c.servers[0].ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[1].ClientURL()), Bucket: "b", Replicas: 1})
	other := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[2].ClientURL()), Bucket: "b"})
	js := newJetStream(t, admin)
	stream, err := js.Stream(context.Background(), "KV_b")
	require.NoError(t, err)

	var grown time.Time // when all replicas were up to date
	check := func(n int) {
		key, value := fmt.Sprintf("k%d", n%10), fmt.Sprint(n)
		require.NoError(t, s.Put(key, []byte(value), 0))
		require.Equal(t, value, string(mustGet(t, s, key).Value), "own Put %d", n)
		if !grown.IsZero() && time.Since(grown) > settingsLife+time.Second {
			require.NoError(t, other.Put(key, []byte("theirs"), 0))
			require.Equal(t, "theirs", string(mustGet(t, s, key).Value), "other's Put %d", n)
		}
	}
	n := 0
	for ; n < 200; n++ {
		check(n)
	}
	config := stream.CachedInfo().Config
	config.Replicas = 3
	placed(t, func() error { _, err := js.UpdateStream(context.Background(), config); return err })
	for end := time.Now().Add(30 * time.Second); grown.IsZero() || time.Since(grown) < settingsLife+4*time.Second; n++ {
		require.True(t, time.Now().Before(end), "the bucket does not grow")
		check(n)
		if n%50 == 0 && grown.IsZero() {
			info, err := stream.Info(context.Background())
			require.NoError(t, err)
			if info.Cluster != nil && len(info.Cluster.Replicas) == 2 && info.Cluster.Replicas[0].Current && info.Cluster.Replicas[1].Current {
				grown = time.Now()
			}
		}
	}
}

// TestUpdateOfExpired: a revision whose value has expired is not replaced, even
// while the server still has it.
func TestUpdateOfExpired(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 20 * time.Millisecond})
	writer := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	reader := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	stranger := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for n, s := range []*NATSStore{writer, reader, stranger} {
		var key string
		var revision uint64
		withLongerTTL(t, 300*time.Millisecond, func(ttl time.Duration) (seen bool) {
			key = fmt.Sprintf("k%d.%v", n, ttl)
			var err error
			revision, err = writer.Update(key, []byte("v"), ttl, 0)
			require.NoError(t, err)
			if s == stranger {
				return true
			}
			kv, err := s.GetKeyValue(key)
			if err != nil {
				refuses(t, ErrNotFound, err)
				return false
			}
			return assert.Equal(t, revision, kv.Revision)
		})
		eventually(t, func() bool { _, err := writer.Get(key); return err == ErrNotFound }, "expiry") //nolint:errorlint // bare
		r, err := writer.data.leaderLast(newBudget(context.Background()), key)
		require.NoError(t, err)
		require.Equal(t, revision, r.revision, "the server still has it")
		_, err = s.Update(key, []byte("late"), 0, revision)
		refuses(t, ErrConflict, err)
		refuses(t, ErrConflict, s.DeleteRevision(key, revision))
		_, err = s.Get(key)
		refuses(t, ErrNotFound, err)
		created, err := s.Update(key, []byte("new"), 0, 0)
		require.NoError(t, err)
		kv := mustGet(t, s, key)
		assert.Equal(t, created, kv.Revision)
		assert.False(t, kv.Created.Before(r.deadline.time()), "it came into being anew")
	}
}

// sentTo returns how many bytes a server has sent to a client.
func sentTo(t *testing.T, srv *server.Server, nc *nats.Conn) int64 {
	t.Helper()
	id, err := nc.GetClientID()
	require.NoError(t, err)
	conns, err := srv.Connz(&server.ConnzOptions{CID: id})
	require.NoError(t, err)
	require.Len(t, conns.Conns, 1)
	return conns.Conns[0].OutBytes
}

// TestNarrowLink: an answer that takes longer to arrive than a request usually
// waits is waited for, and not asked for again.
func TestNarrowLink(t *testing.T) {
	if testing.Short() {
		t.Skip("megabytes over a narrow link")
	}
	t.Parallel()
	srv := startServer(t, nil)
	near := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	large := make([]byte, 1<<20-headerRoom)
	require.NoError(t, near.Put("large", large, 0))
	nc, p := connectAt(t, srv.ClientURL(), distance{rtt: 2 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	p.move(distance{rtt: 2 * time.Millisecond, bandwidth: 375 << 10})

	before := sentTo(t, srv, nc)
	assert.Len(t, mustGet(t, s, "large").Value, len(large))
	assert.Less(t, sentTo(t, srv, nc)-before, int64(11*len(large)/10), "bytes for a Get")
	for _, key := range []string{"large", "new"} { // one that another client wrote
		require.NoError(t, s.Put(key, large, time.Hour))
		assert.Len(t, mustGet(t, near, key).Value, len(large))
	}
	assert.Zero(t, s.Stats().Retries)

	const gets, size = 30, 80 << 10
	require.NoError(t, near.Put("shared", large[:size], 0))
	// A store that has been idle, or only written, reads from the leader until it
	// has looked at the settings; that answers with a third more bytes.
	mustGet(t, s, "shared")
	eventually(t, func() bool { return time.Since(s.data.settings.Load().checked) < settingsLife/2 }, "a look at the settings")
	before = sentTo(t, srv, nc)
	getAtOnce(t, s, "shared", gets, size)
	assert.Less(t, sentTo(t, srv, nc)-before, int64(11*gets*size/10), "bytes for %d Gets", gets)
}

// getAtOnce has n goroutines read a key, whose value has a size.
func getAtOnce(t *testing.T, s Store, key string, n, size int) {
	t.Helper()
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			value, err := s.Get(key)
			assert.NoError(t, err)
			assert.Len(t, value, size)
		})
	}
	wg.Wait()
}

// TestNarrowLinkToReplicas: the same where requests are made again because a
// leader may be being elected, and a stored message comes as JSON.
func TestNarrowLinkToReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster, and megabytes over a narrow link")
	}
	t.Parallel()
	c := startCluster(t)
	near := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	const gets, size = 30, 80 << 10
	require.NoError(t, near.Put("shared", make([]byte, size), 0))
	nc, p := connectAt(t, c.servers[1].ClientURL(), distance{rtt: 2 * time.Millisecond})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.Len(t, mustGet(t, s, "shared").Value, size)
	one := sentTo(t, c.servers[1], nc)
	require.Len(t, mustGet(t, s, "shared").Value, size)
	one = sentTo(t, c.servers[1], nc) - one
	p.move(distance{rtt: 2 * time.Millisecond, bandwidth: 375 << 10})
	// A server that is busy can be slower to answer than to pass on a ping. That does
	// not happen each time.
	require.True(t, within(time.Minute, func() bool {
		before := sentTo(t, c.servers[1], nc)
		requests := spent(s, func() { getAtOnce(t, s, "shared", gets, size) })
		sent := sentTo(t, c.servers[1], nc) - before
		t.Logf("%d requests and %d bytes for %d Gets", requests, sent, gets)
		return requests == gets && sent < 11*gets*one/10
	}), "a round of Gets in which nothing was asked for again")

	// Far away, answers are late, and no reason to ask again, except once: see above.
	p.move(distance{rtt: 700 * time.Millisecond})
	retries := s.Stats().Retries
	for range 5 {
		mustGet(t, s, "shared")
	}
	require.NoError(t, s.Put("new", nil, 0))
	assert.LessOrEqual(t, s.Stats().Retries-retries, uint64(1), "of 6 requests")
}

// TestRefusedByALeaderThatWasCutOff: when a partition ends, a write gets to the
// leader that was elected meanwhile, and to the one that was cut off. That refuses
// it first, since it does not know the revision, although the other stores it.
func TestRefusedByALeaderThatWasCutOff(t *testing.T) {
	t.Parallel()
	for name, stores := range map[string]bool{"and stored": true, "and not stored": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startCluster(t).servers[0]
			var old atomic.Uint64 // the last revision that the leader that was cut off knows
			relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
				if known := old.Load(); known != 0 && strings.HasPrefix(msg.Subject, "$KV.b.k") {
					old.Store(0)
					refusal := fmt.Sprintf(`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: %d"},"stream":"KV_b","seq":0}`, known)
					_ = nc.Publish(msg.Reply, []byte(refusal))
					if !stores {
						return
					}
				}
				_ = nc.PublishMsg(msg)
			})
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3, APIPrefix: "through"})
			require.NoError(t, s.Put("k", []byte("1"), 0))
			before := mustGet(t, s, "k").Revision
			require.NoError(t, s.Put("k", []byte("2"), 0))
			old.Store(before)
			revision, err := s.Update("k", []byte("3"), 0, mustGet(t, s, "k").Revision)
			require.NoError(t, err)
			require.Zero(t, old.Load(), "it was refused")
			is := mustGet(t, s, "k")
			assert.Equal(t, "3", string(is.Value))
			assert.Equal(t, is.Revision, revision)
			old.Store(before)
			require.NoError(t, s.Put("k", []byte("4"), 0))
			assert.Equal(t, revision+1, mustGet(t, s, "k").Revision, "it was written once")
			old.Store(before)
			require.NoError(t, s.DeleteRevision("k", revision+1))
			// What has really gone is a conflict.
			_, err = s.Update("k", nil, 0, revision+1)
			refuses(t, ErrConflict, err)
		})
	}
}

// TestRefreshedWhileReading: a value or a lease is read just before its deadline,
// and replaced in time while the answer is on its way, which arrives after the
// deadline. The key never stopped existing, so no read misses it.
func TestRefreshedWhileReading(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ttl time.Duration // ends while the answer is on its way
		f   func(far *NATSStore) error
	}{
		"get": {300 * time.Millisecond, func(far *NATSStore) error { _, err := far.Get("k"); return err }},
		"keys of one": {300 * time.Millisecond, func(far *NATSStore) error {
			keys, err := far.Keys("k")
			return errors.Join(err, foundIf(len(keys) == 1))
		}},
		"keys": {700 * time.Millisecond, func(far *NATSStore) error {
			keys, err := far.Keys("k*")
			return errors.Join(err, foundIf(len(keys) == 1))
		}},
		"entries": {700 * time.Millisecond, func(far *NATSStore) error {
			entries, err := far.Entries("k*")
			return errors.Join(err, foundIf(len(entries) == 1))
		}},
		"lock holder": {300 * time.Millisecond, func(far *NATSStore) error { _, err := far.LockHolder("k"); return err }},
		"delete": {300 * time.Millisecond, func(far *NATSStore) error {
			err := far.Delete("k")
			_, left := far.Get("k")
			return errors.Join(err, foundIf(left == ErrNotFound))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			near, far, _ := openNearAndFar(t, srv, distance{rtt: 400 * time.Millisecond})
			watching := connect(t, srv.ClientURL())
			asked := make(chan struct{}, 100)
			for _, subject := range []string{"$JS.API.STREAM.MSG.GET.>", "$JS.API.DIRECT.GET.>", "$JS.API.CONSUMER.MSG.NEXT.>"} {
				_, err := watching.Subscribe(subject, func(*nats.Msg) { asked <- struct{}{} })
				require.NoError(t, err)
			}
			require.NoError(t, watching.Flush())
			_, err := near.Lock("opens-the-bucket", time.Hour)
			require.NoError(t, err)
			_, err = far.LockHolder("opens-the-bucket")
			require.NoError(t, err)
			for inTime := 0; inTime < 3; {
				require.NoError(t, near.Delete("k"))
				_, err := near.Update("k", nil, c.ttl, 0)
				require.NoError(t, err)
				lock, err := near.Lock("k", c.ttl)
				if err != nil {
					continue // a lease of the last round, or this one, has just lapsed
				}
				first, err := near.GetKeyValue("k")
				if err != nil {
					_ = lock.Unlock()
					continue
				}
				for len(asked) > 0 {
					<-asked
				}
				result := make(chan error, 1)
				go func() { result <- c.f(far) }()
				<-asked
				time.Sleep(20 * time.Millisecond) // it has been answered, or need not have been
				err = near.Put("k", nil, time.Hour)
				refreshed := lock.Refresh()
				kv, getErr := near.GetKeyValue("k")
				for refreshed == nil && len(result) == 0 {
					time.Sleep(c.ttl / 10)
					refreshed = lock.Refresh()
				}
				got := <-result
				if err == nil && refreshed == nil && getErr == nil && kv.Created.Equal(first.Created) {
					inTime++
					require.NoError(t, got)
				}
				_ = lock.Unlock()
			}
		})
	}
}

func foundIf(ok bool) error {
	if !ok {
		return ErrNotFound
	}
	return nil
}

// TestKeepAliveThatEndsAtOnce: the context of a KeepAlive ends while its first write
// is under way, on several servers. When it has returned nil, the key is not there,
// and does not appear later.
func TestKeepAliveThatEndsAtOnce(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[0].ClientURL()), Bucket: "b", Replicas: 3})
	var keys []string
	for i := range 400 {
		key := fmt.Sprintf("k.%d", i)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Duration(i%80)*10*time.Microsecond, cancel)
		if KeepAlive(ctx, s, key, time.Hour, func() []byte { return []byte("alive") }) == nil {
			keys = append(keys, key)
		}
	}
	require.Greater(t, len(keys), 300)
	require.NoError(t, s.Put("barrier", nil, 0)) // what was written has been stored before
	left, err := s.Keys("k.*")
	require.NoError(t, err)
	for _, key := range keys {
		require.NotContains(t, left, key)
	}
}
