package slirp

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// idleUDPRig is a guest whose datagrams go to real sockets.
type idleUDPRig struct {
	*udpGuest
	server *net.UDPConn
	peer   netip.AddrPort // the flow's socket
}

// eachUDPRest runs a test with flows and with mappings that rest.
func eachUDPRest(t *testing.T, cfg Config, test func(t *testing.T, r *idleUDPRig)) {
	for name, mapping := range map[string]UDPMapping{"flow": UDPMappingPerFlow, "mapping": UDPMappingEndpoint} {
		t.Run(name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, fam family) {
				cfg.UDPMapping = mapping
				s, err := NewWithConfig(cfg)
				if err != nil {
					t.Fatal(err)
				}
				server, to := udpServer(t, fam, 0)
				test(t, &idleUDPRig{udpGuest: newUDPGuest(newMachine(t, s), fam.guest, to), server: server})
			})
		})
	}
}

// hear takes a datagram of the guest.
func (r *idleUDPRig) hear(want string) {
	r.t.Helper()
	buf := make([]byte, 1<<16)
	n, peer, err := r.server.ReadFromUDPAddrPort(buf)
	if err != nil || string(buf[:n]) != want {
		r.t.Fatalf("the host got %q, %v, want %q", buf[:n], err, want)
	}
	r.peer = peer
}

// answer sends a datagram to the guest.
func (r *idleUDPRig) answer(text string) {
	r.t.Helper()
	if _, err := r.server.WriteToUDPAddrPort([]byte(text), r.peer); err != nil {
		r.t.Fatal(err)
	}
}

// flow returns the only flow.
func (r *idleUDPRig) flow() *udpFlow {
	r.s.mu.Lock()
	defer r.s.mu.Unlock()
	for _, f := range r.s.flows {
		return f.(*udpFlow)
	}
	r.t.Fatal("no flow")
	return nil
}

// rest waits until no goroutine reads from the flow's host.
func (r *idleUDPRig) rest() {
	r.t.Helper()
	f := r.flow()
	r.until("the flow rests", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.lookAt == 0 && !f.silent && !f.calledBack && !strings.Contains(otherGoroutines(), "(*udpFlow).")
	})
}

// TestIdleUDP has everything happen to flows that rest.
func TestIdleUDP(t *testing.T) {
	eachUDPRest(t, Config{}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		for range 2 {
			r.rest()
			r.answer("down")
			r.expect("down")
			r.rest()
			r.say("up")
			r.hear("up")
			r.answer("at once")
			r.expect("at once")
		}
		r.rest()
		if r.flow().mapping == nil {
			r.server.Close()
			r.say("anyone?")
			r.expectUnreachable(unreachablePort, udpPacket(r.from, r.to, []byte("anyone?")))
			r.rest()
		}
		r.expectStats(map[string]int{"flows": 1, "dialed": 1})
		r.s.Close() // and no goroutine is left: TestMain looks
	})
}

// A flow that rests ends when it has been idle for long enough, with its socket.
func TestIdleUDPExpiry(t *testing.T) {
	eachUDPRest(t, Config{UDPIdleTimeout: time.Hour}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		r.rest()
		f := r.flow()
		f.mu.Lock()
		f.active = f.active.Add(-2 * time.Hour)
		f.mu.Unlock()
		f.onTimer()
		r.until("the flow has ended", func() bool { return r.s.Stats().UDPFlows == 0 })
		r.until("its socket is closed", func() bool {
			_, err := f.socket().(*net.UDPConn).Write(nil)
			return err != nil && strings.Contains(err.Error(), net.ErrClosed.Error())
		})
		r.until("its goroutines have ended", func() bool { return !strings.Contains(otherGoroutines(), "(*udpFlow).") })
	})
}

// Where there is no descriptor to wait with, the goroutine goes on.
func TestIdleUDPWithoutPoller(t *testing.T) {
	eachUDPRest(t, Config{}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		f := r.flow()
		var limit syscall.Rlimit
		if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: 3, Max: limit.Max}); err != nil {
			t.Skip(err)
		}
		defer syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
		r.until("the flow has tried to rest", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return !f.rests
		})
		for range 3 {
			r.answer("down")
			r.expect("down")
		}
	})
}

// A host that speaks now and then is not idle.
func TestUDPHostSpeaks(t *testing.T) {
	eachUDPRest(t, Config{}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		f := r.flow()
		waits := func() (waits bool) {
			f.mu.Lock()
			defer f.mu.Unlock()
			if waits = f.silent && !f.calledBack && f.lookAt != 0; waits {
				f.lookAt = f.stack.now().Add(patience)
			}
			return waits
		}
		r.until("the reader waits", func() bool {
			if waits() {
				return true
			}
			r.answer("wake up")
			r.expect("wake up")
			return false
		})
		r.answer("down")
		r.expect("down")
		r.until("the reader waits again", waits)
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.idle {
			t.Error("idle")
		}
	})
}

// TestRestingUDP has goroutines end all the time while datagrams come: none is lost.
func TestRestingUDP(t *testing.T) {
	eachUDPRest(t, Config{}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		f := r.flow()
		turns := 0
		stop := again(func() {
			f.mu.Lock()
			if f.silent && !f.calledBack {
				f.idle, f.lookAt = true, f.stack.now()
				turns++
			}
			f.mu.Unlock()
			f.onTimer()
		})
		for i := range soak(500, 20_000) {
			r.answer(strconv.Itoa(i))
			r.expect(strconv.Itoa(i))
			time.Sleep(time.Duration(rand.IntN(300)) * time.Microsecond)
		}
		stop()
		if turns == 0 {
			t.Error("no goroutine has ended")
		}
	})
}

// TestUDPHostBurst has a host send more than a socket takes by itself while the guest's
// frames are written.
func TestUDPHostBurst(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/net/core/rmem_max")
	if n, _ := strconv.Atoi(strings.TrimSpace(string(limit))); err != nil || n < 200<<10 {
		t.Skipf("no socket may have a buffer: %d bytes, %v", n, err)
	}
	eachUDPRest(t, Config{}, func(t *testing.T, r *idleUDPRig) {
		r.say("hello")
		r.hear("hello")
		writing, release := make(chan bool, 1), make(chan bool)
		r.setHook(func(frame []byte) error {
			select {
			case writing <- true:
				<-release
			default:
			}
			return r.keep(frame)
		})
		r.answer("first")
		select {
		case <-writing:
		case <-time.After(patience):
			t.Fatal("no frame")
		}
		text := func(i int) string { return fmt.Sprintf("%4d%s", i, pattern(1396)) }
		const n = 150
		for i := range n {
			r.answer(text(i))
		}
		close(release)
		r.expect("first")
		for i := range n {
			r.expect(text(i))
		}
	})
}
