package hostio

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

// listen returns a listener on a loopback address, or skips the test.
func listen(t *testing.T, address string) net.Listener {
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// keepsAlive reports whether the other end of a connection is asked whether it is there.
func keepsAlive(t *testing.T, c net.Conn) bool {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	on := 0
	raw.Control(func(fd uintptr) {
		on, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
	})
	if err != nil {
		t.Fatal(err)
	}
	return on != 0
}

var loopbacks = []string{"127.0.0.1:0", "[::1]:0"}

func TestDialer(t *testing.T) {
	for _, address := range loopbacks {
		t.Run(address, func(t *testing.T) {
			l := listen(t, address)
			c, err := NewDialer().Dial("tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			far, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer far.Close()
			if got, want := c.RemoteAddr().String(), far.LocalAddr().String(); got != want {
				t.Errorf("connected to %s, want %s", got, want)
			}
			if got, want := c.LocalAddr().String(), far.RemoteAddr().String(); got != want {
				t.Errorf("connected from %s, want %s", got, want)
			}
			if keepsAlive(t, c) {
				t.Error("the other end is asked from the beginning")
			}
			KeepAlive(c)
			if !keepsAlive(t, c) {
				t.Error("the other end is not asked")
			}
		})
	}
}

// TestConnectNow has a socket that is connected before package net has done so.
func TestConnectNow(t *testing.T) {
	for _, address := range loopbacks {
		t.Run(address, func(t *testing.T) {
			l := listen(t, address)
			to := l.Addr().(*net.TCPAddr).AddrPort()
			family := syscall.AF_INET
			if to.Addr().Is6() {
				family = syscall.AF_INET6
			}
			fd, err := syscall.Socket(family, syscall.SOCK_STREAM|syscall.SOCK_NONBLOCK|syscall.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			f := os.NewFile(uintptr(fd), "socket")
			defer f.Close()
			raw, err := f.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			if err := connectNow("udp4", to.String(), raw); err != nil {
				t.Error(err)
			}
			if _, err := syscall.Getpeername(fd); err != syscall.ENOTCONN {
				t.Errorf("connected for UDP: %v", err)
			}
			if err := connectNow("tcp", to.String(), raw); err != nil {
				t.Error(err)
			}
			for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) { // under load a moment later
				_, err := syscall.Getpeername(fd)
				if err == nil {
					break
				}
				if time.Now().After(end) {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestDialerErrors compares with the errors of package net.
func TestDialerErrors(t *testing.T) {
	free := listen(t, loopbacks[0])
	free.Close()
	for name, to := range map[string]string{
		"refused": free.Addr().String(), "broadcast": "255.255.255.255:9", "port 0": "127.0.0.1:0",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := NewDialer().Dial("tcp", to)
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			c, want := net.Dial("tcp", to)
			if want == nil {
				c.Close()
				t.Fatal("package net has connected")
			}
			if err.Error() != want.Error() || KindOf(err) != KindOf(want) {
				t.Errorf("%v (%d), want %v (%d)", err, KindOf(err), want, KindOf(want))
			}
		})
	}
}

// TestDialerWaits dials somebody who does not answer yet: a listener without room.
func TestDialerWaits(t *testing.T) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	wait := syscall.NsecToTimeval(int64(patience))
	if err := errors.Join(
		syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
		syscall.Listen(fd, 0),
		syscall.SetsockoptTimeval(fd, syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &wait),
	); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*syscall.SockaddrInet4).Port)).String()
	first, err := NewDialer().Dial("tcp", to) // takes the only place
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()

	// dial returns what NewDialer does, and calls f when that has asked for the connection.
	dial := func(ctx context.Context, f func()) error {
		d := NewDialer()
		control := d.Control
		d.Control = func(network, address string, c syscall.RawConn) error {
			err := control(network, address, c)
			c.Control(func(fd uintptr) {
				if _, err := syscall.Getpeername(int(fd)); err != syscall.ENOTCONN {
					t.Errorf("connected without room: %v", err)
				}
			})
			f()
			return err
		}
		c, err := d.DialContext(ctx, "tcp", to)
		if err == nil {
			c.Close()
		}
		return err
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := dial(ctx, cancel); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled while it waits: %v, want %v", err, context.Canceled)
	}
	done, asked := make(chan error, 1), make(chan bool, 1)
	go func() { done <- dial(t.Context(), func() { asked <- true }) }()
	<-asked
	for range 2 { // the first, and the one that waits, which asks again after a second
		accepted, _, err := syscall.Accept(fd)
		if err != nil {
			t.Fatal(err)
		}
		syscall.Close(accepted)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
