package proof

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"example.com/state"
)

// A cluster is one nats-server or several, in this process or each in one of
// its own. Every client reaches every server through a proxy of its own, and so
// does every server every other one.
type cluster struct {
	nodes  []*node
	routes map[[2]int]*proxy // from a node to another
	admin  *nats.Conn        // to all servers, and through no proxy

	account  *account        // that all clients log in to; nil if they need not
	distance func() distance // of the next client; nil for none
	options  func() []nats.Option

	journal journal

	mu      sync.Mutex // guards what follows
	clients []*client
	links   [][]*proxy
}

// A journal keeps what stores log.
type journal struct {
	mu     sync.Mutex // guards what follows
	lines  []string
	stores int
}

// Write keeps a line.
func (j *journal) Write(line []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, string(line))
	return len(line), nil
}

// logger returns a logger for one more store.
func (j *journal) logger() *slog.Logger {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stores++
	return slog.New(slog.NewTextHandler(j, nil)).With("store", j.stores-1)
}

// String returns what was logged last.
func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines[max(0, len(j.lines)-300):], "")
}

// A node is one server, which can be stopped and started again.
type node struct {
	name   string
	conf   string // the configuration file
	fixed  string // the part of it that stays as it is
	binary string // empty for a server in this process
	addr   string // for clients

	mu  sync.Mutex // guards what follows
	srv *server.Server
	cmd *exec.Cmd
}

// A client is a connection through proxies.
type client struct {
	nc    *nats.Conn
	links []*proxy
}

var lastPort atomic.Uint32

func init() { lastPort.Store(rand.Uint32N(20_000)) }

// freePorts returns ports for servers that come back on them. They are not among
// those that the system gives to connections and listeners meanwhile: these are
// above 32767.
func freePorts(n int) ([]int, error) {
	ports := make([]int, n)
	for i := range ports {
		for ports[i] == 0 {
			port := 10_000 + int(lastPort.Add(1)%20_000)
			l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			switch {
			case err == nil:
				ports[i] = port
				l.Close()
			case !errors.Is(err, syscall.EADDRINUSE):
				return nil, err
			}
		}
	}
	return ports, nil
}

// serverBinary builds the nats-server of this module's version.
var serverBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "proof-server-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "nats-server")
	out, err := exec.Command("go", "build", "-o", path, "github.com/nats-io/nats-server/v2").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building nats-server: %w\n%s", err, out)
	}
	binaryDir = dir
	return path, nil
})

var binaryDir string

// startCluster starts servers, in processes of their own if that is asked for,
// and stops them when the test ends.
func startCluster(t testing.TB, size int, processes bool) *cluster {
	t.Helper()
	return startClusterWith(t, size, processes, nil)
}

// startClusterWith is startCluster with an account.
func startClusterWith(t testing.TB, size int, processes bool, a *account) *cluster {
	t.Helper()
	c := &cluster{routes: map[[2]int]*proxy{}, account: a}
	t.Cleanup(c.stop)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	binary := ""
	if processes {
		var err error
		binary, err = serverBinary()
		must(err)
	}
	ports, err := freePorts(2 * size)
	must(err)
	dir := t.TempDir()
	for i := range size {
		var routes []string
		for j := range size {
			if i == j {
				continue
			}
			p, err := newProxy(fmt.Sprintf("127.0.0.1:%d", ports[size+j]), distance{})
			must(err)
			c.routes[[2]int{i, j}] = p
			routes = append(routes, "nats-route://"+p.addr())
		}
		n := &node{
			name: fmt.Sprintf("n%d", i), binary: binary,
			conf: filepath.Join(dir, fmt.Sprintf("n%d.conf", i)),
			addr: fmt.Sprintf("127.0.0.1:%d", ports[i]),
		}
		conf := fmt.Sprintf("server_name: %s\nlisten: %q\njetstream { store_dir: %q, max_file_store: 4GB, max_memory_store: 1GB }\n",
			n.name, n.addr, filepath.Join(dir, n.name))
		if size > 1 {
			// The advertised address leads nowhere, so that servers find each
			// other through the proxies alone.
			conf += fmt.Sprintf("cluster { name: proof, listen: \"127.0.0.1:%d\", no_advertise: true, advertise: \"127.0.0.1:1\", pool_size: -1, routes: [%s] }\n",
				ports[size+i], strings.Join(routes, ", "))
		}
		n.fixed = conf
		must(n.configure(a))
		c.nodes = append(c.nodes, n)
	}
	urls := make([]string, size)
	for i, n := range c.nodes {
		must(n.start())
		urls[i] = "nats://" + n.addr
	}
	deadline := time.Now().Add(90 * time.Second)
	for c.admin == nil {
		c.admin, err = nats.Connect(strings.Join(urls, ","), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond),
			nats.IgnoreDiscoveredServers(), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
			nats.UserInfo("admin", "admin"))
		if err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	for !c.up() || !c.whole() {
		if time.Now().After(deadline) {
			t.Fatal("the servers do not come up")
		}
		time.Sleep(50 * time.Millisecond)
	}
	return c
}

// up reports whether JetStream answers.
func (c *cluster) up() bool {
	js, err := jetstream.New(c.admin)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err = js.AccountInfo(ctx)
	return err == nil
}

