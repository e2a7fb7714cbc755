//! The API document (OpenAPI 3.1), generated from these descriptions and the types of `wire.rs` and `view.rs`.
//!
//! Owns: what `/openapi.json` says. The functions here are descriptions only; `mod.rs` serves the calls. Errors that calls
//! have in common are added by rule, so that no status is undocumented.
//! Tests: at the foot, that the document and the table of calls say the same.

use utoipa::{
    Modify, OpenApi,
    openapi::{
        Content, Ref, RefOr, ResponseBuilder,
        path::{Operation, PathItem},
        security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
    },
};

use super::{
    cache::CachedView,
    chat::{
        document::{ChatBody, ChatError, EmbeddingsAnswer, EmbeddingsBody},
        wire::{Completion, ModelView, Models},
    },
    cluster::{DrainView, NodeView, ShardView},
    memory::document,
    problem::ProblemView,
    view::{DeadLetterView, InstanceView, ListedView, Page, StateView, StatusView, TurnView},
    wire::{StatePatchBody, StimulusBody},
};
use crate::types::Profile;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Sophont",
        description = "Durable instances: send stimuli, read turns and state, follow what happens. Ids are 1 to 128 of \
                       `A-Z a-z 0-9 . _ ~ -`, times RFC 3339, errors problem details (RFC 9457) with a stable `code` and \
                       a `hint`. Refusals that may be repeated carry `Retry-After`. Every answer has `x-request-id`; \
                       `traceparent` is taken and passed on. Unknown fields and query parameters are refused.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    paths(
        list_instances, put_instance, get_instance, delete_instance, post_stimulus, get_stimulus, get_turns, get_events,
        get_state, patch_state, document::post_episode, document::post_episodes, document::recall, document::prune,
        document::forget, document::memory_stats, document::export_memory, document::import_memory, document::checkpoint, get_dead_letters, retry_dead_letter,
        chat_completions, embeddings, list_models, get_model, cluster_nodes, cluster_shards, drain_node, inspect_cache,
        live, ready, metrics, openapi, docs, start
    ),
    components(schemas(ProblemView, ChatError)),
    modifiers(&Common),
    tags(
        (name = "instances", description = "Who there is"),
        (name = "stimuli", description = "What they are told"),
        (name = "history", description = "What they decided"),
        (name = "state", description = "The twin: desired, reported, delta"),
        (name = "memory", description = "What they remember"),
        (name = "chat", description = "The OpenAI chat protocol: an instance is a model"),
        (name = "cluster", description = "Nodes and shards, for operators"),
        (name = "node", description = "Health, metrics, documents")
    )
)]
struct Document;

/// Adds what calls have in common: their errors, their credentials, the headers of every answer.
struct Common;

const EVERYWHERE: [(&str, &str); 3] = [
    ("400", "The request cannot be taken as it is; `code` and `detail` say what is wrong"),
    ("500", "A fault of the node"),
    ("503", "Overloaded, draining, or something the node needs does not answer; repeat after `Retry-After`"),
];
const WITH_CALLER: [(&str, &str); 3] = [
    ("401", "No token, or a wrong one"),
    ("403", "The token does not grant this"),
    ("504", "No answer in time; repeat with the same id"),
];
const WITH_BODY: [(&str, &str); 3] = [
    ("408", "The body did not arrive in time"),
    ("413", "The body is too large"),
    ("415", "The body has another type than the call takes"),
];

impl Modify for Common {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        for (path, item) in &mut document.paths.paths {
            for operation in operations(item) {
                describe(path, operation);
            }
        }
    }
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch].into_iter().flatten()
}

fn describe(path: &str, operation: &mut Operation) {
    let is_chat = ["/v1/chat/", "/v1/embeddings", "/v1/models"].iter().any(|begin| path.starts_with(begin));
    let mut errors = EVERYWHERE.to_vec();
    if path.starts_with("/v1/") || path == "/metrics" {
        errors.extend(WITH_CALLER);
        operation.security =
            Some(vec![SecurityRequirement::default(), SecurityRequirement::new::<_, [&str; 0], &str>("token", [])]);
    }
    if path.contains("{id}") || path.contains("{sid}") || path.contains("{node}") || path == "/docs" {
        errors.push(("404", "There is no such thing"));
    }
    if operation.request_body.is_some() {
        errors.extend(WITH_BODY);
    }
    for (status, description) in errors {
        let refusal = if is_chat { chat_error } else { problem };
        operation.responses.responses.entry(status.to_owned()).or_insert_with(|| refusal(description));
    }
}

fn problem(description: &str) -> RefOr<utoipa::openapi::Response> {
    let content = Content::builder().schema(Some(Ref::from_schema_name("Problem"))).build();
    ResponseBuilder::new().description(description).content("application/problem+json", content).build().into()
}

