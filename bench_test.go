package state

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The benchmarks of both backends. What the figures are compared with, and by
// whom that is done in one run, is in the module bench.

// eachBackend runs f for a store of each backend.
func eachBackend(b *testing.B, f func(b *testing.B, s Store)) {
	b.Run("memory", func(b *testing.B) {
		s := NewMemoryStore()
		defer s.Close()
		f(b, s)
	})
	b.Run("nats", func(b *testing.B) {
		srv := startServer(b, nil)
		f(b, openStore(b, NATSStoreConfig{Conn: connect(b, srv.ClientURL()), Bucket: newBucketName()}))
	})
}

func check(b *testing.B, err error) {
	if err != nil {
		b.Fatal(err)
	}
}

var benchValue = make([]byte, 128)

func benchKeys(n int) []string {
	keys := make([]string, n)
	for i := range keys {
		keys[i] = fmt.Sprintf("group-%03d.key-%07d", i%100, i)
	}
	return keys
}

func fill(b *testing.B, s StateStore, keys []string) {
	b.Helper()
	for _, key := range keys {
		check(b, s.Put(key, benchValue, 0))
	}
}

func BenchmarkGet(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		keys := benchKeys(1000)
		fill(b, s, keys)
		check(b, s.Put("lasting", benchValue, time.Hour))
		b.Run("plain", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				_, err := s.Get(keys[i%len(keys)])
				check(b, err)
			}
		})
		b.Run("ttl", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, err := s.Get("lasting")
				check(b, err)
			}
		})
		b.Run("parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			var turn atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				for i := int(turn.Add(37)); pb.Next(); i++ {
					if _, err := s.Get(keys[i%len(keys)]); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	})
}

func BenchmarkPut(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		keys := benchKeys(1000)
		fill(b, s, keys)
		b.Run("own-key", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				check(b, s.Put(keys[i%len(keys)], benchValue, 0))
			}
		})
		b.Run("ttl", func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				check(b, s.Put(keys[i%len(keys)], benchValue, time.Hour))
			}
		})
		fresh := 0
		b.Run("new-key", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				check(b, s.Put(fmt.Sprintf("new.%d", fresh), benchValue, 0))
				fresh++
			}
		})
		b.Run("parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			var turn atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				for i := int(turn.Add(37)); pb.Next(); i++ {
					if err := s.Put(keys[i%len(keys)], benchValue, 0); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	})
}

func BenchmarkUpdate(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		var revision uint64
		b.ReportAllocs()
		for b.Loop() {
			var err error
			revision, err = s.Update("key", benchValue, 0, revision)
			check(b, err)
		}
	})
}

func BenchmarkPutDelete(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		b.ReportAllocs()
		for b.Loop() {
			check(b, s.Put("key", benchValue, 0))
			check(b, s.Delete("key"))
		}
	})
}

func BenchmarkLockUnlock(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		b.Run("one", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				lock, err := s.Lock("lock", time.Minute)
				check(b, err)
				check(b, lock.Unlock())
			}
		})
		b.Run("parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			var turn atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				name := fmt.Sprintf("lock.%d", turn.Add(1))
				for pb.Next() {
					lock, err := s.Lock(name, time.Minute)
					if err == nil {
						err = lock.Unlock()
					}
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	})
}

func BenchmarkRefresh(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		lock, err := s.Lock("lock", time.Hour)
		check(b, err)
		b.ReportAllocs()
		for b.Loop() {
			check(b, lock.Refresh())
		}
	})
}

func BenchmarkKeys(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			eachBackend(b, func(b *testing.B, s Store) {
				fill(b, s, benchKeys(n))
				for name, pattern := range map[string]string{"all": "*", "one-in-a-hundred": "group-007.*"} {
					b.Run(name, func(b *testing.B) {
						b.ReportAllocs()
						for b.Loop() {
							found, err := s.Keys(pattern)
							check(b, err)
							if len(found) == 0 {
								b.Fatal("nothing found")
							}
						}
					})
				}
			})
		})
	}
}

// BenchmarkWatch takes the time from a Put to its event.
func BenchmarkWatch(b *testing.B) {
	eachBackend(b, func(b *testing.B, s Store) {
		events, err := s.Watch("watched.*")
		require.NoError(b, err)
		b.ReportAllocs()
		for b.Loop() {
			check(b, s.Put("watched.key", benchValue, 0))
			<-events
		}
	})
}

// BenchmarkPutBesideWatches has watches that do not match.
func BenchmarkPutBesideWatches(b *testing.B) {
	for _, n := range []int{0, 100, 5000} {
		b.Run(fmt.Sprintf("memory/%d", n), func(b *testing.B) {
			s := NewMemoryStore()
			defer s.Close()
			for i := range n {
				_, err := s.Watch(fmt.Sprintf("other.%d.*", i))
				require.NoError(b, err)
			}
			b.ReportAllocs()
			for b.Loop() {
				check(b, s.Put("other-key", benchValue, 0))
			}
		})
	}
}

// BenchmarkKeysUnderChurn lists a few of many keys while others come and go.
func BenchmarkKeysUnderChurn(b *testing.B) {
	s := NewMemoryStore()
	defer s.Close()
	fill(b, s, benchKeys(100_000))
	for _, few := range benchKeys(100) {
		check(b, s.Put("few."+few, benchValue, 0))
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		check(b, s.Put(fmt.Sprintf("churn.%d", i), benchValue, 0))
		found, err := s.Keys("few.*")
		check(b, err)
		if len(found) != 100 {
			b.Fatal(len(found))
		}
		check(b, s.Delete(fmt.Sprintf("churn.%d", i)))
	}
}
