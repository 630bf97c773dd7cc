package slirp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// tooBig is the message of a router that a packet of the stack was too long.
func tooBig(fam family, from netip.Addr, mtu int, packet []byte) []byte {
	b := []byte{3, 4, 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}
	if fam.version == 6 {
		b[0], b[1] = 2, 0
	}
	return refPacket(from, fam.stack, icmpProto(uint16(fam.version)), append(b, packet[:min(len(packet), 80)]...), 2)
}

// segments is what the guest got, as packets that the stack has sent.
func (g *guest) segments() (packets [][]byte) {
	synctest.Wait()
	for _, seg := range g.drop() {
		packets = append(packets, seg.packet())
	}
	return packets
}

func longest(packets [][]byte) (n int) {
	for _, p := range packets {
		n = max(n, len(p))
	}
	return n
}

// pathSizes are those of messages, and what they make of packets of 1500 bytes.
var pathSizes = map[int][][2]int{
	4: {{0, 1492}, {1, 1500}, {67, 1500}, {68, 552}, {551, 552}, {552, 552}, {576, 576}, {1400, 1400}, {1499, 1499}, {1500, 1500}, {9000, 1500}},
	6: {{0, 1500}, {68, 1500}, {1279, 1500}, {1280, 1280}, {1400, 1400}, {1499, 1499}, {1500, 1500}, {9000, 1500}},
}

// A segment that does not get through is sent again at once, as short as it has
// to be.
func TestT148_N48_PacketTooBigTCP(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		router := fam.other
		for i, size := range pathSizes[fam.version] {
			m, h := newRig(t, Config{})
			g := m.open(uint16(1025+i), fam.at(80))
			g.connect()
			far := h.accept()
			data := pattern(20000)
			far.Write(data)
			sent := g.segments()
			if longest(sent) != 1500 {
				t.Fatalf("packets of %d bytes", longest(sent))
			}
			start := time.Now()
			m.mustSend(tooBig(fam, router, size[0], sent[0]))
			again := g.segments()
			if size[1] == 1500 {
				if len(again) != 0 {
					t.Errorf("MTU %d: sends again", size[0])
				}
				m.mustSend(tooBig(fam, router, 1400, sent[0]))
				again = g.segments()
			} else if longest(again) != size[1] {
				t.Errorf("MTU %d: packets of %d bytes, want %d", size[0], longest(again), size[1])
			}
			if len(again) < 10 || time.Since(start) != 0 {
				t.Errorf("MTU %d: %d segments after %v", size[0], len(again), time.Since(start))
			}
			m.s.Close()
		}
	})
}

// All of the data arrives, in packets that a way of 1300 bytes takes, if its router
// says so.
func TestT148_TransferOverSmallerPath(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		var told atomic.Int32
		m.setHook(func(frame []byte) error {
			if len(frame) > 14+1300 {
				told.Add(1)
				packet := slices.Clone(frame[14:])
				go m.send(tooBig(fam, fam.other, 1300, packet))
				return errDatagramTooLong
			}
			return nil
		})
		far := h.accept()
		data := pattern(300000)
		go far.Write(data)
		var got []byte
		for len(got) < len(data) {
			seg, ok := g.next(patience)
			if !ok {
				t.Fatalf("%d bytes, then nothing", len(got))
			}
			if g.seqOf(seg) == g.rcv { // the rest comes again
				got = append(got, seg.payload...)
				g.rcv += uint32(len(seg.payload))
			}
			g.raw(".", g.nxt, g.rcv, nil, nil) // the Writer's error may come back
		}
		if !slices.Equal(got, data) {
			t.Error("other data")
		}
		if st := m.s.Stats(); st.PathMTUs != 1 || told.Load() == 0 || told.Load() > 11 {
			t.Errorf("%d messages, %+v", told.Load(), st)
		}
		m.s.Close()
	})
}

