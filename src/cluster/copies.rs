//! States of instances that other nodes own: kept here, and served after their owner said that nothing is newer.
//!
//! Owns: asking owners ([`Copies::read`]) in batches, answering other nodes, telling them what changed. Not here: what is held
//! (`scaling::cache`), who owns what (`Owners`), which reads come one after the other ([`rounds`]).
//!
//! Where nothing is held, the second tier is looked at first: what it has is not known to be the newest, either, and the owner then
//! need not send the state, but only say so.
//!
//! Invariants: what is answered to a read was asked for after the read began, so it is never older than what was acknowledged
//! before; whatever cannot be had from the owner in time is read in the store; nothing is asked of a node that does not know the
//! question (protocol 3).
//! Tests: at the foot of `rounds`; `tests/it/cache.rs`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc, oneshot},
};

use super::{
    bus::{
        Bus, Message,
        message::{Check, Checked, Copy, Print, Stale, Stands},
    },
    calls::Calls,
    forward::{Owner, Owners},
};
use crate::{
    instance::{Error, environment::Environment},
    runtime::drain::Drain,
    scaling::cache::Answer,
    types::{InstanceKey, NodeId, StateSnapshot},
};

pub mod rounds;

use rounds::{Enter, Rounds, Told};

/// Most questions of one message.
const MOST_ITEMS: usize = 128;
/// Most messages to other nodes without an answer, and most of other nodes that are being answered.
const MOST_CALLS: usize = 1024;
/// Most bytes of states in one answer; whoever gets none reads the store.
const MOST_BYTES: usize = 512 * 1024;
/// States of which other nodes are still to be told that they changed.
const MOST_STALE: usize = 16_384;

/// The epoch under which an instance is served here, if it is.
pub type Served = Box<dyn Fn(&InstanceKey) -> Option<u64> + Send + Sync>;

/// What copies stand on.
pub struct Parts {
    /// What instances share: the cache and the store.
    pub environment: Arc<Environment>,
    /// Who owns what.
    pub owners: Arc<dyn Owners>,
    /// The way to other nodes.
    pub bus: Arc<dyn Bus>,
    /// What is served here.
    pub served: Served,
    /// Whether every node of the cluster knows the question.
    pub understood: Box<dyn Fn() -> bool + Send + Sync>,
    /// How long an owner may take to answer.
    pub answer: Duration,
    /// A fault for tests: what others say is stale is not heard.
    pub deaf: bool,
    /// Where tasks run.
    pub handle: Handle,
}

/// Questions by the node they are for, with those who wait for the answers.
type Asking = HashMap<NodeId, Vec<(Copy, oneshot::Sender<Stands>)>>;

/// Copies of states. Cheap to clone.
#[derive(Clone)]
pub struct Copies(Arc<Inner>);

struct Inner {
    parts: Parts,
    rounds: Mutex<Rounds<End>>,
    calls: Calls<Vec<Stands>>,
    /// What is to be asked of each node with the next message.
    asking: Mutex<Asking>,
    serving: Arc<Semaphore>,
}

/// How a read ended, and what it was answered from.
type End = (Result<Option<Arc<StateSnapshot>>, Error>, Of);

/// What a read was answered from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    /// A copy, and its owner vouched for it.
    Copy,
    /// One from the second tier, likewise.
    Second,
    /// The owner or the store.
    Source,
}

