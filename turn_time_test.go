package slirp

import (
	"testing"
	"testing/synctest"
	"time"
)

// A Writer that takes its time in the middle of a call does not make the flows of the
// packets behind it older than they are.
func TestSlowWriterInTurn(t *testing.T) {
	inBubble(t, func(t *testing.T, fam family) {
		g, h := newUDPRig(t, fam, Config{UDPIdleTimeout: 60 * time.Second})
		g.say("one")
		host := h.accept()
		host.expect(t, "one")
		time.Sleep(5 * time.Second)
		slow := func([][]byte) error { time.Sleep(50 * time.Second); return nil }
		if err := g.batch(slow, echoRequest(fam.version, 64), udpPacket(g.from, g.to, []byte("two"))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		host.expect(t, "two")
		time.Sleep(59 * time.Second)
		if n := g.s.Stats().UDPFlows; n != 1 {
			t.Errorf("%d flows, 59 s after the last datagram", n)
		}
		g.s.Close()
	})
}
