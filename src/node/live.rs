//! The settings in force, and who is told when they change.
//!
//! Owns: what a running node goes by ([`Live`]), the one reader of each live setting ([`READERS`]). Not here: which settings
//! are live and what changed (`config::live`), reading the file again (`cli::reload`), what a setting does (its reader).
//! Invariants: all or nothing: whoever may refuse is asked before anybody is told, and being told cannot fail. Each live
//! setting has exactly one reader. One change at a time. Tests: at the foot; `tests/it/settings.rs`.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio::sync::{Mutex, watch};

use crate::{
    cluster::member::{self, Member},
    cognition::Bounds,
    config::{
        self, Config,
        live::{self, Change, Plan},
    },
    gateway::auth::Authenticator,
    instance::{environment::Environment, toolkit::Toolkit},
    runtime::clock::Clock,
    scaling::{cache::Sizes, pool::Limits},
    store::{Store, set_slow_threshold},
    telemetry::{log, metric},
};

/// Why new settings are not in force. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// These differ, and are fixed while the node runs.
    #[error("needs a restart: {}", names(.0))]
    Restart(Vec<Change>),
    /// A part of the node cannot go by them, in its own words.
    #[error("{0}")]
    Part(String),
}

fn names(changes: &[Change]) -> String {
    changes.iter().map(|change| &*change.key).collect::<Vec<_>>().join(", ")
}

/// The parts of a node that read live settings.
pub(super) struct Parts {
    /// The truth.
    pub store: Arc<dyn Store>,
    /// The node's part in its cluster.
    pub member: Member,
    /// Instances.
    pub environment: Arc<Environment>,
    /// Tools.
    pub toolkit: Arc<Toolkit>,
    /// Who may come in.
    pub auth: Arc<Authenticator>,
    /// How often the store is searched for what waits.
    pub scan: watch::Sender<Duration>,
}

/// Tells a part of the node what is in force.
type Tell = fn(&Parts, &Config);

/// Who reads each live setting.
const READERS: &[(&str, Tell)] = &[
    ("scaling.horizontal_scaling_enabled", |parts, config| parts.member.set_alone(!config.scales_out())),
    ("scaling.max_consciousness_instances", |parts, config| {
        parts.environment.limits.set_max_active(config.scaling.limits.max_consciousness_instances);
    }),
    ("scaling.cache_l1_size_mb", resize),
    ("scaling.cache_l2_size_mb", resize),
    ("scaling.cache_l3_size_mb", resize),
    ("scaling.connection_pool_size", |parts, config| parts.store.resize(pool(config))),
    ("scaling.pool_overflow", |parts, config| parts.store.resize(pool(config))),
    ("scaling.pool_wait_seconds", |parts, config| parts.store.resize(pool(config))),
    ("scaling.pool_recycle_seconds", |parts, config| parts.store.resize(pool(config))),
    ("scaling.auto_scaling_threshold_cpu", set_thresholds),
    ("scaling.auto_scaling_threshold_memory", set_thresholds),
    ("scaling.full_after_seconds", set_thresholds),
    ("scaling.spare_after_seconds", set_thresholds),
    ("store.slow_query_ms", |_, config| set_slow_threshold(slow(config))),
    ("instances.idle_passivate_seconds", |parts, config| {
        parts.environment.limits.set_idle(Duration::from_secs(config.instances.idle_passivate_seconds));
    }),
    ("instances.scan_seconds", |parts, config| {
        parts.scan.send_replace(scan_period(config));
    }),
    ("cognition.think_seconds", |parts, config| {
        parts.environment.limits.set_think(Duration::from_secs(config.cognition.think_seconds));
        set_models(parts, config);
    }),
    ("cognition.max_steps", set_bounds),
    ("cognition.max_tokens_per_turn", set_bounds),
    ("cognition.providers.NAME.max_concurrent", set_models),
    ("cognition.providers.NAME.max_waiting", set_models),
    ("tools.max_concurrent", set_tools),
    ("tools.max_waiting", set_tools),
    ("tools.http.max_concurrent", set_tools),
    ("tools.mcp.NAME.max_concurrent", set_tools),
    ("cache.jitter_percent", set_policy),
    ("cache.negative_seconds", set_policy),
    ("cache.ttl.NAME", set_policy),
    ("cache.stale.NAME", set_policy),
    ("auth.tokens", |parts, config| {
        // Refused before anybody was told, if they could not be.
        if let Err(error) = parts.auth.adopt(&config.auth) {
            tracing::error!(%error, "the tokens stay as they are");
        }
    }),
    ("telemetry.log", |_, config| {
        // Refused before anybody was told, if it were no filter.
        if let Err(error) = log::change(&config.telemetry.log) {
            tracing::warn!(%error, "the log stays as it is");
        }
    }),
];

