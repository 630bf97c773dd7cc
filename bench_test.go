package slirp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"
)

// Benchmarks over real loopback sockets, beside the same bytes over a socket
// alone. The guest costs little: it builds no packet, and leaves out checksums, as
// one with a virtual network card does.

// benchGuest is the guest's end of one connection.
type benchGuest struct {
	s          *Stack
	off        int // of the TCP header in a packet
	mss        int
	data, pure []byte // packets to send
	writer     Writer

	mu   sync.Mutex
	cond sync.Cond
	iss  uint32

	rcv   uint32 // the next to come
	taken uint32 // by download
	acked uint32 // by the stack
	edge  uint32 // of the stack's window
	scale uint8
	state byte // flags of the SYN-ACK, FIN or RST that came
	owed  int  // segments not acknowledged yet
}

func newBenchGuest(s *Stack, fam family, port uint16, to netip.AddrPort) *benchGuest {
	g := &benchGuest{s: s, off: 20, mss: fam.mss, iss: 1000}
	if fam.version == 6 {
		g.off = 40
	}
	g.cond.L = &g.mu
	seg := segment{src: netip.AddrPortFrom(fam.guest, port), dst: to, flags: flagA, win: 65535}
	g.pure = seg.packet()
	seg.payload = make([]byte, g.mss)
	g.data = seg.packet()
	g.clear(g.pure)
	g.clear(g.data)
	g.writer = g.write
	return g
}

func (g *benchGuest) clear(p []byte) { p[g.off+16], p[g.off+17] = 0, 0 }

// write takes a frame. It only takes notes: what is to be sent is sent by the
// goroutine of the guest.
func (g *benchGuest) write(frame []byte) error {
	t := frame[14+g.off:]
	seq, ack := binary.BigEndian.Uint32(t[4:]), binary.BigEndian.Uint32(t[8:])
	n := uint32(len(t)) - uint32(t[12]>>4)*4
	g.mu.Lock()
	flags := t[13]
	if flags&flagS != 0 {
		g.rcv, g.taken = seq+1, seq+1
		g.acked = ack
		for o := t[20 : int(t[12]>>4)*4]; len(o) > 0; {
			if o[0] == 1 {
				o = o[1:]
				continue
			}
			if o[0] == 3 {
				g.scale = o[2]
			}
			o = o[o[1]:]
		}
	}
	if flags&flagA != 0 && int32(ack-g.acked) > 0 {
		g.acked = ack
	}
	win := uint32(binary.BigEndian.Uint16(t[14:]))
	if flags&flagS == 0 {
		win <<= g.scale
	}
	if edge := ack + win; int32(edge-g.edge) > 0 || flags&flagS != 0 {
		g.edge = edge
	}
	if n > 0 {
		if seq == g.rcv {
			g.rcv += n
		}
		g.owed++
	}
	if flags&flagF != 0 && seq+n == g.rcv {
		g.rcv++
		g.owed += 2
	}
	g.state |= flags & (flagS | flagF | flagR)
	g.cond.Signal()
	g.mu.Unlock()
	return nil
}

func (g *benchGuest) give(p []byte, flags byte, seq, ack uint32) error {
	t := p[g.off:]
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[13] = flags
	return g.s.HandlePacket(0, [6]byte{2, 1}, [6]byte{2, 2}, p, g.writer)
}

// connect does the handshake.
func (g *benchGuest) connect(b testing.TB) {
	syn := append([]byte(nil), g.pure...)
	syn = append(syn, 2, 4, byte(g.mss>>8), byte(g.mss), 1, 3, 3, 8)
	syn[g.off+12] = 7 << 4
	repair(syn)
	g.clear(syn)
	if err := g.give(syn, flagS, g.iss, 0); err != nil {
		b.Fatal(err)
	}
	g.mu.Lock()
	for g.state == 0 {
		g.cond.Wait()
	}
	ok := g.state&flagR == 0
	g.state = 0
	rcv := g.rcv
	g.mu.Unlock()
	if !ok {
		b.Fatal("refused")
	}
	g.iss++
	if err := g.give(g.pure, flagA, g.iss, rcv); err != nil {
		b.Fatal(err)
	}
}

