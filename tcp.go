package slirp

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"time"

	"github.com/KarpelesLab/slirp/internal/hostio"
	"github.com/KarpelesLab/slirp/internal/tcp"
)

// TCP in the stack: which flow a segment belongs to, how a flow begins, and the
// relay between a flow and its host connection.

// handleTCP takes a TCP packet.
func (s *Stack) handleTCP(p *ipPacket, l *link, t *turn) error {
	var seg tcp.Segment
	switch {
	case !seg.Parse(p.payload):
		s.count(dropTruncated)
		return nil
	case !checksumOK(p, p.payload):
		s.count(dropChecksum)
		return nil
	case seg.SrcPort == 0 || seg.DstPort == 0:
		s.count(dropPort)
		return nil
	case !p.src.isUnicast() || !p.dst.isUnicast() || p.src == p.dst && seg.SrcPort == seg.DstPort:
		s.count(dropAddress)
		return nil
	}
	key := flowKey{l.ns, p.src, p.dst, seg.SrcPort, seg.DstPort, protoTCP, p.version}
	old := s.lookupTCP(&key)
	if old != nil {
		if ok, err := old.handle(&seg, p, l, t); ok {
			return err
		}
		s.remove(&key, old)
	}
	s.learn(guestKey{l.ns, p.src, uintptr(p.version)}, l)
	return s.handleNoFlow(t.now(s), &key, &seg, p, l, old)
}

// handleNoFlow takes a segment that belongs to no flow: LISTEN and CLOSED of RFC
// 9293 section 3.10.7. Old is the connection that it makes way for, if any.
func (s *Stack) handleNoFlow(now moment, key *flowKey, seg *tcp.Segment, p *ipPacket, l *link, old *tcpConn) error {
	switch seg.Flags & (tcp.SYN | tcp.ACK | tcp.RST | tcp.FIN) {
	case tcp.SYN:
		if done, err := s.openListener(now, key, seg, l, old); done {
			return err
		}
		return s.openHost(now, key, seg, p, l, old)
	case tcp.SYN | tcp.FIN, tcp.SYN | tcp.FIN | tcp.ACK:
		s.count(dropFlags)
		return nil
	}
	if seg.Flags&tcp.ACK == 0 && s.listening(key) {
		s.count(dropFlags)
		return nil
	}
	rst, ok := tcp.ResetFor(seg)
	if !ok {
		s.count(dropFlags)
		return nil
	}
	if !s.mayAnswer(key.ns, limitResets, now) {
		s.count(strayRateLimited)
		return nil
	}
	s.count(strayResets)
	return s.sendSegment(key, &rst, l)
}

// sendSegment sends a segment without data that no TCB has made.
func (s *Stack) sendSegment(key *flowKey, seg *tcp.Segment, l *link) error {
	hl := l.headerLen(key.version)
	frame := s.newFrame(hl + tcp.HeaderLen)
	seg.MarshalHeader(frame[hl:])
	finishFrame(frame, l, key.version, protoTCP, key.host, key.guest)
	return s.send(l, frame)
}

// tcbConfig returns the settings of a connection that begins now. The initial
// sequence number is that of RFC 6528 section 3, above that of the connection it
// replaces (RFC 6191). The timestamps begin at an offset that nobody can guess (RFC
// 7323 section 5.4), and go on where those of an older connection have stopped.
func (s *Stack) tcbConfig(key *flowKey, now moment, old *tcpConn) tcp.Config {
	b := make([]byte, 0, 128)
	b = append(b, s.isnSecret[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(key.ns))
	b = append(append(b, key.guest[:]...), key.host[:]...)
	b = binary.BigEndian.AppendUint16(b, key.guestPort)
	b = binary.BigEndian.AppendUint16(b, key.hostPort)
	b = binary.BigEndian.AppendUint16(b, key.version)
	h := sha256.Sum256(b)
	iss := binary.BigEndian.Uint32(h[:]) + uint32(now.Sub(s.isnEpoch)/(4*time.Microsecond))
	if old != nil {
		iss = old.above(iss)
	}
	cfg := tcp.Config{
		LocalPort: key.hostPort, RemotePort: key.guestPort,
		MSS: transportMSS(key.version, s.cfg.MTU), DefaultMSS: defaultMSS(key.version),
		PathMSS:    transportMSS(key.version, s.mtuTo(key.guestKey())),
		SendBuffer: s.cfg.SendBuffer, ReceiveBuffer: s.cfg.ReceiveBuffer,
		ISS: iss, TSOffset: binary.BigEndian.Uint32(h[4:]) + uint32(now.Sub(s.isnEpoch)/time.Millisecond),
	}
	if s.cfg.VirtioNetHeader {
		cfg.Offload = maxIPLength - ipHeaderLen(key.version) - tcp.MaxHeaderLen
	}
	if s.cfg.TCPIdleTimeout > 0 {
		cfg.KeepAlive = tcp.KeepAlive{Idle: s.cfg.TCPIdleTimeout, Interval: maintenanceInterval, Count: 3}
	}
	return cfg
}

// above returns iss, or a sequence number that the connection is far from using
// if that is higher.
func (c *tcpConn) above(iss uint32) uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tcb == nil {
		return iss
	}
	if floor := c.tcb.SendNext() + 1<<20; int32(iss-floor) < 0 {
		return floor
	}
	return iss
}

