//! What is known of the loads of nodes: the newest report of each, how old it is, and how busy it was on average. Pure.
//!
//! Not here: where reports come from (`cluster::balancer`), what they decide (`load_balancer`).
//! Invariants: an older report never replaces a newer one; one that grew old is not believed; a pause counts no more than
//! a few reports. Tests: at the foot.

use std::{collections::HashMap, time::Duration};

use crate::types::{Load, NodeId};

/// How a report came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// This node's own gauge.
    Own,
    /// The bus.
    Bus,
    /// The node's row, which it writes when it renews its lease.
    Row,
}

impl Way {
    /// Its name in figures and answers.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Bus => "bus",
            Self::Row => "row",
        }
    }
}

/// What is believed of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// The newest load.
    pub load: Load,
    /// How busy it was on average lately, in thousandths.
    pub average_permille: u32,
    /// How old the newest is.
    pub age: Duration,
    /// How it came.
    pub way: Way,
}

/// Moments of a clock that never jumps back.
type Moment = Duration;

#[derive(Debug)]
struct Known {
    load: Load,
    taken_at: Moment,
    way: Way,
    average: f64,
}

/// The newest report of each node.
#[derive(Debug)]
pub struct Reports {
    /// Over how long loads are averaged.
    window: Duration,
    /// How old a report may be.
    patience: Duration,
    known: HashMap<NodeId, Known>,
}

/// No report counts for more than this part of the time that loads are averaged over, however long nothing was heard.
const MOST: f64 = 0.125;

impl Reports {
    /// None yet; averages are over `window`, and after `patience` a report is not believed.
    pub fn new(window: Duration, patience: Duration) -> Self {
        Self { window, patience, known: HashMap::new() }
    }

    /// A node said how busy it was at that moment. False when that was known, or something newer.
    pub fn hear(&mut self, node: &NodeId, load: Load, way: Way, taken_at: Moment) -> bool {
        let busy = f64::from(load.busy_permille);
        let Some(known) = self.known.get_mut(node) else {
            // A node that is new, or not heard of for long, is taken for idle until it is busy for a while.
            let average = if self.window.is_zero() { busy } else { 0.0 };
            self.known.insert(node.clone(), Known { load, taken_at, way, average });
            return true;
        };
        if taken_at <= known.taken_at {
            return false;
        }
        let part = if self.window.is_zero() {
            1.0
        } else {
            let passed = (taken_at - known.taken_at).as_secs_f64() / self.window.as_secs_f64();
            1.0 - (-passed.min(MOST)).exp()
        };
        known.average += (busy - known.average) * part;
        (known.load, known.taken_at, known.way) = (load, taken_at, way);
        true
    }

    /// What is believed of a node; nothing when it was not heard of for long.
    pub fn believed(&self, node: &NodeId, now: Moment) -> Option<Report> {
        let known = self.known.get(node)?;
        let age = now.saturating_sub(known.taken_at);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // between loads
        let average_permille = known.average.round() as u32;
        (age <= self.patience).then_some(Report { load: known.load, average_permille, age, way: known.way })
    }

    /// Forgets the nodes that are not among these.
    pub fn keep(&mut self, nodes: impl Fn(&NodeId) -> bool) {
        self.known.retain(|node, _| nodes(node));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(name: &str) -> NodeId {
        NodeId::new(format!("{name}.0")).unwrap()
    }

    fn busy(busy_permille: u32) -> Load {
        Load { busy_permille, ..Load::default() }
    }

    fn at(millis: u64) -> Moment {
        Duration::from_millis(millis)
    }

    fn reports() -> Reports {
        Reports::new(Duration::from_secs(30), Duration::from_secs(3))
    }

    #[test]
    fn the_newest_is_believed_whichever_way_it_came_until_it_is_old() {
        let (mut reports, node) = (reports(), id("a"));
        assert_eq!(reports.believed(&node, at(0)), None);
        assert!(reports.hear(&node, busy(100), Way::Row, at(1000)));
        assert!(reports.hear(&node, busy(200), Way::Bus, at(1500)));
        assert!(!reports.hear(&node, busy(100), Way::Row, at(1200)), "it was on its way for longer");
        let report = reports.believed(&node, at(2000)).unwrap();
        assert_eq!((report.load, report.age, report.way), (busy(200), at(500), Way::Bus));
        assert!(reports.hear(&node, busy(300), Way::Row, at(3000)), "the bus is silent");
        assert_eq!(reports.believed(&node, at(6000)).unwrap().way, Way::Row);
        assert_eq!(reports.believed(&node, at(6001)), None, "it is old");
        reports.keep(|known| *known != node);
        assert!(reports.hear(&node, busy(1), Way::Bus, at(1)), "it is forgotten");
    }

    #[test]
    fn the_average_follows_what_lasts() {
        let (mut reports, node) = (reports(), id("a"));
        let mut average = |millis: u64, load: u32| {
            reports.hear(&node, busy(load), Way::Bus, at(millis));
            reports.believed(&node, at(millis)).unwrap().average_permille
        };
        assert_eq!(average(1000, 1000), 0);
        assert!((32..=34).contains(&average(2000, 1000)));
        assert!(average(1_000_000, 1000) < 160, "one report after a long silence is one report");
        let lasting: Vec<u32> = (1..=120).map(|second| average(1_000_000 + second * 1000, 1000)).collect();
        assert!(lasting[29] > 600 && lasting[119] > 970, "{lasting:?}");
    }

    proptest! {
        #[test]
        fn the_average_stays_between_what_was_heard(loads in prop::collection::vec((0u32..1001, 1u64..5000), 1..100)) {
            let (mut reports, node) = (reports(), id("a"));
            let (mut now, mut most) = (0, 0);
            for (load, passed) in loads {
                now += passed;
                most = most.max(load);
                reports.hear(&node, busy(load), Way::Own, at(now));
                prop_assert!(reports.believed(&node, at(now)).unwrap().average_permille <= most);
            }
        }
    }
}
