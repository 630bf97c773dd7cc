package ring

import (
	"bytes"
	"compress/gzip"
	"io"
	"math"
	"net"
	"strings"
	"testing"
)

// recorder is a device that keeps what is written to it.
type recorder struct{ frames [][]byte }

func (r *recorder) Read([]byte) (int, error) { return 0, io.EOF }

func (r *recorder) Write(frame []byte) (int, error) {
	r.frames = append(r.frames, bytes.Clone(frame))
	return len(frame), nil
}

func TestARP(t *testing.T) {
	const (
		guest, gateway = "\x52\x54\x00\x12\x34\x56", "\x52\x55\x0a\x00\x02\x02"
		header         = "\x08\x06\x00\x01\x08\x00\x06\x04\x00"
		unknown        = "\x00\x00\x00\x00\x00\x00"
		ipGuest, ipGW  = "\x0a\x00\x02\x0f", "\x0a\x00\x02\x02"
	)
	request := func(sender, target string) string {
		return strings.Repeat("\xff", 6) + guest + header + "\x01" + guest + sender + unknown + target
	}
	for _, test := range []struct{ name, frame, want string }{
		{"request", request(ipGuest, ipGW), guest + gateway + header + "\x02" + gateway + ipGW + guest + ipGuest},
		{"announcement", request(ipGuest, ipGuest), ""},
		{"probe", request("\x00\x00\x00\x00", ipGuest), ""},
		{"reply", gateway + guest + header + "\x02" + guest + ipGuest + gateway + ipGW, ""},
		{"truncated", request(ipGuest, ipGW)[:41], ""},
		{"no header", guest, ""},
	} {
		var device recorder
		if err := (&Link{Device: &device}).receive([]byte(test.frame)); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		if got := string(bytes.Join(device.frames, nil)); got != test.want {
			t.Errorf("%s: answered with %x, want %x", test.name, got, test.want)
		}
	}
}

func TestLoss(t *testing.T) {
	const frames = 100_000
	for _, loss := range []float64{0, 0.01, 0.05, 1} {
		var device recorder
		l := &Link{Device: &device, Loss: loss}
		for range frames {
			if err := l.Send([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if l.Lost()+len(device.frames) != frames {
			t.Errorf("loss %v: %d frames lost, %d delivered of %d", loss, l.Lost(), len(device.frames), frames)
		}
		if got := float64(l.Lost()) / frames; math.Abs(got-loss) > 0.005 {
			t.Errorf("loss %v: %v of the frames are lost", loss, got)
		}
	}
}

func TestFramed(t *testing.T) {
	a, b := net.Pipe()
	sent := []string{"", "x", strings.Repeat("frame", 13000)}
	go func() {
		defer a.Close()
		f := &Framed{Conn: a}
		for _, frame := range append(sent, "too long for the reader") {
			if n, err := f.Write([]byte(frame)); err != nil || n != len(frame) {
				return // the reader, too, misses it
			}
		}
	}()
	defer b.Close()
	f := &Framed{Conn: b}
	buf := make([]byte, 1<<16)
	for _, want := range sent {
		if n, err := f.Read(buf); err != nil || string(buf[:n]) != want {
			t.Errorf("read a frame of %d bytes, %v, want one of %d", n, err, len(want))
		}
	}
	if _, err := f.Read(buf[:8]); err != io.ErrShortBuffer {
		t.Errorf("a frame larger than the buffer: %v, want %v", err, io.ErrShortBuffer)
	}
}

func TestInitramfs(t *testing.T) {
	var archive bytes.Buffer
	err := Initramfs(&archive, []File{
		{Name: "a/b/c", Mode: 0o755, Data: []byte("hello")},
		{Name: "a/d", Mode: 0o644},
	})
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(&archive)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	entry := func(ino, mode, size, name string) string {
		zero := "00000000"
		return "070701" + ino + mode + zero + zero + "00000001" + zero + size + zero + zero + zero + zero + name
	}
	want := entry("00000001", "000041ed", "00000000", "0000000200000000a\x00") + // padded to 4 bytes
		entry("00000002", "000041ed", "00000000", "0000000400000000a/b\x00\x00\x00") +
		entry("00000003", "000081ed", "00000005", "0000000600000000a/b/c\x00hello\x00\x00\x00") +
		entry("00000004", "000081a4", "00000000", "0000000400000000a/d\x00\x00\x00") +
		entry("00000005", "00000000", "00000000", "0000000b00000000TRAILER!!!\x00\x00\x00\x00")
	if string(got) != want {
		t.Errorf("archive:\n%q\nwant:\n%q", got, want)
	}
}

func TestVerify(t *testing.T) {
	const n = 100_000
	flipped, _ := io.ReadAll(Data(n))
	flipped[n/2] ^= 1
	for _, test := range []struct {
		name string
		r    io.Reader
		ok   bool
	}{
		{"same", Data(n), true},
		{"shorter", Data(n - 1), false},
		{"longer", Data(n + 1), false},
		{"one bit flipped", bytes.NewReader(flipped), false},
		{"cut off", io.MultiReader(Data(n), broken{}), false},
	} {
		if err := Verify(test.r, n); (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

// broken is a stream that fails.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }
