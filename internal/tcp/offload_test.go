package tcp

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"time"
)

// Several segments as one, Config.Offload. The harness cuts them, so that what is
// expected are those that leave the link.

// A window's worth of data is one segment, with PSH and FIN on the last part.
func TestOffload(t *testing.T) {
	for _, options := range []string{plain, "<mss 1460,sackOK,ts 0 0,ws 7>"} {
		h := established(t, options, offload(65455))
		size := h.mss()
		h.write(3*size + 10)
		h.closeWrite() // what is written is gone before
		if h.outputs != 2 || len(h.queue) != 5 {
			t.Fatalf("%d and %d segments: %q", h.outputs, len(h.queue), h.queue)
		}
		for i, flags := range []string{". ", ". ", ". ", "P. ", "F. "} {
			if !bytes.HasPrefix([]byte(h.queue[i]), []byte(flags)) {
				t.Errorf("segment %d: %s", i, h.queue[i])
			}
		}
		if h.reno.cwnd != initialWindow(size) {
			t.Errorf("cwnd %d", h.reno.cwnd)
		}
	}
	// The FIN goes with the data if it is queued with it.
	h := passive(t, "S 0 "+plain, offload(65455))
	h.drain()
	h.Write(patterned(fromTCB, 1, 3001))
	h.CloseWrite()
	h.in(". 1 ack 1")
	if h.outputs != 1 {
		t.Errorf("%d segments", h.outputs)
	}
	h.expect(". 1:1461 ack 1", ". 1461:2921 ack 1", "F. 2921:3001 ack 1")
	if h.queue != nil || h.state != FinWait1 {
		t.Error(h.state)
	}
}

// No more is sent at once than cwnd, the peer's window and Offload have room for;
// what they cut is a multiple of full segments.
func TestOffloadLimits(t *testing.T) {
	h := established(t, plain, offload(65455))
	h.write(100_000)
	h.wantData("1:1461", "1461:2921", "2921:4381", "4381:5841", "5841:7301", "7301:8761", "8761:10221", "10221:11681",
		"11681:13141", "13141:14601") // IW10
	h.in(". 1 ack 14601 win 4000")
	h.wantData("14601:16061", "16061:17521") // 1080 are left: a silly segment
	h.in(". 1 ack 17521 win 1000")
	h.expect()
	h.advance(overrideTime)
	h.wantData("17521:18521")
	h.in(". 1 ack 18521 win 5000")
	h.wantData("18521:19981", "19981:21441", "21441:22901")

	h = established(t, plain, offload(5000))
	h.write(14600)
	if h.outputs != 4 { // of three segments each, and one
		t.Errorf("%d segments", h.outputs)
	}
	h.drain()

	// All of a window that is no multiple of the segment size, if that is all there is.
	h = passive(t, "S 0 win 5000 "+plain, offload(65455))
	h.in(". 1 ack 1 win 5000")
	h.drain()
	h.write(5000)
	if h.outputs != 1 {
		t.Errorf("%d segments", h.outputs)
	}
	h.wantData("1:1461", "1461:2921", "2921:4381", "4381:5001")

	// A FIN has a sequence number, which must be in the window too.
	h = passive(t, "S 0 win 5000 "+plain, offload(65455))
	h.in(". 1 ack 1 win 5000")
	h.drain()
	h.Write(patterned(fromTCB, 1, 5001))
	h.closeWrite()
	h.wantData("1:1461", "1461:2921", "2921:4381", "4381:5001")
	h.in(". 1 ack 5001 win 1")
	h.expect("F. 5001 ack 1")
}

// S06: to a peer with the smallest segments, too, many are sent as one.
func TestOffloadTinyMSS(t *testing.T) {
	h := established(t, "<mss 1>", offload(65455))
	h.write(480)
	if h.outputs != 1 || len(h.queue) != 10 || h.SegmentSize() != 48 {
		t.Errorf("%d segments, cut to %d of %d bytes", h.outputs, len(h.queue), h.SegmentSize())
	}
}

