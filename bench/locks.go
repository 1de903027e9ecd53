package main

import (
	"fmt"
	"time"

	"github.com/bsm/redislock"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const lockTTL = 30 * time.Second

// lockGroup compares cycles of taking and releasing a lock that nobody else
// wants. The names come in turn, so that each was released before.
func lockGroup(r *run) error {
	s, nc, err := r.openStore("state-lock")
	if err != nil {
		return err
	}
	kv, kvConn, err := r.openKV("peer-lock", kvTTL)
	if err != nil {
		return err
	}
	ourName, kvName := among(100), among(100)
	cycle := func() error {
		lock, err := s.Lock(ourName(), lockTTL)
		if err != nil {
			return err
		}
		return lock.Unlock()
	}
	kvCycle := func() error {
		name := kvName()
		if _, err := kv.Create(ctx, name, value, jetstream.KeyTTL(lockTTL)); err != nil {
			return err
		}
		return kv.Purge(ctx, name)
	}
	if err := r.add("Lock+Unlock", r.plan(6), []float64{0.5}, timed(us, cycle), timed(kvGo+" Create+Purge", kvCycle)); err != nil {
		return err
	}
	sides := []side{timed(us, cycle)}
	redisSide, err := r.redisLock()
	if err != nil {
		return err
	}
	if redisSide != nil {
		sides = append(sides, *redisSide)
	}
	etcdSide, err := r.etcdLock()
	if err != nil {
		return err
	}
	sides = append(sides, *etcdSide)
	if err := r.add("Lock+Unlock", r.plan(4), nil, sides...); err != nil {
		return err
	}

	ours, err := requests(nc, cycle)
	if err != nil {
		return err
	}
	theirs, err := requests(kvConn, kvCycle)
	if err != nil {
		return err
	}
	ratio := ours / theirs
	r.put(row{
		name: "Lock+Unlock, requests", ours: us, theirs: kvGo + " Create+Purge", unit: "requests",
		our: ours, their: theirs, ratio: ratio, low: ratio, high: ratio, target: 0.5,
	})

	newName, newKVName := counter("new"), counter("new")
	return r.add("Lock+Unlock, new name", r.plan(3), nil,
		timed(us, func() error {
			lock, err := s.Lock(newName(), lockTTL)
			if err != nil {
				return err
			}
			return lock.Unlock()
		}),
		timed(kvGo+" Create+Purge", func() error {
			name := newKVName()
			if _, err := kv.Create(ctx, name, value, jetstream.KeyTTL(lockTTL)); err != nil {
				return err
			}
			return kv.Purge(ctx, name)
		}))
}

// requests counts what an operation sends.
func requests(nc *nats.Conn, op func() error) (float64, error) {
	const n = 100
	before := nc.Stats().OutMsgs
	for range n {
		if err := op(); err != nil {
			return 0, err
		}
	}
	return float64(nc.Stats().OutMsgs-before) / n, nil
}

func (r *run) redisLock() (*side, error) {
	address, missing, err := r.startRedis()
	if err != nil {
		return nil, err
	}
	if missing != "" {
		r.note("redislock was not measured: %s.", missing)
		return nil, nil
	}
	client := redis.NewClient(&redis.Options{Addr: address})
	r.stops = append(r.stops, func() { _ = client.Close() })
	locker, name := redislock.New(client), among(100)
	s := timed("redislock", func() error {
		lock, err := locker.Obtain(ctx, name(), lockTTL, nil)
		if err != nil {
			return err
		}
		return lock.Release(ctx)
	})
	return &s, nil
}

func (r *run) etcdLock() (*side, error) {
	address, _, err := r.start("etcd")
	if err != nil {
		return nil, err
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{address}, DialTimeout: 10 * time.Second})
	if err != nil {
		return nil, err
	}
	r.stops = append(r.stops, func() { _ = client.Close() })
	session, err := concurrency.NewSession(client, concurrency.WithTTL(int(lockTTL/time.Second)))
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	r.stops = append(r.stops, func() { _ = session.Close() })
	name := among(100)
	s := timed("etcd Mutex", func() error {
		m := concurrency.NewMutex(session, "/locks/"+name())
		if err := m.TryLock(ctx); err != nil {
			return err
		}
		return m.Unlock(ctx)
	})
	return &s, nil
}
