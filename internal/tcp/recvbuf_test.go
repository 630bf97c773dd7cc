package tcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// model is a recvBuf done the simple way: a map of bytes.
type model struct {
	base, nxt int64
	held      map[int64]byte
}

// insert does what recvBuf.insert is to do, and returns the duplicate to report.
func (m *model) insert(off int64, p []byte) (dup span) {
	end := off + int64(len(p))
	has := func(o int64) bool { _, ok := m.held[o]; return o < m.nxt || ok }
	lo := off
	for lo < end && !has(lo) {
		lo++
	}
	hi := lo
	for hi < end && has(hi) && (lo >= m.nxt || hi < m.nxt) {
		hi++
	}
	for i, c := range p {
		if o := off + int64(i); !has(o) {
			m.held[o] = c // the first copy wins
		}
	}
	for has(m.nxt) {
		m.nxt++
	}
	return span{lo, hi}
}

func (m *model) spans() rangeSet {
	var r rangeSet
	offs := make([]int64, 0, len(m.held))
	for o := range m.held {
		if o > m.nxt {
			offs = append(offs, o)
		}
	}
	slices.Sort(offs)
	for _, o := range offs {
		if n := len(r); n > 0 && r[n-1].end == o {
			r[n-1].end++
		} else {
			r = append(r, span{o, o + 1})
		}
	}
	return r
}

// compare checks b against m.
func (m *model) compare(t *testing.T, b *recvBuf) {
	t.Helper()
	if b.base != m.base || b.nxt != m.nxt || !slices.Equal(b.ooo, m.spans()) {
		t.Fatalf("[%d, %d) %v, want [%d, %d) %v", b.base, b.nxt, b.ooo, m.base, m.nxt, m.spans())
	}
	for _, s := range append(rangeSet{{b.base, b.nxt}}, b.ooo...) {
		for o := s.start; o < s.end; o++ {
			if got := b.ring.view(o, o+1)[0]; got != m.held[o] {
				t.Fatalf("byte %d is %#x, want %#x", o, got, m.held[o])
			}
		}
	}
	if b.base == b.nxt && len(b.ooo) == 0 && b.ring.size() != 0 {
		t.Fatalf("a drained buffer holds %d bytes of memory", b.ring.size())
	}
	if b.ring.size() > max(4096, 2*b.max) {
		t.Fatalf("ring of %d for a buffer of %d", b.ring.size(), b.max)
	}
}

func FuzzReassembly(f *testing.F) {
	for seed := range uint64(30) {
		rnd := rand.New(rand.NewPCG(seed, 9))
		p := make([]byte, 300)
		for i := range p {
			p[i] = byte(rnd.Uint32())
		}
		f.Add(p, uint16(1+rnd.IntN(1+1<<(seed%15))))
	}
	f.Fuzz(func(t *testing.T, ops []byte, size uint16) {
		b := &recvBuf{base: 1, nxt: 1, max: int64(size)%12000 + 1}
		m := &model{1, 1, map[int64]byte{}}
		ops = ops[:min(len(ops), 600)]
		for tick := byte(1); len(ops) >= 3; ops, tick = ops[3:], tick+1 {
			room := b.base + b.max
			x := int64(ops[1]) * b.max / 256
			n := int64(ops[2])
			switch ops[0] % 8 {
			case 0, 1, 2, 3, 4: // a segment, different from any before
				off := max(1, b.nxt-n/4) + x*int64(ops[0]%3)/2
				end := min(off+n, room)
				if off >= end {
					continue
				}
				p := bytes.Repeat([]byte{tick}, int(end-off))
				b.dsack = span{}
				before := m.nxt
				dup := m.insert(off, p)
				if got := b.insert(off, p); got != m.nxt-before {
					t.Fatalf("insert advances by %d, want %d", got, m.nxt-before)
				}
				if dup.start == dup.end {
					dup = span{}
				}
				if b.dsack != dup {
					t.Fatalf("duplicate %v, want %v", b.dsack, dup)
				}
				checkBlocks(t, b, off)
			case 5, 6:
				p := b.peek()
				if (len(p) == 0) != (b.base == b.nxt) {
					t.Fatal("nothing to peek at")
				}
				for i, c := range p {
					if c != m.held[m.base+int64(i)] {
						t.Fatal("peek shows another byte")
					}
				}
				k := min(n, int64(len(p)))
				b.discard(k)
				m.base += k
			case 7:
				p := make([]byte, n)
				k := b.read(p)
				if want := min(n, m.nxt-m.base); int64(k) != want {
					t.Fatalf("read %d, want %d", k, want)
				}
				for i, c := range p[:k] {
					if c != m.held[m.base+int64(i)] {
						t.Fatal("read returns another byte")
					}
				}
				m.base += int64(k)
			}
			m.compare(t, b)
		}
	})
}

