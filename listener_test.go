package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Listeners, connections into the guest, and VirtualConn.

func TestListenAddresses(t *testing.T) {
	s := New()
	defer s.Close()
	good := []struct{ network, address, addr string }{
		{"tcp", "10.0.0.1:80", "10.0.0.1:80"},
		{"tcp4", "10.0.0.1:81", "10.0.0.1:81"},
		{"tcp", "[fd00::1]:80", "[fd00::1]:80"},
		{"tcp6", "[fd00::1]:81", "[fd00::1]:81"},
		{"tcp", "127.0.0.1:80", "127.0.0.1:80"},
		{"tcp", "[::1]:80", "[::1]:80"},
		{"tcp", "0.0.0.0:90", "0.0.0.0:90"},
		{"tcp", "[::]:90", "[::]:90"},
		{"tcp", ":91", ":91"},
		{"tcp4", ":92", ":92"},
		{"tcp6", ":92", ":92"},
		{"tcp", "[::ffff:10.9.9.9]:80", "10.9.9.9:80"},
	}
	for _, test := range good {
		l, err := s.Listen(test.network, test.address)
		if err != nil {
			t.Errorf("Listen(%q, %q): %v", test.network, test.address, err)
			continue
		}
		if got := l.Addr().String(); got != test.addr || l.Addr().Network() != "tcp" {
			t.Errorf("Listen(%q, %q).Addr() is %q on %q", test.network, test.address, got, l.Addr().Network())
		}
		if _, ok := l.(*Listener); !ok {
			t.Errorf("a %T", l)
		}
		if _, err := s.Listen(test.network, test.address); err != ErrAddressInUse || err.Error() != "address already in use" {
			t.Errorf("Listen(%q, %q) again: %v", test.network, test.address, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if err := l.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		again, err := s.Listen(test.network, test.address)
		if err != nil {
			t.Errorf("Listen(%q, %q) after Close: %v", test.network, test.address, err)
			continue
		}
		if _, err := l.Accept(); err == nil || !errors.Is(err, net.ErrClosed) || !bytes.Contains([]byte(err.Error()), []byte("listener closed")) {
			t.Errorf("Accept after Close: %v", err)
		}
		if err := l.Close(); err != nil { // and that does not close the other
			t.Error(err)
		}
		if _, err := s.Listen(test.network, test.address); err != ErrAddressInUse {
			t.Errorf("Close of the old listener freed the address of the new one: %v", err)
		}
		defer again.Close()
	}
	for _, network := range []string{"udp", "tcp5", "", "unix", "ip", "TCP"} {
		if _, err := s.Listen(network, "10.0.0.1:80"); err != ErrNetworkUnsupported || err.Error() != "only tcp/tcp4/tcp6 supported" {
			t.Errorf("Listen on %q: %v", network, err)
		}
	}
	for _, bad := range []struct{ network, address string }{
		{"tcp", ""}, {"tcp", "10.0.0.1"}, {"tcp", "10.0.0.1:65536"}, {"tcp", "10.0.0.1:-1"}, {"tcp", "10.0.0.1:x"}, {"tcp", "10.0.0.1:"},
		{"tcp", "fd00::1:80"}, {"tcp", "[fd00::1%eth0]:80"}, {"tcp", "host.example:80"}, {"tcp", "224.0.0.1:80"}, {"tcp", "[ff02::1]:80"},
		{"tcp4", "[fd00::1]:80"}, {"tcp6", "10.0.0.1:80"}, {"tcp6", "[::ffff:10.0.0.1]:80"}, {"tcp", "[10.0.0.1]:x"},
	} {
		if l, err := s.Listen(bad.network, bad.address); err == nil || l != nil {
			t.Errorf("Listen(%q, %q): %v, %v", bad.network, bad.address, l, err)
		}
	}
}

func TestListenPortZero(t *testing.T) {
	s := New()
	defer s.Close()
	seen := make(map[string]bool)
	for _, address := range []string{"10.0.0.1:0", "[fd00::1]:0", ":0", "0.0.0.0:0"} {
		for range 50 {
			l, err := s.Listen("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			a := l.Addr().(*net.TCPAddr)
			if a.Port == 0 || seen[a.String()] {
				t.Errorf("%s: port %d", address, a.Port)
			}
			seen[a.String()] = true
		}
	}
}

func TestListenPriority(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		wild := map[int]string{4: "0.0.0.0", 6: "[::]"}[fam.version]
		exact, family, all := mustListen(t, m.s, "tcp", fam.at(80).String()), mustListen(t, m.s, "tcp", wild+":80"), mustListen(t, m.s, "tcp", ":81")
		if _, err := m.s.Listen("tcp", wild+":81"); err != ErrAddressInUse {
			t.Errorf("%s beside a listener for both families: %v", wild, err)
		}
		if _, err := m.s.Listen("tcp", ":80"); err != ErrAddressInUse {
			t.Errorf("both families beside a listener for one: %v", err)
		}
		port := uint16(1025)
		try := func(to netip.AddrPort, l net.Listener) {
			t.Helper()
			port++
			g := m.open(port, to)
			g.connect()
			c := mustAccept(t, l)
			if c.LocalAddr().String() != to.String() || c.RemoteAddr().String() != g.id.guest.String() {
				t.Errorf("%v to %v, want %v to %v", c.RemoteAddr(), c.LocalAddr(), g.id.guest, to)
			}
			for _, a := range []net.Addr{c.LocalAddr(), c.RemoteAddr()} {
				if _, ok := a.(*net.TCPAddr); !ok {
					t.Errorf("address of type %T", a)
				}
			}
			g.data("x")
			expectText(t, c, "x")
		}
		try(fam.at(80), exact)
		try(netip.AddrPortFrom(fam.other, 80), family)
		try(netip.AddrPortFrom(fam.loopback, 80), family)
		try(fam.at(81), all)
		exact.Close()
		try(fam.at(80), family)
		family.Close()
		g := m.open(1025, fam.at(80))
		g.connect()
		h.accept()
	})
}

// TestChecksumZeroSYN: a SYN with checksum 0 to a listener on the loopback
// address makes a connection, and no timer has a part in that.
func TestChecksumZeroSYN(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m := newMachine(t, New())
		l := mustListen(t, m.s, "tcp", netip.AddrPortFrom(fam.loopback, 8080).String())
		to := netip.AddrPortFrom(fam.loopback, 8080)
		seg := segment{src: netip.AddrPortFrom(fam.loopback, 40000), dst: to, flags: flagS}
		m.flow(flowID{seg.src, to}).offered(&seg)
		p := seg.packet()
		p[len(p)-4], p[len(p)-3] = 0, 0 // the checksum
		if fam.version == 4 {
			p[8], p[10], p[11] = 0, 0, 0 // TTL and header checksum
		}
		start := time.Now()
		m.mustSend(p)
		g := m.openFrom(seg.src, to)
		g.iss = 0
		if s := g.expect("S."); s.ack != 1 || time.Since(start) > 50*time.Millisecond {
			t.Errorf("%v after %v", s, time.Since(start))
		}
		g.nxt = 1
		g.ack()
		mustAccept(t, l)
	})
}

