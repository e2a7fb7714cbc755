//! What the tiers of this node's cache hold under a key, for operators.
//!
//! Tests: `tests/it/cache.rs`.

use actix_web::{HttpResponse, http::StatusCode};
use serde::Serialize;

use super::{
    Caller,
    problem::{Problem, Refusal},
    respond,
    view::{self, Page},
};
use crate::scaling::cache::{Found, Kind, Slot};

/// What a tier holds.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Cached)]
pub struct CachedView {
    /// `l1`, `l2` or `l3`.
    tier: &'static str,
    /// The version of what it was made from; 0 where the key says it all.
    version: u64,
    age_ms: i64,
    /// For how long it is fresh; negative when it is not any more.
    fresh_ms: i64,
    bytes: u64,
    /// Whether it says that there is nothing.
    negative: bool,
    /// Of states: whether this process vouches for it.
    sealed: bool,
}

impl From<Found> for CachedView {
    fn from(found: Found) -> Self {
        let Found { tier, version, age_ms, fresh_ms, bytes, negative, sealed } = found;
        Self { tier, version, age_ms, fresh_ms, bytes, negative, sealed }
    }
}

/// `GET /v1/cache`.
///
/// # Errors
/// [`Problem`] when the key is none.
pub async fn inspect(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let query = caller.query(&["key"])?;
    if caller.who.instance.is_some() {
        return Err(Refusal::Elsewhere.into());
    }
    let bad = || Refusal::Query {
        name: "key",
        why: format!("is TYPE/ID, with a type of {}", Kind::ALL.map(Kind::name).join(", ")),
    };
    let key = query.key.as_deref().ok_or_else(bad)?;
    let (kind, id) = key.split_once('/').ok_or_else(bad)?;
    let kind = Kind::named(kind).ok_or_else(bad)?;
    let slot = Slot::new(kind, &caller.who.tenant, id);
    let found = caller.shared.router.environment().cache.inspect(&slot).await;
    let items = found.into_iter().map(CachedView::from).collect();
    Ok(respond(StatusCode::OK, view::to_json(&Page { items, next: None })))
}
