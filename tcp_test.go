package slirp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The life of a TCP flow through the NAT, seen from the guest and from the host.

func TestConnect(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.wrapStack()
		start := time.Now()
		g.syn()
		seg := g.expect("S.")
		if seg.at != start || g.ackOf(seg) != 1 || len(seg.payload) != 0 {
			t.Errorf("%s after %v", g.show(seg), seg.at.Sub(start))
		}
		if mss, _ := seg.option(2); int(binary.BigEndian.Uint16(mss)) != fam.mss {
			t.Errorf("MSS option %x, want %d", mss, fam.mss)
		}
		g.ack()
		call := h.dials()[0]
		if call.network != "tcp" || call.address != fam.at(80).String() ||
			call.flow != (Flow{0, "tcp", g.id.guest, fam.at(80)}) {
			t.Errorf("dialed %+v", call)
		}
		far := h.accept()
		g.data("ping")
		expectText(t, far, "ping")
		putText(t, far, "pong")
		g.expectText("pong")
		g.fin()
		expectEOF(t, far)
		far.expectState(t, "half")
		far.Close()
		g.expectFIN()
		far.expectState(t, "closed")
		m.expectFlows(0)
		g.silent(5 * time.Minute)
	})
}

// TestT014 offers every set of options.
func TestT014_OptionsAreAnswered(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		for i := range uint16(8) {
			g := m.open(1025+i, fam.at(80))
			g.opts = optMSS(fam.mss)
			if i&1 != 0 {
				g.opts = append(g.opts, optScale(7)...)
			}
			if i&2 != 0 {
				g.opts = append(g.opts, optSACKOK()...)
			}
			if i&4 != 0 {
				g.stamp = true
				g.opts = append(g.opts, optStamps(1000, 0)...)
			}
			g.connect() // the checker compares the options
			far := h.accept()
			g.data("hello")
			expectText(t, far, "hello")
			go far.Write(pattern(20000))
			if !bytes.Equal(g.take(20000), pattern(20000)) {
				t.Error("data differs")
			}
		}
	})
}

// TestRefusal is what the guest sees of each way to fail.
func TestRefusal(t *testing.T) {
	type icmp [2]byte // type and code
	tests := []struct {
		name  string
		err   error
		reset bool
		v4    icmp
		v6    icmp
	}{
		{"refused", dialError(syscall.ECONNREFUSED), true, icmp{}, icmp{}},
		{"net unreachable", dialError(syscall.ENETUNREACH), false, icmp{3, 0}, icmp{1, 0}},
		{"host unreachable", dialError(syscall.EHOSTUNREACH), false, icmp{3, 1}, icmp{1, 3}},
		{"no such host", &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}, false, icmp{3, 1}, icmp{1, 3}},
		{"access", dialError(syscall.EACCES), false, icmp{3, 13}, icmp{1, 1}},
		{"permission", dialError(syscall.EPERM), false, icmp{3, 13}, icmp{1, 1}},
		{"prohibited", fmt.Errorf("policy: %w", ErrProhibited), false, icmp{3, 13}, icmp{1, 1}},
		{"timeout", dialError(syscall.ETIMEDOUT), true, icmp{}, icmp{}},
		{"deadline", fmt.Errorf("dial: %w", os.ErrDeadlineExceeded), true, icmp{}, icmp{}},
		{"context", context.DeadlineExceeded, true, icmp{}, icmp{}},
		{"drop", fmt.Errorf("policy: %w", ErrDrop), false, icmp{}, icmp{}},
		{"something", errors.New("something"), true, icmp{}, icmp{}},
		{"files", dialError(syscall.EMFILE), true, icmp{}, icmp{}},
	}
	for _, test := range tests {
		for _, hook := range []string{"Allow", "Dial"} {
			t.Run(test.name+" from "+hook, func(t *testing.T) {
				inBubble(t, func(t *testing.T, fam family) {
					cfg := Config{}
					if hook == "Allow" {
						cfg.Allow = func(context.Context, Flow) error { return test.err }
					}
					m, h := newRig(t, cfg)
					h.setDial(refuse(test.err))
					g := m.open(1025, fam.at(80))
					syn := segment{src: g.id.guest, dst: g.id.host, seq: g.iss, flags: flagS, win: 65535, opts: g.opts}
					start := time.Now()
					g.syn()
					synctest.Wait()
					if n := len(h.dials()); n != map[string]int{"Allow": 0, "Dial": 1}[hook] {
						t.Errorf("%d dials", n)
					}
					seg, reset := g.next(0)
					if reset != test.reset {
						t.Fatalf("answered with a reset: %v, want %v", reset, test.reset)
					}
					if reset && (seg.flags != flagR|flagA || seg.seq != 0 || g.ackOf(seg) != 1 || seg.win != 0 || len(seg.opts) != 0) {
						t.Errorf("%v, want R. 0 ack 1", seg)
					}
					want := test.v4
					if fam.version == 6 {
						want = test.v6
					}
					if want != (icmp{}) {
						msg := m.takeICMP()
						if (icmp{msg.typ, msg.code}) != want || msg.src != fam.stack || msg.dst != fam.guest || msg.at != start {
							t.Errorf("ICMP %+v, want %v from %v", msg, want, fam.stack)
						}
						if !bytes.Equal(msg.body, syn.packet()) {
							t.Errorf("quoted %x, want the guest's packet %x", msg.body, syn.packet())
						}
					}
					m.quiet(time.Minute)
					if st := m.s.Stats(); st.TCPFlows != 0 || st.PendingDials != 0 ||
						(st.DropPolicy == 1) != (test.name == "drop") || (st.FlowsRefused == 1) == (test.name == "drop") {
						t.Errorf("%+v", st)
					}
					// The guest may try again.
					h.setDial(nil)
					if hook == "Dial" {
						g.connect()
					}
				})
			})
		}
	}
}

func TestT023_OneDialForManySYNs(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		start := time.Now()
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			time.Sleep(3500 * time.Millisecond)
			return h.connect(), nil
		})
		g := m.open(1025, fam.at(80))
		g.syn()
		time.Sleep(time.Second)
		g.syn()
		time.Sleep(2 * time.Second)
		g.syn()
		seg := g.expect("S.")
		if d := seg.at.Sub(start); d != 3500*time.Millisecond {
			t.Errorf("SYN-ACK after %v", d)
		}
		if n := len(h.dials()); n != 1 {
			t.Errorf("%d dials", n)
		}
		seg = g.expect("S.")
		if d := seg.at.Sub(start); d != 4500*time.Millisecond {
			t.Errorf("SYN-ACK again after %v", d)
		}
		g.ack()
		g.data("hello")
		expectText(t, h.accept(), "hello")
	})
}

