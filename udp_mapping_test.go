package slirp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// UDPMappingEndpoint, and what a full table does.

// packetHost is the host's network, of which there are only sockets that are not
// connected.
type packetHost struct {
	t        testing.TB
	mu       sync.Mutex
	calls    []dialCall
	onListen func(ctx context.Context) error // nil: nothing
	sockets  chan *memSocket
}

// listen is a Config.ListenPacket.
func (h *packetHost) listen(ctx context.Context, network, address string) (net.PacketConn, error) {
	f, ok := FlowFromContext(ctx)
	if !ok {
		h.t.Error("ListenPacket without a Flow in its context")
	}
	h.mu.Lock()
	h.calls = append(h.calls, dialCall{network, address, f, time.Now()})
	on := h.onListen
	h.mu.Unlock()
	if on != nil {
		if err := on(ctx); err != nil {
			return nil, err
		}
	}
	c := &memSocket{memConn: newMemConn()}
	h.sockets <- c
	return c, nil
}

func (h *packetHost) set(on func(ctx context.Context) error) {
	h.mu.Lock()
	h.onListen = on
	h.mu.Unlock()
}

func (h *packetHost) accept() *memSocket {
	h.t.Helper()
	select {
	case c := <-h.sockets:
		return c
	case <-time.After(patience):
		h.t.Fatal("no socket on the host")
		return nil
	}
}

// expectOpened compares the number of sockets that were opened, in all.
func (h *packetHost) expectOpened(n int) {
	h.t.Helper()
	synctest.Wait()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.calls) != n {
		h.t.Errorf("%d sockets were opened, want %d", len(h.calls), n)
	}
}

// memSocket is a memConn that is not connected. What is given to it and expected of
// it begins with the other end and a space.
type memSocket struct{ *memConn }

func (c *memSocket) WriteTo(b []byte, to net.Addr) (int, error) {
	if _, err := c.memConn.Write(fmt.Appendf(nil, "%v %s", to, b)); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (c *memSocket) ReadFrom(b []byte) (int, net.Addr, error) {
	buf := make([]byte, 1<<17)
	n, err := c.memConn.Read(buf)
	if err != nil {
		return 0, nil, err
	}
	from, text, _ := strings.Cut(string(buf[:n]), " ")
	return copy(b, text), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(from)), nil
}

// from is a datagram for give.
func from(a netip.AddrPort, text string) string { return a.String() + " " + text }

// sayTo sends a datagram to a destination.
func (g *udpGuest) sayTo(to netip.AddrPort, text string) {
	g.t.Helper()
	g.to = to
	g.say(text)
}

// expectFrom waits for a datagram from there.
func (g *udpGuest) expectFrom(from netip.AddrPort, text string) {
	g.t.Helper()
	g.to = from
	g.expect(text)
}

// mappingInBubble runs a test for both families, with a guest and a host network of
// sockets that are not connected.
func mappingInBubble(t *testing.T, cfg Config, test func(t *testing.T, fam family, g *udpGuest, h *packetHost)) {
	inBubble(t, func(t *testing.T, fam family) {
		h := &packetHost{t: t, sockets: make(chan *memSocket, 10000)}
		cfg := cfg
		cfg.UDPMapping, cfg.ListenPacket = UDPMappingEndpoint, h.listen
		g, dialed := newUDPRig(t, fam, cfg)
		test(t, fam, g, h)
		if n := len(dialed.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
	})
}

func expectCounts(t *testing.T, s *Stack, want Stats) {
	t.Helper()
	synctest.Wait()
	st := s.Stats()
	got := Stats{DropUDPFilter: st.DropUDPFilter, DropUDPHost: st.DropUDPHost, FlowsReclaimed: st.FlowsReclaimed}
	if got != want {
		t.Errorf("counters %+v, want %+v", got, want)
	}
}

// One socket serves every destination, so that all see the same source; answers have
// their real source (N01, N51).
func TestN01EndpointIndependentMapping(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		a, b := fam.at(3478), netip.AddrPortFrom(fam.other, 19302)
		g.ns = 7
		g.sayTo(a, "to a")
		c := h.accept()
		c.expect(t, from(a, "to a"))
		network := map[int]string{4: "udp4", 6: "udp6"}[fam.version]
		if want := (dialCall{network, ":0", Flow{7, "udp", g.from, a}, time.Now()}); h.calls[0] != want {
			t.Errorf("ListenPacket %v, want %v", h.calls[0], want)
		}
		g.sayTo(b, "to b")
		g.sayTo(fam.at(3479), "")
		g.sayTo(a, "to a again")
		c.expect(t, from(b, "to b"), from(fam.at(3479), ""), from(a, "to a again"))
		for _, n := range []int{0, 1, 1400, 9000, 65507} {
			for _, peer := range []netip.AddrPort{a, b, fam.at(3479)} {
				c.give(from(peer, string(pattern(n))))
				g.expectFrom(peer, string(pattern(n)))
			}
		}
		g.expectNothing()
		h.expectOpened(1)
		g.expectStats(map[string]int{"flows": 1, "dialed": 1, "dials": 0, "refused": 0})
		expectCounts(t, g.s, Stats{})
	})
}

// Every port and namespace of the guest has its own socket (N02).
func TestN02NoPortOverloading(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		other := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
		other.ns = 1
		g.say("one")
		c1 := h.accept()
		g.sayFrom(4001, "two")
		c2 := h.accept()
		other.say("three")
		c3 := h.accept()
		for i, c := range []*memSocket{c1, c2, c3} {
			c.expect(t, from(g.to, []string{"one", "two", "three"}[i]))
			c.give(from(g.to, fmt.Sprint("answer ", i)))
		}
		g.expectAll(map[uint16]string{4000: "answer 0", 4001: "answer 1"})
		other.expect("answer 2")
		g.expectNothing()
		other.expectNothing()
		g.expectStats(map[string]int{"flows": 3, "dialed": 3})
	})
}

// expectAll waits for one datagram to each port, in any order.
func (g *udpGuest) expectAll(want map[uint16]string) {
	g.t.Helper()
	got := make(map[uint16]string)
	g.wait("datagrams", patience, func() bool {
		for _, d := range g.udp {
			got[d.dst.Port()] = string(d.payload)
		}
		return len(got) >= len(want)
	})
	for port, text := range want {
		if got[port] != text {
			g.t.Errorf("port %d got %q, want %q", port, got[port], text)
		}
	}
	g.frameMu.Lock()
	g.arrived = nil
	g.frameMu.Unlock()
}

