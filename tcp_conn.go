package slirp

import (
	"container/list"
	"math"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/hostio"
	"github.com/KarpelesLab/slirp/internal/tcp"
)

// tcpConn is one TCP flow: a state machine, its lock, its timer, and the way its
// frames leave. What is done with the bytes is the business of its user: a
// VirtualConn, or the relay to a host connection (tcp.go).
type tcpConn struct {
	stack *Stack
	key   flowKey

	opened moment      // when the SYN came; never changes
	memory *tcp.Memory // of the namespace, set once, with stack.mu held

	// Guarded by stack.mu.
	listener  *Listener     // that waits for the handshake, or for Accept
	unread    bool          // it died with bytes that nobody has read yet
	lingering *list.Element // in the account's timeWait

	mu         sync.Mutex // guards what follows
	link       link
	learned    moment   // when the guest's entry was last refreshed
	opening    *opening // while the host is dialed; tcb is nil then
	tcb        *tcp.TCB
	gone       bool  // the table forgets it: a packet for it belongs to no flow
	emitting   bool  // some goroutine hands frames to the Writer
	unfinished bool  // the last turn has left frames to the timer
	shortened  uint8 // how often pathMTU has made the segments shorter
	turn       *turn // of the latest HandlePackets that it is to answer at the end of
	timer      *time.Timer
	timerAt    moment // when timer fires; 0: it does not

	readable, writable sync.Cond // on mu

	icmp syscall.Errno // what an ICMP error said that ended DialContext; 0: nothing

	// The relay of a NAT flow.
	host        net.Conn      // set once, with tcb
	stream      hostio.Stream // that host is
	lull                      // lookAt is when lookAtHost is to be called
	heldUntil   moment        // when bytes that wait for more are written; 0: none do
	pumping     bool          // a goroutine writes to host
	readWaits   bool          // for room in the send buffer
	probed      bool          // host is asked now and then whether it is there
	readDone    bool          // host has nothing more to say
	ending      bool          // host has failed, and its last words wait for emitting to be false
	writeDone   bool          // nothing more is written to host
	writeErr    bool          // host takes no more bytes
	closedWhole bool          // host, which has no CloseWrite, was closed for want of it
	resetting   bool          // host is being reset
	written     int64         // bytes that host has taken
}

// newTCPConn returns a flow that is not in the table yet.
func (s *Stack) newTCPConn(key *flowKey, l *link, now moment) *tcpConn {
	c := &tcpConn{stack: s, key: *key, link: *l, opened: now, learned: now}
	c.readable.L, c.writable.L = &c.mu, &c.mu
	return c
}

// handle takes a segment of the flow. It reports false when the flow is gone, or
// makes way for the connection that the segment begins.
func (c *tcpConn) handle(seg *tcp.Segment, p *ipPacket, l *link, t *turn) (ok bool, err error) {
	now := t.now(c.stack)
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return false, nil
	}
	c.link = *l
	learn := now.Sub(c.learned) >= learnEvery
	if learn {
		c.learned = now
	}
	switch {
	case c.tcb == nil:
		err = c.handleOpening(seg, p)
	case c.tcb.MayReplace(seg):
		c.flushTurn(now, maxTurn) // its last segments may wait for the end of a turn
		c.forget()
		return false, nil
	default:
		c.tcb.Input(now, seg)
		if t.defers(c) {
			c.mu.Unlock()
		} else {
			err = c.flushTurn(now, maxTurn)
		}
	}
	if learn {
		c.stack.learn(guestKey{c.key.ns, c.key.guest, uintptr(c.key.version)}, l)
	}
	return true, err
}

// flush makes everything happen that the last calls of the TCB have brought about.
// It is called with c.mu held and returns without it. The error is that of the
// Writer. It is for whoever has written the bytes that are sent: anyone else may be
// kept at it for ever, and takes a turn.
func (c *tcpConn) flush(now moment) error { return c.flushTurn(now, math.MaxInt) }

