//! The shell that carries effects out: one task that reads the log and what is due, starts calls, and writes down how far it is.
//!
//! Who is next, what is to be done and when to come again is decided in `lanes`, `plan`, `window` and `backoff`.
//!
//! Invariants:
//! - [`Shipping::Shipped`] is written together with, or after, every row of an effect it passes.
//! - What is due is not read while a write is under way, so a row that was just settled is not seen again.
//! - A call has a deadline; a panic in a port is a failed try.
//! - Of a feed that is no longer followed nothing is written that was not on its way, and what was is written under the epoch
//!   of the shard: after another node took it, it changes nothing.
//! - A shard is let go ([`Leaving::settle`]) when nothing of it is in hand and its position says so.
//!
//! Tests: `tests/it/delivery.rs`.

use std::{
    collections::{BTreeMap, HashSet},
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{
    Acceptor, Error, Publisher, backoff,
    follow::Follow,
    lanes::{Lanes, Offer, lane_of},
    plan::{Call, Item, Origin, Seq, Target},
    webhook::{Failure, Webhooks},
};
use crate::{
    config,
    runtime::{clock::Clock, drain::Drain},
    store::{self, Done, Feed, Outgoing, Pending, Scope, Shipping, Store},
    telemetry::metric,
    types::{
        InstanceKey, Millis,
        limits::{DELIVERY_BATCH, DELIVERY_OPEN, DELIVERY_RESUMED},
    },
};

/// How often what is due is looked up.
const TICK: Duration = Duration::from_millis(250);
/// How often the log is looked at though nobody gave a hint: every so many ticks.
const TICKS_PER_SCAN: u32 = 4;
/// How long a position may be behind before it is written.
const POSITION_AFTER: Duration = Duration::from_millis(500);
/// Longest publish or acceptance.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// An effect under way for longer lets those behind it be put off.
const SLOW_MS: i64 = 3000;
/// Shards to be let go that are not heard of yet, at most; those who ask wait then.
const LEAVING: usize = 64;
/// Most writes waiting before reading pauses.
const MAX_WRITES: usize = 8192;

/// What a courier is made of.
pub struct Parts {
    /// The log it follows and the rows it keeps.
    pub store: Arc<dyn Store>,
    /// The MQTT door; without one, publishes end here.
    pub publisher: Option<Arc<dyn Publisher>>,
    /// Whose effects are carried out; changed by [`Courier::own`].
    pub scope: Scope,
    /// The way to instances.
    pub acceptor: Arc<dyn Acceptor>,
    /// `[delivery]`.
    pub config: config::Delivery,
    /// Time.
    pub clock: Clock,
    /// The node's drain: once it begins, nothing that is due later is started; when it stops, the courier ends at once.
    pub drain: Drain,
    /// The runtime it runs on.
    pub handle: tokio::runtime::Handle,
}

/// How far a courier is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Observed {
    /// The durable positions of all feeds, added up.
    pub position: i64,
    /// Feeds followed.
    pub feeds: usize,
    /// Effects read from the log and neither delivered nor put off.
    pub open: usize,
    /// Calls under way.
    pub under_way: usize,
    /// Lanes (instance and target) with something under way or put off.
    pub lanes: usize,
    /// Effects delivered since the start.
    pub delivered: u64,
    /// Failed tries since the start.
    pub failures: u64,
    /// Effects given up since the start.
    pub given_up: u64,
}

/// A running courier.
#[derive(Debug)]
pub struct Courier {
    finish: CancellationToken,
    abort: CancellationToken,
    seen: Arc<Mutex<Observed>>,
    scope: Arc<watch::Sender<Scope>>,
    leaving: Leaving,
    task: tokio::task::JoinHandle<()>,
}

/// The way to have a courier let go of a shard before another node gets it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Leaving(mpsc::Sender<Settling>);

/// A shard, the epoch it was taken with, and who waits until nothing of it is in hand.
type Settling = (u32, u64, oneshot::Sender<()>);

