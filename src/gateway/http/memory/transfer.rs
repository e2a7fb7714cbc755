//! Whole memories out and in, as JSON lines: one episode each, streamed both ways within bounds.
//!
//! Every line has an id, and one of an export names the memory it is from: together they are one line's alone, whichever exports
//! come together in one memory. An import remembers what it took by them, so one that broke off is simply sent again, and a
//! memory knows its own lines. What an exported episode supersedes is named by lines, and found again by them.
//! Tests: `tests/it/memory.rs`.

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
        strict,
    },
};

/// The type of JSON lines.
const LINES: &str = "application/x-ndjson";
/// What a line may have beyond the largest body of an episode, in bytes: a vector is longer as it is exported than as it came.
const MAX_BESIDE_BYTES: usize = 128 * 1024;
/// Longest id of a line, and longest name of a memory, in bytes.
const MAX_ID_BYTES: usize = 128;
/// What some programs put before a text.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// A line of an export. An import takes the same, and needs no more than `content` or `data`.
#[derive(Debug, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = EpisodeLine)]
pub struct LineBody<'a> {
    /// By which an import knows it again; the content's hash when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// Which memory the id is of, as its export says; ids of different memories are never the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
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
    let name = name(caller, &key).await?;
    let router = caller.shared.router.clone();
    let in_hand = caller.request.conn_data::<Rc<Line>>().map(Hold::new);
    let pages = stream::try_unfold(Some(0u64), move |after| {
        let (router, key, name) = (router.clone(), key.clone(), name.clone());
        let _ = &in_hand; // lives as long as the body does
        async move {
            let Some(after) = after else { return Ok::<_, actix_web::Error>(None) };
            let page = router.memory().export(&key, after).await;
            let (episodes, next) = page.map_err(actix_web::error::ErrorServiceUnavailable)?;
            let mut out = Vec::with_capacity(episodes.len() * 256);
            for exported in &episodes {
                out.extend_from_slice(&view::to_json(&line(exported, name.as_deref())));
                out.push(b'\n');
            }
            Ok(Some((Bytes::from(out), next)))
        }
    });
    Ok(HttpResponse::build(StatusCode::OK).insert_header((header::CONTENT_TYPE, LINES)).streaming(pages))
}

/// Tells a memory from all others: whose it is, and since when. Whoever it is given to learns neither.
async fn name(caller: &Caller<'_>, key: &InstanceKey) -> Result<Option<String>, Problem> {
    let created = caller.shared.router.store().load(key).await?.created_at;
    let whose = |at: Millis| format!("{}/{}/{}", key.tenant, key.instance, at.0);
    Ok(created.map(|at| blake3::hash(whose(at).as_bytes()).to_hex()[..16].to_owned()))
}

fn line<'e>(exported: &'e Exported, name: Option<&str>) -> LineBody<'e> {
    let (episode, extra) = (&exported.episode, &exported.extra);
    LineBody {
        id: Some(EpisodeId(episode.id).to_string()),
        memory: name.map(str::to_owned),
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
    let name = name(caller, &key).await?;
    let longest = caller.shared.config.max_body_kb.saturating_mul(1024).saturating_add(MAX_BESIDE_BYTES);
    let mut import = Import { caller, key: &key, name, batch: Vec::new(), bytes: 0, number: 0, imported: 0, known: 0 };
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
        if rest.len() > longest {
            return Err(import
                .bad(import.number + 1, &format!("longer than {longest} bytes, or no lines at all"))
                .into());
        }
    }
    import.take(&rest).await?;
    import.flush().await?;
    let view = ImportedView { imported: import.imported, known: import.known };
    Ok(respond(StatusCode::OK, view::to_json(&view)))
}

/// By which a line is known again.
fn known_as(memory: Option<&str>, id: &str) -> String {
    memory.map_or_else(|| id.to_owned(), |memory| format!("{memory}/{id}"))
}

struct Import<'a> {
    caller: &'a Caller<'a>,
    key: &'a InstanceKey,
    /// Of this memory, if there is one yet.
    name: Option<String>,
    batch: Vec<Written>,
    bytes: usize,
    number: usize,
    imported: usize,
    known: usize,
}

