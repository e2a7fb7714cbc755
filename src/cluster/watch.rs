//! Watching instances of other nodes: their owner tells what happens, and the hub here tells it on as if it happened here.
//!
//! Owns: who here watches what of other nodes ([`Audience`]), and what of this node others watch. Not here: watches and drafts
//! themselves (`instance::events`), streams to clients (`gateway`). What is told is a hint: a stream that misses it asks the
//! store. A watch is said again now and then, so that it follows the instance when it moves; one not said again ends. An owner
//! answers a watch at once, with no events if there is nothing to tell: from then on nothing is missed, and what happened
//! before is in the store.
//! Tests: `tests/it/forward.rs`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, broadcast::error::RecvError};

use super::{
    bus::{
        Error, Message,
        message::{self, Happened, Letter, Record},
    },
    forward::{Forwarder, Owner},
};
use crate::{
    instance::events::{Audience, Draft, Event, Hub, Watch},
    runtime::drain::Drain,
    types::{InstanceKey, NodeId},
};

/// A watch ends when it is not said again for so long.
const LASTS: Duration = Duration::from_secs(30);
/// It is said again this often.
const AGAIN: Duration = Duration::from_secs(10);
/// Until its owner answers, so soon at first, then after pauses that double: it may have heard of the watch before it had
/// opened the shard.
const UNANSWERED: Duration = Duration::from_millis(250);
/// Most instances watched from here on other nodes, and most watches of other nodes here.
const MOST: usize = 16_384;
/// Most events of one message.
const MOST_EVENTS: usize = 256;

/// Watches across nodes. Cheap to clone.
#[derive(Clone)]
pub struct Watches(Arc<Inner>);

struct Inner {
    hub: Hub,
    forwarder: Forwarder,
    /// What is watched here, and to whom that was said, when.
    wanted: Mutex<HashMap<InstanceKey, Wanted>>,
    /// Who watches what of this node.
    lent: Mutex<HashMap<(NodeId, InstanceKey), Arc<Lent>>>,
    changed: Notify,
    handle: tokio::runtime::Handle,
}

#[derive(Default)]
struct Wanted {
    over: bool,
    /// Whether it may have happened elsewhere since it was last known to happen here.
    away: bool,
    said: Option<Said>,
}

/// A watch that an owner was told of.
struct Said {
    to: NodeId,
    at: Instant,
    /// When it is said again.
    pause: Duration,
}

impl Said {
    fn is_due(&self, owner: &NodeId, now: Instant) -> bool {
        self.to != *owner || now.duration_since(self.at) >= self.pause
    }

    /// The next pause, when the same owner is told once more.
    fn next_pause(last: Option<&Self>, owner: &NodeId) -> Duration {
        last.filter(|last| last.to == *owner).map_or(UNANSWERED, |last| (last.pause * 2).min(AGAIN))
    }
}

struct Lent {
    until: Mutex<Instant>,
    /// The watch was said again: the answer so far is wanted.
    again: Notify,
}

impl Watches {
    /// Watches of the hub's instances over the forwarder's bus, until the drain says stop.
    pub fn start(hub: &Hub, forwarder: &Forwarder, drain: &Drain, handle: &tokio::runtime::Handle) -> Self {
        let watches = Self(Arc::new(Inner {
            hub: hub.clone(),
            forwarder: forwarder.clone(),
            wanted: Mutex::default(),
            lent: Mutex::default(),
            changed: Notify::new(),
            handle: handle.clone(),
        }));
        hub.set_audience(Arc::new(watches.clone()));
        let (saying, drain) = (watches.clone(), drain.clone());
        handle.spawn(async move {
            tokio::select! { () = saying.say() => {}, () = drain.stopped() => {} }
        });
        watches
    }

    /// The table of owners changed: watches follow their instances.
    pub fn moved(&self) {
        self.0.changed.notify_one();
    }

    /// Takes a message about watches; gives back any other.
    ///
    /// # Errors
    /// The message, when it is about something else.
    #[allow(clippy::result_large_err)] // it goes on to whoever wants it
    pub fn hear(&self, from: NodeId, message: Message) -> Result<(), Message> {
        match message {
            Message::Watch(watch) => self.lend(from, watch.key, Duration::from_millis(watch.for_ms.into())),
            Message::Events(events) => self.follow(&from, events),
            other => return Err(other),
        }
        Ok(())
    }

