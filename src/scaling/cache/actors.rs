//! The actors of the cache: a supervisor over one for each tier. Hits never come here; misses, fills, invalidation and resizing
//! do.
//!
//! Owns: [`CacheSupervisor`], which keeps the others alive and tells figures; [`L1Actor`], which knows what is being loaded;
//! [`L2Actor`], which writes to the second tier and keeps its connection; [`L3Actor`], alone with its file on a thread of its
//! own. Not here: what any of them holds.
//!
//! Invariants: an actor that died is replaced within a second or by the next message, and costs nothing but what it had in hand;
//! a full mailbox is a miss, or a value that is not written. Tests: `tests`; `tests/it/cache.rs`.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use actix::prelude::*;
pub use actix_rt::ArbiterHandle;
use arc_swap::ArcSwapOption;
use tokio::sync::oneshot;

use super::{
    breaker::Breaker,
    entry::Entry,
    figures::{Figures, TIERS},
    flight::{Flights, Outcome, PATIENCE, Turn},
    l1::L1,
    l2::L2,
    shelf::{self, Shelf},
    slot::{Kind, Slot},
};
use crate::runtime::clock::Clock;

/// Those who may wait to join or end a load: more than a node takes at once.
const JOINS: usize = 131_072;
/// Values that may wait to be written to a lower tier, and reads of the third that may wait.
const WRITES: usize = 1024;
/// Writes to Redis under way at once.
const UNDER_WAY: usize = 256;
/// How long a state stays in Redis, in milliseconds: nobody takes it from there who does not know, or is not told, that it is the
/// newest. How long it may be served unasked is another matter, and shorter.
const STATE_MS: i64 = 3_600_000;
/// How often the tiers are looked after.
const TICK: Duration = Duration::from_secs(1);

/// What the actors work on.
pub(super) struct Parts {
    /// The first tier.
    pub l1: L1,
    /// The second tier.
    pub l2: L2,
    /// The folder of the third tier's file and its size in bytes; none without it.
    pub l3: Option<(PathBuf, u64)>,
    /// Time.
    pub clock: Clock,
    /// Figures.
    pub figures: Arc<Figures>,
    /// Where the supervisor and the first two tiers live.
    pub arbiter: ArbiterHandle,
    /// Where the third one lives: it waits for the disk.
    pub disk: ArbiterHandle,
}

/// The way to the actors. Cheap to clone; every method may be called from any thread.
#[derive(Clone, Default)]
pub(super) struct Crew(Arc<Shared>);

#[derive(Default)]
struct Shared {
    parts: Mutex<Option<Arc<Parts>>>,
    supervisor: Mutex<Option<Addr<CacheSupervisor>>>,
    tiers: ArcSwapOption<Tiers>,
}

#[derive(Clone)]
struct Tiers {
    l1: Addr<L1Actor>,
    l2: Addr<L2Actor>,
    l3: Option<Addr<L3Actor>>,
}

impl Crew {
    /// Starts the actors. Before that, and after they are gone for good, everybody loads for themselves.
    pub fn start(&self, parts: Parts) {
        *lock(&self.0.parts) = Some(Arc::new(parts));
        self.revive();
    }

    /// A supervisor that died is replaced.
    fn revive(&self) {
        let Some(parts) = lock(&self.0.parts).clone() else { return };
        let mut supervisor = lock(&self.0.supervisor);
        if supervisor.as_ref().is_some_and(Addr::connected) {
            return;
        }
        if supervisor.is_some() {
            tracing::error!("the cache's supervisor died and is replaced");
        }
        let shared = Arc::downgrade(&self.0);
        let arbiter = parts.arbiter.clone();
        let new = CacheSupervisor::start_in_arbiter(&arbiter, |_| CacheSupervisor { shared, parts, tiers: None });
        *supervisor = new.connected().then_some(new);
    }

    /// Asks to load a key: whoever is first leads, the others get what it loads.
    pub async fn join(&self, slot: &Slot) -> Turn<Lead> {
        let Some(tiers) = self.0.tiers.load_full() else { return Turn::Alone };
        let (answer, told) = oneshot::channel();
        if let Err(error) = tiers.l1.try_send(Join { slot: slot.clone(), answer }) {
            self.failed(&error);
            return Turn::Alone;
        }
        match tokio::time::timeout(PATIENCE, told).await {
            Ok(Ok(turn)) => turn,
            Ok(Err(_)) | Err(_) => Turn::Alone,
        }
    }