func TestT032_Backlog(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{Backlog: 4})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		var guests []*guest
		answered := 0
		for i := range uint16(10) {
			g := m.open(2000+i, fam.at(80))
			g.syn()
			synctest.Wait()
			if _, ok := g.next(0); ok {
				answered++
			}
			guests = append(guests, g)
		}
		if answered != 4 || m.s.Stats().DropNoAcceptSlot != 6 {
			t.Errorf("%d SYN-ACKs and %d drops, want 4 and 6", answered, m.s.Stats().DropNoAcceptSlot)
		}
		for _, g := range guests[:4] {
			g.mu.Lock()
			g.irs = g.flow(g.id).iss
			g.mu.Unlock()
			g.rcv = 1
			g.ack()
		}
		guests[4].syn()
		guests[4].silent(10 * time.Second) // the queue is full, and nobody in it makes way
		for range 4 {
			mustAccept(t, l)
		}
		guests[4].connect()
		mustAccept(t, l)
	})
}

func TestMaxHalfOpen(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{MaxHalfOpen: 10})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		for i := range uint16(15) { // in no time: none is old enough to make way
			m.open(2000+i, fam.at(80)).syn()
		}
		if st := m.s.Stats(); st.TCPFlows != 10 || st.DropNoAcceptSlot != 5 {
			t.Errorf("%d flows, %d drops", st.TCPFlows, st.DropNoAcceptSlot)
		}
		time.Sleep(3 * time.Second)
		for i := range uint16(10) { // the flood goes on, and an honest guest connects
			m.open(3000+i, fam.at(80)).syn()
		}
		if st := m.s.Stats(); st.TCPFlows != 10 {
			t.Errorf("%d flows", st.TCPFlows)
		}
		old := m.open(2000, fam.at(80))
		old.expect("S.")
		old.nxt = 1
		old.drop()
		old.ack()
		old.expect("R") // it made way
		g := m.open(1025, fam.at(80))
		for range 3 {
			g.syn()
			if _, ok := g.next(time.Second); ok {
				break
			}
		}
		g.mu.Lock()
		g.irs = g.flow(g.id).iss
		g.mu.Unlock()
		g.rcv = 1
		g.ack()
		g.data("honest")
		c := mustAccept(t, l)
		expectText(t, c, "honest")
		time.Sleep(2 * time.Minute)
		m.expectFlows(1)
	})
}

// TestS01_SYNFlood has an honest guest connect in the middle of a flood.
func TestS01_SYNFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fam := families[0]
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		flood := func(i int) {
			seg := segment{src: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), uint16(1024+i>>16)), dst: fam.at(80),
				flags: flagS, win: 1000}
			m.s.HandlePacket(0, m.mac, m.gw, seg.packet(), func([]byte) error { return nil })
		}
		n := 0
		for try := range uint16(20) {
			g := m.open(2000+try, fam.at(80))
			start := time.Now()
			for {
				g.syn()
				if seg, ok := g.next(100 * time.Millisecond); ok {
					g.irs, g.rcv = seg.seq, 1
					g.ack()
					mustAccept(t, l).Close()
					break
				}
				for range 100 { // a thousand a second
					flood(n)
					n++
				}
				if time.Since(start) > 3*time.Second {
					t.Fatalf("a connection was not made in %v during a flood", time.Since(start))
				}
			}
		}
		if st := m.s.Stats(); st.TCPFlows > 256+20 {
			t.Errorf("%d flows", st.TCPFlows)
		}
	})
}

// TestHalfOpenChurn: guests that leave during the handshake free their places.
func TestHalfOpenChurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{Backlog: 8, MaxHalfOpen: 4, MaxPendingDials: 8, MaxTCPFlows: 16})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		for i := range uint16(500) {
			g := m.open(2000+i, fam.at(80))
			g.syn()
			g.expect("S.")
			g.rst()
			g = m.open(2000+i, fam.at(81))
			g.syn()
			g.expect("S.")
			g.rst()
			h.accept()
		}
		m.open(1025, fam.at(80)).connect()
		mustAccept(t, l)
		m.open(1025, fam.at(81)).connect()
		m.expectFlows(2)
	})
}

