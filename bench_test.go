package slirp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp/internal/load"
)

// Benchmarks over real loopback sockets, beside the same bytes over a socket
// alone, in the same run: absolute figures drift with the machine, the ratio does not.
// The guest costs next to nothing (internal/load): it is a TCP in name only, and
// leaves out checksums, as one with a virtual network card does. As -cpu 1,2,4,8
// shows what processors are worth, nothing here depends on their number.

// benchBatch is how many packets HandlePackets is given at a time.
const benchBatch = 32

// benchRig is a stack with a guest that calls HandlePacket, or, with a batch above
// 1, HandlePackets.
type benchRig struct {
	*Stack
	fam   family
	batch int
	ns    uintptr     // of the flows that open returns
	guest *load.Guest // of ns
}

func newBenchRig(b testing.TB, fam family, cfg Config, batch int) *benchRig {
	cfg.ReuseFrames = true
	s, err := NewWithConfig(cfg)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	return &benchRig{Stack: s, fam: fam, batch: batch, guest: new(load.Guest)}
}

// open returns a flow of the guest, which is not connected yet.
func (r *benchRig) open(port uint16, to netip.AddrPort) *load.Flow {
	f := load.NewFlow(netip.AddrPortFrom(r.fam.guest, port), to, r.cfg.MTU, r.batch)
	ns, mac, gw, header := r.ns, [6]byte{2, 1}, [6]byte{2, 2}, frameHeaderLen(uint16(r.fam.version))
	guest := r.guest
	guest.Add(f)
	if r.batch > 1 {
		w := func(frames [][]byte) error {
			guest.Take(header, frames...)
			return nil
		}
		f.Send = func(packets [][]byte) error { return r.HandlePackets(ns, mac, gw, packets, w) }
		return f
	}
	w := func(frame []byte) error {
		guest.Take(header, frame)
		return nil
	}
	f.Send = func(packets [][]byte) (first error) {
		for _, p := range packets {
			if err := r.HandlePacket(ns, mac, gw, p, w); first == nil {
				first = err
			}
		}
		return first
	}
	return f
}

// connect opens n flows.
func (r *benchRig) connect(b testing.TB, to netip.AddrPort, n int) []*load.Flow {
	flows := make([]*load.Flow, n)
	for i := range flows {
		flows[i] = r.open(uint16(1024+i), to)
		if err := flows[i].Connect(); err != nil {
			b.Fatal(err)
		}
	}
	return flows
}

// accept connects n flows to a listener of the stack.
func (r *benchRig) accept(b testing.TB, port uint16, n int) ([]*load.Flow, []net.Conn) {
	to := r.fam.at(port)
	l, err := r.Listen("tcp", to.String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	flows, conns := make([]*load.Flow, n), make([]net.Conn, n)
	for i := range flows {
		flows[i] = r.open(uint16(1024+i), to)
		if err := flows[i].Connect(); err != nil {
			b.Fatal(err)
		}
		if conns[i], err = l.Accept(); err != nil {
			b.Fatal(err)
		}
	}
	return flows, conns
}

func loadServer(b testing.TB, fam family) *load.Server {
	s, err := load.Listen(fam.loopback)
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(s.Close)
	return s
}

func sockets(b testing.TB, to netip.AddrPort, n int) []*load.Socket {
	s, err := load.Dial(to, n)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		for _, s := range s {
			s.Close()
		}
	})
	return s
}

// benchSizes are what data is moved with.
var benchSizes = struct{ mtus, flows, batches []int }{
	[]int{1500, 9000, 65520}, []int{1, 4, 64}, []int{1, benchBatch},
}

// eachSize runs a benchmark for every size.
func eachSize(b *testing.B, flows []int, f func(b *testing.B, r *benchRig, flows int)) {
	for _, fam := range families {
		for _, mtu := range benchSizes.mtus {
			for _, n := range flows {
				for _, batch := range benchSizes.batches {
					b.Run(fmt.Sprintf("%s/mtu%d/flows%d/batch%d", fam.name, mtu, n, batch), func(b *testing.B) {
						f(b, newBenchRig(b, fam, Config{MTU: mtu}, batch), n)
					})
				}
			}
		}
	}
}

