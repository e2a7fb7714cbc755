//! One call to an OpenAI-compatible chat endpoint: ask, read the stream, say how it ended.
//!
//! Owns: the request, the idle limit, and what a status or a broken stream means. Not here: what pieces of an answer amount to
//! (`reading.rs`), what a server was found not to take (`quirks.rs`), retries, places and the breaker (`mod.rs`).
//! Invariants: everything read is bounded; a key never reaches a log or an error text; dropping the future closes the
//! connection, which is how the provider learns that nobody listens.
//! Tests: at the foot; `tests/it/thinking.rs` against a server that misbehaves.

use std::time::{Duration, Instant};

use reqwest::{
    Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, DATE, HeaderMap, RETRY_AFTER},
};
use secrecy::{ExposeSecret, SecretString};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::{
    quirks::{Parts, Quirks},
    reading::Reading,
    sse::{Event, Parser},
    wire::{Spoken, Tool},
};
use crate::{
    cognition::Progress,
    types::{Cut, InstanceKey, Message, ToolCall, Usage, limits::MAX_ANSWER_BYTES},
};

/// Most bytes read of an answer that is no stream, and of an error's body.
const MAX_BODY_BYTES: usize = 4 * MAX_ANSWER_BYTES;
const MAX_ERROR_BYTES: usize = 16 * 1024;
/// Bytes of one token, roughly, over languages and models.
const BYTES_PER_TOKEN: usize = 4;
/// Most characters of a provider's own words in an error.
pub(super) const MAX_ERROR_CHARS: usize = 300;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    /// Who asks.
    pub(super) who: &'a InstanceKey,
    pub(super) model: &'a str,
    pub(super) messages: &'a [Message],
    pub(super) tools: &'a [Tool],
    pub(super) max_tokens: u32,
    /// Further fields, as they are.
    pub(super) options: &'a Map<String, Value>,
}

impl Ask<'_> {
    /// About how many tokens it takes, its answer included: what whoever asks is charged.
    pub(super) fn tokens(&self) -> u64 {
        self.told() + u64::from(self.max_tokens)
    }

    /// About how many of them go out.
    pub(super) fn told(&self) -> u64 {
        let called = |message: &Message| message.calls.iter().map(|call| call.arguments.len()).sum::<usize>();
        let bytes: usize = self.messages.iter().map(|message| message.content.len() + called(message)).sum();
        bytes.div_ceil(BYTES_PER_TOKEN) as u64
    }
}

/// What came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) text: String,
    /// The tools it calls.
    pub(super) calls: Vec<ToolCall>,
    /// As the provider counted, or estimated when it did not.
    pub(super) usage: Usage,
    /// Why it ended before its end, if it did.
    pub(super) cut: Option<Cut>,
}

/// Why nothing came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// Repeating does not help.
    Refused(String),
    /// Repeating may help, not before `after` if the provider said so. `alive`: it answered, so it is not broken.
    Again { reason: String, after: Option<Duration>, alive: bool },
    /// The server does not take one of our optional fields; the next call leaves it out.
    Adapted,
}

/// Passes words on, and knows whether there were any.
pub(super) struct Voice<'p> {
    progress: &'p dyn Progress,
    spoken: bool,
}

impl<'p> Voice<'p> {
    pub(super) fn new(progress: &'p dyn Progress) -> Self {
        Self { progress, spoken: false }
    }

    fn say(&mut self, text: &str) {
        self.spoken = true;
        self.progress.token(text);
    }

    /// Whether anything was said since the last restart.
    pub(super) fn has_spoken(&self) -> bool {
        self.spoken
    }

    /// What was said so far is void.
    pub(super) fn restart(&mut self) {
        if std::mem::take(&mut self.spoken) {
            self.progress.restart();
        }
    }
}

/// The endpoint of one provider.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    url: String,
    key: Option<SecretString>,
    idle: Duration,
    quirks: Quirks,
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    messages: Vec<Spoken<'a>>,
    stream: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_completion_tokens: Option<u32>,
    #[serde(skip_serializing_if = "<[Tool]>::is_empty")]
    tools: &'a [Tool],
    #[serde(flatten)]
    options: &'a Map<String, Value>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

impl Client {
    /// `base_url` goes up to and including `/v1`.
    pub(super) fn new(http: reqwest::Client, base_url: &str, key: Option<SecretString>, idle: Duration) -> Self {
        let url = format!("{}/chat/completions", base_url.trim_end_matches('/'));
        Self { http, url, key, idle, quirks: Quirks::default() }
    }

