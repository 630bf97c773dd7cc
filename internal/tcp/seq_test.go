package tcp

import (
	"math/rand/v2"
	"testing"
)

var edges = []uint32{0, 1, 2, 0x7ffffffe, 0x7fffffff, 0x80000000, 0x80000001, 0xfffffff0, 0xfffffffe, 0xffffffff}

func TestUnwrap(t *testing.T) {
	offsets := []int64{0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0x100000000, 0x100000001, 1 << 40, 1<<62 + 12345}
	deltas := []int64{0, 1, -1, 65535, -65535, 1<<31 - 1, -(1<<31 - 1), -1 << 31}
	for _, isn := range edges {
		s := seqSpace(isn)
		if s.wrap(0) != isn {
			t.Errorf("offset 0 is %#x, want %#x", s.wrap(0), isn)
		}
		for _, near := range offsets {
			for _, d := range deltas {
				if got := s.unwrap(s.wrap(near+d), near); got != near+d {
					t.Errorf("ISN %#x: unwrap near %d of %d is %d", isn, near, near+d, got)
				}
			}
		}
	}
	// A stream of many gigabytes, followed step by step.
	r := rand.New(rand.NewPCG(1, 1))
	s, off := seqSpace(0xffff0000), int64(0)
	for range 100_000 {
		next := off + r.Int64N(1<<31)
		if got := s.unwrap(s.wrap(next), off); got != next {
			t.Fatalf("unwrap near %d of %d is %d", off, next, got)
		}
		off = next
	}
}

func TestTimestampOrder(t *testing.T) {
	for _, a := range edges {
		if tsBefore(a, a) {
			t.Errorf("%#x is before itself", a)
		}
		for _, d := range []uint32{1, 1000, 1<<31 - 1} {
			if !tsBefore(a, a+d) || tsBefore(a+d, a) {
				t.Errorf("%#x and %#x are out of order", a, a+d)
			}
		}
	}
}
