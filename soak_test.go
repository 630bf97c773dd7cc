package slirp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Long runs and large numbers. Every run has a small version of each test; with
// SLIRP_SOAK=1 they are as large as they say, and SLIRP_SOAK_TIME says how long mixed
// traffic goes on, 10 minutes if it is not set.

// The peers are servers in a process of their own, so that the descriptors of this
// one are the Stack's.

const soakPeerEnv = "SLIRP_SOAK_PEER"

// soakPeer is that process. The first byte of a connection says what becomes of it:
// "e" and "E" echo to the end, "c" closes, "r" resets, "h" sends something when the other
// direction has ended.
func soakPeer() {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(l.Addr(), u.LocalAddr())
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := u.ReadFrom(b)
			if err == nil {
				u.WriteTo(b[:n], from)
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err == nil {
				go soakServe(c.(*net.TCPConn))
			}
		}
	}()
	io.Copy(io.Discard, os.Stdin) // until the test has ended
	os.Exit(0)
}

const soakAnswer = 3000 // bytes

func soakServe(c *net.TCPConn) {
	defer c.Close()
	b := make([]byte, 1)
	if _, err := c.Read(b); err != nil {
		return
	}
	switch b[0] {
	case 'e', 'E':
		io.Copy(c, c)
	case 'r':
		c.SetLinger(0)
	case 'h':
		io.Copy(io.Discard, c)
		c.Write(make([]byte, soakAnswer))
	}
}

// startSoakPeer returns the addresses of the peers.
func startSoakPeer(t *testing.T) (tcp, udp string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), soakPeerEnv+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skip("no other process can be started: ", err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if _, scanErr := fmt.Sscan(line, &tcp, &udp); err != nil || scanErr != nil {
		t.Fatalf("the peers say %q: %v", line, err)
	}
	return tcp, udp
}

// usage is what a process takes.
type usage struct {
	heap, stack, resident   int64
	goroutines, descriptors int
}

func takeUsage() usage {
	heap := heapInUse()
	debug.FreeOSMemory()
	var st runtime.MemStats
	runtime.ReadMemStats(&st)
	return usage{heap, int64(st.StackInuse), residentBytes(), runtime.NumGoroutine(), openDescriptors()}
}

// sub returns how much more u is than before, for each of n.
func (u usage) sub(before usage, n int) string {
	k := int64(n)
	return fmt.Sprintf("%d flows: %d bytes of heap, %d of stacks, %d resident, %.2f goroutines, %.2f descriptors for each", n,
		(u.heap-before.heap)/k, (u.stack-before.stack)/k, (u.resident-before.resident)/k,
		float64(u.goroutines-before.goroutines)/float64(n), float64(u.descriptors-before.descriptors)/float64(n))
}

// exceeds reports whether u is more than before by more than n times what each may take,
// but for one goroutine. What is resident is not looked at.
func (u usage) exceeds(before usage, n int, each usage) bool {
	return u.heap-before.heap > int64(n)*each.heap || u.stack-before.stack > int64(n)*each.stack ||
		u.goroutines-before.goroutines > n*each.goroutines+1
}

// soakGuest does handshakes, and remembers nothing.
type soakGuest struct {
	t      *testing.T
	s      *Stack
	synAck chan segment
}

func newSoakGuest(t *testing.T, s *Stack) *soakGuest {
	return &soakGuest{t, s, make(chan segment, 1000)}
}

func (g *soakGuest) write(frame []byte) error {
	if seg, ok := readSegment(frame[14:]); ok && seg.flags&flagS != 0 {
		g.synAck <- seg
	}
	return nil
}

func (g *soakGuest) give(seg segment) {
	if err := g.s.HandlePacket(0, testLink.guest, testLink.gw, seg.packet(), g.write); err != nil {
		g.t.Errorf("HandlePacket: %v", err)
	}
}

