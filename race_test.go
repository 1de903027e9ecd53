//go:build race

package state

// On several processors the race detector crashes now and then: in a bubble they all
// note what timers do in the same place (golang/go#78156).
func init() { bubbleProcs = 1 }