func TestT033_ListenerCloseWithChildren(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		half, queued, accepted := m.open(1, fam.at(80)), m.open(2, fam.at(80)), m.open(3, fam.at(80))
		accepted.connect()
		c := mustAccept(t, l)
		half.syn()
		half.expect("S.")
		queued.connect()
		synctest.Wait()
		start := time.Now()
		l.Close()
		if seg := queued.expect("R."); seg.at != start || queued.seqOf(seg) != 1 || queued.ackOf(seg) != 1 {
			t.Errorf("%s after %v", queued.show(seg), seg.at.Sub(start))
		}
		half.silent(time.Minute)
		half.ack()
		if seg := half.expect("R"); half.seqOf(seg) != 1 {
			t.Errorf("%s", half.show(seg))
		}
		accepted.data("hello")
		expectText(t, c, "hello")
		m.expectFlows(1)
		m.open(4, fam.at(80)).connect() // through the NAT now
		h.accept()
	})
}

func TestListenerServesNamespaces(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		var guests []*guest
		conns := make([]*VirtualConn, 3)
		for i := range conns {
			n := newMachine(t, m.s)
			n.ns = uintptr(i * 1000)
			n.mac[5] = byte(i)
			g := n.open(1025, fam.at(80)) // the same four numbers
			g.connect()
			conns[i] = mustAccept(t, l)
			guests = append(guests, g)
		}
		for i, g := range guests {
			g.data(fmt.Sprint("from ", i))
		}
		for i, c := range conns {
			expectText(t, c, fmt.Sprint("from ", i))
			putText(t, c, fmt.Sprint("to ", i))
			guests[i].expectText(fmt.Sprint("to ", i))
		}
	})
}

func TestAccept(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		var mu sync.Mutex
		got := make(map[int]int)
		var wg sync.WaitGroup
		for range 5 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for {
					c, err := l.Accept()
					if err != nil {
						var op *net.OpError
						if !errors.Is(err, ErrListenerClosed) || !errors.As(err, &op) || op.Op != "accept" {
							t.Errorf("Accept: %#v", err)
						}
						return
					}
					mu.Lock()
					got[c.RemoteAddr().(*net.TCPAddr).Port]++
					mu.Unlock()
				}
			}()
		}
		for i := range uint16(50) {
			m.open(2000+i, fam.at(80)).connect()
		}
		synctest.Wait()
		l.Close()
		wg.Wait()
		if len(got) != 50 {
			t.Errorf("%d connections accepted, want 50: %v", len(got), got)
		}
		// Close waits for nobody, and a listener that accepts nobody is closed too.
		l = mustListen(t, m.s, "tcp", fam.at(80).String())
		time.AfterFunc(time.Second, func() { l.Close() })
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
	})
}

// dialing calls DialContext and gives its results to a channel.
type dialing struct {
	c   net.Conn
	err error
}

func startDial(ctx context.Context, s *Stack, network, address string) <-chan dialing {
	ch := make(chan dialing, 1)
	go func() {
		c, err := s.DialContext(ctx, network, address)
		ch <- dialing{c, err}
	}()
	return ch
}

// toGuest plays the guest's end of a DialContext: it waits for the SYN to a port.
func (m *machine) toGuest(from netip.AddrPort) (*guest, segment) {
	m.t.Helper()
	var g *guest
	m.wait("SYN", patience, func() bool {
		for id, f := range m.flows {
			if id.guest == from && len(f.queue) > 0 && f.queue[0].flags&flagS != 0 {
				g = m.openFrom(id.guest, id.host)
				return true
			}
		}
		return false
	})
	seg := g.expect("S")
	return g, seg
}

func (g *guest) accept() {
	g.t.Helper()
	g.must(g.raw("S.", 0, 1, g.opts, nil))
	g.nxt = 1
	g.expect(".")
}

func TestDialContext(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		bits := fam.guest.BitLen()
		if err := m.s.AddRoute(0, netip.PrefixFrom(fam.guest, bits), m.mac, m.gw, m.write); err != nil {
			t.Fatal(err)
		}
		d := startDial(t.Context(), m.s, "tcp", at.String())
		g, syn := m.toGuest(at)
		if g.id.host.Addr() != fam.stack || g.id.host.Port() < 1024 {
			t.Errorf("from %v", g.id.host)
		}
		if mss, _ := syn.option(2); len(mss) != 2 || int(mss[0])<<8|int(mss[1]) != fam.mss {
			t.Errorf("MSS %x", mss)
		}
		g.accept()
		r := <-d
		if r.err != nil {
			t.Fatal(r.err)
		}
		c := r.c.(*VirtualConn)
		if c.RemoteAddr().String() != at.String() || c.LocalAddr().String() != g.id.host.String() {
			t.Errorf("%v to %v", c.LocalAddr(), c.RemoteAddr())
		}
		putText(t, c, "hello")
		g.expectText("hello")
		g.data("world")
		expectText(t, c, "world")
		c.Close()
		g.expectFIN()
		g.fin()
		m.expectFlows(0)
	})
}

