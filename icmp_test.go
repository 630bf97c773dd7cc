package slirp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/KarpelesLab/slirp/internal/sum"
)

// icmpHarness is a Stack, and the frames that its ICMP code sends.
type icmpHarness struct {
	*testing.T
	s      *Stack
	l      link
	frames [][]byte
	err    error // what the Writer returns
}

func newICMPHarness(t *testing.T, cfg Config) *icmpHarness {
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	h := &icmpHarness{T: t, s: s, l: testLink}
	h.l.w = func(frame []byte) error {
		h.frames = append(h.frames, frame)
		return h.err
	}
	return h
}

// send gives a packet to handleICMP, with the checks that come before it, and
// then scribbles over it.
func (h *icmpHarness) send(packet []byte) {
	h.Helper()
	var p ipPacket
	b := append([]byte(nil), packet...)
	if err := parseIP(b, &p); err != nil {
		h.Fatal(err)
	}
	if p.fragment || p.badChecksum || p.malformed {
		h.Fatalf("%+v does not get to handleICMP", p)
	}
	if err := h.s.handleICMP(&p, &h.l); err != h.err {
		h.Fatalf("handleICMP: %v, want %v", err, h.err)
	}
	for i := range b {
		b[i] = 0xa5
	}
}

// want returns the one datagram that was sent.
func (h *icmpHarness) want() ipPacket {
	h.Helper()
	p := mustReassemble(h, h.frames, h.s.cfg.MTU)
	h.frames = nil
	return p
}

func (h *icmpHarness) wantNothing() {
	h.Helper()
	if len(h.frames) != 0 {
		h.Fatalf("answered with %x", h.frames[0])
	}
}

// withChecksum completes the checksum of the transport header at off of a packet.
func withChecksum(packet []byte, off int) []byte {
	var p ipPacket
	if err := parseIP(packet, &p); err != nil {
		panic(err)
	}
	b := append([]byte(nil), packet...)
	field := b[off+checksumOffset(p.proto):][:2]
	field[0], field[1] = 0, 0
	var pseudo []byte
	if p.proto != protoICMP {
		pseudo = naivePseudo(p.version, p.src, p.dst, p.proto, len(b)-off)
	}
	binary.BigEndian.PutUint16(field, ^sum.Of(append(pseudo, b[off:]...), 0))
	return b
}

const echoBody = "\x00\x00\x00\x00\x12\x34\x00\x07" // identifier 1234, sequence 7

// echoTests has an echo request without a payload of each family.
var echoTests = []struct {
	name          string
	packet        func(body ...any) []byte
	off           int // of the ICMP header
	request       byte
	reply         byte
	proto         uint8
	multicast     []byte
	srcOff        int
	dstOff, toLen int
	partial       bool // the pseudo-header sum alone is a checksum
}{
	{"v4", func(b ...any) []byte { return ip4(1, b...) }, 20, 8, 0, 1, []byte{224, 0, 0, 1}, 12, 16, 4, false},
	{"v6", func(b ...any) []byte { return ip6(58, b...) }, 40, 128, 129, 58, ipBytes(0xff, 0x02, make([]byte, 13), 1), 8, 24, 16, true},
}

func TestEcho(t *testing.T) {
	for _, tt := range echoTests {
		for _, mtu := range []int{1280, 1500, 65535} {
			for _, n := range []int{0, 1, 56, 57, 1431, 1432, 1433, 1472, 1473, 9000, 65507} {
				t.Run(fmt.Sprintf("%s/mtu%d/%d", tt.name, mtu, n), func(t *testing.T) {
					h := newICMPHarness(t, Config{MTU: mtu})
					payload := make([]byte, n)
					for i := range payload {
						payload[i] = byte(i * 31)
					}
					req := withChecksum(tt.packet(patched([]byte(echoBody), 0, tt.request), payload), tt.off)
					h.send(req)
					p := h.want()
					var q ipPacket
					if err := parseIP(req, &q); err != nil {
						t.Fatal(err)
					}
					if p.src != q.dst || p.dst != q.src || p.version != q.version || p.proto != tt.proto || p.ttl != 64 {
						t.Errorf("%v > %v proto %d ttl %d", p.src.addr(), p.dst.addr(), p.proto, p.ttl)
					}
					if m := p.payload; m[0] != tt.reply || m[1] != 0 || string(m[4:8]) != "\x12\x34\x00\x07" || !bytes.Equal(m[8:], payload) {
						t.Errorf("message % x… of %d bytes", m[:8], len(m))
					}
				})
			}
		}
	}
}

