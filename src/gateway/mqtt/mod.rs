//! The MQTT door.
//!
//! Owns: what MQTT topics mean ([`inbound`]), names and filters ([`topic`]), and the broker that runs in this process.
//! Not here: what an instance decides, how effects are kept until they are sent (`delivery`).
//! Tests: at the foot of each file; `tests/it/mqtt.rs` with mosquitto and paho clients.

pub mod inbound;
pub mod topic;
