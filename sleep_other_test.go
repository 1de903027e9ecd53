//go:build !linux

package state

import "time"

func sleepBriefly(d time.Duration) { time.Sleep(d) }
