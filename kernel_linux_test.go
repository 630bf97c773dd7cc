package slirp_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp"
	"github.com/KarpelesLab/slirp/internal/ring"
)

// The tests in this file put a Linux kernel behind a TAP device as the guest, in
// a network namespace of its own; the stack's host sockets live in a second one.
// Nothing leaves the two. The guest's sockets are made by this process in the
// guest's namespace, so an error shows as the guest's kernel reports it.

const kernelLimit = 3 * time.Minute // for any single connection

// ringFamily holds the addresses of one IP version, the same ones in every guest.
// The host has a server's address, no route to another, and for two more a route
// that answers EHOSTUNREACH and EACCES.
type ringFamily struct {
	name, network                            string
	dad                                      string // option of "ip addr add" that turns duplicate address detection off
	guestAddr, gateway                       netip.Addr
	server, noRoute, unreachable, prohibited netip.Addr
}

var ringFamilies = []ringFamily{{
	name: "IPv4", network: "4",
	guestAddr: netip.MustParseAddr("10.0.2.15"), gateway: netip.MustParseAddr("10.0.2.2"),
	server: netip.MustParseAddr("198.51.100.1"), noRoute: netip.MustParseAddr("198.51.100.2"),
	unreachable: netip.MustParseAddr("198.51.100.3"), prohibited: netip.MustParseAddr("198.51.100.4"),
}, {
	name: "IPv6", network: "6", dad: "nodad",
	guestAddr: netip.MustParseAddr("fd00::15"), gateway: netip.MustParseAddr("fd00::2"),
	server: netip.MustParseAddr("2001:db8:1::1"), noRoute: netip.MustParseAddr("2001:db8:1::2"),
	unreachable: netip.MustParseAddr("2001:db8:1::3"), prohibited: netip.MustParseAddr("2001:db8:1::4"),
}}

// needRing skips the test unless guests are asked for and can be made here.
func needRing(t *testing.T, tools ...string) {
	t.Helper()
	if os.Getenv("SLIRP_RING") != "1" {
		t.Skip("runs a real guest: set SLIRP_RING=1")
	}
	if testing.Short() {
		t.Skip("runs a real guest: not with -short")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("needs ", tool)
		}
	}
}

// kernelRing is one guest kernel behind one stack.
type kernelRing struct {
	ringFamily
	t           *testing.T
	stack       *slirp.Stack
	link        *ring.Link
	guest, host *ring.NetNS
}

// kernelOptions are the settings of a ring; the zero value has none.
type kernelOptions struct {
	slirp.Config
	loss   float64 // of frames, each way
	record bool    // the link's Device is a recorder
	gate   bool    // the link's Device is a frameGate
}

// eachKernel runs a test against a fresh ring for each IP version.
func eachKernel(t *testing.T, o kernelOptions, test func(t *testing.T, r *kernelRing)) {
	t.Helper()
	needRing(t, "ip")
	if os.Getuid() != 0 {
		t.Skip("needs root for network namespaces and a TAP device")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip("needs a TAP device: ", err)
	}
	for _, f := range ringFamilies {
		t.Run(f.name, func(t *testing.T) { test(t, newKernelRing(t, f, o)) })
	}
}

