package reassembly

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
	"unsafe"
)

func TestKeyHasNoPadding(t *testing.T) {
	var k Key
	if got, want := unsafe.Sizeof(k), unsafe.Sizeof(k.Namespace)+16+16+4+2+2; got != want {
		t.Errorf("a key takes %d bytes, its fields %d", got, want)
	}
}

// permutations calls f with every order of 0…n-1.
func permutations(n int, f func(order []int)) {
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	var permute func(k int)
	permute = func(k int) {
		if k == n {
			f(order)
			return
		}
		for i := k; i < n; i++ {
			order[k], order[i] = order[i], order[k]
			permute(k + 1)
			order[k], order[i] = order[i], order[k]
		}
	}
	permute(0)
}

func TestEveryOrder(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for _, copies := range []int{1, 2} {
			t.Run(fmt.Sprintf("%d of each", copies), func(t *testing.T) {
				x := newTester(t, Limits{})
				key := keyOf(version, 0xabcd)
				data := pattern(1, 0, 8192)
				fs := split(key, 0, data, 1480)
				want := whole(key, 0, data)
				n := 0
				permutations(len(fs), func(order []int) {
					n++
					last := order[len(order)-1]
					for _, i := range order[:len(order)-1] {
						x.want(Pending, key, fs[i])
						for range copies - 1 {
							x.want(Duplicate, key, fs[i])
						}
					}
					x.wantPacket(want, key, fs[last])
					x.wantEmpty()
				})
				if n != 720 {
					t.Errorf("%d orders", n)
				}
			})
		}
	})
}

// Fragments that hold the same bytes are not duplicates for that.
func TestEqualData(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		x := newTester(t, Limits{})
		key := keyOf(version, 1)
		data := make([]byte, 5*16)
		fs := split(key, 0, data, 16)
		permutations(len(fs), func(order []int) {
			for _, i := range order[:len(order)-1] {
				x.want(Pending, key, fs[i])
			}
			x.wantPacket(whole(key, 0, data), key, fs[order[len(order)-1]])
			x.wantEmpty()
		})
	})
}

func TestRandomSplits(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		rnd := rand.New(rand.NewPCG(1, uint64(version)))
		x := newTester(t, Limits{})
		for round := range 400 {
			key := keyOf(version, uint32(round))
			extra := rnd.IntN(11)
			data := pattern(uint32(round), 0, 9+rnd.IntN(60000))
			var fs []Fragment
			for off := 0; off < len(data); {
				n := 8 * (1 + rnd.IntN(1+len(data)/4/(1+rnd.IntN(16))/8))
				if len(fs) == 63 || off+n > len(data) || off == 0 && n >= len(data) {
					n = len(data) - off
				}
				if off == 0 && n == len(data) {
					n = 8
				}
				fs = append(fs, frag(key, extra, off, off+n < len(data), data[off:off+n]))
				off += n
			}
			rnd.Shuffle(len(fs), func(i, j int) { fs[i], fs[j] = fs[j], fs[i] })
			for _, f := range fs[:len(fs)-1] {
				x.want(Pending, key, f)
			}
			x.wantPacket(whole(key, extra, data), key, fs[len(fs)-1])
			x.wantEmpty()
		}
	})
}

// The packet has the header of the fragment at offset 0, whatever the others
// bring: other options, other extension headers, another next header.
func TestHeaderOfTheFirst(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		x := newTester(t, Limits{})
		key := keyOf(version, 7)
		data := pattern(2, 0, 53)
		for first := range 11 {
			for others := range 11 {
				fs := []Fragment{
					frag(key, first, 0, true, data[:16]),
					frag(key, others, 16, true, data[16:40]),
					frag(key, (others+first)%11, 40, false, data[40:]),
				}
				for _, f := range fs[1:] {
					h := f.Header
					if version == 4 {
						h[1], h[8] = 0, 1 // service, TTL
					} else {
						h[7], h[len(h)-8] = 1, 6 // hop limit, next header
					}
				}
				permutations(len(fs), func(order []int) {
					x.want(Pending, key, fs[order[0]])
					x.want(Pending, key, fs[order[1]])
					x.wantPacket(whole(key, first, data), key, fs[order[2]])
					x.wantEmpty()
				})
			}
		}
	})
}

