package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A fuzz input is a list of steps. A step is a byte of what to do besides, the
// length of a packet in two bytes, and the packet. ACK numbers of TCP in it count
// from the stack's initial sequence number, which nobody knows beforehand. Unless the
// input has it otherwise, a packet is made one of the kind that the target is about,
// and its lengths and checksums are made right, or it would not get past the door.

const (
	stepSleep   = 0x03 // how long to wait behind the packet: see stepSleeps
	stepBroken  = 0x04 // the packet goes as it is
	stepWrite   = 0x08 // the far ends write something
	stepEnd     = 0x10 // the far ends end their data
	stepReset   = 0x20 // the far ends reset
	stepLost    = 0x40 // the Writer fails
	stepLengths = 0x80 // the lengths stay as they are
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

// transportAt returns what is behind the IP header of a packet and whatever
// extension headers, and where. It is not ok for a part of a packet.
func transportAt(p []byte) (proto byte, off int, ok bool) {
	be := binary.BigEndian
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		off = int(p[0]&15) * 4
		return p[9], off, off >= 20 && off <= len(p) && be.Uint16(p[6:])&0x3fff == 0
	case len(p) >= 40 && p[0]>>4 == 6:
		proto, off = p[6], 40
		for len(p) >= off+8 && (proto == 0 || proto == 43 || proto == 44 || proto == 60) {
			size := 8
			if proto != 44 {
				size += int(p[off+1]) * 8
			} else if be.Uint16(p[off+2:])&^6 != 0 {
				return proto, off, false
			}
			proto, off = p[off], off+size
		}
		return proto, off, off <= len(p)
	}
	return 0, 0, false
}

// tcpOffset returns where the TCP header of a packet stands, and whether there is
// one.
func tcpOffset(p []byte) (off int, ok bool) {
	proto, off, ok := transportAt(p)
	return off, ok && proto == 6 && len(p) >= off+20
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
	repairLengths(p)
	repairSums(p)
}

// repairLengths makes the lengths right that are in the headers of a packet.
func repairLengths(p []byte) {
	be := binary.BigEndian
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		if hl := int(p[0]&15) * 4; hl < 20 || hl > len(p) {
			p[0] = 0x45
		}
		be.PutUint16(p[2:], uint16(len(p)))
	case len(p) >= 40 && p[0]>>4 == 6:
		be.PutUint16(p[4:], uint16(len(p)-40))
	}
	proto, off, ok := transportAt(p)
	if !ok {
		return
	}
	switch t := p[off:]; {
	case proto == 17 && len(t) >= 8:
		be.PutUint16(t[4:], uint16(len(t)))
	case proto == 6 && len(t) >= 20:
		if hl := int(t[12]>>4) * 4; hl < 20 || hl > len(t) {
			t[12] = 0x50
		}
	}
}

