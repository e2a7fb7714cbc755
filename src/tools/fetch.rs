//! `http_fetch`: asks an allowed web host, and no address that is not public unless that was allowed, too.
//!
//! Invariants: host and port stand in the list; the name is looked up once, and the connection goes to an address that was
//! checked, whatever the name leads to a moment later; redirects are followed here, each checked like the first address;
//! no proxy; size and time are bounded. Tests: at the foot; `tests/it/tools.rs`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use reqwest::{Method, StatusCode, Url, header, redirect};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{address::is_public, built_in::arguments, cut};
use crate::{
    config::tools::Fetching,
    scaling::pool::{Limits, Places},
    types::{RawJson, ToolSpec, host},
};

/// Its name.
pub(super) const NAME: &str = "http_fetch";
/// Most redirects followed.
const MAX_REDIRECTS: usize = 5;
/// Longest address taken, in bytes.
const MAX_URL_BYTES: usize = 4096;
/// Largest body sent, in bytes.
const MAX_SENT_BYTES: usize = 256 * 1024;

/// Port: looks names up.
#[async_trait]
pub trait Names: Send + Sync + 'static {
    /// The addresses of a host.
    ///
    /// # Errors
    /// What the system says.
    async fn find(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>>;
}

struct System;

#[async_trait]
impl Names for System {
    async fn find(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        Ok(tokio::net::lookup_host((host, port)).await?.collect())
    }
}

/// Fetches.
pub struct Fetch {
    settings: Fetching,
    names: Arc<dyn Names>,
    at_once: Arc<Places>,
    most: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    url: String,
    #[serde(default)]
    method: Option<String>,
    #[serde(default)]
    body: Option<Value>,
}

impl Fetch {
    /// One that keeps to the settings; a result has at most so many bytes.
    pub fn new(settings: Fetching, most: usize) -> Self {
        Self::with_names(settings, most, Arc::new(System))
    }

    /// The same, with names looked up by someone else.
    pub fn with_names(settings: Fetching, most: usize, names: Arc<dyn Names>) -> Self {
        Self { at_once: Places::new("tools/http_fetch", Self::limits(&settings)), settings, names, most }
    }

    /// Waits are judged by how long a fetch may take.
    fn limits(settings: &Fetching) -> Limits {
        let wait = Duration::from_secs(settings.seconds);
        Limits { size: settings.max_concurrent, overflow: 0, wait, ..Limits::default() }
    }

    /// Fetches at once.
    pub(super) const fn places(&self) -> &Arc<Places> {
        &self.at_once
    }

    /// As many at once as the settings say.
    pub(super) fn resize(&self, settings: &Fetching) {
        self.at_once.resize(Self::limits(settings));
    }

    pub(super) fn spec(&self) -> ToolSpec {
        let methods: &[&str] = if self.settings.post { &["GET", "POST"] } else { &["GET"] };
        let mut properties = json!({"url": {"type": "string"}, "method": {"type": "string", "enum": methods}});
        if self.settings.post {
            properties["body"] = json!({"description": "JSON to post"});
        }
        let hosts = self.settings.allow.join(", ");
        ToolSpec {
            name: String::from(NAME),
            description: format!("Fetches a web page. Allowed hosts: {}.", cut(hosts, 1024)),
            parameters: RawJson::of(&json!({
                "type": "object", "properties": properties, "required": ["url"], "additionalProperties": false,
            })),
            // A GET has no effect; what a POST does, nobody knows.
            repeatable: !self.settings.post,
        }
    }

    /// Fetches. `key` is the same for every try of the call, for the receiver of a POST to recognise a repeat.
    ///
    /// # Errors
    /// In words, why there is nothing.
    pub async fn run(&self, given: &Map<String, Value>, key: &str) -> Result<String, String> {
        let asked: Asked = arguments(given)?;
        let method = match asked.method.as_deref() {
            None | Some("GET") => Method::GET,
            Some("POST") if self.settings.post => Method::POST,
            Some(_) => return Err(String::from("this method is not allowed")),
        };
        let body = match (&method, asked.body) {
            (&Method::GET, Some(_)) => return Err(String::from("wrong arguments: a body needs the method POST")),
            (_, body) => body.map(|body| body.to_string()),
        };
        if body.as_ref().is_some_and(|body| body.len() > MAX_SENT_BYTES) {
            return Err(format!("wrong arguments: a body has at most {MAX_SENT_BYTES} bytes"));
        }
        let limit = Duration::from_secs(self.settings.seconds);
        let fetch = async {
            let _place = self.at_once.take().await.map_err(|refused| refused.to_string())?;
            self.follow(asked.url, &method, body, key).await
        };
        tokio::time::timeout(limit, fetch).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }

