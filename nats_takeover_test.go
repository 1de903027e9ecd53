package state

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// While a leader that was cut off comes back, there are two: each of them gets a
// request, and the first answer counts. In these tests a relay answers for the one that
// was cut off.

// request makes a request that somebody else made, and returns the answer.
func request(t testing.TB, nc *nats.Conn, msg *nats.Msg) []byte {
	answer, err := nc.RequestMsg(&nats.Msg{Subject: msg.Subject, Header: msg.Header, Data: msg.Data}, 10*time.Second)
	if !assert.NoError(t, err) {
		return nil
	}
	return answer.Data
}

// store has the leader that was elected store a write. It must not refuse that.
func store(t testing.TB, nc *nats.Conn, msg *nats.Msg) {
	assert.NotContains(t, string(request(t, nc, msg)), `"error"`)
}

// openThrough opens a store whose requests a relay passes on, and another one beside
// it. A relay does not hear that nobody can be reached yet, so the first requests to a
// new bucket may have to be repeated.
func openThrough(t *testing.T, srv *server.Server) (through, beside *NATSStore) {
	t.Helper()
	through = openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3, APIPrefix: "through"})
	require.NoError(t, through.Put("ready", nil, 0))
	require.NoError(t, mustLock(t, through, "ready", time.Minute).Unlock())
	return through, openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
}

const underWay = `{"error":{"code":400,"err_code":10164,"description":"expected last sequence per subject temporarily unavailable"},"stream":"","seq":0}`

// TestBusyWhileLeadersChange: the leader that was cut off refuses a write because one
// that never ends is under way to the key. The other one stores it, but late: a read
// does not find it yet, and then a second attempt is refused.
func TestBusyWhileLeadersChange(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	var busy atomic.Bool // the next write is refused by one of them
	var late atomic.Pointer[nats.Msg]
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$KV.") {
			if busy.CompareAndSwap(true, false) {
				late.Store(msg)
				_ = nc.Publish(msg.Reply, []byte(underWay))
				return
			}
			if first := late.Swap(nil); first != nil {
				store(t, nc, first)
			}
		}
		_ = nc.PublishMsg(msg)
	})
	s, other := openThrough(t, srv)
	require.NoError(t, s.Put("k", []byte("0"), 0))
	l := mustLock(t, s, "l", time.Minute)
	for _, c := range []struct {
		name string
		call func() error
	}{
		{"Put", func() error { return s.Put("k", []byte("1"), 0) }},
		{"Update", func() error { _, err := s.Update("k", []byte("2"), 0, mustGet(t, other, "k").Revision); return err }},
		{"DeleteRevision", func() error { return s.DeleteRevision("k", mustGet(t, other, "k").Revision) }},
		{"Update to create", func() error { _, err := s.Update("new", []byte("3"), 0, 0); return err }},
		{"Delete", func() error { return s.Delete("new") }},
		{"Refresh", l.Refresh},
		{"Unlock", l.Unlock},
		{"Lock", func() error { _, err := s.Lock("l", time.Minute); return err }},
	} {
		before := writesSoFar(t, srv)
		busy.Store(true)
		require.NoError(t, c.call(), c.name)
		require.False(t, busy.Load(), c.name)
		require.Nil(t, late.Load(), c.name)
		assert.Equal(t, before+1, writesSoFar(t, srv), "%s writes once", c.name)
	}
	_, err := other.Get("k")
	refuses(t, ErrNotFound, err)
	_, err = other.Get("new")
	refuses(t, ErrNotFound, err)
	_, err = other.Lock("l", time.Minute)
	refuses(t, ErrLockHeld, err)
}

// writesSoFar returns the number of writes to the buckets so far.
func writesSoFar(t testing.TB, srv *server.Server) (writes uint64) {
	t.Helper()
	nc, err := nats.Connect(srv.ClientURL())
	require.NoError(t, err)
	defer nc.Close()
	for _, stream := range []string{"KV_b", "KV_b-locks"} {
		var info struct {
			State struct {
				LastSeq uint64 `json:"last_seq"`
			} `json:"state"`
		}
		require.NoError(t, json.Unmarshal(request(t, nc, &nats.Msg{Subject: "$JS.API.STREAM.INFO." + stream}), &info))
		writes += info.State.LastSeq
	}
	return writes
}

