package state

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// viaProxy returns a store whose connection goes through a proxy of its own.
func viaProxy(t *testing.T, target, bucket string, replicas int) (*NATSStore, *proxy) {
	t.Helper()
	p := startProxy(t, strings.TrimPrefix(target, "nats://"))
	// It must not learn of ways around the proxy.
	nc := connect(t, p.url(), nats.DontRandomize(), nats.IgnoreDiscoveredServers())
	return openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket, Replicas: replicas}), p
}

// TestLateWriteUndoesNothing: what the client library holds back while it is
// disconnected is delivered when it is connected again. So nothing is published
// then: a write fails, and does not surface later.
func TestLateWriteUndoesNothing(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for _, key := range []string{"put", "delete", "update", "alone"} {
		require.NoError(t, s.Put(key, []byte("first"), 0))
	}
	revision := mustGet(t, s, "update").Revision
	p.refuse(true)
	p.cut()
	eventually(t, func() bool { return !s.data.nc.IsConnected() }, "disconnect")
	errs := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for key, write := range map[string]func() error{
		"put":    func() error { return s.Put("put", []byte("late"), 0) },
		"alone":  func() error { return s.Put("alone", []byte("late"), 0) },
		"delete": func() error { return s.Delete("delete") },
		"update": func() error { _, err := s.Update("update", []byte("late"), 0, revision); return err },
	} {
		wg.Go(func() {
			err := write()
			mu.Lock()
			errs[key] = err
			mu.Unlock()
		})
	}
	began := time.Now()
	wg.Wait()
	assert.Less(t, time.Since(began), opTimeout+3*time.Second)
	for key, err := range errs {
		assert.ErrorIs(t, err, nats.ErrDisconnected, key)
		assert.NotErrorIs(t, err, ErrOutcomeUnknown, key)
	}
	for _, key := range []string{"put", "delete", "update"} {
		require.NoError(t, other.Put(key, []byte("newer"), 0))
	}
	p.refuse(false)
	require.NoError(t, s.Put("barrier", nil, 0))
	for _, key := range []string{"put", "delete", "update"} {
		assert.Equal(t, "newer", string(mustGet(t, other, key).Value), key)
	}
	assert.Equal(t, "first", string(mustGet(t, other, "alone").Value), "it was not applied, as its writer was told")
}

// TestAcknowledgedWritesLost: servers that have lost what they acknowledged are
// believed in the end.
func TestAcknowledgedWritesLost(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster, for half a minute")
	}
	t.Parallel()
	nc := connect(t, startCluster(t).servers[0].ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", Replicas: 3})
	require.NoError(t, s.Put("k", []byte("v"), 0))
	lost := s.data.cache.recall("k")
	lost.revision = 1000
	s.data.cache.learn("k", lost)
	s.data.cache.learn("gone", lost)
	require.ErrorIs(t, s.Put("k", nil, 0), ErrOutcomeUnknown) // this is a leader that was cut off, for all it knows
	require.True(t, within(3*staleFor, func() bool { _, err := s.Get("k"); return err == nil }))
	_, err := s.Get("gone")
	refuses(t, ErrNotFound, err)
	require.NoError(t, s.Put("k", []byte("new"), 0))
	assert.Equal(t, "new", string(mustGet(t, s, "k").Value))
}

// TestLostAnswer: the server stores a write, and its answer never arrives. The
// operation id tells what became of it.
func TestLostAnswer(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	require.NoError(t, s.Put("k", []byte("1"), 0))
	first := mustGet(t, s, "k").Revision
	require.NoError(t, mustLock(t, s, "warm", time.Minute).Unlock())

	lose := func(t *testing.T, write func() error) {
		t.Helper()
		p.holdAnswers(true)
		done := make(chan error)
		go func() { done <- write() }()
		time.Sleep(300 * time.Millisecond) // it is sent, and stored
		p.cut()
		p.holdAnswers(false)
		require.NoError(t, <-done)
	}
	lose(t, func() error { return s.Put("k", []byte("2"), 0) })
	kv := mustGet(t, s, "k")
	assert.Equal(t, "2", string(kv.Value))
	assert.Equal(t, first+1, kv.Revision, "it was stored once")
	lose(t, func() error {
		revision, err := s.Update("k", []byte("3"), 0, kv.Revision)
		assert.Equal(t, kv.Revision+1, revision)
		return err
	})
	lose(t, func() error { return s.Delete("k") })
	require.NoError(t, s.Put("k", nil, 0))
	assert.Equal(t, first+4, mustGet(t, s, "k").Revision)

	var l Lock
	lose(t, func() (err error) { l, err = s.Lock("l", time.Minute); return err })
	lose(t, func() error { return l.Refresh() })
	_, err := s.Lock("l", time.Minute)
	refuses(t, ErrLockHeld, err)
	lose(t, func() error { return l.Unlock() })
	require.NoError(t, mustLock(t, s, "l", time.Minute).Unlock())
}

