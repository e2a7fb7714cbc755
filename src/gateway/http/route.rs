//! Which call a method and a path mean: one table, looked up without regular expressions.
//!
//! Owns: the closed set of calls, their paths and methods, and what each needs (scope, whether it changes anything).
//! Not here: what a call does. Invariants: every row of [`CALLS`] is reachable and documented (`openapi.rs` has the test).

use std::borrow::Cow;

use crate::types::Scope;

/// Every call of the HTTP door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // CALLS says what each is
pub enum Call {
    ListInstances,
    PutInstance,
    GetInstance,
    DeleteInstance,
    PostStimulus,
    GetStimulus,
    GetTurns,
    GetEvents,
    GetState,
    PatchState,
    PostEpisode,
    PostEpisodes,
    Recall,
    Prune,
    Forget,
    MemoryStats,
    ExportMemory,
    ImportMemory,
    CheckpointMemory,
    GetDeadLetters,
    RetryDeadLetter,
    ChatCompletions,
    Embeddings,
    ListModels,
    GetModel,
    ClusterNodes,
    ClusterShards,
    DrainNode,
    InspectCache,
    Live,
    Ready,
    Metrics,
    OpenApi,
    Docs,
    Start,
}

/// One call: its method and its path as the API document spells it.
#[derive(Debug)]
pub struct Row {
    /// Which.
    pub call: Call,
    /// Its method.
    pub method: &'static str,
    /// Its path, with parameters in braces.
    pub path: &'static str,
}

const fn row(call: Call, method: &'static str, path: &'static str) -> Row {
    Row { call, method, path }
}

/// All calls, in the order of [`Call`].
pub const CALLS: [Row; 35] = [
    row(Call::ListInstances, "GET", "/v1/instances"),
    row(Call::PutInstance, "PUT", "/v1/instances/{id}"),
    row(Call::GetInstance, "GET", "/v1/instances/{id}"),
    row(Call::DeleteInstance, "DELETE", "/v1/instances/{id}"),
    row(Call::PostStimulus, "POST", "/v1/instances/{id}/stimuli"),
    row(Call::GetStimulus, "GET", "/v1/stimuli/{sid}"),
    row(Call::GetTurns, "GET", "/v1/instances/{id}/turns"),
    row(Call::GetEvents, "GET", "/v1/instances/{id}/events"),
    row(Call::GetState, "GET", "/v1/instances/{id}/state"),
    row(Call::PatchState, "PATCH", "/v1/instances/{id}/state"),
    row(Call::PostEpisode, "POST", "/v1/instances/{id}/episodes"),
    row(Call::PostEpisodes, "POST", "/v1/instances/{id}/episodes/batch"),
    row(Call::Recall, "POST", "/v1/instances/{id}/recall"),
    row(Call::Prune, "POST", "/v1/instances/{id}/memory/prune"),
    row(Call::Forget, "POST", "/v1/instances/{id}/memory/forget"),
    row(Call::MemoryStats, "GET", "/v1/instances/{id}/memory/stats"),
    row(Call::ExportMemory, "GET", "/v1/instances/{id}/memory/export"),
    row(Call::ImportMemory, "POST", "/v1/instances/{id}/memory/import"),
    row(Call::CheckpointMemory, "POST", "/v1/instances/{id}/memory/checkpoint"),
    row(Call::GetDeadLetters, "GET", "/v1/instances/{id}/dead-letters"),
    row(Call::RetryDeadLetter, "POST", "/v1/instances/{id}/dead-letters/{sid}/retry"),
    row(Call::ChatCompletions, "POST", "/v1/chat/completions"),
    row(Call::Embeddings, "POST", "/v1/embeddings"),
    row(Call::ListModels, "GET", "/v1/models"),
    row(Call::GetModel, "GET", "/v1/models/{id}"),
    row(Call::ClusterNodes, "GET", "/v1/cluster/nodes"),
    row(Call::ClusterShards, "GET", "/v1/cluster/shards"),
    row(Call::DrainNode, "POST", "/v1/cluster/nodes/{node}/drain"),
    row(Call::InspectCache, "GET", "/v1/cache"),
    row(Call::Live, "GET", "/health/live"),
    row(Call::Ready, "GET", "/health/ready"),
    row(Call::Metrics, "GET", "/metrics"),
    row(Call::OpenApi, "GET", "/openapi.json"),
    row(Call::Docs, "GET", "/docs"),
    row(Call::Start, "GET", "/"),
];

