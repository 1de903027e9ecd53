package state

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// listBatch is how many messages a listing asks for at a time. For a smaller
	// stream it asks for spareBatch more than the stream holds: a request that is
	// filled does not show the end, and new writes could fill a small surplus.
	listBatch  = 16384
	spareBatch = 1024
	// listHeartbeat is how long a listing waits at the end of the stream until
	// the server says that it is the end.
	listHeartbeat = 50 * time.Millisecond
	// listLife is how long the server keeps the consumer of a listing that is
	// not asked for anything. The server checks at this interval whether the
	// consumer is in use; a status that it sends then may not mean the end.
	listLife = time.Minute
	// fewBytes is the most bytes of values that a listing of few keys may return.
	fewBytes = 1 << 20
	// smallMsg is the average size up to which messages are cheaper to send as
	// they are than to copy without their values.
	smallMsg = 512
)

// A listed is the last record of a key.
type listed struct {
	key string
	record
}

// A listing is what a bucket holds of a pattern, markers and what has expired
// included, sorted by key. It has every change that was acknowledged before it
// began.
type listing struct {
	all []listed
	// now is the server's clock when it began. What existed then, or was written since,
	// has a later deadline.
	now    timestamp
	maxAge time.Duration // the bucket's, by which the deadlines are
}

// has reports whether the listing has a record of the key.
func (l *listing) has(key string) bool {
	_, found := slices.BinarySearchFunc(l.all, key, func(r listed, key string) int { return strings.Compare(r.key, key) })
	return found
}

// list reads all records of keys that match the pattern, with their values or
// without. The consumer may be on a server that fails meanwhile; then it starts
// over, for up to five seconds. It costs four requests, and more for each 16,384
// keys or 4 MiB.
//
// A leader whose last sequence is lower than since is one that does not lead any more.
func (b *bucket) list(budget *retryBudget, p pattern, values bool, since uint64) (listing, error) {
	if !p.wild && (since == 0 || !b.replicated()) {
		l := listing{now: b.clock.now(), maxAge: b.settings.Load().MaxAge}
		r, exists, err := b.lookUp(budget, p.prefix, b.leaderLast)
		if err == nil && r.revision != 0 {
			l.all = []listed{{p.prefix, r}}
		}
		switch { // what was found out is more exact
		case !exists:
			l.now = max(l.now, r.deadline)
		case r.deadline != 0:
			l.now = min(l.now, r.deadline-1)
		}
		return l, err
	}
	var failed time.Time // when the first try failed
	var laggard string   // the server that it met, and that lags
	for tries := 1; ; tries++ {
		info, err := b.info(budget)
		if err != nil {
			return listing{}, err
		}
		if info.State.LastSeq < since {
			if err := b.waitAfter(budget, errStaleLeader); err != nil {
				return listing{}, err
			}
			tries--
			continue
		}
		l := listing{now: timestamp(info.Now.UnixNano()), maxAge: info.config.MaxAge}
		var ok bool
		if l.all, ok = b.listFew(budget, p, info); !ok {
			l.all, err = b.listOnce(budget, p, info, values, &laggard)
		}
		if err == nil {
			l.all = sortAndDedupe(l.all)
			return l, nil
		}
		if failed.IsZero() {
			failed = time.Now()
		}
		if !errors.Is(err, errStartOver) && !passing(err) || tries == 5 || time.Since(failed) > opTimeout {
			return listing{}, err
		}
		if err := b.waitAfter(budget, err); err != nil {
			return listing{}, err
		}
		b.retrying(budget, b.filter(p))
	}
}

// sortAndDedupe sorts records by key and keeps the last one of each.
func sortAndDedupe(all []listed) []listed {
	sorted := true
	for i := 1; i < len(all) && sorted; i++ {
		sorted = all[i-1].key < all[i].key
	}
	if sorted {
		return all
	}
	slices.SortFunc(all, func(x, y listed) int {
		if c := strings.Compare(x.key, y.key); c != 0 {
			return c
		}
		return cmp.Compare(y.revision, x.revision)
	})
	return slices.CompactFunc(all, func(x, y listed) bool { return x.key == y.key })
}

