package tcp

import "time"

// Segment arrival: RFC 9293 section 3.10.7, with the checks of RFC 5961
// (challenge ACKs) and RFC 7323 section 5 (PAWS). A function is a step.

// windowSlack is how far behind the receive buffer bytes are taken that were
// promised by rounding the window up to its scale, in units of the scale.
const windowSlack = 1024

// Input takes one segment. Payload is copied. The caller then calls Output
// until it returns 0.
func (t *TCB) Input(now Time, seg *Segment) {
	now = t.clock(now)
	switch t.state {
	case Closed:
	case SynSent:
		t.inputSynSent(now, seg)
	case TimeWait:
		t.inputTimeWait(now, seg)
	default:
		t.inputOtherwise(now, seg)
	}
}

// inputSynSent is section 3.10.7.3.
func (t *TCB) inputSynSent(now Time, seg *Segment) {
	ack := t.snd.seq.unwrap(seg.Ack, t.snd.una)
	hasAck := seg.Flags&ACK != 0
	if hasAck && (ack <= 0 || ack > t.snd.nxt) {
		t.answerReset(seg)
		return
	}
	if seg.Flags&RST != 0 {
		if hasAck {
			t.close(Refused)
		}
		return
	}
	if seg.Flags&SYN == 0 {
		return
	}
	t.takeSYN(now, seg)
	if !hasAck { // simultaneous open
		t.state = SynReceived
		t.synDue = true
		return
	}
	t.establish(now, seg, 0, ack)
	t.ackDue = true
	t.inputText(now, 1, seg)
}

// inputTimeWait is what section 3.10.7.4 leaves for TIME-WAIT. The caller has
// asked MayReplace first.
func (t *TCB) inputTimeWait(now Time, seg *Segment) {
	// Deviation: a reset does not end TIME-WAIT (RFC 1337 section 3, fix F1).
	if seg.Flags&RST != 0 {
		return
	}
	off := t.rcv.seq.unwrap(seg.Seq, t.rcv.nxt)
	if seg.Flags&FIN != 0 && off+int64(len(seg.Payload)) == t.rcv.fin {
		t.ackDue = true
		t.enterTimeWait(now)
		return
	}
	// What is acceptable and has no text has no answer, or two ends in TIME-WAIT would
	// go on to answer each other.
	if seg.Len() == 0 && t.acceptable(off, 0) && t.pawsOK(now, seg) {
		t.noteTimestamp(now, off, seg)
		return
	}
	t.challenge(now)
}

// inputOtherwise is section 3.10.7.4, in its order but for the reset, to which
// PAWS does not apply, and the SYN, whose sequence number does not matter.
func (t *TCB) inputOtherwise(now Time, seg *Segment) {
	off := t.rcv.seq.unwrap(seg.Seq, t.rcv.nxt)
	switch {
	case seg.Flags&RST != 0:
		t.inputReset(now, off)
		return
	case seg.Flags&SYN != 0:
		if !t.inputSYN(now, off, seg) {
			return
		}
		off++ // the SYN of a SYN-ACK is spent
	}
	if !t.pawsOK(now, seg) {
		t.refuse(now, off, seg)
		return
	}
	ok := seg.Flags&SYN != 0 || t.acceptable(off, seg.Len())
	if !ok {
		t.refuse(now, off, seg)
		// At a closed window the ACK counts all the same (MUST-66), and so it does
		// from a peer that has filled the window while we miss some of it.
		if off != t.rcv.nxt && off != t.rcv.adv {
			t.hearBelow(now, off, seg)
			return
		}
	}
	if seg.Flags&ACK != 0 && t.inputAck(now, off, seg) && ok {
		t.inputText(now, off, seg)
	}
}

// acceptable is the first check of section 3.10.7.4, table 6; a segment that
// covers the whole window and more is acceptable too.
func (t *TCB) acceptable(off, n int64) bool {
	switch {
	case n > 0:
		return off < t.rcv.adv && off+n > t.rcv.nxt
	case t.rcv.adv == t.rcv.nxt:
		return off == t.rcv.nxt
	}
	return off >= t.rcv.nxt && off < t.rcv.adv
}

