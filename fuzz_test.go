package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// A fuzz input is a list of steps. A step is a byte of what to do besides, the
// length of a packet in two bytes, and the packet. ACK numbers of TCP in it count
// from the stack's initial sequence number, which nobody knows beforehand.

const (
	stepSleep  = 0x03 // how long to wait behind the packet: see stepSleeps
	stepBroken = 0x04 // the packet goes as it is
	stepWrite  = 0x08 // the far ends write something
	stepEnd    = 0x10 // the far ends end their data
	stepReset  = 0x20 // the far ends reset
	stepLost   = 0x40 // the Writer fails
)

var stepSleeps = [4]time.Duration{0, 50 * time.Millisecond, 2 * time.Second, 3 * time.Minute}

const maxSteps = 64

func appendStep(b []byte, do byte, packet []byte) []byte {
	b = append(b, do)
	b = binary.BigEndian.AppendUint16(b, uint16(len(packet)))
	return append(b, packet...)
}

// nextStep takes a step off the front of b.
func nextStep(b []byte) (do byte, packet, rest []byte) {
	if len(b) < 3 {
		return 0, nil, nil
	}
	n := min(int(binary.BigEndian.Uint16(b[1:])), len(b)-3)
	return b[0], b[3 : 3+n], b[3+n:]
}

// tcpOffset returns where the TCP header of a packet stands, behind whatever
// extension headers, and whether there is one.
func tcpOffset(p []byte) (off int, ok bool) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		off = int(p[0]&15) * 4
		ok = off >= 20 && p[9] == 6 && binary.BigEndian.Uint16(p[6:])&0x3fff == 0
	case len(p) >= 40 && p[0]>>4 == 6:
		next := p[6]
		for off = 40; len(p) >= off+8 && (next == 0 || next == 43 || next == 44 || next == 60); {
			size := 8
			if next != 44 {
				size += int(p[off+1]) * 8
			}
			next, off = p[off], off+size
		}
		ok = next == 6
	}
	return off, ok && len(p) >= off+20
}

// packetEnds returns the addresses of a packet.
func packetEnds(p []byte) (src, dst netip.Addr) {
	if p[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	}
	return netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
}

// repair makes the lengths and checksums of a packet right, in place.
func repair(p []byte) {
	var proto byte
	var off int
	switch {
	case len(p) >= 20 && p[0]>>4 == 4 && p[0]&15 >= 5 && int(p[0]&15)*4 <= len(p):
		off, proto = int(p[0]&15)*4, p[9]
		binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
		p[10], p[11] = 0, 0
		binary.BigEndian.PutUint16(p[10:], ^refSum(p[:off]))
	case len(p) >= 40 && p[0]>>4 == 6:
		off, proto = 40, p[6]
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	default:
		return
	}
	at, ok := map[byte]int{1: 2, 6: 16, 17: 6, 58: 2}[proto]
	t := p[off:]
	if !ok || len(t) < at+2 {
		return
	}
	if proto == 17 && len(t) >= 8 {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)))
	}
	t[at], t[at+1] = 0, 0
	src, dst := packetEnds(p)
	var pseudo []byte
	if proto != 1 {
		pseudo = refPseudo(src, dst, proto, len(t))
	}
	c := ^refSum(pseudo, t)
	if c == 0 && proto == 17 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(t[at:], c)
}

// readSegment reads the TCP segment of a packet, if it has one. It believes every
// length that can be, and no checksum.
func readSegment(p []byte) (seg segment, ok bool) {
	end := 0
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		end = int(binary.BigEndian.Uint16(p[2:]))
	case len(p) >= 40 && p[0]>>4 == 6:
		end = 40 + int(binary.BigEndian.Uint16(p[4:]))
	}
	if end > len(p) {
		return seg, false
	}
	p = p[:end]
	off, ok := tcpOffset(p)
	if !ok {
		return seg, false
	}
	t := p[off:]
	hl := int(t[12]>>4) * 4
	if hl < 20 || hl > len(t) {
		return seg, false
	}
	src, dst := packetEnds(p)
	be := binary.BigEndian
	return segment{src: netip.AddrPortFrom(src, be.Uint16(t)), dst: netip.AddrPortFrom(dst, be.Uint16(t[2:])), seq: be.Uint32(t[4:]),
		ack: be.Uint32(t[8:]), flags: t[13], win: be.Uint16(t[14:]), opts: bytes.Clone(t[20:hl]), payload: bytes.Clone(t[hl:])}, true
}

