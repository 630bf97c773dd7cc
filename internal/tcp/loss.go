package tcp

import "time"

// Loss recovery: SACK-based by RFC 6675, NewReno by RFC 6582 for a peer without
// SACK, after a timeout by RFC 5681 section 3.1, limited transmit by RFC 3042.
//
// With SACK three things are from RFC 8985 (RACK-TLP), where small windows need them:
// a gap that stays open for a part of the round trip is a loss even if fewer
// than three segments are SACKed above it; a retransmission is lost if something
// sent after it has arrived; and the tail of a flight that nobody acknowledges is
// probed before the timeout, once the connection has seen losses. The order of sending, which offsets tell,
// takes the place of RACK's times.
//
// What the network has dropped because it was too long is lost too, but without
// congestion: path MTU discovery, RFC 1191 and 8201, with the check of RFC 5927.
//
// One estimate serves all of them: pipe, the bytes that are still in the
// network (RFC 6675 section 4). Without SACK every duplicate ACK says that one
// segment has left it. cwnd is therefore never inflated as in RFC 6582; to leave
// the segment out of pipe lets the same segments go. Limited transmit needs no
// code for the same reason.

const dupThresh = 3 // RFC 5681 section 3.2, DupThresh of RFC 6675

// maxSacked bounds the spans of the scoreboard. A block that would make one
// more is ignored, which costs a retransmission at worst.
const maxSacked = 128

// phase is the kind of recovery under way.
type phase uint8

const (
	phaseOpen phase = iota // none
	phaseFast              // fast recovery, until recover is acknowledged
	phaseRTO               // after a timeout, until recover is acknowledged
)

// lossState is the scoreboard, and what recovery has done with it.
type lossState struct {
	sack    bool     // SACK was negotiated
	sacked  rangeSet // what the peer holds above una
	dupAcks int64
	phase   phase
	recover int64 // nxt when recovery began: RecoveryPoint
	highRxt int64 // end of what was retransmitted in this recovery: HighRxt
	rescued bool  // the rescue retransmission was used (NextSeg rule 4)
	limited int64 // bytes sent by limited transmit since the first duplicate ACK
	rtxDue  bool  // the first segment goes out whatever pipe says

	// Tail loss probe, RFC 8985 section 7.
	tailDue   bool  // a probe is to be sent
	tailEnd   int64 // nxt when one was sent that is not acknowledged; 0: none
	tailAgain bool  // it was data sent again

	reordered bool     // the network was seen to reorder
	everRxt   int64    // end of what was ever retransmitted
	resent    []resent // retransmissions of this recovery that may be under way, the oldest first
	lostAgain rangeSet // retransmissions that are lost
}

// resent is a range that was retransmitted when nxt was mark: what is at mark or
// above was sent later.
type resent struct {
	span
	mark int64
}

// left returns the bytes that have left the network above una: they were
// SACKed, or duplicate ACKs stand for them.
func (l *lossState) left(una, nxt, mss int64) int64 {
	if l.sack {
		return l.sacked.size()
	}
	return min(l.dupAcks*mss, max(0, nxt-una-mss))
}

// lostEdge returns the offset below which everything that the peer does not
// hold counts as lost: IsLost of RFC 6675 section 4, as a threshold.
func (l *lossState) lostEdge(una, nxt, mss int64) int64 {
	switch {
	case l.phase == phaseRTO:
		return l.recover
	case !l.sack && l.phase == phaseFast:
		return min(una+mss, nxt)
	case l.phase == phaseFast && !l.reordered && len(l.sacked) > 0:
		// RFC 8985 section 6.2 step 4: in recovery the reordering window is 0.
		return l.sacked[len(l.sacked)-1].start
	}
	var bytes int64
	for i := len(l.sacked) - 1; i >= 0; i-- {
		s := l.sacked[i]
		bytes += s.end - s.start
		if len(l.sacked)-i >= dupThresh || bytes > (dupThresh-1)*mss {
			return s.start
		}
	}
	return una
}

// missing returns how many bytes of [from, to) the peer does not hold.
func (l *lossState) missing(from, to int64) int64 {
	return max(0, to-from-l.sacked.sizeBefore(to)+l.sacked.sizeBefore(from))
}

// pipe is SetPipe of RFC 6675 section 4: what was sent, less what has left the
// network and what is lost, plus what was sent again.
func (l *lossState) pipe(una, nxt, mss int64) int64 {
	p := nxt - una - l.left(una, nxt, mss)
	if l.phase != phaseOpen {
		p += l.missing(una, l.highRxt) - l.missing(una, l.lostEdge(una, nxt, mss))
		for _, s := range l.lostAgain {
			p -= l.missing(s.start, s.end)
		}
	}
	return max(0, p)
}

// nextLost returns the next range to retransmit because it is lost: rule 1 of
// NextSeg, RFC 6675 section 4.
func (l *lossState) nextLost(una, nxt, mss int64) span {
	for _, s := range l.lostAgain {
		if gap := l.sacked.nextGap(max(una, s.start), s.end); gap.start < gap.end {
			gap.end = min(gap.end, gap.start+mss)
			return gap
		}
	}
	edge := l.lostEdge(una, nxt, mss)
	gap := l.sacked.nextGap(max(una, l.highRxt), nxt)
	if gap.start >= edge {
		return span{}
	}
	gap.end = min(gap.end, gap.start+mss)
	return gap
}

