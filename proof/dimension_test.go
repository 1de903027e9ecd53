package proof

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

// What a quiet loopback with a few clients does not show: distance, narrow
// links, traffic, numbers, operators, a busy processor, and connections as users
// make them.

// far is a distance of up to 50 ms, another one for each client.
func far() distance {
	d := distance{rtt: rand.N(50 * time.Millisecond)}
	if rand.IntN(2) == 0 {
		d.jitter = rand.N(d.rtt/4 + 1)
	}
	return d
}

// narrow is far, and between 250 KiB/s and 3 MiB/s wide.
func narrow() distance {
	d := far()
	d.bandwidth = 250<<10 + rand.IntN(2750<<10)
	return d
}

// largest is the size of the largest value that a store takes whose server has the
// usual limit.
const largest = 1<<20 - 1<<10

// both is two things at the same time.
func both(one, other func(context.Context, *trouble)) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		var wg sync.WaitGroup
		wg.Go(func() { one(ctx, f) })
		wg.Go(func() { other(ctx, f) })
		wg.Wait()
	}
}

// atADistance gives clients the time that answers take.
func atADistance(l *load) { l.epoch, l.catchUp = 4*time.Second, 40*time.Second }

// traffic is 300 writes per second to other keys of the bucket.
func traffic(ctx context.Context, f *trouble) {
	s, _, err := f.open("proof")
	if err != nil {
		f.load.broke("traffic: %v", err)
		return
	}
	defer s.Close()
	began, written, failed := time.Now(), 0, 0
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range 10 {
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				err := s.WithContext(ctx).Put(fmt.Sprintf("%s%d.%d", noise, i, n%50), []byte("n"), 10*time.Second)
				mu.Lock()
				if written++; err != nil {
					failed++
				}
				mu.Unlock()
				sleep(ctx, time.Until(began.Add(time.Duration(n)*time.Second/30)))
			}
		})
	}
	wg.Wait()
	f.note("%.0f writes per second beside it, %d failed", float64(written)/time.Since(began).Seconds(), failed)
}

// burn keeps the processor busy with four goroutines.
func burn(ctx context.Context, _ *trouble) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for x := 1; ctx.Err() == nil; {
				for range 1_000_000 {
					x = x*1103515245 + 12345
				}
				if x == 0 {
					return
				}
			}
		})
	}
	wg.Wait()
}

// anyOptions are options of a connection that users set.
func anyOptions() []nats.Option {
	all := []nats.Option{nats.NoEcho(), nats.CustomInboxPrefix("_MINE"), nats.UseOldRequestStyle(), nats.RetryOnFailedConnect(true), nats.ReconnectBufSize(-1)}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:rand.IntN(len(all)+1)]
}

// numbers is many of everything at once, again and again.
func numbers(ctx context.Context, f *trouble) {
	l := f.load
	s, again, err := f.open("proof")
	if err != nil {
		l.broke("numbers: %v", err)
		return
	}
	defer s.Close()
	other, err := again()
	if err != nil {
		l.broke("numbers: %v", err)
		return
	}
	defer other.Close()
	for round := 0; ctx.Err() == nil && round < 20; round++ {
		manyWaiters(l, f, s, other, round)
		manyWriters(l, s, other, round)
		manyDeaths(l, f, s, other, round)
		sleep(ctx, time.Second)
	}
}

// manyWaiters has 200 waiters take turns at a lock.
func manyWaiters(l *load, f *trouble, s, other state.Store, round int) {
	const waiters = 200
	name := fmt.Sprintf("many.%d", round)
	limit := time.Minute
	if f.distance != nil {
		limit *= 3 // each turn is some round trips
	}
	before := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	var holders, got atomic.Int64
	var wg sync.WaitGroup
	for i := range waiters {
		wg.Go(func() {
			from := []state.Store{s, other}[i%2]
			err := state.WithLock(ctx, from, name, 2*time.Second, func(context.Context, uint64) error {
				if holders.Add(1) != 1 {
					l.broke("lock %s has two holders", name)
				}
				time.Sleep(time.Millisecond)
				holders.Add(-1)
				return nil
			})
			if err == nil {
				got.Add(1)
			} else {
				l.broke("lock %s among %d waiters: %v", name, waiters, err)
			}
		})
	}
	wg.Wait()
	f.note("%d of %d waiters for one lock got it within %v", got.Load(), waiters, time.Since(before).Round(time.Millisecond))
}

