package tcp

import (
	"bytes"
	"crypto/sha256"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp/internal/netsim"
)

var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// side is one TCB, the link it sends on, and an application.
type side struct {
	*TCB
	out  *netsim.Link
	send []byte // what is left to write
	got  []byte
}

func (s *side) flush(now time.Time, t *testing.T) {
	var buf [MaxHeaderLen + 65536]byte
	for i := 0; ; i++ {
		n := s.Output(now, buf[:])
		if n == 0 {
			return
		}
		if i > 5000 {
			t.Fatal("Output does not end")
		}
		s.out.Send(now, buf[:n])
	}
}

func (s *side) app(now time.Time) {
	if n := s.Write(s.send); n > 0 {
		s.send = s.send[n:]
	}
	if len(s.send) == 0 {
		s.CloseWrite()
	}
	var p [65536]byte
	for n := s.Read(p[:]); n > 0; n = s.Read(p[:]) {
		s.got = append(s.got, p[:n]...)
	}
}

// run drives both sides until both are closed and returns the virtual time it took.
func run(t *testing.T, a, b *side, limit time.Duration) time.Duration {
	now := epoch
	var done time.Time
	for {
		if now.Sub(epoch) > limit {
			t.Fatalf("not done after %v: %v %v, left %d %d", limit, a.State(), b.State(), len(a.send), len(b.send))
		}
		for _, s := range []*side{a, b} {
			if s.TCB == nil {
				continue
			}
			s.Advance(now)
			s.flush(now, t)
			s.app(now)
			s.flush(now, t)
			if d := s.Deadline(); !d.IsZero() && !d.After(now) {
				t.Fatalf("deadline in the past: %v", s.timers)
			}
		}
		for _, d := range [][2]*side{{a, b}, {b, a}} {
			for p := d[0].out.Receive(now); p != nil; p = d[0].out.Receive(now) {
				var seg Segment
				if !seg.Parse(p) {
					t.Fatal("bad segment")
				}
				if d[1].TCB == nil {
					d[1].TCB = NewPassive(testConfig(7), now, &seg)
				} else {
					d[1].Input(now, &seg)
				}
				d[1].flush(now, t)
			}
			if d[1].TCB != nil {
				d[1].app(now)
				d[1].flush(now, t)
			}
		}
		if b.TCB != nil && a.EOF() && b.EOF() && !a.Unsent() && !b.Unsent() {
			done = now
			return done.Sub(epoch)
		}
		var next time.Time
		for _, d := range []time.Time{a.Deadline(), a.out.Next(), b.out.Next()} {
			if !d.IsZero() && (next.IsZero() || d.Before(next)) {
				next = d
			}
		}
		if b.TCB != nil {
			if d := b.Deadline(); !d.IsZero() && (next.IsZero() || d.Before(next)) {
				next = d
			}
		}
		if next.IsZero() {
			t.Fatalf("stuck: %v %v", a.State(), b.State())
		}
		now = next
	}
}

func testConfig(seed uint64) Config {
	r := rand.New(rand.NewPCG(seed, 1))
	return Config{LocalPort: 1, RemotePort: 2, MSS: 1460, DefaultMSS: 536, SendBuffer: 1 << 20, ReceiveBuffer: 1 << 20,
		ISS: 0xffff0000 + r.Uint32N(0x10000), TSOffset: r.Uint32()}
}

func random(n int, seed byte) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func TestTransfer(t *testing.T) {
	for _, loss := range []float64{0, 0.001, 0.01, 0.05, 0.1} {
		a := &side{TCB: NewActive(testConfig(1), epoch), send: random(10<<20, 1)}
		b := &side{send: random(1<<20, 2)}
		a.out = netsim.New(netsim.Config{Delay: 50 * time.Millisecond, Loss: loss, Seed: 3})
		b.out = netsim.New(netsim.Config{Delay: 50 * time.Millisecond, Loss: loss, Seed: 4})
		sa, sb := a.send, b.send
		d := run(t, a, b, time.Hour)
		if sha256.Sum256(a.got) != sha256.Sum256(sb) || !bytes.Equal(b.got, sa) {
			t.Fatal("digest")
		}
		t.Logf("loss %v: %v, %.0f B/s; %+v", loss, d, float64(len(sa))/d.Seconds(), a.reno)
	}
}
