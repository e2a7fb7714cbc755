//! The edge: HTTP and MQTT doors. Turns bytes into stimuli, and answers into bytes.
//!
//! Owns: wire types, admission, authentication, and the one place where error kinds become HTTP problems and MQTT reasons.
//! Not here: anything about how an instance decides.

pub mod auth;
pub mod http;
pub mod mqtt;
