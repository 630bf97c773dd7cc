//go:build !linux

package slirp

func raiseOpenFiles(uint64) error { return nil }
func residentBytes() int64        { return 0 }
func openDescriptors() int        { return 0 }
