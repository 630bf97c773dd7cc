package slirp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// HandlePacket's contract, for every kind of packet.

func TestHandlePacketErrors(t *testing.T) {
	v4 := refPacket(families[0].guest, families[0].server, 17, make([]byte, 8), -1)
	v6 := refPacket(families[1].guest, families[1].server, 17, make([]byte, 8), -1)
	put := func(b []byte, at int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], v)
		return b
	}
	tests := []struct {
		name   string
		packet []byte
		err    error
		text   string
	}{
		{"nothing", nil, ErrPacketTooShort, "packet too short"},
		{"one byte", []byte{0x45}, ErrPacketTooShort, "packet too short"},
		{"19 bytes of IPv4", v4[:19], ErrPacketTooShort, "packet too short"},
		{"19 bytes of IPv6", v6[:19], ErrPacketTooShort, "packet too short"},
		{"19 zero bytes", make([]byte, 19), ErrPacketTooShort, "packet too short"},
		{"40 zero bytes", make([]byte, 40), ErrIPVersion, "unsupported IP version"},
		{"version 5", put(v4, 0, 0x55), ErrIPVersion, "unsupported IP version"},
		{"version 15", put(v6, 0, 0xf0), ErrIPVersion, "unsupported IP version"},
		{"IHL 15 of 28 bytes", put(v4, 0, 0x4f), ErrIHL, "invalid ihl"},
		{"20 bytes of IPv6", v6[:20], ErrIPv6TooShort, "IPv6 packet too short"},
		{"39 bytes of IPv6", v6[:39], ErrIPv6TooShort, "IPv6 packet too short"},
		{"IPv6 payload length 9 of 8", put(v6, 4, 0, 9), ErrIPv6PayloadLength, "IPv6 packet shorter than payload length"},
		{"IPv6 payload length 65535", put(v6, 4, 255, 255), ErrIPv6PayloadLength, "IPv6 packet shorter than payload length"},
		{"IPv4 total length 19", put(v4, 2, 0, 19), ErrIPv4TotalLength, "invalid IPv4 total length"},
		{"IPv4 total length 0", put(v4, 2, 0, 0), ErrIPv4TotalLength, "invalid IPv4 total length"},
		{"IPv4 total length 29 of 28", put(v4, 2, 0, 29), ErrIPv4TotalLength, "invalid IPv4 total length"},
		{"IPv4 total length below the options", put(v4, 0, 0x47), ErrIPv4TotalLength, "invalid IPv4 total length"},
	}
	tests[len(tests)-1].packet = put(tests[len(tests)-1].packet, 2, 0, 24)
	m, h := newRig(t, Config{})
	for _, test := range tests {
		err := m.send(test.packet)
		if !errors.Is(err, test.err) || err.Error() != test.text {
			t.Errorf("%s: %v, want %q", test.name, err, test.text)
		}
	}
	for _, fam := range families {
		for name, packet := range map[string][]byte{
			"unknown protocol":    refPacket(fam.guest, fam.server, 253, make([]byte, 30), -1),
			"no transport":        refPacket(fam.guest, fam.server, 6, nil, -1),
			"cut-off TCP":         refPacket(fam.guest, fam.server, 6, make([]byte, 19), -1),
			"cut-off UDP":         refPacket(fam.guest, fam.server, 17, make([]byte, 7), -1),
			"cut-off ICMP":        refPacket(fam.guest, fam.server, 1, []byte{8, 0, 0}, -1),
			"cut-off ICMPv6":      refPacket(fam.guest, fam.server, 58, []byte{128, 0, 0}, -1),
			"unknown ICMP type":   refPacket(fam.guest, fam.server, 1, []byte{99, 0, 0, 0, 0, 0, 0, 0}, 2),
			"unknown ICMPv6 type": refPacket(fam.guest, fam.server, 58, []byte{99, 0, 0, 0, 0, 0, 0, 0}, 2),
			"router solicitation": refPacket(fam.guest, netip.MustParseAddr("ff02::2").Unmap(), 58, []byte{133, 0, 0, 0, 0, 0, 0, 0}, -1),
		} {
			if fam.version == 4 && name == "router solicitation" {
				continue
			}
			if err := m.send(packet); err != nil {
				t.Errorf("%s over %s: %v", name, fam.name, err)
			}
		}
	}
	if m.frames != 0 || len(h.dials()) != 0 {
		t.Errorf("%d frames, %d dials", m.frames, len(h.dials()))
	}
}