// Datagrams of the guest keep a mapping, and answers do not (N04, N05).
func TestN04N05MappingTimer(t *testing.T) {
	for _, timeout := range []time.Duration{0, 5 * time.Minute, 2 * time.Minute} {
		t.Run(timeout.String(), func(t *testing.T) {
			mappingInBubble(t, Config{UDPIdleTimeout: timeout}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
				timeout := timeout
				if timeout == 0 {
					timeout = 60 * time.Second
				}
				g.say("x")
				c := h.accept()
				for range 36 { // N05: often enough, for as long as one likes
					time.Sleep(timeout - time.Second)
					g.say("x")
				}
				synctest.Wait()
				last := time.Now()
				h.expectOpened(1)
				for range 9 {
					time.Sleep(timeout / 10)
					c.give(from(g.to, "answer"))
					g.expect("answer")
				}
				time.Sleep(last.Add(timeout - 1).Sub(time.Now()))
				c.give(from(g.to, "just in time"))
				g.expect("just in time")
				time.Sleep(10 * time.Second)
				if at := c.closedAt(); at.Sub(last) != timeout {
					t.Errorf("closed %v after the guest's last datagram, want %v", at.Sub(last), timeout)
				}
				g.expectStats(map[string]int{"flows": 0})
				g.say("anew")
				h.accept().expect(t, from(g.to, "anew"))
			})
		})
	}
	mappingInBubble(t, Config{UDPIdleTimeout: -1}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("x")
		c := h.accept()
		time.Sleep(1000 * time.Hour)
		c.give(from(g.to, "late"))
		g.expect("late")
	})
}

// Who the guest has not sent to cannot send to it (N07, S50), nor who it has not sent
// to for UDPIdleTimeout.
func TestN07AddressDependentFiltering(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		a, b := fam.at(3478), netip.AddrPortFrom(fam.other, 3478)
		loopback := netip.AddrPortFrom(fam.loopback, 3478)
		g.sayTo(a, "x")
		c := h.accept()
		third := func() { // nobody but a may answer
			t.Helper()
			before := g.s.Stats().DropUDPFilter
			c.give(from(b, "third party"), from(loopback, "of this host"), from(netip.AddrPortFrom(fam.stack, 1), "third party"))
			c.give(from(a, "from a"), from(fam.at(1), "from another port of a"))
			g.expectFrom(a, "from a")
			g.expectFrom(fam.at(1), "from another port of a")
			g.expectNothing()
			if n := g.s.Stats().DropUDPFilter - before; n != 3 {
				t.Errorf("%d datagrams were filtered, want 3", n)
			}
		}
		third()
		g.sayTo(b, "x")
		c.give(from(b, "known now"))
		g.expectFrom(b, "known now")
		time.Sleep(30 * time.Second)
		g.sayTo(a, "x")
		time.Sleep(30 * time.Second) // b's time has gone by, but not that of the mapping
		third()
		g.sayTo(b, "x")
		c.give(from(b, "known again"))
		g.expectFrom(b, "known again")
		h.expectOpened(1)
	})
}

// A mapped source address is that of IPv4, and a zone makes no difference.
func TestMappingSourceForms(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("x")
		c := h.accept()
		form := netip.AddrPortFrom(netip.AddrFrom16(g.to.Addr().As16()), g.to.Port())
		if fam.version == 6 {
			form = netip.AddrPortFrom(g.to.Addr().WithZone("eth0"), g.to.Port())
		}
		c.give(from(form, "the same"))
		g.expect("the same")
	})
}

// The same datagrams and answers have the same fate each time (N10).
func TestN10Deterministic(t *testing.T) {
	var first [2]string
	for round := range 100 {
		for i, fam := range families {
			synctest.Test(t, func(t *testing.T) {
				h := &packetHost{t: t, sockets: make(chan *memSocket, 10000)}
				g, _ := newUDPRig(t, fam, Config{UDPMapping: UDPMappingEndpoint, ListenPacket: h.listen, MaxUDPFlows: 3,
					Allow: func(ctx context.Context, f Flow) error {
						if f.Destination.Port()%5 == 4 {
							return ErrProhibited
						}
						return nil
					}})
				var trace strings.Builder
				var sockets []*memSocket
				rnd := uint32(12345)
				next := func(n int) int {
					rnd = rnd*1664525 + 1013904223
					return int(rnd>>16) % n
				}
				for range 200 {
					peer := netip.AddrPortFrom([]netip.Addr{fam.server, fam.other}[next(2)], uint16(50+next(10)))
					switch next(3) {
					case 0:
						g.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, uint16(4000+next(5))), peer, []byte("x")))
					case 1:
						if len(sockets) > 0 {
							sockets[next(len(sockets))].give(from(peer, "y"))
						}
					case 2:
						time.Sleep(time.Duration(next(20)) * time.Second)
					}
					synctest.Wait()
					for len(h.sockets) > 0 {
						sockets = append(sockets, <-h.sockets)
					}
					st := g.s.Stats()
					g.mu.Lock()
					for _, d := range g.udp {
						fmt.Fprintf(&trace, "%v > %v: %s\n", d.src, d.dst, d.payload)
					}
					fmt.Fprintln(&trace, len(g.icmp), len(sockets), st.UDPFlows, st.DropUDPFilter, st.FlowsRefused, st.DropTooManyFlows, st.FlowsReclaimed)
					g.udp = nil
					g.mu.Unlock()
				}
				if got := trace.String(); round == 0 {
					first[i] = got
				} else if got != first[i] {
					t.Fatalf("round %d differs:\n%s\nfrom the first:\n%s", round, got, first[i])
				}
			})
		}
	}
}

