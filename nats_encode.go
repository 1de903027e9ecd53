package state

import (
	"encoding/json"
	"math"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// tombstoneTTL is how long a deletion stays on the server: long enough for a
	// watch that was cut off to come back to it.
	tombstoneTTL = time.Hour

	// minTombstoneTTL is how long something must stay on the server that hides
	// an older and longer-lived revision. A server that was killed rebuilds its
	// index from what it finds on the disk, and finds again what was removed
	// since it last wrote the index, which it does every two minutes.
	minTombstoneTTL = 10 * time.Minute

	// expiryGrace is how long an entry stays on the server after its deadline,
	// so that a watch that began before the deadline still finds it when it
	// lists what existed.
	expiryGrace = 2 * time.Second
)

// A mutation is a write as data: what is to become of a key.
type mutation struct {
	key    string
	op     string // identifies the write
	value  []byte
	marker bool          // a deletion: a marker takes the place of the value
	expiry bool          // of a value that has expired
	ttl    time.Duration // 0 for one without end
	// exclusive says that nobody else writes the key as long as base is its record.
	exclusive bool
}

// A precondition says what a mutation requires of the key.
type precondition int

const (
	ifUnchanged precondition = iota // that the record it is based on is the last one
	always                          // nothing
)

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

// size returns the length of the header on the wire.
func (h *header) size() int {
	n := len("NATS/1.0\r\n\r\n")
	for name, values := range h.Header {
		n += len(name) + len(values[0]) + len(": \r\n")
	}
	return n
}

// An encoder turns mutations of one bucket into messages.
type encoder struct {
	clockReading

	maxAge  time.Duration // the bucket's own TTL; 0 for none
	rollup  bool          // the bucket lets older revisions go
	history bool          // and keeps them otherwise
	markers bool          // the server puts a marker in place of what it removes
	grace   time.Duration // how long values stay after their deadline
	fixed   bool          // all records of a key have the same size
}

// encode returns the message for a mutation of a key whose last record is base,
// and the record that it will be as far as that is known before. The message
// leaves to the server's clock what the lower bound does not decide.
func (e encoder) encode(m mutation, base record, pre precondition) (header, record) {
	hdr := newHeader()
	next := record{
		entry:   entry{created: e.now, modified: e.now},
		deleted: m.marker, op: m.op, estimated: true,
	}
	lasts, surely := e.lasts(base)
	if lasts {
		next.created = base.created
	}
	old := e.age > oldSample
	next.uncertain = !surely || !lasts && old
	state := stateHeader{op: m.op}
	switch {
	case e.fixed:
	case m.expiry:
		state.expired, state.replaced = base.revision, base.deadline
	case lasts:
		state.created, state.replaced = next.created, base.deadline
	case !m.marker:
		state.expired = base.expired
		if !old { // or it is when the server stores it
			state.created = next.created
		}
	}
	switch {
	case pre == ifUnchanged && e.fixed:
		hdr.set(headerExpected, padded(base.revision))
	case pre == ifUnchanged:
		hdr.set(headerExpected, strconv.FormatUint(base.revision, 10))
	}
	switch {
	case m.marker:
		next.removal = e.now.deadline(m.ttl)
		hdr.set(headerOperation, "PURGE")
		hdr.set(headerTTL, seconds(m.ttl))
	case m.ttl > 0:
		state.ttl = m.ttl
		next.deadline = e.now.deadline(m.ttl)
		if serverTTL := e.serverTTL(m.ttl, base, next.deadline); serverTTL <= maxServerTTL {
			next.removal = e.now.deadline(serverTTL)
			hdr.set(headerTTL, seconds(serverTTL))
		}
	}
	// An older revision that lives longer must not come back when this one goes.
	// Without a history there is none, but that may have been raised since the
	// settings were looked at. A rollup costs the server a look at each consumer
	// of the stream, so what a heartbeat does again and again is spared it.
	if e.rollup && (m.marker || m.ttl > 0) && (e.history || pre == always || outlives(base, next, m)) {
		hdr.set(headerRollup, "sub")
	}
	end := e.now.deadline(e.maxAge)
	if !m.marker && next.deadline.outlives(end) {
		next.deadline, next.aged = end, true
	}
	if next.removal.outlives(end) {
		next.removal = end
	}
	hdr.set(headerState, state.encode())
	return hdr, next
}

// outlives reports whether the record that is replaced would still be there when
// the mutation has come to its end.
func outlives(base, next record, m mutation) bool {
	end := next.deadline
	if m.marker {
		end = next.modified.deadline(m.ttl)
	}
	return base.revision != 0 && !base.deleted && base.deadline.outlives(end)
}

// serverTTL returns the TTL in whole seconds after which the server removes a
// value.
func (e encoder) serverTTL(ttl time.Duration, base record, deadline timestamp) time.Duration {
	t := ttl
	if outlives(base, record{deadline: deadline}, mutation{}) {
		t = max(t, minTombstoneTTL) // it hides what lives longer
	}
	extra := e.grace
	if e.markers {
		extra = minTombstoneTTL
	}
	return wholeSeconds(t + min(extra, math.MaxInt64-t))
}

// wholeSeconds rounds a TTL up, if that is one for the server.
func wholeSeconds(ttl time.Duration) time.Duration {
	if whole := ttl.Truncate(time.Second); whole != ttl && whole <= maxServerTTL {
		return whole + time.Second
	}
	return ttl
}

func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// padded returns a number that is as long as the largest one.
func padded(n uint64) string {
	s := strconv.FormatUint(n, 10)
	return "00000000000000000000"[len(s):] + s
}

// lasts reports whether base will not have expired when it is replaced, and
// whether that is certain.
func (e encoder) lasts(base record) (lasts, surely bool) {
	if base.revision == 0 || base.deleted || base.deadline.passed(e.now-decisionMargin) {
		return false, true
	}
	return true, !base.deadline.passed(e.now + e.uncertainty + guessMargin)
}

// guessMargin is how long before its deadline an estimated record is not good
// enough: the deadline must not pass while a write that relies on it is on its
// way.
const guessMargin = timestamp(200 * time.Millisecond)

// A leaseValue is the value of a lock's record. It is for LockHolder and for
// people; what tells holders apart is the record's operation id. Token is that
// of the acquisition, 0 in the acquisition itself, and always as long, so that
// a refresh takes no more room than what it replaces.
type leaseValue struct {
	Owner string `json:"owner"`
	TTL   string `json:"ttl"`
	Token string `json:"token"`
}

func (v leaseValue) encode() []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // three strings can always be encoded
	}
	return b
}
