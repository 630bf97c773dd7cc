package tcp

import (
	"math/rand/v2"
	"testing"
	"time"
)

// fuzzer drives a TCB with the bytes of an input, against a peer that knows the
// TCB's state and lies about some of it.
type fuzzer struct {
	*harness
	ops    []byte
	memory *Memory
	others int64 // bytes of memory that others hold
}

// next returns the next byte of the input.
func (f *fuzzer) next() byte {
	if len(f.ops) == 0 {
		return 0
	}
	b := f.ops[0]
	f.ops = f.ops[1:]
	return b
}

// near returns an offset near to off: often off itself, seldom far away.
func (f *fuzzer) near(off int64) int64 {
	b, d := f.next(), int64(f.next())
	switch b % 8 {
	case 0:
		return off + d
	case 1:
		return off - d
	case 2:
		return off + d*300
	case 3:
		return off - d<<24
	}
	return off
}

// segment makes a segment of the peer.
func (f *fuzzer) segment() Segment {
	s := Segment{SrcPort: 2, DstPort: 1, Flags: ACK, Window: uint16(f.next()) << (f.next() % 9)}
	switch b := f.next(); b % 32 {
	case 0:
		s.Flags = Flags(f.next())
	case 1, 2, 3:
		s.Flags |= FIN
	case 4:
		s.Flags = SYN
	case 5:
		s.Flags |= SYN
	case 6:
		if f.next()%8 == 0 { // seldom, or little else would happen
			s.Flags = RST
		}
	}
	seq, ack := f.near(f.rcv.nxt), f.near([]int64{f.snd.una, f.snd.nxt, (f.snd.una + f.snd.nxt) / 2}[f.next()%3])
	if f.next()%4 == 0 {
		seq = f.near(f.rcv.adv)
	}
	s.Seq, s.Ack = hIRS+uint32(seq), hISS+uint32(ack)
	if f.state == SynSent {
		s.Seq = hIRS // from which the harness counts
		if f.next()%4 > 0 {
			s.Ack = hISS + 1
		}
	}
	if n := int64(f.next()); n%3 == 0 {
		s.Payload = patterned(fromPeer, seq, seq+n*11)
		if s.Flags&SYN != 0 {
			s.Payload = patterned(fromPeer, seq+1, seq+1+n*11)
		}
		if f.state == SynSent {
			s.Payload = patterned(fromPeer, 1, 1+n*11)
		}
	}
	if b := f.next(); b%4 != 0 || f.timestamps && b%16 != 0 {
		s.HasTimestamps = true
		s.TSVal, s.TSEcr = f.tsRecent+uint32(f.next()%4)-1, f.tsVal(f.now)-uint32(f.next())
		if f.state == SynSent {
			s.TSVal = hPeerTS
		}
	}
	for range f.next() % 5 {
		left := f.near(f.snd.una + int64(f.next())*50)
		s.SACK[s.Blocks] = Block{hISS + uint32(left), hISS + uint32(f.near(left+int64(f.next())*20))}
		if s.Blocks++; s.Blocks == maxBlocks {
			break
		}
	}
	if s.Flags&SYN != 0 {
		s.MSS, s.HasScale, s.Scale = uint16(f.next())*8, f.next()%2 == 0, f.next()%15
		s.SACKPermitted = f.next()%2 == 0
	}
	return s
}

// input gives the TCB a segment, as a driver does.
func (f *fuzzer) input(s Segment) {
	if f.state == TimeWait {
		f.MayReplace(&s)
	}
	f.Input(f.now, &s)
	if s.Flags&RST != 0 && f.rstDue {
		f.Fatalf("a reset is answered with a reset: %+v", s)
	}
}