func newKernelRing(t *testing.T, f ringFamily, o kernelOptions) *kernelRing {
	r := &kernelRing{ringFamily: f, t: t}
	namespace := func() *ring.NetNS {
		ns, err := ring.NewNetNS()
		r.must(err)
		t.Cleanup(func() { ns.Close() })
		return ns
	}
	r.host, r.guest = namespace(), namespace()
	tap, err := r.guest.TAP("tap0", o.VirtioNetHeader)
	r.must(err)
	if o.VirtioNetUSO && !ring.TakesUSO(tap) {
		tap.Close()
		t.Skip("needs a kernel that takes several datagrams in a frame")
	}
	mtu := cmp.Or(o.MTU, 1500)
	var host []string
	for _, f := range ringFamilies {
		host = append(host,
			fmt.Sprintf("addr add %v dev lo %s", f.server, f.dad),
			fmt.Sprintf("route add unreachable %v", f.unreachable),
			fmt.Sprintf("route add prohibit %v", f.prohibited))
	}
	r.must(r.host.IP(host...))
	r.must(r.guest.IP(
		fmt.Sprintf("link set tap0 address %v mtu %d txqueuelen 10000 up", net.HardwareAddr(ring.GuestMAC[:]), mtu),
		"addr add 10.0.2.15/24 dev tap0",
		"addr add fd00::15/64 dev tap0 nodad",
		"route add default via 10.0.2.2",
		"route add default via fd00::2"))

	if o.Dial == nil {
		o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			return r.host.Dial(ctx, new(net.Dialer), network, address)
		}
	}
	r.stack, err = slirp.NewWithConfig(o.Config)
	r.must(err)
	r.link = &ring.Link{Stack: r.stack, Device: tap, Loss: o.loss, VirtioNet: o.VirtioNetHeader}
	if o.record {
		r.link.Device = &recorder{ReadWriter: tap}
	}
	if o.gate {
		r.link.Device = &frameGate{ReadWriter: tap}
	}
	served := make(chan error)
	go func() {
		served <- r.link.Serve(func(err error) {
			if !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) { // the guest outlives the stack and the link
				t.Errorf("HandlePacket: %v", err)
			}
		})
	}()
	t.Cleanup(func() {
		if err := r.stack.Close(); err != nil {
			t.Errorf("Stack.Close: %v", err)
		}
		tap.Close()
		if err := <-served; !errors.Is(err, os.ErrClosed) {
			t.Errorf("link: %v", err)
		}
	})
	return r
}

func (r *kernelRing) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// serve runs a TCP server on the host until the test ends, and returns its address.
func (r *kernelRing) serve(handle func(c *net.TCPConn) error) string {
	return r.serveIn(r.host, r.server, handle)
}

func (r *kernelRing) serveIn(ns *ring.NetNS, a netip.Addr, handle func(c *net.TCPConn) error) string {
	r.t.Helper()
	l, err := ns.Listen(r.t.Context(), netip.AddrPortFrom(a, 0).String())
	r.must(err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(kernelLimit))
				if err := handle(c.(*net.TCPConn)); err != nil {
					r.t.Errorf("server: %v", err)
				}
			})
		}
	})
	r.t.Cleanup(func() { l.Close(); wg.Wait() })
	return l.Addr().String()
}

// tryDial connects a socket of the guest, closed when the test ends.
func (r *kernelRing) tryDial(network, address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	c, err := r.guest.Dial(ctx, &net.Dialer{Control: ring.ReceiveErrors}, network, address)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(kernelLimit))
	r.t.Cleanup(func() { c.Close() })
	return c, nil
}

func (r *kernelRing) dial(address string) *net.TCPConn {
	r.t.Helper()
	c, err := r.tryDial("tcp", address)
	r.must(err)
	return c.(*net.TCPConn)
}

func (r *kernelRing) dialUDP(address string) net.Conn {
	r.t.Helper()
	c, err := r.tryDial("udp", address)
	r.must(err)
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

// run runs a program in the guest.
func (r *kernelRing) run(stdin io.Reader, stdout io.Writer, name string, args ...string) error {
	cmd := exec.CommandContext(r.t.Context(), name, args...)
	cmd.Stdin, cmd.Stdout = stdin, stdout
	return r.guest.Run(cmd)
}

// dataServer serves /N, N bytes of test data, and verifies what is uploaded there.
func dataServer(t *testing.T, l net.Listener) {
	mux := http.NewServeMux()
	mux.HandleFunc("/{n}", func(w http.ResponseWriter, req *http.Request) {
		n, err := strconv.ParseInt(req.PathValue("n"), 10, 64)
		if err != nil {
			http.NotFound(w, req)
			return
		}
		if req.Method == http.MethodGet {
			w.Header().Set("Content-Length", req.PathValue("n"))
			io.Copy(w, ring.Data(n))
			return
		}
		if err := ring.Verify(req.Body, n); err != nil {
			t.Errorf("upload: %v", err)
		}
		fmt.Fprintln(w, "received")
	})
	srv := &http.Server{Handler: mux}
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() { srv.Close(); <-done })
}

