//go:build !unix

package hostio

import (
	"net"
	"net/netip"
)

// rawReader is not to be had here: reads go through net.Conn.
type rawReader struct{}

func (r *rawReader) init(*Reader)       {}
func (r *rawReader) ok() bool           { return false }
func (r *rawReader) read() (int, error) { panic("unreachable") }

// rawSender is not to be had either.
type rawSender struct{ segments bool }

func (s *rawSender) init(net.Conn) bool                     { return false }
func (s *rawSender) send([]byte, netip.AddrPort, int) error { panic("unreachable") }

// rawWriter is not to be had either.
type rawWriter struct{}

func (w rawWriter) init(net.Conn)             {}
func (w rawWriter) ok() bool                  { return false }
func (w rawWriter) write([]byte) (int, error) { panic("unreachable") }
func (w rawWriter) failure() error            { panic("unreachable") }
func (w rawWriter) awaitRead() error          { panic("unreachable") }