// maintenanceInterval is the time between the probes of a silent guest.
const maintenanceInterval = 5 * time.Second

// opening is a NAT flow whose host connection is not made yet.
type opening struct {
	syn    tcp.Segment // without payload: the guest sends it again
	packet []byte      // the front of the guest's packet, for ICMP errors to quote
	old    *tcpConn    // the connection that it makes way for, if any
	cancel context.CancelFunc
}

// maxQuote bounds what is kept of a packet that an ICMP error may be about.
const maxQuote = 128

func quoteOf(p *ipPacket) []byte {
	return append([]byte(nil), p.raw[:min(len(p.raw), maxQuote)]...)
}

// openHost begins a NAT flow: the host is dialed on a goroutine of its own, and
// the SYN is answered when that has ended.
func (s *Stack) openHost(now moment, key *flowKey, seg *tcp.Segment, p *ipPacket, l *link, old *tcpConn) error {
	c := s.newTCPConn(key, l, now)
	ctx, cancel := s.context(key.flow())
	c.opening = &opening{syn: *seg, packet: quoteOf(p), old: old, cancel: cancel}
	c.opening.syn.Payload = nil

	s.mu.Lock()
	err := s.insert(key, c)
	if err == nil && !s.beginDial(key.ns) {
		s.removeLocked(key, c)
		err = errTooManyDials
	}
	s.mu.Unlock()
	if err == nil {
		go c.run(ctx)
		return nil
	}
	cancel()
	switch {
	case errors.Is(err, ErrTooManyFlows):
		s.count(dropTooManyFlows)
		return s.sendUnreachable(unreachableProhibited, p.raw, l)
	case errors.Is(err, errTooManyDials):
		s.count(dropPendingDials) // the guest sends the SYN again
		return nil
	case errors.Is(err, ErrAddressInUse):
		return nil // another SYN was faster
	}
	return err
}

// errTooManyDials says that MaxPendingDials was reached.
var errTooManyDials = errors.New("too many dials in the namespace")

// handleOpening takes a segment while the host is dialed. It is called with c.mu
// held and returns without it.
func (c *tcpConn) handleOpening(seg *tcp.Segment, p *ipPacket) error {
	o := c.opening
	switch seg.Flags & (tcp.SYN | tcp.ACK | tcp.RST | tcp.FIN) {
	case tcp.SYN:
		// The same SYN again changes nothing; another one is the guest's new
		// attempt, for which the dial serves as well.
		if seg.Seq != o.syn.Seq {
			o.syn, o.packet = *seg, quoteOf(p)
			o.syn.Payload = nil
		}
	case tcp.RST, tcp.RST | tcp.ACK:
		if seg.Seq == o.syn.Seq || seg.Seq == o.syn.Seq+1 {
			c.gone = true
			c.mu.Unlock()
			o.cancel()
			c.stack.remove(&c.key, c)
			return nil
		}
	default:
		c.stack.count(dropFlags)
	}
	c.mu.Unlock()
	return nil
}

// run is the goroutine of a NAT flow: it dials the host, and then reads from it.
func (c *tcpConn) run(ctx context.Context) {
	s := c.stack
	defer s.goroutines.Done()
	host, err := s.connect(ctx, c.key.flow())
	s.endDial(c.key.ns)
	if err != nil {
		s.log(flowRefused, &c.key, "error", err)
	} else {
		s.log(flowOpened, &c.key)
	}
	now := c.stack.now()
	cfg := s.tcbConfig(&c.key, now, c.opening.old)

	c.mu.Lock()
	o := c.opening
	o.cancel()
	switch {
	case c.gone:
		c.mu.Unlock()
		if err == nil {
			host.Close()
		}
		return
	case err != nil:
		c.refuse(answerTo(err))
		return
	}
	c.opening, c.host, c.stream = nil, host, hostio.NewStream(host)
	c.tcb = tcp.NewPassive(cfg, now, &o.syn)
	c.tcb.UseMemory(c.memory)
	c.flush(now)
	c.readHost()
}

