package tcp

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

// T073: a peer that shrinks its window. What is behind its edge is neither sent
// nor sent again, and our own ACKs stay where the peer takes them.
func TestT073Shrink(t *testing.T) {
	h := established(t, plain)
	h.in(". 1 ack 1 win 10000")
	h.write(20000)
	h.wantData("1:1461", "1461:2921", "2921:4381", "4381:5841", "5841:7301", "7301:8761")
	h.in(". 1 ack 1 win 2000")
	h.expect()
	h.in(". 1:101 ack 1 win 2000", ". 101:201 ack 1 win 2000")
	h.expect(". 2000 ack 201")
	h.advance(minRTO)
	h.wantData("1:1461")
	h.in(". 201 ack 1461 win 1000")
	h.wantData("1461:2461")
	h.in(". 201 ack 2461 win 0")
	h.expect()
	h.in(". 201 ack 2461 win 20000")
	h.wantData("2461:3921", "3921:5381") // slow start after the timeout
}

// The window shrinks to nothing with data outstanding, and opens again.
func TestShrinkToZero(t *testing.T) {
	h := established(t, plain)
	h.write(3000)
	h.drain()
	h.in(". 1 ack 1 win 0")
	h.expect()
	h.advance(10 * sec)
	for _, s := range h.drain() {
		if !match(s, ". 0 ack 1") {
			t.Errorf("sent %s at a closed window", s)
		}
	}
	// Answers to probes are no duplicate ACKs.
	for range 5 {
		h.in(". 1 ack 1 win 0")
	}
	if h.loss.phase != phaseOpen || h.loss.dupAcks != 0 || h.reno.cwnd != 14600 {
		t.Errorf("%+v %+v", h.loss, h.reno)
	}
	h.in(". 1 ack 1 win 10000")
	h.advance(minRTO)
	h.wantData("1:1461")
	h.in(". 1 ack 3001 win 10000")
	h.expect()
	if h.TCB.Deadline() != 0 {
		t.Error("a timer runs with nothing to wait for")
	}
}

// T074: a closed window is probed after one RTO and then half as often each time.
func TestT074Persist(t *testing.T) {
	h := passive(t, "S 0 "+plain)
	h.advance(100 * ms)
	h.in(". 1 ack 1 win 0") // RTO 300 ms
	h.drain()
	start := h.now.Sub(epoch).Seconds()
	h.write(10)
	h.expect()
	h.advance(24 * time.Hour)
	want, at := []float64{}, 0.3
	for d := 0.6; len(want) < 12; d = min(2*d, 120) {
		want = append(want, start+at)
		at += d
	}
	if fmt.Sprintf("%.3f", h.times) != fmt.Sprintf("%.3f", append(want, start+at)) { // the last is the reset
		t.Errorf("probes at %.3f\nwant %.3f", h.times, want)
	}
	h.wantClosed(TimedOut) // T076
	if at < 100 || at > 15*60 {
		t.Errorf("gave up after %v s", at)
	}
	q := h.drain()
	for _, s := range q[:12] {
		if !match(s, ". 0 ack 1") { // SND.UNA-1, no data
			t.Errorf("probe %s", s)
		}
	}
	if !match(q[12], "R. 1 ack 1") {
		t.Errorf("last %s", q[12])
	}
}

// T076: whatever the timeout is, and however far the probes are apart already, silence
// ends the connection within R2.
func TestT076SilenceAtClosedWindow(t *testing.T) {
	for _, rto := range []time.Duration{minRTO, sec, 7 * sec, 45 * sec, 70 * sec, 119 * sec, maxRTO} {
		for _, answers := range []int{0, 1, 5, 9, 100} {
			h := established(t, plain)
			h.silent = true
			h.rtt.rto = rto
			h.in(". 1 ack 1 win 0")
			h.write(10)
			heard := h.now
			for range answers {
				h.now = h.TCB.Deadline()
				h.Advance(h.now)
				h.pull()
				h.in(". 1 ack 1 win 0")
				heard = h.now
			}
			for h.state != Closed {
				h.now = h.TCB.Deadline()
				h.Advance(h.now)
				h.pull()
			}
			h.wantClosed(TimedOut)
			if d := h.now.Sub(heard); d < 100*sec || d > 15*time.Minute {
				t.Errorf("RTO %v, %d answers: given up after %v of silence", rto, answers, d)
			}
		}
	}
}

