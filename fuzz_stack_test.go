package slirp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Two stacks are joined by a link that a fuzz input rules: it opens connections from
// one to listeners of the other and through its NAT, reads, writes and ends them, has
// the link lose, repeat, hold and garble frames, and lets time pass. The model of a
// connection is the number of bytes that went into each end.

// fuzzNet is the two stacks and what is between them.
type fuzzNet struct {
	t   *testing.T
	ops []byte

	// The machines look at the frames for them: guest at those of the server's
	// stack, and server at those of the guest's.
	guest, server *machine

	mu     sync.Mutex
	queue  [2][][]byte // frames on their way: to the guest, to the server
	arrive chan bool   // there may be frames in queue
	fates  [2][]byte   // of the next frames
	conns  []net.Conn  // accepted by the host or a listener, of the flows to come

	held    [2]bool // frames stay in queue
	batches bool    // the server takes frames in batches
	faults  int     // what connections may break of
	flows   []*fuzzFlow
	drops   int // of HandlePacket's errors
}

// What becomes of a frame.
const (
	fateLose   = iota // on the link
	fateRefuse        // the Writer fails
	fateGarble
	fateRepeat
	fateSwap // with the one before
	fatePass
)

// fuzzFlow is a connection of the guest's, and what is known of it.
type fuzzFlow struct {
	up, down *fuzzPipe // guest to server, server to guest
	to       netip.AddrPort
	broken   bool // a program has ended it before its time
}

// fuzzPipe is one direction of a connection, with a program at either end.
type fuzzPipe struct {
	t          *testing.T
	mu         sync.Mutex
	cond       sync.Cond
	from, to   net.Conn // nil until there are connections
	seed       byte
	want       int  // bytes to be written
	written    int  // that Write has taken, or is about to
	writing    bool // in Write
	end        bool // CloseWrite when all is written
	cut        bool // Close came while a Write was waiting
	over       bool // the programs leave
	allowed    int  // bytes that may be read
	read       int
	eof        bool
	writeError error
	readError  error
}

func (p *fuzzPipe) byteAt(i int) byte { return byte(i) ^ byte(i>>8)*7 ^ p.seed }

// change changes the pipe under its lock.
func (p *fuzzPipe) change(f func()) {
	p.mu.Lock()
	f()
	p.mu.Unlock()
	p.cond.Broadcast()
}

// writer is the program at the front.
func (p *fuzzPipe) writer() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for !p.over && (p.from == nil || p.written == p.want && !p.end) {
			p.cond.Wait()
		}
		if p.over {
			return
		}
		if p.written == p.want {
			p.mu.Unlock()
			p.from.(interface{ CloseWrite() error }).CloseWrite()
			p.mu.Lock()
			return
		}
		b := make([]byte, min(p.want-p.written, 5000))
		for i := range b {
			b[i] = p.byteAt(p.written + i)
		}
		p.written += len(b)
		p.writing = true
		p.mu.Unlock()
		_, err := p.from.Write(b)
		p.mu.Lock()
		p.writing = false
		if err != nil {
			p.writeError = err
			return
		}
	}
}

// reader is the program at the back: what it reads is what was written, and comes to
// an end only where that does.
func (p *fuzzPipe) reader() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for !p.over && (p.to == nil || p.read >= p.allowed) {
			p.cond.Wait()
		}
		if p.over {
			return
		}
		b := make([]byte, min(p.allowed-p.read, 3000))
		p.mu.Unlock()
		n, err := p.to.Read(b)
		p.mu.Lock()
		if p.read+n > p.written {
			p.t.Errorf("%d bytes are read of %d", p.read+n, p.written)
		}
		for i, c := range b[:n] {
			if c != p.byteAt(p.read+i) {
				p.t.Errorf("byte %d is not what was written", p.read+i)
				return
			}
		}
		p.read += n
		if err == io.EOF {
			p.eof = true
			if p.read != p.want && !p.cut || !p.end {
				p.t.Errorf("the end comes after %d of %d bytes, ended: %v", p.read, p.want, p.end)
			}
		}
		if err != nil {
			p.readError = err
			return
		}
	}
}

