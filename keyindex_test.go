package state

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestKeyIndexAgainstModel compares the index with a look at all keys, while keys
// come and go in numbers that split blocks, empty them, and have the index
// dropped.
func TestKeyIndexAgainstModel(t *testing.T) {
	for _, limit := range []int{3, 50, 3000} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			random := rand.New(rand.NewPCG(1, uint64(limit)))
			items := make(map[string]*item)
			var n keyIndex
			check := func(prefix string) {
				want := []string{}
				for _, key := range slices.Sorted(maps.Keys(items)) {
					if strings.HasPrefix(key, prefix) {
						want = append(want, key)
					}
				}
				if !n.made {
					require.NoError(t, n.build(items, func(work func()) error {
						if work != nil {
							work()
						}
						return nil
					}))
				}
				n.ask(len(items))
				require.Equal(t, want, slices.AppendSeq([]string{}, n.from(prefix, "")))
				require.LessOrEqual(t, len(want), n.count(prefix))
				if len(want) > 1 {
					first := want[random.IntN(len(want))]
					at := slices.Index(want, first)
					require.Equal(t, want[at:], slices.Collect(n.from(prefix, first)))
					require.Equal(t, want[at+1:], slices.AppendSeq([]string{}, n.from(prefix, first+"\x00")))
				}
			}
			for range 60 {
				for range random.IntN(4 * limit) {
					key := fmt.Sprintf("group-%d.%d", random.IntN(7), random.IntN(limit))
					// More come than go at first, then more go.
					if random.IntN(60) > len(items)*50/limit && items[key] == nil {
						items[key] = new(item)
						n.add(key)
					} else if items[key] != nil {
						delete(items, key)
						n.remove(key)
					}
				}
				check("")
				check(fmt.Sprintf("group-%d.", random.IntN(8)))
				check(fmt.Sprintf("group-%d.1", random.IntN(8)))
				check("zzz")
				for i, block := range n.blocks {
					require.NotEmpty(t, block)
					require.LessOrEqual(t, len(block), maxBlock)
					require.True(t, slices.IsSorted(block))
					require.True(t, i == 0 || slices.Max(n.blocks[i-1]) < block[0])
				}
			}
			for key := range items {
				delete(items, key)
				n.remove(key)
			}
			check("")
			require.True(t, n.made)
			for i := range 2 * maxIdle {
				key := fmt.Sprintf("group-%d.unasked-%d", i%7, i)
				items[key] = new(item)
				n.add(key)
			}
			require.False(t, n.made, "kept up in vain")
			check("group-3.unasked-1")
		})
	}
}

// TestKeyIndexBuild has keys come and go while the index is built, whenever the
// build lets go of the lock. It does so after each indexStep keys.
func TestKeyIndexBuild(t *testing.T) {
	for _, limit := range []int{0, 1, indexStep, 20 * indexStep} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			random := rand.New(rand.NewPCG(2, uint64(limit)))
			items := make(map[string]*item)
			var n keyIndex
			toggle := func(key string) {
				if items[key] == nil {
					items[key] = new(item)
					n.add(key)
				} else {
					delete(items, key)
					n.remove(key)
				}
			}
			for i := range limit {
				toggle(fmt.Sprintf("key-%d", i))
			}
			pauses, changes := 0, 0
			pause := func(work func()) error {
				pauses++
				if work != nil {
					work()
				}
				if changes > 10*limit {
					return nil
				}
				// More than a step's, so that what is logged takes several, too.
				for range random.IntN(2 * indexStep) {
					toggle(fmt.Sprintf("key-%d", random.IntN(2*limit+5)))
					changes++
				}
				return nil
			}
			require.NoError(t, n.build(items, pause))
			require.True(t, n.made)
			require.Nil(t, n.building)
			require.Empty(t, n.log)
			require.Equal(t, slices.Sorted(maps.Keys(items)), slices.Collect(n.from("", "")))
			require.GreaterOrEqual(t, pauses, (limit+changes)/indexStep)

			// One that is given up leaves nothing, and the next one can begin.
			n = keyIndex{}
			failure := errors.New("the caller has left")
			for left := pauses; left > 0; left = left * 2 / 3 {
				remaining := left
				require.Equal(t, failure, n.build(items, func(work func()) error {
					if work != nil {
						work()
					}
					toggle(fmt.Sprint("meanwhile-", random.IntN(9)))
					if remaining--; remaining <= 0 || remaining == left-2 {
						return failure
					}
					return nil
				}))
				require.Equal(t, keyIndex{}, n)
			}
			require.NoError(t, n.build(items, func(work func()) error {
				if work != nil {
					work()
				}
				return nil
			}))
			require.Equal(t, slices.Sorted(maps.Keys(items)), slices.Collect(n.from("", "")))
		})
	}
}

