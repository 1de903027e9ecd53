package state

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A question is what a feed asks about a key that it tracks.
type question struct {
	key string
	// base is what the feed has of it: a value whose own TTL has passed, or
	// nothing, if the question is whether the key is gone.
	base     record
	mark     bool // a marker proves the answer
	markGone bool // a marker is to prove it if the key is gone
}

// A probeResult is the last sequence that the leader has of a key, 0 if it has
// none. It is not known while a write to the key is under way.
type probeResult struct {
	last     uint64
	known    bool
	underWay bool // another write was, so that a marker could not be written
	refused  bool // a marker could not be written for another reason
}

// probeWindow is how many questions are under way at a time.
const probeWindow = 256

// probe asks the leader for the last sequences of keys.
//
// It asks by writes that cannot be stored. The refusal names the sequence, or says
// that a write to the key is under way, which no read shows. Such a probe costs the
// leader a look at its index.
//
// Where that is not enough, the write is a marker in place of the value that has
// ended. It is stored only if that value is still the last record. A majority has to
// accept it, and no refresh can follow it.
//
// e is the epoch in which the feed was attached. After it, nothing is asked.
func (b *bucket) probe(budget *retryBudget, e *epoch, questions []question) []probeResult {
	results := make([]probeResult, 0, len(questions))
	for part := range slices.Chunk(questions, probeWindow) {
		results = append(results, b.probeSome(budget, e, part)...)
	}
	return results
}

func (b *bucket) probeSome(budget *retryBudget, e *epoch, questions []question) []probeResult {
	results := b.ask(budget, e, questions)
	for range 2 { // whether the key is gone, and then without a marker
		var again []question
		var places []int
		for i, q := range questions {
			if q.followUp(results[i]) {
				questions[i] = q
				again, places = append(again, q), append(places, i)
			}
		}
		if len(again) == 0 {
			break
		}
		for i, result := range b.ask(budget, e, again) {
			results[places[i]] = result
		}
	}
	for i := range results {
		if results[i].refused {
			results[i] = b.askByReading(budget, e, questions[i].key)
		}
	}
	return results
}

// askByReading reads a key where the bucket refuses every probe, because it takes only
// smaller messages or is full. It does not see a write that is under way.
func (b *bucket) askByReading(budget *retryBudget, e *epoch, key string) probeResult {
	if !b.still(budget, e) {
		return probeResult{}
	}
	r, err := b.leaderRecord(budget, key)
	return probeResult{last: r.revision, known: err == nil && b.currentEpoch() == e}
}

// followUp changes the question to what is to be asked next, if its answer leaves
// something open.
func (q *question) followUp(answer probeResult) bool {
	switch {
	case q.mark && answer.refused:
		q.mark, q.markGone = false, false
	case q.markGone && answer.known && answer.last == 0:
		q.base, q.mark, q.markGone = record{}, true, false // the server has removed it
	default:
		return false
	}
	return true
}

// ask asks each question once, all of them at the same time.
func (b *bucket) ask(budget *retryBudget, e *epoch, questions []question) []probeResult {
	results := make([]probeResult, len(questions))
	if !b.still(budget, e) {
		return results
	}
	exchanges := make([]*exchange, len(questions))
	for i := range questions {
		exchanges[i] = b.expect()
		msg := b.questionMsg(&questions[i])
		msg.Reply = exchanges[i].reply
		_ = b.publish(msg)
	}
	ctx, cancel := context.WithTimeout(b.life, 2*ackTimeout)
	defer cancel()
	for i, x := range exchanges {
		select {
		case answer := <-x.answer:
			results[i] = probed(answer)
			budget.progress()
		case <-e.over:
		case <-ctx.Done():
		}
	}
	for _, x := range exchanges {
		b.forget(x)
	}
	return results
}

// questionMsg makes the write that asks a question. A marker stays as long as the
// record that it replaces would have, and hides the older revisions which that record
// hid.
func (b *bucket) questionMsg(q *question) *nats.Msg {
	if q.mark {
		life := max(expiryGrace, time.Duration(q.base.removal-b.clock.now()))
		m := mutation{key: q.key, op: b.nextOp(), marker: true, expiry: q.base.revision != 0, ttl: wholeSeconds(life)}
		if msg, _, err := b.encode(m, q.base, ifUnchanged); err == nil {
			return msg
		}
	}
	return &nats.Msg{
		// No key has this subject. The expected sequence is that of the key's subject.
		Subject: b.route + b.prefix + ":probe",
		Header: nats.Header{
			headerExpected:        {"9223372036854775807"},
			headerExpectedSubject: {b.prefix + q.key},
		},
	}
}

// marks reports whether questions may be asked by markers. They may not where the
// server writes delete markers itself: these are unconditional, and could remove
// what is written after ours.
func (b *bucket) marks() bool { return b.settings.Load().MarkerTTL == 0 }

// probed reads the answer to a question.
func probed(msg *nats.Msg) probeResult {
	if seq, ok := ackedSeq(msg.Data); ok {
		return probeResult{last: seq, known: true}
	}
	var api *jetstream.APIError
	if err := decodeAnswer(msg.Data, nil); !errors.As(err, &api) || passing(api) {
		return probeResult{}
	}
	switch api.ErrorCode {
	case codeWrongSequence:
	case codeWriteInFlight:
		return probeResult{underWay: true}
	default:
		return probeResult{refused: true}
	}
	last, ok := lastSeqOf(api)
	return probeResult{last: last, known: ok}
}
