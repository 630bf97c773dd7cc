package slirp

// Both IP families, both ways: one ipPacket is read from either version, and one
// builder writes the frames. RFC 791 (IPv4), RFC 8200 (IPv6, its extension
// headers and fragments), RFC 6864 (the IPv4 identification), RFC 9293 section
// 3.7.1 (the segment sizes that follow from the headers).
//
// Above this file a packet has a version, two addresses and a transport, and
// nobody asks which family it is.

import (
	"encoding/binary"
	"errors"
	"hash/maphash"
	"net/netip"
	"sync/atomic"

	"github.com/KarpelesLab/slirp/internal/reassembly"
	"github.com/KarpelesLab/slirp/internal/sum"
)

// Protocol numbers, in the IPv4 protocol and the IPv6 next header field.
const (
	protoHopByHop    = 0
	protoICMP        = 1
	protoTCP         = 6
	protoUDP         = 17
	protoRouting     = 43
	protoFragment    = 44
	protoICMPv6      = 58
	protoNone        = 59 // "No Next Header", RFC 8200 section 4.7
	protoDestination = 60
)

const (
	etherHeaderLen   = 14
	ipv4HeaderLen    = 20 // as built; one that is read may have options
	ipv6HeaderLen    = 40
	fragHeaderLen    = 8 // RFC 8200 section 4.5
	etherTypeIPv4    = 0x0800
	etherTypeIPv6    = 0x86dd
	ipv4DontFragment = 0x4000
	ipv4More         = 0x2000
	ipv4OffsetMask   = 0x1fff // in units of 8 bytes
	ipv6More         = 0x0001 // in the Fragment header
	defaultHopLimit  = 64     // TTL and hop limit of what is sent
	maxIPLength      = 65535  // IPv4 total length, IPv6 payload length

	// maxExtensionHeaders bounds the work for one packet. RFC 8200 section 4.1
	// recommends at most six.
	maxExtensionHeaders = 8
	// maxHeaderOptions does the same for the options of one extension header, padding
	// included, as RFC 8504 section 5.3 lets a host.
	maxHeaderOptions = 64
)

var errDatagramTooLong = errors.New("datagram does not fit an IP packet")

// ipAddr is an address of either family. An IPv4 address is stored mapped, as
// ::ffff:a.b.c.d.
type ipAddr [16]byte

// ipAddrFrom returns a without its zone. The zero Addr becomes "::".
func ipAddrFrom(a netip.Addr) ipAddr {
	if !a.IsValid() {
		return ipAddr{}
	}
	return a.As16()
}

// addr returns a, unmapped.
func (a ipAddr) addr() netip.Addr { return netip.AddrFrom16(a).Unmap() }

// v4 returns the IPv4 address in a, if a is a mapped one.
func (a *ipAddr) v4() (addr uint32, ok bool) {
	ok = binary.BigEndian.Uint64(a[:]) == 0 && binary.BigEndian.Uint32(a[8:]) == 0xffff
	return binary.BigEndian.Uint32(a[12:]), ok
}

// isUnspecified reports whether a is 0.0.0.0 or "::".
func (a *ipAddr) isUnspecified() bool {
	v4, ok := a.v4()
	return ok && v4 == 0 || *a == ipAddr{}
}

// isLoopback reports whether a is in 127.0.0.0/8, or is ::1.
func (a *ipAddr) isLoopback() bool {
	v4, ok := a.v4()
	return ok && v4>>24 == 127 || *a == ipAddr{15: 1}
}

// isMulticast reports whether a is in 224.0.0.0/4 or ff00::/8.
func (a *ipAddr) isMulticast() bool {
	v4, ok := a.v4()
	return ok && v4>>28 == 0xe || a[0] == 0xff
}

// isBroadcast reports whether a is 255.255.255.255. The broadcast address of a
// subnet looks like any other: the guest's netmask is not known here.
func (a *ipAddr) isBroadcast() bool {
	v4, ok := a.v4()
	return ok && v4 == 0xffffffff
}

// isUnicast reports whether a can name one host: loopback addresses can.
func (a *ipAddr) isUnicast() bool {
	return !a.isUnspecified() && !a.isMulticast() && !a.isBroadcast()
}