// listFew lists with one request that the server answers from its index, if few
// keys match. A consumer, which reads on through the stream, costs less for each
// key but something for every other one that it passes. It reports whether it
// could: on one server, and if the answer is whole and the stream's own.
func (b *bucket) listFew(budget *retryBudget, p pattern, info *streamInfo) (all []listed, ok bool) {
	most := int(min(max(info.State.Messages/32, 64), 1024)) // 1024 is the server's limit
	if !b.direct() || p.prefix == "" {
		return nil, false
	}
	req, err := json.Marshal(struct {
		LastOf   []string `json:"multi_last"`
		Batch    int      `json:"batch"`
		MaxBytes int      `json:"max_bytes"`
	}{[]string{b.filter(p)}, most, fewBytes})
	if err != nil {
		return nil, false
	}
	answers, err := b.doMany(budget, &nats.Msg{Subject: b.api + "DIRECT.GET." + b.stream, Data: req}, most+1, func(msg *nats.Msg) bool {
		return statusOf(msg) != ""
	})
	if err != nil || len(answers) == 0 {
		return nil, false
	}
	end := answers[len(answers)-1]
	answers = answers[:len(answers)-1]
	// That there is nothing, or nothing more, counts if the stream itself says
	// so: its last sequence is not behind the leader's.
	upTo, _ := strconv.ParseUint(end.Header.Get("Nats-UpTo-Sequence"), 10, 64)
	if statusOf(end) != "204" || upTo < info.State.LastSeq || len(answers) == 0 {
		return nil, false
	}
	for i, msg := range answers {
		rec, ok := directRecord(msg, b.stream, info.config.MaxAge)
		pending := msg.Header["Nats-Num-Pending"]
		subjects := msg.Header["Nats-Subject"]
		if !ok || len(pending) == 0 || len(subjects) == 0 {
			return nil, false
		}
		if behind, err := strconv.Atoi(pending[len(pending)-1]); err != nil || behind != len(answers)-1-i {
			return nil, false
		}
		if key, ok := b.key(p, subjects[len(subjects)-1]); ok {
			all = append(all, listed{key, rec})
		}
	}
	return all, true
}

// errStartOver is for a listing that was cut short by something that passes.
var errStartOver = errors.New("the listing was cut short")

// errReplicaLags is why, if the consumer's server has not got what is to be listed.
var errReplicaLags = errors.New("a replica lags")

// listOnce lists with one consumer, which reads the stream from its first message
// to its last one. So every key is delivered: its record stays where it is or, if
// it is written again, moves to the end. The end was reached when the server ends
// a request that does not wait, after it had brought something; or when it sends
// a heartbeat for one that had brought nothing. All other signs can err: the
// number of pending messages, the end of a request's time, and even the end of
// a request that does not wait, when the server checks whether the consumer is
// still in use; by then the end has to be seen twice.
//
// In a cluster the consumer may be on a server that lags, or that has just lost its
// replica. The list is complete when it has come to the last message that the leader
// had before, or to a later one.
//
// laggard names a server that lags, which the consumer is not to be on, and is set if
// this listing meets one.
//
// With a history it reads what has been replaced, too. A consumer that delivers the
// last message of every key leaves some out: it stops short where one was removed
// meanwhile, as it does at the end, and skips one that exceeds the bytes asked for.
func (b *bucket) listOnce(budget *retryBudget, p pattern, info *streamInfo, values bool, laggard *string) ([]listed, error) {
	filter, began := b.filter(p), time.Now()
	l := &listRun{b: b, pattern: p, maxAge: info.config.MaxAge, values: values}
	if info.clustered() {
		msg, err := b.leaderMsg(budget, filter)
		if err == nil && msg == nil {
			msg, err = b.leaderMsg(budget, filter) // see below
		}
		if err != nil || msg == nil {
			return nil, err
		}
		l.upTo = msg.Seq
	}
	small := info.State.Bytes <= smallMsg*info.State.Messages
	l.headersOnly = !values && !small
	l.batch = int(min(info.State.Messages+spareBatch, listBatch))
	l.epoch = b.currentEpoch()
	var err error
	if l.source, err = b.consume(budget, consumption{
		filter: filter, headersOnly: l.headersOnly, avoid: *laggard, batch: l.batch, life: listLife,
	}); err != nil {
		return nil, err
	}
	defer l.source.stop()
	if l.source.info.Pending == 0 && l.upTo == 0 {
		// A server that is stopping may say that there is nothing. After that it
		// does not know the stream any more.
		msg, err := b.leaderMsg(budget, filter)
		if err == nil && msg != nil {
			err = fmt.Errorf("%w: there is something", errStartOver)
		}
		return nil, err
	}
	if info.config.PerKey == 1 {
		l.all = make([]listed, 0, l.source.info.Pending)
	} else {
		l.places = make(map[string]int)
	}
	l.timer = time.NewTimer(checkInterval)
	defer l.timer.Stop()

	for ends := 0; ; { // how often the end was seen in a row
		got, st, err := l.pull(budget)
		if err != nil {
			if errors.Is(err, errReplicaLags) {
				*laggard = l.source.info.Cluster.Server
			}
			return nil, err
		}
		switch {
		case st.code == "100", st.code == "404":
			if ends++; l.last >= l.upTo && (ends > 1 || time.Since(began) < listLife-opTimeout) {
				return l.all, nil
			}
			continue
		case st.code == "", st.code == "408", st.code == "smaller", st.code == "bytes":
			// There may be more.
		default:
			return nil, fmt.Errorf("%w: status %s", errStartOver, st.code)
		}
		if got > 0 {
			ends = 0
		}
	}
}