func TestDialContextErrors(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		check := func(err error, want error) {
			t.Helper()
			var op *net.OpError
			if !errors.Is(err, want) || !errors.As(err, &op) || op.Op != "dial" || op.Net != "tcp" {
				t.Errorf("%#v, want %v", err, want)
			}
			if op != nil && op.Addr != nil && op.Addr.String() != at.String() {
				t.Errorf("of %v", op.Addr)
			}
		}
		_, err := m.s.DialContext(t.Context(), "tcp", at.String())
		check(err, ErrNoRoute)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)

		d := startDial(t.Context(), m.s, "tcp", at.String())
		g, _ := m.toGuest(at)
		g.must(g.raw("R.", 0, 1, nil, nil))
		check((<-d).err, syscall.ECONNREFUSED)
		m.expectFlows(0)

		start := time.Now()
		d = startDial(t.Context(), m.s, "tcp", at.String())
		r := <-d
		check(r.err, syscall.ETIMEDOUT)
		var ne net.Error
		if !errors.As(r.err, &ne) || !ne.Timeout() || time.Since(start) < 3*time.Minute || time.Since(start) > 255*time.Second {
			t.Errorf("%v after %v", r.err, time.Since(start))
		}
		m.expectFlows(0)

		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		start = time.Now()
		_, err = m.s.DialContext(ctx, "tcp", at.String())
		check(err, context.DeadlineExceeded)
		if !errors.As(err, &ne) || !ne.Timeout() || time.Since(start) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		cancel()
		m.expectFlows(0)

		m.flows = make(map[flowID]*flowCheck)
		ctx, cancel = context.WithCancel(t.Context())
		d = startDial(ctx, m.s, "tcp", at.String())
		g, _ = m.toGuest(at)
		cancel()
		check((<-d).err, context.Canceled)
		m.expectFlows(0)
		g.must(g.raw("S.", 0, 1, g.opts, nil)) // too late
		g.expect("R")
		_, err = m.s.DialContext(ctx, "tcp", at.String())
		check(err, context.Canceled)

		for _, network := range []string{"", "unix", "ip", "tcp5"} {
			_, err := m.s.DialContext(t.Context(), network, at.String())
			var unknown net.UnknownNetworkError
			if !errors.As(err, &unknown) {
				t.Errorf("network %q: %v", network, err)
			}
		}
		wrong := map[int]string{4: "tcp6", 6: "tcp4"}[fam.version]
		for _, bad := range []struct{ network, address string }{
			{wrong, at.String()}, {"tcp", "10.0.0.1"}, {"tcp", ":22"}, {"tcp", "10.0.0.1:0"}, {"tcp", "0.0.0.0:22"}, {"tcp", "[::]:22"},
			{"tcp", "host.example:22"}, {"tcp", "224.0.0.1:22"}, {"tcp", "10.0.0.1:x"},
		} {
			if c, err := m.s.DialContext(t.Context(), bad.network, bad.address); err == nil || c != nil {
				t.Errorf("DialContext(%q, %q): %v, %v", bad.network, bad.address, c, err)
			}
		}
		m.expectFlows(0)
	})
	synctest.Test(t, func(t *testing.T) { // no address of the family
		m, _ := newRig(t, Config{Addresses: []netip.Addr{families[0].stack}})
		m.s.AddRoute(0, netip.MustParsePrefix("::/0"), m.mac, m.gw, m.write)
		if _, err := m.s.DialContext(t.Context(), "tcp", "[fd00::15]:22"); !errors.Is(err, ErrNoRoute) {
			t.Errorf("%v", err)
		}
	})
}

// TestDialContextICMP: what the guest, or a router behind it, says about the SYN
// ends the dial; about anything else it is only talk.
func TestDialContextICMP(t *testing.T) {
	kinds := []struct {
		v4, v6 [2]byte
		want   syscall.Errno
	}{
		{[2]byte{3, 3}, [2]byte{1, 4}, syscall.ECONNREFUSED},
		{[2]byte{3, 1}, [2]byte{1, 3}, syscall.EHOSTUNREACH},
		{[2]byte{3, 0}, [2]byte{1, 0}, syscall.ENETUNREACH},
		{[2]byte{3, 13}, [2]byte{1, 1}, syscall.EACCES},
	}
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)
		report := func(m *machine, kind [2]byte, about segment) {
			t.Helper()
			proto := byte(1)
			if fam.version == 6 {
				proto = 58
			}
			quote := about.packet()
			m.mustSend(refPacket(fam.other, fam.stack, proto, append([]byte{kind[0], kind[1], 0, 0, 0, 0, 0, 0}, quote[:len(quote)-4]...), 2))
			synctest.Wait()
		}
		for _, k := range kinds {
			kind := k.v4
			if fam.version == 6 {
				kind = k.v6
			}
			d := startDial(t.Context(), m.s, "tcp", at.String())
			g, syn := m.toGuest(at)
			guess := syn
			guess.seq++
			report(m, kind, guess) // of a stranger, who does not know the number
			stranger := newMachine(t, m.s)
			stranger.ns = 3
			report(stranger, kind, syn)
			if len(d) != 0 {
				t.Fatalf("the dial ended with %v", (<-d).err)
			}
			report(m, kind, syn)
			if r := <-d; !errors.Is(r.err, k.want) {
				t.Errorf("%v, want %v", r.err, k.want)
			}
			m.expectFlows(0)
			g.silent(time.Minute)
			m.flows = make(map[flowID]*flowCheck)
		}
		d := startDial(t.Context(), m.s, "tcp", at.String())
		g, syn := m.toGuest(at)
		g.accept()
		c := (<-d).c
		for _, k := range kinds {
			report(m, k.v4, syn)
			report(m, k.v6, syn)
			syn.seq++
		}
		g.data("still here")
		expectText(t, c, "still here")
	})
}