// checkBlocks checks the blocks to report after a segment at off: the duplicate
// first, then the block that holds the segment, then others, each once.
func checkBlocks(t *testing.T, b *recvBuf, off int64) {
	t.Helper()
	dup := b.dsack
	var dst [maxBlocks]span
	if b.hasBlocks() != (dup.start < dup.end || len(b.ooo) > 0) {
		t.Fatal("hasBlocks")
	}
	got := dst[:b.blocks(dst[:])]
	if dup.start < dup.end {
		if len(got) == 0 || got[0] != dup {
			t.Fatalf("blocks %v, want %v first", got, dup)
		}
		got = got[1:]
	}
	if s, ok := b.ooo.find(off); ok && (len(got) == 0 || got[0] != s) {
		t.Fatalf("blocks %v, want the latest, %v, first", got, s)
	}
	for i, s := range got {
		if !slices.Contains(b.ooo, s) || slices.Contains(got[:i], s) {
			t.Fatalf("blocks %v of %v", got, b.ooo)
		}
	}
	// RFC 2018 section 4: as many distinct blocks as possible.
	if want := min(len(b.ooo), maxBlocks); dup.start == dup.end && len(got) != want {
		t.Fatalf("%d blocks of %v, want %d", len(got), b.ooo, want)
	}
}

// blockScript feeds segments of a stream whose next byte is 1 and tells what is
// acknowledged and reported after each.
func blockScript(b *recvBuf, segments ...span) []string {
	var got []string
	for _, s := range segments {
		b.insert(s.start, patterned(1, s.start, s.end))
		var dst [maxBlocks]span
		line := fmt.Sprint(b.nxt)
		for _, k := range dst[:b.blocks(dst[:])] {
			line += fmt.Sprintf(" %d:%d", k.start, k.end)
		}
		got = append(got, line)
	}
	return got
}

// T089 and the examples of RFC 2018 section 4.
func TestBlocksRFC2018(t *testing.T) {
	tests := []struct {
		name     string
		nxt      int64
		segments []span
		want     []string
	}{
		{"T089", 1, []span{{1001, 2001}, {2001, 3001}, {4001, 5001}, {7001, 8001}},
			[]string{"1 1001:2001", "1 1001:3001", "1 4001:5001 1001:3001", "1 7001:8001 4001:5001 1001:3001"}},
		{"case 1", 5000, []span{{5000, 5500}, {5500, 6000}, {6000, 6500}, {6500, 7000}},
			[]string{"5500", "6000", "6500", "7000"}},
		{"case 2", 5000, []span{{5500, 6000}, {6000, 6500}, {6500, 7000}, {7000, 7500}, {7500, 8000}, {8000, 8500}, {8500, 9000}},
			[]string{"5000 5500:6000", "5000 5500:6500", "5000 5500:7000", "5000 5500:7500", "5000 5500:8000",
				"5000 5500:8500", "5000 5500:9000"}},
		{"case 3", 5000, []span{{5000, 5500}, {6000, 6500}, {7000, 7500}, {8000, 8500}, {6500, 7000}, {5500, 6000}},
			[]string{"5500", "5500 6000:6500", "5500 7000:7500 6000:6500", "5500 8000:8500 7000:7500 6000:6500",
				"5500 6000:7500 8000:8500", "7500 8000:8500"}},
		{"five holes, one filled", 1, []span{{11, 12}, {21, 22}, {31, 32}, {41, 42}, {51, 52}, {42, 51}},
			[]string{"1 11:12", "1 21:22 11:12", "1 31:32 21:22 11:12", "1 41:42 31:32 21:22 11:12",
				"1 51:52 41:42 31:32 21:22", "1 41:52 31:32 21:22 11:12"}},
	}
	for _, tt := range tests {
		b := &recvBuf{base: tt.nxt, nxt: tt.nxt, max: 1 << 16}
		got := blockScript(b, tt.segments...)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s:\ngot  %q\nwant %q", tt.name, got, tt.want)
		}
	}
}

