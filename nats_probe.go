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

// A probeResult is the last sequence that the leader has of a key, 0 if it has
// none. It is not known while a write to the key is under way.
type probeResult struct {
	last  uint64
	known bool
}

// probeWindow is how many probes are under way at a time.
const probeWindow = 256

// probe asks the leader for the last sequences of keys, by writes that cannot be
// stored: the refusal names the sequence, or says that a write to the key is
// under way, which no read shows. A probe costs the leader a look at its index.
func (b *bucket) probe(budget *retryBudget, keys []string) []probeResult {
	results := make([]probeResult, 0, len(keys))
	for part := range slices.Chunk(keys, probeWindow) {
		results = append(results, b.probeSome(budget, part)...)
	}
	return results
}

func (b *bucket) probeSome(budget *retryBudget, keys []string) []probeResult {
	results := make([]probeResult, len(keys))
	e, err := b.connected(budget)
	if err != nil {
		return results
	}
	exchanges := make([]*exchange, len(keys))
	for i, key := range keys {
		exchanges[i] = b.expect()
		_ = b.publish(&nats.Msg{
			// The subject is no key's. The expectation is of the key's.
			Subject: b.route + b.prefix + ":probe", Reply: exchanges[i].reply,
			Header: nats.Header{
				headerExpected:        {"9223372036854775807"},
				headerExpectedSubject: {b.prefix + key},
			},
		})
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

// probed reads the answer to a probe.
func probed(msg *nats.Msg) probeResult {
	var api *jetstream.APIError
	if err := decodeAnswer(msg.Data, nil); !errors.As(err, &api) || api.ErrorCode != codeWrongSequence {
		return probeResult{}
	}
	_, text, _ := strings.Cut(api.Description, ": ")
	last, err := strconv.ParseUint(text, 10, 64)
	return probeResult{last, err == nil}
}
