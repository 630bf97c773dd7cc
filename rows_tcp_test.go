package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Rows of testdata/conformance.md about TCP that are no scripts: properties, grids,
// and large amounts.

// soak returns how large a test is: as large as its row says where SLIRP_SOAK=1 is
// set.
func soak(small, large int) int {
	if os.Getenv("SLIRP_SOAK") == "1" {
		return large
	}
	return small
}

// blind gives a segment to the Stack, whose answers are lost, and counted.
func (g *guest) blind(seg segment, frames *int) {
	g.t.Helper()
	g.mu.Lock()
	g.flow(g.id).offered(&seg)
	g.mu.Unlock()
	g.must(g.s.HandlePacket(g.ns, g.mac, g.gw, seg.packet(), func([]byte) error { *frames++; return nil }))
}

// segmentAt returns a segment of the connection with relative numbers.
func (g *guest) segmentAt(flags string, seq, ack uint32, payload []byte) segment {
	seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + seq, flags: parseFlags(flags), win: g.win, payload: payload}
	if seg.flags&flagA != 0 {
		seg.ack = g.irs + ack
	}
	return seg
}

// beginAt makes the stack's initial sequence number be iss, if the connection
// begins now.
func (g *guest) beginAt(iss uint32) {
	now := g.s.tcbConfig(g.key(), g.s.now(), nil).ISS
	g.s.isnEpoch = g.s.isnEpoch.Add(-time.Duration(iss-now) * 4 * time.Microsecond)
}

// sackBlocks returns the blocks of a segment, relative to the guest's SYN.
func (g *guest) sackBlocks(seg segment) (blocks [][2]uint32) {
	v, _ := seg.option(5)
	for ; len(v) >= 8; v = v[8:] {
		blocks = append(blocks, [2]uint32{binary.BigEndian.Uint32(v) - g.iss, binary.BigEndian.Uint32(v[4:]) - g.iss})
	}
	return blocks
}

// room returns how much the stack's window takes at g.nxt.
func (g *guest) room() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int(int32(g.flow(g.id).edge - g.iss - g.nxt))
}

// fill sends b as far as the window goes, and waits for the ACKs. It is for bubbles.
func (g *guest) fill(b []byte) (sent int) {
	g.t.Helper()
	for len(b) > 0 {
		synctest.Wait()
		n := min(g.room(), len(b), 1000)
		if n <= 0 {
			time.Sleep(time.Second) // a delayed ACK may open it
			synctest.Wait()
			if g.room() <= 0 {
				break
			}
			continue
		}
		g.say("P.", b[:n]...)
		b, sent = b[n:], sent+n
	}
	time.Sleep(time.Second)
	synctest.Wait()
	return sent
}

func TestT001_EveryLength(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		all := pattern(1461)
		buf := make([]byte, len(all))
		for n := 1; n <= len(all); n++ {
			g.upload(all[:n])
			if _, err := io.ReadFull(far, buf[:n]); err != nil || !bytes.Equal(buf[:n], all[:n]) {
				t.Fatalf("%d bytes to the far end: %v", n, err)
			}
			putText(t, far, string(all[:n]))
			g.expectText(string(all[:n]))
		}
		before := g.s.Stats()
		other := g.open(2000, g.id.host)
		syn := segment{src: other.id.guest, dst: other.id.host, flags: flagS, win: 1000, opts: other.opts}.packet()
		syn[len(syn)-len(other.opts)-4+1] ^= 1 // the checksum
		g.mustSend(syn)
		g.quiet(time.Second)
		if st := g.s.Stats(); st.DropChecksum != before.DropChecksum+1 || st.TCPFlows != before.TCPFlows {
			t.Errorf("a SYN with a wrong checksum: %+v", st)
		}
	})
}

