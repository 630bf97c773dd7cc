package tcp

import "encoding/binary"

// The wire format: RFC 9293 section 3.1 (header), 3.2 (options), RFC 7323
// sections 2.2 and 3.2 (window scale, timestamps), RFC 2018 sections 2 and 3 (SACK).

// Flags are the control bits of a segment.
type Flags uint8

const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// HeaderLen is the length in bytes of a header without options, and
// MaxHeaderLen that of the longest.
const (
	HeaderLen    = 20
	MaxHeaderLen = 60
)

// Option kinds.
const (
	optEnd           = 0
	optNop           = 1
	optMSS           = 2
	optWindowScale   = 3
	optSACKPermitted = 4
	optSACK          = 5
	optTimestamps    = 8
)

// Lengths of options as this package lays them out, padding included.
const (
	timestampsLen = 12
	maxBlocks     = 4
)

// Block is one SACK block: the sequence numbers from Left up to, not including, Right.
type Block struct{ Left, Right uint32 }

// Segment is a TCP segment. Options that the segment has not are zero.
type Segment struct {
	SrcPort, DstPort uint16
	Seq, Ack         uint32
	Flags            Flags
	Window           uint16 // as on the wire, not scaled

	MSS           uint16 // 0: no option. Read on a SYN only (RFC 9293 MUST-65).
	HasScale      bool   // Read on a SYN only.
	Scale         uint8  // at most 14 (RFC 7323 section 2.3)
	SACKPermitted bool   // Read on a SYN only.
	HasTimestamps bool
	TSVal, TSEcr  uint32
	Blocks        uint8 // number of valid entries in SACK
	SACK          [maxBlocks]Block

	Payload []byte // borrowed
}

// Len is the length of the segment in sequence numbers: SYN and FIN count one each.
func (s *Segment) Len() int64 {
	n := int64(len(s.Payload))
	if s.Flags&SYN != 0 {
		n++
	}
	if s.Flags&FIN != 0 {
		n++
	}
	return n
}

// Parse reads a segment. It reports false for one whose data offset does not
// fit. Payload is borrowed from b. An option whose length is illegal ends the
// options (RFC 9293 MUST-7); one of a wrong length for its kind is ignored.
func (s *Segment) Parse(b []byte) bool {
	if len(b) < HeaderLen {
		return false
	}
	hl := int(b[12]>>4) * 4
	if hl < HeaderLen || hl > len(b) {
		return false
	}
	*s = Segment{
		SrcPort: binary.BigEndian.Uint16(b[0:]),
		DstPort: binary.BigEndian.Uint16(b[2:]),
		Seq:     binary.BigEndian.Uint32(b[4:]),
		Ack:     binary.BigEndian.Uint32(b[8:]),
		Flags:   Flags(b[13]),
		Window:  binary.BigEndian.Uint16(b[14:]),
		Payload: b[hl:],
	}
	s.parseOptions(b[HeaderLen:hl])
	return true
}

func (s *Segment) parseOptions(o []byte) {
	for len(o) > 0 {
		kind := o[0]
		if kind == optEnd {
			return
		}
		if kind == optNop {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return
		}
		s.parseOption(kind, o[2:o[1]])
		o = o[o[1]:]
	}
}

func (s *Segment) parseOption(kind byte, v []byte) {
	syn := s.Flags&SYN != 0
	switch {
	case kind == optMSS && len(v) == 2 && syn:
		s.MSS = binary.BigEndian.Uint16(v)
	case kind == optWindowScale && len(v) == 1 && syn:
		s.HasScale, s.Scale = true, min(v[0], maxScale)
	case kind == optSACKPermitted && len(v) == 0 && syn:
		s.SACKPermitted = true
	case kind == optTimestamps && len(v) == 8:
		s.HasTimestamps = true
		s.TSVal, s.TSEcr = binary.BigEndian.Uint32(v), binary.BigEndian.Uint32(v[4:])
	case kind == optSACK && len(v)%8 == 0 && len(v) > 0:
		s.SACK = [maxBlocks]Block{} // of two such options the last one counts
		for s.Blocks = 0; len(v) > 0 && s.Blocks < maxBlocks; v = v[8:] {
			s.SACK[s.Blocks] = Block{binary.BigEndian.Uint32(v), binary.BigEndian.Uint32(v[4:])}
			s.Blocks++
		}
	}
}

// MarshalHeader writes the header and options, with checksum 0, and returns
// their length. The payload belongs behind them. It wants MaxHeaderLen bytes.
func (s *Segment) MarshalHeader(b []byte) int {
	n := HeaderLen + s.marshalOptions(b[HeaderLen:])
	binary.BigEndian.PutUint16(b[0:], s.SrcPort)
	binary.BigEndian.PutUint16(b[2:], s.DstPort)
	binary.BigEndian.PutUint32(b[4:], s.Seq)
	binary.BigEndian.PutUint32(b[8:], s.Ack)
	b[12], b[13] = byte(n/4)<<4, byte(s.Flags)
	binary.BigEndian.PutUint16(b[14:], s.Window)
	binary.BigEndian.PutUint32(b[16:], 0) // checksum and urgent pointer
	return n
}

// putChecksum writes the checksum field of the header in b.
func putChecksum(b []byte, c uint16) { binary.BigEndian.PutUint16(b[16:], c) }

// marshalOptions lays every option out on a 32-bit boundary, padded in front
// with no-operations, as RFC 7323 appendix A advises.
func (s *Segment) marshalOptions(b []byte) int {
	n := 0
	if s.MSS != 0 {
		n += copy(b[n:], []byte{optMSS, 4, byte(s.MSS >> 8), byte(s.MSS)})
	}
	if s.SACKPermitted {
		n += copy(b[n:], []byte{optNop, optNop, optSACKPermitted, 2})
	}
	if s.HasScale {
		n += copy(b[n:], []byte{optNop, optWindowScale, 3, s.Scale})
	}
	if s.HasTimestamps {
		n += copy(b[n:], []byte{optNop, optNop, optTimestamps, 10})
		binary.BigEndian.PutUint32(b[n:], s.TSVal)
		binary.BigEndian.PutUint32(b[n+4:], s.TSEcr)
		n += 8
	}
	if s.Blocks > 0 {
		n += copy(b[n:], []byte{optNop, optNop, optSACK, 2 + 8*s.Blocks})
		for _, k := range s.SACK[:s.Blocks] {
			binary.BigEndian.PutUint32(b[n:], k.Left)
			binary.BigEndian.PutUint32(b[n+4:], k.Right)
			n += 8
		}
	}
	return n
}

// ResetFor returns the answer of a closed port to seg (RFC 9293 section
// 3.10.7.1), and false if seg deserves none: a reset is never answered.
func ResetFor(seg *Segment) (Segment, bool) {
	if seg.Flags&RST != 0 {
		return Segment{}, false
	}
	r := Segment{SrcPort: seg.DstPort, DstPort: seg.SrcPort, Flags: RST}
	if seg.Flags&ACK != 0 {
		r.Seq = seg.Ack
	} else {
		r.Flags |= ACK
		r.Ack = seg.Seq + uint32(seg.Len())
	}
	return r, true
}
