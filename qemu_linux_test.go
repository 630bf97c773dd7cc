package slirp_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/KarpelesLab/slirp"
	"github.com/KarpelesLab/slirp/internal/ring"
)

// qemuInit is what the virtual machine runs. It configures both families by
// hand, waits for duplicate address detection, and prints a line for each thing
// it tries.
const qemuInit = `#!/bin/busybox sh
export PATH=/bin
busybox mkdir -p /proc /sys /dev
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox --install -s /bin
for m in %[1]s; do insmod /modules/$m.ko || echo "cannot load $m"; done
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip addr add fd00::15/64 dev eth0
ip route add default via 10.0.2.2
ip -6 route add default via fd00::2
for i in $(seq 100); do
	ip -6 addr show dev eth0 | grep -q tentative || break
	sleep 0.1
done
ip -6 addr show dev eth0
result() { echo "RESULT $*"; }
try() { # FAMILY GATEWAY SERVER URL
	ping -c 3 -i 0.1 -W 10 $2 | grep -q '3 packets received' && result $1 ping ok
	wget -q -O /data $4 && result $1 download $(sha256sum </data)
	result $1 upload $({
		printf "PUT /%[3]d HTTP/1.0\r\nContent-Length: %[3]d\r\n\r\n"
		cat /data
	} | nc $3 80 | tail -n 1)
	rm /data
}
%[2]s
poweroff -f
`

// TestQEMU boots a virtual machine whose network card is the stack, over the
// stream of frames that QEMU's "stream" backend speaks. It needs no root. The
// kernel is the last one in /boot, or that of a package unpacked in the
// directory that SLIRP_KERNEL names.
func TestQEMU(t *testing.T) {
	needRing(t, "qemu-system-x86_64", "busybox")
	if runtime.GOARCH != "amd64" {
		t.Skip("the machine is an amd64 one, and runs this system's busybox")
	}
	root := os.Getenv("SLIRP_KERNEL")
	kernel, err := ring.FindKernel(cmp.Or(root, "/"))
	switch {
	case err != nil && root != "":
		t.Fatalf("SLIRP_KERNEL: %v", err)
	case err != nil:
		t.Skipf("needs a kernel, such as Debian's linux-image-cloud-amd64 unpacked in $SLIRP_KERNEL: %v", err)
	}
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	const size = 64 * ring.MiB
	sum, _, _ := ring.Sum(ring.Data(size))
	loopback := make(map[netip.Addr]string) // a server's address for the guest -> the real one
	var script []string
	var want []string
	for i, f := range ringFamilies {
		l, err := net.Listen("tcp", []string{"127.0.0.1:0", "[::1]:0"}[i])
		fatal(err)
		dataServer(t, l)
		address := l.Addr().(*net.TCPAddr).AddrPort()
		loopback[f.server] = address.String()
		url := fmt.Sprintf("http://%v/%d", netip.AddrPortFrom(f.server, 80), size)
		script = append(script, fmt.Sprintf("try %s %v %v %s", f.name, f.gateway, f.server, url))
		want = append(want, f.name+" ping ok", f.name+" download "+sum+" -", f.name+" upload received")
	}
	stack, err := slirp.NewWithConfig(slirp.Config{
		// A machine under software emulation may stand still for as long as its host
		// has other things to do. That a silent guest is given up is tested elsewhere.
		TCPIdleTimeout: -1,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if real, ok := loopback[netip.MustParseAddrPort(address).Addr()]; ok {
				return new(net.Dialer).DialContext(ctx, network, real)
			}
			return nil, syscall.ENETUNREACH
		},
	})
	fatal(err)

	dir := t.TempDir()
	initramfs := filepath.Join(dir, "initramfs")
	fatal(writeInitramfs(initramfs, kernel, size, strings.Join(script, "\n")))
	wire, err := net.Listen("unix", filepath.Join(dir, "wire"))
	fatal(err)
	served := make(chan error, 1)
	go func() {
		conn, err := wire.Accept()
		wire.Close()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		link := ring.Link{Stack: stack, Device: &ring.Framed{Conn: conn}}
		served <- link.Serve(func(err error) { t.Errorf("HandlePacket: %v", err) })
	}()

	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	var console bytes.Buffer
	vm := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-accel", "tcg", "-cpu", "max", "-m", "512",
		"-kernel", kernel.Image, "-initrd", initramfs,
		"-append", "console=ttyS0 quiet panic=-1",
		"-netdev", "stream,id=n0,server=off,addr.type=unix,addr.path="+wire.Addr().String(),
		// Without mergeable buffers: with them QEMU 7.2 may wait for ever for the guest
		// to say that it has room again.
		"-device", "virtio-net-pci,netdev=n0,mrg_rxbuf=off,romfile=,mac="+net.HardwareAddr(ring.GuestMAC[:]).String())
	vm.Stdout, vm.Stderr = &console, &console
	start := time.Now()
	stopWatch := watchProgress(t, stack)
	if err := ring.Run(vm); err != nil {
		t.Errorf("qemu: %v", err)
	}
	stopWatch()
	t.Logf("the machine ran for %v", time.Since(start).Round(time.Second))
	wire.Close()
	if err := <-served; !errors.Is(err, io.EOF) {
		t.Errorf("link: %v", err)
	}
	if err := stack.Close(); err != nil {
		t.Errorf("Stack.Close: %v", err)
	}

	results := make(map[string]bool)
	for line := range strings.Lines(console.String()) {
		if _, result, ok := strings.Cut(line, "RESULT "); ok {
			results[strings.Join(strings.Fields(result), " ")] = true
		}
	}
	for _, w := range want {
		if !results[w] {
			t.Errorf("the guest does not report %q", w)
		}
	}
	if t.Failed() {
		t.Logf("console:\n%s", &console)
	}
}

// watchProgress logs what the stack and every goroutine are at, once, if no packet
// of the guest has come for a minute. The function that it returns ends that.
func watchProgress(t *testing.T, stack *slirp.Stack) (stop func()) {
	const patience = time.Minute
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		last := stack.Stats().PacketsIn
		for {
			select {
			case <-done:
				return
			case <-time.After(patience):
			}
			st := stack.Stats()
			if st.PacketsIn == last {
				buf := make([]byte, 1<<20)
				t.Logf("no packet for %v: %+v\n%s", patience, st, buf[:runtime.Stack(buf, true)])
				return
			}
			last = st.PacketsIn
		}
	})
	return func() { close(done); wg.Wait() }
}

// writeInitramfs writes the virtual machine's file system: busybox, the drivers
// of its network card, and an init that runs the script.
func writeInitramfs(path string, kernel *ring.Kernel, size int, script string) error {
	modules, err := kernel.Modules("virtio_pci", "virtio_net")
	if err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	var load []string
	for _, m := range modules {
		load = append(load, strings.TrimSuffix(filepath.Base(m.Name), ".ko"))
	}
	files := append(modules,
		ring.File{Name: "bin/busybox", Mode: 0o755, Data: program},
		ring.File{Name: "init", Mode: 0o755, Data: fmt.Appendf(nil, qemuInit, strings.Join(load, " "), script, size)})
	var archive bytes.Buffer
	if err := ring.Initramfs(&archive, files); err != nil {
		return err
	}
	return os.WriteFile(path, archive.Bytes(), 0o600)
}
