package slirp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Faults of network stacks of this kind, one test for each.

func TestFault01_DialOnPacketPath(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			if f.Destination.Addr() == fam.server {
				return hang(ctx, f)
			}
			return h.connect(), nil
		})
		start := time.Now()
		for i := range uint16(100) {
			m.open(2000+i, fam.at(80)).syn()
		}
		g := m.open(1025, netip.AddrPortFrom(fam.other, 80))
		g.connect()
		g.data("hello")
		expectText(t, h.accept(), "hello")
		if d := time.Since(start); d != 0 {
			t.Errorf("a flow beside 100 hanging dials took %v", d)
		}
	})
}

func TestFault02_DialFails(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			time.Sleep(3500 * time.Millisecond)
			return nil, dialError(syscall.ECONNREFUSED)
		})
		g := m.open(1025, fam.at(80))
		start := time.Now()
		g.syn()
		time.Sleep(time.Second)
		g.syn()
		time.Sleep(2 * time.Second)
		g.syn()
		seg := g.expect("R.")
		if g.ackOf(seg) != 1 || seg.seq != 0 || seg.at.Sub(start) != 3500*time.Millisecond {
			t.Errorf("%s after %v", g.show(seg), seg.at.Sub(start))
		}
		if n := len(h.dials()); n != 1 {
			t.Errorf("%d dials for one SYN sent three times", n)
		}
		g.silent(time.Minute)
		m.expectFlows(0)
	})
}

func TestFault03_SequenceWrap(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		up, down := pattern(300_000), pattern(500_000)
		go func() {
			got := make([]byte, len(up))
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, up) {
				t.Errorf("upload: %v", err)
			}
			far.Write(down)
		}()
		g.upload(up)
		if got := g.take(len(down)); !bytes.Equal(got, down) {
			t.Error("download differs")
		}
		if g.iss+g.nxt > 1<<31 || g.irs+g.rcv > 1<<31 {
			t.Error("the sequence numbers did not wrap")
		}
	})
}

func TestFault04_Retransmission(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		lost := errors.New("lost")
		g.setHook(func([]byte) error { return lost })
		putText(t, far, "hello")
		synctest.Wait()
		start := time.Now()
		g.setHook(nil)
		seg := g.expect(".")
		if d := seg.at.Sub(start); string(seg.payload) != "hello" || g.seqOf(seg) != 1 || d < 200*time.Millisecond || d > time.Second {
			t.Errorf("after a lost frame: %s, after %v", g.show(seg), d)
		}
		seg = g.expect(".") // nobody has acknowledged it
		if d := seg.at.Sub(start); string(seg.payload) != "hello" || d > 3*time.Second {
			t.Errorf("again: %s, after %v", g.show(seg), d)
		}
		g.rcv += 5
		g.ack()
		g.silent(30 * time.Second)
		if st := g.s.Stats(); st.DropWriter != 1 {
			t.Errorf("DropWriter is %d, want 1", st.DropWriter)
		}
	})
}

func TestFault05_FINWithData(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.say("FP.", []byte("last words")...)
		expectText(t, far, "last words")
		expectEOF(t, far)
		if seg := g.expectACK(); g.ackOf(seg) != 12 {
			t.Errorf("%s, want ack 12", g.show(seg))
		}
	})
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.fin()
		expectEOF(t, far)
		g.expectACK()
	})
}

func TestFault06_HalfClose(t *testing.T) {
	t.Run("guest", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			g.data("request")
			g.fin()
			expectText(t, far, "request")
			expectEOF(t, far)
			time.Sleep(time.Minute) // the answer takes its time
			down := pattern(100_000)
			go func() {
				far.Write(down)
				far.CloseWrite()
			}()
			if !bytes.Equal(g.take(len(down)), down) {
				t.Error("the answer differs")
			}
			g.expectFIN()
		})
	})
	t.Run("far end", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			putText(t, far, "greeting")
			far.CloseWrite()
			g.expectText("greeting")
			g.expectFIN()
			time.Sleep(time.Minute)
			up := pattern(100_000)
			done := make(chan bool)
			go func() {
				defer close(done)
				got, err := io.ReadAll(far)
				if err != nil || !bytes.Equal(got, up) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}()
			g.upload(up)
			g.fin()
			<-done
			g.expectACK()
		})
	})
}

