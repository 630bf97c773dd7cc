package slirp

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/KarpelesLab/slirp/internal/sum"
)

func testAddr(s string) ipAddr { return ipAddrFrom(netip.MustParseAddr(s)) }

// ipBytes concatenates bytes, given as []byte, string, or an int each.
func ipBytes(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case []byte:
			b = append(b, p...)
		case string:
			b = append(b, p...)
		case int:
			b = append(b, byte(p))
		default:
			panic(fmt.Sprintf("ipBytes: %T", p))
		}
	}
	return b
}

// extHeader is an extension header: the next type, the number of further 8-byte units,
// and a PadN that fills it.
func extHeader(next, units int) []byte {
	b := make([]byte, 8+8*units)
	b[0], b[1], b[2], b[3] = byte(next), byte(units), 1, byte(len(b)-4)
	return b
}

// routingHeader is a routing header with some segments left.
func routingHeader(next, segmentsLeft int) []byte {
	return []byte{byte(next), 0, 4, byte(segmentsLeft), 0, 0, 0, 0}
}

// fragHeader is an IPv6 fragment header.
func fragHeader(next, offset int, more bool) []byte {
	b := []byte{byte(next), 0, byte(offset >> 8), byte(offset) &^ 7, 0xde, 0xad, 0xbe, 0xef}
	if more {
		b[3] |= 1
	}
	return b
}

// ip6 is an IPv6 packet from fd00::15 to 2001:db8::1.
func ip6(next int, body ...any) []byte {
	b := ipBytes(body...)
	return ipBytes(
		0x60, 0, 0, 0, // version, traffic class, flow label
		len(b)>>8, len(b), // payload length
		next, 64, // next header, hop limit
		0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15, // source
		0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, // destination
		b)
}

// ip4 is an IPv4 packet from 10.0.2.15 to 192.0.2.1, with header checksum 0.
func ip4(proto int, body ...any) []byte {
	b := ipBytes(body...)
	n := 20 + len(b)
	return ipBytes(
		0x45, 0, // version and IHL, TOS
		n>>8, n, // total length
		0, 0, 0, 0, // identification, fragment
		64, proto, // TTL, protocol
		0, 0, // checksum
		10, 0, 2, 15, // source
		192, 0, 2, 1, // destination
		b)
}

// patched returns b with the bytes from off on replaced.
func patched(b []byte, off int, v ...byte) []byte {
	b = append([]byte(nil), b...)
	copy(b[off:], v)
	return b
}

const udpHello = "\x30\x39\x00\x35\x00\x0d\x00\x00hello"

type parseTest struct {
	name   string
	packet []byte
	err    error

	// What is expected of p, if err is nil.
	proto     uint8
	payload   string
	rawLen    int // 0: all of packet
	fragment  bool
	offset    uint16
	badSum    bool
	malformed bool
}

