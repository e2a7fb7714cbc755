//! The HTTP door seen from outside: where it is, the token, and what it answers.
//!
//! Not here: what the answers mean (`chat`, `inspect`). Tests: at the foot; `tests/it/cli.rs` against a real node.

use std::time::Duration;

use clap::Args;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;

use super::Failure;
use crate::types::InstanceId;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest silence on an open connection; streams carry signs of life more often.
const SILENCE: Duration = Duration::from_secs(60);
/// The variable that is read when none is named.
const USUAL_TOKEN: &str = "SOPHONT_TOKEN";

/// Which node, and who asks.
#[derive(Debug, Clone, Args)]
pub struct DoorArgs {
    /// Address of the node's HTTP door.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080", env = "SOPHONT_URL")]
    pub url: String,
    /// Environment variable that holds the token; `SOPHONT_TOKEN` is used when it is set and none is named.
    #[arg(long, value_name = "VAR")]
    pub token_env: Option<String>,
}

/// Why the door gave nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody there, or the connection broke.
    #[error("no answer from {url}: {reason}")]
    Unreachable {
        /// The door.
        url: String,
        /// Why.
        reason: String,
    },
    /// A refusal, as a problem document.
    #[error("{detail} ({code})")]
    Refused {
        /// Status.
        status: StatusCode,
        /// Stable code.
        code: String,
        /// What is wrong.
        detail: String,
        /// What to do.
        hint: Option<String>,
        /// When to come again, for refusals that may be repeated.
        retry_after: Option<Duration>,
    },
    /// Something that is no answer of this API.
    #[error("{url} does not answer like a Sophont node: {reason}")]
    Strange {
        /// The door.
        url: String,
        /// What came.
        reason: String,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let hint = match &error {
            Error::Unreachable { .. } => Some(String::from("start a node with `sophont`, or name another with --url")),
            // The node's own hint is for those who write requests.
            Error::Refused { status, .. } if *status == StatusCode::UNAUTHORIZED => {
                Some(format!("put the token into a variable and name it with --token-env, or use {USUAL_TOKEN}"))
            }
            Error::Refused { hint, .. } => hint.clone(),
            Error::Strange { .. } => Some(String::from("check --url")),
        };
        Failure { hint, ..Failure::new(error.to_string()) }
    }
}

/// A client of one node's HTTP door.
#[derive(Debug)]
pub struct Door {
    client: reqwest::Client,
    base: Url,
    token: Option<SecretString>,
}

/// Reads an instance's id from the command line.
///
/// # Errors
/// What is wrong with it, as wrong usage.
pub fn instance(text: &str) -> Result<InstanceId, Failure> {
    InstanceId::new(text)
        .map_err(|error| Failure { code: super::failure::USAGE, ..Failure::new(format!("'{text}': {error}")) })
}

/// A runtime for a command that talks to a door: one thread is plenty.
///
/// # Errors
/// The system has no threads or descriptors left.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.map_err(|error| Failure::new(format!("cannot start: {error}")))
}

impl Door {
    /// Prepares the client; nothing is sent yet.
    ///
    /// # Errors
    /// A URL that is none, a variable that is not set.
    pub fn new(args: &DoorArgs) -> Result<Self, Failure> {
        let base = parse_url(&args.url)?;
        let read = |name: &str| std::env::var(name).ok().filter(|token| !token.is_empty());
        let token = match &args.token_env {
            Some(name) => {
                let missing = || Failure::new(format!("the environment variable {name} is not set"));
                Some(read(name).ok_or_else(missing)?)
            }
            None => read(USUAL_TOKEN),
        };
        Self::with_token(base, token.map(SecretString::from))
    }

    /// As [`Door::new`], for an address that is known to be one.
    ///
    /// # Errors
    /// A client cannot be made.
    pub fn with_token(base: Url, token: Option<SecretString>) -> Result<Self, Failure> {
        let mut client = reqwest::Client::builder().connect_timeout(CONNECT).read_timeout(SILENCE);
        if is_this_machine(&base) {
            // A proxy that is configured for the rest of the world does not lead here.
            client = client.no_proxy();
        }
        let client = client.build().map_err(|error| Failure::new(chain(&error)))?;
        Ok(Self { client, base, token })
    }