// connect asks Allow, and dials.
func (s *Stack) connect(ctx context.Context, f Flow) (net.Conn, error) {
	if s.cfg.Allow != nil {
		if err := s.cfg.Allow(ctx, f); err != nil {
			return nil, err
		}
	}
	host, err := s.cfg.Dial(ctx, f.Network, f.Destination.String())
	switch {
	case err != nil:
		return nil, err
	case host == nil:
		return nil, errors.New("Dial returned neither a connection nor an error")
	}
	s.count(flowsDialed)
	return host, nil
}

// answer is what a guest is told of a flow that could not be opened.
type answer uint8

const (
	silence     answer = iota
	tcpReset           // to TCP; silence to UDP
	portRefused        // a reset to TCP, port unreachable to UDP
	hostUnreachable
	netUnreachable
	prohibited
)

// answerTo chooses the answer to an error of Allow, Dial or a host socket.
func answerTo(err error) answer {
	if errors.Is(err, ErrDrop) {
		return silence
	}
	if errors.Is(err, ErrProhibited) {
		return prohibited
	}
	var dns *net.DNSError
	if errors.As(err, &dns) && dns.IsNotFound {
		return hostUnreachable
	}
	switch hostio.KindOf(err) {
	case hostio.Refused:
		return portRefused
	case hostio.HostUnreachable:
		return hostUnreachable
	case hostio.NetUnreachable:
		return netUnreachable
	case hostio.Prohibited:
		return prohibited
	}
	return tcpReset
}

// icmp returns the ICMP error that says the same, if there is one.
func (a answer) icmp() (unreachable, bool) {
	switch a {
	case hostUnreachable:
		return unreachableHost, true
	case netUnreachable:
		return unreachableNet, true
	case prohibited:
		return unreachableProhibited, true
	}
	return 0, false
}

// refuse ends a flow that is opening. It is called with c.mu held and returns
// without it.
func (c *tcpConn) refuse(a answer) {
	s, o, l := c.stack, c.opening, c.link
	c.gone = true
	c.mu.Unlock()
	o.cancel()
	s.remove(&c.key, c)
	if a == silence {
		s.count(dropPolicy)
		return
	}
	s.count(flowsRefused)
	if kind, ok := a.icmp(); ok {
		s.sendUnreachable(kind, o.packet, &l)
		return
	}
	if rst, ok := tcp.ResetFor(&o.syn); ok {
		s.sendSegment(&c.key, &rst, &l)
	}
}

// Host to guest.

const (
	minRead = 4 << 10 // bytes lent to the first read from the host
	maxRead = 256 << 10
)

// readHost moves bytes from the host connection to the guest until either ends.
// It waits while the send buffer is full, so a slow guest slows the host. The
// buffer is lent to each read, as long as the last ones made use of it, and only
// while there is something to read.
func (c *tcpConn) readHost() {
	size, lent, starved := minRead, 0, false
	r := hostio.NewReader(c.host,
		func() []byte {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.lull.end()
			p := c.tcb.Reserve(size)
			lent, starved = len(p), len(p) == 0
			return p
		},
		func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.tcb.Commit(0)
			if c.stream.OK() && c.lull.begin(c.stack) {
				c.setTimer(c.stack.now())
			}
		})
	for c.waitWritable() {
		starved = false
		n, err := r.Read()
		c.mu.Lock()
		c.tcb.Commit(n)
		if starved && c.tcb.State() != tcp.Closed {
			c.mu.Unlock()
			continue // other flows have just taken the memory
		}
		switch {
		case n == lent:
			size = min(2*size, maxRead)
		case n < lent/4:
			size = max(size/2, minRead)
		}
		if c.calledBack && errors.Is(err, os.ErrDeadlineExceeded) {
			c.rest()
			return
		}
		if err != nil {
			c.hostEnded(err)
			return
		}
		c.flush(c.stack.now())
	}
}

