package state

import (
	"slices"
	"strings"
)

// names finds the keys of a MemoryStore by their beginning.
//
// It is made when Keys is first called with a star, and kept up from then on:
// a new key is appended to fresh, and sorted in when enough have come together.
// A key that went away stays listed until then. If so many keys come that
// nobody asked for, the index is dropped rather than kept up in vain.
type names struct {
	made   bool
	sorted []string
	fresh  []string // not sorted
}

// maxFresh is up to how many fresh names are searched one by one.
const maxFresh = 256

// add lists a new key.
func (n *names) add(key string) {
	if !n.made {
		return
	}
	if n.fresh = append(n.fresh, key); len(n.fresh) > maxFresh+len(n.sorted) {
		*n = names{}
	}
}

// withPrefix returns the keys among items that begin with prefix, sorted.
func (n *names) withPrefix(prefix string, items map[string]*item) []string {
	n.tidy(items)
	exists := func(key string) bool { return items[key] != nil }

	found := []string{}
	first, _ := slices.BinarySearch(n.sorted, prefix)
	for _, key := range n.sorted[first:] {
		if !strings.HasPrefix(key, prefix) {
			break
		}
		if exists(key) {
			found = append(found, key)
		}
	}
	known := len(found)
	for _, key := range n.fresh {
		if strings.HasPrefix(key, prefix) && exists(key) {
			found = append(found, key)
		}
	}
	if len(found) > known {
		slices.Sort(found)
		found = slices.Compact(found) // it went away and came back
	}
	return found
}

// tidy makes the index, or sorts in what is fresh if that is much.
func (n *names) tidy(items map[string]*item) {
	switch {
	case !n.made:
		n.made = true
		n.sorted = make([]string, 0, len(items))
		for key := range items {
			n.sorted = append(n.sorted, key)
		}
	case len(n.fresh) > maxFresh || len(n.sorted) > 2*len(items)+maxFresh:
		gone := func(key string) bool { return items[key] == nil }
		n.sorted = slices.DeleteFunc(append(n.sorted, n.fresh...), gone)
		n.fresh = nil
	default:
		return
	}
	slices.Sort(n.sorted)
	n.sorted = slices.Compact(n.sorted)
}

// A watchIndex finds the watches that match a key, at a cost that does not grow
// with the number of those that do not.
type watchIndex struct {
	len   int
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

// tell pushes an event to all that watch key. It is made only if somebody does.
func (x *watchIndex) tell(key string, event func() *KeyValue) {
	if x.len == 0 {
		return
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
			return
		}
		push(t.boxes)
	}
}
