package tcp

import "time"

// What to send next: RFC 9293 sections 3.8.6 (windows, silly-window avoidance)
// and 3.10.2 (SEND), NextSeg of RFC 6675 section 4. To decide and to build are
// one step, so that there is one account of what is due.

// Output writes the segment that is due to buf and returns its length; 0 when nothing
// is due. In the place of its checksum stands the sum of its payload (RFC 1071, not
// complemented), which is taken on the way; or 0 if Config.Offload has the link complete
// it. buf needs MaxHeaderLen and a segment's payload, or
// that of Config.Offload if that is more. One with more payload than SegmentSize is
// to be cut there by whoever has it next: all parts have its header, but for the
// sequence number, and PSH and FIN, which are the last one's.
func (t *TCB) Output(now Time, buf []byte) int {
	now = t.clock(now)
	switch {
	case t.rstDue:
		return t.outputReset(now, buf)
	case t.state == Closed:
		return 0
	case t.synDue:
		return t.outputSYN(now, buf)
	}
	if t.synchronized() && t.state != TimeWait {
		if s, kind := t.nextSegment(now); kind != sendNothing {
			return t.outputData(now, buf, s, kind)
		}
		t.guardOutstanding(now)
	}
	switch {
	case t.probeDue:
		// SND.UNA-1 without data: the peer must answer with an ACK.
		t.probeDue = false
		return t.output(now, buf, &Segment{Seq: t.snd.seq.wrap(t.snd.una - 1), Flags: ACK}, 0)
	case t.ackDue:
		return t.output(now, buf, &Segment{Seq: t.snd.seq.wrap(t.ackSeq()), Flags: ACK}, 0)
	}
	return 0
}

// Quiet reports whether nothing is due, nothing is on its way to the peer and nothing
// waits to be: Output would return 0 and change nothing. It is for a receiver, of whose
// calls of Output every other one would be in vain.
func (t *TCB) Quiet() bool {
	return !t.ackDue && !t.probeDue && !t.rstDue && !t.synDue && !t.tailWanted &&
		t.snd.una == t.snd.nxt && !t.pending() &&
		!t.armed(timerRexmt) && !t.armed(timerPersist) && !t.armed(timerTail)
}

// ackSeq returns the sequence number of an ACK without data: SND.NXT, unless the
// peer has shrunk its window below that. It would drop the ACK then, so this one
// lies in the window (as does that of Linux, tcp_acceptable_seq).
func (t *TCB) ackSeq() int64 {
	if edge := t.snd.una + t.snd.wnd; edge < t.snd.nxt && t.synchronized() {
		return max(t.snd.una, edge-1)
	}
	return t.snd.nxt
}

// outputReset is the last segment of a connection, or the answer to one that
// does not belong to it.
func (t *TCB) outputReset(now Time, buf []byte) int {
	t.rstDue = false
	seg := Segment{SrcPort: t.cfg.LocalPort, DstPort: t.cfg.RemotePort, Seq: t.rst, Flags: RST}
	if t.rstAck {
		seg.Flags |= ACK
		seg.Ack = t.rcv.seq.wrap(t.rcv.nxt)
		t.stamp(now, &seg)
	}
	return seg.MarshalHeader(buf)
}

// outputSYN sends the SYN, or the SYN-ACK. Options are answered, not offered,
// to a peer that began (RFC 7323 section 2.2 and 3.2, RFC 2018 section 2).
func (t *TCB) outputSYN(now Time, buf []byte) int {
	t.synDue = false
	seg := Segment{
		Seq: t.snd.seq.wrap(0), Flags: SYN, MSS: uint16(t.cfg.MSS),
		SACKPermitted: t.loss.sack, HasScale: !t.scaleRefused, Scale: t.rcv.scale,
	}
	if t.state == SynReceived {
		seg.Flags |= ACK
	}
	t.timing = t.snd.nxt == 0 // sent again, it is not timed
	t.snd.nxt, t.timedSeq, t.timedAt = 1, 0, now
	if !t.armed(timerRexmt) {
		t.arm(timerRexmt, now, t.rtt.timeout())
	}
	return t.output(now, buf, &seg, 0)
}