// The flags of IPv4 that say nothing about fragments are kept.
func TestFlagsKept(t *testing.T) {
	x := newTester(t, Limits{})
	key := keyOf(4, 7)
	data := pattern(2, 0, 20)
	f := frag(key, 0, 0, true, data[:8])
	f.Header[6] |= 0xc0
	want := whole(key, 0, data)
	want[6] = 0xc0
	x.want(Pending, key, f)
	x.wantPacket(want, key, frag(key, 0, 8, false, data[8:]))
}

// A fragment against one that is there at 16…32, in each of the ways that two
// ranges can lie. Overlaps condemn the datagram.
func TestOverlap(t *testing.T) {
	other := bytes.Repeat([]byte{0xaa}, 64)
	for _, tt := range []struct {
		name     string
		off, end int
		other    bool // other bytes than the first to come
		want     Verdict
	}{
		{"in front", 0, 8, false, Pending},
		{"in front, touching", 0, 16, false, Pending},
		{"over the front", 8, 24, false, Overlap},
		{"over the front, other bytes", 8, 24, true, Overlap},
		{"around, same end", 8, 32, false, Overlap},
		{"around", 8, 40, false, Overlap},
		{"shorter, same front", 16, 24, false, Overlap},
		{"the same", 16, 32, false, Duplicate},
		{"the same place, other bytes", 16, 32, true, Overlap},
		{"longer, same front", 16, 40, false, Overlap},
		{"shorter, same end", 24, 32, false, Overlap},
		{"over the end", 24, 40, false, Overlap},
		{"behind, touching", 32, 48, false, Pending},
		{"behind", 40, 48, false, Pending},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachVersion(t, func(t *testing.T, version uint16) {
				x := newTester(t, Limits{})
				key := keyOf(version, 3)
				data := pattern(3, 0, 64)
				there := frag(key, 0, 16, true, data[16:32])
				from := data
				if tt.other {
					from = other
				}
				f := frag(key, 0, tt.off, true, from[tt.off:tt.end])
				x.want(Pending, key, there)
				x.want(tt.want, key, f)
				switch tt.want {
				case Pending:
					x.wantHeld(1, there, f)
				case Duplicate:
					x.wantHeld(1, there)
				default:
					x.wantHeld(1)
					x.wantCondemned(key, data)
				}
			})
		})
	}
}

// wantCondemned wants what comes of a datagram to be discarded until its time is
// over, and nothing to be said then.
func (t *tester) wantCondemned(key Key, data []byte) {
	t.Helper()
	for _, f := range split(key, 0, data, 16) {
		t.want(Discarded, key, f)
	}
	until := t.r.Deadline().Sub(t.now)
	if until > 60*time.Second {
		t.Fatalf("condemned for %v", until)
	}
	t.expire(until - 1)
	t.want(Discarded, key, frag(key, 0, 0, true, data[:8]))
	t.expire(1)
	t.wantEmpty()
	fs := split(key, 0, data, 32)
	t.want(Pending, key, fs[0])
	t.wantPacket(whole(key, 0, data), key, fs[1])
}

// Between two fragments, one that covers the hole and more, or less, or the hole.
func TestOverlapWithNeighbours(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		key := keyOf(version, 3)
		data := pattern(3, 0, 48)
		for off := 0; off < 48; off += 8 {
			for end := off + 8; end <= 48; end += 8 {
				x := newTester(t, Limits{})
				x.want(Pending, key, frag(key, 0, 8, true, data[8:16]))
				x.want(Pending, key, frag(key, 0, 32, true, data[32:40]))
				want := Overlap
				switch {
				case end <= 8 || off >= 16 && end <= 32 || off >= 40:
					want = Pending
				case off == 8 && end == 16 || off == 32 && end == 40:
					want = Duplicate
				}
				x.want(want, key, frag(key, 0, off, true, data[off:end]))
			}
		}
	})
}