// rest is the end of a goroutine that onTimer has called back: from here on the flow
// is one of many that the poller waits for. Where that is not possible, or where somebody
// else may close host, which the poller would not hear of, a fresh goroutine waits for it.
// It is called with c.mu held and returns without it.
func (c *tcpConn) rest() {
	s := c.stack
	c.mu.Unlock()
	c.host.SetReadDeadline(time.Time{})
	c.mu.Lock()
	c.calledBack = false
	c.lull.end()
	resting := s.ownDial && !c.gone && s.await(c.host, c.hostReadable)
	c.mu.Unlock()
	if !resting {
		s.goroutines.Go(c.awaitHost)
	}
}

// hostReadable is the end of a rest.
func (c *tcpConn) hostReadable() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.gone {
		c.stack.goroutines.Go(c.readHost)
	}
}

// awaitHost goes on as readHost as soon as there is something to read. Until then it
// takes no more than the smallest of stacks, and no memory of readHost's.
func (c *tcpConn) awaitHost() {
	err := c.stream.AwaitRead()
	if err != nil {
		c.mu.Lock()
		c.hostEnded(err)
		return
	}
	c.readHost()
}

// waitWritable waits until the guest's send buffer has room. It reports false
// when nothing can be sent any more.
func (c *tcpConn) waitWritable() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.gone && c.tcb.Free() == 0 && c.tcb.State() != tcp.Closed {
		if c.stream.OK() && c.lookAt == 0 {
			now := c.stack.now()
			c.lookAt = now.Add(lookInterval)
			c.setTimer(now)
		}
		c.readWaits = true
		c.writable.Wait()
		c.readWaits = false
	}
	return !c.gone
}

// lookInterval is the time between two looks at a host that is not read from.
const lookInterval = 2 * time.Second

// lookAtHost looks at what the reader of host waits for, when it is time. It reports
// whether the reader is to be called back. It is called with c.mu held.
func (c *tcpConn) lookAtHost(now moment) (rest bool) {
	if c.lookAt == 0 || now < c.lookAt {
		return false
	}
	c.probeHost()
	if c.readWaits {
		c.lookForFailure(now)
		return false
	}
	return c.lull.look(now)
}

// probeHost has the host asked now and then whether it is still there, which no read or
// write may tell for long: the guest's own probes are answered here. A short connection
// does without. It is called with c.mu held.
func (c *tcpConn) probeHost() {
	if c.stack.ownDial && !c.probed {
		c.probed = true
		hostio.KeepAlive(c.host)
	}
}

// lookForFailure has a flow end whose host has failed while nothing is read from it, for
// want of room: only a guest that takes what is there would have it read otherwise. It
// is called with c.mu held, so that nobody reads meanwhile: the error that it finds is
// told once, and a read would take what follows for the end of the data.
func (c *tcpConn) lookForFailure(now moment) {
	if c.stream.Failure() != nil {
		c.readDone = true
		c.tcb.Abort()
		return
	}
	c.lookAt = now.Add(lookInterval)
}

// hostEnded tells the guest that the host's side has ended: with a FIN after the
// last byte, or with a reset if it failed. It is called with c.mu held and
// returns without it.
func (c *tcpConn) hostEnded(err error) {
	c.readDone = true
	if c.lookAt == 0 { // a look has the host probed
		c.lookAt = c.stack.now().Add(idleAfter)
	}
	if (err == io.EOF || c.closedWhole) && !c.writeErr {
		c.tcb.CloseWrite()
	} else {
		// What was read goes first, as far as the window allows.
		for c.ending = true; c.emitting && !c.gone; {
			c.writable.Wait()
		}
		c.flush(c.stack.now())
		c.mu.Lock()
		c.tcb.Abort()
	}
	done := c.writeDone
	c.flush(c.stack.now())
	if done {
		c.host.Close()
	}
}

// Guest to host.

// Bytes that the guest has not pushed wait for more: one write to a socket costs as
// much as the copying of many segments. RFC 9293 section 3.9.1.2 has that a receiver
// passes data on "without waiting for more" when it was pushed.
//
// What is written makes one packet of the host's: Linux puts no more than 65,160 bytes
// into one for a network card with an MTU of 1500, and 65,483 for the loopback interface.
// A few bytes more are a packet of their own, for which the other end wakes up twice. So
// the segment that ends the wait has to fit in as well. Of segments that are nearly as long
// as such a packet two are written at once.
const (
	holdBytes = 62 << 10         // are written whatever comes
	holdTime  = time.Millisecond // for which fewer are held
)