// repairSums makes the checksums of a packet right, as far as its lengths are.
func repairSums(p []byte) {
	be := binary.BigEndian
	if len(p) >= 20 && p[0]>>4 == 4 {
		if hl := int(p[0]&15) * 4; hl >= 20 && hl <= len(p) {
			p[10], p[11] = 0, 0
			be.PutUint16(p[10:], ^refSum(p[:hl]))
		}
	}
	proto, t := transportOf(p)
	at, ok := map[byte]int{1: 2, 6: 16, 17: 6, 58: 2}[proto]
	if !ok || len(t) < at+2 {
		return
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
	be.PutUint16(t[at:], c)
}

// transportOf returns the transport header of a packet and what is behind it, as far
// as the lengths go. Nil is what has none.
func transportOf(p []byte) (proto byte, t []byte) {
	proto, off, ok := transportAt(p)
	if !ok {
		return 0, nil
	}
	end := int(binary.BigEndian.Uint16(p[2:]))
	if p[0]>>4 == 6 {
		end = 40 + int(binary.BigEndian.Uint16(p[4:]))
	}
	if end < off || end > len(p) {
		return 0, nil
	}
	t = p[off:end]
	if proto == 17 && len(t) >= 8 {
		n := int(binary.BigEndian.Uint16(t[4:]))
		if n < 8 || n > len(t) {
			return 0, nil
		}
		t = t[:n]
	}
	return proto, t
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
		icmp, echo := fam.icmpOf()
		for _, other := range [][]byte{
			refPacket(fam.guest, fam.server, 17, []byte{0, 1, 0, 2, 0, 9, 0, 0, 'x'}, 6),
			refPacket(fam.guest, fam.server, icmp, []byte{echo, 0, 0, 0, 0, 1, 0, 2}, 2),
		} {
			_, off, _ := transportAt(other)
			p := bytes.Clone(other)
			for i := range p[off:][:8] { // whatever the checksum and the length of UDP were
				if i == 2 && other[off] == echo || i >= 4 && other[off] == 0 {
					p[off+i] ^= 0x55
				}
			}
			repair(p)
			if !bytes.Equal(p, other) {
				t.Errorf("repaired to %x, want %x", p, other)
			}
		}
	}
	for n := range 60 { // rubbish has no length that goes with all of it
		for _, b := range []byte{0x4f, 0x66, 0x40, 0} {
			p := bytes.Repeat([]byte{b}, n)
			repair(p)
			readSegment(p)
			repairSums(bytes.Repeat([]byte{b}, n))
		}
	}
}

// TestRepairBehindHeaders: checksums are found behind options and extension headers,
// and not where they are of no use.
func TestRepairBehindHeaders(t *testing.T) {
	behind := ip6(0, extHeader(60, 0), extHeader(43, 1), routingHeader(44, 0), fragHeader(17, 0, false), udpHello)
	optional := ip4(17, udpHello)
	optional = append(append(append([]byte{0x46}, optional[1:20]...), 1, 1, 1, 0), optional[20:]...)
	for _, p := range [][]byte{behind, optional} {
		repair(p)
		if proto, u := transportOf(p); proto != 17 || len(u) != len(udpHello) || u[6]|u[7] == 0 {
			t.Fatalf("%x: protocol %d, %x", p, proto, u)
		}
		var parsed ipPacket
		if err := parseIP(p, &parsed); err != nil || parsed.badChecksum || parsed.malformed || !checksumOK(&parsed, parsed.payload) {
			t.Errorf("%x is not taken: %v %+v", p, err, parsed)
		}
		short := bytes.Clone(p) // a length stays that says less than there is
		_, u := transportOf(short)
		u[5] = 9
		repairSums(short)
		if _, u := transportOf(short); len(u) != 9 || refSum(pseudoOf(short, 17, 9), u) != 0xffff {
			t.Errorf("%x has a wrong sum over its shorter length", short)
		}
	}
	for _, part := range fragmentsOf(ip6(17, udpHello, make([]byte, 100)), 40) {
		before := bytes.Clone(part)
		repair(part)
		if !bytes.Equal(part, before) {
			t.Errorf("a fragment was repaired to %x", part)
		}
	}
}

func pseudoOf(p []byte, proto byte, n int) []byte {
	src, dst := packetEnds(p)
	return refPseudo(src, dst, proto, n)
}

// A shape makes a packet of some kind of whatever bytes there are. The lengths and
// checksums are repaired afterwards.
type shape func(p []byte) []byte

// padded returns p with zeros behind it, n bytes at least.
func padded(p []byte, n int) []byte {
	if len(p) < n {
		p = append(p, make([]byte, n-len(p))...)
	}
	return p
}

func shape4(p []byte) []byte {
	p = padded(p, 20)
	p[0] = 0x40 | p[0]&15
	return p
}

func shape6(p []byte) []byte {
	p = padded(p, 40)
	p[0] = 0x60 | p[0]&15
	return p
}