// open makes n connections to an address, many at a time.
func (g *soakGuest) open(n int, to netip.AddrPort) {
	g.t.Helper()
	for done := 0; done < n; {
		wave := min(n-done, 100)
		for i := range wave {
			from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 3, byte(done >> 14)}), uint16(1024+(done+i)&0x3fff))
			g.give(segment{src: from, dst: to, seq: 100, flags: flagS, win: 65535, opts: optMSS(1460)})
		}
		for range wave {
			select {
			case seg := <-g.synAck:
				g.give(segment{src: seg.dst, dst: seg.src, seq: 101, ack: seg.seq + 1, flags: flagA, win: 65535})
			case <-time.After(patience):
				g.t.Fatalf("no answer after %d connections: %+v", done, g.s.Stats())
			}
		}
		done += wave
	}
}

// ask sends a datagram in each of n flows to an address, which answers.
func (g *soakGuest) ask(n int, to netip.AddrPort) {
	g.t.Helper()
	answer := make(chan bool)
	for i := range n {
		packet := udpPacket(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 3, 0}), uint16(1024+i)), to, []byte("?"))
		if err := g.s.HandlePacket(0, testLink.guest, testLink.gw, packet, func([]byte) error { answer <- true; return nil }); err != nil {
			g.t.Errorf("HandlePacket: %v", err)
		}
		select {
		case <-answer:
		case <-time.After(patience):
			g.t.Fatalf("no answer after %d datagrams: %+v", i, g.s.Stats())
		}
	}
}

