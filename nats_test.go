package state

import (
	"flag"
	"os"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
)

// TestMain has more tests run at a time than there are processors: they spend
// their time waiting, for deadlines and for servers.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "10"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

func TestNATSStoreConformance(t *testing.T) {
	t.Parallel()
	testConformance(t, natsBackend(1, startServer(t, nil)))
}

// TestNATSStoreConformanceReplicated runs the suite on three replicas, with the
// clients spread over the servers.
func TestNATSStoreConformanceReplicated(t *testing.T) {
	t.Parallel()
	testConformance(t, natsBackend(3, startCluster(t).servers...))
}

func natsBackend(replicas int, servers ...*server.Server) backend {
	var clients atomic.Int64
	return backend{
		run: func(t *testing.T, f func(*testing.T)) { t.Parallel(); f(t) },
		open: func(t *testing.T) func() Store {
			bucket := newBucketName()
			return func() Store {
				srv := servers[int(clients.Add(1))%len(servers)]
				return openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket, Replicas: replicas})
			}
		},
	}
}