var parseTests = []parseTest{
	{name: "empty", packet: nil, err: ErrPacketTooShort},
	{name: "19 bytes of IPv4", packet: ip4(17)[:19], err: ErrPacketTooShort},
	{name: "19 bytes of IPv6", packet: ip6(17)[:19], err: ErrPacketTooShort},
	{name: "19 bytes of no version", packet: make([]byte, 19), err: ErrPacketTooShort},
	{name: "40 zero bytes", packet: make([]byte, 40), err: ErrIPVersion},
	{name: "version 5", packet: patched(ip4(17, udpHello), 0, 0x55), err: ErrIPVersion},
	{name: "version 15", packet: patched(ip4(17, udpHello), 0, 0xff), err: ErrIPVersion},

	{name: "IPv4 UDP", packet: ip4(17, udpHello), proto: 17, payload: udpHello},
	{name: "IPv4 nothing behind the header", packet: ip4(6), proto: 6},
	{name: "IPv4 padded to 60 bytes", packet: ipBytes(ip4(17, udpHello), make([]byte, 13), "padding padding"), rawLen: 33, proto: 17, payload: udpHello},
	{name: "IPv4 unknown protocol", packet: ip4(132, "abc"), proto: 132, payload: "abc"},
	{name: "IPv4 protocol 0 is not an extension header", packet: ip4(0, "abc"), proto: 0, payload: "abc"},
	{name: "IPv4 with options", packet: ipBytes(
		0x47, 0, 0, 33, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15, 192, 0, 2, 1,
		1, 1, 1, 1, 1, 1, 1, 0, // options
		"hello"), proto: 17, payload: "hello"},
	{name: "IPv4 with all options it can have", packet: patched(ip4(17, make([]byte, 40), "x"), 0, 0x4f), proto: 17, payload: "x"},
	{name: "IPv4 TTL 0", packet: patched(ip4(17, udpHello), 8, 0), proto: 17, payload: udpHello},
	{name: "IPv4 right header checksum", packet: ipBytes(knownIPv4Header, make([]byte, 95)), proto: 17, payload: string(make([]byte, 95))},
	{name: "IPv4 wrong header checksum", packet: ipBytes(patched(knownIPv4Header, 10, 0xb8, 0x62), make([]byte, 95)), proto: 17, payload: string(make([]byte, 95)), badSum: true},
	{name: "IPv4 flipped address", packet: ipBytes(patched(knownIPv4Header, 19, 0xc6), make([]byte, 95)), proto: 17, payload: string(make([]byte, 95)), badSum: true},
	{name: "IPv4 IHL 4", packet: patched(ip4(17, udpHello), 0, 0x44), err: ErrIHL},
	{name: "IPv4 IHL 0", packet: patched(ip4(17, udpHello), 0, 0x40), err: ErrIHL},
	{name: "IPv4 IHL beyond the packet", packet: patched(ip4(17, udpHello), 0, 0x4f), err: ErrIHL},
	{name: "IPv4 IHL beyond the packet, and total length wrong", packet: patched(ip4(17, udpHello), 0, 0x4f, 0, 0xff, 0xff), err: ErrIHL},
	{name: "IPv4 total length 0", packet: patched(ip4(17, udpHello), 2, 0, 0), err: ErrIPv4TotalLength},
	{name: "IPv4 total length 19", packet: patched(ip4(17, udpHello), 2, 0, 19), err: ErrIPv4TotalLength},
	{name: "IPv4 total length below IHL", packet: patched(ip4(17, udpHello), 0, 0x46, 0, 0, 23), err: ErrIPv4TotalLength},
	{name: "IPv4 total length one above", packet: patched(ip4(17, udpHello), 2, 0, 34), err: ErrIPv4TotalLength},
	{name: "IPv4 total length 65535", packet: patched(ip4(17, udpHello), 2, 0xff, 0xff), err: ErrIPv4TotalLength},
	{name: "IPv4 total length one below", packet: patched(ip4(17, udpHello), 2, 0, 32), proto: 17, payload: udpHello[:12], rawLen: 32},
	{name: "IPv4 don't fragment", packet: patched(ip4(17, udpHello), 6, 0x40, 0), proto: 17, payload: udpHello},
	{name: "IPv4 reserved bit", packet: patched(ip4(17, udpHello), 6, 0x80, 0), proto: 17, payload: udpHello},
	{name: "IPv4 first fragment", packet: patched(ip4(17, udpHello), 6, 0x20, 0), proto: 17, payload: udpHello, fragment: true},
	{name: "IPv4 last fragment", packet: patched(ip4(17, udpHello), 6, 0, 1), proto: 17, payload: udpHello, fragment: true, offset: 8},
	{name: "IPv4 fragment at the far end", packet: patched(ip4(17, udpHello), 6, 0x1f, 0xff), proto: 17, payload: udpHello, fragment: true, offset: 65528},

	{name: "IPv6 cut header", packet: ip6(17, udpHello)[:39], err: ErrIPv6TooShort},
	{name: "IPv6 20 bytes", packet: ip6(17, udpHello)[:20], err: ErrIPv6TooShort},
	{name: "IPv6 payload length one above", packet: patched(ip6(17, udpHello), 4, 0, 14), err: ErrIPv6PayloadLength},
	{name: "IPv6 payload length 65535", packet: patched(ip6(17, udpHello), 4, 0xff, 0xff), err: ErrIPv6PayloadLength},
	{name: "IPv6 UDP", packet: ip6(17, udpHello), proto: 17, payload: udpHello},
	{name: "IPv6 traffic class and flow label", packet: patched(ip6(17, udpHello), 0, 0x6f, 0xff, 0xff, 0xff), proto: 17, payload: udpHello},
	{name: "IPv6 padded", packet: ipBytes(ip6(17, udpHello), "padding"), proto: 17, payload: udpHello, rawLen: 53},
	{name: "IPv6 empty", packet: ip6(6), proto: 6},
	{name: "IPv6 payload length 0, data behind it", packet: patched(ip6(6, "data"), 4, 0, 0), proto: 6, rawLen: 40},
	{name: "IPv6 jumbogram", packet: patched(ip6(0, 17, 0, 0xc2, 4, 0, 1, 0, 0, make([]byte, 100)), 4, 0, 0), rawLen: 40, proto: 59, malformed: true},
	{name: "IPv6 no next header", packet: ip6(59, "ignored"), proto: 59, payload: "ignored"},
	{name: "IPv6 unknown protocol", packet: ip6(132, "abc"), proto: 132, payload: "abc"},
	{name: "IPv6 ICMP of the other family", packet: ip6(1, "abc"), proto: 1, payload: "abc"},

	{name: "hop-by-hop", packet: ip6(0, extHeader(17, 0), udpHello), proto: 17, payload: udpHello},
	{name: "hop-by-hop of 2048 bytes", packet: ip6(0, 17, 255, strings.Repeat("\x01\xff"+strings.Repeat("\x00", 255), 7), 1, 245, make([]byte, 245), udpHello),
		proto: 17, payload: udpHello},
	{name: "hop-by-hop of 2046 Pad1", packet: ip6(0, patched(make([]byte, 2048), 0, 17, 255), udpHello), proto: 59, malformed: true},
	{name: "hop-by-hop with a router alert", packet: ip6(0, 17, 0, 5, 2, 0, 0, 1, 0, udpHello), proto: 17, payload: udpHello},
	{name: "hop-by-hop of Pad1", packet: ip6(0, 17, 0, make([]byte, 6), udpHello), proto: 17, payload: udpHello},
	{name: "hop-by-hop with nothing behind it", packet: ip6(0, extHeader(17, 0)), proto: 17},
	{name: "hop-by-hop twice", packet: ip6(0, extHeader(0, 0), extHeader(17, 0), udpHello), proto: 59, malformed: true},
	{name: "hop-by-hop second", packet: ip6(60, extHeader(0, 0), extHeader(17, 0), udpHello), proto: 59, malformed: true},
	{name: "hop-by-hop beyond the end", packet: ip6(0, patched(extHeader(17, 0), 1, 9), udpHello), proto: 59, malformed: true},
	{name: "hop-by-hop in the padding", packet: patched(ip6(0, extHeader(17, 0), udpHello), 5, 7), rawLen: 47, proto: 59, malformed: true},
	{name: "an option that must be known", packet: ip6(0, 17, 0, 0x45, 0, 0, 0, 0, 0, udpHello), proto: 59, malformed: true},
	{name: "an option that wants an error", packet: ip6(60, 17, 0, 0xc9, 4, 0, 0, 0, 0, udpHello), proto: 59, malformed: true},
	{name: "an unknown option that is skipped", packet: ip6(60, 17, 0, 0x3e, 4, 0xff, 0xff, 0xff, 0xff, udpHello), proto: 17, payload: udpHello},
	{name: "an option beyond its header", packet: ip6(60, 17, 0, 1, 5, 0, 0, 0, 0, udpHello), proto: 59, malformed: true},
	{name: "an option without a length", packet: ip6(60, 17, 0, 1, 3, 0, 0, 0, 1, udpHello), proto: 59, malformed: true},
	{name: "destination options twice", packet: ip6(60, extHeader(60, 1), extHeader(17, 0), udpHello), proto: 17, payload: udpHello},
	{name: "routing, used up", packet: ip6(43, routingHeader(17, 0), udpHello), proto: 17, payload: udpHello},
	{name: "routing, a segment left", packet: ip6(43, routingHeader(17, 1), udpHello), proto: 59, malformed: true},
	{name: "atomic fragment", packet: ip6(44, fragHeader(17, 0, false), udpHello), proto: 17, payload: udpHello},
	{name: "first fragment", packet: ip6(44, fragHeader(17, 0, true), udpHello), proto: 17, payload: udpHello, fragment: true},
	{name: "first fragment, options behind", packet: ip6(44, fragHeader(60, 0, true), extHeader(17, 0), udpHello), proto: 17, payload: udpHello, fragment: true},
	{name: "middle fragment", packet: ip6(44, fragHeader(17, 1448, true), udpHello), proto: 17, payload: udpHello, fragment: true, offset: 1448},
	{name: "last fragment", packet: ip6(44, fragHeader(60, 65528, false), udpHello), proto: 60, payload: udpHello, fragment: true, offset: 65528},
	{name: "a fragment header in a first fragment", packet: ip6(44, fragHeader(44, 0, true), fragHeader(17, 0, false), udpHello), proto: 17, payload: udpHello, fragment: true},
	{name: "fragment header cut", packet: ip6(44, fragHeader(17, 0, false)[:7]), proto: 59, malformed: true},
	{name: "fragment header with a reserved length", packet: ip6(44, patched(fragHeader(17, 0, false), 1, 255), udpHello), proto: 17, payload: udpHello},
}