// maxTurn bounds the frames that a guest's packet, a timer or a reader sends at a
// time. An ACK may free any number of them, and others wait meanwhile.
const maxTurn = 64

// flushTurn is flush, with a bound on the frames that are sent. The timer does the
// rest.
func (c *tcpConn) flushTurn(now moment, frames int) error {
	ev := c.tcb.Events()
	deliver := c.wake(now, ev)
	unread := c.tcb.Buffered() > 0
	err := c.emit(now, frames)
	reason := c.tcb.Reason()
	drain := c.gone && c.pumping
	if c.gone && !c.pumping {
		c.tcb.Release()
	}
	c.mu.Unlock()
	c.react(ev, reason, unread)
	if drain {
		c.stack.drain(c)
	}
	if deliver {
		c.deliver()
	}
	return err
}

// emit hands the frames that are due to the Writer, up to n of them, in order and
// one call at a time: if another goroutine is at it, that one goes on. Then it sets
// the timer. It is called with c.mu held, which it releases for each call of the
// Writer.
func (c *tcpConn) emit(now moment, n int) (first error) {
	if c.emitting {
		c.setTimer(now)
		return nil
	}
	c.unfinished = false
	if c.tcb.Quiet() {
		c.setTimer(now)
		return nil
	}
	c.emitting = true
	s := c.stack
	b := s.getSlab()
	// A reset, the last word, is not left to a timer, which the flow has no more.
	for (n > 0 || c.tcb.State() == tcp.Closed) && c.build(now, b, max(n, 1)) {
		n -= len(b.frames)
		l, stale, mss := c.link, now.Sub(c.learned) >= learnEvery, c.tcb.SegmentSize()
		c.mu.Unlock()
		if stale {
			l = s.presentLink(c.key.guestKey(), l)
		}
		for _, frame := range b.frames {
			finishSegment(frame, &l, c.key.version, c.key.host, c.key.guest, mss)
		}
		if err := s.sendAll(&l, b.frames); err != nil && first == nil {
			first = err
		}
		b.sent(s.cfg.ReuseFrames)
		c.mu.Lock()
		if c.tcb.Quiet() {
			break
		}
		now = s.now()
	}
	s.putSlab(b)
	c.emitting, c.unfinished = false, n <= 0
	if c.ending {
		c.writable.Broadcast()
	}
	c.setTimer(now)
	return first
}

// build cuts frames with the segments that are due from b, up to n of them and as
// far as its memory goes, and reports whether there are any.
func (c *tcpConn) build(now moment, b *slab, n int) bool {
	hl, size := c.link.headerLen(c.key.version), c.link.front()+etherHeaderLen+c.stack.maxPacket()
	for b.grow(size); len(b.frames) < n && len(b.free) >= size; {
		m := c.tcb.Output(now, b.free[hl:size])
		if m == 0 {
			break
		}
		b.cut(hl + m)
	}
	return len(b.frames) > 0
}

// maxShortened bounds how often the segments of a connection are made shorter, a
// little each time, and what is in flight sent again: then they are at once as short
// as they get.
const maxShortened = 8

// pathMTU takes the news that the packet with the segment that began at seq was too
// long, and that the network has room for size bytes. It reports false if that
// changes nothing. The error is that of the Writer.
func (c *tcpConn) pathMTU(size int, seq uint32) (took bool, err error) {
	c.mu.Lock()
	if c.shortened >= maxShortened {
		size = pathMTUFloor(c.key.version)
	}
	now := c.stack.now()
	if c.gone || c.tcb == nil || !c.tcb.PathMTU(now, transportMSS(c.key.version, size), seq) {
		c.mu.Unlock()
		return false, nil
	}
	c.shortened++
	return true, c.flushTurn(now, maxTurn)
}

