package tcp

// Sequence numbers, RFC 9293 section 3.4. Modular arithmetic is here and
// nowhere else.

// seqSpace maps the 32-bit sequence numbers of one direction to offsets.
type seqSpace uint32 // the initial sequence number, which has offset 0

// wrap returns the sequence number of an offset.
func (s seqSpace) wrap(off int64) uint32 { return uint32(s) + uint32(off) }

// unwrap returns the offset of seq that is nearest to the offset near.
func (s seqSpace) unwrap(seq uint32, near int64) int64 {
	return near + int64(int32(seq-s.wrap(near)))
}

// tsBefore reports whether timestamp a is older than b (RFC 7323 section 5.2).
func tsBefore(a, b uint32) bool { return int32(a-b) < 0 }
