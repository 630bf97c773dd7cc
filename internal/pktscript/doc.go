// Package pktscript reads and prints the language of packetdrill: scripts that
// say which packets go in, which come out, which socket calls are made, and when.
// It knows the language only; package slirp's script test runs what it reads.
// Nothing but tests imports it.
//
// A script is option lines (--name=value) and then events. An event is a time
// and an action: a packet that is injected (<) or expected (>), a socket call
// with its result, a shell command in backticks, or code in %{ }%. Commands and
// code are kept as text: nobody runs them.
//
// Two TCP options go beyond packetdrill: "unknown KIND HEX" is an option of any
// kind with a correct length, and "raw HEX" is bytes as they are, for what no
// option says.
package pktscript
