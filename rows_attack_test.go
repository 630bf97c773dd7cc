package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Rows of testdata/conformance.md about guests that want to use everything up. Each
// reaches its bound, looks at memory, goroutines and flows, and has an innocent flow
// go on. They are as large as their rows say with SLIRP_SOAK=1.

// attack is a Stack that is attacked, and a flow that has nothing to do with it.
type attack struct {
	*machine
	t          *testing.T
	fam        family
	h          *hostNet
	innocent   *guest
	far        net.Conn
	heap       int64
	goroutines int
	answers    atomic.Int64 // frames for the attacker
}

// underAttack runs a test for both families, in virtual time.
func underAttack(t *testing.T, cfg Config, f func(t *testing.T, a *attack)) {
	if raceEnabled() || !conformanceSelected() {
		t.Skip("memory is measured, which other work on the machine disturbs: runs with SLIRP_CONFORMANCE=1, without the race detector")
	}
	cfg.TCPIdleTimeout = -1 // nobody answers probes
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, cfg)
		a := &attack{machine: m, t: t, fam: fam, h: h, innocent: m.open(1025, fam.at(81))}
		a.innocent.connect()
		a.far = h.accept()
		a.exchange()
		a.snapshot()
		f(t, a)
		a.exchange()
	})
}

// snapshot notes memory and goroutines, which within compares.
func (a *attack) snapshot() {
	synctest.Wait()
	a.goroutines = runtime.NumGoroutine()
	a.heap = heapInUse()
}

// within fails the test if the attack has taken more than so many bytes of memory,
// goroutines, and flows of any kind, the innocent one apart.
func (a *attack) within(bytes, goroutines, flows int) {
	a.t.Helper()
	synctest.Wait()
	if n := runtime.NumGoroutine() - a.goroutines; n > goroutines+40 { // those of the runtime come and go
		a.t.Errorf("%d goroutines, want at most %d", n, goroutines)
	}
	if raceEnabled() {
		bytes *= 3
	}
	if n := heapInUse() - a.heap; n > int64(bytes) {
		a.t.Errorf("%d bytes of memory, want at most %d", n, bytes)
	} else {
		a.t.Logf("%d bytes of memory", n)
	}
	st := a.s.Stats()
	if n := st.TCPFlows + st.UDPFlows - 1; n > flows {
		a.t.Errorf("%d flows, want at most %d", n, flows)
	}
}

// exchange moves a little over the innocent flow, in no time.
func (a *attack) exchange() {
	a.t.Helper()
	start := time.Now()
	a.innocent.data("ping")
	expectText(a.t, a.far, "ping")
	putText(a.t, a.far, "pong")
	a.innocent.expectText("pong")
	if d := time.Since(start); d != 0 {
		a.t.Errorf("the innocent flow waited %v", d)
	}
}

// from is an address of the attacker, of very many.
func (a *attack) from(i int) netip.AddrPort {
	addr := a.fam.guest.AsSlice()
	n := len(addr)
	addr[n-3], addr[n-2], addr[n-1] = byte(1+i>>28), byte(i>>20), byte(i>>12)
	b, _ := netip.AddrFromSlice(addr)
	return netip.AddrPortFrom(b, uint16(1024+i%4096))
}

// give sends a packet of the attacker. What is answered is lost.
func (a *attack) give(packet []byte) {
	if err := a.s.HandlePacket(a.ns, a.mac, a.gw, packet, func([]byte) error { a.answers.Add(1); return nil }); err != nil {
		a.t.Fatal(err)
	}
}

// connectWithin connects, with a SYN a second, as a guest does that is patient.
func (a *attack) connectWithin(port uint16, to netip.AddrPort, limit time.Duration) *guest {
	a.t.Helper()
	g := a.open(port, to)
	for start := time.Now(); ; {
		g.syn()
		if seg, ok := g.next(time.Second); ok {
			g.check(seg, "S.")
			g.ack()
			return g
		}
		if time.Since(start) >= limit {
			a.t.Fatalf("no connection within %v", limit)
		}
	}
}

func TestS01_Bounds(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		l := mustListen(t, a.s, "tcp", a.fam.at(80).String())
		for i := range soak(20_000, 1_000_000) {
			a.give(segment{src: a.from(i), dst: a.fam.at(80), seq: uint32(i), flags: flagS, win: 1000, opts: optMSS(1460)}.packet())
			if i%1000 == 0 {
				time.Sleep(100 * time.Millisecond)
			}
		}
		a.within(2<<20+256*4096, 0, 256)
		g := a.connectWithin(2000, a.fam.at(80), 3*time.Second)
		g.data("hello")
		expectText(t, mustAccept(t, l), "hello")
		time.Sleep(2 * time.Minute)
		a.within(2<<20, 0, 1)
	})
}

