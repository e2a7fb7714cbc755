//! Vectors from a static embedding model (Model2Vec) in a folder of this machine: each token has a vector, a text has their mean.
//!
//! Owns: loading the files, and naming them by what is in them. Not here: which texts are embedded together, and when
//! (`gather`). Built with the cargo feature `static-embeddings` only.
//! Invariants: nothing is fetched from anywhere; the same files give the same vectors; another model's are never taken for this
//! one's. Tests: `tests/it/embeddings.rs`.

use std::{path::Path, time::Duration};

use async_trait::async_trait;
use model2vec_rs::model::StaticModel;

use super::gather::{Batches, Maker};
use crate::types::{limits::MAX_DIMENSION, memory::Vector};

/// Most bytes of the model's file.
const MAX_BYTES: u64 = 4 * 1024 * 1024 * 1024;
/// Most tokens of a text.
const MAX_TOKENS: usize = 8192;
/// The files of a model.
const FILES: [&str; 3] = ["tokenizer.json", "model.safetensors", "config.json"];

/// A model.
pub(super) struct Model {
    model: StaticModel,
    digest: String,
}

impl Model {
    /// The one in a folder. Reads all of it.
    ///
    /// # Errors
    /// Which file is missing, too large or no model.
    pub(super) fn open(folder: &Path) -> Result<Self, String> {
        let mut digest = blake3::Hasher::new();
        let mut read = |name: &str| {
            let path = folder.join(name);
            let failed = |error: std::io::Error| format!("{}: {error}", path.display());
            let size = std::fs::metadata(&path).map_err(failed)?.len();
            if size > MAX_BYTES {
                return Err(format!("{}: {size} bytes, the limit is {MAX_BYTES}", path.display()));
            }
            let bytes = std::fs::read(&path).map_err(failed)?;
            digest.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
            Ok(bytes)
        };
        let [tokenizer, weights, config] = FILES;
        let (tokenizer, weights, config) = (read(tokenizer)?, read(weights)?, read(config)?);
        let model = StaticModel::from_bytes(tokenizer, weights, config, None)
            .map_err(|error| format!("{}: {error:#}", folder.display()))?;
        if model.dim() > MAX_DIMENSION {
            let dimension = model.dim();
            return Err(format!("{}: vectors of {dimension} numbers, the limit is {MAX_DIMENSION}", folder.display()));
        }
        tracing::info!(folder = %folder.display(), dimension = model.dim(), "embedding model loaded");
        Ok(Self { model, digest: digest.finalize().to_hex().to_string() })
    }

    /// Nobody gains by waiting for others: the machine is the same.
    pub(super) const fn batches() -> Batches {
        Batches { texts: 64, wait: Duration::ZERO, at_once: 1 }
    }
}

#[async_trait]
impl Maker for Model {
    fn name(&self) -> String {
        format!("model {}", self.digest)
    }

    async fn vectors(&self, texts: Vec<String>) -> Result<Vec<Option<Vector>>, String> {
        let model = self.model.clone();
        // Some milliseconds for long texts: not on a thread that others wait for.
        let made = tokio::task::spawn_blocking(move || {
            let found = model.encode_with_args(&texts, Some(MAX_TOKENS), texts.len().max(1));
            found.iter().map(|numbers| Vector::of(numbers)).collect()
        });
        made.await.map_err(|_| String::from("the embedding model failed on these texts"))
    }
}
