package tcp

import (
	"fmt"
	"testing"
	"time"
)

// T092: the estimator of RFC 6298 section 2.
func TestT092Estimator(t *testing.T) {
	var r rttState
	steps := []struct{ sample, srtt, rttvar, rto time.Duration }{
		{100 * ms, 100 * ms, 50 * ms, 300 * ms},
		{100 * ms, 100 * ms, 37500 * time.Microsecond, 250 * ms},
		{500 * ms, 150 * ms, 128125 * time.Microsecond, 662500 * time.Microsecond},
		{100 * ms, 143750 * time.Microsecond, 108593750, 578125 * time.Microsecond},
	}
	for i, s := range steps {
		r.sample(s.sample)
		if r.srtt != s.srtt || r.rttvar != s.rttvar || r.rto != s.rto {
			t.Errorf("sample %d: %+v, want %+v", i, r, s)
		}
	}
}

// T093: bounds.
func TestT093Bounds(t *testing.T) {
	var r rttState
	for range 20 {
		r.sample(50 * time.Microsecond)
	}
	if r.rto != minRTO {
		t.Errorf("RTO %v", r.rto)
	}
	r = rttState{}
	r.sample(0)
	if r.srtt <= 0 || r.rto != minRTO {
		t.Errorf("%+v", r)
	}
	for _, m := range []time.Duration{time.Hour, 1_000_000 * sec, 0, 1 << 62} {
		r.sample(m)
		if r.rto < minRTO || r.rto > maxRTO || r.srtt <= 0 || r.rttvar < 0 {
			t.Errorf("after %v: %+v", m, r)
		}
	}
	r = rttState{rto: sec}
	for n, want := range map[uint8]time.Duration{0: sec, 1: 2 * sec, 6: 64 * sec, 7: maxRTO, 15: maxRTO, 255: maxRTO} {
		if r.backoff = n; r.timeout() != want {
			t.Errorf("backoff %d: %v, want %v", n, r.timeout(), want)
		}
	}
}

// T095: a segment that was sent again is not timed, and the backoff stays until
// one is (Karn).
func TestT095Karn(t *testing.T) {
	h := thousand(t, "")
	if h.rtt.rto != 300*ms {
		t.Fatalf("RTO %v", h.rtt.rto)
	}
	h.write(1000)
	h.advance(300 * ms)
	h.wantSegments(1, 1)
	h.advance(50 * ms)
	h.ack(1)
	if h.rtt.srtt != 100*ms || h.rtt.timeout() != 600*ms {
		t.Errorf("SRTT %v, RTO %v", h.rtt.srtt, h.rtt.timeout())
	}
	h.write(1000)
	h.advance(599 * ms)
	h.wantSegments(2)
	h.ack(2)
	if h.rtt.backoff != 0 || h.rtt.srtt == 100*ms {
		t.Errorf("a fresh segment was not timed: %+v", h.rtt)
	}
	// With timestamps there is no doubt which was acknowledged.
	h = established(t, "<mss 1460,ts 0 0>")
	h.write(10)
	h.advance(minRTO + 50*ms)
	h.in(". 1 ack 11 <ts 1 200>")
	if h.rtt.backoff != 0 || h.rtt.srtt > 50*ms {
		t.Errorf("%+v", h.rtt)
	}
}

// New data after a timeout is timed, though the recovery goes on.
func TestBackoffEnds(t *testing.T) {
	h := thousand(t, "")
	h.write(20_000)
	h.advance(300 * ms)
	h.drain()
	for n := int64(1); n < 10; n++ {
		h.advance(50 * ms)
		h.ack(n)
	}
	if h.rtt.backoff != 1 {
		t.Fatalf("backoff %d", h.rtt.backoff)
	}
	h.advance(50 * ms)
	h.ack(11)
	if h.rtt.backoff != 0 {
		t.Errorf("backoff %d after an ACK of new data", h.rtt.backoff)
	}
}

// T098: a SYN or SYN-ACK was lost.
func TestT098LostSYN(t *testing.T) {
	for _, active := range []bool{false, true} {
		for _, ts := range []bool{false, true} {
			options, echo := "<mss 1000>", ""
			if ts {
				options, echo = "<mss 1012,ts 1 1000>", " <ts 1 1000>"
			}
			h := passiveOrActive(t, active, options)
			h.advance(sec + 50*ms)
			if active {
				h.in("S. 0 ack 1 " + options)
			} else {
				h.in(". 1 ack 1" + echo)
			}
			h.want(Established)
			h.drain()
			if h.reno.cwnd != 1000 || h.rtt.backoff != 0 {
				t.Errorf("active %v: cwnd %d, backoff %d", active, h.reno.cwnd, h.rtt.backoff)
			}
			h.write(5000)
			h.wantData("1:1001")
			want := 3 * sec
			if ts {
				want = minRTO // the echo says which was acknowledged
			}
			if got := h.TCB.Deadline().Sub(h.now); got != want {
				t.Errorf("active %v, timestamps %v: RTO %v, want %v", active, ts, got, want)
			}
		}
	}
}

func passiveOrActive(t *testing.T, first bool, options string) *harness {
	if first {
		return active(t, linkMSS(1012))
	}
	return passive(t, "S 0 "+options, linkMSS(1012))
}

// T097: what a timeout does.
func TestT097Timeout(t *testing.T) {
	for _, options := range []string{"", ",sackOK"} {
		h := thousand(t, options)
		h.write(20_000)
		h.drain()
		h.advance(300 * ms)
		h.wantSegments(1)
		h.wantCwnd(1, 5)
		h.advance(600 * ms)
		h.wantSegments(1)
		h.wantCwnd(1, 5) // not halved again
		h.ack(1)
		h.wantSegments(2, 3)
		h.ack(2)
		h.wantSegments(4, 5)
		// The rest was there: everything up to the new data is acknowledged.
		h.ack(10)
		h.wantCwnd(4, 5)
		h.wantSegments(11, 12, 13, 14)
		h.ack(11)
		h.wantCwnd(5, 5)
	}
	// T096 of the timer: it starts again with every ACK.
	h := thousand(t, "")
	h.write(2000)
	h.advance(299 * ms)
	h.in(". 1 ack 2")
	h.drain()
	if d := h.TCB.Deadline().Sub(h.now); d != h.rtt.timeout() {
		t.Errorf("timer of %v", d)
	}
	h.in(fmt.Sprintf(". 1 ack %d", 2001))
	if h.TCB.Deadline() != 0 {
		t.Error("a timer runs")
	}
}