func TestS02_DialFlood(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		var now, most atomic.Int32
		a.h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			if f.Destination.Port() != 80 {
				return a.h.connect(), nil
			}
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			return hang(ctx, f)
		})
		dst := func(i int) netip.AddrPort { return netip.AddrPortFrom(a.from(i).Addr(), 80) }
		for i := range soak(5000, 100_000) {
			a.give(segment{src: netip.AddrPortFrom(a.fam.guest, uint16(1024+i%60000)), dst: dst(i), flags: flagS, win: 1000}.packet())
		}
		a.within(8<<20, 2*256+16, 256)
		if most.Load() != 256 {
			t.Errorf("%d dials at a time", most.Load())
		}
		// Another guest does not notice.
		other := newMachine(t, a.s)
		other.ns = 1
		other.open(1025, a.fam.at(443)).connect()
		a.h.accept()
		// This one waits until the dials have ended.
		time.Sleep(31 * time.Second)
		a.within(2<<20, 2, 1)
		g := a.connectWithin(1026, a.fam.at(443), time.Second)
		g.data("hello")
		expectText(t, a.h.accept(), "hello")
	})
}

func TestS03_UDPFlood(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		c.expect(t, "x")
		c.give("answer") // not one that nobody has answered
		g.expect("answer")
		before := heapInUse()
		goroutines := runtime.NumGoroutine()
		n := soak(6000, 65535*4)
		for i := range n {
			packet := udpPacket(netip.AddrPortFrom(fam.guest, uint16(1+i%65535)), netip.AddrPortFrom(fam.other, uint16(100+i/65535)), []byte("flood"))
			g.s.HandlePacket(0, g.mac, g.gw, packet, func([]byte) error { return nil })
			if i%1000 == 999 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		st := g.s.Stats()
		if st.UDPFlows > 4096 || st.UDPFlows < 1024 { // flows that nobody has answered make way
			t.Errorf("%d flows", st.UDPFlows)
		}
		if d := runtime.NumGoroutine() - goroutines; d > 2*4096+16 {
			t.Errorf("%d goroutines", d)
		}
		h.mu.Lock()
		h.calls = nil
		h.mu.Unlock()
		per := (heapInUse() - before) / int64(st.UDPFlows)
		t.Logf("%d bytes for each flow", per)
		if per > 128<<10 { // in memory the host's socket has a buffer while it is read
			t.Errorf("%d bytes for each flow", per)
		}
		c.give("still here")
		g.expect("still here")
		g.say("so am I")
		c.expect(t, "so am I")
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if n := g.s.Stats().UDPFlows; n != 0 {
			t.Errorf("%d flows a minute later", n)
		}
		for len(h.conns) > 0 {
			<-h.conns
		}
		g.sayFrom(4001, "new")
		h.accept().expect(t, "new")
	})
}

func TestS05_SingleBytes(t *testing.T) {
	singleBytes(t, 65535, func(i int) uint32 { return uint32(2*(65534-i) + 1) }) // the last first
}

// taker takes the data of a connection, and only counts it.
type taker struct {
	g      *guest
	end    atomic.Uint32 // of what has come, absolute
	frames atomic.Int64
	bytes  atomic.Int64
	again  atomic.Int64 // frames with data that was sent before
	edge   uint32
}

// takeBlindly makes the Writer of the guest's link a taker.
func (g *guest) takeBlindly() *taker {
	k := &taker{g: g}
	k.end.Store(g.irs + g.rcv)
	return k
}

func (k *taker) write(frame []byte) error {
	b := frame[14:]
	off, ok := tcpOffset(b)
	if !ok {
		return nil
	}
	h := b[off:]
	seq, n := binary.BigEndian.Uint32(h[4:]), uint32(len(h)-int(h[12]>>4)*4)
	k.frames.Add(1)
	k.bytes.Add(int64(n))
	if end := seq + n; ahead(end, k.end.Load()) {
		k.end.Store(end)
	} else if n > 0 {
		k.again.Add(1)
	}
	return nil
}

// say sends a segment without data, and returns how many frames were the direct
// answer.
func (k *taker) say(flags string, ack uint32, opts []byte) int64 {
	k.g.t.Helper()
	seg := k.g.segmentAt(flags, k.g.nxt, ack-k.g.irs, nil)
	seg.opts = opts
	before := k.frames.Load()
	k.g.must(k.g.s.HandlePacket(k.g.ns, k.g.mac, k.g.gw, seg.packet(), k.write))
	return k.frames.Load() - before
}

// TestS06_TinyMSS downloads with segments of next to nothing.
func TestS06_TinyMSS(t *testing.T) {
	for _, mss := range []int{1, 48, 88} {
		t.Run(fmt.Sprint(mss), func(t *testing.T) {
			underAttack(t, Config{}, func(t *testing.T, a *attack) {
				l := mustListen(t, a.s, "tcp", a.fam.at(80).String())
				g := a.open(2000, a.fam.at(80))
				g.opts = append(optMSS(mss), optScale(7)...)
				g.connect()
				c := mustAccept(t, l)
				k := g.takeBlindly()
				n := soak(300_000, 10<<20)
				data := pattern(n)
				a.snapshot()
				k.say(".", g.irs+g.rcv, nil) // the link is the taker's now
				go func() {
					c.Write(data)
					c.Close()
				}()
				most := int64(0)
				var heap int64
				for i := 0; int(k.end.Load()-g.irs) < n; i++ {
					synctest.Wait()
					if i%10 == 0 {
						heap = max(heap, heapInUse()-a.heap)
					}
					most = max(most, k.say(".", k.end.Load(), nil))
				}
				t.Logf("%d frames for one ACK, %d bytes of memory", most, heap)
				if k.bytes.Load() > int64(n)+int64(n)/10 || k.frames.Load() > int64(n/48)*11/10 {
					t.Errorf("%d bytes in %d frames for %d", k.bytes.Load(), k.frames.Load(), n)
				}
				if heap > 3<<20 {
					t.Errorf("%d bytes of memory for a send buffer of 1 MiB", heap)
				}
				k.say("R", k.end.Load(), nil)
			})
		})
	}
}

