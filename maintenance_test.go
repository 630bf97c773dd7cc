package slirp

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Limits, counters, and the end of a Stack.

// TestMaxTCPFlows fills a namespace with flows.
func TestMaxTCPFlows(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{MaxTCPFlows: 10})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		for i := range uint16(10) {
			to := fam.at(80)
			if i%2 == 0 {
				to = fam.at(443)
			}
			m.open(2000+i, to).connect()
		}
		g := m.open(1025, fam.at(80))
		g.syn()
		msg := m.takeICMP()
		if want := map[int][2]byte{4: {3, 13}, 6: {1, 1}}[fam.version]; [2]byte{msg.typ, msg.code} != want {
			t.Errorf("ICMP %d %d, want %v", msg.typ, msg.code, want)
		}
		m.open(1026, fam.at(443)).syn()
		m.quiet(100 * time.Millisecond)
		if st := m.s.Stats(); st.TCPFlows != 10 || st.DropTooManyFlows != 2 || len(h.dials()) != 5 {
			t.Errorf("%d flows, %d dropped, %d dials", st.TCPFlows, st.DropTooManyFlows, len(h.dials()))
		}
		if _, err := m.s.DialContext(t.Context(), "tcp", netip.AddrPortFrom(fam.guest, 22).String()); !errors.Is(err, ErrTooManyFlows) {
			t.Errorf("DialContext: %v", err)
		}
		other := newMachine(t, m.s)
		other.ns = 1
		other.open(1025, fam.at(80)).connect() // another namespace is not concerned
		first := mustAccept(t, l)
		first.SetLinger(0)
		first.Close()
		m.open(1027, fam.at(80)).connect() // there is room again
	})
}

func TestMaxPendingDials(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{MaxPendingDials: 5})
		release := make(chan bool)
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			<-release
			return h.connect(), nil
		})
		for i := range uint16(8) {
			m.open(2000+i, fam.at(80)).syn()
		}
		m.quiet(time.Second) // a SYN that is one too many is dropped: the guest sends it again
		if st := m.s.Stats(); st.PendingDials != 5 || st.TCPFlows != 5 || st.DropPendingDials != 3 || len(h.dials()) != 5 {
			t.Errorf("%+v, %d dials", st, len(h.dials()))
		}
		other := newMachine(t, m.s)
		other.ns = 1
		other.open(1025, fam.at(80)).syn()
		synctest.Wait()
		if n := len(h.dials()); n != 6 {
			t.Errorf("%d dials, want one from another namespace", n)
		}
		// A dial that does not look at its context keeps its place.
		m.open(2000, fam.at(80)).must(m.open(2000, fam.at(80)).raw("R", 1, 0, nil, nil))
		m.open(1025, fam.at(80)).syn()
		synctest.Wait()
		if st := m.s.Stats(); st.PendingDials != 6 || st.DropPendingDials != 4 {
			t.Errorf("%+v", st)
		}
		close(release)
		g := m.open(1025, fam.at(80))
		synctest.Wait()
		g.connect()
		if st := m.s.Stats(); st.PendingDials != 0 {
			t.Errorf("%+v", st)
		}
	})
}

func TestNoLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fam := families[0]
		m, h := newRig(t, Config{MaxTCPFlows: -1, MaxPendingDials: -1, MaxHalfOpen: -1, Backlog: -1, DialTimeout: -1, TCPIdleTimeout: -1})
		m.setHook(func([]byte) error { return errors.New("nobody listens") })
		mustListen(t, m.s, "tcp", fam.at(443).String())
		h.setDial(hang)
		const n = 2000
		for i := range uint16(n) {
			m.open(2000+i, fam.at(80)).syn()
			m.open(2000+i, fam.at(443)).raw("S", 0, 0, nil, nil)
		}
		time.Sleep(time.Second)
		if st := m.s.Stats(); st.TCPFlows != 2*n || st.PendingDials != n {
			t.Errorf("%+v", st)
		}
		time.Sleep(time.Hour) // a dial may last for ever
		if st := m.s.Stats(); st.TCPFlows != n || st.PendingDials != n {
			t.Errorf("%+v", st)
		}
	})
}

