//! Watching instances of other nodes: their owner tells what happens, and the hub here tells it on as if it happened here.
//!
//! Owns: who here watches what of other nodes ([`Audience`]), and what of this node others watch. Not here: watches and drafts
//! themselves (`instance::events`), streams to clients (`gateway`). What is told is a hint: a stream that misses it asks the
//! store. A watch is said again now and then, so that it follows the instance when it moves; one not said again ends.
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
    said: Option<(NodeId, Instant)>,
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
            let _ = tokio::time::timeout(AGAIN / 2, self.0.changed.notified()).await;
            let now = Instant::now();
            self.wanted().retain(|key, wanted| self.say_one(key, wanted, now));
        }
    }

    /// Whether it is still wanted.
    fn say_one(&self, key: &InstanceKey, wanted: &mut Wanted, now: Instant) -> bool {
        if wanted.over {
            if let Some((node, _)) = &wanted.said {
                self.tell(node, key, Duration::ZERO);
            }
            return false;
        }
        let Owner::Node { node, .. } = self.0.forwarder.owner_of(key) else {
            wanted.said = None;
            return true;
        };
        let due = wanted.said.as_ref().is_none_or(|(said, at)| *said != node || now.duration_since(*at) >= AGAIN);
        if due && self.tell(&node, key, LASTS) {
            wanted.said = Some((node, now));
        }
        true
    }

    fn tell(&self, node: &NodeId, key: &InstanceKey, lasts: Duration) -> bool {
        let for_ms = u32::try_from(lasts.as_millis()).unwrap_or(u32::MAX);
        let watch = message::Watch { key: key.clone(), for_ms };
        self.0.forwarder.bus().send(node, &Message::Watch(watch)).is_ok()
    }

    fn follow(&self, from: &NodeId, message::Events { key, draft, events }: message::Events) {
        let draft = draft.map(|draft| Draft { stimulus: draft.stimulus, tokens: draft.tokens });
        let events = events.into_iter().map(happened).collect();
        if !self.0.hub.follow(&key, draft, events) {
            self.tell(from, &key, LASTS);
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
        if lasts.is_zero() || lent.len() >= MOST || self.0.forwarder.owner_of(&name.1) != Owner::Here {
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
        self.send(to, key, watch.draft.take(), Vec::new());
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
            if self.0.forwarder.owner_of(key) != Owner::Here {
                return;
            }
            match event {
                Some(Ok(first)) => {
                    let events = more(first, &mut watch);
                    self.send(to, key, None, events);
                }
                Some(Err(RecvError::Lagged(_))) => {
                    watch = self.0.hub.watch_for_another(key);
                    self.send(to, key, watch.draft.take(), Vec::new());
                }
                Some(Err(RecvError::Closed)) => return,
                None => self.send(to, key, self.0.hub.watch_for_another(key).draft.take(), Vec::new()),
            }
        }
    }

    /// Events that are too large for a message are left out: whoever follows reads the log.
    fn send(&self, to: &NodeId, key: &InstanceKey, draft: Option<Draft>, events: Vec<Happened>) {
        if draft.is_none() && events.is_empty() {
            return;
        }
        let draft = draft.map(|draft| message::Draft { stimulus: draft.stimulus, tokens: draft.tokens });
        let bus = self.0.forwarder.bus();
        let message = Message::Events(message::Events { key: key.clone(), draft, events });
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

/// What is there already goes with it.
fn more(first: Event, watch: &mut Watch) -> Vec<Happened> {
    let rest = std::iter::from_fn(|| watch.events.try_recv().ok());
    std::iter::once(first).chain(rest).take(MOST_EVENTS).map(wire).collect()
}

fn wire(event: Event) -> Happened {
    match event {
        Event::Accepted(stimulus) => Happened::Accepted(stimulus),
        Event::Thinking(stimulus) => Happened::Thinking(stimulus),
        Event::Token { stimulus, index, text } => Happened::Token { stimulus, index, text },
        Event::Restart(stimulus) => Happened::Restart(stimulus),
        Event::Turn(turn) => Happened::Turn(Record(turn)),
        Event::Dead(letter) => Happened::Dead(Box::new(Letter::from(&*letter))),
        Event::Profile => Happened::Profile,
        Event::Forgotten => Happened::Forgotten,
    }
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
