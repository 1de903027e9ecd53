package state

import (
	"context"
	"slices"
	"strings"
)

// What besideTraffic has to hide once the suite's cases use all of Store.

func (s besideTraffic) Entries(pattern string) ([]*KeyValue, error) {
	entries, err := s.NATSStore.Entries(pattern)
	return entriesWithoutTraffic(entries), err
}

func (s besideTraffic) WithContext(ctx context.Context) Store {
	return boundBesideTraffic{s.NATSStore.WithContext(ctx)}
}

// boundBesideTraffic is besideTraffic for a store that is bound to a context.
type boundBesideTraffic struct{ Store }

func (s boundBesideTraffic) Keys(pattern string) ([]string, error) {
	keys, err := s.Store.Keys(pattern)
	return withoutTraffic(keys), err
}

func (s boundBesideTraffic) Entries(pattern string) ([]*KeyValue, error) {
	entries, err := s.Store.Entries(pattern)
	return entriesWithoutTraffic(entries), err
}

func (s boundBesideTraffic) Watch(pattern string) (<-chan *KeyValue, error) {
	events, err := s.Store.Watch(pattern)
	return eventsWithoutTraffic(events), err
}

func (s boundBesideTraffic) WithContext(ctx context.Context) Store {
	return boundBesideTraffic{s.Store.WithContext(ctx)}
}

func entriesWithoutTraffic(entries []*KeyValue) []*KeyValue {
	return slices.DeleteFunc(entries, func(kv *KeyValue) bool { return strings.HasPrefix(kv.Key, trafficPrefix) })
}

var _ Store = besideTraffic{}