func TestConfigErrors(t *testing.T) {
	for _, test := range []struct {
		field string
		cfg   Config
	}{
		{"VirtioNetUSO", Config{VirtioNetUSO: true}}, {"MTU", Config{MTU: 1279}}, {"MTU", Config{MTU: 65536}}, {"MTU", Config{MTU: -1}},
		{"SendBuffer", Config{SendBuffer: 4095}}, {"SendBuffer", Config{SendBuffer: -1}}, {"SendBuffer", Config{SendBuffer: maxBuffer + 1}},
		{"ReceiveBuffer", Config{ReceiveBuffer: 1}}, {"ReceiveBuffer", Config{ReceiveBuffer: -1}},
		{"Addresses", Config{Addresses: []netip.Addr{{}}}},
		{"Addresses", Config{Addresses: []netip.Addr{netip.MustParseAddr("0.0.0.0")}}},
		{"Addresses", Config{Addresses: []netip.Addr{netip.MustParseAddr("ff02::1")}}},
		{"Addresses", Config{Addresses: []netip.Addr{netip.MustParseAddr("fe80::1%eth0")}}},
	} {
		s, err := NewWithConfig(test.cfg)
		if err == nil || s != nil {
			t.Errorf("%+v: %v, %v", test.cfg, s, err)
		} else if want := "Config." + test.field; !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not name %s", err, want)
		}
	}
	for _, cfg := range []Config{{}, {MTU: 1280, SendBuffer: 4096, ReceiveBuffer: 4096}, {MTU: 65535, SendBuffer: maxBuffer, ReceiveBuffer: maxBuffer}} {
		s, err := NewWithConfig(cfg)
		if err != nil {
			t.Errorf("%+v: %v", cfg, err)
			continue
		}
		s.Close()
	}
}

func TestMTU(t *testing.T) {
	for _, mtu := range []int{1280, 9000, 65535} {
		t.Run(fmt.Sprint(mtu), func(t *testing.T) {
			eachEnd(t, Config{MTU: mtu}, func(t *testing.T, g *guest, far farEnd) {
				data := pattern(400_000)
				go func() {
					got := make([]byte, len(data))
					io.ReadFull(far, got)
					far.Write(got)
				}()
				g.upload(data)
				if string(g.take(len(data))) != string(data) {
					t.Error("data differs")
				}
			})
		})
	}
}

func TestCloseResetsFlows(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		nat, virtual, pending, half, waiting := m.open(1, fam.at(80)), m.open(2, fam.at(443)), m.open(3, fam.at(81)), m.open(4, fam.at(443)),
			m.open(5, fam.at(443))
		nat.connect()
		far := h.accept()
		virtual.connect()
		c := mustAccept(t, l)
		h.setDial(hang)
		pending.syn()
		half.syn()
		half.expect("S.")
		waiting.connect() // for Accept
		synctest.Wait()
		var wg sync.WaitGroup
		for range 3 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				if err := m.s.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			}()
		}
		wg.Wait()
		for i, g := range []*guest{nat, virtual, pending, waiting} {
			if seg := g.expect("R."); g.ackOf(seg) != 1 {
				t.Errorf("%d: %s", i, g.show(seg))
			}
		}
		expectErr(t, far, syscall.ECONNRESET)
		expectErr(t, c, net.ErrClosed)
		if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("Close of a connection: %v", err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Errorf("Close of a listener: %v", err)
		}
		if err := m.s.Close(); err != nil {
			t.Errorf("Close again: %v", err)
		}
		if st := m.s.Stats(); st.TCPFlows != 0 || st.UDPFlows != 0 || st.PendingDials != 0 || st.TimeWait != 0 {
			t.Errorf("after Close: %+v", st)
		}
		for _, g := range []*guest{nat, virtual, m.open(9, fam.at(443)), m.open(9, fam.at(80))} {
			if err := g.raw("S", 0, 0, nil, nil); !errors.Is(err, ErrStackClosed) || !errors.Is(err, net.ErrClosed) {
				t.Errorf("HandlePacket: %v", err)
			}
		}
		if err := m.send([]byte{0x45}); err != ErrPacketTooShort {
			t.Errorf("HandlePacket of rubbish: %v", err)
		}
		if _, err := m.s.Listen("tcp", ":80"); !errors.Is(err, ErrStackClosed) {
			t.Errorf("Listen: %v", err)
		}
		for _, network := range []string{"tcp", "udp"} {
			if _, err := m.s.DialContext(t.Context(), network, netip.AddrPortFrom(fam.guest, 22).String()); !errors.Is(err, net.ErrClosed) {
				t.Errorf("DialContext %s: %v", network, err)
			}
		}
		if err := m.s.AddRoute(0, netip.MustParsePrefix("::/0"), m.mac, m.gw, m.write); !errors.Is(err, ErrStackClosed) {
			t.Errorf("AddRoute: %v", err)
		}
		m.quiet(time.Hour)
	})
}

