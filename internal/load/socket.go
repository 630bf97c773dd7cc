package load

import (
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Conn is a connection to a Server: a *Flow, or a *Socket to compare it with.
type Conn interface {
	Upload(n int64) error
	Download(n int64) error
	RoundTrips(took []time.Duration) error
	Park() error
	Release()
}

// Cost is what something takes: time, and that of all processors together.
type Cost struct{ Wall, CPU time.Duration }

// Measure returns what f costs. The CPU time is 0 where the operating system does not
// tell it.
func Measure(f func() error) (c Cost, err error) {
	cpu, begin := cpuTime(), time.Now()
	err = f()
	return Cost{time.Since(begin), cpuTime() - cpu}, err
}

// Add is the cost of both.
func (c Cost) Add(d Cost) Cost { return Cost{c.Wall + d.Wall, c.CPU + d.CPU} }

// Move moves n bytes, the same part of them over each connection and all at once.
func Move[C Conn](conns []C, up bool, n int64) error {
	errs := make(chan error, len(conns))
	for _, c := range conns {
		go func() {
			if up {
				errs <- c.Upload(n / int64(len(conns)))
			} else {
				errs <- c.Download(n / int64(len(conns)))
			}
		}()
	}
	var first error
	for range conns {
		if err := <-errs; first == nil {
			first = err
		}
	}
	return first
}

// Percentile returns the sample that p percent do not exceed. It sorts the samples.
func Percentile(samples []time.Duration, p int) time.Duration {
	slices.Sort(samples)
	return samples[(len(samples)-1)*p/100]
}

// Socket is a plain socket: what a Flow would be without a network in between.
type Socket struct {
	net.Conn
	piece []byte
}

// Dial connects n sockets.
func Dial(to netip.AddrPort, n int) ([]*Socket, error) {
	var sockets []*Socket
	for range n {
		c, err := net.Dial("tcp", to.String())
		if err != nil {
			return nil, err
		}
		sockets = append(sockets, &Socket{Conn: c})
	}
	return sockets, nil
}

func (s *Socket) request(c command, answer int) error {
	var b [commandLen]byte
	c.marshal(b[:])
	if _, err := s.Write(b[:]); err != nil {
		return err
	}
	_, err := io.ReadFull(s, b[:answer])
	return err
}

// Upload sends n bytes and returns when the server has them.
func (s *Socket) Upload(n int64) error {
	if err := s.request(command{opUpload, n}, 0); err != nil {
		return err
	}
	if err := fill(s, s.buffer(), n); err != nil {
		return err
	}
	_, err := io.ReadFull(s, s.piece[:1])
	return err
}

// Download receives n bytes from the server.
func (s *Socket) Download(n int64) error {
	if err := s.request(command{opDownload, n}, 0); err != nil {
		return err
	}
	return discard(s, s.buffer(), n)
}

func (s *Socket) buffer() []byte {
	if s.piece == nil {
		s.piece = make([]byte, pieceLen)
	}
	return s.piece
}

// RoundTrips sends small requests, each when the last one is answered, and measures
// how long that takes.
func (s *Socket) RoundTrips(took []time.Duration) error {
	sent := time.Now()
	for i := range took {
		if err := s.request(command{opEcho, 0}, commandLen); err != nil {
			return err
		}
		now := time.Now()
		took[i] = now.Sub(sent)
		sent = now
	}
	return nil
}

// Park has the server keep the connection and do nothing for it any more.
func (s *Socket) Park() error { return s.request(command{opPark, 0}, 1) }

// Release gives up the buffer, which is taken again when it is needed.
func (s *Socket) Release() { s.piece = nil }

// SocketExchanges is Exchanges with plain sockets.
func SocketExchanges(to netip.AddrPort, n, parallel int) error {
	var wg sync.WaitGroup
	errs := make(chan error, parallel)
	for i := range parallel {
		wg.Go(func() {
			for range (n + i) / parallel {
				if err := exchange(to); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

func exchange(to netip.AddrPort) error {
	c, err := net.Dial("tcp", to.String())
	if err != nil {
		return err
	}
	defer c.Close()
	s := Socket{Conn: c}
	if err := s.request(command{opOnce, 0}, commandLen); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 1))
	if err == io.EOF {
		err = nil
	}
	return err
}
