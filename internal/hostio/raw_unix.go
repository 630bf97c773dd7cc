//go:build unix

package hostio

import (
	"io"
	"net"
	"sync"
	"syscall"
)

var errnos = []struct {
	errno syscall.Errno
	kind  Kind
}{
	{syscall.ECONNREFUSED, Refused},
	{syscall.EHOSTUNREACH, HostUnreachable},
	{syscall.EHOSTDOWN, HostUnreachable},
	{syscall.ENETUNREACH, NetUnreachable},
	{syscall.ENETDOWN, NetUnreachable},
	{syscall.EADDRNOTAVAIL, NetUnreachable},
	{syscall.EACCES, Prohibited},
	{syscall.EPERM, Prohibited},
	{syscall.EMSGSIZE, TooLong},
	{syscall.EAGAIN, Full},
	{syscall.ENOBUFS, Full},
}

// rawReader reads a socket without blocking, and waits for it without memory.
type rawReader struct {
	conn     syscall.RawConn
	datagram bool // an empty read is no end
	attempt  func(fd uintptr) bool
	n        int
	err      error
}

// init prepares for a connection that is a socket. A type that wraps one may
// change what its bytes mean, so it is read through its own method.
func (r *rawReader) init(owner *Reader) {
	var err error
	switch c := owner.conn.(type) {
	case *net.TCPConn:
		r.conn, err = c.SyscallConn()
	case *net.UnixConn:
		r.conn, err = c.SyscallConn()
	case *net.UDPConn:
		r.datagram = true
		r.conn, err = c.SyscallConn()
	}
	if err != nil {
		r.conn = nil
	}
	r.attempt = func(fd uintptr) bool { return r.try(owner, fd) }
}

func (r *rawReader) ok() bool { return r.conn != nil }

func (r *rawReader) read() (int, error) {
	r.n, r.err = 0, nil
	if err := r.conn.Read(r.attempt); err != nil {
		return 0, err
	}
	return r.n, r.err
}

// try reads once, and reports false if it has to wait.
func (r *rawReader) try(owner *Reader, fd uintptr) bool {
	p := owner.lend()
	if len(p) == 0 {
		r.err = net.ErrClosed
		return true
	}
	for {
		n, err := syscall.Read(int(fd), p)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			owner.giveUp()
			return false
		case err != nil:
			r.err = err
		case n == 0 && !r.datagram:
			r.err = io.EOF
		default:
			r.n = n
		}
		return true
	}
}

// rawSender writes to a socket without waiting.
type rawSender struct{ conn syscall.RawConn }

// init prepares for a connection that is a UDP socket. A type that wraps one is
// written to through its own method.
func (s *rawSender) init(conn net.Conn) bool {
	c, ok := conn.(*net.UDPConn)
	if !ok {
		return false
	}
	var err error
	s.conn, err = c.SyscallConn()
	return err == nil
}

// sending is one call of send. It is pooled because its method would escape anew
// each time.
type sending struct {
	p   []byte
	err error
	try func(fd uintptr) bool
}

var sendings = sync.Pool{New: func() any {
	w := new(sending)
	w.try = w.write
	return w
}}

func (s *rawSender) send(p []byte) error {
	w := sendings.Get().(*sending)
	w.p, w.err = p, nil
	err := s.conn.Write(w.try)
	if err == nil {
		err = w.err
	}
	w.p, w.err = nil, nil
	sendings.Put(w)
	return err
}

// write writes once. It is always done: RawConn would wait otherwise.
func (w *sending) write(fd uintptr) bool {
	for {
		_, w.err = syscall.Write(int(fd), w.p)
		if w.err != syscall.EINTR {
			return true
		}
	}
}
