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
	unfit               // not stored: the bucket is not as it was believed to be
	refused             // not stored; sending it again is no use
	lost                // stored or not, or not yet
)

// errMoved is the error of a conditional write that came too late.
var errMoved = errors.New("the key was written by somebody else")

// put writes m.value to a key whatever it holds, in at most four requests however
// many others write it: usually one, conditional on the record that this client
// knows, so that what it carries of that record is right. Where others write the
// key, too, it reads the key first and then writes without a condition, because
// conditional writes starve beside faster ones. It takes four if the key is about
// to expire, so that it is read first, and somebody replaces it meanwhile.
func (b *bucket) put(budget *retryBudget, m mutation) (r record, err error) {
	contested := b.cache.begin(m.key)
	defer b.cache.end(m.key)
	base := b.known(m.key)
	if contested || !b.certain(base) {
		if base, err = b.contended(budget, m.key); err != nil {
			return record{}, err
		}
	}
	if !contested {
		if r, err = b.commit(budget, m, base, ifUnchanged); err != errMoved {
			return r, err
		}
		if base, err = b.contended(budget, m.key); err != nil {
			return record{}, err
		}
	}
	return b.commit(budget, m, base, always)
}

// remove deletes a key if it exists, in at most three requests, and two more if the
// key's deadline has just passed. It first tries a marker that is conditional on
// what it knows or has just read. The unconditional one that may follow deletes
// what was written in between.
func (b *bucket) remove(budget *retryBudget, m mutation) error {
	contested := b.cache.begin(m.key)
	defer b.cache.end(m.key)
	var exists bool
	var err error
	base, read := b.known(m.key), false
	if contested || !b.certain(base) || !base.exists(b.clock.now()) {
		if base, exists, err = b.lookUp(budget, m.key, b.contended); !exists {
			return err
		}
		read = true
	}
	_, err = b.commit(budget, m, base, ifUnchanged)
	if err == errMoved {
		if !read {
			if base, exists, err = b.lookUp(budget, m.key, b.contended); !exists {
				return err
			}
		}
		_, err = b.commit(budget, m, base, always)
	}
	return b.evenIfFull(budget, m, base, err)
}

// evenIfFull carries out a deletion that was refused because the bucket is
// full: by the smallest marker there is and, if even that is too large, by a
// purge of what was there. Watches find out by themselves what a purge removed,
// but late. So the marker follows where there is room for it now, unless the key
// has been written since.
func (b *bucket) evenIfFull(budget *retryBudget, m mutation, base record, err error) error {
	if !errors.Is(err, ErrStoreFull) {
		return err
	}
	switch o, err := b.markSmall(budget, m, always); o {
	case stored:
		return nil
	case lost:
		return unknownIf(err, nil)
	}
	purge := struct {
		Filter string `json:"filter"`
		UpTo   uint64 `json:"seq"`
	}{b.prefix + m.key, base.revision + 1}
	if err := b.streamCall(budget, "STREAM.PURGE", b.stream, purge, nil); err != nil {
		err = fmt.Errorf("purge a key of a full bucket: %w", err)
		if apiCode(err) == 0 || passing(err) {
			b.cache.forget(m.key)
			return unknownIf(err, nil) // it, or an earlier attempt, may have been applied
		}
		return err
	}
	b.cache.forget(m.key)
	_, _ = b.markSmall(budget, m, ifUnchanged) // the key is deleted, whatever becomes of this
	return nil
}

// markSmall writes the smallest marker there is, on condition that there is
// nothing if pre is ifUnchanged.
func (b *bucket) markSmall(budget *retryBudget, m mutation, pre precondition) (outcome, error) {
	marker := &nats.Msg{Subject: b.route + b.prefix + m.key, Header: nats.Header{headerOperation: {"DEL"}, headerTTL: {seconds(m.ttl)}}}
	if pre == ifUnchanged {
		marker.Header[headerExpected] = []string{"0"}
	}
	if s := b.settings.Load(); s.PerKey != 1 && s.rollup() {
		marker.Header[headerRollup] = []string{"sub"} // or an older revision comes back when the marker goes
	}
	seq, o, err := b.send(budget, marker, pre)
	if o == stored {
		b.cache.learn(m.key, record{entry: entry{revision: seq}, deleted: true})
	}
	return o, err
}

