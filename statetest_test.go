package state_test

import (
	"testing"

	"example.com/state"
	"example.com/state/statetest"
)

// A wrapped store changes nothing until it is told to: the whole conformance
// suite passes on it.

func TestWrappedMemoryStoreConformance(t *testing.T) {
	state.MemoryConformance(t, func(s state.Store) state.Store { return statetest.Wrap(s) })
}

func TestWrappedNATSStoreConformance(t *testing.T) {
	t.Parallel()
	state.NATSConformance(t, func(s state.Store) state.Store { return statetest.Wrap(s) })
}