func TestT025_NewSYN(t *testing.T) {
	t.Run("dial pending", func(t *testing.T) {
		inBubble(t, func(t *testing.T, fam family) {
			m, h := newRig(t, Config{})
			h.setDial(func(context.Context, Flow) (net.Conn, error) {
				time.Sleep(5 * time.Second)
				return h.connect(), nil
			})
			g := m.open(1025, fam.at(80))
			g.syn()
			time.Sleep(time.Second)
			g.iss = 5000 // it has begun anew, with other options
			g.opts = optMSS(1000)
			g.syn()
			seg := g.expect("S.")
			if g.ackOf(seg) != 1 {
				t.Errorf("%s, want ack 1", g.show(seg))
			}
			g.ack()
			far := h.accept()
			g.data("hello")
			expectText(t, far, "hello")
			if n := len(h.dials()); n != 1 {
				t.Errorf("%d dials", n)
			}
		})
	})
	t.Run("half-open", func(t *testing.T) {
		inBubble(t, func(t *testing.T, fam family) {
			m, h := newRig(t, Config{})
			g := m.open(1025, fam.at(80))
			g.syn()
			g.expect("S.")
			first := h.accept()
			time.Sleep(500 * time.Millisecond)
			old := g.iss
			g.iss = 5000
			g.syn()
			seg := g.expect(".") // a challenge, as RFC 5961 has it
			if seg.ack != old+1 {
				t.Errorf("%v, want ack %d", seg, old+1)
			}
			if n := m.s.Stats().TCPFlows; n != 1 {
				t.Errorf("%d flows", n)
			}
			g.must(g.give(segment{src: g.id.guest, dst: g.id.host, seq: seg.ack, flags: flagR}))
			expectErr(t, first, syscall.ECONNRESET)
			time.Sleep(time.Second)
			g.connect() // the SYN, sent again
			g.data("hello")
			expectText(t, h.accept(), "hello")
			if n := m.s.Stats().TCPFlows; n != 1 {
				t.Errorf("%d flows", n)
			}
		})
	})
}

func TestDialCancelledByGuest(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{DialTimeout: -1})
		ended := make(chan time.Time, 10)
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			_, err := hang(ctx, f)
			ended <- time.Now()
			return nil, err
		})
		for i, seq := range []uint32{0, 1} { // as in SYN-SENT, or answering something
			g := m.open(1025+uint16(i), fam.at(80))
			g.syn()
			time.Sleep(time.Minute)
			g.must(g.raw("R.", 100, 0, nil, nil)) // of something else
			g.must(g.raw(".", 1, 0, nil, nil))    // makes no sense
			g.must(g.raw("F", 1, 0, nil, nil))
			synctest.Wait()
			if len(ended) != 0 {
				t.Fatal("the dial ended early")
			}
			g.must(g.raw("R", seq, 0, nil, nil))
			synctest.Wait()
			if len(ended) != 1 {
				t.Fatal("the dial goes on")
			}
			<-ended
			g.silent(time.Minute)
			if st := m.s.Stats(); st.TCPFlows != 0 || st.PendingDials != 0 {
				t.Errorf("%+v", st)
			}
		}
	})
	// The connection comes all the same: it is closed.
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			time.Sleep(5 * time.Second)
			return h.connect(), nil
		})
		g := m.open(1025, fam.at(80))
		g.syn()
		g.must(g.raw("R", 1, 0, nil, nil))
		if n := m.s.Stats().TCPFlows; n != 0 {
			t.Errorf("%d flows", n)
		}
		expectEOF(t, h.accept())
		g.silent(time.Minute)
	})
}

func TestDialTimeout(t *testing.T) {
	for _, timeout := range []time.Duration{0, 5 * time.Second} {
		inBubble(t, func(t *testing.T, fam family) {
			m, h := newRig(t, Config{DialTimeout: timeout})
			h.setDial(hang)
			g := m.open(1025, fam.at(80))
			start := time.Now()
			g.syn()
			seg := g.expectWithin(time.Hour, "R.")
			want := timeout
			if want == 0 {
				want = 30 * time.Second
			}
			if d := seg.at.Sub(start); d != want {
				t.Errorf("reset after %v, want %v", d, want)
			}
			m.expectFlows(0)
		})
	}
}

func TestAllow(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		type key string
		var mu sync.Mutex
		var asked []Flow
		opened := 0
		m, h := newRig(t, Config{Allow: func(ctx context.Context, f Flow) error {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, f)
			if g, ok := FlowFromContext(ctx); !ok || g != f {
				t.Errorf("FlowFromContext: %v %v, want %v", g, ok, f)
			}
			if opened != 0 {
				t.Error("something was opened before Allow was asked")
			}
			return nil
		}})
		h.setDial(func(ctx context.Context, f Flow) (net.Conn, error) {
			mu.Lock()
			opened++
			mu.Unlock()
			return h.connect(), nil
		})
		g := m.open(1025, fam.at(80))
		g.syn()
		g.syn()
		g.expect("S.")
		g.ack()
		g.data("hello")
		expectText(t, h.accept(), "hello")
		synctest.Wait()
		if want := (Flow{0, "tcp", g.id.guest, g.id.host}); len(asked) != 1 || asked[0] != want {
			t.Errorf("Allow was asked for %v, want %v", asked, want)
		}
		mustListen(t, m.s, "tcp", fam.at(443).String())
		g = m.open(1026, fam.at(443))
		g.connect()
		if len(asked) != 1 {
			t.Errorf("Allow was asked for a flow to a listener: %v", asked)
		}
		if fam.version == 6 { // a mapped address in an IPv6 header
			opened = 0
			g := m.open(1027, netip.MustParseAddrPort("[::ffff:127.0.0.1]:80"))
			g.connect()
			want := netip.MustParseAddrPort("127.0.0.1:80")
			if len(asked) != 2 || asked[1].Destination != want {
				t.Errorf("Allow was asked for %v, want %v", asked[1:], want)
			}
			if calls := h.dials(); calls[1].address != "127.0.0.1:80" {
				t.Errorf("dialed %+v", calls[1])
			}
		}
		if f, ok := FlowFromContext(context.WithValue(t.Context(), key("x"), 1)); ok {
			t.Errorf("FlowFromContext of another context: %v", f)
		}
	})
}

// TestLastWords has either side end first, and a last word from the other.
func TestLastWords(t *testing.T) {
	for _, first := range []string{"guest", "host"} {
		t.Run(first, func(t *testing.T) {
			eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
				if first == "guest" {
					g.fin()
					expectEOF(t, far)
					putText(t, far, "bye")
					far.CloseWrite()
					g.expectText("bye")
					g.expectFIN()
				} else {
					far.CloseWrite()
					g.expectFIN()
					g.data("bye")
					g.fin()
					expectText(t, far, "bye")
					expectEOF(t, far)
				}
				g.expectFlows(0)
				time.Sleep(2 * time.Minute)
				if st := g.s.Stats(); st.TimeWait != 0 {
					t.Errorf("%d in TIME-WAIT after two minutes", st.TimeWait)
				}
			})
		})
	}
}

// TestSlowReaderGetsEverything closes both directions while the far end has not read yet.
func TestSlowReaderGetsEverything(t *testing.T) {
	for _, first := range []string{"guest", "far end"} {
		t.Run(first, func(t *testing.T) {
			eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
				up := pattern(400_000)
				if first == "far end" {
					far.CloseWrite()
					g.expectFIN()
				}
				g.upload(up)
				g.fin()
				if first == "guest" {
					g.expectACK()
					far.CloseWrite()
					g.expectFIN()
				}
				// Both directions have ended. Minutes later, it reads.
				time.Sleep(5 * time.Minute)
				got, err := io.ReadAll(far)
				if err != nil || !bytes.Equal(got, up) {
					t.Errorf("read %d bytes of %d, %v", len(got), len(up), err)
				}
			})
		})
	}
}

