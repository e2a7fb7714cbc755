//! Texts of all instances, gathered into batches, and their vectors.
//!
//! Owns: the queue and its batches, the pause after failures; a vector once made is held by its tenant, text and maker in the
//! cache's tiers. Not here: who makes vectors (`endpoint`, `model`), when a text needs one (`mod.rs`, `backfill`), what becomes of it.
//! Invariants: queue, batches and waits are bounded; whoever gives up waiting takes nobody's answer along; what one tenant asked
//! for is no faster for another.
//! Tests: `tests/it/embeddings.rs`.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::{
    scaling::cache::{Kind, Slot, TieredCache},
    telemetry::metric,
    types::{TenantId, memory::Vector},
};

/// Most texts that wait.
const MAX_WAITING: usize = 4096;
/// Most bytes of a text that are looked at.
const MAX_TEXT_BYTES: usize = 32 * 1024;
/// Failures in a row after which the maker is left alone for a while.
const FAILURES: u32 = 3;
/// For how long at first; it doubles.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// And at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Why there is no vector. Texts can be found by their words all the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// Too many texts wait.
    #[error("too many texts wait for vectors")]
    Overloaded,
    /// They could not be made lately.
    #[error("the embeddings server or model failed and is left alone for a moment")]
    Paused,
    /// There is none for this text.
    #[error("the text has no vector")]
    NoDirection,
    /// Whoever makes them does not, or not so that it can be understood.
    #[error("{0}")]
    Maker(String),
}

/// Port: makes vectors of texts.
#[async_trait]
pub(crate) trait Maker: Send + Sync + 'static {
    /// Its name among all makers: the vectors of two of them cannot be compared.
    fn name(&self) -> String;

    /// The vectors of texts, in their order; none for a text without a direction.
    ///
    /// # Errors
    /// In words that name no key and no text.
    async fn vectors(&self, texts: Vec<String>) -> Result<Vec<Option<Vector>>, String>;
}

/// How texts are gathered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batches {
    /// Most texts of one.
    pub(crate) texts: usize,
    /// How long one is gathered.
    pub(crate) wait: Duration,
    /// Batches at once.
    pub(crate) at_once: usize,
}

type Answer = Result<Vector, Failure>;

struct Waiting {
    text: String,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// Batches being gathered or under way.
    running: usize,
    failures: u32,
    paused_until: Option<Instant>,
}

struct Inner {
    maker: Box<dyn Maker>,
    name: String,
    batches: Batches,
    cache: TieredCache,
    state: Mutex<State>,
    texts: metrics::Histogram,
    seconds: metrics::Histogram,
    failed: metrics::Counter,
}

/// The way to whoever makes vectors. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Gather(Arc<Inner>);

impl Gather {
    /// For this maker.
    pub(crate) fn new(maker: Box<dyn Maker>, batches: Batches, cache: TieredCache) -> Self {
        Self(Arc::new(Inner {
            name: maker.name(),
            maker,
            batches,
            cache,
            state: Mutex::default(),
            texts: metrics::histogram!(metric::MEMORY_EMBED_BATCH),
            seconds: metrics::histogram!(metric::MEMORY_EMBED_SECONDS),
            failed: metrics::counter!(metric::MEMORY_EMBED_FAILURES),
        }))
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
        for part in [&*self.0.name, text] {
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
        if state.running < self.0.batches.at_once.max(1) {
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
            if self.lock().waiting.len() < self.batches.texts {
                tokio::time::sleep(self.batches.wait).await;
            }
            let batch: Vec<Waiting> = {
                let mut state = self.lock();
                let count = state.waiting.len().min(self.batches.texts.max(1));
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
        let (texts, answers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|waiting| (waiting.text, waiting.answer)).unzip();
        let told = self.maker.vectors(texts).await;
        self.seconds.record(began.elapsed());
        match told {
            Ok(vectors) => {
                {
                    let mut state = self.lock();
                    (state.failures, state.paused_until) = (0, None);
                }
                for (answer, vector) in answers.into_iter().zip(vectors) {
                    drop(answer.send(vector.ok_or(Failure::NoDirection)));
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
                // Those that wait are not kept waiting for a maker that is gone.
                let paused = state.paused_until.is_some();
                let others: Vec<Waiting> = if paused { state.waiting.drain(..).collect() } else { Vec::new() };
                drop(state);
                tracing::warn!(why, texts = answers.len(), "no vectors");
                answers.into_iter().for_each(|answer| drop(answer.send(Err(Failure::Maker(why.clone())))));
                others.into_iter().for_each(|waiting| drop(waiting.answer.send(Err(Failure::Paused))));
            }
        }
    }
}