const benchChunk = 4 << 20

// BenchmarkUpload moves bytes from the guest to a server on loopback. Ratio is the
// throughput over that of as many plain sockets, which write 128 KiB at a time.
func BenchmarkUpload(b *testing.B) { benchMove(b, true) }

// BenchmarkDownload is BenchmarkUpload the other way.
func BenchmarkDownload(b *testing.B) { benchMove(b, false) }

func benchMove(b *testing.B, up bool) {
	eachSize(b, benchSizes.flows, func(b *testing.B, r *benchRig, flows int) {
		to := loadServer(b, r.fam).Addr()
		guests := r.connect(b, to, flows)
		plain := sockets(b, to, flows)
		b.SetBytes(benchChunk)
		b.ReportAllocs()
		move(b, guests, plain, up)
	})
}

// benchRounds is how often ours and the plain sockets take turns: what else the
// machine does in the meantime is to concern both.
const benchRounds = 8

// move moves what b.N says both ways of doing it, and reports the ratio, that of the
// CPU time too: of guest, stack and server over sockets and server.
func move(b *testing.B, guests []*load.Flow, plain []*load.Socket, up bool) {
	var ours, raw load.Cost
	b.ResetTimer()
	b.StopTimer()
	for i := range benchRounds {
		n := int64((b.N+i)/benchRounds) * benchChunk
		if n == 0 {
			continue
		}
		b.StartTimer()
		c, err := load.Measure(func() error { return load.Move(guests, up, n) })
		b.StopTimer()
		if err != nil {
			b.Fatal(err)
		}
		ours = ours.Add(c)
		c, err = load.Measure(func() error { return load.Move(plain, up, n) })
		if err != nil {
			b.Fatal(err)
		}
		raw = raw.Add(c)
	}
	b.ReportMetric(float64(b.N)*benchChunk*8/float64(ours.Wall), "Gbit/s")
	b.ReportMetric(float64(raw.Wall)/float64(ours.Wall), "ratio")
	b.ReportMetric(float64(ours.CPU)/float64(max(1, raw.CPU)), "cpu-ratio")
}

// BenchmarkUDPUpload floods a server with datagrams as long as the MTU. What is
// counted is what arrives; ratio is that beside a plain socket that does the same.
func BenchmarkUDPUpload(b *testing.B) {
	eachSize(b, []int{1}, func(b *testing.B, r *benchRig, _ int) {
		u := newUDPBench(b, r)
		data := load.Datagram(u.size)
		packets := make([][]byte, r.batch)
		for i := range packets {
			packets[i] = load.UDPPacket(u.guest, u.server.Addr(), data)
		}
		u.give(packets[:1])
		u.settle(&u.server.Received, 1)
		b.ResetTimer()
		ours := u.measure(&u.server.Received, func() {
			for n := b.N; n > 0; n -= len(packets) {
				u.give(packets[:min(n, len(packets))])
			}
		})
		b.StopTimer()
		plain := u.dial(b)
		u.report(b, ours, u.measure(&u.server.Received, func() {
			for range b.N {
				plain.Write(data)
			}
		}))
	})
}