    /// The door's address.
    pub fn url(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// A request to a path below `/`, with the token.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}/{path}", self.url()));
        match &self.token {
            Some(token) => request.bearer_auth(token.expose_secret()),
            None => request,
        }
    }

    /// Sends a request; an answer that is no success is an error.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let answer = request.send().await.map_err(|error| self.unreachable(&error))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let retry_after = answer.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        let text = answer.text().await.unwrap_or_default();
        Err(self.refusal(status, retry_after.map(Duration::from_secs), &text))
    }

    /// GETs JSON.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn get(&self, path: &str) -> Result<Value, Error> {
        self.json(self.send(self.request(Method::GET, path)).await?).await
    }

    /// POSTs nothing, and reads JSON.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn post(&self, path: &str) -> Result<Value, Error> {
        self.json(self.send(self.request(Method::POST, path)).await?).await
    }

    async fn json(&self, answer: Response) -> Result<Value, Error> {
        let text = answer.text().await.map_err(|error| self.unreachable(&error))?;
        serde_json::from_str(&text).map_err(|error| self.strange(error.to_string()))
    }

    /// The error of a connection that failed.
    pub fn unreachable(&self, error: &reqwest::Error) -> Error {
        Error::Unreachable { url: self.url().to_owned(), reason: chain(error) }
    }

    /// The error of an answer that makes no sense.
    pub fn strange(&self, reason: String) -> Error {
        Error::Strange { url: self.url().to_owned(), reason }
    }

    /// A problem document, from an answer or a stream.
    pub fn refusal(&self, status: StatusCode, retry_after: Option<Duration>, text: &str) -> Error {
        let Ok(problem @ Value::Object(_)) = serde_json::from_str::<Value>(text) else {
            return self.strange(format!("status {status}"));
        };
        let field = |name: &str| problem[name].as_str().map(super::out::plain);
        let code = field("code").unwrap_or_else(|| status.to_string());
        let detail = field("detail").or_else(|| field("title")).unwrap_or_else(|| status.to_string());
        Error::Refused { status, code, detail, hint: field("hint"), retry_after }
    }
}

fn parse_url(text: &str) -> Result<Url, Failure> {
    let hint = "the form is http://HOST:PORT";
    let url = Url::parse(text).map_err(|error| Failure::new(format!("'{text}' is no URL: {error}")).hint(hint))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(Failure::new(format!("'{text}' is no HTTP address")).hint(hint));
    }
    Ok(url)
}

fn is_this_machine(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// An error with its causes; the URL, which reqwest repeats in each, is told once by our own.
fn chain(error: &reqwest::Error) -> String {
    let mut source = std::error::Error::source(error);
    let mut last = None;
    while let Some(cause) = source {
        last = Some(cause.to_string());
        source = cause.source();
    }
    match last {
        Some(cause) if error.is_timeout() => format!("timed out: {cause}"),
        Some(cause) => cause,
        None => error.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn door() -> Door {
        Door::new(&DoorArgs { url: String::from("http://127.0.0.1:1/"), token_env: None }).unwrap()
    }

    #[test]
    fn an_address_is_checked() {
        assert_eq!(door().url(), "http://127.0.0.1:1");
        for bad in ["127.0.0.1:8080", "ftp://x", "", "mqtt://127.0.0.1:1883"] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
        assert!(is_this_machine(&parse_url("http://[::1]:8080").unwrap()));
        assert!(!is_this_machine(&parse_url("http://10.0.0.1").unwrap()));
    }

    #[test]
    fn a_refusal_keeps_code_detail_and_hint() {
        let text = r#"{"title":"t","status":429,"code":"RATE_LIMITED","detail":"too many","hint":"wait"}"#;
        let failure = Failure::from(door().refusal(StatusCode::TOO_MANY_REQUESTS, None, text));
        assert_eq!(failure.message, "too many (RATE_LIMITED)");
        assert_eq!(failure.hint.as_deref(), Some("wait"));
        assert!(matches!(door().refusal(StatusCode::BAD_GATEWAY, None, "<html>"), Error::Strange { .. }));
    }

    #[test]
    fn an_unset_variable_is_told() {
        let args =
            DoorArgs { url: String::from("http://127.0.0.1:1"), token_env: Some(String::from("NOT_SET_AT_ALL")) };
        assert!(Door::new(&args).unwrap_err().message.contains("NOT_SET_AT_ALL"));
    }
}
