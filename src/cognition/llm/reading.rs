//! An answer while it arrives: what the pieces of a stream, or one whole answer, amount to.
//!
//! Owns: the answer's wire format, its bounds, and what servers leave out or spell otherwise. Not here: the connection
//! (`client.rs`), events and calls in pieces (`sse.rs`, `wire.rs`). Pure. Tests: at the foot.

use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use super::{
    client::{Answer, Ask, Failure, MAX_ERROR_CHARS, error_words},
    sse::Event,
    wire::{Calls, Piece},
};
use crate::types::{Cut, Usage, limits::MAX_ANSWER_BYTES};

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Option<Vec<Choice>>,
    #[serde(default)]
    usage: Option<WireUsage>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    delta: Option<Said>,
    #[serde(default)]
    message: Option<Said>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Said {
    #[serde(default)]
    content: Option<Content>,
    #[serde(default)]
    tool_calls: Option<Vec<Piece>>,
}

/// Words; some servers send them in parts, beside parts of other kinds such as what a model thought before.
#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
    Other(IgnoredAny),
}

#[derive(Deserialize)]
struct Part {
    #[serde(default)]
    text: Option<String>,
}

impl Content {
    fn words(self) -> String {
        match self {
            Content::Text(text) => text,
            Content::Parts(parts) => parts.into_iter().filter_map(|part| part.text).collect(),
            Content::Other(_) => String::new(),
        }
    }
}

#[derive(Deserialize)]
struct WireUsage {
    #[serde(default)]
    prompt_tokens: Option<u64>,
    #[serde(default)]
    completion_tokens: Option<u64>,
}

/// An answer while it arrives.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) text: String,
    pub(super) calls: Calls,
    usage: Option<Usage>,
    /// Pieces with text in them.
    pieces: u64,
    cut: Option<Cut>,
    /// The provider said why it stopped.
    pub(super) finished: bool,
    /// Nothing more is wanted.
    pub(super) done: bool,
}

/// What a server's reason to stop means, when it is not that all was said.
fn cut_for(reason: &str) -> Option<Cut> {
    match reason {
        "length" | "max_tokens" | "model_length" => Some(Cut::Length),
        "content_filter" | "safety" => Some(Cut::Filter),
        _ => None,
    }
}