// BenchmarkUDPDownload is BenchmarkUDPUpload the other way.
func BenchmarkUDPDownload(b *testing.B) {
	eachSize(b, []int{1}, func(b *testing.B, r *benchRig, _ int) {
		u := newUDPBench(b, r)
		u.give([][]byte{load.UDPPacket(u.guest, u.server.Addr(), load.Flood(u.size, 1))})
		u.settle(&u.received, 1)
		flood := load.Flood(u.size, b.N)
		b.ResetTimer()
		ours := u.measure(&u.received, func() {
			u.give([][]byte{load.UDPPacket(u.guest, u.server.Addr(), flood)})
			u.settle(&u.server.Sent, 1+int64(b.N))
		})
		b.StopTimer()

		plain := u.dial(b)
		var received atomic.Int64
		go func() {
			buf := make([]byte, 64<<10)
			for {
				if _, err := plain.Read(buf); err != nil {
					return
				}
				received.Add(1)
			}
		}()
		u.report(b, ours, u.measure(&received, func() {
			plain.Write(flood)
			u.settle(&u.server.Sent, 1+2*int64(b.N))
		}))
	})
}

// udpBench is one UDP flow of a guest.
type udpBench struct {
	b        *testing.B
	server   *load.UDPServer
	guest    netip.AddrPort
	size     int // of the data of a datagram
	give     func(packets [][]byte)
	received atomic.Int64 // by the guest
}

func newUDPBench(b *testing.B, r *benchRig) *udpBench {
	server, err := load.ListenUDP(r.fam.loopback)
	if err != nil {
		b.Skip(err)
	}
	b.Cleanup(server.Close)
	u := &udpBench{b: b, server: server, guest: netip.AddrPortFrom(r.fam.guest, 1024),
		size: r.cfg.MTU + etherHeaderLen - frameHeaderLen(uint16(r.fam.version)) - udpHeaderLen}
	one := func([]byte) error { u.received.Add(1); return nil }
	many := func(frames [][]byte) error { u.received.Add(int64(len(frames))); return nil }
	u.give = func(packets [][]byte) {
		if r.batch > 1 {
			err = r.HandlePackets(0, [6]byte{2, 1}, [6]byte{2, 2}, packets, many)
		} else {
			err = r.HandlePacket(0, [6]byte{2, 1}, [6]byte{2, 2}, packets[0], one)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(int64(u.size))
	b.ReportAllocs()
	return u
}

func (u *udpBench) dial(b *testing.B) net.Conn {
	c, err := net.Dial("udp", u.server.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return c
}

// settle waits until a counter is n.
func (u *udpBench) settle(c *atomic.Int64, n int64) {
	for c.Load() < n {
		time.Sleep(100 * time.Microsecond)
	}
}

// udpResult is what became of b.N datagrams.
type udpResult struct {
	bytesPerNs float64
	lost       float64 // in percent
}

// measure counts what arrives of the datagrams that flood sends.
func (u *udpBench) measure(c *atomic.Int64, flood func()) udpResult {
	before, begin := c.Load(), time.Now()
	flood()
	took := time.Since(begin)
	for last := int64(-1); c.Load() != last; time.Sleep(10 * time.Millisecond) {
		last = c.Load() // what is in a socket's queue still comes
	}
	n := float64(c.Load() - before)
	return udpResult{n * float64(u.size) / float64(took), 100 * (1 - n/float64(u.b.N))}
}

func (u *udpBench) report(b *testing.B, ours, plain udpResult) {
	b.ReportMetric(8*ours.bytesPerNs, "Gbit/s-delivered")
	b.ReportMetric(ours.lost, "%lost")
	b.ReportMetric(plain.lost, "%lost-raw")
	b.ReportMetric(ours.bytesPerNs/plain.bytesPerNs, "ratio")
}

// BenchmarkConnect is what a short connection does: connect, request, answer, close.
// Ratio is the rate over that of plain sockets.
func BenchmarkConnect(b *testing.B) {
	for _, fam := range families {
		for _, parallel := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/parallel%d", fam.name, parallel), func(b *testing.B) {
				r := newBenchRig(b, fam, Config{}, 1)
				to := loadServer(b, fam).Addr()
				b.ReportAllocs()
				b.ResetTimer()
				ours, err := load.Measure(func() error {
					return load.Exchanges(func(port uint16) *load.Flow { return r.open(port, to) }, b.N, parallel)
				})
				b.StopTimer()
				if err != nil {
					b.Fatal(err)
				}
				raw, err := load.Measure(func() error { return load.SocketExchanges(to, b.N, parallel) })
				if err != nil {
					b.Fatal(err)
				}
				b.ReportMetric(float64(b.N)/ours.Wall.Seconds(), "conns/s")
				b.ReportMetric(float64(raw.Wall)/float64(ours.Wall), "ratio")
				b.ReportMetric(float64(ours.CPU)/float64(max(1, raw.CPU)), "cpu-ratio")
			})
		}
	}
}

