package slirp

// ICMP: what both families share, and ICMP for IPv4. RFC 792 (the messages), RFC
// 1122 section 3.2.2 (which errors may be sent, and how much they quote) and
// section 3.2.2.6 (echo). What only IPv6 has is in icmp6.go.

import (
	"encoding/binary"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/reassembly"
)

// Types of ICMP for IPv4.
const (
	icmpEchoReply        = 0
	icmpUnreachable      = 3
	icmpSourceQuench     = 4
	icmpRedirect         = 5
	icmpEchoRequest      = 8
	icmpTimeExceeded     = 11
	icmpParameterProblem = 12
	icmpFragNeeded       = 4    // the code of an icmpUnreachable
	icmpHeaderLen        = 8    // of every message that is read or sent, in both families
	icmpv4ErrorLen       = 576  // RFC 1812 section 4.3.2.3: an error with its IP header is no longer
	icmpv6ErrorLen       = 1280 // RFC 4443 section 2.4 (c): "the minimum IPv6 MTU"
	icmpErrorRate        = 1000 // errors a second, of one Stack
	icmpErrorBurst       = 50
	icmpErrorInterval    = int64(time.Second / icmpErrorRate)
)

// icmpProto is the protocol number of the ICMP that goes with an IP version.
func icmpProto(version uint16) uint8 {
	if version == 4 {
		return protoICMP
	}
	return protoICMPv6
}

// handleICMP takes an ICMP or ICMPv6 packet that is whole, and answers it before
// it returns. The error is the Writer's.
func (s *Stack) handleICMP(p *ipPacket, l *link) error {
	switch {
	case p.proto != icmpProto(p.version):
		s.count(dropProtocol)
	case len(p.payload) < icmpHeaderLen:
		s.count(dropTruncated)
	case !checksumOK(p, p.payload):
		s.count(dropChecksum)
	case p.version == 4:
		return s.handleICMPv4(p, l)
	default:
		return s.handleICMPv6(p, l)
	}
	return nil
}

func (s *Stack) handleICMPv4(p *ipPacket, l *link) error {
	if p.payload[0] == icmpEchoRequest {
		return s.replyEcho(p, l, icmpEchoReply)
	}
	s.count(dropICMPType)
	return nil
}

// replyEcho answers an echo request in the name of whatever unicast destination
// it has: "Data received in an ICMP Echo Request MUST be entirely included in
// the resulting Echo Reply" (RFC 1122 section 3.2.2.6, RFC 4443 section 4.2).
func (s *Stack) replyEcho(p *ipPacket, l *link, reply uint8) error {
	if !p.src.isUnicast() || !p.dst.isUnicast() {
		s.count(dropAddress)
		return nil
	}
	hl := l.headerLen(p.version)
	frame := s.newFrame(hl + len(p.payload))
	m := frame[hl:]
	copy(m, p.payload)
	m[0], m[1] = reply, 0
	s.count(echoReplies)
	return s.sendICMP(l, p.version, p.dst, p.src, defaultHopLimit, frame)
}

// sendICMP completes and sends the message that stands at l.headerLen(version)
// of frame, in fragments if it is longer than the MTU.
func (s *Stack) sendICMP(l *link, version uint16, src, dst ipAddr, hop uint8, frame []byte) error {
	proto := icmpProto(version)
	mtu := s.mtuTo(guestKey{l.ns, dst, uintptr(version)})
	message := frame[l.headerLen(version):]
	if ipHeaderLen(version)+len(message) <= mtu {
		finishFrameHop(frame, l, version, proto, src, dst, hop)
		return s.send(l, frame)
	}
	emit := func(frame []byte) error { return s.send(l, frame) }
	return emitDatagram(l, version, proto, src, dst, message, mtu, hop, &s.fragmentID, s.newFrame, emit)
}

// unreachable is the reason of a Destination Unreachable.
type unreachable uint8

const (
	unreachablePort unreachable = iota
	unreachableHost
	unreachableNet
	unreachableProhibited // by policy
	unreachableTooBig     // the packet is too long for the way
)

// message returns the type and code that say u in an IP version (RFC 792, RFC
// 1812 section 5.2.7.1; RFC 4443 section 3.1).
func (u unreachable) message(version uint16) (typ, code uint8) {
	if version == 4 {
		return icmpUnreachable, [...]uint8{
			unreachablePort:       3,
			unreachableHost:       1,
			unreachableNet:        0,
			unreachableProhibited: 13,
			unreachableTooBig:     icmpFragNeeded,
		}[u]
	}
	if u == unreachableTooBig {
		return icmpv6TooBig, 0 // RFC 4443 section 3.2
	}
	return icmpv6Unreachable, [...]uint8{
		unreachablePort:       4,
		unreachableHost:       3,
		unreachableNet:        0,
		unreachableProhibited: 1,
	}[u]
}

