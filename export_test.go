package slirp

import "net/netip"

// TCPState returns the state of the TCP flow between two ends in namespace 0, by
// its name in RFC 9293.
func (s *Stack) TCPState(guest, host netip.AddrPort) string {
	key := flowKey{
		guest: ipAddrFrom(guest.Addr()), host: ipAddrFrom(host.Addr()), guestPort: guest.Port(), hostPort: host.Port(),
		proto: protoTCP, version: versionOf(guest.Addr()),
	}
	c, ok := s.lookup(&key).(*tcpConn)
	if !ok {
		return "CLOSED"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone || c.tcb == nil {
		return "CLOSED"
	}
	return c.tcb.State().String()
}
