package slirp

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/hostio"
)

// UDP (RFC 768) in the stack: which flow a datagram belongs to, the relay between
// a flow and its host socket, and the connections of DialContext.

const (
	udpHeaderLen = 8
	maxUDPLength = 65535 // of header and data: the length field has 16 bits

	// What a flow holds for its host: while that is dialed, and behind a Write
	// that has not returned.
	dialQueueLen  = 16
	hostQueueLen  = 64
	hostQueueSize = 64 << 10

	// What a connection of DialContext holds until it is read.
	connQueueLen  = 256
	connQueueSize = 256 << 10

	// maxFailures is how often in a row a host socket may report what became of
	// the guest's datagrams: one that does nothing else is of no use.
	maxFailures = 16
)

// handleUDP takes a UDP packet.
func (s *Stack) handleUDP(ns uintptr, p *ipPacket, l *link) error {
	datagram, ok := udpDatagram(p.payload)
	if !ok {
		s.count(dropTruncated)
		return nil
	}
	key := flowKey{
		ns: ns, guest: p.src, host: p.dst, proto: protoUDP, version: p.version,
		guestPort: binary.BigEndian.Uint16(datagram), hostPort: binary.BigEndian.Uint16(datagram[2:]),
	}
	switch {
	case !checksumOK(p, datagram):
		s.count(dropChecksum)
		return nil
	case key.guestPort == 0 || key.hostPort == 0:
		s.count(dropPort)
		return nil
	case !p.src.isUnicast() || !p.dst.isUnicast():
		s.count(dropAddress)
		return nil
	}
	now := time.Now()
	data := datagram[udpHeaderLen:]
	for {
		if f, ok := s.lookup(&key).(*udpFlow); ok {
			if ok, err := f.handle(now, data, p, l); ok {
				return err
			}
			s.remove(&key, f)
		}
		err := s.openUDP(now, &key, data, p, l)
		if !errors.Is(err, ErrAddressInUse) {
			return err
		}
		// Another datagram of the flow was faster: this one goes the same way.
	}
}

