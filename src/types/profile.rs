//! An instance's profile: what it is told to be, set with `PUT /v1/instances/{id}`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The profile as stored and as it stands in the API. Unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Profile {
    /// Who the instance is, in prose; the model's system message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub persona: Option<String>,
    /// What decides when no rule does: `reflex`, `llm` or `scripted`. The node's `cognition.default_engine` when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineName>,
    /// The model, `PROVIDER/MODEL` or a provider's name, for the `llm` engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Whether one answer of the model does for all requests that are alike: it is held for `cache.ttl.answer`, and told again to any
    /// instance of the tenant. The model is told the day then, and not the time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cache_answers: bool,
    /// Rules, tried in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reflexes: Vec<RuleSpec>,
    /// Settings of attention: what waits is ranked, merged or held back. Absent: it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<AttentionSpec>)]
    pub attention: Option<Value>,
    /// Settings of the scripted engine: `{"reply": "…", "delay_ms": 0}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub script: Option<Value>,
    /// Tools its engine may use, where the node allows them to the tenant: built-in ones, `SERVER.TOOL`, `SERVER.*`. None when
    /// empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<String>,
    /// Limits of this instance.
    #[serde(skip_serializing_if = "Limits::is_empty")]
    pub limits: Limits,
    /// Free labels to list by.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// How much of what waits for an instance reaches its engine, and in which order. Only stimuli that an engine that takes its
/// time would decide are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionSpec {
    /// A stimulus with less salience than this is remembered, and the engine is not asked. 0 to 1.
    pub threshold: f32,
    /// Stimuli with less salience than this wait for others like them and share one thought. 0 to 1.
    pub merge_below: f32,
    /// For how long they wait, in milliseconds; 0 merges only what waits anyway.
    pub merge_window_ms: u32,
    /// Most stimuli of one thought. 1 merges nothing.
    pub merge_max: u8,
    /// What a person's new stimulus does while another is thought about.
    pub interrupt: Interrupt,
}

impl Default for AttentionSpec {
    fn default() -> Self {
        Self { threshold: 0.1, merge_below: 0.6, merge_window_ms: 1_000, merge_max: 16, interrupt: Interrupt::Queue }
    }
}

/// What a person's new stimulus does while another is thought about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Interrupt {
    /// It waits.
    #[default]
    Queue,
    /// Both are thought about together, from the beginning.
    Merge,
    /// The thought ends, and the person's begins. What was less urgent is thought about again afterwards; what the same
    /// person said before stays without an answer.
    Cancel,
}

impl Interrupt {
    /// As it stands in the API and in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Interrupt::Queue => "queue",
            Interrupt::Merge => "merge",
            Interrupt::Cancel => "cancel",
        }
    }
}

/// The engines built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// Rules, and an extractive answer from memory where none matches.
    Reflex,
    /// A language model behind an OpenAI-compatible endpoint.
    Llm,
    /// A fixed answer after a fixed delay, for tests and load.
    Scripted,
}

impl EngineName {
    /// As it stands in the API and in turns.
    pub const fn as_str(self) -> &'static str {
        match self {
            EngineName::Reflex => "reflex",
            EngineName::Llm => "llm",
            EngineName::Scripted => "scripted",
        }
    }
}

/// Limits of one instance; absent ones are the node's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Most stimuli waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_inbox: Option<u32>,
    /// Longest thinking for one turn, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub think_seconds: Option<u32>,
    /// Most answers and tool results of one turn; not above the node's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u32>,
    /// Most tokens of all model calls of one turn together; not above the node's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens_per_turn: Option<u64>,
    /// A stimulus whose sender left while it waited for the answer is thought about no further when nobody else has waited for
    /// it for so long, in seconds. Absent: the turn goes on to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel_unheard_seconds: Option<u32>,
}

impl Limits {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One reflex: a condition in CEL, what to do, and whether later rules are still tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleSpec {
    /// CEL over `stimulus`, `state`, `instance` and `now`; must yield a boolean.
    pub when: String,
    /// Actions in order; checked when the profile is stored.
    #[serde(rename = "do", default)]
    #[schema(value_type = Vec<Object>)]
    pub actions: Vec<Value>,
    /// How much attention a matching stimulus deserves, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salience: Option<f32>,
    /// Whether to stop at this rule when it matches.
    #[serde(default)]
    pub stop: bool,
}
