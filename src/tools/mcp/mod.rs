//! MCP servers: started when first needed, over stdio, or asked over streamable HTTP; started again after a pause that grows.
//!
//! The protocol is the official SDK's. Here: when there is a connection, what of a server's tools is told, and in which words
//! a result reaches an engine. Invariants: one start at a time; everything a server says is bounded in size and time; its
//! process gets none of the node's environment but what the settings name, and ends with the connection.
//! Tests: `tests/it/tools.rs` with real servers.

mod process;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rmcp::{
    RoleClient, ServiceExt as _,
    model::{
        CallToolRequestParams, CallToolResult, ContentBlock, MetaObject, PaginatedRequestParams, RequestMetaObject,
        Tool,
    },
    service::RunningService,
    transport::{
        StreamableHttpClientTransport, async_rw::AsyncRwTransport,
        streamable_http_client::StreamableHttpClientTransportConfig,
    },
};
use serde_json::{Map, Value};
use tokio::sync::Semaphore;

use self::process::Process;
use super::{MAX_OFFERED, cut, scope};
use crate::{
    config::tools::McpServer,
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
    at_once: Semaphore,
    starting: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

enum State {
    Idle,
    Up(Arc<Connection>),
    Down { until: Instant, failures: u32, reason: String },
}

struct Connection {
    service: RunningService<RoleClient, ()>,
    tools: Vec<(String, ToolSpec)>,
    read_at: Instant,
    // After the service: what still talks to it is gone when it ends.
    _process: Option<Process>,
}

impl Connection {
    fn is_alive(&self) -> bool {
        !self.service.is_closed() && !self.service.peer().is_transport_closed()
    }
}

impl Server {
    pub(super) fn new(name: String, settings: McpServer, most: usize) -> Self {
        Self {
            name,
            at_once: Semaphore::new(settings.max_concurrent),
            settings,
            most,
            starting: tokio::sync::Mutex::new(()),
            state: Mutex::new(State::Idle),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// How long a start may take.
    pub(super) fn start_limit(&self) -> Duration {
        Duration::from_secs(self.settings.start_seconds)
    }

    /// Its tools: as people name them, and as an engine is told.
    pub(super) async fn tools(&self) -> Result<Vec<(String, ToolSpec)>, String> {
        Ok(self.connection().await?.tools.clone())
    }

    /// Calls a tool.
    pub(super) async fn call(&self, tool: String, arguments: Map<String, Value>, key: &str) -> Result<String, String> {
        let _permit = self.at_once.acquire().await.map_err(|_| String::from("the node is shutting down"))?;
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
        *self.state() = State::Idle;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection there is; `None` when one is to be made.
    fn current(&self) -> Result<Option<Arc<Connection>>, String> {
        match &*self.state() {
            State::Up(connection) if connection.is_alive() && connection.read_at.elapsed() < FRESH => {
                Ok(Some(connection.clone()))
            }
            State::Down { until, reason, .. } if Instant::now() < *until => Err(reason.clone()),
            State::Idle | State::Up(_) | State::Down { .. } => Ok(None),
        }
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
        let limit = self.start_limit();
        let late = || Err(format!("it did not start within {limit:?}"));
        let started = tokio::time::timeout(limit, self.start()).await.unwrap_or_else(|_| late());
        let mut state = self.state();
        match started {
            Ok(connection) => {
                tracing::info!(server = self.name, tools = connection.tools.len(), "an MCP server is there");
                let connection = Arc::new(connection);
                *state = State::Up(connection.clone());
                Ok(connection)
            }
            Err(reason) => {
                let failures = if let State::Down { failures, .. } = &*state { failures + 1 } else { 1 };
                let pause = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(6)).min(LONGEST_PAUSE);
                let reason = cut(format!("MCP server '{}': {reason}", self.name), 1024);
                tracing::warn!(server = self.name, reason, failures, ?pause, "an MCP server is not there");
                *state = State::Down { until: Instant::now() + pause, failures, reason: reason.clone() };
                Err(reason)
            }
        }
    }

    async fn start(&self) -> Result<Connection, String> {
        let (service, process) = if self.settings.command.is_empty() {
            let mut config = StreamableHttpClientTransportConfig::with_uri(self.settings.url.as_str())
                .max_sse_event_size(MAX_MESSAGE_BYTES)
                .max_concurrent_requests(self.settings.max_concurrent);
            if let Ok(token) = std::env::var(&self.settings.bearer_env) {
                config = config.auth_header(token);
            }
            let transport = StreamableHttpClientTransport::from_config(config);
            (().serve(transport).await.map_err(|error| error.to_string())?, None)
        } else {
            let mut process = Process::start(&self.settings)?;
            let (output, input) = process.pipes()?;
            let transport = AsyncRwTransport::new(output, input).with_max_line_length(MAX_MESSAGE_BYTES);
            let service = ().serve(transport).await;
            let service = service.map_err(|error| format!("{error}; it last said: {}", process.last_words()))?;
            (service, Some(process))
        };
        let tools = self.read_tools(&service).await?;
        Ok(Connection { service, tools, read_at: Instant::now(), _process: process })
    }

    async fn read_tools(&self, service: &RunningService<RoleClient, ()>) -> Result<Vec<(String, ToolSpec)>, String> {
        let mut tools = Vec::new();
        let mut cursor = None;
        for _ in 0..MAX_PAGES {
            let page = PaginatedRequestParams::default().with_cursor(cursor);
            let page = service.peer().list_tools(Some(page)).await.map_err(|error| error.to_string())?;
            tools.extend(page.tools.iter().filter_map(|tool| self.told_of(tool)));
            cursor = page.next_cursor;
            if cursor.is_none() || tools.len() >= MAX_OFFERED {
                break;
            }
        }
        tools.truncate(MAX_OFFERED);
        Ok(tools)
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
