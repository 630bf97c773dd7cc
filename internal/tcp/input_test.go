package tcp

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// plain is a SYN with which no option but MSS comes into force.
const plain = "<mss 1460>"

// inState brings a connection into a state. Without data sent, the next
// sequence numbers are h.snd.nxt and h.rcv.nxt; the window is 65535.
func inState(t *testing.T, s State) *harness {
	t.Helper()
	small := buffers(1<<20, 65535)
	var h *harness
	switch s {
	case SynSent:
		h = active(t, small)
	case SynReceived:
		h = passive(t, "S 0 "+plain, small)
	default:
		h = established(t, plain, small)
	}
	switch s {
	case FinWait1, FinWait2, Closing, TimeWait:
		h.closeWrite()
	case CloseWait, LastAck:
		h.in("F. 1 ack 1")
		if s == LastAck {
			h.closeWrite()
		}
	}
	switch s {
	case FinWait2:
		h.in(". 1 ack 2")
	case Closing:
		h.in("F. 1 ack 1")
	case TimeWait:
		h.in(". 1 ack 2", "F. 1 ack 2")
	}
	h.want(s)
	h.drain()
	return h
}

// synchronizedStates are those with a complete handshake, but TIME-WAIT.
var synchronizedStates = []State{Established, FinWait1, FinWait2, CloseWait, Closing, LastAck}

func TestStateNames(t *testing.T) {
	for s := Closed; s <= TimeWait; s++ {
		if s.String() == "" {
			t.Errorf("state %d has no name", s)
		}
	}
}

// T064: a reset at exactly RCV.NXT ends every state. T067: it may carry an ACK
// and data, which is not delivered.
func TestT064ResetExact(t *testing.T) {
	for _, s := range append(synchronizedStates, SynReceived) {
		for _, form := range []string{"R %d", "R. %d ack 1", "R. %d:%d ack 1", "R. %d ack 777", "RF. %d ack 1"} {
			h := inState(t, s)
			form = strings.Replace(form, "%d:%d", fmt.Sprintf("%d:%d", h.rcv.nxt, h.rcv.nxt+20), 1)
			h.in(strings.Replace(form, "%d", fmt.Sprint(h.rcv.nxt), 1))
			h.expect()
			h.wantClosed(Reset)
			if h.Buffered() != 0 || h.Events()&EventClosed == 0 {
				t.Errorf("%v, %s: data or no event", s, form)
			}
			h.in(". 2 ack 2", "F. 2 ack 2", "S 5", "R 9") // a closed connection says no more
			h.expect()
			if h.Write([]byte{1}) != 0 || h.Reserve(1) != nil || h.Free() != 0 {
				t.Errorf("%v: a closed connection takes data", s)
			}
		}
	}
}

// T065, T066: a reset that is not exact is challenged if it is in the window,
// otherwise dropped in silence.
func TestT065ResetInWindow(t *testing.T) {
	for _, s := range append(synchronizedStates, SynReceived) {
		h := inState(t, s)
		nxt, adv := h.rcv.nxt, h.rcv.adv
		for _, seq := range []int64{nxt - 1, adv, adv + 1, nxt - 100_000, nxt + 1<<31 - 5, nxt - 1<<31} {
			h.in(fmt.Sprintf("R %d", seq), fmt.Sprintf("R. %d ack %d", seq, h.snd.nxt))
			h.expect()
			h.want(s)
		}
		for _, seq := range []int64{nxt + 1, adv - 1, nxt + 1000} {
			h.in(fmt.Sprintf("R %d", seq))
			h.expect(fmt.Sprintf(". %d ack %d", h.snd.nxt, nxt))
			h.want(s)
			h.now = h.now.Add(challengePause)
		}
	}
}

// T068: a SYN in any synchronized state is challenged, whatever its number.
func TestT068SYN(t *testing.T) {
	for _, s := range append(synchronizedStates, TimeWait) {
		h := inState(t, s)
		nxt, adv := h.rcv.nxt, h.rcv.adv
		for _, seq := range []int64{nxt - 1, nxt, adv - 1, adv, nxt + 1<<30, nxt - 2} {
			for _, form := range []string{"S %d", "S. %d ack 1", "SE %d", "SF. %d ack 1", "SP. %d:%d ack 1"} {
				form = strings.Replace(form, "%d:%d", fmt.Sprintf("%d:%d", seq, seq+10), 1)
				h.in(strings.Replace(form, "%d", fmt.Sprint(seq), 1) + " <mss 99>")
				h.expect(fmt.Sprintf(". %d ack %d", h.snd.nxt, nxt))
				h.want(s)
				h.now = h.now.Add(challengePause)
			}
		}
		if h.snd.mss != 1460 || h.Buffered() != 0 {
			t.Errorf("%v: the SYN was taken", s)
		}
	}
}

// T069: challenge ACKs are limited per connection.
func TestT069ChallengeRate(t *testing.T) {
	h := inState(t, Established)
	for range 1000 {
		h.in("R 100")
		h.now = h.now.Add(ms)
	}
	if n := len(h.drain()); n != 2 {
		t.Errorf("%d ACKs to 1000 resets in a second, want 2", n)
	}
	// Of all kinds together.
	h.now = h.now.Add(sec)
	h.in("R 100", "S 0", ". 1 ack 99999", ". 70000 ack 1", "R 5", ". 0 ack 1")
	h.expect(". 1 ack 1")
}

