//go:build unix

package slirp

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The goroutine that reads from a host that is silent makes way for a fresh one. All of
// this is with sockets of the operating system: others are read from in another way.

// idleRig is a guest behind a NAT with real sockets.
type idleRig struct {
	*machine
	t        *testing.T
	listener *net.TCPListener
	port     uint16
	renewals int // that renewWhile has asked for
}

func newIdleRig(t *testing.T, fam family) *idleRig {
	l, err := net.Listen("tcp", netip.AddrPortFrom(fam.loopback, 0).String())
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { l.Close() })
	return &idleRig{machine: newMachine(t, New()), t: t, listener: l.(*net.TCPListener), port: 1024}
}

// connect opens a flow, and returns it and its three ends.
func (r *idleRig) connect() (*tcpConn, *guest, *net.TCPConn) {
	r.t.Helper()
	r.port++
	g := r.open(r.port, r.listener.Addr().(*net.TCPAddr).AddrPort())
	g.connect()
	r.listener.SetDeadline(time.Now().Add(patience))
	far, err := r.listener.AcceptTCP()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { far.Close() })
	far.SetDeadline(time.Now().Add(patience))
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, f := range r.s.flows {
		if c, ok := f.(*tcpConn); ok && c.key.guestPort == r.port {
			return c, g, far
		}
	}
	r.t.Fatal("no flow")
	return nil, nil, nil
}

// rest waits until a goroutine that is fresh waits for the host of the flow, and will
// do so, with nothing that would renew it again, until there is something to read.
func (r *idleRig) rest(c *tcpConn) {
	r.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(idleAfter / 10) {
		c.mu.Lock()
		settled := c.lookAt.IsZero() && !c.silent && !c.renewing
		c.mu.Unlock()
		if settled && strings.Contains(otherGoroutines(), ".AwaitRead(") {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("the goroutine is not fresh: %.5000s", otherGoroutines())
		}
	}
}

// TestIdleReader has everything happen to flows that rest.
func TestIdleReader(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		r := newIdleRig(t, fam)
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

// renewNow has the goroutine that reads make way if host is silent, and reports whether
// it has asked for it.
func renewNow(c *tcpConn) bool {
	c.mu.Lock()
	silent := c.silent && !c.renewing && !c.gone
	if silent {
		c.idle, c.lookAt = true, time.Now()
	}
	c.mu.Unlock()
	c.onTimer()
	return silent
}

// TestRenewedReader has goroutines make way all the time, while data comes and when
// the flow ends: nothing is lost, neither a byte nor the end nor an error.
func TestRenewedReader(t *testing.T) {
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
	eachFamily(t, func(t *testing.T, fam family) {
		for name, end := range ends {
			t.Run(name, func(t *testing.T) {
				r := newIdleRig(t, fam)
				for range soak(5, 100) {
					c, g, far := r.connect()
					r.renewWhile(c, func() {
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
				if r.renewals == 0 {
					t.Error("no goroutine made way")
				}
			})
		}
	})
}

// renewWhile renews the reader of a flow until f returns.
func (r *idleRig) renewWhile(c *tcpConn, f func()) {
	r.t.Helper()
	done := make(chan bool)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if renewNow(c) {
				r.renewals++
			}
			time.Sleep(10 * time.Microsecond)
		}
	})
	defer func() {
		close(done)
		wg.Wait()
	}()
	f()
}

// hold keeps the goroutine that reads from the host of a new flow from making way, and
// reports false if it does so already.
func (r *idleRig) hold(c *tcpConn) bool {
	for ; ; time.Sleep(idleAfter / 100) {
		c.mu.Lock()
		waits := c.silent && !c.renewing
		if waits {
			c.lookAt = time.Now().Add(patience)
		}
		c.mu.Unlock()
		if waits || strings.Contains(otherGoroutines(), ".AwaitRead(") {
			return waits
		}
	}
}

// TestRenewedReaderDeadline: a deadline that is none of the Stack's ends the flow, as
// any other error of a read does, and so it does on a fresh goroutine.
func TestRenewedReaderDeadline(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		r := newIdleRig(t, fam)
		for _, resting := range []bool{false, true} {
			c, g, far := r.connect()
			if resting || !r.hold(c) {
				r.rest(c)
			}
			c.host.SetReadDeadline(time.Unix(1, 0))
			g.expect("R.")
			if _, err := far.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the host reads %v", err)
			}
			r.expectFlows(0)
		}
	})
}

// TestIdleAfterWriter: how long the Writer has taken is no part of the time for which a
// host is silent, and makes no timer late.
func TestIdleAfterWriter(t *testing.T) {
	eachFamily(t, func(t *testing.T, fam family) {
		r := newIdleRig(t, fam)
		c, g, far := r.connect()
		r.rest(c)
		returned := make(chan time.Time, 1)
		r.setHook(func([]byte) error {
			r.setHook(nil)
			time.Sleep(2 * idleAfter)
			returned <- time.Now()
			return nil
		})
		putText(t, far, "down")
		g.expectText("down")
		since := <-returned
		for looked := false; !looked; time.Sleep(idleAfter / 100) {
			c.mu.Lock()
			if !c.lookAt.IsZero() && c.silent {
				looked = true
				if c.lookAt.Before(since.Add(idleAfter)) {
					t.Errorf("lookAt %v and timerAt %v after the Writer has returned", c.lookAt.Sub(since), c.timerAt.Sub(since))
				}
			}
			looked = looked || time.Since(since) > 2*idleAfter // this machine is too slow to see it
			c.mu.Unlock()
		}
	})
}
