package tcp

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// T094: the timeout doubles up to 120 s. T099: the connection is given up.
func TestT094Backoff(t *testing.T) {
	h := established(t, plain)
	h.rtt.rto = sec
	h.write(10)
	h.advance(time.Hour)
	want := []float64{0, 1, 3, 7, 15, 31, 63, 127, 247, 367, 487, 607, 727, 847, 967, 1087, 1207}
	if !slices.Equal(h.times, want) { // the last is the reset
		t.Errorf("sent at %v\nwant %v", h.times, want)
	}
	h.wantClosed(TimedOut)
	q := h.drain()
	if len(q) != maxRetries+2 || !match(q[16], "R. 11 ack 1") {
		t.Errorf("%q", q)
	}
	for _, s := range q[:16] {
		if !match(s, "P. 1:11 ack 1") {
			t.Errorf("sent %s", s)
		}
	}
	if h.Events()&EventClosed == 0 || h.Write([]byte{1}) != 0 {
		t.Error("no event")
	}
	// From 200 ms: not before 100 s.
	h = established(t, plain)
	h.write(10)
	h.advance(100 * sec)
	h.want(Established)
	if n := len(h.drain()); n < 9 {
		t.Errorf("sent %d times in 100 s", n)
	}
	h.advance(20 * time.Minute)
	h.wantClosed(TimedOut)
}

// T096: an ACK restarts the timer; when all is acknowledged none runs.
func TestT096Restart(t *testing.T) {
	h := passive(t, "S 0 "+plain)
	h.advance(100 * ms)
	h.in(". 1 ack 1") // RTO 300 ms
	h.write(2920)
	h.drain()
	h.advance(200 * ms)
	h.timing = false // keeps the RTO
	h.in(". 1 ack 1461")
	h.advance(299 * ms)
	h.expect()
	h.advance(ms)
	h.expect(". 1461:2921")
	h.in(". 1 ack 2921")
	if h.TCB.Deadline() != 0 {
		t.Errorf("a timer runs: %v", h.timers)
	}
}

// T143: keep-alive.
func TestT143KeepAlive(t *testing.T) {
	h := established(t, plain)
	h.advance(1000 * time.Hour)
	h.expect()
	h.want(Established)

	h = established(t, plain, keepAlive(2*time.Hour, 75*sec, 9))
	h.advance(2*time.Hour - 1)
	h.expect()
	h.advance(1)
	h.expect(". 0 ack 1")
	h.in(". 1 ack 1")
	h.advance(2*time.Hour - 1)
	h.expect()
	h.advance(1 + 75*sec) // one is lost
	h.expect(". 0 ack 1", ". 0 ack 1")
	h.in(". 1 ack 1")
	h.advance(2*time.Hour + 8*75*sec)
	if n := len(h.drain()); n != 9 {
		t.Errorf("%d probes", n)
	}
	h.want(Established)
	h.advance(75*sec - 1)
	h.want(Established)
	h.advance(1)
	h.wantClosed(TimedOut)
	h.expect("R. 1 ack 1")

	// Not while data is outstanding, nor at a closed window.
	h = established(t, plain, keepAlive(sec, sec, 2))
	h.write(10)
	h.drain()
	h.advance(60 * sec)
	for _, s := range h.drain() {
		if !match(s, "P. 1:11 ack 1") {
			t.Errorf("sent %s", s)
		}
	}
	h.in(". 1 ack 11 win 0")
	h.write(10)
	for range 100 {
		h.advance(sec)
		h.in(". 1 ack 11 win 0")
	}
	h.want(Established)

	// Half closed: both ways.
	for _, s := range []State{FinWait2, CloseWait} {
		h = inState(t, s)
		h.cfg.KeepAlive = KeepAlive{sec, sec, 2}
		h.heard(h.now)
		h.advance(10 * sec)
		h.wantClosed(TimedOut)
	}
	// Not in TIME-WAIT.
	h = established(t, plain, keepAlive(sec, sec, 2))
	h.closeWrite()
	h.in("F. 1 ack 2")
	h.drain()
	h.advance(timeWaitTime)
	h.expect()
	h.wantClosed(None)
}

