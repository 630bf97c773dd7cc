package reassembly

import (
	"container/heap"
	"slices"
	"time"
)

// What bounds a Reassembler. A guest may send first fragments for ever: each
// waits for its time to be over, or is forgotten for a later one. The oldest
// datagram makes way, of the namespace that is over its own bound; or, if that is
// none but they are too much together, of the one that has the most. So a guest
// that floods cannot drive out the fragments of another.

// Limits bounds a Reassembler. A zero field means its default.
type Limits struct {
	Bytes          int           // of memory in all, overhead included: 1 MiB
	NamespaceBytes int           // of one namespace: 512 KiB
	Datagrams      int           // of one namespace: 64
	Fragments      int           // of one datagram: 64; 45 of 1,500 bytes make the longest
	Timeout4       time.Duration // of an IPv4 datagram: 30 s
	Timeout6       time.Duration // of an IPv6 datagram: 60 s
}

// withDefaults returns l with its zero fields set.
//
// Deviation: RFC 1122 section 3.3.2 recommends 60 to 120 s for IPv4. Linux waits
// for 30 s (net.ipv4.ipfrag_time): with 16 bits of identification, what is kept
// longer is more likely to meet a fragment of another datagram (RFC 4963).
func (l Limits) withDefaults() Limits {
	def := func(p *int, d int) {
		if *p == 0 {
			*p = d
		}
	}
	def(&l.Bytes, 1<<20)
	def(&l.NamespaceBytes, 512<<10)
	def(&l.Datagrams, 64)
	def(&l.Fragments, 64)
	if l.Timeout4 == 0 {
		l.Timeout4 = 30 * time.Second
	}
	if l.Timeout6 == 0 {
		// RFC 8200 section 4.5: "within 60 seconds of the reception of the
		// first-arriving fragment".
		l.Timeout6 = 60 * time.Second
	}
	return l
}

// What is charged beside the memory that a fragment is copied to: never less than
// what the allocator takes.
const (
	datagramCost = 512 // the datagram, its entries in the maps and queues, its namespace
	fragmentCost = 64  // a piece, in a slice that is at worst half full
)

// space is what one namespace has.
type space struct {
	namespace uintptr
	datagrams []*datagram // the oldest first; at most Limits.Datagrams, and one that is just added
	bytes     int
}

// oldestBut returns the oldest datagram that is not d, or nil.
func (sp *space) oldestBut(d *datagram) *datagram {
	for _, o := range sp.datagrams {
		if o != d {
			return o
		}
	}
	return nil
}

// open returns a new datagram that has been entered everywhere.
func (r *Reassembler) open(now time.Time, key Key) *datagram {
	sp := r.spaces[key.Namespace]
	if sp == nil {
		sp = &space{namespace: key.Namespace}
		r.spaces[key.Namespace] = sp
	}
	timeout := r.limits.Timeout4
	if key.Version == 6 {
		timeout = r.limits.Timeout6
	}
	d := &datagram{key: key, deadline: now.Add(timeout), space: sp}
	sp.datagrams = append(sp.datagrams, d)
	r.datagrams[key] = d
	heap.Push(&r.queue, d)
	return d
}

// remove forgets a datagram and what is charged for it.
func (r *Reassembler) remove(d *datagram) {
	r.refund(d, d.bytes)
	delete(r.datagrams, d.key)
	heap.Remove(&r.queue, d.index)
	sp := d.space
	i := slices.Index(sp.datagrams, d)
	sp.datagrams = slices.Delete(sp.datagrams, i, i+1)
	if len(sp.datagrams) == 0 {
		delete(r.spaces, sp.namespace)
	}
	if len(r.queue) == 0 && cap(r.queue) > 16 {
		r.reset() // a map does not shrink
	}
}

// reset gives back what an empty Reassembler has grown to.
func (r *Reassembler) reset() {
	r.datagrams = make(map[Key]*datagram)
	r.spaces = make(map[uintptr]*space)
	r.queue = nil
}

// charge adds n bytes to what a datagram costs, and lets others make way until
// the bounds hold. It reports false if that is not enough.
func (r *Reassembler) charge(d *datagram, n int) bool {
	if d.bytes == 0 {
		n += datagramCost
	}
	d.bytes += n
	d.space.bytes += n
	r.bytes += n
	for {
		var victim *datagram
		switch sp := d.space; {
		case len(sp.datagrams) > r.limits.Datagrams || sp.bytes > r.limits.NamespaceBytes:
			victim = sp.oldestBut(d)
		case r.bytes > r.limits.Bytes:
			victim = r.oldestOfLargestBut(d)
		default:
			return true
		}
		if victim == nil {
			return false
		}
		r.remove(victim)
		r.evicted++
	}
}

// oldestOfLargestBut returns the oldest datagram that is not d of the namespace
// that costs most, or nil. There are as many to look at as namespaces have
// fragments: those are the program's, not the guests'.
func (r *Reassembler) oldestOfLargestBut(d *datagram) *datagram {
	var victim *datagram
	for _, sp := range r.spaces {
		if victim != nil && (sp.bytes < victim.space.bytes ||
			sp.bytes == victim.space.bytes && sp.namespace > victim.space.namespace) {
			continue
		}
		if o := sp.oldestBut(d); o != nil {
			victim = o
		}
	}
	return victim
}

// refund takes n bytes off what a datagram costs.
func (r *Reassembler) refund(d *datagram, n int) {
	d.bytes -= n
	d.space.bytes -= n
	r.bytes -= n
}

// queue is a heap of datagrams, the one with the next deadline first.
type queue []*datagram

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].deadline.Before(q[j].deadline) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(x any) {
	d := x.(*datagram)
	d.index = len(*q)
	*q = append(*q, d)
}

func (q *queue) Pop() any {
	old := *q
	n := len(old) - 1
	d := old[n]
	old[n] = nil
	*q = old[:n]
	return d
}
