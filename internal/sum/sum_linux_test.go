package sum

import (
	"os"
	"syscall"
	"testing"
)

// What lies in front of a slice and behind it may be no memory at all.
func TestEdgesOfMemory(t *testing.T) {
	src, dst := island(t), island(t)
	for i := range src {
		src[i] = byte(i * 31)
	}
	for n := 0; n <= len(src); n += 1 + n/300*97 {
		for _, p := range paths() {
			end := len(src) - n
			if got, want := of(src[end:], 0, p.avx2), naive(src[end:], 0); got != want {
				t.Fatalf("%s: the last %d bytes: %#04x, want %#04x", p.name, n, got, want)
			}
			if got, want := copyOf(dst[end:], src[:n], 0, p.avx2), naive(src[:n], 0); got != want {
				t.Fatalf("%s: the first %d bytes, copied: %#04x, want %#04x", p.name, n, got, want)
			}
		}
	}
}

// island maps memory that has nothing in front of it and nothing behind it.
func island(t *testing.T) []byte {
	page := os.Getpagesize()
	b, err := syscall.Mmap(-1, 0, 3*page, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Munmap(b) })
	for _, sea := range [][]byte{b[:page], b[2*page:]} {
		if err := syscall.Mprotect(sea, syscall.PROT_NONE); err != nil {
			t.Fatal(err)
		}
	}
	return b[page : 2*page : 2*page]
}
