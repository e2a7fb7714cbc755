//! Recalls that were asked before: what was found is held until the memory changes.
//!
//! What is held says at which turn of which life the memory was searched. Whoever asks again first asks the store whether any turn
//! since has changed the memory: that is one small read in place of the search, and of the texts; no shelf is needed for it.
//! Not here: the search (`shelf`), the tiers (`scaling::cache`).
//!
//! Invariants: what is told was found in the memory as it stood after the question came, so no committed episode is missing and
//! none that is forgotten is told; only how much recency counts is as old as the entry. Tests: at the foot; `tests/it/memory.rs`.

use super::{Ask, Error, Known, Recollection};
use crate::{
    config,
    scaling::cache::{Kind, Local, Slot, TieredCache},
    store::Reader,
    types::{InstanceKey, Millis, memory::Vector},
};

/// What a held recollection takes beside the texts.
const AROUND: usize = 128;
/// What an episode takes beside its texts.
const EPISODE: usize = 256;

/// What was found, and in which memory.
struct Found {
    life: i64,
    turn: u64,
    recollection: Recollection,
}

/// Recalls that were asked before.
pub(super) struct Again {
    cache: TieredCache,
    /// What, beside the question, decides what is found.
    basis: blake3::Hash,
}

impl Again {
    pub(super) fn new(config: &config::Memory, cache: TieredCache) -> Self {
        let basis = format!("{:?} {} {}", config.embedder, config.endpoint.base_url, config.endpoint.model);
        Self { cache, basis: blake3::hash(basis.as_bytes()) }
    }

    /// Where the answer to a question is held.
    pub(super) fn slot(&self, key: &InstanceKey, ask: &Ask) -> Slot {
        let question = digest(&self.basis, ask).to_hex();
        Slot::new(Kind::Recall, &key.tenant, format!("{}/{}", key.instance, &question[..32]))
    }

    /// What was found when the same was asked before, if the memory is still the same.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub(super) async fn look(
        &self,
        store: &dyn Reader,
        key: &InstanceKey,
        slot: &Slot,
    ) -> Result<Option<Recollection>, Error> {
        let Some(held) = self.cache.held::<Local<Found>>(slot) else {
            self.cache.proved(Kind::Recall, false);
            return Ok(None);
        };
        let Found { life, turn, recollection } = &held.value;
        let since = store.remembered(key, *turn, 1).await?;
        let same = since.life == *life && since.turns.is_empty();
        self.cache.proved(Kind::Recall, same);
        if !same {
            // What was forgotten does not stay.
            self.cache.let_go(slot);
        }
        Ok(same.then(|| recollection.clone()))
    }

    /// Holds what was found in a life's memory as it stood after a turn.
    pub(super) fn hold(&self, slot: &Slot, life: i64, turn: u64, recollection: &Recollection) {
        let bytes = AROUND + recollection.episodes.iter().map(weight).sum::<usize>();
        let value = Found { life, turn, recollection: recollection.clone() };
        self.cache.put(slot, turn, Local { value, bytes });
    }
}

fn weight(recalled: &super::Recalled) -> usize {
    let episode = &recalled.episode;
    let data = episode.data.as_ref().map_or(0, |data| data.get().len());
    let tags: usize = episode.tags.iter().map(|tag| tag.len() + 24).sum();
    EPISODE + episode.content.len() + data + tags
}

/// The same for two questions only when the same is asked.
fn digest(basis: &blake3::Hash, ask: &Ask) -> blake3::Hash {
    let Ask { query, embedding, limit, known } = ask;
    let Known { min_reward, tags_any, tags_all, after, before, as_of } = known;
    let mut hasher = blake3::Hasher::new();
    hasher.update(basis.as_bytes());
    let mut put = |bytes: Option<&[u8]>| {
        // With its length, so that no two lists of parts look alike; none is apart from an empty one.
        let length = bytes.map_or(u64::MAX, |bytes| bytes.len() as u64);
        hasher.update(&length.to_le_bytes()).update(bytes.unwrap_or_default());
    };
    put(query.as_deref().map(str::as_bytes));
    put(embedding.as_ref().map(numbers).as_deref());
    put(Some(&(*limit as u64).to_le_bytes()));
    put(min_reward.map(|reward| reward.to_bits().to_le_bytes()).as_ref().map(<[u8; 4]>::as_slice));
    for at in [after, before, as_of] {
        put(at.map(|Millis(at)| at.to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
    }
    for tags in [tags_any, tags_all] {
        put(Some(&(tags.len() as u64).to_le_bytes()));
        tags.iter().for_each(|tag| put(Some(tag.as_bytes())));
    }
    hasher.finalize()
}

fn numbers(vector: &Vector) -> Vec<u8> {
    let planes = vector.high.iter().chain(&vector.low).map(|step| step.cast_unsigned());
    vector.scale.to_le_bytes().into_iter().chain(planes).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn two_questions_are_the_same_only_when_the_same_is_asked() {
        let known = |change: fn(&mut Known)| {
            let mut known = Known::default();
            change(&mut known);
            Ask { query: Some(String::from("lamps")), known, limit: 10, ..Ask::default() }
        };
        let vector = |numbers: &[f32]| Ask { embedding: Vector::of(numbers), ..known(|_| ()) };
        let asks = [
            known(|_| ()),
            Ask { query: None, ..known(|_| ()) },
            Ask { query: Some(String::new()), ..known(|_| ()) },
            Ask { limit: 11, ..known(|_| ()) },
            vector(&[1.0, 0.0]),
            vector(&[0.0, 1.0]),
            known(|known| known.min_reward = Some(0.0)),
            known(|known| known.tags_any = vec!["a".into(), "b".into()]),
            known(|known| known.tags_any = vec!["ab".into()]),
            known(|known| (known.tags_any, known.tags_all) = (vec!["a".into()], vec!["b".into()])),
            known(|known| known.tags_all = vec!["ab".into()]),
            known(|known| known.after = Some(Millis(1))),
            known(|known| known.before = Some(Millis(1))),
            known(|known| known.as_of = Some(Millis(1))),
        ];
        let basis = blake3::hash(b"one");
        let digests: HashSet<_> = asks.iter().map(|ask| digest(&basis, ask)).collect();
        assert_eq!(digests.len(), asks.len());
        assert_eq!(digest(&basis, &asks[0]), digest(&basis, &asks[0].clone()));
        assert_ne!(digest(&basis, &asks[0]), digest(&blake3::hash(b"other"), &asks[0]));
    }
}
