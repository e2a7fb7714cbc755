//! Vectors that come after their episodes: what was written is embedded by and by, a bounded number at a time.
//!
//! Writing waits for no model. Who wrote or recalled leaves a wake; a task of the node looks which episodes of that instance have no
//! vector, has them made, and sends what it got to the instance as a stimulus of its own, whose turn keeps it. Losing
//! a wake costs nothing but time: the next recall leaves another.
//!
//! Invariants: few instances at a time; a text that got no answer is asked for again later, one that has no vector never.
//! Tests: `tests/it/embeddings.rs`.

use std::{
    collections::{HashSet, VecDeque},
    future::Future,
    sync::{Mutex, PoisonError},
};

use futures_util::future::join_all;
use tokio::sync::Notify;

use super::{Error, Memory, gather::Failure};
use crate::{
    store::replay,
    types::{
        Channel, EpisodeId, InstanceKey, Priority, RawJson, Source, Stimulus,
        memory::{EMBED_CHANNEL, Extra, Kept},
    },
};

/// Episodes embedded by one turn.
const PORTION: usize = 64;
/// Instances that wait for it.
const MAX_WAITING: usize = 10_000;

/// Instances that may have episodes without vectors, each once, in order.
#[derive(Default)]
pub(super) struct Wakes {
    waiting: Mutex<(VecDeque<InstanceKey>, HashSet<InstanceKey>)>,
    hint: Notify,
}

impl Wakes {
    pub(super) fn push(&self, key: &InstanceKey) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.0.len() < MAX_WAITING && waiting.1.insert(key.clone()) {
            waiting.0.push_back(key.clone());
            self.hint.notify_one();
        }
    }

    pub(super) async fn next(&self) -> InstanceKey {
        loop {
            let hint = self.hint.notified();
            {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(key) = waiting.0.pop_front() {
                    waiting.1.remove(&key);
                    return key;
                }
            }
            hint.await;
        }
    }
}

impl Memory {
    /// Says that an instance may have episodes without vectors.
    pub fn wake(&self, key: &InstanceKey) {
        if self.gather.is_some() {
            self.wakes.push(key);
        }
    }

    /// Whether there is anything for [`Memory::backfill`] to do, ever.
    pub fn backfills(&self) -> bool {
        self.gather.is_some()
    }

    /// Brings vectors to those that were woken, until dropped. `deliver` takes a stimulus to its instance and tells whether its
    /// turn was decided.
    pub async fn backfill<F: Future<Output = bool>>(&self, deliver: impl Fn(InstanceKey, Stimulus) -> F) {
        loop {
            let key = self.wakes.next().await;
            loop {
                match self.portion(&key).await {
                    Ok(Some(stimulus)) => {
                        if !deliver(key.clone(), stimulus).await {
                            break;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(instance = %key, %error, "episodes without vectors wait for the next recall");
                        break;
                    }
                }
            }
        }
    }

    /// The vectors of some episodes that have none; nothing when all have, or no answer came.
    async fn portion(&self, key: &InstanceKey) -> Result<Option<Stimulus>, Error> {
        let Some(gather) = &self.gather else { return Ok(None) };
        let shelf = self.current(key).await?;
        let ids = shelf.read().await.bare(PORTION);
        let mut turns: Vec<u64> = ids.iter().map(|id| id.turn()).collect();
        turns.sort_unstable();
        turns.dedup();
        if turns.is_empty() {
            return Ok(None);
        }
        let found = self.store.turns_at(key, &turns).await?;
        let episodes: Vec<_> = found
            .iter()
            .flat_map(|turn| replay::episodes(turn))
            .filter(|episode| ids.contains(&EpisodeId(episode.id)))
            .collect();
        let asked = join_all(episodes.iter().map(async |episode| {
            let text = episode.content.trim();
            let of = Some(EpisodeId(episode.id));
            if text.is_empty() {
                return Some(Extra { of, ..Extra::default() });
            }
            match gather.embed(&key.tenant, text).await {
                Ok(vector) => Some(Extra { of, embedding: Some((*vector).clone()), ..Extra::default() }),
                Err(Failure::NoDirection) => Some(Extra { of, ..Extra::default() }),
                Err(_) => None,
            }
        }));
        let extras: Vec<Extra> = asked.await.into_iter().flatten().collect();
        let channel = Channel::new(EMBED_CHANNEL).ok();
        let data = RawJson::from_serialize(&Kept { extras: extras.clone() }).ok();
        let (Some(channel), Some(data), false) = (channel, data, extras.is_empty()) else { return Ok(None) };
        let mut stimulus = Stimulus::empty(Source::Http, channel, self.clock.now());
        stimulus.priority = Priority::Background;
        stimulus.data = Some(data);
        Ok(Some(stimulus))
    }
}