func TestEchoChecksums(t *testing.T) {
	for _, tt := range echoTests {
		t.Run(tt.name, func(t *testing.T) {
			h := newICMPHarness(t, Config{})
			req := withChecksum(tt.packet(patched([]byte(echoBody), 0, tt.request), "ping"), tt.off)
			field := tt.off + 2

			h.send(patched(req, field, 0, 0))
			h.want()

			var p ipPacket
			if err := parseIP(req, &p); err != nil {
				t.Fatal(err)
			}
			partial := sum.Of(naivePseudo(p.version, p.src, p.dst, p.proto, len(p.payload)), 0)
			h.send(patched(req, field, byte(partial>>8), byte(partial)))
			if tt.partial {
				h.want()
			}
			h.wantNothing()

			for _, off := range []int{field, field + 1, tt.off + 5, len(req) - 1} {
				h.send(patched(req, off, req[off]^0x40))
				h.wantNothing()
			}
			h.send(ipBytes(patched(req, field, req[field]), make([]byte, 20), "Ethernet padding"))
			if p := h.want(); string(p.payload[8:]) != "ping" {
				t.Errorf("padding came back: %q", p.payload[8:])
			}
		})
	}
}

func TestEchoUnanswered(t *testing.T) {
	for _, tt := range echoTests {
		t.Run(tt.name, func(t *testing.T) {
			h := newICMPHarness(t, Config{})
			req := tt.packet(patched([]byte(echoBody), 0, tt.request), "ping")
			zero := make([]byte, tt.toLen)
			for name, packet := range map[string][]byte{
				"to a multicast address":     patched(req, tt.dstOff, tt.multicast...),
				"to the unspecified address": patched(req, tt.dstOff, zero...),
				"from a multicast address":   patched(req, tt.srcOff, tt.multicast...),
				"from nowhere":               patched(req, tt.srcOff, zero...),
				"a reply":                    patched(req, tt.off, tt.reply),
				"an unknown type":            patched(req, tt.off, 200),
				"the other family's type":    patched(req, tt.off, 136-tt.request),
				"an error":                   patched(req, tt.off, 3),
			} {
				h.send(packet)
				if len(h.frames) != 0 {
					t.Errorf("%s: answered", name)
					h.frames = nil
				}
			}
			for n := range 8 {
				h.send(tt.packet(patched([]byte(echoBody), 0, tt.request)[:n]))
				h.wantNothing()
			}
		})
	}
	h := newICMPHarness(t, Config{})
	h.send(patched(ip4(1, patched([]byte(echoBody), 0, 8)), 16, 255, 255, 255, 255))
	h.wantNothing()
	// The ICMP of one family in the other.
	h.send(ip4(58, patched([]byte(echoBody), 0, 128)))
	h.wantNothing()
	h.send(ip6(1, patched([]byte(echoBody), 0, 8)))
	h.wantNothing()
	// Loopback addresses are as good as any.
	h.send(patched(ip4(1, patched([]byte(echoBody), 0, 8)), 12, 127, 0, 0, 1, 127, 0, 0, 1))
	h.want()
	// Behind extension headers.
	h.send(ip6(0, extHeader(60, 0), extHeader(58, 0), patched([]byte(echoBody), 0, 128)))
	h.want()
}

func TestEchoWriterError(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range echoTests {
		h := newICMPHarness(t, Config{})
		h.err = broken
		h.send(tt.packet(patched([]byte(echoBody), 0, tt.request), make([]byte, 5000)))
		if len(h.frames) != 1 {
			t.Errorf("%s: %d frames, after the first one failed", tt.name, len(h.frames))
		}
	}
}

// solicit is a neighbour solicitation from fd00::15 for a target, to its
// solicited-node group, with a source link-layer option.
func solicit(target string) []byte {
	a := testAddr(target)
	b := ip6(58, ICMPv6TypeNeighborSolicitation, make([]byte, 7), a[:], 1, 1, testLink.guest[:])
	b[7] = 255
	return patched(b, 24, ipBytes(0xff, 2, make([]byte, 9), 1, 0xff, a[13:])...)
}

func TestNeighborSolicitation(t *testing.T) {
	whole := solicit("fd00::2")
	noOptions := append([]byte(nil), whole[:64]...)
	noOptions[5] = 24
	unicast := patched(whole, 24, whole[48:64]...)
	for _, tt := range []struct {
		name   string
		packet []byte
		target string
	}{
		{"the gateway", whole, "fd00::2"},
		{"with a checksum", withChecksum(whole, 40), "fd00::2"},
		{"any address", solicit("2001:db8::77"), "2001:db8::77"},
		{"link-local", solicit("fe80::1"), "fe80::1"},
		{"to the target itself", unicast, "fd00::2"},
		{"to all nodes", patched(whole, 24, ipBytes(0xff, 2, make([]byte, 13), 1)...), "fd00::2"},
		{"no options", noOptions, "fd00::2"},
		{"unknown option", patched(whole, 64, 200), "fd00::2"},
		{"reserved field set", patched(whole, 44, 0xff, 0xff, 0xff, 0xff), "fd00::2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := newICMPHarness(t, Config{})
			h.send(tt.packet)
			p := h.want()
			if p.src != testAddr(tt.target) || p.dst != testAddr("fd00::15") || p.ttl != 255 || p.proto != 58 {
				t.Errorf("%v > %v hop limit %d proto %d", p.src.addr(), p.dst.addr(), p.ttl, p.proto)
			}
			a := testAddr(tt.target)
			want := ipBytes(
				136, 0, p.payload[2:4], // type, code, checksum (checked above)
				0x60, 0, 0, 0, // solicited, override
				a[:],
				2, 1, testLink.gw[:]) // target link-layer address
			if !bytes.Equal(p.payload, want) {
				t.Errorf("advertisement\n% x, want\n% x", p.payload, want)
			}
		})
	}
}

