package tcp

import (
	"slices"
	"time"
)

// Loss recovery: SACK-based by RFC 6675, NewReno by RFC 6582 for a peer without
// SACK, after a timeout by RFC 5681 section 3.1, limited transmit by RFC 3042.
//
// With SACK there is RFC 8985 (RACK-TLP) too: what was sent before something that
// has arrived is lost, be it sent for the first time or again, at once or when the
// network has had time to reorder; and what nobody acknowledges is probed before
// the timeout, once the connection has seen losses. RACK keeps the time of every
// transmission. Here their order does, which needs no state for what was sent
// once: offsets tell it. A retransmission notes the offset that was next.
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

// maxResent bounds the retransmissions that are watched. The loss of another one
// is found by a probe, or the timeout.
const maxResent = 128

// phase is the kind of recovery under way.
type phase uint8

const (
	phaseOpen phase = iota // none
	phaseFast              // fast recovery, until recover is acknowledged
	phaseRTO               // after a timeout, until recover is acknowledged
)

// lossState is the scoreboard, and what recovery has done with it.
type lossState struct {
	sack    bool // SACK was negotiated
	phase   phase
	rescued bool     // the rescue retransmission was used (NextSeg rule 4)
	rtxDue  bool     // the first segment goes out whatever pipe says
	sacked  rangeSet // what the peer holds above una
	dupAcks int64
	recover int64 // nxt when recovery began: RecoveryPoint
	highRxt int64 // end of what was retransmitted in this recovery: HighRxt
	limited int64 // bytes sent by limited transmit since the first duplicate ACK
	dupEdge int64 // of what is below, a duplicate ACK may tell in this recovery that it has arrived

	cut int64 // nxt when cwnd was last reduced for a loss

	// Tail loss probe, RFC 8985 section 7.
	tailEnd   int64 // nxt when one was sent that is not acknowledged; 0: none
	tailAgain bool  // it was data sent again
	tailDue   bool  // a probe is to be sent
	probes    uint8 // probes since the last ACK with news

	// RACK, RFC 8985 section 6.
	everRxt   int64    // end of what was ever retransmitted
	resent    []resent // retransmissions that may be under way, the oldest first
	lostAgain rangeSet // retransmissions that are lost, and were not SACKed since
	passed    int64    // what is below was sent before a retransmission that has arrived
	doubt     int64    // what is below is lost when the reordering window ends
	sure      int64    // what is below is lost: the window has ended
	reorder   reorderState
}

// resent is a range that was retransmitted when nxt was mark: what is at mark or
// above was sent later.
type resent struct {
	span
	mark int64
	at   Time
}

// reorderState is what is known of reordering in the network (RFC 8985 section
// 6.2 steps 3 and 4).
type reorderState struct {
	seen    bool
	more    uint8 // RACK.reo_wnd_mult less 1
	persist uint8 // recoveries until more is 0 again: RACK.reo_wnd_persist
	round   int64 // nxt when more grew: RACK.dsack_round
}

const reorderPersist = 16

// window returns the reordering window for a round trip of rtt.
func (r *reorderState) window(rtt time.Duration) time.Duration {
	return min(rtt/4*time.Duration(1+r.more), rtt)
}

// duplicate takes news of data that has come twice: what was sent again had not
// been lost, and the window is too small. It grows once in a round trip.
func (r *reorderState) duplicate(una, nxt int64) {
	if una >= r.round {
		r.more, r.persist, r.round = min(r.more+1, 3), reorderPersist, nxt
	}
}

// recovered takes the end of a recovery.
func (r *reorderState) recovered() {
	if r.persist > 0 {
		r.persist--
	}
	if r.persist == 0 {
		r.more = 0
	}
}

// left returns the bytes that have left the network above una: they were
// SACKed, or duplicate ACKs stand for them. No more of these count than there can be:
// two before recovery (RFC 3042), and in it one for each segment behind the lost one
// that was in flight a round trip ago (RFC 5681 section 3.2, step 4).
func (l *lossState) left(una, nxt, mss int64) int64 {
	if l.sack {
		return l.sacked.size()
	}
	most := min(nxt-una-mss, (dupThresh-1)*mss)
	if l.phase != phaseOpen {
		most = l.dupEdge - una - mss
	}
	return min(l.dupAcks*mss, max(0, most))
}

// lostEdge returns the offset below which everything that the peer does not
// hold counts as lost: IsLost of RFC 6675 section 4, as a threshold.
func (l *lossState) lostEdge(una, nxt, mss int64) int64 {
	switch {
	case l.phase == phaseRTO:
		return l.recover
	case !l.sack && l.phase == phaseFast:
		// What is above recover was sent later than what is known to be lost.
		return min(una+mss, l.recover)
	case l.phase == phaseFast && !l.reorder.seen:
		// RFC 8985 section 6.2 step 4: in recovery the reordering window is 0.
		return max(una, l.orderEdge())
	}
	una = max(una, l.sure)
	var bytes int64
	for i := len(l.sacked) - 1; i >= 0; i-- {
		s := l.sacked[i]
		bytes += s.end - s.start
		if len(l.sacked)-i >= dupThresh || bytes > (dupThresh-1)*mss {
			return max(una, s.start)
		}
	}
	return una
}

// orderEdge returns the offset below which everything was sent before something
// that has arrived. If the network does not reorder it is lost.
func (l *lossState) orderEdge() int64 {
	if n := len(l.sacked); n > 0 {
		return max(l.passed, l.sacked[n-1].start)
	}
	return l.passed
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
		p += l.missing(una, l.highRxt) - l.missing(una, l.lostEdge(una, nxt, mss)) - l.lostAgain.size()
	}
	return max(0, p)
}