// TestAcceptedByDefault has what a guest may leave out.
func TestAcceptedByDefault(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", ":80")
		ip := map[int]int{4: 20, 6: 40}[fam.version]
		port := uint16(1024)
		try := func(name string, from, to netip.Addr, change func(p []byte)) {
			t.Helper()
			port++
			g := m.openFrom(netip.AddrPortFrom(from, port), netip.AddrPortFrom(to, 80))
			g.iss = 0
			seg := segment{src: g.id.guest, dst: g.id.host, flags: flagS}
			g.flow(g.id).offered(&seg)
			p := seg.packet()
			change(p)
			if err := m.send(p); err != nil {
				t.Errorf("%s: %v", name, err)
				return
			}
			synctest.Wait()
			if _, ok := g.next(0); !ok {
				t.Errorf("%s: no SYN-ACK", name)
				return
			}
			g.irs, g.nxt, g.rcv = g.flow(g.id).iss, 1, 1
			g.ack()
			c := mustAccept(t, l)
			// The same for data.
			data := segment{src: g.id.guest, dst: g.id.host, seq: 1, ack: g.irs + 1, flags: flagA, payload: []byte("hello")}
			g.flow(g.id).offered(&data)
			p = data.packet()
			change(p)
			m.mustSend(p)
			expectText(t, c, "hello")
		}
		try("window 0, seq 0", fam.guest, fam.server, func([]byte) {})
		try("loopback to loopback", fam.loopback, fam.loopback, func([]byte) {})
		try("TCP checksum 0", fam.guest, fam.server, func(p []byte) { p[ip+16], p[ip+17] = 0, 0 })
		try("unfinished checksum", fam.guest, fam.server, func(p []byte) {
			s := refSum(refPseudo(fam.guest, fam.server, 6, len(p)-ip))
			p[ip+16], p[ip+17] = byte(s>>8), byte(s)
		})
		try("TTL 0", fam.guest, fam.server, func(p []byte) {
			if fam.version == 6 {
				p[7] = 0
			} else {
				p[8] = 0
				p[10], p[11] = 0, 0
			}
		})
		if fam.version == 4 {
			try("header checksum 0", fam.guest, fam.server, func(p []byte) { p[10], p[11] = 0, 0 })
		}
	})
}

// TestT001_Checksums sends payloads of many lengths both ways, with every checksum right,
// and with every checksum wrong.
func TestT001_Checksums(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		mss := 1460
		if g.id.host.Addr().Is6() {
			mss = 1440
		}
		for _, n := range []int{1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 535, 536, 1023, 1024, 1025, mss - 1, mss, mss + 1} {
			b := pattern(n)
			g.upload(b)
			expectText(t, far, string(b))
			putText(t, far, string(b))
			g.expectText(string(b))
		}
		synctest.Wait()
		g.drop()
		before := g.s.Stats().DropChecksum
		seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: flagA | flagP, win: 1000, payload: []byte("xyz")}
		p := seg.packet()
		ip := len(p) - 23
		for bit := range 16 {
			bad := bytes.Clone(p)
			bad[ip+16+bit/8] ^= 1 << (bit % 8)
			g.mustSend(bad)
		}
		for i := range 20 + 3 { // and any byte of the segment
			bad := bytes.Clone(p)
			bad[ip+i] ^= 0x11
			if i != 16 && i != 17 && i != 12 { // not the checksum itself, nor the data offset
				g.mustSend(bad)
			}
		}
		g.silent(time.Second)
		if n := g.s.Stats().DropChecksum - before; n != 16+20 {
			t.Errorf("%d dropped, want 36", n)
		}
	})
}