// refuse answers a segment that is not acceptable with an ACK. One without data
// gets it only so often, so that two confused ends do not keep each other busy.
func (t *TCB) refuse(now Time, off int64, seg *Segment) {
	if len(seg.Payload) == 0 && seg.Flags&FIN == 0 {
		t.challenge(now)
		return
	}
	t.recvBuf.noteDuplicate(off, min(off+int64(len(seg.Payload)), t.recvBuf.nxt))
	t.ackDue, t.ackUrgent = true, true
}

// challenge sends an ACK, unless the last one was just now (RFC 5961 section 7).
func (t *TCB) challenge(now Time) {
	if t.challenged == 0 || now.Sub(t.challenged) >= challengePause {
		t.challenged = now
		t.ackDue, t.ackUrgent = true, true
	}
}

// inputReset is RFC 5961 section 3.2: only the exact sequence number resets.
func (t *TCB) inputReset(now Time, off int64) {
	switch {
	case off == t.rcv.nxt && t.state == SynReceived && t.active:
		t.close(Refused)
	case off == t.rcv.nxt:
		t.close(Reset)
	case off > t.rcv.nxt && off < t.rcv.adv:
		t.challenge(now)
	}
}

// inputSYN is RFC 5961 section 4.2: a SYN is answered with an ACK whatever its
// sequence number. It reports true for the SYN-ACK that ends a simultaneous open.
func (t *TCB) inputSYN(now Time, off int64, seg *Segment) bool {
	if t.state == SynReceived && off == 0 {
		if seg.Flags&ACK != 0 && t.active {
			return true
		}
		if t.challenged == 0 || now.Sub(t.challenged) >= challengePause {
			t.challenged = now
			t.synDue = true // the SYN-ACK was lost
		}
		return false
	}
	t.challenge(now)
	return false
}

// pawsOutdated is how long a timestamp is remembered (RFC 7323 section 5.5).
const pawsOutdated = 24 * 24 * time.Hour

// pawsOK is RFC 7323 section 5.3 R1.
//
// Deviation: section 3.2 says that a segment without timestamps SHOULD be
// dropped once they are negotiated. It is accepted, as the field does.
func (t *TCB) pawsOK(now Time, seg *Segment) bool {
	return !t.timestamps || !seg.HasTimestamps || !tsBefore(seg.TSVal, t.tsRecent) ||
		now.Sub(t.tsRecentAt) > pawsOutdated
}

// noteTimestamp is RFC 7323 section 4.3: the timestamp to echo is that of the
// segment at the left edge of what was not acknowledged yet.
func (t *TCB) noteTimestamp(now Time, off int64, seg *Segment) {
	if t.timestamps && seg.HasTimestamps && off <= t.rcv.acked {
		t.tsRecent, t.tsRecentAt = seg.TSVal, now
	}
}

// inputAck is step 5. It reports whether the rest of the segment counts.
func (t *TCB) inputAck(now Time, off int64, seg *Segment) bool {
	ack := t.snd.seq.unwrap(seg.Ack, t.snd.una)
	if t.state == SynReceived {
		if ack <= t.snd.una || ack > t.snd.nxt {
			t.answerReset(seg)
			return false
		}
		t.noteTimestamp(now, off, seg)
		t.establish(now, seg, off, ack)
		return true
	}
	if !t.possible(ack) {
		t.challenge(now)
		return false
	}
	t.noteTimestamp(now, off, seg)
	t.heard(now)
	wnd := t.snd.wnd
	t.updateWindow(off, ack, seg)
	switch {
	case ack > t.snd.una:
		t.acked(now, ack, seg)
	case ack == t.snd.una:
		// RFC 5681 section 2: what a duplicate ACK is. At a closed window it is
		// the answer to a probe.
		dup := t.snd.nxt > t.snd.una && seg.Len() == 0 && t.snd.wnd == wnd && wnd > 0
		t.duplicateAck(now, seg, dup)
	default:
		t.takeBlocks(seg)
		t.useBlocks(now)
	}
	return t.state != Closed
}

