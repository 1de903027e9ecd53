package state

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// What an operator is told: the log and the counters.

// A logbook records what is logged.
type logbook struct {
	mu      sync.Mutex // guards entries
	entries []logged
}

type logged struct {
	level   slog.Level
	message string
	attrs   map[string]slog.Value
}

func (b *logbook) Enabled(context.Context, slog.Level) bool { return true }
func (b *logbook) WithAttrs([]slog.Attr) slog.Handler       { return b }
func (b *logbook) WithGroup(string) slog.Handler            { return b }

func (b *logbook) Handle(_ context.Context, r slog.Record) error {
	e := logged{r.Level, strings.TrimPrefix(r.Message, "state: "), map[string]slog.Value{}}
	r.Attrs(func(a slog.Attr) bool { e.attrs[a.Key] = a.Value.Resolve(); return true })
	b.mu.Lock()
	defer b.mu.Unlock()
	b.entries = append(b.entries, e)
	return nil
}

func (b *logbook) find(message string) []logged {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []logged
	for _, e := range b.entries {
		if e.message == message {
			found = append(found, e)
		}
	}
	return found
}

// one returns the entry with a message, which must be logged once.
func (b *logbook) one(t *testing.T, message string) logged {
	t.Helper()
	eventually(t, func() bool { return len(b.find(message)) > 0 }, "log: "+message)
	found := b.find(message)
	require.Len(t, found, 1, message)
	return found[0]
}

func (b *logbook) all() []logged {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]logged(nil), b.entries...)
}

func openLogged(t *testing.T, nc *nats.Conn, bucket string) (*NATSStore, *logbook) {
	t.Helper()
	book := &logbook{}
	return openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket, Logger: slog.New(book)}), book
}

// TestLogNothingPerRequest: what goes well is not logged.
func TestLogNothingPerRequest(t *testing.T) {
	t.Parallel()
	s, book := openLogged(t, connect(t, startServer(t, nil).ClientURL()), "b")
	f := mustFollow(t, t.Context(), s, "k.*")
	for i := range 50 {
		key := fmt.Sprintf("k.%d", i)
		revision, err := s.Update(key, nil, time.Minute, 0)
		require.NoError(t, err)
		_, err = s.Update(key, nil, 0, 0)
		refuses(t, ErrConflict, err)
		require.NoError(t, s.Put(key, nil, time.Hour))
		_, err = s.Get(key)
		require.NoError(t, err)
		refuses(t, ErrConflict, s.DeleteRevision(key, revision))
		require.NoError(t, s.Delete(key))
	}
	mustEntries(t, s, "*")
	l := mustLock(t, s, "l", time.Minute)
	require.NoError(t, l.Refresh())
	require.NoError(t, l.Unlock())
	f.agrees(t, s, "k.*")
	require.NoError(t, s.Close())
	// A machine that stops for a second is slow to answer.
	assert.Empty(t, slices.DeleteFunc(book.all(), func(e logged) bool {
		return strings.HasSuffix(e.message, "a request is not answered")
	}))
}

// TestLogOfAWatch: a watch is cut off, is back, and ends.
func TestLogOfAWatch(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	nc, p := connectAt(t, srv.ClientURL(), distance{})
	s, book := openLogged(t, nc, "b")
	events := mustWatch(t, s, "k.*")
	mustWatch(t, s, "k.*")
	p.refuse(true)
	p.cut()
	cut := book.one(t, "a watch was cut off")
	assert.Equal(t, slog.LevelWarn, cut.level)
	assert.Equal(t, "b", cut.attrs["bucket"].String())
	assert.Equal(t, "k.*", cut.attrs["pattern"].String())
	assert.NotEmpty(t, cut.attrs["reason"].String())
	time.Sleep(500 * time.Millisecond)
	p.refuse(false)
	back := book.one(t, "a watch is back")
	assert.Equal(t, slog.LevelInfo, back.level)
	assert.Equal(t, "k.*", back.attrs["pattern"].String())
	assert.GreaterOrEqual(t, back.attrs["after"].Duration(), 400*time.Millisecond)
	assert.Less(t, back.attrs["after"].Duration(), 15*time.Second)
	assert.EqualValues(t, 1, s.Stats().WatchCuts)

	require.NoError(t, newJetStream(t, connect(t, srv.ClientURL())).DeleteKeyValue(context.Background(), "b"))
	ended(t, events)
	end := book.one(t, "a watch ends")
	assert.Equal(t, slog.LevelWarn, end.level)
	assert.Equal(t, "k.*", end.attrs["pattern"].String())
	assert.NotEmpty(t, end.attrs["reason"].String())

	// One that never begins does not end either.
	_, err := s.Watch("k.*")
	refuses(t, ErrWatchClosed, err)
	assert.Len(t, book.find("a watch ends"), 1)
}

