package tcp

// State is a state of RFC 9293 section 3.3.2. LISTEN is missing: a listener has
// no TCB, it makes one for each SYN.
type State uint8

const (
	Closed State = iota
	SynSent
	SynReceived
	Established
	FinWait1
	FinWait2
	CloseWait
	Closing
	LastAck
	TimeWait
)

func (s State) String() string {
	return [...]string{"CLOSED", "SYN-SENT", "SYN-RECEIVED", "ESTABLISHED", "FIN-WAIT-1", "FIN-WAIT-2",
		"CLOSE-WAIT", "CLOSING", "LAST-ACK", "TIME-WAIT"}[s]
}

// Reason says why a connection is closed.
type Reason uint8

const (
	None     Reason = iota // it is not, or it ended as it should
	Reset                  // by the peer
	Refused                // by the peer, before it was established
	TimedOut               // the peer did not answer
	Aborted                // by this side
)

func (r Reason) String() string {
	return [...]string{"closed", "reset", "refused", "timed out", "aborted"}[r]
}

// Events is a set of things that have happened since Events was last called.
type Events uint8

const (
	EventConnected Events = 1 << iota // the handshake has ended
	EventReadable                     // bytes or the end of the peer's data can be read
	EventWritable                     // the send buffer has room again
	EventTimeWait                     // both sides have closed; the state lingers
	EventClosed                       // the connection is gone
)

const maxScale = 14 // RFC 7323 section 2.3

// mssFloor bounds the segment size from below: a peer cannot make this side cut
// its data to crumbs.
const mssFloor = 48

// Config describes one connection. All of it is needed but PathMSS, Offload and KeepAlive.
type Config struct {
	LocalPort, RemotePort uint16
	MSS                   int    // the largest segment the link carries: its MTU less IP and TCP headers
	PathMSS               int    // what is known to be the largest that gets to the peer; 0: MSS
	DefaultMSS            int    // what a peer takes that does not say (RFC 9293 section 3.7.1)
	Offload               int    // payload of the longest segment that the link cuts to size; 0: it cuts none
	SendBuffer            int    // bytes
	ReceiveBuffer         int    // bytes
	ISS                   uint32 // the initial send sequence number (RFC 6528)
	TSOffset              uint32 // added to timestamps (RFC 7323 section 5.4)
	KeepAlive             KeepAlive
}

// TCB is the state of one connection, RFC 9293 section 3.3.1. The zero value is
// not usable.
//
//	     1         2          3          4
//	----------|----------|----------|----------
//	       snd.una    snd.nxt    snd.una+snd.wnd
//
//	1 acknowledged  2 sent, not acknowledged  3 may be sent  4 may not
//
//	     1          2          3
//	----------|----------|----------
//	       rcv.nxt    rcv.adv
//
//	1 received  2 may be sent by the peer: it was promised  3 may not
type TCB struct {
	cfg    Config
	state  State
	reason Reason
	events Events
	active bool // this side began

	snd struct {
		seq      seqSpace
		scale    uint8 // of the peer's window
		una, nxt int64 // nxt never goes back: what is sent again is loss's business
		wnd      int64
		wl1, wl2 int64 // SEG.SEQ and SEG.ACK of the latest window update
		maxWnd   int64 // MAX.SND.WND of RFC 5961 section 5.2
		mss      int64 // payload and options, as the peer and the link allow
	}
	rcv struct {
		seq    seqSpace
		scale  uint8 // of our window
		nxt    int64
		adv    int64 // right edge of the advertised window; never retracted
		acked  int64 // nxt as last sent to the peer: Last.ACK.sent
		fin    int64 // offset of the peer's FIN; 0: not seen yet
		mss    int64 // longest payload seen, for the every-second-segment rule
		quick  int   // full segments to acknowledge at once
		smooth int64 // nxt when something was last out of order, or an ACK had to be delayed to the end
	}
	sendBuf sendBuf
	recvBuf recvBuf

	rtt     rttState
	reno    renoState
	loss    lossState
	retries int // retransmissions of the segment at una
	timers  [numTimers]Time

	timestamps bool // negotiated
	tsRecent   uint32
	tsRecentAt Time // when tsRecent was set
	start      Time // zero of the timestamp clock
	latest     Time // the latest time that was told: see clock
	timedSeq   int64
	timedAt    Time
	lastSend   Time  // of data
	limitedAt  int64 // nxt when cwnd last held data back
	challenged Time  // when the last challenge ACK was sent
	probedAt   Time  // when the first window probe was sent that has no answer; zero: all have

	keepProbes     int
	orphanGoal     int64 // of an orphan: what is to be acknowledged until timerEnd
	persistBackoff uint8
	timing         bool   // a segment is being timed: timedSeq, timedAt
	tailWanted     bool   // timerTail is to be set anew
	finQueued      bool   // the application has written its last byte
	orphan         bool   // the application has left: nobody reads
	discard        bool   // what arrives is thrown away
	scaleRefused   bool   // the peer does not scale windows (RFC 7323 section 2.2)
	blocked        bool   // the application found the send buffer full
	synDue         bool   // a SYN, or SYN-ACK, is to be sent
	ackDue         bool   // an ACK is to be sent at once
	ackUrgent      bool   // the peer counts it: it is not to be merged with the next
	pushed         bool   // what can be read is not to wait for more (PSH)
	probeDue       bool   // a probe is to be sent
	override       bool   // silly-window avoidance is off for one segment
	rstDue         bool   // a reset with rst is to be sent
	rst            uint32 // its sequence number
	rstAck         bool   // it acknowledges: an abort, not the answer to a segment
}

