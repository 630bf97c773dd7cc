package egress

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// testHost is a host with a network card, a loopback interface that has a network
// besides its own, a link between two hosts, and addresses that are alone.
func testHost() *Host {
	own := []network{
		{prefix("192.0.2.7/24"), false}, {prefix("2001:db8::7/64"), false},
		{prefix("127.0.0.1/8"), false}, {prefix("127.0.0.1/8"), true}, {prefix("::1/128"), true},
		{prefix("198.51.100.1/28"), true},
		{prefix("10.9.9.2/31"), false}, {prefix("2001:db8:9::2/127"), false},
		{prefix("172.17.0.1/16"), false}, {prefix("10.8.0.6/32"), false},
	}
	return &Host{list: func() ([]network, error) { return own, nil }}
}

func TestRefuse(t *testing.T) {
	h := testHost()
	for _, test := range []struct {
		row    string
		refuse bool
		addrs  []string
	}{
		{"S43", true, []string{"127.0.0.0", "127.0.0.1", "127.1.2.3", "127.255.255.255", "::1"}},
		{"S44", true, []string{
			"::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "0.0.0.0", "::", "::ffff:0.0.0.0", "0.1.2.3",
			"::ffff:0:127.0.0.1", "2002:7f00:1:5::9", "64:ff9b:1::7f00:1", "64:ff9b:1:7f00:0:100::", "64:ff9b:1::808:808",
			"2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:0:7f00:1:8000:63bf:3fff:fdd2",
			"2001:db8:5::5efe:127.0.0.1", "2001:db8:5::200:5efe:127.0.0.1", "2001:db8:5::100:5efe:7f00:1", "2002:808:808::5efe:127.0.0.1",
		}},
		{"S45", true, []string{
			"192.0.2.7", "2001:db8::7", "172.17.0.1", "10.8.0.6", "10.9.9.2", "2001:db8:9::2", "198.51.100.1", "198.51.100.9",
			"::ffff:192.0.2.7", "64:ff9b::c000:207", "2002:c000:207::1", "::192.0.2.7",
			"192.0.2.0", "172.17.0.0", "2001:db8::", // the lowest of a network
		}},
		{"S46", true, []string{
			"169.254.0.0", "169.254.169.254", "169.254.255.255", "fe80::1", "fe80::1%eth0", "febf:ffff::1", "fd00:ec2::254", "fd20:ce::254",
			"100.100.100.200", "168.63.129.16", "192.0.0.192",
			"::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::", "::169.254.169.254",
		}},
		{"S47", true, []string{
			"224.0.0.1", "224.0.0.251", "239.255.255.255", "ff02::fb", "ff0e::1", "255.255.255.255", "192.0.2.255", "172.17.255.255",
			"::ffff:224.0.0.1", "64:ff9b::ffff:ffff", "64:ff9b::c000:2ff",
		}},
		{"S48", false, []string{ // private, and nobody's in particular
			"10.0.0.1", "10.0.2.2", "172.16.0.1", "192.168.0.1", "fc00::1", "fd00::2", "100.64.0.1",
			"::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::",
		}},
		{"others", false, []string{
			"8.8.8.8", "1.0.0.0", "126.255.255.255", "128.0.0.1", "169.253.255.255", "169.255.0.0", "223.255.255.255", "240.0.0.1",
			"192.0.2.6", "192.0.2.254", "172.17.0.2", "10.9.9.3", "10.9.9.1", "10.8.0.5", "198.51.100.17", "2001:db8::8", "2001:db8:9::3",
			"2001:4860:4860::8888", "64:ff9b::808:808", "2002:808:808::1", "fe00::1", "fec0::1", "fd00:ec3::254", "fd20:ce::253", "2001:db8::ff",
			"2001:1::7f00:1", "2001:db8:5::5eff:127.0.0.1", "2001:db8:5::400:5efe:127.0.0.1", "64:ff9b:2::7f00:1", "64:ff9b:0:1::7f00:1",
			"2001:0:4136:e378:8000:63bf:3fff:fdd2",
		}},
	} {
		for _, a := range test.addrs {
			if why := h.Refuse(addr(a), nil); (why != "") != test.refuse {
				t.Errorf("%s: %s: %q", test.row, a, why)
			}
		}
	}
}

