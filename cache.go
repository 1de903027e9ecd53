package state

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// A Cache is a local copy of the entries that match a pattern. It is kept up to
// date in the way of [Follow], for programs that read far more often than others
// write. Its reads make no request, and do not block each other.
//
// A cache lags behind the store: usually by less than a millisecond on a local
// network, by more while the connection is cut. AsOf says how far it lags at
// most, and Wait waits until the cache has a certain change. An entry stays in
// the cache until its expiry has been delivered.
//
// For each entry a Cache takes the key, the value and about 250 bytes. On a
// [NATSStore] the watch behind it takes about 250 bytes more per key, once for all
// watches of the pattern in a store. There, AsOf ignores the delays that NATSStore
// describes for purged keys and for a leader that a partition has cut off.
type Cache struct {
	pattern pattern
	entries sync.Map // *KeyValue by key; those in it are never changed
	end     context.CancelFunc
	done    chan struct{} // closed when the cache is not kept up to date any more
	asked   chan struct{}

	mu      sync.Mutex // guards what follows
	reached progress
	recent  [256]uint64 // revisions that were taken over last
	taken   int         // how many have been
	waiting int
	changed chan struct{} // closed, and replaced, when something was taken over while somebody waits
}

// NewCache returns a cache of the entries that match a pattern, once it is
// complete. The cache is kept up to date until ctx ends, Close is called or the
// store is closed. Errors are those of [Follow]. On a NATSStore it costs what
// Follow does, and then three small requests per second, which tell the cache how
// far it lags. A store that wraps another one is listed once per second instead.
func NewCache(ctx context.Context, store Store, pattern string) (*Cache, error) {
	p, err := parsePattern(pattern)
	if err != nil {
		return nil, err
	}
	c := &Cache{pattern: p, done: make(chan struct{}), asked: make(chan struct{}, 1), changed: make(chan struct{})}
	f := &following{store: store, pattern: pattern, sink: (*cacheSink)(c), asked: c.asked}
	ctx, c.end = context.WithCancel(ctx)
	src, err := f.open(ctx)
	if err != nil {
		c.end()
		return nil, err
	}
	for _, kv := range src.takeCurrent() {
		c.entries.Store(kv.Key, kv)
	}
	c.reached = progress{src.asOf, src.begun}
	go func() {
		defer close(c.done)
		defer c.end()
		f.run(ctx, src)
	}()
	return c, nil
}

// A cacheSink is a Cache as the goroutine sees it that keeps it up to date.
type cacheSink Cache

func (c *cacheSink) version(key string) (version, bool) {
	if kv, ok := c.entries.Load(key); ok {
		return versionOf(kv.(*KeyValue)), true
	}
	return version{}, false
}

func (c *cacheSink) each(f func(key string, revision uint64)) {
	c.entries.Range(func(key, kv any) bool {
		f(key.(string), kv.(*KeyValue).Revision)
		return true
	})
}

func (c *cacheSink) apply(ev *KeyValue) {
	if ev.Operation == OpDelete {
		c.entries.Delete(ev.Key)
	} else {
		c.entries.Store(ev.Key, ev)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.recent[c.taken%len(c.recent)] = ev.Revision
	c.taken++
	c.wakeLocked()
}

func (c *cacheSink) next() (chan<- *KeyValue, *KeyValue) { return nil, nil }

func (c *cacheSink) delivered() {}

func (c *cacheSink) startOver() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reached.revision, c.recent = 0, [256]uint64{}
}

func (c *cacheSink) advance(p progress) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reached.revision = max(c.reached.revision, p.revision)
	if p.asOf.After(c.reached.asOf) {
		c.reached.asOf = p.asOf
	}
	c.wakeLocked()
}

func (c *cacheSink) wakeLocked() {
	if c.waiting > 0 {
		close(c.changed)
		c.changed = make(chan struct{})
	}
}

// load returns the cached entry of a key.
func (c *Cache) load(key string) (*KeyValue, error) {
	kv, ok := c.entries.Load(key)
	if c.closed() {
		return nil, ErrClosed
	}
	if ok {
		return kv.(*KeyValue), nil
	}
	if ValidateKey(key) != nil || !c.pattern.matches(key) {
		return nil, ErrInvalidKey
	}
	return nil, ErrNotFound
}

