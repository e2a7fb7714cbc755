//! Which settings change while a node runs, and what is different between two sets of settings. Pure.
//!
//! Owns: the table [`LIVE`], comparing, the words in which a change is told. Not here: reading the file again (`load`), when
//! it is read (`watch`), who reads each setting in force (`node::live`).
//! Invariants: a secret is never in a [`Change`]; what is not in the table is fixed from the start of a node to its end.
//! Tests: at the foot; `tests/it/settings.rs` changes each of them in a running node.

use std::{collections::BTreeMap, fmt};

use secrecy::ExposeSecret as _;

use super::Config;

/// A setting that changes while a node runs.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// Its name, `section.key`; `NAME` stands for a name of free choice.
    pub name: &'static str,
    /// Its value as a number, for those that are one.
    pub number: Option<fn(&Config) -> f64>,
}

impl Key {
    const fn number(name: &'static str, number: fn(&Config) -> f64) -> Self {
        Self { name, number: Some(number) }
    }

    const fn text(name: &'static str) -> Self {
        Self { name, number: None }
    }

    /// Whether a setting of this name is meant.
    pub fn is(&self, name: &str) -> bool {
        let mut parts = self.name.split('.');
        name.split('.').all(|part| parts.next().is_some_and(|known| known == part || known == "NAME"))
            && parts.next().is_none()
    }
}

/// Settings that change while a node runs. All others need a restart.
#[allow(clippy::cast_precision_loss)] // figures on a page
pub const LIVE: &[Key] = &[
    Key::number("scaling.horizontal_scaling_enabled", |c| f64::from(u8::from(c.scales_out()))),
    Key::number("scaling.max_consciousness_instances", |c| c.scaling.limits.max_consciousness_instances as f64),
    Key::number("scaling.cache_l1_size_mb", |c| c.scaling.limits.cache_l1_size_mb as f64),
    Key::number("scaling.cache_l2_size_mb", |c| c.scaling.limits.cache_l2_size_mb as f64),
    Key::number("scaling.cache_l3_size_mb", |c| c.scaling.limits.cache_l3_size_mb as f64),
    Key::number("scaling.connection_pool_size", |c| c.scaling.limits.connection_pool_size as f64),
    Key::number("scaling.auto_scaling_threshold_cpu", |c| f64::from(c.scaling.limits.auto_scaling_threshold_cpu)),
    Key::number("scaling.auto_scaling_threshold_memory", |c| f64::from(c.scaling.limits.auto_scaling_threshold_memory)),
    Key::number("scaling.pool_overflow", |c| c.scaling.pool_overflow as f64),
    Key::number("scaling.pool_wait_seconds", |c| c.scaling.pool_wait_seconds as f64),
    Key::number("scaling.pool_recycle_seconds", |c| c.scaling.pool_recycle_seconds as f64),
    Key::number("scaling.full_after_seconds", |c| c.scaling.full_after_seconds as f64),
    Key::number("scaling.spare_after_seconds", |c| c.scaling.spare_after_seconds as f64),
    Key::number("store.slow_query_ms", |c| c.store.slow_query_ms as f64),
    Key::number("instances.idle_passivate_seconds", |c| c.instances.idle_passivate_seconds as f64),
    Key::number("instances.scan_seconds", |c| c.instances.scan_seconds as f64),
    Key::number("cognition.think_seconds", |c| c.cognition.think_seconds as f64),
    Key::number("cognition.max_steps", |c| f64::from(c.cognition.max_steps)),
    Key::number("cognition.max_tokens_per_turn", |c| c.cognition.max_tokens_per_turn as f64),
    Key::text("cognition.providers.NAME.max_concurrent"),
    Key::text("cognition.providers.NAME.max_waiting"),
    Key::number("tools.max_concurrent", |c| c.tools.max_concurrent as f64),
    Key::number("tools.max_waiting", |c| c.tools.max_waiting as f64),
    Key::number("tools.http.max_concurrent", |c| c.tools.http.max_concurrent as f64),
    Key::text("tools.mcp.NAME.max_concurrent"),
    Key::number("cache.jitter_percent", |c| c.cache.jitter_percent as f64),
    Key::number("cache.negative_seconds", |c| c.cache.negative_seconds as f64),
    Key::text("cache.ttl.NAME"),
    Key::text("cache.stale.NAME"),
    Key::text("auth.tokens"),
    Key::text("telemetry.log"),
];

