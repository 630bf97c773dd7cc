// Package slirp is an embeddable user-mode network: NAT for the packets of a
// virtual machine, an emulator or a test, without root and without an interface.
// A guest's raw IP packets go in through [Stack.HandlePacket]; its TCP and UDP
// flows are ended here and carried on over ordinary host sockets; answers come
// out as Ethernet frames through a [Writer]. The embedding program can also
// listen on, and dial from, addresses that exist inside the stack only:
// [Stack.Listen], [Stack.DialContext].
//
// # The life of a packet
//
// HandlePacket parses the IP header of either family into one struct (ip.go),
// checks the transport checksum (checksum.go, internal/sum), and finds the flow by its key:
// namespace, protocol, both addresses and ports (flow.go). A TCP segment goes
// under the flow's lock into its state machine (internal/tcp); what that makes
// due is pulled out segment by segment, the lock is released, headers and
// checksums are completed, and the frame goes to the Writer. All of this happens
// before HandlePacket returns, and nothing of it waits. With [Stack.HandlePackets] a
// flow answers when all packets have been taken. ICMP echo and neighbour
// solicitations are answered on the spot for any unicast address (icmp4.go,
// icmp6.go). Fragments wait until their packet is whole (stack.go,
// internal/reassembly), which is then handled as if it had come so.
//
// To the guest the Stack is a router, one hop away, and everything behind it is
// one hop further. A packet with a TTL or hop limit of 1 ends here: it is handled if
// it is for one of the Stack's own addresses, a link-local one, or a listener; or
// else answered with an ICMP Time Exceeded, so that a traceroute shows the Stack
// first. A TTL of 0 is let pass. The hosts behind see packets of the operating
// system, whose TTL has nothing to do with the guest's.
//
// Packets to the guest are as long as the MTU. Where a part of the guest's network
// takes less and says so (ICMP fragmentation needed, packet too big), the TCP flow
// sends again what was in flight, in shorter segments, and datagrams to that guest
// leave in shorter fragments for ten minutes.
//
// With [Config.VirtioNetHeader] the guest's side of the link completes frames: the
// TCP flow makes one packet of all that its windows let go at once, up to 65,535 bytes,
// cut where its segments end; the checksum is left out; and a virtio_net_hdr says both.
// What is sent, in which order and when, is the same to the byte once the packet is
// cut, but for a congestion window that grows by what an ACK covers, not by two
// segments of it, since whoever takes such a packet acknowledges it as one.
// Retransmissions, and segments that carry SACK blocks, are sent alone. With
// [Config.VirtioNetUSO] it completes frames of several datagrams as well.
//
// An unreadable IP packet is an error. Everything else that a guest can do
// wrong is answered as its RFC says, or dropped and counted in [Stats].
//
// A transport checksum is accepted when it is right, when it is 0, and when it
// holds the sum of the pseudo-header alone: that is what a guest leaves that
// relies on its network card to complete it.
//
// # The life of a TCP flow
//
// A SYN finds a listener, or a destination on the host's side.
//
// For a listener the handshake begins at once; the connection waits for Accept
// when it has ended. Every handshake has its place in the backlog.
//
// For the host, the flow is entered in the table and a goroutine is started,
// which asks [Config.Allow] and calls [Config.Dial]. SYNs that come again change
// nothing. If the guest gives up with a reset, the dial is cancelled. When the
// dial succeeds, the SYN-ACK leaves, and the goroutine goes on as the reader of
// the host connection. It ends when there has been nothing to read for 25 ms or so: on
// Linux one goroutine waits for the hosts of all such flows, if [Config.Dial] is not
// set; for what that returns, if it is a *net.TCPConn, and on other systems a fresh
// one does, with a smaller stack (not on Windows). When the dial fails, the guest is
// told how:
//
//	error                                             TCP guest                    UDP guest
//	ECONNREFUSED                                      reset                        ICMP port unreachable
//	ENETUNREACH                                       ICMP net unreachable         the same
//	EHOSTUNREACH, no such host                        ICMP host unreachable        the same
//	EACCES, EPERM, ErrProhibited                      ICMP prohibited              the same
//	EMSGSIZE                                          reset                        ICMP packet too big
//	a timeout, anything else                          reset                        nothing
//	ErrDrop                                           nothing                      nothing
//
// Then there are two independent directions. Bytes of the guest are written to a
// TCP socket of the operating system on the packet path, as far as it takes them
// without waiting, and else by a goroutine that exists while there are any; those that
// the guest has not pushed wait for more, for a millisecond at most. What the host
// has taken opens the guest's window, so a slow host slows the guest. Bytes of the host are read
// straight into the send buffer; while that is full nothing is read, so a slow
// guest slows the host. The guest's FIN becomes CloseWrite on the host connection
// after the last byte (Close, if the connection has no CloseWrite); the host's
// EOF becomes a FIN. A reset on either side becomes a reset on the other, after
// what the window lets pass at once. While the buffer is full the host is not read
// from, so every 2 s the operating system is asked if it was reset (not on Windows, and
// not about a connection of Dial that is no *net.TCPConn: there the guest has to take
// what is in the buffer first).
//
// A guest that is silent for TCPIdleTimeout is probed every 5 s; after three
// probes without an answer both sides are reset. A guest that answers keeps its
// flow. A host is probed by the operating system as package net has it do (every 15 s,
// 9 times): the guest's own probes, which the Stack answers, do not tell it whether the
// host is there. A connection of Dial is as Dial has left it. Each flow has its own
// deadlines; there is no sweep to wait for.
//
// # The life of a UDP flow
//
// The first datagram opens a connected host socket, on a goroutine that goes on
// as its reader; those that come meanwhile are queued, up to 16. As with TCP it ends
// when the host is silent, on Linux and if Dial is not set; elsewhere it waits. If Dial
// is not set the socket has a receive buffer of 256 KiB, as far as the system allows
// (Linux doubles it): so much of the host's may wait for a Writer, in the memory of the
// system. A socket of the operating system is written to on the packet path, as it takes
// datagrams without waiting or not at all. Any other connection is written to by
// a goroutine that exists while datagrams wait for it, up to 64. What finds no
// room is dropped. Answers of any size go to the guest, in fragments above the
// MTU. Those that have come while others were sent are read together, up to 64 and what
// a packet holds (not on Windows, nor from a connection of Dial that is no *net.UDPConn);
// with [Config.VirtioNetUSO] those of them that are as long as each other, and a shorter
// one behind them, leave as one frame. Errors of the socket become ICMP errors (of one
// that takes no datagram so long, packet too big, with the MTU; but not over IPv4
// without Don't Fragment), and the flow lives on until it has been idle for
// UDPIdleTimeout. Flows to port 53 that were answered have 10 s: a resolver opens one
// for each question.
//
// With [UDPMappingEndpoint] the flow is all that the guest sends from one address
// and port, a mapping (udp.go). Allow is asked about each new destination on
// a goroutine of its own, which keeps that destination's datagrams waiting and no
// other's. The first one that may pass opens the host socket, by
// [Config.ListenPacket], and its goroutine goes on as the reader, which ends as above
// if ListenPacket is not set. The socket is not
// connected. What comes to it goes to the guest with its real source, if the guest
// has sent to that address, on any port, within UDPIdleTimeout; else it is dropped.
// Only datagrams of the guest to where it may send keep the mapping. An error of a
// write is about its datagram and answered as above; the refusal of a closed port is
// not among them, as operating systems do not report it to such a socket. Config.Dial
// has no part in this, so a mapping of addresses that it does is not done here.
//
// The UDP connections of [Stack.DialContext] are flows of the same table, with
// the program in place of a host socket. They do not expire.
//
// # Who may go where
//
// The stack has no policy: a guest reaches what the host does, also the host's
// loopback address and services that trust the host. Config.Allow is the place for
// one, for every flow of every protocol; [Guard] is one that keeps a guest from the
// host itself.
//
// # Ownership
//
// The packet is the caller's again when HandlePacket returns. A frame is the
// Writer's, which may keep it, unless [Config.ReuseFrames] is set. A flow sends to
// where the latest packet of its guest came from: the MAC addresses and Writer of
// that HandlePacket call.
//
// # Locks
//
// There are two kinds, Stack.mu (the tables) and one for each flow, and no path
// holds two. No lock is held across a Writer, Allow, Dial, or a host socket. A
// Writer may therefore call HandlePacket, of this Stack or of another. Frames of
// one flow leave in order, one at a time: the goroutine that finds another at it
// leaves its frames to that one, which takes turns: what it finds beyond 64 frames is
// for a timer, unless it has itself written the bytes that are sent. Whoever waits does so on a sync.Cond of the
// flow's lock.
//
// # Time
//
// The clock is read at the doors: HandlePacket, timers, Read and Write, the
// relay. The rules of TCP get the time as a parameter. In a testing/synctest
// bubble, with a Config.Dial that stays inside it, a Stack runs in virtual time.
//
// # Limits
//
// Memory follows need: an idle flow holds no buffer, rings grow to SendBuffer and
// ReceiveBuffer and go back when they are empty. All of them in a namespace hold
// MaxBuffered at most: the more there is, the less of what is left has the next one to
// take, down to 8 KiB. Then hosts are read from less, and guests see smaller windows. Flows, dials under way, and
// half-open connections are bounded per namespace or listener (see [Config]), and
// so are connections in TIME-WAIT (4,096 for each namespace), remembered guest addresses
// (4,096 for each namespace), guests behind a smaller MTU (1,024 in all), and ICMP errors and resets for segments of no connection
// (1,000 a second of each, of which every namespace has 100 that no other takes
// away). Fragments take up to 1 MiB in all, and those of one
// namespace up to 512 KiB and 64 packets, for 30 s (IPv4) or 60 s (IPv6). A UDP
// mapping has 256 destinations at most. A full table refuses what is new; only
// half-open connections, those in TIME-WAIT, UDP flows that were never answered and
// have been idle for 10 s, the destination of a mapping where the guest has not sent
// to for the longest time, and packets of which fragments are missing make way.
//
// A Stack without a flow runs no goroutine. [Stack.Close] ends all of them.
//
// # Not supported
//
// Router advertisements, ICMP errors from the guest for the host (what counts are
// those about connections of DialContext, and about packets that are too long), ECN
// (its bits never break a handshake), and pings that leave for the host. Urgent data
// is delivered in line.
package slirp
