package slirp

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/tcp"
)

// The program's side of virtual flows: listeners on addresses that exist only in
// the stack, connections into the guest, VirtualConn for both, and datagramConn for
// UDP.

// listenKey is an address that a listener serves. The unspecified address stands
// for every address of its IP version.
type listenKey struct {
	addr    ipAddr
	port    uint16
	version uint16
}

// Listener accepts the connections of guests to a virtual address. It is a
// [net.Listener].
type Listener struct {
	stack   *Stack
	network string
	addr    net.TCPAddr
	keys    []listenKey

	// Guarded by stack.mu.
	closed   bool
	halfOpen []*tcpConn // whose handshake has not ended, the oldest first
	queue    []*tcpConn // that wait for Accept
	ready    sync.Cond
}

// Listen returns a listener for a virtual address, which serves the guests of
// every namespace. Network is "tcp", "tcp4" or "tcp6", address an IP and a port.
// The IP 0.0.0.0 or :: stands for every destination of its family, and none for
// every destination: "tcp" takes both families then. Port 0 picks a free one.
// An exact address goes before a wildcard. The error is [ErrNetworkUnsupported],
// [ErrAddressInUse], [ErrStackClosed], or one about the address.
func (s *Stack) Listen(network, address string) (net.Listener, error) {
	versions, err := networkVersions(network)
	if err != nil {
		return nil, err
	}
	addr, port, err := splitAddress(address, versions)
	if err != nil {
		return nil, err
	}
	l := &Listener{stack: s, network: network}
	l.ready.L = &s.mu
	if addr.IsValid() {
		l.addr.IP = addr.AsSlice()
		l.keys = []listenKey{{wildcardOr(addr), port, versionOf(addr)}}
	} else {
		for _, v := range versions {
			l.keys = append(l.keys, listenKey{version: v, port: port})
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return nil, ErrStackClosed
	}
	if port == 0 && !l.pickPort() || s.inUse(l.keys) {
		return nil, ErrAddressInUse
	}
	l.addr.Port = int(l.keys[0].port)
	for _, k := range l.keys {
		s.listeners[k] = l
	}
	return l, nil
}

// networkVersions returns the IP versions of a network name.
func networkVersions(network string) ([]uint16, error) {
	switch network {
	case "tcp":
		return []uint16{4, 6}, nil
	case "tcp4":
		return []uint16{4}, nil
	case "tcp6":
		return []uint16{6}, nil
	}
	return nil, ErrNetworkUnsupported
}

// splitAddress reads an IP, or none, and a port.
func splitAddress(address string, versions []uint16) (addr netip.Addr, port uint16, err error) {
	host, p, err := net.SplitHostPort(address)
	if err != nil {
		return addr, 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return addr, 0, &net.AddrError{Err: "invalid port", Addr: address}
	}
	if host == "" {
		return addr, uint16(n), nil
	}
	addr, err = netip.ParseAddr(host)
	if err != nil || addr.Zone() != "" {
		return addr, 0, &net.AddrError{Err: "not an IP address", Addr: address}
	}
	addr = addr.Unmap()
	if !slices.Contains(versions, versionOf(addr)) || addr.IsMulticast() {
		return addr, 0, &net.AddrError{Err: "no suitable address", Addr: address}
	}
	return addr, uint16(n), nil
}

// wildcardOr returns the key address of addr.
func wildcardOr(addr netip.Addr) ipAddr {
	if addr.IsUnspecified() {
		return ipAddr{}
	}
	return ipAddrFrom(addr)
}

// firstDynamicPort is where RFC 6335 section 6 begins the ports that are nobody's.
const firstDynamicPort = 49152

// pickPort gives the listener a free port. The caller holds stack.mu.
func (l *Listener) pickPort() bool {
	const n = 1<<16 - firstDynamicPort
	first := rand.IntN(n)
	for i := range n {
		for j := range l.keys {
			l.keys[j].port = uint16(firstDynamicPort + (first+i)%n)
		}
		if !l.stack.inUse(l.keys) {
			return true
		}
	}
	return false
}

// inUse reports whether a listener has one of the keys. The caller holds s.mu.
func (s *Stack) inUse(keys []listenKey) bool {
	return slices.ContainsFunc(keys, func(k listenKey) bool { return s.listeners[k] != nil })
}

// listenerFor returns the listener that serves the host end of a flow. The
// caller holds s.mu.
func (s *Stack) listenerFor(key *flowKey) *Listener {
	if l := s.listeners[listenKey{key.host, key.hostPort, key.version}]; l != nil {
		return l
	}
	return s.listeners[listenKey{ipAddr{}, key.hostPort, key.version}]
}

func (s *Stack) listening(key *flowKey) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.listenerFor(key) != nil
}

