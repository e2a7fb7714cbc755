//! What an instance remembers: episodes, found again by words and by vectors, with what was known when.
//!
//! Owns: recall over the episodes of an instance, what is to be forgotten when somebody asks for less, and the figures. A
//! shelf per instance (`shelf`) follows its turns and answers from memory; texts are read from the store for what is
//! found. Not here: writing and forgetting, which are turns (`types::memory`, `instance::turn`), the log (`store`), what an
//! engine makes of a recollection (`cognition`).
//!
//! | file | what |
//! |---|---|
//! | `ask` | what is asked |
//! | `again` | what was asked before |
//! | `shelf`, `shelves` | the episodes of one instance; those of the node, within bounds |
//! | `digest` | what a turn amounts to for a shelf |
//! | `checkpoint`, `part`, `index` | digests and the index kept in the store; their forms |
//! | `fuse` | rankings made one |
//! | `vector`, `cells` | vectors scanned; an index over many |
//! | `lexical` | the built-in embedder |
//! | `gather`, `backfill` | vectors of texts made in batches; those that come after their episodes |
//! | `endpoint`, `model` | who makes them: a model server; a model in a folder |
//! | `prune` | which episodes go |
//! | `transfer` | whole memories out and in |
//!
//! Invariants: a recall sees every committed turn, on whichever node it is asked; what is forgotten is on no shelf that was asked
//! since; shelves are bounded in bytes. Decision: `docs/adr/0016-episodes-and-recall.md`. Tests: at the foot of each file;
//! `tests/it/memory.rs`.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

mod again;
mod ask;
mod backfill;
mod cells;
mod checkpoint;
mod digest;
mod endpoint;
mod fuse;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gather;
mod index;
mod lexical;
#[cfg(feature = "static-embeddings")]
mod model;
mod part;
mod prune;
mod shelf;
mod shelves;
mod transfer;
mod vector;

pub use ask::{Ask, Known};
pub use checkpoint::Checkpoint;
pub use fuse::{Explained, Ranked};
pub use prune::{Forget, Prune};
pub use shelf::Figures;
pub use transfer::Exported;

use futures_util::future::try_join_all;

use self::{
    again::Again,
    ask::Asked,
    backfill::Wakes,
    gather::Gather,
    shelves::{Shared, Shelves},
};
use crate::{
    config::{self, Embedder},
    runtime::clock::Clock,
    scaling::cache::TieredCache,
    store::{self, Episode, Store, rank, replay},
    telemetry::metric,
    types::{EpisodeId, Fault, InstanceKey, Kind, Millis, TenantId, limits::MAX_RECALL},
};

/// Turns of one page of an export.
const PAGE: usize = 16;

/// Why nothing could be recalled.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The search took too long.
    #[error("recall took longer than {0:?}")]
    Timeout(Duration),
    /// A vector of another dimension than the instance's.
    #[error("the vector has {given} numbers, those of this instance have {has}")]
    Dimension {
        /// Of the instance's vectors.
        has: usize,
        /// Of this one.
        given: usize,
    },
    /// There is no such instance.
    #[error("no such instance")]
    NotFound,
    /// No vectors could be made.
    #[error("{reason}")]
    Embeddings {
        /// What is wrong.
        reason: String,
        /// Whether more was asked of it than it gets done.
        overloaded: bool,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Timeout(_) => Kind::Timeout,
            Error::Dimension { .. } => Kind::Invalid,
            Error::NotFound => Kind::NotFound,
            Error::Embeddings { overloaded: true, .. } => Kind::Overloaded,
            Error::Embeddings { .. } => Kind::Unavailable,
            Error::Store(error) => error.kind(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Timeout(_) => "TIMEOUT",
            Error::Dimension { .. } => "DIMENSION_MISMATCH",
            Error::NotFound => "INSTANCE_NOT_FOUND",
            Error::Embeddings { overloaded: true, .. } => "OVERLOADED",
            Error::Embeddings { .. } => "EMBEDDINGS_UNAVAILABLE",
            Error::Store(error) => error.code(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Error::Timeout(_) => None,
            Error::Embeddings { .. } => Some(String::from("try again after the time in Retry-After")),
            Error::Dimension { .. } => {
                Some(String::from("the first vector of an instance fixes how many numbers all have"))
            }
            Error::NotFound => Some(String::from("send it a stimulus or PUT a profile to create it")),
            Error::Store(error) => error.hint(),
        }
    }
}