    /// Reads the third tier.
    pub async fn read(&self, slot: &Slot) -> Option<Vec<u8>> {
        let tiers = self.0.tiers.load_full()?;
        let (answer, told) = oneshot::channel();
        tiers.l3.as_ref()?.try_send(Read { slot: slot.clone(), answer }).map_err(|error| self.failed(&error)).ok()?;
        told.await.ok().flatten()
    }

    /// Has an entry written to the tiers below; then frees the guard that was held for it. What cannot be taken is left out.
    pub fn write(&self, slot: &Slot, entry: &Entry, l2: bool, l3: bool, guard: Option<u64>) {
        let Some(tiers) = self.0.tiers.load_full() else { return };
        if l2 && let Err(error) = tiers.l2.try_send(Write { slot: slot.clone(), entry: entry.clone(), guard }) {
            self.failed(&error);
        }
        if let Some(l3) = tiers.l3.as_ref().filter(|_| l3)
            && let Err(error) = l3.try_send(Write { slot: slot.clone(), entry: entry.clone(), guard: None })
        {
            self.failed(&error);
        }
    }

    /// Has an entry dropped from the tiers below.
    pub fn remove(&self, slot: &Slot, l2: bool, l3: bool) {
        let Some(tiers) = self.0.tiers.load_full() else { return };
        if l2 {
            let _ = tiers.l2.try_send(Remove(slot.clone()));
        }
        if let Some(l3) = tiers.l3.as_ref().filter(|_| l3) {
            let _ = l3.try_send(Remove(slot.clone()));
        }
    }

    /// Other sizes, in bytes. False when nobody is there to be told.
    pub fn resize(&self, sizes: Sizes) -> bool {
        let supervisor = lock(&self.0.supervisor).clone();
        let told = supervisor.is_some_and(|supervisor| supervisor.try_send(sizes).is_ok());
        if !told {
            self.revive();
        }
        told
    }

    fn failed<T>(&self, error: &SendError<T>) {
        if matches!(error, SendError::Closed(_)) {
            self.revive();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sizes of the tiers in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub struct Sizes {
    /// The first.
    pub l1: u64,
    /// The second.
    pub l2: u64,
    /// The third.
    pub l3: u64,
}

/// Keeps the tiers alive, resizes them, tells their figures.
pub struct CacheSupervisor {
    shared: Weak<Shared>,
    parts: Arc<Parts>,
    tiers: Option<Tiers>,
}

impl CacheSupervisor {
    /// Starts what is not there, or not any more.
    fn look_after(&mut self) {
        let Some(shared) = self.shared.upgrade() else { return };
        let parts = &self.parts;
        let old = self.tiers.take();
        let l1 = self.living(0, old.as_ref().map(|tiers| &tiers.l1)).unwrap_or_else(|| {
            let l1 = L1Actor { flights: Flights::default(), figures: parts.figures.clone(), l1: parts.l1.clone() };
            L1Actor::start_in_arbiter(&parts.arbiter, |_| l1)
        });
        let l2 = self.living(1, old.as_ref().map(|tiers| &tiers.l2)).unwrap_or_else(|| {
            let l2 = L2Actor { parts: parts.clone(), under_way: 0 };
            L2Actor::start_in_arbiter(&parts.arbiter, |_| l2)
        });
        let l3 = parts.l3.as_ref().map(|(folder, bytes)| {
            self.living(2, old.as_ref().and_then(|tiers| tiers.l3.as_ref())).unwrap_or_else(|| {
                let (folder, bytes, parts) = (folder.clone(), *bytes, parts.clone());
                L3Actor::start_in_arbiter(&self.parts.disk, move |_| L3Actor {
                    parts,
                    folder,
                    bytes,
                    shelf: None,
                    breaker: Breaker::default(),
                })
            })
        });
        let tiers = Tiers { l1, l2, l3 };
        shared.tiers.store(Some(Arc::new(tiers.clone())));
        self.tiers = Some(tiers);
    }

    /// The actor of a tier, if it lives. One that died is counted.
    fn living<A: Actor>(&self, tier: usize, address: Option<&Addr<A>>) -> Option<Addr<A>> {
        let address = address?;
        if !address.connected() {
            tracing::error!(tier = TIERS[tier], "the actor of a tier of the cache died and is replaced");
            self.parts.figures.replaced(tier);
        }
        address.connected().then(|| address.clone())
    }
}

impl Actor for CacheSupervisor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.look_after();
        ctx.run_interval(TICK, |supervisor, ctx| {
            if supervisor.shared.strong_count() == 0 {
                return ctx.stop();
            }
            supervisor.look_after();
            let parts = &supervisor.parts;
            let (entries, bytes) = parts.l1.measure();
            parts.figures.holds(0, entries, bytes);
            parts.figures.up(0, parts.l1.size() > 0);
            parts.l2.tell(&parts.figures);
        });
    }
}

impl Handler<Sizes> for CacheSupervisor {
    type Result = ();
    fn handle(&mut self, sizes: Sizes, _: &mut Self::Context) {
        let Some(tiers) = &self.tiers else { return };
        let sent = [tiers.l1.try_send(sizes).is_ok(), tiers.l2.try_send(sizes).is_ok()];
        let l3 = tiers.l3.as_ref().is_none_or(|l3| l3.try_send(sizes).is_ok());
        if sent != [true, true] || !l3 {
            tracing::warn!(?sizes, "a tier of the cache has too much to do to be resized");
        }
    }
}

// The first tier.

/// Knows what is being loaded.
pub struct L1Actor {
    flights: Flights<Lead>,
    figures: Arc<Figures>,
    l1: L1,
}

impl Actor for L1Actor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(JOINS);
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Join {
    slot: Slot,
    answer: oneshot::Sender<Turn<Lead>>,
}

#[derive(Message)]
#[rtype(result = "()")]
struct End {
    slot: Slot,
    number: u64,
    /// None: it was given up.
    outcome: Option<Outcome>,
}

/// The duty to load a key. Dropping it gives the duty to the next one who waits.
pub(super) struct Lead {
    slot: Slot,
    number: u64,
    actor: Addr<L1Actor>,
    over: bool,
}

impl Lead {
    /// Tells the end to those who wait.
    pub fn end(mut self, outcome: Outcome) {
        self.over = true;
        self.send(Some(outcome));
    }

