package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func newJetStream(t testing.TB, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	return js
}

// alterStream changes settings of a stream, as its operator would.
func alterStream(t testing.TB, js jetstream.JetStream, name string, change func(cfg *jetstream.StreamConfig)) {
	t.Helper()
	ctx := context.Background()
	stream, err := js.Stream(ctx, name)
	require.NoError(t, err)
	cfg := stream.CachedInfo().Config
	change(&cfg)
	_, err = js.UpdateStream(ctx, cfg)
	require.NoError(t, err)
}

func TestNewNATSStoreRefusesConfigs(t *testing.T) {
	srv := startServer(t, nil)
	nc, closed := connect(t, srv.ClientURL()), connect(t, srv.ClientURL())
	closed.Close()
	for says, cfg := range map[string]NATSStoreConfig{
		"Conn is nil":         {Bucket: "b"},
		"connection closed":   {Bucket: "b", Conn: closed},
		`bucket name ""`:      {Conn: nc},
		`bucket name "a b"`:   {Conn: nc, Bucket: "a b"},
		`bucket name "a.b"`:   {Conn: nc, Bucket: "a.b"},
		`bucket name "a/b"`:   {Conn: nc, Bucket: "a/b"},
		`bucket name "ä"`:     {Conn: nc, Bucket: "ä"},
		`bucket name "*"`:     {Conn: nc, Bucket: "*"},
		"TTL is -1s":          {Conn: nc, Bucket: "b", TTL: -time.Second},
		"History is -1":       {Conn: nc, Bucket: "b", History: -1},
		"History is 65":       {Conn: nc, Bucket: "b", History: 65},
		"MaxValueSize is -1":  {Conn: nc, Bucket: "b", MaxValueSize: -1},
		"Replicas is -1":      {Conn: nc, Bucket: "b", Replicas: -1},
		"Replicas is 6":       {Conn: nc, Bucket: "b", Replicas: 6},
		"replicas > 1 not su": {Conn: nc, Bucket: "b", Replicas: 3}, // the server's own words
	} {
		s, err := NewNATSStore(cfg)
		assert.ErrorContains(t, err, says)
		assert.Nil(t, s)
	}
	for name := range newJetStream(t, nc).StreamNames(context.Background()).Name() {
		assert.Fail(t, "something was made", name)
	}
}

func TestNewNATSStoreSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	quickly := func(t *testing.T, nc *nats.Conn, says string) {
		t.Helper()
		began := time.Now()
		_, err := NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "b"})
		assert.ErrorContains(t, err, says)
		assert.Less(t, time.Since(began), 8*time.Second)
	}
	t.Run("no JetStream", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, func(o *server.Options) { o.JetStream = false })
		quickly(t, connect(t, srv.ClientURL()), "JetStream is not enabled")
	})
	t.Run("no JetStream for the account", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, func(o *server.Options) {
			o.Accounts = []*server.Account{server.NewAccount("poor")}
			o.Users = []*server.User{{Username: "u", Password: "p", Account: o.Accounts[0]}}
		})
		quickly(t, connect(t, srv.ClientURL(), nats.UserInfo("u", "p")), "JetStream is not enabled for this account")
	})
	for name, permissions := range map[string]*server.Permissions{
		"may not publish":   {Publish: &server.SubjectPermission{Deny: []string{"$JS.API.>"}}},
		"may not create":    {Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.CREATE.>"}}},
		"may not subscribe": {Subscribe: &server.SubjectPermission{Deny: []string{"_INBOX.>"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, func(o *server.Options) {
				o.Users = []*server.User{{Username: "u", Password: "p", Permissions: permissions}}
			})
			quickly(t, connect(t, srv.ClientURL(), nats.UserInfo("u", "p")), "ermissions violation")
		})
	}
	t.Run("not a bucket", func(t *testing.T) {
		t.Parallel()
		nc := connect(t, startServer(t, nil).ClientURL())
		_, err := newJetStream(t, nc).CreateStream(context.Background(), jetstream.StreamConfig{Name: "KV_b", Subjects: []string{"other.>"}})
		require.NoError(t, err)
		quickly(t, nc, "not a bucket")
	})
	t.Run("server gone", func(t *testing.T) {
		t.Parallel()
		srv := startServer(t, nil)
		nc := connect(t, srv.ClientURL())
		stopServer(srv)
		quickly(t, nc, "disconnected")
	})
}