// An error of the socket is the guest's to see if it is about its datagram, and ends
// nothing (N11, N19).
func TestN11MappingErrors(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		a, b := fam.at(3478), netip.AddrPortFrom(fam.other, 3478)
		g.sayTo(a, "x")
		c := h.accept()
		c.expect(t, from(a, "x"))
		g.sayTo(b, "x")
		c.expect(t, from(b, "x"))
		for err, want := range map[error]unreachable{
			dialError(syscall.ECONNREFUSED): unreachablePort,
			dialError(syscall.EHOSTUNREACH): unreachableHost,
			dialError(syscall.ENETUNREACH):  unreachableNet,
			dialError(syscall.EPERM):        unreachableProhibited,
		} {
			c.set(func() { c.errs = []error{err} })
			g.sayTo(a, "lost")
			synctest.Wait()
			g.expectUnreachable(want, udpPacket(g.from, a, []byte("lost")))
			g.sayTo(b, "the next")
			g.sayTo(a, "and the one after")
			c.expect(t, from(b, "the next"), from(a, "and the one after"))
			c.give(err, from(a, "answer")) // nobody knows which datagram it is about
			g.expectFrom(a, "answer")
			g.expectNothing()
		}
		c.set(func() { c.errs = []error{syscall.EMSGSIZE, syscall.EAGAIN, syscall.EINVAL} })
		for range 3 {
			g.sayTo(a, "lost")
		}
		g.sayTo(a, "last")
		c.expect(t, from(a, "last"))
		g.expectNothing()
		h.expectOpened(1)
		g.expectStats(map[string]int{"flows": 1, "icmp": 4, "big": 1, "queue": 1})
		expectCounts(t, g.s, Stats{DropUDPHost: 1})
	})
}

// A socket that is of no more use, or fails for ever, is given up.
func TestMappingSocketEnds(t *testing.T) {
	for _, err := range []error{io.EOF, net.ErrClosed, os.ErrDeadlineExceeded, syscall.ECONNREFUSED} {
		t.Run(err.Error(), func(t *testing.T) {
			mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
				g.say("x")
				c := h.accept()
				for range 1000 {
					c.give(err)
				}
				if c.closedAt().IsZero() || c.reads > maxFailures+1 {
					t.Errorf("still open, or after %d reads", c.reads)
				}
				g.expectNothing()
				g.expectStats(map[string]int{"flows": 0})
				g.say("anew")
				h.accept().expect(t, from(g.to, "anew"))
			})
		})
	}
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("x")
		c := h.accept()
		c.set(func() { c.errs = []error{nil, net.ErrClosed} })
		g.say("x")
		g.say("lost")
		if c.closedAt().IsZero() {
			t.Error("still open")
		}
		g.expectStats(map[string]int{"flows": 0})
	})
}

// What a namespace may have is bounded; beyond it nothing of the others suffers (N22,
// N24, S03).
func TestN22N24MappingLimit(t *testing.T) {
	mappingInBubble(t, Config{MaxUDPFlows: 3}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		var sockets []*memSocket
		for i := range uint16(3) {
			g.sayFrom(4000+i, "x")
			sockets = append(sockets, h.accept())
		}
		for port := range uint16(10) { // more destinations are not more mappings
			g.sayTo(fam.at(100+port), "x")
		}
		for i := range 20 {
			text := fmt.Sprint("too many ", i)
			g.sayFrom(5000+uint16(i), text)
			g.expectUnreachable(unreachableProhibited, udpPacket(netip.AddrPortFrom(fam.guest, 5000+uint16(i)), g.to, []byte(text)))
		}
		other := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
		other.ns = 1
		other.say("another namespace is not concerned")
		h.accept()
		for i, c := range sockets {
			c.give(from(g.to, "answer"))
			if i == 0 {
				g.expect("answer")
			} else {
				g.hearAt(4000 + uint16(i))
			}
		}
		h.expectOpened(4)
		g.expectStats(map[string]int{"flows": 4, "full": 20})
	})
}

// reclaimTest fills a table of three, one of which is answered.
func reclaimTest(t *testing.T, g *udpGuest, answer func(port uint16), accept func() *memConn) {
	closed := func(c *memConn) bool { return !c.closedAt().IsZero() }
	var conns []*memConn
	for i := range uint16(3) {
		g.sayFrom(4000+i, "x")
		conns = append(conns, accept())
		time.Sleep(time.Second)
	}
	answer(4000)
	synctest.Wait()
	refused := func() {
		t.Helper()
		before := g.s.Stats()
		g.sayFrom(4100, "x")
		synctest.Wait()
		if st := g.s.Stats(); st.DropTooManyFlows != before.DropTooManyFlows+1 || st.FlowsReclaimed != before.FlowsReclaimed {
			t.Fatalf("not refused: %+v", st)
		}
	}
	// 0 is answered, 1 and 2 may be yet.
	refused()
	time.Sleep(briefIdle - 2*time.Second - 1)
	refused()
	g.sayFrom(4001, "busy")
	time.Sleep(2 * time.Second)
	// 1 is older, but only 2 is idle.
	g.sayFrom(4100, "x")
	conns = append(conns, accept())
	if closed(conns[0]) || closed(conns[1]) || !closed(conns[2]) {
		t.Fatalf("closed: %v, %v, %v, want the third", closed(conns[0]), closed(conns[1]), closed(conns[2]))
	}
	time.Sleep(briefIdle)
	// Now 1 and 3 are: the older one makes way, and then the other one.
	g.sayFrom(4101, "x")
	accept()
	if !closed(conns[1]) || closed(conns[3]) {
		t.Fatal("the older one did not make way")
	}
	g.sayFrom(4102, "x")
	accept()
	if !closed(conns[3]) {
		t.Fatal("the other one did not make way")
	}
	// One that was answered never does, however long it is idle.
	g.sayFrom(4101, "busy")
	time.Sleep(briefIdle - 1)
	refused()
	if closed(conns[0]) {
		t.Error("a flow that was answered has made way")
	}
	g.expectStats(map[string]int{"flows": 3})
	expectCounts(t, g.s, Stats{FlowsReclaimed: 3})
}