// What one connection has learned holds for those that follow, which do not try again
// for 10 minutes. What the guest may send is another matter: the way to the stack may be
// another.
func TestT148_PathOfNextConnection(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(8080).String())
		first := m.open(1025, fam.at(80))
		first.connect()
		h.accept().Write(pattern(20000))
		m.mustSend(tooBig(fam, fam.other, 1300, first.segments()[0]))
		if n := longest(first.segments()); n != 1300 {
			t.Fatalf("packets of %d bytes", n)
		}

		// next returns how long the packets are of a connection that begins now.
		next := func(port uint16, to netip.AddrPort, accept func() net.Conn) int {
			g := m.open(port, to)
			g.syn()
			seg := g.expect("S.")
			if mss, ok := seg.option(2); !ok || int(binary.BigEndian.Uint16(mss)) != transportMSS(uint16(fam.version), 1500) {
				t.Errorf("the guest may send segments of %x", mss)
			}
			g.ack()
			accept().Write(pattern(5000))
			return longest(g.segments())
		}
		host := func() net.Conn { return h.accept() }
		virtual := func() net.Conn { return mustAccept(t, l) }
		if a, b := next(1026, fam.at(80), host), next(1027, fam.at(8080), virtual); a != 1300 || b != 1300 {
			t.Errorf("packets of %d and %d bytes, want 1300", a, b)
		}
		time.Sleep(pathLife)
		if a, b := next(1028, fam.at(80), host), next(1029, fam.at(8080), virtual); a != 1500 || b != 1500 {
			t.Errorf("10 minutes later packets of %d and %d bytes, want 1500", a, b)
		}
		m.s.Close()
	})
}

// What a guest can have the stack send by such messages is bounded.
func TestT148_ManyPacketsTooBig(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		far.Write(pattern(14000))
		sent := g.segments()
		m.mu.Lock()
		before := m.frames
		m.mu.Unlock()
		for i := range 10000 {
			m.mustSend(tooBig(fam, fam.other, 1499-i%2000, sent[0]))
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if n := m.frames - before; n > (maxShortened+1)*14000/500 {
			t.Errorf("%d frames", n)
		}
		if st := m.s.Stats(); st.PathMTUs > maxShortened+1 {
			t.Errorf("%d of them taken", st.PathMTUs)
		}
	})
}

// A message counts only if it is about something that was sent.
func TestT148_PacketTooBigIgnored(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		h.accept().Write(pattern(5000))
		sent := g.segments()
		hl := map[int]int{4: 20, 6: 40}[fam.version]
		quote := func(change func(q []byte)) []byte {
			q := slices.Clone(sent[0])
			change(q)
			return tooBig(fam, fam.other, 1400, q)
		}
		good := quote(func([]byte) {})
		bad := slices.Clone(good)
		bad[len(bad)-1] ^= 1
		for name, packet := range map[string][]byte{
			"checksum":       bad,
			"old sequence":   quote(func(q []byte) { binary.BigEndian.PutUint32(q[hl+4:], binary.BigEndian.Uint32(q[hl+4:])-1) }),
			"later sequence": quote(func(q []byte) { binary.BigEndian.PutUint32(q[hl+4:], binary.BigEndian.Uint32(q[hl+4:])+5000) }),
			"another port":   quote(func(q []byte) { q[hl+1]++ }),
			"guest's packet": quote(func(q []byte) { copy(q[hl:], []byte{q[hl+2], q[hl+3], q[hl], q[hl+1]}) }),
			"UDP":            quote(func(q []byte) { q[map[int]int{4: 9, 6: 6}[fam.version]] = 17 }),
			"cut":            refPacket(fam.other, fam.stack, icmpProto(uint16(fam.version)), good[hl:hl+8+hl+7], 2),
			"no quote":       refPacket(fam.other, fam.stack, icmpProto(uint16(fam.version)), good[hl:hl+8], 2),
		} {
			m.mustSend(packet)
			if again := g.segments(); len(again) != 0 {
				t.Errorf("%s: sends again", name)
			}
		}
		m.ns = 7
		m.mustSend(good)
		m.ns = 0
		if again := g.segments(); len(again) != 0 {
			t.Error("of another namespace: sends again")
		}
		m.mustSend(good)
		if again := g.segments(); longest(again) != 1400 {
			t.Error("the good one is ignored")
		}
		m.s.Close()
	})
}