// T048: table 6 of RFC 9293 section 3.10.7.4, and T049: the answer.
func TestT048Acceptability(t *testing.T) {
	for _, open := range []bool{true, false} {
		for _, n := range []int64{0, 1, 100} {
			for edge := range 4 {
				h := established(t, plain, buffers(1<<20, 65535))
				if !open {
					h.in(". 1:30001 ack 1", ". 30001:65536 ack 1")
					if h.rcv.adv != h.rcv.nxt {
						t.Fatal("the window is not closed")
					}
				}
				h.drain()
				h.now = h.now.Add(sec)
				nxt, wnd := h.rcv.nxt, h.rcv.adv-h.rcv.nxt
				seq := []int64{nxt - 1, nxt, nxt + wnd - 1, nxt + wnd}[edge]
				last := seq + n - 1
				inWindow := func(x int64) bool { return nxt <= x && x < nxt+wnd }
				var ok bool
				switch {
				case n == 0 && wnd == 0:
					ok = seq == nxt
				case n == 0:
					ok = inWindow(seq)
				case wnd > 0:
					ok = inWindow(seq) || inWindow(last)
				}
				s := fmt.Sprintf(". %d ack 1", seq)
				if n > 0 {
					s = fmt.Sprintf(". %d:%d ack 1", seq, seq+n)
				}
				before := h.Buffered()
				h.in(s)
				if !ok {
					h.expect(fmt.Sprintf(". 1 ack %d win %d", nxt, wnd))
				} else if n == 0 {
					h.expect()
				}
				if taken := h.Buffered() - before; !ok && taken != 0 {
					t.Errorf("window %d, %s: %d bytes taken", wnd, s, taken)
				}
			}
		}
	}
}

// T049: the answer to segments without data that are not acceptable is limited.
func TestT049Refused(t *testing.T) {
	h := inState(t, Established)
	h.in(". 70000 ack 1")
	h.expect(". 1 ack 1")
	h.in(". 70000 ack 1", ". 0 ack 1")
	h.expect()
	h.in(". 70000:70010 ack 1", ". -9:1 ack 1") // with data: each
	h.expect(". 1 ack 1", ". 1 ack 1")
	h.advance(challengePause)
	h.in(". 70000 ack 1")
	h.expect(". 1 ack 1")
	// T144: a keep-alive of the peer, without and with a byte.
	h.advance(challengePause)
	h.in(". 0 ack 1", ". 0:1 ack 1")
	h.expect(". 1 ack 1", ". 1 ack 1")
	if h.Buffered() != 0 {
		t.Error("the byte of a keep-alive was delivered")
	}
}

// T057, T058, T059 and duplicate, old and future ACKs in every state.
func TestAckGrid(t *testing.T) {
	for _, s := range synchronizedStates {
		h := inState(t, s)
		nxt, una, snd := h.rcv.nxt, h.snd.una, h.snd.nxt
		keep := func() {
			t.Helper()
			h.want(s)
			if h.snd.una != una || h.rcv.nxt != nxt || h.Buffered() != 0 {
				t.Fatalf("%v: something was taken", s)
			}
			h.now = h.now.Add(challengePause)
		}
		h.in(fmt.Sprintf(". %d ack %d", nxt, una)) // duplicate
		h.expect()
		keep()
		h.in(fmt.Sprintf(". %d ack %d", nxt, una-1)) // old, in range
		h.expect()
		keep()
		h.in(fmt.Sprintf(". %d ack %d", nxt, una-65535))
		h.expect()
		keep()
		h.in(fmt.Sprintf(". %d:%d ack %d", nxt, nxt+9, una-65536)) // too old
		h.expect(fmt.Sprintf(". %d ack %d", snd, nxt))
		keep()
		h.in(fmt.Sprintf(". %d:%d ack %d", nxt, nxt+9, snd+1)) // of the future
		h.expect(fmt.Sprintf(". %d ack %d", snd, nxt))
		keep()
		for _, f := range []string{"-", "P", "F", "U", "FPU"} { // no ACK
			h.in(fmt.Sprintf("%s %d:%d", f, nxt, nxt+9))
			h.expect()
			keep()
		}
		h.in(fmt.Sprintf(". %d:%d ack %d", h.rcv.adv+1, h.rcv.adv+9, snd)) // beyond the window
		h.expect(fmt.Sprintf(". %d ack %d", snd, nxt))
		keep()
	}
	// An old ACK that is in range brings its data.
	h := inState(t, Established)
	h.in(". 1:11 ack -5")
	h.advance(sec)
	h.expect(". 1 ack 11")
	h.read(10)
}

