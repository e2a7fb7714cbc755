//! The actor of one shard: keeps the instances of its slice, activates them on demand, lets idle ones go.
//!
//! Not here: what an instance does (`instance`), which thread a shard lives on (`router`).
//! Invariants: all messages to an instance pass here, so that it can be let go without losing one; an instance that died is
//! replaced by a fresh one that loads itself from the store.
//! Tests: at the foot; `tests/it/activation.rs`, `tests/it/panic.rs`.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use actix::prelude::*;
use indexmap::IndexMap;
use tokio::sync::oneshot;

use crate::{
    instance::{
        Error,
        actor::{InstanceActor, message},
        environment::Environment,
        inbox::{Waiter, Waiting},
        tenure::Tenure,
        turn::Mind,
    },
    types::{InstanceKey, Stimulus, StimulusId},
};

/// Messages a shard may have waiting: about a second of its share at full load.
const MAILBOX: usize = 8192;
/// How many residents are looked at when one has to leave for another: a sampled least-recently-used, as Redis does it.
const EVICTION_SAMPLE: usize = 16;
/// How many of them are asked when the node is beyond its limit.
const EVICTIONS_AT_ONCE: usize = 4;
/// Residents asked per look, so that a look never holds the arbiter for long.
const SWEEP_SLICE: usize = 4096;

/// An instance in memory.
struct Resident {
    address: Addr<InstanceActor>,
    /// When something was last sent to it, in ticks.
    used: u32,
    /// Whether it was told to keep its state as text since then.
    packed: bool,
}

/// One shard.
pub struct ShardActor {
    environment: Arc<Environment>,
    tenure: Arc<Tenure>,
    residents: IndexMap<InstanceKey, Resident, ahash::RandomState>,
    /// Seconds since the shard began, coarse.
    tick: u32,
    born: Instant,
    sweep_from: usize,
}

impl ShardActor {
    /// A shard without residents.
    pub fn new(environment: Arc<Environment>, tenure: Arc<Tenure>) -> Self {
        Self { environment, tenure, residents: IndexMap::default(), tick: 0, born: Instant::now(), sweep_from: 0 }
    }

    /// Starts it on this thread's arbiter, with room for what comes before it has run for the first time.
    pub fn begin(self) -> Addr<Self> {
        Self::create(|ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            self
        })
    }

    /// The instance, made resident if it is not; `None` when the node has no room.
    fn resident(&mut self, key: &InstanceKey, ctx: &Context<Self>) -> Option<&Addr<InstanceActor>> {
        let tick = self.tick;
        let alive = self.residents.get(key).is_some_and(|resident| resident.address.connected());
        if !alive {
            self.make_room(ctx)?;
            self.environment.active.fetch_add(1, Ordering::AcqRel);
            self.environment.metrics.active.increment(1.0);
            let instance = InstanceActor::new(self.environment.clone(), key.clone(), self.tenure.clone());
            let resident = Resident { address: instance.begin(), used: tick, packed: false };
            self.residents.insert(key.clone(), resident);
        }
        let resident = self.residents.get_mut(key)?;
        resident.used = tick;
        resident.packed = false;
        Some(&resident.address)
    }

    /// Lets the longest unused of a sample go, when the node holds its limit of instances. Residents leave a moment later,
    /// so up to an eighth more is tolerated meanwhile.
    fn make_room(&mut self, ctx: &Context<Self>) -> Option<()> {
        let (active, limit) = (self.environment.active.load(Ordering::Acquire), self.environment.limits.max_active());
        if active < limit {
            return Some(());
        }
        let len = self.residents.len();
        let start = if len == 0 { 0 } else { self.sweep_from % len };
        self.sweep_from = self.sweep_from.wrapping_add(EVICTION_SAMPLE);
        let mut sample: Vec<_> =
            (0..EVICTION_SAMPLE.min(len)).filter_map(|i| self.residents.get_index((start + i) % len)).collect();
        sample.sort_unstable_by_key(|(_, resident)| resident.used);
        // Who is asked may be busy and stay: beyond the limit more are asked than have to go.
        let asked = if active == limit { 1 } else { EVICTIONS_AT_ONCE };
        for (key, resident) in sample.into_iter().take(asked) {
            ask_to_leave(ctx.address(), key.clone(), resident.address.clone(), resident.used);
        }
        (active < limit + limit / 8 + EVICTION_SAMPLE).then_some(())
    }

    /// How many residents of this shard should go though they are not idle for long, so that other shards find room when
    /// the node is nearly at its limit: this shard's share of what exceeds 15/16 of it.
    fn surplus(&self) -> usize {
        let (active, limit) = (self.environment.active.load(Ordering::Acquire), self.environment.limits.max_active());
        let excess = active.saturating_sub(limit - limit / 16);
        if active < limit { 0 } else { (excess * self.residents.len()).div_ceil(active.max(1)) }
    }

    fn sweep(&mut self, ctx: &Context<Self>) {
        let idle = u32::try_from(self.environment.limits.idle().as_secs()).unwrap_or(u32::MAX);
        let len = self.residents.len();
        let mut surplus = self.surplus();
        let mut leaving = Vec::new();
        for i in 0..SWEEP_SLICE.min(len) {
            let Some((key, resident)) = self.residents.get_index_mut((self.sweep_from + i) % len) else { break };
            let unused = self.tick.saturating_sub(resident.used);
            if unused >= idle || (surplus > 0 && unused > 0) {
                surplus = surplus.saturating_sub(1);
                leaving.push((key.clone(), resident.address.clone(), resident.used));
            } else if unused >= PACK_AFTER && !resident.packed {
                resident.packed = resident.address.try_send(message::Observe { pack: true, leave: false }).is_ok();
            }
        }
        self.sweep_from = if len == 0 { 0 } else { (self.sweep_from + SWEEP_SLICE.min(len)) % len };
        for (key, address, used) in leaving {
            ask_to_leave(ctx.address(), key, address, used);
        }
    }
}