// openListener begins a flow to a listener. It reports false if there is none
// for the destination.
func (s *Stack) openListener(now moment, key *flowKey, seg *tcp.Segment, l *link, old *tcpConn) (done bool, err error) {
	if !s.listening(key) {
		return false, nil
	}
	c := s.newTCPConn(key, l, now)
	c.tcb = tcp.NewPassive(s.tcbConfig(key, now, old), now, seg)

	s.mu.Lock()
	ln := s.listenerFor(key)
	if ln == nil {
		s.mu.Unlock()
		return false, nil
	}
	evicted, ok := ln.admit(now, key.ns)
	if ok {
		err = s.insert(key, c)
		if err == nil {
			c.listener = ln
			ln.halfOpen = append(ln.halfOpen, c)
		}
	}
	s.mu.Unlock()
	if !ok {
		s.count(dropNoAcceptSlot)
		return true, nil
	}
	if evicted != nil {
		evicted.forget()
	}
	if err != nil {
		switch {
		case errors.Is(err, ErrTooManyFlows):
			s.count(dropTooManyFlows)
		case errors.Is(err, ErrStackClosed):
			return true, err
		}
		return true, nil // the guest sends the SYN again
	}
	c.mu.Lock()
	return true, c.flush(now)
}

// evictAfter is the age at which a half-open connection may make way for a new
// one: its SYN-ACK has been sent twice then.
const evictAfter = time.Second

// admit reports whether one more handshake may begin, and which one it replaces,
// if any. Every handshake has its place in the accept queue. The namespaces do not
// get into each other's way. The caller holds stack.mu.
func (l *Listener) admit(now moment, ns uintptr) (evict *tcpConn, ok bool) {
	cfg := &l.stack.cfg
	halfOpen, waiting := 0, 0
	for _, c := range l.halfOpen {
		if c.key.ns == ns {
			if halfOpen++; halfOpen == 1 {
				evict = c
			}
		}
	}
	for _, c := range l.queue {
		if c.key.ns == ns {
			waiting++
		}
	}
	if (cfg.Backlog < 0 || waiting+halfOpen < cfg.Backlog) && (cfg.MaxHalfOpen < 0 || halfOpen < cfg.MaxHalfOpen) {
		return nil, true
	}
	if evict == nil || now.Sub(evict.opened) < evictAfter {
		return nil, false
	}
	evict.leaveListener()
	return evict, true
}

// established moves a connection whose handshake has ended to the accept queue.
func (s *Stack) established(c *tcpConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := c.listener
	if l == nil || !slices.Contains(l.halfOpen, c) {
		return
	}
	c.leaveListener()
	c.listener = l
	l.queue = append(l.queue, c)
	s.count(flowsAccepted)
	l.ready.Signal()
}

// leaveListener takes c out of its listener, unless it waits for Accept with
// bytes that are still to be read. The caller holds stack.mu.
func (c *tcpConn) leaveListener() {
	l := c.listener
	if l == nil {
		return
	}
	is := func(x *tcpConn) bool { return x == c }
	if c.unread && slices.ContainsFunc(l.queue, is) {
		return
	}
	l.halfOpen = slices.DeleteFunc(l.halfOpen, is)
	l.queue = slices.DeleteFunc(l.queue, is)
	c.listener = nil
}

