package slirp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/KarpelesLab/slirp/internal/hostio"
)

// Datagrams of the host that are read together, and with Config.VirtioNetUSO leave
// together. The host's sockets are real: what a server has sent to one on the loopback
// address is there when the call returns. The guest cuts frames as a kernel does, and
// must get what it would without all that.

// heldGuest is a guest whose Writer can be held, so that datagrams of the host pile up
// behind a frame.
type heldGuest struct {
	*udpGuest
	servers [2]*net.UDPConn
	to      [2]netip.AddrPort
	peers   [2]netip.AddrPort // whom the servers hear

	countMu       sync.Mutex
	counts, calls []int // datagrams in a frame, 0 if it is a fragment; frames in a call
	held, release chan bool
}

// newHeldGuest returns a guest that has sent something to both servers.
func newHeldGuest(t *testing.T, fam family, cfg Config, batch bool) *heldGuest {
	t.Helper()
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	g := &heldGuest{udpGuest: newUDPGuest(newMachine(t, s), fam.guest, netip.AddrPort{})}
	g.setHook(g.count)
	for i := range g.servers {
		g.servers[i], g.to[i] = udpServer(t, fam, 0)
		packet := udpPacket(g.from, g.to[i], []byte("hello"))
		if batch {
			err = g.batch(g.writeBatch, packet)
		} else {
			err = g.send(packet)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, g.peers[i], err = g.servers[i].ReadFromUDPAddrPort(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// writeBatch notes the length of a call.
func (g *heldGuest) writeBatch(frames [][]byte) error {
	g.countMu.Lock()
	g.calls = append(g.calls, len(frames))
	g.countMu.Unlock()
	return g.udpGuest.writeBatch(frames)
}

// count notes what is in a frame, and waits behind it if the Writer is to be held.
func (g *heldGuest) count(frame []byte) error {
	n, ip := 1, frame[14:]
	if g.s.cfg.VirtioNetHeader {
		frames, _ := cutFrame(frame)
		n, ip = len(frames), frame[12+14:]
	}
	if ip[0] == 0x45 && binary.BigEndian.Uint16(ip[6:])&0x3fff != 0 || ip[0]>>4 == 6 && ip[6] == 44 {
		n = 0
	}
	g.countMu.Lock()
	g.counts = append(g.counts, n)
	held, release := g.held, g.release
	g.held = nil
	g.countMu.Unlock()
	g.keep(frame)
	if held != nil {
		close(held)
		<-release
	}
	return nil
}

// hold has a datagram of the first server held, and returns what lets it go.
func (g *heldGuest) hold() (release chan bool) {
	g.t.Helper()
	held, release := make(chan bool), make(chan bool)
	g.countMu.Lock()
	g.held, g.release = held, release
	g.countMu.Unlock()
	g.tell(g.servers[0], g.peers[0], "held")
	<-held
	g.countMu.Lock()
	g.counts, g.calls = nil, nil
	g.countMu.Unlock()
	return release
}

// tell has a server send a datagram.
func (g *heldGuest) tell(server *net.UDPConn, peer netip.AddrPort, text string) {
	g.t.Helper()
	if _, err := server.WriteToUDPAddrPort([]byte(text), peer); err != nil {
		g.t.Fatal(err)
	}
}

// behind has datagrams of these sizes wait behind one of the first server, and looks at
// what the guest gets. Who says which server sends each; nil: the first. It returns in
// how many frames and calls they came.
func (g *heldGuest) behind(sizes, who []int) (counts, calls []int) {
	g.t.Helper()
	if who == nil {
		who = make([]int, len(sizes))
	}
	text := func(i int) string { return string(pattern(sizes[i] + i)[i:]) }
	release := g.hold()
	for i := range sizes {
		g.tell(g.servers[who[i]], g.peers[who[i]], text(i))
	}
	close(release)
	g.expectFrom(g.to[0], "held")
	for i := range sizes {
		g.expectFrom(g.to[who[i]], text(i))
	}
	g.countMu.Lock()
	defer g.countMu.Unlock()
	return g.counts, g.calls
}

// repeat returns n times the same number.
func repeat(n, number int) []int { return slices.Repeat([]int{number}, n) }

func TestUDPTogether(t *testing.T) {
	for _, uso := range []bool{false, true} {
		for _, mapping := range []UDPMapping{UDPMappingPerFlow, UDPMappingEndpoint} {
			for _, batch := range []bool{false, true} {
				for _, reuse := range []bool{false, true} {
					name := fmt.Sprintf("uso=%v/mapping=%v/batch=%v/reuse=%v", uso, mapping, batch, reuse)
					cfg := Config{UDPMapping: mapping, VirtioNetHeader: uso, VirtioNetUSO: uso, ReuseFrames: reuse}
					t.Run(name, func(t *testing.T) {
						eachFamily(t, func(t *testing.T, fam family) { testUDPTogether(t, fam, cfg, batch) })
					})
				}
			}
		}
	}
}

func testUDPTogether(t *testing.T, fam family, cfg Config, batch bool) {
	whole := map[int]int{4: 1500 - 28, 6: 1500 - 48}[fam.version] // the longest that is not cut
	perFrame := 65487 / whole
	for _, test := range []struct {
		sizes, who []int
		frames     []int // how many are in each, with VirtioNetUSO
		once       bool  // a BatchWriter is called once
	}{
		{sizes: []int{100}, frames: []int{1}},
		{sizes: []int{1000, 1000, 1000, 1000, 400}, frames: []int{5}, once: true},
		{sizes: []int{1000, 1000, 1400, 1400, 1399, 1400, 1}, frames: []int{2, 3, 2}, once: true},
		{sizes: []int{400, 400, 300, 300, 200, 301, 300}, frames: []int{3, 2, 2}, once: true},
		{sizes: []int{0, 0, 1, 1, 0, 1}, frames: []int{1, 1, 2, 1, 1}, once: true},
		{sizes: repeat(hostio.MaxSegments+2, 100), frames: []int{hostio.MaxSegments, 2}},
		{sizes: repeat(perFrame+2, whole), frames: []int{perFrame, 2}},
		{sizes: []int{whole, whole, whole + 1, whole + 1, whole + 1, 5}, frames: []int{2, 0, 0, 0, 0, 0, 0, 1}},
		{sizes: []int{3000, 1400, 1400, 3000, 0, 65507, 1, 1}, frames: append([]int{0, 0, 0, 2, 0, 0, 0, 1}, append(repeat(45+fam.version/6, 0), 2)...)},
		{sizes: []int{500, 500, 500, 500, 500, 200, 200}, who: []int{0, 0, 1, 1, 0, 0, 1}, frames: []int{2, 2, 2, 1}},
	} {
		if test.who != nil && cfg.UDPMapping != UDPMappingEndpoint {
			continue // each is a flow of its own
		}
		g := newHeldGuest(t, fam, cfg, batch)
		counts, calls := g.behind(test.sizes, test.who)
		switch {
		case !cfg.VirtioNetUSO:
			if slices.Max(counts) > 1 {
				t.Errorf("%v from %v: %v datagrams in the frames, want no more than one", test.sizes, test.who, counts)
			}
		case runtime.GOOS == "windows": // which has no reads that do not wait
		case !slices.Equal(counts, test.frames):
			t.Errorf("%v from %v: %v datagrams in the frames, want %v", test.sizes, test.who, counts, test.frames)
		}
		if batch && runtime.GOOS != "windows" && test.once && !slices.Equal(calls, []int{len(counts)}) {
			t.Errorf("%v from %v: calls with %v frames, want %d", test.sizes, test.who, calls, len(counts))
		}
	}
}

// TestUSOHeader looks at the bytes of the header.
func TestUSOHeader(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g := newHeldGuest(t, fam, virtio(Config{VirtioNetUSO: true}), false)
		var headers []string
		g.setHook(func(frame []byte) error {
			g.countMu.Lock()
			headers = append(headers, fmt.Sprintf("% x", frame[:12]))
			g.countMu.Unlock()
			return g.count(frame)
		})
		g.behind([]int{1000, 1000, 7, 1400, 4000}, nil)
		alone := "00 00 00 00 00 00 00 00 00 00 01 00"
		together := "01 05 2a 00 e8 03 22 00 06 00 01 00"
		if fam.version == 6 {
			together = "01 05 3e 00 e8 03 36 00 06 00 01 00"
		}
		g.countMu.Lock()
		defer g.countMu.Unlock()
		if want := []string{alone, together, alone, alone, alone, alone}; !slices.Equal(headers, want) {
			t.Errorf("headers %q, want %q", headers, want)
		}
	})
}

// Only who the guest has sent to may send to it, and what is dropped between datagrams
// does not end up in a frame with them.
func TestUSOFilter(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		if fam.version == 6 {
			return // which has one loopback address
		}
		g := newHeldGuest(t, fam, virtio(Config{VirtioNetUSO: true, UDPMapping: UDPMappingEndpoint}), false)
		stranger, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)})
		if err != nil {
			t.Skip(err)
		}
		defer stranger.Close()
		release := g.hold()
		for i, text := range []string{"one", "two", "bad", "six", "ten"} {
			server := g.servers[0]
			if i == 2 {
				server = stranger
			}
			g.tell(server, g.peers[0], text)
		}
		close(release)
		for _, text := range []string{"held", "one", "two", "six", "ten"} {
			g.expectFrom(g.to[0], text)
		}
		g.countMu.Lock()
		defer g.countMu.Unlock()
		if want := []int{2, 2}; !slices.Equal(g.counts, want) {
			t.Errorf("%v datagrams in the frames, want %v", g.counts, want)
		}
		if n := g.s.Stats().DropUDPFilter; n != 1 {
			t.Errorf("%d datagrams are dropped, want 1", n)
		}
	})
}

