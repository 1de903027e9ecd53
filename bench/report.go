package main

import (
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
)

// duration writes nanoseconds with three digits.
func duration(ns float64) string {
	for _, unit := range []struct {
		name string
		ns   float64
	}{{"s", 1e9}, {"ms", 1e6}, {"µs", 1e3}} {
		if ns >= unit.ns {
			return digits(ns/unit.ns) + " " + unit.name
		}
	}
	return digits(ns) + " ns"
}

func size(bytes float64) string {
	switch {
	case bytes <= 0: // less than what else comes and goes
		return "-"
	case bytes >= 1<<20:
		return digits(bytes/(1<<20)) + " MiB"
	case bytes >= 1<<10:
		return digits(bytes/(1<<10)) + " KiB"
	}
	return fmt.Sprintf("%.0f B", bytes)
}

// digits writes a number with three digits, as far as they matter.
func digits(x float64) string {
	switch {
	case x >= 100:
		return count(int(math.Round(x)))
	case x >= 10:
		return fmt.Sprintf("%.1f", x)
	}
	return fmt.Sprintf("%.2f", x)
}

// count writes a number with commas.
func count(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func (r row) figure(x float64) string {
	switch r.unit {
	case "op/s":
		return count(int(math.Round(x/100))*100) + "/s"
	case "requests":
		return fmt.Sprintf("%.4g", x)
	case "messages/s":
		return digits(x) + "/s"
	case "CPU":
		return duration(x) + "/s"
	case "bytes":
		return size(x)
	}
	return duration(x)
}

// bound writes the target.
func (r row) bound() string {
	switch {
	case r.target == 0:
		return ""
	case r.atLeast:
		return fmt.Sprintf("≥ %.4g", r.target)
	}
	return fmt.Sprintf("≤ %.4g", r.target)
}

func (r row) verdict() string {
	switch {
	case r.target == 0:
		return ""
	case r.met():
		return "yes"
	}
	return "**no**"
}

// version returns that of a module that this program is built with.
func version(path string) string {
	info, _ := debug.ReadBuildInfo()
	for _, m := range info.Deps {
		if m.Path == path {
			return strings.TrimPrefix(m.Version, "v")
		}
	}
	return "?"
}

func cpu() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	_, rest, _ := strings.Cut(string(data), "model name")
	name, _, _ := strings.Cut(strings.TrimLeft(rest, "\t :"), "\n")
	if name == "" {
		name = runtime.GOARCH
	}
	return name
}

const (
	intro = "Every server is a separate process on loopback. Contestants take turns, and a ratio, of ours to theirs, is the " +
		"median over the rounds of one run, in brackets its quartiles. Values have 128 bytes."
	more = " TTLs are an hour, those of locks 30 seconds, where nothing else is said. nats-server and etcd write to disk " +
		"without waiting for it, redis-server keeps nothing. *echo* is a plain NATS request that a responder inside the server " +
		"sends back. What stands in the way of the targets that are missed: [README](README.md)."
)

// head says what was run, and on what.
func (r *run) head() string {
	mode := ""
	if r.quick {
		mode = " (quick)"
	}
	return fmt.Sprintf("`go -C bench run . -write`%s on %s, %d processors, Go %s; nats-server %s, nats.go %s, etcd %s.\n\n",
		mode, cpu(), runtime.NumCPU(), strings.TrimPrefix(runtime.Version(), "go"),
		version("github.com/nats-io/nats-server/v2"), version("github.com/nats-io/nats.go"), version("go.etcd.io/etcd/server/v3"))
}

const comparisonHead = "| | ours | compared with | theirs | ratio | target | met |\n|---|--:|---|--:|--:|--:|---|\n"

// comparison writes a row of a table that begins with comparisonHead.
func (r row) comparison() string {
	return fmt.Sprintf("| %s | %s | %s | %s | %.2f [%.2f, %.2f] | %s | %s |\n", r.name, r.figure(r.our),
		r.theirs, r.figure(r.their), r.ratio, r.low, r.high, r.bound(), r.verdict())
}