    /// Makes the call once. Cancel safe: dropping it closes the connection.
    pub(super) async fn call(&self, ask: Ask<'_>, voice: &mut Voice<'_>) -> Result<Answer, Failure> {
        let taken = self.quirks.parts(ask.model, Instant::now());
        let sent = Parts { tools: taken.tools && !ask.tools.is_empty(), ..taken };
        let body = Body {
            model: ask.model,
            messages: ask.messages.iter().map(Spoken).collect(),
            stream: true,
            stream_options: sent.stream_options.then_some(StreamOptions { include_usage: true }),
            max_tokens: (!sent.completion_tokens).then_some(ask.max_tokens),
            max_completion_tokens: sent.completion_tokens.then_some(ask.max_tokens),
            tools: if sent.tools { ask.tools } else { &[] },
            options: ask.options,
        };
        let mut request = self.http.post(&self.url).header(ACCEPT, "text/event-stream").json(&body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose_secret());
        }
        let answered = timeout(self.idle, request.send()).await.map_err(|_| self.silence())?;
        let response = answered.map_err(|error| broken(&error))?;
        if !response.status().is_success() {
            return Err(self.refusal(response, ask.model, sent).await);
        }
        let is_json = content_type(&response).starts_with("application/json");
        let reading =
            if is_json { self.read_whole(response, voice).await? } else { self.read_stream(response, voice).await? };
        Ok(reading.answer(ask))
    }

    async fn read_stream(&self, mut response: Response, voice: &mut Voice<'_>) -> Result<Reading, Failure> {
        let mut parser = Parser::default();
        let mut reading = Reading::default();
        let mut events = Vec::new();
        while !reading.done {
            // Once the answer is complete, only its figures can follow: a server that ends untidily did answer.
            let portion = match timeout(self.idle, response.chunk()).await {
                Ok(Ok(portion)) => portion,
                _ if reading.finished => break,
                Ok(Err(error)) => return Err(broken(&error)),
                Err(_) => return Err(self.silence()),
            };
            match &portion {
                Some(bytes) => {
                    parser.push(bytes, &mut events).map_err(|error| Failure::Refused(error.to_string()))?;
                }
                None => events.extend(parser.finish()),
            }
            for event in events.drain(..) {
                if let Some(piece) = reading.take(&event)? {
                    voice.say(&piece);
                }
            }
            if portion.is_none() {
                break;
            }
        }
        if reading.done || reading.finished {
            return Ok(reading);
        }
        Err(Failure::Again {
            reason: String::from("the stream ended before the answer did"),
            after: None,
            alive: false,
        })
    }

    /// A server that does not stream answers in one piece.
    async fn read_whole(&self, mut response: Response, voice: &mut Voice<'_>) -> Result<Reading, Failure> {
        let body = self.read_body(&mut response, MAX_BODY_BYTES).await?;
        let mut reading = Reading::default();
        let event = Event { name: String::new(), data: String::from_utf8_lossy(&body).into_owned() };
        if let Some(piece) = reading.take(&event)? {
            voice.say(&piece);
        }
        Ok(reading)
    }

    async fn read_body(&self, response: &mut Response, most: usize) -> Result<Vec<u8>, Failure> {
        let mut body = Vec::new();
        loop {
            let portion = timeout(self.idle, response.chunk()).await.map_err(|_| self.silence())?;
            match portion.map_err(|error| broken(&error))? {
                None => return Ok(body),
                Some(bytes) => body.extend_from_slice(&bytes[..bytes.len().min(most - body.len())]),
            }
            if body.len() >= most {
                return Ok(body);
            }
        }
    }

    /// What is asked.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    async fn refusal(&self, mut response: Response, model: &str, sent: Parts) -> Failure {
        let status = response.status();
        let after = retry_after(response.headers());
        let body = self.read_body(&mut response, MAX_ERROR_BYTES).await.unwrap_or_default();
        let words = self.hide_key(message_of(&body));
        // Servers differ in what they answer to a field they do not know; 401, 403 and 429 are about something else.
        let may_be_odd = matches!(status.as_u16(), 400 | 404 | 422 | 500 | 501);
        if may_be_odd && self.quirks.learn(model, &words, sent, Instant::now()) {
            return Failure::Adapted;
        }
        let words: String = words.chars().take(MAX_ERROR_CHARS).collect();
        judge(status, after, &words)
    }

    fn hide_key(&self, words: String) -> String {
        match &self.key {
            Some(key) if !key.expose_secret().is_empty() => words.replace(key.expose_secret(), "(key)"),
            _ => words,
        }
    }

    fn silence(&self) -> Failure {
        Failure::Again { reason: format!("nothing came for {} s", self.idle.as_secs_f32()), after: None, alive: false }
    }
}

