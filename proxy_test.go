package state

import (
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

// A distance is what lies between a client and its server.
type distance struct {
	// rtt is the round-trip time. Each direction takes half of it.
	rtt time.Duration
	// jitter is the most that a direction takes longer. Bytes stay in order.
	jitter time.Duration
	// bandwidth is how many bytes pass per second and direction; 0 means any
	// number.
	bandwidth int
}

// A proxy passes connections on to a server, until it is told otherwise.
type proxy struct {
	listener net.Listener
	target   string

	mu    sync.Mutex // guards what follows
	conns map[net.Conn]struct{}
	gate  chan struct{} // closed while bytes pass
	mute  bool          // what servers say is held back
	down  bool          // connections are refused
	dist  distance
}

// startProxy runs a proxy until the test ends. Without a distance the server is
// as near as without the proxy.
func startProxy(t testing.TB, target string, dist ...distance) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{
		listener: l, target: strings.TrimPrefix(target, "nats://"),
		conns: map[net.Conn]struct{}{}, gate: make(chan struct{}),
	}
	close(p.gate)
	if len(dist) > 0 {
		p.dist = dist[0]
	}
	t.Cleanup(func() {
		_ = l.Close()
		p.resume()
		p.cut()
	})
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(client)
		}
	}()
	return p
}

// connectAt returns a connection to a server that is at a distance, and the
// proxy in between.
func connectAt(t testing.TB, target string, dist distance, opts ...nats.Option) (*nats.Conn, *proxy) {
	t.Helper()
	p := startProxy(t, target, dist)
	// It must not learn of ways around the proxy.
	opts = append([]nats.Option{nats.DontRandomize(), nats.IgnoreDiscoveredServers()}, opts...)
	return connect(t, p.url(), opts...), p
}

// openNearAndFar returns two stores of one bucket, the second at a distance, and the
// proxy before that.
func openNearAndFar(t testing.TB, srv *server.Server, dist distance) (near, far *NATSStore, p *proxy) {
	near = openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	nc, p := connectAt(t, srv.ClientURL(), dist)
	return near, openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"}), p
}

func (p *proxy) url() string { return "nats://" + p.listener.Addr().String() }

func (p *proxy) serve(client net.Conn) {
	upstream, err := net.Dial("tcp", p.target)
	if err != nil {
		_ = client.Close()
		return
	}
	p.mu.Lock()
	if p.down {
		p.mu.Unlock()
		_ = client.Close()
		_ = upstream.Close()
		return
	}
	p.conns[client], p.conns[upstream] = struct{}{}, struct{}{}
	p.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(func() { p.pass(upstream, client, false) })
	wg.Go(func() { p.pass(client, upstream, true) })
	wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, client)
	delete(p.conns, upstream)
}

// pass copies from src to dst until either is closed. Bytes are on their way
// while others are read, so that the distance does not limit the throughput.
func (p *proxy) pass(dst, src net.Conn, answers bool) {
	l := &line{}
	l.changed.L = &l.mu
	var wg sync.WaitGroup
	wg.Go(func() { p.load(l, src) })
	for l.unload(dst, p, answers) {
	}
	_, _ = dst.Close(), src.Close()
	l.close()
	wg.Wait()
}

// A line holds the bytes that are on their way in one direction.
type line struct {
	mu      sync.Mutex // guards what follows
	changed sync.Cond
	parcels []parcel
	size    int // bytes in parcels
	closed  bool
}

// A parcel is some bytes and the time at which they arrive. The last one has
// no bytes: the connection was closed.
type parcel struct {
	bytes []byte
	due   time.Time
}

const (
	lineCapacity = 8 << 20
	// With limited bandwidth a parcel is a network packet, so that the bytes of
	// a large message arrive one after the other.
	packetSize = 1500
)