impl Call {
    /// Its row.
    pub fn row(self) -> &'static Row {
        &CALLS[self as usize]
    }

    /// The right it needs; `None` for what anybody may see.
    pub const fn scope(self) -> Option<Scope> {
        match self {
            Call::Live | Call::Ready | Call::OpenApi | Call::Docs | Call::Start => None,
            Call::Metrics | Call::ClusterNodes | Call::ClusterShards | Call::DrainNode | Call::InspectCache => {
                Some(Scope::Admin)
            }
            Call::ListInstances
            | Call::GetInstance
            | Call::GetStimulus
            | Call::GetTurns
            | Call::GetEvents
            | Call::GetState
            | Call::Recall
            | Call::MemoryStats
            | Call::ExportMemory
            | Call::Embeddings
            | Call::ListModels
            | Call::GetModel
            | Call::GetDeadLetters => Some(Scope::Read),
            Call::PutInstance
            | Call::DeleteInstance
            | Call::PostStimulus
            | Call::PatchState
            | Call::PostEpisode
            | Call::PostEpisodes
            | Call::Prune
            | Call::Forget
            | Call::ImportMemory
            | Call::CheckpointMemory
            | Call::ChatCompletions
            | Call::RetryDeadLetter => Some(Scope::Write),
        }
    }

    /// Whether it speaks the chat protocol, in which refusals have a form of their own.
    pub const fn is_chat(self) -> bool {
        matches!(self, Call::ChatCompletions | Call::Embeddings | Call::ListModels | Call::GetModel)
    }

    /// Whether it changes anything, and so is refused while the node drains.
    pub fn changes(self) -> bool {
        self.scope() == Some(Scope::Write)
    }
}

/// A call and the parameters of its path, not yet decoded.
#[derive(Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Which call.
    pub call: Call,
    /// `{id}`, `{node}`, or the rest of the path of [`Call::Docs`].
    pub id: &'a str,
    /// `{sid}`.
    pub sid: &'a str,
}

/// Why there is no call.
#[derive(Debug, PartialEq, Eq)]
pub enum Miss {
    /// No such path.
    Path,
    /// The path has other methods.
    Method(String),
    /// The path was asked for its methods.
    Options(String),
}

/// Finds the call.
///
/// # Errors
/// [`Miss`] says whether the path or only the method is unknown.
pub fn find<'a>(method: &str, path: &'a str) -> Result<Found<'a>, Miss> {
    let (template, id, sid) = template(path).ok_or(Miss::Path)?;
    let wanted = if method == "HEAD" { "GET" } else { method };
    match CALLS.iter().find(|row| row.path == template && row.method == wanted) {
        Some(row) => Ok(Found { call: row.call, id, sid }),
        None if method == "OPTIONS" => Err(Miss::Options(allowed(template))),
        None => Err(Miss::Method(allowed(template))),
    }
}

/// Whether a client of the chat protocol comes here, for a call that there is or one that there is not: it understands refusals
/// in that protocol's form only.
pub fn is_of_chat(path: &str) -> bool {
    let ours = ["instances", "stimuli", "cluster", "cache"];
    path.strip_prefix("/v1/").is_some_and(|rest| !ours.contains(&rest.split('/').next().unwrap_or_default()))
}

/// The row's path and the parameters a path stands for.
fn template(path: &str) -> Option<(&'static str, &str, &str)> {
    if path == "/" {
        return Some(("/", "", ""));
    }
    if let Some(rest) = path.strip_prefix("/docs")
        && (rest.is_empty() || rest.starts_with('/'))
    {
        return Some(("/docs", rest, ""));
    }
    let mut parts = [""; 7];
    let mut count = 0;
    for part in path.strip_prefix('/')?.split('/') {
        *parts.get_mut(count)? = part;
        count += 1;
    }
    Some(match parts.get(..count)? {
        ["v1", "instances"] => ("/v1/instances", "", ""),
        ["v1", "instances", id] => ("/v1/instances/{id}", id, ""),
        ["v1", "instances", id, "stimuli"] => ("/v1/instances/{id}/stimuli", id, ""),
        ["v1", "instances", id, "turns"] => ("/v1/instances/{id}/turns", id, ""),
        ["v1", "instances", id, "events"] => ("/v1/instances/{id}/events", id, ""),
        ["v1", "instances", id, "state"] => ("/v1/instances/{id}/state", id, ""),
        ["v1", "instances", id, "episodes"] => ("/v1/instances/{id}/episodes", id, ""),
        ["v1", "instances", id, "episodes", "batch"] => ("/v1/instances/{id}/episodes/batch", id, ""),
        ["v1", "instances", id, "recall"] => ("/v1/instances/{id}/recall", id, ""),
        ["v1", "instances", id, "memory", "prune"] => ("/v1/instances/{id}/memory/prune", id, ""),
        ["v1", "instances", id, "memory", "forget"] => ("/v1/instances/{id}/memory/forget", id, ""),
        ["v1", "instances", id, "memory", "stats"] => ("/v1/instances/{id}/memory/stats", id, ""),
        ["v1", "instances", id, "memory", "export"] => ("/v1/instances/{id}/memory/export", id, ""),
        ["v1", "instances", id, "memory", "import"] => ("/v1/instances/{id}/memory/import", id, ""),
        ["v1", "instances", id, "memory", "checkpoint"] => ("/v1/instances/{id}/memory/checkpoint", id, ""),
        ["v1", "instances", id, "dead-letters"] => ("/v1/instances/{id}/dead-letters", id, ""),
        ["v1", "instances", id, "dead-letters", sid, "retry"] => {
            ("/v1/instances/{id}/dead-letters/{sid}/retry", id, sid)
        }
        ["v1", "chat", "completions"] => ("/v1/chat/completions", "", ""),
        ["v1", "embeddings"] => ("/v1/embeddings", "", ""),
        ["v1", "models"] => ("/v1/models", "", ""),
        ["v1", "models", id] => ("/v1/models/{id}", id, ""),
        ["v1", "cluster", "nodes"] => ("/v1/cluster/nodes", "", ""),
        ["v1", "cluster", "shards"] => ("/v1/cluster/shards", "", ""),
        ["v1", "cluster", "nodes", node, "drain"] => ("/v1/cluster/nodes/{node}/drain", node, ""),
        ["v1", "cache"] => ("/v1/cache", "", ""),
        ["v1", "stimuli", sid] => ("/v1/stimuli/{sid}", "", sid),
        ["health", "live"] => ("/health/live", "", ""),
        ["health", "ready"] => ("/health/ready", "", ""),
        ["metrics"] => ("/metrics", "", ""),
        ["openapi.json"] => ("/openapi.json", "", ""),
        _ => return None,
    })
}

