package reassembly

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// model is a Reassembler done the simple way: a map from every byte that has come
// to its value.
type model struct {
	limits    Limits
	datagrams map[Key]*modelDatagram
}

type modelDatagram struct {
	deadline  time.Time
	condemned bool
	bytes     map[int]byte
	came      []Fragment
}

// add returns the verdicts that a fragment may get; for Complete, the packet too.
func (m *model) add(now time.Time, key Key, f Fragment, extra int) (allowed []Verdict, packet []byte) {
	if f.Offset == 0 && !f.More {
		return []Verdict{Complete}, whole(key, extra, f.Data)
	}
	d := m.datagrams[key]
	if d != nil && d.condemned {
		return []Verdict{Discarded}, nil
	}
	known := d != nil
	if !known {
		timeout := m.limits.Timeout4
		if key.Version == 6 {
			timeout = m.limits.Timeout6
		}
		d = &modelDatagram{deadline: now.Add(timeout), bytes: make(map[int]byte)}
	}
	refusals, duplicate := m.refusals(d, key, f)
	switch {
	case len(refusals) > 0:
		if known {
			*d = modelDatagram{deadline: d.deadline, condemned: true}
		}
		return refusals, nil
	case duplicate:
		return []Verdict{Duplicate}, nil
	}
	if !known {
		m.datagrams[key] = d
	}
	f.Data, f.Header = bytes.Clone(f.Data), bytes.Clone(f.Header)
	d.came = append(d.came, f)
	for i, b := range f.Data {
		d.bytes[f.Offset+i] = b
	}
	if header, data, ok := d.whole(); ok {
		delete(m.datagrams, key)
		n := len(header)
		if key.Version == 6 {
			n -= 8
			return []Verdict{Complete}, whole(key, (n-40)/8, data)
		}
		return []Verdict{Complete}, whole(key, (n-20)/4, data)
	}
	return []Verdict{Pending}, nil
}

// refusals returns for what reasons a fragment must be refused, and whether it
// has come before.
func (m *model) refusals(d *modelDatagram, key Key, f Fragment) (refusals []Verdict, duplicate bool) {
	refuse := func(v Verdict, is bool) {
		if is {
			refusals = append(refusals, v)
		}
	}
	end := f.Offset + len(f.Data)
	refuse(Empty, len(f.Data) == 0)
	refuse(BadLength, f.More && len(f.Data)%8 != 0)
	refuse(HeaderIncomplete, f.HeaderCut && f.Offset == 0)

	farthest, header := end, 0
	overlap := false
	for _, c := range append(d.came, f) {
		farthest = max(farthest, c.Offset+len(c.Data))
		if c.Offset == 0 && header == 0 {
			header = len(c.Header)
		}
	}
	if key.Version == 4 {
		refuse(TooLong, max(header, 20)+farthest > 65535)
	} else {
		refuse(TooLong, max(header-48, 0)+farthest > 65535)
	}
	for _, c := range d.came {
		if c.Offset == f.Offset && c.More == f.More && bytes.Equal(c.Data, f.Data) {
			return refusals, true
		}
	}
	for i := f.Offset; i < end; i++ {
		if _, ok := d.bytes[i]; ok {
			overlap = true
		}
	}
	refuse(Overlap, overlap)
	inconsistent := false
	for _, c := range d.came {
		cEnd := c.Offset + len(c.Data)
		inconsistent = inconsistent || !c.More && (end > cEnd || !f.More && end != cEnd) || !f.More && cEnd > end
	}
	refuse(Inconsistent, inconsistent)
	refuse(TooMany, len(d.came) == m.limits.Fragments)
	return refusals, false
}

// whole returns the header and the data of a datagram that has no hole.
func (d *modelDatagram) whole() (header, data []byte, ok bool) {
	for _, c := range d.came {
		if c.Offset == 0 {
			header = c.Header
		}
		if !c.More {
			data = make([]byte, c.Offset+len(c.Data))
		}
	}
	if data == nil || len(d.bytes) != len(data) {
		return nil, nil, false
	}
	for i := range data {
		data[i] = d.bytes[i]
	}
	return header, data, true
}

// expire returns the fronts of the datagrams whose time is over.
func (m *model) expire(now time.Time) map[Key][]byte {
	fronts := make(map[Key][]byte)
	for key, d := range m.datagrams {
		if d.deadline.After(now) {
			continue
		}
		delete(m.datagrams, key)
		if d.condemned {
			continue
		}
		fronts[key] = nil
		for _, c := range d.came {
			if c.Offset == 0 {
				front := append(bytes.Clone(c.Header), c.Data...)
				fronts[key] = front[:min(len(front), 1280)]
			}
		}
	}
	return fronts
}

