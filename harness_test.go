package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// A raw guest, the network of the host, and a checker of every frame. Nothing in
// this file uses the code under test to build, read or check a packet.

// family is one address family of a test: who the guest is, and whom it talks to.
type family struct {
	name      string
	version   int
	guest     netip.Addr
	server    netip.Addr // somewhere behind the stack
	other     netip.Addr // somewhere else
	stack     netip.Addr // the stack's own address
	loopback  netip.Addr
	broadcast netip.Addr // not one host
	mss       int        // at an MTU of 1500
	minMSS    int        // of a peer that names none
}

var families = []family{{
	name: "IPv4", version: 4,
	guest: netip.MustParseAddr("10.0.2.15"), server: netip.MustParseAddr("192.0.2.80"), other: netip.MustParseAddr("198.51.100.7"),
	stack: netip.MustParseAddr("10.0.2.2"), loopback: netip.MustParseAddr("127.0.0.1"), broadcast: netip.MustParseAddr("224.0.0.1"),
	mss: 1460, minMSS: 536,
}, {
	name: "IPv6", version: 6,
	guest: netip.MustParseAddr("fd00::15"), server: netip.MustParseAddr("2001:db8::80"), other: netip.MustParseAddr("2001:db8:7::7"),
	stack: netip.MustParseAddr("fd00::2"), loopback: netip.MustParseAddr("::1"), broadcast: netip.MustParseAddr("ff02::1"),
	mss: 1440, minMSS: 1220,
}}

func (f family) at(port uint16) netip.AddrPort { return netip.AddrPortFrom(f.server, port) }

// eachFamily runs a test for IPv4 and IPv6.
func eachFamily(t *testing.T, f func(t *testing.T, fam family)) {
	for _, fam := range families {
		t.Run(fam.name, func(t *testing.T) { f(t, fam) })
	}
}

// inBubble runs a test for IPv4 and IPv6 in virtual time.
func inBubble(t *testing.T, f func(t *testing.T, fam family)) {
	eachFamily(t, func(t *testing.T, fam family) {
		synctest.Test(t, func(t *testing.T) { f(t, fam) })
	})
}

// TCP flags as on the wire, and their letters as in a packetdrill script.
const (
	flagF = 1 << iota
	flagS
	flagR
	flagP
	flagA
	flagU
	flagE
	flagW
)

const flagLetters = "FSRP.UEW"

func parseFlags(s string) (f byte) {
	for _, c := range s {
		i := strings.IndexRune(flagLetters, c)
		if i < 0 {
			panic("unknown flag in " + s)
		}
		f |= 1 << i
	}
	return f
}

func formatFlags(f byte) string {
	s := ""
	for _, i := range []int{1, 0, 2, 3, 4, 5, 6, 7} { // S F R P . U E W
		if f&(1<<i) != 0 {
			s += flagLetters[i : i+1]
		}
	}
	return s
}

// refSum is the one's complement sum of 16-bit words, the slow way.
func refSum(parts ...[]byte) uint16 {
	var s uint32
	odd := false
	for _, p := range parts {
		for _, b := range p {
			if odd {
				s += uint32(b)
			} else {
				s += uint32(b) << 8
			}
			odd = !odd
			if s > 0xffff {
				s = s&0xffff + 1
			}
		}
	}
	return uint16(s)
}

func refPseudo(src, dst netip.Addr, proto byte, n int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	if src.Is4() {
		return append(b, 0, proto, byte(n>>8), byte(n))
	}
	return append(binary.BigEndian.AppendUint32(b, uint32(n)), 0, 0, 0, proto)
}

// refPacket puts an IP header in front of a transport packet and fills the
// checksum at off of that, unless off is negative.
func refPacket(src, dst netip.Addr, proto byte, transport []byte, off int) []byte {
	transport = bytes.Clone(transport)
	if off >= 0 {
		transport[off], transport[off+1] = 0, 0
		var pseudo []byte
		if proto != 1 {
			pseudo = refPseudo(src, dst, proto, len(transport))
		}
		c := ^refSum(pseudo, transport)
		if c == 0 && proto == 17 {
			c = 0xffff
		}
		binary.BigEndian.PutUint16(transport[off:], c)
	}
	if src.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(transport)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(h[10:], ^refSum(h))
		return append(h, transport...)
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, proto, 64
	if proto == 58 {
		h[7] = 255
	}
	binary.BigEndian.PutUint16(h[4:], uint16(len(transport)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, transport...)
}

// segment is a TCP segment in plain words.
type segment struct {
	src, dst netip.AddrPort
	seq, ack uint32
	flags    byte
	win      uint16
	opts     []byte
	payload  []byte

	at time.Time // when it was emitted
}

func (g segment) packet() []byte {
	opts := g.opts
	for len(opts)%4 != 0 {
		opts = append(opts[:len(opts):len(opts)], 1)
	}
	b := make([]byte, 20, 20+len(opts)+len(g.payload))
	binary.BigEndian.PutUint16(b[0:], g.src.Port())
	binary.BigEndian.PutUint16(b[2:], g.dst.Port())
	binary.BigEndian.PutUint32(b[4:], g.seq)
	binary.BigEndian.PutUint32(b[8:], g.ack)
	b[12] = byte((20 + len(opts)) / 4 << 4)
	b[13] = g.flags
	binary.BigEndian.PutUint16(b[14:], g.win)
	return refPacket(g.src.Addr(), g.dst.Addr(), 6, append(append(b, opts...), g.payload...), 16)
}

// length counts SYN and FIN.
func (g segment) length() uint32 {
	return uint32(len(g.payload)) + uint32(g.flags&flagF) + uint32(g.flags&flagS>>1)
}

func (g segment) String() string {
	return fmt.Sprintf("%s %d:%d(%d) ack %d win %d opts %x", formatFlags(g.flags), g.seq, g.seq+uint32(len(g.payload)), len(g.payload),
		g.ack, g.win, g.opts)
}

// optionLengths are the lengths of the values of options that have only one.
var optionLengths = map[byte]int{2: 2, 3: 1, 4: 0, 8: 8}

// option returns the value of a TCP option, the last one if there are several. An
// option of another length than its kind has is none.
func (g segment) option(kind byte) (value []byte, ok bool) {
	for o := g.opts; len(o) > 0 && o[0] != 0; {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			break
		}
		n, fixed := optionLengths[kind]
		if o[0] == kind && (!fixed || int(o[1])-2 == n) {
			value, ok = o[2:o[1]], true
		}
		o = o[o[1]:]
	}
	return value, ok
}

func optMSS(n int) []byte   { return []byte{2, 4, byte(n >> 8), byte(n)} }
func optScale(n int) []byte { return []byte{1, 3, 3, byte(n)} }
func optSACKOK() []byte     { return []byte{1, 1, 4, 2} }
func optStamps(val, ecr uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{1, 1, 8, 10}, val)
	return binary.BigEndian.AppendUint32(b, ecr)
}