fn content_type(response: &Response) -> String {
    response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default().to_ascii_lowercase()
}

/// A connection that could not be made or broke.
fn broken(error: &reqwest::Error) -> Failure {
    let mut reason =
        if error.is_connect() { String::from("cannot connect") } else { String::from("the connection broke") };
    // The innermost cause says it best: "connection refused".
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if inner.source().is_none() {
            reason = format!("{reason}: {inner}");
        }
        source = inner.source();
    }
    Failure::Again { reason, after: None, alive: false }
}

/// What a status other than success means.
fn judge(status: StatusCode, after: Option<Duration>, words: &str) -> Failure {
    let reason = if words.is_empty() {
        format!("HTTP {}", status.as_u16())
    } else {
        format!("HTTP {}: {words}", status.as_u16())
    };
    match status {
        StatusCode::TOO_MANY_REQUESTS => Failure::Again { reason, after, alive: true },
        status if status == StatusCode::REQUEST_TIMEOUT || status.is_server_error() => {
            Failure::Again { reason, after, alive: false }
        }
        _ => Failure::Refused(reason),
    }
}

/// `Retry-After`: seconds, or a date, which is read against the answer's own `Date`.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let wanted = text(RETRY_AFTER)?.trim();
    if let Ok(seconds) = wanted.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(seconds)));
    }
    let second = |date: &str| jiff::fmt::rfc2822::parse(date).ok().map(|date| date.timestamp().as_second());
    let wait = second(wanted)? - second(text(DATE)?)?;
    Some(Duration::from_secs(u64::try_from(wait).unwrap_or(0)))
}

/// The provider's own words in an error's body: `error.message`, `error`, `message`, or the text itself.
fn message_of(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let Ok(json) = serde_json::from_str::<Value>(&text) else { return text.trim().to_owned() };
    error_words(json.get("error").unwrap_or(&json))
}

pub(super) fn error_words(error: &Value) -> String {
    match error.get("message").unwrap_or(error) {
        Value::String(words) => words.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn statuses_are_judged() {
        let judged = |status: u16| judge(StatusCode::from_u16(status).unwrap(), Some(Duration::from_secs(2)), "no");
        for status in [400, 401, 403, 404, 413, 422, 302] {
            assert!(matches!(judged(status), Failure::Refused(_)), "{status}");
        }
        for (status, lives) in [(408, false), (429, true), (500, false), (502, false), (503, false), (529, false)] {
            let Failure::Again { reason, after, alive } = judged(status) else { panic!("{status}") };
            assert_eq!((reason, after, alive), (format!("HTTP {status}: no"), Some(Duration::from_secs(2)), lives));
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let headers = |after: &'static str, date: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_static(after));
            headers.insert(DATE, HeaderValue::from_static(date));
            retry_after(&headers)
        };
        let date = "Sat, 21 Nov 2026 05:10:00 GMT";
        assert_eq!(headers("7", date), Some(Duration::from_secs(7)));
        assert_eq!(headers("Sat, 21 Nov 2026 05:10:30 GMT", date), Some(Duration::from_secs(30)));
        assert_eq!(headers("Sat, 21 Nov 2026 05:00:00 GMT", date), Some(Duration::ZERO));
        assert_eq!(headers("soon", date), None);
        assert_eq!(headers("-1", date), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }

    #[test]
    fn a_providers_words_are_found_and_the_key_is_not_among_them() {
        assert_eq!(message_of(br#"{"error":{"message":"bad model","type":"x"}}"#), "bad model");
        assert_eq!(message_of(br#"{"error":"bad"}"#), "bad");
        assert_eq!(message_of(br#"{"message":"worse"}"#), "worse");
        assert_eq!(message_of(b" <html>oops</html> "), "<html>oops</html>");
        let key = Some(SecretString::from("sk-secret"));
        let client = Client::new(reqwest::Client::new(), "http://127.0.0.1:1/v1/", key, Duration::from_secs(1));
        assert_eq!(client.url, "http://127.0.0.1:1/v1/chat/completions");
        assert_eq!(client.hide_key("wrong key sk-secret".into()), "wrong key (key)");
        assert!(!format!("{client:?}").contains("sk-secret"));
    }
}
