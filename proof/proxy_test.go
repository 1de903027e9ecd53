package proof

import (
	"net"
	"sync"
	"time"
)

// A proxy passes bytes between whoever connects to it and its target, unless it
// is frozen or cut.
type proxy struct {
	listener net.Listener
	target   string
	active   sync.WaitGroup

	mu     sync.Mutex // guards what follows
	open   chan struct{}
	frozen bool // what is under way stays there, until thaw
	cut    bool // connections are closed, and new ones at once
	closed bool
	conns  map[net.Conn]struct{}
}

func newProxy(target string) (*proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{listener: l, target: target, open: make(chan struct{}), conns: map[net.Conn]struct{}{}}
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
