// Bench compares slirp with gVisor's netstack, which is the other TCP/IP stack in Go
// that programs embed for this: the same work, by the same guest, over the same
// loopback sockets, beside plain sockets that need no network at all. All of it
// happens in this process.
//
//	cd internal/bench && go run .
//
// prints one table: upload and download at two MTUs with one flow and four, how many
// short connections there are in a second, how long a request and its answer take, and
// what an idle flow costs. Flags say how much of it is done, and -cpuprofile with
// -only and -network where the time goes.
//
// The three take turns in every row, so that all have part in what else the machine
// does; it is the ratio that counts. CPU is the processor time of everything in the
// process, of guest and server too, over that with plain sockets; it depends less on
// other load than the time does.
//
// The netstack is what its users make of it: a channel endpoint, a forwarder, and a
// gonet connection that is copied from and to a net.Conn. Both stacks are spared the
// checksums of the guest, and compute those of what they send.
package main

import (
	"flag"
	"fmt"
	"log"
	"math"
	"net/netip"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"time"

	"github.com/KarpelesLab/slirp/internal/load"
)

// network is what is compared: a user-mode network with one guest.
type network interface {
	// open returns a flow of the guest from a port, which is not connected yet.
	open(port uint16, to netip.AddrPort) *load.Flow
	Close() error
	String() string // its state, for when it gets no further
}

// networks are made anew for each row. Those of slirp are one that takes packets one
// by one, and one that takes them as they come from the ring of a virtual network
// card.
var networks = []struct {
	name  string
	setUp func(mtu int) network // nil: no network, plain sockets
}{
	{"raw", nil},
	{"slirp", func(mtu int) network { return newSlirp(mtu, 1) }},
	{"slirp batch", func(mtu int) network { return newSlirp(mtu, batch) }},
	{"gvisor", func(mtu int) network { return newGVisor(mtu) }},
}

const (
	batch = 32
	guest = "10.0.2.15"
)

var (
	size     = flag.Int64("size", 1<<30, "bytes that are moved in each row of uploads and downloads")
	conns    = flag.Int("conns", 4000, "short connections in each row")
	trips    = flag.Int("trips", 20000, "requests in each row of round trips")
	idle     = flag.Int("idle", 1000, "idle flows")
	rounds   = flag.Int("rounds", 8, "turns in which each row is done")
	only     = flag.String("only", "", "do only rows whose name contains this")
	onlyNet  = flag.String("network", "", "do only this network: raw, slirp, slirp batch, gvisor")
	patience = flag.Duration("patience", 2*time.Minute, "how long a turn may take before the state of its connections is printed")
	profile  = flag.String("cpuprofile", "", "write a CPU profile to this file")
)

// row is one line of the table. Its unit is what value returns.
type row struct {
	name, unit string
	better     func(value, other float64) float64 // how many times better a value is
	run        func(setUp func(mtu int) network) (value float64, c load.Cost)
	once       bool // it is not done in turns
}

func more(value, other float64) float64 { return value / other }
func less(value, other float64) float64 { return other / value }

func rows() (rows []row) {
	for _, mtu := range []int{1500, 65520} {
		for _, flows := range []int{1, 4} {
			for _, up := range []bool{true, false} {
				name := fmt.Sprintf("%s MTU %d, %d flow(s)", map[bool]string{true: "upload", false: "download"}[up], mtu, flows)
				rows = append(rows, row{name, "Gbit/s", more, func(setUp func(int) network) (float64, load.Cost) {
					return move(setUp, mtu, flows, up)
				}, false})
			}
		}
	}
	for _, parallel := range []int{1, 16} {
		rows = append(rows, row{fmt.Sprintf("connect, request, close, %d at a time", parallel), "1/s", more,
			func(setUp func(int) network) (float64, load.Cost) { return exchanges(setUp, parallel) }, false})
	}
	for _, p := range []int{50, 99} {
		rows = append(rows, row{fmt.Sprintf("round trip p%d", p), "us", less,
			func(setUp func(int) network) (float64, load.Cost) { return roundTrips(setUp, p) }, false})
	}
	return append(rows, row{"memory of an idle flow", "bytes", less, idleMemory, true})
}

func main() {
	flag.Parse()
	if *profile != "" {
		f, err := os.Create(*profile)
		check(err)
		check(pprof.StartCPUProfile(f))
		defer pprof.StopCPUProfile()
	}
	fmt.Printf("%-45s", fmt.Sprintf("%s, GOMAXPROCS %d", runtime.Version(), runtime.GOMAXPROCS(0)))
	for _, n := range networks {
		fmt.Printf("%12s", n.name)
		if n.setUp != nil {
			fmt.Printf("%7s%9s", "/raw", "CPU/raw")
		}
	}
	fmt.Printf("%14s%14s\n", "slirp/gvisor", "batch/gvisor")
	for _, r := range rows() {
		if strings.Contains(r.name, *only) {
			printRow(r)
		}
	}
}

