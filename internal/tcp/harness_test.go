package tcp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp/internal/sum"
)

const epoch = Time(time.Hour)

// Initial sequence numbers and the timestamp offset of the harness. All wrap
// soon: in the first kilobytes of data and in the first second.
const (
	hISS    = 0xffffff00
	hIRS    = 0xfffffe00
	hOffset = 0xfffffe00
	hPeerTS = 0xffffff00 // the peer's timestamps are told relative to this
)

// Streams of the pattern.
const (
	fromTCB  = 1
	fromPeer = 2
)

// harness drives one TCB in virtual time and plays its peer. Segments are
// written as packetdrill does: flags, the range of sequence numbers relative to
// the initial one, and what else matters:
//
//	S 0 ack 5 win 100 <mss 1460,sackOK,ts 1 2,ws 7>
//	. 1:1461 ack 1 <sack 1001:2001 3001:4001>
//	F. 1461 ack 1
//	- 5                                   no flags at all
//
// The payload is the pattern of the stream. Every segment that the TCB sends is
// checked against rules that hold always.
type harness struct {
	*testing.T
	*TCB
	now      Time
	buf      []byte
	queue    []string  // sent and not yet expected
	times    []float64 // when, in seconds since the harness began
	edge     int64     // right edge of the window advertised last
	sent     int64     // offset behind the last byte or FIN that was sent
	wrote    int64     // bytes that the application has written
	lastTS   uint32
	quiet    bool  // the state is not checked after each step
	silent   bool  // steps are not logged
	inFlight int64 // payload bytes sent since the last expectation
	outputs  int   // calls of Output that had something to send
	record   bool
	segments [][]byte // sent, if record is set
}

func testConfig() Config {
	return Config{LocalPort: 1, RemotePort: 2, MSS: 1460, DefaultMSS: 536, SendBuffer: 1 << 20, ReceiveBuffer: 1 << 20,
		ISS: hISS, TSOffset: hOffset}
}

// active begins a connection; the SYN is still to be expected.
func active(t *testing.T, opts ...func(*Config)) *harness {
	cfg := testConfig()
	for _, o := range opts {
		o(&cfg)
	}
	h := &harness{T: t, TCB: NewActive(cfg, epoch), now: epoch, edge: -1}
	h.pull()
	return h
}

// passive answers a SYN; the SYN-ACK is still to be expected.
func passive(t *testing.T, syn string, opts ...func(*Config)) *harness {
	cfg := testConfig()
	for _, o := range opts {
		o(&cfg)
	}
	h := &harness{T: t, now: epoch, edge: -1}
	seg := h.parse(syn)
	h.TCB = NewPassive(cfg, epoch, &seg)
	h.pull()
	return h
}

// established is a connection that the peer began with the options, ready.
func established(t *testing.T, options string, opts ...func(*Config)) *harness {
	t.Helper()
	h := passive(t, "S 0 win 65535 "+options, opts...)
	h.drain()
	ts := ""
	if h.timestamps {
		ts = fmt.Sprintf(" <ts %d 0>", h.tsRecent-hPeerTS)
	}
	h.in(". 1 ack 1 win 65535" + ts)
	h.expect()
	if h.state != Established || h.Events() != EventConnected|EventWritable {
		t.Fatalf("not established: %v", h.state)
	}
	h.Events()
	return h
}

func buffers(send, receive int) func(*Config) {
	return func(c *Config) { c.SendBuffer, c.ReceiveBuffer = send, receive }
}

func linkMSS(mss int) func(*Config) { return func(c *Config) { c.MSS = mss } }

func offload(n int) func(*Config) { return func(c *Config) { c.Offload = n } }

func keepAlive(idle, interval time.Duration, count int) func(*Config) {
	return func(c *Config) { c.KeepAlive = KeepAlive{idle, interval, count} }
}

func num(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		panic("bad number in a segment: " + s)
	}
	return n
}

const flagLetters = "FSRP.UEC"

