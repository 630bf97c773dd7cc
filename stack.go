package slirp

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp/internal/egress"
	"github.com/KarpelesLab/slirp/internal/hostio"
	"github.com/KarpelesLab/slirp/internal/reassembly"
	"github.com/KarpelesLab/slirp/internal/tcp"
)

// Errors that [Stack.HandlePacket] returns for a packet that is not an IP packet
// it can read. Everything else a guest may do wrong is answered as its RFC says,
// or dropped and counted in [Stats], with a nil error.
var (
	ErrPacketTooShort     = errors.New("packet too short")
	ErrIPVersion          = errors.New("unsupported IP version")
	ErrIHL                = errors.New("invalid ihl")
	ErrIPv4TotalLength    = errors.New("invalid IPv4 total length")
	ErrIPv6TooShort       = errors.New("IPv6 packet too short")
	ErrIPv6PayloadLength  = errors.New("IPv6 packet shorter than payload length")
	ErrNetworkUnsupported = errors.New("only tcp/tcp4/tcp6 supported")
	ErrAddressInUse       = errors.New("address already in use")
	ErrListenerClosed     = fmt.Errorf("listener closed: %w", net.ErrClosed)
	ErrStackClosed        = fmt.Errorf("stack closed: %w", net.ErrClosed)
	ErrNoRoute            = errors.New("no route to guest")
	ErrTooManyFlows       = errors.New("too many flows in the namespace")
)

// Errors for [Config.Allow] and [Config.Dial] to return, alone or wrapped, to
// choose what the guest sees.
var (
	// ErrProhibited answers the guest with an ICMP "administratively prohibited".
	ErrProhibited = errors.New("administratively prohibited")
	// ErrDrop answers the guest with nothing at all.
	ErrDrop = errors.New("dropped by policy")
)

// Writer receives complete Ethernet II frames for the guest. Frames of one flow
// are handed over in order, one at a time; frames of different flows are handed
// over concurrently, from any goroutine. No lock is held during the call, so a
// Writer may call [Stack.HandlePacket] of this or of another Stack, and one that
// blocks delays its own flow only, and the HandlePacket that calls it. (Where that
// is called by the only reader of the guest, a Writer that waits for a guest that
// waits to be read, both with full sockets, waits for ever: it rather drops the frame,
// or queues it.) It must not call [Stack.Close], which waits for it, and it must
// return: one that panics, or ends its goroutine as t.FailNow does, leaves its flow
// and Close waiting. The Writer owns the frame unless
// [Config.ReuseFrames] is set. An error means that this frame was lost.
type Writer func(frame []byte) error

// BatchWriter is a [Writer] that takes several frames in one call, in order. It may
// not keep frames, the slice; what is in it is like the frame of a Writer. Frames of
// several flows are never in one call. An error means that frames were lost, no
// matter how many.
type BatchWriter func(frames [][]byte) error

// Flow names the guest and the destination of one flow. Addresses are unmapped:
// ::ffff:192.0.2.1 is 192.0.2.1.
type Flow struct {
	Namespace   uintptr
	Network     string         // "tcp" or "udp"
	Source      netip.AddrPort // the guest's end
	Destination netip.AddrPort // where the guest wants to go
}

// UDPMapping says which datagrams of a guest leave through the same host socket.
type UDPMapping int

const (
	// UDPMappingPerFlow gives every flow, a guest's port and one destination, a
	// connected host socket of its own. Only that destination can answer. What
	// becomes of a datagram is known: a closed port is reported to the guest.
	UDPMappingPerFlow UDPMapping = iota

	// UDPMappingEndpoint gives everything that a guest sends from one address and
	// port, whatever the destination, the same host socket (RFC 4787 REQ-1). All
	// destinations see the same port of the host, as STUN, WebRTC and games need
	// it. Any address that the guest has sent to within UDPIdleTimeout may send to
	// it, from any port (REQ-8: address-dependent filtering); other datagrams are
	// dropped. Only datagrams of the guest keep a mapping and its destinations:
	// those who answer cannot hold it open (REQ-6).
	//
	// The host sockets come from [Config.ListenPacket], not from Dial: they are not
	// connected, and operating systems do not report to such a socket that a port
	// is closed. A guest hears of what the host knows at once: no route, prohibited.
	UDPMappingEndpoint
)