// TestUSOPathMTU: what is too long for a part of the guest's network is cut to fragments
// and not to datagrams.
func TestUSOPathMTU(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g := newHeldGuest(t, fam, virtio(Config{VirtioNetUSO: true}), false)
		g.behind([]int{1400}, nil)
		g.mustSend(tooBig(fam, fam.other, 1300, udpPacket(g.to[0], g.from, pattern(1400))))
		g.mu.Lock()
		g.mtu = map[int]int{4: 1300, 6: 1296}[fam.version] // all but the last fragment are full
		g.mu.Unlock()
		if counts, _ := g.behind([]int{1000, 1000, 1400, 1400}, nil); !slices.Equal(counts, []int{2, 0, 0, 0, 0}) {
			t.Errorf("%v datagrams in the frames", counts)
		}
	})
}

// TestUSOWriterFails: a frame that is lost is counted, and what is behind it is not lost.
func TestUSOWriterFails(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g := newHeldGuest(t, fam, virtio(Config{VirtioNetUSO: true}), false)
		release := g.hold()
		g.setHook(func(frame []byte) error {
			if len(frame) > 2000 {
				return errDatagramTooLong // of a Writer, it is like any other
			}
			return g.count(frame)
		})
		for _, n := range []int{1000, 1000, 1000, 1001} {
			g.tell(g.servers[0], g.peers[0], string(pattern(n)))
		}
		close(release)
		g.expectFrom(g.to[0], "held")
		g.expectFrom(g.to[0], string(pattern(1001)))
		g.expectStats(map[string]int{"writer": 1, "big": 0})
	})
}

