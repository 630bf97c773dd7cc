package tcp

import (
	"fmt"
	"math"
	"testing"
)

// T102: the initial window of RFC 6928 section 2.
func TestInitialWindow(t *testing.T) {
	for mss, want := range map[int64]int64{36: 360, 536: 5360, 1000: 10000, 1448: 14480, 1460: 14600, 2000: 14600,
		7300: 14600, 7301: 14602, 9000: 18000, 65495: 130990} {
		if got := initialWindow(mss); got != want {
			t.Errorf("MSS %d: %d, want %d", mss, got, want)
		}
	}
}

// T103, T104, T118: growth by the bytes acknowledged.
func TestRenoGrowth(t *testing.T) {
	const mss = 1000
	r := newReno(10 * mss)
	if r.ssthresh != math.MaxInt64 {
		t.Errorf("ssthresh %d", r.ssthresh)
	}
	for range 10 {
		r.onAck(mss, mss, 2)
	}
	if r.cwnd != 20*mss {
		t.Errorf("an ACK a segment: cwnd %d", r.cwnd)
	}
	r = newReno(10 * mss)
	for range 5 {
		r.onAck(2*mss, mss, 2)
	}
	if r.cwnd != 20*mss {
		t.Errorf("an ACK for two: cwnd %d", r.cwnd)
	}
	r = newReno(10 * mss)
	r.onAck(10*mss, mss, 2)
	if r.cwnd != 12*mss {
		t.Errorf("one ACK for ten: cwnd %d", r.cwnd)
	}
	r.onAck(10*mss, mss, 1)
	if r.cwnd != 13*mss {
		t.Errorf("after a timeout: cwnd %d", r.cwnd)
	}
	// Division of ACKs brings nothing.
	r = newReno(10 * mss)
	for range mss {
		r.onAck(1, mss, 2)
	}
	if r.cwnd != 11*mss {
		t.Errorf("%d ACKs of a byte: cwnd %d", mss, r.cwnd)
	}
	// Congestion avoidance: a segment a round trip.
	r = renoState{cwnd: 10 * mss, ssthresh: 10 * mss}
	for i := range 10 {
		if r.cwnd != 10*mss {
			t.Errorf("grew after %d segments", i)
		}
		r.onAck(mss, mss, 2)
	}
	if r.cwnd != 11*mss {
		t.Errorf("congestion avoidance: cwnd %d", r.cwnd)
	}
	for range 11000 {
		r.onAck(1, mss, 2)
	}
	if r.cwnd != 12*mss {
		t.Errorf("congestion avoidance by bytes: cwnd %d", r.cwnd)
	}
}

func TestRenoHalve(t *testing.T) {
	const mss = 1000
	for flight, want := range map[int64]int64{20 * mss: 10 * mss, 10 * mss: 5 * mss, 5 * mss: 2500, 4 * mss: 2 * mss,
		3 * mss: 2 * mss, mss: 2 * mss, 0: 2 * mss} {
		r := renoState{cwnd: 10 * mss, acked: 77}
		if r.halve(flight, mss); r.ssthresh != want || r.acked != 0 {
			t.Errorf("flight %d: %+v, want ssthresh %d", flight, r, want)
		}
	}
}

// thousand is a connection with segments of 1000 bytes and a round trip of
// 100 ms, for which the peer has answered.
func thousand(t *testing.T, options string) *harness {
	t.Helper()
	h := passive(t, "S 0 <mss 1000"+options+">", linkMSS(1000))
	h.advance(100 * ms)
	h.in(". 1 ack 1")
	h.drain()
	return h
}

// ack acknowledges n segments of 1000 bytes, counted from the beginning.
func (h *harness) ack(n int64, sack ...string) {
	h.Helper()
	s := fmt.Sprintf(". 1 ack %d", n*1000+1)
	if len(sack) > 0 {
		s += " <sack " + sack[0] + ">"
	}
	h.in(s)
}

// wantSegments checks which segments were sent, counted from 1.
func (h *harness) wantSegments(want ...int64) {
	h.Helper()
	var r []string
	for _, n := range want {
		r = append(r, fmt.Sprintf("%d:%d", n*1000-999, n*1000+1))
	}
	h.wantData(r...)
}

// wantCwnd checks cwnd and ssthresh, in segments.
func (h *harness) wantCwnd(cwnd, ssthresh float64) {
	h.Helper()
	if float64(h.reno.cwnd) != cwnd*1000 || float64(h.reno.ssthresh) != ssthresh*1000 {
		h.Fatalf("cwnd %d, ssthresh %d, want %v and %v segments", h.reno.cwnd, h.reno.ssthresh, cwnd, ssthresh)
	}
}

func TestT102InitialWindow(t *testing.T) {
	h := thousand(t, "")
	h.write(20_000)
	h.wantSegments(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
	// T103.
	for n := int64(1); n <= 10; n++ {
		h.ack(n)
	}
	h.wantSegments(11, 12, 13, 14, 15, 16, 17, 18, 19, 20)
	if h.reno.cwnd != 20_000 {
		t.Errorf("cwnd %d", h.reno.cwnd)
	}
}

// T117: a window that is not used does not grow.
func TestT117ApplicationLimited(t *testing.T) {
	h := thousand(t, "")
	for i := int64(0); i < 20; i++ {
		h.write(5000)
		h.advance(50 * ms)
		h.ack(5*i + 5)
	}
	if h.reno.cwnd != 10_000 {
		t.Errorf("cwnd %d", h.reno.cwnd)
	}
	h.drain()
	// Then it is.
	h.write(20_000)
	h.wantDataBytes(10_000)
	h.ack(102)
	h.wantDataBytes(4000)
}

// T118: ACKs of single bytes.
func TestT118AckDivision(t *testing.T) {
	h := thousand(t, "")
	h.write(100_000)
	for i := range 1000 {
		h.in(fmt.Sprintf(". 1 ack %d", i+2))
	}
	if h.reno.cwnd != 11_000 {
		t.Errorf("cwnd %d", h.reno.cwnd)
	}
}

// T116: after an idle time cwnd is the initial window again.
func TestT116IdleRestart(t *testing.T) {
	grow := func() *harness {
		h := thousand(t, ",ws 4")
		h.write(200_000)
		for n := int64(1); n <= 200; n++ {
			h.ack(n)
		}
		if h.reno.cwnd < 36_000 {
			t.Fatalf("cwnd %d", h.reno.cwnd)
		}
		h.drain()
		return h
	}
	h := grow()
	cwnd := h.reno.cwnd
	h.advance(h.rtt.timeout() - ms)
	h.write(400_000)
	h.wantDataBytes(cwnd / 1000 * 1000)
	h = grow()
	h.advance(h.rtt.timeout() + ms)
	h.write(200_000)
	h.wantDataBytes(10_000)
	// A small window stays small.
	h = grow()
	h.reno.cwnd, h.reno.ssthresh = 3000, 3000
	h.advance(sec)
	h.write(20_000)
	h.wantDataBytes(3000)
}
