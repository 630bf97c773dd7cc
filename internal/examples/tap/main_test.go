package main

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/KarpelesLab/slirp"
)

func TestARPReply(t *testing.T) {
	const (
		guest, gw     = "\x52\x54\x00\x12\x34\x56", "\x52\x55\x0a\x00\x02\x02"
		header        = "\x08\x06\x00\x01\x08\x00\x06\x04\x00"
		unknown       = "\x00\x00\x00\x00\x00\x00"
		ipGuest, ipGW = "\x0a\x00\x02\x0f", "\x0a\x00\x02\x02"
	)
	request := func(sender, target string) string {
		return strings.Repeat("\xff", 6) + guest + header + "\x01" + guest + sender + unknown + target
	}
	for _, test := range []struct{ name, frame, want string }{
		{"request", request(ipGuest, ipGW), guest + gw + header + "\x02" + gw + ipGW + guest + ipGuest},
		{"padded", request(ipGuest, ipGW) + unknown + unknown, guest + gw + header + "\x02" + gw + ipGW + guest + ipGuest},
		{"announcement", request(ipGuest, ipGuest), ""},
		{"probe", request("\x00\x00\x00\x00", ipGuest), ""},
		{"reply", gw + guest + header + "\x02" + guest + ipGuest + gw + ipGW, ""},
		{"truncated", request(ipGuest, ipGW)[:41], ""},
	} {
		if got := string(arpReply([]byte(test.frame))); got != test.want {
			t.Errorf("%s: answered with %x, want %x", test.name, got, test.want)
		}
	}
}

func TestIsUDP(t *testing.T) {
	ether := strings.Repeat("\x52", 12)
	ip4 := func(proto string) string { return ether + "\x08\x00\x45" + strings.Repeat("\x00", 8) + proto }
	ip6 := func(next string) string { return ether + "\x86\xdd\x60" + strings.Repeat("\x00", 5) + next }
	for frame, want := range map[string]bool{
		ip4("\x11"): true, ip4("\x06"): false, ip6("\x11"): true, ip6("\x06"): false,
		ether + "\x08\x06" + strings.Repeat("\x11", 28): false, // ARP
	} {
		if got := isUDP([]byte(frame)); got != want {
			t.Errorf("%x: %v", frame, got)
		}
	}
}

// TestFinishInner: the checksum of a datagram in a tunnel is completed, as UDPChecksum
// has it; all others are left to the stack.
func TestFinishInner(t *testing.T) {
	src, dst := []byte{10, 9, 0, 1}, []byte{10, 9, 0, 2}
	header := func(flags byte, start int) []byte {
		b := make([]byte, slirp.VirtioNetHeaderLen)
		b[0] = flags
		binary.NativeEndian.PutUint16(b[6:], uint16(start))
		binary.NativeEndian.PutUint16(b[8:], 6)
		return b
	}
	for etherType, first := range map[string]byte{etherTypeIPv4: 0x45, etherTypeIPv6: 0x60} {
		outer := append([]byte(strings.Repeat("\x52", 12)+etherType), first)
		outer = append(outer, make([]byte, 99)...)
		inner := []byte{0x12, 0x34, 0, 9, 0, 13, 0, 0, 'h', 'e', 'l', 'l', 'o'}
		// What the kernel leaves is the sum of the pseudo-header.
		want := slirp.UDPChecksum(src, dst, inner[:8], inner[8:])
		binary.BigEndian.PutUint16(inner[6:], ^slirp.UDPChecksum(src, dst, []byte{0, 0, 0, 0, 0, 0, 0, 0}, make([]byte, 5)))
		frame, own := append(outer[:len(outer):len(outer)], inner...), transport(outer)
		for name, h := range map[string][]byte{
			"finished":  header(0, len(outer)),
			"its own":   header(1, own),
			"truncated": header(1, len(frame)-7),
		} {
			got := bytes.Clone(frame)
			if finishInner(h, got); !bytes.Equal(got, frame) {
				t.Errorf("%x, %s: % x, was % x", etherType, name, got, frame)
			}
		}
		finishInner(header(1, len(outer)), frame)
		if got := binary.BigEndian.Uint16(frame[len(outer)+6:]); got != want {
			t.Errorf("%x: checksum %#04x, want %#04x", etherType, got, want)
		}
		clear(frame[len(outer):])
		binary.BigEndian.PutUint16(frame[len(outer):], 0xffff)
		finishInner(header(1, len(outer)), frame)
		if got := binary.BigEndian.Uint16(frame[len(outer)+6:]); got == 0 {
			t.Errorf("%x: a checksum of 0", etherType)
		}
	}
}