func TestN22ReclaimUnanswered(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 3}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		conns := make(map[uint16]*memConn)
		port := uint16(4000)
		reclaimTest(t, g, func(port uint16) { conns[port].give("answer") }, func() *memConn {
			conns[port] = h.accept()
			port++
			return conns[port-1]
		})
		// The rest ends, and nothing of it is left in the accounts.
		time.Sleep(2 * time.Minute)
		g.expectStats(map[string]int{"flows": 0})
		if n := len(g.s.accounts); n != 0 {
			t.Errorf("%d accounts", n)
		}
	})
	mappingInBubble(t, Config{MaxUDPFlows: 3}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		socks := make(map[uint16]*memSocket)
		port := uint16(4000)
		reclaimTest(t, g, func(port uint16) { socks[port].give(from(g.to, "answer")) }, func() *memConn {
			socks[port] = h.accept()
			port++
			return socks[port-1].memConn
		})
		time.Sleep(2 * time.Minute)
		g.expectStats(map[string]int{"flows": 0})
		if n := len(g.s.accounts); n != 0 {
			t.Errorf("%d accounts", n)
		}
	})
}

// A flow that is still dialed makes way like any other without an answer, and so does
// one for a connection of DialContext; such a connection does not.
func TestReclaimDialing(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 2}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		h.setDial(hang)
		g.say("x")
		g.sayFrom(4001, "x")
		synctest.Wait()
		time.Sleep(briefIdle)
		from := g.from
		conn := dialGuest(g, fam)
		g.from = from
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 2, "dials": 1, "icmp": 0})
		dialGuest(g, fam)
		time.Sleep(time.Hour)
		_, err := g.s.DialContext(t.Context(), "udp", g.from.String())
		wantOpError(t, "dial", err, ErrTooManyFlows)
		mustWrite(t, conn, "alive")
		expectCounts(t, g.s, Stats{FlowsReclaimed: 2})
	})
}

// A flow whose first answer is still with the Writer is answered: it does not make
// way. Flows that have ended leave nothing behind among those that may.
func TestReclaimAnswering(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 2}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		for i := range uint16(50) {
			g.sayFrom(5000+i, "x")
			h.accept().give(io.EOF)
			synctest.Wait()
		}
		g.s.mu.Lock()
		if n := g.s.accounts[0].unanswered.Len(); n != 1 {
			t.Errorf("%d flows may make way, want 1", n)
		}
		g.s.mu.Unlock()

		gate := make(chan bool)
		g.setHook(func(frame []byte) error {
			if bytes.HasSuffix(frame, []byte("answer")) {
				<-gate
			}
			return g.keep(frame)
		})
		c.give("answer")
		synctest.Wait()
		time.Sleep(2 * briefIdle)
		g.sayFrom(4001, "x")
		h.accept()
		g.sayFrom(4002, "x")
		synctest.Wait()
		expectCounts(t, g.s, Stats{})
		close(gate)
		g.expect("answer")
		g.takeICMP()
		g.expectNothing()
		g.expectStats(map[string]int{"flows": 2, "full": 1})
	})
}

// The work for a datagram that is one too many does not grow with the table (S03).
func TestReclaimIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fam := families[0]
		g, h := newUDPRig(t, fam, Config{MaxUDPFlows: 100, MaxPendingDials: -1})
		for i := range uint16(100) {
			g.sayFrom(4000+i, "x")
		}
		synctest.Wait()
		time.Sleep(briefIdle)
		for i := range uint16(100) { // all but the last one are busy
			if i != 99 {
				g.sayFrom(4000+i, "busy")
			}
		}
		g.setHook(nil)
		tries := 0
		for g.s.Stats().FlowsReclaimed == 0 {
			g.sayFrom(5000, "x")
			tries++
		}
		if want := (100 + maxReclaim - 1) / maxReclaim; tries != want {
			t.Errorf("the idle flow was found in %d attempts, want %d", tries, want)
		}
		if len(h.dials()) > 101 {
			t.Errorf("%d dials", len(h.dials()))
		}
	})
}

// Flows to port 53 that were answered are short-lived.
func TestDNSTimeout(t *testing.T) {
	for _, timeout := range []time.Duration{0, 3 * time.Second, -1} {
		t.Run(timeout.String(), func(t *testing.T) {
			brief := briefIdle
			if timeout > 0 {
				brief = timeout
			}
			run := func(t *testing.T, g *udpGuest, c *memConn, answer string, accept func() *memConn, refreshed bool) {
				if timeout <= 0 {
					time.Sleep(50 * time.Second) // without an answer it stays
					if !c.closedAt().IsZero() {
						t.Fatal("closed without an answer")
					}
				}
				g.say("again")
				synctest.Wait()
				time.Sleep(time.Second)
				c.give(answer)
				g.expect("answer")
				last := time.Now()
				if !refreshed {
					last = last.Add(-time.Second)
				}
				time.Sleep(time.Minute)
				if d := c.closedAt().Sub(last); d != brief {
					t.Errorf("closed after %v, want %v", d, brief)
				}
				g.expectStats(map[string]int{"flows": 0})
				g.say("query")
				accept()
			}
			udpInBubble(t, Config{UDPIdleTimeout: timeout}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
				g.to = fam.at(53)
				g.say("query")
				run(t, g, h.accept(), "answer", h.accept, true)
			})
			mappingInBubble(t, Config{UDPIdleTimeout: timeout}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
				g.sayTo(netip.AddrPortFrom(fam.other, 53), "query")
				c := h.accept()
				g.to = fam.at(53)
				run(t, g, c.memConn, from(g.to, "answer"), func() *memConn { return h.accept().memConn }, false)
			})
		})
	}
	// One that has another destination is an ordinary mapping.
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.sayTo(fam.at(53), "query")
		c := h.accept()
		c.give(from(g.to, "answer"))
		g.expect("answer")
		g.sayTo(fam.at(54), "x")
		last := time.Now()
		time.Sleep(2 * time.Minute)
		if d := c.closedAt().Sub(last); d != 60*time.Second {
			t.Errorf("closed after %v", d)
		}
	})
}

