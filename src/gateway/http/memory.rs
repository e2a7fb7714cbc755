//! Memory over HTTP: writing episodes, recalling them, making the memory smaller, forgetting, figures.
//!
//! Writing and forgetting are stimuli whose turns are silent: the instance's owner decides them under its fence, wherever it is.
//! What goes is found here, from what was committed when the call came, and named to the owner. Not here: whole memories in
//! and out (`transfer`). Invariants: a batch is remembered whole or not at all; an answer leaves after the commit.
//! Tests: at the foot; `tests/it/memory.rs`.

use std::sync::Arc;

use actix_web::{
    HttpResponse,
    http::{StatusCode, header::HeaderValue},
    web::Payload,
};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{
    Caller, admission, follow, json_body,
    problem::{Problem, Refusal},
    respond,
    view::to_json,
    wire,
};
use crate::{
    instance::{Receipt, Until},
    memory::{Ask, Forget, Known, Prune},
    types::{
        EpisodeId, InstanceKey, Millis, Priority, RawJson, Source, Stimulus, StimulusId, TurnRecord,
        limits::{MAX_DIMENSION, MAX_EPISODE_BYTES, MAX_EPISODES, MAX_FORGOTTEN, MAX_RECALL, MAX_TAG_BYTES, MAX_TAGS},
        memory::{ENGINE, Extra, FORGET_CHANNEL, Forgetting, Vector, WRITE_CHANNEL, Writing, Written},
    },
};

use self::view::{CheckpointView, EpisodeView, IdView, IdsView, RecollectionView, RemovedView, StatsView};

pub mod document;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod transfer;
mod view;

/// Episodes of a recall that does not say how many.
const DEFAULT_TOP: usize = 10;
/// After so many episodes at once it is looked whether a checkpoint is due, though nobody asked.
const MANY: usize = 100;

/// An episode to remember: `content` or `data`, or both.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = EpisodeBody)]
pub struct EpisodeBody<'a> {
    /// Text, by which it is found.
    #[schema(max_length = 65536)]
    content: Option<String>,
    /// Any JSON.
    #[serde(borrow)]
    #[schema(value_type = Option<serde_json::Value>)]
    data: Option<&'a RawValue>,
    /// A vector of a model's. The first of an instance fixes how many numbers all have; only the direction counts.
    #[schema(max_items = 4096)]
    embedding: Option<Vec<f32>>,
    /// How good it was, by your own measure.
    reward: Option<f32>,
    /// Labels to filter by.
    #[serde(default)]
    #[schema(max_items = 32)]
    tags: Vec<String>,
    /// When it happened; when it was recorded, if absent.
    #[schema(value_type = Option<String>, format = DateTime)]
    occurred_at: Option<Millis>,
    /// Ids of episodes that hold no longer since this one does.
    #[serde(default)]
    #[schema(value_type = Vec<String>)]
    supersedes: Vec<EpisodeId>,
}

/// Episodes to remember together.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = EpisodesBody)]
pub struct EpisodesBody<'a> {
    /// In order.
    #[serde(borrow)]
    #[schema(max_items = 1000)]
    episodes: Vec<EpisodeBody<'a>>,
}

/// What to recall: by `query` or `embedding`, or both.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
#[schema(as = RecallBody)]
pub struct RecallBody {
    /// By text.
    query: Option<String>,
    /// By a vector of the same model as those of the episodes.
    embedding: Option<Vec<f32>>,
    /// Most episodes; 10 if absent.
    #[schema(minimum = 1, maximum = 100)]
    top_k: Option<usize>,
    /// Only with at least this reward.
    min_reward: Option<f32>,
    /// Only with one of these tags.
    tags_any: Vec<String>,
    /// Only with all of these tags.
    tags_all: Vec<String>,
    /// Only what happened then or later.
    #[schema(value_type = Option<String>, format = DateTime)]
    after: Option<Millis>,
    /// Only what happened earlier.
    #[schema(value_type = Option<String>, format = DateTime)]
    before: Option<Millis>,
    /// What was known then.
    #[schema(value_type = Option<String>, format = DateTime)]
    as_of: Option<Millis>,
}