/// Asks a resident whether it is idle; the shard drops it if so and if nothing was sent to it meanwhile.
fn ask_to_leave(shard: Addr<ShardActor>, key: InstanceKey, address: Addr<InstanceActor>, used: u32) {
    actix_rt::spawn(async move {
        if let Ok(observed) = address.send(message::Observe { pack: true, leave: true }).await
            && observed.idle
        {
            drop(shard.try_send(Leave { key, address, used }));
        }
    });
}

/// How long a shard that is over still hands over what was on its way to it.
const LINGER: Duration = Duration::from_secs(5);
/// A resident unused for so many ticks keeps its state as text.
const PACK_AFTER: u32 = 2;

impl Actor for ShardActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(Duration::from_secs(1), |shard, ctx| {
            shard.tick = u32::try_from(shard.born.elapsed().as_secs()).unwrap_or(u32::MAX);
            shard.sweep(ctx);
        });
    }
}

/// A message for one instance.
#[derive(Message)]
#[rtype(result = "()")]
pub struct To {
    /// Which.
    pub key: InstanceKey,
    /// What.
    pub what: What,
}

/// What an instance can be told.
#[allow(clippy::large_enum_variant)] // the large one is nearly all of the traffic
pub enum What {
    /// A stimulus.
    Deliver(Stimulus, Option<u64>, Waiter),
    /// A new profile.
    PutProfile(Arc<Mind>, oneshot::Sender<Result<bool, Error>>),
    /// Be forgotten.
    Forget(oneshot::Sender<Result<(), Error>>),
    /// Take a dead letter back.
    Revive(StimulusId, oneshot::Sender<Result<(), Error>>),
    /// Look whether something waits.
    Wake,
    /// Say how much waits; nothing is activated for this.
    Observe(oneshot::Sender<Option<message::Observed>>),
}

impl Drop for ShardActor {
    /// Also after a panic: nothing waits for a shard that is gone.
    fn drop(&mut self) {
        if self.tenure.is_over() {
            self.tenure.settle();
        }
    }
}

impl Handler<To> for ShardActor {
    type Result = ();

    fn handle(&mut self, To { key, what }: To, ctx: &mut Context<Self>) {
        if let What::Observe(answer) = what {
            return self.observe(&key, answer);
        }
        // A resident hands over what it has before what comes now.
        if self.tenure.is_over() && !self.residents.contains_key(&key) {
            return self.hand_over(&key, what);
        }
        let Some(address) = self.resident(&key, ctx) else {
            return what.refuse(Error::Overloaded("it holds as many instances as it may"));
        };
        // A full mailbox drops the message and with it the answer's sender: the caller is told that it was not taken.
        let sent = match what {
            What::Deliver(stimulus, expected, waiter) => {
                return send_or_refuse(address, message::Deliver { stimulus, expected, waiter });
            }
            What::PutProfile(mind, answer) => address.try_send(message::PutProfile { mind, answer }).is_ok(),
            What::Forget(answer) => address.try_send(message::Forget { answer }).is_ok(),
            What::Revive(stimulus, answer) => address.try_send(message::Revive { stimulus, answer }).is_ok(),
            What::Wake => address.try_send(message::Wake).is_ok(),
            What::Observe(_) => true,
        };
        if !sent {
            tracing::debug!(instance = %key, "mailbox full");
        }
    }
}

