//! Instances: profile, listing, forgetting, history and dead letters.
//!
//! Tests: `tests/it/http.rs`.

use actix_web::{
    HttpResponse,
    http::{StatusCode, header::HeaderValue},
    web::Payload,
};

use super::{
    Caller, admission, json_body,
    problem::{Problem, Refusal},
    respond,
    view::{self, Activation, DeadLetterView, InstanceView, ListedView, Page, Status, StatusView, TurnView},
};
use crate::types::{
    InstanceId, InstanceKey, Profile, StimulusId, TurnRecord,
    limits::{MAX_PAGE_BYTES, MAX_PROFILE_BYTES},
};

/// `PUT /v1/instances/{id}`.
///
/// # Errors
/// [`Problem`] when the profile is refused, with where.
pub async fn put(caller: &Caller<'_>, payload: Payload) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    admission::json_type(caller.request.headers(), false)?;
    let bytes = admission::body(caller.request.headers(), payload, &caller.shared.config).await?;
    if bytes.len() > MAX_PROFILE_BYTES {
        return Err(Refusal::ProfileTooLarge.into());
    }
    let profile: Profile = json_body(&bytes)?;
    let created = caller.within_deadline(caller.shared.router.put_profile(&key, profile)).await?;
    show(caller, &key, if created { StatusCode::CREATED } else { StatusCode::OK }).await
}

/// `GET /v1/instances/{id}`.
///
/// # Errors
/// [`Problem`] when there is none.
pub async fn get(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&["consistency"])?;
    show(caller, &key, StatusCode::OK).await
}

async fn show(caller: &Caller<'_>, key: &InstanceKey, status: StatusCode) -> Result<HttpResponse, Problem> {
    let loaded = caller.shared.router.store().load(key).await?;
    if !loaded.exists {
        return Err(Refusal::NoInstance.into());
    }
    let presence = caller.shared.router.presence(key).await;
    let owner = caller.shared.router.owner(key);
    let view = InstanceView {
        id: &key.instance,
        created_at: loaded.created_at,
        profile: loaded.profile.as_deref(),
        turn: loaded.head.turn,
        version: loaded.state.version,
        activation: if presence.active { Activation::Active } else { Activation::Cold },
        node: owner.as_deref().unwrap_or(&caller.shared.node),
        inbox: presence.inbox.max(loaded.inbox.len()),
    };
    Ok(respond(status, view::to_json(&view)))
}

/// `DELETE /v1/instances/{id}`.
///
/// # Errors
/// [`Problem`] when there is none.
pub async fn delete(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    caller.query(&[])?;
    caller.within_deadline(caller.shared.router.forget(&key)).await?;
    Ok(HttpResponse::NoContent().finish())
}

/// `GET /v1/instances`.
///
/// # Errors
/// [`Problem`] when the caller's token is for one instance only.
pub async fn list(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let query = caller.query(&["label", "after", "limit", "consistency"])?;
    if caller.who.instance.is_some() {
        return Err(Refusal::Elsewhere.into());
    }
    let bad_cursor = |_| Refusal::Query { name: "after", why: String::from("must be an instance's id") };
    let after = query.after.as_ref().map(InstanceId::new).transpose().map_err(bad_cursor)?;
    let label = query.label.as_ref().map(|(name, value)| (name.as_str(), value.as_str()));
    let limit = query.limit();
    let store = caller.shared.router.store();
    let listed = store.list(&caller.who.tenant, label, after.as_ref(), limit + 1).await?;
    let shown = listed.get(..limit).unwrap_or(&listed);
    let items = shown.iter().map(|listed| ListedView {
        id: &listed.instance,
        created_at: listed.created_at,
        profile: listed.profile.as_deref(),
    });
    let next = (listed.len() > limit).then(|| shown.last().map(|last| last.instance.to_string())).flatten();
    Ok(respond(StatusCode::OK, view::to_json(&Page { items: items.collect(), next })))
}

/// `GET /v1/instances/{id}/turns`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn turns(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    let query = caller.query(&["after", "limit", "consistency", "epochs"])?;
    let (after, limit) = (query.after_turn()?.unwrap_or(0), query.limit());
    let read = caller.shared.router.store().turns(&key, after, limit + 1).await?;
    if read.is_empty() && caller.shared.router.state(&key).await?.is_none() {
        return Err(Refusal::NoInstance.into());
    }
    let count = fitting(&read, limit);
    let shown = read.get(..count).unwrap_or(&read);
    let next = (read.len() > count).then(|| shown.last().map(|last| last.turn.to_string())).flatten();
    let view = |turn| if query.epochs { TurnView::with_epoch(turn) } else { TurnView::from(turn) };
    let items = shown.iter().map(|turn| view(&**turn)).collect();
    Ok(respond(StatusCode::OK, view::sized_json(&Page { items, next }, count * 512 + 64)))
}

/// How many turns fit one page: at most `limit`, and no more bytes than a page may have, but always one.
fn fitting(turns: &[std::sync::Arc<TurnRecord>], limit: usize) -> usize {
    let mut bytes = 0usize;
    let within = turns.iter().take(limit).take_while(|turn| {
        let reply = turn.reply.as_ref().map_or(0, |reply| {
            reply.content.as_ref().map_or(0, String::len) + reply.data.as_ref().map_or(0, |data| data.get().len())
        });
        bytes += turn.stimulus.weight() + reply;
        bytes <= MAX_PAGE_BYTES
    });
    within.count().max(turns.len().min(1))
}

/// `GET /v1/instances/{id}/dead-letters`.
///
/// # Errors
/// [`Problem`] when there is no such instance.
pub async fn dead_letters(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let key = caller.instance()?;
    let query = caller.query(&["after", "limit", "consistency"])?;
    let bad_cursor = |_| Refusal::Query { name: "after", why: String::from("must be a stimulus's id") };
    let after = query.after.as_ref().map(StimulusId::new).transpose().map_err(bad_cursor)?;
    let limit = query.limit();
    let dead = caller.shared.router.store().dead_letters(&key, after.as_ref(), limit + 1).await?;
    if dead.is_empty() && caller.shared.router.state(&key).await?.is_none() {
        return Err(Refusal::NoInstance.into());
    }
    let shown = dead.get(..limit).unwrap_or(&dead);
    let next = (dead.len() > limit).then(|| shown.last().map(|last| last.stimulus.id.to_string())).flatten();
    let items = shown.iter().map(DeadLetterView::from).collect();
    Ok(respond(StatusCode::OK, view::to_json(&Page { items, next })))
}

/// `POST /v1/instances/{id}/dead-letters/{sid}/retry`.
///
/// # Errors
/// [`Problem`] when there is no such dead letter.
pub async fn retry(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let (key, id) = (caller.instance()?, caller.stimulus()?);
    caller.query(&[])?;
    caller.within_deadline(caller.shared.router.revive(&key, &id)).await?;
    let view = StatusView {
        id: &id,
        instance: &key.instance,
        status: Status::Accepted,
        accepted_at: caller.shared.clock.now(),
        turn: None,
        reason: None,
    };
    let mut response = respond(StatusCode::ACCEPTED, view::to_json(&view));
    if let Ok(location) = HeaderValue::try_from(format!("/v1/stimuli/{id}?instance={}", key.instance)) {
        response.headers_mut().insert(actix_web::http::header::LOCATION, location);
    }
    Ok(response)
}
