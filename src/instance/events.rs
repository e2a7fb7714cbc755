//! What happens to instances, for those who watch: accepted, thinking, words, turns, dead letters.
//!
//! Events are hints for people and streams. The truth is the turn log: a watcher that misses events reads turns.
//! Invariants: publishing never blocks, and costs one atomic read while nobody watches and nobody thinks.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
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
    /// It lived on another node, and what happened there may not have been told: the store knows.
    Missed,
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
    /// Whether it is somebody's of this node, not one on behalf of another.
    own: bool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.hub.unwatch(&self.key, self.own);
    }
}

/// Port: wants to know what is watched on this node, because it may happen on another. Implemented by `cluster`.
pub trait Audience: Send + Sync + 'static {
    /// The first watcher of an instance came, or the last one went. Must not block and must not use the hub.
    fn changed(&self, key: &InstanceKey, watched: bool);
}

#[derive(Debug, Default)]
struct Entry {
    sender: Option<broadcast::Sender<Event>>,
    watchers: usize,
    /// Those of them that are not on behalf of other nodes.
    own: usize,
    draft: Option<Draft>,
    /// How many of the draft's words are of committed steps.
    kept: usize,
    /// Whether the draft is another node's: then it goes with the last watcher.
    followed: bool,
}

impl Entry {
    fn tell(&self, event: Event) {
        if let Some(sender) = &self.sender {
            drop(sender.send(event));
        }
    }
}

impl Entry {
    /// Tells all words of the draft once more.
    fn say_again(&self) {
        let Some(draft) = &self.draft else { return };
        for (index, text) in (0..).zip(&draft.tokens) {
            self.tell(Event::Token { stimulus: draft.stimulus.clone(), index, text: text.clone() });
        }
    }

    /// Takes the answer as another node has it: the rest of what is here, or a new beginning.
    fn catch_up(&mut self, draft: Draft) {
        let have = match &mut self.draft {
            Some(here) if here.stimulus == draft.stimulus && draft.tokens.starts_with(&here.tokens) => {
                here.tokens.len()
            }
            Some(here) if here.stimulus == draft.stimulus => {
                here.tokens.clear();
                self.tell(Event::Restart(draft.stimulus.clone()));
                0
            }
            _ => {
                self.tell(Event::Thinking(draft.stimulus.clone()));
                0
            }
        };
        for (index, text) in (0..).zip(&draft.tokens).skip(have) {
            self.tell(Event::Token { stimulus: draft.stimulus.clone(), index, text: text.clone() });
        }
        self.draft = Some(draft);
    }

    /// Takes what happened on another node. False when words before it are missing.
    fn take(&mut self, event: Event) -> bool {
        let (mut known, mut missing) = (false, false);
        match &event {
            Event::Thinking(stimulus) => {
                let void =
                    self.draft.take().is_some_and(|draft| draft.stimulus == *stimulus && !draft.tokens.is_empty());
                if void {
                    self.tell(Event::Restart(stimulus.clone()));
                }
                self.draft = Some(Draft { stimulus: stimulus.clone(), tokens: Vec::new() });
            }
            Event::Token { stimulus, index, text } => match &mut self.draft {
                Some(draft) if draft.stimulus == *stimulus => {
                    let have = draft.tokens.len() as u64;
                    (known, missing) = (*index < have, *index > have);
                    if *index == have {
                        draft.tokens.push(text.clone());
                    }
                }
                _ => missing = true,
            },
            Event::Restart(stimulus) => {
                if let Some(draft) = self.draft.as_mut().filter(|draft| draft.stimulus == *stimulus) {
                    draft.tokens.clear();
                }
            }
            Event::Turn(turn) => drop(self.draft.take_if(|draft| draft.stimulus == turn.stimulus.id)),
            Event::Dead(dead) => drop(self.draft.take_if(|draft| draft.stimulus == dead.stimulus.id)),
            Event::Accepted(_) | Event::Profile | Event::Forgotten | Event::Missed => {}
        }
        if !known && !missing {
            self.tell(event);
        }
        !missing
    }
}

