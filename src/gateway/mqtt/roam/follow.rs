//! Tasks of a broker among others: following the store, taking mail, caring for what nodes that are gone left, and hearing
//! what peers say.
//!
//! Invariants: mail is taken into a session's queue in the step that removes it, by the node that has the session; a look that
//! was asked for is answered only after a read that began later. Tests: `tests/it/mqtt_cluster.rs`.

use std::{
    collections::{BTreeSet, HashSet},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    Memory, Roam, Sign, lock,
    note::{KIND, Letter, Note},
    seat,
};
use crate::{
    cluster::bus::message::Relay,
    gateway::mqtt::{
        embedded::{Broker, count_dropped, settle},
        packet::code,
        record::{self, Message},
        session::{NOBODY, Session},
    },
    store::{
        self, Done, MqttWrite,
        roaming::{self, Mail, Seat},
    },
    types::{
        InstanceId, Millis, NodeId, TenantId,
        limits::{MAX_RETAINED, MAX_RETAINED_BYTES},
    },
};

/// How often the store is looked at when nobody says that there is something.
const PERIOD: Duration = Duration::from_millis(500);
/// How often is looked for nodes that are gone.
const CARE: Duration = Duration::from_secs(1);
/// How often retained values are counted.
const COUNT: Duration = Duration::from_secs(60);
/// Pause after a failure of the store.
const PAUSE: Duration = Duration::from_millis(500);
/// Sessions adopted, letters taken at once.
const PAGE: usize = 500;

/// Follows what other nodes do with sessions, and cares for what is left of those that are gone, until the node stops.
/// `since`: where [`begin`] ended.
pub async fn rows(broker: Arc<Broker>, roam: Arc<Roam>, mut since: i64) {
    let (mut doubts, mut cared, mut counted) = (BTreeSet::new(), Instant::now(), None::<Instant>);
    roam.here();
    loop {
        tokio::select! {
            () = roam.look.notified() => {}
            () = tokio::time::sleep(PERIOD) => {}
            () = broker.drain.stopped() => return,
        }
        let asked = std::mem::take(&mut *lock(&roam.asked));
        match look(&broker, &roam, since, &mut doubts).await {
            Ok(until) => {
                since = until;
                for (node, call) in asked {
                    roam.send(&node, &Note::Looked { call });
                }
            }
            Err(error) => {
                tracing::debug!(%error, "MQTT sessions of other nodes cannot be followed at present");
                tokio::time::sleep(PAUSE).await;
            }
        }
        if cared.elapsed() < CARE {
            continue;
        }
        cared = Instant::now();
        roam.here();
        for (node, (tenant, filter)) in lock(&roam.peers).forget_silent(Instant::now()) {
            broker.space(&tenant).peer_wants(&node, &filter, false);
        }
        if let Err(error) = care(&broker, &roam, &mut doubts).await {
            tracing::debug!(%error, "what nodes left that are gone is looked at later");
        }
        if counted.is_none_or(|counted| counted.elapsed() >= COUNT) {
            counted = Some(Instant::now());
            if let Ok(full) = roam.sessions.full(MAX_RETAINED, MAX_RETAINED_BYTES).await {
                *lock(&roam.full) = full.into_iter().collect();
            }
        }
    }
}

/// Reads all sessions, and adopts those that nobody has. Returns where to go on.
///
/// # Errors
/// The store's.
pub async fn begin(broker: &Broker, roam: &Roam) -> Result<i64, store::Error> {
    let mut doubts = BTreeSet::new();
    let since = look(broker, roam, 0, &mut doubts).await?;
    care(broker, roam, &mut doubts).await?;
    Ok(since)
}

async fn look(broker: &Broker, roam: &Roam, since: i64, doubts: &mut BTreeSet<Seat>) -> Result<i64, store::Error> {
    let changes = roam.sessions.changes(since).await?;
    for row in changes.rows {
        let (place, node) = (row.seat.clone(), row.node.clone());
        match seat::seen(broker, roam.me().as_str(), row) {
            Ok(seat::Meaning::Doubt) => drop(doubts.insert(place)),
            Ok(seat::Meaning::Nothing) => {}
            Err(error) => tracing::warn!(%error, client = place.client, node, "an MQTT session cannot be read"),
        }
    }
    Ok(changes.until)
}

async fn care(broker: &Broker, roam: &Roam, doubts: &mut BTreeSet<Seat>) -> Result<(), store::Error> {
    for place in std::mem::take(doubts) {
        resolve(broker, roam, place).await?;
    }
    let holders: Vec<String> = broker.holders().into_iter().collect();
    if !holders.is_empty() {
        let dead = roam.sessions.dead(&holders).await?;
        while !dead.is_empty() {
            let adopted = roam.sessions.adopt(&dead, roam.me(), PAGE).await?;
            let is_last = adopted.len() < PAGE;
            for taken in adopted {
                let client = taken.seat.client.clone();
                if let Err(error) = seat::adopt(broker, taken) {
                    tracing::warn!(%error, client, "an MQTT session of a node that is gone cannot be read");
                }
            }
            if is_last {
                break;
            }
        }
    }
    for (tenant, instance) in roam.sessions.abandoned(PAGE).await? {
        sign(broker, roam, &tenant, &instance, None, false).await?;
    }
    Ok(())
}