// shapeProto makes a whole packet of either family of p, with a protocol of IPv4 and
// one of IPv6.
func shapeProto(proto4, proto6 byte) shape {
	return func(p []byte) []byte {
		if len(p) > 0 && p[0]>>4 == 6 {
			p = padded(shape6(p), 48)
			p[6] = proto6
			return p
		}
		p = shape4(p)
		p = padded(p, max(20, int(p[0]&15)*4)+8)
		p[6], p[7] = p[6]&0x40, 0
		p[9] = proto4
		return p
	}
}

// shapeExtensions makes a chain of extension headers of what is behind an IPv6
// header, as long as there is room for one.
func shapeExtensions(p []byte) []byte {
	p = shape6(p)
	kinds := [8]byte{0, 60, 43, 44, 17, 6, 58, 59}
	next := 6
	for off := 40; ; {
		switch p[next] {
		case 0, 60, 43, 44, 17, 6, 58, 59:
		default:
			p[next] = kinds[p[next]%8]
		}
		if p[next] == 17 || p[next] == 6 || p[next] == 58 || p[next] == 59 || len(p) < off+8 {
			return p
		}
		size := 8
		if p[next] != 44 {
			p[off+1] %= byte(min((len(p)-off)/8, 255))
			size += int(p[off+1]) * 8
		}
		next, off = off, off+size
	}
}

func TestShapes(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	kinds := map[string]shape{"IPv4": shape4, "IPv6": shape6, "UDP": shapeProto(17, 17), "extensions": shapeExtensions}
	chains := 0
	for range 5000 {
		b := make([]byte, rnd.IntN(120))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		for name, shape := range kinds {
			p := shape(bytes.Clone(b))
			repair(p)
			var parsed ipPacket
			if err := parseIP(p, &parsed); err != nil || parsed.badChecksum {
				t.Fatalf("%s: %x does not get past the door: %v", name, p, err)
			}
			proto, u := transportOf(p)
			switch {
			case name == "UDP" && !parsed.malformed && (proto != 17 || !checksumOK(&parsed, u)):
				t.Fatalf("%x is no datagram", p)
			case name == "extensions" && proto != p[6]:
				chains++
			}
		}
	}
	if chains < 500 {
		t.Errorf("only %d chains of headers", chains)
	}
}

// readCapture returns the Ethernet frames of a capture file, and which of them the
// guest sent.
func readCapture(t testing.TB, name string) (frames [][]byte, sent []bool) {
	b, err := os.ReadFile(name)
	if err != nil || len(b) < 24 || binary.LittleEndian.Uint32(b) != 0xa1b2c3d4 {
		t.Fatalf("%s: %v, or no capture file", name, err)
	}
	for b = b[24:]; len(b) >= 16; {
		n := int(binary.LittleEndian.Uint32(b[8:]))
		if n < 14 || n > len(b)-16 {
			t.Fatalf("%s: a frame of %d bytes", name, n)
		}
		frames, b = append(frames, b[16:16+n]), b[16+n:]
		sent = append(sent, [6]byte(frames[len(frames)-1][6:]) == testLink.guest)
	}
	return frames, sent
}

// recordedGuest returns the packets of the kernel whose exchanges are in
// testdata/guest.pcap (see TestKernelRecord), in their order. They have ACK numbers as
// in a fuzz input, and go to the servers of a fuzzRig: every other TCP connection to
// the listener.
func recordedGuest(t testing.TB) (packets [][]byte) {
	frames, sent := readCapture(t, "testdata/guest.pcap")
	iss := make(map[flowID]uint32)
	ports := make(map[netip.AddrPort]uint16)
	for i, frame := range frames {
		if binary.BigEndian.Uint16(frame[12:]) == 0x0806 {
			continue
		}
		p := bytes.Clone(frame[14:])
		seg, ok := readSegment(p)
		off, _ := tcpOffset(p)
		switch {
		case ok && !sent[i]:
			if seg.flags&flagS != 0 {
				iss[flowID{seg.dst, seg.src}] = seg.seq
			}
		case ok:
			if ports[seg.src] == 0 {
				ports[seg.src] = []uint16{80, 443}[len(ports)%2]
			}
			if seg.flags&flagA != 0 {
				binary.BigEndian.PutUint32(p[off+8:], seg.ack-iss[flowID{seg.src, seg.dst}])
			}
			binary.BigEndian.PutUint16(p[off+2:], ports[seg.src])
		}
		if sent[i] {
			packets = append(packets, p)
		}
	}
	return packets
}

