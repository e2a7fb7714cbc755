//! What was promised and what was written, and whether they agree.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use sophont::{
    store::Fence,
    types::{InstanceKey, StimulusId, TurnRecord},
};

/// What a sender was told of a stimulus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    Accepted,
    Decided(u64),
}

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// An epoch committed after a newer one of its shard.
    StaleCommit,
    /// A stimulus was acknowledged and is nowhere.
    Lost,
    /// A stimulus has two turns, or was told two different ones.
    Doubled,
    /// Stimuli of a sender were decided in another order than they were sent.
    Order,
    /// A shard is not open at exactly its owner though nothing goes wrong any more.
    Orphaned,
    /// A sender is not served though nothing goes wrong any more.
    Stuck,
}

#[derive(Default)]
pub struct History {
    acks: BTreeMap<(InstanceKey, StimulusId), Vec<Ack>>,
    epochs: BTreeMap<u32, u64>,
    pub commits: usize,
    pub found: BTreeSet<Wrong>,
    pub details: Vec<String>,
}

impl History {
    pub fn acknowledged(&mut self, key: &InstanceKey, id: &StimulusId, ack: Ack) {
        self.acks.entry((key.clone(), id.clone())).or_default().push(ack);
    }

    /// A unit of an owner was applied while its shard had that epoch in the store.
    pub fn committed(&mut self, fence: Fence, stored: u64) {
        self.commits += 1;
        let newest = self.epochs.entry(fence.shard).or_default();
        if fence.epoch < *newest || fence.epoch != stored {
            let newest = (*newest).max(stored);
            self.wrong(Wrong::StaleCommit, || format!("{fence:?} committed after epoch {newest}"));
            return;
        }
        *newest = fence.epoch;
    }

    pub fn wrong(&mut self, wrong: Wrong, details: impl FnOnce() -> String) {
        self.found.insert(wrong);
        if self.details.len() < 20 {
            self.details.push(format!("{wrong:?}: {}", details()));
        }
    }

    /// Holds the turns of an instance against what its senders were told.
    pub fn check(&mut self, key: &InstanceKey, turns: &[Arc<TurnRecord>]) {
        let mut decided: BTreeMap<&StimulusId, Vec<u64>> = BTreeMap::new();
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        for turn in turns {
            decided.entry(&turn.stimulus.id).or_default().push(turn.turn);
        }
        for (id, numbers) in decided.iter().filter(|(_, numbers)| numbers.len() > 1) {
            self.wrong(Wrong::Doubled, || format!("{key} {id} is turns {numbers:?}"));
        }
        for turn in turns {
            let (sender, number) = turn.stimulus.id.as_str().rsplit_once('-').unwrap();
            let number: u64 = number.parse().unwrap();
            let before = last.insert(sender, number);
            if before.is_some_and(|before| number < before) {
                self.wrong(Wrong::Order, || format!("{key} {} came after {before:?}", turn.stimulus.id));
            }
        }
        let promised: Vec<_> =
            self.acks.iter().filter(|((of, _), _)| of == key).map(|(at, told)| (at.clone(), told.clone())).collect();
        for ((_, id), told) in promised {
            let Some(numbers) = decided.get(&id) else {
                self.wrong(Wrong::Lost, || format!("{key} {id} was told {told:?}"));
                continue;
            };
            for ack in told {
                if let Ack::Decided(number) = ack
                    && !numbers.contains(&number)
                {
                    self.wrong(Wrong::Doubled, || format!("{key} {id} was told turn {number} and is {numbers:?}"));
                }
            }
        }
    }
}