// sendUnreachable tells the guest why its own packet did not arrive. Quoted is
// that packet, which may be cut anywhere behind the IP header, and is not kept.
// Nothing is sent about a packet that must not be answered with an error, or
// beyond the rate limit. The error is the Writer's.
//
// A port is unreachable in the name of the destination that has it. Everything
// else the stack says itself, as the router it is.
func (s *Stack) sendUnreachable(kind unreachable, quoted []byte, l *link) error {
	var p ipPacket
	if parseQuoted(quoted, &p) != nil || !mayReport(&p) {
		s.count(icmpSuppressed)
		return nil
	}
	src := p.dst
	if kind != unreachablePort {
		src = s.routerFor(&p)
	}
	typ, code := kind.message(p.version)
	return s.sendError(&p, src, typ, code, 0, l)
}

// sendTooBig tells the guest that its packet, the front of which is quoted, was too
// long for the host's network, and what is not: mtu, or if that is not known, 0, the
// next size below it that links are known to have. IPv4 is only told what it has
// forbidden to fragment: "Don't Fragment" is set (RFC 791 section 3.2).
func (s *Stack) sendTooBig(quoted []byte, mtu int, l *link) error {
	var p ipPacket
	if parseQuoted(quoted, &p) != nil || !mayReport(&p) {
		s.count(icmpSuppressed)
		return nil
	}
	size := int(binary.BigEndian.Uint16(p.raw[2:]))
	if p.version == 6 {
		size = ipv6HeaderLen + int(binary.BigEndian.Uint16(p.raw[4:]))
	}
	if mtu <= 0 || mtu >= size {
		mtu = plateauBelow(size)
	}
	smallest, fragments := ipv4MinMTU, p.raw[6]&(ipv4DontFragment>>8) == 0
	if p.version == 6 {
		mtu = max(mtu, ipv6MinMTU)
		smallest, fragments = ipv6MinMTU, false
	}
	if fragments || size <= smallest {
		s.count(icmpSuppressed)
		return nil
	}
	typ, code := unreachableTooBig.message(p.version)
	return s.sendError(&p, s.routerFor(&p), typ, code, uint32(mtu), l)
}

// sendError sends an ICMP error about p from the address src, unless there were
// many. The fourth to eighth byte of the message hold param.
func (s *Stack) sendError(p *ipPacket, src ipAddr, typ, code uint8, param uint32, l *link) error {
	if !s.mayAnswer(l.ns, limitICMP, s.now()) {
		s.count(icmpRateLimited)
		return nil
	}
	hl := l.headerLen(p.version)
	quote := p.raw
	if room := icmpErrorLen(p.version) - ipHeaderLen(p.version) - icmpHeaderLen; len(quote) > room {
		quote = quote[:room]
	}
	frame := s.newFrame(hl + icmpHeaderLen + len(quote))
	m := frame[hl:]
	clear(m[:icmpHeaderLen])
	m[0], m[1] = typ, code
	binary.BigEndian.PutUint32(m[4:], param)
	copy(m[icmpHeaderLen:], quote)
	s.count(icmpErrors)
	return s.sendICMP(l, p.version, src, p.src, defaultHopLimit, frame)
}

// timeExceededType is the type of a Time Exceeded.
func timeExceededType(version uint16) uint8 {
	if version == 4 {
		return icmpTimeExceeded
	}
	return icmpv6TimeExceeded
}

// sendReassemblyTimeout tells a guest that fragments of its packet did not come in
// time, in the name of the destination that waited for them.
func (s *Stack) sendReassemblyTimeout(e *reassembly.Expired) {
	var p ipPacket
	l, ok := s.linkTo(e.Key.Namespace, ipAddr(e.Key.Src).addr())
	if !ok || parseQuoted(e.Front, &p) != nil || !mayReport(&p) {
		s.count(icmpSuppressed)
		return
	}
	s.sendError(&p, p.dst, timeExceededType(p.version), 1, 0, &l)
}

