package proof

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/anishathalye/porcupine"
)

// A history is what concurrent clients did and were told, with the times of
// calls and returns. A call whose outcome is unknown returns never.
type history struct {
	began time.Time

	mu        sync.Mutex // guards what follows
	registers map[string][]porcupine.Operation
	grants    map[string][]*grant
	locks     map[string][]porcupine.Operation
	refused   int // definite failures, of which the checks say that they changed nothing
	unknown   int
	done      int
}

const never = math.MaxInt64

func newHistory() *history {
	return &history{
		began:     time.Now(),
		registers: map[string][]porcupine.Operation{},
		grants:    map[string][]*grant{},
		locks:     map[string][]porcupine.Operation{},
	}
}

func (h *history) now() int64 { return int64(time.Since(h.began)) }

// A regVerb is an operation on a register, which is a key. Each write has a
// value that no other one has, so that values stand for revisions; "" stands
// for a key that does not exist.
type regVerb int

const (
	regGet regVerb = iota
	regPut
	regDelete
	regUpdate
)

type regInput struct {
	verb  regVerb
	value string // to be written
	old   string // to be replaced, for regUpdate
}

type regOutput struct {
	value    string // that was read
	conflict bool   // of regUpdate
	unknown  bool
	maybe    bool // of regDelete: it may have found nothing where there was something
}

// registerModel is a key, sequentially.
var registerModel = porcupine.Model{
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		is, in, out := state.(string), input.(regInput), output.(regOutput)
		switch in.verb {
		case regGet:
			return is == out.value, is
		case regPut, regDelete:
			return true, in.value
		}
		if out.unknown && is != in.old {
			return true, is
		}
		if out.conflict {
			return is != in.old, is
		}
		return is == in.old, in.value
	},
	DescribeOperation: func(input, output any) string {
		in, out := input.(regInput), output.(regOutput)
		text := ""
		switch in.verb {
		case regGet:
			return fmt.Sprintf("get: %q", out.value)
		case regPut:
			text = fmt.Sprintf("put %q", in.value)
		case regDelete:
			text = "delete"
		case regUpdate:
			text = fmt.Sprintf("update %q to %q", in.old, in.value)
		}
		switch {
		case out.unknown:
			text += ": unknown"
		case out.conflict:
			text += ": conflict"
		}
		return text
	},
	DescribeState: func(state any) string { return fmt.Sprintf("%q", state) },
}

// perhaps returns a deletion as one that may have found nothing.
func perhaps(op porcupine.Operation) (porcupine.Operation, bool) {
	if in, ok := op.Input.(regInput); !ok || in.verb != regDelete {
		return op, false
	}
	op.Output = regOutput{maybe: true}
	return op, true
}

// lenientRegister is a register that some deletions may have failed to see.
var lenientRegister = porcupine.NondeterministicModel{
	Init: func() []any { return []any{""} },
	Step: func(state, input, output any) []any {
		if output.(regOutput).maybe && state != "" {
			return []any{state, ""}
		}
		if ok, next := registerModel.Step(state, input, output); ok {
			return []any{next}
		}
		return nil
	},
	DescribeOperation: registerModel.DescribeOperation,
}

// A lockVerb is an operation on a lock.
type lockVerb int

const (
	lockTake    lockVerb = iota // Lock granted it
	lockHeld                    // Lock said ErrLockHeld
	lockHolder                  // LockHolder named its token
	lockFree                    // LockHolder said ErrNotFound
	lockRefresh                 // Refresh extended it
	lockRelease                 // Unlock released it
	lockLapse                   // the lease ended by itself, if it still was there
)

type lockInput struct {
	verb  lockVerb
	token uint64
}

type lockOutput struct{ unknown bool }

// lockState is a lock, and the highest token that a resource behind it has seen.
type lockState struct{ holder, top uint64 }

// nobodyKnows begins the tokens of grants whose answers were lost.
const nobodyKnows = 1 << 62

// lockModel is a lock, sequentially. That a lease lapses is an operation too,
// which may happen from its earliest end on.
var lockModel = porcupine.Model{
	Init: func() any { return lockState{} },
	Step: func(state, input, output any) (bool, any) {
		is, in, out := state.(lockState), input.(lockInput), output.(lockOutput)
		switch in.verb {
		case lockTake:
			if out.unknown {
				if is.holder == 0 {
					is.holder = in.token
				}
				return true, is
			}
			return is.holder == 0 && in.token > is.top, lockState{in.token, in.token}
		case lockHeld:
			return is.holder != 0, is
		case lockHolder:
			// The token of a grant whose answer was lost only LockHolder tells.
			return is.holder == in.token || is.holder >= nobodyKnows, is
		case lockFree:
			return is.holder == 0, is
		case lockRefresh:
			return is.holder == in.token, is
		case lockRelease:
			if out.unknown && is.holder != in.token {
				return true, is
			}
			return is.holder == in.token, lockState{0, is.top}
		}
		if is.holder == in.token {
			is.holder = 0
		}
		return true, is
	},
	DescribeOperation: func(input, output any) string {
		in, out := input.(lockInput), output.(lockOutput)
		text := [...]string{"lock", "lock: held", "holder", "holder: none", "refresh", "unlock", "lapse"}[in.verb]
		if in.token != 0 {
			text += fmt.Sprintf(" %d", in.token)
		}
		if out.unknown {
			text += ": unknown"
		}
		return text
	},
	DescribeState: func(state any) string { return fmt.Sprintf("%+v", state) },
}