func TestKernelCurl(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) { r.curl(256 * ring.MiB) })
}

func TestKernelCurlJumbo(t *testing.T) {
	o := kernelOptions{Config: slirp.Config{MTU: 65520}}
	eachKernel(t, o, func(t *testing.T, r *kernelRing) { r.curl(64 * ring.MiB) })
}

// TestKernelVirtio has packets of many segments and unfinished checksums pass between
// the guest and the stack.
func TestKernelVirtio(t *testing.T) {
	for _, test := range []struct {
		name string
		mtu  int
		loss float64
		run  func(r *kernelRing)
	}{
		{name: "Curl", run: func(r *kernelRing) { r.curl(256 * ring.MiB) }},
		{name: "CurlJumbo", mtu: 65520, run: func(r *kernelRing) { r.curl(64 * ring.MiB) }},
		{name: "Loss", loss: 0.01, run: func(r *kernelRing) { r.lossy(64 * ring.MiB) }},
		{name: "SmallerPath", run: (*kernelRing).smallerPath},
		{name: "UDPSizes", run: (*kernelRing).udpSizes},
		{name: "Ping", run: (*kernelRing).ping},
		{name: "DialGuest", run: func(r *kernelRing) {
			r.must(ring.Verify(r.dial(r.serve(func(c *net.TCPConn) error { return nil })), 0))
			r.dialGuest()
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := kernelOptions{Config: slirp.Config{MTU: test.mtu, VirtioNetHeader: true, ReuseFrames: true}, loss: test.loss}
			eachKernel(t, o, func(t *testing.T, r *kernelRing) { test.run(r) })
		})
	}
}

// curl downloads and uploads n bytes.
func (r *kernelRing) curl(n int64) {
	needRing(r.t, "curl")
	l, err := r.host.Listen(r.t.Context(), netip.AddrPortFrom(r.server, 0).String())
	r.must(err)
	dataServer(r.t, l)
	url := fmt.Sprintf("http://%v/%d", l.Addr(), n)
	curl := func(stdin io.Reader, stdout io.Writer, args ...string) error {
		args = append(args, "--noproxy", "*", "-sS", "--fail", "--max-time", "180", url)
		return r.run(stdin, stdout, "curl", args...)
	}

	start := time.Now()
	body, w := io.Pipe()
	got := make(chan error, 1)
	go func() { got <- ring.Verify(body, n) }()
	err = curl(nil, w)
	w.Close()
	r.must(err)
	r.must(<-got)
	r.t.Logf("download: %s", kernelRate(n, start))

	start = time.Now()
	var reply strings.Builder
	r.must(curl(ring.Data(n), &reply, "-T", "-"))
	if reply.String() != "received\n" {
		r.t.Errorf("upload: the server says %q", reply.String())
	}
	r.t.Logf("upload: %s", kernelRate(n, start))
}

func kernelRate(n int64, start time.Time) string {
	d := time.Since(start)
	return fmt.Sprintf("%d MiB in %v, %.0f Mbit/s", n/ring.MiB, d.Round(time.Millisecond), float64(8*n)/1e6/d.Seconds())
}

func TestKernelServerSpeaksFirst(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		c := r.dial(r.serve(func(c *net.TCPConn) error {
			if _, err := io.WriteString(c, "220 ready\r\n"); err != nil {
				return err
			}
			return ring.Expect(c, "QUIT\r\n")
		}))
		r.must(ring.Expect(c, "220 ready\r\n"))
		_, err := io.WriteString(c, "QUIT\r\n")
		r.must(err)
		r.must(ring.Verify(c, 0))
	})
}

