package pktscript

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

const sample = `// a comment
--ip_version=ipv4   /* another,
over two lines */
--tolerance_usecs=10000 # a third
--local_ip=192.0.2.1 --strict_segments
` + "`sysctl -q net.ipv4.tcp_sack=1`" + `
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
   +0 setsockopt(3, SOL_SOCKET, SO_LINGER, {onoff=1, linger=0}, 8) = 0
+.1...0.200 connect(3, {sa_family = AF_INET, sin_port = htons(8080), sin_addr = inet_addr("192.0.2.1")}, 16) = -1 EINPROGRESS (Operation now in progress)
   +0 > S 0:0(0) <mss 1460,sackOK,TS val 100 ecr 0,nop,wscale 8>
0.2~0.3 < [ect0] S. 0:0(0) ack 1 win 5792 <mss 1460,nop,wscale 2,nop,nop,sackOK>
 * > [noecn] FP. 1:1001(1000) ack 1 win 5 urg 7 <...>
+0.1~+0.2 < SEW 4294967295:4294967295(0) win 0 <sack 1:2 4294967290:3,unknown 253 0x0a0b,raw ff00,eol>
+0 < [1:1461(1460)] icmp unreachable frag_needed mtu 1200
+0 < - 1:11(10) win 0
+0 < [ce] 1000 > 65535 . 1:11(10) ack 1 win 0
+0 < icmp time_exceeded [1:1461(1460)]
+0 poll([{fd=3, events=POLLIN|POLLOUT, revents=POLLOUT}], 1, 0) = 1
+0 readv(3, [{..., 10}, {..., 20}], 2) = 0x1e
+0 write(3, "a\"b" "c"..., 4) = 4
+0 fcntl(3, F_GETFL) = 0x2 (flags O_RDWR|O_LARGEFILE)
+0 %{ assert tcpi_snd_cwnd == 10, tcpi_snd_cwnd }%
`

func TestParse(t *testing.T) {
	s, err := Parse(sample)
	if err != nil {
		t.Fatal(err)
	}
	wantOptions := []Option{{2, "ip_version", "ipv4"}, {4, "tolerance_usecs", "10000"}, {5, "local_ip", "192.0.2.1"}, {5, "strict_segments", ""}}
	if !reflect.DeepEqual(s.Options, wantOptions) {
		t.Errorf("options %v, want %v", s.Options, wantOptions)
	}
	want := []struct {
		line       int
		time, text string
	}{
		{6, "+0.000000", "`sysctl -q net.ipv4.tcp_sack=1`"},
		{7, "0.000000", "socket(..., SOCK_STREAM, IPPROTO_TCP) = 3"},
		{8, "+0.000000", "setsockopt(3, SOL_SOCKET, SO_LINGER, {onoff=1, linger=0}, 8) = 0"},
		{9, "+0.100000...0.200000", `connect(3, {sa_family=AF_INET, sin_port=htons(8080), sin_addr=inet_addr("192.0.2.1")}, 16) = -1 EINPROGRESS`},
		{10, "+0.000000", "> S 0:0(0) <mss 1460,sackOK,TS val 100 ecr 0,nop,wscale 8>"},
		{11, "0.200000~0.300000", "< [ect0] S. 0:0(0) ack 1 win 5792 <mss 1460,nop,wscale 2,nop,nop,sackOK>"},
		{12, "*", "> [noecn] FP. 1:1001(1000) ack 1 win 5 urg 7 <...>"},
		{13, "+0.100000~+0.200000", "< SEW 4294967295:4294967295(0) win 0 <sack 1:2 4294967290:3,unknown 253 0x0a0b,raw 0xff00,eol>"},
		{14, "+0.000000", "< [1:1461(1460)] icmp unreachable frag_needed mtu 1200"},
		{15, "+0.000000", "< - 1:11(10) win 0"},
		{16, "+0.000000", "< [ce] 1000 > 65535 . 1:11(10) ack 1 win 0"},
		{17, "+0.000000", "< [1:1461(1460)] icmp time_exceeded"},
		{18, "+0.000000", "poll([{fd=3, events=POLLIN|POLLOUT, revents=POLLOUT}], 1, 0) = 1"},
		{19, "+0.000000", "readv(3, [{..., 10}, {..., 20}], 2) = 30"},
		{20, "+0.000000", `write(3, "a\"bc", 4) = 4`},
		{21, "+0.000000", "fcntl(3, F_GETFL) = 2"},
		{22, "+0.000000", "%{ assert tcpi_snd_cwnd == 10, tcpi_snd_cwnd }%"},
	}
	if len(s.Events) != len(want) {
		t.Fatalf("%d events, want %d", len(s.Events), len(want))
	}
	for i, w := range want {
		e := &s.Events[i]
		if e.Line != w.line || e.Time.String() != w.time || e.String() != w.text {
			t.Errorf("event %d: line %d, %v %v, want line %d, %v %v", i, e.Line, e.Time, e, w.line, w.time, w.text)
		}
	}
}

