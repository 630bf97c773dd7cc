package load

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// Guest is a guest's network card: what finds the Flow that a frame is for. A stack
// sends to where the guest has spoken last, on whatever flow that was, so all flows of
// one address share a Guest. The zero value is ready for use.
type Guest struct {
	mu    sync.RWMutex
	flows map[uint16]*Flow // by the guest's port
	last  atomic.Pointer[Flow]
}

// Add makes f one of the flows, in place of the last one with its port.
func (g *Guest) Add(f *Flow) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flows == nil {
		g.flows = make(map[uint16]*Flow)
	}
	g.flows[f.src.Port()] = f
	g.last.Store(f)
}

// Take takes a frame whose TCP header is at the index header, or several of one flow.
func (g *Guest) Take(header int, frames ...[]byte) {
	port := binary.BigEndian.Uint16(frames[0][header+2:])
	f := g.last.Load()
	if f.src.Port() != port {
		g.mu.RLock()
		f = g.flows[port]
		g.mu.RUnlock()
		if f == nil {
			return
		}
		g.last.Store(f)
	}
	for _, frame := range frames {
		f.Note(frame[header:], len(frame)-header)
	}
	f.Answer()
}
