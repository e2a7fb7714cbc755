//! One tenant's sessions, routes and retained values, and the way of a message to its receivers in memory.
//!
//! Not here: rows (`embedded` submits the writes that are returned here), sockets (`connection`).
//!
//! Invariants: a tenant has its own space, so no filter can select a topic of another tenant; a message that gets a row is
//! held until the row was handed to the store, and with QoS 2 until it is durable. Lock order: retained, routes, then one
//! session; sessions is asked for alone. Tests: at the foot; `tests/it/mqtt.rs`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use serde::Serialize;

use super::{
    outbox::Item,
    record::{self, Message, Subscription},
    retained::Retained,
    roam::{
        Roam,
        note::{Aim, Letter},
    },
    session::{Away, NOBODY, Session},
    topic::{Filter, Trie},
};
use crate::{
    store::MqttWrite,
    types::{InstanceId, Millis, NodeId, TenantId},
};

/// A session's subscription, as routes hold it.
#[derive(Debug, Clone)]
struct Member {
    session: Arc<Session>,
    /// The filter, where it is shared.
    group: Option<Arc<str>>,
    /// Whether other nodes were told of it.
    told: bool,
    qos: u8,
    no_local: bool,
    retain_as_published: bool,
    id: Option<u32>,
}

#[derive(Debug)]
struct Group {
    /// The filter, with its prefix.
    filter: Arc<str>,
    members: Vec<Member>,
    /// Nodes with members whose sessions do not last.
    peers: Vec<NodeId>,
    next: AtomicUsize,
}

/// Who of a group gets a message.
enum Chosen {
    Member(Member),
    Peer(NodeId, Arc<str>),
}

#[derive(Debug, Default)]
struct Routes {
    plain: Trie<Arc<str>, Member>,
    shared: Trie<Box<str>, Group>,
    /// What sessions of other nodes want that do not last.
    peers: Trie<NodeId, NodeId>,
}

/// A message's receivers: sessions, and nodes.
#[derive(Default)]
struct Receivers {
    members: Vec<Member>,
    aims: BTreeMap<NodeId, Aim>,
}

/// What became of a message in memory, and what is still to be written.
#[derive(Debug, Default)]
pub struct Routed {
    /// Rows to write.
    pub writes: Vec<MqttWrite>,
    /// Messages behind those rows: session, position, QoS.
    pub held: Vec<(Arc<Session>, i64, u8)>,
    /// Receivers whose queue was full.
    pub dropped: u64,
    /// Receivers.
    pub receivers: usize,
    /// Other nodes that hand it on to their sessions.
    pub aims: BTreeMap<NodeId, Aim>,
    /// Other nodes for whose sessions it is left in the store.
    pub posted: HashSet<String>,
}

/// A tenant.
pub struct Space {
    /// Which.
    pub tenant: TenantId,
    sessions: Mutex<HashMap<Arc<str>, Arc<Session>, ahash::RandomState>>,
    routes: RwLock<Routes>,
    retained: RwLock<Retained>,
    present: Mutex<HashMap<InstanceId, usize>>,
    /// The way to other nodes.
    roam: Option<Arc<Roam>>,
}

impl Space {
    /// An empty space.
    pub fn new(tenant: TenantId, roam: Option<Arc<Roam>>) -> Self {
        Self {
            roam,
            tenant,
            sessions: Mutex::default(),
            routes: RwLock::default(),
            retained: RwLock::default(),
            present: Mutex::default(),
        }
    }

