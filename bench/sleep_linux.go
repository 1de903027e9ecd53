package main

import (
	"syscall"
	"time"
)

// sleepBriefly sleeps in the system, which wakes up more exactly than a timer
// of the Go runtime.
func sleepBriefly(d time.Duration) {
	ts := syscall.NsecToTimespec(d.Nanoseconds())
	_ = syscall.Nanosleep(&ts, nil)
}
