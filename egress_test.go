package slirp

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

// localAddrs are destinations that a Guard refuses, with the rows that ask for it.
var localAddrs = map[int]map[string][]string{
	4: {
		"S43": {"127.0.0.1", "127.9.9.9"},
		"S44": {"0.1.2.3"},
		"S46": {"169.254.169.254", "169.254.1.1"},
	},
	6: {
		"S43": {"::1"},
		"S44": {"::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "2001:db8::5efe:7f00:1"},
		"S46": {"fe80::1", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"},
	},
}

// hostAddrs returns the addresses of the machine that the test runs on (S45).
func hostAddrs(t *testing.T, fam family) (list []string) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && int(versionOf(p.Addr())) == fam.version {
			list = append(list, p.Addr().String())
		}
	}
	return list
}

// Nothing is opened for what leads to the host itself, and the guest is told that it
// is prohibited: with TCP, and with UDP of either mapping.
func TestS43S44S45S46Guard(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		for _, mapping := range []UDPMapping{UDPMappingPerFlow, UDPMappingEndpoint} {
			sockets := &packetHost{t: t, sockets: make(chan *memSocket, 100)}
			g, h := newUDPRig(t, fam, Config{Allow: new(Guard).Allow, UDPMapping: mapping, ListenPacket: sockets.listen})
			rows := map[string][]string{"S45": hostAddrs(t, fam)}
			for row, addrs := range localAddrs[fam.version] {
				rows[row] = addrs
			}
			for row, addrs := range rows {
				for i, a := range addrs {
					to := netip.AddrPortFrom(netip.MustParseAddr(a), 80)
					want := map[int][2]byte{4: {3, 13}, 6: {1, 1}}[fam.version]
					g.sayTo(to, "x")
					if msg := g.takeICMP(); [2]byte{msg.typ, msg.code} != want {
						t.Errorf("%s: UDP to %v: ICMP %d %d", row, to, msg.typ, msg.code)
					}
					g.openFrom(netip.AddrPortFrom(fam.guest, 2000+uint16(i)), to).syn()
					if msg := g.takeICMP(); [2]byte{msg.typ, msg.code} != want {
						t.Errorf("%s: TCP to %v: ICMP %d %d", row, to, msg.typ, msg.code)
					}
				}
			}
			if n := len(h.dials()); n != 0 {
				t.Errorf("%d dials", n)
			}
			sockets.expectOpened(0)
			time.Sleep(time.Second)

			// Others may pass.
			for i, a := range []netip.Addr{fam.server, fam.other} {
				g.sayTo(netip.AddrPortFrom(a, 80), "x")
				g.openFrom(netip.AddrPortFrom(fam.guest, 3000+uint16(i)), netip.AddrPortFrom(a, 80)).syn()
			}
			synctest.Wait()
			g.expectStats(map[string]int{"dialed": map[UDPMapping]int{UDPMappingPerFlow: 4, UDPMappingEndpoint: 3}[mapping]})
		}
	})
}

// A group is not even asked about (S47).
func TestS47Groups(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{Allow: func(ctx context.Context, f Flow) error {
			t.Errorf("Allow was asked about %v", f)
			return nil
		}})
		g.sayTo(netip.AddrPortFrom(fam.broadcast, 80), "x")
		g.openFrom(netip.AddrPortFrom(fam.guest, 2000), netip.AddrPortFrom(fam.broadcast, 80)).syn()
		g.expectNothing()
		g.expectStats(map[string]int{"address": 2})
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
	})
}

// Exceptions open what they name, in every disguise.
func TestGuardExcept(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		except := []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32"), netip.MustParsePrefix("::1/128")}
		g, h := newUDPRig(t, fam, Config{Allow: (&Guard{Except: except}).Allow})
		g.sayTo(netip.AddrPortFrom(fam.loopback, 80), "x")
		h.accept()
		if fam.version == 6 {
			g.sayTo(netip.MustParseAddrPort("[64:ff9b::7f00:1]:80"), "x")
			h.accept()
		}
		g.expectNothing()
		g.expectStats(map[string]int{"refused": 0})
	})
}

// The address that is really dialled is judged, whatever the guest has named (S44, S48).
func TestS48GuardControl(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		server, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
		if err != nil {
			t.Skip(err)
		}
		defer server.Close()
		for _, open := range []bool{false, true} {
			guard := new(Guard)
			if open {
				guard.Except = []netip.Prefix{netip.PrefixFrom(fam.loopback, fam.loopback.BitLen())}
			}
			s, err := NewWithConfig(Config{
				Allow: guard.Allow,
				Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
					d := net.Dialer{Control: guard.Control}
					return d.DialContext(ctx, network, server.Addr().String()) // whatever the guest has named
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			g := newMachine(t, s).openFrom(netip.AddrPortFrom(fam.guest, 2000), fam.at(80))
			if open {
				g.connect()
				continue
			}
			g.syn()
			if msg := g.takeICMP(); [2]byte{msg.typ, msg.code} != map[int][2]byte{4: {3, 13}, 6: {1, 1}}[fam.version] {
				t.Errorf("ICMP %d %d", msg.typ, msg.code)
			}
			if st := s.Stats(); st.FlowsDialed != 0 || st.FlowsRefused != 1 {
				t.Errorf("%+v", st)
			}
		}
	})
}

func TestGuardCheck(t *testing.T) {
	var g Guard
	for _, a := range []netip.Addr{{}, netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::ffff:127.0.0.1"), netip.MustParseAddr("fe80::1%eth0")} {
		if err := g.Check(a); !errors.Is(err, ErrProhibited) {
			t.Errorf("%v: %v", a, err)
		}
	}
	if err := g.Check(netip.MustParseAddr("203.0.113.77")); err != nil {
		t.Error(err)
	}
	for address, want := range map[string]error{
		"203.0.113.77:80": nil, "[2001:db8:77::1]:80": nil,
		"127.0.0.1:80": ErrProhibited, "[::1]:80": ErrProhibited, "[fe80::1%eth0]:80": ErrProhibited,
		"/run/docker.sock": ErrProhibited, "": ErrProhibited, "localhost:80": ErrProhibited,
	} {
		if err := g.Control("tcp", address, nil); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", address, err, want)
		}
	}
}