func TestParseIP(t *testing.T) {
	for _, tt := range parseTests {
		t.Run(tt.name, func(t *testing.T) {
			p := ipPacket{fragment: true, badChecksum: true, malformed: true, fragOffset: 1, proto: 99} // of an earlier packet
			err := parseIP(tt.packet, &p)
			if err != tt.err {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if err != nil {
				return
			}
			rawLen := tt.rawLen
			if rawLen == 0 {
				rawLen = len(tt.packet)
			}
			if len(p.raw) != rawLen || &p.raw[0] != &tt.packet[0] {
				t.Errorf("raw is %d bytes, want %d", len(p.raw), rawLen)
			}
			if string(p.payload) != tt.payload {
				t.Errorf("payload %q, want %q", p.payload, tt.payload)
			}
			if p.proto != tt.proto || p.fragment != tt.fragment || p.fragOffset != tt.offset || p.badChecksum != tt.badSum || p.malformed != tt.malformed {
				t.Errorf("proto %d fragment %v at %d badChecksum %v malformed %v", p.proto, p.fragment, p.fragOffset, p.badChecksum, p.malformed)
			}
			if int(p.version) != int(tt.packet[0]>>4) {
				t.Errorf("version %d", p.version)
			}
		})
	}
}

func TestParseIPAddresses(t *testing.T) {
	var p ipPacket
	if err := parseIP(patched(ip4(17, udpHello), 8, 7), &p); err != nil {
		t.Fatal(err)
	}
	if p.src != testAddr("10.0.2.15") || p.dst != testAddr("192.0.2.1") || p.ttl != 7 {
		t.Errorf("IPv4: %v > %v ttl %d", p.src.addr(), p.dst.addr(), p.ttl)
	}
	if err := parseIP(patched(ip6(17, udpHello), 7, 8), &p); err != nil {
		t.Fatal(err)
	}
	if p.src != testAddr("fd00::15") || p.dst != testAddr("2001:db8::1") || p.ttl != 8 {
		t.Errorf("IPv6: %v > %v hop limit %d", p.src.addr(), p.dst.addr(), p.ttl)
	}
}

// A packet that is cut anywhere is refused as too short, whatever it holds.
func TestParseIPTruncated(t *testing.T) {
	for _, tt := range parseTests {
		if tt.err != nil {
			continue
		}
		whole := len(tt.packet)
		if tt.rawLen != 0 {
			whole = tt.rawLen
		}
		for n := 0; n < whole; n++ {
			var p ipPacket
			b := append(make([]byte, 0, n), tt.packet[:n]...)
			err := parseIP(b, &p)
			want := ErrIPv6PayloadLength
			switch {
			case n < 20:
				want = ErrPacketTooShort
			case tt.packet[0]>>4 == 4 && n < int(tt.packet[0]&15)*4:
				want = ErrIHL
			case tt.packet[0]>>4 == 4:
				want = ErrIPv4TotalLength
			case n < 40:
				want = ErrIPv6TooShort
			}
			if err != want {
				t.Fatalf("%s, cut to %d: %v, want %v", tt.name, n, err, want)
			}
			// What quotes a packet takes it cut behind the header.
			err = parseQuoted(b, &p)
			if quotable := want == ErrIPv4TotalLength || want == ErrIPv6PayloadLength; quotable != (err == nil) {
				t.Fatalf("%s, cut to %d: quoted gives %v", tt.name, n, err)
			}
			if err == nil && (len(p.raw) != n || len(p.payload) > n) {
				t.Fatalf("%s, cut to %d: quoted has %d bytes, %d of payload", tt.name, n, len(p.raw), len(p.payload))
			}
		}
	}
}

// Every value of the length fields, against a packet of 60 bytes.
func TestParseIPLengthLies(t *testing.T) {
	v4, v6 := ip4(17, make([]byte, 40)), ip6(17, make([]byte, 20))
	for n := 0; n <= 0xffff; n++ {
		var p ipPacket
		err := parseIP(patched(v4, 2, byte(n>>8), byte(n)), &p)
		if ok := n >= 20 && n <= 60; ok != (err == nil) || !ok && err != ErrIPv4TotalLength || ok && (len(p.raw) != n || len(p.payload) != n-20) {
			t.Fatalf("IPv4 total length %d: %v, raw %d, payload %d", n, err, len(p.raw), len(p.payload))
		}
		err = parseIP(patched(v6, 4, byte(n>>8), byte(n)), &p)
		if ok := n <= 20; ok != (err == nil) || !ok && err != ErrIPv6PayloadLength || ok && (len(p.raw) != 40+n || len(p.payload) != n) {
			t.Fatalf("IPv6 payload length %d: %v, raw %d, payload %d", n, err, len(p.raw), len(p.payload))
		}
	}
}

// The four kinds of extension header in their 24 orders: good if the Hop-by-Hop
// header comes first.
func TestExtensionHeaderOrders(t *testing.T) {
	kinds := []byte{protoHopByHop, protoDestination, protoRouting, protoFragment}
	build := map[byte]func(next int) []byte{
		protoHopByHop:    func(next int) []byte { return extHeader(next, 1) },
		protoDestination: func(next int) []byte { return extHeader(next, 2) },
		protoRouting:     func(next int) []byte { return routingHeader(next, 0) },
		protoFragment:    func(next int) []byte { return fragHeader(next, 0, false) },
	}
	n := 0
	var permute func(done, left []byte)
	permute = func(done, left []byte) {
		if len(left) > 0 {
			for i := range left {
				rest := append(append([]byte(nil), left[:i]...), left[i+1:]...)
				permute(append(append([]byte(nil), done...), left[i]), rest)
			}
			return
		}
		n++
		body := []byte(udpHello)
		next := 17
		for i := len(done) - 1; i >= 0; i-- {
			body = append(build[done[i]](next), body...)
			next = int(done[i])
		}
		var p ipPacket
		if err := parseIP(ip6(next, body), &p); err != nil {
			t.Fatalf("%v: %v", done, err)
		}
		if done[0] == protoHopByHop {
			if p.malformed || p.fragment || p.proto != 17 || string(p.payload) != udpHello {
				t.Errorf("%v: %+v", done, p)
			}
		} else if !p.malformed || p.proto != protoNone || len(p.payload) != 0 {
			t.Errorf("%v: accepted with Hop-by-Hop not in front: %+v", done, p)
		}
	}
	permute(nil, kinds)
	if n != 24 {
		t.Errorf("%d orders", n)
	}
}

func TestExtensionHeaderLimit(t *testing.T) {
	for n := 0; n <= 12; n++ {
		next := 17
		body := []byte(udpHello)
		for range n {
			body = append(extHeader(next, 0), body...)
			next = protoDestination
		}
		var p ipPacket
		if err := parseIP(ip6(next, body), &p); err != nil {
			t.Fatal(err)
		}
		if want := n > 8; p.malformed != want {
			t.Errorf("%d headers: malformed %v", n, p.malformed)
		}
	}
}

func FuzzParseIP(f *testing.F) {
	for _, tt := range parseTests {
		f.Add(tt.packet)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p, q ipPacket
		err := parseIP(b, &p)
		quotedErr := parseQuoted(b, &q)
		if quotedErr == nil {
			checkInside(t, b, &q)
			mayReport(&q)
		}
		if err != nil {
			for _, known := range []error{ErrPacketTooShort, ErrIPVersion, ErrIHL, ErrIPv4TotalLength, ErrIPv6TooShort, ErrIPv6PayloadLength} {
				if err == known {
					return
				}
			}
			t.Fatalf("unknown error %v", err)
		}
		if quotedErr != nil {
			t.Fatalf("good, but not when quoted: %v", quotedErr)
		}
		checkInside(t, b, &p)
		want := 40 + int(binary.BigEndian.Uint16(b[4:]))
		if p.version == 4 {
			want = int(binary.BigEndian.Uint16(b[2:]))
		}
		if len(p.raw) != want {
			t.Fatalf("raw is %d bytes, the header says %d", len(p.raw), want)
		}
		if p.fragOffset != 0 && !p.fragment && !p.malformed {
			t.Fatal("an offset, but no fragment")
		}
		// Padding changes nothing.
		err = parseIP(append(append([]byte(nil), b...), "padding"...), &q)
		if err != nil || !bytes.Equal(p.raw, q.raw) || !bytes.Equal(p.payload, q.payload) || p.proto != q.proto {
			t.Fatalf("padding changed the packet: %v", err)
		}
	})
}

