package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// Rows of testdata/conformance.md about NAT, IP, and what a guest must not reach.

// icmpOf returns the protocol number and the echo request type of a family.
func (f family) icmpOf() (proto, echo byte) {
	if f.version == 6 {
		return 58, 128
	}
	return 1, 8
}

// ping is an echo request.
func (f family) ping(to netip.Addr, id, seq uint16, payload []byte) []byte {
	proto, echo := f.icmpOf()
	b := []byte{echo, 0, 0, 0, byte(id >> 8), byte(id), byte(seq >> 8), byte(seq)}
	return refPacket(f.guest, to, proto, append(b, payload...), 2)
}

// keepFrames makes a machine keep its frames, and returns what takes them.
func (m *machine) keepFrames() (take func() [][]byte) {
	var mu sync.Mutex
	var frames [][]byte
	m.setHook(func(frame []byte) error {
		mu.Lock()
		defer mu.Unlock()
		frames = append(frames, bytes.Clone(frame))
		return nil
	})
	return func() [][]byte {
		mu.Lock()
		defer mu.Unlock()
		f := frames
		frames = nil
		return f
	}
}

func TestN02_PortsApart(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		g := newUDPGuest(newMachine(t, New()), fam.guest, to)
		buf := make([]byte, 100)
		peers := make(map[netip.AddrPort]uint16)
		for port := range uint16(10) {
			g.sayFrom(4000+port, "x")
			_, peer, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			if other, ok := peers[peer]; ok {
				t.Errorf("the guest's ports %d and %d are both %v", other, 4000+port, peer)
			}
			peers[peer] = 4000 + port
		}
		for peer, port := range peers {
			server.WriteToUDPAddrPort([]byte(fmt.Sprint(port)), peer)
			if got := g.hearAt(port); got != fmt.Sprint(port) {
				t.Errorf("port %d got %q", port, got)
			}
		}
	})
}

func TestN04_UDPTimer(t *testing.T) {
	udpInBubble(t, Config{UDPIdleTimeout: 5 * time.Minute}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		for _, after := range []time.Duration{119, 299} {
			g.sayFrom(4000+uint16(after), "out")
			c := h.accept()
			c.expect(t, "out")
			time.Sleep(after * time.Second)
			c.give("in")
			if got := g.hearAt(4000 + uint16(after)); got != "in" {
				t.Errorf("after %d s: %q", after, got)
			}
		}
		g.say("out")
		c := h.accept()
		time.Sleep(301 * time.Second)
		c.give("in")
		g.expectNothing()
		if c.closedAt().IsZero() {
			t.Error("the socket is open after 301 s")
		}
	})
}

func TestN05_Refresh(t *testing.T) {
	udpInBubble(t, Config{UDPIdleTimeout: 2 * time.Minute}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("x")
		c := h.accept()
		c.expect(t, "x")
		for range 36 {
			time.Sleep(100 * time.Second)
			g.say("y")
			c.expect(t, "y")
		}
		c.give("in")
		g.expect("in")
		g.expectStats(map[string]int{"dialed": 1, "flows": 1})
	})
}

// TestN06_SameNetwork: hosts in the guest's own network are behind the stack like
// any other.
func TestN06_SameNetwork(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		neighbour := netip.MustParseAddrPort(map[int]string{4: "10.0.2.77:80", 6: "[fd00::77]:80"}[fam.version])
		g := m.open(1025, neighbour)
		g.connect()
		g.data("hello")
		expectText(t, h.accept(), "hello")
		m.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 4000), neighbour, []byte("hello")))
		synctest.Wait()
		calls := h.dials()
		if len(calls) != 2 || calls[0].address != neighbour.String() || calls[1].address != neighbour.String() {
			t.Errorf("dialed %+v", calls)
		}
	})
}

// gatewayBait is what protocol helpers of NATs look for and change.
var gatewayBait = []string{
	"PORT 10,0,2,15,4,1\r\n",
	"227 Entering Passive Mode (10,0,2,15,200,10)\r\n",
	"EPRT |1|10.0.2.15|1025|\r\n",
	"PRIVMSG x :\x01DCC SEND file 167772687 1025 99\x01\r\n",
	"INVITE sip:a@10.0.2.15 SIP/2.0\r\nVia: SIP/2.0/UDP 10.0.2.15:5060\r\nContact: <sip:b@10.0.2.15:5060>\r\n\r\nc=IN IP4 10.0.2.15\r\nm=audio 49170 RTP/AVP 0\r\n",
	"\x03\x00\x00\x20\x08\x02\x00\x01\x0a\x00\x02\x0f\x04\x01",
	"1025, 6667 : USERID : UNIX : root\r\n",
	"1025 , 21\r\n",
}

