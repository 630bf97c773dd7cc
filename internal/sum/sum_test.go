package sum

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// path is one way to a sum.
type path struct {
	name string
	avx2 bool
}

// paths returns those that this machine has.
func paths() []path {
	all := []path{{"plain", false}}
	if useAVX2 {
		all = append(all, path{"avx2", true})
	}
	return all
}

// naive is RFC 1071 section 1 word for word: 16-bit words, the carry added back in
// at once.
func naive(b []byte, initial uint16) uint16 {
	s := uint32(initial)
	for i := 0; i < len(b); i += 2 {
		w := uint32(b[i]) << 8
		if i+1 < len(b) {
			w |= uint32(b[i+1])
		}
		s += w
		if s > 0xffff {
			s -= 0xffff
		}
	}
	return uint16(s)
}

const guard = 64

// field is memory to copy to, with a guard on either side of it.
type field []byte

func newField(n int) field { return make(field, guard+n+guard) }

// take returns n bytes at off, after it has filled all but these with a pattern, and
// these with another.
func (f field) take(off, n int) []byte {
	f = f[:guard+off+n+guard]
	for i := range f {
		f[i] = 0xa5
	}
	b := f[guard+off:][:n]
	for i := range b {
		b[i] = 0x3c
	}
	return b
}

// intact reports whether all but the n bytes at off are as take has left them.
func (f field) intact(off, n int) bool {
	f = f[:guard+off+n+guard]
	return bytes.Count(f[:guard+off], []byte{0xa5}) == guard+off && bytes.Count(f[guard+off+n:], []byte{0xa5}) == guard
}

// check compares both functions, by every path, with want. The copy goes to off in f.
func check(t *testing.T, f field, off int, src []byte, initial, want uint16) {
	t.Helper()
	for _, p := range paths() {
		if got := of(src, swapped(initial), p.avx2); got != want {
			t.Fatalf("%s: the sum of %d bytes from %#04x is %#04x, want %#04x", p.name, len(src), initial, got, want)
		}
		dst := f.take(off, len(src))
		if got := copyOf(dst, src, swapped(initial), p.avx2); got != want {
			t.Fatalf("%s: the sum of %d bytes copied from %#04x is %#04x, want %#04x", p.name, len(src), initial, got, want)
		}
		if !bytes.Equal(dst, src) {
			t.Fatalf("%s: %d bytes to %d: the copy is another", p.name, len(src), off)
		}
		if !f.intact(off, len(src)) {
			t.Fatalf("%s: %d bytes to %d: written outside of dst", p.name, len(src), off)
		}
	}
	if got := Of(src, initial); got != want {
		t.Fatalf("Of %d bytes from %#04x = %#04x, want %#04x", len(src), initial, got, want)
	}
	if got := Copy(f.take(off, len(src)), src, initial); got != want {
		t.Fatalf("Copy of %d bytes from %#04x = %#04x, want %#04x", len(src), initial, got, want)
	}
}

func TestAdd(t *testing.T) {
	for _, tt := range []struct{ a, b, want uint16 }{
		{0, 0, 0},
		{0, 0xffff, 0xffff},
		{1, 0xfffe, 0xffff},
		{1, 0xffff, 1},
		{0x8000, 0x8000, 1},
		{0xffff, 0xffff, 0xffff},
		{0x1234, 0x4321, 0x5555},
	} {
		if got := Add(tt.a, tt.b); got != tt.want {
			t.Errorf("Add(%#x, %#x) = %#x, want %#x", tt.a, tt.b, got, tt.want)
		}
		if got := Add(tt.b, tt.a); got != tt.want {
			t.Errorf("Add(%#x, %#x) = %#x, want %#x", tt.b, tt.a, got, tt.want)
		}
	}
}

// A sum is that of its parts, wherever it is cut.
func TestJoin(t *testing.T) {
	b := []byte{0xff, 0xfe, 0x12, 0x34, 0xff, 0xff, 0xab}
	for n := range len(b) + 1 {
		if got, want := Join(Of(b[:n], 0), n, Of(b[n:], 0)), naive(b, 0); got != want {
			t.Errorf("cut at %d: %#04x, want %#04x", n, got, want)
		}
	}
}

func TestKnownSums(t *testing.T) {
	ipv4 := []byte{0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7}
	for _, tt := range []struct {
		name    string
		b       []byte
		initial uint16
		want    uint16
	}{
		{"nothing", nil, 0, 0},
		{"nothing but the initial sum", nil, 0x1234, 0x1234},
		{"one byte", []byte{0xab}, 0, 0xab00},
		{"RFC 1071 section 3", []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0, 0xddf2},
		{"an IPv4 header with its checksum", ipv4, 0, 0xffff},
		{"zeros stay zero", make([]byte, 1460), 0, 0},
		{"ones are zero, but not when all is", bytes.Repeat([]byte{0xff}, 1460), 0, 0xffff},
		{"ones add nothing", bytes.Repeat([]byte{0xff}, 1460), 0x1234, 0x1234},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check(t, newField(len(tt.b)), 0, tt.b, tt.initial, tt.want)
		})
	}
}