// sendKind says why data is sent.
type sendKind uint8

const (
	sendNothing sendKind = iota
	sendNew
	sendAgain
	sendRescue // sent again without a mark in HighRxt
	sendTail   // a tail loss probe that is sent again
)

// nextSegment chooses the offsets to send: NextSeg of RFC 6675 section 4 within
// the windows of both sides.
func (t *TCB) nextSegment(now Time) (span, sendKind) {
	t.restartIdle(now)
	una, nxt, mss := t.snd.una, t.snd.nxt, t.mss()
	l := &t.loss
	if l.rtxDue {
		l.rtxDue = false
		gap := l.sacked.nextGap(una, nxt)
		gap.end = min(gap.end, gap.start+mss)
		if s, ok := t.withinWindow(gap); ok {
			return s, sendAgain
		}
	}
	if l.tailDue {
		l.tailDue = false
		if s, kind := t.tailProbe(now); kind != sendNothing {
			return s, kind
		}
	}
	room := t.reno.cwnd - l.pipe(una, nxt, mss)
	if l.phase != phaseOpen && room >= mss {
		if s, ok := t.withinWindow(l.nextLost(una, nxt, mss)); ok {
			return s, sendAgain
		}
	}
	if s, ok := t.newData(now, room); ok {
		return t.withFollowers(s, room), sendNew
	}
	if l.phase == phaseFast && room >= mss {
		rescued := l.rescued
		if s, ok := t.withinWindow(l.nextDoubtful(una, nxt, mss)); ok {
			if l.rescued != rescued {
				return s, sendRescue
			}
			return s, sendAgain
		}
	}
	return span{}, sendNothing
}

// tailProbe chooses what to send as a tail loss probe: new data, whatever cwnd
// says, or else the last segment again (RFC 8985 section 7.3).
func (t *TCB) tailProbe(now Time) (span, sendKind) {
	kind := sendNew
	s, ok := t.newData(now, t.mss()+1)
	if !ok {
		kind = sendTail
		s, ok = t.withinWindow(span{max(t.snd.una, t.snd.nxt-t.mss()), t.snd.nxt})
	}
	if !ok {
		return span{}, sendNothing
	}
	t.loss.sentTail(now, s, max(t.snd.nxt, s.end), kind == sendTail)
	t.timing = t.timing && kind == sendNew
	t.arm(timerRexmt, now, t.rtt.timeout())
	return s, kind
}

// withinWindow cuts s to the peer's window, which may have shrunk since it was
// sent (RFC 9293 SHLD-16).
func (t *TCB) withinWindow(s span) (span, bool) {
	s.end = min(s.end, t.snd.una+t.snd.wnd)
	return s, s.start < s.end
}

// usableWindow is what the peer's window has room for behind SND.NXT.
func (t *TCB) usableWindow() int64 { return t.snd.una + t.snd.wnd - t.snd.nxt }

// pending reports whether data or a FIN waits to be sent for the first time.
func (t *TCB) pending() bool {
	return t.snd.nxt < t.sendBuf.end || t.finQueued && t.snd.nxt == t.sendBuf.end
}

// newData chooses what to send for the first time, if room for it is left in
// the network. There is no Nagle algorithm: what is queued goes.
func (t *TCB) newData(now Time, room int64) (span, bool) {
	if !t.pending() {
		return span{}, false
	}
	nxt, mss := t.snd.nxt, t.mss()
	queued, usable := t.sendBuf.end-nxt, t.usableWindow()
	n := min(queued, mss, usable)
	if n < min(queued, mss) && n < t.snd.maxWnd/2 && !t.override {
		return span{}, false // RFC 9293 section 3.8.6.2.1: a silly segment
	}
	s := span{nxt, nxt + max(n, 0)}
	if t.finQueued && n == queued && n < usable {
		s.end++
	}
	if s.start == s.end {
		return span{}, false
	}
	if max(n, 1) > room { // a FIN goes with the data, even where cwnd is full
		if nxt > t.snd.una || now.Sub(t.lastSend) < t.rtt.timeout() {
			t.limitedAt = nxt
		}
		return span{}, false
	}
	return s, true
}