// A listRun is one run through a stream for a listing.
type listRun struct {
	b           *bucket
	pattern     pattern
	maxAge      time.Duration
	values      bool // whether to keep the values
	headersOnly bool // whether the source delivers headers only

	source *consumer
	batch  int
	epoch  *epoch // in which it began
	timer  *time.Timer

	upTo uint64 // what must have come
	last uint64 // what has come
	lags int    // how often the source had nothing to send of what must come
	all  []listed
	// places says where in all each key is, if there may be several records of one.
	places map[string]int
}

// pull makes one request for messages, and takes over what it brings. It returns
// how many those were, and the status that ended the request.
func (l *listRun) pull(budget *retryBudget) (got int, st status, err error) {
	began := time.Now()
	asked, err := l.source.pull(pullRequest{Batch: l.batch, NoWait: true, Expires: opTimeout, Heartbeat: listHeartbeat})
	if err != nil {
		return 0, st, fmt.Errorf("%w: %w", errStartOver, err)
	}
	// The server sends no status when a request has brought exactly its bytes.
	for got < asked && st.code == "" && l.source.left != 0 {
		msg, err := l.source.next(budget, l.epoch, l.timer)
		if err != nil {
			return got, st, err
		}
		var d delivery
		if d, st, err = l.source.accept(msg); err != nil {
			return got, st, fmt.Errorf("%w: %w", errStartOver, err)
		}
		switch {
		case st.code == "":
			got, l.last = got+1, d.seq
			if err := l.add(budget, msg, d); err != nil {
				return got, st, err
			}
		case st.code == "0":
			st.code = ""
		case st.ended && st.unsent == 0 && got == 0:
			st.code = "" // the request before this one has brought all of it
		case st.code == "100" && got > 0:
			st.code = "" // the next message takes its time
		case st.code == "100" && l.last < l.upTo:
			// The replica lags: the request waits on for what is missing.
			if l.lags++; l.lags > 40 {
				return got, st, fmt.Errorf("%w: %w", errStartOver, errReplicaLags)
			}
			st.code = ""
		}
	}
	if got > 0 && time.Since(began) < fastPull {
		l.source.bytes = max(l.source.bytes, min(2*l.source.bytes, maxPullBytes))
	}
	if st.code == "408" && got > 0 && time.Since(began) < opTimeout/2 {
		st.code = "404" // what servers say that are older, long before the time is up
	}
	return got, st, nil
}

// add adds the record of a message, if its key matches.
func (l *listRun) add(budget *retryBudget, msg *nats.Msg, d delivery) error {
	key, ok := l.b.key(l.pattern, msg.Subject)
	if !ok {
		return nil
	}
	rec := decode(msg.Header, msg.Data, d.seq, d.written, l.maxAge)
	if unreadable(msg) || l.headersOnly && !appended(msg, "Nats-Msg-Size") {
		// The headers could not be decoded, or the one that the server adds changes
		// how they read.
		var err error
		if rec, err = l.b.leaderRecord(budget, key); err != nil || rec.revision == 0 {
			return err
		}
	}
	if !l.values {
		rec.value = nil
	}
	if at, known := l.places[key]; known {
		if rec.revision > l.all[at].revision {
			l.all[at].record = rec
		}
		return nil
	}
	if l.places != nil {
		l.places[key] = len(l.all)
	}
	l.all = append(l.all, listed{key, rec})
	return nil
}

// next returns the next message of a request, or a status. Its error wraps
// errStartOver unless the caller or the store has ended the call.
func (c *consumer) next(budget *retryBudget, e *epoch, timer *time.Timer) (*nats.Msg, error) {
	select {
	case msg := <-c.mail:
		return msg, nil
	default:
	}
	w := newWaiter(c.b.requester, budget, e, c.request, once, timer)
	msg, err := await(&w, c.mail)
	switch {
	case err == nil:
		budget.progress()
		if statusOf(msg) == "" {
			budget.begun = time.Now() // however long the listing is
		}
	case c.b.ended(budget) == nil:
		err = fmt.Errorf("%w: %w", errStartOver, err)
	}
	return msg, err
}

// existing yields the records of the keys that existed when the listing began, or
// were written since. A value whose deadline has passed meanwhile may have been
// replaced in time, after it was read.
func (l *listing) existing() iter.Seq[*listed] {
	return func(yield func(*listed) bool) {
		for i := range l.all {
			if r := &l.all[i]; !r.deleted && !r.deadline.passed(l.now) && !yield(r) {
				return
			}
		}
	}
}

// keys returns the keys that exist and match the pattern, sorted.
func (b *bucket) keys(budget *retryBudget, p pattern) ([]string, error) {
	l, err := b.list(budget, p, false, 0)
	if err != nil {
		return nil, err
	}
	keys := make([]string, 0, len(l.all))
	for r := range l.existing() {
		keys = append(keys, r.key)
	}
	return keys, nil
}

// entries returns the entries that exist and match the pattern, sorted by key.
func (l *listing) entries() []*KeyValue {
	entries := make([]*KeyValue, 0, len(l.all))
	for r := range l.existing() {
		entries = append(entries, r.event(r.key, r.deadline))
	}
	return entries
}
