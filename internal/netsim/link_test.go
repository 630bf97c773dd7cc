package netsim

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

const ms = time.Millisecond

// epoch is when the tests begin.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// A delivery is a packet received, at a time since epoch.
type delivery struct {
	at     time.Duration
	packet []byte
}

// id is the number that numbered put in the packet.
func (d delivery) id() int { return int(binary.BigEndian.Uint32(d.packet)) }

// numbered returns a packet of size bytes that begins with the number id.
func numbered(id, size int) []byte {
	p := make([]byte, size)
	binary.BigEndian.PutUint32(p, uint32(id))
	return p
}

// drain receives all that is in flight, each packet at the time of Next, and
// checks that it does not arrive earlier and that time does not run backwards.
func drain(t *testing.T, l *Link) []delivery {
	t.Helper()
	var got []delivery
	var last time.Time
	for next := l.Next(); !next.IsZero(); next = l.Next() {
		if next.Before(last) {
			t.Fatalf("Next went back from %v to %v", last, next)
		}
		last = next
		if p := l.Receive(next.Add(-1)); p != nil {
			t.Fatalf("received a packet 1ns before Next")
		}
		p := l.Receive(next)
		if p == nil {
			t.Fatalf("received nothing at Next")
		}
		got = append(got, delivery{next.Sub(epoch), p})
	}
	s := l.Stats()
	if s.Sent+s.Duplicated != s.Dropped+s.Lost+s.Received {
		t.Fatalf("counters do not add up with nothing in flight: %+v", s)
	}
	return got
}

// plausible reports whether something of probability p may well happen got times
// out of n: within four standard deviations, which is exactly n*p if p is 0 or 1.
func plausible(got, n int, p float64) bool {
	mean := float64(n) * p
	return math.Abs(float64(got)-mean) <= 4*math.Sqrt(mean*(1-p))
}

// sendMany sends n numbered packets of size bytes, one every interval.
func sendMany(l *Link, n, size int, interval time.Duration) {
	for i := range n {
		l.Send(epoch.Add(time.Duration(i)*interval), numbered(i, size))
	}
}

func TestPerfectLink(t *testing.T) {
	l := New(Config{})
	if next := l.Next(); !next.IsZero() {
		t.Errorf("Next of an idle link = %v, want zero", next)
	}
	if p := l.Receive(epoch); p != nil {
		t.Errorf("Receive of an idle link = %v, want nil", p)
	}
	const n = 100
	sendMany(l, n, 20, ms)
	if got, want := l.Stats(), (Stats{Sent: n}); got != want {
		t.Errorf("Stats in flight = %+v, want %+v", got, want)
	}
	got := drain(t, l)
	if len(got) != n {
		t.Fatalf("received %d packets, want %d", len(got), n)
	}
	for i, d := range got {
		if want := time.Duration(i) * ms; d.at != want || !bytes.Equal(d.packet, numbered(i, 20)) {
			t.Fatalf("delivery %d = %v at %v, want packet %d intact at %v", i, d.packet, d.at, i, want)
		}
	}
	if got, want := l.Stats(), (Stats{Sent: n, Received: n}); got != want {
		t.Errorf("Stats = %+v, want %+v", got, want)
	}
}

func TestReceiveLate(t *testing.T) {
	l := New(Config{Delay: 10 * ms})
	sendMany(l, 3, 4, ms)
	now := epoch.Add(11 * ms) // packets 0 and 1 have arrived
	for want := range 2 {
		p := l.Receive(now)
		if p == nil || (delivery{packet: p}).id() != want {
			t.Fatalf("received %v, want packet %d", p, want)
		}
	}
	if p := l.Receive(now); p != nil {
		t.Errorf("received %v, which has not arrived", p)
	}
	if got, want := l.Next(), epoch.Add(12*ms); !got.Equal(want) {
		t.Errorf("Next = %v, want %v", got, want)
	}
}

func TestEmptyPacket(t *testing.T) {
	l := New(Config{Corrupt: 1, Rate: 1})
	l.Send(epoch, nil)
	if p := l.Receive(epoch); p == nil || len(p) != 0 {
		t.Errorf("received %#v, want an empty packet that is not nil", p)
	}
	if s := l.Stats(); s.Corrupted != 0 {
		t.Errorf("%d packets without a bit were corrupted", s.Corrupted)
	}
}