// possible reports whether ack is none of what was not sent, nor of what is too old
// (RFC 5961 section 5.2).
func (t *TCB) possible(ack int64) bool {
	return ack <= t.snd.nxt && ack >= t.snd.una-t.snd.maxWnd
}

// hearBelow takes a segment that is not acceptable as a sign of life, if it lies below
// the window: a probe of a closed window, or what the peer sends again while our ACKs
// are lost. Nothing else in it counts.
func (t *TCB) hearBelow(now Time, off int64, seg *Segment) {
	ack := t.snd.seq.unwrap(seg.Ack, t.snd.una)
	if off < t.rcv.nxt && seg.Flags&(SYN|ACK) == ACK && t.synchronized() && t.possible(ack) {
		t.heard(now)
	}
}

// establish ends the handshake: the peer has acknowledged the SYN.
func (t *TCB) establish(now Time, seg *Segment, off, ack int64) {
	t.state = Established
	if t.finQueued {
		t.state = FinWait1
	}
	t.synDue = false
	t.events |= EventConnected | EventWritable
	lost := t.retries > 0
	t.snd.wl1, t.snd.wl2 = off, ack
	t.setWindow(seg)
	t.heard(now)
	t.acked(now, ack, seg)
	if lost {
		// RFC 6298 section 5.7 and RFC 5681 section 3.1: the SYN was lost.
		t.reno.cwnd = t.mss()
		t.rtt.backoff = 0
		if t.rtt.srtt == 0 {
			t.rtt.rto = synLossRTO
		}
	}
}

// updateWindow takes SEG.WND unless an older segment brings it.
//
// Deviation: one that acknowledges something new always brings it. By WL1 and WL2
// alone, a segment that came out of order would hide the windows of those in front
// of it, while SND.UNA, and with it the right edge, moves on.
func (t *TCB) updateWindow(off, ack int64, seg *Segment) {
	if ack < t.snd.una {
		return
	}
	if ack > t.snd.una || t.snd.wl1 < off || t.snd.wl1 == off && t.snd.wl2 <= ack {
		t.snd.wl1, t.snd.wl2 = off, ack
		t.setWindow(seg)
	}
}

func (t *TCB) setWindow(seg *Segment) {
	t.snd.wnd = int64(seg.Window)
	if seg.Flags&SYN == 0 {
		t.snd.wnd <<= t.snd.scale
	}
	t.snd.maxWnd = max(t.snd.maxWnd, t.snd.wnd)
}

// acked takes a cumulative ACK that is new.
func (t *TCB) acked(now Time, ack int64, seg *Segment) {
	flightBefore := t.snd.una
	n := ack - t.snd.una
	t.sampleRTT(now, ack, seg)
	t.snd.una = ack
	t.sendBuf.ack(ack)
	t.retries = 0
	t.disarm(timerRexmt) // Output starts it again if something is outstanding
	// A quarter of the buffer: a writer that is woken for every ACK writes crumbs.
	if t.blocked && t.sendBuf.free() >= t.sendBuf.room()/4 && t.canSend() {
		t.blocked = false
		t.events |= EventWritable
	}
	t.tailWanted = true
	twice := t.takeDuplicate(seg, ack)
	t.loss.probes = 0
	if t.loss.tailAcked(ack, twice) && t.loss.phase == phaseOpen {
		t.reno.halve(t.reno.cwnd, t.mss())
		t.reno.cwnd = t.reno.ssthresh
	}
	slow := t.loss.phase == phaseRTO
	ended := t.loss.advance(ack, t.snd.nxt, n, t.mss())
	t.takeBlocks(seg)
	switch {
	case ended && !slow:
		// RFC 6582 section 3.2 step 3, between its options: no long burst follows.
		t.reno.cwnd = min(t.reno.ssthresh, t.snd.nxt-ack+4*t.mss())
	case t.loss.phase == phaseFast:
	case flightBefore < t.limitedAt || slow:
		// A cwnd that was not used does not grow (RFC 7661 section 4.3 has why).
		// Who gets several segments as one acknowledges them at once.
		limit := max(2, int64(t.cfg.Offload)/t.mss())
		if slow {
			limit = 1 // RFC 3465 section 2.3
		}
		t.reno.onAck(n, t.mss(), limit)
	}
	if t.loss.sack {
		t.useBlocks(now)
	}
	if ack == t.snd.nxt {
		t.loss.release()
	}
	if t.orphan && t.armed(timerEnd) && (ack >= t.orphanGoal || ack > t.sendBuf.end) {
		t.orphanGoal = ack + orphanBytes
		t.arm(timerEnd, now, orphanTime)
	}
	if t.finQueued && ack > t.sendBuf.end {
		t.finAcked(now)
	}
}

