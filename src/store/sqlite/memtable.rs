//! What the log says and the folded tables do not know yet.
//!
//! Three layers, newest first: the batch being committed, the active generation, and the frozen one being folded. Lookups
//! that miss all three go to the folded tables. Only the writer changes it; readers take the lock for a lookup.
//!
//! Invariant for readers: look here first and begin the read transaction after. What is not here then stands in the folded
//! tables, and what is here has its row in the log. Tests: at the foot.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Bound,
    sync::Arc,
};

use crate::{
    store::Head,
    types::{InstanceId, InstanceKey, Millis, StimulusId, TenantId},
};

/// A stimulus id in the order of the `seen` table.
pub(super) type IdKey = (TenantId, StimulusId, InstanceId);

/// The key of an instance's stimulus.
pub(super) fn id_key(key: &InstanceKey, stimulus: &StimulusId) -> IdKey {
    (key.tenant.clone(), stimulus.clone(), key.instance.clone())
}

/// Where and when a stimulus was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Decided {
    /// Position of its turn.
    pub seq: i64,
    /// Day of its turn, the bucket it expires with.
    pub day: i64,
}

/// The day a time lies in.
pub(super) const fn day(time: Millis) -> i64 {
    time.0.div_euclid(24 * 60 * 60 * 1000)
}

/// The newest head of an instance within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Latest {
    /// The head.
    pub head: Head,
    /// Number of the first of its turns in this layer; 1 when the layer holds its whole history.
    pub since: u64,
}

/// One layer.
#[derive(Debug, Default)]
pub(super) struct Generation {
    /// Newest heads. A head without turns says that the instance was forgotten.
    pub heads: HashMap<InstanceKey, Latest, ahash::RandomState>,
    /// Ids that must be found.
    pub ids: BTreeMap<IdKey, Decided>,
    /// Positions of turns with episodes.
    pub episodes: HashMap<InstanceKey, Vec<i64>, ahash::RandomState>,
    /// Instances forgotten while this layer was the newest: nothing of theirs up to the position counts, here or below.
    pub dropped: HashMap<InstanceKey, i64, ahash::RandomState>,
    /// Position of the newest turn.
    pub last_seq: i64,
    /// Turns.
    pub turns: usize,
}

impl Generation {
    /// Whether there is nothing to fold.
    pub(super) fn is_empty(&self) -> bool {
        self.turns == 0 && self.dropped.is_empty()
    }

    /// Notes one more turn.
    pub(super) fn add_turn(&mut self, key: &InstanceKey, head: Head) {
        let since = head.turn;
        self.heads.entry(key.clone()).and_modify(|latest| latest.head = head).or_insert(Latest { head, since });
        self.last_seq = self.last_seq.max(head.links[0]);
        self.turns += 1;
    }

    /// Notes that an instance is forgotten, with everything of it up to the position.
    pub(super) fn forget(&mut self, key: &InstanceKey, upto: i64) {
        self.heads.insert(key.clone(), Latest { head: Head::default(), since: 1 });
        self.dropped.insert(key.clone(), upto);
    }

    /// Takes in a newer layer and leaves it empty.
    fn merge(&mut self, newer: &mut Generation) {
        for (key, latest) in newer.heads.drain() {
            match self.heads.get_mut(&key) {
                // The older layer's turns still count, unless the instance was forgotten in between.
                Some(older) if !newer.dropped.contains_key(&key) => older.head = latest.head,
                Some(older) => *older = latest,
                None => {
                    self.heads.insert(key, latest);
                }
            }
        }
        while let Some((id, decided)) = newer.ids.pop_first() {
            self.ids.insert(id, decided);
        }
        for (key, mut seqs) in newer.episodes.drain() {
            self.episodes.entry(key).or_default().append(&mut seqs);
        }
        self.dropped.extend(newer.dropped.drain());
        self.last_seq = self.last_seq.max(newer.last_seq);
        self.turns += newer.turns;
        newer.last_seq = 0;
        newer.turns = 0;
    }

    /// Empties it.
    pub(super) fn clear(&mut self) {
        self.heads.clear();
        self.ids.clear();
        self.episodes.clear();
        self.dropped.clear();
        self.last_seq = 0;
        self.turns = 0;
    }
}

/// The layers.
#[derive(Debug, Default)]
pub(super) struct Memtable {
    /// What the running commit will add, while it runs. Not yet true: lookups pass it by, `is_moving` tells of it.
    pub committing: Generation,
    /// Committed since the last freeze.
    pub active: Generation,
    /// Being folded.
    pub frozen: Option<Arc<Generation>>,
}

impl Memtable {
    /// The committed layers, newest first.
    fn layers(&self) -> impl Iterator<Item = &Generation> {
        std::iter::once(&self.active).chain(self.frozen.as_deref())
    }

    /// The head of an instance, if a turn of it (or its end) is not folded yet.
    pub(super) fn head(&self, key: &InstanceKey) -> Option<Latest> {
        self.layers().find_map(|layer| layer.heads.get(key).copied())
    }

    /// Whether nothing of the instance can stand in the folded tables.
    pub(super) fn holds_all(&self, key: &InstanceKey) -> bool {
        self.layers().any(|layer| layer.heads.get(key).is_some_and(|latest| latest.since == 1))
    }

    /// Nothing of the instance up to this position counts.
    pub(super) fn dropped(&self, key: &InstanceKey) -> i64 {
        self.layers().filter_map(|layer| layer.dropped.get(key)).max().copied().unwrap_or(0)
    }

    /// Whether the running commit will change what is known of the instance.
    pub(super) fn is_moving(&self, key: &InstanceKey) -> bool {
        self.committing.heads.contains_key(key)
    }

