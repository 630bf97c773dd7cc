package slirp_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/KarpelesLab/slirp"
)

// serve gives a guest a network. Each Read of vm is one Ethernet frame from the
// guest, each Write one for it: a TAP device, an emulator's socket, a pipe.
func serve(vm io.ReadWriter) error {
	stack := slirp.New()
	defer stack.Close()
	gateway := [6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x57}
	toGuest := func(frame []byte) error {
		_, err := vm.Write(frame)
		return err
	}
	buf := make([]byte, 65550)
	for {
		n, err := vm.Read(buf)
		if err != nil {
			return err
		}
		header, packet := buf[:14], buf[14:max(14, n)]
		guest := [6]byte(header[6:12])
		if err := stack.HandlePacket(0, guest, gateway, packet, toGuest); err != nil {
			log.Printf("frame from % x: %v", guest, err)
		}
	}
}

// A guest that pings, behind a pipe.
func ExampleStack_HandlePacket() {
	host, guest := net.Pipe()
	go serve(host)

	// ICMPv6 echo request from fd00::15 to fd00::2, with its Ethernet header. A
	// checksum of 0 stands for one that an offloading network card would fill in.
	request := append([]byte{
		0x52, 0x54, 0x00, 0x12, 0x34, 0x57, 0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x86, 0xdd,
		0x60, 0, 0, 0, 0, 12, 58, 64,
		0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x15,
		0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x02,
		slirp.ICMPv6TypeEchoRequest, 0, 0, 0, 0, 7, 0, 1,
	}, "ping"...)
	guest.Write(request)

	reply := make([]byte, 2000)
	n, _ := guest.Read(reply)
	message := reply[14+40 : n]
	fmt.Println(message[0] == slirp.ICMPv6TypeEchoReply, string(message[8:]))
	guest.Close()
	// Output: true ping
}

// A server on an address that exists for the guest only.
func ExampleStack_Listen() {
	stack := slirp.New()
	defer stack.Close()

	listener, err := stack.Listen("tcp", "10.0.0.1:8080")
	if err != nil {
		log.Fatal(err)
	}
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s is not on any network card", r.Host)
	}))

	fmt.Println(get(stack, "http://10.0.0.1:8080/"))
	// Output: 10.0.0.1:8080 is not on any network card
}

// Two stacks that are each other's guest, and a connection between them: a
// network in a unit test.
func ExampleStack_DialContext() {
	server, client := slirp.New(), slirp.New()
	defer server.Close()
	defer client.Close()

	serverMAC, clientMAC := [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	var toServer, toClient slirp.Writer // 14 bytes of Ethernet header come off on the way
	toServer = func(frame []byte) error {
		return server.HandlePacket(0, clientMAC, serverMAC, frame[14:], toClient)
	}
	toClient = func(frame []byte) error {
		return client.HandlePacket(0, serverMAC, clientMAC, frame[14:], toServer)
	}
	everywhere := netip.MustParsePrefix("0.0.0.0/0")
	if err := client.AddRoute(0, everywhere, serverMAC, clientMAC, toServer); err != nil {
		log.Fatal(err)
	}

	listener, err := server.Listen("tcp", "10.0.0.2:9000")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		io.Copy(conn, conn) // until the client has ended its direction
	}()

	conn, err := client.DialContext(context.Background(), "tcp", "10.0.0.2:9000")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "there and back")
	conn.(*slirp.VirtualConn).CloseWrite()
	echo, err := io.ReadAll(conn)
	fmt.Printf("%s, %v", echo, err)
	// Output: there and back, <nil>
}

// A guest that may reach one service of the host, by the gateway's address, and
// nothing else.
func ExampleConfig() {
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer web.Close()
	go http.Serve(web, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "the host's own server")
	}))

	gateway := netip.MustParseAddr("10.0.2.2")
	stack, err := slirp.NewWithConfig(slirp.Config{
		// Policy: asked once for every flow.
		Allow: func(ctx context.Context, f slirp.Flow) error {
			if f.Destination == netip.AddrPortFrom(gateway, 80) {
				return nil
			}
			return slirp.ErrProhibited
		},
		// Transport: where the flow goes.
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, web.Addr().String())
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()

	fmt.Println(get(stack, "http://10.0.2.2/"))
	// Output: the host's own server
}