// versionOf returns the IP version that carries a: 4 for an IPv4 address,
// mapped or not, otherwise 6.
func versionOf(a netip.Addr) uint16 {
	if a.Is4() || a.Is4In6() {
		return 4
	}
	return 6
}

// unmapPrefix returns the prefix of IPv4 that p is if it is one of mapped addresses,
// and else p.
func unmapPrefix(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); a.Is4In6() && p.Bits() >= 96 {
		return netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p
}

// address returns the stack's own address of an IP version, if it has one.
func (cfg *Config) address(version uint16) (ipAddr, bool) {
	for _, a := range cfg.Addresses {
		if versionOf(a) == version {
			return ipAddrFrom(a), true
		}
	}
	return ipAddr{}, false
}

// isOwn reports whether a is one of the stack's own addresses.
func (cfg *Config) isOwn(a ipAddr) bool {
	for _, own := range cfg.Addresses {
		if ipAddrFrom(own) == a {
			return true
		}
	}
	return false
}

// transportMSS is the largest TCP segment that an MTU has room for behind IP and
// TCP headers without options (RFC 9293 section 3.7.1).
func transportMSS(version uint16, mtu int) int {
	return mtu - ipHeaderLen(version) - 20
}

// defaultMSS is the segment size of a peer that names none: "If an MSS Option is
// not received at connection setup, TCP implementations MUST assume a default
// send MSS of 536 (576 - 40) for IPv4 or 1220 (1280 - 60) for IPv6" (RFC 9293
// section 3.7.1).
func defaultMSS(version uint16) int {
	if version == 4 {
		return 536
	}
	return 1220
}

// ipPacket is a packet of either family as the guest sent it. Its slices are
// borrowed from the caller of HandlePacket.
type ipPacket struct {
	raw     []byte // from the IP header to the end that it gives: no Ethernet padding
	payload []byte // behind the IP and extension headers; may be empty
	src     ipAddr
	dst     ipAddr
	version uint16 // 4 or 6
	proto   uint8  // what payload begins with; protoNone if malformed
	ttl     uint8  // TTL or hop limit

	// A packet with one of these set is dropped, and its payload is not to be
	// read as a transport header.
	badChecksum bool // the IPv4 header checksum is neither right nor 0
	malformed   bool // the options or extension headers make no sense, or must not be followed
	sourceRoute bool // malformed because it wants to be sent on from here

	// fragment says that this is a part of a packet; its payload is to be read
	// when that is whole. An atomic fragment (RFC 6946) is not one.
	fragment   bool
	fragMore   bool   // there are others behind it
	headerCut  bool   // it is the first, and does not hold the whole header chain
	fragOffset uint16 // where it belongs, in bytes
	fragNext   uint16 // IPv6: the index in raw of the byte that announces the Fragment header
	fragData   int    // the index in raw of what is behind the IPv4 or Fragment header
	fragID     uint32

	fragmented bool // it has a Fragment header, or was put together of fragments

	// IPv6: what of a malformed packet its source is to be told, if problem is set.
	problem headerProblem
}

// headerProblem is what an ICMPv6 Parameter Problem says about extension headers.
type headerProblem struct {
	set       bool
	multicast bool // to be reported of a packet to a multicast address too
	code      uint8
	pointer   int
}

// parseIP reads the IP header of b into p, and the extension headers behind it.
// The error is one of the sentinels that HandlePacket returns; p is then of no
// use. It does not allocate.
func parseIP(b []byte, p *ipPacket) error { return p.parse(b, false) }

// parseQuoted is parseIP for the front of a packet: it may be cut anywhere
// behind the IP header.
func parseQuoted(b []byte, p *ipPacket) error { return p.parse(b, true) }

func (p *ipPacket) parse(b []byte, cut bool) error {
	*p = ipPacket{}
	if len(b) < ipv4HeaderLen {
		return ErrPacketTooShort
	}
	switch b[0] >> 4 {
	case 4:
		return p.parse4(b, cut)
	case 6:
		return p.parse6(b, cut)
	}
	return ErrIPVersion
}

