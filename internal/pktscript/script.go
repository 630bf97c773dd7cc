package pktscript

import (
	"fmt"
	"time"
)

// Script is one file.
type Script struct {
	Options []Option
	Events  []Event
}

// Option is a line --Name=Value.
type Option struct {
	Line        int
	Name, Value string
}

// Option returns the value of the last option of that name.
func (s *Script) Option(name string) (value string, ok bool) {
	for _, o := range s.Options {
		if o.Name == name {
			value, ok = o.Value, true
		}
	}
	return value, ok
}

// Event is one line of a script: exactly one of the pointers is set, or Ignored
// is true for a command or code, whose text is in Text.
type Event struct {
	Line    int
	Time    Time
	Packet  *Packet
	Call    *Call
	Ignored bool
	Text    string
}

func (e *Event) String() string {
	switch {
	case e.Packet != nil:
		return e.Packet.String()
	case e.Call != nil:
		return e.Call.String()
	}
	return e.Text
}

// TimeKind says how the time of an event is given.
type TimeKind uint8

const (
	Absolute TimeKind = iota // since the start of the script
	Relative                 // +, since the event before
	Anytime                  // *
)

// Time is when an event happens: At, or from At to End if Range is set.
type Time struct {
	Kind    TimeKind
	At      time.Duration
	Range   bool
	End     time.Duration
	Blocks  bool          // a call that returns at Returns
	Returns time.Duration // of the same kind as At
}

func (t Time) String() string {
	sign := ""
	switch t.Kind {
	case Relative:
		sign = "+"
	case Anytime:
		return "*"
	}
	s := sign + seconds(t.At)
	if t.Range {
		s += "~" + sign + seconds(t.End)
	}
	if t.Blocks {
		s += "..." + seconds(t.Returns)
	}
	return s
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.6f", d.Seconds()) }

// Call is a socket call with the result that it must have.
type Call struct {
	Name   string
	Args   []Expr
	Result Expr
	Errno  string // "" if none is given
}

// ExprKind is the kind of an expression.
type ExprKind uint8

const (
	Ellipsis ExprKind = iota // ...
	Int                      // 17, 0x11: Int
	Word                     // SOCK_STREAM: Text; with Args it is applied, htons(8080)
	String                   // "abc": Text
	Or                       // Args[0] | Args[1]
	Assign                   // Args[0] = Args[1]
	List                     // [a, b]: Args
	Struct                   // {a, b}, {x = a, y = b}: Args
)

// Expr is an argument or result of a call.
type Expr struct {
	Kind    ExprKind
	Int     int64
	Text    string
	Applied bool // a Word with Args in parentheses
	Args    []Expr
}

// Field returns the value that a Struct assigns to name; name(...) = x counts.
func (e *Expr) Field(name string) (Expr, bool) {
	for _, a := range e.Args {
		if e.Kind == Struct && a.Kind == Assign && a.Args[0].Text == name {
			return a.Args[1], true
		}
	}
	return Expr{}, false
}

// Words returns the words of a disjunction: A|B|C, or 0 for none.
func (e *Expr) Words() []string {
	switch e.Kind {
	case Word:
		return []string{e.Text}
	case Or:
		return append(e.Args[0].Words(), e.Args[1].Words()...)
	}
	return nil
}

// Flags are the control bits of a TCP segment.
type Flags uint8

const (
	FIN Flags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// Packet is an injected or expected packet.
type Packet struct {
	In   bool // <, towards the stack under test
	IP   IPInfo
	ICMP *ICMP // nil for a TCP segment

	HasPorts   bool // Src > Dst was given
	Src, Dst   uint16
	Flags      Flags
	Seq        uint32
	Len        int // bytes of payload
	Ack        uint32
	Win        int // -1: not given
	Urg        int // -1: not given
	Options    []TCPOption
	AnyOptions bool // <...>
}

// IPInfo is what a packet says of its IP header.
type IPInfo struct {
	ECN string // noecn, ect0, ect1, ect01, ce; "" is not given
	TOS int    // -1: not given
	TTL int    // 0: not given
}

// ICMP is an ICMP message about a TCP segment.
type ICMP struct {
	HasEcho bool   // [Seq:Seq+Len(Len)] was given
	Seq     uint32 // of the segment that it quotes
	Len     int
	Type    string
	Code    string // "" if none is given
	MTU     int    // -1: not given
}

// Option kinds of TCP.
const (
	KindEOL       = 0
	KindNOP       = 1
	KindMSS       = 2
	KindScale     = 3
	KindSACKOK    = 4
	KindSACK      = 5
	KindTimestamp = 8
	KindFastOpen  = 34
	KindRaw       = -1 // Data as it is, without kind and length
)

// TCPOption is one option of a segment. Which of the values counts depends on
// its kind.
type TCPOption struct {
	Kind   int
	MSS    uint16
	Scale  uint8
	Val    uint32 // of a timestamp
	Ecr    uint32
	Blocks []Block
	Opaque bool // only Data says what is in it: an unknown kind, or a wrong length
	Data   []byte
}

// Block is a SACK block.
type Block struct{ Left, Right uint32 }