// A guest that reaches the world and not the host, but for the host's resolver.
func ExampleGuard() {
	guard := &slirp.Guard{Except: []netip.Prefix{netip.MustParsePrefix("127.0.0.53/32")}}
	stack, err := slirp.NewWithConfig(slirp.Config{
		Allow: guard.Allow,
		Dial:  (&net.Dialer{Control: guard.Control}).DialContext,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()

	for _, a := range []string{"127.0.0.1", "64:ff9b::a9fe:a9fe", "127.0.0.53"} {
		fmt.Println(guard.Check(netip.MustParseAddr(a)))
	}
	// Output:
	// administratively prohibited: 127.0.0.1 is refused: loopback
	// administratively prohibited: 64:ff9b::a9fe:a9fe is refused: link-local
	// <nil>
}

// One port of the host for each UDP port of the guest, whoever that talks to.
func ExampleUDPMapping() {
	a, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	b, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	defer b.Close()

	stack, err := slirp.NewWithConfig(slirp.Config{UDPMapping: slirp.UDPMappingEndpoint})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()

	var seen []string
	for _, server := range []net.PacketConn{a, b} {
		packet := []byte{
			0x45, 0, 0, 30, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15, 127, 0, 0, 1, // IPv4, no checksum
			0x0f, 0xa0, 0, 0, 0, 10, 0, 0, 'h', 'i', // UDP from port 4000
		}
		binary.BigEndian.PutUint16(packet[22:], uint16(server.LocalAddr().(*net.UDPAddr).Port))
		err := stack.HandlePacket(0, [6]byte{2}, [6]byte{4}, packet, func([]byte) error { return nil })
		if err != nil {
			log.Fatal(err)
		}
		_, peer, err := server.ReadFrom(make([]byte, 100))
		if err != nil {
			log.Fatal(err)
		}
		seen = append(seen, peer.String())
	}
	fmt.Println(seen[0] == seen[1])
	// Output: true
}

// A guest with a virtio network card gets, and sends, up to 64 KiB at a time.
func ExampleConfig_virtioNetHeader() {
	gateway := [6]byte{0x52, 0x54, 0x00, 0x12, 0x34, 0x57}
	toGuest := func(frame []byte) error {
		fmt.Printf("% x: %d bytes of Ethernet\n", frame[:slirp.VirtioNetHeaderLen], len(frame)-slirp.VirtioNetHeaderLen)
		return nil
	}
	stack, err := slirp.NewWithConfig(slirp.Config{VirtioNetHeader: true})
	if err != nil {
		log.Fatal(err)
	}
	defer stack.Close()
	fromGuest := func(frame []byte) error {
		frame = frame[slirp.VirtioNetHeaderLen:]
		return stack.HandlePacket(0, [6]byte(frame[6:12]), gateway, frame[14:], toGuest)
	}

	header := make([]byte, slirp.VirtioNetHeaderLen)
	ethernet := "\x52\x54\x00\x12\x34\x57\x52\x54\x00\x12\x34\x56\x08\x00"
	ping := "\x45\x00\x00\x1c\x00\x00\x00\x00\x40\x01\x00\x00\x0a\x00\x02\x0f\x0a\x00\x02\x02" + "\x08\x00\x00\x00\x00\x01\x00\x01"
	if err := fromGuest(append(header, ethernet+ping...)); err != nil {
		log.Fatal(err)
	}
	// Output:
	// 00 00 00 00 00 00 00 00 00 00 01 00: 42 bytes of Ethernet
}

// get fetches a page as a guest of the stack.
func get(stack *slirp.Stack, url string) string {
	guest, err := slirp.NewWithConfig(slirp.Config{
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.2.15")},
	})
	if err != nil {
		return err.Error()
	}
	defer guest.Close()
	stackMAC, guestMAC := [6]byte{2, 0, 0, 0, 0, 1}, [6]byte{2, 0, 0, 0, 0, 2}
	var toStack, toGuest slirp.Writer
	toStack = func(frame []byte) error { return stack.HandlePacket(0, guestMAC, stackMAC, frame[14:], toGuest) }
	toGuest = func(frame []byte) error { return guest.HandlePacket(0, stackMAC, guestMAC, frame[14:], toStack) }
	if err := guest.AddRoute(0, netip.MustParsePrefix("0.0.0.0/0"), stackMAC, guestMAC, toStack); err != nil {
		return err.Error()
	}
	transport := &http.Transport{DialContext: guest.DialContext}
	defer transport.CloseIdleConnections()
	answer, err := (&http.Client{Transport: transport}).Get(url)
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}

// Every Go example of the README is code of this file.
func TestReadmeExamples(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile("example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	code := unindented(string(file))
	examples := strings.Split(string(readme), "\n```go\n")[1:]
	if len(examples) < 3 {
		t.Errorf("the README has %d examples", len(examples))
	}
	for _, example := range examples {
		example, _, _ = strings.Cut(example, "\n```")
		if !strings.Contains(code, unindented(example)) {
			t.Errorf("not in example_test.go:\n%s", example)
		}
	}
}

// unindented returns the text without white space at the start of its lines.
func unindented(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = strings.TrimSpace(line)
	}
	return strings.Join(lines, "\n")
}