    /// Where an id was decided, if that is not folded yet.
    pub(super) fn decided(&self, key: &InstanceKey, id: &IdKey) -> Option<Decided> {
        let found = self.layers().find_map(|layer| layer.ids.get(id).copied())?;
        (found.seq > self.dropped(key)).then_some(found)
    }

    /// Where ids of the instance that begin with the prefix were decided, as far as not folded.
    pub(super) fn decided_prefix(&self, key: &InstanceKey, prefix: &str) -> Vec<Decided> {
        let Ok(from) = StimulusId::new(prefix) else { return Vec::new() };
        let dropped = self.dropped(key);
        let fits = |(id, _): &(&IdKey, &Decided)| id.0 == key.tenant && id.1.as_str().starts_with(prefix);
        self.layers()
            .flat_map(|layer| self::from(layer, &key.tenant, &from).take_while(fits))
            .filter(|(id, decided)| id.2 == key.instance && decided.seq > dropped)
            .map(|(_, decided)| *decided)
            .collect()
    }

    /// Instances of the tenant that decided the id, as far as not folded.
    pub(super) fn holders(&self, tenant: &TenantId, stimulus: &StimulusId) -> Vec<(InstanceId, Decided)> {
        let fits = |(id, _): &(&IdKey, &Decided)| id.0 == *tenant && id.1 == *stimulus;
        self.layers()
            .flat_map(|layer| from(layer, tenant, stimulus).take_while(fits))
            .filter(|(id, decided)| decided.seq > self.dropped(&InstanceKey::new(tenant.clone(), id.2.clone())))
            .map(|(id, decided)| (id.2.clone(), *decided))
            .collect()
    }

    /// Positions of the instance's turns with episodes that may not be folded yet.
    pub(super) fn episodes(&self, key: &InstanceKey) -> Vec<i64> {
        let dropped = self.dropped(key);
        let seqs = self.layers().filter_map(|layer| layer.episodes.get(key)).flatten();
        seqs.copied().filter(|seq| *seq > dropped).collect()
    }

    /// Makes the commit's layer true.
    pub(super) fn commit(&mut self) {
        self.active.merge(&mut self.committing);
    }

    /// Freezes the active generation for folding. Only when none is frozen.
    pub(super) fn freeze(&mut self) -> Arc<Generation> {
        let frozen = Arc::new(std::mem::take(&mut self.active));
        self.frozen = Some(Arc::clone(&frozen));
        frozen
    }
}

/// The least of all ids.
const FIRST_ID: &str = "-";

fn from<'a>(
    layer: &'a Generation,
    tenant: &TenantId,
    stimulus: &StimulusId,
) -> impl Iterator<Item = (&'a IdKey, &'a Decided)> + use<'a> {
    let start = InstanceId::new(FIRST_ID)
        .map_or(Bound::Unbounded, |first| Bound::Included((tenant.clone(), stimulus.clone(), first)));
    layer.ids.range((start, Bound::Unbounded))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn key(instance: &str) -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(instance).unwrap())
    }

    fn id(text: &str) -> StimulusId {
        StimulusId::new(text).unwrap()
    }

    /// Commits one turn with an id.
    fn turn(table: &mut Memtable, key: &InstanceKey, text: &str, seq: i64) {
        let head = table.head(key).map_or_else(Head::default, |latest| latest.head).advance(seq);
        table.committing.add_turn(key, head);
        table.committing.ids.insert(id_key(key, &id(text)), Decided { seq, day: 0 });
        assert!(table.is_moving(key));
        table.commit();
        assert!(!table.is_moving(key));
    }

    #[test]
    fn lookups_see_both_generations_newest_first() {
        let (mut table, a) = (Memtable::default(), key("a"));
        turn(&mut table, &a, "m.1", 1);
        table.freeze();
        turn(&mut table, &a, "m.2", 2);
        assert_eq!(table.head(&a).unwrap().head.turn, 2);
        assert!(table.holds_all(&a), "the frozen one holds its first turn");
        assert_eq!(table.decided(&a, &id_key(&a, &id("m.1"))).unwrap().seq, 1);
        let mut seqs: Vec<i64> = table.decided_prefix(&a, "m.").iter().map(|d| d.seq).collect();
        seqs.sort_unstable();
        assert_eq!(seqs, [1, 2]);
        assert!(table.decided_prefix(&key("b"), "m.").is_empty());
        assert_eq!(table.holders(&a.tenant, &id("m.2")).len(), 1);
    }

    #[test]
    fn a_forgotten_instance_leaves_nothing_and_may_begin_again() {
        let (mut table, a) = (Memtable::default(), key("a"));
        turn(&mut table, &a, "m.1", 1);
        table.freeze();
        turn(&mut table, &a, "m.2", 2);
        table.committing.forget(&a, 2);
        table.commit();
        assert_eq!(table.head(&a).unwrap().head, Head::default());
        assert_eq!(table.decided(&a, &id_key(&a, &id("m.1"))), None);
        assert_eq!(table.decided(&a, &id_key(&a, &id("m.2"))), None);
        turn(&mut table, &a, "m.1", 4);
        assert_eq!(table.head(&a).unwrap(), Latest { head: Head { turn: 1, links: [4, 0, 0, 0] }, since: 1 });
        assert_eq!(table.decided(&a, &id_key(&a, &id("m.1"))).unwrap().seq, 4);
        assert_eq!(table.decided(&a, &id_key(&a, &id("m.2"))), None);
    }

    #[test]
    fn days_begin_at_midnight_utc() {
        assert_eq!((day(Millis(-1)), day(Millis(0)), day(Millis(86_399_999)), day(Millis(86_400_000))), (-1, 0, 0, 1));
    }
}
