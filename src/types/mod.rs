//! The words of the domain: identities, stimuli, turns, profiles, the twin's state, error kinds and limits.
//!
//! Not here: anything that acts. Types decide nothing beyond their own validity, know no clock and do no IO.
//! Invariants: an identifier that exists is valid; a stored format carries its version (see [`turn`]).
//! Tests: at the foot of each file; stored formats have golden files under `tests/golden`.

pub mod action;
pub mod auth;
pub mod chat;
pub mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod host;
pub mod id;
pub mod json;
pub mod limits;
pub mod memory;
pub mod node;
pub mod profile;
pub mod state;
pub mod step;
pub mod stimulus;
pub mod strict;
pub mod time;
pub mod tool;
pub mod turn;
pub mod words;

pub use action::Action;
pub use auth::{AuthContext, Principal, Scope};
pub use chat::Chat;
pub use error::{Fault, Kind};
pub use id::{Channel, InstanceId, InstanceKey, NodeId, StimulusId, TenantId};
pub use json::RawJson;
pub use memory::EpisodeId;
pub use node::{Load, Protocol, Role, Roles, Strategy};
pub use profile::{Profile, RuleSpec};
pub use state::{StateDoc, StateSnapshot};
pub use step::{Message, Speaker, Step};
pub use stimulus::{Priority, ReplyTo, Source, Stimulus};
pub use time::Millis;
pub use tool::{ToolCall, ToolResult, ToolSpec};
pub use turn::{Cut, Effect, EffectKind, EpisodeDraft, Outcome, Reply, StateChange, TurnRecord, Usage};