// A FIN in every state.
func TestFINGrid(t *testing.T) {
	tests := []struct {
		from, to State
		ack      int64 // what the FIN acknowledges
	}{
		{Established, CloseWait, 1}, {FinWait1, Closing, 1}, {FinWait1, TimeWait, 2}, {FinWait2, TimeWait, 2},
		{CloseWait, CloseWait, 1}, {Closing, Closing, 1}, {LastAck, LastAck, 1}, {TimeWait, TimeWait, 2},
	}
	for _, tt := range tests {
		h := inState(t, tt.from)
		fin := int64(1)
		h.in(fmt.Sprintf("F. %d ack %d", fin, tt.ack))
		h.expect(fmt.Sprintf(". %d ack 2", h.snd.nxt))
		h.want(tt.to)
		if !h.EOF() {
			t.Errorf("%v: no end of file", tt.from)
		}
		h.advance(sec)
		h.drain()
		h.in(fmt.Sprintf("F. %d ack %d", fin, tt.ack)) // again
		h.expect(fmt.Sprintf(". %d ack 2", h.snd.nxt))
		h.want(tt.to)
	}
}

// T137: an acceptable ACK in TIME-WAIT has no answer. If it had one, two ends in
// TIME-WAIT would go on to answer each other.
func TestT137BareACK(t *testing.T) {
	h := inState(t, TimeWait)
	for _, seg := range []string{". 2 ack 2", ". 100 ack 2", "P 2"} {
		h.in(seg)
		h.expect()
	}
	for _, seg := range []string{". 1 ack 2", ". 2:12 ack 2", fmt.Sprintf(". %d ack 2", h.rcv.adv)} {
		h.in(seg)
		h.expect(". 2 ack 2")
		h.now = h.now.Add(challengePause)
	}
	h.want(TimeWait)

	h = established(t, "<mss 1460,ts 1000 0>")
	h.closeWrite()
	h.in("F. 1 ack 2 <ts 1000 0>")
	h.want(TimeWait)
	h.drain()
	h.in(". 2 ack 2 <ts 1001 0>") // its timestamp counts
	h.expect()
	h.in(". 2 ack 2 <ts 1000 0>") // PAWS
	h.expect(". 2 ack 2 <ts 0 1001>")
}

// T056: text and another FIN behind the FIN are ignored and answered.
func TestT056BehindFIN(t *testing.T) {
	for _, s := range []State{CloseWait, Closing, LastAck} {
		h := inState(t, s)
		for _, seg := range []string{". 2:12 ack 1", "F. 7 ack 1", "F. 2:5 ack 1", ". 1:12 ack 1", "F. 1:3 ack 1"} {
			h.in(seg)
			h.expect(fmt.Sprintf(". %d ack 2", h.snd.nxt))
			h.now = h.now.Add(challengePause)
			h.want(s)
			if h.Buffered() != 0 || !h.EOF() {
				t.Errorf("%v: %s delivered something", s, seg)
			}
		}
	}
}

// T013: the handshake of a connection that the peer begins. T014: an option is
// offered back only if the peer offered it.
func TestT014Options(t *testing.T) {
	for mask := range 8 {
		offer, answer := []string{"mss 1460"}, []string{"mss 1460"}
		if mask&1 != 0 {
			offer, answer = append(offer, "sackOK"), append(answer, "sackOK")
		}
		if mask&2 != 0 {
			offer, answer = append(offer, "ts 5 0"), append(answer, "ts 0 5")
		}
		if mask&4 != 0 {
			offer, answer = append(offer, "ws 7"), append(answer, "ws 5")
		}
		h := passive(t, "S 0 <"+strings.Join(offer, ",")+">")
		h.expect("S. 0 ack 1 win 65535 <" + strings.Join(answer, ",") + ">")
		h.in(". 1 ack 1")
		h.want(Established)
		if h.Events()&EventConnected == 0 {
			t.Error("no event")
		}
		// T091: and nothing that was not negotiated is used.
		h.in(". 101:201 ack 1")
		got := h.drain()
		if strings.Contains(got[0], "sack") != (mask&1 != 0) || strings.Contains(got[0], "ts") != (mask&2 != 0) {
			t.Errorf("offered %v, sent %s", offer, got[0])
		}
		// An active side offers all and uses what is answered.
		h = active(t)
		h.expect("S 0 win 65535 <mss 1460,sackOK,ts 0 " + fmt.Sprint(0) + ",ws 5>")
		h.in("S. 0 ack 1 <" + strings.Join(offer, ",") + ">")
		h.want(Established)
		h.drain()
		h.in(". 101:201 ack 1")
		got = h.drain()
		if strings.Contains(got[0], "sack") != (mask&1 != 0) || strings.Contains(got[0], "ts") != (mask&2 != 0) {
			t.Errorf("answered %v, sent %s", offer, got[0])
		}
		win := 65535
		if mask&4 != 0 {
			win = (1 << 20) >> 5
		}
		if !strings.Contains(got[0], fmt.Sprint("win ", win)) {
			t.Errorf("answered %v, sent %s, want win %d", offer, got[0], win)
		}
	}
}