// TestSlowHost is the guest's side of back-pressure; the far end reads little by
// little.
func TestSlowHost(t *testing.T) {
	eachEnd(t, Config{ReceiveBuffer: 64 << 10}, func(t *testing.T, g *guest, far farEnd) {
		up := pattern(1_000_000)
		done := make(chan error)
		go func() {
			got := make([]byte, 0, len(up))
			buf := make([]byte, 20_000)
			for len(got) < len(up) {
				time.Sleep(50 * time.Millisecond)
				n, err := far.Read(buf)
				if err != nil {
					done <- err
					return
				}
				got = append(got, buf[:n]...)
			}
			if !bytes.Equal(got, up) {
				done <- errors.New("data differs")
			}
			done <- nil
		}()
		g.upload(up)
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestSlowGuest: what the guest does not take stays on the host.
func TestSlowGuest(t *testing.T) {
	eachEnd(t, Config{SendBuffer: 128 << 10}, func(t *testing.T, g *guest, far farEnd) {
		g.win = 0
		g.ack()
		written := make(chan int, 1)
		down := pattern(2_000_000)
		go func() {
			n, err := far.Write(down)
			if err != nil {
				t.Error(err)
			}
			written <- n
		}()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if len(written) != 0 {
			t.Fatal("2 MB went into buffers of 128 KiB")
		}
		g.win = 65535
		g.ack()
		got := g.take(len(down))
		if !bytes.Equal(got, down) {
			t.Error("data differs")
		}
		if n := <-written; n != len(down) {
			t.Errorf("wrote %d", n)
		}
	})
}

// TestSlowGuestBound looks at how much is read from the host ahead of the guest.
func TestSlowGuestBound(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{SendBuffer: 64 << 10})
		h.buffer = 1 << 20
		g := m.open(1025, fam.at(80))
		g.win = 0
		g.connect()
		far := h.accept()
		putText(t, far, string(pattern(1<<20)))
		time.Sleep(time.Minute)
		far.pair.mu.Lock()
		left := len(far.out.buf)
		far.pair.mu.Unlock()
		if taken := 1<<20 - left; taken > 64<<10 {
			t.Errorf("%d bytes were read for a send buffer of 64 KiB", taken)
		}
	})
}

func TestHostResetAfterData(t *testing.T) {
	// What the host has said before it failed reaches the guest first.
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		putText(t, far, "last words")
		synctest.Wait()
		far.abort()
		if seg := g.expect("."); string(seg.payload) != "last words" {
			t.Errorf("%s", g.show(seg))
		}
		if seg := g.expect("R."); g.seqOf(seg) != 11 {
			t.Errorf("%s, want R. 11", g.show(seg))
		}
		m.expectFlows(0)
	})
}

// TestHostEndsAfterWriteError: the host has closed, and the guest goes on.
func TestHostEndsAfterWriteError(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		putText(t, far, "no more, thanks")
		far.Close() // with nothing unread: a FIN; what comes then is refused
		g.expectText("no more, thanks")
		g.expectFIN()
		g.data("more")
		g.expectRST()
		m.expectFlows(0)
	})
}

// TestConnWithoutCloseWrite is a host connection that has Close only.
func TestConnWithoutCloseWrite(t *testing.T) {
	type plain struct{ net.Conn }
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) { return plain{h.connect()}, nil })
		// The host ends first, then the guest.
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		putText(t, far, "hello")
		far.CloseWrite()
		g.expectText("hello")
		g.expectFIN()
		g.data("bye")
		g.fin()
		expectText(t, far, "bye")
		expectEOF(t, far)
		// The guest ends first: it sees an end too, not a reset.
		g = m.open(1026, fam.at(80))
		g.connect()
		far = h.accept()
		g.data("bye")
		g.fin()
		expectText(t, far, "bye")
		expectEOF(t, far)
		g.expectFIN()
		m.expectFlows(0)
	})
}

// stuckConn is a host connection of which one method does not return until it is
// let go.
type stuckConn struct {
	*hostConn
	method string
	in     chan bool // closed when the method was called
	out    chan bool
	once   sync.Once
}

func (c *stuckConn) wait(method string) {
	if method == c.method {
		c.once.Do(func() { close(c.in) })
		<-c.out
	}
}
func (c *stuckConn) Write(b []byte) (int, error) { c.wait("Write"); return c.hostConn.Write(b) }
func (c *stuckConn) CloseWrite() error           { c.wait("CloseWrite"); return c.hostConn.CloseWrite() }
func (c *stuckConn) SetLinger(n int) error       { c.wait("SetLinger"); return c.hostConn.SetLinger(n) }
func (c *stuckConn) Close() error                { c.wait("Close"); return c.hostConn.Close() }

// TestStuckHost: a host connection that hangs in any call holds up neither
// HandlePacket nor another flow.
func TestStuckHost(t *testing.T) {
	for _, method := range []string{"Write", "CloseWrite", "Close", "SetLinger"} {
		t.Run(method, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, fam family) {
				// In real time: who waits for a lock is not idle in a bubble.
				m, h := newRig(t, Config{})
				stuck := &stuckConn{method: method, in: make(chan bool), out: make(chan bool)}
				defer close(stuck.out)
				h.setDial(func(context.Context, Flow) (net.Conn, error) {
					c := h.connect()
					if f := len(h.conns); f == 1 && stuck.hostConn == nil {
						stuck.hostConn = c
						return stuck, nil
					}
					return c, nil
				})
				g := m.open(1025, fam.at(80))
				g.connect()
				far := h.accept()
				prompt := func(what string, f func()) {
					t.Helper()
					done := make(chan bool)
					go func() {
						defer close(done)
						f()
					}()
					select {
					case <-done:
					case <-time.After(2 * time.Second):
						t.Errorf("%s waits for %s of a host connection", what, method)
					}
				}
				say := func(flags string, seq uint32) {
					if err := g.raw(flags, seq, g.rcv, nil, nil); err != nil {
						t.Error(err)
					}
				}
				prompt("HandlePacket of data", func() { g.raw("P.", 1, g.rcv, nil, []byte("hello")) })
				switch method {
				case "CloseWrite":
					prompt("HandlePacket of a FIN", func() { say("F.", 6) })
				case "Close":
					far.CloseWrite()
					g.expectFIN()
					prompt("HandlePacket of a FIN", func() { say("F.", 6) })
				case "SetLinger":
					expectText(t, far, "hello")
					prompt("HandlePacket of a reset", func() { say("R.", 6) })
				}
				select {
				case <-stuck.in:
				case <-time.After(2 * time.Second):
					t.Fatalf("%s was not called", method)
				}
				prompt("HandlePacket of an ACK", func() { say(".", 7) })
				prompt("Stats", func() { m.s.Stats() })
				prompt("another flow", func() {
					other := m.open(1026, fam.at(80))
					if err := other.raw("S", 0, 0, nil, nil); err != nil {
						t.Error(err)
					}
					m.waitFor(time.Second, func() bool { return len(m.flow(other.id).queue) > 0 })
				})
			})
		})
	}
}

func TestKeepAlive(t *testing.T) {
	t.Run("no answer", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			start := time.Now()
			for i := range 3 {
				seg := g.expectWithin(time.Hour, ".")
				if want := 2*time.Minute + time.Duration(i)*5*time.Second; seg.at.Sub(start) != want || g.seqOf(seg) != 0 || len(seg.payload) > 0 {
					t.Errorf("probe %d: %s after %v, want %v", i, g.show(seg), seg.at.Sub(start), want)
				}
			}
			seg := g.expectWithin(time.Hour, "R.")
			if want := 2*time.Minute + 15*time.Second; seg.at.Sub(start) != want {
				t.Errorf("reset after %v, want %v", seg.at.Sub(start), want)
			}
			if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ETIMEDOUT) {
				t.Errorf("far end: %v", err)
			}
			g.expectFlows(0)
		})
	})
	t.Run("answers", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			end := time.Now().Add(48 * time.Hour)
			probes := 0
			for time.Now().Before(end) {
				g.expectWithin(time.Hour, ".")
				probes++
				time.Sleep(time.Second)
				g.ack()
			}
			if probes < 1400 || probes > 1450 {
				t.Errorf("%d probes in two days", probes)
			}
			g.data("still here")
			expectText(t, far, "still here")
		})
	})
	t.Run("traffic", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			go io.Copy(io.Discard, far)
			for range 100 {
				time.Sleep(time.Minute)
				g.data("x")
				g.expectACK()
			}
		})
	})
	t.Run("off", func(t *testing.T) {
		eachEnd(t, Config{TCPIdleTimeout: -1}, func(t *testing.T, g *guest, far farEnd) {
			g.silent(30 * 24 * time.Hour)
			g.data("still here")
			expectText(t, far, "still here")
		})
	})
}