func TestFault07_Reset(t *testing.T) {
	t.Run("guest", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			g.rst()
			expectErr(t, far, syscall.ECONNRESET)
			g.expectFlows(0)
			g.silent(time.Minute)
		})
	})
	t.Run("far end", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			far.SetLinger(0)
			far.Close()
			seg := g.expect("R.")
			if g.seqOf(seg) != 1 || g.ackOf(seg) != 1 {
				t.Errorf("%s, want R. 1 ack 1", g.show(seg))
			}
			g.expectFlows(0)
			g.silent(time.Minute)
		})
	})
}

func TestFault08_ServerSpeaksFirst(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			c := h.connect()
			putText(t, c.peer, "220 ready\r\n")
			return c, nil
		})
		g := m.open(1025, fam.at(25))
		g.wrapStack()
		g.syn()
		g.expect("S.")
		g.silent(500 * time.Millisecond) // the banner waits for the handshake
		g.ack()
		g.expectText("220 ready\r\n")
		g.data("EHLO\r\n")
		expectText(t, h.accept(), "EHLO\r\n")
	})
}

func TestFault09_DataOnHandshakeACK(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		for _, port := range []uint16{80, 443} {
			g := m.open(1025, fam.at(port))
			g.syn()
			g.expect("S.")
			g.data("GET /") // the first ACK of the guest
			g.say("FP.", []byte(" HTTP")...)
			var far net.Conn
			if port == 80 {
				far = h.accept()
			} else {
				far = mustAccept(t, l)
			}
			expectText(t, far, "GET / HTTP")
			expectEOF(t, far)
		}
	})
}

func TestFault10_Windows(t *testing.T) {
	t.Run("the guest's", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			g.win = 0
			g.ack()
			go far.Write(pattern(5000))
			end := time.Now().Add(20 * time.Second)
			probes := 0
			for {
				seg, ok := g.next(time.Until(end))
				if !ok {
					break
				}
				if len(seg.payload) > 1 {
					t.Fatalf("%s into a closed window", g.show(seg))
				}
				probes++
				g.ack()
			}
			if probes == 0 || probes > 20 {
				t.Errorf("%d probes of a closed window in 20 s", probes)
			}
			g.win = 65535
			g.ack()
			if !bytes.Equal(g.take(5000), pattern(5000)) {
				t.Error("data differs")
			}
		})
	})
	t.Run("the stack's", func(t *testing.T) {
		eachEnd(t, Config{ReceiveBuffer: 64 << 10}, func(t *testing.T, g *guest, far farEnd) {
			// Nobody reads: the window closes, and the guest is told.
			up := pattern(400_000)
			sent := 0
			for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				synctest.Wait()
				g.mu.Lock()
				edge := g.flow(g.id).edge
				g.mu.Unlock()
				room := int(edge - (g.iss + g.nxt))
				for room > 0 && sent < len(up) {
					n := min(room, 1000)
					g.say("P.", up[sent:sent+n]...)
					sent, room = sent+n, room-n
				}
			}
			if sent > 64<<10+64<<10+2048 {
				t.Fatalf("%d bytes were taken that nobody reads", sent)
			}
			last := g.drop()
			if seg := last[len(last)-1]; seg.win != 0 || g.ackOf(seg) != g.nxt {
				t.Errorf("%s, want window 0", g.show(seg))
			}
			got := make([]byte, sent)
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, up[:sent]) {
				t.Fatalf("what was taken: %v", err)
			}
			if seg := g.expect("."); seg.win == 0 {
				t.Errorf("%s, want an open window", g.show(seg))
			}
		})
	})
}

func TestFault11_HostWriteFails(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		far.peer.failing(dialError(syscall.EPIPE), nil)
		g.data("lost")
		// Its reads go on: the server says nothing, and does not end.
		seg := g.expectRST()
		if n := int32(g.ackOf(seg)); seg.at.IsZero() || n > 5 {
			t.Errorf("%s", g.show(seg))
		}
		m.expectFlows(0)
		far.expectState(t, "reset")
	})
}