    // What is watched here.

    /// Says to owners what is watched here: at once when that changes, and again now and then.
    async fn say(&self) {
        loop {
            let open = self.wanted().values().any(|wanted| wanted.said.as_ref().is_some_and(|said| said.pause < AGAIN));
            let pause = if open { UNANSWERED } else { AGAIN / 2 };
            let _ = tokio::time::timeout(pause, self.0.changed.notified()).await;
            let now = Instant::now();
            let mut came = Vec::new();
            self.wanted().retain(|key, wanted| {
                let owner = self.0.forwarder.owner_of(key);
                if std::mem::replace(&mut wanted.away, !is_here(&owner)) && is_here(&owner) {
                    came.push(key.clone());
                }
                self.say_one(key, wanted, owner, now)
            });
            // Only now: the hub is never used under the lock, which it takes itself.
            came.iter().for_each(|key| self.0.hub.missed(key));
        }
    }

    /// Whether it is still wanted.
    fn say_one(&self, key: &InstanceKey, wanted: &mut Wanted, owner: Owner, now: Instant) -> bool {
        if wanted.over {
            if let Some(said) = &wanted.said {
                self.tell(&said.to, key, Duration::ZERO);
            }
            return false;
        }
        let Owner::Node { node, .. } = owner else {
            wanted.said = None;
            return true;
        };
        let due = wanted.said.as_ref().is_none_or(|said| said.is_due(&node, now));
        if due && self.tell(&node, key, LASTS) {
            let pause = Said::next_pause(wanted.said.as_ref(), &node);
            wanted.said = Some(Said { to: node, at: now, pause });
        }
        true
    }

    fn tell(&self, node: &NodeId, key: &InstanceKey, lasts: Duration) -> bool {
        let for_ms = u32::try_from(lasts.as_millis()).unwrap_or(u32::MAX);
        let watch = message::Watch { key: key.clone(), for_ms };
        self.0.forwarder.bus().send(node, &Message::Watch(watch)).is_ok()
    }

    fn follow(&self, from: &NodeId, message::Events { key, draft, events }: message::Events) {
        let begins = events.is_empty();
        if let Some(said) = self.wanted().get_mut(&key).and_then(|wanted| wanted.said.as_mut())
            && said.to == *from
        {
            said.pause = AGAIN;
        }
        let draft = draft.map(|draft| Draft { stimulus: draft.stimulus, tokens: draft.tokens });
        let events = events.into_iter().map(happened).collect();
        if !self.0.hub.follow(&key, draft, events) {
            self.tell(from, &key, LASTS);
        }
        if begins {
            self.0.hub.missed(&key);
        }
    }

    fn wanted(&self) -> MutexGuard<'_, HashMap<InstanceKey, Wanted>> {
        self.0.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // What others watch here.

    fn lend(&self, to: NodeId, key: InstanceKey, lasts: Duration) {
        let mut lent = self.lent();
        let name = (to, key);
        let until = Instant::now() + lasts.min(LASTS);
        if let Some(already) = lent.get(&name) {
            *already.until.lock().unwrap_or_else(PoisonError::into_inner) = until;
            return already.again.notify_one();
        }
        if lasts.is_zero() || lent.len() >= MOST || !is_here(&self.0.forwarder.owner_of(&name.1)) {
            return;
        }
        let watch = Arc::new(Lent { until: Mutex::new(until), again: Notify::new() });
        lent.insert(name.clone(), watch.clone());
        let watches = self.clone();
        self.0.handle.spawn(async move {
            watches.tell_on(&name.0, &name.1, &watch).await;
            watches.lent().remove(&name);
        });
    }

