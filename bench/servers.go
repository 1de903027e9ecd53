package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.etcd.io/etcd/server/v3/embed"
)

// The environment makes this program one of the processes that are measured.
const (
	serveEnv        = "STATE_BENCH_SERVE" // what it is: nats, etcd, proxy or fleet
	serveDirEnv     = "STATE_BENCH_DIR"
	serveProfileEnv = "STATE_BENCH_PROFILE"
	clusterEnv      = "STATE_BENCH_CLUSTER" // of a nats-server: its name, the address of its routes, and the other routes
	proxyEnv        = "STATE_BENCH_PROXY"   // of a proxy: the address behind it, and the round-trip time that it adds
)

// serve runs a server until the standard input ends, and so no longer than the
// process that started it. It prints where it listens.
func serve(kind string) {
	if kind == "fleet" {
		serveFleet()
		return
	}
	dir := os.Getenv(serveDirEnv)
	start := map[string]func(dir string) (string, func(), error){
		"nats": serveNATS, "etcd": serveEtcd, "proxy": serveProxy,
	}[kind]
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

// Usage is what a process has used so far.
type Usage struct {
	CPU    time.Duration
	Memory float64 // in use, without garbage; 0 if it was not asked for
}

// used returns the usage of this process. To know the memory it must collect the
// garbage, which takes CPU.
func used(memoryToo bool) Usage {
	var u Usage
	if memoryToo {
		u.Memory = memory()
	}
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err == nil {
		u.CPU = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return u
}

// serveNATS runs a nats-server as it comes. A responder inside it sends back
// what it gets, another one tells what the process has used.
func serveNATS(dir string) (string, func(), error) {
	opts := &server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true,
	}
	if cluster := strings.Fields(os.Getenv(clusterEnv)); len(cluster) > 0 {
		host, port, err := net.SplitHostPort(cluster[1])
		if err != nil {
			return "", nil, err
		}
		opts.ServerName = cluster[0]
		opts.Cluster.Name, opts.Cluster.Host = "bench", host
		if opts.Cluster.Port, err = strconv.Atoi(port); err != nil {
			return "", nil, err
		}
		opts.Routes = server.RoutesFromStr(strings.Join(cluster[2:], ","))
	}
	srv, err := server.NewServer(opts)
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
	for subject, answer := range map[string]func(*nats.Msg){
		"echo": func(msg *nats.Msg) { _ = msg.Respond(msg.Data) },
		"usage": func(msg *nats.Msg) {
			data, _ := json.Marshal(used(string(msg.Data) == "memory"))
			_ = msg.Respond(data)
		},
	} {
		if _, err := nc.Subscribe(subject, answer); err != nil {
			return "", nil, err
		}
	}
	if err := nc.Flush(); err != nil {
		return "", nil, err
	}
	return srv.ClientURL(), srv.Shutdown, nil
}

// serverUsage asks the nats-server's process what it has used.
func serverUsage(nc *nats.Conn, memoryToo bool) (u Usage, err error) {
	question := "cpu"
	if memoryToo {
		question = "memory"
	}
	msg, err := nc.Request("usage", []byte(question), 20*time.Second)
	if err != nil {
		return Usage{}, err
	}
	return u, json.Unmarshal(msg.Data, &u)
}

// serveProxy passes connections on, and everything on them half a round-trip
// time later. It limits no throughput.
func serveProxy(string) (string, func(), error) {
	target, rtt, _ := strings.Cut(os.Getenv(proxyEnv), " ")
	delay, err := time.ParseDuration(rtt)
	if err != nil {
		return "", nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				_ = client.Close()
				continue
			}
			go passLater(server, client, delay/2)
			go passLater(client, server, delay/2)
		}
	}()
	return "nats://" + l.Addr().String(), func() { _ = l.Close() }, nil
}

// passLater copies from one connection to another with a delay, and closes both
// in the end.
func passLater(to, from net.Conn, delay time.Duration) {
	type chunk struct {
		data []byte
		due  time.Time
	}
	chunks := make(chan chunk, 1<<14)
	go func() {
		var err error
		for c := range chunks {
			if err != nil {
				continue
			}
			if wait := time.Until(c.due); wait > 0 {
				sleepBriefly(wait)
			}
			if _, err = to.Write(c.data); err != nil {
				_ = from.Close()
			}
		}
		_, _ = to.Close(), from.Close()
	}()
	defer close(chunks)
	buffer := make([]byte, 1<<16)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			chunks <- chunk{bytes.Clone(buffer[:n]), time.Now().Add(delay)}
		}
		if err != nil {
			return
		}
	}
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

// A process is one that this program started: a copy of itself.
type process struct {
	pid    int
	stdin  io.WriteCloser
	stdout *bufio.Reader
}

// spawn runs this program as another process, until r is closed.
func (r *run) spawn(kind string, env ...string) (*process, error) {
	dir, err := os.MkdirTemp("", "state-bench-"+kind)
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), serveEnv+"="+kind, serveDirEnv+"="+dir)
	cmd.Env = append(cmd.Env, env...)
	if path := os.Getenv(serveProfileEnv); path != "" && kind == "nats" {
		if r.profiles++; r.profiles > 1 { // each server has a file of its own
			cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%s.%d", serveProfileEnv, path, r.profiles))
		}
	}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	r.stops = append(r.stops, func() {
		_ = stdin.Close()
		_ = cmd.Wait()
		_ = os.RemoveAll(dir)
	})
	return &process{cmd.Process.Pid, stdin, bufio.NewReader(stdout)}, nil
}

// start runs this program as a server, and returns where it listens.
func (r *run) start(kind string, env ...string) (address string, pid int, err error) {
	p, err := r.spawn(kind, env...)
	if err != nil {
		return "", 0, err
	}
	address, err = p.address()
	return address, p.pid, err
}

// address returns where a server listens, once it does.
func (p *process) address() (string, error) {
	line, err := p.stdout.ReadString('\n')
	if err != nil {
		return "", errors.New("a server does not start")
	}
	return strings.TrimSpace(line), nil
}

// startCluster runs three nats-servers, each a process of its own, and returns
// the address of the first, which is named n0.
func (r *run) startCluster() (address string, err error) {
	const servers = 3
	var routes []string
	for range servers {
		routes = append(routes, freeAddress())
	}
	var processes []*process
	for i, own := range routes {
		env := fmt.Sprintf("%s=n%d %s", clusterEnv, i, own)
		for _, route := range routes {
			if route != own {
				env += " nats://" + route
			}
		}
		p, err := r.spawn("nats", env)
		if err != nil {
			return "", err
		}
		processes = append(processes, p)
	}
	for _, p := range slices.Backward(processes) { // all are ready before they are used
		if address, err = p.address(); err != nil {
			return "", err
		}
	}
	return address, nil
}

// startProxy runs a proxy between the clients and the server, which is as far
// away as the round-trip time says.
func (r *run) startProxy(server string, rtt time.Duration) (address string, err error) {
	address, _, err = r.start("proxy", fmt.Sprintf("%s=%s %v", proxyEnv, strings.TrimPrefix(server, "nats://"), rtt))
	return address, err
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