// Config holds the settings of a [Stack]. The zero value has the classic
// defaults. A zero field means its default; a negative timeout or limit means
// that there is none.
type Config struct {
	// MTU is the size in bytes of the largest IP packet sent to the guest.
	// Default 1500; at least 1280 (RFC 8200 section 5), at most 65535.
	MTU int

	// SendBuffer and ReceiveBuffer bound the bytes held for one TCP flow in
	// each direction. Default 1 MiB each; at least 4096, at most 512 MiB. Memory
	// is taken as it is needed: an idle flow holds none.
	SendBuffer, ReceiveBuffer int

	// MaxBuffered bounds the bytes that all TCP flows of one namespace hold in such
	// buffers. No buffer grows beyond a sixteenth of what is left, so that flows that
	// hold theirs for ever leave some to the others; but each may hold 8 KiB whatever
	// the others do. Where memory is short a host is read from less, and a guest's
	// window is smaller. Default 32 times SendBuffer and ReceiveBuffer together, at
	// least 64 MiB; negative: no limit.
	MaxBuffered int

	// TCPIdleTimeout is how long a TCP flow may be silent before the guest is
	// probed (keep-alive, every 5 s, 3 times); a guest that does not answer
	// loses the flow. Default 2 minutes; negative: never.
	TCPIdleTimeout time.Duration

	// UDPIdleTimeout is how long a UDP flow may be silent before it is
	// forgotten and its host socket is closed. Default 60 s; negative: never.
	// RFC 4787 REQ-5 recommends 5 minutes. Flows to port 53 that were answered
	// are forgotten after 10 s at the latest.
	UDPIdleTimeout time.Duration

	// UDPMapping says which datagrams share a host socket. Default
	// [UDPMappingPerFlow].
	UDPMapping UDPMapping

	// DialTimeout bounds one call of Allow and Dial. Default 30 s; negative: none.
	DialTimeout time.Duration

	// Addresses are the stack's own: where ICMP errors come from, and the
	// source of DialContext. At most one of each family counts as such, the
	// first. Default 10.0.2.2 and fd00::2.
	Addresses []netip.Addr

	// MaxTCPFlows bounds the TCP flows of one namespace, those in TIME-WAIT
	// apart. Beyond it a SYN for the host is answered with an ICMP "administratively
	// prohibited", one for a listener not at all. Default 16384; negative: no limit.
	MaxTCPFlows int

	// MaxUDPFlows bounds the UDP flows of one namespace; with
	// UDPMappingEndpoint, its mappings. Default 4096; negative: no limit. Beyond
	// it a flow that was never answered and has been idle for 10 s makes way for
	// a new one, the oldest first; without such a flow the new one is refused.
	MaxUDPFlows int

	// MaxPendingDials bounds the flows of one namespace whose host connection
	// is not made yet. A SYN or datagram beyond it is dropped; the guest sends
	// it again. Default 256; negative: no limit.
	MaxPendingDials int

	// MaxHalfOpen bounds the connections of one listener and namespace whose
	// handshake has not ended. The oldest makes way for a new one when it is a
	// second old. Each has its place in the backlog, so it counts where that is
	// longer. Default 256; negative: no limit.
	MaxHalfOpen int

	// Backlog bounds the connections of one listener and namespace that wait for
	// Accept or are on their way there: without a free place a SYN gets no answer.
	// Default 128; negative: no limit.
	Backlog int

	// Allow is asked once for every flow that would leave for the host, before
	// anything is opened for it. Nil lets every flow pass, to the host itself and
	// its loopback address too: [Guard] has a policy that does not. The kind of error
	// decides what the guest sees: see [ErrProhibited], [ErrDrop] and the table
	// in the package documentation. It is called on a goroutine of its own and
	// may block until ctx ends, which is when the guest gives up, DialTimeout
	// has passed, or the Stack is closed.
	Allow func(ctx context.Context, f Flow) error

	// Dial opens the host's side of a flow, but of those of UDP with
	// UDPMappingEndpoint; network is "tcp" or "udp", address
	// an IP and port. Nil uses a [net.Dialer]. [FlowFromContext] tells which
	// guest asks. It is called on a goroutine of its own, under the context of
	// Allow, and the Stack closes what it returns. The read deadline of a
	// *net.TCPConn is the Stack's, too: one that was set before does not last.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// ListenPacket opens the host socket of a UDP mapping, if UDPMapping is
	// UDPMappingEndpoint; network is "udp4" or "udp6", address ":0". Nil uses a
	// [net.ListenConfig]. It is called like Dial, once for each mapping, and
	// FlowFromContext tells the flow that was the first. Datagrams are written to
	// the very address that the guest has sent them to: 127.0.0.1 is the host's own
	// if Allow lets it pass, and 10.0.2.2 is none of the Stack's. An address is
	// mapped to another by a PacketConn that does so both ways, in WriteTo and
	// ReadFrom. An error of WriteTo is about its datagram only; a socket that is of
	// no more use says so in ReadFrom.
	ListenPacket func(ctx context.Context, network, address string) (net.PacketConn, error)

	// ReuseFrames promises that the Writer does not keep a frame after it
	// returns, and makes the Stack use the memory again.
	ReuseFrames bool

	// VirtioNetHeader puts a virtio_net_hdr of VIRTIO 1.x, of [VirtioNetHeaderLen]
	// bytes and little-endian, in front of every frame for the Writer, and leaves work
	// to whoever takes it: the checksum of TCP (VIRTIO_NET_HDR_F_NEEDS_CSUM), and
	// cutting a packet of up to 65,535 bytes to segments that fit the MTU
	// (VIRTIO_NET_HDR_GSO_TCPV4 and TCPV6). It is for guests that have agreed to both:
	// a virtio device with VIRTIO_NET_F_GUEST_CSUM, GUEST_TSO4 and GUEST_TSO6, or a
	// Linux TAP device with IFF_VNET_HDR, and 12 by TUNSETVNETHDRSZ.
	//
	// HandlePacket takes IP packets all the same: the caller takes the header of
	// the guest's frames off with that of Ethernet. What it says need not be looked
	// at. Packets that are longer than the MTU and TCP and UDP checksums that are not
	// finished are taken with and without VirtioNetHeader, so a guest can be offered
	// to send such (VIRTIO_NET_F_CSUM, HOST_TSO4 and HOST_TSO6, or TUNSETOFFLOAD). Only
	// a checksum inside of a tunnel (VXLAN), which Linux 6.17 leaves to a TAP device, is
	// the caller's to complete: csum_start is then behind the packet's own IP header.
	VirtioNetHeader bool

	// VirtioNetUSO makes one frame of the UDP datagrams of a flow that have come
	// together and are as long as each other, but the last, which may be shorter: up to
	// 64, and a packet of 65,535 bytes, for whoever takes it to cut
	// (VIRTIO_NET_HDR_GSO_UDP_L4), with the checksum left out. Datagrams that do not fit
	// the MTU leave in fragments, as ever. It needs VirtioNetHeader, and is for guests
	// that have agreed to it: a virtio device with VIRTIO_NET_F_GUEST_USO4 and
	// GUEST_USO6, or a TAP device of Linux 6.2 or later.
	//
	// HandlePacket does not take such packets: it cannot tell several datagrams from one
	// that is long. A guest must not be offered to send them (VIRTIO_NET_F_HOST_USO,
	// TUN_F_USO4, TUN_F_USO6).
	VirtioNetUSO bool

	// Logger is told of flows that are opened, refused and closed, at debug
	// level, never per packet, and of each at most ten times a second. Nil logs nothing.
	Logger *slog.Logger
}

