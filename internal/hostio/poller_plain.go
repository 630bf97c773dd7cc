//go:build !linux

package hostio

import (
	"sync"
	"syscall"
)

// Poller waits for any number of sockets with one goroutine, where that is possible.
type Poller struct{}

// NewPoller returns nil, of which the methods may be called.
func NewPoller(*sync.WaitGroup) *Poller { return nil }

// Await reports that it is not possible here.
func (p *Poller) Await(syscall.Conn, func()) (ok bool) { return false }

// Forget does nothing.
func (p *Poller) Forget(syscall.Conn) {}
