package state

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What others may put into the bucket: no message makes the methods fail, or
// disagree with each other.

// A rawClient speaks the protocol itself, and sends headers that no client
// library would.
type rawClient struct {
	net.Conn
	in *bufio.Reader
}

func dialRaw(t testing.TB, addr net.Addr) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", addr.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	c := &rawClient{conn, bufio.NewReader(conn)}
	_, err = io.WriteString(c, "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true}\r\nSUB raw.answers 1\r\n")
	require.NoError(t, err)
	return c
}

// store publishes a message with a header block as it is, and returns the
// sequence that it was stored with.
func (c *rawClient) store(t testing.TB, subject, header string, data []byte) uint64 {
	t.Helper()
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err := fmt.Fprintf(c, "HPUB %s raw.answers %d %d\r\n%s%s\r\n", subject, len(header), len(header)+len(data), header, data)
	require.NoError(t, err)
	for {
		line, err := c.in.ReadString('\n')
		require.NoError(t, err)
		switch fields := strings.Fields(line); fields[0] {
		case "PING":
			_, err := io.WriteString(c, "PONG\r\n")
			require.NoError(t, err)
		case "MSG":
			n, err := strconv.Atoi(fields[len(fields)-1])
			require.NoError(t, err)
			data := make([]byte, n+2)
			_, err = io.ReadFull(c.in, data)
			require.NoError(t, err)
			var ack struct {
				Seq   uint64              `json:"seq"`
				Error *jetstream.APIError `json:"error"`
			}
			require.NoError(t, json.Unmarshal(data, &ack))
			if ack.Error != nil {
				t.Logf("not stored: %v: %q", ack.Error, header)
			}
			return ack.Seq
		case "INFO":
		default:
			require.FailNow(t, "the server says "+line)
		}
	}
}

// agree fails unless all ways to read tell the same of all keys, among which are
// the given ones.
func agree(t *testing.T, s *NATSStore, prefix string, keys []string) (exist []string) {
	t.Helper()
	listed, err := s.Keys(prefix + "*")
	require.NoError(t, err)
	entries := mustEntries(t, s, prefix+"*")
	assert.Equal(t, listed, keysOf(entries), "Keys and Entries")
	byKey := make(map[string]*KeyValue)
	for _, e := range entries {
		byKey[e.Key] = e
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	current, _, err := Follow(ctx, s, prefix+"*")
	require.NoError(t, err)
	assert.Equal(t, entries, current, "Entries and Follow")
	for _, key := range keys {
		one, err := s.Entries(key)
		require.NoError(t, err)
		kv, err := s.GetKeyValue(key)
		value, errGet := s.Get(key)
		if byKey[key] == nil {
			refuses(t, ErrNotFound, err, key)
			refuses(t, ErrNotFound, errGet, key)
			assert.Empty(t, one, key)
			continue
		}
		require.NoError(t, err, key)
		require.NoError(t, errGet, key)
		assert.Equal(t, byKey[key], kv)
		assert.Equal(t, []*KeyValue{kv}, one)
		assert.Equal(t, kv.Value, value)
	}
	return listed
}

// writable fails unless a key, whatever it holds, can be written and deleted by
// a client that knows nothing of it.
func writable(t *testing.T, s *NATSStore, key string) {
	t.Helper()
	before, err := s.GetKeyValue(key)
	if err != ErrNotFound { //nolint:errorlint // bare
		require.NoError(t, err)
	} else {
		before = &KeyValue{}
	}
	_, err = s.Update(key, []byte("x"), 0, before.Revision+1_000_000)
	refuses(t, ErrConflict, err)
	revision, err := s.Update(key, []byte("updated"), 0, before.Revision)
	require.NoError(t, err)
	after := mustGet(t, s, key)
	assert.Equal(t, revision, after.Revision)
	assert.Equal(t, "updated", string(after.Value))
	if before.Revision != 0 {
		assert.Equal(t, before.Created, after.Created, "the key was there before")
	}
	require.NoError(t, s.Put(key, []byte("put"), 0))
	assert.Equal(t, "put", string(mustGet(t, s, key).Value))
	require.NoError(t, s.Delete(key))
	_, err = s.Get(key)
	refuses(t, ErrNotFound, err)
}

// forged are headers that look like the server's, as they would be in a message
// that a tool has copied from an answer, or an attacker made up.
func forged(bucket string) []nats.Header {
	now := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339Nano)
	all := nats.Header{
		"Nats-Stream": {"KV_" + bucket}, "Nats-Subject": {"$KV." + bucket + ".other"}, "Nats-Sequence": {"7"},
		"Nats-Time-Stamp": {now}, "Nats-Num-Pending": {"0"}, "Nats-Last-Sequence": {"3"}, "Nats-UpTo-Sequence": {"99999"},
		"Nats-Msg-Size": {"12"}, "Nats-Pending-Messages": {"5"},
	}
	headers := []nats.Header{
		{"Status": {"404"}}, {"Status": {"204"}}, {"Status": {"503"}}, {"Status": {"409"}}, {"Status": {"100"}},
		{"Status": {"404"}, "Description": {"No Results"}}, {"Description": {"No Results"}}, all,
	}
	for name, value := range all {
		headers = append(headers, nats.Header{name: value}, nats.Header{name: {"not a number"}}, nats.Header{name: {""}})
	}
	return headers
}