func TestN09_NoGateway(t *testing.T) {
	ports := []uint16{21, 113, 554, 1720, 5060, 6667, 544, 514}
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		for _, port := range ports {
			g := m.open(1025, fam.at(port))
			g.connect()
			far := h.accept()
			for _, text := range gatewayBait {
				g.data(text)
				expectText(t, far, text)
				putText(t, far, text)
				g.expectText(text)
			}
		}
	})
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		for _, port := range append(ports, 67, 69, 5351) {
			g.to = fam.at(port)
			g.say("first")
			c := h.accept()
			c.expect(t, "first")
			for _, text := range gatewayBait {
				g.say(text)
				c.expect(t, text)
				c.give(text)
				g.expect(text)
			}
		}
	})
}

// TestN10_Deterministic does the same a hundred times, and compares.
func TestN10_Deterministic(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		var want []string
		for round := range 100 {
			var got []string
			note := func(format string, args ...any) { got = append(got, fmt.Sprintf(format, args...)) }
			m, h := newRig(t, Config{MaxTCPFlows: 4, MaxUDPFlows: 3, Allow: func(_ context.Context, f Flow) error {
				switch f.Destination.Port() % 4 {
				case 1:
					return ErrProhibited
				case 2:
					return dialError(syscall.ECONNREFUSED)
				}
				return nil
			}})
			h.setDial(func(_ context.Context, f Flow) (net.Conn, error) {
				if f.Network == "udp" {
					return newMemConn(), nil
				}
				return h.connect(), nil
			})
			mustListen(t, m.s, "tcp", fam.at(443).String())
			take := m.keepFrames()
			for i := range uint16(40) {
				from, to := netip.AddrPortFrom(fam.guest, 2000+i%7), fam.at(80+i%5)
				switch i % 5 {
				case 0:
					m.mustSend(udpPacket(from, to, []byte("x")))
				case 1:
					m.mustSend(fam.ping(to.Addr(), i, 1, nil))
				case 2:
					m.open(2000+i, fam.at(443)).syn()
				case 3:
					m.open(2000+i, to).raw(".", 1, 1, nil, nil)
				default:
					m.open(2000+i, to).syn()
				}
				synctest.Wait()
				for _, frame := range take() {
					b := frame[14:]
					if off, ok := tcpOffset(b); ok {
						note("%d: TCP flags %#x", i, b[off+13])
					} else {
						note("%d: %d bytes, %x", i, len(b), b[len(b)-min(len(b), 12):])
					}
				}
			}
			for _, call := range h.dials() {
				note("dial %v", call.flow)
			}
			st := m.s.Stats()
			note("%+v", st)
			m.s.Close()
			if round == 0 {
				want = got
			} else if !slices.Equal(got, want) {
				t.Fatalf("round %d:\n%s\nwant\n%s", round, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	})
}

// TestN18_IdleTCP: a guest that answers probes keeps its connection for two hours
// and more.
func TestN18_IdleTCP(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		end := time.Now().Add(2*time.Hour + 3*time.Minute)
		for time.Now().Before(end) {
			if seg, ok := g.next(time.Until(end)); ok {
				g.check(seg, ".")
				g.ack()
			}
		}
		g.data("still here")
		expectText(t, far, "still here")
		putText(t, far, "so are we")
		g.expectText("so are we")
	})
}

func TestN20_PingsApart(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		other := newMachine(t, m.s)
		other.ns = 1
		for seq := range uint16(3) {
			for i, g := range []*machine{m, other} {
				take := g.keepFrames()
				req := fam.ping(fam.server, 7, seq+1, []byte(fmt.Sprint("guest ", i)))
				g.mustSend(req)
				frames := take()
				if len(frames) != 1 {
					t.Fatalf("%d answers", len(frames))
				}
				hl := len(req) - 8 - len("guest 0")
				got, want := frames[0][14+hl:], req[hl:]
				if got[0] == want[0] || !bytes.Equal(got[4:], want[4:]) {
					t.Errorf("answer % x to % x", got, want)
				}
			}
		}
	})
}