// setTimer has onTimer called when the TCB wants it. A deadline that moves away
// leaves the timer alone: it fires in vain then, and is set again.
func (c *tcpConn) setTimer(now moment) {
	d := c.tcb.Deadline()
	if c.heldUntil != 0 && (d == 0 || c.heldUntil < d) {
		d = c.heldUntil
	}
	if c.lookAt != 0 && (d == 0 || c.lookAt < d) && !c.gone {
		d = c.lookAt
	}
	if c.unfinished {
		d = now
	}
	switch {
	case d == 0:
		if c.timer != nil {
			c.timer.Stop()
			c.timerAt = 0
		}
	case c.timerAt == 0 || d < c.timerAt:
		c.timerAt = d
		if c.timer == nil {
			c.timer = time.AfterFunc(d.Sub(now), c.onTimer)
		} else {
			c.timer.Reset(d.Sub(now))
		}
	}
}

// enter locks a flow for a goroutine of the Stack's own, which Close then waits
// for: it calls s.goroutines.Done in the end. It reports false, and does neither,
// if the flow is gone.
func (c *tcpConn) enter() bool {
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return false
	}
	c.stack.goroutines.Add(1)
	return true
}

func (c *tcpConn) onTimer() {
	if !c.enter() {
		return
	}
	defer c.stack.goroutines.Done()
	c.timerAt = 0
	now := c.stack.now()
	c.tcb.Advance(now)
	rest := c.lookAtHost(now)
	c.flushTurn(now, maxTurn)
	if rest {
		callBack(c.host)
	}
}

// wake tells whoever waits for the flow, and reports whether the caller is to call
// deliver. It is called with c.mu held.
func (c *tcpConn) wake(now moment, ev tcp.Events) (deliver bool) {
	if ev&tcp.EventClosed != 0 {
		c.gone = true
		if c.tcb.Reason() != tcp.None {
			c.startReset()
		}
	}
	if ev&tcp.EventReadable != 0 {
		c.readable.Broadcast()
	}
	if ev&(tcp.EventWritable|tcp.EventConnected) != 0 {
		c.writable.Broadcast()
	}
	return c.toDeliver(now)
}

// react does what events ask for outside the flow. It is called without a lock.
func (c *tcpConn) react(ev tcp.Events, reason tcp.Reason, unread bool) {
	if ev&tcp.EventConnected != 0 {
		c.stack.established(c)
	}
	if ev&tcp.EventTimeWait != 0 {
		c.stack.enterTimeWait(c)
	}
	if ev&tcp.EventClosed != 0 {
		s := c.stack
		s.mu.Lock()
		c.unread = unread
		s.removeLocked(&c.key, c)
		s.mu.Unlock()
		s.log(flowClosed, &c.key, "reason", reason)
	}
}

// forget ends the flow without a word to the guest.
func (c *tcpConn) forget() {
	c.mu.Lock()
	c.gone = true
	if c.timer != nil {
		c.timer.Stop()
	}
	drain := c.pumping
	if c.tcb != nil && !drain {
		c.tcb.Release()
	}
	c.mu.Unlock()
	c.stack.remove(&c.key, c)
	if drain {
		c.stack.drain(c)
	}
}

// giveUp resets both sides of a flow that has not ended in time.
func (c *tcpConn) giveUp() {
	if !c.enter() {
		return
	}
	defer c.stack.goroutines.Done()
	c.tcb.Abort()
	c.flush(c.stack.now())
}

// endSoon resets both sides of the flow on a goroutine of its own: its Writer may
// be stuck, which is no reason for other flows to wait.
func (c *tcpConn) endSoon() {
	if !c.enter() {
		return
	}
	c.mu.Unlock()
	go func() {
		defer c.stack.goroutines.Done()
		c.end()
	}()
}

// end resets both sides of the flow.
func (c *tcpConn) end() {
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		return
	}
	if c.tcb == nil {
		c.refuse(tcpReset)
		return
	}
	c.tcb.Abort()
	c.flush(c.stack.now())
}
