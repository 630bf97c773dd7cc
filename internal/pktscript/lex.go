package pktscript

import (
	"errors"
	"strconv"
	"strings"
)

type tokenKind uint8

const (
	tokEnd     tokenKind = iota
	tokOption            // --name: text
	tokInt               // integer
	tokFloat             // float
	tokWord              // text
	tokString            // text
	tokDots              // ...
	tokCommand           // `text`
	tokCode              // %{text}%
	tokChar              // text, one byte
)

type token struct {
	kind  tokenKind
	text  string
	int   int64
	float float64
	line  int
	hex   bool
}

func (t token) String() string {
	switch t.kind {
	case tokEnd:
		return "the end of the script"
	case tokDots:
		return `"..."`
	}
	return strconv.Quote(t.text)
}

// is reports whether t is the punctuation or word s.
func (t token) is(s string) bool {
	return (t.kind == tokChar || t.kind == tokWord || t.kind == tokDots) && t.text == s
}

type lexer struct {
	src  string
	pos  int
	line int
}

func (l *lexer) rest() string { return l.src[l.pos:] }

func (l *lexer) advance(n int) string {
	s := l.src[l.pos : l.pos+n]
	l.line += strings.Count(s, "\n")
	l.pos += n
	return s
}

// skip passes over white space and comments.
func (l *lexer) skip() error {
	for {
		s := l.rest()
		switch {
		case s == "":
			return nil
		case strings.ContainsRune(" \t\r\n", rune(s[0])):
			l.advance(1)
		case s[0] == '#' || strings.HasPrefix(s, "//"):
			n := strings.IndexByte(s, '\n')
			if n < 0 {
				n = len(s)
			}
			l.advance(n)
		case strings.HasPrefix(s, "/*"):
			n := strings.Index(s[2:], "*/")
			if n < 0 {
				return l.errorf("comment without end")
			}
			l.advance(n + 4)
		default:
			return nil
		}
	}
}

func (l *lexer) errorf(format string, args ...any) error { return errorAt(l.line, format, args...) }

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isWord(c byte) bool {
	return isDigit(c) || c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// span returns the length of the prefix of s whose bytes satisfy is.
func span(s string, is func(byte) bool) int {
	n := 0
	for n < len(s) && is(s[n]) {
		n++
	}
	return n
}

// next returns the next token. Of what may begin at a place the longest is taken.
func (l *lexer) next() (token, error) {
	if err := l.skip(); err != nil {
		return token{}, err
	}
	s, t := l.rest(), token{line: l.line}
	switch {
	case s == "":
		return t, nil
	case strings.HasPrefix(s, "..."):
		t.kind, t.text = tokDots, l.advance(3)
		return t, nil
	case strings.HasPrefix(s, "%{"):
		return l.delimited(t, tokCode, "%{", "}%")
	case s[0] == '`':
		return l.delimited(t, tokCommand, "`", "`")
	case s[0] == '"':
		return l.quoted(t)
	case strings.HasPrefix(s, "--") && len(s) > 2 && isWord(s[2]):
		t.kind, t.text = tokOption, l.advance(2 + span(s[2:], isWord))[2:]
		return t, nil
	case strings.HasPrefix(s, "0x") && span(s[2:], isWord) > 0:
		return l.number(t, 2+span(s[2:], isWord))
	}
	if n := floatLen(s); n > 0 {
		return l.number(t, n)
	}
	n := span(s, isWord)
	if n == 0 && s[0] == '-' && len(s) > 1 && isDigit(s[1]) {
		return l.number(t, 1+span(s[1:], isDigit))
	}
	switch {
	case n == 0:
		t.kind, t.text = tokChar, l.advance(1)
	case n == span(s, isDigit):
		return l.number(t, n)
	default:
		t.kind, t.text = tokWord, l.advance(n)
	}
	return t, nil
}

// floatLen returns the length of the number with a decimal point that s begins
// with, or 0.
func floatLen(s string) int {
	n := 0
	if s[0] == '-' {
		n = 1
	}
	n += span(s[n:], isDigit)
	if n >= len(s) || s[n] != '.' {
		return 0
	}
	d := span(s[n+1:], isDigit)
	if d == 0 {
		return 0
	}
	return n + 1 + d
}

func (l *lexer) number(t token, n int) (token, error) {
	t.text = l.advance(n)
	t.kind, t.hex = tokInt, strings.HasPrefix(t.text, "0x")
	var err error
	switch {
	case strings.Contains(t.text, "."):
		t.kind = tokFloat
		t.float, err = strconv.ParseFloat(t.text, 64)
	case t.hex:
		var u uint64
		u, err = strconv.ParseUint(t.text[2:], 16, 63)
		t.int = int64(u)
		if errors.Is(err, strconv.ErrRange) {
			t.int, err = -1, nil // bytes, and no number
		}
	default:
		t.int, err = strconv.ParseInt(t.text, 10, 64)
	}
	if err != nil {
		return t, l.errorf("bad number %s", t.text)
	}
	return t, nil
}

func (l *lexer) delimited(t token, kind tokenKind, begin, end string) (token, error) {
	s := l.rest()
	n := strings.Index(s[len(begin):], end)
	if n < 0 {
		return t, l.errorf("%s without %s", begin, end)
	}
	t.kind = kind
	t.text = strings.TrimSpace(s[len(begin) : len(begin)+n])
	l.advance(len(begin) + n + len(end))
	return t, nil
}

func (l *lexer) quoted(t token) (token, error) {
	s := l.rest()
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			l.advance(i + 1)
			text, err := strconv.Unquote(strings.ReplaceAll(s[:i+1], "\n", `\n`))
			if err != nil {
				text = s[1:i] // an escape that Go does not have stays as it is
			}
			t.kind, t.text = tokString, text
			return t, nil
		}
	}
	return t, l.errorf("string without end")
}
