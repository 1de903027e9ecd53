package state

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What happens at the limits of a bucket, of an account and of a server: it is
// said in words, room can be made, and nothing has to be opened again.

// fillUp puts small entries until the bucket is full, and returns their keys.
func fillUp(t *testing.T, s *NATSStore, value []byte) (keys []string) {
	t.Helper()
	for i := range 5000 {
		key := fmt.Sprintf("k.%d", i)
		err := s.Put(key, value, 0)
		if err != nil {
			refuses(t, ErrStoreFull, err)
			return keys
		}
		keys = append(keys, key)
	}
	require.FailNow(t, "the bucket is never full")
	return nil
}

// onReplicasOf runs a test on one replica and on three.
func onReplicasOf(t *testing.T, test func(t *testing.T, nc *nats.Conn, replicas int)) {
	t.Helper()
	t.Run("one", func(t *testing.T) {
		t.Parallel()
		test(t, connect(t, startServer(t, nil).ClientURL()), 1)
	})
	t.Run("three", func(t *testing.T) {
		t.Parallel()
		test(t, connect(t, startCluster(t).servers[0].ClientURL()), 3)
	})
}

// TestFullBucket: a bucket of small entries, full to the last byte, refuses to
// grow, and can be emptied key by key.
func TestFullBucket(t *testing.T) {
	t.Parallel()
	onReplicasOf(t, func(t *testing.T, nc *nats.Conn, replicas int) {
		placed(t, func() error {
			_, err := newJetStream(t, nc).CreateKeyValue(context.Background(), jetstream.KeyValueConfig{
				Bucket: "b", MaxBytes: 16 << 10, Replicas: replicas,
			})
			return err
		})
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
		other := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"}) // knows nothing of the keys
		keys := fillUp(t, s, []byte(strings.Repeat("v", 60)))
		_, err := s.Update("new", []byte(strings.Repeat("v", 60)), 0, 0)
		refuses(t, ErrStoreFull, err)
		refuses(t, ErrStoreFull, s.Put("new", []byte(strings.Repeat("v", 60)), time.Hour))
		if replicas == 1 {
			require.NoError(t, s.Put(keys[0], []byte("v"), 0), "a shorter value fits")
		}
		for i, key := range keys {
			by := s
			if i%2 == 1 {
				by = other
			}
			require.NoError(t, by.Delete(key), "deletion %d of %d", i, len(keys))
			_, err := s.Get(key)
			refuses(t, ErrNotFound, err)
		}
		left, err := s.Keys("*")
		require.NoError(t, err)
		assert.Empty(t, left)
		for range 3 {
			require.NoError(t, s.Put(keys[0], []byte("again"), 0), "there is room again")
			require.NoError(t, other.Delete(keys[0]))
		}
	})
}

// TestFullLockBucket: who got a lock while there was room can keep it and give
// it back.
func TestFullLockBucket(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	_, err := newJetStream(t, nc).CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "b-locks", MaxBytes: 16 << 10})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	var locks []Lock
	for i := 0; err == nil; i++ {
		require.Less(t, i, 1000, "the bucket is never full")
		var l Lock
		if l, err = s.Lock(fmt.Sprintf("l.%03d", i), time.Minute); err == nil {
			locks = append(locks, l)
		}
	}
	refuses(t, ErrStoreFull, err)
	for range 2 {
		for _, l := range locks {
			require.NoError(t, l.Refresh(), l.Key())
		}
	}
	for _, l := range locks {
		require.NoError(t, l.Unlock(), l.Key())
	}
	mustLock(t, s, locks[0].Key(), time.Minute)
}

