package reassembly

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"strconv"
	"testing"
	"time"
)

// first returns a first fragment of n bytes.
func first(key Key, n int) Fragment { return frag(key, 0, 0, true, pattern(key.ID, 0, n)) }

// rest returns what completes first, and last the packet that it completes.
func rest(key Key, n int) (f Fragment, packet []byte) {
	data := pattern(key.ID, 0, n+5)
	return frag(key, 0, n, false, data[n:]), whole(key, 0, data)
}

// The oldest datagram makes way when there are too many.
func TestDatagramsBound(t *testing.T) {
	x := newTester(t, Limits{})
	for id := range uint32(64) {
		x.want(Pending, keyOf(4, id), first(keyOf(4, id), 8))
	}
	if x.r.Len() != 64 || x.r.Evicted() != 0 {
		t.Fatalf("%d datagrams, %d made way", x.r.Len(), x.r.Evicted())
	}
	// That it was heard of lately does not help it.
	x.want(Pending, keyOf(4, 0), frag(keyOf(4, 0), 0, 16, true, pattern(0, 16, 8)))
	x.want(Pending, keyOf(4, 64), first(keyOf(4, 64), 8))
	x.want(Pending, keyOf(6, 65), first(keyOf(6, 65), 8))
	if x.r.Len() != 64 || x.r.Evicted() != 2 {
		t.Fatalf("%d datagrams, %d made way", x.r.Len(), x.r.Evicted())
	}
	for id := uint32(2); id < 65; id++ {
		f, packet := rest(keyOf(4, id), 8)
		x.wantPacket(packet, keyOf(4, id), f)
	}
	f, packet := rest(keyOf(6, 65), 8)
	x.wantPacket(packet, keyOf(6, 65), f)
	x.wantEmpty()
	f, _ = rest(keyOf(4, 0), 8)
	x.want(Pending, keyOf(4, 0), f)
}

// A condemned datagram makes way like any other.
func TestCondemnedMakeWay(t *testing.T) {
	x := newTester(t, Limits{Datagrams: 3})
	for id := range uint32(3) {
		x.want(Pending, keyOf(6, id), first(keyOf(6, id), 16))
	}
	x.want(Overlap, keyOf(6, 0), first(keyOf(6, 0), 8))
	x.want(Pending, keyOf(6, 3), first(keyOf(6, 3), 8))
	x.want(Pending, keyOf(6, 0), first(keyOf(6, 0), 8)) // and forgotten
	if x.r.Evicted() != 2 {
		t.Fatalf("%d made way", x.r.Evicted())
	}
}

// The oldest make way when they have too much memory: of the namespace, even if
// another has older ones.
func TestNamespaceBytesBound(t *testing.T) {
	other := keyOf(4, 1000)
	other.Namespace = 2
	x := newTester(t, Limits{})
	x.want(Pending, other, first(other, 60000))
	for id := range uint32(40) {
		x.want(Pending, keyOf(4, id), first(keyOf(4, id), 40000))
	}
	f := first(keyOf(4, 1), 40000)
	held := 512 << 10 / (cap(f.copy()) + fragmentCost + datagramCost)
	if held < 10 || x.r.Len() != 1+held || x.r.Evicted() != uint64(40-held) {
		t.Fatalf("%d datagrams, %d made way; %d have room", x.r.Len(), x.r.Evicted(), held)
	}
	f, packet := rest(other, 60000)
	x.wantPacket(packet, other, f)
	for id := uint32(40 - held); id < 40; id++ {
		f, packet := rest(keyOf(4, id), 40000)
		x.wantPacket(packet, keyOf(4, id), f)
	}
	x.wantEmpty()
}

// When all together have too much, the oldest of the namespace makes way that has
// most.
func TestBytesBound(t *testing.T) {
	x := newTester(t, Limits{})
	key := func(ns uintptr, id uint32) Key {
		k := keyOf(4, id)
		k.Namespace = ns
		return k
	}
	x.want(Pending, key(1, 1), first(key(1, 1), 40000))
	for id := range uint32(200) {
		for ns := uintptr(2); ns < 6; ns++ {
			x.want(Pending, key(ns, id), first(key(ns, id), 8000))
		}
	}
	for ns := uintptr(2); ns < 6; ns++ {
		if b := x.r.spaces[ns].bytes; b < 220<<10 || b > 264<<10 {
			t.Errorf("namespace %d has %d bytes", ns, b)
		}
	}
	f, packet := rest(key(1, 1), 40000)
	x.wantPacket(packet, key(1, 1), f)
	for ns := uintptr(2); ns < 6; ns++ {
		f, packet := rest(key(ns, 199), 8000)
		x.wantPacket(packet, key(ns, 199), f)
	}
}