// T015, T016, T017: the size of a segment.
func TestT015MSS(t *testing.T) {
	tests := []struct {
		syn     string
		link    int
		def     int
		want    int64
		offered string
	}{
		{"", 1460, 536, 536, "1460"}, {"", 1440, 1220, 1220, "1440"}, {"", 500, 536, 500, "500"},
		{"<mss 1460>", 1460, 536, 1460, "1460"}, {"<mss 1460,ts 0 0>", 1460, 536, 1448, "1460"},
		{"<mss 1440,ts 0 0>", 1220, 1220, 1208, "1220"},
		{"<mss 0>", 1460, 536, 536, "1460"}, {"<mss 1>", 1460, 536, 48, "1460"}, {"<mss 47>", 1460, 536, 48, "1460"},
		{"<mss 48>", 1460, 536, 48, "1460"}, {"<mss 49>", 1460, 536, 49, "1460"}, {"<mss 65535>", 1460, 536, 1460, "1460"},
		{"<mss 48,ts 0 0>", 1460, 536, 36, "1460"}, {"<mss 65535>", 65495, 536, 65495, "65495"},
	}
	for _, tt := range tests {
		h := passive(t, "S 0 "+tt.syn, linkMSS(tt.link), func(c *Config) { c.DefaultMSS = tt.def })
		if got := h.drain()[0]; !strings.Contains(got, "<mss "+tt.offered) {
			t.Errorf("%s: sent %s, want MSS %s", tt.syn, got, tt.offered)
		}
		h.in(". 1 ack 1")
		h.write(5 * tt.want)
		got := h.data()
		for i, r := range got {
			if want := fmt.Sprintf("%d:%d", int64(i)*tt.want+1, int64(i+1)*tt.want+1); r != want {
				t.Errorf("%s: segment %s, want %s", tt.syn, r, want)
			}
		}
		if len(got) == 0 {
			t.Errorf("%s: nothing sent", tt.syn)
		}
		// T007: on another segment the option means nothing.
		h.in(". 1 ack 1 <mss 100>")
		if h.mss() != tt.want {
			t.Errorf("the option counts without SYN")
		}
	}
}

// A segment with SACK blocks has room for less data.
func TestT016SACKBlocks(t *testing.T) {
	h := established(t, "<mss 1460,sackOK,ts 0 0>")
	h.in(". 101:201 ack 1 <ts 0 0>", ". 301:401 ack 1 <ts 0 0>", ". 501:601 ack 1 <ts 0 0>", ". 701:801 ack 1 <ts 0 0>")
	h.drain()
	h.write(3000)
	h.wantData("1:1421", "1421:2841", "2841:3001") // 1460 - 12 - 4 - 3*8
}

// T018: the window of a SYN is not scaled. T019: a shift above 14 is 14.
func TestT018PeerScale(t *testing.T) {
	h := passive(t, "S 0 win 100 <mss 1460,ws 7>")
	h.drain()
	if h.snd.wnd != 100 {
		t.Errorf("window %d, want 100", h.snd.wnd)
	}
	h.in(". 1 ack 1 win 1")
	h.write(1000)
	h.wantData("1:129")
	for _, shift := range []int{14, 15, 31, 255} {
		h := passive(t, fmt.Sprintf("S 0 win 100 <mss 1460,ws %d>", min(shift, 14)))
		h.in(". 1 ack 1 win 1")
		if h.snd.wnd != 16384 {
			t.Errorf("shift %d: window %d", shift, h.snd.wnd)
		}
		h.in(". 1 ack 1 win 65535") // T011
		if h.snd.wnd != 1073725440 {
			t.Errorf("shift %d: window %d", shift, h.snd.wnd)
		}
	}
	// The same for an active open: neither the SYN-ACK's nor that of a crossing SYN.
	h = active(t)
	h.in("S. 0 ack 1 win 100 <mss 1460,ws 7>")
	if h.snd.wnd != 100 {
		t.Errorf("window of a SYN-ACK is %d", h.snd.wnd)
	}
	h = active(t)
	h.in("S 0 win 100 <mss 1460,ws 7>", "S. 0 ack 1 win 100 <mss 1460,ws 7>")
	h.want(Established)
	if h.snd.wnd != 100 {
		t.Errorf("window of a crossing SYN-ACK is %d", h.snd.wnd)
	}
}

// T020: our own scale is the smallest that holds the buffer, and no window
// promises more than the buffer has.
func TestT020OwnScale(t *testing.T) {
	for size, scale := range map[int]int{1000: 0, 65535: 0, 65536: 1, 131070: 1, 131071: 2, 1 << 20: 5, 4 << 20: 7, 1 << 30: 14} {
		h := passive(t, "S 0 <mss 1460,ws 0>", buffers(1000, size))
		h.expect(fmt.Sprintf("S. 0 ack 1 win %d <mss 1460,ws %d>", min(size, 65535), scale))
		h.in(". 1 ack 1", ". 1:101 ack 1")
		h.read(100)
		h.in(". 101:151 ack 1")
		h.advance(sec)
		h.drain()
		if h.edge > 1+100+int64(size)+(1<<scale-1) { // rounded up to the scale
			t.Errorf("size %d: window up to %d", size, h.edge)
		}
		h = active(t, buffers(1000, size))
		h.expect(fmt.Sprintf("S 0 win %d <mss 1460,sackOK,ts 0 0,ws %d>", min(size, 65535), scale))
		h.in("S. 0 ack 1 <mss 1460>") // no scale: ours is 0 too
		h.expect(fmt.Sprintf(". 1 ack 1 win %d <>", min(size, 65535)))
		if h.rcv.adv > 1+int64(size) {
			t.Errorf("size %d: window up to %d", size, h.rcv.adv)
		}
	}
}