// Guard is a policy that keeps a guest from the host itself, and from what only the
// host should talk to. It refuses, with [ErrProhibited]:
//
//   - loopback addresses, 0.0.0.0/8 and "::", which are loopback addresses by another
//     name;
//   - the addresses of the host's interfaces as they are when a flow begins, or were
//     less than a second before, and all of a network on the loopback interface;
//   - link-local addresses, and the others where providers of virtual machines have
//     their metadata services;
//   - multicast and broadcast, those of the host's networks too;
//   - every address that one of these is written in: as IPv4-mapped, IPv4-compatible
//     and IPv4-translated, NAT64 (64:ff9b::/96), 6to4, Teredo and ISATAP; and all of
//     64:ff9b:1::/48, the local NAT64 prefix.
//
// Everything else may pass, the rest of the host's networks and private addresses
// among it. Listeners of the Stack are not concerned. If the addresses of the host
// cannot be read, everything is refused but what Except has.
//
// The zero value is ready for use, and its methods may be called concurrently:
//
//	guard := new(slirp.Guard)
//	slirp.Config{
//		Allow: guard.Allow,
//		Dial:  (&net.Dialer{Control: guard.Control}).DialContext,
//	}
//
// It does not know of addresses that reach the host by other ways: those that a
// router, a firewall rule or a local route leads to it, and those of a translator
// with a prefix of its own (NAT64, 6rd).
type Guard struct {
	// Except lists what may pass nevertheless. An address in which another one is
	// written passes if that one does. It is not to be changed while the Guard is
	// in use.
	Except []netip.Prefix

	host egress.Host
}

