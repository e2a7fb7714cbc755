//! When a node is full, and how many nodes there should be. Pure: loads and moments in, judgements out.
//!
//! A node is full when its processors or its memory are above their thresholds for a while, and has room again when both are
//! clearly below for a longer while. The number of nodes is what would bring the load to the threshold,
//! `ceil(nodes * load / threshold)`, held still by windows and limited in its steps, for an operator or an autoscaler to act on.
//!
//! Not here: where loads come from and who is told (`cluster::balancer`), what becomes of a weight (`load_balancer`).
//! Invariants: load that wavers changes nothing; the number wanted is never below one, nor further from what is there than a
//! step. Sources: the stabilisation windows and the tolerance of the Kubernetes HorizontalPodAutoscaler. Tests: at the foot.

use std::{collections::VecDeque, time::Duration};

/// When a node is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// Share of the processors, in thousandths.
    pub cpu_permille: u32,
    /// Share of the memory, in thousandths.
    pub memory_permille: u32,
    /// How long load must be above before the node is full, and more nodes are wanted.
    pub full_after: Duration,
    /// How long it must be below before the node has room, and fewer nodes are wanted.
    pub spare_after: Duration,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Share of this node's processors in use, in thousandths.
    pub cpu_permille: u32,
    /// Share of its memory in use, in thousandths.
    pub memory_permille: u32,
    /// Share of the processors in use on the other nodes, on average; nothing without others.
    pub others_permille: Option<u32>,
    /// Nodes there are, this one included.
    pub nodes: u32,
}

/// What is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Short {
    /// Processors.
    Cpu,
    /// Memory.
    Memory,
}

impl Short {
    /// The setting that says so.
    pub const fn setting(self) -> &'static str {
        match self {
            Self::Cpu => "scaling.auto_scaling_threshold_cpu",
            Self::Memory => "scaling.auto_scaling_threshold_memory",
        }
    }
}

/// The judgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Judgement {
    /// Whether the node is full, and of what.
    pub full: Option<Short>,
    /// Nodes there should be.
    pub desired: u32,
}

/// Moments of a clock that never jumps back.
type Moment = Duration;

/// How far below its threshold load must be for a full node to have room, in thousandths of the threshold.
const CLEARLY: u32 = 900;
/// By how much load may miss the threshold without another number of nodes being wanted, in thousandths.
const TOLERANCE: u32 = 100;
/// Load is smoothed over this part of the time it must last.
const SMOOTH: u32 = 3;
/// Proposals kept for the windows: one each second is enough.
const EVERY: Duration = Duration::from_secs(1);

/// What it has to remember.
#[derive(Debug, Clone, Default)]
pub struct AutoScaling {
    at: Option<Moment>,
    cpu: f64,
    others: Option<f64>,
    full: Option<Short>,
    /// Since when the load says otherwise than `full`.
    other_since: Option<Moment>,
    proposals: VecDeque<(Moment, u32)>,
}

impl AutoScaling {
    /// Judges anew. `now` is of a clock that never jumps back.
    pub fn judge(&mut self, now: Moment, usage: Usage, thresholds: &Thresholds) -> Judgement {
        self.smooth(now, usage, thresholds);
        self.judge_full(now, usage, thresholds);
        let desired = self.judge_desired(now, usage, thresholds);
        Judgement { full: self.full, desired }
    }

    /// Processors waver by the second; memory does not.
    fn smooth(&mut self, now: Moment, usage: Usage, thresholds: &Thresholds) {
        let span = (thresholds.full_after / SMOOTH).as_secs_f64();
        let passed = self.at.map_or(0.0, |at| now.saturating_sub(at).as_secs_f64());
        let part = if self.at.is_none() || span == 0.0 { 1.0 } else { 1.0 - (-passed / span).exp() };
        self.cpu += (f64::from(usage.cpu_permille) - self.cpu) * part;
        self.others = usage.others_permille.map(|others| {
            let before = self.others.unwrap_or(f64::from(others));
            before + (f64::from(others) - before) * part
        });
        self.at = Some(now);
    }