func TestEnd(t *testing.T) {
	type part struct {
		off, end int
		more     bool
	}
	for _, tt := range []struct {
		name  string
		parts []part // all but the last are Pending
		want  Verdict
	}{
		{"the last again", []part{{24, 30, false}, {24, 30, false}}, Duplicate},
		{"the last again, shorter", []part{{24, 30, false}, {24, 29, false}}, Inconsistent},
		{"the last again, longer", []part{{24, 30, false}, {24, 31, false}}, Inconsistent},
		{"another last, in front", []part{{24, 30, false}, {8, 16, false}}, Inconsistent},
		{"another last, behind", []part{{24, 30, false}, {32, 40, false}}, Inconsistent},
		{"another last, same end", []part{{24, 30, false}, {16, 30, false}}, Overlap},
		{"more behind the last", []part{{24, 30, false}, {32, 40, true}}, Inconsistent},
		{"more over the last", []part{{24, 30, false}, {16, 32, true}}, Inconsistent},
		{"more up to the last", []part{{24, 32, false}, {16, 24, true}}, Pending},
		{"the last was not", []part{{24, 32, false}, {24, 32, true}}, Overlap},
		{"the last after all", []part{{24, 32, true}, {24, 32, false}}, Overlap},
		{"the last in front of what is there", []part{{24, 32, true}, {8, 16, false}}, Inconsistent},
		{"the last in front of what is there, touching", []part{{24, 32, true}, {8, 24, false}}, Inconsistent},
		{"the last over what is there", []part{{24, 32, true}, {8, 28, false}}, Inconsistent},
		{"the last around what is there", []part{{24, 32, true}, {8, 33, false}}, Overlap},
		{"the last behind what is there", []part{{24, 32, true}, {32, 33, false}}, Pending},
	} {
		t.Run(tt.name, func(t *testing.T) {
			eachVersion(t, func(t *testing.T, version uint16) {
				x := newTester(t, Limits{})
				key := keyOf(version, 4)
				data := pattern(4, 0, 64)
				for i, p := range tt.parts {
					want := Pending
					if i == len(tt.parts)-1 {
						want = tt.want
					}
					x.want(want, key, frag(key, 0, p.off, p.more, data[p.off:p.end]))
				}
				if tt.want == Overlap || tt.want == Inconsistent {
					x.wantHeld(1)
					x.wantCondemned(key, data)
				}
			})
		})
	}
}

// What no datagram can have is refused. It leaves nothing behind, but for the
// datagram that it names.
func TestLengths(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		key := keyOf(version, 5)
		data := pattern(5, 0, 65536)
		type row struct {
			name string
			f    Fragment
			want Verdict
		}
		rows := []row{
			{"no data, more", frag(key, 0, 8, true, nil), Empty},
			{"no data, first", frag(key, 0, 0, true, nil), Empty},
			{"no data, last", frag(key, 0, 8, false, nil), Empty},
			{"ping of death", frag(key, 0, 65528, false, data[:1480]), TooLong},
			{"the farthest", frag(key, 0, 65528, false, data[:8]), TooLong},
			{"the farthest, more", frag(key, 0, 65528, true, data[:8]), TooLong},
			{"the longest", frag(key, 0, 65528, false, data[:65500]), TooLong},
			{"header cut", Fragment{Header: frag(key, 0, 0, true, nil).Header, NextHeader: 6, HeaderCut: true, More: true, Data: data[:8]}, HeaderIncomplete},
		}
		for n := 1; n < 24; n++ {
			if n%8 != 0 {
				rows = append(rows,
					row{fmt.Sprintf("%d bytes, first", n), frag(key, 0, 0, true, data[:n]), BadLength},
					row{fmt.Sprintf("%d bytes, more", n), frag(key, 0, 16, true, data[:n]), BadLength},
					row{fmt.Sprintf("%d bytes, last", n), frag(key, 0, 48, false, data[:n]), Pending})
			}
		}
		for _, tt := range rows {
			t.Run(tt.name, func(t *testing.T) {
				x := newTester(t, Limits{})
				x.want(tt.want, key, tt.f)
				if tt.want == Pending {
					return
				}
				x.wantEmpty()
				x.want(Pending, key, frag(key, 0, 24, true, data[24:32]))
				x.want(tt.want, key, tt.f)
				x.wantHeld(1)
				x.wantCondemned(key, data[:64])
			})
		}
	})
}

// HeaderCut is about the first fragment, and no other.
func TestHeaderCutElsewhere(t *testing.T) {
	x := newTester(t, Limits{})
	key := keyOf(6, 5)
	f := frag(key, 0, 8, true, pattern(0, 0, 8))
	f.HeaderCut = true
	x.want(Pending, key, f)
}

