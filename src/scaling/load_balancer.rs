//! Which of several nodes a piece of work should go to: the strategies, as plain functions over an immutable snapshot.
//!
//! Not here: who publishes the snapshot and when (`cluster::balancer`), which shard goes where (`cluster::placement`, which
//! uses [`score`]). Invariants: only members that are open are picked; a pick reads the snapshot and nothing else, so that
//! any thread may pick at any time without a lock.
//!
//! Sources: power of two choices (Mitzenmacher 1996); smooth weighted round robin (as in nginx); rendezvous hashing (Thaler
//! and Ravishankar 1998) with the logarithmic weights of Schindelhauer and Schomaker (2005).
//! Tests: at the foot.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// How a member is picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// One after the other.
    RoundRobin,
    /// The one with the least load for its weight.
    LeastLoaded,
    /// The less loaded of two drawn at random: nearly as even as the least loaded, and not everybody runs to the same one
    /// while reports are old.
    PowerOfTwo,
    /// One after the other, as often as its weight says.
    Weighted,
    /// Always the same one for the same key, in proportion to the weights.
    #[default]
    Rendezvous,
}

/// One who can be picked.
#[derive(Debug, Clone, PartialEq)]
pub struct Member<N> {
    /// Who.
    pub node: N,
    /// A hash of who, the same everywhere.
    pub hash: u64,
    /// How much it takes compared to others; 100 is usual, 0 takes nothing.
    pub weight: u32,
    /// How busy it is, in thousandths.
    pub busy_permille: u32,
    /// Whether it takes anything at present.
    pub open: bool,
}

/// Most picks of the weighted strategy before it repeats.
const WHEEL: usize = 1024;

/// Members and a strategy. Picks are counted, and nothing else changes.
#[derive(Debug)]
pub struct Balance<N> {
    strategy: Strategy,
    members: Vec<Member<N>>,
    /// The order of weighted picks, as indexes.
    wheel: Vec<u16>,
    picks: AtomicU64,
}

impl<N> Balance<N> {
    /// Over those that are open and have a weight; at most 65,535 of them.
    pub fn new(strategy: Strategy, members: impl IntoIterator<Item = Member<N>>) -> Self {
        let members: Vec<_> = members.into_iter().filter(|m| m.open && m.weight > 0).take(u16::MAX.into()).collect();
        let wheel = match strategy {
            Strategy::Weighted => wheel(&members.iter().map(|member| member.weight).collect::<Vec<_>>()),
            _ => Vec::new(),
        };
        Self { strategy, members, wheel, picks: AtomicU64::new(0) }
    }

    /// Those that can be picked.
    pub fn members(&self) -> &[Member<N>] {
        &self.members
    }

    /// The strategy.
    pub const fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Who takes the work with this key; `None` when nobody is open.
    pub fn pick(&self, key: u64) -> Option<&Member<N>> {
        let turn = self.picks.fetch_add(1, Ordering::Relaxed);
        let at = |number: u64| self.members.get(usize::try_from(number % self.members.len().max(1) as u64).ok()?);
        match self.strategy {
            Strategy::RoundRobin => at(turn),
            Strategy::LeastLoaded => self.members.iter().min_by_key(|member| pressure(member)),
            Strategy::PowerOfTwo => {
                let drawn = mix(turn ^ key);
                let (one, other) = (at(drawn & 0xffff_ffff)?, at(drawn >> 32)?);
                Some(if pressure(other) < pressure(one) { other } else { one })
            }
            Strategy::Weighted => {
                let place = usize::try_from(turn % self.wheel.len().max(1) as u64).ok()?;
                self.members.get(usize::from(*self.wheel.get(place)?))
            }
            Strategy::Rendezvous => self.members.iter().max_by(|a, b| {
                score(key, a.hash, a.weight).total_cmp(&score(key, b.hash, b.weight)).then(a.hash.cmp(&b.hash))
            }),
        }
    }
}

/// Load for the weight, comparable between members.
fn pressure<N>(member: &Member<N>) -> u64 {
    u64::from(member.busy_permille) * 1000 / u64::from(member.weight.max(1))
}

/// How much a member wants a key: the highest score has it. When members come or go, or a weight changes, only keys move that
/// the change gives or takes.
#[allow(clippy::cast_precision_loss)] // 53 of 64 random bits are plenty
pub fn score(key: u64, member: u64, weight: u32) -> f64 {
    let drawn = (mix(key ^ mix(member)) >> 11) as f64 / (1u64 << 53) as f64;
    -f64::from(weight) / drawn.max(f64::MIN_POSITIVE).ln()
}

