package slirp

import (
	"bytes"
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/hostio"
)

// UDP (RFC 768) in the stack: which flow a datagram belongs to, and the relay
// between a flow and its host socket. What is different with UDPMappingEndpoint is
// at the end; the connections of DialContext are in listener.go.

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

	// briefIdle is how long a flow to port 53 may be idle once it is answered,
	// and how long one without an answer must have been idle before it makes
	// way for a new one.
	//
	// RFC 4787 REQ-5 (a): "For specific destination ports in the well-known port
	// range (ports 0-1023), a NAT MAY have shorter UDP mapping timers".
	briefIdle = 10 * time.Second
	portDNS   = 53
)

// handleUDP takes a UDP packet.
func (s *Stack) handleUDP(p *ipPacket, l *link, t *turn) error {
	datagram, ok := udpDatagram(p.payload)
	if !ok {
		s.count(dropTruncated)
		return nil
	}
	key := flowKey{
		ns: l.ns, guest: p.src, host: p.dst, proto: protoUDP, version: p.version,
		guestPort: binary.BigEndian.Uint16(datagram), hostPort: binary.BigEndian.Uint16(datagram[2:]),
	}
	switch {
	case !checksumOK(p, datagram):
		s.count(dropChecksum)
		return nil
	case key.guestPort == 0 || key.hostPort == 0:
		s.count(dropPort)
		return nil
	case !p.src.isUnicast() || !p.dst.isUnicast() || p.src == p.dst && key.guestPort == key.hostPort:
		s.count(dropAddress)
		return nil
	}
	now := t.now(s)
	data := datagram[udpHeaderLen:]
	for {
		if f := s.lookupUDP(&key); f != nil {
			if ok, err := f.handle(now, &key, data, p, l, t); ok {
				return err
			}
			s.remove(&f.key, f)
		}
		err := s.openUDP(now, &key, data, p, l)
		if !errors.Is(err, ErrAddressInUse) {
			return err
		}
		// There is a flow by now: this datagram goes its way.
	}
}