func TestFault12_DuplicateACK(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		for range 3 { // out of order
			g.must(g.raw("P.", g.nxt+5, g.rcv, nil, []byte("world")))
			synctest.Wait()
			if seg := g.expectWithin(0, "."); g.ackOf(seg) != 1 {
				t.Errorf("%s, want ack 1 at once", g.show(seg))
			}
		}
		g.must(g.raw("P.", g.nxt, g.rcv, nil, []byte("hello")))
		g.nxt += 10
		synctest.Wait()
		if seg := g.expectWithin(0, "."); g.ackOf(seg) != 11 {
			t.Errorf("%s, want ack 11 at once", g.show(seg))
		}
		g.must(g.raw("P.", 1, g.rcv, nil, []byte("hello"))) // old
		synctest.Wait()
		if seg := g.expectWithin(0, "."); g.ackOf(seg) != 11 {
			t.Errorf("%s, want ack 11 at once", g.show(seg))
		}
		expectText(t, far, "helloworld")
	})
}

func TestFault13_EthernetPadding(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		padded := func(flags, text string) {
			seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: parseFlags(flags), win: g.win,
				payload: []byte(text)}
			g.mu.Lock()
			g.flow(g.id).offered(&seg)
			g.mu.Unlock()
			g.mustSend(append(seg.packet(), "PADDINGPADDING"...))
			g.nxt += seg.length()
		}
		padded(".", "")
		padded("P.", "a")
		padded("P.", "b")
		padded("F.", "")
		expectText(t, far, "ab")
		expectEOF(t, far)
	})
}

func TestFault14_HeaderLies(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.opts = optMSS(0)
		g.connect()
		far := h.accept()
		putText(t, far, strings.Repeat("x", 3000))
		for got := 0; got < 3000; {
			seg := g.expect(".")
			if n := len(seg.payload); n == 0 || n > fam.minMSS {
				t.Fatalf("segment of %d bytes for an MSS of 0", n)
			}
			got += len(seg.payload)
			g.rcv += uint32(len(seg.payload))
			g.ack()
		}
		for doff := range 16 {
			g2 := m.open(1026, fam.at(81))
			seg := segment{src: g2.id.guest, dst: g2.id.host, seq: 1, flags: flagS, win: 1000}
			m.flow(g2.id).offered(&seg)
			p := seg.packet()
			ip := len(p) - 20
			p[ip+12] = byte(doff << 4)
			p[ip+16], p[ip+17] = 0, 0
			m.mustSend(p)
			m.quiet(0)
			if n := len(h.dials()); doff != 5 && n != 1 {
				t.Fatalf("data offset %d of a segment of 20 bytes: %d dials", doff, n-1)
			} else if doff == 5 {
				if n != 2 {
					t.Fatalf("data offset 5: %d dials", n-1)
				}
				return
			}
		}
	})
}

func TestFault15_StraySegments(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		for i, flags := range []string{".", "P.", "F.", "F", "", "S.", "FP.", "R", "R.", "SF", "SR", "SFRP.U", "P", "U", "E.", "W"} {
			for _, port := range []uint16{80, 443} {
				if port == 443 && i == 0 {
					mustListen(t, m.s, "tcp", fam.at(443).String())
				}
				g := m.open(3000+uint16(i), fam.at(port))
				g.irs = 77
				g.must(g.raw(flags, 100, 200, nil, []byte("abc")))
				synctest.Wait()
				if st := m.s.Stats(); st.TCPFlows != 0 || st.PendingDials != 0 {
					t.Fatalf("%q made state", flags)
				}
				f := parseFlags(flags)
				seg, ok := g.next(0)
				switch want := f&flagR == 0 && f&(flagS|flagF) != flagS|flagF && (f&flagA != 0 || port == 80); {
				case ok != want:
					t.Errorf("%q to port %d: answered %v, want %v", flags, port, ok, want)
				case !ok:
				case f&flagA != 0 && (seg.flags != flagR || seg.seq != 277):
					t.Errorf("%q to port %d: %v, want R 277", flags, port, seg)
				case f&flagA == 0 && (seg.flags != flagR|flagA || seg.seq != 0 || g.ackOf(seg) != 103+uint32(f&flagF)):
					t.Errorf("%q to port %d: %v, want R. ack %d", flags, port, seg, g.iss+103+uint32(f&flagF))
				}
			}
		}
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
	})
}