impl Leaving {
    /// Nothing more of this shard is read; returns when everything that was is delivered or put off, and the position is durable,
    /// so that the next owner begins with what was never sent. Nothing may be committed for the shard any more. It stays so
    /// until [`Courier::own`] takes the shard out of the scope. Cancel safe: what is not done by then may be sent again.
    pub async fn settle(&self, shard: u32, epoch: u64) {
        let (done, end) = oneshot::channel();
        if self.0.send((shard, epoch, done)).await.is_ok() {
            // An error means that the shard was lost or the courier ended: nothing of it is in hand any more.
            let _ = end.await;
        }
    }
}

impl Courier {
    /// Starts to follow the log.
    ///
    /// # Errors
    /// [`Error::Client`].
    pub fn start(parts: Parts) -> Result<Self, Error> {
        let deadline = Duration::from_secs(parts.config.webhook_seconds.max(1));
        let webhooks = Webhooks::new(&parts.config.webhook_allow, deadline)?;
        let (finish, abort) = (CancellationToken::new(), CancellationToken::new());
        let seen = Arc::new(Mutex::new(Observed::default()));
        let handle = parts.handle.clone();
        let (scope, wanted) = watch::channel(parts.scope.clone());
        let run = Run::new(parts, webhooks, finish.clone(), seen.clone());
        let (leaving, asked) = mpsc::channel(LEAVING);
        let task = handle.spawn(run.run(wanted, asked, abort.clone()));
        Ok(Self { finish, abort, seen, scope: Arc::new(scope), leaving: Leaving(leaving), task })
    }

    /// The way to have it let go of shards.
    pub fn leaving(&self) -> Leaving {
        self.leaving.clone()
    }

    /// From here on the effects of these shards are carried out, from their durable positions, and no others: of a shard
    /// that is lost nothing is written any more, but calls under way end.
    pub fn own(&self, scope: Scope) {
        self.scope.send_replace(scope);
    }

    /// Keeps what it owns in step with this, for as long as both live.
    pub async fn follow(scope: std::sync::Weak<watch::Sender<Scope>>, mut owned: watch::Receiver<Scope>) {
        while owned.changed().await.is_ok() {
            let Some(scope) = scope.upgrade() else { return };
            scope.send_replace(owned.borrow_and_update().clone());
        }
    }

    /// What [`Courier::follow`] changes.
    pub fn scope(&self) -> std::sync::Weak<watch::Sender<Scope>> {
        Arc::downgrade(&self.scope)
    }