// A buffer that the window field cannot express without a scale gives no reason
// for window updates that say nothing new.
func TestUnscaledWindowUpdates(t *testing.T) {
	h := established(t, plain, buffers(1000, 1<<20))
	h.in(". 1:1461 ack 1", ". 1461:2921 ack 1")
	h.expect(". 1 ack 2921 win 65535")
	for range 100 {
		h.read(20)
	}
	h.expect()
}

// T022: a SYN that comes again, T028: with data. T025: another SYN.
func TestT022DuplicateSYN(t *testing.T) {
	h := passive(t, "S 0:10 <mss 1460,ws 7>")
	h.expect("S. 0 ack 1")
	for range 10 {
		h.in("S 0 win 5 <mss 99,sackOK,ts 9 9>")
		h.now = h.now.Add(10 * ms)
	}
	h.expect("S. 0 ack 1 <mss 1460,ws 5>")
	if h.snd.mss != 1460 || h.snd.wnd != 65535 {
		t.Error("a duplicate changed the connection")
	}
	h.now = h.now.Add(challengePause)
	h.in("S 5000")
	h.expect(". 1 ack 1")
	h.want(SynReceived)
	h.in(". 1:11 ack 1")
	h.read(10)
	h.want(Established)
}

// The time from the first SYN-ACK says nothing once another was sent.
func TestRepeatedSYNACKNotTimed(t *testing.T) {
	h := passive(t, "S 0 "+plain)
	h.advance(900 * ms)
	h.in("S 0 " + plain)
	h.advance(50 * ms)
	h.in(". 1 ack 1")
	if h.rtt.srtt != 0 {
		t.Errorf("SRTT %v from a segment that was sent twice", h.rtt.srtt)
	}
}

// T026, T027, T029.
func TestT026SynReceived(t *testing.T) {
	h := inState(t, SynReceived)
	h.in(". 1 ack 0", ". 1 ack 2", ". 1:5 ack 77")
	h.expect("R 0", "R 2", "R 77")
	h.want(SynReceived)
	h.in(". 1:5 ack 1")
	h.want(Established)
	h.read(4)
	h.advance(delackTimeout)
	h.expect(". 1 ack 5")

	h = inState(t, SynReceived)
	h.in("F. 1 ack 1")
	h.want(CloseWait)
	h.expect(". 1 ack 2")

	h = inState(t, SynReceived)
	h.in("R 1")
	h.wantClosed(Reset)
	h.expect()

	// Data that is written before the handshake has ended waits for it.
	h = inState(t, SynReceived)
	h.write(10)
	h.closeWrite()
	h.expect()
	h.in(". 1 ack 1")
	h.want(FinWait1)
	h.expect("F. 1:11 ack 1")
}

// T038: the SYN is sent again, and given up.
func TestT038SYN(t *testing.T) {
	h := active(t)
	h.advance(10 * time.Minute)
	if want := []float64{0, 1, 3, 7, 15, 31, 63, 127}; !slices.Equal(h.times, want) {
		t.Errorf("SYNs at %v, want %v", h.times, want)
	}
	h.wantClosed(TimedOut)
	for _, s := range h.drain() {
		if !match(s, "S 0 win 65535") {
			t.Errorf("sent %s", s)
		}
	}
	h = active(t)
	h.advance(255*sec - 1)
	h.want(SynSent)
	h.advance(1)
	h.wantClosed(TimedOut)
}

// T021: the SYN-ACK is sent again, and given up with a reset.
func TestT021SYNACK(t *testing.T) {
	h := passive(t, "S 0 "+plain)
	h.advance(63*sec - 1)
	if want := []float64{0, 1, 3, 7, 15, 31}; !slices.Equal(h.times, want) {
		t.Errorf("SYN-ACKs at %v, want %v", h.times, want)
	}
	for _, s := range h.drain() {
		if !match(s, "S. 0 ack 1 win 65535") {
			t.Errorf("sent %s", s)
		}
	}
	h.want(SynReceived)
	h.advance(1)
	h.wantClosed(TimedOut)
	h.expect()
}

// T039, T040, T044.
func TestT039SynSent(t *testing.T) {
	h := active(t)
	h.drain()
	h.in("S. 0 ack 0", "S. 0 ack 2", ". 0 ack 777", "SF. 0 ack -1")
	h.expect("R 0", "R 2", "R 777", "R -1")
	h.in("R 1", "R. 0 ack 0", "R. 0 ack 2", "SR 0", "R. 5 ack 9") // not ours
	h.expect()
	h.in("- 0", "F 0", "- 0:10", ". 0 ack 1", "F. 0 ack 1", "P. 0:5 ack 1") // no SYN
	h.expect()
	h.want(SynSent)
	h.in("S. 0 ack 1 " + plain)
	h.want(Established)
	h.expect(". 1 ack 1")

	h = active(t)
	h.drain()
	h.in("R. 0 ack 1")
	h.expect()
	h.wantClosed(Refused)
}

