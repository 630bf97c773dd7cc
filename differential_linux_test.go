package slirp_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	ps "github.com/KarpelesLab/slirp/internal/pktscript"
)

// The differential test: a peer that is made up says the same things to the Linux
// kernel and to a Stack, and both must give the same answers. Where they do not,
// testdata/differential.md says why, or the test fails.
//
// Numbers in an answer are relative, to what the peer has sent and received, to the
// edge of the subject's window, and to the peer's clock. What is left out is what a
// TCP may do at a time of its choice: how many ACKs say the same thing, what is sent
// again, window updates while the window is open, and probes.

const (
	diffScripts = 400 // for each IP version; ten times as many with SLIRP_SOAK=1
	diffTable   = "testdata/differential.md"
)

func TestKernelDifferential(t *testing.T) {
	needRing(t, "ip")
	if os.Getuid() != 0 {
		t.Skip("needs root for network namespaces and a TAP device")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs a TAP device: ", err)
	}
	kernel := newDiffKernel(t)
	rules := readDiffRules(t)
	scripts := uint64(diffScripts)
	if os.Getenv("SLIRP_SOAK") == "1" {
		scripts *= 10
	}
	for _, f := range diffFamilies {
		t.Run(f.name, func(t *testing.T) {
			steps, events := 0, make(map[string]bool)
			for seed := range scripts {
				s := newDiffScript(seed)
				theirs := s.runKernel(t, kernel, f)
				var ours []outcome
				synctest.Test(t, func(t *testing.T) { ours = s.runStack(t, f) })
				n := s.compare(t, rules, f, theirs, ours)
				for i := range ours[:n] {
					steps++
					events[s.steps[i].label+", "+ours[i].before] = true
				}
			}
			t.Logf("%d steps agree or are explained, %d pairs of event and state", steps, len(events))
		})
	}
	for _, r := range rules {
		if r.used == 0 { // or with another kernel
			t.Logf("%s: nothing is like this any more: %s", diffTable, r.event)
		}
	}
}

// diffRule is one row of the table: what differs, and why that is right. Event, kernel
// and here are patterns as of [path.Match].
type diffRule struct {
	event, kernel, here, reason string
	goOn                        bool // the difference has no consequences
	used                        int
}

func readDiffRules(t *testing.T) []*diffRule {
	t.Helper()
	text, err := os.ReadFile(diffTable)
	if err != nil {
		t.Fatal(err)
	}
	var rules []*diffRule
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSpace(line), "|")
		if len(cells) != 7 || strings.HasPrefix(cells[1], "-") || strings.TrimSpace(cells[1]) == "event" {
			continue
		}
		for i := range cells {
			cells[i] = strings.Trim(strings.TrimSpace(cells[i]), "`")
		}
		if cells[5] == "" || cells[4] != "go on" && cells[4] != "stop" {
			t.Errorf("%s: no reason, or nothing to do then: %s", diffTable, cells[1])
		}
		rules = append(rules, &diffRule{event: cells[1], kernel: cells[2], here: cells[3], goOn: cells[4] == "go on", reason: cells[5]})
	}
	return rules
}

// explanation returns the rule that a difference goes by, or nil.
func explanation(t *testing.T, rules []*diffRule, event, kernel, here string) *diffRule {
	for _, r := range rules {
		match := true
		for _, m := range [][2]string{{r.event, event}, {r.kernel, kernel}, {r.here, here}} {
			ok, err := path.Match(m[0], m[1])
			if err != nil {
				t.Fatalf("%s: %q: %v", diffTable, m[0], err)
			}
			match = match && ok
		}
		if match {
			r.used++
			return r
		}
	}
	return nil
}

// outcome is what came of one step.
type outcome struct {
	before, after string // states; "" if not known
	answer        string
}

// compare reports the first difference that is not explained. Behind one that is
// explained and has consequences nothing is compared: what the peer says next makes
// another sense to each. It returns how many steps were.
func (s *diffScript) compare(t *testing.T, rules []*diffRule, f diffFamily, theirs, ours []outcome) int {
	for i := range s.steps {
		k, o := &theirs[i], &ours[i]
		if k.after == "" {
			k.after = o.after
		}
		if k.answer == o.answer && k.after == o.after {
			continue
		}
		event := s.steps[i].label + ", " + o.before
		if s.steps[i].orphan {
			event += ", orphan"
		}
		if r := explanation(t, rules, event, k.answer+"; "+k.after, o.answer+"; "+o.after); r != nil {
			if r.goOn {
				continue
			}
			return i + 1
		}
		var b strings.Builder
		for j := range s.steps[:i+1] {
			fmt.Fprintf(&b, "\n%2d %s\n\tkernel: %s; %s\n\there:   %s; %s", j, &s.steps[j],
				theirs[j].answer, theirs[j].after, ours[j].answer, ours[j].after)
		}
		t.Errorf("seed %d (%s): no reason is given for\n| `%s` | `%s; %s` | `%s; %s` | | |%s", s.seed, s.options(), event,
			k.answer, k.after, o.answer, o.after, b.String())
		return i + 1
	}
	return len(s.steps)
}

