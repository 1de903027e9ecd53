package state

import (
	"context"
	"errors"
	"fmt"
	"os"
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

// Follow, Cache and Entries where servers restart, connections are cut, and
// buckets are created again.

func TestFollowUnopened(t *testing.T) {
	for _, s := range []*NATSStore{nil, {}} {
		_, _, err := Follow(t.Context(), s, "*")
		require.ErrorIs(t, err, errUnopened)
		_, err = NewCache(t.Context(), s, "*")
		require.ErrorIs(t, err, errUnopened)
	}
}

// patiently has f tried until it succeeds: the server is away for a while.
func patiently(t *testing.T, f func() error) {
	t.Helper()
	eventually(t, func() bool { return f() == nil }, "it succeeds")
}

func TestFollowOutlivesRestart(t *testing.T) {
	t.Parallel()
	srv := startRestartable(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 20 {
		require.NoError(t, writer.Put(fmt.Sprintf("k.%d", i), []byte("before"), 0))
	}
	var f *followed
	var life time.Duration
	withLongerTTL(t, 500*time.Millisecond, func(ttl time.Duration) bool {
		life = ttl
		require.NoError(t, writer.Put("k.dies", nil, ttl))
		f = mustFollow(t, t.Context(), s, "k.*")
		return len(f.entries) == 21
	})
	c := mustCache(t, s, "k.*")
	for range 2 {
		stopServer(srv.Server)
		time.Sleep(life + 100*time.Millisecond) // one dies meanwhile
		srv.start(t)
		patiently(t, func() error { return writer.Put("k.1", []byte("after"), 0) })
		require.NoError(t, writer.Delete("k.2"))
		require.NoError(t, writer.Put("k.new", nil, 0))
		f.agrees(t, writer, "k.*")
		assert.NotContains(t, f.entries, "k.dies")
		last := mustGet(t, writer, "k.new")
		require.NoError(t, c.Wait(t.Context(), last.Revision))
		eventually(t, func() bool {
			entries, err := c.Entries("k.*")
			require.NoError(t, err)
			return sameEntries(mustEntries(t, writer, "k.*"), entries)
		}, "the cache agrees with the store")
	}
}

// countListings counts, until the test ends, the consumers that are made for a
// bucket.
func countListings(t *testing.T, url, bucket string) *atomic.Int64 {
	t.Helper()
	n := new(atomic.Int64)
	nc := connect(t, url)
	_, err := nc.Subscribe("$JS.API.CONSUMER.CREATE.KV_"+bucket+".>", func(*nats.Msg) { n.Add(1) })
	require.NoError(t, err)
	_, err = nc.Subscribe("$JS.API.DIRECT.GET.KV_"+bucket, func(*nats.Msg) { n.Add(1) })
	require.NoError(t, err)
	require.NoError(t, nc.Flush())
	return n
}

// TestFollowOutlivesCuts: a connection is cut for a second, in which keys are
// written, deleted, made again and expire. Follow delivers what is different
// afterwards, for one listing.
func TestFollowOutlivesCuts(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	listings := countListings(t, srv.ClientURL(), "b")
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 20 {
		require.NoError(t, writer.Put(fmt.Sprintf("k.%d", i), []byte("before"), 0))
	}
	require.NoError(t, writer.Put("k.dies", nil, 1500*time.Millisecond))
	f := mustFollow(t, t.Context(), s, "*")
	eventually(t, func() bool { return listings.Load() == 2 }, "one consumer to watch and one to list")
	listings.Store(0)
	c := mustCache(t, s, "*")
	eventually(t, func() bool { return listings.Load() == 1 }, "one listing: the pattern is watched already")
	listings.Store(0)

	for i := range 2 {
		p.refuse(true)
		p.cut()
		cut := time.Now()
		stop := churn(t, "k.", 30, writer)
		require.NoError(t, writer.Put("k.short", nil, 100*time.Millisecond))
		require.NoError(t, writer.Delete("k.19"))
		require.NoError(t, writer.Put("k.19", fmt.Append(nil, i), 0))
		time.Sleep(time.Second)
		asOf := c.AsOf()
		assert.True(t, asOf.Before(cut.Add(100*time.Millisecond)), "AsOf is %v after the cut", asOf.Sub(cut))
		value, err := c.Get("k.19")
		require.NoError(t, err)
		assert.NotEqual(t, fmt.Sprint(i), string(value), "it cannot know yet")
		p.refuse(false)
		stop()
		f.agrees(t, writer, "*")
		acknowledged := time.Now()
		eventually(t, func() bool { return c.AsOf().After(acknowledged) }, "AsOf goes on")
		other := openStore(t, NATSStoreConfig{Conn: writer.data.nc, Bucket: "b"})
		eventually(t, func() bool { // what is about to expire does
			entries, err := c.Entries("*")
			require.NoError(t, err)
			return sameEntries(mustEntries(t, other, "*"), entries)
		}, "the cache agrees with the store")
	}
	assert.NotContains(t, f.entries, "k.dies")
}

// TestFollowListsOnceAfterAnOutage counts what an outage costs.
func TestFollowListsOnceAfterAnOutage(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	writer := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 20 {
		require.NoError(t, writer.Put(fmt.Sprintf("k.%d", i), nil, 0))
	}
	f := mustFollow(t, t.Context(), s, "*")
	g := mustFollow(t, t.Context(), s, "*")
	listings := countListings(t, srv.ClientURL(), "b")
	cuts := s.Stats().WatchCuts
	p.refuse(true)
	p.cut()
	require.NoError(t, writer.Delete("k.1"))
	require.NoError(t, writer.Put("k.2", []byte("x"), 0))
	time.Sleep(time.Second)
	p.refuse(false)
	for _, f := range []*followed{f, g} {
		for f.entries["k.1"] != nil || string(f.entries["k.2"].Value) != "x" {
			f.next(t)
		}
	}
	time.Sleep(2500 * time.Millisecond) // it may still look at the stream
	assert.LessOrEqual(t, listings.Load(), int64(2), "one consumer to watch and one to list, for both")
	assert.EqualValues(t, 1, s.Stats().WatchCuts-cuts)
}

// TestFollowBucketMadeAnew: somebody deletes the bucket and makes it again. Its
// revisions begin again, and Follow delivers what is different.
func TestFollowBucketMadeAnew(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for name, s := range map[string]Store{"with hooks": s, "without": plain{s}} {
		t.Run(name, func(t *testing.T) {
			for i := range 50 {
				require.NoError(t, s.Put(fmt.Sprintf("k.%d", i%5), []byte("old"), 0))
			}
			f := mustFollow(t, t.Context(), s, "k.*")
			c := mustCache(t, s, "k.*")
			old := mustGet(t, s, "k.4").Revision
			js := newJetStream(t, connect(t, srv.ClientURL()))
			require.NoError(t, js.DeleteKeyValue(context.Background(), "b"))
			again := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
			require.NoError(t, again.Put("k.3", []byte("new"), 0))
			require.NoError(t, again.Put("k.9", []byte("new"), 0))
			got := map[string]string{}
			for len(got) < 6 {
				kv := receive(t, f.changes)
				require.NotContains(t, got, kv.Key)
				if brief(kv) == "delete k.3" {
					continue // Follow has listed the bucket before the Put
				}
				got[kv.Key] = kv.Operation.String()
			}
			assert.Equal(t, map[string]string{
				"k.0": "delete", "k.1": "delete", "k.2": "delete", "k.4": "delete", "k.3": "put", "k.9": "put",
			}, got)
			require.NoError(t, again.Put("k.3", []byte("newer"), 0))
			kv := receive(t, f.changes)
			assert.Equal(t, "put k.3", brief(kv))
			assert.Equal(t, "newer", string(kv.Value))
			require.NoError(t, again.Delete("k.3"))
			assert.Equal(t, "delete k.3", brief(receive(t, f.changes)))

			require.NoError(t, c.Wait(t.Context(), mustGet(t, again, "k.9").Revision))
			eventually(t, func() bool {
				entries, err := c.Entries("k.*")
				require.NoError(t, err)
				return sameEntries(mustEntries(t, again, "k.*"), entries)
			}, "the cache agrees with the store")
			eventually(t, func() bool { // once the cache knows that it has started over
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				return errors.Is(c.Wait(ctx, old), context.DeadlineExceeded)
			}, "that revision was another bucket's")
		})
	}
}

// TestFollowOnReplicas: the stream's leader steps down beside writers.
func TestFollowOnReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	c := startCluster(t)
	nc := connect(t, c.servers[0].ClientURL())
	var stores []*NATSStore
	for i := range 3 {
		stores = append(stores, openStore(t, NATSStoreConfig{Conn: connect(t, c.servers[i].ClientURL()), Bucket: "b", Replicas: 3}))
	}
	t.Run("step-down", func(t *testing.T) {
		var all []*followed
		for _, s := range stores {
			all = append(all, mustFollow(t, t.Context(), s, "k.*"))
		}
		var quit atomic.Bool
		var wg sync.WaitGroup
		for w, s := range stores {
			wg.Go(func() {
				for i := w; !quit.Load(); i++ {
					key := fmt.Sprintf("k.%d", i%30)
					switch i % 4 {
					case 0:
						_ = s.Delete(key)
					case 1:
						_ = s.Put(key, fmt.Append(nil, i), 300*time.Millisecond)
					default:
						_ = s.Put(key, fmt.Append(nil, i), 0)
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
		}
		for range 3 {
			c.stepDown(t, nc, "b")
			time.Sleep(500 * time.Millisecond)
		}
		quit.Store(true)
		wg.Wait()
		for _, f := range all {
			f.agrees(t, stores[0], "k.*")
		}
	})
	t.Run("entries", func(t *testing.T) {
		// Every write that was acknowledged is seen from every server.
		for i := range 60 {
			writer, reader := stores[i%3], stores[(i+1+i/3%2)%3]
			key := fmt.Sprintf("e.%d", i)
			revision, err := writer.Update(key, []byte("v"), 0, 0)
			require.NoError(t, err)
			entries := mustEntries(t, reader, "e.*")
			require.Len(t, entries, i+1)
			found := false
			for _, kv := range entries {
				found = found || kv.Key == key && kv.Revision == revision
			}
			require.True(t, found, key)
		}
	})
}

// TestEntriesOfALargeBucket: 20,000 entries are complete beside writers.
func TestEntriesOfALargeBucket(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	const n = 20_000
	fillBucket(t, nc, "b", "k.", n)
	stop := traffic{prefix: "k.", keys: n, perSecond: 1000}.start(t, connect(t, srv.ClientURL()), "b")
	for range 3 {
		entries := mustEntries(t, s, "k.*")
		require.Len(t, entries, n)
		for i := 1; i < n; i++ {
			require.Less(t, entries[i-1].Key, entries[i].Key)
		}
	}
	stop()
}

// TestEntriesOfLargeValues: values of a mebibyte come whole.
func TestEntriesOfLargeValues(t *testing.T) {
	t.Parallel()
	srv := startServer(t, func(o *server.Options) { o.MaxPayload = 2 << 20 })
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", MaxValueSize: 1 << 20})
	const n = 12
	value := strings.Repeat("v", 1<<20)
	for i := range n {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), []byte(value), 0))
	}
	f := mustFollow(t, t.Context(), s, "k.*")
	require.Len(t, f.entries, n)
	entries := mustEntries(t, s, "*")
	require.Len(t, entries, n)
	for _, kv := range entries {
		require.True(t, string(kv.Value) == value)
	}
	for i := range n {
		require.NoError(t, s.Put(fmt.Sprintf("k.%d", i), []byte(value), 0))
	}
	f.agrees(t, s, "k.*")
}

// TestFollowAfterLostWrites: a server comes back without what it had acknowledged last.
// Follow and Cache go back with it.
func TestFollowAfterLostWrites(t *testing.T) {
	t.Parallel()
	srv := startRestartable(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	put := func(key, value string) uint64 {
		eventually(t, func() bool { return s.Put(key, []byte(value), 0) == nil }, "a Put")
		return mustGet(t, s, key).Revision
	}
	put("k", "1")
	stopServer(srv.Server)
	backup := t.TempDir()
	require.NoError(t, os.CopyFS(backup, os.DirFS(srv.opts.StoreDir)))
	srv.start(t)
	put("k", "2")
	_, changes, err := Follow(t.Context(), s, "*")
	require.NoError(t, err)
	cache, err := NewCache(t.Context(), s, "*")
	require.NoError(t, err)
	require.NoError(t, cache.Wait(t.Context(), put("later", "1")))
	assert.Equal(t, "put later", brief(receive(t, changes)))

	stopServer(srv.Server)
	require.NoError(t, os.RemoveAll(srv.opts.StoreDir))
	require.NoError(t, os.CopyFS(srv.opts.StoreDir, os.DirFS(backup)))
	srv.start(t)
	is := receive(t, changes)
	assert.Equal(t, "put k", brief(is))
	assert.Equal(t, "1", string(is.Value))
	assert.Equal(t, "delete later", brief(receive(t, changes)))
	eventually(t, func() bool {
		v, err := cache.Get("k")
		_, gone := cache.Get("later")
		return err == nil && string(v) == "1" && gone == ErrNotFound //nolint:errorlint // bare
	}, "the cache goes back, too")
	require.NoError(t, cache.Wait(t.Context(), put("k", "3")))
	assert.Equal(t, "3", string(receive(t, changes).Value))
	v, err := cache.Get("k")
	require.NoError(t, err)
	assert.Equal(t, "3", string(v))
}