// holds returns how many bytes of a guest are written whatever comes.
func (cfg *Config) holds() int {
	hold := holdBytes
	if cfg.MTU > hold/2 {
		hold *= 2
	}
	return min(hold, cfg.ReceiveBuffer/4)
}

// toDeliver reports whether the caller is to call deliver, for which it then has the
// right. It is called with c.mu held.
func (c *tcpConn) toDeliver(now moment) bool {
	n := c.tcb.Buffered()
	if c.host == nil || c.pumping || c.writeDone || c.gone || n == 0 && !c.tcb.EOF() {
		return false
	}
	if !c.tcb.Pushed() && n < c.stack.cfg.holds() && c.stream.OK() {
		switch {
		case c.heldUntil == 0:
			c.heldUntil = now.Add(holdTime)
			return false
		case now < c.heldUntil:
			return false
		}
	}
	c.pumping, c.heldUntil = true, 0
	c.stack.goroutines.Add(1)
	return true
}

// maxDeliver bounds what deliver writes: other goroutines may bring more meanwhile.
const maxDeliver = 256 << 10

// deliver writes the bytes of the guest to the host: here, as far as that does not
// wait, and else on a goroutine.
func (c *tcpConn) deliver() {
	for left := maxDeliver; left > 0 && c.stream.OK(); {
		p := c.nextForHost()
		if len(p) == 0 {
			c.stack.goroutines.Done()
			return
		}
		p = p[:min(len(p), left)]
		n, err := c.stream.Write(p)
		c.wrote(n, err)
		left -= max(n, maxDeliver/64) // many crumbs cost as much
		if n < len(p) && err == nil {
			break
		}
	}
	go c.pump()
}

// pump writes what the guest has sent to the host, as much at a time as there
// is, and ends when there is nothing more: an idle flow has no goroutine for it.
func (c *tcpConn) pump() {
	defer c.stack.goroutines.Done()
	for p := c.nextForHost(); len(p) > 0; p = c.nextForHost() {
		n, err := c.host.Write(p)
		c.wrote(n, err)
	}
}

// wrote takes the outcome of a write to the host. What the host has taken opens the
// guest's window.
func (c *tcpConn) wrote(n int, err error) {
	c.mu.Lock()
	c.written += int64(n)
	c.tcb.Discard(n)
	if err != nil {
		c.hostFailed()
	}
	c.flushTurn(c.stack.now(), maxTurn)
}

// nextForHost lends what is to be written to the host next. When there is
// nothing, the pump is over, and the host is told if that was all.
func (c *tcpConn) nextForHost() []byte {
	c.mu.Lock()
	if p := c.tcb.Peek(); len(p) > 0 && !c.writeDone {
		c.mu.Unlock()
		return p
	}
	c.tcb.Discard(0)
	c.pumping = false
	end := c.tcb.EOF() && !c.writeDone
	half, canHalf := c.host.(interface{ CloseWrite() error })
	if end {
		c.writeDone = true
		c.closedWhole = !canHalf
	}
	readDone, gone := c.readDone, c.gone
	if gone {
		c.tcb.Release()
	}
	c.mu.Unlock()
	switch {
	case end && canHalf && !readDone:
		half.CloseWrite()
	case end:
		c.host.Close()
	}
	if gone {
		c.stack.drained(c)
	}
	return nil
}

// failGrace is how long a host that takes no more bytes may go on to send some.
const failGrace = time.Second

// hostFailed is what becomes of a flow whose host takes no more bytes: the guest
// is reset, so that it does not believe them delivered, but gets what the host
// had said before. It is called with c.mu held.
func (c *tcpConn) hostFailed() {
	c.writeErr, c.writeDone = true, true
	if c.readDone {
		c.tcb.Abort()
		return
	}
	c.tcb.CloseRead()
	time.AfterFunc(failGrace, c.giveUp)
}

// startReset has the host connection reset, once. It is called with c.mu held.
func (c *tcpConn) startReset() {
	if c.host == nil || c.resetting {
		return
	}
	c.resetting = true
	c.stack.goroutines.Go(c.resetHost)
}

// resetHost resets the host connection, as the guest's side was. It has a
// goroutine of its own: what Dial has returned may block.
func (c *tcpConn) resetHost() {
	if c.stack.ownDial {
		c.stack.forget(c.host)
	}
	if h, ok := c.host.(interface{ SetLinger(int) error }); ok {
		h.SetLinger(0)
	}
	c.host.Close()
}
