//! `[scaling]`: the eight settings everybody tunes, and beside them those that say how.
//!
//! Not here: ranges (`check.rs`), what each does (its reader; `node::live` lists them). In the file all stand in one section.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::types::Strategy;

/// How large a node is and when it is full. Each of these has one reader and changes while the node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScalingConfig {
    /// Whether other nodes may take part; see [`super::Config::scales_out`].
    pub horizontal_scaling_enabled: Option<bool>,
    /// Most instances in memory.
    pub max_consciousness_instances: usize,
    /// First tier of the cache, in this process, in MiB.
    pub cache_l1_size_mb: usize,
    /// Second tier: of what this node keeps in Redis, or compressed in this process, in MiB.
    pub cache_l2_size_mb: usize,
    /// Third tier: a file in the data folder, in MiB.
    pub cache_l3_size_mb: usize,
    /// Connections for reads that are kept ready.
    pub connection_pool_size: usize,
    /// Share of the processors beyond which a node counts as full, in percent.
    pub auto_scaling_threshold_cpu: u32,
    /// Share of the memory beyond which a node counts as full, in percent.
    pub auto_scaling_threshold_memory: u32,
}

/// `[scaling]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(from = "Section", into = "Section")]
pub struct Scaling {
    /// The eight.
    pub limits: ScalingConfig,
    /// Connections for reads beyond `connection_pool_size`, for a while.
    pub pool_overflow: usize,
    /// Longest wait for a connection, in seconds.
    pub pool_wait_seconds: u64,
    /// A connection is replaced when it is older, in seconds.
    pub pool_recycle_seconds: u64,
    /// How long load must be above a threshold before the node counts as full, in seconds.
    pub full_after_seconds: u64,
    /// How long it must be below before it does not, in seconds.
    pub spare_after_seconds: u64,
    /// Over how long load is averaged before shards follow it, in seconds; 0: they do not.
    pub load_seconds: u64,
    /// How one of several nodes is picked.
    pub strategy: Strategy,
}

impl Scaling {
    /// How long a connection may be waited for.
    pub const fn pool_wait(&self) -> Duration {
        Duration::from_secs(self.pool_wait_seconds)
    }

    /// How old a connection may be.
    pub const fn pool_recycle(&self) -> Duration {
        Duration::from_secs(self.pool_recycle_seconds)
    }
}

/// The section as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    horizontal_scaling_enabled: Option<bool>,
    max_consciousness_instances: usize,
    cache_l1_size_mb: usize,
    cache_l2_size_mb: usize,
    cache_l3_size_mb: usize,
    connection_pool_size: usize,
    auto_scaling_threshold_cpu: u32,
    auto_scaling_threshold_memory: u32,
    pool_overflow: usize,
    pool_wait_seconds: u64,
    pool_recycle_seconds: u64,
    full_after_seconds: u64,
    spare_after_seconds: u64,
    load_seconds: u64,
    strategy: Strategy,
}

impl From<Section> for Scaling {
    fn from(section: Section) -> Self {
        Self {
            limits: ScalingConfig {
                horizontal_scaling_enabled: section.horizontal_scaling_enabled,
                max_consciousness_instances: section.max_consciousness_instances,
                cache_l1_size_mb: section.cache_l1_size_mb,
                cache_l2_size_mb: section.cache_l2_size_mb,
                cache_l3_size_mb: section.cache_l3_size_mb,
                connection_pool_size: section.connection_pool_size,
                auto_scaling_threshold_cpu: section.auto_scaling_threshold_cpu,
                auto_scaling_threshold_memory: section.auto_scaling_threshold_memory,
            },
            pool_overflow: section.pool_overflow,
            pool_wait_seconds: section.pool_wait_seconds,
            pool_recycle_seconds: section.pool_recycle_seconds,
            full_after_seconds: section.full_after_seconds,
            spare_after_seconds: section.spare_after_seconds,
            load_seconds: section.load_seconds,
            strategy: section.strategy,
        }
    }
}

impl From<Scaling> for Section {
    fn from(scaling: Scaling) -> Self {
        let limits = scaling.limits;
        Self {
            horizontal_scaling_enabled: limits.horizontal_scaling_enabled,
            max_consciousness_instances: limits.max_consciousness_instances,
            cache_l1_size_mb: limits.cache_l1_size_mb,
            cache_l2_size_mb: limits.cache_l2_size_mb,
            cache_l3_size_mb: limits.cache_l3_size_mb,
            connection_pool_size: limits.connection_pool_size,
            auto_scaling_threshold_cpu: limits.auto_scaling_threshold_cpu,
            auto_scaling_threshold_memory: limits.auto_scaling_threshold_memory,
            pool_overflow: scaling.pool_overflow,
            pool_wait_seconds: scaling.pool_wait_seconds,
            pool_recycle_seconds: scaling.pool_recycle_seconds,
            full_after_seconds: scaling.full_after_seconds,
            spare_after_seconds: scaling.spare_after_seconds,
            load_seconds: scaling.load_seconds,
            strategy: scaling.strategy,
        }
    }
}
