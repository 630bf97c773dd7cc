//go:build !unix

package slirp

import "time"

// processorTime is not known here: nothing is used.
func processorTime() time.Duration { return 0 }