// icmpMessage is an ICMP packet of either family.
type icmpMessage struct {
	src, dst  netip.Addr
	typ, code byte
	body      []byte // behind the first 8 bytes
	at        time.Time
	rest      uint32 // of the header
}

// machine is a guest on the link: it takes the frames that the Stack emits for
// it, checks every one, and sorts them by flow.
type machine struct {
	t       testing.TB
	s       *Stack
	ns      uintptr
	mtu     int
	mac, gw [6]byte

	mu     sync.Mutex
	arrive chan struct{} // closed and replaced when a frame has arrived
	flows  map[flowID]*flowCheck
	icmp   []icmpMessage
	udp    []udpMessage
	kept   []keptFrame
	frames int
	supers int // frames of several segments
	faults int
	sent   [][]byte // packets given to the Stack, if record is set
	record bool
	ownISS bool                     // connect leaves the stack's initial sequence number alone
	ttl    byte                     // of the segments of guests; 0: 64
	hook   func(frame []byte) error // runs behind the checks; its error is the Writer's
	ended  bool
}

type udpMessage struct {
	src, dst netip.AddrPort
	payload  []byte
	at       time.Time
}

// flowID names a flow from the guest's side.
type flowID struct{ guest, host netip.AddrPort }

// keptFrame is a frame that the Writer kept, and what it held then.
type keptFrame struct {
	frame []byte
	sum   uint32
}

// newMachine puts a guest in front of a Stack. When the test ends the Stack is
// closed, and the frames that were kept are looked at again.
func newMachine(t testing.TB, s *Stack) *machine {
	m := &machine{
		t: t, s: s, mtu: s.cfg.MTU,
		mac: [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}, gw: [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x57},
		arrive: make(chan struct{}), flows: make(map[flowID]*flowCheck),
	}
	t.Cleanup(func() {
		s.Close()
		m.mu.Lock()
		defer m.mu.Unlock()
		m.ended = true
		for _, k := range m.kept {
			if crc32.ChecksumIEEE(k.frame) != k.sum {
				t.Errorf("a frame that the Writer kept has changed: %x", k.frame)
			}
		}
	})
	return m
}

// newRig returns a Stack whose host network is in memory, with a guest.
func newRig(t testing.TB, cfg Config) (*machine, *hostNet) {
	h := newHostNet(t)
	if cfg.Dial == nil {
		cfg.Dial = h.dial
	}
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return newMachine(t, s), h
}

// send gives a packet to the Stack, and overwrites it when the Stack has had it.
func (m *machine) send(packet []byte) error {
	b := bytes.Clone(packet)
	if m.record {
		m.mu.Lock()
		m.sent = append(m.sent, packet)
		m.mu.Unlock()
	}
	err := m.s.HandlePacket(m.ns, m.mac, m.gw, b, m.write)
	for i := range b {
		b[i] = 0xa5
	}
	return err
}

func (m *machine) mustSend(packet []byte) {
	m.t.Helper()
	if err := m.send(packet); err != nil {
		m.t.Fatalf("HandlePacket: %v", err)
	}
}

// write is the guest's Writer.
func (m *machine) write(frame []byte) error {
	m.mu.Lock()
	hook := m.hook
	m.mu.Unlock()
	var lost error
	if hook != nil {
		lost = hook(frame)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.frames++
	if err := m.receive(bytes.Clone(frame), lost != nil); err != nil && !m.ended && m.faults < 3 {
		m.faults++
		m.t.Errorf("frame %d: %x…\n%v", m.frames, frame[:min(len(frame), 54)], err)
	}
	if lost != nil {
		return lost
	}
	switch {
	case m.frames%2 == 0 || m.s.cfg.ReuseFrames: // the Writer owns the frame, and may do with it what it likes
		for i := range frame {
			frame[i] = 0x5a
		}
	case len(m.kept) < 10000:
		m.kept = append(m.kept, keptFrame{frame, crc32.ChecksumIEEE(frame)})
	}
	close(m.arrive)
	m.arrive = make(chan struct{})
	return nil
}

// receive is what a network card does before take: it completes the frame, and cuts
// it to segments, as the header in front of it says.
func (m *machine) receive(frame []byte, lost bool) error {
	if !m.s.cfg.VirtioNetHeader {
		return m.take(frame, lost)
	}
	if frame[1] == virtioGSOUDP && !m.s.cfg.VirtioNetUSO {
		return errors.New("several datagrams for who does not take them")
	}
	frames, err := cutFrame(frame)
	if len(frames) > 1 {
		m.supers++
	}
	for _, f := range frames {
		if err == nil {
			err = m.take(f, lost)
		}
	}
	return err
}

const virtioGSOUDP = 5 // VIRTIO_NET_HDR_GSO_UDP_L4

// cutFrame reads the virtio_net_hdr in front of a frame (VIRTIO 1.3 section 5.1.6),
// and returns the frames that a receiver makes of it.
func cutFrame(frame []byte) ([][]byte, error) {
	if len(frame) < 12+14+20 {
		return nil, errors.New("short frame")
	}
	h, frame := frame[:12], frame[12:]
	field := func(i int) int { return int(binary.LittleEndian.Uint16(h[i:])) }
	flags, gso, hdrLen, gsoSize, start, off, buffers := h[0], h[1], field(2), field(4), field(6), field(8), field(10)
	switch {
	case buffers != 1:
		return nil, fmt.Errorf("%d buffers", buffers)
	case flags == 0 && gso == 0 && hdrLen|gsoSize|start|off == 0:
		return [][]byte{frame}, nil
	case flags != 1:
		return nil, fmt.Errorf("virtio header % x", h)
	}
	ip, src, dst, headers, proto := frame[14:], netip.Addr{}, netip.Addr{}, 14+20, byte(0)
	switch {
	case ip[0] == 0x45:
		src, _ = netip.AddrFromSlice(ip[12:16])
		dst, _ = netip.AddrFromSlice(ip[16:20])
		proto = ip[9]
	case ip[0]>>4 == 6 && len(ip) >= 40:
		src, _ = netip.AddrFromSlice(ip[8:24])
		dst, _ = netip.AddrFromSlice(ip[24:40])
		headers, proto = 14+40, ip[6]
	}
	fields, least := map[byte]int{6: 16, 17: 6}, map[byte]int{6: 20, 17: 8} // where the checksum is; the header's length
	if start != headers || off != fields[proto] || off == 0 || len(frame) < start+least[proto] || len(ip) > 65535 {
		return nil, fmt.Errorf("virtio header % x, packet of %d bytes", h, len(ip))
	}
	transport := frame[start:]
	if got, want := binary.BigEndian.Uint16(transport[off:]), refSum(refPseudo(src, dst, proto, len(transport))); got != want {
		return nil, fmt.Errorf("unfinished checksum %#x, want %#x", got, want)
	}
	var good bool
	if proto == 6 {
		headers += int(transport[12] >> 4 * 4)
		good = gso == map[bool]byte{true: 1, false: 4}[src.Is4()] && transport[13]&(flagS|flagR|flagU) == 0 ||
			gso == 0 && hdrLen|gsoSize == 0
		if gso == 0 {
			hdrLen, gsoSize = headers, len(frame)
		}
	} else { // what virtio_net_hdr_to_skb and __udp_gso_segment of Linux ask for
		headers += 8
		good = gso == virtioGSOUDP && int(binary.BigEndian.Uint16(transport[4:])) == len(transport) && len(frame)-headers <= 64*gsoSize
	}
	if !good || hdrLen != headers || gsoSize == 0 || headers > len(frame) || gso > 0 && len(frame)-headers <= gsoSize {
		return nil, fmt.Errorf("virtio header % x, packet of %d bytes", h, len(ip))
	}
	var frames [][]byte
	for at := headers; len(frames) == 0 || at < len(frame); at += gsoSize {
		end := min(at+gsoSize, len(frame))
		f := append(bytes.Clone(frame[:headers]), frame[at:end]...)
		completeSegment(f, start, at-headers, end == len(frame), proto, src, dst)
		frames = append(frames, f)
	}
	return frames, nil
}

// completeSegment makes a packet of its own of a part of a larger one, whose headers
// it has: tcp_gso_segment, __udp_gso_segment and inet_gso_segment of Linux.
func completeSegment(f []byte, start, at int, last bool, proto byte, src, dst netip.Addr) {
	ip, transport, off := f[14:], f[start:], 16
	if src.Is4() {
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^refSum(ip[:20]))
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(len(transport)))
	}
	if proto == 6 {
		binary.BigEndian.PutUint32(transport[4:], binary.BigEndian.Uint32(transport[4:])+uint32(at))
		if !last {
			transport[13] &^= flagF | flagP
		}
	} else {
		off = 6
		binary.BigEndian.PutUint16(transport[4:], uint16(len(transport)))
	}
	transport[off], transport[off+1] = 0, 0
	c := ^refSum(refPseudo(src, dst, proto, len(transport)), transport)
	if c == 0 && proto == 17 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(transport[off:], c)
}