// Allow is for [Config.Allow]. It judges the destination as the guest names it: what
// Dial makes of that is for Control to judge.
func (g *Guard) Allow(ctx context.Context, f Flow) error { return g.Check(f.Destination.Addr()) }

// Control is for the Control field of a [net.Dialer] in [Config.Dial]. It judges the
// address that is really dialled, after every mapping of addresses and look-up of
// names. (Datagrams of UDPMappingEndpoint go to the very address that Allow has
// judged, unless a PacketConn maps it: that can ask Check.)
func (g *Guard) Control(network, address string, c syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrProhibited, err)
	}
	return g.Check(a.Addr())
}

// Check judges one address, for policies of which this is a part. The error is
// [ErrProhibited] or nil.
func (g *Guard) Check(a netip.Addr) error {
	if !a.IsValid() {
		return fmt.Errorf("%w: not an address", ErrProhibited)
	}
	if why := g.host.Refuse(a, g.Except); why != "" {
		return fmt.Errorf("%w: %v is refused: %s", ErrProhibited, a, why)
	}
	return nil
}

// withDefaults returns cfg with its zero fields set, or an error that names the
// field that is wrong.
func (cfg Config) withDefaults() (Config, error) {
	def := func(p *int, d int) {
		if *p == 0 {
			*p = d
		}
	}
	dur := func(p *time.Duration, d time.Duration) {
		if *p == 0 {
			*p = d
		}
	}
	def(&cfg.MTU, 1500)
	def(&cfg.SendBuffer, 1<<20)
	def(&cfg.ReceiveBuffer, 1<<20)
	def(&cfg.MaxBuffered, max(64<<20, int(min(32*(int64(cfg.SendBuffer)+int64(cfg.ReceiveBuffer)), math.MaxInt))))
	def(&cfg.MaxTCPFlows, 16384)
	def(&cfg.MaxUDPFlows, 4096)
	def(&cfg.MaxPendingDials, 256)
	def(&cfg.MaxHalfOpen, 256)
	def(&cfg.Backlog, 128)
	dur(&cfg.TCPIdleTimeout, 2*time.Minute)
	dur(&cfg.UDPIdleTimeout, 60*time.Second)
	dur(&cfg.DialTimeout, 30*time.Second)
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 2, 2}), netip.AddrFrom16([16]byte{0: 0xfd, 15: 2})}
	}
	if cfg.Dial == nil {
		cfg.Dial = hostio.NewDialer().DialContext
	}
	if cfg.ListenPacket == nil {
		cfg.ListenPacket = new(net.ListenConfig).ListenPacket
	}
	return cfg, cfg.validate()
}

// A buffer has memory of a power of two that is above its size, which has to have a
// length on machines of 32 bits.
const (
	minBuffer = 4096
	maxBuffer = 512 << 20
)

func (cfg *Config) validate() error {
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return fmt.Errorf("slirp: Config.MTU: %d is not between 1280 and 65535", cfg.MTU)
	}
	if cfg.SendBuffer < minBuffer || cfg.SendBuffer > maxBuffer {
		return fmt.Errorf("slirp: Config.SendBuffer: %d is not between 4096 and 512 MiB", cfg.SendBuffer)
	}
	if cfg.ReceiveBuffer < minBuffer || cfg.ReceiveBuffer > maxBuffer {
		return fmt.Errorf("slirp: Config.ReceiveBuffer: %d is not between 4096 and 512 MiB", cfg.ReceiveBuffer)
	}
	if cfg.UDPMapping != UDPMappingPerFlow && cfg.UDPMapping != UDPMappingEndpoint {
		return fmt.Errorf("slirp: Config.UDPMapping: %d is unknown", cfg.UDPMapping)
	}
	if cfg.VirtioNetUSO && !cfg.VirtioNetHeader {
		return errors.New("slirp: Config.VirtioNetUSO: needs VirtioNetHeader")
	}
	for _, a := range cfg.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Zone() != "" {
			return fmt.Errorf("slirp: Config.Addresses: %v is not a unicast address", a)
		}
	}
	return nil
}

