//! The MQTT door.
//!
//! Owns: what MQTT topics mean ([`inbound`]), names and filters ([`topic`]), and the broker that runs in this process
//! ([`embedded`]): `handshake` -> `connection` (`publish`, `subscribe`, `farewell`) -> `registry` (`outbox`, `retained`), with what is
//! kept in `record` and what follows a connection in `will`.
//! [`roam`] is what it does as one of several over one store. [`external`] is the door's other mode, a client of a broker elsewhere.
//! Not here: what an instance decides, how effects are kept until they are sent (`delivery`).
//! Tests: at the foot of each file; `tests/it/mqtt.rs` with mosquitto and paho clients.

mod connection;
pub mod embedded;
pub mod external;
mod farewell;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod handshake;
pub mod inbound;
mod lines;
mod outbox;
mod packet;
mod publish;
pub(crate) mod record;
mod registry;
mod retained;
pub mod roam;
mod session;
mod subscribe;
mod tls;
pub mod topic;
mod will;
mod wire;
