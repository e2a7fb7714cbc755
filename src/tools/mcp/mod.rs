//! MCP servers: started when first needed, over stdio, or asked over streamable HTTP; started again after a pause that grows.
//!
//! The protocol is the official SDK's. Here: when there is a connection, what of a server's tools is told, and in which words
//! a result reaches an engine. Invariants: one start at a time; everything a server says is bounded in size and time; what it
//! says of its tools is asked for no oftener than it may; its process gets none of the node's environment but what the settings
//! name, and ends with the connection, with all that it started.
//! Tests: at the foot; `tests/it/tools.rs` and `tests/it/mcp_servers.rs` with real servers.

#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod process;

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rmcp::{
    ClientHandler, RoleClient, ServiceExt as _,
    model::{
        CallToolRequestParams, CallToolResult, ContentBlock, MetaObject, PaginatedRequestParams, RequestMetaObject,
        Tool,
    },
    service::{NotificationContext, RunningService},
    transport::{
        StreamableHttpClientTransport, async_rw::AsyncRwTransport,
        streamable_http_client::StreamableHttpClientTransportConfig,
    },
};
use serde_json::{Map, Value};

use self::process::Process;
use super::{MAX_OFFERED, cut, scope};
use crate::{
    config::tools::McpServer,
    scaling::pool::{Limits, Places},
    types::{RawJson, ToolSpec},
};

/// Largest message taken from a server, in bytes.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// Largest schema of a tool's arguments, in bytes.
const MAX_SCHEMA_BYTES: usize = 32 * 1024;
/// Longest description of a tool told to an engine, in bytes.
const MAX_DESCRIPTION_BYTES: usize = 2 * 1024;
/// Most pages of tools read from a server.
const MAX_PAGES: usize = 16;
/// A list of tools is read again after this.
const FRESH: Duration = Duration::from_secs(300);
/// And no oftener than this, however often the server says that it changed.
const READ_AT_MOST_EVERY: Duration = Duration::from_secs(2);
/// Pause before a server that failed is tried again, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Under which name a server is told what is the same for every try of a call.
const IDEMPOTENCY: &str = "sophont/idempotency-key";

/// A server, and the connection to it while there is one.
pub(super) struct Server {
    name: String,
    settings: McpServer,
    most: usize,
    at_once: Arc<Places>,
    starting: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

enum State {
    Idle,
    Up(Arc<Connection>),
    Down { until: Instant, failures: u32, reason: String },
}

struct Connection {
    service: RunningService<RoleClient, Ear>,
    listed: Mutex<Listed>,
    reading: tokio::sync::Mutex<()>,
    changed: Arc<AtomicBool>,
    since: Instant,
    /// Starts that failed before this one.
    failures: u32,
    process: Option<Process>,
}

/// The tools a server told, and the names of those that only read.
type Told = (Arc<Vec<(String, ToolSpec)>>, Arc<BTreeSet<String>>);

/// What a server said of its tools.
#[derive(Clone)]
struct Listed {
    tools: Arc<Vec<(String, ToolSpec)>>,
    /// Those that only read, as the server says.
    harmless: Arc<BTreeSet<String>>,
    read_at: Instant,
}

/// Hears that a server's tools are others now.
struct Ear(Arc<AtomicBool>);

impl ClientHandler for Ear {
    async fn on_tool_list_changed(&self, _: NotificationContext<RoleClient>) {
        self.0.store(true, Ordering::Release);
    }
}

/// Whether a list of this age is read again.
fn is_stale(age: Duration, changed: bool) -> bool {
    age >= if changed { READ_AT_MOST_EVERY } else { FRESH }
}

/// How long a server that failed so often is left alone.
fn pause_after(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(6)).min(LONGEST_PAUSE)
}

impl Connection {
    fn is_alive(&self) -> bool {
        !self.service.is_closed() && !self.service.peer().is_transport_closed()
    }

    fn listed(&self) -> Listed {
        self.listed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the process at once, for those that still wait for a call of it, too.
    fn end(&self) {
        if let Some(process) = &self.process {
            process.kill();
        }
    }
}

impl Server {
    pub(super) fn new(name: String, settings: McpServer, most: usize) -> Self {
        Self {
            at_once: Places::new(&format!("tools/{name}"), Self::limits(&settings)),
            name,
            settings,
            most,
            starting: tokio::sync::Mutex::new(()),
            state: Mutex::new(State::Idle),
        }
    }