// parse makes a segment of the peer from its text.
func (h *harness) parse(text string) (s Segment) {
	text, options, _ := strings.Cut(text, "<")
	f := strings.Fields(text)
	s = Segment{SrcPort: 2, DstPort: 1, Window: 65535}
	for _, c := range f[0] {
		if i := strings.IndexRune(flagLetters, c); i >= 0 {
			s.Flags |= 1 << i
		}
	}
	a, b, isRange := strings.Cut(f[1], ":")
	s.Seq = hIRS + uint32(num(a))
	if isRange {
		s.Payload = patterned(fromPeer, num(a), num(b))
	}
	for i := 2; i < len(f); i += 2 {
		switch f[i] {
		case "ack":
			s.Ack = hISS + uint32(num(f[i+1]))
		case "win":
			s.Window = uint16(num(f[i+1]))
		default:
			panic("unknown word in a segment: " + f[i])
		}
	}
	for _, o := range strings.Split(strings.TrimSuffix(options, ">"), ",") {
		h.parseOption(&s, strings.Fields(o))
	}
	return s
}

func (h *harness) parseOption(s *Segment, f []string) {
	if len(f) == 0 {
		return
	}
	switch f[0] {
	case "mss":
		s.MSS = uint16(num(f[1]))
	case "sackOK":
		s.SACKPermitted = true
	case "ws":
		s.HasScale, s.Scale = true, uint8(num(f[1]))
	case "ts":
		s.HasTimestamps, s.TSVal, s.TSEcr = true, hPeerTS+uint32(num(f[1])), hOffset+uint32(num(f[2]))
	case "sack":
		for _, r := range f[1:] {
			a, b, _ := strings.Cut(r, ":")
			s.SACK[s.Blocks] = Block{hISS + uint32(num(a)), hISS + uint32(num(b))}
			s.Blocks++
		}
	default:
		panic("unknown option: " + f[0])
	}
}

// text is the opposite of parse for a segment of the TCB.
func (h *harness) text(s *Segment) string {
	var b strings.Builder
	for i, c := range flagLetters {
		if s.Flags&(1<<i) != 0 {
			b.WriteRune(c)
		}
	}
	seq := seqSpace(hISS).unwrap(s.Seq, max(0, h.sent))
	fmt.Fprintf(&b, " %d", seq)
	if len(s.Payload) > 0 {
		fmt.Fprintf(&b, ":%d", seq+int64(len(s.Payload)))
	}
	if s.Flags&ACK != 0 {
		fmt.Fprintf(&b, " ack %d", seqSpace(hIRS).unwrap(s.Ack, max(0, h.edge)))
	}
	fmt.Fprintf(&b, " win %d", s.Window)
	var o []string
	if s.MSS != 0 {
		o = append(o, fmt.Sprint("mss ", s.MSS))
	}
	if s.SACKPermitted {
		o = append(o, "sackOK")
	}
	if s.HasTimestamps {
		ecr := s.TSEcr
		if s.Flags&ACK != 0 {
			ecr -= hPeerTS
		}
		o = append(o, fmt.Sprintf("ts %d %d", s.TSVal-hOffset, int32(ecr)))
	}
	if s.HasScale {
		o = append(o, fmt.Sprint("ws ", s.Scale))
	}
	if s.Blocks > 0 {
		k := "sack"
		for _, r := range s.SACK[:s.Blocks] {
			irs := seqSpace(hIRS)
			k += fmt.Sprintf(" %d:%d", irs.unwrap(r.Left, h.edge), irs.unwrap(r.Right, h.edge))
		}
		o = append(o, k)
	}
	return b.String() + " <" + strings.Join(o, ",") + ">"
}

// pull takes every segment that is due.
func (h *harness) pull() {
	h.Helper()
	for i := 0; ; i++ {
		if h.buf == nil {
			h.buf = make([]byte, MaxHeaderLen+max(h.cfg.MSS, h.cfg.Offload)+1)
		}
		buf := h.buf
		n := checkedOutput(h.T, h.TCB, h.now, buf)
		if n == 0 {
			break
		}
		if i > 20000 {
			h.Fatal("Output does not end")
		}
		h.outputs++
		for _, p := range cut(h.T, h.TCB, buf[:n]) {
			h.took(p)
		}
	}
	if !h.quiet {
		checkState(h.T, h.TCB)
	}
}

