package main

import "testing"

// TestMutationsApply: the library still has what the mutations change.
func TestMutationsApply(t *testing.T) {
	for _, m := range mutations {
		dir := t.TempDir()
		if err := copyTree("../..", dir); err != nil {
			t.Fatal(err)
		}
		if err := m.apply(dir); err != nil {
			t.Errorf("%s: %v", m.name, err)
		}
	}
}
