// Package netsim simulates a network link in virtual time, for tests.
//
// A [Link] carries packets in one direction; a connection needs two. It has no
// goroutine and reads no clock: the caller says what time it is, asks with
// [Link.Next] when the next packet arrives, and moves its own clock there. Two
// runs that make the same calls with the same [Config] see the same packets at
// the same times, however busy the machine.
//
// A packet passes these stages:
//
//	Send -> queue -> line -> loss -> duplication -> reordering, corruption, delay, jitter -> Receive
//	        Queue    Rate    \_____________________ the network behind the line _____________________/
//
// The line sends one packet at a time, and those that find it busy wait in the
// queue. A packet that is lost has therefore taken its time on the line, and a
// duplicate takes none. The two copies of a duplicated packet are reordered,
// corrupted and jittered independently of each other.
package netsim

import (
	"math/rand/v2"
	"slices"
	"time"
)

// Config describes a Link. The zero value is a perfect link: it delivers every
// packet, in order, at the time it is sent.
type Config struct {
	// Delay is the time from a packet's last bit leaving the line to its arrival.
	Delay time.Duration

	// Jitter is the bound of a random time, from 0 up to but not including
	// Jitter, that each packet takes on top of Delay. A packet may overtake
	// those sent less than Jitter before it.
	Jitter time.Duration

	// Rate is how many bits per second the line sends. The time that a packet
	// takes is rounded up to a nanosecond. If zero, it takes none.
	Rate int64

	// Queue is how many bytes may wait for the line, not counting the packet
	// that the line is sending. A packet that does not fit is dropped. If zero,
	// there is no limit. Without a Rate nothing ever waits.
	Queue int

	// Loss is the probability, as are the next three, from 0 to 1, that a
	// packet is lost behind the line.
	Loss float64

	// Duplicate is the probability that a packet that is not lost arrives twice.
	Duplicate float64

	// Corrupt is the probability that one, two or three bits of a packet, each
	// number equally likely, are inverted. Flips can cancel each other in a sum: in
	// random data about one corrupt packet in 90 has its Internet checksum
	// (RFC 1071) unchanged.
	Corrupt float64

	// Reorder is the probability that a packet takes an extra ReorderDelay, so
	// that those sent within that time after it overtake it.
	Reorder float64

	// ReorderDelay is how much later a packet chosen by Reorder arrives.
	ReorderDelay time.Duration

	// Seed determines every random choice. Links with equal seeds make the same
	// choices, so the two directions of a connection want different ones.
	Seed uint64
}

// Stats counts the packets of a Link. Those still in flight number
// Sent + Duplicated - Dropped - Lost - Received.
type Stats struct {
	Sent       int // passed to Send
	Dropped    int // did not fit in the queue
	Lost       int // lost behind the line
	Duplicated int // extra copies made
	Reordered  int // copies that took an extra ReorderDelay
	Corrupted  int // copies with bits inverted
	Received   int // returned by Receive
}

// A Link is one direction of a simulated network link. It is not safe for
// concurrent use.
//
// The times passed to Send must not decrease, and must not be the zero Time,
// with which Next says that nothing is in flight.
type Link struct {
	cfg   Config
	rand  *rand.Rand
	stats Stats

	// The line; unused without a Rate.
	free    time.Time // when the line has sent all it was given
	waiting []waiter  // packets the line had not begun to send at the last Send, oldest first
	backlog int       // bytes in waiting

	flight []arrival // in order of arrival
}

// A waiter is a packet in the queue, which leaves it when the line begins to send it.
type waiter struct {
	start time.Time
	size  int
}

// An arrival is a packet on its way.
type arrival struct {
	at     time.Time
	packet []byte
}

// New returns a Link with nothing in flight. It panics if a probability is not
// in the range 0 to 1 or another number in cfg is negative.
func New(cfg Config) *Link {
	for _, p := range []float64{cfg.Loss, cfg.Duplicate, cfg.Corrupt, cfg.Reorder} {
		if !(p >= 0 && p <= 1) { // so that NaN is refused too
			panic("netsim: probability out of range")
		}
	}
	if min(cfg.Delay, cfg.Jitter, cfg.ReorderDelay) < 0 || cfg.Rate < 0 || cfg.Queue < 0 {
		panic("netsim: negative number in Config")
	}
	return &Link{cfg: cfg, rand: rand.New(rand.NewPCG(cfg.Seed, 0))}
}

