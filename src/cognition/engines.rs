//! The engines of a node, by name.
//!
//! Not here: the engines themselves. Tests: at the foot.

use std::sync::Arc;

use super::{Engine, Error, answer::Extractive, llm::Llm, scripted::Scripted};
use crate::{
    config,
    scaling::{cache::TieredCache, pool::Tally},
    types::{Profile, profile::EngineName},
};

/// All engines, ready to be asked. Cheap to clone.
#[derive(Clone)]
pub struct Engines {
    default: EngineName,
    reflex: Arc<dyn Engine>,
    scripted: Arc<dyn Engine>,
    llm: Arc<dyn Engine>,
    /// The same as `llm`, for checking profiles.
    models: Arc<Llm>,
}

impl Engines {
    /// Builds them from the configuration. No provider is called yet. Answers that may be are held in the cache.
    ///
    /// # Errors
    /// [`Error`] when a provider's address or key is wrong or missing, or the default provider is unknown.
    pub fn new(config: &config::Cognition, cache: &TieredCache) -> Result<Self, Error> {
        let models = Arc::new(Llm::new(config, cache.clone())?);
        Ok(Self {
            default: config.default_engine,
            reflex: Arc::new(Extractive),
            scripted: Arc::new(Scripted::default()),
            llm: models.clone(),
            models,
        })
    }

    /// The engine of that name.
    pub fn get(&self, name: EngineName) -> &Arc<dyn Engine> {
        match name {
            EngineName::Reflex => &self.reflex,
            EngineName::Scripted => &self.scripted,
            EngineName::Llm => &self.llm,
        }
    }

    /// The engine a profile names, or the node's default.
    pub fn of(&self, profile: &Profile) -> &Arc<dyn Engine> {
        self.get(profile.engine.unwrap_or(self.default))
    }

    /// What is counted of the calls of models, by provider.
    pub fn pools(&self) -> Vec<Arc<Tally>> {
        self.models.pools().collect()
    }

    /// As many calls of models at once, and as many that wait, as the settings say.
    pub fn resize(&self, config: &config::Cognition) {
        self.models.resize(config);
    }

    /// Checks what a profile says to its engine, before it is stored. Rules are checked by
    /// [`RuleSet::compile`](super::reflex::RuleSet::compile).
    ///
    /// # Errors
    /// [`Error`] says what is wrong: an unknown provider, no model, a bad script.
    pub fn check(&self, profile: &Profile) -> Result<(), Error> {
        if profile.script.is_some() {
            Scripted::check(profile)?;
        }
        match profile.engine.unwrap_or(self.default) {
            EngineName::Llm => self.models.check(profile),
            EngineName::Reflex | EngineName::Scripted => Ok(()),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::scaling::cache::Options;

    #[test]
    fn profiles_are_checked_against_their_engine() {
        let config = config::Cognition {
            default_engine: EngineName::Reflex,
            default_provider: String::new(),
            think_seconds: 1,
            max_steps: 100,
            max_tokens_per_turn: 1_000_000,
            providers: std::collections::BTreeMap::new(),
        };
        let engines = Engines::new(&config, &TieredCache::new(Options::default())).unwrap();
        let with = |engine, script| Profile { engine, script, ..Profile::default() };
        assert_eq!(engines.of(&with(None, None)).name(), "reflex");
        for name in [EngineName::Reflex, EngineName::Scripted, EngineName::Llm] {
            assert_eq!(engines.get(name).name(), name.as_str());
        }
        assert!(engines.check(&with(None, None)).is_ok());
        assert!(engines.check(&with(Some(EngineName::Scripted), Some(json!({"delay_ms": 5})))).is_ok());
        assert!(matches!(engines.check(&with(None, Some(json!({"dely_ms": 5})))), Err(Error::Settings(_))));
        assert!(matches!(engines.check(&with(Some(EngineName::Llm), None)), Err(Error::NoProvider(_))));
    }
}