func TestFault16_Leaks(t *testing.T) {
	// A bubble ends in a panic if a goroutine is left in it.
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		var waiting sync.WaitGroup
		var early atomic.Bool
		early.Store(true)
		wait := func(what string, f func() error) {
			waiting.Add(1)
			go func() {
				defer waiting.Done()
				if err := f(); err == nil || early.Load() {
					t.Errorf("%s: %v, early: %v", what, err, early.Load())
				}
			}()
		}
		g := m.open(1025, fam.at(443))
		g.connect()
		c := mustAccept(t, l)
		wait("Accept", func() error { _, err := l.Accept(); return err })
		wait("Read", func() error { _, err := c.Read(make([]byte, 1)); return err })
		wait("Write", func() error { _, err := c.Write(make([]byte, 3<<20)); return err })
		synctest.Wait()
		wait("second Write", func() error { _, err := c.Write(make([]byte, 1)); return err })
		wait("DialContext", func() error {
			_, err := m.s.DialContext(t.Context(), "tcp", netip.AddrPortFrom(fam.guest, 22).String())
			return err
		})
		h.setDial(hang)
		for i := range uint16(10) {
			m.open(2000+i, fam.at(80)).syn()
		}
		h.setDial(nil)
		synctest.Wait()
		for i := range uint16(10) {
			m.open(3000+i, fam.at(80)).connect()
			wait("host's Read", func() error { _, err := h.accept().Read(make([]byte, 1)); return err })
		}
		synctest.Wait()
		early.Store(false)
		m.s.Close()
		waiting.Wait()
		if st := m.s.Stats(); st.TCPFlows != 0 || st.PendingDials != 0 || st.TimeWait != 0 {
			t.Errorf("after Close: %+v", st)
		}
	})
}

func TestFault17_WriterUnderLock(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		depth := 0
		port := uint16(5000)
		g.setHook(func(frame []byte) error {
			if depth++; depth > 3 {
				return nil
			}
			// Everything that takes a lock, of the Stack and of the flow.
			port++
			g.s.Stats()
			l, err := g.s.Listen("tcp", netip.AddrPortFrom(g.id.host.Addr(), port).String())
			if err != nil {
				t.Error(err)
			} else {
				l.Close()
			}
			if v, ok := far.(*VirtualConn); ok {
				v.SetDeadline(time.Time{})
			}
			g.s.AddRoute(9, netip.MustParsePrefix("10.0.0.0/8"), g.mac, g.gw, g.write)
			seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: flagA, win: g.win}
			if err := g.send(seg.packet()); err != nil { // the same flow
				t.Error(err)
			}
			seg.src = netip.AddrPortFrom(seg.src.Addr(), port)
			return g.send(seg.packet()) // none: answered with a reset
		})
		g.data("hello")
		expectText(t, far, "hello")
		putText(t, far, "world")
		g.expectText("world")
		g.setHook(nil)
		if depth == 0 {
			t.Error("the Writer was not called")
		}
	})
}

func TestFault18_UDP(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		echo, err := net.ListenUDP("udp", &net.UDPAddr{IP: fam.loopback.AsSlice()})
		if err != nil {
			t.Skip(err)
		}
		defer echo.Close()
		m := newMachine(t, New())
		to := echo.LocalAddr().(*net.UDPAddr).AddrPort()
		to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
		from := netip.AddrPortFrom(fam.guest, 4000)
		put := func(from, to netip.AddrPort, payload []byte) {
			t.Helper()
			b := make([]byte, 8, 8+len(payload))
			b[0], b[1], b[2], b[3] = byte(from.Port()>>8), byte(from.Port()), byte(to.Port()>>8), byte(to.Port())
			b[4], b[5] = byte((8+len(payload))>>8), byte(8+len(payload))
			m.mustSend(refPacket(from.Addr(), to.Addr(), 17, append(b, payload...), 6))
		}
		buf := make([]byte, 65536)
		for _, n := range []int{0, 1, 1400} {
			put(from, to, pattern(n))
			echo.SetReadDeadline(time.Now().Add(patience))
			k, peer, err := echo.ReadFromUDP(buf)
			if err != nil || !bytes.Equal(buf[:k], pattern(n)) {
				t.Fatalf("%d bytes: the host got %d, %v", n, k, err)
			}
			echo.WriteToUDP(buf[:k], peer)
			m.wait("reply", patience, func() bool {
				if len(m.udp) == 0 {
					return false
				}
				r := m.udp[0]
				m.udp = nil
				if r.src != to || r.dst != from || !bytes.Equal(r.payload, pattern(n)) {
					t.Errorf("%d bytes: reply of %d from %v to %v", n, len(r.payload), r.src, r.dst)
				}
				return true
			})
			if n == 1400 { // a long reply, which comes in fragments
				m.mu.Lock()
				before := m.frames
				m.mu.Unlock()
				echo.WriteToUDP(pattern(9000), peer)
				m.wait("fragments", patience, func() bool { return m.frames >= before+7 })
			}
		}
		echo.Close()
		put(from, to, []byte("anyone?"))
		put(from, to, []byte("anyone?"))
		msg := m.takeICMP()
		if want := map[int][2]byte{4: {3, 3}, 6: {1, 4}}[fam.version]; [2]byte{msg.typ, msg.code} != want || msg.src != to.Addr() {
			t.Errorf("refused: ICMP %d %d from %v, want %v", msg.typ, msg.code, msg.src, want)
		}
	})
}