// step does the next thing.
func (f *fuzzer) step() {
	switch op := f.next(); op % 16 {
	default:
		f.input(f.segment())
	case 8:
		f.PathMTU(f.now, int(f.next())*6, hISS+uint32(f.near(f.snd.una)))
	case 9:
		n := f.Write(patterned(fromTCB, f.wrote+1, f.wrote+1+int64(f.next())*40))
		f.wrote += int64(n)
	case 10:
		p := f.Reserve(int(f.next()) * 40)
		copy(p, patterned(fromTCB, f.wrote+1, f.wrote+1+int64(len(p))))
		if f.next()%4 == 0 {
			f.input(f.segment())
		}
		can := f.canSend()
		f.Commit(len(p))
		if can {
			f.wrote += int64(len(p))
		}
	case 11:
		p := f.Peek()
		for i, c := range p {
			if c != pattern(fromPeer, f.recvBuf.base+int64(i)) {
				f.Fatalf("byte %d is not what was sent", f.recvBuf.base+int64(i))
			}
		}
		if f.next()%4 == 0 {
			f.input(f.segment())
		}
		f.Discard(min(len(p), int(f.next())*20))
	case 12:
		f.now = f.now.Add(time.Duration(f.next()) * ms)
		f.Advance(f.now)
	case 13:
		if d := f.TCB.Deadline(); d != 0 && d > f.now {
			f.now = d
			f.Advance(f.now)
		}
	case 14:
		switch f.next() % 64 {
		case 0:
			f.CloseWrite()
		case 1:
			f.CloseRead()
		case 2:
			f.Close(f.now)
		case 3:
			f.Abort()
		}
	case 15:
		f.Events()
		f.EOF()
		f.Unsent()
		f.Free()
		n := int64(f.next()) << 12
		f.memory.take(n - f.others)
		f.others = n
	}
	f.pull()
	f.queue, f.times = f.queue[:0], f.times[:0]
}

// silence lets the application leave and the peer say nothing more: the
// connection must end, and soon.
func (f *fuzzer) silence() {
	f.Close(f.now)
	f.pull()
	end := f.now.Add(time.Hour)
	for steps := 0; f.state != Closed; steps++ {
		d := f.TCB.Deadline()
		if d == 0 || d > end || steps > 1000 {
			f.Fatalf("%v does not end: deadline %v, %d steps", f.state, d, steps)
		}
		if d > f.now {
			f.now = d
		}
		f.Advance(f.now)
		if d := f.TCB.Deadline(); d != 0 && d <= f.now {
			f.Fatalf("Advance left a deadline behind: %v", f.timers)
		}
		f.pull()
	}
	if f.Output(f.now, f.buf) != 0 || f.TCB.Deadline() != 0 {
		f.Fatal("closed, but not at rest")
	}
	f.Discard(f.Buffered())
	if n := f.memory.Held() - f.others; n != 0 {
		f.Fatalf("%d bytes are held in the end", n)
	}
}

func FuzzTCB(f *testing.F) {
	for seed := range uint64(60) {
		rnd := rand.New(rand.NewPCG(seed, 7))
		b := make([]byte, 4000)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ops := &fuzzer{ops: b[:min(len(b), 20_000)]}
		cfg := testConfig()
		cfg.SendBuffer, cfg.ReceiveBuffer = 1<<(ops.next()%18), 1<<(ops.next()%21)
		cfg.MSS = []int{1460, 536, 9000, 1220}[ops.next()%4]
		if ops.next()%4 == 0 {
			cfg.KeepAlive = KeepAlive{10 * sec, sec, 3}
		}
		h := &harness{T: t, now: epoch, edge: -1, silent: true}
		ops.harness, ops.memory = h, NewMemory(int64(ops.next())<<12)
		if ops.next()%2 == 0 {
			h.TCB = NewActive(cfg, epoch)
		} else {
			syn := Segment{Seq: hIRS, Flags: SYN, Window: uint16(ops.next()) << 8, MSS: uint16(ops.next()) * 8,
				HasScale: ops.next()%2 == 0, Scale: ops.next() % 15, SACKPermitted: ops.next()%2 == 0,
				HasTimestamps: ops.next()%2 == 0, TSVal: hPeerTS}
			h.TCB = NewPassive(cfg, epoch, &syn)
		}
		h.UseMemory(ops.memory)
		h.pull()
		if ops.next()%8 > 0 {
			ops.input(Segment{Seq: hIRS + uint32(h.rcv.nxt) - 1, Flags: SYN | ACK, Ack: hISS + 1, Window: 65535, MSS: 1460,
				HasScale: true, Scale: 3, SACKPermitted: true, HasTimestamps: true, TSVal: hPeerTS})
			ops.input(Segment{Seq: hIRS + 1, Flags: ACK, Ack: hISS + 1, Window: 65535, HasTimestamps: true, TSVal: hPeerTS})
			h.pull()
		}
		for len(ops.ops) > 0 && h.state != Closed {
			ops.step()
		}
		ops.silence()
	})
}