func newTCB(cfg Config, now Time) *TCB {
	t := &TCB{cfg: cfg, start: now, latest: now}
	t.snd.seq = seqSpace(cfg.ISS)
	t.sendBuf = sendBuf{base: firstByte, end: firstByte, max: int64(cfg.SendBuffer)}
	t.recvBuf = recvBuf{base: firstByte, nxt: firstByte, max: int64(cfg.ReceiveBuffer)}
	t.snd.mss = cfg.sendMSS(cfg.DefaultMSS)
	t.rcv.nxt, t.rcv.acked, t.rcv.adv = 1, 1, 1 // the peer's SYN has offset 0
	t.rcv.scale = scaleFor(cfg.ReceiveBuffer)
	t.recvBuf.ring.least = max(2<<minRingBits, int64(4)<<t.rcv.scale) // a window to speak of, rounded up
	t.rtt.rto = initialRTO
	t.synDue = true
	return t
}

// sendMSS returns the size of the segments for a peer that takes those of n bytes.
func (cfg *Config) sendMSS(n int) int64 {
	n = min(max(n, mssFloor), cfg.MSS)
	if cfg.PathMSS > 0 {
		n = min(n, cfg.PathMSS)
	}
	return int64(n)
}

// clock returns now, or the latest time that was told before. Several goroutines drive
// a connection in turn, and have read the clock before their turn: time would go back,
// and with it the timestamps, for which the peer would drop segments (RFC 7323 section 5).
func (t *TCB) clock(now Time) Time {
	t.latest = max(now, t.latest)
	return t.latest
}

// scaleFor returns the smallest shift with which a window field holds n.
func scaleFor(n int) uint8 {
	var s uint8
	for s < maxScale && 65535<<s < n {
		s++
	}
	return s
}

// NewActive begins a connection: the first Output is the SYN.
func NewActive(cfg Config, now Time) *TCB {
	t := newTCB(cfg, now)
	t.active = true
	t.state = SynSent
	t.timestamps, t.loss.sack = true, true // offered
	return t
}

// NewPassive answers the SYN of a peer: the first Output is the SYN-ACK.
func NewPassive(cfg Config, now Time, syn *Segment) *TCB {
	t := newTCB(cfg, now)
	t.state = SynReceived
	t.timestamps, t.loss.sack = true, true
	t.takeSYN(now, syn)
	return t
}

// takeSYN learns what the peer's SYN says. An option is in force if both sides
// have sent it, and this side has offered all of them or answers now.
func (t *TCB) takeSYN(now Time, syn *Segment) {
	t.rcv.seq = seqSpace(syn.Seq)
	if syn.MSS != 0 {
		t.snd.mss = t.cfg.sendMSS(int(syn.MSS))
	}
	if syn.HasScale {
		t.snd.scale = syn.Scale
	} else {
		t.rcv.scale, t.scaleRefused = 0, true
	}
	t.timestamps = t.timestamps && syn.HasTimestamps
	t.loss.sack = t.loss.sack && syn.SACKPermitted
	if t.timestamps {
		t.tsRecent, t.tsRecentAt = syn.TSVal, now
	}
	t.snd.wnd = int64(syn.Window) // never scaled on a SYN (RFC 7323 section 2.2)
	t.snd.maxWnd = t.snd.wnd
	t.reno = newReno(initialWindow(t.mss()))
}

// mss is the payload of a full segment: RFC 6691, options come out of it.
func (t *TCB) mss() int64 {
	if t.timestamps {
		return t.snd.mss - timestampsLen
	}
	return t.snd.mss
}

// SegmentSize returns the payload of a full segment.
func (t *TCB) SegmentSize() int { return int(t.mss()) }

