package slirp

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/KarpelesLab/slirp/internal/pktscript"
	"github.com/KarpelesLab/slirp/internal/tcp"
)

// TestScripts runs scripts in the language of packetdrill, each for IPv4 and IPv6
// in virtual time: those of testdata/script, or of the directory SLIRP_SCRIPTS and
// those below it. The stack under test is what packetdrill calls the local host;
// the script plays the guest.
//
//   - Server sockets are Stack.Listen and Accept, connect is DialContext. A script
//     without a listening socket meets a host that refuses, or what
//     --slirp_dial=[DURATION,]ok|ERRNO says.
//   - There is one pair of ports, and another after each listen; a script can give
//     the ports of a segment, as in "< 41001 > 8080 S 0:0(0)" and "> 8080 > 41001 ...".
//   - The MTU is 1500 (--mtu) for IPv4 and 20 more for IPv6: the segment sizes of a
//     script hold for both. --ip_version=ipv4 or ipv6 runs one family only. The --mtu of
//     a script for IPv6 only, and that of an ICMP packet_too_big, are those of IPv6.
//   - SO_RCVBUF, SO_SNDBUF, TCP_MAXSEG (by the MTU), TCP_KEEPIDLE with SO_KEEPALIVE,
//     and the backlog are settings of the Stack, which exists before the script
//     begins; the largest value of a script counts from the start. Without
//     SO_KEEPALIVE idle connections are not probed; --slirp_idle=DURATION has them.
//   - Payload is a pattern by its place in the stream, checked on both sides.
//   - Every frame is checked: lengths, checksums, TTL, DF, padding, no reset in
//     answer to a reset, and a window whose right edge stays. A frame that no line
//     expects fails the script.
//   - Commands in backticks and code in %{ }% only let time pass. A script that
//     needs them to say what it means, a sysctl for example, runs all the same.
//   - What cannot be mapped at all (TCP_INFO, fast open, zero copy, unknown calls)
//     skips the script and says why.
//
// With SLIRP_SCRIPTS_LENIENT=1, for scripts written for other stacks, window values,
// the window scale, PSH, and the order and padding of options do not count, nor
// do frames after the last line.
func TestScripts(t *testing.T) {
	dir := "testdata/script"
	own := true
	if d := os.Getenv("SLIRP_SCRIPTS"); d != "" {
		dir, own = d, false
	}
	lenient := os.Getenv("SLIRP_SCRIPTS_LENIENT") == "1"
	found := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && own && path != dir {
			return filepath.SkipDir // failing: what the stack does not do
		}
		if e.IsDir() || filepath.Ext(path) != ".pkt" {
			return nil
		}
		found++
		name, _ := filepath.Rel(dir, path)
		src, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		t.Run(strings.TrimSuffix(filepath.ToSlash(name), ".pkt"), func(t *testing.T) {
			var skips []string
			for _, f := range scriptFamilies {
				t.Run(f.name, func(t *testing.T) {
					switch out := runScript(t, name, string(src), f, lenient); {
					case out.skip != "":
						skips = append(skips, out.skip)
						t.Skip(out.skip)
					case out.err != nil:
						t.Error(out.err)
					}
				})
			}
			switch all := len(skips) == len(scriptFamilies); {
			case all && own:
				t.Error("a script that is never run: ", skips[0])
			case all: // it has not passed
				t.Skip(skips[0])
			}
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if found == 0 {
		t.Fatalf("no script in %s", dir)
	}
}

// scriptFamily is one IP version to run scripts for.
type scriptFamily struct {
	name        string
	version     uint16
	guest, host netip.Addr
	extra       int // bytes of IP header more than IPv4 has
}

var scriptFamilies = []scriptFamily{
	{"ipv4", 4, netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.168.0.1"), 0},
	{"ipv6", 6, netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fd3d:fa7b:d17d::1"), 20},
}

const (
	scriptGuestPort = 41000
	scriptHostPort  = 8080
	scriptForever   = 30 * 24 * time.Hour // how long a line without a time is waited for
)

// scriptOutcome is what came of a script: it passed if both fields are empty.
type scriptOutcome struct {
	skip string
	err  error
}

// runScript runs one script for one family in a bubble of its own.
func runScript(t *testing.T, name, src string, f scriptFamily, lenient bool) scriptOutcome {
	script, err := pktscript.Parse(src)
	if errors.Is(err, pktscript.ErrUnsupported) {
		return scriptOutcome{skip: fmt.Sprintf("%s: %v", name, err)}
	} else if err != nil {
		return scriptOutcome{err: fmt.Errorf("%s: %w", name, err)}
	}
	return runParsedScript(t, name, script, f, lenient)
}

func runParsedScript(t *testing.T, name string, script *pktscript.Script, f scriptFamily, lenient bool) (out scriptOutcome) {
	r := &scriptRunner{
		name: name, family: f, script: script,
		rules:     pktscript.Rules{Lenient: lenient, TickTolerance: -1},
		tolerance: 4 * time.Millisecond,
		fds:       make(map[int64]*scriptFD),
		flows:     make(map[[2]uint16]*scriptFlow),
		current:   [2]uint16{scriptGuestPort, scriptHostPort},
		cfg:       Config{MTU: 1500, TCPIdleTimeout: -1, Addresses: []netip.Addr{f.host}},
	}
	if skip, err := r.prepare(); skip != "" || err != nil {
		return scriptOutcome{skip, err}
	}
	synctest.Test(t, func(t *testing.T) { out.err = r.run() })
	return out
}

// scriptRunner runs one script.
type scriptRunner struct {
	name      string
	family    scriptFamily
	script    *pktscript.Script
	rules     pktscript.Rules
	tolerance time.Duration
	cfg       Config
	scaledEcr bool
	oneByOne  bool // no packet may come in parts
	dialAfter time.Duration
	dialErr   error
	cleanup   []io.Closer

	stack   *Stack
	start   time.Time
	last    time.Time // when the event before happened
	fds     map[int64]*scriptFD
	flows   map[[2]uint16]*scriptFlow
	current [2]uint16 // guest and host port that injected segments have
	waiting *scriptCall
	over    chan struct{} // closed at the end
	trace   []scriptTrace

	mu     sync.Mutex // guards what the Writer uses
	queue  []scriptFrame
	signal chan struct{}
	reset  bool // a reset is being injected
}

type scriptTrace struct {
	at   time.Duration
	line string
}

// scriptFrame is a frame of the stack that no line of the script has met yet.
type scriptFrame struct {
	at       time.Time
	frame    []byte
	forReset bool
}

// scriptFlow maps the numbers of a script to those on the wire, for one pair of
// ports.
type scriptFlow struct {
	iss      uint32 // added to what the script has for the stack's numbers
	issKnown bool
	ackOfSYN uint32 // what the stack's SYN-ACK has acknowledged, if it sent one
	acked    bool
	irs      uint32 // added to what the script has for the guest's numbers
	base     uint32 // the script's number of the guest's SYN
	settled  bool   // the stack has acknowledged more than a SYN
	synScale bool   // the latest SYN of the guest offers a window scale

	tsKnown bool
	tsBase  uint32            // added to what the script has for the stack's timestamps
	ts      map[uint32]uint32 // timestamps of the script that were met on the wire

	sent                  []byte // what the program has written
	guestScale, hostScale bool
	scale                 uint8
	edge                  uint32 // right edge of the stack's window, as on the wire
	edgeKnown             bool
}

func (r *scriptRunner) flow(ports [2]uint16) *scriptFlow {
	f := r.flows[ports]
	if f == nil {
		// The guest's numbers begin anywhere, and not where they wrap for no script.
		f = &scriptFlow{irs: uint32(len(r.name))*0x9e3779b1 + uint32(r.family.version)*0x7ffff000}
		r.flows[ports] = f
	}
	return f
}

// Settings.

// scriptCalls are the calls that can be mapped.
var scriptCalls = []string{
	"socket", "bind", "listen", "accept", "accept4", "connect", "read", "readv", "recv", "recvfrom", "recvmsg", "write",
	"writev", "send", "sendto", "sendmsg", "shutdown", "close", "fcntl", "poll", "getsockopt", "setsockopt", "ioctl",
}

// scriptNotOurs are socket options that change what TCP does in a way that the
// stack has not.
var scriptNotOurs = []string{
	"TCP_CORK", "TCP_FASTOPEN", "TCP_FASTOPEN_CONNECT", "TCP_FASTOPEN_KEY", "TCP_FASTOPEN_NO_COOKIE", "SO_ZEROCOPY",
	"TCP_MD5SIG", "TCP_REPAIR", "TCP_DEFER_ACCEPT", "TCP_USER_TIMEOUT", "SO_TIMESTAMPING", "TCP_SYNCNT", "TCP_WINDOW_CLAMP",
	"TCP_LINGER2", "TCP_INQ", "TCP_KEEPINTVL", "TCP_KEEPCNT", "SO_RCVTIMEO", "SO_SNDTIMEO", "TCP_TX_DELAY", "SO_MARK",
	"TCP_ULP", "TCP_SAVE_SYN", "TCP_ZEROCOPY_RECEIVE", "SO_MAX_PACING_RATE", "TCP_THIN_LINEAR_TIMEOUTS", "SO_TXREHASH",
}

// prepare reads the options and calls of the script for what the Stack must be
// made with. It returns why the script cannot run, or what is wrong in it.
func (r *scriptRunner) prepare() (skip string, err error) {
	if skip, err = r.readOptions(); skip != "" || err != nil {
		return skip, err
	}
	maxseg, keepalive, keepidle := 0, false, int64(7200)
	for i := range r.script.Events {
		e := &r.script.Events[i]
		c := e.Call
		if p := e.Packet; p != nil && p.ICMP != nil {
			if _, ok := scriptICMP(p.ICMP, r.family.version); !ok {
				return r.at(e, "no such ICMP message over "+r.family.name), nil
			}
			continue
		}
		if c == nil {
			continue
		}
		if what := scriptUnmapped(c); what != "" {
			return r.at(e, what), nil
		}
		if c.Name == "listen" {
			r.cfg.Backlog = max(r.cfg.Backlog, 1+int(c.Args[1].Int))
		}
		if c.Name != "setsockopt" || len(c.Args) < 4 {
			continue
		}
		v := c.Args[3]
		for v.Kind == pktscript.List && len(v.Args) > 0 {
			v = v.Args[0]
		}
		switch name := c.Args[2].Text; name {
		case "SO_RCVBUF", "SO_RCVBUFFORCE":
			r.cfg.ReceiveBuffer = max(r.cfg.ReceiveBuffer, int(v.Int), 4096)
		case "SO_SNDBUF", "SO_SNDBUFFORCE":
			r.cfg.SendBuffer = max(r.cfg.SendBuffer, int(v.Int), 4096)
		case "TCP_MAXSEG":
			maxseg = max(maxseg, int(v.Int))
		case "SO_KEEPALIVE":
			keepalive = keepalive || v.Int != 0
		case "TCP_KEEPIDLE":
			keepidle = v.Int
		}
	}
	if maxseg > 0 {
		r.cfg.MTU = maxseg + 40
	}
	if keepalive {
		r.cfg.TCPIdleTimeout = time.Duration(keepidle) * time.Second
	}
	r.cfg.MTU += r.family.extra
	if _, err := r.cfg.withDefaults(); err != nil {
		return fmt.Sprintf("%s: %v", r.name, err), nil
	}
	return "", nil
}

func (r *scriptRunner) at(e *pktscript.Event, text string) string {
	return fmt.Sprintf("%s:%d: %s", r.name, e.Line, text)
}

func (r *scriptRunner) readOptions() (skip string, err error) {
	for _, o := range r.script.Options {
		var err error
		switch o.Name {
		case "ip_version":
			if v := strings.TrimSuffix(o.Value, "-mapped-ipv6"); v != r.family.name {
				return fmt.Sprintf("%s is for %s", r.name, o.Value), nil
			}
		case "tolerance_usecs":
			r.tolerance, err = time.ParseDuration(o.Value + "us")
		case "mtu":
			r.cfg.MTU, err = strconv.Atoi(o.Value)
		case "tcp_ts_ecr_scaled":
			r.scaledEcr = true
		case "strict_segments":
			r.oneByOne = true
		case "slirp_idle":
			r.cfg.TCPIdleTimeout, err = time.ParseDuration(o.Value)
		case "slirp_dial":
			after, what, ok := strings.Cut(o.Value, ",")
			if !ok {
				after, what = "0", o.Value
			}
			r.dialAfter, err = time.ParseDuration(after)
			if r.dialErr = scriptErrnos[what]; r.dialErr == nil && what != "ok" {
				err = fmt.Errorf("no errno %s", what)
			}
		case "define":
			return fmt.Sprintf("%s:%d: --define", r.name, o.Line), nil
		}
		if err != nil {
			return "", fmt.Errorf("%s:%d: --%s: %w", r.name, o.Line, o.Name, err)
		}
	}
	version, _ := r.script.Option("ip_version")
	if _, ok := r.script.Option("mtu"); ok && version == "ipv6" {
		r.cfg.MTU -= r.family.extra // which prepare adds
	}
	if v, ok := r.script.Option("tcp_ts_tick_usecs"); ok {
		tick, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return "", fmt.Errorf("%s: --tcp_ts_tick_usecs: %w", r.name, err)
		}
		if tick == 1000 || tick > 0 && !r.rules.Lenient {
			r.rules.TickTolerance = int64(r.tolerance/time.Microsecond) / tick
		}
	}
	if _, ok := r.script.Option("slirp_dial"); !ok {
		r.dialErr = syscall.ECONNREFUSED
	}
	return "", nil
}

// scriptUnmapped returns what in a call the stack has nothing for.
func scriptUnmapped(c *pktscript.Call) string {
	if !slices.Contains(scriptCalls, c.Name) {
		return c.Name + " is not supported"
	}
	word := func(i int) string {
		if i < len(c.Args) {
			return c.Args[i].Text
		}
		return ""
	}
	arity := map[string]int{"socket": 3, "listen": 2, "connect": 3, "recv": 4, "send": 4, "sendto": 6, "recvfrom": 6,
		"recvmsg": 3, "sendmsg": 3, "shutdown": 2, "fcntl": 2, "poll": 3, "getsockopt": 5, "setsockopt": 5,
		"read": 3, "write": 3, "readv": 3, "writev": 3, "bind": 3, "accept": 3, "accept4": 4, "close": 1, "ioctl": 3}
	if len(c.Args) < arity[c.Name] {
		return c.Name + " has too few arguments"
	}
	switch c.Name {
	case "socket":
		if words := c.Args[1].Words(); !slices.Contains(words, "SOCK_STREAM") || word(2) == "IPPROTO_MPTCP" {
			return "a socket that is not TCP"
		}
	case "setsockopt":
		v := c.Args[3].String()
		if slices.Contains(scriptNotOurs, word(2)) && v != "[0]" {
			return word(2)
		}
	case "ioctl":
		if word(1) != "SIOCINQ" && word(1) != "FIONREAD" {
			return "ioctl(" + word(1) + ")"
		}
	case "getsockopt":
		if word(2) != "SO_ERROR" {
			return "getsockopt(" + word(2) + ")"
		}
	case "recv", "recvfrom", "send", "sendto", "recvmsg", "sendmsg":
		at := 3
		if strings.HasSuffix(c.Name, "msg") {
			at = 2
			if _, ok := c.Args[1].Field("msg_control"); ok {
				return "control messages"
			}
			if f, ok := c.Args[1].Field("msg_flags"); ok && len(f.Words()) > 0 {
				return f.String()
			}
		}
		for _, w := range c.Args[at].Words() {
			switch w {
			case "MSG_PEEK", "MSG_DONTWAIT", "MSG_WAITALL", "MSG_NOSIGNAL":
			default:
				return w
			}
		}
	}
	return ""
}

// Running.

// scriptFailure is thrown when a script is not met.
type scriptFailure struct{ text string }

func (r *scriptRunner) fail(e *pktscript.Event, format string, args ...any) {
	panic(scriptFailure{fmt.Sprintf("%s:%d (%s): ", r.name, e.Line, r.family.name) + fmt.Sprintf(format, args...)})
}

// run runs the script inside a bubble.
func (r *scriptRunner) run() (err error) {
	r.signal, r.over = make(chan struct{}, 1), make(chan struct{})
	r.start = time.Now()
	r.last = r.start
	r.cfg.Dial = r.dialHost
	s, err := NewWithConfig(r.cfg)
	if err != nil {
		return err
	}
	r.stack = s
	any := netip.PrefixFrom(r.family.guest, 0)
	if err := s.AddRoute(0, any, [6]byte{2}, [6]byte{4}, r.write); err != nil {
		return err
	}
	defer r.close()
	defer func() {
		switch x := recover().(type) {
		case nil:
		case scriptFailure:
			err = errors.New(x.text + "\n" + r.story())
		default:
			panic(x)
		}
	}()
	for i := range r.script.Events {
		r.event(&r.script.Events[i])
	}
	r.finish()
	return nil
}

// close ends everything that lives in the bubble.
func (r *scriptRunner) close() {
	close(r.over)
	for _, fd := range r.fds {
		if fd.cancel != nil {
			fd.cancel()
		}
		if fd.listener != nil {
			fd.listener.Close()
		}
	}
	for _, c := range r.cleanup {
		c.Close()
	}
	r.stack.Close()
	synctest.Wait()
}

// write is the Writer.
func (r *scriptRunner) write(frame []byte) error {
	r.mu.Lock()
	r.queue = append(r.queue, scriptFrame{time.Now(), frame, r.reset})
	r.mu.Unlock()
	select {
	case r.signal <- struct{}{}:
	default:
	}
	return nil
}

// dialHost is Config.Dial.
func (r *scriptRunner) dialHost(ctx context.Context, network, address string) (net.Conn, error) {
	select {
	case <-time.After(r.dialAfter):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if r.dialErr != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", r.dialErr)}
	}
	a, b := net.Pipe()
	r.mu.Lock()
	r.cleanup = append(r.cleanup, b)
	r.mu.Unlock()
	go io.Copy(io.Discard, b)
	return a, nil
}

// window returns when an event is to happen.
func (r *scriptRunner) window(t *pktscript.Time) (from, to time.Time) {
	base := r.start
	switch t.Kind {
	case pktscript.Relative:
		base = r.last
	case pktscript.Anytime:
		return r.last, r.last.Add(scriptForever)
	}
	from = base.Add(t.At)
	if t.Range {
		return from, base.Add(t.End)
	}
	return from, from
}

func (r *scriptRunner) event(e *pktscript.Event) {
	from, to := r.window(&e.Time)
	if e.Packet != nil && !e.Packet.In {
		r.expect(e, from, to)
		return
	}
	if now := time.Now(); now.After(to.Add(r.tolerance)) {
		r.fail(e, "%v is due at %s, and it is %s", e, r.clock(from), r.clock(now))
	}
	time.Sleep(time.Until(from))
	synctest.Wait()
	r.last = time.Now()
	switch {
	case e.Packet != nil:
		r.note(r.last, "%v", e.Packet)
		r.inject(e)
	case e.Call != nil:
		r.call(e)
	}
	synctest.Wait()
}

// finish is what the end of a script asks for.
func (r *scriptRunner) finish() {
	r.await()
	synctest.Wait()
	if r.rules.Lenient || len(r.script.Events) == 0 {
		return
	}
	if f := r.next(time.Now()); f != nil {
		e := &r.script.Events[len(r.script.Events)-1]
		r.fail(e, "after the last line nothing is expected\n\tgot       %s  %v", r.clock(f.at), r.receive(e, f, nil).packet)
	}
}

func (r *scriptRunner) clock(t time.Time) string {
	return fmt.Sprintf("%.6f", t.Sub(r.start).Seconds())
}

func (r *scriptRunner) note(at time.Time, format string, args ...any) {
	r.trace = append(r.trace, scriptTrace{at.Sub(r.start), fmt.Sprintf(format, args...)})
}

// story tells what has happened so far.
func (r *scriptRunner) story() string {
	for f := r.next(r.start); f != nil; f = r.next(r.start) {
		func() {
			defer func() {
				if _, ok := recover().(scriptFailure); ok {
					r.note(f.at, "> a frame that is wrong: %x", f.frame)
				}
			}()
			r.receive(&r.script.Events[0], f, nil)
		}()
	}
	slices.SortStableFunc(r.trace, func(a, b scriptTrace) int { return cmp.Compare(a.at, b.at) })
	var b strings.Builder
	b.WriteString("so far:\n")
	for _, t := range r.trace {
		fmt.Fprintf(&b, "\t%.6f %s\n", t.at.Seconds(), t.line)
	}
	return b.String()
}

// Packets to the stack.

// scriptByte is the byte that both sides send at an offset of their stream.
func scriptByte(off uint32) byte { return byte((off + 1) * 0x9e3779b1 >> 23) }

func scriptBytes(off uint32, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = scriptByte(off + uint32(i))
	}
	return b
}

func (r *scriptRunner) inject(e *pktscript.Event) {
	p := *e.Packet
	ports := r.current
	if p.HasPorts {
		ports = [2]uint16{p.Src, p.Dst}
	}
	f := r.flow(ports)
	var packet []byte
	if p.ICMP != nil {
		packet = r.icmp(p.ICMP, f)
	} else {
		packet = r.segment(&p, ports, f)
	}
	r.mu.Lock()
	r.reset = p.ICMP == nil && p.Flags&pktscript.RST != 0
	r.mu.Unlock()
	err := r.stack.HandlePacket(0, [6]byte{2}, [6]byte{4}, packet, r.write)
	r.mu.Lock()
	r.reset = false
	r.mu.Unlock()
	clear(packet)
	if err != nil {
		r.fail(e, "HandlePacket: %v", err)
	}
}

// segment builds a TCP segment, with the numbers of the wire.
func (r *scriptRunner) segment(p *pktscript.Packet, ports [2]uint16, f *scriptFlow) []byte {
	off := p.Seq - f.base - 1 // of the payload
	if p.Flags&pktscript.SYN != 0 {
		off = 0
		f.synScale = slices.ContainsFunc(p.Options, func(o pktscript.TCPOption) bool { return o.Kind == pktscript.KindScale })
		if !f.acked && !f.settled {
			f.base, f.guestScale = p.Seq, f.synScale
		}
	}
	payload := scriptBytes(off, p.Len)
	p.Seq += f.irs
	if p.Flags&pktscript.ACK != 0 {
		p.Ack += f.iss
	}
	p.Options = slices.Clone(p.Options)
	for i := range p.Options {
		o := &p.Options[i]
		o.Blocks = slices.Clone(o.Blocks)
		for j := range o.Blocks {
			o.Blocks[j].Left += f.iss
			o.Blocks[j].Right += f.iss
		}
		if o.Kind == pktscript.KindTimestamp && !o.Opaque && p.Flags&pktscript.ACK != 0 {
			if v, ok := f.ts[o.Ecr]; ok && !r.scaledEcr {
				o.Ecr = v
			} else {
				o.Ecr += f.tsBase
			}
		}
	}
	b := p.Marshal(ports[0], ports[1], payload)
	return r.packet(protoTCP, b, 16, &p.IP)
}

// packet puts an IP header in front of a transport, whose checksum lies at sum.
func (r *scriptRunner) packet(proto uint8, body []byte, sum int, ip *pktscript.IPInfo) []byte {
	ecn := map[string]byte{"ect1": 1, "ect0": 2, "ce": 3}[ip.ECN]
	if ip.TOS >= 0 {
		ecn |= byte(ip.TOS)
	}
	ttl := byte(64)
	if ip.TTL > 0 {
		ttl = byte(ip.TTL)
	}
	return scriptPacket(r.family.guest, r.family.host, proto, body, sum, ecn, ttl)
}

func scriptPacket(src, dst netip.Addr, proto uint8, body []byte, sum int, tos, ttl byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, 20)
		b[0], b[1], b[6], b[8], b[9] = 0x45, tos, 0x40, ttl, proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(body)))
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[10:], ^scriptSum(b))
	} else {
		b = make([]byte, 40)
		binary.BigEndian.PutUint32(b, 6<<28|uint32(tos)<<20)
		binary.BigEndian.PutUint16(b[4:], uint16(len(body)))
		b[6], b[7] = proto, ttl
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	}
	binary.BigEndian.PutUint16(body[sum:], 0)
	pseudo := scriptPseudo(src, dst, proto, len(body))
	if proto == protoICMP {
		pseudo = nil
	}
	binary.BigEndian.PutUint16(body[sum:], ^scriptSum(append(pseudo, body...)))
	return append(b, body...)
}

