//! A model server that speaks the OpenAI embeddings protocol.
//!
//! Owns: the wire. Not here: which texts are asked for together, and when again (`gather`).
//! Invariants: answers are bounded; a key never reaches a log or an error text.
//! Tests: at the foot; `tests/it/embeddings.rs` against a server that misbehaves.

use std::time::Duration;

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::gather::{Batches, Maker};
use crate::{
    config,
    types::{limits::MAX_DIMENSION, memory::Vector},
};

/// Most bytes of an answer for each text.
const MAX_ANSWER_BYTES: usize = 32 * MAX_DIMENSION;

/// The server.
pub(super) struct Server {
    client: reqwest::Client,
    url: String,
    key: Option<SecretString>,
    model: String,
}

#[derive(Serialize)]
struct Asked<'a> {
    model: &'a str,
    input: &'a [String],
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

impl Server {
    /// As configured.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub(super) fn new(config: &config::EmbedderEndpoint) -> Result<Self, String> {
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
        let url = format!("{}/embeddings", config.base_url.trim_end_matches('/'));
        Ok(Self { client, url, key, model: config.model.clone() })
    }

    /// How texts are gathered for it.
    pub(super) fn batches(config: &config::EmbedderEndpoint) -> Batches {
        let wait = Duration::from_millis(config.wait_ms);
        Batches { texts: config.max_batch, wait, at_once: config.max_concurrent }
    }

    /// One request.
    async fn ask(&self, input: &[String]) -> Result<Vec<Option<Vector>>, String> {
        let count = input.len();
        let mut request = self.client.post(&self.url).json(&Asked { model: &self.model, input });
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

#[async_trait]
impl Maker for Server {
    fn name(&self) -> String {
        format!("{} {}", self.url, self.model)
    }

    async fn vectors(&self, texts: Vec<String>) -> Result<Vec<Option<Vector>>, String> {
        self.ask(&texts).await.map_err(|why| format!("the embeddings server: {why}"))
    }
}

/// The vectors of an answer in the order of the texts.
pub(super) fn sort(body: &[u8], count: usize) -> Result<Vec<Option<Vector>>, String> {
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
