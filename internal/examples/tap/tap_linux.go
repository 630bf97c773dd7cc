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
	tunChecksum = 1    // TUN_F_CSUM
	tunTSO4     = 2    // TUN_F_TSO4
	tunTSO6     = 4    // TUN_F_TSO6
	tunUSO4     = 0x20 // TUN_F_USO4
	tunUSO6     = 0x40 // TUN_F_USO6
)

// device is a TAP device. Each read and each write of it is one frame.
type device struct {
	fd     int
	uso    bool            // the kernel takes several UDP datagrams in a frame
	raw    syscall.RawConn // of fd, to wait for frames
	poll   time.Duration   // how long it is awake for after frames
	others *others

	buf    []byte
	frames [][]byte // in buf
}

const (
	longest = slirp.VirtioNetHeaderLen + etherHeaderLen + 4 + 65535 // with a VLAN tag
	batch   = 64                                                    // frames of one read
)

// openTAP makes a TAP device in a network namespace. It goes when the program ends.
func openTAP(ns, name string, vnet bool, poll time.Duration) (*device, error) {
	var fd int
	var uso bool
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Never unlocked: the thread, which is in another namespace then, ends with
		// the goroutine. The descriptor may be used by any.
		runtime.LockOSThread()
		if err = enter(ns); err == nil {
			fd, err = open(name, vnet)
			if err == nil && vnet {
				uso, err = offload(fd)
			}
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
	others, err := newOthers()
	if err != nil {
		return nil, err
	}
	return &device{fd: fd, uso: uso, raw: raw, poll: poll, others: others, buf: make([]byte, 16*longest)}, nil
}

// others lets other goroutines run, those too that wait for descriptors: the scheduler
// looks at these only when there is nothing left to run. So this waits for a descriptor
// as well, which is ready at once.
type others struct {
	fd  uintptr // an eventfd(2)
	raw syscall.RawConn
}

func newOthers() (*others, error) {
	fd, _, errno := syscall.Syscall(syscall.SYS_EVENTFD2, 0, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if errno != 0 {
		return nil, os.NewSyscallError("eventfd2", errno)
	}
	raw, err := os.NewFile(fd, "eventfd").SyscallConn()
	return &others{fd, raw}, err
}

func (o *others) run() {
	ready := false
	o.raw.Read(func(uintptr) bool {
		if ready {
			return true
		}
		ready = true
		one := uint64(1)
		_, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, o.fd, uintptr(unsafe.Pointer(&one)), unsafe.Sizeof(one))
		return errno != 0
	})
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
	return fd, ioctl("TUNSETIFF", fd, syscall.TUNSETIFF, uintptr(unsafe.Pointer(&ifreq)))
}

// offload has the kernel hand packets of many segments, and unfinished checksums, to us.
// What it takes from us is not for us to choose: whether several UDP datagrams in a frame
// are among it (Linux 6.2) shows in whether it would hand us such. It must not: the stack
// is given packets without their virtio_net_hdr, and cannot tell several datagrams from
// one that is long.
func offload(fd int) (uso bool, err error) {
	size := int32(slirp.VirtioNetHeaderLen)
	if err := ioctl("TUNSETVNETHDRSZ", fd, syscall.TUNSETVNETHDRSZ, uintptr(unsafe.Pointer(&size))); err != nil {
		return false, err
	}
	const offloads = tunChecksum | tunTSO4 | tunTSO6
	uso = ioctl("TUNSETOFFLOAD", fd, syscall.TUNSETOFFLOAD, offloads|tunUSO4|tunUSO6) == nil
	return uso, ioctl("TUNSETOFFLOAD", fd, syscall.TUNSETOFFLOAD, offloads)
}

func ioctl(name string, fd int, request, arg uintptr) error {
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), request, arg); e != 0 {
		return os.NewSyscallError(name, e)
	}
	return nil
}

// turn is how long a device that never runs empty keeps a processor for itself.
const turn = time.Millisecond

// each calls f with the frames that there are, again and again, until the device fails.
// Their memory is used again when f returns. Frames are often answered at once, and to go
// to sleep and be woken takes longer than to wait for that: so it does not sleep before
// nothing has come for as long as poll. (KVM has halt_poll_ns for that, vhost
// busyloop-timeout.)
func (d *device) each(f func(frames [][]byte)) error {
	var failed error
	err := d.raw.Read(func(uintptr) (done bool) {
		last := time.Now() // when there were frames, or a sign of them
		for othersRan := last; ; {
			empty, err := d.read()
			if len(d.frames) > 0 {
				f(d.frames)
				yield() // to who gets what was in them
				last = time.Now()
			}
			switch {
			case err != nil:
				failed = err
				return true
			case empty && time.Since(last) >= d.poll:
				return false // frames that have come meanwhile end the wait at once
			case empty:
				d.others.run()
				yield()
				othersRan = time.Now()
			case time.Since(othersRan) >= turn:
				d.others.run()
				othersRan = time.Now()
			}
		}
	})
	if err != nil {
		return err
	}
	return failed
}

// yield lets other threads have the processor that wait for it: the guest may be one.
func yield() { syscall.RawSyscall(syscall.SYS_SCHED_YIELD, 0, 0, 0) }

// read reads frames, and reports whether there are no more.
func (d *device) read() (empty bool, err error) {
	d.frames = d.frames[:0]
	for free := d.buf; len(d.frames) < batch && len(free) >= longest; {
		n, errno := d.call(syscall.SYS_READ, free)
		switch errno {
		case 0:
			d.frames = append(d.frames, free[:n:n])
			free = free[n:]
		case syscall.EINTR:
		case syscall.EAGAIN:
			return true, nil
		default:
			return false, errno
		}
	}
	return false, nil
}

// write writes a frame. It may be called concurrently.
func (d *device) write(frame []byte) error {
	for {
		switch _, errno := d.call(syscall.SYS_WRITE, frame); errno {
		case 0:
			return nil
		case syscall.EINTR:
		default:
			return errno
		}
	}
}

// call reads or writes a frame. The descriptor is in non-blocking mode: to tell the
// scheduler, as package syscall does, of a call that may take long would cost more than
// the call.
func (d *device) call(number uintptr, p []byte) (n int, errno syscall.Errno) {
	r, _, errno := syscall.RawSyscall(number, uintptr(d.fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	return int(r), errno
}

// usage says what the program has cost.
func usage() string {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return fmt.Sprintf("user %v sys %v maxrss %d KiB", time.Duration(u.Utime.Nano()), time.Duration(u.Stime.Nano()), u.Maxrss)
}