// udpDatagram returns the header and data of the datagram in b, as long as its
// length field says: what is behind that is nobody's. A length of 0 is that of a
// jumbogram (RFC 2675 section 4), which no packet here can hold.
func udpDatagram(b []byte) (datagram []byte, ok bool) {
	if len(b) < udpHeaderLen {
		return nil, false
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if n < udpHeaderLen || n > len(b) {
		return nil, false
	}
	return b[:n], true
}

// openUDP begins a NAT flow with its first datagram: the host is dialed on a
// goroutine of its own. The error is ErrAddressInUse if there is a flow by now.
func (s *Stack) openUDP(now time.Time, key *flowKey, data []byte, p *ipPacket, l *link) error {
	f := s.newUDPFlow(key, l, now)
	f.keepQuote(p)
	f.enqueue(data)

	s.mu.Lock()
	err := s.insert(key, f)
	if err == nil && !s.beginDial(key.ns) {
		s.removeLocked(key, f)
		err = errTooManyDials
	}
	s.mu.Unlock()
	switch {
	case err == nil:
		s.learn(guestKey{key.ns, key.guest, uintptr(key.version)}, l)
		go f.run()
	case errors.Is(err, ErrTooManyFlows):
		s.count(dropTooManyFlows)
		return s.sendUnreachable(unreachableProhibited, p.raw, l)
	case errors.Is(err, errTooManyDials):
		s.count(dropPendingDials)
		return nil
	}
	return err
}

// udpFlow is one UDP flow: between a guest and a host socket, which one goroutine
// reads and which is written to on the packet path if that can be done without
// waiting; or between a guest and a connection of DialContext.
type udpFlow struct {
	stack *Stack
	key   flowKey
	conn  *datagramConn // of DialContext; nil for a NAT flow

	mu       sync.Mutex // guards what follows
	link     link
	learned  time.Time // when the guest's entry was last refreshed
	gone     bool      // the table forgets it: a datagram for it begins another flow
	emitting bool      // some goroutine hands frames to the Writer
	writable sync.Cond // on mu: emitting is false again

	// An ICMP error for the guest that waits while emitting is true.
	owes bool
	owed unreachable

	// NAT flows only.
	cancel   context.CancelFunc // ends the dial; nil before that
	host     net.Conn           // nil until it is dialed, and then fixed
	sender   *hostio.Sender     // writes to host without waiting; nil if that cannot be done
	queue    datagramQueue      // for host
	pumping  bool               // a goroutine writes the queue to host
	active   time.Time          // when a datagram last passed, either way
	timer    *time.Timer        // for UDPIdleTimeout
	failures int                // errors of host since the last datagram, either way
	quote    [maxQuote]byte     // the front of the guest's latest packet
	quoteLen int
}

// newUDPFlow returns a flow that is not in the table yet.
func (s *Stack) newUDPFlow(key *flowKey, l *link, now time.Time) *udpFlow {
	f := &udpFlow{stack: s, key: *key, link: *l, learned: now}
	f.writable.L = &f.mu
	return f
}

// Guest to host.

// handle takes a datagram of the guest. It reports false when the flow is gone.
// The error is that of the Writer for an ICMP error sent at once.
func (f *udpFlow) handle(now time.Time, data []byte, p *ipPacket, l *link) (ok bool, err error) {
	f.mu.Lock()
	if f.gone {
		f.mu.Unlock()
		return false, nil
	}
	f.link, f.active, f.failures = *l, now, 0
	// A connection of DialContext sends to where the guest is, even if that
	// speaks to others only: its entry is always the latest.
	learn := f.conn != nil || now.Sub(f.learned) >= learnEvery
	if learn {
		f.learned = now
	}
	direct := f.accept(data, p)
	f.mu.Unlock()
	if learn {
		f.stack.learn(guestKey{f.key.ns, f.key.guest, uintptr(f.key.version)}, l)
	}
	if direct {
		err = f.write(data)
	}
	return true, err
}

// accept queues a datagram of the guest, or reports that it is to be written to
// the host at once. The caller holds f.mu.
func (f *udpFlow) accept(data []byte, p *ipPacket) (direct bool) {
	if f.conn != nil {
		f.conn.deliver(data)
		return false
	}
	f.keepQuote(p)
	if f.sender != nil && !f.pumping {
		return true
	}
	f.enqueue(data)
	f.startPump()
	return false
}

// keepQuote remembers the guest's packet, for ICMP errors to quote.
func (f *udpFlow) keepQuote(p *ipPacket) {
	f.quoteLen = copy(f.quote[:], p.raw)
}

// enqueue keeps a datagram for the host, if there is room.
func (f *udpFlow) enqueue(data []byte) {
	limit := hostQueueLen
	if f.host == nil {
		limit = dialQueueLen
	}
	if !f.queue.push(data, limit, hostQueueSize) {
		f.stack.count(dropUDPQueue)
	}
}

// startPump has the queue written to the host. The caller holds f.mu.
func (f *udpFlow) startPump() {
	if f.host == nil || f.pumping || f.queue.empty() {
		return
	}
	f.pumping = true
	f.stack.goroutines.Add(1)
	go f.pump()
}

// pump writes what is queued to the host, and ends when there is nothing more.
func (f *udpFlow) pump() {
	defer f.stack.goroutines.Done()
	for {
		f.mu.Lock()
		data, ok := f.queue.pop()
		f.pumping = ok
		f.mu.Unlock()
		if !ok {
			return
		}
		f.writeWith(data, f.writeHost)
	}
}

func (f *udpFlow) writeHost(data []byte) error {
	_, err := f.host.Write(data)
	return err
}

// write sends a datagram to the host without waiting. The error is that of the
// Writer.
func (f *udpFlow) write(data []byte) error { return f.writeWith(data, f.sender.Send) }

// writeWith sends a datagram to the host. A socket tells what became of an
// earlier datagram in place of sending the next one, so that is tried again.
func (f *udpFlow) writeWith(data []byte, send func([]byte) error) error {
	err := send(data)
	if _, ok := datagramAnswer(err); ok {
		if again := send(data); again != nil {
			err = again
		}
	}
	if err == nil {
		return nil
	}
	err, alive := f.failed(err)
	if !alive {
		f.mu.Lock()
		f.finish()
	}
	return err
}

// datagramAnswer returns the ICMP error that tells a guest of an error of Allow,
// Dial or the host socket, if one does.
func datagramAnswer(err error) (kind unreachable, ok bool) {
	if err == nil {
		return 0, false
	}
	a := answerTo(err)
	if a == portRefused {
		return unreachablePort, true
	}
	return a.icmp()
}

// failed deals with an error of the host socket, and reports whether the flow
// lives on. The error it returns is that of the Writer.
func (f *udpFlow) failed(err error) (writer error, alive bool) {
	if kind, ok := datagramAnswer(err); ok {
		return f.report(kind), true
	}
	switch hostio.KindOf(err) {
	case hostio.TooLong:
		f.stack.count(dropUDPTooBig)
		return nil, true
	case hostio.Full:
		f.stack.count(dropUDPQueue)
		return nil, true
	}
	return nil, false
}

// The host socket.

// run is the goroutine of a NAT flow: it dials the host, and then reads from it.
func (f *udpFlow) run() {
	s := f.stack
	defer s.goroutines.Done()
	host, err := f.dial()

	f.mu.Lock()
	gone := f.gone
	if !gone && err == nil {
		f.host, f.sender = host, hostio.NewSender(host)
		f.active = time.Now()
		if s.cfg.UDPIdleTimeout > 0 {
			f.timer = time.AfterFunc(s.cfg.UDPIdleTimeout, f.onTimer)
		}
		f.startPump()
	}
	f.mu.Unlock()
	switch {
	case err == nil && !gone:
		s.log("flow opened", &f.key)
		f.readHost()
	case err == nil:
		host.Close()
	case !gone:
		s.log("flow refused", &f.key, "error", err)
		f.refuse(err)
	}
}

// dial opens the host's side under a context that ends with the flow.
func (f *udpFlow) dial() (net.Conn, error) {
	s := f.stack
	defer s.endDial(f.key.ns)
	flow := f.key.flow()
	ctx, cancel := s.context(flow)
	defer cancel()
	f.mu.Lock()
	f.cancel = cancel
	gone := f.gone
	f.mu.Unlock()
	if gone {
		return nil, ErrStackClosed
	}
	host, err := s.connect(ctx, flow)
	if c, ok := host.(*net.UDPConn); ok && err == nil && talksToItself(c) {
		c.Close()
		return nil, syscall.ECONNREFUSED
	}
	return host, err
}

// talksToItself reports whether a socket was given the very address that it is
// connected to, as may happen on the loopback address: nobody else has it then.
func talksToItself(c *net.UDPConn) bool {
	local, _ := c.LocalAddr().(*net.UDPAddr)
	remote, _ := c.RemoteAddr().(*net.UDPAddr)
	return local != nil && remote != nil && local.AddrPort() == remote.AddrPort()
}

// refuse ends a flow that could not be opened.
func (f *udpFlow) refuse(err error) {
	s := f.stack
	f.mu.Lock()
	f.finish()
	if answerTo(err) == silence {
		s.count(dropPolicy)
		return
	}
	s.count(flowsRefused)
	if kind, ok := datagramAnswer(err); ok {
		f.report(kind)
	}
}

// datagramBuffer has room for the header and data of any datagram.
type datagramBuffer [64 << 10]byte

var datagramBuffers = sync.Pool{New: func() any { return new(datagramBuffer) }}

// readHost moves datagrams from the host to the guest until the flow ends. A
// buffer is taken when there is something to read. (From a connection that is not
// a socket of the operating system, or where that cannot be waited for without
// memory, each flow holds one while it waits.)
func (f *udpFlow) readHost() {
	var b *datagramBuffer
	giveUp := func() {
		if b != nil {
			datagramBuffers.Put(b)
			b = nil
		}
	}
	r := hostio.NewReader(f.host,
		func() []byte {
			b = datagramBuffers.Get().(*datagramBuffer)
			return b[udpHeaderLen:maxUDPLength]
		},
		giveUp)
	for alive := true; alive; giveUp() {
		n, err := r.Read()
		if n > 0 || err == nil {
			alive = f.reply(b, n)
		}
		if err != nil && alive {
			alive = f.readFailed(err)
		}
	}
}

// reply sends the n bytes of data in b to the guest. It reports whether the flow
// lives on.
func (f *udpFlow) reply(b *datagramBuffer, n int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.emitting {
		f.writable.Wait()
	}
	if f.gone {
		return false
	}
	f.active, f.failures = time.Now(), 0
	if f.emit(b, n) == errDatagramTooLong {
		f.stack.count(dropUDPTooBig)
	}
	return true
}

// readFailed deals with an error of a read, and reports whether the flow lives on.
func (f *udpFlow) readFailed(err error) bool {
	f.mu.Lock()
	f.failures++
	over := f.gone || f.failures > maxFailures
	f.mu.Unlock()
	if !over {
		if _, alive := f.failed(err); alive {
			return true
		}
	}
	f.mu.Lock()
	f.finish()
	return false
}

// To the guest.

// emit sends the n bytes of data in b to the guest, as one frame or in fragments.
// The caller holds f.mu, which is released meanwhile, and nobody else is emitting.
func (f *udpFlow) emit(b *datagramBuffer, n int) error {
	f.emitting = true
	l := f.link
	f.mu.Unlock()

	s, be := f.stack, binary.BigEndian
	d := b[:udpHeaderLen+n]
	be.PutUint16(d, f.key.hostPort)
	be.PutUint16(d[2:], f.key.guestPort)
	be.PutUint16(d[4:], uint16(len(d)))
	mem := s.getSlab()
	err := emitDatagram(&l, f.key.version, protoUDP, f.key.host, f.key.guest, d, s.mtuTo(f.key.guestKey()), defaultHopLimit,
		func(n int) []byte {
			frame := mem.room(n)
			if s.cfg.ReuseFrames {
				return frame[:n:n]
			}
			return mem.cut(n)
		},
		func(frame []byte) error { return s.send(&l, frame) })
	s.putSlab(mem)

	f.mu.Lock()
	f.emitted()
	return err
}

// emitted ends emitting, after the ICMP error that is owed. The caller holds
// f.mu, which is released meanwhile.
func (f *udpFlow) emitted() (err error) {
	for f.owes {
		l, quote, kind := f.link, append([]byte(nil), f.quote[:f.quoteLen]...), f.owed
		f.owes = false
		f.mu.Unlock()
		err = f.stack.sendUnreachable(kind, quote, &l)
		f.mu.Lock()
	}
	f.emitting = false
	f.writable.Broadcast()
	return err
}

// report tells the guest that its latest packet did not arrive. It does not wait:
// if another goroutine hands frames to the Writer, that one sends this one too.
// The error is that of the Writer.
func (f *udpFlow) report(kind unreachable) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owes, f.owed = true, kind
	if f.emitting {
		return nil
	}
	f.emitting = true
	return f.emitted()
}

