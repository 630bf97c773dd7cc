package main

import (
	"fmt"
	"net/netip"

	"github.com/KarpelesLab/slirp"
	"github.com/KarpelesLab/slirp/internal/load"
)

// slirpNetwork is ours, as a virtual machine monitor would use it.
type slirpNetwork struct {
	*slirp.Stack
	mtu, batch int
}

func newSlirp(mtu, batch int) *slirpNetwork {
	s, err := slirp.NewWithConfig(slirp.Config{MTU: mtu, ReuseFrames: true})
	check(err)
	return &slirpNetwork{s, mtu, batch}
}

func (n *slirpNetwork) open(port uint16, to netip.AddrPort) *load.Flow {
	const header = 14 + 20 // Ethernet and IPv4
	f := load.NewFlow(netip.AddrPortFrom(netip.MustParseAddr(guest), port), to, n.mtu, n.batch)
	mac, gw := [6]byte{2, 1}, [6]byte{2, 2}
	if n.batch > 1 {
		w := func(frames [][]byte) error {
			for _, frame := range frames {
				f.Note(frame[header:], len(frame)-header)
			}
			f.Answer()
			return nil
		}
		f.Send = func(packets [][]byte) error { return n.HandlePackets(0, mac, gw, packets, w) }
		return f
	}
	w := func(frame []byte) error {
		f.Note(frame[header:], len(frame)-header)
		f.Answer()
		return nil
	}
	f.Send = func(packets [][]byte) error {
		for _, p := range packets {
			if err := n.HandlePacket(0, mac, gw, p, w); err != nil {
				return err
			}
		}
		return nil
	}
	return f
}

func (n *slirpNetwork) String() string { return fmt.Sprintf("%+v", n.Stats()) }
