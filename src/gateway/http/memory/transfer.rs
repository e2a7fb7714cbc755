//! Whole memories out and in, as JSON lines: one episode each, streamed both ways within bounds.
//!
//! Every line has an id; an import remembers what it took by it, so one that broke off is simply sent again. What an exported
//! episode supersedes is named by lines, and found again by them. Tests: `tests/it/memory.rs`.

use std::{collections::HashMap, rc::Rc, time::Duration};

use actix_web::{
    HttpResponse,
    http::{StatusCode, header},
    web::Payload,
};
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::{EpisodeBody, write};
use crate::{
    gateway::http::{
        Caller,
        line::{Hold, Line},
        problem::{Problem, Refusal},
        respond, view,
    },
    memory::Exported,
    types::{
        EpisodeId, InstanceKey, Millis, Priority,
        limits::{MAX_EPISODES, MAX_EPISODES_BYTES, MAX_TAGS},
        memory::Written,
    },
};

/// The type of JSON lines.
const LINES: &str = "application/x-ndjson";
/// Longest line, in bytes.
const MAX_LINE_BYTES: usize = 256 * 1024;
/// Longest id of a line, in bytes.
const MAX_ID_BYTES: usize = 128;

/// A line of an export. An import takes the same, and needs no more than `content` or `data`.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = EpisodeLine)]
pub struct LineBody<'a> {
    /// By which an import knows it again; the content's hash when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(default)]
    content: String,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<serde_json::Value>)]
    data: Option<&'a RawValue>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tags: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    reward: Option<f32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    occurred_at: Option<Millis>,
    /// When it was recorded. An import records it anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    recorded_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedding: Option<Vec<f32>>,
    /// Lines that hold no longer since this one does.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    supersedes: Vec<String>,
}

/// What became of an import.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Imported)]
pub struct ImportedView {
    /// Lines that became episodes now.
    imported: usize,
    /// Lines that had become episodes before.
    known: usize,
}

/// `GET /v1/instances/{id}/memory/export`.
///
/// # Errors
/// [`Problem`] when there is no such instance. A store that fails later breaks the stream off.
pub async fn export(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&["consistency"])?;
    // Whether there is such an instance is said before the stream begins.
    caller.shared.router.memory().figures(&key).await?;
    let router = caller.shared.router.clone();
    let in_hand = caller.request.conn_data::<Rc<Line>>().map(Hold::new);
    let pages = stream::try_unfold(Some(0u64), move |after| {
        let (router, key) = (router.clone(), key.clone());
        let _ = &in_hand; // lives as long as the body does
        async move {
            let Some(after) = after else { return Ok::<_, actix_web::Error>(None) };
            let page = router.memory().export(&key, after).await;
            let (episodes, next) = page.map_err(actix_web::error::ErrorServiceUnavailable)?;
            let mut out = Vec::with_capacity(episodes.len() * 256);
            for exported in &episodes {
                out.extend_from_slice(&view::to_json(&line(exported)));
                out.push(b'\n');
            }
            Ok(Some((Bytes::from(out), next)))
        }
    });
    Ok(HttpResponse::build(StatusCode::OK).insert_header((header::CONTENT_TYPE, LINES)).streaming(pages))
}

fn line(exported: &Exported) -> LineBody<'_> {
    let (episode, extra) = (&exported.episode, &exported.extra);
    LineBody {
        id: Some(EpisodeId(episode.id).to_string()),
        content: episode.content.clone(),
        data: episode.data.as_ref().and_then(|data| serde_json::from_str(data.get()).ok()),
        tags: episode.tags.clone(),
        reward: episode.reward,
        occurred_at: Some(episode.occurred_at),
        recorded_at: Some(episode.recorded_at),
        embedding: extra.embedding.as_ref().map(|vector| vector.numbers().collect()),
        supersedes: extra.supersedes.iter().map(ToString::to_string).collect(),
    }
}

