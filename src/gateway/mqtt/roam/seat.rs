//! A session changes nodes: taken here for a client that connects, or because its node is gone; let go of for another node.
//!
//! Invariants: what a session is in memory is replaced as a whole by what the store said when it was taken; one that another
//! node took is over here, and its connection is told so. Tests: `tests/it/mqtt_cluster.rs`.

use std::{sync::Arc, time::Duration};

use futures_util::future::OptionFuture;

use super::{Memory, Roam, note::Note};
use crate::{
    cluster::bus::Health,
    gateway::mqtt::{
        embedded::Broker,
        outbox::Outbox,
        packet::code,
        record::{self, Subscription},
        registry::{Space, restore_item},
        session::{Away, Inbound, NOBODY, Session, State},
        will,
    },
    store::{
        self,
        roaming::{Origin, Seat, Seen, Taken},
    },
    types::{NodeId, TenantId},
};

/// Longest wait for what earlier holders of a session have on the way.
const SETTLED: Duration = Duration::from_secs(3);

/// Why a session cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store does not answer.
    #[error("the store: {0}")]
    Store(#[from] store::Error),
    /// Its rows cannot be read.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// The node that has it does not let go yet.
    #[error("the node that has it is not done with it")]
    Busy,
}

impl Roam {
    /// Makes a reserved session this node's, as the store has it. `is_kept`: it is to have a row. Its caller has a deadline.
    pub(in crate::gateway::mqtt) async fn sit(
        &self,
        broker: &Broker,
        space: &Space,
        session: &Arc<Session>,
        is_kept: bool,
    ) -> Result<(), Error> {
        let seat = Seat { tenant: session.tenant.clone(), client: session.client.to_string() };
        let me = self.me();
        let leaving = session.lock().leaving.take();
        if let Some(link) = leaving {
            link.ended().cancelled().await;
        }
        loop {
            let Some(holder) = self.sessions.holder(&seat).await? else {
                if !is_kept {
                    session.set_hold(NOBODY);
                    replace(broker, space, session, State::default());
                    return Ok(());
                }
                match self.sessions.found(&seat, me).await? {
                    Some(taken) => return settle_in(broker, space, session, taken, None),
                    None => continue,
                }
            };
            let is_mine = holder.node == me.as_str();
            if is_mine && holder.hold == session.hold() {
                return Ok(());
            }
            // One whose lease ran out while the store stood still is there all the same, and knows.
            let asked = (holder.running && !is_mine).then(|| self.yielded(&holder.node, &seat));
            let is_needed = asked.is_some() && holder.alive && self.bus.health() == Health::Up;
            let memory = OptionFuture::from(asked).await.flatten();
            if is_needed && memory.is_none() {
                // It lives and is not done: without its memory, what the client sends again would be decided again.
                return Err(Error::Busy);
            }
            // Somebody else may have taken it meanwhile: then that one is asked.
            if let Some(taken) = self.sessions.claim(&seat, me, holder.hold).await? {
                settle_in(broker, space, session, taken, memory)?;
                // Before what is published here from now on.
                self.emptied().await;
                return Ok(());
            }
        }
    }

    /// Lets go of a session for another node: its connection ends, what it took is settled and written, and then the other
    /// node is told.
    pub(super) async fn let_go(&self, broker: &Arc<Broker>, to: NodeId, call: u64, tenant: TenantId, client: String) {
        let space = broker.space(&tenant);
        let mut memory = (Vec::new(), Vec::new(), 0);
        if let Some(session) = space.find(&client) {
            let link = session.lock().link.clone();
            if let Some(link) = link {
                link.close(code::TAKEN_OVER);
                link.ended().cancelled().await;
            }
            // The next node is to know all that may be on the way, or that nothing is: without an answer it bars as well.
            let (forgot, uid) = {
                let state = session.lock();
                (state.inbound.forgot, state.uid)
            };
            if forgot && self.bar(&session.tenant, uid, session.hold()).await.is_err() {
                return;
            }
            let put = {
                let state = session.lock();
                let taken = state.inbound.taken.iter();
                memory.0 = state.inbound.unreleased.iter().map(|id| id.get()).collect();
                memory.1 = taken.map(|one| (one.id.get(), one.hash, one.stimulus.clone())).collect();
                memory.2 = state.outbox.sent_up_to();
                (state.stored && state.away.is_none()).then(|| session.put(&state))
            };
            // Behind everything that was written for it before.
            broker.write(put.and_then(Result::ok).into_iter().collect()).await;
        }
        let (unreleased, taken, sent) = memory;
        self.send(&to, &Note::Yielded { call, unreleased, taken, sent });
    }
}

