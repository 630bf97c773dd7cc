package main

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"github.com/KarpelesLab/slirp"
)

// Bits of TUNSETOFFLOAD (linux/if_tun.h): what the kernel may leave to us.
const (
	tunChecksum = 1 // TUN_F_CSUM
	tunTSO4     = 2 // TUN_F_TSO4
	tunTSO6     = 4 // TUN_F_TSO6
)

// device is a TAP device. Each read and each write of it is one frame.
type device struct {
	fd  int
	raw syscall.RawConn // of fd, to wait for frames

	buf    []byte
	frames [][]byte // in buf
	try    func(fd uintptr) bool
	err    error
}

const (
	longest = slirp.VirtioNetHeaderLen + etherHeaderLen + 4 + 65535 // with a VLAN tag
	batch   = 64                                                    // frames of one read
)

// openTAP makes a TAP device in a network namespace. It goes when the program ends.
func openTAP(ns, name string, vnet bool) (*device, error) {
	var fd int
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread, which is in another namespace then, ends with
		// the goroutine. The descriptor may be used by any.
		runtime.LockOSThread()
		if err = enter(ns); err == nil {
			fd, err = open(name, vnet)
		}
	}()
	<-done
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	raw, err := file.SyscallConn()
	if err != nil {
		return nil, err
	}
	d := &device{fd: fd, raw: raw, buf: make([]byte, 4*longest)}
	d.try = d.readSome
	return d, nil
}

// setns is the number of the system call, which package syscall does not have.
var setns = map[string]uintptr{"386": 346, "amd64": 308, "arm": 375, "arm64": 268, "loong64": 268, "ppc64le": 350, "riscv64": 268, "s390x": 339}

// enter moves the calling thread to a network namespace.
func enter(ns string) error {
	if ns == "" {
		return nil
	}
	if filepath.Base(ns) == ns {
		ns = "/run/netns/" + ns
	}
	f, err := os.Open(ns)
	if err != nil {
		return err
	}
	defer f.Close()
	number, ok := setns[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("the number of setns is not known on %s", runtime.GOARCH)
	}
	if _, _, e := syscall.RawSyscall(number, f.Fd(), syscall.CLONE_NEWNET, 0); e != 0 {
		return os.NewSyscallError("setns", e)
	}
	return nil
}

// open makes a TAP device in the namespace of the calling thread.
func open(name string, vnet bool) (fd int, err error) {
	fd, err = syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return 0, fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer func() {
		if err != nil {
			syscall.Close(fd)
		}
	}()
	var ifreq struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(ifreq.name[:syscall.IFNAMSIZ-1], name)
	ifreq.flags = syscall.IFF_TAP | syscall.IFF_NO_PI
	if vnet {
		ifreq.flags |= syscall.IFF_VNET_HDR
	}
	if err := ioctl("TUNSETIFF", fd, syscall.TUNSETIFF, uintptr(unsafe.Pointer(&ifreq))); err != nil || !vnet {
		return fd, err
	}
	size := int32(slirp.VirtioNetHeaderLen)
	if err := ioctl("TUNSETVNETHDRSZ", fd, syscall.TUNSETVNETHDRSZ, uintptr(unsafe.Pointer(&size))); err != nil {
		return fd, err
	}
	return fd, ioctl("TUNSETOFFLOAD", fd, syscall.TUNSETOFFLOAD, tunChecksum|tunTSO4|tunTSO6)
}

func ioctl(name string, fd int, request, arg uintptr) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, arg); e != 0 {
		return os.NewSyscallError(name, e)
	}
	return nil
}

// read waits for frames, and returns those that there are, in memory that the next
// read uses again.
func (d *device) read() ([][]byte, error) {
	d.frames, d.err = d.frames[:0], nil
	if err := d.raw.Read(d.try); err != nil {
		return nil, err
	}
	return d.frames, d.err
}

// readSome reads frames, and reports false if there are none.
func (d *device) readSome(fd uintptr) bool {
	for free := d.buf; len(d.frames) < batch && len(free) >= longest; {
		n, err := syscall.Read(int(fd), free)
		switch err {
		case nil:
			d.frames = append(d.frames, free[:n:n])
			free = free[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return len(d.frames) > 0
		default:
			d.err = err
			return true
		}
	}
	return true
}

// write writes a frame. It may be called concurrently.
func (d *device) write(frame []byte) error {
	for {
		if _, err := syscall.Write(d.fd, frame); err != syscall.EINTR {
			return err
		}
	}
}

// usage says what the program has cost.
func usage() string {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return fmt.Sprintf("user %v sys %v maxrss %d KiB", time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano()), u.Maxrss)
}