// fills are contents: of each eight bytes, all or one half are random or ones.
var fills = []struct {
	name string
	fill func(b []byte, r *rand.Rand)
}{
	{"random", func(b []byte, r *rand.Rand) { randomise(b, r) }},
	{"zeros", func(b []byte, _ *rand.Rand) { clear(b) }},
	{"ones", func(b []byte, _ *rand.Rand) { ones(b, func(int) bool { return true }) }},
	{"lower ones", func(b []byte, _ *rand.Rand) { ones(b, func(i int) bool { return i&4 == 0 }) }},
	{"upper ones", func(b []byte, _ *rand.Rand) { ones(b, func(i int) bool { return i&4 != 0 }) }},
}

func randomise(b []byte, r *rand.Rand) {
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

func ones(b []byte, at func(i int) bool) {
	clear(b)
	for i := range b {
		if at(i) {
			b[i] = 0xff
		}
	}
}

func TestEveryLength(t *testing.T) {
	const longest = 700
	f, buf := newField(longest+16), make([]byte, longest+16)
	for _, c := range fills {
		c.fill(buf, rand.New(rand.NewPCG(1, 2)))
		for _, initial := range []uint16{0, 1, 0x1234, 0xfffe, 0xffff} {
			for n := 0; n <= longest; n++ {
				off := n * 7 % 16
				src := buf[off:][:n]
				check(t, f, n%9, src, initial, naive(src, initial))
			}
		}
	}
}

func TestEveryAlignment(t *testing.T) {
	const most = 64
	r := rand.New(rand.NewPCG(3, 4))
	f, buf := newField(1500+most), make([]byte, 1500+most)
	randomise(buf, r)
	for _, n := range []int{9, 255, 256, 257, 287, 415, 1460} {
		for from := range most {
			src := buf[from:][:n]
			want := naive(src, 0x89ab)
			for to := range most {
				check(t, f, to, src, 0x89ab, want)
			}
		}
	}
}

func TestRandomLengths(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	f, buf := newField(70000), make([]byte, 70000)
	randomise(buf, r)
	for range 300 {
		from, n := r.IntN(64), r.IntN(1<<r.IntN(17))
		src, initial := buf[from:][:n], uint16(r.Uint32())
		check(t, f, r.IntN(64), src, initial, naive(src, initial))
	}
}

// No length makes a counter overflow, nor does the seam between two calls of the
// assembly show.
func TestLong(t *testing.T) {
	const longest = 1<<20 + 1
	f, buf := newField(longest+1), make([]byte, longest+1)
	for _, c := range fills {
		c.fill(buf, rand.New(rand.NewPCG(7, 8)))
		for _, n := range []int{65480, 65535, 1 << 18, 1<<18 + 31, 1<<18 + 95, 1<<18 + 255, 1 << 19, 1 << 20, longest} {
			src := buf[1:][:n]
			check(t, f, 1, src, 0xffff, naive(src, 0xffff))
		}
	}
}

func TestCopyToShortMemory(t *testing.T) {
	for _, n := range []int{1, 20, 256, 1460} {
		f := newField(n)
		dst := f.take(0, n-1) // with room behind, that is not dst's
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%d bytes were copied to %d", n, n-1)
				}
			}()
			Copy(dst, make([]byte, n), 0)
		}()
		if !f.intact(0, n-1) || bytes.Count(dst, []byte{0x3c}) != n-1 {
			t.Errorf("%d bytes to %d: something was written", n, n-1)
		}
	}
	dst := []byte{1, 2, 3}
	if Copy(dst, []byte{9, 8}, 0); !bytes.Equal(dst, []byte{9, 8, 3}) {
		t.Errorf("two bytes copied to three: % x", dst)
	}
}

// Memory on the stack stays there.
func TestNothingIsAllocated(t *testing.T) {
	if n := testing.AllocsPerRun(100, func() {
		var dst, src [1460]byte
		src[0] = byte(sink)
		sink = Of(src[:], Copy(dst[:], src[:], 0))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzSum(f *testing.F) {
	f.Add([]byte{}, uint16(0), uint16(0))
	f.Add([]byte{0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7}, uint16(0), uint16(2))
	f.Add(bytes.Repeat([]byte{0xff}, 417), uint16(0xffff), uint16(290))
	f.Fuzz(func(t *testing.T, b []byte, initial, cut uint16) {
		want := naive(b, initial)
		check(t, newField(len(b)+31), int(cut)%32, b, initial, want)
		at := min(int(cut), len(b)) &^ 1
		if got := Of(b[at:], Of(b[:at], initial)); got != want {
			t.Fatalf("in two parts at %d: %#04x, want %#04x", at, got, want)
		}
	})
}
