//go:build unix

package slirp

import (
	"runtime"
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

// refuseSegments has Linux refuse to cut datagrams of the socket: without checksums,
// SO_NO_CHECK, it does not.
func refuseSegments(c syscall.RawConn) (err error) {
	const noCheck = 11
	if runtime.GOOS == "linux" {
		c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, noCheck, 1) })
	}
	return err
}