// Stack is a user-mode network: it ends the guest's TCP and UDP flows and
// carries them over ordinary host sockets, or to listeners inside the program.
// Its methods may be called concurrently.
type Stack struct {
	cfg        Config
	ownDial    bool            // Config.Dial is not set: nobody else has the connections
	ownListen  bool            // Config.ListenPacket is not set: nor the sockets
	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	isnSecret  [32]byte
	began      time.Time // when the clock showed clockLead, see moment
	isnEpoch   moment    // of the ISN clock
	counters   counters
	limits     [numLimited]tokenBucket
	fragmentID fragmentIDs
	logLimits  [numFlowNews]tokenBucket
	slabs      sync.Pool               // of *slab
	goroutines sync.WaitGroup          // that Close waits for
	poller     *hostio.Poller          // for the hosts of flows that rest
	closed     atomic.Bool             // set under mu
	numPaths   atomic.Int32            // len(paths)
	latest     atomic.Pointer[tcpConn] // one of flows, or nil: it had the latest segment. Set with mu held

	mu          sync.RWMutex
	flows       map[flowKey]flow
	accounts    map[uintptr]*account
	listeners   map[listenKey]*Listener
	guests      map[uintptr]map[guestKey]link // by namespace
	shares      map[uintptr]*share            // of the limits
	sweepShares int                           // how many shares there are when those without use are forgotten
	paths       map[guestKey]path             // where packets must be shorter than the MTU
	routes      map[uintptr][]route
	draining    map[*tcpConn]*time.Timer // gone from flows, still writing to their hosts; the timer of drainTimeout

	fragments     *reassembly.Reassembler
	fragmentTimer *time.Timer // for the deadline of fragments; set while there are any
	fragmentsDue  time.Time   // when fragmentTimer fires; zero: it does not
}

// New returns a Stack with the default settings. It runs no goroutine until a
// flow needs one.
func New() *Stack {
	s, err := NewWithConfig(Config{})
	if err != nil {
		panic(err) // the defaults are valid
	}
	return s
}

// NewWithConfig returns a Stack with the settings of cfg, or an error that names
// the field that is wrong.
func NewWithConfig(cfg Config) (*Stack, error) {
	ownDial, ownListen := cfg.Dial == nil, cfg.ListenPacket == nil
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Stack{
		cfg:       cfg,
		ownDial:   ownDial,
		ownListen: ownListen,
		began:     time.Now(),
		isnEpoch:  moment(clockLead),
		flows:     make(map[flowKey]flow),
		accounts:  make(map[uintptr]*account),
		listeners: make(map[listenKey]*Listener),
		guests:    make(map[uintptr]map[guestKey]link),
		paths:     make(map[guestKey]path),
		shares:    make(map[uintptr]*share),
		routes:    make(map[uintptr][]route),
		draining:  make(map[*tcpConn]*time.Timer),
		fragments: reassembly.New(reassembly.Limits{}),
	}
	s.poller = hostio.NewPoller(&s.goroutines)
	rand.Read(s.isnSecret[:])
	s.fragmentID.seed = maphash.MakeSeed()
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s, nil
}

// HandlePacket takes one IPv4 or IPv6 packet, from its IP header on, that the
// guest of the namespace sent. Frames in answer, at once or later, go to w from
// gwMAC to clientMAC. The caller may use packet again when HandlePacket returns;
// it never waits for a host socket, a dial, or another flow. The error is that
// of an unreadable packet, of w for a frame sent in direct answer, or
// [ErrStackClosed].
func (s *Stack) HandlePacket(namespace uintptr, clientMAC [6]byte, gwMAC [6]byte, packet []byte, w Writer) error {
	l := &link{guest: clientMAC, gw: gwMAC, w: w, ns: namespace, virtio: s.cfg.VirtioNetHeader}
	return s.handlePacket(packet, l, nil)
}