// A grant is one acquisition of a lock.
type grant struct {
	client    int
	token     uint64
	call, ret int64 // of Lock
	ttl       time.Duration
	until     int64 // up to when its holder relies on it for sure
	over      int64 // from when on it does not for sure
	latest    int64 // when it has lapsed at the latest
}

// register records an operation on a key.
func (h *history) register(client int, key string, in regInput, call int64, out regOutput) {
	ret := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done++
	if out.unknown {
		h.unknown++
		ret = never
	}
	h.registers[key] = append(h.registers[key], porcupine.Operation{ClientId: client, Input: in, Call: call, Output: out, Return: ret})
}

// refuse counts an operation that failed and says that it changed nothing.
func (h *history) refuse() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.done++
	h.refused++
}

// lock records an operation on a lock.
func (h *history) lock(client int, name string, in lockInput, call, ret int64, unknown bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if in.verb != lockLapse {
		h.done++
	}
	if unknown {
		h.unknown++
		ret = never
	}
	h.locks[name] = append(h.locks[name], porcupine.Operation{ClientId: client, Input: in, Call: call, Output: lockOutput{unknown}, Return: ret})
}

func (h *history) grant(name string, g *grant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.grants[name] = append(h.grants[name], g)
}

// A window is a time in which reads may be stale, since a leader was cut off
// but not from all clients.
type window struct{ from, to int64 }

// A verdict is what the checks of a history say.
type verdict struct {
	histories int
	undecided int
	faults    []string // each breaks the contract
	stale     []staleRead
}

// A staleRead is a read that only makes sense in the past, as one through a
// leader that was cut off. It is told how long after the cut it was made.
type staleRead struct {
	text  string
	after time.Duration
}

// check checks all histories. What is wrong with one within a window is told
// apart if nothing but reads made then are to blame.
func (h *history) check(windows []window, limit time.Duration) verdict {
	var v verdict
	h.mu.Lock()
	defer h.mu.Unlock()
	for key, ops := range h.registers {
		v.checkOne("key "+key, registerModel, ops, windows, limit, func(op porcupine.Operation) (read bool) {
			in, out := op.Input.(regInput), op.Output.(regOutput)
			// A Delete that finds nothing, and an Update that finds something
			// else, have read and not written.
			return in.verb == regGet || in.verb == regDelete || out.conflict
		})
	}
	for name, ops := range h.locks {
		v.checkOne("lock "+name, lockModel, ops, windows, limit, func(op porcupine.Operation) (read bool) {
			verb := op.Input.(lockInput).verb
			return verb == lockHeld || verb == lockHolder || verb == lockFree
		})
	}
	for name, grants := range h.grants {
		v.checkGrants(name, grants)
	}
	return v
}

func (v *verdict) checkOne(what string, model porcupine.Model, ops []porcupine.Operation, windows []window, limit time.Duration, reads func(porcupine.Operation) bool) {
	v.histories++
	result := porcupine.CheckOperationsTimeout(model, ops, limit)
	switch result {
	case porcupine.Ok:
		return
	case porcupine.Unknown:
		v.undecided++
		return
	}
	// Without the reads that were made in a window it must make sense, where
	// deletions may have been reads as well. Then put them back one by one, to
	// see which of them do not.
	var kept, suspects []porcupine.Operation
	since := map[int]time.Duration{}
	for _, op := range ops {
		w := slices.IndexFunc(windows, func(w window) bool { return op.Return >= w.from && op.Call <= w.to })
		if w < 0 || !reads(op) {
			kept = append(kept, op)
			continue
		}
		since[len(suspects)] = time.Duration(op.Return - windows[w].from)
		suspects = append(suspects, op)
		if maybe, ok := perhaps(op); ok {
			kept = append(kept, maybe)
		}
	}
	lenient := model
	if _, ok := ops[0].Input.(regInput); ok {
		lenient = lenientRegister.ToModel()
	}
	if len(suspects) > 0 {
		result, model, ops = porcupine.CheckOperationsTimeout(lenient, kept, limit), lenient, kept
	}
	switch {
	case result == porcupine.Unknown:
		v.undecided++
	case result == porcupine.Ok:
		for i, op := range suspects {
			with := append(slices.Clone(kept), op)
			if maybe, ok := perhaps(op); ok {
				with = slices.DeleteFunc(with, func(other porcupine.Operation) bool { return other == maybe })
			}
			if porcupine.CheckOperationsTimeout(lenient, with, limit) == porcupine.Ok {
				kept = with
				continue
			}
			v.stale = append(v.stale, staleRead{what + ": " + model.DescribeOperation(op.Input, op.Output), since[i]})
		}
	default:
		v.faults = append(v.faults, fmt.Sprintf("%s is not linearizable:\n%s", what, script(model, smallest(model, ops, limit))))
	}
}

