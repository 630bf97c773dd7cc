package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// Config.VirtioNetHeader. The machine reads the header of every frame, and cuts and
// completes the packet as a kernel would; what comes out of that must be as always.
// The tests of eachRig all run so, too.

func virtio(cfg Config) Config {
	cfg.VirtioNetHeader = true
	return cfg
}

// TestVirtioSizes: data leaves in packets of many segments, of what the guest takes
// and the MTU has room for, and none is longer than IP allows.
func TestVirtioSizes(t *testing.T) {
	for _, test := range []struct {
		mtu, mss int // mss 0: what the MTU has room for
		stamps   bool
	}{{mtu: 1500}, {mtu: 1500, stamps: true}, {mtu: 1280}, {mtu: 9000, stamps: true}, {mtu: 40000}, {mtu: 65535}, {mtu: 1500, mss: 48}, {mtu: 1500, mss: 1}, {mtu: 9000, mss: 1000}} {
		t.Run(fmt.Sprint(test), func(t *testing.T) {
			inBubble(t, func(t *testing.T, fam family) {
				m, h := newRig(t, virtio(Config{MTU: test.mtu}))
				h.buffer = 1 << 20
				longest := 0
				m.setHook(func(frame []byte) error {
					longest = max(longest, len(frame)-12-14)
					return nil
				})
				g := m.open(1025, fam.at(80))
				if test.mss > 0 {
					g.opts = append(optMSS(test.mss), optScale(7)...)
				}
				if g.stamp = test.stamps; g.stamp {
					g.opts = append(g.opts, optStamps(1, 0)...)
				}
				g.connect()
				far := h.accept()
				data := pattern(600_000)
				go func() {
					far.Write(data)
					far.CloseWrite()
				}()
				if got := g.gulp(len(data)); !bytes.Equal(got, data) {
					t.Error("other data")
				}
				g.expectFIN()
				headers := map[int]int{4: 40, 6: 60}[fam.version]
				size := test.mtu - headers
				if test.mss > 0 {
					size = max(test.mss, 48)
				}
				if test.stamps {
					headers, size = headers+12, size-12
				}
				most := max(1, (65535-headers-40)/size) // segments in a packet
				if want := headers + most*size; longest < want || longest > 65535 {
					t.Errorf("%d packets of several segments, the longest packet of %d bytes, want %d", m.supers, longest, want)
				}
				m.s.Close()
			})
		})
	}
}

// gulp waits for n bytes, and acknowledges all that there is at a time at once.
func (g *guest) gulp(n int) []byte {
	g.t.Helper()
	var data []byte
	for len(data) < n {
		synctest.Wait()
		before := len(data)
		for _, seg := range g.drop() {
			if g.seqOf(seg) != g.rcv {
				g.t.Fatalf("at %d comes %s", g.rcv, g.show(seg))
			}
			data = append(data, seg.payload...)
			g.rcv += uint32(len(seg.payload))
		}
		if len(data) == before {
			time.Sleep(time.Second)
		}
		g.ack()
	}
	return data
}

// TestVirtioHeader looks at the bytes of the headers.
func TestVirtioHeader(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, virtio(Config{}))
		var frames [][]byte
		m.setHook(func(frame []byte) error {
			frames = append(frames, bytes.Clone(frame[:12]))
			return nil
		})
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			m.mu.Lock()
			defer m.mu.Unlock()
			got := frames
			frames = nil
			if len(got) != len(want) {
				t.Fatalf("%d frames, want %d", len(got), len(want))
			}
			for i := range got {
				if s := fmt.Sprintf("% x", got[i]); s != want[i] {
					t.Errorf("frame %d: %s, want %s", i, s, want[i])
				}
			}
		}
		const complete = "00 00 00 00 00 00 00 00 00 00 01 00"
		start, gso, size := "22 00", "01", "b4 05"
		headers := "36 00" // of Ethernet, IP and TCP
		if fam.version == 6 {
			start, gso, size, headers = "36 00", "04", "a0 05", "4a 00"
		}
		unfinished := "01 00 00 00 00 00 " + start + " 10 00 01 00"
		several := "01 " + gso + " " + headers + " " + size + " " + start + " 10 00 01 00"

		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		far := mustAccept(t, l) // whose Write is one packet: a relay may read in two parts
		expect(unfinished)      // the SYN-ACK
		far.Write(pattern(100))
		g.take(100)
		expect(unfinished)
		far.Write(pattern(2 * fam.mss))
		g.take(2 * fam.mss)
		expect(several)
		far.Write(pattern(2*fam.mss + 1))
		g.take(2*fam.mss + 1)
		expect(several)
		far.Write(pattern(fam.mss))
		g.take(fam.mss)
		expect(unfinished)

		stray := segment{src: netip.AddrPortFrom(fam.guest, 9), dst: fam.at(9), flags: flagA, win: 1}
		m.mustSend(stray.packet())
		expect(complete)
		m.mustSend(echoRequest(fam.version, 5000))
		expect(complete, complete, complete, complete) // fragments
		m.s.Close()
	})
}