impl From<gather::Failure> for Error {
    fn from(failure: gather::Failure) -> Self {
        Self::Embeddings { reason: failure.to_string(), overloaded: failure == gather::Failure::Overloaded }
    }
}

impl From<shelf::OtherDimension> for Error {
    fn from(other: shelf::OtherDimension) -> Self {
        Self::Dimension { has: other.has, given: other.given }
    }
}

/// An episode that was recalled.
#[derive(Debug, Clone, PartialEq)]
pub struct Recalled {
    /// It, with its score.
    pub episode: Episode,
    /// Why it has that score.
    pub explained: Explained,
    /// Others that tell the same and would have been recalled too.
    pub duplicates: u32,
    /// The first one that told the same.
    pub duplicate_of: Option<EpisodeId>,
    /// Since when it holds no longer; only a question about an earlier time finds such.
    pub superseded_at: Option<Millis>,
}

/// What a recall found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recollection {
    /// Best first.
    pub episodes: Vec<Recalled>,
    /// Asked about an earlier time: how many episodes of then were forgotten since, whatever they said.
    pub forgotten: u64,
    /// Why the text was looked for by its words alone, where a model server should have helped.
    pub degraded: Option<String>,
}

/// The memories of a node's instances. Cheap to share; all methods are cancel safe.
pub struct Memory {
    store: Arc<dyn Store>,
    clock: Clock,
    shelves: Shelves,
    again: Again,
    lexical: bool,
    gather: Option<Gather>,
    wakes: Wakes,
    /// Whose parts in the store are behind.
    stale: Wakes,
    metrics: Metrics,
}

struct Metrics {
    recalls: metrics::Counter,
    seconds: metrics::Histogram,
    age: metrics::Histogram,
}

impl Memory {
    /// Over a store, as configured. What was recalled, and vectors of texts, are held in the cache.
    ///
    /// # Errors
    /// When the client of the embeddings server cannot be made, or there is no model in the folder.
    pub fn new(
        config: &config::Memory,
        store: Arc<dyn Store>,
        clock: Clock,
        cache: &TieredCache,
    ) -> Result<Self, String> {
        let lexical = config.embedder == Embedder::Lexical;
        let maker: Option<(Box<dyn gather::Maker>, _)> = match config.embedder {
            Embedder::Endpoint => {
                let server = endpoint::Server::new(&config.endpoint)?;
                Some((Box::new(server), endpoint::Server::batches(&config.endpoint)))
            }
            #[cfg(feature = "static-embeddings")]
            Embedder::Model => Some((Box::new(model::Model::open(&config.model.path)?), model::Model::batches())),
            #[cfg(not(feature = "static-embeddings"))]
            Embedder::Model => return Err(String::from(config::NO_MODELS)),
            Embedder::Lexical | Embedder::Off => None,
        };
        Ok(Self {
            shelves: Shelves::new(config, lexical),
            again: Again::new(config, cache.clone()),
            store,
            clock,
            lexical,
            gather: maker.map(|(maker, batches)| Gather::new(maker, batches, cache.clone())),
            wakes: Wakes::default(),
            stale: Wakes::default(),
            metrics: Metrics {
                recalls: metrics::counter!(metric::MEMORY_RECALLS),
                seconds: metrics::histogram!(metric::MEMORY_RECALL_SECONDS),
                age: metrics::histogram!(metric::MEMORY_RECALLED_AGE_SECONDS),
            },
        })
    }

    /// The shelf of an instance as of now.
    async fn current(&self, key: &InstanceKey) -> Result<Shared, Error> {
        let (shelf, stale) = self.shelves.current(&*self.store, key).await?;
        if stale {
            self.stale.push(key);
        }
        Ok(shelf)
    }