func TestT002_DataOffset(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		far := dial(g)
		flows := m.s.Stats().TCPFlows
		lie := func(seg segment, doff int) []byte {
			p := seg.packet()
			off, _ := tcpOffset(p)
			p[off+12] = byte(doff << 4)
			p[off+16], p[off+17] = 0, 0 // a checksum of 0 is none
			return p
		}
		other := m.open(1026, to)
		syn := segment{src: other.id.guest, dst: other.id.host, flags: flagS, win: 1000}
		for doff := range 16 {
			if doff == 5 {
				continue
			}
			before := m.s.Stats().DropTruncated
			m.mustSend(lie(syn, doff))
			m.mustSend(lie(g.segmentAt("P.", g.nxt, g.rcv, nil), doff))
			if n := m.s.Stats().DropTruncated - before; n != 2 {
				t.Errorf("data offset %d of 20 bytes: %d dropped, want 2", doff, n)
			}
		}
		proto := byte(6)
		whole := g.segmentAt("P.", g.nxt, g.rcv, nil).packet()
		off, _ := tcpOffset(whole)
		for n := range 20 {
			m.mustSend(refPacket(g.id.guest.Addr(), g.id.host.Addr(), proto, whole[off:][:n], -1))
		}
		m.quiet(time.Second)
		if n := m.s.Stats().TCPFlows; n != flows {
			t.Errorf("%d flows, want %d", n, flows)
		}
		g.data("still here")
		expectText(t, far, "still here")
	})
}

// TestT011_HugeWindow moves data into a window of 1,073,725,440 bytes, whose right
// edge is beyond the end of the sequence space.
func TestT011_HugeWindow(t *testing.T) {
	eachRig(t, Config{SendBuffer: 4 << 20}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.opts = append(optMSS(1440), optScale(14)...)
		g.wrapStack()
		far := dial(g)
		down := pattern(3 << 20)
		go far.Write(down)
		start := time.Now()
		if !bytes.Equal(g.take(len(down)), down) {
			t.Error("data differs")
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("it took %v on a link without delay", d)
		}
	})
}

// TestT012_SequenceSpace moves 256 KiB each way over a link that reorders, from
// everywhere in the sequence space.
func TestT012_SequenceSpace(t *testing.T) {
	numbers := []uint32{0, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff}
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		m.ownISS = true
		rng := rand.New(rand.NewPCG(12, 1))
		data := pattern(256 << 10)
		for i, irs := range numbers {
			for j, iss := range numbers {
				g := m.open(uint16(2000+10*i+j), to)
				g.iss = irs
				g.opts = append(optMSS(1440), append(optScale(7), optSACKOK()...)...)
				g.beginAt(iss)
				far := dial(g)
				if g.irs != iss {
					t.Fatalf("the stack begins at %#x, want %#x", g.irs, iss)
				}
				done := make(chan error, 1)
				go func() {
					got := make([]byte, len(data))
					_, err := io.ReadFull(far, got)
					if err == nil && !bytes.Equal(got, data) {
						err = errors.New("upload differs")
					}
					done <- err
				}()
				g.uploadReordered(data, rng)
				if err := <-done; err != nil {
					t.Fatalf("IRS %#x, ISS %#x: %v", irs, iss, err)
				}
				go far.Write(data)
				if !bytes.Equal(g.takeReordered(len(data), rng), data) {
					t.Fatalf("IRS %#x, ISS %#x: download differs", irs, iss)
				}
				g.rst()
				m.mu.Lock()
				delete(m.flows, g.id)
				m.kept = nil
				m.mu.Unlock()
			}
		}
	})
}

// uploadReordered sends data in segments of which one in twenty comes behind the
// next. The stack's SACK must be about the one that came early.
func (g *guest) uploadReordered(data []byte, rng *rand.Rand) {
	g.t.Helper()
	const mss = 1400
	for len(data) > 0 {
		synctest.Wait()
		room := g.room()
		if room < 2*mss && room < len(data) {
			time.Sleep(10 * time.Millisecond) // the far end reads
			continue
		}
		n := min(mss, len(data))
		if rng.IntN(20) > 0 || len(data) < 2*mss {
			g.say("P.", data[:n]...)
			data = data[n:]
			continue
		}
		g.drop()
		g.must(g.raw("P.", g.nxt+mss, g.rcv, nil, data[mss:2*mss]))
		q := g.drop()
		want := [2]uint32{g.nxt + mss, g.nxt + 2*mss}
		if len(q) == 0 {
			g.t.Fatalf("nothing is said of a segment out of order")
		} else if b := g.sackBlocks(q[len(q)-1]); len(b) != 1 || b[0] != want || g.ackOf(q[len(q)-1]) != g.nxt {
			g.t.Fatalf("%s blocks %d, want ack %d and %d", g.show(q[len(q)-1]), b, g.nxt, want)
		}
		g.must(g.raw("P.", g.nxt, g.rcv, nil, data[:mss]))
		g.nxt += 2 * mss
		data = data[2*mss:]
	}
	g.waitFor(patience, func() bool { return g.flow(g.id).ack == g.iss+g.nxt })
	g.drop()
}

