//! Whether a request may come in, cheapest question first: drain, credentials, rights, declared size, type, then the body.
//!
//! Owns: reading credentials and headers, and collecting a body within its limits. Not here: what the body says (`wire.rs`).
//! Invariants: nothing is buffered beyond the body limit, or for longer than twice the time a request's head may take.

use std::{net::IpAddr, sync::Arc, time::Duration};

use actix_web::{
    HttpRequest,
    error::PayloadError,
    http::header::{self, HeaderMap, HeaderName},
    web::Payload,
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;

use super::problem::Refusal;
use crate::{
    config,
    gateway::auth::{Authenticator, Pass},
    types::{AuthContext, InstanceId, Scope},
};

/// Who asks, and for how long.
///
/// # Errors
/// [`Refusal::NoCredentials`], [`Refusal::BadCredentials`], or [`Refusal::Foreign`] when a page of another site asks
/// through the browser of somebody on this machine.
pub fn identify(auth: &Authenticator, request: &HttpRequest) -> Result<Arc<Pass>, Refusal> {
    let headers = request.headers();
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let token = value.to_str().ok().and_then(bearer).ok_or(Refusal::BadCredentials)?;
        // Without configured tokens no token is right, but a client that always sends one still works on loopback.
        if auth.has_tokens() {
            return auth.authenticate(token).ok_or(Refusal::BadCredentials);
        }
    }
    let peer = request.peer_addr().map(|peer| peer.ip()).ok_or(Refusal::NoCredentials)?;
    let pass = auth.anonymous(peer).ok_or(Refusal::NoCredentials)?;
    for name in [header::HOST, header::ORIGIN] {
        if let Some(value) = headers.get(&name) {
            let text = value.to_str().unwrap_or("?");
            if !is_local(text) {
                return Err(Refusal::Foreign(text.chars().take(100).collect()));
            }
        }
    }
    Ok(pass)
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

/// Whether a `Host` or `Origin` names this machine. Without a token, loopback alone vouches for the caller; a browser would
/// lend that to any page it shows, so pages must come from this machine too.
fn is_local(text: &str) -> bool {
    let authority = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).unwrap_or(text);
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.to_ascii_lowercase().ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Whether the caller has a right at all.
///
/// # Errors
/// [`Refusal::Scope`].
pub fn permit(who: &AuthContext, scope: Scope) -> Result<(), Refusal> {
    let name = match scope {
        Scope::Read => "read",
        Scope::Write => "write",
        Scope::Admin => "admin",
    };
    if who.has(scope) { Ok(()) } else { Err(Refusal::Scope(name)) }
}

/// Whether the caller may touch an instance.
///
/// # Errors
/// [`Refusal::Elsewhere`], whether or not the instance exists.
pub fn within(who: &AuthContext, instance: &InstanceId) -> Result<(), Refusal> {
    if who.instance.as_ref().is_none_or(|own| own == instance) { Ok(()) } else { Err(Refusal::Elsewhere) }
}

/// Checks that the body is JSON by its declared type. `patch` also takes `application/merge-patch+json`.
///
/// # Errors
/// [`Refusal::MediaType`] or [`Refusal::ContentEncoding`].
pub fn json_type(headers: &HeaderMap, patch: bool) -> Result<(), Refusal> {
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(Refusal::ContentEncoding);
    }
    let declared = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let essence = declared.split(';').next().unwrap_or("").trim();
    let fits = essence.eq_ignore_ascii_case("application/json")
        || (patch && essence.eq_ignore_ascii_case("application/merge-patch+json"));
    match (fits, patch) {
        (true, _) => Ok(()),
        (false, true) => Err(Refusal::MediaType("application/merge-patch+json or application/json")),
        (false, false) => Err(Refusal::MediaType("application/json")),
    }
}

