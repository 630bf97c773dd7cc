package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// toy is a module with one function and a test that looks at one side of it.
var toy = map[string]string{
	"go.mod": "module toy\n\ngo 1.25\n",
	"toy.go": "package toy\n\nfunc Max(a, b int) int {\n\tif a > b {\n\t\treturn a\n\t}\n\treturn b\n}\n",
	"toy_test.go": "package toy\n\nimport \"testing\"\n\nfunc TestMax(t *testing.T) {\n" +
		"\tt.Run(\"left\", func(t *testing.T) {\n\t\tif Max(2, 1) != 2 {\n\t\t\tt.Fail()\n\t\t}\n\t})\n}\n",
}

func newToy(t *testing.T) string {
	dir := t.TempDir()
	for name, text := range toy {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestRun(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a module several times")
	}
	dir := newToy(t)
	for _, test := range []struct {
		name, old, new string
		by             string
		fails          bool
	}{
		{"killed", "a > b", "a < b", ".: TestMax/left", false},
		{"survives", "return b", "return b + 1", "", false},
		{"panics", "if a > b", "panic(a)\n\tif a > b", ".: TestMax/left", false},
		{"does not end", "if a > b", "for {\n\t}\n\tif a > b", ".: TestMax (does not end)", false},
		{"does not build", "a > b", "a > c", "", true},
		{"is not there", "a >= b", "a > b", "", true},
		{"is there twice", "return", "return 1 +", "", true},
		{"changes nothing", "a > b", "a > b", "", true},
	} {
		m := mutant{test.name, "toy.go", test.old, test.new, "."}
		timeout := time.Minute
		if test.name == "does not end" {
			timeout = 5 * time.Second
		}
		by, err := m.run(dir, "", timeout)
		if by != test.by || (err != nil) != test.fails {
			t.Errorf("%s: killed by %q, %v; want %q", test.name, by, err, test.by)
		}
		if src, _ := os.ReadFile(filepath.Join(dir, "toy.go")); string(src) != toy["toy.go"] {
			t.Fatalf("%s: the mutant is still there:\n%s", test.name, src)
		}
	}
}

func TestCheckAll(t *testing.T) {
	dir := newToy(t)
	good := mutant{"good", "toy.go", "a > b", "a < b", "."}
	if err := checkAll(dir, []mutant{good}); err != nil {
		t.Error(err)
	}
	for _, table := range [][]mutant{
		{good, good},
		{{"gone", "toy.go", "a >= b", "a < b", "."}},
		{{"no file", "other.go", "a > b", "a < b", "."}},
	} {
		if err := checkAll(dir, table); err == nil {
			t.Errorf("%s passes", table[len(table)-1].name)
		}
	}
}

func TestCopyTree(t *testing.T) {
	src, dst := newToy(t), t.TempDir()
	for _, name := range []string{".git/config", "a/b/c.go"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(src, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyTree(dst, src); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dst, "a/b/c.go")); err != nil || string(b) != "a/b/c.go" {
		t.Errorf("a/b/c.go: %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(dst, ".git")); err == nil {
		t.Error(".git was copied")
	}
}

func TestFailedTest(t *testing.T) {
	for _, test := range []struct{ name, out, want string }{
		{"no test", "# toy\n./toy.go:4:9: undefined: c\nFAIL\ttoy [build failed]\nFAIL\n", ""},
		{"one test", "--- FAIL: TestA (0.00s)\n    a_test.go:1: no\nFAIL\n", "TestA"},
		{"subtest", "--- FAIL: TestA (0.00s)\n    --- FAIL: TestA/x (0.00s)\n        --- FAIL: TestA/x/y (0.00s)\nFAIL\n", "TestA/x/y"},
		{"two tests", "--- FAIL: TestA (0.00s)\n--- FAIL: TestAB (0.00s)\nFAIL\n", "TestA"},
		{"outside of a test", "panic: oh\n\ngoroutine 1 [running]:\nFAIL\ttoy\t0.1s\n", "panic: oh"},
	} {
		if got := failedTest(test.out); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestRunSomeTests(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a module")
	}
	m := mutant{"killed by another", "toy.go", "a > b", "a < b", "."}
	if by, err := m.run(newToy(t), "TestOther", time.Minute); by != "" || err != nil {
		t.Errorf("killed by %q, %v, but that test does not run", by, err)
	}
}

// TestTable checks what does not change with every line of the module: -check does
// the rest.
func TestTable(t *testing.T) {
	seen := make(map[string]bool)
	for _, m := range mutants {
		if seen[m.name] || m.old == m.new || strings.TrimSpace(m.tests) == "" {
			t.Errorf("%s: named twice, without an effect, or without a package", m.name)
		}
		seen[m.name] = true
	}
}
