// Command mutate shows that the tests can fail. It copies the library to a
// temporary directory, breaks the copy in one way at a time, and runs the tests
// that should notice; each of them must fail. It prints a table.
//
//	go -C proof run ./mutate            all mutations
//	go -C proof run ./mutate -only x,y  those whose names contain x or y
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// A mutation is a way to break the library.
type mutation struct {
	name  string
	edits []edit
	tests []string // of the suite below; each must fail
}

// An edit replaces the one place where a text is found in the library.
type edit struct{ old, new string }

// The tests, by short names.
var suite = map[string]string{
	"memory-suite":     ". -run ^TestMemoryStoreConformance$",
	"nats-suite":       ". -run ^TestNATSStoreConformance$",
	"fuzz":             ". -run ^Fuzz",
	"exclusion":        ". -run ^TestMutualExclusionUnderFaults$",
	"clock":            ". -run ^TestClockSetBack$",
	"vague-clock":      ". -run ^TestClockVague$",
	"get-in-memory":    ". -run ^TestMemoryStoreGetSeesRefreshedKeys$",
	"beside-mirror":    ". -run ^TestReadsBesideMirror$",
	"lapsed-at-once":   ". -run ^TestLapsedLockIsNotHandedOver$",
	"lagging-listing":  ". -run ^TestListingBehindTheLeader$",
	"replicated-reads": ". -run ^TestReplicatedReads$",
	"lost-answer":      ". -run ^TestLostAnswer$",
	"unseen":           ". -run ^TestDeletionOfTheUnseen$",
	"seem-offline":     ". -run ^TestOpenWhilePeersSeemOffline$",
	"answer-here":      ". -run ^TestAnswerThatIsHere$",
	"settings-log":     ". -run ^TestLogOfChangedSettings$",
	"more-replicas":    ". -run ^TestReadsWhileReplicasAreAdded$",
	"read-late":        ". -run ^TestRefreshedWhileReading$",
	"joins":            ". -run ^TestHoldJoinsARefresh$",
	"max-age":          ". -run ^TestCreatedAfterMaxAge$",
	"one-key":          ". -run ^TestListingOfOneKeyIsNotStale$",
	"embed":            ". -run ^TestStoresThatEmbed$",
	"ends-at-once":     ". -run ^TestKeepAliveThatEndsAtOnce$",
	"acquire-doubt":    ". -run ^TestAcquireInDoubt$",
	"kept-in-doubt":    ". -run ^TestMemoryStoreConformance$/^keep-alive-outages$",
	"keeps-nothing":    ". -run ^TestFollowKeepsNoEntries$",
	"finds-it-free":    ". -run ^TestWaiterFindsALockFree$",
	"acquire-wrapped":  ". -run ^Test(Memory|NATS)StoreConformance$/^acquire-wrapped$",
	"stale-watch":      ". -run ^TestWatchBehindAStaleLeader$",
	"late-writes":      ". -run ^TestLateWriteUndoesNothing$",
	"late-claims":      ". -run ^TestClaimWhileDisconnected$",
	"old-refusal":      ". -run ^TestLostAnswerAfterPermissionError$",
	"fast-writer":      ". -run ^TestWritesBesideFastWriter$",
	"many-clients":     ". -run ^TestManyClientsPutOneKey$",
	"in-turn":          ". -run ^TestPutsInTurn$",
	"expired-revision": ". -run ^TestUpdateOfExpired$",
	"narrow-link":      ". -run ^TestNarrowLink$",
	"small-buffers":    ". -run ^TestSmallStreamBuffers$",
	"offline":          ". -run ^TestConsumerIsOffline$",
	"full-bucket":      ". -run ^TestFullBucket$/^one$",
	"full-locks":       ". -run ^TestFullLockBucket$",
	"forged":           ". -run ^TestForgedHeaders$",
	"republished":      ". -run ^TestRepublishedIntoBucket$",
	"odd-locks":        ". -run ^TestOddLockRecord$",
	"binding":          ". -run ^TestBindLeavesWhatTheOperatorSet$",
	"lowers-nothing":   ". -run ^TestDefaultsLowerNothing$",
	"few-consumers":    ". -run ^TestAccountWithConsumerLimit$",
	"small-values":     ". -run ^TestSmallValues$",
	"raised-history":   ". -run ^TestHistoryRaisedMeanwhile$",
	"made-anew":        ". -run ^TestBucketMadeAnewWithoutTTLs$",
	"stalled-listing":  ". -run ^TestStallDuringListing$",
	"gone":             ". -run ^TestBucketIsGone$",
	"unfit-locks":      ". -run ^TestBucketsThatCannotHoldLocks$",
	"waiting":          ". -run ^TestWaitingForALock$",
	"next":             ". -run ^TestNextAmongManyWaiters$",
	"cut-off":          ". -run ^TestRefusedByALeaderThatWasCutOff$",
	"takeover":         ". -run ^TestBusyWhileLeadersChange$",
	"released":         ". -run ^TestReleasedAndTakenWhileLeadersChange$",
	"over-what-lapsed": ". -run ^TestCreatedOverALapsedValue$",
	"leader-lacks":     ". -run ^TestUpdateOfWhatTheLeaderLacks$",
	"stale-for-long":   ". -run ^TestStaleForLong$",
	"unlock-closed":    ". -run ^TestUnlockAfterCloseAtAStaleLeader$",
	"while-closing":    ". -run ^TestUnlockWhileClosing$",
	"not-sent":         ". -run ^TestRefreshThatWasNotSent$",
	"ends-with-lease":  ". -run ^TestMemoryStoreWaiterEndsWithTheLease$",
	"writes-lost":      ". -run ^TestFollowAfterLostWrites$",
	"awaited":          ". -run ^TestAwaitedRevisions$",
	"never-works":      ". -run ^TestSourceThatNeverWorks$",
	"one-measurement":  ". -run ^TestOneMeasurementAtATime$",
	"listing-laggard":  ". -run ^TestListingAvoidsALaggard$",
	"in-doubt":         ". -run ^TestInDoubtBesideItsOwnRefresh$",
	"refreshes":        ". -run ^TestRefreshNearTheEnd$",
	"at-the-deadline":  ". -run ^TestWatchRefreshedAtTheDeadline$",
	"beside-traffic":   ". -run ^TestWatchReportsDeathsBesideTraffic$/^10_deaths_at_2ms_beside_500_a_second_on_1_servers$",
	"living-keys":      ". -run ^TestWatchOfLivingKeysAsksNothing$",
	"after-silence":    ". -run ^TestWatchAfterSilence$",
	"purged-by-hand":   ". -run ^TestWatchPurgedByHand$/^everything",
	"cannot-attach":    ". -run ^TestWatchThatCannotAttachEnds$",
	"goes-on":          ". -run ^TestListingOfARequestThatGoesOn$",
	"stopping":         ". -run ^TestListingOnAStoppingServer$",
	"full-account":     ". -run ^TestFullAccount$",
	"purged":           ". -run ^TestWatchPurgedBesideAWrite$",
	"large-value":      ". -run ^TestWatchOfALargeValue$",
	"large-history":    ". -run ^TestLargeListingWithHistory$",
	"with-history":     ". -run ^TestKeysWithHistory$",
	"odd-ends":         ". -run ^TestOddHeaders$|^TestMarkerWithOddEnd$",
	"marked":           ". -run ^TestExpiryMarkedNearTheOpening$",
	"missed":           ". -run ^TestExpiryOfWhatWasMissed$",
	"gaps":             ". -run ^TestGaps$",
	"laggard":          ". -run ^TestLaggardIsAvoided$",
	"majority":         ". -run ^TestExpiryNeedsAMajority$",
	"on-replicas":      ". -run ^TestExpiriesOnReplicas$",
	"free-for-others":  ". -run ^TestExpiriesOnReplicas$/^over_what_lives_longer$",
	"near-its-opening": ". -run ^TestWatchReportsExpiryNearItsOpening$",
	"flapping":         ". -run ^TestFlappingConnectionLeavesNoConsumers$",
	"limits":           ". -run ^TestLimitsOfConsumersAndPulls$",
	"limit-of-life":    ". -run ^TestLimitsOfConsumersAndPulls$/^consumers_live_five_seconds$",
	"limit-of-subs":    ". -run ^TestWatchBesideSubscriptionLimit$",
	"ask-once":         ". -run ^TestWaitersOfAProcessAskOnce$",
	"among-waiters":    ". -run ^TestHolderAmongWaiters$",
	"do-not-give-up":   ". -run ^TestWaitersDoNotGiveUp$",
	"like-the-data":    ". -run ^TestBucketsThatCannotHoldLocks$/^data_in_memory$",
	"locks-deleted":    ". -run ^TestLocksBucketDeleted$",
	"with-lock-outage": ". -run ^TestMemoryStoreConformance$/^with-lock-outages$",
	"with-lock-late":   ". -run ^TestMemoryStoreConformance$/^with-lock-late$",
	"with-lock-nested": ". -run ^TestMemoryStoreConformance$/^with-lock-nested$",
	"hold-lost":        ". -run ^TestMemoryStoreConformance$/^hold-lost$",
	"tiny-ttls":        ". -run ^TestTinyTTLsPassInABubble$",
	"between-leaders":  ". -run ^TestReadAsksAgainBetweenLeaders$",
	"stalled":          ". -run ^TestStalledRefreshes$",
	"bucket-of-locks":  ". -run ^TestStoreOnABucketOfLocks$",
	"zero-nats":        ". -run ^TestZeroNATSStore$",
	"zero-memory":      ". -run ^TestMemoryStoreZeroValue$",
	"first-keys":       ". -run ^TestMemoryStoreFirstKeys$",
	"close-stalled":    ". -run ^TestCloseOnAStalledLink$",
	"revoked":          ". -run ^TestRevokedPermissions$",
	"follow":           ". -run ^Test(NATSStore|MemoryStore|Follow)",
	"memory-model":     "proof -run ^TestMemoryStoreModel$",
	"nats-model":       "proof -run ^TestNATSStoreModel$",
	"both-model":       "proof -run ^TestBothModel$",
	"deletes":          "proof -run ^TestDeleteAnomaly$",
	"altered":          "proof -run ^TestReadsAsOperatorsChange$",
	"starve":           "proof -run ^TestPutDoesNotStarve$",
	"stalled-link":     ". -run ^Test(Context|Close)OnAStalledLink$",
	"old-clock":        ". -run ^TestCreatedByAnOldClock$",
	"marker-forgotten": ". -run ^TestMarkerIsForgotten$",
	"max-age-raised":   ". -run ^TestMaxAgeRaised$",
	"purge-in-doubt":   ". -run ^TestPurgeInDoubt$",
	"small-messages":   ". -run ^TestExpiryInABucketOfSmallMessages$",
	"made-unfit":       ". -run ^TestLocksBucketMadeUnfit$",
	"unheard-release":  ". -run ^TestReleaseBeforeTheSubscription$",
	"lost-writes":      ". -run ^TestAcknowledgedWritesLost$",
	"strangers":        "proof -run ^TestStrangers$",
}

