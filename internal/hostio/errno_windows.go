package hostio

import "syscall"

// Errors of Windows Sockets, which package syscall does not name.
var errnos = []struct {
	errno syscall.Errno
	kind  Kind
}{
	{10061, Refused},         // WSAECONNREFUSED
	{10054, Refused},         // WSAECONNRESET: of a datagram socket, "port unreachable"
	{10065, HostUnreachable}, // WSAEHOSTUNREACH
	{10064, HostUnreachable}, // WSAEHOSTDOWN
	{10051, NetUnreachable},  // WSAENETUNREACH
	{10050, NetUnreachable},  // WSAENETDOWN
	{10049, NetUnreachable},  // WSAEADDRNOTAVAIL
	{10013, Prohibited},      // WSAEACCES
	{10040, TooLong},         // WSAEMSGSIZE
	{10035, Full},            // WSAEWOULDBLOCK
	{10055, Full},            // WSAENOBUFS
	{syscall.ECONNREFUSED, Refused},
	{syscall.EHOSTUNREACH, HostUnreachable},
	{syscall.ENETUNREACH, NetUnreachable},
	{syscall.EACCES, Prohibited},
	{syscall.EPERM, Prohibited},
	{syscall.EMSGSIZE, TooLong},
	{syscall.EAGAIN, Full},
	{syscall.ENOBUFS, Full},
}