// flight has the stack send n bytes that are not acknowledged, in segments of 48.
func (a *attack) flight(n int) (g *guest, k *taker, c *VirtualConn) {
	a.t.Helper()
	l := mustListen(a.t, a.s, "tcp", a.fam.at(80).String())
	g = a.open(2000, a.fam.at(80))
	g.opts = append(optMSS(48), append(optScale(14), optSACKOK()...)...)
	g.connect()
	c = mustAccept(a.t, l)
	l.Close()
	k = g.takeBlindly()
	k.say(".", g.irs+g.rcv, nil)
	go func() {
		for { // until the connection ends
			if _, err := c.Write(make([]byte, 1<<20)); err != nil {
				return
			}
		}
	}()
	synctest.Wait()
	acked := g.irs + g.rcv
	for i := 0; int(k.end.Load()-acked) < n; i++ {
		if i > n {
			a.t.Fatalf("no more than %d bytes in flight", k.end.Load()-acked)
		}
		acked += 2 * 48 // slow start counts two segments of an ACK
		k.say(".", acked, nil)
		if i%100 == 0 {
			synctest.Wait() // for what is written
		}
	}
	synctest.Wait()
	g.rcv = acked - g.irs
	return g, k, c
}

// sackOption is a SACK option of blocks with absolute numbers.
func sackOption(blocks ...[2]uint32) []byte {
	b := []byte{1, 1, 5, byte(2 + 8*len(blocks))}
	for _, x := range blocks {
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, x[0]), x[1])
	}
	return b
}

// TestS07_SACKBlocks selects single bytes, everywhere in a large flight.
func TestS07_SACKBlocks(t *testing.T) {
	underAttack(t, Config{SendBuffer: 4 << 20}, func(t *testing.T, a *attack) {
		n := soak(200_000, 4<<20)
		g, k, c := a.flight(n)
		a.snapshot()
		rng := rand.New(rand.NewPCG(7, 7))
		una := g.irs + g.rcv
		acks := soak(2000, 50_000)
		took := workTime()
		for range acks {
			var blocks [4][2]uint32
			for i := range blocks {
				at := una + 1 + uint32(rng.IntN(n-2))
				blocks[i] = [2]uint32{at, at + 1}
			}
			k.say(".", una, sackOption(blocks[:]...))
		}
		per := took() / time.Duration(acks)
		t.Logf("%v for each ACK", per)
		if per > time.Millisecond {
			t.Errorf("%v for each ACK", per)
		}
		a.within(256<<10, 0, 2)
		if k.again.Load() > int64(n/48)+int64(acks) {
			t.Errorf("%d retransmissions", k.again.Load())
		}
		// It all counts for nothing once it is acknowledged.
		for range 20 {
			k.say(".", k.end.Load(), nil)
			synctest.Wait()
		}
		c.SetLinger(0)
		c.Close()
	})
}

// TestS08_SACKArithmetic selects everything but the first byte, in every way, and in the
// end takes it all.
func TestS08_SACKArithmetic(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		rng := rand.New(rand.NewPCG(8, 8))
		g := m.open(1025, to)
		g.opts = append(optMSS(536), append(optScale(7), optSACKOK()...)...)
		g.wrapStack()
		far := dial(g)
		down := pattern(300_000)
		go far.Write(down)
		synctest.Wait()
		rounds := soak(300, 30_000)
		for i := range rounds {
			g.mu.Lock()
			f := g.flow(g.id)
			first, end := g.irs+g.rcv, f.max
			f.queue = nil
			g.mu.Unlock()
			blocks := [][2]uint32{{first + 1, end}}
			if i%3 == 1 && end-first > 4 {
				at := first + 1 + uint32(rng.IntN(int(end-first-2)))
				blocks = [][2]uint32{{at, end}, {first + 1, at}, {at - 1, at + 1}}
			} else if i%3 == 2 {
				blocks = [][2]uint32{{first + 1, end}, {first, first + 1}, {end, first + 1}}
			}
			g.must(g.raw(".", g.nxt, g.rcv, sackOption(blocks...), nil))
			time.Sleep(time.Duration(rng.Int64N(int64(60*time.Second)/int64(rounds))) * 2)
			synctest.Wait()
		}
		g.drop()
		if got := g.takeLossy(len(down)); !bytes.Equal(got, down) {
			t.Error("data differs")
		}
	})
}