// Send puts a packet on the link at the time now. It copies the packet, which
// is the caller's again when Send returns.
func (l *Link) Send(now time.Time, packet []byte) {
	l.stats.Sent++
	sent, ok := l.transmit(now, len(packet))
	if !ok {
		l.stats.Dropped++
		return
	}
	if l.chance(l.cfg.Loss) {
		l.stats.Lost++
		return
	}
	duplicate := l.chance(l.cfg.Duplicate)
	l.carry(sent, packet)
	if duplicate {
		l.stats.Duplicated++
		l.carry(sent, packet)
	}
}

// Next returns the time at which the earliest packet in flight arrives, or the
// zero Time if none is in flight.
func (l *Link) Next() time.Time {
	if len(l.flight) == 0 {
		return time.Time{}
	}
	return l.flight[0].at
}

// Receive returns the earliest packet that has arrived by now, or nil if there
// is none. Packets that arrive at the same time are received in the order in
// which they were sent. The packet is the caller's to keep and to change; one
// of no bytes is not nil.
func (l *Link) Receive(now time.Time) []byte {
	if len(l.flight) == 0 || l.flight[0].at.After(now) {
		return nil
	}
	packet := l.flight[0].packet
	l.flight[0] = arrival{} // the array outlives the packet
	l.flight = l.flight[1:]
	l.stats.Received++
	return packet
}

// Stats returns what the link has counted so far.
func (l *Link) Stats() Stats {
	return l.stats
}

// transmit gives the line a packet of size bytes. It returns when the last bit
// is sent, or false if the packet does not fit in the queue.
func (l *Link) transmit(now time.Time, size int) (sent time.Time, ok bool) {
	if l.cfg.Rate == 0 {
		return now, true
	}
	for len(l.waiting) > 0 && !l.waiting[0].start.After(now) {
		l.backlog -= l.waiting[0].size
		l.waiting = l.waiting[1:]
	}
	start := now
	if l.free.After(now) {
		if l.cfg.Queue > 0 && l.backlog+size > l.cfg.Queue {
			return time.Time{}, false
		}
		start = l.free
		l.waiting = append(l.waiting, waiter{start, size})
		l.backlog += size
	}
	bits := 8 * int64(size)
	l.free = start.Add(time.Duration((bits*int64(time.Second) + l.cfg.Rate - 1) / l.cfg.Rate))
	return l.free, true
}

// carry puts one copy of a packet, which left the line at sent, in flight.
func (l *Link) carry(sent time.Time, packet []byte) {
	at := sent.Add(l.cfg.Delay)
	if l.cfg.Jitter > 0 {
		at = at.Add(time.Duration(l.rand.Int64N(int64(l.cfg.Jitter))))
	}
	if l.chance(l.cfg.Reorder) {
		l.stats.Reordered++
		at = at.Add(l.cfg.ReorderDelay)
	}
	c := append([]byte{}, packet...) // never nil
	if len(c) > 0 && l.chance(l.cfg.Corrupt) {
		l.stats.Corrupted++
		l.corrupt(c)
	}
	// Behind all that arrive no later, so that ties keep the order of sending.
	i, _ := slices.BinarySearchFunc(l.flight, at, func(a arrival, at time.Time) int {
		if a.at.After(at) {
			return 1
		}
		return -1
	})
	l.flight = slices.Insert(l.flight, i, arrival{at, c})
}

// corrupt inverts one to three bits of a packet that is not empty. They are
// different bits, as inverting one twice would leave it intact.
func (l *Link) corrupt(packet []byte) {
	var flipped [3]int
	n := 1 + l.rand.IntN(len(flipped))
	for i := 0; i < n; {
		bit := l.rand.IntN(8 * len(packet))
		if slices.Contains(flipped[:i], bit) {
			continue
		}
		packet[bit/8] ^= 1 << (bit % 8)
		flipped[i] = bit
		i++
	}
}

// chance reports whether something of probability p happens.
func (l *Link) chance(p float64) bool {
	return l.rand.Float64() < p
}
