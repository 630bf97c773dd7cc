package tcp

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The state machine is pure: no file imports what could do I/O, wait or lock,
// and none reads the clock. No function is longer than a screen.
func TestPure(t *testing.T) {
	allowed := []string{"encoding/binary", "math", "math/bits", "slices", "time", "github.com/KarpelesLab/slirp/internal/sum"}
	clock := []string{"Now", "Since", "Until", "AfterFunc", "NewTimer", "NewTicker", "Tick", "After", "Sleep"}
	const longest = 80
	fset := token.NewFileSet()
	names, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		seen++
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range file.Imports {
			path, _ := strconv.Unquote(i.Path.Value)
			if !slices.Contains(allowed, path) && !(strings.HasPrefix(path, "sync") && name == "ring.go") {
				t.Errorf("%s imports %s", name, path)
			}
			if i.Name != nil {
				t.Errorf("%s imports %s under another name", name, path)
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clock, n.Sel.Name) {
					t.Errorf("%v: time.%s", fset.Position(n.Pos()), n.Sel.Name)
				}
			case *ast.GoStmt, *ast.SelectStmt, *ast.SendStmt, *ast.ChanType:
				t.Errorf("%v: concurrency", fset.Position(n.Pos()))
			case *ast.FuncDecl:
				if lines := fset.Position(n.End()).Line - fset.Position(n.Pos()).Line + 1; lines > longest {
					t.Errorf("%v: %s has %d lines", fset.Position(n.Pos()), n.Name.Name, lines)
				}
			}
			return true
		})
	}
	if seen < 10 {
		t.Errorf("%d files seen", seen)
	}
}
