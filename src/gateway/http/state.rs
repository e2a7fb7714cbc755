//! The twin over HTTP: reading it at the price of a cache hit, and changing it under a version.
//!
//! Tests: of headers at the foot; `tests/it/http.rs`.

use actix_web::{
    HttpResponse,
    body::BoxBody,
    http::{
        StatusCode,
        header::{self, HeaderMap, HeaderValue},
    },
    web::Payload,
};
use serde_json::value::RawValue;

use super::{
    Caller, admission, json_body,
    problem::{Problem, Refusal},
    query::Consistency,
    respond, view, wire,
};
use crate::{
    cluster::Router,
    types::{Priority, RawJson, Source, StateSnapshot, Stimulus},
};

/// `GET /v1/instances/{id}/state`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn get(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    let router = &caller.shared.router;
    let state = match caller.query(&["consistency"])?.consistency {
        Some(Consistency::Eventual) => router.state_eventual(&key).await?,
        Some(Consistency::Strong) | None => router.state(&key).await?,
    };
    let state = state.ok_or(Refusal::NoInstance)?;
    if has_current(caller.request.headers(), state.version) {
        let mut response = HttpResponse::with_body(StatusCode::NOT_MODIFIED, BoxBody::new(()));
        response.headers_mut().insert(header::ETAG, etag(state.version));
        return Ok(response);
    }
    Ok(show(&state))
}

/// `PATCH /v1/instances/{id}/state`.
///
/// # Errors
/// [`Problem`] when the version is another, or the patch is refused.
pub async fn patch(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    let expected = expected(caller.request.headers())?;
    admission::json_type(caller.request.headers(), true)?;
    let bytes = admission::body(caller.request.headers(), payload, &caller.shared.config).await?;
    let patch: &RawValue = json_body(&bytes)?;
    let patch = RawJson::parse(patch.get()).map_err(|error| Refusal::Field(error.to_string()))?;
    let channel = wire::channel(Router::PATCH_CHANNEL)?;
    let mut stimulus = Stimulus::empty(Source::Http, channel, caller.shared.clock.now());
    if let Some(id) = caller.idempotency_key()? {
        stimulus = stimulus.with_repeatable_id(id);
    }
    stimulus.priority = Priority::Human;
    stimulus.sender = caller.who.sender().map(str::to_owned);
    stimulus.traceparent = admission::traceparent(caller.request.headers());
    stimulus.data = Some(patch);
    let state = caller.within_deadline(caller.shared.router.patch(&key, stimulus, expected)).await?;
    Ok(show(&state))
}

fn show(state: &StateSnapshot) -> HttpResponse {
    let mut response = respond(StatusCode::OK, view::state_body(state));
    response.headers_mut().insert(header::ETAG, etag(state.version));
    response
}

fn etag(version: u64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

/// Whether the caller already has this version.
fn has_current(headers: &HeaderMap, version: u64) -> bool {
    let Some(value) = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()) else { return false };
    value
        .split(',')
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"').parse() == Ok(version))
}

/// The version a change is meant for: `"7"` or `7`; none for `*`.
fn expected(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or("").trim();
    if text == "*" {
        return Ok(None);
    }
    let bare = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let bad = Refusal::Header { name: "if-match", why: "must be one version, as in the ETag of the state" };
    bare.parse().map(Some).map_err(|_| bad)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &'static str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_static(value));
        headers
    }

    #[test]
    fn a_change_names_one_version() {
        assert_eq!(expected(&HeaderMap::new()), Ok(None));
        for (text, version) in [("\"7\"", Some(7)), ("7", Some(7)), ("*", None)] {
            assert_eq!(expected(&headers(header::IF_MATCH, text)), Ok(version), "{text}");
        }
        for bad in ["W/\"7\"", "\"7\", \"8\"", "seven", "", "-1"] {
            assert!(expected(&headers(header::IF_MATCH, bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_reader_who_has_it_is_told_so() {
        for (text, has) in
            [("\"7\"", true), ("W/\"7\"", true), ("\"6\", \"7\"", true), ("*", true), ("\"8\"", false), ("x", false)]
        {
            assert_eq!(has_current(&headers(header::IF_NONE_MATCH, text), 7), has, "{text}");
        }
        assert!(!has_current(&HeaderMap::new(), 7));
    }
}