// take reads and checks a frame, and queues it unless it is lost.
func (m *machine) take(frame []byte, lost bool) error {
	if len(frame) < 14+20 || [6]byte(frame) != m.mac || [6]byte(frame[6:]) != m.gw {
		return errors.New("Ethernet addresses")
	}
	b := frame[14:]
	if len(b) > m.mtu {
		return fmt.Errorf("%d bytes are above the MTU", len(b))
	}
	var src, dst netip.Addr
	var proto, ttl byte
	fragment := false
	switch binary.BigEndian.Uint16(frame[12:]) {
	case 0x0800:
		if b[0] != 0x45 || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
			return errors.New("IPv4 version or length")
		}
		if refSum(b[:20]) != 0xffff {
			return errors.New("IPv4 header checksum")
		}
		bits := binary.BigEndian.Uint16(b[6:])
		fragment = bits&0x3fff != 0
		if !fragment && bits != 0x4000 {
			return errors.New("DF is not set")
		}
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
		ttl, proto, b = b[8], b[9], b[20:]
	case 0x86dd:
		if len(b) < 40 || b[0]>>4 != 6 || int(binary.BigEndian.Uint16(b[4:])) != len(b)-40 {
			return errors.New("IPv6 version or length")
		}
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
		ttl, proto, b = b[7], b[6], b[40:]
		fragment = proto == 44
	default:
		return errors.New("EtherType")
	}
	if !src.IsValid() || src.IsMulticast() || src.IsUnspecified() || dst.IsUnspecified() {
		return fmt.Errorf("from %v to %v", src, dst)
	}
	wantTTL := byte(64)
	if proto == 58 && len(b) > 0 && b[0] >= 133 && b[0] <= 137 {
		wantTTL = 255
	}
	if ttl != wantTTL {
		return fmt.Errorf("TTL %d", ttl)
	}
	if fragment {
		return nil // a datagram: reassembled by the tests of those
	}
	var pseudo []byte
	if proto != 1 {
		pseudo = refPseudo(src, dst, proto, len(b))
	}
	if refSum(pseudo, b) != 0xffff {
		return errors.New("transport checksum")
	}
	if proto != 6 && lost {
		return nil
	}
	switch proto {
	case 6:
		return m.takeTCP(src, dst, b, lost)
	case 1, 58:
		if len(b) < 8 {
			return errors.New("short ICMP")
		}
		m.icmp = append(m.icmp, icmpMessage{src, dst, b[0], b[1], b[8:], time.Now(), binary.BigEndian.Uint32(b[4:])})
		return nil
	case 17:
		if len(b) < 8 || int(binary.BigEndian.Uint16(b[4:])) != len(b) || b[6]|b[7] == 0 {
			return errors.New("UDP header")
		}
		m.udp = append(m.udp, udpMessage{netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)),
			netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])), b[8:], time.Now()})
		return nil
	}
	return fmt.Errorf("protocol %d", proto)
}

func (m *machine) takeTCP(src, dst netip.Addr, b []byte, lost bool) error {
	if len(b) < 20 || int(b[12]>>4)*4 < 20 || int(b[12]>>4)*4 > len(b) || b[12]&0xf != 0 {
		return errors.New("TCP header")
	}
	hl := int(b[12]>>4) * 4
	seg := segment{
		src: netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), dst: netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:])),
		seq: binary.BigEndian.Uint32(b[4:]), ack: binary.BigEndian.Uint32(b[8:]), flags: b[13],
		win: binary.BigEndian.Uint16(b[14:]), opts: b[20:hl], payload: b[hl:], at: time.Now(),
	}
	if b[18]|b[19] != 0 {
		return errors.New("urgent pointer")
	}
	f := m.flow(flowID{seg.dst, seg.src})
	err := f.emitted(&seg)
	if !lost {
		f.queue = append(f.queue, seg)
	}
	if err != nil {
		return fmt.Errorf("%v: %v\n%s", seg, err, f.history())
	}
	return nil
}

// flow returns what is known of a flow. The caller holds m.mu.
func (m *machine) flow(id flowID) *flowCheck {
	f := m.flows[id]
	if f == nil {
		f = new(flowCheck)
		m.flows[id] = f
	}
	return f
}