// BenchmarkRoundTrip is a small request and its answer over a connection that
// stays, beside a plain socket.
func BenchmarkRoundTrip(b *testing.B) {
	for _, fam := range families {
		b.Run(fam.name, func(b *testing.B) {
			r := newBenchRig(b, fam, Config{}, 1)
			to := loadServer(b, fam).Addr()
			roundTrips(b, r.connect(b, to, 1)[0], sockets(b, to, 1)[0])
		})
	}
}

func roundTrips(b *testing.B, guest *load.Flow, plain *load.Socket) {
	b.ReportAllocs()
	report := func(c load.Conn, suffix string) {
		took := make([]time.Duration, b.N)
		if err := c.RoundTrips(took); err != nil {
			b.Fatal(err)
		}
		for _, p := range []int{50, 99} {
			b.ReportMetric(float64(load.Percentile(took, p))/1e3, fmt.Sprintf("us-p%d%s", p, suffix))
		}
	}
	b.ResetTimer()
	report(guest, "")
	b.StopTimer()
	report(plain, "-raw")
}

// BenchmarkSegment is HandlePacket for an in-order segment that fills the MTU, and
// the program's part of reading it; batch32 is HandlePackets, and its time is that of
// one packet too.
func BenchmarkSegment(b *testing.B) {
	eachBatch(b, func(b *testing.B, r *benchRig) {
		flows, conns := r.accept(b, 80, 1)
		segments(b, flows, conns)
	})
}

// segments gives b.N segments to flows, one after the other, 32 to each in turn, and
// reads what has come.
func segments(b *testing.B, flows []*load.Flow, conns []net.Conn) {
	buf := make([]byte, benchBatch*flows[0].MSS())
	b.SetBytes(int64(flows[0].MSS()))
	b.ReportAllocs()
	b.ResetTimer()
	for i, left := 0, b.N; left > 0; i = (i + 1) % len(flows) {
		n := min(left, benchBatch)
		for k := 0; k < n; {
			packets := flows[i].Next(n - k)
			if err := flows[i].Send(packets); err != nil {
				b.Fatal(err)
			}
			k += len(packets)
		}
		if _, err := io.ReadFull(conns[i], buf[:n*flows[i].MSS()]); err != nil {
			b.Fatal(err)
		}
		left -= n
	}
}