// command returns what runs a test: one of the suite, or "load" with the name of
// a scenario, which is a history under this load.
func command(test string) []string {
	if scenario, ok := strings.CutPrefix(test, "load "); ok {
		return []string{"proof", "-run", "^TestLong$", "-long", "60s", "-each", "12s", "-stop", "-only", scenario}
	}
	return strings.Fields(suite[test])
}

const (
	inMemory  = "load memory"
	oneServer = "load one-server"
	three     = "load three-servers"
)

var mutations = []mutation{
	// The contract: compare-and-set, locks, time.
	{"memory-update-without-cas", []edit{{"if expected != nil && it.current() != *expected {", "if false && it.current() != *expected {"}}, []string{"memory-model", "memory-suite", inMemory}},
	{"memory-get-judges-late", []edit{
		{" || it.deadline != 0 && it.deadline.passed(d.now()) {\n		d.mu.RUnlock()\n", " {\n		d.mu.RUnlock()\n"},
		{"	d.mu.RUnlock()\n	if !small {\n", "	d.mu.RUnlock()\n	if deadline != 0 && deadline.passed(d.now()) {\n		return entry{}, 0, ErrNotFound\n	}\n	if !small {\n"},
	}, []string{"get-in-memory"}},
	{"delete-revision-without-precondition", []edit{
		{"if expected != nil && (it == nil || it.revision != *expected) {", "if false {"},
		{"	_, err = s.data.update(newBudget(ctx), m, revision)\n	return s.data.writeError(\"delete revision\"", "	err = s.data.remove(newBudget(ctx), m)\n	return s.data.writeError(\"delete revision\""},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"modify-without-cas", []edit{{"		if revision, err = store.Update(key, value, ttl, revision); err != ErrConflict {\n", "		if err = store.Put(key, value, ttl); err != ErrConflict {\n"}}, []string{"memory-model", inMemory}},
	{"no-cas", []edit{{"	case pre == ifUnchanged && e.fixed:\n		hdr.set(headerExpected, padded(base.revision))\n	case pre == ifUnchanged:\n		hdr.set(headerExpected, strconv.FormatUint(base.revision, 10))\n", "	case false:\n"}}, []string{oneServer, "deletes", "nats-suite", "exclusion"}},
	{"unlock-without-ownership", []edit{
		{"	over := l.released || l.lapseLocked(time.Now()) && !l.inDoubt\n", "	over := l.released\n"},
		{"if err == nil && l.lapsed {", "if false {"},
		{"held == nil || held.token != l.token || held.deadline.passed(d.now())", "held == nil"},
		{"if holderOf(base.op) != l.owner {", "if false {"},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"a-lapsed-lock-is-handed-over", []edit{{"	if !time.Now().Before(l.validUntil()) {\n		l.giveBack(ctx)\n		return nil, ErrLockExpired\n	}\n	return l, nil\n", "	return l, nil\n"}}, []string{"lapsed-at-once"}},
	{"takeover-before-the-end", []edit{
		{"			case b.exists(budget, &base) || budget.left() <= minAttempt:", "			case b.exists(budget, &base) && !b.expired(budget, base.deadline-timestamp(100*time.Millisecond)) || budget.left() <= minAttempt:"},
		{"for t := d.lapses.due(now); t != nil; t = d.lapses.due(now) {", "for t := d.lapses.due(now + 5e6); t != nil; t = d.lapses.due(now + 5e6) {"},
	}, []string{inMemory, oneServer}},
	{"refresh-after-the-end", []edit{
		{"	err := l.lostLocked(asked)\n", "	err := error(nil)\n"},
		{"	if err := l.lostLocked(time.Now()); err != nil {", "	if err := error(nil); err != nil {"},
		{"case err == nil && l.lapseLocked(time.Now()):", "case false:"},
		{"held.token != l.token || held.deadline.passed(d.now())", "held.token != l.token"},
	}, []string{"memory-model", "nats-model", oneServer}},
	{"tokens-that-stay", []edit{
		{"func (l *lease) Token() uint64 { return l.token }", "func (l *lease) Token() uint64 { return 1 }"},
	}, []string{"memory-model", "nats-model", inMemory, oneServer}},
	{"hold-outlives-its-lease", []edit{{"	r.lost.Store(true)\n	r.cancel(ErrLockExpired)\n", ""}}, []string{"memory-suite"}},
	{"hold-counts-on-a-refresh-that-it-joined", []edit{{"if r.until = validUntil(r.lock); r.until.IsZero() {", "if r.until = (time.Time{}); r.until.IsZero() {"}}, []string{"joins"}},
	{"hold-does-not-refresh", []edit{{"		switch err := r.refresh(); {\n", "		switch err := error(nil); {\n"}}, []string{"memory-suite", "nats-suite", oneServer}},
	{"a-clock-ahead", []edit{ // expiry by the clock of a client that is half a second ahead
		{"	return c.base + timestamp(passed-passed/maxDrift)", "	return timestamp(time.Now().Add(500*time.Millisecond).UnixNano()) + 0*timestamp(passed)"},
	}, []string{oneServer, "nats-suite"}},
	{"a-clock-behind", []edit{
		{"	return c.base + timestamp(passed-passed/maxDrift)", "	return timestamp(time.Now().Add(-5*time.Second).UnixNano()) + 0*timestamp(passed)"},
	}, []string{"nats-model", "nats-suite"}},
	{"a-clock-that-goes-on", []edit{ // as if a server's clock were never set back
		{"open := !surely && (c.age > freshSample || !deadline.passed(c.now))", "open := false"},
		{"!maybe || c.age < sampleLife && !open", "!maybe || !(surely && c.age >= sampleLife || open)"},
	}, []string{"clock"}},
	{"an-estimate-is-good-enough", []edit{
		{"!surely && (c.age > freshSample || !deadline.passed(c.now))", "!surely && c.age > freshSample"},
	}, []string{"vague-clock"}},
	{"expired-is-visible", []edit{{"	if !exists {\n		return record{}, ErrNotFound", "	if !exists && (r.revision == 0 || r.deleted) {\n		return record{}, ErrNotFound"}}, []string{"nats-model", "both-model", "expired-revision"}},
	{"created-outlives-max-age", []edit{{"	if !m.marker && next.deadline.outlives(end) {", "	if false && next.deadline.outlives(end) {"}}, []string{"max-age"}},
	{"a-read-is-judged-late", []edit{{"	first := r.revision\n", "	first := r.revision\n	if first != 0 {\n		return r, false, nil\n	}\n"}}, []string{"read-late"}},
	{"a-listing-is-judged-late", []edit{{"			l.all = sortAndDedupe(l.all)\n", "			if info, err := b.info(budget); err == nil {\n				l.now = timestamp(info.Now.UnixNano())\n			}\n			l.all = sortAndDedupe(l.all)\n"}}, []string{"read-late"}},
	{"ttl-cut-to-seconds", []edit{
		{"	return wholeSeconds(t + min(extra, math.MaxInt64-t))\n", "	_, _ = extra, math.MaxInt64\n	return max(t, time.Second).Truncate(time.Second)\n"},
	}, []string{oneServer}},
	{"created-not-kept", []edit{
		{"	if lasts {\n		next.created = base.created\n	}\n", ""},
		{"	it.revision, it.modified = d.revision, now\n", "	it.revision, it.modified, it.created = d.revision, now, now\n"},
	}, []string{"memory-model", "nats-model", "memory-suite", "nats-suite"}},
	{"created-kept-too-long", []edit{
		{"st.created < written && !st.replaced.passed(written)", "st.created < written"},
	}, []string{"fuzz"}},
	{"delete-writes-always", []edit{
		{"!exists {\n			return err\n		}\n		read = true", "err != nil && !exists {\n			return err\n		}\n		read = true"},
	}, []string{"nats-model", "both-model", "nats-suite"}},

	// Reads and listings.
	{"reads-from-any-replica", []edit{{"if !s.alone || !s.AllowDirect || s.mirrored {", "if !s.AllowDirect {"}}, []string{three, "replicated-reads"}},
	{"mirrors-are-trusted", []edit{
		{"!s.alone || !s.AllowDirect || s.mirrored", "!s.alone || !s.AllowDirect"},
		{"err != nil || last(\"Nats-Stream\") != stream ||", "err != nil ||"},
	}, []string{"altered", "beside-mirror"}},
	{"a-direct-404-is-trusted", []edit{
		{"!s.alone || !s.AllowDirect || s.mirrored", "!s.alone || !s.AllowDirect"},
		{"	if !ok || b.cache.recall(key).revision > r.revision {\n", "	if statusOf(answer) == \"404\" {\n		return record{}, true\n	}\n	if !ok || b.cache.recall(key).revision > r.revision {\n"},
	}, []string{"altered"}},
	{"settings-stay-as-they-were", []edit{
		{"s.epoch != b.currentEpoch() || time.Since(s.checked) > settingsLife {", "false {"},
		{"	if b.checking.CompareAndSwap(false, true) {\n", "	if false {\n"},
	}, []string{"settings-log"}},
	{"new-replicas-are-trusted", []edit{ // as if the bucket still had one
		{"!s.alone || !s.AllowDirect || s.mirrored", "s.Replicas > 1 || !s.AllowDirect"},
		{"s.epoch != b.currentEpoch() || time.Since(s.checked) > settingsLife {", "false {"},
		{"	if !ok || b.cache.recall(key).revision > r.revision {\n", "	if !ok {\n"},
		{"	if b.checking.CompareAndSwap(false, true) {\n", "	if false {\n"},
	}, []string{"more-replicas"}},
	{"stored-headers-are-the-servers", []edit{
		{"return values[len(values)-1]\n		}\n		return \"\"\n	}\n	seq", "return values[0]\n		}\n		return \"\"\n	}\n	seq"},
		{"if len(msg.Data) > 0 || len(msg.Header[\"Nats-Sequence\"]) > 0 {", "if false {"},
		{"last(\"Nats-Stream\") != stream || !appended(msg, \"Nats-Stream\")", "false"},
	}, []string{"strangers", "forged", "republished"}},
	{"keys-without-the-leader", []edit{
		{"ends++; l.last >= l.upTo && (", "ends++; (true || l.last >= l.upTo) && ("},
		{"case st.code == \"100\" && l.last < l.upTo:", "case st.code == \"100\" && l.last < l.upTo && false:"},
	}, []string{"lagging-listing"}},
	{"one-key-of-a-stale-leader", []edit{{"	if !p.wild && (since == 0 || !b.replicated()) {", "	if !p.wild {"}}, []string{"one-key"}},
	{"stores-that-embed-are-bypassed", []edit{{"is && s.self() == store", "is && s.self() != nil"}}, []string{"embed"}},
	{"a-create-in-doubt-is-left", []edit{{"if err == nil && k.current == 0 && k.inDoubt != nil {", "if false {"}}, []string{"ends-at-once"}},
	{"acquire-hides-doubt", []edit{{"		if err != ErrLockHeld {\n			return lock, asked.Add(ttl), err", "		if err != nil && ctx.Err() != nil {\n			return nil, time.Time{}, ErrLockHeld\n		}\n		if err != ErrLockHeld {\n			return lock, asked.Add(ttl), err"}}, []string{"acquire-doubt"}},
	{"acquire-hides-later-doubt", []edit{{"failure, doubt = err, err\n", "_ = err\n"}}, []string{"acquire-doubt"}},
	{"acquire-forgets-doubt", []edit{{"	if doubt == nil || errors.Is(err, ErrOutcomeUnknown) {", "	if true {"}}, []string{"acquire-doubt"}},
	{"one-doubt-at-a-time", []edit{{"k.inDoubt = append(k.inDoubt, bytes.Clone(next))", "k.inDoubt = [][]byte{bytes.Clone(next)}"}}, []string{"kept-in-doubt"}},
	{"listings-are-kept", []edit{{"	s.current = nil\n	return current\n", "	return current\n"}}, []string{"keeps-nothing"}},
	{"a-free-lock-is-held", []edit{{"		case err == nil:\n			s.waits.noteHeld(q, false)\n		}\n", "		}\n"}}, []string{"finds-it-free"}},
	{"acquire-tries-while-held", []edit{{"		if store == nil || ctx.Err() != nil {\n			return ctx.Err() == nil", "		if store == nil || ctx != nil {\n			return ctx.Err() == nil"}}, []string{"acquire-wrapped"}},
	{"acquire-tries-after-its-end", []edit{{"	if err := ctx.Err(); err != nil {\n		return nil, opError(\"lock\", key, err)\n	}\n	call, cancel", "	call, cancel"}}, []string{"acquire-wrapped"}},
	{"held-though-it-was-free", []edit{{"		case err == ErrNotFound:\n			return true\n		case err == nil:\n			if ends", "		case err == nil:\n			if ends"}}, []string{"acquire-wrapped"}},
	{"a-stale-leader-ends-a-watch", []edit{{"		return a, errStaleLeader\n", "		return a, errBucketGone\n"}}, []string{"stale-watch"}},
	{"a-state-is-skipped", []edit{{"		f.push(r.event(key, r.deadline))\n", "		if r.revision%97 != 0 {\n			f.push(r.event(key, r.deadline))\n		}\n"}}, []string{oneServer, "load one-server-clients-cut"}},
	{"entries-with-the-deleted", []edit{
		{"	for r := range l.existing() {\n		entries", "	for i := range l.all {\n		r := &l.all[i]\n		entries"},
	}, []string{oneServer}},
	{"a-batch-that-is-refused", []edit{{"if most := int(c.b.maxBatch.Load()); most > 0 {", "if most := int(c.b.maxBatch.Load()); most > 1<<30 {"}}, []string{"limits"}},
	{"consumers-live-longer-than-they-may", []edit{{"	if apiCode(err) == codeInactiveLimit {\n", "	if false {\n"}}, []string{"limit-of-life"}},
	{"keys-built-in-one-go", []edit{
		{"				d.mu.Unlock()\n				if work != nil {\n					work()\n				}\n				ended := s.ctx.Err()\n				d.mu.Lock()\n				return s.admitLocked(op, pattern, ended)\n", "				if work != nil {\n					work()\n				}\n				return s.admitLocked(op, pattern, s.ctx.Err())\n"},
	}, []string{"first-keys"}},
	{"zero-stores-panic", []edit{
		{"	if s == nil || s.natsCore == nil {\n		return nil, errUnopened\n	}\n	if s.data.life", "	if s.data.life"},
		{"	if s == nil || s.client == nil {\n		return nil, errUnopened\n	}\n	ended", "	ended"},
	}, []string{"zero-nats", "zero-memory"}},

	// Writes.
	{"put-loops", []edit{
		{"	return b.commit(budget, m, base, always)\n", "	for {\n		if base, err = b.contended(budget, m.key); err != nil {\n			return record{}, err\n		}\n		if r, err = b.commit(budget, m, base, ifUnchanged); err != errMoved || !b.wait(budget) {\n			return r, err\n		}\n	}\n"},
	}, []string{"many-clients", "fast-writer", "starve"}},
	{"rivals-are-forgotten", []edit{{"	known.contested = contested\n", "	known.contested = false\n"}}, []string{"in-turn"}},
	{"an-old-refusal-counts", []edit{
		{"strings.Contains(last.Error(), `\"`+subject+`\"`)", "strings.Contains(last.Error(), subject)"},
		{"		case !sent:\n", "		case !sent, errors.Is(err, nats.ErrPermissionViolation):\n"},
	}, []string{"old-refusal"}},
	{"an-expired-revision-is-updated", []edit{{"		if current != 0 && !b.exists(budget, &base) {\n", "		if current != 0 && base.deleted {\n"}}, []string{"expired-revision"}},
	{"what-is-on-its-way-is-asked-for-again", []edit{
		{"		if w.heard = w.r.heardSince(w.sent); w.heard.Sub(w.sent) > repeatInterval {\n", "		if w.heard = w.sent; false {\n"},
		{"now.Sub(w.sent) >= repeatInterval && quiet >= repeatInterval/3 && w.r.elections():", "quiet >= 2*time.Second:"},
	}, []string{"narrow-link"}},
	{"passing-refusals-are-final", []edit{{"	case codeUnavailable, codeTooManyPending, codeOffline, codeStreamOffline:\n", "	case codeUnavailable:\n"}}, []string{"small-buffers", "offline"}},
	{"a-full-bucket-stays-full", []edit{{"	return b.evenIfFull(budget, m, base, err)\n", "	return err\n"}}, []string{"full-bucket"}},
	{"full-without-a-name", []edit{{"		if strings.Contains(e.Description, \"maximum\") {\n", "		if false {\n"}}, []string{"full-bucket"}},
	{"leases-that-grow", []edit{{"fixed: b.want.locks,", "fixed: false,"}}, []string{"full-locks"}},
	{"publishes-while-disconnected", []edit{
		{"		case nats.CONNECTED:\n			return e, nil\n", "		case nats.CONNECTED, nats.RECONNECTING:\n			return e, nil\n"},
	}, []string{"late-writes", "late-claims"}},
	{"lost-answers-are-failures", []edit{{"		case lost:\n			inDoubt = err\n", "		case lost:\n			return record{}, err\n"}}, []string{"lost-answer", "load one-server-kills"}},
	{"binding-changes-the-history", []edit{{"has > 0 && int64(b.want.history) > has {", "has > 0 && b.want.history > 0 && int64(b.want.history) != has {"}}, []string{"binding", "lowers-nothing"}},
	{"binding-lowers-the-largest-value", []edit{{"has > 0 && b.want.maxValue > has {", "b.want.maxValue > 0 && withHeaders(b.want.maxValue) != has {"}}, []string{"lowers-nothing"}},
	{"more-consumers-than-the-account-has", []edit{{"	if apiCode(err) == codeMaxConsumers {\n", "	if false {\n"}}, []string{"few-consumers"}},
	{"headers-take-room-from-values", []edit{{"		limit = min(limit, int(most))\n", "		limit = min(limit, int(most)-headerRoom)\n"}}, []string{"small-values"}},
	{"the-history-as-it-was", []edit{{"(m.marker || m.ttl > 0) && (e.history || pre == always || outlives(base, next, m))", "(m.marker || m.ttl > 0 && e.history)"}}, []string{"raised-history"}},
	{"a-bucket-made-anew-is-not-prepared", []edit{{"	case codeNoMessageTTL, codeNoRollup:\n		return unfit, e\n", ""}}, []string{"made-anew"}},
	{"one-stall-ends-fast-listings", []edit{
		{"	maxBatch atomic.Int32 //", "	noFew    atomic.Bool  // a listing of few keys was not answered\n	maxBatch atomic.Int32 //"},
		{"	if !b.direct() || p.prefix == \"\" {\n", "	short, cancel := context.WithTimeout(budget.ctx, 2*time.Second)\n	defer cancel()\n	if !b.direct() || p.prefix == \"\" || b.noFew.Load() {\n"},
		{"	answers, err := b.doMany(budget, ", "	answers, err := b.doMany(newBudget(short), "},
		{"	if err != nil || len(answers) == 0 {\n		return nil, false\n", "	if err != nil || len(answers) == 0 {\n		b.noFew.Store(errors.Is(err, context.DeadlineExceeded))\n		return nil, false\n"},
		{"	\"cmp\"\n", "	\"cmp\"\n	\"context\"\n"},
	}, []string{"stalled-listing"}},
	{"a-bucket-that-is-gone-is-waited-for", []edit{{"			if errors.Is(err, nats.ErrNoResponders) {\n				if _, gone", "			if false {\n				if _, gone"}}, []string{"gone"}},
	{"locks-in-memory", []edit{{"	case c.Storage != \"file\":\n", "	case false:\n"}}, []string{"unfit-locks"}},
	{"locks-in-a-bucket-with-max-age", []edit{{"	case c.MaxAge > 0:\n", "	case false:\n"}}, []string{"unfit-locks"}},
	{"waiters-poll", []edit{{"		if len(q.subs) == 0 || s.missesReleases {\n			wake = earlier(wake, answered.Add(missedReleaseCheck))", "		if true {\n			wake = earlier(wake, answered.Add(30*time.Millisecond))"}}, []string{"waiting"}},
	{"waiters-all-at-once", []edit{{"	case chosen:\n		return wake\n	case q.heard", "	case true:\n		return wake\n	case q.heard"}}, []string{"next"}},
	{"refused-by-a-leader-that-was-cut-off", []edit{{"			if b.replicated() && knowsLess(err, base) {\n", "			if false && knowsLess(err, base) {\n"}}, []string{"cut-off"}},
	{"refusals-as-busy-are-certain", []edit{{"			if inDoubt == nil && b.replicated() && pre == ifUnchanged {\n", "			if false {\n"}}, []string{"takeover"}},
	{"a-release-is-somebody-elses", []edit{{"	case inDoubt == errTakeover && !m.exclusive:\n", "	case inDoubt == errTakeover:\n"}}, []string{"released"}},
	{"own-creations-are-not-known", []edit{
		{"		if base.op == m.op {\n			return base, nil", "		if false {\n			return base, nil"},
		{"			case base.op == m.op: //", "			case false: //"},
	}, []string{"over-what-lapsed"}},
	{"events-before-the-leader", []edit{{"err == nil && behind && r.revision < revision && b.replicated(); {", "false; {"}}, []string{"leader-lacks"}},
	{"doubted-since-the-first", []edit{{"			settled = time.Time{}\n", "			if settled.IsZero() {\n				settled = time.Now()\n			}\n"}}, []string{"stale-for-long"}},
	{"closed-stores-forget-a-lease", []edit{{"		n.b.cache.learn(l.key, n.lastOf(l))\n", ""}}, []string{"unlock-closed"}},
	{"a-release-ends-with-its-store", []edit{{"		err = n.end(ctx, l)\n	}\n	if errors", "		return n.end(ctx, l)\n	}\n	if errors"}}, []string{"while-closing"}},
	{"unsent-refreshes-are-in-doubt", []edit{{"l.inDoubt = l.inDoubt || errors.Is(err, ErrOutcomeUnknown)", "l.inDoubt = true"}}, []string{"not-sent"}},
	{"granted-after-the-end", []edit{{"			if err == ErrLockHeld && ctx.Err() == nil {\n", "			if err == ErrLockHeld {\n"}}, []string{"ends-with-lease"}},
	{"lost-writes-are-kept", []edit{{"lost && known != versionOf(kv)", "false"}}, []string{"writes-lost"}},
	{"awaited-again-and-again", []edit{{"		case what.revision <= max(f.readSeq, f.cursor):\n", "		default:\n"}}, []string{"awaited"}},
	{"attaches-without-a-pause", []edit{{"	if f.heard || !f.b.up() {\n", "	if true {\n"}}, []string{"never-works"}},
	{"measures-side-by-side", []edit{{"	if f.measuring {\n		f.measureAgain = true\n		return\n	}\n", ""}}, []string{"one-measurement"}},
	{"the-same-laggard", []edit{{"				*laggard = l.source.info.Cluster.Server\n", ""}}, []string{"listing-laggard"}},
	{"in-doubt-looks-once", []edit{{"		if err != errMoved || !l.inDoubt {\n			return r, err\n		}\n	}\n", "		return r, err\n	}\n"}}, []string{"in-doubt"}},
	{"refresh-by-the-estimate", []edit{{"	r, err := n.write(newBudget(ctx), l, mutation{value: n.s.leaseData(l.ttl, l.token), ttl: l.ttl})\n", "	if n.b.expired(newBudget(ctx), n.b.cache.recall(l.key).deadline) {\n		return ErrLockExpired\n	}\n	r, err := n.write(newBudget(ctx), l, mutation{value: n.s.leaseData(l.ttl, l.token), ttl: l.ttl})\n"}}, []string{"refreshes"}},
	{"locks-beside-markers", []edit{{"	case c.MarkerTTL > 0:\n", "	case false:\n"}}, []string{"unfit-locks"}},
	{"locks-over-a-history", []edit{{"	case c.PerKey != 1 && !c.rollup():\n", "	case false:\n"}, {"if info.config.PerKey != 1 && !info.config.rollup() {", "if !b.want.locks && info.config.PerKey != 1 && !info.config.rollup() {"}}, []string{"unfit-locks"}},
	{"locks-that-are-discarded", []edit{{"	case c.Discard == \"old\" && (c.MaxMsgs > 0 || c.MaxBytes > 0):\n", "	case false:\n"}}, []string{"unfit-locks"}},
	{"locks-stored-like-the-data", []edit{
		{"	locks    bool // it is to hold locks\n", "	locks    bool // it is to hold locks\n	storage  string\n"},
		{"		replicas: s.data.settings.Load().Replicas, locks: true,\n", "		replicas: s.data.settings.Load().Replicas, locks: true, storage: s.data.settings.Load().Storage,\n"},
		{"	if b.want.locks {\n		// Revisions", "	if b.want.storage == \"memory\" {\n		config.Storage = jetstream.MemoryStorage\n	}\n	if b.want.locks {\n		// Revisions"},
		{"	case c.Storage != \"file\":\n", "	case false:\n"},
	}, []string{"like-the-data"}},
	{"locks-stay-gone", []edit{
		{"		case errors.Is(err, jetstream.ErrBucketNotFound):\n			return record{}, err // whatever became of it, it is gone\n", ""},
		{"		if !errors.Is(err, jetstream.ErrBucketNotFound) || again {\n", "		if !errors.Is(err, jetstream.ErrBucketNotFound) || errors.Is(err, ErrOutcomeUnknown) || again {\n"},
	}, []string{"locks-deleted"}},
	{"every-waiter-asks", []edit{{"	q = w.queue[key]\n	if q == nil {\n		q = &lockQueue{", "	if q == nil {\n		q = &lockQueue{"}}, []string{"ask-once"}},
	{"a-holder-queues-with-waiters", []edit{ // of its process, which all ask all the time
		{"	q = w.queue[key]\n	if q == nil {\n		q = &lockQueue{", "	if q == nil {\n		q = &lockQueue{"},
		{"		if len(q.subs) == 0 || s.missesReleases {\n			wake = earlier(wake, answered.Add(missedReleaseCheck))", "		if true {\n			wake = earlier(wake, answered.Add(30*time.Millisecond))"},
		{"	waits          lockWaits\n", "	waits          lockWaits\n	turn           sync.Mutex\n"},
		{"	var last record\n	if look {\n", "	s.turn.Lock()\n	defer s.turn.Unlock()\n	var last record\n	if look {\n"},
		{"	r, err := n.write(newBudget(ctx), l, mutation{value:", "	n.s.turn.Lock()\n	defer n.s.turn.Unlock()\n	r, err := n.write(newBudget(ctx), l, mutation{value:"},
	}, []string{"among-waiters"}},
	{"waiters-give-up", []edit{
		{"	case <-turn:\n	case <-ctx.Done():\n", "	case <-turn:\n	case <-time.After(opTimeout):\n		return nil, opError(\"lock\", key, errBusy)\n	case <-ctx.Done():\n"},
		{"		case final(err):\n			return nil, time.Time{}, afterDoubt(err, doubt)\n", "		case err != ErrLockExpired:\n			return nil, time.Time{}, afterDoubt(err, doubt)\n"},
	}, []string{"do-not-give-up"}},
	{"an-outage-ends-a-wait", []edit{{"		case final(err):\n			return nil, time.Time{}, afterDoubt(err, doubt)\n", "		case err != ErrLockExpired:\n			return nil, time.Time{}, afterDoubt(err, doubt)\n"}}, []string{"with-lock-outage"}},
	{"lost-before-it-began", []edit{{"		if called || err != ErrLockExpired || lapsed == maxLapsed {\n", "		if called || err != nil {\n"}}, []string{"with-lock-late"}},
	{"begins-on-what-is-left", []edit{{"		if time.Until(r.until) >= r.ttl-r.ttl/3 {\n", "		if time.Until(r.until) > 0 {\n"}}, []string{"with-lock-late"}},
	{"errors-that-wrap-the-end-are-dropped", []edit{{"	case err == nil, err == ErrLockExpired, err == ended:\n", "	case err == nil, err == ended, errors.Is(err, ErrLockExpired), errors.Is(err, context.Canceled):\n"}}, []string{"hold-lost"}},
	{"lost-with-the-outer-lock", []edit{{"	lost := r.lost.Load() //", "	lost := context.Cause(held) == ErrLockExpired //"}}, []string{"with-lock-nested"}},
	{"renewals-without-a-pause", []edit{
		{"		return max(time.Until(r.until)-(r.ttl-r.ttl/3), minRenewal)\n", "		return time.Until(r.until) - (r.ttl - r.ttl/3)\n"},
		{"			timer.Reset(max(min(r.ttl/20, 100*time.Millisecond), minRenewal))\n", "			timer.Reset(min(r.ttl/20, 100*time.Millisecond))\n"},
	}, []string{"tiny-ttls"}},
	{"refreshes-queue", []edit{
		{"	shared := l.refresh\n", "	shared := (*sharedRefresh)(nil)\n"},
		{"	ctx, cancel := context.WithTimeout(l.ctx, lockTimeout)\n	defer cancel()\n	select {\n	case l.turn <- struct{}{}:\n	default:\n		select {\n		case l.turn <- struct{}{}:\n		case <-ctx.Done():\n			return opError(\"refresh\", l.key, ctx.Err()) // an Unlock is under way\n		}\n	}\n", "	l.turn <- struct{}{}\n	ctx, cancel := context.WithTimeout(l.ctx, lockTimeout)\n	defer cancel()\n"},
		{"	ctx, cancel := context.WithTimeout(context.Background(), lockTimeout)\n	defer cancel()\n	select {\n	case l.turn <- struct{}{}:\n	case <-ctx.Done():\n		return opError(\"unlock\", l.key, ctx.Err()) // a Refresh is under way\n	}\n", "	l.turn <- struct{}{}\n	ctx, cancel := context.WithTimeout(context.Background(), lockTimeout)\n	defer cancel()\n"},
	}, []string{"stalled"}},
	{"data-among-locks", []edit{{"	case strings.HasSuffix(cfg.Bucket, locksSuffix):\n", "	case false:\n"}}, []string{"bucket-of-locks"}},
	{"reads-repeat-late", []edit{{"now.Sub(w.sent) >= repeatInterval && quiet", "now.Sub(w.sent) >= min(repeatInterval<<(w.copies-1), 2*time.Second) && quiet"}}, []string{"between-leaders"}},
	{"calls-outlive-close", []edit{
		{"		case <-w.r.life.Done():\n		}\n		select {\n", "		}\n		select {\n"},
		{"		case w.r.life.Err() != nil:\n			return arrival, ErrClosed\n", ""},
	}, []string{"close-stalled"}},
	{"answers-unheard-for-good", []edit{{"			w.r.resubscribe()\n			return arrival", "			return arrival"}}, []string{"revoked"}},

	// Watches, Follow and Cache.
	{"deaths-wait-for-silence", []edit{
		{"	f.asking = true\n	f.b.start(func() {\n		// The server's", "	f.asking = true\n	source, count := f.source, f.source.count\n	f.b.start(func() {\n		// The server's"},
		{"f.probe(f.due(timestamp(info.Now.UnixNano()), f.window, altered), true, f.expired)", "f.probe(f.due(timestamp(info.Now.UnixNano()), f.window, altered), true, func(findings []finding) {\n				for i := range findings { // what came meanwhile may have come before, or after\n					findings[i].known = findings[i].known && f.source == source && source.count == count\n				}\n				f.expired(findings)\n			})"},
		{"		f.detectRemovals(f.lastState)\n", ""}, // it would find them in the end
	}, []string{"beside-traffic"}},
	{"living-keys-are-asked-about", []edit{
		{"if next := f.expiries.nextDue(); next", "if next := f.expiries.next(); next"},
		{"	if f.source == nil || f.asking || !f.expiries.anyDue(now) {\n", "	if next := f.expiries.next(); f.source == nil || f.asking || next == 0 || !next.passed(now) {\n"},
	}, []string{"living-keys"}},
	{"a-watch-waits-for-what-it-missed", []edit{
		{"	if !f.listed || f.listing {\n		f.touched[key] = r.revision\n	}\n", "	if !f.listed || f.listing {\n		f.touched[key] = r.revision\n	}\n	if _, known := f.recentDeletions[key]; t == nil && r.base != 0 && !known {\n		time.Sleep(300 * time.Millisecond) // what it replaced may be on its way\n	}\n"},
	}, []string{"after-silence"}},
	{"purges-are-not-seen", []edit{{"		f.detectRemovals(f.lastState)\n", ""}}, []string{"purged-by-hand"}},
	{"a-refused-watch-stays-open", []edit{{"refused > refusedFor,", "refused > f.maxCut,"}}, []string{"cannot-attach"}},
	{"deletions-of-the-unseen-are-dropped", []edit{{"	case f.unseen(key, &r):\n", "	case false:\n"}}, []string{"unseen"}},
	{"drop-on-a-full-queue", []edit{
		{"	if q.len() >= maxWaiting {\n", "	if q.len() >= maxWaiting {\n		return\n	}\n	if false {\n"},
	}, []string{"fuzz", "memory-suite"}},
	{"an-older-event-last", []edit{
		{"			q.events[q.head+n-q.popped] = ev\n", "			_ = n\n"},
	}, []string{"fuzz", "memory-suite"}},
	{"watch-forgets-expiries", []edit{
		{"		default:\n			f.reportDeletion(t, t.revision, t.deadline)\n", "		default:\n			delete(f.alive, t.key)\n"},
		{"		d.removeLocked(it, it.revision, it.deadline)\n", "		delete(d.items, it.key)\n		d.keys.remove(it.key)\n"},
	}, []string{"memory-model", inMemory, oneServer}},
	{"watch-forgets-what-it-missed", []edit{
		{"from: from.cursor + 1, avoid", "from: a.info.State.LastSeq + 1, avoid"},
	}, []string{"load one-server-clients-cut"}},
	{"watch-reports-early-expiries", []edit{
		{"f.due(timestamp(info.Now.UnixNano()), f.window, altered)", "f.due(timestamp(info.Now.UnixNano())+1e9, f.window, altered)"},
		{"	now := f.b.clock.now()\n	if f.source == nil || f.asking", "	now := f.b.clock.now() + 1e9\n	if f.source == nil || f.asking"},
		{"time.Duration(next-f.b.clock.now())", "time.Duration(next-f.b.clock.now())-time.Second"},
	}, []string{"nats-suite", oneServer}},
	{"expiry-without-the-probe", []edit{
		{"f.probe(f.due(timestamp(info.Now.UnixNano()), f.window, altered), true, f.expired)", "over := []finding{}\n			for _, t := range f.due(timestamp(info.Now.UnixNano()), f.window, altered) {\n				over = append(over, finding{t: t, revision: t.revision, deadline: t.deadline, probeResult: probeResult{last: t.revision, known: true}})\n			}\n			f.expired(over)"},
	}, []string{"at-the-deadline"}},
	{"deletion-from-a-full-account-in-silence", []edit{{"	_, _ = b.markSmall(budget, m, ifUnchanged) // the key is deleted, whatever becomes of this\n", ""}}, []string{"full-account"}},
	{"purge-beside-a-write", []edit{{" || f.changed && since > maxRelist)", ")"}}, []string{"purged"}},
	{"silence-of-a-narrow-link", []edit{{"		f.suspect(\"no heartbeat\", func() bool { return time.Since(f.lastContact) > maxSilence })\n", "		f.cutOff(\"no heartbeat\")\n"}}, []string{"large-value"}},
	{"keys-end-at-a-refusal", []edit{{"		st.code = \"pending\"\n", ""}, {"case st.code == \"\", st.code == \"408\", st.code == \"smaller\", st.code == \"bytes\":", "case st.code == \"\", st.code == \"408\", st.code == \"409\", st.code == \"smaller\", st.code == \"bytes\":"}}, []string{"goes-on"}},
	{"keys-of-no-consumer", []edit{{"			if c.info.Name == c.name {\n", "			if true {\n"}, {"		if err == nil && msg != nil {\n", "		if false && msg != nil {\n"}}, []string{"stopping"}},
	{"keys-by-the-last-revisions", []edit{{"		Name: c.name, Deliver: \"all\",", "		Name: c.name, Deliver: \"last_per_subject\","}}, []string{"with-history", "large-history"}},
	{"block-as-it-ends", []edit{{"err != nil && end > 0 {", "err != nil && end < 0 {"}}, []string{"odd-ends"}},
	{"unreadable-to-a-watch", []edit{{"	if ok && unreadable(msg) {", "	if false {"}}, []string{"odd-ends"}},
	{"unreadable-to-a-list", []edit{{"	if unreadable(msg) || l.headersOnly", "	if l.headersOnly"}}, []string{"odd-ends"}},
	{"unreadable-is-an-error", []edit{{"	r := msg.record(b.settings.Load().MaxAge)\n", "	if _, err := nats.DecodeHeadersMsg(msg.Header); err != nil && len(msg.Header) > 0 {\n		return record{}, err\n	}\n	r := msg.record(b.settings.Load().MaxAge)\n"}}, []string{"odd-ends", "odd-locks"}},
	{"expiry-of-what-was-replaced", []edit{{"	if r.deleted && r.expired != 0 {\n", "	if false {\n"}}, []string{"missed", "marked"}},
	{"expiry-of-what-was-missed", []edit{{"r.base == t.revision && t.deadline", "t.deadline"}}, []string{"missed"}},
	{"expiry-after-a-cut", []edit{{"(replicated || missed)", "replicated"}}, []string{"missed"}},
	{"laggards-are-not-avoided", []edit{{"want.avoid == \"\" || c.info.Cluster.Server != want.avoid || ", "true || "}}, []string{"laggard"}},
	{"gaps-are-not-counted", []edit{{"		f.gaps++\n	}\n	f.idle", "	}\n	f.idle"}}, []string{"gaps"}},
	{"expiry-of-what-is-listed", []edit{{"		q.mark = prove // whether it is gone\n", "		q.mark = prove && !over\n"}}, []string{"majority"}},
	{"expiry-on-the-word-of-an-old-leader", []edit{{"	maxDoubts = 30\n", "	maxDoubts = 0\n"}}, []string{"majority"}},
	{"expiry-without-a-majority", []edit{{"(replicated || missed)", "missed"}}, []string{"on-replicas", "free-for-others"}},
	{"expiry-over-what-may-live-on", []edit{{"	q.mark = prove && replicated && !t.aged", "	q.mark = prove && replicated"}}, []string{"on-replicas"}},
	{"expiry-beside-markers", []edit{{"{ return b.settings.Load().MarkerTTL == 0 }", "{ return true }"}}, []string{"on-replicas"}},
	{"expiry-in-a-full-bucket", []edit{{"	case q.mark && answer.refused:\n		q.mark, q.markGone = false, false\n", "	case answer.refused:\n		return false\n"}}, []string{"on-replicas"}},
	{"expiry-twice-after-a-listing", []edit{{"		over = l.now // what expired before was tracked: it was reported, or will be\n", ""}}, []string{"load one-server-restarts"}},
	{"no-grace", []edit{{"	expiryGrace = 2 * time.Second\n", "	expiryGrace = 0 * time.Second\n"}}, []string{"near-its-opening"}},
	{"a-watch-that-cannot-hear", []edit{{"		answer, err := c.ask(budget, e, subject, data)\n", "		answer, _, err := c.b.do(budget, &nats.Msg{Subject: subject, Data: data}, repeatable)\n"}}, []string{"limit-of-subs"}},
	{"consumers-stay", []edit{{"	r.mu.Lock()\n	r.orphans = append(r.orphans, name)\n	r.mu.Unlock()\n", ""}}, []string{"flapping"}},
	{"follow-drops-expiries", []edit{{"(!exists || ev.Revision < known.revision):", "(!exists || ev.Revision <= known.revision):"}}, []string{inMemory, oneServer}},
	{"follow-goes-back", []edit{{"	case ev.Operation == OpPut && exists && ev.Revision <= known.revision:\n", "	case false:\n"}}, []string{"follow"}},
	{"a-cache-that-is-always-new", []edit{{"	return c.reached.asOf\n", "	return time.Now()\n"}}, []string{oneServer, "load one-server-far"}},

	// What readers found.
	{"offline-peers-are-final", []edit{{"		return strings.Contains(err.Error(), \"offline\")\n", "		return false && strings.Contains(err.Error(), \"offline\")\n"}}, []string{"seem-offline"}},
	{"an-answer-at-the-end-is-lost", []edit{{"		case arrival := <-arrivals:\n			return arrival, nil // it is here, whatever else has happened\n", ""}}, []string{"answer-here"}},
	{"calls-wait-while-the-library-dials", []edit{{"	if e.status != nats.CONNECTED {\n		return e, e.status\n	}\n", ""}}, []string{"stalled-link"}},
	{"created-by-an-old-clock", []edit{{"	old := e.age > oldSample\n", "	old := e.age < 0\n"}}, []string{"old-clock"}},
	{"a-clock-that-writes-do-not-renew", []edit{{"	if b.readClock().age > renewSample {\n", "	if false {\n"}}, []string{"old-clock"}},
	{"markers-are-remembered-for-ever", []edit{{"	now := b.clock.now()\n	switch {\n	case r.removal.passed(now - timestamp(2*time.Second)):\n", "	now := b.clock.now()\n	switch {\n	case !r.deleted && r.removal.passed(now-timestamp(2*time.Second)):\n"}}, []string{"marker-forgotten"}},
	{"expiry-by-an-old-max-age", []edit{{"			altered := info.config.MaxAge != f.maxAge\n", "			altered := false\n"}}, []string{"max-age-raised"}},
	{"a-write-by-an-old-max-age", []edit{{"	case r.aged && r.deadline.passed(now):\n", "	case false:\n"}}, []string{"max-age-raised"}},
	{"a-purge-in-doubt-has-failed", []edit{{"		if apiCode(err) == 0 || passing(err) {\n", "		if false {\n"}}, []string{"purge-in-doubt"}},
	{"no-questions-in-a-small-bucket", []edit{{"		if results[i].refused {\n", "		if false {\n"}}, []string{"small-messages"}},
	{"locks-by-old-settings", []edit{{"			_, err = b.info(budget)\n		}\n		if err == nil {\n			err = b.validate", "			b.check()\n		}\n		if err == nil {\n			err = b.validate"}}, []string{"made-unfit"}},
	{"a-release-before-the-subscription", []edit{{"		if settling {\n", "		if settling && len(q.subs) == 0 {\n"}}, []string{"unheard-release"}},
	{"lost-writes-are-believed-for-ever", []edit{{"			b.settleDoubt(known.revision, info.Created)\n", ""}}, []string{"lost-writes"}},

	// Keys, bytes, resources.
	{"star-without-the-empty-rest", []edit{
		{"	if p.wild {\n		return strings.HasPrefix(key, p.prefix)\n", "	if p.wild {\n		return strings.HasPrefix(key, p.prefix) && len(key) > len(p.prefix)\n"},
	}, []string{"fuzz", "nats-model"}},
	{"double-dots", []edit{{"if !keyByte[c] || c == '.' && last == '.' {", "if !keyByte[c] || c == '.' && last == 0 {"}}, []string{"fuzz", "memory-model"}},
	{"headers-are-trusted", []edit{{"lasting := st.created > 0 && st.created < written &&", "lasting := st.created != 0 &&"}}, []string{"fuzz"}},
	{"deliveries-misread", []edit{{"		skip += 2\n", "		skip += 1\n"}}, []string{"fuzz"}},
	{"errors-read-as-acknowledgements", []edit{{"bytes.Contains(ack, []byte(`\"error\":`))", "bytes.Contains(ack, []byte(`\"none\":`))"}}, []string{"fuzz"}},
	{"a-goroutine-that-stays", []edit{{"func NewMemoryStore() *MemoryStore {\n", "func NewMemoryStore() *MemoryStore {\n	go func() { select {} }()\n"}}, []string{"memory-model", inMemory}},
	{"values-are-shared", []edit{{"	c := make([]byte, len(b))\n	copy(c, b)\n	return c\n", "	if b == nil {\n		return []byte{}\n	}\n	return b\n"}}, []string{"memory-suite"}},
	{"contexts-are-ignored", []edit{{"	return s.ctx, nil\n}\n\n// WithContext", "	return context.Background(), nil\n}\n\n// WithContext"}}, []string{"nats-suite"}},
}

var (
	only    = flag.String("only", "", "run the mutations whose names contain one of these, separated by commas")
	build   = flag.Bool("build", false, "only see whether the library still builds with each of them")
	timeout = flag.Duration("timeout", 4*time.Minute, "for how long a test may run")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	root, err := filepath.Abs("..")
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "mutate-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	wrong := 0
	fmt.Println("| mutation | test | noticed by |\n|---|---|---|")
	for _, m := range mutations {
		if !wanted(m.name) {
			continue
		}
		copied := filepath.Join(work, m.name)
		if err := copyTree(root, copied); err != nil {
			return err
		}
		if err := m.apply(copied); err != nil {
			wrong++
			fmt.Printf("| %s | | NOT APPLIED: %v |\n", m.name, err)
			continue
		}
		if *build {
			cmd := exec.Command("go", "build", ".")
			cmd.Dir = copied
			if out, err := cmd.CombinedOutput(); err != nil {
				wrong++
				fmt.Printf("| %s | | NOT BUILT: %s |\n", m.name, out)
			}
			_ = os.RemoveAll(copied)
			continue
		}
		for _, test := range m.tests {
			by, err := check(copied, test)
			if err != nil {
				wrong++
				by = "NOT NOTICED: " + err.Error()
			}
			fmt.Printf("| %s | %s | %s |\n", m.name, test, by)
		}
		_ = os.RemoveAll(copied)
	}
	if wrong > 0 {
		return fmt.Errorf("%d mutations were not applied or not noticed", wrong)
	}
	return nil
}

func wanted(name string) bool {
	for part := range strings.SplitSeq(*only, ",") {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

// apply makes the edits. A text that is not found, or found twice, is an error:
// then the mutation is out of date.
func (m mutation) apply(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return err
	}
	for _, e := range m.edits {
		found := 0
		for _, file := range files {
			if strings.HasSuffix(file, "_test.go") {
				continue
			}
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			n := bytes.Count(text, []byte(e.old))
			if found += n; n != 1 {
				continue
			}
			if err := os.WriteFile(file, bytes.Replace(text, []byte(e.old), []byte(e.new), 1), 0o600); err != nil {
				return err
			}
		}
		if found != 1 {
			return fmt.Errorf("%q was found %d times", e.old, found)
		}
	}
	return nil
}

var (
	failure  = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
	notBuilt = regexp.MustCompile(`(?m)\[build failed\]|\[setup failed\]`)
)

// check runs a test, which must fail, and returns what failed.
func check(dir, test string) (by string, err error) {
	args := command(test)
	if len(args) == 0 {
		return "", fmt.Errorf("there is no test %q", test)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout+time.Minute)
	defer cancel()
	// Tests that hang have noticed too.
	arguments := append([]string{"test", "-vet=off", "-timeout", timeout.String(), "."}, args[1:]...)
	if args[0] == "." {
		arguments = append(arguments, "-failfast")
	}
	cmd := exec.CommandContext(ctx, "go", arguments...)
	cmd.Dir = filepath.Join(dir, args[0])
	out, err := cmd.CombinedOutput()
	switch {
	case notBuilt.Match(out):
		return "", fmt.Errorf("it does not build: %s", bytes.TrimSpace(out))
	case err == nil:
		return "", fmt.Errorf("%s passed", test)
	}
	names := failure.FindAllStringSubmatch(string(out), -1)
	if len(names) == 0 {
		if bytes.Contains(out, []byte("unexpected goroutines")) {
			return "goleak", nil
		}
		if bytes.Contains(out, []byte("panic:")) {
			return "a panic or a time-out", nil
		}
		return "", fmt.Errorf("it failed for no test: %s", bytes.TrimSpace(out))
	}
	deepest := names[0][1]
	for _, name := range names {
		if strings.Count(name[1], "/") > strings.Count(deepest, "/") {
			deepest = name[1]
		}
	}
	return deepest, nil
}

// copyTree copies what the tests need.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == ".git" || rel == "bench" || rel == "examples" || rel == filepath.Join("proof", "testdata") {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, rel), data, 0o600)
	})
}