// scriptSum is the sum of RFC 1071, two bytes at a time.
func scriptSum(b []byte) uint16 {
	sum := uint32(0)
	for i, c := range b {
		if i%2 == 0 {
			sum += uint32(c) << 8
		} else {
			sum += uint32(c)
		}
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

func scriptPseudo(src, dst netip.Addr, proto uint8, n int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(n))
	return binary.BigEndian.AppendUint32(b, uint32(proto))
}

// icmp builds an ICMP message about a segment that the stack has sent.
func (r *scriptRunner) icmp(m *pktscript.ICMP, f *scriptFlow) []byte {
	n, _ := scriptICMP(m, r.family.version)
	quoted := &pktscript.Packet{Seq: m.Seq + f.iss, Flags: pktscript.ACK, Win: -1, Urg: -1}
	seg := quoted.Marshal(r.current[1], r.current[0], make([]byte, m.Len))
	about := scriptPacket(r.family.host, r.family.guest, protoTCP, seg, 16, 0, 64)
	b := []byte{n[0], n[1], 0, 0, 0, 0, 0, 0}
	if m.MTU >= 0 {
		mtu := m.MTU + r.family.extra
		if m.Type == "packet_too_big" { // what IPv6 calls it
			mtu -= scriptFamilies[1].extra
		}
		binary.BigEndian.PutUint32(b[4:], uint32(max(mtu, 0)))
	}
	b = append(b, about[:min(len(about), 28+r.family.extra)]...)
	return r.packet(icmpProto(r.family.version), b, 2, &pktscript.IPInfo{TOS: -1})
}

// scriptICMPNames has the type and code of ICMP messages, for IPv4 and for IPv6; -1 is
// for what a family does not have. The names that one family has mean the nearest
// message of the other.
var scriptICMPNames = map[string][4]int{
	"unreachable":                         {3, 0, 1, 0},
	"unreachable net_unreachable":         {3, 0, 1, 0},
	"unreachable host_unreachable":        {3, 1, 1, 3},
	"unreachable protocol_unreachable":    {3, 2, 4, 1},
	"unreachable port_unreachable":        {3, 3, 1, 4},
	"unreachable frag_needed":             {3, 4, 2, 0},
	"unreachable source_route_failed":     {3, 5, 1, 5},
	"unreachable net_unknown":             {3, 6, -1, 0},
	"unreachable host_unknown":            {3, 7, -1, 0},
	"unreachable source_host_isolated":    {3, 8, -1, 0},
	"unreachable net_prohibited":          {3, 9, 1, 1},
	"unreachable host_prohibited":         {3, 10, 1, 1},
	"unreachable net_unreachable_for_tos": {3, 11, -1, 0},
	"unreachable packet_filtered":         {3, 13, 1, 1},
	"unreachable no_route":                {3, 0, 1, 0},
	"unreachable admin_prohibited":        {3, 13, 1, 1},
	"unreachable address_unreachable":     {3, 1, 1, 3},
	"packet_too_big":                      {3, 4, 2, 0},
	"source_quench":                       {4, 0, -1, 0},
	"redirect":                            {5, 0, -1, 0},
	"time_exceeded":                       {11, 0, 3, 0},
	"parameter_problem":                   {12, 0, 4, 0},
	"time_exceeded exceeded_hop_limit":    {11, 0, 3, 0},
	"time_exceeded exceeded_frag_time":    {11, 1, 3, 1},
}

func scriptICMP(m *pktscript.ICMP, version uint16) (n [2]byte, ok bool) {
	name := strings.TrimSpace(m.Type + " " + m.Code)
	v, ok := scriptICMPNames[name]
	if version == 6 {
		v[0], v[1] = v[2], v[3]
	}
	if !ok {
		if _, err := fmt.Sscanf(name+" code_0", "type_%d code_%d", &v[0], &v[1]); err != nil {
			return n, false
		}
	}
	return [2]byte{byte(v[0]), byte(v[1])}, v[0] >= 0
}

// Packets from the stack.

// scriptReceived is a frame of the stack with the numbers of the script.
type scriptReceived struct {
	at     time.Time
	packet *pktscript.Packet
}

// next takes the next frame, and waits for it until the time. It returns nil if
// none has come.
func (r *scriptRunner) next(until time.Time) *scriptFrame {
	for {
		r.mu.Lock()
		if len(r.queue) > 0 {
			f := r.queue[0]
			r.queue = r.queue[1:]
			r.mu.Unlock()
			return &f
		}
		r.mu.Unlock()
		wait := time.Until(until)
		if wait < 0 {
			return nil
		}
		// A nanosecond more: what happens at this very time is meant too.
		timer := time.NewTimer(wait + 1)
		select {
		case <-r.signal:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// expect waits for the packet of an event, which may come as several segments.
func (r *scriptRunner) expect(e *pktscript.Event, from, to time.Time) {
	want := e.Packet
	f := r.next(to.Add(r.tolerance))
	for f != nil && r.rules.Lenient && r.ofAnother(f, want) {
		f = r.next(to.Add(r.tolerance))
	}
	if f == nil {
		r.fail(e, "no packet\n\texpected  %s  %v", r.expected(from, to), want)
	}
	got := r.receive(e, f, want)
	first := got.packet.Len
	late := got.at
	for !r.oneByOne && want.ICMP == nil && got.packet.Len < want.Len && got.packet.Seq == want.Seq {
		more := r.next(to.Add(r.tolerance))
		if more == nil {
			break
		}
		part := r.receive(e, more, want)
		if !got.packet.Continues(part.packet, max(first, 1)) {
			r.fail(e, "a part is missing\n\texpected  %s  %v\n\tgot       %s  %v\n\tthen      %s  %v", r.expected(from, to), want,
				r.clock(got.at), got.packet, r.clock(part.at), part.packet)
		}
		whole := *part.packet
		whole.Seq, whole.Len = got.packet.Seq, got.packet.Len+part.packet.Len
		whole.Options = got.packet.Options
		got.packet, late = &whole, part.at
	}
	r.sameName(want, got.packet)
	diff := want.Diff(got.packet, r.rules)
	if got.at.Before(from.Add(-r.tolerance)) || late.After(to.Add(r.tolerance)) {
		diff = append(diff, "time")
	}
	if diff != nil {
		r.fail(e, "%s\n\texpected  %s  %v\n\tgot       %s  %v", strings.Join(diff, "; "), r.expected(from, to), want,
			r.clock(got.at), got.packet)
	}
	r.last = got.at
}

// ofAnother reports whether a frame belongs to an earlier connection, which nobody
// looks at any more.
func (r *scriptRunner) ofAnother(f *scriptFrame, want *pktscript.Packet) bool {
	proto, b, _, err := r.checkIP(f.frame)
	if err != nil || proto != protoTCP || want.HasPorts || want.ICMP != nil || len(b) < 14 || b[13]&2 != 0 {
		return false
	}
	return [2]uint16{binary.BigEndian.Uint16(b[2:]), binary.BigEndian.Uint16(b[0:])} != r.current
}

// sameName gives an ICMP message the name that the script has for it.
func (r *scriptRunner) sameName(want, got *pktscript.Packet) {
	if want.ICMP == nil || got.ICMP == nil {
		return
	}
	w, _ := scriptICMP(want.ICMP, r.family.version)
	if g, _ := scriptICMP(got.ICMP, r.family.version); g == w {
		got.ICMP.Type, got.ICMP.Code = want.ICMP.Type, want.ICMP.Code
	}
}

func (r *scriptRunner) expected(from, to time.Time) string {
	switch {
	case to.Sub(from) == scriptForever:
		return "*"
	case to.After(from):
		return r.clock(from) + "~" + r.clock(to)
	}
	return r.clock(from)
}

// receive checks a frame, and returns it with the numbers of the script. What is
// expected, if anything is, says how the numbers of a new connection are meant.
func (r *scriptRunner) receive(e *pktscript.Event, f *scriptFrame, want *pktscript.Packet) scriptReceived {
	p, err := r.parseFrame(f, want)
	if p == nil {
		r.fail(e, "%v\n\tframe     %s  %x", err, r.clock(f.at), f.frame)
	}
	r.note(f.at, "%v", p)
	if err != nil {
		r.fail(e, "%v\n\tgot       %s  %v", err, r.clock(f.at), p)
	}
	return scriptReceived{f.at, p}
}

func (r *scriptRunner) parseFrame(f *scriptFrame, want *pktscript.Packet) (*pktscript.Packet, error) {
	proto, body, ip, err := r.checkIP(f.frame)
	if err != nil {
		return nil, err
	}
	if proto != protoTCP {
		return r.parseICMP(body)
	}
	p, src, dst, payload, err := pktscript.Unmarshal(body)
	if err != nil {
		return nil, err
	}
	if want != nil {
		p.IP = want.IP
		if ip.TOS != 0 || want.IP.TOS >= 0 || want.IP.ECN != "" {
			p.IP.TOS, p.IP.ECN = ip.TOS, ""
		}
		if want.IP.TTL > 0 {
			p.IP.TTL = ip.TTL
		}
	}
	ports := [2]uint16{dst, src}
	if p.Src, p.Dst = src, dst; want != nil && want.HasPorts || ports != r.current {
		p.HasPorts = true
	}
	if p.Flags&(pktscript.SYN|pktscript.ACK) == pktscript.SYN {
		r.current = ports // of a connection that the program has begun
	}
	fl := r.flow(ports)
	edgeErr := fl.checkEdge(p)
	fl.toScript(p, want)
	switch {
	case f.forReset && p.Flags&pktscript.RST != 0:
		return p, errors.New("a reset in answer to a reset")
	case edgeErr != nil:
		return p, edgeErr
	}
	return p, fl.checkPayload(p, payload)
}

// checkIP checks the headers of Ethernet and IP, and the checksum of the
// transport.
func (r *scriptRunner) checkIP(frame []byte) (proto uint8, body []byte, ip pktscript.IPInfo, err error) {
	bad := func(format string, args ...any) (uint8, []byte, pktscript.IPInfo, error) {
		return 0, nil, ip, fmt.Errorf(format, args...)
	}
	hl, wantType := 14+20+r.family.extra, uint16(0x0800)
	if r.family.version == 6 {
		wantType = 0x86dd
	}
	if len(frame) < hl {
		return bad("a frame of %d bytes", len(frame))
	}
	if frame[0] != 2 || frame[6] != 4 || binary.BigEndian.Uint16(frame[12:]) != wantType {
		return bad("Ethernet header %x", frame[:14])
	}
	b := frame[14:]
	if len(b) > r.cfg.MTU {
		return bad("a packet of %d bytes on a link of %d", len(b), r.cfg.MTU)
	}
	var src, dst netip.Addr
	var tos, ttl byte
	if r.family.version == 6 {
		if b[0]>>4 != 6 || int(binary.BigEndian.Uint16(b[4:])) != len(b)-40 {
			return bad("IPv6 header %x in a packet of %d bytes", b[:40], len(b))
		}
		tos, proto, ttl = b[0]<<4|b[1]>>4, b[6], b[7]
		src, _ = netip.AddrFromSlice(b[8:24])
		dst, _ = netip.AddrFromSlice(b[24:40])
		body = b[40:]
	} else {
		if b[0] != 0x45 || int(binary.BigEndian.Uint16(b[2:])) != len(b) || scriptSum(b[:20]) != 0xffff {
			return bad("IPv4 header %x in a packet of %d bytes", b[:20], len(b))
		}
		tos, proto, ttl = b[1], b[9], b[8]
		src, _ = netip.AddrFromSlice(b[12:16])
		dst, _ = netip.AddrFromSlice(b[16:20])
		body = b[20:]
		if flags := binary.BigEndian.Uint16(b[6:]); flags != 0x4000 && proto == protoTCP {
			return bad("fragment field %#x", flags)
		}
	}
	pseudo := scriptPseudo(src, dst, proto, len(body))
	switch {
	case ttl != 64:
		return bad("TTL %d", ttl)
	case src != r.family.host || dst != r.family.guest:
		return bad("a packet from %v to %v", src, dst)
	case proto == protoICMP:
		pseudo = nil
	case proto != protoTCP && proto != protoICMPv6:
		return bad("protocol %d", proto)
	}
	if scriptSum(append(pseudo, body...)) != 0xffff {
		return bad("wrong checksum")
	}
	return proto, body, pktscript.IPInfo{TOS: int(tos), TTL: int(ttl)}, nil
}

func (r *scriptRunner) parseICMP(b []byte) (*pktscript.Packet, error) {
	quote := 8 + 20 + r.family.extra
	if len(b) < quote+8 {
		return nil, fmt.Errorf("an ICMP message of %d bytes", len(b))
	}
	m := &pktscript.ICMP{Type: fmt.Sprintf("type_%d", b[0]), Code: fmt.Sprintf("code_%d", b[1]), MTU: -1, HasEcho: true}
	// Of several names for one message the first is as good as any.
	names := make([]string, 0, len(scriptICMPNames))
	for name := range scriptICMPNames {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		typ, code, _ := strings.Cut(name, " ")
		n, ok := scriptICMP(&pktscript.ICMP{Type: typ, Code: code}, r.family.version)
		if ok && n == [2]byte{b[0], b[1]} {
			m.Type, m.Code = typ, code
			break
		}
	}
	ports := [2]uint16{binary.BigEndian.Uint16(b[quote:]), binary.BigEndian.Uint16(b[quote+2:])}
	m.Seq = binary.BigEndian.Uint32(b[quote+4:]) - r.flow(ports).irs
	return &pktscript.Packet{ICMP: m, IP: pktscript.IPInfo{TOS: -1}}, nil
}

// toScript changes the numbers of p from those of the wire to those of the script.
func (f *scriptFlow) toScript(p, want *pktscript.Packet) {
	if p.Flags&pktscript.SYN != 0 {
		again := f.issKnown && (p.Flags&pktscript.ACK == 0 || !f.acked || p.Ack-f.irs == f.ackOfSYN)
		if !again {
			*f = scriptFlow{irs: f.irs, base: f.base, synScale: f.synScale, guestScale: f.synScale, issKnown: true, iss: p.Seq}
			if want != nil && want.Flags&pktscript.SYN != 0 {
				f.iss -= want.Seq
			}
		}
		if p.Flags&pktscript.ACK != 0 {
			f.acked, f.ackOfSYN = true, p.Ack-f.irs
			f.base = f.ackOfSYN - 1
		}
		f.hostScale = false
		for _, o := range p.Options {
			if o.Kind == pktscript.KindScale && !o.Opaque {
				f.hostScale, f.scale = true, o.Scale
			}
		}
	}
	if p.Seq != 0 || p.Flags&pktscript.RST == 0 { // a reset for nothing has number 0
		p.Seq -= f.iss
	}
	if p.Flags&pktscript.ACK != 0 {
		p.Ack -= f.irs
	}
	f.settled = f.settled || p.Flags&(pktscript.SYN|pktscript.RST|pktscript.ACK) == pktscript.ACK
	for i := range p.Options {
		o := &p.Options[i]
		for j := range o.Blocks {
			o.Blocks[j].Left -= f.irs
			o.Blocks[j].Right -= f.irs
		}
		if o.Kind == pktscript.KindTimestamp && !o.Opaque {
			f.mapTimestamp(o, want)
		}
	}
}

func (f *scriptFlow) mapTimestamp(o *pktscript.TCPOption, want *pktscript.Packet) {
	expected, ok := uint32(0), false
	if want != nil {
		for _, w := range want.Options {
			if w.Kind == pktscript.KindTimestamp {
				expected, ok = w.Val, true
			}
		}
	}
	if !f.tsKnown {
		f.tsKnown, f.tsBase, f.ts = true, o.Val-expected, make(map[uint32]uint32)
	}
	if ok {
		f.ts[expected] = o.Val
	}
	o.Val -= f.tsBase
}

// checkEdge checks that the right edge of the stack's window has not moved left.
func (f *scriptFlow) checkEdge(p *pktscript.Packet) error {
	if p.Flags&pktscript.ACK == 0 || p.Flags&pktscript.RST != 0 {
		return nil
	}
	scale := uint8(0)
	if f.guestScale && f.hostScale && p.Flags&pktscript.SYN == 0 {
		scale = f.scale
	}
	edge := p.Ack + uint32(p.Win)<<scale
	retracted := f.edgeKnown && p.Flags&pktscript.SYN == 0 && int32(edge-f.edge) < 0
	from := f.edge
	f.edge, f.edgeKnown = edge, true
	if retracted {
		return fmt.Errorf("the right edge of the window moves left by %d", from-edge)
	}
	return nil
}

// checkPayload checks the bytes of a segment against what the program has written.
func (f *scriptFlow) checkPayload(p *pktscript.Packet, payload []byte) error {
	if len(payload) == 0 {
		return nil
	}
	off := int64(p.Seq - 1)
	if p.Flags&pktscript.SYN != 0 {
		off = 0
	}
	if off+int64(len(payload)) > int64(len(f.sent)) {
		return fmt.Errorf("payload [%d:%d] of %d bytes that were written", off, off+int64(len(payload)), len(f.sent))
	}
	if string(payload) != string(f.sent[off:off+int64(len(payload))]) {
		return errors.New("payload that was not written")
	}
	return nil
}

// Socket calls.

// scriptFD is a socket of the script.
type scriptFD struct {
	listener  net.Listener
	accepting *scriptCall // an Accept that has not ended
	conn      *VirtualConn
	flow      *scriptFlow
	nonblock  bool
	linger    int // -1: not set
	port      uint16
	cancel    context.CancelFunc // of a connect
	dialing   bool
	dialed    chan scriptDialed // how the connect has ended
	connected bool              // and a call has said so
	soError   string
	peeked    []byte // was read for MSG_PEEK
	readOff   uint32
}

type scriptDialed struct {
	conn net.Conn
	err  error
}

// settle notes that a connect has ended, if it has.
func (fd *scriptFD) settle() {
	select {
	case d := <-fd.dialed:
		fd.dialing = false
		if d.err != nil {
			fd.soError = scriptErrno(d.err)
		} else {
			fd.conn = d.conn.(*VirtualConn)
		}
	default:
	}
}

// scriptCall is a call that is under way.
type scriptCall struct {
	event *pktscript.Event
	until time.Time // when it is to return
	done  chan struct{}
	at    time.Time
	val   int64
	errno string
	then  func() // after it has ended, on the runner's goroutine
}

// start begins what a call does on a goroutine of its own.
func (r *scriptRunner) startCall(e *pktscript.Event, do func() (int64, string)) *scriptCall {
	c := &scriptCall{event: e, done: make(chan struct{})}
	go func() {
		c.val, c.errno = do()
		c.at = time.Now()
		close(c.done)
	}()
	synctest.Wait()
	return c
}

func (c *scriptCall) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// await waits for the blocking call that is under way.
func (r *scriptRunner) await() {
	c := r.waiting
	if c == nil {
		return
	}
	r.waiting = nil
	select {
	case <-c.done:
	case <-time.After(max(0, time.Until(c.until.Add(r.tolerance))) + 1):
		r.fail(c.event, "%v has not returned at %s", c.event.Call, r.clock(time.Now()))
	}
	if late := c.at.Sub(c.until); max(late, -late) > r.tolerance {
		r.fail(c.event, "%v is to return at %s, and returned at %s", c.event.Call, r.clock(c.until), r.clock(c.at))
	}
	if c.then != nil {
		c.then()
	}
	r.result(c.event, c.val, c.errno)
	synctest.Wait()
}

// result compares what a call has returned.
func (r *scriptRunner) result(e *pktscript.Event, val int64, errno string) {
	c := e.Call
	got := strings.TrimSpace(fmt.Sprintf("%d %s", val, errno))
	r.note(time.Now(), "%s(%s) = %s", c.Name, strings.Join(scriptArgs(c.Args), ", "), got)
	if c.Result.Kind == pktscript.Ellipsis {
		return
	}
	wantErrno := c.Errno
	if wantErrno == "EWOULDBLOCK" {
		wantErrno = "EAGAIN"
	}
	if c.Result.Kind != pktscript.Int || c.Result.Int != val || wantErrno != errno {
		r.fail(e, "%v returned %s", c, got)
	}
}

func scriptArgs(args []pktscript.Expr) []string {
	s := make([]string, len(args))
	for i, a := range args {
		s[i] = a.String()
	}
	return s
}

// call makes a socket call.
func (r *scriptRunner) call(e *pktscript.Event) {
	r.await()
	c := e.Call
	var fd *scriptFD
	if c.Name != "socket" && c.Name != "poll" {
		if fd = r.fds[c.Args[0].Int]; fd == nil || c.Args[0].Kind != pktscript.Int {
			r.result(e, -1, "EBADF")
			return
		}
	}
	flags := c.Args[len(c.Args)-1].Words()
	switch c.Name {
	case "socket":
		r.fds[c.Result.Int] = &scriptFD{nonblock: slices.Contains(c.Args[1].Words(), "SOCK_NONBLOCK"), linger: -1}
		r.result(e, c.Result.Int, "")
	case "bind":
		if p, ok := c.Args[1].Field("sin_port"); ok && len(p.Args) == 1 {
			fd.port = uint16(p.Args[0].Int)
		}
		r.result(e, 0, "")
	case "listen":
		r.listen(e, fd)
	case "accept", "accept4":
		r.accept(e, fd, c.Name == "accept4" && slices.Contains(flags, "SOCK_NONBLOCK"))
	case "connect":
		r.connect(e, fd)
	case "read":
		r.read(e, fd, c.Args[2].Int, nil)
	case "recv", "recvfrom":
		r.read(e, fd, c.Args[2].Int, c.Args[3].Words())
	case "readv":
		r.read(e, fd, scriptIovLen(c.Args[1]), nil)
	case "recvmsg":
		iov, _ := c.Args[1].Field("msg_iov")
		r.read(e, fd, scriptIovLen(iov), flags)
	case "write":
		r.writeCall(e, fd, c.Args[1], c.Args[2].Int, nil)
	case "send", "sendto":
		r.writeCall(e, fd, c.Args[1], c.Args[2].Int, c.Args[3].Words())
	case "writev":
		r.writeCall(e, fd, pktscript.Expr{}, scriptIovLen(c.Args[1]), nil)
	case "sendmsg":
		iov, _ := c.Args[1].Field("msg_iov")
		r.writeCall(e, fd, pktscript.Expr{}, scriptIovLen(iov), flags)
	case "shutdown":
		r.shutdown(e, fd)
	case "close":
		r.closeCall(e, fd)
	case "fcntl":
		r.fcntl(e, fd)
	case "poll":
		r.poll(e)
	case "setsockopt":
		r.setsockopt(e, fd)
	case "getsockopt":
		r.getsockopt(e, fd)
	case "ioctl":
		r.ioctl(e, fd)
	}
}

// scriptIovLen returns the bytes of [{..., n}, {..., m}].
func scriptIovLen(iov pktscript.Expr) (n int64) {
	for _, v := range iov.Args {
		if len(v.Args) == 2 {
			n += v.Args[1].Int
		}
	}
	return n
}

// finishCall ends a call: at once, later if the script says that it blocks, or by
// abort, if it would block where it must not.
func (r *scriptRunner) finishCall(c *scriptCall, nonblock bool, abort func()) {
	e := c.event
	if e.Time.Blocks {
		base := r.start
		if e.Time.Kind == pktscript.Relative {
			base = r.last.Add(-e.Time.At)
		}
		c.until = base.Add(e.Time.Returns)
		r.waiting = c
		return
	}
	if !c.ended() {
		if !nonblock {
			defer r.fail(e, "%v blocks", e.Call)
		}
		abort()
		<-c.done
	}
	if c.then != nil {
		c.then()
	}
	r.result(e, c.val, c.errno)
}

func (r *scriptRunner) listen(e *pktscript.Event, fd *scriptFD) {
	fd.port = cmp.Or(fd.port, scriptHostPort)
	l, err := r.stack.Listen("tcp", netip.AddrPortFrom(r.family.host, fd.port).String())
	if err != nil {
		r.result(e, -1, "EADDRINUSE")
		return
	}
	fd.listener = l
	r.current = [2]uint16{scriptGuestPort, fd.port}
	for r.flows[r.current] != nil {
		r.current[0]++ // another connection
	}
	r.result(e, 0, "")
}

func (r *scriptRunner) accept(e *pktscript.Event, fd *scriptFD, nonblock bool) {
	if fd.listener == nil {
		r.result(e, -1, "EINVAL")
		return
	}
	// An Accept cannot be called off: one that has found nothing serves the next
	// call.
	var conn net.Conn
	c := fd.accepting
	if c == nil {
		c = r.startCall(e, func() (int64, string) {
			a, err := fd.listener.Accept()
			if err != nil {
				return -1, scriptErrno(err)
			}
			conn = a
			return 0, ""
		})
		c.then = func() {
			if fd.accepting = nil; c.val < 0 {
				return
			}
			c.val = c.event.Call.Result.Int
			vc := conn.(*VirtualConn)
			nfd := &scriptFD{conn: vc, flow: r.flowOf(vc), nonblock: nonblock, linger: fd.linger}
			if fd.linger >= 0 {
				vc.SetLinger(fd.linger)
			}
			r.fds[c.val] = nfd
		}
	}
	fd.accepting, c.event = c, e
	switch {
	case e.Time.Blocks:
		r.finishCall(c, false, nil)
	case c.ended():
		c.then()
		r.result(e, c.val, c.errno)
	case !fd.nonblock:
		r.fail(e, "%v blocks", e.Call)
	default:
		r.result(e, -1, "EAGAIN")
	}
}

func (r *scriptRunner) flowOf(c *VirtualConn) *scriptFlow {
	guest, host := c.RemoteAddr().(*net.TCPAddr), c.LocalAddr().(*net.TCPAddr)
	return r.flow([2]uint16{uint16(guest.Port), uint16(host.Port)})
}

func (r *scriptRunner) connect(e *pktscript.Event, fd *scriptFD) {
	fd.settle()
	switch {
	case fd.dialing:
		r.result(e, -1, "EALREADY")
		return
	case fd.conn != nil && fd.connected:
		r.result(e, -1, "EISCONN")
		return
	case fd.conn != nil:
		fd.connected = true
		r.result(e, 0, "")
		return
	}
	port := uint16(scriptHostPort)
	if p, ok := e.Call.Args[1].Field("sin_port"); ok && len(p.Args) == 1 {
		port = uint16(p.Args[0].Int)
	}
	var ctx context.Context
	ctx, fd.cancel = context.WithCancel(context.Background())
	fd.dialing, fd.dialed = true, make(chan scriptDialed, 1)
	c := r.startCall(e, func() (int64, string) {
		conn, err := r.stack.DialContext(ctx, "tcp", netip.AddrPortFrom(r.family.guest, port).String())
		fd.dialed <- scriptDialed{conn, err}
		if err != nil {
			return -1, scriptErrno(err)
		}
		return 0, ""
	})
	c.then = func() {
		fd.settle()
		fd.connected = fd.conn != nil
		fd.soError = ""
	}
	if fd.nonblock && !e.Time.Blocks && !c.ended() {
		r.result(e, -1, "EINPROGRESS")
		return
	}
	r.finishCall(c, false, fd.cancel)
}

// ready returns why a socket cannot move data, or "".
func (fd *scriptFD) ready(r *scriptRunner) string {
	fd.settle()
	switch {
	case fd.conn != nil:
		if fd.flow == nil {
			fd.flow = r.flowOf(fd.conn)
			if fd.linger >= 0 {
				fd.conn.SetLinger(fd.linger)
			}
		}
		return ""
	case fd.dialing:
		return "EAGAIN"
	case fd.soError != "":
		errno := fd.soError
		fd.soError = ""
		return errno
	}
	return "ENOTCONN"
}

func (r *scriptRunner) read(e *pktscript.Event, fd *scriptFD, n int64, flags []string) {
	if errno := fd.ready(r); errno != "" {
		r.result(e, -1, errno)
		return
	}
	peek := slices.Contains(flags, "MSG_PEEK")
	all := slices.Contains(flags, "MSG_WAITALL")
	nonblock := fd.nonblock || slices.Contains(flags, "MSG_DONTWAIT")
	var data []byte
	c := r.startCall(e, func() (int64, string) {
		data = append(data, fd.peeked[:min(int64(len(fd.peeked)), n)]...)
		for len(data) == 0 || int64(len(data)) < n && (all || fd.state().buffered > 0) {
			b := make([]byte, n-int64(len(data)))
			m, err := fd.conn.Read(b)
			data = append(data, b[:m]...)
			if err != nil && len(data) == 0 {
				return -1 + int64(len(data)), scriptErrno(err)
			}
			if err != nil || n == 0 {
				break
			}
		}
		return int64(len(data)), ""
	})
	c.then = func() {
		if c.errno == "EOF" {
			c.val, c.errno = 0, ""
		}
		if string(data) != string(scriptBytes(fd.readOff, len(data))) {
			r.fail(e, "%v has read other bytes than the guest has sent", e.Call)
		}
		if peek {
			if len(data) > len(fd.peeked) {
				fd.peeked = data
			}
			return
		}
		fd.peeked = fd.peeked[min(len(data), len(fd.peeked)):]
		fd.readOff += uint32(len(data))
	}
	r.finishCall(c, nonblock, func() {
		fd.conn.SetReadDeadline(time.Now())
		<-c.done
		fd.conn.SetReadDeadline(time.Time{})
	})
}

func (r *scriptRunner) writeCall(e *pktscript.Event, fd *scriptFD, data pktscript.Expr, n int64, flags []string) {
	if errno := fd.ready(r); errno != "" {
		if errno == "ENOTCONN" {
			errno = "EPIPE"
		}
		r.result(e, -1, errno)
		return
	}
	f := fd.flow
	b := scriptBytes(uint32(len(f.sent)), int(n))
	if data.Kind == pktscript.String {
		copy(b, data.Text)
	}
	before := len(f.sent)
	f.sent = append(f.sent, b...)
	c := r.startCall(e, func() (int64, string) {
		m, err := fd.conn.Write(b)
		if err != nil && m == 0 {
			return -1, scriptErrno(err)
		}
		return int64(m), ""
	})
	c.then = func() { f.sent = f.sent[:min(before+int(max(c.val, 0)), len(f.sent))] }
	r.finishCall(c, fd.nonblock || slices.Contains(flags, "MSG_DONTWAIT"), func() {
		fd.conn.SetWriteDeadline(time.Now())
		<-c.done
		fd.conn.SetWriteDeadline(time.Time{})
	})
}

func (r *scriptRunner) shutdown(e *pktscript.Event, fd *scriptFD) {
	if errno := fd.ready(r); errno != "" {
		r.result(e, -1, "ENOTCONN")
		return
	}
	var err error
	how := e.Call.Args[1].Text
	if how == "SHUT_WR" || how == "SHUT_RDWR" {
		err = fd.conn.CloseWrite()
	}
	if how == "SHUT_RD" || how == "SHUT_RDWR" {
		err = errors.Join(err, fd.conn.CloseRead())
	}
	if err != nil {
		r.result(e, -1, scriptErrno(err))
		return
	}
	r.result(e, 0, "")
}

func (r *scriptRunner) closeCall(e *pktscript.Event, fd *scriptFD) {
	delete(r.fds, e.Call.Args[0].Int)
	fd.ready(r)
	if fd.cancel != nil {
		fd.cancel()
	}
	if fd.listener != nil {
		fd.listener.Close()
	}
	if fd.conn != nil {
		if len(fd.peeked) > 0 {
			fd.conn.SetLinger(0) // bytes that nobody has read
		}
		if err := fd.conn.Close(); err != nil {
			r.result(e, -1, scriptErrno(err))
			return
		}
	}
	r.result(e, 0, "")
}

func (r *scriptRunner) fcntl(e *pktscript.Event, fd *scriptFD) {
	c := e.Call
	const nonblock = 0x800
	switch c.Args[1].Text {
	case "F_SETFL":
		if len(c.Args) > 2 {
			fd.nonblock = slices.Contains(c.Args[2].Words(), "O_NONBLOCK") || c.Args[2].Int&nonblock != 0
		}
		r.result(e, 0, "")
	case "F_GETFL":
		v := int64(2)
		if fd.nonblock {
			v |= nonblock
		}
		r.result(e, v, "")
	default:
		r.result(e, 0, "")
	}
}

func (r *scriptRunner) setsockopt(e *pktscript.Event, fd *scriptFD) {
	if v := e.Call.Args[3]; e.Call.Args[2].Text == "SO_LINGER" {
		if v.Kind == pktscript.List && len(v.Args) == 1 {
			v = v.Args[0]
		}
		on, _ := v.Field("onoff")
		sec, _ := v.Field("linger")
		if fd.linger = -1; on.Int != 0 {
			fd.linger = int(sec.Int)
		}
		if fd.conn != nil {
			fd.conn.SetLinger(fd.linger)
		}
	}
	r.result(e, 0, "")
}

func (r *scriptRunner) getsockopt(e *pktscript.Event, fd *scriptFD) {
	fd.settle()
	got := fd.soError
	fd.soError = ""
	if fd.conn != nil && got == "" {
		got = fd.state().err
	}
	v := e.Call.Args[3]
	for v.Kind == pktscript.List && len(v.Args) == 1 {
		v = v.Args[0]
	}
	want := v.Text
	if v.Kind == pktscript.Int && v.Int != 0 {
		r.fail(e, "an errno by number")
	}
	if v.Kind != pktscript.Ellipsis && want != got {
		r.fail(e, "%v got [%s]", e.Call, cmp.Or(got, "0"))
	}
	r.result(e, 0, "")
}

// ioctl is SIOCINQ: how many bytes can be read.
func (r *scriptRunner) ioctl(e *pktscript.Event, fd *scriptFD) {
	if errno := fd.ready(r); errno != "" {
		r.result(e, -1, "EINVAL")
		return
	}
	got := int64(fd.state().buffered + len(fd.peeked))
	if v := e.Call.Args[2]; v.Kind == pktscript.List && len(v.Args) == 1 && v.Args[0].Int != got {
		r.fail(e, "%v got [%d]", e.Call, got)
	}
	r.result(e, 0, "")
}

// scriptState is what poll, SO_ERROR and SIOCINQ ask about a connection.
type scriptState struct {
	buffered                     int
	readable, writable, eof, hup bool
	err                          string
}

// state looks into the connection: a net.Conn has no way to ask.
func (fd *scriptFD) state() scriptState {
	f := fd.conn.flow
	f.mu.Lock()
	defer f.mu.Unlock()
	s := scriptState{eof: f.tcb.EOF(), hup: f.tcb.State() == tcp.Closed}
	if s.hup && f.tcb.Reason() != tcp.None && f.tcb.Reason() != tcp.Aborted {
		s.err = scriptErrno(reasonError("", f.tcb.Reason()))
	}
	s.buffered = f.tcb.Buffered()
	s.readable = s.buffered > 0 || s.eof || s.hup || len(fd.peeked) > 0
	s.writable = s.hup || fd.conn.writeClosed || f.tcb.Free() > 0
	s.hup = s.hup || s.eof && fd.conn.writeClosed
	return s
}

// poll looks every millisecond; nobody is told when a connection gets ready.
func (r *scriptRunner) poll(e *pktscript.Event) {
	fds := e.Call.Args[0].Args
	timeout := time.Duration(e.Call.Args[2].Int) * time.Millisecond
	revents := make([]string, len(fds))
	c := r.startCall(e, func() (n int64, errno string) {
		for waited := time.Duration(0); ; waited += time.Millisecond {
			for i, p := range fds {
				if revents[i] = r.revents(p); revents[i] != "" {
					n++
				}
			}
			if n > 0 || timeout >= 0 && waited >= timeout {
				return n, ""
			}
			select {
			case <-time.After(time.Millisecond):
			case <-r.over:
				return 0, ""
			}
		}
	})
	c.then = func() {
		for i, p := range fds {
			want := ""
			if w, ok := p.Field("revents"); ok {
				words := w.Words()
				slices.Sort(words)
				want = strings.Join(words, "|")
			}
			if want != revents[i] {
				r.fail(e, "%v got revents %q", e.Call, revents[i])
			}
		}
	}
	r.finishCall(c, false, func() {})
}

// revents returns the events of a pollfd that have come.
func (r *scriptRunner) revents(p pktscript.Expr) string {
	num, _ := p.Field("fd")
	asked, _ := p.Field("events")
	fd := r.fds[num.Int]
	if fd == nil {
		return "POLLNVAL"
	}
	fd.settle()
	got := map[string]bool{}
	switch {
	case fd.listener != nil:
		l := fd.listener.(*Listener)
		r.stack.mu.Lock()
		got["POLLIN"] = len(l.queue) > 0 || fd.accepting != nil && fd.accepting.ended()
		r.stack.mu.Unlock()
	case fd.conn != nil:
		s := fd.state()
		got["POLLIN"], got["POLLOUT"], got["POLLRDHUP"], got["POLLHUP"] = s.readable, s.writable, s.eof || s.hup, s.hup
		got["POLLERR"] = s.err != ""
	case fd.soError != "":
		for _, w := range []string{"POLLIN", "POLLOUT", "POLLRDHUP", "POLLHUP", "POLLERR"} {
			got[w] = true
		}
	case !fd.dialing:
		got["POLLOUT"], got["POLLHUP"] = true, true
	}
	var words []string
	for _, w := range []string{"POLLERR", "POLLHUP", "POLLIN", "POLLOUT", "POLLRDHUP"} {
		if got[w] && (slices.Contains(asked.Words(), w) || w == "POLLERR" || w == "POLLHUP") {
			words = append(words, w)
		}
	}
	return strings.Join(words, "|")
}

var scriptErrnos = map[string]error{
	"ECONNREFUSED": syscall.ECONNREFUSED, "ECONNRESET": syscall.ECONNRESET, "ETIMEDOUT": syscall.ETIMEDOUT,
	"EPIPE": syscall.EPIPE, "ENETUNREACH": syscall.ENETUNREACH, "EHOSTUNREACH": syscall.EHOSTUNREACH,
	"EACCES": syscall.EACCES, "EPERM": syscall.EPERM, "ENOTCONN": syscall.ENOTCONN, "EBADF": net.ErrClosed,
	"EAGAIN": os.ErrDeadlineExceeded, "EOF": io.EOF, "ECANCELED": context.Canceled, "drop": ErrDrop,
}

// scriptErrno returns the errno that a script has for an error.
func scriptErrno(err error) string {
	for name, e := range scriptErrnos {
		if errors.Is(err, e) {
			return name
		}
	}
	return err.Error()
}

// Tests of the runner.

// scriptBase passes; the tests below break it.
const scriptBase = `--tcp_ts_tick_usecs=1000
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
   +0 bind(3, ..., ...) = 0
   +0 listen(3, 1) = 0
  +.1 < S 0:0(0) win 32792 <mss 1000,sackOK,TS val 700 ecr 0,nop,wscale 7>
   +0 > S. 0:0(0) ack 1 win 65535 <mss 1460,nop,nop,sackOK,nop,wscale 5,nop,nop,TS val 100 ecr 700>
  +.1 < . 1:1(0) ack 1 win 257 <nop,nop,TS val 800 ecr 100>
   +0 accept(3, ..., ...) = 4
   +0 write(4, ..., 3000) = 3000
   +0 > P. 1:3001(3000) ack 1 win 32768 <nop,nop,TS val 200 ecr 800>
  +.1 < . 1001:2001(1000) ack 3001 win 257 <nop,nop,TS val 900 ecr 200>
   +0 > . 3001:3001(0) ack 1 win 32768 <nop,nop,TS val 300 ecr 800,nop,nop,sack 1001:2001>
  +.1 < P. 1:1001(1000) ack 3001 win 257 <nop,nop,TS val 1000 ecr 300>
   +0 > . 3001:3001(0) ack 2001 win 32706 <nop,nop,TS val 400 ecr 1000>
   +0 read(4, ..., 4000) = 2000
  +.1 close(4) = 0
   +0 > F. 3001:3001(0) ack 2001 win 32768 <...>
+.001 < R. 2001:2001(0) ack 3002 win 257
   +5 ` + "`true`\n"

// scriptMutations are changes of scriptBase that must make it fail, and what the
// failure must say.
var scriptMutations = []struct{ name, from, to, says string }{
	{"seq", "> P. 1:3001(3000)", "> P. 2:3002(3000)", "sequence number: expected 2, got 1"},
	{"length", "> P. 1:3001(3000)", "> P. 1:2001(2000)", "payload length: expected 2000, got 2964"},
	{"longer", "> P. 1:3001(3000)", "> P. 1:4001(4000)", "payload length: expected 4000, got 3000"},
	{"other part", "   +0 > P. 1:3001(3000)", "+0 < . 1001:2001(1000) ack 1 win 257\n+0 > P. 1:4001(4000)", "a part is missing"},
	{"ack", "ack 2001 win 32706", "ack 1001 win 32706", "ack: expected 1001, got 2001"},
	{"flags", "> P. 1:3001", "> . 1:3001", "flags: expected ., got P."},
	{"window", "win 32706", "win 32707", "window: expected 32707, got 32706"},
	{"missing option", "nop,wscale 5,", "", "options"},
	{"option too many", "<mss 1460,", "<mss 1460,nop,nop,nop,nop,", "options"},
	{"option order", "nop,nop,sackOK,nop,wscale 5", "nop,wscale 5,nop,nop,sackOK", "options"},
	{"mss", "<mss 1460", "<mss 1461", "options: expected <mss 1461"},
	{"scale", "wscale 5", "wscale 6", "options"},
	{"sack", "sack 1001:2001", "sack 1001:2002", "options"},
	{"timestamp", "TS val 300 ecr 800,nop", "TS val 305 ecr 800,nop", "options"},
	{"echo", "TS val 300 ecr 800,nop", "TS val 300 ecr 900,nop", "options"},
	{"early", "   +0 > F. 3001", "+.005 > F. 3001", "time"},
	{"late", "+.001 < R. 2001:2001(0)", "   +0 > . 3002:3002(0) ack 2001\n+.001 < R. 2001:2001(0)", "no packet"},
	{"missing packet", "   +0 > . 3001:3001(0) ack 2001", "+0 > . 9:9(0) ack 9\n +0 > . 3001:3001(0) ack 2001", "sequence number"},
	{"extra packet", "   +0 > . 3001:3001(0) ack 1 win 32768 <nop,nop,TS val 300 ecr 800,nop,nop,sack 1001:2001>\n", "", "ack: expected 2001, got 1"},
	{"extra packet at the end", "+.001 < R. 2001:2001(0) ack 3002 win 257\n", "", "after the last line nothing is expected"},
	{"result", "read(4, ..., 4000) = 2000", "read(4, ..., 4000) = 2001", "returned 2000"},
	{"errno", "read(4, ..., 4000) = 2000", "read(4, ..., 4000) = -1 EAGAIN", "returned 2000"},
	{"blocking", "read(4, ..., 4000) = 2000", "read(4, ..., 4000) = 2000\n+0 read(4, ..., 1) = 0", "blocks"},
	{"returns early", "+0 read(4, ..., 4000) = 2000", "+0...0.05 read(4, ..., 4000) = 2000", "is to return at"},
	{"returns late", "+0 read(4, ..., 4000) = 2000", "+0 read(4, ..., 4000) = 2000\n+0...0.05 read(4, ..., 1) = 0", "has not returned"},
	{"lost time", "+.1 close(4)", "0 close(4)", "is due at"},
	{"file", "read(4", "read(5", "EBADF"},
	{"short part", "> P. 1:3001(3000) ack 1 win 32768 <nop,nop,TS val 200 ecr 800>", "> P. 1:3001(3000) ack 1 win 32768 <nop,nop,TS val 200 ecr 800>\n" +
		"   +0 write(4, ..., 10) = 10\n   +0 write(4, ..., 10) = 10\n   +0 > P. 3001:3021(20) ack 1 win 32768 <...>\n   +0 write(4, ..., 1) = 1\n" +
		"   +0 write(4, ..., 2) = 2\n   +0 > P. 3021:3024(3) ack 1 win 32768 <...>", "a part is missing"},
	{"ports", "> P. 1:3001(3000)", "> 8080 > 41001 P. 1:3001(3000)", "destination port: expected 41001, got 41000"},
	{"in one", "--tcp_ts_tick_usecs=1000", "--tcp_ts_tick_usecs=1000\n--strict_segments", "payload length: expected 3000, got 988"},
	{"syntax", "+.1 close(4) = 0", "+.1 close(4) = ", "line 17"},
}

// scriptLenient are those of scriptMutations that a lenient run does not mind.
var scriptLenient = []string{"flags", "window", "option too many", "option order", "scale", "extra packet at the end"}

func TestScriptRunnerFails(t *testing.T) {
	for _, f := range scriptFamilies {
		for _, lenient := range []bool{false, true} {
			if out := runScript(t, "base", scriptBase, f, lenient); out != (scriptOutcome{}) {
				t.Fatalf("%s: %v %v", f.name, out.skip, out.err)
			}
		}
		for _, m := range scriptMutations {
			if strings.Count(scriptBase, m.from) != 1 {
				t.Fatalf("%s: %q is not there once", m.name, m.from)
			}
			src := strings.Replace(scriptBase, m.from, m.to, 1)
			out := runScript(t, "base", src, f, false)
			if out.err == nil || !strings.Contains(out.err.Error(), m.says) {
				t.Errorf("%s, %s: want an error with %q, got: %v", f.name, m.name, m.says, out.err)
			}
			out = runScript(t, "base", src, f, true)
			if passes := slices.Contains(scriptLenient, m.name); passes != (out.err == nil) {
				t.Errorf("%s, %s, lenient: %v", f.name, m.name, out.err)
			}
		}
	}
}

// scriptBreaks change the expectation at i so that the script must fail. They report
// false for one that cannot be changed in this way.
var scriptBreaks = map[string]func(events []pktscript.Event, i int) ([]pktscript.Event, bool){
	"missing": func(events []pktscript.Event, i int) ([]pktscript.Event, bool) {
		e := pktscript.Event{Line: events[i].Line, Time: events[i].Time, Ignored: true}
		if e.Time.Range { // let the time pass
			e.Time.At, e.Time.Range = e.Time.End, false
		}
		events[i] = e
		return events, e.Time.Kind != pktscript.Anytime
	},
	"twice": func(events []pktscript.Event, i int) ([]pktscript.Event, bool) {
		again := events[i]
		again.Time = pktscript.Time{Kind: pktscript.Relative}
		return slices.Insert(events, i+1, again), true
	},
	"late": func(events []pktscript.Event, i int) ([]pktscript.Event, bool) {
		events[i].Time.At += 100 * time.Millisecond
		events[i].Time.End += 100 * time.Millisecond
		return events, events[i].Time.Kind != pktscript.Anytime && !events[i].Time.Range
	},
	"seq": scriptBreak(func(p *pktscript.Packet) bool {
		p.Seq++
		return p.ICMP == nil && p.Flags&pktscript.SYN == 0 // whose number is any
	}),
	"length": scriptBreak(func(p *pktscript.Packet) bool {
		p.Len++
		return p.ICMP == nil
	}),
	"ack": scriptBreak(func(p *pktscript.Packet) bool {
		p.Ack++
		return p.Flags&pktscript.ACK != 0
	}),
	"flags": scriptBreak(func(p *pktscript.Packet) bool {
		p.Flags ^= pktscript.PSH
		return p.ICMP == nil
	}),
	"window": scriptBreak(func(p *pktscript.Packet) bool {
		p.Win++
		return p.Win > 0
	}),
	"option": scriptBreak(func(p *pktscript.Packet) bool {
		p.Options = append(slices.Clone(p.Options), pktscript.TCPOption{Kind: pktscript.KindNOP})
		return p.ICMP == nil && !p.AnyOptions
	}),
	"protocol": scriptBreak(func(p *pktscript.Packet) bool {
		if p.ICMP == nil {
			p.ICMP = &pktscript.ICMP{Type: "unreachable", MTU: -1}
		} else {
			p.ICMP = nil
		}
		return true
	}),
}

func scriptBreak(change func(p *pktscript.Packet) bool) func([]pktscript.Event, int) ([]pktscript.Event, bool) {
	return func(events []pktscript.Event, i int) ([]pktscript.Event, bool) {
		p := *events[i].Packet
		events[i].Packet = &p
		return events, change(&p)
	}
}

// Every script of ours fails when one of its expectations is changed.
func TestScriptsFailWhenBroken(t *testing.T) {
	paths, err := filepath.Glob("testdata/script/*.pkt")
	if err != nil || len(paths) == 0 {
		t.Fatal(len(paths), err)
	}
	done := 0
	for n, path := range paths {
		src, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		script, err := pktscript.Parse(string(src))
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		var expectations []int
		for i, e := range script.Events {
			if e.Packet != nil && !e.Packet.In {
				expectations = append(expectations, i)
			}
		}
		if len(expectations) == 0 {
			continue
		}
		names := slices.Sorted(maps.Keys(scriptBreaks))
		for k, name := range names {
			i := expectations[(n+k)%len(expectations)]
			events, ok := scriptBreaks[name](slices.Clone(script.Events), i)
			f := scriptFamilies[(n+k)%len(scriptFamilies)]
			out := runParsedScript(t, path, &pktscript.Script{Options: script.Options, Events: events}, f, false)
			if !ok || out.skip != "" {
				continue
			}
			if done++; out.err == nil {
				t.Errorf("%s:%d (%s): nobody minds %s", path, script.Events[i].Line, f.name, name)
			}
		}
	}
	if done < 1000 {
		t.Errorf("only %d scripts were broken", done)
	}
}

// A failure says where it is, what was expected, what came, and what came before.
func TestScriptFailureText(t *testing.T) {
	src := strings.Replace(scriptBase, "ack 2001 win 32706", "ack 1001 win 32706", 1)
	got := fmt.Sprint(runScript(t, "dir/base.pkt", src, scriptFamilies[1], false).err)
	for _, want := range []string{
		"dir/base.pkt:14 (ipv6): ack: expected 1001, got 2001\n",
		"\texpected  0.400000  > . 3001:3001(0) ack 1001 win 32706 <nop,nop,TS val 400 ecr 1000>\n",
		"\tgot       0.400000  > . 3001:3001(0) ack 2001 win 32706 <nop,nop,TS val 400 ecr 1000>\n",
		"so far:\n\t0.000000 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n",
		"\t0.200000 > P. 2965:3001(36) ack 1 win 32768 <nop,nop,TS val 200 ecr 800>\n",
		"\t0.400000 < P. 1:1001(1000) ack 3001 win 257 <nop,nop,TS val 1000 ecr 300>\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in:\n%s", want, got)
		}
	}
}

// The scripts of a directory tree are run by the test binary again: what it says of
// each is what whoever runs a public corpus gets to see.
func TestScriptsOfDirectory(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, src := range map[string]string{
		"passes.pkt":    scriptBase,
		"a/fails.pkt":   strings.Replace(scriptBase, "> P. 1:3001(3000)", "> P. 2:3002(3000)", 1),
		"a/b/skips.pkt": "0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n+0 epoll_create(1) = 5\n",
		"a/b/ipv6.pkt":  "--ip_version=ipv6\n" + scriptBase,
		"window.pkt":    strings.Replace(scriptBase, "win 32706", "win 1", 1),
		"note.txt":      "no script",
	} {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(src), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	for lenient, window := range map[string]string{"": "FAIL", "1": "PASS"} {
		cmd := exec.Command(self, "-test.run=^TestScripts$", "-test.v")
		cmd.Env = append(os.Environ(), "SLIRP_SCRIPTS="+dir, "SLIRP_SCRIPTS_LENIENT="+lenient)
		out, _ := cmd.CombinedOutput()
		for _, want := range []string{
			"--- PASS: TestScripts/passes (", "--- PASS: TestScripts/passes/ipv4 (", "--- PASS: TestScripts/passes/ipv6 (",
			"--- FAIL: TestScripts/a/fails (", "--- SKIP: TestScripts/a/b/skips (", filepath.FromSlash("a/b/skips.pkt") + ":2: epoll_create is not supported",
			"--- PASS: TestScripts/a/b/ipv6 (", "--- SKIP: TestScripts/a/b/ipv6/ipv4 (", "--- " + window + ": TestScripts/window (",
		} {
			if !strings.Contains(string(out), want) {
				t.Errorf("lenient %q: %q is not in:\n%s", lenient, want, out)
			}
		}
		if strings.Contains(string(out), "note") {
			t.Errorf("what is no script is run:\n%s", out)
		}
	}
}

// The sizes of a script for IPv6 alone are those of IPv6.
func TestScriptIPv6Sizes(t *testing.T) {
	const src = `--ip_version=ipv6
--mtu=1400
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
   +0 bind(3, ..., ...) = 0
   +0 listen(3, 1) = 0
   +0 < S 0:0(0) win 32792 <mss 1460,sackOK,nop,nop,nop,wscale 7>
   +0 > S. 0:0(0) ack 1 <mss 1340,nop,nop,sackOK,nop,wscale 5>
  +.1 < . 1:1(0) ack 1 win 257
   +0 accept(3, ..., ...) = 4
   +0 write(4, ..., 1340) = 1340
   +0 > P. 1:1341(1340) ack 1
  +.1 < icmp packet_too_big mtu 1280 [1:1341(1340)]
   +0 > . 1:1221(1220) ack 1
   +0 > P. 1221:1341(120) ack 1
  +.1 < R 1:1(0) win 0
`
	if out := runScript(t, "s", src, scriptFamilies[1], false); out != (scriptOutcome{}) {
		t.Error(out.skip, out.err)
	}
	// Its MTU is 20 less over IPv4, as is everything else.
	both := strings.NewReplacer("--ip_version=ipv6\n", "", "--mtu=1400", "--mtu=1380").Replace(src)
	for _, f := range scriptFamilies {
		if out := runScript(t, "s", both, f, false); out != (scriptOutcome{}) {
			t.Errorf("%s: %s %v", f.name, out.skip, out.err)
		}
	}
}

func TestScriptSkips(t *testing.T) {
	for _, c := range []struct{ src, says string }{
		{"--ip_version=ipv6\n0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3", "is for ipv6"},
		{"0 socket(..., SOCK_DGRAM, IPPROTO_UDP) = 3", "s:1: a socket that is not TCP"},
		{"0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n+0 getsockopt(3, SOL_TCP, TCP_INFO, ..., ...) = 0", "s:2: getsockopt(TCP_INFO)"},
		{"0 setsockopt(3, SOL_TCP, TCP_FASTOPEN, [1], 4) = 0", "TCP_FASTOPEN"},
		{"0 sendto(3, ..., 1000, MSG_FASTOPEN, ..., ...) = 1000", "MSG_FASTOPEN"},
		{"0 send(3, ..., 1000, MSG_ZEROCOPY|MSG_NOSIGNAL) = 1000", "MSG_ZEROCOPY"},
		{"0 splice(3, 4) = 1", "splice is not supported"},
		{"0 > udp (100)", "line 1: udp packets: unsupported"},
		{"0 setsockopt(3, SOL_TCP, TCP_MAXSEG, [500], 4) = 0", "Config.MTU"},
		{"0 < icmp made_up", "no such ICMP message"},
		{"0 > S 0:0(0) <mss 1460,mpcapable v1 flags[flag_h] nokey>", "line 1: TCP option mpcapable: unsupported"},
		{"0 < . 1:1(0) ack 1 win 1 <add_address addr[saddr] hmac=auto>", "line 1: TCP option add_address: unsupported"},
		{"0 > S. 0:0(0) ack 1 <mss MSS,nop,wscale 8>", "line 1: the symbol MSS: unsupported"},
		{"0 > encap psp spi 23 P. 1:2(1) ack 1", "line 1: encap packets: unsupported"},
	} {
		out := runScript(t, "s", c.src, scriptFamilies[0], false)
		if out.err != nil || !strings.Contains(out.skip, c.says) {
			t.Errorf("%q: skipped with %q, error %v, want %q", c.src, out.skip, out.err, c.says)
		}
	}
}

// Frames that a correct stack does not send are found, whatever the script says.
func TestScriptChecksFrames(t *testing.T) {
	for _, f := range scriptFamilies {
		syn := &pktscript.Packet{Flags: pktscript.SYN | pktscript.ACK, Seq: 5, Ack: 1, Win: 100, Urg: -1}
		frame := func(change func(p *pktscript.Packet)) []byte {
			p := *syn
			change(&p)
			body := p.Marshal(scriptHostPort, scriptGuestPort, nil)
			ip := scriptPacket(f.host, f.guest, protoTCP, body, 16, 0, 64)
			ether := append([]byte{2, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0}, 0x08, 0)
			if f.version == 6 {
				ether[12], ether[13] = 0x86, 0xdd
			}
			return append(ether, ip...)
		}
		same := func(*pktscript.Packet) {}
		last := func(b []byte) int { return len(b) - 1 }
		broken := map[string][]byte{
			"good":           frame(same),
			"cut off":        frame(same)[:40],
			"MAC":            frame(same),
			"ether type":     frame(same),
			"checksum":       frame(same),
			"IP length":      append(frame(same), 0),
			"TTL":            frame(same),
			"right edge":     frame(func(p *pktscript.Packet) { p.Flags, p.Seq, p.Win = pktscript.ACK, 6, 99 }),
			"payload":        frame(func(p *pktscript.Packet) { p.Flags, p.Seq = pktscript.ACK, 6 }),
			"reset to reset": frame(func(p *pktscript.Packet) { p.Flags = pktscript.RST | pktscript.ACK }),
		}
		broken["MAC"][0]++
		broken["ether type"][13]++
		broken["checksum"][last(broken["checksum"])]++
		broken["TTL"][14+map[uint16]int{4: 8, 6: 7}[f.version]]--
		p := &pktscript.Packet{Flags: pktscript.ACK, Seq: 6, Ack: 1, Win: 100, Urg: -1}
		broken["payload"] = append(broken["payload"][:14], scriptPacket(f.host, f.guest, protoTCP,
			p.Marshal(scriptHostPort, scriptGuestPort, []byte("?")), 16, 0, 64)...)
		for name, b := range broken {
			r := &scriptRunner{family: f, cfg: Config{MTU: 1500}, flows: make(map[[2]uint16]*scriptFlow)}
			fl := r.flow([2]uint16{scriptGuestPort, scriptHostPort})
			fl.edge, fl.edgeKnown, fl.issKnown, fl.iss, fl.sent = 101, true, true, 5, []byte("!")
			_, err := r.parseFrame(&scriptFrame{frame: b, forReset: name == "reset to reset"}, nil)
			if (err == nil) != (name == "good") {
				t.Errorf("%s, %s: error %v", f.name, name, err)
			}
		}
	}
}