// manyWriters has 64 clients write one key.
func manyWriters(l *load, s, other state.Store, round int) {
	key := fmt.Sprintf("%smany.%d", noise, round)
	var wg sync.WaitGroup
	var counted atomic.Int64
	for i := range 64 {
		wg.Go(func() {
			from := []state.Store{s, other}[i%2]
			for n := range 5 {
				began := time.Now()
				if err := from.Put(key, fmt.Appendf(nil, "%d.%d", i, n), 0); err != nil {
					l.broke("one of 64 writers of %s: %v after %v", key, err, time.Since(began))
				}
			}
			if i >= 16 {
				return
			}
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			_, err := state.Modify(ctx, from, key+".counter", func(old *state.KeyValue) ([]byte, time.Duration, error) {
				n := 0
				if old != nil {
					_ = json.Unmarshal(old.Value, &n)
				}
				value, err := json.Marshal(n + 1)
				return value, 0, err
			})
			switch {
			case err == nil:
				counted.Add(1)
			case !errors.Is(err, state.ErrOutcomeUnknown):
				l.broke("one of 16 who modify %s: %v", key, err)
			}
		})
	}
	wg.Wait()
	if value, err := s.Get(key + ".counter"); err == nil && string(value) != fmt.Sprint(counted.Load()) {
		l.broke("%d of 16 have counted, and the counter is %s", counted.Load(), value)
	}
}

// manyDeaths has 1,000 keys expire at once, before 100 watches.
func manyDeaths(l *load, f *trouble, s, other state.Store, round int) {
	const keys, watches = 1000, 100
	prefix := fmt.Sprintf("%sdead.%d.", noise, round)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ends := make(chan time.Duration, watches) // when each of them saw the last death
	deadline := time.Now().Add(4 * time.Second)
	for range watches {
		events, err := s.WithContext(ctx).Watch(prefix + "*")
		if err != nil {
			l.broke("one of %d watches: %v", watches, err)
			return
		}
		go func() {
			dead := map[string]bool{}
			for ev := range events {
				if ev.Operation == state.OpDelete {
					late := time.Since(deadline)
					if late < 0 {
						l.broke("%s is reported dead %v too early", ev.Key, -late)
					}
					if dead[ev.Key] {
						l.broke("%s is reported dead twice", ev.Key)
					}
					dead[ev.Key] = true
					if len(dead) == keys {
						ends <- late
						return
					}
				}
			}
			l.broke("one of %d watches missed %d of %d deaths", watches, keys-len(dead), keys)
			ends <- 0
		}()
	}
	var writers sync.WaitGroup
	for i := range 16 {
		writers.Go(func() {
			for n := i; n < keys; n += 16 {
				if err := other.Put(fmt.Sprint(prefix, n), []byte("x"), max(time.Until(deadline), 1)); err != nil {
					l.broke("put: %v", err)
				}
			}
		})
	}
	writers.Wait()
	written := time.Now()
	time.AfterFunc(max(time.Until(deadline), 0)+20*time.Second, cancel)
	var late time.Duration
	for range watches {
		late = max(late, <-ends)
	}
	if allowed := max(written.Sub(deadline), 0) + 2*expiryWithin + l.slack(); late > allowed {
		l.broke("the last of %d deaths was reported %v after the deadline", keys, late)
	}
	f.note("%d deaths at once, before %d watches: the last one was reported after %v", keys, watches, late.Round(time.Millisecond))
}

// The faults of an operator change the data bucket's settings.

// operate makes one change after another.
func operate(changes ...func(*trouble) error) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		if err := changes[rand.IntN(len(changes))](f); err != nil {
			f.tell("not done: %v", err)
			return
		}
		f.count()
		sleep(ctx, between(200*time.Millisecond, 2*time.Second))
		f.recover(ctx, f.streams...)
	}
}