    /// The session of a client id, made if there is none.
    pub fn session(&self, client: &str) -> Arc<Session> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = sessions.get(client) {
            return session.clone();
        }
        let client: Arc<str> = Arc::from(client);
        let session = Arc::new(Session::new(self.tenant.clone(), client.clone()));
        if self.roam.is_some() {
            session.set_hold(NOBODY);
        }
        sessions.insert(client, session.clone());
        session
    }

    /// Puts a stored session in its place.
    pub fn restore(&self, session: Arc<Session>) {
        let subscriptions: Vec<Subscription> = session.lock().subscriptions.values().cloned().collect();
        subscriptions.iter().for_each(|subscription| self.subscribe(&session, subscription));
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.insert(session.client.clone(), session);
    }

    /// The session of a client id, if there is one.
    pub fn find(&self, client: &str) -> Option<Arc<Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).get(client).cloned()
    }

    /// All sessions.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Takes a session that is over out of routes and registry.
    pub fn forget(&self, session: &Arc<Session>) {
        let filters: Vec<String> = std::mem::take(&mut session.lock().subscriptions).into_keys().collect();
        for filter in &filters {
            self.unsubscribe(session, filter);
        }
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.get(&session.client).is_some_and(|current| Arc::ptr_eq(current, session)) {
            sessions.remove(&session.client);
        }
    }

    /// Routes a subscription's messages to a session; replaces an earlier one with the same filter.
    pub fn subscribe(&self, session: &Arc<Session>, subscription: &Subscription) {
        let Some(filter) = Filter::parse(&subscription.filter) else { return };
        let told = self.roam.is_some() && {
            let state = session.lock();
            state.away.is_none() && !state.is_persistent()
        };
        let shared: Option<Arc<str>> = filter.share.map(|_| Arc::from(&*subscription.filter));
        let member = Member {
            session: session.clone(),
            group: shared.clone(),
            told,
            qos: subscription.qos,
            no_local: subscription.no_local,
            retain_as_published: subscription.retain_as_published,
            id: subscription.id,
        };
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let old = match (filter.share, shared) {
            (Some(name), Some(shared)) => routes.group(filter.path, name, &shared).join(member),
            _ => routes.plain.insert(filter.path, session.client.clone(), member),
        };
        drop(routes);
        self.tell(&subscription.filter, old.is_some_and(|old| old.told), told);
    }

    /// Tells other nodes that a filter is wanted, or no longer.
    fn tell(&self, filter: &str, was: bool, is: bool) {
        if let Some(roam) = &self.roam
            && was != is
        {
            roam.want(&self.tenant, filter, is);
        }
    }

    /// Ends a subscription; false when there was none.
    pub fn unsubscribe(&self, session: &Arc<Session>, filter: &str) -> bool {
        let Some(parsed) = Filter::parse(filter) else { return false };
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let old = match parsed.share {
            None => routes.plain.remove(parsed.path, &session.client),
            Some(name) => routes.leave(parsed.path, name, |group| group.part(session)),
        };
        drop(routes);
        self.tell(filter, old.as_ref().is_some_and(|old| old.told), false);
        old.is_some()
    }

    /// Sessions of another node that do not last want a filter, or no longer.
    pub fn peer_wants(&self, node: &NodeId, filter: &str, wanted: bool) {
        let Some(parsed) = Filter::parse(filter) else { return };
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        match (parsed.share, wanted) {
            (None, true) => drop(routes.peers.insert(parsed.path, node.clone(), node.clone())),
            (None, false) => drop(routes.peers.remove(parsed.path, node)),
            (Some(name), true) => {
                let group = routes.group(parsed.path, name, &Arc::from(filter));
                if !group.peers.contains(node) {
                    group.peers.push(node.clone());
                }
            }
            (Some(name), false) => routes.leave(parsed.path, name, |group| group.peers.retain(|other| other != node)),
        }
    }

    /// Everybody a topic goes to. Sessions with several matching subscriptions stand several times, next to each other.
    fn receivers(&self, name: &str) -> Receivers {
        let mut found = Receivers::default();
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        routes.plain.visit(name, |member| found.members.push(member.clone()));
        if !routes.shared.is_empty() {
            routes.shared.visit(name, |group| match group.choose() {
                Some(Chosen::Member(member)) => found.members.push(member),
                Some(Chosen::Peer(node, filter)) => {
                    found.aims.entry(node).or_default().shared.push(filter.to_string());
                }
                None => {}
            });
        }
        if !routes.peers.is_empty() {
            routes.peers.visit(name, |node| found.aims.entry(node.clone()).or_default().plain = true);
        }
        drop(routes);
        found.members.sort_by_key(|member| Arc::as_ptr(&member.session));
        found
    }

    /// Hands a message of another node to sessions here: those that do not last, and the others as far as it is QoS 0 for them.
    /// Returns how many had no room.
    ///
    /// # Errors
    /// [`record::Error`], which the types rule out.
    pub fn route_relayed(
        &self,
        message: &Arc<Message>,
        from: Option<&str>,
        max_queued: usize,
        aim: &Aim,
    ) -> Result<u64, record::Error> {
        let mut found = Receivers::default();
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        if aim.plain {
            routes.plain.visit(&message.topic, |member| found.members.push(member.clone()));
        }
        for filter in &aim.shared {
            if let Some(Filter { share: Some(name), path }) = Filter::parse(filter)
                && let Some(group) = routes.shared.get_mut(path, &Box::from(name))
            {
                found.members.extend(group.choose_here());
            }
        }
        drop(routes);
        found.members.retain(|member| member.session.lock().away.is_none());
        found.members.sort_by_key(|member| Arc::as_ptr(&member.session));
        self.route_to(found, message, from, max_queued, true).map(|routed| routed.dropped)
    }

    /// Puts a message into the outbox of everybody it goes to. `from` is the client id of its publisher.
    ///
    /// # Errors
    /// [`record::Error`], which the types rule out.
    pub fn route(
        &self,
        message: &Arc<Message>,
        from: Option<&str>,
        max_queued: usize,
    ) -> Result<Routed, record::Error> {
        self.route_to(self.receivers(&message.topic), message, from, max_queued, false)
    }

    fn route_to(
        &self,
        found: Receivers,
        message: &Arc<Message>,
        from: Option<&str>,
        max_queued: usize,
        is_relayed: bool,
    ) -> Result<Routed, record::Error> {
        let mut routed = Routed { aims: found.aims, ..Routed::default() };
        let mut rows = Rows::default();
        for same in found.members.chunk_by(|a, b| Arc::ptr_eq(&a.session, &b.session)) {
            let session = &same[0].session;
            let wanted = || same.iter().filter(|member| !(member.no_local && from == Some(&*session.client)));
            let Some(qos) = wanted().map(|member| member.qos.min(message.qos)).max() else { continue };
            let retain = message.retain && wanted().any(|member| member.retain_as_published);
            let ids: Vec<u32> = wanted().filter_map(|member| member.id).collect();
            let mut state = session.lock();
            if let Some(away) = &state.away {
                routed.away(away, session, message, from, qos, aim_of(same))?;
                continue;
            }
            if state.claiming
                && qos > 0
                && state.is_persistent()
                && let Some(roam) = &self.roam
            {
                // Behind what was left for it so far.
                let here = Away { node: roam.me().as_str().into(), connected: true };
                routed.away(&here, session, message, from, qos, aim_of(same))?;
                continue;
            }
            let link = state.link.clone();
            if is_relayed && qos > 0 && state.is_persistent() {
                // It comes by the store.
                continue;
            }
            if state.gone || (link.is_none() && (qos == 0 || !state.is_persistent())) {
                continue;
            }
            routed.receivers += 1;
            let stored = qos > 0 && state.is_persistent();
            let item = Item { stored, held: stored, ..Item::new(message.clone(), qos, retain, ids.clone()) };
            let Some(order) = state.outbox.push(item, max_queued) else {
                routed.dropped += 1;
                continue;
            };
            drop(state);
            if stored {
                routed.writes.push(session.enqueue(order, rows.of(message, qos, retain, &ids)?, true));
                routed.held.push((session.clone(), order, qos));
            } else if let Some(link) = link {
                link.wake();
            }
        }
        Ok(routed)
    }

    /// Retained values, to change them.
    pub fn retained_mut(&self) -> RwLockWriteGuard<'_, Retained> {
        self.retained.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Retained values.
    pub fn retained(&self) -> RwLockReadGuard<'_, Retained> {
        self.retained.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection of a device bound to an instance begins; true for the first.
    pub fn arrive(&self, instance: &InstanceId) -> bool {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let count = present.entry(instance.clone()).or_default();
        *count += 1;
        *count == 1
    }

    /// Such a connection ended; true for the last.
    pub fn leave(&self, instance: &InstanceId) -> bool {
        let mut present = self.present.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = present.get_mut(instance) else { return false };
        *count = count.saturating_sub(1);
        let is_last = *count == 0;
        if is_last {
            present.remove(instance);
        }
        is_last
    }
}