// TestS09_ClosedWindows has flows whose guests take nothing, with hosts that send
// without end.
func TestS09_ClosedWindows(t *testing.T) {
	const sendBuffer = 64 << 10
	underAttack(t, Config{SendBuffer: sendBuffer}, func(t *testing.T, a *attack) {
		n := soak(50, 1000)
		var hosts []*hostConn
		for i := range uint16(n) {
			g := a.open(2000+i, a.fam.at(80))
			g.win = 0
			g.connect()
			hosts = append(hosts, a.h.accept())
		}
		a.snapshot()
		data := make([]byte, 1<<20)
		for _, far := range hosts {
			go far.Write(data)
		}
		// The probes are answered.
		for range 30 {
			time.Sleep(10 * time.Second)
			for i := range uint16(n) {
				g := a.open(2000+i, a.fam.at(80))
				g.mu.Lock()
				f := g.flow(g.id)
				g.irs, g.nxt, g.rcv, f.queue = f.iss, 1, 1, nil
				g.mu.Unlock()
				g.win = 0
				g.ack()
			}
		}
		// What is in the buffers of the hosts counts, too, and a goroutine writes there.
		a.within(n*(2*sendBuffer+a.h.buffer)+2<<20, n, n)
		for _, far := range hosts {
			far.pair.mu.Lock()
			full := len(far.out.buf) == far.out.size
			far.pair.mu.Unlock()
			if !full {
				t.Error("a host is not kept from sending")
			}
			far.abort()
		}
		hosts, data = nil, nil
		for len(a.h.conns) > 0 {
			<-a.h.conns
		}
		time.Sleep(40 * time.Minute) // the guests are silent, too
		a.mu.Lock()
		a.flows = map[flowID]*flowCheck{a.innocent.id: a.flow(a.innocent.id)}
		a.kept = nil
		a.mu.Unlock()
		a.within(2<<20, 2, 0)
	})
}

// TestS09_HostGone has the host reset a flow whose guest keeps its window closed, and
// answers probes. The host's sockets are real: it is the operating system that knows of
// the reset.
func TestS09_HostGone(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the host is not looked at here")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		server, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
		if err != nil {
			t.Skip(err)
		}
		defer server.Close()
		s, err := NewWithConfig(Config{SendBuffer: 64 << 10})
		if err != nil {
			t.Fatal(err)
		}
		m := newMachine(t, s)
		g := m.open(2000, server.Addr().(*net.TCPAddr).AddrPort())
		g.win = 0
		g.connect()
		far, err := server.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		// As much as all buffers take: what is in them hides the reset from a read.
		far.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := far.Write(make([]byte, 64<<20)); err == nil {
			t.Fatal("a host is not kept from sending")
		}
		far.(*net.TCPConn).SetLinger(0)
		far.Close()
		for {
			seg, ok := g.next(patience)
			if !ok {
				t.Fatal("the guest has not heard of the host's reset")
			}
			if seg.flags&flagR != 0 {
				break
			}
			g.check(seg, ".")
			g.ack()
		}
		m.expectFlows(0)
	})
}

// TestS09_StackBound has more closed windows, and more hosts that read nothing, than a
// Stack should hold bytes for. There is some left for who comes later.
func TestS09_StackBound(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		a.h.buffer = 4096
		before := a.s.Stats().Buffered
		n := soak(200, 10_000)
		var guests []*guest
		var hosts []*hostConn
		data := make([]byte, 2<<20)
		for i := range n {
			g := a.open(uint16(2000+i), a.fam.at(80))
			g.opts = append(optMSS(1440), optScale(7)...)
			if i%2 == 0 {
				g.win = 0
			}
			g.connect()
			far := a.h.accept()
			guests, hosts = append(guests, g), append(hosts, far)
			if i%2 == 0 {
				go far.Write(data)
			} else {
				g.fill(data)
			}
		}
		time.Sleep(time.Minute)
		st := a.s.Stats()
		t.Logf("%d bytes in the buffers of %d flows", st.Buffered, n)
		if most := int64(64<<20 + n*8192); st.Buffered > most || st.Buffered < 32<<20 {
			t.Errorf("%d bytes in the buffers of %d flows, want at most %d", st.Buffered, n, most)
		}
		data = nil
		a.within(int(st.Buffered)+n*64<<10, 2*n, n) // there are goroutines of the test
		g := a.open(1999, a.fam.at(80))
		g.connect()
		far := a.h.accept()
		up, down := pattern(1<<20), pattern(1<<20)
		go far.Write(down)
		if !bytes.Equal(g.take(len(down)), down) {
			t.Error("what the host sends differs")
		}
		got := make([]byte, len(up))
		done := make(chan error)
		go func() {
			_, err := io.ReadFull(far, got)
			done <- err
		}()
		g.upload(up)
		if err := <-done; err != nil || !bytes.Equal(got, up) {
			t.Errorf("what the guest sends differs: %v", err)
		}
		for _, far := range hosts {
			far.abort()
		}
		far.abort()
		time.Sleep(time.Second)
		for _, g := range guests { // a host that is not read from is not seen to be gone
			g.rst()
		}
		synctest.Wait()
		if n := a.s.Stats().Buffered; n != before {
			t.Errorf("%d bytes in buffers in the end, %d before", n, before)
		}
	})
}

// trickling is a connection to a listener whose guest has closed its window.
func (a *attack) trickling() (*guest, *VirtualConn) {
	a.t.Helper()
	l := mustListen(a.t, a.s, "tcp", a.fam.at(80).String())
	g := a.open(2000, a.fam.at(80))
	g.opts = optMSS(1440)
	g.win = 0
	g.connect()
	return g, mustAccept(a.t, l)
}

