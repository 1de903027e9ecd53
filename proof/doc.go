// Package proof tests what package state promises, harder than its own tests
// do: against a model, with recorded histories of concurrent clients, and with
// servers that are stopped, killed, paused and cut off. It holds nothing but
// tests; see README.md.
package proof