// parse4 reads an IPv4 packet of at least 20 bytes (RFC 791 section 3.1).
func (p *ipPacket) parse4(b []byte, cut bool) error {
	ihl := int(b[0]&0x0f) * 4
	if ihl < ipv4HeaderLen || ihl > len(b) {
		return ErrIHL
	}
	end := int(binary.BigEndian.Uint16(b[2:]))
	if end < ihl || end > len(b) && !cut {
		return ErrIPv4TotalLength
	}
	end = min(end, len(b))

	p.version = 4
	p.raw = b[:end:end]
	p.payload = p.raw[ihl:]
	p.ttl = b[8]
	p.proto = b[9]
	p.src = mapped(b[12:16])
	p.dst = mapped(b[16:20])

	if b[10]|b[11] != 0 && sum.Of(b[:ihl], 0) != 0xffff {
		p.badChecksum = true
	}
	frag := binary.BigEndian.Uint16(b[6:])
	p.fragment = frag&(ipv4More|ipv4OffsetMask) != 0
	p.fragmented = p.fragment
	p.fragMore = frag&ipv4More != 0
	p.fragOffset = frag & ipv4OffsetMask * 8
	p.fragID = uint32(binary.BigEndian.Uint16(b[4:]))
	p.fragData = ihl
	if !p.options4(b[ipv4HeaderLen:ihl]) {
		p.malformed = true
		p.proto = protoNone
		p.payload = nil
	}
	return nil
}

// Options of IPv4 (RFC 791 section 3.1).
const (
	ipv4EndOfOptions = 0
	ipv4NoOperation  = 1
	ipv4LooseRoute   = 131
	ipv4StrictRoute  = 137
)

// options4 reports whether the options of an IPv4 header are well-formed, and none
// is a source route: nobody uses those in good faith (RFC 7126 sections 4.3 and
// 4.4). All others are skipped.
func (p *ipPacket) options4(b []byte) bool {
	for len(b) > 0 {
		switch b[0] {
		case ipv4EndOfOptions:
			return true
		case ipv4NoOperation:
			b = b[1:]
			continue
		case ipv4LooseRoute, ipv4StrictRoute:
			p.sourceRoute = true
			return false
		}
		if len(b) < 2 || b[1] < 2 || len(b) < int(b[1]) {
			return false
		}
		b = b[b[1]:]
	}
	return true
}

// mapped returns the IPv4 address in the four bytes of b.
func mapped(b []byte) ipAddr {
	return ipAddr{10: 0xff, 11: 0xff, 12: b[0], 13: b[1], 14: b[2], 15: b[3]}
}

// parse6 reads an IPv6 packet of at least 20 bytes (RFC 8200 section 3). A
// jumbogram (RFC 2675) has a payload length of 0 and a Hop-by-Hop header, which
// then lies beyond the end: it is malformed.
func (p *ipPacket) parse6(b []byte, cut bool) error {
	if len(b) < ipv6HeaderLen {
		return ErrIPv6TooShort
	}
	end := ipv6HeaderLen + int(binary.BigEndian.Uint16(b[4:]))
	if end > len(b) && !cut {
		return ErrIPv6PayloadLength
	}
	end = min(end, len(b))

	p.version = 6
	p.raw = b[:end:end]
	p.ttl = b[7]
	p.src = ipAddr(b[8:24])
	p.dst = ipAddr(b[24:40])
	if !p.walk(b[6], cut) || p.problem.set {
		p.malformed = true
		// No error is sent about a fragment that is not the first, nor about an
		// ICMP error, which any packet may be whose transport header is not found.
		p.problem.set = p.problem.set && p.payload != nil && p.fragOffset == 0 && !p.headerCut && !isICMPError(p)
		p.proto = protoNone
		p.payload = nil
	}
	return nil
}

