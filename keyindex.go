package state

import (
	"iter"
	"slices"
	"strings"
)

// A keyIndex finds the keys of a MemoryStore by their beginning. It is built when
// a pattern with a star is first asked for, and kept up from then on. If more
// keys come and go than there were, and nobody asks, it is dropped rather than
// kept up for nothing.
//
// The keys are in order, cut into blocks so that to insert one moves only a few.
type keyIndex struct {
	made   bool
	blocks [][]string // none is empty
	asked  int        // how many keys there were when somebody asked
	idle   int        // changes since then

	building chan struct{} // closed when the build in progress ends; nil if there is none
	log      []keyChange   // what changed since it began
}

// A keyChange is a key that was added or removed while the index was built.
type keyChange struct {
	key   string
	added bool
}

const (
	maxBlock = 512
	maxIdle  = 4096 // on top of the number of keys

	// indexStep is how many keys a build or a listing handles before it lets
	// others have the lock: a millisecond's work at most.
	indexStep = 1024
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
	if n.keepUp(key, true) {
		n.insert(key)
	}
}

// remove takes a key off the list.
func (n *keyIndex) remove(key string) {
	if n.keepUp(key, false) {
		n.take(key)
	}
}

// keepUp reports whether there is an index to keep up with a change. While it is
// being built, the change is logged instead.
func (n *keyIndex) keepUp(key string, added bool) bool {
	if n.building != nil {
		n.log = append(n.log, keyChange{key, added})
	}
	if !n.made {
		return false
	}
	if n.idle++; n.idle > maxIdle+n.asked {
		*n = keyIndex{}
	}
	return n.made
}

// insert puts key in its place, unless it is there.
func (n *keyIndex) insert(key string) {
	if len(n.blocks) == 0 {
		n.blocks = [][]string{{key}}
		return
	}
	at, i, found := n.find(key)
	if found {
		return
	}
	block := slices.Insert(n.blocks[at], i, key)
	if n.blocks[at] = block; len(block) > maxBlock {
		half := len(block) / 2
		n.blocks[at] = slices.Clone(block[:half])
		n.blocks = slices.Insert(n.blocks, at+1, slices.Clone(block[half:]))
	}
}

// take removes key, if it is there.
func (n *keyIndex) take(key string) {
	at, i, found := n.find(key)
	if !found {
		return
	}
	if n.blocks[at] = slices.Delete(n.blocks[at], i, i+1); len(n.blocks[at]) == 0 {
		n.blocks = slices.Delete(n.blocks, at, at+1)
	}
}

// build makes the index of items, which the caller's lock guards along with n.
// The lock is held when build is called and when it returns. After each
// indexStep keys build calls pause, which lets go of the lock, does the given
// work if there is any, and takes the lock again; keys may be added and removed
// meanwhile. An error of pause ends the build.
func (n *keyIndex) build(items map[string]*item, pause func(work func()) error) error {
	done := make(chan struct{})
	n.building = done
	defer func() {
		close(done)
		n.building, n.log = nil, nil
	}()
	var keys []string
	size := len(items)
	if err := pause(func() { keys = make([]string, 0, size) }); err != nil {
		return err
	}
	// A range over a map yields every key that is there throughout. The log has
	// the others.
	for key := range items {
		if keys = append(keys, key); len(keys)%indexStep == 0 {
			if err := pause(nil); err != nil {
				return err
			}
		}
	}
	var blocks [][]string
	if err := pause(func() {
		slices.Sort(keys)
		blocks = slices.Collect(slices.Chunk(keys, maxBlock))
	}); err != nil {
		return err
	}
	n.blocks = blocks
	for i := 0; i < len(n.log); i++ { // which may grow in a pause
		if change := n.log[i]; change.added {
			n.insert(change.key)
		} else {
			n.take(change.key)
		}
		if i%indexStep == indexStep-1 {
			if err := pause(nil); err != nil {
				n.blocks = nil
				return err
			}
		}
	}
	n.made = true
	return nil
}

// ask notes that somebody asks the index, of so many keys.
func (n *keyIndex) ask(size int) { n.asked, n.idle = size, 0 }

// from returns the keys that begin with prefix and are not less than first, in
// order.
func (n *keyIndex) from(prefix, first string) iter.Seq[string] {
	return func(yield func(string) bool) {
		at, i, _ := n.find(max(prefix, first))
		for ; at < len(n.blocks); at, i = at+1, 0 {
			for _, key := range n.blocks[at][i:] {
				if !strings.HasPrefix(key, prefix) || !yield(key) {
					return
				}
			}
		}
	}
}

// count returns about how many keys begin with prefix, and not less than there
// are.
func (n *keyIndex) count(prefix string) int {
	first, _, _ := n.find(prefix)
	last, _ := slices.BinarySearchFunc(n.blocks, prefix, func(b []string, prefix string) int {
		if strings.HasPrefix(b[0], prefix) {
			return -1
		}
		return strings.Compare(b[0], prefix)
	})
	size := 0
	for ; first < last; first++ {
		size += len(n.blocks[first])
	}
	return size
}
