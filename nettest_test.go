package slirp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/KarpelesLab/slirp"
)

// Conformance of the connections that Accept and DialContext return: what every
// net.Conn must do, for both ends, over both families, each connection between
// two Stacks that are joined Writer to HandlePacket.

// connFamily is one address family: the addresses of a server and of a client.
type connFamily struct {
	name           string
	server, client netip.Addr
	everyone       netip.Prefix
}

var connFamilies = []connFamily{
	{"IPv4", netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParsePrefix("0.0.0.0/0")},
	{"IPv6", netip.MustParseAddr("fd00:a::1"), netip.MustParseAddr("fd00:a::2"), netip.MustParsePrefix("::/0")},
}

const connPort = 7000

func init() {
	slirp.ConformanceTests["TestConn"] = TestConn
	slirp.ConformanceTests["TestConnUDP"] = TestConnUDP
}

func (f connFamily) serverAddr() string { return netip.AddrPortFrom(f.server, connPort).String() }

// joinStacks returns two Stacks, each of which handles the other's frames. The
// client dials from the client addresses of connFamilies. Both are closed when
// the test ends.
func joinStacks(t testing.TB, serverConfig slirp.Config) (server, client *slirp.Stack) {
	t.Helper()
	server = newStack(t, serverConfig)
	client = newStack(t, slirp.Config{
		Addresses: []netip.Addr{connFamilies[0].client, connFamilies[1].client},
		Allow:     func(context.Context, slirp.Flow) error { return slirp.ErrProhibited },
	})
	serverMAC, clientMAC := [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	const etherHeaderLen = 14
	var toServer, toClient slirp.Writer
	toServer = func(frame []byte) error {
		return server.HandlePacket(0, clientMAC, serverMAC, frame[etherHeaderLen:], toClient)
	}
	toClient = func(frame []byte) error {
		return client.HandlePacket(0, serverMAC, clientMAC, frame[etherHeaderLen:], toServer)
	}
	for _, f := range connFamilies {
		if err := client.AddRoute(0, f.everyone, serverMAC, clientMAC, toServer); err != nil {
			t.Fatalf("AddRoute: %v", err)
		}
	}
	return server, client
}

func newStack(t testing.TB, cfg slirp.Config) *slirp.Stack {
	t.Helper()
	s, err := slirp.NewWithConfig(cfg)
	if err != nil {
		t.Fatalf("NewWithConfig: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Stack.Close: %v", err)
		}
	})
	return s
}

// tcpConn is what a connection of this package has beyond net.Conn.
type tcpConn interface {
	net.Conn
	CloseRead() error
	CloseWrite() error
	SetLinger(sec int) error
}

var _ tcpConn = (*slirp.VirtualConn)(nil)