// T041: simultaneous open. T042: it remembers who began.
func TestT041SimultaneousOpen(t *testing.T) {
	for _, last := range []string{"S. 0 ack 1 <mss 1460,sackOK,ws 7>", ". 1 ack 1", ". 1:4 ack 1", "F. 1 ack 1", "S. 0 ack 1"} {
		h := active(t)
		h.expect("S 0 <mss 1460,sackOK,ts 0 0,ws 5>")
		h.in("S 0 <mss 1460,sackOK,ws 7>")
		h.want(SynReceived)
		h.expect("S. 0 ack 1 win 65535 <mss 1460,sackOK,ws 5>")
		h.in(last)
		if strings.Contains(last, "F") {
			h.want(CloseWait)
		} else {
			h.want(Established)
		}
		if h.Events()&EventConnected == 0 {
			t.Error("no event")
		}
		h.drain()
		off := h.rcv.nxt
		h.write(10)
		h.expect(fmt.Sprintf("P. 1:11 ack %d", off))
		if h.state == Established {
			h.in(fmt.Sprintf(". %d:%d ack 11", off, off+5))
			h.read(int(off) + 4)
		}
	}
	h := active(t)
	h.in("S 0 " + plain)
	h.in("R 1")
	h.wantClosed(Refused)

	// The SYN of the peer comes again: so does the answer.
	h = active(t)
	h.in("S 0 " + plain)
	h.drain()
	h.advance(100 * ms)
	h.in("S 0 " + plain)
	h.expect("S. 0 ack 1")
	// A SYN-ACK that acknowledges something else is refused.
	h.in("S. 0 ack 2")
	h.expect("R 2")
	h.want(SynReceived)
	// The timer goes on from the SYN.
	h.advance(900 * ms)
	h.expect("S. 0 ack 1")
	h.advance(5 * time.Minute)
	h.wantClosed(TimedOut)
}

// T043: a SYN-ACK with data, and with a FIN.
func TestT043SYNACKData(t *testing.T) {
	h := active(t)
	h.drain()
	h.in("SP. 0:5 ack 1 " + plain) // the SYN is 0, so the data is at 1
	h.expect(". 1 ack 6")
	p := make([]byte, 9)
	if n := h.Read(p); n != 5 {
		t.Errorf("read %d bytes", n)
	}
	h = active(t)
	h.drain()
	h.in("SF. 0 ack 1 " + plain)
	h.want(CloseWait)
	h.expect(". 1 ack 2")
	h = active(t)
	h.drain()
	h.in("SF. 0:5 ack 1 " + plain)
	h.want(CloseWait)
	h.expect(". 1 ack 7")
}

// T050, T051, T052, T054, T055, T062.
func TestT050Trim(t *testing.T) {
	h := inState(t, Established)
	h.in(". 1:101 ack 1", ". 51:151 ack 1")
	h.expect(". 1 ack 151")
	h.read(150)

	h = established(t, plain, buffers(1000, 5000))
	h.in("F. 4001:54001 ack 1")
	h.expect(". 1 ack 1")
	h.in(". 1:4001 ack 1")
	h.expect(". 1 ack 5001 win 0")
	h.want(Established)
	h.in("F. 5001 ack 1")
	h.expect(". 1 ack 5001 win 0") // no room for the FIN
	h.read(5000)
	h.expect(". 1 ack 5001 win 5000")
	h.in("F. 5001 ack 1")
	h.want(CloseWait)

	// The FIN does not fit, the data does.
	h = established(t, plain, buffers(1000, 5000))
	h.in("F. 1:5001 ack 1")
	h.want(Established)
	h.expect(". 1 ack 5001 win 0")
	// And when it does.
	h = established(t, plain, buffers(1000, 5000))
	h.in("F. 1:5000 ack 1")
	h.want(CloseWait)
	h.expect(". 1 ack 5001 win 0")
	h.read(4999)
	h.expect()
	if !h.EOF() {
		t.Error("no end of file")
	}

	// T062: a hole is filled, and everything behind it acknowledged once.
	h = inState(t, Established)
	for i := int64(1); i <= 10; i++ {
		h.in(fmt.Sprintf(". %d:%d ack 1", i*100+1, i*100+101))
	}
	if n := len(h.drain()); n != 10 {
		t.Errorf("%d duplicate ACKs", n)
	}
	h.in(". 1:101 ack 1")
	h.expect(". 1 ack 1101")

	// T054: a FIN out of order.
	h = inState(t, Established)
	h.in("F. 1001 ack 1")
	h.expect(". 1 ack 1")
	h.want(Established)
	if h.EOF() {
		t.Error("end of file too early")
	}
	h.in(". 1:1001 ack 1")
	h.expect(". 1 ack 1002")
	h.want(CloseWait)
	h.read(1000)
	// T055.
	h = inState(t, Established)
	h.in("FP. 1:1001 ack 1")
	h.expect(". 1 ack 1002")
	if h.EOF() {
		t.Error("end of file before the data")
	}
	h.read(1000)
	if !h.EOF() {
		t.Error("no end of file")
	}
}

