package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"
)

// check is one line of the table.
type check struct {
	what string
	size int64                                              // bytes it will move, 0 if it is over at once
	run  func(ctx context.Context, m *meter) (int64, error) // returns the bytes that arrived and were right
}

// bench is everything the checks of one address family need.
type bench struct {
	family
	net   *network
	host  *host
	offer payload // what the host has for download
	gift  payload // what the guest uploads
}

// checkAll runs every check over both families and prints the table. The error
// names the checks that failed.
func checkAll(ctx context.Context, download, upload int64, stdout, stderr io.Writer) error {
	n, err := newNetwork()
	if err != nil {
		return err
	}
	defer n.Close()

	results := newReport(stdout, stderr)
	offer, gift := newPayload(download), newPayload(upload)
	for _, f := range families {
		b := &bench{family: f, net: n, offer: offer, gift: gift}
		if err := b.runAll(ctx, results); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return results.finish()
}

// runAll runs the checks of one family, one after the other.
func (b *bench) runAll(ctx context.Context, results *report) error {
	checks := b.localChecks()
	h, err := startHost(b.loopback, b.offer)
	if err == nil {
		defer h.Close()
		b.host = h
		checks = append(checks, b.hostChecks()...)
	} else if b.loopback.Is6() {
		results.note("this machine has no IPv6 loopback: what needs one is left out")
	} else {
		return err
	}
	for _, c := range checks {
		results.run(ctx, b.name, c)
	}
	return nil
}

// localChecks are those that the NAT answers by itself.
func (b *bench) localChecks() []check {
	return []check{
		{what: "ping gateway", run: b.pingGateway},
		{what: "virtual server", run: b.callVirtualServer},
	}
}

// hostChecks are those that a server on the host answers.
func (b *bench) hostChecks() []check {
	return []check{
		{what: "UDP echo", run: b.echoDatagrams},
		{what: "download", run: b.download, size: b.offer.size},
		{what: "upload", run: b.upload, size: b.gift.size},
	}
}

func (b *bench) pingGateway(context.Context, *meter) (int64, error) {
	data := bytes.Repeat([]byte("ping"), 14)
	return int64(len(data)), ping(b.net.nat, b.guest, b.gateway, data)
}

// callVirtualServer serves HTTP on an address that exists inside the NAT only,
// and calls it from the guest.
func (b *bench) callVirtualServer(ctx context.Context, _ *meter) (int64, error) {
	const greeting = "hello from inside the NAT\n"
	address := netip.AddrPortFrom(b.virtual, 80)
	listener, err := b.net.nat.Listen("tcp", address.String())
	if err != nil {
		return 0, err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, greeting)
	})}
	go server.Serve(listener)
	defer server.Close()

	body, err := get(ctx, b.net.client, fmt.Sprintf("http://%v/", address))
	if err != nil {
		return 0, err
	}
	defer body.Close()
	answer, err := io.ReadAll(body)
	if err == nil && string(answer) != greeting {
		err = fmt.Errorf("the answer is %q", answer)
	}
	return int64(len(answer)), err
}

// echoDatagrams sends datagrams from none to as large as a packet holds, and
// waits for each to come back.
func (b *bench) echoDatagrams(ctx context.Context, _ *meter) (int64, error) {
	to := netip.AddrPortFrom(b.gateway, b.host.echoPort())
	conn, err := b.net.guest.DialContext(ctx, "udp", to.String())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))

	const mtu, udpHeaderLen = 1500, 8
	largest := mtu - udpHeaderLen - ipv6HeaderLen
	if b.gateway.Is4() {
		largest = mtu - udpHeaderLen - ipv4HeaderLen
	}
	var total int64
	for _, size := range []int{0, 1, 1400, largest} {
		if err := echoOne(conn, size); err != nil {
			return total, fmt.Errorf("a datagram of %d bytes: %w", size, err)
		}
		total += int64(size)
	}
	return total, nil
}

// echoOne sends one datagram and reads the answer, which must be the same.
func echoOne(conn net.Conn, size int) error {
	sent := make([]byte, size)
	if _, err := io.ReadFull(newPayload(int64(size)).reader(), sent); err != nil {
		return err
	}
	if _, err := conn.Write(sent); err != nil {
		return err
	}
	answer := make([]byte, 65535)
	n, err := conn.Read(answer)
	if err == nil && !bytes.Equal(answer[:n], sent) {
		err = fmt.Errorf("another one of %d bytes came back", n)
	}
	return err
}

// download fetches the payload from the host and compares digests.
func (b *bench) download(ctx context.Context, m *meter) (int64, error) {
	body, err := get(ctx, b.net.client, b.hostURL("/payload"))
	if err != nil {
		return 0, err
	}
	defer body.Close()
	sum := sha256.New()
	n, err := copyAll(io.MultiWriter(sum, m), body)
	if err != nil {
		return n, err
	}
	return n, compareDigests(hex.EncodeToString(sum.Sum(nil)), b.offer.digest)
}

// upload sends a payload to the host, which answers with its digest.
func (b *bench) upload(ctx context.Context, m *meter) (int64, error) {
	content := io.TeeReader(b.gift.reader(), m)
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, b.hostURL("/digest"), content)
	if err != nil {
		return 0, err
	}
	request.ContentLength = b.gift.size
	body, err := do(b.net.client, request)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	answer, err := io.ReadAll(body)
	if err != nil {
		return 0, err
	}
	return b.gift.size, compareDigests(strings.TrimSpace(string(answer)), b.gift.digest)
}

// hostURL is what the guest calls a page of the host's web server.
func (b *bench) hostURL(path string) string {
	return fmt.Sprintf("http://%v%s", netip.AddrPortFrom(b.gateway, b.host.webPort()), path)
}

// get asks for a page as the guest and returns its body.
func get(ctx context.Context, client *http.Client, url string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return do(client, request)
}

// do makes a request and returns the body of the answer. A status other than 2xx
// is an error.
func do(client *http.Client, request *http.Request) (io.ReadCloser, error) {
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode/100 != 2 {
		answer.Body.Close()
		return nil, fmt.Errorf("%s %q: the server answers %q", request.Method, request.URL, answer.Status)
	}
	return answer.Body, nil
}

func compareDigests(got, want string) error {
	if got != want {
		return fmt.Errorf("SHA-256 digest %.16s…, not %.16s…", got, want)
	}
	return nil
}

// fetchURL fetches the URL as a guest behind a NAT. The body goes to the file
// output or, if that is empty, to stdout.
func fetchURL(ctx context.Context, url, output string, stdout io.Writer) (err error) {
	n, err := newNetwork()
	if err != nil {
		return err
	}
	defer n.Close()

	body, err := get(ctx, n.client, url)
	if err != nil {
		return err
	}
	defer body.Close()
	if output != "" {
		file, err := os.Create(output)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, file.Close()) }()
		stdout = file
	}
	if got, err := copyAll(stdout, body); err != nil {
		return fmt.Errorf("%s: after %d bytes: %w", url, got, err)
	}
	return nil
}