func TestNeighborSolicitationDropped(t *testing.T) {
	whole := solicit("fd00::2")
	short := func(n int) []byte {
		b := append([]byte(nil), whole[:40+n]...)
		b[5] = byte(n)
		return b
	}
	for name, packet := range map[string][]byte{
		"hop limit 254":              patched(whole, 7, 254),
		"hop limit 64":               patched(whole, 7, 64),
		"hop limit 0":                patched(whole, 7, 0),
		"code 1":                     patched(whole, 41, 1),
		"wrong checksum":             patched(whole, 42, 0x12, 0x34),
		"8 bytes":                    short(8),
		"23 bytes":                   short(23),
		"multicast target":           solicit("ff02::1"),
		"unspecified target":         solicit("::"),
		"option of length 0":         patched(whole, 65, 0),
		"option beyond the end":      patched(whole, 65, 2),
		"half an option":             short(28),
		"one byte of an option":      short(25),
		"multicast source":           patched(whole, 8, 0xff),
		"router solicitation":        patched(whole, 40, ICMPv6TypeRouterSolicitation),
		"router advertisement":       patched(whole, 40, ICMPv6TypeRouterAdvertisement),
		"neighbour advertisement":    patched(whole, 40, ICMPv6TypeNeighborAdvertisement),
		"DAD with a source option":   patched(whole, 8, make([]byte, 16)...),
		"DAD for a free address":     dadFor("fd00::15"),
		"DAD, hop limit 64":          patched(patched(short(24), 8, make([]byte, 16)...), 7, 64),
		"a redirect":                 patched(whole, 40, icmpv6Redirect),
		"a type nobody has heard of": patched(whole, 40, 255),
	} {
		h := newICMPHarness(t, Config{})
		h.send(packet)
		if len(h.frames) != 0 {
			t.Errorf("%s: answered", name)
		}
	}
}

// dadFor is the duplicate address detection for a target: a solicitation without
// options from the unspecified address.
func dadFor(target string) []byte {
	b := patched(solicit(target), 8, make([]byte, 16)...)[:64]
	b[5] = 24
	return b
}

func TestDuplicateAddressDetection(t *testing.T) {
	h := newICMPHarness(t, Config{Addresses: []netip.Addr{netip.MustParseAddr("fd00::2"), netip.MustParseAddr("10.0.2.2"), netip.MustParseAddr("fe80::2")}})
	for _, free := range []string{"fd00::15", "fe80::15", "::1", "2001:db8::1"} {
		h.send(dadFor(free))
		h.wantNothing()
	}
	for _, own := range []string{"fd00::2", "fe80::2"} {
		h.send(dadFor(own))
		p := h.want()
		if p.src != testAddr(own) || p.dst != testAddr("ff02::1") || p.ttl != 255 {
			t.Errorf("%v > %v hop limit %d", p.src.addr(), p.dst.addr(), p.ttl)
		}
		a := testAddr(own)
		if want := ipBytes(136, 0, p.payload[2:4], 0x20, 0, 0, 0, a[:], 2, 1, testLink.gw[:]); !bytes.Equal(p.payload, want) {
			t.Errorf("advertisement\n% x, want\n% x", p.payload, want)
		}
	}
}

// unreachableTests has every kind in both families.
var unreachableTests = []struct {
	kind    unreachable
	version uint16
	typ     byte
	code    byte
	src     string
}{
	{unreachablePort, 4, 3, 3, "192.0.2.1"},
	{unreachableHost, 4, 3, 1, "10.0.2.2"},
	{unreachableNet, 4, 3, 0, "10.0.2.2"},
	{unreachableProhibited, 4, 3, 13, "10.0.2.2"},
	{unreachablePort, 6, 1, 4, "2001:db8::1"},
	{unreachableHost, 6, 1, 3, "fd00::2"},
	{unreachableNet, 6, 1, 0, "fd00::2"},
	{unreachableProhibited, 6, 1, 1, "fd00::2"},
}

func quotedPacket(version uint16, n int) []byte {
	payload := make([]byte, n)
	for i := range payload {
		payload[i] = byte(i * 13)
	}
	if version == 4 {
		return ip4(17, udpHello[:4], (n+8)>>8, (n + 8), 0, 0, payload)
	}
	return ip6(17, udpHello[:4], (n+8)>>8, (n + 8), 0, 0, payload)
}

