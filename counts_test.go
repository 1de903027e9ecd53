package state

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestNATSStoreRequests counts the requests that an operation makes: what its
// connection, which nothing else uses, has sent.
func TestNATSStoreRequests(t *testing.T) {
	srv := startServer(t, nil)
	nc, other := connect(t, srv.ClientURL()), connect(t, srv.ClientURL())
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: newBucketName()})
	rival := openStore(t, NATSStoreConfig{Conn: other, Bucket: s.data.name})

	requests := func(name string, want uint64, op func() error) {
		t.Helper()
		lookAtSettings(t, s)
		before := nc.Stats().OutMsgs
		require.NoError(t, op(), name)
		require.Equal(t, want, nc.Stats().OutMsgs-before, "requests of: %s", name)
	}
	fails := func(want error, op func() error) func() error {
		return func() error {
			if err := op(); err != want {
				return fmt.Errorf("got %v, want %v", err, want)
			}
			return nil
		}
	}
	put := func(s StateStore, key string, ttl time.Duration) func() error {
		return func() error { return s.Put(key, []byte("value"), ttl) }
	}
	get := func(key string) func() error {
		return func() error { _, err := s.Get(key); return err }
	}

	requests("Put of a new key", 1, put(s, "a", 0))
	requests("Put of an own key", 1, put(s, "a", 0))
	requests("Put with a TTL", 1, put(s, "a", time.Hour))
	requests("Put of a new key with a TTL", 1, put(s, "b", 90*time.Minute+time.Millisecond))
	requests("Put over a TTL", 1, put(s, "b", 0))
	requests("Get", 1, get("a"))
	requests("Get of a missing key, which only the leader can say", 2, fails(ErrNotFound, get("missing")))
	requests("GetKeyValue", 1, func() error { _, err := s.GetKeyValue("a"); return err })

	var revision uint64
	requests("Update of a new key", 1, func() (err error) {
		revision, err = s.Update("c", []byte("1"), 0, 0)
		return err
	})
	requests("Update", 1, func() (err error) {
		revision, err = s.Update("c", []byte("2"), time.Hour, revision)
		return err
	})
	requests("Delete of an own key", 1, func() error { return s.Delete("c") })
	requests("Put of a key that was deleted", 1, put(s, "c", 0))
	requests("Delete of a missing key", 1, func() error { return s.Delete("missing") })

	// What somebody else did has to be read first.
	require.NoError(t, put(rival, "theirs", 0)())
	requests("Put of a key that turns out to be another's", 3, put(s, "theirs", 0))
	require.NoError(t, put(rival, "theirs", 0)())
	requests("Put of a key that others write, too", 2, put(s, "theirs", 0))
	requests("Put of it, when it turns out that they do not any more", 2, put(s, "theirs", 0))
	requests("Put of a key that others do not write any more", 1, put(s, "theirs", 0))
	require.NoError(t, put(rival, "theirs", 0)())
	requests("Get of it", 1, get("theirs"))
	requests("Put of a key that was read", 1, put(s, "theirs", 0))
	require.NoError(t, put(rival, "rest", 0)())
	requests("Delete of a key that is another's", 2, func() error { return s.Delete("rest") })

	for _, key := range []string{"", "a b", "a..b"} {
		requests("an invalid key", 0, fails(ErrInvalidKey, get(key)))
		requests("an invalid key", 0, fails(ErrInvalidKey, put(s, key, 0)))
	}
	requests("a value that is too large", 0, fails(ErrValueTooLarge, func() error {
		return s.Put("a", make([]byte, 2<<20), 0)
	}))
	requests("one key by Keys", 1, func() error { _, err := s.Keys("a"); return err })

	// The first lock makes sure of the bucket of locks.
	lock := lockOf(t, s, "first")
	require.NoError(t, lock.Unlock())
	lock = lockOf(t, rival, "first")
	require.NoError(t, lock.Unlock())

	for _, round := range []string{"a new lock", "a lock that was released"} {
		requests("Lock: "+round, 1, func() (err error) {
			lock, err = s.Lock("lock", time.Hour)
			return err
		})
		requests("Refresh", 1, func() error { return lock.Refresh() })
		requests("Refresh", 1, func() error { return lock.Refresh() })
		requests("Lock of one's own held lock", 2, fails(ErrLockHeld, func() error {
			_, err := s.Lock("lock", time.Hour)
			return err
		}))
		requests("Unlock", 1, func() error { return lock.Unlock() })
		requests("Unlock of what is released", 0, fails(ErrLockNotHeld, lock.Unlock))
	}
	lockOf(t, rival, "lock")
	requests("Lock of a held lock", 2, fails(ErrLockHeld, func() error {
		_, err := s.Lock("lock", time.Hour)
		return err
	}))
}

