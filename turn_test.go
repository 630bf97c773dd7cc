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
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"
)

// Turns: what one call of HandlePacket, HandlePackets or a timer does, and who does
// the rest.

// batch gives packets to the Stack in one call, and overwrites them when the Stack
// has had them.
func (m *machine) batch(w BatchWriter, packets ...[]byte) error {
	err := m.s.HandlePackets(m.ns, m.mac, m.gw, packets, w)
	for i, p := range packets {
		for j := range p {
			p[j] = 0xa5
		}
		packets[i] = nil
	}
	return err
}

// writeBatch is the guest's BatchWriter.
func (m *machine) writeBatch(frames [][]byte) error {
	var first error
	for i, frame := range frames {
		if err := m.write(frame); err != nil && first == nil {
			first = err
		}
		frames[i] = nil // the slice is not the Stack's to read again
	}
	return first
}

// packet returns a segment at the place where the connection is, which moves on.
func (g *guest) packet(flags string, payload ...byte) []byte {
	seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: parseFlags(flags), win: g.win, payload: payload}
	g.mu.Lock()
	g.flow(g.id).offered(&seg)
	g.mu.Unlock()
	g.nxt += uint32(len(payload)) + uint32(seg.flags&flagF) + uint32(seg.flags&flagS>>1)
	return seg.packet()
}

// tcpHeader returns where the TCP header of a frame begins, the guest's port, and
// where its data ends in sequence numbers. It is for frames of TCP only.
func tcpHeader(frame []byte) (off int, port uint16, end uint32) {
	off = 14 + 20
	if frame[14]>>4 == 6 {
		off = 14 + 40
	}
	be := binary.BigEndian
	n := len(frame) - off - int(frame[off+12]>>4)*4
	return off, be.Uint16(frame[off+2:]), be.Uint32(frame[off+4:]) + uint32(n)
}

func TestHandlePackets(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		a, b := m.open(1025, fam.at(80)), m.open(1026, fam.at(80))
		connect := func(g *guest) *hostConn {
			if err := m.batch(m.writeBatch, g.packetSYN()); err != nil {
				t.Fatal(err)
			}
			g.expect("S.")
			return h.accept()
		}
		farA, farB := connect(a), connect(b)
		synctest.Wait() // for who has sent the SYN-ACKs, and may still be at the Writer
		// Both flows in turn, and between them what is no TCP and what is no packet.
		ping := fam.ping(fam.server, 1, 1, nil)
		text := bytes.Repeat([]byte("0123456789abcdef"), 80)
		var packets [][]byte
		packets = append(packets, a.packet("."), b.packet("."))
		for i := range 8 {
			packets = append(packets, a.packet(".", text...), b.packet(".", text...))
			if i == 3 {
				packets = append(packets, []byte("no packet"), ping)
			}
		}
		packets = append(packets, a.packet("P.", 'a'), b.packet("P.", 'b'))
		if err := m.batch(m.writeBatch, packets...); !errors.Is(err, ErrPacketTooShort) {
			t.Errorf("error %v, want %v", err, ErrPacketTooShort)
		}
		if n := len(a.drop()); n != 1 {
			t.Errorf("%d segments answer ten of one flow, want one", n)
		}
		if n := m.s.Stats().EchoReplies; n != 1 {
			t.Errorf("%d echo replies", n)
		}
		want := string(bytes.Repeat(text, 8))
		expectText(t, farA, want+"a")
		expectText(t, farB, want+"b")
		// Each segment that is out of order has an ACK of its own.
		synctest.Wait() // for who has written to the host
		b.drop()
		b.nxt += 100
		packets = [][]byte{b.packet(".", 'x'), b.packet(".", 'y'), b.packet(".", 'z')}
		if err := m.batch(m.writeBatch, packets...); err != nil {
			t.Fatal(err)
		}
		if n := len(b.drop()); n != 3 {
			t.Errorf("%d ACKs of three segments out of order", n)
		}
		// The Writer's error.
		lost := errors.New("lost")
		m.setHook(func([]byte) error { return lost })
		if err := m.batch(m.writeBatch, a.packet("P.", text...), a.packet("P.", text...)); err != lost {
			t.Errorf("error %v, want %v", err, lost)
		}
	})
}