// TestN21_CraftedErrors has ICMP errors about a SYN: with a wrong checksum, and with
// options and wrong sums where they do not matter.
func TestN21_CraftedErrors(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		at := netip.AddrPortFrom(fam.guest, 22)
		m.s.AddRoute(0, netip.PrefixFrom(fam.guest, 8), m.mac, m.gw, m.write)
		proto, _ := fam.icmpOf()
		head := []byte{3, 3, 0, 0, 0, 0, 0, 0}
		if fam.version == 6 {
			head[0], head[1] = 1, 4
		}
		// longer puts 8 bytes of options behind the IP header of a packet.
		longer := func(p []byte) []byte {
			if fam.version == 4 {
				p = slices.Concat(p[:20], []byte{1, 1, 1, 1, 7, 3, 4, 0}, p[20:])
				p[0] = 0x47
				binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
				p[10], p[11] = 0, 0
				return p
			}
			p = slices.Concat(p[:40], extHeader(int(p[6]), 0), p[40:])
			binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
			p[6] = 60
			return p
		}
		for _, test := range []struct {
			name  string
			taken bool
			build func(quote []byte) []byte
		}{
			{"a wrong checksum", false, func(quote []byte) []byte {
				p := refPacket(fam.other, fam.stack, proto, append(head, quote...), 2)
				p[len(p)-len(quote)-6] ^= 0x40
				return p
			}},
			{"options in front", true, func(quote []byte) []byte {
				return longer(refPacket(fam.other, fam.stack, proto, append(head, quote...), 2))
			}},
			{"options in the quote", true, func(quote []byte) []byte {
				return refPacket(fam.other, fam.stack, proto, append(head, longer(quote)...), 2)
			}},
			{"options in the quote, cut off", false, func(quote []byte) []byte {
				n := len(longer(quote)) - len(quote) + 20
				if fam.version == 6 {
					n += 20
				}
				return refPacket(fam.other, fam.stack, proto, append(head, longer(quote)[:n-5]...), 2)
			}},
			{"a wrong sum in the quoted segment", true, func(quote []byte) []byte {
				off, _ := tcpOffset(quote)
				quote[off+16] ^= 0x55
				return refPacket(fam.other, fam.stack, proto, append(head, quote...), 2)
			}},
			{"the least quote", true, func(quote []byte) []byte {
				off, _ := tcpOffset(quote)
				return refPacket(fam.other, fam.stack, proto, append(head, quote[:off+8]...), 2)
			}},
		} {
			ctx, cancel := context.WithCancel(t.Context())
			d := startDial(ctx, m.s, "tcp", at.String())
			_, syn := m.toGuest(at)
			m.mustSend(test.build(syn.packet()))
			synctest.Wait()
			if taken := len(d) == 1; taken != test.taken {
				t.Errorf("%s: taken %v", test.name, taken)
			}
			cancel()
			if r := <-d; test.taken && !errors.Is(r.err, syscall.ECONNREFUSED) {
				t.Errorf("%s: %v", test.name, r.err)
			}
			m.flows = make(map[flowID]*flowCheck)
		}
	})
}

// TestN22_FullTable has a hundred flows, and a thousand that find no room.
func TestN22_FullTable(t *testing.T) {
	udpInBubble(t, Config{MaxUDPFlows: 100, MaxTCPFlows: 100}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		var conns []*memConn
		for i := range uint16(100) {
			g.sayFrom(4000+i, "x")
			conns = append(conns, h.accept())
		}
		g.expectNothing()
		start := g.s.Stats()
		for i := range uint16(1000) {
			g.sayFrom(10000+i, "y")
		}
		synctest.Wait()
		g.mu.Lock()
		icmp := g.icmp
		g.icmp = nil
		g.mu.Unlock()
		want := map[int][2]byte{4: {3, 13}, 6: {1, 1}}[fam.version]
		for _, msg := range icmp {
			if [2]byte{msg.typ, msg.code} != want {
				t.Errorf("ICMP %d %d, want %v", msg.typ, msg.code, want)
			}
		}
		st := g.s.Stats()
		if n := len(icmp); n == 0 || n > icmpErrorBurst || st.DropTooManyFlows-start.DropTooManyFlows != 1000 || st.UDPFlows != 100 || len(h.dials()) != 100 {
			t.Errorf("%d errors, %d dials, %+v", n, len(h.dials()), st)
		}
		for i, c := range conns {
			c.give(fmt.Sprint(i))
			if got := g.hearAt(4000 + uint16(i)); got != fmt.Sprint(i) {
				t.Errorf("flow %d: %q", i, got)
			}
		}
	})
	eachEnd(t, Config{MaxTCPFlows: 1}, func(t *testing.T, g *guest, far farEnd) {
		for i := range uint16(1000) {
			g.open(2000+i, g.id.host).raw("S", 0, 0, nil, nil)
		}
		synctest.Wait()
		if st := g.s.Stats(); st.TCPFlows != 1 || st.DropTooManyFlows != 1000 {
			t.Errorf("%+v", st)
		}
		g.data("still here")
		expectText(t, far, "still here")
	})
}