// HandlePackets takes several packets, in the order in which the guest sent them,
// as HandlePacket takes one. It costs less: what a TCP flow has to say to all of them
// it says at once, with one acknowledgment and one write to the host where there
// would be many, and datagrams that follow each other go to the host together, if its
// system can do that. Neither packets nor what is in it is kept. The error is the first
// one; the packets behind it are taken all the same.
func (s *Stack) HandlePackets(namespace uintptr, clientMAC [6]byte, gwMAC [6]byte, packets [][]byte, w BatchWriter) (first error) {
	l := &link{guest: clientMAC, gw: gwMAC, batch: w, ns: namespace, virtio: s.cfg.VirtioNetHeader}
	t := turns.Get().(*turn)
	for _, packet := range packets {
		t.silent = false
		if err := s.handlePacket(packet, l, t); err != nil && first == nil {
			first = err
		}
		if !t.silent {
			t.time = 0
		}
	}
	if err := t.end(); err != nil && first == nil {
		first = err
	}
	t.time = 0
	turns.Put(t)
	return first
}

// moment is a time of the Stack's own clock, as the rules of TCP have it.
type moment = tcp.Time

// clockLead is what that clock shows when a Stack begins. It is never at 0 then, not in
// a bubble of testing/synctest either, where it is the year 2000 again.
const clockLead = 100 * 365 * 24 * time.Hour

// now reads the clock.
func (s *Stack) now() moment { return moment(clockLead + time.Since(s.began)) }

// turn is a call of HandlePackets: the flows that have taken segments in it, and
// answer when it ends, and the datagrams that go to the host together.
type turn struct {
	flows  []*tcpConn
	burst  burst
	time   moment // of the packets at hand; 0: not known
	silent bool   // the packet at hand waits for the end, so no Writer was called for it
}

var turns = sync.Pool{New: func() any { return new(turn) }}

// now returns the time for a packet. Those of a turn have come together, but a Writer
// that is called between them may take any time.
func (t *turn) now(s *Stack) moment {
	if t == nil {
		return s.now()
	}
	if t.time == 0 {
		t.time = s.now()
	}
	return t.time
}

// defers reports whether c, which has just taken a segment, answers at the end of
// the turn. What is urgent does not wait: a sender counts the ACKs that say the same
// thing again. The caller holds c.mu.
func (t *turn) defers(c *tcpConn) bool {
	if t == nil || c.tcb.Urgent() {
		return false
	}
	t.silent = true
	if c.turn != t {
		c.turn = t
		t.flows = append(t.flows, c)
	}
	return true
}

// end has every flow answer. The error is the first of a Writer.
func (t *turn) end() (first error) {
	first = t.burst.send()
	for _, c := range t.flows {
		c.mu.Lock()
		if c.turn == t {
			c.turn = nil
		}
		if c.gone {
			c.mu.Unlock()
			continue
		}
		if err := c.flushTurn(c.stack.now(), maxTurn); err != nil && first == nil {
			first = err
		}
	}
	clear(t.flows)
	t.flows = t.flows[:0]
	return first
}

// handlePacket takes a packet. Without a turn, everything is answered at once.
func (s *Stack) handlePacket(packet []byte, l *link, t *turn) error {
	s.count(packetsIn)
	var p ipPacket
	if err := parseIP(packet, &p); err != nil {
		s.count(dropMalformed)
		return err
	}
	if s.closed.Load() {
		return ErrStackClosed
	}
	switch {
	case p.malformed:
		return s.dropHeaders(&p, l)
	case p.badChecksum:
		s.count(dropChecksum)
	case p.fragment:
		return s.handleFragment(&p, l, t)
	default:
		return s.handleTransport(&p, l, t)
	}
	return nil
}

// dropHeaders drops a packet whose options or extension headers are not taken, and
// tells the guest if it is to be told.
func (s *Stack) dropHeaders(p *ipPacket, l *link) error {
	if p.sourceRoute {
		s.count(dropSourceRoute)
	} else {
		s.count(dropMalformed)
	}
	if p.problem.set {
		return s.sendHeaderProblem(p, l)
	}
	return nil
}

