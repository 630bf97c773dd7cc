package slirp

// The Internet checksum: RFC 1071, and for each protocol that carries it RFC 791
// section 3.1 (IPv4 header), RFC 792 (ICMP), RFC 768 (UDP), RFC 9293 section 3.1
// (TCP), RFC 4443 section 2.3 (ICMPv6) and RFC 8200 section 8.1 (all over IPv6).

import (
	"encoding/binary"
	"math/bits"
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
	return ^sum(data, pseudoSum((*ipAddr)(&src), (*ipAddr)(&dst), proto, upperLen))
}

func classicChecksum(src, dst []byte, proto uint8, hdr, payload []byte) uint16 {
	length := uint32(len(hdr)) + uint32(len(payload))
	s := sum(dst, sum(src, pseudoTail(proto, length)))
	s = sumWithout(hdr, checksumOffset(proto), s)
	if len(hdr)%2 == 0 {
		return ^sum(payload, s)
	}
	// The payload begins in the second half of a 16-bit word. RFC 1071 section
	// 2 (B): the sum of byte-swapped words is the byte-swapped sum.
	return ^add16(s, bits.ReverseBytes16(sum(payload, 0)))
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
	c := ^sum(b, transportPseudoSum(proto, src, dst, len(b)))
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
	return field == pseudo || sum(b, pseudo) == 0xffff
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
	return sum(dst[:], sum(src[:], pseudoTail(proto, length)))
}

// pseudoTail is the sum of the pseudo-header's length and protocol.
func pseudoTail(proto uint8, length uint32) uint16 {
	return add16(add16(uint16(length>>16), uint16(length)), uint16(proto))
}

// sumWithout is sum, with the 16-bit field at the even offset off of b left out
// if b holds it.
func sumWithout(b []byte, off int, initial uint16) uint16 {
	if len(b) < off+2 {
		return sum(b, initial)
	}
	return sum(b[off+2:], sum(b[:off], initial))
}

// add16 adds in one's complement: a carry out of the top comes back in at the
// bottom.
func add16(a, b uint16) uint16 {
	s := uint32(a) + uint32(b)
	return uint16(s) + uint16(s>>16)
}

// sum returns the one's complement sum of initial and of b, read as big-endian
// 16-bit words, the last one padded with a zero byte (RFC 1071 section 1). It is
// not complemented. Sums chain, sum(b2, sum(b1, 0)), if b1 has an even length.
//
// The words are added eight bytes at a time and folded at the end (section 2
// (C)), in little-endian order, in which they need no swapping on the machines
// that matter: the sum of swapped words is the swapped sum (section 2 (B)).
func sum(b []byte, initial uint16) uint16 {
	le := binary.LittleEndian
	acc := uint64(bits.ReverseBytes16(initial))
	var carry, acc2, carry2 uint64
	for len(b) >= 64 {
		// Two chains, that the processor can follow at the same time.
		w := b[:64]
		acc, carry = bits.Add64(acc, le.Uint64(w), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[8:]), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[16:]), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[24:]), carry)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[32:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[40:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[48:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[56:]), carry2)
		b = b[64:]
	}
	acc, carry = bits.Add64(acc, acc2, carry)
	acc, carry = bits.Add64(acc, carry2, carry)
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, le.Uint64(b), carry)
		b = b[8:]
	}
	var tail uint64
	shift := 0
	if len(b) >= 4 {
		tail = uint64(le.Uint32(b))
		shift = 32
		b = b[4:]
	}
	if len(b) >= 2 {
		tail |= uint64(le.Uint16(b)) << shift
		shift += 16
		b = b[2:]
	}
	if len(b) == 1 {
		tail |= uint64(b[0]) << shift
	}
	acc, carry = bits.Add64(acc, tail, carry)
	acc, carry = bits.Add64(acc, 0, carry)
	acc += carry

	acc = acc>>32 + acc&0xffffffff
	acc = acc>>32 + acc&0xffffffff
	acc = acc>>16 + acc&0xffff
	acc = acc>>16 + acc&0xffff
	return bits.ReverseBytes16(uint16(acc))
}
