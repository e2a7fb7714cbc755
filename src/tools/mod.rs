//! Tools: what an engine may call while it thinks, who may use which, and how long and how often.
//!
//! Owns: the built-in tools, fetching from the web, the client of MCP servers, and the threads their calls run on. Not here: the
//! engines' port (`cognition::Toolbox`, plugged in by `instance/toolkit.rs`), the turn that does what a call wants done.
//!
//! Invariants:
//! - A tool is used only where the operator allows it for the tenant and the profile names it; what leaves the node is
//!   allowed by nobody until it is written down.
//! - A call ends within its deadline, with a result of bounded size; a call that cannot be made is a result, too.
//! - What a call wants done inside the turn comes back as [`Action`]s; nothing of it is done by the call.
//! - No call that leaves the node runs on a thread of instances or doors.
//!
//! Tests: at the feet of the files; `tests/it/tools.rs` with real servers. For users: `docs/tools.md`.

pub mod address;
mod built_in;
mod fetch;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod held;
mod mcp;
mod pool;
pub mod scope;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use serde_json::{Map, Value};

pub use fetch::{Fetch, Names};

use self::{mcp::Server, pool::Pool};
use crate::{
    config::tools::Tools,
    scaling::{cache::TieredCache, pool::Tally},
    store::Episode,
    telemetry::metric,
    types::{Action, InstanceKey, Millis, Profile, ToolResult, ToolSpec},
};

/// Most tools told to an engine at once.
pub const MAX_OFFERED: usize = 128;

/// Why the tools of a node cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Their threads cannot be started.
    #[error("the threads of the tools cannot be started: {0}")]
    Threads(std::io::Error),
}

/// Port: what an instance remembers. Implemented by `instance/toolkit.rs` over `memory`.
#[async_trait]
pub trait Recall: Send + Sync + 'static {
    /// Episodes that fit a query, best first.
    ///
    /// # Errors
    /// In words, why there are none.
    async fn recall(
        &self,
        key: &InstanceKey,
        query: &str,
        limit: usize,
        deadline: Duration,
    ) -> Result<Vec<Episode>, String>;
}

/// A call of a tool.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Whose turn.
    pub key: &'a InstanceKey,
    /// The profile in force.
    pub profile: &'a Profile,
    /// Which tool, as it was offered.
    pub name: &'a str,
    /// Its arguments, unchecked.
    pub arguments: &'a Map<String, Value>,
    /// The same for every try of this call.
    pub idempotency: &'a str,
    /// Longest time it may take.
    pub deadline: Duration,
    /// How often what the turn sends may be sent on, one instance after the other.
    pub hops_left: u32,
    /// Now.
    pub now: Millis,
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Output {
    /// For the engine.
    pub result: ToolResult,
    /// For the turn, in order.
    pub actions: Vec<Action>,
}

impl Output {
    fn of(result: Result<String, String>) -> Self {
        let result = result.map_or_else(ToolResult::failure, ToolResult::of);
        Self { result, actions: Vec::new() }
    }

    fn done(said: &str, action: Action) -> Self {
        Self { result: ToolResult::of(said), actions: vec![action] }
    }
}

/// The tools of a node.
pub struct Registry {
    settings: Tools,
    cache: TieredCache,
    pool: Arc<Pool>,
    fetch: Arc<Fetch>,
    servers: BTreeMap<String, Arc<Server>>,
    recall: Arc<dyn Recall>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("servers", &self.servers.keys()).finish_non_exhaustive()
    }
}

impl Registry {
    /// Those of the settings. Starts threads, and no server. Results that may be are held in the cache.
    ///
    /// # Errors
    /// [`Error::Threads`].
    pub fn new(settings: Tools, recall: Arc<dyn Recall>, cache: TieredCache) -> Result<Self, Error> {
        let pool = Arc::new(Pool::new(&settings).map_err(Error::Threads)?);
        let fetch = Arc::new(Fetch::new(settings.http.clone(), settings.max_result_kb * 1024));
        let servers = settings.mcp.iter().map(|(name, server)| {
            (name.clone(), Arc::new(Server::new(name.clone(), server.clone(), settings.max_result_kb * 1024)))
        });
        Ok(Self { servers: servers.collect(), settings, cache, pool, fetch, recall })
    }

    /// What is counted of the calls that leave the node.
    pub fn pools(&self) -> Vec<Arc<Tally>> {
        let servers = self.servers.values().map(|server| server.places());
        [self.pool.places(), self.fetch.places()]
            .into_iter()
            .chain(servers)
            .map(|places| places.tally().clone())
            .collect()
    }

    /// As many calls at once, and as many that wait, as these settings say.
    pub fn resize(&self, settings: &Tools) {
        self.pool.places().resize(pool::limits(settings));
        self.fetch.resize(&settings.http);
        for (name, server) in &self.servers {
            if let Some(settings) = settings.mcp.get(name) {
                server.resize(settings);
            }
        }
    }

