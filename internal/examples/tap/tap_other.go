//go:build !linux

package main

import (
	"errors"
	"runtime"
	"time"
)

// device stands for the TAP device of Linux.
type device struct{ uso bool }

var errNoTAP = errors.New("needs a TAP device of Linux, which " + runtime.GOOS + " has not")

func openTAP(ns, name string, vnet bool, poll time.Duration) (*device, error) { return nil, errNoTAP }

func (d *device) each(func([][]byte)) error { return errNoTAP }

func (d *device) write(frame []byte) error { return errNoTAP }

func usage() string { return "" }

func yield() {}
