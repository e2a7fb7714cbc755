//! The MQTT door.
//!
//! Owns: what MQTT topics mean ([`inbound`]), names and filters ([`topic`]), and the broker that runs in this process.
//! [`external`] is the door's other mode, a client of a broker elsewhere.
//! Not here: what an instance decides, how effects are kept until they are sent (`delivery`).
//! Tests: at the foot of each file; `tests/it/mqtt.rs` with mosquitto and paho clients.

pub mod external;
pub mod inbound;
pub mod topic;
