package tcp

import (
	"math"
	"time"
)

// Timers: retransmission (RFC 6298 section 5), zero-window probes (RFC 9293
// section 3.8.6.1), delayed ACK (3.8.6.3), keep-alive (3.8.4), reordering and
// tail loss (RFC 8985 sections 6.3 and 7), and the ends of TIME-WAIT and of a
// connection that its application has left.

// timer names a deadline of a TCB.
type timer uint8

const (
	timerRexmt   timer = iota // something is outstanding: send it again
	timerPersist              // the peer's window holds data back: probe it
	timerDelack               // an ACK is owed
	timerKeep                 // the peer was silent: probe it
	timerEnd                  // TIME-WAIT ends, or an orphan has made no progress
	timerReorder              // a gap below SACKed data is due to loss by now
	timerTail                 // no ACK has come that should have: probe for a loss at the end
	numTimers
)

const (
	maxRetries     = 15 // of data: R2 of RFC 9293 section 3.8.3, about 15 minutes
	maxSynRetries  = 7  // of a SYN: 255 s, R2 for a SYN is at least 3 minutes
	delackTimeout  = 40 * time.Millisecond
	delackShort    = time.Millisecond
	quickAcks      = 16                     // full segments
	overrideTime   = 500 * time.Millisecond // RFC 9293 section 3.8.6.2.1: 0.1 to 1 s
	challengePause = 500 * time.Millisecond // between challenge ACKs of one connection
	// Deviation: RFC 9293 gives a SYN-ACK the R2 of a SYN. Five retransmissions,
	// 63 s, bound what a half-open connection costs.
	maxSynAckRetries = 5
	// Deviation: 2MSL with an MSL of 30 s, as the field has it, not 2 minutes.
	timeWaitTime = 60 * time.Second
	// orphanTime is how long an orphan may go on without orphanBytes acknowledged, or
	// all of its data.
	orphanTime  = 60 * time.Second
	orphanBytes = 16 << 10
	// probeLimit is how long the probes of a window may have no answer: R2 of RFC 9293
	// section 3.8.3, at least 100 s.
	probeLimit = 10 * time.Minute
)

// KeepAlive says how a silent peer is probed. Idle 0: not at all.
type KeepAlive struct {
	Idle     time.Duration // silence before the first probe
	Interval time.Duration // between probes
	Count    int           // unanswered probes that end the connection
}

// Time is what a clock of the caller's shows that never goes back, in nanoseconds. It
// is above 0, which is no time. (A time.Time is three times as large, and an idle
// connection is little else than its TCB.)
type Time int64

// Add returns the time d later, or the last one there is.
func (t Time) Add(d time.Duration) Time {
	if sum := t + Time(d); sum > t || d <= 0 {
		return sum
	}
	return math.MaxInt64
}

// Sub returns for how long it has been t when it was u before.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

func (t *TCB) arm(i timer, now Time, d time.Duration) { t.timers[i] = now.Add(d) }
func (t *TCB) disarm(i timer)                         { t.timers[i] = 0 }
func (t *TCB) armed(i timer) bool                     { return t.timers[i] != 0 }

// Deadline returns when Advance must be called, and 0 when nothing waits for time to
// pass.
func (t *TCB) Deadline() Time {
	next := uint64(math.MaxUint64)
	for _, at := range t.timers[:] { // a copy of the array would wait for the stores of arm
		next = min(next, uint64(at-1)) // of no time, which is 0, the very last
	}
	return Time(next + 1)
}

// Advance runs the timers whose time has come.
func (t *TCB) Advance(now Time) {
	now = t.clock(now)
	for i := range t.timers {
		if at := t.timers[i]; at == 0 || at > now {
			continue
		}
		t.disarm(timer(i))
		switch timer(i) {
		case timerRexmt:
			t.retransmissionTimeout(now)
		case timerPersist:
			t.persistTimeout(now)
		case timerDelack:
			t.ackDue, t.rcv.smooth = true, t.rcv.nxt
		case timerKeep:
			t.keepTimeout(now)
		case timerEnd:
			t.endTimeout()
		case timerReorder:
			t.loss.sure = max(t.loss.sure, t.loss.doubt)
			t.useBlocks(now)
		case timerTail:
			t.tailTimeout()
		}
	}
}

