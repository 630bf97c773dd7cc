package hostio

import (
	"errors"
	"net"
	"net/netip"
	"runtime"
	"testing"
	"time"
)

// pair returns a socket, and one that is connected to it.
func pair(t *testing.T) (server *net.UDPConn, client net.Conn) {
	t.Helper()
	server, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { server.Close() })
	server.SetDeadline(time.Now().Add(20 * time.Second))
	client, err = net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return server, client
}

func TestSender(t *testing.T) {
	server, conn := pair(t)
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

// Sockets that are not connected: both directions, both families, and a socket of
// both families.
func TestPackets(t *testing.T) {
	for _, test := range []struct{ network, server, client string }{
		{"udp4", "127.0.0.1:0", "127.0.0.1:0"}, {"udp6", "[::1]:0", "[::1]:0"}, {"udp", "127.0.0.1:0", ":0"}, {"udp", "[::1]:0", ":0"},
	} {
		for _, wrapped := range []bool{false, true} {
			server, err := net.ListenPacket("udp", test.server)
			if err != nil {
				t.Skip(err)
			}
			defer server.Close()
			client, err := net.ListenPacket(test.network, test.client)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			server.SetDeadline(time.Now().Add(20 * time.Second))
			client.SetDeadline(time.Now().Add(20 * time.Second))
			to := server.LocalAddr().(*net.UDPAddr).AddrPort()
			send := func(p []byte) error {
				_, err := client.WriteTo(p, net.UDPAddrFromAddrPort(to))
				return err
			}
			if s := NewSender(client.(*net.UDPConn)); s != nil {
				send = func(p []byte) error { return s.SendTo(p, to) }
			}
			var conn net.PacketConn = client
			if wrapped {
				conn = struct{ net.PacketConn }{client}
			}
			buf := make([]byte, 100)
			r := NewPacketReader(conn, func() []byte { return buf }, func() {})
			for _, text := range []string{"hello", "", "world"} {
				if err := send([]byte(text)); err != nil {
					t.Fatal(err)
				}
				other := make([]byte, 100)
				n, peer, err := server.ReadFrom(other)
				if err != nil || string(other[:n]) != text {
					t.Fatalf("%v: got %q, %v, want %q", test, other[:n], err, text)
				}
				if _, err := server.WriteTo(other[:n], peer); err != nil {
					t.Fatal(err)
				}
				n, err = r.Read()
				from := netip.AddrPortFrom(r.From().Addr().Unmap(), r.From().Port())
				if err != nil || string(buf[:n]) != text || from != to {
					t.Fatalf("%v: got %q from %v, %v, want %q from %v", test, buf[:n], from, err, text, to)
				}
			}
			if err := send(make([]byte, 70000)); KindOf(err) != TooLong {
				t.Errorf("a datagram that is too long: %v", err)
			}
			client.Close()
			if _, err := r.Read(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
			if err := send(nil); !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
		}
	}
}

// A socket does not send to the other family.
func TestSendToOtherFamily(t *testing.T) {
	for network, to := range map[string]string{"udp4": "[2001:db8::1]:53", "udp6": "192.0.2.1:53"} {
		c, err := net.ListenPacket(network, ":0")
		if err != nil {
			t.Skip(err)
		}
		defer c.Close()
		s := NewSender(c.(*net.UDPConn))
		if s == nil {
			t.Skip("not to be had here")
		}
		if err := s.SendTo([]byte("x"), netip.MustParseAddrPort(to)); KindOf(err) != NetUnreachable {
			t.Errorf("%s to %s: %v", network, to, err)
		}
	}
}

func TestPathMTU(t *testing.T) {
	for _, address := range []string{"127.0.0.1:9", "[::1]:9"} {
		conn, err := net.Dial("udp", address)
		if err != nil {
			continue // no such family here
		}
		mtu := PathMTU(conn)
		if runtime.GOOS == "linux" && (mtu < 1280 || mtu > 65536) || runtime.GOOS != "linux" && mtu != 0 {
			t.Errorf("%s: %d", address, mtu)
		}
		conn.Close()
		if mtu := PathMTU(conn); mtu != 0 {
			t.Errorf("%s, closed: %d", address, mtu)
		}
	}
	a, b := net.Pipe()
	if PathMTU(a) != 0 || PathMTU(nil) != 0 {
		t.Error("the path MTU of a pipe")
	}
	a.Close()
	b.Close()
}

// Datagrams that are there are read one after another without waiting, where that can be
// done, and each is what it was.
func TestReaderMore(t *testing.T) {
	for _, connected := range []bool{false, true} {
		server, client := pair(t)
		client.Write(nil)
		_, peer, err := server.ReadFromUDPAddrPort(nil)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		lend := func() []byte { return buf }
		var r *Reader
		if connected {
			r = NewReader(client, lend, func() {})
		} else {
			r = NewPacketReader(client.(*net.UDPConn), lend, func() {})
		}
		next := r.Read
		for round := range 3 {
			for _, text := range []string{"hello", "", "", "world"} {
				server.WriteToUDPAddrPort([]byte(text), peer)
			}
			for i, want := range []string{"hello", "", "", "world"} {
				n, ok, err := 0, true, error(nil)
				if i == 0 || !r.Bursts() {
					n, err = next()
				} else {
					n, ok, err = r.More(buf)
				}
				if !ok || err != nil || string(buf[:n]) != want {
					t.Fatalf("round %d: got %q, %v, %v, want %q", round, buf[:n], ok, err, want)
				}
				if from := server.LocalAddr().(*net.UDPAddr).AddrPort(); !connected && r.From().Port() != from.Port() {
					t.Errorf("from %v, want %v", r.From(), from)
				}
			}
			if n, ok, err := r.More(buf); n != 0 || ok || err != nil {
				t.Errorf("more than there is: %d, %v, %v", n, ok, err)
			}
		}
		if r.Bursts() && runtime.GOOS == "linux" && connected { // where the news is there when Write returns
			server.Close()
			client.Write(nil)
			if _, ok, err := r.More(buf); ok || KindOf(err) != Refused {
				t.Errorf("refused: %v, %v", ok, err)
			}
		}
		client.Close()
		if n, ok, err := r.More(buf); n != 0 || ok || err != nil {
			t.Errorf("closed: %d, %v, %v", n, ok, err)
		}
		if _, err := r.Read(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed: %v", err)
		}
	}
}

// What wraps a socket is read through its own Read only.
func TestReaderNoMore(t *testing.T) {
	server, client := pair(t)
	client.Write(nil)
	_, peer, err := server.ReadFromUDPAddrPort(nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		server.WriteToUDPAddrPort([]byte("x"), peer)
	}
	buf := make([]byte, 100)
	r := NewReader(struct{ net.Conn }{client}, func() []byte { return buf }, func() {})
	for range 2 {
		if n, err := r.Read(); n != 1 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if n, ok, err := r.More(buf); n != 0 || ok || err != nil || r.Bursts() {
			t.Errorf("more: %d, %v, %v", n, ok, err)
		}
	}
}
