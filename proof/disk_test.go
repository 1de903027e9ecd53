package proof

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"example.com/state"
)

// A smallDisk is a file system of limited size, in memory, which only the
// commands that are run in it see.
type smallDisk struct {
	dir    string
	keeper *exec.Cmd
}

// newSmallDisk returns a disk, or why the system has none for us.
func newSmallDisk(t *testing.T, size string) (*smallDisk, error) {
	d := &smallDisk{dir: filepath.Join(t.TempDir(), "disk")}
	if err := os.Mkdir(d.dir, 0o700); err != nil {
		return nil, err
	}
	d.keeper = exec.Command("unshare", "-Urm", "sh", "-c", "mount -t tmpfs -o size="+size+" none "+d.dir+" && echo ready && exec sleep 3600")
	d.keeper.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := d.keeper.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.keeper.Start(); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		_ = d.keeper.Process.Kill()
		_ = d.keeper.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		return nil, fmt.Errorf("no file system in memory: %v", err)
	}
	return d, nil
}

// command returns a command that sees the disk.
func (d *smallDisk) command(name string, args ...string) *exec.Cmd {
	in := []string{"-t", strconv.Itoa(d.keeper.Process.Pid), "-U", "-m", "--preserve-credentials", name}
	cmd := exec.Command("nsenter", append(in, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// TestFullDisk: on a disk that is full every call ends in time, and what was
// acknowledged stays. When there is room and the server was started again, the
// store works by itself. It is part of the long tests.
func TestFullDisk(t *testing.T) {
	if *long == 0 {
		t.Skip("part of the long tests: it needs namespaces of Linux")
	}
	d, err := newSmallDisk(t, "8m")
	if err != nil {
		t.Fatal(err)
	}
	binary, err := serverBinary()
	if err != nil {
		t.Fatal(err)
	}
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(t.TempDir(), "server.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "listen: \"127.0.0.1:%d\"\njetstream { store_dir: %q, max_file_store: 1GB }\n", ports[0], d.dir), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func() *exec.Cmd {
		cmd := d.command(binary, "-c", conf)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	stop := func(cmd *exec.Cmd) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	server := start()
	defer func() { stop(server) }()
	nc, err := nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", ports[0]), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	var s *state.NATSStore
	if err := eventually(20*time.Second, func() error {
		s, err = state.NewNATSStore(state.NATSStoreConfig{Conn: nc, Bucket: "proof"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, changes, err := state.Follow(t.Context(), s, "*")
	if err != nil {
		t.Fatal(err)
	}

	timed := func(what string, call func() error) error {
		began := time.Now()
		err := call()
		if took := time.Since(began); took > 11*time.Second {
			t.Errorf("%s took %v", what, took)
		}
		return err
	}
	value := make([]byte, 64<<10)
	var stored []string
	for n, failed := 0, 0; failed < 3 && n < 1000; n++ {
		key := fmt.Sprint("k", n)
		if err := timed("put", func() error { return s.Put(key, value, 0) }); err != nil {
			failed++
			t.Logf("put %d: %v", n, err)
		} else {
			stored = append(stored, key)
		}
	}
	if len(stored) == 0 || len(stored) == 1000 {
		t.Fatalf("%d values were stored on a disk of 8 MiB", len(stored))
	}
	for what, call := range map[string]func() error{
		"get":    func() error { _, err := s.Get(stored[0]); return err },
		"keys":   func() error { _, err := s.Keys("*"); return err },
		"lock":   func() error { _, err := s.Lock("l", time.Second); return err },
		"delete": func() error { return s.Delete(stored[0]) },
	} {
		t.Logf("%s on the full disk: %v", what, timed(what, call))
	}

	if out, err := d.command("mount", "-o", "remount,size=64m", d.dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	stop(server)
	server = start()
	if err := eventually(60*time.Second, func() error { return s.Put("again", value, 0) }); err != nil {
		t.Fatalf("the store does not come back: %v", err)
	}
	for _, key := range stored[1:] { // the first was deleted, perhaps
		if _, err := s.Get(key); err != nil {
			t.Errorf("%s, which was acknowledged: %v", key, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for {
		select {
		case ev, open := <-changes:
			if !open {
				t.Fatal("Follow has ended")
			}
			if ev.Key == "again" {
				return
			}
		case <-ctx.Done():
			t.Fatal(errors.New("Follow does not go on"))
		}
	}
}
