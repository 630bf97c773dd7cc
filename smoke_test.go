package slirp

import (
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"
)

// wire joins two stacks.
func wire(a, b *Stack) {
	var wa, wb Writer
	wa = func(f []byte) error { return b.HandlePacket(0, [6]byte{1}, [6]byte{2}, f[14:], wb) }
	wb = func(f []byte) error { return a.HandlePacket(0, [6]byte{2}, [6]byte{1}, f[14:], wa) }
	for _, p := range []string{"0.0.0.0/0", "::/0"} {
		a.AddRoute(0, netip.MustParsePrefix(p), [6]byte{2}, [6]byte{1}, wa)
		b.AddRoute(0, netip.MustParsePrefix(p), [6]byte{1}, [6]byte{2}, wb)
	}
}

func TestSmoke(t *testing.T) {
	guest, _ := NewWithConfig(Config{Addresses: []netip.Addr{netip.MustParseAddr("10.0.2.15"), netip.MustParseAddr("fd00::15")}})
	nat := New()
	defer guest.Close()
	defer nat.Close()
	wire(guest, nat)
	data := make([]byte, 64<<20)
	rand.NewChaCha8([32]byte{1}).Read(data)
	want := sha256.Sum256(data)
	serve := func(l net.Listener) {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				h := sha256.New()
				io.Copy(h, c)
				c.Write(h.Sum(nil))
				c.Write(data)
				c.Close()
			}()
		}
	}
	for _, addr := range []string{"127.0.0.1:0", "[::1]:0"} {
		hl, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		vl, err := nat.Listen("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		go serve(hl)
		go serve(vl)
		for _, l := range []net.Listener{hl, vl} {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			t0 := time.Now()
			c, err := guest.DialContext(ctx, "tcp", l.Addr().String())
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(20 * time.Second))
			t1 := time.Now()
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			c.(*VirtualConn).CloseWrite()
			var sum [32]byte
			if _, err := io.ReadFull(c, sum[:]); err != nil || sum != want {
				t.Fatal(err, sum == want)
			}
			t2 := time.Now()
			h := sha256.New()
			n, err := io.Copy(h, c)
			if err != nil || [32]byte(h.Sum(nil)) != want {
				t.Fatal(n, err)
			}
			c.Close()
			t.Logf("%v connect %v up %v down %v", l.Addr(), t1.Sub(t0), t2.Sub(t1), time.Since(t2))
		}
		hl.Close()
		vl.Close()
	}
	t.Logf("%+v", nat.Stats())
}