// checkInside checks that raw is the front of b, and payload the back of raw.
func checkInside(t *testing.T, b []byte, p *ipPacket) {
	t.Helper()
	if len(p.raw) > len(b) || cap(p.raw) != len(p.raw) || &p.raw[0] != &b[0] {
		t.Fatalf("raw (%d bytes, cap %d) is not the front of the input (%d)", len(p.raw), cap(p.raw), len(b))
	}
	if p.malformed {
		if len(p.payload) != 0 || p.proto != protoNone {
			t.Fatal("a malformed packet has a payload")
		}
		return
	}
	if cap(p.payload) != len(p.payload) || len(p.payload) > len(p.raw)-20 {
		t.Fatal("payload is larger than raw")
	}
	if len(p.payload) > 0 && &p.payload[len(p.payload)-1] != &p.raw[len(p.raw)-1] {
		t.Fatal("payload does not end where raw ends")
	}
}

func TestIPAddr(t *testing.T) {
	for _, tt := range []struct {
		addr                                                 string
		unspecified, loopback, multicast, broadcast, unicast bool
	}{
		{addr: "0.0.0.0", unspecified: true},
		{addr: "::", unspecified: true},
		{addr: "127.0.0.1", loopback: true, unicast: true},
		{addr: "127.255.255.255", loopback: true, unicast: true},
		{addr: "::1", loopback: true, unicast: true},
		{addr: "::2", unicast: true},
		{addr: "::7f00:1", unicast: true},
		{addr: "224.0.0.0", multicast: true},
		{addr: "239.255.255.255", multicast: true},
		{addr: "240.0.0.1", unicast: true},
		{addr: "223.255.255.255", unicast: true},
		{addr: "255.255.255.255", broadcast: true},
		{addr: "255.255.255.254", unicast: true},
		{addr: "ff02::1", multicast: true},
		{addr: "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", multicast: true},
		{addr: "fe80::1", unicast: true},
		{addr: "10.0.2.15", unicast: true},
		{addr: "2001:db8::1", unicast: true},
	} {
		a := testAddr(tt.addr)
		if got := a.addr(); got != netip.MustParseAddr(tt.addr) {
			t.Errorf("%s comes back as %v", tt.addr, got)
		}
		if a.isUnspecified() != tt.unspecified || a.isLoopback() != tt.loopback || a.isMulticast() != tt.multicast ||
			a.isBroadcast() != tt.broadcast || a.isUnicast() != tt.unicast {
			t.Errorf("%s: unspecified %v loopback %v multicast %v broadcast %v unicast %v", tt.addr,
				a.isUnspecified(), a.isLoopback(), a.isMulticast(), a.isBroadcast(), a.isUnicast())
		}
	}
	if ipAddrFrom(netip.Addr{}) != (ipAddr{}) {
		t.Error("the zero Addr is not ::")
	}
	if testAddr("::ffff:10.0.2.15") != testAddr("10.0.2.15") || testAddr("fe80::1%eth0") != testAddr("fe80::1") {
		t.Error("mapped or zoned addresses differ from plain ones")
	}
	for s, want := range map[string]uint16{"10.0.2.2": 4, "::ffff:10.0.2.2": 4, "fd00::2": 6} {
		if got := versionOf(netip.MustParseAddr(s)); got != want {
			t.Errorf("versionOf(%s) = %d", s, got)
		}
	}
}

