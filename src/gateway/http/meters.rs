//! The door's metrics. Handles are registered once and kept: a request looks nothing up.

use std::{sync::OnceLock, time::Duration};

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::route::{CALLS, Call};
use crate::telemetry::metric::{HTTP_REQUESTS, HTTP_SECONDS, HTTP_STREAMS};

const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// Handles of one call, registered when first needed so that calls nobody makes take no room on the metrics page.
#[derive(Default)]
struct Cell {
    requests: [OnceLock<Counter>; CLASSES.len()],
    seconds: OnceLock<Histogram>,
}

/// All handles of the door, shared by its threads.
pub struct Meters {
    /// One per call, and one for paths that are no call.
    cells: [Cell; CALLS.len() + 1],
    streams: Gauge,
}

impl Meters {
    /// Takes the handles from the recorder in force, which must be installed before.
    pub fn new() -> Self {
        Self { cells: std::array::from_fn(|_| Cell::default()), streams: gauge!(HTTP_STREAMS) }
    }

    /// Counts an answered request.
    pub fn answered(&self, call: Option<Call>, status: u16, took: Duration) {
        let Some(cell) = self.cells.get(call.map_or(CALLS.len(), |call| call as usize)) else { return };
        let (method, route) = call.map_or(("other", "other"), |call| (call.row().method, call.row().path));
        let class = usize::from(status / 100).clamp(1, CLASSES.len()) - 1;
        if let (Some(requests), Some(class)) = (cell.requests.get(class), CLASSES.get(class).copied()) {
            let register = || counter!(HTTP_REQUESTS, "route" => route, "method" => method, "status" => class);
            requests.get_or_init(register).increment(1);
        }
        let register = || histogram!(HTTP_SECONDS, "route" => route, "method" => method);
        cell.seconds.get_or_init(register).record(took.as_secs_f64());
    }

    /// Counts a stream of events for as long as the guard lives.
    pub fn stream(&self) -> StreamGuard {
        self.streams.increment(1);
        StreamGuard(self.streams.clone())
    }
}

/// An open stream of events.
pub struct StreamGuard(Gauge);

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.0.decrement(1);
    }
}