// Accept waits for the next connection, a [*VirtualConn]. After Close its error
// wraps [ErrListenerClosed].
func (l *Listener) Accept() (net.Conn, error) {
	s := l.stack
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(l.queue) == 0 {
		if l.closed {
			return nil, &net.OpError{Op: "accept", Net: l.network, Addr: l.Addr(), Err: ErrListenerClosed}
		}
		l.ready.Wait()
	}
	c := l.queue[0]
	l.queue = slices.Delete(l.queue, 0, 1)
	c.listener = nil
	return newVirtualConn(c), nil
}

// Close ends the listener: its address is free, Accept returns, handshakes are
// forgotten, and connections that nobody has accepted are reset. A second Close
// does nothing and returns nil.
func (l *Listener) Close() error {
	s := l.stack
	s.mu.Lock()
	if l.closed {
		s.mu.Unlock()
		return nil
	}
	l.closed = true
	for _, k := range l.keys {
		delete(s.listeners, k)
	}
	halfOpen, queue := l.halfOpen, l.queue
	l.halfOpen, l.queue = nil, nil
	for _, c := range slices.Concat(halfOpen, queue) {
		c.listener = nil
	}
	l.ready.Broadcast()
	s.mu.Unlock()
	for _, c := range halfOpen {
		c.forget()
	}
	for _, c := range queue {
		c.endSoon()
	}
	return nil
}

// Addr returns the address that the listener serves, a *net.TCPAddr.
func (l *Listener) Addr() net.Addr { return &l.addr }

