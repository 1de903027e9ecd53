package state

import (
	"context"
	"time"
)

type Updater interface {
	Update(key string, value []byte, ttl time.Duration, revision uint64) (uint64, error)
}
type ContextWatcher interface {
	WatchContext(ctx context.Context, pattern string) (<-chan *KeyValue, error)
}

func (s *MemoryStore) WatchContext(ctx context.Context, p string) (<-chan *KeyValue, error) {
	return s.WithContext(ctx).Watch(p)
}
func (s *NATSStore) WatchContext(ctx context.Context, p string) (<-chan *KeyValue, error) {
	return s.WithContext(ctx).Watch(p)
}
