package state

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// readmeBlocks returns the README's fenced blocks of a language.
func readmeBlocks(t *testing.T, language string) (blocks []string) {
	t.Helper()
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	for _, m := range regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		if m[1] == language {
			blocks = append(blocks, m[2])
		}
	}
	require.NotEmpty(t, blocks)
	return blocks
}

// readmeFragment makes a file of a block that is not one: the body of a
// function whose parameters are what the README's text takes for granted.
const readmeFragment = `package readme

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

var (
	_ = fmt.Println
	_ = errors.Is
	_ = log.Print
	_ = strconv.Itoa
	_ sync.WaitGroup
	_ time.Duration
	_ *nats.Conn
)

func _(ctx context.Context, store state.Store, data []byte,
	resource interface{ Write(token uint64, data []byte) error },
	lead func(context.Context, uint64) error) (err error) {
	{
%s	}
	return err
}
`

// TestReadmeCode vets every Go block of the README, and runs those that are
// tests, in a module of their own that uses this one as the README says.
func TestReadmeCode(t *testing.T) {
	t.Parallel()
	here, err := filepath.Abs(".")
	require.NoError(t, err)
	dir := t.TempDir()
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	run := func(args ...string) string {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		return string(out)
	}

	tests := 0
	for i, code := range readmeBlocks(t, "go") {
		switch {
		case !strings.HasPrefix(code, "package "):
			write(fmt.Sprintf("readme%d.go", i), fmt.Sprintf(readmeFragment, useAll(code)))
		case strings.Contains(code, `"testing"`):
			write(fmt.Sprintf("readme%d_test.go", i), strings.Replace(code, "package agent_test", "package readme_test", 1))
			tests += strings.Count(code, "\nfunc Test")
		default:
			require.Fail(t, "a block of a kind that is not expected", "%s", code)
		}
	}
	require.Positive(t, tests)
	for _, name := range []string{"go.mod", "go.sum"} { // the versions that are known to be at hand
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		write(name, string(text))
	}
	run("mod", "edit", "-module=readme", "-require=example.com/state@v0.0.0", "-replace=example.com/state="+here)

	run("vet", ".")
	out := run("test", "-v", ".")
	assert.Equal(t, tests, strings.Count(out, "--- PASS"), "%s", out)
}

// useAll adds to a fragment a use of each variable that it declares at its top
// level, since Go insists on one.
func useAll(code string) string {
	for _, m := range regexp.MustCompile(`(?m)^(\w+(?:, \w+)*) := `).FindAllStringSubmatch(code, -1) {
		for name := range strings.SplitSeq(m[1], ", ") {
			if name != "_" {
				code += "_ = " + name + "\n"
			}
		}
	}
	return code
}

// TestReadmePermissions runs a store under the permissions of the README: all of
// them are enough, and each is needed.
func TestReadmePermissions(t *testing.T) {
	t.Parallel()
	conf := filepath.Join(t.TempDir(), "server.conf")
	require.NoError(t, os.WriteFile(conf, []byte(readmeBlocks(t, "")[0]), 0o600))
	opts, err := server.ProcessConfigFile(conf)
	require.NoError(t, err)
	require.Len(t, opts.Users, 1)
	listed := opts.Users[0].Permissions

	t.Run("all", func(t *testing.T) {
		assert.Empty(t, refusedUnder(t, listed.Publish.Allow, listed.Subscribe.Allow))
	})
	without := func(list []string, i int) []string { return slices.Delete(slices.Clone(list), i, i+1) }
	for i, subject := range listed.Publish.Allow {
		t.Run("without "+subject, func(t *testing.T) {
			t.Parallel()
			assert.NotEmpty(t, refusedUnder(t, without(listed.Publish.Allow, i), listed.Subscribe.Allow))
		})
	}
	for i, subject := range listed.Subscribe.Allow {
		t.Run("not hearing "+subject, func(t *testing.T) {
			t.Parallel()
			assert.NotEmpty(t, refusedUnder(t, listed.Publish.Allow, without(listed.Subscribe.Allow, i)))
		})
	}
}