// DialContext opens a connection from the stack to a guest of namespace 0.
// Network is "tcp", "tcp4", "tcp6", "udp", "udp4" or "udp6", address the IP and
// port of the guest. Frames go to where the guest last spoke, or to the longest
// route of [Stack.AddRoute]; without either the error is [ErrNoRoute]. The source
// is the stack's own address ([Config.Addresses]) of the family.
//
// With TCP the connection is a [*VirtualConn]. A guest that does not answer is
// given up after 255 s, or when ctx ends. With UDP it behaves as a connected
// [*net.UDPConn]: a Read and a Write is a datagram, those that wait to be read are
// bounded to 256 and 256 KiB, and an ICMP error of the guest is returned by the
// next call. It does not expire.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if strings.HasPrefix(network, "udp") {
		return s.dialUDP(ctx, network, address)
	}
	c, err := s.dialTCP(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (s *Stack) dialTCP(ctx context.Context, network, address string) (*VirtualConn, error) {
	key, l, err := s.dialTarget(ctx, network, address)
	key.proto = protoTCP
	var c *tcpConn
	if err == nil {
		now := s.now()
		c = s.newTCPConn(&key, &l, now)
		err = s.insertActive(c, now)
	}
	if err == nil {
		err = c.waitConnected(ctx)
	}
	if err == nil {
		return newVirtualConn(c), nil
	}
	fail := &net.OpError{Op: "dial", Net: network, Err: err}
	if to := key.guestEnd(); to.Port() != 0 {
		fail.Addr = net.TCPAddrFromAddrPort(to)
	}
	return nil, fail
}

// dialTarget reads the address of a guest of namespace 0. It returns the key of
// the flow that DialContext opens, all but its protocol and the stack's own port,
// and where its frames go.
func (s *Stack) dialTarget(ctx context.Context, network, address string) (key flowKey, l link, err error) {
	versions, err := networkVersions(strings.Replace(network, "udp", "tcp", 1))
	if err != nil {
		return key, l, net.UnknownNetworkError(network)
	}
	addr, port, err := splitAddress(address, versions)
	if err != nil {
		return key, l, err
	}
	if !addr.IsValid() || addr.IsUnspecified() || port == 0 {
		return key, l, &net.AddrError{Err: "no guest named", Addr: address}
	}
	key.guest, key.guestPort, key.version = ipAddrFrom(addr), port, versionOf(addr)
	if err := ctx.Err(); err != nil {
		return key, l, err
	}
	l, ok := s.linkTo(0, addr)
	own, haveOwn := s.cfg.address(key.version)
	key.host = own
	switch {
	case s.closed.Load():
		err = ErrStackClosed
	case !ok || !haveOwn:
		err = ErrNoRoute
	}
	return key, l, err
}

// insertActive enters c in the table under a free port of the stack's, which is
// not to be guessed (RFC 6056).
func (s *Stack) insertActive(c *tcpConn, now moment) error {
	const n = 1<<16 - firstDynamicPort
	first := rand.IntN(n)
	for i := range n {
		c.key.hostPort = uint16(firstDynamicPort + (first+i)%n)
		c.tcb = tcp.NewActive(s.tcbConfig(&c.key, now, nil), now)
		s.mu.Lock()
		err := s.insert(&c.key, c)
		s.mu.Unlock()
		if !errors.Is(err, ErrAddressInUse) {
			return err
		}
	}
	return ErrAddressInUse
}

// waitConnected sends the SYN, and waits until the guest has answered or ctx
// ends.
func (c *tcpConn) waitConnected(ctx context.Context) error {
	c.mu.Lock()
	c.flush(c.stack.now())
	stop := context.AfterFunc(ctx, func() {
		c.mu.Lock()
		c.writable.Broadcast()
		c.mu.Unlock()
	})
	defer stop()
	c.mu.Lock()
	for {
		switch state := c.tcb.State(); {
		case state == tcp.Closed && c.tcb.Reason() != tcp.None:
			err := reasonError("connect", c.tcb.Reason())
			if c.icmp != 0 {
				err = os.NewSyscallError("connect", c.icmp)
			}
			c.mu.Unlock()
			return err
		case state != tcp.SynSent && state != tcp.SynReceived:
			c.mu.Unlock()
			return nil
		}
		if err := ctx.Err(); err != nil {
			c.tcb.Abort()
			c.flush(c.stack.now())
			return err
		}
		c.writable.Wait()
	}
}

// icmpError takes what an ICMP error says of the segment that began at seq. Only
// one about a SYN that has no answer yet counts: it ends the dial (RFC 5461
// section 4.1, RFC 5927 section 6.1). It reports false for any other.
func (c *tcpConn) icmpError(kind unreachable, seq uint32) bool {
	c.mu.Lock()
	if c.tcb == nil || !c.tcb.Refuse(seq) {
		c.mu.Unlock()
		return false
	}
	c.icmp = kind.errno()
	c.flush(c.stack.now())
	return true
}

// reasonError returns the error of an operation on a connection that has ended.
func reasonError(op string, r tcp.Reason) error {
	switch r {
	case tcp.Reset:
		return os.NewSyscallError(op, syscall.ECONNRESET)
	case tcp.Refused:
		return os.NewSyscallError(op, syscall.ECONNREFUSED)
	case tcp.TimedOut:
		return os.NewSyscallError(op, syscall.ETIMEDOUT)
	}
	return net.ErrClosed
}

// VirtualConn is the program's end of a TCP connection with a guest. It is a
// [net.Conn] whose methods may be called concurrently, with the errors of a
// *net.TCPConn: [io.EOF] as it is, all others in a *[net.OpError].
type VirtualConn struct {
	flow *tcpConn

	// Guarded by flow.mu.
	closed      bool
	readClosed  bool
	writeClosed bool
	writing     bool // a Write is under way: the next waits
	linger      int  // as SetLinger has it; -1 by default
	read, write deadline
}

func newVirtualConn(c *tcpConn) *VirtualConn { return &VirtualConn{flow: c, linger: -1} }

// deadline is when waiting ends. It is guarded by the flow's lock.
type deadline struct {
	timer   *time.Timer
	expired bool
}

// set arms the deadline; at the time, cond is told. The caller holds cond.L.
func (d *deadline) set(t time.Time, cond *sync.Cond) {
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.expired = nil, false
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		d.expired = true
		cond.Broadcast()
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(wait, func() {
		cond.L.Lock()
		defer cond.L.Unlock()
		if d.timer == timer {
			d.expired = true
			cond.Broadcast()
		}
	})
	d.timer = timer
}

// Read reads what the guest has sent, and waits for it if there is nothing. It
// returns [io.EOF] when the guest has closed its side and everything was read.
func (c *VirtualConn) Read(b []byte) (int, error) {
	f := c.flow
	f.mu.Lock()
	for {
		if err := c.readError(); err != nil && (len(b) > 0 || c.closed) {
			f.mu.Unlock()
			return 0, c.opError("read", err)
		}
		if len(b) == 0 {
			f.mu.Unlock()
			return 0, nil
		}
		if n := f.tcb.Read(b); n > 0 {
			f.flushTurn(f.stack.now(), maxTurn)
			return n, nil
		}
		f.readable.Wait()
	}
}

// readError returns why nothing can be read, if so. The caller holds flow.mu.
func (c *VirtualConn) readError() error {
	t := c.flow.tcb
	switch {
	case c.closed:
		return net.ErrClosed
	case c.read.expired:
		return os.ErrDeadlineExceeded
	case t.Buffered() > 0:
		return nil
	case c.readClosed || t.EOF():
		return io.EOF
	case t.State() == tcp.Closed:
		return reasonError("read", t.Reason())
	}
	return nil
}

// Write queues b for the guest, and waits while the send buffer is full. An
// error comes with the number of bytes that were queued.
func (c *VirtualConn) Write(b []byte) (n int, err error) {
	f := c.flow
	f.mu.Lock()
	for c.writing && err == nil {
		if err = c.writeError(); err == nil {
			f.writable.Wait()
		}
	}
	if err != nil {
		f.mu.Unlock()
		return 0, c.opError("write", err)
	}
	c.writing = true
	for {
		if err = c.writeError(); err != nil {
			err = c.opError("write", err)
			break
		}
		m := f.tcb.Write(b[n:])
		if n += m; m > 0 {
			f.flush(f.stack.now())
			f.mu.Lock()
		}
		if n == len(b) {
			break
		}
		if m == 0 {
			f.writable.Wait()
		}
	}
	c.writing = false
	f.writable.Broadcast()
	f.mu.Unlock()
	return n, err
}

// writeError returns why nothing can be written, if so. The caller holds flow.mu.
func (c *VirtualConn) writeError() error {
	t := c.flow.tcb
	switch {
	case c.closed:
		return net.ErrClosed
	case c.write.expired:
		return os.ErrDeadlineExceeded
	case t.State() == tcp.Closed && t.Reason() != tcp.None:
		return reasonError("write", t.Reason())
	case c.writeClosed || t.State() == tcp.Closed:
		return os.NewSyscallError("write", syscall.EPIPE)
	}
	return nil
}

// Close closes the connection. What was written is still delivered, unless
// SetLinger says otherwise, or bytes from the guest were not read: then the
// guest is reset (RFC 2525 section 2.17).
func (c *VirtualConn) Close() error {
	f := c.flow
	f.mu.Lock()
	if c.closed {
		f.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	c.read.set(time.Time{}, &f.readable)
	c.write.set(time.Time{}, &f.writable)
	now := f.stack.now()
	switch {
	case c.linger == 0:
		f.tcb.Abort()
	case c.linger > 0:
		time.AfterFunc(time.Duration(c.linger)*time.Second, f.endLinger)
		fallthrough
	default:
		f.tcb.Close(now)
	}
	f.readable.Broadcast()
	f.writable.Broadcast()
	f.flush(now)
	return nil
}

// endLinger resets a closed connection that has not delivered everything in time.
func (c *tcpConn) endLinger() {
	c.mu.Lock()
	unsent := c.tcb.Unsent()
	c.mu.Unlock()
	if unsent {
		c.giveUp()
	}
}

// CloseRead ends reading: Read returns [io.EOF], and what the guest sends is
// thrown away.
func (c *VirtualConn) CloseRead() error {
	return c.shut("close", func() {
		c.readClosed = true
		c.flow.tcb.CloseRead()
	})
}

// CloseWrite ends writing: the guest sees the end of the data after the last
// byte, and may go on sending.
func (c *VirtualConn) CloseWrite() error {
	return c.shut("close", func() {
		c.writeClosed = true
		c.flow.tcb.CloseWrite()
	})
}

// shut does what f says under the flow's lock, and tells every waiter.
func (c *VirtualConn) shut(op string, do func()) error {
	f := c.flow
	f.mu.Lock()
	if c.closed {
		f.mu.Unlock()
		return c.opError(op, net.ErrClosed)
	}
	do()
	f.readable.Broadcast()
	f.writable.Broadcast()
	f.flushTurn(f.stack.now(), maxTurn)
	return nil
}

// SetLinger says what Close does with data that the guest has not acknowledged:
// by default, or with sec < 0, it is sent in the background; with 0 it is thrown
// away and the guest is reset; with sec > 0 that happens after as many seconds.
// Close never waits.
func (c *VirtualConn) SetLinger(sec int) error {
	c.flow.mu.Lock()
	defer c.flow.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	c.linger = sec
	return nil
}

// LocalAddr returns the virtual end of the connection, a *net.TCPAddr.
func (c *VirtualConn) LocalAddr() net.Addr { return net.TCPAddrFromAddrPort(c.flow.key.hostEnd()) }

// RemoteAddr returns the guest's end of the connection, a *net.TCPAddr.
func (c *VirtualConn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.flow.key.guestEnd()) }

// SetDeadline sets the read and write deadlines.
func (c *VirtualConn) SetDeadline(t time.Time) error { return c.setDeadline(t, true, true) }

// SetReadDeadline sets when Read fails with [os.ErrDeadlineExceeded], now and
// later; the zero time is never.
func (c *VirtualConn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, true, false) }