func TestLogOfALostLease(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s, book := openLogged(t, nc, "b")
	l := mustLock(t, s, "l", time.Minute)
	kv, err := newJetStream(t, nc).KeyValue(context.Background(), "b-locks")
	require.NoError(t, err)
	require.NoError(t, kv.Delete(context.Background(), "l"))
	refuses(t, ErrLockExpired, l.Refresh())
	lost := book.one(t, "a lease was lost")
	assert.Equal(t, "l", lost.attrs["lock"].String())
	assert.Equal(t, l.(Fenced).Token(), lost.attrs["token"].Uint64())
}

func TestLogOfChangedSettings(t *testing.T) {
	t.Parallel()
	nc := connect(t, startServer(t, nil).ClientURL())
	s, book := openLogged(t, nc, "b")
	mustWatch(t, s, "*") // it looks at the settings now and then
	listedFeed(t, s, pattern{wild: true})
	alterStream(t, newJetStream(t, nc), "KV_b", func(cfg *jetstream.StreamConfig) { cfg.MaxAge = time.Hour })
	changed := book.one(t, "settings of the bucket changed")
	assert.Equal(t, slog.LevelInfo, changed.level)
	assert.Equal(t, time.Hour, changed.attrs["max_age"].Duration())
}

// stalled returns a store on a link on which nothing passes any more.
func stalled(t *testing.T) (*NATSStore, *logbook, *proxy) {
	t.Helper()
	nc, p := connectAt(t, startServer(t, nil).ClientURL(), distance{})
	s, book := openLogged(t, nc, "b")
	require.NoError(t, s.Put("k", []byte("v"), 0))
	p.stall()
	return s, book, p
}

// TestLogOfASlowRequest: a request that takes longer than a second is logged
// once, and a write of unknown outcome, too.
func TestLogOfASlowRequest(t *testing.T) {
	t.Parallel()
	s, book, _ := stalled(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4500*time.Millisecond)
	defer cancel()
	err := s.WithContext(ctx).Put("k", nil, 0)
	require.ErrorIs(t, err, ErrOutcomeUnknown)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	slow := book.one(t, "a request is not answered")
	assert.Equal(t, "$KV.b.k", slow.attrs["subject"].String())
	assert.GreaterOrEqual(t, slow.attrs["after"].Duration(), time.Second)
	unknown := book.one(t, "the outcome of a write is unknown")
	assert.Equal(t, "k", unknown.attrs["key"].String())
	assert.Equal(t, "put", unknown.attrs["operation"].String())
	assert.EqualValues(t, 1, s.Stats().UnknownOutcomes)
}

// dialling makes a stalled link one that was cut, too: the client library connects
// again, waits for the server's greeting, and lets nobody else in meanwhile.
func dialling(t *testing.T, s *NATSStore, p *proxy) {
	t.Helper()
	p.cut()
	eventually(t, func() bool { return !s.data.up() }, "the connection is lost")
}

// TestContextOnAStalledLink: every call ends within milliseconds of its context and
// starts no goroutine, both while the connection is up and while it is down.
func TestContextOnAStalledLink(t *testing.T) {
	t.Parallel()
	t.Run("up", func(t *testing.T) { contextOnAStalledLink(t, true) })
	t.Run("dialling", func(t *testing.T) { contextOnAStalledLink(t, false) })
}