/// `POST /v1/instances/{id}/memory/import`.
///
/// # Errors
/// [`Problem`] names the line; those before it may have been taken, and are known when the import is sent again.
pub async fn import(caller: &Caller<'_>, mut payload: Payload) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    let kind = caller.header("content-type").unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.is_empty() && ![LINES, "application/jsonl", "application/json"].contains(&kind) {
        return Err(Refusal::MediaType("application/x-ndjson").into());
    }
    let wait = Duration::from_secs(caller.shared.config.header_seconds.saturating_mul(2));
    let mut import = Import { caller, key: &key, batch: Vec::new(), bytes: 0, number: 0, imported: 0, known: 0 };
    let mut rest = BytesMut::new();
    loop {
        let next = tokio::time::timeout(wait, payload.next()).await.map_err(|_| Refusal::SlowBody(wait))?;
        let Some(chunk) = next else { break };
        let chunk = chunk.map_err(|error| Refusal::BrokenBody(error.to_string()))?;
        rest.extend_from_slice(&chunk);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line = rest.split_to(end + 1);
            import.take(&line[..end]).await?;
        }
        if rest.len() > MAX_LINE_BYTES {
            return Err(Refusal::TooLarge(MAX_LINE_BYTES).into());
        }
    }
    import.take(&rest).await?;
    import.flush().await?;
    let view = ImportedView { imported: import.imported, known: import.known };
    Ok(respond(StatusCode::OK, view::to_json(&view)))
}

struct Import<'a> {
    caller: &'a Caller<'a>,
    key: &'a InstanceKey,
    batch: Vec<Written>,
    bytes: usize,
    number: usize,
    imported: usize,
    known: usize,
}

impl Import<'_> {
    async fn take(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        self.number += 1;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let number = self.number;
        let bad = |why: String| Refusal::Field(format!("line {number}: {why}"));
        let text = crate::gateway::json::check(bytes).map_err(|error| bad(error.to_string()))?;
        let line: LineBody<'_> = serde_json::from_str(text).map_err(|error| bad(error.to_string()))?;
        let id = line.id.unwrap_or_else(|| blake3::hash(text.trim().as_bytes()).to_hex()[..32].to_owned());
        if id.is_empty() || id.len() > MAX_ID_BYTES || line.supersedes.len() > MAX_TAGS {
            return Err(
                bad(format!("an id of 1 to {MAX_ID_BYTES} bytes, and at most {MAX_TAGS} superseded ones")).into()
            );
        }
        let supersedes = self.found(&line.supersedes).await?;
        let body = EpisodeBody {
            content: Some(line.content),
            data: line.data,
            embedding: line.embedding,
            reward: line.reward,
            tags: line.tags,
            occurred_at: line.occurred_at.or(line.recorded_at),
            supersedes,
        };
        let mut written = body.check().map_err(|refusal| bad(refusal.to_string()))?;
        written.extra.line = Some(id);
        let weight = text.len() + 64;
        if self.bytes + weight > MAX_EPISODES_BYTES || self.batch.len() == MAX_EPISODES {
            self.flush().await?;
        }
        self.bytes += weight;
        self.batch.push(written);
        Ok(())
    }

    /// The episodes that came from these lines, of this import or an earlier one.
    async fn found(&mut self, lines: &[String]) -> Result<Vec<EpisodeId>, Problem> {
        if lines.is_empty() {
            return Ok(Vec::new());
        }
        self.flush().await?;
        let found = self.caller.shared.router.memory().imported(self.key, lines).await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Remembers what was gathered and is not known yet.
    async fn flush(&mut self) -> Result<(), Problem> {
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let lines: Vec<String> = batch.iter().filter_map(|written| written.extra.line.clone()).collect();
        let known = self.caller.shared.router.memory().imported(self.key, &lines).await?;
        let mut fresh: Vec<Written> = Vec::with_capacity(batch.len());
        let mut seen: HashMap<String, ()> = HashMap::new();
        for (written, known) in batch.into_iter().zip(known) {
            let again = written.extra.line.clone().is_some_and(|line| seen.insert(line, ()).is_some());
            if known.is_some() || again {
                self.known += 1;
            } else {
                fresh.push(written);
            }
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let lines: Vec<String> = fresh.iter().filter_map(|written| written.extra.line.clone()).collect();
        let (turn, _) = write(self.caller, self.key, fresh, None, Priority::Background).await?;
        // Another import may have brought the same lines meanwhile: then they are its episodes.
        let now = self.caller.shared.router.memory().imported(self.key, &lines).await?;
        let ours = now.into_iter().flatten().filter(|id| id.turn() == turn.turn).count();
        self.imported += ours;
        self.known += lines.len() - ours;
        Ok(())
    }
}