func TestN23_PingGateway(t *testing.T) {
	for _, mtu := range []int{1280, 1500, 65535} {
		inBubble(t, func(t *testing.T, fam family) {
			m, _ := newRig(t, Config{MTU: mtu})
			take := m.keepFrames()
			for _, n := range []int{0, 1, 8, 56, 1000, 1232, 1452, 1472, 1473, 4000, 9000, 32768, 65507} {
				req := fam.ping(fam.stack, 0x1234, 7, pattern(n))
				if fam.version == 4 {
					req[8], req[10], req[11] = 3, 0, 0
				} else {
					req[7] = 3
				}
				m.mustSend(req)
				frames := take()
				for _, f := range frames { // mustReassemble has MACs of its own
					copy(f, testLink.guest[:])
					copy(f[6:], testLink.gw[:])
				}
				p := mustReassemble(t, frames, mtu)
				if p.src.addr() != fam.stack || p.dst.addr() != fam.guest || p.ttl != 64 || !bytes.Equal(p.payload[4:], req[len(req)-n-4:]) {
					t.Errorf("MTU %d, %d bytes: from %v, TTL %d, %d bytes", mtu, n, p.src.addr(), p.ttl, len(p.payload))
				}
			}
		})
	}
}

// TestN26_LateDatagram gives datagrams to sockets that were closed.
func TestN26_LateDatagram(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		g.say("a")
		a := h.accept()
		time.Sleep(61 * time.Second)
		g.say("b") // the same ports, another socket
		b := h.accept()
		g.sayFrom(4001, "c")
		h.accept()
		a.give("late")
		g.expectNothing()
		b.give("for b")
		g.expect("for b")
		g.expectNothing()
	})
}

// TestN27_ExternalPorts looks at the ports that the host's kernel chooses.
func TestN27_ExternalPorts(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("another kernel may choose its ports in sequence")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		g := newUDPGuest(newMachine(t, New()), fam.guest, to)
		n := soak(200, 1000)
		buf := make([]byte, 100)
		var before uint16
		inSequence := 0
		for i := range uint16(n) {
			g.sayFrom(4000+i, "x")
			_, peer, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			if d := peer.Port() - before; d == 1 || d == 2 {
				inSequence++
			}
			before = peer.Port()
		}
		if inSequence > n/10 {
			t.Errorf("%d of %d ports follow the one before", inSequence, n)
		}
	})
}

// TestN28_Identifications sends ten thousand datagrams in fragments, in no time.
func TestN28_Identifications(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g, h := newUDPRig(t, families[0], Config{})
		var mu sync.Mutex
		seen := make(map[uint16]int)
		g.setHook(func(frame []byte) error {
			if bits := binary.BigEndian.Uint16(frame[14+6:]); bits&0x3fff == 0x2000 { // the first of several
				mu.Lock()
				seen[binary.BigEndian.Uint16(frame[14+4:])]++
				mu.Unlock()
			}
			return nil
		})
		g.say("x")
		c := h.accept()
		const n = 10_000
		for range n {
			c.give(string(pattern(1600)))
			synctest.Wait()
		}
		if len(seen) != n {
			t.Errorf("%d identifications for %d datagrams in no time (RFC 6864 section 4.3)", len(seen), n)
		}
	})
}

// ping4 is an echo request with IPv4 options, whose header length may be a lie.
func ping4(options []byte, ihl int) []byte {
	p := families[0].ping(families[0].server, 1, 2, []byte("ping"))
	p = slices.Concat(p[:20], options, p[20:])
	p[0] = 0x40 | byte(ihl)
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[10], p[11] = 0, 0
	return p
}