// A datagram that grows drives out the oldest of the others, in its namespace or
// elsewhere.
func TestGrowthMakesWay(t *testing.T) {
	for _, limits := range []Limits{{NamespaceBytes: 7200}, {Bytes: 7200}} {
		x := newTester(t, limits)
		for id := range uint32(4) {
			x.want(Pending, keyOf(4, id), first(keyOf(4, id), 800))
		}
		grown := keyOf(4, 1)
		for i, left := range [][]uint32{{0, 1, 2, 3}, {1, 2, 3}, {1, 3}, {1}} {
			if i > 0 {
				x.want(Pending, grown, frag(grown, 0, 800+1600*i, true, pattern(1, 0, 1600)))
			}
			if x.r.Len() != len(left) {
				t.Fatalf("%+v: %d datagrams are left of %v", limits, x.r.Len(), left)
			}
			for _, id := range left {
				if x.r.datagrams[keyOf(4, id)] == nil {
					t.Fatalf("%+v: datagram %d is not among the %d that are left", limits, id, len(left))
				}
			}
		}
	}
}

// What does not fit though everything else makes way is refused.
func TestNoRoom(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		x := newTester(t, Limits{Bytes: 10000, NamespaceBytes: 8000})
		a, b := keyOf(version, 1), keyOf(version, 2)
		x.want(NoRoom, a, first(a, 8000))
		x.wantEmpty()
		x.want(Pending, a, first(a, 2000))
		x.want(Pending, b, first(b, 4800))
		if x.r.Len() != 1 {
			t.Fatalf("%d datagrams", x.r.Len())
		}
		x.want(NoRoom, b, frag(b, 0, 8000, true, pattern(0, 0, 2400)))
		x.wantEmpty()

		// The end needs no room.
		data := pattern(1, 0, 10000)
		x.want(Pending, a, frag(a, 0, 0, true, data[:4000]))
		x.wantPacket(whole(a, 0, data), a, frag(a, 0, 4000, false, data[4000:]))
		x.wantEmpty()

		// No room in all, though there is some in the namespace.
		x = newTester(t, Limits{Bytes: 8000, NamespaceBytes: 10000})
		b.Namespace++
		x.want(Pending, a, first(a, 2000))
		x.want(NoRoom, b, first(b, 8000))
		x.wantEmpty()
	})
}

// A guest that sends first fragments for ever, and one of another namespace that
// sends long datagrams meanwhile: those all arrive. Memory stays bounded, and so
// it is in the guest's own namespace for datagrams that are sent in one go.
func TestFlood(t *testing.T) {
	x := newTester(t, Limits{})
	rnd := rand.New(rand.NewPCG(4, 4))
	junk := pattern(0, 0, 1480)
	other := keyOf(4, 77)
	other.Namespace = 2
	own := keyOf(6, 78)
	data := pattern(77, 0, 60000)
	fs, ownFs := split(other, 0, data, 1480), split(own, 0, data[:8000], 1448)
	sent, ownSent, peak := 0, 0, 0
	rounds := 100000
	if raceEnabled {
		rounds /= 5
	}
	for i := range rounds {
		key := keyOf([]uint16{4, 6}[i&1], rnd.Uint32())
		n := 8
		if i&2 != 0 {
			n = 1480
		}
		f := Fragment{Header: junk[:20], NextHeader: 6, Offset: 0, More: true, Data: junk[:n]}
		if key.Version == 6 {
			f.Header = junk[:48]
		}
		x.now = x.now.Add(time.Millisecond)
		if _, v := x.r.Add(x.now, key, f); v != Pending {
			t.Fatal(v)
		}
		x.r.Expire(x.now)
		peak = max(peak, x.r.Bytes())
		if i%10 != 0 {
			continue
		}
		x.check()
		if sent++; sent%len(fs) != 0 {
			x.want(Pending, other, fs[sent%len(fs)])
		} else {
			x.wantPacket(whole(other, 0, data), other, fs[0])
		}
		if i%100 == 0 {
			for ownSent < len(ownFs)-1 {
				x.want(Pending, own, ownFs[ownSent])
				ownSent++
			}
			x.wantPacket(whole(own, 0, data[:8000]), own, ownFs[ownSent])
			ownSent = 0
		}
	}
	if peak > 1<<20 || x.r.Len() > 2*64 {
		t.Errorf("up to %d bytes; %d datagrams", peak, x.r.Len())
	}
	x.r.Expire(x.now.Add(time.Minute))
	x.wantEmpty()
}

