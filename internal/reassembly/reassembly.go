// Package reassembly puts the fragments of IP packets together again: RFC 791
// section 3.2 (IPv4) and RFC 8200 section 4.5 (IPv6), with RFC 5722 for fragments
// that overlap, RFC 6946 for those that stand alone, RFC 7112 for header chains
// that are cut, and RFC 1122 section 3.3.2 for the time.
//
// It is a pure state machine: fragments and the time go in; packets, verdicts
// and a deadline come out. It holds no lock, goroutine or clock. A [Reassembler]
// is driven by one caller at a time, which hands every fragment to
// [Reassembler.Add], and calls [Reassembler.Expire] when [Reassembler.Deadline]
// has come.
//
// A datagram is all or nothing. Two fragments that say different things about
// it condemn it: what has come is freed at once, and what still comes is
// discarded, until the time of the datagram is over. So does a fragment that no
// datagram can have, if it names one that is in the making. Only a fragment that
// comes twice, byte for byte, is forgiven.
//
// There is no rule for tiny fragments (RFC 1858, RFC 3128): they are made for
// filters that judge a packet by its first fragment. Here every fragment but the
// last has at least 8 bytes, none is overwritten, and whoever judges sees the
// whole packet.
//
// The files: this one has the rules for datagrams as a whole, datagram.go those
// for the fragments of one, bounds.go the memory and the time.
package reassembly

import "time"

// Key names a datagram: in IPv4 by "the concatenation of the source, destination,
// protocol, and identification fields" (RFC 791 section 3.2), in IPv6 by all of
// these but the protocol (RFC 8200 section 4.5). The fields leave no padding, so
// the key is hashed as plain memory.
type Key struct {
	Namespace uintptr
	Src, Dst  [16]byte
	ID        uint32
	Proto     uint16 // of IPv4; 0 for IPv6
	Version   uint16 // 4 or 6
}

// Fragment is one fragment. Its slices are borrowed for the call of Add.
type Fragment struct {
	// Header is what stands in front of the data in the packet that the
	// fragment came in, as it came: in IPv4 the IP header with its options, in
	// IPv6 the IP header and the extension headers up to and with the Fragment
	// header.
	Header []byte

	// NextHeader is, for IPv6, the index in Header of the byte that announces
	// the Fragment header.
	NextHeader int

	// HeaderCut says that the fragment "does not include all headers through an
	// Upper-Layer header" (RFC 8200 section 4.5), as the one at offset 0 must. It
	// counts there only.
	HeaderCut bool

	Offset int    // of Data in the datagram, in bytes: a multiple of 8, at most 65,528
	More   bool   // there are fragments behind this one
	Data   []byte // behind Header
}

// Verdict is what became of a fragment.
type Verdict uint8

const (
	Pending          Verdict = iota // it is kept, and others are missing
	Complete                        // the datagram is whole, and no longer held
	Duplicate                       // it was there already, and is ignored
	Discarded                       // its datagram is condemned
	Empty                           // it has no data
	BadLength                       // it is not the last, and its length is not a multiple of 8
	TooLong                         // the datagram would not fit in an IP packet
	HeaderIncomplete                // it is the first, and does not hold the whole header chain
	Overlap                         // it overlaps with another
	Inconsistent                    // it and another disagree about the end of the datagram
	TooMany                         // its datagram is in too many pieces
	NoRoom                          // there is no memory for its datagram, which is given up

	numVerdicts
)

func (v Verdict) String() string {
	return [numVerdicts]string{
		"pending", "complete", "duplicate", "discarded", "empty", "bad length", "too long",
		"header incomplete", "overlap", "inconsistent", "too many", "no room",
	}[v]
}

// Reassembler holds the fragments of datagrams that are not whole yet. One that
// holds none has next to no memory.
type Reassembler struct {
	limits    Limits
	datagrams map[Key]*datagram
	spaces    map[uintptr]*space // of the namespaces that have datagrams
	queue     queue              // all datagrams, by deadline
	bytes     int                // charged for all of them
	evicted   uint64
}

// New returns a Reassembler with the given limits.
func New(limits Limits) *Reassembler {
	r := &Reassembler{limits: limits.withDefaults()}
	r.reset()
	return r
}

