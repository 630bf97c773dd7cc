package reassembly

import (
	"bytes"
	"encoding/binary"
	"slices"
	"sort"
	"time"
)

// One datagram: which fragments go together (RFC 791 section 3.2, RFC 8200
// section 4.5), and the packet that is made of them.

const (
	ipv4HeaderLen = 20
	ipv6HeaderLen = 40
	fragHeaderLen = 8
	maxIPLength   = 65535 // IPv4 total length, IPv6 payload length
)

// piece is the data of one fragment.
//
// Each is copied to memory of its own size when it comes, and to its place in
// the packet when that is whole. One buffer for all of the datagram would save
// the second copy, but a fragment of 8 bytes at its far end would then cost
// 64 KiB. So what is held, and charged, is what has come.
type piece struct {
	off  int
	data []byte
}

func (p *piece) end() int { return p.off + len(p.data) }

// datagram is the fragments of one datagram that is not whole.
type datagram struct {
	key      Key
	deadline time.Time // fixed by the fragment that came first
	index    int       // in Reassembler.queue
	space    *space    // of the namespace
	bytes    int       // charged for it

	condemned bool // it holds nothing, and nothing is added to it

	pieces  []piece // by offset; they do not overlap
	covered int     // bytes of pieces
	total   int     // length of the datagram, if its last fragment has come; else 0

	// Of the fragment at offset 0, if that has come.
	first      []byte // the packet that it came in; its data is pieces[0]
	headerLen  int    // Fragment.Header is first[:headerLen]
	nextHeader int    // Fragment.NextHeader
}

// check looks at a fragment on its own, and at how far it goes: that the packet
// fits depends on the header of the fragment at offset 0. It returns Pending if
// nothing is wrong. There may be no datagram yet: d is nil then.
func (d *datagram) check(version uint16, f *Fragment) Verdict {
	end := f.Offset + len(f.Data)
	header, limit := ipv4HeaderLen, maxIPLength
	if version == 6 {
		header, limit = ipv6HeaderLen, ipv6HeaderLen+maxIPLength
	}
	switch {
	case d != nil && d.first != nil:
		header = keptHeaderLen(version, d.headerLen)
	case f.Offset == 0:
		header = keptHeaderLen(version, len(f.Header))
	}
	if d != nil && len(d.pieces) > 0 {
		end = max(end, d.pieces[len(d.pieces)-1].end())
	}
	switch {
	case len(f.Data) == 0:
		return Empty
	case f.More && len(f.Data)%8 != 0:
		return BadLength
	case header+end > limit:
		return TooLong
	case f.Offset == 0 && f.HeaderCut:
		return HeaderIncomplete
	}
	return Pending
}

// keptHeaderLen is how much of a Fragment.Header of n bytes goes into the packet.
func keptHeaderLen(version uint16, n int) int {
	if version == 6 {
		return n - fragHeaderLen
	}
	return n
}

// place returns the index in pieces where a fragment goes, and Pending; or what
// is wrong between it and the others.
func (d *datagram) place(f *Fragment) (int, Verdict) {
	end := f.Offset + len(f.Data)
	i := sort.Search(len(d.pieces), func(i int) bool { return d.pieces[i].off >= f.Offset })
	n := len(d.pieces)
	if i < n {
		p := &d.pieces[i]
		if more := p.end() != d.total; more == f.More && p.off == f.Offset && bytes.Equal(p.data, f.Data) {
			return i, Duplicate
		}
	}
	switch {
	case d.total != 0 && end > d.total, !f.More && n > 0 && d.pieces[n-1].end() > end:
		return i, Inconsistent
	case i < n && d.pieces[i].off < end, i > 0 && d.pieces[i-1].end() > f.Offset:
		return i, Overlap
	}
	return i, Pending
}

// completedBy reports whether a fragment for which place has found a place is all
// that is missing: what does not overlap, and is as long as the whole, has no hole.
func (d *datagram) completedBy(f *Fragment) bool {
	total := d.total
	if !f.More {
		total = f.Offset + len(f.Data)
	}
	return total != 0 && d.covered+len(f.Data) == total
}

// complete returns the packet of a datagram that f completes. What f has lent is
// not kept, and d is of no use any more.
func (d *datagram) complete(i int, f *Fragment) []byte {
	pieces := slices.Insert(d.pieces, i, piece{f.Offset, f.Data})
	if f.Offset == 0 {
		return build(d.key.Version, f.Header, f.NextHeader, pieces)
	}
	return build(d.key.Version, d.first[:d.headerLen], d.nextHeader, pieces)
}

// copy returns the data in memory of its own; of the fragment at offset 0, the
// packet that it came in.
func (f *Fragment) copy() []byte {
	if f.Offset == 0 {
		return slices.Concat(f.Header, f.Data)
	}
	return bytes.Clone(f.Data)
}

// insert keeps a fragment, of which b is the copy, in the place that place has
// found.
func (d *datagram) insert(i int, f *Fragment, b []byte) {
	if f.Offset == 0 {
		d.first, d.headerLen, d.nextHeader = b, len(f.Header), f.NextHeader
		b = b[d.headerLen:]
	}
	d.pieces = slices.Insert(d.pieces, i, piece{f.Offset, b})
	d.covered += len(b)
	if !f.More {
		d.total = f.Offset + len(b)
	}
}

// build returns the packet that pieces without a hole make behind the Header of
// the fragment at offset 0.
//
// Deviation: RFC 3168 section 5.3 wants a congestion mark of any fragment kept.
// The ECN bits are those of fragment 0, as all of its header.
func build(version uint16, header []byte, nextHeader int, pieces []piece) []byte {
	be := binary.BigEndian
	n := keptHeaderLen(version, len(header))
	last := &pieces[len(pieces)-1]
	packet := make([]byte, n+last.end())
	copy(packet, header[:n])
	for i := range pieces {
		copy(packet[n+pieces[i].off:], pieces[i].data)
	}
	if version == 4 {
		be.PutUint16(packet[2:], uint16(len(packet)))
		be.PutUint16(packet[6:], be.Uint16(packet[6:])&0xc000) // more fragments, offset
		be.PutUint16(packet[10:], 0)
		return packet
	}
	// "The Next Header field of the last header of the Per-Fragment headers is
	// obtained from the Next Header field of the first fragment's Fragment
	// header."
	packet[nextHeader] = header[n]
	be.PutUint16(packet[4:], uint16(len(packet)-ipv6HeaderLen))
	return packet
}
