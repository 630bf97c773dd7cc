// Package load is what the benchmarks measure with: the guest's end of TCP
// connections ([Flow]), a server on a socket of the host ([Server]), and plain sockets
// that do the same work beside it ([Socket]). It knows nothing of the network
// between guest and server, so that several can be compared.
//
// A Flow is hardly TCP: it copies nothing, and has no need to mend what a link loses
// that loses nothing. Its packets are made beforehand, it answers on the goroutine that brings
// a frame, and it wakes nobody but the benchmark when all is done. What is measured
// is the network, not the guest.
package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"sync"
	"time"
)

const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	flagPSH
	flagACK
)

const (
	tcpHeaderLen  = 20
	windowScale   = 8
	maxBatchBytes = 256 << 10 // a virtual network card's queue is not endless either
)

var errReset = errors.New("the connection was reset")

// Flow is the guest's end of one TCP connection. Its methods wait for the server
// and are called one at a time; Note and Answer take what comes meanwhile.
type Flow struct {
	// Send hands packets to the network, in order, which are the Flow's again when
	// it returns. It is set before anything else is done.
	Send func(packets [][]byte) error

	src, dst netip.AddrPort
	ipLen    int      // of the IP header
	mss      int      // of both directions
	data     [][]byte // full segments, for as many as are sent at a time
	out      [][]byte // those that are sent now
	pure     [][]byte // an ACK
	small    [][]byte // a request

	mu           sync.Mutex
	room         sync.Cond // for Upload
	left         int64     // bytes that Upload has to send
	waits, stuck bool      // Upload waits for room; it has waited for too long
	open         bool      // the SYN-ACK has come
	err          error     // why the connection is over
	una, nxt     uint32    // the first byte that is not acknowledged, the next to send
	edge         uint32    // of the peer's window
	largest      uint32    // that the peer's window was so far
	scale        uint8     // of the peer's window
	rcv          uint32    // the next byte to come
	owed         int       // segments to acknowledge
	target       uint32    // when rcv is there,
	then         func()    // this is done, once
	end          func(error)
	done         chan error // what end is for methods that wait
}

// NewFlow returns the guest's end of a connection from src to dst, on a link that
// takes packets of mtu bytes, up to batch of them at a time.
func NewFlow(src, dst netip.AddrPort, mtu, batch int) *Flow {
	f := &Flow{src: src, dst: dst, ipLen: 20, done: make(chan error, 1)}
	if src.Addr().Is6() {
		f.ipLen = 40
	}
	f.mss = mtu - f.ipLen - tcpHeaderLen
	f.data = make([][]byte, max(1, min(batch, maxBatchBytes/mtu)))
	f.room.L = &f.mu
	f.nxt = uint32(time.Now().UnixMicro() / 4) // RFC 9293 section 3.4.1
	f.pure = [][]byte{f.packet(0)}
	f.end = func(err error) {
		select {
		case f.done <- err:
		default:
		}
	}
	return f
}

// MSS returns the bytes in a full segment.
func (f *Flow) MSS() int { return f.mss }

// Release gives up the memory of packets, which is taken again when it is needed.
func (f *Flow) Release() { clear(f.data); f.out, f.small = nil, nil }

// String tells how far the connection is, for one that gets no further.
func (f *Flow) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return fmt.Sprintf("%v to %v: sent %d of which %d acknowledged, %d left, window %d; received %d, %d missing, %d to acknowledge; err %v",
		f.src, f.dst, f.nxt, f.una, f.left, f.free(), f.rcv, int32(f.target-f.rcv), f.owed, f.err)
}

// Connect does the handshake.
func (f *Flow) Connect() error {
	if err := f.connect(f.finish); err != nil {
		return err
	}
	return <-f.done
}

// Open does the handshake, and returns when the server has answered a first request:
// from here on there is nothing on the way to it that is not ready for data.
func (f *Flow) Open() error {
	err := f.connect(func() {
		f.expect(commandLen, f.finish)
		f.request(f.newRequest(), command{opEcho, 0})
	})
	if err != nil {
		return err
	}
	return <-f.done
}