// packetSYN is packet for the SYN.
func (g *guest) packetSYN() []byte {
	g.nxt, g.rcv = 1, 0
	seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss, flags: flagS, win: g.win, opts: g.opts}
	g.mu.Lock()
	g.flow(g.id).offered(&seg)
	g.mu.Unlock()
	return seg.packet()
}

// TestTurnsOfOneFlow: a flow that has segments in two calls of HandlePackets answers
// in each. The one may be held up by the Writer of another flow.
func TestTurnsOfOneFlow(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		x, c := m.open(1025, fam.at(80)), m.open(1026, fam.at(80))
		x.connect()
		c.connect()
		h.accept()
		h.accept()
		release := make(chan bool)
		m.setHook(func(frame []byte) error {
			if _, port, _ := tcpHeader(frame); port == x.id.guest.Port() {
				<-release
			}
			return nil
		})
		full := make([]byte, fam.mss)
		first := [][]byte{x.packet(".", full...), x.packet(".", full...), c.packet(".", full...)}
		go m.batch(m.writeBatch, first...)
		synctest.Wait()
		start := time.Now()
		if err := m.batch(m.writeBatch, c.packet(".", full...), c.packet(".", full...)); err != nil {
			t.Fatal(err)
		}
		c.expectACK()
		if d := time.Since(start); d != 0 {
			t.Errorf("the flow waited %v for the Writer of another", d)
		}
		close(release)
	})
}

// TestReplacedInTurn: a connection that ends and is replaced in one call of
// HandlePackets has its last bytes written to the host all the same.
func TestReplacedInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		far.CloseWrite()
		g.expectFIN()
		last := g.packet("PF.", []byte("last words")...)
		g.iss, g.nxt = g.iss+1<<20, 0
		if err := m.batch(m.writeBatch, last, g.packetSYN()); err != nil {
			t.Fatal(err)
		}
		expectText(t, far, "last words")
		expectEOF(t, far)
		far.expectState(t, "closed")
		h.accept()
	})
}

// pent makes a connection of a guest that may send more at once than a turn has:
// the send buffer of the stack is full, and the guest's window is closed.
func pent(t *testing.T, m *machine, fam family, l net.Listener) (*guest, *VirtualConn) {
	g := m.open(1025, fam.at(80))
	g.connect()
	conn := mustAccept(t, l)
	const n = 300 << 10
	go conn.Write(make([]byte, n))
	g.take(n) // cwnd is large then
	g.win = 0
	g.ack()
	written := make([]byte, 4*maxTurn*fam.mss)
	if _, err := conn.Write(written); err != nil {
		t.Fatal(err)
	}
	synctest.Wait()
	g.drop()
	g.win = 65535
	return g, conn
}

// TestUnfinishedTurn: a flow whose last turn has left frames to the timer does not
// ask for the time again and again while the Writer holds it up.
func TestUnfinishedTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		g, _ := pent(t, m, fam, mustListen(t, m.s, "tcp", fam.at(80).String()))
		g.ack() // a turn
		release := make(chan bool)
		m.setHook(func([]byte) error { <-release; return nil })
		go g.ack()              // the next turn, before the timer
		time.Sleep(time.Second) // never ends if the timer is always due
		m.setHook(nil)
		close(release)
		time.Sleep(time.Second)
		if n := len(g.drop()); n <= maxTurn {
			t.Errorf("%d segments: no turn was left unfinished", n)
		}
	})
}

// TestResetAfterTurn: a connection that is reset during the last frame of a turn
// tells the guest.
func TestResetAfterTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		g, conn := pent(t, m, fam, mustListen(t, m.s, "tcp", fam.at(80).String()))
		frames := 0
		m.setHook(func([]byte) error {
			if frames++; frames == maxTurn {
				conn.SetLinger(0)
				conn.Close()
			}
			return nil
		})
		g.ack()
		g.expectRST()
	})
}

