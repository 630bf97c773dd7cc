package slirp

// link is where frames for a guest go: that of its latest packet.
type link struct {
	guest, gw [6]byte
	w         Writer
}

// flowKey names a flow in the table that TCP, UDP and virtual flows share. IPv4
// addresses are stored mapped, and the version tells which header they came in.
// The fields leave no padding, so the key is hashed as plain memory.
type flowKey struct {
	ns        uintptr
	guest     ipAddr // the guest's end
	host      ipAddr // the other end: an address on the host's side, or the stack's own
	guestPort uint16
	hostPort  uint16
	proto     uint16
	version   uint16 // 4 or 6
}