// takeReordered takes n bytes, of which one segment in twenty counts only when the
// next has come: what is said of that is an ACK with a SACK.
func (g *guest) takeReordered(n int, rng *rand.Rand) []byte {
	g.t.Helper()
	data := make([]byte, 0, n)
	var late *segment
	take := func(seg segment) {
		if g.seqOf(seg) == g.rcv {
			data = append(data, seg.payload...)
			g.rcv += uint32(len(seg.payload))
		}
	}
	for len(data) < n {
		seg, ok := g.next(50 * time.Millisecond)
		switch {
		case !ok && late != nil: // it was the last of a burst
			take(*late)
			late = nil
		case !ok:
			if seg, ok = g.next(patience); !ok {
				g.t.Fatalf("%d of %d bytes, then nothing", len(data), n)
			}
			take(seg)
		case len(seg.payload) == 0:
			continue
		case late != nil:
			left := g.irs + uint32(g.seqOf(seg))
			right := left + uint32(len(seg.payload))
			sack := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32([]byte{1, 1, 5, 10}, left), right)
			g.must(g.raw(".", g.nxt, g.rcv, sack, nil))
			take(*late)
			take(seg)
			late = nil
		case rng.IntN(20) == 0:
			late = &seg
			continue
		default:
			take(seg)
		}
		g.ack()
	}
	return data
}

func TestT046_SourcePorts(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{MaxTCPFlows: -1})
		at := netip.AddrPortFrom(fam.guest, 22)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)
		lingering := make(map[uint16]bool)
		for range 50 { // ports in TIME-WAIT
			d := startDial(t.Context(), m.s, "tcp", at.String())
			g, _ := m.toGuest(at)
			g.accept()
			(<-d).c.Close()
			g.expectFIN()
			g.fin()
			g.drop()
			lingering[g.id.host.Port()] = true
		}
		if n := m.s.Stats().TimeWait; n != 50 || len(lingering) != n {
			t.Fatalf("%d ports in TIME-WAIT, %d of them different", n, len(lingering))
		}
		const n = 10_000
		var mu sync.Mutex
		var ports []uint16
		count := func(frame []byte) error {
			off, _ := tcpOffset(frame[14:])
			mu.Lock()
			defer mu.Unlock()
			ports = append(ports, binary.BigEndian.Uint16(frame[14+off:]))
			return nil
		}
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, fam.guest.BitLen()), m.mac, m.gw, count)
		m.s.mu.Lock()
		clear(m.s.guests) // it is found by its route
		m.s.mu.Unlock()
		ctx, cancel := context.WithCancel(t.Context())
		var dials sync.WaitGroup
		for range n {
			dials.Go(func() { m.s.DialContext(ctx, "tcp", at.String()) })
		}
		synctest.Wait()
		mu.Lock()
		got := slices.Clone(ports)
		mu.Unlock()
		cancel()
		dials.Wait()
		seen := make(map[uint16]bool)
		inSequence := 0
		for i, p := range got {
			switch {
			case seen[p]:
				t.Fatalf("port %d is used twice", p)
			case lingering[p]:
				t.Fatalf("port %d is in TIME-WAIT", p)
			case p < firstDynamicPort:
				t.Fatalf("port %d", p)
			case i > 0 && (p == got[i-1]+1 || p == got[i-1]+2):
				inSequence++
			}
			seen[p] = true
		}
		if len(got) != n || inSequence > n/100 {
			t.Errorf("%d ports, %d of them behind the one before", len(got), inSequence)
		}
		m.expectFlows(0)
	})
}

