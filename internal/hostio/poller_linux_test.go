package hostio

import (
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// pollerRig is a Poller and connections that it may wait for.
type pollerRig struct {
	t          *testing.T
	p          *Poller
	goroutines sync.WaitGroup
}

func newPollerRig(t *testing.T) *pollerRig {
	r := &pollerRig{t: t}
	r.p = NewPoller(&r.goroutines)
	return r
}

// connect returns a connection, and its other end.
func (r *pollerRig) connect() (conn *net.TCPConn, far net.Conn) {
	r.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		r.t.Skip(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		r.t.Fatal(err)
	}
	if far, err = l.Accept(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close(); far.Close() })
	return c.(*net.TCPConn), far
}

// await returns what is sent to when there is something to read.
func (r *pollerRig) await(c *net.TCPConn) <-chan bool {
	r.t.Helper()
	ready := make(chan bool, 1)
	if !r.p.Await(c, func() { ready <- true }) {
		r.t.Fatal("Await is not possible")
	}
	return ready
}

// expectEpolls checks how many epoll descriptors this process has.
func (r *pollerRig) expectEpolls(want int) {
	r.t.Helper()
	if got := epolls(r.t); got != want {
		r.t.Errorf("%d descriptors to wait with, want %d", got, want)
	}
}

func epolls(t *testing.T) (n int) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.Contains(to, "[eventpoll]") {
			n++
		}
	}
	return n
}

const patience = 10 * time.Second

func expectReady(t *testing.T, ready <-chan bool) {
	t.Helper()
	select {
	case <-ready:
	case <-time.After(patience):
		t.Fatal("nothing has become ready")
	}
}

// TestPoller waits for what there is to read before Await and after it, for the end and
// for a reset, again and again, and has neither a goroutine nor a descriptor then.
func TestPoller(t *testing.T) {
	r := newPollerRig(t)
	conn, far := r.connect()
	before := epolls(t) // of the runtime
	b := make([]byte, 10)
	for range 3 {
		ready := r.await(conn)
		r.expectEpolls(before + 1)
		far.Write([]byte("x"))
		expectReady(t, ready)
		r.goroutines.Wait()
		r.expectEpolls(before)
		expectReady(t, r.await(conn)) // it was not read
		conn.Read(b)
	}
	far.(*net.TCPConn).CloseWrite()
	expectReady(t, r.await(conn))
	if _, err := conn.Read(b); err != io.EOF {
		t.Error(err)
	}
	conn, far = r.connect()
	ready := r.await(conn)
	far.(*net.TCPConn).SetLinger(0)
	far.Close()
	expectReady(t, ready)
	r.goroutines.Wait()
	r.expectEpolls(before)
}

// TestPollerMany: each hears of its own, once.
func TestPollerMany(t *testing.T) {
	r := newPollerRig(t)
	const n = 200
	var ready [n]<-chan bool
	var far [n]net.Conn
	var conns [n]*net.TCPConn
	for i := range n {
		conns[i], far[i] = r.connect()
		ready[i] = r.await(conns[i])
	}
	for i := range n / 2 {
		far[2*i].Write([]byte("x"))
	}
	for i := range n / 2 {
		expectReady(t, ready[2*i])
	}
	for i := range n / 2 {
		select {
		case <-ready[2*i+1]:
			t.Error("nothing was sent")
		default:
		}
		r.p.Forget(conns[2*i+1])
	}
	r.goroutines.Wait()
}

// TestPollerForget: nobody hears of a connection that is forgotten and closed, nor of
// another one that gets its descriptor.
func TestPollerForget(t *testing.T) {
	r := newPollerRig(t)
	kept, keptFar := r.connect()
	still := r.await(kept) // so that the Poller goes on
	conn, far := r.connect()
	ready := r.await(conn)
	r.p.Forget(conn)
	conn.Close()
	next, nextFar := r.connect()
	again := r.await(next)
	far.Write([]byte("x"))
	nextFar.Write([]byte("y"))
	expectReady(t, again)
	r.p.Forget(next) // is over anyway
	next.Close()
	if r.p.Await(next, func() { t.Error("it is closed") }) {
		t.Error("Await of a connection that is closed")
	}
	keptFar.Write([]byte("z"))
	expectReady(t, still)
	select {
	case <-ready:
		t.Error("it was forgotten")
	default:
	}
	r.goroutines.Wait()
}

// TestPollerRaces has connections become readable while they are forgotten, and checks
// that the Poller is at rest in the end.
func TestPollerRaces(t *testing.T) {
	r := newPollerRig(t)
	before := epolls(t)
	var wg sync.WaitGroup
	for range 4 {
		conn, far := r.connect()
		wg.Go(func() {
			for range 300 {
				ready := make(chan bool, 1)
				if !r.p.Await(conn, func() { ready <- true }) {
					t.Error("Await is not possible")
				}
				go far.Write([]byte("x"))
				r.p.Forget(conn)
			}
		})
	}
	wg.Wait()
	r.goroutines.Wait()
	r.expectEpolls(before)
}
