package state

import (
	"maps"
	"slices"
	"strings"
)

// names finds the keys of a MemoryStore by their beginning. It is made when Keys
// is first called with a star, and kept up from then on. If more keys come and
// go than there were, and nobody asks, it is dropped rather than kept up in vain.
//
// The keys are in order, cut into blocks so that to insert one moves only a few.
type names struct {
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
func (n *names) find(key string) (block, i int, found bool) {
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
func (n *names) add(key string) {
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
func (n *names) remove(key string) {
	if !n.keepUp() {
		return
	}
	at, i, _ := n.find(key)
	if n.blocks[at] = slices.Delete(n.blocks[at], i, i+1); len(n.blocks[at]) == 0 {
		n.blocks = slices.Delete(n.blocks, at, at+1)
	}
}

// keepUp reports whether there is an index to keep up with a change.
func (n *names) keepUp() bool {
	if !n.made {
		return false
	}
	if n.idle++; n.idle > maxIdle+n.asked {
		*n = names{}
	}
	return n.made
}

// withPrefix returns the keys that begin with prefix, in order. The items have
// all keys there are.
func (n *names) withPrefix(prefix string, items map[string]*item) []string {
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

// A watchIndex finds the watches that match a key, at a cost that does not grow
// with the number of those that do not.
type watchIndex struct {
	len   int
	added uint64 // how many have been added
	exact map[string][]*outbox
	wild  trie
}

// A trie holds what watches the keys that begin with the path to it.
type trie struct {
	boxes    []*outbox
	branches []branch
}

type branch struct {
	c    byte
	trie *trie
}

func (t *trie) branch(c byte) *trie {
	for i := range t.branches {
		if t.branches[i].c == c {
			return t.branches[i].trie
		}
	}
	return nil
}

func (x *watchIndex) add(p pattern, box *outbox) {
	x.len++
	x.added++
	if !p.wild {
		if x.exact == nil {
			x.exact = make(map[string][]*outbox)
		}
		x.exact[p.prefix] = append(x.exact[p.prefix], box)
		return
	}
	t := &x.wild
	for i := range len(p.prefix) {
		next := t.branch(p.prefix[i])
		if next == nil {
			next = new(trie)
			t.branches = append(t.branches, branch{p.prefix[i], next})
		}
		t = next
	}
	t.boxes = append(t.boxes, box)
}

func (x *watchIndex) remove(p pattern, box *outbox) {
	x.len--
	if !p.wild {
		if rest := without(x.exact[p.prefix], box); len(rest) > 0 {
			x.exact[p.prefix] = rest
		} else {
			delete(x.exact, p.prefix)
		}
		return
	}
	x.wild.remove(p.prefix, box)
}

// remove takes box out, and the branches that are bare then.
func (t *trie) remove(path string, box *outbox) {
	if path == "" {
		t.boxes = without(t.boxes, box)
		return
	}
	next := t.branch(path[0])
	next.remove(path[1:], box)
	if len(next.boxes) == 0 && len(next.branches) == 0 {
		t.branches = slices.DeleteFunc(t.branches, func(b branch) bool { return b.c == path[0] })
	}
}

func without(boxes []*outbox, box *outbox) []*outbox {
	return slices.DeleteFunc(boxes, func(b *outbox) bool { return b == box })
}

// tell pushes an event to all that watch key, and reports whether somebody does.
// The event is made only then.
func (x *watchIndex) tell(key string, event func() *KeyValue) bool {
	if x.len == 0 {
		return false
	}
	var ev *KeyValue
	push := func(boxes []*outbox) {
		if ev == nil && len(boxes) > 0 {
			ev = event()
		}
		for _, box := range boxes {
			box.push(ev)
		}
	}
	push(x.exact[key])
	t := &x.wild
	push(t.boxes)
	for i := range len(key) {
		if t = t.branch(key[i]); t == nil {
			break
		}
		push(t.boxes)
	}
	return ev != nil
}