// markdown writes a section.
func (s *section) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n## %s\n\n%s\n", s.title, s.text)
	if len(s.rows) > 0 {
		b.WriteString("\n" + comparisonHead)
		for _, row := range s.rows {
			b.WriteString(row.comparison())
		}
	}
	for _, note := range s.notes {
		fmt.Fprintf(&b, "\n%s\n", note)
	}
	for _, t := range s.tables {
		fmt.Fprintf(&b, "\n%s:\n\n| %s |\n|%s\n", t.title, strings.Join(t.head, " | "), strings.Repeat("--:|", len(t.head)))
		for _, row := range t.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		}
	}
	return b.String()
}

// full writes all that was found.
func (r *run) full() string {
	var b strings.Builder
	b.WriteString(r.head() + intro + more + "\n")
	for _, s := range r.sections {
		b.WriteString(s.markdown())
	}
	return b.String()
}

// questions are what a user asks first. Each is a line of the README's table,
// with the rows that answer it.
var questions = []struct {
	question string
	rows     []string // by name; the first of that name
}{
	{"Get", []string{"Get"}},
	{"Put", []string{"Put, own key"}},
	{"Lock and Unlock", []string{"Lock+Unlock"}},
	{"from a change to its event", []string{"Put to event"}},
	{"server CPU per agent, of 100 / of 1,000", []string{agentsRow(100, serverCPU), agentsRow(1000, serverCPU)}},
	{"a death is known to 100 / 1,000 agents, after its TTL", []string{agentsRow(100, deathKnown), agentsRow(1000, deathKnown)}},
}

// brief writes what the README shows.
func (r *run) brief() string {
	var b strings.Builder
	b.WriteString(r.head() + intro + " [bench](bench/README.md) says how it is measured and what stands in the way of the targets " +
		"that are missed; [RESULTS](bench/RESULTS.md) has the rest: fan-out, opening, shared keys, distance, three replicas, " +
		"other stores, and how the cost grows.\n\n")
	b.WriteString("| | ours | nats.go KV | ratio | target | met |\n|---|--:|--:|--:|--:|---|\n")
	for _, q := range questions {
		var cells [5][]string
		for _, name := range q.rows {
			if row := r.row(name); row != nil {
				for i, cell := range []string{
					row.figure(row.our), row.figure(row.their),
					fmt.Sprintf("%.2f [%.2f, %.2f]", row.ratio, row.low, row.high), row.bound(), row.verdict(),
				} {
					if i < 3 || len(cells[i]) == 0 || cells[i][0] != cell { // the same target and verdict are written once
						cells[i] = append(cells[i], cell)
					}
				}
			}
		}
		fmt.Fprintf(&b, "| %s", q.question)
		for _, cell := range cells {
			b.WriteString(" | " + strings.Join(cell, " / "))
		}
		b.WriteString(" |\n")
	}
	b.WriteString("\nAn agent sends a heartbeat a second, follows the configuration, follows the living agents, and waits for a leader's lock:\n\n" +
		"![cost per agent, by the number of agents](bench/agents.svg)\n")
	return b.String()
}

// row returns the first row of that name.
func (r *run) row(name string) *row {
	for _, s := range r.sections {
		for i := range s.rows {
			if s.rows[i].name == name {
				return &s.rows[i]
			}
		}
	}
	return nil
}

const (
	begin = "<!-- bench:begin -->"
	end   = "<!-- bench:end -->"
)

// publish writes bench/RESULTS.md and bench/agents.svg and, between its marks,
// the README.
func (r *run) publish(dir string) error {
	results := "# Results\n\n![cost per agent, by the number of agents](agents.svg)\n\n" + r.full()
	if err := os.WriteFile(filepath.Join(dir, "bench", "RESULTS.md"), []byte(results), 0o644); err != nil {
		return err
	}
	if err := r.plot(filepath.Join(dir, "bench", "agents.svg")); err != nil {
		return err
	}
	readme := filepath.Join(dir, "README.md")
	old, err := os.ReadFile(readme)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return fmt.Errorf("%s has no %s and %s", readme, begin, end)
	}
	return os.WriteFile(readme, []byte(before+begin+"\n"+r.brief()+end+after), 0o644)
}
