//go:build !linux

package hostio

// canSegment reports that no system call of this system sends several datagrams.
func canSegment(int) bool { return false }

func appendSegmentSize([]byte, int) []byte { panic("unreachable") }
