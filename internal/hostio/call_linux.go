//go:build (amd64 || arm64) && !race

package hostio

import (
	"syscall"
	"unsafe"
)

// The calls that every segment and datagram needs cannot wait, whatever the mode of the
// descriptor, so they are made without a word to the scheduler. It would prepare for a
// wait, and wake the thread that watches over those if nothing has run for a moment:
// more than the call itself takes. The price is that the garbage collector, where it stops
// the world, waits for the end of a call. (The race detector has to hear of them.)

// receive reads from a socket what there is now.
func receive(fd int, p []byte) (int, error) {
	return call(syscall.SYS_RECVFROM, fd, p, syscall.MSG_DONTWAIT)
}

// send writes to a socket as much as there is room for now.
func send(fd int, p []byte) (int, error) {
	return call(syscall.SYS_SENDTO, fd, p, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
}

func call(number uintptr, fd int, p []byte, flags uintptr) (int, error) {
	n, _, errno := syscall.RawSyscall6(number, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
