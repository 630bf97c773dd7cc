//go:build unix

package slirp

import (
	"syscall"
	"time"
)

// syscallTime is a time that the clock of a bubble does not tell.
type syscallTime struct{ tv syscall.Timeval }

func (s *syscallTime) now() { syscall.Gettimeofday(&s.tv) }

func (s *syscallTime) sub(earlier syscallTime) time.Duration {
	return time.Duration(s.tv.Nano() - earlier.tv.Nano())
}
