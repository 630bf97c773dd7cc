package slirp

import (
	"context"
	"net"
	"syscall"
	"testing"
)

// TestUDPBurstBeforeQueue: while what has waited for Allow of another destination is
// written to the host, datagrams go through the queue. Those that came before are
// written first.
func TestUDPBurstBeforeQueue(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g, flows, servers, to := burstRig(t, fam, Config{UDPMapping: UDPMappingEndpoint})
		f, echoes := flows[0], 0
		w := func(frames [][]byte) error {
			echoes++
			if echoes == 1 { // what release and startPump do, but that the goroutine waits
				f.mu.Lock()
				f.enqueue(&datagram{data: []byte("other"), to: to[1]})
				f.pumping = true
				f.stack.goroutines.Add(1)
				f.mu.Unlock()
			} else {
				f.pump()
			}
			return nil
		}
		g.batch(w, udpPacket(g.from, to[0], []byte("1")), fam.ping(fam.server, 1, 1, nil),
			udpPacket(g.from, to[0], []byte("2")), fam.ping(fam.server, 1, 2, nil))
		expectDatagram(t, servers[1], "other")
		expectDatagram(t, servers[0], "1")
		expectDatagram(t, servers[0], "2")
	})
}

// TestUDPBurstTellsOfEarlier: what a socket tells of an earlier datagram in place of
// sending several gets to the guest, and they are sent.
func TestUDPBurstTellsOfEarlier(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		g, _, servers, to := burstRig(t, fam, Config{})
		stuck, release := make(chan bool), make(chan bool)
		w := func(frames [][]byte) error {
			if frames[0][len(frames[0])-1] == '!' { // the reader of the flow is not to take the error
				close(stuck)
				<-release
			}
			return g.writeBatch(frames)
		}
		g.batch(w, udpPacket(g.from, to[0], []byte("hold")))
		buf := make([]byte, 10)
		_, from, err := servers[0].ReadFromUDPAddrPort(buf)
		if err != nil {
			t.Fatal(err)
		}
		servers[0].WriteToUDPAddrPort([]byte("held!"), from)
		<-stuck
		servers[0].Close()
		g.batch(w, udpPacket(g.from, to[0], []byte("anyone?")))
		server, _ := udpServer(t, fam, int(to[0].Port()))
		g.batch(w, udpPacket(g.from, to[0], []byte("hello")), udpPacket(g.from, to[0], []byte("world")))
		expectDatagram(t, server, "hello")
		expectDatagram(t, server, "world")
		close(release)
		g.expect("held!")
		g.takeICMP()
	})
}

// TestUDPBurstQuote: an ICMP error is about the datagram that did not arrive, not about
// one behind it.
func TestUDPBurstQuote(t *testing.T) {
	const mtu, discover, always = 24, 23, 2 // IPV6_MTU, IPV6_MTU_DISCOVER and its IPV6_PMTUDISC_DO
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
			c.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, mtu, 1280)
				if err == nil {
					err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, discover, always)
				}
			})
			return err
		}}
		return d.DialContext(ctx, network, address)
	}
	eachFamily(t, func(t *testing.T, fam family) {
		if fam.version != 6 {
			return // its sockets have no MTU of their own
		}
		g, _, servers, to := burstRig(t, fam, Config{Dial: dial})
		long := udpPacket(g.from, to[0], pattern(1400))
		quote := string(long[:maxQuote])
		g.batch(g.writeBatch, long, udpPacket(g.from, to[0], []byte("short")))
		expectDatagram(t, servers[0], "short")
		if msg := g.takeICMP(); string(msg.body) != quote {
			t.Errorf("ICMP %d %d about %x, want %x", msg.typ, msg.code, msg.body, quote)
		}
	})
}