// TestTimeWaitReuse has the far end close first, and the guest use its port again.
func TestTimeWaitReuse(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		far := dial(g)
		// Much data in no time: the clock of the initial sequence numbers does
		// not keep up with it.
		down := pattern(1 << 20)
		go func() {
			far.Write(down)
			far.Close()
		}()
		if !bytes.Equal(g.take(len(down)), down) {
			t.Error("data differs")
		}
		g.expectFIN()
		g.fin()
		g.expect(".")
		if st := m.s.Stats(); st.TimeWait != 1 || st.TCPFlows != 0 {
			t.Fatalf("%d in TIME-WAIT, %d flows", st.TimeWait, st.TCPFlows)
		}
		g.rst() // RFC 1337: this does not end it
		if st := m.s.Stats(); st.TimeWait != 1 {
			t.Error("a reset ended TIME-WAIT")
		}
		g.fin() // again
		if seg := g.expect("."); g.ackOf(seg) != g.nxt-1 {
			t.Errorf("%s, want an ACK of the FIN", g.show(seg))
		}
		last := g.irs + g.rcv
		old := g.iss
		g.iss += g.nxt + 1000 // above the old connection's
		far = dial(g)
		if int32(g.irs-last) <= 0 {
			t.Errorf("the new connection begins at %d, %d below the end of the old one (RFC 6191)", g.irs, last-g.irs)
		}
		g.data("hello")
		expectText(t, far, "hello")
		synctest.Wait() // until the old connection's host was told of the end
		if st := m.s.Stats(); st.TimeWait != 0 || st.TCPFlows != 1 {
			t.Errorf("%d in TIME-WAIT, %d flows", st.TimeWait, st.TCPFlows)
		}
		// A SYN from the past of a connection in TIME-WAIT begins nothing.
		far.Close()
		g.expectFIN()
		g.fin()
		g.expect(".")
		iss := g.iss
		g.iss = old
		nxt, rcv := g.nxt, g.rcv
		time.Sleep(time.Second)
		g.syn()
		seg := g.expect(".")
		if seg.ack != iss+nxt || seg.seq != g.irs+rcv {
			t.Errorf("an old SYN: %v", seg)
		}
		time.Sleep(61 * time.Second)
		if st := m.s.Stats(); st.TimeWait != 0 {
			t.Error("TIME-WAIT did not end")
		}
	})
}

func TestT021_SYNACKRetransmission(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.wrapStack()
		start := time.Now()
		g.syn()
		far := h.accept()
		for _, want := range []time.Duration{0, 1, 3, 7, 15, 31} {
			seg := g.expectWithin(time.Hour, "S.")
			if d := seg.at.Sub(start); d != want*time.Second {
				t.Errorf("SYN-ACK after %v, want %v", d, want*time.Second)
			}
		}
		expectErr(t, far, syscall.ECONNRESET)
		if d := time.Since(start); d != 63*time.Second {
			t.Errorf("given up after %v", d)
		}
		m.expectFlows(0)
		g.silent(time.Minute)
		g.ack()
		if seg := g.expect("R"); g.seqOf(seg) != 1 {
			t.Errorf("late ACK: %s, want R 1", g.show(seg))
		}
		if n := m.s.Stats().TCPFlows; n != 0 {
			t.Errorf("%d flows", n)
		}
	})
}

func TestT022_DuplicateSYN(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.syn()
		first := g.expect("S.")
		for range 10 {
			time.Sleep(10 * time.Millisecond)
			g.must(g.raw("S", 0, 0, optMSS(100), nil)) // other options count for nothing
		}
		synctest.Wait()
		again := g.drop()
		for _, seg := range again {
			if seg.seq != first.seq || seg.flags != flagS|flagA {
				t.Errorf("%s, want the SYN-ACK again", g.show(seg))
			}
		}
		if len(again) > 2 {
			t.Errorf("%d answers to 10 SYNs in 100 ms", len(again))
		}
		if n := m.s.Stats().TCPFlows; n != 1 {
			t.Errorf("%d flows", n)
		}
	})
}

func TestT026_BadACKInSYNReceived(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.syn()
		g.expect("S.")
		g.rcv = 1
		for _, ack := range []uint32{0, 2} {
			g.must(g.raw(".", 1, ack, nil, nil))
			if seg := g.expect("R"); seg.seq != g.irs+ack {
				t.Errorf("ack %d: %s", ack, g.show(seg))
			}
		}
		g.ack()
		g.data("x")
		g.expectACK()
	})
}

func TestT028_DataOnSYN(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.must(g.raw("S", 0, 0, g.opts, []byte("0123456789")))
		seg := g.expect("S.")
		g.nxt, g.rcv = 1, 1
		if g.ackOf(seg) != 1 && g.ackOf(seg) != 11 {
			t.Fatalf("%s", g.show(seg))
		}
		g.data("0123456789")
		g.data("end")
		g.expectACK()
	})
}

// TestT064 resets the connection from every state.
func TestT064_Reset(t *testing.T) {
	states := []struct {
		name string
		to   func(t *testing.T, g *guest, far farEnd)
	}{
		{"ESTABLISHED", func(*testing.T, *guest, farEnd) {}},
		{"FIN-WAIT-1", func(t *testing.T, g *guest, far farEnd) { far.CloseWrite(); g.expect("F.") }},
		{"FIN-WAIT-2", func(t *testing.T, g *guest, far farEnd) { far.CloseWrite(); g.expectFIN() }},
		{"CLOSE-WAIT", func(t *testing.T, g *guest, far farEnd) { g.fin(); g.expectACK() }},
		{"LAST-ACK", func(t *testing.T, g *guest, far farEnd) { g.fin(); g.expectACK(); far.CloseWrite(); g.expect("F.") }},
		{"CLOSING", func(t *testing.T, g *guest, far farEnd) {
			far.CloseWrite()
			g.expect("F.")
			g.fin()
			g.expect(".")
		}},
	}
	for _, state := range states {
		t.Run(state.name, func(t *testing.T) {
			eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
				state.to(t, g, far)
				for _, seq := range []uint32{g.nxt - 1, g.nxt + 1<<22} { // outside of the window
					g.must(g.raw("R", seq, 0, nil, nil))
				}
				synctest.Wait()
				if q := g.drop(); len(q) != 0 || g.s.Stats().TCPFlows != 1 {
					t.Fatalf("a reset outside of the window: %v", q)
				}
				for range 1000 { // in the window: challenged, now and then
					g.must(g.raw("R", g.nxt+1, 0, nil, nil))
				}
				synctest.Wait()
				if q := g.drop(); len(q) != 1 || g.s.Stats().TCPFlows != 1 || g.ackOf(q[0]) != g.nxt {
					t.Fatalf("1000 resets in the window: %v", q)
				}
				g.must(g.raw("R.", g.nxt, g.rcv, nil, make([]byte, 20)))
				g.expectFlows(0)
				g.silent(time.Minute)
				if h, ok := far.(*hostConn); ok && state.name != "LAST-ACK" && state.name != "CLOSING" { // where both have said all
					expectErr(t, far, syscall.ECONNRESET)
					h.expectState(t, "reset")
				}
				if _, err := far.Write([]byte("x")); err == nil {
					t.Error("Write after a reset succeeded")
				}
			})
		})
	}
	t.Run("SYN-RECEIVED", func(t *testing.T) {
		eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
			g := m.open(1025, to)
			g.syn()
			g.expect("S.")
			g.must(g.raw("R", 2, 0, nil, nil))
			g.expect(".")
			g.must(g.raw("R", 1, 0, nil, nil))
			m.expectFlows(0)
			g.silent(time.Minute)
			g.must(g.raw(".", 1, 1, nil, nil))
			g.expect("R")
		})
	})
}

