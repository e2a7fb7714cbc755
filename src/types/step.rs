//! Steps: what a turn under way has behind it, each committed before the next begins, so that a turn that was interrupted
//! goes on where it stopped.
//!
//! Not here: how a step is stored (`store::journal`), what a turn makes of its steps (`cognition::course`).

use serde::{Deserialize, Serialize};

use super::{ToolCall, ToolResult, Usage};

/// Who speaks in a conversation with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// The one who sets the scene.
    System,
    /// Whoever the instance hears.
    User,
    /// The model.
    Assistant,
    /// A tool.
    Tool,
}

/// One message of a conversation with a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Speaker,
    /// What is said; may be empty where the model only calls tools.
    pub content: String,
    /// What the model calls.
    #[serde(default)]
    pub calls: Vec<ToolCall>,
    /// Of which call this is the result.
    #[serde(default)]
    pub call: Option<String>,
}

impl Message {
    /// Words.
    pub fn said(role: Speaker, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), calls: Vec::new(), call: None }
    }

    /// The result of a call.
    pub fn result(call: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: Speaker::Tool, content: content.into(), calls: Vec::new(), call: Some(call.into()) }
    }
}

/// What a model answered.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Answered {
    /// Its words.
    pub text: String,
    /// Lengths in bytes of the pieces the words were streamed in; together they are as long as `text`, or there are none.
    pub pieces: Vec<u32>,
    /// The tools it calls, in order.
    pub calls: Vec<ToolCall>,
    /// The model, as the turn names it.
    pub model: Option<String>,
    /// What it consumed.
    pub usage: Usage,
}

/// One step of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// What the model was told before its first answer: a turn that is resumed tells it the same.
    Asked(Vec<Message>),
    /// The model answered and calls tools.
    Answered(Answered),
    /// A tool that may not be called twice is about to be: when no result follows, nobody knows what came of it.
    Calling {
        /// Which call of the last answer, counted from 0.
        call: u32,
    },
    /// What came of a call.
    Returned {
        /// Which call of the last answer, counted from 0.
        call: u32,
        /// For the model.
        result: ToolResult,
        /// For the turn's commit: the actions as JSON, none when empty. Opaque here.
        actions: String,
    },
}

impl Step {
    /// Roughly how many bytes it has, for limits.
    pub fn weight(&self) -> usize {
        let calls =
            |calls: &[ToolCall]| calls.iter().map(|call| 64 + call.name.len() + call.arguments.len()).sum::<usize>();
        let message = |message: &Message| 16 + message.content.len() + calls(&message.calls);
        64 + match self {
            Step::Asked(messages) => messages.iter().map(message).sum::<usize>(),
            Step::Answered(answer) => answer.text.len() + answer.pieces.len() + calls(&answer.calls),
            Step::Calling { .. } => 0,
            Step::Returned { result, actions, .. } => result.content.len() + actions.len(),
        }
    }
}