// Add takes a fragment of the datagram key. With the verdict Complete comes the
// packet, in memory of its own: the header of the fragment at offset 0, and the
// data of all. Its lengths are set, and nothing is left in it that says fragment;
// the checksum of an IPv4 header is 0, for the caller to fill in.
//
// A fragment that is all of its datagram completes it, whatever else is held
// under the key: RFC 6946 section 4.
//
// Every verdict from Empty on means that the fragment was refused. About BadLength
// and TooLong an IPv6 source is to be told with an ICMP Parameter Problem, code 0,
// that points to the payload length and to the fragment offset; about
// HeaderIncomplete with code 3 and a pointer of 0 (RFC 7112 section 5). About
// Overlap "no ICMP error messages should be sent" (all RFC 8200 section 4.5), and
// no RFC wants one about the others.
func (r *Reassembler) Add(now time.Time, key Key, f Fragment) ([]byte, Verdict) {
	if f.Offset == 0 && !f.More {
		return build(key.Version, f.Header, f.NextHeader, []piece{{0, f.Data}}), Complete
	}
	d := r.datagrams[key]
	i, v := r.judge(d, key.Version, &f)
	switch v {
	case Pending:
		if d == nil {
			d = r.open(now, key)
		}
		b := f.copy()
		if !r.charge(d, fragmentCost+cap(b)) {
			r.remove(d)
			return nil, NoRoom
		}
		d.insert(i, &f, b)
	case Complete:
		packet := d.complete(i, &f)
		r.remove(d)
		return packet, v
	case Duplicate, Discarded:
	default:
		if d != nil {
			r.condemn(d)
		}
	}
	return nil, v
}

// judge returns what is to become of a fragment of d, which is nil if there is
// none yet, and its index in d.pieces.
func (r *Reassembler) judge(d *datagram, version uint16, f *Fragment) (int, Verdict) {
	if d != nil && d.condemned {
		return 0, Discarded
	}
	if v := d.check(version, f); v != Pending || d == nil {
		return 0, v
	}
	i, v := d.place(f)
	switch {
	case v != Pending:
	case len(d.pieces) >= r.limits.Fragments:
		v = TooMany
	case d.completedBy(f):
		v = Complete
	}
	return i, v
}

// condemn frees what a datagram holds and has what comes of it discarded. "If any
// of the fragments being reassembled overlap with any other fragments being
// reassembled for the same packet, reassembly of that packet must be abandoned
// and all the fragments that have been received for that packet must be
// discarded" (RFC 8200 section 4.5); "including those not yet received" (RFC 5722
// section 4).
func (r *Reassembler) condemn(d *datagram) {
	r.refund(d, d.bytes-datagramCost)
	d.condemned = true
	d.first, d.pieces = nil, nil
}

// Expired is a datagram whose time was over before it was whole.
type Expired struct {
	Key Key

	// Front is the front of the packet that the fragment at offset 0 came in,
	// for the ICMP Time Exceeded, code 1, that its source is to be told with. It
	// is nil if that has not come: then nobody is told (RFC 1122 section 3.3.2,
	// RFC 8200 section 4.5).
	Front []byte
}

// maxFront bounds Expired.Front: what no ICMP error has room for is cut off (RFC
// 4443 section 2.4 (c)).
const maxFront = 1280

// Expire forgets the datagrams whose time is over, and returns them, those that
// were condemned apart.
func (r *Reassembler) Expire(now time.Time) []Expired {
	var expired []Expired
	for len(r.queue) > 0 && !r.queue[0].deadline.After(now) {
		d := r.queue[0]
		r.remove(d)
		if !d.condemned {
			n := min(len(d.first), maxFront)
			expired = append(expired, Expired{d.key, d.first[:n:n]})
		}
	}
	return expired
}

// Deadline returns when Expire has something to do next, or the zero time.
func (r *Reassembler) Deadline() time.Time {
	if len(r.queue) == 0 {
		return time.Time{}
	}
	return r.queue[0].deadline
}

// Len returns how many datagrams are held, condemned ones included.
func (r *Reassembler) Len() int { return len(r.datagrams) }

// Bytes returns the memory that is charged for them.
func (r *Reassembler) Bytes() int { return r.bytes }

// Evicted returns how many datagrams have made way for others.
func (r *Reassembler) Evicted() uint64 { return r.evicted }
