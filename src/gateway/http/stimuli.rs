//! Stimuli: sending one, waiting for its turn or following it, and asking what became of it.
//!
//! Invariants: 2xx only after the stimulus is durable; after a timeout the caller is told what is known, never a guess.
//! Tests: `tests/it/http.rs`, `tests/it/hostile.rs`.

use std::time::Duration;

use actix_web::{
    HttpResponse,
    http::{StatusCode, header::HeaderValue},
    web::Payload,
};

use super::{
    Caller, admission,
    follow::{self, Follow, Has, Resume, Words},
    json_body,
    problem::{Problem, Refusal},
    respond, sse,
    tail::{self, Thread},
    view::{self, Status, StatusView},
    wire::StimulusBody,
};
use crate::{
    instance::{Error, Receipt, Until, ears::Ear, events::Watch},
    store::Known,
    types::{InstanceId, InstanceKey, Millis, Stimulus, StimulusId, TurnRecord},
};

/// How long a caller waits that does not say.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// `POST /v1/instances/{id}/stimuli`.
///
/// # Errors
/// [`Problem`]; nothing was accepted unless it is a timeout, a crash, or a dead letter.
pub async fn post(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    let query = caller.query(&["wait"])?;
    admission::json_type(caller.request.headers(), false)?;
    let bytes = admission::body(caller.request.headers(), payload, &caller.shared.config).await?;
    let body: StimulusBody<'_> = json_body(&bytes)?;
    let streamed = caller.wants_events();
    let resume = if streamed { resume(caller)? } else { None };
    let id = agreed_id(caller.idempotency_key()?, body.id(), resume.as_ref())?;
    let mut stimulus = body.into_stimulus(&caller.who, id, caller.shared.clock.now())?;
    stimulus.traceparent = admission::traceparent(caller.request.headers());
    if streamed {
        return stream(caller, key, stimulus, resume).await;
    }
    let longest = Duration::from_secs(caller.shared.config.max_wait_seconds);
    let wait = query.wait.unwrap_or(DEFAULT_WAIT).min(longest);
    if wait.is_zero() {
        accept(caller, &key, stimulus, longest).await
    } else {
        decide(caller, &key, stimulus, wait).await
    }
}

/// The id the caller chose, by whichever way. The stream's resume counts when nothing else is said.
fn agreed_id(
    key: Option<StimulusId>,
    id: Option<&StimulusId>,
    resume: Option<&Resume>,
) -> Result<Option<StimulusId>, Refusal> {
    match (key, id) {
        (Some(key), Some(id)) if key != *id => Err(Refusal::TwoIds { key, id: id.clone() }),
        (Some(key), _) => Ok(Some(key)),
        (None, Some(id)) => Ok(Some(id.clone())),
        (None, None) => Ok(resume.map(|resume| resume.stimulus.clone())),
    }
}

/// Waits until the stimulus is decided, at most `wait`.
async fn decide(
    caller: &Caller<'_>,
    key: &InstanceKey,
    stimulus: Stimulus,
    wait: Duration,
) -> Result<HttpResponse, Problem> {
    let (id, at) = (stimulus.id.clone(), stimulus.accepted_at);
    let delivery = caller.shared.router.deliver(key, stimulus, Until::Decided);
    match tail::wait(caller, key, &id, wait, delivery).await {
        Some(Ok(Receipt::Decided { turn, repeated })) => Ok(decided(&turn, repeated)),
        Some(Ok(Receipt::Accepted { .. })) => Ok(accepted(&key.instance, &id, at, Status::Accepted)),
        Some(Ok(Receipt::Dead(dead))) => Err(follow::dead_letter(key, &dead).into()),
        Some(Err(Error::Timeout(after))) => late(caller, key, &id, after).await,
        Some(Err(error)) => Err(error.into()),
        None => late(caller, key, &id, wait).await,
    }
}

