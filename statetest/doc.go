// Package statetest tests what an agent does when its shared state fails. It is
// to package state what net/http/httptest is to net/http.
//
// A [state.MemoryStore] makes unit tests fast, and never fails. So they never run
// the code of an agent that matters most: what it does when a lock is lost, a
// watch ends or an answer never comes. [Wrap] wraps any store and makes it fail,
// on demand, as a store does in production:
//
//	synctest.Test(t, func(t *testing.T) {
//		store := statetest.Wrap(state.NewMemoryStore())
//		defer store.Close()
//		store.On(statetest.Refresh, "leader").Nth(3).TakeAway()
//		// ... run the agent with store, and check what it does ...
//	})
//
// # Faults
//
// A fault takes one line. [Store.On] selects calls, and a method of [Calls] says
// what happens to them:
//
//	store.On(statetest.Update, "agents.*").Fail(err)                 // fails, not applied; KeepAlive writes by Update
//	store.On(statetest.Put, "jobs.*").Fail(state.ErrValueTooLarge)   // a value that is too large
//	store.On(statetest.Writes, "config.*").Always().Deny()           // no permission
//	store.On(statetest.Update, "counter").Nth(3).LoseAnswer()        // applied, outcome unknown
//	store.On(statetest.Update, "counter").LoseRequest()              // not applied, outcome unknown
//	store.On(statetest.Put, "status").ApplyLate(3*time.Second)       // applied after it has failed
//	store.On(statetest.Put, "status").ApplyBehind(2)                 // applied after two other writes
//	store.On(statetest.Reads, "*").For(time.Minute).Slow(time.Second)
//	store.On(statetest.Get, "config").LoseRequest()                  // hangs for five seconds, or until its context ends
//
// Watches, both running and future ones:
//
//	store.Watches("config.*").End()                    // now
//	store.Watches("config.*").CutOff(time.Minute)      // then the last states only
//	store.Watches("config.*").SkipReplaced()           // skips a state that is soon replaced
//	store.On(statetest.Watch, "config.*").End(5)       // the next one, after five events
//	store.On(statetest.Watch, "*").Always().CutOff(0, time.Second)
//
// Locks:
//
//	store.TakeAway("leader")                                  // an operator deletes its record
//	store.On(statetest.Refresh, "leader").Nth(3).TakeAway()   // at its third refresh
//	store.On(statetest.Lock, "leader").Lapse()                // its refreshes do not get through
//	store.On(statetest.Put, "account").Pause(time.Minute)     // the holder sleeps past its lease, then writes
//	store.On(statetest.Unlock, "leader").ApplyLate(time.Second) // released late
//	store.On(statetest.Lock, "leader").LoseAnswer()           // taken, but held by nobody, until it lapses
//	store.On(statetest.Lock, "leader").Times(3).Fail(state.ErrLockHeld) // somebody else is faster
//
// The server or the whole process:
//
//	store.Unreachable(time.Minute)
//	store.On(statetest.Update, "counter").Unreachable(time.Minute) // while this call is in progress
//	store.Pause(time.Minute)
//
// [Store.Chaos] mixes all of these at random. [Store.Heal] ends all faults.
//
// # What can happen
//
// A Store does only what a [state.NATSStore] can do, with the same errors and the
// same timing (but see [Calls.ApplyLate] about locks). The contract of the wrapped
// store still holds. A lock never has two live holders. A late write takes effect
// within ten seconds, an Update or DeleteRevision only on the revision that it names,
// and one that creates a key only if that has not existed meanwhile. A watch that has
// not ended delivers the last state of every key, and every expiry. A call without an
// answer gives up after five seconds, which take no time in a bubble.
//
// # Time
//
// All delays use package time. In a testing/synctest bubble a day passes at once,
// and a program that makes the same calls meets the same faults at the same times.
// After [Store.Close] nothing is left running. Around a NATSStore, a Store works
// the same in real time.
package statetest
