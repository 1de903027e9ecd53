package state

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Buckets in another JetStream domain, and in another account.

// startHub runs a server with the domain "hub" that accepts leaf nodes.
func startHub(t testing.TB) *server.Server {
	t.Helper()
	return startServer(t, func(o *server.Options) {
		o.ServerName, o.JetStreamDomain = "hub", "hub"
		o.LeafNode = server.LeafNodeOpts{Host: "127.0.0.1", Port: server.RANDOM_PORT}
	})
}

// startLeaf runs a leaf node of a hub, with a JetStream of its own or without,
// and waits until requests pass.
func startLeaf(t testing.TB, hub *server.Server, name string, jetStream bool) *server.Server {
	t.Helper()
	leaf := startServer(t, func(o *server.Options) {
		o.ServerName, o.JetStream = name, jetStream
		if jetStream {
			o.JetStreamDomain = name
		}
		o.LeafNode.Remotes = []*server.RemoteLeafOpts{{URLs: []*url.URL{{Scheme: "nats-leaf", Host: leafAddr(t, hub)}}}}
	})
	nc := connect(t, leaf.ClientURL())
	eventually(t, func() bool {
		_, err := nc.Request("$JS.hub.API.INFO", nil, time.Second)
		return err == nil
	}, "the leaf node reaches the hub's domain")
	return leaf
}

func leafAddr(t testing.TB, hub *server.Server) string {
	t.Helper()
	v, err := hub.Varz(nil)
	require.NoError(t, err)
	return fmt.Sprintf("127.0.0.1:%d", v.LeafNode.Port)
}

// TestDomain runs the conformance suite with every other client on a leaf node,
// from where it uses the hub's bucket.
func TestDomain(t *testing.T) {
	if testing.Short() {
		t.Skip("the whole suite once more")
	}
	t.Parallel()
	hub := startHub(t)
	servers := []*server.Server{startLeaf(t, hub, "leaf", true), hub, startLeaf(t, hub, "bare", false)}
	var clients atomic.Int64
	b := natsBackend(1)
	b.open = func(t *testing.T) func() Store {
		bucket := newBucketName()
		return func() Store {
			srv := servers[int(clients.Add(1))%len(servers)]
			return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket, Domain: "hub"})
		}
	}
	testConformance(t, b)
}

// TestDomainKeepsApart: buckets of one name in two domains have nothing to do
// with each other.
func TestDomainKeepsApart(t *testing.T) {
	t.Parallel()
	hub := startHub(t)
	leaf := startLeaf(t, hub, "leaf", true)
	nc := connect(t, leaf.ClientURL())
	open := func(domain string) *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b", Domain: domain})
	}
	far, near, own := open("hub"), open("leaf"), open("")
	atHub := openStore(t, NATSStoreConfig{Conn: connect(t, hub.ClientURL()), Bucket: "b"})
	require.NoError(t, far.Put("k", []byte("hub"), 0))
	require.NoError(t, near.Put("k", []byte("leaf"), 0))
	for s, want := range map[*NATSStore]string{far: "hub", near: "leaf", own: "leaf", atHub: "hub"} {
		value, err := s.Get("k")
		require.NoError(t, err)
		assert.Equal(t, want, string(value))
	}
	events, there := mustWatch(t, far, "*"), mustWatch(t, near, "*")
	require.NoError(t, atHub.Put("k", nil, 0))
	assert.Equal(t, "put k", brief(receive(t, events)))
	deliversNext(t, own, there, "end")
	mustLock(t, far, "l", time.Minute)
	_, err := atHub.Lock("l", time.Minute)
	refuses(t, ErrLockHeld, err)
	mustLock(t, near, "l", time.Minute)

	_, err = NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: "b", Domain: "nowhere"})
	require.ErrorIs(t, err, nats.ErrNoResponders)
}

