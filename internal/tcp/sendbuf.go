package tcp

// sendBuf holds the bytes of [base, end): written by the application and not
// yet acknowledged. It starts empty, grows to max, and gives its memory back
// when drained.
type sendBuf struct {
	ring      ring
	base, end int64
	max       int64
}

// room returns how many bytes the buffer may hold now.
func (b *sendBuf) room() int64 { return min(b.max, b.ring.most(shareToPlan)) }

func (b *sendBuf) free() int64 { return max(0, b.room()-(b.end-b.base)) }

// grow makes room for up to n bytes more, and returns for how many.
func (b *sendBuf) grow(n int64) int64 {
	for {
		n = min(n, b.free())
		if n <= 0 || b.ring.grow(b.end-b.base+n, span{b.base, b.end}) {
			return n
		} // else somebody else has just taken the memory
	}
}

// reserve lends up to n bytes of free memory behind the last byte, fewer where
// the ring wraps. The loan ends with commit.
func (b *sendBuf) reserve(n int64) []byte {
	if n = b.grow(n); n <= 0 {
		return nil
	}
	b.ring.lent = true
	return b.ring.view(b.end, b.end+n)
}

// commit ends a loan and takes the first n bytes of it.
func (b *sendBuf) commit(n int64) {
	b.end += n
	b.ring.lent = false
	if b.base == b.end {
		b.ring.release()
	}
}

// write copies as much of p as there is room for.
func (b *sendBuf) write(p []byte) int {
	n := b.grow(int64(len(p)))
	if n <= 0 {
		return 0
	}
	b.ring.write(b.end, p[:n])
	b.end += n
	return int(n)
}

// ack forgets the bytes below off.
func (b *sendBuf) ack(off int64) {
	if off <= b.base {
		return
	}
	b.base = min(off, b.end)
	if b.base == b.end && !b.ring.lent {
		b.ring.release()
	}
}

// drop forgets every byte.
func (b *sendBuf) drop() {
	b.base = b.end
	b.ring.release()
}
