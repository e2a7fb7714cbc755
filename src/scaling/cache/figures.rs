//! The figures of the cache: handles looked up once, by tier and type.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram};

use super::slot::Kind;
use crate::telemetry::metric;

const KINDS: usize = Kind::ALL.len();
/// The tiers by number.
pub const TIERS: [&str; 3] = ["l1", "l2", "l3"];

/// How a read of a tier ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// It had it.
    Hit,
    /// It had it, and the owner or the store said that nothing is newer.
    Validated,
    /// It had it, no longer fresh, and it was served all the same.
    Stale,
    /// It had nothing that could be served.
    Miss,
}

const READS: [&str; 4] = ["hit", "validated", "stale", "miss"];

/// Handles of the figures.
pub struct Figures {
    reads: [[[Counter; READS.len()]; KINDS]; 3],
    evictions: [[Counter; KINDS]; 3],
    waits: [Counter; KINDS],
    loads: [Counter; KINDS],
    seconds: [Histogram; KINDS],
    bytes: [Gauge; 3],
    entries: [Gauge; 3],
    limits: [Gauge; 3],
    up: [Gauge; 3],
    skipped: [Counter; 3],
    replaced: [Counter; 3],
    invalidations: [Counter; 2],
    answers: [Counter; ANSWERS.len()],
}

const ANSWERS: [&str; 4] = ["same", "newer", "gone", "store"];

/// What an owner answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// What is held is the newest.
    Same,
    /// This is newer.
    Newer,
    /// There is none.
    Gone,
    /// Nothing in time.
    Store,
}

impl Default for Figures {
    fn default() -> Self {
        let kinds = Kind::ALL.map(Kind::name);
        let reads = |tier, kind| {
            READS.map(
                |result| metrics::counter!(metric::CACHE_READS, "tier" => tier, "type" => kind, "result" => result),
            )
        };
        let evictions = |tier, kind| metrics::counter!(metric::CACHE_EVICTIONS, "tier" => tier, "type" => kind);
        Self {
            reads: TIERS.map(|tier| kinds.map(|kind| reads(tier, kind))),
            evictions: TIERS.map(|tier| kinds.map(|kind| evictions(tier, kind))),
            waits: kinds.map(|kind| metrics::counter!(metric::CACHE_WAITS, "type" => kind)),
            loads: kinds.map(|kind| metrics::counter!(metric::CACHE_LOADS, "type" => kind)),
            seconds: kinds.map(|kind| metrics::histogram!(metric::CACHE_LOAD_SECONDS, "type" => kind)),
            bytes: TIERS.map(|tier| metrics::gauge!(metric::CACHE_BYTES, "tier" => tier)),
            entries: TIERS.map(|tier| metrics::gauge!(metric::CACHE_ENTRIES, "tier" => tier)),
            limits: TIERS.map(|tier| metrics::gauge!(metric::CACHE_LIMIT, "tier" => tier)),
            up: TIERS.map(|tier| metrics::gauge!(metric::CACHE_UP, "tier" => tier)),
            skipped: TIERS.map(|tier| metrics::counter!(metric::CACHE_SKIPPED, "tier" => tier)),
            replaced: TIERS.map(|tier| metrics::counter!(metric::CACHE_REPLACED, "tier" => tier)),
            answers: ANSWERS.map(|result| metrics::counter!(metric::CACHE_OWNER_ANSWERS, "result" => result)),
            invalidations: ["sent", "heard"].map(|way| metrics::counter!(metric::CACHE_INVALIDATIONS, "way" => way)),
        }
    }
}

#[allow(clippy::cast_precision_loss)] // figures
impl Figures {
    /// A tier was read.
    pub fn read(&self, tier: usize, kind: Kind, how: Read) {
        self.reads[tier][kind as usize][how as usize].increment(1);
    }

    /// Entries had to leave a tier for lack of room.
    pub fn evicted(&self, tier: usize, kind: Kind, count: u64) {
        self.evictions[tier][kind as usize].increment(count);
    }

    /// Somebody waits for a load that is under way.
    pub fn waits(&self, kind: Kind) {
        self.waits[kind as usize].increment(1);
    }

    /// A value was loaded from its source, which took so long.
    pub fn loaded(&self, kind: Kind, took: Duration) {
        self.loads[kind as usize].increment(1);
        self.seconds[kind as usize].record(took);
    }

    /// What a tier holds.
    pub fn holds(&self, tier: usize, entries: u64, bytes: u64) {
        self.entries[tier].set(entries as f64);
        self.bytes[tier].set(bytes as f64);
    }

    /// What it may hold.
    pub fn limit(&self, tier: usize, bytes: u64) {
        self.limits[tier].set(bytes as f64);
    }

    /// Whether a tier answers.
    pub fn up(&self, tier: usize, up: bool) {
        self.up[tier].set(if up { 1.0 } else { 0.0 });
    }

    /// A tier was passed over: it is down, or has too much to do.
    pub fn skipped(&self, tier: usize) {
        self.skipped[tier].increment(1);
    }

    /// The actor of a tier died and was replaced.
    pub fn replaced(&self, tier: usize) {
        self.replaced[tier].increment(1);
    }

    /// An owner answered about a state.
    pub fn answered(&self, how: Answer) {
        self.answers[how as usize].increment(1);
    }

    /// Other nodes were told, or told, that so much is stale.
    pub fn invalidated(&self, heard: bool, count: u64) {
        self.invalidations[usize::from(heard)].increment(count);
    }
}
