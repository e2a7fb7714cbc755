//! cache-memory: what a cache of a given size takes in memory while values from 10 B to 1 MB come and go, and what is left of it
//! after it was made smaller. In this process, so under the allocator that serves.
//!
//! Tests: of what is weighed, at the foot of `scaling/cache/l1.rs`.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    super::{
        Error,
        machine::{Machine, Usage},
        report::{Figure, to_f64},
        schedule::Random,
    },
    Bench,
};
use crate::{
    scaling::cache::{Kind, Options, Sizes, Slot, TieredCache},
    types::TenantId,
};

const MIB: u64 = 1024 * 1024;
/// The size is made so many times smaller at the end.
const SHRINK: u64 = 8;
/// Bytes that go through the cache, as a multiple of its size: first to fill it, then while it is watched.
const FILL: u64 = 3;
const CHURN: u64 = 8;
/// Threads that put values in.
const THREADS: u64 = 2;
/// How long memory may take to be given back.
const SETTLE: Duration = Duration::from_secs(3);

impl Bench<'_> {
    /// Fills, watches, shrinks.
    pub(super) async fn cache_memory(&mut self) -> Result<Machine, Error> {
        let machine = Machine::look(None);
        let size = self.args.cache_mb * MIB;
        self.set("cache", format!("{} MiB", self.args.cache_mb));
        let largest = self.args.payload.unwrap_or(1_000_000);
        self.set("values", format!("10 B to {largest} B, each power of two as often as any other"));
        for run in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let figures = measure(size, largest, self.args.seed.wrapping_add(u64::from(run))).await?;
            self.runs.push(figures);
        }
        Ok(machine)
    }
}

fn resident() -> u64 {
    Usage::of(&[std::process::id()]).rss_kib * 1024
}

async fn measure(size: u64, largest: usize, seed: u64) -> Result<Vec<Figure>, Error> {
    let failed = |error: tokio::task::JoinError| Error::Server(error.to_string());
    tokio::task::spawn_blocking(move || phases(size, largest, seed)).await.map_err(failed)?
}

/// The threads that put values in live through all phases, as a server's do.
fn phases(size: u64, largest: usize, seed: u64) -> Result<Vec<Figure>, Error> {
    let tenant = TenantId::new("load").map_err(|error| Error::Argument(error.to_string()))?;
    let empty = resident();
    let sizes = Sizes { l1: size, l2: 0, l3: 0 };
    let cache = TieredCache::new(Options { sizes, ..Options::default() });
    let (most_held, most_resident) = (AtomicU64::new(0), AtomicU64::new(0));
    let barrier = Barrier::new(THREADS as usize + 1);
    let (mut settled, mut entries, mut held) = (0, 0, 0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (cache, tenant, barrier) = (&cache, &tenant, &barrier);
            let most = (&most_held, &most_resident);
            scope.spawn(move || {
                let mut random = Random::new(seed, thread);
                let mut phase = |bytes, name, most| {
                    let put = Put { cache, tenant, bytes: bytes / THREADS, largest, name: format!("{name}{thread}") };
                    churn(&put, &mut random, most);
                    barrier.wait();
                    barrier.wait();
                };
                phase(size * FILL, "fill", None);
                phase(size * CHURN, "churn", Some(most));
                // An allocator gives memory back while it is used.
                phase(size / SHRINK * FILL, "small", None);
            });
        }
        // After filling.
        barrier.wait();
        barrier.wait();
        // After churning.
        barrier.wait();
        (entries, held) = cache.measure();
        std::thread::sleep(SETTLE);
        settled = resident().saturating_sub(empty);
        cache.resize(Sizes { l1: size / SHRINK, ..sizes });
        barrier.wait();
        barrier.wait();
        std::thread::sleep(SETTLE);
        barrier.wait();
    });
    let shrunk = resident().saturating_sub(empty);
    let mib = |bytes: u64| to_f64(bytes) / 1024.0 / 1024.0;
    let share = |bytes: u64| to_f64(bytes) / to_f64(size) * 100.0;
    let most = most_resident.load(Ordering::SeqCst).saturating_sub(empty);
    let back = to_f64(settled.saturating_sub(shrunk)) / to_f64(settled.max(1)) * 100.0;
    Ok(vec![
        Figure::new("most weighed, of the size", "%", share(most_held.load(Ordering::SeqCst))),
        Figure::new("resident at the most, of the size", "%", share(most)),
        Figure::new("resident when settled, of the size", "%", share(settled)),
        Figure::new("resident when settled", "MiB", mib(settled)),
        Figure::new("resident after shrinking to an eighth", "MiB", mib(shrunk)),
        Figure::new("given back by shrinking, of what was resident", "%", back),
        Figure::new("entries", "1", to_f64(entries)),
        Figure::new("weighed at the end, of the size", "%", share(held)),
    ])
}

/// What one thread puts in.
struct Put<'a> {
    cache: &'a TieredCache,
    tenant: &'a TenantId,
    bytes: u64,
    largest: usize,
    name: String,
}

/// Puts so many bytes in; the most that was held and resident on the way is kept.
fn churn(what: &Put<'_>, random: &mut Random, most: Option<(&AtomicU64, &AtomicU64)>) {
    let Put { cache, tenant, bytes, largest, name } = what;
    let steps = u64::from((*largest / 10).max(1).ilog2()) + 1;
    let mut put = 0;
    for n in 0u64.. {
        let len = 10u64 << random.below(steps);
        let len = usize::try_from(len + random.below(len)).unwrap_or(0).min(*largest);
        cache.put(&Slot::new(Kind::Answer, tenant, format!("{name}-{n}")), 0, "x".repeat(len));
        put += len as u64;
        if let Some((held, resident_most)) = most.filter(|_| n % 64 == 0) {
            held.fetch_max(cache.weighed(), Ordering::Relaxed);
            resident_most.fetch_max(resident(), Ordering::Relaxed);
        }
        if put > *bytes {
            break;
        }
    }
}
