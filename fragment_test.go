package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// fragmentsOf cuts a packet of ip4 or ip6 into fragments of size bytes of data.
func fragmentsOf(packet []byte, size int) (fs [][]byte) {
	hl := 20
	if packet[0]>>4 == 6 {
		hl = 40
	}
	data := packet[hl:]
	for off := 0; off < len(data); off += size {
		part := data[off:min(off+size, len(data))]
		fs = append(fs, fragmentOf(packet, hl, off, off+len(part) < len(data), part))
	}
	return fs
}

func fragmentOf(packet []byte, hl, off int, more bool, part []byte) []byte {
	be := binary.BigEndian
	if hl == 20 {
		b := ipBytes(packet[:20], part)
		be.PutUint16(b[2:], uint16(len(b)))
		be.PutUint16(b[4:], 0x1234)
		field := uint16(off / 8)
		if more {
			field |= 0x2000
		}
		be.PutUint16(b[6:], field)
		be.PutUint16(b[10:], 0)
		be.PutUint16(b[10:], ^refSum(b[:20]))
		return b
	}
	b := ipBytes(packet[:40], fragHeader(int(packet[6]), off, more), part)
	b[6] = 44
	be.PutUint16(b[4:], uint16(len(b)-40))
	return b
}

// eachOrder calls f with every order of the numbers below n.
func eachOrder(n int, f func(order []int)) {
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	var permute func(k int)
	permute = func(k int) {
		if k == n {
			f(order)
		}
		for i := k; i < n; i++ {
			order[k], order[i] = order[i], order[k]
			permute(k + 1)
			order[k], order[i] = order[i], order[k]
		}
	}
	permute(0)
}

func echoRequest(version, n int) []byte {
	body := make([]byte, n)
	for i := range body {
		body[i] = byte(i * 7 >> 3)
	}
	body[0], body[1], body[2], body[3] = 8, 0, 0, 0
	if version == 4 {
		return ip4(1, body)
	}
	body[0] = 128
	return ip6(58, body)
}

type fragmentRig struct {
	*testing.T
	s      *Stack
	frames [][]byte
}

func newFragmentRig(t *testing.T) *fragmentRig {
	return &fragmentRig{T: t, s: New()}
}

func (r *fragmentRig) send(packet []byte) {
	r.Helper()
	b := bytes.Clone(packet)
	err := r.s.HandlePacket(1, testLink.guest, testLink.gw, b, func(frame []byte) error {
		r.frames = append(r.frames, frame)
		return nil
	})
	if err != nil {
		r.Fatal(err)
	}
	for i := range b {
		b[i] = 0xdb
	}
}

// due returns when the timer of fragments fires.
func (r *fragmentRig) due() time.Time {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	return r.s.fragmentsDue
}

func TestN14_ReassembledEcho(t *testing.T) {
	for _, version := range []int{4, 6} {
		synctest.Test(t, func(t *testing.T) {
			r := newFragmentRig(t)
			request := echoRequest(version, 8192)
			fs := fragmentsOf(request, 1448)
			n := 0
			eachOrder(len(fs), func(order []int) {
				n++
				for _, i := range order {
					if len(r.frames) != 0 {
						t.Fatal("an answer to a part")
					}
					r.send(fs[i])
				}
				var reply []byte
				for _, f := range r.frames {
					var p ipPacket
					if parseIP(f[14:], &p) != nil || int(p.fragOffset) != len(reply) {
						t.Fatalf("a fragment at %d behind %d bytes", p.fragOffset, len(reply))
					}
					reply = append(reply, f[14+p.fragData:]...)
				}
				hl := len(request) - 8192
				if !bytes.Equal(reply[4:], request[hl+4:]) {
					t.Fatalf("another reply of %d bytes", len(reply))
				}
				r.frames = nil
			})
			st := r.s.Stats()
			if n != 720 || st.PacketsReassembled != 720 || st.EchoReplies != 720 || st.PendingFragments != 0 || st.DropFragment != 0 {
				t.Errorf("%d orders, %+v", n, st)
			}
			if !r.due().IsZero() {
				t.Error("a timer is set")
			}
			r.s.Close()
		})
	}
}