    fn judge_full(&mut self, now: Moment, usage: Usage, thresholds: &Thresholds) {
        let memory = f64::from(usage.memory_permille);
        let (most_cpu, most_memory) = (f64::from(thresholds.cpu_permille), f64::from(thresholds.memory_permille));
        let above = match (self.cpu > most_cpu, memory > most_memory) {
            (_, true) => Some(Short::Memory),
            (true, false) => Some(Short::Cpu),
            (false, false) => None,
        };
        let part = f64::from(CLEARLY) / 1000.0;
        let below = self.cpu <= most_cpu * part && memory <= most_memory * part;
        let (otherwise, patience) = match self.full {
            None => (above.is_some(), thresholds.full_after),
            Some(_) => (below, thresholds.spare_after),
        };
        if !otherwise {
            self.other_since = None;
            // Of what it is full may change.
            self.full = self.full.map(|full| above.unwrap_or(full));
            return;
        }
        let since = *self.other_since.get_or_insert(now);
        if now.saturating_sub(since) >= patience {
            self.full = if self.full.is_some() { None } else { above };
            self.other_since = None;
        }
    }

    fn judge_desired(&mut self, now: Moment, usage: Usage, thresholds: &Thresholds) -> u32 {
        let nodes = usage.nodes.max(1);
        let proposal = self.propose(nodes, usage, thresholds);
        if self.proposals.back().is_none_or(|(at, last)| now.saturating_sub(*at) >= EVERY || *last != proposal) {
            self.proposals.push_back((now, proposal));
        }
        let longest = thresholds.full_after.max(thresholds.spare_after);
        // The one before the window says what held when it began.
        while self.proposals.len() > 1 && now.saturating_sub(self.proposals[1].0) >= longest {
            self.proposals.pop_front();
        }
        // More nodes when all of the last while asked for more, fewer when all of a longer while asked for fewer.
        let least = self.within(now, thresholds.full_after, nodes).min().unwrap_or(proposal);
        let most = self.within(now, thresholds.spare_after, nodes).max().unwrap_or(proposal);
        let wanted = nodes.clamp(least.min(most), most.max(least));
        wanted.clamp(nodes - (nodes / 4).max(1).min(nodes - 1), nodes + nodes.max(4))
    }

    /// Proposals that held within the last while. Until that is whole, the nodes there are count as proposed, too.
    fn within(&self, now: Moment, window: Duration, nodes: u32) -> impl Iterator<Item = u32> {
        let from = self.proposals.iter().rposition(|(at, _)| now.saturating_sub(*at) >= window);
        let young = from.is_none().then_some(nodes);
        self.proposals.iter().skip(from.unwrap_or(0)).map(|(_, proposal)| *proposal).chain(young)
    }

