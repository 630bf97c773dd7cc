package tcp

import "slices"

// span is a half-open range of offsets.
type span struct{ start, end int64 }

// rangeSet is a set of offsets, kept as sorted spans that neither touch nor
// overlap.
type rangeSet []span

// search returns the index of the first span that ends at or after off.
func (r rangeSet) search(off int64) int {
	i, j := 0, len(r)
	for i < j {
		h := int(uint(i+j) >> 1)
		if r[h].end < off {
			i = h + 1
		} else {
			j = h
		}
	}
	return i
}

// add inserts [start, end) and returns how many offsets are new.
func (r *rangeSet) add(start, end int64) int64 {
	if start >= end {
		return 0
	}
	i := r.search(start)
	j := i
	fresh := end - start
	merged := span{start, end}
	for ; j < len(*r) && (*r)[j].start <= end; j++ {
		s := (*r)[j]
		fresh -= max(0, min(s.end, end)-max(s.start, start))
		merged.start, merged.end = min(merged.start, s.start), max(merged.end, s.end)
	}
	*r = slices.Replace(*r, i, j, merged)
	return fresh
}

// wouldSplit reports whether adding [start, end) makes one span more.
func (r rangeSet) wouldSplit(start, end int64) bool {
	i := r.search(start)
	return i == len(r) || r[i].start > end
}

// removeBefore forgets every offset below off.
func (r *rangeSet) removeBefore(off int64) {
	i := 0
	for i < len(*r) && (*r)[i].end <= off {
		i++
	}
	if i > 0 {
		*r = slices.Delete(*r, 0, i)
	}
	if len(*r) > 0 && (*r)[0].start < off {
		(*r)[0].start = off
	}
}

// remove forgets the offsets of [start, end).
func (r *rangeSet) remove(start, end int64) {
	if start >= end {
		return
	}
	i := r.search(start + 1)
	j := i
	var rest [2]span
	n := 0
	for ; j < len(*r) && (*r)[j].start < end; j++ {
		s := (*r)[j]
		if s.start < start {
			rest[n] = span{s.start, start}
			n++
		}
		if s.end > end {
			rest[n] = span{end, s.end}
			n++
		}
	}
	if i < j {
		*r = slices.Replace(*r, i, j, rest[:n]...)
	}
}

// find returns the span that holds off.
func (r rangeSet) find(off int64) (span, bool) {
	i := r.search(off)
	if i < len(r) && r[i].end == off {
		i++
	}
	if i < len(r) && r[i].start <= off {
		return r[i], true
	}
	return span{}, false
}

// overlap returns the lowest part of [start, end) that is in the set.
func (r rangeSet) overlap(start, end int64) (span, bool) {
	for _, s := range r[r.search(start):] {
		if s.start >= end {
			break
		}
		if lo, hi := max(s.start, start), min(s.end, end); lo < hi {
			return span{lo, hi}, true
		}
	}
	return span{}, false
}

// sizeBefore returns how many offsets below off are in the set.
func (r rangeSet) sizeBefore(off int64) int64 {
	var n int64
	for _, s := range r {
		if s.start >= off {
			break
		}
		n += min(s.end, off) - s.start
	}
	return n
}

// size returns how many offsets are in the set.
func (r rangeSet) size() int64 {
	var n int64
	for _, s := range r {
		n += s.end - s.start
	}
	return n
}

// nextGap returns the first range at or after off that is not in the set, cut
// at limit. It is empty when there is none below limit.
func (r rangeSet) nextGap(off, limit int64) span {
	for _, s := range r[r.search(off):] {
		if s.start > off {
			return span{off, min(s.start, limit)}
		}
		off = max(off, s.end)
	}
	return span{off, max(off, limit)}
}
