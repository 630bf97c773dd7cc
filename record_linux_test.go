package slirp_test

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/KarpelesLab/slirp/internal/ring"
)

// recorder keeps the frames that pass a device, as a capture file.
type recorder struct {
	io.ReadWriter
	mu      sync.Mutex
	capture []byte
}

func (r *recorder) note(frame []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	le := binary.LittleEndian
	now := time.Now()
	r.capture = le.AppendUint32(r.capture, uint32(now.Unix()))
	r.capture = le.AppendUint32(r.capture, uint32(now.Nanosecond()/1000))
	r.capture = le.AppendUint32(r.capture, uint32(len(frame)))
	r.capture = le.AppendUint32(r.capture, uint32(len(frame)))
	r.capture = append(r.capture, frame...)
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.ReadWriter.Read(b)
	if err == nil {
		r.note(b[:n])
	}
	return n, err
}

func (r *recorder) Write(b []byte) (int, error) {
	r.note(b)
	return r.ReadWriter.Write(b)
}

// captureHeader begins a capture file of Ethernet frames.
func captureHeader() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, 0xa1b2c3d4)
	b = le.AppendUint16(b, 2)
	b = le.AppendUint16(b, 4)
	b = append(b, make([]byte, 8)...)
	b = le.AppendUint32(b, 65535)
	return le.AppendUint32(b, 1)
}

// TestKernelRecord has a kernel do a little of everything, and with SLIRP_RECORD
// writes what passes to that file: testdata/guest.pcap, with which the fuzz targets
// begin, was made by
//
//	SLIRP_RING=1 SLIRP_RECORD=testdata/guest.pcap go test -run TestKernelRecord .
func TestKernelRecord(t *testing.T) {
	var all []byte
	eachKernel(t, kernelOptions{record: true}, func(t *testing.T, r *kernelRing) {
		r.talk()
		rec := r.link.Device.(*recorder)
		rec.mu.Lock()
		defer rec.mu.Unlock()
		if len(rec.capture) < 10_000 {
			t.Errorf("only %d bytes were recorded", len(rec.capture))
		}
		all = append(all, rec.capture...)
	})
	if name := os.Getenv("SLIRP_RECORD"); name != "" && !t.Failed() {
		if err := os.WriteFile(name, append(captureHeader(), all...), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

// talk uses what the guest's kernel has, once and briefly.
func (r *kernelRing) talk() {
	for _, size := range []string{"8", "3000"} {
		r.must(r.run(nil, nil, "busybox", "ping", "-c", "1", "-W", "5", "-s", size, r.server.String()))
	}
	echo := r.serve(func(c *net.TCPConn) error {
		_, err := io.Copy(c, c)
		return err
	})
	c := r.dial(echo)
	r.must(ring.Send(c, 5000))
	r.must(ring.Verify(c, 5000))
	c.Close()

	c = r.dial(r.serve(func(c *net.TCPConn) error { // the server ends first
		_, err := io.WriteString(c, "220 ready\r\n")
		return err
	}))
	_, err := io.ReadAll(c)
	r.must(err)
	c.Close()

	c = r.dial(r.serve(func(c *net.TCPConn) error {
		io.Copy(io.Discard, c) // ends with a reset
		return nil
	}))
	_, err = io.WriteString(c, "to be reset")
	r.must(err)
	c.SetLinger(0)
	c.Close()
	if _, err := r.tryDial("tcp", net.JoinHostPort(r.server.String(), "9")); err == nil {
		r.t.Error("nobody listens, and a connection is made")
	}

	server, err := r.host.ListenPacket(r.t.Context(), net.JoinHostPort(r.server.String(), "0"))
	r.must(err)
	defer server.Close()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			server.WriteTo(buf[:n], from)
		}
	}()
	u := r.dialUDP(server.LocalAddr().String())
	for _, n := range []int{0, 30, 4000} {
		_, err := u.Write(make([]byte, n))
		r.must(err)
		got, err := u.Read(make([]byte, 5000))
		r.must(err)
		if got != n {
			r.t.Errorf("%d bytes come back of %d", got, n)
		}
	}
	refused := r.dialUDP(net.JoinHostPort(r.server.String(), "9"))
	refused.Write([]byte("x"))
	if _, err := refused.Read(make([]byte, 10)); err == nil {
		r.t.Error("a datagram was answered that nobody got")
	}
	r.options()
}

// options sends a ping with a TTL of 1, and a datagram with a router alert, or with
// options for its destination.
func (r *kernelRing) options() {
	r.run(nil, nil, "busybox", "ping", "-c", "1", "-W", "1", "-t", "1", r.server.String())
	level, option, value := unix.IPPROTO_IP, unix.IP_OPTIONS, "\x94\x04\x00\x00"
	if r.network == "6" {
		level, option, value = unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, "\x00\x00\x01\x04\x00\x00\x00\x00"
	}
	u := r.dialUDP(net.JoinHostPort(r.server.String(), "9")).(*net.UDPConn)
	raw, err := u.SyscallConn()
	r.must(err)
	var failed error
	r.must(raw.Control(func(fd uintptr) { failed = unix.SetsockoptString(int(fd), level, option, value) }))
	r.must(failed)
	_, err = u.Write([]byte("behind options"))
	r.must(err)
	u.Read(make([]byte, 10)) // the refusal
}
