//! Calling web hosts: only those the operator allowed, without following them elsewhere, each call with a deadline.
//!
//! Not here: when to call again (`courier`). Invariant: with an empty list nobody is called.
//! Tests: at the foot; `tests/it/delivery.rs` against a real server.

use std::time::Duration;

use reqwest::{StatusCode, Url, header, redirect};

use super::Error;
use crate::types::{RawJson, host};

/// Longest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(5 * 60);

/// Why an effect was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// It may be taken later.
    Later {
        /// Why.
        reason: String,
        /// Not before this, when the target says so.
        after: Option<Duration>,
    },
    /// It never will be.
    Never(String),
}

impl Failure {
    /// A failure that may pass, without a time of its own.
    pub(super) fn later(reason: impl Into<String>) -> Self {
        Self::Later { reason: reason.into(), after: None }
    }
}

/// `host:port` of a web address, in lower case, the scheme's port filled in; empty when it is none.
pub(super) fn host_of(url: &str) -> String {
    Url::parse(url).ok().and_then(|url| target_of(&url)).unwrap_or_default()
}

fn target_of(url: &Url) -> Option<String> {
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    Some(format!("{}:{}", url.host_str()?.to_ascii_lowercase(), url.port_or_known_default()?))
}

/// Whether an entry of the allow-list covers a target.
fn covers(entry: &str, url: &Url) -> bool {
    let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else { return false };
    host::covers(entry, host, url.port(), port)
}

/// Whether and how an address may be called.
///
/// # Errors
/// A sentence that says what is wrong and what would help.
fn check(url: &str, allow: &[String]) -> Result<Url, String> {
    let url = Url::parse(url).map_err(|error| format!("the webhook's address is wrong: {error}"))?;
    let Some(target) = target_of(&url) else {
        return Err(format!("a webhook's address begins with http:// or https://, not {}:", url.scheme()));
    };
    if allow.iter().any(|entry| covers(entry, &url)) {
        Ok(url)
    } else {
        Err(format!("{target} is not in delivery.webhook_allow"))
    }
}

/// What an answer means.
fn judge(status: StatusCode, retry_after: Option<&str>) -> Result<(), Failure> {
    if status.is_success() {
        return Ok(());
    }
    let reason = format!("answered {status}");
    let passing = status.is_server_error()
        || matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS | StatusCode::LOCKED
        );
    if !passing {
        return Err(Failure::Never(reason));
    }
    let after = retry_after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    Err(Failure::Later { reason, after: after.map(|after| after.min(LONGEST_RETRY_AFTER)) })
}

/// The client for webhooks. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Webhooks {
    client: reqwest::Client,
    allow: std::sync::Arc<[String]>,
}

impl Webhooks {
    /// A client that may call the hosts of the list.
    ///
    /// # Errors
    /// [`Error::Client`] when TLS cannot be set up.
    pub(super) fn new(allow: &[String], deadline: Duration) -> Result<Self, Error> {
        let client = reqwest::Client::builder()
            .timeout(deadline)
            .connect_timeout(deadline.min(Duration::from_secs(10)))
            .redirect(redirect::Policy::none())
            .pool_max_idle_per_host(4)
            .user_agent(concat!("sophont/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Error::Client(error.to_string()))?;
        Ok(Self { client, allow: allow.into() })
    }

    /// Posts a body. `effect` is the key by which the receiver recognises a repeat.
    pub(super) async fn post(&self, url: &str, body: &RawJson, effect: &str) -> Result<(), Failure> {
        let url = check(url, &self.allow).map_err(Failure::Never)?;
        let answer = self
            .client
            .post(url)
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", effect)
            .header("sophont-effect", effect)
            .body(body.get().to_owned())
            .send()
            .await
            .map_err(|error| Failure::later(chain(&error.without_url())))?;
        let after = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        judge(answer.status(), after)
    }
}

/// An error with its causes. The address stays out: it may hold secrets.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_listed_hosts_are_called() {
        let allow = [String::from("hooks.example.org"), String::from("127.0.0.1:9000"), String::from("[::1]:8080")];
        for good in [
            "https://hooks.example.org/a?b=c",
            "http://HOOKS.example.org/",
            "https://hooks.example.org:443/",
            "http://127.0.0.1:9000/x",
            "http://[::1]:8080/",
        ] {
            assert!(check(good, &allow).is_ok(), "{good}");
        }
        for bad in [
            "https://hooks.example.org:8443/",
            "https://hooks.example.org.evil.net/",
            "https://evil.net/hooks.example.org",
            "https://hooks.example.org@evil.net/",
            "http://127.0.0.1/",
            "http://127.0.0.1:9001/",
            "ftp://hooks.example.org/",
            "file:///etc/passwd",
            "hooks.example.org",
            "",
        ] {
            assert!(check(bad, &allow).is_err(), "{bad}");
        }
        assert!(check("https://hooks.example.org/", &[]).is_err(), "closed by default");
    }

    #[test]
    fn an_answer_says_whether_to_come_again() {
        assert_eq!(judge(StatusCode::NO_CONTENT, None), Ok(()));
        for never in [StatusCode::FOUND, StatusCode::TEMPORARY_REDIRECT, StatusCode::BAD_REQUEST, StatusCode::GONE] {
            assert!(matches!(judge(never, Some("3")), Err(Failure::Never(_))), "{never}");
        }
        let after = |status, text| match judge(status, text) {
            Err(Failure::Later { after, .. }) => after,
            other => panic!("{other:?}"),
        };
        assert_eq!(after(StatusCode::BAD_GATEWAY, None), None);
        assert_eq!(after(StatusCode::TOO_MANY_REQUESTS, Some("7")), Some(Duration::from_secs(7)));
        assert_eq!(after(StatusCode::SERVICE_UNAVAILABLE, Some("99999")), Some(LONGEST_RETRY_AFTER));
        assert_eq!(after(StatusCode::SERVICE_UNAVAILABLE, Some("Wed, 21 Oct 2026 07:28:00 GMT")), None);
    }

    #[test]
    fn a_target_names_host_and_port() {
        assert_eq!(host_of("https://User:pw@Example.org/a"), "example.org:443");
        assert_eq!(host_of("nonsense"), "");
    }
}
