package slirp

import (
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"testing"
)

// steadyFlow is an established connection of a guest that costs nothing: its
// segments are built beforehand, and only their numbers and checksums change.
type steadyFlow struct {
	s      *Stack
	conn   *VirtualConn
	g      *guest
	packet []byte // a segment with data
	ack    []byte // one without
	off    int    // of the TCP header
	seq    uint32
	frames int
	writer Writer
}

// write is a Writer that keeps nothing.
func (f *steadyFlow) write(frame []byte) error {
	f.frames++
	return nil
}

func (f *steadyFlow) give(b *testing.T, p []byte) {
	if err := f.s.HandlePacket(0, f.g.mac, f.g.gw, p, f.writer); err != nil {
		b.Fatal(err)
	}
}

// newSteadyFlow connects to a listener. Checksums are left out, as a guest with a
// virtual network card may.
func newSteadyFlow(t *testing.T, fam family, payload int, cfg Config) *steadyFlow {
	cfg.ReuseFrames, cfg.TCPIdleTimeout = true, -1
	m, _ := newRig(t, cfg)
	l := mustListen(t, m.s, "tcp", fam.at(80).String())
	g := m.open(1025, fam.at(80))
	g.connect()
	f := &steadyFlow{s: m.s, conn: mustAccept(t, l), g: g, off: 40, seq: g.iss + 1}
	f.writer = f.write // once: a method value is an allocation
	if fam.version == 4 {
		f.off = 20
	}
	seg := segment{src: g.id.guest, dst: g.id.host, seq: f.seq, ack: g.irs + 1, flags: flagA, win: 65535}
	f.ack = seg.packet()
	seg.payload = make([]byte, payload)
	f.packet = seg.packet()
	for _, p := range [][]byte{f.ack, f.packet} {
		p[f.off+16], p[f.off+17] = 0, 0
	}
	return f
}

// advance makes the segment with data the next one.
func (f *steadyFlow) advance() {
	f.seq += uint32(len(f.packet) - f.off - 20)
	for _, p := range [][]byte{f.ack, f.packet} {
		putUint32(p[f.off+4:], f.seq)
	}
}

func putUint32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
}

// leastAllocs is testing.AllocsPerRun without what the rest of the process allocates
// meanwhile, which counts there too: the least of several measurements, or the first
// that is not above want.
func leastAllocs(runs int, want float64, f func()) float64 {
	least := testing.AllocsPerRun(runs, f)
	for again := 0; least > want && again < 20; again++ {
		least = min(least, testing.AllocsPerRun(runs, f))
	}
	return least
}

// TestLeastAllocs: what is allocated each time is found, and what is now and then is
// not.
func TestLeastAllocs(t *testing.T) {
	var sink *[1000]byte
	if n := leastAllocs(10, 0, func() { sink = new([1000]byte) }); n != 1 {
		t.Errorf("%v allocations, want 1", n)
	}
	calls := 0
	if n := leastAllocs(10, 0, func() {
		if calls++; calls < 50 {
			sink = new([1000]byte)
		}
	}); n != 0 {
		t.Errorf("%v allocations after a disturbance, want 0", n)
	}
	runtime.KeepAlive(sink)
}

func TestAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector allocates")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		measure := func(name string, limit float64, f func()) {
			t.Helper()
			for range 100 { // rings and pools have their size then
				f()
			}
			if n := leastAllocs(1000, limit, f); n > limit {
				t.Errorf("%s: %v allocations, want %v", name, n, limit)
			}
		}
		f := newSteadyFlow(t, fam, fam.mss, Config{})
		buf := make([]byte, 64<<10)
		measure("a data segment that is read at once", 0, func() {
			f.give(t, f.packet)
			f.advance()
			if n, err := f.conn.Read(buf); n != fam.mss || err != nil {
				t.Fatal(n, err)
			}
		})
		if f.frames == 0 {
			t.Error("nothing was acknowledged")
		}
		measure("sixteen data segments that are read together", 0, func() {
			for range 16 {
				f.give(t, f.packet)
				f.advance()
			}
			if _, err := io.ReadFull(f.conn, buf[:16*fam.mss]); err != nil {
				t.Fatal(err)
			}
		})
		measure("a pure ACK", 0, func() { f.give(t, f.ack) })
		data := make([]byte, fam.mss)
		ack := f.g.irs + 1
		measure("a write and its ACK", 0, func() {
			if _, err := f.conn.Write(data); err != nil {
				t.Fatal(err)
			}
			ack += uint32(len(data))
			putUint32(f.ack[f.off+8:], ack)
			f.give(t, f.ack)
		})
		bad := append([]byte(nil), f.packet...)
		bad[f.off+16] = 0x12
		measure("a wrong checksum", 0, func() { f.give(t, bad) })
		measure("a fragment of a header", 0, func() {
			if f.s.HandlePacket(0, f.g.mac, f.g.gw, f.packet[:10], f.writer) != ErrPacketTooShort {
				t.Fatal("no error")
			}
		})
		// A stray segment costs its reset, which the Writer may keep.
		stray := segment{src: netip.AddrPortFrom(fam.guest, 9), dst: fam.at(9), flags: flagA, win: 1}.packet()
		measure("a stray segment", 1, func() { f.give(t, stray) })
	})
}

// TestFrameMemory: a small frame that the Writer keeps does not cost the memory
// of the largest.
func TestFrameMemory(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector makes frames share less memory")
	}
	for _, mtu := range []int{1500, 9000, 40000, 65535} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			s, err := NewWithConfig(Config{MTU: mtu})
			if err != nil {
				t.Fatal(err)
			}
			m := newMachine(t, s)
			fam := families[0]
			l := mustListen(t, s, "tcp", fam.at(80).String())
			g := m.open(1025, fam.at(80))
			g.connect()
			mustAccept(t, l)
			early := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + 100, ack: g.irs + 1, flags: flagA, win: 65535, payload: []byte("x")}.packet()
			const n = 1000
			kept := make([][]byte, 0, n+1)
			keep := func(frame []byte) error {
				kept = append(kept, frame)
				return nil
			}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range n { // each is acknowledged at once
				if err := s.HandlePacket(0, m.mac, m.gw, early, keep); err != nil {
					t.Fatal(err)
				}
			}
			runtime.ReadMemStats(&after)
			if len(kept) != n {
				t.Fatalf("%d frames, want %d", len(kept), n)
			}
			if perFrame := (after.TotalAlloc - before.TotalAlloc) / n; perFrame > 1024 {
				t.Errorf("a frame of %d bytes costs %d bytes of memory", len(kept[0]), perFrame)
			}
		})
	}
}