func TestKernelGuestShutsDownFirst(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		c := r.dial(r.serve(func(c *net.TCPConn) error {
			if err := ring.Verify(c, ring.MiB); err != nil {
				return err
			}
			return ring.Send(c, 10*ring.MiB)
		}))
		r.must(ring.Send(c, ring.MiB))
		r.must(ring.Verify(c, 10*ring.MiB))
	})
}

func TestKernelHostShutsDownFirst(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		received := make(chan error, 1)
		c := r.dial(r.serve(func(c *net.TCPConn) error {
			err := ring.Send(c, ring.MiB)
			received <- ring.Verify(c, 10*ring.MiB)
			return err
		}))
		r.must(ring.Verify(c, ring.MiB))
		r.must(ring.Send(c, 10*ring.MiB))
		r.must(<-received)
	})
}

// TestKernelErrors checks the error that a connecting guest sees. Linux turns
// ICMP's "administratively prohibited" into EHOSTUNREACH (icmp_err_convert) and
// ICMPv6's into EACCES (tab_unreach).
func TestKernelErrors(t *testing.T) {
	refuse := func(err error) slirp.Config {
		return slirp.Config{Allow: func(context.Context, slirp.Flow) error { return fmt.Errorf("policy: %w", err) }}
	}
	prohibited := map[string]error{"IPv4": syscall.EHOSTUNREACH, "IPv6": syscall.EACCES}
	both := func(err error) map[string]error { return map[string]error{"IPv4": err, "IPv6": err} }
	for _, test := range []struct {
		name string
		cfg  slirp.Config
		addr func(ringFamily) netip.Addr
		want map[string]error
	}{
		{"Refused", slirp.Config{}, func(f ringFamily) netip.Addr { return f.server }, both(syscall.ECONNREFUSED)},
		{"NoRoute", slirp.Config{}, func(f ringFamily) netip.Addr { return f.noRoute }, both(syscall.ENETUNREACH)},
		{"Unreachable", slirp.Config{}, func(f ringFamily) netip.Addr { return f.unreachable }, both(syscall.EHOSTUNREACH)},
		{"Prohibited", slirp.Config{}, func(f ringFamily) netip.Addr { return f.prohibited }, prohibited},
		{"AllowProhibits", refuse(slirp.ErrProhibited), func(f ringFamily) netip.Addr { return f.server }, prohibited},
		{"AllowUnreachable", refuse(syscall.EHOSTUNREACH), func(f ringFamily) netip.Addr { return f.server }, both(syscall.EHOSTUNREACH)},
		{"AllowRefuses", refuse(syscall.ECONNREFUSED), func(f ringFamily) netip.Addr { return f.server }, both(syscall.ECONNREFUSED)},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachKernel(t, kernelOptions{Config: test.cfg}, func(t *testing.T, r *kernelRing) {
				address, want := netip.AddrPortFrom(test.addr(r.ringFamily), 7).String(), test.want[r.name]
				if _, err := r.tryDial("tcp", address); !errors.Is(err, want) {
					t.Errorf("TCP: %v, want %v", err, want)
				}
				c := r.dialUDP(address)
				if err := ring.Exchange(c, "x", "x"); !errors.Is(err, want) {
					t.Errorf("UDP: %v, want %v", err, want)
				}
			})
		})
	}
}

func TestKernelUDPRefusedThenServed(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		probe, err := r.host.ListenPacket(t.Context(), netip.AddrPortFrom(r.server, 0).String())
		r.must(err)
		address := probe.LocalAddr().String()
		probe.Close()

		c := r.dialUDP(address)
		for range 2 {
			if err := ring.Exchange(c, "x", "x"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Fatalf("nobody listens: %v, want %v", err, syscall.ECONNREFUSED)
			}
		}
		r.serveUDP(address, func(request []byte) []byte { return request })
		r.must(ring.Exchange(c, "hello", "hello"))
	})
}

