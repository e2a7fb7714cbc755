//! Settings for so many users, as files that are compiled in: the lowest layer above the defaults.
//!
//! Each states what it claims in a line `# claim: ...` of its header, as an inline table of TOML without braces. Not here: where it
//! stands among the layers (`load`). Tests: at the foot; `tests/it/presets.rs` starts each and measures its claim.

use serde::Deserialize;

/// A preset.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// Its name: how many users it is for.
    pub name: &'static str,
    /// Its file.
    pub text: &'static str,
}

/// All of them, the smallest first.
pub const ALL: [Preset; 5] = [
    Preset { name: "1", text: include_str!("../../config/presets/1.toml") },
    Preset { name: "2-10", text: include_str!("../../config/presets/2-10.toml") },
    Preset { name: "10-50", text: include_str!("../../config/presets/10-50.toml") },
    Preset { name: "50-500", text: include_str!("../../config/presets/50-500.toml") },
    Preset { name: "500+", text: include_str!("../../config/presets/500+.toml") },
];

/// What a preset says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// For how many users.
    pub users: String,
    /// For how many nodes.
    pub nodes: u32,
    /// What one node takes at rest, in MiB.
    pub memory_mb: u64,
    /// The most connections of one node to one server of PostgreSQL.
    pub connections: usize,
}

impl Preset {
    /// The preset of that name.
    pub fn named(name: &str) -> Option<Self> {
        ALL.into_iter().find(|preset| preset.name == name)
    }

    /// What it claims; nothing when it does not say so as it should, which a test rules out.
    pub fn claim(&self) -> Option<Claim> {
        let line = self.text.lines().find_map(|line| line.strip_prefix("# claim: "))?;
        #[derive(Deserialize)]
        struct Line {
            claim: Claim,
        }
        toml::from_str::<Line>(&format!("claim = {{ {line} }}")).ok().map(|line| line.claim)
    }
}

/// The names, for people.
pub fn names() -> String {
    ALL.map(|preset| preset.name).join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::{Backend, Sources, load};

    #[test]
    fn each_says_for_whom_it_is_and_passes_the_checks() {
        for preset in ALL {
            let claim = preset.claim().unwrap();
            assert_eq!(claim.users, preset.name);
            let url = String::from("store.postgres.url=postgres://u@127.0.0.1/d");
            let sources = Sources { preset: Some(preset), set: vec![url], ..Sources::default() };
            let config = load(&sources).unwrap().config;
            let shared = config.store.backend == Backend::Postgres;
            assert_eq!(shared, claim.connections > 0, "{}", preset.name);
            assert_eq!(shared, claim.nodes > 1, "{}", preset.name);
            let (postgres, scaling) = (&config.store.postgres, &config.scaling);
            let most = scaling.limits.connection_pool_size + scaling.pool_overflow + postgres.lanes + 7;
            assert!(!shared || most <= claim.connections + 1, "{}: {most} connections", preset.name);
        }
        assert!(Preset::named("50-500").is_some() && Preset::named("3").is_none());
    }

    #[test]
    fn larger_ones_allow_no_less() {
        let limits = ALL.map(|preset| {
            let set = vec![String::from("store.postgres.url=postgres://u@127.0.0.1/d")];
            let config = load(&Sources { preset: Some(preset), set, ..Sources::default() }).unwrap().config;
            let limits = config.scaling.limits;
            (limits.max_consciousness_instances, limits.cache_l1_size_mb, limits.connection_pool_size)
        });
        for pair in limits.windows(2) {
            let ((a, b, c), (d, e, f)) = (pair[0], pair[1]);
            assert!(a <= d && b <= e && c <= f, "{pair:?}");
        }
    }
}
