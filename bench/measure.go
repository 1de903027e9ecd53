package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"time"
)

// A run is one run of the program: what it started and what it found.
type run struct {
	quick    bool
	sections []*section
	points   []point // for the plot
	stops    []func()
	profiles int    // how many nats-servers were asked for a profile
	nats     string // the URL of the server, once it runs
	replicas int    // of the buckets that are opened; 0 for one
}

// A section is what one group found.
type section struct {
	name, title, text string
	rows              []row
	tables            []table
	notes             []string
}

// close stops what was started, the last first.
func (r *run) close() { r.closeTo(0) }

// closeTo stops what was started since r.stops had that length.
func (r *run) closeTo(length int) {
	for _, stop := range slices.Backward(r.stops[length:]) {
		stop()
	}
	r.stops = r.stops[:length]
}

// section returns that of the group that runs.
func (r *run) section() *section { return r.sections[len(r.sections)-1] }

func (r *run) note(format string, args ...any) {
	s := r.section()
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

func (r *run) table(t table) {
	s := r.section()
	s.tables = append(s.tables, t)
}

// A row is one comparison.
type row struct {
	name         string
	ours, theirs string // what is compared
	unit         string // of the two figures
	our, their   float64
	ratio        float64 // ours to theirs: the median of the rounds'
	low, high    float64 // its quartiles
	target       float64 // 0 if there is none
	atLeast      bool    // the ratio should be no smaller, not no larger
}

func (r row) met() bool {
	// As precise as it is printed.
	ratio := math.Round(r.ratio*100) / 100
	if r.atLeast {
		return ratio >= r.target
	}
	return ratio <= r.target
}

// A side is one of the things that are compared. It does n operations and
// tells how long they took.
type side struct {
	name string
	do   func(n int) (time.Duration, error)
}

// timed makes a side of an operation that is timed as a whole.
func timed(name string, op func() error) side {
	return side{name, func(n int) (time.Duration, error) {
		start := time.Now()
		for range n {
			if err := op(); err != nil {
				return 0, err
			}
		}
		return time.Since(start), nil
	}}
}

// A plan says how to measure.
type plan struct {
	rounds int
	chunk  time.Duration // how long one side runs in one round
	limit  int           // at most so many operations in a round; 0 for no limit
}

// plan returns the plan for a comparison that has so many seconds in a full
// run, for each side.
func (r *run) plan(seconds float64) plan {
	chunk := 20 * time.Millisecond
	if r.quick {
		seconds /= 10
		chunk = 10 * time.Millisecond
	}
	return plan{rounds: max(int(seconds/chunk.Seconds()), 5), chunk: chunk}
}

// measure runs the sides in turn, a short while each, round after round, so that
// what disturbs the machine disturbs all of them. It returns nanoseconds an
// operation, by side and round.
func measure(p plan, sides ...side) ([][]float64, error) {
	counts := make([]int, len(sides))
	for i, s := range sides {
		// Find out how many operations fill a chunk; this is the warm-up, too.
		for n := 1; ; n *= 2 {
			took, err := s.do(n)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			if took >= p.chunk/2 || p.limit > 0 && n >= p.limit {
				counts[i] = max(int(float64(n)*float64(p.chunk)/float64(max(took, 1))), 1)
				if p.limit > 0 {
					counts[i] = min(counts[i], p.limit)
				}
				break
			}
		}
	}
	samples := make([][]float64, len(sides))
	for range p.rounds {
		for _, i := range rand.Perm(len(sides)) { // so that none always follows the same one
			took, err := sides[i].do(counts[i])
			if err != nil {
				return nil, fmt.Errorf("%s: %w", sides[i].name, err)
			}
			samples[i] = append(samples[i], float64(took)/float64(counts[i]))
		}
	}
	return samples, nil
}

// quantile returns a quantile of the samples.
func quantile(samples []float64, q float64) float64 {
	sorted := slices.Sorted(slices.Values(samples))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

func median(samples []float64) float64 { return quantile(samples, 0.5) }

// few returns a plan for operations that take long: each round is so many of
// them, whatever the time.
func (r *run) few(rounds, operations int) plan {
	if r.quick {
		rounds = 3
	}
	return plan{rounds: rounds, chunk: time.Hour, limit: operations}
}

// compare makes a row of two sides' samples.
func compare(name string, ours, theirs string, our, their []float64) row {
	ratios := make([]float64, len(our))
	for i := range our {
		ratios[i] = our[i] / their[i]
	}
	return row{
		name: name, ours: ours, theirs: theirs, unit: "ns",
		our: median(our), their: median(their),
		ratio: median(ratios), low: quantile(ratios, 0.25), high: quantile(ratios, 0.75),
	}
}

// add measures the first side against each of the others, in one series, and
// adds a row for each. The targets go with the others; 0 for none.
func (r *run) add(name string, p plan, targets []float64, sides ...side) error {
	samples, err := measure(p, sides...)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for i, theirs := range sides[1:] {
		row := compare(name, sides[0].name, theirs.name, samples[0], samples[i+1])
		if i < len(targets) {
			row.target = targets[i]
		}
		r.put(row)
	}
	return nil
}

// put adds a row and prints it, as progress.
func (r *run) put(row row) {
	s := r.section()
	s.rows = append(s.rows, row)
	verdict := ""
	if row.target != 0 && !row.met() {
		verdict = "  MISSED"
	}
	fmt.Fprintf(os.Stderr, "  %-44s %-28s %10s %10s %8.3f [%.3f %.3f] target %.2f%s\n",
		row.name, "/ "+row.theirs, row.figure(row.our), row.figure(row.their), row.ratio, row.low, row.high, row.target, verdict)
}

// throughput turns nanoseconds an operation into operations a second.
func throughput(samples []float64) []float64 {
	rates := make([]float64, len(samples))
	for i, ns := range samples {
		rates[i] = 1e9 / ns
	}
	return rates
}