// finAcked is the last part of step 5: the peer has everything.
func (t *TCB) finAcked(now Time) {
	switch t.state {
	case FinWait1:
		t.state = FinWait2
	case Closing:
		t.enterTimeWait(now)
	case LastAck:
		t.close(None)
	}
}

// sampleRTT measures the round trip that ack ends, by the segment that is timed
// or by the echoed timestamp (RFC 7323 section 4.1). Segments that were sent
// again are never timed (Karn).
func (t *TCB) sampleRTT(now Time, ack int64, seg *Segment) {
	if t.timing {
		if ack > t.timedSeq {
			t.timing = false
			t.rtt.timed(now.Sub(t.timedAt))
		}
		return
	}
	if t.timestamps && seg.HasTimestamps && seg.TSEcr != 0 {
		m := time.Duration(int32(t.tsVal(now)-seg.TSEcr)) * time.Millisecond
		if m >= 0 && m <= now.Sub(t.start)+time.Millisecond {
			if (m-t.rtt.srtt).Abs() < time.Millisecond && t.rtt.srtt > 0 {
				m = t.rtt.srtt // the clock is too coarse to tell the difference
			}
			t.rtt.sample(m)
		}
	}
}

// takeBlocks enters the SACK blocks in the scoreboard and returns how many bytes
// are new there. Blocks that make no sense are ignored (RFC 2018 section 5).
func (t *TCB) takeBlocks(seg *Segment) int64 {
	if !t.loss.sack {
		return 0
	}
	var fresh, top int64
	if n := len(t.loss.sacked); n > 0 {
		top = t.loss.sacked[n-1].end
	}
	for _, b := range seg.SACK[:seg.Blocks] {
		left := t.snd.seq.unwrap(b.Left, t.snd.una)
		right := t.snd.seq.unwrap(b.Right, t.snd.una)
		left = max(left, t.snd.una)
		if left >= right || right > t.snd.nxt || b.Right == b.Left || int32(b.Right-b.Left) < 0 {
			continue
		}
		if len(t.loss.sacked) >= maxSacked && t.loss.sacked.wouldSplit(left, right) {
			continue
		}
		few := len(t.loss.sacked) < maxBlocks-1 // an ACK had room for all
		news := t.loss.sacked.nextGap(left, right)
		n := t.loss.sacked.add(left, right)
		if n > 0 && few && news.start < top && news.start >= t.loss.everRxt {
			t.loss.reorder.seen = true // sent once, and before what was SACKed before
		}
		fresh += n
		t.loss.lostAgain.remove(left, right)
	}
	if fresh > 0 {
		t.loss.probes, t.tailWanted = 0, true
	}
	return fresh
}

// duplicateAck takes an ACK that does not advance. With SACK one counts that
// brings news (RFC 6675 section 2), without it one that has nothing else to say.
func (t *TCB) duplicateAck(now Time, seg *Segment, dup bool) {
	if t.loss.sack {
		t.takeDuplicate(seg, t.snd.una)
		dup = t.takeBlocks(seg) > 0
	}
	if !dup {
		return
	}
	if t.loss.phase != phaseRTO {
		t.loss.dupAcks++
	}
	if t.loss.sack {
		t.useBlocks(now)
	} else if t.loss.phase == phaseOpen {
		t.detectLoss()
	}
}