/// The entry of a setting; none when it needs a restart.
pub fn live(name: &str) -> Option<&'static Key> {
    LIVE.iter().find(|key| key.is(name))
}

/// A setting with two values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its name.
    pub key: String,
    /// As it was, in the words of TOML; `absent`, or `***` for secrets.
    pub old: String,
    /// As it is to be.
    pub new: String,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.key, self.old, self.new)
    }
}

/// What new settings mean to a node that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Every difference can be applied; there may be none.
    Apply(Vec<Change>),
    /// These cannot, so none is.
    Restart(Vec<Change>),
}

/// Compares the settings in force with new ones.
pub fn plan(old: &Config, new: &Config) -> Plan {
    let (applied, fixed): (Vec<_>, Vec<_>) =
        changes(old, new).into_iter().partition(|change| live(&change.key).is_some());
    if fixed.is_empty() { Plan::Apply(applied) } else { Plan::Restart(fixed) }
}

/// What differs, by name.
fn changes(old: &Config, new: &Config) -> Vec<Change> {
    const ABSENT: &str = "absent";
    let (before, after) = (flat(old), flat(new));
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let value = |all: &BTreeMap<String, String>, name: &String| all.get(name).map_or(ABSENT, |text| text).to_owned();
    let mut changes: Vec<Change> = names
        .into_iter()
        .map(|name| Change { key: name.clone(), old: value(&before, name), new: value(&after, name) })
        .filter(|change| change.old != change.new)
        .collect();
    // Secrets look the same whatever they are.
    let (before, after) = (secrets(old), secrets(new));
    for (key, secret) in &after {
        let is_told = changes.iter().any(|change| change.key.starts_with(key));
        if !is_told && before.get(key).is_some_and(|before| before != secret) {
            let hidden = || String::from("***");
            changes.push(Change { key: key.clone(), old: hidden(), new: hidden() });
        }
    }
    changes
}

/// What is never told, by the names it is told under.
fn secrets(config: &Config) -> BTreeMap<String, Vec<Option<&str>>> {
    let tokens = config.auth.tokens.iter().map(|token| token.token.as_ref().map(|secret| secret.expose_secret()));
    let env = config.tools.mcp.iter().map(|(name, server)| {
        (format!("tools.mcp.{name}.env"), server.env.values().map(|value| Some(value.as_str())).collect())
    });
    env.chain([(String::from("auth.tokens"), tokens.collect())]).collect()
}

/// Each setting by its name, as TOML, secrets as `***`.
fn flat(config: &Config) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    if let Ok(toml::Value::Table(table)) = toml::Value::try_from(config) {
        flatten(&table, "", &mut all);
    }
    all
}