// TestCloseWhileWriting: what is on its way to a host that does not read ends
// with the Stack.
func TestCloseWhileWriting(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		g.upload(pattern(300_000))
		g.fin()
		g.expectACK()
		far.CloseWrite()
		g.expectFIN()    // the flow is over for the guest
		m.expectFlows(1) // but not for the host
		m.s.Close()
		far.expectState(t, "reset")
	})
}

// TestCloseWaitsForTimers: after Close nothing is emitted, whatever made it due.
func TestCloseWaitsForTimers(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		putText(t, far, "hello")
		synctest.Wait()
		var inside atomic.Int32
		release := make(chan bool)
		var closed atomic.Bool
		m.setHook(func([]byte) error {
			if closed.Load() {
				t.Error("a frame is emitted after Close has returned")
			}
			inside.Add(1)
			defer inside.Add(-1)
			<-release
			return nil
		})
		time.Sleep(time.Second) // the data is sent again, by a timer
		synctest.Wait()
		if inside.Load() != 1 {
			t.Fatal("nothing was sent again")
		}
		done := make(chan bool)
		go func() {
			defer close(done)
			m.s.Close()
			if inside.Load() != 0 {
				t.Error("Close returned while the Writer was being called")
			}
			closed.Store(true)
		}()
		time.Sleep(time.Second)
		close(release)
		<-done
		time.Sleep(time.Hour)
	})
}

// TestCloseWaitsForDial: a dial that does not look at its context holds up Close,
// and what it returns is closed.
func TestCloseWaitsForDial(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			time.Sleep(10 * time.Second)
			return h.connect(), nil
		})
		m.open(1025, fam.at(80)).syn()
		synctest.Wait()
		start := time.Now()
		m.s.Close()
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("Close took %v", d)
		}
		expectEOF(t, h.accept())
	})
}

// TestStuckWriterAtClose: whoever closes many flows at once resets all of them,
// though the Writer hangs at the first.
func TestStuckWriterAtClose(t *testing.T) {
	for _, what := range []string{"Listener", "Stack"} {
		t.Run(what, func(t *testing.T) {
			inBubble(t, func(t *testing.T, fam family) {
				m, h := newRig(t, Config{})
				l := mustListen(t, m.s, "tcp", fam.at(443).String())
				const n = 10
				var guests []*guest
				for i := range uint16(n) {
					to := fam.at(443)
					if what == "Stack" {
						to = fam.at(80)
					}
					g := m.open(2000+i, to)
					g.connect()
					guests = append(guests, g)
				}
				synctest.Wait()
				release := make(chan bool)
				var stuck atomic.Bool
				m.setHook(func([]byte) error {
					if stuck.CompareAndSwap(false, true) {
						<-release
					}
					return nil
				})
				closed := make(chan bool)
				go func() {
					defer close(closed)
					if what == "Stack" {
						m.s.Close()
					} else {
						l.Close()
					}
				}()
				time.Sleep(time.Second)
				reset := 0
				for _, g := range guests {
					if seg, ok := g.next(0); ok && seg.flags&flagR != 0 {
						reset++
					}
				}
				if reset != n-1 {
					t.Errorf("%d of %d other flows were reset", reset, n-1)
				}
				for range n {
					if what == "Stack" {
						far := h.accept()
						if got := far.peer.state(); got != "reset" {
							t.Errorf("a host connection is %s", got)
						}
					}
				}
				close(release)
				<-closed
			})
		})
	}
}