func TestT068_SYNInConnection(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		for _, seq := range []uint32{g.nxt - 1, g.nxt, g.nxt + 1000, g.nxt + 1<<22} {
			time.Sleep(time.Second)
			g.must(g.raw("S", seq, 0, g.opts, nil))
			if seg := g.expect("."); g.ackOf(seg) != g.nxt || g.seqOf(seg) != g.rcv {
				t.Errorf("SYN at %d: %s", seq, g.show(seg))
			}
		}
		g.data("hello")
		expectText(t, far, "hello")
	})
}

func TestT069_ChallengesPerFlow(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		a, b := m.open(1025, to), m.open(1026, to)
		dial(a)
		dial(b)
		for range 1000 {
			a.must(a.raw("R", a.nxt+1, 0, nil, nil))
			time.Sleep(time.Millisecond)
		}
		b.must(b.raw("R", b.nxt+1, 0, nil, nil))
		synctest.Wait()
		if n := len(a.drop()); n < 1 || n > 3 {
			t.Errorf("%d challenges in a second", n)
		}
		if n := len(b.drop()); n != 1 {
			t.Errorf("%d challenges on the other flow", n)
		}
	})
}

func TestT070_ZeroWindow(t *testing.T) {
	eachEnd(t, Config{ReceiveBuffer: 4096}, func(t *testing.T, g *guest, far farEnd) {
		go far.Write([]byte("hello"))
		seg := g.expect(".")
		if string(seg.payload) != "hello" {
			t.Fatalf("%s", g.show(seg))
		}
		n := 0
		for n = range 1000 {
			synctest.Wait()
			g.mu.Lock()
			room := int32(g.flow(g.id).edge - g.iss - g.nxt)
			g.mu.Unlock()
			if room <= 0 {
				break
			}
			g.say("P.", make([]byte, min(int(room), 1000))...)
		}
		if n > 200 {
			t.Fatal("the window does not close")
		}
		g.rcv += 5
		g.ack() // it counts although the window is closed
		time.Sleep(time.Second)
		synctest.Wait()
		g.drop()
		g.silent(10 * time.Second)
		g.rst()
		g.expectFlows(0)
	})
}

func TestT034_ResetBehindData(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		g := m.open(1025, fam.at(80))
		g.connect()
		g.data("0123456789")
		g.rst()
		m.expectFlows(0)
		c := mustAccept(t, l)
		expectText(t, c, "0123456789")
		if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %d, %v", n, err)
		}
		if _, err := c.Write([]byte("x")); err == nil {
			t.Error("Write succeeded")
		}
		c.Close()
	})
}

func TestT035_ISN(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		m.ownISS = true
		g := m.open(1025, fam.at(80))
		isn := func() uint32 {
			t.Helper()
			g.connect()
			mustAccept(t, l)
			g.rst()
			m.expectFlows(0)
			return g.irs
		}
		first := isn()
		time.Sleep(time.Second)
		if d := isn() - first; d < 249_000 || d > 251_000 {
			t.Errorf("a second later the number is %d higher, want 250,000", d)
		}
		// Every byte of the number takes every value about as often.
		const n = 1 << 14
		var seen [4][256]int
		key := g.key()
		other, _ := newRig(t, Config{})
		same := 0
		for i := range n {
			key.guestPort = uint16(i)
			a := m.s.tcbConfig(key, m.s.now(), nil)
			b := other.s.tcbConfig(key, other.s.now(), nil)
			if a.ISS == b.ISS || a.ISS == a.TSOffset {
				same++
			}
			for j := range seen {
				seen[j][byte(a.ISS>>(8*j))]++
			}
		}
		if same > 2 {
			t.Errorf("%d numbers are the same in another Stack", same)
		}
		for j := range seen {
			chi := 0.0
			for _, k := range seen[j] {
				d := float64(k) - n/256
				chi += d * d / (n / 256)
			}
			if chi > 400 { // 255 degrees of freedom: one in 10^8
				t.Errorf("byte %d: chi square %.0f", j, chi)
			}
		}
	})
}

func TestT036_AddressesThatAreNoHost(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		for i, bad := range map[int][]string{
			4: {"255.255.255.255", "224.0.0.1", "239.255.255.250", "0.0.0.0"},
			6: {"ff02::1", "ff0e::5", "::", "::ffff:224.0.0.1", "::ffff:0.0.0.0"},
		}[fam.version] {
			a := netip.MustParseAddr(bad)
			for _, seg := range []segment{
				{src: netip.AddrPortFrom(fam.guest, 1025), dst: netip.AddrPortFrom(a, 80)},
				{src: netip.AddrPortFrom(a, 1025), dst: fam.at(80)},
			} {
				seg.seq, seg.win = 100, 1000
				for _, flags := range []byte{flagS, flagA, flagF | flagA} {
					seg.flags = flags
					before := m.s.Stats().DropAddress
					m.mustSend(seg.packet())
					if n := m.s.Stats().DropAddress - before; n != 1 {
						t.Errorf("%d: %v to %v: DropAddress +%d", i, seg.src, seg.dst, n)
					}
				}
			}
		}
		m.quiet(time.Second)
		land := segment{src: fam.at(80), dst: fam.at(80), flags: flagS, win: 1000}
		m.mustSend(land.packet())
		for _, ports := range [][2]uint16{{0, 80}, {1025, 0}, {0, 0}} {
			m.mustSend(segment{src: netip.AddrPortFrom(fam.guest, ports[0]), dst: fam.at(ports[1]), flags: flagS, win: 1000}.packet())
		}
		m.quiet(time.Second)
		if n := len(h.dials()); n != 0 {
			t.Errorf("%d dials", n)
		}
		if st := m.s.Stats(); st.DropPort != 3 || st.TCPFlows != 0 {
			t.Errorf("%+v", st)
		}
	})
}

func TestT008_ECNSetup(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.must(g.raw("SEW", 0, 0, g.opts, nil))
		g.nxt = 1
		g.expect("S.") // without ECE
		g.ack()
		g.data("x")
		g.expectACK()
	})
}

// TestLinkMoves has the guest speak from another place: its flows follow.
func TestLinkMoves(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		old := g.machine
		moved := newMachine(t, g.s)
		moved.mac, moved.gw = [6]byte{2, 9, 9, 9, 9, 1}, [6]byte{2, 9, 9, 9, 9, 2}
		moved.flows = g.flows
		before := old.frames
		g.machine = moved
		g.data("from here")
		expectText(t, far, "from here")
		g.expectACK()
		putText(t, far, "to there")
		g.expectText("to there")
		if old.frames != before {
			t.Errorf("%d frames went to the old place", old.frames-before)
		}
	})
}

