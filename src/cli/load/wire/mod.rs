//! Bytes on the wire, as a client needs them: templates patched in place, a small HTTP/1.1 client, a few MQTT 5 packets.
//!
//! Why our own: the generator shares the machine with the server, so each microsecond it spends falsifies the figure.
//! Not a general client: no redirects, no TLS, no QoS 2. Tests: at the foot of each file.

pub mod http;
pub mod mqtt;
pub mod template;
