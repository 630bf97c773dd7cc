// Package tcp is the Transmission Control Protocol as a pure state machine
// (RFC 9293). Segments, bytes and the time go in; segments, bytes, events and a
// deadline come out. It holds no lock, socket, goroutine or clock: a [TCB] is
// driven by one caller at a time.
//
// A driver does four things. It hands every segment of the connection to
// [TCB.Input]. It calls [TCB.Output] until that returns 0, after every other
// call. It calls [TCB.Advance] when [TCB.Deadline] has come. It reads
// [TCB.Events] and moves bytes with Peek and Discard, Reserve and Commit, or
// Read and Write.
//
// Sequence numbers exist as 32-bit values in [Segment] only. Inside they are
// int64 offsets from the initial sequence number, which is offset 0: the SYN;
// the first byte of data is offset 1, and the FIN follows the last. They are
// unwrapped at the door (seq.go), so the rules compare plain integers.
//
// A file is a topic of the RFCs: segment.go the wire format, input.go segment
// arrival, output.go what to send next, loss.go which data is lost, reno.go how
// much may be in flight, rtt.go when to time out, timer.go the timers.
package tcp