// The script.

// diffStep is a segment of the peer, or a call of the application. Offsets are in
// the peer's stream, whose SYN is 0.
type diffStep struct {
	label string
	call  string // of the application; "" is a segment, and "fill" as many as fill the window
	bytes int    // to write

	flags  ps.Flags
	seq    int64
	atEdge bool  // seq counts from the right edge of the subject's window
	ack    int64 // from the end of what was received
	stale  bool  // ack counts from what was acknowledged before
	len    int
	win    int
	ts     int64 // from the clock
	noTS   bool
	urgent bool
	pause  bool  // the answer may be one that is limited in time
	early  bool  // the handshake has not ended
	orphan bool  // the application has closed
	nxt    int64 // behind what the subject can have received in order
}

func (st *diffStep) String() string {
	if st.call != "" {
		return strings.TrimSpace(fmt.Sprintf("%s: %s %d", st.label, st.call, st.bytes))
	}
	base := ""
	if st.atEdge {
		base = "edge"
	}
	return fmt.Sprintf("%s: %v seq %s%+d (%d) ack %+d win %d ts %+d", st.label, st.flags, base, st.seq, st.len, st.ack, st.win, st.ts)
}

// diffScript is a conversation.
type diffScript struct {
	seed            uint64
	rng             *rand.Rand
	steps           []diffStep
	mss             int // 0: not said
	sack, ts, scale bool

	nxt      int64
	held     [][2]int64 // sent out of order
	fin      int64      // offset of the FIN that was sent; 0: none
	closed   bool       // the FIN is in order
	gone     bool       // the peer has reset
	win      int
	unacked  bool // the application has written since the last full ACK
	shut     bool // it has said that this is all
	deserted bool // it has closed
	paused   bool // there was a step with a pause
	ended    bool
	beyond   bool // something at the edge of the window was sent
}

func (s *diffScript) options() string {
	return fmt.Sprintf("mss %d, sack %v, timestamps %v, scale %v", s.mss, s.sack, s.ts, s.scale)
}

func newDiffScript(seed uint64) *diffScript {
	s := &diffScript{seed: seed, rng: rand.New(rand.NewPCG(seed, 793)), win: 65535}
	s.mss = []int{0, 536, 1000, 1460, 9000}[s.rng.IntN(5)]
	s.sack, s.ts, s.scale = s.rng.IntN(4) > 0, s.rng.IntN(4) > 0, s.rng.IntN(4) > 0
	s.handshake()
	for range 8 + s.rng.IntN(24) {
		s.next()
	}
	if !s.deserted && !s.ended {
		s.add(diffStep{label: "read", call: "read"})
	}
	return s
}

func (s *diffScript) add(st diffStep) {
	if st.win == 0 {
		st.win = s.win
	}
	st.orphan = s.deserted && st.call == ""
	if s.closed && s.shut && st.call == "" {
		st.pause = true // TIME-WAIT has only such answers
	}
	if st.pause {
		if s.paused && s.unacked && !s.shut {
			s.ackAll() // or else it is sent again meanwhile
		}
		st.pause, s.paused = s.paused, true
	}
	st.nxt = s.nxt
	s.steps = append(s.steps, st)
}

func (s *diffScript) ackAll() {
	s.unacked = s.unacked && s.win != 65535 // nothing was sent
	s.add(diffStep{label: "ACK", flags: ps.ACK, seq: s.nxt})
}

// took notes that [from, to) was sent and is taken: nxt moves on.
func (s *diffScript) took(from, to int64) {
	s.held = append(s.held, [2]int64{from, to})
	for moved := true; moved; {
		moved = false
		for _, h := range s.held {
			if h[0] <= s.nxt && h[1] > s.nxt {
				s.nxt, moved = h[1], true
			}
		}
	}
	if s.fin != 0 && s.nxt == s.fin {
		s.nxt++
		s.closed = true
	}
}

