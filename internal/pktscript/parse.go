package pktscript

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
)

// ErrUnsupported is wrapped by errors about parts of the language that are
// known, and have no meaning here.
var ErrUnsupported = errors.New("unsupported")

// Error is an error in a script, or an unsupported part of it.
type Error struct {
	Line int
	Err  error
}

func (e *Error) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

func errorAt(line int, format string, args ...any) error {
	return &Error{line, fmt.Errorf(format, args...)}
}

// Parse reads a script.
func Parse(src string) (s *Script, err error) {
	p := &parser{lex: lexer{src: src, line: 1}}
	defer func() {
		if e, ok := recover().(*Error); ok {
			s, err = nil, e
		} else if e != nil {
			panic(e)
		}
	}()
	return p.script(), nil
}

// ParsePacket reads one packet.
func ParsePacket(src string) (pkt *Packet, err error) {
	s, err := Parse("0 " + src)
	if err != nil {
		return nil, err
	}
	if len(s.Events) != 1 || s.Events[0].Packet == nil {
		return nil, errorAt(1, "not a packet: %s", src)
	}
	return s.Events[0].Packet, nil
}

// parser is a recursive-descent parser with one token of lookahead. Errors are
// thrown as *Error.
type parser struct {
	lex   lexer
	tok   token
	ahead bool
}

func (p *parser) peek() token {
	if !p.ahead {
		t, err := p.lex.next()
		if err != nil {
			panic(err)
		}
		p.tok, p.ahead = t, true
	}
	return p.tok
}

func (p *parser) next() token {
	t := p.peek()
	p.ahead = false
	return t
}

func (p *parser) fail(t token, format string, args ...any) {
	panic(errorAt(t.line, format, args...))
}

func (p *parser) unsupported(t token, what string) {
	panic(errorAt(t.line, "%s: %w", what, ErrUnsupported))
}

// accept takes the next token if it is s.
func (p *parser) accept(s string) bool {
	if p.peek().is(s) {
		p.next()
		return true
	}
	return false
}

func (p *parser) expect(s string) token {
	t := p.next()
	if !t.is(s) {
		p.fail(t, "%v where %q should be", t, s)
	}
	return t
}

func (p *parser) int(lo, hi int64) int64 {
	t := p.next()
	if t.kind == tokWord && t.text == strings.ToUpper(t.text) {
		p.unsupported(t, "the symbol "+t.text) // of -D on packetdrill's command line
	}
	if t.kind != tokInt {
		p.fail(t, "%v where a number should be", t)
	}
	if t.int < lo || t.int > hi {
		p.fail(t, "%v is not between %d and %d", t, lo, hi)
	}
	return t.int
}

func (p *parser) word() string {
	t := p.next()
	if t.kind != tokWord {
		p.fail(t, "%v where a word should be", t)
	}
	return t.text
}

func (p *parser) script() *Script {
	s := new(Script)
	for {
		switch t := p.peek(); t.kind {
		case tokOption:
			p.next()
			s.Options = append(s.Options, p.option(t))
		case tokCommand: // before the first event, or behind the last
			p.next()
			s.Events = append(s.Events, Event{Line: t.line, Time: Time{Kind: Relative}, Ignored: true, Text: "`" + t.text + "`"})
		case tokEnd:
			return s
		default:
			s.Events = append(s.Events, p.event())
		}
	}
}

// option reads a value up to white space: it may hold what is no token. An option
// without a value is a switch.
func (p *parser) option(t token) Option {
	if !p.accept("=") {
		return Option{t.line, t.text, ""}
	}
	s := p.lex.rest()
	n := strings.IndexAny(s, " \t\r\n")
	if strings.HasPrefix(s, `"`) {
		n = strings.IndexByte(s[1:], '"') + 2
		if n < 2 {
			p.fail(t, "string without end")
		}
	}
	if n < 0 {
		n = len(s)
	}
	return Option{t.line, t.text, strings.Trim(p.lex.advance(n), `"`)}
}