// A segment that reports blocks is sent alone, and without a duplicate to report
// those behind it are not.
func TestOffloadBlocks(t *testing.T) {
	h := established(t, "<mss 1460,sackOK>", offload(65455))
	h.in(". 2001:3001 ack 1")
	h.drain()
	h.write(3 * 1460)
	if h.outputs != 3+1 { // SACK blocks make each a little shorter
		t.Errorf("%d segments with a hole: %q", h.outputs, h.queue)
	}
	h.drain()
	h.in(". 1:2001 ack 4381")
	h.drain()
	h.write(3 * 1460)
	if h.outputs != 1 {
		t.Errorf("%d segments without a hole: %q", h.outputs, h.queue)
	}
}

// A peer that acknowledges what came as one with one ACK makes cwnd grow as one that
// acknowledges every second segment: it doubles in a round trip. Beyond ssthresh it
// does not leap.
func TestOffloadGrowth(t *testing.T) {
	h := established(t, "<mss 1460,ws 7>", offload(65455))
	h.silent = true
	for cwnd := int64(14600); cwnd < 1<<16; cwnd *= 2 {
		if h.reno.cwnd != cwnd {
			t.Fatalf("cwnd %d, want %d", h.reno.cwnd, cwnd)
		}
		h.write(200_000)
		h.drain()
		h.ackAll()
	}
	h = established(t, plain, offload(65455))
	h.reno.ssthresh = 10 * 1460
	h.reno.cwnd = 9 * 1460
	h.write(20 * 1460)
	h.ackAll()
	if h.reno.cwnd != 11*1460 {
		t.Errorf("cwnd %d", h.reno.cwnd)
	}
	// The default.
	h = established(t, plain)
	h.write(20 * 1460)
	h.ackAll()
	if h.reno.cwnd != 12*1460 {
		t.Errorf("without Offload: cwnd %d", h.reno.cwnd)
	}
}

// ackAll acknowledges what was sent, with one ACK and the window unchanged.
func (h *harness) ackAll() {
	h.Helper()
	h.Input(h.now, &Segment{SrcPort: 2, DstPort: 1, Seq: hIRS + uint32(h.rcv.nxt), Ack: hISS + uint32(h.snd.nxt), Flags: ACK,
		Window: uint16(min(h.snd.wnd>>h.snd.scale, 65535))})
	h.pull()
}

// A tail loss probe is one segment, though there is more to send.
func TestOffloadTailProbe(t *testing.T) {
	h := established(t, "<mss 1460,sackOK>", offload(65455))
	h.loss.everRxt, h.rtt.srtt, h.rtt.rto = 1, 10*ms, 300*ms
	h.write(30 * 1460)
	h.drain()
	h.in(". 1 ack 2921")
	h.drain()
	h.advance(30 * ms)
	if h.loss.tailEnd == 0 || h.outputs != 1 || len(h.queue) != 1 {
		t.Errorf("%d segments for a probe: %q", h.outputs, h.queue)
	}
}

// twins are two TCBs to which the same things happen: one may make several segments
// one, and the other may not.
type twins struct {
	*fuzzer
	single *TCB
	merged int // segments that were part of a larger one
}

// both does the same to both.
func (w *twins) both(do func(c *TCB)) {
	do(w.TCB)
	do(w.single)
}

// step has the next thing happen.
func (w *twins) step() {
	switch op := w.next(); op % 12 {
	default:
		s := w.segment()
		w.both(func(c *TCB) { c.Input(w.now, &s) })
	case 3, 4: // a peer that behaves
		s := Segment{SrcPort: 2, DstPort: 1, Flags: ACK, Seq: hIRS + uint32(w.rcv.nxt), Window: uint16(w.next()) << 8,
			Ack: hISS + uint32(w.snd.una+(w.snd.nxt-w.snd.una)*int64(w.next())/255)}
		if w.timestamps {
			s.HasTimestamps, s.TSVal, s.TSEcr = true, w.tsRecent+uint32(w.next()%2), w.tsVal(w.now)
		}
		w.both(func(c *TCB) { c.Input(w.now, &s) })
	case 5:
		mss, seq := int(w.next())*6, hISS+uint32(w.near(w.snd.una))
		w.both(func(c *TCB) { c.PathMTU(w.now, mss, seq) })
	case 6, 7, 8:
		p := patterned(fromTCB, w.wrote+1, w.wrote+1+int64(w.next())*200)
		w.wrote += int64(w.TCB.Write(p))
		w.single.Write(p)
	case 9:
		n := int(w.next()) * 100
		w.both(func(c *TCB) { c.Read(make([]byte, n)) })
	case 10:
		w.now = w.now.Add(time.Duration(w.next()) * ms)
		if d := w.TCB.Deadline(); w.next()%2 == 0 && d > w.now {
			w.now = d
		}
		w.both(func(c *TCB) { c.Advance(w.now) })
	case 11:
		if w.next()%64 == 0 {
			w.both(func(c *TCB) { c.CloseWrite() })
		}
	}
	w.compare()
}