// sendHopLimitExceeded tells a guest that its packet got no further than the
// Stack, as the first router of a traceroute says. It is said of what a traceroute
// sends: TCP, UDP and echo requests. What would not be answered with a greater
// TTL is not answered.
func (s *Stack) sendHopLimitExceeded(p *ipPacket, l *link) error {
	traces := p.proto == protoTCP || p.proto == protoUDP || isEchoRequest(p)
	if !traces || len(p.payload) < icmpHeaderLen || !mayReport(p) {
		s.count(icmpSuppressed)
		return nil
	}
	return s.sendError(p, s.routerFor(p), timeExceededType(p.version), 0, 0, l)
}

// isEchoRequest reports whether p is a ping.
func isEchoRequest(p *ipPacket) bool {
	request := byte(ICMPv6TypeEchoRequest)
	if p.version == 4 {
		request = icmpEchoRequest
	}
	return p.proto == icmpProto(p.version) && len(p.payload) > 0 && p.payload[0] == request
}

// routerFor returns the address that the Stack reports from, as the router it is;
// without one of its own, the destination of p.
func (s *Stack) routerFor(p *ipPacket) ipAddr {
	if own, ok := s.cfg.address(p.version); ok {
		return own
	}
	return p.dst
}

// icmpErrorLen bounds the IP packet that carries an error. Both bounds are below
// the smallest MTU.
func icmpErrorLen(version uint16) int {
	if version == 4 {
		return icmpv4ErrorLen
	}
	return icmpv6ErrorLen
}

// mayReport reports whether an ICMP error may be sent about p. "An ICMP error
// message MUST NOT be sent as the result of receiving an ICMP error message, a
// datagram destined to an IP broadcast or IP multicast address, …, a
// non-initial fragment, or a datagram whose source address does not define a
// single host" (RFC 1122 section 3.2.2; RFC 4443 section 2.4 (e) is the same).
// What cannot be read is not reported either: it might be an error.
func mayReport(p *ipPacket) bool {
	return !p.malformed && p.fragOffset == 0 &&
		p.src.isUnicast() && p.dst.isUnicast() && !isICMPError(p)
}

// isICMPError reports whether p is an ICMP error, or may be one because its type
// is cut off.
func isICMPError(p *ipPacket) bool {
	if p.proto != icmpProto(p.version) {
		return false
	}
	if len(p.payload) == 0 {
		return true
	}
	typ := p.payload[0]
	if p.version == 6 {
		// RFC 4443 section 2.1: errors have "a zero in the high-order bit".
		// Section 2.4 (e.2) adds the redirect.
		return typ < 128 || typ == icmpv6Redirect
	}
	switch typ {
	case icmpUnreachable, icmpSourceQuench, icmpRedirect, icmpTimeExceeded, icmpParameterProblem:
		return true
	}
	return false
}

// tokenBucket limits how often something happens, after a burst (RFC 4443 section
// 2.4 (f)). The zero value is full. Its methods may be called concurrently.
type tokenBucket struct {
	// full is when the bucket will be full again, in nanoseconds as a moment is:
	// each token taken puts that off by one interval.
	full atomic.Int64
}

// take takes a token, if there is one, of a bucket of icmpErrorBurst that gets
// icmpErrorRate in a second.
func (b *tokenBucket) take(now moment) bool {
	return b.takeEvery(now, icmpErrorInterval, icmpErrorBurst)
}

// takeEvery takes a token, if there is one, of a bucket of burst that gets one in
// every interval of nanoseconds.
func (b *tokenBucket) takeEvery(now moment, interval, burst int64) bool {
	depth := burst * interval
	t := int64(now)
	for {
		old := b.full.Load()
		from := max(old, t)
		next := from + interval
		if next > t+depth {
			return false
		}
		if b.full.CompareAndSwap(old, next) {
			return true
		}
	}
}

// isFull reports whether nothing is missing from b.
func (b *tokenBucket) isFull(now moment) bool { return b.full.Load() <= int64(now) }

