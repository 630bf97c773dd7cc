package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/KarpelesLab/slirp/internal/hostio"
)

// udpGuest is a machine that speaks UDP from one port to one destination, unless
// it is told otherwise.
type udpGuest struct {
	*machine
	from, to netip.AddrPort

	frameMu sync.Mutex
	arrived [][]byte // frames of datagrams, whole or in fragments
}

func newUDPGuest(m *machine, from netip.Addr, to netip.AddrPort) *udpGuest {
	g := &udpGuest{machine: m, from: netip.AddrPortFrom(from, 4000), to: to}
	m.mac, m.gw = testLink.guest, testLink.gw
	m.setHook(g.keep)
	return g
}

// newUDPRig returns a guest of a Stack whose host network is in memory: every dial
// gets a memConn, which accept returns.
func newUDPRig(t testing.TB, fam family, cfg Config) (*udpGuest, *udpHost) {
	h := &udpHost{hostNet: newHostNet(t), conns: make(chan *memConn, 10000)}
	h.setDial(h.connect)
	if cfg.Dial == nil {
		cfg.Dial = h.dial
	}
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return newUDPGuest(newMachine(t, s), fam.guest, fam.at(7000)), h
}

// keep keeps the frames that are no ICMP.
func (g *udpGuest) keep(frame []byte) error {
	frames := [][]byte{bytes.Clone(frame)}
	if g.s.cfg.VirtioNetHeader {
		frames, _ = cutFrame(frames[0]) // whose error the machine tells
	}
	for _, frame := range frames {
		b := frame[14:]
		proto := b[9]
		if b[0]>>4 == 6 {
			proto = b[6]
		}
		if proto == 17 || proto == 44 {
			g.frameMu.Lock()
			g.arrived = append(g.arrived, frame)
			g.frameMu.Unlock()
		}
	}
	return nil
}

// udpPacket is a packet with a datagram.
func udpPacket(from, to netip.AddrPort, data []byte) []byte {
	b := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(b, from.Port())
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(data)))
	return refPacket(from.Addr(), to.Addr(), 17, append(b, data...), 6)
}

// say sends a datagram.
func (g *udpGuest) say(text string) {
	g.t.Helper()
	g.mustSend(udpPacket(g.from, g.to, []byte(text)))
}

// sayFrom sends a datagram from another port: that is another flow.
func (g *udpGuest) sayFrom(port uint16, text string) {
	g.t.Helper()
	g.mustSend(udpPacket(netip.AddrPortFrom(g.from.Addr(), port), g.to, []byte(text)))
}

// hearAt waits for a datagram to the port, and returns its data.
func (g *udpGuest) hearAt(port uint16) string {
	g.t.Helper()
	var frames [][]byte
	g.wait("datagram", patience, func() bool {
		g.frameMu.Lock()
		defer g.frameMu.Unlock()
		for i, frame := range g.arrived {
			more := frame[14+6]&0x20 != 0
			if frame[14]>>4 == 6 {
				more = frame[14+6] == 44 && frame[14+43]&1 != 0
			}
			if !more {
				frames = slices.Clone(g.arrived[:i+1])
				g.arrived = g.arrived[i+1:]
				return true
			}
		}
		return false
	})
	p := mustReassemble(g.t, frames, g.mtu)
	b := p.payload
	src := netip.AddrPortFrom(p.src.addr(), binary.BigEndian.Uint16(b))
	dst := netip.AddrPortFrom(p.dst.addr(), binary.BigEndian.Uint16(b[2:]))
	if src != g.to || dst != netip.AddrPortFrom(g.from.Addr(), port) || int(binary.BigEndian.Uint16(b[4:])) != len(b) || b[6]|b[7] == 0 {
		g.t.Fatalf("datagram from %v to %v, length %d of %d, checksum %x", src, dst, binary.BigEndian.Uint16(b[4:]), len(b), b[6:8])
	}
	return string(b[8:])
}

func (g *udpGuest) expect(text string) {
	g.t.Helper()
	if got := g.hearAt(g.from.Port()); got != text {
		g.t.Fatalf("got %.40q (%d bytes), want %.40q (%d bytes)", got, len(got), text, len(text))
	}
}

// expectNothing fails the test if the Stack has sent anything that was not taken.
func (g *udpGuest) expectNothing() {
	g.t.Helper()
	synctest.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.frameMu.Lock()
	defer g.frameMu.Unlock()
	if len(g.arrived) > 0 || len(g.icmp) > 0 {
		g.t.Fatalf("the guest got %d frames and %v", len(g.arrived), g.icmp)
	}
}

// expectUnreachable waits for an ICMP error about a packet that the guest sent.
func (g *udpGuest) expectUnreachable(kind unreachable, packet []byte) {
	g.t.Helper()
	v4 := map[unreachable][2]byte{unreachablePort: {3, 3}, unreachableHost: {3, 1}, unreachableNet: {3, 0}, unreachableProhibited: {3, 13}}
	v6 := map[unreachable][2]byte{unreachablePort: {1, 4}, unreachableHost: {1, 3}, unreachableNet: {1, 0}, unreachableProhibited: {1, 1}}
	want, from := v4[kind], netip.MustParseAddr("10.0.2.2")
	if g.from.Addr().Is6() {
		want, from = v6[kind], netip.MustParseAddr("fd00::2")
	}
	if kind == unreachablePort {
		from = g.to.Addr()
	}
	msg := g.takeICMP()
	if [2]byte{msg.typ, msg.code} != want || msg.src != from || msg.dst != g.from.Addr() {
		g.t.Errorf("ICMP %d %d from %v to %v, want %v from %v", msg.typ, msg.code, msg.src, msg.dst, want, from)
	}
	if !bytes.Equal(msg.body, packet[:min(len(packet), maxQuote)]) {
		g.t.Errorf("ICMP error about %x, want %x", msg.body, packet)
	}
}

// expectStats compares counters, which are given by name and value.
func (g *udpGuest) expectStats(want map[string]int) {
	g.t.Helper()
	st := g.s.Stats()
	all := map[string]int{
		"flows": st.UDPFlows, "dials": st.PendingDials, "dialed": int(st.FlowsDialed), "refused": int(st.FlowsRefused),
		"queue": int(st.DropUDPQueue), "big": int(st.DropUDPTooBig), "policy": int(st.DropPolicy),
		"full": int(st.DropTooManyFlows), "pending": int(st.DropPendingDials), "icmp": int(st.ICMPErrors),
		"truncated": int(st.DropTruncated), "checksum": int(st.DropChecksum), "port": int(st.DropPort),
		"address": int(st.DropAddress), "writer": int(st.DropWriter),
	}
	for name, n := range want {
		got, ok := all[name]
		if !ok || got != n {
			g.t.Errorf("%s: %d, want %d", name, got, n)
		}
	}
}