func (p *parser) event() Event {
	t := p.peek()
	e := Event{Line: t.line, Time: p.time()}
	t = p.peek()
	switch {
	case t.is("<") || t.is(">"):
		e.Packet = p.packet()
	case t.kind == tokCommand:
		p.next()
		e.Ignored, e.Text = true, "`"+t.text+"`"
	case t.kind == tokCode:
		p.next()
		e.Ignored, e.Text = true, "%{ "+t.text+" }%"
	case t.kind == tokDots || t.kind == tokWord:
		if p.accept("...") {
			e.Time.Blocks, e.Time.Returns = true, p.duration()
		}
		e.Line = p.peek().line
		e.Call = p.call()
	default:
		p.fail(t, "%v where an event should be", t)
	}
	if e.Packet != nil {
		e.Line = t.line
	}
	return e
}

func (p *parser) time() Time {
	var t Time
	switch {
	case p.accept("*"):
		t.Kind = Anytime
		return t
	case p.accept("+"):
		t.Kind = Relative
	}
	t.At = p.duration()
	if p.accept("~") {
		if plus := p.accept("+"); plus != (t.Kind == Relative) {
			p.fail(p.peek(), "a range of mixed times")
		}
		t.Range, t.End = true, p.duration()
		if t.End < t.At {
			p.fail(p.peek(), "a range that ends before it begins")
		}
	}
	return t
}

func (p *parser) duration() time.Duration {
	switch t := p.next(); t.kind {
	case tokInt:
		if t.int >= 0 && t.int < 1e9 {
			return time.Duration(t.int) * time.Second
		}
		p.fail(t, "bad time %v", t)
	case tokFloat:
		if t.float >= 0 && t.float < 1e9 {
			return time.Duration(t.float*1e6+0.5) * time.Microsecond
		}
		p.fail(t, "bad time %v", t)
	default:
		p.fail(t, "%v where a time should be", t)
	}
	return 0
}

// Calls.

func (p *parser) call() *Call {
	c := &Call{Name: p.word()}
	p.expect("(")
	c.Args = p.list(")")
	p.expect("=")
	c.Result = p.expr()
	if p.peek().kind == tokWord {
		c.Errno = p.word()
	}
	if p.accept("(") { // a note, for people
		for !p.accept(")") {
			if t := p.next(); t.kind == tokEnd {
				p.fail(t, "note without end")
			}
		}
	}
	return c
}

// list reads expressions up to the closing bracket.
func (p *parser) list(end string) []Expr {
	var l []Expr
	if p.accept(end) {
		return l
	}
	for {
		l = append(l, p.expr())
		if p.accept(end) {
			return l
		}
		p.expect(",")
	}
}

func (p *parser) expr() Expr {
	e := p.primary()
	for p.accept("|") {
		e = Expr{Kind: Or, Args: []Expr{e, p.primary()}}
	}
	if e.Kind == Word && p.accept("=") {
		e = Expr{Kind: Assign, Args: []Expr{e, p.expr()}}
	}
	return e
}

func (p *parser) primary() Expr {
	t := p.next()
	switch {
	case t.kind == tokDots:
		return Expr{Kind: Ellipsis}
	case t.kind == tokInt:
		return Expr{Kind: Int, Int: t.int}
	case t.kind == tokWord:
		e := Expr{Kind: Word, Text: t.text}
		if p.accept("(") {
			e.Applied = true
			e.Args = p.list(")")
		}
		return e
	case t.kind == tokString:
		e := Expr{Kind: String, Text: t.text}
		for p.peek().kind == tokString {
			e.Text += p.next().text
		}
		p.accept("...")
		return e
	case t.is("["):
		return Expr{Kind: List, Args: p.list("]")}
	case t.is("{"):
		return Expr{Kind: Struct, Args: p.list("}")}
	}
	p.fail(t, "%v where an argument should be", t)
	return Expr{}
}

// Packets.

