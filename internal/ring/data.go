package ring

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
)

// MiB is 2^20 bytes.
const MiB = 1 << 20

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

// Send writes Data(n) and ends the stream in that direction.
func Send(c net.Conn, n int64) error {
	if _, err := io.Copy(c, Data(n)); err != nil {
		return err
	}
	return c.(interface{ CloseWrite() error }).CloseWrite()
}

// Expect reads as many bytes as want has, and returns an error unless they are
// the same.
func Expect(r io.Reader, want string) error {
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		return fmt.Errorf("read %q, %v, want %q", got[:n], err, want)
	}
	return nil
}

// Exchange sends a datagram, and returns an error unless the next to arrive is
// want.
func Exchange(c net.Conn, request, want string) error {
	if _, err := io.WriteString(c, request); err != nil {
		return err
	}
	buf := make([]byte, 1<<16)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	if string(buf[:n]) != want {
		return fmt.Errorf("got a datagram of %d bytes, want another of %d", n, len(want))
	}
	return nil
}