// sentTail notes that a tail loss probe was sent.
func (l *lossState) sentTail(s span, nxt int64, again bool) {
	l.tailEnd, l.tailAgain = nxt, again
	if again {
		l.everRxt = max(l.everRxt, s.end)
	}
}

// tailAcked takes a cumulative ACK, and reports whether it tells that a tail loss
// probe has repaired a loss: nobody says that its data had come twice (RFC 8985
// section 7.4.2).
func (l *lossState) tailAcked(una int64, twice bool) bool {
	if l.tailEnd == 0 || una < l.tailEnd {
		return false
	}
	l.tailEnd = 0
	return l.tailAgain && !twice
}

// nextDoubtful returns a range to retransmit although it is not known to be
// lost: rules 3 and 4 of NextSeg.
func (l *lossState) nextDoubtful(una, nxt, mss int64) span {
	if !l.sack || l.phase != phaseFast || len(l.sacked) == 0 {
		return span{}
	}
	top := l.sacked[len(l.sacked)-1].end
	if gap := l.sacked.nextGap(max(una, l.highRxt), top); gap.start < gap.end {
		gap.end = min(gap.end, gap.start+mss)
		return gap
	}
	if !l.rescued && top < nxt {
		l.rescued = true
		return span{max(top, nxt-mss), nxt}
	}
	return span{}
}

// enter begins recovery of everything that is outstanding.
func (l *lossState) enter(p phase, una, nxt int64) {
	l.phase, l.recover, l.highRxt = p, nxt, una
	l.rescued, l.rtxDue, l.limited = false, true, 0
	l.resent, l.lostAgain = l.resent[:0], l.lostAgain[:0]
	l.tailDue, l.tailEnd = false, 0
	if p == phaseRTO {
		// RFC 2018 section 8: after a timeout the peer may have reneged.
		l.sacked = l.sacked[:0]
		l.dupAcks = 0
	}
}

// leave ends recovery.
func (l *lossState) leave() {
	l.phase, l.dupAcks, l.limited, l.rtxDue = phaseOpen, 0, 0, false
	l.resent, l.lostAgain = l.resent[:0], l.lostAgain[:0]
}

// sentAgain notes that s was retransmitted.
func (l *lossState) sentAgain(s span, nxt int64) {
	l.highRxt, l.everRxt = max(l.highRxt, s.end), max(l.everRxt, s.end)
	if l.sack && l.phase == phaseFast {
		l.lostAgain.removeBefore(s.end) // nextLost takes the first
		l.resent = append(l.resent, resent{s, nxt})
	}
}

// findLostAgain finds the retransmissions that are lost: something sent later
// has arrived (RFC 8985 section 6.2 step 5, with the order of sending for the
// time). Where the network reorders it must have been sent much later. It
// reports whether there are any.
func (l *lossState) findLostAgain(una, mss int64) bool {
	arrived := una
	if n := len(l.sacked); n > 0 {
		arrived = l.sacked[n-1].end
	}
	if l.reordered {
		arrived -= (dupThresh - 1) * mss
	}
	found := false
	for len(l.resent) > 0 && l.resent[0].mark < arrived { // marks do not fall
		r := l.resent[0]
		l.resent = l.resent[1:]
		if _, held := l.sacked.find(r.end - 1); r.end > una && !held {
			l.lostAgain.add(r.start, r.end)
			found = true
		}
	}
	return found
}

// advance takes a cumulative ACK of n bytes up to una, and reports whether it
// ended a recovery.
func (l *lossState) advance(una, n, mss int64) (ended bool) {
	if len(l.sacked) > 0 && una-n >= l.everRxt {
		l.reordered = true // a gap was filled without a retransmission (RFC 8985 section 6.2 step 3)
	}
	l.sacked.removeBefore(una)
	l.lostAgain.removeBefore(una)
	switch {
	case l.phase == phaseOpen:
		l.dupAcks, l.limited = 0, 0
	case una >= l.recover:
		l.leave()
		return true
	case !l.sack && l.phase == phaseFast:
		// A partial ACK, RFC 6582 section 3.2 step 3: the next segment is lost
		// too; of the duplicates, those that the ACK covers are accounted for.
		l.dupAcks = max(0, l.dupAcks-max(0, n/mss-1))
		l.highRxt, l.rtxDue = una, true
	}
	return false
}

// PathMTU takes the news that the segment that began at seq was too long for the
// network, which has room for mss bytes of payload and options in one. It reports
// false, and does nothing, if no such segment is in flight, which is what somebody
// would have to guess who is not on the way (RFC 5927 section 7.1), or if segments
// are that short already.
//
// What is in flight is sent again, in segments of that size: how it was cut is not
// remembered. The congestion window stays (RFC 8201 section 5.4): this is no
// sign of congestion.
func (t *TCB) PathMTU(now time.Time, mss int, seq uint32) bool {
	off, size := t.snd.seq.unwrap(seq, t.snd.una), max(int64(mss), mssFloor)
	if !t.synchronized() || t.state == TimeWait || off < t.snd.una || off >= t.snd.nxt || size >= t.snd.mss {
		return false
	}
	t.snd.mss = size
	t.loss.enter(phaseRTO, t.snd.una, t.snd.nxt)
	t.timing = false // Karn
	t.arm(timerRexmt, now, t.rtt.timeout())
	t.disarm(timerReorder)
	t.disarm(timerTail)
	return true
}
