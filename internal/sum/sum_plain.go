//go:build !amd64 || !gc || purego || race || asan || msan

package sum

// Without AVX2 all is left to the loop in Go.
const (
	useAVX2  = false
	fastFrom = 0
)

// addBlocks adds nothing of b.
func addBlocks(acc uint64, b []byte) (uint64, []byte) {
	return acc, b
}

// copyBlocks copies nothing of src.
func copyBlocks(acc uint64, dst, src []byte) (uint64, []byte, []byte) {
	return acc, dst, src
}
