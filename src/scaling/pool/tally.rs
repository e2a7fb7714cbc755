//! What is counted and judged of one pool, whoever gives its places out: so that all pools are seen in the same words.
//!
//! Not here: who gets a place. Invariants: one who waits is counted as long as it does; whoever gives up waiting has waited.
//! Tests: at the foot, and those of `Places`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    Limits, Refused, count,
    pressure::{Pressure, Seen},
};
use crate::telemetry::metric;

/// The tally of one pool.
#[derive(Debug)]
pub struct Tally {
    name: Arc<str>,
    state: Mutex<State>,
    in_use: AtomicUsize,
    waiting: AtomicUsize,
    seen: Seen,
    figures: Figures,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    pressure: Pressure,
}

/// Handles of what is counted.
#[derive(Debug)]
struct Figures {
    size: metrics::Gauge,
    in_use: metrics::Gauge,
    waiting: metrics::Gauge,
    seconds: metrics::Histogram,
    saturated: metrics::Gauge,
    full: metrics::Counter,
    late: metrics::Counter,
}

impl Figures {
    fn of(pool: &str) -> Self {
        let pool = String::from(pool);
        let refused = |reason| metrics::counter!(metric::POOL_REFUSED, "pool" => pool.clone(), "reason" => reason);
        Self {
            full: refused("full"),
            late: refused("late"),
            size: metrics::gauge!(metric::POOL_SIZE, "pool" => pool.clone()),
            in_use: metrics::gauge!(metric::POOL_IN_USE, "pool" => pool.clone()),
            waiting: metrics::gauge!(metric::POOL_WAITING, "pool" => pool.clone()),
            seconds: metrics::histogram!(metric::POOL_WAIT_SECONDS, "pool" => pool.clone()),
            saturated: metrics::gauge!(metric::POOL_SATURATED, "pool" => pool),
        }
    }
}

/// One who waits; counted as long as it exists.
#[derive(Debug)]
pub struct Waiter {
    tally: Arc<Tally>,
    began: Instant,
    over: bool,
}

impl Waiter {
    /// The wait is over, with a place or without; how long it was.
    pub fn end(mut self) -> Duration {
        self.over = true;
        self.began.elapsed()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let tally = &self.tally;
        tally.waiting.fetch_sub(1, Ordering::AcqRel);
        tally.figures.waiting.decrement(1.0);
        if !self.over {
            tally.waited(self.began.elapsed());
        }
    }
}

impl Tally {
    /// Of a pool of this name, from a closed set: it is a label.
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let figures = Figures::of(name);
        figures.size.set(count(limits.size));
        Arc::new(Self {
            name: Arc::from(name),
            state: Mutex::new(State { limits, pressure: Pressure::default() }),
            in_use: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            seen: Seen::default(),
            figures,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pool's limits.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// Waits are judged by these from here on.
    pub fn set_limits(&self, limits: Limits) {
        self.state().limits = limits;
        self.figures.size.set(count(limits.size));
    }

    /// Places that are out.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Acquire)
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// A place is out.
    pub fn taken(&self) {
        self.in_use.fetch_add(1, Ordering::AcqRel);
        self.figures.in_use.increment(1.0);
    }

    /// A place came back.
    pub fn back(&self) {
        self.in_use.fetch_sub(1, Ordering::AcqRel);
        self.figures.in_use.decrement(1.0);
    }

    /// One more waits.
    pub fn waits(self: &Arc<Self>) -> Waiter {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        self.figures.waiting.increment(1.0);
        Waiter { tally: self.clone(), began: Instant::now(), over: false }
    }

    /// Somebody waited so long.
    pub fn waited(&self, waited: Duration) {
        self.seen.waited(waited, self.in_use());
        self.figures.seconds.record(waited.as_secs_f64());
    }

    /// Somebody got no place.
    pub fn refused(&self, why: Refused) {
        match why {
            Refused::Full => self.figures.full.increment(1),
            Refused::Late => self.figures.late.increment(1),
            Refused::Closed => return,
        }
        self.seen.refused();
    }

    /// Judges the last minute; to be called about once a second. What should be logged, at most once a minute.
    pub fn look(&self, now: Instant) -> Option<String> {
        let mut state = self.state();
        let limits = state.limits;
        let told = state.pressure.look(now, &self.seen, &limits);
        let saturated = state.pressure.is_saturated();
        self.figures.saturated.set(f64::from(u8::from(saturated)));
        told.then(|| format!("{}; in use at present {}", state.pressure.words(&limits), self.in_use()))
    }

    /// Whether it was too small for what was asked of it in the last minute, in words.
    pub fn strain(&self) -> Option<String> {
        let state = self.state();
        state.pressure.is_saturated().then(|| format!("{}: {}", self.name, state.pressure.words(&state.limits)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_gives_up_has_waited_and_leaves_no_trace() {
        let limits = Limits { size: 1, overflow: 0, wait: Duration::from_secs(9), ..Limits::default() };
        let tally = Tally::new("test", limits);
        assert!(tally.waits().end() < Duration::from_secs(60) && tally.waiting() == 0);
        assert!(tally.look(Instant::now()).is_none());
        let mut waiter = tally.waits();
        waiter.began -= Duration::from_secs(1);
        drop(waiter);
        assert_eq!(tally.waiting(), 0);
        assert!(tally.look(Instant::now()).is_some(), "more than a tenth of the longest wait");
        assert!(tally.strain().is_some_and(|words| words.starts_with("test: ")));
    }
}
