package slirp

import (
	"container/list"
	"context"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/KarpelesLab/slirp/internal/reassembly"
	"github.com/KarpelesLab/slirp/internal/tcp"
)

// What bounds a Stack: the accounts of the namespaces, TIME-WAIT, counters, and
// the end of everything. Idle flows need no sweep: each has its own deadline.

// account is what one namespace uses. It is guarded by Stack.mu.
type account struct {
	tcp, udp int
	dials    int         // calls of Allow and Dial under way
	memory   *tcp.Memory // of the buffers of TCP flows
	timeWait *list.List  // of *tcpConn, the oldest first; nil until needed

	// NAT flows of UDP that the host has not answered, *udpFlow: the first one is
	// the first to make way.
	unanswered list.List
}

// flows returns the counter of a protocol.
func (a *account) flows(proto uint16) *int {
	if proto == protoUDP {
		return &a.udp
	}
	return &a.tcp
}

// account returns the account of a namespace. The caller holds s.mu.
func (s *Stack) account(ns uintptr) *account {
	a := s.accounts[ns]
	if a == nil {
		a = new(account)
		if s.cfg.MaxBuffered >= 0 {
			a.memory = tcp.NewMemory(int64(s.cfg.MaxBuffered))
		}
		s.accounts[ns] = a
	}
	return a
}

// release forgets the account of a namespace that uses nothing. The caller holds
// s.mu.
func (s *Stack) release(ns uintptr) {
	a := s.accounts[ns]
	if a != nil && a.tcp == 0 && a.udp == 0 && a.dials == 0 && (a.timeWait == nil || a.timeWait.Len() == 0) {
		delete(s.accounts, ns)
	}
}

// maxTimeWait bounds the connections of one namespace in TIME-WAIT; the oldest
// makes way.
const maxTimeWait = 4096

// enterTimeWait moves c from the flows that count to those that linger.
func (s *Stack) enterTimeWait(c *tcpConn) {
	var oldest *tcpConn
	s.mu.Lock()
	if s.flows[c.key] == flow(c) && c.lingering == nil {
		a := s.account(c.key.ns)
		if a.timeWait == nil {
			a.timeWait = list.New()
		}
		c.leaveListener()
		c.lingering = a.timeWait.PushBack(c)
		a.tcp--
		if a.timeWait.Len() > maxTimeWait {
			oldest = a.timeWait.Front().Value.(*tcpConn)
		}
	}
	s.mu.Unlock()
	if oldest != nil {
		oldest.forget()
	}
}

// beginDial counts a dial, unless the namespace has its share. The caller holds
// s.mu.
func (s *Stack) beginDial(ns uintptr) bool {
	a := s.account(ns)
	if s.cfg.MaxPendingDials >= 0 && a.dials >= s.cfg.MaxPendingDials {
		s.release(ns)
		return false
	}
	a.dials++
	s.goroutines.Add(1)
	return true
}

// endDial is the end of beginDial.
func (s *Stack) endDial(ns uintptr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return // with the accounts
	}
	s.account(ns).dials--
	s.release(ns)
}

// Close resets every flow, closes every listener and host socket, wakes every
// waiter, and returns when every goroutine of the Stack has ended: a call of
// Allow, Dial or a Writer that does not return holds it up. A second Close does
// nothing and returns nil.
func (s *Stack) Close() error {
	s.mu.Lock()
	if s.closed.Load() {
		s.mu.Unlock()
		return nil
	}
	s.closed.Store(true)
	listeners := s.listeners
	s.listeners = nil
	flows := s.flows
	s.flows, s.accounts = nil, make(map[uintptr]*account)
	s.latest.Store(nil)
	s.guests, s.paths, s.routes = nil, nil, nil
	draining := slices.Collect(maps.Keys(s.draining))
	s.fragments = reassembly.New(reassembly.Limits{}) // Stats looks at it
	if s.fragmentTimer != nil {
		s.fragmentTimer.Stop()
	}
	s.mu.Unlock()

	s.cancel()
	for _, l := range listeners {
		l.Close()
	}
	for _, f := range flows {
		f.endSoon()
	}
	for _, c := range draining {
		c.mu.Lock()
		c.startReset()
		c.mu.Unlock()
	}
	s.goroutines.Wait()
	return nil
}

