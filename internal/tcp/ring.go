package tcp

import (
	"math/bits"
	"sync"
)

const (
	minRingBits = 12 // 4 KiB
	maxRingBits = 31
)

// ringPools holds memory of rings by the logarithm of its size.
var ringPools [maxRingBits + 1]sync.Pool

// ring is memory addressed by stream offsets. It knows its size only: which
// offsets are live is its owner's business. It is empty until grow.
type ring struct {
	mem *[]byte // a power of two long, or nil
	// lent is set while the owner's user reads or writes the memory outside
	// the owner's lock; memory given up meanwhile is left to the collector.
	lent bool
	// used is how many offsets there was room made for at once since the ring was
	// empty; hint is what that had been before.
	used, hint int64
}

// maxHint bounds the memory that an empty ring starts with.
const maxHint = 64 << 10

func (r *ring) size() int64 {
	if r.mem == nil {
		return 0
	}
	return int64(len(*r.mem))
}

// grow makes room for n offsets and keeps those of live.
func (r *ring) grow(n int64, live span) {
	r.used = max(r.used, n)
	if n <= r.size() {
		return
	}
	if r.mem == nil {
		n = max(n, r.hint) // what came last time is about to come again
	}
	class := max(minRingBits, bits.Len64(uint64(n-1)))
	next := ring{}
	if p, ok := ringPools[class].Get().(*[]byte); ok {
		next.mem = p
	} else {
		m := make([]byte, 1<<class)
		next.mem = &m
	}
	for live.start < live.end {
		s := r.view(live.start, live.end)
		next.write(live.start, s)
		live.start += int64(len(s))
	}
	r.free()
	r.mem = next.mem
}

// release gives the memory back: the ring is empty.
func (r *ring) release() {
	r.free()
	r.hint, r.used = min(r.used, maxHint), 0
}

// free gives up the memory.
func (r *ring) free() {
	if r.mem != nil && !r.lent {
		ringPools[bits.Len(uint(len(*r.mem)))-1].Put(r.mem)
	}
	r.mem = nil
}

// view returns the memory of [start, end) up to where it wraps.
func (r *ring) view(start, end int64) []byte {
	if start >= end || r.mem == nil {
		return nil
	}
	m := *r.mem
	i := start & int64(len(m)-1)
	return m[i:min(int64(len(m)), i+end-start)]
}

// write copies p to offset off.
func (r *ring) write(off int64, p []byte) {
	for len(p) > 0 {
		n := copy(r.view(off, off+int64(len(p))), p)
		p, off = p[n:], off+int64(n)
	}
}

// read copies [off, off+len(p)) to p.
func (r *ring) read(off int64, p []byte) {
	for len(p) > 0 {
		n := copy(p, r.view(off, off+int64(len(p))))
		p, off = p[n:], off+int64(n)
	}
}