// T075: probes that are answered keep the connection, at most 120 s apart.
func TestT075PersistAnswered(t *testing.T) {
	h := passive(t, "S 0 "+plain)
	h.in(". 1 ack 1 win 0")
	h.drain()
	h.write(10)
	h.closeWrite()
	last, gap := h.now, time.Duration(0)
	for h.now.Sub(epoch) < 24*time.Hour {
		h.now = h.TCB.Deadline()
		h.Advance(h.now)
		h.pull()
		h.expect(". 0 ack 1")
		if d := h.now.Sub(last); d < gap || d > maxRTO {
			t.Fatalf("probe after %v, the one before after %v", d, gap)
		} else {
			gap = d
		}
		last = h.now
		h.advance(10 * ms)
		h.in(". 1 ack 1 win 0")
		h.expect()
	}
	if gap < maxRTO-10*ms {
		t.Errorf("at last every %v", gap)
	}
	// T077: it goes on at once when the window opens.
	h.in(". 1 ack 1 win 511")
	h.wantData("1:11")
	// Once the application has left, no probe keeps it for more than a minute.
	h = passive(t, "S 0 "+plain)
	h.in(". 1 ack 1 win 0")
	h.write(10)
	h.shut()
	for h.state != Closed && h.now.Sub(epoch) < time.Hour {
		h.now = h.TCB.Deadline()
		h.Advance(h.now)
		h.pull()
		if h.state != Closed {
			h.in(". 1 ack 1 win 0")
		}
	}
	if d := h.now.Sub(epoch); d > 120*sec || d < 60*sec {
		t.Errorf("an orphan at a closed window lasted %v", d)
	}
}

// T081: small windows. No silly segments, but for the override.
func TestT081SillyWindow(t *testing.T) {
	h := passive(t, "S 0 win 4000 "+plain)
	h.in(". 1 ack 1 win 4000")
	h.drain()
	h.write(14600)
	h.wantData("1:1461", "1461:2921") // 1080 are left: less than a segment and than half the window
	h.in(". 1 ack 2921 win 0")
	h.expect()
	for w := 1; w < 1460; w += 9 {
		h.in(fmt.Sprintf(". 1 ack 2921 win %d", w))
		h.expect()
	}
	h.in(". 1 ack 2921 win 1460")
	h.wantData("2921:4381")
	// The override.
	h.in(". 1 ack 4381 win 10")
	h.expect()
	h.advance(overrideTime - 1)
	h.expect()
	h.advance(1)
	h.wantData("4381:4391")
	h.in(". 1 ack 4391 win 10")
	h.expect()
	h.advance(overrideTime)
	h.wantData("4391:4401")
	// A window that opens a little after it was closed for long.
	h.in(". 1 ack 4401 win 0")
	for range 12 {
		h.advance(2 * time.Minute)
		h.in(". 1 ack 4401 win 0")
	}
	h.drain()
	h.in(". 1 ack 4401 win 10")
	h.expect()
	h.advance(overrideTime)
	h.wantData("4401:4411")
	// All that is queued is no silly segment.
	h = passive(t, "S 0 win 4000 "+plain)
	h.in(". 1 ack 1 win 4000")
	h.drain()
	h.write(3)
	h.wantData("1:4")
	h.write(5)
	h.wantData("4:9") // T082: no Nagle algorithm
}

// A peer whose window is one byte gets the data a byte at a time.
func TestOneByteWindow(t *testing.T) {
	h := passive(t, "S 0 win 1 "+plain)
	h.in(". 1 ack 1 win 1")
	h.drain()
	h.write(20)
	h.closeWrite()
	for i := int64(1); i <= 20; i++ {
		h.wantData(fmt.Sprintf("%d:%d", i, i+1))
		h.in(fmt.Sprintf(". 1 ack %d win 1", i+1))
	}
	h.expect("F. 21 ack 1")
}

// The FIN needs room in the window too.
func TestFINInWindow(t *testing.T) {
	h := passive(t, "S 0 win 10 "+plain)
	h.in(". 1 ack 1 win 10")
	h.drain()
	h.write(10)
	h.closeWrite()
	h.expect(". 1:11 ack 1")
	h.in(". 1 ack 11 win 0")
	h.expect()
	h.want(FinWait1)
	h.advance(minRTO)
	h.expect(". 10 ack 1")
	h.in(". 1 ack 11 win 1")
	h.expect("F. 11 ack 1")
}