// A datagram in fragments, in whatever order, reaches the host once.
func TestN14_ReassembledUDP(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{})
		g.say("first")
		host := h.accept()
		host.expect(t, "first")
		data := pattern(8192 - 8)
		fs := fragmentsOf(udpPacket(g.from, g.to, data), 1400)
		eachOrder(len(fs), func(order []int) {
			for _, i := range order {
				g.mustSend(fs[i])
			}
			synctest.Wait()
			host.expect(t, string(data))
		})
		for _, twice := range [][]byte{fs[0], fs[3], fs[5]} { // duplicates
			g.mustSend(twice)
			g.mustSend(twice)
		}
		for _, i := range []int{1, 2, 4} {
			g.mustSend(fs[i])
		}
		synctest.Wait()
		host.expect(t, string(data))

		longest := pattern(map[int]int{4: 65507, 6: 65527}[fam.version])
		for _, f := range fragmentsOf(udpPacket(g.from, g.to, longest), 1448) {
			g.mustSend(f)
		}
		synctest.Wait()
		host.expect(t, string(longest))
		if st := g.s.Stats(); st.PacketsReassembled != 722 || st.FlowsDialed != 1 || st.PendingFragments != 0 || st.DropFragment != 3 {
			t.Errorf("%+v", st)
		}
		g.s.Close()
	})
}

// What a guest may not do it may not do in fragments: the whole packet is judged.
func TestN14_PolicyAfterReassembly(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		asked := 0
		g, _ := newUDPRig(t, fam, Config{Allow: func(context.Context, Flow) error { asked++; return ErrProhibited }})
		packet := udpPacket(g.from, g.to, pattern(3000))
		if fam.version == 4 {
			copy(packet[4:], []byte{0x12, 0x34}) // the identification of fragmentsOf
			packet[10], packet[11] = 0, 0
			binary.BigEndian.PutUint16(packet[10:], ^refSum(packet[:20]))
		}
		for i, f := range fragmentsOf(packet, 1400) {
			if synctest.Wait(); asked != 0 {
				t.Fatalf("asked after %d fragments", i)
			}
			g.mustSend(f)
		}
		g.expectUnreachable(unreachableProhibited, packet)
		if asked != 1 {
			t.Errorf("asked %d times", asked)
		}
		g.s.Close()
	})
}

// A guest that sends fragments for ever takes bounded memory, and another guest's
// packets come through meanwhile.
func TestS04_FragmentFlood(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{})
		g.say("first")
		host := h.accept()
		host.expect(t, "first")
		s := g.s
		silent := func([]byte) error { return nil }
		data := string(pattern(4000))
		fs := fragmentsOf(udpPacket(g.from, g.to, []byte(data)), 1400)
		flood := fragmentsOf(udpPacket(g.from, g.to, pattern(3000)), 1400)[0]
		for i := range 20000 {
			b := bytes.Clone(flood)
			if fam.version == 4 {
				b[4], b[5], b[10], b[11] = byte(i>>8), byte(i), 0, 0
			} else {
				b[44], b[45], b[46] = byte(i>>16), byte(i>>8), byte(i)
			}
			if err := s.HandlePacket(99, [6]byte{}, [6]byte{}, b, silent); err != nil {
				t.Fatal(err)
			}
			if i%4999 < len(fs) {
				g.mustSend(fs[i%4999])
			}
			if i%4999 == len(fs) {
				synctest.Wait()
				host.expect(t, data)
			}
		}
		s.mu.Lock()
		n := s.fragments.Bytes()
		s.mu.Unlock()
		if st := s.Stats(); n > 1<<20 || st.PendingFragments > 64 || st.DropFragmentRoom < 19000 {
			t.Errorf("%d bytes, %+v", n, st)
		}
		s.Close()
	})
}