// TestLine checks the exact times and drops that Delay, Rate and Queue give.
func TestLine(t *testing.T) {
	type send struct {
		at   time.Duration
		size int
	}
	type arrive struct {
		at time.Duration
		id int // index in sends
	}
	tests := []struct {
		name  string
		cfg   Config
		sends []send
		want  []arrive
	}{
		{
			name:  "delay only",
			cfg:   Config{Delay: 30 * ms},
			sends: []send{{0, 1500}, {0, 40}, {5 * ms, 1500}},
			want:  []arrive{{30 * ms, 0}, {30 * ms, 1}, {35 * ms, 2}},
		},
		{
			// 1 Mbit/s is 8us a byte.
			name:  "back to back",
			cfg:   Config{Delay: 30 * ms, Rate: 1_000_000},
			sends: []send{{0, 1000}, {0, 500}, {1 * ms, 1500}},
			want:  []arrive{{38 * ms, 0}, {42 * ms, 1}, {54 * ms, 2}},
		},
		{
			name:  "idle line",
			cfg:   Config{Rate: 1_000_000},
			sends: []send{{0, 1000}, {8 * ms, 1000}, {100 * ms, 1000}},
			want:  []arrive{{8 * ms, 0}, {16 * ms, 1}, {108 * ms, 2}},
		},
		{
			name:  "rounded up",
			cfg:   Config{Rate: 3},
			sends: []send{{0, 4}, {0, 4}},
			want:  []arrive{{10_666_666_667, 0}, {21_333_333_334, 1}},
		},
		{
			// 0 is on the line, 1 and 2 fill the queue, 3 finds no room. When 1
			// leaves the queue at 8ms, it has room for 4 but not for 5 too.
			name: "tail drop",
			cfg:  Config{Rate: 1_000_000, Queue: 2000},
			sends: []send{{0, 1000}, {0, 1000}, {0, 1000}, {8*ms - 1, 4},
				{8 * ms, 1000}, {8 * ms, 4}},
			want: []arrive{{8 * ms, 0}, {16 * ms, 1}, {24 * ms, 2}, {32 * ms, 4}},
		},
		{
			name:  "a smaller packet may fit",
			cfg:   Config{Rate: 1_000_000, Queue: 1500},
			sends: []send{{0, 1000}, {0, 1000}, {0, 501}, {0, 500}},
			want:  []arrive{{8 * ms, 0}, {16 * ms, 1}, {20 * ms, 3}},
		},
		{
			name:  "an idle line needs no queue",
			cfg:   Config{Rate: 1_000_000, Queue: 4},
			sends: []send{{0, 1000}, {8*ms - 1, 1000}, {8 * ms, 1000}},
			want:  []arrive{{8 * ms, 0}, {16 * ms, 2}},
		},
		{
			name:  "a queue without a rate never fills",
			cfg:   Config{Queue: 4},
			sends: []send{{0, 1000}, {0, 1000}},
			want:  []arrive{{0, 0}, {0, 1}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := New(tt.cfg)
			for id, s := range tt.sends {
				l.Send(epoch.Add(s.at), numbered(id, s.size))
			}
			var got []arrive
			for _, d := range drain(t, l) {
				got = append(got, arrive{d.at, d.id()})
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("arrivals %v, want %v", got, tt.want)
			}
			if got, want := l.Stats().Dropped, len(tt.sends)-len(tt.want); got != want {
				t.Errorf("Dropped = %d, want %d", got, want)
			}
		})
	}
}

// TestThroughput offers a line twice its rate for ten seconds: it stays busy to
// the end, and what it cannot send is dropped by the queue.
func TestThroughput(t *testing.T) {
	l := New(Config{Rate: 8_000_000, Queue: 10_000}) // 1000 bytes a millisecond
	sendMany(l, 20_000, 1000, ms/2)
	got := drain(t, l)
	for i, d := range got {
		if want := time.Duration(i+1) * ms; d.at != want {
			t.Fatalf("delivery %d at %v, want %v", i, d.at, want)
		}
	}
	// 10s worth of packets, and those that the queue holds at the end.
	if n := len(got); n != 10_010 {
		t.Errorf("delivered %d packets, want 10010", n)
	}
}