/// Waits until the stimulus is durable and no longer.
async fn accept(
    caller: &Caller<'_>,
    key: &InstanceKey,
    stimulus: Stimulus,
    deadline: Duration,
) -> Result<HttpResponse, Problem> {
    let (id, at) = (stimulus.id.clone(), stimulus.accepted_at);
    match tokio::time::timeout(deadline, caller.shared.router.deliver(key, stimulus, Until::Accepted)).await {
        Ok(Ok(Receipt::Decided { .. })) => Ok(accepted(&key.instance, &id, at, Status::Decided)),
        Ok(Ok(Receipt::Accepted { .. })) => Ok(accepted(&key.instance, &id, at, Status::Accepted)),
        Ok(Ok(Receipt::Dead(_))) => Ok(accepted(&key.instance, &id, at, Status::Dead)),
        Ok(Err(Error::Timeout(after))) => late(caller, key, &id, after).await,
        Ok(Err(error)) => Err(error.into()),
        Err(_) => late(caller, key, &id, deadline).await,
    }
}

/// The wait is over: what is known by now?
async fn late(
    caller: &Caller<'_>,
    key: &InstanceKey,
    id: &StimulusId,
    waited: Duration,
) -> Result<HttpResponse, Problem> {
    match caller.shared.router.store().find(key, id).await? {
        Some(Known::Waiting(stimulus)) => {
            Ok(accepted(&key.instance, id, stimulus.accepted_at, standing(caller, key, id)))
        }
        Some(Known::Decided(turn)) => Ok(decided(&turn, false)),
        Some(Known::Dead(dead)) => Err(follow::dead_letter(key, &dead).into()),
        None => Err(Refusal::Timeout(waited).into()),
    }
}

/// Whether a waiting stimulus is being thought about.
fn standing(caller: &Caller<'_>, key: &InstanceKey, id: &StimulusId) -> Status {
    let draft = caller.shared.router.hub().watch(key).draft.take();
    if draft.is_some_and(|draft| draft.stimulus == *id) { Status::Thinking } else { Status::Accepted }
}

fn decided(turn: &TurnRecord, repeated: bool) -> HttpResponse {
    let mut response = respond(StatusCode::OK, view::turn_json(turn));
    if repeated {
        let name = actix_web::http::header::HeaderName::from_static("idempotent-replayed");
        response.headers_mut().insert(name, HeaderValue::from_static("true"));
    }
    response
}

fn accepted(instance: &InstanceId, id: &StimulusId, at: Millis, status: Status) -> HttpResponse {
    let view = StatusView { id, instance, status, accepted_at: at, turn: None, reason: None };
    let mut response = respond(StatusCode::ACCEPTED, view::to_json(&view));
    // Ids are made of characters that need no escape in a URL.
    if let Ok(location) = HeaderValue::try_from(format!("/v1/stimuli/{id}?instance={instance}")) {
        response.headers_mut().insert(actix_web::http::header::LOCATION, location);
    }
    response
}

/// Sends the stimulus and follows it.
async fn stream(
    caller: &Caller<'_>,
    key: InstanceKey,
    stimulus: Stimulus,
    resume: Option<Resume>,
) -> Result<HttpResponse, Problem> {
    let id = stimulus.id.clone();
    let resume = resume.filter(|resume| resume.stimulus == id);
    if resume.as_ref().is_some_and(|resume| resume.has == Has::Turn) {
        return Ok(HttpResponse::NoContent().finish());
    }
    let watch = caller.shared.router.hub().watch(&key);
    let ear = caller.shared.router.ears().listen(&key, &id, true);
    let known = match known(caller, &key, stimulus, resume.is_some()).await {
        Ok(known) => known,
        Err(problem) => {
            ear.ended();
            return Err(problem);
        }
    };
    Ok(begin(caller, key, ear, (watch, known), id, resume))
}

