package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"io"
	"math/rand/v2"
)

// payload is a stream of size bytes that is the same each time it is read.
type payload struct {
	size   int64
	digest string // SHA-256, in hex
}

func newPayload(size int64) payload {
	p := payload{size: size}
	sum := sha256.New()
	copyAll(sum, p.reader())
	p.digest = hex.EncodeToString(sum.Sum(nil))
	return p
}

// reader returns the stream from its start.
func (p payload) reader() io.Reader {
	stream := &stream{block: make([]byte, 256<<10)}
	rand.NewChaCha8([32]byte{}).Read(stream.block)
	return io.LimitReader(stream, p.size)
}

// stream is an endless run of blocks of noise. Each starts with its own offset,
// so that no two are alike and a lost or doubled one changes the digest.
type stream struct {
	block  []byte
	offset int64
}

func (s *stream) Read(b []byte) (int, error) {
	at := s.offset % int64(len(s.block))
	if at == 0 {
		binary.BigEndian.PutUint64(s.block, uint64(s.offset))
	}
	n := copy(b, s.block[at:])
	s.offset += int64(n)
	return n, nil
}

// copyAll is io.Copy with a buffer of its own, larger than io.Copy's.
func copyAll(dst io.Writer, src io.Reader) (int64, error) {
	type plainWriter struct{ io.Writer }
	type plainReader struct{ io.Reader }
	return io.CopyBuffer(plainWriter{dst}, plainReader{src}, make([]byte, 256<<10))
}