// For a guest that may go nowhere no socket is opened (N25).
func TestN25NoSocketOnDeny(t *testing.T) {
	for _, err := range []error{ErrProhibited, fmt.Errorf("policy: %w", ErrProhibited), ErrDrop, errors.New("anything else"), syscall.ECONNREFUSED} {
		t.Run(err.Error(), func(t *testing.T) {
			mappingInBubble(t, Config{Allow: func(context.Context, Flow) error { return err }},
				func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
					for i := range 3 {
						g.sayTo(fam.at(uint16(100+i)), "let me out")
						synctest.Wait()
						switch {
						case errors.Is(err, ErrProhibited):
							g.expectUnreachable(unreachableProhibited, udpPacket(g.from, g.to, []byte("let me out")))
						case errors.Is(err, syscall.ECONNREFUSED):
							g.expectUnreachable(unreachablePort, udpPacket(g.from, g.to, []byte("let me out")))
						}
						g.expectNothing()
					}
					h.expectOpened(0)
					policy := 0
					if errors.Is(err, ErrDrop) {
						policy = 3
					}
					g.expectStats(map[string]int{"flows": 0, "dials": 0, "dialed": 0, "policy": policy, "refused": 3 - policy})
				})
		})
	}
}

// Each destination is judged by itself, once; one that is refused cannot send either.
func TestN25MappingPolicy(t *testing.T) {
	asked := make(chan Flow, 100)
	cfg := Config{Allow: func(ctx context.Context, f Flow) error {
		if c, ok := FlowFromContext(ctx); !ok || c != f {
			t.Errorf("Allow: %v in the context of %v", f, c)
		}
		asked <- f
		if f.Destination.Port() == 666 {
			return ErrProhibited
		}
		return nil
	}}
	mappingInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		wantAsked := func(to netip.AddrPort) {
			t.Helper()
			synctest.Wait()
			if f := <-asked; f != (Flow{0, "udp", g.from, to}) || len(asked) != 0 {
				t.Errorf("Allow was asked about %v, and %d more, want %v", f, len(asked), to)
			}
		}
		a, bad := fam.at(3478), netip.AddrPortFrom(fam.other, 666)
		g.sayTo(a, "1")
		g.sayTo(a, "2")
		c := h.accept()
		c.expect(t, from(a, "1"), from(a, "2"))
		g.sayTo(a, "3")
		c.expect(t, from(a, "3"))
		wantAsked(a)

		for range 2 {
			g.sayTo(bad, "exfiltrate")
			g.expectUnreachable(unreachableProhibited, udpPacket(g.from, bad, []byte("exfiltrate")))
			wantAsked(bad)
		}
		c.give(from(bad, "commands"))
		g.expectNothing()
		expectCounts(t, g.s, Stats{DropUDPFilter: 1})

		g.sayTo(fam.at(666), "x") // an address that may be talked to, but not there
		g.expectUnreachable(unreachableProhibited, udpPacket(g.from, g.to, []byte("x")))
		wantAsked(fam.at(666))
		c.expect(t)

		// What was refused keeps nothing open, and what is forgotten is judged anew.
		last := time.Now()
		g.sayTo(a, "x")
		for range 3 {
			time.Sleep(15 * time.Second)
			g.sayTo(bad, "exfiltrate")
			g.takeICMP()
			<-asked
		}
		time.Sleep(time.Minute)
		if d := c.closedAt().Sub(last); d != time.Minute {
			t.Errorf("closed after %v", d)
		}
		g.sayTo(a, "x")
		h.accept()
		wantAsked(a)
		g.sayTo(fam.at(1), "x")
		wantAsked(fam.at(1))
		for range 2 {
			time.Sleep(30 * time.Second)
			g.sayTo(a, "x")
		}
		g.sayTo(fam.at(1), "x")
		wantAsked(fam.at(1))
		h.expectOpened(2)
	})
}

// An Allow that takes its time holds up its own destination only, which keeps its
// first datagrams in order.
func TestMappingAllowPends(t *testing.T) {
	gate := make(map[uint16]chan error)
	for _, port := range []uint16{1, 2, 3} {
		gate[port] = nil
	}
	mappingInBubble(t, Config{Allow: func(ctx context.Context, f Flow) error {
		if c := gate[f.Destination.Port()]; c != nil {
			return <-c
		}
		if f.Destination.Port() == 4 {
			<-ctx.Done()
			if err := ctx.Err(); err != context.Canceled {
				return err
			}
		}
		return nil
	}}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		for port := range gate {
			gate[port] = make(chan error)
		}
		var want []string
		for i := range 20 {
			g.sayTo(fam.at(1), fmt.Sprint(i))
			g.sayTo(fam.at(2), fmt.Sprint(i))
			if i < dialQueueLen {
				want = append(want, from(fam.at(1), fmt.Sprint(i)))
			}
		}
		h.expectOpened(0)
		g.expectStats(map[string]int{"queue": 2 * (20 - dialQueueLen), "dials": 2, "flows": 1})
		g.sayTo(fam.at(9), "no gate")
		c := h.accept()
		c.expect(t, from(fam.at(9), "no gate"))
		gate[1] <- nil
		c.expect(t, want...)
		g.sayTo(fam.at(1), "behind")
		c.expect(t, from(fam.at(1), "behind"))
		c.give(from(fam.at(1), "answer"))
		g.expectFrom(fam.at(1), "answer")

		gate[2] <- ErrProhibited
		g.to = fam.at(2)
		g.expectUnreachable(unreachableProhibited, udpPacket(g.from, g.to, []byte("15")))
		g.expectNothing()

		// The mapping ends while Allow is asked: there is nobody to tell, and one that
		// looks at its context is done.
		g.sayTo(fam.at(3), "x")
		g.sayTo(fam.at(4), "x")
		synctest.Wait()
		g.expectStats(map[string]int{"dials": 2})
		c.give(io.EOF)
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 0, "dials": 1})
		gate[3] <- nil
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 0, "dials": 0})
		h.expectOpened(1)
	})
}