// handshake opens the connection, or does something else first.
func (s *diffScript) handshake() {
	s.add(diffStep{label: "SYN", flags: ps.SYN})
	s.nxt = 1
	begin := len(s.steps)
	for range s.rng.IntN(3) {
		switch s.rng.IntN(12) {
		case 0:
			s.add(diffStep{label: "SYN again", flags: ps.SYN, pause: true})
		case 1:
			s.add(diffStep{label: "another SYN", flags: ps.SYN, seq: 1000, pause: true})
		case 2:
			s.add(diffStep{label: "bad ACK", flags: ps.ACK, seq: 1, ack: 1 + s.rng.Int64N(1000)})
		case 3:
			s.add(diffStep{label: "old ACK", flags: ps.ACK, seq: 1, ack: -1 - s.rng.Int64N(1000)})
		case 4:
			s.add(diffStep{label: "no ACK", flags: 0, seq: 1, len: s.rng.IntN(2)})
		case 5:
			s.add(diffStep{label: "reset in the window", flags: ps.RST, seq: 2, pause: true})
		case 6:
			s.add(diffStep{label: "reset outside of the window", flags: ps.RST, seq: -1000})
		case 7:
			s.add(diffStep{label: "ACK outside of the window", flags: ps.ACK, seq: -1000, pause: true})
		case 8:
			s.add(diffStep{label: "FIN without ACK", flags: ps.FIN, seq: 1})
		}
	}
	for i := range s.steps[begin:] {
		s.steps[begin+i].early = true
	}
	switch s.rng.IntN(12) {
	case 0:
		s.add(diffStep{label: "reset", flags: ps.RST, seq: 1})
		s.gone = true
	case 1, 2:
		n := 1 + s.rng.IntN(500)
		s.took(1, 1+int64(n))
		s.add(diffStep{label: "handshake with data", flags: ps.ACK | ps.PSH, seq: 1, len: n})
	case 3:
		n := s.rng.IntN(100)
		s.fin = 1 + int64(n)
		s.took(1, s.fin)
		if n == 0 {
			s.nxt, s.closed = 2, true
		}
		s.add(diffStep{label: "handshake with FIN", flags: ps.ACK | ps.FIN, seq: 1, len: n})
	default:
		s.add(diffStep{label: "handshake", flags: ps.ACK, seq: 1})
	}
}

// next adds one thing that may happen.
func (s *diffScript) next() {
	if s.ended {
		return
	}
	for {
		k := diffKinds[s.rng.IntN(len(diffKinds))]
		if s.rng.IntN(8) < k.weight && k.do(s) {
			return
		}
	}
}

// diffKinds are the things that may happen. A kind reports false if it makes no
// sense now.
var diffKinds = []struct {
	weight int // of 8
	do     func(s *diffScript) bool
}{
	{8, (*diffScript).data}, {8, (*diffScript).data}, {6, (*diffScript).outOfOrder}, {8, (*diffScript).oldData},
	{6, (*diffScript).acks}, {4, (*diffScript).resets}, {3, (*diffScript).syns}, {5, (*diffScript).fins},
	{4, (*diffScript).edges}, {3, (*diffScript).windows}, {3, (*diffScript).outdated}, {3, (*diffScript).illegal},
	{8, (*diffScript).calls}, {8, (*diffScript).calls}, {1, (*diffScript).fill},
}

// stale says that a segment acknowledges nothing new, now and then.
func (s *diffScript) stale() bool {
	if s.rng.IntN(3) > 0 {
		s.unacked = s.unacked && s.win != 65535
		return false
	}
	return true
}

// data is in order, and may overlap with what came before or early.
func (s *diffScript) data() bool {
	if s.fin != 0 {
		return false
	}
	n, back := 1+s.rng.Int64N(1000), int64(0)
	label := "data"
	if s.rng.IntN(4) == 0 {
		back = min(s.rng.Int64N(300), s.nxt-1)
		label = "data that overlaps"
	}
	if len(s.held) > 0 && s.held[len(s.held)-1][0] > s.nxt {
		label += ", behind it a gap"
	}
	st := diffStep{label: label, flags: ps.ACK, seq: s.nxt - back, len: int(n + back), stale: s.stale()}
	switch s.rng.IntN(6) {
	case 0:
		st.flags |= ps.PSH
	case 1:
		st.flags |= ps.URG
		st.label, st.urgent = "urgent "+label, true
	case 2:
		if s.ts {
			st.label, st.noTS = label+" without timestamp", true
		}
	}
	s.took(s.nxt, s.nxt+n)
	s.add(st)
	return true
}

func (s *diffScript) outOfOrder() bool {
	if s.fin != 0 {
		return false
	}
	from := s.nxt + 1 + s.rng.Int64N(2000)
	n := 1 + s.rng.Int64N(800)
	s.took(from, from+n)
	s.add(diffStep{label: "data out of order", flags: ps.ACK, seq: from, len: int(n), stale: s.stale()})
	return true
}

