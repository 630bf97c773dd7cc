//go:build unix

package hostio

import (
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
)

// rawReader reads a socket without blocking, and waits for it without memory.
type rawReader struct {
	conn     syscall.RawConn
	datagram bool // an empty read is no end
	stream   bool // what two reads return is the same as what one would
	attempt  func(fd uintptr) bool
	behind   []byte // for the attempt of more; nil: it is one of read
	n        int
	err      error
}

// init prepares for a connection that is a socket. A type that wraps one may
// change what its bytes mean, so it is read through its own method.
func (r *rawReader) init(owner *Reader) {
	var err error
	var conn any = owner.conn
	if owner.packet != nil {
		conn = owner.packet
	}
	switch c := conn.(type) {
	case *net.TCPConn:
		r.stream = true
		r.conn, err = c.SyscallConn()
	case *net.UnixConn:
		if owner.packet == nil {
			if a, ok := c.LocalAddr().(*net.UnixAddr); ok { // "unixpacket" is neither
				r.stream, r.datagram = a.Net == "unix", a.Net == "unixgram"
			}
			r.conn, err = c.SyscallConn()
		}
	case *net.UDPConn:
		r.datagram = true
		r.conn, err = c.SyscallConn()
	}
	if err != nil {
		r.conn = nil
	}
	r.attempt = func(fd uintptr) bool {
		if r.behind != nil {
			r.n, r.err = owner.receive(int(fd), r.behind)
			return true
		}
		return r.try(owner, fd)
	}
}

func (r *rawReader) ok() bool { return r.conn != nil }

func (r *rawReader) read() (int, error) {
	r.n, r.err = 0, nil
	if err := r.conn.Read(r.attempt); err != nil {
		return 0, err
	}
	return r.n, r.err
}

// more reads a datagram that is there. What the attempt does not find, or a signal keeps
// it from, is left to the next read.
func (r *rawReader) more(p []byte) (n int, ok bool, err error) {
	r.behind = p
	err = r.conn.Read(r.attempt)
	r.behind = nil
	switch {
	case err != nil || r.err == syscall.EAGAIN || r.err == syscall.EINTR:
		return 0, false, nil // read tells if it is closed
	case r.err != nil:
		return 0, false, r.err
	}
	return r.n, true, nil
}

// try reads what there is, and reports false if it has to wait.
func (r *rawReader) try(owner *Reader, fd uintptr) bool {
	p := owner.lend()
	if len(p) == 0 {
		r.err = net.ErrClosed
		return true
	}
	for {
		n, err := owner.receive(int(fd), p)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			if r.n > 0 {
				return true
			}
			owner.giveUp()
			return false
		case err != nil:
			r.err = err
		case n == 0 && !r.datagram:
			r.err = io.EOF
		case r.n == 0 && r.stream && n < len(p):
			// There is most likely no more, but what ends the stream may be behind it.
			r.n, p = n, p[n:]
			continue
		default:
			r.n += n
		}
		return true
	}
}

// receive reads once.
func (r *Reader) receive(fd int, p []byte) (n int, err error) {
	if r.packet == nil {
		return receive(fd, p)
	}
	n, from, err := syscall.Recvfrom(fd, p, 0)
	r.from = netip.AddrPort{}
	switch a := from.(type) {
	case *syscall.SockaddrInet4:
		r.from = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *syscall.SockaddrInet6:
		r.from = netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port))
	}
	return n, err
}

// rawSender writes to a socket without waiting.
type rawSender struct {
	conn     syscall.RawConn
	ip6      bool // the socket takes addresses of IPv6
	segments bool // the operating system cuts datagrams
}

// init prepares for a connection that is a UDP socket. A type that wraps one is
// written to through its own method.
func (s *rawSender) init(conn net.Conn) bool {
	c, ok := conn.(*net.UDPConn)
	if !ok {
		return false
	}
	var err error
	if s.conn, err = c.SyscallConn(); err != nil {
		return false
	}
	if a, ok := c.LocalAddr().(*net.UDPAddr); ok {
		s.ip6 = a.IP.To4() == nil
	}
	s.conn.Control(func(fd uintptr) { s.segments = canSegment(int(fd)) })
	return true
}