func contextOnAStalledLink(t *testing.T, up bool) {
	t.Helper()
	s, _, p := stalled(t)
	if !up {
		dialling(t, s, p)
	}
	// A busy machine is late now and then; a dial takes two seconds.
	late := map[bool]time.Duration{true: 250 * time.Millisecond, false: 1500 * time.Millisecond}[up]
	revision := uint64(1)
	type call struct {
		writes bool
		f      func(s Store) error
	}
	calls := map[string]call{
		"get":     {false, func(s Store) error { _, err := s.Get("k"); return err }},
		"missing": {false, func(s Store) error { _, err := s.GetKeyValue("missing"); return err }},
		"keys":    {false, func(s Store) error { _, err := s.Keys("*"); return err }},
		"entries": {false, func(s Store) error { _, err := s.Entries("k.*"); return err }},
		"watch":   {false, func(s Store) error { _, err := s.Watch("w.*"); return err }},
		"holder":  {false, func(s Store) error { _, err := s.LockHolder("l"); return err }},
		"lock":    {false, func(s Store) error { _, err := s.Lock("l", time.Minute); return err }},
		"put":     {true, func(s Store) error { return s.Put("new", nil, 0) }},
		"update":  {true, func(s Store) error { _, err := s.Update("k", nil, 0, revision); return err }},
		"delete":  {true, func(s Store) error { return s.DeleteRevision("k", revision) }},
	}
	for name, c := range calls {
		took := soonest(3, late, func(int) time.Duration {
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			before := s.Stats().Requests
			go func() { done <- c.f(s.WithContext(ctx)) }()
			if up {
				eventually(t, func() bool { return s.Stats().Requests > before }, "a request")
			}
			time.Sleep(50 * time.Millisecond)
			cancelled := time.Now()
			cancel()
			err := <-done
			took := time.Since(cancelled)
			assert.ErrorIs(t, err, context.Canceled, name)
			assert.Equal(t, up && c.writes, err != nil && strings.Contains(err.Error(), ErrOutcomeUnknown.Error()), "%s: %v", name, err)
			return took
		})
		assert.Less(t, took, late, name)
	}
	for name, f := range map[string]func(ctx context.Context) error{
		"follow":  func(ctx context.Context) error { _, _, err := Follow(ctx, s, "f.*"); return err },
		"cache":   func(ctx context.Context) error { _, err := NewCache(ctx, s, "c.*"); return err },
		"acquire": func(ctx context.Context) error { _, err := Acquire(ctx, s, "l", time.Minute); return err },
	} {
		took := soonest(3, 50*time.Millisecond+late, func(int) time.Duration {
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			began := time.Now()
			assert.ErrorIs(t, f(ctx), context.DeadlineExceeded, name)
			return time.Since(began)
		})
		assert.Less(t, took, 50*time.Millisecond+late, name)
	}

	// A hundred calls are a hundred goroutines: their callers'. Other tests start and
	// end some at times.
	fewest := math.MaxInt
	for round := 0; round < 50 && fewest >= 150; round++ {
		before := runtime.NumGoroutine()
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { _, err := s.WithContext(ctx).Get("k"); assert.ErrorIs(t, err, context.Canceled) })
		}
		time.Sleep(100 * time.Millisecond)
		meanwhile := runtime.NumGoroutine() - before
		cancel()
		wg.Wait()
		if runtime.NumGoroutine() >= before-20 {
			fewest = min(fewest, meanwhile)
		}
	}
	assert.Less(t, fewest, 150)
	p.resume()
	eventually(t, func() bool { _, err := s.Get("k"); return err == nil || err == ErrNotFound }, "the link is back") //nolint:errorlint // bare
}

// TestAnswerThatIsHere: an answer that has arrived counts, even if its time is up, its
// context has ended or the connection is lost.
func TestAnswerThatIsHere(t *testing.T) {
	t.Parallel()
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServer(t, nil).ClientURL()), Bucket: "b"})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	over := newEpoch(nats.CONNECTED)
	close(over.over)
	answers := make(chan *nats.Msg, 1)
	for i := range 150 { // select takes either
		budget, e, timer := newBudget(t.Context()), s.data.currentEpoch(), time.NewTimer(time.Hour)
		w := newWaiter(s.data.requester, budget, e, &nats.Msg{Subject: "s"}, once, timer)
		switch i % 3 {
		case 0:
			budget.begun = time.Now().Add(-opLimit)
			timer.Reset(0)
		case 1:
			budget.ctx = ended
		case 2:
			w.epoch = over
		}
		answers <- &nats.Msg{}
		_, err := await(&w, answers)
		require.NoError(t, err)
	}
}

// TestCloseOnAStalledLink: Close ends what is under way promptly.
func TestCloseOnAStalledLink(t *testing.T) {
	t.Parallel()
	const limit = 1500 * time.Millisecond
	for name, up := range map[string]bool{"up": true, "dialling": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			assert.Less(t, soonest(3, limit, func(int) time.Duration { return closeOnAStalledLink(t, up) }), limit)
		})
	}
}