impl Routes {
    /// A group of a shared filter, made if there is none.
    fn group(&mut self, path: &str, name: &str, filter: &Arc<str>) -> &mut Group {
        let group =
            || Group { filter: filter.clone(), members: Vec::new(), peers: Vec::new(), next: AtomicUsize::new(0) };
        self.shared.get_or_insert(path, Box::from(name), group)
    }

    /// Changes a group, and removes it when nobody is left.
    fn leave<T: Default>(&mut self, path: &str, name: &str, leave: impl FnOnce(&mut Group) -> T) -> T {
        let name: Box<str> = Box::from(name);
        let Some(group) = self.shared.get_mut(path, &name) else { return T::default() };
        let left = leave(group);
        if group.members.is_empty() && group.peers.is_empty() {
            self.shared.remove(path, &name);
        }
        left
    }
}

impl Group {
    fn join(&mut self, member: Member) -> Option<Member> {
        let old = self.part(&member.session);
        self.members.push(member);
        old
    }

    fn part(&mut self, session: &Arc<Session>) -> Option<Member> {
        let at = self.members.iter().position(|other| Arc::ptr_eq(&other.session, session))?;
        Some(self.members.remove(at))
    }

    /// The next in turn that is connected, here or at another node, else the next in turn that keeps messages.
    fn choose(&self) -> Option<Chosen> {
        let count = self.members.len() + self.peers.len();
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = || (0..count).map(|step| start.wrapping_add(step) % count);
        let connected = in_turn().find_map(|at| match self.members.get(at) {
            Some(member) => member.is_connected().then(|| Chosen::Member(member.clone())),
            None => {
                let peer = self.peers.get(at - self.members.len())?;
                Some(Chosen::Peer(peer.clone(), self.filter.clone()))
            }
        });
        connected.or_else(|| {
            let lasts = |member: &&Member| member.session.lock().is_persistent();
            in_turn().filter_map(|at| self.members.get(at)).find(lasts).cloned().map(Chosen::Member)
        })
    }