// connect returns the two ends of a new connection to a listener of the server.
// They are closed when the test ends.
func connect(t testing.TB, f connFamily, server, client *slirp.Stack) (accepted, dialled tcpConn) {
	t.Helper()
	listener, err := server.Listen("tcp", f.serverAddr())
	if err != nil {
		t.Fatalf("Listen: %v", err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := client.DialContext(ctx, "tcp", f.serverAddr())
	if err != nil {
		t.Fatalf("DialContext: %v", err)
	}
	t.Cleanup(func() { conn.Close() })
	other, err := listener.Accept()
	if err != nil {
		t.Fatalf("Accept: %v", err)
	}
	t.Cleanup(func() { other.Close() })
	return other.(tcpConn), conn.(tcpConn)
}

// eachConn runs the test for every family and with either end as c1. A test that
// does not end is a failure that shows every goroutine.
func eachConn(t *testing.T, test func(t *testing.T, c1, c2 tcpConn)) {
	for _, f := range connFamilies {
		for _, c1 := range []string{"accepted", "dialled"} {
			t.Run(f.name+"/"+c1, func(t *testing.T) {
				failIfStuck(t, 5*time.Minute)
				server, client := joinStacks(t, slirp.Config{})
				accepted, dialled := connect(t, f, server, client)
				if c1 == "accepted" {
					test(t, accepted, dialled)
				} else {
					test(t, dialled, accepted)
				}
			})
		}
	}
}

func failIfStuck(t *testing.T, limit time.Duration) {
	watchdog := time.AfterFunc(limit, func() {
		stacks := make([]byte, 1<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		panic(fmt.Sprintf("%s is stuck after %v\n\n%s", t.Name(), limit, stacks))
	})
	t.Cleanup(func() { watchdog.Stop() })
}

func TestConn(t *testing.T) {
	tests := []struct {
		name string
		test func(t *testing.T, c1, c2 tcpConn)
	}{
		{"BasicIO", testBasicIO},
		{"PingPong", testPingPong},
		{"RacyRead", testRacyRead},
		{"RacyWrite", testRacyWrite},
		{"ReadTimeout", testReadTimeout},
		{"WriteTimeout", testWriteTimeout},
		{"PastTimeout", testPastTimeout},
		{"PresentTimeout", testPresentTimeout},
		{"FutureTimeout", testFutureTimeout},
		{"CloseTimeout", testCloseTimeout},
		{"ConcurrentMethods", testConcurrentMethods},
		{"WholeWrites", testWholeWrites},
		{"Addrs", testAddrs},
		{"EOF", testEOF},
		{"CloseWrite", testCloseWrite},
		{"CloseRead", testCloseRead},
		{"LingerZero", testLingerZero},
		{"CloseUnread", testCloseUnread},
		{"CloseTwice", testCloseTwice},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { eachConn(t, test.test) })
	}
}

var (
	never   = time.Time{}
	longAgo = time.Unix(1, 0)
)

// noise returns n bytes that are the same for the same seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

// Eight MiB each way at the same time, each ended by CloseWrite, arrive whole.
func testBasicIO(t *testing.T, c1, c2 tcpConn) {
	const size = 8 << 20
	data1, data2 := noise(1, size), noise(2, size)
	var wg sync.WaitGroup
	wg.Go(func() { writeInPieces(t, c1, data1) })
	wg.Go(func() { writeInPieces(t, c2, data2) })
	wg.Go(func() { readToEnd(t, c1, data2) })
	wg.Go(func() { readToEnd(t, c2, data1) })
	wg.Wait()
}

// writeInPieces writes data in pieces of many sizes, and then ends its direction.
func writeInPieces(t *testing.T, c tcpConn, data []byte) {
	for size := 1; len(data) > 0; size = size*7%65521 + 1 {
		piece := data[:min(size, len(data))]
		if n, err := c.Write(piece); n != len(piece) || err != nil {
			t.Errorf("Write of %d bytes = %d, %v", len(piece), n, err)
			return
		}
		data = data[len(piece):]
	}
	if err := c.CloseWrite(); err != nil {
		t.Errorf("CloseWrite: %v", err)
	}
}

// readToEnd reads until a bare io.EOF and compares.
func readToEnd(t *testing.T, c net.Conn, want []byte) {
	var got []byte
	buf := make([]byte, 40000)
	for {
		n, err := c.Read(buf)
		got = append(got, buf[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Errorf("Read: %v after %d bytes of %d", err, len(got), len(want))
			return
		}
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%d bytes arrived that differ from the %d sent", len(got), len(want))
	}
}

// A number goes to and fro, and each end adds one.
func testPingPong(t *testing.T, c1, c2 tcpConn) {
	const rounds = 2000
	play := func(c tcpConn, next uint64) {
		defer c.CloseWrite()
		var ball [8]byte
		for ; next < rounds; next += 2 {
			if next > 0 {
				if _, err := io.ReadFull(c, ball[:]); err != nil {
					t.Errorf("round %d: %v", next, err)
					return
				}
				if got := binary.BigEndian.Uint64(ball[:]); got != next-1 {
					t.Errorf("round %d: got %d", next, got)
					return
				}
			}
			binary.BigEndian.PutUint64(ball[:], next)
			if _, err := c.Write(ball[:]); err != nil {
				t.Errorf("round %d: %v", next, err)
				return
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { play(c1, 0) })
	wg.Go(func() { play(c2, 1) })
	wg.Wait()
	if _, err := io.ReadFull(c1, make([]byte, 8)); err != nil {
		t.Errorf("the last ball: %v", err)
	}
	if n, err := c2.Read(make([]byte, 8)); n != 0 || err != io.EOF {
		t.Errorf("Read after the game = %d, %v, want io.EOF", n, err)
	}
}

// Many readers whose deadlines pass share one stream: each byte reaches one of
// them, once.
func testRacyRead(t *testing.T, c1, c2 tcpConn) {
	const size, readers = 1 << 20, 10
	go func() {
		c2.Write(noise(3, size))
		c2.CloseWrite()
	}()
	var want, got [256]int
	for _, b := range noise(3, size) {
		want[b]++
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			buf := make([]byte, 1024)
			for {
				c1.SetReadDeadline(time.Now().Add(time.Millisecond))
				n, err := c1.Read(buf)
				mu.Lock()
				for _, b := range buf[:n] {
					got[b]++
				}
				mu.Unlock()
				if err == io.EOF {
					return
				}
				if err != nil && !isTimeout(t, "read", err) {
					return
				}
			}
		})
	}
	wg.Wait()
	if got != want {
		t.Error("the bytes read are not those written")
	}
}

// Many writers whose deadlines pass share one stream: as many bytes arrive as
// their calls returned.
func testRacyWrite(t *testing.T, c1, c2 tcpConn) {
	const writers, rounds = 10, 30
	arrived := make(chan int64)
	go func() {
		n, err := io.Copy(io.Discard, c2)
		if err != nil {
			t.Errorf("reading: %v", err)
		}
		arrived <- n
	}()
	var mu sync.Mutex
	var sent int64
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			data := noise(byte(i), 20000)
			for range rounds {
				c1.SetWriteDeadline(time.Now().Add(time.Millisecond))
				n, err := c1.Write(data)
				mu.Lock()
				sent += int64(n)
				mu.Unlock()
				if err != nil && !isTimeout(t, "write", err) {
					return
				}
			}
		})
	}
	wg.Wait()
	if err := c1.CloseWrite(); err != nil {
		t.Errorf("CloseWrite: %v", err)
	}
	if n := <-arrived; n != sent {
		t.Errorf("%d bytes arrived of %d", n, sent)
	}
}