// checkedOutput is Output, which does nothing where Quiet says so, and adds up the
// payload.
func checkedOutput(t testing.TB, c *TCB, now Time, buf []byte) int {
	t.Helper()
	quiet, timers, backoff := c.Quiet(), c.timers, c.persistBackoff
	n := c.Output(now, buf)
	if quiet && (n != 0 || c.timers != timers || c.persistBackoff != backoff) {
		t.Fatalf("quiet: %d bytes, timers %v, before %v", n, c.timers, timers)
	}
	if n > 0 {
		var want uint16
		if c.cfg.Offload == 0 {
			want = sum.Of(buf[int(buf[12]>>4)*4:n], 0)
		}
		if got := binary.BigEndian.Uint16(buf[16:]); got != want {
			t.Fatalf("the sum of the payload of % x is %#04x, not %#04x", buf[:n], want, got)
		}
	}
	return n
}

// took takes a segment of the TCB, as it leaves the link.
func (h *harness) took(p []byte) {
	h.Helper()
	var s Segment
	if !s.Parse(p) || len(s.Payload) > h.cfg.MSS {
		h.Fatalf("bad segment % x", p)
	}
	h.checkSegment(&s)
	text := h.text(&s)
	h.queue = append(h.queue, text)
	h.times = append(h.times, h.now.Sub(epoch).Seconds())
	h.inFlight += int64(len(s.Payload))
	if !h.silent {
		h.Logf("%10.3f > %s", h.now.Sub(epoch).Seconds(), text)
	}
	if h.record {
		h.segments = append(h.segments, p)
	}
}

// cut is what a link does that Config.Offload is for: it cuts a segment of the TCB to
// segments that fit. It returns copies.
func cut(t testing.TB, c *TCB, p []byte) (segments [][]byte) {
	t.Helper()
	hl, size := int(p[12]>>4)*4, c.SegmentSize()
	if len(p)-hl <= size {
		return [][]byte{bytes.Clone(p)}
	}
	var s Segment
	if n := len(p) - hl; !s.Parse(p) || n > c.cfg.Offload || s.Flags&(SYN|RST) != 0 || s.Blocks > 0 {
		t.Fatalf("a segment of %d bytes: %+v", n, s)
	}
	for at := hl; at < len(p); at += size {
		end := min(at+size, len(p))
		b := append(bytes.Clone(p[:hl]), p[at:end]...)
		binary.BigEndian.PutUint32(b[4:], s.Seq+uint32(at-hl))
		if end < len(p) {
			b[13] &^= byte(FIN | PSH)
		}
		segments = append(segments, b)
	}
	return segments
}

// checkSegment checks what holds for every segment that is sent.
func (h *harness) checkSegment(s *Segment) {
	h.Helper()
	if s.SrcPort != 1 || s.DstPort != 2 {
		h.Errorf("ports %d %d", s.SrcPort, s.DstPort)
	}
	seq := seqSpace(hISS).unwrap(s.Seq, max(0, h.sent))
	if s.Flags&RST == 0 {
		h.sent = max(h.sent, seq+s.Len())
		scale := h.rcv.scale
		if s.Flags&SYN != 0 {
			scale = 0
		}
		if h.state != SynSent {
			edge := seqSpace(hIRS).unwrap(s.Ack, max(0, h.edge)) + int64(s.Window)<<scale
			if edge < h.edge && s.Flags&SYN == 0 { // the window of a SYN says at most 65535
				h.Errorf("the window's right edge went back from %d to %d", h.edge, edge)
			}
			h.edge = max(h.edge, edge)
		}
		if s.HasTimestamps && h.lastTS != 0 && tsBefore(s.TSVal, h.lastTS) {
			h.Errorf("timestamp went back from %d to %d", h.lastTS, s.TSVal)
		}
		h.lastTS = s.TSVal
		if h.synchronized() && h.timestamps != s.HasTimestamps {
			h.Errorf("timestamps: %v", s.HasTimestamps)
		}
	}
	if h.synchronized() && !h.loss.sack && s.Blocks > 0 {
		h.Error("SACK was not negotiated")
	}
	if s.Flags&SYN == 0 && !bytes.Equal(s.Payload, patterned(fromTCB, seq, seq+int64(len(s.Payload)))) {
		h.Errorf("payload at %d is not what was written", seq)
	}
}

