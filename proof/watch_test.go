package proof

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"example.com/state"
)

// A sighting is what a reader was shown of a revision. An expiry has the
// revision of what expired.
type sighting struct {
	revision uint64
	op       state.Operation
}

// removed reports whether a deletion is one that left no message, as that of a
// key in a full bucket: it has the revision of the value, and the time at which it
// was found.
func (l *load) removed(kv *state.KeyValue) bool {
	if l.evicts {
		return kv.Operation == state.OpDelete
	}
	put, seen := l.sightings.Load(sighting{kv.Revision, state.OpPut})
	return kv.Operation == state.OpDelete && seen && put.(*state.KeyValue).Expires.IsZero()
}

// show holds what a reader was shown against what others were.
func (l *load) show(kv *state.KeyValue) {
	is := *kv
	before, known := l.sightings.LoadOrStore(sighting{kv.Revision, kv.Operation}, &is)
	if was := before.(*state.KeyValue); known {
		same := was.Key == kv.Key && string(was.Value) == string(kv.Value) && was.Created.Equal(kv.Created) &&
			(was.Modified.Equal(kv.Modified) || l.removed(kv))
		if !same || !l.vague(l.writeOf(kv)) && !was.Expires.Equal(kv.Expires) {
			l.broke("revision %d was %+v to one reader and %+v to another", kv.Revision, brief(was), brief(kv))
		}
	}
	if kv.Operation == state.OpDelete {
		if kv.Value != nil || !kv.Created.IsZero() || !kv.Expires.IsZero() || kv.Modified.IsZero() || kv.Revision == 0 {
			l.broke("malformed deletion %+v", brief(kv))
		}
		return
	}
	if kv.Value == nil || kv.Created.IsZero() || kv.Modified.Before(kv.Created) || kv.Operation != state.OpPut || kv.Revision == 0 {
		l.broke("malformed entry %+v", brief(kv))
	}
	switch w := l.writeOf(kv); {
	case w == nil:
		l.broke("%s: nobody wrote %q", kv.Key, brief(kv).Value)
	case l.vague(w):
	case (w.ttl == 0) != kv.Expires.IsZero() || w.ttl > 0 && !kv.Expires.Equal(kv.Modified.Add(w.ttl)):
		l.broke("%s: revision %d of %v expires at %v with a TTL of %v", kv.Key, kv.Revision, kv.Modified, kv.Expires, w.ttl)
	}
}

// vague reports whether the deadline of a write depends on what an operator does.
func (l *load) vague(w *write) bool {
	return l.evicts || l.ages && w != nil && (w.ttl == 0 || w.ttl >= time.Hour)
}