// TestDomainHandsLocksOver: who waits for a lock across a leaf node gets it when
// it is released, not only when the lease ends.
func TestDomainHandsLocksOver(t *testing.T) {
	t.Parallel()
	hub := startHub(t)
	leaf, bare := startLeaf(t, hub, "leaf", true), startLeaf(t, hub, "bare", false)
	at := func(srv *server.Server) *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b", Domain: "hub"})
	}
	for name, c := range map[string]struct{ holder, waiter *server.Server }{
		"leaf to the same leaf": {leaf, leaf},
		"leaf to hub":           {leaf, hub},
		"hub to leaf":           {hub, leaf},
		"leaf to leaf":          {leaf, bare},
		"bare leaf to itself":   {bare, bare},
		"hub to bare leaf":      {hub, bare},
	} {
		t.Run(name, func(t *testing.T) { handsOver(t, at(c.holder), at(c.waiter)) })
	}
}

// handsOver fails unless a waiter gets a lock within seconds of its release,
// and notices refreshes.
func handsOver(t *testing.T, holder, waiter Store) {
	t.Helper()
	key := "lock." + newBucketName()
	const ttl = time.Minute
	held := mustLock(t, holder, key, ttl)
	got := make(chan error, 1)
	go func() {
		l, err := Acquire(context.Background(), waiter, key, ttl)
		if err == nil {
			err = l.Unlock()
		}
		got <- err
	}()
	time.Sleep(300 * time.Millisecond)
	require.NoError(t, held.Refresh())
	select {
	case err := <-got:
		require.Fail(t, "two hold it", "%v", err)
	default:
	}
	require.NoError(t, held.Unlock())
	released := time.Now()
	select {
	case err := <-got:
		require.NoError(t, err)
	case <-time.After(15 * time.Second):
		require.Fail(t, "the waiter does not notice the release")
	}
	t.Logf("handed over after %v", time.Since(released))
}

// startAccounts runs a server with an account that has JetStream and another
// one that imports what is needed of it, under a prefix.
func startAccounts(t testing.TB) *server.Server {
	t.Helper()
	path := filepath.Join(t.TempDir(), "server.conf")
	require.NoError(t, os.WriteFile(path, fmt.Appendf(nil, `
		listen: 127.0.0.1:-1
		jetstream: {store_dir: %q}
		accounts: {
			OWNER: {
				jetstream: enabled
				users: [{user: owner, password: p}]
				exports: [
					{service: "$JS.API.>", response_type: stream}
					{service: "$KV.>"}
				]
			}
			GUEST: {
				users: [{user: guest, password: p}]
				imports: [
					{service: {account: OWNER, subject: "$JS.API.>"}, to: "owner.>"}
					{service: {account: OWNER, subject: "$KV.>"}, to: "owner.$KV.>"}
				]
			}
		}
	`, t.TempDir()), 0o600))
	opts, err := server.ProcessConfigFile(path)
	require.NoError(t, err)
	opts.NoSigs, opts.NoLog = true, true
	return runServer(t, opts)
}

// TestAPIPrefix runs the conformance suite with every other client in an account
// that imports the bucket's.
func TestAPIPrefix(t *testing.T) {
	if testing.Short() {
		t.Skip("the whole suite once more")
	}
	t.Parallel()
	srv := startAccounts(t)
	var clients atomic.Int64
	b := natsBackend(1)
	b.open = func(t *testing.T) func() Store {
		bucket := newBucketName()
		return func() Store {
			if clients.Add(1)%2 == 0 {
				return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.UserInfo("owner", "p")), Bucket: bucket})
			}
			return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.UserInfo("guest", "p")), Bucket: bucket, APIPrefix: "owner"})
		}
	}
	testConformance(t, b)
}

// TestAPIPrefixHandsLocksOver: a waiter in another account hears of no release.
// It looks now and then.
func TestAPIPrefixHandsLocksOver(t *testing.T) {
	t.Parallel()
	srv := startAccounts(t)
	guest := func() *NATSStore {
		return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.UserInfo("guest", "p")), Bucket: "b", APIPrefix: "owner."})
	}
	owner := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL(), nats.UserInfo("owner", "p")), Bucket: "b"})
	t.Run("owner to guest", func(t *testing.T) { handsOver(t, owner, guest()) })
	t.Run("guest to owner", func(t *testing.T) { handsOver(t, guest(), owner) })
	t.Run("guest to guest", func(t *testing.T) { handsOver(t, guest(), guest()) })
}
