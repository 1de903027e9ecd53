package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.etcd.io/etcd/server/v3/embed"
)

// serveEnv makes this program one of the servers.
const (
	serveEnv        = "STATE_BENCH_SERVE"
	serveDirEnv     = "STATE_BENCH_DIR"
	serveProfileEnv = "STATE_BENCH_PROFILE"
)

// serve runs a server until the standard input ends, and so no longer than the
// process that started it. It prints where it listens.
func serve(kind string) {
	dir := os.Getenv(serveDirEnv)
	start := map[string]func(dir string) (string, func(), error){"nats": serveNATS, "etcd": serveEtcd}[kind]
	address, stop, err := start(dir)
	if err != nil {
		log.Fatal(err)
	}
	if path := os.Getenv(serveProfileEnv); path != "" && kind == "nats" {
		defer startProfile(path)()
	}
	fmt.Println(address)
	_, _ = io.Copy(io.Discard, os.Stdin)
	stop()
}

// serveNATS runs a nats-server as it comes, with a responder that sends back
// what it gets.
func serveNATS(dir string) (string, func(), error) {
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true,
	})
	if err != nil {
		return "", nil, err
	}
	srv.Start()
	if !srv.ReadyForConnections(20 * time.Second) {
		return "", nil, fmt.Errorf("nats-server does not start")
	}
	nc, err := nats.Connect("", nats.InProcessServer(srv))
	if err != nil {
		return "", nil, err
	}
	if _, err := nc.Subscribe("echo", func(msg *nats.Msg) { _ = msg.Respond(msg.Data) }); err != nil {
		return "", nil, err
	}
	if err := nc.Flush(); err != nil {
		return "", nil, err
	}
	return srv.ClientURL(), srv.Shutdown, nil
}

// serveEtcd runs one member that does not wait for the disk at each write, as
// the others do not either.
func serveEtcd(dir string) (string, func(), error) {
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.LogLevel = "error"
	cfg.LogOutputs = []string{filepath.Join(dir, "log")}
	cfg.UnsafeNoFsync = true
	client, peer := freeURL(), freeURL()
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return "", nil, err
	}
	select {
	case <-e.Server.ReadyNotify():
		return client.String(), e.Close, nil
	case err := <-e.Err():
		return "", nil, err
	case <-time.After(20 * time.Second):
		return "", nil, fmt.Errorf("etcd does not start")
	}
}

func freeAddress() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func freeURL() url.URL { return url.URL{Scheme: "http", Host: freeAddress()} }

// start runs this program as a server, and returns where it listens.
func (r *run) start(kind string) (address string, pid int, err error) {
	dir, err := os.MkdirTemp("", "state-bench-"+kind)
	if err != nil {
		return "", 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return "", 0, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), serveEnv+"="+kind, serveDirEnv+"="+dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return "", 0, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", 0, err
	}
	if err := cmd.Start(); err != nil {
		return "", 0, err
	}
	r.stops = append(r.stops, func() {
		_ = stdin.Close()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		return "", 0, fmt.Errorf("%s does not start", kind)
	}
	return strings.TrimSpace(line), cmd.Process.Pid, nil
}

// connect returns a connection of its own to the nats-server, which it starts
// if need be.
func (r *run) connect() (*nats.Conn, error) {
	if r.nats == "" {
		address, _, err := r.start("nats")
		if err != nil {
			return nil, err
		}
		r.nats = address
	}
	nc, err := nats.Connect(r.nats)
	if err != nil {
		return nil, err
	}
	r.stops = append(r.stops, nc.Close)
	return nc, nil
}

// startRedis runs a redis-server without persistence. It returns "" and a
// reason if there is none on this machine.
func (r *run) startRedis() (address, missing string, err error) {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return "", "no redis-server on the PATH", nil
	}
	dir, err := os.MkdirTemp("", "state-bench-redis")
	if err != nil {
		return "", "", err
	}
	address = freeAddress()
	host, port, _ := net.SplitHostPort(address)
	cmd := exec.Command(path, "--bind", host, "--port", port, "--save", "", "--appendonly", "no", "--dir", dir)
	if err := cmd.Start(); err != nil {
		return "", "", err
	}
	r.stops = append(r.stops, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	for range 200 {
		if conn, err := net.Dial("tcp", address); err == nil {
			return address, "", conn.Close()
		}
		time.Sleep(25 * time.Millisecond)
	}
	return "", "", fmt.Errorf("redis-server does not answer on %s", address)
}
