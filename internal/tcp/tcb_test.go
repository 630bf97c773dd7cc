package tcp

import "testing"

// The network says that the peer is out of reach: that counts for the SYN that
// has no answer yet, and for nothing else.
func TestRefuse(t *testing.T) {
	h := active(t)
	h.drain()
	if h.Refuse(hISS+1) || h.Refuse(hISS-1) {
		t.Error("another segment was refused")
	}
	h.want(SynSent)
	if !h.Refuse(hISS) {
		t.Error("the SYN was not refused")
	}
	h.wantClosed(Refused)
	h.pull()
	h.expect()
	if h.Events()&EventClosed == 0 || h.Refuse(hISS) {
		t.Error("no event, or twice")
	}
	for _, s := range append(synchronizedStates, SynReceived, TimeWait) {
		h = inState(t, s)
		if h.Refuse(hISS) {
			t.Errorf("%v: refused", s)
		}
		h.want(s)
	}
}