    /// How far it is.
    pub fn observe(&self) -> Observed {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers (or puts off) what the log holds, stores the position and ends. Nothing may be committed any more, or it waits
    /// for the next start. What is not done at the deadline is delivered again then.
    pub async fn finish(self, deadline: Duration) {
        self.finish.cancel();
        let Self { abort, mut task, .. } = self;
        if tokio::time::timeout(deadline, &mut task).await.is_err() {
            tracing::warn!("delivery did not finish in {deadline:?}; the rest is delivered after the next start");
            abort.cancel();
            drop(task.await);
        }
    }
}

type Reading<T> = Option<BoxFuture<'static, Result<Vec<T>, store::Error>>>;
type Resuming = Option<BoxFuture<'static, Result<Resumed, store::Error>>>;
/// A call: the era it began in, what for, how it ended.
type Ended = (u64, Item, Result<(), Failure>);

/// Where the delivery of some shards stood.
struct Resumed {
    positions: Vec<(Feed, i64)>,
    rows: Vec<Pending>,
}
type Flushing = Option<Pin<Box<dyn Future<Output = Result<(), String>> + Send>>>;

/// Waits for what stands in a slot; forever when nothing does. Cancel safe: the future stays in its slot.
async fn of<F: Future + Unpin>(slot: &mut Option<F>) -> F::Output {
    match slot {
        Some(future) => {
            let out = future.await;
            *slot = None;
            out
        }
        None => std::future::pending().await,
    }
}

struct Run {
    store: Arc<dyn Store>,
    publisher: Option<Arc<dyn Publisher>>,
    acceptor: Arc<dyn Acceptor>,
    webhooks: Webhooks,
    max_tries: u32,
    max_hops: u32,
    clock: Clock,
    drain: Drain,
    finish: CancellationToken,
    seen: Arc<Mutex<Observed>>,
    counts: Observed,
    lanes: Lanes,
    follow: Follow,
    under_way: FuturesUnordered<BoxFuture<'static, Ended>>,
    resuming: Resuming,
    /// There may be more in the log.
    more: bool,
    reading: Reading<Outgoing>,
    /// Something may be due.
    look: bool,
    looking: Reading<Pending>,
    /// Rows taken in hand, until the write that ends or puts them off is durable.
    in_hand: HashSet<(InstanceKey, String)>,
    writes: Vec<Shipping>,
    flushing: Flushing,
    flushed: Vec<Shipping>,
    /// The positions being written.
    shipping: Vec<(Feed, i64)>,
    shipped_at: Instant,
    /// A write or read failed: wait for the next tick.
    hold: bool,
    /// What is due was looked up since the last write.
    looked: bool,
    /// The end of the log is the end of the work.
    finishing: bool,
    /// Shards that are let go, the epochs they were taken with, and who waits for it.
    leaving: BTreeMap<u32, (u64, Vec<oneshot::Sender<()>>)>,
}

impl Run {
    fn new(parts: Parts, webhooks: Webhooks, finish: CancellationToken, seen: Arc<Mutex<Observed>>) -> Self {
        Self {
            store: parts.store,
            publisher: parts.publisher,
            acceptor: parts.acceptor,
            webhooks,
            max_tries: parts.config.max_tries.max(1),
            max_hops: parts.config.max_hops.max(1),
            clock: parts.clock,
            drain: parts.drain,
            finish,
            seen,
            counts: Observed::default(),
            lanes: Lanes::default(),
            follow: Follow::new(parts.scope),
            under_way: FuturesUnordered::new(),
            resuming: None,
            more: true,
            reading: None,
            look: true,
            looking: None,
            in_hand: HashSet::new(),
            writes: Vec::new(),
            flushing: None,
            flushed: Vec::new(),
            shipping: Vec::new(),
            shipped_at: Instant::now(),
            hold: false,
            looked: false,
            finishing: false,
            leaving: BTreeMap::new(),
        }
    }

    async fn run(mut self, wanted: watch::Receiver<Scope>, asked: mpsc::Receiver<Settling>, abort: CancellationToken) {
        let (mut wanted, mut asked) = (wanted, asked);
        let drain = self.drain.clone();
        let finish = self.finish.clone();
        let hint = self.store.outgoing_hint();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = 0u32;
        loop {
            self.start_calls();
            self.start_io();
            self.show();
            self.tell_settled();
            if self.is_finished() {
                return;
            }
            tokio::select! {
                () = drain.stopped() => return,
                () = abort.cancelled() => return,
                () = finish.cancelled(), if !self.finishing => {
                    self.finishing = true;
                    self.more = true;
                }
                () = hint.notified() => self.more = true,
                Ok(()) = wanted.changed() => {
                    let scope = wanted.borrow_and_update().clone();
                    self.own(scope);
                }
                Some(asked) = asked.recv() => self.leave(asked),
                resumed = of(&mut self.resuming) => self.take_resumed(resumed),
                _ = ticks.tick() => {
                    tick = tick.wrapping_add(1);
                    self.hold = false;
                    self.look = true;
                    self.more |= tick.is_multiple_of(TICKS_PER_SCAN);
                    self.put_off_slow();
                }
                Some(ended) = self.under_way.next(), if !self.under_way.is_empty() => {
                    self.end(ended);
                    while let Some(Some(ended)) = self.under_way.next().now_or_never() {
                        self.end(ended);
                    }
                }
                batch = of(&mut self.reading) => self.take_log(batch),
                rows = of(&mut self.looking) => self.take_due(rows),
                result = of(&mut self.flushing) => self.take_flush(result),
            }
        }
    }