// TestLossUsesTheLine checks that faults happen behind the line: what is lost
// has taken its time on it, and what is duplicated has not taken it twice.
func TestLossUsesTheLine(t *testing.T) {
	const n = 1000
	l := New(Config{Rate: 8_000_000, Loss: 0.3, Duplicate: 0.3, Seed: 1})
	sendMany(l, n, 1000, 0)
	for _, d := range drain(t, l) {
		if want := time.Duration(d.id()+1) * ms; d.at != want {
			t.Fatalf("packet %d at %v, want %v", d.id(), d.at, want)
		}
	}
	if s := l.Stats(); s.Lost == 0 || s.Duplicated == 0 {
		t.Errorf("Stats = %+v, want both faults to happen", s)
	}
}

// TestRates counts how often each fault is seen to happen to what is delivered.
func TestRates(t *testing.T) {
	const (
		n     = 10_000
		delay = 10 * ms
		extra = 5 * ms
	)
	faults := []struct {
		name    string
		cfg     func(p float64) Config
		seen    func(got []delivery) int
		counter func(s Stats) int
	}{
		{
			name:    "Loss",
			cfg:     func(p float64) Config { return Config{Loss: p} },
			seen:    func(got []delivery) int { return n - len(got) },
			counter: func(s Stats) int { return s.Lost },
		},
		{
			name: "Duplicate",
			cfg:  func(p float64) Config { return Config{Duplicate: p} },
			seen: func(got []delivery) int {
				twice := 0
				for i := 1; i < len(got); i++ {
					if got[i].id() == got[i-1].id() {
						twice++
					}
				}
				return twice
			},
			counter: func(s Stats) int { return s.Duplicated },
		},
		{
			name: "Reorder",
			cfg:  func(p float64) Config { return Config{Reorder: p, ReorderDelay: extra} },
			seen: func(got []delivery) int {
				late := 0
				for _, d := range got {
					if d.at == time.Duration(d.id())*ms+delay+extra {
						late++
					}
				}
				return late
			},
			counter: func(s Stats) int { return s.Reordered },
		},
		{
			name: "Corrupt",
			cfg:  func(p float64) Config { return Config{Corrupt: p} },
			seen: func(got []delivery) int {
				bad := 0
				for i, d := range got {
					if !bytes.Equal(d.packet, numbered(i, 40)) {
						bad++
					}
				}
				return bad
			},
			counter: func(s Stats) int { return s.Corrupted },
		},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			for _, p := range []float64{0, 0.01, 0.1, 0.5, 1} {
				cfg := f.cfg(p)
				cfg.Delay, cfg.Seed = delay, 42
				l := New(cfg)
				sendMany(l, n, 40, ms)
				got := f.seen(drain(t, l))
				if !plausible(got, n, p) {
					t.Errorf("p=%v: happened to %d of %d packets", p, got, n)
				}
				if c := f.counter(l.Stats()); c != got {
					t.Errorf("p=%v: counted %d, want %d", p, c, got)
				}
			}
		})
	}
}

// TestLossIsNotPeriodic checks that a packet after a lost one is as likely to be
// lost as any other.
func TestLossIsNotPeriodic(t *testing.T) {
	const n, p = 50_000, 0.2
	l := New(Config{Loss: p, Seed: 7})
	sendMany(l, n, 4, ms)
	lost := slices.Repeat([]bool{true}, n)
	for _, d := range drain(t, l) {
		lost[d.id()] = false
	}
	pairs := 0
	for i := 1; i < n; i++ {
		if lost[i-1] && lost[i] {
			pairs++
		}
	}
	if !plausible(pairs, n-1, p*p) {
		t.Errorf("%d of %d pairs of neighbours are lost, want %v", pairs, n-1, p*p*(n-1))
	}
}

func TestDuplicate(t *testing.T) {
	l := New(Config{Duplicate: 1, Delay: ms})
	sendMany(l, 2, 8, 0)
	got := drain(t, l)
	var ids []int
	for _, d := range got {
		ids = append(ids, d.id())
	}
	if want := []int{0, 0, 1, 1}; !slices.Equal(ids, want) {
		t.Fatalf("received %v, want %v", ids, want)
	}
	clear(got[2].packet)
	if got[3].id() != 1 {
		t.Errorf("the copies of a duplicated packet share memory")
	}
}

