//! Policies and shared mechanisms of scale.

pub mod cache;