// retransmissionTimeout is RFC 6298 section 5.4 to 5.7.
func (t *TCB) retransmissionTimeout(now Time) {
	limit := maxRetries
	switch t.state {
	case SynSent:
		limit = maxSynRetries
	case SynReceived:
		limit = maxSynAckRetries
		if t.active {
			limit = maxSynRetries
		}
	}
	if t.retries++; t.retries > limit {
		if t.synchronized() {
			t.fail(TimedOut)
		} else {
			t.close(TimedOut) // nobody is there to be told
		}
		return
	}
	t.rtt.backoff++
	t.timing = false // Karn: what is sent again is not timed
	if t.state == SynSent || t.state == SynReceived {
		t.arm(timerRexmt, now, initialRTO<<t.retries)
		t.synDue = true
		return
	}
	t.arm(timerRexmt, now, t.rtt.timeout())
	if t.retries == 1 {
		t.reno.halve(t.snd.nxt-t.snd.una-t.loss.limited, t.mss())
	}
	t.reno.cwnd = t.mss()
	t.loss.enter(phaseRTO, t.snd.una, t.snd.nxt)
	t.disarm(timerReorder)
	t.disarm(timerTail)
}

const (
	// reorderFloor is the shortest reordering window, for clocks that are coarse.
	reorderFloor = 250 * time.Microsecond
	// tailSlack is added to the time after which the tail is probed, for the same
	// reason and for ACKs that wait for a neighbour.
	tailSlack = time.Millisecond
)

// armTail has what is outstanding probed if no ACK comes in two round trips: RFC
// 8985 section 7.2. A lone segment is left to the retransmission timer, since its
// ACK may be delayed.
//
// Deviation: a connection that has lost nothing yet does not probe. Between a
// guest and its host nothing is lost as a rule, and a guest that was suspended
// for a moment is no reason to send anything.
//
// Deviation: where the round trip is so short that the minimum of the RTO makes it
// many of them, more is probed: in recovery, again if a probe had no answer, each
// time after twice as long (as RFC 9002 section 6.2 does), and a lone segment if
// losses have just made the peer acknowledge at once (RFC 5681 section 4.2).
func (t *TCB) armTail(now Time) {
	t.tailWanted = false
	t.disarm(timerTail)
	l := &t.loss
	if l.everRxt == 0 || !l.sack || t.rtt.srtt == 0 || t.retries > 0 || l.phase == phaseOpen && len(l.sacked) > 0 {
		return
	}
	d := (2*t.rtt.srtt + tailSlack) << l.probes
	lone := l.phase == phaseOpen && t.snd.nxt-t.snd.una <= t.mss()
	if lone && t.snd.una-l.everRxt >= quickAcks*t.mss() {
		return
	}
	if (lone || l.phase != phaseOpen || l.tailEnd != 0 || l.probes > 0) && d > t.rtt.rto/4 {
		return
	}
	if at := now.Add(d); at < t.timers[timerRexmt] {
		t.timers[timerTail] = at
	}
}

// tailTimeout has a probe sent: the tail, or in recovery the first segment, which
// most likely is lost again.
func (t *TCB) tailTimeout() {
	t.loss.probes++
	if t.loss.phase == phaseOpen {
		t.loss.tailDue = true
		return
	}
	t.loss.rtxDue = true
	t.timing = false // Karn
}

// persistTimeout probes a window that is closed, or too small to be worth a
// segment, which the override then fills.
func (t *TCB) persistTimeout(now Time) {
	if t.usableWindow() > 0 {
		t.override = true
		return
	}
	switch {
	case t.probedAt == 0:
		t.probedAt = now
	case now.Sub(t.probedAt) >= probeLimit:
		t.fail(TimedOut)
		return
	}
	d := backedOff(t.rtt.rto, t.persistBackoff)
	if d < maxRTO {
		t.persistBackoff++
		d = min(2*d, maxRTO)
	}
	t.probeDue = true
	t.arm(timerPersist, now, d)
}

// keepTimeout probes a silent peer (RFC 9293 section 3.8.4), unless data is on
// its way to it, whose retransmission does the same.
func (t *TCB) keepTimeout(now Time) {
	if t.snd.nxt > t.snd.una || t.armed(timerPersist) {
		t.arm(timerKeep, now, t.cfg.KeepAlive.Idle)
		return
	}
	if t.keepProbes++; t.keepProbes > t.cfg.KeepAlive.Count {
		t.fail(TimedOut)
		return
	}
	t.probeDue = true
	t.arm(timerKeep, now, t.cfg.KeepAlive.Interval)
}

// heard notes that the peer is alive.
func (t *TCB) heard(now Time) {
	t.probedAt, t.keepProbes = 0, 0
	if t.cfg.KeepAlive.Idle > 0 && t.state != TimeWait {
		t.arm(timerKeep, now, t.cfg.KeepAlive.Idle)
	}
}

// endTimeout ends TIME-WAIT, or gives an orphan up: without a word if the peer
// has only failed to close its side.
func (t *TCB) endTimeout() {
	switch t.state {
	case TimeWait:
		t.close(None)
	case FinWait2:
		t.close(TimedOut)
	default:
		t.fail(TimedOut)
	}
}