func TestOldServers(t *testing.T) {
	for version, want := range map[string]bool{
		"2.10.29": true, "2.9.0": true, "1.4.1": true, "2.11.0": false, "2.11.0-RC.1": false, "2.15.2": false, "3.0.0": false, "": false, "dev": false,
	} {
		assert.Equal(t, want, lacksMessageTTL(version), version)
	}
}

// streamConfig returns a stream's configuration as the server has it, but for
// what it keeps about itself.
func configOf(t *testing.T, nc *nats.Conn, stream string) map[string]any {
	t.Helper()
	answer, err := nc.Request("$JS.API.STREAM.INFO."+stream, nil, 5*time.Second)
	require.NoError(t, err)
	var info struct {
		Config map[string]any `json:"config"`
	}
	require.NoError(t, json.Unmarshal(answer.Data, &info))
	delete(info.Config, "metadata")
	return info.Config
}

func TestBindLeavesWhatTheOperatorSet(t *testing.T) {
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	_, err := js.CreateKeyValue(context.Background(), jetstream.KeyValueConfig{
		Bucket: "b", Description: "the operator's", History: 7, TTL: 40 * time.Minute, MaxValueSize: 5000, MaxBytes: 1 << 20,
		Storage: jetstream.MemoryStorage, Compression: true, RePublish: &jetstream.RePublish{Source: ">", Destination: "copy.>"},
		Metadata: map[string]string{"team": "blue"},
	})
	require.NoError(t, err)
	before := configOf(t, nc, "KV_b")
	before["allow_msg_ttl"] = true

	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	assert.Equal(t, before, configOf(t, nc, "KV_b"))
	require.NoError(t, s.Put("k", []byte("v"), time.Minute))
	refuses(t, ErrValueTooLarge, s.Put("k", make([]byte, 5000), 0))

	// What the caller sets lower is left as it is, also by the defaults.
	lower := DefaultNATSStoreConfig()
	lower.Conn, lower.Bucket, lower.MaxValueSize = nc, "b", 4000
	openStore(t, lower)
	assert.Equal(t, before, configOf(t, nc, "KV_b"))

	// What the caller sets higher is raised, and nothing else.
	openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", History: 9, MaxValueSize: 8000, Replicas: 1})
	before["max_msgs_per_subject"], before["max_msg_size"] = 9.0, 8000.0+1024
	assert.Equal(t, before, configOf(t, nc, "KV_b"))
}

// TestOpenWhilePeersSeemOffline: a bucket is made once the servers for it are there.
// What else is in the way of it is said at once.
func TestOpenWhilePeersSeemOffline(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	var offline, asked atomic.Int64
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$JS.API.STREAM.CREATE.") {
			asked.Add(1)
			if offline.Add(-1) >= 0 {
				reason := "peer offline"
				if strings.HasSuffix(msg.Subject, ".KV_another") {
					reason = "insufficient storage"
				}
				refusal := `{"error":{"code":400,"err_code":10005,"description":"no suitable peers for placement, ` + reason + `"}}`
				_ = nc.Publish(msg.Reply, []byte(refusal))
				return
			}
		}
		_ = nc.PublishMsg(msg)
	})
	nc := connect(t, srv.ClientURL())
	offline.Store(3)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", APIPrefix: "through"})
	offline.Store(3)
	lockOf(t, s, "l")
	assert.EqualValues(t, 8, asked.Load())

	offline.Store(3)
	_, err := NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "another", APIPrefix: "through"})
	require.ErrorContains(t, err, "insufficient storage")
	assert.EqualValues(t, 9, asked.Load())
}

func TestBindLeavesReplicas(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.servers[0].ClientURL())
	placed(t, func() error {
		_, err := newJetStream(t, nc).CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "b", Replicas: 3, Storage: jetstream.MemoryStorage})
		return err
	})
	for _, replicas := range []int{0, 1} {
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", Replicas: replicas})
		require.NoError(t, s.Put("k", nil, time.Minute))
		assert.EqualValues(t, 3, configOf(t, nc, "KV_b")["num_replicas"])
		// The bucket of locks follows.
		require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
		locks := configOf(t, nc, "KV_b-locks")
		assert.EqualValues(t, 3, locks["num_replicas"])
		assert.Equal(t, "file", locks["storage"], "locks survive a restart")
	}
}