// load reads what is to be passed on, until src is closed.
func (p *proxy) load(l *line, src net.Conn) {
	buf := make([]byte, 32<<10)
	var free, last time.Time // when the line takes the next byte; when the last one arrives
	for {
		n, err := src.Read(buf)
		now, dist := time.Now(), p.at()
		delay := dist.rtt / 2
		if dist.jitter > 0 {
			delay += rand.N(dist.jitter)
		}
		for rest := buf[:n]; len(rest) > 0; {
			size := len(rest)
			if free.Before(now) {
				free = now
			}
			if dist.bandwidth > 0 {
				size = min(size, packetSize)
				free = free.Add(time.Duration(size) * time.Second / time.Duration(dist.bandwidth))
			}
			last = later(last, free.Add(delay))
			if !l.put(parcel{append([]byte(nil), rest[:size]...), last}) {
				return
			}
			rest = rest[size:]
		}
		if err != nil {
			l.put(parcel{due: later(last, now.Add(delay))})
			return
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// put waits for room on the line. It reports whether the line is open.
func (l *line) put(next parcel) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.size > lineCapacity && !l.closed {
		l.changed.Wait()
	}
	l.parcels = append(l.parcels, next)
	l.size += len(next.bytes)
	l.changed.Broadcast()
	return !l.closed
}

// unload writes what has arrived. It reports whether more may come.
func (l *line) unload(dst net.Conn, p *proxy, answers bool) bool {
	l.mu.Lock()
	for len(l.parcels) == 0 {
		l.changed.Wait()
	}
	due := l.parcels[0].due
	l.mu.Unlock()
	sleepUntil(due)
	p.mu.Lock()
	gate := p.gate
	p.mu.Unlock()
	<-gate
	for answers && p.muted() {
		time.Sleep(time.Millisecond)
	}

	l.mu.Lock()
	var arrived []byte
	now, end, n := time.Now(), false, 0
	for _, next := range l.parcels {
		if next.due.After(now) {
			break
		}
		arrived, end = append(arrived, next.bytes...), len(next.bytes) == 0
		n++
	}
	l.parcels = l.parcels[n:]
	l.size -= len(arrived)
	l.changed.Broadcast()
	l.mu.Unlock()
	if len(arrived) > 0 {
		if _, err := dst.Write(arrived); err != nil {
			return false
		}
	}
	return !end
}

func (l *line) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.changed.Broadcast()
}

// sleepUntil is exact to a tenth of a millisecond where sleepBriefly is. A
// sleeping process of Go wakes up a millisecond late.
func sleepUntil(due time.Time) {
	if d := time.Until(due) - 1500*time.Microsecond; d > 0 {
		time.Sleep(d)
	}
	if d := time.Until(due); d > 0 {
		sleepBriefly(d)
	}
}

// move puts the server at another distance. What is on its way already arrives
// as before.
func (p *proxy) move(dist distance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dist = dist
}

func (p *proxy) at() distance {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dist
}

// stall holds back all bytes, both ways, until resume.
func (p *proxy) stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gate = make(chan struct{})
}

func (p *proxy) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.gate:
	default:
		close(p.gate)
	}
}

// holdAnswers holds back what the server sends, or no more.
func (p *proxy) holdAnswers(mute bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute = mute
}

func (p *proxy) muted() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.mute
}

// cut closes all connections. What was held back or on its way is lost.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
		delete(p.conns, c)
	}
}

// refuse has connections refused, or accepted again.
func (p *proxy) refuse(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// TestProxyDistance holds the proxy to what tests at a distance count on.
func TestProxyDistance(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc, p := connectAt(t, srv.ClientURL(), distance{rtt: 20 * time.Millisecond})
	sub, err := nc.Subscribe("echo", func(msg *nats.Msg) { _ = msg.Respond(msg.Data) })
	require.NoError(t, err)
	require.NoError(t, sub.SetPendingLimits(-1, -1))

	// A request and its answer by the same client take two round trips.
	trip := func(size int) time.Duration {
		began := time.Now()
		answer, err := nc.Request("echo", make([]byte, size), 20*time.Second)
		require.NoError(t, err)
		require.Len(t, answer.Data, size)
		return time.Since(began)
	}
	fastest := func() time.Duration {
		best := trip(1)
		for range 5 {
			best = min(best, trip(1))
		}
		return best
	}
	best := fastest()
	require.GreaterOrEqual(t, best, 40*time.Millisecond)
	require.Less(t, best, 200*time.Millisecond)

	// The distance does not limit how much passes meanwhile.
	seen := make(chan struct{}, 20_000)
	_, err = nc.Subscribe("many", func(*nats.Msg) { seen <- struct{}{} })
	require.NoError(t, err)
	began := time.Now()
	for range cap(seen) {
		require.NoError(t, nc.Publish("many", make([]byte, 100)))
	}
	for range cap(seen) {
		<-seen
	}
	require.Less(t, time.Since(began), 5*time.Second, "20,000 messages take 400 s one after the other")

	// 100 KB pass each direction twice; the two directions do not share.
	p.move(distance{bandwidth: 1 << 20})
	require.GreaterOrEqual(t, trip(100<<10), 390*time.Millisecond)
	p.move(distance{})
	require.Less(t, fastest(), 200*time.Millisecond)
}