// walk follows the extension headers (RFC 8200 section 4), the first of which is
// of the type next, and sets proto and payload to what is behind them. It is
// false if that cannot be found, or must not be looked at. A problem that the
// source is to be told of does not end the walk: the first one counts.
//
// What is behind the Fragment header of a first fragment is looked at when the
// packet is whole.
//
// Deviation: section 4 wants a Parameter Problem about a next header that is not
// known. It may be any transport protocol, and those that are not supported are
// dropped without a word in both families.
func (p *ipPacket) walk(next uint8, cut bool) bool {
	b := p.raw[ipv6HeaderLen:]
	at := 6 // the index in raw of next
	for n := 0; ; n++ {
		switch next {
		case protoHopByHop, protoDestination, protoRouting, protoFragment:
		default:
			p.proto, p.payload = next, b
			p.headerCut = p.fragment && !cut && len(b) < transportHeaderLen(next, b)
			return true
		}
		if n == maxExtensionHeaders {
			return false
		}
		// A first fragment must hold all headers (RFC 8200 section 4.5): that
		// it does not is for whoever puts the packet together to say.
		if len(b) < 8 || next != protoFragment && len(b) < 8+int(b[1])*8 {
			if p.fragment && !cut {
				p.proto, p.payload, p.headerCut = next, b, true
				return true
			}
			return false
		}
		here := len(p.raw) - len(b)
		size := 8
		if next != protoFragment {
			size += int(b[1]) * 8
		}
		switch {
		case next == protoFragment:
			if !p.fragmentHeader(b, at) {
				return false
			}
			if p.fragOffset != 0 {
				p.proto, p.payload = b[0], b[size:]
				return true
			}
		case p.fragment:
		case next == protoRouting:
			// Section 4.4: a routing header that is used up is ignored. One with
			// segments left makes this node a router of its list: to that, every
			// type is unrecognized, 0 as well (RFC 5095 section 3).
			if b[3] != 0 {
				p.sourceRoute = true
				p.report(headerProblem{pointer: here + 2})
			}
		default:
			// Section 4.1: "restricted to appear immediately after an IPv6
			// header only".
			if next == protoHopByHop && n > 0 {
				p.report(headerProblem{code: 1, pointer: at})
			}
			if !p.options6(b[2:size], here+2) {
				return false
			}
		}
		at = here
		next, b = b[0], b[size:]
	}
}

// fragmentHeader reads the Fragment header at b, which the byte at the index next
// of raw announces (RFC 8200 section 4.5). It is false for one behind another.
func (p *ipPacket) fragmentHeader(b []byte, next int) bool {
	p.fragmented = true
	frag := binary.BigEndian.Uint16(b[2:])
	if frag&^6 == 0 {
		return true // atomic: nothing is missing
	}
	if p.fragment {
		return false // a fragment of a fragment
	}
	p.fragment = true
	p.fragMore = frag&ipv6More != 0
	p.fragOffset = frag &^ 7
	p.fragID = binary.BigEndian.Uint32(b[4:])
	p.fragNext = uint16(next)
	p.fragData = len(p.raw) - len(b) + fragHeaderLen
	return true
}

// options6 goes through the options in b, which begins at the index here of raw.
// It is false if they are not well-formed, are too many, or one is of a kind that is
// discarded in silence. The high bits say what becomes of a packet with an option that is
// not known, as none is: "00 - skip over this option", "01 - discard the packet",
// "10 - discard the packet and, regardless of whether or not the packet's
// Destination Address was a multicast address, send an ICMP Parameter Problem,
// Code 2", "11 - … only if the packet's Destination Address was not a multicast
// address" (RFC 8200 section 4.2).
func (p *ipPacket) options6(b []byte, here int) bool {
	for n := 0; len(b) > 0; n++ {
		if n == maxHeaderOptions {
			return false
		}
		if b[0] == 0 { // Pad1 has no length
			b, here = b[1:], here+1
			continue
		}
		if len(b) < 2 || len(b) < 2+int(b[1]) {
			return false
		}
		switch action := b[0] >> 6; action {
		case 0:
		case 1:
			return false
		default:
			p.report(headerProblem{code: 2, pointer: here, multicast: action == 2})
		}
		size := 2 + int(b[1])
		b, here = b[size:], here+size
	}
	return true
}

// report notes a problem, unless there is one.
func (p *ipPacket) report(problem headerProblem) {
	if !p.problem.set {
		p.problem = problem
		p.problem.set = true
	}
}

// transportHeaderLen is how much of a packet its transport header takes, which
// begins with b.
func transportHeaderLen(proto uint8, b []byte) int {
	switch proto {
	case protoTCP:
		if len(b) > 12 {
			return max(20, int(b[12]>>4)*4)
		}
		return 20
	case protoUDP:
		return udpHeaderLen
	case protoICMPv6:
		return icmpHeaderLen
	}
	return 0
}