func TestOwnAddresses(t *testing.T) {
	cfg, err := Config{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[uint16]string{4: "10.0.2.2", 6: "fd00::2"} {
		if a, ok := cfg.address(version); !ok || a != testAddr(want) {
			t.Errorf("version %d: %v %v", version, a.addr(), ok)
		}
	}
	cfg.Addresses = []netip.Addr{netip.MustParseAddr("fd00::9"), netip.MustParseAddr("fd00::8")}
	if _, ok := cfg.address(4); ok {
		t.Error("an IPv4 address out of nothing")
	}
	if a, _ := cfg.address(6); a != testAddr("fd00::9") {
		t.Errorf("not the first: %v", a.addr())
	}
	if !cfg.isOwn(testAddr("fd00::8")) || cfg.isOwn(testAddr("fd00::7")) {
		t.Error("isOwn")
	}
}

func TestSegmentSizes(t *testing.T) {
	for _, tt := range []struct{ version, mtu, want, def int }{
		{4, 1500, 1460, 536}, {6, 1500, 1440, 1220}, {4, 1280, 1240, 536}, {6, 1280, 1220, 1220}, {4, 65535, 65495, 536},
	} {
		if got := transportMSS(uint16(tt.version), tt.mtu); got != tt.want {
			t.Errorf("transportMSS(%d, %d) = %d, want %d", tt.version, tt.mtu, got, tt.want)
		}
		if got := defaultMSS(uint16(tt.version)); got != tt.def {
			t.Errorf("defaultMSS(%d) = %d, want %d", tt.version, got, tt.def)
		}
	}
}

// testIDs are the identifications of fragments.
var testIDs = &fragmentIDs{seed: maphash.MakeSeed()}

var testLink = link{guest: [6]byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}, gw: [6]byte{0x52, 0x55, 10, 0, 2, 2}}

