// Command bench compares the state package with what its users would pick
// instead, in one run on one machine, and writes the table of the README:
//
//	go -C bench run . -quick     # under a minute, prints only
//	go -C bench run . -write     # under eight minutes, writes README.md, RESULTS.md and results.svg
//
// It starts what it needs, on loopback and each in a process of its own: a
// nats-server, an etcd and, if there is one on the PATH, a redis-server.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"time"
)

func main() {
	log.SetFlags(0)
	if kind := os.Getenv(serveEnv); kind != "" {
		serve(kind)
		return
	}
	var (
		quick   = flag.Bool("quick", false, "fewer and shorter rounds, and smaller growth")
		write   = flag.Bool("write", false, "write the table and the plot into the repository")
		dir     = flag.String("dir", "..", "the root of the repository, for -write")
		only    = flag.String("only", "", "run only the groups that match this regular expression")
		profile = flag.String("cpuprofile", "", "write a CPU profile of this process, the client's side, to a file")

		serverProfile = flag.String("serverprofile", "", "write a CPU profile of the nats-server to a file")
	)
	flag.Parse()
	match, err := regexp.Compile(*only)
	if err != nil {
		log.Fatal(err)
	}
	if *write && *only != "" {
		log.Fatal("-write needs all groups")
	}
	if *profile != "" {
		defer startProfile(*profile)()
	}
	if *serverProfile != "" {
		path, err := filepath.Abs(*serverProfile)
		if err != nil {
			log.Fatal(err)
		}
		_ = os.Setenv(serveProfileEnv, path)
	}

	r := &run{quick: *quick}
	defer r.close()
	began := time.Now()
	for _, g := range []struct {
		name string
		f    func(*run) error
	}{
		{"nats", natsGroup},
		{"new-keys", newKeysGroup},
		{"throughput", throughputGroup},
		{"locks", lockGroup},
		{"keys", keysGroup},
		{"watch", watchGroup},
		{"memory", memoryGroup},
		{"growth", growthGroup},
	} {
		if !match.MatchString(g.name) {
			continue
		}
		// A group has servers of its own, so that what the last one left to be
		// tidied up disturbs nobody.
		r.close()
		r.nats = ""
		start := time.Now()
		if err := g.f(r); err != nil {
			r.close()
			log.Fatalf("%s: %v", g.name, err)
		}
		fmt.Fprintf(os.Stderr, "%-12s %6.1fs\n", g.name, time.Since(start).Seconds())
	}
	fmt.Println(r.full())
	fmt.Fprintf(os.Stderr, "all          %6.1fs\n", time.Since(began).Seconds())
	if *write {
		if err := r.publish(*dir); err != nil {
			log.Fatal(err)
		}
	}
}

// startProfile writes a CPU profile until the function that it returns is called.
func startProfile(path string) (stop func()) {
	f, err := os.Create(path)
	if err != nil {
		log.Fatal(err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		log.Fatal(err)
	}
	return func() {
		pprof.StopCPUProfile()
		_ = f.Close()
	}
}