func TestFault19_Fragments(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		seg := segment{src: g.id.guest, dst: g.id.host, seq: 1, flags: flagS, win: 1000, payload: make([]byte, 100)}
		p := seg.packet()
		for _, offset := range []int{0, 8, 800} {
			for _, more := range []bool{false, true} {
				if offset == 0 && !more {
					continue
				}
				b := bytes.Clone(p)
				if fam.version == 4 {
					b[6], b[7] = byte(offset/8>>8), byte(offset/8)
					if more {
						b[6] |= 0x20
					}
					b[10], b[11] = 0, 0
				} else {
					frag := []byte{6, 0, byte(offset >> 8), byte(offset), 0, 0, 0, 1}
					if more {
						frag[3] |= 1
					}
					b = append(b[:40:40], append(frag, b[40:]...)...)
					b[4], b[5], b[6] = byte((len(b)-40)>>8), byte(len(b)-40), 44
				}
				m.mustSend(b)
			}
		}
		m.quiet(time.Second)
		if st := m.s.Stats(); len(h.dials()) != 0 || st.TCPFlows != 0 || st.DropFragment != 4 {
			t.Errorf("%d dials, %d flows, %d fragments dropped", len(h.dials()), st.TCPFlows, st.DropFragment)
		}
	})
}

func TestFault20_Sweep(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{TCPIdleTimeout: 30 * time.Second})
		// Flows expire one after the other, while others begin, are used, and
		// are counted.
		for i := range uint16(300) {
			g := m.open(2000+i, fam.at(80))
			g.connect()
			far := h.accept()
			go io.Copy(far, far)
			if i%3 == 0 {
				g.data("x")
			}
			m.s.Stats()
			time.Sleep(200 * time.Millisecond)
		}
		time.Sleep(20 * time.Minute) // to some of them data was on its way
		m.expectFlows(0)
	})
}

func TestFault21_AcceptQueue(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		accepted := make(chan net.Conn, 10)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				accepted <- c
			}
		}()
		none := func(when string) {
			t.Helper()
			synctest.Wait()
			if len(accepted) != 0 {
				t.Fatalf("a connection was accepted %s", when)
			}
		}
		g := m.open(1025, fam.at(80))
		g.syn()
		g.expect("S.")
		none("before the handshake has ended")
		g.rst()
		none("that was reset during the handshake")
		g.ack()
		if seg := g.expect("R"); seg.seq != g.irs+1 {
			t.Errorf("%s, want R 1", g.show(seg))
		}
		g2 := m.open(1026, fam.at(80))
		g2.connect()
		synctest.Wait()
		if len(accepted) != 1 {
			t.Fatal("not accepted")
		}
		l.Close()

		l = mustListen(t, m.s, "tcp", fam.at(80).String())
		g3 := m.open(1027, fam.at(80))
		g3.connect()
		g3.rst() // nobody has accepted it, and it has not said anything
		g4 := m.open(1028, fam.at(80))
		g4.connect()
		if c := mustAccept(t, l); c.RemoteAddr().(*net.TCPAddr).Port != 1028 {
			t.Errorf("accepted %v, which is dead", c.RemoteAddr())
		}
	})
}