func TestFinishFrameBytes(t *testing.T) {
	for _, tt := range []struct {
		name     string
		version  uint16
		src, dst string
		want     []byte
	}{
		{"IPv4", 4, "192.0.2.1", "10.0.2.15", ipBytes(
			0x52, 0x54, 0, 0x12, 0x34, 0x56, // to the guest
			0x52, 0x55, 10, 0, 2, 2, // from the gateway
			0x08, 0x00,
			0x45, 0, 0, 33, // 33 bytes
			0, 0, 0x40, 0, // identification 0, don't fragment
			64, 17, 0x6c, 0xbc, // TTL, UDP, checksum
			192, 0, 2, 1,
			10, 0, 2, 15,
			0x00, 0x35, 0x30, 0x39, 0x00, 0x0d, 0xbd, 0x83, "hello")},
		{"IPv6", 6, "2001:db8::1", "fd00::15", ipBytes(
			0x52, 0x54, 0, 0x12, 0x34, 0x56,
			0x52, 0x55, 10, 0, 2, 2,
			0x86, 0xdd,
			0x60, 0, 0, 0, // no traffic class, no flow label
			0, 13, 17, 64, // payload length, UDP, hop limit
			0x20, 0x01, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
			0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15,
			0x00, 0x35, 0x30, 0x39, 0x00, 0x0d, 0x60, 0xc4, "hello")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			hl := frameHeaderLen(tt.version)
			frame := bytes.Repeat([]byte{0xa5}, hl+13) // memory that was used before
			copy(frame[hl:], "\x00\x35\x30\x39\x00\x0d\x00\x00hello")
			finishFrame(frame, &testLink, tt.version, protoUDP, testAddr(tt.src), testAddr(tt.dst))
			if !bytes.Equal(frame, tt.want) {
				t.Errorf("frame\n%x, want\n%x", frame, tt.want)
			}
			p := mustFrame(t, frame)
			if string(p.payload[8:]) != "hello" || p.ttl != 64 {
				t.Errorf("read back as %+v", p)
			}
		})
	}
}

// mustFrame reads a frame for the guest of testLink, and checks its headers and
// checksums without the code under test: all but the transport checksum of a
// fragment.
func mustFrame(t testing.TB, frame []byte) ipPacket {
	t.Helper()
	if len(frame) < 34 || [6]byte(frame) != testLink.guest || [6]byte(frame[6:]) != testLink.gw {
		t.Fatalf("Ethernet header of %x", frame)
	}
	p := ipPacket{raw: frame[14:]}
	b := p.raw
	switch etherType := binary.BigEndian.Uint16(frame[12:]); etherType {
	case 0x0800:
		if b[0] != 0x45 || int(binary.BigEndian.Uint16(b[2:])) != len(b) || sum.Of(b[:20], 0) != 0xffff {
			t.Fatalf("IPv4 header %x of a packet of %d bytes", b[:20], len(b))
		}
		p.version, p.ttl, p.proto, p.payload = 4, b[8], b[9], b[20:]
		p.src, p.dst = mapped(b[12:16]), mapped(b[16:20])
		flags := binary.BigEndian.Uint16(b[6:])
		p.fragment = flags&0x3fff != 0
		p.fragOffset = flags & 0x1fff * 8
		if id := binary.BigEndian.Uint16(b[4:]); (id != 0) != p.fragment || (flags&0x4000 == 0) != p.fragment {
			t.Fatalf("identification %#x with flags %#x", id, flags)
		}
	case 0x86dd:
		if len(b) < 40 || binary.BigEndian.Uint32(b) != 0x60000000 || int(binary.BigEndian.Uint16(b[4:])) != len(b)-40 {
			t.Fatalf("IPv6 header %x of a packet of %d bytes", b, len(b))
		}
		p.version, p.ttl, p.proto, p.payload = 6, b[7], b[6], b[40:]
		p.src, p.dst = ipAddr(b[8:24]), ipAddr(b[24:40])
		if p.proto == 44 {
			p.fragment = true
			p.fragOffset = binary.BigEndian.Uint16(p.payload[2:]) &^ 7
			p.proto, p.payload = p.payload[0], p.payload[8:]
		}
	default:
		t.Fatalf("EtherType %#04x", etherType)
	}
	if !p.fragment {
		mustChecksum(t, &p, p.payload)
	}
	return p
}

// mustChecksum checks the transport checksum of b.
func mustChecksum(t testing.TB, p *ipPacket, b []byte) {
	t.Helper()
	var pseudo []byte
	if p.proto != 1 {
		pseudo = naivePseudo(p.version, p.src, p.dst, p.proto, len(b))
	}
	if got := sum.Of(append(pseudo, b...), 0); got != 0xffff {
		t.Fatalf("protocol %d of %d bytes: checksum is wrong, all sums to %#04x", p.proto, len(b), got)
	}
}

// mustReassemble puts the frames of one datagram together again, and checks them:
// each within the MTU, in order, and without holes.
func mustReassemble(t testing.TB, frames [][]byte, mtu int) ipPacket {
	t.Helper()
	if len(frames) == 0 {
		t.Fatal("no frame")
	}
	var whole ipPacket
	var id uint32
	for i, frame := range frames {
		p := mustFrame(t, frame)
		if len(p.raw) > mtu {
			t.Fatalf("fragment %d: %d bytes, above the MTU %d", i, len(p.raw), mtu)
		}
		if len(frames) == 1 {
			return p
		}
		more, thisID := p.raw[6]&0x20 != 0, uint32(binary.BigEndian.Uint16(p.raw[4:]))
		if p.version == 6 {
			more, thisID = p.raw[43]&1 != 0, binary.BigEndian.Uint32(p.raw[44:])
			if p.raw[41] != 0 || p.raw[43]&6 != 0 {
				t.Fatalf("fragment %d: reserved bits", i)
			}
		}
		last := i == len(frames)-1
		if !p.fragment || more == last {
			t.Fatalf("fragment %d of %d: fragment %v, more %v", i, len(frames), p.fragment, more)
		}
		if !last && (len(p.payload)%8 != 0 || len(p.raw)+8 <= mtu) {
			t.Fatalf("fragment %d: payload of %d bytes in a packet of %d", i, len(p.payload), len(p.raw))
		}
		if i == 0 {
			whole, id = p, thisID
			whole.payload = nil
		}
		if int(p.fragOffset) != len(whole.payload) || thisID != id || p.src != whole.src || p.dst != whole.dst || p.proto != whole.proto {
			t.Fatalf("fragment %d at %d, id %#x: %d bytes, id %#x so far", i, p.fragOffset, thisID, len(whole.payload), id)
		}
		whole.payload = append(whole.payload, p.payload...)
	}
	mustChecksum(t, &whole, whole.payload)
	return whole
}

