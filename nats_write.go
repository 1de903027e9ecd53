package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// An outcome is what became of a message that was to be stored.
type outcome int

const (
	stored      outcome = iota
	conflicting         // refused: the key's last revision is another one
	busy                // refused: another write to the key is under way
	unavailable         // not stored; may be sent again
	refused             // not stored; sending it again is no use
	lost                // stored or not, or not yet
)

// send has the server store a message, and returns its sequence or, if it was
// conflicting, that of the key's last message, as far as the server told.
func (b *bucket) send(c *call, msg *nats.Msg) (seq uint64, o outcome, err error) {
	if b.nc.IsClosed() {
		return 0, refused, nats.ErrConnectionClosed
	}
	reply, err := b.ask(c, msg, 0)
	if err != nil {
		switch {
		case errors.Is(err, nats.ErrNoResponders), errors.Is(err, nats.ErrReconnectBufExceeded):
			return 0, unavailable, err
		case errors.Is(err, nats.ErrMaxPayload):
			return 0, refused, ErrValueTooLarge
		case errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), msg.Subject):
			return 0, refused, err
		case errors.Is(err, nats.ErrConnectionDraining), errors.Is(err, nats.ErrBadSubject),
			errors.Is(err, nats.ErrHeadersNotSupported):
			return 0, refused, err
		}
		return 0, lost, err
	}
	if seq, ok := ackedSeq(reply.Data); ok {
		return seq, stored, nil
	}
	var ack struct {
		Seq   uint64              `json:"seq"`
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, lost, fmt.Errorf("acknowledgement: %w", err)
	}
	if ack.Error == nil {
		return ack.Seq, stored, nil
	}
	switch ack.Error.ErrorCode {
	case codeWrongSequence:
		_, text, _ := strings.Cut(ack.Error.Description, ": ")
		last, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			last = ^uint64(0) // it did not tell
		}
		return last, conflicting, ack.Error
	case codeWriteInFlight:
		return 0, busy, ack.Error
	case codeUnavailable:
		return 0, unavailable, ack.Error
	case codeTooLarge:
		return 0, refused, ErrValueTooLarge
	}
	return 0, refused, ack.Error
}

// ackedSeq reads an acknowledgement as servers write it,
//
//	{"stream":"KV_bucket","seq":12}
//
// without the cost of a JSON decoder. It does not understand anything else: not
// an error, and not what is merely JSON of the same meaning. No string can look
// like its field, since a quote within one is escaped.
func ackedSeq(ack []byte) (seq uint64, ok bool) {
	if bytes.Contains(ack, []byte(`"error":`)) {
		return 0, false
	}
	_, rest, _ := bytes.Cut(ack, []byte(`,"seq":`))
	for i, c := range rest {
		switch {
		case '0' <= c && c <= '9' && i < 19:
			seq = seq*10 + uint64(c-'0')
		case c == ',' || c == '}':
			return seq, i > 0 && ack[len(ack)-1] == '}'
		default:
			return 0, false
		}
	}
	return 0, false
}

// A decision makes the message to be written on top of a key's last record, or
// returns the error for which nothing is written. The record that it returns is
// what the message will be, as far as that is known before.
type decision func(c *call, last *record, w entryWriter) (*nats.Msg, record, error)

var errLeaving = errors.New("the server is about to remove the key's last value, and has not")

// certain returns r, unless what is only guessed of it matters now.
func (b *bucket) certain(r *record) *record {
	if r == nil || !r.guessed {
		return r
	}
	if now, slack, _ := b.clock.read(b.nc); r.unsure || r.deadline.passed(now+slack+guessMargin) {
		return nil
	}
	return r
}

// guessMargin is how long before its deadline a guess is not good enough: the
// deadline must not pass while a write that takes it for granted is on its way.
const guessMargin = timestamp(200 * time.Millisecond)

// A write is what commit is to do.
type write struct {
	key    string
	op     string   // its id, which no other write has
	last   *record  // what is believed to be the key's last record; nil if nothing is
	decide decision // may be called several times
	// chained says that what is written tells what it replaced.
	chained bool
	// idempotent says that it does no harm to be stored twice: once nobody
	// knows when, and undone by somebody else since.
	idempotent bool
}

// commit writes one message to a key, on top of exactly the record that decide
// was shown. It returns the bare errors of decide; after any other nothing was
// written, unless it wraps ErrOutcomeUnknown.
func (b *bucket) commit(c *call, do write) (record, error) {
	setup := b.setup.Load()
	w := entryWriter{
		subject: b.prefix + do.key,
		op:      do.op,
		chained: do.chained,
		history: setup.PerKey != 1,
		rollup:  setup.rollup(),
		markers: setup.MarkerTTL > 0,
	}
	var (
		last    = b.certain(do.last)
		doubt   error  // why an attempt may have been stored, if one may
		doubtOn uint64 // the revision that it was to be on top of
		began   = time.Now()

		attempts int
		beatenBy uint64 // the revision that was there first, the last time
	)
	fail := func(err error) (record, error) {
		if doubt != nil {
			return record{}, fmt.Errorf("%w: %w", ErrOutcomeUnknown, doubt)
		}
		return record{}, err
	}
	for {
		if last == nil {
			found, err := b.leaderLast(c, do.key)
			if err != nil {
				return fail(err)
			}
			b.known.forget(do.key)
			b.known.learn(do.key, found)
			if op, _, _ := strings.Cut(found.op, "+"); op == do.op {
				return found, nil
			}
			if doubt != nil && found.revision != doubtOn {
				// If it was stored, something else is there by now; if not, it
				// never will be.
				if !do.idempotent {
					return fail(nil)
				}
				doubt = nil
			}
			if found.revision != beatenBy && attempts > 0 {
				c.progress()
			}
			last, beatenBy = &found, found.revision
		}
		if w.markers && last.leaving(b.clock.now()) {
			// The marker that the server puts in its place would remove what is
			// written meanwhile, too.
			if time.Sleep(100 * time.Millisecond); time.Now().After(c.end) {
				return fail(errLeaving)
			}
			last = nil
			continue
		}
		w.doubtful = w.doubtful || doubt != nil
		if attempts++; attempts > 1 {
			w.op = do.op + "+" + strconv.Itoa(attempts)
		}
		w.now, w.slack, _ = b.clock.read(b.nc)
		msg, next, err := do.decide(c, last, w)
		if err != nil {
			return fail(err)
		}
		if doubt != nil && next.deadline.passed(next.modified+timestamp(time.Since(began))) {
			return fail(nil) // it may have been stored, and have expired since
		}
		seq, o, err := b.send(c, msg)
		if o == stored {
			next.revision = seq
			b.known.learn(do.key, next)
			return next, nil
		}
		switch o {
		case conflicting:
			if last = nil; seq == 0 && doubt == nil && setup.Replicas <= 1 {
				last = &record{} // it is gone
			}
			if !c.retry() {
				return fail(err)
			}
			continue
		case refused:
			return fail(err)
		case lost:
			doubt, doubtOn, last = err, last.revision, nil
		case busy:
			last = nil
		case unavailable:
		}
		if !c.again() {
			return fail(err)
		}
	}
}