/// How to make a memory smaller: one of these.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
#[schema(as = PruneBody)]
pub struct PruneBody {
    /// What happened before goes.
    #[schema(value_type = Option<String>, format = DateTime)]
    older_than: Option<Millis>,
    /// So many stay, the newest.
    keep_newest: Option<usize>,
    /// So many stay, those with the highest rewards.
    keep_best: Option<usize>,
}

/// What to forget: everything that any of these names.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields, default)]
#[schema(as = ForgetBody)]
pub struct ForgetBody {
    /// These episodes.
    #[schema(value_type = Vec<String>)]
    ids: Vec<EpisodeId>,
    /// With one of these tags.
    tags: Vec<String>,
    /// That contain this text, upper or lower case alike.
    text: Option<String>,
}

fn field(name: &str, why: impl std::fmt::Display) -> Refusal {
    Refusal::Field(format!("{name}: {why}"))
}

fn tags(name: &str, tags: &[String]) -> Result<(), Refusal> {
    let bad = |tag: &String| tag.is_empty() || tag.len() > MAX_TAG_BYTES || tag.chars().any(char::is_control);
    if tags.len() > MAX_TAGS || tags.iter().any(bad) {
        return Err(field(
            name,
            format!("at most {MAX_TAGS} of 1 to {MAX_TAG_BYTES} bytes, without control characters"),
        ));
    }
    Ok(())
}

fn vector(numbers: Option<&Vec<f32>>) -> Result<Option<Vector>, Refusal> {
    let Some(numbers) = numbers else { return Ok(None) };
    if numbers.len() > MAX_DIMENSION {
        return Err(field("embedding", format!("at most {MAX_DIMENSION} numbers")));
    }
    let vector = Vector::of(numbers);
    vector.map(Some).ok_or_else(|| field("embedding", "needs finite numbers that are not all zero"))
}

impl EpisodeBody<'_> {
    fn check(self) -> Result<Written, Refusal> {
        let content = self.content.unwrap_or_default();
        if content.trim().is_empty() && self.data.is_none() {
            return Err(field("content", "an episode needs 'content' or 'data'"));
        }
        if content.len() > MAX_EPISODE_BYTES {
            return Err(field("content", format!("at most {MAX_EPISODE_BYTES} bytes")));
        }
        if self.reward.is_some_and(|reward| !reward.is_finite()) {
            return Err(field("reward", "must be a number"));
        }
        if self.supersedes.len() > MAX_TAGS {
            return Err(field("supersedes", format!("at most {MAX_TAGS}")));
        }
        tags("tags", &self.tags)?;
        let data = self.data.map(|data| RawJson::parse(data.get())).transpose();
        let extra =
            Extra { embedding: vector(self.embedding.as_ref())?, supersedes: self.supersedes, ..Extra::default() };
        Ok(Written {
            content,
            data: data.map_err(|error| field("data", error))?,
            tags: self.tags,
            reward: self.reward,
            occurred_at: self.occurred_at.map(|at| at.0),
            extra,
        })
    }
}

impl RecallBody {
    fn check(self) -> Result<Ask, Refusal> {
        let embedding = vector(self.embedding.as_ref())?;
        let query = self.query.filter(|query| !query.trim().is_empty());
        if query.is_none() && embedding.is_none() {
            return Err(field("query", "a recall needs 'query' or 'embedding'"));
        }
        let limit = self.top_k.unwrap_or(DEFAULT_TOP);
        if !(1..=MAX_RECALL).contains(&limit) {
            return Err(field("top_k", format!("must be 1 to {MAX_RECALL}")));
        }
        tags("tags_any", &self.tags_any)?;
        tags("tags_all", &self.tags_all)?;
        let known = Known {
            min_reward: self.min_reward,
            tags_any: self.tags_any,
            tags_all: self.tags_all,
            after: self.after,
            before: self.before,
            as_of: self.as_of,
        };
        Ok(Ask { query, embedding, limit, known })
    }
}