// TestN30_Options: options are skipped, and never sent back: the checker of the
// machine wants headers of 20 bytes.
func TestN30_Options(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := newRig(t, Config{})
		pad := func(b ...byte) []byte {
			for len(b)%4 != 0 {
				b = append(b, 0)
			}
			return b
		}
		for name, options := range map[string][]byte{
			"none":         nil,
			"NOP":          {1, 1, 1, 1},
			"EOL":          {0, 0xff, 0xff, 0xff},
			"record route": pad(7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0),
			"timestamp":    pad(68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0),
			"router alert": {148, 4, 0, 0},
			"unknown":      pad(30, 5, 1, 2, 3),
			"all there is": bytes.Repeat([]byte{1}, 40),
		} {
			p := ping4(options, 5+len(options)/4)
			m.mustSend(p)
			m.mu.Lock()
			icmp := m.icmp
			m.icmp = nil
			m.mu.Unlock()
			if len(icmp) != 1 || string(icmp[0].body) != "ping" {
				t.Errorf("%s: %v", name, icmp)
			}
		}
		for ihl := range 16 {
			p := ping4(bytes.Repeat([]byte{1}, 40), ihl)
			err := m.send(p)
			if want := map[bool]error{true: ErrIHL}[ihl < 5]; err != want {
				t.Errorf("IHL %d: %v, want %v", ihl, err, want)
			}
			if ihl > 5 {
				p[2], p[3] = 0, byte(4*ihl-1)
				if err := m.send(p); err != ErrIPv4TotalLength {
					t.Errorf("IHL %d, total length below it: %v", ihl, err)
				}
			}
		}
	})
}

// TestN30_BadOptions: a source route that is not used up makes this node a router of
// it, and options that lie about their length make no sense.
func TestN30_BadOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, h := newRig(t, Config{})
		port := uint16(1025)
		for name, options := range map[string][]byte{
			"loose source route":  {131, 7, 4, 10, 0, 2, 2, 0},
			"strict source route": {137, 7, 4, 10, 0, 2, 2, 0},
			"length 0":            {7, 0, 4, 0},
			"length 1":            {7, 1, 4, 0},
			"length beyond":       {7, 9, 4, 0},
			"no length":           {1, 1, 1, 7},
		} {
			m.mustSend(ping4(options, 5+len(options)/4))
			port++
			from := netip.AddrPortFrom(families[0].guest, port)
			syn := segment{src: from, dst: families[0].at(80), flags: flagS, win: 1000}.packet()
			syn = slices.Concat(syn[:20], options, syn[20:])
			syn[0] = 0x45 + byte(len(options)/4)
			binary.BigEndian.PutUint16(syn[2:], uint16(len(syn)))
			syn[10], syn[11] = 0, 0
			m.flow(flowID{from, families[0].at(80)}).offered(&segment{flags: flagS})
			m.mustSend(syn)
			synctest.Wait()
			m.mu.Lock()
			replies := 0
			for _, msg := range m.icmp {
				if msg.typ == 0 {
					replies++
				}
			}
			m.icmp = nil
			m.mu.Unlock()
			if n := len(h.dials()); n > 0 || replies > 0 {
				t.Errorf("%s: %d replies, %d dials", name, replies, n)
			}
			h.mu.Lock()
			h.calls = nil
			h.mu.Unlock()
		}
	})
}

// TestN41_ExtensionHeaders has chains of extension headers in front of a ping.
func TestN41_ExtensionHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := newRig(t, Config{})
		fam := families[1]
		whole := fam.ping(fam.server, 1, 2, []byte("ping"))
		try := func(name string, want bool, next byte, headers []byte) {
			t.Helper()
			p := slices.Concat(whole[:40], headers, whole[40:])
			binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
			p[6] = next
			m.mustSend(p)
			m.mu.Lock()
			got := false
			for _, msg := range m.icmp {
				got = got || msg.typ == 129 && string(msg.body) == "ping"
			}
			m.icmp = nil
			m.mu.Unlock()
			if got != want {
				t.Errorf("%s: answered %v", name, got)
			}
			time.Sleep(time.Second) // for the errors there may be
		}
		for _, n := range []int{0, 1, 2, 7, 8, 9, 10, 100, 1000} {
			var headers []byte
			next := byte(58)
			for range n {
				headers = append(extHeader(int(next), 0), headers...)
				next = 60
			}
			try(fmt.Sprint(n, " headers"), n <= 8, next, headers)
		}
		for n := range 256 { // PadN of every length in a header that is as long
			size := (2 + 2 + n + 7) &^ 7
			b := make([]byte, size)
			b[0], b[1], b[2], b[3] = 58, byte(size/8-1), 1, byte(n)
			try(fmt.Sprint("PadN ", n), true, 60, b)
			b[3] = byte(min(size-4+1, 255))
			if int(b[3]) > size-4 {
				try(fmt.Sprint("PadN ", n, " beyond its header"), false, 60, b)
			}
		}
		options := make([]byte, 2048)
		options[0], options[1] = 58, 255
		try("2046 options", false, 60, options)
		for i := 2; i+1 < len(options); i += 2 {
			options[i], options[i+1] = 0x1e, 0
		}
		try("1023 options", false, 60, options)
		for _, n := range []int{1, 8, 63, 64, 65, 66, 255} { // the first n-1 of any kind, and padding
			size := (2 + 2*n + 8) &^ 7
			b := make([]byte, size)
			b[0], b[1] = 58, byte(size/8-1)
			for i := range n {
				b[2+2*i] = 0x1e
			}
			last := 2 * n // of the options
			b[last], b[last+1] = 1, byte(size-last-2)
			try(fmt.Sprint(n, " options"), n <= 64, 60, b)
		}
		try("a header beyond the packet", false, 60, []byte{58, 255, 1, 4, 0, 0, 0, 0})
		try("hop-by-hop behind another", false, 60, append(extHeader(0, 0), extHeader(58, 0)...))
	})
}