// T090 and examples of RFC 2883 section 4.
func TestBlocksDuplicate(t *testing.T) {
	tests := []struct {
		name     string
		nxt      int64
		segments []span
		want     []string
	}{
		{"below the ack", 1, []span{{1, 1001}, {1, 1001}}, []string{"1001", "1001 1:1001"}},
		{"T090", 1, []span{{1001, 3001}, {7001, 8001}, {1, 6001}},
			[]string{"1 1001:3001", "1 7001:8001 1001:3001", "6001 1001:3001 7001:8001"}},
		{"4.1.1", 3000, []span{{3000, 3500}, {3500, 4000}, {3000, 3500}}, []string{"3500", "4000", "4000 3000:3500"}},
		{"4.1.2", 3000, []span{{3000, 3500}, {3500, 4000}, {4500, 5000}, {3000, 3500}},
			[]string{"3500", "4000", "4000 4500:5000", "4000 3000:3500 4500:5000"}},
		{"4.1.3, within a block", 3000, []span{{3500, 4000}, {4500, 5000}, {4500, 5000}},
			[]string{"3000 3500:4000", "3000 4500:5000 3500:4000", "3000 4500:5000 4500:5000 3500:4000"}},
		{"partial", 1, []span{{1, 101}, {51, 151}}, []string{"101", "151 51:101"}},
	}
	for _, tt := range tests {
		b := &recvBuf{base: tt.nxt, nxt: tt.nxt, max: 1 << 16}
		got := blockScript(b, tt.segments...)
		if !slices.Equal(got, tt.want) {
			t.Errorf("%s:\ngot  %q\nwant %q", tt.name, got, tt.want)
		}
	}
}

// T052: every order of arrival of five segments.
func TestReassemblyOrders(t *testing.T) {
	order := []int{0, 1, 2, 3, 4}
	n := 0
	var permute func(k int)
	permute = func(k int) {
		if k == len(order) {
			n++
			b := &recvBuf{base: 1, nxt: 1, max: 1 << 16}
			total := int64(0)
			for _, i := range order {
				off := 1 + int64(i)*3000
				total += b.insert(off, patterned(1, off, off+3000))
			}
			p := make([]byte, 20000)
			if k := b.read(p); total != 15000 || !bytes.Equal(p[:k], patterned(1, 1, 15001)) {
				t.Errorf("order %v: %d advanced, %d read", order, total, k)
			}
			return
		}
		for i := k; i < len(order); i++ {
			order[k], order[i] = order[i], order[k]
			permute(k + 1)
			order[k], order[i] = order[i], order[k]
		}
	}
	permute(0)
	if n != 120 {
		t.Errorf("%d orders", n)
	}
}

// T053: the overlap matrix with conflicting content. The first copy of a byte wins.
func TestReassemblyConflict(t *testing.T) {
	edges := []int64{50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 550, 600, 650, 700, 750}
	for _, lo := range edges {
		for _, hi := range edges {
			if lo >= hi {
				continue
			}
			b := &recvBuf{base: 1, nxt: 1, max: 1 << 16}
			m := &model{1, 1, map[int64]byte{}}
			put := func(start, end int64, c byte) {
				p := bytes.Repeat([]byte{c}, int(end-start))
				b.insert(start, p)
				m.insert(start, p)
			}
			put(1, 100, 'a')
			put(200, 300, 'b')
			put(400, 500, 'c')
			put(600, 700, 'd')
			put(lo, hi, 'e')
			m.compare(t, b)
			b.dsack = span{}
			put(1, 800, 'f')
			m.compare(t, b)
			if b.nxt != 800 || b.dsack.start != 1 {
				t.Fatalf("%d:%d: next %d, duplicate %v", lo, hi, b.nxt, b.dsack)
			}
		}
	}
}