// whole reports whether every server is there to have a replica placed on it.
func (c *cluster) whole() bool {
	if len(c.nodes) == 1 {
		return true
	}
	config := fmt.Sprintf(`{"name":"WHOLE","subjects":["whole"],"storage":"memory","num_replicas":%d}`, len(c.nodes))
	answer, err := c.admin.Request("$JS.API.STREAM.CREATE.WHOLE", []byte(config), 2*time.Second)
	if err != nil || strings.Contains(string(answer.Data), `"error"`) {
		return false
	}
	_, err = c.admin.Request("$JS.API.STREAM.DELETE.WHOLE", nil, 2*time.Second)
	return err == nil
}

func (n *node) start() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.binary != "" {
		cmd := exec.Command(n.binary, "-c", n.conf, "-l", n.conf+".log")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			return err
		}
		n.cmd = cmd
		return nil
	}
	opts, err := server.ProcessConfigFile(n.conf)
	if err != nil {
		return err
	}
	opts.NoLog, opts.NoSigs = true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		return err
	}
	srv.Start()
	n.srv = srv
	return nil
}

// stop ends the server in good order, or kills it, which only a process can be.
func (n *node) stop(kill bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.srv != nil:
		n.srv.Shutdown()
		n.srv.WaitForShutdown()
		n.srv = nil
	case n.cmd != nil:
		signal := syscall.SIGTERM
		if kill {
			signal = syscall.SIGKILL
		}
		_ = n.cmd.Process.Signal(signal)
		_ = n.cmd.Wait()
		n.cmd = nil
	}
}

// pause stops the process without its noticing.
func (n *node) pause(d time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return
	}
	_ = n.cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(d)
	_ = n.cmd.Process.Signal(syscall.SIGCONT)
}

func (c *cluster) stop() {
	c.mu.Lock()
	for _, cl := range c.clients {
		cl.nc.Close()
	}
	links := c.links
	c.mu.Unlock()
	if c.admin != nil {
		c.admin.Close()
	}
	for _, n := range c.nodes {
		n.stop(true)
	}
	for _, p := range c.routes {
		p.close()
	}
	for _, l := range links {
		for _, p := range l {
			p.close()
		}
	}
}

// connect returns a new client.
func (c *cluster) connect() (*client, error) {
	cl := &client{}
	var urls []string
	var d distance
	if c.distance != nil {
		d = c.distance()
	}
	for _, n := range c.nodes {
		p, err := newProxy(n.addr, d)
		if err != nil {
			return nil, err
		}
		cl.links = append(cl.links, p)
		urls = append(urls, "nats://"+p.addr())
	}
	c.mu.Lock()
	c.links = append(c.links, cl.links)
	number := len(c.links)
	c.mu.Unlock()
	opts := []nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond), nats.ReconnectJitter(0, 0),
		nats.IgnoreDiscoveredServers(), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}
	if number%2 == 0 { // some notice a dead link soon, some do not
		opts = append(opts, nats.PingInterval(500*time.Millisecond))
	}
	if c.account != nil {
		opts = append(opts, nats.UserInfoHandler(c.account.login), nats.IgnoreAuthErrorAbort())
	}
	if c.options != nil {
		opts = append(opts, c.options()...)
	}
	var err error
	if cl.nc, err = nats.Connect(strings.Join(urls, ","), opts...); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.clients = append(c.clients, cl)
	c.mu.Unlock()
	return cl, nil
}

// open returns a new store on a connection of its own, and what opens further
// ones on it.
func (c *cluster) open(bucket string) (s state.Store, again func() (state.Store, error), err error) {
	cl, err := c.connect()
	if err != nil {
		return nil, nil, err
	}
	logger := c.journal.logger()
	again = func() (state.Store, error) {
		return state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: bucket, Replicas: len(c.nodes), Logger: logger})
	}
	err = eventually(20*time.Second, func() error {
		s, err = again()
		return err
	})
	return s, again, err
}

// leader returns the number of the stream's leader, -1 if there is none.
func (c *cluster) leader(stream string) (number int, current bool) {
	if len(c.nodes) == 1 {
		return 0, c.up()
	}
	answer, err := c.admin.Request("$JS.API.STREAM.INFO."+stream, nil, time.Second)
	if err != nil {
		return -1, false
	}
	var info struct {
		Config struct {
			Replicas int `json:"num_replicas"`
		} `json:"config"`
		Cluster struct {
			Leader   string `json:"leader"`
			Replicas []struct {
				Current bool `json:"current"`
				Offline bool `json:"offline"`
			} `json:"replicas"`
		} `json:"cluster"`
	}
	if json.Unmarshal(answer.Data, &info) != nil {
		return -1, false
	}
	current = len(info.Cluster.Replicas) == info.Config.Replicas-1
	for _, r := range info.Cluster.Replicas {
		current = current && r.Current && !r.Offline
	}
	for i, n := range c.nodes {
		if n.name == info.Cluster.Leader {
			return i, current
		}
	}
	return -1, false
}

// recover waits until the stream has a leader and all its replicas are current.
func (c *cluster) recover(ctx context.Context, streams ...string) {
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		well := true
		for _, stream := range streams {
			leader, current := c.leader(stream)
			well = well && leader >= 0 && current
		}
		if well {
			return
		}
	}
}

// isolate cuts a server off from the others, but not from its clients.
func (c *cluster) isolate(number int, change func(*proxy)) {
	for pair, p := range c.routes {
		if pair[0] == number || pair[1] == number {
			change(p)
		}
	}
}
