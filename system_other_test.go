//go:build !unix

package slirp

import (
	"syscall"
	"time"
)

// processorTime is not known here: nothing is used.
func processorTime() time.Duration { return 0 }

// refuseSegments has nothing to do: several datagrams at once are Linux's.
func refuseSegments(syscall.RawConn) error { return nil }
