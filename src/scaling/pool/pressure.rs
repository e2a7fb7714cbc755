//! Whether a pool is too small for what is asked of it, from the waits of the last minute. Pure but for counters.
//!
//! Tests: at the foot.

use std::{
    sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::Limits;

/// Over how long waits are judged, and how often what is judged is told.
const WINDOW: Duration = Duration::from_secs(60);
/// Waits by the power of two of their microseconds: up to an hour.
const BUCKETS: usize = 32;

/// What happened since the last window began. Written by everybody, without a lock.
#[derive(Debug, Default)]
pub(super) struct Seen {
    waits: [AtomicU32; BUCKETS],
    most: AtomicUsize,
    refused: AtomicU64,
}

impl Seen {
    /// Somebody got a place after this time, and so many are out now.
    pub(super) fn waited(&self, waited: Duration, in_use: usize) {
        let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.waits[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
        self.most.fetch_max(in_use, Ordering::Relaxed);
    }

    /// Somebody got none.
    pub(super) fn refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> Figures {
        let waits: Vec<u64> = self.waits.iter().map(|bucket| bucket.load(Ordering::Relaxed).into()).collect();
        let total: u64 = waits.iter().sum();
        let mut below = 0;
        let bucket = waits.iter().position(|count| {
            below += count;
            total > 0 && below * 100 >= total * 99
        });
        // The upper end of the bucket.
        let p99 = bucket.map_or(Duration::ZERO, |bucket| match bucket {
            0 => Duration::ZERO,
            bucket => Duration::from_micros(1 << bucket),
        });
        Figures { p99, most: self.most.load(Ordering::Relaxed), refused: self.refused.load(Ordering::Relaxed) }
    }

    fn begin(&self) {
        self.waits.iter().for_each(|bucket| bucket.store(0, Ordering::Relaxed));
        self.most.store(0, Ordering::Relaxed);
        self.refused.store(0, Ordering::Relaxed);
    }
}

/// A window in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Figures {
    /// 99 of 100 waited no longer, within a factor of two.
    p99: Duration,
    /// Most places that were out at once.
    most: usize,
    /// Who got none.
    refused: u64,
}

impl Figures {
    /// Before it hurts: when the overflow is used, or a tenth of the patience, and when somebody was refused.
    fn is_too_much(&self, limits: &Limits) -> bool {
        self.refused > 0 || self.p99 * 10 >= limits.wait || (limits.overflow > 0 && self.most > limits.size)
    }
}

/// The judgement.
#[derive(Debug, Default)]
pub(super) struct Pressure {
    began: Option<Instant>,
    told: Option<Instant>,
    /// Of the last window that was whole.
    last: Figures,
    now: Figures,
    saturated: bool,
}

impl Pressure {
    /// Judges anew; whether it should be told.
    pub(super) fn look(&mut self, now: Instant, seen: &Seen, limits: &Limits) -> bool {
        let began = *self.began.get_or_insert(now);
        self.now = seen.read();
        self.saturated = self.now.is_too_much(limits) || self.last.is_too_much(limits);
        if now.saturating_duration_since(began) >= WINDOW {
            self.last = self.now;
            self.began = Some(now);
            seen.begin();
        }
        let due = self.told.is_none_or(|told| now.saturating_duration_since(told) >= WINDOW);
        let tells = self.saturated && due;
        if tells {
            self.told = Some(now);
        }
        tells
    }

    pub(super) fn is_saturated(&self) -> bool {
        self.saturated
    }

    /// The window that was worse, for people.
    pub(super) fn words(&self, limits: &Limits) -> String {
        let Figures { p99, most, refused } = self.now;
        let (p99, most, refused) = (p99.max(self.last.p99), most.max(self.last.most), refused.max(self.last.refused));
        format!(
            "99 of 100 waited up to {p99:?} (the longest wait is {:?}), at most {most} in use of {} and {} more, {refused} refused",
            limits.wait, limits.size, limits.overflow
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { size: 2, overflow: 2, wait: Duration::from_secs(1), recycle: Duration::MAX, waiting: 9 };

    #[test]
    fn it_shows_before_it_hurts_and_is_over_after_a_quiet_minute() {
        let (seen, mut pressure, start) = (Seen::default(), Pressure::default(), Instant::now());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert!(!pressure.look(at(0), &seen, &LIMITS) && !pressure.is_saturated());
        (0..99).for_each(|_| seen.waited(Duration::ZERO, 2));
        seen.waited(Duration::from_millis(500), 2);
        assert!(!pressure.look(at(1), &seen, &LIMITS), "one long wait of a hundred is none");
        seen.waited(Duration::from_millis(500), 2);
        assert!(pressure.look(at(2), &seen, &LIMITS) && pressure.is_saturated());
        assert!(!pressure.look(at(30), &seen, &LIMITS), "told once a minute");
        assert!(pressure.is_saturated());
        assert!(pressure.look(at(62), &seen, &LIMITS), "and again while it lasts");
        pressure.look(at(123), &seen, &LIMITS);
        assert!(!pressure.look(at(124), &seen, &LIMITS) && !pressure.is_saturated());
    }

    #[test]
    fn the_use_of_the_overflow_and_a_refusal_show() {
        for strain in [|seen: &Seen| seen.waited(Duration::ZERO, 3), Seen::refused] {
            let (seen, mut pressure) = (Seen::default(), Pressure::default());
            strain(&seen);
            assert!(pressure.look(Instant::now(), &seen, &LIMITS));
        }
        let (seen, mut pressure) = (Seen::default(), Pressure::default());
        seen.waited(Duration::ZERO, 2);
        let none = Limits { overflow: 0, ..LIMITS };
        assert!(!pressure.look(Instant::now(), &seen, &none), "a pool that is just used up is none too small");
    }
}