fn chat_error(description: &str) -> RefOr<utoipa::openapi::Response> {
    let content = Content::builder().schema(Some(Ref::from_schema_name("ChatError"))).build();
    ResponseBuilder::new().description(description).content("application/json", content).build().into()
}

/// The document as JSON.
pub fn document() -> String {
    let mut document = Document::openapi();
    document.info.version = env!("CARGO_PKG_VERSION").to_owned();
    document.to_json().unwrap_or_else(|error| {
        tracing::error!(%error, "the API document cannot be written");
        String::from("{}")
    })
}

/// List instances in the order of their ids.
#[utoipa::path(get, path = "/v1/instances", tag = "instances",
    params(
        ("label" = Option<String>, Query, description = "`NAME=VALUE`: only instances whose profile has this label"),
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Items of the page, 100 if absent"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses((status = 200, description = "A page", body = Page<ListedView>)))]
#[allow(dead_code)]
fn list_instances() {}

/// Create an instance or replace its profile. Rules are checked; a bad one is refused with its place.
#[utoipa::path(put, path = "/v1/instances/{id}", tag = "instances",
    params(("id" = String, Path, description = "The instance")),
    request_body(content = Profile, content_type = "application/json"),
    responses(
        (status = 200, description = "Replaced", body = InstanceView),
        (status = 201, description = "Created", body = InstanceView)
    ))]
#[allow(dead_code)]
fn put_instance() {}

/// Read an instance: profile, state version, whether it is in memory and where, stimuli waiting.
#[utoipa::path(get, path = "/v1/instances/{id}", tag = "instances",
    params(
        ("id" = String, Path, description = "The instance"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses((status = 200, description = "The instance", body = InstanceView)))]
#[allow(dead_code)]
fn get_instance() {}

/// Forget everything about an instance: profile, turns, state, memory, what waits and what was given up.
#[utoipa::path(delete, path = "/v1/instances/{id}", tag = "instances",
    params(("id" = String, Path, description = "The instance")),
    responses((status = 204, description = "Forgotten")))]
#[allow(dead_code)]
fn delete_instance() {}

/// Send a stimulus. An unknown instance is created. The answer leaves after the commit: 200 with the turn when it is decided
/// within `wait`, else 202. With `Accept: text/event-stream` the answer is a stream of `accepted`, `step`, `token`, `turn`
/// or `error`; `Last-Event-ID` with the same stimulus id resumes it, 204 when there is nothing left to say.
#[utoipa::path(post, path = "/v1/instances/{id}/stimuli", tag = "stimuli",
    params(
        ("id" = String, Path, description = "The instance"),
        ("wait" = Option<f64>, Query, minimum = 0, description = "Seconds to wait for the decision: 30 if absent, 0 for \
            none, at most the node's `http.max_wait_seconds`"),
        ("Idempotency-Key" = Option<String>, Header, description = "The stimulus's id, as `id` in the body"),
        ("Last-Event-ID" = Option<String>, Header, description = "Where a stream broke off"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context")
    ),
    request_body(content = StimulusBody, content_type = "application/json",
        example = json!({"content": "It is getting dark.", "id": "msg-1"})),
    responses(
        (status = 200, description = "Decided; `idempotent-replayed: true` when this id was decided before. Or a stream",
            content((TurnView = "application/json"), (String = "text/event-stream"))),
        (status = 202, description = "Durably accepted", body = StatusView,
            headers(("Location" = String, description = "Where to ask for it"))),
        (status = 204, description = "The resumed stream has nothing left to say"),
        (status = 422, description = "Given up: it is in the dead letters", body = ProblemView,
            content_type = "application/problem+json")
    ))]
#[allow(dead_code)]
fn post_stimulus() {}

/// Ask what became of a stimulus; with `Accept: text/event-stream` follow it.
#[utoipa::path(get, path = "/v1/stimuli/{sid}", tag = "stimuli",
    params(
        ("sid" = String, Path, description = "The stimulus"),
        ("instance" = Option<String>, Query, description = "Its instance. Needed for ids the node generated, and for ids \
            that several instances know"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`"),
        ("Last-Event-ID" = Option<String>, Header, description = "Where a stream broke off")
    ),
    responses(
        (status = 200, description = "What is known, or a stream",
            content((StatusView = "application/json"), (String = "text/event-stream"))),
        (status = 204, description = "The resumed stream has nothing left to say"),
        (status = 409, description = "Several instances know this id", body = ProblemView,
            content_type = "application/problem+json")
    ))]
#[allow(dead_code)]
fn get_stimulus() {}

/// Read the turns of an instance, oldest first.
#[utoipa::path(get, path = "/v1/instances/{id}/turns", tag = "history",
    params(
        ("id" = String, Path, description = "The instance"),
        ("after" = Option<u64>, Query, description = "Turns behind this number; the `next` of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Items of the page, 100 if absent"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`"),
        ("epochs" = Option<bool>, Query, description = "Whether each turn tells the epoch it was committed under")
    ),
    responses((status = 200, description = "A page", body = Page<TurnView>)))]
