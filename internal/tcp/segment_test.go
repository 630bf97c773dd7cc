package tcp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"reflect"
	"testing"
)

// raw returns a segment with the given flags, options and payload. The options
// are padded to a 32-bit boundary with end-of-options.
func raw(flags Flags, options []byte, payload string) []byte {
	b := make([]byte, HeaderLen, 100)
	binary.BigEndian.PutUint16(b[0:], 0x1234)
	binary.BigEndian.PutUint16(b[2:], 0x5678)
	binary.BigEndian.PutUint32(b[4:], 0x9abcdef0)
	binary.BigEndian.PutUint32(b[8:], 0x0fedcba9)
	b = append(b, options...)
	for len(b)%4 != 0 {
		b = append(b, optEnd)
	}
	b[12], b[13] = byte(len(b)/4)<<4, byte(flags)
	binary.BigEndian.PutUint16(b[14:], 0x4321)
	return append(b, payload...)
}

func TestParseHeader(t *testing.T) {
	b := raw(ACK|PSH|ECE|CWR, nil, "data")
	b[12] |= 0x0f // reserved bits do not matter
	var s Segment
	if !s.Parse(b) {
		t.Fatal("refused")
	}
	want := Segment{SrcPort: 0x1234, DstPort: 0x5678, Seq: 0x9abcdef0, Ack: 0x0fedcba9,
		Flags: ACK | PSH | ECE | CWR, Window: 0x4321, Payload: []byte("data")}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got  %+v\nwant %+v", s, want)
	}
	if &s.Payload[0] != &b[HeaderLen] {
		t.Error("payload is not borrowed")
	}
}

// T002: data offset bounds.
func TestParseDataOffset(t *testing.T) {
	var s Segment
	for n := range HeaderLen {
		if s.Parse(raw(ACK, nil, "")[:n]) {
			t.Errorf("%d bytes accepted", n)
		}
	}
	for doff := range 16 {
		for extra := range 45 {
			b := append(raw(ACK, nil, ""), make([]byte, extra)...)
			b[12] = byte(doff) << 4
			want := doff >= 5 && doff*4 <= len(b)
			if got := s.Parse(b); got != want {
				t.Errorf("data offset %d in %d bytes: %v, want %v", doff, len(b), got, want)
			} else if got && len(s.Payload) != len(b)-doff*4 {
				t.Errorf("data offset %d in %d bytes: payload %d", doff, len(b), len(s.Payload))
			}
		}
	}
}

var optionSets = []Segment{
	{Flags: SYN, MSS: 1460},
	{Flags: SYN, SACKPermitted: true},
	{Flags: SYN, HasScale: true, Scale: 0},
	{Flags: SYN, HasScale: true, Scale: 14},
	{Flags: SYN | ACK, HasTimestamps: true, TSVal: 0xffffffff, TSEcr: 1},
	{Flags: SYN, MSS: 65535, SACKPermitted: true, HasScale: true, Scale: 7, HasTimestamps: true, TSVal: 1},
	{Flags: ACK, HasTimestamps: true, TSVal: 7, TSEcr: 9},
	{Flags: ACK, Blocks: 1, SACK: [maxBlocks]Block{{1, 2}}},
	{Flags: ACK, Blocks: 2, SACK: [maxBlocks]Block{{0xfffffff0, 16}, {3, 4}}},
	{Flags: ACK, Blocks: 3, SACK: [maxBlocks]Block{{1, 2}, {3, 4}, {5, 6}}, HasTimestamps: true},
	{Flags: ACK, Blocks: 4, SACK: [maxBlocks]Block{{1, 2}, {3, 4}, {5, 6}, {7, 8}}},
	{Flags: FIN | ACK | PSH | URG},
}

func TestSegmentRoundTrip(t *testing.T) {
	for i, want := range optionSets {
		for mask := range 16 { // and every subset of its options
			want := want
			if mask&1 != 0 {
				want.MSS = 0
			}
			if mask&2 != 0 {
				want.SACKPermitted = false
			}
			if mask&4 != 0 {
				want.HasScale, want.Scale = false, 0
			}
			if mask&8 != 0 {
				want.HasTimestamps, want.TSVal, want.TSEcr = false, 0, 0
			}
			want.SrcPort, want.DstPort, want.Seq, want.Ack, want.Window = 1, 65535, 0xfedcba98, 0x01234567, 0xabcd
			want.Payload = []byte("payload")
			b := bytes.Repeat([]byte{0xa5}, MaxHeaderLen)
			n := want.MarshalHeader(b)
			if n%4 != 0 || n != int(b[12]>>4)*4 || n > MaxHeaderLen {
				t.Fatalf("%d: header length %d, data offset %d", i, n, b[12]>>4)
			}
			if b[16]|b[17]|b[18]|b[19] != 0 {
				t.Errorf("%d: checksum and urgent pointer are not 0", i)
			}
			for _, c := range b[n:] {
				if c != 0xa5 {
					t.Fatalf("%d: written behind the header", i)
				}
			}
			var got Segment
			if !got.Parse(append(b[:n], want.Payload...)) || !reflect.DeepEqual(got, want) {
				t.Errorf("%d:\ngot  %+v\nwant %+v", i, got, want)
			}
		}
	}
}

