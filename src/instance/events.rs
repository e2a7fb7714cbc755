//! What happens to instances, for those who watch: accepted, thinking, words, turns, dead letters.
//!
//! Events are hints for people and streams. The truth is the turn log: a watcher that misses events reads turns.
//! Invariants: publishing never blocks, and costs one atomic read while nobody watches and nobody thinks.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::broadcast;

use crate::{
    store::DeadLetter,
    types::{InstanceKey, StimulusId, TurnRecord},
};

/// Events a slow watcher may be behind before it is told to read the log instead.
const BACKLOG: usize = 256;

/// Something that happened to an instance.
#[derive(Debug, Clone)]
pub enum Event {
    /// A stimulus is durably accepted and waits (slow path only).
    Accepted(StimulusId),
    /// An engine began to think about it.
    Thinking(StimulusId),
    /// The next piece of the answer; `index` counts from 0 within the stimulus.
    Token {
        /// Which stimulus is being answered.
        stimulus: StimulusId,
        /// Position in the stream.
        index: u64,
        /// The text.
        text: Arc<str>,
    },
    /// The words so far are void; the stream begins again at index 0.
    Restart(StimulusId),
    /// A turn was committed.
    Turn(Arc<TurnRecord>),
    /// A stimulus was given up.
    Dead(Arc<DeadLetter>),
    /// The profile was replaced.
    Profile,
    /// The instance was forgotten. Nothing follows.
    Forgotten,
}

/// The answer being thought.
#[derive(Debug, Clone)]
pub struct Draft {
    /// To which stimulus.
    pub stimulus: StimulusId,
    /// Its pieces so far; the position is the index.
    pub tokens: Vec<Arc<str>>,
}

/// A watch on one instance. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    /// The answer that was being thought when the watch began; the events that follow continue it without gap.
    pub draft: Option<Draft>,
    /// Events from then on. `Lagged` means: read the log.
    pub events: broadcast::Receiver<Event>,
    key: InstanceKey,
    hub: Hub,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.hub.unwatch(&self.key);
    }
}

#[derive(Debug, Default)]
struct Entry {
    sender: Option<broadcast::Sender<Event>>,
    watchers: usize,
    draft: Option<Draft>,
}

/// All watches of a node. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Hub(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Number of entries, read without the lock.
    entries: AtomicUsize,
    map: Mutex<HashMap<InstanceKey, Entry>>,
}

impl Hub {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<InstanceKey, Entry>) -> T) -> T {
        let mut map = self.0.map.lock().unwrap_or_else(PoisonError::into_inner);
        let out = act(&mut map);
        self.0.entries.store(map.len(), Ordering::Release);
        out
    }

    /// Begins to watch an instance, whether it is active or not.
    pub fn watch(&self, key: &InstanceKey) -> Watch {
        self.with(|map| {
            let entry = map.entry(key.clone()).or_default();
            entry.watchers += 1;
            let sender = entry.sender.get_or_insert_with(|| broadcast::channel(BACKLOG).0);
            Watch { draft: entry.draft.clone(), events: sender.subscribe(), key: key.clone(), hub: self.clone() }
        })
    }

    fn unwatch(&self, key: &InstanceKey) {
        self.with(|map| {
            if let Some(entry) = map.get_mut(key) {
                entry.watchers = entry.watchers.saturating_sub(1);
                if entry.watchers == 0 {
                    entry.sender = None;
                    if entry.draft.is_none() {
                        map.remove(key);
                    }
                }
            }
        });
    }

    /// Tells the watchers of an instance, and keeps the draft of its answer in step.
    pub fn publish(&self, key: &InstanceKey, event: impl FnOnce() -> Event) {
        if self.0.entries.load(Ordering::Acquire) == 0 {
            return;
        }
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            let event = event();
            match &event {
                Event::Turn(turn) => {
                    entry.draft.take_if(|draft| draft.stimulus == turn.stimulus.id);
                }
                Event::Dead(dead) => {
                    entry.draft.take_if(|draft| draft.stimulus == dead.stimulus.id);
                }
                _ => {}
            }
            if let Some(sender) = &entry.sender {
                drop(sender.send(event));
            }
            if entry.watchers == 0 && entry.draft.is_none() {
                map.remove(key);
            }
        });
    }

    /// An engine begins to answer: words are kept from here on, so that a watcher who comes late misses none.
    pub fn begin_draft(&self, key: &InstanceKey, stimulus: &StimulusId) {
        self.with(|map| {
            let entry = map.entry(key.clone()).or_default();
            entry.draft = Some(Draft { stimulus: stimulus.clone(), tokens: Vec::new() });
            if let Some(sender) = &entry.sender {
                drop(sender.send(Event::Thinking(stimulus.clone())));
            }
        });
    }

    /// The next piece of the answer.
    pub fn token(&self, key: &InstanceKey, text: &str) {
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            let Some(draft) = &mut entry.draft else { return };
            let text: Arc<str> = Arc::from(text);
            let event =
                Event::Token { stimulus: draft.stimulus.clone(), index: draft.tokens.len() as u64, text: text.clone() };
            draft.tokens.push(text);
            if let Some(sender) = &entry.sender {
                drop(sender.send(event));
            }
        });
    }

    /// The words so far are void.
    pub fn restart_draft(&self, key: &InstanceKey) {
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            let Some(draft) = &mut entry.draft else { return };
            draft.tokens.clear();
            let stimulus = draft.stimulus.clone();
            if let Some(sender) = &entry.sender {
                drop(sender.send(Event::Restart(stimulus)));
            }
        });
    }

    /// The answer was given up without a turn (passivation, shutdown).
    pub fn end_draft(&self, key: &InstanceKey) {
        self.with(|map| {
            if let Some(entry) = map.get_mut(key) {
                entry.draft = None;
                if entry.watchers == 0 {
                    map.remove(key);
                }
            }
        });
    }

    /// Number of instances watched or thinking.
    pub fn len(&self) -> usize {
        self.0.entries.load(Ordering::Acquire)
    }

    /// Whether nobody watches and nobody thinks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    #[test]
    fn a_late_watcher_gets_the_words_so_far_and_then_the_rest() {
        let hub = Hub::default();
        let id = StimulusId::generate();
        hub.begin_draft(&key(), &id);
        hub.token(&key(), "a");
        let mut watch = hub.watch(&key());
        hub.token(&key(), "b");
        assert_eq!(watch.draft.as_ref().unwrap().tokens.len(), 1);
        let Event::Token { index, text, .. } = watch.events.try_recv().unwrap() else { panic!("a token was due") };
        assert_eq!((index, &*text), (1, "b"));
    }

    #[test]
    fn nothing_is_kept_when_nobody_watches_or_thinks() {
        let hub = Hub::default();
        drop(hub.watch(&key()));
        assert!(hub.is_empty());
        hub.begin_draft(&key(), &StimulusId::generate());
        assert_eq!(hub.len(), 1);
        hub.end_draft(&key());
        assert!(hub.is_empty());
    }
}