// setFragmentTimer has expireFragments called when a packet is due, and not at
// all while there is none. The caller holds s.mu.
func (s *Stack) setFragmentTimer(now time.Time) {
	d := s.fragments.Deadline()
	switch {
	case d.IsZero():
		if s.fragmentTimer != nil {
			s.fragmentTimer.Stop()
			s.fragmentsDue = time.Time{}
		}
	case s.fragmentsDue.IsZero() || d.Before(s.fragmentsDue):
		s.fragmentsDue = d
		if s.fragmentTimer == nil {
			s.fragmentTimer = time.AfterFunc(d.Sub(now), s.expireFragments)
		} else {
			s.fragmentTimer.Reset(d.Sub(now))
		}
	}
}

// expireFragments forgets the packets whose fragments did not come in time, and
// tells the guests. A Writer that blocks delays no other guest.
func (s *Stack) expireFragments() {
	s.mu.Lock()
	if s.closed.Load() {
		s.mu.Unlock()
		return
	}
	s.goroutines.Add(1)
	defer s.goroutines.Done()
	now := time.Now()
	s.fragmentsDue = time.Time{}
	expired := s.fragments.Expire(now)
	s.setFragmentTimer(now)
	s.mu.Unlock()
	for _, e := range expired {
		s.count(dropFragmentTimeout)
		if e.Front != nil {
			s.goroutines.Go(func() { s.sendReassemblyTimeout(&e) })
		}
	}
}

// drainTime is how long the host of a flow that the guest's side has done with may
// take nothing before it is reset: as long as a peer is given in TCP (RFC 9293
// section 3.8.3).
const drainTime = 15 * time.Minute

// drain keeps hold of a flow that the table has forgotten while it still writes to
// its host: it counts as a flow of its namespace, Close ends it, and so does a host
// that takes nothing for drainTime.
func (s *Stack) drain(c *tcpConn) {
	s.mu.Lock()
	_, known := s.draining[c]
	if !known {
		s.draining[c] = nil
		if !s.closed.Load() {
			s.account(c.key.ns).tcp++
		}
	}
	s.mu.Unlock()
	c.mu.Lock()
	pumping, written := c.pumping, c.written
	if pumping && s.closed.Load() {
		c.startReset()
	}
	c.mu.Unlock()
	if !pumping {
		s.drained(c)
	} else if !known {
		s.watchDrain(c, written)
	}
}

// watchDrain has drainTimeout called.
func (s *Stack) watchDrain(c *tcpConn, written int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.draining[c]; ok {
		s.draining[c] = time.AfterFunc(drainTime, func() { c.drainTimeout(written) })
	}
}

// drainTimeout resets a host that has taken nothing since it had taken written
// bytes.
func (c *tcpConn) drainTimeout(written int64) {
	c.mu.Lock()
	now := c.written
	if c.pumping && now == written {
		c.startReset()
	}
	c.mu.Unlock()
	if now != written {
		c.stack.watchDrain(c, now)
	}
}

// drained ends drain.
func (s *Stack) drained(c *tcpConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	timer, ok := s.draining[c]
	if !ok {
		return
	}
	if timer != nil {
		timer.Stop()
	}
	delete(s.draining, c)
	if !s.closed.Load() { // else the accounts are gone
		s.account(c.key.ns).tcp--
		s.release(c.key.ns)
	}
}

// limited is a kind of answer that is limited: whoever provokes it may have no
// other use for it.
type limited int

const (
	limitICMP   limited = iota // ICMP errors
	limitResets                // resets for segments of no connection
	numLimited
)

// Of every kind a Stack sends icmpErrorRate a second, after a burst of
// icmpErrorBurst, and so does a namespace at the most. One that finds nothing left
// of that, because others are busy, has a small share that nobody else can take.
const (
	shareInterval = int64(10 * time.Millisecond)
	shareBurst    = 10
)

