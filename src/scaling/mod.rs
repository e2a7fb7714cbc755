//! Policies and shared mechanisms of scale.

pub mod auto_scaling;
pub mod cache;
pub mod load_balancer;
pub mod load_report;
pub mod pool;