    /// What fits, best first.
    ///
    /// # Errors
    /// [`Error`]; [`Error::NotFound`] when there is no such instance.
    pub async fn search(&self, key: &InstanceKey, ask: Ask) -> Result<Recollection, Error> {
        let began = std::time::Instant::now();
        let slot = self.again.slot(key, &ask);
        if let Some(found) = self.again.look(&*self.store, key, &slot).await? {
            self.count(&found, self.clock.now(), began);
            return Ok(found);
        }
        let (asked, degraded) = self.ready(key, ask).await;
        let now = asked.now;
        let shelf = self.current(key).await?;
        let (hits, forgotten, beside, bare, stood) = self
            .shelves
            .look(&shelf, move |shelf| {
                let (hits, forgotten) = shelf.search(&asked)?;
                let beside: Vec<_> = hits
                    .iter()
                    .map(|hit| (shelf.duplicate_of(hit.id), shelf.superseded_at(hit.id), shelf.episode(hit.slot)))
                    .collect();
                Ok::<_, Error>((hits, forgotten, beside, !shelf.bare(1).is_empty(), (shelf.life, shelf.turn)))
            })
            .await?;
        if bare {
            self.wake(key);
        }
        let missing = hits.iter().zip(&beside).filter(|(_, beside)| beside.2.is_none());
        let mut texts = self.texts(key, missing.map(|(hit, _)| hit.id).collect()).await?;
        let episodes: Vec<Recalled> = hits
            .into_iter()
            .zip(beside)
            .filter_map(|(hit, (duplicate_of, superseded_at, held))| {
                // One that was forgotten in this moment has no text in the log any more.
                let episode = Episode { score: hit.score, ..held.or_else(|| texts.remove(&hit.id.0))? };
                let (explained, duplicates) = (hit.explained, hit.duplicates);
                Some(Recalled { episode, explained, duplicates, duplicate_of, superseded_at })
            })
            .collect();
        let found = Recollection { episodes, forgotten, degraded };
        self.count(&found, now, began);
        // What vectors that are still to come would better is not held, and neither is what the server would have bettered.
        if found.degraded.is_none() && !(bare && self.backfills()) {
            self.again.hold(&slot, stood.0, stood.1, &found);
        }
        Ok(found)
    }

    fn count(&self, found: &Recollection, now: Millis, began: std::time::Instant) {
        self.metrics.recalls.increment(1);
        self.metrics.seconds.record(began.elapsed());
        for recalled in &found.episodes {
            let age = now.0.saturating_sub(recalled.episode.recorded_at.0).max(0);
            #[allow(clippy::cast_precision_loss)] // milliseconds of centuries
            self.metrics.age.record(age as f64 / 1000.0);
        }
    }

    /// The episodes of an instance that fit a text, best first, at most `k` (and [`MAX_RECALL`]), for an engine. A text without
    /// meaning recalls nothing.
    ///
    /// # Errors
    /// [`Error::Timeout`] after the deadline, [`Error::Store`] when the store fails.
    pub async fn recall(
        &self,
        key: &InstanceKey,
        text: &str,
        k: usize,
        deadline: Duration,
    ) -> Result<Vec<Episode>, Error> {
        if k == 0 || ask::meaning(text).is_empty() {
            return Ok(Vec::new());
        }
        let ask = Ask { query: Some(text.to_owned()), limit: k.min(MAX_RECALL), ..Ask::default() };
        match tokio::time::timeout(deadline, self.search(key, ask)).await {
            Err(_) => Err(Error::Timeout(deadline)),
            Ok(Err(Error::NotFound)) => Ok(Vec::new()),
            Ok(found) => Ok(found?.episodes.into_iter().map(|recalled| recalled.episode).collect()),
        }
    }

    /// The vectors of texts by the configured embedder, in their order; of the built-in one all zero for a text without words.
    /// `None` when it is switched off. Those of a model are held for the tenant.
    ///
    /// # Errors
    /// [`Error::Embeddings`] when there is no vector for one of them.
    pub async fn embed(&self, tenant: &TenantId, texts: &[String]) -> Result<Option<Vec<Vec<f32>>>, Error> {
        if let Some(gather) = &self.gather {
            let found = try_join_all(texts.iter().map(|text| gather.embed(tenant, text))).await?;
            return Ok(Some(found.iter().map(|vector| vector.numbers().collect()).collect()));
        }
        let nothing = || vec![0.0; lexical::DIMENSION];
        let embed = |text: &String| lexical::embed(text).map_or_else(nothing, |vector| vector.numbers().collect());
        Ok(self.lexical.then(|| texts.iter().map(embed).collect()))
    }