// flowCheck checks the segments of one flow against all that went before.
type flowCheck struct {
	queue []segment // emitted, not yet taken by the test
	inRST bool      // the Stack is being given a reset
	past  []segment // the latest of both directions, in order

	// What the stack has said since its SYN.
	spoke   bool
	iss     uint32
	max     uint32 // end of what was sent
	edge    uint32 // right edge of the advertised window
	ack     uint32
	scale   uint8
	stamps  bool
	sack    bool
	mss     int    // of the guest's SYN; 0: none
	stream  []byte // from iss+1 on, up to a bound
	finAt   uint32
	finSent bool

	// What the guest has said since its SYN.
	syns       []segment // that the Stack has not answered
	heard      bool
	guestISS   uint32
	guestMax   uint32 // end of what was sent
	guestEdge  uint32 // the farthest right edge of its window
	guestScale uint8
	guestOpts  map[byte]bool
	guestAck   uint32
}

const keptStream = 4 << 20

// note keeps a segment for history.
func (f *flowCheck) note(seg *segment) {
	if len(f.past) == 20 {
		f.past = append(f.past[:0], f.past[1:]...)
	}
	f.past = append(f.past, *seg)
}

// history lists the latest segments of both directions.
func (f *flowCheck) history() string {
	s := ""
	for _, seg := range f.past {
		s += fmt.Sprintf("\t%v > %v: %v\n", seg.src, seg.dst, seg)
	}
	return s
}

// offered notes a segment of the guest, before the Stack gets it.
func (f *flowCheck) offered(seg *segment) {
	f.note(seg)
	if seg.flags&flagS != 0 && (!f.heard || seg.seq != f.guestISS) {
		f.syns = append(f.syns, *seg)
		switch {
		case f.spoke && f.heard:
			return // it begins a connection if the Stack says so
		case f.spoke: // the answer to a SYN of the Stack
			f.learnSYN(seg)
		default:
			f.begin(seg)
		}
	}
	if end := seg.seq + seg.length(); ahead(end, f.guestMax) {
		f.guestMax = end
	}
	if seg.flags&flagA != 0 && seg.flags&flagR == 0 && (!f.spoke || int32(seg.ack-f.max) <= 0) {
		win := uint32(seg.win)
		if seg.flags&flagS == 0 && f.guestOpts[3] {
			win <<= f.guestScale
		}
		if edge := seg.ack + win; ahead(edge, f.guestEdge) || !f.spoke {
			f.guestEdge = edge
		}
		if ahead(seg.ack, f.guestAck) {
			f.guestAck = seg.ack
		}
	}
}

// ahead reports whether sequence number a is above b, and not so far above that
// it might as well be below.
func ahead(a, b uint32) bool { return a-b-1 < 1<<30 }

// begin starts over with a SYN of the guest.
func (f *flowCheck) begin(seg *segment) {
	*f = flowCheck{queue: f.queue, inRST: f.inRST, syns: f.syns, past: f.past}
	f.learnSYN(seg)
}

// learnSYN notes what a SYN of the guest says.
func (f *flowCheck) learnSYN(seg *segment) {
	f.heard, f.guestISS, f.guestMax = true, seg.seq, seg.seq+seg.length()
	f.guestOpts = make(map[byte]bool)
	for k := range optionLengths {
		v, ok := seg.option(k)
		f.guestOpts[k] = ok
		switch {
		case !ok:
		case k == 3:
			f.guestScale = min(v[0], 14)
		case k == 2:
			f.mss = int(binary.BigEndian.Uint16(v))
		}
	}
}

// emitted checks a segment of the stack.
func (f *flowCheck) emitted(seg *segment) error {
	f.note(seg)
	for i, o := 0, seg.opts; i < len(o); {
		switch {
		case o[i] == 0:
			for _, pad := range o[i:] {
				if pad != 0 {
					return errors.New("padding is not zero")
				}
			}
			i = len(o)
		case o[i] == 1:
			i++
		case i+1 >= len(o) || o[i+1] < 2 || i+int(o[i+1]) > len(o):
			return errors.New("options")
		default:
			i += int(o[i+1])
		}
	}
	syn, rst, ack := seg.flags&flagS != 0, seg.flags&flagR != 0, seg.flags&flagA != 0
	if seg.flags&(flagU|flagE|flagW) != 0 || syn && seg.flags&(flagF|flagR|flagP) != 0 || rst && seg.flags&(flagF|flagP) != 0 {
		return errors.New("flags")
	}
	if rst {
		if f.inRST {
			return errors.New("a reset answers a reset")
		}
		if len(seg.payload) > 0 {
			return errors.New("a reset with data")
		}
		return nil
	}
	if !syn && !f.spoke {
		return errors.New("no SYN before it")
	}
	if syn {
		if len(seg.payload) > 0 {
			return errors.New("a SYN with data")
		}
		return f.emittedSYN(seg, ack)
	}
	if !ack {
		return errors.New("no ACK")
	}
	if err := f.checkAck(seg); err != nil {
		return err
	}
	return f.checkData(seg)
}

// emittedSYN begins a connection.
func (f *flowCheck) emittedSYN(seg *segment, ack bool) error {
	begins := func(syn segment) bool { return ack && seg.ack == syn.seq+1 }
	if f.spoke && seg.seq == f.iss && !slices.ContainsFunc(f.syns, begins) { // again
		if ack && seg.ack != f.guestISS+1 {
			return errors.New("SYN-ACK acknowledges something else")
		}
		return nil
	}
	if i := slices.IndexFunc(f.syns, begins); i >= 0 {
		f.begin(&f.syns[i])
	}
	if !ack {
		*f = flowCheck{queue: f.queue, past: f.past}
	}
	f.syns = nil
	f.spoke, f.iss, f.max = true, seg.seq, seg.seq+1
	f.guestAck, f.guestEdge = seg.seq, seg.seq+1
	if _, ok := seg.option(2); !ok {
		return errors.New("SYN without MSS")
	}
	v, scaled := seg.option(3)
	_, f.sack = seg.option(4)
	_, f.stamps = seg.option(8)
	if scaled {
		f.scale = v[0]
		if f.scale > 14 {
			return errors.New("window scale")
		}
	}
	if ack {
		if !f.heard || seg.ack != f.guestISS+1 {
			return errors.New("SYN-ACK acknowledges what was not sent")
		}
		if scaled != f.guestOpts[3] || f.sack != f.guestOpts[4] || f.stamps != f.guestOpts[8] {
			return errors.New("options that were not offered, or not taken")
		}
		f.ack, f.edge = seg.ack, seg.ack+uint32(seg.win)
	}
	return nil
}

