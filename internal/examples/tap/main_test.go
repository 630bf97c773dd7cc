package main

import (
	"strings"
	"testing"
)

func TestARPReply(t *testing.T) {
	const (
		guest, gw     = "\x52\x54\x00\x12\x34\x56", "\x52\x55\x0a\x00\x02\x02"
		header        = "\x08\x06\x00\x01\x08\x00\x06\x04\x00"
		unknown       = "\x00\x00\x00\x00\x00\x00"
		ipGuest, ipGW = "\x0a\x00\x02\x0f", "\x0a\x00\x02\x02"
	)
	request := func(sender, target string) string {
		return strings.Repeat("\xff", 6) + guest + header + "\x01" + guest + sender + unknown + target
	}
	for _, test := range []struct{ name, frame, want string }{
		{"request", request(ipGuest, ipGW), guest + gw + header + "\x02" + gw + ipGW + guest + ipGuest},
		{"padded", request(ipGuest, ipGW) + unknown + unknown, guest + gw + header + "\x02" + gw + ipGW + guest + ipGuest},
		{"announcement", request(ipGuest, ipGuest), ""},
		{"probe", request("\x00\x00\x00\x00", ipGuest), ""},
		{"reply", gw + guest + header + "\x02" + guest + ipGuest + gw + ipGW, ""},
		{"truncated", request(ipGuest, ipGW)[:41], ""},
	} {
		if got := string(arpReply([]byte(test.frame))); got != test.want {
			t.Errorf("%s: answered with %x, want %x", test.name, got, test.want)
		}
	}
}

func TestIsUDP(t *testing.T) {
	ether := strings.Repeat("\x52", 12)
	ip4 := func(proto string) string { return ether + "\x08\x00\x45" + strings.Repeat("\x00", 8) + proto }
	ip6 := func(next string) string { return ether + "\x86\xdd\x60" + strings.Repeat("\x00", 5) + next }
	for frame, want := range map[string]bool{
		ip4("\x11"): true, ip4("\x06"): false, ip6("\x11"): true, ip6("\x06"): false,
		ether + "\x08\x06" + strings.Repeat("\x11", 28): false, // ARP
	} {
		if got := isUDP([]byte(frame)); got != want {
			t.Errorf("%x: %v", frame, got)
		}
	}
}