// Datagrams to a guest behind a smaller MTU are fragmented to fit it, for ten
// minutes.
func TestN48_PacketTooBigUDP(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		for _, size := range pathSizes[fam.version] {
			g, h := newUDPRig(t, fam, Config{UDPIdleTimeout: -1})
			g.say("hello")
			host := h.accept()
			data := string(pattern(4000))
			largest := func() int {
				t.Helper()
				host.give(data)
				n := 0
				synctest.Wait()
				g.frameMu.Lock()
				for _, f := range g.arrived {
					n = max(n, len(f)-14)
				}
				g.mtu = n // of mustReassemble: all but the last are full
				g.frameMu.Unlock()
				if got := g.hearAt(g.from.Port()); got != data {
					t.Errorf("got %d bytes", len(got))
				}
				g.mtu = 1500
				return n
			}
			floor := func(n int) int { // fragments carry multiples of 8
				headers := map[int]int{4: 20, 6: 48}[fam.version]
				return headers + (n-headers)&^7
			}
			if n := largest(); n != floor(1500) {
				t.Fatalf("packets of %d bytes", n)
			}
			reply := udpPacket(g.to, g.from, pattern(1472-map[int]int{4: 0, 6: 20}[fam.version]))
			g.mustSend(tooBig(fam, fam.other, size[0], reply))
			if n := largest(); n != floor(size[1]) {
				t.Errorf("MTU %d: packets of %d bytes, want %d", size[0], n, floor(size[1]))
			}
			time.Sleep(10*time.Minute - 1)
			if n := largest(); n != floor(size[1]) {
				t.Errorf("MTU %d, in ten minutes: packets of %d bytes, want %d", size[0], n, floor(size[1]))
			}
			time.Sleep(1)
			if n := largest(); n != floor(1500) {
				t.Errorf("MTU %d, after ten minutes: packets of %d bytes", size[0], n)
			}
			if n := g.s.numPaths.Load(); n != 0 {
				t.Errorf("%d paths are remembered", n)
			}
			g.s.Close()
		}
	})
}

// Paths are remembered for a bounded number of guests, and only those with a flow.
func TestN48_PathsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, _ := newUDPRig(t, fam, Config{MaxUDPFlows: -1, MaxPendingDials: -1})
		about := func(guest netip.Addr) []byte {
			return tooBig(fam, fam.other, 1300, udpPacket(g.to, netip.AddrPortFrom(guest, 4000), pattern(1000)))
		}
		g.mustSend(about(fam.guest))
		if n := g.s.numPaths.Load(); n != 0 {
			t.Fatalf("%d paths without a flow", n)
		}
		guest := fam.guest
		for range 3 * maxPaths {
			guest = guest.Next()
			g.mustSend(udpPacket(netip.AddrPortFrom(guest, 4000), g.to, nil))
			g.mustSend(about(guest))
		}
		if n := g.s.numPaths.Load(); n != maxPaths || len(g.s.paths) != maxPaths {
			t.Errorf("%d paths", n)
		}
		g.s.Close()
	})
}

// A datagram that the host's network does not take: the guest learns what it takes.
func TestN12_N13_TooBigForTheHost(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{MTU: 9000})
		g.say("hello")
		host := h.accept()
		host.expect(t, "hello")
		send := func(size int, dontFragment bool) (packet []byte) {
			host.set(func() { host.errs = []error{dialError(syscall.EMSGSIZE)} })
			packet = udpPacket(g.from, g.to, pattern(size-map[int]int{4: 28, 6: 48}[fam.version]))
			if fam.version == 4 && dontFragment {
				packet[6], packet[10], packet[11] = 0x40, 0, 0
			}
			g.mustSend(packet)
			synctest.Wait()
			return packet
		}
		want := map[int][2]byte{4: {3, 4}, 6: {2, 0}}[fam.version]
		for size, mtu := range map[int]uint32{1600: 1492, 1492: 1280, 1281: 1280, 9000: 8166, 65000: 32000} {
			packet := send(size, true)
			msg := g.takeICMP()
			if [2]byte{msg.typ, msg.code} != want || msg.rest != mtu || msg.src != fam.stack || msg.dst != fam.guest {
				t.Errorf("%d bytes: ICMP %d %d from %v, MTU %d, want %d", size, msg.typ, msg.code, msg.src, msg.rest, mtu)
			}
			if !slices.Equal(msg.body, packet[:min(len(packet), maxQuote)]) {
				t.Errorf("%d bytes: about %x", size, msg.body)
			}
		}
		sent := 5
		if fam.version == 4 { // the host may fragment it
			send(1600, false)
			sent++
		} else { // nothing shorter can be asked for
			send(1280, false)
			sent++
		}
		g.expectNothing()
		g.expectStats(map[string]int{"big": sent, "flows": 1, "dialed": 1, "icmp": 5})
		g.say("goodbye")
		host.expect(t, "goodbye")
		g.s.Close()
	})
}

