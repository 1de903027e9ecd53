package state

import (
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// The headers that make a message of a KV bucket an entry. The data is the
// value as it is, so that every other client reads it.
const (
	// Those of the server, and those that all KV clients share.
	headerTTL       = "Nats-TTL"
	headerExpected  = "Nats-Expected-Last-Subject-Sequence"
	headerRollup    = "Nats-Rollup"
	headerOperation = "KV-Operation"
	headerReason    = "Nats-Marker-Reason"
	// headerExpectedSubject names the subject that headerExpected refers to, if
	// it is not the message's own.
	headerExpectedSubject = "Nats-Expected-Last-Subject-Sequence-Subject"

	// headerState holds all that is ours, as words. The server copies all
	// headers of a message for each one that it adds to an answer, so there is
	// only one. The first word identifies the write, so that its writer
	// recognises it; the others are
	//
	//	c=  when the key came into being, by the store's clock
	//	d=  the deadline of the value that was replaced: if that had passed when
	//	    this one was written, the key came into being with this one
	//	t=  the exact TTL, of which Nats-TTL is only the server's part
	//	x=  of a deletion: the revision that had expired, with the deadline d=; a
	//	    value that follows it has it, too
	//
	// in nanoseconds, times since 1970.
	headerState = "State"
)

// A record is the last message of a key. Its zero value is that of a key that
// has none.
type record struct {
	entry
	deadline timestamp // none for 0
	removal  timestamp // when the server removes it; none for 0
	deleted  bool      // it is a marker; created is then that of what it deleted
	expiry   bool      // and the server wrote it, in place of what expired
	expired  uint64    // of a deletion that a watch wrote, or of a value that replaced it: the revision that had expired
	base     uint64    // the revision that it replaced, if that was a condition
	aged     bool      // the deadline is that of the bucket's MaxAge
	op       string    // identifies the write, "" if another client made it
	replaced timestamp // the deadline of what was replaced, as far as the writer knew; 0 for none

	// estimated says that the record was not read but written, so that its times
	// are estimates from below: the writer does not learn the server's. It is
	// uncertain if even whether the key came into being with it depends on that.
	estimated, uncertain bool
	// yields is that of the lock that this store has released.
	yields int
}

// exists reports whether the key exists at now.
func (r *record) exists(now timestamp) bool {
	return r.revision != 0 && !r.deleted && !r.deadline.passed(now)
}

// leaving reports whether the server is about to remove the record, or should
// have done so a moment ago.
func (r *record) leaving(now timestamp) bool {
	const early, late = timestamp(250 * time.Millisecond), timestamp(2 * time.Second)
	return !r.deleted && r.removal != 0 && now > r.removal-early && now < r.removal+late
}

// decode makes a record of a message that may be anybody's. Headers that make
// no sense count as absent.
func decode(hdr nats.Header, data []byte, seq uint64, written timestamp, maxAge time.Duration) record {
	r := record{
		entry: entry{value: data, revision: seq, created: written, modified: written},
	}
	if r.value == nil {
		r.value = []byte{}
	}
	st := decodeState(hdr.Get(headerState))
	r.op, r.replaced, r.expired = st.op, st.replaced, st.expired
	if len(hdr[headerExpectedSubject]) == 0 {
		r.base, _ = strconv.ParseUint(hdr.Get(headerExpected), 10, 64)
	}
	lasting := st.created > 0 && st.created < written && !st.replaced.passed(written)
	if lasting {
		r.created = st.created
	}
	ttl, never := decodeTTL(hdr.Get(headerTTL))
	r.removal = written.deadline(ttl)
	end := written.deadline(maxAge)
	if !never && r.removal.outlives(end) {
		r.removal = end
	}
	reason := hdr.Get(headerReason)
	if op := hdr.Get(headerOperation); op == "DEL" || op == "PURGE" || reason != "" {
		r.deleted = true
		r.expiry = reason == "MaxAge"
		if !lasting {
			r.created = 0
		}
		return r
	}

	if st.ttl > 0 {
		ttl = st.ttl
	}
	r.deadline = written.deadline(ttl)
	if !never && r.deadline.outlives(end) {
		r.deadline, r.aged = end, true
	}
	return r
}

// A stateHeader is the content of a headerState.
type stateHeader struct {
	op       string
	created  timestamp
	replaced timestamp // the deadline of what was replaced
	ttl      time.Duration
	expired  uint64 // the revision that had expired
}

// encode appends the words that matter.
func (h stateHeader) encode() string {
	b := append(make([]byte, 0, 96), h.op...)
	word := func(name string, n int64) {
		if n != 0 {
			b = append(b, name...)
			b = strconv.AppendInt(b, n, 10)
		}
	}
	word(" c=", int64(h.created))
	word(" d=", int64(h.replaced))
	word(" t=", int64(h.ttl))
	word(" x=", int64(h.expired))
	return string(b)
}

// decodeState reads a headerState. Words that make no sense are left out.
func decodeState(s string) (h stateHeader) {
	h.op, s, _ = strings.Cut(s, " ")
	for s != "" {
		var word string
		word, s, _ = strings.Cut(s, " ")
		name, value, _ := strings.Cut(word, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil || n <= 0 {
			continue
		}
		switch name {
		case "c":
			h.created = timestamp(n)
		case "d":
			h.replaced = timestamp(n)
		case "t":
			h.ttl = time.Duration(n)
		case "x":
			h.expired = uint64(n)
		}
	}
	return h
}

// maxServerTTL is the longest TTL that is left to the server. It takes one of 290
// years for one that has passed.
const maxServerTTL = 100 * 365 * 24 * time.Hour

// decodeTTL reads a Nats-TTL as the server does: whole seconds, or a duration
// that is cut to whole seconds, or "never".
func decodeTTL(s string) (ttl time.Duration, never bool) {
	if never = strings.EqualFold(s, "never"); never || s == "" {
		return 0, never
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < 0 || n > int64(maxServerTTL/time.Second) {
			n = 0
		}
		return time.Duration(n) * time.Second, false
	}
	if d, err := time.ParseDuration(s); err == nil {
		return max(d.Truncate(time.Second), 0), false
	}
	return 0, false
}

// A storedMsg is a message as the stream's leader returns it.
type storedMsg struct {
	Subject string    `json:"subject"`
	Seq     uint64    `json:"seq"`
	Header  []byte    `json:"hdrs"`
	Data    []byte    `json:"data"`
	Time    time.Time `json:"time"`
}

// record reads the message. Headers that cannot be read count as absent.
func (m *storedMsg) record(maxAge time.Duration) record {
	return decode(decodeBlock(m.Header), m.Data, m.Seq, timestamp(m.Time.UnixNano()), maxAge)
}

// decodeBlock decodes a header block as it was stored. If that fails, it decodes
// the block as the answer to a direct get has it, where the server replaces the
// last two bytes, whatever they are, by its own headers.
func decodeBlock(block []byte) nats.Header {
	hdr, err := nats.DecodeHeadersMsg(block)
	if end := len(block) - len("\r\n"); err != nil && end > 0 {
		hdr, _ = nats.DecodeHeadersMsg(append(slices.Clip(block[:end]), "\r\n"...))
	}
	return hdr
}

// unreadable reports whether nats.go could not decode a message's headers.
func unreadable(msg *nats.Msg) bool {
	return msg.Header == nil && msg.Size() > len(msg.Subject)+len(msg.Reply)+len(msg.Data)
}

// directRecord reads the answer to a direct get, if it is a message of the
// stream: a mirror answers as well, and lags. The server's headers follow those
// that were stored, and names may repeat. Where what was stored hides them, the
// answer does not count.
func directRecord(msg *nats.Msg, stream string, maxAge time.Duration) (record, bool) {
	last := func(name string) string {
		if values := msg.Header[name]; len(values) > 0 {
			return values[len(values)-1]
		}
		return ""
	}
	seq, err := strconv.ParseUint(last("Nats-Sequence"), 10, 64)
	if err != nil || last("Nats-Stream") != stream || !appended(msg, "Nats-Stream") {
		return record{}, false
	}
	written, err := time.Parse(time.RFC3339Nano, last("Nats-Time-Stamp"))
	if err != nil {
		return record{}, false
	}
	return decode(msg.Header, msg.Data, seq, timestamp(written.UnixNano()), maxAge), true
}

// appended reports whether a message's header was decoded to its end, and has
// what the server appended to the stored one, a name first, on lines of its own.
// A block that was stored with an empty line in it ends there; and one that was
// stored without its end continues in what follows.
func appended(msg *nats.Msg, first string) bool {
	size := len("NATS/1.0\r\n\r\n")
	for name, values := range msg.Header {
		if name != first && strings.HasSuffix(name, first) {
			return false
		}
		for _, value := range values {
			if strings.Contains(value, first) {
				return false
			}
			size += len(name) + len(": ") + len(value) + len("\r\n")
		}
	}
	return len(msg.Header[first]) > 0 && msg.Size() == len(msg.Subject)+len(msg.Reply)+size+len(msg.Data)
}

// A delivery is what a consumer says about a message that it delivers.
type delivery struct {
	seq     uint64 // in the stream
	count   uint64 // how many the consumer has delivered
	written timestamp
	pending uint64 // how many there were behind it
}

// parseDelivery reads the reply subject of a delivered message, which is
//
//	$JS.ACK.<stream>.<consumer>.<tries>.<seq>.<count>.<time>.<pending>
//
// or, with a domain and an account hash before the stream, and maybe more
// tokens at the end, the longer form.
func parseDelivery(reply string) (d delivery, ok bool) {
	rest, ok := strings.CutPrefix(reply, "$JS.ACK.")
	if !ok {
		return d, false
	}
	skip := 3 // stream, consumer, tries
	switch dots := strings.Count(rest, "."); {
	case dots == 6:
	case dots >= 8:
		skip += 2
	default:
		return d, false
	}
	for range skip {
		_, rest, _ = strings.Cut(rest, ".")
	}
	seq, rest, _ := strings.Cut(rest, ".")
	count, rest, _ := strings.Cut(rest, ".")
	written, rest, _ := strings.Cut(rest, ".")
	pending, _, _ := strings.Cut(rest, ".")
	var err1, err2 error
	d.seq, err1 = strconv.ParseUint(seq, 10, 64)
	d.count, err2 = strconv.ParseUint(count, 10, 64)
	at, err3 := strconv.ParseInt(written, 10, 64)
	d.written = timestamp(at)
	d.pending, _ = strconv.ParseUint(pending, 10, 64)
	return d, err1 == nil && err2 == nil && err3 == nil
}