/// Collects a body within the configured size. The usual small body arrives whole and is not copied.
///
/// # Errors
/// [`Refusal::TooLarge`] (before anything is read, when the length is declared), [`Refusal::SlowBody`],
/// [`Refusal::BrokenBody`].
pub async fn body(headers: &HeaderMap, payload: Payload, config: &config::Http) -> Result<Bytes, Refusal> {
    let limit = config.max_body_kb.saturating_mul(1024);
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(Refusal::TooLarge(limit));
    }
    let wait = Duration::from_secs(config.header_seconds.saturating_mul(2));
    match tokio::time::timeout(wait, collect(payload, limit)).await {
        Ok(collected) => collected,
        Err(_) => Err(Refusal::SlowBody(wait)),
    }
}

async fn collect(mut payload: Payload, limit: usize) -> Result<Bytes, Refusal> {
    let broken = |error: PayloadError| Refusal::BrokenBody(error.to_string());
    let Some(first) = payload.next().await.transpose().map_err(broken)? else { return Ok(Bytes::new()) };
    if first.len() > limit {
        return Err(Refusal::TooLarge(limit));
    }
    let Some(second) = payload.next().await.transpose().map_err(broken)? else { return Ok(first) };
    let mut whole = BytesMut::with_capacity((first.len() + second.len()).saturating_mul(2).min(limit));
    whole.extend_from_slice(&first);
    let mut next = Some(second);
    while let Some(chunk) = next {
        if whole.len() + chunk.len() > limit {
            return Err(Refusal::TooLarge(limit));
        }
        whole.extend_from_slice(&chunk);
        next = payload.next().await.transpose().map_err(broken)?;
    }
    Ok(whole.freeze())
}

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// A W3C `traceparent`, when it is well formed; anything else is as good as none.
pub fn traceparent(headers: &HeaderMap) -> Option<String> {
    let text = headers.get(TRACEPARENT)?.to_str().ok()?;
    let mut parts = text.split('-');
    let mut hex = |length: usize| {
        let part = parts.next()?;
        let good = part.len() == length && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        good.then_some(part)
    };
    let (version, trace, span, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    let zero = |part: &str| part.bytes().all(|byte| byte == b'0');
    let sound = version != "ff" && !zero(trace) && !zero(span) && (text.len() == 55 || version != "00");
    (sound && text.len() <= 128).then(|| text.to_owned())
}

/// Whether the caller asks for a stream of events.
pub fn wants_events(headers: &HeaderMap) -> bool {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.split(',').any(|one| one.trim().starts_with("text/event-stream")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_web::http::header::HeaderValue;

    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn only_this_machine_is_local() {
        for local in
            ["localhost", "LOCALHOST:8080", "app.localhost", "127.0.0.1:80", "[::1]:80", "http://localhost:3000"]
        {
            assert!(is_local(local), "{local}");
        }
        for foreign in ["evil.example", "localhost.evil.example", "10.0.0.1:80", "null", "", "http://evil.example"] {
            assert!(!is_local(foreign), "{foreign}");
        }
    }

    #[test]
    fn a_body_is_json_by_name() {
        for good in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(json_type(&headers("content-type", good), false).is_ok());
        }
        for bad in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""] {
            assert!(json_type(&headers("content-type", bad), true).is_err(), "{bad}");
        }
        let patch = headers("content-type", "application/merge-patch+json");
        assert!(json_type(&patch, true).is_ok() && json_type(&patch, false).is_err());
        let mut packed = headers("content-type", "application/json");
        packed.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        assert_eq!(json_type(&packed, false), Err(Refusal::ContentEncoding));
    }

    #[test]
    fn a_traceparent_is_taken_when_it_is_one() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(traceparent(&headers("traceparent", good)).unwrap(), good);
        for bad in [
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
        ] {
            assert_eq!(traceparent(&headers("traceparent", bad)), None, "{bad}");
        }
    }

    #[test]
    fn events_are_sent_to_those_who_ask() {
        assert!(wants_events(&headers("accept", "application/json, text/event-stream;q=0.9")));
        assert!(!wants_events(&headers("accept", "*/*")));
    }
}
