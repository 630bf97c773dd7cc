package slirp

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
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
// blocks delays its own flow only. The Writer owns the frame unless
// [Config.ReuseFrames] is set. An error means that this frame was lost.
type Writer func(frame []byte) error

// Flow names the guest and the destination of one flow. Addresses are unmapped:
// ::ffff:192.0.2.1 is 192.0.2.1.
type Flow struct {
	Namespace   uintptr
	Network     string         // "tcp" or "udp"
	Source      netip.AddrPort // the guest's end
	Destination netip.AddrPort // where the guest wants to go
}

// Config holds the settings of a [Stack]. The zero value has the classic
// defaults. A zero field means its default; a negative timeout or limit means
// that there is none.
type Config struct {
	// MTU is the size in bytes of the largest IP packet sent to the guest.
	// Default 1500; at least 1280 (RFC 8200 section 5), at most 65535.
	MTU int

	// SendBuffer and ReceiveBuffer bound the bytes held for one TCP flow in
	// each direction. Default 1 MiB each; at least 4096, at most 1 GiB. Memory
	// is taken as it is needed: an idle flow holds none.
	SendBuffer, ReceiveBuffer int

	// TCPIdleTimeout is how long a TCP flow may be silent before the guest is
	// probed (keep-alive, every 5 s, 3 times); a guest that does not answer
	// loses the flow. Default 2 minutes; negative: never.
	TCPIdleTimeout time.Duration

	// UDPIdleTimeout is how long a UDP flow may be silent before it is
	// forgotten and its host socket is closed. Default 60 s; negative: never.
	UDPIdleTimeout time.Duration

	// DialTimeout bounds one call of Allow and Dial. Default 30 s; negative: none.
	DialTimeout time.Duration

	// Addresses are the stack's own: where ICMP errors come from, and the
	// source of DialContext. At most one of each family counts as such, the
	// first. Default 10.0.2.2 and fd00::2.
	Addresses []netip.Addr

	// MaxTCPFlows bounds the TCP flows of one namespace, those in TIME-WAIT
	// apart. Default 16384; negative: no limit.
	MaxTCPFlows int

	// MaxUDPFlows bounds the UDP flows of one namespace. Default 4096;
	// negative: no limit.
	MaxUDPFlows int

	// MaxPendingDials bounds the TCP flows of one namespace whose host
	// connection is not made yet. A SYN beyond it is dropped; the guest sends
	// it again. Default 256; negative: no limit.
	MaxPendingDials int

	// MaxHalfOpen bounds the connections of one listener whose handshake has
	// not ended. The oldest makes way for a new one. Default 256; negative: no limit.
	MaxHalfOpen int

	// Backlog bounds the connections of one listener that wait for Accept or
	// are on their way there: without a free place a SYN gets no answer.
	// Default 128; negative: no limit.
	Backlog int

	// Allow is asked once for every flow that would leave for the host, before
	// anything is opened for it. Nil lets every flow pass. The kind of error
	// decides what the guest sees: see [ErrProhibited], [ErrDrop] and the table
	// in the package documentation. It is called on a goroutine of its own and
	// may block until ctx ends, which is when the guest gives up, DialTimeout
	// has passed, or the Stack is closed.
	Allow func(ctx context.Context, f Flow) error

	// Dial opens the host's side of a flow; network is "tcp" or "udp", address
	// an IP and port. Nil uses a [net.Dialer]. [FlowFromContext] tells which
	// guest asks. It is called on a goroutine of its own, under the context of
	// Allow, and the Stack closes what it returns.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// ReuseFrames promises that the Writer does not keep a frame after it
	// returns, and makes the Stack use the memory again.
	ReuseFrames bool

	// Logger is told of flows that are opened, refused and closed, at debug
	// level, never per packet. Nil logs nothing.
	Logger *slog.Logger
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
		cfg.Dial = new(net.Dialer).DialContext
	}
	return cfg, cfg.validate()
}

func (cfg *Config) validate() error {
	if cfg.MTU < 1280 || cfg.MTU > 65535 {
		return fmt.Errorf("slirp: Config.MTU: %d is not between 1280 and 65535", cfg.MTU)
	}
	if cfg.SendBuffer < 4096 || cfg.SendBuffer > 1<<30 {
		return fmt.Errorf("slirp: Config.SendBuffer: %d is not between 4096 and 1 GiB", cfg.SendBuffer)
	}
	if cfg.ReceiveBuffer < 4096 || cfg.ReceiveBuffer > 1<<30 {
		return fmt.Errorf("slirp: Config.ReceiveBuffer: %d is not between 4096 and 1 GiB", cfg.ReceiveBuffer)
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
	cfg Config

	mu     sync.RWMutex
	closed bool
}

// New returns a Stack with the default settings. It runs no goroutine until a
// flow needs one.
func New() *Stack {
	s, _ := NewWithConfig(Config{}) // the defaults are valid
	return s
}

// NewWithConfig returns a Stack with the settings of cfg, or an error that names
// the field that is wrong.
func NewWithConfig(cfg Config) (*Stack, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Stack{cfg: cfg}, nil
}

// HandlePacket takes one IPv4 or IPv6 packet, from its IP header on, that the
// guest of the namespace sent. Frames in answer, at once or later, go to w from
// gwMAC to clientMAC. The caller may use packet again when HandlePacket returns;
// it never waits for a host socket, a dial, or another flow. The error is that
// of an unreadable packet, or of w for a frame sent in direct answer.
func (s *Stack) HandlePacket(namespace uintptr, clientMAC [6]byte, gwMAC [6]byte, packet []byte, w Writer) error {
	return nil
}

// Close resets every flow, closes every listener and host socket, wakes every
// waiter, and returns when every goroutine of the Stack has ended. A second
// Close does nothing and returns nil.
func (s *Stack) Close() error { return nil }
