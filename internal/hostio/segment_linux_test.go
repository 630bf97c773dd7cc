package hostio

import (
	"bytes"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// udpGRO is UDP_GRO of linux/udp.h: a socket is given several datagrams at once.
const udpGRO = 104

// TestSendSegments: datagrams that are sent together arrive together where somebody
// asks for that, and one by one elsewhere.
func TestSendSegments(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		for _, together := range []bool{false, true} {
			for _, connected := range []bool{false, true} {
				server, err := net.ListenPacket("udp", address)
				if err != nil {
					t.Skip(err)
				}
				defer server.Close()
				server.SetDeadline(time.Now().Add(20 * time.Second))
				if together && !setsockopt(server.(*net.UDPConn), syscall.IPPROTO_UDP, udpGRO) {
					t.Skip("this kernel has no UDP_GRO")
				}
				to := server.LocalAddr().(*net.UDPAddr).AddrPort()
				var client net.Conn
				dest := netip.AddrPort{}
				if connected {
					client, err = net.Dial("udp", to.String())
				} else {
					dest = to
					var c net.PacketConn
					c, err = net.ListenPacket("udp", netip.AddrPortFrom(to.Addr(), 0).String())
					client, _ = c.(net.Conn)
				}
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				data := bytes.Repeat([]byte("0123456789"), 250)
				const size = 1000
				sender := NewSender(client)
				if !sender.Segments() {
					t.Skip("this kernel has no UDP_SEGMENT")
				}
				if err := sender.SendSegments(data, size, dest); err != nil {
					t.Skipf("this kernel does not cut datagrams: %v", err)
				}
				buf := make([]byte, 5000)
				for rest := data; len(rest) > 0; {
					n, _, err := server.ReadFrom(buf)
					want := min(size, len(rest))
					if together {
						want = len(rest)
					}
					if err != nil || !bytes.Equal(buf[:n], rest[:want]) {
						t.Fatalf("%s, together %v: read %d bytes, %v, want %d", address, together, n, err, want)
					}
					rest = rest[want:]
				}
			}
		}
	}
}

func setsockopt(c *net.UDPConn, level, option int) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	failed := raw.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), level, option, 1) })
	return failed == nil && err == nil
}

// TestSendSegmentsRefused: a socket that may not send several at once sends none.
func TestSendSegmentsRefused(t *testing.T) {
	server, client := pair(t)
	const noCheck = 11 // SO_NO_CHECK: checksums cannot be left out of some
	if !setsockopt(client.(*net.UDPConn), syscall.SOL_SOCKET, noCheck) {
		t.Skip("no SO_NO_CHECK")
	}
	s := NewSender(client)
	if !s.Segments() {
		t.Skip("this kernel has no UDP_SEGMENT")
	}
	if err := s.SendSegments(make([]byte, 2000), 1000, netip.AddrPort{}); err == nil {
		t.Error("no error")
	}
	if err := s.Send([]byte("x")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 3000)
	if n, _, err := server.ReadFrom(buf); err != nil || n != 1 {
		t.Errorf("%d bytes arrive first, %v", n, err)
	}
}
