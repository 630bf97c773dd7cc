//go:build !linux

package hostio

import "net"

// PathMTU returns the size of the largest IP packet that gets to the peer of conn.
// Here that is not known, 0.
func PathMTU(conn net.Conn) int { return 0 }
