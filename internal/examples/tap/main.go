// Command tap gives a network to whatever is behind a TAP device: a Linux kernel in a
// network namespace, or a virtual machine whose monitor has the other end. It is the
// reference for programs that join a device to a [slirp.Stack]. It needs Linux and
// root. With
//
//	ip netns add guest
//	go run ./internal/examples/tap -ns guest -vnet
//
// running, this makes a guest of the namespace:
//
//	ip -n guest link set tap0 up
//	ip -n guest addr add 10.0.2.15/24 dev tap0
//	ip -n guest addr add fd00::15/64 dev tap0 nodad
//	ip -n guest route add default via 10.0.2.2
//	ip -n guest route add default via fd00::2
//	ip netns exec guest curl http://192.0.2.1/
//
// It ends with SIGINT or SIGTERM. rig.sh beside it measures.
package main

import (
	"bytes"
	"encoding/binary"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"syscall"
	"time"

	"github.com/KarpelesLab/slirp"
)

// gateway is the Ethernet address of everything that is not the guest.
var gateway = [6]byte{0x52, 0x55, 0x0a, 0x00, 0x02, 0x02}

const (
	etherHeaderLen = 14
	etherTypeIPv4  = "\x08\x00"
	etherTypeIPv6  = "\x86\xdd"
	etherTypeARP   = "\x08\x06"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("tap: ")
	ns := flag.String("ns", "", "network namespace to put the device in, a `name` or path; this one if empty")
	name := flag.String("dev", "tap0", "`name` of the device")
	mtu := flag.Int("mtu", 1500, "MTU; the device's own is set with ip link")
	vnet := flag.Bool("vnet", false, "let packets of up to 64 KiB pass, several datagrams in one among them if the kernel is Linux 6.2 or later, and leave checksums to it")
	drop := flag.Float64("drop", 0, "`probability` of losing a frame, each way")
	procs := flag.Int("procs", 1, "processors to use at a time, `n`; 0: as many as there are")
	poll := flag.Duration("poll", defaultPoll(), "`time` to stay awake for after each frame of the guest; 0 takes less of a processor, and answers later")
	profile := flag.String("cpuprofile", "", "write a CPU profile to `file`")
	flag.Parse()
	if *procs < 0 {
		log.Fatalf("-procs %d: negative", *procs)
	}
	if *poll < 0 {
		log.Fatalf("-poll %v: negative", *poll)
	}
	// A device has one queue. Where one goroutine reads it and others write to it, most
	// of their time goes into waking each other up: one processor carries a stream of one
	// connection faster than two. Many guests, or many connections, may want more.
	runtime.GOMAXPROCS(*procs)

	if err := run(*ns, *name, *mtu, *vnet, *poll, *drop, *profile); err != nil {
		log.Fatal(err)
	}
}

// defaultPoll is half of what KVM polls for. Where there is one processor only, the guest
// needs it.
func defaultPoll() time.Duration {
	if runtime.NumCPU() == 1 {
		return 0
	}
	return 100 * time.Microsecond
}

func run(ns, name string, mtu int, vnet bool, poll time.Duration, drop float64, profile string) error {
	dev, err := openTAP(ns, name, vnet, poll)
	if err != nil {
		return err
	}
	stack, err := slirp.NewWithConfig(slirp.Config{
		MTU:             mtu,
		VirtioNetHeader: vnet,
		VirtioNetUSO:    dev.uso,
		ReuseFrames:     true, // the device has copied a frame when write returns
	})
	if err != nil {
		return err
	}
	defer stack.Close()
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}

	l := &link{stack: stack, dev: dev, drop: drop}
	if vnet {
		l.front = slirp.VirtioNetHeaderLen
	}
	failed, stop := make(chan error, 1), make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	go func() { failed <- l.serve() }()
	fmt.Println("ready")
	select {
	case err = <-failed:
	case <-stop:
		fmt.Println(usage())
	}
	return err
}

// link carries frames between a device and a stack.
type link struct {
	stack *slirp.Stack
	dev   *device
	front int // length of the virtio_net_hdr in front of each frame
	drop  float64

	source  [6]byte  // who has sent packets
	packets [][]byte // that the stack has not been given yet
}

// serve hands frames from the device to the stack until the device fails. As many as
// there are at a time make one call of HandlePackets: the stack then answers them
// together.
func (l *link) serve() error {
	return l.dev.each(func(frames [][]byte) {
		for _, frame := range frames {
			if len(frame) >= l.front+etherHeaderLen && !l.lose() {
				l.receive(frame)
			}
		}
		l.handle()
	})
}