// SetWriteDeadline is SetReadDeadline for Write.
func (c *VirtualConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, false, true) }

func (c *VirtualConn) setDeadline(t time.Time, read, write bool) error {
	f := c.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if read {
		c.read.set(t, &f.readable)
	}
	if write {
		c.write.set(t, &f.writable)
	}
	return nil
}

// opError wraps an error as package net does.
func (c *VirtualConn) opError(op string, err error) error {
	if err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// Connections of DialContext.

// dialUDP opens a UDP flow to a guest of namespace 0. No packet leaves: the guest
// hears of it with the first Write.
func (s *Stack) dialUDP(ctx context.Context, network, address string) (net.Conn, error) {
	key, l, err := s.dialTarget(ctx, network, address)
	key.proto = protoUDP
	if err == nil {
		f := s.newUDPFlow(&key, &l, s.now())
		f.conn = &datagramConn{flow: f}
		f.conn.readable.L = &f.mu
		err = s.insertDialedUDP(f)
		for errors.Is(err, ErrTooManyFlows) && s.reclaimUDP(key.ns, f.active) {
			err = s.insertDialedUDP(f)
		}
		if err == nil {
			return f.conn, nil
		}
	}
	fail := &net.OpError{Op: "dial", Net: network, Err: err}
	if to := key.guestEnd(); to.Port() != 0 {
		fail.Addr = net.UDPAddrFromAddrPort(to)
	}
	return nil, fail
}

// insertDialedUDP enters f in the table under a free port of the stack's, which is
// not to be guessed (RFC 6056).
func (s *Stack) insertDialedUDP(f *udpFlow) error {
	const n = 1<<16 - firstDynamicPort
	first := rand.IntN(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range n {
		f.key.hostPort = uint16(firstDynamicPort + (first+i)%n)
		if err := s.insert(&f.key, f); !errors.Is(err, ErrAddressInUse) {
			return err
		}
	}
	return ErrAddressInUse
}

// icmpError takes what an ICMP error says of a datagram of the connection. It
// reports false if the flow is none of DialContext.
func (f *udpFlow) icmpError(kind unreachable) bool {
	if f.conn == nil {
		return false
	}
	f.mu.Lock()
	f.conn.failure = kind.errno()
	f.conn.readable.Broadcast()
	f.mu.Unlock()
	return true
}

// datagramConn is the program's end of a UDP flow with a guest. It is a [net.Conn]
// that behaves as a connected *net.UDPConn does.
type datagramConn struct {
	flow *udpFlow

	// Guarded by flow.mu.
	closed      bool
	readable    sync.Cond
	queue       datagramQueue
	failure     syscall.Errno // what an ICMP error said; 0: nothing
	read, write deadline
}

// deliver keeps a datagram of the guest for Read. The caller holds flow.mu.
func (c *datagramConn) deliver(d *datagram) {
	if !c.queue.push(d, connQueueLen, connQueueSize) {
		c.flow.stack.count(dropUDPQueue)
		return
	}
	c.readable.Broadcast()
}

// Read reads one datagram of the guest, and waits for it if there is none. What
// does not fit b is lost.
func (c *datagramConn) Read(b []byte) (int, error) {
	f := c.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		if err := c.usable("read", &c.read); err != nil {
			return 0, c.opError("read", err)
		}
		if len(b) == 0 {
			return 0, nil
		}
		if d, ok := c.queue.pop(); ok {
			return copy(b, d.data), nil
		}
		c.readable.Wait()
	}
}

// Write sends b to the guest as one datagram, and waits while another is given to
// the Writer, whose error it returns.
func (c *datagramConn) Write(b []byte) (int, error) {
	f := c.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		if err := c.usable("write", &c.write); err != nil {
			return 0, c.opError("write", err)
		}
		if !f.emitting {
			break
		}
		f.writable.Wait()
	}
	err := errDatagramTooLong
	if len(b) <= maxUDPLength-udpHeaderLen {
		err = c.send(b)
	}
	switch err {
	case nil:
		return len(b), nil
	case errDatagramTooLong:
		err = os.NewSyscallError("write", syscall.EMSGSIZE)
	}
	return 0, c.opError("write", err)
}