func (s *diffScript) oldData() bool {
	if s.nxt < 3 {
		return false
	}
	n := 1 + s.rng.Int64N(min(s.nxt-1, 500))
	from := s.nxt - n
	if s.closed {
		from--
	}
	if from < 1 {
		return false
	}
	switch s.rng.IntN(3) {
	case 0: // a keep-alive
		s.add(diffStep{label: "keep-alive", flags: ps.ACK, seq: s.nxt - 1, len: s.rng.IntN(2), pause: true})
	case 1:
		s.add(diffStep{label: "old segment without data", flags: ps.ACK, seq: from, pause: true})
	default:
		s.add(diffStep{label: "old data", flags: ps.ACK, seq: from, len: int(n)})
	}
	return true
}

func (s *diffScript) acks() bool {
	n := 0
	data := ""
	if s.rng.IntN(3) == 0 && s.fin == 0 {
		n, data = 1+s.rng.IntN(100), " with data"
	}
	switch s.rng.IntN(4) {
	case 0:
		s.add(diffStep{label: "ACK of what was not sent" + data, flags: ps.ACK, seq: s.nxt, ack: 1 + s.rng.Int64N(1<<20), len: n, pause: true})
	case 1:
		s.add(diffStep{label: "ACK of long ago" + data, flags: ps.ACK, seq: s.nxt, ack: -1<<28 - s.rng.Int64N(1<<20), len: n, pause: true})
	case 2:
		if n > 0 {
			return false
		}
		s.add(diffStep{label: "the same ACK", flags: ps.ACK, seq: s.nxt, stale: true})
	default:
		s.ackAll()
	}
	return true
}

func (s *diffScript) resets() bool {
	if s.gone {
		return false
	}
	flags := ps.RST
	ack := int64(0)
	if s.rng.IntN(2) == 0 {
		flags |= ps.ACK
		ack = s.rng.Int64N(3) * 1000
	}
	st := diffStep{flags: flags, ack: ack, seq: s.nxt}
	switch s.rng.IntN(8) {
	case 0:
		st.label = "reset"
		s.gone = true
	case 1:
		st.label, st.pause = "reset in the window", true
		st.seq += 1 + s.rng.Int64N(1000)
	case 2:
		st.label, st.pause = "reset at the end of the window", true
		st.seq, st.atEdge = -1, true
	case 3:
		st.label, st.pause = "reset at the edge", true
		st.seq, st.atEdge = 0, true
	case 4:
		st.label = "reset behind the edge"
		st.seq, st.atEdge = 1+s.rng.Int64N(1000), true
	case 5:
		st.label = "reset with old number, by one"
		st.seq--
	default:
		st.label = "reset with old number"
		st.seq -= 2 + s.rng.Int64N(100000)
	}
	if flags&ps.ACK != 0 {
		st.label += ", with ACK"
	}
	s.add(st)
	return true
}

func (s *diffScript) syns() bool {
	if s.gone {
		return false
	}
	st := diffStep{label: "SYN in the window", flags: ps.SYN, seq: s.nxt + s.rng.Int64N(1000), pause: true}
	switch s.rng.IntN(5) {
	case 0:
		st.label, st.seq = "SYN with old number", s.nxt-1-s.rng.Int64N(100000)
	case 1:
		if s.shut {
			return false
		}
		st.label, st.seq, st.atEdge = "SYN behind the window", 1+s.rng.Int64N(1<<20), true
	case 2:
		st.label, st.flags = "SYN-ACK in the window", ps.SYN|ps.ACK
	case 3:
		st.label, st.seq = "the first SYN", 0
	}
	s.ended = s.shut // it may begin a new connection
	s.add(st)
	return true
}

func (s *diffScript) fins() bool {
	if s.fin != 0 {
		label := "FIN again"
		if !s.closed {
			label = "early FIN again"
		}
		s.add(diffStep{label: label, flags: ps.FIN | ps.ACK, seq: s.fin})
		return true
	}
	last := s.nxt
	for _, h := range s.held {
		last = max(last, h[1])
	}
	if last > s.nxt && s.rng.IntN(2) == 0 {
		s.took(s.nxt, last)
		s.add(diffStep{label: "all that is missing", flags: ps.ACK, seq: s.steps[len(s.steps)-1].nxt, len: int(last - s.steps[len(s.steps)-1].nxt)})
		return true
	}
	n := int64(0)
	label := "FIN"
	if s.rng.IntN(2) == 0 {
		n, label = 1+s.rng.Int64N(300), "FIN with data"
	}
	from := last
	if s.rng.IntN(4) == 0 {
		from += 1 + s.rng.Int64N(500)
	}
	if from > s.nxt {
		label += " out of order"
	}
	if s.beyond {
		label += " in front of data"
	}
	s.fin = from + n
	if n > 0 {
		s.took(from, s.fin)
	} else if s.fin == s.nxt {
		s.nxt++
		s.closed = true
	}
	s.add(diffStep{label: label, flags: ps.FIN | ps.ACK, seq: from, len: int(n), stale: s.stale()})
	return true
}

