//! The breaker of a tier: one failure and the tier is left alone for a while, so that a dead one costs one try and not one for
//! each request. Pure; time comes in. Tests: at the foot.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// First pause after a failure; doubled after each failed try.
const FIRST: Duration = Duration::from_millis(250);
/// Longest pause.
const LONGEST: Duration = Duration::from_secs(10);

/// Whether a tier may be tried.
#[derive(Debug, Default)]
pub struct Breaker(Mutex<State>);

#[derive(Debug, Default, Clone, Copy)]
struct State {
    /// Until when it is left alone, and for how long next.
    open: Option<(Instant, Duration)>,
}

impl Breaker {
    /// Whether to try. While it is open one caller is let through when the pause is over, and the next pause begins.
    pub fn allows(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match state.open {
            None => true,
            Some((until, _)) if now < until => false,
            Some((_, pause)) => {
                state.open = Some((now + pause, pause));
                true
            }
        }
    }

    /// A try succeeded.
    pub fn closed(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).open = None;
    }

    /// A try failed.
    pub fn failed(&self, now: Instant) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pause = state.open.map_or(FIRST, |(_, pause)| (pause * 2).min(LONGEST));
        state.open = Some((now + pause, pause));
    }

    /// Whether it is left alone at present.
    #[cfg(test)]
    fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).open.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_tier_costs_one_try_and_then_nothing_until_the_pause_is_over() {
        let (breaker, now) = (Breaker::default(), Instant::now());
        assert!(breaker.allows(now) && breaker.allows(now));
        breaker.failed(now);
        assert!(!breaker.allows(now + FIRST / 2) && breaker.is_open());
        assert!(breaker.allows(now + FIRST), "one may try");
        assert!(!breaker.allows(now + FIRST), "and only one");
        breaker.failed(now + FIRST);
        assert!(!breaker.allows(now + FIRST + FIRST), "the pause is doubled");
        assert!(breaker.allows(now + FIRST * 3));
        breaker.closed();
        assert!(breaker.allows(now) && !breaker.is_open());
    }
}
