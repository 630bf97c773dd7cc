package hostio

import (
	"net"
	"syscall"
)

// PathMTU returns the size of the largest IP packet that gets to the peer of conn, as
// far as the operating system knows; 0 if conn is not a connected UDP socket of it.
func PathMTU(conn net.Conn) (mtu int) {
	c, ok := conn.(*net.UDPConn)
	if !ok {
		return 0
	}
	local, ok := c.LocalAddr().(*net.UDPAddr)
	raw, err := c.SyscallConn()
	if !ok || err != nil {
		return 0
	}
	level, option := syscall.IPPROTO_IPV6, syscall.IPV6_MTU
	if local.IP.To4() != nil {
		level, option = syscall.IPPROTO_IP, syscall.IP_MTU
	}
	failed := raw.Control(func(fd uintptr) { mtu, err = syscall.GetsockoptInt(int(fd), level, option) })
	if failed != nil || err != nil {
		return 0
	}
	return mtu
}