// TestT048_Acceptability has the 24 cases of the table of RFC 9293 section 3.10.7.4.
func TestT048_Acceptability(t *testing.T) {
	const full = 65535
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{ReceiveBuffer: full})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		port := uint16(2000)
		for _, window := range []uint32{0, full} {
			for _, n := range []uint32{0, 1, 100} {
				for i, from := range []int64{-1, 0, int64(window) - 1, int64(window)} {
					port++
					g := m.open(port, fam.at(80))
					g.connect()
					c := mustAccept(t, l)
					had := 0
					if window == 0 {
						had = g.fill(pattern(full))
						if had != full || g.room() != 0 {
							t.Fatalf("%d bytes fill a buffer of %d, room %d", had, full, g.room())
						}
					}
					synctest.Wait()
					g.drop()
					off := uint32(from)
					in := func(x uint32) bool { return x < window } // above RCV.NXT
					acceptable := window > 0 && (in(off) || n > 0 && in(off+n-1)) || window == 0 && n == 0 && off == 0
					g.must(g.raw(".", g.nxt+off, g.rcv, nil, bytes.Repeat([]byte{'x'}, int(n))))
					synctest.Wait()
					q := g.drop()
					name := fmt.Sprintf("window %d, %d bytes, edge %d (%+d)", window, n, i, from)
					news := 0 // bytes that are in order
					if acceptable && int32(off) <= 0 {
						news = int(n) + int(int32(off))
					}
					switch {
					case !acceptable || n > 0 && off != 0:
						// An ACK at once: of nothing, of something out of order, or of a part.
						if len(q) != 1 || g.seqOf(q[0]) != 1 || g.ackOf(q[0]) != g.nxt+uint32(max(news, 0)) {
							// What has old bytes in front may be acknowledged like any other.
							if !(len(q) == 0 && news > 0) {
								t.Errorf("%s: %d answers", name, len(q))
							}
						}
					case len(q) != 0:
						t.Errorf("%s: answered with %s", name, g.show(q[0]))
					}
					c.SetReadDeadline(time.Now().Add(time.Second))
					got, _ := io.ReadAll(c)
					if len(got) != had+max(news, 0) {
						t.Errorf("%s: %d bytes were delivered, want %d", name, len(got), had+max(news, 0))
					}
					synctest.Wait()
					g.drop()
					c.SetLinger(0)
					c.Close()
					g.expect("R.")
				}
			}
		}
	})
}

// permutations calls f with every order of 0 to n-1.
func permutations(n int, f func([]int)) {
	var rec func(done, left []int)
	rec = func(done, left []int) {
		if len(left) == 0 {
			f(done)
		}
		for i := range left {
			rec(append(slices.Clone(done), left[i]), slices.Delete(slices.Clone(left), i, i+1))
		}
	}
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	rec(nil, all)
}

func TestT052_Orders(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		n := 0
		permutations(5, func(order []int) {
			n++
			b := pattern(500)
			var held [6]bool
			for _, i := range order {
				g.must(g.raw("P.", g.nxt+uint32(100*i), g.rcv, nil, b[100*i:][:100]))
				held[i] = true
				synctest.Wait()
				edge := uint32(slices.Index(held[:], false) * 100)
				if q := g.drop(); len(q) > 0 && g.ackOf(q[len(q)-1]) != g.nxt+edge {
					t.Fatalf("%v: %s, want ack %d", order, g.show(q[len(q)-1]), g.nxt+edge)
				} else if len(q) == 0 && edge != uint32(100*i+100) {
					t.Fatalf("%v: %d out of order, and no answer", order, i)
				}
			}
			g.nxt += 500
			got := make([]byte, 500)
			if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, b) {
				t.Fatalf("%v: %v", order, err)
			}
			time.Sleep(50 * time.Millisecond)
			g.drop()
		})
		if n != 120 {
			t.Errorf("%d orders", n)
		}
	})
}

// TestT053_Overlaps lays a segment over what is held in every way. What came first
// stays, and the duplicate is reported.
func TestT053_Overlaps(t *testing.T) {
	edges := []uint32{100, 150, 199, 200, 201, 250, 299, 300, 301, 350, 400, 450, 500, 550, 600, 650, 700, 750}
	held := [][2]uint32{{200, 300}, {400, 500}, {600, 700}}
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		port := uint16(2000)
		for i, a := range edges {
			for _, b := range edges[i+1:] {
				port++
				g := m.open(port, to)
				g.opts = append(g.opts, optSACKOK()...)
				far := dial(g)
				want := make([]byte, 800)
				put := func(from, end uint32, c byte) segment {
					t.Helper()
					for k := from; k < end; k++ {
						if want[k] == 0 {
							want[k] = c
						}
					}
					g.drop()
					g.must(g.raw(".", from, g.rcv, nil, bytes.Repeat([]byte{c}, int(end-from))))
					synctest.Wait()
					q := g.drop()
					if from == 1 && end == 100 && len(q) == 0 {
						return segment{}
					}
					if len(q) != 1 {
						t.Fatalf("%d:%d over %v: %d answers", from, end, held, len(q))
					}
					return q[0]
				}
				put(1, 100, 'a')
				for k, h := range held {
					put(h[0], h[1], byte('b'+k))
				}
				seg := put(a, b, 'x')
				var dup [2]uint32
				for _, h := range held {
					if lo, hi := max(a, h[0]), min(b, h[1]); lo < hi {
						dup = [2]uint32{lo, hi}
						break
					}
				}
				switch blocks := g.sackBlocks(seg); {
				case dup != [2]uint32{} && (len(blocks) == 0 || blocks[0] != dup):
					t.Errorf("%d:%d: blocks %d, want %d first", a, b, blocks, dup)
				case dup == [2]uint32{} && a > 100 && (len(blocks) == 0 || blocks[0][0] > a || blocks[0][1] < b):
					t.Errorf("%d:%d: blocks %d, want one that holds it first", a, b, blocks)
				}
				if seg := put(1, 800, 'y'); g.ackOf(seg) != 800 {
					t.Errorf("%d:%d, then all: %s, want ack 800", a, b, g.show(seg))
				}
				got := make([]byte, 799)
				if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, want[1:]) {
					t.Errorf("%d:%d: read %q, %v; want %q", a, b, got, err, want[1:])
				}
				g.nxt = 800
				g.rst()
			}
		}
	})
}

