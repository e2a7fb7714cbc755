//! How busy this node is, and how full its memory.
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
    claimed: Claimed,
    /// Bytes this process may use.
    memory: u64,
}

/// What a node says of itself whatever is so, in thousandths: a fault for tests.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Claimed {
    /// How busy it is.
    pub busy: Option<u32>,
    /// How much of its memory it uses.
    pub memory: Option<u32>,
}

/// Shares over less time than this are noise.
const SHORTEST: Duration = Duration::from_millis(200);

impl Gauge {
    /// Of the node with these instances.
    pub fn new(environment: Arc<Environment>, shards: Shards, claimed: Claimed) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let last = Mutex::new((Instant::now(), processor_time(), 0));
        Self(Arc::new(Inner { environment, shards, cores, last, claimed, memory: memory() }))
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
            busy_permille: inner.claimed.busy.unwrap_or(last.2),
            instances: inner.environment.active.load(std::sync::atomic::Ordering::Acquire) as u64,
            in_hand: inner.shards.busy() as u64,
        }
    }
}

impl Gauge {
    /// Share of the memory this process may use that it uses, in thousandths.
    pub fn memory_permille(&self) -> u32 {
        let inner = &*self.0;
        inner.claimed.memory.unwrap_or_else(|| {
            let share = resident().saturating_mul(1000) / inner.memory.max(1);
            u32::try_from(share.min(1000)).unwrap_or(1000)
        })
    }
}

/// Bytes this process has in memory; 0 where the system does not say.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages.saturating_mul(
        nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
            .ok()
            .flatten()
            .map_or(4096, |size| u64::try_from(size).unwrap_or(4096)),
    )
}

/// Bytes this process may use: what its control group allows, or else what the machine has.
fn memory() -> u64 {
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    let machine = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let machine = machine
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib.saturating_mul(1024)));
    let machine = machine.unwrap_or(u64::MAX);
    group.trim().parse().unwrap_or(machine).min(machine)
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