    /// Other shards are to be followed: forgets those lost; where the new ones stood is read next.
    fn own(&mut self, scope: Scope) {
        self.leaving.retain(|shard, (epoch, _)| scope.holds(*shard, *epoch));
        self.follow.want(scope);
        let kept = self.follow.held().clone();
        self.lanes.keep(|key| kept.contains(key));
        self.in_hand.retain(|(key, _)| kept.contains(key));
        self.writes.retain(|write| match write {
            Shipping::Postpone(row) => kept.contains(&row.key),
            Shipping::Settle { key, .. } => kept.contains(key),
            Shipping::Shipped { .. } => true,
        });
        // What is being read was asked for other shards.
        (self.reading, self.looking, self.resuming) = (None, None, None);
        (self.more, self.look) = (true, true);
    }

    /// Reads where delivery of the new shards stood and which of their lanes are blocked.
    fn start_resume(&mut self) {
        let (store, scope) = (self.store.clone(), self.follow.awaited().clone());
        let soon = self.clock.now().plus(backoff::LONGEST_MS + 60_000);
        self.resuming = Some(Box::pin(async move {
            let feeds = store.feeds(&scope);
            let positions = feeds.iter().copied().zip(store.shipped(&feeds).await?).collect();
            let rows = store.due(&scope, soon, DELIVERY_RESUMED).await?;
            Ok(Resumed { positions, rows })
        }));
    }

    fn take_resumed(&mut self, resumed: Result<Resumed, store::Error>) {
        let Resumed { positions, rows } = match resumed {
            Ok(resumed) => resumed,
            Err(error) => {
                tracing::error!("delivery cannot read where it stood, and tries again: {error}");
                self.hold = true;
                return;
            }
        };
        if rows.len() == DELIVERY_RESUMED {
            tracing::warn!("{DELIVERY_RESUMED} effects or more are put off: the order of the rest may change");
        }
        for row in rows {
            let due = row.due;
            if let Some(item) = Item::of_row(row) {
                self.lanes.resume(lane_of(&item), item.seq, due);
            }
        }
        self.follow.resume(positions);
        // A look that was under way did not ask for these.
        (self.reading, self.looking) = (None, None);
        (self.more, self.look) = (true, true);
    }

    fn is_finished(&self) -> bool {
        // Of no shards there is nothing more: who handed all of them over need not look.
        self.finishing
            && (!self.more || self.follow.feeds() == 0)
            && self.follow.awaited().is_empty()
            && self.reading.is_none()
            && self.under_way.is_empty()
            && self.follow.in_hand() == 0
            && self.writes.is_empty()
            && self.flushing.is_none()
            && !self.follow.has_moved()
    }

    fn show(&mut self) {
        self.counts.position = self.follow.position();
        self.counts.feeds = self.follow.feeds();
        self.counts.open = self.follow.in_hand();
        self.counts.under_way = self.lanes.under_way();
        self.counts.lanes = self.lanes.len();
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = self.counts;
    }