// singleBytes sends n bytes of the stream one by one, at the offsets that at gives,
// and then all of it. It looks at the memory and the time that takes.
func singleBytes(t *testing.T, n int, at func(i int) uint32) {
	const window = 128 << 10
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{ReceiveBuffer: window})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		g.data("x") // its ACK tells the whole window
		expectText(t, c, "x")
		g.expectACK()
		time.Sleep(time.Second)
		base := g.nxt
		stream := pattern(window)
		frames := 0
		before := heapInUse()
		start := time.Now()
		worked := workTime()
		for i := range n {
			off := at(i)
			g.blind(g.segmentAt(".", base+off, g.rcv, stream[off:off+1]), &frames)
		}
		took := worked()
		if grown := heapInUse() - before; grown > 2*window {
			t.Errorf("%d bytes of memory for a window of %d", grown, window)
		}
		t.Logf("%v for each segment", took/time.Duration(n))
		if took > time.Duration(n)*100*time.Microsecond {
			t.Errorf("%d segments took %v", n, took)
		}
		if time.Since(start) != 0 {
			t.Errorf("%v passed", time.Since(start))
		}
		g.drop()
		done := make(chan bool)
		go func() {
			defer close(done)
			got := make([]byte, window-2)
			if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, stream[:window-2]) {
				t.Errorf("the stream differs: %d bytes, %v", n, err)
			}
		}()
		g.upload(stream[:window-2])
		<-done
	})
}

// heapInUse returns the bytes of memory that are in use.
func heapInUse() int64 {
	runtime.GC()
	runtime.GC() // empties the pools
	var st runtime.MemStats
	runtime.ReadMemStats(&st)
	return int64(st.HeapAlloc)
}

// workTime begins to measure what this process uses of the processors.
func workTime() func() time.Duration {
	start := processorTime()
	return func() time.Duration { return processorTime() - start }
}

func TestT063_SingleBytes(t *testing.T) {
	singleBytes(t, 65535, func(i int) uint32 { return uint32(2*i + 1) })
}

// closingStates lead a connection to each synchronized state but TIME-WAIT.
var closingStates = []struct {
	name string
	to   func(g *guest, far farEnd)
}{
	{"ESTABLISHED", func(*guest, farEnd) {}},
	{"FIN-WAIT-1", func(g *guest, far farEnd) { far.CloseWrite(); g.expect("F.") }},
	{"FIN-WAIT-2", func(g *guest, far farEnd) { far.CloseWrite(); g.expectFIN() }},
	{"CLOSE-WAIT", func(g *guest, far farEnd) { g.fin(); g.expectACK() }},
	{"CLOSING", func(g *guest, far farEnd) { far.CloseWrite(); g.expect("F."); g.fin(); g.expect(".") }},
	{"LAST-ACK", func(g *guest, far farEnd) { g.fin(); g.expectACK(); far.CloseWrite(); g.expect("F.") }},
}

