package state

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

func TestNATSStoreConformance(t *testing.T) {
	srv := startServer(t, nil)
	testConformance(t, natsBackend(srv, 1))
}

func natsBackend(srv *server.Server, replicas int) backend {
	return backend{
		run: func(t *testing.T, f func(*testing.T)) { t.Parallel(); f(t) },
		open: func(t *testing.T) func() StateStore {
			bucket := newBucketName()
			return func() StateStore {
				return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket, Replicas: replicas})
			}
		},
	}
}

var buckets atomic.Int64

func newBucketName() string { return fmt.Sprintf("bucket-%d", buckets.Add(1)) }

// startServer runs a server with JetStream until the test ends.
func startServer(t testing.TB, change func(*server.Options)) *server.Server {
	t.Helper()
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(),
		NoSigs: true, NoLog: true,
	}
	if change != nil {
		change(opts)
	}
	srv, err := server.NewServer(opts)
	require.NoError(t, err)
	srv.Start()
	require.True(t, srv.ReadyForConnections(20*time.Second), "the server does not start")
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	return srv
}

// connect returns a connection that lasts as long as the test.
func connect(t testing.TB, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	opts = append([]nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(10 * time.Millisecond), nats.ReconnectJitter(0, 0),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, opts...)
	nc, err := nats.Connect(url, opts...)
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	return nc
}

// openStore returns a store that lasts as long as the test.
func openStore(t testing.TB, cfg NATSStoreConfig) *NATSStore {
	t.Helper()
	s, err := NewNATSStore(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}