fn flatten(table: &toml::Table, before: &str, all: &mut BTreeMap<String, String>) {
    for (name, value) in table {
        let path = if before.is_empty() { name.clone() } else { format!("{before}.{name}") };
        match value {
            toml::Value::Table(below) => flatten(below, &path, all),
            value => drop(all.insert(path, value.to_string())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn changed(change: impl FnOnce(&mut Config)) -> Plan {
        let mut new = Config::default();
        change(&mut new);
        plan(&Config::default(), &new)
    }

    fn told(plan: Plan) -> Vec<String> {
        let (Plan::Apply(changes) | Plan::Restart(changes)) = plan;
        changes.iter().map(Change::to_string).collect()
    }

    #[test]
    fn what_differs_is_told_as_old_and_new() {
        assert_eq!(changed(|_| ()), Plan::Apply(Vec::new()));
        let plan = changed(|c| {
            c.scaling.limits.max_consciousness_instances = 7;
            c.telemetry.log = String::from("debug");
        });
        assert!(matches!(plan, Plan::Apply(_)));
        assert_eq!(
            told(plan),
            [
                "scaling.max_consciousness_instances: 1000000 -> 7",
                "telemetry.log: \"info,actix_server=warn,refinery_core=warn\" -> \"debug\""
            ]
        );
        let plan = changed(|c| c.http.advertise = Some(String::from("http://a")));
        assert!(matches!(plan, Plan::Restart(_)));
        assert_eq!(told(plan), ["http.advertise: absent -> \"http://a\""]);
    }

    #[test]
    fn one_that_needs_a_restart_keeps_the_others_back() {
        let plan = changed(|c| {
            c.scaling.limits.max_consciousness_instances = 7;
            c.cluster.shards = 7;
        });
        let Plan::Restart(fixed) = plan else { panic!("{plan:?}") };
        assert_eq!(fixed.iter().map(|change| &*change.key).collect::<Vec<_>>(), ["cluster.shards"]);
    }

    #[test]
    fn secrets_are_compared_and_never_told() {
        let with = |secret: &str| {
            let mut config = Config::default();
            config.auth.tokens =
                vec![toml::from_str(&format!("token = '{secret}'\ntenant = 't'\nname = 'n'")).unwrap()];
            config
        };
        assert_eq!(plan(&with("eins"), &with("eins")), Plan::Apply(Vec::new()));
        assert_eq!(told(plan(&with("eins"), &with("zwei"))), ["auth.tokens: *** -> ***"]);
        let with_env = |secret: &str| {
            let mut config = Config::default();
            let server = toml::from_str(&format!("command = 'x'\nenv = {{KEY = '{secret}'}}")).unwrap();
            config.tools.mcp.insert(String::from("files"), server);
            config
        };
        assert_eq!(plan(&with_env("eins"), &with_env("eins")), Plan::Apply(Vec::new()));
        assert_eq!(told(plan(&with_env("eins"), &with_env("zwei"))), ["tools.mcp.files.env: *** -> ***"]);
        let added = told(plan(&Config::default(), &with_env("eins")));
        assert!(!added.is_empty() && !added.concat().contains("eins"), "{added:?}");
        let added = told(plan(&Config::default(), &with("eins")));
        assert!(added.len() == 1 && added[0].starts_with("auth.tokens: ") && !added[0].contains("eins"), "{added:?}");
    }

    #[test]
    fn every_live_setting_is_one_and_documented() {
        let mut config = Config::default();
        let provider = toml::from_str("base_url = 'http://127.0.0.1:1/v1'").unwrap();
        config.cognition.providers.insert(String::from("local"), provider);
        config.tools.mcp.insert(String::from("files"), crate::config::tools::McpServer::default());
        // Settings that are absent by default.
        config.scaling.limits.horizontal_scaling_enabled = Some(false);
        let known = flat(&config);
        let document = include_str!("../../docs/configuration.md");
        let part = document.split("\n## ").find(|part| part.starts_with("Changing settings")).unwrap();
        for key in LIVE {
            assert!(known.keys().any(|name| key.is(name)), "{} is no setting", key.name);
            assert!(part.contains(&format!("`{}`", key.name)), "{} is not in docs/configuration.md", key.name);
        }
        let documented = part.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(documented, LIVE.len(), "docs/configuration.md lists what is live, and nothing else");
    }

    #[test]
    fn a_name_of_free_choice_is_one_part() {
        let key = Key::text("cognition.providers.NAME.model");
        assert!(key.is("cognition.providers.gpu.model"));
        for other in ["cognition.providers.gpu", "cognition.providers.gpu.model.x", "cognition.providers.gpu.base_url"]
        {
            assert!(!key.is(other), "{other}");
        }
    }
}
