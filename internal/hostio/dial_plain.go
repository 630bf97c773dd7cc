//go:build !linux

package hostio

import "net"

// NewDialer returns the dialer of package net.
func NewDialer() *net.Dialer { return new(net.Dialer) }

// KeepAlive does nothing: package net has done it.
func KeepAlive(net.Conn) {}
