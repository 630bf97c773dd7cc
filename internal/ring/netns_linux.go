package ring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/KarpelesLab/slirp"
)

// NetNS is a network namespace without a name. It ends with its last socket,
// device and process, so nothing is left when the program dies.
type NetNS struct {
	file *os.File
}

// NewNetNS makes a namespace whose only device is its loopback, which is up.
func NewNetNS() (*NetNS, error) {
	ns := new(NetNS)
	err := onThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		ns.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := ns.IP("link set lo up"); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// Close lets go of the namespace.
func (ns *NetNS) Close() error { return ns.file.Close() }

// Do runs f on a thread in the namespace. A socket made there stays there, and
// may be used by any goroutine.
func (ns *NetNS) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return f()
	})
}

// onThread runs f on an operating system thread of its own.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// Run runs a program in the namespace, as [Run] does.
func (ns *NetNS) Run(cmd *exec.Cmd) error {
	return ns.Do(func() error { return runHere(cmd) })
}

// Run runs a program, which is killed if this process ends first. What it writes
// to its standard error, if that is not set, is part of the error.
func Run(cmd *exec.Cmd) error {
	return onThread(func() error { return runHere(cmd) })
}

// runHere runs a program from the calling thread, with which it dies.
func runHere(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var stderr strings.Builder
	if cmd.Stderr == nil {
		cmd.Stderr = &stderr
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", cmd, err, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// IP runs commands of ip(8) in the namespace, up to the first that fails.
func (ns *NetNS) IP(commands ...string) error {
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(strings.Join(commands, "\n") + "\n")
	return ns.Run(cmd)
}

// Veth joins the namespace to another one with a pair of devices.
func (ns *NetNS) Veth(name string, peer *NetNS, peerName string) error {
	return ns.IP(fmt.Sprintf("link add %s type veth peer name %s netns /proc/%d/fd/%d",
		name, peerName, os.Getpid(), peer.file.Fd()))
}

// TAP makes a TAP device in the namespace. Each Read and Write of the file is
// one Ethernet frame; the device goes when the file is closed. With virtioNet there is
// a virtio_net_hdr in front of each, and frames of several segments and with
// checksums that are not finished come and go.
func (ns *NetNS) TAP(name string, virtioNet bool) (file *os.File, err error) {
	err = ns.Do(func() error {
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if virtioNet {
			flags |= unix.IFF_VNET_HDR
		}
		ifr.SetUint16(flags)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr))
		if err == nil && virtioNet {
			err = offload(fd)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), name)
		return nil
	})
	return file, err
}

// offload sets up a TAP device with IFF_VNET_HDR.
func offload(fd int) error {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, slirp.VirtioNetHeaderLen); err != nil {
		return os.NewSyscallError("TUNSETVNETHDRSZ", err)
	}
	return os.NewSyscallError("TUNSETOFFLOAD", unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads))
}

const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6

// TakesUSO reports whether the kernel takes frames of several UDP datagrams from a TAP
// device with a virtio_net_hdr: since Linux 6.2. It shows in whether it would hand out
// such, which it is told not to.
func TakesUSO(tap *os.File) (takes bool) {
	raw, err := tap.SyscallConn()
	if err != nil {
		return false
	}
	raw.Control(func(fd uintptr) {
		takes = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloads|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil
		unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, offloads)
	})
	return takes
}

// Dial connects a socket of the namespace. The address holds an IP address, not
// a name.
func (ns *NetNS) Dial(ctx context.Context, d *net.Dialer, network, address string) (conn net.Conn, err error) {
	err = ns.Do(func() (err error) {
		conn, err = d.DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens in the namespace.
func (ns *NetNS) Listen(ctx context.Context, address string) (l net.Listener, err error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	err = ns.Do(func() (err error) {
		l, err = lc.Listen(ctx, "tcp", address)
		return err
	})
	return l, err
}

// ListenPacket opens a UDP socket in the namespace.
func (ns *NetNS) ListenPacket(ctx context.Context, address string) (c net.PacketConn, err error) {
	err = ns.Do(func() (err error) {
		c, err = new(net.ListenConfig).ListenPacket(ctx, "udp", address)
		return err
	})
	return c, err
}

// ReceiveErrors is a [net.Dialer.Control] that asks for every ICMP error on a
// datagram socket. Without it Linux reports only those that it holds to be
// lasting, and "network unreachable" is none.
func ReceiveErrors(network, _ string, c syscall.RawConn) error {
	level, option := unix.IPPROTO_IP, unix.IP_RECVERR
	switch network {
	case "udp4":
	case "udp6":
		level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	default:
		return nil
	}
	var err error
	failed := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), level, option, 1)
	})
	return errors.Join(failed, err)
}

// NoFragments is a [net.Dialer.Control] that forbids to fragment what a datagram
// socket sends: what does not fit fails.
func NoFragments(network, _ string, c syscall.RawConn) error {
	level, option := unix.IPPROTO_IP, unix.IP_MTU_DISCOVER
	switch network {
	case "udp4":
	case "udp6":
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER
	default:
		return nil
	}
	var err error
	failed := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), level, option, unix.IP_PMTUDISC_DO)
	})
	return errors.Join(failed, err)
}