// checkAck checks what a segment says of the guest's data.
func (f *flowCheck) checkAck(seg *segment) error {
	if !f.heard {
		return errors.New("acknowledges a guest that said nothing")
	}
	if int32(seg.ack-f.guestMax) > 0 || int32(seg.ack-f.guestISS) <= 0 {
		return fmt.Errorf("acknowledges what was not sent: guest is at %d", f.guestMax)
	}
	scale := f.scale
	if !f.guestOpts[3] {
		scale = 0
	}
	edge := seg.ack + uint32(seg.win)<<scale
	if f.ack != 0 || f.edge != 0 { // not at the first ACK of an active open
		if int32(seg.ack-f.ack) < 0 {
			return fmt.Errorf("ACK goes back from %d", f.ack)
		}
		if int32(edge-f.edge) < 0 {
			return fmt.Errorf("window edge is pulled back by %d", f.edge-edge)
		}
	}
	f.ack, f.edge = seg.ack, edge
	_, stamps := seg.option(8)
	if stamps != (f.stamps && f.guestOpts[8]) {
		return errors.New("timestamps present or absent against the agreement")
	}
	if v, ok := seg.option(5); ok {
		if !f.sack || !f.guestOpts[4] {
			return errors.New("SACK was not agreed upon")
		}
		if len(v)%8 != 0 || len(v) == 0 {
			return errors.New("SACK length")
		}
		for ; len(v) > 0; v = v[8:] {
			l, r := binary.BigEndian.Uint32(v), binary.BigEndian.Uint32(v[4:])
			old := int32(r-seg.ack) <= 0 // a duplicate, RFC 2883
			if int32(r-l) <= 0 || !old && int32(r-f.guestMax) > 0 {
				return errors.New("SACK block")
			}
		}
	}
	return nil
}

// checkData checks where the data of a segment lies, and that what was sent
// once stays the same.
func (f *flowCheck) checkData(seg *segment) error {
	n := uint32(len(seg.payload))
	end := seg.seq + seg.length()
	probe := n == 0 && seg.flags&flagF == 0
	switch {
	case probe && seg.seq == f.guestAck-1: // of a window, or keep-alive
		return nil
	case int32(seg.seq-f.iss) <= 0 || int32(seg.seq-f.max) > 0:
		return fmt.Errorf("sequence number: at %d", f.max)
	case f.mss > 0 && int(n)+len(seg.opts) > max(f.mss, 48):
		return errors.New("above the guest's MSS")
	case n > 0 && int32(seg.seq+n-f.guestEdge) > 0:
		return fmt.Errorf("%d bytes beyond the guest's window", seg.seq+n-f.guestEdge)
	}
	if f.finSent && n > 0 && int32(seg.seq+n-f.finAt) > 0 {
		return errors.New("data behind the FIN")
	}
	if seg.flags&flagF != 0 {
		if f.finSent && f.finAt != seg.seq+n {
			return errors.New("FIN at another place")
		}
		f.finSent, f.finAt = true, seg.seq+n
	}
	if int32(end-f.max) > 0 {
		f.max = end
	}
	off := int(seg.seq - f.iss - 1)
	if off < len(f.stream) {
		held := f.stream[off:]
		k := min(len(held), int(n))
		if !bytes.Equal(held[:k], seg.payload[:k]) {
			return errors.New("sent again with other content")
		}
	}
	if off+int(n) > len(f.stream) && off <= len(f.stream) && off+int(n) <= keptStream {
		f.stream = append(f.stream[:off], seg.payload...)
	}
	return nil
}

// takeICMP waits for an ICMP message.
func (m *machine) takeICMP() icmpMessage {
	m.t.Helper()
	var msg icmpMessage
	m.wait("ICMP", patience, func() bool {
		if len(m.icmp) == 0 {
			return false
		}
		msg, m.icmp = m.icmp[0], m.icmp[1:]
		return true
	})
	return msg
}

// patience is how long a test waits for what it expects, in real or virtual time.
const patience = 20 * time.Second

// wait waits until done, which is called with m.mu held, reports true.
func (m *machine) wait(what string, limit time.Duration, done func() bool) {
	m.t.Helper()
	if !m.waitFor(limit, done) {
		m.t.Fatalf("no %s in %v", what, limit)
	}
}

func (m *machine) waitFor(limit time.Duration, done func() bool) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		m.mu.Lock()
		ok, arrive := done(), m.arrive
		m.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-arrive:
		case <-timer.C:
			return false
		}
	}
}

// quiet fails the test if the Stack emits anything for the guest within d. It is
// for bubbles.
func (m *machine) quiet(d time.Duration) {
	m.t.Helper()
	synctest.Wait()
	m.mu.Lock()
	before := m.frames
	m.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.frames != before {
		m.t.Fatalf("%d frames in %v, want none: %s", m.frames-before, d, m.pending())
	}
}

// pending describes what was emitted and not taken. The caller holds m.mu.
func (m *machine) pending() string {
	var all []string
	for id, f := range m.flows {
		for _, seg := range f.queue {
			all = append(all, fmt.Sprintf("%v: %v", id, seg))
		}
	}
	for _, msg := range m.icmp {
		all = append(all, fmt.Sprintf("ICMP %d %d", msg.typ, msg.code))
	}
	return strings.Join(all, "; ")
}

// setHook sets what runs behind the checks of each frame.
func (m *machine) setHook(f func(frame []byte) error) {
	m.mu.Lock()
	m.hook = f
	m.mu.Unlock()
}

// guest is one TCP connection of a machine, played by the test. Its sequence
// numbers and those of the stack count from 0 at the SYN.
type guest struct {
	*machine
	id    flowID
	iss   uint32 // the guest's
	irs   uint32 // the stack's
	nxt   uint32 // the next to send
	rcv   uint32 // the next to come
	win   uint16 // as it stands in the header
	scale int    // offered in the SYN; negative: not
	opts  []byte // of the SYN
	stamp bool   // every segment carries timestamps
	tsEcr uint32
}

// guestISS makes the sequence numbers of every guest wrap early in its data.
const guestISS = 0xfffffff0

// open returns a connection that has not sent anything.
func (m *machine) open(port uint16, to netip.AddrPort) *guest {
	from := families[0].guest
	if to.Addr().Is6() {
		from = families[1].guest
	}
	return m.openFrom(netip.AddrPortFrom(from, port), to)
}

func (m *machine) openFrom(from, to netip.AddrPort) *guest {
	mss := m.mtu - 40
	if to.Addr().Is6() {
		mss -= 20
	}
	return &guest{machine: m, id: flowID{from, to}, iss: guestISS, win: 65535, scale: 7, opts: append(optMSS(mss), optScale(7)...)}
}

// raw sends a segment with relative numbers.
func (g *guest) raw(flags string, seq, ack uint32, opts, payload []byte) error {
	seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + seq, flags: parseFlags(flags), win: g.win, opts: opts, payload: payload}
	if seg.flags&flagA != 0 {
		seg.ack = g.irs + ack
	}
	return g.give(seg)
}

// give sends a segment as it is.
func (g *guest) give(seg segment) error {
	g.mu.Lock()
	f := g.flow(g.id)
	f.offered(&seg)
	f.inRST = seg.flags&flagR != 0
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		f.inRST = false
		g.mu.Unlock()
	}()
	packet := seg.packet()
	if g.ttl != 0 {
		packet = withTTL(packet, g.ttl)
	}
	return g.send(packet)
}