// TestVirtioDatagrams: what is no segment of TCP is complete, and whole or in
// fragments of the MTU.
func TestVirtioDatagrams(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, virtio(Config{}))
		conn, err := m.s.DialContext(context.Background(), "udp", netip.AddrPortFrom(fam.guest, 7).String())
		if !errors.Is(err, ErrNoRoute) {
			t.Fatal(conn, err)
		}
		if err := m.s.AddRoute(0, netip.PrefixFrom(fam.guest, fam.guest.BitLen()), m.mac, m.gw, m.write); err != nil {
			t.Fatal(err)
		}
		conn, err = m.s.DialContext(context.Background(), "udp", netip.AddrPortFrom(fam.guest, 7).String())
		if err != nil {
			t.Fatal(err)
		}
		fragments := 0
		m.setHook(func(frame []byte) error {
			if len(frame) > 12+14+1500 {
				t.Errorf("frame of %d bytes", len(frame))
			}
			fragments++
			return nil
		})
		conn.Write(pattern(1000))
		synctest.Wait()
		m.mu.Lock()
		if len(m.udp) != 1 || !bytes.Equal(m.udp[0].payload, pattern(1000)) || fragments != 1 {
			t.Errorf("%d datagrams in %d frames", len(m.udp), fragments)
		}
		m.mu.Unlock()
		conn.Write(pattern(5000))
		synctest.Wait()
		if fragments != 1+4 {
			t.Errorf("%d fragments", fragments-1)
		}
		m.s.Close()
	})
}

// TestVirtioDialContext: connections to a guest are of the same kind.
func TestVirtioDialContext(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, virtio(Config{}))
		to := netip.AddrPortFrom(fam.guest, 7)
		if err := m.s.AddRoute(0, netip.PrefixFrom(fam.guest, fam.guest.BitLen()), m.mac, m.gw, m.write); err != nil {
			t.Fatal(err)
		}
		type dialed struct {
			conn *VirtualConn
			err  error
		}
		done := make(chan dialed, 1)
		go func() {
			c, err := m.s.DialContext(context.Background(), "tcp", to.String())
			if err != nil {
				done <- dialed{nil, err}
				return
			}
			done <- dialed{c.(*VirtualConn), nil}
		}()
		synctest.Wait()
		g := m.answerSYN(t, to)
		d := <-done
		if d.err != nil {
			t.Fatal(d.err)
		}
		data := pattern(100_000)
		go d.conn.Write(data)
		if got := g.take(len(data)); !bytes.Equal(got, data) {
			t.Error("other data")
		}
		if m.supers == 0 {
			t.Error("no packet of several segments")
		}
		m.s.Close()
	})
}

// answerSYN is the guest's end of a connection that the Stack begins.
func (m *machine) answerSYN(t *testing.T, at netip.AddrPort) *guest {
	t.Helper()
	m.mu.Lock()
	var host netip.AddrPort
	for id, f := range m.flows {
		if id.guest == at && len(f.queue) > 0 {
			host = id.host
		}
	}
	m.mu.Unlock()
	g := m.openFrom(at, host)
	syn := g.expect("S")
	g.irs, g.rcv = syn.seq, 1
	g.must(g.raw("S.", 0, 1, g.opts, nil))
	g.nxt = 1
	g.expect(".")
	return g
}