// The layout is that of RFC 7323 appendix A: every option on a 32-bit boundary.
func TestMarshalLayout(t *testing.T) {
	s := Segment{Flags: SYN, MSS: 0x05b4, SACKPermitted: true, HasScale: true, Scale: 5, HasTimestamps: true,
		TSVal: 0x01020304, TSEcr: 0x05060708}
	b := make([]byte, MaxHeaderLen)
	want := []byte{2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 5, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	if got := b[HeaderLen:s.MarshalHeader(b)]; !bytes.Equal(got, want) {
		t.Errorf("SYN options % x, want % x", got, want)
	}
	s = Segment{Flags: ACK, Blocks: 1, SACK: [maxBlocks]Block{{0x0a0b0c0d, 0x0e0f1011}}}
	want = []byte{1, 1, 5, 10, 0xa, 0xb, 0xc, 0xd, 0xe, 0xf, 0x10, 0x11}
	if got := b[HeaderLen:s.MarshalHeader(b)]; !bytes.Equal(got, want) {
		t.Errorf("SACK option % x, want % x", got, want)
	}
}

// T003: options at any alignment, in any segment.
func TestParseAlignment(t *testing.T) {
	ts := []byte{8, 10, 1, 2, 3, 4, 5, 6, 7, 8}
	for pad := range 12 {
		o := append(bytes.Repeat([]byte{optNop}, pad), ts...)
		var s Segment
		if !s.Parse(raw(ACK, o, "x")) || !s.HasTimestamps || s.TSVal != 0x01020304 || s.TSEcr != 0x05060708 {
			t.Errorf("%d no-operations in front: %+v", pad, s)
		}
	}
}

// T004: unknown options with a length are skipped.
func TestParseUnknown(t *testing.T) {
	for _, kind := range []byte{6, 7, 9, 19, 30, 34, 69, 253, 254, 255} {
		for n := range 20 {
			o := append([]byte{kind, byte(2 + n)}, bytes.Repeat([]byte{2}, n)...)
			var s Segment
			if !s.Parse(raw(SYN, append(o, 2, 4, 5, 0xb4), "")) {
				t.Fatal("refused")
			}
			if s.MSS != 1460 || s.HasScale || s.SACKPermitted || s.HasTimestamps || s.Blocks != 0 {
				t.Errorf("kind %d with %d bytes: %+v", kind, n, s)
			}
		}
	}
}

// T005: illegal option lengths end the options or leave the option out, whole.
// T006: nothing behind the end of the options counts.
func TestParseMalformed(t *testing.T) {
	mss := []byte{2, 4, 5, 0xb4}
	tests := []struct {
		name  string
		o     []byte
		after bool // an MSS option behind it is still read
	}{
		{"length 0", []byte{0xff, 0, 0, 0}, false},
		{"length 1", []byte{0xff, 1, 1, 1}, false},
		{"length 0 of a known kind", []byte{3, 0}, false},
		{"length past the header", []byte{8, 10, 1, 2}, false},
		{"length 255", []byte{5, 255, 0, 0}, false},
		{"kind without length", []byte{1, 1, 1, 8}, false},
		{"end", []byte{0, 8, 10, 1}, false},
		{"MSS of 3", []byte{2, 3, 9}, true},
		{"MSS of 5", []byte{2, 5, 9, 9, 9}, true},
		{"MSS of 2", []byte{2, 2}, true},
		{"scale of 2", []byte{3, 2}, true},
		{"scale of 4", []byte{3, 4, 7, 7}, true},
		{"SACK permitted of 3", []byte{4, 3, 0}, true},
		{"timestamps of 9", []byte{8, 9, 1, 2, 3, 4, 5, 6, 7}, true},
		{"timestamps of 11", []byte{8, 11, 1, 2, 3, 4, 5, 6, 7, 8, 9}, true},
		{"SACK of 2", []byte{5, 2}, true},
		{"SACK of 9", []byte{5, 9, 1, 2, 3, 4, 5, 6, 7}, true},
		{"SACK of 11", append([]byte{5, 11}, make([]byte, 9)...), true},
	}
	for _, tt := range tests {
		o := append([]byte(nil), tt.o...)
		switch tt.name {
		case "length past the header", "length 255", "kind without length":
		default:
			o = append(o, mss...)
		}
		var s Segment
		if !s.Parse(raw(SYN, o, "x")) {
			t.Errorf("%s: refused", tt.name)
			continue
		}
		want := uint16(0)
		if tt.after {
			want = 1460
		}
		if s.MSS != want || s.HasScale || s.SACKPermitted || s.HasTimestamps || s.Blocks != 0 || len(s.Payload) != 1 {
			t.Errorf("%s: %+v, want MSS %d", tt.name, s, want)
		}
	}
}

// Options that a SYN alone may carry are not read elsewhere (T007), and a shift
// above 14 is 14 (T019).
func TestParseSYNOnly(t *testing.T) {
	o := []byte{2, 4, 5, 0xb4, 4, 2, 3, 3, 9, 1}
	var s Segment
	s.Parse(raw(ACK, o, ""))
	if s.MSS != 0 || s.SACKPermitted || s.HasScale {
		t.Errorf("read on an ACK: %+v", s)
	}
	for shift := range 256 {
		s.Parse(raw(SYN, []byte{3, 3, byte(shift)}, ""))
		if int(s.Scale) != min(shift, 14) || !s.HasScale {
			t.Errorf("shift %d is %d", shift, s.Scale)
		}
	}
}

func TestSegmentLen(t *testing.T) {
	for flags, want := range map[Flags]int64{0: 3, SYN: 4, FIN: 4, SYN | FIN: 5, ACK | RST | PSH | URG: 3} {
		if got := (&Segment{Flags: flags, Payload: make([]byte, 3)}).Len(); got != want {
			t.Errorf("flags %b: %d, want %d", flags, got, want)
		}
	}
}

// T031: what a closed port answers.
func TestResetFor(t *testing.T) {
	base := Segment{SrcPort: 5, DstPort: 6, Seq: 17, Ack: 34}
	tests := []struct {
		flags   Flags
		payload int
		want    string
	}{
		{0, 3, "RA 0 20"}, {SYN, 0, "RA 0 18"}, {SYN, 3, "RA 0 21"}, {SYN | FIN, 3, "RA 0 22"}, {FIN, 0, "RA 0 18"},
		{ACK, 3, "R 34 0"}, {SYN | ACK, 0, "R 34 0"}, {FIN | ACK, 3, "R 34 0"},
		{RST, 0, ""}, {RST | ACK, 0, ""}, {RST | SYN, 0, ""}, {SYN | FIN | RST | PSH | URG, 0, ""},
	}
	for _, tt := range tests {
		s := base
		s.Flags, s.Payload = tt.flags, make([]byte, tt.payload)
		got := ""
		if r, ok := ResetFor(&s); ok {
			name := map[Flags]string{RST: "R", RST | ACK: "RA"}[r.Flags]
			got = fmt.Sprintf("%s %d %d", name, r.Seq, r.Ack)
			if r.SrcPort != 6 || r.DstPort != 5 || r.Window != 0 || r.Len() != 0 {
				t.Errorf("%+v", r)
			}
			if _, ok := ResetFor(&r); ok {
				t.Error("a reset is answered")
			}
		}
		if got != tt.want {
			t.Errorf("flags %b with %d bytes: %q, want %q", tt.flags, tt.payload, got, tt.want)
		}
	}
	// The number acknowledged wraps.
	if r, _ := ResetFor(&Segment{Flags: SYN, Seq: 0xffffffff}); r.Ack != 0 {
		t.Errorf("acknowledges %d, want 0", r.Ack)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(raw(SYN, []byte{2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7}, ""))
	f.Add(raw(ACK, append([]byte{1, 1, 5, 34}, make([]byte, 32)...), "payload"))
	f.Add(raw(ACK, []byte{0xff, 0, 0, 0}, ""))
	f.Add(raw(SYN, append([]byte{2, 4, 5, 0xb4, 4, 2, 3, 3, 7, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 5, 18}, make([]byte, 16)...), ""))
	f.Fuzz(func(t *testing.T, b []byte) {
		in := append([]byte(nil), b...)
		var s Segment
		ok := s.Parse(b)
		if !bytes.Equal(in, b) {
			t.Fatal("Parse changed its input")
		}
		if !ok {
			return
		}
		if s.Scale > maxScale || s.Blocks > maxBlocks || len(s.Payload) > len(b)-HeaderLen {
			t.Fatalf("%+v", s)
		}
		if s.Flags&SYN == 0 && (s.MSS != 0 || s.HasScale || s.SACKPermitted) {
			t.Fatalf("option of a SYN on another segment: %+v", s)
		}
		// What was read can be written if padding leaves room for it.
		var options [100]byte
		if s.marshalOptions(options[:]) > MaxHeaderLen-HeaderLen {
			return
		}
		var out [MaxHeaderLen]byte
		n := s.MarshalHeader(out[:])
		var again Segment
		if !again.Parse(append(out[:n:n], s.Payload...)) {
			t.Fatal("what was written cannot be read")
		}
		if len(s.Payload) == 0 {
			s.Payload, again.Payload = nil, nil
		}
		if !reflect.DeepEqual(s, again) {
			t.Fatalf("read %+v\nthen %+v", s, again)
		}
	})
}