func TestUnreachable(t *testing.T) {
	for _, tt := range unreachableTests {
		limit := map[uint16]int{4: 576 - 28, 6: 1280 - 48}[tt.version]
		for _, n := range []int{0, 5, 400, limit - 48, limit - 28, limit, limit + 1, 1400, 30000} {
			packet := quotedPacket(tt.version, n)
			h := newICMPHarness(t, Config{})
			given := append([]byte(nil), packet...)
			if err := h.s.sendUnreachable(tt.kind, given, &h.l); err != nil {
				t.Fatal(err)
			}
			clear(given)
			p := h.want()
			guest := map[uint16]string{4: "10.0.2.15", 6: "fd00::15"}[tt.version]
			if p.src != testAddr(tt.src) || p.dst != testAddr(guest) || p.ttl != 64 || p.proto != icmpProto(tt.version) {
				t.Errorf("v%d kind %d: %v > %v ttl %d proto %d", tt.version, tt.kind, p.src.addr(), p.dst.addr(), p.ttl, p.proto)
			}
			want := ipBytes(int(tt.typ), int(tt.code), p.payload[2:4], 0, 0, 0, 0, packet[:min(len(packet), limit)])
			if !bytes.Equal(p.payload, want) {
				t.Errorf("v%d kind %d, about %d bytes: %d bytes, want %d\n% x", tt.version, tt.kind, len(packet), len(p.payload), len(want), p.payload[:min(64, len(p.payload))])
			}
		}
	}
}

// The quoted packet may be cut, or followed by padding.
func TestUnreachableQuote(t *testing.T) {
	for _, version := range []uint16{4, 6} {
		packet := quotedPacket(version, 100)
		header := ipHeaderLen(version)
		for n := 0; n <= len(packet); n++ {
			h := newICMPHarness(t, Config{})
			if err := h.s.sendUnreachable(unreachablePort, packet[:n], &h.l); err != nil {
				t.Fatal(err)
			}
			if n < header {
				h.wantNothing()
				continue
			}
			if p := h.want(); !bytes.Equal(p.payload[8:], packet[:n]) {
				t.Fatalf("v%d cut to %d: quotes %d bytes", version, n, len(p.payload)-8)
			}
		}
		h := newICMPHarness(t, Config{})
		if err := h.s.sendUnreachable(unreachablePort, ipBytes(packet, "padding"), &h.l); err != nil {
			t.Fatal(err)
		}
		if p := h.want(); !bytes.Equal(p.payload[8:], packet) {
			t.Errorf("v%d: quotes the padding", version)
		}
	}
}

func TestUnreachableWithoutOwnAddress(t *testing.T) {
	h := newICMPHarness(t, Config{Addresses: []netip.Addr{netip.MustParseAddr("fd00::2")}})
	if err := h.s.sendUnreachable(unreachableNet, quotedPacket(4, 8), &h.l); err != nil {
		t.Fatal(err)
	}
	if p := h.want(); p.src != testAddr("192.0.2.1") {
		t.Errorf("source %v, want the quoted destination", p.src.addr())
	}
}

func TestUnreachableNeverAbout(t *testing.T) {
	udp4, udp6 := quotedPacket(4, 8), quotedPacket(6, 8)
	icmp4 := func(typ int) []byte { return ip4(1, typ, make([]byte, 7)) }
	icmp6 := func(typ int) []byte { return ip6(58, typ, make([]byte, 7)) }
	zero := make([]byte, 16)
	for _, tt := range []struct {
		name   string
		packet []byte
		sent   bool
	}{
		{"IPv4 UDP", udp4, true},
		{"IPv6 UDP", udp6, true},
		{"IPv4 TCP", ip4(6, make([]byte, 20)), true},
		{"IPv6 TCP", ip6(6, make([]byte, 20)), true},
		{"unknown IPv4 protocol", ip4(132), true},
		{"unknown IPv6 protocol", ip6(132), true},
		{"echo request", icmp4(8), true},
		{"echo request, v6", icmp6(128), true},
		{"timestamp request", icmp4(13), true},
		{"to and from loopback", patched(udp4, 12, 127, 0, 0, 1, 127, 0, 0, 1), true},
		{"from ::1", patched(udp6, 8, testBytes("::1")...), true},
		{"first fragment", patched(udp4, 6, 0x20, 0), true},
		{"first fragment, v6", ip6(44, fragHeader(17, 0, true), udpHello), true},
		{"an ICMP type as the first UDP byte", ip4(17, 3, make([]byte, 7)), true},
		{"ICMPv6 over IPv4 is no ICMP", ip4(58, 3, make([]byte, 7)), true},

		{"empty", nil, false},
		{"no IP", make([]byte, 60), false},
		{"unreachable", icmp4(3), false},
		{"source quench", icmp4(4), false},
		{"redirect", icmp4(5), false},
		{"time exceeded", icmp4(11), false},
		{"parameter problem", icmp4(12), false},
		{"ICMP without a type", ip4(1), false},
		{"unreachable, v6", icmp6(1), false},
		{"too big, v6", icmp6(2), false},
		{"parameter problem, v6", icmp6(4), false},
		{"unknown error, v6", icmp6(127), false},
		{"redirect, v6", icmp6(137), false},
		{"ICMPv6 without a type", ip6(58), false},
		{"an error behind options, v6", ip6(60, extHeader(58, 0), 1, make([]byte, 7)), false},
		{"cut options, v6", ip6(60, extHeader(58, 0), 128, make([]byte, 7))[:46], false},
		{"malformed options, v6", ip6(60, 17, 0, 1, 200, zero[:4], udpHello), false},
		{"second fragment", patched(udp4, 6, 0, 1), false},
		{"second fragment with more", patched(udp4, 6, 0x20, 1), false},
		{"second fragment, v6", ip6(44, fragHeader(17, 8, true), udpHello), false},
		{"to a multicast address", patched(udp4, 16, 224, 0, 0, 251), false},
		{"to the broadcast address", patched(udp4, 16, 255, 255, 255, 255), false},
		{"to nowhere", patched(udp4, 16, 0, 0, 0, 0), false},
		{"from nowhere", patched(udp4, 12, 0, 0, 0, 0), false},
		{"from a multicast address", patched(udp4, 12, 224, 0, 0, 1), false},
		{"from the broadcast address", patched(udp4, 12, 255, 255, 255, 255), false},
		{"to a multicast address, v6", patched(udp6, 24, testBytes("ff02::fb")...), false},
		{"to nowhere, v6", patched(udp6, 24, zero...), false},
		{"from nowhere, v6", patched(udp6, 8, zero...), false},
		{"from a multicast address, v6", patched(udp6, 8, testBytes("ff02::1")...), false},
	} {
		for kind := unreachablePort; kind <= unreachableProhibited; kind++ {
			h := newICMPHarness(t, Config{})
			if err := h.s.sendUnreachable(kind, tt.packet, &h.l); err != nil {
				t.Fatal(err)
			}
			if sent := len(h.frames) == 1; sent != tt.sent {
				t.Errorf("%s, kind %d: sent %v", tt.name, kind, sent)
			}
		}
	}
}