#[allow(dead_code)]
fn get_turns() {}

/// Follow everything that happens to an instance: `accepted`, `step`, `token`, `turn`, `dead`, `profile`, `forgotten`. A
/// `turn` has its number as the event's id; `Last-Event-ID` goes on behind it, without gap and without repeat.
#[utoipa::path(get, path = "/v1/instances/{id}/events", tag = "history",
    params(
        ("id" = String, Path, description = "The instance"),
        ("after" = Option<u64>, Query, description = "Begin behind this turn; only what is new when absent"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`"),
        ("Last-Event-ID" = Option<u64>, Header, description = "As `after`")
    ),
    responses((status = 200, description = "A stream", body = String, content_type = "text/event-stream")))]
#[allow(dead_code)]
fn get_events() {}

/// Read the twin.
#[utoipa::path(get, path = "/v1/instances/{id}/state", tag = "state",
    params(
        ("id" = String, Path, description = "The instance"),
        ("If-None-Match" = Option<String>, Header, description = "A version the caller has"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses(
        (status = 200, description = "The state", body = StateView, headers(("ETag" = String, description = "Its version"))),
        (status = 304, description = "The caller has this version", headers(("ETag" = String, description = "Its version")))
    ))]
#[allow(dead_code)]
fn get_state() {}

/// Change the twin with a merge patch (RFC 7396).
#[utoipa::path(patch, path = "/v1/instances/{id}/state", tag = "state",
    params(
        ("id" = String, Path, description = "The instance"),
        ("If-Match" = Option<String>, Header, description = "Only if the state has this version"),
        ("Idempotency-Key" = Option<String>, Header, description = "An id by which a repeat is recognised"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context")
    ),
    request_body(content(
        (StatePatchBody = "application/merge-patch+json"),
        (StatePatchBody = "application/json")
    )),
    responses(
        (status = 200, description = "Changed", body = StateView, headers(("ETag" = String, description = "The new version"))),
        (status = 412, description = "The state has another version", body = ProblemView,
            content_type = "application/problem+json")
    ))]
#[allow(dead_code)]
fn patch_state() {}

/// Read the stimuli that were given up.
#[utoipa::path(get, path = "/v1/instances/{id}/dead-letters", tag = "history",
    params(
        ("id" = String, Path, description = "The instance"),
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Items of the page, 100 if absent"),
        ("consistency" = Option<String>, Query, description = "`strong` (default) or `eventual`")
    ),
    responses((status = 200, description = "A page", body = Page<DeadLetterView>)))]
#[allow(dead_code)]
fn get_dead_letters() {}

/// Try a given-up stimulus again.
#[utoipa::path(post, path = "/v1/instances/{id}/dead-letters/{sid}/retry", tag = "history",
    params(
        ("id" = String, Path, description = "The instance"),
        ("sid" = String, Path, description = "The stimulus")
    ),
    responses((status = 202, description = "Waiting again", body = StatusView,
        headers(("Location" = String, description = "Where to ask for it")))))]
#[allow(dead_code)]
fn retry_dead_letter() {}

/// Whether the process lives.
#[utoipa::path(get, path = "/health/live", tag = "node",
    responses((status = 200, description = "It does", body = serde_json::Value)))]
#[allow(dead_code)]
fn live() {}

/// Whether the node takes work: the store takes a write, and the node does not drain.
#[utoipa::path(get, path = "/health/ready", tag = "node",
    responses((status = 200, description = "It does", body = serde_json::Value)))]
#[allow(dead_code)]
fn ready() {}

/// Metrics in Prometheus's text format.
#[utoipa::path(get, path = "/metrics", tag = "node",
    responses((status = 200, description = "The metrics", body = String, content_type = "text/plain")))]
#[allow(dead_code)]
fn metrics() {}

/// List the nodes of the cluster. A node that is alone is a cluster of one.
#[utoipa::path(get, path = "/v1/cluster/nodes", tag = "cluster",
    responses((status = 200, description = "All of them", body = Page<NodeView>)))]
#[allow(dead_code)]
fn cluster_nodes() {}

/// List the shards: who owns each, and how often it was taken.
#[utoipa::path(get, path = "/v1/cluster/shards", tag = "cluster",
    params(
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Items of the page, 100 if absent")
    ),
    responses((status = 200, description = "A page", body = Page<ShardView>)))]
#[allow(dead_code)]
fn cluster_shards() {}

/// Drain a node: it gives its shards to others, one after the other, and takes none. It goes on to answer; stop it when
/// it owns nothing.
#[utoipa::path(post, path = "/v1/cluster/nodes/{node}/drain", tag = "cluster",
    params(("node" = String, Path, description = "Its id or its name")),
    responses((status = 202, description = "It was asked to", body = DrainView)))]
#[allow(dead_code)]
fn drain_node() {}

/// See what each tier of this node's cache holds under a key, in the tenant of the caller.
#[utoipa::path(get, path = "/v1/cache", tag = "node",
    params(("key" = String, Query, description = "`TYPE/ID`, such as `state/lamp`")),
    responses((status = 200, description = "What there is, the nearest tier first", body = Page<CachedView>)))]
#[allow(dead_code)]
fn inspect_cache() {}

/// Say something to an instance in the words of the OpenAI chat protocol. `model` is the instance; the last message becomes a
/// stimulus of its channel `chat`, messages before it count only when the instance has no history. Fields of the model's server
/// (`temperature`, `response_format`, ...) are passed on, others left alone. A call of a tool of `tools` ends the turn and comes
/// back as `tool_calls`; its result comes in as a message of role `tool`.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "chat",
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "The stimulus's id: a repeat gets the same answer"),
        ("Last-Event-ID" = Option<String>, Header, description = "Where a stream broke off"),
        ("traceparent" = Option<String>, Header, description = "W3C trace context")
    ),
    request_body(content = ChatBody, content_type = "application/json",
        example = json!({"model": "ada", "messages": [{"role": "user", "content": "hello"}]})),
    responses(
        (status = 200, description = "The answer, or with `stream` its chunks",
            content((Completion = "application/json"), (String = "text/event-stream"))),
        (status = 422, description = "Given up: it is in the dead letters; or its turn has no answer", body = ChatError)
    ))]
#[allow(dead_code)]
fn chat_completions() {}

/// Vectors of texts by the node's own embedder. `input` is a text or a list of texts; `encoding_format` is `float` or `base64`.
#[utoipa::path(post, path = "/v1/embeddings", tag = "chat",
    request_body(content = EmbeddingsBody, content_type = "application/json",
        example = json!({"model": "lexical", "input": "the lamp in the hall"})),
    responses((status = 200, description = "The vectors, in order", body = EmbeddingsAnswer)))]
#[allow(dead_code)]
fn embeddings() {}

/// List instances as models.
#[utoipa::path(get, path = "/v1/models", tag = "chat",
    params(
        ("after" = Option<String>, Query, description = "Behind this id"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "At most so many, 1000 if absent")
    ),
    responses((status = 200, description = "The models", body = Models)))]
#[allow(dead_code)]
fn list_models() {}

/// Read an instance as a model.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "chat",
    params(("id" = String, Path, description = "The instance")),
    responses((status = 200, description = "The model", body = ModelView)))]
#[allow(dead_code)]
fn get_model() {}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "node",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
#[allow(dead_code)]
fn openapi() {}

/// This document, browsable.
#[utoipa::path(get, path = "/docs", tag = "node",
    responses(
        (status = 200, description = "A page", body = String, content_type = "text/html"),
        (status = 308, description = "The page is at /docs/")
    ))]
#[allow(dead_code)]
fn docs() {}

/// The start page.
#[utoipa::path(get, path = "/", tag = "node",
    responses((status = 200, description = "A page", body = String, content_type = "text/html")))]
#[allow(dead_code)]
fn start() {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::{super::route::CALLS, *};

    fn parsed() -> Value {
        serde_json::from_str(&document()).unwrap()
    }

    #[test]
    fn every_call_is_documented_and_nothing_else() {
        let document = parsed();
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
        let mut documented = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            documented.extend(item.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())));
        }
        let table: BTreeSet<_> = CALLS.iter().map(|row| (row.method.to_owned(), row.path.to_owned())).collect();
        assert_eq!(documented, table);
    }

    #[test]
    fn every_call_says_what_it_refuses_and_who_may() {
        let document = parsed();
        for row in &CALLS {
            let operation = &document["paths"][row.path][row.method.to_lowercase()];
            let responses = operation["responses"].as_object().unwrap();
            assert!(responses.contains_key("400") && responses.contains_key("503"), "{}", row.path);
            assert_eq!(responses.contains_key("401"), row.call.scope().is_some(), "{}", row.path);
            assert_eq!(operation["security"].is_array(), row.call.scope().is_some(), "{}", row.path);
            assert_eq!(responses.contains_key("415"), operation["requestBody"].is_object(), "{}", row.path);
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
            match value {
                Value::Object(map) => map.iter().for_each(|(name, value)| match (name.as_str(), value) {
                    ("$ref", Value::String(target)) => found.push(target),
                    _ => references(value, found),
                }),
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                _ => {}
            }
        }
        let document = parsed();
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for target in found {
            assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
        }
    }
}