// T078: probes of our closed window. T079: an application that reads a little
// causes no window updates. T080: one that reads enough causes one.
func TestT079Receiver(t *testing.T) {
	h := established(t, plain, buffers(1000, 65535))
	h.in(". 1:30001 ack 1", ". 30001:60001 ack 1", ". 60001:65536 ack 1")
	h.expect(". 1 ack 30001 win 35535", ". 1 ack 60001 win 5535", ". 1 ack 65536 win 0")
	h.in(". 65536:65537 ack 1")
	h.expect(". 1 ack 65536 win 0")
	for range 1000 {
		h.read(1)
	}
	h.expect()
	h.in(". 65536:65537 ack 1")
	h.expect(". 1 ack 65536 win 0") // not opened a little either
	h.read(459)
	h.expect()
	h.read(1)
	h.expect(". 1 ack 65536 win 1460")
	h.read(1459)
	h.expect()
	h.read(1)
	h.expect(". 1 ack 65536 win 2920") // doubled
	h.read(2919)
	h.expect()
	h.read(30000)
	h.expect(". 1 ack 65536 win 35839")
	h.in(". 65536:65546 ack 1", ". 65546:65556 ack 1")
	h.read(h.Buffered())
	h.advance(sec)
	h.drain()
	if h.Buffered() != 0 || h.recvBuf.ring.size() != 0 {
		t.Errorf("%d bytes left, memory %d", h.Buffered(), h.recvBuf.ring.size())
	}
	// A small buffer: half of it.
	h = established(t, plain, buffers(1000, 1000))
	h.in(". 1:1001 ack 1")
	h.drain()
	h.read(499)
	h.expect()
	h.read(1)
	h.expect(". 1 ack 1001 win 500")
	// One byte.
	h = established(t, plain, buffers(1000, 1))
	h.in(". 1:2 ack 1")
	h.advance(sec)
	h.expect(". 1 ack 2 win 0")
	h.read(1)
	h.expect(". 1 ack 2 win 1")
}

// With a scale that a segment does not fill, an update still says something new.
func TestCoarseScale(t *testing.T) {
	h := established(t, "<mss 1460,ws 0>", buffers(1000, 1<<30))
	for range 20 {
		off := h.rcv.nxt
		h.in(fmt.Sprintf(". %d:%d ack 1", off, off+30000))
	}
	h.drain()
	h.rcv.adv = h.rcv.nxt // as if the buffer were full
	h.recvBuf.max = h.rcv.nxt - h.recvBuf.base
	h.edge = h.rcv.nxt
	for range 100 {
		h.read(1000)
		for _, s := range h.drain() {
			if match(s, fmt.Sprintf(". 1 ack %d win 0", h.rcv.nxt)) {
				t.Fatalf("an update that opens nothing: %s", s)
			}
		}
	}
}

// T072: the right edge never moves left, whatever the schedule, and no more is
// promised than is taken. The edge itself is checked for every segment.
func TestT072RightEdge(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	rnd := rand.New(rand.NewPCG(72, 1))
	for round := range rounds {
		size := []int{1, 100, 1460, 5000, 65535, 65536, 100_000, 1 << 20, 1<<22 + 7}[round%9]
		options := []string{plain, "<mss 1460,ws 3>", "<mss 1460,sackOK,ts 0 0,ws 7>"}[round/9%3]
		h := established(t, options, buffers(1000, size))
		h.silent = true
		next := int64(1) // what the peer sends next
		for range 400 {
			seg := func(off, n int64) {
				if n > 0 {
					h.in(fmt.Sprintf(". %d:%d ack 1", off, off+n))
				}
			}
			room := h.edge - next
			switch rnd.IntN(8) {
			case 0, 1:
				n := min(1+rnd.Int64N(3), room) // tiny
				seg(next, n)
				next += n
			case 2:
				n := min(1+rnd.Int64N(1460), room)
				seg(next, n)
				next += n
			case 3:
				n := min(rnd.Int64N(60000), room)
				seg(next, n)
				next += n
			case 4:
				off := next + rnd.Int64N(max(1, room))
				seg(off, min(1460, h.edge-off))
			case 5:
				seg(max(1, next-rnd.Int64N(3000)), 1000)
			case 6:
				h.advance(time.Duration(rnd.IntN(100)) * ms)
			case 7:
				h.read(rnd.IntN(h.Buffered() + 1))
			}
			next = max(next, h.rcv.nxt)
			if next != h.rcv.nxt {
				t.Fatalf("size %d, %s: bytes in the window were not taken: next %d, want %d", size, options, h.rcv.nxt, next)
			}
			if h.edge > h.recvBuf.base+int64(size)+windowSlack<<h.rcv.scale {
				t.Fatalf("size %d: window up to %d with %d read", size, h.edge, h.recvBuf.base-1)
			}
			h.queue, h.times = nil, nil
		}
	}
}