func (g *guest) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatalf("HandlePacket: %v", err)
	}
}

// say sends a segment at the place where the connection is.
func (g *guest) say(flags string, payload ...byte) {
	g.t.Helper()
	g.must(g.raw(flags, g.nxt, g.rcv, g.stamps(), payload))
	f := parseFlags(flags)
	g.nxt += uint32(len(payload)) + uint32(f&flagF) + uint32(f&flagS>>1)
}

func (g *guest) stamps() []byte {
	if !g.stamp {
		return nil
	}
	return optStamps(uint32(time.Now().UnixMilli()), g.tsEcr)
}

func (g *guest) syn() {
	g.t.Helper()
	g.nxt, g.rcv = 0, 0
	g.must(g.raw("S", 0, 0, g.opts, nil))
	g.nxt = 1
}
func (g *guest) ack()             { g.t.Helper(); g.say(".") }
func (g *guest) data(text string) { g.t.Helper(); g.say("P.", []byte(text)...) }
func (g *guest) fin()             { g.t.Helper(); g.say("F.") }
func (g *guest) rst()             { g.t.Helper(); g.say("R.") }

// connect does the handshake. The sequence numbers of both sides wrap early in the
// data, those of the stack if it has no other flow.
func (g *guest) connect() {
	g.t.Helper()
	if st := g.s.Stats(); !g.ownISS && st.TCPFlows|st.UDPFlows|st.TimeWait == 0 {
		g.wrapStack()
	}
	g.syn()
	g.expect("S.")
	g.ack()
}

// expect waits for the next segment of the connection, which must have these
// flags; P is left out of the comparison unless it is asked for.
func (g *guest) expect(flags string) segment {
	g.t.Helper()
	return g.expectWithin(patience, flags)
}

func (g *guest) expectWithin(limit time.Duration, flags string) segment {
	g.t.Helper()
	seg, ok := g.next(limit)
	if !ok {
		g.t.Fatalf("no segment in %v, want %s; elsewhere: %s", limit, flags, g.pendingLocked())
	}
	g.check(seg, flags)
	return seg
}

func (g *guest) check(seg segment, flags string) {
	g.t.Helper()
	want, got := parseFlags(flags), seg.flags
	if want&flagP == 0 {
		got &^= flagP
	}
	if got != want {
		g.t.Fatalf("segment %s, want %s", g.show(seg), flags)
	}
	if seg.flags&flagS != 0 {
		g.irs = seg.seq
		g.rcv = 1
	}
	if v, ok := seg.option(8); ok {
		g.tsEcr = binary.BigEndian.Uint32(v)
	}
}

// at says where a segment lies, relative to the connection.
func (g *guest) seqOf(seg segment) uint32 { return seg.seq - g.irs }
func (g *guest) ackOf(seg segment) uint32 { return seg.ack - g.iss }

func (g *guest) show(seg segment) string {
	return fmt.Sprintf("%s %d:%d ack %d win %d %q", formatFlags(seg.flags), int32(g.seqOf(seg)), int32(g.seqOf(seg))+int32(len(seg.payload)),
		int32(g.ackOf(seg)), seg.win, seg.payload[:min(len(seg.payload), 20)])
}

func (g *guest) pendingLocked() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.pending()
}

// next waits for the next segment, whatever it is.
func (g *guest) next(limit time.Duration) (seg segment, ok bool) {
	ok = g.waitFor(limit, func() bool {
		f := g.flow(g.id)
		if len(f.queue) == 0 {
			return false
		}
		seg, f.queue = f.queue[0], f.queue[1:]
		return true
	})
	return seg, ok
}

// silent fails the test if a segment of the connection is waiting or arrives
// within d. It is for bubbles.
func (g *guest) silent(d time.Duration) {
	g.t.Helper()
	synctest.Wait()
	if seg, ok := g.next(d); ok {
		g.t.Fatalf("segment %s, want none", g.show(seg))
	}
}

// drop forgets the segments that were emitted and not taken.
func (g *guest) drop() []segment {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.flow(g.id)
	q := f.queue
	f.queue = nil
	return q
}

// expectACK waits for an ACK of everything sent, and skips earlier ones.
func (g *guest) expectACK() segment {
	g.t.Helper()
	for {
		seg := g.expect(".")
		if len(seg.payload) > 0 {
			g.t.Fatalf("segment %s, want an ACK", g.show(seg))
		}
		if g.ackOf(seg) == g.nxt {
			return seg
		}
	}
}

// expectText waits for text, in however many segments, and acknowledges it.
func (g *guest) expectText(text string) {
	g.t.Helper()
	if got := g.take(len(text)); string(got) != text {
		g.t.Fatalf("got %q, want %q", got, text)
	}
}

// take waits for n bytes, acknowledging every second segment at once and others
// after 40 ms.
func (g *guest) take(n int) []byte {
	g.t.Helper()
	data := make([]byte, 0, n)
	owed := 0
	for len(data) < n {
		limit := patience
		if owed > 0 {
			limit = 40 * time.Millisecond
		}
		seg, ok := g.next(limit)
		switch {
		case !ok && owed > 0:
			g.ack()
			owed = 0
			continue
		case !ok:
			g.t.Fatalf("%d of %d bytes, then nothing", len(data), n)
		}
		if seg.flags&(flagS|flagR|flagA) != flagA {
			g.t.Fatalf("%d of %d bytes, then %s", len(data), n, g.show(seg))
		}
		if len(seg.payload) == 0 && seg.flags&flagF == 0 {
			continue
		}
		if g.seqOf(seg) != g.rcv {
			if int32(g.seqOf(seg)-g.rcv) > 0 {
				g.t.Fatalf("a hole: at %d comes %s", g.rcv, g.show(seg))
			}
			g.ack()
			continue
		}
		if seg.flags&flagF != 0 && len(data)+len(seg.payload) < n {
			g.t.Fatalf("end after %d of %d bytes", len(data)+len(seg.payload), n)
		}
		data = append(data, seg.payload...)
		g.rcv += uint32(len(seg.payload))
		if seg.flags&flagF != 0 {
			// Left for expectFIN.
			seg.seq, seg.payload = seg.seq+uint32(len(seg.payload)), nil
			g.mu.Lock()
			f := g.flow(g.id)
			f.queue = append([]segment{seg}, f.queue...)
			g.mu.Unlock()
		}
		if owed++; owed == 2 || len(data) >= n {
			g.ack()
			owed = 0
		}
	}
	if len(data) > n {
		g.t.Fatalf("%d bytes, want %d", len(data), n)
	}
	return data
}

