package statetest

import (
	"container/list"
	"context"
	"fmt"
	"time"

	"example.com/state"
)

// replacedWithin is for how long SkipReplaced holds a state back.
const replacedWithin = time.Second

// A watchEffect is what is to happen to a watch.
type watchEffect struct {
	set   bool
	after int // instead of delivering the event after so many
	end   bool
	cut   time.Duration
	skip  bool
}

// Watch implements [state.StateStore].
func (s *Store) Watch(pattern string) (<-chan *state.KeyValue, error) {
	ctx, cancel := context.WithCancel(s.ctx)
	c := s.call(Watch, pattern)
	source, err := run(c, checkPattern(pattern), func(state.Store) (<-chan *state.KeyValue, error) {
		return s.below.WithContext(ctx).Watch(pattern)
	})
	if err != nil {
		cancel()
		return nil, err
	}
	w := &watch{
		s:        s.core,
		pattern:  pattern,
		reader:   make(chan *state.KeyValue),
		commands: make(chan func(*watch)),
		done:     make(chan struct{}),
		todo:     c.opens,
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		cancel()
		return nil, state.ErrClosed
	}
	s.opened[pattern]++
	w.number = s.opened[pattern]
	s.watches[w] = struct{}{}
	s.active.Go(func() {
		defer cancel()
		w.run(ctx, source)
		s.mu.Lock()
		delete(s.watches, w)
		s.mu.Unlock()
	})
	return w.reader, nil
}

// A watch hands the events of a watch of the store below to its reader. One
// goroutine, that of run, owns it.
type watch struct {
	s        *core
	pattern  string
	number   int // counts the watches of its pattern, from 1
	reader   chan *state.KeyValue
	commands chan func(*watch) // what to do next
	done     chan struct{}     // closed when it has ended

	todo     watchEffect
	events   int // how many have come
	waiting  backlog
	held     *time.Timer // not nil while it delivers nothing
	until    time.Time
	cut      time.Time // since when it is cut off; zero if it only waits
	skipping bool      // until a waiting event is replaced
	ended    bool
}

// do has the watch do something, and returns when it has done it or has ended.
func (w *watch) do(f func(*watch)) {
	ended := make(chan bool, 1)
	select {
	case w.commands <- func(w *watch) { f(w); ended <- w.ended }:
		if !<-ended {
			return
		}
	case <-w.done:
	}
	<-w.done
}

func (w *watch) run(ctx context.Context, source <-chan *state.KeyValue) {
	defer close(w.done)
	defer close(w.reader)
	defer w.release()
	for !w.ended {
		var (
			reader chan<- *state.KeyValue
			next   *state.KeyValue
			in     = source
			timer  <-chan time.Time
		)
		switch {
		case w.held != nil:
			timer = w.held.C
		case w.waiting.len() > 0:
			// What comes after it waits in the store below, which knows what
			// to skip for a slow reader.
			reader, next, in = w.reader, w.waiting.first(), nil
		case source == nil:
			return
		}
		select {
		case ev, open := <-in:
			if !open {
				source = nil // what waits is still delivered
				continue
			}
			w.receive(ev)
		case reader <- next:
			w.waiting.pop()
		case <-timer:
			if time.Now().Before(w.until) {
				w.end() // it has been cut off for too long
			} else {
				w.release()
			}
		case f := <-w.commands:
			f(w)
		case <-ctx.Done():
			return
		case <-w.s.quit:
			return
		}
	}
}

// receive queues an event in place of an older one of its key, unless something
// happens to the watch.
func (w *watch) receive(ev *state.KeyValue) {
	w.events++
	if w.todo.set && w.events > w.todo.after {
		w.suffer(w.todo)
		w.todo = watchEffect{}
	} else if e, what := w.s.strikes(w); what != "" {
		w.s.note("event", w.pattern, w.events, what)
		w.suffer(e)
	}
	if replaced := w.waiting.push(ev); replaced && w.skipping {
		w.release()
	}
}

// A backlog holds the last event of every key, in the order of the events. The
// zero backlog is empty.
type backlog struct {
	events list.List
	of     map[string]*list.Element
}

