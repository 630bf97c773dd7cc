// Package hostio is what the relay needs of host sockets beyond net.Conn: reads
// that take memory only when there is something to read, datagrams that are sent
// without waiting, and what an error of the operating system means.
package hostio

import (
	"errors"
	"net"
	"net/netip"
	"os"
)

// Kind is what an error means to the other end of a flow.
type Kind uint8

const (
	Other Kind = iota
	Refused
	HostUnreachable
	NetUnreachable
	Prohibited
	TimedOut
	TooLong // a datagram that is longer than the network or the socket takes
	Full    // there is no room now: a datagram is lost
)

// KindOf returns the kind of an error of a dial or a socket.
func KindOf(err error) Kind {
	for _, k := range errnos {
		if errors.Is(err, k.errno) {
			return k.kind
		}
	}
	var t net.Error
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &t) && t.Timeout() {
		return TimedOut
	}
	return Other
}

// Reader reads from a connection into memory that is lent to it for each read.
// From a *net.UDPConn each read is one datagram, which may be empty.
type Reader struct {
	conn   net.Conn
	packet net.PacketConn // in place of conn
	from   netip.AddrPort
	lend   func() []byte
	giveUp func()
	raw    rawReader
}

// NewReader returns a Reader of conn. Lend is called when there may be something
// to read, and returns the memory for it; giveUp takes it back when there is
// nothing after all. If lend returns no memory, Read fails.
func NewReader(conn net.Conn, lend func() []byte, giveUp func()) *Reader {
	r := &Reader{conn: conn, lend: lend, giveUp: giveUp}
	r.raw.init(r)
	return r
}

// NewPacketReader is NewReader for a socket that is not connected: From tells
// who sent what was read.
func NewPacketReader(conn net.PacketConn, lend func() []byte, giveUp func()) *Reader {
	r := &Reader{packet: conn, lend: lend, giveUp: giveUp}
	r.raw.init(r)
	return r
}

// From returns the sender of the datagram that Read has returned last, if the
// Reader is one of NewPacketReader. It is not valid for a sender without an IP
// address.
func (r *Reader) From() netip.AddrPort { return r.from }

// Read waits until there is something to read, and reads it into memory that
// lend has returned: the first n bytes of it are valid, and the loan goes on. If it is
// known by then that the stream has ended, or failed, behind them, the error says so.
func (r *Reader) Read() (n int, err error) {
	if r.raw.ok() {
		return r.raw.read()
	}
	p := r.lend()
	if len(p) == 0 {
		return 0, net.ErrClosed
	}
	if r.packet == nil {
		return r.conn.Read(p)
	}
	n, from, err := r.packet.ReadFrom(p)
	r.from = netip.AddrPort{}
	if a, ok := from.(interface{ AddrPort() netip.AddrPort }); ok && err == nil {
		r.from = a.AddrPort()
	}
	return n, err
}

// More reads a further datagram into p, if there is one now: it never waits. Without one
// it is not OK, nor with an error, which is one that the socket tells once. It may be
// called after Read has returned a datagram, and then tells with [Reader.From] who sent
// this one.
func (r *Reader) More(p []byte) (n int, ok bool, err error) {
	if !r.Bursts() {
		return 0, false, nil
	}
	return r.raw.more(p)
}

// Bursts reports whether More may find a datagram: never on a connection that is no
// datagram socket of the operating system, or where that is not read without waiting.
func (r *Reader) Bursts() bool { return r.raw.ok() && r.raw.datagram }

// Sender sends datagrams through a socket without ever waiting for room.
type Sender struct{ raw rawSender }

// NewSender returns a Sender for conn, or nil if conn is not a socket of the
// operating system that can be written to in this way.
func NewSender(conn net.Conn) *Sender {
	s := new(Sender)
	if !s.raw.init(conn) {
		return nil
	}
	return s
}

// Send sends p as one datagram, which may be empty. It may be called concurrently.
// The error is of the kind [Full] if there is no room for it now.
func (s *Sender) Send(p []byte) error { return s.raw.send(p, netip.AddrPort{}, 0) }

// SendTo is Send for a socket that is not connected.
func (s *Sender) SendTo(p []byte, to netip.AddrPort) error { return s.raw.send(p, to, 0) }

// MaxSegments is how many datagrams SendSegments may be given.
const MaxSegments = 64

// Segments reports whether SendSegments may be called. The operating system may refuse
// each of its calls all the same.
func (s *Sender) Segments() bool { return s.raw.segments }

// SendSegments sends p as several datagrams, each of size bytes but the last, which may
// be shorter, to where the socket is connected or else to an address. It sends all or
// none of them.
func (s *Sender) SendSegments(p []byte, size int, to netip.AddrPort) error {
	return s.raw.send(p, to, size)
}

// Stream is a stream of bytes to the host, of which more can be asked than of a net.Conn.
type Stream struct{ raw rawStream }

// NewStream returns the Stream that conn is. It is not OK if conn is not a socket of the
// operating system that can be written to in this way.
func NewStream(conn net.Conn) (s Stream) {
	s.raw.init(conn)
	return s
}

// OK reports whether the other methods may be called.
func (s Stream) OK() bool { return s.raw.ok() }

// Write writes as much of p as there is room for now, and never waits. Less than all of it
// is no error.
func (s Stream) Write(p []byte) (int, error) { return s.raw.write(p) }

// Failure returns the error that has ended the connection, if there is one of which
// neither a read nor a write has told: the peer has reset it, most likely. It neither
// waits nor reads, and tells of an error once.
func (s Stream) Failure() error { return s.raw.failure() }

// AwaitRead waits until there is something to read, or the end, and reads nothing. An
// error is the one that a read would have returned, which is told once. A goroutine
// that has done nothing else needs no more than its first stack for it.
func (s Stream) AwaitRead() error { return s.raw.awaitRead() }
