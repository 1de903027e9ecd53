package statetest_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"example.com/state"
)

// write makes changes below, all of them different, until a time.
func (w *world) write(t *testing.T, end time.Time, pause time.Duration) {
	dice := rand.New(rand.NewPCG(w.seed, 0))
	for n := 0; time.Now().Before(end); n++ {
		key := fmt.Sprint("items.", dice.IntN(8))
		if dice.IntN(3) == 0 {
			require.NoError(t, w.below.Delete(key))
		} else {
			ttl := time.Duration(dice.IntN(3)) * pause
			if ttl > 0 {
				ttl += 777 * time.Millisecond
			}
			require.NoError(t, w.below.Put(key, fmt.Append(nil, n), ttl))
		}
		if dice.IntN(4) > 0 { // now and then several at once
			time.Sleep(pause/2 + time.Duration(dice.Int64N(int64(pause))))
		}
	}
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
		w.write(t, end.Add(-day+day*time.Duration(quarter)/4), 10*time.Minute)
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

// caching has an agent keep a cache: whatever happens it comes to the state below.
func caching(t *testing.T, w *world) error {
	s := w.agent()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cache, err := state.NewCache(ctx, s, "items.*")
	for err != nil {
		time.Sleep(time.Second)
		cache, err = state.NewCache(ctx, s, "items.*")
	}
	w.write(t, time.Now().Add(time.Hour), 10*time.Second)
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