// What is said first about the end of the data counts.
func TestFINConflict(t *testing.T) {
	h := inState(t, Established)
	h.in("F. 501 ack 1", ". 501:601 ack 1", ". 401:601 ack 1", "F. 701 ack 1", "F. 301 ack 1", ". 1:601 ack 1")
	h.want(CloseWait)
	h.read(500)
	if !h.EOF() || h.rcv.nxt != 502 {
		t.Errorf("next %d", h.rcv.nxt)
	}
	h = inState(t, Established)
	h.in(". 301:401 ack 1", "F. 201 ack 1", ". 1:301 ack 1") // data is held behind that FIN
	h.want(Established)
	h.read(400)
}

// T060: an older segment does not change the window.
func TestT060WindowOrder(t *testing.T) {
	h := inState(t, Established)
	h.write(3000)
	h.in(". 1 ack 1461 win 1000", ". 1 ack 1 win 60000")
	if h.snd.wnd != 1000 {
		t.Errorf("window %d", h.snd.wnd)
	}
	h.in(". 11:21 ack 1461 win 2000", ". 1:11 ack 1461 win 3000", ". 1 ack 1461 win 4000")
	if h.snd.wnd != 2000 {
		t.Errorf("window %d", h.snd.wnd)
	}
	h.in(". 21 ack 1461 win 5000", ". 21 ack 1461 win 6000")
	if h.snd.wnd != 6000 {
		t.Errorf("window %d", h.snd.wnd)
	}
}

// T061: the peer's FIN comes behind its ACK of ours.
func TestT061ReorderedFIN(t *testing.T) {
	h := inState(t, FinWait1)
	h.in(". 2 ack 2")
	h.want(FinWait2)
	h.in("F. 1 ack 1")
	h.want(TimeWait)
	h.expect(". 2 ack 2")
}

// T070: at a closed window ACKs and resets count (MUST-66), data does not.
func TestT070ClosedWindow(t *testing.T) {
	fill := func() *harness {
		h := established(t, plain, buffers(100_000, 20_000))
		h.in(". 1:20001 ack 1")
		h.drain()
		h.write(5000)
		h.drain()
		return h
	}
	h := fill()
	h.in(". 20001 ack 1461", ". 20001:20002 ack 2921")
	h.expect(". 5001 ack 20001 win 0")
	if h.snd.una != 2921 {
		t.Errorf("acknowledged up to %d", h.snd.una)
	}
	h.in("F. 20001 ack 4381")
	if h.snd.una != 4381 || h.state != Established {
		t.Errorf("acknowledged up to %d in %v", h.snd.una, h.state)
	}
	h.in("R 20001")
	h.wantClosed(Reset)
	h.read(20000) // what had arrived can still be read

	// T106: segments with data are no duplicate ACKs, not even if the data is refused.
	h = fill()
	for range 5 {
		h.in(". 20001:20002 ack 1")
	}
	if h.loss.phase != phaseOpen || h.loss.dupAcks != 0 {
		t.Errorf("probes of our window counted as duplicate ACKs: %+v", h.loss)
	}
	for _, s := range h.drain() {
		if !match(s, ". 5001 ack 20001 win 0") {
			t.Errorf("sent %s", s)
		}
	}
}

// A peer that has filled our window, with some of that lost, sends its ACKs from
// the right edge. They count, and are answered.
func TestAckAtRightEdge(t *testing.T) {
	h := established(t, plain, buffers(100_000, 20_000))
	h.write(5000)
	h.in(". 1001:20001 ack 1") // the first 1000 bytes are lost
	h.drain()
	h.in(". 20001 ack 5001")
	h.expect(". 5001 ack 1")
	if h.snd.una != 5001 {
		t.Errorf("acknowledged up to %d", h.snd.una)
	}
	h.in(". 20002 ack 5001 win 1")
	if h.snd.wnd == 1 {
		t.Error("a segment beyond the right edge counts")
	}
}

// Reading and closing in every state; also events.
func TestT071Abort(t *testing.T) {
	for _, s := range append(synchronizedStates, SynReceived) {
		h := inState(t, s)
		h.abort()
		h.expect(fmt.Sprintf("R. %d ack %d win 0", h.snd.nxt, h.rcv.nxt))
		h.wantClosed(Aborted)
		h.abort()
		h.expect()
		if h.Events()&EventClosed == 0 {
			t.Error("no event")
		}
	}
	for _, s := range []State{SynSent, TimeWait} {
		h := inState(t, s)
		h.abort()
		h.expect()
		h.wantClosed(Aborted)
	}
	// T121: a reset carries a fresh timestamp.
	h := established(t, "<mss 1460,ts 0 0>")
	h.advance(sec)
	h.abort()
	h.expect("R. 1 ack 1 win 0 <ts 1000 0>")
}

