package state

import (
	"path"
	"slices"
	"strings"
	"testing"
	"time"
)

// The conformance suite where the network and the other clients are not as kind
// as on a quiet machine.

// TestNATSStoreConformanceAtADistance runs the suite with every client a round
// trip of five milliseconds away from the server.
func TestNATSStoreConformanceAtADistance(t *testing.T) {
	if testing.Short() {
		t.Skip("one case makes three thousand round trips")
	}
	t.Parallel()
	srv := startServer(t, nil)
	b := natsBackend(1, srv)
	b.open = func(t *testing.T) func() Store {
		bucket := newBucketName()
		return func() Store {
			nc, _ := connectAt(t, srv.ClientURL(), distance{rtt: 5 * time.Millisecond})
			return openStore(t, NATSStoreConfig{Conn: nc, Bucket: bucket})
		}
	}
	testConformance(t, b)
}

// trafficPrefix begins the keys that the suite's cases are not shown.
const trafficPrefix = "traffic-beside."

// TestNATSStoreConformanceBesideTraffic runs the suite beside another client,
// which makes 300 changes a second to other keys of the same bucket. The cases
// see the bucket without these keys: what they check is everything else.
func TestNATSStoreConformanceBesideTraffic(t *testing.T) {
	t.Parallel()
	srv := startServer(t, nil)
	b := natsBackend(1, srv)
	b.open = func(t *testing.T) func() Store {
		bucket := newBucketName()
		// These count the revisions of the whole store.
		quiet := slices.Contains([]string{"delete", "concurrent-writers"}, path.Base(t.Name()))
		return func() Store {
			s := openStore(t, NATSStoreConfig{Conn: connect(t, srv.ClientURL()), Bucket: bucket})
			if !quiet {
				quiet = true // one client makes it
				traffic{prefix: trafficPrefix, keys: 100, perSecond: 300, ttl: 5 * time.Second}.start(t, connect(t, srv.ClientURL()), bucket)
			}
			return besideTraffic{s}
		}
	}
	testConformance(t, b)
}

// besideTraffic is a store whose keys and events are shown without the traffic.
type besideTraffic struct{ *NATSStore }

// self has it count as a store of this package: what it overrides are only views.
func (s besideTraffic) self() StateStore { return s }

func (s besideTraffic) Keys(pattern string) ([]string, error) {
	keys, err := s.NATSStore.Keys(pattern)
	return withoutTraffic(keys), err
}

func (s besideTraffic) Watch(pattern string) (<-chan *KeyValue, error) {
	events, err := s.NATSStore.Watch(pattern)
	return eventsWithoutTraffic(events), err
}

func withoutTraffic(keys []string) []string {
	return slices.DeleteFunc(keys, func(key string) bool { return strings.HasPrefix(key, trafficPrefix) })
}

// eventsWithoutTraffic drops the events of the traffic.
func eventsWithoutTraffic(events <-chan *KeyValue) <-chan *KeyValue {
	if events == nil {
		return nil
	}
	rest := make(chan *KeyValue)
	go func() {
		defer close(rest)
		for kv := range events {
			if !strings.HasPrefix(kv.Key, trafficPrefix) {
				rest <- kv
			}
		}
	}()
	return rest
}