func testBytes(s string) []byte {
	a := testAddr(s)
	return a[:]
}

func TestUnreachableWriterError(t *testing.T) {
	h := newICMPHarness(t, Config{})
	h.err = errors.New("broken")
	if err := h.s.sendUnreachable(unreachablePort, quotedPacket(4, 8), &h.l); err != h.err {
		t.Errorf("error %v", err)
	}
}

func TestUnreachableRateLimit(t *testing.T) {
	h := newICMPHarness(t, Config{})
	packet := quotedPacket(4, 8)
	start := time.Now()
	const n = 5000
	for range n {
		if err := h.s.sendUnreachable(unreachablePort, packet, &h.l); err != nil {
			t.Fatal(err)
		}
	}
	most := icmpErrorBurst + 1 + int(time.Since(start)/time.Millisecond)
	if got := len(h.frames); got < icmpErrorBurst || got > most {
		t.Errorf("%d errors, want %d to %d", got, icmpErrorBurst, most)
	}
	// What must not be sent takes no token.
	h = newICMPHarness(t, Config{})
	for range n {
		h.s.sendUnreachable(unreachablePort, patched(packet, 16, 224, 0, 0, 1), &h.l)
	}
	h.wantNothing()
	h.s.sendUnreachable(unreachablePort, packet, &h.l)
	h.want()
}

func TestTokenBucket(t *testing.T) {
	var b tokenBucket
	now := moment(100 * time.Hour)
	take := func(at time.Duration, want int) {
		t.Helper()
		got := 0
		for range 1000 {
			if b.take(now.Add(at)) {
				got++
			}
		}
		if got != want {
			t.Errorf("at %v: %d tokens, want %d", at, got, want)
		}
	}
	take(0, 50)
	take(0, 0)
	take(999*time.Microsecond, 0)
	take(time.Millisecond, 1)
	take(11*time.Millisecond, 10)
	take(12*time.Millisecond-1, 0)
	take(12*time.Millisecond, 1)
	take(time.Hour, 50)    // never more than the burst
	take(time.Hour-1e6, 0) // a caller that read the clock a little earlier
	total := 0
	for at := 2 * time.Hour; at < 2*time.Hour+10*time.Second; at += 100 * time.Microsecond {
		if b.take(now.Add(at)) {
			total++
		}
	}
	if total < 10000 || total > 10050 {
		t.Errorf("%d tokens in 10 s, want 1000 a second and the burst", total)
	}
}

func TestTokenBucketConcurrent(t *testing.T) {
	var b tokenBucket
	var got atomic.Int64
	var wg sync.WaitGroup
	now := moment(100 * time.Hour)
	for range 8 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range 1000 {
				if b.take(now) {
					got.Add(1)
				}
			}
		}()
	}
	wg.Wait()
	if got.Load() != icmpErrorBurst {
		t.Errorf("%d tokens, want %d", got.Load(), icmpErrorBurst)
	}
}

// withTTL returns a packet with another TTL or hop limit, and without an IPv4
// header checksum.
func withTTL(packet []byte, ttl byte) []byte {
	if packet[0]>>4 == 4 {
		return patched(patched(packet, 8, ttl), 10, 0, 0)
	}
	return patched(packet, 7, ttl)
}