// udpHost makes the network on the host's side hand out memConns.
type udpHost struct {
	*hostNet
	conns chan *memConn
}

func (h *udpHost) connect(context.Context, Flow) (net.Conn, error) {
	c := newMemConn()
	h.conns <- c
	return c, nil
}

func (h *udpHost) accept() *memConn {
	h.t.Helper()
	select {
	case c := <-h.conns:
		return c
	case <-time.After(patience):
		h.t.Fatal("no socket on the host")
		return nil
	}
}

// memConn is a datagram socket of the host, in memory.
type memConn struct {
	mu     sync.Mutex
	cond   sync.Cond
	in     []any // for Read: a string, or an error
	out    []string
	errs   []error // of the next Writes; nil: none
	stuck  bool    // Write does not return
	closed time.Time
	reads  int
}

func newMemConn() *memConn {
	c := new(memConn)
	c.cond.L = &c.mu
	return c
}

func (c *memConn) Read(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reads++
	for len(c.in) == 0 {
		if !c.closed.IsZero() {
			return 0, net.ErrClosed
		}
		c.cond.Wait()
	}
	next := c.in[0]
	c.in = c.in[1:]
	if err, ok := next.(error); ok {
		return 0, err
	}
	return copy(b, next.(string)), nil
}

func (c *memConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.stuck && c.closed.IsZero() {
		c.cond.Wait()
	}
	if !c.closed.IsZero() {
		return 0, net.ErrClosed
	}
	if len(c.errs) > 0 {
		err := c.errs[0]
		c.errs = c.errs[1:]
		if err != nil {
			return 0, err
		}
	}
	c.out = append(c.out, string(b))
	c.cond.Broadcast()
	return len(b), nil
}

func (c *memConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.IsZero() {
		c.closed = time.Now()
	}
	c.cond.Broadcast()
	return nil
}

func (c *memConn) LocalAddr() net.Addr              { return &net.UDPAddr{} }
func (c *memConn) RemoteAddr() net.Addr             { return &net.UDPAddr{} }
func (c *memConn) SetDeadline(time.Time) error      { return nil }
func (c *memConn) SetReadDeadline(time.Time) error  { return nil }
func (c *memConn) SetWriteDeadline(time.Time) error { return nil }

// give has Read return datagrams and errors.
func (c *memConn) give(next ...any) {
	c.mu.Lock()
	c.in = append(c.in, next...)
	c.cond.Broadcast()
	c.mu.Unlock()
}

// set changes the connection under its lock.
func (c *memConn) set(f func()) {
	c.mu.Lock()
	f()
	c.cond.Broadcast()
	c.mu.Unlock()
}

// expect waits for the datagrams that were written.
func (c *memConn) expect(t testing.TB, want ...string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.out) < len(want) && c.closed.IsZero() {
		c.cond.Wait()
	}
	if !slices.Equal(c.out, want) {
		t.Fatalf("the host got %d datagrams %.200q, want %d %.200q", len(c.out), c.out, len(want), want)
	}
	c.out = nil
}

// closedAt waits until everything stands still, and returns when the connection
// was closed.
func (c *memConn) closedAt() time.Time {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func udpInBubble(t *testing.T, cfg Config, test func(t *testing.T, fam family, g *udpGuest, h *udpHost)) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, cfg)
		test(t, fam, g, h)
	})
}

func TestUDPRelay(t *testing.T) {
	for _, reuse := range []bool{false, true} {
		for _, mtu := range []int{1280, 1500, 65535} {
			t.Run(fmt.Sprintf("reuse=%v/mtu=%d", reuse, mtu), func(t *testing.T) {
				udpInBubble(t, Config{MTU: mtu, ReuseFrames: reuse}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
					g.say("hello")
					c := h.accept()
					c.expect(t, "hello")
					headers := 28
					if fam.version == 6 {
						headers = 48
					}
					for _, n := range []int{0, 1, 100, mtu - headers - 1, mtu - headers, mtu - headers + 1, 9000, 65507, 0} {
						text := string(pattern(min(n, 65507)))
						if n <= mtu-headers {
							g.say(text)
							c.expect(t, text)
						}
						c.give(text, "between")
						g.expect(text)
						g.expect("between")
					}
					g.expectNothing()
					g.expectStats(map[string]int{"flows": 1, "dialed": 1, "big": 0})
				})
			})
		}
	}
}

func TestUDPDialArguments(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("")
		h.accept()
		want := dialCall{"udp", g.to.String(), Flow{Network: "udp", Source: g.from, Destination: g.to}, time.Now()}
		if calls := h.dials(); len(calls) != 1 || calls[0] != want {
			t.Errorf("dials %v, want %v", calls, want)
		}
	})
}

// The longest datagram of each family crosses, and no longer one.
func TestUDPLongest(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		longest := map[int]int{4: 65507, 6: 65527}[fam.version]
		g.say("")
		c := h.accept()
		text := string(pattern(longest))
		c.give(text)
		g.expect(text)
		if fam.version == 4 {
			c.give(text + "x")
			g.expectNothing()
			g.expectStats(map[string]int{"big": 1, "flows": 1})
		}
	})
}

// Datagrams that come while the host is dialed are kept, up to a bound, and none
// overtakes another.
func TestUDPDialPends(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		gate := make(chan bool)
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			if f.Source == g.from {
				<-gate
			}
			return h.connect(ctx, f)
		})
		var want []string
		for i := range 20 {
			text := fmt.Sprint("datagram ", i)
			if i%4 == 0 {
				text = ""
			}
			g.say(text)
			if i < 16 {
				want = append(want, text)
			}
		}
		g.expectStats(map[string]int{"queue": 4, "flows": 1, "dials": 1})

		g.sayFrom(4001, "another flow")
		other := h.accept()
		other.expect(t, "another flow")
		other.give("answer")
		if got := g.hearAt(4001); got != "answer" {
			t.Errorf("the other flow got %q", got)
		}

		close(gate)
		c := h.accept()
		c.expect(t, want...)
		g.say("behind")
		c.expect(t, "behind")
		g.expectStats(map[string]int{"queue": 4, "flows": 2, "dials": 0})
	})
}

func TestUDPDialPendsBytes(t *testing.T) {
	udpInBubble(t, Config{MTU: 65535}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		gate := make(chan bool)
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			<-gate
			return h.connect(ctx, f)
		})
		a, b := string(pattern(40000)), string(pattern(30000))
		g.say(a)
		g.say(b)
		g.say("small")
		close(gate)
		h.accept().expect(t, a, "small")
		g.expectStats(map[string]int{"queue": 1})
	})
}

