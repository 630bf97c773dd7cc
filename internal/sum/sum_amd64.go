//go:build gc && !purego && !race && !asan && !msan

package sum

import "math/bits"

// Assembly tells the race detector and the sanitizers nothing of the memory that it
// reads and writes, so builds with them do without (sum_plain.go).

const (
	// fastFrom is the length from which the assembly is faster.
	fastFrom = 256

	// block is the length of which the assembly takes multiples.
	block = 32

	// atOnce is the most that the assembly is given in one call: a goroutine that is in
	// it cannot be preempted. The result is below 1<<48 then.
	atOnce = 1 << 18
)

// useAVX2 says that the processor has AVX2 and that the operating system saves its
// registers.
var useAVX2 = detectAVX2()

// addBlocks adds the whole blocks of b to acc, and returns what is left of b.
func addBlocks(acc uint64, b []byte) (uint64, []byte) {
	for len(b) >= block {
		n := min(len(b), atOnce) &^ (block - 1)
		acc = addWide(acc, sumAVX2(&b[0], n))
		b = b[n:]
	}
	return acc, b
}

// copyBlocks is addBlocks, with each block of src copied to dst on the way.
func copyBlocks(acc uint64, dst, src []byte) (uint64, []byte, []byte) {
	for len(src) >= block {
		n := min(len(src), atOnce) &^ (block - 1)
		acc = addWide(acc, copyAVX2(&dst[0], &src[0], n))
		dst, src = dst[n:], src[n:]
	}
	return acc, dst, src
}

// addWide adds in one's complement of 64 bits.
func addWide(a, b uint64) uint64 {
	s, carry := bits.Add64(a, b, 0)
	return s + carry
}

// sumAVX2 returns the sum of the n bytes at p, read as little-endian words of 32 bits.
// N is a multiple of block, not 0, and not more than atOnce.
//
//go:noescape
func sumAVX2(p *byte, n int) uint64

// copyAVX2 copies n bytes from src to dst, and returns their sum as sumAVX2 does.
//
//go:noescape
func copyAVX2(dst, src *byte, n int) uint64

// The registers that the detection reads.
const (
	osxsave = 1 << 27 // leaf 1, ECX: XGETBV may be used
	avx     = 1 << 28 // leaf 1, ECX
	avx2    = 1 << 5  // leaf 7, EBX
	ymm     = 0b110   // XCR0: the state of the XMM registers, and of their upper halves
)

// detectAVX2 asks the processor.
func detectAVX2() bool {
	maxLeaf, _, _, _ := cpuid(0, 0)
	_, _, ecx1, _ := cpuid(1, 0)
	if maxLeaf < 7 || ecx1&osxsave == 0 {
		return false
	}
	_, ebx7, _, _ := cpuid(7, 0)
	xcr0, _ := xgetbv()
	return hasAVX2(ecx1, ebx7, xcr0)
}

// hasAVX2 reports whether the registers say that AVX2 may be used.
func hasAVX2(ecx1, ebx7, xcr0 uint32) bool {
	return ecx1&osxsave != 0 && ecx1&avx != 0 && ebx7&avx2 != 0 && xcr0&ymm == ymm
}

// cpuid runs CPUID for a leaf and its subleaf.
func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)

// xgetbv reads XCR0, which is only there if CPUID says OSXSAVE.
func xgetbv() (eax, edx uint32)