    /// A call has its own limit, which is mostly shorter than this wait.
    fn limits(settings: &McpServer) -> Limits {
        Limits { size: settings.max_concurrent, overflow: 0, ..Limits::default() }
    }

    /// Calls at once.
    pub(super) const fn places(&self) -> &Arc<Places> {
        &self.at_once
    }

    /// As many at once as the settings say.
    pub(super) fn resize(&self, settings: &McpServer) {
        self.at_once.resize(Self::limits(settings));
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What it is, apart from its name.
    pub(super) fn identity(&self) -> (&str, &str, &[String]) {
        (&self.settings.url, &self.settings.command, &self.settings.args)
    }

    /// Whether the results of a tool may be held: the settings name it, and the server, which is there, says that it only reads.
    pub(super) fn may_hold(&self, tool: &str) -> bool {
        let named = self.settings.cache.iter().any(|name| name == tool || name == "*");
        named && matches!(&*self.state(), State::Up(connection) if connection.listed().harmless.contains(tool))
    }

    /// How long a start may take.
    pub(super) fn start_limit(&self) -> Duration {
        Duration::from_secs(self.settings.start_seconds)
    }

    /// Its tools: as people name them, and as an engine is told.
    pub(super) async fn tools(&self) -> Result<Vec<(String, ToolSpec)>, String> {
        let connection = self.connection().await?;
        self.read_again(&connection).await;
        Ok((*connection.listed().tools).clone())
    }

    /// Reads a list of tools that is old, or said to have changed. Who comes while it is read takes the old one, and so does
    /// whom the server gives no new one.
    async fn read_again(&self, connection: &Connection) {
        let is_stale = || is_stale(connection.listed().read_at.elapsed(), connection.changed.load(Ordering::Acquire));
        let Ok(_reading) = connection.reading.try_lock() else { return };
        if !is_stale() {
            return;
        }
        // What changes while it is read is read once more.
        connection.changed.store(false, Ordering::Release);
        let late = || Err(String::from("no list in time"));
        let read = tokio::time::timeout(self.start_limit(), self.read_tools(&connection.service)).await;
        let (tools, harmless) = match read.unwrap_or_else(|_| late()) {
            Ok(told) => told,
            Err(reason) => {
                tracing::warn!(server = self.name, reason, "a server's tools could not be read again");
                let listed = connection.listed();
                (listed.tools, listed.harmless)
            }
        };
        let mut listed = connection.listed.lock().unwrap_or_else(PoisonError::into_inner);
        *listed = Listed { tools, harmless, read_at: Instant::now() };
    }

    /// Calls a tool.
    pub(super) async fn call(&self, tool: String, arguments: Map<String, Value>, key: &str) -> Result<String, String> {
        let _place = self.at_once.take().await.map_err(|refused| refused.to_string())?;
        let connection = self.connection().await?;
        let mut params = CallToolRequestParams::new(tool).with_arguments(arguments);
        let mut meta = MetaObject::default();
        meta.insert(String::from(IDEMPOTENCY), Value::from(key));
        params.meta = Some(RequestMetaObject(meta));
        let result = connection.service.peer().call_tool(params).await;
        let result = result.map_err(|error| cut(format!("the server says: {error}"), self.most))?;
        told(&result, self.most)
    }

    /// Ends the connection and the process.
    pub(super) async fn stop(&self) {
        let _starting = self.starting.lock().await;
        if let State::Up(connection) = std::mem::replace(&mut *self.state(), State::Idle) {
            connection.end();
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection there is; `None` when one is to be made.
    fn current(&self) -> Result<Option<Arc<Connection>>, String> {
        let mut state = self.state();
        if let State::Up(connection) = &*state {
            if connection.is_alive() {
                return Ok(Some(connection.clone()));
            }
            connection.end();
            // One that ends again and again soon after its start is no better than one that does not start.
            let failures = if connection.since.elapsed() < LONGEST_PAUSE { connection.failures + 1 } else { 1 };
            *state = self.down(failures, "it ended");
        }
        match &*state {
            State::Down { until, reason, .. } if Instant::now() < *until => Err(reason.clone()),
            State::Idle | State::Up(_) | State::Down { .. } => Ok(None),
        }
    }

    fn down(&self, failures: u32, reason: &str) -> State {
        let pause = pause_after(failures);
        let reason = cut(format!("MCP server '{}': {reason}", self.name), 1024);
        tracing::warn!(server = self.name, reason, failures, ?pause, "an MCP server is not there");
        State::Down { until: Instant::now() + pause, failures, reason }
    }

    /// The connection, made when there is none. Whoever comes meanwhile waits for the same start.
    async fn connection(&self) -> Result<Arc<Connection>, String> {
        if let Some(connection) = self.current()? {
            return Ok(connection);
        }
        let _starting = self.starting.lock().await;
        if let Some(connection) = self.current()? {
            return Ok(connection);
        }
        let failures = if let State::Down { failures, .. } = &*self.state() { *failures } else { 0 };
        let limit = self.start_limit();
        let late = || Err(format!("it did not start within {limit:?}"));
        let started = tokio::time::timeout(limit, self.start(failures)).await.unwrap_or_else(|_| late());
        let mut state = self.state();
        match started {
            Ok(connection) => {
                tracing::info!(server = self.name, tools = connection.listed().tools.len(), "an MCP server is there");
                let connection = Arc::new(connection);
                *state = State::Up(connection.clone());
                Ok(connection)
            }
            Err(reason) => {
                *state = self.down(failures + 1, &reason);
                if let State::Down { reason, .. } = &*state { Err(reason.clone()) } else { Err(reason) }
            }
        }
    }

    async fn start(&self, failures: u32) -> Result<Connection, String> {
        let changed = Arc::new(AtomicBool::new(false));
        let ear = Ear(changed.clone());
        let (service, process) = if self.settings.command.is_empty() {
            let mut config = StreamableHttpClientTransportConfig::with_uri(self.settings.url.as_str())
                .max_sse_event_size(MAX_MESSAGE_BYTES)
                .max_concurrent_requests(self.settings.max_concurrent);
            if let Ok(token) = std::env::var(&self.settings.bearer_env) {
                config = config.auth_header(token);
            }
            let transport = StreamableHttpClientTransport::from_config(config);
            (ear.serve(transport).await.map_err(|error| error.to_string())?, None)
        } else {
            let mut process = Process::start(&self.settings)?;
            let (output, input) = process.pipes()?;
            let transport = AsyncRwTransport::new(output, input).with_max_line_length(MAX_MESSAGE_BYTES);
            let service = ear.serve(transport).await;
            let service = service.map_err(|error| format!("{error}; it last said: {}", process.last_words()))?;
            (service, Some(process))
        };
        let (tools, harmless) = self.read_tools(&service).await?;
        let since = Instant::now();
        let (listed, reading) = (Mutex::new(Listed { tools, harmless, read_at: since }), tokio::sync::Mutex::default());
        Ok(Connection { service, listed, reading, changed, since, failures, process })
    }

    /// What it offers, and which of that only reads.
    async fn read_tools(&self, service: &RunningService<RoleClient, Ear>) -> Result<Told, String> {
        let (mut tools, mut harmless) = (Vec::new(), BTreeSet::new());
        let mut cursor = None;
        for _ in 0..MAX_PAGES {
            let page = PaginatedRequestParams::default().with_cursor(cursor);
            let page = service.peer().list_tools(Some(page)).await.map_err(|error| error.to_string())?;
            tools.extend(page.tools.iter().filter_map(|tool| self.told_of(tool)));
            let reads =
                |tool: &&Tool| tool.annotations.as_ref().is_some_and(|hints| hints.read_only_hint == Some(true));
            harmless.extend(page.tools.iter().filter(reads).map(|tool| tool.name.to_string()));
            cursor = page.next_cursor;
            if cursor.is_none() || tools.len() >= MAX_OFFERED {
                break;
            }
        }
        tools.truncate(MAX_OFFERED);
        Ok((Arc::new(tools), Arc::new(harmless)))
    }

    /// A tool as people name it and as an engine is told; `None` for one that cannot be told.
    fn told_of(&self, tool: &Tool) -> Option<(String, ToolSpec)> {
        let parameters = RawJson::from_serialize(&*tool.input_schema).ok()?;
        let offered = scope::offered_of(&self.name, &tool.name);
        let Some(name) = offered.filter(|_| parameters.get().len() <= MAX_SCHEMA_BYTES) else {
            tracing::warn!(server = self.name, tool = %tool.name, "a tool's name or schema does not fit: it is left out");
            return None;
        };
        let description = tool.description.as_deref().unwrap_or_default().to_owned();
        let hints = tool.annotations.as_ref();
        let harmless =
            hints.is_some_and(|hints| hints.read_only_hint == Some(true) || hints.idempotent_hint == Some(true));
        let spec =
            ToolSpec { name, description: cut(description, MAX_DESCRIPTION_BYTES), parameters, repeatable: harmless };
        Some((format!("{}.{}", self.name, tool.name), spec))
    }
}

/// A result in words: its texts; what is no text is named.
fn told(result: &CallToolResult, most: usize) -> Result<String, String> {
    let mut text = String::new();
    for block in &result.content {
        if text.len() > most {
            break;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        match block {
            ContentBlock::Text(block) => text.push_str(&block.text),
            ContentBlock::Image(_) => text.push_str("[an image]"),
            ContentBlock::Audio(_) => text.push_str("[a sound]"),
            other => text.push_str(&serde_json::to_string(other).unwrap_or_default()),
        }
    }
    if let Some(data) = result.structured_content.as_ref().filter(|_| text.is_empty()) {
        text = data.to_string();
    }
    let text = cut(text, most);
    if result.is_error == Some(true) { Err(text) } else { Ok(text) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_list_is_read_again_when_it_is_old_or_changed_and_never_all_the_time() {
        assert!(!is_stale(Duration::ZERO, true), "however often a server says so");
        assert!(is_stale(READ_AT_MOST_EVERY, true));
        assert!(!is_stale(READ_AT_MOST_EVERY, false));
        assert!(is_stale(FRESH, false));
    }

    #[test]
    fn pauses_double_up_to_the_longest() {
        let pauses: Vec<u64> = [0, 1, 2, 3, 6, 7, 8, u32::MAX].into_iter().map(|n| pause_after(n).as_secs()).collect();
        assert_eq!(pauses, [1, 1, 2, 4, 32, 60, 60, 60]);
    }

    proptest! {
        #[test]
        fn no_tool_of_a_server_is_too_strange(
            name in "[a-z_.-]{0,70}|.{0,8}",
            description in prop::option::of(".{0,3000}"),
            (key, value) in ("type|properties|[$]ref|.{0,6}", ".{0,20}"),
            long in 0_usize..40_000,
        ) {
            let server = Server::new(String::from("s"), McpServer { max_concurrent: 1, ..McpServer::default() }, 1024);
            let schema = json!({key: value, "x": "y".repeat(long)});
            let told = json!({"name": name, "description": description, "inputSchema": schema, "annotations": {"readOnlyHint": true}});
            if let Ok(tool) = serde_json::from_value::<Tool>(told)
                && let Some((name, spec)) = server.told_of(&tool)
            {
                prop_assert!(ToolSpec::is_name(&spec.name) && spec.repeatable);
                prop_assert_eq!(scope::permission_of(&spec.name), Some(name), "the way back is the way there");
                prop_assert!(spec.description.len() <= MAX_DESCRIPTION_BYTES);
                prop_assert!(spec.parameters.get().len() <= MAX_SCHEMA_BYTES);
            }
        }

        #[test]
        fn no_result_of_a_server_is_too_strange(
            blocks in prop::collection::vec(("text|image|audio|resource|resource_link|[a-z]{0,5}", ".{0,200}"), 0..6),
            is_error in prop::option::of(any::<bool>()),
            most in 64_usize..300,
        ) {
            let content: Vec<Value> = blocks.iter().map(|(kind, text)| {
                json!({"type": kind, "text": text, "data": text, "mimeType": "a/b", "uri": text, "name": text,
                    "resource": {"uri": text, "text": text}})
            }).collect();
            if let Ok(result) = serde_json::from_value::<CallToolResult>(json!({"content": content, "isError": is_error})) {
                let said = told(&result, most);
                prop_assert_eq!(said.is_err(), is_error == Some(true));
                prop_assert!(said.unwrap_or_else(|said| said).len() <= most);
            }
        }
    }
}
