//go:build !oldserver

package state

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Fuzz targets: the pure functions against a reference that is as simple as can
// be, and against what the server makes of the same bytes.

// kvKey is the rule for keys as nats.go has it.
var kvKey = regexp.MustCompile(`\A[-/_=\.a-zA-Z0-9]+\z`)

func naiveKey(key string) bool {
	return len(key) <= 1024 && kvKey.MatchString(key) && !strings.Contains(key, "..") && key[0] != '.' && key[len(key)-1] != '.'
}

func FuzzValidateKey(f *testing.F) {
	for _, key := range append(goodKeys, badKeys...) {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		err := ValidateKey(key)
		if err != nil && err != ErrInvalidKey { //nolint:errorlint // bare
			t.Fatalf("%q: %v", key, err)
		}
		if valid := err == nil; valid != naiveKey(key) {
			t.Fatalf("%q: valid is %v", key, valid)
		}
		if err == nil && !server.IsValidLiteralSubject("$KV.bucket."+key) {
			t.Fatalf("%q makes no subject", key)
		}
	})
}

func FuzzPattern(f *testing.F) {
	for i, pattern := range append([]string{"*", "a*", "a.*", "a.b*", "a.b.*", "a"}, badPatterns...) {
		f.Add(pattern, []string{"a", "a.b", "a.b.c", "ab"}[i%4])
	}
	for _, key := range goodKeys {
		f.Add(key, key)
		f.Add(key+"*", key)
		f.Add(key[:len(key)/2]+"*", key)
	}
	b := &bucket{prefix: "$KV.bucket."}
	f.Fuzz(func(t *testing.T, text, key string) {
		star := strings.HasSuffix(text, "*")
		beginning := strings.TrimSuffix(text, "*")
		naive := text == key
		if star {
			naive = len(key) >= len(beginning) && key[:len(beginning)] == beginning
		}
		if MatchPattern(text, key) != naive {
			t.Fatalf("MatchPattern(%q, %q) is %v", text, key, !naive)
		}
		p, err := parsePattern(text)
		if err != nil && err != ErrInvalidKey { //nolint:errorlint // bare
			t.Fatalf("%q: %v", text, err)
		}
		// It is valid if and only if it could match a key, with nothing but a
		// last byte that is a star.
		could := naiveKey(beginning) || star && naiveKey(beginning+"x")
		if (err == nil) != could {
			t.Fatalf("pattern %q: %v", text, err)
		}
		if err != nil {
			return
		}
		filter := b.filter(p)
		if !server.IsValidSubject(filter) {
			t.Fatalf("pattern %q has the filter %q", text, filter)
		}
		if !naiveKey(key) {
			return
		}
		if p.matches(key) != naive {
			t.Fatalf("pattern %q and key %q: %v", text, key, !naive)
		}
		subject := b.prefix + key
		if naive && (!server.SubjectMatchesFilter(subject, filter) || !server.SubjectsCollide(subject, filter)) {
			t.Fatalf("key %q matches %q but not the filter %q", key, text, filter)
		}
		if got, ok := b.key(p, subject); ok != naive || ok && got != key {
			t.Fatalf("pattern %q makes %q, %v of key %q", text, got, ok, key)
		}
	})
}