func TestExcept(t *testing.T) {
	h := testHost()
	for _, test := range []struct {
		except string
		pass   []string
		refuse []string
	}{
		{"127.0.0.1/32", []string{"127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"},
			[]string{"127.0.0.2", "::1", "0.0.0.0", "64:ff9b::7f00:2", "2002:7f00:1::5efe:127.0.0.2"}},
		{"::ffff:127.0.0.0/104", []string{"127.0.0.1", "127.2.3.4"}, []string{"::1", "192.0.2.7"}},
		{"::1/128", []string{"::1"}, []string{"127.0.0.1", "::", "::2"}},
		{"192.0.2.0/24", []string{"192.0.2.7", "192.0.2.255", "192.0.2.0"}, []string{"172.17.0.1", "2001:db8::7"}},
		{"64:ff9b:1:0:0:0:a9fe:0/112", []string{"64:ff9b:1::169.254.169.254"}, []string{"64:ff9b:1::127.0.0.1", "169.254.169.254"}},
		{"2001:0:7f00:1::/64", []string{"2001:0:7f00:1::80ff:fffe"}, []string{"2001:0:7f00:2::80ff:fffe"}},
		{"0.0.0.0/0", []string{"127.0.0.1", "169.254.169.254", "2001:0:7f00:1::80ff:fffe"}, []string{"fe80::1"}},
	} {
		except := []netip.Prefix{prefix("203.0.113.0/24"), prefix(test.except)}
		for _, a := range test.pass {
			if why := h.Refuse(addr(a), except); why != "" {
				t.Errorf("%s in spite of %s: %s", a, test.except, why)
			}
		}
		for _, a := range test.refuse {
			if h.Refuse(addr(a), except) == "" {
				t.Errorf("%s passes because of %s", a, test.except)
			}
		}
	}
}

// An address that the host is given later is its own within a second (S45), and one
// that it loses is not any more.
func TestAddedAddress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var own []network
		reads := 0
		h := &Host{list: func() ([]network, error) { reads++; return own, nil }}
		refused := func() bool { return h.Refuse(addr("203.0.113.5"), nil) != "" }
		if refused() {
			t.Error("refused before the host has it")
		}
		own = []network{{prefix("203.0.113.5/24"), false}}
		time.Sleep(maxAge)
		for range 100 {
			if !refused() {
				t.Fatal("not refused")
			}
		}
		own = nil
		time.Sleep(maxAge)
		if refused() {
			t.Error("refused although the host has lost it")
		}
		if reads != 3 {
			t.Errorf("the host was asked %d times", reads)
		}
	})
}

// A clock that is set back does not make an old answer last.
func TestClockSetBack(t *testing.T) {
	h := testHost()
	h.read = time.Now().Add(time.Hour)
	if h.Refuse(addr("192.0.2.7"), nil) == "" {
		t.Error("not refused")
	}
}

// Nothing passes while the host's addresses are not known, and they are asked for
// again.
func TestListFails(t *testing.T) {
	fails := errors.New("no addresses")
	h := &Host{list: func() ([]network, error) { return nil, fails }}
	if h.Refuse(addr("8.8.8.8"), nil) == "" {
		t.Error("8.8.8.8 passes")
	}
	if why := h.Refuse(addr("8.8.8.8"), []netip.Prefix{prefix("8.8.8.0/24")}); why != "" {
		t.Errorf("an exception is refused: %s", why)
	}
	fails = nil
	if why := h.Refuse(addr("8.8.8.8"), nil); why != "" {
		t.Errorf("refused after the failure: %s", why)
	}
}

// The addresses of the machine that the test runs on are its own.
func TestInterfaces(t *testing.T) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var h Host
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, _ := netip.AddrFromSlice(n.IP)
		if h.Refuse(ip, nil) == "" {
			t.Errorf("%v passes", n)
		}
		if ip.Unmap().Is4() && h.Refuse(netip.AddrFrom16(ip.As16()), nil) == "" {
			t.Errorf("%v passes when it is mapped", n)
		}
	}
	if why := h.Refuse(addr("203.0.113.77"), nil); why != "" {
		t.Errorf("203.0.113.77: %s", why)
	}
}

func TestAppendNetworks(t *testing.T) {
	got := appendNetworks(nil, []net.Addr{
		&net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)},
		&net.IPNet{IP: net.IPv4(192, 0, 2, 2), Mask: net.CIDRMask(120, 128)},
		&net.IPNet{IP: net.ParseIP("2001:db8::1"), Mask: net.CIDRMask(64, 128)},
		&net.IPAddr{IP: net.ParseIP("2001:db8::2")},
		&net.UnixAddr{}, &net.IPNet{},
	}, true)
	want := []network{
		{prefix("192.0.2.1/24"), true}, {prefix("192.0.2.2/32"), true}, {prefix("2001:db8::1/64"), true}, {prefix("2001:db8::2/128"), true},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestConcurrent(t *testing.T) {
	h := testHost()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 {
				if h.Refuse(addr("::ffff:192.0.2.7"), nil) == "" || h.Refuse(addr("8.8.4.4"), nil) != "" {
					t.Error("wrong")
					return
				}
			}
		})
	}
	all.Wait()
}