/// Delivers a stimulus whose sender follows it. One whose stream is resumed is known already, or was never accepted and is
/// sent again.
///
/// # Errors
/// [`Problem`]; it was not accepted unless it is a timeout or a crash.
pub async fn known(
    caller: &Caller<'_>,
    key: &InstanceKey,
    stimulus: Stimulus,
    resumed: bool,
) -> Result<Known, Problem> {
    if resumed && let Some(known) = caller.shared.router.store().find(key, &stimulus.id).await? {
        return Ok(known);
    }
    let deadline = Duration::from_secs(caller.shared.config.max_wait_seconds);
    let delivery = caller.shared.router.deliver(key, stimulus.clone(), Until::Accepted);
    let receipt = tokio::time::timeout(deadline, delivery).await.map_err(|_| Refusal::Timeout(deadline))??;
    Ok(follow::known(receipt, || stimulus))
}

fn begin(
    caller: &Caller<'_>,
    key: InstanceKey,
    ear: Ear,
    (watch, known): (Watch, Known),
    stimulus: StimulusId,
    resume: Option<Resume>,
) -> HttpResponse {
    let (sink, response) = sse::open(&caller.shared.meters, caller.request);
    let follow = Follow {
        thread: Thread::new(caller, key, stimulus, sink, ear),
        words: Words::new(resume.as_ref().map(|resume| resume.has)),
    };
    actix_web::rt::spawn(follow.run(watch, known, resume.is_some()));
    response
}

fn resume(caller: &Caller<'_>) -> Result<Option<Resume>, Refusal> {
    let bad = Refusal::Header { name: "last-event-id", why: "is not the id of an event of this stream" };
    caller.header("last-event-id").map(|id| Resume::parse(id).ok_or(bad)).transpose()
}

/// `GET /v1/stimuli/{sid}`, with `Accept: text/event-stream` as a stream.
///
/// # Errors
/// [`Problem`] when it is unknown, or known to several instances and none is named.
pub async fn get(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let id = caller.stimulus()?;
    let query = caller.query(&["instance", "consistency"])?;
    let instance = match query.instance.or_else(|| caller.who.instance.clone()) {
        Some(instance) => instance,
        None => locate(caller, &id).await?,
    };
    admission::within(&caller.who, &instance)?;
    let key = caller.who.key(instance);
    let streamed = caller.wants_events();
    let watch = streamed.then(|| caller.shared.router.hub().watch(&key));
    let known = caller.shared.router.store().find(&key, &id).await?.ok_or(Refusal::NoStimulus)?;
    match watch {
        None => Ok(respond(StatusCode::OK, status(caller, &key, &known))),
        Some(watch) => {
            let resume = resume(caller)?.filter(|resume| resume.stimulus == id);
            if resume.as_ref().is_some_and(|resume| resume.has == Has::Turn) {
                return Ok(HttpResponse::NoContent().finish());
            }
            let ear = caller.shared.router.ears().listen(&key, &id, false);
            Ok(begin(caller, key, ear, (watch, known), id, resume))
        }
    }
}

async fn locate(caller: &Caller<'_>, id: &StimulusId) -> Result<InstanceId, Problem> {
    let mut found = caller.shared.router.store().locate(&caller.who.tenant, id).await?;
    match found.len() {
        0 => Err(Refusal::NoStimulus.into()),
        1 => Ok(found.remove(0)),
        _ => Err(Refusal::Ambiguous(found).into()),
    }
}

fn status(caller: &Caller<'_>, key: &InstanceKey, known: &Known) -> Vec<u8> {
    let (stimulus, status, turn, reason) = match known {
        Known::Waiting(stimulus) => (&**stimulus, standing(caller, key, &stimulus.id), None, None),
        Known::Decided(turn) => (&turn.stimulus, Status::Decided, Some((&**turn).into()), None),
        Known::Dead(dead) => (&dead.stimulus, Status::Dead, None, Some(&*dead.reason)),
    };
    let accepted_at = stimulus.accepted_at;
    view::to_json(&StatusView { id: &stimulus.id, instance: &key.instance, status, accepted_at, turn, reason })
}
