//! Which of several nodes a piece of work should go to: the strategies, as plain functions over an immutable snapshot.
//!
//! Not here: who publishes the snapshot and when (`cluster::balancer`), what is known of loads (`load_report`), which shard
//! goes where (`cluster::placement`, which uses [`score`]). Invariants: only members that are open are picked; a pick reads
//! the snapshot and nothing else, so that any thread may pick at any time without a lock; load that wavers changes no
//! weight, and a weight says what its node said so far (see [`Weighing`]).
//!
//! Sources: power of two choices (Mitzenmacher 1996); smooth weighted round robin (as in nginx); rendezvous hashing (Thaler
//! and Ravishankar 1998) with the logarithmic weights of Schindelhauer and Schomaker (2005).
//! Tests: at the foot.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

pub use crate::types::Strategy;

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

    /// Goes on where another left off, so that taking turns survives a new snapshot.
    #[must_use]
    pub fn after(self, other: &Self) -> Self {
        self.picks.store(other.picks.load(Ordering::Relaxed), Ordering::Relaxed);
        self
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
                let score = |member: &Member<N>| score(mix(key ^ mix(member.hash)), member.weight);
                score(a).total_cmp(&score(b)).then(a.hash.cmp(&b.hash))
            }),
        }
    }
}

/// Load for the weight, comparable between members.
fn pressure<N>(member: &Member<N>) -> u64 {
    u64::from(member.busy_permille) * 1000 / u64::from(member.weight.max(1))
}