// closeOnAStalledLink returns how long it takes for Close and all calls to end.
func closeOnAStalledLink(t *testing.T, up bool) time.Duration {
	t.Helper()
	s, _, p := stalled(t)
	if !up {
		dialling(t, s, p)
	}
	reads, writes, waits := make(chan error, 30), make(chan error, 10), make(chan error, 1)
	for range 10 {
		go func() { _, err := s.Get("k"); reads <- err }()
		go func() { _, err := s.Entries("*"); reads <- err }()
		go func() { _, err := s.Watch("k.*"); reads <- err }()
		go func() { writes <- s.Put("k", nil, 0) }()
	}
	go func() { _, err := Acquire(context.Background(), s, "l", time.Minute); waits <- err }()
	time.Sleep(200 * time.Millisecond)
	began := time.Now()
	require.NoError(t, s.Close())
	for range cap(reads) {
		refuses(t, ErrClosed, <-reads)
	}
	for range cap(writes) {
		err := <-writes
		assert.ErrorIs(t, err, ErrClosed) // in doubt or not: some only looked at the key
	}
	assert.ErrorIs(t, <-waits, ErrClosed)
	return time.Since(began)
}

// TestStats: the counters are exact where nothing else happens.
func TestStats(t *testing.T) {
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: "b"})
	assert.Equal(t, Stats{}, (&NATSStore{}).Stats())
	start := s.Stats()
	assert.Equal(t, Stats{Requests: start.Requests}, start)
	expect := func(what string, f func(), change func(want *Stats)) {
		t.Helper()
		want, sent := s.Stats(), nc.Stats().OutMsgs
		f()
		assert.Equal(t, nc.Stats().OutMsgs-sent, s.Stats().Requests-want.Requests, what)
		change(&want)
		assert.Equal(t, want, s.Stats(), what)
	}
	expect("puts", func() {
		for i := range 10 {
			require.NoError(t, s.Put(fmt.Sprint(i), nil, 0))
		}
	}, func(w *Stats) { w.Requests += 10; w.CachedKeys += 10 })
	expect("gets", func() { mustGet(t, s, "1"); mustGet(t, s, "2") }, func(w *Stats) { w.Requests += 2 })
	expect("a key that does not exist", func() {
		_, err := s.Get("missing")
		refuses(t, ErrNotFound, err)
	}, func(w *Stats) { w.Requests += 2; w.CachedKeys++ })
	expect("a conflict", func() {
		_, err := s.Update("1", nil, 0, 0)
		refuses(t, ErrConflict, err)
	}, func(w *Stats) { w.Requests += 2; w.Conflicts++ })
	expect("a conflict that is known after a read", func() {
		_, err := s.Update("1", nil, 0, 1_000_000)
		refuses(t, ErrConflict, err)
	}, func(w *Stats) { w.Requests++; w.Conflicts++ })

	ctx, cancel := context.WithCancel(context.Background())
	mustWatch(t, s.WithContext(ctx), "*")
	mustWatch(t, s.WithContext(ctx), "*")
	mustFollow(t, ctx, s, "f.*")
	now := s.Stats
	eventually(t, func() bool { return now().Watches == 3 && now().Consumers == 2 }, "three watches of two patterns")
	c, err := NewCache(ctx, s, "*")
	require.NoError(t, err)
	eventually(t, func() bool { return now().Watches == 4 && now().Consumers == 2 }, "a cache of a pattern that is watched")
	require.NoError(t, c.Close())
	eventually(t, func() bool { return now().Watches == 3 }, "the cache is closed")
	cancel()
	eventually(t, func() bool { return now().Watches == 0 && now().Consumers == 0 }, "all have ended")
	mustWatch(t, s, "*")
	mustFollow(t, context.Background(), s, "*")
	require.NoError(t, s.Close())
	eventually(t, func() bool { return now().Watches == 0 && now().Consumers == 0 }, "the store is closed")
	assert.Zero(t, now().Retries)
	assert.Zero(t, now().WatchCuts)
	assert.Zero(t, now().UnknownOutcomes)
}

// TestLogOfRetries: a request that nobody answers is repeated, and counted. It is
// logged once when that takes longer than a second.
func TestLogOfRetries(t *testing.T) {
	t.Parallel()
	srv := startRestartable(t)
	nc := connect(t, srv.ClientURL())
	s, book := openLogged(t, nc, "b")
	require.NoError(t, s.Put("k", nil, 0))
	stopServer(srv.Server)
	srv.opts.JetStream = false
	srv.start(t)
	eventually(t, func() bool { return nc.Stats().Reconnects == 1 }, "it is connected again")
	before := s.Stats()
	require.ErrorIs(t, s.Put("k", nil, 0), nats.ErrNoResponders)
	assert.Greater(t, s.Stats().Retries, before.Retries+5)
	repeated := book.one(t, "a request is repeated")
	assert.Contains(t, repeated.attrs["subject"].String(), "KV") // the write, or the question whether the bucket is there
	assert.Empty(t, book.find("the outcome of a write is unknown"))
}