/// The finishing mix of `MurmurHash3` (Appleby), over a shifted value so that 0 does not stay 0.
const fn mix(value: u64) -> u64 {
    let mut hash = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// Indexes in the order of smooth weighted round robin: each as often as its weight, spread evenly.
fn wheel(weights: &[u32]) -> Vec<u16> {
    let divisor = weights.iter().copied().fold(0, gcd).max(1);
    let total: u64 = weights.iter().map(|weight| u64::from(weight / divisor)).sum();
    let mut credit = vec![0i64; weights.len()];
    let len = usize::try_from(total).unwrap_or(WHEEL).min(WHEEL);
    let sum: i64 = weights.iter().map(|weight| i64::from(*weight)).sum();
    (0..len)
        .filter_map(|_| {
            credit.iter_mut().zip(weights).for_each(|(credit, weight)| *credit += i64::from(*weight));
            let (index, best) =
                credit.iter_mut().enumerate().max_by_key(|(index, credit)| (**credit, usize::MAX - index))?;
            *best -= sum;
            u16::try_from(index).ok()
        })
        .collect()
}

const fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The weight a member should have for the next placement, from its configured one and how busy it is: below half of its
/// power it counts whole, at full power half. In steps of an eighth, and kept while the load stays within a band around
/// the step it is on, so that load that wavers moves nothing.
pub fn weight_under_load(configured: u32, busy_permille: u32, before: Option<u32>) -> u32 {
    let step = |busy: u32| busy.saturating_sub(500).min(500) / 125;
    let of = |step: u32| (configured - configured * step / 8).max(u32::from(configured > 0));
    let near = [busy_permille.saturating_sub(BAND), busy_permille + BAND].map(|busy| of(step(busy)));
    match before {
        Some(before) if near.contains(&before) => before,
        _ => of(step(busy_permille)),
    }
}

/// How far, in thousandths, load may leave the step its weight stands for before the weight changes.
const BAND: u32 = 60;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{prop_assert, proptest};

    use super::*;

    fn member(node: u64, weight: u32, busy_permille: u32) -> Member<u64> {
        Member { node, hash: mix(node), weight, busy_permille, open: true }
    }

    fn counts(balance: &Balance<u64>, picks: u64) -> BTreeMap<u64, u64> {
        let mut counts = BTreeMap::new();
        for key in 0..picks {
            *counts.entry(balance.pick(mix(key)).unwrap().node).or_default() += 1;
        }
        counts
    }

    #[test]
    fn nobody_is_picked_among_the_closed_and_the_weightless() {
        for strategy in [
            Strategy::RoundRobin,
            Strategy::LeastLoaded,
            Strategy::PowerOfTwo,
            Strategy::Weighted,
            Strategy::Rendezvous,
        ] {
            let closed = Member { open: false, ..member(1, 100, 0) };
            let nobody = Balance::new(strategy, [closed.clone(), member(2, 0, 0)]);
            assert_eq!(nobody.pick(7).map(|m| m.node), None, "{strategy:?}");
            let one = Balance::new(strategy, [closed, member(3, 1, 1000)]);
            assert_eq!(one.pick(7).map(|m| m.node), Some(3), "{strategy:?}");
        }
    }

    #[test]
    fn turns_are_even_and_weighted_turns_as_the_weights() {
        let even = Balance::new(Strategy::RoundRobin, (0..3).map(|n| member(n, 100, 0)));
        assert_eq!(counts(&even, 300).into_values().collect::<Vec<_>>(), [100, 100, 100]);
        let weighted = Balance::new(Strategy::Weighted, [member(0, 500, 0), member(1, 100, 0), member(2, 100, 0)]);
        let order: Vec<_> = (0..7).map(|_| weighted.pick(0).unwrap().node).collect();
        assert_eq!(order, [0, 0, 1, 0, 2, 0, 0], "spread, not in a row of five");
    }

    #[test]
    fn load_is_taken_for_the_weight() {
        let balance =
            Balance::new(Strategy::LeastLoaded, [member(0, 100, 400), member(1, 400, 800), member(2, 100, 900)]);
        assert_eq!(balance.pick(0).unwrap().node, 1);
    }

    #[test]
    fn two_choices_avoid_the_busiest_and_do_not_all_run_to_the_idlest() {
        let balance =
            Balance::new(Strategy::PowerOfTwo, (0..4).map(|n| member(n, 100, 200 * u32::try_from(n).unwrap())));
        let counts = counts(&balance, 16_000);
        // The i-th of n is picked when both draws are at or above it and one is it.
        for (node, expected) in [(0, 7000), (1, 5000), (2, 3000), (3, 1000)] {
            let seen = counts[&node];
            assert!(seen.abs_diff(expected) < expected / 5, "node {node}: {seen} of about {expected}");
        }
    }

    #[test]
    fn rendezvous_shares_by_weight_and_moves_only_what_it_must() {
        let three = Balance::new(Strategy::Rendezvous, [member(0, 100, 0), member(1, 100, 0), member(2, 200, 0)]);
        let counts = counts(&three, 40_000);
        for (node, expected) in [(0, 10_000), (1, 10_000), (2, 20_000)] {
            assert!(counts[&node].abs_diff(expected) < expected / 20, "{counts:?}");
        }
        let two = Balance::new(Strategy::Rendezvous, [member(0, 100, 0), member(2, 200, 0)]);
        for key in (0..1000).map(mix) {
            let (before, after) = (three.pick(key).unwrap().node, two.pick(key).unwrap().node);
            assert!(before == 1 || before == after);
        }
    }

    #[test]
    fn a_weight_follows_the_load_in_steps_and_does_not_waver() {
        assert_eq!(weight_under_load(100, 0, None), 100);
        assert_eq!(weight_under_load(100, 1000, None), 50);
        let at = weight_under_load(100, 700, None);
        assert_eq!(at, 88);
        for busy in [640, 690, 740] {
            assert_eq!(weight_under_load(100, busy, Some(at)), at, "{busy}");
        }
        assert!(weight_under_load(100, 900, Some(at)) < at);
    }

    proptest! {
        #[test]
        fn weights_stay_between_half_and_whole(configured in 1u32..10_000, busy in 0u32..3000, before in proptest::option::of(0u32..10_000)) {
            let weight = weight_under_load(configured, busy, before);
            prop_assert!(weight <= configured && weight >= configured / 2);
        }

        #[test]
        fn a_heavier_member_never_loses_a_key(key: u64, member: u64, weight in 1u32..1000, more in 1u32..1000) {
            prop_assert!(score(key, member, weight + more) >= score(key, member, weight));
        }
    }
}