// TestReadEndsItsTurn: a Read does not go on for as long as another goroutine
// writes.
func TestReadEndsItsTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		for name, call := range map[string]func(c *VirtualConn) error{
			"Read":      func(c *VirtualConn) error { _, err := c.Read(make([]byte, 1)); return err },
			"CloseRead": func(c *VirtualConn) error { return c.CloseRead() },
		} {
			m, _ := newRig(t, Config{})
			g, conn := pent(t, m, fam, mustListen(t, m.s, "tcp", fam.at(80).String()))
			g.data("x")
			g.ack() // a turn; the timer is to do the rest
			const limit = 10 * maxTurn
			var frames atomic.Int32
			m.setHook(func(frame []byte) error {
				if _, _, end := tcpHeader(frame); frames.Add(1) < limit { // the guest is fast, and so is who writes
					g.must(g.raw(".", g.nxt, end-g.irs, nil, nil))
					conn.Write(make([]byte, fam.mss))
				}
				return nil
			})
			if err := call(conn); err != nil {
				t.Fatal(err)
			}
			if frames.Load() >= limit {
				t.Errorf("%s sends what others write", name)
			}
			time.Sleep(time.Second)
			m.s.Close()
		}
	})
}

// TestDeliverEndsItsTurn: a HandlePacket does not go on writing to the host for as
// long as others bring something for it.
func TestDeliverEndsItsTurn(t *testing.T) {
	fam := families[0]
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.Copy(io.Discard, c)
		c.Close()
	}()
	m, _ := newRig(t, Config{Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
	}})
	g := m.open(1025, fam.at(80))
	g.connect()

	// Every answer brings more, some for the host and some to be answered again.
	const limit = 50000
	full := make([]byte, fam.mss)
	c := m.s.lookup(g.key()).(*tcpConn)
	var mu sync.Mutex // guards what follows, and g
	frames, done := 0, false
	m.setHook(func([]byte) error {
		if !mu.TryLock() {
			return nil
		}
		defer mu.Unlock()
		if frames++; done || frames >= limit {
			return nil
		}
		c.mu.Lock()
		few := c.tcb.Buffered() < 8<<10 // the host's socket takes as much at once
		c.mu.Unlock()
		if few {
			g.say("P.", full...)
		}
		g.must(g.raw("P.", 1, g.rcv, nil, full[:1]))
		return nil
	})
	mu.Lock()
	seq, rcv := g.nxt, g.rcv
	g.nxt += 2 * uint32(len(full))
	mu.Unlock()
	g.must(g.raw("P.", seq, rcv, nil, full))
	g.must(g.raw("P.", seq+uint32(len(full)), rcv, nil, full)) // is acknowledged at once, and written
	mu.Lock()
	defer mu.Unlock()
	done = true
	if frames >= limit {
		t.Errorf("one packet has the host written to for as long as others bring something")
	}
}

// heldRig is a flow to a host of this machine, of which no bytes are written because
// they have waited for long enough.
func heldRig(t *testing.T, fam family, mtu int) (*guest, *tcpConn) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	m, _ := newRig(t, Config{MTU: mtu, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, l.Addr().String())
	}})
	g := m.open(1025, fam.at(80))
	g.connect()
	c := m.s.lookup(g.key()).(*tcpConn)
	if err := c.host.(*net.TCPConn).SetWriteBuffer(1 << 20); runtime.GOOS != "linux" || err != nil {
		t.Skipf("the packets of %s are as long as they are: %v", runtime.GOOS, err)
	}
	return g, c
}

// hold sends a segment without a push, and returns what the host was written since the
// flow began.
func (g *guest) hold(c *tcpConn, payload []byte) (written int) {
	c.mu.Lock()
	c.heldUntil = c.stack.now().Add(time.Hour) // however slow this machine is
	c.mu.Unlock()
	g.say(".", payload...)
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(c.written)
}