// handleTransport takes a packet that is whole.
func (s *Stack) handleTransport(p *ipPacket, l *link, t *turn) error {
	if p.ttl == 1 && !s.endsHere(p) {
		s.count(dropHopLimit)
		return s.sendHopLimitExceeded(p, l)
	}
	switch p.proto {
	case protoTCP:
		return s.handleTCP(p, l, t)
	case protoUDP:
		return s.handleUDP(p, l, t)
	case icmpProto(p.version):
		if p.src.isUnicast() {
			s.learn(guestKey{l.ns, p.src, uintptr(p.version)}, l)
		}
		if took, err := s.takeError(l.ns, p); took {
			return err
		}
		return s.handleICMP(p, l)
	}
	s.count(dropProtocol)
	return nil
}

// endsHere reports whether a packet goes no further than the Stack: to one of its
// own addresses, to a listener, to an address of the guest's own link, or to more
// than one host. Everything else is behind it, one hop away, and does not get
// there with a TTL or hop limit of 1: one that is 0 after a hop ends the packet (RFC
// 1812 section 5.3.1, RFC 8200 section 3).
//
// Deviation: a TTL of 0 passes, which nobody may send. There are guests without a
// network stack of their own whose packets have it.
func (s *Stack) endsHere(p *ipPacket) bool {
	if !p.dst.isUnicast() || s.cfg.isOwn(p.dst) || p.dst.addr().IsLinkLocalUnicast() {
		return true
	}
	return p.proto == protoTCP && len(p.payload) >= 4 &&
		s.listening(&flowKey{host: p.dst, hostPort: binary.BigEndian.Uint16(p.payload[2:]), version: p.version})
}

// Fragments from the guest (RFC 791 section 3.2, RFC 8200 section 4.5) wait in a
// Reassembler under Stack.mu. What is done with a packet is decided when it is
// whole; a packet of fragments is handled by the HandlePacket that brings the last
// of them.

// handleFragment takes a fragment, and the packet that it completes, if it does.
// The error is the Writer's.
func (s *Stack) handleFragment(p *ipPacket, l *link, t *turn) error {
	// Nothing that would take the whole packet takes one that is not from and to
	// one host.
	if !p.src.isUnicast() || !p.dst.isUnicast() {
		s.count(dropAddress)
		return nil
	}
	if p.fragOffset == 0 {
		// Where a Time Exceeded goes, which is about this fragment.
		s.learn(guestKey{l.ns, p.src, uintptr(p.version)}, l)
	}
	packet, verdict, err := s.reassemble(time.Now(), l.ns, p)
	switch {
	case err != nil:
		return err
	case packet != nil:
		return s.handleReassembled(packet, l, t)
	case verdict != reassembly.Pending:
		s.count(dropFragment)
		return s.sendFragmentProblem(p, verdict, l)
	}
	return nil
}

// reassemble hands a fragment to the Reassembler.
func (s *Stack) reassemble(now time.Time, ns uintptr, p *ipPacket) ([]byte, reassembly.Verdict, error) {
	key, f := p.reassemblyKey(ns), p.reassemblyFragment()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return nil, 0, ErrStackClosed
	}
	evicted := s.fragments.Evicted()
	packet, verdict := s.fragments.Add(now, key, f)
	if n := s.fragments.Evicted() - evicted; n > 0 {
		s.counters[dropFragmentRoom].Add(n)
	}
	s.setFragmentTimer(now)
	return packet, verdict, nil
}

// handleReassembled takes a packet that was put together.
func (s *Stack) handleReassembled(packet []byte, l *link, t *turn) error {
	s.count(packetsReassembled)
	var p ipPacket
	completeHeader(packet)
	err := parseIP(packet, &p)
	switch {
	case err == nil && p.malformed:
		return s.dropHeaders(&p, l)
	case err != nil || p.fragment: // these were fragments of a fragment
		s.count(dropMalformed)
		return nil
	}
	p.fragmented = true
	return s.handleTransport(&p, l, t)
}