// TestSoakIdleVirtualFlows has 10,000 connections to a listener do nothing, and then
// ends them at once.
func TestSoakIdleVirtualFlows(t *testing.T) {
	n := soak(300, 10_000)
	s, err := NewWithConfig(Config{Backlog: -1, TCPIdleTimeout: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l := mustListen(t, s, "tcp", "192.0.2.80:443")
	g := newSoakGuest(t, s)
	before := takeUsage()
	g.open(n, netip.MustParseAddrPort("192.0.2.80:443"))
	conns := make([]net.Conn, n)
	for i := range conns {
		conns[i] = mustAccept(t, l)
	}
	after := takeUsage()
	t.Log("virtual, ", after.sub(before, n))
	if per := (after.heap - before.heap) / int64(n); per > 8<<10 && !raceEnabled() {
		t.Errorf("%d bytes of heap for an idle connection", per)
	}
	if after.goroutines > before.goroutines+5 {
		t.Errorf("%d goroutines, before %d", after.goroutines, before.goroutines)
	}
	closeSoaked(t, s, n)
	runtime.KeepAlive(conns)
}

// closeSoaked closes a Stack, and says how long that takes. What counts is the time of
// the processors: the machine may have other work.
func closeSoaked(t *testing.T, s *Stack, n int) {
	t.Helper()
	start, used := time.Now(), processorTime()
	s.Close()
	d, used := time.Since(start), processorTime()-used
	t.Logf("Close with %d flows took %v, and %v of the processors", n, d, used)
	if soak(0, 1) == 1 && !raceEnabled() && used > time.Second {
		t.Errorf("Close with %d flows took %v of the processors", n, used)
	}
	if st := s.Stats(); st.TCPFlows != 0 || st.TimeWait != 0 {
		t.Errorf("after Close: %+v", st)
	}
}

// TestSoakIdleNATFlows has 9,000 flows through the NAT do nothing, and then ends them at
// once. With Dial set they may be somebody else's, so each has a goroutine.
func TestSoakIdleNATFlows(t *testing.T) {
	resting := usage{heap: 3 << 10, stack: 2 << 10, resident: 4 << 10, goroutines: 0}
	if runtime.GOOS != "linux" {
		resting = idleGoroutine
	}
	cfg := Config{TCPIdleTimeout: -1, UDPIdleTimeout: -1, MaxUDPFlows: -1}
	t.Run("poller", func(t *testing.T) { soakIdleNATFlows(t, cfg, resting, false) })
	t.Run("UDP", func(t *testing.T) { soakIdleNATFlows(t, cfg, resting, true) })
	cfg.Dial = new(net.Dialer).DialContext
	t.Run("goroutine", func(t *testing.T) { soakIdleNATFlows(t, cfg, idleGoroutine, false) })
}

// idleGoroutine is what an idle flow with a goroutine may take. Its stack takes 2 KiB and its
// part of what no flow uses.
var idleGoroutine = usage{heap: 4 << 10, stack: 3500, resident: 6 << 10, goroutines: 1}

// soakIdleNATFlows checks that idle flows do not take more than so much each.
func soakIdleNATFlows(t *testing.T, cfg Config, limits usage, udp bool) {
	n := soak(200, 9000)
	if err := raiseOpenFiles(uint64(n) + 200); err != nil {
		t.Skip(err)
	}
	tcpPeer, udpPeer := startSoakPeer(t)
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	g := newSoakGuest(t, s)
	before := takeUsage()
	if udp {
		g.ask(n, netip.MustParseAddrPort(udpPeer))
	} else {
		g.open(n, netip.MustParseAddrPort(tcpPeer))
	}
	after := untilSmall(before, n, limits)
	t.Log("NAT, ", after.sub(before, n))
	if st := s.Stats(); st.TCPFlows+st.UDPFlows != n {
		t.Errorf("%+v", st)
	}
	if after.exceeds(before, n, limits) && !raceEnabled() {
		t.Errorf("before %+v, after %+v; each may take %+v", before, after, limits)
	}
	if per := (after.resident - before.resident) / int64(n); per > limits.resident && n >= 9000 && !raceEnabled() {
		t.Errorf("%d bytes resident for an idle connection", per)
	}
	closeSoaked(t, s, n)
	untilUsage(t, before, 0)
}

// untilSmall waits until n flows that are idle now have the goroutines and the stacks that
// they may have, and do not become smaller, and returns what the process takes then.
func untilSmall(before usage, n int, limits usage) usage {
	u := takeUsage()
	for end := time.Now().Add(patience); time.Now().Before(end) && !raceEnabled(); {
		time.Sleep(3 * idleAfter)
		last := u
		u = takeUsage()
		if u.stack >= last.stack && !u.exceeds(before, n, limits) {
			break
		}
	}
	return u
}

// untilUsage waits until goroutines, descriptors and memory are what they were, but
// for some bytes of it.
func untilUsage(t *testing.T, want usage, bytes int64) {
	t.Helper()
	var got usage
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		got = takeUsage()
		same := got.goroutines <= want.goroutines && got.descriptors <= want.descriptors
		if same && (bytes == 0 || got.heap <= want.heap+bytes || raceEnabled()) {
			t.Logf("before %+v, after %+v", want, got)
			return
		}
		if time.Now().After(end) {
			t.Fatalf("before %+v, after %+v; goroutines:\n%.5000s", want, got, otherGoroutines())
		}
	}
}

// soakPair is a guest that has a whole stack of its own, in front of the one that is
// tested. Both have the host's network of this machine.
type soakPair struct {
	t               *testing.T
	client, server  *Stack
	tcp, udp        string // the peers
	errors          atomic.Int32
	cycles, inBytes atomic.Int64
}

func newSoakPair(t *testing.T, cfg Config) *soakPair {
	p := &soakPair{t: t}
	p.tcp, p.udp = startSoakPeer(t)
	var err error
	if p.server, err = NewWithConfig(cfg); err != nil {
		t.Fatal(err)
	}
	p.client = p.newClient(netip.MustParseAddr("10.0.2.15"))
	t.Cleanup(func() { p.client.Close(); p.server.Close() })
	return p
}

// newClient puts a guest in front of the server.
func (p *soakPair) newClient(addr netip.Addr) *Stack {
	client, err := NewWithConfig(Config{Addresses: []netip.Addr{addr}})
	if err != nil {
		p.t.Fatal(err)
	}
	var toServer, toClient Writer
	toServer = func(frame []byte) error {
		return notClosed(p.server.HandlePacket(0, testLink.guest, testLink.gw, frame[14:], toClient))
	}
	toClient = func(frame []byte) error {
		return notClosed(client.HandlePacket(0, testLink.gw, testLink.guest, frame[14:], toServer))
	}
	if err := client.AddRoute(0, netip.MustParsePrefix("0.0.0.0/0"), testLink.gw, testLink.guest, toServer); err != nil {
		p.t.Fatal(err)
	}
	return client
}

// notClosed is err, but nil if the other end is just going away.
func notClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (p *soakPair) fail(what string, err error) {
	if p.errors.Add(1) <= 10 {
		p.t.Errorf("%s: %v", what, err)
	}
}

// cycle opens a connection, uses it, and ends it. Kinds are those of the peer; "d" is
// refused, and "E" the guest resets.
func (p *soakPair) cycle(client *Stack, kind byte, n int) {
	p.cycles.Add(1)
	to := p.tcp
	if kind == 'd' {
		to = "127.0.0.1:1"
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := client.DialContext(ctx, "tcp", to)
	if kind == 'd' {
		if err == nil {
			c.Close()
			p.fail("dial of a closed port", nil)
		}
		return
	}
	if err != nil {
		p.fail("dial", err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := c.Write([]byte{kind}); err != nil {
		p.fail("write", err)
	}
	switch kind {
	case 'e':
		p.echo(c, n)
		c.(*VirtualConn).CloseWrite()
		p.readEnd(c, 0)
	case 'E':
		p.echo(c, n)
		c.(*VirtualConn).SetLinger(0)
	case 'c':
		p.readEnd(c, 0)
	case 'h':
		c.(*VirtualConn).CloseWrite()
		p.readEnd(c, soakAnswer)
	case 'r':
		if _, err := io.Copy(io.Discard, c); err == nil {
			p.fail("read of what was reset", err)
		}
	}
}

// echo sends n bytes and reads them again.
func (p *soakPair) echo(c net.Conn, n int) {
	data := pattern(n)
	go c.Write(data)
	got := make([]byte, n)
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, data) {
		p.fail(fmt.Sprintf("echo of %d bytes, the same: %v", n, bytes.Equal(got, data)), err)
	}
	p.inBytes.Add(int64(n))
}

// readEnd reads to the end, which must come after n bytes.
func (p *soakPair) readEnd(c net.Conn, n int64) {
	if got, err := io.Copy(io.Discard, c); got != n || err != nil {
		p.fail(fmt.Sprintf("read %d bytes to the end, want %d", got, n), err)
	}
}

// run does n cycles of the kinds, some at a time.
func (p *soakPair) run(n int, kinds string) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				p.cycle(p.client, kinds[int(i)%len(kinds)], int(i%3000))
			}
		})
	}
	wg.Wait()
}