// Everything that waits for the socket is told when there will be none, and the next
// datagram tries again.
func TestMappingListenFails(t *testing.T) {
	for _, withAllow := range []bool{false, true} {
		t.Run(fmt.Sprintf("allow=%v", withAllow), func(t *testing.T) {
			cfg := Config{}
			if withAllow {
				cfg.Allow = func(context.Context, Flow) error { return nil }
			}
			mappingInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
				gate := make(chan error)
				h.set(func(context.Context) error { return <-gate })
				for _, err := range []error{dialError(syscall.EACCES), errors.New("no"), ErrDrop} {
					g.sayTo(fam.at(1), "x")
					synctest.Wait()
					g.sayTo(fam.at(2), "x")
					synctest.Wait()
					g.sayTo(fam.at(2), "y")
					g.expectStats(map[string]int{"flows": 1, "dials": 1})
					gate <- err
					synctest.Wait()
					if errors.Is(err, syscall.EACCES) {
						for i, text := range []string{"x", "y"} {
							g.to = fam.at(uint16(1 + i))
							g.expectUnreachable(unreachableProhibited, udpPacket(g.from, g.to, []byte(text)))
						}
					}
					g.expectNothing()
					g.expectStats(map[string]int{"flows": 0, "dials": 0, "dialed": 0})
				}
				g.expectStats(map[string]int{"policy": 2, "refused": 4})
				g.sayTo(fam.at(1), "x")
				synctest.Wait()
				g.sayTo(fam.at(2), "y")
				synctest.Wait()
				gate <- nil
				h.accept().expect(t, from(fam.at(1), "x"), from(fam.at(2), "y"))
				h.expectOpened(4)
			})
		})
	}
}

// A socket that is long in coming is given up after DialTimeout, and the queue is not
// older than that.
func TestMappingListenHangs(t *testing.T) {
	mappingInBubble(t, Config{UDPIdleTimeout: time.Second}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		h.set(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
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

func TestMappingMaxPendingDials(t *testing.T) {
	gate := make(chan bool)
	for _, withAllow := range []bool{false, true} {
		cfg := Config{MaxPendingDials: 2}
		if withAllow {
			cfg.Allow = func(context.Context, Flow) error { <-gate; return nil }
		}
		mappingInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
			gate = make(chan bool)
			if !withAllow {
				h.set(func(context.Context) error { <-gate; return nil })
			}
			for port := range uint16(5) {
				g.sayFrom(4000+port, "x")
			}
			g.expectNothing()
			g.expectStats(map[string]int{"flows": 2, "dials": 2, "pending": 3})
			if withAllow { // more destinations are more calls of Allow
				g.sayTo(fam.at(1), "x")
				g.expectStats(map[string]int{"flows": 2, "dials": 2, "pending": 4})
			}
			close(gate)
			h.accept()
			h.accept()
			synctest.Wait()
			g.sayFrom(4002, "x")
			h.accept()
			synctest.Wait()
			g.expectStats(map[string]int{"flows": 3, "dials": 0})
		})
	}
}

// A mapping remembers so many destinations; where the guest has not sent to for the
// longest time makes way.
func TestMappingMaxDestinations(t *testing.T) {
	var asked atomic.Int32
	mappingInBubble(t, Config{Allow: func(context.Context, Flow) error { asked.Add(1); return nil }},
		func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
			asked.Store(0)
			first := netip.AddrPortFrom(fam.other, 1)
			g.sayTo(first, "x")
			c := h.accept()
			g.sayTo(fam.at(1), "x")
			synctest.Wait()
			for port := range uint16(maxDestinations - 2) {
				g.sayTo(fam.at(2+port), "x")
				synctest.Wait()
			}
			g.sayTo(first, "x") // not the oldest any more
			g.sayTo(fam.at(5000), "x")
			synctest.Wait()
			c.give(from(first, "answer"))
			g.expectFrom(first, "answer")
			if n := asked.Load(); n != maxDestinations+1 {
				t.Errorf("Allow was asked %d times", n)
			}
			g.sayTo(first, "x")
			g.sayTo(fam.at(1), "x") // has made way
			synctest.Wait()
			if n := asked.Load(); n != maxDestinations+2 {
				t.Errorf("Allow was asked %d times", n)
			}
			for port := range uint16(maxDestinations) {
				g.sayTo(fam.at(6000+port), "x")
				synctest.Wait()
			}
			c.give(from(first, "late"))
			g.expectNothing()
			m := g.s.lookupUDP(&flowKey{guest: ipAddrFrom(fam.guest), guestPort: 4000, proto: protoUDP, version: uint16(fam.version)}).mapping
			m.flow.mu.Lock()
			if len(m.destinations) != maxDestinations || m.recent.Len() != maxDestinations || len(m.peers) != 1 || m.peers[fam.server] != maxDestinations {
				t.Errorf("%d destinations, %d recent, peers %v", len(m.destinations), m.recent.Len(), m.peers)
			}
			m.flow.mu.Unlock()
			h.expectOpened(1)
		})
	// While all of them wait for Allow, none can make way.
	mappingInBubble(t, Config{MaxPendingDials: -1, Allow: func(ctx context.Context, f Flow) error { <-ctx.Done(); return ctx.Err() }},
		func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
			for port := range uint16(maxDestinations + 5) {
				g.sayTo(fam.at(1+port), "x")
			}
			g.expectStats(map[string]int{"dials": maxDestinations, "pending": 5})
		})
	// While they wait for the socket, they can.
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		gate := make(chan bool)
		h.set(func(context.Context) error { <-gate; return nil })
		var want []string
		for port := range uint16(maxDestinations + 5) {
			g.sayTo(fam.at(1+port), "x")
			want = append(want, from(g.to, "x"))
		}
		close(gate)
		c := h.accept()
		synctest.Wait()
		c.expect(t, want[5:5+hostQueueLen]...)
		g.expectStats(map[string]int{"queue": 5 + maxDestinations - hostQueueLen})
	})
}

// A datagram for the mapping that had a port before is not for the one that has it
// now (N26, S52).
func TestN26LateDatagram(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		a, b := fam.at(3478), netip.AddrPortFrom(fam.other, 3478)
		g.sayTo(a, "x")
		h.accept().give(io.EOF)
		synctest.Wait()
		g.sayFrom(4001, "x")
		h.accept().give(io.EOF)
		synctest.Wait()
		g.sayTo(b, "x")
		h.accept().give(from(a, "late"), from(b, "in time"))
		g.expectFrom(b, "in time")
		g.expectNothing()
		expectCounts(t, g.s, Stats{DropUDPFilter: 1})
	})
}

// What is not for one host opens nothing (N54, S47).
func TestN54NoSocketForGroups(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		bad := map[int][]string{
			4: {"0.0.0.0", "255.255.255.255", "224.0.0.251", "239.255.255.250"},
			6: {"::", "ff02::fb", "ff0e::1", "::ffff:224.0.0.1", "::ffff:255.255.255.255"},
		}[fam.version]
		for _, a := range bad {
			g.mustSend(udpPacket(g.from, netip.AddrPortFrom(netip.MustParseAddr(a), 5353), []byte("x")))
		}
		g.expectNothing()
		h.expectOpened(0)
		g.expectStats(map[string]int{"address": len(bad), "flows": 0})
	})
}