// TestForgedHeaders: what was stored with headers like the server's is an entry
// with the revision and the time that the bucket gave it.
func TestForgedHeaders(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	events := mustWatch(t, s, "*")
	var keys []string
	for i, hdr := range forged("b") {
		for j, data := range [][]byte{nil, []byte("value")} {
			key := fmt.Sprintf("k.%d.%d", i, j)
			keys = append(keys, key)
			began := time.Now()
			ack, err := js.PublishMsg(context.Background(), &nats.Msg{Subject: "$KV.b." + key, Header: hdr, Data: data})
			require.NoError(t, err)
			kv := mustGet(t, s, key)
			assert.Equal(t, ack.Sequence, kv.Revision, hdr)
			assert.Equal(t, string(data), string(kv.Value))
			assert.False(t, kv.Modified.Before(began.Add(-time.Minute)), hdr)
			assert.Equal(t, kv, receive(t, events), hdr)
		}
	}
	assert.Len(t, agree(t, s, "", keys), len(keys))
	agree(t, s, "k.1.", nil)
	for _, key := range keys {
		writable(t, s, key)
	}
}

// TestRepublishedIntoBucket: a stream that republishes into the bucket gives its
// messages headers that are the server's own, and another stream's.
func TestRepublishedIntoBucket(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	js := newJetStream(t, nc)
	ctx := context.Background()
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, s.Put("first", nil, 0)) // the sequences differ
	events := mustWatch(t, s, "src.*")
	_, err := js.CreateStream(ctx, jetstream.StreamConfig{
		Name: "SRC", Subjects: []string{"src.>"},
		RePublish: &jetstream.RePublish{Source: "src.>", Destination: "$KV.b.src.>"},
	})
	require.NoError(t, err)
	for i := range 3 {
		_, err = js.Publish(ctx, fmt.Sprintf("src.%d", i), []byte("value"))
		require.NoError(t, err)
		ev := receive(t, events)
		key := fmt.Sprintf("src.src.%d", i)
		if !strings.HasPrefix(ev.Key, "src.src.") {
			key = fmt.Sprintf("src.%d", i)
		}
		assert.Equal(t, "put "+key, brief(ev))
		kv := mustGet(t, s, ev.Key)
		assert.Equal(t, ev, kv)
		assert.Equal(t, uint64(i+2), kv.Revision)
	}
	keys := agree(t, s, "src.", nil)
	assert.Len(t, keys, 3)
	for _, key := range agree(t, s, "src.", keys) {
		writable(t, s, key)
	}
}