    /// Tells another node what happens to an instance, while it wants to know and the instance is here.
    async fn tell_on(&self, to: &NodeId, key: &InstanceKey, lent: &Lent) {
        let mut watch = self.0.hub.watch_for_another(key);
        self.begin(to, key, watch.draft.take());
        loop {
            let until = *lent.until.lock().unwrap_or_else(PoisonError::into_inner);
            if until <= Instant::now() {
                return;
            }
            let event = tokio::select! {
                event = watch.events.recv() => Some(event),
                () = lent.again.notified() => None,
                () = tokio::time::sleep_until(until.into()) => continue,
            };
            if !is_here(&self.0.forwarder.owner_of(key)) {
                return;
            }
            match event {
                Some(Ok(first)) => {
                    let events = more(first, &mut watch);
                    if !events.is_empty() {
                        self.send(to, key, events);
                    }
                }
                Some(Err(RecvError::Lagged(_))) => {
                    watch = self.0.hub.watch_for_another(key);
                    self.begin(to, key, watch.draft.take());
                }
                Some(Err(RecvError::Closed)) => return,
                None => self.begin(to, key, self.0.hub.watch_for_another(key).draft.take()),
            }
        }
    }

    /// What is being answered, if anything is: from here on everything is told. A draft that is too large for a message is left
    /// out: its turn comes.
    fn begin(&self, to: &NodeId, key: &InstanceKey, draft: Option<Draft>) {
        let draft = draft.map(|draft| message::Draft { stimulus: draft.stimulus, tokens: draft.tokens });
        let events = |draft| Message::Events(message::Events { key: key.clone(), draft, events: Vec::new() });
        if let Err(Error::TooLarge(_)) = self.0.forwarder.bus().send(to, &events(draft)) {
            self.0.forwarder.bus().hint(to, &events(None));
        }
    }

    /// Events that are too large for a message are left out: whoever follows reads the log.
    fn send(&self, to: &NodeId, key: &InstanceKey, events: Vec<Happened>) {
        let bus = self.0.forwarder.bus();
        let message = Message::Events(message::Events { key: key.clone(), draft: None, events });
        if let Err(Error::TooLarge(_)) = bus.send(to, &message)
            && let Message::Events(message::Events { events, .. }) = message
            && events.len() > 1
        {
            for event in events {
                bus.hint(to, &Message::Events(message::Events { key: key.clone(), draft: None, events: vec![event] }));
            }
        }
    }

    fn lent(&self) -> MutexGuard<'_, HashMap<(NodeId, InstanceKey), Arc<Lent>>> {
        self.0.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Audience for Watches {
    fn changed(&self, key: &InstanceKey, watched: bool) {
        let mut wanted = self.wanted();
        if watched && (wanted.contains_key(key) || wanted.len() < MOST) {
            wanted.entry(key.clone()).or_default().over = false;
        } else if let Some(one) = wanted.get_mut(key) {
            one.over = true;
        }
        drop(wanted);
        self.0.changed.notify_one();
    }
}

/// Whether an instance with this owner lives here: also while its shard is being given away, until what is in hand is done.
fn is_here(owner: &Owner) -> bool {
    matches!(owner, Owner::Here | Owner::Leaving)
}

/// What is there already goes with it.
fn more(first: Event, watch: &mut Watch) -> Vec<Happened> {
    let rest = std::iter::from_fn(|| watch.events.try_recv().ok());
    std::iter::once(first).chain(rest).take(MOST_EVENTS).filter_map(wire).collect()
}

fn wire(event: Event) -> Option<Happened> {
    Some(match event {
        Event::Accepted(stimulus) => Happened::Accepted(stimulus),
        Event::Thinking(stimulus) => Happened::Thinking(stimulus),
        Event::Token { stimulus, index, text } => Happened::Token { stimulus, index, text },
        Event::Restart(stimulus) => Happened::Restart(stimulus),
        Event::Turn(turn) => Happened::Turn(Record(turn)),
        Event::Dead(letter) => Happened::Dead(Box::new(Letter::from(&*letter))),
        Event::Profile => Happened::Profile,
        Event::Forgotten => Happened::Forgotten,
        // Of matter to those here only: each node asks the store for itself.
        Event::Missed => return None,
    })
}

fn happened(happened: Happened) -> Event {
    match happened {
        Happened::Accepted(stimulus) => Event::Accepted(stimulus),
        Happened::Thinking(stimulus) => Event::Thinking(stimulus),
        Happened::Token { stimulus, index, text } => Event::Token { stimulus, index, text },
        Happened::Restart(stimulus) => Event::Restart(stimulus),
        Happened::Turn(turn) => Event::Turn(turn.0),
        Happened::Dead(letter) => Event::Dead(Arc::new((*letter).into())),
        Happened::Profile => Event::Profile,
        Happened::Forgotten => Event::Forgotten,
    }
}