func TestN34_ReassemblyTimeout(t *testing.T) {
	for _, version := range []int{4, 6} {
		for _, withFirst := range []bool{true, false} {
			synctest.Test(t, func(t *testing.T) {
				r := newFragmentRig(t)
				timeout := 30 * time.Second
				var want []byte
				packet := ip4(17, make([]byte, 4000))
				if version == 6 {
					timeout = 60 * time.Second
					packet = ip6(17, make([]byte, 4000))
				}
				fs := fragmentsOf(packet, 1448)
				if withFirst {
					r.send(fs[0])
				}
				r.send(fs[1])
				time.Sleep(timeout - 1)
				synctest.Wait()
				if len(r.frames) != 0 || r.s.Stats().PendingFragments != 1 {
					t.Fatalf("%d frames, %+v", len(r.frames), r.s.Stats())
				}
				time.Sleep(1)
				synctest.Wait()
				if st := r.s.Stats(); st.PendingFragments != 0 || st.DropFragmentTimeout != 1 {
					t.Errorf("%+v", st)
				}
				if (len(r.frames) == 1) != withFirst || len(r.frames) > 1 {
					t.Fatalf("%d frames", len(r.frames))
				}
				if withFirst {
					hl := 14 + len(packet) - 4000
					m := r.frames[0][hl:]
					want = []byte{11, 1}
					if version == 6 {
						want = []byte{3, 1}
					}
					if !bytes.Equal(m[:2], want) || !bytes.HasPrefix(fs[0], m[8:]) || len(m) < 500 {
						t.Errorf("% x", m)
					}
				}
				r.s.Close()
			})
		}
	}
}

func TestN33_N37_FragmentProblems(t *testing.T) {
	udp := make([]byte, 64)
	packet4, packet6 := ip4(17, udp), ip6(17, udp)
	tcp6 := ip6(6, make([]byte, 64))
	icmp6 := ip6(58, make([]byte, 64))
	nested := ip6(44, fragHeader(17, 8, true), udp)
	for _, tt := range []struct {
		name   string
		packet []byte
		want   []byte // type, code, 0, 0 and pointer
	}{
		{"bad length", fragmentOf(packet6, 40, 0, true, udp[:13]), []byte{4, 0, 0, 0, 4}},
		{"bad length, second", fragmentOf(packet6, 40, 16, true, udp[:13]), []byte{4, 0, 0, 0, 4}},
		{"bad length, second, of ICMPv6", fragmentOf(icmp6, 40, 16, true, udp[:13]), nil},
		{"too long", fragmentOf(packet6, 40, 65528, false, udp[:8]), []byte{4, 0, 0, 0, 42}},
		{"TCP header cut", fragmentOf(tcp6, 40, 0, true, udp[:16]), []byte{4, 3, 0, 0, 0}},
		{"options cut", fragmentOf(ip6(60, 17, 3, 1, 4, udp[:60]), 40, 0, true, ipBytes(17, 3, 1, 4, udp[:12])), []byte{4, 3, 0, 0, 0}},
		{"empty", fragmentOf(packet6, 40, 8, true, nil), nil},
		{"IPv4, bad length", fragmentOf(packet4, 20, 0, true, udp[:13]), nil},
		{"IPv4, ping of death", fragmentOf(packet4, 20, 65528, false, udp), nil},
		{"to a group", patched(fragmentOf(packet6, 40, 0, true, udp[:13]), 24, 0xff, 2), nil},
	} {
		r := newFragmentRig(t)
		r.send(tt.packet)
		st := r.s.Stats()
		if st.DropFragment+st.DropAddress != 1 || st.PendingFragments != 0 {
			t.Errorf("%s: %+v", tt.name, st)
		}
		switch {
		case (len(r.frames) == 1) != (tt.want != nil):
			t.Errorf("%s: %d frames", tt.name, len(r.frames))
		case tt.want != nil:
			m := r.frames[0][54:]
			if got := slices.Concat(m[:2], m[4:6], m[7:8]); got[0] != tt.want[0] || got[1] != tt.want[1] || got[4] != tt.want[4] || !bytes.Equal(m[8:], tt.packet) {
				t.Errorf("%s: % x", tt.name, m)
			}
		}
	}
	r := newFragmentRig(t)
	for _, f := range fragmentsOf(nested, 24) {
		r.send(f)
	}
	if st := r.s.Stats(); st.DropMalformed != 1 || st.PendingFragments != 1 || st.PacketsReassembled != 0 {
		t.Errorf("fragments of a fragment: %+v", st)
	}
	// An atomic fragment while others of the same name wait.
	r = newFragmentRig(t)
	echo := echoRequest(6, 64)
	r.send(fragmentOf(echo, 40, 0, true, echo[40:56]))
	r.send(fragmentOf(echo, 40, 0, false, echo[40:60]))
	if st := r.s.Stats(); st.EchoReplies != 1 || st.PendingFragments != 1 {
		t.Errorf("%+v", st)
	}
}