// A datagram as long as the header leaves room for is fine, in any order; one
// byte more is not, whenever that comes to light.
func TestLongest(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		for extra := range 11 {
			key := keyOf(version, 6)
			longest := 65535 - 20 - 4*extra
			if version == 6 {
				longest = 65535 - 8*extra
			}
			data := pattern(6, 0, longest+1)
			want := whole(key, extra, data[:longest])
			if version == 4 && len(want) != 65535 || version == 6 && len(want) != 40+65535 {
				t.Fatalf("the longest packet has %d bytes", len(want))
			}
			const cut = 32 << 10
			first := frag(key, extra, 0, true, data[:cut])
			last := frag(key, extra, cut, false, data[cut:longest])
			over := frag(key, extra, cut, false, data[cut:])

			x := newTester(t, Limits{})
			x.want(Pending, key, first)
			x.wantPacket(want, key, last)
			x.want(Pending, key, last)
			x.wantPacket(want, key, first)
			x.wantEmpty()

			x.want(Pending, key, first)
			x.want(TooLong, key, over)
			x.want(Discarded, key, last)

			x = newTester(t, Limits{})
			if extra == 0 {
				x.want(TooLong, key, over)
				x.wantEmpty()
				continue
			}
			x.want(Pending, key, over)
			x.want(TooLong, key, first)
			x.want(Discarded, key, last)
		}
	})
}

// The longest datagram in the fragments of an Ethernet, and of the least MTU.
func TestManyFragments(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		x := newTester(t, Limits{})
		key := keyOf(version, 6)
		data := pattern(6, 0, 65515)
		for _, size := range []int{1480, 1448, 1232} {
			fs := split(key, 0, data, size)
			slices.Reverse(fs)
			for _, f := range fs[:len(fs)-1] {
				x.want(Pending, key, f)
			}
			x.wantPacket(whole(key, 0, data), key, fs[len(fs)-1])
			x.wantEmpty()
		}
		fs := split(key, 0, data[:64*8], 8)
		for _, f := range fs[:63] {
			x.want(Pending, key, f)
		}
		x.wantPacket(whole(key, 0, data[:64*8]), key, fs[63])
		fs = split(key, 0, data[:65*8], 8)
		for _, f := range fs[:64] {
			x.want(Pending, key, f)
		}
		x.want(Duplicate, key, fs[63])
		x.want(TooMany, key, fs[64])
		x.wantHeld(1)
		x.wantCondemned(key, data[:64])
	})
}

// RFC 6946 section 4: one that is all of its datagram is "processed in isolation".
func TestAtomic(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		x := newTester(t, Limits{})
		key := keyOf(version, 8)
		data := pattern(8, 0, 32)
		x.wantPacket(whole(key, 2, data[:7]), key, frag(key, 2, 0, false, data[:7]))
		x.wantPacket(whole(key, 0, nil), key, frag(key, 0, 0, false, nil))
		x.wantEmpty()
		fs := split(key, 1, data, 16)
		x.want(Pending, key, fs[0])
		x.wantPacket(whole(key, 3, data[:9]), key, frag(key, 3, 0, false, data[:9]))
		x.wantHeld(1, fs[0])
		x.wantPacket(whole(key, 1, data), key, fs[1])

		x.want(Pending, key, fs[0])
		x.want(Overlap, key, frag(key, 0, 8, true, data[8:16]))
		x.wantPacket(whole(key, 3, data[:9]), key, frag(key, 3, 0, false, data[:9]))
		x.want(Discarded, key, fs[1])
	})
}

// Datagrams that differ in one field of the key do not mix.
func TestKeys(t *testing.T) {
	base := keyOf(4, 9)
	keys := []Key{base}
	for _, change := range []func(*Key){
		func(k *Key) { k.Namespace++ },
		func(k *Key) { k.Src[15]++ },
		func(k *Key) { k.Dst[15]++ },
		func(k *Key) { k.Proto = 1 },
		func(k *Key) { k.ID++ },
		func(k *Key) { *k = keyOf(6, 9) },
		func(k *Key) { *k = keyOf(6, 9); k.Namespace++ },
		func(k *Key) { *k = keyOf(6, 9); k.Src[0]++ },
		func(k *Key) { *k = keyOf(6, 9); k.ID |= 1 << 31 },
	} {
		k := base
		change(&k)
		keys = append(keys, k)
	}
	x := newTester(t, Limits{})
	rnd := rand.New(rand.NewPCG(9, 9))
	for range 50 {
		type step struct {
			key int
			f   Fragment
		}
		var steps []step
		left := make([]int, len(keys))
		for i, k := range keys {
			fs := split(k, i%3, pattern(uint32(i), 0, 100), 24)
			left[i] = len(fs)
			for _, f := range fs {
				steps = append(steps, step{i, f})
			}
		}
		rnd.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
		for _, s := range steps {
			k := keys[s.key]
			if left[s.key]--; left[s.key] > 0 {
				x.want(Pending, k, s.f)
			} else {
				x.wantPacket(whole(k, s.key%3, pattern(uint32(s.key), 0, 100)), k, s.f)
			}
		}
		x.wantEmpty()
	}
}