// TestUnreachable: no call blocks without bound, and errors name what was to be
// done.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s, p := viaProxy(t, srv.ClientURL(), "b", 1)
	l := mustLock(t, s, "held", time.Minute)
	p.stall()
	var wg sync.WaitGroup
	for name, f := range map[string]func() error{
		`get "k"`:           func() error { _, err := s.Get("k"); return err },
		`put "k"`:           func() error { return s.Put("k", nil, 0) },
		`update "k"`:        func() error { _, err := s.Update("k", nil, 0, 0); return err },
		`delete "other"`:    func() error { return s.Delete("other") },
		`keys "*"`:          func() error { _, err := s.Keys("*"); return err },
		`watch "*"`:         func() error { _, err := s.Watch("*"); return err },
		`lock "l"`:          func() error { _, err := s.Lock("l", time.Minute); return err },
		`refresh "held"`:    l.Refresh,
		`get "second"`:      func() error { _, err := s.GetKeyValue("second"); return err },
		`put "with-ttl"`:    func() error { return s.Put("with-ttl", nil, time.Second) },
		`keys "one"`:        func() error { _, err := s.Keys("one"); return err },
		`watch "one"`:       func() error { _, err := s.Watch("one"); return err },
		`update "existing"`: func() error { _, err := s.Update("existing", nil, 0, 7); return err },
	} {
		wg.Go(func() {
			began := time.Now()
			err := f()
			assert.ErrorContains(t, err, "state: "+name)
			assert.ErrorIs(t, err, context.DeadlineExceeded, name)
			assert.Less(t, time.Since(began), 2*opTimeout+time.Second, name) // a turn of the key, and then a request
		})
	}
	wg.Wait()
}

