package proof

import (
	"bufio"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

// TestStrangers: what other clients publish into the bucket, with any headers,
// is an entry like any other: no call fails, and nothing in it is taken for the
// server's own word.
func TestStrangers(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, false)
	s, _, err := c.open("proof")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	events, err := s.Watch("*")
	if err != nil {
		t.Fatal(err)
	}
	names := []string{"Status", "Description", "Nats-Sequence", "Nats-Stream", "Nats-Subject", "Nats-Time-Stamp", "Nats-Num-Pending",
		"Nats-UpTo-Sequence", "Nats-Pending-Messages", "Nats-Last-Consumer", "Nats-Last-Stream"}
	values := []string{"", "100", "404", "503", "No Results", "EOB", "1", "0", "18446744073709551615", "KV_proof", "OTHER", "$KV.proof.other",
		"2020-01-01T00:00:00Z"}
	rounds := 150
	if *long > 0 {
		rounds = 2000
	}
	want := map[string]uint64{}
	for i := range rounds {
		key := fmt.Sprint("k", i%20)
		msg := nats.NewMsg("$KV.proof." + key)
		msg.Data = fmt.Append(nil, "v", i)
		if i%5 == 0 {
			msg.Data = nil // as a status has none
		}
		for range rand.IntN(8) {
			name := names[rand.IntN(len(names))]
			msg.Header.Add(name, values[rand.IntN(len(values))])
		}
		reply, err := c.admin.RequestMsg(msg, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		var ack struct {
			Seq uint64 `json:"seq"`
		}
		if err := json.Unmarshal(reply.Data, &ack); err != nil || ack.Seq == 0 {
			t.Fatalf("%s %v", reply.Data, err)
		}
		want[key] = ack.Seq
		kv, err := s.GetKeyValue(key)
		if err != nil || kv.Revision != ack.Seq || string(kv.Value) != string(msg.Data) {
			t.Fatalf("with the headers %v it is %+v, %v instead of revision %d, %q", msg.Header, kv, err, ack.Seq, msg.Data)
		}
		if ev := <-events; ev.Revision != ack.Seq || ev.Key != key || ev.Operation != state.OpPut || string(ev.Value) != string(msg.Data) {
			t.Fatalf("with the headers %v the event is %+v", msg.Header, ev)
		}
		for _, pattern := range []string{"*", "k1*", key} {
			entries, err := s.Entries(pattern)
			if err != nil {
				t.Fatalf("with the headers %v: %v", msg.Header, err)
			}
			keys := []string{}
			for _, kv := range entries {
				keys = append(keys, kv.Key)
				if kv.Revision != want[kv.Key] {
					t.Fatalf("%s is at revision %d instead of %d", kv.Key, kv.Revision, want[kv.Key])
				}
			}
			expected := []string{}
			for key := range want {
				if state.MatchPattern(pattern, key) {
					expected = append(expected, key)
				}
			}
			slices.Sort(expected)
			if !slices.Equal(keys, expected) {
				t.Fatalf("with the headers %v it lists %q instead of %q", msg.Header, keys, expected)
			}
		}
	}

	// Headers that cannot be decoded.
	for _, block := range []string{"NATS/1.0\r\nfoo\r\n\r\n", "NATS/1.0\r\n: x\r\n\r\n", "junk\r\n\r\n", "NATS/1.0 404 No\r\n\r\n"} {
		if err := publishRaw(c.nodes[0].addr, "$KV.proof.raw", block, "value"); err != nil {
			t.Fatal(err)
		}
		if err := eventually(5*time.Second, func() error {
			value, err := s.Get("raw")
			if err == nil && string(value) != "value" {
				err = fmt.Errorf("it is %q", value)
			}
			return err
		}); err != nil {
			t.Errorf("with the header block %q: %v", block, err)
		}
		if keys, err := s.Keys("*"); err != nil || !slices.Contains(keys, "raw") {
			t.Errorf("with the header block %q keys are %q, %v", block, keys, err)
		}
		if err := s.Delete("raw"); err != nil {
			t.Errorf("with the header block %q: %v", block, err)
		}
	}
	if _, err := s.Lock("raw", time.Minute); err != nil { // makes the bucket
		t.Fatal(err)
	}
	if err := publishRaw(c.nodes[0].addr, "$KV.proof-locks.other", "NATS/1.0\r\nfoo\r\n\r\n", "value"); err != nil {
		t.Fatal(err)
	}
	if err := eventually(5*time.Second, func() error { _, err := s.LockHolder("other"); return err }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Lock("other", time.Minute); err != state.ErrLockHeld { //nolint:errorlint // bare
		t.Errorf("a lock with a strange record: %v", err)
	}
}

// publishRaw publishes with a header block that no client would send.
func publishRaw(addr, subject, block, data string) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	r := bufio.NewReader(conn)
	if _, err := r.ReadString('\n'); err != nil {
		return err
	}
	_, err = fmt.Fprintf(conn, "CONNECT {\"verbose\":false,\"headers\":true}\r\nHPUB %s %d %d\r\n%s%s\r\nPING\r\n", subject, len(block), len(block)+len(data), block, data)
	if err != nil {
		return err
	}
	_, err = r.ReadString('\n')
	return err
}
