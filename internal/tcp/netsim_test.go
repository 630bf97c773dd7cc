package tcp

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp/internal/netsim"
)

var update = flag.Bool("update", false, "write the golden files")

// linkEpoch is epoch in the times of a Link, which are those of the standard library.
var linkEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func linkTime(t Time) time.Time { return linkEpoch.Add(t.Sub(epoch)) }

func tcpTime(t time.Time) Time {
	if t.IsZero() {
		return 0
	}
	return epoch.Add(t.Sub(linkEpoch))
}

// side is one end of a connection: a TCB, the link it sends on, and an
// application that writes a stream of size bytes and reads all that comes.
type side struct {
	*TCB
	t      *testing.T
	cfg    Config
	stream byte
	out    *netsim.Link
	peer   *side
	buf    []byte
	strict bool          // the state is checked after every step
	plain  bool          // its SYN carries no option but MSS: the link takes them away
	noSACK bool          // its SYN does not permit SACK
	burst  time.Duration // packets wait for the end of such a period, and are taken together; 0: each when it comes

	memory *Memory     // of its buffers
	others func(i int) // called for the i-th segment that this side sends: what others do with the memory

	size, wrote int64
	got         int64
	slow        int   // the application reads at most so many bytes at a time; 0: all
	nextRead    Time  // when it reads again
	promised    int64 // right edge of the window that the peer has advertised
	edge        int64 // right edge of the window that this side has advertised
	edgeSet     bool
	segments    int
	again       int // segments with data that was sent before
	timeouts    int
	highest     int64
}

// checkOutput checks a segment that this side sends.
func (s *side) checkOutput(seg *Segment) {
	s.segments++
	if s.others != nil {
		s.others(s.segments)
	}
	off := s.snd.seq.unwrap(seg.Seq, s.snd.una)
	end := off + int64(len(seg.Payload))
	if len(seg.Payload) > 0 {
		if off < s.highest {
			s.again++
		}
		s.highest = max(s.highest, end)
		if end > s.promised {
			s.t.Fatalf("sent up to %d with a window up to %d", end, s.promised)
		}
		if s.strict && !bytes.Equal(seg.Payload, patterned(s.stream, off, end)) {
			s.t.Fatalf("payload at %d is not what was written", off)
		}
	}
	if len(seg.Payload) > s.cfg.MSS {
		s.t.Fatalf("payload of %d", len(seg.Payload))
	}
	if seg.Flags&ACK != 0 && seg.Flags&RST == 0 {
		win := int64(seg.Window)
		if seg.Flags&SYN == 0 {
			win <<= s.rcv.scale
		}
		edge := s.rcv.seq.unwrap(seg.Ack, s.rcv.nxt) + win
		if s.edgeSet && edge < s.edge {
			s.t.Fatalf("the window's right edge went back from %d to %d", s.edge, edge)
		}
		s.edge, s.edgeSet = edge, true
	}
}

// flush sends what is due.
func (s *side) flush(now Time) {
	for i := 0; ; i++ {
		n := checkedOutput(s.t, s.TCB, now, s.buf)
		if n == 0 {
			break
		}
		if i > 5000 {
			s.t.Fatal("Output does not end")
		}
		for _, p := range cut(s.t, s.TCB, s.buf[:n]) {
			s.send(now, p)
		}
	}
	if s.strict {
		checkState(s.t, s.TCB)
	}
}

// send sends a segment with a check value.
func (s *side) send(now Time, p []byte) {
	var seg Segment
	if !seg.Parse(p) {
		s.t.Fatal("bad segment")
	}
	s.checkOutput(&seg)
	if seg.Flags&SYN != 0 && (s.plain || s.noSACK) {
		seg.SACKPermitted = false
		if s.plain {
			seg.HasTimestamps, seg.HasScale = false, false
		}
		p = p[:seg.MarshalHeader(p)]
	}
	s.out.Send(linkTime(now), binary.BigEndian.AppendUint32(p[:len(p):len(p)], crc32.ChecksumIEEE(p)))
}

// receive takes a packet of the peer, unless it is corrupt.
func (s *side) receive(now Time, p []byte) {
	n := len(p) - 4
	if crc32.ChecksumIEEE(p[:n]) != binary.BigEndian.Uint32(p[n:]) {
		return
	}
	var seg Segment
	if !seg.Parse(p[:n]) {
		s.t.Fatal("bad segment")
	}
	if s.TCB == nil {
		s.TCB = NewPassive(s.cfg, now, &seg)
		s.UseMemory(s.memory)
	} else {
		s.Input(now, &seg)
	}
	if s.synchronized() {
		s.promised = max(s.promised, s.snd.una+s.snd.wnd)
	}
}

