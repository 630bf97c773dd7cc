package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// digestHeader carries the SHA-256 digest of a body, in hex.
const digestHeader = "X-Sha256"

// host is what the guest comes to see: an HTTP server and a UDP echo server on
// one loopback address of this machine.
type host struct {
	web  net.Listener
	echo net.PacketConn
	http *http.Server
}

// startHost starts both servers on ports that the system chooses. The web server
// offers the payload as /payload, and answers a POST to /digest with the digest
// of what it was sent.
func startHost(loopback netip.Addr, offer payload) (*host, error) {
	address := netip.AddrPortFrom(loopback, 0).String()
	web, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	echo, err := net.ListenPacket("udp", address)
	if err != nil {
		web.Close()
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /payload", offer)
	mux.HandleFunc("POST /digest", answerDigest)
	h := &host{web: web, echo: echo, http: &http.Server{Handler: mux}}
	go h.http.Serve(web)
	go echoDatagrams(echo)
	return h, nil
}

// Close ends both servers and their connections.
func (h *host) Close() error {
	return errors.Join(h.http.Close(), h.echo.Close())
}

func (h *host) webPort() uint16  { return h.web.Addr().(*net.TCPAddr).AddrPort().Port() }
func (h *host) echoPort() uint16 { return h.echo.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// ServeHTTP sends the payload, with its digest in front.
func (p payload) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Length", strconv.FormatInt(p.size, 10))
	w.Header().Set(digestHeader, p.digest)
	copyAll(w, p.reader())
}

// answerDigest reads a body to its end and tells its digest.
func answerDigest(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	if _, err := copyAll(sum, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	io.WriteString(w, hex.EncodeToString(sum.Sum(nil)))
}

// echoDatagrams sends every datagram back to where it came from, until conn is
// closed.
func echoDatagrams(conn net.PacketConn) {
	buf := make([]byte, 65535)
	for {
		n, from, err := conn.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			conn.WriteTo(buf[:n], from)
		}
	}
}
