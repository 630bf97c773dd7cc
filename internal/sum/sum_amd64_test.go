//go:build gc && !purego && !race && !asan && !msan

package sum

import (
	"os"
	"slices"
	"strings"
	"testing"
)

func TestDetection(t *testing.T) {
	const ecx1, ebx7, xcr0 = 1<<27 | 1<<28, 1 << 5, 1<<1 | 1<<2
	for _, tt := range []struct {
		name             string
		ecx1, ebx7, xcr0 uint32
		want             bool
	}{
		{"all that is needed", ecx1, ebx7, xcr0, true},
		{"all bits", ^uint32(0), ^uint32(0), ^uint32(0), true},
		{"nothing", 0, 0, 0, false},
		{"no OSXSAVE", ^uint32(1 << 27), ^uint32(0), ^uint32(0), false},
		{"no AVX", ^uint32(1 << 28), ^uint32(0), ^uint32(0), false},
		{"no AVX2", ^uint32(0), ^uint32(1 << 5), ^uint32(0), false},
		{"XMM not saved", ^uint32(0), ^uint32(0), ^uint32(1 << 1), false},
		{"YMM not saved", ^uint32(0), ^uint32(0), ^uint32(1 << 2), false},
	} {
		if got := hasAVX2(tt.ecx1, tt.ebx7, tt.xcr0); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
}

// The kernel shows avx2 among the flags under the same conditions.
func TestDetectionAsTheKernel(t *testing.T) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Skip(err)
	}
	if got, want := detectAVX2(), slices.Contains(strings.Fields(string(info)), "avx2"); got != want {
		t.Errorf("AVX2 is detected: %v, the kernel says %v", got, want)
	}
}

// A machine without AVX2 gets the same sums.
func TestWithoutAVX2(t *testing.T) {
	defer func(was bool) { useAVX2 = was }(useAVX2)
	useAVX2 = false
	if n := len(paths()); n != 1 {
		t.Errorf("%d paths", n)
	}
	t.Run("lengths", TestEveryLength)
	t.Run("long", TestLong)
}

func TestAddWide(t *testing.T) {
	for _, tt := range []struct{ a, b, want uint64 }{
		{1, 2, 3}, {1 << 63, 1 << 63, 1}, {^uint64(0), 1, 1}, {^uint64(0), ^uint64(0), ^uint64(0)},
	} {
		if got := addWide(tt.a, tt.b); got != tt.want {
			t.Errorf("addWide(%#x, %#x) = %#x, want %#x", tt.a, tt.b, got, tt.want)
		}
	}
}
