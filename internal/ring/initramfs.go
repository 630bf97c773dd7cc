package ring

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// File is one file of an initramfs. Missing directories are made for it.
type File struct {
	Name string // without a leading slash
	Mode fs.FileMode
	Data []byte
}

// Initramfs writes the files as a compressed cpio archive in the "newc" format,
// the one that a Linux kernel unpacks at boot.
func Initramfs(w io.Writer, files []File) error {
	z := gzip.NewWriter(w)
	made := make(map[string]bool)
	ino := 0
	entry := func(name string, mode uint32, data []byte) {
		ino++
		var b bytes.Buffer
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		pad(&b)
		b.Write(data)
		pad(&b)
		z.Write(b.Bytes()) // an error stays until Close
	}
	for _, f := range files {
		for i, c := range f.Name {
			if dir := f.Name[:i]; c == '/' && !made[dir] {
				made[dir] = true
				entry(dir, 0o040755, nil)
			}
		}
		entry(f.Name, 0o100000|uint32(f.Mode.Perm()), f.Data)
	}
	entry("TRAILER!!!", 0, nil)
	return z.Close()
}

func pad(b *bytes.Buffer) {
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

// Kernel is a Linux kernel of the distribution and its modules.
type Kernel struct {
	Image   string // path of the vmlinuz
	modules map[string]string
}

// FindKernel returns the last kernel by name below root.
func FindKernel(root string) (*Kernel, error) {
	pattern := filepath.Join(root, "boot", "vmlinuz-*")
	images, err := filepath.Glob(pattern)
	if err != nil || len(images) == 0 {
		return nil, fmt.Errorf("no %s", pattern)
	}
	k := &Kernel{Image: images[len(images)-1], modules: make(map[string]string)}
	version := strings.TrimPrefix(filepath.Base(k.Image), "vmlinuz-")
	for _, dir := range []string{"lib/modules", "usr/lib/modules"} {
		filepath.WalkDir(filepath.Join(root, dir, version), func(path string, d fs.DirEntry, err error) error {
			if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil {
				k.modules[moduleName(name)] = path
			}
			return nil
		})
	}
	return k, nil
}

// Modules returns the named modules and all that they depend on, each after its
// dependencies, as files in "modules". One that is not a file is taken to be
// built in.
func (k *Kernel) Modules(names ...string) ([]File, error) {
	var files []File
	seen := make(map[string]bool)
	var add func(name string) error
	add = func(name string) error {
		name = moduleName(name)
		path, ok := k.modules[name]
		if !ok || seen[name] {
			return nil
		}
		seen[name] = true
		data, err := readModule(path)
		if err != nil {
			return err
		}
		deps, err := moduleDepends(data)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, d := range deps {
			if err := add(d); err != nil {
				return err
			}
		}
		files = append(files, File{Name: "modules/" + name + ".ko", Mode: 0o644, Data: data})
		return nil
	}
	for _, name := range names {
		if err := add(name); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// moduleName returns the name by which the kernel knows a module.
func moduleName(name string) string { return strings.ReplaceAll(name, "-", "_") }

func readModule(path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return exec.Command("xz", "-dc", path).Output()
	case ".zst":
		return exec.Command("zstd", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// moduleDepends returns the value of "depends" in a module's .modinfo section.
func moduleDepends(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if v, ok := strings.CutPrefix(field, "depends="); ok && v != "" {
			return strings.Split(v, ","), nil
		}
	}
	return nil, nil
}
