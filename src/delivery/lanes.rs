//! Who is next: one lane for each instance and target, one effect of a lane under way at a time, many lanes at once. Pure.
//!
//! A lane whose target did not take an effect is blocked: that effect and all that come after it wait in the store, and come
//! back in their order. Later effects of the lane queue up behind them, other lanes go on.
//!
//! Invariants: effects of one lane are handed out in order of their place; no door has more under way than its limit.
//! Tests: at the foot.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    ops::Bound,
};

use super::plan::{Door, Item, Origin, Seq, Target};
use crate::types::{
    InstanceKey, Millis,
    limits::{DELIVERY_BEHIND, DELIVERY_UNDER_WAY, DELIVERY_WEBHOOKS},
};

/// How long an effect that is refused because it is not its turn waits before it asks again, in milliseconds.
const NOT_YET_MS: i64 = 1000;

/// An instance and a target.
pub(super) type LaneKey = (InstanceKey, Target);

/// The lane of an item.
pub(super) fn lane_of(item: &Item) -> LaneKey {
    (item.key.clone(), item.target.clone())
}

#[derive(Debug, Default)]
struct Lane {
    /// What is under way.
    running: Option<Seq>,
    /// What goes next. Either all fresh from the log, or all put off before.
    queue: VecDeque<Item>,
    /// Places that were put off and are not delivered, those under way again included.
    behind: BTreeSet<Seq>,
    /// When the last of them is due.
    due: Millis,
    /// Since when something is under way.
    since: Millis,
}

/// What becomes of an offered effect.
#[derive(Debug)]
pub(super) enum Offer {
    /// It will be handed out.
    Queued,
    /// It is to be put off.
    Behind {
        /// The effect.
        item: Box<Item>,
        /// Until when.
        due: Millis,
        /// The oldest one of the lane is to be given up, since too many wait.
        dropped: Option<Seq>,
    },
}

/// All lanes.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: HashMap<LaneKey, Lane>,
    ready: [VecDeque<LaneKey>; 3],
    under_way: [usize; 3],
}

const fn slot(door: Door) -> usize {
    match door {
        Door::Mqtt => 0,
        Door::Router => 1,
        Door::Web => 2,
    }
}

const LIMITS: [usize; 3] = [DELIVERY_UNDER_WAY, DELIVERY_UNDER_WAY, DELIVERY_WEBHOOKS];

impl Lane {
    fn is_idle(&self) -> bool {
        self.running.is_none() && self.queue.is_empty() && self.behind.is_empty()
    }

    /// Puts a place behind, not before `earliest`; says when it is due and what falls out at the other end.
    fn put_behind(&mut self, seq: Seq, earliest: Millis) -> (Millis, Option<Seq>) {
        self.behind.insert(seq);
        self.due = self.due.plus(1).max(earliest);
        let dropped = if self.behind.len() > DELIVERY_BEHIND { self.behind.pop_first() } else { None };
        (self.due, dropped)
    }

    /// Whether a row is the next in line.
    fn is_next(&self, seq: Seq) -> bool {
        let last = self.queue.back().map(|item| item.seq).or(self.running);
        let next = match last {
            None => self.behind.first(),
            Some(last) if self.behind.contains(&last) => {
                self.behind.range((Bound::Excluded(last), Bound::Unbounded)).next()
            }
            Some(_) => None,
        };
        next == Some(&seq)
    }
}

impl Lanes {
    /// A place that is known to be put off, from before the start.
    pub(super) fn resume(&mut self, lane: LaneKey, seq: Seq, due: Millis) {
        if matches!(lane.1, Target::Reminder(_)) {
            return;
        }
        let lane = self.lanes.entry(lane).or_default();
        lane.behind.insert(seq);
        lane.due = lane.due.max(due);
    }

    /// An effect that is put off on purpose (a webhook, before its first try). Says when it is due: as asked, or behind
    /// others of its lane.
    pub(super) fn put_off(&mut self, item: &Item, due: Millis) -> (Millis, Option<Seq>) {
        if matches!(item.target, Target::Reminder(_)) {
            return (due, None);
        }
        self.lanes.entry(lane_of(item)).or_default().put_behind(item.seq, due)
    }

