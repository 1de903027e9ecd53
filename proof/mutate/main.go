// Command mutate shows that the tests can fail. It copies the library to a
// temporary directory, breaks the copy in one way at a time, and runs the tests
// that should notice; each of them must fail. It prints a table.
//
//	go -C proof run ./mutate            all mutations
//	go -C proof run ./mutate -only x,y  those whose names contain x or y
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// A mutation is a way to break the library.
type mutation struct {
	name  string
	edits []edit
	tests []string // of the suite below; each must fail
}

// An edit replaces the one place where a text is found in the library.
type edit struct{ old, new string }

// The tests, by short names.
var suite = map[string]string{
	"memory-suite": ". -run ^TestMemoryStoreConformance$",
	"nats-suite":   ". -run ^TestNATSStoreConformance$",
	"fuzz":         ". -run ^Fuzz",
	"exclusion":    ". -run ^TestMutualExclusionUnderFaults$",
	"bursts":       ". -run ^TestWatchBurst$",
	"clock":        ". -run ^TestClockSetBack$",
	"vague-clock":  ". -run ^TestClockVague$",
	"calls":        ". -run ^TestCallKeepsUp$",
	"memory-model": "proof -run ^TestMemoryStoreModel$",
	"nats-model":   "proof -run ^TestNATSStoreModel$",
	"both-model":   "proof -run ^TestBothModel$",
	"isolated":     "proof -run ^TestIsolatedLeader$",
	"deletes":      "proof -run ^TestDeleteAnomaly$",
	"markers":      "proof -run ^TestMarkerAnomaly$",
}

// command returns what runs a test: one of the suite, or "load" with the name of
// a scenario, which is a history under this load.
func command(test string) []string {
	if scenario, ok := strings.CutPrefix(test, "load "); ok {
		return []string{"proof", "-run", "^TestLong$", "-long", "60s", "-each", "12s", "-stop", "-only", scenario}
	}
	return strings.Fields(suite[test])
}

const (
	inMemory  = "load memory"
	oneServer = "load one-server"
	three     = "load three-servers"
)

