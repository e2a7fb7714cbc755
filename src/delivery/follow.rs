//! Which feeds are followed and how far each is dealt with, while the shards this node owns change. Pure.
//!
//! Invariants: a feed is followed only after its durable position was read; what began before a shard was lost never counts
//! for it again, also when it is regained. Tests: at the foot; `tests/it/delivery.rs`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::window::Window;
use crate::{
    store::{Feed, Scope},
    types::InstanceKey,
};

#[derive(Debug)]
struct Followed {
    window: Window,
    /// It is read up to here.
    read: i64,
    /// The durable position.
    shipped: i64,
}

/// The feeds of the shards in hand.
#[derive(Debug)]
pub(super) struct Follow {
    feeds: BTreeMap<Feed, Followed>,
    /// Shards that are followed.
    held: Scope,
    /// Shards whose positions are yet to be read.
    awaited: Scope,
    /// Grows with each change of shards.
    era: u64,
    /// Since when each shard is held.
    since: HashMap<u32, u64>,
    /// Feeds whose position moved beyond the durable one.
    moved: BTreeSet<Feed>,
    /// Where the next read begins, so that no feed starves.
    next: Feed,
    open: usize,
    position: i64,
}

impl Follow {
    /// Nothing is followed yet; these are awaited.
    pub(super) fn new(wanted: Scope) -> Self {
        Self {
            feeds: BTreeMap::new(),
            held: Scope::none(),
            awaited: wanted,
            era: 0,
            since: HashMap::new(),
            moved: BTreeSet::new(),
            next: Feed(0),
            open: 0,
            position: 0,
        }
    }

    /// Other shards are wanted: forgets those that are not, awaits those that are new.
    pub(super) fn want(&mut self, wanted: Scope) {
        self.era += 1;
        self.held = self.held.and(&wanted);
        self.awaited = wanted.without(&self.held);
        let held = self.held.clone();
        let keeps = |shard: u32| held.has(shard);
        self.since.retain(|shard, _| keeps(*shard));
        self.moved.retain(|feed| keeps(feed.0));
        self.feeds.retain(|feed, followed| {
            let kept = keeps(feed.0);
            if !kept {
                self.open -= followed.window.in_hand();
                self.position -= followed.shipped;
            }
            kept
        });
    }

    /// What is awaited is followed from these positions on.
    pub(super) fn resume(&mut self, positions: Vec<(Feed, i64)>) {
        self.era += 1;
        for (feed, position) in positions {
            let followed = Followed { window: Window::after(position), read: position, shipped: position };
            self.feeds.insert(feed, followed);
            self.position += position;
        }
        self.since.extend(self.awaited.shards().unwrap_or(&[0]).iter().map(|shard| (*shard, self.era)));
        self.held = self.held.or(&self.awaited);
        self.awaited = Scope::none();
    }

    /// Shards that are followed.
    pub(super) fn held(&self) -> &Scope {
        &self.held
    }

    /// Shards whose positions are yet to be read.
    pub(super) fn awaited(&self) -> &Scope {
        &self.awaited
    }

    /// The present era.
    pub(super) fn era(&self) -> u64 {
        self.era
    }

    /// Whether the instance's shard is held, and was all the time since that era.
    pub(super) fn held_since(&self, key: &InstanceKey, era: u64) -> bool {
        let shard = self.held.shard_of(key);
        shard.and_then(|shard| self.since.get(&shard)).is_some_and(|since| *since <= era)
    }

    /// How many feeds are followed.
    pub(super) fn feeds(&self) -> usize {
        self.feeds.len()
    }

    /// The durable positions, added up.
    pub(super) fn position(&self) -> i64 {
        self.position
    }

    /// Effects open.
    pub(super) fn in_hand(&self) -> usize {
        self.open
    }

    /// Up to where each feed is read. Each time another one comes first.
    pub(super) fn read(&mut self) -> Vec<(Feed, i64)> {
        let (before, after) = (self.feeds.range(..self.next), self.feeds.range(self.next..));
        let all: Vec<_> = after.chain(before).map(|(feed, followed)| (*feed, followed.read)).collect();
        self.next = all.first().map_or(Feed(0), |(feed, _)| Feed(feed.0.wrapping_add(1)));
        all
    }

