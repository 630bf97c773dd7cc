package netsim_test

import (
	"fmt"
	"time"

	"github.com/KarpelesLab/slirp/internal/netsim"
)

// A test owns the clock and moves it to whatever happens next.
func Example() {
	start := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	now := start

	// 1000 bytes take 8 ms at 1 Mbit/s.
	link := netsim.New(netsim.Config{Delay: 20 * time.Millisecond, Rate: 1_000_000})
	for range 3 {
		link.Send(now, make([]byte, 1000))
	}
	for next := link.Next(); !next.IsZero(); next = link.Next() {
		now = next
		for p := link.Receive(now); p != nil; p = link.Receive(now) {
			fmt.Println(now.Sub(start), len(p))
		}
	}
	// Output:
	// 28ms 1000
	// 36ms 1000
	// 44ms 1000
}