// trickle takes a byte every ten seconds, and reports whether that ended with a reset.
func (g *guest) trickle(limit time.Duration) (ended bool) {
	for start := time.Now(); time.Since(start) < limit; {
		g.win = 1
		g.ack()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		for _, seg := range g.drop() {
			if seg.flags&flagR != 0 {
				return true
			}
			if g.seqOf(seg) == g.rcv {
				g.rcv += uint32(len(seg.payload))
			}
		}
	}
	return false
}

// TestS10_Trickle has a guest that takes a byte every ten seconds.
func TestS10_Trickle(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		g, c := a.trickling()
		putText(t, c, string(pattern(1<<20)))
		if g.trickle(10 * time.Minute) {
			t.Error("a connection that is in use is ended")
		}
		if g.rcv < 50 {
			t.Errorf("%d bytes in ten minutes", g.rcv-1)
		}
		c.SetLinger(0)
		c.Close()
		a.within(2<<20, 0, 0)
	})
}

// TestS10_Orphan has the program close such a connection.
func TestS10_Orphan(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		g, c := a.trickling()
		putText(t, c, string(pattern(1<<20)))
		start := time.Now()
		c.Close()
		if !g.trickle(5 * time.Minute) {
			t.Error("five minutes after Close the connection lives on")
		} else if d := time.Since(start); d > 120*time.Second {
			t.Errorf("it lived for %v", d)
		}
	})
}

// TestS12_TimeWait has more connections end than may linger.
func TestS12_TimeWait(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		l := mustListen(t, a.s, "tcp", a.fam.at(80).String())
		a.snapshot()
		for i := range soak(5000, 100_000) {
			src := a.from(i)
			var iss uint32
			w := func(frame []byte) error {
				off, _ := tcpOffset(frame[14:])
				iss = binary.BigEndian.Uint32(frame[14+off+4:])
				return nil
			}
			send := func(flags byte, seq, ack uint32) {
				p := segment{src: src, dst: a.fam.at(80), seq: seq, ack: ack, flags: flags, win: 1000}.packet()
				if err := a.s.HandlePacket(0, a.mac, a.gw, p, w); err != nil {
					t.Fatal(err)
				}
			}
			send(flagS, 0, 0)
			irs := iss
			send(flagA, 1, irs+1)
			mustAccept(t, l).Close()
			send(flagF|flagA, 1, irs+2)
			if i%100 == 0 { // or the bubble keeps every timer that was stopped
				time.Sleep(time.Millisecond)
			}
		}
		st := a.s.Stats()
		if st.TimeWait != maxTimeWait {
			t.Errorf("%d in TIME-WAIT", st.TimeWait)
		}
		per := (heapInUse() - a.heap) / maxTimeWait
		t.Logf("%d bytes for each", per)
		a.within(maxTimeWait*4096, 0, 0)
		time.Sleep(61 * time.Second)
		if n := a.s.Stats().TimeWait; n != 0 {
			t.Errorf("%d a minute later", n)
		}
		a.within(2<<20, 0, 0)
	})
}

// TestS14_OptimisticACKs acknowledges what was sent before it can have come.
func TestS14_OptimisticACKs(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		l := mustListen(t, a.s, "tcp", a.fam.at(80).String())
		g := a.open(2000, a.fam.at(80))
		g.opts = append(optMSS(1440), optScale(14)...)
		g.connect()
		c := mustAccept(t, l)
		k := g.takeBlindly()
		k.say(".", g.irs+g.rcv, nil)
		a.snapshot()
		n := soak(8<<20, 256<<20)
		data := pattern(1 << 20)
		go func() {
			for range n / len(data) {
				if _, err := c.Write(data); err != nil {
					t.Error(err)
				}
			}
			c.Close()
		}()
		most := int64(0)
		for int(k.end.Load()-g.irs) < n {
			synctest.Wait()
			if k.say(".", k.end.Load()+1+uint32(len(data)), nil) > 1 { // of what was not sent
				t.Fatal("an ACK of what was not sent has data go")
			}
			most = max(most, k.say(".", k.end.Load(), nil))
		}
		t.Logf("%d frames for one ACK", most)
		a.within(3<<20, 1, 1)
		if most*1440 > 1<<20+2*1440 {
			t.Errorf("%d frames for one ACK, with a send buffer of 1 MiB", most)
		}
		k.say("R", k.end.Load(), nil)
	})
}

// duplicateACKs sends very many of them about the first segment of a flight, and returns
// what was sent at first, in all, and again.
func (a *attack) duplicateACKs(sack bool) (first, all, again int64) {
	const mss = 1000
	l := mustListen(a.t, a.s, "tcp", a.fam.at(80).String())
	g := a.open(2000, a.fam.at(80))
	g.opts = append(optMSS(mss), optScale(7)...)
	if sack {
		g.opts = append(g.opts, optSACKOK()...)
	}
	g.connect()
	c := mustAccept(a.t, l)
	k := g.takeBlindly()
	k.say(".", g.irs+g.rcv, nil)
	data := pattern(4 << 20)
	a.snapshot()
	go c.Write(data)
	synctest.Wait()
	first = k.bytes.Load()
	una := g.irs + g.rcv
	for range soak(20_000, 1_000_000) {
		k.say(".", una, nil)
	}
	a.within(2<<20, 1, 1)
	all, again = k.bytes.Load(), k.again.Load()
	c.SetLinger(0)
	c.Close()
	return first, all, again
}