func newFuzzPipe(t *testing.T, seed byte) *fuzzPipe {
	p := &fuzzPipe{t: t, seed: seed}
	p.cond.L = &p.mu
	go p.writer()
	go p.reader()
	return p
}

// next returns the next byte of the input.
func (n *fuzzNet) next() byte {
	if len(n.ops) == 0 {
		return 0
	}
	b := n.ops[0]
	n.ops = n.ops[1:]
	return b
}

func newFuzzNet(t *testing.T, ops []byte) *fuzzNet {
	n := &fuzzNet{t: t, ops: ops, arrive: make(chan bool, 1)}
	buffer := 1 << (8 + n.next()%9)
	cfg := Config{SendBuffer: 4096 << (n.next() % 5), ReceiveBuffer: 4096 << (n.next() % 5), MTU: []int{1500, 1280, 9000, 1400}[n.next()%4]}
	serverCfg := cfg
	serverCfg.Dial = func(context.Context, string, string) (net.Conn, error) {
		a, b := newHostConns(buffer)
		n.mu.Lock()
		n.conns = append(n.conns, b)
		n.mu.Unlock()
		return a, nil
	}
	cfg.Addresses = []netip.Addr{families[0].guest, families[1].guest}
	cfg.SendBuffer, cfg.ReceiveBuffer = 4096<<(n.next()%5), 4096<<(n.next()%5)
	stack := func(cfg Config) *machine {
		s, err := NewWithConfig(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return newMachine(t, s)
	}
	n.guest, n.server = stack(serverCfg), stack(cfg)
	for _, prefix := range []string{"0.0.0.0/0", "::/0"} {
		if err := n.server.s.AddRoute(0, netip.MustParsePrefix(prefix), n.server.mac, n.server.gw, n.toServer); err != nil {
			t.Fatal(err)
		}
	}
	l := mustListen(t, n.guest.s, "tcp", ":443")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.mu.Lock()
			n.conns = append(n.conns, c)
			n.mu.Unlock()
		}
	}()
	return n
}

func (n *fuzzNet) toGuest(frame []byte) error  { return n.emitted(0, n.guest, frame) }
func (n *fuzzNet) toServer(frame []byte) error { return n.emitted(1, n.server, frame) }

// emitted has a machine look at a frame, and puts it on the link.
func (n *fuzzNet) emitted(way int, m *machine, frame []byte) error {
	b := bytes.Clone(frame)
	if err := m.write(frame); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	fate := byte(fatePass)
	if f := n.fates[way]; len(f) > 0 {
		fate, n.fates[way] = f[0], f[1:]
	}
	switch q := n.queue[way]; fate {
	case fateLose:
		return nil
	case fateRefuse:
		return errors.New("refused")
	case fateRepeat:
		n.queue[way] = append(q, b, bytes.Clone(b))
	case fateSwap:
		n.queue[way] = append(q, b)
		if k := len(q); k > 0 {
			n.queue[way][k-1], n.queue[way][k] = n.queue[way][k], n.queue[way][k-1]
		}
	case fateGarble:
		if garble(b, len(n.ops)) {
			return n.queueLocked(way, b)
		}
	default:
		return n.queueLocked(way, b)
	}
	return n.queueLocked(way, nil)
}

func (n *fuzzNet) queueLocked(way int, frame []byte) error {
	if frame != nil {
		n.queue[way] = append(n.queue[way], frame)
	}
	select {
	case n.arrive <- true:
	default:
	}
	return nil
}

// garble changes a byte of a frame behind the IP header. It reports false if that
// leaves a packet whose checksum says nothing of it.
func garble(frame []byte, at int) bool {
	p := frame[14:]
	proto, b := transportOf(p)
	if len(b) == 0 {
		return false
	}
	b[at%len(b)] ^= 1 << (at % 8)
	var parsed ipPacket
	return parseIP(p, &parsed) == nil && proto != 0 && !checksumOK(&parsed, parsed.payload)
}