// serveUDP answers datagrams on the host until the test ends.
func (r *kernelRing) serveUDP(address string, reply func(request []byte) []byte) string {
	r.t.Helper()
	c, err := r.host.ListenPacket(r.t.Context(), address)
	r.must(err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if _, err := c.WriteTo(reply(buf[:n]), from); err != nil {
				r.t.Errorf("server: %v", err)
			}
		}
	}()
	r.t.Cleanup(func() { c.Close(); <-done })
	return c.LocalAddr().String()
}

// TestKernelUDPSizes has the host send datagrams of every kind of size; those
// above the MTU reach the guest in fragments, and the stack likewise. A request
// names the size of its answer, and is itself as long as that.
func TestKernelUDPSizes(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) { r.udpSizes() })
}

func (r *kernelRing) udpSizes() {
	t := r.t
	packet := map[string]int{"IPv4": 1500 - 20 - 8, "IPv6": 1500 - 40 - 8}[r.name]
	data, err := io.ReadAll(ring.Data(1 << 16))
	r.must(err)
	c := r.dialUDP(r.serveUDP(netip.AddrPortFrom(r.server, 0).String(), func(request []byte) []byte {
		n, _ := strconv.Atoi(strings.TrimSpace(string(request))) // an empty request has an empty answer
		return data[:n]
	}))
	for _, n := range []int{0, 1, packet - 1, packet, packet + 1, 4000, 8192, 65507, 0, 1} {
		request := ""
		if n > 0 {
			request = fmt.Sprintf("%-*d", n, n)
		}
		if err := ring.Exchange(c, request, string(data[:n])); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestKernelUSO has a kernel take frames of several datagrams.
func TestKernelUSO(t *testing.T) {
	for _, test := range []struct {
		name string
		run  func(r *kernelRing)
	}{
		{"Bursts", (*kernelRing).udpBursts},
		{"Sizes", (*kernelRing).udpSizes},
		{"SmallerPath", (*kernelRing).smallerPath},
	} {
		t.Run(test.name, func(t *testing.T) {
			cfg := slirp.Config{VirtioNetHeader: true, VirtioNetUSO: true, ReuseFrames: true}
			eachKernel(t, kernelOptions{Config: cfg, gate: true}, func(t *testing.T, r *kernelRing) { test.run(r) })
		})
	}
}

// frameGate is a device that can be held, so that datagrams of the host pile up behind a
// frame.
type frameGate struct {
	io.ReadWriter
	mu            sync.Mutex
	held, release chan bool // of the next UDP datagram; nil: it is not held
	several       []int     // the lengths of frames of several datagrams
}

// hold has the next UDP datagram held, and returns what is closed when it is, and what
// is to be closed for it to go on.
func (g *frameGate) hold() (held, release chan bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held, g.release = make(chan bool), make(chan bool)
	return g.held, g.release
}

func (g *frameGate) Write(frame []byte) (int, error) {
	ip := frame[slirp.VirtioNetHeaderLen+14:]
	g.mu.Lock()
	var held, release chan bool
	if ip[0]>>4 == 4 && ip[9] == 17 || ip[0]>>4 == 6 && ip[6] == 17 {
		held, release, g.held = g.held, g.release, nil
	}
	if frame[1] == 5 { // VIRTIO_NET_HDR_GSO_UDP_L4
		g.several = append(g.several, len(frame))
	}
	g.mu.Unlock()
	if held != nil {
		close(held)
		<-release
	}
	return g.ReadWriter.Write(frame)
}

// udpBursts has the host send datagrams of equal and other sizes at a time.
func (r *kernelRing) udpBursts() {
	t, gate := r.t, r.link.Device.(*frameGate)
	data, err := io.ReadAll(ring.Data(1 << 16))
	r.must(err)
	whole := map[string]int{"IPv4": 1500 - 20 - 8, "IPv6": 1500 - 40 - 8}[r.name]
	server, err := r.host.ListenPacket(t.Context(), netip.AddrPortFrom(r.server, 0).String())
	r.must(err)
	defer server.Close()
	server.SetDeadline(time.Now().Add(30 * time.Second))
	c := r.dialUDP(server.LocalAddr().String())
	_, err = io.WriteString(c, "hello")
	r.must(err)
	_, peer, err := server.ReadFrom(make([]byte, 10))
	r.must(err)
	for _, test := range []struct {
		sizes  []int
		frames int // of several datagrams
	}{
		{slices.Repeat([]int{whole}, 44), 1},
		{slices.Repeat([]int{1}, 64), 1},
		{[]int{1000, 1000, 1000, 999, 1000, 1000, 1, 0, 0, 3000, 700, 700, whole, whole + 1}, 3},
	} {
		held, release := gate.hold()
		for i, size := range append([]int{5}, test.sizes...) {
			_, err := server.WriteTo(data[i:][:size], peer)
			r.must(err)
			if i == 0 {
				<-held
			}
		}
		gate.mu.Lock()
		gate.several = nil
		gate.mu.Unlock()
		close(release)
		buf := make([]byte, 1<<16)
		for i, size := range append([]int{5}, test.sizes...) {
			n, err := c.Read(buf)
			if err != nil || string(buf[:n]) != string(data[i:][:size]) {
				t.Fatalf("datagram %d of %v: %d bytes, %v", i, test.sizes, n, err)
			}
		}
		gate.mu.Lock()
		if len(gate.several) != test.frames {
			t.Errorf("%v: frames of several datagrams have %v bytes, want %d frames", test.sizes, gate.several, test.frames)
		}
		gate.mu.Unlock()
	}
}

func TestKernelPing(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) { r.ping() })
}