// TestSoakCycles opens, uses and ends 100,000 connections: with a FIN of either side,
// a reset of either side, half closed, refused, and left alone by the guest. Nothing
// of them is left.
func TestSoakCycles(t *testing.T) {
	if err := raiseOpenFiles(4000); err != nil {
		t.Skip(err)
	}
	n, left, kinds := soak(500, 100_000), soak(0, 2000), "eEhrd"
	if n > 500 {
		kinds = "eEhrdc" // the last has the Stack wait for a minute
	}
	p := newSoakPair(t, Config{TCPIdleTimeout: time.Second})
	silent := newSoakGuest(t, p.server)
	var before usage
	const waves = 5
	for wave := range waves {
		silent.open(left, netip.MustParseAddrPort(p.tcp)) // whom the keep-alives do not find
		p.run(n/waves-left, kinds)
		p.settle()
		if wave == 0 { // from now on no more at a time than before
			before = takeUsage()
		}
		t.Logf("%d cycles: %+v", n/waves*(wave+1), takeUsage())
	}
	untilUsage(t, before, 2<<20)
	st := p.server.Stats()
	t.Logf("%d host connections, %d refused", st.FlowsDialed, st.FlowsRefused)
}

// settle waits until no connection is left, and gives the guest a new stack. The old
// one stays until then: an acknowledgment that it still owes is lost with it.
func (p *soakPair) settle() {
	p.t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		st := p.server.Stats()
		if st.TCPFlows == 0 && st.UDPFlows == 0 && st.TimeWait == 0 && st.PendingDials == 0 {
			break
		}
		if time.Now().After(end) {
			p.t.Fatalf("flows are left: %+v\n%s\n%.5000s", st, p.server.describe(), otherGoroutines())
		}
	}
	p.client.Close()
	p.client = p.newClient(netip.MustParseAddr("10.0.2.15"))
}

