//! The door for clients of the OpenAI chat protocol: an instance is a model, and the conversation lives in the instance.
//!
//! Owns: `POST /v1/chat/completions`, `GET /v1/models` and, in `embeddings.rs`, `POST /v1/embeddings`. `wire.rs` reads requests and writes answers,
//! `asked.rs` looks at what they ask for, `stream.rs` follows an answer. The last message becomes the stimulus, in the instance's channel `chat`; earlier ones are taken only into an
//! instance that has no history. Invariants: an answer leaves after the commit of its turn; every refusal has the protocol's
//! form. Tests: at the foot of `wire.rs`; `tests/it/openai.rs`, with the official client.

mod asked;
pub(super) mod document;
pub mod embeddings;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod stream;
pub(super) mod wire;

use std::time::Duration;

use actix_web::{HttpResponse, http::StatusCode, web::Payload};

use super::{
    Caller, admission, follow, json_body,
    problem::{Problem, Refusal},
    respond, route, sse, stimuli,
    tail::{self, Thread},
    view,
};
use crate::{
    instance::{Error, Receipt, Until},
    store::Known,
    types::{InstanceId, Stimulus, limits::MAX_PAGE},
};
pub use wire::refused;
use wire::{Completion, ModelView, Models, Request};

/// The channel of what comes in here.
const CHANNEL: &str = "chat";

/// `POST /v1/chat/completions`.
///
/// # Errors
/// [`Problem`]; nothing was accepted unless it is a timeout, a crash, or a dead letter.
pub async fn complete(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    caller.query(&[])?;
    admission::json_type(caller.request.headers(), false)?;
    let bytes = admission::body(caller.request.headers(), payload, &caller.shared.config).await?;
    let request: Request = json_body(&bytes)?;
    let instance = model(caller, &request.model)?;
    let key = caller.who.key(instance);
    let resume = caller.header("last-event-id").map(|id| {
        stream::Resume::parse(id).ok_or(Refusal::Header { name: "last-event-id", why: "is not the id of a chunk" })
    });
    let resume = resume.transpose()?;
    let id = caller.idempotency_key()?.or_else(|| resume.as_ref().map(|resume| resume.stimulus.clone()));
    let store = caller.shared.router.store();
    // Only who has no history is told one.
    let is_new = request.has_earlier() && store.turns(&key, 0, 1).await?.is_empty();
    let usage = request.wants_usage();
    let streamed = request.stream.unwrap_or(false);
    let mut stimulus = request.into_stimulus(&caller.who, id, is_new, caller.shared.clock.now())?;
    stimulus.traceparent = admission::traceparent(caller.request.headers());
    let form = wire::Form::new(&key.instance, &stimulus.id, stimulus.accepted_at);
    if !streamed {
        return decide(caller, &key, stimulus, &form).await;
    }
    let watch = caller.shared.router.hub().watch(&key);
    let ear = caller.shared.router.ears().listen(&key, &stimulus.id, true);
    let known = match stimuli::known(caller, &key, stimulus.clone(), resume.is_some()).await {
        Ok(known) => known,
        Err(problem) => {
            ear.ended();
            return Err(problem);
        }
    };
    let (sink, response) = sse::open(&caller.shared.meters, caller.request);
    let talk = stream::Talk {
        thread: Thread::new(caller, key, stimulus.id, sink, ear),
        form,
        usage,
        said: resume.as_ref().map(|resume| resume.said).unwrap_or_default(),
        draft: stream::Draft::default(),
    };
    actix_web::rt::spawn(talk.run(watch, known, resume.is_some()));
    Ok(response)
}

/// The instance a model's name means, when the caller may touch it.
fn model(caller: &Caller<'_>, name: &str) -> Result<InstanceId, Refusal> {
    let id = InstanceId::new(name).map_err(|error| Refusal::Id { place: "model", error })?;
    admission::within(&caller.who, &id)?;
    Ok(id)
}

/// Waits for the turn as long as the node waits for anything.
async fn decide(
    caller: &Caller<'_>,
    key: &crate::types::InstanceKey,
    stimulus: Stimulus,
    form: &wire::Form,
) -> Result<HttpResponse, Problem> {
    let wait = Duration::from_secs(caller.shared.config.max_wait_seconds);
    let id = stimulus.id.clone();
    let delivery = caller.shared.router.deliver(key, stimulus, Until::Decided);
    let receipt = match tail::wait(caller, key, &id, wait, delivery).await {
        Some(Ok(receipt)) => Some(receipt),
        Some(Err(Error::Timeout(_))) | None => None,
        Some(Err(error)) => return Err(error.into()),
    };
    let known = match receipt {
        Some(Receipt::Decided { turn, .. }) => Some(Known::Decided(turn)),
        Some(Receipt::Dead(dead)) => Some(Known::Dead(dead)),
        Some(Receipt::Accepted { .. }) | None => caller.shared.router.store().find(key, &id).await?,
    };
    match known {
        Some(Known::Decided(turn)) => {
            wire::Answer::is_there(&turn)?;
            Ok(respond(StatusCode::OK, view::to_json(&Completion::of(form, &turn))))
        }
        Some(Known::Dead(dead)) => Err(follow::dead_letter(key, &dead).into()),
        Some(Known::Waiting(_)) | None => Err(Refusal::Timeout(wait).into()),
    }
}

/// `GET /v1/models`.
///
/// # Errors
/// [`Problem`] when the store fails.
pub async fn models(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let query = caller.query(&["after", "limit"])?;
    let bad_cursor = |_| Refusal::Query { name: "after", why: String::from("must be an instance's id") };
    let after = query.after.as_ref().map(InstanceId::new).transpose().map_err(bad_cursor)?;
    let limit = query.limit.unwrap_or(MAX_PAGE);
    let tenant = &caller.who.tenant;
    let mut listed = caller.shared.router.store().list(tenant, None, after.as_ref(), limit + 1).await?;
    let has_more = listed.len() > limit;
    listed.truncate(limit);
    // A token for one instance sees that one.
    listed.retain(|listed| admission::within(&caller.who, &listed.instance).is_ok());
    let data = listed.iter().map(|listed| ModelView::of(&listed.instance, listed.created_at, tenant)).collect();
    Ok(respond(StatusCode::OK, view::to_json(&Models { object: "list", data, has_more })))
}

/// `GET /v1/models/{id}`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn one_model(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    caller.query(&[])?;
    let name = route::decode(caller.found.id, false).ok_or(Refusal::Escape)?;
    let key = caller.who.key(model(caller, &name)?);
    let loaded = caller.shared.router.store().load(&key).await?;
    if !loaded.exists {
        return Err(Refusal::NoInstance.into());
    }
    let created = loaded.created_at.unwrap_or(caller.shared.clock.now());
    let view = ModelView::of(&key.instance, created, &key.tenant);
    Ok(respond(StatusCode::OK, view::to_json(&view)))
}
