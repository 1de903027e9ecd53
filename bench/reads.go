package main

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"example.com/state"
	"github.com/nats-io/nats.go/jetstream"
)

const readsText = "Many keys at once, out of a bucket of 50,000. *on our bucket*: nats.go reads the bucket that we have written, with its headers. " +
	"*Cache*: 1,000 keys, kept up to date from a bucket; *copying* means that the others copy what they return, too, as Cache does."

const manyKeys = 50_000

// A manyBuckets is a bucket of ours and one of nats.go's, with as many keys, and
// ours as nats.go sees it.
type manyBuckets struct {
	ours         *state.NATSStore
	theirs, same jetstream.KeyValue
}

func (r *run) manyBuckets(name string) (m manyBuckets, err error) {
	if m.ours, m.theirs, err = r.filled(name, manyKeys); err != nil {
		return m, err
	}
	m.same, _, err = r.bindKV("state-" + name)
	return m, err
}

const onOurs = " on our bucket"

// readsGroup compares listings of many keys.
func readsGroup(r *run) error {
	m, err := r.manyBuckets("list")
	if err != nil {
		return err
	}
	keys := func(pattern string, want int) side {
		return timed(us, func() error {
			found, err := m.ours.Keys(pattern)
			return enough(len(found), want, err)
		})
	}
	const lister = kvGo + " ListKeysFiltered"
	list := func(name string, kv jetstream.KeyValue, filter string, want int) side {
		return timed(name, func() error { return listKeys(kv, filter, want) })
	}
	err = r.add("Keys, all of 50,000", r.few(25, 1), []float64{1, 0}, keys("*", manyKeys),
		list(lister+onOurs, m.same, ">", manyKeys), list(lister, m.theirs, ">", manyKeys))
	if err != nil {
		return err
	}
	err = r.add("Keys, 500 of 50,000", r.plan(3), []float64{0.8, 0.8}, keys("group-007.*", manyKeys/100),
		list(lister+onOurs, m.same, "group-007.>", manyKeys/100), list(lister, m.theirs, "group-007.>", manyKeys/100))
	if err != nil {
		return err
	}
	err = r.add("Entries, all of 50,000", r.few(25, 1), []float64{1.2, 1.2},
		timed(us, func() error {
			found, err := m.ours.Entries("*")
			return enough(len(found), manyKeys, err)
		}),
		timed(kvGo+" WatchAll"+onOurs, func() error { return watchAll(m.same, manyKeys) }),
		timed(kvGo+" WatchAll", func() error { return watchAll(m.theirs, manyKeys) }))
	if err != nil {
		return err
	}
	return r.cacheReads()
}

// cacheReads compares the reads of a Cache with those of what has no store
// behind it.
func (r *run) cacheReads() error {
	s, _, err := r.openStore("state-cached")
	if err != nil {
		return err
	}
	peers := append(r.caches()[:1], syncMap())
	next := among(1000)
	for range 1000 {
		key := next()
		if err := s.Put(key, value, kvTTL); err != nil {
			return err
		}
		for _, c := range peers {
			c.put(key, bytes.Clone(value))
		}
	}
	c, err := state.NewCache(ctx, s, "*")
	if err != nil {
		return err
	}
	defer c.Close()
	for _, how := range []struct {
		name string
		make func(string, func(string) error) side
	}{{"alone", local}, {"parallel", parallel}} {
		sides := []side{how.make("Cache", func(key string) error { _, err := c.Get(key); return err })}
		for _, c := range peers {
			sides = append(sides, how.make(c.name, c.read), how.make(c.name+", copying", c.copying().read))
		}
		if err := r.add("Cache.Get, "+how.name, r.plan(1.5), nil, sides...); err != nil {
			return err
		}
	}
	return nil
}

// syncMap returns a sync.Map as a cache.
func syncMap() cache {
	var m sync.Map
	return cache{
		"sync.Map, no TTL", false,
		func(key string) ([]byte, bool) {
			v, ok := m.Load(key)
			if !ok {
				return nil, false
			}
			return v.([]byte), true
		},
		func(key string, v []byte) { m.Store(key, v) },
	}
}

// enough returns an error unless an operation found what it should.
func enough(found, want int, err error) error {
	if err == nil && found != want {
		err = fmt.Errorf("%d keys instead of %d", found, want)
	}
	return err
}

// listKeys lists keys as nats.go does.
func listKeys(kv jetstream.KeyValue, filter string, want int) error {
	lister, err := kv.ListKeysFiltered(ctx, filter)
	if err != nil {
		return err
	}
	found := 0
	for range lister.Keys() {
		found++
	}
	return enough(found, want, nil)
}

// watchAll reads all entries as nats.go does: by a watch, up to the nil that
// says that it is up to date.
func watchAll(kv jetstream.KeyValue, want int) error {
	watcher, err := kv.WatchAll(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = watcher.Stop() }()
	timeout := time.After(time.Minute)
	for found := 0; ; found++ {
		select {
		case entry := <-watcher.Updates():
			if entry == nil {
				return enough(found, want, nil)
			}
		case <-timeout:
			return errors.New("WatchAll does not end")
		}
	}
}