// TestHandlePacketDuringClose closes Stacks under the guest's hands.
func TestHandlePacketDuringClose(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		for range 30 {
			m, h := newRig(t, Config{})
			l := mustListen(t, m.s, "tcp", fam.at(443).String())
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go io.Copy(c, c)
				}
			}()
			h.setDial(func(context.Context, Flow) (net.Conn, error) {
				a, b := newHostConns(1000)
				go io.Copy(b, b)
				return a, nil
			})
			var wg sync.WaitGroup
			for i := range uint16(4) {
				wg.Add(1)
				go func() {
					defer wg.Done()
					for j := uint16(0); ; j++ {
						to := fam.at(80)
						if j%2 == 0 {
							to = fam.at(443)
						}
						g := m.open(2000+1000*i+j, to)
						if g.raw("S", 0, 0, g.opts, nil) != nil {
							return
						}
						if seg, ok := g.next(time.Millisecond); ok {
							g.irs, g.nxt, g.rcv = seg.seq, 1, 1
							g.raw("P.", 1, 1, nil, []byte("hello"))
						}
						g.send(refPacket(fam.guest, fam.server, map[int]byte{4: 1, 6: 58}[fam.version],
							[]byte{map[int]byte{4: 8, 6: 128}[fam.version], 0, 0, 0, 0, 0, 0, 0}, 2))
					}
				}()
			}
			time.Sleep(2 * time.Millisecond)
			m.s.Close()
			wg.Wait()
			if st := m.s.Stats(); st.TCPFlows != 0 || st.PendingDials != 0 {
				t.Errorf("after Close: %+v", st)
			}
		}
	})
}

// TestCloseFromWriter closes the Stack while it hands over a frame.
func TestCloseFromWriter(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		g := m.open(1025, fam.at(443))
		g.connect()
		mustAccept(t, l)
		time.Sleep(time.Minute)
		var once sync.Once
		m.setHook(func([]byte) error {
			once.Do(func() { go m.s.Close() })
			time.Sleep(time.Second)
			return nil
		})
		g.must(g.raw("P.", g.nxt+10, g.rcv, nil, []byte("x")))
		time.Sleep(time.Minute)
	})
}

// TestVirtualHours has flows end in every way, and looks for what they leave.
func TestVirtualHours(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(443).String())
		for hour := range uint16(5) {
			for i := range uint16(50) {
				port := 2000 + 100*hour + i
				nat, virtual := m.open(port, fam.at(80)), m.open(port, fam.at(443))
				switch i % 5 {
				case 0: // proper
					nat.connect()
					far := h.accept()
					nat.fin()
					far.CloseWrite()
					nat.expectFIN()
				case 1: // vanishes
					nat.connect()
					h.accept()
				case 2: // half-open
					nat.syn()
					nat.expect("S.")
					h.accept()
				case 3: // to the listener, and forgotten
					virtual.connect()
					mustAccept(t, l)
				case 4: // closed by the program, never by the guest
					virtual.connect()
					mustAccept(t, l).Close()
				}
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			st := m.s.Stats()
			if st.TCPFlows != 0 || st.TimeWait != 0 || st.PendingDials != 0 || len(m.s.flows) != 0 || len(m.s.accounts) != 0 || len(m.s.draining) != 0 {
				t.Fatalf("hour %d: %+v, %d accounts, %d draining", hour, st, len(m.s.accounts), len(m.s.draining))
			}
			if left := otherGoroutines(); strings.Contains(left, "slirp.(*tcpConn)") {
				t.Fatalf("hour %d: goroutines:\n%s", hour, left)
			}
			m.mu.Lock()
			m.kept, m.flows = nil, make(map[flowID]*flowCheck)
			m.mu.Unlock()
		}
	})
}