func TestEmitDatagram(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	for _, a := range []testPair{{4, testAddr("192.0.2.1"), testAddr("10.0.2.15")}, {6, testAddr("2001:db8::1"), testAddr("fd00::15")}} {
		for _, mtu := range []int{1280, 1281, 1287, 1500, 9000, 65535} {
			fit := mtu - ipHeaderLen(a.version)
			sizes := []int{8, 9, fit - 1, fit, fit + 1, fit + 7, fit + 8, 2*fit - 8, 2 * fit, 2*fit + 1, 8 + 65507}
			for range 4 {
				sizes = append(sizes, 8+r.IntN(65500))
			}
			for _, n := range sizes {
				if n > 8+65507 {
					continue
				}
				msg := make([]byte, n)
				for i := range msg {
					msg[i] = byte(r.Uint32())
				}
				binary.BigEndian.PutUint16(msg[4:], uint16(n))
				want := append([]byte(nil), msg...)
				var frames [][]byte
				alloc := func(n int) []byte { return bytes.Repeat([]byte{0xa5}, n) }
				emit := func(frame []byte) error { frames = append(frames, frame); return nil }
				if err := emitDatagram(&testLink, a.version, protoUDP, a.src, a.dst, msg, mtu, 64, testIDs, alloc, emit); err != nil {
					t.Fatal(err)
				}
				if (len(frames) == 1) != (n <= fit) {
					t.Fatalf("version %d, MTU %d, %d bytes: %d frames", a.version, mtu, n, len(frames))
				}
				clear(msg) // the frames do not depend on it
				p := mustReassemble(t, frames, mtu)
				copy(want[6:8], p.payload[6:8])
				if !bytes.Equal(p.payload, want) || p.src != a.src || p.dst != a.dst || p.proto != protoUDP || p.ttl != 64 {
					t.Fatalf("version %d, MTU %d, %d bytes: came out different", a.version, mtu, n)
				}
			}
		}
	}
}

func TestEmitDatagramErrors(t *testing.T) {
	src, dst := testAddr("192.0.2.1"), testAddr("10.0.2.15")
	alloc := func(n int) []byte { return make([]byte, n) }
	broken := errors.New("broken")
	for n, want := range map[int]int{100: 1, 5000: 3} {
		calls := 0
		emit := func([]byte) error {
			calls++
			if calls == want {
				return broken
			}
			return nil
		}
		if err := emitDatagram(&testLink, 4, protoUDP, src, dst, make([]byte, n), 1500, 64, testIDs, alloc, emit); err != broken || calls != want {
			t.Errorf("%d bytes: %v after %d frames", n, err, calls)
		}
	}
	none := func([]byte) error { t.Error("a frame of a datagram that is too long"); return nil }
	if err := emitDatagram(&testLink, 4, protoUDP, src, dst, make([]byte, 65516), 1500, 64, testIDs, alloc, none); err != errDatagramTooLong {
		t.Errorf("IPv4, 65516 bytes: %v", err)
	}
	if err := emitDatagram(&testLink, 6, protoUDP, src, dst, make([]byte, 65536), 1500, 64, testIDs, alloc, none); err != errDatagramTooLong {
		t.Errorf("IPv6, 65536 bytes: %v", err)
	}
}

// Identifications do not come twice in a short time, and have no pattern.
func TestN28_FragmentIDs(t *testing.T) {
	guests := []ipAddr{testAddr("10.0.2.15"), testAddr("10.0.2.16"), testAddr("fd00::15")}
	for _, version := range []uint16{4, 6} {
		ids := &fragmentIDs{seed: maphash.MakeSeed()}
		seen, steps := map[[2]uint32]bool{}, map[uint32]int{}
		last := make([]uint32, len(guests))
		for range 10000 {
			for i, guest := range guests {
				host := testAddr("192.0.2.1")
				id := ids.next(version, protoUDP, &host, &guest)
				key := [2]uint32{uint32(i), id}
				if seen[key] || version == 4 && (id == 0 || id > 0xffff) {
					t.Fatalf("v%d: identification %#x", version, id)
				}
				seen[key] = true
				steps[id-last[i]]++
				last[i] = id
			}
		}
		for step, n := range steps {
			if n > 30 { // chance makes it 5 or so in IPv4
				t.Errorf("v%d: %d times a step of %#x", version, n, step)
			}
		}
	}
	// A permutation, of all numbers.
	seen := map[uint32]bool{}
	for n := range uint32(1 << 16) {
		seen[testIDs.shuffle(7, n, 8)] = true
	}
	if len(seen) != 1<<16 {
		t.Errorf("%d of 65536 numbers", len(seen))
	}
}

// Every fragment of a datagram has the identification of that.
func TestFragmentIDs(t *testing.T) {
	for _, version := range []uint16{4, 6} {
		seen := map[uint32]bool{}
		for range 200 {
			var first []byte
			emit := func(frame []byte) error {
				if first == nil {
					first = frame
				}
				return nil
			}
			alloc := func(n int) []byte { return make([]byte, n) }
			if err := emitDatagram(&testLink, version, protoUDP, ipAddr{}, ipAddr{}, make([]byte, 3000), 1500, 64, testIDs, alloc, emit); err != nil {
				t.Fatal(err)
			}
			if version == 4 {
				seen[uint32(binary.BigEndian.Uint16(first[18:]))] = true
			} else {
				seen[binary.BigEndian.Uint32(first[58:])] = true
			}
		}
		if len(seen) != 200 || version == 4 && seen[0] {
			t.Errorf("version %d: %d different identifications in 200", version, len(seen))
		}
	}
}

