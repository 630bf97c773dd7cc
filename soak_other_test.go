//go:build !linux

package slirp

import "time"

func raiseOpenFiles(uint64) error { return nil }
func residentBytes() int64        { return 0 }
func openDescriptors() int        { return 0 }

func processorTime() time.Duration { return 0 }
