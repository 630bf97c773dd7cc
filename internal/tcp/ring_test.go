package tcp

import (
	"bytes"
	"testing"

	"github.com/KarpelesLab/slirp/internal/sum"
)

// pattern is the byte at an offset of a stream, different for each stream and
// with a period longer than any ring or window here.
func pattern(stream byte, off int64) byte {
	x := uint64(off)*0x9e3779b97f4a7c15 + uint64(stream)
	return byte(x >> 56)
}

func patterned(stream byte, start, end int64) []byte {
	if end <= start {
		return nil
	}
	p := make([]byte, end-start)
	for i := range p {
		p[i] = pattern(stream, start+int64(i))
	}
	return p
}

func TestRingGrow(t *testing.T) {
	var r ring
	if r.size() != 0 || r.view(0, 10) != nil {
		t.Error("an empty ring has memory")
	}
	live := span{1<<40 + 4000, 1<<40 + 4000}
	for _, n := range []int64{1, 4096, 4097, 5000, 70000} {
		r.grow(n, live)
		if r.size() < n || r.size()&(r.size()-1) != 0 || r.size() < 4096 || r.size() >= max(8192, 2*n) {
			t.Fatalf("size %d for %d", r.size(), n)
		}
		r.write(live.end, patterned(1, live.end, live.start+n))
		live.end = live.start + n
		got := make([]byte, n)
		r.read(live.start, got)
		if !bytes.Equal(got, patterned(1, live.start, live.end)) {
			t.Fatalf("bytes are lost when growing to %d", n)
		}
	}
	size := r.size()
	r.grow(10, live)
	if r.size() != size {
		t.Error("it shrank")
	}
	r.release()
	r.release()
	if r.size() != 0 {
		t.Error("it has memory after release")
	}
}

// Memory that is lent does not go back to the pool.
func TestRingLent(t *testing.T) {
	inPool := func(p *[]byte) bool {
		// The pool may forget what it is given, so this says "no" too often.
		for range 64 {
			if q, _ := ringPools[14].Get().(*[]byte); q == nil {
				return false
			} else if q == p {
				return true
			}
		}
		return false
	}
	for range 100 {
		var r ring
		r.grow(1<<14, span{})
		p := r.mem
		r.lent = true
		r.release()
		if inPool(p) {
			t.Fatal("memory that is lent was given to the pool")
		}
	}
	for range 100 {
		var r ring
		r.grow(1<<14, span{})
		p := r.mem
		r.release()
		if inPool(p) {
			return
		}
	}
	t.Error("memory never goes back to the pool")
}

// What was taken once is about to come again: an empty ring begins with the size that
// it had, and at the front of its memory, so that one write to a socket takes all of it.
func TestRingBeginsAnew(t *testing.T) {
	var r ring
	start := int64(1<<33 + 4000)
	for i, size := range []int64{4 << 10, 64 << 10, 64 << 10} { // before, and after it was filled
		live := span{start, start + 1000}
		r.grow(1000, span{start, start})
		if r.size() != size {
			t.Errorf("turn %d: it begins with %d bytes, want %d", i, r.size(), size)
		}
		r.grow(40000, live)
		live.end = start + 40000
		if n := len(r.view(live.start, live.end)); n != 40000 {
			t.Errorf("turn %d: the first %d bytes lie together, want all 40000", i, n)
		}
		start = live.end
		r.release()
		r.release() // more than once says nothing new
	}
	for i, size := range []int64{64 << 10, 4 << 10, 4 << 10} { // after 40,000 bytes, and after 1
		r.grow(1, span{start, start})
		if r.size() != size {
			t.Errorf("small turn %d: it begins with %d bytes, want %d", i, r.size(), size)
		}
		r.release()
	}
	r.grow(10*maxHint, span{start, start})
	r.release()
	r.grow(1, span{start, start})
	if r.size() != maxHint {
		t.Errorf("after much more than maxHint it begins with %d bytes", r.size())
	}
}

// TestRingReadSum: the sum is right wherever the ring wraps.
func TestRingReadSum(t *testing.T) {
	r := ring{origin: 7}
	size := int64(1 << minRingBits)
	r.grow(size, span{})
	defer r.release()
	for i := range *r.mem {
		(*r.mem)[i] = byte(i*i>>3 + i)
	}
	for _, length := range []int64{0, 1, 2, 3, 300, 301, size - 1, size} {
		for before := range int64(70) {
			off := 7 + size - min(before, length)
			want, got := make([]byte, length), make([]byte, length)
			r.read(off, want)
			if s := r.readSum(off, got); s != sum.Of(want, 0) || !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, %d of them before the wrap: sum %#04x, want %#04x", length, before, s, sum.Of(want, 0))
			}
		}
	}
}