func (p *parser) packet() *Packet {
	t := p.next()
	pkt := &Packet{In: t.is("<"), IP: IPInfo{TOS: -1}, Win: -1, Urg: -1}
	var echo *ICMP
	for p.peek().is("[") || p.peek().is("(") {
		end := "]"
		if p.next().is("(") {
			end = ")"
		}
		if p.peek().kind == tokInt {
			echo = &ICMP{HasEcho: true}
			echo.Seq, echo.Len = p.seq()
		} else {
			p.ipInfo(&pkt.IP, end)
		}
		p.expect(end)
	}
	switch t := p.peek(); {
	case t.is("icmp"):
		p.next()
		p.icmp(pkt, echo)
		return pkt
	case echo != nil:
		p.fail(t, "%v where icmp should be", t)
	case t.is("udp"), t.is("raw"), t.is("ipv4"), t.is("ipv6"), t.is("gre"), t.is("GREv0"), t.is("mpls"), t.is("psp"), t.is("encap"):
		p.unsupported(t, t.text+" packets")
	}
	p.segment(pkt)
	return pkt
}

func (p *parser) ipInfo(ip *IPInfo, end string) {
	for {
		switch t := p.next(); {
		case t.is("noecn"), t.is("ect0"), t.is("ect1"), t.is("ect01"), t.is("ce"):
			ip.ECN = t.text
		case t.is("tos"):
			ip.TOS = int(p.int(0, 255))
		case t.is("ttl"):
			ip.TTL = int(p.int(1, 255))
		case t.is("flowlabel"), t.is("udp"), t.is("raw"), t.is("id"):
			p.unsupported(t, t.text)
		default:
			p.fail(t, "%v where a field of the IP header should be", t)
		}
		if p.peek().is(end) {
			return
		}
		p.expect(",")
	}
}

func (p *parser) icmp(pkt *Packet, echo *ICMP) {
	if echo == nil {
		echo = new(ICMP)
	}
	echo.Type, echo.MTU = p.word(), -1
	if t := p.peek(); t.kind == tokWord && !t.is("mtu") && !t.is("id") {
		echo.Code = p.word()
	}
	if p.accept("mtu") {
		echo.MTU = int(p.int(0, 1<<32-1))
	}
	if t := p.peek(); t.is("id") {
		p.unsupported(t, "an ICMP identifier")
	}
	if p.accept("[") {
		if t := p.peek(); t.kind == tokWord {
			p.unsupported(t, "ICMP about "+t.text)
		}
		echo.HasEcho = true
		echo.Seq, echo.Len = p.seq()
		p.expect("]")
	}
	pkt.ICMP = echo
}

var flagLetters = []struct {
	letter rune
	flag   Flags
}{
	{'F', FIN}, {'S', SYN}, {'R', RST}, {'P', PSH}, {'U', URG}, {'E', ECE}, {'W', CWR}, {'.', ACK},
}

func (p *parser) flags() (f Flags) {
	t := p.next()
	switch {
	case t.is("-"):
		return 0
	case t.is("."):
		return ACK
	case t.kind == tokFloat:
		p.unsupported(t, "the AccECN field")
	case t.kind != tokWord:
		p.fail(t, "%v where flags should be", t)
	}
letters:
	for _, c := range t.text {
		for _, l := range flagLetters {
			if l.letter == c {
				f |= l.flag
				continue letters
			}
		}
		if c == 'A' {
			p.unsupported(t, "the AE flag")
		}
		p.fail(t, "%v where flags should be", t)
	}
	switch next := p.peek(); {
	case next.is("."):
		p.next()
		f |= ACK
	case next.kind == tokFloat:
		p.unsupported(t, "the AccECN field")
	}
	return f
}

// seq reads start:end(length).
func (p *parser) seq() (uint32, int) {
	t := p.peek()
	start := p.int(0, 1<<32-1)
	p.expect(":")
	end := p.int(0, 1<<32-1)
	p.expect("(")
	n := p.int(0, 1<<17)
	p.expect(")")
	if uint32(end-start) != uint32(n) {
		p.fail(t, "%d:%d(%d) does not add up", start, end, n)
	}
	return uint32(start), int(n)
}