func TestT068_SYNInEveryState(t *testing.T) {
	for _, state := range closingStates {
		t.Run(state.name, func(t *testing.T) {
			eachEnd(t, Config{ReceiveBuffer: 65535}, func(t *testing.T, g *guest, far farEnd) {
				state.to(g, far)
				for _, seq := range []uint32{g.nxt - 1, g.nxt, g.nxt + 65534, g.nxt + 65535} {
					time.Sleep(time.Second)
					synctest.Wait()
					g.drop()
					g.must(g.raw("S", seq, 0, g.opts, nil))
					synctest.Wait()
					g.mu.Lock()
					max := g.flow(g.id).max - g.irs
					g.mu.Unlock()
					q := g.drop()
					if len(q) != 1 || q[0].flags != flagA || g.ackOf(q[0]) != g.nxt || g.seqOf(q[0]) != max {
						t.Errorf("SYN at %d: %v, want one ACK %d of %d", seq, q, max, g.nxt)
					}
				}
				if n := g.s.Stats().TCPFlows; n != 1 {
					t.Errorf("%d flows", n)
				}
			})
		})
	}
}

// TestT072_RightEdge has the far end read as it likes; the checker of the machine
// sees to it that no window goes back.
func TestT072_RightEdge(t *testing.T) {
	for _, size := range []int{4096, 65535, 65536, 100_001, 1 << 20, 3<<20 + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			eachEnd(t, Config{ReceiveBuffer: size}, func(t *testing.T, g *guest, far farEnd) {
				up := pattern(1 << 20)
				done := make(chan bool)
				defer func() { <-done }()
				go func() {
					defer close(done)
					rng := rand.New(rand.NewPCG(uint64(size), 2))
					buf := make([]byte, 100_000)
					for {
						if _, err := far.Read(buf[:1+rng.IntN(1<<rng.IntN(17))]); err != nil {
							return
						}
						if rng.IntN(4) == 0 {
							time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
						}
					}
				}()
				rng := rand.New(rand.NewPCG(uint64(size), 1))
				for len(up) > 0 {
					n := min(1+rng.IntN(1<<rng.IntN(18)), len(up))
					if n > 2 && rng.IntN(4) == 0 && g.room() >= n { // the second byte first
						g.must(g.raw("P.", g.nxt+1, g.rcv, nil, up[1:2]))
					}
					g.upload(up[:n])
					up = up[n:]
				}
				g.rst()
			})
		})
	}
}

// TestT075_DayOfProbes answers every probe for a day.
func TestT075_DayOfProbes(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.win = 0
		g.ack()
		go far.Write(pattern(1000))
		answer := func(end time.Time) (probes int) {
			for time.Now().Before(end) {
				seg, ok := g.next(time.Until(end))
				if !ok {
					break
				}
				if seg.flags&flagR != 0 {
					t.Fatalf("%s after %d probes", g.show(seg), probes)
				}
				probes++
				g.ack()
			}
			return probes
		}
		if n := answer(time.Now().Add(24 * time.Hour)); n < 700 || n > 1500 {
			t.Errorf("%d probes in a day", n)
		}
		g.win = 65535
		g.ack()
		if !bytes.Equal(g.take(1000), pattern(1000)) {
			t.Error("data differs")
		}
		if _, ok := far.(*VirtualConn); !ok {
			return // the host's socket may be half closed: that is no orphan
		}
		g.win = 0
		g.ack()
		putText(t, far, "never taken")
		far.Close()
		start := time.Now()
		for {
			seg, ok := g.next(5 * time.Minute)
			if !ok {
				t.Fatal("an orphan lives on")
			}
			if seg.flags&flagR != 0 {
				break
			}
			g.ack()
		}
		if d := time.Since(start); d > 120*time.Second {
			t.Errorf("an orphan lived for %v", d)
		}
		g.expectFlows(0)
	})
}

// TestT076_SilenceAfterAnswers answers the probes of a closed window for ten minutes,
// and no more.
func TestT076_SilenceAfterAnswers(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.win = 0
		g.ack()
		go far.Write(pattern(1000))
		for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); {
			g.expectWithin(5*time.Minute, ".")
			g.ack()
		}
		start := time.Now()
		for {
			seg, ok := g.next(time.Hour)
			if !ok {
				t.Fatal("it is not given up")
			}
			if seg.flags&flagR != 0 {
				break
			}
		}
		if d := time.Since(start); d < 100*time.Second || d > 15*time.Minute {
			t.Errorf("given up after %v", d)
		}
	})
}