// relativeACK makes the ACK number of a recorded packet count from the stack's
// initial sequence number; absoluteACK is its inverse.
func (m *machine) relativeACK(p []byte) { m.shiftACK(p, ^uint32(0)) }
func (m *machine) absoluteACK(p []byte) { m.shiftACK(p, 1) }
func (m *machine) shiftACK(p []byte, sign uint32) {
	seg, ok := readSegment(p)
	if !ok || seg.flags&flagA == 0 {
		return
	}
	m.mu.Lock()
	iss := m.flow(flowID{seg.src, seg.dst}).iss
	m.mu.Unlock()
	off, _ := tcpOffset(p)
	binary.BigEndian.PutUint32(p[off+8:], seg.ack+sign*iss)
}

func TestRepair(t *testing.T) {
	for _, fam := range families {
		seg := segment{src: netip.AddrPortFrom(fam.guest, 7), dst: fam.at(80), seq: 1, ack: 2, flags: flagA, win: 3, opts: optMSS(5), payload: []byte("xyz")}
		want := seg.packet()
		p := bytes.Clone(want)
		off, ok := tcpOffset(p)
		if !ok {
			t.Fatal("no TCP")
		}
		p[2], p[3], p[off+16], p[off+17] = 0x12, 0x34, 0x56, 0x78
		if fam.version == 4 {
			p[10] = 9
		} else {
			p[2], p[3] = want[2], want[3]
			p[4] = 77
		}
		repair(p)
		if !bytes.Equal(p, want) {
			t.Errorf("repaired to %x, want %x", p, want)
		}
		got, ok := readSegment(p)
		if !ok || got.String() != seg.String() || got.src != seg.src || got.dst != seg.dst || string(got.payload) != "xyz" {
			t.Errorf("read %v, want %v", got, seg)
		}
		for _, other := range [][]byte{
			refPacket(fam.guest, fam.server, 17, []byte{0, 1, 0, 2, 0, 9, 0, 0, 'x'}, 6),
			refPacket(fam.guest, fam.server, 58, []byte{128, 0, 0, 0, 0, 1, 0, 2}, 2),
			refPacket(fam.guest, fam.server, 1, []byte{8, 0, 0, 0, 0, 1, 0, 2}, 2),
		} {
			p := bytes.Clone(other)
			repair(p)
			if !bytes.Equal(p, other) {
				t.Errorf("repaired to %x, want %x", p, other)
			}
		}
	}
	for n := range 60 { // rubbish is left alone, whatever its length
		p := bytes.Repeat([]byte{0x4f}, n)
		repair(p)
		readSegment(p)
		p = bytes.Repeat([]byte{0x66}, n)
		repair(p)
		readSegment(p)
	}
}

// fuzzRig is a Stack with a listener on port 443 of every address, and a host
// network in memory whose servers echo.
type fuzzRig struct {
	*machine
	far []farEnd
}