// TestExpiredAfterRestart: for a quarter second after its start a server still
// serves what expired while it was down.
func TestExpiredAfterRestart(t *testing.T) {
	t.Parallel()
	srv := startRestartable(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	for i := range 20 {
		require.NoError(t, s.Put(fmt.Sprint("k.", i), nil, time.Second))
	}
	l := mustLock(t, s, "l", time.Second)
	time.Sleep(500 * time.Millisecond)
	stopServer(srv.Server)
	time.Sleep(700 * time.Millisecond)
	srv.start(t)
	fresh := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	raw := mustKV(t, connect(t, srv.ClientURL()), "b")
	_, rawErr := raw.Get(context.Background(), "k.0")
	for range 30 {
		for _, s := range []StateStore{s, fresh} {
			_, err := s.Get("k.0")
			refuses(t, ErrNotFound, err)
			keys, err := s.Keys("*")
			require.NoError(t, err)
			assert.Empty(t, keys)
		}
	}
	t.Logf("a plain client's read just after the restart: %v", rawErr)
	refuses(t, ErrLockExpired, l.Refresh())
	require.NoError(t, mustLock(t, fresh, "l", time.Minute).Unlock())
}

// TestExpiryIsExact compares when an entry disappears with its deadline by the
// server's clock, which is this machine's, for TTLs of all sizes.
func TestExpiryIsExact(t *testing.T) {
	nc := connect(t, startServer(t, nil).ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	var late []time.Duration
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i, ttl := range []time.Duration{
		30 * time.Millisecond, 99 * time.Millisecond, 250 * time.Millisecond, 999 * time.Millisecond, time.Second,
		1001 * time.Millisecond, 1500 * time.Millisecond, 1999 * time.Millisecond, 2 * time.Second,
	} {
		wg.Go(func() {
			key := fmt.Sprint("k.", i)
			var kv *KeyValue
			eventually(t, func() (seen bool) { // before it ends
				assert.NoError(t, s.Put(key, nil, ttl))
				var err error
				kv, err = s.GetKeyValue(key)
				return err == nil
			}, "the entry")
			var seen time.Time // when it was asked for last and still there
			for {
				asked := time.Now()
				if _, err := s.Get(key); err != nil {
					break
				}
				seen = asked
			}
			now, deadline := time.Now(), kv.Modified.Add(ttl)
			assert.False(t, now.Before(deadline), "%v is gone %v early", ttl, deadline.Sub(now))
			mu.Lock()
			late = append(late, seen.Sub(deadline))
			mu.Unlock()
		})
	}
	wg.Wait()
	slices.Sort(late)
	t.Logf("last seen at most %v after the deadline", late[len(late)-1])
	assert.Less(t, late[len(late)-1], time.Second)
}

// TestServerClock: the estimate follows the server's clock, however far it is
// from the local one, and is never ahead of it.
func TestServerClock(t *testing.T) {
	for _, skew := range []time.Duration{0, -10 * time.Minute, 10 * time.Minute, 24 * time.Hour} {
		var c serverClock
		first, second := newEpoch(nats.CONNECTED), newEpoch(nats.CONNECTED)
		server := func() timestamp { return timestamp(time.Now().Add(skew).UnixNano()) }
		for range 20 {
			asked := time.Now()
			time.Sleep(time.Millisecond) // on its way there
			base := server()
			time.Sleep(time.Millisecond) // and back
			c.set(base, asked, first)
			before := server()
			estimate := c.now()
			assert.LessOrEqual(t, estimate, server(), skew)
			assert.GreaterOrEqual(t, estimate+c.uncertainty(time.Now()), before, skew)
		}
		c.observe(server())
		assert.LessOrEqual(t, c.now(), server())
		// What another server wrote, whose clock is ahead, does not move it.
		c.observe(server() + timestamp(time.Minute))
		assert.LessOrEqual(t, c.now(), server())
		// After a reconnect the clock may be another server's.
		c.set(server()-timestamp(time.Hour), time.Now(), second)
		assert.LessOrEqual(t, c.now(), server()-timestamp(time.Hour)+timestamp(time.Minute))
	}
}

// TestClockSetBack: the server's clock was set back after it was last asked, by
// more than the TTLs had left. To the client that looks like an estimate that
// is ahead, which is how it is brought about here.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: s.data.nc, Bucket: "b"})
	require.NoError(t, mustLock(t, s, "first", time.Minute).Unlock())
	withLongerTTL(t, 700*time.Millisecond, func(ttl time.Duration) (inTime bool) { return clockSetBack(t, s, other, ttl) })
}

func clockSetBack(t *testing.T, s, other *NATSStore, ttl time.Duration) (inTime bool) {
	back := timestamp(ttl - 100*time.Millisecond)
	setBack := func() {
		for _, b := range []*bucket{s.data, s.locks.bucket} {
			b.clock.mu.Lock()
			b.clock.at, b.clock.trip = time.Now().Add(-2*freshSample), 0
			b.clock.base = timestamp(b.clock.at.UnixNano()) + back
			b.clock.mu.Unlock()
		}
	}
	key := func(name string) string { return fmt.Sprintf("%v.%s", ttl, name) }
	r := recordEvents(t, mustWatch(t, s, key("watched")))
	began := time.Now()
	for _, name := range []string{"deleted", "listed", "put", "read", "updated", "watched"} {
		require.NoError(t, other.Put(key(name), []byte("v"), ttl))
	}
	before, err := other.GetKeyValue(key("put"))
	if err == nil {
		_, err = other.Lock(key("held"), ttl)
	}
	time.Sleep(min(ttl/5, 150*time.Millisecond))
	if time.Since(began) >= ttl {
		return false
	}
	require.NoError(t, err)

	is := func(want bool, err error) error {
		if err == nil && !want {
			err = errors.New("it is not")
		}
		return err
	}
	for name, check := range map[string]func(key string) error{
		"read": func(key string) error {
			_, err := s.Get(key)
			return err
		},
		"listed": func(key string) error {
			all, err := s.Keys("*")
			return is(slices.Contains(all, key), err)
		},
		"updated": func(key string) error {
			_, err := s.Update(key, nil, 0, 0)
			return is(err == ErrConflict, nil) //nolint:errorlint // bare
		},
		"deleted": func(key string) error {
			if err := s.Delete(key); err != nil {
				return err
			}
			_, err := other.Get(key)
			return is(err == ErrNotFound, nil) //nolint:errorlint // bare
		},
		"put": func(key string) error {
			for range 2 {
				if err := s.Put(key, nil, time.Minute); err != nil {
					return err
				}
				after, err := other.GetKeyValue(key)
				if err := is(err == nil && before.Created.Equal(after.Created), err); err != nil {
					return err
				}
			}
			return nil
		},
		"held": func(key string) error {
			_, err := s.Lock(key, ttl)
			return is(err == ErrLockHeld, nil) //nolint:errorlint // bare
		},
	} {
		setBack()
		err := check(key(name))
		if time.Since(began) >= min(ttl, time.Duration(decisionMargin)) {
			return false // too late to tell anything
		}
		assert.NoError(t, err, "what is to be %s", name)
	}
	for time.Since(began) < ttl-20*time.Millisecond {
		setBack()
		require.NoError(t, other.Put(key("watched.not"), nil, 0))
		time.Sleep(10 * time.Millisecond)
	}
	if told := r.count(); time.Since(began) < ttl {
		assert.LessOrEqual(t, told, 1, "only the Put")
	}
	eventually(t, func() bool { return r.count() == 2 }, "the expiry")
	return true
}

// TestClockVague: the answer from which the server's clock is estimated took
// half a second, and still what has expired is seen to have.
func TestClockVague(t *testing.T) {
	t.Parallel()
	const ttl, trip = 50 * time.Millisecond, 500 * time.Millisecond
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	other := openStore(t, NATSStoreConfig{Conn: s.data.nc, Bucket: "b"})
	require.NoError(t, mustLock(t, s, "warm", time.Minute).Unlock())
	for _, key := range []string{"listed", "read", "updated"} {
		require.NoError(t, other.Put(key, []byte("v"), ttl))
	}
	mustLock(t, other, "held", ttl)
	time.Sleep(ttl + 10*time.Millisecond)

	for what, is := range map[string]func(){
		"read": func() {
			_, err := s.Get("read")
			refuses(t, ErrNotFound, err)
		},
		"listed": func() {
			all, err := s.Keys("*")
			require.NoError(t, err)
			assert.NotContains(t, all, "listed")
		},
		"updated": func() {
			_, err := s.Update("updated", nil, 0, 0)
			require.NoError(t, err)
		},
		"held": func() {
			mustLock(t, s, "held", ttl)
		},
	} {
		for _, b := range []*bucket{s.data, s.locks.bucket} {
			b.clock.mu.Lock()
			b.clock.at, b.clock.trip = time.Now(), trip
			b.clock.base = timestamp(b.clock.at.Add(-trip).UnixNano())
			b.clock.mu.Unlock()
		}
		t.Log(what)
		is()
	}
}

// TestHistoryDoesNotComeBack: with a history, the end of the newest revision
// must not bring back an older one; a TTL left to the server alone does.
func TestHistoryDoesNotComeBack(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", History: 5})
	for _, key := range []string{"ttl", "deleted", "full", "kept"} {
		for i := range 3 {
			require.NoError(t, s.Put(key, fmt.Append(nil, i), 0))
		}
	}
	require.NoError(t, s.Put("ttl", []byte("short"), time.Second))
	require.NoError(t, s.Delete("deleted"))
	_, err := s.data.markSmall(newBudget(ctx), mutation{key: "full", ttl: tombstoneTTL}, always) // as in a full bucket
	require.NoError(t, err)
	for key, revisions := range map[string]int{"kept": 3, "deleted": 1, "full": 1} {
		history, err := mustKV(t, nc, "b").History(ctx, key)
		require.NoError(t, err)
		assert.Len(t, history, revisions, key)
	}
	last, err := s.data.leaderMsg(newBudget(ctx), "$KV.b.deleted")
	require.NoError(t, err)
	// The deletion's end is an hour away; do what the server will do then.
	config := configOf(t, nc, "KV_b")
	assert.Equal(t, true, config["deny_delete"])
	js := newJetStream(t, nc)
	stream, err := js.Stream(ctx, "KV_b")
	require.NoError(t, err)
	require.NoError(t, stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.b.deleted"), jetstream.WithPurgeSequence(last.Seq+1)))
	eventually(t, func() bool {
		info, err := stream.Info(ctx, jetstream.WithSubjectFilter("$KV.b.ttl"))
		return err == nil && len(info.State.Subjects) <= 1 && time.Since(last.Time) > 2*time.Second
	}, "removal")
	for _, key := range []string{"ttl", "deleted"} {
		_, err := s.Get(key)
		refuses(t, ErrNotFound, err, key)
		require.NoError(t, s.Delete(key))
	}
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"kept"}, keys)
}

