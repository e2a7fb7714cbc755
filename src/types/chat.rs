//! A stimulus that came as a request of a chat protocol: what stands beside its text, as the stimulus's data.
//!
//! The content type [`CHAT_TYPE`] says that the data is a [`Chat`]. Not here: the protocol (`gateway::http`), what a model is
//! told of it (`cognition::llm`).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Message, RawJson, Stimulus, ToolCall};

/// The content type of a stimulus whose data is a [`Chat`].
pub const CHAT_TYPE: &str = "application/vnd.sophont.chat+json";

/// A tool of the client: a call of it ends the turn, and its result comes with the next stimulus.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClientTool {
    /// Its name.
    pub name: String,
    /// What it does.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<RawJson>,
}

/// What stands beside the text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Chat {
    /// What the request asks of the model beside the persona.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<String>,
    /// The conversation before, of an instance that has no history of its own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<Message>,
    /// Results of calls that the last turn left to the client.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub results: Vec<Message>,
    /// The client's tools.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<ClientTool>,
    /// Further fields for the model's server, as they came.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub options: Map<String, Value>,
}

impl Chat {
    /// What stands beside the text of a stimulus, if it came so.
    pub fn of(stimulus: &Stimulus) -> Option<Self> {
        if stimulus.content_type.as_deref() != Some(CHAT_TYPE) {
            return None;
        }
        stimulus.data.as_ref().map_or_else(|| Some(Self::default()), |data| serde_json::from_str(data.get()).ok())
    }
}

/// Calls that a turn leaves to the client, as the data of its reply.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LeftCalls {
    /// In order.
    pub tool_calls: Vec<LeftCall>,
}

/// One of them, as the protocol spells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftCall {
    /// Its id.
    pub id: String,
    /// Always `function`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is called.
    pub function: LeftFunction,
}

/// A name and its arguments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeftFunction {
    /// The tool.
    pub name: String,
    /// JSON as text.
    pub arguments: String,
}

impl LeftCalls {
    /// Those of a reply's data, if it has any.
    pub fn of(data: &RawJson) -> Option<Self> {
        let left: Self = serde_json::from_str(data.get()).ok()?;
        (!left.tool_calls.is_empty()).then_some(left)
    }

    /// As the model wrote them.
    pub fn calls(self) -> Vec<ToolCall> {
        let call = |LeftCall { id, function, .. }| ToolCall { id, name: function.name, arguments: function.arguments };
        self.tool_calls.into_iter().map(call).collect()
    }
}

impl From<Vec<ToolCall>> for LeftCalls {
    fn from(calls: Vec<ToolCall>) -> Self {
        let left = |ToolCall { id, name, arguments }| LeftCall {
            id,
            kind: String::from("function"),
            function: LeftFunction { name, arguments },
        };
        Self { tool_calls: calls.into_iter().map(left).collect() }
    }
}