// TestTruncation cuts every kind of packet at every byte, and lies about its
// length.
func TestTruncation(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		m.setHook(func([]byte) error { return nil })
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		icmp, echo := byte(1), byte(8)
		if fam.version == 6 {
			icmp, echo = 58, 128
		}
		data := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + 100, ack: g.irs + 1, flags: flagA, win: 1000,
			opts: append(optStamps(1, 2), 5, 10, 0, 0, 0, 1, 0, 0, 0, 2), payload: []byte("payload")}
		for _, p := range [][]byte{
			data.packet(),
			refPacket(fam.guest, fam.server, icmp, append([]byte{echo, 0, 0, 0, 0, 1, 0, 2}, "ping"...), 2),
		} {
			for n := range p {
				if err := m.send(p[:n]); n >= 20 && n < len(p) && err == nil {
					t.Errorf("%d of %d bytes of %x: no error", n, len(p), p)
				}
			}
			for _, at := range [][2]int{{2, 3}, {4, 5}} {
				for v := range 256 { // length fields, among others
					lie := bytes.Clone(p)
					lie[at[1]] = byte(v)
					m.send(lie)
					lie[at[0]] = byte(v)
					m.send(lie)
				}
			}
		}
		// What the stack has made of it is not for the checker; that the
		// connection is as before is.
		synctest.Wait()
		g.drop()
		g.data("still here")
		expectText(t, c, "still here")
	})
}

func TestConcurrentSYN(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		mustListen(t, m.s, "tcp", fam.at(443).String())
		for _, port := range []uint16{80, 443} {
			for i := range uint16(50) {
				g := m.open(2000+i, fam.at(port))
				var wg sync.WaitGroup
				for range 4 {
					wg.Add(1)
					go func() {
						defer wg.Done()
						if err := g.raw("S", 0, 0, g.opts, nil); err != nil {
							t.Error(err)
						}
					}()
				}
				wg.Wait()
				g.expect("S.")
			}
		}
		if st := m.s.Stats(); st.TCPFlows != 100 || len(h.dials()) != 50 {
			t.Errorf("%d flows, %d dials", st.TCPFlows, len(h.dials()))
		}
	})
}

// TestReuseFrames moves data with frames that are used again.
func TestReuseFrames(t *testing.T) {
	eachEnd(t, Config{ReuseFrames: true}, func(t *testing.T, g *guest, far farEnd) {
		data := pattern(500_000)
		done := make(chan bool)
		go func() {
			defer close(done)
			got := make([]byte, len(data))
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("upload: %v", err)
			}
			far.Write(data)
		}()
		g.upload(data)
		if !bytes.Equal(g.take(len(data)), data) {
			t.Error("download differs")
		}
		<-done
	})
}

func TestLogger(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		var mu sync.Mutex
		var buf bytes.Buffer
		log := slog.New(slog.NewTextHandler(lockedWriter{&mu, &buf}, &slog.HandlerOptions{Level: slog.LevelDebug}))
		m, h := newRig(t, Config{Logger: log})
		lines := func() int {
			mu.Lock()
			defer mu.Unlock()
			return strings.Count(buf.String(), "\n")
		}
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		synctest.Wait()
		opened := lines()
		go io.Copy(io.Discard, far)
		g.upload(pattern(100_000))
		if n := lines(); n != opened || opened == 0 {
			t.Errorf("%d lines after the handshake, %d after some data", opened, n)
		}
		g.rst()
		m.expectFlows(0)
		synctest.Wait()
		if lines() == opened {
			t.Error("the end of the flow is not logged")
		}
		closed := lines()
		h.setDial(refuse(ErrProhibited))
		m.open(1026, fam.at(80)).syn()
		synctest.Wait()
		if lines() == closed {
			t.Error("the refusal is not logged")
		}
		mu.Lock()
		defer mu.Unlock()
		for _, want := range []string{"level=DEBUG", fam.at(80).String(), g.id.guest.String()} {
			if !strings.Contains(buf.String(), want) {
				t.Errorf("%q is not in the log:\n%s", want, buf.String())
			}
		}
		for _, line := range strings.Split(strings.TrimSpace(buf.String()), "\n") {
			if !strings.Contains(line, "level=DEBUG") {
				t.Errorf("not at debug level: %s", line)
			}
		}
	})
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (w lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.w.Write(p)
}

// TestNoFlowNoGoroutine: a Stack that has nothing to do runs nothing.
func TestNoFlowNoGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		l := mustListen(t, s, "tcp", ":80")
		s.HandlePacket(0, [6]byte{}, [6]byte{}, refPacket(families[0].guest, families[0].server, 1, []byte{8, 0, 0, 0, 0, 0, 0, 0}, 2),
			func([]byte) error { return nil })
		synctest.Wait()
		if left := otherGoroutines(); strings.Contains(left, "slirp.(*Stack)") || strings.Contains(left, "slirp.(*tcpConn)") {
			t.Errorf("goroutines:\n%s", left)
		}
		l.Close()
		// It need not be closed: a bubble in which something is left ends in a panic.
	})
}