// TestS15_DuplicateACKs: a duplicate says that a segment has left the network, and there
// are no more of those than were sent.
func TestS15_DuplicateACKs(t *testing.T) {
	for _, sack := range []bool{false, true} {
		t.Run(fmt.Sprintf("SACK %v", sack), func(t *testing.T) {
			underAttack(t, Config{}, func(t *testing.T, a *attack) {
				first, all, again := a.duplicateACKs(sack)
				if again > 1 {
					t.Errorf("%d segments were sent again", again)
				}
				if first != 10_000 || all > 2*first+2000 {
					t.Errorf("duplicates of one ACK had %d bytes go, after %d", all-first, first)
				}
			})
		})
	}
}

func TestS16_Strays(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		n := soak(20_000, 1_000_000)
		stray := func(i int) {
			a.give(segment{src: a.from(i), dst: a.fam.at(uint16(1 + i%60000)), seq: uint32(i), ack: 77, flags: flagA, win: 1000}.packet())
		}
		for i := range n {
			stray(i)
		}
		if got := a.answers.Load(); got < 1 || got > icmpErrorBurst {
			t.Errorf("%d resets in no time", got)
		}
		a.answers.Store(0)
		for i := range n { // 10,000 a second
			stray(i)
			time.Sleep(100 * time.Microsecond)
		}
		if got, most := a.answers.Load(), int64(n/10+icmpErrorBurst); got < most/4 || got > most {
			t.Errorf("%d resets for %d strays, want up to %d", got, n, most)
		}
		a.within(2<<20, 0, 0)
	})
}

// TestS17_ACKStorm is a guest that does not agree about the connection, and says so
// about everything it hears.
func TestS17_ACKStorm(t *testing.T) {
	for name, answer := range map[string]func(g *guest) segment{
		"ahead":  func(g *guest) segment { return g.segmentAt(".", g.nxt+1<<24, g.rcv, nil) },
		"behind": func(g *guest) segment { return g.segmentAt(".", g.nxt-1000, g.rcv, nil) },
		"unsent": func(g *guest) segment { return g.segmentAt(".", g.nxt, g.rcv+1<<20, nil) },
		"syn":    func(g *guest) segment { return g.segmentAt("S", g.nxt+5, 0, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			eachEnd(t, Config{TCPIdleTimeout: -1}, func(t *testing.T, g *guest, far farEnd) {
				answers := 0
				end := time.Now().Add(time.Minute)
				for time.Now().Before(end) {
					g.blind(answer(g), &answers) // it crosses with others
					g.blind(answer(g), &answers)
					time.Sleep(time.Duration(soak(10, 1)) * time.Millisecond)
				}
				if answers > 2*60+1 {
					t.Errorf("%d ACKs in a minute", answers)
				}
				g.data("still here")
				expectText(t, far, "still here")
			})
		})
	}
}

func TestS18_Goroutines(t *testing.T) {
	underAttack(t, Config{Backlog: -1, MaxHalfOpen: -1}, func(t *testing.T, a *attack) {
		l := mustListen(t, a.s, "tcp", a.fam.at(80).String())
		n := soak(500, 5000)
		for i := range n {
			a.give(segment{src: a.from(i), dst: a.fam.at(80), flags: flagS, win: 1000}.packet())
		}
		a.within(n*4096, 0, n)
		time.Sleep(2 * time.Minute) // given up
		var conns []*VirtualConn
		for i := range uint16(n) {
			a.open(2000+i, a.fam.at(80)).connect()
			conns = append(conns, mustAccept(t, l))
		}
		a.within(n*16<<10, 0, n)
		for _, c := range conns {
			c.SetLinger(0)
			c.Close()
		}
		for i := range uint16(n) {
			a.open(10_000+i, a.fam.at(82)).connect()
			a.h.accept()
		}
		a.within(n*64<<10, 2*n+16, n)
	})
}

// TestS19_NoDescriptors: the host has none left, for a while.
func TestS19_NoDescriptors(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		a.h.mu.Lock()
		a.h.calls = nil
		a.h.mu.Unlock()
		a.h.setDial(refuse(dialError(syscall.EMFILE)))
		for i := range uint16(100) {
			g := a.open(2000+i, a.fam.at(80))
			g.syn()
			g.expect("R.")
			a.mustSend(udpPacket(netip.AddrPortFrom(a.fam.guest, 2000+i), a.fam.at(53), []byte("x")))
			synctest.Wait()
		}
		a.exchange()
		time.Sleep(time.Hour)
		if n := len(a.h.dials()); n != 200 {
			t.Errorf("%d dials for 200 flows", n)
		}
		a.within(4<<20, 0, 0)
		a.h.setDial(nil)
		a.open(3000, a.fam.at(80)).connect()
		a.h.accept()
	})
}