// expectFIN waits for the end of the stack's data, and acknowledges it.
func (g *guest) expectFIN() segment {
	g.t.Helper()
	for {
		seg, ok := g.next(patience)
		if !ok {
			g.t.Fatal("no FIN")
		}
		if seg.flags&(flagF|flagS|flagR|flagA) == flagA && len(seg.payload) == 0 {
			continue
		}
		g.check(seg, "F.")
		if len(seg.payload) > 0 || g.seqOf(seg) != g.rcv {
			g.t.Fatalf("segment %s, want a FIN at %d", g.show(seg), g.rcv)
		}
		g.rcv++
		g.ack()
		return seg
	}
}

// expectRST waits for a reset, and skips ACKs.
func (g *guest) expectRST() segment {
	g.t.Helper()
	for {
		seg, ok := g.next(patience)
		if !ok {
			g.t.Fatal("no reset")
		}
		if seg.flags&flagR != 0 {
			return seg
		}
		if seg.flags&(flagS|flagF) != 0 {
			g.t.Fatalf("segment %s, want a reset", g.show(seg))
		}
	}
}

// upload sends data as a machine does that keeps to the window of the stack.
func (g *guest) upload(data []byte) {
	g.t.Helper()
	mss := g.mtu - 60
	if g.id.host.Addr().Is6() {
		mss -= 20
	}
	g.mu.Lock()
	f := g.flow(g.id)
	edge, acked := f.edge, f.ack
	g.mu.Unlock()
	base := g.nxt
	for len(data) > 0 || acked-g.iss != g.nxt {
		for len(data) > 0 && int32(edge-(g.iss+g.nxt)) > 0 {
			n := min(len(data), mss, int(edge-(g.iss+g.nxt)))
			g.say("P.", data[:n]...)
			data = data[n:]
			g.mu.Lock()
			edge, acked = f.edge, f.ack
			g.mu.Unlock()
		}
		if len(data) == 0 && acked-g.iss == g.nxt {
			break
		}
		ok := g.waitFor(patience, func() bool {
			moved := f.edge != edge || f.ack != acked
			edge, acked = f.edge, f.ack
			return moved || len(f.queue) > 0 && f.queue[len(f.queue)-1].flags&flagR != 0
		})
		if !ok {
			g.t.Fatalf("upload is stuck at %d, acknowledged %d, window to %d", g.nxt-base, acked-g.iss-base, edge-g.iss-base)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var rest []segment
	for _, seg := range f.queue {
		switch {
		case seg.flags&flagR != 0:
			g.t.Fatalf("segment %s during an upload", g.show(seg))
		case len(seg.payload) > 0 || seg.flags&flagF != 0:
			rest = append(rest, seg)
		}
	}
	f.queue = rest
}

// wrapStack makes the sequence numbers of the stack wrap early in the data of
// the connection, if it begins now.
func (g *guest) wrapStack() {
	iss := g.s.tcbConfig(g.key(), g.s.now(), nil).ISS
	const want = 0xffffffe0
	g.s.isnEpoch = g.s.isnEpoch.Add(-time.Duration(want-iss) * 4 * time.Microsecond)
}

// key returns the name of the flow in the stack's table.
func (g *guest) key() *flowKey {
	v := uint16(4)
	if g.id.host.Addr().Is6() {
		v = 6
	}
	return &flowKey{g.ns, g.id.guest.Addr().As16(), g.id.host.Addr().As16(), g.id.guest.Port(), g.id.host.Port(), protoTCP, v}
}

// pattern returns n bytes that tell where they belong.
func pattern(n int) []byte {
	b := make([]byte, n)
	x := uint32(2463534242)
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}

// hostNet is the network on the host's side, in memory. It uses channels and
// condition variables only, so that it works in virtual time.
type hostNet struct {
	t      testing.TB
	mu     sync.Mutex
	calls  []dialCall
	onDial func(ctx context.Context, f Flow) (net.Conn, error) // nil: connect
	conns  chan *hostConn                                      // the server's ends
	buffer int                                                 // bytes that a connection holds in each direction
}

type dialCall struct {
	network, address string
	flow             Flow
	at               time.Time
}

func newHostNet(t testing.TB) *hostNet {
	return &hostNet{t: t, conns: make(chan *hostConn, 10000), buffer: 64 << 10}
}

// dial is a Config.Dial.
func (h *hostNet) dial(ctx context.Context, network, address string) (net.Conn, error) {
	f, ok := FlowFromContext(ctx)
	if !ok {
		h.t.Error("Dial without a Flow in its context")
	}
	h.mu.Lock()
	h.calls = append(h.calls, dialCall{network, address, f, time.Now()})
	on := h.onDial
	h.mu.Unlock()
	if on != nil {
		return on(ctx, f)
	}
	return h.connect(), nil
}

// connect makes a connection, gives the server's end to accept, and returns the
// other.
func (h *hostNet) connect() *hostConn {
	c, s := newHostConns(h.buffer)
	h.conns <- s
	return c
}

func (h *hostNet) setDial(f func(ctx context.Context, f Flow) (net.Conn, error)) {
	h.mu.Lock()
	h.onDial = f
	h.mu.Unlock()
}

// accept returns the server's end of the next connection.
func (h *hostNet) accept() *hostConn {
	h.t.Helper()
	select {
	case c := <-h.conns:
		return c
	case <-time.After(patience):
		h.t.Fatal("no connection on the host")
		return nil
	}
}

func (h *hostNet) dials() []dialCall {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls
}

// refuse is a Dial that fails.
func refuse(err error) func(context.Context, Flow) (net.Conn, error) {
	return func(context.Context, Flow) (net.Conn, error) { return nil, err }
}

// hang is a Dial that waits for its context.
func hang(ctx context.Context, _ Flow) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// dialError is an error as a net.Dialer returns it.
func dialError(errno syscall.Errno) error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
}

// hostConn is one end of a connection between two hosts, with the buffers of a
// socket.
type hostConn struct {
	in, out *hostPipe
	peer    *hostConn
	pair    *hostPair

	// Guarded by pair.mu.
	closed  bool
	linger  int // -1: not set
	wasOut  bool
	readErr error // set by a test: what Read fails with, and Write
	wrErr   error
}

// hostPair is what the two ends share.
type hostPair struct {
	mu    sync.Mutex
	cond  sync.Cond
	reset bool // by either end
}

// hostPipe is one direction.
type hostPipe struct {
	buf    []byte
	size   int
	ended  bool // by CloseWrite or Close of the writer
	unread bool // the reader is gone
}

func newHostConns(size int) (a, b *hostConn) {
	p := new(hostPair)
	p.cond.L = &p.mu
	x, y := &hostPipe{size: size}, &hostPipe{size: size}
	a = &hostConn{in: x, out: y, pair: p, linger: -1}
	b = &hostConn{in: y, out: x, pair: p, linger: -1}
	a.peer, b.peer = b, a
	return a, b
}

func (c *hostConn) Read(b []byte) (int, error) {
	p := c.pair
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.readErr != nil:
			return 0, c.readErr
		case p.reset:
			return 0, &net.OpError{Op: "read", Net: "tcp", Err: os.NewSyscallError("read", syscall.ECONNRESET)}
		case len(c.in.buf) > 0:
			n := copy(b, c.in.buf)
			c.in.buf = c.in.buf[n:]
			p.cond.Broadcast()
			return n, nil
		case c.in.ended:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

func (c *hostConn) Write(b []byte) (n int, err error) {
	p := c.pair
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(b) > 0 {
		switch {
		case c.closed:
			return n, net.ErrClosed
		case c.wrErr != nil:
			return n, c.wrErr
		case p.reset, c.out.ended, c.out.unread:
			return n, &net.OpError{Op: "write", Net: "tcp", Err: os.NewSyscallError("write", syscall.EPIPE)}
		}
		k := min(len(b), c.out.size-len(c.out.buf))
		if k <= 0 {
			p.cond.Wait()
			continue
		}
		c.out.buf = append(c.out.buf, b[:k]...)
		b, n = b[k:], n+k
		p.cond.Broadcast()
	}
	return n, nil
}

func (c *hostConn) CloseWrite() error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.out.ended, c.wasOut = true, true
	c.pair.cond.Broadcast()
	return nil
}

func (c *hostConn) SetLinger(sec int) error {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.linger = sec
	return nil
}

func (c *hostConn) Close() error {
	p := c.pair
	p.mu.Lock()
	defer p.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed = true
	if c.linger == 0 || len(c.in.buf) > 0 {
		p.reset = true
	}
	c.out.ended, c.in.unread = true, true
	p.cond.Broadcast()
	return nil
}

// abort resets the connection.
func (c *hostConn) abort() {
	c.SetLinger(0)
	c.Close()
}

// failing sets what Write and Read of this end return from now on.
func (c *hostConn) failing(write, read error) {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	c.wrErr, c.readErr = write, read
	c.pair.cond.Broadcast()
}

// state describes the end in a word: open, half (its CloseWrite was called),
// closed, or reset.
func (c *hostConn) state() string {
	c.pair.mu.Lock()
	defer c.pair.mu.Unlock()
	switch {
	case c.closed && c.linger == 0:
		return "reset"
	case c.closed:
		return "closed"
	case c.wasOut:
		return "half"
	}
	return "open"
}

// expectState waits until the stack's end of the connection is in a state.
func (c *hostConn) expectState(t testing.TB, want string) {
	t.Helper()
	timer := time.AfterFunc(patience, func() { c.pair.cond.Broadcast() })
	defer timer.Stop()
	end := time.Now().Add(patience)
	for {
		got := c.peer.state()
		if got == want {
			return
		}
		c.pair.mu.Lock()
		if time.Now().After(end) || !time.Now().Before(end) {
			c.pair.mu.Unlock()
			t.Fatalf("the stack's end on the host is %s, want %s", got, want)
		}
		if c.peer.stateLocked() == got {
			c.pair.cond.Wait()
		}
		c.pair.mu.Unlock()
	}
}

func (c *hostConn) stateLocked() string {
	switch {
	case c.closed && c.linger == 0:
		return "reset"
	case c.closed:
		return "closed"
	case c.wasOut:
		return "half"
	}
	return "open"
}

func (c *hostConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c *hostConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c *hostConn) SetDeadline(time.Time) error      { return nil }
func (c *hostConn) SetReadDeadline(time.Time) error  { return nil }
func (c *hostConn) SetWriteDeadline(time.Time) error { return nil }

// expectText reads text from a connection.
func expectText(t testing.TB, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q, %v; want %q", b[:n], err, text)
	}
}

