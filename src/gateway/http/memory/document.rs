//! The memory calls as the API document describes them. Descriptions only: `openapi.rs` gathers them.

use super::{
    EpisodeBody, EpisodesBody, ForgetBody, PruneBody, RecallBody,
    transfer::{ImportedView, LineBody},
    view::{CheckpointView, IdView, IdsView, RecollectionView, RemovedView, StatsView},
};

/// Remember an episode. No model is asked. An unknown instance is created.
#[utoipa::path(post, path = "/v1/instances/{id}/episodes", tag = "memory",
    params(
        ("id" = String, Path, description = "The instance"),
        ("Idempotency-Key" = Option<String>, Header, description = "An id by which a repeat is recognised"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context")
    ),
    request_body(content = EpisodeBody, content_type = "application/json",
        example = json!({"content": "Ann prefers tea.", "tags": ["drinks"], "reward": 0.5})),
    responses(
        (status = 200, description = "Remembered before under this key", body = IdView),
        (status = 201, description = "Remembered", body = IdView)
    ))]
#[allow(dead_code)]
pub fn post_episode() {}

/// Remember up to 1000 episodes, all of them or none.
#[utoipa::path(post, path = "/v1/instances/{id}/episodes/batch", tag = "memory",
    params(
        ("id" = String, Path, description = "The instance"),
        ("Idempotency-Key" = Option<String>, Header, description = "An id by which a repeat is recognised"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context")
    ),
    request_body(content = EpisodesBody, content_type = "application/json"),
    responses(
        (status = 200, description = "Remembered before under this key", body = IdsView),
        (status = 201, description = "Remembered", body = IdsView)
    ))]
#[allow(dead_code)]
pub fn post_episodes() {}

/// Recall episodes by text, by a vector, or both: the rankings by words and by vectors are fused, then weighed by recency and
/// reward. Filters are exact. Sees everything that was remembered before the call.
#[utoipa::path(post, path = "/v1/instances/{id}/recall", tag = "memory",
    params(("id" = String, Path, description = "The instance")),
    request_body(content = RecallBody, content_type = "application/json",
        example = json!({"query": "what does Ann drink?", "top_k": 3})),
    responses((status = 200, description = "What fits, best first", body = RecollectionView)))]
#[allow(dead_code)]
pub fn recall() {}

/// Make the memory smaller. What goes is gone as if it had been forgotten.
#[utoipa::path(post, path = "/v1/instances/{id}/memory/prune", tag = "memory",
    params(("id" = String, Path, description = "The instance")),
    request_body(content = PruneBody, content_type = "application/json", example = json!({"keep_newest": 10000})),
    responses((status = 200, description = "Gone", body = RemovedView)))]
#[allow(dead_code)]
pub fn prune() {}

/// Forget episodes everywhere: records of turns, words, vectors. What was said to the instance stays in its history.
#[utoipa::path(post, path = "/v1/instances/{id}/memory/forget", tag = "memory",
    params(("id" = String, Path, description = "The instance")),
    request_body(content = ForgetBody, content_type = "application/json", example = json!({"tags": ["ann"]})),
    responses((status = 200, description = "Forgotten", body = RemovedView)))]
#[allow(dead_code)]
pub fn forget() {}

/// Figures of a memory: how much, how good.
#[utoipa::path(get, path = "/v1/instances/{id}/memory/stats", tag = "memory",
    params(
        ("id" = String, Path, description = "The instance"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses((status = 200, description = "The figures", body = StatsView)))]
#[allow(dead_code)]
pub fn memory_stats() {}

/// Export a memory as JSON lines, oldest first.
#[utoipa::path(get, path = "/v1/instances/{id}/memory/export", tag = "memory",
    params(
        ("id" = String, Path, description = "The instance"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses((status = 200, description = "A line for each episode", body = LineBody,
        content_type = "application/x-ndjson")))]
#[allow(dead_code)]
pub fn export_memory() {}

/// Import episodes from JSON lines, as an export makes them. Lines that were imported before are known by their ids and left
/// out, so an import that broke off is sent again.
#[utoipa::path(post, path = "/v1/instances/{id}/memory/import", tag = "memory",
    params(("id" = String, Path, description = "The instance")),
    request_body(content(
        (LineBody = "application/x-ndjson"),
        (LineBody = "application/jsonl")
    )),
    responses((status = 200, description = "Taken", body = ImportedView)))]
#[allow(dead_code)]
pub fn import_memory() {}

/// Keep in the store what recall is made of, up to the last turn, so that a cold start need not read the log. Nodes do so by
/// themselves when enough was remembered.
#[utoipa::path(post, path = "/v1/instances/{id}/memory/checkpoint", tag = "memory",
    params(("id" = String, Path, description = "The instance")),
    responses((status = 200, description = "Kept", body = CheckpointView)))]
#[allow(dead_code)]
pub fn checkpoint() {}