// Whatever shows that the peer is alive counts: probes of a window that is closed,
// which lie below it, and data that has come before, when our ACKs are lost.
func TestKeepAliveSigns(t *testing.T) {
	signs := map[string]string{
		"a window probe":                ". 10 ack 1",
		"a window probe with a byte":    ". 11:12 ack 1",
		"a keep-alive with a byte":      ". 10:11 ack 1",
		"data again":                    ". 1:11 ack 1",
		"an old ACK":                    ". 5 ack 1",
		"data at the edge":              ". 11:21 ack 1",
		"an answer":                     ". 11 ack 1",
		"a FIN behind a closed window":  "F. 11 ack 1",
		"an acknowledgment of the past": ". 11 ack 0",
	}
	for name, sign := range signs {
		h := established(t, plain, buffers(4096, 10), keepAlive(60*sec, 5*sec, 3))
		h.silent = true
		h.in(". 1:11 ack 1") // nobody reads: the window is closed
		for range 20 {
			h.advance(30 * sec)
			h.in(sign)
			if h.state == Closed {
				break
			}
		}
		if h.state == Closed {
			t.Errorf("%s is no sign of life: %v", name, h.reason)
		}
	}
	// What a stranger may have sent does not.
	for name, sign := range map[string]string{
		"an ACK of what was not sent":     ". 11 ack 100",
		"an ACK of the far past":          ". 11 ack -200000",
		"a reset":                         "R 12",
		"data far behind the window":      ". 100000:100010 ack 1",
		"an old segment with such an ACK": ". 1:11 ack 100",
	} {
		h := established(t, plain, buffers(4096, 10), keepAlive(60*sec, 5*sec, 3))
		h.silent = true
		h.in(". 1:11 ack 1")
		for range 20 {
			h.advance(10 * sec)
			h.in(sign)
		}
		if h.state != Closed {
			t.Errorf("%s is a sign of life", name)
		}
	}
}

// Those who drive a TCB read the clock before they have it to themselves, so it may
// come to them in another order. Timestamps never go back (RFC 7323 section 5.4), or
// the peer would drop what is behind them, and no round trip takes less than no time.
func TestClockGoesBack(t *testing.T) {
	h := established(t, "<mss 1460,ts 100 0>")
	h.advance(sec)
	h.write(1000)
	h.now = h.now.Add(-100 * ms) // pull checks the timestamps
	h.write(1000)
	h.drain()
	h.in(". 1 ack 2001 <ts 100 1000>")
	if h.rtt.min < 0 || h.rtt.srtt < 0 {
		t.Errorf("%+v", h.rtt)
	}
	h.in(". 1:11 ack 2001 <ts 101 1000>", ". 1:11 ack 2001 <ts 102 1000>")
	h.expect(". 2001 ack 11")
}

// T129, T137, T138: TIME-WAIT.
func TestT137TimeWait(t *testing.T) {
	h := established(t, plain)
	h.closeWrite()
	h.expect("F. 1 ack 1")
	h.in(". 1 ack 2")
	h.want(FinWait2)
	h.Events()
	h.in("F. 1 ack 2")
	h.expect(". 2 ack 2")
	h.want(TimeWait)
	if h.Events()&(EventTimeWait|EventReadable) != EventTimeWait|EventReadable {
		t.Error("no event")
	}
	h.advance(59 * sec)
	h.in("F. 1 ack 2") // its ACK was lost
	h.expect(". 2 ack 2")
	h.in("R 2", "R 3", "R. 2 ack 2")
	h.expect()
	h.want(TimeWait)
	h.in(". 2:12 ack 2", ". 2 ack 2")
	h.expect(". 2 ack 2")
	h.advance(59 * sec)
	h.want(TimeWait)
	h.advance(sec)
	h.wantClosed(None)
	h.expect()
	if h.TCB.Deadline() != 0 || h.Events()&EventClosed == 0 {
		t.Error("not at rest")
	}
}

// T139: which SYN may begin anew.
func TestT139Replace(t *testing.T) {
	h := inState(t, TimeWait)
	may := func(text string, want bool) {
		t.Helper()
		s := h.parse(text)
		if h.MayReplace(&s) != want {
			t.Errorf("%s in %v: want %v", text, h.state, want)
		}
	}
	may("S 2", true)
	may("S 1", false)
	may("S -5", false)
	may("S 2000000000", true)
	may("S 3000000000", false) // more than half the space away
	may("S. 2 ack 1", false)
	may("SR 2", false)
	may("SF 2", false)
	may(". 2", false)
	may("SE 2 <mss 1460>", true)
	may("S 2 <ts 0 0>", true)

	h = established(t, "<mss 1460,ts 100 0>")
	h.closeWrite()
	h.in("F. 1 ack 2 <ts 100 0>")
	h.want(TimeWait)
	may("S 2 <ts 99 0>", false)
	may("S 2 <ts 100 0>", true)
	may("S 1 <ts 100 0>", false)
	may("S -100 <ts 101 0>", true)
	may("S 2", true)
	may("S 1", false)

	for _, s := range synchronizedStates {
		h = inState(t, s)
		may("S 1000", false)
	}
}

