//! What one generator thread writes down while it runs: latencies, refusals, failures, and the log of what was sent.
//!
//! Latencies are of operations whose intended start lies in the measured window. Tests: at the foot.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use super::{
    super::check_history::log::{Door, What},
    report::{Figure, to_f64},
};

/// Longest latency told apart; longer ones count as this.
const MAX_LATENCY: Duration = Duration::from_secs(120);

/// One stimulus in the generator's own log, small because there are millions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Number of the instance.
    pub instance: u32,
    /// Number of the sender.
    pub sender: u32,
    /// Number within the sender.
    pub seq: u32,
    /// The turn the acknowledgement named; 0 when it named none.
    pub turn: u32,
    /// When it left.
    pub sent: Instant,
    /// When it was answered, and what the answer means.
    pub answer: Option<(Instant, What)>,
    /// The door it went through.
    pub door: Door,
}

/// The stimulus id of an entry. `nonce` tells the runs against one server apart.
pub fn stimulus_id(nonce: &str, sender: u32, seq: u32) -> String {
    format!("{nonce}-{sender:05}-{seq:09}")
}

impl Entry {
    /// An entry about to be sent.
    pub const fn new(instance: u32, sender: u32, seq: u32, sent: Instant, door: Door) -> Self {
        Self { instance, sender, seq, turn: 0, sent, answer: None, door }
    }

    /// Whether the server said that it is durable.
    pub const fn is_accepted(&self) -> bool {
        matches!(self.answer, Some((_, What::Accepted | What::Decided)))
    }
}

/// Counters that the coordinator reads while threads write.
#[derive(Debug, Default)]
pub struct Progress {
    /// Operations done well.
    pub done: AtomicU64,
    /// Refused or failed ones.
    pub bad: AtomicU64,
    /// Set to end early.
    pub stop: Arc<AtomicBool>,
}

impl Progress {
    /// Operations done well so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether the run shall end now.
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Which instants count.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// From here.
    pub from: Instant,
    /// Up to, not including; `None` = until the work is done.
    pub to: Option<Instant>,
}

impl Window {
    /// Whether an intended start counts.
    pub fn holds(&self, at: Instant) -> bool {
        at >= self.from && self.to.is_none_or(|to| at < to)
    }
}

/// A histogram of durations, in microseconds.
#[derive(Debug, Clone)]
pub struct Times(Histogram<u64>);

impl Default for Times {
    fn default() -> Self {
        let max = u64::try_from(MAX_LATENCY.as_micros()).unwrap_or(u64::MAX);
        // Three digits over these bounds are always valid; a plain histogram of three digits is the same, resized.
        Self(Histogram::new_with_bounds(1, max, 3).unwrap_or_else(|_| empty()))
    }
}

fn empty() -> Histogram<u64> {
    match Histogram::new(3) {
        Ok(histogram) => histogram,
        Err(_) => unreachable!("three significant digits are in range"),
    }
}

impl Times {
    /// Takes one.
    pub fn add(&mut self, time: Duration) {
        self.0.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// Takes all of another.
    pub fn merge(&mut self, other: &Times) {
        // Bounds are the same, so nothing can be out of range.
        let _ = self.0.add(&other.0);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A quantile in milliseconds.
    pub fn ms(&self, quantile: f64) -> f64 {
        to_f64(self.0.value_at_quantile(quantile)) / 1000.0
    }

    /// Percentiles as figures.
    pub fn figures(&self, what: &str) -> Vec<Figure> {
        if self.is_empty() {
            return Vec::new();
        }
        let names = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
        names.iter().map(|(name, q)| Figure::new(format!("{what} {name}"), "ms", self.ms(*q))).collect()
    }
}

/// What a thread recorded; merged over threads afterwards.
#[derive(Debug, Default)]
pub struct Record {
    /// From intended start to answer.
    pub latency: Times,
    /// From intended start to the reply on a topic.
    pub reply: Times,
    /// From intended start to the first byte sent: how late the generator itself was.
    pub lag: Times,
    /// Answers that are refusals, by HTTP status or MQTT reason.
    pub refused: BTreeMap<u16, u64>,
    /// Broken connections and deadlines missed.
    pub failed: u64,
    /// Due in the window and never answered, or never sent because every connection was busy.
    pub unanswered: u64,
    /// Replies due that never came.
    pub replies_missing: u64,
    /// The first failure in words.
    pub first_failure: Option<String>,
    /// The log, when it is kept.
    pub log: Vec<Entry>,
}

impl Record {
    /// Takes all of another.
    pub fn merge(&mut self, other: Record) {
        self.latency.merge(&other.latency);
        self.reply.merge(&other.reply);
        self.lag.merge(&other.lag);
        for (code, count) in other.refused {
            *self.refused.entry(code).or_default() += count;
        }
        self.failed += other.failed;
        self.unanswered += other.unanswered;
        self.replies_missing += other.replies_missing;
        self.first_failure = self.first_failure.take().or(other.first_failure);
        self.log.extend(other.log);
    }

    /// Counts a failure and keeps the words of the first.
    pub fn fail(&mut self, what: impl std::fmt::Display) {
        self.failed += 1;
        if self.first_failure.is_none() {
            self.first_failure = Some(what.to_string());
        }
    }

    /// Counts of what went wrong, in one figure each; none when nothing did.
    pub fn trouble(&self) -> Vec<Figure> {
        let mut out = Vec::new();
        for (code, count) in &self.refused {
            out.push(Figure::new(format!("refused with {code}"), "op", to_f64(*count)));
        }
        let counts =
            [("failed", self.failed), ("unanswered", self.unanswered), ("replies missing", self.replies_missing)];
        out.extend(counts.iter().filter(|(_, n)| *n > 0).map(|(name, n)| Figure::new(*name, "op", to_f64(*n))));
        out
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn times_merge_and_tell_percentiles() {
        let (mut a, mut b) = (Times::default(), Times::default());
        for ms in 1..=50 {
            a.add(Duration::from_millis(ms));
            b.add(Duration::from_millis(ms + 50));
        }
        a.merge(&b);
        assert_eq!(a.0.len(), 100);
        assert!((a.ms(0.5) - 50.0).abs() < 0.1 && (a.ms(1.0) - 100.0).abs() < 0.1, "{} {}", a.ms(0.5), a.ms(1.0));
        a.add(Duration::from_secs(1000));
        assert!((a.ms(1.0) - 120_000.0).abs() < 200.0, "{}", a.ms(1.0));
        assert!(Times::default().figures("x").is_empty());
    }

    #[test]
    fn records_merge() {
        let mut a = Record { failed: 1, ..Record::default() };
        let mut b = Record::default();
        b.fail("reset");
        b.refused.insert(429, 2);
        a.merge(b);
        assert_eq!((a.failed, a.refused[&429], a.first_failure.as_deref()), (2, 2, Some("reset")));
        assert_eq!(a.trouble().len(), 2);
    }

    #[test]
    fn a_window_is_half_open() {
        let from = Instant::now();
        let window = Window { from, to: Some(from + Duration::from_secs(1)) };
        assert!(window.holds(from) && !window.holds(from + Duration::from_secs(1)));
        assert!(Window { from, to: None }.holds(from + Duration::from_secs(9)));
    }
}