// TestHeldBytesFillAPacket: what the guest does not push is written to the host when it
// fills a packet there, and not a few bytes later; or two packets, of long segments.
func TestHeldBytesFillAPacket(t *testing.T) {
	const packet = 45 * 1448 // Linux, MTU 1500, timestamps
	for _, size := range []struct{ mtu, segment, packets int }{{1500, 1440, packet}, {65520, 32700, 2 * 65483}} {
		t.Run(fmt.Sprint("MTU", size.mtu), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, fam family) {
				g, c := heldRig(t, fam, size.mtu)
				const first = "behind this is the first window, which has no scale"
				g.data(first)
				g.expectACK()
				full := make([]byte, size.segment)
				sent, written := 0, 0
				for written == 0 && sent <= size.packets {
					written = g.hold(c, full) - len(first)
					sent += len(full)
				}
				if written != sent || sent > size.packets || sent <= size.packets-2*len(full) {
					t.Errorf("%d of %d bytes are written", written, sent)
				}
			})
		})
	}
}

// TestHeldBytesFillTheWindow: what the guest does not push is written when it can send
// no full segment before some of it is.
func TestHeldBytesFillTheWindow(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g, c := heldRig(t, fam, 65520)
		segment := make([]byte, 40_000) // of the 65,535 of the first window
		if written := g.hold(c, segment); written != len(segment) {
			t.Errorf("%d of %d bytes are written", written, len(segment))
		}
	})
}

// TestClock: the clock of a Stack never shows 0, which is no time, and goes as all
// others do, in a bubble too, wherever the Stack was made.
func TestClock(t *testing.T) {
	check := func(t *testing.T, begun time.Time, s *Stack) {
		defer s.Close()
		// A time.Time that is moved by years loses the clock that never jumps where the
		// year comes out as one before 1885: from 1970, which is when it is until
		// somebody sets the time of day.
		if s.began.Before(begun) {
			t.Errorf("the clock begins at %v, and the Stack at %v", s.began, begun)
		}
		before, since := s.now(), time.Now()
		time.Sleep(time.Millisecond)
		least := time.Since(since)
		now := s.now()
		if d, most := now.Sub(before), time.Since(since); before <= 0 || d < least || d > most+time.Microsecond {
			t.Errorf("it was %d, and %v later %v to %v had passed", before, d, least, most)
		}
	}
	check(t, time.Now(), New())
	begun, outside := time.Now(), New()
	synctest.Test(t, func(t *testing.T) { check(t, begun, outside) })
	synctest.Test(t, func(t *testing.T) { check(t, time.Now(), New()) })
}

// TestReusedFramesOfOthers: with ReuseFrames a frame is left alone until its Writer
// returns, whatever other flows send meanwhile.
func TestReusedFramesOfOthers(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{ReuseFrames: true})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		mustAccept(t, l)
		early := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + 100, ack: g.irs + 1, flags: flagA, win: 65535, payload: []byte("x")}.packet()
		other := func([]byte) error { return nil }
		for range 20 { // a pool forgets at times
			m.s.HandlePacket(0, m.mac, m.gw, fam.ping(fam.server, 1, 1, []byte("ping")), func(frame []byte) error {
				before := bytes.Clone(frame)
				for range 3 { // each is acknowledged at once
					m.s.HandlePacket(0, m.mac, m.gw, early, other)
				}
				if !bytes.Equal(frame, before) {
					t.Fatalf("the frame has changed under its Writer:\n%x\n%x", before, frame)
				}
				return nil
			})
		}
	})
}