impl Roam {
    /// Bars what the nodes that had a session before this hold made of its publishes, so that what is not in the store now
    /// never will be.
    pub(in crate::gateway::mqtt) async fn bar(
        &self,
        tenant: &TenantId,
        uid: u64,
        hold: u64,
    ) -> Result<(), store::Error> {
        let session = format!("{uid:016x}");
        let origin = Origin { session: &session, hold: hold.saturating_sub(1) };
        let barred = tokio::time::timeout(SETTLED, self.sessions.bar(tenant, origin)).await;
        barred.unwrap_or_else(|_| Err(store::Error::Backend(String::from("transactions under way take too long"))))
    }
}

impl Broker {
    /// Whether no other node took a session. While the store cannot say, it counts as taken by none.
    pub(in crate::gateway::mqtt) async fn has_still(&self, session: &Session) -> bool {
        let Some(roam) = self.roam.as_ref().filter(|_| session.hold() != NOBODY) else { return true };
        let seat = Seat { tenant: session.tenant.clone(), client: session.client.to_string() };
        match roam.sessions.holder(&seat).await {
            Ok(Some(holder)) => holder.hold == session.hold(),
            Ok(None) | Err(_) => true,
        }
    }
}

/// Makes a session what the store said when it was taken, and the node that had it, if that one could be asked.
fn settle_in(
    broker: &Broker,
    space: &Space,
    session: &Arc<Session>,
    taken: Taken,
    memory: Option<Memory>,
) -> Result<(), Error> {
    // What this node remembers of an earlier time is in the memory of who had it since, or is not to be relied on.
    session.lock().inbound = Inbound::default();
    if taken.record.is_empty() {
        session.set_hold(taken.hold);
        replace(broker, space, session, State { stored: true, ..State::default() });
        return Ok(());
    }
    let record: record::Session = record::decode(&taken.record)?;
    let was_connected = record.disconnected_at.is_none();
    let memory = memory
        .unwrap_or_else(|| Memory { inbound: Inbound { forgot: true, ..Inbound::default() }, ..Memory::default() });
    let mut outbox = Outbox::default();
    for (order, bytes) in &taken.queue {
        match restore_item(*order, record::decode(bytes)?, was_connected || *order <= memory.sent) {
            Some(item) => outbox.restore(item),
            None => outbox.restore_released(*order),
        }
    }
    let disconnected_at = record.disconnected_at.or_else(|| Some(broker.clock.now()));
    let mut state = State { outbox, inbound: memory.inbound, disconnected_at, ..State::of(record) };
    let delay = state.will.as_ref().map(|will| i64::from(will.delay_seconds) * 1000);
    state.will_at = delay.and_then(|delay| state.disconnected_at.map(|at| at.plus(delay)));
    session.set_hold(taken.hold);
    replace(broker, space, session, state);
    Ok(())
}

/// Replaces a session's state and routes; its connection, or the reservation for one, stays.
fn replace(broker: &Broker, space: &Space, session: &Arc<Session>, state: State) {
    replace_if(broker, space, session, state, |_| true);
}

/// As [`replace`], if the state as it is allows it; whether it did.
fn replace_if(
    broker: &Broker,
    space: &Space,
    session: &Arc<Session>,
    mut state: State,
    may: impl FnOnce(&State) -> bool,
) -> bool {
    let wanted: Vec<Subscription> = state.subscriptions.values().cloned().collect();
    let old = {
        let mut current = session.lock();
        if !may(&current) {
            return false;
        }
        broker.schedule.set(session, &mut current, None);
        let (link, claiming) = (current.link.take(), current.claiming);
        state.inherit(&mut current);
        let old = std::mem::take(&mut current.subscriptions);
        *current = State { link, claiming, ..state };
        old
    };
    for filter in old.keys().filter(|filter| !wanted.iter().any(|one| one.filter == **filter)) {
        space.unsubscribe(session, filter);
    }
    wanted.iter().for_each(|one| space.subscribe(session, one));
    true
}