// A read deadline that has passed stops reads, even with data there, and nothing
// else.
func testReadTimeout(t *testing.T, c1, c2 tcpConn) {
	wantTransfer(t, c2, c1, "before")
	c1.SetReadDeadline(longAgo)
	for range 3 {
		wantReadTimeout(t, c1)
	}
	wantTransfer(t, c1, c2, "writes go on")
	if _, err := io.WriteString(c2, "late"); err != nil {
		t.Errorf("Write: %v", err)
	}
	time.Sleep(10 * time.Millisecond)
	wantReadTimeout(t, c1)
	c1.SetReadDeadline(never)
	wantRead(t, c1, "late")
}

// A write deadline that has passed stops writes and nothing else.
func testWriteTimeout(t *testing.T, c1, c2 tcpConn) {
	c1.SetWriteDeadline(longAgo)
	for range 3 {
		wantWriteTimeout(t, c1)
	}
	wantTransfer(t, c2, c1, "reads go on")
	c1.SetWriteDeadline(never)
	wantTransfer(t, c1, c2, "nothing before this")
}

// A deadline that has passed stops both, and the connection works again when it
// is taken away.
func testPastTimeout(t *testing.T, c1, c2 tcpConn) {
	for range 3 {
		c1.SetDeadline(longAgo)
		wantReadTimeout(t, c1)
		wantWriteTimeout(t, c1)
		c1.SetDeadline(never)
		wantTransfer(t, c1, c2, "there")
		wantTransfer(t, c2, c1, "and back")
	}
}

// A deadline of now ends calls that are waiting.
func testPresentTimeout(t *testing.T, c1, c2 tcpConn) {
	blocked := blockBoth(t, c1, isTimeout)
	blocked.settle(t)
	c1.SetDeadline(time.Now())
	blocked.wantEnd(t)
	blocked.wantArrived(t, c1, c2)
}

// A deadline ahead ends calls that are waiting when it comes and not before.
func testFutureTimeout(t *testing.T, c1, c2 tcpConn) {
	const ahead = 150 * time.Millisecond
	start := time.Now()
	c1.SetDeadline(start.Add(ahead))
	blocked := blockBoth(t, c1, isTimeout)
	blocked.wantEnd(t)
	if took := time.Since(start); took < ahead {
		t.Errorf("the calls ended after %v, before the deadline of %v", took, ahead)
	}
	wantReadTimeout(t, c1)
	c1.SetDeadline(never)
	blocked.wantArrived(t, c1, c2)
}

// Close ends calls that are waiting, and those that come later.
func testCloseTimeout(t *testing.T, c1, c2 tcpConn) {
	blocked := blockBoth(t, c1, isClosed)
	blocked.settle(t)
	if err := c1.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	blocked.wantEnd(t)
	if n, err := c1.Read(make([]byte, 1)); n != 0 || !isClosed(t, "read", err) {
		t.Errorf("Read after Close = %d, %v", n, err)
	}
	if n, err := c1.Write(make([]byte, 1)); n != 0 || !isClosed(t, "write", err) {
		t.Errorf("Write after Close = %d, %v", n, err)
	}
}