func TestNewBucket(t *testing.T) {
	nc := connect(t, startServer(t, nil).ClientURL())
	cfg := DefaultNATSStoreConfig()
	assert.Equal(t, "agent-state", cfg.Bucket)
	cfg.Conn = nc
	s := openStore(t, cfg)
	require.NoError(t, s.Put("k", make([]byte, 1<<20-headerRoom), time.Hour+1))

	// It is what any KV client would have made, with message TTLs and nothing
	// that removes more than it should.
	status, err := mustKV(t, nc, "agent-state").Status(context.Background())
	require.NoError(t, err)
	assert.EqualValues(t, 1, status.History())
	assert.Zero(t, status.LimitMarkerTTL())
	assert.Zero(t, status.TTL())
	config := configOf(t, nc, "KV_agent-state")
	assert.Equal(t, true, config["allow_msg_ttl"])
	assert.Equal(t, "file", config["storage"])
	assert.EqualValues(t, 1, config["num_replicas"])
}

func TestDefaultTTL(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", TTL: 200 * time.Millisecond})
	events := mustWatch(t, s, "*")
	require.NoError(t, s.Put("own", nil, time.Hour))
	require.NoError(t, s.Put("default", nil, 0))
	for _, want := range []string{"put own", "put default", "delete default"} {
		assert.Equal(t, want, brief(receive(t, events)))
	}

}

func TestMaxPayload(t *testing.T) {
	srv := startServer(t, func(o *server.Options) { o.MaxPayload = 64 << 10 })
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	require.NoError(t, s.Put("k", make([]byte, 63<<10), time.Hour+1))
	refuses(t, ErrValueTooLarge, s.Put("k", make([]byte, 63<<10+1), 0))
	refuses(t, ErrValueTooLarge, s.Put("k", make([]byte, 65<<10), 0))
	assert.Len(t, mustGet(t, s, "k").Value, 63<<10)
	require.NoError(t, s.Put("k", nil, 0), "the connection is alive")
}

func TestMaxBytes(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	_, err := newJetStream(t, nc).CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "b", MaxBytes: 8 << 10})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	for i := 0; err == nil; i++ {
		require.Less(t, i, 100, "the bucket is never full")
		err = s.Put(fmt.Sprint(i), make([]byte, 1000), 0)
	}
	refuses(t, ErrStoreFull, err)
	require.NoError(t, s.Delete("0"), "room can be made")
}

// TestMaxAgeBucket: a bucket's own TTL is the longest life of an entry, and
// ends it as its own TTL would.
func TestMaxAgeBucket(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	_, err := newJetStream(t, nc).CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "b", TTL: 4 * time.Second})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	events := mustWatch(t, s, "*")
	for _, ttl := range []time.Duration{0, time.Hour, 2 * time.Second} {
		require.NoError(t, s.Put(fmt.Sprintf("k.%v", ttl), nil, ttl))
	}
	var deadlines []time.Time
	for range 3 {
		deadlines = append(deadlines, receive(t, events).Modified.Add(4*time.Second))
	}
	assert.Equal(t, "delete k.2s", brief(receive(t, events)))
	for i, key := range []string{"k.0s", "k.1h0m0s"} {
		kv := receive(t, events)
		assert.Equal(t, "delete "+key, brief(kv))
		assert.True(t, kv.Modified.Equal(deadlines[i]))
		_, err := s.Get(key)
		refuses(t, ErrNotFound, err)
	}
}

