//! Vectors from a model server that speaks the OpenAI embeddings protocol: texts of all instances gathered into few requests.
//!
//! Owns: the queue and its batches, the pause after failures, the wire; a vector once made is held by its tenant, text and model
//! in the cache's tiers. Not here: when a text needs a vector (`mod.rs`, `backfill`), what becomes of it.
//! Invariants: queue, batches, answers and waits are bounded; a key never reaches a log or an error text; whoever gives up
//! waiting takes nobody's answer along; what one tenant asked for is no faster for another.
//! Tests: at the foot; `tests/it/embeddings.rs` against a server that misbehaves.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::{
    config,
    scaling::cache::{Kind, Slot, TieredCache},
    telemetry::metric,
    types::{TenantId, limits::MAX_DIMENSION, memory::Vector},
};

/// Most texts that wait.
const MAX_WAITING: usize = 4096;
/// Most bytes of a text that are sent.
const MAX_TEXT_BYTES: usize = 32 * 1024;
/// Failures in a row after which the server is left alone for a while.
const FAILURES: u32 = 3;
/// For how long at first; it doubles.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// And at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Most bytes of an answer for each text.
const MAX_ANSWER_BYTES: usize = 32 * MAX_DIMENSION;

/// Why there is no vector. Texts can be found by their words all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// Too many texts wait.
    #[error("too many texts wait for the embeddings server")]
    Overloaded,
    /// It failed lately and is left alone.
    #[error("the embeddings server failed and is left alone for a moment")]
    Paused,
    /// It does not answer, or not so that it can be understood.
    #[error("the embeddings server: {0}")]
    Server(String),
}

type Answer = Result<Vector, Failure>;

struct Waiting {
    text: String,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Requests being gathered or under way.
    running: usize,
    failures: u32,
    paused_until: Option<Instant>,
}

struct Inner {
    client: reqwest::Client,
    url: String,
    key: Option<SecretString>,
    config: config::EmbedderEndpoint,
    cache: TieredCache,
    state: Mutex<State>,
    texts: metrics::Histogram,
    seconds: metrics::Histogram,
    failed: metrics::Counter,
}

/// The way to the server. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Endpoint(Arc<Inner>);

#[derive(Serialize)]
struct Asked<'a> {
    model: &'a str,
    input: Vec<&'a str>,
}

#[derive(Deserialize)]
struct Told {
    data: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    index: usize,
    embedding: Vec<f32>,
}