// share is what a namespace has of the limits.
type share struct {
	most, own [numLimited]tokenBucket
}

// mayAnswer reports whether an answer of a kind may be sent to a namespace now, and
// counts it.
func (s *Stack) mayAnswer(ns uintptr, kind limited, now moment) bool {
	sh := s.shareOf(ns, now)
	return sh.most[kind].take(now) &&
		(s.limits[kind].take(now) || sh.own[kind].takeEvery(now, shareInterval, shareBurst))
}

// shareOf returns the share of a namespace. Those that have not been used for a
// while are forgotten when there are many.
func (s *Stack) shareOf(ns uintptr, now moment) *share {
	s.mu.RLock()
	sh := s.shares[ns]
	s.mu.RUnlock()
	if sh != nil {
		return sh
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if sh := s.shares[ns]; sh != nil {
		return sh
	}
	if len(s.shares) >= s.sweepShares {
		maps.DeleteFunc(s.shares, func(_ uintptr, sh *share) bool { return sh.isFull(now) })
		s.sweepShares = max(64, 2*len(s.shares))
	}
	sh = new(share)
	s.shares[ns] = sh
	return sh
}

func (sh *share) isFull(now moment) bool {
	for i := range sh.most {
		if !sh.most[i].isFull(now) || !sh.own[i].isFull(now) {
			return false
		}
	}
	return true
}

// counter is an index of Stack.counters.
type counter int

const (
	packetsIn counter = iota
	dropMalformed
	dropSourceRoute
	dropChecksum
	dropFragment
	dropFragmentTimeout
	dropFragmentRoom
	dropProtocol
	dropTruncated
	dropAddress
	dropHopLimit
	dropPort
	dropFlags
	dropNoAcceptSlot
	dropPendingDials
	dropTooManyFlows
	dropPolicy
	dropUDPQueue
	dropUDPTooBig
	dropUDPFilter
	dropUDPHost
	dropWriter
	dropICMPType
	dropNeighbor
	packetsReassembled
	pathMTUs
	icmpErrors
	icmpSuppressed
	icmpRateLimited
	echoReplies
	neighborReplies
	strayResets
	strayRateLimited
	flowsAccepted
	flowsDialed
	flowsRefused
	flowsReclaimed
	numCounters
)

type counters [numCounters]atomic.Uint64

func (s *Stack) count(c counter) { s.counters[c].Add(1) }

// Stats holds the counters of a [Stack] since it was made, and its present size.
type Stats struct {
	PacketsIn uint64 // packets given to HandlePacket

	// Packets and segments that were dropped, by reason.
	DropMalformed   uint64 // HandlePacket returned an error, or IPv4 options or IPv6 headers made no sense
	DropSourceRoute uint64 // an IPv4 source route, or an IPv6 routing header with segments left
	DropChecksum    uint64 // a checksum is wrong
	DropFragment    uint64 // a fragment that overlaps, makes no sense, or has come before

	// Packets of which fragments came that were dropped, by reason.
	DropFragmentTimeout uint64 // the others did not come in time
	DropFragmentRoom    uint64 // they made way for later ones

	DropProtocol     uint64 // not TCP, UDP or ICMP
	DropTruncated    uint64 // the transport header is cut off or makes no sense
	DropAddress      uint64 // an address that is not unicast
	DropHopLimit     uint64 // TTL or hop limit 1, and a destination that is not the stack
	DropPort         uint64 // port 0
	DropFlags        uint64 // TCP flags that go with no state
	DropNoAcceptSlot uint64 // a SYN to a listener with a full backlog
	DropPendingDials uint64 // a SYN or datagram beyond MaxPendingDials
	DropTooManyFlows uint64 // a SYN or datagram beyond MaxTCPFlows or MaxUDPFlows
	DropPolicy       uint64 // Allow or Dial returned ErrDrop
	DropUDPQueue     uint64 // a datagram that found no room in a queue
	DropUDPTooBig    uint64 // a datagram that is too long for the host's network, or for an IP packet
	DropUDPFilter    uint64 // a datagram for a mapping from an address that the guest has not sent to
	DropUDPHost      uint64 // a datagram of a mapping that the host's socket did not take
	DropWriter       uint64 // a frame for which the Writer returned an error
	DropICMPType     uint64 // an ICMP message that is not for the stack
	DropNeighbor     uint64 // a neighbour solicitation that is not valid or not for the stack

	PacketsReassembled uint64 // packets put together of fragments
	PathMTUs           uint64 // ICMP messages of the guest's side that made packets to it shorter

	ICMPErrors       uint64 // ICMP errors sent
	ICMPSuppressed   uint64 // ICMP errors not sent, because the RFC forbids them
	ICMPRateLimited  uint64 // ICMP errors not sent, because there were many
	EchoReplies      uint64 // pings answered
	NeighborReplies  uint64 // neighbour solicitations answered
	StrayResets      uint64 // resets sent for segments of no connection
	StrayRateLimited uint64 // resets not sent, because there were many

	FlowsAccepted uint64 // connections given to listeners
	FlowsDialed   uint64 // host connections and sockets opened
	FlowsRefused  uint64 // flows that Allow or Dial refused, or that timed out

	FlowsReclaimed uint64 // UDP flows that made way for new ones, idle and never answered

	TCPFlows, UDPFlows, PendingDials, TimeWait int // now, over all namespaces
	PendingFragments                           int // packets now of which fragments are missing

	Buffered int64 // bytes of memory now that the buffers of TCP flows hold, unless MaxBuffered is negative
}

// Stats returns the counters. They are read one by one, not at one instant.
func (s *Stack) Stats() Stats {
	n := func(c counter) uint64 { return s.counters[c].Load() }
	st := Stats{
		PacketsIn:     n(packetsIn),
		DropMalformed: n(dropMalformed), DropSourceRoute: n(dropSourceRoute), DropChecksum: n(dropChecksum), DropFragment: n(dropFragment),
		DropFragmentTimeout: n(dropFragmentTimeout), DropFragmentRoom: n(dropFragmentRoom),
		PacketsReassembled: n(packetsReassembled), PathMTUs: n(pathMTUs),
		DropProtocol: n(dropProtocol), DropTruncated: n(dropTruncated), DropAddress: n(dropAddress), DropHopLimit: n(dropHopLimit),
		DropPort: n(dropPort), DropFlags: n(dropFlags), DropNoAcceptSlot: n(dropNoAcceptSlot),
		DropPendingDials: n(dropPendingDials), DropTooManyFlows: n(dropTooManyFlows), DropPolicy: n(dropPolicy),
		DropUDPQueue: n(dropUDPQueue), DropUDPTooBig: n(dropUDPTooBig), DropWriter: n(dropWriter),
		DropUDPFilter: n(dropUDPFilter), DropUDPHost: n(dropUDPHost),
		DropICMPType: n(dropICMPType), DropNeighbor: n(dropNeighbor),
		ICMPErrors: n(icmpErrors), ICMPSuppressed: n(icmpSuppressed), ICMPRateLimited: n(icmpRateLimited),
		EchoReplies: n(echoReplies), NeighborReplies: n(neighborReplies),
		StrayResets: n(strayResets), StrayRateLimited: n(strayRateLimited),
		FlowsAccepted: n(flowsAccepted), FlowsDialed: n(flowsDialed), FlowsRefused: n(flowsRefused),
		FlowsReclaimed: n(flowsReclaimed),
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	st.PendingFragments = s.fragments.Len()
	for _, a := range s.accounts {
		st.TCPFlows += a.tcp
		st.UDPFlows += a.udp
		st.PendingDials += a.dials
		st.Buffered += a.memory.Held()
		if a.timeWait != nil {
			st.TimeWait += a.timeWait.Len()
		}
	}
	return st
}

// context returns the context under which a flow is opened: it ends with the
// Stack, after DialTimeout, or by its cancel function.
func (s *Stack) context(f Flow) (context.Context, context.CancelFunc) {
	ctx := context.WithValue(s.ctx, flowContextKey{}, f)
	if s.cfg.DialTimeout < 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, s.cfg.DialTimeout)
}
