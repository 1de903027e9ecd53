package proof

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"example.com/state"
)

// TestHistories runs some of the scenarios for a short while. TestLong runs all
// of them, for as long as one likes.
func TestHistories(t *testing.T) {
	for _, name := range []string{"memory", "memory-chaos", "one-server", "one-server-restarts", "one-server-kills", "one-server-clients-frozen",
		"one-server-far-traffic", "one-server-narrow", "one-server-connections", "one-server-operators",
		"three-servers-step-downs", "three-servers-isolated-cut", "three-servers-kills"} {
		sc := scenarioNamed(name)
		t.Run(sc.name, func(t *testing.T) {
			if sc.servers > 0 {
				t.Parallel()
			}
			d := 6 * time.Second
			if sc.servers == 0 && !sc.chaos {
				d = 2 * time.Second
			}
			r := sc.run(t, d)
			if r.little(sc) {
				r = sc.run(t, 4*d) // the processor is busy with something else
			}
			if r.little(sc) {
				t.Errorf("too little happened to say anything: %v", r)
			}
		})
	}
}

func scenarioNamed(name string) scenario {
	for _, sc := range scenarios {
		if sc.name == name {
			return sc
		}
	}
	panic("no scenario " + name)
}

// TestIsolatedLeader shows the one exception to what reads promise: a leader
// that was cut off from the other servers answers as if it still were one, until
// it notices. It does so for reads only, and not for long: nobody gets a lock
// from it, no write is acknowledged by it, no expiry of what was refreshed through
// the others is reported, and then it does not answer at all.
func TestIsolatedLeader(t *testing.T) {
	t.Parallel()
	c := startCluster(t, 3, false)
	dial := func() (state.Store, *client) {
		cl, err := c.connect()
		if err != nil {
			t.Fatal(err)
		}
		var s *state.NATSStore
		waitFor(t, func() bool { // the servers may be just coming up
			s, err = state.NewNATSStore(state.NATSStoreConfig{Conn: cl.nc, Bucket: "proof", Replicas: 3})
			return err == nil
		})
		t.Cleanup(func() { _ = s.Close() })
		return s, cl
	}
	inside, insideConn := dial()
	outside, outsideConn := dial()
	if err := outside.Put("k", []byte("old"), 0); err != nil {
		t.Fatal(err)
	}
	// Both buckets must have been led by the one server that is cut off.
	if _, err := inside.Lock("warm", time.Minute); err != nil {
		t.Fatal(err)
	}
	leader := -1
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		data, current := c.leader("KV_proof")
		locks, alsoCurrent := c.leader("KV_proof-locks")
		if data >= 0 && data == locks && current && alsoCurrent {
			leader = data
			break
		}
		if data >= 0 && locks >= 0 && data != locks {
			_, _ = c.admin.Request("$JS.API.STREAM.LEADER.STEPDOWN.KV_proof-locks", nil, time.Second)
		}
	}
	if leader < 0 {
		t.Skip("the two buckets do not come to be led by the same server") // nothing was shown
	}
	for i, p := range insideConn.links {
		if i != leader {
			p.sever()
		}
	}
	outsideConn.links[leader].sever()
	waitFor(t, func() bool { _, err := inside.Get("k"); return err == nil })
	waitFor(t, func() bool { _, err := outside.Get("k"); return err == nil })

	// The others refresh this key, once they have elected a leader and before it ends.
	// The consumers of some of the watches are on the server that is cut off.
	const agent = "agent.seven"
	watches := make([]<-chan *state.KeyValue, len(agent))
	for i := range watches {
		var err error
		if watches[i], err = inside.Watch(agent[:i] + "*"); err != nil {
			t.Fatal(err)
		}
	}
	if err := outside.Put(agent, []byte("first"), 12*time.Second); err != nil {
		t.Fatal(err)
	}
	var born time.Time
	for _, watch := range watches {
		ev := <-watch
		if ev == nil || ev.Operation != state.OpPut {
			t.Fatalf("%v instead of a put", ev)
		}
		born = ev.Created
	}

	cut := time.Now()
	c.isolate(leader, (*proxy).sever)
	defer c.isolate(leader, (*proxy).heal)
	held := make(chan error, 1)
	wrote := make(chan time.Time, 1)
	var inTime bool // the key was refreshed before it ended
	var found string
	go func() {
		for {
			if err := outside.Put("k", []byte("new"), 0); err == nil {
				wrote <- time.Now()
				break
			} else if time.Since(cut) > 30*time.Second {
				held <- err
				return
			}
		}
		for outside.Put(agent, []byte("refreshed"), 2*time.Minute) != nil && time.Since(cut) < 11*time.Second {
		}
		entry, err := outside.GetKeyValue(agent)
		if inTime = err == nil && entry.Created.Equal(born); !inTime {
			found = fmt.Sprintf("%+v, %v", entry, err)
			if err := eventually(20*time.Second, func() error { return outside.Put(agent, []byte("written anew"), 2*time.Minute) }); err != nil {
				held <- err
				return
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, err = state.Acquire(ctx, outside, "l", time.Minute)
		held <- err
	}()
	var newSince time.Time
	stale, fresh, failed, last := 0, 0, 0, time.Duration(0)
	for time.Since(cut) < 30*time.Second && failed < 3 {
		select {
		case newSince = <-wrote:
		default:
		}
		asked := time.Now()
		value, err := inside.Get("k")
		switch {
		case err != nil:
			failed++
			if err == state.ErrNotFound { //nolint:errorlint // bare
				t.Fatal("the key is gone")
			}
		case !newSince.IsZero() && asked.After(newSince) && string(value) == "old":
			stale++
			last = asked.Sub(cut)
		default:
			fresh++
		}
		time.Sleep(2 * time.Millisecond)
	}
	if err := <-held; err != nil {
		t.Fatalf("the majority does not go on: %v", err)
	}
	t.Logf("%d stale reads through the isolated leader, up to %v after the cut; %d were right, %d failed", stale, last.Round(time.Millisecond), fresh, failed)
	if last > 25*time.Second || failed == 0 {
		t.Errorf("it never notices: stale until %v after the cut", last)
	}
	if _, err := inside.Lock("l", time.Minute); err == nil {
		t.Error("the isolated side got a lock that the other one holds")
	}
	if err := inside.Put("k", []byte("wrong"), 0); err == nil {
		t.Error("the isolated side acknowledged a write")
	} else if !errors.Is(err, state.ErrOutcomeUnknown) {
		t.Logf("a write of the isolated side: %v", err)
	}
	c.isolate(leader, (*proxy).heal)
	c.recover(t.Context(), "KV_proof", "KV_proof-locks")
	waitFor(t, func() bool { value, err := inside.Get("k"); return err == nil && string(value) == "new" })
	for i, watch := range watches {
		for ev := range watch {
			if ev.Operation != state.OpPut && inTime {
				t.Errorf("watch %d: %v instead of the refresh", i, ev)
			}
			if ev.Key == agent && ev.Operation == state.OpPut {
				break
			}
		}
	}
	if !inTime {
		t.Skipf("the election took too long to refresh the key, so nothing was shown of expiries: %s", found)
	}
}

func waitFor(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it never happened")
		}
	}
}
