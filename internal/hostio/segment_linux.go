package hostio

import (
	"encoding/binary"
	"syscall"
	"unsafe"
)

// canSegment reports whether the kernel can be asked to cut datagrams (udp(7),
// UDP_SEGMENT): since Linux 4.18. One that cannot does not refuse it: it sends all of
// them as one datagram, because it passes over the control messages that it does not
// know.
func canSegment(fd int) bool {
	_, err := syscall.GetsockoptInt(fd, syscall.IPPROTO_UDP, udpSegment)
	return err == nil
}

// udpSegment is UDP_SEGMENT of linux/udp.h.
const udpSegment = 103

// appendSegmentSize appends the control message that has datagrams cut to size bytes.
func appendSegmentSize(oob []byte, size int) []byte {
	oob = append(oob, make([]byte, syscall.CmsgSpace(2))...)
	h := (*syscall.Cmsghdr)(unsafe.Pointer(&oob[0]))
	h.Level, h.Type = syscall.IPPROTO_UDP, udpSegment
	h.SetLen(syscall.CmsgLen(2))
	binary.NativeEndian.PutUint16(oob[syscall.CmsgLen(0):], uint16(size))
	return oob
}
