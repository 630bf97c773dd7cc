package hostio

import (
	"errors"
	"net"
	"testing"
	"time"
)

func TestSender(t *testing.T) {
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Skip(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(20 * time.Second))
	conn, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s := NewSender(conn)
	if s == nil {
		t.Skip("not to be had here")
	}
	buf := make([]byte, 100)
	for _, text := range []string{"hello", "", "world"} {
		if err := s.Send([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if n, err := server.Read(buf); err != nil || string(buf[:n]) != text {
			t.Fatalf("got %q, %v, want %q", buf[:n], err, text)
		}
	}
	if err := s.Send(make([]byte, 70000)); KindOf(err) != TooLong {
		t.Errorf("a datagram that is too long: %v", err)
	}
	server.Close()
	refused := func() bool { return KindOf(s.Send(nil)) == Refused }
	for end := time.Now().Add(20 * time.Second); !refused(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not refused")
		}
	}
	conn.Close()
	if err := s.Send(nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// What is no socket of the operating system, or wraps one, has its own Write.
func TestNoSender(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	for _, conn := range []net.Conn{a, struct{ *net.UDPConn }{}} {
		if NewSender(conn) != nil {
			t.Errorf("a Sender for %T", conn)
		}
	}
}
