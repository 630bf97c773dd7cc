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
	flows map[uint32]*Flow // by the host's and the guest's port
	last  atomic.Pointer[Flow]
}

// Add makes f one of the flows, in place of the last one with its ports.
func (g *Guest) Add(f *Flow) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.flows == nil {
		g.flows = make(map[uint32]*Flow)
	}
	g.flows[f.ports()] = f
	g.last.Store(f)
}

// Take takes a frame whose TCP header is at the index header, or several of one flow.
func (g *Guest) Take(header int, frames ...[]byte) {
	ports := binary.BigEndian.Uint32(frames[0][header:])
	f := g.last.Load()
	if f.ports() != ports {
		g.mu.RLock()
		f = g.flows[ports]
		if f != nil {
			g.last.Store(f) // with mu held, or it might come behind that of Add
		}
		g.mu.RUnlock()
		if f == nil {
			return
		}
	}
	for _, frame := range frames {
		f.Note(frame[header:], len(frame)-header)
	}
	f.Answer()
}

// ports returns what a segment for the flow begins with.
func (f *Flow) ports() uint32 { return uint32(f.dst.Port())<<16 | uint32(f.src.Port()) }