/// A session whose row was seen in the middle of a change: by now it is here, or the row is looked at anew.
async fn resolve(broker: &Broker, roam: &Roam, place: Seat) -> Result<(), store::Error> {
    let session = broker.space(&place.tenant).find(&place.client);
    let is_busy = session.as_ref().is_some_and(|session| session.lock().link.is_some());
    let Some(holder) = roam.sessions.holder(&place).await? else { return Ok(()) };
    let is_ours = holder.node == roam.me().as_str();
    if is_busy || !is_ours || session.is_some_and(|session| session.hold() == holder.hold) {
        return Ok(());
    }
    // The store says it is here, and it is not: a connection failed while it was taken.
    if let Some(taken) = roam.sessions.claim(&place, roam.me(), holder.hold).await?
        && let Err(error) = seat::adopt(broker, taken)
    {
        tracing::warn!(%error, client = place.client, "an MQTT session cannot be read");
    }
    Ok(())
}

/// Takes mail until the node stops.
pub async fn mail(broker: Arc<Broker>, roam: Arc<Roam>) {
    let mut was_full = false;
    loop {
        if !was_full {
            tokio::select! {
                () = roam.mail.notified() => {}
                () = tokio::time::sleep(PERIOD) => {}
                () = broker.drain.stopped() => return,
            }
        }
        let waiting = std::mem::take(&mut *lock(&roam.emptied));
        was_full = match roam.sessions.mail(roam.me(), PAGE).await {
            Ok(letters) => {
                let is_full = letters.len() == PAGE;
                take(&broker, letters).await && is_full
            }
            Err(error) => {
                tracing::debug!(%error, "mail for MQTT sessions cannot be read at present");
                tokio::time::sleep(PAUSE).await;
                false
            }
        };
        if was_full {
            lock(&roam.emptied).extend(waiting);
        } else {
            waiting.into_iter().for_each(|tell| tell.send(()).unwrap_or_default());
        }
    }
}

/// Moves letters into the queues of sessions that are here; true when there was one.
async fn take(broker: &Broker, letters: Vec<Mail>) -> bool {
    let (mut writes, mut held) = (Vec::new(), Vec::new());
    for letter in letters {
        let Some(session) = broker.space(&letter.seat.tenant).find(&letter.seat.client) else { continue };
        let hold = session.hold();
        if hold == NOBODY || session.lock().away.is_some() {
            continue;
        }
        match enqueue(broker, &session, &letter) {
            Ok(Some((order, write))) => {
                held.push((session.clone(), order));
                writes.push(write);
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "mail for an MQTT session cannot be read"),
        }
        let Seat { tenant, client } = letter.seat;
        writes.push(MqttWrite::Collect { tenant, client, hold, mail: letter.id });
    }
    if writes.is_empty() {
        return false;
    }
    let (done, end) = Done::channel();
    broker.store.mqtt(writes, done);
    let is_durable = matches!(end.await, Ok(Ok(_)));
    for (session, order) in &held {
        settle(session, *order, true, is_durable);
    }
    is_durable
}

/// Puts a letter into a session's outbox, as its subscriptions ask for it; its position and the row.
fn enqueue(broker: &Broker, session: &Arc<Session>, letter: &Mail) -> Result<Option<(i64, MqttWrite)>, record::Error> {
    let queued = if letter.queued {
        record::decode(&letter.record)?
    } else {
        let Letter { message, from, aim } = record::decode(&letter.record)?;
        let state = session.lock();
        let Some((qos, retain, ids)) = state.wish(&message, from.as_deref() == Some(&*session.client), &aim) else {
            return Ok(None);
        };
        drop(state);
        record::Queued::Publish { message: Box::new(message), qos, retain, ids }
    };
    let row = record::encode(&queued)?;
    let Some(item) = crate::gateway::mqtt::registry::restore_item(0, queued, false) else { return Ok(None) };
    if item.qos == 0 {
        return Ok(None);
    }
    let item = crate::gateway::mqtt::outbox::Item { held: true, ..item };
    let Some(order) = session.lock().outbox.push(item, broker.config.max_queued) else {
        count_dropped("queue_full", 1);
        return Ok(None);
    };
    Ok(Some((order, session.enqueue(order, row, false))))
}

/// Writes comings and goings of devices, in order, until the node stops.
pub(in crate::gateway::mqtt) async fn signs(broker: Arc<Broker>, roam: Arc<Roam>, mut waiting: mpsc::Receiver<Sign>) {
    loop {
        let next = tokio::select! {
            next = waiting.recv() => next,
            () = broker.drain.stopped() => return,
        };
        let Some(Sign { tenant, instance, is_online, told }) = next else { return };
        let me = roam.me().clone();
        while let Err(error) = sign(&broker, &roam, &tenant, &instance, Some(&me), is_online).await {
            tracing::debug!(%error, "the presence of a device cannot be written at present");
            tokio::select! {
                () = tokio::time::sleep(PAUSE) => {}
                () = broker.drain.stopped() => return,
            }
        }
        if let Some(told) = told {
            let _ = told.send(());
        }
        roam.unsigned.fetch_sub(1, Ordering::AcqRel);
        broker.look_at_end();
    }
}

