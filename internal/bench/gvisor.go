package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/KarpelesLab/slirp/internal/load"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const nic = 1

// gvisorNetwork is a netstack with a plain forwarder.
type gvisorNetwork struct {
	stack  *stack.Stack
	link   *channel.Endpoint
	mtu    int
	flows  [1 << 16]atomic.Pointer[load.Flow] // by port of the guest
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func newGVisor(mtu int) *gvisorNetwork {
	g := &gvisorNetwork{mtu: mtu, link: channel.New(4096, uint32(mtu), "\x02\x02\x00\x00\x00\x00")}
	g.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	g.stack = stack.New(stack.Options{
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocolWithOptions(ipv4.Options{AllowExternalLoopbackTraffic: true}),
		},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol},
	})
	checkGVisor(g.stack.CreateNIC(nic, g.link))
	checkGVisor(g.stack.SetSpoofing(nic, true))
	checkGVisor(g.stack.SetPromiscuousMode(nic, true))
	g.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nic}})
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	checkGVisor(g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &sack))
	checkGVisor(g.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &moderate))
	g.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(g.stack, 0, 1000, forward).HandlePacket)
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	g.wg.Go(func() { g.read(ctx) })
	return g
}

func checkGVisor(err tcpip.Error) {
	if err != nil {
		check(errors.New(err.String()))
	}
}

// forward dials for the guest, and copies both ways.
func forward(r *tcp.ForwarderRequest) {
	id := r.ID()
	out, err := net.Dial("tcp", net.JoinHostPort(id.LocalAddress.String(), fmt.Sprint(id.LocalPort)))
	if err != nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, e := r.CreateEndpoint(&wq)
	r.Complete(e != nil)
	if e != nil {
		out.Close()
		return
	}
	in := gonet.NewTCPConn(&wq, ep)
	var both sync.WaitGroup
	both.Go(func() {
		io.Copy(out, in)
		out.(*net.TCPConn).CloseWrite()
	})
	both.Go(func() {
		io.Copy(in, out)
		in.CloseWrite()
	})
	go func() {
		both.Wait()
		in.Close()
		out.Close()
	}()
}

// read takes what the stack sends to the guest.
func (g *gvisorNetwork) read(ctx context.Context) {
	for {
		p := g.link.ReadContext(ctx)
		if p == nil {
			return
		}
		h := p.TransportHeader().Slice()
		if f := g.flows[binary.BigEndian.Uint16(h[2:])].Load(); f != nil {
			f.Note(h, len(h)+p.Data().Size())
			f.Answer()
		}
		p.DecRef()
	}
}

func (g *gvisorNetwork) open(port uint16, to netip.AddrPort) *load.Flow {
	f := load.NewFlow(netip.AddrPortFrom(netip.MustParseAddr(guest), port), to, g.mtu, batch)
	f.Send = func(packets [][]byte) error {
		for _, p := range packets {
			b := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(p)})
			g.link.InjectInbound(ipv4.ProtocolNumber, b)
			b.DecRef()
		}
		return nil
	}
	g.flows[port].Store(f)
	return f
}

func (g *gvisorNetwork) Close() error {
	g.stack.Close()
	g.stack.Wait()
	g.cancel()
	g.wg.Wait()
	return nil
}

func (g *gvisorNetwork) String() string { return fmt.Sprintf("%+v", g.stack.Stats().TCP) }
