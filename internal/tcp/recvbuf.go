package tcp

import "slices"

// Reassembly: RFC 9293 section 3.10.7.4 step 7, SACK blocks by RFC 2018 section
// 4, D-SACK by RFC 2883 section 4.

// firstByte is the offset of the first byte of data, behind the SYN.
const firstByte = 1

// maxHoles bounds the spans of out-of-order data that are remembered; a segment
// that would make one more is dropped, and the peer sends it again.
const maxHoles = 1024

// recvBuf holds the bytes of [base, nxt), in order and not yet read, and behind
// them those of ooo, that came out of order. They lie in the ring at their
// place, so nothing is kept per segment. The first copy of a byte wins.
type recvBuf struct {
	ring      ring
	base, nxt int64
	max       int64
	ooo       rangeSet
	recent    [maxBlocks]int64 // offsets in the spans of ooo that changed last, the latest first
	dsack     span             // the duplicate to report once (RFC 2883); empty: none
}

// room returns how many bytes the buffer may be promised to hold now. Where memory is
// short that is not all of the ring: a promise is rounded up to the scale of the window.
func (b *recvBuf) room() int64 {
	n := b.ring.most(shareToPlan)
	return min(b.max, n-n/4)
}

// live returns the range of the ring that holds bytes.
func (b *recvBuf) live() span {
	s := span{b.base, b.nxt}
	if n := len(b.ooo); n > 0 {
		s.end = b.ooo[n-1].end
	}
	return s
}

// insert takes p at off and returns by how much nxt advanced. The caller has
// cut p to the window.
func (b *recvBuf) insert(off int64, p []byte) int64 {
	end := off + int64(len(p))
	b.noteDuplicate(off, end)
	if off < b.nxt {
		p, off = p[min(b.nxt-off, int64(len(p))):], min(b.nxt, end)
	}
	if len(p) == 0 {
		return 0
	}
	if off > b.nxt && len(b.ooo) >= maxHoles && b.ooo.wouldSplit(off, end) {
		return 0
	}
	live := b.live()
	for !b.ring.grow(max(end, live.end)-b.base, live) {
		// There is no memory for all of it: the peer sends the rest again.
		end = b.base + b.ring.most(shareToTake)
		if off >= end {
			return 0
		}
		p = p[:end-off]
	}
	b.store(off, p)
	if off > b.nxt {
		b.ooo.add(off, end)
		b.touch(off)
		return 0
	}
	before := b.nxt
	b.nxt = end
	if len(b.ooo) > 0 {
		b.absorb()
	}
	return b.nxt - before
}

// store writes the bytes of p that are not held yet.
func (b *recvBuf) store(off int64, p []byte) {
	if len(b.ooo) == 0 {
		b.ring.write(off, p)
		return
	}
	end := off + int64(len(p))
	for gap := b.ooo.nextGap(off, end); gap.start < gap.end; gap = b.ooo.nextGap(gap.end, end) {
		b.ring.write(gap.start, p[gap.start-off:gap.end-off])
	}
}

// absorb moves what has become contiguous from ooo to the readable bytes.
func (b *recvBuf) absorb() {
	for len(b.ooo) > 0 && b.ooo[0].start <= b.nxt {
		b.nxt = max(b.nxt, b.ooo[0].end)
		b.ooo.removeBefore(b.nxt)
	}
}

// noteDuplicate remembers the first part of [off, end) that is held already.
func (b *recvBuf) noteDuplicate(off, end int64) {
	if off = max(off, firstByte); off < b.nxt && off < end {
		b.dsack = span{off, min(end, b.nxt)}
	} else if s, ok := b.ooo.overlap(off, end); ok {
		b.dsack = s
	}
}

// touch makes the span that holds off the most recent one.
func (b *recvBuf) touch(off int64) {
	held, _ := b.ooo.find(off)
	last := off
	for i, r := range b.recent {
		b.recent[i] = last
		if r >= held.start && r < held.end {
			break
		}
		last = r
	}
}

// blocks fills dst with the blocks to report, a D-SACK first, then the spans
// that changed last, then others while there is room, and returns their number.
func (b *recvBuf) blocks(dst []span) int {
	n := 0
	if b.dsack.start < b.dsack.end && n < len(dst) {
		dst[n] = b.dsack
		n++
		b.dsack = span{}
	}
	first := n
	report := func(s span) {
		if n < len(dst) && !slices.Contains(dst[first:n], s) {
			dst[n] = s
			n++
		}
	}
	for _, r := range b.recent {
		if s, ok := b.ooo.find(r); ok {
			report(s)
		}
	}
	for _, s := range b.ooo[:min(len(b.ooo), len(dst))] {
		report(s)
	}
	return n
}

// hasBlocks reports whether there is anything to report.
func (b *recvBuf) hasBlocks() bool { return len(b.ooo) > 0 || b.dsack.start < b.dsack.end }

// peek lends the readable bytes, up to where the ring wraps. The loan ends with
// discard.
func (b *recvBuf) peek() []byte {
	p := b.ring.view(b.base, b.nxt)
	b.ring.lent = len(p) > 0
	return p
}

// discard ends a loan and forgets the first n readable bytes.
func (b *recvBuf) discard(n int64) {
	b.ring.lent = false
	b.base += min(n, b.nxt-b.base)
	if b.base == b.nxt && len(b.ooo) == 0 {
		b.ring.release()
	}
}

// read copies readable bytes to p and forgets them.
func (b *recvBuf) read(p []byte) int {
	n := min(int64(len(p)), b.nxt-b.base)
	b.ring.read(b.base, p[:n])
	b.discard(n)
	return int(n)
}

// skip forgets the readable bytes, and keeps those out of order, which the peer
// may believe received. Unlike discard it may be called during a loan.
func (b *recvBuf) skip() {
	if b.ring.lent {
		b.drop() // the memory is the borrower's until Discard
		return
	}
	b.discard(b.nxt - b.base)
}

// drop forgets every byte, readable or out of order.
func (b *recvBuf) drop() {
	b.base = b.nxt
	b.ooo = nil
	b.ring.release()
}