// update writes m to a key whose current revision is the given one, 0 for a key
// that does not exist. It costs one request where this client knows the key.
func (b *bucket) update(budget *retryBudget, m mutation, revision uint64) (record, error) {
	base := b.known(m.key)
	switch {
	case revision == 0 && base.exists(b.clock.now()):
		base = record{} // the server decides whether it still does
	case revision != 0 && base.revision != revision, !b.certain(base):
		var err error
		if base, err = b.lastSince(budget, m.key, revision); err != nil {
			return record{}, err
		}
		b.cache.learn(m.key, base)
	}
	for tries := 0; ; tries++ {
		current := base.revision
		if current != 0 && !b.exists(budget, &base) {
			current = 0
		}
		if current != revision {
			if tries == 0 {
				b.stats.conflicts.Add(1)
			}
			return record{}, ErrConflict
		}
		r, err := b.commit(budget, m, base, ifUnchanged)
		if err != errMoved {
			return r, err
		}
		if revision != 0 {
			return record{}, ErrConflict
		}
		// It exists, or what is left of it takes its place: a marker, or a value
		// that has expired.
		if base, err = b.leaderLast(budget, m.key); err != nil {
			return record{}, err
		}
		b.cache.learn(m.key, base)
		if base.op == m.op {
			return base, nil // one leader refused it, and another one stored it
		}
		if budget.left() <= minAttempt {
			return record{}, ErrConflict
		}
	}
}

// known returns the record that a write may be conditional on without asking:
// zero for a key that is not known, which is tried as a new one.
func (b *bucket) known(key string) record {
	r := b.cache.recall(key)
	now := b.clock.now()
	switch {
	case r.removal.passed(now - timestamp(2*time.Second)):
		return record{} // the server has removed it
	case r.aged && r.deadline.passed(now):
		return record{} // so it has, unless the MaxAge was raised
	}
	return r
}

// contended reads a key that others write, too.
func (b *bucket) contended(budget *retryBudget, key string) (record, error) {
	read := b.last
	if b.cache.recall(key).revision == 0 {
		read = b.leaderLast // it may not exist, and only the leader can say so
	}
	r, err := read(budget, key)
	if err != nil {
		return record{}, err
	}
	b.cache.learn(key, r)
	b.cache.contest(key, r.revision != 0 && !b.own(r.op) && !(r.deleted && r.expired != 0))
	return r, nil
}

// certain reports whether a record is exact enough to be replaced without
// reading it first: the times of one that this client wrote are estimates.
func (b *bucket) certain(r record) bool {
	if !r.estimated || r.deleted {
		return true
	}
	clock := b.readClock()
	return !r.uncertain && !r.deadline.passed(clock.now+clock.uncertainty+guessMargin)
}

