package state

import (
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

// Servers, clusters, connections and the ways to disturb them.

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
	return runServer(t, opts)
}

func runServer(t testing.TB, opts *server.Options) *server.Server {
	t.Helper()
	srv, err := server.NewServer(opts)
	require.NoError(t, err)
	srv.Start()
	require.True(t, srv.ReadyForConnections(20*time.Second), "the server does not start")
	t.Cleanup(func() { stopServer(srv) })
	return srv
}

func stopServer(srv *server.Server) {
	srv.Shutdown()
	srv.WaitForShutdown()
}

// A restartable is a server that comes back on its port with its storage.
type restartable struct {
	*server.Server
	opts *server.Options
}

func startRestartable(t testing.TB) *restartable {
	t.Helper()
	opts := &server.Options{
		Host: "127.0.0.1", Port: freePort(t), JetStream: true, StoreDir: t.TempDir(),
		NoSigs: true, NoLog: true,
	}
	return &restartable{runServer(t, opts.Clone()), opts}
}

func (r *restartable) start(t testing.TB) { r.Server = runServer(t, r.opts.Clone()) }

var ports atomic.Uint32

func init() { ports.Store(mathrand.Uint32N(20_000)) }

// freePort returns a port for a server that is to come back on it. It is not one
// that the system gives to a connection or a listener meanwhile: these are above
// 32767.
func freePort(t testing.TB) int {
	t.Helper()
	for range 100 {
		port := 10_000 + int(ports.Add(1)%20_000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			require.NoError(t, l.Close())
			return port
		}
	}
	require.Fail(t, "no port is free")
	return 0
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

// placed makes a stream on several servers. A busy one can briefly seem to be offline
// to the others.
func placed(t testing.TB, create func() error) {
	t.Helper()
	var err error
	eventually(t, func() bool { err = create(); return apiCode(err) != codeNoPeers }, "a place for it")
	require.NoError(t, err)
}

// A cluster is three servers with JetStream in this process.
type cluster struct {
	servers []*server.Server
	opts    []*server.Options
}

func startCluster(t testing.TB) *cluster {
	t.Helper()
	c := &cluster{}
	var routes []*url.URL
	for i := range 3 {
		c.opts = append(c.opts, &server.Options{
			ServerName: fmt.Sprintf("s%d", i), Host: "127.0.0.1", Port: freePort(t),
			JetStream: true, StoreDir: t.TempDir(), NoSigs: true, NoLog: true,
			Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: freePort(t)},
		})
		routes = append(routes, &url.URL{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", c.opts[i].Cluster.Port)})
	}
	for i, opts := range c.opts {
		opts.Routes = routes
		c.servers = append(c.servers, nil)
		c.restart(t, i)
	}
	t.Cleanup(func() {
		for _, srv := range c.servers {
			stopServer(srv)
		}
	})
	c.settle(t)
	// The leader may not have heard of all the others' resources yet.
	nc := connect(t, c.servers[0].ClientURL())
	eventually(t, func() bool {
		answer, err := nc.Request("$JS.API.STREAM.CREATE.probe", []byte(`{"name":"probe","subjects":["probe"],"num_replicas":3,"storage":"memory"}`), 5*time.Second)
		return err == nil && !strings.Contains(string(answer.Data), `"error"`)
	}, "a replicated stream")
	_, err := nc.Request("$JS.API.STREAM.DELETE.probe", nil, 5*time.Second)
	require.NoError(t, err)
	return c
}

// settle waits until the cluster has a leader and all servers are current.
func (c *cluster) settle(t testing.TB) {
	t.Helper()
	ready := func() bool {
		leader := false
		for _, srv := range c.servers {
			leader = leader || srv.JetStreamIsLeader()
			if !srv.JetStreamIsCurrent() || !srv.ReadyForConnections(time.Millisecond) {
				return false
			}
		}
		return leader
	}
	for end := time.Now().Add(60 * time.Second); !ready(); time.Sleep(20 * time.Millisecond) {
		require.True(t, time.Now().Before(end), "the cluster does not settle")
	}
}

func (c *cluster) restart(t testing.TB, i int) {
	t.Helper()
	srv, err := server.NewServer(c.opts[i].Clone())
	require.NoError(t, err)
	srv.Start()
	c.servers[i] = srv
}

// leader returns the index of the server that leads a bucket's stream.
func (c *cluster) leader(t testing.TB, bucket string) int {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for i, srv := range c.servers {
			if srv.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, "KV_"+bucket) {
				return i
			}
		}
	}
	require.FailNow(t, "the stream has no leader")
	return 0
}

