package tcp

import (
	"math/rand/v2"
	"testing"
)

// bitmap is a rangeSet done the simple way.
type bitmap [200]bool

func (b *bitmap) spans() rangeSet {
	var r rangeSet
	for i := range b {
		switch {
		case !b[i]:
		case len(r) > 0 && r[len(r)-1].end == int64(i):
			r[len(r)-1].end++
		default:
			r = append(r, span{int64(i), int64(i) + 1})
		}
	}
	return r
}

func (b *bitmap) count(lo, hi int64) (n int64) {
	for i := lo; i < hi; i++ {
		if b[i] {
			n++
		}
	}
	return n
}

func checkSorted(t *testing.T, r rangeSet) {
	t.Helper()
	for i, s := range r {
		if s.start >= s.end || i > 0 && r[i-1].end >= s.start {
			t.Fatalf("not sorted and apart: %v", r)
		}
	}
}

func TestRangeSet(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 200 {
		var r rangeSet
		var b bitmap
		size := 1 + rnd.Int64N(20)
		for step := range 60 {
			lo := rnd.Int64N(int64(len(b)))
			hi := min(lo+rnd.Int64N(size), int64(len(b)))
			before := b.spans()
			if rnd.IntN(12) == 0 {
				r.removeBefore(lo)
				for i := range lo {
					b[i] = false
				}
			} else if rnd.IntN(6) == 0 {
				r.remove(lo, hi)
				for i := lo; i < hi; i++ {
					b[i] = false
				}
			} else {
				fresh := hi - lo - b.count(lo, hi)
				split := r.wouldSplit(lo, hi)
				if got := r.add(lo, hi); got != fresh {
					t.Fatalf("round %d: add(%d, %d) = %d, want %d", round, lo, hi, got, fresh)
				}
				for i := lo; i < hi; i++ {
					b[i] = true
				}
				if lo < hi && split != (len(r) > len(before)) {
					t.Fatalf("round %d: wouldSplit(%d, %d) = %v of %v", round, lo, hi, split, before)
				}
			}
			checkSorted(t, r)
			want := b.spans()
			if len(r) != len(want) {
				t.Fatalf("round %d step %d: %v, want %v", round, step, r, want)
			}
			for i := range r {
				if r[i] != want[i] {
					t.Fatalf("round %d step %d: %v, want %v", round, step, r, want)
				}
			}
			checkQueries(t, r, &b, rnd)
		}
	}
}

func checkQueries(t *testing.T, r rangeSet, b *bitmap, rnd *rand.Rand) {
	t.Helper()
	if got, want := r.size(), b.count(0, int64(len(b))); got != want {
		t.Fatalf("size %d, want %d", got, want)
	}
	off := rnd.Int64N(int64(len(b)))
	limit := off + rnd.Int64N(int64(len(b))-off+1)
	if got, want := r.sizeBefore(off), b.count(0, off); got != want {
		t.Fatalf("sizeBefore(%d) of %v: %d, want %d", off, r, got, want)
	}
	if s, ok := r.find(off); ok != b[off] || ok && (s.start > off || s.end <= off) {
		t.Fatalf("find(%d) of %v: %v %v", off, r, s, ok)
	}
	// The first run of set bits in [off, limit), and of clear ones.
	run := func(set bool) span {
		lo := off
		for lo < limit && b[lo] != set {
			lo++
		}
		hi := lo
		for hi < limit && b[hi] == set {
			hi++
		}
		return span{lo, hi}
	}
	if got, want := r.nextGap(off, limit), run(false); want.start < want.end && got != want ||
		want.start == want.end && got.start < got.end {
		t.Fatalf("nextGap(%d, %d) of %v: %v, want %v", off, limit, r, got, want)
	}
	got, ok := r.overlap(off, limit)
	if want := run(true); ok != (want.start < want.end) || ok && got != want {
		t.Fatalf("overlap(%d, %d) of %v: %v %v, want %v", off, limit, r, got, ok, want)
	}
}

func TestRangeSetEmpty(t *testing.T) {
	var r rangeSet
	if r.add(5, 5) != 0 || r.add(6, 5) != 0 || len(r) != 0 {
		t.Errorf("an empty range was added: %v", r)
	}
	r.removeBefore(10)
	if g := r.nextGap(3, 8); g != (span{3, 8}) {
		t.Errorf("gap of an empty set: %v", g)
	}
	if !r.wouldSplit(1, 2) {
		t.Error("the first span is one more")
	}
	if _, ok := r.find(0); ok || r.size() != 0 || r.sizeBefore(9) != 0 {
		t.Error("the empty set is not empty")
	}
}