// A host connection that takes nothing holds up its flow only, and holds no more
// than the bound.
func TestUDPStuckHost(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, "first")
		c.set(func() { c.stuck = true })
		var want []string
		for i := range 100 {
			g.say(fmt.Sprint(i))
			if i == 0 {
				synctest.Wait() // Write has it
			}
			if i <= hostQueueLen {
				want = append(want, fmt.Sprint(i))
			}
		}
		g.expectStats(map[string]int{"queue": 99 - hostQueueLen})
		g.sayFrom(4001, "x")
		h.accept().expect(t, "x")
		c.give("the other direction")
		g.expect("the other direction")

		c.set(func() { c.stuck = false })
		c.expect(t, want...)
		synctest.Wait()
		before := runtime.NumGoroutine()
		g.say("again")
		c.expect(t, "again")
		synctest.Wait()
		if n := runtime.NumGoroutine(); n > before {
			t.Errorf("%d goroutines, %d before", n, before)
		}
	})
}

// A Writer that blocks holds up its flow only.
func TestUDPStuckWriter(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, "first")
		g.sayFrom(4001, "first")
		other := h.accept()
		other.expect(t, "first")
		gate := make(chan bool)
		var inside, most atomic.Int32
		g.setHook(func(frame []byte) error {
			if bytes.HasSuffix(frame, []byte("other")) {
				return g.keep(frame)
			}
			most.Store(max(most.Load(), inside.Add(1)))
			<-gate
			inside.Add(-1)
			return g.keep(frame)
		})
		c.give("stuck")
		synctest.Wait()
		c.set(func() { c.errs = []error{syscall.ECONNREFUSED, syscall.ECONNREFUSED} })
		g.say("refused") // its ICMP error waits for its turn
		synctest.Wait()
		other.give("other")
		if got := g.hearAt(4001); got != "other" {
			t.Errorf("the other flow got %q", got)
		}
		close(gate)
		g.expect("stuck")
		g.expectUnreachable(unreachablePort, udpPacket(g.from, g.to, []byte("refused")))
		if most.Load() != 1 {
			t.Errorf("%d frames of one flow were with the Writer at the same time", most.Load())
		}
	})
}

// An answer waits for its turn while an ICMP error is with the Writer.
func TestUDPStuckError(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, "first")
		gate := make(chan bool)
		var inside atomic.Int32
		g.setHook(func(frame []byte) error {
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d frames of one flow were with the Writer at the same time", n)
			}
			<-gate
			inside.Add(-1)
			return g.keep(frame)
		})
		c.set(func() { c.errs = []error{syscall.ECONNREFUSED} })
		g.say("refused")
		synctest.Wait()
		c.give("answer")
		synctest.Wait()
		close(gate)
		g.expectUnreachable(unreachablePort, udpPacket(g.from, g.to, []byte("refused")))
		g.expect("answer")
		g.expectNothing()
	})
}

func TestUDPExpiry(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		c.expect(t, "x")
		time.Sleep(30 * time.Second)
		g.say("refreshed by the guest")
		time.Sleep(50 * time.Second)
		c.give("refreshed by the host")
		synctest.Wait()
		last := time.Now()
		time.Sleep(60*time.Second - 1)
		if at := c.closedAt(); !at.IsZero() {
			t.Fatalf("closed %v after the last datagram", at.Sub(last))
		}
		g.expectStats(map[string]int{"flows": 1})
		time.Sleep(10 * time.Second)
		if at := c.closedAt(); at.Sub(last) != 60*time.Second {
			t.Fatalf("closed %v after the last datagram", at.Sub(last))
		}
		g.expectStats(map[string]int{"flows": 0})
		g.expect("refreshed by the host")
		g.expectNothing()

		g.say("anew")
		h.accept().expect(t, "anew")
		g.expectStats(map[string]int{"flows": 1, "dialed": 2})
	})
}

func TestUDPNoExpiry(t *testing.T) {
	udpInBubble(t, Config{UDPIdleTimeout: -1}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		time.Sleep(1000 * time.Hour)
		c.give("late")
		g.expect("late")
	})
}

// A flow that is being dialed does not expire, but ends with DialTimeout.
func TestUDPDialTimeout(t *testing.T) {
	udpInBubble(t, Config{UDPIdleTimeout: time.Second}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		h.setDial(hang)
		g.say("x")
		time.Sleep(30*time.Second - 1)
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 1, "dials": 1})
		time.Sleep(1)
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 0, "dials": 0, "refused": 1, "icmp": 0})
		g.expectNothing()
	})
}

func TestUDPMaxFlows(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 2}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("1")
		c := h.accept()
		g.sayFrom(4001, "2")
		h.accept()
		g.sayFrom(4002, "3")
		g.expectUnreachable(unreachableProhibited, udpPacket(netip.AddrPortFrom(fam.guest, 4002), g.to, []byte("3")))
		g.expectStats(map[string]int{"flows": 2, "full": 1})
		g.say("still alive")
		c.give(io.EOF)
		synctest.Wait()
		g.sayFrom(4002, "3")
		h.accept().expect(t, "3")
		g.expectNothing()
	})
}

func TestUDPMaxPendingDials(t *testing.T) {
	udpInBubble(t, Config{MaxPendingDials: 2}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		gate := make(chan bool)
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			<-gate
			return h.connect(ctx, f)
		})
		for port := range uint16(4) {
			g.sayFrom(4000+port, "x")
		}
		g.expectNothing()
		g.expectStats(map[string]int{"flows": 2, "dials": 2, "pending": 2})
		close(gate)
		h.accept()
		h.accept()
		synctest.Wait()
		g.sayFrom(4002, "x")
		h.accept()
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 3, "dials": 0, "pending": 2})
	})
}

// What the guest sees when a flow cannot be opened.
func TestUDPRefusal(t *testing.T) {
	const nothing = unreachable(255)
	tests := []struct {
		err    error
		want   unreachable
		policy int
	}{
		{dialError(syscall.ECONNREFUSED), unreachablePort, 0},
		{dialError(syscall.ENETUNREACH), unreachableNet, 0},
		{dialError(syscall.EHOSTUNREACH), unreachableHost, 0},
		{&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}, unreachableHost, 0},
		{dialError(syscall.EACCES), unreachableProhibited, 0},
		{dialError(syscall.EPERM), unreachableProhibited, 0},
		{ErrProhibited, unreachableProhibited, 0},
		{fmt.Errorf("policy: %w", ErrProhibited), unreachableProhibited, 0},
		{context.DeadlineExceeded, nothing, 0},
		{dialError(syscall.ETIMEDOUT), nothing, 0},
		{errors.New("anything else"), nothing, 0},
		{ErrDrop, nothing, 1},
		{fmt.Errorf("policy: %w", ErrDrop), nothing, 1},
	}
	for _, tt := range tests {
		for _, by := range []string{"Allow", "Dial"} {
			t.Run(by+"/"+tt.err.Error(), func(t *testing.T) {
				var cfg Config
				if by == "Allow" {
					cfg.Allow = func(ctx context.Context, f Flow) error { return tt.err }
				}
				udpInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
					h.setDial(refuse(tt.err))
					for range 2 {
						g.say("let me out")
						synctest.Wait()
						if tt.want != nothing {
							g.expectUnreachable(tt.want, udpPacket(g.from, g.to, []byte("let me out")))
						}
						g.expectNothing()
					}
					g.expectStats(map[string]int{"flows": 0, "dials": 0, "policy": 2 * tt.policy, "refused": 2 - 2*tt.policy})
					if n := len(h.dials()); by == "Allow" && n != 0 {
						t.Errorf("%d dials of a flow that is not allowed", n)
					}
				})
			})
		}
	}
}

