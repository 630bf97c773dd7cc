package slirp

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/KarpelesLab/slirp/internal/sum"
)

// naivePseudo builds the pseudo-header of an IP version as bytes.
func naivePseudo(version uint16, src, dst ipAddr, proto uint8, length int) []byte {
	var b []byte
	if version == 4 {
		b = append(b, src[12:]...)
		b = append(b, dst[12:]...)
		b = append(b, 0, proto)
		return binary.BigEndian.AppendUint16(b, uint16(length))
	}
	b = append(b, src[:]...)
	b = append(b, dst[:]...)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	return append(b, 0, 0, 0, proto)
}

// knownIPv4Header is the header of textbooks, with the checksum they give.
var knownIPv4Header = []byte{
	0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00,
	0x40, 0x11, 0xb8, 0x61, // checksum b861
	0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8, 0x00, 0xc7,
}

func TestIPChecksum(t *testing.T) {
	hdr := append([]byte(nil), knownIPv4Header...)
	for _, field := range []uint16{0xb861, 0, 0x1234} {
		binary.BigEndian.PutUint16(hdr[10:], field)
		if got := IPChecksum(hdr); got != 0xb861 {
			t.Errorf("with %#04x in place: %#04x, want 0xb861", field, got)
		}
	}
	for n := range hdr { // any length, no panic
		b := append([]byte(nil), hdr[:n]...)
		if n >= 12 {
			b[10], b[11] = 0, 0
		}
		if got, want := IPChecksum(hdr[:n]), ^sum.Of(b, 0); got != want {
			t.Errorf("%d bytes: %#04x, want %#04x", n, got, want)
		}
	}
}

func TestTransportChecksums(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	src, dst := []byte{10, 0, 2, 15}, []byte{192, 0, 2, 1}
	for _, tt := range []struct {
		name  string
		fn    func(src, dst, hdr, payload []byte) uint16
		proto uint8
		field int
	}{
		{"TCP", TCPChecksum, 6, 16},
		{"UDP", UDPChecksum, 17, 6},
	} {
		for hdrLen := 0; hdrLen < 45; hdrLen++ {
			for _, n := range []int{0, 1, 2, 3, 7, 8, 63, 64, 65, 1459, 1460} {
				hdr, payload := make([]byte, hdrLen), make([]byte, n)
				for i := range hdr {
					hdr[i] = byte(r.Uint32())
				}
				for i := range payload {
					payload[i] = byte(r.Uint32())
				}
				whole := append([]byte(nil), hdr...)
				if hdrLen >= tt.field+2 {
					whole[tt.field], whole[tt.field+1] = 0, 0
				}
				whole = append(whole, payload...)
				want := ^sum.Of(append(naivePseudo(4, mapped(src), mapped(dst), tt.proto, len(whole)), whole...), 0)
				if want == 0 && tt.proto == 17 {
					want = 0xffff
				}
				if got := tt.fn(src, dst, hdr, payload); got != want {
					t.Fatalf("%s with %d+%d bytes: %#04x, want %#04x", tt.name, hdrLen, n, got, want)
				}
			}
		}
		tt.fn(nil, nil, nil, nil)
		tt.fn([]byte{1}, []byte{1, 2, 3}, []byte{1}, []byte{1})
	}
}

func TestUDPChecksumIsNeverZero(t *testing.T) {
	src, dst := []byte{10, 0, 2, 15}, []byte{192, 0, 2, 1}
	hdr := []byte{0, 53, 0, 53, 0, 10, 0, 0}
	payload := []byte{0, 0}
	c := UDPChecksum(src, dst, hdr, payload)
	binary.BigEndian.PutUint16(payload, c) // now the sum is all ones
	if got := UDPChecksum(src, dst, hdr, payload); got != 0xffff {
		t.Errorf("UDPChecksum = %#04x, want 0xffff", got)
	}
	a, b := mapped(src), mapped(dst)
	msg := append(append([]byte(nil), hdr...), payload...)
	fillChecksum(protoUDP, &a, &b, msg)
	if got := binary.BigEndian.Uint16(msg[6:]); got != 0xffff {
		t.Errorf("fillChecksum wrote %#04x, want 0xffff", got)
	}
	p := ipPacket{version: 4, proto: protoUDP, src: a, dst: b}
	if !checksumOK(&p, msg) {
		t.Error("a UDP checksum of 0xffff is refused")
	}
}

func TestIPv6Checksum(t *testing.T) {
	src, dst := testAddr("fd00::15"), testAddr("2001:db8::1")
	r := rand.New(rand.NewPCG(5, 6))
	for n := 0; n < 100; n++ {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(r.Uint32())
		}
		want := ^sum.Of(append(naivePseudo(6, src, dst, 58, n), data...), 0)
		if got := IPv6Checksum(src, dst, 58, uint32(n), data); got != want {
			t.Fatalf("%d bytes: %#04x, want %#04x", n, got, want)
		}
	}
	// The length is a number of its own: 32 bits, and not that of data.
	want := ^sum.Of(append(naivePseudo(6, src, dst, 6, 0x12345678), 1, 2, 3), 0)
	if got := IPv6Checksum(src, dst, 6, 0x12345678, []byte{1, 2, 3}); got != want {
		t.Errorf("long length: %#04x, want %#04x", got, want)
	}
	// Data is summed as given: intact data with its checksum in place gives 0.
	msg := []byte{128, 0, 0, 0, 0, 1, 0, 2}
	binary.BigEndian.PutUint16(msg[2:], IPv6Checksum(src, dst, 58, 8, msg))
	if got := IPv6Checksum(src, dst, 58, 8, msg); got != 0 {
		t.Errorf("over an intact message: %#04x, want 0", got)
	}
}

