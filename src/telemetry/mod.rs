//! Every metric name on one page, the recorder behind them, the log.
//!
//! Not here: health (the HTTP door asks the store), what is logged and counted (each module).

pub mod log;
pub mod metric;
pub mod prometheus;