// describe tells what the connections of a Stack are doing.
func (s *Stack) describe() (text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.flows {
		if c, ok := f.(*tcpConn); ok {
			text += c.describe() + "\n"
		}
	}
	for c := range s.draining {
		text += "draining: " + c.describe() + "\n"
	}
	return text
}

func (c *tcpConn) describe() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := fmt.Sprintf("%v to %v, emitting %v pumping %v readDone %v writeDone %v writeErr %v gone %v timer %v", c.key.guestEnd(), c.key.hostEnd(),
		c.emitting, c.pumping, c.readDone, c.writeDone, c.writeErr, c.gone, c.timerAt)
	if c.tcb != nil {
		text += fmt.Sprintf(" %v, deadline %v, %d bytes to read, unsent %v", c.tcb.State(), c.tcb.Deadline(), c.tcb.Buffered(), c.tcb.Unsent())
	}
	return text
}

// TestSoakTraffic has guests do everything at once for a while, with real sockets.
func TestSoakTraffic(t *testing.T) {
	if err := raiseOpenFiles(4000); err != nil {
		t.Skip(err)
	}
	d := time.Duration(soak(300, 600_000)) * time.Millisecond
	if v := os.Getenv("SLIRP_SOAK_TIME"); v != "" && soak(0, 1) == 1 {
		var err error
		if d, err = time.ParseDuration(v); err != nil {
			t.Fatal(err)
		}
	}
	p := newSoakPair(t, Config{})
	before := takeUsage()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 4 {
		client := p.newClient(netip.AddrFrom4([4]byte{10, 0, 4, byte(i + 1)}))
		wg.Go(func() {
			defer client.Close()
			p.traffic(ctx, client, rand.New(rand.NewPCG(uint64(i), 5)))
		})
	}
	wg.Wait()
	st := p.server.Stats()
	t.Logf("%d connections, %d bytes in %v: %+v", p.cycles.Load(), p.inBytes.Load(), d, st)
	if p.cycles.Load() == 0 {
		t.Error("nothing happened")
	}
	p.client.Close()
	p.server.Close()
	untilUsage(t, before, 0)
}

// traffic uses a guest until ctx ends: some programs at a time, each as long as it
// takes.
func (p *soakPair) traffic(ctx context.Context, client *Stack, rnd *rand.Rand) {
	var wg sync.WaitGroup
	defer wg.Wait()
	places := make(chan bool, 8)
	for i := 0; ctx.Err() == nil; i++ {
		places <- true
		kind, n := rnd.IntN(10), rnd.IntN(1<<(4+rnd.IntN(18)))
		wg.Go(func() {
			defer func() { <-places }()
			switch kind {
			case 0:
				p.datagrams(client, n%3000)
			case 1:
				p.listener(client, n%100_000)
			case 2:
				p.ping(n % 1400)
			default:
				p.cycle(client, "eEhrdce"[kind-3], n)
			}
		})
	}
}

// datagrams exchanges some with the peer.
func (p *soakPair) datagrams(client *Stack, n int) {
	c, err := client.DialContext(context.Background(), "udp", p.udp)
	if err != nil {
		p.fail("dial udp", err)
		return
	}
	defer c.Close()
	data, got, answers := pattern(n), make([]byte, 1<<16), 0
	for range 10 { // one or the other may be lost
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write(data)
		k, err := c.Read(got)
		if err == nil && !bytes.Equal(got[:k], data) {
			p.fail(fmt.Sprintf("a datagram of %d bytes is %d others", n, k), nil)
		}
		if err == nil {
			answers++
		}
	}
	if answers == 0 {
		p.fail("no datagram was answered", nil)
	}
}