// expectEOF reads the end of a connection.
func expectEOF(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 100)); n != 0 || err != io.EOF {
		t.Fatalf("read %d, %v; want EOF", n, err)
	}
}

// expectErr reads an error from a connection.
func expectErr(t testing.TB, c net.Conn, want error) {
	t.Helper()
	if n, err := c.Read(make([]byte, 100)); n != 0 || !errors.Is(err, want) {
		t.Fatalf("read %d, %v; want %v", n, err, want)
	}
}

// putText writes text to a connection.
func putText(t testing.TB, c net.Conn, text string) {
	t.Helper()
	if _, err := c.Write([]byte(text)); err != nil {
		t.Fatalf("write: %v", err)
	}
}

// expectFlows waits until the Stack has so many TCP flows, TIME-WAIT apart.
func (m *machine) expectFlows(n int) {
	m.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		st := m.s.Stats()
		if st.TCPFlows == n {
			return
		}
		if time.Now().After(end) {
			m.t.Fatalf("%d TCP flows, want %d", st.TCPFlows, n)
		}
	}
}

// farEnd is whom a guest talks to: a server on the host's network, or one that
// has the connection from a Listener.
type farEnd interface {
	net.Conn
	CloseWrite() error
	SetLinger(sec int) error
}

var (
	_ farEnd = (*hostConn)(nil)
	_ farEnd = (*VirtualConn)(nil)
)

// eachEnd runs a test in virtual time for both families, each with a connection
// through the NAT, to a guest without and with a virtio_net_hdr, and one to a listener.
func eachEnd(t *testing.T, cfg Config, f func(t *testing.T, g *guest, far farEnd)) {
	eachRig(t, cfg, func(t *testing.T, m *machine, dial func(g *guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.wrapStack()
		f(t, g, dial(g))
	})
}

// eachRig is eachEnd for tests that connect by themselves: dial does a handshake
// and returns the far end.
func eachRig(t *testing.T, cfg Config, f func(t *testing.T, m *machine, dial func(g *guest) farEnd, to netip.AddrPort)) {
	nat := func(t *testing.T, fam family, cfg Config) {
		m, h := newRig(t, cfg)
		f(t, m, func(g *guest) farEnd {
			t.Helper()
			g.connect()
			return h.accept()
		}, fam.at(80))
	}
	inBubble(t, func(t *testing.T, fam family) { nat(t, fam, cfg) })
	eachFamily(t, func(t *testing.T, fam family) {
		t.Run("virtio", func(t *testing.T) {
			cfg := cfg
			cfg.VirtioNetHeader = true
			synctest.Test(t, func(t *testing.T) { nat(t, fam, cfg) })
		})
		t.Run("listener", func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, _ := newRig(t, cfg)
				l := mustListen(t, m.s, "tcp", fam.at(80).String())
				f(t, m, func(g *guest) farEnd {
					t.Helper()
					g.connect()
					return mustAccept(t, l)
				}, fam.at(80))
			})
		})
	})
}

func mustListen(t testing.TB, s *Stack, network, address string) net.Listener {
	t.Helper()
	l, err := s.Listen(network, address)
	if err != nil {
		t.Fatalf("Listen(%q, %q): %v", network, address, err)
	}
	return l
}

func mustAccept(t testing.TB, l net.Listener) *VirtualConn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatalf("Accept: %v", err)
	}
	return c.(*VirtualConn)
}