func TestUDPAllowSees(t *testing.T) {
	asked := make(chan Flow, 10)
	cfg := Config{Allow: func(ctx context.Context, f Flow) error {
		if g, ok := FlowFromContext(ctx); !ok || g != f {
			t.Errorf("Allow: %v in the context of %v", g, f)
		}
		asked <- f
		return nil
	}}
	eachFamily(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, cfg)
		g.ns = 7
		g.say("1")
		g.say("2")
		h.accept().expect(t, "1", "2")
		if f := <-asked; f != (Flow{7, "udp", g.from, g.to}) || len(asked) != 0 {
			t.Errorf("Allow was asked about %v, and %d more", f, len(asked))
		}
	})
}

// Errors of a socket that is open are the guest's to see, and end nothing.
func TestUDPHostErrors(t *testing.T) {
	for err, want := range map[error]unreachable{
		dialError(syscall.ECONNREFUSED): unreachablePort,
		dialError(syscall.EHOSTUNREACH): unreachableHost,
		dialError(syscall.ENETUNREACH):  unreachableNet,
		dialError(syscall.EPERM):        unreachableProhibited,
	} {
		t.Run(err.Error(), func(t *testing.T) {
			udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
				g.say("first")
				long := string(pattern(1000))
				g.say(long)
				c := h.accept()
				c.expect(t, "first", long)
				c.give(err)
				g.expectUnreachable(want, udpPacket(g.from, g.to, []byte(long)))

				// One that tells of an earlier datagram costs no other.
				c.set(func() { c.errs = []error{err} })
				g.say("second")
				c.expect(t, "second")
				g.expectUnreachable(want, udpPacket(g.from, g.to, []byte("second")))

				// One that is about this datagram is told once.
				c.set(func() { c.errs = []error{err, err} })
				g.say("third")
				g.expectUnreachable(want, udpPacket(g.from, g.to, []byte("third")))
				g.expectNothing()

				c.give("answer")
				g.expect("answer")
				g.expectStats(map[string]int{"flows": 1, "dialed": 1, "icmp": 3})
			})
		})
	}
}

func TestUDPHostDrops(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, "first")
		c.set(func() { c.errs = []error{syscall.EMSGSIZE, syscall.EAGAIN, syscall.ENOBUFS} })
		g.say("too long")
		g.say("no room")
		g.say("no room")
		g.say("last")
		c.expect(t, "last")
		c.give(syscall.EMSGSIZE, "answer")
		g.expect("answer")
		g.expectNothing()
		g.expectStats(map[string]int{"flows": 1, "big": 2, "queue": 2})
	})
}

func TestUDPHostEnds(t *testing.T) {
	for _, err := range []error{io.EOF, net.ErrClosed, syscall.EPIPE, os.ErrDeadlineExceeded} {
		for _, by := range []string{"Read", "Write"} {
			t.Run(by+"/"+err.Error(), func(t *testing.T) {
				udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
					g.say("first")
					c := h.accept()
					c.expect(t, "first")
					if by == "Read" {
						c.give("last", err)
						g.expect("last")
					} else {
						c.set(func() { c.errs = []error{err} })
						g.say("lost")
					}
					if c.closedAt().IsZero() {
						t.Error("the socket is not closed")
					}
					g.expectNothing()
					g.expectStats(map[string]int{"flows": 0})
					g.say("anew")
					h.accept().expect(t, "anew")
				})
			})
		}
	}
}

// A socket that does nothing but fail does not keep the Stack busy.
func TestUDPHostFailsForEver(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, "first")
		for range 1000 {
			c.give(syscall.ECONNREFUSED)
		}
		if c.closedAt().IsZero() || c.reads > maxFailures+1 {
			t.Errorf("still open, or after %d reads", c.reads)
		}
		g.expectStats(map[string]int{"flows": 0, "icmp": maxFailures})
	})
}

// Frames go to where the guest's latest packet came from.
func TestUDPLinkMoves(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("from here")
		c := h.accept()
		c.expect(t, "from here")
		c.give("to here")
		g.expect("to here")

		moved := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
		moved.mac, moved.gw = [6]byte{2, 2}, [6]byte{2, 3}
		moved.setHook(func(frame []byte) error {
			if [6]byte(frame) == moved.mac && [6]byte(frame[6:]) == moved.gw {
				frame = bytes.Clone(frame)
				copy(frame, testLink.guest[:])
				copy(frame[6:], testLink.gw[:])
			}
			return moved.keep(frame)
		})
		moved.say("from there")
		c.expect(t, "from there")
		c.give("to there", dialError(syscall.ECONNREFUSED))
		moved.expect("to there")
		moved.expectUnreachable(unreachablePort, udpPacket(g.from, g.to, []byte("from there")))
		g.expectNothing()
		g.expectStats(map[string]int{"dialed": 1})
	})
}

// Guests of two namespaces have the same addresses, and nothing else in common.
func TestUDPNamespaces(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 1}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		other := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
		other.ns = 1
		g.say("from one")
		c := h.accept()
		c.expect(t, "from one")
		other.say("from the other")
		d := h.accept()
		d.expect(t, "from the other")
		c.give("to one")
		d.give("to the other")
		g.expect("to one")
		other.expect("to the other")
		g.expectNothing()
		other.expectNothing()
		g.expectStats(map[string]int{"flows": 2, "full": 0})
	})
}