// A connection of DialContext and a mapping do not take each other's datagrams.
func TestMappingAndDialContext(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		conn := dialGuest(g, fam)
		inside := g.to
		g.sayTo(fam.at(1), "outside")
		c := h.accept()
		c.expect(t, from(fam.at(1), "outside"))
		g.sayTo(inside, "inside")
		mustRead(t, conn, "inside")
		mustWrite(t, conn, "from inside")
		g.expectFrom(inside, "from inside")
		c.give(from(fam.at(1), "from outside"))
		g.expectFrom(fam.at(1), "from outside")
		conn.Close()
		g.sayTo(inside, "now outside")
		c.expect(t, from(inside, "now outside"))
		h.expectOpened(1)
	})
}

// Frames and errors go to where the guest's latest packet came from.
func TestMappingLinkMoves(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("x")
		c := h.accept()
		c.expect(t, from(g.to, "x"))
		moved := newUDPGuest(newMachine(t, g.s), fam.guest, g.to)
		moved.say("y")
		c.expect(t, from(g.to, "y"))
		c.give(from(g.to, "answer"))
		moved.expect("answer")
		g.expectNothing()
	})
}

// A socket that takes nothing holds up its mapping only, within a bound, and a Writer
// that blocks lets no two frames of a mapping pass.
func TestMappingStuck(t *testing.T) {
	mappingInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("first")
		c := h.accept()
		c.expect(t, from(g.to, "first"))
		c.set(func() { c.stuck = true })
		for i := range 100 {
			g.sayTo(fam.at(uint16(1+i%3)), fmt.Sprint(i))
			synctest.Wait()
		}
		g.expectStats(map[string]int{"queue": 99 - hostQueueLen})
		g.sayFrom(4001, "x")
		h.accept().expect(t, from(g.to, "x"))
		gate := make(chan bool)
		var inside atomic.Int32
		g.setHook(func(frame []byte) error {
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d frames of one mapping were with the Writer at the same time", n)
			}
			<-gate
			inside.Add(-1)
			return g.keep(frame)
		})
		c.give(from(fam.at(1), "answer"))
		synctest.Wait()
		c.set(func() {
			c.errs = []error{syscall.ECONNREFUSED}
			c.stuck = false
		})
		synctest.Wait()
		close(gate)
		g.expectFrom(fam.at(1), "answer")
		g.expectUnreachable(unreachablePort, udpPacket(g.from, fam.at(1), []byte("0")))
	})
}

// Close ends mappings in every state; the bubble would not end with a goroutine left.
func TestMappingClose(t *testing.T) {
	cfg := Config{Allow: func(ctx context.Context, f Flow) error {
		if f.Destination.Port() == 1 {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}}
	mappingInBubble(t, cfg, func(t *testing.T, fam family, g *udpGuest, h *packetHost) {
		g.say("idle")
		idle := h.accept()
		g.sayFrom(4001, "stuck")
		stuck := h.accept()
		stuck.expect(t, from(g.to, "stuck"))
		stuck.set(func() { stuck.stuck = true })
		g.sayFrom(4001, "stuck")
		g.sayFrom(4001, "stuck")
		h.set(func(ctx context.Context) error { <-ctx.Done(); return nil }) // opens it nevertheless
		g.sayFrom(4002, "opening")
		g.to = fam.at(1)
		g.sayFrom(4003, "asking")
		g.sayFrom(4001, "asking")
		synctest.Wait()
		g.expectStats(map[string]int{"flows": 4, "dials": 3})
		before := time.Now()
		if err := g.s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if d := time.Since(before); d != 0 {
			t.Errorf("Close took %v", d)
		}
		for _, c := range []*memSocket{idle, stuck, h.accept()} {
			if c.closedAt().IsZero() {
				t.Error("a socket is still open")
			}
		}
		g.expectNothing()
		g.expectStats(map[string]int{"flows": 0, "dials": 0})
		if err := g.send(udpPacket(g.from, g.to, nil)); !errors.Is(err, ErrStackClosed) {
			t.Errorf("HandlePacket after Close: %v", err)
		}
	})
}

// Many guests, destinations, refusals, expiries, and Close in the middle.
func TestMappingConcurrent(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		for _, ask := range []bool{false, true} {
			var n atomic.Int32
			cfg := Config{
				UDPMapping: UDPMappingEndpoint, UDPIdleTimeout: time.Millisecond, MaxUDPFlows: 4,
				ListenPacket: func(ctx context.Context, network, address string) (net.PacketConn, error) {
					if n.Add(1)%7 == 0 {
						return nil, syscall.EMFILE
					}
					c := &memSocket{memConn: newMemConn()}
					c.errs = []error{nil, syscall.ECONNREFUSED, nil, syscall.EINVAL}
					c.give(from(fam.at(1), "a"), syscall.ECONNREFUSED, from(netip.AddrPortFrom(fam.other, 1), string(pattern(3000))), from(fam.at(2), "b"))
					if n.Load()%3 == 0 {
						c.give(io.EOF)
					}
					return c, nil
				},
			}
			if ask {
				cfg.Allow = func(ctx context.Context, f Flow) error {
					if n.Add(1)%5 == 0 {
						return ErrProhibited
					}
					return nil
				}
			}
			s, err := NewWithConfig(cfg)
			if err != nil {
				t.Fatal(err)
			}
			g := newUDPGuest(newMachine(t, s), fam.guest, fam.at(53))
			g.setHook(nil)
			var senders sync.WaitGroup
			for i := range 8 {
				senders.Go(func() {
					for j := range 300 {
						from := netip.AddrPortFrom(fam.guest, uint16(4000+(i+j)%6))
						if err := g.send(udpPacket(from, fam.at(uint16(1+j%7)), pattern(j))); err != nil && !errors.Is(err, ErrStackClosed) {
							t.Errorf("HandlePacket: %v", err)
						}
						if i == 0 && j == 270 {
							s.Close()
						}
					}
				})
			}
			senders.Wait()
			if st := s.Stats(); st.UDPFlows != 0 || st.PendingDials != 0 {
				t.Errorf("%+v", st)
			}
		}
	})
}