// T085 to T088: when an ACK is sent.
func TestT085DelayedAck(t *testing.T) {
	h := established(t, plain)
	h.in(". 1:1461 ack 1")
	h.advance(delackTimeout - 1)
	h.expect()
	h.advance(1)
	h.expect(". 1 ack 1461")
	// T086.
	for range 10 {
		off := h.rcv.nxt
		h.in(fmt.Sprintf(". %d:%d ack 1", off, off+1460))
	}
	if n := len(h.drain()); n != 5 {
		t.Errorf("%d ACKs to 10 segments", n)
	}
	off := h.rcv.nxt
	// T087: at once.
	for _, s := range []string{". %d:%d ack 1", ". %d:%d ack 1"} {
		h.in(fmt.Sprintf(s, off+100, off+200))
		h.expect(fmt.Sprintf(". 1 ack %d", off))
	}
	h.in(fmt.Sprintf(". %d:%d ack 1", off, off+50)) // a part of the gap
	h.expect(fmt.Sprintf(". 1 ack %d", off+50))
	h.in(fmt.Sprintf(". %d:%d ack 1", off+50, off+100))
	h.expect(fmt.Sprintf(". 1 ack %d", off+200))
	h.in(fmt.Sprintf(". %d:%d ack 1", off, off+100))
	h.expect(fmt.Sprintf(". 1 ack %d", off+200))
	// T088: data carries the ACK.
	h.in(fmt.Sprintf(". %d:%d ack 1", off+200, off+1000))
	h.advance(10 * ms)
	h.write(5)
	h.expect(fmt.Sprintf("P. 1:6 ack %d", off+1000))
	h.in(fmt.Sprintf(". %d ack 6", off+1000))
	h.advance(sec)
	h.expect()
	// T083: data without PSH is delivered like other data, and the last byte pushes.
	if h.Buffered() == 0 || h.Events()&EventReadable == 0 {
		t.Error("data without PSH is not delivered")
	}
	h.write(3000)
	if q := h.drain(); len(q) != 3 || q[0][0] == 'P' || q[2][0] != 'P' {
		t.Errorf("PSH: %q", q)
	}
}

const scaled = "<mss 1460,ws 7>"

// smoothStream is a connection to which the peer has sent so much without a gap that
// ACKs are fewer.
func smoothStream(t *testing.T, options string, opts ...func(*Config)) *harness {
	h := established(t, options, opts...)
	h.silent = true
	for h.rcv.nxt < smoothBytes+10_000 {
		h.full(1)
		h.read(1460)
	}
	h.silent = false
	for h.rcv.acked < h.rcv.nxt {
		h.full(1)
	}
	h.drain()
	return h
}

// full gives n full segments, without PSH.
func (h *harness) full(n int) {
	h.Helper()
	for range n {
		h.in(fmt.Sprintf(". %d:%d ack 1", h.rcv.nxt, h.rcv.nxt+1460))
	}
}