// UseMemory has the buffers be part of m. Without a call nothing but their own sizes
// bounds them. Where m has nothing left the send buffer is full earlier and the window
// smaller, and what has been promised before may be dropped when it comes; but every
// buffer may hold 8 KiB, so that data goes on to move.
func (t *TCB) UseMemory(m *Memory) {
	t.sendBuf.ring.use(m)
	t.recvBuf.ring.use(m)
}

// Release ends UseMemory. What has arrived can still be read, but counts no more.
func (t *TCB) Release() { t.UseMemory(nil) }

// State returns the state of the connection.
func (t *TCB) State() State { return t.state }

// Reason returns why the connection is closed.
func (t *TCB) Reason() Reason { return t.reason }

// Events returns what has happened since it was last called.
func (t *TCB) Events() Events {
	e := t.events
	t.events = 0
	return e
}

// SendNext returns SND.NXT, from which a connection that replaces this one
// takes care to begin above (RFC 6191).
func (t *TCB) SendNext() uint32 { return t.snd.seq.wrap(t.snd.nxt) }

// Buffered returns the bytes that can be read.
func (t *TCB) Buffered() int { return int(t.recvBuf.nxt - t.recvBuf.base) }

// Pushed reports whether what can be read is to be passed on at once: the peer has
// pushed it (RFC 9293 section 3.9.1.2), or has sent less than it could, or waits for it to
// be read: the window has no room for another full segment.
func (t *TCB) Pushed() bool {
	return t.pushed || t.finReceived() || t.state == Closed || t.rcv.adv-t.rcv.nxt < int64(t.cfg.MSS)
}

// Urgent reports whether what is due must not wait for another segment of the peer
// that may come at the same time: an ACK that says the same thing once more (RFC 5681
// section 4.2), or what is no plain ACK at all.
func (t *TCB) Urgent() bool {
	return t.ackDue && t.ackUrgent || t.synDue || t.rstDue || t.state == Closed
}

// EOF reports whether the peer has closed its side and all its data was read.
func (t *TCB) EOF() bool { return t.finReceived() && t.Buffered() == 0 }

func (t *TCB) finReceived() bool { return t.rcv.fin != 0 && t.rcv.nxt > t.rcv.fin }

// Unsent reports whether bytes or a FIN wait for the peer to acknowledge them.
func (t *TCB) Unsent() bool {
	return t.sendBuf.end > t.sendBuf.base || t.finQueued && t.snd.una <= t.sendBuf.end
}

// canSend reports whether the application may write: it may before the
// handshake has ended, and the bytes wait.
func (t *TCB) canSend() bool {
	switch t.state {
	case SynSent, SynReceived, Established, CloseWait:
		return !t.finQueued
	}
	return false
}

// Free returns the bytes that can be written. At 0 the caller is told by
// EventWritable when there is room again.
func (t *TCB) Free() int {
	if !t.canSend() {
		return 0
	}
	n := t.sendBuf.free()
	t.blocked = n == 0
	return int(n)
}

// Write queues as much of p as there is room for and returns how much that was.
func (t *TCB) Write(p []byte) int {
	if t.Free() == 0 {
		return 0
	}
	n := t.sendBuf.write(p)
	t.blocked = n < len(p)
	return n
}

// Reserve lends up to n bytes of the send buffer to fill, fewer where it wraps
// or is full. The memory may be written while other methods are called. Commit
// ends the loan.
func (t *TCB) Reserve(n int) []byte {
	if t.Free() == 0 {
		return nil
	}
	p := t.sendBuf.reserve(int64(n))
	t.blocked = len(p) == 0
	return p
}

// Commit queues the first n bytes of what Reserve lent.
func (t *TCB) Commit(n int) {
	if !t.canSend() {
		n = 0
	}
	t.sendBuf.commit(int64(n))
}

// Peek lends the bytes that can be read, up to where the buffer wraps. They may
// be read while other methods are called. Discard ends the loan.
func (t *TCB) Peek() []byte { return t.recvBuf.peek() }

// Discard forgets the first n bytes of what Peek lent, which may open the window.
func (t *TCB) Discard(n int) {
	t.recvBuf.discard(int64(n))
	t.drained()
}

// drained is what follows when bytes were read.
func (t *TCB) drained() {
	t.pushed = t.pushed && t.Buffered() > 0
	t.announceWindow()
}

// Read moves bytes that can be read to p and returns their number.
func (t *TCB) Read(p []byte) int {
	n := t.recvBuf.read(p)
	t.drained()
	return n
}