// edges are at the right edge of the window.
func (s *diffScript) edges() bool {
	if s.fin != 0 || s.win != 65535 {
		return false
	}
	s.beyond = true
	switch s.rng.IntN(5) {
	case 0:
		s.add(diffStep{label: "data across the edge", flags: ps.ACK, seq: -1, atEdge: true, len: 2})
	case 1:
		s.add(diffStep{label: "data at the edge", flags: ps.ACK, atEdge: true, len: 1 + s.rng.IntN(10)})
	case 2:
		s.add(diffStep{label: "data behind the edge", flags: ps.ACK, seq: 1 + s.rng.Int64N(1000), atEdge: true, len: 1})
	case 3:
		s.add(diffStep{label: "ACK at the edge", flags: ps.ACK, atEdge: true, pause: true})
	default:
		s.add(diffStep{label: "ACK behind the edge", flags: ps.ACK, seq: 1 + s.rng.Int64N(1000), atEdge: true, pause: true})
	}
	return true
}

func (s *diffScript) windows() bool {
	if s.beyond {
		return false // an update that is older than what was at the edge does not count
	}
	label := "window opens"
	if s.win == 65535 {
		label, s.win = "window closes", -1
		s.unacked = false
	} else {
		s.win = 65535
	}
	s.add(diffStep{label: label, flags: ps.ACK, seq: s.nxt})
	return true
}

// outdated are segments with the timestamp of an earlier time.
func (s *diffScript) outdated() bool {
	if !s.ts || s.gone {
		return false
	}
	st := diffStep{flags: ps.ACK, seq: s.nxt, ts: -1 - 1<<30 + s.rng.Int64N(1<<29), pause: true}
	switch s.rng.IntN(4) {
	case 0:
		st.label = "outdated ACK"
	case 1:
		st.label, st.len = "outdated data", 1+s.rng.IntN(100)
	case 2:
		if s.fin != 0 {
			return false
		}
		st.label, st.flags = "outdated FIN", ps.FIN|ps.ACK
	default:
		st.label, st.flags = "outdated reset", ps.RST
		s.gone = true
	}
	s.add(st)
	return true
}

func (s *diffScript) illegal() bool {
	st := diffStep{seq: s.nxt, len: s.rng.IntN(2) * 10, pause: true}
	switch s.rng.IntN(3) {
	case 0:
		st.label = "no flags"
	case 1:
		st.label, st.flags = "FIN without ACK", ps.FIN
	default:
		st.label, st.flags = "PSH without ACK", ps.PSH
	}
	s.add(st)
	return true
}

// fill sends as much as the window has room for, and more, until the application
// reads.
func (s *diffScript) fill() bool {
	if s.fin != 0 || s.gone || s.deserted || s.beyond || len(s.held) > 0 && s.held[len(s.held)-1][1] > s.nxt {
		return false
	}
	s.add(diffStep{label: "read", call: "read"})
	s.ackAll()
	s.add(diffStep{label: "data that fills the window", call: "fill"})
	for range s.rng.IntN(4) {
		st := diffStep{label: "ACK at the closed window", flags: ps.ACK, seq: s.nxt, stale: true, pause: true}
		switch s.rng.IntN(6) {
		case 0:
			st.label, st.len = "data at the closed window", 1+s.rng.IntN(1000)
		case 1:
			st.label, st.flags = "FIN at the closed window", ps.FIN|ps.ACK
		case 2:
			st.label, st.flags, st.seq = "reset in front of the closed window", ps.RST, s.nxt-1-s.rng.Int64N(1000)
		case 3:
			st.label, st.flags, st.seq = "reset behind the closed window", ps.RST, s.nxt+1+s.rng.Int64N(1000)
		case 4:
			st.label, st.seq, st.len = "keep-alive at the closed window", s.nxt-1, s.rng.IntN(2)
		}
		s.add(st)
	}
	if s.rng.IntN(8) == 0 {
		s.gone = true
		s.add(diffStep{label: "reset at the closed window", flags: ps.RST, seq: s.nxt})
	}
	s.add(diffStep{label: "read that opens the window", call: "read"})
	return true
}

func (s *diffScript) calls() bool {
	if s.deserted {
		return false
	}
	switch k := s.rng.IntN(20); {
	case k < 8:
		s.add(diffStep{label: "read", call: "read"})
	case k < 16:
		if s.shut {
			return false
		}
		s.unacked = true
		s.add(diffStep{label: "write", call: "write", bytes: 1 + s.rng.IntN(1500)})
	case k < 18:
		if s.shut {
			return false
		}
		s.shut = true
		s.add(diffStep{label: "shutdown", call: "shutdown"})
	case k < 19:
		s.shut, s.deserted = true, true
		s.add(diffStep{label: "close", call: "close"})
	default:
		if s.rng.IntN(3) > 0 {
			return false
		}
		s.shut, s.deserted, s.gone = true, true, true
		s.add(diffStep{label: "abort", call: "abort"})
	}
	return true
}

