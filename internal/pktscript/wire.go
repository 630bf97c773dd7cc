package pktscript

import (
	"encoding/binary"
	"errors"
)

// The TCP segment on the wire, written and read apart from the stack under test.

// OptionsLen returns the length of options on the wire, padding included.
func OptionsLen(options []TCPOption) int { return (len(appendOptions(nil, options)) + 3) &^ 3 }

func appendOptions(b []byte, options []TCPOption) []byte {
	for i := range options {
		o := &options[i]
		switch {
		case o.Kind == KindRaw:
			b = append(b, o.Data...)
			continue
		case o.Opaque:
			b = append(b, byte(o.Kind), byte(2+len(o.Data)))
			b = append(b, o.Data...)
			continue
		}
		switch o.Kind {
		case KindEOL, KindNOP:
			b = append(b, byte(o.Kind))
		case KindMSS:
			b = binary.BigEndian.AppendUint16(append(b, KindMSS, 4), o.MSS)
		case KindScale:
			b = append(b, KindScale, 3, o.Scale)
		case KindSACKOK:
			b = append(b, KindSACKOK, 2)
		case KindTimestamp:
			b = binary.BigEndian.AppendUint32(append(b, KindTimestamp, 10), o.Val)
			b = binary.BigEndian.AppendUint32(b, o.Ecr)
		case KindSACK:
			b = append(b, KindSACK, byte(2+8*len(o.Blocks)))
			for _, k := range o.Blocks {
				b = binary.BigEndian.AppendUint32(b, k.Left)
				b = binary.BigEndian.AppendUint32(b, k.Right)
			}
		}
	}
	return b
}

// Marshal returns the segment with checksum 0. Numbers go out as they are.
func (p *Packet) Marshal(src, dst uint16, payload []byte) []byte {
	b := make([]byte, 20, 60+len(payload))
	binary.BigEndian.PutUint16(b[0:], src)
	binary.BigEndian.PutUint16(b[2:], dst)
	binary.BigEndian.PutUint32(b[4:], p.Seq)
	binary.BigEndian.PutUint32(b[8:], p.Ack)
	b[13] = byte(p.Flags)
	binary.BigEndian.PutUint16(b[14:], uint16(max(p.Win, 0)))
	binary.BigEndian.PutUint16(b[18:], uint16(max(p.Urg, 0)))
	b = appendOptions(b, p.Options)
	for len(b)%4 != 0 {
		b = append(b, KindEOL)
	}
	b[12] = byte(len(b)/4) << 4
	return append(b, payload...)
}

// Unmarshal reads a segment that the stack has sent. It is strict: whatever
// cannot be meant is an error.
func Unmarshal(b []byte) (p *Packet, src, dst uint16, payload []byte, err error) {
	if len(b) < 20 {
		return nil, 0, 0, nil, errors.New("TCP header cut off")
	}
	n := int(b[12]>>4) * 4
	if n < 20 || n > len(b) {
		return nil, 0, 0, nil, errors.New("bad TCP data offset")
	}
	if b[12]&15 != 0 {
		return nil, 0, 0, nil, errors.New("reserved bits are set")
	}
	p = &Packet{
		IP:    IPInfo{TOS: -1},
		Flags: Flags(b[13]),
		Seq:   binary.BigEndian.Uint32(b[4:]),
		Ack:   binary.BigEndian.Uint32(b[8:]),
		Win:   int(binary.BigEndian.Uint16(b[14:])),
		Urg:   -1,
		Len:   len(b) - n,
	}
	urg := int(binary.BigEndian.Uint16(b[18:]))
	if p.Flags&URG != 0 {
		p.Urg = urg
	} else if urg != 0 {
		return nil, 0, 0, nil, errors.New("urgent pointer without the flag")
	}
	if p.Flags&ACK == 0 && p.Ack != 0 {
		return nil, 0, 0, nil, errors.New("acknowledgment number without the flag")
	}
	p.Options, err = parseOptions(b[20:n])
	return p, binary.BigEndian.Uint16(b[0:]), binary.BigEndian.Uint16(b[2:]), b[n:], err
}

func parseOptions(b []byte) (options []TCPOption, err error) {
	for len(b) > 0 {
		o := TCPOption{Kind: int(b[0])}
		switch o.Kind {
		case KindEOL:
			for _, c := range b {
				if c != 0 {
					return nil, errors.New("padding is not zero")
				}
			}
			return append(options, o), nil
		case KindNOP:
			options, b = append(options, o), b[1:]
			continue
		}
		if len(b) < 2 || b[1] < 2 || int(b[1]) > len(b) {
			return nil, errors.New("bad length of a TCP option")
		}
		o.parse(b[2:b[1]])
		options, b = append(options, o), b[b[1]:]
	}
	return options, nil
}

// parse reads the value of an option.
func (o *TCPOption) parse(v []byte) {
	o.Data, o.Opaque = append([]byte(nil), v...), true
	switch {
	case o.Kind == KindMSS && len(v) == 2:
		o.MSS = binary.BigEndian.Uint16(v)
	case o.Kind == KindScale && len(v) == 1:
		o.Scale = v[0]
	case o.Kind == KindSACKOK && len(v) == 0:
	case o.Kind == KindTimestamp && len(v) == 8:
		o.Val, o.Ecr = binary.BigEndian.Uint32(v), binary.BigEndian.Uint32(v[4:])
	case o.Kind == KindSACK && len(v) > 0 && len(v)%8 == 0:
		for ; len(v) > 0; v = v[8:] {
			o.Blocks = append(o.Blocks, Block{binary.BigEndian.Uint32(v), binary.BigEndian.Uint32(v[4:])})
		}
	default:
		return
	}
	o.Data, o.Opaque = nil, false
}