// heapBytes returns the bytes that are allocated.
func heapBytes() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// What is charged is no less than what is taken, for fragments of any size, and
// all of it is given back.
func TestMemoryCharged(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector takes memory of its own")
	}
	for _, tt := range []struct {
		name            string
		datagrams, size int
		fragments       int
		namespaces      uintptr
	}{
		{"first fragments of 8 bytes", 64, 8, 1, 16},
		{"first fragments of 1,480 bytes", 64, 1480, 1, 16},
		{"64 fragments of 8 bytes", 64, 8, 64, 2},
		{"33 fragments of 8 bytes", 64, 8, 33, 2},
		{"5 fragments of 1,160 bytes", 64, 1160, 5, 2},
		{"40 fragments of 1,480 bytes", 9, 1480, 40, 2},
		{"first fragments of 33,000 bytes", 20, 33000, 1, 2},
		{"one of each namespace", 1, 8, 1, 1200},
		{"condemned", 64, 0, 1, 16},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := pattern(0, 0, 33000)
			f := Fragment{Header: header(keyOf(4, 1), 0), More: true}
			r := New(Limits{})
			before := heapBytes()
			for ns := range tt.namespaces {
				for id := range uint32(tt.datagrams) {
					key := keyOf(4, id)
					key.Namespace = ns
					for i := range tt.fragments {
						f.Offset, f.Data = i*tt.size, data[:tt.size]
						if tt.size == 0 {
							f.Offset, f.Data = 8, data[:8]
							r.Add(epoch, key, f)
							f.Data = data[:16]
						}
						r.Add(epoch, key, f)
					}
				}
			}
			taken, charged := heapBytes()-before, r.Bytes()
			t.Logf("%d datagrams: %d bytes taken, %d charged", r.Len(), taken, charged)
			if taken > charged || taken > 1<<20 {
				t.Errorf("%d bytes taken, %d charged", taken, charged)
			}
			if charged < 100<<10 {
				t.Errorf("only %d bytes charged: this measures nothing", charged)
			}
			r.Expire(epoch.Add(time.Hour))
			if left := heapBytes() - before; left > 8<<10 || r.Bytes() != 0 {
				t.Errorf("%d bytes are left, %d charged", left, r.Bytes())
			}
			runtime.KeepAlive(r)
		})
	}
}

func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	key := keyOf(4, 1)
	data := pattern(0, 0, 8192)
	fs := split(key, 0, data, 1480)
	atomic := frag(key, 0, 0, false, data[:100])
	r := New(Limits{})
	allocs := func(name string, most float64, f func()) {
		n := testing.AllocsPerRun(100, f)
		for again := 0; n > most && again < 20; again++ { // what else the process does counts too
			n = min(n, testing.AllocsPerRun(100, f))
		}
		if n > most {
			t.Errorf("%s: %v allocations, want at most %v", name, n, most)
		}
	}
	// One for each fragment that is kept, and for the datagram, its namespace
	// and place there, 4 for the list of pieces, and the packet.
	allocs("a datagram of 6 fragments", 5+3+4+1, func() {
		for _, f := range fs {
			r.Add(epoch, key, f)
		}
	})
	allocs("an atomic fragment", 1, func() {
		r.Add(epoch, key, atomic)
	})
	r.Add(epoch, key, fs[1])
	allocs("a duplicate", 0, func() { r.Add(epoch, key, fs[1]) })
	bad := fs[2]
	bad.Data = bad.Data[:7]
	unknown := keyOf(4, 2)
	allocs("a bad length", 0, func() { r.Add(epoch, unknown, bad) })
	r.Add(epoch, key, bad)
	allocs("a fragment of a condemned datagram", 0, func() { r.Add(epoch, key, fs[3]) })
	allocs("no datagram has expired", 0, func() { r.Expire(epoch); r.Deadline() })
}

func BenchmarkDatagram(b *testing.B) {
	for _, size := range []int{2000, 8192, 65000} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			key := keyOf(4, 1)
			fs := split(key, 0, pattern(0, 0, size), 1480)
			r := New(Limits{})
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				for i := range fs {
					r.Add(epoch, key, fs[i])
				}
			}
			if r.Len() != 0 {
				b.Fatal("not complete")
			}
		})
	}
}

// One fragment of each datagram, which drives out another.
func BenchmarkFlood(b *testing.B) {
	for _, namespaces := range []uint32{1, 100} {
		b.Run(fmt.Sprintf("%d namespaces", namespaces), func(b *testing.B) {
			data := pattern(0, 0, 33000)
			f := Fragment{Header: header(keyOf(4, 1), 0), More: true, Data: data}
			r := New(Limits{})
			b.ReportAllocs()
			key := keyOf(4, 0)
			for b.Loop() {
				key.ID++
				key.Namespace = uintptr(key.ID % namespaces)
				r.Add(epoch, key, f)
			}
		})
	}
}

// Fragments of 8 bytes from the last to the first: each moves all others.
func BenchmarkBackwards(b *testing.B) {
	data := pattern(0, 0, 8)
	f := Fragment{Header: header(keyOf(4, 1), 0), More: true, Data: data}
	r := New(Limits{})
	b.ReportAllocs()
	key := keyOf(4, 0)
	for i := 0; b.Loop(); i++ {
		f.Offset = 8 * (64 - i%64)
		if i%64 == 0 {
			key.ID++
		}
		r.Add(epoch, key, f)
	}
}