func (b *backlog) len() int { return b.events.Len() }

func (b *backlog) first() *state.KeyValue {
	return b.events.Front().Value.(*state.KeyValue)
}

func (b *backlog) pop() {
	delete(b.of, b.events.Remove(b.events.Front()).(*state.KeyValue).Key)
}

// push adds an event and reports whether it replaces another one.
func (b *backlog) push(ev *state.KeyValue) (replaced bool) {
	old := b.of[ev.Key]
	if old != nil {
		b.events.Remove(old)
	}
	if b.of == nil {
		b.of = make(map[string]*list.Element)
	}
	b.of[ev.Key] = b.events.PushBack(ev)
	return old != nil
}

func (w *watch) suffer(e watchEffect) {
	switch {
	case e.end:
		w.end()
	case e.skip:
		w.skip()
	case e.cut > 0:
		w.cutOff(e.cut)
	}
}

func (w *watch) end() { w.ended = true }

func (w *watch) cutOff(d time.Duration) {
	if w.cut.IsZero() {
		w.cut = time.Now()
	}
	w.hold(d)
	w.skipping = false
}

func (w *watch) skip() {
	if w.held == nil {
		w.hold(replacedWithin)
		w.skipping = true
	}
}

// hold delivers nothing for d, or for as long as nothing is delivered anyway.
func (w *watch) hold(d time.Duration) {
	until := time.Now().Add(d)
	if w.held != nil && !until.After(w.until) {
		return
	}
	w.until = until
	if !w.cut.IsZero() {
		d = min(d, time.Until(w.cut.Add(maxCutOff)))
	}
	if w.held == nil {
		w.held = time.NewTimer(d)
	} else {
		w.held.Reset(d)
	}
}

// release goes on to deliver.
func (w *watch) release() {
	if w.held != nil {
		w.held.Stop()
		w.held = nil
	}
	w.skipping = false
	w.cut = time.Time{}
}

func (w *watch) heal() {
	w.todo = watchEffect{}
	w.release()
}

// Watches are the watches that are running, see [Store.Watches].
type Watches struct {
	s       *core
	pattern string
}

// Watches selects the running watches whose pattern matches pattern, by
// [state.MatchPattern]: "*" selects all, and "config.*" those of "config.*" and of
// "config.timeout". For future watches, see [Store.On].
func (s *Store) Watches(pattern string) Watches {
	return Watches{s.core, pattern}
}

// Len returns how many watches there are.
func (ws Watches) Len() int { return len(ws.s.running(ws.pattern)) }

// End ends the watches: their channels are closed when it returns. Events that
// were not delivered yet are lost.
func (ws Watches) End() {
	ws.each("ended", (*watch).end)
}

// CutOff cuts the watches off for d from now. Then they deliver the last state of
// every key that changed, and skip the states that were replaced in between. After an
// hour they end instead, about as on NATS: by then a server has removed the markers of
// deleted keys, so that a watch cannot know what it missed.
func (ws Watches) CutOff(d time.Duration) {
	ws.each(fmt.Sprintf("cut off for %v", d), func(w *watch) { w.cutOff(d) })
}

// SkipReplaced makes the watches skip a state that is replaced. They hold events
// back until one of them has been replaced, for at most a second.
func (ws Watches) SkipReplaced() {
	ws.each("skips a replaced state", func(w *watch) {
		// The second begins with the next event.
		w.todo = watchEffect{set: true, after: w.events, skip: true}
	})
}

func (ws Watches) each(what string, f func(*watch)) {
	for _, w := range ws.s.running(ws.pattern) {
		ws.s.note("event", w.pattern, 0, what)
		w.do(f)
	}
}

func (s *core) cutOff(pattern string, d time.Duration) {
	for _, w := range s.running(pattern) {
		w.do(func(w *watch) { w.cutOff(d) })
	}
}

// running returns the watches whose pattern matches.
func (s *core) running(pattern string) []*watch {
	s.mu.Lock()
	defer s.mu.Unlock()
	var running []*watch
	for w := range s.watches {
		if state.MatchPattern(pattern, w.pattern) {
			running = append(running, w)
		}
	}
	return running
}