// TestFullOfMessages: the same for the number of messages.
func TestFullOfMessages(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	alterStream(t, js, "KV_b", func(cfg *jetstream.StreamConfig) { cfg.MaxMsgs = 20 })
	keys := fillUp(t, s, nil)
	require.Len(t, keys, 20)
	require.NoError(t, s.Put(keys[3], []byte("replaced"), 0))
	for _, key := range keys {
		require.NoError(t, s.Delete(key))
	}
	left, err := s.Keys("*")
	require.NoError(t, err)
	assert.Empty(t, left)
	alterStream(t, js, "KV_b", func(cfg *jetstream.StreamConfig) { cfg.MaxMsgs = -1 })
	require.NoError(t, s.Put("new", nil, 0))
}

// startSmallAccount runs a server whose account has storage for 64 KiB.
func startSmallAccount(t *testing.T) *server.Server {
	t.Helper()
	srv := startServer(t, nil)
	require.NoError(t, srv.GlobalAccount().UpdateJetStreamLimits(map[string]server.JetStreamAccountLimits{
		"": {MaxMemory: -1, MaxStore: 64 << 10, MaxStreams: -1, MaxConsumers: -1},
	}))
	return srv
}

// leaveNoRoom fills an account until not even a deletion fits.
func leaveNoRoom(t *testing.T, nc *nats.Conn) {
	t.Helper()
	js := newJetStream(t, nc)
	var err error
	for i := 0; err == nil; i++ {
		_, err = js.Publish(context.Background(), fmt.Sprintf("$KV.b.other.%d", i), nil)
	}
}

// TestFullAccount: an account's storage that is used up is ErrStoreFull too,
// and a deletion makes room.
func TestFullAccount(t *testing.T) {
	t.Parallel()
	srv := startSmallAccount(t)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	watch := mustWatch(t, openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"}), "k.*")
	keys := fillUp(t, s, make([]byte, 1000))
	require.NotEmpty(t, keys)
	for range keys {
		receive(t, watch)
	}
	leaveNoRoom(t, nc)
	for _, key := range keys {
		is := mustGet(t, s, key)
		require.NoError(t, s.Delete(key))
		told := receive(t, watch)
		assert.Equal(t, "delete "+key, brief(told))
		assert.Greater(t, told.Revision, is.Revision, "it was written, and not found out")
	}
	left, err := s.Keys("k.*")
	require.NoError(t, err)
	assert.Empty(t, left)
	require.NoError(t, s.Put("new", make([]byte, 1000), 0))
}

// TestPurgeInDoubt: a deletion from a full account that was sent as a purge, and whose
// answer was not waited for, may have been applied, and says so.
func TestPurgeInDoubt(t *testing.T) {
	t.Parallel()
	srv := startSmallAccount(t)
	nc, p := connectAt(t, srv.ClientURL(), distance{})
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	keys := fillUp(t, s, make([]byte, 1000))
	near := connect(t, srv.ClientURL())
	leaveNoRoom(t, near)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	_, err := near.Subscribe("$JS.API.STREAM.PURGE.KV_b", func(*nats.Msg) { cancel() })
	require.NoError(t, err)
	require.NoError(t, near.Flush())
	p.move(distance{rtt: 3 * time.Second}) // the answer takes half of that
	err = s.WithContext(ctx).Delete(keys[0])
	p.move(distance{})
	assert.ErrorIs(t, err, ErrOutcomeUnknown)
	assert.ErrorIs(t, err, context.Canceled)
	_, err = s.Get(keys[0])
	refuses(t, ErrNotFound, err)
}

// TestExpiryInABucketOfSmallMessages: expiries are reported in a bucket that is too
// small for the questions which watches ask.
func TestExpiryInABucketOfSmallMessages(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	_, err := js.CreateKeyValue(context.Background(), jetstream.KeyValueConfig{Bucket: "b", MaxValueSize: 128, LimitMarkerTTL: time.Hour})
	require.NoError(t, err)
	alterStream(t, js, "KV_b", func(cfg *jetstream.StreamConfig) { cfg.SubjectDeleteMarkerTTL = 0 })
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	events := mustWatch(t, s, "*")
	const key = "agents.with.a.name.that.is.long"
	_, err = js.PublishMsg(context.Background(), &nats.Msg{Subject: "$KV.b." + key, Header: nats.Header{"Nats-TTL": {"1s"}}, Data: []byte("v")})
	require.NoError(t, err)
	put := receive(t, events)
	assert.Equal(t, "put "+key, brief(put))
	gone := receive(t, events)
	assert.Equal(t, "delete "+key, brief(gone))
	assert.Equal(t, put.Expires, gone.Modified)
}

// TestSmallStreamBuffers: a server that takes in little at a time is given the
// rest later. What fails says so, and was not written.
func TestSmallStreamBuffers(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) {
		o.StreamMaxBufferedMsgs, o.StreamMaxBufferedSize = 4, 2<<20
	})
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	size := s.data.maxValue()
	require.Greater(t, size, 1<<19)
	size = min(size, 1<<20-1024)
	errs := make([]error, 150)
	var wg sync.WaitGroup
	took := make([]time.Duration, len(errs))
	for i := range errs {
		wg.Go(func() {
			began := time.Now()
			errs[i] = s.Put(fmt.Sprintf("k.%d", i), bytes.Repeat([]byte{byte(i)}, size), 0)
			took[i] = time.Since(began)
		})
	}
	wg.Wait()
	written := 0
	for i, err := range errs {
		value, errGet := s.Get(fmt.Sprintf("k.%d", i))
		switch {
		case err == nil:
			require.NoError(t, errGet)
			assert.Equal(t, byte(i), value[size-1])
			written++
		case !errors.Is(err, ErrOutcomeUnknown):
			if took[i] < opTimeout/2 {
				assert.NotEqual(t, codeTooManyPending, apiCode(err), "it may be sent again")
			}
			refuses(t, ErrNotFound, errGet, err)
		}
	}
	assert.Positive(t, written)
}