// pump carries frames until there are none.
func (n *fuzzNet) pump() {
	for {
		synctest.Wait()
		n.mu.Lock()
		way, count := 1, 1
		if n.held[1] || len(n.queue[1]) == 0 {
			way = 0
		}
		if n.held[way] || len(n.queue[way]) == 0 {
			n.mu.Unlock()
			return
		}
		if n.batches && way == 1 {
			count = len(n.queue[way])
		}
		frames := n.queue[way][:count]
		n.queue[way] = n.queue[way][count:]
		n.mu.Unlock()
		if n.batches && way == 1 {
			n.carryAll(frames)
		} else {
			n.carry(way, frames[0])
		}
	}
}

// offer tells a machine what its stack is given.
func offer(m *machine, p []byte, alone bool) (done func()) {
	seg, ok := readSegment(p)
	proto, b := transportOf(p)
	if src, dst := packetEnds(p); !ok || refSum(refPseudo(src, dst, proto, len(b)), b) != 0xffff {
		return func() {}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.flow(flowID{seg.src, seg.dst})
	f.offered(&seg)
	f.inRST = alone && seg.flags&flagR != 0
	return func() {
		m.mu.Lock()
		f.inRST = false
		m.mu.Unlock()
	}
}

func (n *fuzzNet) carry(way int, frame []byte) {
	m, w := n.server, n.toServer
	if way == 1 {
		m, w = n.guest, n.toGuest
	}
	p := frame[14:]
	done := offer(m, p, true)
	if err := m.s.HandlePacket(0, m.mac, m.gw, p, w); err != nil {
		n.drops++
	}
	done()
	clear(frame)
}

func (n *fuzzNet) carryAll(frames [][]byte) {
	packets := make([][]byte, len(frames))
	for i, frame := range frames {
		packets[i] = frame[14:]
		offer(n.guest, packets[i], false)
	}
	m := n.guest
	err := m.s.HandlePackets(0, m.mac, m.gw, packets, func(frames [][]byte) (first error) {
		for _, frame := range frames {
			if err := n.toGuest(frame); err != nil && first == nil {
				first = err
			}
		}
		return first
	})
	if err != nil {
		n.drops++
	}
	for _, frame := range frames {
		clear(frame)
	}
}

// sleep lets time pass, in which the link carries frames.
func (n *fuzzNet) sleep(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		n.pump()
		select {
		case <-n.arrive:
		case <-timer.C:
			n.pump()
			return
		}
	}
}

// open begins a connection from the guest's stack.
func (n *fuzzNet) open() {
	if len(n.flows) == 6 {
		return
	}
	b := n.next()
	to := families[b&1].at([]uint16{80, 443}[b>>1&1])
	f := &fuzzFlow{up: newFuzzPipe(n.t, b), down: newFuzzPipe(n.t, ^b), to: to}
	n.mu.Lock()
	n.conns = nil
	n.mu.Unlock()
	n.flows = append(n.flows, f)
	c := make(chan net.Conn, 1)
	go func() {
		conn, err := n.server.s.DialContext(context.Background(), "tcp", to.String())
		if err != nil && n.faults <= maxFaults {
			n.t.Errorf("DialContext %v: %v", to, err)
		}
		c <- conn
	}()
	// One at a time, so that it is known which connection of the server's it is.
	held := n.held
	n.held = [2]bool{}
	for range 40 {
		if n.sleep(5 * time.Second); len(c) == 1 {
			break
		}
	}
	n.held = held
	client := <-c
	n.mu.Lock()
	conns := n.conns
	n.mu.Unlock()
	if client == nil || len(conns) != 1 {
		f.broken = true
		if n.faults <= maxFaults {
			n.t.Errorf("the connection to %v is %v at one end and %v at the other", to, client, conns)
		}
	}
	var far net.Conn
	if len(conns) > 0 {
		far = conns[0]
	}
	f.up.change(func() { f.up.from, f.up.to = client, far })
	f.down.change(func() { f.down.from, f.down.to = far, client })
	if client == nil || far == nil {
		f.leave()
	}
}

// leave has the programs at both ends of a connection go away.
func (f *fuzzFlow) leave() {
	var conns [2]net.Conn
	for i, p := range []*fuzzPipe{f.up, f.down} {
		p.change(func() { p.over, conns[i] = true, p.from })
	}
	for _, c := range conns {
		if c != nil {
			c.Close()
		}
	}
}

// maxFaults is how many frames may be lost before connections may break of it: three
// keep-alives without an answer end one.
const maxFaults = 2

