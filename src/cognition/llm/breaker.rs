//! The circuit breaker of a provider: after failures in a row it is left alone for a while, then tried with one call.
//!
//! Pure: time comes in. Not here: which failures count (`mod.rs`).
//! Invariant: while half open, exactly one call is under way; if it is given up, the next one may try.
//! Tests: at the foot.

use std::time::{Duration, Instant};

/// Failures in a row that open it.
const FAILURES: u32 = 5;
/// First pause; doubled after each failed trial.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The life of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Calls go through; so many of the last ones failed in a row.
    Closed { failures: u32 },
    /// No calls until then.
    Open { until: Instant, pause: Duration },
    /// One call is trying it out.
    HalfOpen { pause: Duration },
}

/// Decides whether a call may be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Breaker(State);

/// A call that was let through, to be handed back with its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Admission {
    trial: bool,
}

impl Default for Breaker {
    fn default() -> Self {
        Self(State::Closed { failures: 0 })
    }
}

impl Breaker {
    /// Lets a call through, or says how long calls are held back.
    pub(super) fn admit(&mut self, now: Instant) -> Result<Admission, Duration> {
        match self.0 {
            State::Closed { .. } => Ok(Admission { trial: false }),
            State::Open { until, pause } if now >= until => {
                self.0 = State::HalfOpen { pause };
                Ok(Admission { trial: true })
            }
            State::Open { until, .. } => Err(until - now),
            State::HalfOpen { .. } => Err(Duration::from_secs(1)),
        }
    }

    /// The call was answered, even if with a refusal: the provider lives.
    pub(super) fn succeeded(&mut self, admission: Admission) {
        // A success from before the pause says nothing about the provider now.
        if admission.trial || matches!(self.0, State::Closed { .. }) {
            self.0 = State::Closed { failures: 0 };
        }
    }

    /// The call failed.
    pub(super) fn failed(&mut self, admission: Admission, now: Instant) {
        match self.0 {
            State::Closed { failures } if failures + 1 < FAILURES => self.0 = State::Closed { failures: failures + 1 },
            State::Closed { .. } => self.0 = State::Open { until: now + FIRST_PAUSE, pause: FIRST_PAUSE },
            State::HalfOpen { pause } if admission.trial => {
                let pause = (pause * 2).min(LONGEST_PAUSE);
                self.0 = State::Open { until: now + pause, pause };
            }
            State::HalfOpen { .. } | State::Open { .. } => {}
        }
    }

    /// The call was given up by its caller before it had an end.
    pub(super) fn abandoned(&mut self, admission: Admission, now: Instant) {
        if let State::HalfOpen { pause } = self.0
            && admission.trial
        {
            self.0 = State::Open { until: now, pause };
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn open(now: Instant) -> Breaker {
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES {
            let admission = breaker.admit(now).unwrap();
            breaker.failed(admission, now);
        }
        breaker
    }

    #[test]
    fn failures_in_a_row_open_it_and_a_success_between_does_not_let_them_add_up() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        for round in 0..20 {
            let admission = breaker.admit(now).unwrap();
            if round % (FAILURES - 1) == 0 { breaker.succeeded(admission) } else { breaker.failed(admission, now) }
        }
        assert!(breaker.admit(now).is_ok());
        assert_eq!(open(now).admit(now), Err(FIRST_PAUSE));
    }

    #[test]
    fn after_the_pause_one_call_tries_and_decides() {
        let now = Instant::now();
        let mut breaker = open(now);
        let later = now + FIRST_PAUSE;
        assert!(breaker.admit(later - Duration::from_millis(1)).is_err());
        let trial = breaker.admit(later).unwrap();
        assert!(breaker.admit(later).is_err(), "only one tries");
        breaker.failed(trial, later);
        assert_eq!(breaker.admit(later), Err(FIRST_PAUSE * 2), "and the pause doubles");
        let again = later + FIRST_PAUSE * 2;
        let trial = breaker.admit(again).unwrap();
        breaker.succeeded(trial);
        assert!(breaker.admit(again).is_ok() && breaker.admit(again).is_ok());
    }

    #[test]
    fn the_pause_has_a_limit() {
        let mut now = Instant::now();
        let mut breaker = open(now);
        for _ in 0..20 {
            now += LONGEST_PAUSE;
            let trial = breaker.admit(now).unwrap();
            breaker.failed(trial, now);
        }
        assert_eq!(breaker.admit(now), Err(LONGEST_PAUSE));
    }

    #[test]
    fn an_abandoned_trial_leaves_the_place_to_the_next() {
        let now = Instant::now();
        let mut breaker = open(now);
        let trial = breaker.admit(now + FIRST_PAUSE).unwrap();
        breaker.abandoned(trial, now + FIRST_PAUSE);
        assert!(breaker.admit(now + FIRST_PAUSE).is_ok());
    }

    #[test]
    fn news_of_calls_from_before_the_pause_changes_nothing() {
        let now = Instant::now();
        let mut breaker = Breaker::default();
        let old = breaker.admit(now).unwrap();
        for _ in 0..FAILURES {
            let admission = breaker.admit(now).unwrap();
            breaker.failed(admission, now);
        }
        let opened = breaker;
        breaker.succeeded(old);
        breaker.failed(old, now);
        breaker.abandoned(old, now);
        assert_eq!(breaker, opened);
    }
}
