package pktscript

import (
	"fmt"
	"slices"
)

// Rules says what of a packet counts when it is compared.
type Rules struct {
	// Lenient leaves out what differs between stacks that are all correct:
	// window values, the order and padding of options, the window scale, and the
	// PSH flag.
	Lenient bool
	// TickTolerance is by how much a timestamp may differ; negative: by any value.
	TickTolerance int64
}

// Diff returns in what got is not the packet that is expected.
func (want *Packet) Diff(got *Packet, r Rules) []string {
	var d []string
	differ := func(what string, want, got any) {
		if want != got {
			d = append(d, fmt.Sprintf("%s: expected %v, got %v", what, want, got))
		}
	}
	want.IP.diff(&got.IP, differ)
	if want.ICMP != nil || got.ICMP != nil {
		want.diffICMP(got, differ)
		return d
	}
	ignored := Flags(0)
	if r.Lenient {
		ignored = PSH
	}
	if want.HasPorts && got.HasPorts {
		differ("source port", want.Src, got.Src)
		differ("destination port", want.Dst, got.Dst)
	}
	differ("flags", want.Flags&^ignored, got.Flags&^ignored)
	differ("sequence number", want.Seq, got.Seq)
	differ("payload length", want.Len, got.Len)
	if want.Flags&got.Flags&ACK != 0 {
		differ("ack", want.Ack, got.Ack)
	}
	if want.Win >= 0 && !r.Lenient {
		differ("window", want.Win, got.Win)
	}
	if want.Urg >= 0 || got.Urg >= 0 {
		differ("urgent pointer", want.Urg, got.Urg)
	}
	if !want.AnyOptions {
		d = append(d, diffOptions(want.Options, got.Options, r)...)
	}
	return d
}

func (want *IPInfo) diff(got *IPInfo, differ func(string, any, any)) {
	ecn := [...]string{"noecn", "ect1", "ect0", "ce"}[max(got.TOS, 0)&3]
	switch want.ECN {
	case "":
	case "ect01":
		if ecn != "ect0" && ecn != "ect1" {
			differ("ECN", want.ECN, ecn)
		}
	default:
		differ("ECN", want.ECN, ecn)
	}
	if want.TOS >= 0 {
		differ("tos", want.TOS, got.TOS)
	}
	if want.TTL > 0 {
		differ("ttl", want.TTL, got.TTL)
	}
}

func (want *Packet) diffICMP(got *Packet, differ func(string, any, any)) {
	if want.ICMP == nil || got.ICMP == nil {
		differ("protocol", want.protocol(), got.protocol())
		return
	}
	differ("ICMP type", want.ICMP.Type, got.ICMP.Type)
	differ("ICMP code", want.ICMP.Code, got.ICMP.Code)
	if want.ICMP.HasEcho {
		differ("quoted sequence number", want.ICMP.Seq, got.ICMP.Seq)
	}
	if want.ICMP.MTU >= 0 {
		differ("mtu", want.ICMP.MTU, got.ICMP.MTU)
	}
}

func (p *Packet) protocol() string {
	if p.ICMP != nil {
		return "icmp"
	}
	return "tcp"
}

// diffOptions compares options. A lenient comparison leaves the padding out,
// and the order.
func diffOptions(want, got []TCPOption, r Rules) []string {
	if r.Lenient {
		want, got = sortedOptions(want), sortedOptions(got)
	}
	ok := slices.EqualFunc(want, got, func(a, b TCPOption) bool { return a.matches(&b, r) })
	if ok {
		return nil
	}
	return []string{fmt.Sprintf("options: expected <%s>, got <%s>", FormatOptions(want), FormatOptions(got))}
}

func sortedOptions(options []TCPOption) []TCPOption {
	options = slices.DeleteFunc(slices.Clone(options), func(o TCPOption) bool {
		return o.Kind == KindNOP || o.Kind == KindEOL
	})
	slices.SortStableFunc(options, func(a, b TCPOption) int { return a.Kind - b.Kind })
	return options
}

func (want *TCPOption) matches(got *TCPOption, r Rules) bool {
	if want.Kind != got.Kind || want.Opaque != got.Opaque {
		return false
	}
	if want.Opaque {
		return slices.Equal(want.Data, got.Data)
	}
	switch want.Kind {
	case KindMSS:
		return want.MSS == got.MSS
	case KindScale:
		return r.Lenient || want.Scale == got.Scale
	case KindSACK:
		return slices.Equal(want.Blocks, got.Blocks)
	case KindTimestamp:
		late := int64(int32(got.Val - want.Val))
		return want.Ecr == got.Ecr && (r.TickTolerance < 0 || max(late, -late) <= r.TickTolerance)
	}
	return true
}

// Continues reports whether p and next may be two parts of one longer segment:
// next begins where p ends, is no longer than part, which the first was, and all
// that both say is the same.
func (p *Packet) Continues(next *Packet, part int) bool {
	const ends = FIN | PSH // the last part alone may have these
	if p.ICMP != nil || next.ICMP != nil || p.Len == 0 || (p.Flags|next.Flags)&(SYN|RST|URG) != 0 || p.Flags&FIN != 0 {
		return false
	}
	return p.Len%part == 0 && next.Len <= part && next.Seq == p.Seq+uint32(p.Len) && next.Ack == p.Ack && p.Flags&^ends == next.Flags&^ends &&
		slices.EqualFunc(p.Options, next.Options, func(a, b TCPOption) bool { return a.Kind == b.Kind })
}
