package slirp_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/KarpelesLab/slirp"
	"github.com/KarpelesLab/slirp/internal/ring"
)

// The two that are compared: the Linux kernel behind a TAP, and a Stack. Both get
// the same packets from a peer that is only a test, and the same calls from an
// application. Neither is waited for by the clock: a Stack runs in virtual time, and
// the kernel has answered everything when it has answered a ping behind it.

// subject is a TCP with a listener.
type subject interface {
	// inject hands over an IP packet. A subject that may delay its ACK of what is in
	// it sends it now.
	inject(packet []byte, delays bool)

	// pause lets as much time pass as a subject wants between challenge ACKs.
	pause()

	// emitted returns the packets that were sent since the last call.
	emitted() [][]byte

	// The calls of the application. An accept that finds nothing is made again after
	// every step until it does. read takes all that can be read, and returns io.EOF
	// only if there was nothing before.
	accept() bool
	read() ([]byte, error)
	write(p []byte) error
	shutdown() error
	abort()
	closeConn()

	// state returns the state of the connection; "" if that cannot be told now, and
	// last says that it is asked for the last time, whatever it costs.
	state(last bool) string
}

// diffFamily holds the addresses of one IP version: of the subject, and of the peer.
type diffFamily struct {
	name          string
	version       int
	subject, peer netip.Addr
}

var diffFamilies = []diffFamily{
	{"IPv4", 4, netip.MustParseAddr("10.0.2.15"), netip.MustParseAddr("10.0.2.99")},
	{"IPv6", 6, netip.MustParseAddr("fd00::15"), netip.MustParseAddr("fd00::99")},
}

// packet puts an IP header in front of a transport packet whose checksum is at off,
// and fills that.
func (f *diffFamily) packet(proto uint8, transport []byte, off int) []byte {
	transport[off], transport[off+1] = 0, 0
	be := binary.BigEndian
	src, dst := f.peer.AsSlice(), f.subject.AsSlice()
	if f.version == 6 {
		be.PutUint16(transport[off:], slirp.IPv6Checksum([16]byte(src), [16]byte(dst), proto, uint32(len(transport)), transport))
		h := []byte{0x60, 0, 0, 0, 0, 0, proto, 64}
		be.PutUint16(h[4:], uint16(len(transport)))
		return append(append(append(h, src...), dst...), transport...)
	}
	if proto == unix.IPPROTO_ICMP {
		be.PutUint16(transport[off:], slirp.IPChecksum(transport))
	} else {
		be.PutUint16(transport[off:], slirp.TCPChecksum(src, dst, transport, nil))
	}
	h := []byte{0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, proto, 0, 0}
	h = append(append(h, src...), dst...)
	be.PutUint16(h[2:], uint16(len(h)+len(transport)))
	be.PutUint16(h[10:], slirp.IPChecksum(h))
	return append(h, transport...)
}

// fromSubject returns the transport packet in an IP packet of the subject for the
// peer, and its protocol; nil if it is anything else.
func (f *diffFamily) fromSubject(packet []byte) (proto uint8, transport []byte) {
	n, at, end := 20, 12, 0
	if f.version == 6 {
		n, at = 40, 8
	}
	if len(packet) < n || int(packet[0]>>4) != f.version {
		return 0, nil
	}
	if f.version == 4 {
		proto, end = packet[9], int(binary.BigEndian.Uint16(packet[2:]))
	} else {
		proto, end = packet[6], n+int(binary.BigEndian.Uint16(packet[4:]))
	}
	size := len(f.peer.AsSlice())
	if end < n || end > len(packet) || string(packet[at:at+size]) != string(f.subject.AsSlice()) ||
		string(packet[at+size:at+2*size]) != string(f.peer.AsSlice()) {
		return 0, nil
	}
	return proto, packet[n:end]
}

// stackSubject is a Stack in a bubble.
type stackSubject struct {
	diffFamily
	t          *testing.T
	stack      *slirp.Stack
	listener   net.Listener
	guest, own netip.AddrPort

	mu     sync.Mutex
	frames [][]byte
	ack    uint32 // of the latest frame that emitted has returned
	conn   net.Conn
}

const diffReceiveBuffer = 64 << 10

func newStackSubject(t *testing.T, f diffFamily, peer, port uint16) *stackSubject {
	stack, err := slirp.NewWithConfig(slirp.Config{ReceiveBuffer: diffReceiveBuffer})
	if err != nil {
		t.Fatal(err)
	}
	s := &stackSubject{diffFamily: f, t: t, stack: stack,
		guest: netip.AddrPortFrom(f.peer, peer), own: netip.AddrPortFrom(f.subject, port)}
	if s.listener, err = stack.Listen("tcp", s.own.String()); err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := s.listener.Accept()
		if err == nil {
			s.mu.Lock()
			s.conn = c
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *stackSubject) close() { s.stack.Close() }

func (s *stackSubject) inject(packet []byte, delays bool) {
	err := s.stack.HandlePacket(0, ring.GuestMAC, ring.GatewayMAC, packet, func(frame []byte) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.frames = append(s.frames, frame[14:])
		return nil
	})
	if err != nil {
		s.t.Errorf("HandlePacket: %v", err)
	}
	synctest.Wait()
	if delays && !s.acknowledged() {
		time.Sleep(41 * time.Millisecond) // an ACK is delayed by 40 ms
		synctest.Wait()
	}
}