impl Endpoint {
    /// As configured.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub(crate) fn new(config: &config::EmbedderEndpoint, cache: TieredCache) -> Result<Self, String> {
        let timeout = Duration::from_millis(config.timeout_ms);
        let client = reqwest::Client::builder()
            .timeout(timeout)
            .connect_timeout(timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|error| error.to_string())?;
        let key = (!config.api_key_env.is_empty())
            .then(|| std::env::var(&config.api_key_env).ok())
            .flatten()
            .map(SecretString::from);
        Ok(Self(Arc::new(Inner {
            client,
            url: format!("{}/embeddings", config.base_url.trim_end_matches('/')),
            key,
            config: config.clone(),
            cache,
            state: Mutex::default(),
            texts: metrics::histogram!(metric::MEMORY_EMBED_BATCH),
            seconds: metrics::histogram!(metric::MEMORY_EMBED_SECONDS),
            failed: metrics::counter!(metric::MEMORY_EMBED_FAILURES),
        })))
    }

    /// The vector of a text, held or made. Must be called within a tokio runtime. Cancel safe.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn embed(&self, tenant: &TenantId, text: &str) -> Result<Arc<Vector>, Failure> {
        let text = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
        let slot = self.slot(tenant, text);
        let made = self.0.cache.get_or_make(&slot, 0, || async {
            let answer = self.submit(text)?;
            answer.await.unwrap_or(Err(Failure::Overloaded)).map(Some)
        });
        made.await?.ok_or(Failure::Overloaded)
    }

    fn slot(&self, tenant: &TenantId, text: &str) -> Slot {
        let mut hasher = blake3::Hasher::new();
        for part in [&*self.0.url, &*self.0.config.model, text] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        Slot::new(Kind::Embedding, tenant, hasher.finalize().to_hex().as_str())
    }

    /// Where the vector of a text will come.
    fn submit(&self, text: &str) -> Result<oneshot::Receiver<Answer>, Failure> {
        let mut state = self.0.lock();
        if state.paused_until.is_some_and(|until| Instant::now() < until) {
            return Err(Failure::Paused);
        }
        if state.waiting.len() >= MAX_WAITING {
            return Err(Failure::Overloaded);
        }
        let (answer, waits) = oneshot::channel();
        state.waiting.push_back(Waiting { text: text.to_owned(), answer });
        if state.running < self.0.config.max_concurrent.max(1) {
            state.running += 1;
            drop(state);
            tokio::spawn(Arc::clone(&self.0).drive());
        }
        Ok(waits)
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gathers for a moment, asks, tells; until nothing waits.
    async fn drive(self: Arc<Self>) {
        loop {
            if self.lock().waiting.len() < self.config.max_batch {
                tokio::time::sleep(Duration::from_millis(self.config.wait_ms)).await;
            }
            let batch: Vec<Waiting> = {
                let mut state = self.lock();
                let count = state.waiting.len().min(self.config.max_batch.max(1));
                if count == 0 {
                    state.running -= 1;
                    return;
                }
                state.waiting.drain(..count).filter(|waiting| !waiting.answer.is_closed()).collect()
            };
            if !batch.is_empty() {
                self.answer(batch).await;
            }
        }
    }

    async fn answer(&self, batch: Vec<Waiting>) {
        let began = Instant::now();
        #[allow(clippy::cast_precision_loss)] // at most some hundreds
        self.texts.record(batch.len() as f64);
        let told = self.ask(batch.iter().map(|waiting| waiting.text.as_str()).collect()).await;
        self.seconds.record(began.elapsed());
        match told {
            Ok(vectors) => {
                {
                    let mut state = self.lock();
                    (state.failures, state.paused_until) = (0, None);
                }
                let pointless = || Failure::Server(String::from("a vector without a direction"));
                for (waiting, vector) in batch.into_iter().zip(vectors) {
                    drop(waiting.answer.send(vector.ok_or_else(pointless)));
                }
            }
            Err(why) => {
                self.failed.increment(1);
                let mut state = self.lock();
                state.failures += 1;
                if state.failures >= FAILURES {
                    let doubled = FIRST_PAUSE.saturating_mul(1 << (state.failures - FAILURES).min(6));
                    state.paused_until = Some(Instant::now() + doubled.min(LONGEST_PAUSE));
                }
                // Those that wait are not kept waiting for a server that is gone.
                let paused = state.paused_until.is_some();
                let others: Vec<Waiting> = if paused { state.waiting.drain(..).collect() } else { Vec::new() };
                drop(state);
                tracing::warn!(why, texts = batch.len(), "no vectors from the embeddings server");
                batch.into_iter().for_each(|waiting| drop(waiting.answer.send(Err(Failure::Server(why.clone())))));
                others.into_iter().for_each(|waiting| drop(waiting.answer.send(Err(Failure::Paused))));
            }
        }
    }

    /// One request. An error's text names no key and no text.
    async fn ask(&self, input: Vec<&str>) -> Result<Vec<Option<Vector>>, String> {
        let count = input.len();
        let mut request = self.client.post(&self.url).json(&Asked { model: &self.config.model, input });
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose_secret());
        }
        let mut response = request.send().await.map_err(|error| error.without_url().to_string())?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("status {status}"));
        }
        let limit = MAX_ANSWER_BYTES * count + 4096;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| error.without_url().to_string())? {
            if body.len() + chunk.len() > limit {
                return Err(format!("an answer of more than {limit} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        sort(&body, count)
    }
}

/// The vectors of an answer in the order of the texts.
fn sort(body: &[u8], count: usize) -> Result<Vec<Option<Vector>>, String> {
    let told: Told = serde_json::from_slice(body).map_err(|error| format!("not an answer with vectors: {error}"))?;
    let mut vectors = vec![None; count];
    let mut named = 0;
    for one in told.data {
        if one.embedding.len() > MAX_DIMENSION {
            return Err(format!("a vector of more than {MAX_DIMENSION} numbers"));
        }
        if let Some(place) = vectors.get_mut(one.index) {
            *place = Vector::of(&one.embedding);
            named += 1;
        }
    }
    if named == count { Ok(vectors) } else { Err(format!("{named} vectors for {count} texts")) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_put_in_order_or_refused() {
        let body =
            br#"{"object":"list","data":[{"index":1,"embedding":[0,2]},{"index":0,"embedding":[1,0]}],"usage":{}}"#;
        let vectors = sort(body, 2).unwrap();
        assert_eq!(vectors[0], Vector::of(&[1.0, 0.0]));
        assert_eq!(vectors[1], Vector::of(&[0.0, 1.0]));
        assert!(sort(body, 3).unwrap_err().contains("2 vectors for 3"));
        assert!(sort(b"<html>", 1).is_err());
        assert!(sort(br#"{"data":[{"index":0,"embedding":"no"}]}"#, 1).is_err());
    }
}