// TestDuplicatesAreIndependent checks that the fate of one copy is not that of
// the other.
func TestDuplicatesAreIndependent(t *testing.T) {
	const n = 4000
	l := New(Config{Duplicate: 1, Corrupt: 0.5, Jitter: ms, Seed: 3})
	for range n {
		l.Send(epoch, make([]byte, 100))
		first, second := l.flight[0], l.flight[1]
		if first.at.Equal(second.at) && bytes.Equal(first.packet, second.packet) {
			t.Fatal("two copies are jittered and corrupted alike")
		}
		drain(t, l)
	}
	if got := l.Stats().Corrupted; !plausible(got, 2*n, 0.5) {
		t.Errorf("%d of %d copies are corrupted, want about half", got, 2*n)
	}
}

func TestReorder(t *testing.T) {
	l := New(Config{Delay: 10 * ms, Reorder: 0.2, ReorderDelay: 3 * ms, Seed: 1})
	const n = 1000
	sendMany(l, n, 4, ms)
	got := drain(t, l)
	late := make([]bool, n)
	for _, d := range got {
		switch sent := time.Duration(d.id()) * ms; d.at - sent {
		case 10 * ms:
		case 13 * ms:
			late[d.id()] = true
		default:
			t.Fatalf("packet %d took %v", d.id(), d.at-sent)
		}
	}
	// A late packet is overtaken by the next two unless they are late too, and
	// arrives before the one sent 3ms after it.
	for i := 1; i < n; i++ {
		a, b := got[i-1], got[i]
		if a.at == b.at && a.id() > b.id() {
			t.Errorf("packets %d and %d arrive together, but not in the order sent", b.id(), a.id())
		}
		if b.id() < a.id() && !late[b.id()] {
			t.Errorf("packet %d is overtaken by %d, but is not late", b.id(), a.id())
		}
	}
}

func TestJitter(t *testing.T) {
	const (
		n      = 10_000
		delay  = 20 * ms
		jitter = 8 * ms
	)
	l := New(Config{Delay: delay, Jitter: jitter, Seed: 5})
	sendMany(l, n, 4, ms)
	var buckets [8]int
	overtaken, maxID := 0, 0
	for _, d := range drain(t, l) {
		extra := d.at - time.Duration(d.id())*ms - delay
		if extra < 0 || extra >= jitter {
			t.Fatalf("packet %d took %v on top of Delay, want [0, %v)", d.id(), extra, jitter)
		}
		buckets[extra*time.Duration(len(buckets))/jitter]++
		if d.id() < maxID {
			overtaken++
		}
		maxID = max(maxID, d.id())
	}
	if overtaken == 0 {
		t.Error("no packet was overtaken")
	}
	for i, got := range buckets {
		if !plausible(got, n, 1/float64(len(buckets))) {
			t.Errorf("eighth %d of the range has %d of %d packets", i, got, n)
		}
	}
}

// TestTies checks that packets made to arrive together keep their order.
func TestTies(t *testing.T) {
	l := New(Config{Jitter: 3, Seed: 1}) // three possible times
	sendMany(l, 1000, 4, 0)
	got := drain(t, l)
	if last := got[len(got)-1].at; last != 2 {
		t.Errorf("the last packet takes %v, want 2ns", last)
	}
	for i := 1; i < len(got); i++ {
		if a, b := got[i-1], got[i]; a.at == b.at && a.id() >= b.id() {
			t.Fatalf("packet %d is received before %d, which arrived with it", a.id(), b.id())
		}
	}
}

// TestSendCopies checks that the link neither changes a packet nor keeps it.
func TestSendCopies(t *testing.T) {
	l := New(Config{Corrupt: 0.5, Duplicate: 0.5, Seed: 2})
	const n, size = 1000, 16
	p := make([]byte, size)
	for i := range n {
		copy(p, numbered(i, size))
		l.Send(epoch, p)
		if !bytes.Equal(p, numbered(i, size)) {
			t.Fatalf("Send changed the caller's packet %d", i)
		}
		for j := range p {
			p[j] = 0xff
		}
	}
	for _, d := range drain(t, l) {
		// Behind the number are zeros, and three flips leave no byte all ones.
		if slices.Contains(d.packet[4:], 0xff) {
			t.Fatalf("received %x: the link kept the caller's packet", d.packet)
		}
	}
}

