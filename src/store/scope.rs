//! Which part of the store's work a node asks for: shards, and the feeds of turns with effects.
//!
//! Not here: who owns what. Pure. Tests: at the foot.

use std::{collections::BTreeSet, sync::Arc};

use super::{Fence, Shipping};
use crate::types::InstanceKey;

/// One ordered stream of turns with effects. A backend that one process uses alone has one feed, 0; a shared backend has one
/// for each shard, with the shard's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
pub struct Feed(pub u32);

/// A set of shards. Cheap to clone. A shard that was lost and taken again is another one: it has another epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope(Option<Arc<Slice>>);

#[derive(Debug, PartialEq, Eq)]
struct Slice {
    /// Shards in all.
    count: u32,
    /// Those meant, in order, each once.
    shards: Vec<u32>,
    /// The epoch each of them was taken with, 0 where that does not matter.
    epochs: Vec<u64>,
}

impl Scope {
    /// All shards, however many there are: what a process asks for that shares its store with nobody.
    pub const fn all() -> Self {
        Self(None)
    }

    /// These of `count` shards.
    pub fn of(count: u32, shards: impl IntoIterator<Item = u32>) -> Self {
        Self::held(count, shards.into_iter().map(|shard| (shard, 0)))
    }

    /// These of `count` shards, each with the epoch it was taken with.
    pub fn held(count: u32, shards: impl IntoIterator<Item = (u32, u64)>) -> Self {
        let mut pairs: Vec<(u32, u64)> = shards.into_iter().filter(|(shard, _)| *shard < count).collect();
        // Of two epochs the newer one.
        pairs.sort_unstable_by_key(|&(shard, epoch)| (shard, std::cmp::Reverse(epoch)));
        pairs.dedup_by_key(|(shard, _)| *shard);
        let (shards, epochs) = pairs.into_iter().unzip();
        Self(Some(Arc::new(Slice { count, shards, epochs })))
    }

    /// No shard at all.
    pub fn none() -> Self {
        Self::of(1, [])
    }

    /// The shards meant, in order; `None` for all.
    pub fn shards(&self) -> Option<&[u32]> {
        self.0.as_ref().map(|slice| slice.shards.as_slice())
    }

    /// The fences under which delivery writes this: those of the shards held, each once.
    pub fn fences(&self, writes: &[Shipping]) -> Vec<Fence> {
        let Some(slice) = &self.0 else { return Vec::new() };
        let shards: BTreeSet<u32> = writes.iter().map(|write| write.shard(slice.count)).collect();
        shards.into_iter().filter_map(|shard| self.fence(shard)).collect()
    }

    /// Whether a shard is meant as it was taken with this epoch.
    pub fn holds(&self, shard: u32, epoch: u64) -> bool {
        self.0.as_ref().is_some_and(|slice| slice.has((shard, epoch)))
    }

    /// The right to write for a shard that is held under an epoch. What was lodged is not part of it.
    fn fence(&self, shard: u32) -> Option<Fence> {
        let slice = self.0.as_ref()?;
        let epoch = *slice.epochs.get(slice.shards.binary_search(&shard).ok()?)?;
        (epoch > 0).then_some(Fence { shard, epoch, lodged: 0 })
    }

    /// Whether a shard is meant.
    pub fn has(&self, shard: u32) -> bool {
        self.shards().is_none_or(|shards| shards.binary_search(&shard).is_ok())
    }

    /// Whether the instance's shard is meant.
    pub fn contains(&self, key: &InstanceKey) -> bool {
        self.shard_of(key).is_some()
    }

    /// The instance's shard if it is meant; 0 where all are, whose number it does not know.
    pub fn shard_of(&self, key: &InstanceKey) -> Option<u32> {
        let Some(slice) = &self.0 else { return Some(0) };
        Some(key.shard(slice.count)).filter(|shard| self.has(*shard))
    }

    /// Whether no shard is meant.
    pub fn is_empty(&self) -> bool {
        self.shards().is_some_and(<[u32]>::is_empty)
    }