// A stream without gaps or pauses is acknowledged as by a card that puts segments
// together.
func TestT086Stretch(t *testing.T) {
	const limit = stretchAck / 1460 // segments that may wait
	t.Run("limit", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.full(limit)
		h.expect()
		h.full(1)
		h.expect(fmt.Sprintf(". 1 ack %d", h.rcv.nxt))
	})
	t.Run("push", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.full(2)
		h.in(fmt.Sprintf("P. %d:%d ack 1", h.rcv.nxt, h.rcv.nxt+1460))
		h.expect(fmt.Sprintf(". 1 ack %d", h.rcv.nxt))
	})
	t.Run("a lone one is delayed", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.in(fmt.Sprintf("P. %d:%d ack 1", h.rcv.nxt, h.rcv.nxt+1460))
		h.expect()
		h.advance(delackShort)
		h.expect(fmt.Sprintf(". 1 ack %d", h.rcv.nxt))
	})
	everySecond := func(h *harness) {
		h.Helper()
		h.drain()
		h.rcv.quick = 0
		h.full(10)
		if n := len(h.drain()); n != 5 {
			h.Errorf("%d ACKs to 10 segments", n)
		}
	}
	t.Run("pause", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.full(3)
		h.advance(delackShort - 1)
		h.expect()
		h.advance(1)
		h.expect(fmt.Sprintf(". 1 ack %d", h.rcv.nxt))
		everySecond(h)
	})
	t.Run("gap", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.in(fmt.Sprintf(". %d:%d ack 1", h.rcv.nxt+1460, h.rcv.nxt+2920))
		h.full(1)
		everySecond(h)
	})
	t.Run("small buffer", func(t *testing.T) {
		h := smoothStream(t, scaled, buffers(1<<20, 16<<10)) // a sixteenth is less than a segment
		h.read(h.Buffered())
		everySecond(h)
	})
}

// However small the window is, only a part of it waits to be acknowledged.
func TestT086StretchSmallWindow(t *testing.T) {
	soon := func(t *testing.T, h *harness) {
		t.Helper()
		window := h.rcv.adv - h.rcv.acked
		for left := window / 4; len(h.queue) == 0; left -= 1460 {
			if left < 0 {
				t.Fatalf("%d of a window of %d are not acknowledged", h.rcv.nxt-h.rcv.acked, window)
			}
			h.full(1)
		}
	}
	t.Run("not scaled", func(t *testing.T) {
		h := smoothStream(t, plain)
		h.read(h.Buffered())
		soon(t, h)
	})
	t.Run("unread", func(t *testing.T) {
		h := smoothStream(t, scaled)
		for h.rcv.adv-h.rcv.acked > 32<<10 {
			h.full(1)
		}
		h.drain()
		soon(t, h)
	})
	t.Run("no memory", func(t *testing.T) {
		h := smoothStream(t, scaled)
		h.UseMemory(NewMemory(1 << 18))
		for h.rcv.adv-h.rcv.acked > 32<<10 {
			h.full(1)
			h.read(h.Buffered())
		}
		h.drain()
		soon(t, h)
	})
}

// What waits for a neighbour already when ACKs become fewer waits no longer than what
// comes then.
func TestT086StretchBegins(t *testing.T) {
	h := established(t, scaled)
	h.silent = true
	h.in(". 1:101 ack 1") // so that the first one that may wait for many is the second of two
	for h.rcv.nxt+1460 < smoothBytes {
		h.full(1)
		h.read(h.Buffered())
	}
	h.silent = false
	h.drain()
	if h.rcv.acked == h.rcv.nxt {
		t.Fatal("nothing waits")
	}
	h.full(1)
	h.expect()
	h.advance(delackShort)
	h.expect(fmt.Sprintf(". 1 ack %d", h.rcv.nxt))
}

// T084: the smaller of both windows.
func TestT084Windows(t *testing.T) {
	h := passive(t, "S 0 win 3000 <mss 1000>", linkMSS(1000))
	h.in(". 1 ack 1 win 3000")
	h.write(50_000)
	h.wantDataBytes(3000)
	h = passive(t, "S 0 win 3000 <mss 1000,ws 14>", linkMSS(1000))
	h.in(". 1 ack 1 win 65535")
	h.write(50_000)
	h.wantDataBytes(10_000)
}

func (h *harness) wantDataBytes(n int64) {
	h.Helper()
	if h.inFlight != n {
		h.Fatalf("%d bytes sent, want %d", h.inFlight, n)
	}
	h.drain()
}

// T100: what is sent again is what was sent, with the ACK, window and timestamp
// of now.
func TestT100Retransmission(t *testing.T) {
	h := established(t, "<mss 1460,ts 0 0>", buffers(10_000, 65535))
	h.write(100)
	h.expect("P. 1:101 ack 1 win 65535 <ts 0 0>")
	h.in(". 1:2001 ack 1 <ts 7 0>")
	h.drain()
	h.write(100) // goes with the first when that is sent again
	h.drain()
	h.advance(minRTO)
	h.expect("P. 1:201 ack 2001 win 63535 <ts 200 7>")
}