func (r *kernelRing) ping() {
	t := r.t
	needRing(t, "busybox")
	for _, a := range []netip.Addr{r.gateway, r.server} {
		for _, size := range []string{"0", "56", "1452", "8000"} {
			var out strings.Builder
			err := r.run(nil, &out, "busybox", "ping", "-"+r.network, "-c", "3", "-i", "0.1", "-W", "10", "-s", size, a.String())
			if err != nil || !strings.Contains(out.String(), "3 packets received") {
				t.Errorf("ping %v, %s bytes: %v\n%s", a, size, err, &out)
			}
		}
	}
}

// A traceroute of datagrams shows the stack and then the destination, which has
// nobody at these ports; so does one of pings.
func TestKernelTraceroute(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		needRing(t, "busybox")
		modes := [][]string{nil}
		if r.network == "4" {
			modes = append(modes, []string{"-I"})
		}
		for _, mode := range modes {
			var out strings.Builder
			args := append([]string{"traceroute", "-n", "-q", "2", "-w", "5", "-m", "4"}, mode...)
			err := r.run(nil, &out, "busybox", append(args, r.server.String())...)
			hops := strings.Split(strings.TrimSpace(out.String()), "\n")[1:]
			if err != nil || len(hops) != 2 || !strings.Contains(hops[0], r.gateway.String()) || !strings.Contains(hops[1], r.server.String()) || strings.Contains(out.String(), "*") {
				t.Errorf("traceroute %v: %v\n%s", mode, err, &out)
			}
		}
	})
}

// TestKernelSmallerPath puts a machine behind the guest, on a link that takes less
// than the stack's MTU, of which only the guest's kernel knows.
func TestKernelSmallerPath(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) { r.smallerPath() })
}