// checkState checks what holds after Output has returned 0.
func checkState(t *testing.T, c *TCB) {
	t.Helper()
	fail := func(what string) {
		t.Helper()
		t.Fatalf("%s: %v una %d nxt %d wnd %d, queued [%d, %d), rcv %+v, loss %+v, reno %+v",
			what, c.state, c.snd.una, c.snd.nxt, c.snd.wnd, c.sendBuf.base, c.sendBuf.end, c.rcv, c.loss, c.reno)
	}
	if c.state == Closed {
		if c.Deadline() != 0 || c.sendBuf.ring.size() != 0 {
			fail("closed, but not at rest")
		}
		return
	}
	fin := int64(0)
	if c.finQueued {
		fin = 1
	}
	if c.snd.una < 0 || c.snd.una > c.snd.nxt || c.snd.nxt > c.sendBuf.end+fin || c.snd.nxt > 1 && !c.synchronized() {
		fail("send sequence")
	}
	if want := min(max(c.snd.una, 1), c.sendBuf.end); c.sendBuf.base != want || c.sendBuf.free() < 0 {
		fail("send buffer")
	}
	rfin := int64(0)
	if c.finReceived() {
		rfin = 1
	}
	if c.rcv.nxt != c.recvBuf.nxt+rfin || c.rcv.acked > c.rcv.nxt || c.rcv.adv < c.rcv.nxt {
		fail("receive sequence")
	}
	if c.recvBuf.live().end-c.recvBuf.base > c.recvBuf.max+windowSlack<<c.rcv.scale || len(c.recvBuf.ooo) > maxHoles {
		fail("receive buffer")
	}
	for i, s := range c.loss.sacked {
		if s.start >= s.end || s.start < c.snd.una || s.end > c.snd.nxt || i > 0 && c.loss.sacked[i-1].end >= s.start {
			fail("scoreboard")
		}
	}
	for i, s := range c.loss.lostAgain {
		if s.start >= s.end || s.start < c.snd.una || s.end > c.snd.nxt || i > 0 && c.loss.lostAgain[i-1].end >= s.start ||
			c.loss.missing(s.start, s.end) != s.end-s.start {
			fail("lost retransmissions")
		}
	}
	if len(c.loss.resent) > maxResent || len(c.loss.lostAgain) > maxSacked+maxResent {
		fail("retransmissions")
	}
	if idle := c.loss.sacked == nil && c.loss.resent == nil && c.loss.lostAgain == nil; c.snd.una == c.snd.nxt && !idle {
		fail("memory of a connection with nothing outstanding")
	}
	if len(c.loss.sacked) > maxSacked || c.loss.pipe(c.snd.una, c.snd.nxt, c.mss()) < 0 || c.loss.dupAcks < 0 {
		fail("scoreboard size")
	}
	if c.synchronized() && (c.reno.cwnd < c.mss() || c.reno.ssthresh < 2*c.mss()) {
		fail("cwnd")
	}
	if c.rtt.timeout() < minRTO || c.rtt.timeout() > maxRTO {
		fail("rto")
	}
	outstanding := c.snd.nxt > c.snd.una
	waiting := outstanding || c.synchronized() && c.pending()
	guarded := c.armed(timerRexmt) || c.armed(timerPersist)
	if c.state != TimeWait && waiting != guarded {
		fail(fmt.Sprintf("waiting %v, guarded by a timer %v", waiting, guarded))
	}
	if c.armed(timerRexmt) && c.armed(timerPersist) {
		fail("two timers for one thing")
	}
	if c.rcv.acked < c.rcv.nxt && c.synchronized() && !c.armed(timerDelack) {
		fail("an ACK is owed for ever")
	}
}

// in gives the TCB segments of the peer.
func (h *harness) in(segments ...string) {
	h.Helper()
	for _, text := range segments {
		s := h.parse(text)
		if !h.silent {
			h.Logf("%10.3f < %s", h.now.Sub(epoch).Seconds(), text)
		}
		h.Input(h.now, &s)
		h.pull()
	}
}