    /// Starts reads and writes, as far as there is need and room.
    fn start_io(&mut self) {
        if self.hold {
            return;
        }
        if !self.follow.awaited().is_empty() && self.resuming.is_none() {
            self.start_resume();
        }
        let room = self.follow.in_hand() < DELIVERY_OPEN && self.writes.len() < MAX_WRITES;
        if self.more && room && self.reading.is_none() && self.follow.feeds() > 0 {
            self.more = false;
            let (store, mut after) = (self.store.clone(), self.follow.read());
            after.retain(|(feed, _)| !self.leaving.contains_key(&feed.0));
            self.reading = Some(Box::pin(async move { store.outgoing(&after, DELIVERY_BATCH).await }));
        }
        if self.flushing.is_some() || self.looking.is_some() {
            return;
        }
        let may_look = self.look
            && self.follow.feeds() > 0
            && !self.finishing
            && !self.drain.is_draining()
            && self.in_hand.len() < DELIVERY_OPEN;
        let must_flush = !self.writes.is_empty()
            || self.follow.has_moved() && (self.must_hurry() || self.shipped_at.elapsed() >= POSITION_AFTER);
        if may_look && !(must_flush && self.looked) {
            (self.look, self.looked) = (false, true);
            let (store, now, limit) = (self.store.clone(), self.clock.now(), self.in_hand.len() + DELIVERY_BATCH * 4);
            let scope = self.follow.held().clone();
            self.looking = Some(Box::pin(async move { store.due(&scope, now, limit).await }));
        } else if must_flush {
            self.looked = false;
            self.start_flush();
        }
    }

    /// Whether somebody waits for the positions.
    fn must_hurry(&self) -> bool {
        self.finishing || !self.leaving.is_empty()
    }

    /// Tells those who wait that nothing of their shard is in hand.
    fn tell_settled(&mut self) {
        let (follow, in_hand) = (&self.follow, &self.in_hand);
        for (shard, (_, waiting)) in self.leaving.iter_mut().filter(|(_, (_, waiting))| !waiting.is_empty()) {
            let is_here = |(key, _): &(InstanceKey, String)| follow.held().shard_of(key) == Some(*shard);
            if follow.is_settled(Feed(*shard)) && !in_hand.iter().any(is_here) {
                for done in waiting.drain(..) {
                    let _ = done.send(());
                }
            }
        }
    }

    /// A shard is to be let go. One that is not in hand under this epoch is.
    fn leave(&mut self, (shard, epoch, done): Settling) {
        if self.follow.held().holds(shard, epoch) || self.follow.awaited().holds(shard, epoch) {
            self.leaving.entry(shard).or_insert_with(|| (epoch, Vec::new())).1.push(done);
        } else {
            let _ = done.send(());
        }
    }

    fn is_leaving(&self, key: &InstanceKey) -> bool {
        !self.leaving.is_empty()
            && self.follow.held().shard_of(key).is_some_and(|shard| self.leaving.contains_key(&shard))
    }