// The three kinds of traceroute: the first hop is the stack, the second one is the
// destination.
func TestN29_N56_Traceroute(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(refuse(dialError(syscall.ECONNREFUSED)))
		from, to := netip.AddrPortFrom(fam.guest, 1025), fam.at(33434)
		echoType, exceeded, port := byte(8), [2]byte{11, 0}, [2]byte{3, 3}
		if fam.version == 6 {
			echoType, exceeded, port = 128, [2]byte{3, 0}, [2]byte{1, 4}
		}
		ping := refPacket(from.Addr(), to.Addr(), icmpProto(uint16(fam.version)), append([]byte{echoType, 0, 0, 0, 0, 7, 0, 1}, pattern(52)...), 2)
		datagram := udpPacket(from, to, pattern(32))
		g := m.openFrom(from, to)
		syn := segment{src: from, dst: to, seq: g.iss, flags: flagS, win: 1000}.packet()
		long := udpPacket(from, to, pattern(1400))

		for _, packet := range [][]byte{ping, datagram, syn, long} {
			probe := withTTL(packet, 1)
			m.mustSend(probe)
			msg := m.takeICMP()
			if [2]byte{msg.typ, msg.code} != exceeded || msg.src != fam.stack || msg.dst != fam.guest {
				t.Errorf("TTL 1: ICMP %d %d from %v to %v", msg.typ, msg.code, msg.src, msg.dst)
			}
			if limit := map[int]int{4: 576 - 28, 6: 1280 - 48}[fam.version]; !bytes.Equal(msg.body, probe[:min(len(probe), limit)]) {
				t.Errorf("about %x, want %x", msg.body, probe)
			}
		}
		if synctest.Wait(); len(h.dials()) != 0 {
			t.Fatalf("dials %v", h.dials())
		}
		for _, ttl := range []byte{2, 0} {
			m.mustSend(withTTL(ping, ttl))
			if msg := m.takeICMP(); msg.typ != map[int]byte{4: 0, 6: 129}[fam.version] || msg.src != to.Addr() {
				t.Errorf("TTL %d: ICMP %d from %v, want an echo reply", ttl, msg.typ, msg.src)
			}
			m.mustSend(withTTL(datagram, ttl))
			if msg := m.takeICMP(); [2]byte{msg.typ, msg.code} != port || msg.src != to.Addr() {
				t.Errorf("TTL %d: ICMP %d %d from %v, want port unreachable", ttl, msg.typ, msg.code, msg.src)
			}
			m.ttl = ttl
			g.syn()
			g.expectRST()
			m.ttl = 0
		}
		if st := m.s.Stats(); st.DropHopLimit != 4 || st.ICMPErrors != 6 {
			t.Errorf("%+v", st)
		}
		m.s.Close()
	})
}

// What is for the stack itself gets there with a TTL of 1.
func TestN29_HopLimitOfLocalPackets(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		mustListen(t, m.s, "tcp", fam.at(80).String())
		mustListen(t, m.s, "tcp", ":443")
		m.ttl = 1
		m.open(1025, fam.at(80)).connect()
		m.open(1025, netip.AddrPortFrom(fam.other, 443)).connect()
		proto, echo := icmpProto(uint16(fam.version)), []byte{8, 0, 0, 0, 0, 7, 0, 1}
		local := netip.MustParseAddr("169.254.3.4")
		if fam.version == 6 {
			echo[0], local = 128, netip.MustParseAddr("fe80::2")
		}
		for _, to := range []netip.Addr{fam.stack, local} {
			m.mustSend(withTTL(refPacket(fam.guest, to, proto, bytes.Clone(echo), 2), 1))
			if msg := m.takeICMP(); msg.src != to || msg.typ != map[int]byte{4: 0, 6: 129}[fam.version] {
				t.Errorf("ICMP %d from %v", msg.typ, msg.src)
			}
		}
		// No error about any of these.
		from := netip.AddrPortFrom(fam.guest, 1025)
		for _, packet := range [][]byte{
			udpPacket(from, netip.AddrPortFrom(fam.broadcast, 53), nil),
			refPacket(fam.guest, fam.server, proto, []byte{3, 0, 0, 0, 0, 0, 0, 0}, 2),
			refPacket(fam.guest, fam.server, 132, make([]byte, 40), -1),
			refPacket(fam.guest, fam.server, 6, make([]byte, 4), -1),
		} {
			m.mustSend(withTTL(packet, 1))
		}
		m.quiet(time.Second)
		if st := m.s.Stats(); st.DropHopLimit != 3 || st.DropAddress != 1 || st.ICMPErrors != 0 || len(h.dials()) != 0 {
			t.Errorf("%+v", st)
		}
		m.s.Close()
	})
}

// Fragments count as the packet that they are of.
func TestN29_HopLimitOfFragments(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		fs := fragmentsOf(withTTL(udpPacket(netip.AddrPortFrom(fam.guest, 1025), fam.at(53), pattern(3000)), 1), 1400)
		for _, f := range []int{2, 0, 1} {
			m.quiet(time.Second)
			m.mustSend(fs[f])
		}
		if msg := m.takeICMP(); msg.src != fam.stack || msg.code != 0 {
			t.Errorf("ICMP %d %d from %v", msg.typ, msg.code, msg.src)
		}
		m.quiet(time.Second)
		m.s.Close()
	})
}