// TestMaxAgeRaised: when a bucket's MaxAge is raised, what was to end by the old one
// lives on, for watches and for writes.
func TestMaxAgeRaised(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx, js := t.Context(), newJetStream(t, nc)
	const age = 3 * time.Second
	_, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b", TTL: age})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	events := mustWatch(t, s, "*")
	c, err := NewCache(ctx, s, "*")
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, s.Put("k", nil, 0))
	require.NoError(t, s.Put("written", nil, 0))
	put, written := receive(t, events), receive(t, events)
	mustGet(t, s, "written") // the store remembers when it was to end
	require.Equal(t, put.Modified.Add(age), put.Expires)
	alterStream(t, js, "KV_b", func(cfg *jetstream.StreamConfig) { cfg.MaxAge = time.Hour })
	if time.Since(put.Modified) > age-500*time.Millisecond {
		t.Skip("the machine was busy: the server may have removed them")
	}
	require.NoError(t, s.Put("short", nil, age+500*time.Millisecond)) // ends after them
	assert.Equal(t, "put short", brief(receive(t, events)))
	assert.Equal(t, "delete short", brief(receive(t, events)))
	_, err = c.Get("k")
	require.NoError(t, err)
	_, err = s.Update("written", nil, 0, written.Revision)
	require.NoError(t, err)
	assert.Equal(t, "put written", brief(receive(t, events)))
	kv := mustGet(t, s, "k")
	assert.Equal(t, put.Revision, kv.Revision)
	assert.Equal(t, put.Modified.Add(time.Hour), kv.Expires)
	assert.Equal(t, written.Created, mustGet(t, s, "written").Created)
}

// TestMarkerBucket: a bucket with delete markers keeps them, and the store
// takes the server's markers for the expiries that they are.
func TestMarkerBucket(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	kv, err := newJetStream(t, nc).CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b", LimitMarkerTTL: time.Minute})
	require.NoError(t, err)
	before := configOf(t, nc, "KV_b")
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	assert.Equal(t, before, configOf(t, nc, "KV_b"))
	events := mustWatch(t, s, "*")
	_, err = kv.Create(ctx, "theirs", []byte("v"), jetstream.KeyTTL(2*time.Second))
	require.NoError(t, err)
	require.NoError(t, s.Put("ours", nil, 4*time.Second))
	first, second := receive(t, events), receive(t, events)
	expiry := receive(t, events)
	assert.Equal(t, "delete theirs", brief(expiry))
	assert.Equal(t, first.Revision, expiry.Revision)
	expiry = receive(t, events)
	assert.Equal(t, "delete ours", brief(expiry))
	assert.Equal(t, second.Revision, expiry.Revision)
	eventually(t, func() bool { // the server has put its marker
		r, err := s.data.leaderLast(newBudget(ctx), "theirs")
		return err == nil && r.deleted
	}, "marker")
	_, err = s.Get("theirs")
	refuses(t, ErrNotFound, err)
	deliversNext(t, s, events, "theirs")
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"theirs"}, keys)
}

// TestOpenBeforeTheServer: with RetryOnFailedConnect a connection may be there
// before its server is. Opening a store then says so in time, and succeeds if the
// server comes up meanwhile.
func TestOpenBeforeTheServer(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	nc, err := nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", port), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	require.NoError(t, err)
	defer nc.Close()
	began := time.Now()
	_, err = NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.ErrorIs(t, err, nats.ErrDisconnected)
	require.Less(t, time.Since(began), opTimeout+opTimeout/2)

	opened := make(chan error, 1)
	go func() {
		s, err := NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "b"})
		if err == nil {
			err = errors.Join(s.Put("k", []byte("v"), 0), s.Close())
		}
		opened <- err
	}()
	runServer(t, &server.Options{Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true})
	require.NoError(t, <-opened)
}

// TestCreatingFailsForAWhile: a server that has deleted an account's last stream
// removes the directory too in which it makes the next one.
func TestCreatingFailsForAWhile(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	streams := filepath.Join(srv.JetStreamConfig().StoreDir, "$G", "streams")
	require.NoError(t, os.MkdirAll(filepath.Dir(streams), 0o700))
	require.NoError(t, os.WriteFile(streams, nil, 0o600), "something is in the way")

	asked := make(chan *nats.Msg, 100)
	_, err := connect(t, srv.ClientURL()).ChanSubscribe("$JS.API.STREAM.CREATE.KV_b", asked)
	require.NoError(t, err)
	go func() {
		<-asked
		<-asked
		_ = os.Remove(streams)
	}()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, s.Put("k", nil, 0))
}