// compare takes what both have to send, which must be the same segments.
func (w *twins) compare() {
	w.Helper()
	before := w.outputs
	w.pull()
	buf, want := make([]byte, MaxHeaderLen+w.cfg.MSS), w.segments
	offload := w.single.cfg.Offload
	w.single.cfg.Offload = 0
	for i := range want {
		n := w.single.Output(w.now, buf)
		putChecksum(buf, 0) // a link that cuts completes it too
		if !bytes.Equal(buf[:n], want[i]) {
			w.Fatalf("segment %d of %d is\n% x, alone\n% x", i, len(want), head(want[i]), head(buf[:n]))
		}
	}
	if n := w.single.Output(w.now, buf); n != 0 {
		w.Fatalf("one more: % x", head(buf[:n]))
	}
	w.single.cfg.Offload = offload
	if w.TCB.Deadline() != w.single.Deadline() || w.reno != w.single.reno || w.rtt != w.single.rtt {
		w.Fatalf("%v, %+v, %+v, want %v, %+v, %+v", w.TCB.Deadline(), w.reno, w.rtt, w.single.Deadline(), w.single.reno, w.single.rtt)
	}
	w.merged += len(want) - (w.outputs - before)
	w.segments = w.segments[:0]
	w.drain()
}

func head(b []byte) []byte { return b[:min(len(b), MaxHeaderLen)] }

// run lets everything happen that the input has, and returns how many segments were
// not alone.
func (w *twins) run(t *testing.T, b []byte) int {
	w.fuzzer = &fuzzer{ops: b}
	cfg := testConfig()
	cfg.MSS = []int{1460, 536, 9000, 1440}[w.next()%4]
	cfg.SendBuffer, cfg.Offload = 1<<(10+w.next()%9), []int{65455, 5000, 20_000, 1}[w.next()%4]
	syn := Segment{Seq: hIRS, Flags: SYN, Window: uint16(w.next()) << 8, MSS: uint16(w.next()) * 8,
		HasScale: w.next()%2 == 0, Scale: w.next() % 15, SACKPermitted: w.next()%2 == 0,
		HasTimestamps: w.next()%2 == 0, TSVal: hPeerTS}
	w.harness = &harness{T: t, now: epoch, edge: -1, silent: true, record: true, TCB: NewPassive(cfg, epoch, &syn)}
	w.single = NewPassive(cfg, epoch, &syn)
	w.compare()
	s := Segment{SrcPort: 2, DstPort: 1, Seq: hIRS + 1, Ack: hISS + 1, Flags: ACK, Window: 65535, HasTimestamps: true, TSVal: hPeerTS}
	w.both(func(c *TCB) { c.Input(w.now, &s) })
	w.compare()
	for len(w.ops) > 0 && w.state != Closed {
		w.step()
	}
	return w.merged
}

// FuzzOffload: what leaves a link that cuts segments is what would have been sent one
// by one, and so is all that follows from it.
func FuzzOffload(f *testing.F) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 8))
		b := make([]byte, 4000)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { new(twins).run(t, b[:min(len(b), 20_000)]) })
}

// TestOffloadMerges: the inputs of FuzzOffload do make segments one.
func TestOffloadMerges(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 8))
	merged := 0
	for range 60 {
		b := make([]byte, 4000)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		merged += new(twins).run(t, b)
	}

	if merged < 1000 {
		t.Errorf("%d segments were part of a larger one", merged)
	}
}
