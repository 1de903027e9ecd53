//go:build race

package statetest_test

import "runtime"

// On several processors the race detector crashes now and then: all timers of a bubble
// share one race context (golang/go#78156).
func init() { runtime.GOMAXPROCS(1) }