// blocked is a Read and a run of Writes that wait on a connection.
type blocked struct {
	ended sync.WaitGroup
	mu    sync.Mutex
	sent  bytes.Buffer // what Write said it took
}

// blockBoth makes a Read that gets nothing and Writes until the peer, which does
// not read, takes no more. Both must end in an error of the kind told.
func blockBoth(t *testing.T, c net.Conn, kind func(t *testing.T, op string, err error) bool) *blocked {
	b := new(blocked)
	b.ended.Go(func() {
		n, err := c.Read(make([]byte, 100))
		if n != 0 || !kind(t, "read", err) {
			t.Errorf("the waiting Read = %d, %v", n, err)
		}
	})
	b.ended.Go(func() {
		data := noise(4, 64<<10)
		for {
			n, err := c.Write(data)
			b.mu.Lock()
			b.sent.Write(data[:n])
			b.mu.Unlock()
			if err != nil {
				kind(t, "write", err)
				return
			}
		}
	})
	return b
}

// settle waits until the writer gets no further.
func (b *blocked) settle(t *testing.T) {
	t.Helper()
	last := -1
	for {
		time.Sleep(50 * time.Millisecond)
		b.mu.Lock()
		n := b.sent.Len()
		b.mu.Unlock()
		if n == last {
			return
		}
		last = n
		if n > 64<<20 {
			t.Fatalf("%d bytes were taken from a writer whose peer does not read", n)
		}
	}
}

// wantEnd waits for both calls, which must not be long in ending.
func (b *blocked) wantEnd(t *testing.T) {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		b.ended.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Fatal("the waiting calls did not end")
	}
}

// wantArrived takes the deadlines away and checks that the peer gets just what
// the Writes said they took.
func (b *blocked) wantArrived(t *testing.T, c, peer tcpConn) {
	t.Helper()
	c.SetDeadline(never)
	go c.CloseWrite()
	readToEnd(t, peer, b.sent.Bytes())
}

// Every method may be called at any time beside every other.
func testConcurrentMethods(t *testing.T, c1, c2 tcpConn) {
	go io.Copy(c2, c2)
	soon := func() time.Time { return time.Now().Add(10 * time.Millisecond) }
	methods := []func(){
		func() { c1.Read(make([]byte, 1024)) },
		func() { c1.Write(make([]byte, 1024)) },
		func() { c1.SetDeadline(soon()) },
		func() { c1.SetReadDeadline(soon()) },
		func() { c1.SetWriteDeadline(soon()) },
		func() { c1.LocalAddr() },
		func() { c1.RemoteAddr() },
		func() { c1.SetLinger(-1) },
	}
	var wg sync.WaitGroup
	for range 100 {
		for _, method := range methods {
			wg.Go(method)
		}
	}
	wg.Wait()
}

// Bytes of one Write are never torn apart by those of another.
func testWholeWrites(t *testing.T, c1, c2 tcpConn) {
	const writers, rounds, size = 8, 20, 50001
	for i := range writers {
		go func() {
			for range rounds {
				c1.Write(bytes.Repeat([]byte{byte(i)}, size))
			}
		}()
	}
	record := make([]byte, size)
	for range writers * rounds {
		if _, err := io.ReadFull(c2, record); err != nil {
			t.Fatalf("Read: %v", err)
		}
		if bytes.Count(record, record[:1]) != size {
			t.Fatal("a Write was torn apart")
		}
	}
}

// Each end's addresses are the other's, as *net.TCPAddr.
func testAddrs(t *testing.T, c1, c2 tcpConn) {
	for _, side := range []struct{ local, remote net.Addr }{
		{c1.LocalAddr(), c2.RemoteAddr()},
		{c2.LocalAddr(), c1.RemoteAddr()},
	} {
		local, isTCP := side.local.(*net.TCPAddr)
		remote, isTCPToo := side.remote.(*net.TCPAddr)
		if !isTCP || !isTCPToo {
			t.Fatalf("addresses are %T and %T, want *net.TCPAddr", side.local, side.remote)
		}
		if local.AddrPort() != remote.AddrPort() || local.Network() != "tcp" {
			t.Errorf("one end is at %v, the other at %v (%s)", local, remote, local.Network())
		}
	}
	server, client := connFamilies[0], connFamilies[0]
	if c1.LocalAddr().(*net.TCPAddr).IP.To4() == nil {
		server, client = connFamilies[1], connFamilies[1]
	}
	ends := map[string]bool{c1.LocalAddr().String(): true, c2.LocalAddr().String(): true}
	delete(ends, server.serverAddr())
	if len(ends) != 1 {
		t.Errorf("no end is at %s", server.serverAddr())
	}
	for end := range ends {
		at := netip.MustParseAddrPort(end)
		if at.Addr() != client.client || at.Port() == 0 {
			t.Errorf("the client is at %v, want %v and a port", at, client.client)
		}
	}
}

