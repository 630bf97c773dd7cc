package hostio

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
)

// NewDialer returns a dialer for connections that are many and short. Nothing is set up
// for the time in which they might be silent: KeepAlive does that.
func NewDialer() *net.Dialer { return &net.Dialer{Control: connectNow, KeepAlive: -1} }

// KeepAlive has the other end of a connection of NewDialer asked now and then whether it
// is still there, as package net has it for every connection.
func KeepAlive(c net.Conn) {
	if c, ok := c.(*net.TCPConn); ok {
		c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true})
	}
}

// connectNow is a [net.Dialer.Control] that connects a TCP socket. To an address of the
// machine itself that is done when connect(2) returns, although it says that it is in
// progress: package net, which believes it, would let others run, and then hear from the
// scheduler what is known already. When it asks again it is told that there is a
// connection, or that there will be.
func connectNow(network, address string, c syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil || to.Addr().Zone() != "" || !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var sa syscall.Sockaddr = &syscall.SockaddrInet6{Addr: to.Addr().As16(), Port: int(to.Port())}
	if to.Addr().Is4() {
		sa = &syscall.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}
	}
	var failed error
	err = c.Control(func(fd uintptr) { failed = syscall.Connect(int(fd), sa) })
	if err == nil && failed != nil && failed != syscall.EINPROGRESS && failed != syscall.EINTR {
		err = os.NewSyscallError("connect", failed)
	}
	return err
}