    /// The next in turn that is connected here.
    fn choose_here(&self) -> Option<Member> {
        let count = self.members.len();
        let start = self.next.fetch_add(1, Ordering::Relaxed);
        let mut in_turn = (0..count).filter_map(|step| self.members.get(start.wrapping_add(step) % count));
        in_turn.find(|member| member.session.lock().link.is_some()).cloned()
    }
}

impl Member {
    fn is_connected(&self) -> bool {
        let state = self.session.lock();
        state.away.as_ref().map_or(state.link.is_some(), |away| away.connected)
    }
}

/// Through which subscriptions of a session a message comes to it.
fn aim_of(members: &[Member]) -> Aim {
    let shared = members.iter().filter_map(|member| member.group.as_deref()).map(String::from).collect();
    Aim { plain: members.iter().any(|member| member.group.is_none()), shared }
}

impl Routed {
    /// A message for a session that another node has: at QoS 0 by that node while its client is there, else through the store.
    fn away(
        &mut self,
        away: &Away,
        session: &Session,
        message: &Message,
        from: Option<&str>,
        qos: u8,
        aim: Aim,
    ) -> Result<(), record::Error> {
        if qos > 0 {
            let letter = Letter { message: message.clone(), from: from.map(String::from), aim };
            let (tenant, client) = (session.tenant.clone(), session.client.to_string());
            self.writes.push(MqttWrite::Mail { tenant, client, record: record::encode(&letter)? });
            self.posted.insert(away.node.clone());
        } else if away.connected
            && let Ok(node) = NodeId::new(&away.node)
        {
            let there = self.aims.entry(node).or_default();
            there.plain |= aim.plain;
            there.shared.extend(aim.shared);
        } else {
            return Ok(());
        }
        self.receivers += 1;
        Ok(())
    }
}

/// The stored form of one message for many sessions: encoded once for each different form.
#[derive(Default)]
struct Rows {
    last: Option<(u8, bool, Vec<u32>, Bytes)>,
}

/// [`record::Queued`] with its parts borrowed; the same bytes.
#[derive(Serialize)]
enum QueuedRef<'a> {
    Publish { message: &'a Message, qos: u8, retain: bool, ids: &'a [u32] },
}

impl Rows {
    fn of(&mut self, message: &Message, qos: u8, retain: bool, ids: &[u32]) -> Result<Bytes, record::Error> {
        if let Some((last_qos, last_retain, last_ids, bytes)) = &self.last
            && (*last_qos, *last_retain, &last_ids[..]) == (qos, retain, ids)
        {
            return Ok(bytes.clone());
        }
        let bytes = record::encode(&QueuedRef::Publish { message, qos, retain, ids })?;
        self.last = Some((qos, retain, ids.to_vec(), bytes.clone()));
        Ok(bytes)
    }
}

/// The message a stored row holds, as an outbox keeps it.
pub fn restore_item(order: i64, queued: record::Queued, was_connected: bool) -> Option<Item> {
    match queued {
        record::Queued::Release => None,
        record::Queued::Publish { message, qos, retain, ids } => {
            let item = Item::new(Arc::from(message), qos, retain, ids);
            Some(Item { order, stored: true, dup: was_connected, ..item })
        }
    }
}