// TestDrainedFlowIsForgotten: nothing keeps a flow whose host has had everything.
func TestDrainedFlowIsForgotten(t *testing.T) {
	fam := families[0]
	m, h := newRig(t, Config{})
	g := m.open(1025, fam.at(80))
	g.connect()
	far := h.accept()
	for range 100 {
		g.data(string(make([]byte, 1000))) // more than the host takes
	}
	c, _ := m.s.lookup(g.key()).(*tcpConn)
	p := weak.Make(c)
	g.rst()
	far.expectState(t, "reset")
	m.expectFlows(0)
	c = nil
	for end := time.Now().Add(patience); p.Value() != nil; time.Sleep(10 * time.Millisecond) {
		if runtime.GC(); time.Now().After(end) {
			t.Fatal("the flow is still held")
		}
	}
}

// TestAddRouteMapped: a prefix of IPv4 may be written as one of IPv6.
func TestAddRouteMapped(t *testing.T) {
	s := New()
	defer s.Close()
	w := func([]byte) error { return nil }
	for _, prefix := range []string{"::ffff:10.1.0.0/112", "::ffff:10.2.0.0/96"} {
		if err := s.AddRoute(0, netip.MustParsePrefix(prefix), [6]byte{}, [6]byte{}, w); err != nil {
			t.Fatal(err)
		}
		c, err := s.DialContext(t.Context(), "udp", "10.1.2.3:9")
		if err != nil {
			t.Fatalf("%s: %v", prefix, err)
		}
		c.Close()
	}
}

// TestUDPReclaimStuckClose: a datagram does not wait for the host connection of the
// flow that makes way for it.
func TestUDPReclaimStuckClose(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{MaxUDPFlows: 1})
		release := make(chan bool)
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			return closeWaits{h.connect(), release}, nil
		})
		m.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 1025), fam.at(9), []byte("one")))
		h.accept()
		time.Sleep(briefIdle)
		start := time.Now()
		go func() { time.Sleep(time.Minute); close(release) }()
		m.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 1026), fam.at(9), []byte("two")))
		if d := time.Since(start); d != 0 {
			t.Errorf("HandlePacket took %v", d)
		}
		expectText(t, h.accept(), "two")
	})
}

// closeWaits is a connection whose Close takes its time.
type closeWaits struct {
	*hostConn
	release chan bool
}

func (c closeWaits) Close() error { <-c.release; return c.hostConn.Close() }

// TestLastWordsBehindWriter: what the host has said before it failed reaches the
// guest also if the Writer is busy with another frame at that time.
func TestLastWordsBehindWriter(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		m.setHook(func([]byte) error { m.setHook(nil); time.Sleep(time.Second); return nil })
		go g.raw("P.", g.nxt+10, g.rcv, nil, []byte("out of order")) // is acknowledged at once
		synctest.Wait()
		putText(t, far, "last words")
		synctest.Wait()
		far.abort()
		g.expect(".")
		seg := g.expect(".")
		if string(seg.payload) != "last words" {
			t.Errorf("segment %s", g.show(seg))
		}
		g.rcv += uint32(len(seg.payload))
		g.expectRST()
	})
}

// batchWire carries frames one way between two stacks, as many at once as there
// are. What finds no room is lost.
type batchWire struct {
	frames chan []byte
	lost   atomic.Int32
}

func (w *batchWire) write(frames [][]byte) error {
	for _, frame := range frames {
		select {
		case w.frames <- bytes.Clone(frame):
		default:
			w.lost.Add(1)
		}
		clear(frame) // whatever it holds now is not to be sent again
	}
	return nil
}

// carry gives what comes to a stack, until the wire is closed.
func (w *batchWire) carry(s *Stack, answers *batchWire) {
	for frame := range w.frames {
		packets := [][]byte{frame[14:]}
		for len(packets) < 100 {
			select {
			case frame, ok := <-w.frames:
				if ok {
					packets = append(packets, frame[14:])
					continue
				}
			default:
			}
			break
		}
		s.HandlePackets(0, [6]byte{2}, [6]byte{4}, packets, answers.write)
	}
}

