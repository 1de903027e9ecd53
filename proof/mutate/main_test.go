package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestMutationsApply: the library still has what the mutations change.
func TestMutationsApply(t *testing.T) {
	sources, err := filepath.Glob("../../*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutations {
		dir := t.TempDir()
		for _, source := range sources {
			text, err := os.ReadFile(source)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, filepath.Base(source)), text, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := m.apply(dir); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
		_ = os.RemoveAll(dir)
	}
}