// T136: a connection that its application has left lasts as long as it makes
// progress, and a minute. S10: a little now and then is none.
func TestT136Orphan(t *testing.T) {
	for _, s := range []State{FinWait1, FinWait2, Closing, LastAck, CloseWait, Established} {
		h := inState(t, s)
		h.shut()
		h.advance(orphanTime - 1)
		if h.state == Closed {
			t.Errorf("%v: gone early", s)
		}
		h.drain()
		h.advance(1)
		h.wantClosed(TimedOut)
		if s == FinWait2 {
			h.expect()
		} else {
			h.expect(fmt.Sprintf("R. 2 ack %d", h.rcv.nxt))
		}
	}
	// Progress counts.
	h := established(t, plain)
	h.write(100_000)
	h.shut()
	for h.snd.una < 100_001 {
		h.want(FinWait1)
		h.advance(orphanTime - sec)
		for goal := min(h.snd.una+orphanBytes, 100_001); h.snd.una < goal; {
			h.in(fmt.Sprintf(". 1 ack %d", min(h.snd.una+1000, h.snd.nxt, 100_001)))
		}
	}
	h.want(FinWait1)
	h.in(". 1 ack 100002")
	h.want(FinWait2)
	h.advance(orphanTime - 1)
	h.want(FinWait2)
	h.advance(1)
	h.wantClosed(TimedOut)
	// A byte of a closed window at a time, or all but the last byte of what counts.
	for _, crumb := range []int64{1, orphanBytes / 6} {
		h = established(t, plain)
		h.in(". 1 ack 1 win 0")
		h.write(100_000)
		h.shut()
		for range 5 {
			h.advance(11 * sec)
			h.in(fmt.Sprintf(". 1 ack %d win %d", h.snd.nxt, crumb))
			h.want(FinWait1)
		}
		h.advance(5*sec - 1)
		h.want(FinWait1)
		h.advance(1)
		h.wantClosed(TimedOut)
	}
	// The FIN of the peer in time.
	h = inState(t, FinWait2)
	h.shut()
	h.advance(59 * sec)
	h.in("F. 1 ack 2")
	h.want(TimeWait)
	h.advance(59 * sec)
	h.want(TimeWait)
	h.advance(sec)
	h.wantClosed(None)
}

// T140: the last FIN is sent again.
func TestT140LastAck(t *testing.T) {
	for _, s := range []State{Closing, LastAck} {
		h := inState(t, s)
		h.advance(minRTO)
		h.expect("F. 1 ack 2")
		h.in(". 2 ack 3")
		h.expect(". 2 ack 2")
		h.want(s)
		h.advance(time.Hour)
		h.wantClosed(TimedOut)
		h = inState(t, s)
		h.in("R 2")
		h.wantClosed(Reset)
	}
}

// Advance leaves no deadline behind, however late it is called.
func TestAdvance(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 5))
	for range 300 {
		h := established(t, plain, keepAlive(10*sec, sec, 5))
		h.silent = true
		for range 30 {
			switch rnd.IntN(5) {
			case 0:
				h.Write(patterned(fromTCB, h.sendBuf.end, h.sendBuf.end+rnd.Int64N(3000)))
			case 1:
				h.in(fmt.Sprintf(". %d ack %d win %d", h.rcv.nxt, h.snd.nxt, rnd.IntN(2)*rnd.IntN(60000)))
			case 2:
				h.in(fmt.Sprintf(". %d:%d ack %d win %d", h.rcv.nxt, h.rcv.nxt+100, h.snd.una, rnd.IntN(60000)))
			case 3:
				h.CloseWrite()
			}
			for h.Output(h.now, make([]byte, 2000)) > 0 {
			}
			h.now = h.now.Add(time.Duration(rnd.Int64N(int64(30 * sec))))
			h.Advance(h.now)
			if d := h.TCB.Deadline(); d != 0 && d <= h.now {
				t.Fatalf("%v: deadline in the past: %v", h.state, h.timers)
			}
			for h.Output(h.now, make([]byte, 2000)) > 0 {
			}
			if d := h.TCB.Deadline(); d != 0 && d <= h.now {
				t.Fatalf("%v: deadline in the past after Output: %v", h.state, h.timers)
			}
			h.Advance(h.now) // nothing is due
			if h.Output(h.now, make([]byte, 2000)) > 0 {
				t.Fatal("more is due than before")
			}
		}
	}
}

// A TCB that nothing waits for has no deadline, and sends nothing.
func TestAtRest(t *testing.T) {
	h := inState(t, Established)
	if d := h.TCB.Deadline(); d != 0 {
		t.Errorf("deadline %v", d)
	}
	h.advance(1000 * time.Hour)
	h.expect()
	if h.recvBuf.ring.size() != 0 || h.sendBuf.ring.size() != 0 {
		t.Error("an idle connection holds memory")
	}
}

// A time that is longer than a Duration can tell from the beginning of the connection
// is never, and not now.
func TestKeepAliveForever(t *testing.T) {
	h := established(t, plain, keepAlive(math.MaxInt64, 5*sec, 3))
	h.now = h.now.Add(sec)
	h.in(". 1 ack 1 win 65535")
	h.drain()
	if d := h.TCB.Deadline(); d.Sub(h.now) < 365*24*time.Hour {
		t.Errorf("a timer runs out in %v", d.Sub(h.now))
	}
}
