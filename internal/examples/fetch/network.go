package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/KarpelesLab/slirp"
)

// family is what differs between IPv4 and IPv6 in this program.
type family struct {
	name     string
	loopback netip.Addr   // where the host's servers listen
	gateway  netip.Addr   // what the guest calls the loopback
	guest    netip.Addr   // the guest's own address
	virtual  netip.Addr   // an address that exists inside the NAT only
	everyone netip.Prefix // the guest's default route
}

var families = []family{
	{
		name:     "IPv4",
		loopback: netip.MustParseAddr("127.0.0.1"),
		gateway:  netip.MustParseAddr("10.0.2.2"),
		guest:    netip.MustParseAddr("10.0.2.15"),
		virtual:  netip.MustParseAddr("10.0.2.100"),
		everyone: netip.MustParsePrefix("0.0.0.0/0"),
	},
	{
		name:     "IPv6",
		loopback: netip.MustParseAddr("::1"),
		gateway:  netip.MustParseAddr("fd00::2"),
		guest:    netip.MustParseAddr("fd00::15"),
		virtual:  netip.MustParseAddr("fd00::100"),
		everyone: netip.MustParsePrefix("::/0"),
	},
}

var (
	guestMAC   = [6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x56}
	gatewayMAC = [6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x57}
)

// Every frame starts with an Ethernet header; HandlePacket takes what follows it.
const etherHeaderLen = 14

// network is a guest behind a NAT, both inside this process.
type network struct {
	nat   *slirp.Stack // ends the guest's flows and opens host sockets for them
	guest *slirp.Stack // plays the machine behind the NAT

	client *http.Client // of the guest
}

// newNetwork makes the two stacks and joins them.
func newNetwork() (*network, error) {
	nat, err := slirp.NewWithConfig(slirp.Config{Dial: dialHost})
	if err != nil {
		return nil, err
	}
	guest, err := slirp.NewWithConfig(slirp.Config{
		Addresses: []netip.Addr{families[0].guest, families[1].guest},
		Allow:     refuseAll,
	})
	if err != nil {
		nat.Close()
		return nil, err
	}
	n := &network{nat: nat, guest: guest}
	n.client = n.httpClient()
	if err := n.join(); err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// join makes each stack's frames the other's packets, as a cable would.
func (n *network) join() error {
	var toNAT, toGuest slirp.Writer
	toNAT = func(frame []byte) error {
		return n.nat.HandlePacket(0, guestMAC, gatewayMAC, frame[etherHeaderLen:], toGuest)
	}
	toGuest = func(frame []byte) error {
		return n.guest.HandlePacket(0, gatewayMAC, guestMAC, frame[etherHeaderLen:], toNAT)
	}
	for _, f := range families {
		if err := n.guest.AddRoute(0, f.everyone, gatewayMAC, guestMAC, toNAT); err != nil {
			return fmt.Errorf("route to %v: %w", f.everyone, err)
		}
	}
	return nil
}

// Close ends every flow of both stacks.
func (n *network) Close() error {
	n.client.CloseIdleConnections()
	return errors.Join(n.guest.Close(), n.nat.Close())
}

// dialHost opens the host's side of a flow. The gateway's addresses stand for
// this machine's loopback; every other address is dialled as it is.
func dialHost(ctx context.Context, network, address string) (net.Conn, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	for _, f := range families {
		if to.Addr() == f.gateway {
			to = netip.AddrPortFrom(f.loopback, to.Port())
		}
	}
	var d net.Dialer
	return d.DialContext(ctx, network, to.String())
}

// refuseAll is the policy of a machine that forwards nothing.
func refuseAll(context.Context, slirp.Flow) error { return slirp.ErrProhibited }

// httpClient returns a client whose connections start at the guest. The buffers
// are large so that each call moves many packets.
func (n *network) httpClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:        n.dial,
		DisableCompression: true,
		ReadBufferSize:     256 << 10,
		WriteBufferSize:    256 << 10,
	}}
}

// dial connects from the guest to a name or an address. The host looks names
// up; their addresses are tried in its order.
func (n *network) dial(ctx context.Context, network, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var failures []error
	for _, addr := range addrs {
		conn, err := n.dialOne(ctx, network, net.JoinHostPort(addr.Unmap().String(), port))
		if err == nil {
			return conn, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}

// dialOne connects from the guest to one address, which has ten seconds to
// answer, so that the next one gets its turn.
func (n *network) dialOne(ctx context.Context, network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return n.guest.DialContext(ctx, network, address)
}