// upload sends n bytes as fast as the stack's window allows.
func (g *benchGuest) upload(b testing.TB, n int) {
	end := g.iss + uint32(n)
	for seq := g.iss; seq != end; {
		g.mu.Lock()
		for int32(g.edge-seq) < int32(min(g.mss, int(end-seq))) && g.state&flagR == 0 {
			g.cond.Wait()
		}
		edge, rcv, reset := g.edge, g.rcv, g.state&flagR != 0
		g.mu.Unlock()
		if reset {
			b.Fatal("reset")
		}
		for seq != end && int32(edge-seq) >= int32(min(g.mss, int(end-seq))) {
			p := g.data
			k := min(g.mss, int(end-seq))
			if k < g.mss {
				p = append([]byte(nil), g.data[:g.off+20+k]...)
				repair(p)
				g.clear(p)
			}
			if err := g.give(p, flagA, seq, rcv); err != nil {
				b.Fatal(err)
			}
			seq += uint32(k)
		}
	}
	g.iss = end
	g.mu.Lock()
	for g.acked != end && g.state&flagR == 0 {
		g.cond.Wait()
	}
	g.mu.Unlock()
}

// download takes n bytes, acknowledging as many as have come each time.
func (g *benchGuest) download(b testing.TB, n int) {
	g.mu.Lock()
	g.taken += uint32(n)
	end := g.taken
	for {
		for g.owed < 2 && int32(g.rcv-end) < 0 && g.state&flagR == 0 {
			g.cond.Wait()
		}
		rcv, reset := g.rcv, g.state&flagR != 0
		g.owed = 0
		g.mu.Unlock()
		if reset {
			b.Fatal("reset")
		}
		if err := g.give(g.pure, flagA, g.iss, rcv); err != nil {
			b.Fatal(err)
		}
		if int32(rcv-end) >= 0 {
			return
		}
		g.mu.Lock()
	}
}

// loopbackServer serves each connection by a function.
func loopbackServer(b testing.TB, fam family, serve func(c net.Conn)) netip.AddrPort {
	l, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
	if err != nil {
		b.Skip(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Add(1)
			go func() {
				defer wg.Done()
				defer c.Close()
				serve(c)
			}()
		}
	}()
	b.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort()
}

const benchChunk = 4 << 20

// BenchmarkUpload moves bytes from the guest to a server on loopback. Ratio is
// the time of a plain socket that writes segment by segment for the same bytes,
// over ours; ratio-64k is that of a socket that writes 64 KiB at a time.
func BenchmarkUpload(b *testing.B) { benchTransfer(b, true) }

// BenchmarkDownload is BenchmarkUpload the other way; the plain socket reads
// 64 KiB at a time.
func BenchmarkDownload(b *testing.B) { benchTransfer(b, false) }

func benchTransfer(b *testing.B, up bool) {
	for _, fam := range families {
		for _, mtu := range []int{1500, 65535} {
			b.Run(fmt.Sprintf("%s/mtu%d", fam.name, mtu), func(b *testing.B) {
				to := loopbackServer(b, fam, func(c net.Conn) {
					one := make([]byte, 1)
					chunk := make([]byte, benchChunk)
					for {
						if up { // a chunk, then a byte in answer
							if _, err := io.ReadFull(c, chunk); err != nil {
								return
							}
							if _, err := c.Write(one); err != nil {
								return
							}
							continue
						}
						if _, err := io.ReadFull(c, one); err != nil {
							return
						}
						if _, err := c.Write(chunk); err != nil {
							return
						}
					}
				})
				s, err := NewWithConfig(Config{ReuseFrames: true, MTU: mtu})
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				fam := fam
				fam.mss += mtu - 1500
				g := newBenchGuest(s, fam, 1025, to)
				g.connect(b)
				b.SetBytes(benchChunk)
				b.ReportAllocs()
				b.ResetTimer()
				for range b.N {
					if up {
						g.upload(b, benchChunk)
						g.download(b, 1)
					} else {
						g.upload(b, 1)
						g.download(b, benchChunk)
					}
				}
				b.StopTimer()
				ours := b.Elapsed()
				report := func(name string, piece int) {
					c, err := net.Dial("tcp", to.String())
					if err != nil {
						b.Fatal(err)
					}
					defer c.Close()
					buf := make([]byte, piece)
					start := time.Now()
					for range b.N {
						for n := 0; up && n < benchChunk; n += len(buf) {
							c.Write(buf[:min(len(buf), benchChunk-n)])
						}
						if up {
							io.ReadFull(c, buf[:1])
							continue
						}
						c.Write(buf[:1])
						for n := 0; n < benchChunk; {
							k, err := c.Read(buf)
							if err != nil {
								b.Fatal(err)
							}
							n += k
						}
					}
					b.ReportMetric(float64(time.Since(start))/float64(ours), name)
				}
				report("ratio", fam.mss)
				report("ratio-64k", 64<<10)
			})
		}
	}
}

