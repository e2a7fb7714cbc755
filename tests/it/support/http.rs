//! A plain HTTP client for tests: one call a line, answers with status, headers and parsed body.

use std::{net::SocketAddr, time::Duration};

use reqwest::{Method, StatusCode, header::HeaderMap};
use serde_json::{Value, json};

use super::{PATIENCE, balancer, truth, wait_for, wait_until};

/// Longest wait for one answer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A client of one node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Http {
    client: reqwest::Client,
    address: SocketAddr,
    token: Option<String>,
}

/// An answer, read to its end.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status.
    pub status: StatusCode,
    /// Headers.
    pub headers: HeaderMap,
    /// Body as text.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// When it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {} {:?}", self.status, self.text))
    }

    /// A header's text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Checks the status and returns the JSON body.
    ///
    /// # Panics
    /// When the status is another.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { self.json() }
    }

    /// Checks that it is a problem document with this status and code, as every refusal is, and returns it.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        assert!(self.header("content-type").starts_with("application/problem+json"), "{:?}", self.headers);
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        problem
    }
}

impl Http {
    /// A client of this address. Before a balancer each request is a connection, so that it goes to another node each time.
    pub fn new(address: SocketAddr) -> Self {
        let client = reqwest::Client::builder().no_proxy().timeout(DEADLINE);
        let client = if truth::asked().nodes() > 1 { client.pool_max_idle_per_host(0) } else { client };
        Self { client: client.build().expect("an HTTP client"), address, token: None }
    }

    /// A client of each node behind the address.
    pub fn each(&self) -> Vec<Self> {
        balancer::behind(self.address).into_iter().map(|address| Self { address, ..self.clone() }).collect()
    }

    /// The same client with a bearer token.
    #[must_use]
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// A request to be finished by hand: headers, streaming bodies.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.client.request(method, self.url(path));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// When there is no whole answer: refused connection, reset, deadline.
    pub async fn try_send(request: reqwest::RequestBuilder) -> Result<Answer, reqwest::Error> {
        let answer = request.send().await?;
        let (status, headers) = (answer.status(), answer.headers().clone());
        Ok(Answer { status, headers, text: answer.text().await? })
    }

    /// As [`Http::try_send`].
    ///
    /// # Panics
    /// When there is no whole answer.
    pub async fn send(request: reqwest::RequestBuilder) -> Answer {
        Self::try_send(request).await.unwrap_or_else(|error| panic!("no answer: {error:?}"))
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Answer {
        Self::send(self.request(Method::GET, path)).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Answer {
        Self::send(self.request(Method::DELETE, path)).await
    }

    /// PUT of JSON.
    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        Self::send(self.request(Method::PUT, path).json(body)).await
    }

    /// POST of JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Self::send(self.request(Method::POST, path).json(body)).await
    }

    /// PATCH of JSON.
    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        Self::send(self.request(Method::PATCH, path).json(body)).await
    }
}

/// An answer that goes on, read as it comes.
#[derive(Debug)]
pub struct Stream {
    answer: reqwest::Response,
    seen: String,
}