// listener has a guest call a listener of the Stack.
func (p *soakPair) listener(client *Stack, n int) {
	l, err := p.server.Listen("tcp", "192.0.2.1:0")
	if err != nil {
		p.fail("listen", err)
		return
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	c, err := client.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		p.fail("dial of a listener", err)
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	p.echo(c, n)
	c.(*VirtualConn).CloseWrite()
	p.readEnd(c, 0)
}

// ping wants an answer at once.
func (p *soakPair) ping(n int) {
	answered := false
	fam := families[0]
	err := p.server.HandlePacket(1, testLink.guest, testLink.gw, fam.ping(fam.server, 1, 2, make([]byte, n)), func(frame []byte) error {
		answered = len(frame) == 14+20+8+n
		return nil
	})
	if !answered || err != nil {
		p.fail("no answer to a ping", err)
	}
}

// TestSoakDays has flows of all kinds come and go for 400 days, and two last as long.
func TestSoakDays(t *testing.T) {
	days := soak(3, 400)
	synctest.Test(t, func(t *testing.T) {
		n := newFuzzNet(t, []byte{8, 2, 2, 0, 2, 2})
		n.ops = []byte{0, 2} // to which server
		n.open()
		n.open()
		lasting := n.flows
		var settled int64
		silent := newMachine(t, n.guest.s)
		silent.ns = 1
		for day := range days {
			for hour := range 3 {
				n.day(silent, byte(day+hour))
			}
			for _, f := range lasting {
				for _, p := range []*fuzzPipe{f.up, f.down} {
					p.change(func() { p.want += 100 + day; p.allowed = p.want })
				}
			}
			n.sleep(24*time.Hour + time.Duration(day)*time.Second)
			for _, f := range lasting {
				for _, p := range []*fuzzPipe{f.up, f.down} {
					p.change(func() {
						if p.read != p.want {
							t.Fatalf("day %d: %d bytes of %d: %v %v", day, p.read, p.want, p.writeError, p.readError)
						}
					})
				}
			}
			n.forget(lasting, silent)
			if st := n.guest.s.Stats(); st.TCPFlows != len(lasting) || st.TimeWait != 0 || st.UDPFlows != 0 || st.PendingFragments != 0 {
				t.Fatalf("day %d: %+v", day, st)
			}
			if day == min(days-1, 10) {
				settled = heapInUse()
			}
		}
		grown := heapInUse() - settled
		t.Logf("%d days, %d bytes of memory at first, then %d more; %+v", days, settled, grown, n.guest.s.Stats())
		if grown > 2<<20 && !raceEnabled() {
			t.Errorf("%d bytes more of memory", grown)
		}
		n.flows = lasting
		n.end()
	})
}

// day has one flow of each kind begin and end, or be left alone by a silent guest.
func (n *fuzzNet) day(silent *machine, b byte) {
	fam := families[b&1]
	n.flows = nil
	for i := range byte(3) {
		n.ops = []byte{b + i}
		n.open()
	}
	for i, f := range n.flows {
		f.up.change(func() { f.up.want, f.up.allowed = 5000, 5000 })
		f.down.change(func() { f.down.want, f.down.allowed = 9000, 9000 })
		n.sleep(time.Second)
		switch i {
		case 0:
			f.up.change(func() { f.up.end, f.up.allowed = true, 1<<30 })
			f.down.change(func() { f.down.end, f.down.allowed = true, 1<<30 })
		case 1:
			n.abandon(f, f.up, 8)
		case 2:
			n.abandon(f, f.down, 0)
		}
		n.sleep(time.Second)
		f.leave()
	}
	from := netip.AddrPortFrom(fam.guest, 30000+uint16(b))
	silent.mustSend(fam.ping(fam.server, 1, uint16(b), []byte("ping")))
	parts := fragmentsOf(udpPacket(from, fam.at(53), pattern(3000)), 1400)
	silent.mustSend(parts[int(b)%len(parts)]) // the others never come
	for _, port := range []uint16{80, 443} {
		silent.openFrom(from, fam.at(port)).syn()
	}
	n.sleep(time.Second)
}

// forget drops what the machines know of flows that are over.
func (n *fuzzNet) forget(lasting []*fuzzFlow, more ...*machine) {
	for _, m := range append(more, n.guest, n.server) {
		m.mu.Lock()
		for id, f := range m.flows {
			f.queue, f.stream = nil, nil
			alive := false
			for _, l := range lasting {
				c := l.up.from
				ends := flowID{c.LocalAddr().(*net.TCPAddr).AddrPort(), l.to}
				alive = alive || id == ends || id == flowID{ends.host, ends.guest}
			}
			if !alive {
				delete(m.flows, id)
			}
		}
		m.kept, m.icmp, m.udp = nil, nil, nil
		m.mu.Unlock()
	}
}
