package state

import (
	"maps"
	"slices"
	"strings"
)

// A keyIndex finds the keys of a MemoryStore by their beginning. It is made when Keys
// is first called with a star, and kept up from then on. If more keys come and
// go than there were, and nobody asks, it is dropped rather than kept up in vain.
//
// The keys are in order, cut into blocks so that to insert one moves only a few.
type keyIndex struct {
	made   bool
	blocks [][]string // none is empty
	asked  int        // how many keys there were when somebody asked
	idle   int        // changes since then
}

const (
	maxBlock = 512
	maxIdle  = 4096 // on top of the number of keys
)

// find returns the place of a key: the block, and the index in the block.
func (n *keyIndex) find(key string) (block, i int, found bool) {
	block, found = slices.BinarySearchFunc(n.blocks, key, func(b []string, key string) int {
		return strings.Compare(b[0], key)
	})
	if found || block == 0 {
		return block, 0, found
	}
	i, found = slices.BinarySearch(n.blocks[block-1], key)
	return block - 1, i, found
}

// add lists a new key.
func (n *keyIndex) add(key string) {
	if !n.keepUp() {
		return
	}
	if len(n.blocks) == 0 {
		n.blocks = [][]string{{key}}
		return
	}
	at, i, _ := n.find(key)
	block := slices.Insert(n.blocks[at], i, key)
	if n.blocks[at] = block; len(block) > maxBlock {
		half := len(block) / 2
		n.blocks[at] = slices.Clone(block[:half])
		n.blocks = slices.Insert(n.blocks, at+1, slices.Clone(block[half:]))
	}
}

// remove takes a key off the list.
func (n *keyIndex) remove(key string) {
	if !n.keepUp() {
		return
	}
	at, i, _ := n.find(key)
	if n.blocks[at] = slices.Delete(n.blocks[at], i, i+1); len(n.blocks[at]) == 0 {
		n.blocks = slices.Delete(n.blocks, at, at+1)
	}
}

// keepUp reports whether there is an index to keep up with a change.
func (n *keyIndex) keepUp() bool {
	if !n.made {
		return false
	}
	if n.idle++; n.idle > maxIdle+n.asked {
		*n = keyIndex{}
	}
	return n.made
}

// withPrefix returns the keys that begin with prefix, in order. The items have
// all keys there are.
func (n *keyIndex) withPrefix(prefix string, items map[string]*item) []string {
	if !n.made {
		n.made = true
		n.blocks = slices.Collect(slices.Chunk(slices.Sorted(maps.Keys(items)), maxBlock))
	}
	n.asked, n.idle = len(items), 0
	found := []string{}
	at, i, _ := n.find(prefix)
	for ; at < len(n.blocks); at, i = at+1, 0 {
		for _, key := range n.blocks[at][i:] {
			if !strings.HasPrefix(key, prefix) {
				return found
			}
			found = append(found, key)
		}
	}
	return found
}