// announceWindow has a window update sent when reading has opened the window by
// a segment, and at least doubled what is left of it, which is little: silly-window
// avoidance of RFC 9293 section 3.8.6.2.2, and no more updates than the peer has
// use for. While it can send, the ACKs of what it sends bring the news.
func (t *TCB) announceWindow() {
	gain, left := t.windowEdge()-t.rcv.adv, t.rcv.adv-t.rcv.nxt
	if gain > 0 && gain >= left && left < 4*int64(t.cfg.MSS) && !t.finReceived() && t.synchronized() {
		t.ackDue = true
	}
}

// synchronized reports whether both sides know each other's sequence numbers.
func (t *TCB) synchronized() bool {
	return t.state != Closed && t.state != SynSent && t.state != SynReceived
}

// CloseWrite ends this side's data: a FIN follows the last byte.
func (t *TCB) CloseWrite() {
	if !t.canSend() {
		return
	}
	t.finQueued = true
	switch t.state {
	case SynSent:
		t.close(Aborted)
	case Established:
		t.state = FinWait1
	case CloseWait:
		t.state = LastAck
	}
}

// CloseRead throws away what has arrived and what will arrive.
func (t *TCB) CloseRead() {
	t.discard = true
	t.recvBuf.skip()
	t.announceWindow()
}

// Close is the application's farewell. It ends this side's data; bytes that it
// has not read reset the connection (RFC 2525 section 2.17), as do any that
// arrive later. The rest goes on without it, for a bounded time.
func (t *TCB) Close(now Time) {
	now = t.clock(now)
	if t.state == Closed || t.orphan {
		return
	}
	if t.Buffered() > 0 && t.state != TimeWait {
		t.Abort()
		return
	}
	t.recvBuf.skip() // in TIME-WAIT nobody is left to reset
	t.CloseWrite()
	t.orphan, t.orphanGoal = true, t.snd.una+orphanBytes
	if t.state != TimeWait && t.state != Closed {
		t.arm(timerEnd, now, orphanTime)
	}
}

// Refuse ends a connection whose SYN has no answer yet, if seq is the sequence
// number of that SYN, and reports whether it did: the network has said that the
// peer is out of reach.
func (t *TCB) Refuse(seq uint32) bool {
	if t.state != SynSent || seq != t.snd.seq.wrap(0) {
		return false
	}
	t.close(Refused)
	return true
}

// Abort resets the connection (RFC 9293 section 3.10.5): the next Output is the
// reset, the last. What has arrived and was not read is lost.
//
// Deviation: there is a reset in CLOSING and LAST-ACK too, where the RFC sends none.
// If data or the FIN was lost, this is how the peer hears of it.
func (t *TCB) Abort() { t.fail(Aborted) }

// fail gives the connection up, and tells the peer, should it hear.
func (t *TCB) fail(r Reason) {
	switch t.state {
	case Closed, SynSent, TimeWait:
	default:
		t.rstDue, t.rstAck = true, true
		t.rst = t.snd.seq.wrap(t.snd.nxt)
	}
	t.close(r)
}

// close ends the connection and forgets its data, but for the bytes that have
// arrived, which can still be read unless this side gave them up.
func (t *TCB) close(r Reason) {
	if t.state == Closed {
		return
	}
	t.state, t.reason = Closed, r
	t.timers = [numTimers]Time{}
	t.sendBuf.drop()
	if r == Aborted {
		if t.Buffered() > 0 {
			t.rcv.fin = 0 // what is lost must not look like the end
		}
		t.recvBuf.drop()
	}
	t.recvBuf.ooo = nil
	t.loss = lossState{}
	t.synDue, t.ackDue, t.probeDue = false, false, false
	t.events |= EventClosed | EventReadable | EventWritable
}

// enterTimeWait starts, or restarts, the 2MSL timer.
func (t *TCB) enterTimeWait(now Time) {
	if t.state != TimeWait {
		t.state = TimeWait
		t.timers = [numTimers]Time{}
		t.events |= EventTimeWait
	}
	t.arm(timerEnd, now, timeWaitTime)
}

// MayReplace reports whether seg is a SYN that may begin a new connection in
// the place of this one, which is in TIME-WAIT: RFC 9293 section 3.10.7.4 step 4
// with RFC 6191.
func (t *TCB) MayReplace(seg *Segment) bool {
	if t.state != TimeWait || seg.Flags&(SYN|ACK|RST|FIN) != SYN {
		return false
	}
	if t.timestamps && seg.HasTimestamps && seg.TSVal != t.tsRecent {
		return tsBefore(t.tsRecent, seg.TSVal)
	}
	return t.rcv.seq.unwrap(seg.Seq, t.rcv.nxt) > t.rcv.nxt-1
}