func TestT079_ByteByByte(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{ReceiveBuffer: 64 << 10})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		if n := g.fill(pattern(64 << 10)); n != 64<<10 {
			t.Fatalf("%d bytes fill the buffer", n)
		}
		g.drop()
		read := func(n int) int {
			for range n {
				if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			return len(g.drop())
		}
		if n := read(1000); n != 0 {
			t.Errorf("%d window updates for 1000 bytes", n)
		}
		if n := read(fam.mss - 1000); n != 1 {
			t.Errorf("%d window updates for a segment", n)
		}
		if n := read(100); n != 0 {
			t.Errorf("%d window updates for 100 bytes more", n)
		}
	})
}

// TestT080_BothStalled closes both windows, and opens one after the other.
func TestT080_BothStalled(t *testing.T) {
	eachEnd(t, Config{ReceiveBuffer: 64 << 10, SendBuffer: 64 << 10}, func(t *testing.T, g *guest, far farEnd) {
		g.win = 0
		g.ack()
		down := pattern(300_000)
		go far.Write(down)
		up := pattern(400_000)
		sent := g.fill(up)
		if sent == len(up) || g.room() != 0 {
			t.Fatalf("the window does not close: %d bytes sent", sent)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.drop()
		start := time.Now()
		got := make([]byte, sent)
		if _, err := io.ReadFull(far, got); err != nil || !bytes.Equal(got, up[:sent]) {
			t.Fatalf("upload: %v", err)
		}
		synctest.Wait()
		if g.room() <= 0 || time.Since(start) != 0 {
			t.Fatalf("the window has not opened by itself: room %d after %v", g.room(), time.Since(start))
		}
		g.drop()
		g.win = 65535
		g.ack()
		if !bytes.Equal(g.takeLossy(len(down)), down) {
			t.Error("download differs")
		}
	})
}

// TestT081_ByteByByte opens a window by a byte every 10 ms.
func TestT081_ByteByByte(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.opts = optMSS(1440)
		g.win = 2880
		far := dial(g)
		go far.Write(pattern(14400))
		g.take(2880)
		synctest.Wait()
		for _, seg := range g.drop() {
			g.rcv += uint32(len(seg.payload))
		}
		g.win = 0
		g.ack()
		start := time.Now()
		var last time.Time
		edge := uint32(0)
		taken := uint32(0)
		for time.Since(start) < 3*time.Second {
			edge++
			g.win = uint16(edge - taken)
			g.ack()
			time.Sleep(10 * time.Millisecond)
			synctest.Wait()
			for _, seg := range g.drop() {
				n := uint32(len(seg.payload))
				if n == 0 {
					continue
				}
				if since := seg.at.Sub(last); n < 8 || !last.IsZero() && since < 100*time.Millisecond || last.IsZero() && seg.at.Sub(start) > time.Second {
					t.Errorf("%d bytes after %v, %v behind the ones before", n, seg.at.Sub(start), since)
				}
				last = seg.at
				g.rcv += n
				taken += n
			}
		}
		if last.IsZero() {
			t.Error("nothing was sent")
		}
	})
}

// TestT118_AckDivision acknowledges a segment byte by byte.
func TestT118_AckDivision(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		const mss = 1460 - 20 // that of IPv6
		g := m.open(1025, to)
		g.opts = append(optMSS(mss), optScale(7)...)
		far := dial(g)
		go far.Write(pattern(200_000))
		synctest.Wait()
		sent := func() (n uint32) {
			synctest.Wait()
			for _, seg := range g.drop() {
				n += uint32(len(seg.payload))
			}
			return n
		}
		first := sent()
		if first < 9*mss || first > 10*mss {
			t.Fatalf("%d bytes at first", first)
		}
		for range mss {
			g.rcv++
			g.ack()
		}
		if n := sent(); first-mss+n > 11*mss {
			t.Errorf("%d bytes for %d ACKs of a byte", n, mss)
		}
	})
}

// TestT121_Offsets compares the timestamps of flows that begin at the same time.
func TestT121_Offsets(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{Backlog: -1, MaxHalfOpen: -1})
		mustListen(t, m.s, "tcp", fam.at(80).String())
		const n = 4096
		var buckets [16]int
		seen := make(map[uint32]bool)
		var before uint32
		near := 0
		for i := range uint16(n) {
			g := m.open(2000+i, fam.at(80))
			g.opts = append(optMSS(1460), optStamps(1, 0)...)
			g.syn()
			v, ok := g.expect("S.").option(8)
			if !ok {
				t.Fatal("no timestamp")
			}
			val := binary.BigEndian.Uint32(v)
			seen[val] = true
			buckets[val>>28]++
			if d := val - before; d < 1<<16 || -d < 1<<16 {
				near++
			}
			before = val
		}
		chi := 0.0
		for _, k := range buckets {
			d := float64(k) - n/16
			chi += d * d / (n / 16)
		}
		if len(seen) < n-2 || near > 5 || chi > 60 { // 15 degrees of freedom
			t.Errorf("%d of %d different, %d near the one before, chi square %.0f", len(seen), n, near, chi)
		}
	})
}

