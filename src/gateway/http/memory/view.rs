//! What a caller is shown of a memory. Tests: `tests/it/memory.rs`.

use serde::Serialize;

use crate::{
    memory::{Checkpoint, Explained, Figures, Ranked, Recalled},
    types::{EpisodeId, Millis, RawJson},
};

/// The id of what was remembered.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Remembered)]
pub struct IdView {
    #[schema(value_type = String)]
    pub id: EpisodeId,
}

/// The ids of what was remembered, in order.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = RememberedBatch)]
pub struct IdsView {
    #[schema(value_type = Vec<String>)]
    pub ids: Vec<EpisodeId>,
}

/// How many episodes went.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Removed)]
pub struct RemovedView {
    pub removed: usize,
}

/// A place in a ranking, from 1, and the score there.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Rank)]
pub struct RankView {
    pub rank: usize,
    pub score: f32,
}

impl From<Ranked> for RankView {
    fn from(ranked: Ranked) -> Self {
        Self { rank: ranked.rank, score: ranked.score }
    }
}

/// Why an episode has its score, which is `fused` times `recency` times `reward`.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Explanation)]
pub struct ExplainView {
    /// By the words it shares with the query (BM25).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<RankView>,
    /// By the built-in embedder (cosine).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<RankView>,
    /// By embeddings (cosine).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vector: Option<RankView>,
    /// Those places together; 1 for the first of all.
    pub fused: f64,
    /// What recency multiplies it by.
    pub recency: f64,
    /// What the reward multiplies it by.
    pub reward: f64,
}

impl From<Explained> for ExplainView {
    fn from(explained: Explained) -> Self {
        let Explained { words, text, vector, fused, recency, reward } = explained;
        let view = |ranked: Option<Ranked>| ranked.map(RankView::from);
        Self { words: view(words), text: view(text), vector: view(vector), fused, recency, reward }
    }
}

/// An episode that was recalled.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Episode)]
pub struct EpisodeView<'a> {
    #[schema(value_type = String)]
    pub id: EpisodeId,
    /// How well it fits; more is better, and only the order matters.
    pub score: f64,
    pub content: &'a str,
    #[schema(value_type = Option<serde_json::Value>)]
    pub data: Option<&'a RawJson>,
    pub tags: &'a [String],
    pub reward: Option<f32>,
    #[schema(value_type = String, format = DateTime)]
    pub occurred_at: Millis,
    #[schema(value_type = String, format = DateTime)]
    pub recorded_at: Millis,
    /// The turn that recorded it.
    pub turn: u64,
    /// Others that tell the same, fit too, and are not shown.
    #[serde(skip_serializing_if = "is_none")]
    pub duplicates: u32,
    /// The first one that told the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub duplicate_of: Option<EpisodeId>,
    /// Since when it holds no longer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub superseded_at: Option<Millis>,
    pub explain: ExplainView,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's way
const fn is_none(count: &u32) -> bool {
    *count == 0
}

impl<'a> From<&'a Recalled> for EpisodeView<'a> {
    fn from(recalled: &'a Recalled) -> Self {
        let episode = &recalled.episode;
        Self {
            id: EpisodeId(episode.id),
            score: episode.score,
            content: &episode.content,
            data: episode.data.as_ref(),
            tags: &episode.tags,
            reward: episode.reward,
            occurred_at: episode.occurred_at,
            recorded_at: episode.recorded_at,
            turn: episode.turn,
            duplicates: recalled.duplicates,
            duplicate_of: recalled.duplicate_of,
            superseded_at: recalled.superseded_at,
            explain: recalled.explained.into(),
        }
    }
}

/// What was recalled, best first.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Recollection)]
pub struct RecollectionView<'a> {
    pub episodes: Vec<EpisodeView<'a>>,
    /// With `as_of`: how many episodes of then were forgotten since, whatever they said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forgotten: Option<u64>,
    /// Why it was looked for by words alone, where a model server should have helped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub degraded: Option<&'a str>,
}

/// What is kept ready of a memory for a cold start.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = MemoryCheckpoint)]
pub struct CheckpointView {
    /// Parts that were written now.
    pub written: usize,
    /// Parts there are.
    pub parts: usize,
    /// The last turn they cover.
    pub upto: u64,
}

impl From<Checkpoint> for CheckpointView {
    fn from(made: Checkpoint) -> Self {
        Self { written: made.written, parts: made.parts, upto: made.upto }
    }
}

/// Figures of a memory.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = MemoryStats)]
pub struct StatsView {
    /// Episodes known now.
    pub episodes: u64,
    /// Of these, duplicates of another one.
    pub duplicates: u64,
    /// Of these, with next to no words of meaning and no data.
    pub junk: u64,
    /// Superseded by others; only `as_of` finds them.
    pub superseded: u64,
    /// Forgotten; nothing is left of them but when.
    pub forgotten: u64,
    /// Vectors of clients or a model.
    pub embedded: u64,
    /// Numbers of each.
    pub dimension: Option<usize>,
    pub duplicate_rate: f64,
    pub junk_rate: f64,
    /// Mean age of what this node recalled of it lately, in seconds.
    pub staleness_seconds: Option<f64>,
    pub mean_reward: Option<f64>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub oldest: Option<Millis>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub newest: Option<Millis>,
    /// Bytes it takes in this node's memory.
    pub bytes: usize,
    /// Whether vectors are found through an index.
    pub indexed: bool,
}

impl From<Figures> for StatsView {
    #[allow(clippy::cast_precision_loss)] // counts far below 2^53
    fn from(figures: Figures) -> Self {
        let rate = |part: u64| if figures.episodes == 0 { 0.0 } else { part as f64 / figures.episodes as f64 };
        Self {
            episodes: figures.episodes,
            duplicates: figures.duplicates,
            junk: figures.junk,
            superseded: figures.superseded,
            forgotten: figures.forgotten,
            embedded: figures.embedded,
            dimension: figures.dimension,
            duplicate_rate: rate(figures.duplicates),
            junk_rate: rate(figures.junk),
            staleness_seconds: figures.staleness,
            mean_reward: (figures.rewards.1 > 0).then(|| figures.rewards.0 / figures.rewards.1 as f64),
            oldest: figures.oldest,
            newest: figures.newest,
            bytes: figures.bytes,
            indexed: figures.indexed,
        }
    }
}