func newFuzzRig(t testing.TB) *fuzzRig {
	var r fuzzRig
	add := func(c farEnd) {
		r.mu.Lock()
		r.far = append(r.far, c)
		r.mu.Unlock()
		go func() {
			io.Copy(c, c)
			c.CloseWrite()
			io.Copy(io.Discard, c)
			c.Close()
		}()
	}
	m, _ := newRig(t, Config{
		SendBuffer: 16384, ReceiveBuffer: 16384, MaxTCPFlows: 20, MaxUDPFlows: 20, MaxPendingDials: 4, Backlog: 8, MaxHalfOpen: 4,
		Allow: func(_ context.Context, f Flow) error {
			if f.Destination.Port() == 9 {
				return ErrProhibited
			}
			return nil
		},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if network != "tcp" {
				return nil, errors.New("no datagrams here")
			}
			a, b := newHostConns(4096)
			add(b)
			return a, nil
		},
	})
	r.machine = m
	l := mustListen(t, m.s, "tcp", ":443")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			add(c.(*VirtualConn))
		}
	}()
	return &r
}

// step does what a step says.
func (r *fuzzRig) step(t *testing.T, do byte, packet []byte) {
	p := bytes.Clone(packet)
	var lost func([]byte) error
	if do&stepLost != 0 {
		lost = func([]byte) error { return errors.New("lost") }
	}
	r.setHook(lost)
	if do&stepBroken == 0 {
		repair(p)
		r.absoluteACK(p)
		repair(p)
	}
	var f *flowCheck
	if seg, ok := readSegment(p); ok {
		r.mu.Lock()
		f = r.flow(flowID{seg.src, seg.dst})
		f.offered(&seg)
		f.inRST = seg.flags&flagR != 0
		r.mu.Unlock()
	}
	err := r.send(p)
	if f != nil {
		r.mu.Lock()
		f.inRST = false
		r.mu.Unlock()
	}
	known := err == nil || lost != nil
	for _, sentinel := range []error{ErrPacketTooShort, ErrIPVersion, ErrIHL, ErrIPv4TotalLength, ErrIPv6TooShort, ErrIPv6PayloadLength} {
		known = known || err == sentinel
	}
	if !known {
		t.Errorf("HandlePacket: %v", err)
	}
	r.mu.Lock()
	far := r.far
	r.mu.Unlock()
	for _, c := range far {
		switch {
		case do&stepReset != 0:
			c.SetLinger(0)
			c.Close()
		case do&stepEnd != 0:
			c.CloseWrite()
		case do&stepWrite != 0:
			go c.Write(make([]byte, 3000))
		}
	}
	synctest.Wait()
	time.Sleep(stepSleeps[do&stepSleep])
	synctest.Wait()
	st := r.s.Stats()
	if st.TCPFlows < 0 || st.TCPFlows > 20 || st.UDPFlows < 0 || st.UDPFlows > 20 || st.PendingDials < 0 || st.PendingDials > 4 {
		t.Errorf("%+v", st)
	}
}

// recordSeeds plays some conversations and returns what the guest sent, as fuzz
// inputs.
func recordSeeds(f *testing.F) [][]byte {
	var seeds [][]byte
	for _, fam := range families {
		for _, port := range []uint16{80, 443} {
			for _, end := range []string{"FIN", "RST", "host"} {
				r := newFuzzRig(f)
				r.record = true
				g := r.open(1025, fam.at(port))
				g.opts = append(append(optMSS(1000), optScale(3)...), optSACKOK()...)
				if end == "RST" {
					g.stamp = true
					g.opts = append(g.opts, optStamps(1, 0)...)
				}
				g.connect()
				g.data("hello")
				g.expectText("hello")
				g.must(g.raw("P.", g.nxt+5, g.rcv, g.stamps(), []byte("world")))
				g.must(g.raw("P.", g.nxt, g.rcv, append(g.stamps(), 1, 1, 5, 10, 0, 0, 0, 0, 0, 0, 0, 0), []byte("hello")))
				g.nxt += 10
				g.expectText("helloworld")
				switch end {
				case "FIN":
					g.fin()
					g.expectFIN()
				case "RST":
					g.rst()
				case "host":
					r.mu.Lock()
					far := r.far[0]
					r.mu.Unlock()
					far.CloseWrite()
					g.expectFIN()
					g.fin()
				}
				var seed []byte
				for i, p := range r.sent {
					p = bytes.Clone(p)
					r.relativeACK(p)
					do := byte(i % 3)
					if end == "host" && i == 4 {
						do |= stepEnd
					}
					seed = appendStep(seed, do, p)
				}
				seeds = append(seeds, seed)
				r.s.Close()
			}
		}
		icmp, echo := byte(1), byte(8)
		if fam.version == 6 {
			icmp, echo = 58, 128
		}
		var other []byte
		other = appendStep(other, 0, refPacket(fam.guest, fam.server, icmp, []byte{echo, 0, 0, 0, 0, 1, 0, 2, 'x'}, 2))
		other = appendStep(other, 1, refPacket(fam.guest, fam.server, 17, []byte{4, 1, 0, 53, 0, 9, 0, 0, 'x'}, 6))
		other = appendStep(other, 2, segment{src: netip.AddrPortFrom(fam.guest, 1), dst: fam.at(9), flags: flagS, win: 1}.packet())
		other = appendStep(other, stepBroken, []byte{0x45, 0, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16})
		seeds = append(seeds, other)
	}
	return seeds
}

