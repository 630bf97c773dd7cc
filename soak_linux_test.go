package slirp

import (
	"fmt"
	"os"
	"strings"
	"syscall"
)

// raiseOpenFiles has this process and those that it starts open n files, if that is
// allowed.
func raiseOpenFiles(n uint64) error {
	var lim syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil || lim.Cur >= n {
		return err
	}
	was := lim
	lim.Cur, lim.Max = n, max(n, lim.Max)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("%d open files are allowed, of at most %d, want %d: %w", was.Cur, was.Max, n, err)
	}
	return nil
}

// residentBytes is how much memory the process has of the machine's; 0: not known.
func residentBytes() (n int64) {
	status, _ := os.ReadFile("/proc/self/status")
	if _, rss, ok := strings.Cut(string(status), "VmRSS:"); ok {
		fmt.Sscan(rss, &n)
	}
	return n << 10
}

// openDescriptors is how many files the process has open; 0: not known.
func openDescriptors() int {
	files, _ := os.ReadDir("/proc/self/fd")
	return len(files)
}