// TestS20_Canary fills every buffer with something that must not be seen again.
func TestS20_Canary(t *testing.T) {
	canary := []byte("CANARYBIRD")
	for _, reuse := range []bool{false, true} {
		t.Run(fmt.Sprintf("reuse %v", reuse), func(t *testing.T) {
			inBubble(t, func(t *testing.T, fam family) {
				h := newHostNet(t)
				memory := make(chan *memConn, 10)
				h.setDial(func(_ context.Context, f Flow) (net.Conn, error) {
					switch {
					case f.Destination.Port() == 1:
						return nil, dialError(syscall.EHOSTUNREACH)
					case f.Network == "udp":
						c := newMemConn()
						memory <- c
						return c, nil
					}
					return h.connect(), nil
				})
				s, err := NewWithConfig(Config{Dial: h.dial, ReuseFrames: reuse})
				if err != nil {
					t.Fatal(err)
				}
				m := newMachine(t, s)
				var clean atomic.Bool
				m.setHook(func(frame []byte) error {
					if clean.Load() && bytes.Contains(frame, canary[3:8]) {
						t.Errorf("an old byte in %x", frame)
					}
					return nil
				})
				long := bytes.Repeat(canary, 4000)
				port := uint16(2000)
				for range soak(20, 2000) {
					port = 2000 + (port+1)%60000
					clean.Store(false)
					g := m.open(port, fam.at(80))
					g.connect()
					far := h.accept()
					g.upload(long)
					if _, err := io.ReadFull(far, make([]byte, len(long))); err != nil {
						t.Fatal(err)
					}
					go far.Write(long)
					g.take(len(long))
					g.rst()
					from := netip.AddrPortFrom(fam.guest, port)
					m.mustSend(udpPacket(from, fam.at(53), long[:1400]))
					c := <-memory
					c.give(string(long), string(long[:1400]))
					m.mustSend(fam.ping(fam.server, 1, 1, long[:1400]))
					synctest.Wait()

					clean.Store(true)
					for n := range 20 {
						m.mustSend(fam.ping(fam.server, 1, 1, make([]byte, n)))
						c.give(string(make([]byte, n)))
					}
					c.give(string(make([]byte, 3000)))
					m.mustSend(udpPacket(from, fam.at(1), make([]byte, 30)))
					g = m.open(port+1, fam.at(1))
					g.syn() // refused
					g = m.open(port+1, fam.at(80))
					g.raw(".", 5, 5, nil, nil) // a stray
					g.expect("R")
					g.connect()
					far = h.accept()
					g.data("x")
					expectText(t, far, "x")
					g.must(g.raw("P.", g.nxt+50, g.rcv, nil, []byte("y"))) // a gap
					putText(t, far, "z")
					synctest.Wait()
					far.CloseWrite()
					synctest.Wait()
					g.rst()
					synctest.Wait()
					m.mu.Lock()
					m.kept, m.udp, m.icmp, m.flows = nil, nil, nil, make(map[flowID]*flowCheck)
					m.mu.Unlock()
					time.Sleep(2 * time.Minute)
				}
			})
		})
	}
}

// TestS21_Work: what is not valid costs no memory; with SLIRP_SOAK=1, the worst
// packets are compared with an ordinary one.
// headersOfPad1 is a ping with eight extension headers of so many bytes, full of the
// shortest option there is.
func headersOfPad1(size int) []byte {
	fam := families[1]
	whole := fam.ping(fam.server, 1, 2, nil)
	p := slices.Clone(whole[:40])
	next := [8]byte{60, 60, 60, 60, 60, 60, 60, 58}
	for _, n := range next {
		h := make([]byte, size)
		h[0], h[1] = n, byte(size/8-1)
		p = append(p, h...)
	}
	p = append(p, whole[40:]...)
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
	p[6] = 60
	return p
}

func TestS21_Work(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		s := New()
		defer s.Close()
		nothing := func([]byte) error { return nil }
		l := mustListen(t, s, "tcp", fam.at(443).String())
		defer l.Close()
		flip := func(p []byte) []byte { p[len(p)-1] ^= 0x55; return p }
		syn := segment{src: netip.AddrPortFrom(fam.guest, 1025), dst: fam.at(80), flags: flagS, win: 1000, payload: []byte("x")}
		proto, _ := fam.icmpOf()
		invalid := map[string][]byte{
			"nothing":          {},
			"a short packet":   syn.packet()[:19],
			"a cut-off packet": syn.packet()[:45],
			"TCP checksum":     flip(syn.packet()),
			"UDP checksum":     flip(udpPacket(syn.src, syn.dst, []byte("xyz"))),
			"ICMP checksum":    flip(fam.ping(fam.server, 1, 2, []byte("xyz"))),
			"a protocol":       refPacket(fam.guest, fam.server, 132, make([]byte, 30), -1),
			"an ICMP type":     refPacket(fam.guest, fam.server, proto, []byte{200, 0, 0, 0, 0, 0, 0, 0}, 2),
			"port 0":           segment{src: netip.AddrPortFrom(fam.guest, 0), dst: fam.at(80), flags: flagS}.packet(),
			"a reset":          segment{src: syn.src, dst: syn.dst, flags: flagR}.packet(),
			"SYN and FIN":      segment{src: syn.src, dst: syn.dst, flags: flagS | flagF}.packet(),
			"a multicast":      segment{src: syn.src, dst: netip.AddrPortFrom(fam.broadcast, 80), flags: flagS}.packet(),
			"a fragment lie":   flip(syn.packet()),
		}
		for name, p := range invalid {
			if n := leastAllocs(100, 0, func() { s.HandlePacket(0, [6]byte{}, [6]byte{}, p, nothing) }); n > 0 && !raceEnabled() {
				t.Errorf("%s: %v allocations", name, n)
			}
			if soak(0, 1) == 0 {
				continue
			}
			const runs = 100_000
			took := workTime()
			for range runs {
				s.HandlePacket(0, [6]byte{}, [6]byte{}, p, nothing)
			}
			if per := took() / runs; per > 3*time.Microsecond {
				t.Errorf("%s: %v", name, per)
			} else {
				t.Logf("%s: %v", name, per)
			}
		}
	})
	if soak(0, 1) == 0 {
		return
	}
	fam := families[1]
	s := New()
	defer s.Close()
	ordinary := fam.ping(fam.server, 1, 2, make([]byte, 56))
	worst := []map[string][]byte{{
		"eight extension headers of 2046 options": headersOfPad1(2048),
		"eight extension headers of 62 options":   headersOfPad1(64),
		"a ping that fills the MTU":               fam.ping(fam.server, 1, 2, make([]byte, 1452)),
	}}
	measure := func(p []byte) time.Duration {
		const runs = 2000
		took := workTime()
		for range runs {
			s.HandlePacket(0, [6]byte{}, [6]byte{}, p, func([]byte) error { return nil })
		}
		return took() / runs
	}
	base := measure(ordinary)
	for name, p := range worst[0] {
		if d := measure(p); d > 50*base {
			t.Errorf("%s: %v, an ordinary packet %v", name, d, base)
		} else {
			t.Logf("%s: %v, an ordinary packet %v", name, d, base)
		}
	}
}