// FuzzDecode reads messages by anybody: the header block is any bytes.
func FuzzDecode(f *testing.F) {
	for _, block := range []string{
		"", "NATS/1.0\r\n\r\n", "NATS/1.0\r\nNats-TTL: 5\r\nState: op t=4500000000\r\n\r\n", "NATS/1.0\r\nNats-TTL: never\r\n\r\n",
		"NATS/1.0\r\nNats-TTL: Never\r\n\r\n",
		"NATS/1.0\r\nNats-TTL: 1m30s\r\n\r\n", "NATS/1.0\r\nNats-TTL: -1\r\nState: op t=x\r\n\r\n",
		"NATS/1.0\r\nKV-Operation: DEL\r\n\r\n", "NATS/1.0\r\nKV-Operation: PURGE\r\nNats-Rollup: sub\r\n\r\n",
		"NATS/1.0\r\nNats-Marker-Reason: MaxAge\r\n\r\n", "NATS/1.0\r\nState: abc.1 c=999 d=2000\r\n\r\n",
		"NATS/1.0\r\nState: x c=-5\r\n\r\n", "NATS/1.0\r\nState: c=1 c=99999999999999999999 d=1\r\n\r\n", "NATS/1.0\r\nState: x  t=9223372036854775807 c\r\n\r\n",
		"NATS/1.0\r\nNats-TTL: 9000000000\r\n\r\n", "NATS/1.0 404 No\r\n\r\n", "NATS/1.0\r\nA\r\n\r\n", "\x00\xff",
	} {
		f.Add([]byte(block), []byte("value"), uint64(7), int64(1_700_000_000_000_000_000), int64(0))
		f.Add([]byte(block), []byte(nil), uint64(1), int64(1), int64(time.Hour))
	}
	f.Fuzz(func(t *testing.T, block, data []byte, seq uint64, at, maxAge int64) {
		if at <= 0 || maxAge < 0 {
			return // the server's own, which are never so
		}
		written := timestamp(at)
		r := (&storedMsg{Seq: seq, Header: block, Data: data, Time: time.Unix(0, at)}).record(time.Duration(maxAge))
		hdr, err := nats.DecodeHeadersMsg(block)
		if err != nil {
			hdr = nats.Header{} // what cannot be read counts as absent
		}
		if r.revision != seq || r.modified != written || r.value == nil || string(r.value) != string(data) {
			t.Fatalf("%+v of sequence %d at %d", r, seq, at)
		}
		if r.created > written || r.created < 0 || r.created == 0 && !r.deleted {
			t.Fatalf("created at %d, written at %d", r.created, written)
		}
		op := hdr.Get("KV-Operation")
		marker := op == "DEL" || op == "PURGE" || hdr.Get("Nats-Marker-Reason") != ""
		if r.deleted != marker || r.expiry && !marker {
			t.Fatalf("deleted is %v with %q", r.deleted, hdr)
		}
		if marker {
			return
		}
		if r.deadline != 0 && r.deadline <= written {
			t.Fatalf("it ends at %d, before it was written at %d", r.deadline, written)
		}
		server, never, stored := serverTTL(hdr.Get("Nats-TTL"))
		if !stored {
			return // no server takes it
		}
		var want timestamp
		if server > 0 && server <= maxServerTTL {
			want = written.deadline(server)
		}
		if exact := decodeState(hdr.Get(headerState)).ttl; exact > 0 {
			want = written.deadline(exact)
		}
		if end := written.deadline(time.Duration(maxAge)); !never && end != 0 && (want == 0 || want > end) {
			want = end
		}
		if r.deadline != want {
			t.Fatalf("%q written at %d ends at %d instead of %d", hdr, written, r.deadline, want)
		}
	})
}

// serverTTL is what nats-server makes of a Nats-TTL (parseMessageTTL), and
// whether it stores the message then.
func serverTTL(s string) (ttl time.Duration, never, stored bool) {
	if s == "" {
		return 0, false, true
	}
	if strings.ToLower(s) == "never" {
		return 0, true, true
	}
	if d, err := time.ParseDuration(s); err == nil {
		return d.Truncate(time.Second), false, d >= time.Second
	}
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false, false
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n == 0 {
		return 0, false, false
	}
	if n > int64(maxServerTTL/time.Second) {
		return maxServerTTL + 1, false, true
	}
	return time.Duration(n) * time.Second, false, true
}

