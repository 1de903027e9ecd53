package state

import (
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// last reads the last record of a key. It sees every write that was
// acknowledged before.
//
// A direct get costs the server less than a request to the leader, but a replica
// or a mirror may answer it, and these lag; so may a server that had a replica
// until a moment ago. So it is used only where the stream's server is not part of
// a cluster, and its answer counts only if it names the stream itself and is not
// older than what this client knows. That a key does not exist only the leader can
// say.
func (b *bucket) last(budget *retryBudget, key string) (record, error) {
	if b.direct() {
		if r, ok := b.directLast(budget, key); ok {
			return r, nil
		}
	}
	return b.leaderLast(budget, key)
}

// direct reports whether a direct get may be used now.
func (b *bucket) direct() bool {
	s := b.settings.Load()
	if !s.alone || !s.AllowDirect || s.mirrored {
		return false
	}
	if s.epoch != b.currentEpoch() || time.Since(s.checked) > settingsLife {
		b.check()
		return false
	}
	return true
}

// directLast reads the last record of a key from the first server that answers. It
// reports whether the answer can be relied on.
func (b *bucket) directLast(budget *retryBudget, key string) (record, bool) {
	answer, _, err := b.do(budget, &nats.Msg{Subject: b.api + "DIRECT.GET." + b.stream + "." + b.prefix + key}, repeatable)
	if err != nil {
		return record{}, false
	}
	r, ok := directRecord(answer, b.stream, b.settings.Load().MaxAge)
	if !ok || b.cache.recall(key).revision > r.revision {
		if statusOf(answer) == "" {
			b.check() // there is a mirror or a replica, or the headers cannot be read
		}
		return record{}, false
	}
	b.clock.observe(r.modified)
	return r, true
}

// leaderLast reads the last record of a key from the stream's leader.
//
// A leader that was cut off answers with what it had then. It is found out if
// this client knows of something newer.
func (b *bucket) leaderLast(budget *retryBudget, key string) (record, error) {
	var settled time.Time // since when the leader has got as far as what is known
	for logged := false; ; logged = true {
		r, err := b.leaderRecord(budget, key)
		if err != nil {
			return record{}, err
		}
		known := b.cache.recall(key)
		switch {
		case known.revision <= r.revision, !b.replicated():
			return r, nil
		case r.revision == 0 && !known.exists(b.clock.now()):
			return r, nil // it has gone since
		}
		// Or it was removed by hand, or the stream is another one by now. While
		// one leader takes over from another they answer in turn: only time
		// decides.
		info, err := b.info(budget)
		if err != nil {
			return record{}, err
		}
		if !logged {
			b.log.Warn("state: the stream's leader knows less than it acknowledged", "bucket", b.name, "key", key)
		}
		switch {
		case info.State.LastSeq < known.revision:
			settled = time.Time{}
			b.settleDoubt(known.revision, info.Created)
		case settled.IsZero():
			settled = time.Now()
		}
		if b.cache.recall(key).revision == 0 || !settled.IsZero() && time.Since(settled) > doubtFor {
			b.cache.forget(key)
			return r, nil
		}
		if err := b.waitAfter(budget, errStaleLeader); err != nil {
			return record{}, err
		}
	}
}

// doubtFor is how long an answer is doubted that is older than what is known.
const doubtFor = 1500 * time.Millisecond

// lastSince is leaderLast of a leader that has got as far as a revision which the
// caller has seen: a watch on another server may have reported it before the leader had
// applied it. If no leader has it within doubtFor, there is no such revision.
func (b *bucket) lastSince(budget *retryBudget, key string, revision uint64) (record, error) {
	r, err := b.leaderLast(budget, key)
	for asked, behind := time.Now(), true; err == nil && behind && r.revision < revision && b.replicated(); {
		info, failed := b.info(budget)
		if failed != nil {
			return record{}, failed
		}
		if behind = info.State.LastSeq < revision; behind {
			if time.Since(asked) > doubtFor || !b.wait(budget) {
				return r, b.ended(budget)
			}
		}
		r, err = b.leaderLast(budget, key)
	}
	return r, err
}

// settleDoubt watches, in the background, the leader of a bucket that was created then
// and lacks a revision that was acknowledged. A leader that was cut off gives way within
// staleFor. If the revision is still missing then, the servers have lost what they
// acknowledged, and the client forgets what it knew: otherwise it would believe no
// leader any more.
func (b *bucket) settleDoubt(revision uint64, created time.Time) {
	if !b.doubting.CompareAndSwap(false, true) {
		return
	}
	settle := func() {
		defer b.doubting.Store(false)
		var since time.Time // when it was first found to lack the revision
		for {
			info, err := b.info(newBudget(b.life))
			switch {
			case errors.Is(err, jetstream.ErrBucketNotFound), b.isClosed():
				return
			case err != nil:
				since = time.Time{}
			case !info.Created.Equal(created):
				return
			case info.State.LastSeq >= revision:
				return
			case since.IsZero():
				since = time.Now()
			case time.Since(since) > staleFor:
				b.cache.clear()
				b.log.Error("state: the servers have lost acknowledged writes", "bucket", b.name, "acknowledged", revision, "last", info.State.LastSeq)
				return
			}
			if b.pause(newBudget(b.life), time.Second, nil) != nil {
				return
			}
		}
	}
	if !b.start(settle) {
		b.doubting.Store(false)
	}
}

var errStaleLeader = errors.New("the stream's leader does not have what it acknowledged: it was cut off from the other servers")

// leaderRecord reads the last record of a key as the leader has it.
func (b *bucket) leaderRecord(budget *retryBudget, key string) (record, error) {
	msg, err := b.leaderMsg(budget, b.prefix+key)
	if err != nil || msg == nil {
		return record{}, err
	}
	r := msg.record(b.settings.Load().MaxAge)
	b.clock.observe(r.modified)
	return r, nil
}

// leaderMsg reads the last message on a subject, which may have wildcards. It
// returns nil if there is none.
func (b *bucket) leaderMsg(budget *retryBudget, subject string) (*storedMsg, error) {
	return b.storedMsg(budget, struct {
		LastFor string `json:"last_by_subj"`
	}{subject})
}

// storedAt reads the message of a key and a sequence from the leader. It returns nil
// if the key has a later one instead.
func (b *bucket) storedAt(budget *retryBudget, key string, seq uint64) (*storedMsg, error) {
	msg, err := b.storedMsg(budget, struct {
		Seq uint64 `json:"seq"`
	}{seq})
	if err != nil || msg != nil && msg.Subject == b.prefix+key {
		return msg, err
	}
	last, err := b.leaderMsg(budget, b.prefix+key)
	if err == nil && (last == nil || last.Seq <= seq) {
		err = errStaleLeader // or the message was removed
	}
	return nil, err
}

func (b *bucket) storedMsg(budget *retryBudget, req any) (*storedMsg, error) {
	var answer struct {
		Message *storedMsg `json:"message"`
	}
	err := b.streamCall(budget, "STREAM.MSG.GET", b.stream, req, &answer)
	if apiCode(err) == codeNoMessage {
		return nil, nil
	}
	return answer.Message, err
}

// lookUp returns the last record of a key, as read reads it, and whether the key
// exists.
//
// An answer says what was so when the server gave it. If a value's deadline passes
// while the answer is on its way, the value may have been replaced in time. So it
// counts as expired only if its deadline had passed before it was read. Otherwise
// lookUp reads the key again: what it finds then is the same value, which has
// expired, or one that was written since it began.
func (b *bucket) lookUp(budget *retryBudget, key string, read func(*retryBudget, string) (record, error)) (r record, exists bool, err error) {
	asked := time.Now()
	r, err = read(budget, key)
	switch {
	case err != nil, r.revision == 0, r.deleted:
		return r, false, err
	case r.deadline == 0:
		return r, true, nil
	}
	now := b.clockFor(budget, r.deadline)
	took := time.Since(asked)
	began := now - timestamp(took+took/maxDrift)
	switch {
	case !r.deadline.passed(now):
		return r, true, nil
	case r.deadline.passed(began):
		return r, false, nil
	}
	first := r.revision
	if r, err = read(budget, key); err != nil || r.revision == first {
		return r, false, err
	}
	if r.revision < first { // the bucket is another one, or a leader that was cut off answered
		return r, b.exists(budget, &r), nil
	}
	return r, !r.deleted && !r.deadline.passed(began), nil
}

// entryOf returns the record of a key that exists, or ErrNotFound.
func (b *bucket) entryOf(budget *retryBudget, key string) (record, error) {
	r, exists, err := b.lookUp(budget, key, b.learnLast)
	if err != nil {
		return record{}, err
	}
	if !exists {
		return record{}, ErrNotFound
	}
	return r, nil
}

// learnLast is last, and remembers the record.
func (b *bucket) learnLast(budget *retryBudget, key string) (record, error) {
	r, err := b.last(budget, key)
	if err == nil {
		b.cache.learn(key, r)
	}
	return r, err
}