// app writes and reads.
func (s *side) app(now Time) {
	for s.wrote < s.size {
		p := s.Reserve(int(s.size - s.wrote))
		if len(p) == 0 {
			break
		}
		for i := range p {
			p[i] = pattern(s.stream, s.wrote+1+int64(i))
		}
		s.Commit(len(p))
		s.wrote += int64(len(p))
	}
	if s.wrote == s.size && s.state != SynSent {
		s.CloseWrite()
	}
	for budget := s.slow; s.Buffered() > 0 && now >= s.nextRead; {
		p := s.Peek()
		if s.slow > 0 {
			p = p[:min(len(p), budget)]
			budget -= len(p)
		}
		for i, c := range p {
			if c != pattern(s.peer.stream, s.got+1+int64(i)) {
				s.t.Fatalf("byte %d is not what was sent", s.got+int64(i))
			}
		}
		s.got += int64(len(p))
		s.Discard(len(p))
		if s.slow > 0 && budget == 0 {
			s.nextRead = now.Add(20 * ms)
		}
	}
}

// turn lets a side do all it can do now.
func (s *side) turn(now Time) {
	if s.TCB != nil {
		before := s.retries
		s.Advance(now)
		if s.retries > before {
			s.timeouts++
		}
		s.flush(now)
		s.app(now)
		s.flush(now)
		if d := s.Deadline(); d != 0 && d <= now {
			s.t.Fatalf("deadline in the past: %v", s.timers)
		}
	}
	if now < s.taken(tcpTime(s.peer.out.Next())) {
		return
	}
	for p := s.peer.out.Receive(linkTime(now)); p != nil; p = s.peer.out.Receive(linkTime(now)) {
		if s.receive(now, p); s.TCB == nil || s.burst > 0 {
			continue
		}
		s.app(now)
		s.flush(now)
	}
	if s.TCB != nil && s.burst > 0 {
		s.app(now)
		s.flush(now)
	}
}

// taken returns when a packet is taken that comes at the time at.
func (s *side) taken(at Time) Time {
	if s.burst > 0 && at != 0 {
		at = epoch.Add((at.Sub(epoch) + s.burst - 1).Truncate(s.burst))
	}
	return at
}

// done reports whether the application of a side has nothing left to wait for.
// The last ACKs may be lost beyond the end of the peer's TIME-WAIT.
func (s *side) done() bool {
	return s.TCB != nil && s.wrote == s.size && s.got == s.peer.size && s.EOF()
}

func (s *side) String() string {
	if s.TCB == nil {
		return "no connection"
	}
	return fmt.Sprintf("%v, reason %d, una %d nxt %d wnd %d, wrote %d of %d, received %d of %d, phase %d, timers %v",
		s.state, s.reason, s.snd.una, s.snd.nxt, s.snd.wnd, s.wrote, s.size, s.got, s.peer.size, s.loss.phase, s.timers)
}

// next returns when something happens next at a side.
func (s *side) next() Time {
	times := []Time{s.peer.taken(tcpTime(s.out.Next()))}
	if s.TCB != nil {
		times = append(times, s.Deadline())
		if s.Buffered() > 0 {
			times = append(times, s.nextRead)
		}
	}
	var next Time
	for _, d := range times {
		if d != 0 && (next == 0 || d < next) {
			next = d
		}
	}
	return next
}

// transfer connects a to b and runs both until they are done. It returns when b
// had received all that a has to send.
func transfer(t *testing.T, a, b *side) time.Duration {
	t.Helper()
	for i, s := range []*side{a, b} {
		s.t, s.stream = t, byte(i+1)
		s.peer = []*side{b, a}[i]
		s.buf = make([]byte, MaxHeaderLen+max(s.cfg.MSS, s.cfg.Offload))
	}
	a.TCB = NewActive(a.cfg, epoch)
	a.UseMemory(a.memory)
	var received time.Duration
	for now := epoch; ; {
		a.turn(now)
		b.turn(now)
		if received == 0 && b.got == a.size {
			received = now.Sub(epoch)
		}
		if a.done() && b.done() {
			return received
		}
		if now.Sub(epoch) > 24*time.Hour || a.reason != None || b.TCB != nil && b.reason != None {
			t.Fatalf("not done after %v: %v; %v", now.Sub(epoch), a, b)
		}
		d, e := a.next(), b.next()
		if d == 0 || e != 0 && e < d {
			d = e
		}
		if d == 0 {
			t.Fatalf("stuck after %v: %v; %v", now.Sub(epoch), a, b)
		}
		now = d
	}
}