// reassemblyKey names the packet that p is a fragment of.
func (p *ipPacket) reassemblyKey(ns uintptr) reassembly.Key {
	key := reassembly.Key{Namespace: ns, Src: p.src, Dst: p.dst, ID: p.fragID, Version: p.version}
	if p.version == 4 {
		key.Proto = uint16(p.proto)
	}
	return key
}

// reassemblyFragment returns p as a fragment. Its slices are those of p.
func (p *ipPacket) reassemblyFragment() reassembly.Fragment {
	return reassembly.Fragment{
		Header: p.raw[:p.fragData], NextHeader: int(p.fragNext), HeaderCut: p.headerCut,
		Offset: int(p.fragOffset), More: p.fragMore, Data: p.raw[p.fragData:],
	}
}

// completeHeader fills in the header checksum of a packet that was put together.
func completeHeader(packet []byte) {
	if packet[0]>>4 == 4 {
		binary.BigEndian.PutUint16(packet[10:], IPChecksum(packet[:int(packet[0]&0x0f)*4]))
	}
}

// ipHeaderLen is the length of the IP header of a frame that is built here.
func ipHeaderLen(version uint16) int {
	if version == 4 {
		return ipv4HeaderLen
	}
	return ipv6HeaderLen
}

// frameHeaderLen is the room to leave in front of the transport header for the
// Ethernet and IP headers.
func frameHeaderLen(version uint16) int {
	return etherHeaderLen + ipHeaderLen(version)
}

// front is the length of what stands in front of the Ethernet header.
func (l *link) front() int {
	if l.virtio {
		return VirtioNetHeaderLen
	}
	return 0
}

// headerLen is frameHeaderLen with what stands in front of it on the link.
func (l *link) headerLen(version uint16) int { return l.front() + frameHeaderLen(version) }

// finishFrame writes the headers in front of the transport header and data that
// begin at l.headerLen(version) of frame, and the transport checksum of TCP,
// UDP, ICMP and ICMPv6. The frame is exactly as long as the packet needs, and
// the packet not longer than 65,535 bytes. It does not allocate.
func finishFrame(frame []byte, l *link, version uint16, proto uint8, src, dst ipAddr) {
	finishFrameHop(frame, l, version, proto, src, dst, defaultHopLimit)
}

// finishFrameHop is finishFrame with a TTL or hop limit.
func finishFrameHop(frame []byte, l *link, version uint16, proto uint8, src, dst ipAddr, hop uint8) {
	fillChecksum(proto, &src, &dst, frame[l.headerLen(version):])
	putHeaders(frame, l, version, proto, &src, &dst, hop)
}

// VirtioNetHeaderLen is the length of the header that [Config.VirtioNetHeader] has in
// front of every frame.
const VirtioNetHeaderLen = 12

// Values of a virtio_net_hdr (VIRTIO 1.3 section 5.1.6).
const (
	virtioNeedsChecksum = 1 // flags
	virtioTCPv4         = 1 // gso_type
	virtioTCPv6         = 4
	virtioUDP           = 5 // VIRTIO_NET_HDR_GSO_UDP_L4, of either family
)

// putVirtioHeader writes the header of a frame that is complete.
func putVirtioHeader(frame []byte) {
	clear(frame[:VirtioNetHeaderLen])
	frame[10] = 1 // num_buffers
}

// finishSegment is finishFrame for a segment of a TCB, whose checksum field has the sum of
// its payload already. On a link that completes frames the checksum is left to that, and a
// segment with more payload than mss to be cut there.
func finishSegment(frame []byte, l *link, version uint16, src, dst ipAddr, mss int) {
	if !l.virtio {
		segment := frame[l.headerLen(version):]
		header := segment[:int(segment[12]>>4)*4]
		be, off := binary.BigEndian, checksumOffset(protoTCP)
		be.PutUint16(segment[off:], ^sum.Of(header, pseudoSum(&src, &dst, protoTCP, uint32(len(segment)))))
		putHeaders(frame, l, version, protoTCP, &src, &dst, defaultHopLimit)
		return
	}
	le, start := binary.LittleEndian, frameHeaderLen(version)
	segment := leaveChecksum(frame, l, version, protoTCP, &src, &dst)
	if hl := int(segment[12]>>4) * 4; len(segment)-hl > mss {
		frame[1] = virtioTCPv6
		if version == 4 {
			frame[1] = virtioTCPv4
		}
		le.PutUint16(frame[2:], uint16(start+hl)) // hdr_len
		le.PutUint16(frame[4:], uint16(mss))      // gso_size
	}
}