/// `POST /v1/instances/{id}/episodes`.
///
/// # Errors
/// [`Problem`]; nothing was remembered unless it is a timeout.
pub async fn post(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let (key, bytes) = taken(caller, payload).await?;
    let body: EpisodeBody<'_> = json_body(&bytes)?;
    let episodes = vec![body.check()?];
    are_there(caller, &key, &episodes).await?;
    let (turn, repeated) = write(caller, &key, episodes, caller.idempotency_key()?, Priority::Human).await?;
    Ok(remembered(&IdView { id: EpisodeId::new(turn.turn, 0) }, repeated))
}

/// `POST /v1/instances/{id}/episodes/batch`.
///
/// # Errors
/// As [`post`].
pub async fn post_batch(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let (key, bytes) = taken(caller, payload).await?;
    let body: EpisodesBody<'_> = json_body(&bytes)?;
    if body.episodes.is_empty() || body.episodes.len() > MAX_EPISODES {
        return Err(field("episodes", format!("must be 1 to {MAX_EPISODES}")).into());
    }
    let at = |(at, episode): (usize, EpisodeBody<'_>)| {
        episode.check().map_err(|refusal| Refusal::Field(format!("episodes[{at}].{refusal}")))
    };
    let episodes = body.episodes.into_iter().enumerate().map(at).collect::<Result<Vec<_>, _>>()?;
    are_there(caller, &key, &episodes).await?;
    let (turn, repeated) = write(caller, &key, episodes, caller.idempotency_key()?, Priority::Device).await?;
    let ids = (0..turn.episodes.len()).map(|place| EpisodeId::new(turn.turn, place)).collect();
    Ok(remembered(&IdsView { ids }, repeated))
}

fn remembered(view: &impl Serialize, repeated: bool) -> HttpResponse {
    let status = if repeated { StatusCode::OK } else { StatusCode::CREATED };
    let mut response = respond(status, to_json(view));
    if repeated {
        let name = actix_web::http::header::HeaderName::from_static("idempotent-replayed");
        response.headers_mut().insert(name, HeaderValue::from_static("true"));
    }
    response
}

/// The instance and the JSON body of a call.
async fn taken(caller: &Caller<'_>, payload: Payload) -> Result<(InstanceKey, bytes::Bytes), Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    admission::json_type(caller.request.headers(), false)?;
    Ok((key, admission::body(caller.request.headers(), payload, &caller.shared.config).await?))
}

/// Whether what episodes supersede is there: an id that was mistyped would leave what it was to end.
async fn are_there(caller: &Caller<'_>, key: &InstanceKey, episodes: &[Written]) -> Result<(), Problem> {
    let named: Vec<EpisodeId> = episodes.iter().flat_map(|episode| episode.extra.supersedes.iter().copied()).collect();
    if named.is_empty() {
        return Ok(());
    }
    let found = caller.shared.router.memory().recorded_at(key, &named).await?;
    match named.iter().zip(found).find(|(_, at)| at.is_none()) {
        Some((id, _)) => Err(field("supersedes", format!("there is no episode {id}")).into()),
        None => Ok(()),
    }
}

/// Remembers episodes in one turn; the turn, and whether it was decided before.
async fn write(
    caller: &Caller<'_>,
    key: &InstanceKey,
    episodes: Vec<Written>,
    id: Option<StimulusId>,
    priority: Priority,
) -> Result<(Arc<TurnRecord>, bool), Problem> {
    let given = episodes.iter().filter_map(|episode| episode.extra.embedding.as_ref()).map(Vector::dimension);
    let given: std::collections::BTreeSet<usize> = given.collect();
    if let Some(first) = given.first().copied() {
        let has = caller.shared.router.memory().dimension(key).await?.unwrap_or(first);
        if let Some(other) = given.into_iter().find(|dimension| *dimension != has) {
            return Err(crate::memory::Error::Dimension { has, given: other }.into());
        }
    }
    let many = episodes.len() >= MANY;
    let mut stimulus = command(caller, WRITE_CHANNEL, &Writing { episodes })?;
    stimulus.priority = priority;
    if let Some(id) = id {
        stimulus = stimulus.with_repeatable_id(id);
    }
    let written = decided(caller, key, stimulus).await?;
    caller.shared.router.memory().wake(key);
    if many {
        caller.shared.router.memory().grown(key);
    }
    Ok(written)
}

