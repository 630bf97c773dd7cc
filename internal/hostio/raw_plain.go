//go:build !unix

package hostio

import (
	"net"
	"net/netip"
)

// rawReader is not to be had here: reads go through net.Conn.
type rawReader struct{ datagram bool }

func (r *rawReader) init(*Reader)                   {}
func (r *rawReader) ok() bool                       { return false }
func (r *rawReader) read() (int, error)             { panic("unreachable") }
func (r *rawReader) more([]byte) (int, bool, error) { panic("unreachable") }

// rawSender is not to be had either.
type rawSender struct{ segments bool }

func (s *rawSender) init(net.Conn) bool                     { return false }
func (s *rawSender) send([]byte, netip.AddrPort, int) error { panic("unreachable") }

// rawStream is not to be had either.
type rawStream struct{}

func (s rawStream) init(net.Conn)             {}
func (s rawStream) ok() bool                  { return false }
func (s rawStream) write([]byte) (int, error) { panic("unreachable") }
func (s rawStream) failure() error            { panic("unreachable") }
func (s rawStream) awaitRead() error          { panic("unreachable") }