// The end of a flow.

// onTimer ends a flow that has been idle for UDPIdleTimeout. Datagrams leave the
// timer alone: it fires in vain then, and is set again.
func (f *udpFlow) onTimer() {
	f.mu.Lock()
	wait := f.stack.cfg.UDPIdleTimeout - time.Since(f.active)
	if !f.gone && wait > 0 {
		f.timer.Reset(wait)
		f.mu.Unlock()
		return
	}
	f.finish()
}

// finish ends the flow and has the table forget it. It is called with f.mu held
// and returns without it.
func (f *udpFlow) finish() {
	free := f.leave()
	f.mu.Unlock()
	f.stack.remove(&f.key, f)
	free()
}

// endSoon ends the flow. Its guest is told nothing: UDP has no word for it.
func (f *udpFlow) endSoon() {
	f.mu.Lock()
	free := f.leave()
	f.mu.Unlock()
	free()
}

// leave marks the flow as gone, wakes every waiter, and returns what frees the
// rest, to be called without a lock. The caller holds f.mu.
func (f *udpFlow) leave() (free func()) {
	if f.gone {
		return func() {}
	}
	f.gone = true
	f.queue = datagramQueue{}
	if f.timer != nil {
		f.timer.Stop()
	}
	if f.conn != nil {
		f.conn.readable.Broadcast()
	}
	f.writable.Broadcast()
	cancel, host := f.cancel, f.host
	return func() {
		if cancel != nil {
			cancel()
		}
		if host != nil {
			host.Close()
			f.stack.log("flow closed", &f.key)
		}
	}
}

