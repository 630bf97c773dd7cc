package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// report runs checks, shows how far they are, and keeps what came of them.
type report struct {
	table  io.Writer
	screen io.Writer
	live   bool // the screen is a terminal: one line is written over and over
	failed []string
}

func newReport(table, screen io.Writer) *report {
	r := &report{table: table, screen: screen, live: isTerminal(screen)}
	fmt.Fprintf(table, rowFormat, "what", "family", "bytes", "time", "Mbit/s", "result")
	return r
}

const rowFormat = "%-14s  %-6s  %12s  %12s  %8s  %s\n"

// isTerminal tells whether someone may be looking.
func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// run makes one check and prints its line of the table.
func (r *report) run(ctx context.Context, family string, c check) {
	name := c.what + " over " + family
	var m meter
	stop := r.watch(name, c.size, &m)
	start := time.Now()
	n, err := c.run(ctx, &m)
	took := time.Since(start)
	stop()

	result := "ok"
	if err != nil {
		result = "FAILED"
		r.failed = append(r.failed, fmt.Sprintf("%s: %v", name, reason(ctx, err)))
	}
	rate := "-"
	if c.size > 0 && err == nil {
		rate = fmt.Sprintf("%.0f", float64(n)*8/1e6/took.Seconds())
	}
	fmt.Fprintf(r.table, rowFormat, c.what, family, strconv.FormatInt(n, 10), milliseconds(took), rate, result)
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f ms", float64(d)/float64(time.Millisecond))
}

// reason prefers the cause for which everything was stopped to what the stop
// looked like from inside.
func reason(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// note tells the user something that is not a result.
func (r *report) note(text string) { fmt.Fprintln(r.screen, "fetch:", text) }

// finish returns an error that names what failed.
func (r *report) finish() error {
	if len(r.failed) == 0 {
		return nil
	}
	return errors.New("FAILED: " + strings.Join(r.failed, "\nfetch: FAILED: "))
}

// meter counts the bytes that are written to it.
type meter struct{ n atomic.Int64 }

func (m *meter) Write(b []byte) (int, error) {
	m.n.Add(int64(len(b)))
	return len(b), nil
}

// watch shows how far the meter is on its way to size, on a terminal many times
// a second, elsewhere now and then. The function it returns ends that.
func (r *report) watch(name string, size int64, m *meter) (stop func()) {
	if size == 0 {
		return func() {}
	}
	every, format, last := 5*time.Second, "%s: %d of %d MiB\n", ""
	if r.live {
		every, format, last = 100*time.Millisecond, "\r\x1b[K%s: %d of %d MiB", "\r\x1b[K"
	}
	show := func() { fmt.Fprintf(r.screen, format, name, m.n.Load()/mebibyte, size/mebibyte) }
	show()
	quit, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				show()
			case <-quit:
				io.WriteString(r.screen, last)
				return
			}
		}
	}()
	return func() {
		close(quit)
		<-ended
	}
}