    /// What is meant by both. Of two that count shards differently, and of all and some, nothing.
    pub fn and(&self, other: &Self) -> Self {
        match (&self.0, &other.0) {
            (None, None) => Self::all(),
            (Some(one), Some(two)) if one.count == two.count => {
                Self::held(one.count, one.pairs().filter(|pair| two.has(*pair)))
            }
            _ => Self::none(),
        }
    }

    /// What is meant by either. All where either is all; of two that count shards differently, the one that is not empty.
    pub fn or(&self, other: &Self) -> Self {
        match (&self.0, &other.0) {
            (None, _) | (_, None) => Self::all(),
            (Some(one), Some(two)) if one.count == two.count => Self::held(one.count, one.pairs().chain(two.pairs())),
            _ if other.is_empty() => self.clone(),
            _ => other.clone(),
        }
    }

    /// What is meant by this one and not by a part of it.
    pub fn without(&self, part: &Self) -> Self {
        match &self.0 {
            None if part.is_empty() => Self::all(),
            None => Self::none(),
            Some(slice) => {
                let has = |pair| part.0.as_ref().is_none_or(|part| part.has(pair));
                Self::held(slice.count, slice.pairs().filter(|pair| !has(*pair)))
            }
        }
    }
}

impl Slice {
    fn pairs(&self) -> impl Iterator<Item = (u32, u64)> {
        self.shards.iter().copied().zip(self.epochs.iter().copied())
    }

    fn has(&self, (shard, epoch): (u32, u64)) -> bool {
        self.shards.binary_search(&shard).is_ok_and(|at| self.epochs.get(at) == Some(&epoch))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    #[test]
    fn a_scope_holds_the_instances_of_its_shards() {
        let scope = Scope::of(8, [5, 1, 5, 99]);
        assert_eq!(scope.shards(), Some(&[1, 5][..]));
        for number in 0..100 {
            let instance = InstanceId::new(format!("i{number}")).unwrap();
            let key = InstanceKey::new(TenantId::new("t").unwrap(), instance);
            let shard = key.shard(8);
            assert_eq!(scope.contains(&key), shard == 1 || shard == 5);
            assert!(Scope::all().contains(&key) && Scope::all().has(shard));
        }
        assert!(Scope::none().is_empty() && !scope.is_empty() && !Scope::all().is_empty());
    }

    #[test]
    fn a_shard_that_was_taken_again_is_another_one() {
        let (before, after) = (Scope::held(8, [(1, 4), (2, 7)]), Scope::held(8, [(1, 5), (2, 7), (3, 1)]));
        assert_eq!(before.and(&after), Scope::held(8, [(2, 7)]));
        assert_eq!(after.without(&before), Scope::held(8, [(1, 5), (3, 1)]));
        assert_eq!(before.or(&after), after);
        assert_eq!(after.fence(1), Some(Fence { shard: 1, epoch: 5, lodged: 0 }));
        assert_eq!((after.fence(4), Scope::of(8, [1]).fence(1), Scope::all().fence(1)), (None, None, None));
        assert!(after.without(&Scope::all()).is_empty() && after.has(1));
    }

    #[test]
    fn scopes_are_compared() {
        let (one, two) = (Scope::of(8, [1, 2, 3]), Scope::of(8, [2, 3, 4]));
        assert_eq!(one.and(&two), Scope::of(8, [2, 3]));
        assert_eq!(one.without(&two), Scope::of(8, [1]));
        assert_eq!(one.and(&Scope::of(9, [1, 2, 3])), Scope::none());
        assert_eq!((Scope::all().and(&Scope::all()), Scope::all().and(&one)), (Scope::all(), Scope::none()));
        assert_eq!(one.or(&two), Scope::of(8, [1, 2, 3, 4]));
        assert_eq!((Scope::none().or(&one), one.or(&Scope::none())), (one.clone(), one.clone()));
        assert_eq!(Scope::none().or(&Scope::all()), Scope::all());
        assert_eq!(Scope::all().without(&Scope::none()), Scope::all());
        assert!(Scope::all().without(&Scope::all()).is_empty() && one.without(&one).is_empty());
    }
}
