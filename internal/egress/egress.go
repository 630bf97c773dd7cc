// Package egress tells which addresses lead to the host itself and to what only the
// host should talk to, whichever way they are written: RFC 4291 section 2.5 (mapped
// and compatible addresses), RFC 2765 (translated), RFC 6052 and RFC 8215 (NAT64),
// RFC 3056 (6to4), RFC 4380 (Teredo), RFC 5214 (ISATAP).
package egress

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"time"
)

// local is what is refused on every host.
var local = []struct {
	prefix netip.Prefix
	why    string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},

	// Where the providers of machines tell them their secrets, other than on
	// 169.254.169.254: Amazon, Google, Alibaba, Azure, Oracle.
	{netip.MustParsePrefix("fd00:ec2::/32"), "metadata"},
	{netip.MustParsePrefix("fd20:ce::254/128"), "metadata"},
	{netip.MustParsePrefix("100.100.100.200/32"), "metadata"},
	{netip.MustParsePrefix("168.63.129.16/32"), "metadata"},
	{netip.MustParsePrefix("192.0.0.192/32"), "metadata"},

	// RFC 8215: a translator of the host's own network. Where the IPv4 address
	// stands in such an address only that network knows.
	{netip.MustParsePrefix("64:ff9b:1::/48"), "local NAT64"},
}

// embeddings are the ways to write an IPv4 address as one of IPv6, by their
// prefixes. At is where it stands.
var embeddings = []struct {
	prefix netip.Prefix
	at     int
	invert bool
}{
	{netip.MustParsePrefix("::/96"), 12, false},           // IPv4-compatible
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12, false}, // IPv4-translated
	{netip.MustParsePrefix("64:ff9b::/96"), 12, false},    // NAT64
	{netip.MustParsePrefix("2002::/16"), 2, false},        // 6to4
	{netip.MustParsePrefix("2001::/32"), 4, false},        // Teredo, the server
	{netip.MustParsePrefix("2001::/32"), 12, true},        // Teredo, the client
}

// Meanings appends to list every address that one may stand for: itself, unmapped
// and without its zone, and the IPv4 addresses that are written in it.
func Meanings(list []netip.Addr, a netip.Addr) []netip.Addr {
	a = a.Unmap().WithZone("")
	list = append(list, a)
	if !a.Is6() {
		return list
	}
	b := a.As16()
	v4 := func(at int, mask uint32) {
		var v [4]byte
		binary.BigEndian.PutUint32(v[:], binary.BigEndian.Uint32(b[at:])^mask)
		list = append(list, netip.AddrFrom4(v))
	}
	for _, e := range embeddings {
		switch {
		case !e.prefix.Contains(a):
		case e.invert:
			v4(e.at, 1<<32-1)
		default:
			v4(e.at, 0)
		}
	}
	// ISATAP is told by its interface identifier, in any network: "::0:5efe" or
	// "::200:5efe", and the address.
	if binary.BigEndian.Uint32(b[8:])&^0x03000000 == 0x00005efe {
		v4(12, 0)
	}
	return list
}

// maxAge is how long the host's addresses are believed to be the same.
const maxAge = time.Second

// Host knows the addresses of the host. The zero value is ready for use.
type Host struct {
	mu   sync.Mutex
	own  []network
	read time.Time

	list func() ([]network, error) // nil: of the operating system
}

// network is what the host has an interface with: its address there, with the length
// of the prefix.
type network struct {
	netip.Prefix
	loopback bool
}

// Refuse returns why an address is refused, or "" if it is not. An address that
// stands for several is refused for each of them, unless that is in except, or the
// whole is.
func (h *Host) Refuse(a netip.Addr, except []netip.Prefix) string {
	meanings := Meanings(make([]netip.Addr, 0, 4), a)
	if contains(except, meanings[0]) {
		return ""
	}
	own, err := h.networks()
	for _, m := range meanings {
		if contains(except, m) {
			continue
		}
		for _, l := range local {
			if l.prefix.Contains(m) {
				return l.why
			}
		}
		if err != nil {
			return "the host's addresses are not known"
		}
		for _, n := range own {
			if n.refuses(m) {
				return "the host's own"
			}
		}
	}
	return ""
}

// contains reports whether a is in one of the prefixes, which may be mapped.
func contains(list []netip.Prefix, a netip.Addr) bool {
	for _, p := range list {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// refuses reports whether a is the host's address in the network, or stands for all
// of its hosts or routers: the lowest one (RFC 919, and RFC 4291 section 2.6.1), and
// the highest one of IPv4. The host is all of a network of its loopback interface.
func (n network) refuses(a netip.Addr) bool {
	switch {
	case a == n.Addr() || n.loopback && n.Contains(a):
		return true
	case n.Addr().BitLen()-n.Bits() < 2: // RFC 3021, RFC 6164: two hosts, and no other address
		return false
	}
	return a == n.Masked().Addr() || a == n.broadcast()
}

// broadcast returns the highest address of a network of IPv4, and no valid one of
// any other.
func (n network) broadcast() netip.Addr {
	if !n.Addr().Is4() {
		return netip.Addr{}
	}
	b := n.Addr().As4()
	hosts := uint32(1<<(32-n.Bits()) - 1)
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])|hosts)
	return netip.AddrFrom4(b)
}

// networks returns what the host has interfaces with, as it was at most maxAge ago.
func (h *Host) networks() ([]network, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if age := now.Sub(h.read); !h.read.IsZero() && age >= 0 && age < maxAge {
		return h.own, nil
	}
	list := h.list
	if list == nil {
		list = interfaces
	}
	own, err := list()
	if err != nil {
		return nil, err
	}
	h.own, h.read = own, now
	return own, nil
}

// interfaces asks the operating system. (All addresses first, as that is one
// question, and those of the loopback interface again.)
func interfaces() ([]network, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	own := appendNetworks(nil, addrs, false)
	all, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, i := range all {
		if i.Flags&net.FlagLoopback == 0 {
			continue
		}
		addrs, err := i.Addrs()
		if err != nil {
			return nil, err
		}
		own = appendNetworks(own, addrs, true)
	}
	return own, nil
}

func appendNetworks(list []network, addrs []net.Addr, loopback bool) []network {
	for _, a := range addrs {
		var ip net.IP
		var mask net.IPMask
		switch a := a.(type) {
		case *net.IPNet:
			ip, mask = a.IP, a.Mask
		case *net.IPAddr:
			ip = a.IP
		}
		addr, ok := netip.AddrFromSlice(ip)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		bits, size := mask.Size()
		if size != addr.BitLen() {
			bits = addr.BitLen()
		}
		list = append(list, network{netip.PrefixFrom(addr, bits), loopback})
	}
	return list
}