func TestWriterErrors(t *testing.T) {
	t.Run("returned", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			full := errors.New("ring is full")
			synctest.Wait() // whoever has sent the SYN-ACK would send the answer, too
			g.setHook(func([]byte) error { return full })
			if err := g.raw("P.", g.nxt+10, g.rcv, nil, []byte("out of order")); err != full {
				t.Errorf("HandlePacket: %v, want the Writer's error", err)
			}
		})
		inBubble(t, func(t *testing.T, fam family) {
			m, _ := newRig(t, Config{})
			full := errors.New("ring is full")
			m.setHook(func([]byte) error { return full })
			mustListen(t, m.s, "tcp", fam.at(443).String())
			if err := m.open(1025, fam.at(443)).raw("S", 0, 0, nil, nil); err != full {
				t.Errorf("SYN to a listener: %v", err)
			}
			if err := m.open(1026, fam.at(80)).raw(".", 0, 0, nil, nil); err != full {
				t.Errorf("stray ACK: %v", err)
			}
		})
	})
	t.Run("lossy", func(t *testing.T) {
		eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
			n := 0
			g.setHook(func(frame []byte) error {
				if n++; n%7 == 3 {
					return errors.New("lost")
				}
				return nil
			})
			down := pattern(200_000)
			go far.Write(down)
			if got := g.takeLossy(len(down)); !bytes.Equal(got, down) {
				t.Error("data differs")
			}
		})
	})
}

// takeLossy is take for a link that loses frames: it keeps what comes out of
// order, and acknowledges every segment.
func (g *guest) takeLossy(n int) []byte {
	g.t.Helper()
	data := make([]byte, n)
	have := make([]bool, n+1)
	from := g.rcv
	for int(g.rcv-from) < n {
		seg, ok := g.next(5 * time.Minute)
		if !ok {
			g.t.Fatalf("%d of %d bytes, then nothing", g.rcv-from, n)
		}
		if seg.flags&(flagR|flagS) != 0 {
			g.t.Fatalf("%s", g.show(seg))
		}
		off := int(int32(g.seqOf(seg) - from))
		if off+len(seg.payload) <= max(off, 0) {
			continue
		}
		if off < 0 { // some of it was there before
			off, seg.payload = 0, seg.payload[-off:]
		}
		copy(data[off:], seg.payload)
		for i := range seg.payload {
			have[off+i] = true
		}
		for have[g.rcv-from] {
			g.rcv++
		}
		g.raw(".", g.nxt, g.rcv, nil, nil)
	}
	return data
}

// TestStuckWriter: a Writer that does not return delays its own flow only.
func TestStuckWriter(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		a, b := m.open(1025, fam.at(80)), m.open(1026, fam.at(80))
		a.connect()
		farA := h.accept()
		b.connect()
		farB := h.accept()
		release := make(chan bool)
		m.setHook(func(frame []byte) error {
			if bytes.Contains(frame, []byte("stuck")) {
				<-release
			}
			return nil
		})
		putText(t, farA, "stuck")
		synctest.Wait()
		start := time.Now()
		a.data("in the meantime") // taken all the same
		expectText(t, farA, "in the meantime")
		b.data("hello")
		expectText(t, farB, "hello")
		putText(t, farB, "world")
		b.expectText("world")
		c := m.open(1027, fam.at(80))
		c.connect()
		if d := time.Since(start); d != 0 {
			t.Errorf("the others waited %v", d)
		}
		time.Sleep(10 * time.Second)
		close(release)
		a.expectText("stuck")
	})
}

// TestSlowWriterTimers: the timers of a flow do not lag behind by the time that
// its Writer takes.
func TestSlowWriterTimers(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		var returned time.Time
		m.setHook(func(frame []byte) error {
			if returned.IsZero() {
				time.Sleep(20 * time.Second)
				returned = time.Now()
			}
			return nil
		})
		go func() {
			time.Sleep(10 * time.Second)
			far.Write([]byte("hello"))
		}()
		g.must(g.raw("P.", g.nxt+10, g.rcv, nil, []byte("out of order"))) // is acknowledged at once
		if seg := g.expect("."); len(seg.payload) != 0 {
			t.Errorf("%s", g.show(seg))
		}
		g.expectWithin(time.Minute, ".")
		seg := g.expectWithin(time.Minute, ".")
		if d := seg.at.Sub(returned); string(seg.payload) != "hello" || d > time.Second {
			t.Errorf("sent again %v after the Writer had returned: %s", d, g.show(seg))
		}
	})
}

// TestFramesInOrder: the frames of one flow leave in order, though many goroutines cause
// them.
func TestFramesInOrder(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.buffer = 1 << 20
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		var mu sync.Mutex
		var next uint32
		var out []uint32
		busy := 0
		m.setHook(func(frame []byte) error {
			b := frame[14+20:]
			if fam.version == 6 {
				b = frame[14+40:]
			}
			mu.Lock()
			defer mu.Unlock()
			if busy++; busy != 1 {
				t.Error("two frames of one flow at a time")
			}
			mu.Unlock()
			seq := binary.BigEndian.Uint32(b[4:]) - g.irs
			n := uint32(len(b)) - uint32(b[12]>>4)*4
			mu.Lock()
			busy--
			if n > 0 && seq != next && next != 0 {
				out = append(out, seq)
			}
			if n > 0 {
				next = seq + n
			}
			return nil
		})
		down := pattern(1 << 20)
		go far.Write(down)
		go io.Copy(io.Discard, far)
		var wg sync.WaitGroup
		if got := func() []byte {
			for i := range 4 {
				wg.Add(1)
				go func() { // out of order: each is answered
					defer wg.Done()
					for j := range 50 {
						g.raw("P.", 2+uint32(100*i+10*j), 1, nil, []byte("x"))
					}
				}()
			}
			defer wg.Wait()
			return g.takeLossy(len(down))
		}(); !bytes.Equal(got, down) {
			t.Error("data differs")
		}
		mu.Lock()
		defer mu.Unlock()
		if len(out) > 10 { // a retransmission may happen on a busy machine
			t.Errorf("out of order at %v", out[:10])
		}
	})
}

func TestTimeWaitCap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fam := families[0]
		m, _ := newRig(t, Config{TCPIdleTimeout: -1})
		l := mustListen(t, m.s, "tcp", fam.at(80).String())
		for i := range uint16(maxTimeWait + 100) {
			g := m.open(1000+i, fam.at(80))
			g.connect()
			mustAccept(t, l).Close()
			g.expectFIN()
			g.fin()
			m.mu.Lock()
			delete(m.flows, g.id)
			m.kept = nil
			m.mu.Unlock()
		}
		if st := m.s.Stats(); st.TimeWait != maxTimeWait || st.TCPFlows != 0 {
			t.Errorf("%d in TIME-WAIT, want %d", st.TimeWait, maxTimeWait)
		}
		time.Sleep(2 * time.Minute)
		if st := m.s.Stats(); st.TimeWait != 0 {
			t.Errorf("%d in TIME-WAIT two minutes later", st.TimeWait)
		}
	})
}

func TestNamespacesOfFlows(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		other := newMachine(t, m.s)
		other.ns = 7
		other.mac = [6]byte{2, 0, 0, 0, 0, 7}
		a, b := m.open(1025, fam.at(80)), other.open(1025, fam.at(80)) // the same four numbers
		a.connect()
		farA := h.accept()
		b.connect()
		farB := h.accept()
		if call := h.dials()[1]; call.flow.Namespace != 7 {
			t.Errorf("dialed for %v", call.flow)
		}
		a.data("from a")
		b.data("from b")
		expectText(t, farA, "from a")
		expectText(t, farB, "from b")
		putText(t, farB, "to b")
		b.expectText("to b")
		a.drop()
		a.rst()
		expectErr(t, farA, syscall.ECONNRESET)
		b.data("still here")
		expectText(t, farB, "still here")
	})
}

