//! What a server was found not to take: the next call does without it.
//!
//! Owns: telling from the words of a refusal which part of the call the server does not know, and how long that is
//! believed. Not here: the call and its retries (`client.rs`, `mod.rs`).
//!
//! Invariants: what is wrong with one request, such as a tool's schema, is no quirk of the server: others keep their tools; only
//! a part that was sent is left out, so a call is repeated at most once for each. Tests: at the foot; `tests/it/thinking.rs`.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::client::MAX_ERROR_CHARS;

/// How long a model is believed to take no tools: servers are upgraded.
const TOOLLESS_FOR: Duration = Duration::from_secs(600);
/// Most models that are known to take none.
const MAX_TOOLLESS: usize = 100;

/// The optional parts of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parts {
    /// The wish for figures at the end of a stream.
    pub(super) stream_options: bool,
    /// The limit of an answer under its newer name, `max_completion_tokens`, in place of `max_tokens`.
    pub(super) completion_tokens: bool,
    /// The tools, where there are any.
    pub(super) tools: bool,
}

/// Of one server.
#[derive(Debug, Default)]
pub(super) struct Quirks(Mutex<Found>);

#[derive(Debug, Default)]
struct Found {
    no_stream_options: bool,
    completion_tokens: bool,
    /// Models that take no tools, and until when that is believed.
    toolless: BTreeMap<String, Instant>,
}

impl Quirks {
    /// What a call to this model may have in it.
    pub(super) fn parts(&self, model: &str, now: Instant) -> Parts {
        let found = self.found();
        Parts {
            stream_options: !found.no_stream_options,
            completion_tokens: found.completion_tokens,
            tools: found.toolless.get(model).is_none_or(|until| *until <= now),
        }
    }

    /// Whether the words of a refusal name a part that was sent and that the next call leaves out.
    pub(super) fn learn(&self, model: &str, words: &str, sent: Parts, now: Instant) -> bool {
        let mut found = self.found();
        match complaint(words) {
            Some(Part::MaxTokens) if !sent.completion_tokens => found.completion_tokens = true,
            Some(Part::StreamOptions) if sent.stream_options => found.no_stream_options = true,
            Some(Part::Tools) if sent.tools => {
                found.toolless.retain(|_, until| *until > now);
                if found.toolless.len() >= MAX_TOOLLESS {
                    found.toolless.pop_first();
                }
                let is_news = found.toolless.insert(model.to_owned(), now + TOOLLESS_FOR).is_none();
                if is_news {
                    let server: String = words.chars().take(MAX_ERROR_CHARS).collect();
                    tracing::warn!(model, server, "the model takes no tools: asked without for {TOOLLESS_FOR:?}");
                }
            }
            _ => return false,
        }
        true
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    StreamOptions,
    MaxTokens,
    Tools,
}

/// The part of a call that a server says it does not know.
fn complaint(words: &str) -> Option<Part> {
    let words = words.to_ascii_lowercase();
    let names = |any: &[&str]| any.iter().any(|name| words.contains(name));
    if names(&["max_completion_tokens"]) {
        return Some(Part::MaxTokens);
    }
    if names(&["stream_options", "include_usage"]) {
        return Some(Part::StreamOptions);
    }
    // What is said of one of them (`tools[0].function.parameters`) is about that one, and no reason to leave all out.
    let of_one = words.match_indices("tools").any(|(at, name)| {
        let mut behind = words[at + name.len()..].chars();
        matches!((behind.next(), behind.next()), (Some('[' | '.' | '/'), Some('0'..='9')))
    });
    let about_tools = names(&["tools", "tool use", "tool choice requires", "tool calling", "function calling"]);
    let unknown = names(&[
        "support",
        "unknown",
        "unrecognized",
        "unexpected",
        "not permitted",
        "not allowed",
        "not enabled",
        "requires",
    ]);
    (about_tools && unknown && !of_one).then_some(Part::Tools)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const ALL: Parts = Parts { stream_options: true, completion_tokens: false, tools: true };

    #[test]
    fn what_a_server_does_not_know_is_told_from_what_a_request_did_wrong() {
        for (words, part) in [
            ("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", Some(Part::MaxTokens)),
            ("unknown field: stream_options", Some(Part::StreamOptions)),
            ("[{'loc': ['body', 'stream_options', 'include_usage']}]", Some(Part::StreamOptions)),
            ("registry/library/small does not support tools", Some(Part::Tools)),
            ("unknown field `tools`, expected one of `model`", Some(Part::Tools)),
            ("[{'loc': ['body', 'tools'], 'msg': 'Extra inputs are not permitted'}]", Some(Part::Tools)),
            ("Tools are not supported by this model", Some(Part::Tools)),
            ("Unknown parameter: 'tools'", Some(Part::Tools)),
            ("body -> tools: extra fields not permitted", Some(Part::Tools)),
            ("tools param requires --jinja flag", Some(Part::Tools)),
            ("\"auto\" tool choice requires a parser to be enabled", Some(Part::Tools)),
            ("No endpoints found that support tool use", Some(Part::Tools)),
            ("Invalid 'tools[0].function.name': string does not match pattern", None),
            ("tools.0.input_schema: unsupported keyword in the schema", None),
            ("Invalid schema for function 'look': properties is required", None),
            ("Invalid tools: type 'x' of tools[0] is not supported", None),
            ("this model's maximum context length is 8192 tokens, tools included", None),
            ("'tools' is too long, at most 128", None),
            ("the model is overloaded", None),
        ] {
            assert_eq!(complaint(words), part, "{words}");
        }
    }

    #[test]
    fn calls_under_way_learn_the_same_and_nothing_is_learnt_twice() {
        let (quirks, now) = (Quirks::default(), Instant::now());
        assert_eq!(quirks.parts("m", now), ALL);
        // Two calls were sent before the first refusal came.
        assert!(quirks.learn("m", "unknown field stream_options", ALL, now));
        assert!(quirks.learn("m", "unknown field stream_options", ALL, now));
        let sent = quirks.parts("m", now);
        assert_eq!(sent, Parts { stream_options: false, ..ALL });
        assert!(!quirks.learn("m", "unknown field stream_options", sent, now), "it was not there");
        assert!(quirks.learn("m", "use max_completion_tokens", sent, now));
        assert!(!quirks.learn("m", "use max_completion_tokens", quirks.parts("m", now), now));
    }

    #[test]
    fn a_model_without_tools_is_asked_again_some_time_and_others_keep_theirs() {
        let (quirks, now) = (Quirks::default(), Instant::now());
        assert!(quirks.learn("m", "m does not support tools", ALL, now));
        assert!(!quirks.parts("m", now).tools && quirks.parts("n", now).tools);
        assert!(quirks.parts("m", now + TOOLLESS_FOR).tools);
        for n in 0..2 * MAX_TOOLLESS {
            assert!(quirks.learn(&format!("m{n}"), "no tools supported", ALL, now));
        }
        assert_eq!(quirks.found().toolless.len(), MAX_TOOLLESS);
    }
}
