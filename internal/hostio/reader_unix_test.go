//go:build unix

package hostio

import (
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

// streams returns the two ends of a stream, on which nothing is ever on its way.
func streams(t *testing.T) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Skip(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "stream")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

// A read that is not filled has the end that is behind the bytes with them: the guest
// gets both as one segment.
func TestReaderEnd(t *testing.T) {
	for _, c := range []struct {
		name, sent string
		end        bool
		reads      []string
	}{
		{"bytes", "hello", false, []string{"hello"}},
		{"end", "", true, []string{"!"}},
		{"bytes and end", "hello", true, []string{"hello!", "!"}},
		{"as many as there is room for, and end", "0123456789", true, []string{"0123456789", "!"}},
		{"more than there is room for, and end", "0123456789ab", true, []string{"0123456789", "ab!"}},
	} {
		a, b := streams(t)
		given := false
		buf := make([]byte, 10)
		r := NewReader(a, func() []byte { given = true; return buf }, func() { given = false })
		b.Write([]byte(c.sent))
		if c.end {
			b.Close()
		}
		for _, want := range c.reads {
			n, err := r.Read()
			got := string(buf[:n])
			if err == io.EOF {
				got += "!"
			} else if err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
			if got != want || !given {
				t.Errorf("%s: a read is %q, want %q", c.name, got, want)
			}
		}
	}
}

// A Unix socket may have messages too: each read is one of them, whole.
func TestReaderMessages(t *testing.T) {
	for _, kind := range []int{syscall.SOCK_DGRAM, syscall.SOCK_SEQPACKET} {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, kind, 0)
		if err != nil {
			t.Log(err)
			continue
		}
		var ends [2]net.Conn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "messages")
			if ends[i], err = net.FileConn(f); err != nil {
				t.Fatal(err)
			}
			f.Close()
			defer ends[i].Close()
		}
		name := ends[0].LocalAddr().Network()
		buf := make([]byte, 1000)
		r := NewReader(ends[0], func() []byte { return buf }, func() {})
		long := strings.Repeat("x", 900)
		messages := []string{"one", "two", long, long}
		if kind == syscall.SOCK_DGRAM { // an empty one of the others is the end
			messages = append(messages, "", "three")
		}
		for _, m := range messages {
			ends[1].Write([]byte(m))
		}
		for _, want := range messages {
			n, err := r.Read()
			if got := string(buf[:n]); got != want || err != nil {
				t.Errorf("%s: a read is %d bytes, %v, want the message of %d", name, n, err, len(want))
			}
			if n > len(want) {
				break // the next read would wait for ever
			}
		}
	}
}
