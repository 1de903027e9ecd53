package main

import (
	"fmt"
	"html"
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
	intro = "Every server is a process of its own on loopback. The contestants take turns of 10 to 100 ms; a ratio, of ours to " +
		"theirs, is the median over the rounds, in brackets its quartiles. Values have 128 bytes; TTLs are an hour, those of " +
		"locks 30 seconds. nats-server and etcd write to disk without waiting for it, redis-server keeps nothing."
	more = " *echo* is a plain NATS request that a responder inside the server sends back. The caches share the caller's " +
		"slice: who changes the bytes changes the cache. *copying* means that they are made to copy on the way in and out, " +
		"as MemoryStore does."
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

// comparisons writes the table of the rows that keep returns true for.
func (r *run) comparisons(keep func(row) bool) string {
	var b strings.Builder
	b.WriteString("| | ours | compared with | theirs | ratio | target | met |\n|---|--:|---|--:|--:|--:|---|\n")
	for _, row := range r.rows {
		if keep(row) {
			fmt.Fprintf(&b, "| %s | %s | %s | %s | %.2f [%.2f, %.2f] | %s | %s |\n", row.name, row.figure(row.our),
				row.theirs, row.figure(row.their), row.ratio, row.low, row.high, row.bound(), row.verdict())
		}
	}
	for _, note := range r.notes {
		fmt.Fprintf(&b, "\n%s\n", note)
	}
	return b.String()
}

// brief writes what the README shows: what there is a target for, and locks.
func (r *run) brief() string {
	return r.head() + intro + " [bench](bench/README.md) has the rest: what the others were made to do, what stands in the way " +
		"of the targets that are missed, and [how the cost grows](bench/RESULTS.md).\n\n" +
		r.comparisons(func(row row) bool { return row.target != 0 || strings.HasPrefix(row.name, "Lock") }) +
		"\n![the ratios, as bars](bench/results.svg)\n"
}

// full writes all that was found.
func (r *run) full() string {
	var b strings.Builder
	b.WriteString(r.head() + intro + more + "\n\n" + r.comparisons(func(row) bool { return true }))
	for _, t := range r.tables {
		fmt.Fprintf(&b, "\n%s:\n\n| %s |\n|%s\n", t.title, strings.Join(t.head, " | "), strings.Repeat("--:|", len(t.head)))
		for _, row := range t.rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		}
	}
	return b.String()
}

const (
	begin = "<!-- bench:begin -->"
	end   = "<!-- bench:end -->"
)

// publish writes bench/RESULTS.md and bench/results.svg and, between its marks,
// the README.
func (r *run) publish(dir string) error {
	results := "# Results\n\n![the ratios, as bars](results.svg)\n\n" + r.full()
	if err := os.WriteFile(filepath.Join(dir, "bench", "RESULTS.md"), []byte(results), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bench", "results.svg"), []byte(r.svg()), 0o644); err != nil {
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

// svg draws the ratios as bars on a logarithmic scale, one element a line so
// that changes can be read. To the left of 1 is better; a ratio that should be
// large is turned round.
func (r *run) svg() string {
	const (
		left, right, width = 420, 90, 860
		top, line          = 58, 20
		lowest, highest    = 1.0 / 64, 8.0
	)
	x := func(ratio float64) float64 {
		ratio = min(max(ratio, lowest), highest)
		return left + (width-left-right)*math.Log(ratio/lowest)/math.Log(highest/lowest)
	}
	height := top + line*len(r.rows) + 20
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`, width, height, width, height)
	p(`<rect width="%d" height="%d" fill="#fff"/>`, width, height)
	p(`<text x="10" y="20" font-size="15">This package's cost beside others', as ratios of medians in one run</text>`)
	p(`<text x="10" y="38" fill="#666">left of 1: cheaper than what it is compared with; | is the target, if there is one; whiskers are quartiles</text>`)
	for _, tick := range []float64{1.0 / 64, 1.0 / 16, 0.25, 0.5, 1, 2, 4, 8} {
		color := "#ddd"
		if tick == 1 {
			color = "#888"
		}
		label := fmt.Sprintf("%g", tick)
		if tick < 0.1 {
			label = fmt.Sprintf("1/%g", 1/tick)
		}
		p(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>`, x(tick), top-4, x(tick), height-18, color)
		p(`<text x="%.1f" y="%d" text-anchor="middle" fill="#666">%s</text>`, x(tick), height-5, label)
	}
	for i, row := range r.rows {
		ratio, low, high, target := row.ratio, row.low, row.high, row.target
		if row.atLeast {
			ratio, low, high = 1/ratio, 1/high, 1/low
			if target != 0 {
				target = 1 / target
			}
		}
		y := top + line*i
		color := "#9ab"
		switch {
		case row.target != 0 && row.met():
			color = "#4a8"
		case row.target != 0:
			color = "#d55"
		}
		from, to := min(x(ratio), x(1)), max(x(ratio), x(1))
		p(`<text x="%d" y="%d" text-anchor="end">%s / %s</text>`, left-8, y+12, html.EscapeString(row.name), html.EscapeString(row.theirs))
		p(`<rect x="%.1f" y="%d" width="%.1f" height="12" fill="%s"/>`, from, y+2, to-from, color)
		p(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#333"/>`, x(low), y+8, x(high), y+8)
		if target != 0 {
			p(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#000" stroke-width="2"/>`, x(target), y, x(target), y+16)
		}
		p(`<text x="%d" y="%d">%.2f</text>`, width-right+20, y+12, row.ratio)
	}
	p(`</svg>`)
	return b.String()
}