// recordedSeeds adds the recorded packets that are of a kind, one by one, and all of
// a family in one input.
func recordedSeeds(f *testing.F, kind func(p []byte) bool) {
	var all [2][]byte
	n := 0
	for _, p := range recordedGuest(f) {
		if !kind(p) {
			continue
		}
		n++
		f.Add(appendStep(nil, stepWrite, p))
		i := p[0] >> 4 / 6
		all[i] = appendStep(all[i], byte(n%2), p)
	}
	if n < 3 {
		f.Fatalf("%d packets were recorded", n)
	}
	f.Add(all[0])
	f.Add(all[1])
}

// fuzzRig is a Stack with a listener on port 443 of every address, and a host
// network in memory whose servers echo.
type fuzzRig struct {
	*machine
	far     []farEnd
	sockets []*memConn
	heard   []heardDatagram // by the sockets, and not looked at
	others  []*guest        // connections that have nothing to do with the input
}

// heardDatagram is what a socket of the host was given.
type heardDatagram struct {
	flow    Flow
	payload string
}

// fuzzSocket is a socket of the host that tells what it was given.
type fuzzSocket struct {
	*memConn
	rig  *fuzzRig
	flow Flow
}

func (c fuzzSocket) Write(b []byte) (int, error) {
	n, err := c.memConn.Write(b)
	if err == nil {
		c.rig.mu.Lock()
		c.rig.heard = append(c.rig.heard, heardDatagram{c.flow, string(b)})
		c.rig.mu.Unlock()
	}
	return n, err
}

func newFuzzRig(t testing.TB) *fuzzRig {
	r := new(fuzzRig)
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
				f, _ := FlowFromContext(ctx)
				c := fuzzSocket{newMemConn(), r, f}
				r.mu.Lock()
				r.sockets = append(r.sockets, c.memConn)
				r.mu.Unlock()
				return c, nil
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
	return r
}

// connectOthers opens the connections that must survive whatever the input does to
// others.
func (r *fuzzRig) connectOthers() {
	for i, fam := range families {
		g := r.open(50123, netip.AddrPortFrom(fam.other, []uint16{81, 443}[i]))
		g.connect()
		r.others = append(r.others, g)
	}
	synctest.Wait()
	r.mu.Lock()
	r.far = nil // nobody ends them
	r.mu.Unlock()
}

// useOthers has the other connections move some bytes.
func (r *fuzzRig) useOthers() {
	r.setHook(nil)
	for _, g := range r.others {
		g.drop()
		g.data("still here")
		g.expectText("still here")
	}
}

// ofOthers reports whether a packet is one of the other connections: then it is not
// for the input to say what becomes of them.
func (r *fuzzRig) ofOthers(seg *segment) bool {
	for _, g := range r.others {
		if g.id == (flowID{seg.src, seg.dst}) {
			return true
		}
	}
	return false
}

// packet makes the packet of a step.
func (r *fuzzRig) packet(do byte, packet []byte, shape shape) []byte {
	p := bytes.Clone(packet)
	if do&stepBroken != 0 {
		return p
	}
	if shape != nil {
		p = shape(p)
	}
	if do&stepLengths == 0 {
		repairLengths(p)
	}
	r.absoluteACK(p)
	repairSums(p)
	return p
}

