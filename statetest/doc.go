// Package statetest tests what an agent does when its shared state fails it. It
// is to package state what net/http/httptest is to net/http.
//
// A [state.MemoryStore] makes unit tests fast, and it never fails. So the code of
// an agent that matters most is never run: for a lock that was lost, a watch that
// has ended, an answer that never came. [Wrap] returns a store around any other
// one that does to a program what production does, when it is told to, and nothing
// until then:
//
//	synctest.Test(t, func(t *testing.T) {
//		store := statetest.Wrap(state.NewMemoryStore())
//		defer store.Close()
//		store.On(statetest.Refresh, "leader").Nth(3).TakeAway()
//		// ... run the agent with store, and see what it does ...
//	})
//
// # Faults
//
// A fault is one line. [Store.On] selects calls, and a method of [Calls] says
// what happens to them:
//
//	store.On(statetest.Put, "agents.*").Fail(err)                    // fails, was not applied
//	store.On(statetest.Put, "jobs.*").Fail(state.ErrValueTooLarge)   // a value that is too large
//	store.On(statetest.Writes, "config.*").Always().Deny()           // no permission
//	store.On(statetest.Update, "counter").Nth(3).LoseAnswer()        // applied, outcome unknown
//	store.On(statetest.Update, "counter").LoseRequest()              // not applied, outcome unknown
//	store.On(statetest.Put, "status").ApplyLate(3*time.Second)       // applied when it has failed
//	store.On(statetest.Put, "status").ApplyBehind(2)                 // applied after others' writes
//	store.On(statetest.Reads, "*").For(time.Minute).Slow(time.Second)
//	store.On(statetest.Get, "config").LoseRequest()                  // hangs until its context ends
//
// Watches, those that run and those that will be opened:
//
//	store.Watches("config.*").End()                    // now
//	store.Watches("config.*").CutOff(time.Minute)      // then the last states only
//	store.Watches("config.*").SkipReplaced()           // a state that is replaced soon
//	store.On(statetest.Watch, "config.*").End(5)       // the next one, after five events
//	store.On(statetest.Watch, "*").Always().CutOff(0, time.Second)
//
// Locks:
//
//	store.TakeAway("leader")                                  // an operator deposes the holder
//	store.On(statetest.Refresh, "leader").Nth(3).TakeAway()   // at its third refresh
//	store.On(statetest.Lock, "leader").Lapse()                // its refreshes do not get through
//	store.On(statetest.Put, "account").Pause(time.Minute)     // the holder sleeps past its lease, and writes
//	store.On(statetest.Unlock, "leader").ApplyLate(time.Second) // handed over late
//	store.On(statetest.Lock, "leader").LoseAnswer()           // held by nobody until it lapses
//	store.On(statetest.Lock, "leader").Times(3).Fail(state.ErrLockHeld) // somebody else is faster
//
// The server or the whole process:
//
//	store.Unreachable(time.Minute)
//	store.On(statetest.Update, "counter").Unreachable(time.Minute) // while this one is on its way
//	store.Pause(time.Minute)
//
// And all of it at random: [Store.Chaos]. [Store.Heal] ends what goes on.
//
// # What can happen
//
// Whatever a Store does is something that a [state.NATSStore] can do to a program: it has its
// errors and its timing, and what the store below promises still holds. A lock
// never has two live holders. A write that takes effect late does so within ten
// seconds, an Update or DeleteRevision only on the revision that it names. A watch
// that has not ended delivers the last state of every key, and every expiry. A call
// without an answer gives up after five seconds, which take no time in a bubble.
//
// # Time
//
// Everything goes by package time. Use a testing/synctest bubble: then a
// day passes in a moment, and the same test meets the same faults at the same
// times. After [Store.Close] nothing is left running. A Store around a NATSStore
// works the same, in real time.
package statetest
