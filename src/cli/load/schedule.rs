//! When each operation should begin: decided before the run from a seed, whatever the server does.
//!
//! Latency counts from these instants, so a stalled server cannot hide the operations it kept from starting
//! ("coordinated omission"). Pure. Tests: at the foot.

use std::time::Duration;

use serde::Serialize;

/// A small random generator, SplitMix64 (Steele, Lea, Flood 2014): a load plan needs repeatability, not secrecy.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed; `stream` tells generators of one seed apart.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        random
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // it never ends, so it is no iterator
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..bound`; 0 when the bound is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        u64::try_from((u128::from(self.next()) * u128::from(bound)) >> 64).unwrap_or(0)
    }

    /// Uniform in `[0, 1)`.
    #[allow(clippy::cast_precision_loss)] // 53 bits are exact
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How arrivals are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Arrivals {
    /// Independent of each other, as from many clients: exponential gaps.
    Poisson,
    /// Evenly spaced.
    Uniform,
}

/// The arrivals of one stream, as offsets from the start, without end.
#[derive(Debug, Clone)]
pub struct Schedule {
    at: f64,
    gap: f64,
    arrivals: Arrivals,
    random: Random,
}

impl Schedule {
    /// One of `streams` equal parts of a total of `rate` arrivals a second.
    pub fn new(arrivals: Arrivals, rate: f64, streams: usize, stream: usize, seed: u64) -> Self {
        let streams = u32::try_from(streams.max(1)).unwrap_or(u32::MAX);
        let stream = u32::try_from(stream).unwrap_or(u32::MAX);
        let gap = f64::from(streams) / rate.max(1e-9);
        let at = match arrivals {
            Arrivals::Poisson => 0.0,
            Arrivals::Uniform => gap * f64::from(stream) / f64::from(streams) - gap,
        };
        Self { at, gap, arrivals, random: Random::new(seed, u64::from(stream) + 1) }
    }
}

impl Iterator for Schedule {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.at += match self.arrivals {
            Arrivals::Poisson => -(1.0 - self.random.unit()).ln() * self.gap,
            Arrivals::Uniform => self.gap,
        };
        Some(Duration::from_secs_f64(self.at.clamp(0.0, 1e9)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn count_within(arrivals: Arrivals, seconds: f64) -> usize {
        let streams = (0..4).map(|s| Schedule::new(arrivals, 1000.0, 4, s, 7));
        streams.map(|s| s.take_while(|at| at.as_secs_f64() < seconds).count()).sum()
    }

    #[test]
    fn the_rate_is_met_by_all_streams_together() {
        assert_eq!(count_within(Arrivals::Uniform, 10.0), 10_000);
        let poisson = count_within(Arrivals::Poisson, 10.0);
        assert!((9_600..10_400).contains(&poisson), "{poisson}");
    }

    #[test]
    fn uniform_streams_interleave() {
        let mut all: Vec<_> = (0..4).flat_map(|s| Schedule::new(Arrivals::Uniform, 1000.0, 4, s, 7).take(3)).collect();
        all.sort();
        for pair in all.windows(2) {
            assert!((pair[1] - pair[0]).abs_diff(Duration::from_millis(1)) < Duration::from_nanos(10), "{all:?}");
        }
    }

    #[test]
    fn a_seed_repeats_and_another_differs() {
        let take = |seed| Schedule::new(Arrivals::Poisson, 10.0, 1, 0, seed).take(5).collect::<Vec<_>>();
        assert_eq!(take(1), take(1));
        assert_ne!(take(1), take(2));
    }

    #[test]
    fn poisson_gaps_are_exponential() {
        let times: Vec<_> = Schedule::new(Arrivals::Poisson, 1.0, 1, 0, 3).take(20_000).collect();
        let gaps = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64());
        let longer = gaps.filter(|gap| *gap > 1.0).count();
        let share = f64::from(u32::try_from(longer).unwrap()) / 20_000.0;
        assert!((share - (-1f64).exp()).abs() < 0.02, "{share}");
    }

    #[test]
    fn below_stays_below_and_reaches_all() {
        let mut random = Random::new(1, 1);
        let mut hit = [0u32; 10];
        for _ in 0..10_000 {
            hit[usize::try_from(random.below(10)).unwrap()] += 1;
        }
        assert!(hit.iter().all(|n| (800..1200).contains(n)), "{hit:?}");
        assert_eq!(random.below(0), 0);
    }
}