func (f *Flow) connect(then func()) error {
	options := []byte{2, 4, byte(f.mss >> 8), byte(f.mss), 1, 3, 3, windowScale}
	syn := f.packet(len(options))
	copy(syn[f.ipLen+tcpHeaderLen:], options)
	syn[f.ipLen+12] = byte(tcpHeaderLen+len(options)) / 4 << 4
	f.mu.Lock()
	f.then = then
	f.mu.Unlock()
	f.stamp(syn, flagSYN, f.nxt, 0)
	return f.Send([][]byte{syn})
}

// Upload sends n bytes and returns when the server has them.
func (f *Flow) Upload(n int64) error {
	f.expect(1, f.finish)
	if err := f.request(f.newRequest(), command{opUpload, n}); err != nil {
		return err
	}
	f.mu.Lock()
	f.left = n
	f.mu.Unlock()
	for {
		n, err := f.waitRoom()
		if err != nil {
			return err
		}
		if n == 0 {
			return <-f.done
		}
		if err := f.Send(f.next(n)); err != nil {
			return err
		}
	}
}

// Download receives n bytes from the server.
func (f *Flow) Download(n int64) error {
	for n > 0 {
		part := min(n, 1<<30) // half of the sequence space is not to be reached
		f.expect(uint32(part), f.finish)
		if err := f.request(f.newRequest(), command{opDownload, part}); err != nil {
			return err
		}
		if err := <-f.done; err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// RoundTrips sends small requests, each when the last one is answered, and measures
// how long that takes.
func (f *Flow) RoundTrips(took []time.Duration) error {
	if f.small == nil {
		f.small = f.newRequest()
	}
	sent, i := time.Now(), 0
	var answered func()
	answered = func() {
		now := time.Now()
		took[i] = now.Sub(sent)
		sent, i = now, i+1
		if i == len(took) {
			f.finish()
			return
		}
		f.expect(commandLen, answered)
		f.request(f.small, command{opEcho, 0})
	}
	f.expect(commandLen, answered)
	if err := f.request(f.newRequest(), command{opEcho, 0}); err != nil {
		return err
	}
	return <-f.done
}

// Park has the server keep the connection and do nothing for it any more.
func (f *Flow) Park() error {
	f.expect(1, f.finish)
	if err := f.request(f.newRequest(), command{opPark, 0}); err != nil {
		return err
	}
	return <-f.done
}

// Abort resets the connection.
func (f *Flow) Abort() error {
	rst := f.packet(0)
	f.stamp(rst, flagRST|flagACK, f.nxt, f.rcv)
	return f.Send([][]byte{rst})
}

// exchange connects, sends a request, receives the answer, and closes. It returns
// at once, and calls end when that is done.
func (f *Flow) exchange(end func(error)) error {
	f.end = end
	return f.connect(func() {
		f.expect(commandLen+1, f.close)
		f.request(f.newRequest(), command{opOnce, 0})
	})
}

func (f *Flow) close() {
	fin := f.packet(0)
	f.stamp(fin, flagFIN|flagACK, f.nxt, f.rcv)
	f.end(f.Send([][]byte{fin}))
}

// Exchanges does n times what a short connection does: connect, send a request,
// receive the answer, and close; parallel of them at a time. The next one begins
// where the last one has ended, on the goroutine that brings its end. Open returns a
// new Flow from a port.
func Exchanges(open func(port uint16) *Flow, n, parallel int) error {
	var mu sync.Mutex
	begun := 0
	done := make(chan error, parallel)
	var begin func(error)
	begin = func(err error) {
		mu.Lock()
		begun++
		i := begun
		mu.Unlock()
		if err != nil || i > n {
			done <- err
			return
		}
		if err := open(uint16(1024 + i%60000)).exchange(begin); err != nil {
			done <- err
		}
	}
	var first error
	for range parallel {
		begin(nil)
	}
	for range parallel {
		if err := <-done; first == nil {
			first = err
		}
	}
	return first
}

// Next returns the next full segments, at least 1 and n at the most, as the window
// and the size of a batch allow. They are valid until the next call.
func (f *Flow) Next(n int) [][]byte {
	f.mu.Lock()
	for f.free() < int64(f.mss) { // the goroutine that has the news is about to bring it
		f.mu.Unlock()
		runtime.Gosched()
		f.mu.Lock()
	}
	size := int64(f.mss) * min(int64(n), int64(len(f.data)), f.free()/int64(f.mss))
	f.left = math.MaxInt64
	f.mu.Unlock()
	return f.next(size)
}

// ACK returns a segment without data, valid until something comes.
func (f *Flow) ACK() []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stamp(f.pure[0], flagACK, f.nxt, f.rcv)
	return f.pure[0]
}

// next makes the segments with the next n bytes, no more than data has.
func (f *Flow) next(n int64) [][]byte {
	f.mu.Lock()
	seq, ack := f.nxt, f.rcv
	f.nxt += uint32(n)
	f.left -= n
	push := f.left == 0
	f.mu.Unlock()
	out := f.out[:0]
	for i := 0; n > 0; i++ {
		p, k := f.full(i), min(n, int64(f.mss))
		if int(k) < f.mss {
			p = f.packet(int(k))
		}
		flags := byte(flagACK)
		if n -= k; n == 0 && push {
			flags |= flagPSH
		}
		f.stamp(p, flags, seq, ack)
		seq += uint32(k)
		out = append(out, p)
	}
	f.out = out
	return out
}

func (f *Flow) full(i int) []byte {
	if f.data[i] == nil {
		f.data[i] = f.packet(f.mss)
	}
	return f.data[i]
}

// waitRoom waits until a segment with some of what is left may be sent, and returns
// how many bytes may: 0 when all of them are acknowledged.
func (f *Flow) waitRoom() (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	mss := int64(f.mss)
	for f.err == nil && !f.hasRoom() {
		f.waits = true
		una := f.una
		t := time.AfterFunc(retransmitTime, func() { f.goBack(una) })
		f.room.Wait()
		t.Stop()
	}
	n := min(f.left, f.free(), mss*int64(len(f.data)))
	if f.stuck {
		n = min(f.left, max(n, 1)) // a window that is closed is probed
	}
	f.waits, f.stuck = false, false
	if n > mss && n < f.left {
		n -= n % mss
	}
	return n, f.err
}

// hasRoom reports whether the window has room for a full segment, or half of itself
// (RFC 9293 section 3.8.6.2.1). A peer that has everything and still does not open its
// window gets what it takes: it may wait for that.
func (f *Flow) hasRoom() bool {
	if f.left == 0 {
		return f.una == f.nxt
	}
	return f.free() >= min(f.left, int64(f.mss), int64(f.largest)/2) ||
		f.una == f.nxt && f.free() > 0 || f.stuck
}

// retransmitTime is how long a peer may be silent. The link loses nothing, but a peer
// may drop what it has no room for.
const retransmitTime = 200 * time.Millisecond

// goBack has everything sent again that is not acknowledged, if una is still the
// first of it.
func (f *Flow) goBack(una uint32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.waits && f.una == una {
		f.left += int64(f.nxt - una)
		f.nxt, f.stuck = una, true
	}
	f.room.Signal()
}

func (f *Flow) free() int64 { return int64(int32(f.edge - f.nxt)) }

func (f *Flow) newRequest() [][]byte { return [][]byte{f.packet(commandLen)} }

// request sends a command in p, which newRequest has returned.
func (f *Flow) request(p [][]byte, c command) error {
	c.marshal(p[0][f.ipLen+tcpHeaderLen:])
	f.mu.Lock()
	seq, ack := f.nxt, f.rcv
	f.nxt += commandLen
	f.owed = 0
	f.mu.Unlock()
	f.stamp(p[0], flagACK|flagPSH, seq, ack)
	return f.Send(p)
}

// expect has then called when n more bytes have come.
func (f *Flow) expect(n uint32, then func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.target, f.then = f.rcv+n, then
}

// finish acknowledges everything and ends what is waited for.
func (f *Flow) finish() { f.end(f.acknowledge()) }

func (f *Flow) acknowledge() error {
	f.mu.Lock()
	seq, ack := f.nxt, f.rcv
	f.owed = 0
	f.mu.Unlock()
	f.stamp(f.pure[0], flagACK, seq, ack)
	return f.Send(f.pure)
}

// Note takes a segment of n bytes of which seg is the front, with the whole header.
// Nothing is sent: that is for Answer, after one or several of them.
func (f *Flow) Note(seg []byte, n int) {
	seq, ack := binary.BigEndian.Uint32(seg[4:]), binary.BigEndian.Uint32(seg[8:])
	header, flags, win := int(seg[12]>>4)*4, seg[13], uint32(binary.BigEndian.Uint16(seg[14:]))
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case flags&flagRST != 0:
		f.err = errReset
		f.room.Signal()
		return
	case flags&flagSYN != 0:
		f.noteSYN(seg[tcpHeaderLen:header], seq, ack, win)
		return
	}
	win <<= f.scale
	if int32(ack-f.una) > 0 {
		f.una = ack
	}
	if edge := ack + win; int32(edge-f.edge) > 0 {
		f.edge, f.largest = edge, max(f.largest, win)
	}
	if f.waits && f.hasRoom() {
		f.waits = false
		f.room.Signal()
	}
	data := uint32(n - header)
	fin := uint32(flags & flagFIN)
	if data+fin == 0 {
		return
	}
	f.owed++
	if end := seq + data + fin; seq == f.rcv && int(data) == f.mss {
		f.rcv = end
	} else {
		f.owed = 2 // what is out of order, and what may be the last
		if int32(f.rcv-seq) >= 0 && int32(end-f.rcv) > 0 {
			f.rcv = end
		}
	}
}