// T101: a clock that jumps.
func TestT101ClockJump(t *testing.T) {
	h := established(t, "<mss 1460,sackOK,ts 0 0>")
	h.write(100_000)
	h.drain()
	h.now = h.now.Add(10 * time.Minute)
	h.Advance(h.now)
	h.pull()
	h.wantData("1:1449")
	h.in(". 1 ack 14481 <ts 1 0>")
	if h.inFlight > 2*1448 {
		t.Errorf("%d bytes at once", h.inFlight)
	}
	h.want(Established)
}

// Writing: Reserve and Commit, the events of a full buffer.
func TestWriteEvents(t *testing.T) {
	h := established(t, plain, buffers(5000, 5000))
	if h.Free() != 5000 {
		t.Errorf("free %d", h.Free())
	}
	h.write(5000)
	if h.Events()&EventWritable != 0 || h.Free() != 0 || h.Write([]byte{1}) != 0 || h.Reserve(1) != nil {
		t.Error("a full buffer takes more")
	}
	h.in(". 1 ack 1461")
	if h.Events()&EventWritable == 0 || h.Free() != 1460 {
		t.Errorf("no event; free %d", h.Free())
	}
	h.in(". 1 ack 2921")
	if h.Events()&EventWritable != 0 {
		t.Error("an event that nobody waits for")
	}
	p := h.Reserve(2000)
	copy(p, patterned(fromTCB, 5001, 5001+int64(len(p))))
	h.Commit(len(p))
	h.pull()
	h.wrote += int64(len(p))
	if !h.Unsent() {
		t.Error("nothing to acknowledge")
	}
	h.in(fmt.Sprintf(". 1 ack %d", h.snd.nxt))
	if h.Unsent() || h.sendBuf.ring.size() != 0 {
		t.Error("all is acknowledged, and yet not")
	}
	if h.SendNext() != hISS+uint32(h.wrote)+1 {
		t.Errorf("SND.NXT %d", h.SendNext())
	}
	// A loan that ends after the door was closed brings nothing.
	p = h.Reserve(10)
	h.closeWrite()
	h.drain()
	h.Commit(len(p))
	h.pull()
	h.expect()
	if h.Write([]byte{1}) != 0 || h.Free() != 0 {
		t.Error("bytes behind the FIN")
	}
	h.closeWrite()
	h.expect()
}

// Reading: Peek and Discard.
func TestPeek(t *testing.T) {
	h := established(t, plain, buffers(1000, 10_000))
	if h.Peek() != nil || h.Buffered() != 0 {
		t.Error("bytes from nowhere")
	}
	h.in(". 1:10001 ack 1")
	h.expect(". 1 ack 10001 win 0")
	var got []byte
	for h.Buffered() > 0 {
		p := h.Peek()
		got = append(got, p...)
		h.Discard(len(p))
		h.pull()
	}
	if !bytes.Equal(got, patterned(fromPeer, 1, 10001)) {
		t.Error("other bytes")
	}
	h.expect(". 1 ack 10001 win 10000")
}

// T131: data flows for hours in one direction after the other was closed.
func TestT131HalfClose(t *testing.T) {
	h := inState(t, FinWait2)
	for range 200 {
		h.advance(time.Minute)
		off := h.rcv.nxt
		h.in(fmt.Sprintf(". %d:%d ack 2", off, off+1000))
		h.advance(sec)
		h.expect(fmt.Sprintf(". 2 ack %d", off+1000))
		h.read(1000)
	}
	h.in(fmt.Sprintf("F. %d ack 2", h.rcv.nxt))
	h.want(TimeWait)

	h = inState(t, CloseWait)
	for i := range int64(200) {
		h.advance(time.Minute)
		h.write(1000)
		h.wantData(fmt.Sprintf("%d:%d", i*1000+1, i*1000+1001))
		h.in(fmt.Sprintf(". 2 ack %d", i*1000+1001))
	}
	h.closeWrite()
	h.want(LastAck)
	h.in(fmt.Sprintf(". 2 ack %d", h.snd.nxt))
	h.wantClosed(None)
}

