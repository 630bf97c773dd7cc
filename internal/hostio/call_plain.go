//go:build unix && (!linux || (!amd64 && !arm64) || race)

package hostio

import "syscall"

// receive reads from a socket that is not in blocking mode.
func receive(fd int, p []byte) (int, error) { return syscall.Read(fd, p) }

// send writes to a socket that is not in blocking mode.
func send(fd int, p []byte) (int, error) { return syscall.Write(fd, p) }