// oddHeaders are blocks that no client library sends. Some of them cannot be
// decoded, some only up to a point, and some only once the server has added a
// header of its own.
var oddHeaders = []string{
	"NATS/1.0\r\nfoo\r\n\r\n",
	"NATS/1.0\r\nfoo bar: x\r\n\r\n",
	"NATS/1.0\r\n: x\r\n\r\n",
	"NATS/1.0\r\n x\r\n\r\n",
	"NATS/1.0\r\nA: x\r\n folded\r\n\r\n",
	"NATS/1.0\r\n\r\n",
	"NATS/1.0\r\n\r\nKV-Operation: DEL\r\n\r\n",
	"NATS/1.0\r\nA: x\r\n\r\nfoo\r\n\r\n",
	"NATS/1.0\r\nA: x\n\nB: y\r\n\r\n",
	"NATS/1.0 503\r\n\r\n",
	"NATS/1.0 404 No Messages\r\n\r\n",
	"NATS/1.0 100 Idle Heartbeat\r\nKV-Operation: PURGE\r\n\r\n",
	"NATS/1.0\r\nA: x",
	"NATS/1.0\r\nKV-Operation: DEL\r\n",
	"NATS/1.0\r\nKV-Operation: DEL\r\nA: x\r\n",
	"NATS/1.0\r\nKV-Operation: DEL\r\nA\n",
	"NATS/1.0\r\nKV-Operation: DEL\r\nAb",
	"NATS/1.0\r\nNats-Stream: KV_b\r\nNats-Sequence: 7\r\nNats-Subject: $KV.b.zzz\r\nNats-Num-Pending: 0\r\nNats-Time-Stamp: 2020-01-01T00:00:00Z\r\n\r\nA: x\r\n\r\n",
	"NATS/1.0\r\nNats-Stream: KV_b\r\nNats-Sequence: 7\r\nNats-Num-Pending: 0\r\nNats-Time-Stamp: 2020-01-01T00:00:00Z\r\n\r\nA: x\r\n\r\n",
	"NATS/1.0\r\nKV-Operation: DEL\r\nfoo\r\n\r\n",
	"NATS/1.0\r\nNats-Msg-Size: 1\r\nKV-Operation: DEL\r\nA: x\r\n",
	"NATS/1.0\r\nNats-Stream: KV_b\r\nKV-Operation: DEL\r\nA: x\r\n",
	"NATS/1.0\r\nState: x c=1 d=99 t=1\r\n\r\n",
	"NATS/1.0\r\nKV-Operation : DEL\r\n\r\n",
	"NATS/1.0\r\nkv-operation: DEL\r\n\r\n",
	"NATS/1.0\r\nKV-Operation:DEL\r\n\r\n",
	"NATS/1.0\r\nKV-Operation: \t DEL \r\n\r\n",
	"nats/9.9\r\nA: x\r\n\r\n",
	"\r\n\r\n",
	"\x00\xff\xfe\r\n\r\n",
}

// TestOddHeaders: a message whose headers cannot be read is an entry like any
// other, in each method and however it is listed.
func TestOddHeaders(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"small": 5, "large": 2000} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := startServer(t, nil)
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
			events := mustWatch(t, s, "*")
			raw := dialRaw(t, srv.Addr())
			var keys []string
			for i, hdr := range oddHeaders {
				for j, data := range [][]byte{nil, []byte(strings.Repeat("v", size))} {
					key := fmt.Sprintf("k.%d.%d", i, j)
					seq := raw.store(t, "$KV.b."+key, hdr, data)
					if seq == 0 {
						continue
					}
					keys = append(keys, key)
					kv, err := s.GetKeyValue(key)
					if err == ErrNotFound { //nolint:errorlint // bare
						continue // it was read as a marker, and deleted nothing
					}
					require.NoError(t, err)
					assert.Equal(t, seq, kv.Revision, "%q", hdr)
					assert.Equal(t, string(data), string(kv.Value))
					told := receive(t, events)
					for told.Key != key { // one that expired at once
						told = receive(t, events)
					}
					assert.Equal(t, kv, told, "%q", hdr)
				}
			}
			assert.Greater(t, len(keys), len(oddHeaders))
			agree(t, s, "", keys)
			for i := range oddHeaders {
				agree(t, s, fmt.Sprintf("k.%d.", i), nil)
			}
			for _, key := range keys {
				writable(t, s, key)
			}
			assert.Empty(t, agree(t, s, "", keys))
		})
	}
}