func TestMappingConfig(t *testing.T) {
	for _, m := range []UDPMapping{-1, 2} {
		if _, err := NewWithConfig(Config{UDPMapping: m}); err == nil || !strings.Contains(err.Error(), "Config.UDPMapping") {
			t.Errorf("%d: %v", m, err)
		}
	}
}

// Real sockets.

func newEndpointStack(t testing.TB, cfg Config) *Stack {
	cfg.UDPMapping = UDPMappingEndpoint
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Two servers see the same port, and two guests do not (N01, N02).
func TestN01MappingSocket(t *testing.T) {
	for _, mtu := range []int{1500, 65535} {
		eachFamily(t, func(t *testing.T, fam family) {
			a, atA := udpServer(t, fam, 0)
			b, atB := udpServer(t, fam, 0)
			g := newUDPGuest(newMachine(t, newEndpointStack(t, Config{MTU: mtu})), fam.guest, atA)
			buf := make([]byte, 1<<16)
			hear := func(c *net.UDPConn, text string) netip.AddrPort {
				t.Helper()
				n, peer, err := c.ReadFromUDPAddrPort(buf)
				if err != nil || string(buf[:n]) != text {
					t.Fatalf("the host got %d bytes, %v, want %d", n, err, len(text))
				}
				return peer
			}
			var peer netip.AddrPort
			for i, n := range []int{0, 1, 1400, 0, 65507} {
				said := string(pattern(min(n, mtu-48)))
				g.sayTo(atA, said)
				fromA := hear(a, said)
				g.sayTo(atB, said)
				fromB := hear(b, said)
				if fromA != fromB || i > 0 && fromA != peer {
					t.Fatalf("from %v and %v, before from %v", fromA, fromB, peer)
				}
				peer = fromA
				for to, c := range map[netip.AddrPort]*net.UDPConn{atA: a, atB: b} {
					if _, err := c.WriteToUDPAddrPort(pattern(n), peer); err != nil {
						t.Fatal(err)
					}
					g.expectFrom(to, string(pattern(n)))
				}
			}
			g.to = atA
			g.sayFrom(4001, "x")
			if other := hear(a, "x"); other == peer {
				t.Errorf("two ports of the guest share %v", other)
			}
			g.expectStats(map[string]int{"flows": 2, "dialed": 2})
		})
	}
}

// A third party at another address of this host is kept out (N07, S50).
func TestN07MappingSocketFilter(t *testing.T) {
	fam := families[0]
	server, to := udpServer(t, fam, 0)
	third, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)})
	if err != nil {
		t.Skip(err)
	}
	defer third.Close()
	g := newUDPGuest(newMachine(t, newEndpointStack(t, Config{})), fam.guest, to)
	g.say("x")
	buf := make([]byte, 100)
	_, peer, err := server.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	third.WriteToUDPAddrPort([]byte("third party"), peer)
	server.WriteToUDPAddrPort([]byte("answer"), peer)
	g.expect("answer")
	if st := g.s.Stats(); st.DropUDPFilter != 1 {
		t.Errorf("%d datagrams were filtered", st.DropUDPFilter)
	}
}

// What the host knows at once is told, and the mapping goes on (N11).
func TestN11MappingSocketErrors(t *testing.T) {
	fam := families[1]
	server, to := udpServer(t, fam, 0)
	g := newUDPGuest(newMachine(t, newEndpointStack(t, Config{})), fam.guest, to)
	buf := make([]byte, 100)
	for range 2 {
		g.sayTo(to, "x")
		if n, _, err := server.ReadFromUDPAddrPort(buf); err != nil || string(buf[:n]) != "x" {
			t.Fatalf("the host got %q, %v", buf[:n], err)
		}
		// An IPv4 address in an IPv6 packet has no way through an IPv6 socket.
		mapped := netip.MustParseAddrPort("[::ffff:192.0.2.1]:53")
		g.sayTo(mapped, "y")
		if msg := g.takeICMP(); [2]byte{msg.typ, msg.code} != [2]byte{1, 0} {
			t.Errorf("ICMP %d %d", msg.typ, msg.code)
		}
	}
	g.expectStats(map[string]int{"flows": 1, "dialed": 1, "icmp": 2})
}

// A ListenPacket may give a socket of both families.
func TestMappingDualStackSocket(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		s := newEndpointStack(t, Config{ListenPacket: func(ctx context.Context, network, address string) (net.PacketConn, error) {
			return net.ListenPacket("udp", ":0")
		}})
		g := newUDPGuest(newMachine(t, s), fam.guest, to)
		g.say("x")
		buf := make([]byte, 100)
		_, peer, err := server.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		server.WriteToUDPAddrPort([]byte("answer"), peer)
		g.expect("answer")
	})
}

// In the steady state a datagram costs no memory, and an answer no more than the
// address that package syscall returns.
func TestMappingAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector allocates")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		s := newEndpointStack(t, Config{ReuseFrames: true})
		defer s.Close()
		arrived := make(chan int, 1)
		w := func(frame []byte) error { arrived <- len(frame); return nil }
		packet := udpPacket(netip.AddrPortFrom(fam.guest, 4000), to, pattern(1000))
		buf := make([]byte, 2000)
		n := leastAllocs(200, 1, func() {
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
		if n > 1 {
			t.Errorf("%v allocations for a datagram and its answer", n)
		}
	})
}

// The ports of the host are not to be guessed (N27): the kernel chooses them.
func TestN27MappingPorts(t *testing.T) {
	fam := families[0]
	server, to := udpServer(t, fam, 0)
	g := newUDPGuest(newMachine(t, newEndpointStack(t, Config{})), fam.guest, to)
	var ports []uint16
	buf := make([]byte, 10)
	for i := range uint16(100) {
		g.sayFrom(4000+i, "x")
		_, peer, err := server.ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, peer.Port())
	}
	sequential := 0
	for i, p := range ports[1:] {
		if d := int(p) - int(ports[i]); d >= -2 && d <= 2 {
			sequential++
		}
	}
	if slices.IsSorted(ports) || sequential > 10 {
		t.Errorf("ports %v", ports)
	}
}