// refusedUnder does all that a store can do, as a user with these permissions.
// It returns what the server refused, or stops at the first of it.
func refusedUnder(t *testing.T, publish, subscribe []string) []string {
	srv := startServer(t, func(opts *server.Options) {
		opts.Users = []*server.User{
			{Username: "operator", Password: "secret"},
			{Username: "agent", Password: "secret", Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: publish},
				Subscribe: &server.SubjectPermission{Allow: subscribe},
			}},
		}
	})
	operator := connect(t, srv.ClientURL(), nats.UserInfo("operator", "secret"))
	refused := make(chan string, 100)
	nc := connect(t, srv.ClientURL(), nats.UserInfo("agent", "secret"),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			if errors.Is(err, nats.ErrPermissionViolation) {
				refused <- err.Error()
			}
		}))
	done := make(chan error, 1)
	go func() { done <- useEverything(operator, nc) }()
	var all []string
	select {
	case first := <-refused:
		nc.Close()
		<-done
		return []string{first}
	case err := <-done:
		require.NoError(t, err)
	}
	require.NoError(t, nc.Flush()) // what was refused is told before the answer
	for len(refused) > 0 {
		all = append(all, <-refused)
	}
	return all
}

// useEverything makes each kind of request that a store makes on one replica,
// and on several.
func useEverything(operator, nc *nats.Conn) error {
	cfg := DefaultNATSStoreConfig()
	cfg.Conn = nc
	s, err := NewNATSStore(cfg) // makes the bucket
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Lock("made", time.Minute); err != nil { // makes that of the locks
		return err
	}

	// A bucket that somebody else made, without message TTLs.
	js, err := jetstream.New(operator)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := js.DeleteKeyValue(ctx, cfg.Bucket); err != nil {
		return err
	}
	if _, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: cfg.Bucket}); err != nil {
		return err
	}
	s, err = NewNATSStore(NATSStoreConfig{Conn: nc, Bucket: cfg.Bucket})
	if err != nil {
		return err
	}
	defer s.Close()
	cfg.Conn = operator
	other, err := NewNATSStore(cfg)
	if err != nil {
		return err
	}
	defer other.Close()
	for _, use := range []func(ctx context.Context, s, other *NATSStore) error{
		watchEverything, cacheEverything, readEverything, lockEverything,
	} {
		if err := use(ctx, s, other); err != nil {
			return err
		}
	}
	stream, err := js.Stream(ctx, "KV_"+cfg.Bucket)
	if err != nil {
		return err
	}
	return deleteFromFull(ctx, s, js, stream)
}