// What is not a datagram between two hosts opens nothing.
func TestUDPDropped(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		at := func(addr string, port uint16) netip.AddrPort {
			return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
		}
		bad := map[int][]string{
			4: {"0.0.0.0", "255.255.255.255", "224.0.0.251", "239.1.2.3"},
			6: {"::", "ff02::fb", "ff0e::1"},
		}[fam.version]
		data := []byte("data")
		for _, a := range bad {
			g.mustSend(udpPacket(g.from, at(a, 53), data))
			g.mustSend(udpPacket(at(a, 4000), g.to, data))
		}
		g.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 0), g.to, data))
		g.mustSend(udpPacket(g.from, netip.AddrPortFrom(fam.server, 0), data))

		head := len(udpPacket(g.from, g.to, nil)) - 8
		lengths := []uint16{0, 1, 7, 13, 1000, 65535}
		for _, n := range lengths {
			b := make([]byte, 12)
			copy(b, udpPacket(g.from, g.to, nil)[head:])
			binary.BigEndian.PutUint16(b[4:], n)
			g.mustSend(refPacket(fam.guest, fam.server, 17, b, 6))
		}
		for n := range 8 {
			g.mustSend(refPacket(fam.guest, fam.server, 17, udpPacket(g.from, g.to, nil)[head:][:n], -1))
		}
		for _, flip := range []int{0, 3, 6, 7, 8, 11} {
			b := udpPacket(g.from, g.to, data)
			b[head+flip] ^= 0x40
			g.mustSend(b)
		}
		g.expectNothing()
		g.expectStats(map[string]int{"address": 2 * len(bad), "port": 2, "truncated": len(lengths) + 8, "checksum": 6, "flows": 0})
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
		if len(g.s.guests) != 0 {
			t.Errorf("%d guests are remembered for packets that were dropped", len(g.s.guests))
		}
	})
}

// The length field says where a datagram ends, and the checksum covers that much.
// A checksum may be missing, or unfinished.
func TestUDPAccepted(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		whole := udpPacket(g.from, g.to, []byte("data"))
		head := len(whole) - 12
		send := func(b []byte) { g.mustSend(refPacket(fam.guest, fam.server, 17, b, -1)) }
		send(append(whole[head:], " and junk"...)) // the checksum is right without it
		b := bytes.Clone(whole[head:])
		b[6], b[7] = 0, 0
		send(b)
		send(append(b, "junk"...))
		binary.BigEndian.PutUint16(b[6:], refSum(refPseudo(fam.guest, fam.server, 17, len(b))))
		send(b)
		g.mustSend(append(bytes.Clone(whole), make([]byte, 30)...)) // Ethernet padding
		h.accept().expect(t, "data", "data", "data", "data", "data")
		g.expectStats(map[string]int{"flows": 1})
	})
}

// An error of the Writer is counted, and ends a datagram but not the flow.
func TestUDPWriterFails(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		c.expect(t, "x")
		broken := errors.New("broken")
		g.setHook(func([]byte) error { return broken })
		c.give("lost", string(pattern(9000)))
		synctest.Wait()
		g.setHook(g.keep)
		c.give("found")
		g.expect("found")
		g.expectStats(map[string]int{"writer": 2, "flows": 1})
	})
	udpInBubble(t, Config{MaxUDPFlows: 1}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		broken := errors.New("broken")
		g.setHook(func([]byte) error { return broken })
		err := g.send(udpPacket(netip.AddrPortFrom(fam.guest, 4001), g.to, nil))
		if err != broken {
			t.Errorf("HandlePacket: %v, want the Writer's error", err)
		}
	})
}

// Close ends flows of every kind; the bubble would not end with a goroutine left.
func TestUDPClose(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("idle")
		idle := h.accept()
		g.sayFrom(4001, "stuck")
		stuck := h.accept()
		stuck.expect(t, "stuck")
		stuck.set(func() { stuck.stuck = true })
		g.sayFrom(4001, "stuck")
		g.sayFrom(4001, "stuck")
		h.setDial(hang)
		g.sayFrom(4002, "hanging")
		synctest.Wait()
		before := time.Now()
		if err := g.s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if d := time.Since(before); d != 0 {
			t.Errorf("Close took %v", d)
		}
		if idle.closedAt().IsZero() || stuck.closedAt().IsZero() {
			t.Error("a socket is still open")
		}
		g.expectNothing()
		g.expectStats(map[string]int{"flows": 0, "dials": 0})
		if err := g.send(udpPacket(g.from, g.to, nil)); !errors.Is(err, ErrStackClosed) {
			t.Errorf("HandlePacket after Close: %v", err)
		}
	})
}

// A dial that ends after Close leaves no socket behind.
func TestUDPCloseWhileDialing(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		c := newMemConn()
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			<-ctx.Done()
			time.Sleep(time.Second)
			return c, nil
		})
		g.say("x")
		synctest.Wait()
		g.s.Close()
		if c.closedAt().IsZero() {
			t.Error("the socket is still open")
		}
	})
}

// Many flows, many goroutines, sockets that come and go, and Close in the middle.
func TestUDPConcurrent(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		var conns sync.WaitGroup
		s, err := NewWithConfig(Config{
			UDPIdleTimeout: time.Millisecond,
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				c := newMemConn()
				conns.Go(func() {
					c.give("a", syscall.ECONNREFUSED, string(pattern(3000)), "b")
					if ctx.Err() == nil && len(address)%2 == 0 {
						c.give(io.EOF)
					}
				})
				return c, nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		g := newUDPGuest(newMachine(t, s), fam.guest, fam.at(53))
		g.setHook(nil)
		var senders sync.WaitGroup
		for i := range 8 {
			senders.Go(func() {
				for j := range 300 {
					from := netip.AddrPortFrom(fam.guest, uint16(4000+(i+j)%5))
					if err := g.send(udpPacket(from, fam.at(uint16(1+j%3)), pattern(j))); err != nil && !errors.Is(err, ErrStackClosed) {
						t.Errorf("HandlePacket: %v", err)
					}
					if i == 0 && j == 250 {
						s.Close()
					}
				}
			})
		}
		senders.Wait()
		conns.Wait()
	})
}

// Real sockets.

// udpServer is a UDP socket of the host on its loopback address.
func udpServer(t testing.TB, fam family, port int) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: fam.loopback.AsSlice(), Port: port})
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	a := c.LocalAddr().(*net.UDPAddr).AddrPort()
	return c, netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func TestUDPSocket(t *testing.T) {
	for _, reuse := range []bool{false, true} {
		for _, mtu := range []int{1500, 65535} {
			t.Run(fmt.Sprintf("reuse=%v/mtu=%d", reuse, mtu), func(t *testing.T) {
				eachFamily(t, func(t *testing.T, fam family) {
					server, to := udpServer(t, fam, 0)
					s, err := NewWithConfig(Config{MTU: mtu, ReuseFrames: reuse})
					if err != nil {
						t.Fatal(err)
					}
					g := newUDPGuest(newMachine(t, s), fam.guest, to)
					buf := make([]byte, 1<<16)
					for _, n := range []int{0, 1, 1400, 0, 5, 65507, 0} {
						said := string(pattern(min(n, mtu-48)))
						g.say(said)
						k, peer, err := server.ReadFromUDPAddrPort(buf)
						if err != nil || string(buf[:k]) != said {
							t.Fatalf("%d bytes: the host got %d, %v", len(said), k, err)
						}
						answer := string(pattern(n))
						for _, text := range []string{answer, "between"} {
							if _, err := server.WriteToUDPAddrPort([]byte(text), peer); err != nil {
								t.Fatal(err)
							}
							g.expect(text)
						}
					}
					g.expectStats(map[string]int{"flows": 1, "dialed": 1})
				})
			})
		}
	}
}

