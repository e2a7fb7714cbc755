//! Clock, lanes between threads, drain: what every row above stands on.

pub mod clock;
pub mod drain;
