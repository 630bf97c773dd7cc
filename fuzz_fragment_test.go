package slirp

import (
	"bytes"
	"encoding/binary"
	"maps"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// fragmentKey names the packet that a fragment is of.
type fragmentKey struct {
	version byte
	id      uint32
}

// rawFragment is a fragment as a fuzz input has it.
type rawFragment struct {
	key  fragmentKey
	off  int
	more bool
	data []byte // a part of the packet
}

// shapeFragment makes a fragment of a datagram of whatever bytes there are: from the
// guest to port 7000 of the server, of one of four packets, and not far inside it.
func shapeFragment(p []byte) []byte {
	be := binary.BigEndian
	fam := families[0]
	if len(p) > 0 && p[0]>>4 == 6 {
		fam = families[1]
		p = padded(shape6(p), 48)
		p[6], p[7], p[40], p[42], p[46] = 44, 64, 17, p[42]&0x0f, 0
		be.PutUint32(p[44:], be.Uint32(p[44:])&3)
		copy(p[8:], fam.guest.AsSlice())
		copy(p[24:], fam.server.AsSlice())
	} else {
		p = padded(shape4(p), 20)
		p[0], p[8], p[9] = 0x45, 64, 17
		be.PutUint16(p[4:], be.Uint16(p[4:])&3)
		be.PutUint16(p[6:], be.Uint16(p[6:])&0x61ff)
		copy(p[12:], fam.guest.AsSlice())
		copy(p[16:], fam.server.AsSlice())
	}
	repair(p)
	if f := readFragment(p); f.off == 0 && len(f.data) >= 8 {
		copy(f.data, []byte{4000 >> 8, 4000 & 0xff, 7000 >> 8, 7000 & 0xff})
	}
	return p
}

// readFragment reads what shapeFragment has made.
func readFragment(p []byte) rawFragment {
	be := binary.BigEndian
	if p[0]>>4 == 6 {
		bits := be.Uint16(p[42:])
		return rawFragment{fragmentKey{6, be.Uint32(p[44:])}, int(bits &^ 7), bits&1 != 0, p[48:]}
	}
	bits := be.Uint16(p[6:])
	return rawFragment{fragmentKey{4, uint32(be.Uint16(p[4:]))}, int(bits&0x1fff) * 8, bits&0x2000 != 0, p[20:]}
}

// fragmentModel puts packets together the simple way: of a map from every byte that
// has come to its value.
type fragmentModel map[fragmentKey]*modelPacket

type modelPacket struct {
	deadline time.Time
	refused  bool // nothing more is taken until the deadline
	came     []rawFragment
	bytes    map[int]byte
	end      int // where it ends; -1: not known
}

// add takes a fragment, and returns the packet that it completes.
func (m fragmentModel) add(now time.Time, f rawFragment) []byte {
	maps.DeleteFunc(m, func(_ fragmentKey, d *modelPacket) bool { return !now.Before(d.deadline) })
	if f.off == 0 && !f.more {
		return f.data
	}
	d := m[f.key]
	known := d != nil
	if !known {
		timeout := 30 * time.Second
		if f.key.version == 6 {
			timeout *= 2
		}
		d = &modelPacket{deadline: now.Add(timeout), bytes: make(map[int]byte), end: -1}
	}
	switch {
	case d.refused || d.has(f):
		return nil
	case d.refuses(f):
		d.refused = true // a later one finds nothing, if this was the first
		return nil
	case !known:
		m[f.key] = d
	}
	d.came = append(d.came, f)
	for i, b := range f.data {
		d.bytes[f.off+i] = b
	}
	if !f.more {
		d.end = f.off + len(f.data)
	}
	if len(d.bytes) != d.end {
		return nil
	}
	delete(m, f.key)
	packet := make([]byte, d.end)
	for i := range packet {
		packet[i] = d.bytes[i]
	}
	return packet
}

// has reports whether the fragment has come before.
func (d *modelPacket) has(f rawFragment) bool {
	for _, c := range d.came {
		if c.off == f.off && c.more == f.more && bytes.Equal(c.data, f.data) {
			return true
		}
	}
	return false
}

// refuses reports whether a fragment makes the whole packet one that is not taken.
func (d *modelPacket) refuses(f rawFragment) bool {
	end := f.off + len(f.data)
	if len(f.data) == 0 || f.more && len(f.data)%8 != 0 || len(d.came) == 64 {
		return true
	}
	if f.key.version == 6 && f.off == 0 && len(f.data) < 8 { // RFC 7112
		return true
	}
	for i := f.off; i < end; i++ {
		if _, ok := d.bytes[i]; ok {
			return true
		}
	}
	if d.end >= 0 && end > d.end || d.end >= 0 && !f.more {
		return true
	}
	for _, c := range d.came {
		if !f.more && c.off+len(c.data) > end {
			return true
		}
	}
	return false
}

// repairFragments makes the datagrams right that the fragments of an input make up:
// their UDP length, and the checksum over all of them. Which are left alone depends on
// the step of the fragment that completes one.
func repairFragments(steps []fragmentStep) {
	m := make(fragmentModel)
	repaired := make(map[fragmentKey]bool)
	var now time.Time
	for _, s := range steps {
		f := readFragment(s.packet)
		d := m.add(now, f)
		now = now.Add(s.sleep())
		if len(d) < 8 || s.do&stepBroken != 0 || repaired[f.key] {
			continue
		}
		whole := f.off == 0 && !f.more
		repaired[f.key] = !whole
		binary.BigEndian.PutUint16(d[4:], uint16(len(d)))
		d[6], d[7] = 0, 0
		src, dst := packetEnds(s.packet)
		sum := ^refSum(refPseudo(src, dst, 17, len(d)), d)
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(d[6:], sum)
		if whole {
			continue // d is the packet's
		}
		putHeader(steps, f.key, d[:8])
	}
}

// putHeader writes the UDP header of a packet into whatever is its first fragment.
func putHeader(steps []fragmentStep, key fragmentKey, header []byte) {
	for _, s := range steps {
		if f := readFragment(s.packet); f.key == key && f.off == 0 && f.more && len(f.data) >= 8 {
			copy(f.data, header)
		}
	}
}

// fragmentStep is a step of an input, with a packet that has its shape.
type fragmentStep struct {
	do     byte
	packet []byte
}

// sleep returns how long to wait behind the step. It is never just as long as a
// packet waits for its fragments.
func (s fragmentStep) sleep() time.Duration {
	return [4]time.Duration{0, 50 * time.Millisecond, 7 * time.Second, 61 * time.Second}[s.do&stepSleep]
}

func fragmentSteps(data []byte) (steps []fragmentStep) {
	for len(data) >= 3 && len(steps) < maxSteps {
		do, packet, rest := nextStep(data)
		steps, data = append(steps, fragmentStep{do, shapeFragment(bytes.Clone(packet))}), rest
	}
	repairFragments(steps)
	return steps
}

func TestRepairFragments(t *testing.T) {
	for _, fam := range families {
		want := udpPacket(netip.AddrPortFrom(fam.guest, 4000), fam.at(7000), pattern(500))
		hl := len(want) - 508
		broken := bytes.Clone(want)
		clear(broken[hl : hl+8])
		var data []byte
		for _, f := range fragmentsOf(broken, 104) {
			data = appendStep(data, 0, f)
		}
		m := make(fragmentModel)
		var got []byte
		steps := fragmentSteps(data)
		for _, s := range steps {
			var p ipPacket
			if err := parseIP(s.packet, &p); err != nil || p.badChecksum || p.malformed || !p.fragment {
				t.Errorf("%x does not get past the door: %v", s.packet, err)
			}
			got = m.add(time.Time{}, readFragment(s.packet))
		}
		if !bytes.Equal(got, want[hl:]) {
			t.Errorf("%d fragments make %x, want %x", len(steps), got, want[hl:])
		}
	}
	for n := range 70 { // whatever there is, a fragment becomes of it
		for _, b := range []byte{0, 0x4f, 0x66} {
			fragmentSteps(appendStep(appendStep(nil, 0, bytes.Repeat([]byte{b}, n)), 0, bytes.Repeat([]byte{b}, 60)))
		}
	}
}

// FuzzFragments has the fragments of an input reach a Stack, and the model of one.
func FuzzFragments(f *testing.F) {
	seeds := make(map[fragmentKey][]byte)
	for _, p := range recordedGuest(f) {
		if _, _, whole := transportAt(p); whole || len(p) < 48 {
			continue
		}
		key := fragmentKey{p[0] >> 4, binary.BigEndian.Uint32(p[44:])}
		if key.version == 4 {
			key.id = uint32(binary.BigEndian.Uint16(p[4:]))
		}
		seeds[key] = appendStep(seeds[key], byte(len(seeds[key])>>10&1), p)
	}
	if len(seeds) < 4 {
		f.Fatalf("%d packets were recorded in fragments", len(seeds))
	}
	for _, seed := range seeds {
		f.Add(seed)
		f.Add(append(bytes.Clone(seed), seed...))
	}
	for _, fam := range families {
		packet := udpPacket(netip.AddrPortFrom(fam.guest, 4000), fam.at(7000), pattern(100))
		var late, reverse []byte
		for i, part := range fragmentsOf(packet, 24) {
			late = appendStep(late, byte(i&3), part)
			reverse = append(appendStep(nil, 0, part), reverse...)
		}
		f.Add(late)
		f.Add(append(reverse, late...))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		steps := fragmentSteps(data[:min(len(data), 100_000)])
		synctest.Test(t, func(t *testing.T) {
			r := newFuzzRig(t)
			m := make(fragmentModel)
			for _, s := range steps {
				r.fragment(t, m, s)
			}
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if n := r.s.Stats().PendingFragments; n != 0 {
				t.Errorf("%d packets are still waited for", n)
			}
		})
	})
}