// BenchmarkConnect opens and resets connections through the NAT, and dials the
// same server as often.
func BenchmarkConnect(b *testing.B) {
	for _, fam := range families {
		b.Run(fam.name, func(b *testing.B) {
			to := loopbackServer(b, fam, func(c net.Conn) { io.Copy(io.Discard, c) })
			s := New()
			defer s.Close()
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				g := newBenchGuest(s, fam, uint16(1024+i%60000), to)
				g.connect(b)
				if err := g.give(g.pure, flagR, g.iss, 0); err != nil {
					b.Fatal(err)
				}
			}
			b.StopTimer()
			ours := b.Elapsed()
			start := time.Now()
			for range b.N {
				c, err := net.Dial("tcp", to.String())
				if err != nil {
					b.Fatal(err)
				}
				c.(*net.TCPConn).SetLinger(0)
				c.Close()
			}
			b.ReportMetric(float64(time.Since(start))/float64(ours), "ratio")
		})
	}
}

// idleFlows opens flows through the NAT over loopback, moves some data over each,
// and returns the bytes and goroutines that each of them costs when it is idle,
// without those of the server.
func idleFlows(t testing.TB, fam family, n int) (bytes, goroutines float64) {
	l, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	s := New()
	defer s.Close()
	conns := make([]net.Conn, n)
	guests := make([]*benchGuest, n)
	for i := range guests {
		guests[i] = newBenchGuest(s, fam, uint16(1024+i), to)
	}
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	buf := make([]byte, 100_000)
	settle := func(goroutines int) (uint64, int) {
		// Those that have nothing more to do end.
		for end := time.Now().Add(2 * time.Second); runtime.NumGoroutine() > goroutines && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		runtime.GC()
		runtime.GC()
		var ms runtime.MemStats
		runtime.ReadMemStats(&ms)
		return ms.HeapAlloc + ms.StackInuse, runtime.NumGoroutine()
	}
	mem, routines := settle(runtime.NumGoroutine())
	for i, g := range guests {
		g.connect(t)
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c
		done := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(c, buf)
			if err == nil {
				_, err = c.Write(buf)
			}
			done <- err
		}()
		g.upload(t, len(buf))
		g.download(t, len(buf))
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	const server = 300 // the server's *net.TCPConn and its descriptor, which are not ours
	mem2, routines2 := settle(routines + n)
	runtime.KeepAlive(guests)
	return (float64(mem2)-float64(mem))/float64(n) - server, float64(routines2-routines) / float64(n)
}

// TestIdleFlowCost: an idle flow holds no buffer, and one goroutine.
func TestIdleFlowCost(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector takes memory")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		bytes, goroutines := idleFlows(t, fam, 300)
		t.Logf("%.0f bytes and %.2f goroutines a flow", bytes, goroutines)
		if bytes > 16<<10 || goroutines > 1.1 {
			t.Errorf("an idle flow costs %.0f bytes and %.2f goroutines", bytes, goroutines)
		}
	})
}

// BenchmarkIdleFlow reports what an idle flow costs, over 1,000 flows.
func BenchmarkIdleFlow(b *testing.B) {
	for _, fam := range families {
		b.Run(fam.name, func(b *testing.B) {
			for range b.N {
				bytes, goroutines := idleFlows(b, fam, 1000)
				b.ReportMetric(bytes, "B/flow")
				b.ReportMetric(goroutines, "goroutines/flow")
			}
		})
	}
}

// BenchmarkRefused is a SYN that the policy turns down.
func BenchmarkRefused(b *testing.B) {
	refused := errors.New("no")
	s, err := NewWithConfig(Config{Allow: func(context.Context, Flow) error { return refused }})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	fam := families[0]
	answered := make(chan bool, 1)
	syn := segment{src: netip.AddrPortFrom(fam.guest, 1), dst: fam.at(80), flags: flagS, win: 1}.packet()
	b.ReportAllocs()
	for range b.N {
		s.HandlePacket(0, [6]byte{}, [6]byte{}, syn, func([]byte) error { answered <- true; return nil })
		<-answered
	}
}