// TestN45_FragmentedSolicitation: RFC 6980 section 5 wants neighbour discovery in
// fragments ignored, also in the one of an atomic fragment.
func TestN45_FragmentedSolicitation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := newRig(t, Config{})
		whole := solicit("fd00::2")
		m.mustSend(whole)
		if m.takeICMP().typ != ICMPv6TypeNeighborAdvertisement {
			t.Error("a whole solicitation is not answered")
		}
		for _, more := range []bool{false, true} {
			p := slices.Concat(whole[:40], fragHeader(58, 0, more), whole[40:])
			p[5] += 8
			p[6] = 44
			m.mustSend(p)
			m.mu.Lock()
			n := len(m.icmp)
			m.icmp = nil
			m.mu.Unlock()
			if n != 0 {
				t.Errorf("a solicitation behind a Fragment header (more: %v) is answered", more)
			}
		}
	})
}

func TestN55_Boundaries(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		rng := rand.New(rand.NewPCG(55, uint64(fam.version)))
		all := string(pattern(1472))
		g.say("x")
		c := h.accept()
		c.expect(t, "x")
		for i := range soak(3000, 1_000_000) {
			text := all[rng.IntN(len(all)):]
			g.say(text)
			c.expect(t, text)
			text = all[:rng.IntN(len(all)+1)]
			c.give(text)
			g.expect(text)
			if i%1000 == 0 {
				g.mu.Lock()
				g.udp, g.kept = nil, nil
				g.mu.Unlock()
			}
		}
		g.expectNothing()
	})
}

// TestS42_Land sends packets whose source is their destination.
func TestS42_Land(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		mustListen(t, m.s, "tcp", ":80")
		for _, addr := range []netip.Addr{fam.server, fam.guest} {
			at := netip.AddrPortFrom(addr, 81)
			for _, flags := range []byte{flagS, flagA, flagS | flagA, flagF | flagA, flagR} {
				m.mustSend(segment{src: at, dst: at, flags: flags, win: 1000}.packet())
			}
		}
		m.quiet(time.Minute)
		if st := m.s.Stats(); len(h.dials()) != 0 || st.TCPFlows != 0 {
			t.Errorf("%d dials, %+v", len(h.dials()), st)
		}
		// To a listener.
		for _, addr := range []netip.Addr{fam.server, fam.stack} {
			at := netip.AddrPortFrom(addr, 80)
			for range 10 {
				m.mustSend(segment{src: at, dst: at, flags: flagS, win: 1000}.packet())
			}
		}
		m.quiet(10 * time.Minute)
		if st := m.s.Stats(); st.TCPFlows != 0 {
			t.Errorf("%+v", st)
		}
	})
}

// TestS42_LandUDP is the same with datagrams.
func TestS42_LandUDP(t *testing.T) {
	udpInBubble(t, Config{}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		for _, addr := range []netip.Addr{fam.server, fam.stack, fam.guest} {
			at := netip.AddrPortFrom(addr, 80)
			g.mustSend(udpPacket(at, at, []byte("x")))
		}
		g.expectNothing()
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
	})
}

// TestS40_SourcePolicy has a policy that knows the addresses of its guest.
func TestS40_SourcePolicy(t *testing.T) {
	udpInBubble(t, Config{Allow: func(_ context.Context, f Flow) error {
		for _, fam := range families {
			if f.Source.Addr() == fam.guest {
				return nil
			}
		}
		return ErrDrop
	}}, func(t *testing.T, fam family, g *udpGuest, h *udpHost) {
		for i, addr := range []netip.Addr{fam.other, fam.stack, fam.loopback, fam.server} {
			m := g.machine
			m.mustSend(udpPacket(netip.AddrPortFrom(addr, 4000), netip.AddrPortFrom(fam.server, 54), []byte("x")))
			m.openFrom(netip.AddrPortFrom(addr, 2000+uint16(i)), fam.at(80)).syn()
		}
		g.expectNothing()
		g.expectStats(map[string]int{"policy": 8, "flows": 0, "dialed": 0})
		g.say("x")
		h.accept().expect(t, "x")
	})
}