// The peer.

// diffPeer plays the script to one subject, and reads the answers.
type diffPeer struct {
	diffFamily
	s         *diffScript
	subject   subject
	port, own uint16
	iss, irs  uint32
	clock     uint32
	lastTS    uint32 // the subject's latest timestamp
	rcvNxt    int64  // behind what was received of the subject
	acked     int64  // the latest ack that was sent
	edge      int64  // of the subject's window
	scale     uint8
	shift     int64  // by how much fill has moved all later offsets
	read      int64  // offset of the next byte that the application reads
	written   int64  // bytes that it has written
	heard     uint32 // the subject's latest acknowledgment
	zero      bool   // the window was closed in the latest segment
	bad       []string
}

func (s *diffScript) newPeer(f diffFamily) *diffPeer {
	return &diffPeer{
		diffFamily: f, s: s, port: uint16(20000 + s.seed), own: uint16(1000 + s.seed),
		iss: uint32(s.seed) * 0x9e3779b1, clock: uint32(s.seed) * 0x85ebca6b, read: 1, edge: 1,
	}
}

func (s *diffScript) runKernel(t *testing.T, k *diffKernel, f diffFamily) []outcome {
	p := s.newPeer(f)
	subject := newKernelSubject(t, k, f, p.port, p.own)
	defer subject.close()
	p.subject = subject
	return p.run()
}

func (s *diffScript) runStack(t *testing.T, f diffFamily) []outcome {
	p := s.newPeer(f)
	subject := newStackSubject(t, f, p.port, p.own)
	defer subject.close()
	p.subject = subject
	return p.run()
}

func (p *diffPeer) run() []outcome {
	outcomes := make([]outcome, len(p.s.steps))
	state := "LISTEN"
	for i := range p.s.steps {
		st := &p.s.steps[i]
		o := &outcomes[i]
		o.before = state
		o.answer = p.step(st)
		o.after = p.subject.state(i+1 == len(p.s.steps) || st.call == "abort")
		if len(p.bad) > 0 {
			o.answer += " " + strings.Join(p.bad, " ")
			p.bad = nil
		}
		state = o.after
	}
	return outcomes
}

// step does one step, and returns the answer.
func (p *diffPeer) step(st *diffStep) string {
	p.clock += 10
	if st.pause {
		p.subject.pause()
		p.observe(&diffStep{nxt: st.nxt, call: "pause"}) // of which nothing counts
	}
	switch st.call {
	case "":
		p.send(st)
	case "fill":
		for range 200 {
			n := min(p.edge-(st.nxt+p.shift), 1000)
			if n <= 0 {
				break
			}
			p.send(&diffStep{flags: ps.ACK, seq: st.nxt, len: int(n), win: st.win})
			p.shift += n
			p.observe(st)
		}
		return fmt.Sprint("zero window: ", p.zero)
	default:
		return strings.TrimSpace(p.call(st) + " " + p.observe(st))
	}
	answer := p.observe(st)
	p.subject.accept()
	return answer
}

// call does what the application does.
func (p *diffPeer) call(st *diffStep) string {
	if !p.subject.accept() {
		return "no connection"
	}
	var err error
	switch st.call {
	case "read":
		var data []byte
		data, err = p.subject.read()
		for i, c := range data {
			if c != patternOf(p.read+int64(i)) {
				p.bad = append(p.bad, "WRONG BYTES READ")
				break
			}
		}
		if p.read += int64(len(data)); err == nil {
			return fmt.Sprintf("read to nxt%+d", p.read-st.nxt-p.shift)
		}
	case "write":
		b := make([]byte, st.bytes)
		for i := range b {
			b[i] = patternOf(p.written + 1 + int64(i))
		}
		if err = p.subject.write(b); err == nil {
			p.written += int64(len(b))
		}
	case "shutdown":
		err = p.subject.shutdown()
	case "close":
		p.subject.closeConn()
	case "abort":
		p.subject.abort()
	}
	return errorName(err)
}

// patternOf returns the byte at an offset of either stream.
func patternOf(off int64) byte { return byte(off*7 ^ off>>8) }