/// All watches of a node. Cheap to clone.
#[derive(Clone, Default)]
pub struct Hub(Arc<Inner>);

#[derive(Default)]
struct Inner {
    /// Number of entries, read without the lock.
    entries: AtomicUsize,
    map: Mutex<HashMap<InstanceKey, Entry>>,
    audience: OnceLock<Arc<dyn Audience>>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({})", self.len())
    }
}

impl Hub {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<InstanceKey, Entry>) -> T) -> T {
        let mut map = self.0.map.lock().unwrap_or_else(PoisonError::into_inner);
        let out = act(&mut map);
        self.0.entries.store(map.len(), Ordering::Release);
        out
    }

    /// Begins to watch an instance, whether it is active or not, and wherever it lives.
    pub fn watch(&self, key: &InstanceKey) -> Watch {
        self.begin(key, true)
    }

    /// As [`Hub::watch`], on behalf of another node: what is watched so is watched there, not here.
    pub fn watch_for_another(&self, key: &InstanceKey) -> Watch {
        self.begin(key, false)
    }

    /// From here on `audience` is told what is watched here. Only the first one is.
    pub fn set_audience(&self, audience: Arc<dyn Audience>) {
        drop(self.0.audience.set(audience));
    }

    fn begin(&self, key: &InstanceKey, own: bool) -> Watch {
        self.with(|map| {
            let entry = map.entry(key.clone()).or_default();
            entry.watchers += 1;
            entry.own += usize::from(own);
            if own && entry.own == 1 {
                self.changed(key, true);
            }
            let sender = entry.sender.get_or_insert_with(|| broadcast::channel(BACKLOG).0);
            let (draft, events) = (entry.draft.clone(), sender.subscribe());
            Watch { draft, events, key: key.clone(), hub: self.clone(), own }
        })
    }

    fn unwatch(&self, key: &InstanceKey, own: bool) {
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            entry.watchers = entry.watchers.saturating_sub(1);
            entry.own = entry.own.saturating_sub(usize::from(own));
            if own && entry.own == 0 {
                self.changed(key, false);
            }
            if entry.watchers == 0 {
                entry.sender = None;
                if entry.draft.is_none() || entry.followed {
                    map.remove(key);
                }
            }
        });
    }

    fn changed(&self, key: &InstanceKey, watched: bool) {
        if let Some(audience) = self.0.audience.get() {
            audience.changed(key, watched);
        }
    }

    /// What happened to an instance on another node, in order: the answer being thought there, if it is told, and what came
    /// after it. False when something is missing in between, so that the answer should be told again.
    pub fn follow(&self, key: &InstanceKey, draft: Option<Draft>, events: Vec<Event>) -> bool {
        self.with(|map| {
            let Some(entry) = map.get_mut(key).filter(|entry| entry.watchers > 0) else { return true };
            entry.followed = true;
            if let Some(draft) = draft {
                entry.catch_up(draft);
            }
            // All are taken, also after a gap: what follows may stand by itself.
            let missing = events.into_iter().map(|event| entry.take(event)).filter(|whole| !whole).count();
            missing == 0
        })
    }

    /// Tells the watchers of an instance that something may have happened which they were not told.
    pub fn missed(&self, key: &InstanceKey) {
        self.with(|map| map.get(key).into_iter().for_each(|entry| entry.tell(Event::Missed)));
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
            entry.tell(event);
            if entry.watchers == 0 && entry.draft.is_none() {
                map.remove(key);
            }
        });
    }

    /// An engine begins to answer, or goes on after these words of committed steps: words are kept from here on, so that a
    /// watcher who comes late misses none.
    pub fn begin_draft(&self, key: &InstanceKey, stimulus: &StimulusId, said: Vec<Arc<str>>) {
        self.with(|map| {
            let entry = map.entry(key.clone()).or_default();
            entry.kept = said.len();
            entry.draft = Some(Draft { stimulus: stimulus.clone(), tokens: said });
            entry.followed = false;
            entry.tell(Event::Thinking(stimulus.clone()));
            entry.say_again();
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

    /// The words so far are of committed steps: they are not taken back any more.
    pub fn keep_draft(&self, key: &InstanceKey) {
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            entry.kept = entry.draft.as_ref().map_or(0, |draft| draft.tokens.len());
        });
    }

    /// The words since the last committed step are void.
    pub fn restart_draft(&self, key: &InstanceKey) {
        self.with(|map| {
            let Some(entry) = map.get_mut(key) else { return };
            let Some(draft) = &mut entry.draft else { return };
            draft.tokens.truncate(entry.kept);
            let stimulus = draft.stimulus.clone();
            entry.tell(Event::Restart(stimulus));
            entry.say_again();
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
        hub.begin_draft(&key(), &id, Vec::new());
        hub.token(&key(), "a");
        let mut watch = hub.watch(&key());
        hub.token(&key(), "b");
        assert_eq!(watch.draft.as_ref().unwrap().tokens.len(), 1);
        let Event::Token { index, text, .. } = watch.events.try_recv().unwrap() else { panic!("a token was due") };
        assert_eq!((index, &*text), (1, "b"));
    }

    fn token(stimulus: &StimulusId, index: u64, text: &str) -> Event {
        Event::Token { stimulus: stimulus.clone(), index, text: text.into() }
    }

    fn told(watch: &mut Watch) -> Vec<String> {
        let events = std::iter::from_fn(|| watch.events.try_recv().ok());
        events
            .map(|event| match event {
                Event::Token { index, text, .. } => format!("{index}{text}"),
                Event::Thinking(_) => "thinking".into(),
                Event::Restart(_) => "restart".into(),
                other => panic!("nobody told {other:?}"),
            })
            .collect()
    }

    #[test]
    fn what_happens_on_another_node_is_told_once_and_gaps_are_seen() {
        let (hub, id) = (Hub::default(), StimulusId::generate());
        let mut watch = hub.watch(&key());
        assert!(hub.follow(&key(), None, vec![Event::Thinking(id.clone()), token(&id, 0, "a")]));
        let draft = |words: &[&str]| {
            let tokens = words.iter().map(|word| Arc::from(*word)).collect();
            Some(Draft { stimulus: id.clone(), tokens })
        };
        assert!(hub.follow(&key(), draft(&["a", "b"]), vec![token(&id, 1, "b"), token(&id, 2, "c")]));
        assert_eq!(told(&mut watch), ["thinking", "0a", "1b", "2c"]);
        assert!(!hub.follow(&key(), None, vec![token(&id, 5, "f")]), "words are missing");
        assert!(hub.follow(&key(), draft(&["x"]), Vec::new()), "the answer was begun anew");
        assert_eq!(told(&mut watch), ["restart", "0x"]);
        assert_eq!(hub.watch(&key()).draft.as_ref().unwrap().tokens.len(), 1);
        drop(watch);
        assert!(hub.is_empty(), "another node's answer is not kept for nobody");
    }

    #[test]
    fn the_audience_knows_what_is_watched_here() {
        #[derive(Default)]
        struct Heard(Mutex<Vec<bool>>);
        impl Audience for Heard {
            fn changed(&self, _: &InstanceKey, watched: bool) {
                self.0.lock().unwrap().push(watched);
            }
        }
        let (hub, heard) = (Hub::default(), Arc::new(Heard::default()));
        hub.set_audience(heard.clone());
        let for_another = hub.watch_for_another(&key());
        let (one, two) = (hub.watch(&key()), hub.watch(&key()));
        drop((one, for_another, two));
        assert_eq!(*heard.0.lock().unwrap(), [true, false]);
    }

    #[test]
    fn nothing_is_kept_when_nobody_watches_or_thinks() {
        let hub = Hub::default();
        drop(hub.watch(&key()));
        assert!(hub.is_empty());
        hub.begin_draft(&key(), &StimulusId::generate(), Vec::new());
        assert_eq!(hub.len(), 1);
        hub.end_draft(&key());
        assert!(hub.is_empty());
    }
}