impl Copies {
    /// Copies that nobody tells of changes yet: see [`Copies::tell`].
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(Inner {
            parts,
            rounds: Mutex::default(),
            calls: Calls::new(MOST_CALLS),
            asking: Mutex::default(),
            serving: Arc::new(Semaphore::new(MOST_CALLS)),
        }))
    }

    /// From here on other nodes are told what changes here that they may hold, until the drain says stop.
    pub fn tell(&self, drain: &Drain) {
        let (sender, stale) = mpsc::channel(MOST_STALE);
        // A full queue loses it: whoever holds it asks before it is served, or lets it go when its time is over.
        self.0.parts.environment.states.on_stale(Box::new(move |key, version| {
            let _ = sender.try_send(Stale { key: key.clone(), version });
        }));
        let (copies, drain) = (self.clone(), drain.clone());
        self.0.parts.handle.spawn(async move {
            tokio::select! { () = copies.broadcast(stale) => {}, () = drain.stopped() => {} }
        });
    }

    async fn broadcast(&self, mut stale: mpsc::Receiver<Stale>) {
        let mut batch = Vec::new();
        while stale.recv_many(&mut batch, MOST_ITEMS).await > 0 {
            let count = batch.len() as u64;
            if self.0.parts.bus.broadcast(&Message::Invalidate(std::mem::take(&mut batch))).is_ok() {
                self.0.parts.environment.cache.told_stale(count);
            }
        }
    }

    /// The state of an instance that is not served here. `eventual`: one that is held and fresh will do.
    ///
    /// # Errors
    /// Those of the store.
    pub async fn read(&self, key: &InstanceKey, eventual: bool) -> Result<Option<Arc<StateSnapshot>>, Error> {
        let states = &self.0.parts.environment.states;
        if (eventual || states.is_blind())
            && let Some((state, fresh)) = states.copy(key)
            && (fresh || states.is_blind())
        {
            states.served(false);
            return Ok(Some(state));
        }
        let (end, from) = self.in_round(key).await;
        if from == Of::Copy {
            states.served(true);
        } else {
            states.missed();
            states.seconded(from == Of::Second);
        }
        end
    }

    /// One asks at a time; those who come meanwhile share the next answer, which was asked for after they came.
    async fn in_round(&self, key: &InstanceKey) -> End {
        loop {
            let entered = self.rounds().enter(key);
            let sharing = match entered {
                Enter::Lead => Vec::new(),
                Enter::Wait(told) => match told.await {
                    Ok(Told::Lead(sharing)) => sharing,
                    Ok(Told::End(end)) => return end,
                    // Whoever was to share their answer gave up.
                    Err(_) => continue,
                },
            };
            let round = Round { copies: self, key };
            let end = self.ask_or_load(key).await;
            drop(round);
            for waits in sharing {
                let _ = waits.send(Told::End(end.clone()));
            }
            return end;
        }
    }

    async fn ask_or_load(&self, key: &InstanceKey) -> End {
        let environment = &self.0.parts.environment;
        let states = &environment.states;
        let asked = states.now();
        let held = match states.copy(key) {
            Some((state, fresh)) => Some((state, fresh, Of::Copy)),
            None => states.second(key).await.map(|state| (state, false, Of::Second)),
        };
        let print = held.as_ref().map(|(state, ..)| Print { version: state.version, digest: state.digest() });
        match (self.ask(key, print).await, held) {
            (Some(Stands::Same), Some((state, fresh, from))) => {
                states.answered(Answer::Same);
                if !fresh {
                    states.keep(key, &state, asked, from == Of::Second);
                }
                (Ok(Some(state)), from)
            }
            (Some(Stands::Newer { version, turn, doc }), _) => {
                states.answered(Answer::Newer);
                let state = Arc::new(StateSnapshot::new(version, turn, doc));
                states.keep(key, &state, asked, false);
                (Ok(Some(state)), Of::Source)
            }
            (Some(Stands::Gone), _) => {
                states.answered(Answer::Gone);
                states.stale(key, None);
                (Ok(None), Of::Source)
            }
            _ => match environment.store.state(key).await {
                Ok(state) => {
                    states.answered(Answer::Store);
                    let state = state.map(Arc::new);
                    match &state {
                        Some(state) => states.keep(key, state, asked, false),
                        None => states.stale(key, None),
                    }
                    (Ok(state), Of::Source)
                }
                Err(error) => (Err(error.into()), Of::Source),
            },
        }
    }

    /// Asks the owner; nothing when it cannot be had, or not in time.
    async fn ask(&self, key: &InstanceKey, held: Option<Print>) -> Option<Stands> {
        let parts = &self.0.parts;
        let Owner::Node { node, .. } = parts.owners.owner(parts.owners.shard_of(key)) else { return None };
        if !(parts.understood)() {
            return None;
        }
        let (answer, told) = oneshot::channel();
        let first = {
            let mut asking = self.asking();
            let batch = asking.entry(node.clone()).or_default();
            batch.push((Copy { key: key.clone(), held }, answer));
            batch.len() == 1
        };
        if first {
            let copies = self.clone();
            parts.handle.spawn(async move { copies.send(node).await });
        }
        told.await.ok()
    }

    /// Sends what is to be asked of a node, and hands out the answers.
    async fn send(&self, node: NodeId) {
        // What others want at the same moment goes with it.
        tokio::task::yield_now().await;
        let Some(mut batch) = self.asking().remove(&node) else { return };
        let mut sent = Vec::new();
        while !batch.is_empty() {
            let rest = batch.split_off(batch.len().min(MOST_ITEMS));
            sent.push(self.send_one(&node, std::mem::replace(&mut batch, rest)));
        }
        join_all(sent).await;
    }

    async fn send_one(&self, node: &NodeId, batch: Vec<(Copy, oneshot::Sender<Stands>)>) {
        let parts = &self.0.parts;
        let (items, waiting): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
        // Dropping those who wait sends them to the store.
        let Ok(call) = self.0.calls.open(node) else { return };
        let within_ms = u32::try_from(parts.answer.as_millis()).unwrap_or(u32::MAX);
        if parts.bus.send(node, &Message::Check(Check { call: call.id(), within_ms, items })).is_err() {
            return;
        }
        let Ok(answers) = call.within(parts.answer).await else { return };
        for (waits, stands) in waiting.into_iter().zip(answers) {
            let _ = waits.send(stands);
        }
    }

    /// Takes a message about copies; gives back any other.
    ///
    /// # Errors
    /// The message, when it is about something else.
    #[allow(clippy::result_large_err)] // it goes on to whoever wants it
    pub fn hear(&self, from: &NodeId, age_ms: u64, message: Message) -> Result<(), Message> {
        match message {
            Message::Check(check) if age_ms < u64::from(check.within_ms) => self.answer(from.clone(), check),
            // Whoever asked has given up.
            Message::Check(_) => {}
            Message::Checked(checked) => drop(self.0.calls.answer(from, checked.call, checked.items)),
            Message::Invalidate(_) if self.0.parts.deaf => {}
            Message::Invalidate(stale) => {
                for Stale { key, version } in stale {
                    self.0.parts.environment.states.stale(&key, version);
                }
            }
            other => return Err(other),
        }
        Ok(())
    }

    /// What was asked of a node, or of any, may never have arrived.
    pub fn lost(&self, to: Option<&NodeId>) {
        self.0.calls.lost(to);
    }

    /// Another node asks whether its copies are the newest.
    fn answer(&self, from: NodeId, check: Check) {
        // Too much to do: it reads the store.
        let Ok(permit) = self.0.serving.clone().try_acquire_owned() else { return };
        let copies = self.clone();
        self.0.parts.handle.spawn(async move {
            let answers = check.items.iter().map(|item| copies.stands(item));
            let mut items = join_all(answers).await;
            let mut bytes = 0;
            for stands in &mut items {
                if let Stands::Newer { doc, .. } = stands {
                    bytes += doc.get().len();
                    if bytes > MOST_BYTES {
                        *stands = Stands::InStore;
                    }
                }
            }
            copies.0.parts.bus.hint(&from, &Message::Checked(Checked { call: check.call, items }));
            drop(permit);
        });
    }

    async fn stands(&self, Copy { key, held }: &Copy) -> Stands {
        let environment = &self.0.parts.environment;
        let Some(epoch) = (self.0.parts.served)(key) else { return Stands::NotMine };
        // Before it is read: a commit from here on is told.
        environment.states.lend(key);
        let state = match environment.states.owned(key, epoch) {
            Some(state) => Some(state),
            None => match environment.states.load_owned(key, epoch, || environment.store.state(key)).await {
                Ok(state) => state,
                Err(_) => return Stands::InStore,
            },
        };
        // What was loaded from the store while the shard went elsewhere is another's to vouch for.
        if (self.0.parts.served)(key) != Some(epoch) {
            return Stands::NotMine;
        }
        match (state, held) {
            (None, _) => Stands::Gone,
            (Some(state), Some(held)) if held.version == state.version && held.digest == state.digest() => Stands::Same,
            (Some(state), _) => Stands::Newer { version: state.version, turn: state.turn, doc: state.doc.clone() },
        }
    }

    fn rounds(&self) -> MutexGuard<'_, Rounds<End>> {
        self.0.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn asking(&self) -> MutexGuard<'_, Asking> {
        self.0.asking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A round under way: when it is dropped, also by a reader that gives up, those who wait go on.
struct Round<'a> {
    copies: &'a Copies,
    key: &'a InstanceKey,
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        self.copies.rounds().end(self.key);
    }
}