func TestUDPSocketRefusedThenServed(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		server.Close()
		g := newUDPGuest(newMachine(t, New()), fam.guest, to)
		for _, text := range []string{"anyone?", string(pattern(500)), ""} {
			g.say(text)
			g.expectUnreachable(unreachablePort, udpPacket(g.from, to, []byte(text)))
		}
		server, _ = udpServer(t, fam, int(to.Port()))
		g.say("hello")
		buf := make([]byte, 100)
		n, peer, err := server.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "hello" {
			t.Fatalf("the host got %q, %v", buf[:n], err)
		}
		server.WriteToUDPAddrPort([]byte("world"), peer)
		g.expect("world")
		g.expectStats(map[string]int{"flows": 1, "dialed": 1, "icmp": 3})
	})
}

// A socket on a free port may find itself at the other end: it is nobody's.
func TestUDPSocketToItself(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		server.Close()
		s, err := NewWithConfig(Config{Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			a := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))
			return net.DialUDP(network, a, a)
		}})
		if err != nil {
			t.Fatal(err)
		}
		g := newUDPGuest(newMachine(t, s), fam.guest, to)
		g.say("anyone?")
		g.expectUnreachable(unreachablePort, udpPacket(g.from, to, []byte("anyone?")))
		g.expectStats(map[string]int{"flows": 0, "refused": 1})
	})
}

// In the steady state a datagram costs no memory, either way.
func TestUDPAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector allocates")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		s, err := NewWithConfig(Config{ReuseFrames: true})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		arrived := make(chan int, 1)
		w := func(frame []byte) error { arrived <- len(frame); return nil }
		packet := udpPacket(netip.AddrPortFrom(fam.guest, 4000), to, pattern(1000))
		buf := make([]byte, 2000)
		n := leastAllocs(200, 0, func() {
			if err := s.HandlePacket(0, testLink.guest, testLink.gw, packet, w); err != nil {
				t.Fatal(err)
			}
			n, peer, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := server.WriteToUDPAddrPort(buf[:n], peer); err != nil {
				t.Fatal(err)
			}
			<-arrived
		})
		if n != 0 {
			t.Errorf("%v allocations for a datagram and its answer", n)
		}
	})
}

// raceEnabled reports whether the race detector is at work: sync.Pool then drops
// what it is given at random.
func raceEnabled() bool {
	var p sync.Pool
	for range 100 {
		p.Put(new(int))
		if p.Get() == nil {
			return true
		}
	}
	return false
}

// An idle flow holds no buffer.
func TestUDPIdleMemory(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector makes frames share less memory")
	}
	fam := families[0]
	server, to := udpServer(t, fam, 0)
	m := newMachine(t, New())
	g := newUDPGuest(m, fam.guest, to)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const flows = 200
	buf := make([]byte, 10)
	for i := range uint16(flows) {
		g.sayFrom(4000+i, "x")
		_, peer, err := server.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		server.WriteToUDPAddrPort([]byte("y"), peer)
		g.hearAt(4000 + i)
	}
	runtime.GC()
	runtime.GC() // empties the pools
	runtime.ReadMemStats(&after)
	per := (int64(after.HeapAlloc) - int64(before.HeapAlloc)) / flows
	t.Logf("%d bytes for each flow", per)
	if per > 16<<10 {
		t.Errorf("%d bytes for each flow", per)
	}
}

// DialContext.

// dialGuest opens a connection to the port of the guest.
func dialGuest(g *udpGuest, fam family) (conn net.Conn) {
	g.t.Helper()
	all := netip.PrefixFrom(fam.guest, 8).Masked()
	if err := g.s.AddRoute(0, all, g.mac, g.gw, g.write); err != nil {
		g.t.Fatal(err)
	}
	conn, err := g.s.DialContext(g.t.Context(), "udp", g.from.String())
	if err != nil {
		g.t.Fatal(err)
	}
	g.to = conn.LocalAddr().(*net.UDPAddr).AddrPort()
	g.to = netip.AddrPortFrom(g.to.Addr().Unmap(), g.to.Port())
	if want := fam.stack; g.to.Addr() != want || g.to.Port() < firstDynamicPort || conn.RemoteAddr().String() != g.from.String() {
		g.t.Errorf("from %v to %v", g.to, conn.RemoteAddr())
	}
	return conn
}

func dialInBubble(t *testing.T, cfg Config, test func(t *testing.T, fam family, g *udpGuest, conn net.Conn)) {
	udpInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		test(t, fam, g, dialGuest(g, fam))
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials of the host", n)
		}
	})
}

func mustWrite(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if n, err := c.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("Write of %d bytes = %d, %v", len(text), n, err)
	}
}

func mustRead(t *testing.T, c net.Conn, text string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != text {
		t.Fatalf("Read = %.40q (%d bytes), %v, want %.40q", buf[:n], n, err, text)
	}
}

// wantOpError checks an error of a connection.
func wantOpError(t *testing.T, op string, err, want error) {
	t.Helper()
	var e *net.OpError
	if !errors.As(err, &e) || e.Op != op || e.Net != "udp" || !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", op, err, want)
	}
}

func TestDialUDP(t *testing.T) {
	dialInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
		g.expectNothing() // nothing is sent before the first Write
		longest := map[int]int{4: 65507, 6: 65527}[fam.version]
		for _, n := range []int{5, 0, 1472, 1473, longest, 0} {
			text := string(pattern(n))
			mustWrite(t, conn, text)
			g.expect(text)
		}
		for _, n := range []int{longest + 1, 65528, 1 << 20} {
			_, err := conn.Write(make([]byte, n))
			wantOpError(t, "write", err, syscall.EMSGSIZE)
		}
		for _, text := range []string{"hello", "", "world"} {
			g.say(text)
		}
		for _, text := range []string{"hello", "", "world"} {
			mustRead(t, conn, text)
		}
		g.say("longer than that")
		g.say("next")
		short := make([]byte, 6)
		if n, err := conn.Read(short); n != 6 || err != nil || string(short) != "longer" {
			t.Errorf("Read = %q, %d, %v", short, n, err)
		}
		if n, err := conn.Read(nil); n != 0 || err != nil {
			t.Errorf("Read of nothing = %d, %v", n, err)
		}
		mustRead(t, conn, "next")
		g.expectStats(map[string]int{"flows": 1, "dialed": 0})
	})
}