// send sends b to where the guest is now. The caller holds flow.mu, which is
// released meanwhile, and nobody else is emitting.
func (c *datagramConn) send(b []byte) error {
	f := c.flow
	d := datagramBuffers.Get().(*datagramBuffer)
	defer d.putBack(&datagramBuffers)
	d.add(copy(d.room(), b), netip.AddrPort{})

	f.emitting = true
	f.mu.Unlock()
	l, ok := f.stack.linkTo(f.key.ns, f.key.guest.addr())
	f.mu.Lock()
	if ok {
		f.link = l
	}
	if tooLong, err := f.emit(d); tooLong == 0 {
		return err
	}
	return errDatagramTooLong
}

// usable returns why nothing can be read or written, if so. What an ICMP error said
// is returned once. The caller holds flow.mu.
func (c *datagramConn) usable(op string, d *deadline) error {
	switch {
	case c.closed:
		return net.ErrClosed
	case c.flow.gone:
		return ErrStackClosed
	case d.expired:
		return os.ErrDeadlineExceeded
	case c.failure != 0:
		err := os.NewSyscallError(op, c.failure)
		c.failure = 0
		return err
	}
	return nil
}

// Close closes the connection. What was not read is thrown away.
func (c *datagramConn) Close() error {
	f := c.flow
	f.mu.Lock()
	if c.closed {
		f.mu.Unlock()
		return c.opError("close", net.ErrClosed)
	}
	c.closed = true
	c.queue = datagramQueue{}
	c.read.set(time.Time{}, &c.readable)
	c.write.set(time.Time{}, &f.writable)
	f.finish()
	return nil
}

