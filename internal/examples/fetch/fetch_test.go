package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// runCommand runs the command and returns its exit code and what it wrote.
func runCommand(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, diag bytes.Buffer
	code = command(context.Background(), args, &out, &diag)
	return code, out.String(), diag.String()
}

func TestCheckAll(t *testing.T) {
	code, stdout, stderr := runCommand(t, "-download", "4", "-upload", "2", "-timeout", "5m")
	t.Logf("stdout:\n%s", stdout)
	if code != exitOK {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	for i, what := range []string{"ping gateway", "virtual server", "UDP echo", "download", "upload"} {
		for _, family := range []string{"IPv4", "IPv6"} {
			if needsHost := i >= 2; needsHost && family == "IPv6" && strings.Contains(stderr, "no IPv6 loopback") {
				continue
			}
			if !hasRow(stdout, what, family) {
				t.Errorf("no row says that %s over %s is ok", what, family)
			}
		}
	}
	if strings.Contains(stderr, "\x1b") {
		t.Errorf("escape sequences on what is no terminal: %q", stderr)
	}
}

// hasRow tells whether the table has a line that says ok.
func hasRow(table, what, family string) bool {
	for line := range strings.Lines(table) {
		if strings.HasPrefix(line, what) && strings.Contains(line, family) && strings.HasSuffix(line, "ok\n") {
			return true
		}
	}
	return false
}

func TestCheckAllNamesWhatFailed(t *testing.T) {
	gone, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("no more time"))
	var stdout, stderr bytes.Buffer
	if code := command(gone, []string{"-download", "1", "-upload", "1"}, &stdout, &stderr); code != exitFailed {
		t.Errorf("exit code %d, want %d", code, exitFailed)
	}
	if want := "fetch: FAILED: download over IPv4: no more time\n"; !strings.Contains(stderr.String(), want) {
		t.Errorf("stderr is %q, want it to contain %q", stderr.String(), want)
	}
	if !strings.Contains(stdout.String(), "FAILED") {
		t.Errorf("the table is %q, want it to contain FAILED", stdout.String())
	}
}

// startPages starts a web server on the host and returns what the guest calls it.
func startPages(t *testing.T) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("/page", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a page\n") })
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/page", http.StatusFound) })
	mux.HandleFunc("/hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/short", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "10")
		io.WriteString(w, "half")
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	to := netip.MustParseAddrPort(server.Listener.Addr().String())
	return "http://" + netip.AddrPortFrom(families[0].gateway, to.Port()).String()
}

func TestFetchURL(t *testing.T) {
	base := startPages(t)
	for _, page := range []string{"/page", "/moved"} {
		code, stdout, stderr := runCommand(t, "-url", base+page)
		if code != exitOK || stdout != "a page\n" || stderr != "" {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", page, code, stdout, stderr)
		}
	}
}

func TestFetchURLToFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "page")
	code, stdout, stderr := runCommand(t, "-url", startPages(t)+"/page", "-o", file)
	if code != exitOK || stdout != "" {
		t.Fatalf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "a page\n" {
		t.Errorf("the file holds %q (%v)", got, err)
	}
}

func TestFetchURLFailures(t *testing.T) {
	base := startPages(t)
	tests := []struct {
		name string
		args []string
		want string // in what is told on stderr
	}{
		{"status", []string{"-url", base + "/missing"}, `the server answers "404 Not Found"`},
		{"truncated", []string{"-url", base + "/short"}, "unexpected EOF"},
		{"refused", []string{"-url", "http://10.0.2.2:1/"}, "refused"},
		{"time-out", []string{"-url", base + "/hangs", "-timeout", "200ms"}, "timed out after 200ms"},
		{"no scheme", []string{"-url", "10.0.2.2"}, "unsupported protocol scheme"},
		{"file", []string{"-url", base + "/page", "-o", filepath.Join(t.TempDir(), "none", "page")}, "open "},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			code, _, stderr := runCommand(t, test.args...)
			if code != exitFailed || !strings.HasPrefix(stderr, "fetch: ") || !strings.Contains(stderr, test.want) {
				t.Errorf("exit code %d, stderr %q, want it to contain %q", code, stderr, test.want)
			}
		})
	}
}

