package tcp

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// flight is a connection with ten segments on their way and ten more queued.
func flight(t *testing.T, options string) *harness {
	t.Helper()
	h := thousand(t, options)
	h.write(20_000)
	h.wantSegments(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
	return h
}

// T105: fast retransmit on the third duplicate ACK. T107: limited transmit on
// the two before.
func TestT105FastRetransmit(t *testing.T) {
	for _, sack := range []bool{false, true} {
		options := ""
		if sack {
			options = ",sackOK"
		}
		h := flight(t, options)
		dup := func(n int64) {
			if sack {
				h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
			} else {
				h.ack(0)
			}
		}
		dup(2)
		h.wantSegments(11)
		dup(3)
		h.wantSegments(12)
		if h.reno.cwnd != 10_000 {
			t.Errorf("cwnd %d", h.reno.cwnd)
		}
		dup(4)
		h.wantSegments(1)
		h.wantCwnd(5, 5) // of the ten, not of the two that limited transmit added
		for n := int64(5); n <= 8; n++ {
			dup(n)
		}
		h.expect() // seven of twelve have left, pipe is cwnd
		dup(9)
		h.wantSegments(13)
		dup(10)
		dup(11)
		dup(12)
		if got := len(h.data()); got < 1 || got > 4 {
			t.Errorf("%d segments of new data", got)
		}
		nxt := h.snd.nxt
		h.in(fmt.Sprintf(". 1 ack %d", h.loss.recover)) // T109
		if h.loss.phase != phaseOpen || h.reno.cwnd > 5000 {
			t.Errorf("phase %d, cwnd %d", h.loss.phase, h.reno.cwnd)
		}
		if h.snd.nxt-nxt > 4000 {
			t.Errorf("a burst of %d", h.snd.nxt-nxt)
		}
	}
	// Only four segments.
	h := thousand(t, "")
	h.write(4000)
	h.drain()
	h.ack(0)
	h.ack(0)
	h.expect()
	h.ack(0)
	h.wantSegments(1)
	h.wantCwnd(2, 2)
}

// S15: duplicates beyond what can have arrived have nothing go, and there is one fast
// retransmit in a recovery, however many come.
func TestS15Inflation(t *testing.T) {
	for _, options := range []string{"", ",sackOK"} {
		h := thousand(t, options)
		h.silent = true
		h.write(1 << 19)
		first := h.snd.nxt - h.snd.una
		storm := func(most int64, again int) {
			t.Helper()
			h.drain()
			una, nxt := h.snd.una, h.snd.nxt
			for range 10_000 {
				h.in(fmt.Sprintf(". 1 ack %d", una))
			}
			sent := 0
			for _, s := range h.data() {
				if first, _, _ := strings.Cut(s, ":"); num(first) < nxt {
					sent++
				}
			}
			if n := h.snd.nxt - nxt; n > most || sent > again {
				t.Errorf("with%s: %d bytes sent, want at most %d; %d segments again, want at most %d", options, n, most, sent, again)
			}
		}
		storm(first+2*h.mss(), 1)
		if options == "" { // a partial ACK: the next segment is lost too, and a round trip is over
			flight := h.snd.nxt - h.snd.una
			h.in(". 1 ack 1001")
			storm(flight, 1)
		}
		// After the recovery the same ACKs begin no other one.
		h.in(fmt.Sprintf(". 1 ack %d", max(h.loss.recover, 1001)))
		if h.loss.phase != phaseOpen {
			t.Fatalf("with%s: %+v", options, h.loss)
		}
		storm(2*h.mss(), 0)
	}
}

// T106: what is no duplicate ACK.
func TestT106Duplicates(t *testing.T) {
	h := flight(t, "")
	for i := range int64(6) {
		h.in(fmt.Sprintf(". %d:%d ack 1", i*10+1, i*10+11)) // data
	}
	for i := range 6 {
		h.in(fmt.Sprintf(". 61 ack 1 win %d", 60000+i)) // another window
	}
	for range 6 {
		h.in(". 1 ack 0")
	}
	h.drain()
	if h.loss.dupAcks != 0 || h.snd.nxt != 10_001 {
		t.Errorf("%d duplicates, next %d", h.loss.dupAcks, h.snd.nxt)
	}
	h = thousand(t, "")
	for range 6 {
		h.ack(0) // nothing is outstanding
	}
	h.write(1000)
	h.wantSegments(1)
	h.in("F. 1 ack 1")
	if h.loss.dupAcks != 0 {
		t.Errorf("%d duplicates", h.loss.dupAcks)
	}
	// With SACK one without news is none.
	h = flight(t, ",sackOK")
	for range 6 {
		h.ack(0)
		h.ack(0, "1001:2001")
	}
	if h.loss.dupAcks != 1 || h.loss.phase != phaseOpen {
		t.Errorf("%+v", h.loss)
	}
}

// T108: NewReno with two losses in a window.
func TestT108PartialAck(t *testing.T) {
	h := flight(t, "") // 1 and 5 are lost
	for range 8 {
		h.ack(0)
	}
	h.wantSegments(11, 12, 1, 13) // pipe is 12 - 8 dups, so the eighth lets one go
	h.wantCwnd(5, 5)
	h.ack(4)
	if got := h.data(); got[0] != "4001:5001" {
		t.Errorf("sent %v", got)
	}
	h.wantCwnd(5, 5)
	if h.loss.phase != phaseFast {
		t.Error("recovery has ended too early")
	}
	h.ack(10)
	if h.loss.phase != phaseFast || h.data()[0] != "10001:11001" {
		t.Error("not a partial ACK")
	}
	h.ack(12)
	if h.loss.phase != phaseOpen || h.reno.ssthresh != 5000 {
		t.Errorf("phase %d, ssthresh %d", h.loss.phase, h.reno.ssthresh)
	}
	// Duplicates of that recovery begin no other: RFC 6582 section 3.2 step 2.
	if h.loss.recover != 12_001 {
		t.Errorf("recover %d", h.loss.recover)
	}
}

// T108: a segment that is lost and short is sent again, and nothing of what was sent for
// the first time behind it, in recovery: nobody has said that this is lost too.
func TestT108ShortSegment(t *testing.T) {
	for _, opts := range [][]func(*Config){{linkMSS(1000)}, {linkMSS(1000), offload(65455)}} {
		h := established(t, "<mss 1000>", opts...)
		h.write(9100) // the first 1000 bytes and the last 100 are lost
		h.drain()
		for range 3 {
			h.ack(0)
		}
		h.wantSegments(1)
		h.write(20_000)
		h.ack(9)
		h.wantData("9001:9101", "9101:10101", "10101:11101", "11101:12101", "12101:13101")
		if h.loss.phase != phaseFast {
			t.Error("recovery has ended too early")
		}
	}
}

// T110: no fast retransmit for what was sent before a timeout.
func TestT110AfterTimeout(t *testing.T) {
	h := flight(t, "")
	h.advance(300 * ms)
	h.wantSegments(1)
	for range 6 {
		h.ack(0)
	}
	h.expect()
	h.wantCwnd(1, 5)
	h.ack(9)
	h.drain()
	for range 6 {
		h.ack(9)
	}
	for _, r := range h.data() {
		if r == "9001:10001" {
			t.Error("a false fast retransmit")
		}
	}
	// Nor when all of that is acknowledged, for duplicates are still under way.
	h.ack(10)
	if h.loss.phase != phaseOpen {
		t.Fatal("the recovery goes on")
	}
	h.drain()
	for range 6 {
		h.ack(10)
	}
	for _, r := range h.data() {
		if r == "10001:11001" {
			t.Error("a false fast retransmit")
		}
	}
	// But for what was sent later.
	h.ack(11)
	h.drain()
	for range 3 {
		h.ack(11)
	}
	if got := h.data(); !slices.Contains(got, "11001:12001") {
		t.Errorf("no fast retransmit: %v", got)
	}
}

// T111: recovery with SACK sends what is lost, in order, as pipe allows, and
// never what the peer has.
func TestT111Recovery(t *testing.T) {
	h := flight(t, ",sackOK") // 1, 5 and 8 are lost
	h.ack(0, "1001:2001")
	h.wantSegments(11)
	h.ack(0, "1001:3001")
	h.wantSegments(12)
	h.ack(0, "1001:4001")
	h.wantSegments(1)
	h.wantCwnd(5, 5)
	h.ack(0, "5001:6001 1001:4001")
	h.expect()
	h.ack(0, "5001:7001 1001:4001")
	h.ack(0, "8001:9001 5001:7001 1001:4001")
	h.ack(0, "8001:10001 5001:7001 1001:4001")
	h.wantSegments(5, 8)
	if p := h.loss.pipe(h.snd.una, h.snd.nxt, 1000); p != 5000 {
		t.Errorf("pipe %d", p)
	}
	h.ack(0, "8001:11001 5001:7001 1001:4001")
	h.wantSegments(13)
	h.ack(4, "8001:11001 5001:7001") // 1 has arrived
	h.wantSegments(14)
	h.ack(7, "8001:11001")
	h.wantSegments(15)
	h.ack(12)
	h.wantCwnd(5, 5)
	h.wantSegments(16, 17)
	if h.loss.phase != phaseOpen {
		t.Error("recovery goes on")
	}
}

// T112: IsLost of RFC 6675 section 4.
func TestT112IsLost(t *testing.T) {
	tests := []struct {
		sacked rangeSet
		want   int64
	}{
		{nil, 1}, {rangeSet{{3001, 4001}}, 1}, {rangeSet{{3001, 5001}}, 1}, {rangeSet{{3001, 5002}}, 3001},
		{rangeSet{{3001, 3002}, {5001, 5002}}, 1}, {rangeSet{{3001, 3002}, {5001, 5002}, {7001, 7002}}, 3001},
		{rangeSet{{3001, 4001}, {5001, 6001}, {7001, 8001}, {9001, 10_001}}, 5001},
		{rangeSet{{3001, 4001}, {5001, 8001}}, 5001},
	}
	for _, tt := range tests {
		for _, l := range []lossState{{sack: true, sacked: tt.sacked}, {sack: true, sacked: tt.sacked, phase: phaseFast, reorder: reorderState{seen: true}}} {
			if got := l.lostEdge(1, 20_001, 1000); got != tt.want {
				t.Errorf("%v: lost below %d, want %d", tt.sacked, got, tt.want)
			}
		}
	}
}

// T112, T119, T120: one segment SACKed is no loss at once, but after a quarter
// of the round trip.
func TestT120Reordering(t *testing.T) {
	h := thousand(t, ",sackOK")
	h.write(4000)
	h.drain()
	h.ack(0, "3001:4001")
	h.expect()
	h.advance(25*ms - 1)
	h.expect()
	h.advance(1)
	h.wantSegments(1, 2)
	h.wantCwnd(2, 2)
	// A gap that closes in time was none, and is waited for longer from then on.
	h = thousand(t, ",sackOK")
	h.write(4000)
	h.drain()
	h.ack(0, "1001:2001")
	h.advance(24 * ms)
	h.ack(2)
	h.advance(50 * ms)
	h.expect()
	if !h.loss.reorder.seen {
		t.Error("the reordering was not seen")
	}
	h.ack(2, "3001:4001")
	h.advance(h.loss.reorder.window(h.rtt.srtt) - 1)
	h.expect()
	h.advance(1)
	h.wantSegments(3)
	// A D-SACK says that the window is too small, once in a round trip.
	h.advance(100 * ms)
	h.ack(4, "2001:3001")
	if w := h.loss.reorder.window(100 * ms); w != 50*ms {
		t.Errorf("window of %v", w)
	}
	h.write(1000)
	h.ack(4, "2001:3001")
	h.ack(4, "2001:3001")
	if w := h.loss.reorder.window(100 * ms); w != 75*ms {
		t.Errorf("window of %v", w)
	}
	for range reorderPersist {
		h.loss.reorder.recovered()
	}
	if w := h.loss.reorder.window(100 * ms); w != 25*ms {
		t.Errorf("window of %v", w)
	}
	// SACKed late is reordering too.
	h = flight(t, ",sackOK")
	h.ack(0, "3001:4001")
	h.ack(0, "2001:4001")
	if !h.loss.reorder.seen {
		t.Error("the reordering was not seen")
	}
	// A block that grows at its end is none.
	h = flight(t, ",sackOK")
	h.ack(0, "1001:2001")
	h.ack(0, "1001:3001")
	if h.loss.reorder.seen {
		t.Error("reordering was seen where there was none")
	}
}

// A retransmission that is lost is sent again without a timeout, once something
// that was sent later has arrived.
func TestLostRetransmission(t *testing.T) {
	h := flight(t, ",sackOK")
	for n := int64(2); n <= 4; n++ {
		h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
	}
	h.wantSegments(11, 12, 1)
	h.advance(50 * ms)
	for n := int64(5); n <= 12; n++ {
		h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
	}
	h.wantSegments(13, 14, 15, 16)
	h.wantCwnd(5, 5)
	h.advance(50 * ms)
	h.ack(0, "1001:13001") // 13 was sent behind the retransmission
	h.wantCwnd(2.5, 2.5)   // two losses, two reductions
	h.expect()             // 14, 15 and 16 are on their way
	h.ack(0, "1001:14001")
	h.expect()
	h.ack(0, "1001:15001")
	h.wantSegments(1)
	h.wantCwnd(2.5, 2.5)
	// It restarts the timer.
	if d := h.TCB.Deadline().Sub(h.now); d != h.rtt.timeout() {
		t.Errorf("timer of %v", d)
	}
	h.ack(15)
	if h.loss.phase != phaseFast || len(h.loss.lostAgain) != 0 {
		t.Errorf("%+v", h.loss)
	}
	h.ack(16)
	if h.loss.phase != phaseOpen || len(h.loss.resent) != 0 {
		t.Errorf("%+v", h.loss)
	}
}

// So it is in the recovery after a timeout, by the order of the retransmissions
// alone.
func TestLostRetransmissionAfterTimeout(t *testing.T) {
	h := thousand(t, ",sackOK")
	h.write(6000)
	h.drain()
	h.advance(300 * ms)
	h.wantSegments(1)
	h.advance(100 * ms)
	h.ack(1)
	h.wantSegments(2, 3)
	h.advance(99 * ms)
	h.ack(1, "2001:3001") // too early: the original
	h.wantSegments(4)
	h.advance(100 * ms)
	h.ack(1, "2001:4001") // 4 was sent after 2
	if got := h.data(); !slices.Contains(got, "1001:2001") {
		t.Errorf("sent %v", got)
	}
	h.ack(6)
	if h.loss.phase != phaseOpen || h.retries != 0 {
		t.Errorf("%+v", h.loss)
	}
}

// What was sent before a retransmission that has arrived is lost, whatever is
// SACKed above it.
func TestTailLostWithFirst(t *testing.T) {
	h := flight(t, ",sackOK") // 1 is lost, and 8 and all behind it
	for n := int64(2); n <= 4; n++ {
		h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
	}
	h.wantSegments(11, 12, 1)
	h.ack(0, "1001:7001")
	h.drain()
	h.advance(100 * ms)
	h.ack(7)
	if got := h.data(); !slices.Contains(got, "7001:8001") {
		t.Errorf("sent %v", got)
	}
}

// The retransmissions that are watched are bounded, and of two of the same data
// the later one counts.
func TestWatch(t *testing.T) {
	l := lossState{sack: true, phase: phaseFast}
	for i := range int64(2 * maxResent) {
		l.watch(epoch, span{i * 10, i*10 + 10}, 10_000)
	}
	if len(l.resent) != maxResent {
		t.Errorf("%d are watched", len(l.resent))
	}
	l.watch(epoch, span{5, 15}, 10_000) // overlaps two
	if n := len(l.resent); n != maxResent-1 || l.resent[n-1].span != (span{5, 15}) {
		t.Errorf("%d are watched, the last is %v", n, l.resent[n-1])
	}
}

// Data sent during recovery that is lost is a loss of its own.
func TestLossInRecovery(t *testing.T) {
	h := flight(t, ",sackOK")
	for n := int64(2); n <= 12; n++ {
		h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
	}
	h.wantSegments(11, 12, 1, 13, 14, 15, 16)
	h.wantCwnd(5, 5)
	h.ack(0, "14001:15001 1001:12001") // 13 and 14 are lost, and 1 again
	h.wantCwnd(2.5, 2.5)
	h.ack(0, "14001:16001 1001:12001")
	h.wantSegments(1, 13)
	h.ack(12, "14001:16001")
	h.wantCwnd(2.5, 2.5)
	if h.loss.phase != phaseFast {
		t.Error("recovery has ended too early")
	}
}

// Rules 3 and 4 of NextSeg: what is not known to be lost, and the last segment.
func TestNextSegRules(t *testing.T) {
	l := lossState{sack: true, phase: phaseFast, reorder: reorderState{seen: true}, highRxt: 1001, sacked: rangeSet{{2001, 3001}}}
	if s := l.nextDoubtful(1, 5001, 1000); s != (span{1001, 2001}) {
		t.Errorf("rule 3: %v", s)
	}
	l.highRxt = 2001
	if s := l.nextDoubtful(1, 5001, 1000); s != (span{4001, 5001}) || !l.rescued {
		t.Errorf("rule 4: %v", s)
	}
	if s := l.nextDoubtful(1, 5001, 1000); s.start < s.end {
		t.Errorf("a second rescue: %v", s)
	}
	// The same on a connection: the last of six is lost with the first.
	h := thousand(t, ",sackOK")
	h.write(6000)
	h.drain()
	for n := int64(2); n <= 5; n++ {
		h.ack(0, fmt.Sprintf("1001:%d", n*1000+1))
	}
	h.wantSegments(1, 6)
	h.ack(6)
	h.expect()
}

// T113: SACK blocks on an old ACK count.
func TestT113OldAck(t *testing.T) {
	h := flight(t, ",sackOK")
	h.ack(3)
	h.drain()
	h.ack(1, "5001:7001")
	if h.loss.sacked.size() != 2000 {
		t.Errorf("%v", h.loss.sacked)
	}
	h.wantSegments(16, 17)
}

// T114: what was SACKed may be gone after a timeout; only a cumulative ACK frees it.
func TestT114Reneging(t *testing.T) {
	h := flight(t, ",sackOK")
	h.ack(0, "2001:4001")
	h.drain()
	if h.sendBuf.base != 1 {
		t.Error("SACKed data was freed")
	}
	h.rtt.srtt = 10 * sec // no reordering timer
	h.arm(timerReorder, h.now, 10*sec)
	h.advance(300 * ms)
	h.wantSegments(1)
	if len(h.loss.sacked) != 0 || h.armed(timerReorder) {
		t.Errorf("%+v", h.loss)
	}
	h.ack(1)
	h.ack(2)
	h.ack(3)
	if got := h.data(); !slices.Contains(got, "2001:3001") || !slices.Contains(got, "3001:4001") {
		t.Errorf("sent %v", got)
	}
}

// T115: blocks that make no sense are ignored or cut.
func TestT115BogusBlocks(t *testing.T) {
	for _, b := range []string{"3001:3001", "4001:3001", "-500:1", "-1000:-500", "9001:10002", "10001:11001", "50001:60001",
		"5001:2147490000", "-2147480000:5001", "2001:-2147480000"} {
		h := flight(t, ",sackOK")
		h.ack(0, b)
		if h.loss.sacked.size() != 0 || h.loss.dupAcks != 0 {
			t.Errorf("%s: %v", b, h.loss.sacked)
		}
	}
	h := flight(t, ",sackOK")
	h.ack(0, "2001:4001 2001:4001 3001:4001 2001:3001")
	if h.loss.sacked.size() != 2000 || h.loss.dupAcks != 1 {
		t.Errorf("%v", h.loss.sacked)
	}
	// Everything SACKed and nothing acknowledged: the timeout clears it.
	h = flight(t, ",sackOK")
	h.ack(0, "1:10001")
	if h.loss.pipe(1, h.snd.nxt, 1000) < 0 {
		t.Error("pipe is negative")
	}
	h.advance(sec)
	if got := h.data(); !slices.Contains(got, "1:1001") {
		t.Errorf("sent %v", got)
	}
	// Slivers: the scoreboard is bounded.
	h = flight(t, ",sackOK")
	for off := 3; off < 9000; off += 2 {
		h.ack(0, fmt.Sprintf("%d:%d", off, off+1))
	}
	if len(h.loss.sacked) != maxSacked {
		t.Errorf("%d spans", len(h.loss.sacked))
	}
	h.advance(1000 * sec)
	// At random. The state is checked after each.
	rnd := rand.New(rand.NewPCG(1, 15))
	h = flight(t, ",sackOK")
	h.silent = true
	for range 3000 {
		if h.snd.una >= 15_000 {
			break
		}
		var blocks string
		for range 1 + rnd.IntN(4) {
			left := h.snd.una - 500 + rnd.Int64N(12_000)
			blocks += fmt.Sprintf(" %d:%d", left, left+rnd.Int64N(3000)-100)
		}
		h.in(fmt.Sprintf(". 1 ack %d <sack%s>", h.snd.una-rnd.Int64N(3)+rnd.Int64N(20), blocks))
		h.advance(3 * ms)
		h.queue, h.times = nil, nil
	}
}

// A block may cover the FIN, and a FIN that is lost behind data is sent again.
func TestSACKedFIN(t *testing.T) {
	h := thousand(t, ",sackOK")
	h.write(5000)
	h.closeWrite()
	h.wantData("1:1001", "1001:2001", "2001:3001", "3001:4001", "4001:5001", "5001")
	h.ack(0, "1001:2001")
	h.ack(0, "1001:4001")
	h.in(". 1 ack 1 <sack 1001:5002>") // with the FIN
	if h.loss.sacked.size() != 4001 {
		t.Errorf("%v", h.loss.sacked)
	}
	h.wantSegments(1)
	h.in(". 1 ack 5002")
	h.want(FinWait2)
	// The FIN is part of what is sent again.
	h = thousand(t, ",sackOK")
	h.write(2500)
	h.CloseWrite()
	h.pull()
	h.drain()
	h.in(". 1 ack 2001")
	h.advance(400 * ms)
	h.expect("F. 2001:2501 ack 1")
}

// Recovery when cwnd is below three segments.
func TestSmallWindowRecovery(t *testing.T) {
	for _, options := range []string{"", ",sackOK"} {
		h := thousand(t, options)
		h.reno.cwnd, h.reno.ssthresh = 2000, 2000
		h.write(10_000)
		h.wantSegments(1, 2)
		if options == "" {
			h.ack(0)
			h.wantSegments(3)
			h.ack(0)
			h.wantSegments(4)
			h.advance(300 * ms)
			h.wantSegments(1)
			h.wantCwnd(1, 2)
		} else {
			h.ack(0, "1001:2001")
			h.wantSegments(3)
			h.advance(25 * ms)
			h.wantSegments(1)
			h.wantCwnd(2, 2)
		}
	}
}

// lossy is a connection that has lost its first segment and recovered: n segments
// are acknowledged, and nothing is queued.
func lossy(t *testing.T) (h *harness, n int64) {
	t.Helper()
	h = thousand(t, ",sackOK")
	h.write(10_000)
	h.advance(100 * ms)
	h.ack(0, "1001:10001")
	h.advance(100 * ms)
	h.ack(10)
	h.drain()
	h.wantCwnd(4, 5)
	return h, 10
}

// T119: after two round trips without an ACK the last segment is sent again, if
// the connection has lost anything before.
func TestT119TailLossProbe(t *testing.T) {
	for _, d := range []struct {
		sack           string
		cwnd, ssthresh float64
	}{
		{"", 2, 2},            // the probe has repaired a loss
		{"12001:13001", 4, 5}, // both copies have arrived: only the ACK was lost
	} {
		h, n := lossy(t)
		h.write(3000)
		h.wantSegments(n+1, n+2, n+3)
		h.advance(2*h.rtt.srtt + tailSlack - 1)
		h.expect()
		h.advance(1)
		h.wantSegments(n + 3)
		h.advance(100 * ms)
		h.expect() // one probe, and the timer runs from then on
		if d.sack == "" {
			h.ack(n + 3)
		} else {
			h.ack(n+3, d.sack)
		}
		h.wantCwnd(d.cwnd, d.ssthresh)
	}
}

// A probe is new data where there is some, whatever cwnd says.
func TestTailLossProbeNewData(t *testing.T) {
	h, n := lossy(t)
	h.write(8000)
	h.wantSegments(n+1, n+2, n+3, n+4)
	h.advance(2*h.rtt.srtt + tailSlack)
	h.wantSegments(n + 5)
	h.advance(h.rtt.timeout())
	h.wantSegments(n + 1) // no second probe: the timeout
	h.ack(n + 5)
	h.wantCwnd(2, 2.5)
}

// short is a connection as lossy makes it on a link with a round trip of 400 us,
// and the time after which it probes.
func short(t *testing.T) (h *harness, n int64, pto time.Duration) {
	t.Helper()
	h, n = lossy(t)
	h.rtt = rttState{srtt: 400 * us, min: 400 * us, rto: minRTO}
	return h, n, 800*us + tailSlack
}

// Where the RTO is many round trips a probe that had no answer is sent again,
// after twice the time, as long as that is well before the RTO.
func TestProbeAgain(t *testing.T) {
	h, n, pto := short(t)
	h.write(3000)
	h.wantSegments(n+1, n+2, n+3)
	for d := pto; d <= minRTO/4; d *= 2 {
		h.advance(d - 1)
		h.expect()
		h.advance(1)
		h.wantSegments(n + 3)
	}
	h.advance(minRTO - 1)
	h.expect()
	h.advance(1)
	h.wantSegments(n + 1) // the timeout
	h.advance(2*minRTO - 1)
	h.expect() // no probe: nothing says that anybody is there
	h.advance(1)
	h.wantSegments(n + 1)
	h.advance(400 * us)
	h.ack(n + 1)
	h.wantSegments(n+2, n+3)
	h.advance(pto)
	h.wantSegments(n + 2) // somebody is
	// A probe that arrives shows that all before it is lost.
	h, n, pto = short(t)
	h.write(4000)
	h.drain()
	h.advance(pto)
	h.wantSegments(n + 4)
	h.advance(400 * us)
	h.ack(n, fmt.Sprintf("%d:%d", n*1000+3001, n*1000+4001))
	h.wantSegments(n+1, n+2)
	// And in recovery, where it is the first segment.
	h.advance(pto - 1)
	h.expect()
	h.advance(1)
	h.wantSegments(n + 1)
	h.advance(400 * us)
	h.ack(n+1, fmt.Sprintf("%d:%d", n*1000+3001, n*1000+4001))
	h.wantSegments(n+2, n+3) // 2 was sent before it
	h.ack(n + 4)
	if h.loss.phase != phaseOpen || h.loss.probes != 0 {
		t.Errorf("%+v", h.loss)
	}
}

// A lone segment is probed while the peer acknowledges at once.
func TestProbeLoneSegment(t *testing.T) {
	h, n, pto := short(t)
	h.write(1000)
	h.wantSegments(n + 1)
	h.advance(pto)
	h.wantSegments(n + 1)
	h.advance(400 * us)
	h.ack(n + 1)
	for range quickAcks {
		h.write(1000)
		n++
		h.drain()
		h.ack(n + 1)
	}
	h.write(1000)
	h.wantSegments(n + 2)
	h.advance(minRTO - 1)
	h.expect()
}

func TestNoTailLossProbe(t *testing.T) {
	fresh := thousand(t, ",sackOK") // has lost nothing yet
	fresh.write(3000)
	fresh.wantSegments(1, 2, 3)
	fresh.advance(fresh.rtt.timeout() - 1)
	fresh.expect()

	lone, n := lossy(t) // its ACK may be delayed
	lone.write(1000)
	lone.wantSegments(n + 1)
	lone.advance(lone.rtt.timeout() - 1)
	lone.expect()

	closed, n := lossy(t) // the peer has shrunk its window: nothing may be sent
	closed.write(3000)
	closed.wantSegments(n+1, n+2, n+3)
	closed.in(fmt.Sprintf(". 1 ack %d win 1000", n*1000+1))
	closed.advance(2*closed.rtt.srtt + tailSlack)
	for _, s := range closed.data() {
		t.Errorf("sent %s beyond the window", s)
	}
}

// T148: what was too long is sent again at once, shorter, and cwnd stays.
func TestT148PathMTU(t *testing.T) {
	for _, options := range []string{"", ",sackOK", ",sackOK,ts 1 0"} {
		h := flight(t, "")
		if options != "" {
			h = thousand(t, options)
			h.write(20_000)
			h.drain()
		}
		cwnd, una, nxt := h.reno.cwnd, h.snd.una, h.snd.nxt
		// Not in flight, or no news.
		for _, seq := range []uint32{h.snd.seq.wrap(una - 1), h.snd.seq.wrap(nxt), h.snd.seq.wrap(una + 1<<31), 0x1234567} {
			if h.PathMTU(h.now, 600, seq) {
				t.Errorf("%#x is not in flight", seq)
			}
		}
		for _, mss := range []int{1000, 1400} {
			if h.PathMTU(h.now, mss, h.snd.seq.wrap(una)) {
				t.Errorf("segments of %d are no news", mss)
			}
		}
		h.pull()
		h.wantData()
		if !h.PathMTU(h.now, 600, h.snd.seq.wrap(una+3000)) || h.PathMTU(h.now, 600, h.snd.seq.wrap(una)) {
			t.Fatal("refused, or taken twice")
		}
		h.pull()
		size := int64(600)
		if h.timestamps {
			size -= timestampsLen
		}
		// All that was in flight, but for the end if cwnd has no room for a whole
		// segment by then.
		var want []string
		for off := una; off < nxt; off += size {
			want = append(want, fmt.Sprintf("%d:%d", off, min(off+size, nxt)))
		}
		want = want[:len(want)-1]
		got := h.data()
		if len(got) < len(want) || !slices.Equal(got[:len(want)], want) {
			t.Fatalf("sent %v, want %v", got, want)
		}
		if h.reno.cwnd != cwnd || h.rtt.backoff != 0 || h.retries != 0 {
			t.Errorf("cwnd %d, was %d; backoff %d, %d retries", h.reno.cwnd, cwnd, h.rtt.backoff, h.retries)
		}
		h.drain()
		ts := ""
		if h.timestamps {
			ts = fmt.Sprintf(" <ts %d 0>", h.tsRecent-hPeerTS)
		}
		h.in(fmt.Sprintf(". 1 ack %d%s", nxt, ts))
		for _, s := range h.data() {
			var from, to int64
			fmt.Sscanf(s, "%d:%d", &from, &to)
			if from < nxt || to-from > size {
				t.Errorf("after the ACK comes %s", s)
			}
		}
		if h.loss.phase != phaseOpen {
			t.Errorf("phase %d", h.loss.phase)
		}
	}
}

// T148: only a connection that is established, or was, hears of it.
func TestT148PathMTUStates(t *testing.T) {
	h := active(t)
	if h.PathMTU(h.now, 600, hISS) {
		t.Error("in SYN-SENT")
	}
	h = passive(t, "S 0 <mss 1000>")
	if h.PathMTU(h.now, 600, hISS) {
		t.Error("in SYN-RECEIVED")
	}
	h = thousand(t, "")
	h.write(1500)
	h.closeWrite()
	h.drain()
	if !h.PathMTU(h.now, 900, h.snd.seq.wrap(1)) {
		t.Error("not in FIN-WAIT-1")
	}
	h.pull()
	h.expect(". 1:901 ack 1", "FP. 901:1501 ack 1")
	h.in(". 1 ack 1502")
	h.want(FinWait2)
	h.in("F. 1 ack 1502")
	h.want(TimeWait)
	if h.PathMTU(h.now, 600, h.snd.seq.wrap(1501)) {
		t.Error("in TIME-WAIT")
	}
	h = thousand(t, "")
	h.write(1000)
	if !h.PathMTU(h.now, 1, h.snd.seq.wrap(1)) || h.PathMTU(h.now, 0, h.snd.seq.wrap(1)) || h.snd.mss != mssFloor {
		t.Errorf("segments of %d bytes", h.snd.mss)
	}
}

// TestS07NoAllocation: ACKs with blocks anywhere in what is in flight cost no memory,
// each of them or all of them together.
func TestS07NoAllocation(t *testing.T) {
	h := established(t, "<mss 48,sackOK>")
	h.silent = true
	const n = 4000
	h.reno.cwnd, h.snd.wnd = n, n
	h.write(n)
	h.drain()
	if h.snd.nxt-h.snd.una < n/2 {
		t.Fatalf("%d bytes in flight", h.snd.nxt-h.snd.una)
	}
	rnd := rand.New(rand.NewPCG(7, 7))
	seg := Segment{SrcPort: 2, DstPort: 1, Seq: hIRS + uint32(h.rcv.nxt), Ack: hISS + uint32(h.snd.una), Flags: ACK, Window: n, Blocks: maxBlocks}
	ack := func() {
		for i := range seg.SACK {
			at := seg.Ack + 1 + uint32(rnd.IntN(int(h.snd.nxt-h.snd.una)-2))
			seg.SACK[i] = Block{at, at + 1}
		}
		h.Input(h.now, &seg)
	}
	for range 1000 { // the scoreboard has its size then
		ack()
	}
	if allocs := testing.AllocsPerRun(1000, ack); allocs > 0 {
		t.Errorf("%v allocations for each ACK", allocs)
	}
	if n := len(h.loss.sacked); n != maxSacked {
		t.Errorf("%d spans on the scoreboard, want %d", n, maxSacked)
	}
}