impl Import<'_> {
    /// What is wrong with a line, and how far the import came.
    fn bad(&self, number: usize, why: &str) -> Refusal {
        let done = self.imported + self.known;
        Refusal::Field(format!(
            "line {number}: {why} ({done} lines before it are in; what is in is known when it is sent again)"
        ))
    }

    async fn take(&mut self, bytes: &[u8]) -> Result<(), Problem> {
        self.number += 1;
        let number = self.number;
        let bytes = bytes.strip_prefix(MARK).filter(|_| number == 1).unwrap_or(bytes);
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let text = strict::check(bytes).map_err(|error| self.bad(number, &error.to_string()))?;
        if !text.trim_start().starts_with('{') {
            return Err(self.bad(number, "is no JSON object: one episode a line").into());
        }
        let line: LineBody<'_> = serde_json::from_str(text).map_err(|error| self.bad(number, &error.to_string()))?;
        let id = line.id.unwrap_or_else(|| blake3::hash(text.trim().as_bytes()).to_hex()[..32].to_owned());
        let named = |text: &str| !text.is_empty() && text.len() <= MAX_ID_BYTES;
        if !named(&id) || !line.memory.as_deref().is_none_or(named) || line.supersedes.len() > MAX_TAGS {
            let why =
                format!("id and memory have 1 to {MAX_ID_BYTES} bytes, and at most {MAX_TAGS} lines are superseded");
            return Err(self.bad(number, &why).into());
        }
        if self.is_own(line.memory.as_deref(), &id, line.recorded_at).await? {
            self.known += 1;
            return Ok(());
        }
        let supersedes = self.found(line.memory.as_deref(), &line.supersedes).await?;
        let body = EpisodeBody {
            content: Some(line.content),
            data: line.data,
            embedding: line.embedding,
            reward: line.reward,
            tags: line.tags,
            occurred_at: line.occurred_at.or(line.recorded_at),
            supersedes,
        };
        let mut written = body.check().map_err(|refusal| self.bad(number, &refusal.to_string()))?;
        written.extra.line = Some(known_as(line.memory.as_deref(), &id));
        let weight = text.len() + 64;
        if self.bytes + weight > MAX_EPISODES_BYTES || self.batch.len() == MAX_EPISODES {
            self.flush().await?;
        }
        self.bytes += weight;
        self.batch.push(written);
        Ok(())
    }

    /// Whether a line is of this very memory, and its episode still there, or forgotten since: it does not come back this way.
    async fn is_own(&self, memory: Option<&str>, id: &str, recorded: Option<Millis>) -> Result<bool, Problem> {
        let (Some(memory), Ok(id), Some(recorded)) = (memory, id.parse::<EpisodeId>(), recorded) else {
            return Ok(false);
        };
        if self.name.as_deref() != Some(memory) {
            return Ok(false);
        }
        // An older copy of the store may have given the id to another episode since.
        let found = self.caller.shared.router.memory().recorded_at(self.key, &[id]).await?;
        Ok(found.first().is_some_and(|at| *at == Some(recorded)))
    }

    /// The episodes that came from these lines of a memory, of this import or an earlier one, or that they are.
    async fn found(&mut self, memory: Option<&str>, ids: &[String]) -> Result<Vec<EpisodeId>, Problem> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        self.flush().await?;
        let memories = self.caller.shared.router.memory();
        let lines: Vec<String> = ids.iter().map(|id| known_as(memory, id)).collect();
        let mut found: Vec<EpisodeId> = memories.imported(self.key, &lines).await?.into_iter().flatten().collect();
        if memory.is_some() && self.name.as_deref() == memory {
            let own: Vec<EpisodeId> = ids.iter().filter_map(|id| id.parse().ok()).collect();
            let there = memories.recorded_at(self.key, &own).await?;
            found.extend(own.into_iter().zip(there).filter_map(|(id, at)| at.map(|_| id)));
        }
        Ok(found)
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