// A timer that fires while the Stack is closed, and one that has nothing to do.
func TestN34_FragmentTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFragmentRig(t)
		fs6 := fragmentsOf(ip6(17, make([]byte, 64)), 32)
		fs4 := fragmentsOf(ip4(17, make([]byte, 64)), 32)
		r.send(fs6[1])
		time.Sleep(time.Second)
		r.send(fs4[1])
		if d := time.Until(r.due()); d != 30*time.Second {
			t.Errorf("due in %v", d)
		}
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if d := time.Until(r.due()); d != 29*time.Second {
			t.Errorf("due in %v", d)
		}
		time.Sleep(29*time.Second - 1)
		r.s.Close()
		if err := r.s.HandlePacket(1, [6]byte{}, [6]byte{}, fs4[0], func([]byte) error { return nil }); err != ErrStackClosed {
			t.Error(err)
		}
		time.Sleep(time.Minute)
	})
}

// fragmentGuest is a guest whose datagrams have reached the host once.
func fragmentGuest(t *testing.T, fam family) (*udpGuest, *memConn) {
	g, h := newUDPRig(t, fam, Config{})
	g.say("first")
	host := h.accept()
	host.expect(t, "first")
	return g, host
}

// Fragments of one datagram that disagree end it, whatever still comes, and nobody
// is told. The same bytes twice are no disagreement.
func TestN32_N36_Overlap(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		hl := map[int]int{4: 20, 6: 40}[fam.version]
		for _, tt := range []struct {
			name     string
			off, end int // of the fragment between the first and the second
			more     bool
			change   bool
			arrives  bool
			refused  uint64
		}{
			{"the first again", 0, 400, true, false, true, 1},
			{"the first, other data", 0, 400, true, true, false, 3},
			{"the second again", 400, 800, true, false, true, 1},
			{"over both", 200, 600, true, false, false, 3},
			{"into the first", 392, 800, true, false, false, 3},
			{"inside the first", 8, 16, true, false, false, 3},
			{"around the first", 0, 800, true, false, false, 3},
			{"the end, too early", 200, 240, false, false, false, 3},
		} {
			g, host := fragmentGuest(t, fam)
			packet := udpPacket(g.from, g.to, pattern(1200-8))
			fs := fragmentsOf(packet, 400)
			part := bytes.Clone(packet[hl+tt.off : hl+tt.end])
			if tt.change {
				part[len(part)-1] ^= 1
			}
			for _, f := range [][]byte{fs[0], fragmentOf(packet, hl, tt.off, tt.more, part), fs[1], fs[2]} {
				g.mustSend(f)
			}
			synctest.Wait()
			if tt.arrives {
				host.expect(t, string(pattern(1200-8)))
			}
			g.expectNothing()
			time.Sleep(2 * time.Minute)
			g.expectNothing()
			if st := g.s.Stats(); st.DropFragment != tt.refused || st.PendingFragments != 0 || st.DropFragmentTimeout != 0 {
				t.Errorf("%s: %+v", tt.name, st)
			}
			host.mu.Lock()
			if len(host.out) != 0 {
				t.Errorf("%s: the host got %d datagrams", tt.name, len(host.out))
			}
			host.mu.Unlock()
			g.s.Close()
		}
	})
}