// TestTransfer moves data both ways over bad links.
func TestTransfer(t *testing.T) {
	links := map[string]netsim.Config{
		"perfect":    {},
		"delay":      {Delay: 50 * ms},
		"loss 1%":    {Delay: 50 * ms, Loss: 0.01},
		"loss 10%":   {Delay: 20 * ms, Loss: 0.1},
		"loss 20%":   {Delay: 5 * ms, Loss: 0.2},
		"reordering": {Delay: 20 * ms, Reorder: 0.1, ReorderDelay: 3 * ms},
		"jitter":     {Delay: 10 * ms, Jitter: 15 * ms},
		"duplicates": {Delay: 20 * ms, Duplicate: 0.2, Jitter: 5 * ms},
		"corruption": {Delay: 20 * ms, Corrupt: 0.05},
		"bottleneck": {Delay: 20 * ms, Rate: 10_000_000, Queue: 30_000},
		"all": {Delay: 20 * ms, Jitter: 2 * ms, Loss: 0.03, Duplicate: 0.03, Corrupt: 0.03, Reorder: 0.05,
			ReorderDelay: 20 * ms, Rate: 50_000_000, Queue: 60_000},
	}
	size := int64(256 << 10)
	if testing.Short() || underRace {
		size = 64 << 10
	}
	isns := []uint32{0, 0x7fff0000, 0x80000000, 0xffff0000, 0xffffffff} // T012
	for name, link := range links {
		for mode := range 16 {
			t.Run(fmt.Sprintf("%s/%d", strings.ReplaceAll(name, " ", "_"), mode), func(t *testing.T) {
				t.Parallel()
				link := link
				for round, isn := range isns {
					a, b := &side{size: size, strict: true}, &side{size: size, strict: true}
					a.cfg, b.cfg = testConfig(), testConfig()
					a.cfg.ISS, b.cfg.ISS = isn, isns[(round+mode)%len(isns)]
					a.cfg.MSS = []int{1460, 1460, 536, 9000}[mode%4]
					if mode%8 >= 4 {
						buffers(20_000, 30_000)(&a.cfg)
						buffers(70_000, 10_000)(&b.cfg)
						b.slow = 3000
					}
					if mode >= 8 {
						offload(a.cfg.MSS * 10)(&a.cfg)
						offload(65455)(&b.cfg)
					}
					link.Seed = uint64(10*round + mode)
					a.out = netsim.New(link)
					link.Seed += 1000
					b.out = netsim.New(link)
					a.noSACK, a.plain = round%2 == 1, mode%3 == 2
					d := transfer(t, a, b)
					t.Logf("%v: %d and %d segments, %d and %d again, %d and %d timeouts",
						d, a.segments, b.segments, a.again, b.again, a.timeouts, b.timeouts)
				}
			})
		}
	}
}

// TestTransferMemory moves data both ways while there is little memory for buffers, none
// but what nobody can take away, and now more, now less. All of it comes back.
func TestTransferMemory(t *testing.T) {
	links := map[string]netsim.Config{
		"delay":      {Delay: 20 * ms},
		"loss":       {Delay: 5 * ms, Loss: 0.05},
		"reordering": {Delay: 20 * ms, Reorder: 0.1, ReorderDelay: 3 * ms},
		"bottleneck": {Delay: 5 * ms, Rate: 10_000_000, Queue: 30_000},
	}
	for name, link := range links {
		for _, size := range []int64{0, 64 << 10, 1 << 20} {
			for _, mss := range []int{1460, 9000, 60_000} {
				t.Run(fmt.Sprintf("%s/%d/%d", name, size, mss), func(t *testing.T) {
					t.Parallel()
					link := link
					memory := NewMemory(size)
					a, b := &side{size: 300_000, strict: true, memory: memory}, &side{size: 300_000, strict: true, memory: memory}
					a.cfg, b.cfg = testConfig(), testConfig()
					a.cfg.MSS, b.cfg.ReceiveBuffer = mss, 1<<28 // a window scale of 13
					b.slow = 3000
					taken := int64(0)
					a.others = func(i int) {
						if i%7 == 0 {
							memory.take(size - 2*taken)
							taken = size - taken
						}
						if n := memory.Held() - taken; n > size+2<<minRingBits+2*(4<<13) {
							t.Fatalf("%d bytes are held", n)
						}
					}
					link.Seed = uint64(mss)
					a.out = netsim.New(link)
					link.Seed++
					b.out = netsim.New(link)
					t.Logf("%v", transfer(t, a, b))
					a.Abort()
					b.Abort()
					if n := memory.Held() - taken; n != 0 {
						t.Errorf("%d bytes are held in the end", n)
					}
				})
			}
		}
	}
}

