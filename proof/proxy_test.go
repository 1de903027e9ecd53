package proof

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"
)

// A distance is what lies between a client and its server.
type distance struct {
	rtt       time.Duration // of which each direction takes half
	jitter    time.Duration // the most that a direction takes longer; bytes stay in order
	bandwidth int           // bytes per second and direction; 0 for any number
}

func (d distance) String() string {
	return fmt.Sprintf("RTT %v, jitter %v, %d KiB/s", d.rtt.Round(100*time.Microsecond), d.jitter.Round(100*time.Microsecond), d.bandwidth>>10)
}

// A proxy passes bytes between whoever connects to it and its target, unless it
// is frozen or cut.
type proxy struct {
	listener net.Listener
	target   string
	distance distance
	active   sync.WaitGroup

	mu     sync.Mutex // guards what follows
	open   chan struct{}
	frozen bool // what is under way stays there, until thaw
	cut    bool // connections are closed, and new ones at once
	closed bool
	conns  map[net.Conn]struct{}
}

func newProxy(target string, d distance) (*proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: l, target: target, distance: d, open: make(chan struct{}), conns: map[net.Conn]struct{}{}}
	close(p.open)
	p.active.Go(p.accept)
	return p, nil
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) accept() {
	for {
		near, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.active.Go(func() { p.serve(near) })
	}
}

func (p *proxy) serve(near net.Conn) {
	defer near.Close()
	if !p.add(near) {
		return
	}
	defer p.remove(near)
	p.wait()
	far, err := net.DialTimeout("tcp", p.target, time.Second)
	if err != nil {
		return
	}
	defer far.Close()
	if !p.add(far) {
		return
	}
	defer p.remove(far)
	var both sync.WaitGroup
	both.Go(func() { p.pass(near, far) })
	both.Go(func() { p.pass(far, near) })
	both.Wait()
}

func (p *proxy) pass(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	if p.distance != (distance{}) {
		p.carry(from, to)
		return
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			p.wait()
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// A line holds the bytes that are on their way in one direction.
type line struct {
	mu      sync.Mutex // guards what follows
	changed sync.Cond
	parcels []parcel
	size    int // bytes in parcels
	closed  bool
}

// A parcel is some bytes and the time at which they arrive. The last one has no
// bytes: the connection was closed.
type parcel struct {
	bytes []byte
	due   time.Time
}

const (
	lineCapacity = 8 << 20
	packetSize   = 1500 // in which bytes arrive where the bandwidth is limited
)

// carry passes bytes on over the distance. They are on their way while others
// are read, so that the round trip does not limit the throughput.
func (p *proxy) carry(from, to net.Conn) {
	l := &line{}
	l.changed.L = &l.mu
	var wg sync.WaitGroup
	wg.Go(func() { p.load(l, from) })
	for {
		arrived, more := p.arrived(l)
		p.wait()
		if _, err := to.Write(arrived); err != nil || !more {
			break
		}
	}
	_, _ = from.Close(), to.Close()
	l.mu.Lock()
	l.closed = true
	l.changed.Broadcast()
	l.mu.Unlock()
	wg.Wait()
}

// load reads what is to be passed on, until from is closed.
func (p *proxy) load(l *line, from net.Conn) {
	buf := make([]byte, 32<<10)
	var free, last time.Time // when the line takes the next byte; when the last one arrives
	for {
		n, err := from.Read(buf)
		now := time.Now()
		delay := p.distance.rtt / 2
		if p.distance.jitter > 0 {
			delay += rand.N(p.distance.jitter)
		}
		arrive := func(at time.Time) time.Time {
			if at.After(last) {
				last = at
			}
			return last
		}
		for rest := buf[:n]; len(rest) > 0; {
			size := len(rest)
			if free.Before(now) {
				free = now
			}
			if p.distance.bandwidth > 0 {
				size = min(size, packetSize)
				free = free.Add(time.Duration(size) * time.Second / time.Duration(p.distance.bandwidth))
			}
			if !l.put(parcel{append([]byte(nil), rest[:size]...), arrive(free.Add(delay))}) {
				return
			}
			rest = rest[size:]
		}
		if err != nil {
			l.put(parcel{due: arrive(now.Add(delay))})
			return
		}
	}
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

// arrived waits for what arrives next. It reports whether more may come.
func (p *proxy) arrived(l *line) (arrived []byte, more bool) {
	l.mu.Lock()
	for len(l.parcels) == 0 {
		l.changed.Wait()
	}
	due := l.parcels[0].due
	l.mu.Unlock()
	// A sleeping process of Go wakes up a millisecond late.
	if d := time.Until(due) - 1500*time.Microsecond; d > 0 {
		time.Sleep(d)
	}
	if d := time.Until(due); d > 0 {
		ts := syscall.NsecToTimespec(d.Nanoseconds())
		_ = syscall.Nanosleep(&ts, nil)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now, n := time.Now(), 0
	more = true
	for _, next := range l.parcels {
		if next.due.After(now) {
			break
		}
		arrived, more = append(arrived, next.bytes...), len(next.bytes) > 0
		n++
	}
	l.parcels = l.parcels[n:]
	l.size -= len(arrived)
	l.changed.Broadcast()
	return arrived, more
}

// wait waits until the proxy is not frozen.
func (p *proxy) wait() {
	for {
		p.mu.Lock()
		open, frozen := p.open, p.frozen && !p.closed
		p.mu.Unlock()
		if !frozen {
			return
		}
		<-open
	}
}

func (p *proxy) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cut || p.closed {
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *proxy) remove(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

// freeze holds all bytes back, in both directions.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.frozen {
		p.frozen, p.open = true, make(chan struct{})
	}
}

// sever closes all connections and refuses new ones.
func (p *proxy) sever() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = true
	p.drop()
}

func (p *proxy) drop() {
	for c := range p.conns {
		_ = c.Close()
	}
}

// heal undoes freeze and sever.
func (p *proxy) heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = false
	if p.frozen {
		p.frozen = false
		close(p.open)
	}
}

func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.drop()
	if p.frozen {
		p.frozen = false
		close(p.open)
	}
	p.mu.Unlock()
	_ = p.listener.Close()
	p.active.Wait()
}