    async fn follow(&self, url: String, method: &Method, body: Option<String>, key: &str) -> Result<String, String> {
        let mut url = self.check(&url)?;
        for _ in 0..=MAX_REDIRECTS {
            let answer = self.ask(&url, method, body.as_deref(), key).await?;
            let to = answer.headers().get(header::LOCATION).and_then(|to| to.to_str().ok());
            match to.filter(|_| is_redirect(answer.status()) && *method == Method::GET) {
                Some(to) => {
                    let next = url.join(to).map_err(|error| format!("it leads to a wrong address: {error}"))?;
                    url = self.check(next.as_str()).map_err(|reason| format!("it leads elsewhere: {reason}"))?;
                }
                None => return self.read(&url, answer).await,
            }
        }
        Err(format!("more than {MAX_REDIRECTS} redirects"))
    }

    /// Whether and how an address may be asked.
    pub(super) fn check(&self, url: &str) -> Result<Url, String> {
        if url.len() > MAX_URL_BYTES {
            return Err(format!("an address has at most {MAX_URL_BYTES} bytes"));
        }
        let url = Url::parse(url).map_err(|error| format!("the address is wrong: {error}"))?;
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return Err(String::from("the address names no host"));
        };
        if !matches!(url.scheme(), "http" | "https") {
            return Err(String::from("an address begins with http:// or https://"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(String::from("an address must not carry credentials"));
        }
        if !self.settings.allow.iter().any(|entry| host::covers(entry, host, url.port(), port)) {
            return Err(format!("{host}:{port} is not an allowed host"));
        }
        Ok(url)
    }

    /// The addresses a host may be asked at.
    pub(super) async fn addresses(&self, url: &Url) -> Result<(String, Vec<SocketAddr>), String> {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(0);
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let found = match literal {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => self.names.find(host, port).await.map_err(|error| format!("{host} is not found: {error}"))?,
        };
        let may = |address: &SocketAddr| self.settings.private || is_public(address.ip());
        let may: Vec<SocketAddr> = found.into_iter().filter(may).collect();
        if may.is_empty() {
            return Err(format!("{host} has no address of the public internet"));
        }
        Ok((host.to_owned(), may))
    }

    async fn ask(
        &self,
        url: &Url,
        method: &Method,
        body: Option<&str>,
        key: &str,
    ) -> Result<reqwest::Response, String> {
        let (host, addresses) = self.addresses(url).await?;
        // A client for each call: the addresses that were checked are the only ones it knows.
        let client = reqwest::Client::builder()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .resolve_to_addrs(&host, &addresses)
            .pool_max_idle_per_host(0)
            .user_agent(concat!("sophont/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| error.to_string())?;
        let mut request = client.request(method.clone(), url.clone());
        if *method == Method::POST {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = body {
            request = request.header(header::CONTENT_TYPE, "application/json").body(body.to_owned());
        }
        request.send().await.map_err(|error| format!("no answer: {}", error.without_url()))
    }

    async fn read(&self, url: &Url, mut answer: reqwest::Response) -> Result<String, String> {
        let most = self.settings.max_kb * 1024;
        let mut bytes = Vec::new();
        let mut whole = true;
        while let Some(piece) =
            answer.chunk().await.map_err(|error| format!("it broke off: {}", error.without_url()))?
        {
            let room = most.saturating_sub(bytes.len());
            bytes.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.len() > room {
                whole = false;
                break;
            }
        }
        let kind = answer.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        let kind = kind.unwrap_or_default().chars().take(200).collect::<String>();
        let text = text_of(bytes, whole);
        // Its frame and what JSON escapes need room, too.
        let room = self.most.saturating_sub(1024 + url.as_str().len()) / 2;
        let fits = text.len() <= room;
        let shown = json!({
            "url": url.as_str(), "status": answer.status().as_u16(), "content_type": kind,
            "body": cut(text, room), "whole": whole && fits,
        });
        Ok(shown.to_string())
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The text of a body; one that was cut may end within a character.
fn text_of(bytes: Vec<u8>, whole: bool) -> String {
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) if !whole && error.utf8_error().error_len().is_none() => {
            let end = error.utf8_error().valid_up_to();
            let mut bytes = error.into_bytes();
            bytes.truncate(end);
            String::from_utf8(bytes).unwrap_or_default()
        }
        Err(error) => format!("[{} bytes that are no text]", error.as_bytes().len()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn settings(allow: &[&str]) -> Fetching {
        let allow = allow.iter().map(|host| (*host).to_owned()).collect();
        Fetching { allow, private: false, post: false, seconds: 5, max_kb: 4, max_concurrent: 2 }
    }

    /// Leads each name to one address.
    struct All(&'static str);

    #[async_trait]
    impl Names for All {
        async fn find(&self, _: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
            Ok(vec![SocketAddr::new(self.0.parse().unwrap(), port)])
        }
    }

    async fn run(fetch: &Fetch, arguments: Value) -> Result<String, String> {
        let Value::Object(arguments) = arguments else { panic!("an object") };
        fetch.run(&arguments, "s.1").await
    }

    #[tokio::test]
    async fn what_is_not_allowed_is_not_asked() {
        let listed = ["example.org", "127.0.0.1:1", "[::1]:1", "inside.example:1"];
        let fetch = Fetch::with_names(settings(&listed), 65_536, Arc::new(All("10.0.0.1")));
        for (arguments, reason) in [
            (json!({"url": "http://evil.example/"}), "not an allowed host"),
            (json!({"url": "https://example.org:8443/"}), "not an allowed host"),
            (json!({"url": "http://example.org@evil.example/"}), "credentials"),
            (json!({"url": "ftp://example.org/"}), "begins with http://"),
            (json!({"url": "file:///etc/passwd"}), "no host"),
            (json!({"url": "nonsense"}), "address is wrong"),
            (json!({"url": "http://127.0.0.1:1/"}), "no address of the public internet"),
            (json!({"url": "http://0x7f.1:1/"}), "no address of the public internet"),
            (json!({"url": "http://[::1]:1/"}), "no address of the public internet"),
            (json!({"url": "http://inside.example:1/"}), "no address of the public internet"),
            (json!({"url": "http://example.org/", "method": "POST"}), "not allowed"),
            (json!({"url": "http://example.org/", "body": {}}), "needs the method POST"),
            (json!({"url": "http://example.org/", "headers": {}}), "unknown field `headers`"),
            (json!({"url": format!("http://example.org/{}", "x".repeat(MAX_URL_BYTES))}), "at most 4096 bytes"),
        ] {
            let refused = run(&fetch, arguments.clone()).await.unwrap_err();
            assert!(refused.contains(reason), "{arguments}: {refused}");
        }
        assert!(!fetch.spec().parameters.get().contains("POST") && fetch.spec().repeatable);
    }

    /// Leads every name to these in turn, and after the last nowhere.
    struct InTurn(std::sync::Mutex<Vec<Vec<&'static str>>>);

    #[async_trait]
    impl Names for InTurn {
        async fn find(&self, _: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
            let next = self.0.lock().unwrap().pop().ok_or_else(|| io::Error::other("nowhere"))?;
            Ok(next.into_iter().map(|text| SocketAddr::new(text.parse().unwrap(), port)).collect())
        }
    }

    /// As for each redirect: what a name led to before says nothing about where it leads now.
    #[tokio::test]
    async fn each_look_up_is_judged_anew_and_only_public_addresses_are_left() {
        let then = vec![vec!["::ffff:10.0.0.1", "169.254.169.254"], vec!["10.0.0.1", "8.8.8.8", "::1"]];
        let fetch = Fetch::with_names(settings(&["good.example"]), 65_536, Arc::new(InTurn(then.into())));
        let url = fetch.check("http://good.example/").unwrap();
        assert_eq!(fetch.addresses(&url).await.unwrap().1, ["8.8.8.8:80".parse().unwrap()]);
        let refused = fetch.addresses(&url).await.unwrap_err();
        assert!(refused.contains("no address of the public internet"), "{refused}");
        assert!(fetch.addresses(&url).await.unwrap_err().contains("nowhere"));
    }

    #[test]
    fn bytes_become_text_or_a_word_about_them() {
        assert_eq!(text_of("é".into(), true), "é");
        assert_eq!(text_of(vec![b'a', 0xc3], false), "a");
        assert_eq!(text_of(vec![b'a', 0xc3], true), "[2 bytes that are no text]");
        assert_eq!(text_of(vec![0xff, b'a'], false), "[2 bytes that are no text]");
    }

    proptest::proptest! {
        /// No address a model makes up gets past the list.
        #[test]
        fn no_address_gets_past_the_list(text in "(http|https)://[a-z@.:/\\\\#?%0-9]{0,40}") {
            let fetch = Fetch::with_names(settings(&["good.example"]), 65_536, Arc::new(All("8.8.8.8")));
            if let Ok(url) = fetch.check(&text) {
                proptest::prop_assert_eq!(url.host_str(), Some("good.example"));
            }
        }
    }
}
