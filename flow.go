package slirp

import (
	"context"
	"net/netip"
	"syscall"
	"time"
)

// The flow table: what every TCP connection and UDP association of every guest
// is found by, whether a host socket or a part of the program is behind it.

// link is where frames for a guest go: that of its latest packet.
type link struct {
	guest, gw [6]byte
	w         Writer      // or
	batch     BatchWriter // one of the two
	ns        uintptr
	virtio    bool // Config.VirtioNetHeader
}

// flowKey names a flow. IPv4 addresses are stored mapped, and the version tells
// which header they came in. The fields leave no padding, so the key is hashed
// as plain memory.
type flowKey struct {
	ns        uintptr
	guest     ipAddr // the guest's end
	host      ipAddr // the other end: an address on the host's side, or the stack's own
	guestPort uint16
	hostPort  uint16
	proto     uint16
	version   uint16 // 4 or 6
}

// guestEnd and hostEnd return the two ends of the flow.
func (k *flowKey) guestEnd() netip.AddrPort {
	return netip.AddrPortFrom(k.guest.addr(), k.guestPort)
}
func (k *flowKey) hostEnd() netip.AddrPort { return netip.AddrPortFrom(k.host.addr(), k.hostPort) }

// flow returns what Allow and Dial are told.
func (k *flowKey) flow() Flow {
	f := Flow{Namespace: k.ns, Network: "tcp", Source: k.guestEnd(), Destination: k.hostEnd()}
	if k.proto == protoUDP {
		f.Network = "udp"
	}
	return f
}

// flow is one entry of the table: a *tcpConn or a *udpFlow.
type flow interface {
	// endSoon resets the flow and frees what it holds, without waiting for a
	// Writer. The table has forgotten it already, or is about to.
	endSoon()
}

// idleAfter is about the time after which a host that has nothing to say is taken for
// one that will not have for long. The goroutine that reads from it then ends: its stack,
// which has been deep for a dial or for frames and does not become as small again, is most
// of what an idle flow takes. To do so at each pause would make short connections dearer
// by a tenth.
const idleAfter = 25 * time.Millisecond

// lull finds out that a host is silent for as long as that. It is guarded by the lock of
// the flow.
type lull struct {
	lookAt     moment // when look is to be called; 0: it is not
	silent     bool   // the reader waits for the host to have something to read
	idle       bool   // silent is true, ever since lookAt was set
	calledBack bool   // the reader is called back, and does not know it yet
}

// begin notes that there is nothing to read. It reports whether it has set lookAt.
func (l *lull) begin(s *Stack) bool {
	l.silent = true
	if l.lookAt != 0 {
		return false
	}
	l.idle = true
	l.lookAt = s.now().Add(idleAfter) // the Writer may have taken any time
	return true
}

// end notes that there may be something to read.
func (l *lull) end() { l.silent, l.idle = false, false }

// look is called when lookAt has come. It reports whether the caller is to call the reader
// back from its wait, which only a deadline does. If there is something to read after all,
// the rest is short.
func (l *lull) look(now moment) (rest bool) {
	l.lookAt = 0
	if !l.silent || l.calledBack {
		return false
	}
	l.calledBack = l.idle
	if !l.idle {
		l.idle = true
		l.lookAt = now.Add(idleAfter)
	}
	return l.calledBack
}

// callBack has a read that waits for a socket return [os.ErrDeadlineExceeded].
func callBack(socket interface{ SetReadDeadline(time.Time) error }) {
	socket.SetReadDeadline(time.Unix(1, 0))
}

// await has ready called when there is something to read from the socket of a flow that
// rests. It reports false if that is not possible.
func (s *Stack) await(socket any, ready func()) bool {
	c, ok := socket.(syscall.Conn)
	return ok && s.poller.Await(c, ready)
}

// forget is the end of await. It is called before a socket is closed, of a flow that is
// gone: it does not begin to rest any more.
func (s *Stack) forget(socket any) {
	if c, ok := socket.(syscall.Conn); ok {
		s.poller.Forget(c)
	}
}

// lookup finds a flow.
func (s *Stack) lookup(key *flowKey) flow {
	s.mu.RLock()
	f := s.flows[*key]
	s.mu.RUnlock()
	return f
}

// lookupTCP finds a TCP flow, mostly without the table: one segment of a flow rarely
// comes alone.
func (s *Stack) lookupTCP(key *flowKey) *tcpConn {
	if c := s.latest.Load(); c != nil && c.key == *key {
		return c
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	c, _ := s.flows[*key].(*tcpConn)
	if c != nil {
		s.latest.Store(c)
	}
	return c
}

// insert enters f in the table and counts it in its namespace. It fails when the
// table has the key, the namespace is full, or the Stack is closed. The caller
// holds s.mu.
func (s *Stack) insert(key *flowKey, f flow) error {
	if s.closed.Load() {
		return ErrStackClosed
	}
	if s.flows[*key] != nil {
		return ErrAddressInUse
	}
	a := s.account(key.ns)
	n, limit := a.flows(key.proto), s.cfg.MaxTCPFlows
	if key.proto == protoUDP {
		limit = s.cfg.MaxUDPFlows
	}
	if limit >= 0 && *n >= limit {
		s.release(key.ns)
		return ErrTooManyFlows
	}
	*n++
	s.flows[*key] = f
	if c, ok := f.(*tcpConn); ok {
		c.memory = a.memory
		if c.tcb != nil { // nobody else has it yet
			c.tcb.UseMemory(c.memory)
		}
	}
	return nil
}

// remove forgets f, if the table still has it under the key. It may be called
// more than once. The caller holds no lock.
func (s *Stack) remove(key *flowKey, f flow) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.removeLocked(key, f)
}

