//go:build !linux

package hostio

// canSegment says that no system call of this system sends several datagrams.
const canSegment = false

func appendSegmentSize([]byte, int) []byte { panic("unreachable") }