func (r *kernelRing) smallerPath() {
	t := r.t
	inner, err := ring.NewNetNS()
	r.must(err)
	t.Cleanup(func() { inner.Close() })
	address, bits, gateway := netip.MustParseAddr("10.9.0.2"), 24, "10.9.0.1"
	forward := "/proc/sys/net/ipv4/ip_forward"
	if r.network == "6" {
		address, bits, gateway = netip.MustParseAddr("fd09::2"), 64, "fd09::1"
		forward = "/proc/sys/net/ipv6/conf/all/forwarding"
	}
	r.must(r.guest.Veth("veth0", inner, "veth1"))
	r.must(r.guest.IP(fmt.Sprintf("addr add %s/%d dev veth0 %s", gateway, bits, r.dad), "link set veth0 mtu 1300 up"))
	r.must(inner.IP(fmt.Sprintf("addr add %v/%d dev veth1 %s", address, bits, r.dad), "link set veth1 up",
		"route add default via "+gateway))
	r.must(r.guest.Do(func() error { return os.WriteFile(forward, []byte("1"), 0) }))

	data, err := io.ReadAll(ring.Data(2 << 20))
	r.must(err)
	server := r.serve(func(c *net.TCPConn) error {
		_, err := c.Write(data)
		return err
	})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := inner.Dial(ctx, new(net.Dialer), "tcp", server)
	r.must(err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(kernelLimit))
	start := time.Now()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != string(data) {
		t.Errorf("%d of %d bytes: %v", len(got), len(data), err)
	}
	t.Log(kernelRate(int64(len(data)), start))
	if st := r.stack.Stats(); st.PathMTUs == 0 {
		t.Errorf("%+v", st)
	}

	// Its datagrams are in fragments that fit: this guest is known by now.
	u, err := inner.Dial(ctx, new(net.Dialer), "udp", r.serveUDP(netip.AddrPortFrom(r.server, 0).String(), func([]byte) []byte {
		return data[:1400]
	}))
	r.must(err)
	defer u.Close()
	u.SetDeadline(time.Now().Add(10 * time.Second))
	r.must(ring.Exchange(u, "?", string(data[:1400])))
}

// TestKernelTooBigForHost has host sockets that do not fragment, and a route of the
// host that takes 1,400 bytes: the guest's kernel learns of it.
func TestKernelTooBigForHost(t *testing.T) {
	var r *kernelRing
	o := kernelOptions{}
	o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return r.host.Dial(ctx, &net.Dialer{Control: ring.NoFragments}, network, address)
	}
	eachKernel(t, o, func(t *testing.T, guest *kernelRing) {
		r = guest
		far, headers := netip.MustParseAddr("198.51.100.9"), 28
		if r.network == "6" {
			far, headers = netip.MustParseAddr("2001:db8:1::9"), 48
		}
		r.must(r.host.IP(fmt.Sprintf("route add local %v dev lo mtu 1400", far)))
		if r.network == "6" { // which has no address of its own by such a route
			r.must(r.host.Do(func() error { return os.WriteFile("/proc/sys/net/ipv6/ip_nonlocal_bind", []byte("1"), 0) }))
		}
		c := r.dialUDP(r.serveUDP(netip.AddrPortFrom(far, 0).String(), func(request []byte) []byte { return request }))
		r.must(ring.Exchange(c, "hello", "hello"))
		_, err := c.Write(make([]byte, 1500-headers))
		r.must(err)
		if _, err = c.Read(make([]byte, 10)); !errors.Is(err, syscall.EMSGSIZE) {
			t.Errorf("error %v, want EMSGSIZE", err)
		}
		fits := strings.Repeat("x", 1400-headers)
		r.must(ring.Exchange(c, fits, fits))
	})
}