async fn sign(
    broker: &Broker,
    roam: &Roam,
    tenant: &TenantId,
    instance: &InstanceId,
    node: Option<&NodeId>,
    is_online: bool,
) -> Result<(), store::Error> {
    let message = presence(tenant, instance, is_online);
    let record = record::encode(&message).map_err(|error| store::Error::Backend(error.to_string()))?;
    let sign = roaming::Sign { tenant, instance, topic: &message.topic, record: &record };
    let is_news = match node {
        Some(node) if is_online => roam.sessions.arrive(sign, node).await?,
        node => roam.sessions.part(sign, node).await?,
    };
    if is_news {
        drop(broker.hand_out(&broker.space(tenant), &Arc::new(message), None, None));
    }
    Ok(())
}

/// The message that tells whether devices of an instance are connected.
pub(in crate::gateway::mqtt) fn presence(tenant: &TenantId, instance: &InstanceId, is_online: bool) -> Message {
    Message {
        topic: format!("sophont/{tenant}/{instance}/presence"),
        payload: Bytes::from_static(if is_online { b"online" } else { b"offline" }),
        qos: 1,
        retain: true,
        is_utf8: true,
        ..Message::default()
    }
}

impl Broker {
    /// Hears what another node relays. Returns at once.
    pub fn hear(self: &Arc<Self>, from: NodeId, relay: &Relay) {
        let Some(roam) = self.roam.as_ref().filter(|_| relay.kind == KIND) else { return };
        match Note::decode(&relay.body) {
            Ok(note) => heed(self, roam, from, note),
            Err(error) => tracing::debug!(%from, %error, "what another node's broker says cannot be read"),
        }
    }

    /// Nodes that have sessions this node knows of, beside itself.
    fn holders(&self) -> HashSet<String> {
        let spaces = self.spaces();
        let away = |session: Arc<Session>| session.lock().away.as_ref().map(|away| away.node.clone());
        spaces.iter().flat_map(|space| space.sessions()).filter_map(away).collect()
    }
}

fn heed(broker: &Arc<Broker>, roam: &Arc<Roam>, from: NodeId, note: Note) {
    let now = Instant::now();
    match note {
        Note::Here { told } => {
            if !lock(&roam.peers).is_level(&from, told, now) {
                roam.send(&from, &Note::TellAll);
            }
        }
        Note::TellAll => roam.tell_all(&from),
        Note::Wants { told, anew, changes } => {
            let heard = lock(&roam.peers).wants(&from, told, anew, changes, now);
            for ((tenant, filter), wanted) in heard.changes {
                broker.space(&tenant).peer_wants(&from, &filter, wanted);
            }
            if heard.ask {
                roam.send(&from, &Note::TellAll);
            }
        }
        Note::Look { call, told } => {
            let is_level = lock(&roam.peers).is_level(&from, told, now);
            if !is_level {
                roam.send(&from, &Note::TellAll);
            } else if call > 0 {
                lock(&roam.asked).push((from, call));
            }
            roam.look.notify_one();
        }
        Note::Looked { call } => roam.looked(&from, call),
        Note::Mail => roam.mail.notify_one(),
        Note::Publish(publish) => {
            let space = broker.space(&publish.tenant);
            let max = broker.config.max_queued;
            match space.route_relayed(&Arc::new(publish.message), publish.from.as_deref(), max, &publish.aim) {
                Ok(dropped) => count_dropped("queue_full", dropped),
                Err(error) => tracing::debug!(%error, "a message of another node cannot be handed on"),
            }
        }
        Note::Came { tenant, client, at } => came(broker, roam, &from, &tenant, &client, at),
        Note::Yield { call, tenant, client } => {
            let (broker, roam) = (broker.clone(), roam.clone());
            drop(tokio::spawn(async move { roam.let_go(&broker, from, call, tenant, client).await }));
        }
        Note::Yielded { call, unreleased, taken, sent } => {
            roam.remembered(call, Memory::of(unreleased, taken, sent));
        }
    }
}

/// The client of a session that does not last is at another node now.
fn came(broker: &Broker, roam: &Roam, from: &NodeId, tenant: &TenantId, client: &str, at: Millis) {
    roam.look.notify_one();
    let Some(session) = broker.space(tenant).find(client) else { return };
    let state = session.lock();
    // Of two at once the later one stays, by clocks that may differ: one of them stays in any case.
    let is_older = (state.since, roam.me()) < (at, from);
    if !state.stored
        && !state.claiming
        && state.away.is_none()
        && is_older
        && let Some(link) = state.link.clone()
    {
        link.close(code::TAKEN_OVER);
    }
}