// writeOf returns the write of a value, nil for a deletion.
func (l *load) writeOf(kv *state.KeyValue) *write {
	if kv.Operation != state.OpPut {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.values[kv.Key][string(kv.Value)]
}

// brief returns an entry without most of a long value.
func brief(kv *state.KeyValue) state.KeyValue {
	short := *kv
	short.Value = short.Value[:min(len(short.Value), 40)]
	return short
}

// A watched is a watch, or a Follow, and what it reported.
type watched struct {
	pattern string
	slow    bool
	follow  bool
	done    sync.WaitGroup

	mu     sync.Mutex // guards what follows
	events map[string][]*state.KeyValue
	passed []passing
	ended  bool
}

// A passing is the write of an event. When the event came, the watch had dealt with
// all that had been acknowledged before that write began.
type passing struct {
	revision      uint64
	written, came int64
}

func (w *watched) start(ctx context.Context, l *load, s state.Store) error {
	w.events = map[string][]*state.KeyValue{}
	var events <-chan *state.KeyValue
	var err error
	if w.follow {
		var current []*state.KeyValue
		current, events, err = state.Follow(ctx, s, w.pattern)
		for _, kv := range current {
			w.take(l, kv)
		}
	} else {
		events, err = s.WithContext(ctx).Watch(w.pattern)
	}
	if err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	w.done.Go(func() { w.read(l, events) })
	return nil
}

func (w *watched) String() string {
	if w.follow {
		return "follow " + w.pattern
	}
	return "watch " + w.pattern
}

func (w *watched) read(l *load, events <-chan *state.KeyValue) {
	for kv := range events {
		l.events.Add(1)
		w.take(l, kv)
		if w.slow && rand.IntN(200) == 0 {
			time.Sleep(100 * time.Millisecond)
		}
	}
	w.mu.Lock()
	w.ended = true
	w.mu.Unlock()
}

func (w *watched) take(l *load, kv *state.KeyValue) {
	if strings.HasPrefix(kv.Key, noise) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	told := w.events[kv.Key]
	if is := l.writeOf(kv); is != nil {
		w.passed = append(w.passed, passing{kv.Revision, is.call, l.now()})
	}
	w.check(l, told, kv)
	w.events[kv.Key] = append(told, kv)
}

// noise begins the keys that nobody looks at.
const noise = "noise."

// check holds an event against the rules for each one.
func (w *watched) check(l *load, told []*state.KeyValue, kv *state.KeyValue) {
	if !state.MatchPattern(w.pattern, kv.Key) {
		l.broke("%v reported %s", w, kv.Key)
	}
	last := &state.KeyValue{Operation: state.OpDelete}
	if len(told) > 0 {
		last = told[len(told)-1]
	}
	if kv.Operation == state.OpPut {
		l.show(kv)
		switch {
		case kv.Revision <= last.Revision:
			l.broke("%v: %s: revision %d after %d", w, kv.Key, kv.Revision, last.Revision)
		case kv.Modified.Before(last.Modified) && !(w.follow && last.Operation == state.OpDelete):
			l.broke("%v: %s: revision %d was written at %v, after an event of %v, %v", w, kv.Key, kv.Revision, kv.Modified, last.Operation, last.Modified)
		}
		return
	}
	expiry := last.Operation == state.OpPut && kv.Revision == last.Revision
	found := w.follow && expiry && l.cut.Load() // it may have been found by a listing
	if !found {
		l.show(kv)
	}
	switch {
	case expiry && l.vague(l.writeOf(last)), found:
	case expiry:
		if last.Expires.IsZero() || !kv.Modified.Equal(last.Expires) {
			l.broke("%v: %s: revision %d expired at %v instead of %v", w, kv.Key, kv.Revision, kv.Modified, last.Expires)
		}
		w.checkExpiry(l, told)
	case kv.Revision <= last.Revision:
		l.broke("%v: %s: deletion %d after %v %d", w, kv.Key, kv.Revision, last.Operation, last.Revision)
	case w.follow && last.Operation == state.OpDelete:
		l.broke("%v: %s: deletion %d of what does not exist", w, kv.Key, kv.Revision)
	}
}

// checkExpiry checks that the last entry of those told is reported as expired at
// its deadline, and that it was not refreshed in time.
func (w *watched) checkExpiry(l *load, told []*state.KeyValue) {
	now, kv := l.now(), told[len(told)-1]
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.values[kv.Key][string(kv.Value)]
	if was == nil {
		return
	}
	problem := ""
	switch late := time.Duration(now - was.ret - int64(was.ttl)); {
	case now < was.call+int64(was.ttl):
		problem = fmt.Sprintf("was reported as expired %v too early", time.Duration(was.call+int64(was.ttl)-now))
	case was.ret != never && late > expiryWithin+l.transfer+l.slack() && l.quiet && !w.slow:
		problem = fmt.Sprintf("was reported as expired %v too late", late)
	}
	for _, next := range l.written[kv.Key] {
		if was.ret != never && next.call > was.ret && next.ret < was.call+int64(was.ttl) {
			problem = fmt.Sprintf("was reported as expired, though it was replaced in time by %.20q: it was written from %v to %v, and that from %v to %v, it is %v now, and the events were",
				next.value, time.Duration(was.call), time.Duration(was.ret), time.Duration(next.call), time.Duration(next.ret), time.Duration(now))
			for _, ev := range told[max(len(told)-5, 0):] {
				problem += fmt.Sprintf(" %v %d of %v %.20q,", ev.Operation, ev.Revision, ev.Modified, ev.Value)
			}
		}
	}
	if problem != "" && len(l.broken) < 20 {
		l.broken = append(l.broken, fmt.Sprintf("%v: %s: revision %d %s", w, kv.Key, kv.Revision, problem))
	}
}

// expiryWithin is how soon after its deadline an expiry is reported.
const expiryWithin = time.Second

// endWatches waits until the watches have caught up, and compares what they
// reported with what was written, and with what there is.
func (l *load) endWatches(reader state.Store, cache *state.Cache) {
	// Whatever was written before comes before this. It is written until that
	// succeeds, since servers may just be coming back.
	const barrier = "reg.end"
	w := l.write(barrier, "end", 0)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := reader.Put(barrier, []byte("end"), 0)
		if err == nil {
			l.acked(w)
			break
		}
		if time.Now().After(end) {
			l.broke("no write succeeds any more: %v", err)
			return
		}
	}
	var entries []*state.KeyValue
	limit := max(20*time.Second, l.catchUp)
	err := eventually(limit, func() (err error) {
		entries, err = reader.Entries("*")
		return err
	})
	if err != nil {
		l.broke("entries: %v", err)
		return
	}
	final := map[string]*state.KeyValue{}
	for i, kv := range entries {
		if i > 0 && entries[i-1].Key >= kv.Key {
			l.broke("entries are not sorted, or not unique: %s before %s", entries[i-1].Key, kv.Key)
		}
		if strings.HasPrefix(kv.Key, noise) {
			continue
		}
		l.show(kv)
		final[kv.Key] = kv
	}
	for key := range final {
		if strings.HasPrefix(key, "ttl") {
			continue
		}
		var kv *state.KeyValue
		err := eventually(limit, func() (err error) {
			if kv, err = reader.GetKeyValue(key); errors.Is(err, state.ErrNotFound) {
				kv, err = &state.KeyValue{}, nil
			}
			return err
		})
		if err != nil || kv.Revision != final[key].Revision {
			l.broke("%s is listed but not there: %v, %v", key, kv, err)
		}
	}
	for _, w := range l.watched {
		if err := eventually(l.catchUp, func() error { return w.differs(l, final) }); err != nil {
			l.broke("%v: %v", w, err)
		}
		if !w.slow && (!w.follow || !l.cut.Load()) { // a Follow may have begun again
			w.checkComplete(l)
		}
	}
	if err := eventually(l.catchUp, func() error { return l.sameAsCache(final, cache) }); err != nil {
		l.broke("cache: %v", err)
	}
	l.mu.Lock()
	agree := len(l.broken) == 0
	l.mu.Unlock()
	if agree {
		return
	}
	// Was it the list?
	again, err := reader.Entries("*")
	l.note(-1, "the last list had %d keys; now there are %d: %v", len(entries), len(again), err)
	for _, kv := range again {
		if final[kv.Key] == nil && !strings.HasPrefix(kv.Key, noise) && !strings.HasPrefix(kv.Key, "ttl") {
			l.broke("%s, revision %d, was missing in the last list, and is there", kv.Key, kv.Revision)
		}
	}
}