// Bytes that nobody has read count until Release, and can still be read.
func TestRelease(t *testing.T) {
	h := established(t, plain)
	m := NewMemory(1 << 20)
	h.UseMemory(m)
	h.in("P. 1:1001 ack 1")
	h.write(5000)
	if m.Held() != 4<<10+8<<10 {
		t.Errorf("%d bytes are held", m.Held())
	}
	h.in("R 1001")
	h.wantClosed(Reset)
	if m.Held() != 4<<10 {
		t.Errorf("%d bytes are held at the end", m.Held())
	}
	h.Release()
	h.Release()
	if m.Held() != 0 {
		t.Errorf("%d bytes are held after Release", m.Held())
	}
	h.read(1000)
	if m.Held() != 0 {
		t.Errorf("%d bytes are held in the end", m.Held())
	}
}

// Golden: how fast 10 MiB are at a round trip of 100 ms, in bytes per second.
// It changes only with the behaviour of the state machine. At most it can be a buffer
// for each round trip; and, where each packet is lost with probability p, about
// sqrt(1.5/p) segments for each, which is the average of a window that is halved for
// each loss and grows by a segment for each round trip: 177,000 bytes per second at
// 1 %, 79,000 at 5 %, 56,000 at 10 %. Recoveries, and retransmissions that are lost,
// take their time from that.
const golden = "testdata/netsim.golden"

func TestThroughput(t *testing.T) {
	buffers := []int{4, 8, 16, 32, 64, 128, 256, 1024}
	if testing.Short() || underRace {
		buffers = buffers[:4]
	}
	losses := []float64{0, 0.1, 1, 5, 10}
	const size = 10 << 20
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s", "buffer")
	for _, loss := range losses {
		fmt.Fprintf(&b, " %10s", fmt.Sprintf("%g%%", loss))
	}
	b.WriteByte('\n')
	for _, kib := range buffers {
		fmt.Fprintf(&b, "%-8s", fmt.Sprintf("%dKiB", kib))
		for _, loss := range losses {
			x, y := &side{size: size}, &side{}
			x.cfg, y.cfg = testConfig(), testConfig()
			x.cfg.SendBuffer, x.cfg.ReceiveBuffer = kib<<10, kib<<10
			y.cfg.SendBuffer, y.cfg.ReceiveBuffer = kib<<10, kib<<10
			x.out = netsim.New(netsim.Config{Delay: 50 * ms, Loss: loss / 100, Seed: 1})
			y.out = netsim.New(netsim.Config{Delay: 50 * ms, Loss: loss / 100, Seed: 2})
			d := transfer(t, x, y)
			fmt.Fprintf(&b, " %10.0f", float64(size)/d.Seconds())
			t.Logf("%4d KiB, loss %4v%%: %10.0f B/s, %d segments, %d again, %d timeouts",
				kib, loss, float64(size)/d.Seconds(), x.segments, x.again, x.timeouts)
		}
		b.WriteByte('\n')
	}
	checkGolden(t, golden, b.String())
}

// Golden: 8 MiB at a round trip of 400 us and 5 Gbit/s, to a receiver that
// acknowledges as it should and to one that takes what has come in 50 us, or 500 us,
// at once, so that ACKs are few: megabits per second, and timeouts.
const lanGolden = "testdata/lan.golden"

func TestLANLoss(t *testing.T) {
	const size, seeds = 8 << 20, 4
	losses := []float64{0.1, 1, 5}
	bursts := []time.Duration{0, 50 * us, 500 * us}
	if testing.Short() || underRace {
		bursts = bursts[:1]
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%-8s", "burst")
	for _, loss := range losses {
		fmt.Fprintf(&b, " %16s", fmt.Sprintf("%g%%", loss))
	}
	b.WriteByte('\n')
	for _, burst := range bursts {
		fmt.Fprintf(&b, "%-8v", burst)
		for _, loss := range losses {
			var d time.Duration
			var again, timeouts int
			for seed := range uint64(seeds) {
				x, y := &side{size: size}, &side{burst: burst}
				x.cfg, y.cfg = testConfig(), testConfig()
				x.out = netsim.New(netsim.Config{Delay: 200 * us, Rate: 5e9, Loss: loss / 100, Seed: 2*seed + 1})
				y.out = netsim.New(netsim.Config{Delay: 200 * us, Rate: 5e9, Loss: loss / 100, Seed: 2*seed + 2})
				d += transfer(t, x, y)
				again += x.again
				timeouts += x.timeouts
			}
			fmt.Fprintf(&b, " %11.0f %4.1f", seeds*size*8/d.Seconds()/1e6, float64(timeouts)/seeds)
			t.Logf("burst %v, loss %v%%: %d again, %d timeouts", burst, loss, again/seeds, timeouts/seeds)
		}
		b.WriteByte('\n')
	}
	checkGolden(t, lanGolden, b.String())
}

// checkGolden compares got with a file, of which it may be the beginning.
func checkGolden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(want), got) {
		t.Errorf("throughput has changed; -update if that is meant. Now\n%swant\n%s", got, want)
	}
}