// api makes a request of the JetStream API.
func (f *trouble) api(subject string, req, answer any) error {
	var data []byte
	if req != nil {
		var err error
		if data, err = json.Marshal(req); err != nil {
			return err
		}
	}
	msg, err := f.admin.Request("$JS.API."+subject, data, 5*time.Second)
	if err != nil {
		return err
	}
	var failed struct {
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &failed); err != nil {
		return err
	}
	if failed.Error != nil {
		return errors.New(failed.Error.Description)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(msg.Data, answer)
}

// settings returns those of the data bucket.
func (f *trouble) settings() (map[string]any, error) {
	var info struct {
		Config map[string]any `json:"config"`
	}
	err := f.api("STREAM.INFO.KV_proof", nil, &info)
	return info.Config, err
}

// reconfigure changes one setting of the data bucket.
func (f *trouble) reconfigure(field string, value any) error {
	config, err := f.settings()
	if err != nil {
		return err
	}
	f.tell("%s becomes %v", field, value)
	config[field] = value
	return f.api("STREAM.UPDATE.KV_proof", config, nil)
}

// replicas makes three of one, or one of three.
func replicas(f *trouble) error {
	config, err := f.settings()
	if err != nil {
		return err
	}
	f.load.cut.Store(true)
	if config["num_replicas"] == 1.0 {
		return f.reconfigure("num_replicas", 3)
	}
	return f.reconfigure("num_replicas", 1)
}

// raiseHistory never lowers it: that can make the server lose values, see
// TestLoweredHistory.
func raiseHistory(f *trouble) error {
	config, err := f.settings()
	if err != nil {
		return err
	}
	now, _ := config["max_msgs_per_subject"].(float64)
	return f.reconfigure("max_msgs_per_subject", min(int(now)+1+rand.IntN(10), 64))
}

func setMaxAge(f *trouble) error {
	return f.reconfigure("max_age", (time.Hour + rand.N(time.Hour)).Nanoseconds())
}
func stepBack(f *trouble) error { return f.reconfigure("max_age", 0) }

func mirror(f *trouble) error {
	name := fmt.Sprintf("MIRROR%d", rand.IntN(2))
	f.tell("mirror %s", name)
	if rand.IntN(2) == 0 {
		return f.api("STREAM.DELETE."+name, nil, nil)
	}
	return f.api("STREAM.CREATE."+name, map[string]any{
		"name": name, "storage": "memory", "num_replicas": 1, "allow_direct": true, "mirror_direct": true,
		"mirror": map[string]any{"name": "KV_proof"},
	}, nil)
}

// TestOperatorsDestroy: what an operator purges or deletes is reported as
// deleted, or ends the watch, and the store works again by itself.
func TestOperatorsDestroy(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, false)
	l := newLoad(nil)
	f := &trouble{cluster: c, load: l}
	for name, destroy := range map[string]func(bucket string) error{
		"purge-stream": func(bucket string) error { return f.api("STREAM.PURGE.KV_"+bucket, nil, nil) },
		"purge-subject": func(bucket string) error {
			return f.api("STREAM.PURGE.KV_"+bucket, map[string]string{"filter": "$KV." + bucket + ".agent.1"}, nil)
		},
		"delete-bucket": func(bucket string) error { return f.api("STREAM.DELETE.KV_"+bucket, nil, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, again, err := c.open(name)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for i := range 3 {
				if err := s.Put(fmt.Sprintf("agent.%d", i), []byte("alive"), 0); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			events, err := s.WithContext(ctx).Watch("agent.*")
			if err != nil {
				t.Fatal(err)
			}
			current, changes, err := state.Follow(ctx, s, "agent.*")
			if err != nil || len(current) != 3 {
				t.Fatal(len(current), err)
			}
			if err := s.Put("agent.0", []byte("again"), 0); err != nil {
				t.Fatal(err)
			}
			if ev := <-events; ev.Operation != state.OpPut || ev.Key != "agent.0" {
				t.Fatal(ev)
			}
			if ev := <-changes; ev.Operation != state.OpPut || ev.Key != "agent.0" {
				t.Fatal(ev)
			}
			if err := destroy(name); err != nil {
				t.Fatal(err)
			}
			if name == "delete-bucket" {
				for try := range 3 {
					if _, err := s.Get("agent.1"); err == nil || !strings.Contains(err.Error(), "bucket not found") {
						t.Errorf("get %d of a bucket that is gone: %v", try, err)
					}
				}
				remade, err := again()
				if err != nil {
					t.Fatal(err)
				}
				defer remade.Close()
			}
			gone := map[string]bool{}
			for ev := range changes { // nobody's death is missed
				if ev.Operation == state.OpDelete {
					gone[ev.Key] = true
				}
				if gone["agent.1"] && (name == "purge-subject" || len(gone) == 3) {
					break
				}
			}
			if !gone["agent.1"] {
				t.Errorf("Follow has reported only %v as gone", gone)
			}
			for ev := range events { // or it ends
				if ev.Operation == state.OpDelete && ev.Key == "agent.1" {
					break
				}
			}
			if ctx.Err() != nil {
				t.Error("the watch neither reports the deletions nor ends")
			}
			if err := eventually(10*time.Second, func() error { return s.Put("agent.1", []byte("back"), 0) }); err != nil {
				t.Errorf("the store does not come back: %v", err)
			}
			if value, err := s.Get("agent.1"); err != nil || string(value) != "back" {
				t.Errorf("it is %q, %v", value, err)
			}
			for ev := range changes {
				if ev.Operation == state.OpPut && string(ev.Value) == "back" {
					break
				}
			}
			if ctx.Err() != nil {
				t.Error("Follow does not go on")
			}
		})
	}
}

// TestOperatorsDestroyLocks: when the bucket of locks is deleted, its locks are
// lost, which their holders find out, and new ones have higher tokens.
func TestOperatorsDestroyLocks(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, false)
	s, _, err := c.open("proof")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	last := uint64(0)
	for round := range 5 {
		lock, err := s.Lock("l", time.Minute)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		token := lock.(state.Fenced).Token()
		if token <= last {
			t.Errorf("token %d after %d", token, last)
		}
		last = token
		if _, err := c.admin.Request("$JS.API.STREAM.DELETE.KV_proof-locks", nil, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := lock.Refresh(); err != state.ErrLockExpired { //nolint:errorlint // bare
			t.Errorf("refresh of what was deleted: %v", err)
		}
	}
}

// TestDraining: on a connection that drains every call ends, and says so.
func TestDraining(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, false)
	cl, err := c.connect()
	if err != nil {
		t.Fatal(err)
	}
	s, err := state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: "proof"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	events, err := s.Watch("*")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Put("k", nil, 0); err != nil {
		t.Fatal(err)
	}
	<-events
	lock, err := s.Lock("l", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := state.Acquire(context.Background(), s, "l", time.Minute)
		waited <- err
	}()
	if err := cl.nc.Drain(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := s.Put("k", nil, 0); err == nil {
		t.Log("a Put was in time") // the drain is not over
	}
	for range events { //nolint:revive // until it is closed
	}
	if err := <-waited; !errors.Is(err, nats.ErrConnectionClosed) && !errors.Is(err, nats.ErrConnectionDraining) {
		t.Errorf("acquire: %v", err)
	}
	if took := time.Since(began); took > 12*time.Second {
		t.Errorf("it took %v", took)
	}
	waitFor(t, cl.nc.IsClosed)
	for name, call := range map[string]func() error{
		"put":     func() error { return s.Put("k", nil, 0) },
		"get":     func() error { _, err := s.Get("k"); return err },
		"keys":    func() error { _, err := s.Keys("*"); return err },
		"lock":    func() error { _, err := s.Lock("other", time.Minute); return err },
		"refresh": lock.Refresh,
		"unlock":  lock.Unlock,
	} {
		if err := call(); !errors.Is(err, nats.ErrConnectionClosed) {
			t.Errorf("%s on a closed connection: %v", name, err)
		}
	}
	if _, err := s.Watch("*"); err != state.ErrWatchClosed { //nolint:errorlint // bare
		t.Errorf("watch on a closed connection: %v", err)
	}
}

// TestReadsAsOperatorsChange: a read sees what another client was just told is
// written, also when a mirror of the bucket answers direct gets, and when the
// bucket was given more replicas two seconds ago.
func TestReadsAsOperatorsChange(t *testing.T) {
	t.Parallel()
	rounds := 500
	if *long > 0 {
		rounds = 10_000
	}
	for name, alter := range map[string]func(*trouble) error{
		"mirror": func(f *trouble) error {
			return f.api("STREAM.CREATE.MIRROR", map[string]any{
				"name": "MIRROR", "storage": "memory", "num_replicas": 1, "allow_direct": true, "mirror_direct": true,
				"mirror": map[string]any{"name": "KV_proof"},
			}, nil)
		},
		"replicas":       func(f *trouble) error { return f.reconfigure("num_replicas", 3) },
		"fewer-replicas": func(f *trouble) error { return f.reconfigure("num_replicas", 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			servers := map[string]int{"mirror": 1, "replicas": 3, "fewer-replicas": 3}[name]
			replicas := map[string]int{"mirror": 1, "replicas": 1, "fewer-replicas": 3}[name]
			c := startCluster(t, servers, false)
			f := &trouble{cluster: c, load: newLoad(nil)}
			var stores []state.Store
			for range 4 {
				cl, err := c.connect()
				if err != nil {
					t.Fatal(err)
				}
				var s *state.NATSStore
				if err := eventually(20*time.Second, func() error {
					s, err = state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: "proof", Replicas: replicas})
					return err
				}); err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				stores = append(stores, s)
			}
			if err := f.reconfigure("description", "as it was"); err != nil {
				t.Fatal(err)
			}
			if err := eventually(20*time.Second, func() error { return alter(f) }); err != nil { // a busy server may seem to be offline
				t.Fatal(err)
			}
			if name != "fewer-replicas" { // what is left over answers for a moment only
				c.recover(t.Context(), "KV_proof")
				time.Sleep(2500 * time.Millisecond) // as promised
			}
			stale, missing := 0, 0
			began := time.Now()
			for i := 0; i < rounds || time.Since(began) < 3*time.Second; i++ {
				key := fmt.Sprint("k", i)
				for n := range 2 {
					value := fmt.Sprint(n)
					if err := stores[0].Put(key, []byte(value), 0); err != nil {
						t.Fatal(err)
					}
					switch got, err := stores[1+i%3].Get(key); {
					case err == state.ErrNotFound: //nolint:errorlint // bare
						missing++
					case err != nil:
						t.Fatal(err)
					case string(got) != value:
						stale++
					}
				}
			}
			if stale+missing > 0 {
				t.Errorf("%d reads are stale and %d find nothing", stale, missing)
			}
		})
	}
}

// TestPutDoesNotStarve: a Put or Delete of a key that is written all the time by
// those who are closer takes at most three requests and never fails.
func TestPutDoesNotStarve(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 1, false)
	near, _, err := c.open("proof")
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	c.distance = func() distance { return distance{rtt: 10 * time.Millisecond} }
	cl, err := c.connect()
	if err != nil {
		t.Fatal(err)
	}
	far, err := state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: "proof"})
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var writers sync.WaitGroup
	defer writers.Wait()
	defer cancel()
	writers.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			_ = near.Put("k", fmt.Append(nil, n), 0)
			sleep(ctx, time.Millisecond)
		}
	})
	before := far.Stats().Requests
	const calls = 20
	for i := range calls {
		if err := far.Put("k", []byte("far"), 0); err != nil {
			t.Fatalf("put %d: %v", i, err)
		}
		if err := far.Delete("k"); err != nil {
			t.Fatalf("delete %d: %v", i, err)
		}
	}
	if requests := far.Stats().Requests - before; requests > 3*2*calls {
		t.Errorf("%d puts and deletes took %d requests", 2*calls, requests)
	}
}