// send sends a segment.
func (p *diffPeer) send(st *diffStep) {
	seq := st.seq + p.shift
	if st.atEdge {
		seq = st.seq + p.edge
	}
	ack := p.rcvNxt + st.ack
	if st.stale {
		ack = p.acked + st.ack
	} else if st.ack == 0 && st.flags&ps.ACK != 0 {
		p.acked = ack
	}
	packet := ps.Packet{Flags: st.flags, Seq: p.iss + uint32(seq), Win: st.win}
	if st.flags&ps.ACK != 0 {
		packet.Ack = p.irs + uint32(ack)
	}
	if st.urgent {
		packet.Urg = st.len
	}
	if st.flags&ps.SYN != 0 {
		packet.Options = p.synOptions()
	}
	if p.s.ts && !st.noTS {
		o := ps.TCPOption{Kind: ps.KindTimestamp, Val: p.clock + uint32(st.ts)}
		if st.flags&ps.ACK != 0 {
			o.Ecr = p.lastTS
		}
		packet.Options = append(packet.Options, o)
	}
	payload := make([]byte, st.len)
	for i := range payload {
		payload[i] = patternOf(seq + int64(i))
	}
	segment := packet.Marshal(p.port, p.own, payload)
	p.subject.inject(p.packet(6, segment, 16), st.len > 0 || st.flags&ps.FIN != 0)
}

func (p *diffPeer) synOptions() (o []ps.TCPOption) {
	if p.s.mss != 0 {
		o = append(o, ps.TCPOption{Kind: ps.KindMSS, MSS: uint16(p.s.mss)})
	}
	if p.s.sack {
		o = append(o, ps.TCPOption{Kind: ps.KindSACKOK})
	}
	if p.s.scale {
		o = append(o, ps.TCPOption{Kind: ps.KindScale, Scale: 7})
	}
	return o
}

// observe reads what the subject has sent since, and returns what counts of it.
func (p *diffPeer) observe(st *diffStep) string {
	var said []string
	var last *ps.Packet // of the plain segments
	var twice []ps.Block
	data, fin, wasZero := int64(0), false, p.zero
	before, edge := p.rcvNxt, p.edge
	for _, packet := range p.subject.emitted() {
		proto, segment := p.fromSubject(packet)
		if proto != 6 {
			continue
		}
		g, src, dst, payload, err := ps.Unmarshal(segment)
		if err != nil {
			p.bad = append(p.bad, err.Error())
			continue
		}
		if src != p.own || dst != p.port {
			continue
		}
		off := p.rcvNxt + int64(int32(g.Seq-p.irs-uint32(p.rcvNxt)))
		end := off + int64(g.Len)
		if g.Flags&ps.FIN != 0 {
			end++
		}
		switch {
		case g.Flags&ps.RST != 0:
			said = append(said, p.reset(st, g, off))
		case g.Flags&ps.SYN != 0:
			if st.flags&ps.SYN != 0 {
				said = append(said, p.synAck(st, g))
			}
		case end > off && end <= p.rcvNxt && g.Ack == p.heard: // sent again
			twice = append(twice, duplicates(g)...)
		case end == off && off < p.rcvNxt && st.flags == 0: // a probe
		default:
			last = g
			twice = append(twice, duplicates(g)...)
			p.received(st, g, off, end, payload)
			if end > before {
				data += int64(g.Len)
				fin = fin || g.Flags&ps.FIN != 0
			}
		}
	}
	if last == nil || st.call != "" && p.rcvNxt == before && !wasZero {
		return strings.Join(said, ", ")
	}
	return strings.Join(append(said, p.plain(st, last, data, fin)+p.blocks(st, last, twice, edge)), ", ")
}

func (p *diffPeer) peerOffset(st *diffStep, seq uint32) int64 {
	nxt := st.nxt + p.shift
	return int64(int32(seq - p.iss - uint32(nxt)))
}

func (p *diffPeer) reset(st *diffStep, g *ps.Packet, off int64) string {
	if g.Flags&ps.ACK == 0 {
		return fmt.Sprintf("RST %+d", off-p.rcvNxt)
	}
	seq := ""
	if g.Seq != 0 || p.irs == 0 { // one that answers a segment without ACK has 0
		seq = fmt.Sprintf(" %+d", off-p.rcvNxt)
	}
	return fmt.Sprintf("RST-ACK%s ack nxt%+d", seq, p.peerOffset(st, g.Ack))
}

func (p *diffPeer) synAck(st *diffStep, g *ps.Packet) string {
	p.irs, p.rcvNxt = g.Seq, 1
	p.scale = 0
	said := fmt.Sprintf("SYN-ACK ack nxt%+d", p.peerOffset(st, g.Ack))
	for _, o := range g.Options {
		switch o.Kind {
		case ps.KindMSS:
			said += fmt.Sprintf(" mss %d", o.MSS)
		case ps.KindScale:
			said += " scale"
			p.scale = o.Scale
		case ps.KindSACKOK:
			said += " sackOK"
		case ps.KindTimestamp:
			said += fmt.Sprintf(" ecr %+d", int32(o.Ecr-p.clock))
			p.lastTS = o.Val
		}
	}
	p.edge = int64(g.Ack-p.iss) + int64(g.Win)
	parts := strings.Fields(said)
	return strings.Join(parts[:3], " ") + " " + strings.Join(sortedFields(parts[3:]), " ")
}