func TestDialContextRoutes(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		var wide, narrow, again, learned *machine
		for i, p := range []**machine{&wide, &narrow, &again, &learned} {
			*p = newMachine(t, m.s)
			(*p).mac[0], (*p).gw[0] = byte(2+16*i), byte(2+16*i)
		}
		at := netip.AddrPortFrom(fam.guest, 22)
		route := func(m *machine, bits int) {
			t.Helper()
			if err := m.s.AddRoute(0, netip.PrefixFrom(fam.guest, bits), m.mac, m.gw, m.write); err != nil {
				t.Error(err)
			}
		}
		try := func(to *machine) {
			t.Helper()
			ctx, cancel := context.WithCancel(t.Context())
			d := startDial(ctx, m.s, "tcp", at.String())
			to.toGuest(at)
			cancel()
			<-d
			for i, m := range []*machine{wide, narrow, again, learned} {
				if m.frames != 0 && m != to {
					t.Errorf("%d frames to %d", m.frames, i)
				}
				m.frames = 0
				m.flows = make(map[flowID]*flowCheck)
			}
		}
		route(narrow, 24)
		route(wide, 8)
		try(narrow)
		route(again, 24) // replaces the other
		try(again)
		// The guest speaks: that counts more than any route.
		g := learned.openFrom(netip.AddrPortFrom(fam.guest, 999), fam.at(9))
		g.must(g.raw(".", 0, 0, nil, nil))
		learned.frames = 0
		learned.flows = make(map[flowID]*flowCheck)
		try(learned)
		// Routes of another namespace are none.
		far := netip.MustParseAddrPort("203.0.113.1:22")
		m.s.AddRoute(5, netip.MustParsePrefix("203.0.113.0/24"), m.mac, m.gw, m.write)
		if _, err := m.s.DialContext(t.Context(), "tcp", far.String()); !errors.Is(err, ErrNoRoute) {
			t.Errorf("by a route of another namespace: %v", err)
		}
		if err := m.s.AddRoute(0, netip.Prefix{}, m.mac, m.gw, m.write); err == nil {
			t.Error("AddRoute of no prefix")
		}
		if err := m.s.AddRoute(0, netip.MustParsePrefix("10.0.0.0/8"), m.mac, m.gw, nil); err == nil {
			t.Error("AddRoute without a Writer")
		}
	})
}

func TestT041_SimultaneousOpen(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)
		d := startDial(t.Context(), m.s, "tcp", at.String())
		g, _ := m.toGuest(at)
		g.must(g.raw("S", 0, 0, g.opts, nil))
		g.expect("S.")
		g.nxt, g.rcv = 1, 1
		g.ack()
		r := <-d
		if r.err != nil {
			t.Fatal(r.err)
		}
		g.data("hello")
		expectText(t, r.c, "hello")
	})
}

// TestTwoStacks wires two Stacks to each other, Writer to HandlePacket, and moves
// data through both.
func TestTwoStacks(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, client := New(), New()
		cfg := Config{Addresses: []netip.Addr{fam.guest}}
		client, err := NewWithConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		defer client.Close()
		var toServer, toClient Writer
		macS, macC := [6]byte{2, 1}, [6]byte{2, 2}
		toServer = func(f []byte) error { return server.HandlePacket(0, macC, macS, f[14:], toClient) }
		toClient = func(f []byte) error { return client.HandlePacket(0, macS, macC, f[14:], toServer) }
		everywhere := netip.PrefixFrom(fam.server, 0)
		client.AddRoute(0, everywhere, macS, macC, toServer)
		l := mustListen(t, server, "tcp", fam.at(80).String())
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(c, c)
					c.Close()
				}()
			}
		}()
		var wg sync.WaitGroup
		for range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				c, err := client.DialContext(t.Context(), "tcp", fam.at(80).String())
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				data := pattern(2_000_000)
				go func() {
					c.Write(data)
					c.(*VirtualConn).CloseWrite()
				}()
				if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}()
		}
		wg.Wait()
		l.Close()
		// Nobody listens: the server's stack dials 192.0.2.80, which its policy
		// would decide. The other way round there is an answer at once.
		refused, err := NewWithConfig(Config{Dial: func(context.Context, string, string) (net.Conn, error) {
			return nil, dialError(syscall.ECONNREFUSED)
		}})
		if err != nil {
			t.Fatal(err)
		}
		defer refused.Close()
		toRefused := func(f []byte) error { return refused.HandlePacket(0, macC, macS, f[14:], toClient) }
		client.AddRoute(0, everywhere, macS, macC, toRefused)
		other, err := NewWithConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		var toOther Writer
		toRefused2 := func(f []byte) error { return refused.HandlePacket(0, macC, macS, f[14:], toOther) }
		toOther = func(f []byte) error { return other.HandlePacket(0, macS, macC, f[14:], toRefused2) }
		other.AddRoute(0, everywhere, macS, macC, toRefused2)
		if _, err := other.DialContext(t.Context(), "tcp", fam.at(80).String()); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("nobody listens: %v", err)
		}
	})
}