func TestIPAllocations(t *testing.T) {
	packets := [][]byte{ip4(17, udpHello), ip6(0, extHeader(17, 0), udpHello)}
	frame := make([]byte, 1514)
	big := make([]byte, 1514)
	src, dst := testAddr("192.0.2.1"), testAddr("10.0.2.15")
	n := leastAllocs(100, 0, func() {
		for _, b := range packets {
			var p ipPacket
			if parseIP(b, &p) != nil || !checksumOK(&p, p.payload) || !p.dst.isUnicast() {
				t.Fatal("refused")
			}
		}
		for _, version := range []uint16{4, 6} {
			finishFrame(frame, &testLink, version, protoTCP, src, dst)
		}
		emitDatagram(&testLink, 4, protoUDP, src, dst, big, 1500, 64, testIDs,
			func(n int) []byte { return frame[:n] }, func([]byte) error { return nil })
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Above the files named here nothing knows which family a packet is of.
func TestFamilySwitchPolicy(t *testing.T) {
	allowed := map[string]bool{"ip.go": true, "checksum.go": true, "icmp4.go": true, "icmp6.go": true}
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	checked := 0
	for _, e := range entries {
		name := e.Name()
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || allowed[name] {
			continue
		}
		checked++
		src, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range familySwitches(t, name, src) {
			t.Errorf("%s: a family switch belongs in ip.go, checksum.go, icmp4.go or icmp6.go", v)
		}
	}
	if checked == 0 {
		t.Error("no file was checked")
	}
}

// familySwitches returns what in a file decides by the address family: the
// predicates of netip and net, and comparisons of a version with 4 or 6.
func familySwitches(t *testing.T, name string, src []byte) (found []string) {
	t.Helper()
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, src, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	report := func(n ast.Node, what string) {
		found = append(found, fmt.Sprintf("%v: %s", fset.Position(n.Pos()), what))
	}
	// isVersion is true of x.version, ipVersion, version(x), uint8(p.version)….
	var isVersion func(e ast.Expr) bool
	isVersion = func(e ast.Expr) bool {
		switch e := e.(type) {
		case *ast.Ident:
			return strings.HasSuffix(strings.ToLower(e.Name), "version") || e.Name == "versionOf"
		case *ast.SelectorExpr:
			return isVersion(e.Sel)
		case *ast.ParenExpr:
			return isVersion(e.X)
		case *ast.CallExpr:
			return isVersion(e.Fun) || len(e.Args) == 1 && isVersion(e.Args[0])
		}
		return false
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.SelectorExpr:
			switch n.Sel.Name {
			case "Is4", "Is6", "Is4In6", "As4", "To4", "BitLen":
				report(n, n.Sel.Name)
			}
		case *ast.BinaryExpr:
			switch n.Op {
			case token.EQL, token.NEQ, token.LSS, token.GTR, token.LEQ, token.GEQ:
				for _, side := range [][2]ast.Expr{{n.X, n.Y}, {n.Y, n.X}} {
					if _, literal := side[1].(*ast.BasicLit); literal && isVersion(side[0]) {
						report(n, "comparison of a version")
					}
				}
			}
		case *ast.SwitchStmt:
			if n.Tag != nil && isVersion(n.Tag) {
				report(n, "switch on a version")
			}
		}
		return true
	})
	return found
}

func TestFamilySwitchPolicyFinds(t *testing.T) {
	const head = "package p\nfunc f() {\n"
	for src, want := range map[string]int{
		"if a.Is4() {}":                            1,
		"if a.Unmap().Is6() && b.Is4In6() {}":      2,
		"x := a.As4()":                             1,
		"if p.version == 4 {}":                     1,
		"if 6 != key.version {}":                   1,
		"if version > 4 {}":                        1,
		"switch p.version { case 4: }":             1,
		"switch versionOf(a) { case 4: }":          1,
		"if versionOf(a) == 6 {}":                  1,
		"if uint8(p.version) == 6 {}":              1,
		"if p.version == q.version {}":             0,
		"k := flowKey{version: p.version}":         0,
		"x := a.As16(); y := netip.AddrFrom4(z)":   0,
		"switch p.proto { case 6: }":               0,
		"// if a.Is4()\n_ = \"tcp4 version == 4\"": 0,
	} {
		if got := familySwitches(t, "x.go", []byte(head+src+"\n}\n")); len(got) != want {
			t.Errorf("%s: found %v, want %d", src, got, want)
		}
	}
}

func BenchmarkParseIP(b *testing.B) {
	for name, packet := range map[string][]byte{"v4": ip4(17, udpHello), "v6": ip6(17, udpHello), "v6ext": ip6(0, extHeader(60, 0), extHeader(17, 0), udpHello)} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var p ipPacket
			for b.Loop() {
				if err := parseIP(packet, &p); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFinishFrame(b *testing.B) {
	for _, version := range []uint16{4, 6} {
		for _, n := range []int{20, 1460} {
			b.Run(fmt.Sprintf("v%d/%d", version, n), func(b *testing.B) {
				frame := make([]byte, frameHeaderLen(version)+n)
				src, dst := testAddr("192.0.2.1"), testAddr("10.0.2.15")
				b.SetBytes(int64(len(frame)))
				b.ReportAllocs()
				for b.Loop() {
					finishFrame(frame, &testLink, version, protoTCP, src, dst)
				}
			})
		}
	}
}