// datagramQueue holds copies of datagrams, the oldest first. An empty one holds no
// memory.
type datagramQueue struct {
	list [][]byte
	size int // bytes in list
}

func (q *datagramQueue) empty() bool { return len(q.list) == 0 }

// push appends a copy of data, unless the queue would have more than so many
// datagrams or bytes then.
func (q *datagramQueue) push(data []byte, maxLen, maxSize int) bool {
	if len(q.list) >= maxLen || q.size+len(data) > maxSize {
		return false
	}
	q.list = append(q.list, append([]byte(nil), data...))
	q.size += len(data)
	return true
}

// pop takes the oldest datagram.
func (q *datagramQueue) pop() (data []byte, ok bool) {
	if len(q.list) == 0 {
		return nil, false
	}
	data = q.list[0]
	q.list[0] = nil
	q.list = q.list[1:]
	q.size -= len(data)
	if len(q.list) == 0 {
		q.list = nil
	}
	return data, true
}

// Connections of DialContext.

// dialUDP opens a UDP flow to a guest of namespace 0. No packet leaves: the guest
// hears of it with the first Write.
func (s *Stack) dialUDP(ctx context.Context, network, address string) (net.Conn, error) {
	key, l, err := s.dialTarget(ctx, network, address)
	key.proto = protoUDP
	if err == nil {
		f := s.newUDPFlow(&key, &l, time.Now())
		f.conn = &datagramConn{flow: f}
		f.conn.readable.L = &f.mu
		if err = s.insertDialedUDP(f); err == nil {
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
func (c *datagramConn) deliver(data []byte) {
	if !c.queue.push(data, connQueueLen, connQueueSize) {
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
		if data, ok := c.queue.pop(); ok {
			return copy(b, data), nil
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
	defer datagramBuffers.Put(d)
	copy(d[udpHeaderLen:], b)

	f.emitting = true
	f.mu.Unlock()
	l, ok := f.stack.linkTo(f.key.ns, f.key.guest.addr())
	f.mu.Lock()
	if ok {
		f.link = l
	}
	return f.emit(d, len(b))
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

var _ net.Conn = (*datagramConn)(nil)