// step does what a step says.
func (r *fuzzRig) step(t *testing.T, do byte, packet []byte, shape shape) {
	p := r.packet(do, packet, shape)
	var lost func([]byte) error
	if do&stepLost != 0 {
		lost = func([]byte) error { return errors.New("lost") }
	}
	r.setHook(lost)
	seg, isTCP := readSegment(p)
	if isTCP && r.ofOthers(&seg) {
		return
	}
	var f *flowCheck
	if isTCP {
		r.mu.Lock()
		f = r.flow(flowID{seg.src, seg.dst})
		f.offered(&seg)
		f.inRST = seg.flags&flagR != 0
		r.mu.Unlock()
	}
	before := r.s.Stats()
	r.mu.Lock()
	r.icmp, r.heard = nil, nil
	r.mu.Unlock()
	given := bytes.Clone(p)
	err := r.s.HandlePacket(r.ns, r.mac, r.gw, given, r.write)
	if !bytes.Equal(given, p) {
		t.Errorf("the packet was written to: %x", p)
	}
	clear(given)
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
	synctest.Wait()
	if err == nil && lost == nil && drops(r.s.Stats()) == drops(before) {
		r.checkFate(t, p)
	}
	r.farEnds(do)
	synctest.Wait()
	for left := stepSleeps[do&stepSleep]; left > 0; left -= time.Minute {
		time.Sleep(min(left, time.Minute))
		synctest.Wait()
		if left >= time.Minute {
			r.useOthers() // before the Stack asks whether the guest is still there
		}
	}
	st := r.s.Stats()
	if st.TCPFlows < 0 || st.TCPFlows > 20 || st.UDPFlows < 0 || st.UDPFlows > 20 || st.PendingDials < 0 || st.PendingDials > 4 {
		t.Errorf("%+v", st)
	}
}

// drops is how much was dropped, for whatever reason.
func drops(st Stats) (n uint64) {
	v := reflect.ValueOf(st)
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; strings.HasPrefix(name, "Drop") || strings.HasPrefix(name, "FlowsRefused") {
			n += v.Field(i).Uint()
		}
	}
	return n
}

// checkFate looks whether what a packet asks for was done, for which no counter says
// that it was dropped: a ping is answered, and a datagram gets to where it is sent.
func (r *fuzzRig) checkFate(t *testing.T, p []byte) {
	proto, b := transportOf(p)
	src, dst := netip.Addr{}, netip.Addr{}
	if proto != 0 && len(b) >= 8 {
		src, dst = packetEnds(p)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case len(b) < 8:
	case proto == 17:
		flow := Flow{0, "udp", netip.AddrPortFrom(src.Unmap(), binary.BigEndian.Uint16(b)), netip.AddrPortFrom(dst.Unmap(), binary.BigEndian.Uint16(b[2:]))}
		if len(r.heard) != 1 || r.heard[0] != (heardDatagram{flow, string(b[8:])}) {
			t.Errorf("the datagram %x of %v was not dropped, and the host has got %q", b[8:], flow, r.heard)
		}
	case len(p) > 1280:
	case proto == 1 && p[0]>>4 == 4 && b[0] == 8 && b[1] == 0, proto == 58 && p[0]>>4 == 6 && b[0] == 128 && b[1] == 0:
		for _, msg := range r.icmp {
			if msg.src == dst && msg.dst == src && msg.typ == map[byte]byte{1: 0, 58: 129}[proto] && msg.rest == binary.BigEndian.Uint32(b[4:]) &&
				bytes.Equal(msg.body, b[8:]) {
				return
			}
		}
		t.Errorf("the ping %x was not dropped, and the answer is %v", p, r.icmp)
	}
}

// farEnds has the other ends of all flows do what a step says.
func (r *fuzzRig) farEnds(do byte) {
	r.mu.Lock()
	far, sockets := r.far, r.sockets
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
	for _, c := range sockets {
		switch {
		case do&stepReset != 0:
			c.give(io.EOF)
		case do&stepEnd != 0:
			c.give(os.NewSyscallError("read", syscall.ECONNREFUSED))
		case do&stepWrite != 0:
			c.give("an answer")
		}
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
	}
	return seeds
}