// TestDropCounters reaches every counter that TCP, IP and ICMP have.
func TestDropCounters(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{Backlog: 1})
		mustListen(t, m.s, "tcp", fam.at(443).String())
		icmpProto, echo := byte(1), byte(8)
		if fam.version == 6 {
			icmpProto, echo = 58, 128
		}
		ping := []byte{echo, 0, 0, 0, 0, 1, 0, 2, 'x'}
		syn := segment{src: netip.AddrPortFrom(fam.guest, 1025), dst: fam.at(80), flags: flagS, win: 1000}
		m.flow(flowID{syn.src, syn.dst}).offered(&syn)
		flip := func(p []byte, at int) []byte {
			if at < 0 {
				at += len(p)
			}
			p[at] ^= 0x55
			return p
		}
		step := func(what string, counter func(Stats) uint64, packets ...[]byte) {
			t.Helper()
			before := counter(m.s.Stats())
			for _, p := range packets {
				m.send(p)
			}
			synctest.Wait()
			if n := counter(m.s.Stats()) - before; n != uint64(len(packets)) {
				t.Errorf("%s: +%d, want %d", what, n, len(packets))
			}
		}
		step("PacketsIn", func(s Stats) uint64 { return s.PacketsIn }, nil, []byte{1}, syn.packet())
		step("DropMalformed", func(s Stats) uint64 { return s.DropMalformed }, nil, make([]byte, 40), syn.packet()[:30])
		step("DropChecksum", func(s Stats) uint64 { return s.DropChecksum }, flip(syn.packet(), -3),
			flip(refPacket(fam.guest, fam.server, icmpProto, ping, 2), -1))
		step("DropProtocol", func(s Stats) uint64 { return s.DropProtocol }, refPacket(fam.guest, fam.server, 132, make([]byte, 20), -1))
		step("DropTruncated", func(s Stats) uint64 { return s.DropTruncated }, refPacket(fam.guest, fam.server, 6, make([]byte, 19), -1),
			refPacket(fam.guest, fam.server, icmpProto, make([]byte, 7), -1))
		step("DropICMPType", func(s Stats) uint64 { return s.DropICMPType }, refPacket(fam.guest, fam.server, icmpProto, []byte{200, 0, 0, 0, 0, 0, 0, 0}, 2))
		step("EchoReplies", func(s Stats) uint64 { return s.EchoReplies }, refPacket(fam.guest, fam.server, icmpProto, ping, 2))
		first := m.open(1, fam.at(443))
		first.syn() // takes the only place
		first.expect("S.")
		step("DropNoAcceptSlot", func(s Stats) uint64 { return s.DropNoAcceptSlot },
			segment{src: netip.AddrPortFrom(fam.guest, 2), dst: fam.at(443), flags: flagS, win: 1000}.packet())
		h.setDial(refuse(ErrDrop))
		syn.src = netip.AddrPortFrom(fam.guest, 1026)
		step("DropPolicy", func(s Stats) uint64 { return s.DropPolicy }, syn.packet())
		h.setDial(refuse(ErrProhibited))
		step("FlowsRefused", func(s Stats) uint64 { return s.FlowsRefused }, syn.packet())
		step("ICMPErrors", func(s Stats) uint64 { return s.ICMPErrors }, syn.packet())
		stray := segment{src: netip.AddrPortFrom(fam.guest, 9), dst: fam.at(9), flags: flagA, win: 1000}
		m.flow(flowID{stray.src, stray.dst}).offered(&stray)
		step("StrayResets", func(s Stats) uint64 { return s.StrayResets }, stray.packet())
		first.rst()
		limited := m.s.Stats()
		for range 100 { // in no time
			m.send(stray.packet())
			m.send(syn.packet())
			synctest.Wait()
		}
		if st := m.s.Stats(); st.StrayRateLimited == limited.StrayRateLimited || st.ICMPRateLimited == limited.ICMPRateLimited {
			t.Errorf("a hundred strays and refusals at once: %+v", st)
		}
		time.Sleep(500 * time.Millisecond)
		m.setHook(func([]byte) error { return errors.New("lost") })
		step("DropWriter", func(s Stats) uint64 { return s.DropWriter }, refPacket(fam.guest, fam.server, icmpProto, ping, 2), stray.packet(), syn.packet())
	})
}

// TestCloseIsNoEOF: what was not read is lost with the Stack, and does not look like
// the end of the data.
func TestCloseIsNoEOF(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		c := mustAccept(t, l)
		g.data("hello")
		g.fin()
		synctest.Wait()
		m.s.Close()
		b, err := io.ReadAll(c)
		if err == nil && string(b) != "hello" {
			t.Errorf("ReadAll %q, %v: a truncated stream ends like a whole one", b, err)
		}
	})
}