/// All three at once; a tier whose size is as before does nothing.
fn resize(parts: &Parts, config: &Config) {
    parts.environment.cache.resize(Sizes::of(&config.scaling));
}

fn set_thresholds(parts: &Parts, config: &Config) {
    parts.member.balancer().set_thresholds(member::thresholds(&config.scaling));
}

/// How far a turn may go.
fn set_bounds(parts: &Parts, config: &Config) {
    let config::Cognition { max_steps: steps, max_tokens_per_turn: tokens, .. } = config.cognition;
    parts.environment.limits.set_bounds(Bounds { steps, tokens });
}

/// Calls of models.
fn set_models(parts: &Parts, config: &Config) {
    parts.environment.minds.engines().resize(&config.cognition);
}

/// Calls of tools.
fn set_tools(parts: &Parts, config: &Config) {
    parts.toolkit.resize(&config.tools);
}

/// What is held for how long.
fn set_policy(parts: &Parts, config: &Config) {
    parts.environment.cache.set_policy(&config.cache);
}

/// The pool of a store's readers.
pub(super) fn pool(config: &Config) -> Limits {
    Limits {
        size: config.scaling.limits.connection_pool_size,
        overflow: config.scaling.pool_overflow,
        wait: config.scaling.pool_wait(),
        recycle: config.scaling.pool_recycle(),
        waiting: Limits::WAITING,
    }
}

/// Statements that take as long are told.
pub(super) const fn slow(config: &Config) -> Duration {
    Duration::from_millis(config.store.slow_query_ms)
}

/// How often the store is searched for what waits.
pub(super) fn scan_period(config: &Config) -> Duration {
    Duration::from_secs(config.instances.scan_seconds.max(1))
}

/// What a running node goes by.
pub(super) struct Live {
    config: ArcSwap<Config>,
    parts: Parts,
    clock: Clock,
    changing: Mutex<()>,
}

impl Live {
    /// The settings the node was built with, and the parts that read those that change.
    pub fn new(config: Config, parts: Parts, clock: Clock) -> Self {
        let live = Self { config: ArcSwap::from_pointee(config), parts, clock, changing: Mutex::default() };
        live.show();
        live
    }

    /// The settings in force.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Puts new settings in force, all of them or none. Returns what changed, after everybody was told. Cancelling it
    /// leaves all or none in force.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn adopt(&self, new: Config) -> Result<Vec<Change>, Refused> {
        let _one = self.changing.lock().await;
        let old = self.config();
        let changes = match live::plan(&old, &new) {
            Plan::Apply(changes) => changes,
            Plan::Restart(fixed) => return Err(Refused::Restart(fixed)),
        };
        if changes.is_empty() {
            return Ok(changes);
        }
        log::filter(&new.telemetry.log).map_err(|error| Refused::Part(format!("telemetry.log: {error}")))?;
        self.parts.auth.may_adopt(&new.auth).map_err(|error| Refused::Part(error.to_string()))?;
        if old.scales_out() && !new.scales_out() {
            self.parts.member.may_be_alone().map_err(|error| {
                Refused::Part(format!(
                    "scaling.horizontal_scaling_enabled: {error}; drain it first, or leave this as it is"
                ))
            })?;
        }
        for (name, tell) in READERS {
            if changes.iter().any(|change| live::live(&change.key).is_some_and(|key| key.name == *name)) {
                tell(&self.parts, &new);
            }
        }
        self.config.store(Arc::new(new));
        self.show();
        metrics::gauge!(metric::CONFIG_CHANGED).set(seconds(&self.clock));
        Ok(changes)
    }

    /// Shows the numbers in force.
    fn show(&self) {
        let config = self.config.load();
        for key in live::LIVE {
            if let Some(number) = key.number {
                metrics::gauge!(metric::CONFIG_VALUE, "key" => key.name).set(number(&config));
            }
        }
    }
}

#[allow(clippy::cast_precision_loss)] // a time of day on a page
fn seconds(clock: &Clock) -> f64 {
    clock.now().0 as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_live_setting_has_one_reader() {
        let mut read: Vec<&str> = READERS.iter().map(|(name, _)| *name).collect();
        let mut live: Vec<&str> = live::LIVE.iter().map(|key| key.name).collect();
        read.sort_unstable();
        live.sort_unstable();
        assert_eq!(read, live);
    }
}
