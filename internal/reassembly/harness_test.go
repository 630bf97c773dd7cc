package reassembly

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"
)

var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// eachVersion runs a test for both IP versions.
func eachVersion(t *testing.T, test func(t *testing.T, version uint16)) {
	for _, version := range []uint16{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", version), func(t *testing.T) { test(t, version) })
	}
}

// keyOf returns a key of the version.
func keyOf(version uint16, id uint32) Key {
	k := Key{Namespace: 1, ID: id, Version: version}
	if version == 4 {
		k.Proto = 17
		k.Src, k.Dst = [16]byte{10: 0xff, 11: 0xff, 12: 10, 15: 15}, [16]byte{10: 0xff, 11: 0xff, 12: 192, 15: 1}
	} else {
		k.Src, k.Dst = [16]byte{0: 0xfd, 15: 15}, [16]byte{0: 0x20, 15: 1}
	}
	return k
}

// pattern returns n bytes that are different at every offset and for every seed.
func pattern(seed uint32, off, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		x := uint32(off+i)*2654435761 + seed*40503
		b[i] = byte(x>>13 ^ x>>24)
	}
	return b
}

// header is what stands in front of the data: in IPv4 20 bytes and extra words of
// options, in IPv6 40 bytes and extra headers of 8 bytes. Its lengths and its
// IPv4 checksum are 0.
func header(key Key, extra int) []byte {
	if key.Version == 4 {
		h := make([]byte, 20, 60)
		h[0], h[1], h[8], h[9] = 0x45+byte(extra), 0xb8, 63, byte(key.Proto)
		binary.BigEndian.PutUint16(h[4:], uint16(key.ID))
		copy(h[12:], key.Src[12:])
		copy(h[16:], key.Dst[12:])
		return append(h, pattern(99, extra, 4*extra)...)
	}
	h := make([]byte, 40, 40+8*extra)
	binary.BigEndian.PutUint32(h, 6<<28|0xb8<<20|0x12345)
	h[6], h[7] = 17, 63
	copy(h[8:], key.Src[:])
	copy(h[24:], key.Dst[:])
	for i := range extra {
		h[nextHeader(i)] = 60
		h = append(h, 17, 0, 1, 4, byte(i), 1, 2, 3)
	}
	return h
}

// nextHeader is the index of the byte that says what follows behind extra
// extension headers.
func nextHeader(extra int) int {
	if extra == 0 {
		return 6
	}
	return 40 + 8*(extra-1)
}

// whole is the packet with a header and data.
func whole(key Key, extra int, data []byte) []byte {
	b := append(header(key, extra), data...)
	if key.Version == 4 {
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	} else {
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)-40))
	}
	return b
}

// frag is a fragment of key with a header as a guest sends it.
func frag(key Key, extra, off int, more bool, data []byte) Fragment {
	f := Fragment{Offset: off, More: more, Data: data, Header: header(key, extra)}
	be := binary.BigEndian
	if key.Version == 4 {
		field := uint16(off / 8)
		if more {
			field |= 0x2000
		}
		be.PutUint16(f.Header[2:], uint16(len(f.Header)+len(data)))
		be.PutUint16(f.Header[6:], field)
		be.PutUint16(f.Header[10:], 0xbeef)
		return f
	}
	field := uint16(off)
	if more {
		field |= 1
	}
	f.NextHeader = nextHeader(extra)
	proto := f.Header[f.NextHeader]
	f.Header[f.NextHeader] = 44
	fh := make([]byte, 8)
	fh[0] = proto
	be.PutUint16(fh[2:], field)
	be.PutUint32(fh[4:], key.ID)
	f.Header = append(f.Header, fh...)
	be.PutUint16(f.Header[4:], uint16(len(f.Header)-40+len(data)))
	return f
}

// split cuts data into fragments of size bytes.
func split(key Key, extra int, data []byte, size int) []Fragment {
	var fs []Fragment
	for off := 0; off < len(data); off += size {
		end := min(off+size, len(data))
		fs = append(fs, frag(key, extra, off, end < len(data), data[off:end]))
	}
	return fs
}

// tester drives a Reassembler.
type tester struct {
	*testing.T
	r   *Reassembler
	now time.Time
}

func newTester(t *testing.T, limits Limits) *tester {
	return &tester{t, New(limits), epoch}
}

// add lends a fragment to the Reassembler, and scribbles over it afterwards.
func (t *tester) add(key Key, f Fragment) ([]byte, Verdict) {
	t.Helper()
	f.Header, f.Data = bytes.Clone(f.Header), bytes.Clone(f.Data)
	packet, v := t.r.Add(t.now, key, f)
	for _, b := range [][]byte{f.Header, f.Data} {
		for i := range b {
			b[i] = 0xdb
		}
	}
	if (packet != nil) != (v == Complete) {
		t.Fatalf("a packet of %d bytes, and the verdict %v", len(packet), v)
	}
	return packet, v
}

// want adds a fragment that must get the verdict.
func (t *tester) want(want Verdict, key Key, f Fragment) {
	t.Helper()
	if _, v := t.add(key, f); v != want {
		t.Fatalf("fragment %d+%d, more %v: %v, want %v", f.Offset, len(f.Data), f.More, v, want)
	}
	t.check()
}