// fragment gives a fragment to the Stack, and to the model.
func (r *fuzzRig) fragment(t *testing.T, m fragmentModel, s fragmentStep) {
	before := r.s.Stats()
	r.mu.Lock()
	r.heard = nil
	r.mu.Unlock()
	f := readFragment(s.packet)
	want := m.add(time.Now(), f)
	r.mustSend(s.packet)
	synctest.Wait()
	st := r.s.Stats()
	put := st.PacketsReassembled - before.PacketsReassembled
	if whole := f.off == 0 && !f.more; (put == 1) != (want != nil && !whole) {
		t.Errorf("%d packets were put together, want %d bytes of one", put, len(want))
	}
	r.mu.Lock()
	heard := r.heard
	r.mu.Unlock()
	// What was put together and not dropped is at the host, up to its own length.
	switch {
	case want == nil && len(heard) > 0:
		t.Errorf("the host has got %q", heard)
	case want != nil && drops(st) == drops(before):
		n := int(binary.BigEndian.Uint16(want[4:]))
		if len(heard) != 1 || heard[0].payload != string(want[8:n]) || heard[0].flow.Destination.Port() != 7000 {
			t.Errorf("the host has got %q, want %q", heard, want[8:n])
		}
	}
	time.Sleep(s.sleep())
	synctest.Wait()
}