// TestReleasedAndTakenWhileLeadersChange: one of two leaders refuses the release of a
// lock, the other stores it, and somebody else acquires the lock at once. The holder
// cannot know whether it has released it, and does not say that it had lost it.
func TestReleasedAndTakenWhileLeadersChange(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Replicas: 3})
	var busy, stored atomic.Bool
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		if !strings.HasPrefix(msg.Subject, "$KV.") || !busy.CompareAndSwap(true, false) {
			_ = nc.PublishMsg(msg)
			return
		}
		if stored.Load() {
			store(t, nc, msg)
			_, err := other.Lock("l", time.Minute)
			assert.NoError(t, err)
		}
		_ = nc.Publish(msg.Reply, []byte(underWay))
	})
	s, _ := openThrough(t, srv)
	l := mustLock(t, s, "l", time.Minute)
	busy.Store(true)
	stored.Store(true)
	err := l.Unlock()
	assert.ErrorIs(t, err, ErrOutcomeUnknown)
	require.False(t, busy.Load())
	refuses(t, ErrLockNotHeld, l.Unlock())

	// What replaced the lease itself shows that the lock was lost.
	refuses(t, ErrLockHeld, errOf(s.Lock("l", time.Minute)))
	taken := mustLock(t, s, "taken", time.Minute)
	kv, err := newJetStream(t, connect(t, srv.ClientURL())).KeyValue(t.Context(), "b-locks")
	require.NoError(t, err)
	_, err = kv.Update(t.Context(), "taken", []byte("mine"), taken.(Fenced).Token())
	require.NoError(t, err)
	busy.Store(true)
	stored.Store(false)
	refuses(t, ErrLockNotHeld, taken.Unlock())
	require.False(t, busy.Load())
}

func errOf[T any](_ T, err error) error { return err }

// TestCreatedOverALapsedValue: a value has expired, and one of two leaders has
// removed it already. It refuses a write over it, which the other one stores, and does
// not find what is stored.
func TestCreatedOverALapsedValue(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	var armed, blind, removed atomic.Bool
	var late atomic.Pointer[nats.Msg]
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		switch expected := msg.Header.Get(headerExpected); {
		case strings.HasPrefix(msg.Subject, "$KV.") && strings.Trim(expected, "0") != "" && armed.CompareAndSwap(true, false):
			late.Store(msg)
			blind.Store(true)
			_ = nc.Publish(msg.Reply, []byte(`{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 0"},"stream":"","seq":0}`))
			return
		case strings.HasPrefix(msg.Subject, "$JS.API.STREAM.MSG.GET") && blind.CompareAndSwap(true, false):
			_ = nc.Publish(msg.Reply, []byte(`{"type":"io.nats.jetstream.api.v1.stream_msg_get_response","error":{"code":404,"err_code":10037,"description":"no message found"}}`))
			return
		}
		if first := late.Swap(nil); first != nil && strings.Contains(string(request(t, nc, first)), `"error"`) {
			removed.Store(true) // the other leader has removed it as well
		}
		_ = nc.PublishMsg(msg)
	})
	s, other := openThrough(t, srv)
	for name, c := range map[string]struct{ leave, call func(key string) error }{
		"Lock": {
			func(key string) error { return errOf(other.Lock(key, 200*time.Millisecond)) },
			func(key string) error { return errOf(s.Lock(key, time.Minute)) },
		},
		"Update": {
			func(key string) error { return s.Put(key, nil, 200*time.Millisecond) },
			func(key string) error { return errOf(s.Update(key, []byte("v"), time.Minute, 0)) },
		},
	} {
		// The server removes what has expired after a second or more. If that was sooner,
		// there was nothing to refuse.
		met := false
		for round := 0; round < 10 && !met; round++ {
			key := strings.Repeat("k", round+1)
			if err := c.leave(key); !errors.Is(err, ErrLockExpired) {
				require.NoError(t, err)
			}
			time.Sleep(220 * time.Millisecond)
			armed.Store(true)
			removed.Store(false)
			require.NoError(t, c.call(key), name)
			met = !armed.Load() && !removed.Load()
		}
		assert.True(t, met, name)
	}
}

// TestUpdateOfWhatTheLeaderLacks: a watch has reported a revision that the leader has
// not applied yet. An Update on top of it does not conflict.
func TestUpdateOfWhatTheLeaderLacks(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	old := newOldAnswers(t, srv)
	s, other := openThrough(t, srv)
	require.NoError(t, other.Put("k", []byte("0"), 0))
	require.Equal(t, "0", string(mustGet(t, s, "k").Value))
	for range 3 {
		old.remember("KV_b", "k")
		require.NoError(t, other.Put("k", []byte("1"), 0))
		revision := mustGet(t, other, "k").Revision
		old.reads.Store(2)
		old.infos.Store(1)
		_, err := s.Update("k", []byte("2"), 0, revision)
		require.NoError(t, err)
		require.Negative(t, old.reads.Load())
		require.NoError(t, other.Put("k", []byte("3"), 0))
		_, err = s.Update("k", []byte("4"), 0, revision)
		refuses(t, ErrConflict, err)
	}
}

// oldAnswers are what a leader that was cut off says.
type oldAnswers struct {
	t            *testing.T
	nc           *nats.Conn
	read, info   atomic.Pointer[[]byte]
	reads, infos atomic.Int64 // how many are still answered so
}

