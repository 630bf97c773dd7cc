// Package sum is the one's complement arithmetic of the Internet checksum, RFC 1071.
//
// The bulk of what is long is added with AVX2 where the machine has that (sum_amd64.go,
// sum_amd64.s), and all else by the loop in this file. With the build tag purego there
// is no assembly.
package sum

import (
	"encoding/binary"
	"math/bits"
)

// Add adds in one's complement: a carry out of the top comes back in at the
// bottom.
func Add(a, b uint16) uint16 {
	s := uint32(a) + uint32(b)
	return uint16(s) + uint16(s>>16)
}

// Join returns the sum of n bytes, which is a, and of those behind them, which is b. If n
// is odd these begin in the second half of a word, and the sum of swapped words is the
// swapped sum (RFC 1071 section 2 (B)).
func Join(a uint16, n int, b uint16) uint16 {
	if n%2 != 0 {
		b = bits.ReverseBytes16(b)
	}
	return Add(a, b)
}

// Of returns the one's complement sum of initial and of b, read as big-endian
// 16-bit words, the last one padded with a zero byte (RFC 1071 section 1). It is
// not complemented. Sums chain, Of(b2, Of(b1, 0)), if b1 has an even length.
func Of(b []byte, initial uint16) uint16 {
	return of(b, swapped(initial), useAVX2)
}

// Copy copies src to dst, and returns the sum of src as Of does. It panics if dst
// is shorter than src. The two must not overlap.
func Copy(dst, src []byte, initial uint16) uint16 {
	return copyOf(dst, src, swapped(initial), useAVX2)
}

// swapped returns s in little-endian order, as of and copyOf begin with.
func swapped(s uint16) uint64 {
	return uint64(bits.ReverseBytes16(s))
}

// of is Of, with AVX2 or without.
//
// The words are added eight bytes at a time and folded at the end (section 2
// (C)), in little-endian order, in which they need no swapping on the machines
// that matter: the sum of swapped words is the swapped sum (section 2 (B)).
func of(b []byte, acc uint64, avx2 bool) uint16 {
	le := binary.LittleEndian
	if avx2 && len(b) >= fastFrom {
		acc, b = addBlocks(acc, b)
	}
	var carry, acc2, carry2 uint64
	for len(b) >= 64 {
		// Two chains, that the processor can follow at the same time.
		w := b[:64]
		acc, carry = bits.Add64(acc, le.Uint64(w), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[8:]), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[16:]), carry)
		acc, carry = bits.Add64(acc, le.Uint64(w[24:]), carry)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[32:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[40:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[48:]), carry2)
		acc2, carry2 = bits.Add64(acc2, le.Uint64(w[56:]), carry2)
		b = b[64:]
	}
	acc, carry = bits.Add64(acc, acc2, carry)
	acc, carry = bits.Add64(acc, carry2, carry)
	for len(b) >= 8 {
		acc, carry = bits.Add64(acc, le.Uint64(b), carry)
		b = b[8:]
	}
	var tail uint64
	shift := 0
	if len(b) >= 4 {
		tail = uint64(le.Uint32(b))
		shift = 32
		b = b[4:]
	}
	if len(b) >= 2 {
		tail |= uint64(le.Uint16(b)) << shift
		shift += 16
		b = b[2:]
	}
	if len(b) == 1 {
		tail |= uint64(b[0]) << shift
	}
	acc, carry = bits.Add64(acc, tail, carry)
	acc, carry = bits.Add64(acc, 0, carry)
	acc += carry

	// Of a number and the same with its halves exchanged, the upper half of the sum is
	// both halves and their carry.
	acc += bits.RotateLeft64(acc, 32)
	half := uint32(acc >> 32)
	half += bits.RotateLeft32(half, 16)
	return bits.ReverseBytes16(uint16(half >> 16))
}

// copyOf is Copy, with AVX2 or without.
func copyOf(dst, src []byte, acc uint64, avx2 bool) uint16 {
	if len(dst) < len(src) {
		panic("sum: dst is shorter than src")
	}
	if avx2 && len(src) >= fastFrom {
		acc, dst, src = copyBlocks(acc, dst, src)
	}
	copy(dst, src)
	return of(src, acc, false)
}