// printRow runs a row with every network in turn and prints it.
func printRow(r row) {
	values, costs := make([]float64, len(networks)), make([]load.Cost, len(networks))
	turns := *rounds
	if r.once {
		turns = 1
	}
	for range turns {
		for i, n := range networks {
			if *onlyNet != "" && *onlyNet != n.name {
				continue
			}
			v, c := r.run(n.setUp)
			values[i] += v / float64(turns)
			costs[i] = costs[i].Add(c)
		}
	}
	fmt.Printf("%-45s", r.name+", "+r.unit)
	for i := range networks {
		fmt.Printf("%12s", number("%.4g", values[i]))
		if i > 0 {
			fmt.Printf("%7s%9s", number("%.2f", values[i]/values[0]),
				number("%.2f", float64(costs[i].CPU)/float64(costs[0].CPU)))
		}
	}
	for i := range networks {
		if networks[i].name != "raw" && networks[i].name != "gvisor" {
			fmt.Printf("%14s", number("%.2fx", r.better(values[i], values[len(values)-1])))
		}
	}
	fmt.Println()
}

// number is a number as it is printed, of which there may be none: not every network
// is measured.
func number(format string, v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return "-"
	}
	return fmt.Sprintf(format, v)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// dial returns n connections to a new server, over a network or over none, and what
// closes all that.
func dial(setUp func(int) network, mtu, n int) (conns []load.Conn, end func()) {
	s, err := load.Listen(netip.MustParseAddr("127.0.0.1"))
	check(err)
	if setUp == nil {
		sockets, err := load.Dial(s.Addr(), n)
		check(err)
		for _, c := range sockets {
			conns = append(conns, c)
		}
		return conns, s.Close
	}
	net := setUp(mtu)
	hangs := time.AfterFunc(*patience, func() {
		for _, c := range conns {
			log.Print(c)
		}
		log.Fatalf("%T gets no further: %v", net, net)
	})
	for i := range n {
		f := net.open(uint16(1024+i), s.Addr())
		check(f.Open())
		conns = append(conns, f)
	}
	return conns, func() {
		hangs.Stop()
		s.Close()
		net.Close()
	}
}

func move(setUp func(int) network, mtu, flows int, up bool) (float64, load.Cost) {
	conns, end := dial(setUp, mtu, flows)
	defer end()
	n := *size / int64(*rounds)
	check(load.Move(conns, up, n/16)) // windows and buffers have their size then
	c, err := load.Measure(func() error { return load.Move(conns, up, n) })
	check(err)
	return float64(n) * 8 / float64(c.Wall), c
}

func roundTrips(setUp func(int) network, percentile int) (float64, load.Cost) {
	conns, end := dial(setUp, 1500, 1)
	defer end()
	took := make([]time.Duration, *trips / *rounds)
	check(conns[0].RoundTrips(took[:len(took)/16+1]))
	c, err := load.Measure(func() error { return conns[0].RoundTrips(took) })
	check(err)
	return float64(load.Percentile(took, percentile)) / 1e3, c
}

func exchanges(setUp func(int) network, parallel int) (float64, load.Cost) {
	s, err := load.Listen(netip.MustParseAddr("127.0.0.1"))
	check(err)
	defer s.Close()
	n := *conns / *rounds
	var run func() error
	if setUp == nil {
		run = func() error { return load.SocketExchanges(s.Addr(), n, parallel) }
	} else {
		net := setUp(1500)
		defer net.Close()
		run = func() error {
			return load.Exchanges(func(port uint16) *load.Flow { return net.open(port, s.Addr()) }, n, parallel)
		}
	}
	c, err := load.Measure(run)
	check(err)
	return float64(n) / c.Wall.Seconds(), c
}

// idleMemory is the heap and the stacks of a flow that has moved some data both ways
// and is idle, with the server's end of it. A plain socket has two ends as well.
func idleMemory(setUp func(int) network) (float64, load.Cost) {
	first, endFirst := dial(setUp, 1500, 1) // what there is once is not counted
	defer endFirst()
	useAndPark(first)
	before := memory()
	conns, end := dial(setUp, 1500, *idle)
	defer end()
	c, err := load.Measure(func() error { useAndPark(conns); return nil })
	check(err)
	n := float64(memory()-before) / float64(len(conns))
	runtime.KeepAlive(conns)
	return n, c
}

func useAndPark(conns []load.Conn) {
	for _, c := range conns {
		check(c.Upload(100_000))
		check(c.Download(100_000))
		check(c.Park())
		c.Release()
	}
}

// memory returns the bytes in use once what ends has ended.
func memory() uint64 {
	time.Sleep(time.Second)
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
