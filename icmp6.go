package slirp

import "github.com/KarpelesLab/slirp/internal/reassembly"

// ICMP for IPv6: RFC 4443 (echo) and RFC 4861 (neighbour discovery). There are
// no router advertisements, and a guest is answered for every address that it
// looks for: all of the world is behind the gateway's MAC address.

// Types of ICMPv6.
const (
	ICMPv6TypeEchoRequest           = 128
	ICMPv6TypeEchoReply             = 129
	ICMPv6TypeRouterSolicitation    = 133
	ICMPv6TypeRouterAdvertisement   = 134
	ICMPv6TypeNeighborSolicitation  = 135
	ICMPv6TypeNeighborAdvertisement = 136

	icmpv6Unreachable      = 1
	icmpv6TooBig           = 2
	icmpv6TimeExceeded     = 3
	icmpv6ParameterProblem = 4
	icmpv6Redirect         = 137
)

// Neighbour discovery (RFC 4861 sections 4.3, 4.4 and 4.6.1).
const (
	ndpHopLimit        = 255 // "the packet could not possibly have been forwarded by a router"
	ndpHeaderLen       = 24  // of a solicitation and of an advertisement, with the target
	ndpSourceLinkLayer = 1   // option types
	ndpTargetLinkLayer = 2
	ndpSolicited       = 0x40 // flags of an advertisement
	ndpOverride        = 0x20
)

// sendHeaderProblem tells the guest what is wrong with the extension headers of
// its packet, in the name of the destination. "An ICMPv6 error message MUST NOT be
// originated as a result of receiving […] a packet destined to an IPv6 multicast
// address", but for the options that ask for it (RFC 4443 section 2.4 (e.3)).
func (s *Stack) sendHeaderProblem(p *ipPacket, l *link) error {
	src := p.dst
	if p.dst.isMulticast() && p.problem.multicast {
		src = s.routerFor(p)
	}
	if !p.src.isUnicast() || !src.isUnicast() {
		s.count(icmpSuppressed)
		return nil
	}
	return s.sendError(p, src, icmpv6ParameterProblem, p.problem.code, uint32(p.problem.pointer), l)
}

// sendFragmentProblem tells the guest what is wrong with an IPv6 fragment, if it
// is to be told. IPv4 has no word for it.
func (s *Stack) sendFragmentProblem(p *ipPacket, verdict reassembly.Verdict, l *link) error {
	var code uint8
	var pointer uint32
	switch verdict {
	case reassembly.BadLength:
		pointer = 4 // the payload length
	case reassembly.TooLong:
		pointer = uint32(p.fragData - fragHeaderLen + 2) // the fragment offset
	case reassembly.HeaderIncomplete:
		code = 3
	default:
		return nil
	}
	if p.version == 4 {
		return nil
	}
	// RFC 8200 section 4.5 wants the first two for any fragment. What is in one
	// that is not the first cannot be seen: of ICMPv6, it may be of an error.
	if p.fragOffset != 0 && p.proto == protoICMPv6 || p.fragOffset == 0 && !mayReport(p) {
		s.count(icmpSuppressed)
		return nil
	}
	return s.sendError(p, p.dst, icmpv6ParameterProblem, code, pointer, l)
}

func (s *Stack) handleICMPv6(p *ipPacket, l *link) error {
	switch p.payload[0] {
	case ICMPv6TypeEchoRequest:
		return s.replyEcho(p, l, ICMPv6TypeEchoReply)
	case ICMPv6TypeNeighborSolicitation:
		return s.replyNeighbor(p, l)
	}
	s.count(dropICMPType)
	return nil
}

// replyNeighbor answers a neighbour solicitation (RFC 4861 section 7.2.4).
func (s *Stack) replyNeighbor(p *ipPacket, l *link) error {
	target, ok := solicitedTarget(p)
	if !ok {
		s.count(dropNeighbor)
		return nil
	}
	dst := p.src
	flags := byte(ndpSolicited | ndpOverride)
	if p.src.isUnspecified() {
		// The guest asks whether an address is free (RFC 4862 section 5.4):
		// it is, unless the stack has it. "If the source of the solicitation
		// is the unspecified address, the node MUST set the Solicited flag to
		// zero and multicast the advertisement to the all-nodes address."
		if !s.cfg.isOwn(target) {
			s.count(dropNeighbor)
			return nil
		}
		dst = ipAddr{0: 0xff, 1: 0x02, 15: 1}
		flags = ndpOverride
	}

	hl := l.headerLen(p.version)
	frame := s.newFrame(hl + ndpHeaderLen + 8)
	m := frame[hl:]
	clear(m)
	m[0] = ICMPv6TypeNeighborAdvertisement
	m[4] = flags
	copy(m[8:], target[:])
	m[24] = ndpTargetLinkLayer
	m[25] = 1 // in units of 8 bytes
	copy(m[26:], l.gw[:])
	s.count(neighborReplies)
	return s.sendICMP(l, p.version, target, dst, ndpHopLimit, frame)
}

// solicitedTarget returns the target of a neighbour solicitation that passes the
// checks of RFC 4861 section 7.1.1. The destination is not checked: some guests
// do not send to the solicited-node group of the target.
func solicitedTarget(p *ipPacket) (target ipAddr, ok bool) {
	m := p.payload
	// RFC 6980 section 5: a message that came in fragments, or in an atomic one, is
	// ignored.
	if p.fragmented || p.ttl != ndpHopLimit || m[1] != 0 || len(m) < ndpHeaderLen {
		return target, false
	}
	target = ipAddr(m[8:24])
	unspecified := p.src.isUnspecified()
	if !target.isUnicast() || !unspecified && !p.src.isUnicast() {
		return target, false
	}
	for opts := m[ndpHeaderLen:]; len(opts) > 0; {
		if len(opts) < 2 {
			return target, false
		}
		n := int(opts[1]) * 8
		if n == 0 || n > len(opts) {
			return target, false
		}
		if opts[0] == ndpSourceLinkLayer && unspecified {
			return target, false
		}
		opts = opts[n:]
	}
	return target, true
}
