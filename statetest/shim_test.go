package statetest_test

import (
	"context"
	"time"

	"example.com/state"
)

type shim struct {
	*state.MemoryStore
	ctx context.Context
}

func (s shim) DeleteRevision(key string, rev uint64) error {
	kv, err := s.GetKeyValue(key)
	if err != nil || kv.Revision != rev {
		return state.ErrConflict
	}
	return s.Delete(key)
}
func (s shim) Entries(p string) ([]*state.KeyValue, error)    { return nil, nil }
func (s shim) LockHolder(key string) (*state.LockInfo, error) { return nil, state.ErrNotFound }
func (s shim) WithContext(ctx context.Context) state.Store    { return shim{s.MemoryStore, ctx} }
func (s shim) Watch(p string) (<-chan *state.KeyValue, error) { return s.WatchContext(s.ctx, p) }

var _ = time.Second

func newMemory() state.Store { return shim{state.NewMemoryStore(), context.Background()} }
