//go:build !unix

package hostio

// rawReader is not to be had here: reads go through net.Conn.
type rawReader struct{}

func (r *rawReader) init(*Reader)       {}
func (r *rawReader) ok() bool           { return false }
func (r *rawReader) read() (int, error) { panic("unreachable") }