func watchEverything(ctx context.Context, s, other *NATSStore) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // deletes the consumer
	events, err := s.WithContext(ctx).Watch("config.*")
	if err != nil {
		return err
	}
	next := func(want Operation) error {
		select {
		case ev, ok := <-events:
			if !ok || ev.Operation != want {
				return fmt.Errorf("got %v instead of a %v", ev, want)
			}
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for _, by := range []Store{other, s} {
		if err := by.Put("config.pace", []byte("brisk"), time.Hour); err != nil {
			return err
		}
		if err := next(OpPut); err != nil {
			return err
		}
	}
	if err := s.Put("config.brief", nil, 300*time.Millisecond); err != nil {
		return err
	}
	if err := next(OpPut); err != nil {
		return err
	}
	return next(OpDelete)
}

func cacheEverything(ctx context.Context, s, other *NATSStore) error {
	c, err := NewCache(ctx, s, "config.*")
	if err != nil {
		return err
	}
	defer c.Close()
	revision, err := other.Update("config.cached", nil, 0, 0)
	if err != nil {
		return err
	}
	if err := c.Wait(ctx, revision); err != nil {
		return err
	}
	// Only the server knows that nothing has changed since.
	for began := time.Now(); !c.AsOf().After(began); time.Sleep(10 * time.Millisecond) {
		if ctx.Err() != nil {
			return fmt.Errorf("the cache is as of %v", c.AsOf())
		}
	}
	return nil
}

func readEverything(ctx context.Context, s, _ *NATSStore) error {
	if value, err := s.Get("config.pace"); err != nil || string(value) != "brisk" {
		return fmt.Errorf("got %q, %w", value, err)
	}
	if _, err := s.data.leaderLast(newBudget(ctx), "config.pace"); err != nil { // Get, on several replicas
		return err
	}
	for _, pattern := range []string{"*", "config.*"} {
		if keys, err := s.Keys(pattern); err != nil || len(keys) != 2 {
			return fmt.Errorf("keys %q, %w", keys, err)
		}
	}
	return s.Delete("config.cached")
}

func lockEverything(ctx context.Context, s, other *NATSStore) error {
	taken, err := other.Lock("deploy", time.Minute)
	if err != nil {
		return err
	}
	if _, err := s.Lock("deploy", time.Minute); err != ErrLockHeld {
		return fmt.Errorf("locked twice: %w", err)
	}
	if _, err := s.LockHolder("deploy"); err != nil {
		return err
	}
	unlocked := make(chan error, 1)
	time.AfterFunc(50*time.Millisecond, func() { unlocked <- taken.Unlock() })
	err = WithLock(ctx, s, "deploy", time.Minute, func(context.Context, uint64) error { return <-unlocked })
	if err != nil {
		return err
	}
	lock, err := s.Lock("deploy", time.Minute)
	if err != nil {
		return err
	}
	if err := lock.Refresh(); err != nil {
		return err
	}
	return lock.Unlock()
}

// deleteFromFull deletes a key from a bucket that has no room for a marker, since
// what another client wrote is smaller than any.
func deleteFromFull(ctx context.Context, s *NATSStore, js jetstream.JetStream, stream jetstream.Stream) error {
	if _, err := js.Publish(ctx, "$KV.agent-state.small", nil); err != nil {
		return err
	}
	info, err := stream.Info(ctx)
	if err != nil {
		return err
	}
	full := info.Config
	full.MaxBytes = int64(info.State.Bytes)
	if _, err := js.UpdateStream(ctx, full); err != nil {
		return err
	}
	if err := s.Delete("small"); err != nil {
		return err
	}
	if _, err := s.Get("small"); err != ErrNotFound {
		return fmt.Errorf("it was not deleted: %w", err)
	}
	return nil
}

// TestDocumentLinks follows the links of the documents to files and headings of
// this repository.
func TestDocumentLinks(t *testing.T) {
	documents, err := filepath.Glob("*.md")
	require.NoError(t, err)
	require.NotEmpty(t, documents)
	for _, document := range documents {
		text, err := os.ReadFile(document)
		require.NoError(t, err)
		headings := make(map[string]bool)
		for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(text), -1) {
			name := regexp.MustCompile(`[^\w -]`).ReplaceAllString(strings.ToLower(m[1]), "")
			headings["#"+strings.ReplaceAll(name, " ", "-")] = true
		}
		for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(string(text), -1) {
			switch target := m[1]; {
			case strings.HasPrefix(target, "https://"):
			case strings.HasPrefix(target, "#"):
				assert.True(t, headings[target], "%s: no heading for %s", document, target)
			default:
				_, err := os.Stat(target)
				assert.NoError(t, err, "%s: %s", document, target)
			}
		}
	}
}

