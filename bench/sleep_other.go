//go:build !linux

package main

import "time"

// sleepBriefly sleeps as exactly as the system lets it.
func sleepBriefly(d time.Duration) { time.Sleep(d) }
