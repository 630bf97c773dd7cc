package hostio

import "syscall"

// hostDown is the errno of a host that does not answer, which WebAssembly's systems do not
// tell from one that cannot be reached.
const hostDown = syscall.EHOSTUNREACH