    fn start_flush(&mut self) {
        self.shipping = self.follow.moved();
        self.flushed = std::mem::take(&mut self.writes);
        let mut writes = self.flushed.clone();
        writes.extend(self.shipping.iter().map(|&(feed, position)| Shipping::Shipped { feed, position }));
        let under = self.follow.held().fences(&writes);
        let (done, end) = Done::channel();
        self.store.ship(under, writes, done);
        self.flushing = Some(Box::pin(async move {
            match end.await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(store::Rejection::Failed(error))) => Err(error.to_string()),
                Ok(Err(rejection)) => Err(format!("{rejection:?}")),
                Err(_) => Err(String::from("the store is gone")),
            }
        }));
    }

    fn take_flush(&mut self, result: Result<(), String>) {
        let flushed = std::mem::take(&mut self.flushed);
        self.shipped_at = Instant::now();
        if let Err(error) = result {
            tracing::warn!("delivery could not write what it did, and tries again: {error}");
            // What was lost meanwhile is somebody else's.
            let held = self.follow.held();
            let kept = flushed.into_iter().filter(|write| match write {
                Shipping::Postpone(row) => held.contains(&row.key),
                Shipping::Settle { key, .. } => held.contains(key),
                Shipping::Shipped { .. } => false,
            });
            self.writes.splice(..0, kept);
            self.hold = true;
            return;
        }
        self.follow.shipped(&self.shipping);
        self.look |= !flushed.is_empty();
        for write in flushed {
            match write {
                Shipping::Postpone(row) => self.in_hand.remove(&(row.key, row.effect_id)),
                Shipping::Settle { key, effect_id } => self.in_hand.remove(&(key, effect_id)),
                Shipping::Shipped { .. } => false,
            };
        }
    }

    fn take_log(&mut self, batch: Result<Vec<Outgoing>, store::Error>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => {
                tracing::warn!("delivery cannot read the log, and tries again: {error}");
                (self.more, self.hold) = (true, true);
                return;
            }
        };
        self.more |= !batch.is_empty();
        let (now, mqtt) = (self.clock.now(), self.publisher.is_some());
        for outgoing in batch {
            if self.leaving.contains_key(&outgoing.feed.0) {
                // The next owner reads it.
                continue;
            }
            let items = Item::of_turn(&outgoing).filter(|item| mqtt || item.target != Target::Mqtt);
            let items: Vec<Item> = items.collect();
            self.follow.open(outgoing.feed, outgoing.position, items.len());
            for item in items {
                match item.put_off_to(now) {
                    Some(due) => {
                        let (due, dropped) = self.lanes.put_off(&item, due);
                        self.put_off(&item, 0, due);
                        self.drop_oldest(&item, dropped);
                    }
                    None => self.offer(item, now),
                }
            }
        }
    }

    fn take_due(&mut self, rows: Result<Vec<Pending>, store::Error>) {
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => {
                tracing::warn!("delivery cannot read what is due, and tries again: {error}");
                (self.look, self.hold) = (true, true);
                return;
            }
        };
        let now = self.clock.now();
        for row in rows {
            let id = (row.key.clone(), row.effect_id.clone());
            if self.is_leaving(&row.key) || !self.in_hand.insert(id.clone()) {
                continue;
            }
            match Item::of_row(row) {
                Some(item) if item.target == Target::Mqtt && self.publisher.is_none() => self.settle(&item),
                Some(item) => self.offer(item, now),
                None => {
                    tracing::error!(tenant = %id.0.tenant, instance = %id.0.instance, effect = id.1, "no effect id");
                    self.writes.push(Shipping::Settle { key: id.0, effect_id: id.1 });
                }
            }
        }
    }

    fn offer(&mut self, item: Item, now: Millis) {
        if let Offer::Behind { item, due, dropped } = self.lanes.offer(item, now) {
            self.put_off(&item, item.tries(), due);
            self.drop_oldest(&item, dropped);
        }
    }

    /// Writes the row that keeps an effect for later; its position in the log is free to pass once that is durable.
    fn put_off(&mut self, item: &Item, tries: u32, due: Millis) {
        self.writes.push(Shipping::Postpone(Box::new(item.put_off(tries, due))));
        self.close(item);
    }

    /// An effect is delivered or given up.
    fn settle(&mut self, item: &Item) {
        if matches!(item.origin, Origin::Row(_)) {
            self.writes.push(Shipping::Settle { key: item.key.clone(), effect_id: item.seq.to_string() });
        }
        self.close(item);
    }

    fn close(&mut self, item: &Item) {
        if let Origin::Log { feed, position, .. } = item.origin {
            self.follow.close(feed, position);
        }
    }

    fn drop_oldest(&mut self, behind: &Item, dropped: Option<Seq>) {
        let Some(seq) = dropped else { return };
        self.counts.given_up += 1;
        metrics::counter!(metric::DELIVERY_GIVEN_UP, "kind" => behind.kind()).increment(1);
        tracing::warn!(tenant = %behind.key.tenant, instance = %behind.key.instance, effect = %seq,
            "effect given up: too many wait for the same target");
        self.writes.push(Shipping::Settle { key: behind.key.clone(), effect_id: seq.to_string() });
    }

    fn put_off_slow(&mut self) {
        let now = self.clock.now();
        for (item, due) in self.lanes.take_slow(now.plus(-SLOW_MS), now) {
            self.put_off(&item, item.tries(), due);
        }
        metrics::gauge!(metric::DELIVERY_OPEN).set(self.follow.in_hand() as f64);
    }

    fn start_calls(&mut self) {
        let now = self.clock.now();
        while let Some(item) = self.lanes.next(now) {
            let ports = (self.publisher.clone(), self.acceptor.clone(), self.webhooks.clone());
            let (call, era) = (item.call(now, self.max_hops), self.follow.era());
            self.under_way.push(Box::pin(async move {
                let result = match call {
                    Ok(call) => AssertUnwindSafe(carry_out(call, ports)).catch_unwind().await,
                    Err(reason) => Ok(Err(Failure::Never(reason))),
                };
                (era, item, result.unwrap_or_else(|_| Err(Failure::later("the call panicked"))))
            }));
        }
    }

    /// A call ended.
    fn end(&mut self, (era, item, result): Ended) {
        if !self.follow.held_since(&item.key, era) {
            return self.lanes.left(&item);
        }
        let (reason, after) = match result {
            Ok(()) => {
                self.counts.delivered += 1;
                metrics::counter!(metric::DELIVERED, "kind" => item.kind()).increment(1);
                self.lanes.done(&item);
                return self.settle(&item);
            }
            Err(Failure::Never(reason)) => (reason, None),
            Err(Failure::Later { reason, after }) => (reason, Some(after)),
        };
        self.counts.failures += 1;
        metrics::counter!(metric::DELIVERY_FAILURES, "kind" => item.kind()).increment(1);
        let tries = item.tries().saturating_add(1);
        match after {
            Some(after) if !bounded(&item.target) || tries < self.max_tries => {
                let spread = item.key.stable_hash() ^ item.seq.0.rotate_left(32) ^ u64::from(item.seq.1);
                let asked = after.map_or(0, |after| i64::try_from(after.as_millis()).unwrap_or(i64::MAX));
                let due = self.clock.now().plus(backoff::wait_ms(tries, spread).max(asked));
                tracing::debug!(tenant = %item.key.tenant, instance = %item.key.instance, effect = %item.seq,
                    kind = item.kind(), tries, due = %due, "effect put off: {reason}");
                let behind = self.lanes.failed(&item, due);
                self.put_off(&item, tries, due);
                for (item, due) in behind {
                    self.put_off(&item, item.tries(), due);
                }
            }
            _ => {
                self.counts.given_up += 1;
                metrics::counter!(metric::DELIVERY_GIVEN_UP, "kind" => item.kind()).increment(1);
                tracing::warn!(tenant = %item.key.tenant, instance = %item.key.instance, effect = %item.seq,
                    kind = item.kind(), tries, "effect given up: {reason}");
                self.lanes.done(&item);
                self.settle(&item);
            }
        }
    }
}

/// Whether tries are counted. A stimulus for an instance is never given up: the one who refuses it is this node.
fn bounded(target: &Target) -> bool {
    matches!(target, Target::Mqtt | Target::Host(_))
}

type Ports = (Option<Arc<dyn Publisher>>, Arc<dyn Acceptor>, Webhooks);

async fn carry_out(call: Call, (publisher, acceptor, webhooks): Ports) -> Result<(), Failure> {
    let late = |_| Failure::later(format!("no end within {CALL_DEADLINE:?}"));
    match call {
        Call::Publish(messages) => {
            let Some(publisher) = publisher else { return Ok(()) };
            for message in messages {
                let published = tokio::time::timeout(CALL_DEADLINE, publisher.publish(message)).await;
                published.map_err(late)?.map_err(Failure::later)?;
            }
            Ok(())
        }
        Call::Accept(key, stimulus) => {
            let accepted = tokio::time::timeout(CALL_DEADLINE, acceptor.accept(key, *stimulus)).await;
            accepted.map_err(late)?.map_err(Failure::later)
        }
        Call::Post { url, body, effect } => webhooks.post(&url, &body, &effect).await,
    }
}