    /// An effect is there to be delivered.
    pub(super) fn offer(&mut self, item: Item, now: Millis) -> Offer {
        let key = lane_of(&item);
        let lone = matches!(item.target, Target::Reminder(_));
        let lane = self.lanes.entry(key.clone()).or_default();
        let behind = match item.origin {
            Origin::Log { .. } if lane.behind.is_empty() => None,
            Origin::Log { .. } => Some(now),
            Origin::Row(_) if lone => None,
            Origin::Row(_) => {
                lane.behind.insert(item.seq);
                (!lane.is_next(item.seq)).then_some(now.plus(NOT_YET_MS))
            }
        };
        if let Some(earliest) = behind {
            let (due, dropped) = lane.put_behind(item.seq, earliest);
            return Offer::Behind { item: Box::new(item), due, dropped };
        }
        if lane.running.is_none() && lane.queue.is_empty() {
            self.ready[slot(item.target.door())].push_back(key);
        }
        lane.queue.push_back(item);
        Offer::Queued
    }

    /// The next effect to carry out, if any door has room.
    pub(super) fn next(&mut self, now: Millis) -> Option<Item> {
        for (door, limit) in LIMITS.into_iter().enumerate() {
            while self.under_way[door] < limit {
                let Some(key) = self.ready[door].pop_front() else { break };
                let Some(lane) = self.lanes.get_mut(&key) else { continue };
                let Some(item) = lane.queue.pop_front() else { continue };
                lane.running = Some(item.seq);
                lane.since = now;
                self.under_way[door] += 1;
                return Some(item);
            }
        }
        None
    }

    /// What was under way is delivered or given up.
    pub(super) fn done(&mut self, item: &Item) {
        let key = lane_of(item);
        let door = slot(item.target.door());
        self.under_way[door] = self.under_way[door].saturating_sub(1);
        if let Some(lane) = self.lanes.get_mut(&key) {
            lane.running = None;
            lane.behind.remove(&item.seq);
            if !lane.queue.is_empty() {
                self.ready[door].push_back(key);
            } else if lane.is_idle() {
                self.lanes.remove(&key);
            }
        }
    }

    /// What was under way was not taken and is tried again at `due`. Returns what waited after it in memory, each with the
    /// time until which it is to be put off.
    pub(super) fn failed(&mut self, item: &Item, due: Millis) -> Vec<(Item, Millis)> {
        let key = lane_of(item);
        let door = slot(item.target.door());
        self.under_way[door] = self.under_way[door].saturating_sub(1);
        if matches!(item.target, Target::Reminder(_)) {
            self.lanes.remove(&key);
            return Vec::new();
        }
        let Some(lane) = self.lanes.get_mut(&key) else { return Vec::new() };
        lane.running = None;
        lane.behind.insert(item.seq);
        lane.due = due;
        let queue = std::mem::take(&mut lane.queue);
        let mut after = Vec::with_capacity(queue.len());
        for item in queue {
            let (due, _) = lane.put_behind(item.seq, due);
            after.push((item, due));
        }
        after
    }

    /// Takes what waits in memory behind effects under way since before `before`, so that a slow target does not hold the
    /// position in the log; each with the time until which it is to be put off.
    pub(super) fn take_slow(&mut self, before: Millis, now: Millis) -> Vec<(Item, Millis)> {
        let mut taken = Vec::new();
        for lane in self.lanes.values_mut() {
            let fresh = matches!(lane.queue.front(), Some(Item { origin: Origin::Log { .. }, .. }));
            if lane.running.is_some() && lane.since < before && fresh {
                for item in std::mem::take(&mut lane.queue) {
                    let (due, _) = lane.put_behind(item.seq, now.plus(NOT_YET_MS));
                    taken.push((item, due));
                }
            }
        }
        taken
    }

    /// Forgets the lanes of instances that are not kept. What of theirs is under way is counted until [`Lanes::left`].
    pub(super) fn keep(&mut self, keep: impl Fn(&InstanceKey) -> bool) {
        self.lanes.retain(|(instance, _), _| keep(instance));
        self.ready.iter_mut().for_each(|ready| ready.retain(|(instance, _)| keep(instance)));
    }

    /// What was under way when its lane was forgotten has ended.
    pub(super) fn left(&mut self, item: &Item) {
        let door = slot(item.target.door());
        self.under_way[door] = self.under_way[door].saturating_sub(1);
    }