// FuzzEntry reads what the store itself writes: the deadline is exact, and the
// creation time is that of the value that was replaced, if that still was there
// when the server wrote the new one.
func FuzzEntry(f *testing.F) {
	f.Add(int64(0), int64(0), int64(0), int64(0), int64(1e6), false)
	f.Add(int64(1), int64(time.Hour), int64(time.Second), int64(time.Minute), int64(1e6), false)
	f.Add(int64(time.Second), int64(5e5), int64(time.Second), int64(1e6), int64(1e6), false)
	f.Add(int64(1<<63-1), int64(0), int64(time.Hour), int64(0), int64(0), true)
	f.Add(int64(1500*time.Millisecond), int64(time.Hour), int64(1), int64(1), int64(1), true)
	f.Add(int64(time.Second), int64(-time.Millisecond), int64(time.Second), int64(0), int64(1e6), false)
	f.Add(int64(time.Second), int64(-time.Hour), int64(2*time.Hour), int64(0), int64(1e6), false)
	f.Fuzz(func(t *testing.T, ttl, life, age, slack, delay int64, deleted bool) {
		const now = timestamp(1_700_000_000_000_000_000)
		if ttl < 0 || age < 0 || slack < 0 || delay < 0 || max(age, slack, delay, -life) > int64(now/2) {
			return
		}
		last := record{entry: entry{revision: 5, created: now - timestamp(age), modified: now - timestamp(age)}, deleted: deleted}
		switch {
		case life > 0:
			last.deadline = now.deadline(time.Duration(life)) // it is there for all that the writer knows
		case life < 0:
			last.deadline = now + timestamp(life) // it has gone
		}
		e := encoder{clockReading: clockReading{now: now, uncertainty: timestamp(slack)}, grace: expiryGrace, rollup: true}
		hdr, next := e.encode(mutation{key: "k", op: "op", value: []byte("v"), ttl: time.Duration(ttl)}, last, ifUnchanged)
		written := now + timestamp(delay)
		r := decode(hdr.Header, []byte("v"), 6, written, 0)
		if want := written.deadline(time.Duration(ttl)); r.deadline != want {
			t.Fatalf("ttl %d: it ends at %d instead of %d", ttl, r.deadline, want)
		}
		if r.op != "op" || r.deleted || next.deleted {
			t.Fatalf("%+v", r)
		}
		if n := (&nats.Msg{Header: hdr.Header}).Size(); hdr.size() < n {
			t.Fatalf("a header of %d bytes is taken for one of %d", n, hdr.size())
		}
		switch {
		case !deleted && age > 0 && (last.deadline == 0 || last.deadline > written) && r.created != last.created:
			t.Fatalf("created at %d instead of %d", r.created, last.created)
		case !deleted && last.deadline.passed(written) && r.created < max(now, last.deadline):
			t.Fatalf("what had expired at %d makes %d the creation of what was written at %d", last.deadline, r.created, written)
		case (deleted || last.deadline.passed(written)) && (r.created < now || r.created > written):
			t.Fatalf("created at %d, asked for at %d and written at %d", r.created, now, written)
		}
		if !next.uncertain && timestamp(delay) < guessMargin && r.created != next.created {
			t.Fatalf("its writer is sure that it was created at %d, and everybody else reads %d", next.created, r.created)
		}
		if seconds := hdr.Get("Nats-TTL"); seconds != "" {
			server, err := strconv.ParseInt(seconds, 10, 64)
			if err != nil || server < 1 || server < ttl/int64(time.Second) || server > int64(maxServerTTL/time.Second) {
				t.Fatalf("ttl %d is %q to the server", ttl, seconds)
			}
			if time.Duration(server)*time.Second < time.Duration(ttl) {
				t.Fatalf("the server would remove after %d s what lives %v", server, time.Duration(ttl))
			}
		}
	})
}

func FuzzParseDelivery(f *testing.F) {
	for _, reply := range []string{
		"", "$JS.ACK.KV_b.c.1.2.3.1700000000000000000.0", "$JS.ACK.domain.hash.KV_b.c.1.22.33.1700000000000000000.4", "$JS.ACK.d.h.s.c.1.2.3.4.5.random",
		"$JS.ACK.s.c.1.2.3.4", "$JS.ACK.s.c.1.2.3.4.5.6", "$JS.FC.s.c.1.2.3.4.5", "$JS.ACK.s.c.1.-2.3.4.5", "$JS.ACK.s.c.1.99999999999999999999.3.4.5", "........",
	} {
		f.Add(reply, uint64(2), uint64(3), int64(4))
	}
	f.Fuzz(func(t *testing.T, reply string, seq, count uint64, at int64) {
		if d, ok := parseDelivery(reply); ok {
			// What it took for a delivery has the numbers where they belong.
			tokens := strings.Split(reply, ".")
			first := 5
			if len(tokens) != 9 {
				first = 7
			}
			rest := strings.Join(tokens[first:first+3], ".")
			back := fmt.Sprintf("%d.%d.%d", d.seq, d.count, d.written)
			if !strings.HasPrefix(reply, "$JS.ACK.") || len(rest) == len(back) && rest != back {
				t.Fatalf("%q is %+v", reply, d)
			}
		}
		want := delivery{seq, count, timestamp(at), 5}
		for _, form := range []string{"$JS.ACK.KV_b.c.1.%d.%d.%d.5", "$JS.ACK._.hash.KV_b.c.1.%d.%d.%d.5", "$JS.ACK.domain.hash.KV_b.c.1.%d.%d.%d.5.token"} {
			text := fmt.Sprintf(form, seq, count, at)
			if got, ok := parseDelivery(text); !ok || got != want {
				t.Fatalf("%q is %+v, %v", text, got, ok)
			}
		}
	})
}