func (c *Cache) closed() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// Get retrieves a value by key, as [StateStore.Get] does. It also returns
// ErrInvalidKey for a key that does not match the cache's pattern, and ErrClosed
// after the cache or the store was closed or its context has ended. While the store
// cannot be reached, even for good, the cache answers with what it has; AsOf says
// how old that may be. The bytes are the caller's own.
func (c *Cache) Get(key string) ([]byte, error) {
	kv, err := c.load(key)
	if err != nil {
		return nil, err
	}
	return cloneBytes(kv.Value), nil
}

// GetKeyValue retrieves the full entry, under the terms of Get.
func (c *Cache) GetKeyValue(key string) (*KeyValue, error) {
	kv, err := c.load(key)
	if err != nil {
		return nil, err
	}
	return kv.clone(), nil
}

// clone returns a copy that shares nothing with kv.
func (kv *KeyValue) clone() *KeyValue {
	own := *kv
	if own.Operation == OpPut {
		own.Value = cloneBytes(own.Value)
	}
	return &own
}

// Keys returns the cached keys that match a pattern, sorted. It returns
// ErrInvalidKey for a pattern that can match keys outside the cache's own.
func (c *Cache) Keys(pattern string) ([]string, error) {
	found, err := c.matching(pattern)
	if err != nil {
		return nil, err
	}
	keys := make([]string, len(found))
	for i, kv := range found {
		keys[i] = kv.Key
	}
	return keys, nil
}

// Entries returns the cached entries that match a pattern, sorted by key, under
// the terms of Keys. They are the caller's own.
func (c *Cache) Entries(pattern string) ([]*KeyValue, error) {
	found, err := c.matching(pattern)
	if err != nil {
		return nil, err
	}
	for i, kv := range found {
		found[i] = kv.clone()
	}
	return found, nil
}

func (c *Cache) matching(text string) ([]*KeyValue, error) {
	if c.closed() {
		return nil, ErrClosed
	}
	p, err := parsePattern(text)
	if err != nil {
		return nil, err
	}
	if !c.pattern.covers(p) {
		return nil, ErrInvalidKey
	}
	found := []*KeyValue{}
	c.entries.Range(func(key, kv any) bool {
		if p.matches(key.(string)) {
			found = append(found, kv.(*KeyValue))
		}
		return true
	})
	slices.SortFunc(found, func(x, y *KeyValue) int { return strings.Compare(x.Key, y.Key) })
	return found, nil
}

// AsOf returns a time by the local clock: every change that was acknowledged
// before then is in the cache. While the store is connected, that is at most
// about two seconds ago. AsOf makes no request.
func (c *Cache) AsOf() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reached.asOf
}

// Wait waits until the cache has reached the revision of a matching key, as an
// Update or an entry gave it: every change up to it is in the cache, or that
// change itself is. It returns an error that wraps the context's if ctx ends
// first, and ErrClosed when the cache is no longer kept up to date. On a
// NATSStore it costs no request if the cache has the change already, usually
// three otherwise, and more if the revision has not been written yet. A bucket
// that is deleted and created again begins with new revisions: until the cache has
// noticed, Wait can take one of them for one of the old bucket.
func (c *Cache) Wait(ctx context.Context, revision uint64) error {
	c.mu.Lock()
	c.waiting++
	defer func() {
		c.waiting--
		c.mu.Unlock()
	}()
	for asked := false; ; asked = true {
		if c.closed() {
			return ErrClosed
		}
		if c.reached.revision >= revision || slices.Contains(c.recent[:], revision) {
			return nil
		}
		changed := c.changed
		c.mu.Unlock()
		if !asked {
			notify(c.asked)
		}
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = fmt.Errorf("state: wait for revision %d: %w", revision, ctx.Err())
		case <-c.done:
			err = ErrClosed
		}
		c.mu.Lock()
		if err != nil {
			return err
		}
	}
}

// Close ends the cache and waits until its goroutine has finished. The store
// stays open. It returns nil.
func (c *Cache) Close() error {
	c.end()
	<-c.done
	return nil
}