    /// Effects under way.
    pub(super) fn under_way(&self) -> usize {
        self.under_way.iter().sum()
    }

    /// Lanes that are not idle.
    pub(super) fn len(&self) -> usize {
        self.lanes.len()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        store::{Feed, Pending},
        types::{Channel, Effect, EffectKind, InstanceId, StimulusId, TenantId},
    };

    fn row(instance: usize, seq: Seq) -> Item {
        let key = InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(format!("i{instance}")).unwrap());
        let channel = Channel::new("a").unwrap();
        Item::of_row(Pending {
            key,
            effect_id: seq.to_string(),
            effect: Effect {
                index: seq.1,
                kind: EffectKind::Publish { channel, content: None, data: None, retain: false },
            },
            reply: None,
            stimulus: StimulusId::new("s").unwrap(),
            tries: 0,
            due: Millis(0),
        })
        .unwrap()
    }

    /// The same as if it came fresh from the log.
    fn fresh(instance: usize, seq: Seq) -> Item {
        let item = row(instance, seq);
        let stimulus =
            crate::types::Stimulus::text(crate::types::Source::Http, Channel::new("a").unwrap(), "x", Millis(0));
        let turn = crate::types::TurnRecord {
            turn: seq.0,
            version: 0,
            stimulus,
            outcome: crate::types::Outcome::Silent,
            reply: None,
            effects: vec![item.effect().clone()],
            state: crate::types::StateChange::None,
            episodes: Vec::new(),
            steps: 0,
            engine: String::new(),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(0),
            epoch: 0,
        };
        Item { origin: Origin::Log { feed: Feed(0), position: 1, turn: std::sync::Arc::new(turn), at: 0 }, ..item }
    }

    fn is_queued(offer: &Offer) -> bool {
        matches!(offer, Offer::Queued)
    }

    #[test]
    fn one_effect_of_a_lane_is_under_way_at_a_time() {
        let mut lanes = Lanes::default();
        for turn in 1..4 {
            assert!(is_queued(&lanes.offer(fresh(0, Seq(turn, 0)), Millis(0))));
        }
        let first = lanes.next(Millis(0)).unwrap();
        assert_eq!(first.seq, Seq(1, 0));
        assert!(lanes.next(Millis(0)).is_none());
        lanes.done(&first);
        assert_eq!(lanes.next(Millis(0)).unwrap().seq, Seq(2, 0));
    }

    #[test]
    fn after_a_failure_the_rest_of_the_lane_waits_and_comes_back_in_order() {
        let mut lanes = Lanes::default();
        for turn in 1..4 {
            lanes.offer(fresh(0, Seq(turn, 0)), Millis(0));
        }
        lanes.offer(fresh(1, Seq(1, 0)), Millis(0));
        let first = lanes.next(Millis(0)).unwrap();
        let after: Vec<_> = lanes.failed(&first, Millis(500)).into_iter().map(|(item, due)| (item.seq, due)).collect();
        assert_eq!(after, [(Seq(2, 0), Millis(501)), (Seq(3, 0), Millis(502))]);
        assert_eq!(lanes.next(Millis(0)).unwrap().key.instance.as_str(), "i1", "other lanes go on");
        // What the log brings meanwhile queues up behind.
        let Offer::Behind { due, .. } = lanes.offer(fresh(0, Seq(4, 0)), Millis(10)) else {
            panic!("the lane is blocked")
        };
        assert_eq!(due, Millis(503));
        // A row that is not next is refused, the next is not.
        let Offer::Behind { .. } = lanes.offer(row(0, Seq(2, 0)), Millis(501)) else { panic!("not its turn") };
        assert!(is_queued(&lanes.offer(row(0, Seq(1, 0)), Millis(501))));
        assert!(is_queued(&lanes.offer(row(0, Seq(2, 0)), Millis(501))));
        let Offer::Behind { .. } = lanes.offer(row(0, Seq(4, 0)), Millis(501)) else { panic!("not its turn") };
        assert!(is_queued(&lanes.offer(row(0, Seq(3, 0)), Millis(501))));
        for turn in 1..4 {
            let item = lanes.next(Millis(501)).unwrap();
            assert_eq!(item.seq, Seq(turn, 0));
            lanes.done(&item);
        }
        assert!(is_queued(&lanes.offer(row(0, Seq(4, 0)), Millis(600))));
        let item = lanes.next(Millis(600)).unwrap();
        lanes.done(&item);
        assert!(is_queued(&lanes.offer(fresh(0, Seq(5, 0)), Millis(601))), "the lane is free again");
    }

    #[test]
    fn a_slow_target_lets_go_of_what_waits_behind() {
        let mut lanes = Lanes::default();
        for turn in 1..4 {
            lanes.offer(fresh(0, Seq(turn, 0)), Millis(0));
        }
        let slow = lanes.next(Millis(0)).unwrap();
        assert!(lanes.take_slow(Millis(0), Millis(0)).is_empty());
        assert_eq!(lanes.take_slow(Millis(5000), Millis(5001)).len(), 2);
        let Offer::Behind { .. } = lanes.offer(row(0, Seq(2, 0)), Millis(7000)) else {
            panic!("the first is under way")
        };
        lanes.done(&slow);
        assert!(is_queued(&lanes.offer(row(0, Seq(2, 0)), Millis(9000))));
    }

    #[test]
    fn a_lane_holds_a_bounded_number() {
        let mut lanes = Lanes::default();
        let first = fresh(0, Seq(1, 0));
        lanes.offer(first, Millis(0));
        let first = lanes.next(Millis(0)).unwrap();
        lanes.failed(&first, Millis(1));
        let mut dropped = Vec::new();
        for turn in 2..=DELIVERY_BEHIND as u64 + 3 {
            if let Offer::Behind { dropped: Some(seq), .. } = lanes.offer(fresh(0, Seq(turn, 0)), Millis(0)) {
                dropped.push(seq);
            }
        }
        assert_eq!(dropped, [Seq(1, 0), Seq(2, 0), Seq(3, 0)]);
    }

    #[test]
    fn no_door_takes_more_than_its_limit() {
        let mut lanes = Lanes::default();
        for instance in 0..DELIVERY_UNDER_WAY + 5 {
            lanes.offer(fresh(instance, Seq(1, 0)), Millis(0));
        }
        let taken: Vec<_> = std::iter::from_fn(|| lanes.next(Millis(0))).collect();
        assert_eq!(taken.len(), DELIVERY_UNDER_WAY);
        lanes.done(&taken[0]);
        assert!(lanes.next(Millis(0)).is_some());
    }

    /// A store and a target in miniature: rows by due time, a target that fails now and then.
    fn deliver_all(turns: u64, mut chance: impl FnMut() -> bool) -> Vec<Seq> {
        let mut lanes = Lanes::default();
        let mut rows: Vec<(Millis, Seq)> = Vec::new();
        let mut delivered = Vec::new();
        let mut now = Millis(0);
        let mut fresh_turn = 1;
        while delivered.len() < turns as usize {
            now = now.plus(100);
            if fresh_turn <= turns && chance() {
                if let Offer::Behind { item, due, .. } = lanes.offer(fresh(0, Seq(fresh_turn, 0)), now) {
                    rows.push((due, item.seq));
                }
                fresh_turn += 1;
            }
            rows.sort_unstable();
            let due: Vec<Seq> = rows.iter().filter(|row| row.0 <= now).map(|row| row.1).collect();
            rows.retain(|row| row.0 > now);
            for seq in due {
                if let Offer::Behind { item, due, .. } = lanes.offer(row(0, seq), now) {
                    rows.push((due, item.seq));
                }
            }
            while let Some(item) = lanes.next(now) {
                if chance() {
                    delivered.push(item.seq);
                    lanes.done(&item);
                } else {
                    let due = now.plus(700);
                    rows.push((due, item.seq));
                    rows.extend(lanes.failed(&item, due).into_iter().map(|(item, due)| (due, item.seq)));
                }
            }
            assert!(now < Millis(10_000_000), "no progress: {delivered:?}");
        }
        delivered
    }

    proptest! {
        #[test]
        fn effects_of_a_lane_leave_in_order_whatever_fails(seed in any::<u64>(), turns in 1u64..40) {
            let mut seed = seed;
            let delivered = deliver_all(turns, move || {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                seed >> 62 != 0
            });
            let expected: Vec<Seq> = (1..=turns).map(|turn| Seq(turn, 0)).collect();
            prop_assert_eq!(delivered, expected);
        }
    }
}
