package state

import "sync/atomic"

// Stats are counters of a NATSStore since it was opened, as [database/sql.DBStats]
// are of a database, and what it holds now.
type Stats struct {
	Requests        uint64 // Requests is how many requests were made, repetitions included.
	Retries         uint64 // Retries is how many of them repeated one that failed or was not answered.
	Conflicts       uint64 // Conflicts is how many conditional writes came too late.
	UnknownOutcomes uint64 // UnknownOutcomes is how many calls returned ErrOutcomeUnknown.
	WatchCuts       uint64 // WatchCuts is how often a watched pattern was cut off from the server.

	Watches    int // Watches is how many watches are running, those of Follow and Cache included.
	Consumers  int // Consumers is how many consumers the store has on the server: one for each watched pattern, and one for each listing.
	CachedKeys int // CachedKeys is how many keys the store remembers the last revision of.
}

// counters are what Stats are made of.
type counters struct {
	requests, retries, conflicts, unknown, cuts atomic.Uint64
	consumers, watches                          atomic.Int64
}