// run does random things to a Reassembler and to a model of it, and compares. What
// made way the model learns afterwards. Intn is the source of randomness. The
// result says how often each verdict was given.
func run(t *testing.T, limits Limits, steps int, intn func(n int) int) (seen [numVerdicts]int) {
	x := newTester(t, limits)
	m := &model{limits: x.r.limits, datagrams: make(map[Key]*modelDatagram)}
	for range steps {
		if intn(32) == 0 {
			x.now = x.now.Add(time.Duration(intn(20)) * time.Second)
			want := m.expire(x.now)
			got := x.r.Expire(x.now)
			if len(got) != len(want) {
				t.Fatalf("%d datagrams have expired, want %d", len(got), len(want))
			}
			for _, e := range got {
				front, ok := want[e.Key]
				if !ok || !bytes.Equal(front, e.Front) || (front == nil) != (e.Front == nil) {
					t.Fatalf("datagram %+v has expired with the front %x, want %x", e.Key, e.Front, front)
				}
			}
			x.check()
		}
		key, f, extra := randomFragment(intn)
		_, known := x.r.datagrams[key]
		evicted, held := x.r.Evicted(), x.r.Len()
		allowed, want := m.add(x.now, key, f, extra)
		packet, v := x.add(key, f)
		x.check()
		seen[v]++
		if v == NoRoom && allowed[0] == Pending {
			delete(m.datagrams, key)
		} else if !slices.Contains(allowed, v) {
			t.Fatalf("fragment %d+%d, more %v, of %+v: %v, want %v", f.Offset, len(f.Data), f.More, key, v, allowed)
		}
		if !bytes.Equal(packet, want) {
			t.Fatalf("another packet:\n got %x\nwant %x", packet, want)
		}
		gone := 0
		for k := range m.datagrams {
			if x.r.datagrams[k] == nil {
				delete(m.datagrams, k)
				gone++
			}
		}
		if uint64(gone) != x.r.Evicted()-evicted || gone > 0 && v != Pending && v != NoRoom {
			t.Fatalf("%v: %d datagrams are gone, %d made way", v, gone, x.r.Evicted()-evicted)
		}
		if len(m.datagrams) != x.r.Len() {
			t.Fatalf("%v: %d datagrams, want %d", v, x.r.Len(), len(m.datagrams))
		}
		if v == Pending && !known && x.r.Len() != held+1-gone {
			t.Fatalf("%d datagrams were held, %d are gone, %d are left", held, gone, x.r.Len())
		}
	}
	return seen
}

// randomFragment returns a fragment of one of 24 datagrams. Most are of one way
// to cut it up, so that some are completed.
func randomFragment(intn func(int) int) (key Key, f Fragment, extra int) {
	version := uint16(4 + 2*intn(2))
	id := uint32(intn(6))
	key = keyOf(version, id)
	key.Namespace = uintptr(intn(2))
	extra = int(id) // of the header
	size := 8 * (1 + int(id)%3)
	parts := 2 + int(id)
	total := size*parts - int(id)
	i := intn(parts)
	off, end := i*size, min((i+1)*size, total)
	more := i+1 < parts
	odd := intn(64)
	switch odd {
	case 0, 1:
		off, end = 8*intn(12), 0
		end = off + intn(40)
	case 2:
		more = !more
	case 3:
		off = 65528 - 8*intn(16)
		end = off + intn(64)
	case 4:
		extra = intn(11)
	case 5:
		end += 8
	}
	data := pattern(id, off, end-off)
	if id == 4 {
		clear(data)
	}
	if odd == 6 {
		data[intn(len(data))] ^= 1
	}
	f = frag(key, extra, off, more, data)
	f.HeaderCut = intn(256) == 0
	return key, f, extra
}

func TestRandomAgainstModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(6, 7))
	steps := 100000
	if raceEnabled {
		steps /= 5
	}
	seen := run(t, Limits{}, steps, rnd.IntN)
	t.Log(seen)
	for v := range numVerdicts {
		if seen[v] < steps/2500 && v != NoRoom && v != TooMany {
			t.Errorf("%v was given %d times", v, seen[v])
		}
	}
	if seen[NoRoom]+seen[TooMany] > 0 {
		t.Errorf("%d fragments found no room, %d were too many", seen[NoRoom], seen[TooMany])
	}
}

func TestRandomAgainstModelBounded(t *testing.T) {
	rnd := rand.New(rand.NewPCG(8, 9))
	for round := range 200 {
		limits := Limits{
			Bytes:          1000 + rnd.IntN(6000),
			NamespaceBytes: 500 + rnd.IntN(4000),
			Datagrams:      1 + rnd.IntN(8),
			Fragments:      1 + rnd.IntN(6),
			Timeout4:       time.Duration(1+rnd.IntN(100)) * time.Second,
			Timeout6:       time.Duration(1+rnd.IntN(100)) * time.Second,
		}
		t.Log(round, limits, run(t, limits, 500, rnd.IntN))
	}
}

func FuzzReassembly(f *testing.F) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for _, n := range []int{0, 40, 200, 1000} {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b, byte(n))
	}
	f.Fuzz(func(t *testing.T, b []byte, small byte) {
		intn := func(n int) int {
			if len(b) == 0 {
				return 0
			}
			v := int(b[0])
			b = b[1:]
			return v % n
		}
		var limits Limits
		if small&1 != 0 {
			limits = Limits{Bytes: 4000, NamespaceBytes: 2500, Datagrams: 3, Fragments: 4}
		}
		run(t, limits, min(len(b)/4, 1000), intn)
	})
}