// TestNATSStoreRequestsToTheLeader is for buckets whose reads are answered by
// the leader, as those of several replicas are.
func TestNATSStoreRequestsToTheLeader(t *testing.T) {
	srv := startServer(t, nil)
	nc := connect(t, srv.ClientURL())
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	name := newBucketName()
	_, err = js.CreateStream(context.Background(), jetstream.StreamConfig{
		Name: "KV_" + name, Subjects: []string{"$KV." + name + ".>"}, MaxMsgsPerSubject: 1,
		AllowRollup: true, AllowMsgTTL: true,
	})
	require.NoError(t, err)
	s := openStore(t, NATSStoreConfig{Conn: nc, Bucket: name})
	require.NoError(t, s.Put("a", []byte("value"), 0))

	before := nc.Stats().OutMsgs
	_, err = s.Get("a")
	require.NoError(t, err)
	_, err = s.Get("missing")
	require.Equal(t, ErrNotFound, err)
	require.EqualValues(t, 2, nc.Stats().OutMsgs-before)
}

func lockOf(t testing.TB, s StateStore, key string) Lock {
	t.Helper()
	lock, err := s.Lock(key, time.Hour)
	require.NoError(t, err)
	return lock
}

// withoutRace skips a test that the race detector's own allocations would spoil.
func withoutRace(t *testing.T) {
	t.Helper()
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range info.Settings {
			if setting.Key == "-race" && setting.Value == "true" {
				t.Skip("allocations are not counted under the race detector, which makes some of its own")
			}
		}
	}
}

func TestMemoryStoreAllocations(t *testing.T) {
	withoutRace(t)
	s := NewMemoryStore()
	defer s.Close()
	value := make([]byte, 128)
	require.NoError(t, s.Put("key", value, 0))
	require.NoError(t, s.Put("lasting", value, time.Hour))
	require.NoError(t, s.Put("locked.key", value, time.Hour))

	allocations := func(name string, want float64, op func()) {
		t.Helper()
		require.Equal(t, want, testing.AllocsPerRun(1000, op), "allocations of: %s", name)
	}
	allocations("Get", 1, func() { _, _ = s.Get("key") })
	allocations("Get with a TTL", 1, func() { _, _ = s.Get("lasting") })
	allocations("Get of a missing key", 0, func() { _, _ = s.Get("missing") })
	allocations("GetKeyValue", 2, func() { _, _ = s.GetKeyValue("key") })
	allocations("Put", 0, func() { _ = s.Put("key", value, 0) })
	allocations("Put with a TTL", 0, func() { _ = s.Put("lasting", value, time.Hour) })
	large := make([]byte, 4096)
	require.NoError(t, s.Put("large", large, 0))
	allocations("Get of a large value", 1, func() { _, _ = s.Get("large") })
	allocations("Put of a large value", 1, func() { _ = s.Put("large", large, 0) })
	allocations("Delete of a missing key", 0, func() { _ = s.Delete("missing") })

	// Watches of other keys cost nothing.
	for i := range 100 {
		_, err := s.Watch(fmt.Sprintf("other.%d.*", i))
		require.NoError(t, err)
	}
	allocations("Put beside watches", 0, func() { _ = s.Put("key", value, 0) })
}

