package state

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func mustKV(t testing.TB, nc *nats.Conn, bucket string) jetstream.KeyValue {
	t.Helper()
	kv, err := newJetStream(t, nc).KeyValue(context.Background(), bucket)
	require.NoError(t, err)
	return kv
}

// TestOthersReadOurs: what the store writes, nats.go's KeyValue reads.
func TestOthersReadOurs(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", History: 5})
	kv := mustKV(t, nc, "b")
	watcher, err := kv.WatchAll(ctx)
	require.NoError(t, err)
	require.Nil(t, <-watcher.Updates())

	require.NoError(t, s.Put("a.k", []byte("one"), 0))
	require.NoError(t, s.Put("a.k", []byte("two"), 0))
	require.NoError(t, s.Put("a.ttl", []byte("x"), time.Hour))
	entry, err := kv.Get(ctx, "a.k")
	require.NoError(t, err)
	assert.Equal(t, "two", string(entry.Value()))
	assert.Equal(t, mustGet(t, s, "a.k").Revision, entry.Revision())
	assert.True(t, mustGet(t, s, "a.k").Modified.Equal(entry.Created()), "its Created is the revision's")
	history, err := kv.History(ctx, "a.k")
	require.NoError(t, err)
	require.Len(t, history, 2)
	assert.Equal(t, "one", string(history[0].Value()))
	keys, err := kv.Keys(ctx)
	require.NoError(t, err)
	assert.ElementsMatch(t, []string{"a.k", "a.ttl"}, keys)

	told := func(want ...jetstream.KeyValueOp) {
		for _, op := range want {
			update := <-watcher.Updates()
			assert.Equal(t, op, update.Operation())
		}
	}
	told(jetstream.KeyValuePut, jetstream.KeyValuePut, jetstream.KeyValuePut) // before two of them are removed
	require.NoError(t, s.Delete("a.k"))
	_, err = kv.Get(ctx, "a.k")
	assert.ErrorIs(t, err, jetstream.ErrKeyNotFound)
	keys, err = kv.Keys(ctx)
	require.NoError(t, err)
	assert.Equal(t, []string{"a.ttl"}, keys)
	told(jetstream.KeyValuePurge)
	// Their conditional writes work on ours, and ours on theirs.
	revision, err := kv.Create(ctx, "a.k", []byte("three"))
	require.NoError(t, err)
	_, err = s.Update("a.k", []byte("four"), 0, revision)
	require.NoError(t, err)
	_, err = kv.Update(ctx, "a.k", []byte("five"), revision)
	assert.ErrorIs(t, err, jetstream.ErrKeyExists)
}

// TestWeReadOthers: the other way round, deletes and purges included.
func TestWeReadOthers(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	js := newJetStream(t, nc)
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b"})
	require.NoError(t, err)
	revision, err := kv.PutString(ctx, "before", "v")
	require.NoError(t, err)

	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	before := mustGet(t, s, "before")
	assert.Equal(t, revision, before.Revision)
	assert.True(t, before.Created.Equal(before.Modified))
	events := mustWatch(t, s, "*")

	for name, remove := range map[string]func(ctx context.Context, key string, opts ...jetstream.KVDeleteOpt) error{
		"delete": kv.Delete, "purge": kv.Purge,
	} {
		_, err := kv.PutString(ctx, name, "v")
		require.NoError(t, err)
		assert.Equal(t, "put "+name, brief(receive(t, events)))
		require.NoError(t, remove(ctx, name))
		deleted := receive(t, events)
		assert.Equal(t, "delete "+name, brief(deleted))
		_, err = s.Get(name)
		refuses(t, ErrNotFound, err)
		require.NoError(t, s.Delete(name), "it is gone already")
		require.NoError(t, remove(ctx, name)) // theirs writes a marker nevertheless
		require.NoError(t, s.Put(name, nil, 0))
		put := receive(t, events)
		assert.Equal(t, "put "+name, brief(put), "a deletion of nothing is not told")
		assert.True(t, put.Created.After(before.Created))
		require.NoError(t, s.Delete(name))
		assert.Equal(t, "delete "+name, brief(receive(t, events)))
	}
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"before"}, keys)

	// Their TTLs are ours, cut to whole seconds as the server does.
	_, err = js.PublishMsg(ctx, &nats.Msg{Subject: "$KV.b.ttl", Data: []byte("v"), Header: nats.Header{"Nats-TTL": {"1.9s"}}})
	require.NoError(t, err)
	put := receive(t, events)
	assert.Equal(t, "put ttl", brief(put))
	expiry := receive(t, events)
	assert.Equal(t, "delete ttl", brief(expiry))
	assert.True(t, expiry.Modified.Equal(put.Modified.Add(time.Second)))

	// A subject that is no key is nobody's entry.
	_, err = js.Publish(ctx, "$KV.b.a:b", []byte("v"))
	require.NoError(t, err)
	deliversNext(t, s, events, "end")
	keys, err = s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"before", "end"}, keys)
}

// TestLegacyClient: nats.go's older API, on which the nats command was built.
func TestLegacyClient(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	js, err := nc.JetStream()
	require.NoError(t, err)
	kv, err := js.KeyValue("b")
	require.NoError(t, err)
	require.NoError(t, s.Put("k", []byte("ours"), time.Hour))
	entry, err := kv.Get("k")
	require.NoError(t, err)
	assert.Equal(t, "ours", string(entry.Value()))
	_, err = kv.PutString("k", "theirs")
	require.NoError(t, err)
	assert.Equal(t, "theirs", string(mustGet(t, s, "k").Value))
	require.NoError(t, s.Put("k", []byte("ours again"), 0))
	require.NoError(t, kv.Purge("k"))
	_, err = s.Get("k")
	refuses(t, ErrNotFound, err)
}

// TestLocksAreShown: any KV tool shows who holds what, and an operator can
// depose a holder with it.
func TestLocksAreShown(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	held := mustLock(t, s, "leader", time.Minute)
	require.NoError(t, mustLock(t, s, "free", time.Minute).Unlock())
	kv := mustKV(t, nc, "b-locks")
	keys, err := kv.Keys(ctx)
	require.NoError(t, err)
	assert.Equal(t, []string{"leader"}, keys)
	entry, err := kv.Get(ctx, "leader")
	require.NoError(t, err)
	assert.Contains(t, string(entry.Value()), `"owner":"`)
	assert.Equal(t, held.(Fenced).Token(), entry.Revision())

	for _, remove := range []func(ctx context.Context, key string, opts ...jetstream.KVDeleteOpt) error{kv.Delete, kv.Purge} {
		require.NoError(t, remove(ctx, "leader"))
		refuses(t, ErrLockExpired, held.Refresh())
		refuses(t, ErrLockNotHeld, held.Unlock())
		next := mustLock(t, s, "leader", time.Minute)
		assert.Greater(t, next.(Fenced).Token(), held.(Fenced).Token())
		_, err := s.Lock("leader", time.Minute)
		refuses(t, ErrLockHeld, err)
		held = next
	}
}