    /// A position was read; `effects` of it are to be delivered.
    pub(super) fn open(&mut self, feed: Feed, position: i64, effects: usize) {
        let Some(followed) = self.feeds.get_mut(&feed) else { return };
        followed.read = followed.read.max(position);
        followed.window.open(position, effects);
        self.open += effects;
        if followed.window.settled() > followed.shipped {
            self.moved.insert(feed);
        }
    }

    /// One effect of a position is delivered or put off.
    pub(super) fn close(&mut self, feed: Feed, position: i64) {
        let Some(followed) = self.feeds.get_mut(&feed) else { return };
        self.open -= usize::from(followed.window.close(position));
        if followed.window.settled() > followed.shipped {
            self.moved.insert(feed);
        }
    }

    /// Whether nothing of a feed is open, and its position says so. Of one that is not followed nothing is.
    pub(super) fn is_settled(&self, feed: Feed) -> bool {
        self.feeds
            .get(&feed)
            .is_none_or(|followed| followed.window.in_hand() == 0 && followed.window.settled() <= followed.shipped)
    }

    /// Whether a position is to be written.
    pub(super) fn has_moved(&self) -> bool {
        !self.moved.is_empty()
    }

    /// The positions to be written.
    pub(super) fn moved(&self) -> Vec<(Feed, i64)> {
        let settled = |feed: &Feed| Some((*feed, self.feeds.get(feed)?.window.settled()));
        self.moved.iter().filter_map(settled).collect()
    }

    /// These positions are durable.
    pub(super) fn shipped(&mut self, positions: &[(Feed, i64)]) {
        for (feed, position) in positions {
            let Some(followed) = self.feeds.get_mut(feed) else { continue };
            let shipped = followed.shipped.max(*position);
            self.position += shipped - followed.shipped;
            followed.shipped = shipped;
            if followed.window.settled() <= shipped {
                self.moved.remove(feed);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    fn key_in(shard: u32) -> InstanceKey {
        let key = |n: u32| InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(format!("i{n}")).unwrap());
        (0..).map(key).find(|key| key.shard(4) == shard).unwrap()
    }

    #[test]
    fn each_feed_has_its_own_position() {
        let mut follow = Follow::new(Scope::of(4, [1, 2]));
        assert!(follow.read().is_empty() && !follow.awaited().is_empty());
        follow.resume(vec![(Feed(1), 10), (Feed(2), 20)]);
        assert_eq!(follow.read(), [(Feed(1), 10), (Feed(2), 20)]);
        follow.open(Feed(1), 11, 1);
        follow.open(Feed(2), 21, 1);
        assert_eq!(follow.read(), [(Feed(2), 21), (Feed(1), 11)], "another one comes first");
        follow.close(Feed(2), 21);
        assert_eq!((follow.moved(), follow.in_hand()), (vec![(Feed(2), 21)], 1));
        follow.shipped(&[(Feed(2), 21)]);
        assert_eq!((follow.has_moved(), follow.position()), (false, 31));
    }

    #[test]
    fn what_is_lost_is_forgotten_and_what_is_regained_begins_anew() {
        let mut follow = Follow::new(Scope::of(4, [1, 2]));
        follow.resume(vec![(Feed(1), 10), (Feed(2), 20)]);
        let before = follow.era();
        follow.open(Feed(1), 11, 2);
        follow.open(Feed(2), 21, 1);
        follow.want(Scope::of(4, [2, 3]));
        assert_eq!((follow.in_hand(), follow.feeds(), follow.position()), (1, 1, 20));
        assert_eq!(follow.awaited(), &Scope::of(4, [3]));
        assert!(follow.held_since(&key_in(2), before) && !follow.held_since(&key_in(1), before));
        follow.want(Scope::of(4, [1, 2]));
        follow.resume(vec![(Feed(1), 10)]);
        assert!(!follow.held_since(&key_in(1), before), "it began before the shard was lost");
        assert!(follow.held_since(&key_in(1), follow.era()) && follow.held_since(&key_in(2), before));
        assert_eq!(follow.in_hand(), 1);
        follow.close(Feed(1), 11);
        assert_eq!(follow.in_hand(), 1);
    }
}
