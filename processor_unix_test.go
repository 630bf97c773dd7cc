//go:build unix

package slirp

import (
	"syscall"
	"time"
)

// processorTime returns what this process has used of the processors: other load on
// the machine, and the clock of a bubble, have no part in it.
func processorTime() time.Duration {
	var use syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &use)
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}