// TestVirtioBatch: a batch of packets is answered in one call, with data for each
// flow that was waiting for its ACK.
func TestVirtioBatch(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, virtio(Config{}))
		h.buffer = 1 << 20
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		go far.Write(pattern(400_000))
		synctest.Wait()
		got := 0
		for range 100 {
			q := g.drop()
			if len(q) == 0 {
				break
			}
			var packets [][]byte
			for _, seg := range q { // an ACK for each segment, as a slow machine sends them
				if g.seqOf(seg) == g.rcv {
					g.rcv += uint32(len(seg.payload))
					got += len(seg.payload)
				}
				ack := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: flagA, win: 65535}
				m.mu.Lock()
				g.flow(g.id).offered(&ack)
				m.mu.Unlock()
				packets = append(packets, ack.packet())
			}
			err := m.s.HandlePackets(0, m.mac, m.gw, packets, func(frames [][]byte) error {
				for _, f := range frames {
					if err := m.write(f); err != nil {
						return err
					}
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if got != 400_000 || m.supers == 0 {
			t.Errorf("%d bytes, %d packets of several segments", got, m.supers)
		}
		m.s.Close()
	})
}

// TestVirtioLoss: packets of several segments are lost whole, and in parts, and all
// data arrives.
func TestVirtioLoss(t *testing.T) {
	eachEnd(t, virtio(Config{}), func(t *testing.T, g *guest, far farEnd) {
		toWriter, toGuest := rand.New(rand.NewPCG(1, 1)), rand.New(rand.NewPCG(1, 2))
		g.setHook(func([]byte) error {
			if toWriter.IntN(10) == 0 {
				return errDatagramTooLong
			}
			return nil
		})
		data := pattern(500_000)
		go far.Write(data)
		held := make(map[uint32][]byte) // what came out of order
		var got []byte
		for len(got) < len(data) {
			// While all that is acknowledged was sent again, nothing is timed and the RTO
			// stays backed off (RFC 6298 section 5).
			seg, ok := g.next(10 * time.Minute)
			if !ok {
				t.Fatalf("%d bytes, then nothing", len(got))
			}
			if len(seg.payload) == 0 {
				continue
			}
			if toGuest.IntN(50) > 0 { // else the guest's card loses it
				held[g.seqOf(seg)] = seg.payload
			}
			for p := held[g.rcv]; p != nil; p = held[g.rcv] {
				delete(held, g.rcv)
				got = append(got, p...)
				g.rcv += uint32(len(p))
			}
			g.raw(".", g.nxt, g.rcv, nil, nil) // the Writer's error may come back
		}
		if !bytes.Equal(got, data) {
			t.Error("other data")
		}
	})
}

// TestVirtioPathMTU: a part of the guest's network that takes less has its say about
// packets of several segments too, by quoting one of them.
func TestVirtioPathMTU(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, virtio(Config{}))
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		go far.Write(pattern(300_000))
		synctest.Wait()
		q := g.drop()
		third := q[2]
		third.src, third.dst = g.id.host, g.id.guest
		m.mustSend(tooBig(fam, fam.other, 1300, third.packet()))
		synctest.Wait()
		again := g.drop()
		headers := 40
		if fam.version == 6 {
			headers = 60
		}
		if len(again) < 10 || len(again[0].payload) != 1300-headers || g.seqOf(again[0]) != 1 {
			t.Errorf("%d segments are sent again, of %d bytes", len(again), len(again[0].payload))
		}
		m.supers = 0
		for _, seg := range again {
			if g.seqOf(seg) == g.rcv {
				g.rcv += uint32(len(seg.payload))
				g.ack()
			}
		}
		g.drop()
		g.ack()
		synctest.Wait()
		if m.supers == 0 {
			t.Error("no packet of several segments after that")
		}
		m.s.Close()
	})
}