// TestMarkerWithOddEnd: the server replaces the last two bytes of a header block by
// its own headers, which makes some blocks decodable. What is then a marker is a
// marker to every method.
func TestMarkerWithOddEnd(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "b"})
	events := mustWatch(t, s, "*")
	raw := dialRaw(t, srv.Addr())
	for i, end := range []string{"A\n", "Ab", "\xff\r"} {
		key := fmt.Sprintf("k.%d", i)
		require.NoError(t, s.Put(key, nil, 0))
		assert.Equal(t, "put "+key, brief(receive(t, events)))
		require.NotZero(t, raw.store(t, "$KV.b."+key, "NATS/1.0\r\nKV-Operation: DEL\r\n"+end, nil))
		assert.Equal(t, "delete "+key, brief(receive(t, events)), "%q", end)
		assert.Empty(t, agree(t, s, "", []string{key}), "%q", end)
	}
}

// TestOddMessagesAmongOthers: messages whose headers cannot be decoded are reported
// in their turn, with all that follows them.
func TestOddMessagesAmongOthers(t *testing.T) {
	t.Parallel()
	const rounds, plain = 20, "NATS/1.0\r\n\r\n"
	srv := startServer(t, nil)
	proxy := startProxy(t, srv.Addr().String(), distance{rtt: 20 * time.Millisecond})
	far := openStore(t, NATSStoreConfig{Conn: connect(t, proxy.url()), Bucket: "b", History: 64})
	events := mustWatch(t, far, "*")
	raw := dialRaw(t, srv.Addr())
	for range rounds {
		require.NotZero(t, raw.store(t, "$KV.b.k", plain, nil))
		require.NotZero(t, raw.store(t, "$KV.b.k", "NATS/1.0\r\nKV-Operation: DEL\r\nA\n", nil))
		require.NotZero(t, raw.store(t, "$KV.b.other", plain, nil))
	}
	for i := range rounds {
		for j, want := range []string{"put k", "delete k", "put other"} {
			ev := receive(t, events)
			require.Equal(t, want, brief(ev))
			require.EqualValues(t, 3*i+j+1, ev.Revision)
		}
	}
}

// TestOddLockRecord: a lock whose record is no lease counts as held until the
// record is gone.
func TestOddLockRecord(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	require.NoError(t, mustLock(t, s, "first", time.Minute).Unlock()) // makes the bucket
	raw := dialRaw(t, srv.Addr())
	for i, hdr := range oddHeaders {
		name := fmt.Sprintf("l.%d", i)
		seq := raw.store(t, "$KV.b-locks."+name, hdr, []byte("no lease"))
		if seq == 0 {
			continue
		}
		l, err := s.Lock(name, time.Minute)
		if err != nil {
			refuses(t, ErrLockHeld, err, hdr)
			info, err := s.LockHolder(name)
			require.NoError(t, err)
			assert.Equal(t, &LockInfo{Key: name, Token: seq}, info)
			require.NoError(t, mustKV(t, nc, "b-locks").Purge(context.Background(), name))
			l = mustLock(t, s, name, time.Minute)
		}
		assert.Greater(t, l.(Fenced).Token(), seq)
		require.NoError(t, l.Refresh())
		require.NoError(t, l.Unlock())
	}
}

