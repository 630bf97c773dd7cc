package main

// The packages that notice. What a package can see it must, so most faults of
// internal/tcp are shown to the tests of that package alone.
const (
	rules  = "./internal/tcp ."
	stack  = "."
	pieces = "./internal/reassembly ."
	policy = "./internal/egress ."
	sums   = "./internal/sum"
)

// mutants are the faults: each one that somebody could make, and none that makes no
// difference. They are looked for in the order of the files.
var mutants = []mutant{
	// Headers and checksums.
	{"ip/checksum of the header ignored", "ip.go", "p.badChecksum = true", "p.badChecksum = false", stack},
	{"ip/padding is data", "ip.go", "p.version = 4\n\tp.raw = b[:end:end]", "p.version = 4\n\tp.raw = b", stack},
	{"ip/padding is data in IPv6", "ip.go", "p.version = 6\n\tp.raw = b[:end:end]", "p.version = 6\n\tp.raw = b", stack},
	{"ip/loose source route followed", "ip.go", "case ipv4LooseRoute, ipv4StrictRoute:", "case ipv4StrictRoute:", stack},
	{"ip/options without a bound", "ip.go", "if n == maxHeaderOptions {", "if n < 0 {", stack},
	{"ip/segments left in a routing header", "ip.go", "if b[3] != 0 {", "if b[3] > 1 {", stack},
	{"ip/TTL of 0 answered", "stack.go", "p.ttl == 1 &&", "p.ttl <= 1 &&", stack},
	{"tcp/checksum not checked", "tcp.go", "case !checksumOK(p, p.payload):", "case false:", stack},
	{"udp/checksum not checked", "udp.go", "case !checksumOK(p, datagram):", "case false:", stack},
	{"checksum/of an offloading guest refused", "checksum.go", "return field == pseudo || ", "return ", stack},
	{"checksum/0 sent for UDP", "checksum.go", "c == 0 && proto == protoUDP", "c == 1 && proto == protoUDP", stack},
	{"checksum/carry lost", "internal/sum/sum.go", "acc, carry = bits.Add64(acc, carry2, carry)", "acc, carry = bits.Add64(acc, 0, carry)", sums},
	{"checksum/odd part not swapped", "internal/sum/sum.go", "if n%2 != 0 {", "if false {", sums},
	{"checksum/fold without its carry", "internal/sum/sum.go", "half += bits.RotateLeft32(half, 16)", "half += half << 16", sums},
	{"checksum/copied to memory that is too short", "internal/sum/sum.go", "if len(dst) < len(src) {", "if cap(dst) < len(src) {", sums},

	// Fragments.
	{"fragments/overlap with the next", "internal/reassembly/datagram.go",
		"case i < n && d.pieces[i].off < end, i > 0", "case i > 0", pieces},
	{"fragments/overlap with the one before", "internal/reassembly/datagram.go",
		"d.pieces[i].off < end, i > 0 && d.pieces[i-1].end() > f.Offset:", "d.pieces[i].off < end:", pieces},
	{"fragments/condemned datagram begins again", "internal/reassembly/reassembly.go", "d.condemned = true", "r.remove(d)", pieces},
	{"fragments/too long by one", "internal/reassembly/datagram.go", "case header+end > limit:", "case header+end > limit+1:", pieces},
	{"fragments/one too many", "internal/reassembly/reassembly.go",
		"len(d.pieces) >= r.limits.Fragments", "len(d.pieces) > r.limits.Fragments", pieces},
	{"fragments/one datagram too many", "internal/reassembly/bounds.go",
		"len(sp.datagrams) > r.limits.Datagrams", "len(sp.datagrams) > r.limits.Datagrams+1", pieces},
	{"fragments/expire late", "internal/reassembly/reassembly.go",
		"!r.queue[0].deadline.After(now)", "r.queue[0].deadline.Before(now)", pieces},
	{"fragments/memory not given back", "internal/reassembly/bounds.go", "\tr.refund(d, d.bytes)\n", "", pieces},

	// Segments.
	{"segment/reset answered", "internal/tcp/segment.go",
		"if seg.Flags&RST != 0 {\n\t\treturn Segment{}, false", "if false {\n\t\treturn Segment{}, false", rules},
	{"segment/scale above 14", "internal/tcp/segment.go", "min(v[0], maxScale)", "v[0]", rules},
	{"segment/MSS outside of a SYN", "internal/tcp/segment.go", "kind == optMSS && len(v) == 2 && syn:", "kind == optMSS && len(v) == 2:", rules},
	{"segment/option of length 0 loops", "internal/tcp/segment.go", "len(o) < 2 || o[1] < 2 ||", "len(o) < 2 ||", rules},
	{"seq/no wrap", "internal/tcp/seq.go", "int64(int32(seq-s.wrap(near)))", "int64(uint32(seq-s.wrap(near)))", rules},

	// The state machine.
	{"tcp/window edge, data", "internal/tcp/input.go", "off < t.rcv.adv && off+n > t.rcv.nxt", "off <= t.rcv.adv && off+n > t.rcv.nxt", rules},
	{"tcp/left edge, data", "internal/tcp/input.go", "off+n > t.rcv.nxt", "off+n >= t.rcv.nxt", rules},
	{"tcp/window edge, no data", "internal/tcp/input.go", "off >= t.rcv.nxt && off < t.rcv.adv\n}", "off >= t.rcv.nxt && off <= t.rcv.adv\n}", rules},
	{"tcp/reset anywhere in the window", "internal/tcp/input.go",
		"\tcase off == t.rcv.nxt:\n\t\tt.close(Reset)", "\tcase off >= t.rcv.nxt && off < t.rcv.adv:\n\t\tt.close(Reset)", rules},
	{"tcp/reset at the edge challenged", "internal/tcp/input.go",
		"case off > t.rcv.nxt && off < t.rcv.adv:", "case off > t.rcv.nxt && off <= t.rcv.adv:", rules},
	{"tcp/SYN resets", "internal/tcp/input.go", "\tt.challenge(now)\n\treturn false\n}\n\n// pawsOutdated", "\tt.close(Reset)\n\treturn false\n}\n\n// pawsOutdated", rules},
	{"tcp/challenges without a limit", "internal/tcp/input.go",
		"func (t *TCB) challenge(now Time) {\n\tif t.challenged == 0 ||", "func (t *TCB) challenge(now Time) {\n\tif true ||", rules},
	{"tcp/PAWS off", "internal/tcp/input.go", "return !t.timestamps || !seg.HasTimestamps ||", "return true || !t.timestamps || !seg.HasTimestamps ||", rules},
	{"tcp/PAWS for ever", "internal/tcp/input.go", "now.Sub(t.tsRecentAt) > pawsOutdated", "now.Sub(t.tsRecentAt) > 2*pawsOutdated", rules},
	{"tcp/timestamp of the future learnt", "internal/tcp/input.go",
		"seg.HasTimestamps && off <= t.rcv.acked", "seg.HasTimestamps && off <= t.rcv.adv", rules},
	{"tcp/ACK of unsent data by one", "internal/tcp/input.go", "return ack <= t.snd.nxt && ack >=", "return ack <= t.snd.nxt+1 && ack >=", rules},
	{"tcp/ACK of long ago", "internal/tcp/input.go", "return ack <= t.snd.nxt && ack >= t.snd.una-t.snd.maxWnd", "return ack <= t.snd.nxt", rules},
	{"tcp/old segment brings its window", "internal/tcp/input.go",
		"t.snd.wl1 < off || t.snd.wl1 == off && t.snd.wl2 <= ack", "t.snd.wl1 < off+1<<20 || t.snd.wl1 == off && t.snd.wl2 <= ack", rules},
	{"tcp/window of a SYN scaled", "internal/tcp/input.go", "if seg.Flags&SYN == 0 {\n\t\tt.snd.wnd <<=", "if true {\n\t\tt.snd.wnd <<=", rules},
	{"tcp/ACK refused at a closed window", "internal/tcp/input.go", "if off != t.rcv.nxt && off != t.rcv.adv {", "if off <= t.rcv.adv {", rules},
	{"tcp/FIN behind the window", "internal/tcp/input.go", "off < t.rcv.adv {\n\t\tt.rcv.fin = off", "off <= t.rcv.adv+1<<16 {\n\t\tt.rcv.fin = off", rules},
	{"tcp/text behind a FIN", "internal/tcp/input.go", "\t\tlimit = min(limit, t.rcv.fin)\n", "", rules},
	{"tcp/both close, no CLOSING", "internal/tcp/input.go", "\t\tt.state = Closing\n", "\t\tt.enterTimeWait(now)\n", rules},
	{"tcp/data for a closed application", "internal/tcp/input.go", "len(p) > 0 && t.orphan {", "len(p) > 1<<20 && t.orphan {", rules},
	{"tcp/2MSL not restarted", "internal/tcp/input.go", "\t\tt.ackDue = true\n\t\tt.enterTimeWait(now)\n", "\t\tt.ackDue = true\n", rules},
	{"tcp/reset ends TIME-WAIT", "internal/tcp/input.go", "\tif seg.Flags&RST != 0 {\n\t\treturn\n\t}\n\toff :=", "\tif seg.Flags&RST != 0 {\n\t\tt.close(Reset)\n\t\treturn\n\t}\n\toff :=", rules},
	{"tcp/old SYN in TIME-WAIT", "internal/tcp/tcb.go", "> t.rcv.nxt-1\n", "> t.rcv.nxt-1<<16\n", rules},
	{"tcp/bad ACK in SYN-SENT", "internal/tcp/input.go", "if hasAck && (ack <= 0 || ack > t.snd.nxt) {", "if hasAck && (ack < 0 || ack > t.snd.nxt) {", rules},
	{"tcp/bad ACK in SYN-RECEIVED", "internal/tcp/input.go", "if ack <= t.snd.una || ack > t.snd.nxt {", "if ack < t.snd.una || ack > t.snd.nxt {", rules},
	{"tcp/every ACK delayed", "internal/tcp/input.go", "t.rcv.nxt-t.rcv.acked > t.ackEvery(push) {", "t.rcv.nxt-t.rcv.acked > 4*t.ackEvery(push) {", rules},
	{"tcp/few ACKs behind a gap", "internal/tcp/input.go", "\t\tt.rcv.smooth = t.rcv.nxt\n", "", rules},
	{"tcp/few ACKs after a pause", "internal/tcp/timer.go", "t.ackDue, t.rcv.smooth = true, t.rcv.nxt", "t.ackDue = true", rules},
	{"tcp/no duplicate ACK", "internal/tcp/input.go", "if n == 0 || !inOrder || off < t.rcv.nxt-n {", "if !inOrder || off < t.rcv.nxt-n {", rules},
	{"tcp/half-close by Close with unread bytes", "internal/tcp/tcb.go", "if t.Buffered() > 0 && t.state != TimeWait {\n\t\tt.Abort()\n\t\treturn\n\t}", "", rules},
	{"tcp/peer's MSS above ours", "internal/tcp/tcb.go", "min(max(n, mssFloor), cfg.MSS)", "max(n, mssFloor)", rules},
	{"tcp/peer's MSS of crumbs", "internal/tcp/tcb.go", "min(max(n, mssFloor), cfg.MSS)", "min(n, cfg.MSS)", rules},
	{"tcp/timestamps not asked for", "internal/tcp/tcb.go", "t.timestamps = t.timestamps && syn.HasTimestamps", "t.timestamps = true", rules},
	{"tcp/SACK not asked for", "internal/tcp/tcb.go", "t.loss.sack = t.loss.sack && syn.SACKPermitted", "t.loss.sack = true", rules},

	// Buffers.
	{"recvbuf/last copy wins", "internal/tcp/recvbuf.go", "if len(b.ooo) == 0 {\n\t\tb.ring.write", "if true {\n\t\tb.ring.write", rules},
	{"recvbuf/no bound of holes", "internal/tcp/recvbuf.go", "len(b.ooo) >= maxHoles &&", "len(b.ooo) >= 2*maxHoles &&", rules},
	{"recvbuf/oldest block first", "internal/tcp/recvbuf.go", "\t\tb.touch(off)\n", "", rules},
	{"recvbuf/D-SACK reported for ever", "internal/tcp/recvbuf.go", "\t\tb.dsack = span{}\n", "", rules},
	{"recvbuf/memory kept", "internal/tcp/recvbuf.go", "if b.base == b.nxt && len(b.ooo) == 0 {\n\t\tb.ring.release()\n\t}", "", rules},
	{"sendbuf/memory kept", "internal/tcp/sendbuf.go", "if b.base == b.end && !b.ring.lent {\n\t\tb.ring.release()\n\t}", "", rules},

	// Sending.
	{"output/right edge retracts", "internal/tcp/output.go", "if t.rcv.nxt+w<<scale < t.rcv.adv {", "if false {", rules},
	{"output/silly windows advertised", "internal/tcp/output.go", "if edge-t.rcv.adv < min(max(full, 1<<t.rcv.scale), room/2) {", "if edge < t.rcv.adv {", rules},
	{"output/silly segments", "internal/tcp/output.go", "if n < min(queued, mss) && n < t.snd.maxWnd/2 && !t.override {", "if n < 0 {", rules},
	{"output/FIN sent twice", "internal/tcp/output.go", "t.finQueued && t.snd.nxt == t.sendBuf.end\n", "t.finQueued && t.snd.nxt >= t.sendBuf.end && t.snd.una <= t.sendBuf.end\n", rules},
	{"output/FIN beyond the window", "internal/tcp/output.go", "max(n, 0)}\n\tif t.finQueued && n == queued && n < usable {",
		"max(n, 0)}\n\tif t.finQueued && n == queued {", rules},
	{"output/FIN beyond the window, behind several", "internal/tcp/output.go", "s.start + n\n\tif t.finQueued && n == queued && n < usable {",
		"s.start + n\n\tif t.finQueued && n == queued {", rules},
	{"output/options on top of the MSS", "internal/tcp/output.go", "if room := t.snd.mss - t.optionsLen(&seg);", "if room := t.snd.mss + t.optionsLen(&seg);", rules},
	{"output/beyond the window, sent again", "internal/tcp/output.go", "\ts.end = min(s.end, t.snd.una+t.snd.wnd)\n", "", rules},
	{"output/cwnd ignored", "internal/tcp/output.go", "if max(n, 1) > room {", "if n < 0 {", rules},
	{"output/old cwnd after a pause", "internal/tcp/output.go", "\t\tt.reno.cwnd = min(t.reno.cwnd, initialWindow(t.mss()))\n", "", rules},

	// Losses.
	{"rtt/Karn off", "internal/tcp/timer.go", "\tt.timing = false // Karn: what is sent again is not timed\n", "", rules},
	{"rtt/no backoff", "internal/tcp/timer.go", "\tt.rtt.backoff++\n", "", rules},
	{"rtt/no minimum", "internal/tcp/rtt.go", "max(r.srtt+4*r.rttvar, minRTO)", "max(r.srtt+4*r.rttvar, 0)", rules},
	{"loss/cwnd not halved", "internal/tcp/input.go", "\tt.reno.cwnd = t.reno.ssthresh\n\tt.loss.enter(phaseFast", "\tt.loss.enter(phaseFast", rules},
	{"loss/cwnd not one segment after a timeout", "internal/tcp/timer.go", "\tt.reno.cwnd = t.mss()\n\tt.loss.enter(phaseRTO", "\tt.loss.enter(phaseRTO", rules},
	{"loss/second duplicate retransmits", "internal/tcp/loss.go", "const dupThresh = 3", "const dupThresh = 2", rules},
	{"loss/data counts as a duplicate ACK", "internal/tcp/input.go", "seg.Len() == 0 && t.snd.wnd == wnd", "t.snd.wnd == wnd", rules},
	{"loss/window update counts as a duplicate ACK", "internal/tcp/input.go", "seg.Len() == 0 && t.snd.wnd == wnd", "seg.Len() == 0", rules},
	{"loss/SACK block beyond SND.NXT", "internal/tcp/input.go", "left >= right || right > t.snd.nxt ||", "left >= right ||", rules},
	{"loss/scoreboard without a bound", "internal/tcp/input.go", "len(t.loss.sacked) >= maxSacked &&", "len(t.loss.sacked) >= 2*maxSacked &&", rules},
	{"loss/SACKed data survives a timeout", "internal/tcp/loss.go", "\t\tl.sacked = l.sacked[:0]\n", "", rules},
	{"loss/no limit in slow start", "internal/tcp/reno.go", "c.cwnd += min(n, limit*mss, ", "c.cwnd += min(n, ", rules},
	{"loss/path MTU of a segment not sent", "internal/tcp/loss.go", "off >= t.snd.nxt || size >= t.snd.mss", "off > t.snd.nxt || size >= t.snd.mss", rules},

	// Timers.
	{"timer/one SYN-ACK less", "internal/tcp/timer.go", "t.retries > limit {", "t.retries >= limit {", rules},
	{"timer/one keep-alive more", "internal/tcp/timer.go", "t.keepProbes > t.cfg.KeepAlive.Count", "t.keepProbes > t.cfg.KeepAlive.Count+1", rules},
	{"timer/answered probes count", "internal/tcp/timer.go", "t.probedAt, t.keepProbes = 0, 0", "t.keepProbes = 0", rules},
	{"timer/probes not backed off", "internal/tcp/timer.go", "\t\tt.persistBackoff++\n", "", rules},
	{"ring/parts of a sum not joined", "internal/tcp/ring.go", "sum.Join(s, n, ", "sum.Join(s, 0, ", rules},
	{"timer/orphan lives on", "internal/tcp/tcb.go", "\t\tt.arm(timerEnd, now, orphanTime)\n\t}\n}", "\t}\n}", rules},

	// Flows.
	{"flow/the latest outlives itself", "flow.go", "\t\ts.latest.CompareAndSwap(c, nil)\n", "", stack},
	{"flow/one TCP flow too many", "flow.go", "if limit >= 0 && *n >= limit {", "if limit >= 0 && *n > limit {", stack},
	{"flow/flow not counted off", "flow.go", "\t*a.flows(key.proto)--\n", "", stack},
	{"flow/one dial too many", "maintenance.go", "a.dials >= s.cfg.MaxPendingDials", "a.dials > s.cfg.MaxPendingDials", stack},
	{"flow/one in TIME-WAIT less", "maintenance.go", "a.timeWait.Len() > maxTimeWait", "a.timeWait.Len() >= maxTimeWait", stack},
	{"flow/Close leaves flows alone", "maintenance.go", "\t\tf.endSoon()\n", "\t\t_ = f\n", stack},
	{"relay/dial not cancelled", "tcp.go", "\t\t\to.cancel()\n\t\t\tc.stack.remove(&c.key, c)\n", "\t\t\tc.stack.remove(&c.key, c)\n", stack},
	{"relay/half-close closes both", "tcp.go", "\t\thalf.CloseWrite()\n", "\t\thalf.CloseWrite()\n\t\tc.host.Close()\n", stack},
	{"relay/host's reset is a FIN", "tcp.go", "if (err == io.EOF || c.closedWhole) && !c.writeErr {", "if (err != nil || err == io.EOF || c.closedWhole) && !c.writeErr {", stack},
	{"relay/guest's reset is a FIN", "tcp.go", "h.SetLinger(0)", "h.SetLinger(-1)", stack},
	{"relay/unwritten data acknowledged", "tcp.go", "\tif err != nil {\n\t\tc.hostFailed()\n\t}\n", "", stack},
	{"relay/host of a flow that rests not probed", "tcp.go", "c.stack.ownDial && !c.probed", "c.stack.ownDial && c.probed", stack},
	{"relay/host that has said all not probed", "tcp.go", "\tif c.lookAt == 0 {\n\t\tc.lookAt = c.stack.now().Add(idleAfter)\n\t}\n\tif (err", "\tif (err", stack},
	{"relay/dial is to wait for the poller", "internal/hostio/dial_linux.go", "!strings.HasPrefix(network, \"tcp\")", "strings.HasPrefix(network, \"tcp\")", "./internal/hostio"},
	{"relay/refusal of the early connect lost", "internal/hostio/dial_linux.go", "failed != syscall.EINPROGRESS {", "failed == syscall.EINPROGRESS {", "./internal/hostio"},
	{"tcp/path not known to the next connection", "tcp.go", "s.mtuTo(key.guestKey())", "s.cfg.MTU", stack},
	{"relay/UDP flow never rests", "udp.go", "f.rests = f.stack.poller != nil", "f.rests = false", stack},
	{"relay/UDP flow is told of its rest as of an error", "udp.go", "return f.calledBack && errors.Is", "return false && errors.Is", stack},
	{"relay/poller not told that a socket is closed", "udp.go", "\t\t\tf.stack.forget(f.socket())\n", "", stack},
	{"relay/UDP socket as small as the system has it", "udp.go", "hostBurst = 1 << 20", "hostBurst = 1 << 16", stack},
	{"relay/new SYN while dialing ignored", "tcp.go", "if seg.Seq != o.syn.Seq {", "if seg.Seq == o.syn.Seq {", stack},
	{"relay/any reset ends a dial", "tcp.go", "if seg.Seq == o.syn.Seq || seg.Seq == o.syn.Seq+1 {", "if seg.Seq == o.syn.Seq || seg.Seq != o.syn.Seq+1<<31 {", stack},

	// Listeners and connections.
	{"listener/backlog by one", "listener.go", "waiting+halfOpen < cfg.Backlog)", "waiting+halfOpen <= cfg.Backlog)", stack},
	{"listener/half-open by one", "listener.go", "halfOpen < cfg.MaxHalfOpen)", "halfOpen <= cfg.MaxHalfOpen)", stack},
	{"listener/young handshakes make way", "listener.go", "now.Sub(evict.opened) < evictAfter", "now.Sub(evict.opened) < 0", stack},
	{"listener/wildcard before exact", "listener.go", "if l := s.listeners[listenKey{key.host, key.hostPort, key.version}]; l != nil {", "if l := s.listeners[listenKey{ipAddr{}, key.hostPort, key.version}]; l != nil {", stack},
	{"listener/closed one keeps its connections", "listener.go", "\tfor _, c := range queue {\n\t\tc.endSoon()\n\t}\n", "\t_ = queue\n", stack},
	{"conn/read deadline ignored", "listener.go", "\tcase c.read.expired:\n", "\tcase false:\n", stack},
	{"conn/write deadline ignored", "listener.go", "\tcase c.write.expired:\n", "\tcase false:\n", stack},
	{"conn/deadline stays expired", "listener.go", "d.timer, d.expired = nil, false", "d.timer = nil", stack},
	{"conn/Close does not wake a reader", "listener.go", "\t\tf.tcb.Close(now)\n\t}\n\tf.readable.Broadcast()\n", "\t\tf.tcb.Close(now)\n\t}\n", stack},
	{"conn/writes interleave", "listener.go", "\tc.writing = true\n", "", stack},
	{"conn/linger 0 is no reset", "listener.go", "case c.linger == 0:", "case c.linger == -2:", stack},

	// Datagrams and ICMP.
	{"udp/anybody may answer", "udp.go", "if f.mapping.admits(now, d.from) {", "if f.mapping.admits(now, d.from) || true {", stack},
	{"udp/empty datagrams dropped", "udp.go", "if n > 0 || err == nil {", "if n > 0 {", stack},
	{"udp/answer does not keep the flow", "udp.go", "\tif f.mapping == nil {\n\t\tf.active = now\n\t}\n\tfirst :=", "\tfirst :=", stack},
	{"udp/frame of several that differ", "udp.go", "d.n == 0 || d.n > first.n || d.off != end", "d.n == 0 || d.off != end", stack},
	{"udp/frame of several senders", "udp.go", "|| d.from != first.from", "", stack},
	{"udp/length field ignored", "udp.go", "return b[:n], true", "return b, true", stack},
	{"icmp/error about an error", "icmp4.go", "p.dst.isUnicast() && !isICMPError(p)", "p.dst.isUnicast()", stack},
	{"icmp/error about a later fragment", "icmp4.go", "return !p.malformed && p.fragOffset == 0 &&", "return !p.malformed &&", stack},
	{"icmp/errors without a limit", "icmp4.go", "if !s.mayAnswer(l.ns, limitICMP, s.now()) {", "if !s.mayAnswer(l.ns, limitICMP, s.now()) && false {", stack},
	{"icmp/solicitation from afar", "icmp6.go", "p.fragmented || p.ttl != ndpHopLimit ||", "p.fragmented ||", stack},
	{"icmp/duplicate address answered", "icmp6.go", "if !s.cfg.isOwn(target) {", "if false {", stack},

	// Policy and memory.
	{"guard/Teredo not unpacked", "internal/egress/egress.go", "\t\tcase e.invert:\n\t\t\tv4(e.at, 1<<32-1)\n", "\t\tcase e.invert:\n", policy},
	{"guard/addresses believed for too long", "internal/egress/egress.go", "age >= 0 && age < maxAge", "age >= 0", policy},
	{"guard/loopback network", "internal/egress/egress.go", "a == n.Addr() || n.loopback && n.Contains(a)", "a == n.Addr()", policy},
	{"frames/used again unasked", "stack.go", "\tif reuse {\n\t\tb.free = b.mem\n", "\tif true {\n\t\tb.free = b.mem\n", stack},
}