// newOldAnswers runs a relay that answers the next reads and questions for the state
// of the stream with what remember saw.
func newOldAnswers(t *testing.T, srv *server.Server) *oldAnswers {
	o := &oldAnswers{t: t, nc: connect(t, srv.ClientURL())}
	relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
		switch {
		case strings.HasPrefix(msg.Subject, "$JS.API.STREAM.MSG.GET") && o.reads.Load() >= 0 && o.reads.Add(-1) >= 0:
			_ = nc.Publish(msg.Reply, *o.read.Load())
		case strings.HasPrefix(msg.Subject, "$JS.API.STREAM.INFO") && o.infos.Load() >= 0 && o.infos.Add(-1) >= 0:
			_ = nc.Publish(msg.Reply, *o.info.Load())
		default:
			_ = nc.PublishMsg(msg)
		}
	})
	o.reads.Store(-1)
	o.infos.Store(-1)
	return o
}

func (o *oldAnswers) remember(stream, key string) {
	o.t.Helper()
	subject := "$KV." + strings.TrimPrefix(stream, "KV_") + "." + key
	read := request(o.t, o.nc, &nats.Msg{Subject: "$JS.API.STREAM.MSG.GET." + stream, Data: []byte(`{"last_by_subj":"` + subject + `"}`)})
	info := request(o.t, o.nc, &nats.Msg{Subject: "$JS.API.STREAM.INFO." + stream})
	require.NotContains(o.t, string(read), `"error"`)
	o.read.Store(&read)
	o.info.Store(&info)
}

// TestStaleForLong: a leader that was cut off has answered for a while when another one
// begins to. An old answer is doubted from then on, not from its first one.
func TestStaleForLong(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	old := newOldAnswers(t, srv)
	s, _ := openThrough(t, srv)
	for round := 0; ; round++ {
		require.NoError(t, s.Put("k", []byte("1"), 0))
		old.remember("KV_b", "k")
		require.NoError(t, s.Put("k", []byte("2"), 0))
		old.reads.Store(1 << 30)
		old.infos.Store(1 << 30)
		got := make(chan []byte)
		go func() {
			value, err := s.Get("k")
			assert.NoError(t, err)
			got <- value
		}()
		time.Sleep(doubtFor + 500*time.Millisecond) // it is old for so long
		asked := old.reads.Load()
		changed := time.Now()
		old.infos.Store(-1) // from now on the other one answers this,
		eventually(t, func() bool { return old.reads.Load() < asked-2 }, "it goes on")
		old.reads.Store(-1) // and then this
		value := <-got
		if time.Since(changed) > doubtFor && round < 5 {
			continue // the machine was busy
		}
		assert.Equal(t, "2", string(value))
		return
	}
}

// TestUnlockAfterCloseAtAStaleLeader: Unlock after Close knows as much as the store
// did.
func TestUnlockAfterCloseAtAStaleLeader(t *testing.T) {
	t.Parallel()
	srv := startCluster(t).servers[0]
	old := newOldAnswers(t, srv)
	s, other := openThrough(t, srv)
	require.NoError(t, mustLock(t, other, "l", time.Minute).Unlock())
	old.remember("KV_b-locks", "l")
	l := mustLock(t, s, "l", time.Minute).(*lease)
	l.inDoubt = true
	require.NoError(t, s.Close())
	old.reads.Store(2)
	require.NoError(t, l.Unlock())
	require.Negative(t, old.reads.Load())
	require.NoError(t, mustLock(t, other, "l", time.Minute).Unlock())
}

// TestUnlockWhileClosing: a store is closed while it releases a lock. The release is
// not lost with it.
func TestUnlockWhileClosing(t *testing.T) {
	t.Parallel()
	for name, stored := range map[string]bool{"answer lost": true, "request lost": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			var closing atomic.Pointer[NATSStore]
			relay(t, srv, func(nc *nats.Conn, msg *nats.Msg) {
				if strings.HasPrefix(msg.Subject, "$KV.") {
					if s := closing.Swap(nil); s != nil {
						if stored {
							store(t, nc, msg)
						}
						assert.NoError(t, s.Close())
						return
					}
				}
				_ = nc.PublishMsg(msg)
			})
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", APIPrefix: "through"})
			l := mustLock(t, s, "l", time.Minute)
			closing.Store(s)
			require.NoError(t, l.Unlock())
			require.Nil(t, closing.Load())
			other := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
			require.NoError(t, mustLock(t, other, "l", time.Minute).Unlock())
		})
	}
}

// TestRefreshThatWasNotSent: a Refresh that cannot be sent leaves no doubt. Once the
// lease has lapsed, Unlock asks nobody.
func TestRefreshThatWasNotSent(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	withLongerTTL(t, 300*time.Millisecond, func(ttl time.Duration) bool {
		ctx, cancel := context.WithCancel(context.Background())
		l := mustLock(t, s.WithContext(ctx), fmt.Sprintf("l.%d", ttl), ttl)
		cancel()
		if err := l.Refresh(); err == ErrLockExpired { //nolint:errorlint // bare
			return false
		} else {
			require.ErrorIs(t, err, context.Canceled)
		}
		time.Sleep(ttl)
		requests := s.Stats().Requests
		refuses(t, ErrLockNotHeld, l.Unlock())
		assert.Equal(t, requests, s.Stats().Requests)
		return true
	})
}
