package ring

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
)

// Data returns a stream of n bytes that do not repeat, the same ones each time.
func Data(n int64) io.Reader {
	return io.LimitReader(rand.NewChaCha8([32]byte{1}), n)
}

// Sum returns the SHA-256 digest of a stream in hexadecimal, and its length.
func Sum(r io.Reader) (sum string, n int64, err error) {
	h := sha256.New()
	n, err = io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

// Verify reads r to its end and returns an error unless it was Data(n).
func Verify(r io.Reader, n int64) error {
	want, _, _ := Sum(Data(n))
	got, m, err := Sum(r)
	switch {
	case err != nil:
		return fmt.Errorf("after %d of %d bytes: %w", m, n, err)
	case m != n:
		return fmt.Errorf("stream of %d bytes, want %d", m, n)
	case got != want:
		return fmt.Errorf("digest of %d bytes is %s, want %s", n, got, want)
	}
	return nil
}
