package statetest_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.com/state"
)

// A history is what became of the keys below, as their writer knows it.
type history struct {
	mu      sync.Mutex
	changes map[string][]change
}

type change struct {
	at       time.Time // when it was acknowledged
	revision uint64    // 0 for a deletion
	expires  time.Time
}

// write makes changes, all of them different, until a time.
func (h *history) write(t *testing.T, w *world, end time.Time, pause time.Duration) {
	dice := rand.New(rand.NewPCG(w.seed, 0))
	for n := 0; time.Now().Before(end); n++ {
		key := fmt.Sprint("items.", dice.IntN(8))
		kv, err := w.below.GetKeyValue(key)
		switch {
		case err == nil && dice.IntN(3) == 0:
			require.NoError(t, w.below.Delete(key))
			h.add(key, change{at: time.Now()})
		default:
			var revision uint64
			if err == nil {
				revision = kv.Revision
			}
			var c change
			ttl := time.Duration(dice.IntN(3)) * pause
			if ttl > 0 {
				ttl += 777 * time.Millisecond
				c.expires = time.Now().Add(ttl)
			}
			c.revision, err = w.below.Update(key, fmt.Append(nil, n), ttl, revision)
			require.NoError(t, err)
			c.at = time.Now()
			h.add(key, c)
		}
		if dice.IntN(4) > 0 { // now and then several at once
			time.Sleep(pause/2 + time.Duration(dice.Int64N(int64(pause))))
		}
	}
}

func (h *history) add(key string, c change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changes[key] = append(h.changes[key], c)
}

// lacks returns what entries lack of what was acknowledged before asOf.
func (h *history) lacks(entries []*state.KeyValue, asOf time.Time) error {
	have := map[string]uint64{}
	for _, kv := range entries {
		have[kv.Key] = kv.Revision
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	for key, changes := range h.changes {
		// It may have any state from the last one before asOf on.
		ok := len(changes) == 0 || !changes[0].at.Before(asOf) && have[key] == 0
		for i, c := range changes {
			replaced := i+1 < len(changes) && changes[i+1].at.Before(asOf)
			if replaced {
				continue
			}
			expired := !c.expires.IsZero() && c.expires.Before(asOf)
			if have[key] == c.revision && !expired {
				ok = true
			}
			if have[key] == 0 && !c.expires.IsZero() && !now.Before(c.expires) {
				ok = true
			}
		}
		if !ok {
			var became []string
			for _, c := range changes[max(len(changes)-3, 0):] {
				became = append(became, fmt.Sprintf("%d at %v, until %v", c.revision, c.at, c.expires))
			}
			return fmt.Errorf("%q is at revision %d as of %v, %v ago; it became %s",
				key, have[key], asOf, now.Sub(asOf), strings.Join(became, "; "))
		}
	}
	return nil
}

// same says how entries differ from those below.
func (w *world) same(t *testing.T, entries map[string]*state.KeyValue) error {
	below, err := w.below.Entries("items.*")
	require.NoError(t, err)
	for _, kv := range below {
		got := entries[kv.Key]
		if got == nil || got.Revision != kv.Revision || string(got.Value) != string(kv.Value) || !got.Created.Equal(kv.Created) {
			return fmt.Errorf("%q is %+v, and is %+v below", kv.Key, got, kv)
		}
	}
	if len(entries) != len(below) {
		return fmt.Errorf("there are %d entries, and %d below", len(entries), len(below))
	}
	return nil
}

// following has an agent follow a state: whatever happens it comes to the
// state below, and what it is told goes on from what it was told before.
func following(t *testing.T, w *world) error {
	s := w.agent()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var (
		mu      sync.Mutex
		entries = map[string]*state.KeyValue{}
		newest  = map[string]uint64{}
		wrong   error
		group   sync.WaitGroup
	)
	apply := func(kv *state.KeyValue) {
		mu.Lock()
		defer mu.Unlock()
		before := entries[kv.Key]
		switch {
		case wrong != nil:
		case kv.Operation == state.OpPut && kv.Revision <= newest[kv.Key]:
			wrong = fmt.Errorf("%q was put as %d after %d", kv.Key, kv.Revision, newest[kv.Key])
		case kv.Operation == state.OpDelete && before == nil:
			wrong = fmt.Errorf("%q was deleted, and did not exist", kv.Key)
		case kv.Revision < newest[kv.Key]:
			wrong = fmt.Errorf("%q was deleted as %d after %d", kv.Key, kv.Revision, newest[kv.Key])
		}
		newest[kv.Key] = kv.Revision
		if entries[kv.Key] = kv; kv.Operation == state.OpDelete {
			delete(entries, kv.Key)
		}
	}
	h := &history{changes: map[string][]change{}}
	end := time.Now().Add(day)
	group.Go(func() {
		current, changes, err := state.Follow(ctx, s, "items.*")
		for err != nil && ctx.Err() == nil {
			time.Sleep(time.Second)
			current, changes, err = state.Follow(ctx, s, "items.*")
		}
		for _, kv := range current {
			apply(kv)
		}
		for kv := range changes {
			apply(kv)
		}
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() == nil && wrong == nil {
			wrong = fmt.Errorf("the channel was closed")
		}
	})
	for quarter := 1; quarter <= 4; quarter++ {
		h.write(t, w, end.Add(-day+day*time.Duration(quarter)/4), 10*time.Minute)
		w.heal()
		time.Sleep(time.Minute + 1)
		mu.Lock()
		err := w.same(t, entries)
		if wrong != nil {
			err = wrong
		}
		mu.Unlock()
		if err != nil {
			cancel()
			group.Wait()
			return err
		}
		s.Chaos(nil, w.seed, w.rates)
	}
	cancel()
	group.Wait()
	return nil
}

// caching has an agent keep a cache: it has what AsOf promises at any time, and
// comes to the state below.
func caching(t *testing.T, w *world) error {
	s := w.agent()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h := &history{changes: map[string][]change{}}
	cache, err := state.NewCache(ctx, s, "items.*")
	for err != nil {
		time.Sleep(time.Second)
		cache, err = state.NewCache(ctx, s, "items.*")
	}
	end := time.Now().Add(time.Hour)
	var writer sync.WaitGroup
	writer.Go(func() { h.write(t, w, end, 10*time.Second) })
	for time.Now().Before(end) {
		asOf := cache.AsOf()
		entries, err := cache.Entries("items.*")
		if err == nil {
			err = h.lacks(entries, asOf)
		}
		if err != nil {
			writer.Wait()
			return err
		}
		time.Sleep(3_456_789_012)
	}
	writer.Wait()
	w.heal()
	time.Sleep(time.Minute + 1)
	if age := time.Since(cache.AsOf()); age > 2*time.Second {
		return fmt.Errorf("the cache is %v old", age)
	}
	revision, err := w.below.Update("items.last", nil, 0, 0)
	require.NoError(t, err)
	if err := cache.Wait(ctx, revision); err != nil {
		return err
	}
	current, err := cache.Entries("items.*")
	require.NoError(t, err)
	entries := map[string]*state.KeyValue{}
	for _, kv := range current {
		entries[kv.Key] = kv
	}
	if err := w.same(t, entries); err != nil {
		return err
	}
	return cache.Close()
}