// TestNothingPilesUp: what is gone leaves nothing on the server for good.
func TestNothingPilesUp(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	for i := range 50 {
		key := fmt.Sprint("k.", i)
		require.NoError(t, s.Put(key, nil, time.Second))
		mustLock(t, s, key, time.Second)
	}
	ttl := func(subject, bucket string) string {
		stream, err := newJetStream(t, nc).Stream(ctx, "KV_"+bucket)
		require.NoError(t, err)
		msg, err := stream.GetLastMsgForSubject(ctx, subject)
		require.NoError(t, err)
		return msg.Header.Get("Nats-TTL")
	}
	require.NoError(t, s.Put("deleted", nil, 0))
	require.NoError(t, s.Delete("deleted"))
	assert.Equal(t, "3600", ttl("$KV.b.deleted", "b"))
	require.NoError(t, mustLock(t, s, "released", time.Minute).Unlock())
	assert.Equal(t, "600", ttl("$KV.b-locks.released", "b-locks"))
	for bucket, left := range map[string]uint64{"b": 1, "b-locks": 1} {
		eventually(t, func() bool {
			stream, err := newJetStream(t, nc).Stream(ctx, "KV_"+bucket)
			return err == nil && stream.CachedInfo().State.Msgs == left
		}, "the server has removed what expired from "+bucket)
	}
}