// One guest cannot use up the ICMP errors and resets of another.
func TestN43_S16_FairShares(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		s := New()
		defer s.Close()
		frames := map[uintptr]int{}
		send := func(ns uintptr, packet []byte) {
			t.Helper()
			err := s.HandlePacket(ns, testLink.guest, testLink.gw, slices.Clone(packet), func([]byte) error {
				frames[ns]++
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		from, to := netip.AddrPortFrom(fam.guest, 1025), fam.at(80)
		for name, packet := range map[string][]byte{
			"errors": withTTL(udpPacket(from, to, pattern(30)), 1),
			"resets": segment{src: from, dst: to, seq: 5, ack: 6, flags: flagA, win: 1000}.packet(),
		} {
			time.Sleep(time.Minute)
			clear(frames)
			for range 1000 { // one second
				for range 20 {
					send(1, packet)
				}
				time.Sleep(time.Millisecond)
			}
			if frames[1] < 1000 || frames[1] > 1000+icmpErrorBurst {
				t.Errorf("%d %s in a second", frames[1], name)
			}
			// The other one gets its own, while the first goes on.
			for range 100 { // in a second
				for range 200 {
					send(1, packet)
				}
				send(2, packet)
				time.Sleep(10 * time.Millisecond)
			}
			if frames[2] != 100 || frames[1] > 2000+2*icmpErrorBurst {
				t.Errorf("%d and %d %s", frames[1], frames[2], name)
			}
			// It has no more than that when it floods as well.
			clear(frames)
			for range 1000 {
				for range 20 {
					send(1, packet)
					send(2, packet)
				}
				time.Sleep(time.Millisecond)
			}
			if n := frames[1] + frames[2]; n < 1000 || n > 1000+2*(100+icmpErrorBurst) || frames[2] < 90 {
				t.Errorf("%d and %d %s", frames[1], frames[2], name)
			}
		}
		// Namespaces that are quiet are forgotten.
		for ns := range uintptr(10000) {
			send(ns, withTTL(udpPacket(from, to, nil), 1))
			time.Sleep(time.Millisecond)
		}
		if n := len(s.shares); n > 500 {
			t.Errorf("%d shares", n)
		}
	})
}

// What an ICMP error quotes is read with its options; checksums in it are not.
func TestN21_QuotedHeaders(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		hl := map[int]int{4: 20, 6: 40}[fam.version]
		insert := func(q, options []byte) []byte {
			q = slices.Concat(q[:hl], options, q[hl:])
			if fam.version == 4 {
				q[0] += byte(len(options) / 4)
			} else {
				q[6] = 60
			}
			return q
		}
		nop, lie := []byte{1, 1, 1, 0}, []byte{7, 40, 4, 0}
		if fam.version == 6 {
			nop, lie = []byte{6, 0, 1, 4, 0, 0, 0, 0}, []byte{6, 0, 1, 40, 0, 0, 0, 0}
		}
		for _, tt := range []struct {
			name   string
			change func(q []byte) []byte
			taken  bool
		}{
			{"as it was", func(q []byte) []byte { return q }, true},
			{"transport checksum", func(q []byte) []byte { q[hl+16] ^= 0xff; return q }, true},
			{"IP checksum, or flow label", func(q []byte) []byte { q[map[int]int{4: 10, 6: 3}[fam.version]] ^= 0xff; return q }, true},
			{"options", func(q []byte) []byte { return insert(q, nop) }, true},
			{"options that lie", func(q []byte) []byte { return insert(q, lie) }, false},
			{"IHL beyond it, or another version", func(q []byte) []byte {
				q[0] = map[int]byte{4: 0x4f, 6: 0x50}[fam.version]
				return q[:hl+16]
			}, false},
			{"another version", func(q []byte) []byte { q[0] ^= 0x20; return q }, false},
			{"second fragment", func(q []byte) []byte {
				if fam.version == 4 {
					q[7] = 1
					return q
				}
				q[6] = 44
				return slices.Concat(q[:40], []byte{6, 0, 0, 8, 0, 0, 0, 1}, q[40:])
			}, false},
			{"cut in the IP header", func(q []byte) []byte { return q[:hl-1] }, false},
			{"cut in the ports", func(q []byte) []byte { return q[:hl+3] }, false},
		} {
			m, h := newRig(t, Config{})
			g := m.open(1025, fam.at(80))
			g.connect()
			h.accept().Write(pattern(3000))
			sent := g.segments()
			m.mustSend(tooBig(fam, fam.other, 1300, tt.change(slices.Clone(sent[0][:hl+20]))))
			if again := g.segments(); (len(again) > 0) != tt.taken {
				t.Errorf("%s: taken %v", tt.name, len(again) > 0)
			}
			m.s.Close()
		}
	})
}