// takeDuplicate reports whether the first block is a D-SACK (RFC 2883 section 4): it
// is below ack, or within the second one. Where the network reorders, what has come
// twice was sent again too early, unless it was a probe or after a timeout.
func (t *TCB) takeDuplicate(seg *Segment, ack int64) bool {
	if seg.Blocks == 0 || !t.loss.sack {
		return false
	}
	offset := func(n uint32) int64 { return t.snd.seq.unwrap(n, ack) }
	first, second := seg.SACK[0], seg.SACK[1]
	twice := offset(first.Right) <= ack || seg.Blocks > 1 &&
		offset(first.Left) >= offset(second.Left) && offset(first.Right) <= offset(second.Right)
	if twice && t.loss.reorder.seen && t.loss.tailEnd == 0 && t.loss.phase != phaseRTO {
		t.loss.reorder.duplicate(t.snd.una, t.snd.nxt)
	}
	return twice
}

// useBlocks looks for losses that the scoreboard shows: RACK_detect_loss of RFC
// 8985 section 6.2.
func (t *TCB) useBlocks(now Time) {
	una, nxt, mss := t.snd.una, t.snd.nxt, t.mss()
	l := &t.loss
	again := l.findLostAgain(now, una, mss, t.rtt.min)
	edge := l.lostEdge(una, nxt, mss)
	switch {
	case l.phase == phaseOpen:
		t.detectLoss()
	case again || l.phase == phaseFast && l.missing(max(una, l.recover), max(una, edge)) > 0:
		// What was sent in this recovery is lost too: RFC 5681 section 4.3.
		t.reno.halve(t.reno.cwnd, mss)
		t.reno.cwnd = min(t.reno.cwnd, t.reno.ssthresh)
		l.cut = nxt
		if l.phase == phaseFast {
			l.recover = nxt
		}
	}
	// Step 5: what is not lost yet may be when the reordering window ends.
	if una >= l.doubt {
		t.disarm(timerReorder)
	}
	if d := l.orderEdge(); l.phase != phaseRTO && d > l.lostEdge(una, nxt, mss) && !t.armed(timerReorder) {
		l.doubt = d
		t.arm(timerReorder, now, max(l.reorder.window(t.rtt.srtt), reorderFloor))
	}
}

// detectLoss begins fast recovery if what is known says that a segment is lost:
// RFC 5681 section 3.2, RFC 6675 section 5.
func (t *TCB) detectLoss() {
	una, nxt, mss := t.snd.una, t.snd.nxt, t.mss()
	if una <= t.loss.recover && !t.loss.sack {
		return // RFC 6582 section 3.2 step 2: these are of the last recovery
	}
	if t.loss.dupAcks < dupThresh && (!t.loss.sack || t.loss.lostEdge(una, nxt, mss) <= una) {
		return
	}
	t.enterRecovery()
}

// enterRecovery begins fast recovery.
func (t *TCB) enterRecovery() {
	t.reno.halve(t.snd.nxt-t.snd.una-t.loss.limited, t.mss())
	t.reno.cwnd = t.reno.ssthresh
	t.loss.enter(phaseFast, t.snd.una, t.snd.nxt)
	t.timing = false
	t.disarm(timerReorder)
	t.disarm(timerTail)
}

// inputText is steps 7 and 8: the data of the segment, and its FIN.
func (t *TCB) inputText(now Time, off int64, seg *Segment) {
	switch t.state {
	case Established, FinWait1, FinWait2:
	default:
		// The peer has closed: there is nothing to come (step 7).
		t.ackDue = t.ackDue || len(seg.Payload) > 0 || seg.Flags&FIN != 0
		return
	}
	p := seg.Payload
	end := off + int64(len(p))
	if end > t.rcv.nxt && len(p) > 0 && t.orphan {
		// RFC 9293 section 3.6.1: nobody will read this.
		t.answerReset(seg)
		t.close(Aborted)
		return
	}
	if seg.Flags&FIN != 0 {
		t.noteFIN(end)
	}
	if len(p) > 0 {
		t.takeData(now, off, p, seg.Flags&PSH != 0)
	}
	if t.rcv.fin != 0 && t.rcv.nxt == t.rcv.fin {
		t.rcv.nxt++
		t.takeFIN(now)
	}
	if seg.Flags&FIN != 0 {
		t.ackDue = true
	}
}

