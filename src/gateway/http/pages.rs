//! What anybody may see: health, the start page, the API document and its browser; and, for operators, the metrics.
//!
//! Tests: `tests/it/http.rs`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use actix_web::{
    HttpResponse,
    http::{
        StatusCode,
        header::{self, HeaderValue},
    },
};
use bytes::Bytes;
use serde_json::json;
use tokio::time::Instant;

use super::{
    Shared,
    problem::{Problem, Refusal},
    respond,
};
use crate::types::Fault;

/// For how long an answer of the readiness check is passed on to others who ask.
const FRESH: Duration = Duration::from_secs(1);
/// Longest probe of the store.
const PROBE: Duration = Duration::from_secs(2);

/// The outcome of the last readiness check. One check runs at a time, however many ask.
pub type Readiness = tokio::sync::Mutex<Option<(Instant, Result<(), (&'static str, String)>)>>;

/// `GET /health/live`.
pub fn live() -> HttpResponse {
    respond(StatusCode::OK, Bytes::from_static(b"{\"status\":\"live\"}"))
}

/// `GET /health/ready`: the store takes a write, every other check of the node is well, and the node does not drain.
///
/// # Errors
/// [`Problem`] with what failed.
pub async fn ready(shared: &Shared) -> Result<HttpResponse, Problem> {
    if shared.drain.is_leaving() {
        return Err(Refusal::Draining.into());
    }
    let mut last = shared.readiness.lock().await;
    let outcome = match &*last {
        Some((at, outcome)) if at.elapsed() < FRESH => outcome.clone(),
        _ => {
            let outcome = check(shared).await;
            *last = Some((Instant::now(), outcome.clone()));
            outcome
        }
    };
    drop(last);
    let (mut checks, mut failed) = (serde_json::Map::new(), None);
    for check in shared.checks.iter().filter(|check| !check.needed) {
        checks.insert(check.name.to_owned(), (check.probe)().map_or_else(|why| json!(why), |()| json!("ok")));
    }
    let needed = shared.checks.iter().filter(|check| check.needed).map(|check| check.name);
    for name in std::iter::once("store").chain(needed) {
        if let Err((at, why)) = &outcome
            && *at == name
        {
            failed = Some(name);
            checks.insert(name.to_owned(), json!(why));
            break;
        }
        checks.insert(name.to_owned(), json!("ok"));
    }
    match failed {
        None => Ok(respond(StatusCode::OK, json!({"status": "ready", "checks": checks}).to_string())),
        Some(name) => Err(Problem::from(Refusal::NotReady(name.to_owned())).with_checks(checks.into())),
    }
}

async fn check(shared: &Shared) -> Result<(), (&'static str, String)> {
    let probe = tokio::time::timeout(PROBE * 2, shared.router.store().probe(PROBE)).await;
    match probe {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(("store", format!("{}: {error}", error.code()))),
        Err(_) => return Err(("store", format!("no answer within {:?}", PROBE * 2))),
    }
    for check in shared.checks.iter().filter(|check| check.needed) {
        (check.probe)().map_err(|why| (check.name, why))?;
    }
    Ok(())
}

/// `GET /metrics`.
pub fn metrics(shared: &Shared) -> HttpResponse {
    let mut response = respond(StatusCode::OK, (shared.metrics)());
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// `GET /openapi.json`.
pub fn openapi(shared: &Shared) -> HttpResponse {
    respond(StatusCode::OK, shared.openapi.clone())
}

/// The start page of a node that listens there; its commands can be copied as they stand.
pub fn start_page(address: SocketAddr) -> String {
    let host = if address.ip().is_unspecified() { String::from("localhost") } else { address.ip().to_string() };
    let host = if address.is_ipv6() && !address.ip().is_unspecified() { format!("[{host}]") } else { host };
    include_str!("start.html").replace("localhost:8080", &format!("{host}:{}", address.port()))
}

/// `GET /`.
pub fn start(shared: &Shared) -> HttpResponse {
    page("text/html; charset=utf-8", shared.start.clone(), "default-src 'none'; style-src 'unsafe-inline'")
}

/// `GET /docs` and everything below: the API document, browsable. All files are in the binary.
///
/// # Errors
/// [`Problem`] for a file that is not there.
pub fn docs(shared: &Shared, rest: &str) -> Result<HttpResponse, Problem> {
    if rest.is_empty() {
        let mut response = HttpResponse::with_body(StatusCode::PERMANENT_REDIRECT, actix_web::body::BoxBody::new(()));
        response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/docs/"));
        return Ok(response);
    }
    let file = utoipa_swagger_ui::serve(rest.trim_start_matches('/'), Arc::clone(&shared.docs));
    let file = file.ok().flatten().ok_or(Refusal::Path)?;
    // The browser of the document styles its parts inline; scripts come from this node alone.
    let policy = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:";
    let mut response = page(&file.content_type, file.bytes.into_owned(), policy);
    if file.gzpipped {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

fn page(kind: &str, body: impl Into<Bytes>, policy: &'static str) -> HttpResponse {
    let mut response = respond(StatusCode::OK, body);
    let headers = response.headers_mut();
    let kind = HeaderValue::from_str(kind).unwrap_or(HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
