//! What happens to a session after its connection: the will is sent, and one day the session ends.
//!
//! Owns: the schedule of wills and expiries, and the task that follows it. Not here: what a connection does when it ends.
//!
//! Invariants: a session stands in the schedule at most once; a will whose publish fails stays and is tried again; a
//! session that is connected again is left alone. Tests: `tests/it/mqtt.rs`.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{
    embedded::{Broker, Settled},
    inbound::{self, Target},
    record::Will,
    registry::{Space, is_due},
    session::{Session, State},
};
use crate::{
    instance::Until,
    types::{AuthContext, Fault, Millis, StimulusId, TenantId},
};

/// How often the schedule is looked at.
const TICK: Duration = Duration::from_millis(200);
/// Pause before a will that could not be sent is tried again, in milliseconds.
const AGAIN_MS: i64 = 1000;
/// Longest wait for a will to be accepted.
const ACCEPT: Duration = Duration::from_secs(10);

/// Which sessions are to be looked at, and when.
#[derive(Debug, Default)]
pub struct Schedule(Mutex<BTreeSet<(Millis, TenantId, Arc<str>)>>);

impl Schedule {
    /// Moves a session to another time, or out of the schedule.
    pub fn set(&self, session: &Session, state: &mut State, at: Option<Millis>) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = |at| (at, session.tenant.clone(), session.client.clone());
        if let Some(old) = state.due {
            entries.remove(&entry(old));
        }
        if let Some(at) = at {
            entries.insert(entry(at));
        }
        state.due = at;
    }

    fn take_due(&self, now: Millis) -> Option<(TenantId, Arc<str>)> {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if entries.first().is_none_or(|(at, ..)| *at > now) {
            return None;
        }
        entries.pop_first().map(|(_, tenant, client)| (tenant, client))
    }
}

/// When a session without a connection is to be looked at next.
pub fn next_look(state: &State) -> Option<Millis> {
    let will = state.will.as_ref().and(state.will_at);
    [will, state.expires_at()].into_iter().flatten().min()
}

/// Follows the schedule until the node stops.
pub async fn follow(broker: Arc<Broker>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = broker.drain.draining() => return,
        }
        while let Some((tenant, client)) = broker.schedule.take_due(broker.clock.now()) {
            let space = broker.space(&tenant);
            if let Some(session) = space.find(&client) {
                tend(&broker, &space, &session).await;
            }
        }
    }
}

/// Does what is due for a session without a connection: its will, its end, its next look.
pub async fn tend(broker: &Arc<Broker>, space: &Arc<Space>, session: &Arc<Session>) {
    let (will, epoch) = {
        let mut state = session.lock();
        if state.link.is_some() || state.gone {
            return;
        }
        let now = broker.clock.now();
        let is_sent_now = is_due(state.will_at, now) || is_due(state.expires_at(), now);
        broker.schedule.set(session, &mut state, None);
        let will = if is_sent_now { state.will.take() } else { None };
        (will.map(|will| (will, state.uid, state.sender.clone())), state.epoch)
    };
    if will.is_some() && !broker.has_still(session).await {
        // Another node took it meanwhile, and the will with it.
        return;
    }
    let is_sent = match &will {
        None => true,
        Some((will, uid, sender)) => send(broker, space, session, will, *uid, epoch, sender).await,
    };
    let mut state = session.lock();
    if state.link.is_some() || state.gone || state.epoch != epoch {
        return;
    }
    let now = broker.clock.now();
    if !is_sent {
        state.will = will.map(|(will, ..)| will);
        return broker.schedule.set(session, &mut state, Some(now.plus(AGAIN_MS)));
    }
    if will.is_some() {
        state.will_at = None;
    }
    if is_due(state.expires_at(), now) {
        state.gone = true;
        let had_row = state.stored;
        drop(state);
        space.forget(session);
        if had_row {
            broker.write_unwatched(vec![session.drop_row()]);
        }
        return;
    }
    let next = next_look(&state);
    broker.schedule.set(session, &mut state, next);
    if will.is_some() && state.stored {
        let put = session.put(&state);
        drop(state);
        broker.write_unwatched(put.into_iter().collect());
    }
}

/// Sends a will; false when it is to be tried again. The right to its topic was checked when it was taken.
pub async fn send(
    broker: &Arc<Broker>,
    space: &Arc<Space>,
    session: &Session,
    will: &Will,
    uid: u64,
    epoch: u64,
    sender: &str,
) -> bool {
    let now = broker.clock.now();
    let auth = AuthContext::system(space.tenant.clone());
    let mut message = will.message.clone();
    message.expires_at = message.expires_at.map(|life| now.plus(life.0));
    let plain = broker.config.plain_topics;
    let stimulus = match inbound::target(&auth, &message.topic, plain) {
        Err(_) => return true,
        Ok(target @ (Target::Plain | Target::Presence(_))) => {
            message.retain |= matches!(target, Target::Presence(_));
            return match broker.distribute(space, message, Some(&session.client)) {
                Ok(Settled::Now) => true,
                Ok(Settled::Rows(done)) => done.await.unwrap_or(false),
                Err(refusal) => refusal.reason.is_permanent(),
            };
        }
        Ok(Target::Reported(key)) => {
            inbound::reported(&auth, &incoming(&message), sender, now).map(|stimulus| (key, stimulus, Until::Decided))
        }
        Ok(Target::Stimulus(key, channel)) => {
            inbound::stimulus(&auth, channel, &incoming(&message), sender, plain, now)
                .map(|stimulus| (key, stimulus, Until::Accepted))
        }
    };
    let Ok((key, mut stimulus, until)) = stimulus else { return true };
    if !stimulus.repeatable
        && let Ok(id) = StimulusId::new(format!("mqw.{uid:016x}.{epoch}"))
    {
        stimulus = stimulus.with_repeatable_id(id);
    }
    let error = match broker.inward.submit(&key, stimulus, until, None) {
        Err(error) => error,
        Ok(answer) => match tokio::time::timeout(ACCEPT, answer).await {
            Ok(Ok(Ok(_))) => return true,
            Ok(Ok(Err(error))) => error,
            Ok(Err(_)) | Err(_) => return false,
        },
    };
    !error.kind().is_retryable()
}

/// The parts of a stored message that make a stimulus.
fn incoming(message: &super::record::Message) -> inbound::Incoming<'_> {
    let mut incoming = inbound::Incoming {
        payload: &message.payload,
        is_utf8: message.is_utf8,
        content_type: message.content_type.as_deref(),
        response_topic: message.response_topic.as_deref(),
        correlation: message.correlation.as_deref(),
        ..inbound::Incoming::default()
    };
    message.properties.iter().for_each(|(name, value)| incoming.property(name, value));
    incoming
}