func TestFlags(t *testing.T) {
	tests := []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-h"}, exitOK, "usage: fetch [flags]"},
		{[]string{"-nonsense"}, exitUsage, "-nonsense"},
		{[]string{"http://10.0.2.2/"}, exitUsage, "unexpected argument"},
		{[]string{"-o", "file"}, exitUsage, "-o needs -url"},
		{[]string{"-timeout", "0s"}, exitUsage, "-timeout"},
		{[]string{"-upload", "-1"}, exitUsage, "between 0 and"},
		{[]string{"-download", "9999999999999"}, exitUsage, "between 0 and"},
	}
	for _, test := range tests {
		code, stdout, stderr := runCommand(t, test.args...)
		if code != test.code || stdout != "" || !strings.Contains(stderr, test.want) {
			t.Errorf("fetch %q: exit code %d, stdout %q, stderr %q", test.args, code, stdout, stderr)
		}
	}
}

// A payload is the same each time, and no block of it is like another.
func TestPayload(t *testing.T) {
	const size = 600<<10 + 7
	p := newPayload(size)
	first, err := io.ReadAll(p.reader())
	if err != nil || len(first) != size {
		t.Fatalf("%d bytes, %v", len(first), err)
	}
	again, _ := io.ReadAll(iotest.OneByteReader(p.reader()))
	if !bytes.Equal(first, again) {
		t.Error("the second reading differs from the first")
	}
	if block := 256 << 10; bytes.Equal(first[:block], first[block:2*block]) {
		t.Error("two blocks are alike")
	}
	if other := newPayload(size - 1); other.digest == p.digest {
		t.Error("a shorter payload has the same digest")
	}
}

// A reply that differs from the right one in any bit is refused, but for the
// fields that are the sender's own business.
func TestCheckReply(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			want := echoMessage(f.gateway, f.guest, true, 1, 2, []byte("data"))
			etherType, free := []byte{0x08, 0x00}, "" // the IPv4 header has a sum over all of it
			if f.guest.Is6() {
				etherType, free = []byte{0x86, 0xdd}, "\x01\x02\x03\x07"
			}
			frame := slices.Concat(guestMAC[:], gatewayMAC[:], etherType, want)
			if err := checkReply(frame, want); err != nil {
				t.Fatal(err)
			}
			for bit := range len(frame) * 8 {
				if at := bit/8 - etherHeaderLen; at >= 0 && strings.IndexByte(free, byte(at)) >= 0 {
					continue
				}
				bad := bytes.Clone(frame)
				bad[bit/8] ^= 1 << (bit % 8)
				if checkReply(bad, want) == nil {
					t.Errorf("bit %d changed, and the reply passed", bit)
				}
			}
			if checkReply(frame[:len(frame)-1], want) == nil || checkReply(nil, want) == nil {
				t.Error("a short reply passed")
			}
		})
	}
}

// On a terminal, one line is written over and over and wiped in the end.
func TestLiveProgress(t *testing.T) { synctest.Test(t, testLiveProgress) }

func testLiveProgress(t *testing.T) {
	var screen, table bytes.Buffer
	r := newReport(&table, &screen)
	r.live = true
	r.run(t.Context(), "IPv4", check{what: "download", size: 3 * mebibyte, run: func(_ context.Context, m *meter) (int64, error) {
		m.Write(make([]byte, 2*mebibyte))
		time.Sleep(250 * time.Millisecond)
		return 3 * mebibyte, nil
	}})
	if got := screen.String(); !strings.Contains(got, "\r\x1b[Kdownload over IPv4: 2 of 3 MiB") || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("the screen got %q", got)
	}
	if err := r.finish(); err != nil || !hasRow(table.String(), "download", "IPv4") {
		t.Errorf("finish returned %v, the table is %q", err, table.String())
	}
	r.run(t.Context(), "IPv6", check{what: "upload", run: func(context.Context, *meter) (int64, error) {
		return 0, fmt.Errorf("lost")
	}})
	if err := r.finish(); err == nil || err.Error() != "FAILED: upload over IPv6: lost" {
		t.Errorf("finish returned %v", err)
	}
}
