package sum

import (
	"strconv"
	"testing"
)

var (
	sink uint16

	// lengths are those of headers, of packets, and of packets that a network card would
	// cut.
	lengths = []int{20, 40, 64, 128, 256, 576, 1460, 9000, 65480}
)

func BenchmarkOf(b *testing.B) {
	for _, n := range lengths {
		src := make([]byte, n)
		for _, path := range paths() {
			b.Run(strconv.Itoa(n)+"/"+path.name, func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					sink = of(src, 0, path.avx2)
				}
			})
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	for _, n := range lengths {
		// A payload lies behind the headers of Ethernet, IPv4 and TCP.
		dst, src := make([]byte, 54+n)[54:], make([]byte, n)
		for _, path := range paths() {
			b.Run(strconv.Itoa(n)+"/"+path.name, func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for b.Loop() {
					sink = copyOf(dst, src, 0, path.avx2)
				}
			})
		}
		b.Run(strconv.Itoa(n)+"/copyThenOf", func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				copy(dst, src)
				sink = Of(src, 0)
			}
		})
	}
}
