//go:build unix

package slirp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The goroutine that reads from a host that is silent ends, and the flow rests: the poller
// waits for its host, or a goroutine that is fresh. All of this is with sockets of the
// operating system: others are read from in another way.

// eachRest runs a test with flows that rest in either way. Their connections are somebody
// else's, for all that the Stack knows, if Dial is set.
func eachRest(t *testing.T, test func(t *testing.T, r *idleRig)) {
	for name, dial := range map[string]func(context.Context, string, string) (net.Conn, error){
		"poller": nil, "goroutine": new(net.Dialer).DialContext,
	} {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, fam family) { test(t, newIdleRig(t, fam, Config{Dial: dial})) })
		})
	}
}

// idleRig is a guest behind a NAT with real sockets.
type idleRig struct {
	*machine
	t        *testing.T
	listener *net.TCPListener
	port     uint16
	turns    int // that restWhile has asked for
}

func newIdleRig(t *testing.T, fam family, cfg Config) *idleRig {
	l, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	s, err := NewWithConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &idleRig{machine: newMachine(t, s), t: t, listener: l.(*net.TCPListener), port: 1024}
}

// connect opens a flow, and returns it and its three ends.
func (r *idleRig) connect() (*tcpConn, *guest, *net.TCPConn) {
	r.t.Helper()
	c, g := r.begin()
	return c, g, r.accept()
}

// begin opens a flow, and returns it and its guest.
func (r *idleRig) begin() (*tcpConn, *guest) {
	r.t.Helper()
	r.port++
	g := r.open(r.port, r.listener.Addr().(*net.TCPAddr).AddrPort())
	g.connect()
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, f := range r.s.flows {
		if c, ok := f.(*tcpConn); ok && c.key.guestPort == r.port {
			return c, g
		}
	}
	r.t.Fatal("no flow")
	return nil, nil
}

// accept returns the other end of the host's side of a flow.
func (r *idleRig) accept() *net.TCPConn {
	r.listener.SetDeadline(time.Now().Add(patience))
	far, err := r.listener.AcceptTCP()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(patience))
	return far
}

// rests reports whether the flow rests, and will do so until there is something to read.
func (r *idleRig) rests(c *tcpConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lookAt != 0 || c.silent || c.calledBack {
		return false
	}
	running := otherGoroutines()
	return strings.Contains(running, ".AwaitRead(") || r.s.ownDial && !strings.Contains(running, "(*tcpConn).")
}

// rest waits until the flow rests.
func (r *idleRig) rest(c *tcpConn) {
	r.t.Helper()
	r.until("the flow rests", func() bool { return r.rests(c) })
}

// TestIdleReader has everything happen to flows that rest.
func TestIdleReader(t *testing.T) {
	eachRest(t, func(t *testing.T, r *idleRig) {
		c, g, far := r.connect()
		for range 2 {
			r.rest(c)
			g.data("up")
			expectText(t, far, "up")
			r.rest(c)
			putText(t, far, "down")
			g.expectText("down")
		}
		r.rest(c)
		far.CloseWrite()
		g.expectFIN()
		g.data("still here")
		expectText(t, far, "still here")
		g.fin()
		r.expectFlows(0)

		c, g, far = r.connect()
		r.rest(c)
		far.SetLinger(0)
		far.Close()
		g.expect("R.")
		r.expectFlows(0)

		c, g, far = r.connect()
		r.rest(c)
		g.rst()
		expectErr(t, far, syscall.ECONNRESET)
		r.expectFlows(0)

		c, _, far = r.connect()
		r.rest(c)
		r.s.Close()
		expectErr(t, far, syscall.ECONNRESET)
	})
}

// TestProbedHost has the host of a flow that is not short asked whether it is still there,
// whatever the flow is at: the guest, whose own keep-alives are answered here, would never
// hear that it is not.
func TestProbedHost(t *testing.T) {
	for name, begin := range map[string]func(r *idleRig) *tcpConn{
		"silent": func(r *idleRig) *tcpConn {
			c, _, _ := r.connect()
			return c
		},
		"half-closed": func(r *idleRig) *tcpConn {
			var first sync.Once
			r.setHook(func([]byte) error { // of the SYN-ACK: nothing was read yet
				first.Do(func() { r.accept().CloseWrite() })
				return nil
			})
			c, g := r.begin()
			g.expectFIN()
			return c
		},
		"full": func(r *idleRig) *tcpConn {
			c, _, far := r.connect()
			go far.Write(make([]byte, 32<<20)) // of which the guest acknowledges nothing
			r.until("the buffer is full", func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				if !c.readWaits {
					return false
				}
				c.lookAt = c.stack.now()
				c.setTimer(c.lookAt)
				return true
			})
			return c
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachRest(t, func(t *testing.T, r *idleRig) {
				c := begin(r)
				raw, err := c.host.(*net.TCPConn).SyscallConn()
				if err != nil {
					t.Fatal(err)
				}
				r.until("the host is probed", func() bool {
					on := 0
					raw.Control(func(fd uintptr) {
						on, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
					})
					return on != 0 && err == nil
				})
			})
		})
	}
}

// until waits for something that no packet tells of.
func (m *machine) until(what string, done func() bool) {
	m.t.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(idleAfter / 10) {
		if time.Now().After(end) {
			m.t.Fatalf("not so: %s; %.5000s", what, otherGoroutines())
		}
	}
}

// restNow has the goroutine that reads end if host is silent, and reports whether it has
// asked for it.
func restNow(c *tcpConn) bool {
	c.mu.Lock()
	silent := c.silent && !c.calledBack && !c.gone
	if silent {
		c.idle, c.lookAt = true, c.stack.now()
	}
	c.mu.Unlock()
	c.onTimer()
	return silent
}

