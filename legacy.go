package state

import (
	"context"
	"time"
)

// Updater and ContextWatcher are replaced by Store; they go when both backends
// implement it.
type Updater interface {
	Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error)
}

type ContextWatcher interface {
	WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error)
}

// WatchContext goes with them.
func (s *MemoryStore) WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error) {
	return s.WithContext(ctx).Watch(pattern)
}