var mutations = []mutation{
	{"memory-update-without-cas", []edit{{"if current != *expected {", "if false && current != *expected {"}}, []string{"memory-model", "memory-suite", inMemory}},
	{"no-cas", []edit{{"	hdr.set(headerExpected, strconv.FormatUint(last.revision, 10))\n", ""}}, []string{oneServer, "deletes", "nats-suite", "exclusion"}},
	{"unlock-without-ownership", []edit{
		{"if l.released || l.lapse(time.Now()) && !l.unsure {", "if l.released {"},
		{"if err == nil && l.lapsed {", "if false {"},
		{"held == nil || held.token != l.token || held.deadline.passed(now)", "held == nil"},
		{"owner != l.owner {", "false && owner != l.owner {"},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"a-lapsed-lock-is-handed-over", []edit{{"	if l.lapse(time.Now()) {\n		_ = l.lessor.release(l)\n		return nil, ErrLockExpired\n	}\n	return l, nil\n", "	return l, nil\n"}}, []string{"load three-servers-routes-stalled"}},
	{"takeover-before-the-end", []edit{
		{"	if b.exists(c, last) {", "	if b.exists(c, last) && !b.expired(c, last.deadline-timestamp(100*time.Millisecond)) {"},
		{"for t := s.lapses.due(now); t != nil; t = s.lapses.due(now) {\n		delete(s.locks, t.key)", "for t := s.lapses.due(now + 5e6); t != nil; t = s.lapses.due(now + 5e6) {\n		delete(s.locks, t.key)"},
	}, []string{inMemory, oneServer}},
	{"refresh-after-the-end", []edit{
		{"	if l.lapse(asked) {\n		return ErrLockExpired\n	}\n", ""},
		{"case err == nil && l.lapse(time.Now()):", "case false:"},
		{"held.token != l.token || held.deadline.passed(now)", "held.token != l.token"},
		{"if !n.b.exists(c, last) {", "if last.deleted {"},
	}, []string{"memory-model", "nats-model", oneServer}},
	{"tokens-that-stay", []edit{
		{"func (l *lease) Token() uint64 { return l.token }", "func (l *lease) Token() uint64 { return 1 }"},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"a-clock-ahead", []edit{ // expiry by the clock of a client that is half a second ahead
		{"	return c.base + timestamp(passed-passed/maxDrift)", "	return timestamp(time.Now().Add(500*time.Millisecond).UnixNano()) + 0*timestamp(passed)"},
	}, []string{oneServer, "nats-suite"}},
	{"a-clock-behind", []edit{
		{"	return c.base + timestamp(passed-passed/maxDrift)", "	return timestamp(time.Now().Add(-5*time.Second).UnixNano()) + 0*timestamp(passed)"},
	}, []string{"nats-model", "nats-suite"}},
	{"drop-on-a-full-queue", []edit{
		{"	if q.len() >= maxWaiting {\n", "	if q.len() >= maxWaiting {\n		return\n	}\n	if false {\n"},
	}, []string{"fuzz", "memory-suite"}},
	{"an-older-event-last", []edit{
		{"			q.events[q.head+n-q.popped] = ev\n", "			_ = n\n"},
	}, []string{"fuzz", "memory-suite"}},
	{"keys-without-the-leader", []edit{
		{"		case last >= upTo:\n			return all, nil\n", "		case true || last >= upTo:\n			return all, nil\n"},
		{"status == \"100\" && got == 0 && last < upTo {", "status == \"\" && last < upTo {"},
	}, []string{three}},
	{"reads-from-any-replica", []edit{{"if setup.Replicas > 1 || !setup.AllowDirect {", "if !setup.AllowDirect {"}}, []string{three, "isolated"}},
	{"lost-answers-are-failures", []edit{
		{"			doubt, doubtOn, last = err, last.revision, nil\n", "			return record{}, err\n"},
	}, []string{"load one-server-kills", "load one-server-restarts"}},
	{"lost-answers-are-tried-anew", []edit{ // as if the first attempt had not been
		{"if op, _, _ := strings.Cut(found.op, \"+\"); op == do.op {", "if false {"},
	}, []string{"load one-server-clients-cut"}},
	{"expired-is-visible", []edit{{"if !s.data.exists(c, &r) {", "if r.revision == 0 || r.deleted {"}}, []string{"nats-model", "both-model"}},
	{"ttl-cut-to-seconds", []edit{
		{"broom = (broom + time.Second - 1).Truncate(time.Second)", "broom = max(broom, time.Second).Truncate(time.Second)"},
	}, []string{oneServer}},
	{"watch-forgets-expiries", []edit{
		{"	if w.source == nil {\n		return nil\n	}\n	if next :=", "	if true {\n		return nil\n	}\n	if next :="},
		{"		s.remove(it, it.revision, it.deadline)\n", "		delete(s.items, it.key)\n"},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"watch-forgets-what-it-missed", []edit{
		{"w.b.filter(w.pattern), w.cursor+1, false", "w.b.filter(w.pattern), info.State.LastSeq+1, false"},
	}, []string{"load one-server-clients-cut"}},
	{"watch-tells-what-is-delivered", []edit{
		{"		w.tellMissed(ctx, key, msg, d)\n", ""},
	}, []string{"bursts", oneServer, three}},
	{"a-clock-that-goes-on", []edit{ // as if a server's clock were never set back
		{"open := !surely && (age > freshSample || !deadline.passed(now))", "open := false"},
		{"age >= sampleLife || open", "surely && age >= sampleLife || open"},
	}, []string{"clock"}},
	{"an-estimate-is-good-enough", []edit{
		{"!surely && (age > freshSample || !deadline.passed(now))", "!surely && age > freshSample"},
	}, []string{"vague-clock"}},
	{"who-is-beaten-waits-longer", []edit{
		{"	c.pause = firstPause\n", ""},
	}, []string{"calls"}},
	{"watch-tells-early-expiries", []edit{
		{"next == 0 || !next.passed(w.b.clock.now())", "next == 0"},
		{"	now := timestamp(info.Now.UnixNano())\n	var due", "	now := timestamp(info.Now.Add(time.Second).UnixNano())\n	var due"},
		{"time.Duration(next-w.b.clock.now())", "time.Duration(next-w.b.clock.now())-time.Second"},
	}, []string{"nats-suite"}},
	{"created-not-kept", []edit{
		{"	b = strconv.AppendInt(b, int64(last.created), 10)\n", "	b = strconv.AppendInt(b, int64(w.now), 10)\n"},
		{"	it.revision, it.modified = s.revision, now\n", "	it.revision, it.modified, it.created = s.revision, now, now\n"},
	}, []string{"memory-model", "nats-model", "memory-suite", "nats-suite"}},
	{"created-kept-too-long", []edit{
		{"created < written && !replaced.passed(written)", "created < written && replaced >= 0"},
	}, []string{"fuzz"}},
	{"delete-writes-always", []edit{
		{"		if !s.data.exists(c, last) {\n			return nil, record{}, errNothing\n		}\n", ""},
	}, []string{"nats-model", "both-model"}},
	{"star-without-the-empty-rest", []edit{
		{"	if p.wild {\n		return strings.HasPrefix(key, p.prefix)\n", "	if p.wild {\n		return strings.HasPrefix(key, p.prefix) && len(key) > len(p.prefix)\n"},
	}, []string{"fuzz", "nats-model"}},
	{"double-dots", []edit{{"if !keyByte[c] || c == '.' && last == '.' {", "if !keyByte[c] || c == '.' && last == 0 {"}}, []string{"fuzz", "memory-model"}},
	{"headers-are-trusted", []edit{{"created > 0 && created < written && !replaced", "created != 0 && !replaced"}}, []string{"fuzz"}},
	{"deliveries-misread", []edit{{"		skip += 2\n", "		skip += 1\n"}}, []string{"fuzz"}},
	{"errors-read-as-acknowledgements", []edit{{"bytes.Contains(ack, []byte(`\"error\":`))", "bytes.Contains(ack, []byte(`\"none\":`))"}}, []string{"fuzz"}},
	{"a-goroutine-that-stays", []edit{{"func NewMemoryStore() *MemoryStore {\n", "func NewMemoryStore() *MemoryStore {\n	go func() { select {} }()\n"}}, []string{"memory-model", inMemory}},
	{"values-are-shared", []edit{{"	c := make([]byte, len(b))\n	copy(c, b)\n	return c\n", "	if b == nil {\n		return []byte{}\n	}\n	return b\n"}}, []string{"memory-suite"}},
}

var (
	only    = flag.String("only", "", "run the mutations whose names contain one of these, separated by commas")
	timeout = flag.Duration("timeout", 4*time.Minute, "for how long a test may run")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	root, err := filepath.Abs("..")
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	wrong := 0
	fmt.Println("| mutation | test | noticed by |\n|---|---|---|")
	for _, m := range mutations {
		if !wanted(m.name) {
			continue
		}
		copied := filepath.Join(work, m.name)
		if err := copyTree(root, copied); err != nil {
			return err
		}
		if err := m.apply(copied); err != nil {
			wrong++
			fmt.Printf("| %s | | NOT APPLIED: %v |\n", m.name, err)
			continue
		}
		for _, test := range m.tests {
			by, err := check(copied, test)
			if err != nil {
				wrong++
				by = "NOT NOTICED: " + err.Error()
			}
			fmt.Printf("| %s | %s | %s |\n", m.name, test, by)
		}
		_ = os.RemoveAll(copied)
	}
	if wrong > 0 {
		return fmt.Errorf("%d mutations were not applied or not noticed", wrong)
	}
	return nil
}

func wanted(name string) bool {
	for part := range strings.SplitSeq(*only, ",") {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// apply makes the edits. A text that is not found, or found twice, is an error:
// then the mutation is out of date.
func (m mutation) apply(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return err
	}
	for _, e := range m.edits {
		found := 0
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			n := bytes.Count(text, []byte(e.old))
			if found += n; n != 1 {
				continue
			}
			if err := os.WriteFile(file, bytes.Replace(text, []byte(e.old), []byte(e.new), 1), 0o600); err != nil {
				return err
			}
		}
		if found != 1 {
			return fmt.Errorf("%q was found %d times", e.old, found)
		}
	}
	return nil
}

var (
	failure  = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
	notBuilt = regexp.MustCompile(`(?m)\[build failed\]|\[setup failed\]`)
)

// check runs a test, which must fail, and returns what failed.
func check(dir, test string) (by string, err error) {
	args := command(test)
	if len(args) == 0 {
		return "", fmt.Errorf("there is no test %q", test)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout+time.Minute)
	defer cancel()
	// Tests that hang have noticed too.
	arguments := append([]string{"test", "-vet=off", "-timeout", timeout.String(), "."}, args[1:]...)
	if args[0] == "." {
		arguments = append(arguments, "-failfast")
	}
	cmd := exec.CommandContext(ctx, "go", arguments...)
	cmd.Dir = filepath.Join(dir, args[0])
	out, err := cmd.CombinedOutput()
	switch {
	case notBuilt.Match(out):
		return "", fmt.Errorf("it does not build: %s", bytes.TrimSpace(out))
	case err == nil:
		return "", fmt.Errorf("%s passed", test)
	}
	names := failure.FindAllStringSubmatch(string(out), -1)
	if len(names) == 0 {
		if bytes.Contains(out, []byte("unexpected goroutines")) {
			return "goleak", nil
		}
		if bytes.Contains(out, []byte("panic:")) {
			return "a panic or a time-out", nil
		}
		return "", fmt.Errorf("it failed for no test: %s", bytes.TrimSpace(out))
	}
	deepest := names[0][1]
	for _, name := range names {
		if strings.Count(name[1], "/") > strings.Count(deepest, "/") {
			deepest = name[1]
		}
	}
	return deepest, nil
}

// copyTree copies what the tests need.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == ".git" || rel == "bench" || rel == "examples" || rel == filepath.Join("proof", "testdata") {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o600)
	})
}
