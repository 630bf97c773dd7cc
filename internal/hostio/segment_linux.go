package hostio

import (
	"encoding/binary"
	"syscall"
	"unsafe"
)

// canSegment says that the kernel may be asked to cut datagrams (udp(7),
// UDP_SEGMENT): since Linux 4.18.
const canSegment = true

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
