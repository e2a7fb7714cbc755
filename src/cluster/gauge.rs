//! How busy this node is.
//!
//! Not here: who wants to know (`balancer`). Tests: `tests/it/cluster.rs`.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::shards::Shards;
use crate::{instance::environment::Environment, types::Load};

/// How busy this node is: share of the processors since it was last read, instances, work in hand.
#[derive(Clone)]
pub(super) struct Gauge(Arc<Inner>);

struct Inner {
    environment: Arc<Environment>,
    shards: Shards,
    cores: u32,
    last: Mutex<(Instant, Duration, u32)>,
    /// What it says instead, in builds with faults.
    claimed: Option<u32>,
}

/// Shares over less time than this are noise.
const SHORTEST: Duration = Duration::from_millis(200);

impl Gauge {
    /// Of the node with these instances. With `claimed`, that is how busy it says it is, in thousandths.
    pub fn new(environment: Arc<Environment>, shards: Shards, claimed: Option<u32>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let last = Mutex::new((Instant::now(), processor_time(), 0));
        Self(Arc::new(Inner { environment, shards, cores, last, claimed }))
    }

    /// At this moment.
    pub fn read(&self) -> Load {
        let inner = &*self.0;
        let mut last = inner.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, used, _) = *last;
        let elapsed = at.elapsed();
        if elapsed >= SHORTEST {
            let now = processor_time();
            let share = now.saturating_sub(used).as_secs_f64() / elapsed.as_secs_f64() / f64::from(inner.cores);
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a share
            let permille = (share * 1000.0).clamp(0.0, 1000.0) as u32;
            *last = (Instant::now(), now, permille);
        }
        Load {
            busy_permille: inner.claimed.unwrap_or(last.2),
            instances: inner.environment.active.load(std::sync::atomic::Ordering::Acquire) as u64,
            in_hand: inner.shards.busy() as u64,
        }
    }
}

/// Processor time of this process so far.
fn processor_time() -> Duration {
    use nix::sys::resource::{UsageWho, getrusage};
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return Duration::ZERO };
    [usage.user_time(), usage.system_time()]
        .iter()
        .map(|time| {
            let micros = time.tv_sec().saturating_mul(1_000_000).saturating_add(time.tv_usec());
            Duration::from_micros(u64::try_from(micros).unwrap_or_default())
        })
        .sum()
}