// TestLoopback runs the NAT over real sockets.
func TestLoopback(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		l, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
		if err != nil {
			t.Skip(err)
		}
		defer l.Close()
		to := l.Addr().(*net.TCPAddr).AddrPort()
		m := newMachine(t, New())
		accept := func() *net.TCPConn {
			t.Helper()
			l.(*net.TCPListener).SetDeadline(time.Now().Add(patience))
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(patience))
			return c.(*net.TCPConn)
		}
		up, down := pattern(3_000_000), pattern(3_000_000)
		g := m.open(1025, to)
		g.connect()
		c := accept()
		done := make(chan error, 1)
		go func() {
			got, err := io.ReadAll(c)
			if err == nil && !bytes.Equal(got, up) {
				err = fmt.Errorf("%d bytes differ", len(got))
			}
			c.Write(down)
			c.CloseWrite()
			done <- err
		}()
		g.upload(up)
		g.fin()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if !bytes.Equal(g.takeLossy(len(down)), down) {
			t.Error("download differs")
		}
		for { // the FIN may have been with the last data
			seg, ok := g.next(patience)
			if !ok {
				t.Fatal("no FIN")
			}
			if seg.flags&flagF != 0 {
				break
			}
		}
		g.rcv++
		g.ack()
		m.expectFlows(0)

		g = m.open(1026, to)
		g.connect()
		c = accept()
		g.rst()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("guest reset: the host reads %v", err)
		}
		g = m.open(1027, to)
		g.connect()
		c = accept()
		c.SetLinger(0)
		c.Close()
		g.expect("R.")
		l.Close()
		g = m.open(1028, to)
		g.syn()
		g.expect("R.")
		m.expectFlows(0)
	})
}

// TestConcurrentGuests has many flows at once, in real time.
func TestConcurrentGuests(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		ln := mustListen(t, m.s, "tcp", fam.at(443).String())
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				go func() { io.Copy(c, c); c.Close() }()
			}
		}()
		go func() {
			for c := range h.conns {
				go func() { io.Copy(c, c); c.Close() }()
			}
		}()
		defer close(h.conns)
		var wg sync.WaitGroup
		for i := range uint16(8) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for j := range uint16(20) {
					port := fam.at(80)
					if j%2 == 0 {
						port = fam.at(443)
					}
					g := m.open(2000+100*i+j, port)
					if g.raw("S", 0, 0, g.opts, nil) != nil {
						t.Error("SYN failed")
					}
					seg, ok := g.next(patience)
					if !ok || seg.flags != flagS|flagA {
						t.Errorf("no SYN-ACK: %v", seg)
						return
					}
					g.irs, g.nxt, g.rcv = seg.seq, 1, 1
					text := fmt.Sprintf("hello %d %d", i, j)
					g.raw("FP.", 1, 1, nil, []byte(text))
					var got []byte
					for fin := false; !fin; {
						seg, ok := g.next(patience)
						if !ok || seg.flags&flagR != 0 {
							t.Errorf("%q, then %v", got, seg)
							return
						}
						if g.seqOf(seg) == g.rcv {
							got = append(got, seg.payload...)
							g.rcv += seg.length()
							fin = seg.flags&flagF != 0
						}
					}
					g.raw(".", uint32(2+len(text)), g.rcv, nil, nil)
					if string(got) != text {
						t.Errorf("echo of %q: %q", text, got)
					}
				}
			}()
		}
		wg.Wait()
		m.expectFlows(0)
		m.s.Close()
	})
}

// TestWindowBehindReordering: a segment that overtook others does not keep theirs
// from telling the window.
func TestWindowBehindReordering(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		g := m.open(1025, to)
		g.opts = optMSS(1000) // windows are not scaled
		g.win = 4000
		far := dial(g)
		go far.Write(pattern(50_000))
		g.must(g.raw("P.", g.nxt+10, g.rcv, nil, []byte("overtakes")))
		synctest.Wait()
		for _, seg := range g.drop() {
			g.rcv += uint32(len(seg.payload))
		}
		g.win = 1000
		g.data("0123456789")
		synctest.Wait()
		for _, seg := range g.drop() { // the checker fails what is beyond the window
			if end := g.seqOf(seg) + uint32(len(seg.payload)); int32(end-g.rcv) > 1000 {
				t.Fatalf("%s, the window ends at %d", g.show(seg), g.rcv+1000)
			}
		}
	})
}

// TestACKInSYNReceived: what is not acceptable is answered from SND.NXT on, which
// is behind the SYN, however small the window of the guest's SYN.
func TestACKInSYNReceived(t *testing.T) {
	eachRig(t, Config{}, func(t *testing.T, m *machine, dial func(*guest) farEnd, to netip.AddrPort) {
		for i, win := range []uint16{0, 1, 65535} {
			g := m.open(1025+uint16(i), to)
			g.win = win
			g.syn()
			g.expect("S.")
			g.must(g.raw("P.", 0xffff0000, 1, nil, []byte("old")))
			if seg := g.expect("."); g.seqOf(seg) != 1 || g.ackOf(seg) != 1 {
				t.Errorf("window %d: %s, want . 1 ack 1", win, g.show(seg))
			}
		}
	})
}

func TestQuoteIsTheGuestsPacket(t *testing.T) {
	// The SYN that is quoted is the guest's latest.
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		h.setDial(func(context.Context, Flow) (net.Conn, error) {
			time.Sleep(time.Second)
			return nil, dialError(syscall.EHOSTUNREACH)
		})
		g := m.open(1025, fam.at(80))
		g.syn()
		g.iss = 99
		g.syn()
		want := segment{src: g.id.guest, dst: g.id.host, seq: g.iss, flags: flagS, win: 65535, opts: g.opts}.packet()
		if msg := m.takeICMP(); !bytes.Equal(msg.body, want) {
			t.Errorf("quoted %x, want %x", msg.body, want)
		}
		// A long packet is quoted as far as the RFC allows, not beyond.
		h.setDial(refuse(ErrProhibited))
		g = m.open(1026, fam.at(80))
		g.must(g.raw("S", 0, 0, g.opts, make([]byte, 1000)))
		if msg := m.takeICMP(); len(msg.body) < 28 || !slices.Equal(msg.body[:28], segment{src: g.id.guest, dst: g.id.host, seq: g.iss, flags: flagS,
			win: 65535, opts: g.opts, payload: make([]byte, 1000)}.packet()[:28]) {
			t.Errorf("quoted %x", msg.body)
		}
	})
}

// TestT144_GuestKeepAlive answers the probes of the guest, and takes no data from
// them.
func TestT144_GuestKeepAlive(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		g.data("x")
		g.expectACK()
		for _, garbage := range []string{"", "\x00"} {
			time.Sleep(30 * time.Second)
			g.must(g.raw(".", g.nxt-1, g.rcv, nil, []byte(garbage)))
			if seg := g.expect("."); g.ackOf(seg) != g.nxt || g.seqOf(seg) != g.rcv {
				t.Errorf("%s", g.show(seg))
			}
		}
		g.data("y")
		expectText(t, far, "xy")
	})
}