// TestRandomGuest plays guests that do anything at all, over the NAT and a
// listener; the checker has the last word on what the Stack says to that.
func TestRandomGuest(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{SendBuffer: 8192, ReceiveBuffer: 8192, TCPIdleTimeout: 10 * time.Second})
		h.buffer = 5000
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		serve := func(c net.Conn) {
			go func() {
				buf := make([]byte, 3000)
				for {
					n, err := c.Read(buf)
					if err != nil {
						break
					}
					if _, err := c.Write(buf[:n]); err != nil {
						break
					}
				}
				c.Close()
			}()
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				serve(c)
			}
		}()
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			a, b := newHostConns(h.buffer)
			serve(b)
			return a, nil
		})
		rng := rand.New(rand.NewPCG(uint64(fam.version), 1))
		flags := []string{".", ".", ".", "P.", "P.", "F.", "S", "R", "R.", "S.", "FP.", "", "SF", "U."}
		for round := range uint16(60) {
			to := fam.at(80)
			if round%2 == 0 {
				to = fam.at(443)
			}
			g := m.open(2000+round, to)
			g.iss = rng.Uint32()
			switch rng.IntN(3) {
			case 0:
				g.opts = append(append(optMSS(rng.IntN(2000)), optScale(rng.IntN(20))...), optSACKOK()...)
			case 1:
				g.opts = nil
			}
			g.win = uint16(rng.Uint32())
			g.syn()
			synctest.Wait()
			for range 100 {
				for _, seg := range g.drop() {
					if seg.flags&flagS != 0 {
						g.irs, g.rcv = seg.seq, 1
					} else if seg.seq-g.irs == g.rcv && seg.flags&flagR == 0 {
						g.rcv += seg.length()
					}
				}
				seq, ack := g.nxt, g.rcv
				if rng.IntN(3) == 0 {
					seq += uint32(rng.IntN(40000)) - 20000
				}
				if rng.IntN(5) == 0 {
					ack += uint32(rng.IntN(4000)) - 2000
				}
				if rng.IntN(4) == 0 {
					g.win = uint16(rng.Uint32()) >> rng.IntN(16)
				}
				f := flags[rng.IntN(len(flags))]
				payload := pattern(rng.IntN(1500) * rng.IntN(2))
				if f != "." && rng.IntN(2) == 0 {
					f = "."
				}
				var opts []byte
				if rng.IntN(4) == 0 {
					opts = []byte{1, 1, 5, 10}
					at := g.irs + g.rcv + uint32(rng.IntN(3000))
					opts = append(opts, byte(at>>24), byte(at>>16), byte(at>>8), byte(at))
					at += uint32(rng.IntN(3000))
					opts = append(opts, byte(at>>24), byte(at>>16), byte(at>>8), byte(at))
				}
				g.must(g.raw(f, seq, ack, opts, payload))
				if seq == g.nxt && strings.Contains(f, ".") && !strings.ContainsAny(f, "SR") {
					g.nxt += uint32(len(payload))
				}
				if rng.IntN(3) == 0 {
					time.Sleep(time.Duration(rng.IntN(1000)) * time.Millisecond)
				}
				synctest.Wait()
			}
			g.rst()
			g.must(g.raw("R", g.ackedByStack()-g.iss, 0, nil, nil))
		}
		time.Sleep(time.Hour)
		m.expectFlows(0)
	})
}

// ackedByStack returns what the stack has acknowledged last.
func (g *guest) ackedByStack() uint32 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.flow(g.id).ack
}

func TestUnacceptedConnectionDies(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		m.open(1025, fam.at(80)).connect() // vanishes
		time.Sleep(5 * time.Minute)
		m.expectFlows(0)
		g := m.open(1026, fam.at(80))
		g.connect()
		if c := mustAccept(t, l); c.RemoteAddr().(*net.TCPAddr).Port != 1026 {
			t.Errorf("accepted %v, which is long dead", c.RemoteAddr())
		}
		l.Close()
		l = mustListen(t, m.s, "tcp", fam.at(80).String())
		g = m.open(1027, fam.at(80))
		g.connect()
		g.data("and goodbye") // is acknowledged; then it vanishes
		time.Sleep(5 * time.Minute)
		c := mustAccept(t, l)
		expectText(t, c, "and goodbye")
		if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
			t.Errorf("read %v of a guest that vanished", err)
		}
	})
}
