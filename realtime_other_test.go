//go:build !unix

package slirp

import "time"

// syscallTime is not known here: no time passes.
type syscallTime struct{}

func (s *syscallTime) now() {}

func (s *syscallTime) sub(syscallTime) time.Duration { return 0 }
