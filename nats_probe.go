package state

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A question is what a feed asks about a key that it tracks.
type question struct {
	key string
	// base is what the feed has of it: a value whose own TTL has passed, or
	// nothing, if the question is whether the key is gone.
	base record
	// mark says that a marker may prove the answer.
	mark bool
}

// A probeResult is the last sequence that the leader has of a key, 0 if it has
// none. It is not known while a write to the key is under way.
type probeResult struct {
	last    uint64
	known   bool
	refused bool // the marker could not be written
}

// probeWindow is how many questions are under way at a time.
const probeWindow = 256

// probe asks the leader for the last sequences of keys, by writes that cannot be
// stored: the refusal names the sequence, or says that a write to the key is
// under way, which no read shows. A probe costs the leader a look at its index.
//
// On several replicas, a server that does not lead any more may answer, until it
// notices. So the write is a marker there that takes the place of the base, and
// can be stored if that is still the last record. A majority has to accept it,
// and no refresh can follow it.
func (b *bucket) probe(budget *retryBudget, questions []question) []probeResult {
	results := make([]probeResult, 0, len(questions))
	for part := range slices.Chunk(questions, probeWindow) {
		results = append(results, b.probeSome(budget, part)...)
	}
	return results
}

func (b *bucket) probeSome(budget *retryBudget, questions []question) []probeResult {
	results := b.ask(budget, questions)
	var again []question
	var places []int
	for i, q := range questions {
		switch {
		case !q.mark:
			continue
		case results[i].refused:
			q.mark = false
		case q.base.revision != 0 && results[i].known && results[i].last == 0:
			q.base = record{} // the server has removed it
		default:
			continue
		}
		again, places = append(again, q), append(places, i)
	}
	if len(again) > 0 {
		for i, result := range b.ask(budget, again) {
			results[places[i]] = result
		}
	}
	return results
}

// ask asks each question once, all of them at the same time.
func (b *bucket) ask(budget *retryBudget, questions []question) []probeResult {
	results := make([]probeResult, len(questions))
	e, err := b.connected(budget)
	if err != nil {
		return results
	}
	exchanges := make([]*exchange, len(questions))
	for i, q := range questions {
		exchanges[i] = b.expect()
		msg := b.question(q)
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

// question makes the write that asks a question.
func (b *bucket) question(q question) *nats.Msg {
	if q.mark {
		m := mutation{key: q.key, op: b.nextOp(), marker: true, ttl: minTombstoneTTL}
		if msg, _, err := b.encode(m, q.base, ifUnchanged); err == nil {
			return msg
		}
	}
	return &nats.Msg{
		// The subject is no key's. The expectation is of the key's.
		Subject: b.route + b.prefix + ":probe",
		Header: nats.Header{
			headerExpected:        {"9223372036854775807"},
			headerExpectedSubject: {b.prefix + q.key},
		},
	}
}

// marksExpiries reports whether what has ended is asked about by markers. A
// bucket in which the server puts markers of its own, without a condition, must
// not have others beside them: what is written next may be lost.
func (b *bucket) marksExpiries() bool {
	return b.replicated() && b.settings.Load().MarkerTTL == 0
}

// probed reads the answer to a question.
func probed(msg *nats.Msg) probeResult {
	if seq, ok := ackedSeq(msg.Data); ok {
		return probeResult{last: seq, known: true}
	}
	var api *jetstream.APIError
	if err := decodeAnswer(msg.Data, nil); !errors.As(err, &api) || passing(api) || api.ErrorCode == codeWriteInFlight {
		return probeResult{}
	}
	if api.ErrorCode != codeWrongSequence {
		return probeResult{refused: true}
	}
	_, text, _ := strings.Cut(api.Description, ": ")
	last, err := strconv.ParseUint(text, 10, 64)
	return probeResult{last: last, known: err == nil}
}