// Close lets what was written arrive, and then the peer reads io.EOF, bare, as
// often as it asks.
func testEOF(t *testing.T, c1, c2 tcpConn) {
	data := noise(5, 300<<10)
	go func() {
		c1.Write(data)
		c1.Close()
	}()
	readToEnd(t, c2, data)
	for range 3 {
		if n, err := c2.Read(make([]byte, 10)); n != 0 || err != io.EOF {
			t.Errorf("Read = %d, %v, want a bare io.EOF", n, err)
		}
	}
}

// CloseWrite ends one direction; the other goes on.
func testCloseWrite(t *testing.T, c1, c2 tcpConn) {
	if _, err := io.WriteString(c1, "request"); err != nil {
		t.Fatalf("Write: %v", err)
	}
	if err := c1.CloseWrite(); err != nil {
		t.Fatalf("CloseWrite: %v", err)
	}
	n, err := c1.Write([]byte("more"))
	if !isOpError(t, "write", err) || n != 0 {
		t.Errorf("Write after CloseWrite = %d, %v", n, err)
	}
	readToEnd(t, c2, []byte("request"))

	answer := noise(6, 3<<20) // more than both buffers
	go func() {
		c2.Write(answer)
		c2.Close()
	}()
	readToEnd(t, c1, answer)
}

// CloseRead ends a Read that waits, and all later ones, as the end of the data
// would. Writes go on, and so do the peer's, which arrive nowhere.
func testCloseRead(t *testing.T, c1, c2 tcpConn) {
	ended := make(chan error, 1)
	go func() {
		_, err := c1.Read(make([]byte, 10))
		ended <- err
	}()
	time.Sleep(20 * time.Millisecond)
	if err := c1.CloseRead(); err != nil {
		t.Fatalf("CloseRead: %v", err)
	}
	select {
	case err := <-ended:
		if err != io.EOF {
			t.Errorf("the waiting Read: %v, want io.EOF", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the waiting Read did not end")
	}
	wantTransfer(t, c1, c2, "writes go on")

	const size = 5 << 20 // more than both buffers
	c2.SetWriteDeadline(time.Now().Add(time.Minute))
	if n, err := c2.Write(noise(8, size)); n != size || err != nil {
		t.Errorf("the peer's Write of %d bytes = %d, %v", size, n, err)
	}
	if n, err := c1.Read(make([]byte, 10)); n != 0 || err != io.EOF {
		t.Errorf("Read after CloseRead = %d, %v, want io.EOF", n, err)
	}
	wantTransfer(t, c1, c2, "still")
}

// With a linger time of 0, Close resets the connection: the peer reads and
// writes no more, and loses nothing else than the connection.
func testLingerZero(t *testing.T, c1, c2 tcpConn) {
	wantTransfer(t, c1, c2, "all is well")
	if err := c1.SetLinger(0); err != nil {
		t.Fatalf("SetLinger: %v", err)
	}
	if err := c1.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	c2.SetDeadline(time.Now().Add(time.Minute))
	n, err := c2.Read(make([]byte, 10))
	if n != 0 || !isOpError(t, "read", err) || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read after a reset = %d, %v, want ECONNRESET", n, err)
	}
	n, err = c2.Write([]byte("x"))
	if n != 0 || !isOpError(t, "write", err) || !(errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)) {
		t.Errorf("Write after a reset = %d, %v, want ECONNRESET or EPIPE", n, err)
	}
}

// Close with bytes unread resets the connection, so that the peer does not take
// them for delivered (RFC 2525 section 2.17).
func testCloseUnread(t *testing.T, c1, c2 tcpConn) {
	wantTransfer(t, c2, c1, "read")
	io.WriteString(c2, "unread")
	if _, err := io.ReadFull(c1, make([]byte, 1)); err != nil { // the rest has come with it
		t.Fatalf("Read: %v", err)
	}
	if err := c1.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	c2.SetDeadline(time.Now().Add(time.Minute))
	if n, err := c2.Read(make([]byte, 10)); n != 0 || !isOpError(t, "read", err) || !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read = %d, %v, want ECONNRESET", n, err)
	}
}