    fn propose(&self, nodes: u32, usage: Usage, thresholds: &Thresholds) -> u32 {
        let others = f64::from(nodes - 1);
        let mean = self.others.map_or(self.cpu, |load| (self.cpu + load * others) / f64::from(nodes));
        let cpu = mean / f64::from(thresholds.cpu_permille.max(1));
        let memory = f64::from(usage.memory_permille) / f64::from(thresholds.memory_permille.max(1));
        let ratio = cpu.max(memory);
        if (ratio - 1.0).abs() <= f64::from(TOLERANCE) / 1000.0 {
            return nodes;
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small number of nodes
        let wanted = (f64::from(nodes) * ratio).ceil() as u32;
        wanted.max(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const THRESHOLDS: Thresholds = Thresholds {
        cpu_permille: 700,
        memory_permille: 800,
        full_after: Duration::from_secs(30),
        spare_after: Duration::from_secs(300),
    };

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    fn usage(cpu_permille: u32, memory_permille: u32, nodes: u32) -> Usage {
        let others_permille = (nodes > 1).then_some(cpu_permille);
        Usage { cpu_permille, memory_permille, others_permille, nodes }
    }

    /// The last judgement of a load that lasts from one second to another.
    fn last(scaling: &mut AutoScaling, seconds: std::ops::Range<u64>, usage: Usage) -> Judgement {
        let judged = seconds.map(|second| scaling.judge(at(second), usage, &THRESHOLDS)).last();
        judged.unwrap_or(Judgement { full: None, desired: 0 })
    }

    #[test]
    fn a_node_is_full_after_a_while_and_has_room_after_a_longer_one() {
        let mut scaling = AutoScaling::default();
        assert_eq!(last(&mut scaling, 0..100, usage(500, 500, 1)).full, None);
        assert_eq!(last(&mut scaling, 100..120, usage(1000, 500, 1)).full, None, "a burst");
        assert_eq!(last(&mut scaling, 120..150, usage(1000, 500, 1)).full, Some(Short::Cpu));
        assert_eq!(last(&mut scaling, 150..700, usage(660, 500, 1)).full, Some(Short::Cpu), "not clearly below");
        assert_eq!(last(&mut scaling, 700..950, usage(100, 500, 1)).full, Some(Short::Cpu));
        assert_eq!(last(&mut scaling, 950..1100, usage(100, 500, 1)).full, None);
        assert_eq!(last(&mut scaling, 1100..1140, usage(100, 801, 1)).full, Some(Short::Memory));
    }

    #[test]
    fn the_number_of_nodes_follows_what_lasts_in_steps() {
        let mut scaling = AutoScaling::default();
        assert_eq!(last(&mut scaling, 0..400, usage(700, 100, 4)).desired, 4);
        assert_eq!(last(&mut scaling, 400..420, usage(1000, 100, 4)).desired, 4, "a burst");
        assert_eq!(last(&mut scaling, 420..480, usage(1000, 100, 4)).desired, 6, "ceil(4 * 1000 / 700)");
        assert_eq!(last(&mut scaling, 480..700, usage(660, 100, 6)).desired, 6, "about right");
        assert_eq!(last(&mut scaling, 700..950, usage(100, 100, 6)).desired, 6, "a pause");
        assert_eq!(last(&mut scaling, 950..1100, usage(100, 100, 6)).desired, 5, "one step down");
        let mut alone = AutoScaling::default();
        assert_eq!(last(&mut alone, 0..1000, usage(0, 0, 1)).desired, 1);
    }

    proptest! {
        /// Whatever the load does, the number wanted is at least one and at most a step away, and thresholds that nobody
        /// reaches are never reached.
        #[test]
        fn judgements_stay_within_bounds(
            loads in prop::collection::vec((0_u32..1001, 0_u32..1001, 1_u32..20, 0_u64..40_000), 1..200)
        ) {
            let mut scaling = AutoScaling::default();
            let mut now = Duration::ZERO;
            let mut above = false;
            for (cpu, memory, nodes, passed) in loads {
                now += Duration::from_millis(passed);
                above |= cpu > 700 || memory > 800;
                let judged = scaling.judge(now, usage(cpu, memory, nodes), &THRESHOLDS);
                prop_assert!(judged.desired >= 1);
                prop_assert!(judged.desired <= nodes + nodes.max(4));
                prop_assert!(judged.desired + (nodes / 4).max(1) >= nodes);
                prop_assert!(judged.full.is_none() || above);
            }
        }

        /// A load that wavers around its threshold, each side shorter than it must last, changes nothing.
        #[test]
        fn load_that_wavers_fills_nobody(periods in prop::collection::vec((1_u64..20, 5_u64..20), 1..60)) {
            let mut scaling = AutoScaling::default();
            let mut second = 0;
            for (high, low) in periods {
                for (length, memory) in [(high, 1000), (low, 0)] {
                    for _ in 0..length {
                        let judged = scaling.judge(at(second), usage(0, memory, 3), &THRESHOLDS);
                        prop_assert_eq!(judged.full, None);
                        prop_assert!(judged.desired <= 3);
                        second += 1;
                    }
                }
            }
        }
    }

    proptest! {
        // Each plays more than three hours.
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What one node decides for a steady load, and then acted on, comes to rest: no flapping.
        #[test]
        fn acting_on_it_comes_to_rest(work in 100_u32..8000, start in 1_u32..12) {
            let (mut nodes, mut second, mut changes) = (start, 0, Vec::new());
            let mut scaling = AutoScaling::default();
            for _ in 0..12_000 {
                let load = (work / nodes).min(1000);
                let judged = scaling.judge(at(second), usage(load, 0, nodes), &THRESHOLDS);
                if judged.desired != nodes {
                    changes.push((second, nodes, judged.desired));
                    nodes = judged.desired;
                }
                second += 1;
            }
            let late = changes.iter().filter(|(second, ..)| *second > 8000).count();
            prop_assert_eq!(late, 0, "{:?}", changes);
            prop_assert!(work / nodes <= 770 || nodes == 1, "{} nodes for {}", nodes, work);
        }
    }
}