// acknowledged reports whether what was sent since the last call of emitted
// acknowledges more than what was sent before.
func (s *stackSubject) acknowledged() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.frames)
	return n > 0 && s.ackOf(s.frames[n-1]) != s.ack
}

func (s *stackSubject) pause() {
	time.Sleep(501 * time.Millisecond)
	synctest.Wait()
}

func (s *stackSubject) emitted() [][]byte {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	frames := s.frames
	s.frames = nil
	if n := len(frames); n > 0 {
		s.ack = s.ackOf(frames[n-1])
	}
	return frames
}

func (s *stackSubject) ackOf(frame []byte) uint32 {
	_, segment := s.fromSubject(frame)
	return binary.BigEndian.Uint32(segment[8:])
}

func (s *stackSubject) accept() bool {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn != nil
}

func (s *stackSubject) read() (all []byte, err error) {
	buf := make([]byte, 1<<16)
	for {
		s.conn.SetReadDeadline(time.Now().Add(1)) // what is there is read all the same
		n, err := s.conn.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil && len(all) > 0 {
			return all, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

func (s *stackSubject) write(p []byte) error {
	_, err := s.conn.Write(p)
	return err
}

func (s *stackSubject) shutdown() error { return s.conn.(*slirp.VirtualConn).CloseWrite() }

func (s *stackSubject) abort() {
	s.conn.(*slirp.VirtualConn).SetLinger(0)
	s.conn.Close()
}

func (s *stackSubject) closeConn() { s.conn.Close() }

func (s *stackSubject) state(bool) string { return s.stack.TCPState(s.guest, s.own) }

// diffKernel is a namespace with a TAP device, behind which is nobody but the test.
type diffKernel struct {
	ns  *ring.NetNS
	tap *os.File
	raw syscall.RawConn
}

// kernelSettings turn off what sends at times of its own: delayed ACKs, probes for
// lost tails, pacing; and the limits between challenge ACKs.
var kernelSettings = map[string]string{
	"net/ipv4/tcp_congestion_control":  "reno",
	"net/ipv4/tcp_early_retrans":       "0",
	"net/ipv4/tcp_autocorking":         "0",
	"net/ipv4/tcp_invalid_ratelimit":   "0",
	"net/ipv4/tcp_challenge_ack_limit": "2147483647",
	"net/ipv4/tcp_no_metrics_save":     "1",
	"net/ipv4/tcp_timestamps":          "1",
	"net/ipv4/tcp_sack":                "1",
	"net/ipv4/tcp_dsack":               "1",
	"net/ipv4/tcp_window_scaling":      "1",
	"net/ipv4/tcp_rfc1337":             "0",
}

func newDiffKernel(t *testing.T) *diffKernel {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ns, err := ring.NewNetNS()
	must(err)
	t.Cleanup(func() { ns.Close() })
	tap, err := ns.TAP("tap0", false)
	must(err)
	t.Cleanup(func() { tap.Close() })
	must(ns.Do(func() error {
		for name, value := range kernelSettings {
			if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	}))
	commands := []string{fmt.Sprintf("link set tap0 address %v mtu 1500 txqueuelen 10000 up", net.HardwareAddr(ring.GuestMAC[:]))}
	for _, f := range diffFamilies {
		dad := map[int]string{6: "nodad"}[f.version]
		commands = append(commands,
			fmt.Sprintf("addr add %v/%d dev tap0 %s", f.subject, f.subject.BitLen(), dad),
			fmt.Sprintf("neigh add %v lladdr %v dev tap0 nud permanent", f.peer, net.HardwareAddr(ring.GatewayMAC[:])),
			fmt.Sprintf("route add %v/%d dev tap0 quickack 1", f.peer, f.peer.BitLen()))
	}
	must(ns.IP(commands...))
	raw, err := tap.SyscallConn()
	must(err)
	return &diffKernel{ns, tap, raw}
}

// kernelSubject is the kernel with one listener.
type kernelSubject struct {
	*diffKernel
	diffFamily
	t              *testing.T
	guest, own     netip.AddrPort
	listener, conn int  // file descriptors; -1: none
	forgotten      bool // the connection is in no table
	fence          uint16
	frames         [][]byte
}

func newKernelSubject(t *testing.T, k *diffKernel, f diffFamily, peer, port uint16) *kernelSubject {
	s := &kernelSubject{diffKernel: k, diffFamily: f, t: t, conn: -1,
		guest: netip.AddrPortFrom(f.peer, peer), own: netip.AddrPortFrom(f.subject, port)}
	err := k.ns.Do(func() (err error) {
		domain := unix.AF_INET
		var sa unix.Sockaddr = &unix.SockaddrInet4{Port: int(port), Addr: [4]byte(f.subject.AsSlice()[:4])}
		if f.version == 6 {
			domain = unix.AF_INET6
			sa = &unix.SockaddrInet6{Port: int(port), Addr: f.subject.As16()}
		}
		if s.listener, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.SetsockoptInt(s.listener, unix.SOL_SOCKET, unix.SO_RCVBUF, diffReceiveBuffer); err != nil {
			return err
		}
		if err = unix.SetsockoptInt(s.listener, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1); err != nil {
			return err
		}
		if err = unix.Bind(s.listener, sa); err != nil {
			return err
		}
		return unix.Listen(s.listener, 16)
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *kernelSubject) close() {
	if s.conn >= 0 {
		s.abort()
	}
	unix.Close(s.listener)
	s.emitted()
}

func (s *kernelSubject) inject(packet []byte, _ bool) { s.send(packet) }

func (s *kernelSubject) send(packet []byte) {
	frame := make([]byte, 0, 14+len(packet))
	frame = append(append(frame, ring.GuestMAC[:]...), ring.GatewayMAC[:]...)
	frame = append(frame, map[int][]byte{4: {0x08, 0x00}, 6: {0x86, 0xdd}}[s.version]...)
	if _, err := s.tap.Write(append(frame, packet...)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *kernelSubject) pause() {}

// emitted sends a ping, and reads what stands in front of the answer.
func (s *kernelSubject) emitted() [][]byte {
	s.fence++
	ping := []byte{8, 0, 0, 0, 0x51, 0x1f, byte(s.fence >> 8), byte(s.fence)}
	proto, reply := uint8(unix.IPPROTO_ICMP), byte(0)
	if s.version == 6 {
		ping[0], proto, reply = 128, unix.IPPROTO_ICMPV6, 129
	}
	s.send(s.packet(proto, ping, 2))
	s.tap.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 1<<16)
	for {
		n, err := s.tap.Read(buf)
		if err != nil {
			s.t.Fatalf("the kernel does not answer a ping: %v", err)
		}
		packet := append([]byte(nil), buf[min(n, 14):n]...)
		switch p, transport := s.fromSubject(packet); {
		case p == unix.IPPROTO_TCP:
			s.frames = append(s.frames, packet)
		case p == proto && len(transport) == len(ping) && transport[0] == reply && string(transport[4:]) == string(ping[4:]):
			frames := s.frames
			s.frames = nil
			return frames
		}
	}
}

func (s *kernelSubject) accept() bool {
	if s.conn >= 0 {
		return true
	}
	fd, _, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return false
	}
	s.conn = fd
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		s.t.Fatal(err)
	}
	return true
}

func (s *kernelSubject) read() (all []byte, err error) {
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Read(s.conn, buf)
		all = append(all, buf[:max(n, 0)]...)
		switch {
		case len(all) > 0 && n <= 0:
			return all, nil
		case err != nil:
			return nil, err
		case n == 0:
			return nil, io.EOF
		}
	}
}

func (s *kernelSubject) write(p []byte) error {
	return unix.Sendto(s.conn, p, unix.MSG_NOSIGNAL, nil)
}

func (s *kernelSubject) shutdown() error { return unix.Shutdown(s.conn, unix.SHUT_WR) }

func (s *kernelSubject) abort() {
	unix.SetsockoptLinger(s.conn, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	s.closeConn()
}

func (s *kernelSubject) closeConn() {
	unix.Close(s.conn)
	s.conn = -1
}

var kernelStates = [...]string{"", "ESTABLISHED", "SYN-SENT", "SYN-RECEIVED", "FIN-WAIT-1", "FIN-WAIT-2",
	"TIME-WAIT", "CLOSED", "CLOSE-WAIT", "LAST-ACK", "LISTEN", "CLOSING", "SYN-RECEIVED"}

func (s *kernelSubject) state(last bool) string {
	if s.conn >= 0 {
		info, err := unix.GetsockoptTCPInfo(s.conn, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			s.t.Fatal(err)
		}
		if state := kernelStates[info.State]; state != "CLOSED" {
			return state
		}
	} else if !last {
		return ""
	}
	// A socket that is in TIME-WAIT says that it is closed.
	if !s.forgotten || last {
		state := s.tableState()
		s.forgotten = state == "CLOSED"
		return state
	}
	return "CLOSED"
}

// tableState looks the connection up in the kernel's table, which is slow.
func (s *kernelSubject) tableState() string {
	var table []byte
	err := s.ns.Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/tcp" + map[int]string{6: "6"}[s.version])
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	ports := [2]string{fmt.Sprintf(":%04X", s.own.Port()), fmt.Sprintf(":%04X", s.guest.Port())}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		var st int
		if len(f) > 3 && strings.HasSuffix(f[1], ports[0]) && strings.HasSuffix(f[2], ports[1]) {
			if _, err := fmt.Sscanf(f[3], "%X", &st); err != nil || st >= len(kernelStates) {
				s.t.Fatalf("unknown state in %q", line)
			}
			return kernelStates[st]
		}
	}
	return "CLOSED"
}

// errorName returns what an error of either subject comes down to.
func errorName(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case err == io.EOF:
		return "EOF"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EAGAIN):
		return "nothing"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}