// TestKilledServer: a server that is killed rebuilds its index from its disk,
// and finds what was removed since it last wrote it: of plain values deleted
// with short-lived markers, 50 of 50 come back.
func TestKilledServer(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a real server process, and seconds")
	}
	t.Parallel()
	p := startProcess(t)
	nc := connect(t, p.url())
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	openStore(t, NATSStoreConfig{Conn: nc, Bucket: "naive"})
	naive := mustKV(t, nc, "naive")
	const n = 20
	key := func(kind string, i int) string { return fmt.Sprintf("%s.%d", kind, i) }
	for i := range n {
		for _, kind := range []string{"deleted", "shortened", "heartbeat"} {
			require.NoError(t, s.Put(key(kind, i), []byte("old"), 0))
		}
		require.NoError(t, s.Put(key("kept", i), []byte("old"), time.Second))
		for _, kind := range []string{"k", "stays", "stays-too"} { // an empty file would be removed
			_, err := naive.PutString(ctx, key(kind, i), "old")
			require.NoError(t, err)
		}
		mustLock(t, s, key("lapsed", i), time.Second)
		l := mustLock(t, s, key("released", i), time.Hour)
		require.NoError(t, l.Unlock())
	}
	for i := range n {
		require.NoError(t, s.Delete(key("deleted", i)))
		require.NoError(t, s.Put(key("shortened", i), []byte("new"), time.Second))
		// The second of them covers less than the first, which must cover.
		require.NoError(t, s.Put(key("heartbeat", i), []byte("new"), time.Second))
		require.NoError(t, s.Put(key("heartbeat", i), []byte("new"), 1500*time.Millisecond))
		require.NoError(t, s.Put(key("kept", i), []byte("new"), 0))
		require.NoError(t, naive.Purge(ctx, key("k", i), jetstream.PurgeTTL(time.Second)))
	}
	time.Sleep(3 * time.Second) // all that is short-lived is gone
	p.kill()
	p.start(t)
	time.Sleep(time.Second) // it serves what has expired for a quarter of one
	back := 0
	for i := range n {
		if _, err := naive.Get(ctx, key("k", i)); err == nil {
			back++
		}
	}
	assert.NotZero(t, back, "the fault was not provoked")
	t.Logf("%d of %d values purged with a marker of one second came back", back, n)
	for i := range n {
		for _, kind := range []string{"deleted", "shortened", "heartbeat"} {
			_, err := s.Get(key(kind, i))
			refuses(t, ErrNotFound, err, key(kind, i))
		}
		assert.Equal(t, "new", string(mustGet(t, s, key("kept", i)).Value))
		for _, name := range []string{"lapsed", "released"} {
			l, err := s.Lock(key(name, i), time.Minute)
			if assert.NoError(t, err, key(name, i)) {
				require.NoError(t, l.Unlock())
			}
		}
	}
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Len(t, keys, n)
}

