//go:build unix || js || wasip1

package hostio

import "syscall"

var errnos = []struct {
	errno syscall.Errno
	kind  Kind
}{
	{syscall.ECONNREFUSED, Refused},
	{syscall.EHOSTUNREACH, HostUnreachable},
	{hostDown, HostUnreachable},
	{syscall.ENETUNREACH, NetUnreachable},
	{syscall.ENETDOWN, NetUnreachable},
	{syscall.EADDRNOTAVAIL, NetUnreachable},
	{syscall.EACCES, Prohibited},
	{syscall.EPERM, Prohibited},
	{syscall.EMSGSIZE, TooLong},
	{syscall.EAGAIN, Full},
	{syscall.ENOBUFS, Full},
}
