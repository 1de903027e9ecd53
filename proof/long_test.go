package proof

import (
	"flag"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var (
	long = flag.Duration("long", 0, "for how long TestLong goes on, which is skipped if it is 0")
	each = flag.Duration("each", 20*time.Second, "for how long TestLong runs one scenario at a time")
	stop = flag.Bool("stop", false, "whether TestLong ends with the first failure")
	only = flag.String("only", "", "the one scenario that TestLong runs")
)

func TestMain(m *testing.M) {
	flag.Parse()
	checks(slowChecks)
	if f := flag.Lookup("test.parallel"); f != nil {
		_ = f.Value.Set("64") // most of them wait most of the time
	}
	code := m.Run()
	if binaryDir != "" {
		_ = os.RemoveAll(binaryDir)
	}
	if code == 0 {
		if err := eventually(20*time.Second, func() error { return goleak.Find() }); err != nil {
			os.Stderr.WriteString(err.Error() + "\n")
			code = 1
		}
	}
	os.Exit(code)
}

// TestLong runs one scenario after another, over and over.
func TestLong(t *testing.T) {
	if *long == 0 {
		t.Skip("the long part is run with -long")
	}
	began := time.Now()
	var total result
	sums := map[string]result{} // of each scenario
	for round := 1; time.Since(began) < *long && !(*stop && t.Failed()); round++ {
		for _, sc := range scenarios {
			if *only != "" && sc.name != *only {
				continue
			}
			t.Run(sc.name, func(t *testing.T) {
				r := sc.run(t, *each)
				total.add(r)
				sum := sums[sc.name]
				sum.add(r)
				sums[sc.name] = sum
			})
			t.Logf("after %v, round %d: %v", time.Since(began).Round(time.Second), round, total)
			if time.Since(began) >= *long || *stop && t.Failed() {
				break
			}
		}
	}
	for _, sc := range scenarios {
		if sum, ran := sums[sc.name]; ran && sum.lacks(sc) {
			t.Errorf("%s: too little happened to say anything: %v", sc.name, sum)
		}
	}
}