// FuzzFlows gives a live set of flows whole conversations, with every length and
// checksum made right, so that they get to TCP. The frame checker looks at the
// answers.
func FuzzFlows(f *testing.F) {
	for _, seed := range recordSeeds(f) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			r := newFuzzRig(t)
			for i := 0; len(data) >= 3 && i < maxSteps; i++ {
				var do byte
				var packet []byte
				do, packet, data = nextStep(data)
				r.step(t, do, packet)
			}
		})
	})
}

// FuzzHandlePacket gives raw bytes to HandlePacket, beside a connection to a
// listener and one through the NAT, which must survive them if they are not
// theirs.
func FuzzHandlePacket(f *testing.F) {
	for _, fam := range families {
		seg := segment{src: netip.AddrPortFrom(fam.guest, 2000), dst: fam.at(80), seq: 1, ack: 2, flags: flagS, win: 3,
			opts: append(optMSS(5), optScale(6)...), payload: []byte("xyz")}
		f.Add(seg.packet())
		seg.flags = flagA
		f.Add(seg.packet())
		f.Add(append(seg.packet(), "padding"...))
		f.Add(refPacket(fam.guest, fam.server, 17, []byte{0, 1, 0, 2, 0, 9, 0, 0, 'x'}, 6))
		f.Add(refPacket(fam.guest, fam.server, 58, []byte{128, 0, 0, 0, 0, 1, 0, 2}, 2))
		f.Add(refPacket(fam.guest, fam.server, 1, []byte{8, 0, 0, 0, 0, 1, 0, 2}, 2))
		f.Add(refPacket(fam.guest, fam.server, 44, []byte{6, 0, 0, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8}, -1))
		f.Add(refPacket(fam.guest, fam.server, 0, []byte{6, 0, 1, 4, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8}, -1))
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		synctest.Test(t, func(t *testing.T) {
			r := newFuzzRig(t)
			var guests []*guest
			for _, fam := range families {
				for _, port := range []uint16{80, 443} {
					g := r.open(1025, fam.at(port))
					g.connect()
					guests = append(guests, g)
				}
			}
			if seg, ok := readSegment(packet); ok {
				id := flowID{seg.src, seg.dst}
				for _, g := range guests {
					if g.id == id {
						t.Skip()
					}
				}
				r.flow(id).offered(&seg)
				r.flow(id).inRST = seg.flags&flagR != 0
			}
			before := bytes.Clone(packet)
			r.send(packet)
			r.s.HandlePacket(0, r.mac, r.gw, packet, func([]byte) error { return nil })
			if !bytes.Equal(before, packet) {
				t.Error("the packet was written to")
			}
			synctest.Wait()
			if st := r.s.Stats(); st.TCPFlows > 5 || st.UDPFlows > 1 {
				t.Errorf("%+v", st)
			}
			for _, g := range guests {
				g.drop()
				g.data("still here")
				g.expectText("still here")
			}
		})
	})
}
