//! Errors as problem details (RFC 9457): the one place where a kind becomes an HTTP status.
//!
//! Owns: [`Refusal`], what the door itself refuses, and [`Problem`], what a caller is told about any fault.
//! Invariants: a code is a contract and names one cause; refusals that may be repeated say when; faults of ours are logged
//! here, once, and their text is not sent. Tests: at the foot.

use std::{borrow::Cow, time::Duration};

use actix_web::{
    HttpResponse,
    body::BoxBody,
    http::{
        StatusCode,
        header::{self, HeaderName, HeaderValue},
    },
};
use serde::Serialize;

use crate::types::{
    Fault, InstanceId, Kind, StimulusId,
    id::IdError,
    limits::{MAX_JSON_DEPTH, MAX_PROFILE_BYTES},
    strict,
};

/// What the door refuses by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such path.
    #[error("there is nothing at this path")]
    Path,
    /// The path has other methods.
    #[error("this path takes {0}")]
    Method(String),
    /// Stopping.
    #[error("the node is shutting down")]
    Draining,
    /// Not ready to take work.
    #[error("the node is not ready: {0}")]
    NotReady(String),
    /// No credentials.
    #[error("this node wants a token")]
    NoCredentials,
    /// Wrong credentials.
    #[error("the token is not valid")]
    BadCredentials,
    /// A web page of another site uses the visitor's browser.
    #[error("requests for host '{0}' are not taken without a token")]
    Foreign(String),
    /// A right is missing.
    #[error("the token does not grant '{0}'")]
    Scope(&'static str),
    /// The token is for another instance.
    #[error("the token is for one instance only, and not for this one")]
    Elsewhere,
    /// A device speaks as somebody else.
    #[error("a device sends as itself: leave 'sender' out")]
    Sender,
    /// A reply would go where the caller may not publish.
    #[error("reply_to.topic '{0}' is not a topic this caller may have replies on")]
    ReplyTopic(String),
    /// The body is too large.
    #[error("the body is larger than {0} bytes")]
    TooLarge(usize),
    /// The profile is too large.
    #[error("the profile is larger than {MAX_PROFILE_BYTES} bytes")]
    ProfileTooLarge,
    /// The body has another type.
    #[error("this call takes {0}")]
    MediaType(&'static str),
    /// The body is compressed.
    #[error("bodies are taken without content-encoding")]
    ContentEncoding,
    /// The body did not come in time.
    #[error("the body did not arrive within {0:?}")]
    SlowBody(Duration),
    /// The body broke off.
    #[error("the body could not be read: {0}")]
    BrokenBody(String),
    /// Not JSON.
    #[error(transparent)]
    Json(#[from] strict::Error),
    /// JSON that is not what the call takes.
    #[error("{0}")]
    Field(String),
    /// A bad id in the path or a header.
    #[error("{place}: {error}")]
    Id {
        /// Where.
        place: &'static str,
        /// What.
        error: IdError,
    },
    /// A bad percent escape in the path.
    #[error("the path has a broken % escape")]
    Escape,
    /// A query parameter nobody knows.
    #[error("unknown query parameter '{name}'")]
    UnknownQuery {
        /// The parameter.
        name: String,
        /// What there is.
        allowed: String,
    },
    /// A query parameter with a bad value.
    #[error("query parameter '{name}' {why}")]
    Query {
        /// The parameter.
        name: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A header with a bad value.
    #[error("header '{name}' {why}")]
    Header {
        /// The header.
        name: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// Two names for one stimulus.
    #[error("Idempotency-Key '{key}' and id '{id}' differ")]
    TwoIds {
        /// The header.
        key: StimulusId,
        /// The field.
        id: StimulusId,
    },
    /// Nothing in it.
    #[error("a stimulus needs 'content' or 'data'")]
    Empty,
    /// A channel with a meaning of its own.
    #[error("channel '{0}' is kept for changes of the state or the memory")]
    Channel(&'static str),
    /// The instance lives on a node of an older build.
    #[error("the node that has this instance runs a build without this call")]
    OldOwner,
    /// No such instance.
    #[error("no such instance")]
    NoInstance,
    /// No such stimulus.
    #[error("no such stimulus")]
    NoStimulus,
    /// More than one instance knows the id.
    #[error("{} instances know this stimulus id: {}", .0.len(), names(.0))]
    Ambiguous(Vec<InstanceId>),
    /// It was given up.
    #[error("the stimulus could not be decided after {tries} tries: {reason}")]
    Dead {
        /// Why.
        reason: String,
        /// How often it was tried.
        tries: u32,
        /// Whose.
        instance: InstanceId,
        /// Which.
        stimulus: StimulusId,
    },
    /// There is a turn, and it says nothing but why.
    #[error("the turn has no answer: {0}")]
    NoAnswer(String),
    /// The answer did not come, and nothing is known of the stimulus yet.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

fn names(instances: &[InstanceId]) -> String {
    instances.iter().map(InstanceId::as_str).collect::<Vec<_>>().join(", ")
}

impl Fault for Refusal {
    fn kind(&self) -> Kind {
        match self {
            Refusal::Path | Refusal::NoInstance | Refusal::NoStimulus => Kind::NotFound,
            Refusal::Draining | Refusal::NotReady(_) | Refusal::OldOwner => Kind::Unavailable,
            Refusal::NoCredentials | Refusal::BadCredentials => Kind::Unauthenticated,
            Refusal::Foreign(_) | Refusal::Scope(_) | Refusal::Elsewhere | Refusal::Sender | Refusal::ReplyTopic(_) => {
                Kind::Forbidden
            }
            Refusal::Ambiguous(_) => Kind::Conflict,
            Refusal::Timeout(_) => Kind::Timeout,
            _ => Kind::Invalid,
        }
    }

    fn code(&self) -> &'static str {
        match self {
            Refusal::Path => "NOT_FOUND",
            Refusal::Method(_) => "METHOD_NOT_ALLOWED",
            Refusal::Draining => "DRAINING",
            Refusal::NotReady(_) => "NOT_READY",
            Refusal::OldOwner => "OWNER_TOO_OLD",
            Refusal::NoCredentials | Refusal::BadCredentials => "UNAUTHENTICATED",
            Refusal::Foreign(_) => "FOREIGN_ORIGIN",
            Refusal::Scope(_) | Refusal::Elsewhere | Refusal::Sender | Refusal::ReplyTopic(_) => "FORBIDDEN",
            Refusal::TooLarge(_) | Refusal::ProfileTooLarge => "BODY_TOO_LARGE",
            Refusal::MediaType(_) | Refusal::ContentEncoding => "UNSUPPORTED_MEDIA_TYPE",
            Refusal::SlowBody(_) => "BODY_TIMEOUT",
            Refusal::BrokenBody(_) => "BODY_INCOMPLETE",
            Refusal::Json(error) => error.code(),
            Refusal::Field(_) | Refusal::Empty => "INVALID",
            Refusal::Id { .. } | Refusal::Escape => "ID_INVALID",
            Refusal::UnknownQuery { .. } | Refusal::Query { .. } => "QUERY_INVALID",
            Refusal::Header { .. } => "HEADER_INVALID",
            Refusal::TwoIds { .. } => "ID_MISMATCH",
            Refusal::Channel(_) => "CHANNEL_RESERVED",
            Refusal::NoInstance => "INSTANCE_NOT_FOUND",
            Refusal::NoStimulus => "STIMULUS_NOT_FOUND",
            Refusal::Ambiguous(_) => "STIMULUS_AMBIGUOUS",
            Refusal::Dead { .. } => "DEAD_LETTER",
            Refusal::NoAnswer(_) => "NO_ANSWER",
            Refusal::Timeout(_) => "TIMEOUT",
        }
    }

    fn hint(&self) -> Option<String> {
        Some(String::from(match self {
            Refusal::Path => "the calls are listed at /docs and in /openapi.json",
            Refusal::Method(_) => "the methods of this path are in the Allow header",
            Refusal::Draining => "send it to another node, or again when this one is back",
            Refusal::NotReady(_) => "the details are in 'checks'; try again after the time in Retry-After",
            Refusal::NoCredentials => "send the header 'Authorization: Bearer TOKEN'",
            Refusal::BadCredentials => "check the token against [[auth.tokens]] in the node's configuration",
            Refusal::Foreign(_) => "use localhost or 127.0.0.1, or configure a token",
            Refusal::Scope(scope) => return Some(format!("use a token whose scopes contain '{scope}'")),
            Refusal::Elsewhere => "use the token of that instance, or one without an instance",
            Refusal::ReplyTopic(_) => "use a plain topic, or one below sophont/TENANT/INSTANCE/out/",
            Refusal::TooLarge(_) => "send less at once, or raise http.max_body_kb",
            Refusal::MediaType(_) => "set the Content-Type header accordingly",
            Refusal::SlowBody(_) => "send the body at once",
            Refusal::Json(strict::Error::Depth(_)) => {
                return Some(format!("keep the nesting at {MAX_JSON_DEPTH} levels or less"));
            }
            Refusal::Id { .. } => "ids have 1 to 128 characters of A-Z a-z 0-9 . _ ~ -",
            Refusal::UnknownQuery { allowed, .. } if allowed.is_empty() => "this call takes no query parameters",
            Refusal::UnknownQuery { allowed, .. } => return Some(format!("this call takes: {allowed}")),
            Refusal::TwoIds { .. } => "send one of them, or the same text in both",
            Refusal::Channel(_) => {
                "PATCH /v1/instances/{id}/state changes the state, the memory calls change the memory"
            }
            Refusal::NoInstance => "send it a stimulus or PUT a profile to create it",
            Refusal::NoStimulus => "add ?instance=ID: ids the node generated are only found within their instance",
            Refusal::Ambiguous(_) => "add ?instance=ID to say which one is meant",
            Refusal::Dead { instance, stimulus, .. } => {
                return Some(format!(
                    "it is kept: POST /v1/instances/{instance}/dead-letters/{stimulus}/retry tries it again"
                ));
            }
            Refusal::NoAnswer(_) => "ask again under another Idempotency-Key",
            Refusal::Timeout(_) => "repeat the request with the same id; it is decided at most once",
            _ => return None,
        }))
    }
}

/// The status of a fault: by its kind, and more precisely where HTTP has a word of its own for a code.
fn status(kind: Kind, code: &str) -> StatusCode {
    match code {
        "METHOD_NOT_ALLOWED" => StatusCode::METHOD_NOT_ALLOWED,
        "BODY_TIMEOUT" => StatusCode::REQUEST_TIMEOUT,
        "BODY_TOO_LARGE" => StatusCode::PAYLOAD_TOO_LARGE,
        "UNSUPPORTED_MEDIA_TYPE" => StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "VERSION_MISMATCH" => StatusCode::PRECONDITION_FAILED,
        "DEAD_LETTER" | "NO_ANSWER" => StatusCode::UNPROCESSABLE_ENTITY,
        _ => match kind {
            Kind::Invalid => StatusCode::BAD_REQUEST,
            Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
            Kind::Forbidden => StatusCode::FORBIDDEN,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
            Kind::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Kind::Fenced | Kind::Overloaded | Kind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        },
    }
}

const fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Invalid => "The request cannot be taken as it is",
        Kind::Unauthenticated => "Valid credentials are needed",
        Kind::Forbidden => "This is not allowed to the caller",
        Kind::NotFound => "There is no such thing",
        Kind::Conflict => "The request does not fit what is there",
        Kind::Fenced => "Another node has taken over",
        Kind::RateLimited => "Too many requests",
        Kind::Overloaded => "There is too much to do at present",
        Kind::Timeout => "The answer did not come in time",
        Kind::Unavailable => "This does not work at present",
        Kind::Internal => "A fault of the node",
    }
}

/// What a caller is told. Boxed: it travels on the cold path of results that are mostly good.
#[derive(Debug)]
pub struct Problem(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    status: StatusCode,
    code: &'static str,
    detail: String,
    hint: Option<String>,
    retry_after: Option<Duration>,
    headers: Vec<(HeaderName, HeaderValue)>,
    elsewhere: Option<String>,
    checks: Option<serde_json::Value>,
}

impl<F: Fault> From<F> for Problem {
    fn from(fault: F) -> Self {
        let (kind, code) = (fault.kind(), fault.code());
        Self(Box::new(Inner {
            kind,
            status: status(kind, code),
            code,
            detail: fault.to_string(),
            hint: fault.hint(),
            retry_after: fault.retry_after(),
            headers: Vec::new(),
            elsewhere: None,
            checks: None,
        }))
    }
}

/// The body of an error answer.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Problem)]
pub struct ProblemView<'a> {
    /// Where the code is explained; stable per code.
    #[serde(rename = "type")]
    #[schema(value_type = String)]
    kind: Cow<'a, str>,
    /// The kind of fault, for people.
    title: &'a str,
    /// The HTTP status.
    status: u16,
    /// The code, for programs. Stable.
    code: &'a str,
    /// What happened.
    #[schema(value_type = String)]
    detail: Cow<'a, str>,
    /// What can be done about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    /// The path of the request.
    instance: &'a str,
    /// The request's id, as in `x-request-id`.
    request_id: &'a str,
    /// Where another node takes it, of a node that stops or is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    elsewhere: Option<&'a str>,
    /// What was looked at, for readiness.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    checks: Option<&'a serde_json::Value>,
}

impl Problem {
    /// Adds what readiness looked at.
    #[must_use]
    pub fn with_checks(mut self, checks: serde_json::Value) -> Self {
        self.0.checks = Some(checks);
        self
    }

    /// Whether another node may take what this one refused: it stops, or is not ready.
    pub fn is_ours_alone(&self) -> bool {
        matches!(self.0.code, "DRAINING" | "NOT_READY")
    }

    /// Adds where another node takes it.
    #[must_use]
    pub fn with_elsewhere(mut self, address: Option<&str>) -> Self {
        self.0.elsewhere = address.map(str::to_owned);
        self
    }

    /// Adds a header.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.0.headers.push((name, value));
        }
        self
    }

    #[cfg(test)]
    fn status(&self) -> StatusCode {
        self.0.status
    }

    /// The body. A fault of ours is logged here and described to the caller only by the request's id.
    pub fn body(&self, path: &str, request_id: &str) -> Vec<u8> {
        let inner = &*self.0;
        let ours = inner.kind == Kind::Internal;
        if ours {
            tracing::error!(request_id, path, code = inner.code, error = %inner.detail, "request failed");
        }
        let detail = if ours {
            Cow::Borrowed("the node's log has the cause under this request id")
        } else {
            (&*inner.detail).into()
        };
        let view = ProblemView {
            kind: format!("https://sophont.dev/errors/{}", inner.code.to_ascii_lowercase().replace('_', "-")).into(),
            title: title(inner.kind),
            status: inner.status.as_u16(),
            code: inner.code,
            detail,
            hint: inner.hint.as_deref(),
            instance: path,
            request_id,
            elsewhere: inner.elsewhere.as_deref(),
            checks: inner.checks.as_ref(),
        };
        serde_json::to_vec(&view).unwrap_or_default()
    }

    /// The body in the form of the chat protocol.
    pub fn refused(&self, path: &str, request_id: &str) -> serde_json::Value {
        let inner = &*self.0;
        let body: serde_json::Value = serde_json::from_slice(&self.body(path, request_id)).unwrap_or_default();
        let text = |name: &str| body.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
        let message = [text("detail"), text("hint")].into_iter().filter(|part| !part.is_empty());
        let message = message.collect::<Vec<_>>().join(": ");
        super::chat::refused(inner.status.as_u16(), inner.code, &message)
    }

    /// The whole answer; `as_chat`: in the form of the chat protocol.
    pub fn answer(&self, path: &str, request_id: &str, as_chat: bool) -> HttpResponse {
        let inner = &*self.0;
        let (kind, body) = match as_chat {
            true => ("application/json", self.refused(path, request_id).to_string().into_bytes()),
            false => ("application/problem+json", self.body(path, request_id)),
        };
        let mut response = HttpResponse::with_body(inner.status, BoxBody::new(body));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(after) = inner.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if inner.kind == Kind::Unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        for (name, value) in &inner.headers {
            headers.insert(name.clone(), value.clone());
        }
        response
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{instance, store};

    fn json(problem: &Problem) -> serde_json::Value {
        serde_json::from_slice(&problem.body("/v1/x", "r1")).unwrap()
    }

    #[test]
    fn a_problem_says_what_happened_and_what_to_do() {
        let problem = Problem::from(instance::Error::InboxFull(1000));
        let body = json(&problem);
        assert_eq!(body["type"], "https://sophont.dev/errors/inbox-full");
        assert_eq!((&body["status"], &body["code"]), (&503.into(), &"INBOX_FULL".into()));
        assert_eq!((&body["instance"], &body["request_id"]), (&"/v1/x".into(), &"r1".into()));
        assert!(body["hint"].as_str().unwrap().contains("max_inbox"));
        let answer = problem.answer("/v1/x", "r1", false);
        assert_eq!(answer.headers().get("retry-after").unwrap(), "1");
        assert_eq!(answer.headers().get("content-type").unwrap(), "application/problem+json");
    }

    #[test]
    fn every_kind_and_special_code_has_its_status() {
        let of = |fault: Refusal| Problem::from(fault).status().as_u16();
        assert_eq!(of(Refusal::Method(String::new())), 405);
        assert_eq!(of(Refusal::TooLarge(1)), 413);
        assert_eq!(of(Refusal::MediaType("x")), 415);
        assert_eq!(of(Refusal::SlowBody(Duration::ZERO)), 408);
        assert_eq!(of(Refusal::NoCredentials), 401);
        assert_eq!(of(Refusal::Elsewhere), 403);
        assert_eq!(of(Refusal::NoStimulus), 404);
        assert_eq!(of(Refusal::Ambiguous(vec![])), 409);
        assert_eq!(of(Refusal::Timeout(Duration::ZERO)), 504);
        let mismatch = instance::Error::VersionMismatch { expected: 1, actual: 2 };
        assert_eq!(Problem::from(mismatch).status().as_u16(), 412);
    }

    #[test]
    fn a_fault_of_ours_keeps_its_text_to_itself() {
        let body = json(&Problem::from(store::Error::Corrupt(String::from("page 7 of /secret/path"))));
        assert_eq!(body["status"], 500);
        assert!(!body.to_string().contains("secret"));
    }
}