// eventually tries until that succeeds, or the time is over.
func eventually(d time.Duration, try func() error) error {
	for end := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		if err := try(); err == nil || time.Now().After(end) {
			return err
		}
	}
}

// differs says how the last event of each key is not its final state.
func (w *watched) differs(l *load, final map[string]*state.KeyValue) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended && l.endable && !w.follow {
		return nil
	}
	if w.ended {
		return fmt.Errorf("it has ended")
	}
	var wrong []string
	for key, kv := range final {
		if !state.MatchPattern(w.pattern, key) || key[:3] == "ttl" {
			continue
		}
		told := w.events[key]
		if len(told) == 0 {
			wrong = append(wrong, fmt.Sprintf("%s, which is at revision %d, was not reported", key, kv.Revision))
		} else if last := told[len(told)-1]; last.Revision != kv.Revision || last.Operation != state.OpPut {
			wrong = append(wrong, fmt.Sprintf("%s is at revision %d, the last event was %v %d", key, kv.Revision, last.Operation, last.Revision))
		}
	}
	if len(wrong) > 0 {
		return errors.New(strings.Join(wrong, "; "))
	}
	for key, told := range w.events {
		last := told[len(told)-1]
		if last.Operation == state.OpPut && (final[key] == nil && !l.deletedWhileFull(key) || key[:3] == "ttl") {
			return fmt.Errorf("%s is gone, the last event was put %d", key, last.Revision)
		}
	}
	return nil
}

