//go:build race

package main

import "runtime"

// On several processors the race detector crashes now and then: in a bubble they all
// note what timers do in the same place (golang/go#78156).
func init() { runtime.GOMAXPROCS(1) }
