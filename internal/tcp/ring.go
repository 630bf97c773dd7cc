package tcp

import (
	"math"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/KarpelesLab/slirp/internal/sum"
)

const (
	minRingBits = 12 // 4 KiB, which every ring may have
	maxRingBits = 31
)

// ringPools holds memory of rings by the logarithm of its size.
var ringPools [maxRingBits + 1]sync.Pool

// Memory bounds what the buffers of several connections hold together. Nil has no
// bound. Its methods may be called concurrently.
type Memory struct {
	max  int64
	held atomic.Int64
}

// NewMemory returns a Memory of max bytes.
func NewMemory(max int64) *Memory { return &Memory{max: max} }

// Held returns the bytes that are held.
func (m *Memory) Held() int64 {
	if m == nil {
		return 0
	}
	return m.held.Load()
}

// The part of what is left that one buffer may take: there is some for whoever comes
// next, and a few that hold theirs for ever do not slow the others. A window promises
// less than what may be taken when the data comes, since others take some meanwhile.
const (
	shareToPlan = 16
	shareToTake = 4
)

// share returns a part of what is left to somebody who holds own bytes already.
func (m *Memory) share(own, part int64) int64 {
	if m == nil {
		return math.MaxInt64
	}
	return (m.max - m.held.Load() + own) / part
}

func (m *Memory) take(n int64) {
	if m != nil && n != 0 {
		m.held.Add(n)
	}
}

// ring is memory addressed by stream offsets. It knows its size only: which
// offsets are live is its owner's business. It is empty until grow.
type ring struct {
	mem *[]byte // a power of two long, or nil
	// lent is set while the owner's user reads or writes the memory outside
	// the owner's lock; memory given up meanwhile is left to the collector.
	lent    bool
	origin  int64   // the offset that lies at the front of mem
	account *Memory // that mem is part of
	least   int64   // size that needs nobody's leave, a power of two, or 0
	// used is how many offsets there was room made for at once since the ring was
	// empty; hint is what that had been before.
	used, hint int64
}

// maxHint bounds the memory that an empty ring starts with. What is written to a host at
// once fits into it mostly: 62 KiB, and the segments that came with the last of them.
const maxHint = 128 << 10

func (r *ring) size() int64 {
	if r.mem == nil {
		return 0
	}
	return int64(len(*r.mem))
}

// most returns the size that the ring may have now, the one that it has or more: for a
// part of the memory that is left.
func (r *ring) most(part int64) int64 {
	n := max(r.account.share(r.size(), part), 1<<minRingBits, r.least)
	return max(r.size(), 1<<(bits.Len64(uint64(n))-1))
}

// grow makes room for n offsets and keeps those of live. It reports false if that is
// more than the ring may have.
func (r *ring) grow(n int64, live span) bool {
	if n <= r.size() {
		r.used = max(r.used, n)
		return true
	}
	most := r.most(shareToTake)
	if n > most {
		return false
	}
	r.used = max(r.used, n)
	if r.mem == nil {
		n = min(max(n, r.hint), most) // what came last time is about to come again
	}
	class := max(minRingBits, bits.Len64(uint64(n-1)))
	next := ring{origin: live.start}
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
	r.mem, r.origin = next.mem, next.origin
	r.account.take(r.size())
	return true
}

// release gives the memory back: the ring is empty.
func (r *ring) release() {
	if r.mem == nil {
		return // it is empty already
	}
	r.free()
	r.hint, r.used = min(r.used, maxHint), 0
}

// use has the memory be part of account.
func (r *ring) use(account *Memory) {
	r.account.take(-r.size())
	r.account = account
	r.account.take(r.size())
}

// free gives up the memory.
func (r *ring) free() {
	r.account.take(-r.size())
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
	i := (start - r.origin) & int64(len(m)-1)
	return m[i:min(int64(len(m)), i+end-start)]
}

// write copies p to offset off.
func (r *ring) write(off int64, p []byte) {
	for len(p) > 0 {
		n := copy(r.view(off, off+int64(len(p))), p)
		p, off = p[n:], off+int64(n)
	}
}

// readSum is read, and returns the one's complement sum of what it copies.
func (r *ring) readSum(off int64, p []byte) (s uint16) {
	for n := 0; n < len(p); {
		v := r.view(off+int64(n), off+int64(len(p)))
		s = sum.Join(s, n, sum.Copy(p[n:], v, 0))
		n += len(v)
	}
	return s
}

// read copies [off, off+len(p)) to p.
func (r *ring) read(off int64, p []byte) {
	for len(p) > 0 {
		n := copy(p, r.view(off, off+int64(len(p))))
		p, off = p[n:], off+int64(n)
	}
}