// TestN08_Hairpin has two guests meet at the ports of their mappings.
func TestN08_Hairpin(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, to := udpServer(t, fam, 0)
		s, err := NewWithConfig(Config{UDPMapping: UDPMappingEndpoint})
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		var guests [2]*udpGuest
		var ports [2]netip.AddrPort
		for i := range guests {
			guests[i] = newUDPGuest(newMachine(t, s), fam.guest, to)
			guests[i].ns = uintptr(i)
			guests[i].say("x")
			_, peer, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			ports[i] = netip.AddrPortFrom(to.Addr(), peer.Port())
		}
		a, b := guests[0], guests[1]
		a.to, b.to = ports[1], ports[0]
		a.say("from a")
		b.expect("from a") // by the port that the server has seen of a
		b.say("from b")
		a.expect("from b")
	})
}

// TestS49_Hairpin dials a host whose port leads back into the guest.
func TestS49_Hairpin(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		server := netip.AddrPortFrom(fam.guest, 22)
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			return m.s.DialContext(ctx, "tcp", server.String())
		})
		g := m.open(1025, fam.at(2222))
		g.syn()
		back, _ := m.toGuest(server)
		g.silent(500 * time.Millisecond) // not before the other side is connected
		back.accept()
		g.expect("S.")
		g.ack()
		g.data("hello")
		back.expectText("hello")
		back.data("world")
		g.expectText("world")
		g.fin()
		back.expectFIN()
		back.fin()
		g.expectFIN()
		time.Sleep(2 * time.Minute)
		if n := len(h.dials()); n != 1 {
			t.Errorf("%d dials", n)
		}
		m.expectFlows(0)
	})
}

// TestS51_PlaysRouter has a guest send what routers and servers of a network send.
func TestS51_PlaysRouter(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		fam := families[0]
		var packets [][]byte
		if g.id.host.Addr().Is6() {
			fam = families[1]
			allNodes, router := netip.MustParseAddr("ff02::1"), fam.stack
			target := router.AsSlice()
			lladdr := []byte{2, 1, 2, 0, 0, 0, 0, 9}
			for _, body := range [][]byte{
				append([]byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}, lladdr...),                     // router advertisement
				slices.Concat([]byte{136, 0, 0, 0, 0xe0, 0, 0, 0}, target, lladdr),                               // neighbour advertisement
				slices.Concat([]byte{137, 0, 0, 0, 0, 0, 0, 0}, fam.other.AsSlice(), g.id.host.Addr().AsSlice()), // redirect
			} {
				for _, src := range []netip.Addr{router, fam.guest, netip.MustParseAddr("fe80::9")} {
					for _, dst := range []netip.Addr{allNodes, fam.stack, fam.guest} {
						p := refPacket(src, dst, 58, body, 2)
						p[7] = 255
						packets = append(packets, p)
					}
				}
			}
			packets = append(packets, udpPacket(netip.MustParseAddrPort("[fe80::9]:547"), netip.MustParseAddrPort("[ff02::1:2]:546"), make([]byte, 100)))
		} else {
			quote := g.segmentAt(".", g.nxt, g.rcv, nil).packet()[:28]
			for code := range byte(4) {
				packets = append(packets, refPacket(fam.stack, fam.guest, 1, slices.Concat([]byte{5, code, 0, 0}, fam.other.AsSlice(), quote), 2))
			}
			packets = append(packets,
				refPacket(fam.stack, netip.MustParseAddr("224.0.0.1"), 1, []byte{9, 0, 0, 0, 1, 2, 0, 60, 10, 0, 2, 9, 0, 0, 0, 0}, 2),
				udpPacket(netip.MustParseAddrPort("0.0.0.0:68"), netip.MustParseAddrPort("255.255.255.255:67"), make([]byte, 300)),
				udpPacket(netip.MustParseAddrPort("10.0.2.2:67"), netip.MustParseAddrPort("255.255.255.255:68"), make([]byte, 300)))
		}
		for _, p := range packets {
			g.mustSend(p)
		}
		g.quiet(time.Second)
		g.data("still here")
		expectText(t, far, "still here")
		putText(t, far, "so are we")
		g.expectText("so are we") // by the guest's MAC, as the checker sees
	})
}