impl Reading {
    /// Takes an event and yields the words in it.
    pub(super) fn take(&mut self, event: &Event) -> Result<Option<String>, Failure> {
        let data = event.data.trim();
        if data == "[DONE]" {
            self.done = true;
            return Ok(None);
        }
        if data.is_empty() {
            return Ok(None);
        }
        let again = |reason: String| Failure::Again { reason, after: None, alive: false };
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| again(format!("unreadable answer: {error}")))?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            let words: String = error_words(&error).chars().take(MAX_ERROR_CHARS).collect();
            return Err(again(format!("the provider gave up: {words}")));
        }
        if let Some(usage) = chunk.usage {
            self.usage = Some(Usage {
                input_tokens: usage.prompt_tokens.unwrap_or(0),
                output_tokens: usage.completion_tokens.unwrap_or(0),
            });
        }
        let Some(choice) = chunk.choices.into_iter().flatten().next() else { return Ok(None) };
        self.finished |= choice.finish_reason.is_some() || choice.message.is_some();
        self.cut = choice.finish_reason.as_deref().and_then(cut_for).or(self.cut);
        let Some(said) = choice.delta.or(choice.message) else { return Ok(None) };
        let before = self.calls.weight();
        said.tool_calls.unwrap_or_default().into_iter().for_each(|piece| self.calls.take(piece));
        self.pieces += u64::from(self.calls.weight() > before);
        let mut piece = said.content.map(Content::words).unwrap_or_default();
        let room = MAX_ANSWER_BYTES - self.text.len();
        if piece.len() > room {
            // An endless answer is cut, at a character, and the connection closed.
            piece.truncate((0..=room).rev().find(|&at| piece.is_char_boundary(at)).unwrap_or(0));
            self.cut = Some(Cut::Length);
            self.done = true;
        }
        if piece.is_empty() {
            return Ok(None);
        }
        self.pieces += 1;
        self.text.push_str(&piece);
        Ok(Some(piece))
    }

    /// The finished answer. Without the provider's count, a token is taken for a piece of the stream going out and for four
    /// bytes going in.
    pub(super) fn answer(self, ask: Ask<'_>) -> Answer {
        let estimate = || Usage { input_tokens: ask.told(), output_tokens: self.pieces };
        let usage = self.usage.unwrap_or_else(estimate);
        Answer { text: self.text, calls: self.calls.finish(), usage, cut: self.cut }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::types::{InstanceId, InstanceKey, Message, Speaker, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("lamp").unwrap())
    }

    fn ask<'a>(who: &'a InstanceKey, messages: &'a [Message]) -> Ask<'a> {
        static NO_OPTIONS: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
        Ask { who, model: "m", messages, tools: &[], max_tokens: 1, options: &NO_OPTIONS }
    }

    fn event(data: &str) -> Event {
        Event { name: String::new(), data: data.to_owned() }
    }

    #[test]
    fn why_an_answer_ended_early_is_kept() {
        for (reason, cut) in
            [("stop", None), ("tool_calls", None), ("length", Some(Cut::Length)), ("content_filter", Some(Cut::Filter))]
        {
            let mut reading = Reading::default();
            let data =
                serde_json::json!({"choices": [{"delta": {"content": "a"}, "finish_reason": reason}]}).to_string();
            reading.take(&event(&data)).unwrap();
            reading.take(&event(r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}"#)).unwrap();
            assert_eq!(reading.answer(ask(&key(), &[])).cut, cut, "{reason}");
        }
    }

    #[test]
    fn a_stream_is_read_to_its_end_with_its_usage() {
        let mut reading = Reading::default();
        let mut words = Vec::new();
        for data in [
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}"#,
            r#"{"choices":[{"delta":{"content":"Hel"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{"content":"lo"},"finish_reason":null}]}"#,
            r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#,
            r#"{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7}}"#,
            "[DONE]",
        ] {
            words.extend(reading.take(&event(data)).unwrap());
        }
        assert_eq!(words, ["Hel", "lo"]);
        assert!(reading.finished && reading.done);
        let answer = reading.answer(ask(&key(), &[]));
        assert_eq!(
            answer,
            Answer {
                text: "Hello".into(),
                calls: vec![],
                usage: Usage { input_tokens: 5, output_tokens: 2 },
                cut: None
            }
        );
    }

    #[test]
    fn words_in_parts_are_read_and_thoughts_before_them_are_not() {
        let mut reading = Reading::default();
        for content in [
            r#"[{"type":"thinking","thinking":[{"type":"text","text":"hm"}]}]"#,
            r#"[{"type":"text","text":"Hel"},{"type":"text","text":"lo"}]"#,
            "null",
            "7",
        ] {
            reading.take(&event(&format!(r#"{{"choices":[{{"delta":{{"content":{content}}}}}]}}"#))).unwrap();
        }
        reading.take(&event(r#"{"choices":null,"usage":{"prompt_tokens":1,"completion_tokens":null}}"#)).unwrap();
        let answer = reading.answer(ask(&key(), &[]));
        assert_eq!((answer.text.as_str(), answer.usage.input_tokens), ("Hello", 1));
    }

    #[test]
    fn missing_usage_is_estimated() {
        let mut reading = Reading::default();
        for piece in ["a", "b", "c"] {
            reading.take(&event(&format!(r#"{{"choices":[{{"delta":{{"content":"{piece}"}}}}]}}"#))).unwrap();
        }
        let messages = [Message::said(Speaker::User, "x".repeat(10))];
        let usage = reading.answer(ask(&key(), &messages)).usage;
        assert_eq!(usage, Usage { input_tokens: 3, output_tokens: 3 });
    }

    #[test]
    fn an_endless_answer_is_cut_at_a_character() {
        let mut reading = Reading::default();
        let piece = "é".repeat(MAX_ANSWER_BYTES / 2 - 1) + "a";
        let data = serde_json::json!({"choices": [{"delta": {"content": piece}}]}).to_string();
        reading.take(&event(&data)).unwrap();
        assert!(!reading.done);
        reading.take(&event(&data)).unwrap();
        assert!(reading.done && reading.text.len() <= MAX_ANSWER_BYTES);
        assert_eq!(reading.cut, Some(Cut::Length));
    }

    #[test]
    fn errors_within_a_stream_may_be_tried_again() {
        for data in [r#"{"error":{"message":"overloaded","code":529}}"#, r#"{"error":"overloaded"}"#, "{not json"] {
            assert!(matches!(Reading::default().take(&event(data)), Err(Failure::Again { .. })), "{data}");
        }
    }
}
