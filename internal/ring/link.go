// Package ring makes guests for tests of package slirp: a Linux kernel behind a
// TAP device in a network namespace of its own, or in a virtual machine.
package ring

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"sync"

	"github.com/KarpelesLab/slirp"
)

// GuestMAC and GatewayMAC are the Ethernet addresses at the guest's and at the
// stack's end of every [Link].
var (
	GuestMAC   = [6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}
	GatewayMAC = [6]byte{0x52, 0x55, 0x0a, 0x00, 0x02, 0x02}
)

// Link is the wire between a guest and a [slirp.Stack]. It answers the guest's
// ARP requests, which never reach the stack.
type Link struct {
	Stack  *slirp.Stack
	Device io.ReadWriter // a frame per call; Write may be called concurrently

	// VirtioNet says that each frame has a virtio_net_hdr in front of it, as the
	// stack was told by its Config.
	VirtioNet bool

	// Loss is the probability with which a frame is lost, each way.
	Loss float64

	mu   sync.Mutex
	rng  *rand.Rand
	lost int
}

// Serve carries frames until the device fails, and returns its error. It reports
// those of HandlePacket.
func (l *Link) Serve(report func(error)) error {
	buf := make([]byte, 1<<17)
	for {
		n, err := l.Device.Read(buf)
		if err != nil {
			return err
		}
		if err := l.receive(buf[:n]); err != nil {
			report(err)
		}
	}
}

// Lost returns the number of frames that were lost.
func (l *Link) Lost() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost
}

func (l *Link) receive(frame []byte) error {
	var header []byte
	if l.VirtioNet {
		n := min(len(frame), slirp.VirtioNetHeaderLen)
		header, frame = make([]byte, n), frame[n:]
	}
	if len(frame) < 14 || l.lose() {
		return nil
	}
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0806:
		if reply := arpReply(frame); reply != nil {
			return l.Send(append(header, reply...))
		}
	case 0x0800, 0x86dd:
		return l.Stack.HandlePacket(0, [6]byte(frame[6:]), GatewayMAC, frame[14:], l.Send)
	}
	return nil
}

// Send is the [slirp.Writer] of the link.
func (l *Link) Send(frame []byte) error {
	if l.lose() {
		return nil
	}
	_, err := l.Device.Write(frame)
	return err
}

// lose reports whether to lose the next frame. The decisions are the same in
// every run; which frames they hit is up to the kernels at both ends.
func (l *Link) lose() bool {
	if l.Loss == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rng == nil {
		l.rng = rand.New(rand.NewPCG(1, 2))
	}
	if l.rng.Float64() >= l.Loss {
		return false
	}
	l.lost++
	return true
}

// arpReply returns the answer to an ARP request (RFC 826): every address but
// the guest's own is at GatewayMAC. It returns nil for anything else.
func arpReply(frame []byte) []byte {
	if len(frame) < 42 || binary.BigEndian.Uint16(frame[20:]) != 1 {
		return nil
	}
	sender, target := frame[22:32], frame[38:42] // hardware and protocol address; protocol address
	if string(sender[6:]) == string(target) || string(sender[6:]) == "\x00\x00\x00\x00" {
		return nil // the guest announces its address, or asks whether it is taken
	}
	reply := make([]byte, 0, 42)
	reply = append(reply, frame[6:12]...)
	reply = append(reply, GatewayMAC[:]...)
	reply = append(reply, frame[12:20]...)
	reply = append(reply, 0, 2)
	reply = append(reply, GatewayMAC[:]...)
	reply = append(reply, target...)
	return append(reply, sender...)
}

// Framed is a stream of frames, each behind its length in four bytes: what
// QEMU's "stream" network backend speaks.
type Framed struct {
	Conn net.Conn
	mu   sync.Mutex // held while a frame is written
}

// Read reads one frame. It fails if buf cannot hold it.
func (f *Framed) Read(buf []byte) (int, error) {
	if _, err := io.ReadFull(f.Conn, buf[:4]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(buf)
	if uint64(n) > uint64(len(buf)) {
		return 0, io.ErrShortBuffer
	}
	return io.ReadFull(f.Conn, buf[:n])
}

// Write writes one frame.
func (f *Framed) Write(frame []byte) (int, error) {
	msg := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(frame)), uint32(len(frame)))
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.Conn.Write(append(msg, frame...))
	return max(n-4, 0), err
}
