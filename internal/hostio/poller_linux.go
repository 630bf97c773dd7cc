package hostio

import (
	"os"
	"sync"
	"syscall"
	"time"
)

// Poller waits for any number of sockets with one goroutine, where a read each would
// take one with its stack. While there is nothing to wait for it has neither a goroutine
// nor a descriptor.
type Poller struct {
	goroutines *sync.WaitGroup // which its own is one of

	mu      sync.Mutex
	epoll   *os.File // nil while nobody waits
	raw     syscall.RawConn
	waiting map[int32]func() // by descriptor
}

// NewPoller returns a Poller. Its goroutine is one of goroutines.
func NewPoller(goroutines *sync.WaitGroup) *Poller { return &Poller{goroutines: goroutines} }

// Await has ready called, once and not by Await itself, when there is something to read
// from a socket, or it has ended or failed. Ready must not block: others wait for the same
// goroutine. It may be called for nothing. Await reports false if that is not possible.
//
// Whoever closes the socket calls Forget before. If somebody else may close it, or call
// it back from a read by a deadline, Await is of no use: it hears of neither.
func (p *Poller) Await(socket syscall.Conn, ready func()) (ok bool) {
	control(socket, func(fd uintptr) {
		p.mu.Lock()
		defer p.mu.Unlock()
		ok = p.add(int(fd), ready)
	})
	return ok
}

// control calls f with the descriptor of a socket, unless that is closed.
func control(socket syscall.Conn, f func(fd uintptr)) {
	if raw, err := socket.SyscallConn(); err == nil {
		raw.Control(f)
	}
}

// add has the kernel tell of a descriptor once. The caller holds p.mu.
func (p *Poller) add(fd int, ready func()) bool {
	if p.epoll == nil && !p.start() {
		return false
	}
	ok := false
	p.raw.Control(func(epoll uintptr) {
		ev := syscall.EpollEvent{Events: syscall.EPOLLIN | syscall.EPOLLRDHUP | syscall.EPOLLONESHOT, Fd: int32(fd)}
		err := syscall.EpollCtl(int(epoll), syscall.EPOLL_CTL_ADD, fd, &ev)
		if err == syscall.EEXIST { // it was waited for before
			err = syscall.EpollCtl(int(epoll), syscall.EPOLL_CTL_MOD, fd, &ev)
		}
		ok = err == nil
	})
	if ok {
		p.waiting[int32(fd)] = ready
	} else {
		p.stopIfIdle()
	}
	return ok
}

// start begins to wait. The caller holds p.mu.
func (p *Poller) start() bool {
	fd, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return false
	}
	syscall.SetNonblock(fd, true) // so that package os has it waited for, as any other descriptor
	f := os.NewFile(uintptr(fd), "epoll")
	raw, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // fails if the kernel does not wait for such a descriptor
	}
	if err != nil {
		f.Close()
		return false
	}
	p.epoll, p.raw, p.waiting = f, raw, make(map[int32]func())
	p.goroutines.Go(func() { p.run(raw) })
	return true
}

// stopIfIdle ends the goroutine if nobody waits. The caller holds p.mu.
func (p *Poller) stopIfIdle() {
	if p.epoll != nil && len(p.waiting) == 0 {
		p.epoll.Close()
		p.epoll, p.raw, p.waiting = nil, nil, nil
	}
}

// run waits until raw, an epoll(7) descriptor, is closed.
func (p *Poller) run(raw syscall.RawConn) {
	var events [64]syscall.EpollEvent
	var due [len(events)]func()
	n := 0
	wait := func(epoll uintptr) bool {
		n, _ = syscall.EpollWait(int(epoll), events[:], 0)
		return n > 0
	}
	for {
		if raw.Read(wait) != nil {
			p.giveUp(raw)
			return
		}
		for _, ready := range p.take(raw, events[:n], due[:0]) {
			ready()
		}
		clear(due[:])
	}
}

// take returns what is to be called for events, which nobody waits for any more then.
func (p *Poller) take(raw syscall.RawConn, events []syscall.EpollEvent, due []func()) []func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.raw != raw {
		return nil // it was closed meanwhile
	}
	for _, ev := range events {
		if ready := p.waiting[ev.Fd]; ready != nil {
			delete(p.waiting, ev.Fd)
			due = append(due, ready)
		}
	}
	p.stopIfIdle()
	return due
}

// giveUp has whoever still waits look for himself.
func (p *Poller) giveUp(raw syscall.RawConn) {
	p.mu.Lock()
	if p.raw != raw {
		p.mu.Unlock()
		return // it was closed because nobody does
	}
	waiting := p.waiting
	p.waiting = nil
	p.stopIfIdle()
	p.mu.Unlock()
	for _, ready := range waiting {
		ready()
	}
}

// Forget is the end of Await, if that was called, unless ready has been called or is
// about to be. It may wait for the goroutine of the Poller to be run.
func (p *Poller) Forget(socket syscall.Conn) {
	control(socket, func(fd uintptr) {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.waiting, int32(fd))
		p.stopIfIdle()
	})
}