    fn send(&self, outcome: Option<Outcome>) {
        // Whoever waits does so for a bounded time.
        let _ = self.actor.try_send(End { slot: self.slot.clone(), number: self.number, outcome });
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if !self.over {
            self.send(None);
        }
    }
}

impl Handler<Join> for L1Actor {
    type Result = ();
    fn handle(&mut self, Join { slot, answer }: Join, ctx: &mut Self::Context) {
        let actor = ctx.address();
        let lead = |number| Lead { slot: slot.clone(), number, actor, over: false };
        if self.flights.join(&slot, Instant::now(), answer, lead) {
            self.figures.waits(slot.kind);
        }
    }
}

impl Handler<End> for L1Actor {
    type Result = ();
    fn handle(&mut self, End { slot, number, outcome }: End, ctx: &mut Self::Context) {
        match outcome {
            Some(outcome) => self.flights.end(&slot, number, &outcome),
            None => {
                let actor = ctx.address();
                let lead = |number| Lead { slot: slot.clone(), number, actor, over: false };
                self.flights.abandon(&slot, number, Instant::now(), lead);
            }
        }
    }
}

impl Handler<Sizes> for L1Actor {
    type Result = ();
    fn handle(&mut self, sizes: Sizes, _: &mut Self::Context) {
        if sizes.l1 != self.l1.size() {
            self.l1.resize(sizes.l1);
        }
    }
}

// The second tier.

/// Writes to the second tier and keeps its connection.
pub struct L2Actor {
    parts: Arc<Parts>,
    under_way: usize,
}

impl Actor for L2Actor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(WRITES);
        if let L2::Redis(link) = &self.parts.l2 {
            let link = link.clone();
            ctx.spawn(async move { link.keep().await }.into_actor(self));
        }
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Write {
    slot: Slot,
    entry: Entry,
    guard: Option<u64>,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Remove(Slot);

impl Handler<Write> for L2Actor {
    type Result = ();
    fn handle(&mut self, Write { slot, entry, guard }: Write, ctx: &mut Self::Context) {
        let frozen = entry.freeze();
        match &self.parts.l2 {
            L2::Off => {}
            L2::Region(region) => {
                if let Some(frozen) = frozen {
                    region.put(&slot, frozen);
                }
            }
            L2::Redis(link) => {
                if self.under_way >= UNDER_WAY || !link.is_up() {
                    return self.parts.figures.skipped(1);
                }
                self.under_way += 1;
                let (link, now) = (link.clone(), self.parts.clock.now());
                let usable = if slot.kind == Kind::State { entry.made.plus(STATE_MS) } else { entry.usable };
                let work = async move {
                    if let Some(frozen) = frozen {
                        link.put(&slot, &frozen, usable, now).await;
                    }
                    if let Some(guard) = guard {
                        link.free(&slot, guard).await;
                    }
                };
                ctx.spawn(work.into_actor(self).map(|(), actor, _| actor.under_way -= 1));
            }
        }
    }
}

impl Handler<Remove> for L2Actor {
    type Result = ();
    fn handle(&mut self, Remove(slot): Remove, ctx: &mut Self::Context) {
        match &self.parts.l2 {
            L2::Off => {}
            L2::Region(region) => region.remove(&slot),
            L2::Redis(link) => {
                let link = link.clone();
                ctx.spawn(async move { link.remove(&slot).await }.into_actor(self));
            }
        }
    }
}

impl Handler<Sizes> for L2Actor {
    type Result = ();
    fn handle(&mut self, sizes: Sizes, ctx: &mut Self::Context) {
        match &self.parts.l2 {
            L2::Off => {}
            L2::Region(region) => region.resize(sizes.l2),
            L2::Redis(link) => {
                let link = link.clone();
                ctx.spawn(async move { link.resize(sizes.l2).await }.into_actor(self));
            }
        }
    }
}

// The third tier.

/// Alone with the third tier's file, on a thread of its own.
pub struct L3Actor {
    parts: Arc<Parts>,
    folder: PathBuf,
    bytes: u64,
    /// None: not opened yet, or it failed.
    shelf: Option<Shelf>,
    breaker: Breaker,
}

impl Actor for L3Actor {
    type Context = Context<Self>;
    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(WRITES);
        self.parts.figures.limit(2, self.bytes);
        self.with(|_, _| Ok(()));
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Read {
    slot: Slot,
    answer: oneshot::Sender<Option<Vec<u8>>>,
}

impl L3Actor {
    /// Works on the file; one that fails is closed and left alone for a while.
    fn with<T>(&mut self, work: impl FnOnce(&mut Shelf, i64) -> shelf::Result<T>) -> Option<T> {
        if self.bytes == 0 || !self.breaker.allows(Instant::now()) {
            return None;
        }
        let now = self.parts.clock.now().0;
        let opened = self.shelf.take().map_or_else(|| Shelf::open(&self.folder, self.bytes), Ok);
        let end = opened.and_then(|mut shelf| work(&mut shelf, now).map(|done| (shelf, done)));
        self.parts.figures.up(2, end.is_ok());
        match end {
            Ok((shelf, done)) => {
                self.breaker.closed();
                let (entries, bytes) = shelf.measure();
                self.parts.figures.holds(2, entries, bytes);
                self.shelf = Some(shelf);
                Some(done)
            }
            Err(error) => {
                self.breaker.failed(Instant::now());
                tracing::warn!(%error, "the cache's file is left alone for a while");
                None
            }
        }
    }
}

impl Handler<Read> for L3Actor {
    type Result = ();
    fn handle(&mut self, Read { slot, answer }: Read, _: &mut Self::Context) {
        if !answer.is_closed() {
            let found = self.with(|shelf, now| shelf.get(&slot.text(), now)).flatten();
            let _ = answer.send(found);
        }
    }
}

impl Handler<Write> for L3Actor {
    type Result = ();
    fn handle(&mut self, Write { slot, entry, .. }: Write, _: &mut Self::Context) {
        let Some(frozen) = entry.freeze() else { return };
        let gone = self.with(|shelf, now| shelf.put(&slot.text(), &frozen, entry.usable.0, now));
        self.parts.figures.evicted(2, slot.kind, gone.unwrap_or_default());
    }
}

impl Handler<Remove> for L3Actor {
    type Result = ();
    fn handle(&mut self, Remove(slot): Remove, _: &mut Self::Context) {
        self.with(|shelf, _| shelf.remove(&slot.text()));
    }
}

impl Handler<Sizes> for L3Actor {
    type Result = ();
    fn handle(&mut self, sizes: Sizes, _: &mut Self::Context) {
        self.bytes = sizes.l3;
        self.parts.figures.limit(2, sizes.l3);
        match sizes.l3 {
            0 => self.shelf = None,
            bytes => drop(self.with(|shelf, now| shelf.resize(bytes, now))),
        }
    }
}

#[cfg(test)]
mod tests;
