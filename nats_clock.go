package state

import (
	"sync"
	"time"
)

// A serverClock estimates the clock of the stream's leader from below: it may
// be late, by the time that an answer took to arrive, and it is never early.
// Between samples it follows the local monotonic clock, so that neither the
// offset of the local wall clock nor its steps matter.
type serverClock struct {
	mu    sync.Mutex // guards what follows
	base  timestamp  // the server's clock, when
	at    time.Time  // its answer arrived
	trip  time.Duration
	epoch *epoch // of the connection that the sample came on
}

const (
	// sampleLife is when a sample is too old to decide that something has
	// expired, and freshSample up to what age no newer one is needed where it is
	// a close call: a server's clock may be set back, too.
	sampleLife     = 10 * time.Second
	freshSample    = 100 * time.Millisecond
	decisionMargin = timestamp(time.Second)
	// maxDrift is by how much clocks may run at different speeds: 1 in so many.
	maxDrift = 5000
	// A write has a sample renewed, in the background, that is older than renewSample. A
	// writer whose sample is older than oldSample leaves it to the server to say when a
	// key came into being.
	renewSample = time.Minute
	oldSample   = 5 * time.Minute
)

// set takes a sample: base was the server's time after asked.
func (c *serverClock) set(base timestamp, asked time.Time, e *epoch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	trip := now.Sub(asked)
	if c.epoch == e && now.Sub(c.at) < sampleLife {
		// Each sample bounds the clock from below and from above: the closer
		// bounds are the better ones, if they agree.
		lower, upper := c.estimate(now), c.estimate(now)+c.uncertainty(now)
		lower, upper = max(lower, base), min(upper, base+timestamp(trip))
		if lower <= upper {
			base, trip = lower, time.Duration(upper-lower)
		}
	}
	c.base, c.at, c.trip, c.epoch = base, now, trip, e
}

// copy takes over what another estimate of the same clock knows.
func (c *serverClock) copy(of *serverClock) {
	of.mu.Lock()
	defer of.mu.Unlock()
	c.base, c.at, c.trip, c.epoch = of.base, of.at, of.trip, of.epoch
}

// observe notes the time at which the server wrote something that has arrived
// here: its clock is past that. A time that the clock cannot have reached is
// another server's, and says nothing.
func (c *serverClock) observe(written timestamp) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	ahead := written - c.estimate(now)
	if ahead > 0 && ahead <= c.uncertainty(now) {
		c.base += ahead
		c.trip -= min(c.trip, time.Duration(ahead))
	}
}

func (c *serverClock) estimate(now time.Time) timestamp {
	passed := now.Sub(c.at)
	return c.base + timestamp(passed-passed/maxDrift)
}

// uncertainty returns by how much the server's clock may be past the estimate.
func (c *serverClock) uncertainty(now time.Time) timestamp {
	return timestamp(c.trip + 2*now.Sub(c.at)/maxDrift)
}

// now returns the lower bound of the server's clock.
func (c *serverClock) now() timestamp {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.estimate(time.Now())
}

// A clockReading is what is known of the server's clock at one time.
type clockReading struct {
	now         timestamp     // the lower bound
	uncertainty timestamp     // by how much the clock may be past it
	age         time.Duration // of the sample, which is that of an old one after a reconnect
}

func (c *serverClock) read(e *epoch) clockReading {
	c.mu.Lock()
	defer c.mu.Unlock()
	local := time.Now()
	age := local.Sub(c.at)
	if c.epoch != e {
		age = max(age, sampleLife)
	}
	return clockReading{c.estimate(local), c.uncertainty(local), age}
}

// decides reports whether the lower bound says whether a deadline has passed: it may
// be too low for that, close to the deadline, or wrong.
func (c clockReading) decides(deadline timestamp) bool {
	maybe, surely := deadline.passed(c.now+c.uncertainty), deadline.passed(c.now-decisionMargin)
	open := !surely && (c.age > freshSample || !deadline.passed(c.now))
	return !maybe || c.age < sampleLife && !open
}
