package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const replicasText = "Three servers, three replicas of each bucket. The clients are connected to the server that leads."

// replicasGroup compares the operations on three servers, and what the
// guarantees cost that nats.go does not give.
func replicasGroup(r *run) error {
	address, err := r.startCluster()
	if err != nil {
		return err
	}
	r.nats, r.replicas = address, 3
	p := r.plan(3)
	p.rounds = min(p.rounds, 60)
	if err := r.awaitCluster(); err != nil {
		return err
	}
	basics, err := r.basics("three", p)
	if err != nil {
		return err
	}
	for _, b := range basics {
		if b.row.name == "Get" {
			b.row.target = 0 // the guarantee has a price, see below
		}
		b.row.name = "3 replicas: " + b.row.name
		r.put(b.row)
	}
	return r.guarantees(p)
}

// guarantees measures reads and writes with and without what this package
// promises. All are of the same bucket of ours.
func (r *run) guarantees(p plan) error {
	s, _, err := r.openStore("state-three")
	if err != nil {
		return err
	}
	kv, nc, err := r.bindKV("state-three")
	if err != nil {
		return err
	}
	ours, theirs, raw := among(50), among(50), among(50)
	leaderGet := timed("a request to the leader", func() error {
		_, err := request(nc, "STREAM.MSG.GET.KV_state-three", fmt.Sprintf(`{"last_by_subj":"$KV.state-three.%s"}`, raw()))
		return err
	})
	price := func(name, guarantee string, sides ...side) error {
		samples, err := measure(p, sides...)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for i, other := range sides[1:] {
			r.put(compare(name+": "+guarantee, us, other.name, samples[0], samples[i+1]))
		}
		return nil
	}
	err = price("Get", "sees every write that was acknowledged",
		timed(us, func() error { _, err := s.Get(ours()); return err }),
		timed(kvGo+", from any replica", func() error { _, err := kv.Get(ctx, theirs()); return err }),
		leaderGet)
	if err != nil {
		return err
	}
	err = price("Put, own key", "a late delivery undoes nothing newer, and one that got lost is resolved",
		timed(us, func() error { return s.Put("price.ours", value, 0) }),
		timed(kvGo+" Put, unconditional", func() error { _, err := kv.Put(ctx, "price.theirs", value); return err }))
	if err != nil {
		return err
	}
	return price("Keys, 50", "complete, whichever replica answers",
		timed(us, func() error {
			found, err := s.Keys("key.*")
			return enough(len(found), 50, err)
		}),
		timed(kvGo+" ListKeysFiltered"+onOurs, func() error {
			// It can miss a key, which is the price of its being cheaper.
			lister, err := kv.ListKeysFiltered(ctx, "key.>")
			if err != nil {
				return err
			}
			for range lister.Keys() {
			}
			return nil
		}))
}

// request sends a request to JetStream's API.
func request(nc *nats.Conn, subject, body string) ([]byte, error) {
	msg, err := nc.Request("$JS.API."+subject, []byte(body), 5*time.Second)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &answer); err != nil {
		return nil, err
	}
	if answer.Error != nil {
		return nil, errors.New(answer.Error.Description)
	}
	return msg.Data, nil
}

// awaitCluster waits until the cluster has a leader and takes buckets.
func (r *run) awaitCluster() error {
	nc, err := r.connect()
	if err != nil {
		return err
	}
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	for range 200 {
		if _, err = js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "ready", Replicas: 3}); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the cluster does not get ready: %w", err)
}

// leadByFirst has the first of three servers, to which the clients are
// connected, lead a bucket, so that nobody's leader is farther away. It does
// nothing on one server.
func (r *run) leadByFirst(bucket string) error {
	if r.replicas == 0 {
		return nil
	}
	nc, err := r.connect()
	if err != nil {
		return err
	}
	stream := "KV_" + bucket
	for range 100 {
		info, err := request(nc, "STREAM.INFO."+stream, "")
		if err == nil && strings.Contains(string(info), `"leader":"n0"`) {
			return nil
		}
		if err == nil {
			_, _ = request(nc, "STREAM.LEADER.STEPDOWN."+stream, `{"placement":{"preferred":"n0"}}`)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the first server does not come to lead %s", bucket)
}