// LocalAddr returns the stack's end of the flow, a *net.UDPAddr.
func (c *datagramConn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.flow.key.hostEnd()) }

// RemoteAddr returns the guest's end of the flow, a *net.UDPAddr.
func (c *datagramConn) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(c.flow.key.guestEnd()) }

// SetDeadline sets the read and write deadlines.
func (c *datagramConn) SetDeadline(t time.Time) error { return c.setDeadline(t, true, true) }

// SetReadDeadline sets when Read fails with [os.ErrDeadlineExceeded], now and
// later; the zero time is never.
func (c *datagramConn) SetReadDeadline(t time.Time) error { return c.setDeadline(t, true, false) }

// SetWriteDeadline is SetReadDeadline for Write.
func (c *datagramConn) SetWriteDeadline(t time.Time) error { return c.setDeadline(t, false, true) }

func (c *datagramConn) setDeadline(t time.Time, read, write bool) error {
	f := c.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.closed {
		return c.opError("set", net.ErrClosed)
	}
	if read {
		c.read.set(t, &c.readable)
	}
	if write {
		c.write.set(t, &f.writable)
	}
	return nil
}

// opError wraps an error as package net does.
func (c *datagramConn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "udp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

var (
	_ net.Listener = (*Listener)(nil)
	_ net.Conn     = (*VirtualConn)(nil)
	_ net.Conn     = (*datagramConn)(nil)
)