// TestReadmeCosts counts what the README's table of costs says and
// TestNATSStoreRequests does not count.
func TestReadmeCosts(t *testing.T) {
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: newBucketName()})
	rival := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: s.data.name})
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	sent := func() uint64 { return nc.Stats().OutMsgs }
	costs := func(name string, want uint64, op func() error) {
		t.Helper()
		_, err := s.data.info(newBudget(ctx)) // or it may look at the settings meanwhile
		require.NoError(t, err)
		before := sent()
		require.NoError(t, op(), name)
		require.Equal(t, want, sent()-before, "requests of: %s", name)
	}
	update := func(s Store, key string) uint64 {
		t.Helper()
		revision, err := s.Update(key, nil, 0, 0)
		require.NoError(t, err)
		return revision
	}

	revision := update(rival, "a")
	costs("Update of a revision that the store has not seen", 2, func() error {
		_, err := s.Update("a", nil, 0, revision)
		return err
	})
	revision = update(rival, "b")
	costs("DeleteRevision of one that it has not seen", 2, func() error { return s.DeleteRevision("b", revision) })
	revision = update(s, "c")
	costs("DeleteRevision", 1, func() error { return s.DeleteRevision("c", revision) })
	update(s, "d")
	require.NoError(t, rival.Put("d", nil, 0))
	costs("Delete of a key that others write meanwhile", 3, func() error { return s.Delete("d") })
	update(rival, "e")
	require.NoError(t, rival.Delete("e"))
	costs("Update that creates a key that another client has deleted", 3, func() error {
		_, err := s.Update("e", nil, 0, 0)
		return err
	})

	for name, c := range map[string]struct {
		writer *NATSStore
		most   uint64
		call   func(key string) error
		want   error
	}{
		"Put":    {s, 3, func(key string) error { return s.Put(key, nil, 0) }, nil},
		"Update": {s, 3, func(key string) error { _, err := s.Update(key, nil, 0, 0); return err }, nil},
		"Get":    {rival, 4, func(key string) error { _, err := s.Get(key); return err }, ErrNotFound},
		"Keys":   {rival, 4, func(key string) error { _, err := s.Keys(key); return err }, nil},
		"Delete": {rival, 4, func(key string) error { return s.Delete(key) }, nil},
	} {
		key := "expired." + name
		require.NoError(t, c.writer.Put(key, nil, 50*time.Millisecond))
		eventually(t, func() bool { _, err := rival.Get(key); return err == ErrNotFound }, "an expiry")
		before := sent()
		require.Equal(t, c.want, c.call(key))
		require.LessOrEqual(t, sent()-before, c.most, "requests of: %s of a value that has just expired", name)
	}

	for i := range 100 {
		require.NoError(t, rival.Put(fmt.Sprintf("many.%d", i), nil, 0))
	}
	costs("Keys", 4, func() error { _, err := s.Keys("*"); return err })
	costs("Entries", 4, func() error { _, err := s.Entries("*"); return err })

	lock := lockOf(t, rival, "lock")
	costs("the first LockHolder", 2, func() error { _, err := s.LockHolder("lock"); return err })
	costs("LockHolder", 1, func() error { _, err := s.LockHolder("lock"); return err })
	require.NoError(t, lock.Unlock())
	costs("Lock of a lock that another client has released", 3, func() error { _, err := s.Lock("lock", time.Hour); return err })

	lockOf(t, rival, "busy")
	costs("waiting for a lock, of two waiters of whom the first gives up", 2, func() error {
		before := sent()
		wait := func() (giveUp func()) {
			ctx, cancel := context.WithCancel(ctx)
			ended := make(chan error, 1)
			go func() { _, err := Acquire(ctx, s, "busy", time.Hour); ended <- err }()
			return func() {
				cancel()
				if err := <-ended; !errors.Is(err, context.Canceled) { // it gave up before the server answered
					refuses(t, ErrLockHeld, err)
				}
			}
		}
		first := wait()
		eventually(t, func() bool { return sent()-before == 1 }, "the first one looks")
		second := wait()
		eventually(t, func() bool {
			s.locks.waits.mu.Lock()
			defer s.locks.waits.mu.Unlock()
			return len(s.locks.waits.queue["busy"].waiters) == 2
		}, "the second one waits")
		first()
		eventually(t, func() bool { return sent()-before == 2 }, "the second one looks")
		second()
		return nil
	})

	count := func() error {
		_, err := Modify(ctx, s, "counter", func(*KeyValue) ([]byte, time.Duration, error) { return nil, 0, nil })
		return err
	}
	costs("Modify of a key that does not exist", 3, count)
	costs("Modify", 2, count)
	costs("KeepAlive of a key that does not exist, and the deletion at the end", 4, func() error {
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		return KeepAlive(ctx, meddler{Store: s, updated: stop}, "alive", time.Hour, func() []byte { return nil })
	})

	before := sent()
	_, err := s.Watch("many.*")
	require.NoError(t, err)
	listedFeed(t, s, pattern{"many.", true})
	require.LessOrEqual(t, sent()-before, uint64(2+1+5), "requests of: Watch, the first pull, and a listing in the background")
	costs("Watch of the same pattern", 1, func() error { _, err := s.Watch("many.*"); return err })

	// On a server where nothing ends meanwhile.
	srv = startServer(t, nil)
	calm := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: "calm"})
	mustWatch(t, calm, "many.*")
	listedFeed(t, calm, pattern{"many.", true})
	cache, err := NewCache(ctx, calm, "cached.*")
	require.NoError(t, err)
	defer cache.Close()
	requests := countRequests(t, srv.ClientURL(), calm.data.name)
	began := time.Now()
	for cached := cache.AsOf(); cache.AsOf().Before(cached.Add(4 * time.Second)); time.Sleep(10 * time.Millisecond) {
	}
	seconds := time.Since(began).Seconds()
	// Of the two watches each asks for the state of the stream every two seconds.
	require.LessOrEqual(t, float64(requests.api.Load()), 3*seconds+3, "requests of a cache in %v s", seconds)
}