/// Forgets episodes, some in each turn; how many.
async fn remove(caller: &Caller<'_>, key: &InstanceKey, ids: &[EpisodeId]) -> Result<HttpResponse, Problem> {
    let all = caller.shared.router.memory().with_vectors(key, ids.to_vec()).await?;
    for some in all.chunks(MAX_FORGOTTEN) {
        let stimulus = command(caller, FORGET_CHANNEL, &Forgetting::of(some))?;
        decided(caller, key, stimulus).await?;
    }
    // So that nothing of it stays in this node's memory either until somebody asks again.
    caller.shared.router.memory().figures(key).await?;
    Ok(respond(StatusCode::OK, to_json(&RemovedView { removed: ids.len() })))
}

fn command(caller: &Caller<'_>, channel: &str, data: &impl Serialize) -> Result<Stimulus, Refusal> {
    let mut stimulus = Stimulus::empty(Source::Http, wire::channel(channel)?, caller.shared.clock.now());
    stimulus.sender = caller.who.sender().map(str::to_owned);
    stimulus.traceparent = admission::traceparent(caller.request.headers());
    stimulus.data = Some(RawJson::from_serialize(data).map_err(|error| Refusal::Field(error.to_string()))?);
    Ok(stimulus)
}

async fn decided(
    caller: &Caller<'_>,
    key: &InstanceKey,
    stimulus: Stimulus,
) -> Result<(Arc<TurnRecord>, bool), Problem> {
    let channel = stimulus.channel.clone();
    let delivery = caller.shared.router.deliver(key, stimulus, Until::Decided);
    match caller.within_deadline(delivery).await? {
        Receipt::Decided { turn, repeated } if turn.stimulus.channel == channel => {
            if turn.engine == ENGINE {
                Ok((turn, repeated))
            } else {
                Err(Refusal::OldOwner.into())
            }
        }
        Receipt::Decided { .. } => Err(Refusal::Field(String::from("Idempotency-Key: is of another stimulus")).into()),
        Receipt::Dead(dead) => Err(follow::dead_letter(key, &dead).into()),
        Receipt::Accepted { .. } => {
            Err(Refusal::Timeout(std::time::Duration::from_secs(caller.shared.config.max_wait_seconds)).into())
        }
    }
}

/// `POST /v1/instances/{id}/recall`.
///
/// # Errors
/// [`Problem`] when there is no such instance, or the vector has another dimension.
pub async fn recall(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let (key, bytes) = taken(caller, payload).await?;
    let body: RecallBody = json_body(&bytes)?;
    let ask = body.check()?;
    let past = ask.known.as_of.is_some();
    let found = caller.shared.router.memory().search(&key, ask).await?;
    let episodes = found.episodes.iter().map(EpisodeView::from).collect();
    let degraded = found.degraded.as_deref();
    let view = RecollectionView { episodes, forgotten: past.then_some(found.forgotten), degraded };
    Ok(respond(StatusCode::OK, to_json(&view)))
}

/// `POST /v1/instances/{id}/memory/prune`.
///
/// # Errors
/// [`Problem`]; after a timeout a part may be gone, and the call may be repeated.
pub async fn prune(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let (key, bytes) = taken(caller, payload).await?;
    let body: PruneBody = json_body(&bytes)?;
    let prune = match body {
        PruneBody { older_than: Some(time), keep_newest: None, keep_best: None } => Prune::OlderThan(time),
        PruneBody { older_than: None, keep_newest: Some(count), keep_best: None } => Prune::KeepNewest(count),
        PruneBody { older_than: None, keep_newest: None, keep_best: Some(count) } => Prune::KeepBest(count),
        _ => {
            let why = "takes one of 'older_than', 'keep_newest' and 'keep_best'";
            return Err(Refusal::Field(format!("prune {why}")).into());
        }
    };
    let ids = caller.shared.router.memory().to_prune(&key, prune).await?;
    remove(caller, &key, &ids).await
}