impl Stream {
    /// Reads until a text was seen, and returns everything so far.
    ///
    /// # Panics
    /// When the stream ends first or the deadline passes.
    pub async fn until(&mut self, text: &str) -> &str {
        while !self.seen.contains(text) {
            let piece = tokio::time::timeout(PATIENCE, self.answer.chunk()).await;
            let piece = piece.unwrap_or_else(|_| panic!("waited for {text:?} in vain; so far {:?}", self.seen));
            let piece = piece.ok().flatten().unwrap_or_else(|| panic!("no {text:?} before the end of {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&piece));
        }
        &self.seen
    }

    /// Reads until the connection breaks.
    ///
    /// # Panics
    /// When the stream ends as if it were whole, or the deadline passes.
    pub async fn until_broken(&mut self) {
        let broken = tokio::time::timeout(PATIENCE, async {
            loop {
                match self.answer.chunk().await {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("a whole stream: {:?}", self.seen),
                    Err(_) => return,
                }
            }
        });
        broken.await.unwrap_or_else(|_| panic!("the stream goes on: {:?}", self.seen));
    }

    /// Reads the next piece, and returns everything so far.
    ///
    /// # Panics
    /// When the stream ends or the deadline passes.
    pub async fn more(&mut self) -> &str {
        let piece = tokio::time::timeout(PATIENCE, self.answer.chunk()).await;
        let piece = piece.unwrap_or_else(|_| panic!("waited for more in vain; so far {:?}", self.seen));
        let piece = piece.ok().flatten().unwrap_or_else(|| panic!("the end of {:?}", self.seen));
        self.seen.push_str(&String::from_utf8_lossy(&piece));
        &self.seen
    }
}

/// The calls most tests make.
impl Http {
    /// Sends a request whose answer goes on.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn open(request: reqwest::RequestBuilder) -> Stream {
        let answer = request.send().await.unwrap_or_else(|error| panic!("no answer: {error:?}"));
        assert_eq!(answer.status(), 200);
        Stream { answer, seen: String::new() }
    }

    /// Creates an instance or replaces its profile; again while its shard is on the move, as the answer then asks.
    ///
    /// # Panics
    /// When it is refused for good.
    pub async fn put_instance(&self, instance: &str, profile: &Value) {
        wait_until("a profile is taken", PATIENCE, async || {
            let answer = self.put(&format!("/v1/instances/{instance}"), profile).await;
            assert!(answer.status.is_success() || answer.status == 503, "{} {}", answer.status, answer.text);
            answer.status.is_success()
        })
        .await;
    }

    /// Sends a text under an id and waits for the turn as long as the node does.
    pub async fn say(&self, instance: &str, id: &str, content: &str) -> Answer {
        self.post(&format!("/v1/instances/{instance}/stimuli"), &json!({"id": id, "content": content})).await
    }

    /// Sends a stimulus without waiting for its turn.
    pub async fn drop_in(&self, instance: &str, stimulus: &Value) -> Answer {
        self.post(&format!("/v1/instances/{instance}/stimuli?wait=0"), stimulus).await
    }

    /// `GET /v1/stimuli/{id}`.
    pub async fn stimulus(&self, id: &str) -> Answer {
        self.get(&format!("/v1/stimuli/{id}")).await
    }

    /// Waits until a stimulus has this status, and returns it.
    pub async fn until_status(&self, id: &str, status: &str) -> Value {
        let what = format!("stimulus {id} is {status}");
        wait_for(&what, PATIENCE, async || {
            let answer = self.stimulus(id).await;
            (answer.status == 200).then(|| answer.json()).filter(|stimulus| stimulus["status"] == status)
        })
        .await
    }

    /// The whole history of an instance, oldest first, page by page.
    ///
    /// # Panics
    /// When a page is refused, or the pages do not end.
    pub async fn turns(&self, instance: &str) -> Vec<Value> {
        let mut turns = Vec::new();
        let mut after = String::from("0");
        loop {
            let page = self.get(&format!("/v1/instances/{instance}/turns?after={after}&limit=1000")).await.expect(200);
            turns.extend(page["items"].as_array().expect("a list of turns").iter().cloned());
            let next = match &page["next"] {
                Value::Null => return turns,
                Value::String(text) => text.clone(),
                number => number.to_string(),
            };
            assert_ne!(next, after, "the cursor stands still");
            after = next;
        }
    }

    /// The contents of the decided stimuli of an instance, in the order of its turns.
    pub async fn decided(&self, instance: &str) -> Vec<String> {
        let content = |turn: &Value| turn["stimulus"]["content"].as_str().unwrap_or_default().to_owned();
        self.turns(instance).await.iter().map(content).collect()
    }

    /// Waits until an instance has at least `count` turns, and returns the contents they decided. As long as it gets on it may take
    /// its time.
    pub async fn until_decided(&self, instance: &str, count: usize) -> Vec<String> {
        let mut all = self.decided(instance).await;
        while all.len() < count {
            let so_far = all.len();
            let what = format!("more than {so_far} of {count} turns of {instance}");
            all =
                wait_for(&what, PATIENCE, async || Some(self.decided(instance).await).filter(|all| all.len() > so_far))
                    .await;
        }
        all
    }
}

/// A profile that answers a text with the same text and keeps it as `reported.last`.
pub fn echo() -> Value {
    json!({"engine": "reflex", "reflexes": [{
        "when": "has(stimulus.content)",
        "do": [{"set": {"reported.last": "{{stimulus.content}}"}}, {"reply": "{{stimulus.content}}"}],
        "stop": true,
    }]})
}

/// A profile that thinks for so many milliseconds about everything.
pub fn slow(delay_ms: u64) -> Value {
    json!({"engine": "scripted", "script": {"reply": "done", "delay_ms": delay_ms}})
}

/// A profile that thinks for so many milliseconds about the text `block`, and answers everything else at once.
pub fn blockable(delay_ms: u64) -> Value {
    json!({
        "engine": "scripted",
        "script": {"reply": "done", "delay_ms": delay_ms},
        "reflexes": [{"when": "stimulus.content != 'block'", "do": [{"reply": "{{stimulus.content}}"}], "stop": true}],
    })
}