fn send_or_refuse(address: &Addr<InstanceActor>, message: message::Deliver) {
    use actix::prelude::SendError;
    match address.try_send(message) {
        Ok(()) => {}
        Err(SendError::Full(message) | SendError::Closed(message)) => {
            message.waiter.tell(Err(Error::Overloaded("the instance's mailbox is full")));
        }
    }
}

impl What {
    /// Answers with an error instead.
    pub fn refuse(self, error: Error) {
        match self {
            What::Deliver(_, _, waiter) => waiter.tell(Err(error)),
            What::PutProfile(_, answer) => drop(answer.send(Err(error))),
            What::Forget(answer) | What::Revive(_, answer) => drop(answer.send(Err(error))),
            What::Wake => {}
            What::Observe(answer) => {
                let _ = answer.send(None);
            }
        }
    }
}

/// Finish what has arrived, take nothing more. Answered when every resident has taken what was sent to it; what they
/// have in hand then is counted by the tenure.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Settle;

impl Handler<Settle> for ShardActor {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: Settle, _: &mut Context<Self>) -> Self::Result {
        // A mailbox is in order: whoever answers this has taken everything before it.
        let observed = self
            .residents
            .values()
            .map(|resident| resident.address.send(message::Observe { pack: false, leave: false }));
        let observed = futures_util::future::join_all(observed.collect::<Vec<_>>());
        Box::pin(async move { drop(observed.await) })
    }
}

/// The tenure is over: residents hand over what they have, and the shard ends.
#[derive(Message)]
#[rtype(result = "()")]
pub struct End;

impl Handler<End> for ShardActor {
    type Result = ();

    fn handle(&mut self, _: End, ctx: &mut Context<Self>) {
        self.tenure.end();
        for resident in self.residents.values() {
            // A resident whose mailbox is full learns it from its next commit.
            drop(resident.address.try_send(message::Fence));
        }
        // Whoever answers this has taken everything before it; what was with the store then is counted as busy.
        let observed = self
            .residents
            .values()
            .map(|resident| resident.address.send(message::Observe { pack: false, leave: false }));
        let observed = futures_util::future::join_all(observed.collect::<Vec<_>>());
        let tenure = self.tenure.clone();
        ctx.spawn(
            async move {
                drop(observed.await);
                tenure.busy.none().await;
            }
            .into_actor(self)
            .map(|(), shard, ctx| {
                shard.tenure.settle();
                // Not at once: what stands in the mailbox of a shard that is over is handed over, too.
                ctx.run_later(LINGER, |_, ctx| ctx.stop());
            }),
        );
    }
}

impl ShardActor {
    /// What this node may no longer do.
    fn hand_over(&self, key: &InstanceKey, what: What) {
        match what {
            What::Deliver(stimulus, expected, waiter) => {
                let waiting = Waiting::arrived(stimulus, expected, waiter);
                if let Err(waiting) = self.tenure.hand_over(key, waiting) {
                    let mut waiting = waiting;
                    waiting.tell(&Err(Error::Fenced));
                }
            }
            what => what.refuse(Error::Fenced),
        }
    }

    fn observe(&self, key: &InstanceKey, answer: oneshot::Sender<Option<message::Observed>>) {
        let Some(resident) = self.residents.get(key) else {
            let _ = answer.send(None);
            return;
        };
        let address = resident.address.clone();
        actix_rt::spawn(async move {
            let _ = answer.send(address.send(message::Observe { pack: false, leave: false }).await.ok());
        });
    }
}

/// An instance said that it is idle.
#[derive(Message)]
#[rtype(result = "()")]
struct Leave {
    key: InstanceKey,
    address: Addr<InstanceActor>,
    used: u32,
}

impl Handler<Leave> for ShardActor {
    type Result = ();

    fn handle(&mut self, Leave { key, address, used }: Leave, _: &mut Context<Self>) {
        let unchanged =
            self.residents.get(&key).is_some_and(|resident| resident.address == address && resident.used == used);
        if unchanged {
            self.residents.swap_remove(&key);
            self.environment.metrics.passivations.increment(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instance in memory has one entry, and the map room for up to as many again.
    #[test]
    fn a_resident_is_small() {
        let entry = size_of::<(u64, InstanceKey, Resident)>();
        assert!(entry <= 72, "a resident has {entry} bytes");
    }
}