// TestRevokedPermissions: a permission that is taken away is missed in words,
// and one that is given back is used, without opening anything again.
func TestRevokedPermissions(t *testing.T) {
	t.Parallel()
	opts := &server.Options{
		Host: "127.0.0.1", Port: freePort(t), JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true,
	}
	users := func(deny ...string) []*server.User {
		u := &server.User{Username: "u", Password: "p"}
		if len(deny) > 0 {
			u.Permissions = &server.Permissions{Publish: &server.SubjectPermission{Allow: []string{">"}, Deny: deny}}
		}
		return []*server.User{u}
	}
	opts.Users = users()
	srv := runServer(t, opts.Clone())
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.UserInfo("u", "p")), Bucket: "b"})
	require.NoError(t, s.Put("k", []byte("v"), 0))
	events := mustWatch(t, s, "*")

	reload := func(deny ...string) {
		next := opts.Clone()
		next.Users = users(deny...)
		require.NoError(t, srv.ReloadOptions(next))
	}
	reload("$KV.b.>")
	err := s.Put("k", []byte("refused"), 0)
	require.Error(t, err)
	assert.Contains(t, strings.ToLower(err.Error()), "permissions violation")
	assert.Equal(t, "v", string(mustGet(t, s, "k").Value))

	reload()
	require.NoError(t, s.Put("k", []byte("again"), 0))
	for told := receive(t, events); string(told.Value) != "again"; told = receive(t, events) {
		assert.NotEqual(t, "refused", string(told.Value))
	}
	require.NoError(t, s.Delete("k"))
	assert.Equal(t, "delete k", brief(receive(t, events)))

	// The server ends the subscriptions for which there is no permission any more.
	next := opts.Clone()
	next.Users = users()
	next.Users[0].Permissions = &server.Permissions{Subscribe: &server.SubjectPermission{Allow: []string{">"}, Deny: []string{"_INBOX.>"}}}
	require.NoError(t, srv.ReloadOptions(next))
	require.Error(t, s.Put("k", []byte("unheard"), 0))
	reload()
	eventually(t, func() bool { return s.Put("k", []byte("heard"), 0) == nil }, "a Put that is answered")
}