// TestReplicatedReads: a read sees every write acknowledged before it began,
// from whichever server. With direct gets, which any replica answers, 12 to 19
// of 100 do not.
func TestReplicatedReads(t *testing.T) {
	t.Parallel()
	c := startCluster(t)
	var stores []*NATSStore
	for _, srv := range c.servers {
		stores = append(stores, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3}))
	}
	time.Sleep(3 * time.Second) // until then the leader alone answers direct gets
	follower := (c.leader(t, "b") + 1) % 3
	kv := mustKV(t, connect(t, c.servers[follower].ClientURL()), "b")
	read := map[string]func(key string) (string, error){
		"plain": func(key string) (string, error) {
			entry, err := kv.Get(context.Background(), key)
			if err != nil {
				return "", err
			}
			return string(entry.Value()), nil
		},
		"ours": func(key string) (string, error) {
			value, err := stores[follower].Get(key)
			return string(value), err
		},
	}
	for who, read := range read {
		var stale atomic.Int64
		const writers, each = 16, 150
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					key := fmt.Sprintf("%s.%d", who, w)
					if !assert.NoError(t, stores[(w+i)%3].Put(key, fmt.Append(nil, i), 0)) {
						return
					}
					if got, err := read(key); err != nil || got != fmt.Sprint(i) {
						stale.Add(1)
					}
				}
			})
		}
		wg.Wait()
		t.Logf("%s: %d of %d reads were stale", who, stale.Load(), writers*each)
		if who == "ours" {
			assert.Zero(t, stale.Load())
		}
	}

	for i := range 300 {
		key := fmt.Sprintf("list.%d", i)
		require.NoError(t, stores[i%3].Put(key, nil, 0))
		keys, err := stores[(i+1)%3].Keys("list.*")
		require.NoError(t, err)
		require.Contains(t, keys, key)
		if i%2 == 0 {
			require.NoError(t, stores[(i+2)%3].Delete(key))
			keys, err = stores[i%3].Keys("list.*")
			require.NoError(t, err)
			require.NotContains(t, keys, key)
		}
	}
}

// TestReplacedAroundExpiry: no acknowledged write is lost when a value is
// replaced around its expiry on three replicas. With the server's delete
// markers, 5 in a thousand are, when aimed at: the marker removes whatever the
// subject has.
func TestReplacedAroundExpiry(t *testing.T) {
	if testing.Short() {
		t.Skip("20,000 writes")
	}
	t.Parallel()
	c := startCluster(t)
	var stores []*NATSStore
	for _, srv := range c.servers {
		stores = append(stores, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3}))
	}
	const rounds, keys = 4, 5000
	for round := range rounds {
		var wg sync.WaitGroup
		for w := range 50 {
			s := stores[w%3]
			wg.Go(func() {
				for i := w; i < keys; i += 50 {
					key := fmt.Sprintf("k.%d", i)
					if !assert.NoError(t, s.Put(key, []byte("short"), time.Second)) {
						return
					}
				}
				// The first of them expires a second after it was written.
				time.Sleep(time.Until(time.Now().Truncate(time.Millisecond).Add(time.Duration(w%10) * 20 * time.Millisecond)))
				for i := w; i < keys; i += 50 {
					key := fmt.Sprintf("k.%d", i)
					if !assert.NoError(t, s.Put(key, fmt.Append(nil, round), 0)) {
						return
					}
				}
			})
		}
		wg.Wait()
	}
	time.Sleep(2 * time.Second)
	lost := 0
	listed, err := stores[0].Keys("k.*")
	require.NoError(t, err)
	lost += keys - len(listed)
	for i := range keys {
		if got, err := stores[i%3].Get(fmt.Sprintf("k.%d", i)); err != nil || string(got) != fmt.Sprint(rounds-1) {
			lost++
		}
	}
	assert.Zero(t, lost, "of %d writes", rounds*keys)
}