// testPair is one pair of addresses of a family.
type testPair struct {
	version  uint16
	src, dst ipAddr
}

var testPairs = []testPair{
	{4, testAddr("10.0.2.15"), testAddr("192.0.2.1")},
	{4, testAddr("0.0.0.0"), testAddr("0.0.0.0")},
	{4, testAddr("255.255.255.255"), testAddr("255.255.255.255")},
	{6, testAddr("fd00::15"), testAddr("2001:db8::1")},
	{6, testAddr("::1"), testAddr("::1")},
	{6, testAddr("::ffff:10.0.0.1"), testAddr("::ffff:127.0.0.1")},
}

// One pseudo-header sum serves both families.
func TestPseudoSum(t *testing.T) {
	for _, a := range testPairs {
		for _, n := range []int{0, 1, 8, 20, 1480, 65515, 65535} {
			for _, proto := range []uint8{6, 17, 58, 255} {
				want := sum.Of(naivePseudo(a.version, a.src, a.dst, proto, n), 0)
				if got := pseudoSum(&a.src, &a.dst, proto, uint32(n)); got != want {
					t.Errorf("%v > %v proto %d length %d: %#04x, want %#04x", a.src.addr(), a.dst.addr(), proto, n, got, want)
				}
			}
		}
	}
}

func TestFillAndVerify(t *testing.T) {
	for _, a := range testPairs {
		for _, tt := range []struct {
			proto  uint8
			field  int
			pseudo bool
		}{
			{protoTCP, 16, true}, {protoUDP, 6, true}, {protoICMPv6, 2, true}, {protoICMP, 2, false},
		} {
			for n := tt.field + 2; n < 90; n++ {
				b := make([]byte, n)
				for i := range b {
					b[i] = byte(i*7 + n)
				}
				p := ipPacket{version: a.version, proto: tt.proto, src: a.src, dst: a.dst}
				field := b[tt.field : tt.field+2]
				fillChecksum(tt.proto, &a.src, &a.dst, b)
				var whole []byte
				if tt.pseudo {
					whole = naivePseudo(a.version, a.src, a.dst, tt.proto, n)
				}
				if got := sum.Of(append(whole, b...), 0); got != 0xffff {
					t.Fatalf("proto %d, %d bytes: the filled message sums to %#04x", tt.proto, n, got)
				}
				right := binary.BigEndian.Uint16(field)
				if !checksumOK(&p, b) {
					t.Fatalf("proto %d, %d bytes: the right checksum is refused", tt.proto, n)
				}
				partial := sum.Of(whole, 0)
				for _, v := range []struct {
					name  string
					value uint16
					want  bool
				}{
					{"zero", 0, true},
					{"pseudo-header sum", partial, true},
					{"right+1", right + 1, right+1 == 0 || right+1 == partial && tt.pseudo},
					{"complement of the pseudo-header sum", ^partial, ^partial == right || ^partial == 0},
				} {
					binary.BigEndian.PutUint16(field, v.value)
					if v.value == right || v.value == ^right && v.name == "right+1" {
						continue
					}
					if !tt.pseudo && v.name != "zero" && v.name != "right+1" {
						continue
					}
					if got := checksumOK(&p, b); got != v.want {
						t.Fatalf("proto %d, %d bytes, %s %#04x (right is %#04x): accepted %v", tt.proto, n, v.name, v.value, right, got)
					}
				}
				binary.BigEndian.PutUint16(field, right)
				if right != 0 && right != partial {
					b[n-1] ^= 0x10 // in the data, or in the field if there is none
					ok := checksumOK(&p, b)
					if now := binary.BigEndian.Uint16(field); ok && now != 0 && now != partial {
						t.Fatalf("proto %d, %d bytes: a flipped bit is accepted", tt.proto, n)
					}
				}
			}
			// Too short for the field: nothing to fill, nothing to accept.
			for n := 0; n < tt.field+2; n++ {
				b := make([]byte, n)
				fillChecksum(tt.proto, &a.src, &a.dst, b)
				if checksumOK(&ipPacket{proto: tt.proto}, b) {
					t.Errorf("proto %d: %d bytes accepted", tt.proto, n)
				}
			}
		}
	}
	b := []byte{1, 2, 3, 4, 5, 6, 7, 8}
	fillChecksum(99, &ipAddr{}, &ipAddr{}, b)
	if string(b) != "\x01\x02\x03\x04\x05\x06\x07\x08" || checksumOK(&ipPacket{proto: 99}, b) {
		t.Error("a protocol without a known checksum was given one")
	}
}