// disguises are the known ways to write an IPv4 address, in an address that is filled
// with anything else.
var disguises = []func(b *[16]byte, v [4]byte){
	func(b *[16]byte, v [4]byte) { *b = [16]byte{10: 0xff, 11: 0xff}; copy(b[12:], v[:]) },
	func(b *[16]byte, v [4]byte) { *b = [16]byte{}; copy(b[12:], v[:]) },
	func(b *[16]byte, v [4]byte) { *b = [16]byte{8: 0xff, 9: 0xff}; copy(b[12:], v[:]) },
	func(b *[16]byte, v [4]byte) { *b = [16]byte{1: 0x64, 2: 0xff, 3: 0x9b}; copy(b[12:], v[:]) },
	func(b *[16]byte, v [4]byte) { local6(b); copy(b[6:], v[:2]); b[8] = 0; copy(b[9:], v[2:]) }, // RFC 6052: /48
	func(b *[16]byte, v [4]byte) { local6(b); b[7] = v[0]; b[8] = 0; copy(b[9:], v[1:]) },        // /56
	func(b *[16]byte, v [4]byte) { local6(b); b[8] = 0; copy(b[9:], v[:]) },                      // /64
	func(b *[16]byte, v [4]byte) { local6(b); copy(b[12:], v[:]) },                               // /96
	func(b *[16]byte, v [4]byte) { b[0], b[1] = 0x20, 0x02; copy(b[2:], v[:]) },
	func(b *[16]byte, v [4]byte) { copy(b[:], []byte{0x20, 1, 0, 0}); copy(b[4:], v[:]) },
	func(b *[16]byte, v [4]byte) {
		copy(b[:], []byte{0x20, 1, 0, 0})
		for i := range v {
			b[12+i] = ^v[i]
		}
	},
	func(b *[16]byte, v [4]byte) { copy(b[8:], []byte{b[8] & 3, 0, 0x5e, 0xfe}); copy(b[12:], v[:]) },
}

func local6(b *[16]byte) { copy(b[:], []byte{0, 0x64, 0xff, 0x9b, 0, 1}) }

// FuzzDisguise writes an address that is refused in every known way, and looks
// whether it still is.
func FuzzDisguise(f *testing.F) {
	for _, v4 := range []uint32{0x7f000001, 0, 0xa9fea9fe, 0xc0000207, 0xc00002ff, 0xe00000fb, 0xffffffff, 0x08080808, 0x64646464, 0xac110001} {
		f.Add(v4, make([]byte, 16))
		f.Add(v4, []byte{0x20, 1, 0xd, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12})
	}
	f.Fuzz(func(t *testing.T, v4 uint32, fill []byte) {
		h := testHost()
		var v [4]byte
		binary.BigEndian.PutUint32(v[:], v4)
		plain := netip.AddrFrom4(v)
		refused := h.Refuse(plain, nil) != ""
		for i, disguise := range disguises {
			var b [16]byte
			copy(b[:], fill)
			disguise(&b, v)
			a := netip.AddrFrom16(b)
			if refused && h.Refuse(a, nil) == "" {
				t.Errorf("%v passes as %v (%d), and not as itself", plain, a, i)
			}
			if refused && h.Refuse(a.WithZone("eth0"), nil) == "" {
				t.Errorf("%v passes with a zone", a)
			}
			if !refused && i < 4 && h.Refuse(a, nil) != "" && b != [16]byte{15: 1} {
				t.Errorf("%v is refused as %v (%d), and not as itself", plain, a, i)
			}
			if why := h.Refuse(a, []netip.Prefix{netip.PrefixFrom(a, 128)}); why != "" && !a.Is4In6() {
				t.Errorf("%v is refused although it is an exception: %s", a, why)
			}
		}
	})
}

func BenchmarkRefuse(b *testing.B) {
	h := testHost()
	b.ReportAllocs()
	for b.Loop() {
		h.Refuse(netip.AddrFrom16([16]byte{0: 0x20, 1: 0x02, 15: 1}), nil)
	}
}
