//! How long each data type is held, where, and whether it may be served a little late. Pure.
//!
//! Not here: the settings' ranges (`config`). Invariant: tasks have no type here, so nothing of them is ever held.
//! Tests: at the foot.

use std::time::Duration;

use super::slot::Kind;
use crate::{config, types::Millis};

/// What holds for a data type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long a value is fresh; zero: the type is not held at all.
    pub ttl: Duration,
    /// How long after that it may still be served while a fresh one is fetched.
    pub stale: Duration,
    /// How long it is remembered that there is nothing.
    pub negative: Duration,
    /// Whether the second tier holds it.
    pub l2: bool,
    /// Whether the third tier holds it: only what is dear to make again.
    pub l3: bool,
}

/// The policies of all types.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policies {
    by_kind: [Policy; Kind::ALL.len()],
    jitter_percent: u64,
}

impl Policies {
    /// Those of the settings.
    pub fn of(config: &config::Cache) -> Self {
        let (ttl, stale) = (&config.ttl, &config.stale);
        let negative = Duration::from_secs(config.negative_seconds);
        let policy = |kind: Kind| {
            let (ttl, stale, l2, l3) = match kind {
                Kind::State => (ttl.state, 0, true, false),
                // These live in this process only.
                Kind::Profile => (ttl.profile, 0, false, false),
                Kind::Snapshot => (ttl.snapshot, 0, false, false),
                // A recall that is asked once must not pay for a server, and what was forgotten is in none.
                Kind::Recall => (ttl.recall, 0, false, false),
                Kind::Embedding => (ttl.embedding, 0, true, true),
                Kind::Answer => (ttl.answer, 0, true, true),
                Kind::Tool => (ttl.tool, stale.tool, true, true),
            };
            let (ttl, stale) = (Duration::from_secs(ttl), Duration::from_secs(stale));
            Policy { ttl, stale, negative: negative.min(ttl), l2, l3 }
        };
        Self { by_kind: Kind::ALL.map(policy), jitter_percent: config.jitter_percent }
    }

    /// That of a type.
    pub const fn of_kind(&self, kind: Kind) -> &Policy {
        &self.by_kind[kind as usize]
    }

    /// Until when a value made now is fresh, and until when it may be served: shorter than the policy says by a share that
    /// `dice` decides, so that what was made together does not end together.
    pub fn until(&self, kind: Kind, found: bool, now: Millis, dice: u64) -> (Millis, Millis) {
        let policy = self.of_kind(kind);
        let ttl = if found { policy.ttl } else { policy.negative };
        let ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX / 256);
        let span = ms.saturating_mul(self.jitter_percent) / 100;
        let ms = ms - if span == 0 { 0 } else { dice % span };
        let fresh = now.0.saturating_add(i64::try_from(ms).unwrap_or(i64::MAX));
        let stale = if found { i64::try_from(policy.stale.as_millis()).unwrap_or(i64::MAX) } else { 0 };
        (Millis(fresh), Millis(fresh.saturating_add(stale)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policies() -> Policies {
        Policies::of(&config::Cache::default())
    }

    #[test]
    fn defaults_are_as_documented() {
        let seconds = |kind| policies().of_kind(kind).ttl.as_secs();
        assert_eq!((seconds(Kind::State), seconds(Kind::Profile), seconds(Kind::Tool)), (30, 3600, 300));
        for kind in [Kind::Profile, Kind::Snapshot, Kind::Recall] {
            let policy = *policies().of_kind(kind);
            assert!(!policy.l2 && !policy.l3, "{} stays in memory", kind.name());
        }
        let below: Vec<_> = Kind::ALL.into_iter().filter(|kind| policies().of_kind(*kind).l3).collect();
        assert_eq!(below, [Kind::Embedding, Kind::Answer, Kind::Tool]);
    }

    #[test]
    fn what_was_made_together_does_not_end_together() {
        let policies = policies();
        let ends: Vec<i64> = (0..1000).map(|n| policies.until(Kind::Profile, true, Millis(0), n * 7919).0.0).collect();
        let (first, last) = (ends.iter().min().copied(), ends.iter().max().copied());
        assert!(first >= Some(3_240_000) && last <= Some(3_600_000) && last > first, "{first:?} {last:?}");
    }

    #[test]
    fn nothing_is_remembered_for_a_shorter_time_and_never_served_late() {
        let policies = policies();
        let (fresh, usable) = policies.until(Kind::Tool, true, Millis(0), 0);
        assert!(usable > fresh);
        let (fresh, usable) = policies.until(Kind::Tool, false, Millis(0), 0);
        assert_eq!(fresh, usable);
        assert!(fresh.0 <= 10_000, "{fresh:?}");
    }
}
