// Command bench compares the state package with what its users would pick
// instead, in one run on one machine, and writes the table of the README:
//
//	go -C bench run . -quick     # two or three minutes, prints only
//	go -C bench run . -write     # about twenty minutes, writes README.md, RESULTS.md and agents.svg
//
// It starts what it needs, on loopback and each in a process of its own:
// nats-servers, agents, an etcd and, if there is one on the PATH, a redis-server.
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

// A group is a set of comparisons that has servers of its own.
type group struct {
	name, title, text string
	measure           func(*run) error
}

var groups = []group{
	{"agents", "From 10 to 1,000 agents", agentsText, agentsGroup},
	{"nats", "Get and Put", "One operation at a time.", natsGroup},
	{"new-keys", "New keys and TTLs", "One operation at a time.", newKeysGroup},
	{"locks", "Locks", "One cycle at a time, of a lock that nobody else wants.", lockGroup},
	{"throughput", "From 64 goroutines", "All share one store, and so one connection. Each has a separate key.", throughputGroup},
	{"shared", "Shared keys", sharedText, sharedGroup},
	{"fan-out", "From a change to its events", fanOutText, fanOutGroup},
	{"opening", "Opening a watch", openingText, openingGroup},
	{"reads", "Reading many keys", readsText, readsGroup},
	{"distance", "At a distance", distanceText, distanceGroup},
	{"replicas", "Three replicas", replicasText, replicasGroup},
	{"memory", "MemoryStore", memoryText, memoryGroup},
	{"growth", "How the cost grows", "Ours alone.", growthGroup},
}

func main() {
	log.SetFlags(0)
	if kind := os.Getenv(serveEnv); kind != "" {
		serve(kind)
		return
	}
	var (
		quick   = flag.Bool("quick", false, "fewer and shorter rounds, and smaller growth")
		write   = flag.Bool("write", false, "write the tables and the plot into the repository")
		dir     = flag.String("dir", "..", "the root of the repository, for -write")
		only    = flag.String("only", "", "run only the groups that match this regular expression")
		svg     = flag.String("plot", "", "write the plot of the agents' cost to this file, .svg or .png")
		profile = flag.String("cpuprofile", "", "write a CPU profile of this process, the client's side, to a file")

		serverProfile = flag.String("serverprofile", "", "write CPU profiles of the nats-servers to this file, the second to this name with .2, ...")
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
	began, failed := time.Now(), false
	for _, g := range groups {
		if !match.MatchString(g.name) {
			continue
		}
		// A group has servers of its own, so that what the last one left to be
		// tidied up disturbs nobody.
		r.close()
		r.nats, r.replicas = "", 0
		r.sections = append(r.sections, &section{name: g.name, title: g.title, text: g.text})
		start := time.Now()
		if err := g.measure(r); err != nil {
			log.Printf("%s: %v", g.name, err)
			failed = true
		}
		fmt.Fprintf(os.Stderr, "%-12s %6.1fs\n", g.name, time.Since(start).Seconds())
	}
	fmt.Println(r.full())
	fmt.Fprintf(os.Stderr, "all          %6.1fs\n", time.Since(began).Seconds())
	if failed {
		r.close()
		log.Fatal("not all groups were measured")
	}
	if *svg != "" {
		if err := r.plot(*svg); err != nil {
			log.Fatal(err)
		}
	}
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