// nextLost returns the next range to retransmit because it is lost: rule 1 of
// NextSeg, RFC 6675 section 4.
func (l *lossState) nextLost(una, nxt, mss int64) span {
	if len(l.lostAgain) > 0 {
		s := l.lostAgain[0]
		return span{s.start, min(s.end, s.start+mss)}
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
func (l *lossState) sentTail(now Time, s span, nxt int64, again bool) {
	l.tailAgain = again || l.tailEnd != 0 && l.tailAgain
	l.tailEnd = nxt
	if again {
		l.watch(now, s, nxt)
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
	l.phase, l.recover, l.highRxt, l.dupEdge = p, nxt, una, nxt
	l.rescued, l.rtxDue, l.limited = false, true, 0
	l.resent, l.lostAgain = l.resent[:0], l.lostAgain[:0]
	l.tailDue, l.tailEnd, l.probes = false, 0, 0
	l.cut = nxt
	if p == phaseRTO {
		// RFC 2018 section 8: after a timeout the peer may have reneged.
		l.sacked = l.sacked[:0]
		l.dupAcks, l.passed, l.doubt, l.sure = 0, 0, 0, 0
	}
}

// leave ends recovery.
func (l *lossState) leave() {
	l.phase, l.dupAcks, l.limited, l.rtxDue = phaseOpen, 0, 0, false
	l.resent, l.lostAgain = l.resent[:0], l.lostAgain[:0]
	l.reorder.recovered()
}

// release gives the memory back when nothing is outstanding.
func (l *lossState) release() { l.sacked, l.resent, l.lostAgain = nil, nil, nil }

// sentAgain notes that s was retransmitted.
func (l *lossState) sentAgain(now Time, s span, nxt int64) {
	l.highRxt = max(l.highRxt, s.end)
	l.lostAgain.remove(s.start, s.end)
	l.watch(now, s, nxt)
}

// watch notes that s was retransmitted, to find out if that is lost. Of two
// retransmissions of the same data the later one counts.
func (l *lossState) watch(now Time, s span, nxt int64) {
	l.everRxt = max(l.everRxt, s.end)
	if !l.sack {
		return
	}
	l.resent = slices.DeleteFunc(l.resent, func(r resent) bool { return r.start < s.end && s.start < r.end })
	if len(l.resent) < maxResent {
		l.resent = append(l.resent, resent{s, nxt, now})
	}
}

// findLostAgain finds the retransmissions that are lost: something sent later has
// arrived (RFC 8985 section 6.2). It reports whether there is any that was sent
// since cwnd was reduced last.
func (l *lossState) findLostAgain(now Time, una, mss int64, minRTT time.Duration) bool {
	if len(l.resent) == 0 {
		return false
	}
	// Step 2: the latest that has arrived, by offset and among the retransmissions.
	// The ACK of one that came in no time is that of its original.
	arrived, latest := una, len(l.resent)-1
	if n := len(l.sacked); n > 0 {
		arrived = l.sacked[n-1].end
	}
	for ; latest >= 0; latest-- {
		if r := &l.resent[latest]; l.holds(una, r.span) && now.Sub(r.at) >= minRTT {
			l.passed = max(l.passed, r.mark)
			break
		}
	}
	if l.reorder.seen { // a lead of dupThresh segments is needed
		arrived -= (dupThresh - 1) * mss
		latest -= dupThresh - 1
	}
	// Step 5: what was sent before that.
	news, keep := false, l.resent[:0]
	for i, r := range l.resent {
		switch {
		case l.holds(una, r.span):
		case i < latest || r.mark < arrived:
			news = news || r.mark >= l.cut
			for gap := l.sacked.nextGap(max(una, r.start), r.end); gap.start < gap.end; gap = l.sacked.nextGap(gap.end, r.end) {
				l.lostAgain.add(gap.start, gap.end)
			}
		default:
			keep = append(keep, r)
		}
	}
	l.resent = keep
	if l.phase == phaseOpen {
		// A probe has arrived, two round trips later than what was sent before it.
		l.lostAgain = l.lostAgain[:0]
		l.sure = max(l.sure, l.passed)
	}
	return news
}

// holds reports whether the peer has the end of s.
func (l *lossState) holds(una int64, s span) bool {
	_, held := l.sacked.find(s.end - 1)
	return held || s.end <= una
}

// advance takes a cumulative ACK of n bytes up to una, and reports whether it
// ended a recovery.
func (l *lossState) advance(una, nxt, n, mss int64) (ended bool) {
	if len(l.sacked) > 0 && una-n >= l.everRxt {
		l.reorder.seen = true // a gap was filled without a retransmission (RFC 8985 section 6.2 step 3)
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
		l.highRxt, l.rtxDue, l.dupEdge = una, true, nxt
	}
	return false
}

// PathMTU takes the news that the segment that began at seq was too long for the
// network, which has room for mss bytes of payload and options in one. It reports
// false, and does nothing, if no such segment is in flight, which is what somebody
// would have to guess who is not on the way (RFC 5927 sections 4.1 and 7), or if segments
// are that short already.
//
// What is in flight is sent again, in segments of that size: how it was cut is not
// remembered. The congestion window stays (RFC 8201 section 5.4): this is no
// sign of congestion.
func (t *TCB) PathMTU(now Time, mss int, seq uint32) bool {
	now = t.clock(now)
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