// A second Close reports that the connection is closed already, as package net
// does, or nothing; no method panics after it.
func testCloseTwice(t *testing.T, c1, _ tcpConn) {
	if err := c1.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	for _, call := range []struct {
		name string
		err  error
	}{
		{"Close", c1.Close()},
		{"CloseRead", c1.CloseRead()},
		{"CloseWrite", c1.CloseWrite()},
		{"SetLinger", c1.SetLinger(0)},
		{"SetDeadline", c1.SetDeadline(time.Now())},
	} {
		if call.err != nil && !errors.Is(call.err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", call.name, call.err)
		}
	}
	if c1.LocalAddr() == nil || c1.RemoteAddr() == nil {
		t.Error("no addresses after Close")
	}
}

// With a linger time, Close does not wait, but what is not delivered by then is
// given up.
func TestConnLinger(t *testing.T) {
	for _, f := range connFamilies {
		t.Run(f.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server, client := joinStacks(t, slirp.Config{})
				c1, c2 := connect(t, f, server, client)
				c1.SetWriteDeadline(time.Now().Add(time.Second))
				if _, err := c1.Write(make([]byte, 16<<20)); !isTimeout(t, "write", err) { // both buffers are full
					t.Fatalf("Write: %v", err)
				}
				start := time.Now()
				c1.SetLinger(3)
				if err := c1.Close(); err != nil || time.Since(start) != 0 {
					t.Errorf("Close: %v after %v", err, time.Since(start))
				}
				time.Sleep(2 * time.Second)
				if n, err := c2.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Errorf("Read while the peer lingers = %d, %v", n, err)
				}
				time.Sleep(2 * time.Second)
				if _, err := io.Copy(io.Discard, c2); !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("Read after that: %v, want ECONNRESET", err)
				}
			})
		})
	}
}

// A Stack that closes resets its connections.
func TestConnStackClose(t *testing.T) {
	for _, f := range connFamilies {
		t.Run(f.name, func(t *testing.T) {
			failIfStuck(t, 5*time.Minute)
			server, client := joinStacks(t, slirp.Config{})
			accepted, dialled := connect(t, f, server, client)
			if err := server.Close(); err != nil {
				t.Fatalf("Stack.Close: %v", err)
			}
			dialled.SetDeadline(time.Now().Add(time.Minute))
			if _, err := dialled.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the peer's Read: %v, want ECONNRESET", err)
			}
			if _, err := accepted.Read(make([]byte, 1)); !isClosed(t, "read", err) {
				t.Errorf("Read on the closed Stack: %v", err)
			}
			if _, err := server.DialContext(t.Context(), "tcp", "192.0.2.1:1"); !errors.Is(err, net.ErrClosed) {
				t.Errorf("DialContext on the closed Stack: %v", err)
			}
			if _, err := server.Listen("tcp", f.serverAddr()); !errors.Is(err, net.ErrClosed) {
				t.Errorf("Listen on the closed Stack: %v", err)
			}
		})
	}
}

// DialContext fails the way net.Dialer does.
func TestDialErrors(t *testing.T) {
	refused := func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
	silent := func(context.Context, slirp.Flow) error { return slirp.ErrDrop }
	tests := []struct {
		name   string
		server slirp.Config
		want   error
	}{
		{"refused", slirp.Config{Dial: refused}, syscall.ECONNREFUSED},
		{"silence", slirp.Config{Allow: silent}, context.DeadlineExceeded},
	}
	for _, test := range tests {
		for _, f := range connFamilies {
			t.Run(test.name+"/"+f.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					_, client := joinStacks(t, test.server)
					ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
					defer cancel()
					conn, err := client.DialContext(ctx, "tcp", f.serverAddr())
					if conn != nil || !isOpError(t, "dial", err) || !errors.Is(err, test.want) {
						t.Errorf("DialContext = %v, %v, want %v", conn, err, test.want)
					}
					var timeout net.Error
					wantTimeout := test.want == context.DeadlineExceeded
					if errors.As(err, &timeout) && timeout.Timeout() != wantTimeout {
						t.Errorf("Timeout() of %v is %v", err, timeout.Timeout())
					}
				})
			})
		}
	}
}