func TestS23_Checksums(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		mustListen(t, a.s, "tcp", a.fam.at(80).String())
		n := soak(20_000, 1_000_000)
		before := a.s.Stats().DropChecksum
		src := netip.AddrPortFrom(a.fam.guest, 2000)
		packets := [][]byte{
			segment{src: src, dst: a.fam.at(80), flags: flagS, win: 1000, payload: []byte("x")}.packet(),
			udpPacket(src, a.fam.at(53), []byte("x")),
			a.fam.ping(a.fam.server, 1, 2, []byte("x")),
			a.innocent.segmentAt("P.", a.innocent.nxt, a.innocent.rcv, []byte("forged")).packet(),
		}
		for _, p := range packets {
			p[len(p)-1] ^= 0x21
		}
		for i := range n {
			a.give(packets[i%len(packets)])
		}
		if got := a.s.Stats().DropChecksum - before; got != uint64(n) || a.answers.Load() != 0 {
			t.Errorf("%d of %d were dropped, %d answers", got, n, a.answers.Load())
		}
		a.within(64<<10, 0, 0)
	})
}

// TestS27_LongUptime has a connection with timestamps, and a UDP flow, used every day
// for 400 days; the clock of the timestamps wraps in 49.7.
func TestS27_LongUptime(t *testing.T) {
	eachRig(t, Config{TCPIdleTimeout: -1, UDPIdleTimeout: -1}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.stamp = true
		g.opts = append(optMSS(1440), append(optScale(7), optStamps(uint32(time.Now().UnixMilli()), 0)...)...)
		far := dial(g)
		for day := range 400 {
			time.Sleep(24*time.Hour + time.Duration(day)*time.Second)
			text := fmt.Sprint("day ", day)
			g.data(text)
			expectText(t, far, text)
			g.expectACK()
			putText(t, far, text)
			if day%50 == 7 { // a very long round trip
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				g.drop()
				g.rcv += uint32(len(text))
				g.ack()
				continue
			}
			start := time.Now()
			g.expectText(text)
			if d := time.Since(start); d > time.Second {
				t.Fatalf("%s took %v", text, d)
			}
		}
		putText(t, far, "lost once")
		g.expect(".")
		start := time.Now()
		if seg := g.expectWithin(3*time.Minute, "."); string(seg.payload) != "lost once" || time.Since(start) < 200*time.Millisecond || time.Since(start) > 120*time.Second {
			t.Errorf("%s after %v", g.show(seg), time.Since(start))
		}
	})
}

// TestS30_NeverAcknowledged: a guest advertises a GiB, and acknowledges nothing.
func TestS30_NeverAcknowledged(t *testing.T) {
	underAttack(t, Config{}, func(t *testing.T, a *attack) {
		g := a.open(2000, a.fam.at(80))
		g.opts = append(optMSS(1440), optScale(14)...)
		g.connect()
		far := a.h.accept()
		k := g.takeBlindly()
		k.say(".", g.irs+g.rcv, nil)
		a.snapshot()
		written := make(chan bool)
		go func() {
			defer close(written)
			data := make([]byte, 1<<20)
			for range 1024 {
				if _, err := far.Write(data); err != nil {
					return
				}
			}
		}()
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if n := k.end.Load() - g.irs - 1; n > 12*1440 {
			t.Errorf("%d bytes in flight", n)
		}
		if n := k.frames.Load(); n > 40 {
			t.Errorf("%d frames", n)
		}
		far.pair.mu.Lock()
		full := len(far.out.buf) == far.out.size
		far.pair.mu.Unlock()
		if !full {
			t.Error("the host is not kept from sending")
		}
		a.within(4<<20, 3, 1)
		time.Sleep(30 * time.Minute)
		<-written
		a.within(2<<20, 2, 0)
	})
}