// noteFIN remembers where the peer's data ends. The first word on it is final.
func (t *TCB) noteFIN(off int64) {
	if t.rcv.fin == 0 && off >= t.recvBuf.live().end && off < t.rcv.adv {
		t.rcv.fin = off
	}
}

// takeData is step 7. ACKs follow RFC 5681 section 4.2: at once for more than a
// full segment and for anything out of the ordinary, else delayed. For some full
// segments after a gap no ACK is delayed: the peer's window is small then, and
// each one counts.
func (t *TCB) takeData(now Time, off int64, p []byte, push bool) {
	limit := min(t.rcv.adv, t.recvBuf.base+t.recvBuf.max+windowSlack<<t.rcv.scale)
	if t.rcv.fin != 0 {
		limit = min(limit, t.rcv.fin)
	}
	if off >= limit {
		t.ackDue, t.ackUrgent = true, true
		return
	}
	p = p[:min(int64(len(p)), limit-off)]
	inOrder := len(t.recvBuf.ooo) == 0
	n := t.recvBuf.insert(off, p)
	t.rcv.nxt += n
	t.rcv.mss = min(max(t.rcv.mss, int64(len(p))), int64(t.cfg.MSS))
	if n == 0 || !inOrder || off < t.rcv.nxt-n {
		t.ackDue, t.ackUrgent, t.rcv.quick = true, true, quickAcks
		t.rcv.smooth = t.rcv.nxt
	} else if t.rcv.nxt-t.rcv.acked > t.ackEvery(push) {
		t.ackDue = true
	} else if t.rcv.quick > 0 && int64(len(p)) == t.rcv.mss {
		t.ackDue = true
		t.rcv.quick--
	} else if at := now.Add(t.delack()); !t.armed(timerDelack) || at < t.timers[timerDelack] {
		t.timers[timerDelack] = at
	}
	if t.discard {
		t.recvBuf.skip()
	}
	if n > 0 {
		t.events |= EventReadable
		t.pushed = t.pushed || push || int64(len(p)) < max(t.rcv.mss, int64(t.cfg.DefaultMSS))
	}
}

const (
	// smoothBytes are to arrive one behind the other before ACKs become fewer: by then
	// the peer's window has grown.
	smoothBytes = 1 << 20
	stretchAck  = 32 << 10 // the most that such an ACK waits for
)

// ackEvery returns how many bytes an ACK waits for while more arrive.
//
// Deviation: RFC 5681 section 4.2 says that there SHOULD be an ACK for at least every
// second full segment. A stream without gaps or pauses is acknowledged as by a receiver
// whose network card puts segments together: at the end of what the peer has sent at a
// time (PSH), or after a small part of the window that it was last told of.
func (t *TCB) ackEvery(push bool) int64 {
	if push || !t.smooth() {
		return t.rcv.mss
	}
	return max(t.rcv.mss, min(stretchAck, (t.rcv.adv-t.rcv.acked)/16))
}

// delack returns for how long an ACK may be delayed: where many segments wait for one,
// the peer may have come to the end of its window.
func (t *TCB) delack() time.Duration {
	if t.smooth() {
		return delackShort
	}
	return delackTimeout
}

func (t *TCB) smooth() bool { return t.rcv.nxt-t.rcv.smooth >= smoothBytes }

// takeFIN is step 8: everything up to the FIN has been received.
func (t *TCB) takeFIN(now Time) {
	t.ackDue = true
	t.events |= EventReadable
	switch t.state {
	case Established:
		t.state = CloseWait
	case FinWait1: // its FIN is not acknowledged, or the state would be FIN-WAIT-2
		t.state = Closing
	case FinWait2:
		t.enterTimeWait(now)
	}
}

// answerReset sends the reset that RFC 9293 section 3.5.3 has for an ACK that
// cannot be.
func (t *TCB) answerReset(seg *Segment) {
	if seg.Flags&RST == 0 {
		t.rstDue, t.rstAck, t.rst = true, false, seg.Ack
	}
}