// Extension headers that are not taken: RFC 8200 sections 4.1 to 4.4.
func TestN39_N42_HeaderProblems(t *testing.T) {
	group := func(packet []byte) []byte { return patched(packet, 24, testBytes("ff02::1")...) }
	unknown := func(kind int) []byte { return ip6(60, 17, 0, 1, 1, 0, kind, 1, 0, udpHello) }
	echo := ipBytes(128, 0, 0, 0, 0, 7, 0, 1)
	var chain []byte
	for range 100 {
		chain = append(chain, extHeader(60, 0)...)
	}
	for _, tt := range []struct {
		name    string
		packet  []byte
		code    int // of the Parameter Problem; -1: nothing is sent
		pointer int
		src     string // its source; "": the destination of the packet
		dropped string // the counter, if not DropMalformed
	}{
		{name: "hop-by-hop second", packet: ip6(60, extHeader(0, 0), extHeader(17, 0), udpHello), code: 1, pointer: 40},
		{name: "hop-by-hop third", packet: ip6(60, extHeader(43, 1), routingHeader(0, 0), extHeader(17, 0), udpHello), code: 1, pointer: 56},
		{name: "hop-by-hop twice", packet: ip6(0, extHeader(0, 0), extHeader(17, 0), udpHello), code: 1, pointer: 40},
		{name: "option 00", packet: unknown(0x3e), code: -1, dropped: "none"},
		{name: "option 01", packet: unknown(0x7e), code: -1},
		{name: "option 10", packet: unknown(0xbe), code: 2, pointer: 45},
		{name: "option 11", packet: unknown(0xfe), code: 2, pointer: 45},
		{name: "option 01 to a group", packet: group(unknown(0x7e)), code: -1},
		{name: "option 10 to a group", packet: group(unknown(0xbe)), code: 2, pointer: 45, src: "fd00::2"},
		{name: "option 11 to a group", packet: group(unknown(0xfe)), code: -1},
		{name: "option 10 from nowhere", packet: patched(unknown(0xbe), 8, make([]byte, 16)...), code: -1},
		{name: "option 10 behind option 11", packet: ip6(60, 17, 0, 0xc1, 0, 0x81, 0, 0, 0, udpHello), code: 2, pointer: 42},
		{name: "option 10 of a ping", packet: ip6(60, 58, 0, 0xbe, 4, 0, 0, 0, 0, echo), code: 2, pointer: 42},
		{name: "option 10 of an ICMP error", packet: ip6(60, 58, 0, 0xbe, 4, 0, 0, 0, 0, 3, 0, make([]byte, 60)), code: -1},
		{name: "option 10, chain cut", packet: ip6(60, 60, 0, 0xbe, 4, 0, 0, 0, 0, 58, 9), code: -1},
		{name: "option 10, next header unknown", packet: ip6(60, 200, 0, 0xbe, 4, 0, 0, 0, 0, udpHello), code: 2, pointer: 42},
		{name: "option 10 of a first fragment", packet: ip6(60, 44, 0, 0xbe, 4, 0, 0, 0, 0, fragHeader(17, 0, true), udpHello, "567"), code: 2, pointer: 42},
		{name: "option 10 of a second fragment", packet: ip6(60, 44, 0, 0xbe, 4, 0, 0, 0, 0, fragHeader(17, 8, true), udpHello, "567"), code: -1},
		{name: "jumbo payload", packet: ip6(0, 17, 0, 0xc2, 4, 0, 1, 0, 0, udpHello), code: 2, pointer: 42},
		{name: "option beyond its header", packet: ip6(60, 17, 0, 1, 5, 0, 0, 0, 0, udpHello), code: -1},
		{name: "option 11 in the padding", packet: patched(ip6(60, 17, 0, 0xc1, 4, 0, 0, 0, 0, udpHello), 5, 7), code: -1},
		{name: "routing type 0, a segment left", packet: ip6(43, routingHeader(17, 1), udpHello), code: 0, pointer: 42, dropped: "route"},
		{name: "routing type 253, a segment left", packet: ip6(60, extHeader(43, 0), patched(routingHeader(17, 9), 2, 253), udpHello), code: 0, pointer: 50, dropped: "route"},
		{name: "routing, used up", packet: ip6(43, patched(routingHeader(17, 0), 2, 253), udpHello), code: -1, dropped: "none"},
		{name: "routing, a segment left, of an error", packet: ip6(43, routingHeader(58, 1), 1, make([]byte, 60)), code: -1, dropped: "route"},
		{name: "100 headers", packet: ip6(60, chain, extHeader(17, 0), udpHello), code: -1},
		{name: "an unknown protocol", packet: ip6(200, udpHello), code: -1, dropped: "none"},
		{name: "no next header", packet: ip6(59, udpHello), code: -1, dropped: "none"},
	} {
		var frames [][]byte
		s := New()
		err := s.HandlePacket(1, testLink.guest, testLink.gw, bytes.Clone(tt.packet), func(frame []byte) error {
			frames = append(frames, frame)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		st := s.Stats()
		want := map[string][2]uint64{"": {1, 0}, "route": {0, 1}, "none": {0, 0}}[tt.dropped]
		if got := [2]uint64{st.DropMalformed, st.DropSourceRoute}; got != want {
			t.Errorf("%s: dropped %v, want %v", tt.name, got, want)
		}
		s.Close()
		if tt.code < 0 {
			if len(frames) != 0 {
				t.Errorf("%s: %x", tt.name, frames[0])
			}
			continue
		}
		p := mustReassemble(t, frames, 1500)
		src := ipAddr(tt.packet[24:40])
		if tt.src != "" {
			src = testAddr(tt.src)
		}
		if p.src != src || p.dst != ipAddr(tt.packet[8:24]) {
			t.Errorf("%s: from %v to %v", tt.name, p.src.addr(), p.dst.addr())
		}
		if want := ipBytes(4, tt.code, p.payload[2:4], 0, 0, 0, tt.pointer, tt.packet); !bytes.Equal(p.payload, want) {
			t.Errorf("%s: % x, want % x", tt.name, p.payload, want)
		}
	}
}

// The options behind the Fragment header are those of the whole packet.
func TestN39_HeaderProblemAfterReassembly(t *testing.T) {
	r := newFragmentRig(t)
	fs := fragmentsOf(ip6(60, 17, 0, 0xbe, 4, 0, 0, 0, 0, udpHello, make([]byte, 80)), 48)
	for i, f := range fs {
		if len(r.frames) != 0 {
			t.Fatalf("an answer to %d fragments", i)
		}
		r.send(f)
	}
	p := mustReassemble(t, r.frames, 1500)
	if !bytes.Equal(p.payload[:2], []byte{4, 2}) || p.payload[7] != 42 {
		t.Errorf("% x", p.payload)
	}
}

// Header problems are under the limit of all ICMP errors.
func TestN39_HeaderProblemRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newFragmentRig(t)
		for range 10000 {
			r.send(ip6(43, routingHeader(17, 1), udpHello))
		}
		if st := r.s.Stats(); len(r.frames) != icmpErrorBurst || st.ICMPRateLimited != 10000-icmpErrorBurst || st.DropSourceRoute != 10000 {
			t.Errorf("%d frames, %+v", len(r.frames), st)
		}
		r.s.Close()
	})
}