// fuzzSteps has the packets of an input reach a Stack, one after another, beside
// connections that must survive them.
func fuzzSteps(f *testing.F, shape shape) {
	f.Fuzz(func(t *testing.T, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			r := newFuzzRig(t)
			r.connectOthers()
			for i := 0; len(data) >= 3 && i < maxSteps; i++ {
				var do byte
				var packet []byte
				do, packet, data = nextStep(data)
				r.step(t, do, packet, shape)
			}
			r.useOthers()
		})
	})
}

func isTCP(p []byte) bool { _, ok := tcpOffset(p); return ok }

// FuzzFlows gives a live set of flows whole conversations. The frame checker looks at
// the answers.
func FuzzFlows(f *testing.F) {
	for _, seed := range recordSeeds(f) {
		f.Add(seed)
	}
	recordedSeeds(f, isTCP)
	fuzzSteps(f, nil)
}

// FuzzIPv4 is about the headers of IPv4.
func FuzzIPv4(f *testing.F) {
	for _, tt := range parseTests {
		f.Add(appendStep(nil, stepBroken, tt.packet))
	}
	f.Add(appendStep(nil, 0, ping4([]byte{7, 7, 4, 0, 0, 0, 0, 0}, 28)))
	recordedSeeds(f, func(p []byte) bool { return p[0]>>4 == 4 })
	fuzzSteps(f, shape4)
}

// FuzzIPv6 is about the header of IPv6.
func FuzzIPv6(f *testing.F) {
	for _, tt := range parseTests {
		f.Add(appendStep(nil, stepBroken, tt.packet))
	}
	recordedSeeds(f, func(p []byte) bool { return p[0]>>4 == 6 })
	fuzzSteps(f, shape6)
}

// FuzzExtensionHeaders is about chains of them.
func FuzzExtensionHeaders(f *testing.F) {
	fam := families[1]
	u := udpPacket(netip.AddrPortFrom(fam.guest, 4000), fam.at(53), []byte("question"))[40:]
	for _, chain := range [][]any{
		{0, extHeader(60, 0), extHeader(17, 2)}, {43, routingHeader(17, 0)}, {43, routingHeader(17, 1)}, {44, fragHeader(17, 0, false)},
		{60, extHeader(60, 0), extHeader(60, 0), extHeader(60, 0), extHeader(60, 0), extHeader(60, 0), extHeader(60, 0), extHeader(60, 0), extHeader(17, 0)},
		{0, []byte{17, 0, 0x80, 4, 0, 0, 0, 0}}, {60, []byte{17, 0, 0xc0, 4, 0, 0, 0, 0}}, {60, extHeader(0, 0), extHeader(17, 0)},
	} {
		f.Add(appendStep(nil, 0, patchedEnds(fam, ip6(chain[0].(int), append(chain[1:], u)...))))
	}
	recordedSeeds(f, func(p []byte) bool { return p[0]>>4 == 6 && (p[6] == 0 || p[6] == 44 || p[6] == 60) })
	fuzzSteps(f, shapeExtensions)
}

// patchedEnds returns an IPv6 packet that goes from the guest to the server.
func patchedEnds(fam family, p []byte) []byte {
	copy(p[8:], fam.guest.AsSlice())
	copy(p[24:], fam.server.AsSlice())
	return p
}