// commit writes one message to a key whose last record is base. Its errors are
// errMoved, if the precondition does not hold, ErrValueTooLarge, ErrStoreFull,
// and failures; after these nothing was written, unless they wrap
// ErrOutcomeUnknown.
func (b *bucket) commit(budget *retryBudget, m mutation, base record, pre precondition) (record, error) {
	var (
		inDoubt error // why an earlier attempt may have been stored, if one may
		refits  int   // how often the bucket was made to fit
		began   = time.Now()
	)
	if b.readClock().age > renewSample {
		b.check()
	}
	for {
		if err := b.waitForRemoval(budget, base); err != nil {
			return record{}, unknownIf(inDoubt, err)
		}
		msg, next, err := b.encode(m, base, pre)
		if err != nil {
			return record{}, unknownIf(inDoubt, err)
		}
		seq, o, err := b.send(budget, msg, pre)
		switch o {
		case stored:
			next.revision = seq
			b.cache.wrote(m.key, next, pre)
			return next, nil

		case refused:
			return record{}, unknownIf(inDoubt, err)

		case conflicting:
			if b.replicated() && knowsLess(err, base) {
				// A leader that was cut off has refused it. When it is back, the
				// leader that was elected meanwhile gets it, too, and may store it.
				b.cache.learn(m.key, base)
				if inDoubt == nil || inDoubt == errTakeover {
					inDoubt = errStaleLeader
				}
			}
			if inDoubt == nil {
				return record{}, b.moved(m.key)
			}
			// What is in the way may be our own, earlier attempt.

		case busy:
			// So may the write that is under way. A leader that was cut off may have
			// one that never ends, while the leader that was elected stores ours.
			if inDoubt == nil && b.replicated() && pre == ifUnchanged {
				inDoubt = errTakeover
			}

		case lost:
			inDoubt = err

		case unavailable:
			// Nobody took it. Is the bucket gone, or is nobody leading it?
			if errors.Is(err, nats.ErrNoResponders) {
				if _, gone := b.info(budget); errors.Is(gone, jetstream.ErrBucketNotFound) {
					return record{}, unknownIf(inDoubt, gone)
				}
			}
			if err := b.waitAfter(budget, err); err != nil {
				return record{}, unknownIf(inDoubt, err)
			}
			b.retrying(budget, msg.Subject)
			continue

		case unfit:
			// The settings are not what they were, or the bucket is another one.
			if refits++; refits > 2 {
				return record{}, unknownIf(inDoubt, err)
			}
			if err := b.refresh(budget); err != nil {
				return record{}, unknownIf(inDoubt, err)
			}
			if known := b.cache.recall(m.key); known.revision < base.revision {
				return record{}, unknownIf(inDoubt, errMoved) // the bucket was created again
			}
			continue
		}

		found, err := b.lookForWrite(budget, m, base)
		switch {
		case err == nil:
			return found, nil
		case err == errUnchanged && (inDoubt == nil ||
			pre == ifUnchanged && (base.revision != 0 || m.ttl == 0 || time.Since(began) < m.ttl)):
			// Another attempt on the same revision can only be stored if no
			// earlier one ever is.
			if !b.wait(budget) {
				if err = b.ended(budget); err == nil && inDoubt == nil {
					err = errBusy
				}
				return record{}, unknownIf(inDoubt, err)
			}
			b.retrying(budget, msg.Subject)
		case err == errUnchanged:
			// An earlier attempt may be under way, or have expired.
			return record{}, unknownIf(inDoubt, nil)
		case err == errMoved && m.tooLate(base, pre, inDoubt, found):
			return record{}, b.moved(m.key)
		case errors.Is(err, jetstream.ErrBucketNotFound):
			return record{}, err // whatever became of it, it is gone
		default:
			return record{}, unknownIf(inDoubt, err)
		}
	}
}

// errTakeover is why a write may have been stored though a leader refused it,
// because another one to its key was under way there.
var errTakeover = errors.New("another write to the key was under way, and the stream may have had two leaders")

// tooLate reports whether no attempt of a write on top of base was stored, or will be.
// inDoubt is why one may have been, and found is another record, which is in its place.
func (m *mutation) tooLate(base record, pre precondition, inDoubt error, found record) bool {
	switch {
	case inDoubt == nil:
		return true
	case pre == ifUnchanged && base.revision != 0 && found.base == base.revision:
		return true // it has replaced base itself
	case inDoubt == errTakeover && !m.exclusive:
		return true // nearly always: where others write the key, such refusals are common
	case inDoubt == errTakeover, inDoubt == errStaleLeader:
		return found.revision < base.revision
	}
	return false
}

// errUnchanged is the error of lookForWrite where the base is still the last
// record.
var errUnchanged = errors.New("the write was not stored yet")

// lookForWrite looks for a write of which an attempt may have been stored. It
// returns the record that the write has left, errUnchanged if base is still the
// key's last record, or errMoved and the last record if that is another one: it may
// have replaced ours.
func (b *bucket) lookForWrite(budget *retryBudget, m mutation, base record) (record, error) {
	since := budget.since
	found, err := b.leaderLast(budget, m.key)
	switch {
	case err != nil:
		return record{}, err
	case found.op == m.op:
		b.cache.learn(m.key, found)
		return found, nil
	case found.revision == base.revision:
		budget.since = since // that is no progress
		return record{}, errUnchanged
	}
	b.cache.learn(m.key, found)
	return found, errMoved
}

// moved counts a write that came too late, and returns its error.
func (b *bucket) moved(key string) error {
	b.stats.conflicts.Add(1)
	b.cache.contest(key, true)
	return errMoved
}

var errBusy = errors.New("another write to the key is under way, and does not end")

