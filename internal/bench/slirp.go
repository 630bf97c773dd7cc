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
	guest      load.Guest
}

func newSlirp(mtu, batch int) *slirpNetwork {
	s, err := slirp.NewWithConfig(slirp.Config{MTU: mtu, ReuseFrames: true})
	check(err)
	return &slirpNetwork{Stack: s, mtu: mtu, batch: batch}
}

func (n *slirpNetwork) open(port uint16, to netip.AddrPort) *load.Flow {
	const header = 14 + 20 // Ethernet and IPv4
	f := load.NewFlow(netip.AddrPortFrom(netip.MustParseAddr(guest), port), to, n.mtu, n.batch)
	n.guest.Add(f)
	mac, gw := [6]byte{2, 1}, [6]byte{2, 2}
	if n.batch > 1 {
		w := func(frames [][]byte) error {
			n.guest.Take(header, frames...)
			return nil
		}
		f.Send = func(packets [][]byte) error { return n.HandlePackets(0, mac, gw, packets, w) }
		return f
	}
	w := func(frame []byte) error {
		n.guest.Take(header, frame)
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