// wantPacket adds a fragment that must complete the packet.
func (t *tester) wantPacket(want []byte, key Key, f Fragment) {
	t.Helper()
	packet, v := t.add(key, f)
	if v != Complete {
		t.Fatalf("fragment %d+%d, more %v: %v, want %v", f.Offset, len(f.Data), f.More, v, Complete)
	}
	if !bytes.Equal(packet, want) {
		t.Fatalf("another packet:\n got %d bytes %.80x\nwant %d bytes %.80x", len(packet), packet, len(want), want)
	}
	t.check()
}

// wantEmpty wants nothing to be held.
func (t *tester) wantEmpty() {
	t.Helper()
	t.check()
	if t.r.Len() != 0 || t.r.Bytes() != 0 || !t.r.Deadline().IsZero() || len(t.r.spaces) != 0 {
		t.Fatalf("%d datagrams and %d bytes are held, until %v", t.r.Len(), t.r.Bytes(), t.r.Deadline())
	}
}

// wantHeld wants the memory of n condemned datagrams and of some pieces to be
// charged.
func (t *tester) wantHeld(datagrams int, pieces ...Fragment) {
	t.Helper()
	want := datagrams * datagramCost
	for i := range pieces {
		want += fragmentCost + cap(pieces[i].copy())
	}
	if t.r.Len() != datagrams || t.r.Bytes() != want {
		t.Fatalf("%d datagrams and %d bytes are held, want %d and %d", t.r.Len(), t.r.Bytes(), datagrams, want)
	}
}

// expire wants datagrams to expire after d, with these keys.
func (t *tester) expire(d time.Duration, keys ...Key) []Expired {
	t.Helper()
	t.now = t.now.Add(d)
	expired := t.r.Expire(t.now)
	t.check()
	if len(expired) != len(keys) {
		t.Fatalf("%d datagrams have expired, want %d", len(expired), len(keys))
	}
	for i := range keys {
		if expired[i].Key != keys[i] {
			t.Fatalf("datagram %+v has expired, want %+v", expired[i].Key, keys[i])
		}
	}
	return expired
}

// check looks for what must hold at any time.
func (t *tester) check() {
	t.Helper()
	r := t.r
	sum, n := 0, 0
	for ns, sp := range r.spaces {
		if len(sp.datagrams) == 0 || sp.namespace != ns {
			t.Fatalf("namespace %d has %d datagrams and is called %d", ns, len(sp.datagrams), sp.namespace)
		}
		if len(sp.datagrams) > r.limits.Datagrams || sp.bytes > r.limits.NamespaceBytes {
			t.Fatalf("namespace %d has %d datagrams of %d bytes", ns, len(sp.datagrams), sp.bytes)
		}
		spSum := 0
		for _, d := range sp.datagrams {
			if r.datagrams[d.key] != d || d.space != sp || d.key.Namespace != ns || r.queue[d.index] != d {
				t.Fatalf("datagram %+v is lost", d.key)
			}
			t.checkDatagram(d)
			spSum += d.bytes
		}
		if spSum != sp.bytes {
			t.Fatalf("namespace %d is charged %d bytes, not %d", ns, sp.bytes, spSum)
		}
		sum += spSum
		n += len(sp.datagrams)
	}
	if sum != r.bytes || r.bytes > r.limits.Bytes || n != len(r.datagrams) || n != len(r.queue) {
		t.Fatalf("%d bytes in %d datagrams; %d bytes, %d datagrams, a queue of %d", sum, n, r.bytes, len(r.datagrams), len(r.queue))
	}
	for i := range r.queue {
		if i > 0 && r.queue[i].deadline.Before(r.queue[(i-1)/2].deadline) {
			t.Fatalf("the queue is not a heap")
		}
	}
	if n > 0 && !r.Deadline().Equal(r.queue[0].deadline) || n == 0 && !r.Deadline().IsZero() {
		t.Fatalf("the deadline is %v", r.Deadline())
	}
}

func (t *tester) checkDatagram(d *datagram) {
	t.Helper()
	if d.condemned {
		if d.bytes != datagramCost || d.pieces != nil || d.first != nil {
			t.Fatalf("condemned, but %d bytes, %d pieces", d.bytes, len(d.pieces))
		}
		return
	}
	cost, covered, end := datagramCost, 0, 0
	for i := range d.pieces {
		p := &d.pieces[i]
		if p.off < end || len(p.data) == 0 {
			t.Fatalf("piece %d+%d behind %d", p.off, len(p.data), end)
		}
		end = p.end()
		covered += len(p.data)
		cost += fragmentCost + cap(p.data)
		if p.off == 0 {
			cost += cap(d.first) - cap(p.data)
		}
	}
	switch n := len(d.pieces); {
	case n == 0 || n > t.r.limits.Fragments:
		t.Fatalf("%d pieces", n)
	case covered != d.covered || cost != d.bytes:
		t.Fatalf("covers %d and costs %d, not %d and %d", d.covered, d.bytes, covered, cost)
	case d.total != 0 && (end > d.total || covered == d.total):
		t.Fatalf("%d of %d bytes up to %d", covered, d.total, end)
	case (d.first != nil) != (d.pieces[0].off == 0):
		t.Fatalf("a first packet of %d bytes, a first piece at %d", len(d.first), d.pieces[0].off)
	}
}