// gatedHost is a host connection whose Write and SetLinger wait for gates.
type gatedHost struct {
	net.Conn
	write, linger chan struct{}
	log           func(string)
	once          sync.Once
	closed        chan struct{}
}

func (c *gatedHost) Read(b []byte) (int, error) { <-c.closed; return 0, net.ErrClosed }
func (c *gatedHost) Write(b []byte) (int, error) {
	select {
	case <-c.write:
		c.log("write " + string(b))
		return len(b), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}
func (c *gatedHost) SetLinger(int) error { <-c.linger; c.log("linger0"); return nil }
func (c *gatedHost) CloseWrite() error   { c.log("FIN"); return nil }
func (c *gatedHost) Close() error        { c.once.Do(func() { c.log("close"); close(c.closed) }); return nil }

// TestCloseIsNoFINToHost is TestCloseIsNoEOF on the host's side of a NAT flow.
func TestCloseIsNoFINToHost(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		var mu sync.Mutex
		var events []string
		host := &gatedHost{write: make(chan struct{}), linger: make(chan struct{}), closed: make(chan struct{}),
			log: func(s string) { mu.Lock(); events = append(events, s); mu.Unlock() }}
		h.setDial(func(context.Context, Flow) (net.Conn, error) { return host, nil })
		g := m.open(1025, fam.at(80))
		g.connect()
		g.data("one")
		synctest.Wait() // pump is in Write("one")
		g.data("two")
		g.fin()
		synctest.Wait()
		go m.s.Close()
		synctest.Wait()          // Abort has dropped "two"; resetHost waits in SetLinger
		host.write <- struct{}{} // the Write under way succeeds meanwhile
		synctest.Wait()
		close(host.linger)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		resets := 0
		for _, e := range events {
			if e == "linger0" {
				resets++
			}
			if e == "FIN" {
				t.Errorf("the host sees a clean end after a part of the data: %v", events)
			}
		}
		if resets != 1 {
			t.Errorf("the host connection was reset %d times", resets)
		}
	})
}

// TestDrainingFlowsCount: a flow whose host does not read is over for the guest, but
// counts until the host has taken everything, or has taken nothing for drainTime.
func TestDrainingFlowsCount(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{MaxTCPFlows: 4})
		h.buffer = 1
		for i := range uint16(4) {
			g := m.open(1025+i, fam.at(80))
			g.connect()
			h.accept().CloseWrite()
			g.expectFIN()
			g.say("P.", pattern(1000)...)
			g.fin()
			synctest.Wait()
			g.drop()
		}
		time.Sleep(2 * time.Minute) // TIME-WAIT is over
		m.expectFlows(4)
		m.open(2000, fam.at(80)).syn()
		if n := m.s.Stats().DropTooManyFlows; n != 1 {
			t.Errorf("%d flows too many, want 1", n)
		}
		time.Sleep(drainTime)
		m.expectFlows(0)
	})
}

// TestDefaultLimits reaches the limits of a Config that does not set them.
func TestDefaultLimits(t *testing.T) {
	flood := func(m *machine, n int, to netip.AddrPort, udp bool) {
		for i := range n {
			g := m.open(uint16(1+i), to)
			if udp {
				m.send(udpPacket(g.id.guest, to, nil))
			} else {
				g.syn()
			}
		}
		synctest.Wait()
	}
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{Backlog: -1})
		h.setDial(func(ctx context.Context, _ Flow) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		mustListen(t, m.s, "tcp", fam.at(443).String())
		flood(m, 300, fam.at(443), false)
		flood(m, 300, fam.at(80), false)
		if st := m.s.Stats(); st.DropNoAcceptSlot != 300-256 || st.PendingDials != 256 || st.DropPendingDials != 300-256 {
			t.Errorf("half-open and pending dials: %+v", st)
		}
	})
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{Backlog: -1, MaxHalfOpen: -1, MaxPendingDials: -1})
		mustListen(t, m.s, "tcp", fam.at(443).String())
		flood(m, 16384+10, fam.at(443), false)
		flood(m, 4096+10, fam.at(53), true)
		if st := m.s.Stats(); st.TCPFlows != 16384 || st.UDPFlows != 4096 || st.DropTooManyFlows != 20 {
			t.Errorf("flows: %+v", st)
		}
	})
}