// withFollowers extends s, new data, by the segments that are due behind it, if the
// link cuts what is longer than one. All but the last are full, so that the cuts are
// where they would have been.
func (t *TCB) withFollowers(s span, room int64) span {
	mss, usable, queued := t.mss(), t.usableWindow(), t.sendBuf.end-s.start
	n := min(queued, usable, room, int64(t.cfg.Offload))
	if n <= mss || s.end-s.start < mss {
		return s
	}
	if n < queued {
		n -= n % mss
	}
	s.end = s.start + n
	if t.finQueued && n == queued && n < usable {
		s.end++
	}
	return s
}

// restartIdle is RFC 5681 section 4.1: after a pause longer than the RTO the
// old cwnd says nothing about the network any more.
func (t *TCB) restartIdle(now Time) {
	if t.snd.nxt == t.snd.una && t.lastSend != 0 && now.Sub(t.lastSend) > t.rtt.timeout() {
		t.reno.cwnd = min(t.reno.cwnd, initialWindow(t.mss()))
	}
}

// outputData builds the segment of the offsets s.
func (t *TCB) outputData(now Time, buf []byte, s span, kind sendKind) int {
	t.override = false
	n := max(0, min(s.end, t.sendBuf.end)-s.start)
	seg := Segment{Seq: t.snd.seq.wrap(s.start), Flags: ACK}
	t.reportBlocks(&seg)
	// One that reports blocks stays alone: its parts would all report them, and a
	// duplicate as if it had come many times.
	if room := t.snd.mss - t.optionsLen(&seg); seg.Blocks > 0 && n > room {
		n = room
		s.end = s.start + n
	}
	if n > 0 && s.start+n == t.sendBuf.end {
		seg.Flags |= PSH
	}
	if s.end > t.sendBuf.end {
		seg.Flags |= FIN
	}
	switch kind {
	case sendNew:
		if t.loss.phase == phaseOpen && t.loss.dupAcks > 0 {
			t.loss.limited += n
		}
		t.snd.nxt = s.end
		// After a timeout a sample is wanted in any case: it ends the backoff.
		if !t.timing && (t.loss.phase == phaseOpen || t.rtt.backoff > 0) {
			t.timing, t.timedSeq, t.timedAt = true, s.start, now
		}
	case sendAgain:
		t.loss.sentAgain(now, s, t.snd.nxt)
	case sendRescue:
		t.loss.everRxt = max(t.loss.everRxt, s.end)
	}
	t.lastSend, t.tailWanted = now, true
	// During fast recovery a retransmission starts the timer again (RFC 6675
	// section 5.1): until its ACK can have come nothing has timed out.
	if !t.armed(timerRexmt) || kind == sendAgain && t.loss.phase == phaseFast {
		t.arm(timerRexmt, now, t.rtt.timeout())
	}
	length := t.output(now, buf, &seg, n)
	payload := buf[length-int(n) : length]
	if t.cfg.Offload > 0 {
		t.sendBuf.ring.read(s.start, payload)
	} else {
		putChecksum(buf, t.sendBuf.ring.readSum(s.start, payload))
	}
	return length
}

// optionsLen returns the length of the options of a segment that is not a SYN.
func (t *TCB) optionsLen(seg *Segment) int64 {
	var n int64
	if t.timestamps {
		n += timestampsLen
	}
	if seg.Blocks > 0 {
		n += 4 + 8*int64(seg.Blocks)
	}
	return n
}

// reportBlocks adds the SACK blocks that are to be reported.
func (t *TCB) reportBlocks(seg *Segment) {
	if !t.loss.sack || !t.recvBuf.hasBlocks() {
		return
	}
	var spans [maxBlocks]span
	n := maxBlocks
	if t.timestamps {
		n--
	}
	n = t.recvBuf.blocks(spans[:n])
	for i, s := range spans[:n] {
		seg.SACK[i] = Block{t.rcv.seq.wrap(s.start), t.rcv.seq.wrap(s.end)}
	}
	seg.Blocks = uint8(n)
}