func TestN30_IPv4Options(t *testing.T) {
	echo := withChecksum(ip4(1, 8, 0, 0, 0, 0, 7, 0, 1, "ping"), 2)
	with := func(options ...byte) []byte {
		b := ipBytes(echo[:20], options, echo[20:])
		b[0] = byte(0x45 + len(options)/4)
		b[3] = byte(len(b))
		return b
	}
	for _, tt := range []struct {
		name    string
		options []byte
		dropped string
	}{
		{"none", nil, ""},
		{"NOP", []byte{1, 1, 1, 1}, ""},
		{"end of options, then anything", []byte{0, 131, 0, 7}, ""},
		{"record route", []byte{7, 7, 4, 0, 0, 0, 0, 0}, ""},
		{"timestamp", []byte{68, 8, 5, 0, 0, 0, 0, 0}, ""},
		{"router alert", []byte{148, 4, 0, 0}, ""},
		{"unknown", []byte{0x9e, 3, 0, 1}, ""},
		{"40 bytes", append([]byte{7, 39, 4}, make([]byte, 37)...), ""},
		{"loose source route", []byte{131, 7, 4, 10, 0, 2, 9, 0}, "route"},
		{"strict source route", []byte{1, 137, 7, 4, 10, 0, 2, 9}, "route"},
		{"loose source route, used up", []byte{131, 7, 8, 10, 0, 2, 9, 0}, "route"},
		{"length 0", []byte{7, 0, 4, 0}, "malformed"},
		{"length 1", []byte{7, 1, 4, 0}, "malformed"},
		{"length beyond the header", []byte{7, 5, 4, 0}, "malformed"},
		{"no length", []byte{1, 1, 1, 7}, "malformed"},
		{"length 255", []byte{68, 255, 5, 0}, "malformed"},
	} {
		r := newFragmentRig(t)
		r.send(with(tt.options...))
		st := r.s.Stats()
		want := map[string][3]uint64{"": {1, 0, 0}, "route": {0, 1, 0}, "malformed": {0, 0, 1}}[tt.dropped]
		if got := [3]uint64{st.EchoReplies, st.DropSourceRoute, st.DropMalformed}; got != want || len(r.frames) != int(want[0]) {
			t.Errorf("%s: %v, %d frames, want %v", tt.name, got, len(r.frames), want)
		}
		// The answer does not have the guest's options.
		if len(r.frames) == 1 && (r.frames[0][14] != 0x45 || string(r.frames[0][14+20+8:]) != "ping") {
			t.Errorf("%s: % x", tt.name, r.frames[0])
		}
		r.s.Close()
	}
}