func TestUSOAllocations(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector allocates")
	}
	eachFamily(t, func(t *testing.T, fam family) {
		for _, mapping := range []UDPMapping{UDPMappingPerFlow, UDPMappingEndpoint} {
			server, to := udpServer(t, fam, 0)
			s, err := NewWithConfig(virtio(Config{VirtioNetUSO: true, ReuseFrames: true, UDPMapping: mapping}))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			const size, several = 1000, 20
			arrived := make(chan int, several)
			data := 0
			w := func(frame []byte) error {
				data += len(frame) - VirtioNetHeaderLen - frameHeaderLen(uint16(fam.version)) - udpHeaderLen
				if data == several*size {
					data = 0
					arrived <- len(frame)
				}
				return nil
			}
			packet := udpPacket(netip.AddrPortFrom(fam.guest, 4000), to, pattern(size))
			buf := make([]byte, 2000)
			most := 0.0
			if mapping == UDPMappingEndpoint {
				most = several // the address of each
			}
			n := leastAllocs(200, most, func() {
				if err := s.HandlePacket(0, testLink.guest, testLink.gw, packet, w); err != nil {
					t.Fatal(err)
				}
				n, peer, err := server.ReadFromUDPAddrPort(buf)
				if err != nil {
					t.Fatal(err)
				}
				for range several {
					if _, err := server.WriteToUDPAddrPort(buf[:n], peer); err != nil {
						t.Fatal(err)
					}
				}
				<-arrived
			})
			if n > most {
				t.Errorf("%v allocations for a datagram and %d answers", n, several)
			}
		}
	})
}