// TestCacheMemory checks what the comment of Cache says an entry takes beyond its
// key and value. The server is another process.
func TestCacheMemory(t *testing.T) {
	withoutRace(t)
	const n, size = 20_000, 128
	heap := func() int64 {
		var stats runtime.MemStats
		runtime.GC()
		runtime.GC() // what the first one has finalized
		runtime.ReadMemStats(&stats)
		return int64(stats.HeapAlloc)
	}
	s := openStore(t, NATSStoreConfig{Conn: connect(t, startServerProcess(t)), Bucket: "b"})
	m := NewMemoryStore()
	defer m.Close()
	for store, most := range map[Store]int64{m: 300, s: 550} {
		keyLen := int64(0)
		for i := range n {
			key := fmt.Sprintf("agents.%06d", i)
			keyLen = int64(len(key))
			require.NoError(t, store.Put(key, make([]byte, size), 0))
		}
		before := heap()
		c := mustCache(t, store, "*")
		each := (heap()-before)/n - keyLen - size
		t.Logf("%T: %d bytes", store, each)
		assert.LessOrEqual(t, each, most, "bytes per entry of a %T", store)
		require.NoError(t, c.Close())
	}
}

// TestNATSStoreAllocations compares with what nats.go's own KV needs for the
// same. The server is another process: only the client's allocations count.
func TestNATSStoreAllocations(t *testing.T) {
	withoutRace(t)
	url := startServerProcess(t)
	s := openStore(t, NATSStoreConfig{Conn: connect(t, url), Bucket: "store"})
	js, err := jetstream.New(connect(t, url))
	require.NoError(t, err)
	ctx := context.Background()
	kv, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "kv", LimitMarkerTTL: time.Hour})
	require.NoError(t, err)

	value := make([]byte, 128)
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	notMore := func(name string, ours, theirs func()) {
		t.Helper()
		const runs = 2000
		// What happens now and then, such as a larger buffer, happens to both.
		mine, its := testing.AllocsPerRun(runs, ours), testing.AllocsPerRun(runs, theirs)
		t.Logf("%s: %.0f allocations, nats.go %.0f", name, mine, its)
		require.LessOrEqual(t, mine, its, name)
	}

	must(s.Put("key", value, 0))
	_, err = kv.Put(ctx, "key", value)
	must(err)
	notMore("Get", func() {
		_, err := s.Get("key")
		must(err)
	}, func() {
		entry, err := kv.Get(ctx, "key")
		must(err)
		_ = entry.Value()
	})
	notMore("Put", func() {
		must(s.Put("key", value, 0))
	}, func() {
		_, err := kv.Put(ctx, "key", value)
		must(err)
	})
	var ours, theirs uint64
	ours, err = s.Update("updated", value, 0, 0)
	must(err)
	theirs, err = kv.Create(ctx, "updated", value)
	must(err)
	notMore("Update", func() {
		ours, err = s.Update("updated", value, 0, ours)
		must(err)
	}, func() {
		theirs, err = kv.Update(ctx, "updated", value, theirs)
		must(err)
	})
	keys := make([]string, 0, 10000)
	for i := range cap(keys) {
		keys = append(keys, fmt.Sprintf("new.%d", i))
	}
	n, m := 0, 0
	notMore("Put of a new key with a TTL", func() {
		must(s.Put(keys[n], value, time.Hour))
		n++
	}, func() {
		_, err := kv.Create(ctx, keys[m], value, jetstream.KeyTTL(time.Hour))
		must(err)
		m++
	})
}

// startServerProcess runs a server in a process of its own until the test ends.
func startServerProcess(t testing.TB) (url string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^TestServerProcess$")
	cmd.Env = append(os.Environ(), serverProcessDir+"="+t.TempDir())
	stdin, err := cmd.StdinPipe() // it ends when this is closed, so also with us
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = stdin.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	return strings.TrimSpace(line)
}

const serverProcessDir = "STATE_TEST_SERVER_DIR"

// TestServerProcess is not a test but the process of startServerProcess.
func TestServerProcess(t *testing.T) {
	dir := os.Getenv(serverProcessDir)
	if dir == "" {
		return
	}
	srv := startServer(t, func(opts *server.Options) { opts.StoreDir = dir })
	fmt.Println(srv.ClientURL())
	_, _ = io.Copy(io.Discard, os.Stdin)
}
