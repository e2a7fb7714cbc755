//! Sending what turns decided: at least once, in commit order per instance, keyed by effect id.
//!
//! Owns: the [`Courier`], which carries effects out; the pure parts it decides with (which effect becomes which call, whose
//! turn it is, how far the log is dealt with, how long to wait); the webhook client.
//! Not here: the decision (`instance::turn`), the wire (`gateway`), which plugs in through [`Publisher`] and [`Acceptor`].
//!
//! The turn log is the outbox: delivery follows it from a durable position, so an effect needs no row of its own unless its
//! target does not answer. Invariants: the position never passes an effect that is neither delivered nor put off durably;
//! effects of one instance reach one target in the order of their commits.
//! Tests: at the foot of the pure parts; `tests/it/delivery.rs`.

use async_trait::async_trait;
use bytes::Bytes;

use crate::types::{Fault, InstanceKey, Kind, ReplyTo, Stimulus, TenantId};

mod backoff;
mod courier;
mod follow;
mod lanes;
mod plan;
mod webhook;
mod window;

pub use courier::{Courier, Leaving, Observed, Parts};

/// Why delivery cannot start.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The client for webhooks could not be made.
    #[error("the webhook client could not be made: {0}")]
    Client(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        Kind::Internal
    }
}

/// A message to the outside over MQTT.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Tenant.
    pub tenant: TenantId,
    /// Full topic.
    pub topic: String,
    /// Payload.
    pub payload: Bytes,
    /// Whether it is JSON (sets the content type and payload format on MQTT 5).
    pub json: bool,
    /// Whether it becomes the topic's retained value.
    pub retain: bool,
    /// Correlation data for replies.
    pub correlation: Option<Vec<u8>>,
    /// `INSTANCE/TURN-INDEX`: user property `effect` on MQTT 5, the key for receivers that must not act twice.
    pub effect_id: String,
}

/// Port: publishes on MQTT. Implemented by the MQTT door, embedded or external; absent when the door is off.
#[async_trait]
pub trait Publisher: Send + Sync {
    /// Returns when the message is durably queued for every persistent session (embedded) or acknowledged by the broker.
    ///
    /// # Errors
    /// A sentence when the message could not be handed over; it is tried again later.
    async fn publish(&self, message: Message) -> Result<(), String>;
}

/// Port: takes a stimulus for an instance, wherever it lives. Implemented by the router.
#[async_trait]
pub trait Acceptor: Send + Sync {
    /// Returns when the stimulus is durably accepted (or was before).
    ///
    /// # Errors
    /// A sentence when it could not be accepted now.
    async fn accept(&self, key: InstanceKey, stimulus: Stimulus) -> Result<(), String>;
}

/// The topic of a reply: the response topic of the stimulus, or the instance's `out/reply`.
pub fn reply_topic(key: &InstanceKey, to: Option<&ReplyTo>) -> String {
    to.map_or_else(|| format!("sophont/{}/{}/out/reply", key.tenant, key.instance), |to| to.topic.clone())
}