// lookupUDP finds the flow of a datagram: that of its two ends, else the mapping
// of the guest's end.
func (s *Stack) lookupUDP(key *flowKey) *udpFlow {
	f, _ := s.lookup(key).(*udpFlow)
	if f == nil && s.cfg.UDPMapping == UDPMappingEndpoint {
		m := key.mapping()
		f, _ = s.lookup(&m).(*udpFlow)
	}
	return f
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
// goroutine of its own. The error is ErrAddressInUse if there is a flow that the
// datagram is still to be given to.
func (s *Stack) openUDP(now moment, key *flowKey, data []byte, p *ipPacket, l *link) error {
	var f *udpFlow
	var err error
	endpoint := s.cfg.UDPMapping == UDPMappingEndpoint
	if endpoint {
		m := key.mapping()
		f = s.newUDPFlow(&m, l, now)
		f.mapping = newUDPMapping(f)
		err = s.insertUDP(f, now, false)
	} else {
		f = s.newUDPFlow(key, l, now)
		f.keepQuote(p.raw)
		f.enqueue(&datagram{data: data})
		err = s.insertUDP(f, now, true)
	}
	switch {
	case err == nil:
		s.learn(guestKey{key.ns, key.guest, uintptr(key.version)}, l)
		if endpoint {
			return ErrAddressInUse
		}
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

// insertUDP enters a NAT flow in the table, and counts a dial if it begins with
// one. In a namespace that is full a flow without an answer makes way.
func (s *Stack) insertUDP(f *udpFlow, now moment, dial bool) error {
	for {
		s.mu.Lock()
		err := s.insert(&f.key, f)
		if err == nil && dial && !s.beginDial(f.key.ns) {
			s.removeLocked(&f.key, f)
			err = errTooManyDials
		}
		if err == nil {
			f.unanswered = s.account(f.key.ns).unanswered.PushBack(f)
		}
		s.mu.Unlock()
		if !errors.Is(err, ErrTooManyFlows) || !s.reclaimUDP(f.key.ns, now) {
			return err
		}
	}
}

// maxReclaim bounds the flows that are looked at for one that makes way.
const maxReclaim = 8

// reclaimUDP ends the oldest UDP flow of a namespace that is idle and was never
// answered. It reports false if there is none: flows that were answered stay, and
// those that may be answered yet.
func (s *Stack) reclaimUDP(ns uintptr, now moment) bool {
	for range maxReclaim {
		f := s.oldestUnanswered(ns)
		if f == nil {
			return false
		}
		f.mu.Lock()
		if !f.gone && !f.answered && now.Sub(f.active) >= briefIdle {
			s.count(flowsReclaimed)
			free := f.leave()
			s.goroutines.Go(free) // what Dial has returned may block
			f.mu.Unlock()
			s.remove(&f.key, f)
			return true
		}
		f.mu.Unlock()
	}
	return false
}

// oldestUnanswered returns the first flow of a namespace that may make way, and
// has it wait for its turn again.
func (s *Stack) oldestUnanswered(ns uintptr) *udpFlow {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.accounts[ns]
	if a == nil || a.unanswered.Len() == 0 {
		return nil
	}
	e := a.unanswered.Front()
	a.unanswered.MoveToBack(e)
	return e.Value.(*udpFlow)
}

// keep takes f from the flows that may make way.
func (s *Stack) keep(f *udpFlow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed.Load() {
		s.keepLocked(f)
	}
}

// keepLocked is keep for a caller that holds s.mu.
func (s *Stack) keepLocked(f *udpFlow) {
	if f.unanswered != nil {
		s.account(f.key.ns).unanswered.Remove(f.unanswered)
		f.unanswered = nil
	}
}

// udpFlow is one UDP flow: between a guest and a host socket, which one goroutine
// reads unless the flow rests, and which is written to on the packet path if that can
// be done without waiting; or between a guest and a connection of DialContext; or all
// that a guest sends from one port, if that has a mapping.
type udpFlow struct {
	stack   *Stack
	key     flowKey
	conn    *datagramConn // of DialContext; nil for a NAT flow
	mapping *udpMapping   // of UDPMappingEndpoint; otherwise nil

	// Guarded by Stack.mu: its element of account.unanswered. Nil if it does not
	// make way for others.
	unanswered *list.Element

	mu       sync.Mutex // guards what follows
	link     link
	learned  moment    // when the guest's entry was last refreshed
	gone     bool      // the table forgets it: a datagram for it begins another flow
	emitting bool      // some goroutine hands frames to the Writer
	writable sync.Cond // on mu: emitting is false again

	// An ICMP error for the guest that waits while emitting is true.
	owes bool
	owed unreachable

	// NAT flows only.
	cancel   context.CancelFunc // ends the dial; nil before that
	host     net.Conn           // nil until it is dialed, and then fixed; always nil with a mapping
	sender   *hostio.Sender     // writes to the host without waiting; nil if that cannot be done
	queue    datagramQueue      // for the host
	pumping  bool               // a goroutine writes the queue to the host
	active   moment             // when a datagram last passed, either way; with a mapping, to the host
	answered bool               // a datagram of the host has passed
	rests    bool               // while the host is silent no goroutine waits for it
	lull                        // with rests
	timer    *time.Timer        // for the idle timeout, and lookAt; nil if there is neither
	failures int                // errors of host since the last datagram, either way
	alone    atomic.Bool        // the host's system does not take several datagrams at once
	quote    [maxQuote]byte     // the front of the guest's latest packet, or of what owed is about
	quoteLen int
}

// newUDPFlow returns a flow that is not in the table yet.
func (s *Stack) newUDPFlow(key *flowKey, l *link, now moment) *udpFlow {
	f := &udpFlow{stack: s, key: *key, link: *l, learned: now, active: now}
	f.writable.L = &f.mu
	return f
}

// Guest to host.

// handle takes a datagram of the guest, whose ends are those of key. It reports
// false when the flow is gone. The error is that of the Writer for an ICMP error
// sent at once.
func (f *udpFlow) handle(now moment, key *flowKey, data []byte, p *ipPacket, l *link, t *turn) (ok bool, err error) {
	f.mu.Lock()
	if t != nil && t.burst.f == f && f.pumping {
		// This datagram takes another way: those before it must not come behind it.
		f.mu.Unlock()
		err = t.burst.send()
		t.time = 0
		now = t.now(f.stack)
		f.mu.Lock()
	}
	if f.gone {
		f.mu.Unlock()
		return false, err
	}
	f.link, f.failures = *l, 0
	// A connection of DialContext sends to where the guest is, even if that
	// speaks to others only: its entry is always the latest.
	learn := f.conn != nil || now.Sub(f.learned) >= learnEvery
	if learn {
		f.learned = now
	}
	d := datagram{data: data}
	front := p.raw[:min(len(p.raw), maxQuote)]
	var begin *destination
	var direct bool
	if f.mapping != nil {
		d.to, d.quote = key.hostEnd(), front
		begin, direct = f.mapping.accept(now, &d)
	} else {
		f.active = now
		direct = f.accept(&d, p)
	}
	f.mu.Unlock()
	if learn {
		f.stack.learn(guestKey{f.key.ns, f.key.guest, uintptr(f.key.version)}, l)
	}
	switch {
	case begin != nil:
		f.mapping.begin(begin)
	case direct && t != nil:
		d.quote = front
		sent, e := t.burst.add(f, &d)
		t.silent = !sent
		if err == nil {
			err = e
		}
	case direct:
		err = f.writeWith(d, (*udpFlow).trySend)
	}
	return true, err
}

// burst is datagrams that go from one flow to one host with one system call: most of
// the cost of a datagram is that of a call, not of its bytes.
type burst struct {
	f      *udpFlow
	data   []byte // of all of them
	size   int    // of each, but the last may be shorter
	to     netip.AddrPort
	quotes [][]byte // of each, the front of its packet; memory is used again
}

// maxBurst bounds the bytes of a burst, which have to fit into one packet of IP.
const maxBurst = 60 << 10

// add takes a datagram that is to be written to the host. Those before it are sent first
// if it may not follow them. The error is that of the Writer, about one of those.
func (b *burst) add(f *udpFlow, d *datagram) (sent bool, err error) {
	if b.f != nil && !b.fits(f, d) {
		sent, err = true, b.send()
	}
	if b.f == nil {
		b.f, b.size, b.to = f, len(d.data), d.to
	}
	b.data = append(b.data, d.data...)
	n := len(b.quotes)
	b.quotes = slices.Grow(b.quotes, 1)[:n+1]
	b.quotes[n] = append(b.quotes[n][:0], d.quote...)
	return sent, err
}

// fits reports whether a datagram may follow those that are there.
func (b *burst) fits(f *udpFlow, d *datagram) bool {
	n := len(b.data)
	return b.f == f && b.to == d.to && f.sender.Segments() && !f.alone.Load() &&
		b.size > 0 && n%b.size == 0 && 0 < len(d.data) && len(d.data) <= b.size &&
		n < hostio.MaxSegments*b.size && n+len(d.data) <= maxBurst
}

// send writes the datagrams to the host. If that cannot be done with all of them, one
// by one: an error is about one of them.
func (b *burst) send() (first error) {
	f, data, quotes := b.f, b.data, b.quotes
	if f == nil {
		return nil
	}
	b.f, b.data, b.quotes = nil, data[:0], quotes[:0]
	if len(quotes) > 1 {
		var done bool
		if done, first = b.sendTogether(f, data, quotes[0]); done {
			return first
		}
	}
	for _, quote := range quotes {
		n := min(b.size, len(data))
		d := datagram{data: data[:n], to: b.to, quote: quote}
		if err := f.writeWith(d, (*udpFlow).trySend); err != nil && first == nil {
			first = err
		}
		data = data[n:]
	}
	return first
}

// sendTogether writes several datagrams to the host, and reports whether it could. As
// with one of them, a socket that is connected may tell what became of an earlier one
// first: the guest hears of that here, unless it hears it again of one of these.
func (b *burst) sendTogether(f *udpFlow, data, quote []byte) (done bool, writer error) {
	err := f.sender.SendSegments(data, b.size, b.to)
	var earlier error
	_, answer := datagramAnswer(err)
	if answer && f.mapping == nil {
		earlier, err = err, f.sender.SendSegments(data, b.size, b.to)
		if _, answer = datagramAnswer(err); !answer {
			writer, _ = f.failed(earlier, quote)
		}
	}
	if err != nil && !answer && hostio.KindOf(err) != hostio.Full {
		f.alone.Store(true)
	}
	return err == nil, writer
}

// accept queues a datagram of the guest, or reports that it is to be written to
// the host at once. The caller holds f.mu.
func (f *udpFlow) accept(d *datagram, p *ipPacket) (direct bool) {
	if f.conn != nil {
		f.conn.deliver(d)
		return false
	}
	f.keepQuote(p.raw)
	return f.forward(d)
}

// forward queues a datagram for the host, or reports that it is to be written to
// it at once. The caller holds f.mu.
func (f *udpFlow) forward(d *datagram) (direct bool) {
	if f.sender != nil && !f.pumping {
		return true
	}
	f.enqueue(d)
	f.startPump()
	return false
}

// keepQuote remembers the front of a packet of the guest, for ICMP errors to quote.
func (f *udpFlow) keepQuote(raw []byte) {
	f.quoteLen = copy(f.quote[:], raw)
}

// enqueue keeps a datagram for the host, if there is room.
func (f *udpFlow) enqueue(d *datagram) {
	limit := hostQueueLen
	if !f.connected() {
		limit = dialQueueLen
	}
	if !f.queue.push(d, limit, hostQueueSize) {
		f.stack.count(dropUDPQueue)
	}
}

// connected reports whether there is a host socket. The caller holds f.mu.
func (f *udpFlow) connected() bool {
	return f.host != nil || f.mapping != nil && f.mapping.conn != nil
}

// startPump has the queue written to the host. The caller holds f.mu.
func (f *udpFlow) startPump() {
	if !f.connected() || f.pumping || f.queue.empty() {
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
		d, ok := f.queue.pop()
		f.pumping = ok
		f.mu.Unlock()
		if !ok {
			return
		}
		f.writeWith(d, (*udpFlow).send)
	}
}

// send sends a datagram to the host.
func (f *udpFlow) send(d datagram) (err error) {
	if f.mapping != nil {
		_, err = f.mapping.conn.WriteTo(d.data, net.UDPAddrFromAddrPort(d.to))
	} else {
		_, err = f.host.Write(d.data)
	}
	return err
}

// trySend sends a datagram to the host without waiting.
func (f *udpFlow) trySend(d datagram) error {
	if f.mapping != nil {
		return f.sender.SendTo(d.data, d.to)
	}
	return f.sender.Send(d.data)
}

// writeWith sends a datagram to the host. A socket that is connected tells what
// became of an earlier datagram in place of sending the next one, so that is tried
// again. The error is that of the Writer.
func (f *udpFlow) writeWith(d datagram, send func(*udpFlow, datagram) error) error {
	err := send(f, d)
	if _, ok := datagramAnswer(err); ok && f.mapping == nil {
		if again := send(f, d); again != nil {
			err = again
		}
	}
	if err == nil {
		return nil
	}
	writer, alive := f.failed(err, d.quote)
	switch {
	case alive:
	case f.mapping != nil && !errors.Is(err, net.ErrClosed):
		f.stack.count(dropUDPHost) // the fault of one destination
	default:
		f.mu.Lock()
		f.finish()
	}
	return writer
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
// lives on. Quote is the packet it is about; empty: the guest's latest. The error it
// returns is that of the Writer.
func (f *udpFlow) failed(err error, quote []byte) (writer error, alive bool) {
	if kind, ok := datagramAnswer(err); ok {
		return f.report(kind, quote), true
	}
	switch hostio.KindOf(err) {
	case hostio.TooLong:
		f.stack.count(dropUDPTooBig)
		return f.report(unreachableTooBig, quote), true
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
		f.own(s.ownDial)
		f.active = f.stack.now()
		f.schedule(f.active)
		f.startPump()
	}
	f.mu.Unlock()
	switch {
	case err == nil && !gone:
		s.log(flowOpened, &f.key)
		f.readHost()
	case err == nil:
		host.Close()
	case !gone:
		s.log(flowRefused, &f.key, "error", err)
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
		f.report(kind, nil)
	}
}

// received is a datagram for the guest, n bytes from off on in a datagramBuffer.
type received struct {
	off, n int
	from   netip.AddrPort // with a mapping only
}

// datagramBuffer holds datagrams for the guest, one behind the other, with room for a
// header in front of each: those before it are gone by the time it is needed.
type datagramBuffer struct {
	mem  []byte
	list []received // in mem
}

// maxDatagram is the room that each read needs: no datagram has more data.
const maxDatagram = maxUDPLength - udpHeaderLen

// A burst buffer takes as much as fits into a packet, and then a datagram of any length.
var (
	datagramBuffers = sync.Pool{New: func() any { return newDatagramBuffer(64 << 10) }}
	burstBuffers    = sync.Pool{New: func() any { return newDatagramBuffer(128 << 10) }}
)

func newDatagramBuffer(n int) *datagramBuffer { return &datagramBuffer{mem: make([]byte, n)} }

// putBack empties a buffer and puts it back to where it is from.
func (b *datagramBuffer) putBack(pool *sync.Pool) {
	b.list = b.list[:0]
	pool.Put(b)
}

// room returns the memory for the next datagram: none if one of any length might not fit,
// or there are as many as one frame may hold.
func (b *datagramBuffer) room() []byte {
	end := b.end()
	if n := len(b.list); n == hostio.MaxSegments || n > 0 && end-udpHeaderLen+b.list[n-1].n > maxTogether || len(b.mem)-end < maxDatagram {
		return nil
	}
	return b.mem[end:][:maxDatagram]
}

// add notes the datagram of n bytes at the front of room.
func (b *datagramBuffer) add(n int, from netip.AddrPort) {
	b.list = append(b.list, received{b.end(), n, from})
}

// end returns where the next datagram begins.
func (b *datagramBuffer) end() int {
	if n := len(b.list); n > 0 {
		return b.list[n-1].off + b.list[n-1].n
	}
	return udpHeaderLen
}

// own prepares the socket of a flow if nobody else has it. The caller holds f.mu.
func (f *udpFlow) own(nobodyElse bool) {
	c, ok := f.socket().(*net.UDPConn)
	if !ok || !nobodyElse {
		return
	}
	c.SetReadBuffer(hostBurst) // or what the system has otherwise
	f.rests = f.stack.poller != nil
}

// hostBurst is how many bytes of the host may wait in a socket while the guest's frames are
// written. Linux takes twice of it, for the memory around each datagram. What it has
// otherwise, some 200 KiB with that memory, is no more than 90 datagrams of 1,400 bytes: a
// host that sends 2 Gbit/s, and looks at its clock each millisecond, sends 180 at once.
const hostBurst = 256 << 10

// socket returns the host's side of a flow that has one.
func (f *udpFlow) socket() interface {
	SetReadDeadline(time.Time) error
	Close() error
} {
	if f.mapping != nil {
		return f.mapping.conn
	}
	return f.host
}

// newReader returns what reads from the host.
func (f *udpFlow) newReader(lend func() []byte, giveUp func()) *hostio.Reader {
	if f.mapping != nil {
		return hostio.NewPacketReader(f.mapping.conn, lend, giveUp)
	}
	return hostio.NewReader(f.host, lend, giveUp)
}

// readHost moves datagrams from the host to the guest until the flow ends, or rests. A
// buffer is taken when there is something to read. (From a connection that is not
// a socket of the operating system, or where that cannot be waited for without
// memory, each flow holds one while it waits.)
func (f *udpFlow) readHost() {
	var b *datagramBuffer
	var waited bool
	pool := &datagramBuffers
	giveUp := func() {
		if b != nil {
			b.putBack(pool)
			b = nil
		}
	}
	r := f.newReader(
		func() []byte {
			f.hostSpeaks()
			b = pool.Get().(*datagramBuffer)
			return b.room()
		},
		func() {
			waited = true
			giveUp()
			f.hostSilent()
		})
	if r.Bursts() {
		pool = &burstBuffers
	}
	// Where a datagram comes alone, to look for another would cost it a system call.
	for alive, several := true, false; alive; giveUp() {
		waited = false
		n, err := r.Read()
		if n > 0 || err == nil {
			b.add(n, r.From())
			if err == nil && (several || !waited) {
				err = b.fill(r)
			}
			several = !waited || len(b.list) > 1
			alive = f.reply(b)
		}
		switch {
		case err == nil || !alive:
		case f.isCalledBack(err):
			alive = !f.rest()
		default:
			alive = f.readFailed(err)
		}
	}
}

// hostSpeaks notes that there may be something to read.
func (f *udpFlow) hostSpeaks() {
	f.mu.Lock()
	f.lull.end()
	f.mu.Unlock()
}

// hostSilent notes that there is nothing to read.
func (f *udpFlow) hostSilent() {
	f.mu.Lock()
	if f.rests && f.lull.begin(f.stack) {
		f.schedule(f.stack.now())
	}
	f.mu.Unlock()
}

// isCalledBack reports whether an error of a read is what callBack has it return.
func (f *udpFlow) isCalledBack(err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calledBack && errors.Is(err, os.ErrDeadlineExceeded)
}

// rest is the end of a goroutine that was called back: from here on the flow is one of
// many that the poller waits for. It reports false if it cannot be: the goroutine goes on.
func (f *udpFlow) rest() bool {
	f.socket().SetReadDeadline(time.Time{})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calledBack = false
	f.lull.end()
	if f.gone {
		return true
	}
	f.rests = f.stack.await(f.socket(), f.hostReadable)
	return f.rests
}

// hostReadable is the end of a rest.
func (f *udpFlow) hostReadable() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.gone {
		f.stack.goroutines.Go(f.readHost)
	}
}

// fill reads the datagrams that are there as far as there is room. The error is that of
// the socket behind them.
func (b *datagramBuffer) fill(r *hostio.Reader) error {
	for room := b.room(); room != nil; room = b.room() {
		n, ok, err := r.More(room)
		if !ok {
			return err
		}
		b.add(n, r.From())
	}
	return nil
}

// reply sends datagrams to the guest, in the name of who sent them if there is a
// mapping. It reports whether the flow lives on.
func (f *udpFlow) reply(b *datagramBuffer) bool {
	f.mu.Lock()
	now := f.stack.now()
	if f.mapping != nil && !f.gone && !f.filter(now, b) {
		f.mu.Unlock()
		return true
	}
	for f.emitting {
		f.writable.Wait()
	}
	if f.gone {
		f.mu.Unlock()
		return false
	}
	f.failures = 0
	if f.mapping == nil {
		f.active = now
	}
	first := !f.answered
	if first {
		f.answered = true
		f.schedule(now)
	}
	tooLong, _ := f.emit(b)
	f.stack.counters[dropUDPTooBig].Add(uint64(tooLong))
	f.mu.Unlock()
	if first {
		f.stack.keep(f)
	}
	return true
}

// filter drops the datagrams that the mapping does not let pass, and reports whether
// there are others. The caller holds f.mu.
func (f *udpFlow) filter(now moment, b *datagramBuffer) bool {
	pass := b.list[:0]
	for _, d := range b.list {
		if f.mapping.admits(now, d.from) {
			pass = append(pass, d)
		} else {
			f.stack.count(dropUDPFilter)
		}
	}
	b.list = pass
	return len(pass) > 0
}

// readFailed deals with an error of a read, and reports whether the flow lives on.
// A socket that is not connected does not tell which datagram an error is about,
// so the guest is told of none.
func (f *udpFlow) readFailed(err error) bool {
	f.mu.Lock()
	f.failures++
	over := f.gone || f.failures > maxFailures
	f.mu.Unlock()
	if !over {
		_, known := datagramAnswer(err)
		if known && f.mapping != nil {
			return true
		}
		if _, alive := f.failed(err, nil); alive {
			return true
		}
	}
	f.mu.Lock()
	f.finish()
	return false
}

// To the guest.

// emit sends datagrams to the guest, in the name of who sent them if there is a mapping:
// each as one frame or in fragments, or several in a frame. It returns how many are too
// long for that, and the first error of the Writer. The caller holds f.mu, which is
// released meanwhile, and nobody else is emitting.
func (f *udpFlow) emit(b *datagramBuffer) (tooLong int, err error) {
	f.emitting = true
	s := f.stack
	e := emission{stack: s, link: f.link, mem: s.getSlab()}
	stale := f.stack.now().Sub(f.learned) >= learnEvery
	f.mu.Unlock()

	if stale {
		e.link = s.presentLink(f.key.guestKey(), e.link)
	}
	mtu := s.mtuTo(f.key.guestKey())
	for list := b.list; len(list) > 0; {
		n := 1
		if s.cfg.VirtioNetUSO {
			n = together(list, mtu-ipHeaderLen(f.key.version)-udpHeaderLen)
		}
		if n > 1 {
			f.emitTogether(&e, b, list[:n])
		} else if f.emitOne(&e, b, &list[0], mtu) == errDatagramTooLong {
			tooLong++
		}
		list = list[n:]
	}
	err = e.end()

	f.mu.Lock()
	f.emitted()
	return tooLong, err
}

// ends writes the ports of a datagram to the guest, and returns where it comes from.
func (f *udpFlow) ends(header []byte, d *received) (from ipAddr) {
	from, port := f.key.host, f.key.hostPort
	if f.mapping != nil {
		from, port = ipAddrFrom(d.from.Addr()), d.from.Port()
	}
	binary.BigEndian.PutUint16(header, port)
	binary.BigEndian.PutUint16(header[2:], f.key.guestPort)
	return from
}

// emitOne sends a datagram as one frame or in fragments.
func (f *udpFlow) emitOne(e *emission, b *datagramBuffer, d *received, mtu int) error {
	datagram := b.mem[d.off-udpHeaderLen : d.off+d.n]
	from := f.ends(datagram, d)
	binary.BigEndian.PutUint16(datagram[4:], uint16(len(datagram)))
	return emitDatagram(&e.link, f.key.version, protoUDP, from, f.key.guest, datagram, mtu, defaultHopLimit, &e.stack.fragmentID, e.alloc, e.emit)
}

// emitTogether sends several datagrams as one frame, which the guest's side cuts.
func (f *udpFlow) emitTogether(e *emission, b *datagramBuffer, list []received) {
	first, last := &list[0], &list[len(list)-1]
	data := b.mem[first.off : last.off+last.n]
	hl := e.link.headerLen(f.key.version)
	frame := e.alloc(hl + udpHeaderLen + len(data))
	copy(frame[hl+udpHeaderLen:], data)
	from := f.ends(frame[hl:], first)
	binary.BigEndian.PutUint16(frame[hl+4:], uint16(udpHeaderLen+len(data)))
	finishDatagrams(frame, &e.link, f.key.version, from, f.key.guest, first.n)
	e.emit(frame)
}

// together returns how many of the first datagrams may be in one frame: those that are as
// long as each other and behind each other, and one that is shorter. One alone may have
// any length; those of several have up to size bytes.
func together(list []received, size int) int {
	first := list[0]
	if first.n == 0 || first.n > size {
		return 1
	}
	n, end := 1, first.off+first.n
	for _, d := range list[1:] {
		if d.n == 0 || d.n > first.n || d.off != end || d.from != first.from || end+d.n-first.off > maxTogether {
			break
		}
		n, end = n+1, end+d.n
		if d.n < first.n {
			break
		}
	}
	return n
}

// maxTogether bounds the data of the datagrams in one frame, for either family.
const maxTogether = maxIPLength - ipv6HeaderLen - udpHeaderLen

// emission is frames on their way to a Writer: one by one, or if it is a BatchWriter
// together.
type emission struct {
	stack *Stack
	link  link
	mem   *slab
	err   error // the first one
}

// alloc returns memory for a frame that is emitted next.
func (e *emission) alloc(n int) []byte {
	if len(e.mem.free) < n {
		e.flush()
		e.mem.grow(n)
	}
	return e.mem.free[:n:n]
}

// emit sends the frame of the last alloc.
func (e *emission) emit(frame []byte) (err error) {
	e.mem.cut(len(frame))
	if e.link.batch == nil {
		err = e.flush()
	}
	return err
}

// flush hands the frames to the Writer.
func (e *emission) flush() error {
	if len(e.mem.frames) == 0 {
		return nil
	}
	err := e.stack.sendAll(&e.link, e.mem.frames)
	if err != nil && e.err == nil {
		e.err = err
	}
	e.mem.sent(e.stack.cfg.ReuseFrames)
	return err
}

// end sends what is left, and returns the first error of the Writer.
func (e *emission) end() error {
	e.flush()
	e.stack.putSlab(e.mem)
	return e.err
}

// emitted ends emitting, after the ICMP error that is owed. The caller holds
// f.mu, which is released meanwhile.
func (f *udpFlow) emitted() (err error) {
	for f.owes {
		l, quote, kind, host := f.link, append([]byte(nil), f.quote[:f.quoteLen]...), f.owed, f.host
		f.owes = false
		f.mu.Unlock()
		if kind == unreachableTooBig {
			err = f.stack.sendTooBig(quote, hostio.PathMTU(host), &l)
		} else {
			err = f.stack.sendUnreachable(kind, quote, &l)
		}
		f.mu.Lock()
	}
	f.emitting = false
	f.writable.Broadcast()
	return err
}

// report tells the guest that a packet did not arrive: the one that quote is the
// front of, or its latest if that is nil. It does not wait: if another goroutine
// hands frames to the Writer, that one sends this one too. The error is that of the
// Writer.
func (f *udpFlow) report(kind unreachable, quote []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.owes, f.owed = true, kind
	if len(quote) > 0 {
		f.keepQuote(quote)
	}
	if f.emitting {
		return nil
	}
	f.emitting = true
	return f.emitted()
}

// The end of a flow.

// idleTimeout returns how long the flow may be idle; negative: for ever. The caller
// holds f.mu.
func (f *udpFlow) idleTimeout() time.Duration {
	t := f.stack.cfg.UDPIdleTimeout
	dns := f.key.hostPort == portDNS
	if f.mapping != nil {
		dns = !f.mapping.notDNS
	}
	if dns && f.answered && (t < 0 || t > briefIdle) {
		return briefIdle
	}
	return t
}

// schedule sets the timer for when the flow has been idle for too long, or its reader is
// to be looked at. The caller holds f.mu.
func (f *udpFlow) schedule(now moment) {
	at := f.lookAt // which is soon
	if t := f.idleTimeout(); at == 0 && t >= 0 {
		at = f.active.Add(t)
	}
	if f.gone || at == 0 {
		return
	}
	wait := at.Sub(now)
	if f.timer == nil {
		f.timer = time.AfterFunc(wait, f.onTimer)
	} else {
		f.timer.Reset(wait)
	}
}

// onTimer ends a flow that has been idle for too long, or has it rest. Datagrams leave
// the timer alone: it fires in vain then, and is set again.
func (f *udpFlow) onTimer() {
	f.mu.Lock()
	now := f.stack.now()
	if t := f.idleTimeout(); f.gone || t >= 0 && now.Sub(f.active) >= t {
		f.finish()
		return
	}
	rest := f.lookAt != 0 && now >= f.lookAt && f.look(now)
	f.schedule(now)
	f.mu.Unlock()
	if rest {
		callBack(f.socket())
	}
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
	cancel, connected, rests := f.cancel, f.connected(), f.rests
	if f.mapping != nil {
		cancel = f.mapping.leave()
	}
	return func() {
		if cancel != nil {
			cancel()
		}
		if rests {
			f.stack.forget(f.socket())
		}
		if connected {
			f.socket().Close()
			f.stack.log(flowClosed, &f.key)
		}
	}
}

// datagram is one datagram of a guest.
type datagram struct {
	data []byte

	// With a mapping only.
	to    netip.AddrPort
	quote []byte // the front of its packet, for ICMP errors to quote
}

// datagramQueue holds copies of datagrams, the oldest first. An empty one holds no
// memory.
type datagramQueue struct {
	list []datagram
	size int // bytes of data in list
}

func (q *datagramQueue) empty() bool { return len(q.list) == 0 }

// push appends a copy of d, unless the queue would have more than so many datagrams
// or bytes then.
func (q *datagramQueue) push(d *datagram, maxLen, maxSize int) bool {
	if len(q.list) >= maxLen || q.size+len(d.data) > maxSize {
		return false
	}
	q.list = append(q.list, datagram{data: bytes.Clone(d.data), to: d.to, quote: bytes.Clone(d.quote)})
	q.size += len(d.data)
	return true
}

// pop takes the oldest datagram.
func (q *datagramQueue) pop() (d datagram, ok bool) {
	if len(q.list) == 0 {
		return d, false
	}
	d = q.list[0]
	q.list[0] = datagram{}
	q.list = q.list[1:]
	q.size -= len(d.data)
	if len(q.list) == 0 {
		q.list = nil
	}
	return d, true
}

// UDPMappingEndpoint: one host socket for all that a guest sends from one address
// and port. RFC 4787 section 4.1 (REQ-1, the mapping), section 4.3 (REQ-6, what
// keeps it) and section 5 (REQ-8, who may answer).

// maxDestinations bounds the destinations of one mapping. The one that the guest has
// not sent to for the longest time makes way.
const maxDestinations = 256

// udpMapping is the host's side of a udpFlow that stands for every destination of
// one guest address and port. Guarded by flow.mu, but what never changes.
type udpMapping struct {
	flow *udpFlow

	// conn is nil until a destination is allowed, and then fixed: for a guest that
	// may go nowhere no socket is opened. Opening says that a goroutine is at it.
	conn    net.PacketConn
	opening bool

	destinations map[netip.AddrPort]*destination
	recent       list.List          // of *destination that are allowed; last, where the guest sent to last
	peers        map[netip.Addr]int // how many of recent have the address: those that may send
	notDNS       bool               // a destination had another port than 53
}

// destination is where a guest sends to through a mapping.
type destination struct {
	at     netip.AddrPort
	place  *list.Element      // in recent; nil until Allow has let it pass
	last   moment             // when the guest sent to it last; valid with place
	queue  datagramQueue      // until it is allowed and there is a socket
	cancel context.CancelFunc // ends Allow; nil before and after that
}

func newUDPMapping(f *udpFlow) *udpMapping {
	return &udpMapping{
		flow:         f,
		destinations: make(map[netip.AddrPort]*destination),
		peers:        make(map[netip.Addr]int),
	}
}

// mapping returns the key of the mapping that a flow goes through.
func (k *flowKey) mapping() flowKey {
	m := *k
	m.host, m.hostPort = ipAddr{}, 0
	return m
}

// keyTo returns the key of the flow to a destination.
func (m *udpMapping) keyTo(at netip.AddrPort) flowKey {
	key := m.flow.key
	key.host, key.hostPort = ipAddrFrom(at.Addr()), at.Port()
	return key
}

// accept queues a datagram of the guest, or reports that it is to be written to the
// host at once. If it returns a destination, begin is to be called for that. The
// caller holds flow.mu.
func (m *udpMapping) accept(now moment, d *datagram) (begin *destination, direct bool) {
	f, s := m.flow, m.flow.stack
	m.expire(now)
	to := m.destinations[d.to]
	isNew := to == nil
	if isNew {
		if len(m.destinations) >= maxDestinations && !m.forgetOldest() {
			s.count(dropPendingDials)
			return nil, false
		}
		to = &destination{at: d.to}
		m.destinations[d.to] = to
		if s.cfg.Allow == nil {
			m.admit(now, to)
		}
	}
	if to.place != nil {
		to.last, f.active = now, now
		m.recent.MoveToBack(to.place)
		if m.conn != nil {
			return nil, f.forward(d)
		}
	}
	if !to.queue.push(d, dialQueueLen, hostQueueSize) {
		s.count(dropUDPQueue)
	}
	if isNew && (to.place == nil || m.opens()) {
		return to, false
	}
	return nil, false
}

// opens reports that there is no host socket, and that the caller is the one to open
// it. The caller holds flow.mu.
func (m *udpMapping) opens() bool {
	if m.conn != nil || m.opening {
		return false
	}
	m.opening = true
	return true
}

// admit has a destination take part: datagrams go there, and its address may send.
// The caller holds flow.mu.
func (m *udpMapping) admit(now moment, to *destination) {
	to.place, to.last, to.cancel = m.recent.PushBack(to), now, nil
	m.peers[to.at.Addr()]++
	m.flow.active = now
	m.notDNS = m.notDNS || to.at.Port() != portDNS
}

// admits reports whether a datagram from there is for the guest: it has sent to that
// address, whatever the port. "If application transparency is most important, it is
// RECOMMENDED that a NAT have an "Endpoint-Independent Filtering" behavior. If a more
// stringent filtering behavior is most important, it is RECOMMENDED that a NAT have an
// "Address-Dependent Filtering" behavior" (RFC 4787 REQ-8). The caller holds flow.mu.
func (m *udpMapping) admits(now moment, from netip.AddrPort) bool {
	m.expire(now)
	return m.peers[from.Addr().Unmap().WithZone("")] > 0
}

// expire forgets the destinations that the guest has not sent to for
// UDPIdleTimeout. The caller holds flow.mu.
func (m *udpMapping) expire(now moment) {
	timeout := m.flow.stack.cfg.UDPIdleTimeout
	if timeout < 0 || m.conn == nil {
		return
	}
	for e := m.recent.Front(); e != nil; e = m.recent.Front() {
		to := e.Value.(*destination)
		if now.Sub(to.last) < timeout {
			return
		}
		m.forget(to)
	}
}

// forgetOldest forgets the destination that the guest has not sent to for the longest
// time, unless all of them wait for Allow. The caller holds flow.mu.
func (m *udpMapping) forgetOldest() bool {
	e := m.recent.Front()
	if e == nil {
		return false
	}
	to := e.Value.(*destination)
	m.flow.stack.counters[dropUDPQueue].Add(uint64(len(to.queue.list)))
	m.forget(to)
	return true
}

// forget takes a destination out of the mapping. The caller holds flow.mu.
func (m *udpMapping) forget(to *destination) {
	delete(m.destinations, to.at)
	if to.place == nil {
		return
	}
	m.recent.Remove(to.place)
	a := to.at.Addr()
	if m.peers[a]--; m.peers[a] == 0 {
		delete(m.peers, a)
	}
}

// begin starts the goroutine that asks Allow about a destination and opens the host
// socket, if there is none. The caller holds no lock.
func (m *udpMapping) begin(to *destination) {
	f, s := m.flow, m.flow.stack
	s.mu.Lock()
	closed := s.closed.Load()
	ok := !closed && s.beginDial(f.key.ns)
	s.mu.Unlock()
	if ok {
		go m.run(to)
		return
	}
	f.mu.Lock()
	switch {
	case closed || f.gone:
		f.mu.Unlock()
	case to.place == nil:
		m.refuse(errTooManyDials, to)
	default:
		m.refuseWaiting(errTooManyDials)
	}
}

// run is the goroutine of a destination. If it opens the host socket, it goes on as
// its reader.
func (m *udpMapping) run(to *destination) {
	f := m.flow
	defer f.stack.goroutines.Done()
	if m.connect(to) {
		f.readHost()
	}
}

// connect asks Allow about a destination, if that is to be asked, and opens the host
// socket, if that is to be opened. It reports whether it has opened it.
func (m *udpMapping) connect(to *destination) bool {
	f, s := m.flow, m.flow.stack
	defer s.endDial(f.key.ns)
	key := m.keyTo(to.at)
	flow := key.flow()
	ctx, cancel := s.context(flow)
	defer cancel()

	f.mu.Lock()
	if to.place == nil {
		if m.destinations[to.at] != to {
			f.mu.Unlock()
			return false
		}
		to.cancel = cancel
		f.mu.Unlock()
		err := s.cfg.Allow(ctx, flow)
		f.mu.Lock()
		switch {
		case m.destinations[to.at] != to:
			f.mu.Unlock()
			return false
		case err != nil:
			m.refuse(err, to)
			return false
		}
		m.admit(m.flow.stack.now(), to)
		if m.conn != nil {
			m.release(to)
		}
		if !m.opens() {
			f.mu.Unlock()
			s.log(flowOpened, &key)
			return false
		}
	}
	f.cancel = cancel
	f.mu.Unlock()

	conn, err := s.cfg.ListenPacket(ctx, [...]string{4: "udp4", 6: "udp6"}[f.key.version], ":0")
	if err == nil && conn == nil {
		err = errors.New("ListenPacket returned neither a socket nor an error")
	}
	f.mu.Lock()
	switch {
	case f.gone:
		f.mu.Unlock()
		if err == nil {
			conn.Close()
		}
		return false
	case err != nil:
		m.refuseWaiting(err)
		return false
	}
	s.count(flowsDialed)
	m.opening, m.conn, f.cancel = false, conn, nil
	if c, ok := conn.(*net.UDPConn); ok {
		f.sender = hostio.NewSender(c)
	}
	f.own(s.ownListen)
	f.active = f.stack.now()
	f.schedule(f.active)
	for e := m.recent.Front(); e != nil; e = e.Next() {
		m.release(e.Value.(*destination))
	}
	f.mu.Unlock()
	s.log(flowOpened, &key)
	return true
}

// release has what waits for a destination written to the host. The caller holds
// flow.mu.
func (m *udpMapping) release(to *destination) {
	for d, ok := to.queue.pop(); ok; d, ok = to.queue.pop() {
		m.flow.enqueue(&d)
	}
	m.flow.startPump()
}

// refuseWaiting ends the attempt to open the host socket, and refuses all that waits
// for it. It is called with flow.mu held and returns without it.
func (m *udpMapping) refuseWaiting(err error) {
	m.opening, m.flow.cancel = false, nil
	var waiting []*destination
	for e := m.recent.Front(); e != nil; e = e.Next() {
		waiting = append(waiting, e.Value.(*destination))
	}
	m.refuse(err, waiting...)
}

// refuse forgets destinations that could not be opened, and the mapping if it has no
// other. It is called with flow.mu held and returns without it.
func (m *udpMapping) refuse(err error, list ...*destination) {
	f, s := m.flow, m.flow.stack
	for _, to := range list {
		m.forget(to)
	}
	if m.conn == nil && !m.opening && len(m.destinations) == 0 {
		f.finish()
	} else {
		f.mu.Unlock()
	}
	for _, to := range list {
		key := m.keyTo(to.at)
		s.log(flowRefused, &key, "error", err)
		switch {
		case errors.Is(err, errTooManyDials):
			s.count(dropPendingDials)
			continue
		case answerTo(err) == silence:
			s.count(dropPolicy)
			continue
		}
		s.count(flowsRefused)
		if kind, ok := datagramAnswer(err); ok {
			f.report(kind, to.queue.list[len(to.queue.list)-1].quote)
		}
	}
}

// leave forgets everything but the socket, and returns what ends the calls of Allow
// and ListenPacket. The caller holds flow.mu.
func (m *udpMapping) leave() (cancel func()) {
	cancels := []func(){}
	if m.flow.cancel != nil {
		cancels = append(cancels, m.flow.cancel)
	}
	for _, to := range m.destinations {
		if to.cancel != nil {
			cancels = append(cancels, to.cancel)
		}
	}
	m.destinations, m.peers = nil, nil
	m.recent.Init()
	return func() {
		for _, cancel := range cancels {
			cancel()
		}
	}
}