// An end before what has come, and two ends.
func TestN33_Ends(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		hl := map[int]int{4: 20, 6: 40}[fam.version]
		for _, ends := range [][2]int{{800, 400}, {400, 800}} {
			g, host := fragmentGuest(t, fam)
			packet := udpPacket(g.from, g.to, pattern(1200-8))
			g.mustSend(fragmentOf(packet, hl, ends[0], ends[0] < ends[1], packet[hl+ends[0]:hl+ends[0]+400]))
			g.mustSend(fragmentOf(packet, hl, ends[1], false, packet[hl+ends[1]:hl+ends[1]+200]))
			if ends[0] > ends[1] {
				if st := g.s.Stats(); st.DropFragment != 1 {
					t.Errorf("%v: %+v", ends, st)
				}
			}
			g.mustSend(fragmentOf(packet, hl, ends[1], false, packet[hl+ends[1]:hl+ends[1]+208]))
			g.mustSend(fragmentOf(packet, hl, 0, true, packet[hl:hl+400]))
			synctest.Wait()
			if st := g.s.Stats(); st.PacketsReassembled != 0 || st.DropFragment < 2 {
				t.Errorf("%v: %+v", ends, st)
			}
			g.expectNothing()
			host.mu.Lock()
			if len(host.out) != 0 {
				t.Errorf("%v: the host got a datagram", ends)
			}
			host.mu.Unlock()
			g.s.Close()
		}
	})
}

// Fragments belong together by guest, addresses, identification and, in IPv4,
// protocol; options are those of the first one.
func TestN35_Keys(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{})
		// The same identification, from two guests and in two namespaces.
		other := netip.AddrPortFrom(g.from.Addr().Next(), 4000)
		data := [][]byte{pattern(1500), pattern(1508)[8:], pattern(1516)[16:]}
		all := [][][]byte{
			fragmentsOf(udpPacket(g.from, g.to, data[0]), 400),
			fragmentsOf(udpPacket(other, g.to, data[1]), 400),
			fragmentsOf(udpPacket(g.from, g.to, data[2]), 400),
		}
		if fam.version == 4 { // of another protocol, nobody's
			g.mustSend(fragmentOf(refPacket(g.from.Addr(), g.to.Addr(), 200, pattern(800), -1), 20, 400, true, pattern(400)))
		}
		for i := range all[0] {
			for n, fs := range all {
				f := fs[len(fs)-1-i]
				if fam.version == 4 && n == 0 && i == 0 { // other options than the first one has
					f = slices.Concat(f[:20], []byte{1, 1, 1, 0}, f[20:])
					f[0], f[10], f[11] = 0x46, 0, 0
					binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
				}
				g.ns = uintptr(n / 2)
				g.mustSend(f)
			}
		}
		var got []string
		for range all {
			host := h.accept()
			host.mu.Lock()
			for len(host.out) == 0 {
				host.cond.Wait()
			}
			got = append(got, host.out...)
			host.mu.Unlock()
		}
		for _, d := range data {
			if !slices.Contains(got, string(d)) {
				t.Errorf("a datagram of %d bytes is missing", len(d))
			}
		}
		if len(got) != 3 {
			t.Errorf("%d datagrams", len(got))
		}
		g.ns = 0
		g.s.Close()
	})
}

// A fragment that is all of its packet is handled by itself, and leaves alone what
// waits under the same identification.
func TestN38_Atomic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fam := families[1]
		g, host := fragmentGuest(t, fam)
		long := udpPacket(g.from, g.to, pattern(1000))
		fs := fragmentsOf(long, 504)
		g.mustSend(fs[0])
		short := udpPacket(g.from, g.to, pattern(200))
		g.mustSend(fragmentOf(short, 40, 0, false, short[40:]))
		synctest.Wait()
		host.expect(t, string(pattern(200)))
		g.mustSend(fs[1])
		synctest.Wait()
		host.expect(t, string(pattern(1000)))
		g.s.Close()
	})
}