func (s *Stack) removeLocked(key *flowKey, f flow) {
	if s.flows[*key] != f {
		return
	}
	delete(s.flows, *key)
	a := s.account(key.ns)
	if c, ok := f.(*tcpConn); ok {
		s.latest.CompareAndSwap(c, nil)
		if c.lingering != nil {
			a.timeWait.Remove(c.lingering)
			c.lingering = nil
			s.release(key.ns)
			return
		}
		c.leaveListener()
	} else if f, ok := f.(*udpFlow); ok {
		s.keepLocked(f)
	}
	*a.flows(key.proto)--
	s.release(key.ns)
}

// guestKey names a guest.
type guestKey struct {
	ns      uintptr
	addr    ipAddr
	version uintptr
}

// maxGuests bounds the guest addresses of a namespace that are remembered. A guest
// may invent as many as it likes; the bound costs a forgotten one no more than the
// wait for its next packet.
const maxGuests = 4096

// learnEvery is how often a flow refreshes the entry of its guest.
const learnEvery = time.Second

// learn remembers where frames for a guest go, for DialContext.
func (s *Stack) learn(key guestKey, l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return
	}
	guests := s.guests[key.ns]
	if guests == nil {
		guests = make(map[guestKey]link)
		s.guests[key.ns] = guests
	}
	if _, ok := guests[key]; !ok && len(guests) >= maxGuests {
		for old := range guests {
			delete(guests, old)
			break
		}
	}
	guests[key] = *l
}

// presentLink returns where a guest is: where it last spoke on any flow, or else
// there where it spoke on this one. A virtual machine that reconnects keeps its
// flows, those too on which it waits to hear something.
func (s *Stack) presentLink(key guestKey, l link) link {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if now, ok := s.guests[key.ns][key]; ok {
		return now
	}
	return l
}

// path is what is known of the way to a guest, behind the MTU of the Stack: a part
// of it takes less.
type path struct {
	mtu   int
	until moment // when it is forgotten
}

const (
	// maxPaths bounds the paths that are remembered. A forgotten one costs a
	// datagram.
	maxPaths = 1024

	// pathLife is how long a path is remembered, which may be better again: "10
	// minutes" (RFC 1191 section 6.3, RFC 8201 section 5.3).
	pathLife = 10 * time.Minute
)

// learnPath remembers that packets to a guest are not to be longer than mtu. It
// reports false if they are not anyway.
func (s *Stack) learnPath(key guestKey, mtu int) bool {
	if mtu >= s.mtuTo(key) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return false
	}
	if _, ok := s.paths[key]; !ok && len(s.paths) >= maxPaths {
		for old := range s.paths {
			delete(s.paths, old)
			break
		}
	}
	s.paths[key] = path{mtu, s.now().Add(pathLife)}
	s.numPaths.Store(int32(len(s.paths)))
	return true
}

// mtuTo returns the size of the largest IP packet to a guest.
func (s *Stack) mtuTo(key guestKey) int {
	if s.numPaths.Load() == 0 { // as nearly always
		return s.cfg.MTU
	}
	s.mu.RLock()
	p, ok := s.paths[key]
	s.mu.RUnlock()
	if !ok {
		return s.cfg.MTU
	}
	if s.now() >= p.until {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.paths[key] == p {
			delete(s.paths, key)
			s.numPaths.Store(int32(len(s.paths)))
		}
		return s.cfg.MTU
	}
	return p.mtu
}

// guestKey names the guest of the flow.
func (k *flowKey) guestKey() guestKey { return guestKey{k.ns, k.guest, uintptr(k.version)} }

// route is one AddRoute.
type route struct {
	prefix netip.Prefix
	link   link
}

// linkTo returns where frames for a guest address go: where it last spoke, else
// the longest route that covers it.
func (s *Stack) linkTo(ns uintptr, addr netip.Addr) (link, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if l, ok := s.guests[ns][guestKey{ns, ipAddrFrom(addr), uintptr(versionOf(addr))}]; ok {
		return l, true
	}
	var best *route
	for i, r := range s.routes[ns] {
		if r.prefix.Contains(addr) && (best == nil || r.prefix.Bits() > best.prefix.Bits()) {
			best = &s.routes[ns][i]
		}
	}
	if best == nil {
		return link{}, false
	}
	return best.link, true
}

type flowContextKey struct{}

// FlowFromContext returns the flow that the context of a [Config.Allow] or
// [Config.Dial] call is for.
func FlowFromContext(ctx context.Context) (Flow, bool) {
	f, ok := ctx.Value(flowContextKey{}).(Flow)
	return f, ok
}