// sortedFields orders options, which are words with a number behind some of them.
func sortedFields(words []string) []string {
	var options []string
	for _, w := range words {
		if len(options) > 0 && strings.ContainsAny(w[:1], "0123456789+-") {
			options[len(options)-1] += " " + w
		} else {
			options = append(options, w)
		}
	}
	slices.Sort(options)
	return options
}

// received takes a segment that is no reset and no SYN.
func (p *diffPeer) received(st *diffStep, g *ps.Packet, off, end int64, payload []byte) {
	if end > p.rcvNxt && off > p.rcvNxt {
		p.bad = append(p.bad, fmt.Sprintf("A GAP OF %d", off-p.rcvNxt))
	}
	for i, c := range payload {
		if c != patternOf(off+int64(i)) {
			p.bad = append(p.bad, "WRONG BYTES SENT")
			break
		}
	}
	p.rcvNxt = max(p.rcvNxt, end)
	p.heard, p.zero = g.Ack, g.Win == 0
	p.edge = st.nxt + p.shift + p.peerOffset(st, g.Ack) + int64(g.Win)<<p.scale
}

// plain describes a segment that is no reset and no SYN, and those before it.
func (p *diffPeer) plain(st *diffStep, g *ps.Packet, data int64, fin bool) string {
	said := fmt.Sprintf("ACK nxt%+d", p.peerOffset(st, g.Ack))
	if end := int64(int32(g.Seq-p.irs-uint32(p.rcvNxt))) + int64(g.Len); data == 0 && end != 0 && g.Flags&ps.FIN == 0 {
		said += fmt.Sprintf(" seq %+d", end)
	}
	if data > 0 {
		said += fmt.Sprintf(" data %d", data)
	}
	if fin {
		said += " FIN"
	}
	if g.Win == 0 {
		said += " zero window"
	}
	stamped := false
	for _, o := range g.Options {
		switch o.Kind {
		case ps.KindTimestamp:
			stamped = true
			said += fmt.Sprintf(" ecr %+d", int32(o.Ecr-p.clock))
			if !st.early { // until then Linux insists on the one of its SYN-ACK
				p.lastTS = o.Val
			}
		case ps.KindNOP, ps.KindEOL, ps.KindSACK:
		default:
			said += fmt.Sprintf(" option %d", o.Kind)
		}
	}
	if p.s.ts && !stamped {
		said += " no timestamp"
	}
	return said
}

// sackBlocks returns the SACK blocks of a segment.
func sackBlocks(g *ps.Packet) (blocks []ps.Block) {
	for _, o := range g.Options {
		blocks = append(blocks, o.Blocks...)
	}
	return blocks
}

// duplicates returns the one that says what has come twice, if there is one (RFC 2883):
// it is said once.
func duplicates(g *ps.Packet) []ps.Block {
	b := sackBlocks(g)
	if len(b) > 0 && int32(b[0].Right-g.Ack) <= 0 ||
		len(b) > 1 && int32(b[0].Left-b[1].Left) >= 0 && int32(b[0].Right-b[1].Right) <= 0 {
		return b[:1]
	}
	return nil
}

// blocks describes the SACK blocks of the last plain segment, behind those that say
// what has come twice.
func (p *diffPeer) blocks(st *diffStep, last *ps.Packet, twice []ps.Block, edge int64) (said string) {
	for _, b := range append(twice, sackBlocks(last)...) {
		text := p.blockEdge(st, b.Left, edge) + "-" + p.blockEdge(st, b.Right, edge)
		if empty := strings.HasPrefix(text, p.blockEdge(st, b.Right, edge)); !empty && !strings.Contains(said, text) {
			said += " sack " + text
		}
	}
	return said
}

// blockEdge returns an end of a SACK block, relative to the edge that the window had
// if it is there.
func (p *diffPeer) blockEdge(st *diffStep, seq uint32, edge int64) string {
	off := p.peerOffset(st, seq)
	if at := st.nxt + off; p.s.fin != 0 && at == p.s.fin+1 {
		off-- // Linux reports the FIN as if it were a byte
	}
	if e := st.nxt + p.shift + off - edge; e > -2 {
		return fmt.Sprintf("edge%+d", e)
	}
	return fmt.Sprintf("%+d", off)
}