// TestReplacedBesideMarkers: the same on a bucket that has delete markers, whose
// values are somebody else's, with TTLs that the server ends with a marker.
func TestReplacedBesideMarkers(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	c := startCluster(t)
	ctx := context.Background()
	js := newJetStream(t, connect(t, c.servers[0].ClientURL()))
	var kv jetstream.KeyValue
	placed(t, func() (err error) {
		kv, err = js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b", Replicas: 3, LimitMarkerTTL: time.Minute})
		return err
	})
	var stores []*NATSStore
	for _, srv := range c.servers {
		stores = append(stores, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"}))
	}
	const keys = 1500
	var wg sync.WaitGroup
	for w := range 50 {
		s := stores[w%3]
		first := make(chan struct{})
		wg.Go(func() {
			for i := w; i < keys; i += 50 {
				_, err := kv.Create(ctx, fmt.Sprintf("k.%d", i), []byte("theirs"), jetstream.KeyTTL(time.Second))
				assert.NoError(t, err)
				if i == w {
					close(first)
				}
			}
		})
		wg.Go(func() {
			<-first
			time.Sleep(time.Second + time.Duration(w)*5*time.Millisecond)
			for i := w; i < keys; i += 50 {
				assert.NoError(t, s.Put(fmt.Sprintf("k.%d", i), []byte("ours"), 0))
			}
		})
	}
	wg.Wait()
	time.Sleep(2 * time.Second)
	lost := 0
	for i := range keys {
		if got, err := stores[i%3].Get(fmt.Sprintf("k.%d", i)); err != nil || string(got) != "ours" {
			lost++
		}
	}
	assert.Zero(t, lost, "of %d writes", keys)
}

// TestKeysOfALargeBucket: complete and free of doubles, however large the bucket
// and busy the writers.
func TestKeysOfALargeBucket(t *testing.T) {
	if testing.Short() {
		t.Skip("100,000 keys")
	}
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	const n = 100_000
	js := newJetStream(t, nc)
	for i := range n {
		_, err := js.PublishAsync(fmt.Sprintf("$KV.b.k.%06d", i), []byte("v"), jetstream.WithStallWait(30*time.Second))
		require.NoError(t, err)
	}
	<-js.PublishAsyncComplete()
	var stop atomic.Bool
	var written atomic.Int64
	var wg sync.WaitGroup
	for w := range 4 {
		s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
		wg.Go(func() {
			for i := w; !stop.Load(); i += 4 {
				// All of them over and over, far apart, and some more besides.
				assert.NoError(t, s.Put(fmt.Sprintf("k.%06d", i*7919%n), []byte("w"), 0))
				if i%10 == 0 {
					assert.NoError(t, s.Put(fmt.Sprintf("x.%06d", i%1000), nil, time.Millisecond))
				}
				written.Add(1)
			}
		})
	}
	var took time.Duration
	const listings = 8
	for range listings {
		began := time.Now()
		keys, err := s.Keys("k.*")
		took += time.Since(began)
		require.NoError(t, err)
		require.True(t, slices.IsSorted(keys))
		require.Len(t, keys, n)
		require.Len(t, slices.Compact(keys), n)
	}
	stop.Store(true)
	wg.Wait()
	t.Logf("%d listings of %d keys took %v each while %d writes were made", listings, n, took/listings, written.Load())
}

// TestConsumerIsOffline: the answer to a request for a consumer was lost, and the
// server that made it is down. Those that are up refuse the same request, which
// passes, and another consumer is made.
func TestConsumerIsOffline(t *testing.T) {
	if testing.Short() {
		t.Skip("a cluster")
	}
	t.Parallel()
	c := startCluster(t)
	var urls []string
	for _, srv := range c.servers {
		urls = append(urls, srv.ClientURL())
	}
	s := openStore(t, NATSStoreConfig{Conn: connect(t, strings.Join(urls, ",")), Bucket: "b", Replicas: 3})
	require.NoError(t, s.Put("k", nil, 0))
	want := consumption{filter: "$KV.b.>", from: 1, batch: 10, life: time.Minute}
	made, err := s.data.consume(newBudget(t.Context()), want)
	require.NoError(t, err)
	down := c.consumerLeader(t, "KV_b", made.name)
	c.servers[down].Shutdown()
	c.servers[down].WaitForShutdown()
	t.Cleanup(func() { c.restart(t, down) })

	cfg := consumerConfig{
		Name: made.name, Deliver: "by_start_sequence", StartSeq: 1, Ack: "none", Replay: "instant", Filter: want.filter,
		Inactive: want.life, Replicas: 1, Memory: true,
	}
	eventually(t, func() bool {
		e, err := s.data.connected(newBudget(t.Context()))
		require.NoError(t, err)
		err = made.create(newBudget(t.Context()), e, cfg)
		return apiCode(err) == codeOffline && passing(err)
	}, "the others refuse it")
	keys, err := s.Keys("*")
	require.NoError(t, err)
	assert.Equal(t, []string{"k"}, keys)
}