func (f *Flow) noteSYN(options []byte, seq, ack, win uint32) {
	f.owed = 2
	if f.open {
		return
	}
	f.open, f.una, f.nxt, f.edge, f.largest = true, ack, ack, ack+win, win
	f.rcv, f.target = seq+1, seq+1
	for len(options) > 1 {
		switch {
		case options[0] == 1:
			options = options[1:]
			continue
		case options[0] == 3:
			f.scale = options[2]
		}
		options = options[min(len(options), int(options[1])):]
	}
}

// Answer does what the segments since the last call ask for.
func (f *Flow) Answer() {
	f.mu.Lock()
	err, then, owed := f.err, f.then, f.owed
	switch {
	case then == nil:
	case err != nil:
		f.then = nil
		f.mu.Unlock()
		f.end(err)
		return
	case f.open && int32(f.rcv-f.target) >= 0:
		f.then = nil
		f.mu.Unlock()
		then()
		return
	}
	f.mu.Unlock()
	if owed >= 2 {
		f.acknowledge()
	}
}

// packet returns a packet with room for n bytes of options and data, and its
// checksum left to the network card.
func (f *Flow) packet(n int) []byte {
	p := make([]byte, f.ipLen+tcpHeaderLen+n)
	putIPHeader(p, 6, f.src.Addr(), f.dst.Addr())
	t := p[f.ipLen:]
	binary.BigEndian.PutUint16(t, f.src.Port())
	binary.BigEndian.PutUint16(t[2:], f.dst.Port())
	t[12] = tcpHeaderLen / 4 << 4
	binary.BigEndian.PutUint16(t[14:], 0xffff)
	return p
}

func (f *Flow) stamp(p []byte, flags byte, seq, ack uint32) {
	t := p[f.ipLen:]
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[13] = flags
}

// putIPHeader writes the header of p, which is of either family.
func putIPHeader(p []byte, proto byte, src, dst netip.Addr) {
	if src.Is6() {
		p[0] = 6 << 4
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		p[6], p[7] = proto, 64
		copy(p[8:], src.AsSlice())
		copy(p[24:], dst.AsSlice())
		return
	}
	p[0] = 4<<4 | 5
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[6] = 0x40 // do not fragment
	p[8], p[9] = 64, proto
	copy(p[12:], src.AsSlice())
	copy(p[16:], dst.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum>>16+sum&0xffff))
}