// TestCorrupt counts the bits that are inverted. The smallest packet is where a
// bit is most likely to be chosen twice.
func TestCorrupt(t *testing.T) {
	for _, size := range []int{1, 2, 1500} {
		const n = 6000
		l := New(Config{Corrupt: 1, Seed: 9})
		r := rand.New(rand.NewPCG(1, 2))
		var numbers [4]int               // packets by how many bits were inverted
		positions := make([]int, 8*size) // by which
		for range n {
			orig := make([]byte, size)
			for i := range orig {
				orig[i] = byte(r.Uint32())
			}
			l.Send(epoch, orig)
			got := l.Receive(epoch)
			if len(got) != size {
				t.Fatalf("received %d bytes, want %d", len(got), size)
			}
			flips := 0
			for i := range got {
				diff := got[i] ^ orig[i]
				flips += bits.OnesCount8(diff)
				for ; diff != 0; diff &= diff - 1 {
					positions[8*i+bits.TrailingZeros8(diff)]++
				}
			}
			if flips < 1 || flips > 3 {
				t.Fatalf("%d bits of %d bytes are inverted, want 1 to 3", flips, size)
			}
			numbers[flips]++
		}
		for flips := 1; flips <= 3; flips++ {
			if got := numbers[flips]; !plausible(got, n, 1.0/3) {
				t.Errorf("size %d: %d of %d packets have %d bits inverted", size, got, n, flips)
			}
		}
		if size > 2 {
			continue // too many bits for each to get its share
		}
		for bit, got := range positions {
			if want := 2 * n / len(positions); got < want*8/10 || got > want*12/10 {
				t.Errorf("size %d: bit %d is inverted %d times, want about %d", size, bit, got, want)
			}
		}
	}
}

// TestDeterminism runs a link with every fault, and a caller that receives as it
// goes, twice per seed.
func TestDeterminism(t *testing.T) {
	run := func(seed uint64) (got []delivery, s Stats) {
		l := New(Config{
			Delay: 20 * ms, Jitter: 3 * ms, Rate: 8_000_000, Queue: 20_000,
			Loss: 0.05, Duplicate: 0.05, Corrupt: 0.05, Reorder: 0.05, ReorderDelay: 7 * ms,
			Seed: seed,
		})
		for i := range 2000 {
			now := epoch.Add(time.Duration(i) * ms / 2)
			l.Send(now, numbered(i, 100+i%1000))
			for p := l.Receive(now); p != nil; p = l.Receive(now) {
				got = append(got, delivery{now.Sub(epoch), p})
			}
		}
		got = append(got, drain(t, l)...)
		return got, l.Stats()
	}
	same := func(a, b []delivery) bool {
		return slices.EqualFunc(a, b, func(a, b delivery) bool {
			return a.at == b.at && bytes.Equal(a.packet, b.packet)
		})
	}
	a, stats := run(1)
	if stats.Dropped*stats.Lost*stats.Duplicated*stats.Reordered*stats.Corrupted == 0 {
		t.Errorf("Stats = %+v, want every fault to happen", stats)
	}
	b, again := run(1)
	if !same(a, b) || stats != again {
		t.Error("two runs with the same seed differ")
	}
	if c, _ := run(2); same(a, c) {
		t.Error("two runs with different seeds are the same")
	}
}

func TestNewPanics(t *testing.T) {
	for _, cfg := range []Config{
		{Loss: 5}, {Loss: -0.1}, {Loss: math.NaN()},
		{Duplicate: 1.1}, {Corrupt: 1.1}, {Reorder: 1.1},
		{Delay: -1}, {Jitter: -1}, {ReorderDelay: -1}, {Rate: -1}, {Queue: -1},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("New(%+v) did not panic", cfg)
				}
			}()
			New(cfg)
		}()
	}
}