// T132: both close at once, with data in flight both ways and without.
func TestT132SimultaneousClose(t *testing.T) {
	h := established(t, plain)
	h.write(100)
	h.closeWrite()
	h.wantData("1:101", "101")
	h.in("F. 1:51 ack 1")
	h.want(Closing)
	h.expect(". 102 ack 52")
	h.in(". 52 ack 50") // not the FIN
	h.want(Closing)
	h.in(". 52 ack 102")
	h.want(TimeWait)
	h.read(50)
	h.in("F. 1:51 ack 102")
	h.expect(". 102 ack 52")

	// The FIN acknowledges ours.
	h = inState(t, FinWait1)
	h.in("F. 1:51 ack 2")
	h.want(TimeWait)
	h.expect(". 2 ack 52")
	h.read(50)
}

// T133: the FIN comes last, and is sent again like data.
func TestT133FINLast(t *testing.T) {
	h := established(t, plain)
	h.write(20 * 1460)
	h.closeWrite()
	for _, r := range h.data() {
		if r == "29201" {
			t.Error("the FIN overtook data")
		}
	}
	for h.snd.una < 29201 {
		h.in(fmt.Sprintf(". 1 ack %d", min(h.snd.una+2920, 29201)))
	}
	got := h.data()
	if last := got[len(got)-1]; last != "27741:29201" {
		t.Errorf("last %s", last)
	}
	at := h.now
	h.advance(10 * sec)
	for _, s := range h.drain() {
		if !match(s, "F. 29201 ack 1") {
			t.Errorf("sent %s", s)
		}
	}
	if h.now.Sub(at) < sec {
		t.Error("time stands still")
	}
	h.advance(time.Hour)
	h.wantClosed(TimedOut)

	// It goes with the last of the data if it can.
	h = inState(t, Established)
	h.write(1)
	h.drain()
	h.Write(patterned(fromTCB, 2, 12))
	h.CloseWrite()
	h.pull()
	h.expect("F. 2:12 ack 1")
	// A FIN alone that is lost behind data that is not.
	h.in(". 1 ack 12")
	h.advance(minRTO)
	h.expect("F. 12 ack 1")
}

// Bytes that have arrived can be read however the connection ends, unless this
// side aborts it.
func TestReadAfterEnd(t *testing.T) {
	// LAST-ACK ends before the application has read.
	h := established(t, plain)
	h.in("F. 1:1001 ack 1")
	h.closeWrite()
	h.want(LastAck)
	h.in(". 1002 ack 2")
	h.wantClosed(None)
	if h.EOF() {
		t.Error("end of file before the data")
	}
	h.read(1000)
	if !h.EOF() {
		t.Error("no end of file")
	}
	// TIME-WAIT ends.
	h = established(t, plain)
	h.closeWrite()
	h.in(". 1 ack 2", "F. 1:1001 ack 2")
	h.want(TimeWait)
	h.advance(2 * time.Minute)
	h.wantClosed(None)
	h.read(1000)
	if !h.EOF() || h.recvBuf.ring.size() != 0 {
		t.Error("no end of file, or memory left")
	}
	// A reset.
	h = established(t, plain)
	h.in(". 1:1001 ack 1", ". 2001:3001 ack 1", "R 1001")
	h.wantClosed(Reset)
	h.read(1000)
	if h.EOF() || h.Buffered() != 0 {
		t.Error("a reset is no end of file")
	}
	h = established(t, plain)
	h.in(". 1:1001 ack 1")
	h.abort()
	if h.Buffered() != 0 || h.recvBuf.ring.size() != 0 {
		t.Error("an abort keeps data")
	}
}