// BenchmarkACK is HandlePacket for a segment that says nothing new.
func BenchmarkACK(b *testing.B) {
	eachBatch(b, func(b *testing.B, r *benchRig) {
		flows, _ := r.accept(b, 80, 1)
		packets := make([][]byte, r.batch)
		for i := range packets {
			packets[i] = flows[0].ACK()
		}
		b.ReportAllocs()
		b.ResetTimer()
		for n := b.N; n > 0; n -= r.batch {
			if err := flows[0].Send(packets); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkWrite is a segment that the program sends, and a guest that acknowledges
// every second one.
func BenchmarkWrite(b *testing.B) {
	eachBatch(b, func(b *testing.B, r *benchRig) {
		flows, conns := r.accept(b, 80, 1)
		data := make([]byte, benchBatch*flows[0].MSS())
		b.SetBytes(int64(flows[0].MSS()))
		b.ReportAllocs()
		b.ResetTimer()
		for n := b.N; n > 0; n -= benchBatch {
			if _, err := conns[0].Write(data[:min(n, benchBatch)*flows[0].MSS()]); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func eachBatch(b *testing.B, f func(b *testing.B, r *benchRig)) {
	for _, fam := range families {
		for _, batch := range benchSizes.batches {
			b.Run(fmt.Sprintf("%s/batch%d", fam.name, batch), func(b *testing.B) {
				f(b, newBenchRig(b, fam, Config{}, batch))
			})
		}
	}
}

// BenchmarkScale is one flow among others that are open and idle, in as many
// namespaces: what it costs is not to depend on them. Spread is a segment for each
// of the flows in turn, 32 at a time: what the caches of the processor cannot hold
// shows there, and nothing else should.
func BenchmarkScale(b *testing.B) {
	fam := families[0]
	for _, size := range []struct{ others, namespaces int }{
		{0, 1}, {100, 1}, {1000, 1}, {9000, 1}, {1000, 8}, {1000, 64},
	} {
		// The others are the same for each of these.
		b.Run(fmt.Sprintf("others%d/namespaces%d", size.others, size.namespaces), func(b *testing.B) {
			r := newBenchRig(b, fam, Config{MaxTCPFlows: -1}, 1)
			var others []*load.Flow
			var conns []net.Conn
			for i := range size.namespaces {
				r.ns, r.guest = uintptr(i), new(load.Guest)
				f, c := r.accept(b, uint16(1000+i), max(1, size.others/size.namespaces))
				others, conns = append(others, f...), append(conns, c...)
			}
			server := loadServer(b, fam).Addr()
			guest, plain := r.connect(b, server, 1), sockets(b, server, 1)
			b.Run("segment", func(b *testing.B) { segments(b, others[:1], conns[:1]) })
			b.Run("spread", func(b *testing.B) { segments(b, others, conns) })
			for _, up := range []bool{true, false} {
				b.Run(map[bool]string{true: "upload", false: "download"}[up], func(b *testing.B) {
					b.SetBytes(benchChunk)
					move(b, guest, plain, up)
				})
			}
			b.Run("roundtrip", func(b *testing.B) { roundTrips(b, guest[0], plain[0]) })
		})
	}
}

// idleFlows opens flows through the NAT over loopback, moves some data over each,
// and returns the bytes and goroutines that each of them costs when it has been idle
// for long enough, without those of the server.
func idleFlows(t testing.TB, fam family, n int) (bytes, goroutines float64) {
	server := loadServer(t, fam)
	r := newBenchRig(t, fam, Config{}, 1)
	guests := make([]*load.Flow, n)
	for i := range guests {
		guests[i] = r.open(uint16(1024+i), server.Addr())
	}
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
	for _, g := range guests {
		for _, do := range []func() error{
			g.Connect,
			func() error { return g.Upload(100_000) },
			func() error { return g.Download(100_000) },
			g.Park,
		} {
			if err := do(); err != nil {
				t.Fatal(err)
			}
		}
		g.Release()
	}
	const serverBytes = 400 // a *net.TCPConn, its descriptor and its place among those that are parked
	mem2, routines2 := settle(routines + n)
	for last := mem2 + 1; mem2 < last; { // goroutines end, or get smaller stacks, when flows have been idle
		last = mem2
		time.Sleep(3 * idleAfter)
		mem2, routines2 = settle(routines + n)
		mem2 = min(mem2, last)
	}
	runtime.KeepAlive(guests)
	return (float64(mem2)-float64(mem))/float64(n) - serverBytes, float64(routines2-routines) / float64(n)
}

// TestIdleFlowCost: an idle flow holds no buffer, and a goroutine only where one cannot
// wait for many.
func TestIdleFlowCost(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector takes memory")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		bytes, goroutines := idleFlows(t, fam, 300)
		t.Logf("%.0f bytes and %.2f goroutines a flow", bytes, goroutines)
		most, each := 16<<10, 1
		if runtime.GOOS == "linux" {
			most, each = 4<<10, 0
		}
		if bytes > float64(most) || goroutines > float64(each)+0.1 {
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
