//! Every metric name on one page, tracing, health.

pub mod metric;