// match reports whether a segment is as expected, in the words that want has.
func match(got, want string) bool {
	g, gotOptions, _ := strings.Cut(got, " <")
	w, wantOptions, hasOptions := strings.Cut(want, " <")
	if hasOptions && gotOptions != wantOptions {
		return false
	}
	gf, wf := strings.Fields(g), strings.Fields(w)
	gf[0], wf[0] = strings.ReplaceAll(gf[0], "P", ""), strings.ReplaceAll(wf[0], "P", "")
	if gf[0] != wf[0] || gf[1] != wf[1] {
		return false
	}
	for i := 2; i < len(wf); i += 2 {
		if !strings.Contains(g+" ", " "+wf[i]+" "+wf[i+1]+" ") {
			return false
		}
	}
	return true
}

// expect is what has been sent since the last call, nothing more.
func (h *harness) expect(want ...string) {
	h.Helper()
	got := h.drain()
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = match(got[i], want[i])
	}
	if !ok {
		h.Fatalf("at %v, %v sent\n  %s\nwant\n  %s", h.now.Sub(epoch), h.state, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

// drain returns what has been sent since the last expectation.
func (h *harness) drain() []string {
	q := h.queue
	h.queue, h.times, h.inFlight, h.outputs = nil, nil, 0, 0
	return q
}

// data returns the ranges of payload that were sent since the last expectation.
func (h *harness) data() []string {
	var r []string
	for _, s := range h.drain() {
		if f := strings.Fields(s); strings.Contains(f[1], ":") || strings.Contains(f[0], "F") {
			r = append(r, f[1])
		}
	}
	return r
}

func (h *harness) wantData(want ...string) {
	h.Helper()
	if got := h.data(); strings.Join(got, " ") != strings.Join(want, " ") {
		h.Fatalf("at %v sent %v\nwant %v", h.now.Sub(epoch), got, want)
	}
}

// advance moves the clock by d, and stops at every deadline on the way.
func (h *harness) advance(d time.Duration) {
	h.Helper()
	end := h.now.Add(d)
	for i := 0; ; i++ {
		next := h.TCB.Deadline()
		if next == 0 || next > end {
			break
		}
		if i > 100_000 {
			h.Fatal("deadlines do not end")
		}
		if next > h.now {
			h.now = next
		}
		h.Advance(h.now)
		if at := h.TCB.Deadline(); at != 0 && at <= h.now {
			h.Fatalf("Advance left the deadline %v at %v", at.Sub(epoch), h.now.Sub(epoch))
		}
		h.pull()
	}
	h.now = end
}

// write has the application write n bytes.
func (h *harness) write(n int64) {
	h.Helper()
	if got := h.Write(patterned(fromTCB, h.wrote+1, h.wrote+1+n)); int64(got) != n {
		h.Fatalf("wrote %d of %d", got, n)
	}
	h.wrote += n
	h.pull()
}

// read has the application read n bytes, which must be there.
func (h *harness) read(n int) {
	h.Helper()
	p := make([]byte, n)
	off := h.recvBuf.base
	if got := h.Read(p); got != n || !bytes.Equal(p, patterned(fromPeer, off, off+int64(n))) {
		h.Fatalf("read %d of %d bytes", got, n)
	}
	h.pull()
}

func (h *harness) closeWrite() { h.CloseWrite(); h.pull() }
func (h *harness) closeRead()  { h.CloseRead(); h.pull() }
func (h *harness) shut()       { h.Close(h.now); h.pull() }
func (h *harness) abort()      { h.Abort(); h.pull() }

// want checks the state.
func (h *harness) want(s State) {
	h.Helper()
	if h.State() != s {
		h.Fatalf("%v, want %v", h.State(), s)
	}
}

// wantClosed checks that the connection is gone and why.
func (h *harness) wantClosed(r Reason) {
	h.Helper()
	if h.State() != Closed || h.Reason() != r {
		h.Fatalf("%v, reason %d, want CLOSED, reason %d", h.State(), h.Reason(), r)
	}
}

const (
	us  = time.Microsecond
	ms  = time.Millisecond
	sec = time.Second
)

// underRace is set when the race detector makes everything slow.
var underRace bool