// DialContext refuses what it cannot reach, before any packet leaves.
func TestDialBadArguments(t *testing.T) {
	lonely := newStack(t, slirp.Config{})
	_, client := joinStacks(t, slirp.Config{})
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	tests := []struct {
		name             string
		stack            *slirp.Stack
		ctx              context.Context
		network, address string
		want             error // nil: any
	}{
		{"no route", lonely, t.Context(), "tcp", "192.0.2.1:80", slirp.ErrNoRoute},
		{"no route", lonely, t.Context(), "udp", "[2001:db8::1]:80", slirp.ErrNoRoute},
		{"cancelled", client, cancelled, "tcp", "10.0.0.1:80", context.Canceled},
		{"network", client, t.Context(), "unix", "10.0.0.1:80", nil},
		{"family", client, t.Context(), "tcp4", "[fd00:a::1]:80", nil},
		{"family", client, t.Context(), "tcp6", "10.0.0.1:80", nil},
		{"family", client, t.Context(), "udp6", "10.0.0.1:80", nil},
		{"no port", client, t.Context(), "tcp", "10.0.0.1", nil},
		{"port", client, t.Context(), "tcp", "10.0.0.1:65536", nil},
	}
	for _, test := range tests {
		t.Run(test.name+"/"+test.network, func(t *testing.T) {
			failIfStuck(t, 5*time.Minute)
			conn, err := test.stack.DialContext(test.ctx, test.network, test.address)
			if conn != nil || err == nil || !errors.Is(err, test.want) && test.want != nil {
				t.Errorf("DialContext(%q, %q) = %v, %v, want %v", test.network, test.address, conn, err, test.want)
			}
		})
	}
}

// A dialled UDP connection keeps datagrams apart, has deadlines, and is told of
// a port where nobody listens.
func TestConnUDP(t *testing.T) {
	for _, f := range connFamilies {
		t.Run(f.name, func(t *testing.T) {
			failIfStuck(t, 5*time.Minute)
			echo, closed := startEcho(t)
			to := echo
			server := slirp.Config{Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, network, to)
			}}
			_, client := joinStacks(t, server)
			conn, err := client.DialContext(t.Context(), "udp", f.serverAddr())
			if err != nil {
				t.Fatalf("DialContext: %v", err)
			}
			testDatagrams(t, f, conn)

			to = closed
			conn, err = client.DialContext(t.Context(), "udp", f.serverAddr())
			if err != nil {
				t.Fatalf("DialContext: %v", err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute))
			conn.Write([]byte("anyone?"))
			if _, err := conn.Read(make([]byte, 10)); !isOpError(t, "read", err) || !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("Read from a closed port: %v, want ECONNREFUSED", err)
			}
		})
	}
}

// startEcho starts a UDP echo server on the host and returns its address, and
// one where nobody listens.
func startEcho(t *testing.T) (echo, closed string) {
	t.Helper()
	var addrs []string
	var conns []net.PacketConn
	for range 2 {
		conn, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		conns, addrs = append(conns, conn), append(addrs, conn.LocalAddr().String())
	}
	conns[1].Close()
	t.Cleanup(func() { conns[0].Close() })
	go func() {
		buf := make([]byte, 65535)
		for {
			n, from, err := conns[0].ReadFrom(buf)
			if err != nil {
				return
			}
			conns[0].WriteTo(buf[:n], from)
		}
	}()
	return addrs[0], addrs[1]
}

// testDatagrams plays with a connection to an echo server, and closes it.
func testDatagrams(t *testing.T, f connFamily, conn net.Conn) {
	t.Helper()
	conn.SetDeadline(time.Now().Add(time.Minute))
	for _, size := range []int{5, 0, 1, 1400} {
		data := noise(7, size)
		if n, err := conn.Write(data); n != size || err != nil {
			t.Fatalf("Write of %d bytes = %d, %v", size, n, err)
		}
		buf := make([]byte, 2000)
		if n, err := conn.Read(buf); err != nil || !bytes.Equal(buf[:n], data) {
			t.Fatalf("Read = %d bytes, %v, want the %d sent", n, err, size)
		}
	}
	local, isUDP := conn.LocalAddr().(*net.UDPAddr)
	if !isUDP || local.AddrPort().Addr().Unmap() != f.client || local.Port == 0 {
		t.Errorf("LocalAddr is %v (%[1]T), want %v as *net.UDPAddr", conn.LocalAddr(), f.client)
	}
	if remote := conn.RemoteAddr().String(); remote != f.serverAddr() {
		t.Errorf("RemoteAddr is %s, want %s", remote, f.serverAddr())
	}
	conn.SetReadDeadline(longAgo)
	wantReadTimeout(t, conn)
	if err := conn.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := conn.Read(make([]byte, 1)); !isClosed(t, "read", err) {
		t.Errorf("Read after Close: %v", err)
	}
	if _, err := conn.Write([]byte("x")); !isClosed(t, "write", err) {
		t.Errorf("Write after Close: %v", err)
	}
}

