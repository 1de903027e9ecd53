package proof

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"example.com/state"
)

// An account is one that all clients of a scenario log in to, and that an
// operator changes.
type account struct {
	mu       sync.Mutex // guards what follows
	password string
	deny     []string // what clients may not publish to
	limits   string   // of JetStream, as in a configuration file
}

// usual returns an account without limits.
func usual() *account { return &account{password: "first", limits: "max_file: 1G, max_memory: 1G"} }

// login returns the credentials of clients.
func (a *account) login() (user, password string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return "client", a.password
}

// configuration returns what a server's configuration file says of the account.
func (a *account) configuration() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	permissions := ""
	if len(a.deny) > 0 {
		permissions = fmt.Sprintf(`, permissions: {publish: {allow: ">", deny: ["%s"]}}`, strings.Join(a.deny, `", "`))
	}
	return fmt.Sprintf(`accounts { PROOF {
	jetstream: {%s}
	users: [{user: admin, password: admin}, {user: client, password: %q%s}]
} }
`, a.limits, a.password, permissions)
}

// configure writes the server's configuration file.
func (n *node) configure(a *account) error {
	text := n.fixed
	if a != nil {
		text += a.configuration()
	}
	return os.WriteFile(n.conf, []byte(text), 0o600)
}

// change changes the account, and has the servers read their configuration
// again. They run in this process.
func (f *trouble) change(what string, change func(a *account)) {
	f.tell("%s", what)
	f.account.mu.Lock()
	change(f.account)
	f.account.mu.Unlock()
	for _, n := range f.nodes {
		err := n.configure(f.account)
		if err == nil {
			err = n.srv.Reload()
		}
		if err != nil {
			f.load.broke("%s: %v", what, err)
		}
	}
}

// during changes the account for a while.
func during(what string, change, undo func(a *account)) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		f.count()
		f.load.cut.Store(true)
		f.change(what, change)
		sleep(ctx, between(200*time.Millisecond, 4*time.Second))
		f.change("as it was", undo)
		f.recover(ctx, f.streams...)
	}
}

// deny takes a permission away for a while.
func deny(subjects ...string) func(context.Context, *trouble) {
	return during(fmt.Sprint("no permission for ", subjects),
		func(a *account) { a.deny = subjects }, func(a *account) { a.deny = nil })
}

// limit sets limits of JetStream for a while.
func limit(limits string) func(context.Context, *trouble) {
	return full(during(limits, func(a *account) { a.limits = limits }, func(a *account) { a.limits = usual().limits }))
}

// full notes when a fault fills what holds the data.
func full(fault func(context.Context, *trouble)) func(context.Context, *trouble) {
	return func(ctx context.Context, f *trouble) {
		from := f.load.now()
		fault(ctx, f)
		f.load.wasFull(from, f.load.now())
	}
}

// replaceCredentials gives all clients another password.
func replaceCredentials(_ context.Context, f *trouble) {
	f.count()
	f.load.cut.Store(true)
	f.change("another password", func(a *account) { a.password = fmt.Sprint("password-", f.load.now()) })
}

// setting changes a setting of the data bucket for a while.
func setting(field string, value int) func(context.Context, *trouble) {
	return full(func(ctx context.Context, f *trouble) {
		f.count()
		f.load.cut.Store(true)
		if err := f.reconfigure(field, value); err != nil {
			f.tell("not done: %v", err)
			return
		}
		sleep(ctx, between(200*time.Millisecond, 4*time.Second))
		if err := eventually(10*time.Second, func() error { return f.reconfigure(field, -1) }); err != nil {
			f.load.broke("%s stays as it is: %v", field, err)
		}
		f.recover(ctx, f.streams...)
	})
}

// limited adjusts a load to an operator who sets limits.
func limited(l *load) {
	l.evicts, l.endable, l.late = true, true, 20*time.Second
	l.allowed = []error{state.ErrStoreFull, state.ErrValueTooLarge}
}