// output completes the header of seg and writes it, with room for n bytes of
// payload. Every segment acknowledges everything.
func (t *TCB) output(now Time, buf []byte, seg *Segment, n int64) int {
	seg.SrcPort, seg.DstPort = t.cfg.LocalPort, t.cfg.RemotePort
	if seg.Flags&ACK != 0 {
		seg.Ack = t.rcv.seq.wrap(t.rcv.nxt)
		t.rcv.acked = t.rcv.nxt
		t.ackDue, t.ackUrgent = false, false
		t.disarm(timerDelack)
		if n == 0 && seg.Flags&(SYN|FIN) == 0 {
			t.reportBlocks(seg)
		}
	}
	seg.Window = t.advertise(seg.Flags&SYN != 0)
	t.stamp(now, seg)
	return seg.MarshalHeader(buf) + int(n)
}

// stamp adds timestamps if they are in force.
func (t *TCB) stamp(now Time, seg *Segment) {
	if t.timestamps {
		seg.HasTimestamps, seg.TSVal = true, t.tsVal(now)
		if seg.Flags&ACK != 0 {
			seg.TSEcr = t.tsRecent
		}
	}
}

// tsVal is the timestamp clock: milliseconds, from a random offset.
func (t *TCB) tsVal(now Time) uint32 {
	return t.cfg.TSOffset + uint32(now.Sub(t.start)/time.Millisecond)
}

// windowEdge returns the right edge of the window to advertise: the end of the
// buffer, or of what memory there is for it, as far as the window field reaches, unless that would move the edge by
// a silly amount (RFC 9293 section 3.8.6.2.2).
func (t *TCB) windowEdge() int64 {
	room := t.recvBuf.room()
	edge := min(t.recvBuf.base+room, t.rcv.nxt+65535<<t.rcv.scale)
	full := int64(t.cfg.MSS)
	if t.timestamps {
		full -= timestampsLen
	}
	if edge-t.rcv.adv < min(max(full, 1<<t.rcv.scale), room/2) {
		return t.rcv.adv
	}
	return edge
}

// advertise returns the window field of the next segment. The right edge never
// moves left (RFC 9293 SHLD-14), so what the scale cannot express is rounded up
// where it was promised before.
func (t *TCB) advertise(syn bool) uint16 {
	var scale uint8
	if !syn {
		scale = t.rcv.scale
	}
	edge := t.windowEdge()
	w := max(0, edge-t.rcv.nxt) >> scale
	if t.rcv.nxt+w<<scale < t.rcv.adv {
		w = (t.rcv.adv - t.rcv.nxt + 1<<scale - 1) >> scale
	}
	w = min(w, 65535)
	t.rcv.adv = max(t.rcv.adv, t.rcv.nxt+w<<scale)
	return uint16(w)
}

// guardOutstanding keeps a timer on what was sent, or cannot be sent because of
// the peer's window. It runs when there is nothing left to send.
func (t *TCB) guardOutstanding(now Time) {
	outstanding := t.snd.nxt > t.snd.una
	switch {
	case t.snd.wnd <= 0 && (outstanding || t.pending()), !outstanding && t.pending():
		t.disarm(timerRexmt)
		d := t.rtt.timeout()
		if t.usableWindow() > 0 {
			d = overrideTime
		}
		if !t.armed(timerPersist) || t.usableWindow() > 0 && t.timers[timerPersist] > now.Add(d) {
			t.arm(timerPersist, now, d)
		}
		return
	case outstanding && !t.armed(timerRexmt):
		t.arm(timerRexmt, now, t.rtt.timeout())
	case !outstanding:
		t.disarm(timerRexmt)
	}
	t.disarm(timerPersist)
	t.persistBackoff = 0
	if t.tailWanted {
		t.armTail(now)
	}
}
