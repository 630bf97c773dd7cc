// Mutants tells whether the tests would notice a fault. It copies the module to a
// temporary directory, puts one fault of the table in at a time, and runs the short
// tests of the packages that should fail of it:
//
//	go run ./internal/mutants            # all of them, which takes a while
//	go run ./internal/mutants -run tcp/  # those whose names match
//	go run ./internal/mutants -check     # only that each can still be put in
//	go run ./internal/mutants -run conn/ -tests Deadline
//
// With -tests only some of the tests are run: who is killed by them is killed.
//
// A mutant is killed if a test fails, or does not end. One that survives is a test
// that is missing; one that cannot be put in, or does not build, is a table that is
// out of date. Either way the program fails.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// mutant is one fault.
type mutant struct {
	name  string
	file  string // from the root of the module
	old   string // what stands there, exactly once
	new   string // what stands there instead
	tests string // packages, the one that is most likely to notice first
}

func main() {
	run := flag.String("run", "", "only mutants whose `name` matches this regular expression")
	check := flag.Bool("check", false, "only check that the mutants can be put in")
	timeout := flag.Duration("timeout", 5*time.Minute, "for the tests of one package")
	tests := flag.String("tests", "", "only tests whose `name` matches this regular expression")
	flag.Parse()
	names, err := regexp.Compile(*run)
	if err != nil {
		fail(err)
	}
	root, err := moduleRoot()
	if err != nil {
		fail(err)
	}
	if *check {
		if err := checkAll(root, mutants); err != nil {
			fail(err)
		}
		return
	}
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		fail(err)
	}
	err = runAll(root, dir, names, *tests, *timeout)
	os.RemoveAll(dir)
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "mutants:", err)
	os.Exit(1)
}

// moduleRoot returns the directory of the go.mod that rules here.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", err
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// checkAll reports the mutants that cannot be put in the module at root.
func checkAll(root string, table []mutant) error {
	var errs []error
	seen := make(map[string]bool)
	for _, m := range table {
		src, err := os.ReadFile(filepath.Join(root, m.file))
		if err == nil {
			_, err = m.mutate(src)
		}
		if err == nil && seen[m.name] {
			err = errors.New("there are two of that name")
		}
		seen[m.name] = true
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.name, err))
		}
	}
	return errors.Join(errs...)
}

// mutate returns the source with the fault in it.
func (m *mutant) mutate(src []byte) ([]byte, error) {
	switch n := bytes.Count(src, []byte(m.old)); {
	case m.old == m.new:
		return nil, errors.New("it changes nothing")
	case n != 1:
		return nil, fmt.Errorf("%s has the old text %d times, not once", m.file, n)
	}
	return bytes.Replace(src, []byte(m.old), []byte(m.new), 1), nil
}

// runAll runs the mutants whose names match in a copy of root at dir.
func runAll(root, dir string, names *regexp.Regexp, tests string, timeout time.Duration) error {
	if err := checkAll(root, mutants); err != nil {
		return err
	}
	if err := copyTree(dir, root); err != nil {
		return err
	}
	killed, survivors := 0, 0
	for _, m := range mutants {
		if !names.MatchString(m.name) {
			continue
		}
		start := time.Now()
		by, err := m.run(dir, tests, timeout)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		verdict := "killed"
		if by == "" {
			verdict = "SURVIVED"
			survivors++
		} else {
			killed++
		}
		fmt.Printf("%-8s  %-44s %4.0f s  %s\n", verdict, m.name, time.Since(start).Seconds(), by)
	}
	fmt.Printf("%d killed, %d survived\n", killed, survivors)
	if survivors > 0 {
		return fmt.Errorf("%d of the mutants survived", survivors)
	}
	return nil
}

// copyTree copies the files of a module, without those of version control.
func copyTree(dst, src string) error {
	return filepath.WalkDir(src, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, path)
		if err != nil {
			return err
		}
		switch to := filepath.Join(dst, rel); {
		case e.Name() == ".git" && e.IsDir():
			return filepath.SkipDir
		case e.IsDir():
			return os.MkdirAll(to, 0o755)
		case e.Type().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(to, b, 0o644)
		}
		return nil
	})
}

// run puts the mutant in the module at dir, runs the tests, and takes it out again.
// It returns the test that failed, or "" if none did.
func (m *mutant) run(dir, tests string, timeout time.Duration) (by string, err error) {
	path := filepath.Join(dir, m.file)
	src, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	bad, err := m.mutate(src)
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(path, bad, 0o644); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.WriteFile(path, src, 0o644)) }()
	for pkg := range strings.FieldsSeq(m.tests) {
		if by, err = testPackage(dir, pkg, tests, timeout); by != "" || err != nil {
			return by, err
		}
	}
	return "", nil
}

// testPackage runs the short tests whose names match of a package of the module at
// dir, and returns the one that failed, or "" if none did.
func testPackage(dir, pkg, tests string, timeout time.Duration) (failed string, err error) {
	// The tests end themselves; the context is for what they leave behind.
	ctx, cancel := context.WithTimeout(context.Background(), timeout+5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-short", "-failfast", "-count=1", "-timeout", timeout.String(), "-run", tests, pkg)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", nil
	case ctx.Err() != nil:
		return pkg + " does not end", nil
	case !errors.As(err, &exit):
		return "", err
	}
	if failed := failedTest(string(out)); failed != "" {
		return pkg + ": " + failed, nil
	}
	return "", fmt.Errorf("no test of %s failed, but:\n%s", pkg, out)
}

var (
	failLine    = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+)`)
	timeoutLine = regexp.MustCompile(`(?m)^panic: test timed out after .*\n\s*running tests:\n\s*(\S+)`)
	panicLine   = regexp.MustCompile(`(?m)^(?:panic|fatal error): .*`)
)

// failedTest returns the name of the test that failed, out of the output of "go
// test"; "" if there is none, as when the package does not build.
func failedTest(out string) string {
	if m := timeoutLine.FindStringSubmatch(out); m != nil {
		return m[1] + " (does not end)"
	}
	if all := failLine.FindAllStringSubmatch(out, -1); all != nil {
		for i, m := range all { // a subtest stands behind its parent
			if i+1 == len(all) || !strings.HasPrefix(all[i+1][1], m[1]+"/") {
				return m[1]
			}
		}
	}
	return panicLine.FindString(out)
}