func TestVirtualConnCloseUnread(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		g.data("unread")
		g.expectACK()
		c.Close()
		if seg := g.expect("R."); g.ackOf(seg) != 7 {
			t.Errorf("%s", g.show(seg))
		}
		m.expectFlows(0)
		// What comes after Close resets as well.
		g = m.open(1026, fam.at(80))
		g.connect()
		c = mustAccept(t, l)
		c.Close()
		g.expectFIN()
		g.data("nobody reads this")
		g.expectRST()
		m.expectFlows(0)
		// After CloseRead nothing is unread.
		g = m.open(1027, fam.at(80))
		g.connect()
		c = mustAccept(t, l)
		c.CloseRead()
		g.upload(pattern(3 << 20)) // is thrown away
		expectEOF(t, c)
		putText(t, c, "bye")
		c.Close()
		g.expectText("bye")
		g.expectFIN()
		g.fin()
		m.expectFlows(0)
	})
}

func TestVirtualConnLinger(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		port := uint16(1024)
		open := func() (*guest, *VirtualConn) {
			port++
			g := m.open(port, fam.at(80))
			g.connect()
			return g, mustAccept(t, l)
		}
		g, c := open() // T071
		putText(t, c, "gone")
		c.SetLinger(0)
		c.Close()
		g.expect(".")
		if seg := g.expect("R."); g.seqOf(seg) != 5 || g.ackOf(seg) != 1 {
			t.Errorf("%s, want R. 5 ack 1", g.show(seg))
		}
		m.expectFlows(0)

		g, c = open() // the guest does not acknowledge in time
		putText(t, c, "hello")
		c.SetLinger(3)
		start := time.Now()
		c.Close()
		if d := time.Since(start); d != 0 {
			t.Errorf("Close took %v", d)
		}
		if seg := g.expectRSTSkippingFIN(); seg.at.Sub(start) != 3*time.Second {
			t.Errorf("reset after %v", seg.at.Sub(start))
		}
		m.expectFlows(0)

		g, c = open() // it does
		putText(t, c, "hello")
		c.SetLinger(3)
		c.Close()
		g.expectText("hello")
		g.expectFIN()
		g.silent(10 * time.Second)
		g.fin()
		m.expectFlows(0)

		g, c = open() // the default: as long as it takes
		c.SetLinger(-1)
		putText(t, c, "hello")
		c.Close()
		time.Sleep(20 * time.Second)
		g.expectText("hello")
	})
}

// expectRSTSkippingFIN waits for a reset, whatever comes before it.
func (g *guest) expectRSTSkippingFIN() segment {
	g.t.Helper()
	for {
		seg, ok := g.next(patience)
		if !ok {
			g.t.Fatal("no reset")
		}
		if seg.flags&flagR != 0 {
			return seg
		}
	}
}

// TestS11_Orphans: a connection that the program has left ends, whatever the guest does.
func TestS11_Orphans(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{TCPIdleTimeout: -1})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		for i, play := range []func(g *guest, c *VirtualConn){
			func(g *guest, c *VirtualConn) { c.Close() },                                // FIN-WAIT-1: nothing is acknowledged
			func(g *guest, c *VirtualConn) { c.Close(); g.expectFIN() },                 // FIN-WAIT-2
			func(g *guest, c *VirtualConn) { g.fin(); g.expectACK(); c.Close() },        // LAST-ACK
			func(g *guest, c *VirtualConn) { c.Close(); g.expect("F."); g.fin() },       // CLOSING
			func(g *guest, c *VirtualConn) { putText(t, c, "not taken"); c.Close() },    // data
			func(g *guest, c *VirtualConn) { g.win = 0; g.ack(); c.Write([]byte("x")) }, // the window is closed
		} {
			g := m.open(2000+uint16(i), fam.at(80))
			g.connect()
			c := mustAccept(t, l)
			play(g, c)
			if i == 5 {
				c.Close()
			}
		}
		time.Sleep(121 * time.Second)
		m.expectFlows(0)
	})
}