// TestRestingReader has goroutines end all the time, while data comes and when
// the flow ends: nothing is lost, neither a byte nor the end nor an error.
func TestRestingReader(t *testing.T) {
	ends := map[string]func(c *tcpConn, g *guest, far *net.TCPConn){
		"EOF": func(c *tcpConn, g *guest, far *net.TCPConn) {
			far.CloseWrite()
			g.expectFIN()
			g.fin()
		},
		"reset": func(c *tcpConn, g *guest, far *net.TCPConn) {
			far.SetLinger(0)
			far.Close()
			g.expect("R.")
		},
		"guest's reset": func(c *tcpConn, g *guest, far *net.TCPConn) {
			g.rst()
			expectErr(g.t, far, syscall.ECONNRESET)
		},
		"end": func(c *tcpConn, g *guest, far *net.TCPConn) {
			c.endSoon()
			g.expect("R.")
			expectErr(g.t, far, syscall.ECONNRESET)
		},
	}
	eachRest(t, func(t *testing.T, r *idleRig) {
		for name, end := range ends {
			t.Run(name, func(t *testing.T) {
				for range soak(5, 100) {
					c, g, far := r.connect()
					r.restWhile(c, func() {
						data := pattern(20_000)
						go func() {
							for p := data; len(p) > 0; {
								n := min(len(p), 1+rand.IntN(1000))
								far.Write(p[:n])
								p = p[n:]
								time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
							}
						}()
						if !bytes.Equal(g.takeLossy(len(data)), data) {
							t.Fatal("the data differs")
						}
						end(c, g, far)
						r.expectFlows(0)
					})
				}
				if r.turns == 0 {
					t.Error("no goroutine has ended")
				}
			})
		}
	})
}

// restWhile has a flow rest, again and again, until f returns.
func (r *idleRig) restWhile(c *tcpConn, f func()) {
	r.t.Helper()
	defer again(func() {
		if restNow(c) {
			r.turns++
		}
	})()
	f()
}

// again calls f again and again, beside the caller, until stop is called.
func again(f func()) (stop func()) {
	done := make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			f()
			time.Sleep(10 * time.Microsecond)
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// hold keeps a new flow from resting, and reports false if it does so already.
func (r *idleRig) hold(c *tcpConn) bool {
	for ; ; time.Sleep(idleAfter / 100) {
		c.mu.Lock()
		waits := c.silent && !c.calledBack
		if waits {
			c.lookAt = c.stack.now().Add(patience)
		}
		c.mu.Unlock()
		if waits || r.rests(c) {
			return waits
		}
	}
}

// TestOthersConn: the program may do what it likes with the connections that its Dial has
// returned. A deadline that is none of the Stack's ends the flow, as any other error of a
// read does, and so does Close, whether the flow rests or not.
func TestOthersConn(t *testing.T) {
	ends := map[string]func(net.Conn){
		"deadline": func(host net.Conn) { host.SetReadDeadline(time.Unix(1, 0)) },
		"close":    func(host net.Conn) { host.Close() },
	}
	eachFamily(t, func(t *testing.T, fam family) {
		r := newIdleRig(t, fam, Config{Dial: new(net.Dialer).DialContext})
		for name, end := range ends {
			for _, resting := range []bool{false, true} {
				c, g, far := r.connect()
				if resting || !r.hold(c) {
					r.rest(c)
				}
				end(c.host)
				g.expect("R.")
				want := error(syscall.ECONNRESET)
				if name == "close" {
					want = io.EOF // nobody has asked for a reset before
				}
				if _, err := far.Read(make([]byte, 1)); !errors.Is(err, want) {
					t.Errorf("%s: the host reads %v, want %v", name, err, want)
				}
				r.expectFlows(0)
			}
		}
	})
}

// TestIdleAfterWriter: how long the Writer has taken is no part of the time for which a
// host is silent, and makes no timer late.
func TestIdleAfterWriter(t *testing.T) {
	eachRest(t, func(t *testing.T, r *idleRig) {
		c, g, far := r.connect()
		r.rest(c)
		returned := make(chan moment, 1)
		r.setHook(func([]byte) error {
			r.setHook(nil)
			time.Sleep(2 * idleAfter)
			returned <- c.stack.now()
			return nil
		})
		putText(t, far, "down")
		g.expectText("down")
		since := <-returned
		for looked := false; !looked; time.Sleep(idleAfter / 100) {
			c.mu.Lock()
			if c.lookAt != 0 && c.silent {
				looked = true
				if c.lookAt < since.Add(idleAfter) {
					t.Errorf("lookAt %v and timerAt %v after the Writer has returned", c.lookAt.Sub(since), c.timerAt.Sub(since))
				}
			}
			looked = looked || c.stack.now().Sub(since) > 2*idleAfter // this machine is too slow to see it
			c.mu.Unlock()
		}
	})
}

// TestLull: a host is idle when it was silent for all of the time, and a reader is called
// back once.
func TestLull(t *testing.T) {
	var s Stack
	s.began = time.Now()
	var l lull
	if !l.begin(&s) || l.begin(&s) {
		t.Error("a second silence sets lookAt again, or the first does not")
	}
	l.end()
	if l.look(l.lookAt) || l.lookAt != 0 {
		t.Errorf("the host speaks: %+v", l)
	}
	l.begin(&s)
	l.end()
	l.begin(&s)
	again := l.lookAt.Add(idleAfter)
	if l.look(l.lookAt) || l.lookAt != again {
		t.Errorf("the host has spoken: %+v, want another look at %v", l, again)
	}
	if !l.look(again) || l.lookAt != 0 || !l.calledBack {
		t.Errorf("the host is idle: %+v", l)
	}
	if l.look(again) {
		t.Error("called back again")
	}
}