    async fn ready(&self, key: &InstanceKey, ask: Ask) -> (Asked, Option<String>) {
        let text = ask.query.as_deref().unwrap_or_default();
        let mut words = ask::meaning(text);
        if words.is_empty() {
            words = ask::literal(text);
        }
        // As the words of episodes are cut.
        let words = rank::query_words(&words.join(" "));
        let lexical = if self.lexical { lexical::embed(text) } else { None };
        let now = self.clock.now();
        let (mut given, mut modelled, mut degraded) = (ask.embedding, None, None);
        if let (None, Some(gather), false) = (&given, &self.gather, text.is_empty()) {
            match gather.embed(&key.tenant, text).await {
                Ok(vector) => modelled = Some((*vector).clone()),
                Err(gather::Failure::NoDirection) => {}
                Err(failure) => degraded = Some(failure.to_string()),
            }
        }
        // Where the client sends vectors of another model, that of the text is of no use, and no mistake of the caller's.
        let ours = modelled.is_some();
        given = given.or(modelled);
        (Asked { words, lexical, given, ours, limit: ask.limit, known: ask.known, now }, degraded)
    }

    /// Episodes from the log.
    async fn texts(&self, key: &InstanceKey, ids: HashSet<EpisodeId>) -> Result<HashMap<u64, Episode>, Error> {
        let turns: BTreeSet<u64> = ids.iter().map(|id| id.turn()).collect();
        if turns.is_empty() {
            return Ok(HashMap::new());
        }
        let found = self.store.turns_at(key, &turns.into_iter().collect::<Vec<_>>()).await?;
        let episodes = found.iter().flat_map(|turn| replay::episodes(turn));
        let wanted = episodes.filter(|episode| ids.contains(&EpisodeId(episode.id)));
        Ok(wanted.map(|episode| (episode.id, episode)).collect())
    }

    /// The figures of an instance's memory.
    ///
    /// # Errors
    /// As [`Memory::search`].
    pub async fn figures(&self, key: &InstanceKey) -> Result<Figures, Error> {
        let shelf = self.current(key).await?;
        self.shelves.look(&shelf, |shelf| Ok(shelf.figures())).await
    }

    /// How many numbers a vector of this instance has; nothing before the first one, or when there is no such instance.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn dimension(&self, key: &InstanceKey) -> Result<Option<usize>, Error> {
        match self.current(key).await {
            Err(Error::NotFound) => Ok(None),
            shelf => Ok(shelf?.read().await.dimension()),
        }
    }

    /// The episodes that go when only so much is to stay, in order.
    ///
    /// # Errors
    /// As [`Memory::search`].
    pub async fn to_prune(&self, key: &InstanceKey, prune: Prune) -> Result<Vec<EpisodeId>, Error> {
        let shelf = self.current(key).await?;
        self.shelves.look(&shelf, move |shelf| Ok(prune.picks(shelf))).await
    }

    /// The episodes that go when these are to be forgotten, in order.
    ///
    /// # Errors
    /// As [`Memory::search`].
    pub async fn to_forget(&self, key: &InstanceKey, forget: Forget) -> Result<Vec<EpisodeId>, Error> {
        let text = forget.text.as_ref().map(|text| text.to_lowercase());
        let shelf = self.current(key).await?;
        let mut ids = self.shelves.look(&shelf, move |shelf| Ok(forget.picks(shelf))).await?;
        if let Some(text) = text {
            let mut after = 0;
            loop {
                let page = self.store.remembered(key, after, PAGE).await?;
                let Some(last) = page.turns.last() else { break };
                after = last.turn;
                let all = page.turns.iter().flat_map(|turn| replay::episodes(turn));
                ids.extend(all.filter(|episode| prune::says(episode, &text)).map(|episode| EpisodeId(episode.id)));
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// These episodes, and the places where vectors of theirs stand in later turns: what has to go with them. In order.
    ///
    /// # Errors
    /// As [`Memory::search`].
    pub async fn with_vectors(&self, key: &InstanceKey, ids: Vec<EpisodeId>) -> Result<Vec<EpisodeId>, Error> {
        let shelf = self.current(key).await?;
        self.shelves.look(&shelf, move |shelf| Ok(shelf.with_vectors(ids))).await
    }

    /// Lets go of what is in memory of an instance that is gone.
    pub fn drop_shelf(&self, key: &InstanceKey) {
        self.shelves.remove(key);
    }
}
