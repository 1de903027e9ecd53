package state

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

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
