package state

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"
)

// What other clients do meanwhile, and how much passes the server.

// A traffic writes keys of a bucket at a steady rate, as the heartbeats of other
// agents do: <prefix>0 to <prefix><keys-1> in turn.
type traffic struct {
	prefix    string
	keys      int
	perSecond int
	ttl       time.Duration // whole seconds; 0 for none
}

// start begins to write, with plain publishes, until stop is called or the test
// ends.
func (tr traffic) start(t testing.TB, nc *nats.Conn, bucket string) (stop func()) {
	t.Helper()
	header := nats.Header{}
	if tr.ttl > 0 {
		header.Set("Nats-TTL", fmt.Sprint(int(tr.ttl.Seconds())))
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(max(time.Millisecond, time.Second/time.Duration(tr.perSecond)))
		defer ticker.Stop()
		began := time.Now()
		for n := 0; ; {
			select {
			case <-quit:
				_ = nc.Flush() // what follows comes after all of it
				return
			case <-ticker.C:
			}
			for due := int(time.Since(began).Seconds() * float64(tr.perSecond)); n < due; n++ {
				subject := fmt.Sprintf("$KV.%s.%s%d", bucket, tr.prefix, n%tr.keys)
				_ = nc.PublishMsg(&nats.Msg{Subject: subject, Header: header, Data: fmt.Append(nil, n)})
			}
		}
	}()
	var stopped atomic.Bool
	stop = func() {
		if stopped.CompareAndSwap(false, true) {
			close(quit)
		}
		<-done
	}
	t.Cleanup(stop)
	return stop
}

// fillBucket writes keys prefix0 to prefix<n-1> and waits until they are stored.
func fillBucket(t testing.TB, nc *nats.Conn, bucket, prefix string, n int) {
	t.Helper()
	for i := range n {
		subject := fmt.Sprintf("$KV.%s.%s%d", bucket, prefix, i)
		if i < n-1 {
			require.NoError(t, nc.Publish(subject, nil))
			continue
		}
		_, err := nc.Request(subject, nil, time.Minute) // what came before is stored before
		require.NoError(t, err)
	}
}

// A count is how many messages a server has received from its clients and sent
// to them.
type count struct{ in, out int64 }

func (c count) since(before count) count { return count{c.in - before.in, c.out - before.out} }

func (c count) all() int64 { return c.in + c.out }

// countMessages counts what has passed the connections that are open, except
// the given ones.
func countMessages(t testing.TB, srv *server.Server, except ...*nats.Conn) count {
	t.Helper()
	conns, err := srv.Connz(&server.ConnzOptions{Limit: 10_000})
	require.NoError(t, err)
	skip := map[uint64]bool{}
	for _, nc := range except {
		id, err := nc.GetClientID()
		require.NoError(t, err)
		skip[id] = true
	}
	var sum count
	for _, conn := range conns.Conns {
		if !skip[conn.Cid] {
			sum.in += conn.InMsgs
			sum.out += conn.OutMsgs
		}
	}
	return sum
}

// A requestCount is how many requests all clients together have made.
type requestCount struct {
	api   atomic.Int64 // to the JetStream API, but for pulls
	pulls atomic.Int64 // a consumer asked for its next messages
	other atomic.Int64 // publishes into the bucket, but not to a key
}

// countRequests counts, until the test ends, the requests that concern a bucket.
func countRequests(t testing.TB, url, bucket string) *requestCount {
	t.Helper()
	c := &requestCount{}
	nc := connect(t, url)
	subscribe := func(subject string, f nats.MsgHandler) {
		sub, err := nc.Subscribe(subject, f)
		require.NoError(t, err)
		require.NoError(t, sub.SetPendingLimits(-1, -1))
	}
	subscribe("$JS.API.>", func(msg *nats.Msg) {
		if strings.HasPrefix(msg.Subject, "$JS.API.CONSUMER.MSG.NEXT.") {
			c.pulls.Add(1)
			return
		}
		c.api.Add(1)
	})
	prefix := "$KV." + bucket + "."
	subscribe(prefix+">", func(msg *nats.Msg) {
		if ValidateKey(strings.TrimPrefix(msg.Subject, prefix)) != nil {
			c.other.Add(1)
		}
	})
	require.NoError(t, nc.Flush())
	return c
}