func (p *parser) segment(pkt *Packet) {
	t := p.peek()
	if t.kind == tokInt {
		pkt.HasPorts, pkt.Src = true, uint16(p.int(0, 65535))
		p.expect(">")
		pkt.Dst = uint16(p.int(0, 65535))
	}
	pkt.Flags = p.flags()
	pkt.Seq, pkt.Len = p.seq()
	if p.accept("ack") {
		pkt.Ack = uint32(p.int(0, 1<<32-1)) // some scripts have it without the flag
	}
	if p.accept("win") {
		pkt.Win = int(p.int(0, 65535))
	}
	if p.accept("urg") {
		pkt.Urg = int(p.int(0, 65535))
	}
	if pkt.In && pkt.Win < 0 {
		p.fail(t, "a segment to inject needs a window")
	}
	// A "<" that follows may be the options, or nothing else: times come between
	// packets.
	if p.peek().is("<") {
		p.options(pkt)
	}
	if p.peek().is("{") {
		p.unsupported(p.peek(), "mutated packets")
	}
}

func (p *parser) options(pkt *Packet) {
	t := p.expect("<")
	if p.accept("...") {
		if pkt.In {
			p.fail(t, "a segment to inject needs its options")
		}
		pkt.AnyOptions = true
		p.expect(">")
		return
	}
	for {
		pkt.Options = append(pkt.Options, p.tcpOption())
		if p.accept(">") {
			break
		}
		p.expect(",")
	}
	if n := OptionsLen(pkt.Options); n > 40 {
		p.fail(t, "%d bytes of options", n)
	}
}

func (p *parser) tcpOption() TCPOption {
	t := p.next()
	if t.kind != tokWord {
		p.fail(t, "%v where a TCP option should be", t)
	}
	switch t.text {
	case "eol":
		return TCPOption{Kind: KindEOL}
	case "nop":
		return TCPOption{Kind: KindNOP}
	case "mss":
		return TCPOption{Kind: KindMSS, MSS: uint16(p.int(0, 65535))}
	case "wscale":
		return TCPOption{Kind: KindScale, Scale: uint8(p.int(0, 255))}
	case "sackOK":
		return TCPOption{Kind: KindSACKOK}
	case "sack":
		o := TCPOption{Kind: KindSACK}
		for p.peek().kind == tokInt {
			left := p.int(0, 1<<32-1)
			p.expect(":")
			o.Blocks = append(o.Blocks, Block{uint32(left), uint32(p.int(0, 1<<32-1))})
		}
		return o
	case "TS":
		p.expect("val")
		o := TCPOption{Kind: KindTimestamp, Val: uint32(p.int(0, 1<<32-1))}
		p.expect("ecr")
		o.Ecr = uint32(p.int(0, 1<<32-1))
		return o
	case "FO":
		return p.opaque(KindFastOpen)
	case "unknown":
		return p.opaque(int(p.int(2, 255)))
	case "raw":
		return TCPOption{Kind: KindRaw, Data: p.hex()}
	case "FOEXP", "md5", "exp", "ECN", "AccECN", "dss", "add_address", "remove_address":
		p.unsupported(t, "TCP option "+t.text)
	}
	if strings.HasPrefix(t.text, "mp") { // mpcapable, mp_join_syn, ...: Multipath TCP
		p.unsupported(t, "TCP option "+t.text)
	}
	p.fail(t, "%v where a TCP option should be", t)
	return TCPOption{}
}

// opaque reads the bytes of an option, if there are any.
func (p *parser) opaque(kind int) TCPOption {
	var v []byte
	if k := p.peek().kind; k == tokWord || k == tokInt {
		v = p.hex()
	}
	o := TCPOption{Kind: kind}
	o.parse(v)
	return o
}

// hex reads bytes: two hexadecimal digits each.
func (p *parser) hex() []byte {
	t := p.next()
	b, err := hex.DecodeString(strings.TrimPrefix(t.text, "0x"))
	if err != nil || t.kind != tokWord && t.kind != tokInt {
		p.fail(t, "%v where hexadecimal bytes should be", t)
	}
	return b
}