// unknownIf returns err, unless an earlier attempt is in doubt: then the write's
// outcome is unknown.
func unknownIf(inDoubt, err error) error {
	switch {
	case inDoubt == nil:
		return err
	case err == nil || errors.Is(inDoubt, err):
		return fmt.Errorf("%w: %w", ErrOutcomeUnknown, inDoubt)
	}
	return fmt.Errorf("%w: %w; %w", ErrOutcomeUnknown, inDoubt, err)
}

// waitForRemoval waits until the server has removed a record that it is about to
// replace by its own marker: that would remove what is written meanwhile,
// too.
func (b *bucket) waitForRemoval(budget *retryBudget, base record) error {
	for b.settings.Load().MarkerTTL > 0 && base.leaving(b.clock.now()) {
		if err := b.pause(budget, 100*time.Millisecond, nil); err != nil {
			return err
		}
		if budget.left() <= 0 {
			return errLeaving
		}
	}
	return nil
}

var errLeaving = errors.New("the server is about to remove the key's last value, and does not")

// encode makes the message for a mutation, within the bucket's limit.
func (b *bucket) encode(m mutation, base record, pre precondition) (*nats.Msg, record, error) {
	s := b.settings.Load()
	e := encoder{
		clockReading: b.readClock(), maxAge: s.MaxAge,
		rollup: s.rollup(), history: s.PerKey != 1, markers: s.MarkerTTL > 0, grace: expiryGrace, fixed: b.want.locks,
	}
	if b.want.locks {
		e.grace = 0 // nobody watches them
	}
	hdr, next := e.encode(m, base, pre)
	if s.MaxMsgSize > 0 && !m.marker && hdr.size()+len(m.value) > int(s.MaxMsgSize) {
		return nil, record{}, ErrValueTooLarge
	}
	return &nats.Msg{Subject: b.route + b.prefix + m.key, Header: hdr.Header, Data: m.value}, next, nil
}

// writeError returns the error of a write, and reports one of unknown outcome.
func (b *bucket) writeError(verb, key string, err error) error {
	if errors.Is(err, ErrOutcomeUnknown) {
		b.stats.unknown.Add(1)
		b.log.Warn("state: the outcome of a write is unknown", "operation", verb, "key", key, "error", err)
	}
	return opError(verb, key, err)
}

// send has the server store a message, and returns its sequence.
func (b *bucket) send(budget *retryBudget, msg *nats.Msg, pre precondition) (seq uint64, o outcome, err error) {
	rep := resolvable
	if pre == always {
		rep = once
	}
	reply, sent, err := b.do(budget, msg, rep)
	if err != nil {
		switch {
		case errors.Is(err, nats.ErrNoResponders):
			return 0, unavailable, err
		case errors.Is(err, nats.ErrMaxPayload):
			return 0, refused, ErrValueTooLarge
		case !sent:
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
	o, err = refusal(ack.Error)
	return 0, o, err
}

// knowsLess reports whether a leader that refused a conditional write does not know
// the record that it was based on.
func knowsLess(refused error, base record) bool {
	var api *jetstream.APIError
	if !errors.As(refused, &api) {
		return false
	}
	last, ok := lastSeqOf(api)
	return ok && last < base.revision
}

// lastSeqOf returns the last sequence that a refusal names.
func lastSeqOf(wrongSequence *jetstream.APIError) (seq uint64, ok bool) {
	_, text, _ := strings.Cut(wrongSequence.Description, ": ")
	seq, err := strconv.ParseUint(text, 10, 64)
	return seq, err == nil
}

// refusal classifies the server's reason for not storing a message.
func refusal(e *jetstream.APIError) (outcome, error) {
	if passing(e) {
		return unavailable, e
	}
	switch e.ErrorCode {
	case codeWrongSequence:
		return conflicting, e
	case codeWriteInFlight:
		return busy, e
	case codeNoMessageTTL, codeNoRollup:
		return unfit, e
	case codeTooLarge:
		return refused, ErrValueTooLarge
	case codeAccountLimit, codeAccountFull, codeMemoryFull:
		return refused, ErrStoreFull
	case codeStreamFailed:
		if strings.Contains(e.Description, "maximum") {
			return refused, ErrStoreFull // of bytes, or of messages
		}
	}
	return refused, e
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