func TestFault22_CloseSendsFINLast(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.win = 2000 >> 7
		g.ack()
		down := pattern(60_000)
		done := make(chan bool)
		go func() {
			far.Write(down)
			far.Close()
			close(done)
		}()
		synctest.Wait()
		if !bytes.Equal(g.take(len(down)), down) {
			t.Error("data differs")
		}
		<-done
		first := g.expect("F.")
		for range 3 { // sent again, it stays where it was: the checker sees to that
			seg := g.expectWithin(10*time.Second, "F.")
			if seg.seq != first.seq {
				t.Errorf("FIN at %d, then at %d", g.seqOf(first), g.seqOf(seg))
			}
		}
		g.rcv++
		g.ack()
		g.silent(10 * time.Second)
	})
}

func TestFault23_Deadlines(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		check := func(what string, start time.Time, want time.Duration, err error) {
			t.Helper()
			var ne net.Error
			var op *net.OpError
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() || !errors.As(err, &op) {
				t.Errorf("%s: %v", what, err)
			}
			if d := time.Since(start); d != want {
				t.Errorf("%s: after %v, want %v", what, d, want)
			}
		}
		start := time.Now()
		c.SetReadDeadline(start.Add(3 * time.Second))
		_, err := c.Read(make([]byte, 1))
		check("Read", start, 3*time.Second, err)
		_, err = c.Read(make([]byte, 1))
		check("Read again", start, 3*time.Second, err)
		g.data("x")
		_, err = c.Read(make([]byte, 1))
		check("Read of what is there", start, 3*time.Second, err)
		c.SetReadDeadline(time.Time{})
		expectText(t, c, "x")
		start = time.Now()
		c.SetWriteDeadline(start.Add(5 * time.Second))
		n, err := c.Write(make([]byte, 10<<20))
		check("Write", start, 5*time.Second, err)
		if n < 1<<20 || n > 2<<20 {
			t.Errorf("Write of 10 MiB to a guest that does not acknowledge took %d", n)
		}
		c.SetDeadline(time.Now().Add(-time.Second))
		start = time.Now()
		_, err = c.Read(make([]byte, 1))
		check("Read with a deadline in the past", start, 0, err)
		_, err = c.Write(make([]byte, 1))
		check("Write with a deadline in the past", start, 0, err)
		// A deadline that moves wakes one that waits already.
		c.SetDeadline(time.Time{})
		go func() {
			time.Sleep(time.Second)
			c.SetReadDeadline(time.Now())
		}()
		start = time.Now()
		_, err = c.Read(make([]byte, 1))
		check("Read that was waiting", start, time.Second, err)
	})
}

func TestFault24_ReadOpensWindow(t *testing.T) {
	eachEnd(t, Config{ReceiveBuffer: 32 << 10}, func(t *testing.T, g *guest, far farEnd) {
		up := pattern(300_000)
		done := make(chan bool)
		go func() {
			defer close(done)
			time.Sleep(10 * time.Second) // the window is closed by then
			got := make([]byte, 0, len(up))
			buf := make([]byte, 1000)
			for len(got) < len(up) {
				n, err := far.Read(buf)
				if err != nil {
					t.Error(err)
					return
				}
				got = append(got, buf[:n]...)
			}
			if !bytes.Equal(got, up) {
				t.Error("upload differs")
			}
		}()
		g.upload(up) // which never probes: it waits for window updates
		<-done
	})
}

func TestFault25_WindowScale(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.opts = optMSS(1000)
		g.syn()
		seg := g.expect("S.")
		if _, ok := seg.option(3); ok {
			t.Error("window scale although the guest did not offer it")
		}
		g.win = 5000
		g.ack()
		far := h.accept()
		go far.Write(pattern(20000))
		synctest.Wait()
		n := 0
		for _, seg := range g.drop() {
			n = max(n, int(g.seqOf(seg))-1+len(seg.payload))
		}
		if n <= 4000 || n > 5000 { // the last segment would be small, and may wait
			t.Errorf("%d bytes in a window of 5000", n)
		}

		g = m.open(1026, fam.at(80))
		g.win = 100 // in the SYN: not scaled
		g.opts = append(optMSS(1000), optScale(7)...)
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			c := h.connect()
			go c.peer.Write(pattern(20000))
			return c, nil
		})
		g.syn()
		if seg := g.expect("S."); seg.win == 0 {
			t.Error("window 0 in the SYN-ACK")
		} else if v, ok := seg.option(3); !ok || 65535<<v[0] < m.s.cfg.ReceiveBuffer || v[0] > 0 && 65535<<(v[0]-1) >= m.s.cfg.ReceiveBuffer {
			t.Errorf("window scale %v for a buffer of %d", v, m.s.cfg.ReceiveBuffer)
		}
		g.win = 1
		g.ack()
		synctest.Wait()
		n = 0
		for _, seg := range g.drop() {
			n += len(seg.payload)
		}
		if n != 128 {
			t.Errorf("%d bytes in a window of 1<<7", n)
		}
	})
}