// receive takes a frame of the guest. Of what a virtio_net_hdr says of it little is of
// interest: the stack takes packets of any length, and checksums that are not finished, if
// they are those of the packet itself.
func (l *link) receive(frame []byte) {
	header, frame := frame[:l.front], frame[l.front:]
	switch string(frame[12:14]) {
	case etherTypeARP:
		if reply := arpReply(frame); reply != nil {
			l.send([][]byte{append(make([]byte, l.front), reply...)})
		}
	case etherTypeIPv4, etherTypeIPv6:
		if l.front > 0 {
			finishInner(header, frame)
		}
		if source := [6]byte(frame[6:]); source != l.source {
			l.handle()
			l.source = source
		}
		l.packets = append(l.packets, frame[etherHeaderLen:])
	}
}

// finishInner completes the checksum of a packet inside of another, of a tunnel that the
// guest's kernel is an end of (VXLAN): Linux 6.17 leaves that to us too. The stack does
// not look into what it carries, and the checksum of the packet around it is only right
// when the inner one is.
func finishInner(header, frame []byte) {
	const needsChecksum = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	start := int(binary.NativeEndian.Uint16(header[6:]))
	field := start + int(binary.NativeEndian.Uint16(header[8:]))
	if header[0]&needsChecksum == 0 || start == transport(frame) || field+2 > len(frame) {
		return
	}
	// The sum of the inner pseudo-header is in the field already, so here that is empty.
	sum := slirp.IPv6Checksum([16]byte{}, [16]byte{}, 0, 0, frame[start:])
	if sum == 0 {
		sum = 0xffff // 0 in UDP: there is none
	}
	binary.BigEndian.PutUint16(frame[field:], sum)
}

// transport returns where the IP header of a frame ends.
func transport(frame []byte) int {
	if string(frame[12:14]) == etherTypeIPv4 && len(frame) > etherHeaderLen {
		return etherHeaderLen + int(frame[etherHeaderLen]&15)*4
	}
	return etherHeaderLen + 40
}

// handle gives packets to the stack.
func (l *link) handle() {
	if len(l.packets) == 0 {
		return
	}
	if err := l.stack.HandlePackets(0, l.source, gateway, l.packets, l.send); err != nil {
		log.Print(err)
	}
	l.packets = l.packets[:0]
}

// send is the [slirp.BatchWriter] of the link.
func (l *link) send(frames [][]byte) (first error) {
	for _, frame := range frames {
		if l.lose() {
			continue
		}
		if err := l.dev.write(frame); err != nil && first == nil {
			first = err
		}
	}
	if len(frames) > 0 && isUDP(frames[0][l.front:]) {
		yield()
	}
	return first
}

// isUDP reports whether a frame of the stack is of UDP. Nothing slows that down when the
// guest does not keep up, so its receiver is to run before more datagrams get there.
func isUDP(frame []byte) bool {
	const udp, protocol, nextHeader = 17, etherHeaderLen + 9, etherHeaderLen + 6
	switch string(frame[12:14]) {
	case etherTypeIPv4:
		return frame[protocol] == udp
	case etherTypeIPv6:
		return frame[nextHeader] == udp
	}
	return false
}

func (l *link) lose() bool { return l.drop > 0 && rand.Float64() < l.drop }

// arpReply returns the answer to an ARP request of Ethernet for IPv4 (RFC 826):
// everything but the guest itself is at gateway. It returns nil for anything else, and
// for a guest that asks whether its own address is free (RFC 5227).
func arpReply(frame []byte) []byte {
	const request, reply = "\x00\x01\x08\x00\x06\x04\x00\x01", "\x00\x01\x08\x00\x06\x04\x00\x02"
	if len(frame) < etherHeaderLen+28 || string(frame[14:22]) != request {
		return nil
	}
	sender, target := frame[22:32], frame[38:42] // both addresses; the IPv4 address
	if bytes.Equal(sender[6:], target) || string(sender[6:]) == "\x00\x00\x00\x00" {
		return nil
	}
	b := append([]byte(nil), sender[:6]...)
	b = append(append(b, gateway[:]...), etherTypeARP+reply...)
	b = append(append(b, gateway[:]...), target...)
	return append(b, sender...)
}