// FuzzAck compares the short way to read an acknowledgement with a decoder, for
// all that a server can write.
func FuzzAck(f *testing.F) {
	f.Add("KV_bucket", "", uint64(12), false, uint16(0), "")
	f.Add("KV_bucket", "hub", uint64(1<<64-1), true, uint16(0), "")
	f.Add(`","seq":5,"x":"`, `,"seq":7}`, uint64(0), false, uint16(10071), `wrong last sequence: 5`)
	f.Fuzz(func(t *testing.T, stream, domain string, seq uint64, duplicate bool, code uint16, text string) {
		answer := server.JSPubAckResponse{PubAck: &server.PubAck{Stream: stream, Domain: domain, Sequence: seq, Duplicate: duplicate}}
		if code != 0 {
			answer.Error = &server.ApiError{Code: 400, ErrCode: code, Description: text}
		}
		data, err := json.Marshal(answer)
		if err != nil {
			t.Fatal(err)
		}
		if got, ok := ackedSeq(data); ok && (got != seq || code != 0) {
			t.Fatalf("%s is read as sequence %d", data, got)
		} else if !ok && code == 0 && seq < 1e18 && stream == "KV_bucket" && domain == "" && !duplicate {
			t.Fatalf("%s is not understood", data)
		}
	})
}

// FuzzAckBytes gives it any bytes: no panic, and no number that is not there.
func FuzzAckBytes(f *testing.F) {
	f.Add([]byte(`{"stream":"KV_bucket","seq":12}`))
	f.Add([]byte(`{"error":{"code":400,"err_code":10071},"stream":"","seq":0}`))
	f.Add([]byte(`,"seq":`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if seq, ok := ackedSeq(data); ok && !strings.Contains(string(data), fmt.Sprint(seq)) && !strings.Contains(string(data), `,"seq":0`) {
			t.Fatalf("%q is read as sequence %d", data, seq)
		}
	})
}

// FuzzQueue compares the queue of a watch with a list. Each byte is an action:
// to take some events, or to push many.
func FuzzQueue(f *testing.F) {
	f.Add([]byte{0, 1, 2, 128, 129})
	f.Add([]byte("\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x7f\x80\x01\x02\xff\x7f\xff\xff"))
	f.Add([]byte("@AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\x80\x81\xf0AAAAA\xff\xff\xffA"))
	f.Fuzz(func(t *testing.T, actions []byte) {
		if len(actions) > 300 {
			return
		}
		var q queue
		var naive []*KeyValue
		told, pushed := map[string]uint64{}, map[string]uint64{}
		revision, keys := uint64(0), map[string]bool{}
		push := func(key string) {
			revision++
			ev := &KeyValue{Key: key, Revision: revision}
			keys[key], pushed[key] = true, revision
			q.push(ev)
			if len(naive) >= maxWaiting {
				for i := len(naive) - 1; i >= 0; i-- {
					if naive[i].Key == key {
						naive[i] = ev
						return
					}
				}
			}
			naive = append(naive, ev)
		}
		pop := func() {
			ev := q.pop()
			if ev != naive[0] {
				t.Fatalf("%v came instead of %v", *ev, *naive[0])
			}
			if naive = naive[1:]; ev.Revision <= told[ev.Key] {
				t.Fatalf("%s: %d came after %d", ev.Key, ev.Revision, told[ev.Key])
			}
			told[ev.Key] = ev.Revision
		}
		for _, a := range actions {
			if n := int(a & 0x7f); a < 0x80 {
				for i := range n + 1 {
					push(strconv.Itoa(i * int(a) % 61))
				}
			} else {
				for range min(n*n/8+1, len(naive)) {
					pop()
				}
			}
			if q.len() != len(naive) || q.len() > maxWaiting+len(keys) {
				t.Fatalf("%d wait instead of %d", q.len(), len(naive))
			}
		}
		for len(naive) > 0 {
			pop()
		}
		for key, last := range pushed {
			if told[key] != last {
				t.Fatalf("%s: %d was the last to come, and not %d", key, told[key], last)
			}
		}
	})
}
