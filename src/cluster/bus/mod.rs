//! The bus between nodes: messages that are lost without harm, in order between two nodes while they arrive.
//!
//! Owns: the trait [`Bus`] and what crosses it ([`message`], [`frame`]). Implementations: [`gate`] (before another one), [`process`] (tests, simulation,
//! faults on demand), [`redis`], and [`Off`] for a node without one. Not here: what a message makes a node do
//! (`cluster::forward`), who is a member (`cluster::membership`).
//!
//! Invariants:
//! - The bus carries hints and requests, never the truth. Whoever needs an answer has a deadline and another way.
//! - Sending never waits: a message is queued, or refused at once with the reason.
//! - Messages from one node to another arrive in the order they were sent, each at most once, or not at all.
//!
//! Tests: at the foot of each file; `tests/it/bus.rs`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::{
    config,
    types::{Fault, Kind, NodeId},
};

pub mod frame;
pub mod gate;
pub mod message;
pub mod process;
pub mod redis;

pub use message::Message;

/// Why a message was not taken. What was taken may still be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// As much waits to be sent as may.
    #[error("the bus to other nodes is full")]
    Overloaded,
    /// The bus has no connection at present, or the node has none at all.
    #[error("the bus to other nodes is down")]
    Down,
    /// The message is larger than the bus carries.
    #[error("a message of {0} bytes is too large for the bus")]
    TooLarge(usize),
    /// The message cannot be encoded. The types rule it out.
    #[error("a message cannot be encoded")]
    Encoding,
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Overloaded => Kind::Overloaded,
            Error::Down => Kind::Unavailable,
            Error::TooLarge(_) => Kind::Invalid,
            Error::Encoding => Kind::Internal,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Overloaded => "BUS_OVERLOADED",
            Error::Down => "BUS_DOWN",
            Error::TooLarge(_) => "BUS_TOO_LARGE",
            Error::Encoding => "INTERNAL",
        }
    }
    fn hint(&self) -> Option<String> {
        Some(String::from(match self {
            Error::Overloaded => "try again after the time in Retry-After, or add nodes",
            Error::Down => "look at redis.url and at the Redis server; nodes go on by inbox and scan meanwhile",
            Error::TooLarge(_) | Error::Encoding => return None,
        }))
    }
}

/// Whether the bus works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Messages flow.
    Up,
    /// They do not, and why.
    Down(Arc<str>),
    /// This node has no bus: it goes on by inbox and scan.
    Off,
}

/// The way to other nodes. Every method but [`Bus::close`] returns at once; all may be called from any thread.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// This node's address on the bus.
    fn node(&self) -> &NodeId;
    /// Queues a message for one node.
    ///
    /// # Errors
    /// [`Error`]: it was not queued.
    fn send(&self, to: &NodeId, message: &Message) -> Result<(), Error>;
    /// Queues a message for all other nodes.
    ///
    /// # Errors
    /// [`Error`]: it was not queued.
    fn broadcast(&self, message: &Message) -> Result<(), Error>;
    /// As [`Bus::send`], for a message whose loss costs only time: whoever waits for it has a deadline.
    fn hint(&self, to: &NodeId, message: &Message) {
        let _ = self.send(to, message);
    }
    /// Whether messages flow at present.
    fn health(&self) -> Health;
    /// Sends what waits and leaves the bus, within `patience`. Nothing is taken from then on.
    async fn close(&self, patience: Duration);
}

/// The bus that is configured, for a node of a cluster. Returns at once, whether the server can be had or not.
///
/// # Errors
/// [`redis::Unusable`] when the address cannot be used.
pub fn start(
    config: &config::Redis,
    cluster: &str,
    node: NodeId,
    handle: &tokio::runtime::Handle,
) -> Result<(Arc<dyn Bus>, Inlet), self::redis::Unusable> {
    if config.is_off() {
        let (bus, inlet) = Off::new(node);
        return Ok((bus, inlet));
    }
    let (bus, inlet) = self::redis::RedisBus::start(self::redis::Options::of(config, cluster)?, node, handle)?;
    Ok((bus, inlet))
}

/// What arrives from the bus.
#[derive(Debug)]
pub enum Inbound {
    /// A message.
    Message {
        /// Who sent it.
        from: NodeId,
        /// How long it was under way, in milliseconds; 0 when that is not known.
        age_ms: u64,
        /// What it says.
        message: Message,
    },
    /// What was sent to this node (or, without a name, to any) and is not answered yet may never have arrived.
    Lost {
        /// To whom.
        to: Option<NodeId>,
    },
}

/// Where messages arrive, one reader. A full inlet holds the bus back; it loses nothing.
#[derive(Debug)]
pub struct Inlet {
    receiver: mpsc::Receiver<Inbound>,
    /// Of a bus that has none to send.
    _open: Option<mpsc::Sender<Inbound>>,
}

/// Messages a reader may be behind before the bus is held back.
const INLET: usize = 4096;

impl Inlet {
    /// Both ends.
    pub(crate) fn new() -> (mpsc::Sender<Inbound>, Self) {
        let (sender, receiver) = mpsc::channel(INLET);
        (sender, Self { receiver, _open: None })
    }

    /// The next; `None` when the bus is closed. Cancel safe.
    pub async fn next(&mut self) -> Option<Inbound> {
        self.receiver.recv().await
    }

    /// The next if there is one already.
    pub fn try_next(&mut self) -> Option<Inbound> {
        self.receiver.try_recv().ok()
    }
}

/// A node without a bus: all that is sent is refused.
#[derive(Debug)]
pub struct Off(NodeId);

impl Off {
    /// No bus, and an inlet that stays empty.
    pub fn new(node: NodeId) -> (Arc<Self>, Inlet) {
        let (sender, inlet) = Inlet::new();
        (Arc::new(Self(node)), Inlet { _open: Some(sender), ..inlet })
    }
}

#[async_trait]
impl Bus for Off {
    fn node(&self) -> &NodeId {
        &self.0
    }
    fn send(&self, _: &NodeId, _: &Message) -> Result<(), Error> {
        Err(Error::Down)
    }
    fn broadcast(&self, _: &Message) -> Result<(), Error> {
        Err(Error::Down)
    }
    fn health(&self) -> Health {
        Health::Off
    }
    async fn close(&self, _: Duration) {}
}