// TestMemoryStoreFirstKeys has several list a large store for the first time, next
// to a writer. The keys that are there throughout are in each answer, and writes
// go on while the index is built.
func TestMemoryStoreFirstKeys(t *testing.T) {
	const n = 200_000
	s := NewMemoryStore()
	defer s.Close()
	want := make([]string, 0, n)
	for i := range n {
		want = append(want, fmt.Sprintf("key-%06d", i))
		require.NoError(t, s.Put(want[i], nil, 0))
	}
	d := s.client.data
	building := func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.keys.building != nil
	}
	// A caller that leaves in the middle leaves the index to the next.
	_, err := s.WithContext(&leaving{Context: context.Background(), after: n / indexStep / 2}).Keys("*")
	require.ErrorIs(t, err, context.Canceled)
	require.False(t, building())
	require.False(t, d.keys.made)

	var wg sync.WaitGroup
	var running atomic.Int32
	for range 3 {
		running.Add(1)
		wg.Go(func() {
			defer running.Add(-1)
			keys, err := s.Keys("key-*")
			assert.NoError(t, err)
			assert.True(t, slices.Equal(want, keys))
			entries, err := s.Entries("key-1*")
			assert.NoError(t, err)
			assert.Len(t, entries, n/2)
		})
	}
	writes := 0
	for i := 0; running.Load() > 0; i++ {
		other := fmt.Sprintf("other-%d", i%3000)
		require.NoError(t, s.Put(other, nil, 0))
		require.NoError(t, s.Delete(fmt.Sprintf("other-%d", max(0, i-100)%3000)))
		if building() {
			writes++
		}
	}
	wg.Wait()
	assert.NotZero(t, writes, "while the index was built")
	keys, err := s.Keys("other-*")
	require.NoError(t, err)
	for _, key := range keys {
		_, err := s.Get(key)
		require.NoError(t, err)
	}
}

// leaving is a context that ends after it has been asked so many times.
type leaving struct {
	context.Context
	after int
}

func (c *leaving) Err() error {
	if c.after--; c.after < 0 {
		return context.Canceled
	}
	return nil
}

// TestMemoryStoreReplacesNoSharedValue is about values that are replaced in
// place: not those that wait in an event or that somebody was given.
func TestMemoryStoreReplacesNoSharedValue(t *testing.T) {
	for _, size := range []int{1, smallValue, smallValue + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := NewMemoryStore()
			defer s.Close()
			value := func(c string) []byte { return []byte(strings.Repeat(c, size)) }
			require.NoError(t, s.Put("key", value("a"), 0))
			got, err := s.Get("key")
			require.NoError(t, err)
			kv, err := s.GetKeyValue("key")
			require.NoError(t, err)
			events, err := s.Watch("key")
			require.NoError(t, err)

			mine := value("b")
			for _, c := range []string{"b", "c", "d"} {
				copy(mine, value(c))
				require.NoError(t, s.Put("key", mine, 0))
			}
			copy(mine, value("x"))
			require.Equal(t, value("a"), got)
			require.Equal(t, value("a"), kv.Value)
			for _, c := range []string{"b", "c", "d"} {
				require.Equal(t, value(c), (<-events).Value)
			}

			// A shorter one and a longer one.
			for _, next := range [][]byte{{}, value("e"), []byte("f"), value("gh")} {
				require.NoError(t, s.Put("other", next, 0))
				require.NoError(t, s.Put("key", next, 0))
				for _, key := range []string{"key", "other"} {
					got, err := s.Get(key)
					require.NoError(t, err)
					require.Equal(t, next, got)
				}
			}
		})
	}
}

// TestMemoryStoreNoticesNewWatches is about keys that nobody watched when they
// were last written.
func TestMemoryStoreNoticesNewWatches(t *testing.T) {
	s := NewMemoryStore()
	defer s.Close()
	for i, pattern := range []string{"a.b", "a.*", "*", "a.b*"} {
		require.NoError(t, s.Put("a.b", nil, 0))
		require.NoError(t, s.Put("a.b", nil, 0))
		_, err := s.Watch(fmt.Sprintf("other.%d.*", i))
		require.NoError(t, err)
		require.NoError(t, s.Put("a.b", nil, 0))
		events, err := s.Watch(pattern)
		require.NoError(t, err)
		require.NoError(t, s.Put("a.b", []byte(pattern), 0))
		require.Equal(t, []byte(pattern), (<-events).Value)
	}
}