func TestKernelManyConnections(t *testing.T) {
	const conns, size = 200, 256 << 10
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		address := r.serve(func(c *net.TCPConn) error {
			if _, err := io.Copy(c, c); err != nil {
				return err
			}
			return c.CloseWrite()
		})
		var wg, open sync.WaitGroup
		open.Add(conns)
		for range conns {
			wg.Go(func() {
				c, err := r.tryDial("tcp", address)
				open.Done()
				if err != nil {
					t.Error(err)
					return
				}
				open.Wait() // all connections exist at once
				wg.Go(func() {
					if err := ring.Send(c, size); err != nil {
						t.Error(err)
					}
				})
				if err := ring.Verify(c, size); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	})
}

// TestKernelDialGuest calls a server in the guest, which the stack knows by a
// route, and then by the packets that the guest sent.
func TestKernelDialGuest(t *testing.T) {
	t.Run("Route", func(t *testing.T) {
		eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
			prefix := netip.PrefixFrom(r.guestAddr, r.guestAddr.BitLen())
			r.must(r.stack.AddRoute(0, prefix, ring.GuestMAC, ring.GatewayMAC, r.link.Send))
			r.dialGuest()
		})
	})
	t.Run("Packet", func(t *testing.T) {
		eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
			r.must(ring.Verify(r.dial(r.serve(func(c *net.TCPConn) error { return nil })), 0))
			r.dialGuest()
		})
	})
}

func (r *kernelRing) dialGuest() {
	address := r.serveIn(r.guest, r.guestAddr, func(c *net.TCPConn) error {
		if a := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); a != r.gateway {
			return fmt.Errorf("the guest is called from %v, want %v", a, r.gateway)
		}
		if err := ring.Verify(c, ring.MiB); err != nil {
			return err
		}
		return ring.Send(c, 10*ring.MiB)
	})
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	c, err := r.stack.DialContext(ctx, "tcp", address)
	r.must(err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(kernelLimit))
	if got := c.RemoteAddr().String(); got != address {
		r.t.Errorf("RemoteAddr is %v, want %v", got, address)
	}
	r.must(ring.Send(c, ring.MiB))
	r.must(ring.Verify(c, 10*ring.MiB))

	closed := netip.AddrPortFrom(r.guestAddr, 7).String()
	if _, err := r.stack.DialContext(ctx, "tcp", closed); !errors.Is(err, syscall.ECONNREFUSED) {
		r.t.Errorf("nobody listens in the guest: %v, want %v", err, syscall.ECONNREFUSED)
	}
}

func TestKernelHostResets(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		c := r.dial(r.serve(func(c *net.TCPConn) error {
			c.SetLinger(0)
			return ring.Expect(c, "x")
		}))
		_, err := io.WriteString(c, "x")
		r.must(err)
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the guest reads %v, want %v", err, syscall.ECONNRESET)
		}
	})
}

func TestKernelGuestResets(t *testing.T) {
	eachKernel(t, kernelOptions{}, func(t *testing.T, r *kernelRing) {
		result := make(chan error, 1)
		c := r.dial(r.serve(func(c *net.TCPConn) error {
			if _, err := io.WriteString(c, "x"); err != nil {
				return err
			}
			_, err := c.Read(make([]byte, 1))
			result <- err
			return nil
		}))
		r.must(ring.Expect(c, "x"))
		c.SetLinger(0)
		r.must(c.Close())
		if err := <-result; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server reads %v, want %v", err, syscall.ECONNRESET)
		}
	})
}

func TestKernelLoss(t *testing.T) {
	for _, test := range []struct {
		name string
		loss float64
		size int64
	}{
		{"1%", 0.01, 64 * ring.MiB},
		{"5%", 0.05, 8 * ring.MiB},
	} {
		t.Run(test.name, func(t *testing.T) {
			eachKernel(t, kernelOptions{loss: test.loss}, func(t *testing.T, r *kernelRing) { r.lossy(test.size) })
		})
	}
}

// lossy moves size bytes down, and then up.
func (r *kernelRing) lossy(size int64) {
	received := make(chan error, 1)
	start := time.Now()
	r.must(ring.Verify(r.dial(r.serve(func(c *net.TCPConn) error {
		return ring.Send(c, size)
	})), size))
	r.t.Logf("down: %s", kernelRate(size, start))

	start = time.Now()
	r.must(ring.Send(r.dial(r.serve(func(c *net.TCPConn) error {
		received <- ring.Verify(c, size)
		return nil
	})), size))
	r.must(<-received)
	r.t.Logf("up: %s, %d frames lost", kernelRate(size, start), r.link.Lost())
}