// TestRandomMessages stores messages with random headers and data, in every third
// bucket by a stream that republishes them there: the methods never fail, and agree
// with each other.
func TestRandomMessages(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := mathrand.New(mathrand.NewPCG(seed, 0))
	srv := startServer(t, nil)
	raw := dialRaw(t, srv.Addr())
	nc := connect(t, srv.ClientURL())
	pick := func(from ...string) string { return from[rnd.IntN(len(from))] }
	names := []string{"KV-Operation", "Nats-Marker-Reason", "Nats-Stream", "Nats-Sequence", "Nats-Subject", "Nats-Time-Stamp",
		"Nats-Num-Pending", "Status", "Description", "State", "Nats-Msg-Size", "foo", "", "a b",
		"Nats-TTL: 1h\r\nfoo", "Nats-TTL: never\r\nfoo", "Nats-Rollup: sub\r\nfoo"}
	values := []string{"DEL", "PURGE", "MaxAge", "KV_b", "KV_fuzz", "1", "0", "-1", "99999999999999999999", "404", "x c=5 d=6 t=7",
		"$KV.b.other", "2020-01-01T00:00:00Z", "", "\xff", "\x00"}
	block := func() string {
		var b strings.Builder
		b.WriteString(pick("NATS/1.0\r\n", "NATS/1.0\r\n", "NATS/1.0\r\n", "NATS/1.0 404 x\r\n", "NATS/1.0", "HTTP/1.1\r\n"))
		for range rnd.IntN(5) {
			b.WriteString(pick(names...) + pick(": ", ": ", ": ", ":", " : ", "") + pick(values...) + pick("\r\n", "\r\n", "\r\n", "\n", "\r\n\r\n", "", "\r"))
		}
		b.WriteString(pick("\r\n", "\r\n", "\r\n", "\r\n", ""))
		return b.String()
	}
	for round := range 6 {
		bucket := fmt.Sprintf("fuzz-%d", round)
		s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket})
		watch := observe(mustWatch(t, s, "*"))
		store := func(key, hdr string, data []byte) bool {
			return raw.store(t, "$KV."+bucket+"."+key, hdr, data) != 0
		}
		if round%3 == 2 {
			store = republisher(t, nc, raw, s, bucket)
		}
		var keys []string
		for i := range 60 {
			key := fmt.Sprintf("%s.%d", pick("a", "b", "c"), i)
			if rnd.IntN(2) == 0 {
				require.NoError(t, s.Put(key, nil, 0))
			}
			hdr := block()
			data := make([]byte, rnd.IntN(2)*rnd.IntN(1+round%2*4000))
			for i := range data {
				data[i] = byte(rnd.Uint32())
			}
			if !store(key, hdr, data) {
				continue
			}
			keys = append(keys, key)
			if kv, err := s.GetKeyValue(key); err != ErrNotFound { //nolint:errorlint // bare
				require.NoError(t, err, "%q", hdr)
				assert.Equal(t, data, kv.Value, "%q", hdr)
			}
			if t.Failed() {
				t.Logf("%s: %q", key, hdr)
			}
		}
		agree(t, s, "", keys)
		for _, prefix := range []string{"a.", "b.", "c."} {
			agree(t, s, prefix, nil)
		}
		for _, key := range keys {
			kv, err := s.GetKeyValue(key)
			eventually(t, func() bool {
				last := watch.last(key)
				if err == ErrNotFound { //nolint:errorlint // bare
					return last == nil || last.Operation == OpDelete // there may have been nothing to delete
				}
				return last != nil && assert.ObjectsAreEqual(kv, last.KeyValue)
			}, "the watch reports the state of "+key)
		}
		for _, key := range keys {
			writable(t, s, key)
		}
		require.NoError(t, s.Delete("last")) // by the republisher
		assert.Empty(t, agree(t, s, "", keys))
		require.False(t, t.Failed(), "round %d", round)
	}
}

// republisher makes a stream that republishes into a bucket, and returns what stores
// messages in it, and waits until they are in the bucket, too, if the bucket takes
// them.
func republisher(t *testing.T, nc *nats.Conn, raw *rawClient, s *NATSStore, bucket string) func(key, hdr string, data []byte) bool {
	t.Helper()
	js := newJetStream(t, nc)
	source := "source." + bucket + "."
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "SOURCE-" + bucket, Subjects: []string{source + ">"}, AllowMsgTTL: true, AllowRollup: true,
		RePublish: &jetstream.RePublish{Source: source + ">", Destination: "$KV." + bucket + ".>"},
	})
	require.NoError(t, err)
	last := 0
	return func(key, hdr string, data []byte) bool {
		if raw.store(t, source+key, hdr, data) == 0 {
			return false
		}
		last++ // what is republished after it comes after it
		value := fmt.Sprint(last)
		_, err := js.Publish(t.Context(), source+"last", []byte(value))
		require.NoError(t, err)
		eventually(t, func() bool { got, _ := s.Get("last"); return string(got) == value }, "it is republished")
		return true
	}
}