// TestErrorsOfVirtualConn compares the errors of a VirtualConn and of a *net.TCPConn in the
// same situation.
func TestErrorsOfVirtualConn(t *testing.T) {
	// describe is what a program can tell of an error.
	describe := func(err error) string {
		if err == nil {
			return "nil"
		}
		s := ""
		for _, known := range []struct {
			name string
			err  error
		}{{"EOF", io.EOF}, {"ErrClosed", net.ErrClosed}, {"deadline", os.ErrDeadlineExceeded}, {"ECONNRESET", syscall.ECONNRESET},
			{"EPIPE", syscall.EPIPE}, {"ECONNREFUSED", syscall.ECONNREFUSED}, {"ETIMEDOUT", syscall.ETIMEDOUT}} {
			if errors.Is(err, known.err) {
				s += known.name + " "
			}
		}
		var op *net.OpError
		if errors.As(err, &op) {
			s += fmt.Sprintf("OpError %s %s around %v ", op.Op, op.Net, reflect.TypeOf(op.Err))
		}
		var ne net.Error
		if errors.As(err, &ne) {
			s += fmt.Sprintf("timeout %v", ne.Timeout())
		}
		return s
	}
	type conn interface {
		farEnd
		CloseRead() error
	}
	// Each situation returns what a method says in it.
	situations := []struct {
		name string
		f    func(local, remote conn) (error, error)
	}{
		{"closed", func(l, _ conn) (error, error) {
			l.Close()
			_, r := l.Read(make([]byte, 1))
			_, w := l.Write(make([]byte, 1))
			return r, w
		}},
		{"closed twice", func(l, _ conn) (error, error) { l.Close(); return l.Close(), l.CloseWrite() }},
		{"setters when closed", func(l, _ conn) (error, error) {
			l.Close()
			return l.SetReadDeadline(time.Now()), l.SetLinger(1)
		}},
		{"CloseRead when closed", func(l, _ conn) (error, error) { l.Close(); return l.CloseRead(), l.SetDeadline(time.Time{}) }},
		{"deadline", func(l, _ conn) (error, error) {
			l.SetDeadline(time.Now().Add(-time.Second))
			_, r := l.Read(make([]byte, 1))
			_, w := l.Write(make([]byte, 1))
			return r, w
		}},
		{"empty buffers", func(l, _ conn) (error, error) {
			_, r := l.Read(nil)
			_, w := l.Write(nil)
			return r, w
		}},
		{"empty buffers at the end", func(l, remote conn) (error, error) {
			remote.CloseWrite()
			l.Read(make([]byte, 1))
			_, r := l.Read(nil)
			_, again := l.Read(make([]byte, 1))
			if again != io.EOF {
				return again, r
			}
			return r, nil
		}},
		{"empty buffers after the deadline", func(l, _ conn) (error, error) {
			l.SetDeadline(time.Now().Add(-time.Second))
			_, r := l.Read(nil)
			return r, nil
		}},
		{"end", func(l, remote conn) (error, error) {
			remote.CloseWrite()
			_, r := l.Read(make([]byte, 1))
			_, w := l.Write(make([]byte, 1))
			return r, w
		}},
		{"write after CloseWrite", func(l, _ conn) (error, error) {
			e := l.CloseWrite()
			_, w := l.Write(make([]byte, 1))
			return e, w
		}},
		{"read after CloseRead", func(l, _ conn) (error, error) {
			e := l.CloseRead()
			_, r := l.Read(make([]byte, 1))
			return e, r
		}},
		{"reset", func(l, remote conn) (error, error) {
			remote.SetLinger(0)
			remote.Close()
			_, r := l.Read(make([]byte, 1))
			return r, nil
		}},
		{"closed while reading", func(l, _ conn) (error, error) {
			ch := make(chan error)
			go func() { _, err := l.Read(make([]byte, 1)); ch <- err }()
			time.Sleep(20 * time.Millisecond)
			l.Close()
			return <-ch, nil
		}},
	}
	eachFamily(t, func(t *testing.T, fam family) {
		hostListener, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
		if err != nil {
			t.Skip(err)
		}
		defer hostListener.Close()
		server, err := NewWithConfig(Config{})
		if err != nil {
			t.Fatal(err)
		}
		client, err := NewWithConfig(Config{Addresses: []netip.Addr{fam.guest}})
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		defer client.Close()
		var toServer, toClient Writer
		toServer = func(f []byte) error { return server.HandlePacket(0, [6]byte{1}, [6]byte{2}, f[14:], toClient) }
		toClient = func(f []byte) error { return client.HandlePacket(0, [6]byte{2}, [6]byte{1}, f[14:], toServer) }
		client.AddRoute(0, netip.PrefixFrom(fam.server, 0), [6]byte{2}, [6]byte{1}, toServer)
		virtualListener := mustListen(t, server, "tcp", fam.at(80).String())
		pair := func(l net.Listener, dial func(ctx context.Context, network, address string) (net.Conn, error)) (a, b conn) {
			t.Helper()
			x, err := dial(t.Context(), "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			y, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			return x.(conn), y.(conn)
		}
		for _, test := range situations {
			for _, side := range []string{"dialed", "accepted"} {
				var got [2]string
				for i, real := range []bool{true, false} {
					l, dial := virtualListener, client.DialContext
					if real {
						l, dial = hostListener, new(net.Dialer).DialContext
					}
					a, b := pair(l, dial)
					if side == "accepted" {
						a, b = b, a
					}
					first, second := test.f(a, b)
					got[i] = describe(first) + "; " + describe(second)
					a.Close()
					b.Close()
				}
				if got[0] != got[1] {
					t.Errorf("%s (%s):\n  *net.TCPConn: %s\n  *VirtualConn: %s", test.name, side, got[0], got[1])
				}
			}
		}
	})
}

// TestVirtualConnInterfaces: what a program may ask for is there.
func TestVirtualConnInterfaces(t *testing.T) {
	var c any = new(VirtualConn)
	if _, ok := c.(interface {
		net.Conn
		CloseRead() error
		CloseWrite() error
		SetLinger(int) error
	}); !ok {
		t.Error("VirtualConn lacks a method")
	}
}

// TestStackAsGuest moves data from one Stack through another, as NAT, to servers
// on real sockets and to listeners.
func TestStackAsGuest(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		client, err := NewWithConfig(Config{Addresses: []netip.Addr{fam.guest}})
		if err != nil {
			t.Fatal(err)
		}
		nat := New()
		defer client.Close()
		defer nat.Close()
		var toNAT, toClient Writer
		toNAT = func(f []byte) error { return nat.HandlePacket(0, [6]byte{2, 2}, [6]byte{2, 1}, f[14:], toClient) }
		toClient = func(f []byte) error { return client.HandlePacket(0, [6]byte{2, 1}, [6]byte{2, 2}, f[14:], toNAT) }
		client.AddRoute(0, netip.PrefixFrom(fam.server, 0), [6]byte{2, 1}, [6]byte{2, 2}, toNAT)
		data := pattern(8 << 20)
		serve := func(l net.Listener) {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { // takes everything, and only then answers
					defer c.Close()
					got, err := io.ReadAll(c)
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("upload: %d bytes, %v", len(got), err)
					}
					c.Write(data)
				}()
			}
		}
		real, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
		if err != nil {
			t.Skip(err)
		}
		defer real.Close()
		virtual := mustListen(t, nat, "tcp", fam.at(80).String())
		go serve(real)
		go serve(virtual)
		for _, l := range []net.Listener{real, virtual} {
			c, err := client.DialContext(t.Context(), "tcp", l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(patience))
			if _, err := c.Write(data); err != nil {
				t.Fatal(err)
			}
			c.(*VirtualConn).CloseWrite()
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
				t.Errorf("download: %d bytes, %v", len(got), err)
			}
			c.Close()
		}
	})
}