/// A session of a node that is gone becomes this node's, without a connection.
pub(super) fn adopt(broker: &Broker, taken: Taken) -> Result<(), Error> {
    let space = broker.space(&taken.seat.tenant);
    let session = space.session(&taken.seat.client);
    {
        let state = session.lock();
        // A client that comes at this moment takes it anew.
        if state.link.is_some() || (session.hold() != NOBODY && session.hold() >= taken.hold) {
            return Ok(());
        }
    }
    if taken.record.is_empty() {
        session.set_hold(taken.hold);
        space.forget(&session);
        broker.write_unwatched(vec![session.drop_row()]);
        return Ok(());
    }
    settle_in(broker, &space, &session, taken, None)?;
    let mut state = session.lock();
    let next = will::next_look(&state);
    broker.schedule.set(&session, &mut state, next);
    let put = session.put(&state)?;
    drop(state);
    broker.write_unwatched(vec![put]);
    Ok(())
}

/// What a row that changed means for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing.
    Nothing,
    /// To be looked at again: a client is just taking it here, or the store says it is here and it is not.
    Doubt,
}

/// Takes note of a row another node may have changed.
pub(super) fn seen(broker: &Broker, me: &str, seen: Seen) -> Result<Meaning, Error> {
    let space = broker.space(&seen.seat.tenant);
    let known = space.find(&seen.seat.client);
    let mut before = State::default();
    if let Some(session) = &known {
        let mut state = session.lock();
        if state.claiming {
            return Ok(Meaning::Doubt);
        }
        if seen.node == me {
            let is_ours = state.away.is_none() && session.hold() == seen.hold;
            return Ok(if is_ours || seen.record.is_none() { Meaning::Nothing } else { Meaning::Doubt });
        }
        let hold = session.hold();
        let is_older = if hold == NOBODY { seen.record.is_none() } else { hold >= seen.hold };
        if state.away.is_none() && is_older {
            return Ok(Meaning::Nothing);
        }
        if state.away.is_none() {
            // Another node has it: here it is over.
            before = State { uid: state.uid, inbound: std::mem::take(&mut state.inbound), ..State::default() };
            if let Some(link) = state.link.clone() {
                link.close(code::TAKEN_OVER);
                before.leaving = Some(link);
            }
            broker.schedule.set(session, &mut state, None);
            (state.gone, state.will) = (true, None);
        }
        drop(state);
        if session.lock().gone || seen.record.as_ref().is_none_or(bytes::Bytes::is_empty) {
            space.forget(session);
        }
    } else if seen.node == me {
        return Ok(if seen.record.is_some() { Meaning::Doubt } else { Meaning::Nothing });
    }
    let Some(record) = seen.record.filter(|record| !record.is_empty()) else { return Ok(Meaning::Nothing) };
    let record: record::Session = record::decode(&record)?;
    if record.expiry_seconds == 0 {
        // Its subscriptions are told by its node, while it is connected.
        known.iter().for_each(|session| space.forget(session));
        // Who has it must be known all the same: if that node goes, the will is to be sent.
    }
    let away = Away { node: seen.node, connected: record.disconnected_at.is_none() };
    let is_lasting = record.expiry_seconds > 0;
    let session = space.session(&seen.seat.client);
    let mut state = State { away: Some(away), ..State::of(record) };
    if !is_lasting {
        state.subscriptions.clear();
    }
    state.inherit(&mut before);
    let is_free = |current: &State| !current.claiming && (current.away.is_some() || current.link.is_none());
    Ok(if replace_if(broker, &space, &session, state, is_free) { Meaning::Nothing } else { Meaning::Doubt })
}