// takeError takes an ICMP error of the namespace that is about a packet that a
// flow has sent: one that came to no one, of DialContext; or one that was too long
// for the guest's side of the network. It reports false for any other message. The
// error is that of the Writer.
//
// The message must have a right checksum, quote the ports, and name a flow that is
// there. Its own source does not matter, which may be any router; nor do checksums
// inside of the quote (RFC 5508 section 4.1).
func (s *Stack) takeError(ns uintptr, p *ipPacket) (took bool, err error) {
	var q ipPacket
	kind, unreached := unreachableOf(p)
	size, tooBig := tooBigOf(p)
	if !unreached && !tooBig || parseQuoted(p.payload[icmpHeaderLen:], &q) != nil || q.malformed ||
		q.version != p.version || q.fragOffset != 0 || len(q.payload) < 8 || !checksumOK(p, p.payload) {
		return false, nil
	}
	be := binary.BigEndian
	key := flowKey{
		ns: ns, guest: q.dst, host: q.src, proto: uint16(q.proto), version: q.version,
		guestPort: be.Uint16(q.payload[2:]), hostPort: be.Uint16(q.payload),
	}
	f := s.lookup(&key)
	if u := s.lookupUDP(&key); u != nil {
		f = u
	}
	if tooBig {
		return s.takeTooBig(f, &q, size)
	}
	switch f := f.(type) {
	case *udpFlow:
		return f.icmpError(kind), nil
	case *tcpConn:
		return f.icmpError(kind, be.Uint32(q.payload[4:])), nil
	}
	return false, nil
}

// takeTooBig takes the news that the packet q of a flow was too long, and that the
// network has room for size bytes.
func (s *Stack) takeTooBig(f flow, q *ipPacket, size int) (took bool, err error) {
	if size == 0 {
		// A router from before RFC 1191, section 3, does not tell its MTU.
		size = plateauBelow(int(binary.BigEndian.Uint16(q.raw[2:])))
	}
	size = max(size, pathMTUFloor(q.version))
	switch f := f.(type) {
	case *udpFlow:
		took = s.learnPath(f.key.guestKey(), size)
	case *tcpConn:
		took, err = f.pathMTU(size, binary.BigEndian.Uint32(q.payload[4:]))
		if took {
			s.learnPath(f.key.guestKey(), size)
		}
	}
	if took {
		s.count(pathMTUs)
	}
	return took, err
}

// tooBigOf returns the size that an ICMP message says to be the longest, if it
// says so: 0 if it does not know it. A size that every link must take is no size
// (RFC 791 section 3.2, RFC 8201 section 4).
func tooBigOf(p *ipPacket) (size int, ok bool) {
	if len(p.payload) < icmpHeaderLen {
		return 0, false
	}
	if p.version == 4 {
		size = int(binary.BigEndian.Uint16(p.payload[6:]))
		ok = p.payload[0] == icmpUnreachable && p.payload[1] == icmpFragNeeded
		return size, ok && (size == 0 || size >= ipv4MinMTU)
	}
	size = int(min(binary.BigEndian.Uint32(p.payload[4:]), maxIPLength))
	return size, p.payload[0] == icmpv6TooBig && size >= ipv6MinMTU
}

const (
	ipv4MinMTU = 68   // RFC 791 section 3.2
	ipv6MinMTU = 1280 // RFC 8200 section 5

	// ipv4PathFloor bounds what is believed of an IPv4 path: nobody makes the
	// Stack cut its data to crumbs (Linux: net.ipv4.route.min_pmtu).
	ipv4PathFloor = 552
)

// pathMTUFloor is the smallest path MTU that is taken.
func pathMTUFloor(version uint16) int {
	if version == 4 {
		return ipv4PathFloor
	}
	return ipv6MinMTU
}

// plateauBelow returns the next size below n that links are known to have (RFC
// 1191 section 7.1, and the minimum of IPv6).
func plateauBelow(n int) int {
	for _, size := range [...]int{32000, 17914, 8166, 4352, 2002, 1492, 1280, 1006, 508, 296} {
		if size < n {
			return size
		}
	}
	return ipv4MinMTU
}

// unreachableOf returns what an ICMP message says to be unreachable.
func unreachableOf(p *ipPacket) (unreachable, bool) {
	if len(p.payload) < icmpHeaderLen {
		return 0, false
	}
	for _, kind := range []unreachable{unreachablePort, unreachableHost, unreachableNet, unreachableProhibited} {
		if typ, code := kind.message(p.version); p.payload[0] == typ && p.payload[1] == code {
			return kind, true
		}
	}
	return 0, false
}

// errno returns the error of a socket to which the like happens.
func (u unreachable) errno() syscall.Errno {
	return [...]syscall.Errno{
		unreachablePort:       syscall.ECONNREFUSED,
		unreachableHost:       syscall.EHOSTUNREACH,
		unreachableNet:        syscall.ENETUNREACH,
		unreachableProhibited: syscall.EACCES,
		unreachableTooBig:     syscall.EMSGSIZE,
	}[u]
}
