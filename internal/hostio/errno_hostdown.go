//go:build unix

package hostio

import "syscall"

const hostDown = syscall.EHOSTDOWN
