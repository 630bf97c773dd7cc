package slirp

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if os.Getenv(soakPeerEnv) != "" {
		soakPeer()
	}
	code := m.Run()
	if code == 0 && flag.Lookup("test.fuzz").Value.String() == "" {
		if left := leakedGoroutines(20 * time.Second); left != "" {
			fmt.Fprintf(os.Stderr, "goroutines left behind:\n%s\n", left)
			code = 1
		}
	}
	os.Exit(code)
}

// leakedGoroutines returns the stacks of the goroutines that are still running
// after a while, other than the one that asks.
func leakedGoroutines(grace time.Duration) string {
	for end := time.Now().Add(grace); ; time.Sleep(10 * time.Millisecond) {
		left := otherGoroutines()
		if left == "" || time.Now().After(end) {
			return left
		}
	}
}

func otherGoroutines() string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var left []string
	for i, g := range strings.Split(string(buf), "\n\n") {
		switch {
		case i == 0: // the caller
		case strings.Contains(g, "os/signal.signal_recv"), strings.Contains(g, "os/signal.loop"):
		case strings.Contains(g, "runtime/pprof"), strings.Contains(g, "runtime.ReadTrace"):
		default:
			left = append(left, g)
		}
	}
	return strings.Join(left, "\n\n")
}

func TestLeakedGoroutines(t *testing.T) {
	stop := make(chan bool)
	go func() { <-stop }()
	if left := otherGoroutines(); !strings.Contains(left, "TestLeakedGoroutines") {
		t.Errorf("a goroutine was not found in:\n%s", left)
	}
	close(stop)
}
