//! MQTT sessions that go from node to node: who has one, taking it, following the others, and messages left for it.
//!
//! Owns: the trait a store implements that several nodes use. Not here: what sessions and messages mean (the MQTT door, to
//! which all records belong), writes of those a node has (`store::MqttWrite`).
//!
//! Invariants:
//! - A session is taken under a new number, its *hold*. What is written under an older hold is not applied, however late it
//!   comes, and what the holder before wrote is either seen by the taker or never applied.
//! - A row told by [`Roaming::changes`] may be told again; none is left out.
//! - A stimulus that was made of a session's publish under a hold that is barred is refused, unless it is in the store already.
//!
//! Tests: at the foot; `tests/it/roaming.rs`.

use async_trait::async_trait;
use bytes::Bytes;

use super::Error;
use crate::types::{InstanceId, NodeId, StimulusId, TenantId};

/// A session's place in the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seat {
    /// Tenant.
    pub tenant: TenantId,
    /// The session's key.
    pub client: String,
}

/// Who has a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The node's id; empty when no node ever had it.
    pub node: String,
    /// Under which number.
    pub hold: u64,
    /// Whether that node lives: its process is there and its lease runs.
    pub alive: bool,
    /// Whether its process seems to be there, whatever became of its lease.
    pub running: bool,
}

/// A session that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Which.
    pub seat: Seat,
    /// The number under which it is held now.
    pub hold: u64,
    /// Its record; empty for a place that was made just now.
    pub record: Bytes,
    /// Its queue, in order.
    pub queue: Vec<(i64, Bytes)>,
}

/// A session's row as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Which.
    pub seat: Seat,
    /// Who has it.
    pub node: String,
    /// Under which number.
    pub hold: u64,
    /// Its record; `None` when the session is over.
    pub record: Option<Bytes>,
}

/// What changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Where to go on.
    pub until: i64,
    /// Sessions that are over first, then the others.
    pub rows: Vec<Seen>,
}

/// A message left for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mail {
    /// Its number, growing.
    pub id: i64,
    /// For whom.
    pub seat: Seat,
    /// Whether the record is one of a queue already.
    pub queued: bool,
    /// The message.
    pub record: Bytes,
}

/// Whose devices come or go, and the retained value that says so.
#[derive(Debug, Clone, Copy)]
pub struct Sign<'a> {
    /// Tenant.
    pub tenant: &'a TenantId,
    /// Instance.
    pub instance: &'a InstanceId,
    /// Topic of the retained value.
    pub topic: &'a str,
    /// Its record.
    pub record: &'a [u8],
}

/// Which session a stimulus comes from whose sender gave it no id, and under which hold its node had the session. It stands in
/// the id that the MQTT door gives it: `mq.SESSION.PACKET.CONNECTION.CONTENT.COUNT.HOLD`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin<'a> {
    /// What tells the session from all others of its tenant.
    pub session: &'a str,
    /// The hold.
    pub hold: u64,
}

impl<'a> Origin<'a> {
    /// What an id says; `None` when its sender chose it, or its session never leaves its node.
    pub fn of(id: &'a StimulusId) -> Option<Self> {
        let mut parts = id.as_str().strip_prefix("mq.")?.split('.');
        let (session, hold) = (parts.next()?, parts.nth(4)?.parse().ok()?);
        parts.next().is_none().then_some(Self { session, hold })
    }
}

/// Sessions several nodes share. All calls go to the truth itself, never to a replica. Cancel safe.
#[async_trait]
pub trait Roaming: Send + Sync + 'static {
    /// Who has a session, if it is there.
    async fn holder(&self, seat: &Seat) -> Result<Option<Holder>, Error>;
    /// Takes a session for a node from the one that has it under this hold. `None` when somebody else took it meanwhile.
    async fn claim(&self, seat: &Seat, node: &NodeId, hold: u64) -> Result<Option<Taken>, Error>;
    /// Makes a place for a session, with an empty record. `None` when there is one.
    async fn found(&self, seat: &Seat, node: &NodeId) -> Result<Option<Taken>, Error>;
    /// Takes sessions of these nodes, as far as they do not live, at most `limit`.
    async fn adopt(&self, from: &[String], node: &NodeId, limit: usize) -> Result<Vec<Taken>, Error>;
    /// From now on nothing new is applied that was made of this session's publishes under this hold or an earlier one (see
    /// [`Origin`]). When it returns, all that was applied can be read, and none of the rest will ever be. Waits for the
    /// transactions under way: its caller has a deadline.
    async fn bar(&self, tenant: &TenantId, origin: Origin<'_>) -> Result<(), Error>;
    /// Which of these nodes do not live.
    async fn dead(&self, nodes: &[String]) -> Result<Vec<String>, Error>;
    /// Sessions that changed since an earlier answer's `until`; 0 for all.
    async fn changes(&self, since: i64) -> Result<Changes, Error>;
    /// Messages left for sessions that this node has, oldest first, at most `limit`.
    async fn mail(&self, node: &NodeId, limit: usize) -> Result<Vec<Mail>, Error>;
    /// Retained values whose topic begins so, in the order of topics.
    async fn retained(&self, tenant: &TenantId, prefix: &str) -> Result<Vec<Bytes>, Error>;
    /// Tenants with more retained values, or bytes of them, than these.
    async fn full(&self, values: usize, bytes: usize) -> Result<Vec<TenantId>, Error>;
    /// Devices of an instance are at this node now. True, and the value set, when they were at no other.
    async fn arrive(&self, sign: Sign<'_>, node: &NodeId) -> Result<bool, Error>;
    /// They are not any more; without a node: at none of those that do not live. True, and the value set, when they are
    /// nowhere now.
    async fn part(&self, sign: Sign<'_>, node: Option<&NodeId>) -> Result<bool, Error>;
    /// Instances whose devices were at a node that does not live, at most `limit`.
    async fn abandoned(&self, limit: usize) -> Result<Vec<(TenantId, InstanceId)>, Error>;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_read_from_the_ids_of_the_door_and_from_no_others() {
        let id = |text: &str| StimulusId::new(text).unwrap();
        let told = id("mq.00aa.7.146.0b419297.1.38");
        assert_eq!(Origin::of(&told), Some(Origin { session: "00aa", hold: 38 }));
        for other in ["mq.00aa.7.146.0b419297.1", "mq.00aa.7.146.0b419297.1.38.2", "mq.a.b.c.d.e.f", "order-7", "mq."] {
            assert_eq!(Origin::of(&id(other)), None, "{other}");
        }
    }
}
