package tcp

import "math"

// Congestion control: slow start and congestion avoidance of RFC 5681 section
// 3.1 with the byte counting of RFC 3465, initial window of RFC 6928.

// renoState says how many bytes may be in flight.
type renoState struct {
	cwnd, ssthresh int64
	acked          int64 // bytes acknowledged in congestion avoidance since cwnd grew
}

// initialWindow is IW of RFC 6928 section 2.
func initialWindow(mss int64) int64 { return min(10*mss, max(2*mss, 14600)) }

func newReno(iw int64) renoState { return renoState{cwnd: iw, ssthresh: math.MaxInt64} }

// onAck grows cwnd for n bytes newly acknowledged: in slow start by as many, at
// most limit segments an ACK (L of RFC 3465 section 2.2), of which no more than two
// may lie above ssthresh; in congestion avoidance by one segment for every cwnd of
// them.
func (c *renoState) onAck(n, mss, limit int64) {
	if c.cwnd < c.ssthresh {
		c.cwnd += min(n, limit*mss, max(c.ssthresh-c.cwnd, 2*mss))
		return
	}
	if c.acked += n; c.acked >= c.cwnd {
		c.acked -= c.cwnd
		c.cwnd += mss
	}
}

// halve sets ssthresh for a loss with flight bytes outstanding (RFC 5681
// equation 4).
func (c *renoState) halve(flight, mss int64) {
	c.ssthresh = max(flight/2, 2*mss)
	c.acked = 0
}
