package slirp

// The Internet checksum: RFC 1071, and for each protocol that carries it RFC 791
// section 3.1 (IPv4 header), RFC 792 (ICMP), RFC 768 (UDP), RFC 9293 section 3.1
// (TCP), RFC 4443 section 2.3 (ICMPv6) and RFC 8200 section 8.1 (all over IPv6).

import (
	"encoding/binary"

	"github.com/KarpelesLab/slirp/internal/sum"
)

// IPChecksum returns the checksum of an IPv4 header. The checksum field of hdr
// counts as zero, whatever it holds.
func IPChecksum(hdr []byte) uint16 {
	return ^sumWithout(hdr, 10, 0)
}

// TCPChecksum returns the checksum of a TCP segment over IPv4, given as its
// header and its payload. The addresses are 4 bytes each. The checksum field of
// tcp counts as zero, whatever it holds.
func TCPChecksum(src, dst []byte, tcp, payload []byte) uint16 {
	return classicChecksum(src, dst, protoTCP, tcp, payload)
}

// UDPChecksum returns the checksum of a UDP datagram over IPv4, given as its
// header and its payload. The addresses are 4 bytes each. The checksum field of
// udp counts as zero, whatever it holds. The result is never 0, which in a UDP
// header says that there is no checksum: a computed 0 is returned as 0xFFFF.
func UDPChecksum(src, dst []byte, udp, payload []byte) uint16 {
	c := classicChecksum(src, dst, protoUDP, udp, payload)
	if c == 0 {
		c = 0xffff
	}
	return c
}

// IPv6Checksum returns the checksum of data under the IPv6 pseudo-header of the
// two addresses, the upper-layer length and the protocol. Data is summed as
// given: a checksum field in it must be zero to get the value for that field,
// and must be in place to get 0 from data that is intact. A UDP sender turns a
// result of 0 into 0xFFFF.
func IPv6Checksum(src, dst [16]byte, proto uint8, upperLen uint32, data []byte) uint16 {
	return ^sum.Of(data, pseudoSum((*ipAddr)(&src), (*ipAddr)(&dst), proto, upperLen))
}

func classicChecksum(src, dst []byte, proto uint8, hdr, payload []byte) uint16 {
	length := uint32(len(hdr)) + uint32(len(payload))
	s := sum.Of(dst, sum.Of(src, pseudoTail(proto, length)))
	s = sumWithout(hdr, checksumOffset(proto), s)
	return ^sum.Join(s, len(hdr), sum.Of(payload, 0))
}

// checksumOffset returns where the checksum field stands in a transport header,
// or -1 for a protocol without one.
func checksumOffset(proto uint8) int {
	switch proto {
	case protoTCP:
		return 16
	case protoUDP:
		return 6
	case protoICMP, protoICMPv6:
		return 2
	}
	return -1
}

// fillChecksum computes the checksum of the transport header and its data in b,
// and writes it to its field, whatever that held. A b too short for the field,
// or of a protocol without one, is left alone.
func fillChecksum(proto uint8, src, dst *ipAddr, b []byte) {
	off := checksumOffset(proto)
	if off < 0 || len(b) < off+2 {
		return
	}
	field := b[off : off+2]
	field[0], field[1] = 0, 0
	c := ^sum.Of(b, transportPseudoSum(proto, src, dst, len(b)))
	if c == 0 && proto == protoUDP {
		// RFC 768: "If the computed checksum is zero, it is transmitted as all
		// ones". RFC 8200 section 8.1 says the same for IPv6.
		c = 0xffff
	}
	binary.BigEndian.PutUint16(field, c)
}

// checksumOK reports whether the checksum of b, the transport header of p and
// its data, is acceptable: when it is right, when it is 0, or when it holds the
// pseudo-header sum alone, which is what a guest leaves for a network card that
// would complete it. ICMP for IPv4 has no pseudo-header. For UDP, b ends where
// the UDP length says. A b too short for a checksum is not acceptable.
func checksumOK(p *ipPacket, b []byte) bool {
	off := checksumOffset(p.proto)
	if off < 0 || len(b) < off+2 {
		return false
	}
	field := binary.BigEndian.Uint16(b[off:])
	if field == 0 {
		return true
	}
	pseudo := transportPseudoSum(p.proto, &p.src, &p.dst, len(b))
	return field == pseudo || sum.Of(b, pseudo) == 0xffff
}

// transportPseudoSum is the sum that a transport checksum starts from. It is
// never 0 for a protocol that has a pseudo-header.
func transportPseudoSum(proto uint8, src, dst *ipAddr, length int) uint16 {
	if proto == protoICMP {
		return 0
	}
	return pseudoSum(src, dst, proto, uint32(length))
}

// pseudoSum returns the sum of the pseudo-header of either family. No switch is
// needed: the ff:ff in front of a mapped IPv4 address is zero in one's
// complement arithmetic, and the fields of the two pseudo-headers differ in
// width only.
func pseudoSum(src, dst *ipAddr, proto uint8, length uint32) uint16 {
	return sum.Of(dst[:], sum.Of(src[:], pseudoTail(proto, length)))
}

// pseudoTail is the sum of the pseudo-header's length and protocol.
func pseudoTail(proto uint8, length uint32) uint16 {
	return sum.Add(sum.Add(uint16(length>>16), uint16(length)), uint16(proto))
}

// sumWithout is sum.Of, with the 16-bit field at the even offset off of b left out
// if b holds it.
func sumWithout(b []byte, off int, initial uint16) uint16 {
	if len(b) < off+2 {
		return sum.Of(b, initial)
	}
	return sum.Of(b[off+2:], sum.Of(b[:off], initial))
}