// finishDatagrams is finishFrame for several UDP datagrams on a link that cuts them: the
// transport header is that of one datagram, whose data is that of all, and each is to
// have size bytes of it but the last, which may have less.
func finishDatagrams(frame []byte, l *link, version uint16, src, dst ipAddr, size int) {
	le, start := binary.LittleEndian, frameHeaderLen(version)
	leaveChecksum(frame, l, version, protoUDP, &src, &dst)
	frame[1] = virtioUDP
	le.PutUint16(frame[2:], uint16(start+udpHeaderLen)) // hdr_len
	le.PutUint16(frame[4:], uint16(size))               // gso_size
}

// leaveChecksum writes the headers in front of a packet whose transport checksum the link
// completes. It returns the packet from the transport header on.
func leaveChecksum(frame []byte, l *link, version uint16, proto uint8, src, dst *ipAddr) (transport []byte) {
	putHeaders(frame, l, version, proto, src, dst, defaultHopLimit)
	le, start, off := binary.LittleEndian, frameHeaderLen(version), checksumOffset(proto)
	transport = frame[VirtioNetHeaderLen+start:]
	binary.BigEndian.PutUint16(transport[off:], transportPseudoSum(proto, src, dst, len(transport)))
	frame[0] = virtioNeedsChecksum
	le.PutUint16(frame[6:], uint16(start)) // csum_start
	le.PutUint16(frame[8:], uint16(off))   // csum_offset
	return transport
}

// putHeaders writes the headers in front of a whole packet.
func putHeaders(frame []byte, l *link, version uint16, proto uint8, src, dst *ipAddr, hop uint8) {
	be := binary.BigEndian
	if l.virtio {
		putVirtioHeader(frame)
		frame = frame[VirtioNetHeaderLen:]
	}
	copy(frame, l.guest[:])
	copy(frame[6:], l.gw[:])
	ip := frame[etherHeaderLen:]
	if version == 4 {
		be.PutUint16(frame[12:], etherTypeIPv4)
		ip = ip[:ipv4HeaderLen]
		ip[0] = 0x45
		ip[1] = 0
		be.PutUint16(ip[2:], uint16(len(frame)-etherHeaderLen))
		// RFC 6864 section 4.1: the identification of a packet that is not and
		// cannot be fragmented means nothing.
		be.PutUint16(ip[4:], 0)
		be.PutUint16(ip[6:], ipv4DontFragment)
		ip[8] = hop
		ip[9] = proto
		be.PutUint16(ip[10:], 0)
		copy(ip[12:], src[12:])
		copy(ip[16:], dst[12:])
		be.PutUint16(ip[10:], ^sum.Of(ip, 0))
		return
	}
	be.PutUint16(frame[12:], etherTypeIPv6)
	be.PutUint32(ip, 6<<28)
	be.PutUint16(ip[4:], uint16(len(frame)-etherHeaderLen-ipv6HeaderLen))
	ip[6] = proto
	ip[7] = hop
	copy(ip[8:], src[:])
	copy(ip[24:], dst[:])
}

