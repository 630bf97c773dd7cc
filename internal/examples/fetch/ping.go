package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/KarpelesLab/slirp"
)

// pingNamespace keeps the hand-made packets apart from the guest's flows.
const pingNamespace = 1

// Numbers of ICMP for IPv4 and IPv6.
const (
	protoICMPv4    = 1
	protoICMPv6    = 58
	echoRequestV4  = 8
	echoReplyV4    = 0
	echoHeaderLen  = 8
	ipv4HeaderLen  = 20
	ipv6HeaderLen  = 40
	timeToLive     = 64
	checksumOffset = 2 // in an ICMP message
)

// ping hands the stack one echo request, as a packet, and checks the frame that
// comes back before HandlePacket returns. The two addresses are of one family.
func ping(stack *slirp.Stack, from, to netip.Addr, data []byte) error {
	var frames [][]byte
	keep := func(frame []byte) error {
		frames = append(frames, frame)
		return nil
	}
	const id, seq = 0x5157, 1
	request := echoMessage(from, to, false, id, seq, data)
	if err := stack.HandlePacket(pingNamespace, guestMAC, gatewayMAC, request, keep); err != nil {
		return err
	}
	if len(frames) != 1 {
		return fmt.Errorf("%d frames in answer to one ping", len(frames))
	}
	return checkReply(frames[0], echoMessage(to, from, true, id, seq, data))
}

// echoMessage returns an IP packet that holds an ICMP echo request or reply.
func echoMessage(from, to netip.Addr, reply bool, id, seq uint16, data []byte) []byte {
	message := make([]byte, echoHeaderLen, echoHeaderLen+len(data))
	binary.BigEndian.PutUint16(message[4:], id)
	binary.BigEndian.PutUint16(message[6:], seq)
	message = append(message, data...)
	message[0] = echoType(to.Is4(), reply)

	sum := slirp.IPv6Checksum(from.As16(), to.As16(), protoICMPv6, uint32(len(message)), message)
	if to.Is4() {
		// ICMP for IPv4 has no pseudo-header: one of zeros adds nothing.
		sum = slirp.IPv6Checksum([16]byte{}, [16]byte{}, 0, 0, message)
	}
	binary.BigEndian.PutUint16(message[checksumOffset:], sum)
	return append(ipHeader(from, to, len(message)), message...)
}

func echoType(v4, reply bool) byte {
	switch {
	case v4 && reply:
		return echoReplyV4
	case v4:
		return echoRequestV4
	case reply:
		return slirp.ICMPv6TypeEchoReply
	}
	return slirp.ICMPv6TypeEchoRequest
}

// ipHeader returns the header of a packet that carries size bytes of ICMP.
func ipHeader(from, to netip.Addr, size int) []byte {
	if to.Is4() {
		h := make([]byte, ipv4HeaderLen)
		h[0] = 4<<4 | ipv4HeaderLen/4
		binary.BigEndian.PutUint16(h[2:], uint16(ipv4HeaderLen+size))
		h[8], h[9] = timeToLive, protoICMPv4
		copy(h[12:], from.AsSlice())
		copy(h[16:], to.AsSlice())
		binary.BigEndian.PutUint16(h[10:], slirp.IPChecksum(h))
		return h
	}
	h := make([]byte, ipv6HeaderLen)
	h[0] = 6 << 4
	binary.BigEndian.PutUint16(h[4:], uint16(size))
	h[6], h[7] = protoICMPv6, timeToLive
	copy(h[8:], from.AsSlice())
	copy(h[24:], to.AsSlice())
	return h
}

// checkReply tells whether the frame is one for the guest that carries the packet
// want. Fields that a sender is free to choose may differ.
func checkReply(frame, want []byte) error {
	etherType := []byte{0x86, 0xdd}
	if want[0]>>4 == 4 {
		etherType = []byte{0x08, 0x00}
	}
	wantEther := slices.Concat(guestMAC[:], gatewayMAC[:], etherType)
	if len(frame) != len(wantEther)+len(want) {
		return fmt.Errorf("a reply of %d bytes, not %d", len(frame), len(wantEther)+len(want))
	}
	ether, packet := frame[:etherHeaderLen], frame[etherHeaderLen:]
	if !bytes.Equal(ether, wantEther) {
		return fmt.Errorf("a reply with Ethernet header % x", ether)
	}
	if packet[0]>>4 == 4 && !validHeaderSum(packet[:ipv4HeaderLen]) {
		return errors.New("a reply with a wrong IPv4 header checksum")
	}
	if !bytes.Equal(withoutChoices(packet), withoutChoices(want)) {
		return fmt.Errorf("a reply % x, not % x", packet, want)
	}
	return nil
}

// validHeaderSum reports whether an IPv4 header carries its own checksum, which
// IPChecksum computes as if it were not there.
func validHeaderSum(header []byte) bool {
	return binary.BigEndian.Uint16(header[10:]) == slirp.IPChecksum(header)
}

// withoutChoices returns a copy of the packet without the fields that are the
// sender's own business: an IPv4 header's identification and flags, and so its
// checksum, and the time to live; an IPv6 header's flow label and hop limit.
func withoutChoices(packet []byte) []byte {
	p := bytes.Clone(packet)
	if p[0]>>4 == 4 {
		clear(p[4:9])
		clear(p[10:12])
	} else {
		clear(p[1:4])
		p[7] = 0
	}
	return p
}
