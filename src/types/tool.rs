//! Tools: what a model may call while it thinks, a call as the model wrote it, and what came of it.
//!
//! Not here: who carries a call out (`cognition::Toolbox` is the port), and its place in a turn ([`super::step`]).

use serde::{Deserialize, Serialize};

use super::RawJson;

/// Longest name of a tool, in bytes: what model servers take.
pub const MAX_TOOL_NAME: usize = 64;

/// A tool, as a model is told of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToolSpec {
    /// Its name: 1 to [`MAX_TOOL_NAME`] of `A-Z a-z 0-9 _ -`.
    pub name: String,
    /// What it does, for the model.
    pub description: String,
    /// JSON schema of its arguments, an object.
    pub parameters: RawJson,
    /// Whether a call may be made again when a crash hid its outcome: it has no effect outside the turn, or whoever carries
    /// it out recognises the idempotency key. A call of another tool is journaled before it is made and never made twice; the
    /// model is told that its outcome is unknown.
    pub repeatable: bool,
}

impl ToolSpec {
    /// Whether a name can be told to a model server.
    pub fn is_name(name: &str) -> bool {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        (1..=MAX_TOOL_NAME).contains(&name.len()) && name.bytes().all(fits)
    }
}

/// A call as the model wrote it; nothing in it is checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToolCall {
    /// The model's own id of the call, or one made for it: unique within one answer.
    pub id: String,
    /// Which tool.
    pub name: String,
    /// The arguments, meant to be a JSON object.
    pub arguments: String,
}

/// What came of a call, for the model to read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ToolResult {
    /// Text, or JSON as text.
    pub content: String,
    /// Whether it is the reason why there is no result.
    pub failed: bool,
}

impl ToolResult {
    /// A result.
    pub fn of(content: impl Into<String>) -> Self {
        Self { content: content.into(), failed: false }
    }

    /// The reason why there is none.
    pub fn failure(reason: impl Into<String>) -> Self {
        Self { content: reason.into(), failed: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_that_servers_take() {
        assert!(ToolSpec::is_name("http_fetch-2") && ToolSpec::is_name(&"a".repeat(MAX_TOOL_NAME)));
        for bad in ["", "a b", "a.b", "é", &"a".repeat(MAX_TOOL_NAME + 1)] {
            assert!(!ToolSpec::is_name(bad), "{bad}");
        }
    }
}