// T134: to close with data unread resets. T135: so does data that comes later.
func TestT134Close(t *testing.T) {
	h := established(t, plain)
	h.in(". 1:101 ack 1")
	h.shut()
	h.expect("R. 1 ack 101")
	h.wantClosed(Aborted)

	h = established(t, plain)
	h.in(". 1:101 ack 1")
	h.read(100)
	h.advance(sec)
	h.drain()
	h.in(". 1:101 ack 1") // a duplicate is not unread
	h.drain()
	h.shut()
	h.expect("F. 1 ack 101")
	h.in(". 1:101 ack 1", ". 100:101 ack 2") // nor now
	h.want(FinWait1)
	h.shut() // again
	h.in(". 101 ack 2")
	h.want(FinWait2)
	h.drain()
	h.in(fmt.Sprintf(". %d:%d ack 2", h.rcv.adv, h.rcv.adv+1)) // not in the window
	h.expect(". 2 ack 101")
	h.want(FinWait2)
	h.in(". 101:201 ack 2")
	h.expect("R 2")
	h.wantClosed(Aborted)

	for _, s := range []State{Established, FinWait1, FinWait2} {
		h = inState(t, s)
		h.shut()
		h.drain()
		h.in(fmt.Sprintf("F. 1:11 ack %d", h.snd.una))
		h.expect(fmt.Sprintf("R %d", h.snd.una))
		h.wantClosed(Aborted)
	}
	// Other states.
	h = inState(t, FinWait2)
	h.in("F. 1:11 ack 2")
	h.drain()
	h.shut() // unread, but both sides have said all: there is nobody to reset
	h.expect()
	h.in("F. 1:11 ack 2")
	h.expect(". 2 ack 12")
	h.want(TimeWait)
	if h.Buffered() != 0 || h.recvBuf.ring.mem != nil {
		t.Error("what nobody reads is kept in TIME-WAIT")
	}
	h = inState(t, SynSent)
	h.shut()
	h.expect()
	h.wantClosed(Aborted)
	h = inState(t, SynReceived)
	h.shut()
	h.expect()
	h.in(". 1 ack 1")
	h.expect("F. 1 ack 1")
	h.want(FinWait1)
	h = inState(t, CloseWait)
	h.shut()
	h.expect("F. 1 ack 2")
	h.want(LastAck)
	h = inState(t, TimeWait)
	h.shut()
	h.expect()
	h.want(TimeWait)
	h = inState(t, SynSent)
	h.closeWrite()
	h.wantClosed(Aborted)
}

// CloseRead throws away, and acknowledges all the same.
func TestCloseRead(t *testing.T) {
	h := established(t, "<mss 1460,sackOK>", buffers(1000, 10_000))
	h.in(". 1:5001 ack 1", ". 6001:7001 ack 1")
	h.expect(". 1 ack 5001 win 5000", ". 1 ack 5001 <sack 6001:7001>")
	h.closeRead()
	h.expect(". 1 ack 5001 win 10000") // opened by 5000
	if h.Buffered() != 0 {
		t.Error("still there")
	}
	// What was reported as received is not given up.
	h.in(". 5001:6001 ack 1")
	h.expect(". 1 ack 7001")
	for range 30 {
		off := h.rcv.nxt
		h.in(fmt.Sprintf(". %d:%d ack 1", off, off+5000))
	}
	if h.Buffered() != 0 || h.recvBuf.ring.size() != 0 {
		t.Error("data is kept")
	}
	h.in(fmt.Sprintf("F. %d ack 1", h.rcv.nxt))
	h.want(CloseWait)
	if !h.EOF() {
		t.Error("no end of file")
	}
}

// T130: the passive close.
func TestT130PassiveClose(t *testing.T) {
	h := inState(t, CloseWait)
	h.write(10)
	h.wantData("1:11")
	h.in(". 2 ack 11")
	h.closeWrite()
	h.expect("F. 11 ack 2")
	h.want(LastAck)
	h.in(". 2 ack 11") // T140: not the FIN
	h.want(LastAck)
	h.advance(minRTO)
	h.expect("F. 11 ack 2")
	h.in(". 2 ack 12")
	h.wantClosed(None)
	h.in(". 2 ack 12")
	h.expect()
}

// A peer with the smallest MSS, timestamps and holes in what it sends.
func TestTinyMSS(t *testing.T) {
	h := established(t, "<mss 1,sackOK,ts 0 0>")
	h.in(". 101:201 ack 1 <ts 0 0>", ". 301:401 ack 1 <ts 0 0>", ". 501:601 ack 1 <ts 0 0>")
	h.drain()
	h.write(500)
	for h.snd.una < 501 {
		if h.inFlight == 0 {
			t.Fatal("nothing sent")
		}
		h.drain()
		h.in(fmt.Sprintf(". 1 ack %d <ts 0 0>", h.snd.nxt))
	}
}