// T063: the number of holes is bounded and the stream survives it.
func TestReassemblyHoles(t *testing.T) {
	b := &recvBuf{base: 1, nxt: 1, max: 128 << 10}
	for off := int64(3); off < b.max; off += 2 {
		b.insert(off, patterned(1, off, off+1))
	}
	if len(b.ooo) != maxHoles {
		t.Fatalf("%d spans, want %d", len(b.ooo), maxHoles)
	}
	if cap(b.ooo) > 2*maxHoles || b.ring.size() > 2*b.max {
		t.Errorf("room for %d spans, %d bytes", cap(b.ooo), b.ring.size())
	}
	// One that touches a span is no more spans, and is taken.
	b.insert(4, patterned(1, 4, 5))
	if len(b.ooo) != maxHoles-1 {
		t.Errorf("%d spans after two were joined", len(b.ooo))
	}
	for b.nxt < b.max {
		b.insert(b.nxt, patterned(1, b.nxt, min(b.nxt+1000, b.max)))
	}
	p := make([]byte, b.max)
	if n := b.read(p); !bytes.Equal(p[:n], patterned(1, 1, b.max)) {
		t.Error("the stream is not what was sent")
	}
	if b.ring.size() != 0 {
		t.Error("memory is not released")
	}
}

// A loan sees the same bytes while the ring grows, and its memory is not reused
// for another connection until it ends.
func TestRecvBufLoan(t *testing.T) {
	b := &recvBuf{base: 1, nxt: 1, max: 1 << 17}
	b.insert(1, patterned(1, 1, 4001))
	p := b.peek()
	for off := int64(4001); off < 1<<17; off += 4000 {
		b.insert(off, patterned(1, off, off+4000))
		if !bytes.Equal(p, patterned(1, 1, 4001)) {
			t.Fatal("lent bytes changed")
		}
	}
	b.discard(4000)
	q := b.peek()
	b.drop()
	if !bytes.Equal(q, patterned(1, 4001, 4001+int64(len(q)))) || b.ring.size() != 0 || b.base != b.nxt {
		t.Errorf("after drop: %+v", b)
	}
	if got := b.peek(); got != nil {
		t.Errorf("%d bytes to peek at after drop", len(got))
	}
	b.discard(int64(len(q)))
	if b.base != b.nxt {
		t.Error("discard after drop moved the base")
	}
}

// To skip keeps what is out of order, and never touches memory that is lent.
func TestRecvBufSkip(t *testing.T) {
	b := &recvBuf{base: 1, nxt: 1, max: 1 << 16}
	b.insert(1, patterned(1, 1, 1001))
	b.insert(2001, patterned(1, 2001, 3001))
	b.skip()
	if b.base != 1001 || len(b.ooo) != 1 {
		t.Errorf("%+v", b)
	}
	b.insert(1001, patterned(1, 1001, 2001))
	p := make([]byte, 5000)
	if n := b.read(p); !bytes.Equal(p[:n], patterned(1, 1001, 3001)) {
		t.Errorf("read %d bytes, others", n)
	}
	b.insert(3001, patterned(1, 3001, 4001))
	b.insert(5001, patterned(1, 5001, 6001))
	q := b.peek()
	b.skip()
	for off := int64(4001); off < 60000; off += 1000 {
		b.insert(off, patterned(1, off, off+1000))
		b.skip()
	}
	if !bytes.Equal(q, patterned(1, 3001, 4001)) {
		t.Error("lent bytes changed")
	}
	b.discard(int64(len(q)))
	if b.base != b.nxt || b.ring.size() != 0 {
		t.Errorf("%+v", b)
	}
}

// A keep-alive probe may carry the byte in front of the first: nobody has received
// that, so it is not reported as a duplicate.
func TestNoDSACKBelowFirstByte(t *testing.T) {
	h := established(t, "<mss 1460,sackOK>")
	h.in(". 0:1 ack 1")
	h.expect(". 1 ack 1 win 65535 <>")
}