func TestExpire(t *testing.T) {
	eachVersion(t, func(t *testing.T, version uint16) {
		timeout := 30 * time.Second
		if version == 6 {
			timeout = 60 * time.Second
		}
		x := newTester(t, Limits{})
		data := pattern(10, 0, 4096)
		with, without := keyOf(version, 1), keyOf(version, 2)
		first := frag(with, 3, 0, true, data[:40])
		x.want(Pending, with, frag(with, 0, 80, false, data[80:99]))
		x.want(Pending, without, frag(without, 0, 8, true, data[8:16]))

		// What comes later does not put off the end.
		x.expire(timeout / 2)
		x.want(Pending, with, first)
		if want := epoch.Add(timeout); !x.r.Deadline().Equal(want) {
			t.Fatalf("the deadline is %v, want %v", x.r.Deadline(), want)
		}
		x.expire(timeout/2 - 1)
		x.want(Duplicate, with, first)
		x.now = x.now.Add(1)
		expired := x.r.Expire(x.now)
		if len(expired) != 2 {
			t.Fatalf("%d datagrams have expired", len(expired))
		}
		for _, e := range expired {
			var want []byte
			if e.Key == with {
				want = append(bytes.Clone(first.Header), first.Data...)
			}
			if !bytes.Equal(e.Front, want) || (e.Front == nil) != (want == nil) {
				t.Errorf("datagram %d: front %x, want %x", e.Key.ID, e.Front, want)
			}
		}
		x.wantEmpty()
		x.expire(time.Hour)

		// The front is no longer than an ICMP error can be.
		x.want(Pending, with, frag(with, 0, 0, true, data[:4000]))
		f := frag(with, 0, 0, true, data[:4000])
		if e := x.expire(timeout, with); !bytes.Equal(e[0].Front, append(f.Header, f.Data...)[:1280]) {
			t.Errorf("a front of %d bytes: %.80x", len(e[0].Front), e[0].Front)
		}
	})
}

// Datagrams expire one by one, in the order of their deadlines.
func TestDeadlines(t *testing.T) {
	x := newTester(t, Limits{})
	late6, early4, late4 := keyOf(6, 1), keyOf(4, 1), keyOf(4, 2)
	begin := func(k Key) { x.want(Pending, k, frag(k, 0, 8, true, pattern(0, 0, 8))) }
	deadline := func(d time.Duration) {
		t.Helper()
		if got := x.r.Deadline().Sub(epoch); got != d {
			t.Fatalf("the deadline is at %v, want %v", got, d)
		}
	}
	begin(late6)
	deadline(60 * time.Second)
	x.now = epoch.Add(10 * time.Second)
	begin(early4)
	deadline(40 * time.Second)
	x.now = epoch.Add(35 * time.Second)
	begin(late4)
	x.expire(5*time.Second - 1)
	x.expire(1, early4)
	deadline(60 * time.Second)
	x.expire(30*time.Second, late6, late4)
	x.wantEmpty()
}

func TestTimeoutsConfigured(t *testing.T) {
	x := newTester(t, Limits{Timeout4: 2 * time.Second, Timeout6: time.Second})
	k4, k6 := keyOf(4, 1), keyOf(6, 1)
	x.want(Pending, k4, frag(k4, 0, 8, true, pattern(0, 0, 8)))
	x.want(Pending, k6, frag(k6, 0, 8, true, pattern(0, 0, 8)))
	x.expire(time.Second - 1)
	x.expire(1, k6)
	x.expire(time.Second, k4)
}

func TestVerdictString(t *testing.T) {
	seen := make(map[string]bool)
	for v := range numVerdicts {
		if s := v.String(); s == "" || seen[s] {
			t.Errorf("verdict %d is %q", v, s)
		} else {
			seen[s] = true
		}
	}
}