// consumerLeader returns the index of the server that a consumer is on.
func (c *cluster) consumerLeader(t testing.TB, stream, consumer string) int {
	t.Helper()
	for i, srv := range c.servers {
		if srv.JetStreamIsConsumerLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream, consumer) {
			return i
		}
	}
	require.FailNow(t, "the consumer is nowhere")
	return 0
}

// stepDown makes another server lead a bucket's stream. Between two leaders
// nobody answers.
func (c *cluster) stepDown(t testing.TB, nc *nats.Conn, bucket string) {
	t.Helper()
	eventually(t, func() bool {
		_, err := nc.Request("$JS.API.STREAM.LEADER.STEPDOWN.KV_"+bucket, nil, time.Second)
		return err == nil
	}, "a step-down")
}

// A process is a real nats-server, built from the module, that can be killed.
type process struct {
	bin, dir string
	port     int
	cmd      *exec.Cmd
}

var serverDir string // TestMain removes it

var serverBinary = sync.OnceValues(func() (string, error) {
	var err error
	if serverDir, err = os.MkdirTemp("", "nats-server"); err != nil {
		return "", err
	}
	bin := filepath.Join(serverDir, "nats-server")
	out, err := exec.Command("go", "build", "-o", bin, "github.com/nats-io/nats-server/v2").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return bin, nil
})

func startProcess(t testing.TB) *process {
	t.Helper()
	bin, err := serverBinary()
	require.NoError(t, err)
	p := &process{bin: bin, dir: t.TempDir(), port: freePort(t)}
	p.start(t)
	t.Cleanup(p.kill)
	return p
}

func (p *process) url() string { return fmt.Sprintf("nats://127.0.0.1:%d", p.port) }

func (p *process) start(t testing.TB) {
	t.Helper()
	p.cmd = exec.Command(p.bin, "-a", "127.0.0.1", "-p", fmt.Sprint(p.port), "-js", "-sd", p.dir)
	p.cmd.Stderr = io.Discard
	require.NoError(t, p.cmd.Start())
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		nc, err := nats.Connect(p.url())
		if err == nil {
			nc.Close()
			return
		}
		require.True(t, time.Now().Before(end), "the server process does not start")
	}
}

// kill is kill -9.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// A witness is told who counts on a lock, and counts what must not happen:
// that two do at a time, or that a token does not grow.
type witness struct {
	mu         sync.Mutex // guards what follows
	holder     *claim
	highest    uint64
	cycles     int
	violations int
}

// A claim is one holder's. He counts on the lock until then by his own clock,
// and no longer, whatever he is stuck in.
type claim struct{ until time.Time }

// begin says that a holder who asked then begins to work. It returns nil if it
// was granted too late to be of use.
func (w *witness) begin(l Lock, asked time.Time, ttl time.Duration) *claim {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, now := &claim{asked.Add(ttl)}, time.Now()
	if !now.Before(c.until) {
		return nil
	}
	token := l.(Fenced).Token()
	if w.holder != nil && now.Before(w.holder.until) || token <= w.highest {
		w.violations++
	}
	w.cycles++
	w.holder, w.highest = c, max(token, w.highest)
	return c
}

// extend says that his lease was refreshed, for which he asked then.
func (w *witness) extend(c *claim, asked time.Time, ttl time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.until = asked.Add(ttl)
	w.check(c)
}

// end says that he stops working. It reports whether his lease had not lapsed.
func (w *witness) end(c *claim) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	counted := w.check(c)
	if w.holder == c {
		w.holder = nil
	}
	return counted
}

// check reports whether a holder still counts on the lock. Then it must be his.
func (w *witness) check(c *claim) bool {
	counted := time.Now().Before(c.until)
	if counted && w.holder != c {
		w.violations++
	}
	return counted
}