// AddRoute says where DialContext sends packets for guests of the namespace
// whose address is in prefix and that have not spoken yet: to w, from gwMAC to
// clientMAC. The longest prefix wins; the same prefix again replaces the route.
func (s *Stack) AddRoute(namespace uintptr, prefix netip.Prefix, clientMAC, gwMAC [6]byte, w Writer) error {
	if !prefix.IsValid() {
		return fmt.Errorf("slirp: AddRoute: invalid prefix")
	}
	if w == nil {
		return fmt.Errorf("slirp: AddRoute: no Writer")
	}
	l := link{guest: clientMAC, gw: gwMAC, w: w, ns: namespace, virtio: s.cfg.VirtioNetHeader}
	r := route{unmapPrefix(prefix).Masked(), l}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed.Load() {
		return ErrStackClosed
	}
	for i, old := range s.routes[namespace] {
		if old.prefix == r.prefix {
			s.routes[namespace][i] = r
			return nil
		}
	}
	s.routes[namespace] = append(s.routes[namespace], r)
	return nil
}

// maxPacket is the length of the longest IP packet that is sent.
func (s *Stack) maxPacket() int {
	if s.cfg.VirtioNetHeader {
		return maxIPLength
	}
	return s.cfg.MTU
}

// slabLen is the memory that frames are cut from, of a size that the allocator
// serves well. Where a frame may be longer than a quarter of it there is more: the
// room for one that turns out short must not be lost.
const slabLen = 64 << 10

// slab is memory that frames are cut from, one behind the other, and those of them
// that are still to be sent. What was cut is not used again, so a Writer may keep it,
// but for Config.ReuseFrames.
type slab struct {
	mem    []byte
	free   []byte // the end of mem
	frames [][]byte
}

// grow makes room for a frame of n bytes at least.
func (b *slab) grow(n int) {
	if len(b.free) < n {
		b.mem = make([]byte, max(slabLen, 4*n))
		b.free = b.mem
	}
}

// cut takes the first n bytes of free, and has them as one more of frames.
func (b *slab) cut(n int) {
	b.frames = append(b.frames, b.free[:n:n])
	b.free = b.free[n:]
}

// sent forgets frames, and has their memory used again if that may be.
func (b *slab) sent(reuse bool) {
	clear(b.frames)
	b.frames = b.frames[:0]
	if reuse {
		b.free = b.mem
	}
}

func (s *Stack) getSlab() *slab {
	if b, ok := s.slabs.Get().(*slab); ok {
		return b
	}
	return new(slab)
}

func (s *Stack) putSlab(b *slab) { s.slabs.Put(b) }

// newFrame returns memory for a frame of n bytes. Nothing says when the Writer has
// had it, so it shares none with frames whose memory is used again.
func (s *Stack) newFrame(n int) []byte {
	if s.cfg.ReuseFrames {
		return make([]byte, n)
	}
	b := s.getSlab()
	b.grow(n)
	f := b.free[:n:n]
	b.free = b.free[n:]
	s.putSlab(b)
	return f
}

// flowNews is what happens to a flow.
type flowNews uint8

const (
	flowOpened flowNews = iota
	flowRefused
	flowClosed
	numFlowNews
)

func (n flowNews) String() string {
	return [...]string{"flow opened", "flow refused", "flow closed"}[n]
}

// The logger is told each news at most ten times a second, after a burst of ten: a
// guest makes as many flows as it likes.
const (
	logInterval = time.Second / 10
	logBurst    = 10
)

// log tells the logger, if there is one, what happened to a flow.
func (s *Stack) log(what flowNews, key *flowKey, args ...any) {
	if s.cfg.Logger != nil && s.logLimits[what].takeEvery(s.now(), int64(logInterval), logBurst) {
		f := key.flow()
		s.cfg.Logger.Debug(what.String(), append(args, "namespace", f.Namespace, "network", f.Network,
			"guest", f.Source, "host", f.Destination)...)
	}
}

// send hands a frame to the Writer and counts one that it loses.
func (s *Stack) send(l *link, frame []byte) error {
	if l.batch != nil {
		b := s.getSlab()
		b.frames = append(b.frames, frame)
		err := s.sendAll(l, b.frames)
		b.sent(false)
		s.putSlab(b)
		return err
	}
	err := l.w(frame)
	if err != nil {
		s.count(dropWriter)
	}
	return err
}

// sendAll is send for several frames. The error is the first one.
func (s *Stack) sendAll(l *link, frames [][]byte) (first error) {
	if l.batch != nil {
		err := l.batch(frames)
		if err != nil {
			s.count(dropWriter)
		}
		return err
	}
	for _, frame := range frames {
		if err := s.send(l, frame); err != nil && first == nil {
			first = err
		}
	}
	return first
}
