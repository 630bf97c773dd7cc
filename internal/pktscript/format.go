package pktscript

import (
	"fmt"
	"strconv"
	"strings"
)

// String returns the flags as a script has them.
func (f Flags) String() string {
	var b strings.Builder
	for _, l := range flagLetters {
		if f&l.flag != 0 {
			b.WriteRune(l.letter)
		}
	}
	if b.Len() == 0 {
		return "-"
	}
	return b.String()
}

// String returns the packet as a script has it.
func (p *Packet) String() string {
	var b strings.Builder
	b.WriteByte(">< "[btoi(p.In)])
	if s := p.IP.String(); s != "" {
		b.WriteString(" [" + s + "]")
	}
	if p.ICMP != nil {
		b.WriteString(p.ICMP.String())
		return b.String()
	}
	if p.HasPorts {
		fmt.Fprintf(&b, " %d > %d", p.Src, p.Dst)
	}
	fmt.Fprintf(&b, " %v %d:%d(%d)", p.Flags, p.Seq, p.Seq+uint32(p.Len), p.Len)
	if p.Flags&ACK != 0 || p.Ack != 0 {
		fmt.Fprintf(&b, " ack %d", p.Ack)
	}
	if p.Win >= 0 {
		fmt.Fprintf(&b, " win %d", p.Win)
	}
	if p.Urg >= 0 {
		fmt.Fprintf(&b, " urg %d", p.Urg)
	}
	switch {
	case p.AnyOptions:
		b.WriteString(" <...>")
	case len(p.Options) > 0:
		b.WriteString(" <" + FormatOptions(p.Options) + ">")
	}
	return b.String()
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (ip IPInfo) String() string {
	var s []string
	if ip.ECN != "" {
		s = append(s, ip.ECN)
	}
	if ip.TOS >= 0 {
		s = append(s, fmt.Sprintf("tos %#x", ip.TOS))
	}
	if ip.TTL > 0 {
		s = append(s, fmt.Sprintf("ttl %d", ip.TTL))
	}
	return strings.Join(s, ",")
}

func (m *ICMP) String() string {
	var s string
	if m.HasEcho {
		s = fmt.Sprintf(" [%d:%d(%d)]", m.Seq, m.Seq+uint32(m.Len), m.Len)
	}
	s += " icmp " + m.Type
	if m.Code != "" {
		s += " " + m.Code
	}
	if m.MTU >= 0 {
		s += fmt.Sprintf(" mtu %d", m.MTU)
	}
	return s
}

// FormatOptions returns options as a script has them, without the brackets.
func FormatOptions(options []TCPOption) string {
	s := make([]string, len(options))
	for i := range options {
		s[i] = options[i].String()
	}
	return strings.Join(s, ",")
}

func (o *TCPOption) String() string {
	switch {
	case o.Kind == KindEOL:
		return "eol"
	case o.Kind == KindNOP:
		return "nop"
	case o.Kind == KindRaw:
		return fmt.Sprintf("raw 0x%x", o.Data)
	case o.Opaque:
	case o.Kind == KindMSS:
		return fmt.Sprintf("mss %d", o.MSS)
	case o.Kind == KindScale:
		return fmt.Sprintf("wscale %d", o.Scale)
	case o.Kind == KindSACKOK:
		return "sackOK"
	case o.Kind == KindTimestamp:
		return fmt.Sprintf("TS val %d ecr %d", o.Val, o.Ecr)
	case o.Kind == KindSACK:
		var b strings.Builder
		b.WriteString("sack")
		for _, k := range o.Blocks {
			fmt.Fprintf(&b, " %d:%d", k.Left, k.Right)
		}
		return b.String()
	}
	if len(o.Data) == 0 {
		return fmt.Sprintf("unknown %d", o.Kind)
	}
	return fmt.Sprintf("unknown %d 0x%x", o.Kind, o.Data)
}

// String returns the call as a script has it.
func (c *Call) String() string {
	s := c.Name + "(" + formatList(c.Args) + ") = " + c.Result.String()
	if c.Errno != "" {
		s += " " + c.Errno
	}
	return s
}

func formatList(l []Expr) string {
	s := make([]string, len(l))
	for i := range l {
		s[i] = l[i].String()
	}
	return strings.Join(s, ", ")
}

func (e Expr) String() string {
	switch e.Kind {
	case Int:
		return strconv.FormatInt(e.Int, 10)
	case Word:
		if e.Applied {
			return e.Text + "(" + formatList(e.Args) + ")"
		}
		return e.Text
	case String:
		return strconv.Quote(e.Text)
	case Or:
		return e.Args[0].String() + "|" + e.Args[1].String()
	case Assign:
		return e.Args[0].String() + "=" + e.Args[1].String()
	case List:
		return "[" + formatList(e.Args) + "]"
	case Struct:
		return "{" + formatList(e.Args) + "}"
	}
	return "..."
}
