package state

import (
	"flag"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/stretchr/testify/require"
)

// TestMain has more tests run at a time than there are processors: they spend
// their time waiting, for deadlines and for servers.
func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "10"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(serverDir)
	os.Exit(code)
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

// lookAtSettings looks at the bucket's settings if they are no longer new. On a slow
// machine a request that is to be counted would do it, too.
func lookAtSettings(t *testing.T, s *NATSStore) {
	t.Helper()
	if time.Since(s.data.settings.Load().checked) > settingsLife/2 {
		_, err := s.data.info(newBudget(t.Context()))
		require.NoError(t, err)
	}
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