// TestVirtioFromGuest: packets longer than the MTU and with a checksum that is not
// finished are taken as they come.
func TestVirtioFromGuest(t *testing.T) {
	for _, on := range []bool{false, true} {
		inBubble(t, func(t *testing.T, fam family) {
			m, h := newRig(t, Config{VirtioNetHeader: on})
			h.buffer = 1 << 20
			g := m.open(1025, fam.at(80))
			g.connect()
			far := h.accept()
			headers := 40
			if fam.version == 6 {
				headers = 60
			}
			data := pattern(10 * (65535 - headers))
			for i := range 10 {
				seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: flagA, win: 65535,
					payload: data[i*(65535-headers):][:65535-headers]}
				m.mu.Lock()
				g.flow(g.id).offered(&seg)
				m.mu.Unlock()
				p := seg.packet()
				tcp := p[headers-20:]
				binary.BigEndian.PutUint16(tcp[16:], refSum(refPseudo(fam.guest, fam.server, 6, len(tcp))))
				m.mustSend(p)
				g.nxt += uint32(len(seg.payload))
				if g.expectACK(); len(g.drop()) != 0 {
					t.Error("more than one answer")
				}
			}
			got := make([]byte, len(data))
			for n := 0; n < len(got); {
				k, err := far.Read(got[n:])
				if n += k; err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, data) {
				t.Error("other data")
			}
			m.s.Close()
		})
	}
}

// FuzzVirtio has a guest that acknowledges in any way, and any window: the stream is
// the one of a Stack that sends one segment at a time.
func FuzzVirtio(f *testing.F) {
	for seed := range uint64(10) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		b := make([]byte, 300)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		inBubble(t, func(t *testing.T, fam family) {
			m, h := newRig(t, virtio(Config{ReuseFrames: len(b)%2 == 0}))
			g := m.open(1025, fam.at(80))
			g.connect()
			far := h.accept()
			data := pattern(200_000)
			go func() {
				far.Write(data)
				far.CloseWrite()
			}()
			next := func() byte {
				if len(b) == 0 {
					return 255
				}
				c := b[0]
				b = b[1:]
				return c
			}
			for len(b) > 0 {
				synctest.Wait()
				m.mu.Lock()
				f := g.flow(g.id)
				sent := uint32(len(f.stream))
				f.queue = nil
				m.mu.Unlock()
				g.win = uint16(next()) << 3 // of the window scale of open
				rcv := 1 + (sent * uint32(next()) / 255)
				g.rcv = max(g.rcv, rcv)
				g.raw(".", g.nxt, g.rcv, nil, nil)
				time.Sleep(time.Duration(next()) * time.Millisecond)
			}
			g.win = 65535
			for range 2000 {
				m.mu.Lock()
				f := g.flow(g.id)
				sent, end := len(f.stream), f.finSent
				f.queue = nil
				m.mu.Unlock()
				g.rcv = uint32(1 + sent)
				g.raw(".", g.nxt, g.rcv, nil, nil)
				if end && sent == len(data) {
					break
				}
				time.Sleep(time.Second)
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			if got := g.flow(g.id).stream; !bytes.Equal(got, data) {
				t.Errorf("%d bytes, want %d", len(got), len(data))
			}
		})
	})
}

func TestVirtioAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector allocates")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		f := newSteadyFlow(t, fam, fam.mss, virtio(Config{}))
		data, ack := make([]byte, 10*fam.mss), f.g.irs+1
		write := func() {
			if _, err := f.conn.Write(data); err != nil {
				t.Fatal(err)
			}
			ack += uint32(len(data))
			putUint32(f.ack[f.off+8:], ack)
			f.give(t, f.ack)
		}
		for range 100 {
			write()
		}
		if n := leastAllocs(1000, 0, write); n > 0 {
			t.Errorf("%v allocations for a write of %d bytes and its ACK", n, len(data))
		}
		const runs = 1000
		f.frames = 0
		for range runs {
			write()
		}
		if f.frames > 2*runs {
			t.Errorf("%d frames for %d writes", f.frames, runs)
		}
	})
}

// TestVirtioFrameMemory: a frame that the Writer keeps does not cost much more than
// its length.
func TestVirtioFrameMemory(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector makes frames share less memory")
	}
	fam := families[0]
	m, _ := newRig(t, virtio(Config{}))
	l := mustListen(t, m.s, "tcp", fam.at(80).String())
	g := m.open(1025, fam.at(80))
	g.connect()
	mustAccept(t, l)
	early := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + 100, ack: g.irs + 1, flags: flagA, win: 65535, payload: []byte("x")}.packet()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 1000
	for range n { // each is acknowledged at once
		if err := m.s.HandlePacket(0, m.mac, m.gw, early, func(frame []byte) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if perFrame := (after.TotalAlloc - before.TotalAlloc) / n; perFrame > 1024 {
		t.Errorf("a small frame costs %d bytes of memory", perFrame)
	}
}