func TestDialUDPQueue(t *testing.T) {
	dialInBubble(t, Config{MTU: 65535}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
		for i := range 300 {
			g.say(fmt.Sprint(i))
		}
		g.expectStats(map[string]int{"queue": 44})
		for i := range 256 {
			mustRead(t, conn, fmt.Sprint(i))
		}
		for range 5 {
			g.say(string(pattern(60000)))
		}
		g.expectStats(map[string]int{"queue": 45})
		for range 4 {
			mustRead(t, conn, string(pattern(60000)))
		}
	})
}

func TestDialUDPDeadlines(t *testing.T) {
	dialInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
		start := time.Now()
		conn.SetReadDeadline(start.Add(time.Hour))
		_, err := conn.Read(make([]byte, 1))
		wantOpError(t, "read", err, os.ErrDeadlineExceeded)
		if d := time.Since(start); d != time.Hour {
			t.Errorf("after %v", d)
		}
		g.say("x")
		_, err = conn.Read(make([]byte, 1))
		wantOpError(t, "read", err, os.ErrDeadlineExceeded)
		conn.SetDeadline(time.Time{})
		mustRead(t, conn, "x") // hours later: it does not expire
		conn.SetWriteDeadline(time.Now())
		_, err = conn.Write(nil)
		wantOpError(t, "write", err, os.ErrDeadlineExceeded)
		conn.SetWriteDeadline(time.Time{})

		// A Write that waits for another gives up in time.
		gate := make(chan bool)
		g.setHook(func(frame []byte) error { <-gate; return g.keep(frame) })
		go conn.Write([]byte("slow"))
		synctest.Wait()
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = conn.Write([]byte("late"))
		wantOpError(t, "write", err, os.ErrDeadlineExceeded)
		close(gate)
		g.expect("slow")
		g.expectNothing()
	})
}

func TestDialUDPClose(t *testing.T) {
	for _, by := range []string{"conn", "stack"} {
		t.Run(by, func(t *testing.T) {
			dialInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
				failed := make(chan error)
				go func() {
					_, err := conn.Read(make([]byte, 1))
					failed <- err
				}()
				synctest.Wait()
				if by == "conn" {
					if err := conn.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				} else {
					g.s.Close()
				}
				wantOpError(t, "read", <-failed, net.ErrClosed)
				_, err := conn.Read(make([]byte, 1))
				wantOpError(t, "read", err, net.ErrClosed)
				_, err = conn.Write(nil)
				wantOpError(t, "write", err, net.ErrClosed)
				if by == "stack" {
					if err := conn.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				}
				wantOpError(t, "close", conn.Close(), net.ErrClosed)
				wantOpError(t, "set", conn.SetDeadline(time.Time{}), net.ErrClosed)
				g.expectNothing()
				g.expectStats(map[string]int{"flows": 0})
			})
		})
	}
}

func TestDialUDPWriterFails(t *testing.T) {
	dialInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
		broken := errors.New("broken")
		g.setHook(func([]byte) error { return broken })
		_, err := conn.Write([]byte("x"))
		wantOpError(t, "write", err, broken)
		g.setHook(g.keep)
		mustWrite(t, conn, "y")
		g.expect("y")
	})
}

// Datagrams go to where the guest is, even if it speaks to others only.
func TestDialUDPLinkMoves(t *testing.T) {
	dialInBubble(t, Config{Allow: func(context.Context, Flow) error { return ErrDrop }},
		func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
			mustWrite(t, conn, "by the route")
			g.expect("by the route")
			moved := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
			moved.mustSend(udpPacket(g.from, fam.at(53), nil))
			mustWrite(t, conn, "to the new place")
			moved.expect("to the new place")
			g.say("back again")
			mustRead(t, conn, "back again")
			mustWrite(t, conn, "to the old place")
			g.expect("to the old place")
			g.expectNothing()
			moved.expectNothing()
		})
}

// An ICMP error of the guest about a datagram is an error of the connection, once.
func TestDialUDPUnreachable(t *testing.T) {
	dialInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, conn net.Conn) {
		codes := map[int]map[[2]byte]error{
			4: {{3, 3}: syscall.ECONNREFUSED, {3, 1}: syscall.EHOSTUNREACH, {3, 0}: syscall.ENETUNREACH, {3, 13}: syscall.EACCES},
			6: {{1, 4}: syscall.ECONNREFUSED, {1, 3}: syscall.EHOSTUNREACH, {1, 0}: syscall.ENETUNREACH, {1, 1}: syscall.EACCES},
		}[fam.version]
		proto, off := byte(1), 2
		if fam.version == 6 {
			proto = 58
		}
		icmp := func(code [2]byte, about []byte) []byte {
			return refPacket(fam.guest, fam.stack, proto, append([]byte{code[0], code[1], 0, 0, 0, 0, 0, 0}, about...), off)
		}
		sent := udpPacket(g.to, g.from, []byte("anyone?"))
		for code, want := range codes {
			g.mustSend(icmp(code, sent))
			_, err := conn.Read(make([]byte, 1))
			wantOpError(t, "read", err, want)
			g.mustSend(icmp(code, sent[:len(sent)-7])) // no more than the header
			_, err = conn.Write(nil)
			wantOpError(t, "write", err, want)
			mustWrite(t, conn, "told once")
			g.expect("told once")
		}

		refused := [2]byte{3, 3}
		if fam.version == 6 {
			refused = [2]byte{1, 4}
		}
		wrongSum := icmp(refused, sent)
		wrongSum[len(wrongSum)-1] ^= 1
		g.mustSend(wrongSum)
		g.mustSend(icmp(refused, sent[:len(sent)-8]))
		g.mustSend(icmp(refused, nil))
		g.mustSend(icmp(refused, udpPacket(g.from, g.to, nil)))
		g.mustSend(icmp(refused, refPacket(g.to.Addr(), g.from.Addr(), 6, sent[len(sent)-15:], -1)))
		g.mustSend(icmp([2]byte{refused[0], 7}, sent))
		other := newMachine(t, g.s)
		other.ns = 1
		other.mustSend(icmp(refused, sent))
		mustWrite(t, conn, "none of these counts")
		g.expect("none of these counts")
		g.expectNothing()
	})
}

