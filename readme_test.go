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
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

var (
	_ = fmt.Println
	_ time.Duration
	_ *nats.Conn
)

func _(ctx context.Context, store *state.NATSStore, lock state.Lock, data []byte,
	resource interface{ Write(token uint64, data []byte) error },
	increment func([]byte) []byte, deploy func(context.Context, uint64) error) (err error) {
	{
%s	}
	return err
}
`

// TestReadmeCode vets every Go block of the README, and runs those that are
// tests, in a module of their own that uses this one as the README says.
func TestReadmeCode(t *testing.T) {
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
			assert.NotEmpty(t, refusedUnder(t, without(listed.Publish.Allow, i), listed.Subscribe.Allow))
		})
	}
	for i, subject := range listed.Subscribe.Allow {
		t.Run("not hearing "+subject, func(t *testing.T) {
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

	ctx, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	events, err := s.WithContext(ctx).Watch("config.*")
	if err != nil {
		return err
	}
	for _, by := range []StateStore{other, s} {
		if err := by.Put("config.pace", []byte("brisk"), time.Hour); err != nil {
			return err
		}
		select {
		case <-events:
		case <-ctx.Done():
			return errors.New("the watch tells nothing")
		}
	}
	// At its deadline the server has it no more.
	stream, err := js.Stream(ctx, "KV_"+cfg.Bucket)
	if err != nil {
		return err
	}
	if err := s.Put("config.brief", nil, 300*time.Millisecond); err != nil {
		return err
	}
	for range 2 {
		select {
		case <-events:
		case <-ctx.Done():
			return errors.New("the watch tells of no expiry")
		}
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.agent-state.config.brief")); err != nil {
			return err
		}
	}
	if value, err := s.Get("config.pace"); err != nil || string(value) != "brisk" {
		return fmt.Errorf("got %q, %w", value, err)
	}
	if _, err := s.data.leaderLast(newBudget(ctx), "config.pace"); err != nil { // Get, on several replicas
		return err
	}
	if keys, err := s.Keys("*"); err != nil || len(keys) != 1 {
		return fmt.Errorf("keys %q, %w", keys, err)
	}
	if err := s.Delete("config.pace"); err != nil {
		return err
	}

	taken, err := other.Lock("deploy", time.Minute)
	if err != nil {
		return err
	}
	if _, err := s.Lock("deploy", time.Minute); err != ErrLockHeld {
		return fmt.Errorf("locked twice: %w", err)
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
