package state

import "sync"

// cacheLimit is how many keys a client remembers the last record of, at least.
const cacheLimit = 32768

// A recordCache remembers what this client last knew of a key, without the
// value. It is never more than a guess: a write that is based on it is
// conditional on it.
type recordCache struct {
	mu         sync.Mutex // guards what follows
	young, old map[string]cached
}

// A cached is a key's last record as far as it is known, and whether others
// write the key, too.
type cached struct {
	record
	contested bool
	writing   int // how many of this client's writes are under way
}

// learn notes a key's record, unless a newer one is known.
func (c *recordCache) learn(key string, r record) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, ok := c.find(key)
	if ok && known.revision > r.revision {
		return
	}
	r.value = nil
	known.record = r
	c.set(key, known)
}

// wrote notes the record that this client has written and, if that was
// conditional, that nobody else had.
func (c *recordCache) wrote(key string, r record, pre precondition) {
	c.learn(key, r)
	if pre == ifUnchanged {
		c.contest(key, false)
	}
}

// contest notes whether others write a key, too.
func (c *recordCache) contest(key string, contested bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, _ := c.find(key)
	known.contested = contested
	c.set(key, known)
}

// begin notes that a write to a key is under way until end, and reports whether
// the key is contested: other clients write it, or this one is writing it already.
func (c *recordCache) begin(key string) (contested bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, _ := c.find(key)
	contested = known.contested || known.writing > 0
	known.writing++
	c.set(key, known)
	return contested
}

func (c *recordCache) end(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if known, ok := c.find(key); ok && known.writing > 0 {
		known.writing--
		c.set(key, known)
	}
}

func (c *recordCache) set(key string, k cached) {
	if _, ok := c.young[key]; !ok && len(c.young) >= cacheLimit {
		c.old, c.young = c.young, nil
	}
	if c.young == nil {
		c.young = make(map[string]cached)
	}
	c.young[key] = k
	delete(c.old, key)
}

func (c *recordCache) find(key string) (cached, bool) {
	if k, ok := c.young[key]; ok {
		return k, true
	}
	k, ok := c.old[key]
	return k, ok
}

// recall returns what is known of a key. Its revision is 0 if nothing is.
func (c *recordCache) recall(key string) record {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, _ := c.find(key)
	return k.record
}

// forget drops what is known of a key's record.
func (c *recordCache) forget(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if k, ok := c.find(key); ok {
		k.record = record{}
		c.set(key, k)
	}
}

// clear drops everything: the bucket is another one, or has lost what was in it.
func (c *recordCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.young, c.old = nil, nil
}

// len returns how many keys are remembered.
func (c *recordCache) len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.young) + len(c.old)
}