// TestT131_HalfClosedBulk moves 10 MiB over a connection whose other direction has
// ended.
func TestT131_HalfClosedBulk(t *testing.T) {
	data := pattern(10 << 20)
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.wrapStack()
		g.connect()
		far := h.accept()
		g.fin()
		expectEOF(t, far)
		far.expectState(t, "half")
		go func() {
			far.Write(data)
			far.Close()
		}()
		if !bytes.Equal(g.take(len(data)), data) {
			t.Error("download differs")
		}
		g.expectFIN()
		m.expectFlows(0)

		g = m.open(1026, fam.at(80))
		g.connect()
		far = h.accept()
		far.CloseWrite()
		g.expectFIN()
		done := make(chan bool)
		go func() {
			defer close(done)
			if got, err := io.ReadAll(far); err != nil || !bytes.Equal(got, data) {
				t.Errorf("upload: %d bytes, %v", len(got), err)
			}
		}()
		g.upload(data)
		g.fin()
		<-done
		g.expectACK()
		m.expectFlows(0)
	})
}

// TestT142_Handshakes closes what is on the way to a connection.
func TestT142_Handshakes(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)
		for i := range uint16(soak(3, 100)) {
			var waiting sync.WaitGroup
			l := mustListen(t, m.s, "tcp", fam.at(80).String())
			accept := func() { waiting.Go(func() { l.Accept() }) }
			accept() // LISTEN
			g := m.open(2000+i, fam.at(80))
			g.syn() // SYN-RECEIVED
			g.expect("S.")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			d := startDial(ctx, m.s, "tcp", at.String()) // SYN-SENT
			dialed, _ := m.toGuest(at)
			simultaneous := startDial(ctx, m.s, "tcp", at.String()) // SYN-RECEIVED of a dial
			crossing, _ := m.toGuest(at)
			crossing.must(crossing.raw("S", 0, 0, g.opts, nil))
			crossing.expect("S.")
			h.setDial(hang)
			pending := m.open(3000+i, fam.at(81)) // the host is being dialed
			pending.syn()
			synctest.Wait()
			for range 3 {
				waiting.Go(func() { l.Close() })
				waiting.Go(cancel)
			}
			pending.must(pending.raw("R", 1, 0, nil, nil))
			waiting.Wait()
			for _, r := range []dialing{<-d, <-simultaneous} {
				if !errors.Is(r.err, context.Canceled) {
					t.Errorf("dial: %v", r.err)
				}
			}
			if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Accept: %v", err)
			}
			m.expectFlows(0)
			m.mu.Lock()
			delete(m.flows, dialed.id)
			delete(m.flows, crossing.id)
			m.mu.Unlock()
		}
	})
}

// TestT152_FlowIsolation has two flows that are stuck, and a hundred others.
func TestT152_FlowIsolation(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		start := time.Now()
		full := m.open(1025, fam.at(80)) // the host's socket is full
		full.connect()
		h.accept()
		slow := m.open(1026, fam.at(80)) // the guest takes nothing
		slow.win = 0
		slow.connect()
		go h.accept().Write(pattern(4 << 20))
		for i := 0; full.room() > 0; i++ {
			full.say("P.", make([]byte, min(full.room(), 1000))...)
			synctest.Wait()
			if i > 5000 {
				t.Fatal("the window does not close")
			}
		}
		for i := range uint16(100) {
			g := m.open(2000+i, fam.at(80))
			g.connect()
			far := h.accept()
			for range 10 {
				g.data("ping")
				expectText(t, far, "ping")
				putText(t, far, "pong")
				g.expectText("pong")
			}
			full.must(full.raw(".", full.nxt, full.rcv, nil, []byte("x"))) // beyond the window
			slow.ack()
		}
		if d := time.Since(start); d != 0 {
			t.Errorf("the others took %v", d)
		}
	})
}