// TestT145_Urgent: urgent data is data, and the pointer is not believed.
func TestT145_Urgent(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		want := ""
		for i, pointer := range []uint16{0, 1, 5, 6, 1000, 65535} {
			for _, flags := range []string{"U.", "UP.", "."} {
				text := fmt.Sprintf("<%d %s>", i, flags)
				want += text
				seg := segment{src: g.id.guest, dst: g.id.host, seq: g.iss + g.nxt, ack: g.irs + g.rcv, flags: parseFlags(flags), win: g.win,
					payload: []byte(text)}
				g.mu.Lock()
				g.flow(g.id).offered(&seg)
				g.mu.Unlock()
				p := seg.packet()
				off, _ := tcpOffset(p)
				binary.BigEndian.PutUint16(p[off+18:], pointer)
				repair(p)
				g.mustSend(p)
				g.nxt += uint32(len(text))
			}
		}
		g.say("FU.", []byte("end")...)
		expectText(t, far, want+"end")
		expectEOF(t, far)
	})
}

// TestT146_ICMPAboutLiveFlow: nothing that anybody says about a connection by ICMP
// ends it.
func TestT146_ICMPAboutLiveFlow(t *testing.T) {
	eachEnd(t, Config{}, func(t *testing.T, g *guest, far farEnd) {
		down := pattern(100_000)
		go far.Write(down)
		seg := g.expect(".") // its packet is what the messages are about
		quote := segment{src: seg.src, dst: seg.dst, seq: seg.seq, ack: seg.ack, flags: flagA, win: seg.win}.packet()
		proto := byte(1)
		if g.id.host.Addr().Is6() {
			proto = 58
		}
		for typ := range 16 {
			for code := range 16 {
				for _, rest := range []uint32{0, 100, 68, 1280, 1400} { // the MTU, for some of them
					head := []byte{byte(typ), byte(code), 0, 0}
					head = binary.BigEndian.AppendUint32(head, rest)
					g.mustSend(refPacket(g.id.guest.Addr(), g.id.host.Addr(), proto, append(head, quote...), 2))
				}
			}
		}
		g.rcv += uint32(len(seg.payload))
		g.ack()
		got := append(seg.payload, g.takeLossy(len(down)-len(seg.payload))...)
		if !bytes.Equal(got, down) {
			t.Error("data differs")
		}
	})
}

// TestOneSegmentAndFINAfterLostSYNACK: cwnd is one segment after a lost SYN-ACK; a
// FIN behind exactly one segment does not hold it back.
func TestOneSegmentAndFINAfterLostSYNACK(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		lost := false
		m.setHook(func(f []byte) error {
			if !lost {
				lost = true
				return errors.New("lost")
			}
			return nil
		})
		g := m.open(1025, fam.at(80))
		g.syn()
		far := h.accept()
		far.Write(pattern(fam.mss))
		far.CloseWrite()
		g.expect("S.")
		g.ack()
		start, probes := time.Now(), 0
		for {
			seg, ok := g.next(10 * time.Minute)
			if !ok {
				t.Fatalf("no data in %v", time.Since(start))
			}
			if len(seg.payload) > 0 {
				return
			}
			g.ack() // alive
			if probes++; probes > 20 {
				t.Fatalf("no data in %v, but %d keep-alive probes, all answered; flows %d", time.Since(start), probes, m.s.Stats().TCPFlows)
			}
		}
	})
}

// TestReconnect: a virtual machine that reconnects hears on its old flows what it
// waits for, through the Writer of its latest packet.
func TestReconnect(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, h := newRig(t, Config{})
		g := m.open(1025, fam.at(80))
		g.connect()
		far := h.accept()
		time.Sleep(5 * time.Second)
		// The VM reconnects: another Writer. Its first packets are of other flows.
		var frames atomic.Int32
		w := func(f []byte) error { frames.Add(1); return nil }
		seg := segment{src: netip.AddrPortFrom(fam.guest, 2000), dst: fam.at(81), seq: 5, flags: flagS, win: 1000}
		m.setHook(func([]byte) error { return errors.New("gone") })
		if err := m.s.HandlePacket(0, m.mac, m.gw, seg.packet(), w); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		before := frames.Load()
		if before == 0 {
			t.Fatal("no SYN-ACK")
		}
		// silence that other flow
		rst := segment{src: netip.AddrPortFrom(fam.guest, 2000), dst: fam.at(81), seq: 6, flags: flagR, win: 1000}
		m.s.HandlePacket(0, m.mac, m.gw, rst.packet(), w)
		synctest.Wait()
		before = frames.Load()
		putText(t, far, "news")
		time.Sleep(time.Minute)
		if n := frames.Load() - before; n == 0 {
			t.Errorf("the data of the flow went %d times to the Writer that is gone, never to the guest's present one", m.s.Stats().DropWriter)
		}
	})
}

// TestTimestampsGoOn: the next connection of the same addresses and ports does not
// begin with an older timestamp (RFC 6191).
func TestTimestampsGoOn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		key := &flowKey{0, ipAddrFrom(fam.guest), ipAddrFrom(fam.stack), 22, 50000, protoTCP, uint16(fam.version)}
		first := m.s.tcbConfig(key, m.s.now(), nil)
		time.Sleep(10 * time.Second)
		second := m.s.tcbConfig(key, m.s.now(), nil)
		if int32(second.TSOffset-(first.TSOffset+10000)) < 0 {
			t.Error("the next connection of the same addresses and ports begins with an older timestamp")
		}
	})
}

// TestDialWithoutConnection: a Dial that returns nothing at all has failed.
func TestDialWithoutConnection(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		for _, mapping := range []UDPMapping{UDPMappingPerFlow, UDPMappingEndpoint} {
			m, h := newRig(t, Config{
				UDPMapping:   mapping,
				ListenPacket: func(context.Context, string, string) (net.PacketConn, error) { return nil, nil },
			})
			h.setDial(func(context.Context, Flow) (net.Conn, error) { return nil, nil })
			g := m.open(1025, fam.at(80))
			g.syn()
			g.expectRST()
			m.mustSend(udpPacket(netip.AddrPortFrom(fam.guest, 1025), fam.at(9), []byte("lost")))
			synctest.Wait()
			if st := m.s.Stats(); st.FlowsRefused != 2 || st.FlowsDialed != 0 || st.TCPFlows+st.UDPFlows+st.PendingDials != 0 {
				t.Errorf("%+v", st)
			}
		}
	})
}

// TestLatestFlow: the flow that had the latest segment is found without the table for as
// long as that has it, and no longer; a connection of the same name after it is another.
func TestLatestFlow(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		m, _ := newRig(t, Config{})
		mustListen(t, m.s, "tcp", fam.at(80).String())
		first, second := m.open(1025, fam.at(80)), m.open(1026, fam.at(80))
		is := func(g *guest) bool {
			c := m.s.latest.Load()
			if g == nil || c == nil {
				return g == nil && c == nil
			}
			return c.key == *g.key()
		}
		first.connect()
		second.connect()
		if !is(second) {
			t.Error("the latest flow is not the one that spoke last")
		}
		first.data("x")
		first.expectACK()
		if !is(first) {
			t.Error("the latest flow is not the one that spoke last")
		}
		second.rst()
		if first.ack(); !is(first) {
			t.Error("the end of another flow is that of the latest")
		}
		before := m.s.latest.Load()
		if first.rst(); !is(nil) {
			t.Error("a flow is the latest and gone")
		}
		again := m.open(1025, fam.at(80))
		again.connect()
		again.ack()
		if c := m.s.latest.Load(); c == before || !is(again) {
			t.Error("the new connection is not the latest flow")
		}
		m.s.Close()
		if !is(nil) {
			t.Error("a flow is the latest of a Stack that is closed")
		}
	})
}