fn allowed(template: &str) -> String {
    let mut methods: Vec<&str> = CALLS.iter().filter(|row| row.path == template).map(|row| row.method).collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    methods.push("OPTIONS");
    methods.join(", ")
}

/// Decodes `%XX`; `None` when an escape is broken or the result is not UTF-8. `plus` turns `+` into a space, as in queries.
pub fn decode(text: &str, plus: bool) -> Option<Cow<'_, str>> {
    if !text.contains(['%', '+']) || (!plus && !text.contains('%')) {
        return Some(Cow::Borrowed(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => hex(bytes.next()?)? << 4 | hex(bytes.next()?)?,
            b'+' if plus => b' ',
            other => other,
        });
    }
    String::from_utf8(out).ok().map(Cow::Owned)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_its_place_and_is_found() {
        for (index, row) in CALLS.iter().enumerate() {
            assert_eq!(row.call as usize, index);
            let path = row.path.replace("{id}", "lamp").replace("{node}", "lamp").replace("{sid}", "s1");
            let found = find(row.method, &path).unwrap();
            assert_eq!(found.call, row.call);
            assert_eq!(found.id, if row.path.contains("{id}") || row.path.contains("{node}") { "lamp" } else { "" });
            assert_eq!(row.call.is_chat(), is_of_chat(&path), "{path}");
            assert_eq!(found.sid, if row.path.contains("{sid}") { "s1" } else { "" });
        }
    }

    #[test]
    fn what_is_not_there_is_told_apart_from_a_wrong_method() {
        for path in ["", "/v1", "/v1/", "/v1/instances/a/b", "/v1/instances/", "/docsx", "/v1/instances/a/state/", "//"]
        {
            let found = find("GET", path);
            let is_empty_id = path == "/v1/instances/"; // an empty id is refused as an id, later
            assert_eq!(found.err(), (!is_empty_id).then_some(Miss::Path), "{path}");
        }
        let methods = String::from("GET, PATCH, HEAD, OPTIONS");
        assert_eq!(find("POST", "/v1/instances/a/state"), Err(Miss::Method(methods.clone())));
        assert_eq!(find("OPTIONS", "/v1/instances/a/state"), Err(Miss::Options(methods)));
        assert_eq!(find("HEAD", "/v1/instances/a/state").unwrap().call, Call::GetState);
        assert_eq!(find("GET", "/docs/swagger-ui.css").unwrap().id, "/swagger-ui.css");
    }

    #[test]
    fn clients_of_the_chat_protocol_are_known_by_what_they_ask_for() {
        for path in ["/v1/responses", "/v1/completions", "/v1/models/a/b", "/v1/audio/speech", "/v1/"] {
            assert!(is_of_chat(path), "{path}");
        }
        for path in ["/v1/instances/a/b", "/v1/stimuli", "/v2/models", "/health", "/"] {
            assert!(!is_of_chat(path), "{path}");
        }
    }

    #[test]
    fn percent_escapes_are_decoded_or_refused() {
        assert_eq!(decode("a%2Db", false).unwrap(), "a-b");
        assert_eq!(decode("a+b%20c", true).unwrap(), "a b c");
        assert_eq!(decode("a+b", false).unwrap(), "a+b");
        for bad in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(decode(bad, false), None, "{bad}");
        }
    }
}
