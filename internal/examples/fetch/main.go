// Command fetch runs a whole network inside one process: servers on this
// machine's loopback, a NAT, and a guest behind it that downloads, uploads,
// echoes and pings. It needs no root, no interface and nothing installed:
//
//	go run ./internal/examples/fetch
//	go run ./internal/examples/fetch -url http://example.com/ -o page.html
//
// The guest is a second [slirp.Stack]: it has addresses of its own, and its
// DialContext is a [net/http.Transport]'s network. network.go joins the two.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"
)

const mebibyte = 1 << 20

// Exit codes of the command.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// options are the command's flags.
type options struct {
	url      string
	output   string
	timeout  time.Duration
	download int64 // bytes, for each address family
	upload   int64
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	os.Exit(command(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// command runs fetch with the arguments args and returns its exit code.
func command(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	opt, err := parseFlags(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return exitOK
	}
	if err != nil {
		return exitUsage
	}
	timedOut := fmt.Errorf("timed out after %v", opt.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, opt.timeout, timedOut)
	defer cancel()

	if opt.url != "" {
		err = fetchURL(ctx, opt.url, opt.output, stdout)
	} else {
		err = checkAll(ctx, opt.download, opt.upload, stdout, stderr)
	}
	if err != nil {
		fmt.Fprintln(stderr, "fetch:", err)
		return exitFailed
	}
	return exitOK
}

const usageText = `usage: fetch [flags]

Without -url: starts servers on this machine's loopback, a NAT, and a guest
behind the NAT; the guest pings, echoes, downloads and uploads over IPv4 and
IPv6, and every byte is checked. The result is a table. The exit code is 0 if
all went well, 1 if anything failed.

With -url: fetches the URL as a guest behind the NAT. 10.0.2.2 and fd00::2 are
this machine's loopback. A status other than 2xx is a failure.

flags:
`

// parseFlags reads the command line. What is wrong with it has been told on
// stderr when it returns an error.
func parseFlags(args []string, stderr io.Writer) (options, error) {
	var opt options
	flags := flag.NewFlagSet("fetch", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usageText)
		flags.PrintDefaults()
	}
	flags.StringVar(&opt.url, "url", "", "fetch this `URL` and write its body")
	flags.StringVar(&opt.output, "o", "", "write the body to this `file`, not to standard output")
	flags.DurationVar(&opt.timeout, "timeout", 2*time.Minute, "give up after this `time`")
	flags.Int64Var(&opt.download, "download", 256, "download so many `MiB` over each address family")
	flags.Int64Var(&opt.upload, "upload", 64, "upload so many `MiB` over each address family")
	if err := flags.Parse(args); err != nil {
		return opt, err
	}
	if err := opt.validate(flags.Args()); err != nil {
		fmt.Fprintf(stderr, "fetch: %v (fetch -h tells more)\n", err)
		return opt, err
	}
	opt.download *= mebibyte
	opt.upload *= mebibyte
	return opt, nil
}

// validate checks the flags and the arguments that are left after them.
func (opt options) validate(rest []string) error {
	const mostMiB = 1 << 20
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q", rest[0])
	case opt.output != "" && opt.url == "":
		return errors.New("-o needs -url")
	case opt.timeout <= 0:
		return errors.New("-timeout must be above zero")
	case min(opt.download, opt.upload) < 0 || max(opt.download, opt.upload) > mostMiB:
		return fmt.Errorf("-download and -upload must be between 0 and %d", mostMiB)
	}
	return nil
}