// FuzzICMP is about what comes in ICMP and ICMPv6: pings, neighbours, errors about
// packets.
func FuzzICMP(f *testing.F) {
	for _, tt := range echoTests {
		f.Add(appendStep(nil, 0, tt.packet(patched([]byte(echoBody), 0, tt.request), "ping")))
	}
	f.Add(appendStep(nil, 0, solicit("fd00::2")))
	f.Add(appendStep(nil, 0, dadFor("fd00::2")))
	for _, fam := range families { // an error about an answer
		icmp, _ := fam.icmpOf()
		error := map[int]string{4: "\x03\x04\x00\x00\x00\x00\x05\x00", 6: "\x02\x00\x00\x00\x00\x00\x05\x00"}[fam.version]
		question := udpPacket(netip.AddrPortFrom(fam.guest, 4000), fam.at(53), []byte("question"))
		answer := udpPacket(fam.at(53), netip.AddrPortFrom(fam.guest, 4000), []byte("an answer"))
		seed := appendStep(nil, stepWrite|stepBroken, question)
		f.Add(appendStep(seed, stepWrite, refPacket(fam.guest, fam.server, icmp, append([]byte(error), answer...), 2)))
	}
	recordedSeeds(f, func(p []byte) bool {
		proto, _, ok := transportAt(p)
		return ok && (proto == 1 || proto == 58)
	})
	fuzzSteps(f, shapeProto(1, 58))
}

// FuzzUDP is about datagrams.
func FuzzUDP(f *testing.F) {
	for _, fam := range families {
		from := netip.AddrPortFrom(fam.guest, 4000)
		f.Add(appendStep(appendStep(appendStep(nil, stepWrite, udpPacket(from, fam.at(53), []byte("question"))),
			stepEnd|2, udpPacket(from, fam.at(9), nil)), stepReset|3, udpPacket(from, fam.at(7000), make([]byte, 100))))
		f.Add(appendStep(nil, 0, udpPacket(from, from, []byte("to myself"))))
	}
	recordedSeeds(f, func(p []byte) bool {
		proto, _, ok := transportAt(p)
		return ok && proto == 17
	})
	fuzzSteps(f, shapeProto(17, 17))
}

// FuzzTCPOptions opens a connection whose SYN has some options, and puts others on
// its data and on its acknowledgments. They may slow it down, and not change what is
// said.
func FuzzTCPOptions(f *testing.F) {
	options := make(map[netip.AddrPort][]byte) // of the SYNs
	for _, p := range recordedGuest(f) {
		seg, ok := readSegment(p)
		switch {
		case !ok:
		case seg.flags&flagS != 0:
			options[seg.src] = seg.opts
		case len(seg.opts) > 0:
			f.Add(byte(len(seg.payload)), options[seg.src], seg.opts)
		}
	}
	f.Add(byte(0), append(optMSS(0), optScale(15)...), []byte{5, 10, 0, 0, 0, 1, 0, 0, 0, 9})
	f.Add(byte(1), append(optMSS(1), 3, 3, 255, 4, 2), []byte{5, 2, 8, 3, 0, 255, 0})
	f.Add(byte(2), []byte{3, 3}, []byte{0x30}) // what pads it is the rest of it
	f.Add(byte(2), append(append(optMSS(48), optSACKOK()...), optStamps(7, 0)...), optStamps(0x7fffffff, 0x80000000))
	f.Fuzz(func(t *testing.T, where byte, syn, data []byte) {
		syn, data = syn[:min(len(syn), 40)], data[:min(len(data), 40)]
		for len(syn)%4 != 0 { // here, so that the checker knows of it
			syn = append(syn[:len(syn):len(syn)], 1)
		}
		synctest.Test(t, func(t *testing.T) {
			r := newFuzzRig(t)
			g := r.open(1025, families[where&1].at([]uint16{80, 443}[where>>1&1]))
			g.opts = syn
			g.connect()
			g.must(g.raw("P.", g.nxt, g.rcv, data, []byte("hello")))
			g.data("hello") // once more, without
			g.expectText("hello")
			long := pattern(3000)
			g.say("P.", long...)
			synctest.Wait()
			for range 4 { // while the answer is on its way
				g.must(g.raw(".", g.nxt, g.rcv, data, nil))
			}
			if !bytes.Equal(g.take(len(long)), long) {
				t.Error("the answer differs")
			}
			g.drop() // what was sent again before its acknowledgment came
			g.fin()
			g.expectFIN()
		})
	})
}