// wantTransfer writes the text at one end and reads it at the other.
func wantTransfer(t *testing.T, from, to net.Conn, text string) {
	t.Helper()
	if n, err := io.WriteString(from, text); n != len(text) || err != nil {
		t.Errorf("Write of %q = %d, %v", text, n, err)
		return
	}
	wantRead(t, to, text)
}

func wantRead(t *testing.T, c net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Errorf("Read = %q, %v, want %q", got, err, text)
	}
}

func wantReadTimeout(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 10)); n != 0 || !isTimeout(t, "read", err) {
		t.Errorf("Read = %d, %v, want a timeout", n, err)
	}
}

func wantWriteTimeout(t *testing.T, c net.Conn) {
	t.Helper()
	if n, err := c.Write([]byte("too late")); n != 0 || !isTimeout(t, "write", err) {
		t.Errorf("Write = %d, %v, want a timeout", n, err)
	}
}

// isTimeout tells whether err is what package net returns when a deadline has
// passed; what is wrong with it is an error of the test.
func isTimeout(t *testing.T, op string, err error) bool {
	t.Helper()
	var timeout net.Error
	ok := isOpError(t, op, err) && errors.As(err, &timeout) && timeout.Timeout() && errors.Is(err, os.ErrDeadlineExceeded)
	if !ok {
		t.Errorf("%s: %v is no timeout", op, err)
	}
	return ok
}

// isClosed tells whether err is what package net returns after Close; what is
// wrong with it is an error of the test.
func isClosed(t *testing.T, op string, err error) bool {
	t.Helper()
	var timeout net.Error
	ok := isOpError(t, op, err) && errors.Is(err, net.ErrClosed) && !(errors.As(err, &timeout) && timeout.Timeout())
	if !ok {
		t.Errorf("%s: %v is not net.ErrClosed", op, err)
	}
	return ok
}

// isOpError tells whether err is a *net.OpError of the operation.
func isOpError(t *testing.T, op string, err error) bool {
	t.Helper()
	opError, ok := err.(*net.OpError)
	if !ok {
		t.Errorf("%s: error is %v (%[2]T), want *net.OpError", op, err)
		return false
	}
	if opError.Op != op {
		t.Errorf("error of %s has Op %q", op, opError.Op)
		return false
	}
	return true
}

func TestDialUnreachable(t *testing.T) {
	for _, fam := range []string{"10.0.2.99:80", "[fd00::99]:80"} {
		for want, err := range map[syscall.Errno]error{
			syscall.EHOSTUNREACH: syscall.EHOSTUNREACH,
			syscall.ENETUNREACH:  syscall.ENETUNREACH,
			syscall.EACCES:       slirp.ErrProhibited,
		} {
			nat, _ := slirp.NewWithConfig(slirp.Config{Allow: func(context.Context, slirp.Flow) error { return err }})
			guest, _ := slirp.NewWithConfig(slirp.Config{Addresses: []netip.Addr{
				netip.MustParseAddr("10.0.2.15"), netip.MustParseAddr("fd00::15")}})
			var toNAT, toGuest slirp.Writer
			toNAT = func(f []byte) error { return nat.HandlePacket(0, [6]byte{1}, [6]byte{2}, f[14:], toGuest) }
			toGuest = func(f []byte) error { return guest.HandlePacket(0, [6]byte{2}, [6]byte{1}, f[14:], toNAT) }
			for _, p := range []string{"0.0.0.0/0", "::/0"} {
				guest.AddRoute(0, netip.MustParsePrefix(p), [6]byte{2}, [6]byte{1}, toNAT)
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			if _, got := guest.DialContext(ctx, "tcp", fam); !errors.Is(got, want) {
				t.Errorf("%s, %v: dial says %v", fam, err, got)
			}
			cancel()
			guest.Close()
			nat.Close()
		}
	}
}
