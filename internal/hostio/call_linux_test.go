//go:build (amd64 || arm64) && !race

package hostio

import (
	"syscall"
	"testing"
)

// Somebody else may have put a socket in blocking mode: os.File.Fd does, in a copy of it.
// A processor must not be taken out of the scheduler's hands for it.
func TestCallNeverWaits(t *testing.T) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(pair[0])
	if _, err := receive(pair[0], make([]byte, 1)); err != syscall.EAGAIN {
		t.Errorf("receive with nothing there: %v, want EAGAIN", err)
	}
	p, sent := make([]byte, 64<<10), 0
	for err == nil {
		var n int
		n, err = send(pair[0], p)
		sent += n
	}
	if err != syscall.EAGAIN || sent == 0 {
		t.Errorf("send without room, after %d bytes: %v, want EAGAIN", sent, err)
	}
	if n, err := receive(pair[1], p); n == 0 || err != nil {
		t.Errorf("receive: %d, %v", n, err)
	}
	syscall.Close(pair[1])
	if _, err := send(pair[0], p); err != syscall.EPIPE {
		t.Errorf("send to nobody: %v, want EPIPE", err)
	}
}