// step does the next thing.
func (n *fuzzNet) step() {
	op := n.next()
	if len(n.flows) == 0 || op%16 == 0 {
		n.open()
		return
	}
	f := n.flows[int(n.next())%len(n.flows)]
	p := f.up
	if op&16 != 0 {
		p = f.down
	}
	b := int(n.next())
	switch op % 16 {
	case 1, 2, 3:
		p.change(func() {
			if !p.end {
				p.want += b * b / 4
			}
		})
	case 4, 5, 6:
		p.change(func() { p.allowed += b * b })
	case 7:
		p.change(func() { p.end = p.end || b%4 == 0 })
	case 8:
		if b%8 == 0 {
			n.abandon(f, p, b)
		}
	case 9, 10:
		n.fate(b)
	case 11:
		way := b & 1
		n.held[way] = b&2 != 0 && !n.held[way]
	case 12:
		n.batches = b&1 != 0
	default:
		d := []time.Duration{time.Millisecond, 50 * time.Millisecond, 300 * time.Millisecond, 2 * time.Second, 20 * time.Second, 3 * time.Minute}[b%6]
		if n.held[0] || n.held[1] {
			d = min(d, time.Second)
			n.faults++
		}
		n.sleep(d)
		return
	}
	n.pump()
}

// abandon has a program close its end of a connection, or reset it.
func (n *fuzzNet) abandon(f *fuzzFlow, p *fuzzPipe, b int) {
	var c net.Conn
	f.broken = true
	p.change(func() { c, p.cut = p.from, p.writing })
	if c == nil {
		return
	}
	if b&8 != 0 {
		c.(interface{ SetLinger(int) error }).SetLinger(0)
	}
	c.Close()
	// What has been written is still going to be read, but of a Write that was waiting
	// it is not known how much.
	p.change(func() { p.end, p.want = true, p.written })
}

// fate decides about some frames.
func (n *fuzzNet) fate(b int) {
	way, count, fate := b&1, 1+b>>1&3, byte(min(b>>3, fateSwap))
	if fate == fateSwap && b&8 != 0 {
		fate = fateRepeat
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for range count {
		n.fates[way] = append(n.fates[way], fate)
		if fate <= fateGarble {
			n.faults++
		}
	}
}

// end lets everything come to its end: the link is good again, the programs read all
// and say that they have no more to write. Then they go, and nothing is left.
func (n *fuzzNet) end() {
	n.mu.Lock()
	n.fates = [2][]byte{}
	n.mu.Unlock()
	n.held = [2]bool{}
	for _, f := range n.flows {
		for _, p := range []*fuzzPipe{f.up, f.down} {
			p.change(func() { p.end, p.allowed = true, 1<<30 })
		}
	}
	n.sleep(20 * time.Minute)
	for _, f := range n.flows {
		for _, p := range []*fuzzPipe{f.up, f.down} {
			p.change(func() {
				if !f.broken && n.faults <= maxFaults && (!p.eof || p.read != p.want) {
					n.t.Errorf("%d bytes of %d are read: writing %v, reading %v", p.read, p.want, p.writeError, p.readError)
				}
			})
		}
		f.leave()
	}
	n.sleep(30 * time.Minute)
	for _, s := range []*Stack{n.guest.s, n.server.s} {
		s.mu.Lock()
		if len(s.flows)+len(s.accounts)+len(s.draining) > 0 {
			n.t.Errorf("%d flows, %d accounts are left, %d flows drain", len(s.flows), len(s.accounts), len(s.draining))
		}
		s.mu.Unlock()
		if st := s.Stats(); st.TCPFlows != 0 || st.TimeWait != 0 || st.PendingDials != 0 {
			n.t.Errorf("%+v", st)
		}
	}
}

// FuzzStack looks, beside what the machines check of every frame, whether a stream is
// read as it was written, never more than that and not less, and whether all flows end.
func FuzzStack(f *testing.F) {
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 11))
		b := make([]byte, 20<<(seed%5))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			n := newFuzzNet(t, b[:min(len(b), 1500)])
			for len(n.ops) > 0 {
				n.step()
			}
			n.end()
		})
	})
}
