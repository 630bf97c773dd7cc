package tcp

import "time"

// The retransmission timeout, RFC 6298.

const (
	initialRTO = time.Second // section 2.1
	// Deviation: section 2.4 says that the minimum SHOULD be 1 s. 200 ms is the
	// practice; receivers delay an ACK by less.
	minRTO = 200 * time.Millisecond
	maxRTO = 120 * time.Second // section 2.5: at least 60 s
	// synLossRTO is the timeout that data starts with after a SYN was
	// retransmitted (section 5.7).
	synLossRTO = 3 * time.Second
)

// rttState estimates the round-trip time.
type rttState struct {
	srtt, rttvar time.Duration // srtt 0: no sample yet
	min          time.Duration // the shortest that was timed; 0: none was
	rto          time.Duration // without backoff
	backoff      uint8         // doublings in force (section 5.5)
}

// timed takes a measurement by our own clock.
func (r *rttState) timed(m time.Duration) {
	if r.min == 0 || m < r.min {
		r.min = m
	}
	r.sample(m)
}

// sample takes one measurement (section 2.2, 2.3) and ends the backoff.
func (r *rttState) sample(m time.Duration) {
	m = max(m, time.Microsecond)
	if r.srtt == 0 {
		r.srtt, r.rttvar = m, m/2
	} else {
		r.rttvar += ((r.srtt - m).Abs() - r.rttvar) / 4
		r.srtt += (m - r.srtt) / 8
	}
	r.rto = min(max(r.srtt+4*r.rttvar, minRTO), maxRTO)
	r.backoff = 0
}

// timeout returns the RTO in force.
func (r *rttState) timeout() time.Duration { return backedOff(r.rto, r.backoff) }

// backedOff returns d doubled n times, at most maxRTO.
func backedOff(d time.Duration, n uint8) time.Duration {
	for ; n > 0 && d < maxRTO; n-- {
		d *= 2
	}
	return min(d, maxRTO)
}
