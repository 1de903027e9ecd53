package state

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// A backoff is the pause between attempts. It doubles from one to the next up to
// max, and varies by half, so that clients that failed together do not try again
// together.
type backoff struct{ pause, max time.Duration }

// next returns the next pause.
func (b *backoff) next() time.Duration {
	pause := b.pause/2 + jitter(b.pause)
	b.pause = min(2*b.pause, b.max)
	return pause
}

// wait waits for the next pause, but for no longer than limit, or until ctx ends.
func (b *backoff) wait(ctx context.Context, limit time.Duration) {
	sleep(ctx, min(b.next(), limit))
}

// jitter returns a random duration below d. The clock is its seed: that differs
// between clients by far more than it needs to, and a test in a bubble of
// testing/synctest can be repeated.
func jitter(d time.Duration) time.Duration {
	seeded := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), uint64(d)))
	return time.Duration(seeded.Int64N(int64(d)))
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// final reports whether a store that returned err will go on returning it, for
// the same call.
func final(err error) bool {
	switch err {
	case ErrClosed, ErrInvalidKey, ErrInvalidTTL, ErrValueTooLarge, errUnopened:
		return true
	}
	return errors.Is(err, nats.ErrConnectionClosed)
}