// sending is one call of send. It is pooled because its method would escape anew
// each time.
type sending struct {
	p   []byte
	oob []byte           // the size of each datagram, if p is several; or empty
	to  syscall.Sockaddr // ip4 or ip6; nil: where the socket is connected to
	ip4 syscall.SockaddrInet4
	ip6 syscall.SockaddrInet6
	err error
	try func(fd uintptr) bool
}

var sendings = sync.Pool{New: func() any {
	w := new(sending)
	w.try = w.write
	return w
}}

// send sends p as one datagram, or as several of size bytes if size is not 0.
func (s *rawSender) send(p []byte, to netip.AddrPort, size int) error {
	a := to.Addr()
	if a.IsValid() && !s.ip6 && !a.Unmap().Is4() {
		return syscall.ENETUNREACH
	}
	w := sendings.Get().(*sending)
	w.p, w.oob, w.err = p, w.oob[:0], nil
	if size > 0 {
		w.oob = appendSegmentSize(w.oob, size)
	}
	switch {
	case !a.IsValid():
	case s.ip6:
		w.ip6.Addr, w.ip6.Port = a.As16(), int(to.Port())
		w.to = &w.ip6
	default:
		w.ip4.Addr, w.ip4.Port = a.As4(), int(to.Port())
		w.to = &w.ip4
	}
	err := s.conn.Write(w.try)
	if err == nil {
		err = w.err
	}
	w.p, w.to, w.err = nil, nil, nil
	sendings.Put(w)
	return err
}

// write writes once. It is always done: RawConn would wait otherwise.
func (w *sending) write(fd uintptr) bool {
	for {
		if len(w.oob) > 0 {
			w.err = syscall.Sendmsg(int(fd), w.p, w.oob, w.to, 0)
		} else if w.to == nil {
			_, w.err = send(int(fd), w.p)
		} else {
			w.err = syscall.Sendto(int(fd), w.p, 0, w.to)
		}
		if w.err != syscall.EINTR {
			return true
		}
	}
}

// rawStream is a socket of the operating system.
type rawStream struct{ conn syscall.RawConn }

// init prepares for a connection that is a socket. A type that wraps one is written
// to through its own method.
func (s *rawStream) init(conn net.Conn) {
	if c, ok := conn.(*net.TCPConn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			s.conn = raw
		}
	}
}

func (s rawStream) ok() bool { return s.conn != nil }

// writing is one call of write. It is pooled as sending is.
type writing struct {
	p   []byte
	n   int
	err error
	try func(fd uintptr) bool
}

var writings = sync.Pool{New: func() any {
	w := new(writing)
	w.try = w.write
	return w
}}

func (s rawStream) write(p []byte) (int, error) {
	c := writings.Get().(*writing)
	c.p, c.n, c.err = p, 0, nil
	err := s.conn.Write(c.try)
	if err == nil {
		err = c.err
	}
	n := c.n
	c.p, c.err = nil, nil
	writings.Put(c)
	return n, err
}

// write writes once. It is always done: RawConn would wait otherwise.
func (c *writing) write(fd uintptr) bool {
	for {
		n, err := send(int(fd), c.p)
		switch err {
		case nil:
			c.n = n
		case syscall.EINTR:
			continue
		case syscall.EAGAIN:
		default:
			c.err = err
		}
		return true
	}
}

// failure asks the socket for its error, which there is at once. What has arrived
// before a reset may still be in the socket, where it hides the reset from a read.
func (s rawStream) failure() error {
	var errno int
	var err error
	if s.conn.Control(func(fd uintptr) {
		errno, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ERROR)
	}) != nil || err != nil || errno == 0 {
		return nil // or it was closed here
	}
	return os.NewSyscallError("read", syscall.Errno(errno))
}

// awaitRead looks at what there is to read and leaves it there, but for an error, which
// the operating system forgets when it has told it.
func (s rawStream) awaitRead() (err error) {
	waited := s.conn.Read(func(fd uintptr) bool {
		var b [1]byte
		for {
			_, _, err = syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK)
			if err != syscall.EINTR {
				break
			}
		}
		if err == syscall.EAGAIN {
			return false
		}
		return true
	})
	if waited != nil {
		return waited
	}
	return err
}