// TestT142_CloseInEveryState closes in every state, while everything else is called too.
func TestT142_CloseInEveryState(t *testing.T) {
	states := map[string]func(g *guest, c *VirtualConn){
		"ESTABLISHED": func(g *guest, c *VirtualConn) {},
		"FIN-WAIT-1":  func(g *guest, c *VirtualConn) { c.CloseWrite() },
		"FIN-WAIT-2":  func(g *guest, c *VirtualConn) { c.CloseWrite(); g.expectFIN() },
		"CLOSE-WAIT":  func(g *guest, c *VirtualConn) { g.fin(); g.expectACK() },
		"LAST-ACK":    func(g *guest, c *VirtualConn) { g.fin(); g.expectACK(); c.CloseWrite() },
		"CLOSING":     func(g *guest, c *VirtualConn) { c.CloseWrite(); g.expect("F."); g.fin(); g.expect(".") },
		"TIME-WAIT":   func(g *guest, c *VirtualConn) { c.CloseWrite(); g.expectFIN(); g.fin(); g.expect(".") },
		"reset":       func(g *guest, c *VirtualConn) { g.rst() },
		"unread":      func(g *guest, c *VirtualConn) { g.data("unread"); g.expectACK() },
		"full":        func(g *guest, c *VirtualConn) { g.win = 0; g.ack(); c.Write(make([]byte, 5000)) },
	}
	methods := map[string]func(c *VirtualConn){
		"Close":            func(c *VirtualConn) { c.Close() },
		"Close, linger 0":  func(c *VirtualConn) { c.SetLinger(0); c.Close() },
		"Close, linger 1":  func(c *VirtualConn) { c.SetLinger(1); c.Close() },
		"CloseRead":        func(c *VirtualConn) { c.CloseRead() },
		"CloseWrite":       func(c *VirtualConn) { c.CloseWrite() },
		"deadline in past": func(c *VirtualConn) { c.SetDeadline(time.Now().Add(-time.Second)) },
	}
	for name, enter := range states {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, fam family) {
				m, _ := newRig(t, Config{SendBuffer: 8192, ReceiveBuffer: 8192})
				l := mustListen(t, m.s, "tcp", fam.at(80).String())
				port := uint16(2000)
				for method, call := range methods {
					port++
					g := m.open(port, fam.at(80))
					g.connect()
					c := mustAccept(t, l)
					enter(g, c)
					var wg sync.WaitGroup
					for _, f := range []func(){
						func() { io.Copy(io.Discard, c) },
						func() { c.Write(make([]byte, 20_000)) },
						func() { c.SetReadDeadline(time.Now().Add(time.Hour)) },
						func() { c.SetWriteDeadline(time.Now().Add(time.Hour)) },
						func() { call(c) },
						func() { c.LocalAddr(); c.RemoteAddr() },
					} {
						wg.Add(1)
						go func() {
							defer wg.Done()
							f()
						}()
					}
					synctest.Wait()
					c.Close()
					done := make(chan bool)
					go func() {
						wg.Wait()
						close(done)
					}()
					synctest.Wait()
					select {
					case <-done:
					default:
						t.Errorf("%s, then Close: something still waits", method)
					}
				}
				time.Sleep(10 * time.Minute)
				m.expectFlows(0)
				if st := m.s.Stats(); st.TimeWait != 0 {
					t.Errorf("%d in TIME-WAIT", st.TimeWait)
				}
			})
		})
	}
}

// TestForgetGuests: what one namespace invents makes no other forget its guests.
func TestForgetGuests(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect() // namespace 0 has spoken
		time.Sleep(time.Second / 2)
		w := func([]byte) error { return nil }
		for i := range 60000 {
			a := fam.guest.As16()
			binary.BigEndian.PutUint16(a[13:], uint16(i))
			src := netip.AddrFrom16(a).Unmap()
			seg := segment{src: netip.AddrPortFrom(src, 1), dst: fam.at(9), flags: flagA}
			m.s.HandlePacket(7, m.mac, m.gw, seg.packet(), w)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := m.s.DialContext(ctx, "tcp", netip.AddrPortFrom(fam.guest, 22).String())
		if errors.Is(err, ErrNoRoute) {
			t.Errorf("after packets of namespace 7: %v", err)
		}
	})
}

// TestFloodOfAnotherNamespace: a flood of SYNs in one namespace leaves the accept
// queue of every other alone.
func TestFloodOfAnotherNamespace(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		w := func([]byte) error { return nil }
		for i := range 5000 {
			seg := segment{src: netip.AddrPortFrom(fam.guest, uint16(1024+i)), dst: fam.at(80), flags: flagS, win: 1}
			m.s.HandlePacket(7, m.mac, m.gw, seg.packet(), w)
			if i%50 == 0 {
				m.open(uint16(10000+i), fam.at(80)).connect()
				mustAccept(t, l).Close()
			}
		}
	})
}