    /// What an operator allows a tenant.
    fn allowed(&self, key: &InstanceKey) -> &[String] {
        self.settings.tenants.get(key.tenant.as_str()).map_or(&self.settings.allow, |tenant| &tenant.allow)
    }

    /// The tools an instance may use at present. A server that does not answer is left out.
    pub async fn offered(&self, key: &InstanceKey, profile: &Profile) -> Vec<ToolSpec> {
        let (named, allowed) = (profile.tools.as_slice(), self.allowed(key));
        if named.is_empty() {
            return Vec::new();
        }
        let may = |name: &str| scope::may(named, allowed, name);
        let mut offered: Vec<ToolSpec> = built_in::specs().filter(|spec| may(&spec.name)).collect();
        if may(fetch::NAME) {
            offered.push(self.fetch.spec());
        }
        for (name, server) in &self.servers {
            if !scope::may_some(named, allowed, name) {
                continue;
            }
            let server = server.clone();
            let wait = server.start_limit();
            let tools = self.pool.run(wait, async move { server.tools().await }).await;
            match tools {
                Ok(tools) => offered.extend(tools.into_iter().filter(|(tool, _)| may(tool)).map(|(_, spec)| spec)),
                Err(reason) => tracing::warn!(server = name, reason, "a server's tools are not offered"),
            }
        }
        offered.truncate(MAX_OFFERED);
        offered
    }

    /// Calls one. Cancel safe: dropping the future ends the call; what it did outside may stand.
    pub async fn call(&self, call: Call<'_>) -> Output {
        let begun = Instant::now();
        let (label, mut output) = self.dispatch(&call).await;
        output.result.content = cut(output.result.content, self.settings.max_result_kb * 1024);
        let result = if output.result.failed { "failed" } else { "ok" };
        metrics::counter!(metric::TOOL_CALLS, "tool" => label.clone(), "result" => result).increment(1);
        metrics::histogram!(metric::TOOL_SECONDS, "tool" => label).record(begun.elapsed());
        output
    }

    /// The call, and what it counts as.
    async fn dispatch(&self, call: &Call<'_>) -> (String, Output) {
        let unknown = || Output::of(Err(format!("there is no tool '{}'", call.name)));
        let Some(name) = scope::permission_of(call.name) else { return (String::from("unknown"), unknown()) };
        if !scope::may(&call.profile.tools, self.allowed(call.key), &name) {
            return (String::from("unknown"), unknown());
        }
        let deadline = call.deadline.min(Duration::from_secs(self.settings.call_seconds));
        if call.name == fetch::NAME {
            let (fetch, arguments) = (self.fetch.clone(), call.arguments.clone());
            let key = call.idempotency.to_owned();
            let run = async move { fetch.run(&arguments, &key).await };
            return (String::from(fetch::NAME), Output::of(self.pool.run(deadline, run).await));
        }
        if let Some((server, tool)) = name.split_once('.') {
            let Some(server) = self.servers.get(server).cloned() else {
                return (String::from("unknown"), unknown());
            };
            let label = format!("mcp.{}", server.name());
            let (tool, arguments) = (tool.to_owned(), call.arguments.clone());
            let key = call.idempotency.to_owned();
            let slot = held::slot(&call.key.tenant, &server, &tool, &arguments);
            // In an allocation of its own: what it is handed through would copy it each time.
            let run = Box::pin(async move { server.call(tool, arguments, &key).await });
            let Some(slot) = slot else { return (label, Output::of(self.pool.run(deadline, run).await)) };
            let pool = self.pool.clone();
            let load = move || async move { pool.run(deadline, run).await.map(Some) };
            // Whoever waits for another's call does so within their own deadline.
            let told = tokio::time::timeout(deadline, self.cache.get_or_load::<String, String, _, _>(&slot, 0, load));
            let told = told.await.unwrap_or_else(|_| Err(format!("no result within {deadline:?}")));
            return (label, Output::of(told.map(|text| text.map_or_else(String::new, |text| (*text).clone()))));
        }
        if call.name == built_in::RECALL {
            return (String::from(call.name), built_in::recall(&*self.recall, call, deadline).await);
        }
        match built_in::perform(call) {
            Some(output) => (String::from(call.name), output),
            None => (String::from("unknown"), unknown()),
        }
    }

    /// Ends what runs: the processes of servers, too.
    pub async fn close(&self) {
        for server in self.servers.values() {
            server.stop().await;
        }
    }
}

/// A text of at most so many bytes, cut between characters, with a word about it.
fn cut(mut text: String, most: usize) -> String {
    const CUT: &str = "\n[cut: the result is longer]";
    if text.len() > most {
        let end = (0..=most.saturating_sub(CUT.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
        text.push_str(CUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn what_is_cut_is_within_the_limit(text in ".{0,200}", most in 30_usize..300) {
            let short = cut(text.clone(), most);
            proptest::prop_assert!(short.len() <= most);
            proptest::prop_assert_eq!(short == text, text.len() <= most);
        }
    }
}