// emitDatagram sends one datagram to the guest: transport holds its UDP, ICMP or
// ICMPv6 header, and its data. It leaves as one frame if the MTU has room for it,
// else as fragments in order. Frames are taken from alloc and handed to emit,
// whose first error ends the datagram and is returned. The checksum field of
// transport is written to; transport is the caller's again on return.
func emitDatagram(l *link, version uint16, proto uint8, src, dst ipAddr, transport []byte, mtu int, hop uint8, ids *fragmentIDs,
	alloc func(n int) []byte, emit func(frame []byte) error) error {
	hl := l.headerLen(version)
	if ipHeaderLen(version)+len(transport) <= mtu {
		frame := alloc(hl + len(transport))
		copy(frame[hl:], transport)
		finishFrameHop(frame, l, version, proto, src, dst, hop)
		return emit(frame)
	}

	headers, limit := ipHeaderLen(version), maxIPLength
	if version == 4 {
		limit -= ipv4HeaderLen
	} else {
		headers += fragHeaderLen
	}
	if len(transport) > limit {
		return errDatagramTooLong
	}
	fillChecksum(proto, &src, &dst, transport)
	id := ids.next(version, proto, &src, &dst)
	room := (mtu - headers) &^ 7
	headers += l.front() + etherHeaderLen
	for off := 0; off < len(transport); off += room {
		part := transport[off:min(off+room, len(transport))]
		more := off+len(part) < len(transport)
		frame := alloc(headers + len(part))
		copy(frame[headers:], part)
		if version == 4 {
			putFragment4(frame, l, proto, &src, &dst, hop, id, off, more)
		} else {
			putFragment6(frame, l, proto, &src, &dst, hop, id, off, more)
		}
		if err := emit(frame); err != nil {
			return err
		}
	}
	return nil
}

// fragmentIDs makes the identifications of packets that are sent in fragments. Two
// packets between the same ends do not have the same one for as long as can be
// (RFC 6864 section 4.3), and from those of one pair nothing follows for another (RFC
// 7739 section 5.3): a counter, of several pairs, is shuffled in another way for each
// pair. The seed must be set; the methods may be called concurrently.
type fragmentIDs struct {
	seed     maphash.Seed
	counters [64]atomic.Uint32
}

// next returns the identification of a packet: of 16 bits and not 0 in IPv4, where
// that is what whole packets have; of 32 bits in IPv6.
func (ids *fragmentIDs) next(version uint16, proto uint8, src, dst *ipAddr) uint32 {
	type pair struct {
		src, dst       ipAddr
		version, proto uint16
	}
	key := maphash.Comparable(ids.seed, pair{*src, *dst, version, uint16(proto)})
	counter := &ids.counters[key%uint64(len(ids.counters))]
	if version == 6 {
		return ids.shuffle(key, counter.Add(1), 16)
	}
	for {
		if id := ids.shuffle(key, counter.Add(1)&0xffff, 8); id != 0 {
			return id
		}
	}
}

// shuffle maps the numbers of twice so many bits to one another, without a pattern:
// a Feistel network of four rounds.
func (ids *fragmentIDs) shuffle(key uint64, n uint32, bits uint) uint32 {
	type round struct {
		key  uint64
		half uint32
		n    uint32
	}
	mask := uint32(1)<<bits - 1
	left, right := n>>bits, n&mask
	for i := range uint32(4) {
		f := uint32(maphash.Comparable(ids.seed, round{key, right, i}))
		left, right = right, left^f&mask
	}
	return left<<bits | right
}

// putFragment4 writes the headers of an IPv4 fragment (RFC 791 section 3.2).
func putFragment4(frame []byte, l *link, proto uint8, src, dst *ipAddr, hop uint8, id uint32, off int, more bool) {
	be := binary.BigEndian
	putHeaders(frame, l, 4, proto, src, dst, hop)
	ip := frame[l.front()+etherHeaderLen:][:ipv4HeaderLen]
	frag := uint16(off / 8)
	if more {
		frag |= ipv4More
	}
	be.PutUint16(ip[4:], uint16(id))
	be.PutUint16(ip[6:], frag)
	be.PutUint16(ip[10:], IPChecksum(ip))
}

// putFragment6 writes the headers of an IPv6 fragment (RFC 8200 section 4.5).
func putFragment6(frame []byte, l *link, proto uint8, src, dst *ipAddr, hop uint8, id uint32, off int, more bool) {
	be := binary.BigEndian
	putHeaders(frame, l, 6, protoFragment, src, dst, hop)
	fh := frame[l.front()+etherHeaderLen+ipv6HeaderLen:][:fragHeaderLen]
	frag := uint16(off) // a multiple of 8: the offset stands above the flags
	if more {
		frag |= ipv6More
	}
	fh[0] = proto
	fh[1] = 0
	be.PutUint16(fh[2:], frag)
	be.PutUint32(fh[4:], id)
}