/// Whether a time has come.
pub fn is_due(at: Option<Millis>, now: Millis) -> bool {
    at.is_some_and(|at| at <= now)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        gateway::{auth::Pass, mqtt::session::Link},
        types::AuthContext,
    };

    fn space() -> Space {
        Space::new(TenantId::new("t").unwrap(), None)
    }

    fn connected(space: &Space, client: &str, expiry: u32) -> Arc<Session> {
        let session = space.session(client);
        let pass = Pass::new(AuthContext::loopback(space.tenant.clone()));
        let mut state = session.lock();
        (state.link, state.expiry_seconds, state.epoch) = (Some(Arc::new(Link::new(Arc::new(pass)))), expiry, 1);
        drop(state);
        session
    }

    fn wish(filter: &str, qos: u8, id: Option<u32>) -> Subscription {
        Subscription { filter: filter.into(), qos, no_local: false, retain_as_published: false, id }
    }

    fn message(topic: &str, qos: u8) -> Arc<Message> {
        Arc::new(Message { topic: topic.into(), qos, ..Message::default() })
    }

    #[test]
    fn overlapping_subscriptions_deliver_once_with_the_highest_qos_and_all_ids() {
        let space = space();
        let session = connected(&space, "c", 0);
        space.subscribe(&session, &wish("a/+", 0, Some(1)));
        space.subscribe(&session, &wish("a/#", 1, Some(2)));
        let routed = space.route(&message("a/b", 2), None, 9).unwrap();
        assert_eq!((routed.receivers, routed.writes.len()), (1, 0));
        let mut seen = Vec::new();
        session.lock().outbox.pump(9, Millis(0), |out| {
            seen.push((out.qos, out.ids.to_vec()));
            crate::gateway::mqtt::outbox::Wrote::Yes
        });
        let (qos, mut ids) = seen.pop().unwrap();
        ids.sort_unstable();
        assert_eq!((qos, ids, seen.len()), (1, vec![1, 2], 0));
    }

    #[test]
    fn rows_are_written_for_sessions_that_last_and_are_the_stored_form() {
        let space = space();
        let session = connected(&space, "c", 60);
        space.subscribe(&session, &wish("a", 2, None));
        session.lock().link = None;
        assert_eq!(space.route(&message("a", 0), None, 9).unwrap().receivers, 0);
        let routed = space.route(&message("a", 2), None, 9).unwrap();
        let [MqttWrite::Enqueue { order: 1, record, .. }] = &routed.writes[..] else { panic!("one row") };
        let record::Queued::Publish { message: stored, qos: 2, .. } = record::decode(record).unwrap() else {
            panic!("a publish")
        };
        assert_eq!(*stored, *message("a", 2));
        assert_eq!(space.route(&message("a", 1), None, 1).unwrap().dropped, 1);
    }

    #[test]
    fn a_group_takes_turns_and_prefers_those_who_are_there() {
        let space = space();
        let (one, two) = (connected(&space, "1", 60), connected(&space, "2", 60));
        for session in [&one, &two] {
            space.subscribe(session, &wish("$share/g/a", 1, None));
        }
        for _ in 0..4 {
            space.route(&message("a", 1), None, 99).unwrap();
        }
        assert_eq!((one.lock().outbox.strong(), two.lock().outbox.strong()), (2, 2));
        one.lock().link = None;
        for _ in 0..4 {
            space.route(&message("a", 1), None, 99).unwrap();
        }
        assert_eq!((one.lock().outbox.strong(), two.lock().outbox.strong()), (2, 6));
        assert!(space.unsubscribe(&one, "$share/g/a") && space.unsubscribe(&two, "$share/g/a"));
        assert!(!space.unsubscribe(&two, "$share/g/a"));
        assert_eq!(space.route(&message("a", 1), None, 99).unwrap().receivers, 0);
    }

    #[test]
    fn no_local_and_gone_sessions_get_nothing() {
        let space = space();
        let session = connected(&space, "c", 0);
        let own = Subscription { no_local: true, ..wish("a", 1, None) };
        space.subscribe(&session, &own);
        session.lock().subscriptions.insert("a".into(), own);
        assert_eq!(space.route(&message("a", 1), Some("c"), 9).unwrap().receivers, 0);
        assert_eq!(space.route(&message("a", 1), Some("d"), 9).unwrap().receivers, 1);
        space.forget(&session);
        assert_eq!(space.route(&message("a", 1), None, 9).unwrap().receivers, 0);
        assert!(space.find("c").is_none());
    }

    #[test]
    fn presence_counts_connections() {
        let space = space();
        let lamp = InstanceId::new("lamp").unwrap();
        assert!(space.arrive(&lamp) && !space.arrive(&lamp));
        assert!(!space.leave(&lamp) && space.leave(&lamp) && !space.leave(&lamp));
    }
}
