package state

import (
	"strings"
	"time"
)

const (
	// defaultMaxValue is the documented limit of a value, "1MB".
	defaultMaxValue = 1 << 20
	// headerRoom is how much of a message is kept free for headers. NATS counts
	// them in, so that by default a value can have this much less than 1 MiB.
	headerRoom = 1 << 10
)

// maxKeyLen is the largest length of a key, in bytes.
const maxKeyLen = 1024

// keyByte tells which bytes a key may hold: what every NATS KV client, in
// every language, takes.
var keyByte = func() (ok [256]bool) {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_/=."
	for _, c := range []byte(letters) {
		ok[c] = true
	}
	return ok
}()

// ValidateKey returns nil if key can name an entry or a lock, else the bare
// [ErrInvalidKey]. A key is 1 to 1024 bytes of A-Z a-z 0-9 - _ / = and dot; it
// does not begin or end with a dot and holds no two dots in a row.
func ValidateKey(key string) error {
	if key == "" || key[len(key)-1] == '.' || !keyBeginning(key) {
		return ErrInvalidKey
	}
	return nil
}

// keyBeginning reports whether s is empty or the beginning of some key.
func keyBeginning(s string) bool {
	if len(s) > maxKeyLen || len(s) == maxKeyLen && s[maxKeyLen-1] == '.' {
		return false
	}
	last := byte('.') // so that a first dot counts as a second one
	for i := range len(s) {
		c := s[i]
		if !keyByte[c] || c == '.' && last == '.' {
			return false
		}
		last = c
	}
	return true
}

// ValidateTTL returns nil for a TTL that Put takes, else the bare
// [ErrInvalidTTL]. Zero means no expiry; any positive duration is good; a
// negative one is not. (Lock refuses zero too.)
func ValidateTTL(ttl time.Duration) error {
	if ttl < 0 {
		return ErrInvalidTTL
	}
	return nil
}

// MatchPattern reports whether key matches pattern: it is equal to it or, when
// the pattern ends with "*", begins with what comes before that. The star
// matches any suffix, dots included and the empty one too: "config.*" matches
// "config.foo" and "config.foo.bar", and "conf*" matches "conf".
//
// MatchPattern only compares strings; it does not tell whether a pattern or a
// key is valid.
func MatchPattern(pattern, key string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(key, prefix)
	}
	return pattern == key
}

// A pattern is a parsed and valid pattern.
type pattern struct {
	prefix string // the whole key if not wild
	wild   bool
}

// parsePattern returns the bare ErrInvalidKey for what could match no key.
func parsePattern(s string) (pattern, error) {
	prefix, wild := strings.CutSuffix(s, "*")
	if !wild {
		return pattern{prefix: s}, ValidateKey(s)
	}
	if !keyBeginning(prefix) {
		return pattern{}, ErrInvalidKey
	}
	return pattern{prefix, true}, nil
}

// String returns the pattern as it was given.
func (p pattern) String() string {
	if p.wild {
		return p.prefix + "*"
	}
	return p.prefix
}

func (p pattern) matches(key string) bool {
	if p.wild {
		return strings.HasPrefix(key, p.prefix)
	}
	return key == p.prefix
}

// covers reports whether every key that matches q matches p.
func (p pattern) covers(q pattern) bool {
	if p.wild {
		return strings.HasPrefix(q.prefix, p.prefix)
	}
	return p == q
}

// validateLock checks what Lock is given.
func validateLock(key string, ttl time.Duration) error {
	if err := ValidateKey(key); err != nil {
		return err
	}
	if ttl <= 0 {
		return ErrInvalidTTL
	}
	return nil
}

// validatePut checks what Put and Update are given.
func validatePut(key string, value []byte, ttl time.Duration, limit int) error {
	if err := ValidateKey(key); err != nil {
		return err
	}
	if err := ValidateTTL(ttl); err != nil {
		return err
	}
	if len(value) > limit {
		return ErrValueTooLarge
	}
	return nil
}