/// How much a member of some weight wants a key, from a hash of the two: the highest score has it, and one of twice the
/// weight has it twice as often. When members come or go, or a weight changes, only keys move that the change gives or
/// takes. Part of what nodes agree on: placement differs between builds that count differently.
#[allow(clippy::cast_precision_loss)] // 53 of 64 random bits are plenty
pub fn score(drawn: u64, weight: u32) -> f64 {
    let even = ((drawn >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    f64::from(weight) / -even.ln()
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

/// The weight a node should have for the placement of shards, from its configured one and how busy it was over a while.
///
/// Below seven tenths of its power it counts whole. Beyond that it gives up an eighth of its weight, and then perhaps
/// another, up to three, but only while it is clearly busier than the others: where all are busy, moving shards helps
/// nobody. A step is taken back when the node is well below what led to it. At most one step in the time over which load is
/// averaged, so that what moved shows before more moves. What is given up never brings a step back by itself: of a load
/// in proportion to the weight, seven eighths (six sevenths, five sixths) of the way up are above the way down.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighing {
    configured: u32,
    window: Duration,
    step: u32,
    /// Since when it is on this step, on the caller's clock.
    since: Option<Duration>,
}

/// Steps, in eighths of the weight, that a node gives up at most.
const STEPS: u32 = 3;
/// How far, in thousandths, load has to leave the border between two steps before the step changes, and a node's load that
/// of the others.
const BAND: u32 = 80;

impl Weighing {
    /// A node of this weight, whose load is averaged over `window`. With none, the weight stays as configured.
    pub const fn new(configured: u32, window: Duration) -> Self {
        Self { configured, window, step: 0, since: None }
    }

    /// The weight at present.
    pub const fn weight(&self) -> u32 {
        let weight = self.configured - self.configured * self.step / 8;
        if weight == 0 && self.configured > 0 { 1 } else { weight }
    }

    /// Judges anew: how busy the node was lately on average, and the others, if there are any, both in thousandths. `now`
    /// is of a clock that never jumps back. Returns the weight.
    pub fn judge(&mut self, now: Duration, busy_permille: u32, others_permille: Option<u32>) -> u32 {
        let since = *self.since.get_or_insert(now);
        if self.window.is_zero() || now.saturating_sub(since) < self.window {
            return self.weight();
        }
        let border = |step: u32| 500 + 125 * step;
        let busier = others_permille.is_some_and(|others| busy_permille >= others + BAND);
        let before = self.step;
        if self.step < STEPS && busier && busy_permille >= border(self.step + 1) + BAND {
            self.step += 1;
        } else if self.step > 0 && busy_permille < border(self.step) - BAND {
            self.step -= 1;
        }
        if self.step != before {
            self.since = Some(now);
        }
        self.weight()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, option, prop_assert, proptest};

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

    const WINDOW: Duration = Duration::from_secs(30);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_node_that_is_busier_than_the_others_gives_up_weight_step_by_step() {
        let mut weighing = Weighing::new(100, WINDOW);
        let weights: Vec<u32> = (0..8).map(|n| weighing.judge(at(n * 15), 1000, Some(400))).collect();
        assert_eq!(weights, [100, 100, 88, 88, 75, 75, 63, 63], "one step in a window");
        assert_eq!(weighing.judge(at(1000), 1000, Some(0)), 63, "and not more than three");
        assert_eq!(weighing.judge(at(2000), 800, Some(0)), 63, "it does not come back for a little less");
        let weights: Vec<u32> = (0..4).map(|n| weighing.judge(at(3000 + n * 30), 300, Some(900))).collect();
        assert_eq!(weights, [75, 88, 100, 100]);
    }

    #[test]
    fn where_all_are_busy_or_there_is_nobody_else_or_it_is_off_nothing_is_given_up() {
        for (window, others) in [(WINDOW, Some(950)), (WINDOW, None), (Duration::ZERO, Some(0))] {
            let mut weighing = Weighing::new(100, window);
            assert!((0..20).all(|n| weighing.judge(at(n * 60), 1000, others) == 100), "{window:?} {others:?}");
        }
        let mut one = Weighing::new(1, WINDOW);
        assert!((0..20).all(|n| one.judge(at(n * 60), 1000, Some(0)) == 1), "nobody falls to nothing");
    }

    proptest! {
        #[test]
        fn weights_stay_between_five_eighths_and_whole(configured in 1u32..10_000, loads in vec((0u32..1500, option::of(0u32..1500)), 1..200)) {
            let mut weighing = Weighing::new(configured, WINDOW);
            for (number, (busy, others)) in (0..).zip(loads) {
                let weight = weighing.judge(at(number * 31), busy, others);
                prop_assert!(weight <= configured && u64::from(weight) * 8 >= u64::from(configured) * 5);
            }
        }

        /// Whatever the load is and however it wavers around that: at most one change for each border it is really
        /// beyond, and none back.
        #[test]
        fn load_that_wavers_moves_nothing(base in 0u32..1000, others in 0u32..1000, noise in vec((0..=BAND, 0..=BAND), 300)) {
            let mut weighing = Weighing::new(800, WINDOW);
            let wavering = |base: u32, by: u32| (base + by).saturating_sub(BAND / 2);
            let mut before = 800;
            for (number, (own, other)) in (0..).zip(noise) {
                let weight = weighing.judge(at(number * 31), wavering(base, own), Some(wavering(others, other)));
                prop_assert!(weight <= before, "it came back from {before} to {weight}");
                prop_assert!(weight == before || (base + BAND / 2 >= 625 + BAND && base + BAND >= others + BAND));
                before = weight;
            }
        }

        /// Load that follows the weights, a burden of its own on each node: it comes to rest, and only those that were
        /// busier than the rest gave something up.
        #[test]
        fn what_sheds_comes_to_rest(burdens in vec(0.0f64..900.0, 2..8), work in 0.0f64..5000.0) {
            let mut nodes = vec![Weighing::new(100, WINDOW); burdens.len()];
            let mut changes = Vec::new();
            for round in 0..400u64 {
                let total: u32 = nodes.iter().map(Weighing::weight).sum();
                let busy: Vec<u32> = (nodes.iter().zip(&burdens))
                    .map(|(node, burden)| (burden + work * f64::from(node.weight()) / f64::from(total)).min(1000.0) as u32)
                    .collect();
                let sum: u32 = busy.iter().sum();
                for (node, busy) in nodes.iter_mut().zip(busy) {
                    let others = (sum - busy) / (burdens.len() as u32 - 1);
                    let before = node.weight();
                    if node.judge(at(round * 31), busy, Some(others)) != before {
                        changes.push(round);
                    }
                }
            }
            prop_assert!(changes.iter().all(|round| *round < 100), "still moving: {changes:?}");
        }

        #[test]
        fn a_heavier_member_never_loses_a_key(drawn: u64, weight in 1u32..1000, more in 1u32..1000) {
            prop_assert!(score(drawn, weight + more) >= score(drawn, weight));
        }
    }
}