// stood is for how long a value must have stood after something later was delivered.
// When its deadline has passed, the marker of a watch may replace it.
const stood = 500 * time.Millisecond

// checkComplete checks that nothing was skipped but what was gone before the watch
// could deliver it.
func (w *watched) checkComplete(l *load) {
	w.mu.Lock()
	defer w.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	passed := w.inOrder()
	for key, writes := range l.written {
		if !state.MatchPattern(w.pattern, key) {
			continue
		}
		told := map[string]bool{}
		for _, kv := range w.events[key] {
			told[string(kv.Value)] = true
		}
		for _, is := range writes {
			if is.value == "" || is.ret == never || told[is.value] {
				continue
			}
			gone := int64(never)
			if is.ttl > 0 {
				gone = is.call + int64(is.ttl)
			}
			for _, other := range writes {
				// In a bubble several may be written at the same time.
				if other != is && !other.refused && other.ret >= is.call {
					gone = min(gone, other.call)
				}
			}
			came := past(passed, is.ret)
			if came < gone-int64(stood+l.transfer) && len(l.broken) < 20 {
				l.broken = append(l.broken, fmt.Sprintf("%v: %s: %.20q, which was written from %v to %v and stood until %v, was not reported, and what was written after it came at %v",
					w, key, is.value, time.Duration(is.call), time.Duration(is.ret), time.Duration(gone), time.Duration(came)))
			}
		}
	}
}

// inOrder returns what the watch passed in the order of the stream, each written later
// than the one before. An event that took the place of an older one, in a queue that
// was full, came before its turn.
func (w *watched) inOrder() []passing {
	var kept []passing
	next := uint64(math.MaxUint64)
	for _, p := range slices.Backward(w.passed) {
		if p.revision < next {
			next = p.revision
			kept = append(kept, p)
		}
	}
	slices.Reverse(kept)
	last := int64(-1)
	return slices.DeleteFunc(kept, func(p passing) bool {
		if p.written <= last {
			return true
		}
		last = p.written
		return false
	})
}

// past returns when the first thing that was written after then was delivered.
func past(passed []passing, then int64) int64 {
	i, _ := slices.BinarySearchFunc(passed, then, func(p passing, then int64) int { return cmp.Compare(p.written, then+1) })
	if i == len(passed) {
		return never
	}
	return passed[i].came
}

// wasFull notes when there may have been no room even for a deletion.
func (l *load) wasFull(from, to int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.full = append(l.full, window{from, to})
}

// deletedWhileFull reports whether a key may have been deleted without a message,
// which watches find out minutes later.
func (l *load) deletedWhileFull(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.written[key], func(w *write) bool {
		ret := min(w.ret, w.call+int64(10*time.Second)) // if its outcome is not known
		return w.value == "" && slices.ContainsFunc(l.full, func(full window) bool { return ret >= full.from && w.call <= full.to })
	})
}

// sameAsCache says how a cache is not what there is.
func (l *load) sameAsCache(final map[string]*state.KeyValue, cache *state.Cache) error {
	entries, err := cache.Entries("*")
	if err != nil {
		return err
	}
	for _, kv := range entries {
		is := final[kv.Key]
		switch {
		case strings.HasPrefix(kv.Key, noise):
		case strings.HasPrefix(kv.Key, "ttl"):
			return fmt.Errorf("%s has expired and is still there", kv.Key)
		case is == nil && l.deletedWhileFull(kv.Key):
		case is == nil || is.Revision != kv.Revision || string(is.Value) != string(kv.Value) || !is.Modified.Equal(kv.Modified) || !is.Created.Equal(kv.Created):
			return fmt.Errorf("it holds %+v, and there is %+v", brief(kv), is)
		}
	}
	for key := range final {
		if _, err := cache.Get(key); err != nil && !strings.HasPrefix(key, "ttl") {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}
