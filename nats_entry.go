package state

import (
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// The headers that make a message of a KV bucket an entry. The data is the
// value as it is, so that every other client reads it.
const (
	// The server's and the ones that all KV clients share.
	headerTTL      = "Nats-TTL"
	headerExpected = "Nats-Expected-Last-Subject-Sequence"
	headerRollup   = "Nats-Rollup"
	// headerExpectedSubject says of which subject headerExpected speaks, if not
	// of the message's own.
	headerExpectedSubject = "Nats-Expected-Last-Subject-Sequence-Subject"
	headerOperation       = "KV-Operation"
	headerReason          = "Nats-Marker-Reason"

	// headerExact is the TTL in nanoseconds, where Nats-TTL, which is only the
	// server's broom, says something else.
	headerExact = "State-TTL"
	// headerCreated is when the key came into being, in nanoseconds since 1970
	// by the store's clock. If the revision that was replaced had a deadline, it
	// follows: had that passed when this one was written, the key is a new one.
	headerCreated = "State-Created"
	// headerOp identifies the write, so that its writer knows it again, and then
	// the write that it replaced, if known. Attempts after the first are told
	// apart by a "+" and their number. Locks begin it with the owner of the lease.
	headerOp = "State-Op"
)

const (
	// markerLife is how long a deletion stays on the server: long enough for a
	// watch that was cut off to come back to it.
	markerLife = time.Hour

	// coverLife is how long something must stay on the server that hides an
	// older and longer-lived revision. A server that was killed rebuilds its
	// index from what it finds on the disk, and finds again what was removed
	// since it last wrote the index, which it does every two minutes.
	coverLife = 10 * time.Minute

	// maxBroom is the longest TTL that is left to the server. It takes one of
	// 290 years for one that has passed.
	maxBroom = 100 * 365 * 24 * time.Hour
)

// A record is the last message of a key. Its zero value is that of a key that
// has none.
type record struct {
	entry
	deadline timestamp // none for 0
	removal  timestamp // when the server removes it; none for 0
	deleted  bool      // it is a marker; created is then that of what it deleted
	expiry   bool      // and the server wrote it, in place of what expired
	op       string

	// guessed says that the record was not read but written, so that its times
	// are estimates from below: its writer is not told the server's. It is
	// unsure if even whether the key is a new one depends on that.
	guessed, unsure bool
}

// exists reports whether the key exists at now.
func (r *record) exists(now timestamp) bool {
	return r.revision != 0 && !r.deleted && !r.deadline.passed(now)
}

// leaving reports whether the server is about to remove the record, or should
// have done so a timestamp ago.
func (r *record) leaving(now timestamp) bool {
	const early, late = timestamp(250 * time.Millisecond), timestamp(2 * time.Second)
	return r.removal != 0 && now > r.removal-early && now < r.removal+late
}

// decode makes a record of a message that may be anybody's. Headers that make
// no sense are taken for absent ones.
func decode(hdr nats.Header, data []byte, seq uint64, written timestamp, maxAge time.Duration) record {
	r := record{
		entry: entry{value: data, revision: seq, created: written, modified: written},
	}
	r.op, _ = decodeOp(hdr.Get(headerOp))
	if r.value == nil {
		r.value = []byte{}
	}
	created, replaced := decodeCreated(hdr.Get(headerCreated))
	lasting := created > 0 && created < written && !replaced.passed(written)
	if lasting {
		r.created = created
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

	ttl, never := decodeTTL(hdr.Get(headerTTL))
	r.removal = written.deadline(ttl)
	if exact, err := strconv.ParseInt(hdr.Get(headerExact), 10, 64); err == nil && exact > 0 {
		ttl = time.Duration(exact)
	}
	r.deadline = written.deadline(ttl)
	if end := written.deadline(maxAge); !never {
		if r.deadline.outlives(end) {
			r.deadline = end
		}
		if r.removal.outlives(end) {
			r.removal = end
		}
	}
	return r
}

// decodeCreated reads a headerCreated: when the key came into being, if what was
// replaced had not come to its deadline.
func decodeCreated(s string) (created, deadline timestamp) {
	since, before, _ := strings.Cut(s, " ")
	at, _ := strconv.ParseInt(since, 10, 64)
	end, _ := strconv.ParseInt(before, 10, 64)
	return timestamp(at), timestamp(end)
}

// decodeOp reads a headerOp: the write's id, and that of the one that it replaced.
func decodeOp(s string) (op, replaced string) {
	op, replaced, _ = strings.Cut(s, " ")
	return op, replaced
}

// decodeTTL reads a Nats-TTL as the server does: whole seconds, or a duration
// that is cut to whole seconds, or "never".
func decodeTTL(s string) (ttl time.Duration, never bool) {
	if s == "" || s == "never" {
		return 0, s == "never"
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < 0 || n > int64(maxBroom/time.Second) {
			n = 0
		}
		return time.Duration(n) * time.Second, false
	}
	if d, err := time.ParseDuration(s); err == nil {
		return max(d.Truncate(time.Second), 0), false
	}
	return 0, false
}

// An entryWriter makes messages.
type entryWriter struct {
	subject    string
	op         string
	now, slack timestamp // the lower bound of the server's clock, and how far it may be past it

	chained bool // it is told what was replaced
	history bool // older revisions must go, or they come back when this one does
	rollup  bool // the bucket lets them go
	markers bool // the server puts a marker in place of what it removes

	doubtful bool // an earlier attempt may have been stored
}

// value returns the message that writes a value in place of last.
func (w entryWriter) value(last *record, value []byte, ttl time.Duration) (*nats.Msg, record) {
	next := record{entry: entry{created: w.now, modified: w.now}, op: w.op, guessed: true}
	lasting, surely := w.lasts(last)
	if lasting {
		next.created = last.created
	}
	next.unsure = !surely
	hdr := newHeader()
	hdr.set(headerOp, w.ops(last))
	hdr.set(headerExpected, strconv.FormatUint(last.revision, 10))
	hdr.set(headerCreated, w.created(last))
	if ttl > 0 {
		next.deadline = w.now.deadline(ttl)
		broom := ttl
		if last.revision != 0 && !last.deleted && last.deadline.outlives(next.deadline) {
			broom = max(broom, coverLife)
		}
		if w.markers {
			broom += min(coverLife, math.MaxInt64-broom)
		}
		if broom <= maxBroom {
			broom = (broom + time.Second - 1).Truncate(time.Second)
			next.removal = w.now.deadline(broom)
			hdr.set(headerTTL, strconv.FormatInt(int64(broom/time.Second), 10))
		}
		if broom != ttl {
			hdr.set(headerExact, strconv.FormatInt(int64(ttl), 10))
		}
		if w.history {
			hdr.set(headerRollup, "sub")
		}
	}
	return &nats.Msg{Subject: w.subject, Header: hdr.Header, Data: value}, next
}

// A header is one whose values share an array.
type header struct {
	nats.Header
	values []string
}

func newHeader() header {
	return header{make(nats.Header, 8), make([]string, 0, 6)}
}

func (h *header) set(name, value string) {
	n := len(h.values)
	h.values = append(h.values, value)
	h.Header[name] = h.values[n : n+1 : n+1]
}

// lasts reports whether last will not have expired when it is replaced, and
// whether that is sure. Where it is not, the message leaves it to the server's
// clock.
func (w entryWriter) lasts(last *record) (lasts, surely bool) {
	if last.revision == 0 || last.deleted || last.deadline.passed(w.now-closeCall) {
		return false, true
	}
	return true, !last.deadline.passed(w.now + w.slack + guessMargin)
}

// ops is the value of headerOp for what is written on top of last.
func (w entryWriter) ops(last *record) string {
	if !w.chained || last.revision == 0 || last.op == "" {
		return w.op
	}
	return w.op + " " + last.op
}

// created is the value of headerCreated for what is written on top of last.
func (w entryWriter) created(last *record) string {
	b := make([]byte, 0, 48)
	if lasting, _ := w.lasts(last); !lasting {
		return string(strconv.AppendInt(b, int64(w.now), 10))
	}
	b = strconv.AppendInt(b, int64(last.created), 10)
	if last.deadline != 0 {
		b = strconv.AppendInt(append(b, ' '), int64(last.deadline), 10)
	}
	return string(b)
}

// marker returns the message that deletes the key.
func (w entryWriter) marker(last *record, life time.Duration) (*nats.Msg, record) {
	hdr := nats.Header{
		headerOp:        {w.ops(last)},
		headerExpected:  {strconv.FormatUint(last.revision, 10)},
		headerOperation: {"PURGE"},
		headerCreated:   {w.created(last)},
		headerTTL:       {strconv.FormatInt(int64(life/time.Second), 10)},
	}
	if w.rollup {
		hdr[headerRollup] = []string{"sub"}
	}
	return &nats.Msg{Subject: w.subject, Header: hdr}, record{deleted: true, op: w.op, entry: entry{modified: w.now}}
}

// A storedMsg is a message as the stream's leader returns it.
type storedMsg struct {
	Subject string    `json:"subject"`
	Seq     uint64    `json:"seq"`
	Header  []byte    `json:"hdrs"`
	Data    []byte    `json:"data"`
	Time    time.Time `json:"time"`
}

func (m *storedMsg) record(maxAge time.Duration) (record, error) {
	var hdr nats.Header
	if len(m.Header) > 0 {
		var err error
		if hdr, err = nats.DecodeHeadersMsg(m.Header); err != nil {
			return record{}, err
		}
	}
	return decode(hdr, m.Data, m.Seq, timestamp(m.Time.UnixNano()), maxAge), nil
}

// directRecord reads the answer to a direct get.
func directRecord(msg *nats.Msg, maxAge time.Duration) (record, error) {
	seq, err := strconv.ParseUint(msg.Header.Get("Nats-Sequence"), 10, 64)
	if err != nil {
		return record{}, err
	}
	written, err := time.Parse(time.RFC3339Nano, msg.Header.Get("Nats-Time-Stamp"))
	if err != nil {
		return record{}, err
	}
	return decode(msg.Header, msg.Data, seq, timestamp(written.UnixNano()), maxAge), nil
}

// A delivery tells of a message that a consumer delivered what the message
// itself does not.
type delivery struct {
	seq     uint64 // in the stream
	count   uint64 // how many the consumer has delivered
	written timestamp
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
	written, _, _ := strings.Cut(rest, ".")
	var err1, err2 error
	d.seq, err1 = strconv.ParseUint(seq, 10, 64)
	d.count, err2 = strconv.ParseUint(count, 10, 64)
	at, err3 := strconv.ParseInt(written, 10, 64)
	d.written = timestamp(at)
	return d, err1 == nil && err2 == nil && err3 == nil
}

// A leaseValue is the value of a lock's record. It is for people to read; what
// tells holders apart is the record's operation id.
type leaseValue struct {
	Owner string `json:"owner"`
	Nonce string `json:"nonce"`
	TTL   string `json:"ttl"`
}

func (v leaseValue) encode() []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // three strings always can be
	}
	return b
}