func TestDialUDPLimits(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, _ := newUDPRig(t, fam, Config{MaxUDPFlows: 2})
		a := dialGuest(g, fam)
		b := dialGuest(g, fam)
		if a.LocalAddr().String() == b.LocalAddr().String() {
			t.Errorf("both from %v", a.LocalAddr())
		}
		_, err := g.s.DialContext(t.Context(), "udp", g.from.String())
		wantOpError(t, "dial", err, ErrTooManyFlows)
		a.Close()
		dialGuest(g, fam)
	})
}

func TestDialUDPErrors(t *testing.T) {
	g, _ := newUDPRig(t, families[0], Config{})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		ctx              context.Context
		network, address string
		want             string
	}{
		{t.Context(), "udp", "10.0.2.15:4000", "dial udp 10.0.2.15:4000: no route to guest"},
		{t.Context(), "udp6", "10.0.2.15:4000", "dial udp6: address 10.0.2.15:4000: no suitable address"},
		{t.Context(), "udp4", "[fd00::15]:4000", "dial udp4: address [fd00::15]:4000: no suitable address"},
		{t.Context(), "udp5", "10.0.2.15:4000", "dial udp5: unknown network udp5"},
		{t.Context(), "udp", ":4000", "dial udp: address :4000: no guest named"},
		{t.Context(), "udp", "10.0.2.15:0", "dial udp: address 10.0.2.15:0: no guest named"},
		{ended, "udp", "10.0.2.15:4000", "dial udp 10.0.2.15:4000: context canceled"},
	} {
		conn, err := g.s.DialContext(tt.ctx, tt.network, tt.address)
		if conn != nil || err == nil || err.Error() != tt.want {
			t.Errorf("DialContext(%q, %q) = %v, %v, want %q", tt.network, tt.address, conn, err, tt.want)
		}
	}
	g.s.Close()
	_, err := g.s.DialContext(t.Context(), "udp", "10.0.2.15:4000")
	wantOpError(t, "dial", err, ErrStackClosed)
}

// A host socket is written to at once, without a goroutine in between.
func BenchmarkUDPToHost(b *testing.B) {
	fam := families[0]
	server, to := udpServer(b, fam, 0)
	server.SetDeadline(time.Time{})
	s := New()
	defer s.Close()
	packet := udpPacket(netip.AddrPortFrom(fam.guest, 4000), to, pattern(1400))
	w := func([]byte) error { return nil }
	b.SetBytes(1400)
	b.ReportAllocs()
	for b.Loop() {
		if err := s.HandlePacket(0, testLink.guest, testLink.gw, packet, w); err != nil {
			b.Fatal(err)
		}
	}
}

// TestUDPBurst: the datagrams of one call of HandlePackets arrive as they were sent,
// of each flow in its order, whatever the host's system can do with several at once.
func TestUDPBurst(t *testing.T) {
	dials := map[string]func(ctx context.Context, network, address string) (net.Conn, error){
		"plain": nil,
		"alone": func(ctx context.Context, network, address string) (net.Conn, error) {
			d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error { return refuseSegments(c) }}
			return d.DialContext(ctx, network, address)
		},
	}
	for name, dial := range dials {
		for _, mapping := range []UDPMapping{UDPMappingPerFlow, UDPMappingEndpoint} {
			if dial != nil && mapping != UDPMappingPerFlow {
				continue // which does not dial
			}
			t.Run(fmt.Sprint(name, mapping), func(t *testing.T) {
				eachFamily(t, func(t *testing.T, fam family) { testUDPBurst(t, fam, Config{Dial: dial, UDPMapping: mapping}) })
			})
		}
	}
}

// burstRig is a guest with a flow to each of two servers, whose sockets are there and
// have nothing to do.
func burstRig(t *testing.T, fam family, cfg Config) (g *udpGuest, flows [2]*udpFlow, servers [2]*net.UDPConn, to [2]netip.AddrPort) {
	t.Helper()
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	for i := range servers {
		servers[i], to[i] = udpServer(t, fam, 0)
		servers[i].SetReadBuffer(1 << 20) // a burst arrives before anyone can read
	}
	g = newUDPGuest(newMachine(t, s), fam.guest, to[0])
	for i := range servers { // what comes before the sockets are there goes another way
		g.mustSend(udpPacket(g.from, to[i], []byte("first")))
		expectDatagram(t, servers[i], "first")
		key := flowKey{guest: ipAddrFrom(g.from.Addr()), host: ipAddrFrom(to[i].Addr()), proto: protoUDP, version: uint16(fam.version),
			guestPort: g.from.Port(), hostPort: to[i].Port()}
		f := s.lookupUDP(&key)
		flows[i] = f
		for ready := false; !ready; runtime.Gosched() {
			f.mu.Lock()
			ready = f.sender != nil && !f.pumping
			f.mu.Unlock()
		}
	}
	return g, flows, servers, to
}

func expectDatagram(t *testing.T, server *net.UDPConn, want string) {
	t.Helper()
	buf := make([]byte, 1<<16)
	if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != want {
		t.Fatalf("got %.40q, %v, want %.40q", buf[:n], err, want)
	}
}

func testUDPBurst(t *testing.T, fam family, cfg Config) {
	g, _, servers, to := burstRig(t, fam, cfg)
	for round, sizes := range [][]int{
		{1000, 1000, 1000, 1000, 400, 400, 400, 0, 0, 1, 1, 1400, 1400, 1400, 1399, 1400, 2, 3, 3},
		slices.Repeat([]int{100}, hostio.MaxSegments+2),
		slices.Repeat([]int{1452}, maxBurst/1452+2),
	} {
		var packets [][]byte
		var sent [2][]string
		for i, size := range sizes {
			server := 0
			if round == 0 {
				server = i / 6 % 2
			}
			text := string(pattern(size + i)[i:])
			packets = append(packets, udpPacket(g.from, to[server], []byte(text)))
			sent[server] = append(sent[server], text)
		}
		if err := g.batch(g.writeBatch, packets...); err != nil {
			t.Fatal(err)
		}
		for i := range sent {
			for _, text := range sent[i] {
				expectDatagram(t, servers[i], text)
			}
		}
	}
	// Nobody is there any more, and somebody again.
	servers[0].Close()
	anyone := []byte("anyone?")
	g.batch(g.writeBatch, udpPacket(g.from, to[0], anyone), udpPacket(g.from, to[0], anyone), udpPacket(g.from, to[1], []byte("you?")))
	expectDatagram(t, servers[1], "you?")
	if cfg.UDPMapping == UDPMappingPerFlow {
		g.expectUnreachable(unreachablePort, udpPacket(g.from, to[0], anyone))
	}
	servers[0], _ = udpServer(t, fam, int(to[0].Port()))
	g.batch(g.writeBatch, udpPacket(g.from, to[0], []byte("hello")), udpPacket(g.from, to[0], []byte("world")))
	expectDatagram(t, servers[0], "hello")
	expectDatagram(t, servers[0], "world")
}