/// `POST /v1/instances/{id}/memory/forget`.
///
/// # Errors
/// As [`prune`].
pub async fn forget(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let (key, bytes) = taken(caller, payload).await?;
    let ForgetBody { ids, tags: named, text } = json_body(&bytes)?;
    tags("tags", &named)?;
    if ids.len() > MAX_EPISODES {
        return Err(field("ids", format!("at most {MAX_EPISODES}")).into());
    }
    let text = text.filter(|text| !text.is_empty());
    if ids.is_empty() && named.is_empty() && text.is_none() {
        return Err(Refusal::Field(String::from("forget takes 'ids', 'tags' or 'text'")).into());
    }
    let ids = caller.shared.router.memory().to_forget(&key, Forget { ids, tags: named, text }).await?;
    remove(caller, &key, &ids).await
}

/// `GET /v1/instances/{id}/memory/stats`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn stats(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&["consistency"])?;
    let figures = caller.shared.router.memory().figures(&key).await?;
    Ok(respond(StatusCode::OK, to_json(&StatsView::from(figures))))
}

/// `POST /v1/instances/{id}/memory/checkpoint`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn checkpoint(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    let made = caller.shared.router.memory().checkpoint(&key, true).await?;
    Ok(respond(StatusCode::OK, to_json(&CheckpointView::from(made))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn episode(text: &str) -> Result<Written, String> {
        let body: EpisodeBody<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        body.check().map_err(|refusal| refusal.to_string())
    }

    fn ask(text: &str) -> Result<Ask, String> {
        let body: RecallBody = serde_json::from_str(text).map_err(|error| error.to_string())?;
        body.check().map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn an_episode_is_taken_with_what_it_says() {
        let text = r#"{"content":"it was hot","data":{"a": 1},"embedding":[3,4],"reward":0.5,"tags":["heat"],
            "occurred_at":"2026-11-21T05:10:53.120Z","supersedes":["3-0"]}"#;
        let written = episode(text).unwrap();
        assert_eq!((written.content.as_str(), written.data.unwrap().get()), ("it was hot", r#"{"a": 1}"#));
        assert_eq!(
            (written.occurred_at, written.extra.supersedes),
            (Some(1_795_237_853_120), vec![EpisodeId::new(3, 0)])
        );
        let unit: Vec<f32> = written.extra.embedding.unwrap().numbers().collect();
        assert!((unit[0] - 0.6).abs() < 1e-4 && (unit[1] - 0.8).abs() < 1e-4);
        assert_eq!(ask(r#"{"query":"x"}"#).unwrap().limit, DEFAULT_TOP);
    }

    #[test]
    fn what_cannot_be_remembered_or_asked_is_refused_by_name() {
        let long = format!(r#"{{"content":"{}"}}"#, "x".repeat(MAX_EPISODE_BYTES + 1));
        for (text, word) in [
            ("{}", "content"),
            (r#"{"content":"  "}"#, "content"),
            (r#"{"content":"x","embedding":[0,0]}"#, "embedding"),
            (r#"{"content":"x","embedding":[]}"#, "embedding"),
            (r#"{"content":"x","tags":[""]}"#, "tags"),
            (r#"{"content":"x","supersedes":["three"]}"#, "TURN-PLACE"),
            (r#"{"content":"x","occurred_at":"yesterday"}"#, ""),
            (r#"{"content":"x","other":1}"#, "other"),
            (&long, "bytes"),
        ] {
            assert!(episode(text).unwrap_err().contains(word), "{text:.60}");
        }
        for (text, word) in [
            ("{}", "query"),
            (r#"{"query":" "}"#, "query"),
            (r#"{"query":"x","top_k":0}"#, "top_k"),
            (r#"{"query":"x","top_k":101}"#, "top_k"),
            (r#"{"query":"x","as_of":"then"}"#, ""),
            (r#"{"query":"x","limit":3}"#, "limit"),
        ] {
            assert!(ask(text).unwrap_err().contains(word), "{text}");
        }
    }
}