// T122: which timestamp is echoed. T127: it is not learnt from a segment that
// is not acceptable, nor from one with a bad ACK.
func TestT122Echo(t *testing.T) {
	h := established(t, "<mss 1460,sackOK,ts 0 0>")
	h.in(". 1:101 ack 1 <ts 10 0>")
	h.advance(30 * ms)
	h.in(". 101:201 ack 1 <ts 40 0>")
	h.expect(". 1 ack 201 <ts 30 10>") // of two segments the first
	h.in(". 201:301 ack 1 <ts 50 0>")
	h.advance(delackTimeout)
	h.expect(". 1 ack 301 <ts 70 50>")
	h.in(". 401:501 ack 1 <ts 60 0>") // out of order: that of the last in order
	h.expect(". 1 ack 301 <ts 70 50,sack 401:501>")
	h.in(". 301:401 ack 1 <ts 70 0>") // the filler's
	h.expect(". 1 ack 501 <ts 70 70>")
	h.in(". 2000000:2000010 ack 1 <ts 200000 0>", ". 501:511 ack 99 <ts 200000 0>")
	h.advance(sec)
	h.in(". 501:511 ack -70000 <ts 200000 0>")
	for _, s := range h.drain() {
		if !strings.Contains(s, " 70>") {
			t.Errorf("sent %s, want an echo of 70", s)
		}
	}
	h.in(". 501:511 ack 1 <ts 80 0>", ". 511:521 ack 1 <ts 90 0>")
	h.advance(delackTimeout)
	h.expect(". 1 ack 521 <ts 1110 80>")
}

// T121: every segment has a timestamp that does not go back.
func TestT121Timestamps(t *testing.T) {
	h := established(t, "<mss 1460,ts 0 0>")
	h.advance(sec)
	h.write(10)
	h.expect("P. 1:11 ack 1 <ts 1000 0>")
	h.advance(30 * sec)
	h.in(". 1 ack 11 <ts 1 0>")
	h.drain()
	h.closeWrite()
	h.expect("F. 11 ack 1 <ts 31000 1>")
	h.in(". 1:11 ack 11") // T126: one without is accepted
	h.advance(delackTimeout)
	h.expect(". 12 ack 11 <ts 31040 1>")
}

// T123, T124, T125: PAWS.
func TestT123PAWS(t *testing.T) {
	h := established(t, "<mss 1460,ts 1000 0>")
	h.in(". 1:11 ack 1 <ts 1000 0>")
	h.advance(sec)
	h.drain()
	h.in(". 11:21 ack 1 <ts 900 0>")
	h.expect(". 1 ack 11")
	if h.Buffered() != 10 {
		t.Errorf("%d bytes", h.Buffered())
	}
	h.in(". 11 ack 1 <ts 999 0>", ". 11 ack 1 <ts 999 0>") // without data: limited
	h.expect(". 1 ack 11")
	h.in(". 11:21 ack 1 <ts 1000 0>", ". 21:31 ack 1 <ts 1001 0>") // as old is not older
	h.expect(". 1 ack 31")
	// Across the wrap: the peer's clock is 0xffffff00 + n.
	h.in(". 31:41 ack 1 <ts 257 0>")
	if h.Buffered() != 30 {
		t.Error("an old timestamp was accepted")
	}
	h.in(fmt.Sprintf(". 31:41 ack 1 <ts %d 0>", int64(1000+1<<31-1)))
	if h.Buffered() != 40 {
		t.Error("a new timestamp was refused")
	}
	h.in(fmt.Sprintf("R 41 <ts %d 0>", 900)) // PAWS is not for resets
	h.wantClosed(Reset)

	h = established(t, "<mss 1460,ts 240 0>") // 0xfffffff0
	h.in(". 1:11 ack 1 <ts 240 0>", ". 11:21 ack 1 <ts 272 0>")
	if h.Buffered() != 20 {
		t.Error("a timestamp behind the wrap was refused")
	}
	h.advance(delackTimeout)
	h.in(". 21:31 ack 1 <ts 272 0>", ". 31:41 ack 1 <ts 271 0>")
	if h.Buffered() != 30 {
		t.Error("a timestamp before the wrap was accepted")
	}

	h = established(t, "<mss 1460,ts 1000 0>")
	h.advance(23 * 24 * time.Hour)
	h.in(". 1:11 ack 1 <ts 900 0>")
	if h.Buffered() != 0 {
		t.Error("accepted after 23 days")
	}
	h.drain()
	h.advance(2 * 24 * time.Hour)
	h.in(". 1:11 ack 1 <ts 900 0>", ". 11:21 ack 1 <ts 950 0>")
	h.expect(". 1 ack 21 <ts " + fmt.Sprint(uint32(25*24*3600*1000)) + " 900>")
}

// T128: an echo that cannot be makes no sample.
func TestT128HostileEcho(t *testing.T) {
	for _, ecr := range []int64{100_000, 1 << 31, 1<<31 + 500, -2, -5000, 1<<32 - 2} {
		h := established(t, "<mss 1460,ts 0 0>")
		h.advance(sec)
		h.write(10)
		h.timing = false // or the clock of the segment is used
		srtt := h.rtt.srtt
		h.advance(20 * ms)
		h.in(fmt.Sprintf(". 1 ack 11 <ts 1 %d>", ecr))
		if h.rtt.srtt != srtt {
			t.Errorf("echo of %d: SRTT %v, was %v", ecr, h.rtt.srtt, srtt)
		}
	}
	h := established(t, "<mss 1460,ts 0 0>")
	h.advance(sec)
	h.write(10)
	h.timing = false
	h.advance(300 * ms)
	h.in(". 1 ack 11 <ts 1 1000>")
	if h.rtt.srtt < 30*ms || h.rtt.srtt > 300*ms || h.rtt.rto < 300*ms {
		t.Errorf("%+v", h.rtt)
	}
}