// TestS52_PortsUsedAgain ends connections in the middle of everything, and uses
// their ports again at once.
func TestS52_PortsUsedAgain(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		for i := range soak(300, 25_000) {
			g.win = 65535
			far := dial(g)
			tag := fmt.Sprintf("%08d", i)
			up, down := strings.Repeat(tag, 10), strings.Repeat(tag, 100)
			g.data(up)
			expectText(t, far, up)
			putText(t, far, down)
			g.expectText(down)
			g.data("unread by the far end " + tag)
			g.win = 0
			g.ack()
			putText(t, far, "never taken by the guest "+tag)
			g.must(g.raw("P.", g.nxt+3, g.rcv, nil, []byte("out of order "+tag)))
			synctest.Wait()
			g.drop()
			g.rst()
			if n := m.s.Stats().TCPFlows; n != 0 {
				t.Fatalf("%d flows", n)
			}
			go far.Close()
			g.iss += 100_000
			if i%1000 == 0 {
				m.mu.Lock()
				m.kept = nil
				m.mu.Unlock()
			}
		}
	})
}

// TestS53_NoHostListener: nothing in the library listens on an address of the host
// for others to connect to. (The ListenConfig is that of Config.ListenPacket, for what
// guests send.)
func TestS53_NoHostListener(t *testing.T) {
	checked := 0
	for _, pattern := range []string{"*.go", "internal/hostio/*.go", "internal/tcp/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range files {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				t.Fatal(err)
			}
			checked++
			ast.Inspect(f, func(n ast.Node) bool {
				sel, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				pkg, ok := sel.X.(*ast.Ident)
				if ok && (pkg.Name == "net" || pkg.Name == "syscall") && strings.HasPrefix(sel.Sel.Name, "Listen") &&
					sel.Sel.Name != "Listener" && sel.Sel.Name != "ListenConfig" {
					t.Errorf("%s: %s.%s", path, pkg.Name, sel.Sel.Name)
				}
				return true
			})
		}
	}
	if checked < 15 {
		t.Errorf("%d files", checked)
	}
}

// countLog counts the records of each message, and looks at their values.
type countLog struct {
	mu    sync.Mutex
	count map[string]int
	text  bytes.Buffer
}

func (l *countLog) Enabled(context.Context, slog.Level) bool { return true }
func (l *countLog) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *countLog) WithGroup(string) slog.Handler            { return l }
func (l *countLog) Handle(_ context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count[r.Message]++
	fmt.Fprintf(&l.text, "%s", r.Message)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&l.text, " %s=%v", a.Key, a.Value)
		return true
	})
	return nil
}

// TestS54_Log: nothing that the guest says is in the log but the numbers that name
// a flow.
func TestS54_Log(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		log := &countLog{count: make(map[string]int)}
		m, h := newRig(t, Config{Logger: slog.New(log)})
		bait := "\x1b[31m\nlevel=ERROR %s\x00"
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		g.data(bait)
		expectText(t, far, bait)
		g.rst()
		h.setDial(refuse(ErrProhibited))
		for i := range uint16(100) {
			g := m.open(2000+i, fam.at(80))
			g.must(g.raw("S", 0, 0, []byte(bait)[:12], []byte(bait)))
			m.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 2000+i), fam.at(53), []byte(bait)))
			synctest.Wait()
		}
		log.mu.Lock()
		defer log.mu.Unlock()
		if log.text.Len() == 0 {
			t.Error("nothing is logged")
		}
		for _, c := range log.text.String() {
			if c < ' ' || c > '~' {
				t.Fatalf("%q is in the log", c)
			}
		}
		if strings.Contains(log.text.String(), "ERROR") {
			t.Error("the guest's words are in the log")
		}
	})
}

// TestS54_LogRate has a guest that is refused a thousand times a second.
func TestS54_LogRate(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		log := &countLog{count: make(map[string]int)}
		m, h := newRig(t, Config{Logger: slog.New(log)})
		h.setDial(refuse(ErrProhibited))
		for i := range uint16(1000) {
			m.open(2000+i, fam.at(80)).syn()
			time.Sleep(time.Millisecond)
		}
		log.mu.Lock()
		defer log.mu.Unlock()
		for message, n := range log.count {
			if n > 20 {
				t.Errorf("%q is logged %d times in a second", message, n)
			}
		}
	})
}