// TestBatchesBetweenStacks moves data both ways over several connections at once,
// and over a wire that loses frames when it is full.
func TestBatchesBetweenStacks(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		for _, reuse := range []bool{false, true} {
			a, _ := newRig(t, Config{ReuseFrames: reuse})
			b, _ := newRig(t, Config{ReuseFrames: reuse, ReceiveBuffer: 64 << 10})
			toA, toB := &batchWire{frames: make(chan []byte, 200)}, &batchWire{frames: make(chan []byte, 200)}
			var carriers, ends sync.WaitGroup
			carriers.Go(func() { toA.carry(a.s, toB) })
			carriers.Go(func() { toB.carry(b.s, toA) })
			w := func(frame []byte) error { return toB.write([][]byte{frame}) }
			if err := a.s.AddRoute(0, netip.PrefixFrom(fam.server, 0), [6]byte{4}, [6]byte{2}, w); err != nil {
				t.Fatal(err)
			}
			l := mustListen(t, b.s, "tcp", fam.at(80).String())
			data := pattern(1 << 20)
			exchange := func(c net.Conn) {
				ends.Go(func() {
					if _, err := c.Write(data); err != nil {
						t.Error(err)
					}
					c.(*VirtualConn).CloseWrite()
				})
				ends.Go(func() {
					got, err := io.ReadAll(c)
					if err != nil || !bytes.Equal(got, data) {
						t.Errorf("%d bytes, %v", len(got), err)
					}
				})
			}
			for range 4 {
				c, err := a.s.DialContext(t.Context(), "tcp", fam.at(80).String())
				if err != nil {
					t.Fatal(err)
				}
				exchange(c)
				exchange(mustAccept(t, l))
			}
			ends.Wait()
			t.Logf("%d frames lost one way, %d the other", toA.lost.Load(), toB.lost.Load())
			a.s.Close()
			b.s.Close()
			close(toA.frames)
			close(toB.frames)
			carriers.Wait()
		}
	})
}

// TestBatchWriterReenters wires two stacks so that the BatchWriter of one is
// HandlePackets of the other.
func TestBatchWriterReenters(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		a, _ := newRig(t, Config{ReuseFrames: true})
		b, _ := newRig(t, Config{ReuseFrames: true})
		var toA, toB BatchWriter
		wire := func(s *Stack, answers *BatchWriter) BatchWriter {
			return func(frames [][]byte) error {
				packets := make([][]byte, len(frames))
				for i, frame := range frames {
					packets[i] = frame[14:]
				}
				return s.HandlePackets(0, [6]byte{2}, [6]byte{4}, packets, *answers)
			}
		}
		toA, toB = wire(a.s, &toB), wire(b.s, &toA)
		w := func(frame []byte) error { return toB([][]byte{frame}) }
		if err := a.s.AddRoute(0, netip.PrefixFrom(fam.server, 0), [6]byte{4}, [6]byte{2}, w); err != nil {
			t.Fatal(err)
		}
		l := mustListen(t, b.s, "tcp", fam.at(80).String())
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}()
		c, err := a.s.DialContext(t.Context(), "tcp", fam.at(80).String())
		if err != nil {
			t.Fatal(err)
		}
		data := pattern(8 << 20)
		go func() {
			c.Write(data)
			c.(*VirtualConn).CloseWrite()
		}()
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		c.Close()
	})
}

// A Writer that takes its time in the middle of a call does not make the flows of the
// packets behind it older than they are.
func TestSlowWriterInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{UDPIdleTimeout: 60 * time.Second})
		g.say("one")
		host := h.accept()
		host.expect(t, "one")
		time.Sleep(5 * time.Second)
		slow := func([][]byte) error { time.Sleep(50 * time.Second); return nil }
		if err := g.batch(slow, echoRequest(fam.version, 64), udpPacket(g.from, g.to, []byte("two"))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		host.expect(t, "two")
		time.Sleep(59 * time.Second)
		if n := g.s.Stats().UDPFlows; n != 1 {
			t.Errorf("%d flows, 59 s after the last datagram", n)
		}
		g.s.Close()
	})
}