func TestTimes(t *testing.T) {
	for text, want := range map[string]Time{
		"0":           {},
		"1.5":         {At: 1500 * time.Millisecond},
		"+.000001":    {Kind: Relative, At: time.Microsecond},
		"*":           {Kind: Anytime},
		"1~2":         {At: time.Second, Range: true, End: 2 * time.Second},
		"+1~+2":       {Kind: Relative, At: time.Second, Range: true, End: 2 * time.Second},
		"0...0.1":     {Blocks: true, Returns: 100 * time.Millisecond},
		"0.100...0.2": {At: 100 * time.Millisecond, Blocks: true, Returns: 200 * time.Millisecond},
		"+0...3":      {Kind: Relative, Blocks: true, Returns: 3 * time.Second},
	} {
		s, err := Parse(text + " close(3) = 0")
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := s.Events[0].Time; got != want {
			t.Errorf("%s: %+v, want %+v", text, got, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	for _, src := range []string{
		"0", "x", "0 close(3)", "0 close(3 = 0", "0 < S 0:0(0)", "0 < S 0:1(0) win 1",
		"0 < S 0:0(0) win 65536", "0 < Q 0:0(0) win 1", "0 < . 0:0(0) ack 4294967296 win 1", "+1~2 close(3) = 0",
		"2~1 close(3) = 0", "0 > . 1:1(0) ack 1 <mss>", "0 > . 1:1(0) ack 1 <mss 65536>", "0 > . 1:1(0) ack 1 <xyz>",
		"0 > . 1:1(0) ack 1 <raw xyz>", "0 < . 1:1(0) ack 1 win 1 <...>", "/* no end", "0 `no end", `0 write(3, "no end`,
		"0 %{ no end", "--x=\"no end", "0 close(3) = 0 (no end", "-1 close(3) = 0", "0 > [1:2(1)] . 1:1(0) ack 1",
		"0 > . 1:1(0) ack 1 <raw 0000000000000000000000000000000000000000000000000000000000000000000000000000000000>",
		"1e3 close(3) = 0", "99999999999999999999 close(3) = 0",
	} {
		s, err := Parse(src)
		if err == nil {
			t.Errorf("%q: no error, events %v", src, s.Events)
		}
		var e *Error
		if !errors.As(err, &e) || e.Line != 1 || errors.Is(err, ErrUnsupported) {
			t.Errorf("%q: error %v", src, err)
		}
	}
}

func TestUnsupported(t *testing.T) {
	for _, src := range []string{
		"\n0 > udp (1000)", "\n0 < .5 1:1(0) ack 1 win 1", "\n0 < S 0:0(0) win 1 <md5 00>",
		"\n0 < S 0:0(0) win 1 {mut tcp mss}", "\n0 > [flowlabel 0x1] S 0:0(0)", "\n0 > SA 0:0(0)", "\n0 < icmp unreachable [udp (100)]", "\n0 < [udp (100)] icmp unreachable", "\n0 < icmp echo_request id 7",
	} {
		_, err := Parse(src)
		var e *Error
		if !errors.Is(err, ErrUnsupported) || !errors.As(err, &e) || e.Line != 2 {
			t.Errorf("%q: error %v", src, err)
		}
	}
}

func TestFieldsAndWords(t *testing.T) {
	s, err := Parse("0 f({fd=3, events=A|B|C}, 0) = 0")
	if err != nil {
		t.Fatal(err)
	}
	e := s.Events[0].Call.Args[0]
	fd, ok := e.Field("fd")
	if !ok || fd.Int != 3 {
		t.Error("fd", fd, ok)
	}
	events, _ := e.Field("events")
	if got := strings.Join(events.Words(), " "); got != "A B C" {
		t.Error("words", got)
	}
	if _, ok := e.Field("revents"); ok {
		t.Error("a field that is not there")
	}
}

// segments are packets of every shape, which the wire keeps.
var segments = []string{
	"> - 0:0(0) win 0",
	"> S 4294967295:4294967295(0) win 65535 <mss 1460,sackOK,TS val 100 ecr 4294967295,nop,wscale 14>",
	"> SEW 0:0(0) win 1",
	"> FPU. 1:1001(1000) ack 4294967295 win 7 urg 65535",
	"> . 1:1(0) ack 1 win 1 <nop,nop,sack 1:2 3:4 4294967290:6>",
	"> R 1:1(0) win 0",
	"> . 1:1(0) ack 1 win 1 <nop,nop,TS val 1 ecr 2,unknown 253 0x0102,nop,nop,nop,nop>",
	"> . 1:1(0) ack 1 win 1 <unknown 2 0x01,eol>",
}

func TestWire(t *testing.T) {
	for _, text := range segments {
		p, err := ParsePacket(text)
		if err != nil {
			t.Fatal(text, err)
		}
		payload := make([]byte, p.Len)
		got, src, dst, data, err := Unmarshal(p.Marshal(1, 2, payload))
		if err != nil || src != 1 || dst != 2 || len(data) != p.Len || got.String() != text {
			t.Errorf("%s: got %v %v %v, %d bytes, %v", text, got, src, dst, len(data), err)
		}
	}
}

func TestUnmarshalErrors(t *testing.T) {
	good := (&Packet{Flags: ACK, Options: []TCPOption{{Kind: KindNOP}, {Kind: KindEOL}}}).Marshal(1, 2, nil)
	if _, _, _, _, err := Unmarshal(good); err != nil {
		t.Fatal(err)
	}
	for name, breakIt := range map[string]func(b []byte) []byte{
		"cut off":                func(b []byte) []byte { return b[:19] },
		"offset below 5":         func(b []byte) []byte { b[12] = 0x40; return b },
		"offset above the end":   func(b []byte) []byte { b[12] = 0x70; return b },
		"reserved bits":          func(b []byte) []byte { b[12] |= 1; return b },
		"urgent pointer":         func(b []byte) []byte { b[19] = 1; return b },
		"ack without the flag":   func(b []byte) []byte { b[13], b[8] = 0, 1; return b },
		"padding":                func(b []byte) []byte { b[23] = 1; return b },
		"option length 0":        func(b []byte) []byte { b[21] = 8; return b },
		"option beyond the end":  func(b []byte) []byte { b[21], b[22] = 8, 4; return b },
		"option without length":  func(b []byte) []byte { b[21], b[22], b[23] = 1, 1, 8; return b },
		"option length 1 at end": func(b []byte) []byte { b[21], b[22], b[23] = 1, 8, 1; return b },
	} {
		if _, _, _, _, err := Unmarshal(breakIt(append([]byte(nil), good...))); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestDiff(t *testing.T) {
	base := "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 60>"
	strict, lenient := Rules{TickTolerance: 1}, Rules{Lenient: true, TickTolerance: -1}
	for _, c := range []struct {
		want, got       string
		strict, lenient int // differences
	}{
		{base, base, 0, 0},
		{base, "> . 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 60>", 1, 0},
		{base, "> FP. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 60>", 1, 1},
		{base, "> P. 2:1001(999) ack 6 win 101 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 60>", 4, 3},
		{base, "> P. 1:1001(1000) ack 5 win 100 <wscale 8,nop,mss 1460,TS val 9 ecr 60,sack 1:2,eol>", 1, 0},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1461,nop,wscale 7,sack 1:2,TS val 50 ecr 60>", 1, 1},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:3,TS val 50 ecr 60>", 1, 1},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 61>", 1, 1},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 51 ecr 60>", 0, 0},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2,TS val 52 ecr 60>", 1, 0},
		{base, "> P. 1:1001(1000) ack 5 win 100 <mss 1460,nop,wscale 7,sack 1:2>", 1, 1},
		{base, "> P. 1:1001(1000) ack 5 win 100", 1, 1},
		{base, "> U. 1:1001(1000) ack 5 win 100 urg 1 <mss 1460,nop,wscale 7,sack 1:2,TS val 50 ecr 60>", 2, 2},
		{"> . 1:1(0) ack 1", "> . 1:1(0) ack 1 win 7", 0, 0},
		{"> . 1:1(0) ack 1", "> . 1:1(0) ack 1 win 7 <nop>", 1, 0},
		{"> . 1:1(0) ack 1 <...>", "> . 1:1(0) ack 1 win 7 <nop>", 0, 0},
		{"> 1 > 2 . 1:1(0) ack 1", "> 3 > 4 . 1:1(0) ack 1", 2, 2},
		{"> 1 > 2 . 1:1(0) ack 1", "> . 1:1(0) ack 1", 0, 0},
		{"> . 1:1(0) ack 1", "> icmp unreachable", 1, 1},
		{"> [5:6(1)] icmp unreachable port_unreachable mtu 1", "> [6:7(1)] icmp unreachable host_unreachable mtu 2", 3, 3},
		{"> icmp unreachable", "> icmp unreachable", 0, 0},
		{"> [ect0] . 1:1(0) ack 1", "> . 1:1(0) ack 1", 1, 1},
		{"> [noecn] . 1:1(0) ack 1", "> [tos 0xfc] . 1:1(0) ack 1", 0, 0},
		{"> [ect01] . 1:1(0) ack 1", "> [tos 1] . 1:1(0) ack 1", 0, 0},
		{"> [tos 4,ttl 64] . 1:1(0) ack 1", "> [tos 5,ttl 63] . 1:1(0) ack 1", 2, 2},
	} {
		want, err1 := ParsePacket(c.want)
		got, err2 := ParsePacket(c.got)
		if err1 != nil || err2 != nil {
			t.Fatal(c.want, err1, c.got, err2)
		}
		if d := want.Diff(got, strict); len(d) != c.strict {
			t.Errorf("%s, got %s: %q, want %d", c.want, c.got, d, c.strict)
		}
		if d := want.Diff(got, lenient); len(d) != c.lenient {
			t.Errorf("lenient: %s, got %s: %q, want %d", c.want, c.got, d, c.lenient)
		}
	}
}

func TestContinues(t *testing.T) {
	for _, c := range []struct {
		first, next string
		want        bool
	}{
		{"> . 1:11(10) ack 1 win 5", "> P. 11:21(10) ack 1 win 6", true},
		{"> P. 1:11(10) ack 1", "> FP. 11:21(10) ack 1", true},
		{"> . 1:11(10) ack 1 <nop,nop,TS val 1 ecr 2>", "> . 11:21(10) ack 1 <nop,nop,TS val 3 ecr 2>", true},
		{"> . 1:11(10) ack 1", "> . 12:22(10) ack 1", false},
		{"> . 1:11(10) ack 1", "> . 11:21(10) ack 2", false},
		{"> . 1:11(10) ack 1", "> . 11:21(10) ack 1 <nop>", false},
		{"> F. 1:11(10) ack 1", "> . 11:21(10) ack 1", false},
		{"> S. 1:11(10) ack 1", "> . 11:21(10) ack 1", false},
		{"> . 1:1(0) ack 1", "> . 1:11(10) ack 1", false},
		{"> . 1:11(10) ack 1", "> icmp unreachable", false},
		{"> . 1:21(20) ack 1", "> . 21:24(3) ack 1", true},
		{"> . 1:11(10) ack 1", "> . 11:22(11) ack 1", false},
		{"> . 1:14(13) ack 1", "> . 14:24(10) ack 1", false},
	} {
		first, err1 := ParsePacket(c.first)
		next, err2 := ParsePacket(c.next)
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if got := first.Continues(next, max(1, min(first.Len, 10))); got != c.want {
			t.Errorf("%s, then %s: %v", c.first, c.next, got)
		}
	}
}

// FuzzParse looks for panics, and for scripts that do not survive being printed
// and read again.
func FuzzParse(f *testing.F) {
	f.Add(sample)
	for _, s := range segments {
		f.Add("0 " + s)
	}
	f.Fuzz(func(t *testing.T, src string) {
		s, err := Parse(src)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) {
				t.Fatalf("error %T", err)
			}
			return
		}
		for i := range s.Events {
			p := s.Events[i].Packet
			if p == nil {
				_ = s.Events[i].String()
				continue
			}
			again, err := ParsePacket(p.String())
			if err != nil {
				t.Fatalf("%v: %v", p, err)
			}
			if again.String() != p.String() {
				t.Fatalf("%v is read as %v", p, again)
			}
			if p.ICMP == nil {
				p.Marshal(1, 2, nil)
			}
		}
	})
}