// smallest leaves out of a history that makes no sense what is not needed for
// that.
func smallest(model porcupine.Model, ops []porcupine.Operation, limit time.Duration) []porcupine.Operation {
	limit = min(limit, 2*time.Second)
	end := time.Now().Add(20 * time.Second)
	ops = slices.Clone(ops)
	slices.SortFunc(ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) })
	// A prefix first: what was called later does not matter to what is wrong
	// already, as long as all that was called before is there. A later
	// operation may explain a read that had not returned by then, so that is left out.
	prefix := func(n int) []porcupine.Operation {
		return slices.DeleteFunc(slices.Clone(ops[:n]), func(op porcupine.Operation) bool {
			return n < len(ops) && op.Return > ops[n].Call && idle(op, ops[:n])
		})
	}
	lo, hi := 0, len(ops)
	for lo < hi {
		mid := (lo + hi) / 2
		if porcupine.CheckOperationsTimeout(model, prefix(mid), limit) == porcupine.Illegal {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	ops = prefix(lo)
	for i := 0; i < len(ops) && time.Now().Before(end); {
		less := slices.Delete(slices.Clone(ops), i, i+1)
		if idle(ops[i], less) && porcupine.CheckOperationsTimeout(model, less, limit) == porcupine.Illegal {
			ops = less
		} else {
			i++
		}
	}
	return ops
}

// idle reports whether an operation explains none of the others: without it a
// history that makes sense still does.
func idle(op porcupine.Operation, others []porcupine.Operation) bool {
	switch in := op.Input.(type) {
	case lockInput:
		return in.verb == lockHeld || in.verb == lockHolder || in.verb == lockFree || in.verb == lockRefresh
	case regInput:
		if in.verb == regGet || op.Output.(regOutput).conflict {
			return true
		}
		return !slices.ContainsFunc(others, func(other porcupine.Operation) bool {
			is, out := other.Input.(regInput), other.Output.(regOutput)
			return out.conflict || is.verb == regGet && out.value == in.value || is.verb == regUpdate && is.old == in.value
		})
	}
	return false
}

// script writes a history down, in the order of the calls.
func script(model porcupine.Model, ops []porcupine.Operation) string {
	slices.SortFunc(ops, func(x, y porcupine.Operation) int { return cmp.Compare(x.Call, y.Call) })
	text := ""
	for _, op := range ops {
		ret := "never"
		if op.Return != never {
			ret = fmt.Sprintf("%.6f", float64(op.Return)/1e9)
		}
		text += fmt.Sprintf("  %.6f to %s: client %d: %s\n", float64(op.Call)/1e9, ret, op.ClientId, model.DescribeOperation(op.Input, op.Output))
	}
	return text
}

// checkGrants checks that no two holders could rely on a lock at once, and that
// tokens grow.
func (v *verdict) checkGrants(name string, grants []*grant) {
	grants = slices.Clone(grants)
	slices.SortFunc(grants, func(x, y *grant) int { return cmp.Compare(x.ret, y.ret) })
	for i, g := range grants {
		for _, next := range grants[i+1:] {
			if next.ret < g.until && next.ret < next.until {
				v.faults = append(v.faults, fmt.Sprintf("lock %s: client %d got it (token %d) at %.6f while client %d (token %d, since %.6f) could rely on it until %.6f",
					name, next.client, next.token, float64(next.ret)/1e9, g.client, g.token, float64(g.ret)/1e9, float64(g.until)/1e9))
			}
			if next.token < g.token && next.ret-g.ret > int64(50*time.Millisecond) {
				v.faults = append(v.faults, fmt.Sprintf("lock %s: token %d was handed out at %.6f, when token %d had been since %.6f", name, next.token, float64(next.ret)/1e9, g.token, float64(g.ret)/1e9))
			}
			if next.call > g.ret && next.token <= g.token || next.token == g.token {
				v.faults = append(v.faults, fmt.Sprintf("lock %s: token %d was given after %d", name, next.token, g.token))
			}
		}
	}
}
