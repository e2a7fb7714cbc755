//! The operator's calls: nodes, shards, drain.
//!
//! Tests: `tests/it/cluster_calls.rs`.

use std::collections::HashMap;

use actix_web::{HttpResponse, http::StatusCode};
use serde::Serialize;

use super::{
    Caller,
    problem::{Problem, Refusal},
    respond, route,
    view::{self, Page},
};
use crate::{
    scaling::load_report::Report,
    store::ownership::NodeRow,
    types::{Load, NodeId, Roles},
};

/// A node as operators see it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Node)]
pub struct NodeView<'a> {
    /// Its id: the name, and the life the process has under it.
    #[schema(value_type = String)]
    node: &'a NodeId,
    name: &'a str,
    /// Whether it is the one that answers.
    here: bool,
    /// `live`, `draining`, `gone` (the process) or `expired` (the lease).
    status: &'static str,
    addresses: &'a [String],
    #[schema(value_type = Vec<String>)]
    roles: &'a Roles,
    /// How much it takes compared to others, at present: its `node.weight`, less what it gives up under load.
    weight: u32,
    /// Milliseconds; 0 or less when it is over.
    lease_left_ms: i64,
    /// How many shards it owns.
    shards: usize,
    #[schema(value_type = serde_json::Value)]
    load: Load,
    /// What the node that answers believes of it; absent when it was not heard of for long.
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<ReportView>,
    /// Versions of the cluster's protocol it speaks.
    protocol: String,
}

/// What one node believes of the load of another.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = LoadReport)]
pub struct ReportView {
    busy_permille: u32,
    /// On average over `scaling.load_seconds`.
    average_permille: u32,
    age_ms: u64,
    /// How it came: `own`, `bus` or `row`.
    by: &'static str,
}

impl From<Report> for ReportView {
    fn from(Report { load, average_permille, age, way }: Report) -> Self {
        let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
        Self { busy_permille: load.busy_permille, average_permille, age_ms, by: way.as_str() }
    }
}

/// A shard as operators see it.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Shard)]
pub struct ShardView<'a> {
    shard: u32,
    /// Who owns it; nobody for the moment of a move.
    #[schema(value_type = Option<String>)]
    node: Option<&'a NodeId>,
    /// How often it was taken.
    epoch: u64,
    /// Stimuli other nodes put into the inbox of its instances.
    lodged: u64,
}

/// What a drain began with.
#[derive(Debug, Serialize, utoipa::ToSchema)]
#[schema(as = Drain)]
pub struct DrainView<'a> {
    #[schema(value_type = String)]
    node: &'a NodeId,
    draining: bool,
}

fn status(row: &NodeRow) -> &'static str {
    match row {
        NodeRow { alive: false, .. } => "gone",
        row if row.lease_left <= 0 => "expired",
        NodeRow { draining: true, .. } => "draining",
        _ => "live",
    }
}

/// `GET /v1/cluster/nodes`.
///
/// # Errors
/// [`Problem`] when the rows cannot be read.
pub async fn nodes(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    caller.query(&[])?;
    let operations = &caller.shared.operations;
    let view = operations.view().await?;
    let mut owned: HashMap<&NodeId, usize> = HashMap::new();
    for node in view.shards.iter().filter_map(|shard| shard.node.as_ref()) {
        *owned.entry(node).or_default() += 1;
    }
    let routing = operations.routing();
    let report = |node: &NodeId| routing.peer(node).and_then(|peer| peer.report).map(ReportView::from);
    let items = view.nodes.iter().map(|row| NodeView {
        node: &row.node,
        name: row.node.name(),
        here: row.node == *operations.me(),
        status: status(row),
        addresses: &row.addresses,
        roles: &row.roles,
        weight: row.weight,
        lease_left_ms: row.lease_left,
        shards: owned.get(&row.node).copied().unwrap_or_default(),
        load: row.load,
        report: report(&row.node),
        protocol: row.protocol.to_string(),
    });
    Ok(respond(StatusCode::OK, view::to_json(&Page { items: items.collect(), next: None })))
}

/// `GET /v1/cluster/shards`.
///
/// # Errors
/// [`Problem`] when the rows cannot be read.
pub async fn shards(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    let query = caller.query(&["after", "limit"])?;
    let bad_cursor = |_| Refusal::Query { name: "after", why: String::from("must be a shard's number") };
    let after: Option<u32> = query.after.as_ref().map(|text| text.parse().map_err(bad_cursor)).transpose()?;
    let view = caller.shared.operations.view().await?;
    let mut rest = view.shards.iter().filter(|row| after.is_none_or(|after| row.shard > after));
    let shown: Vec<_> = rest.by_ref().take(query.limit()).collect();
    let more = rest.next().is_some();
    let next = shown.last().filter(|_| more).map(|last| last.shard.to_string());
    let items = shown.iter().map(|row| ShardView {
        shard: row.shard,
        node: row.node.as_ref(),
        epoch: row.epoch,
        lodged: row.lodged,
    });
    Ok(respond(StatusCode::OK, view::to_json(&Page { items: items.collect(), next })))
}

/// `POST /v1/cluster/nodes/{node}/drain`.
///
/// # Errors
/// [`Problem`] when there is no such node.
pub async fn drain(caller: &Caller<'_>) -> Result<HttpResponse, Problem> {
    caller.query(&[])?;
    let node = route::decode(caller.found.id, false).ok_or(Refusal::Escape)?;
    let node = caller.shared.operations.drain(&node).await?;
    Ok(respond(StatusCode::ACCEPTED, view::to_json(&DrainView { node: &node, draining: true })))
}
