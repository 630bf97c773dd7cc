package tcp

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// content is what the buffer holds.
func (b *sendBuf) content() []byte {
	p := make([]byte, b.end-b.base)
	b.ring.read(b.base, p)
	return p
}

func TestSendBuf(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 1))
	for _, size := range []int64{1, 100, 4096, 5000, 100_000} {
		b := sendBuf{base: 1, end: 1, max: size}
		for step := range 600 {
			n := rnd.Int64N(size + size/4 + 1)
			free := b.free()
			switch rnd.IntN(3) {
			case 0:
				want := min(n, free)
				if got := b.write(patterned(1, b.end, b.end+n)); int64(got) != want {
					t.Fatalf("wrote %d of %d with %d free", got, n, free)
				}
			case 1:
				p := b.reserve(n)
				if (len(p) > 0) != (min(n, free) > 0) || int64(len(p)) > min(n, free) {
					t.Fatalf("reserved %d of %d with %d free", len(p), n, free)
				}
				copy(p, patterned(1, b.end, b.end+int64(len(p))))
				if rnd.IntN(4) == 0 { // acknowledged while lent
					b.ack(b.base + rnd.Int64N(b.end-b.base+1))
				}
				b.commit(rnd.Int64N(int64(len(p)) + 1))
			case 2:
				b.ack(b.base + rnd.Int64N(b.end-b.base+1))
				b.ack(b.base - 1) // old news
			}
			if b.free() < 0 || b.free() > b.max {
				t.Fatalf("free %d of %d", b.free(), b.max)
			}
			if !bytes.Equal(b.content(), patterned(1, b.base, b.end)) {
				t.Fatalf("step %d: content differs", step)
			}
			if b.base == b.end && b.ring.size() != 0 {
				t.Fatalf("step %d: an empty buffer holds %d bytes of memory", step, b.ring.size())
			}
			if b.ring.size() > max(4096, 2*size) {
				t.Fatalf("ring of %d for a buffer of %d", b.ring.size(), size)
			}
		}
	}
}

func TestSendBufFull(t *testing.T) {
	b := sendBuf{base: 1, end: 1, max: 10}
	if n := b.write(make([]byte, 11)); n != 10 {
		t.Errorf("wrote %d", n)
	}
	if b.write([]byte{1}) != 0 || b.reserve(1) != nil || b.reserve(0) != nil {
		t.Error("a full buffer takes more")
	}
	b.ack(1000) // no more than it has
	if b.base != 11 || b.ring.size() != 0 {
		t.Errorf("base %d, memory %d", b.base, b.ring.size())
	}
	b.write(make([]byte, 3))
	b.drop()
	if b.base != 14 || b.end != 14 || b.ring.size() != 0 {
		t.Errorf("after drop: %+v", b)
	}
}

// The memory of a loan stays the borrower's when the buffer is dropped.
func TestSendBufLoan(t *testing.T) {
	b := sendBuf{base: 1, end: 1, max: 1 << 16}
	p := b.reserve(1 << 16)
	b.drop()
	var other sendBuf
	other = sendBuf{base: 1, end: 1, max: 1 << 16}
	for range 100 {
		q := other.reserve(1 << 16)
		if &q[len(q)-1] == &p[len(p)-1] {
			t.Fatal("lent memory was given to another buffer")
		}
		other.ring.lent = false
		other.ring.mem = nil
	}
	b.commit(0)
	if b.ring.size() != 0 || b.ring.lent {
		t.Errorf("after commit: %+v", b.ring)
	}
}
