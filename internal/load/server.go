package load

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// commandLen is the size of a request and, if it is small, of the answer.
const commandLen = 64

type op byte

const (
	opUpload   op = iota + 1 // read n bytes, answer with 1
	opDownload               // answer with n bytes
	opEcho                   // answer with as much
	opOnce                   // answer with as much and close
	opPark                   // answer with 1 byte and keep the connection
	opFlood                  // UDP: answer with n datagrams as long as this one
)

// command is what a client asks the server for.
type command struct {
	op op
	n  int64
}

func (c command) marshal(b []byte) {
	b[0] = byte(c.op)
	binary.BigEndian.PutUint64(b[1:], uint64(c.n))
}

func parseCommand(b []byte) command {
	return command{op(b[0]), int64(binary.BigEndian.Uint64(b[1:]))}
}

// pieceLen is how much is read from or written to a socket at a time.
const pieceLen = 128 << 10

// Server does over TCP what Flow and Socket ask it for.
type Server struct {
	l  net.Listener
	wg sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	closed bool
}

// Listen returns a Server on a free port.
func Listen(addr netip.Addr) (*Server, error) {
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, 0).String())
	if err != nil {
		return nil, err
	}
	s := &Server{l: l, conns: make(map[net.Conn]bool)}
	s.wg.Go(s.run)
	return s, nil
}

// Addr returns the address of the server.
func (s *Server) Addr() netip.AddrPort { return s.l.Addr().(*net.TCPAddr).AddrPort() }

// Close closes every connection and returns when nothing runs any more.
func (s *Server) Close() {
	s.l.Close()
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *Server) run() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		if s.closed {
			c.Close()
		}
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Go(func() {
			if !serve(c) {
				c.Close()
				s.mu.Lock()
				delete(s.conns, c)
				s.mu.Unlock()
			}
		})
	}
}

// serve reports whether the connection is to be kept.
func serve(c net.Conn) (park bool) {
	var request [commandLen]byte
	var piece []byte
	for {
		if _, err := io.ReadFull(c, request[:]); err != nil {
			return false
		}
		cmd := parseCommand(request[:])
		if (cmd.op == opUpload || cmd.op == opDownload) && piece == nil {
			piece = make([]byte, pieceLen)
		}
		var err error
		switch cmd.op {
		case opUpload:
			if err = discard(c, piece, cmd.n); err == nil {
				_, err = c.Write(request[:1])
			}
		case opDownload:
			err = fill(c, piece, cmd.n)
		case opEcho:
			_, err = c.Write(request[:])
		case opOnce:
			c.Write(request[:])
			return false
		case opPark:
			c.Write(request[:1])
			return true
		}
		if err != nil {
			return false
		}
	}
}

// discard reads n bytes.
func discard(c net.Conn, piece []byte, n int64) error {
	for n > 0 {
		k, err := c.Read(piece[:min(n, int64(len(piece)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

// fill writes n bytes.
func fill(c net.Conn, piece []byte, n int64) error {
	for n > 0 {
		k, err := c.Write(piece[:min(n, int64(len(piece)))])
		if err != nil {
			return err
		}
		n -= int64(k)
	}
	return nil
}

// UDPServer counts datagrams, and sends as many as it is asked for.
type UDPServer struct {
	Received atomic.Int64
	Sent     atomic.Int64

	conn *net.UDPConn
	wg   sync.WaitGroup
}

// ListenUDP returns a UDPServer on a free port.
func ListenUDP(addr netip.Addr) (*UDPServer, error) {
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		return nil, err
	}
	s := &UDPServer{conn: conn}
	s.wg.Go(s.run)
	return s, nil
}

// Addr returns the address of the server.
func (s *UDPServer) Addr() netip.AddrPort { return s.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

// Close closes the socket and returns when nothing runs any more.
func (s *UDPServer) Close() {
	s.conn.Close()
	s.wg.Wait()
}

func (s *UDPServer) run() {
	b := make([]byte, 64<<10)
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if cmd := parseCommand(b); cmd.op == opFlood {
			for range cmd.n {
				s.conn.WriteToUDPAddrPort(b[:n], from)
				s.Sent.Add(1)
			}
			continue
		}
		s.Received.Add(1)
	}
}

// Datagram returns the data of a datagram that is counted.
func Datagram(n int) []byte { return make([]byte, n) }

// Flood returns the data of a datagram that asks for count others of its length.
func Flood(n, count int) []byte {
	b := make([]byte, n)
	command{opFlood, int64(count)}.marshal(b)
	return b
}

// UDPPacket returns an IP packet with a datagram, its checksum left to the network
// card.
func UDPPacket(src, dst netip.AddrPort, data []byte) []byte {
	ipLen := 20
	if src.Addr().Is6() {
		ipLen = 40
	}
	p := make([]byte, ipLen+8, ipLen+8+len(data))
	p = append(p, data...)
	putIPHeader(p, 17, src.Addr(), dst.Addr())
	binary.BigEndian.PutUint16(p[ipLen:], src.Port())
	binary.BigEndian.PutUint16(p[ipLen+2:], dst.Port())
	binary.BigEndian.PutUint16(p[ipLen+4:], uint16(8+len(data)))
	return p
}
