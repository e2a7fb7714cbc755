//! How an instance thinks: reflexes (rules), and engines that decide when no rule does.
//!
//! Owns: the [`Engine`] port, the built-in engines, and the [`Toolbox`] port through which they use tools. Not here: memory (recollection is handed in), the commit of what was
//! thought (`instance`), and any knowledge of actors or stores.
//! Tests: rules and actions at the foot of `reflex.rs`; engines at the foot of their files and in `tests/it/thinking.rs`.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::types::{Cut, Fault, InstanceKey, Kind, Millis, Profile, StateDoc, Step, Stimulus, TurnRecord, Usage};

pub mod answer;
pub mod course;
mod engines;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod llm;
pub mod reflex;
pub mod scripted;
pub mod toolbox;

pub use course::Bounds;
pub use engines::Engines;
pub use toolbox::Toolbox;

pub use crate::types::Action;

/// What a pure rule evaluation sees.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Whose turn.
    pub key: &'a InstanceKey,
    /// What to decide on.
    pub stimulus: &'a Stimulus,
    /// The state before the turn.
    pub state: &'a StateDoc,
    /// The number of the turn being decided.
    pub turn: u64,
    /// Now.
    pub now: Millis,
}

/// What an engine is asked.
#[derive(Debug, Clone)]
pub struct Question {
    /// Whose turn.
    pub key: InstanceKey,
    /// The profile in force.
    pub profile: Arc<Profile>,
    /// What to decide on.
    pub stimulus: Arc<Stimulus>,
    /// The state before the turn.
    pub state: StateDoc,
    /// Relevant episodes, best first.
    pub recollection: Vec<crate::store::Episode>,
    /// The last turns, oldest first.
    pub recent: Vec<Arc<TurnRecord>>,
    /// Now.
    pub now: Millis,
    /// Longest time this may take.
    pub deadline: Duration,
    /// The tools of the node.
    pub tools: Arc<dyn Toolbox>,
    /// The steps this turn has behind it: a thought that was interrupted goes on there.
    pub steps: Vec<Arc<Step>>,
    /// How far it may go.
    pub bounds: Bounds,
}

/// What an engine decided.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Thought {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// The model that was asked.
    pub model: Option<String>,
    /// What it consumed.
    pub usage: Option<Usage>,
    /// Model and tool calls made.
    pub steps: u32,
    /// Why the answer ended before its end, if it did.
    pub cut: Option<Cut>,
}

/// Receives the words of an answer while it is being thought, and its steps.
#[async_trait]
pub trait Progress: Send + Sync {
    /// The next piece of the answer's text. Must not block.
    fn token(&self, text: &str);
    /// Everything streamed since the last commit is void: the call failed midway and begins anew. Must not block.
    fn restart(&self);
    /// Commits steps of the turn, in order; they and the words streamed before are final when this returns.
    ///
    /// # Errors
    /// [`Error::Unavailable`]: they may or may not be written. The thought must end; the next try is told which stand.
    async fn commit(&self, steps: Vec<Step>) -> Result<(), Error> {
        drop(steps);
        Ok(())
    }
}

/// How long an engine takes, which decides the path of the stimulus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// About a millisecond, without leaving the node: accepted, decided and committed in one.
    Instant,
    /// Longer: the stimulus is accepted durably before the engine is asked.
    Slow,
}

/// Why an engine gave no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The profile or node names a provider that is not configured.
    #[error("no model provider '{0}' is configured")]
    NoProvider(String),
    /// The provider refuses for a reason that repeating does not cure.
    #[error("the model provider refused: {0}")]
    Refused(String),
    /// The provider does not answer properly at present.
    #[error("the model provider is unavailable: {0}")]
    Unavailable(String),
    /// Too many calls wait for this provider.
    #[error("too many calls wait for model provider '{0}'")]
    Overloaded(String),
    /// The deadline passed.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The turn went as far as it may.
    #[error("the turn went too far: {0}")]
    Bounds(String),
    /// The profile's settings for this engine are wrong.
    #[error("bad engine settings: {0}")]
    Settings(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoProvider(_) | Error::Settings(_) | Error::Refused(_) | Error::Bounds(_) => Kind::Invalid,
            Error::Unavailable(_) => Kind::Unavailable,
            Error::Overloaded(_) => Kind::Overloaded,
            Error::Timeout(_) => Kind::Timeout,
        }
    }
}

/// Decides what no rule decided.
#[async_trait]
pub trait Engine: Send + Sync {
    /// Its name in profiles, turns and metrics.
    fn name(&self) -> &'static str;
    /// How long it will take for this profile.
    fn pace(&self, profile: &Profile) -> Pace;
    /// How many episodes it wants recalled, and how many recent turns.
    fn wants(&self, profile: &Profile) -> (usize, usize);
    /// The same for one stimulus: an engine that needs less for it says so and saves the search.
    fn wants_for(&self, profile: &Profile, stimulus: &Stimulus) -> (usize, usize) {
        let _ = stimulus;
        self.wants(profile)
    }
    /// Thinks. Dropping the future cancels the thought; nothing it did may outlive it.
    ///
    /// # Errors
    /// [`Error`]; its kind tells whether trying again can help.
    async fn think(&self, question: Question, progress: &dyn Progress) -> Result<Thought, Error>;
}