func TestFault26_DuplicateACKs(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		go far.Write(pattern(8 * 1400))
		synctest.Wait()
		sent := g.drop()
		if len(sent) < 8 {
			t.Fatalf("%d segments", len(sent))
		}
		// Data with the same ACK, and window updates: not duplicate ACKs.
		for i := range 5 {
			g.data("x")
			g.win -= uint16(i + 1)
			g.must(g.raw(".", g.nxt, g.rcv, nil, nil))
		}
		synctest.Wait()
		for _, seg := range g.drop() {
			if len(seg.payload) > 0 {
				t.Fatalf("sent again: %s", g.show(seg))
			}
		}
		for range 3 { // these are
			g.must(g.raw(".", g.nxt, g.rcv, nil, nil))
		}
		synctest.Wait()
		again := g.drop()
		if len(again) != 1 || len(again[0].payload) == 0 || again[0].seq != sent[0].seq {
			t.Fatalf("after three duplicate ACKs: %v", again)
		}
	})
}

// TestFault27_Families plays one conversation in both families and compares what
// the stack does, segment by segment.
func TestFault27_Families(t *testing.T) {
	play := func(t *testing.T, fam family) (log []string) {
		synctest.Test(t, func(t *testing.T) {
			m, h := newRig(t, Config{})
			start := time.Now()
			note := func(what string, g *guest) {
				synctest.Wait()
				for _, seg := range g.drop() {
					if seg.flags&flagS != 0 {
						g.irs = seg.seq
						seg.opts = seg.opts[4:] // the MSS differs
					}
					irs := g.irs
					if seg.flags&flagR != 0 && seg.seq == 0 {
						irs = 0
					}
					log = append(log, fmt.Sprintf("%v %s: %s %d %d %d %x %q", time.Since(start), what, formatFlags(seg.flags), seg.seq-irs,
						g.ackOf(seg), seg.win, seg.opts, seg.payload))
				}
			}
			g := m.open(1025, fam.at(80))
			g.opts = append(optMSS(500), append(optScale(3), optSACKOK()...)...)
			g.syn()
			note("SYN", g)
			g.rcv = 1
			g.data("hello")
			note("data", g)
			far := h.accept()
			go far.Write(pattern(2000))
			note("reply", g)
			time.Sleep(5 * time.Second)
			note("lost", g)
			g.rcv += 2000
			g.ack()
			note("ack", g)
			g.must(g.raw("P.", g.nxt+100, g.rcv, nil, []byte("gap")))
			note("gap", g)
			g.must(g.raw("S", g.nxt, 0, nil, nil))
			note("SYN again", g)
			g.must(g.raw("R", g.nxt+1, 0, nil, nil))
			note("reset in the window", g)
			time.Sleep(time.Second)
			g.fin()
			note("FIN", g)
			far.CloseWrite()
			note("FIN back", g)
			g.rcv++
			g.ack()
			note("end", g)
			g.ack()
			note("stray", g)
			h.setDial(refuse(dialError(syscall.ECONNREFUSED)))
			g = m.open(1026, fam.at(80))
			g.syn()
			note("refused", g)
			h.setDial(nil)
			g = m.open(1027, fam.at(80))
			g.syn()
			note("idle", g)
			g.rcv = 1
			g.ack()
			time.Sleep(3 * time.Minute)
			note("idle", g)
		})
		return log
	}
	var logs [2][]string
	eachFamily(t, func(t *testing.T, fam family) {
		i := 0
		if fam.version == 6 {
			i = 1
		}
		logs[i] = play(t, fam)
	})
	if a, b := strings.Join(logs[0], "\n"), strings.Join(logs[1], "\n"); a != b {
		t.Errorf("IPv4:\n%s\n\nIPv6:\n%s", a, b)
	}
	if len(logs[0]) < 15 {
		t.Errorf("only %d segments:\n%s", len(logs[0]), strings.Join(logs[0], "\n"))
	}
}
