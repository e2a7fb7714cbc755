//! The bus over Redis: each life of a node has a stream as its mailbox, and all nodes share one for broadcasts.
//!
//! Owns: one task that writes (`writer`), pipelined, and one that reads (`reader`); what both know of the connection.
//! Not here: frames, messages.
//!
//! Invariants:
//! - A message is sent once. What was on its way when a connection broke is told as lost and never sent again.
//! - Frames are numbered by sender and receiver, and a reader takes only growing numbers: what Redis kept from before a
//!   stop, a restart or another connection neither overtakes nor comes twice.
//! - A mailbox is made by its reader, written only while it exists, trimmed, and expires when nobody reads it.
//!
//! Tests: at the foot of each file; `tests/it/bus.rs` with a real server.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{Bus, Error, Health, Inbound, Inlet, Message, frame};
use crate::{config, telemetry::metric, types::NodeId};

mod order;
mod reader;
mod writer;

/// How to reach Redis, and the bounds of what waits there and here.
#[derive(Debug, Clone)]
pub struct Options {
    /// `redis://…` or, with TLS, `rediss://…`.
    pub url: SecretString,
    /// PEM of the server's CA; the system's roots when absent.
    pub ca: Option<Vec<u8>>,
    /// What all keys begin with: the same for the nodes of one cluster and for nobody else.
    pub keys: String,
    /// Longest wait for a connection or an answer.
    pub timeout: Duration,
    /// Most messages waiting to be sent.
    pub max_queue: usize,
    /// Most bytes of messages waiting to be sent.
    pub max_queue_bytes: usize,
    /// Most entries a mailbox keeps for a node that is behind; a frame of many messages is one.
    pub mailbox_entries: usize,
}

/// The address cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the address of Redis cannot be used: {0}")]
pub struct Unusable(String);

impl Options {
    /// Those of the settings, for the nodes of one cluster.
    ///
    /// # Errors
    /// [`Unusable`] when the variable that holds the address is not set, or the CA cannot be read.
    pub fn of(config: &config::Redis, cluster: &str) -> Result<Self, Unusable> {
        let url = match config.url_env.as_str() {
            "" => config.url.clone(),
            name => std::env::var(name).map_err(|_| Unusable(format!("the environment variable {name} is not set")))?,
        };
        let unreadable = |error| Unusable(format!("redis.ca_file: {error}"));
        Ok(Self {
            url: url.into(),
            ca: config.ca_file.as_ref().map(std::fs::read).transpose().map_err(unreadable)?,
            keys: format!("{}:{cluster}", config.prefix),
            timeout: Duration::from_millis(config.timeout_ms),
            max_queue: config.max_queue,
            max_queue_bytes: config.max_queue_mb * 1024 * 1024,
            mailbox_entries: config.mailbox_entries,
        })
    }
}

/// How long a mailbox nobody reads is kept, in seconds.
const MAILBOX_SECONDS: u64 = 60;

/// A node's end of the bus. Dropping it ends its tasks.
pub struct RedisBus {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Outgoing>,
    tasks: TaskTracker,
}

/// An encoded message that waits to be sent.
struct Outgoing {
    /// To whom; `None` is everybody else.
    to: Option<NodeId>,
    message: Vec<u8>,
}

/// What both tasks know.
struct Shared {
    node: NodeId,
    options: Options,
    client: redis::Client,
    inlet: mpsc::Sender<Inbound>,
    /// Bytes of messages waiting to be sent.
    queued: AtomicUsize,
    /// Whether both connections stand; read before each message.
    up: AtomicBool,
    state: Mutex<State>,
    closing: CancellationToken,
    counts: Counts,
}

struct State {
    writer: Result<(), Arc<str>>,
    reader: Result<(), Arc<str>>,
}

/// The two connections.
#[derive(Debug, Clone, Copy)]
enum End {
    Writer,
    Reader,
}

impl RedisBus {
    /// Starts the tasks on `handle` and returns at once: Redis may come later.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn start(
        options: Options,
        node: NodeId,
        handle: &tokio::runtime::Handle,
    ) -> Result<(Arc<Self>, Inlet), Unusable> {
        let unusable = |error: redis::RedisError| Unusable(error.to_string());
        let url = options.url.expose_secret();
        let client = match &options.ca {
            None => redis::Client::open(url),
            Some(ca) => {
                let tls = redis::TlsCertificates { client_tls: None, root_cert: Some(ca.clone()) };
                redis::Client::build_with_tls(url, tls)
            }
        };
        let client = client.map_err(unusable)?;
        let (inlet, receiver) = Inlet::new();
        let (queue, waiting) = mpsc::channel(options.max_queue.max(1));
        let starting = || Err(Arc::from("not connected yet"));
        let shared = Arc::new(Shared {
            node,
            options,
            client,
            inlet,
            queued: AtomicUsize::new(0),
            up: AtomicBool::new(false),
            state: Mutex::new(State { writer: starting(), reader: starting() }),
            closing: CancellationToken::new(),
            counts: Counts::default(),
        });
        shared.counts.up.set(0.0);
        let tasks = TaskTracker::new();
        tasks.spawn_on(writer::run(shared.clone(), waiting), handle);
        tasks.spawn_on(reader::run(shared.clone(), queue.downgrade()), handle);
        tasks.close();
        Ok((Arc::new(Self { shared, queue, tasks }), receiver))
    }
}

impl Shared {
    /// Queues a message for one node, or for all others.
    fn queue(&self, queue: &mpsc::Sender<Outgoing>, to: Option<&NodeId>, message: &Message) -> Result<(), Error> {
        let refused = |error: Error| {
            self.counts.refused(error).increment(1);
            Err(error)
        };
        if !self.up.load(Ordering::Acquire) {
            return refused(Error::Down);
        }
        let bytes = match frame::encode(message) {
            Ok(bytes) => bytes,
            Err(error) => return refused(error),
        };
        let len = bytes.len();
        if self.queued.fetch_add(len, Ordering::AcqRel) + len > self.options.max_queue_bytes {
            self.queued.fetch_sub(len, Ordering::AcqRel);
            return refused(Error::Overloaded);
        }
        if queue.try_send(Outgoing { to: to.cloned(), message: bytes }).is_err() {
            self.queued.fetch_sub(len, Ordering::AcqRel);
            return refused(Error::Overloaded);
        }
        self.counts.sent[message.number()].increment(1);
        Ok(())
    }
}

impl Drop for RedisBus {
    fn drop(&mut self) {
        self.shared.closing.cancel();
    }
}

#[async_trait]
impl Bus for RedisBus {
    fn node(&self) -> &NodeId {
        &self.shared.node
    }
    fn send(&self, to: &NodeId, message: &Message) -> Result<(), Error> {
        self.shared.queue(&self.queue, Some(to), message)
    }
    fn broadcast(&self, message: &Message) -> Result<(), Error> {
        self.shared.queue(&self.queue, None, message)
    }
    fn health(&self) -> Health {
        let state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (&state.writer, &state.reader) {
            (Ok(()), Ok(())) => Health::Up,
            (Err(reason), _) | (_, Err(reason)) => Health::Down(reason.clone()),
        }
    }
    async fn close(&self, patience: Duration) {
        self.shared.up.store(false, Ordering::Release);
        self.shared.closing.cancel();
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            tracing::warn!("the bus did not close in time; its mailbox expires by itself");
        }
    }
}

impl Shared {
    fn mailbox(&self, of: &NodeId) -> String {
        format!("{}:node:{of}", self.options.keys)
    }

    fn everybody(&self) -> String {
        format!("{}:all", self.options.keys)
    }

    async fn connect(&self, timeout: Duration) -> redis::RedisResult<redis::aio::MultiplexedConnection> {
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.options.timeout))
            .set_response_timeout(Some(timeout));
        self.client.get_multiplexed_async_connection_with_config(&config).await
    }

    /// One of the connections stands, or not any more.
    fn report(&self, end: End, now: Result<(), &redis::RedisError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let before = state.is_up();
        let now = now.map_err(|error| Arc::from(error.to_string()));
        match end {
            End::Writer => state.writer = now,
            End::Reader => state.reader = now,
        }
        let up = state.is_up();
        self.up.store(up && !self.closing.is_cancelled(), Ordering::Release);
        self.counts.up.set(if up { 1.0 } else { 0.0 });
        if before != up {
            match state.writer.as_ref().and(state.reader.as_ref()) {
                Ok(()) => tracing::info!("the bus between nodes is up"),
                Err(reason) => tracing::warn!(%reason, "the bus between nodes is down: nodes go on by inbox and scan"),
            }
        }
    }

    /// Tells the reader of the inlet that something may not have arrived.
    async fn lost(&self, to: Option<NodeId>) {
        // Nobody reads any more when the node stops.
        let _ = self.inlet.send(Inbound::Lost { to }).await;
    }

    /// Waits before the next try, or returns at once when the bus closes.
    async fn pause(&self, pause: Option<Duration>) {
        tokio::select! {
            () = tokio::time::sleep(pause.unwrap_or(LONGEST_PAUSE)) => {}
            () = self.closing.cancelled() => {}
        }
    }
}

impl State {
    const fn is_up(&self) -> bool {
        self.writer.is_ok() && self.reader.is_ok()
    }
}

const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Pauses between tries to connect: from 50 ms, doubling, with jitter, without end.
fn pauses() -> backon::ExponentialBackoff {
    use backon::BackoffBuilder as _;
    backon::ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}

/// Handles of the figures, looked up once.
struct Counts {
    up: metrics::Gauge,
    queue: metrics::Gauge,
    sent: [metrics::Counter; Message::KINDS.len()],
    received: [metrics::Counter; Message::KINDS.len()],
    refused: [metrics::Counter; 3],
    lost_by_connection: metrics::Counter,
    lost_by_mailbox: metrics::Counter,
    late: metrics::Counter,
    unreadable: metrics::Counter,
}

impl Default for Counts {
    fn default() -> Self {
        let lost = |reason| metrics::counter!(metric::BUS_LOST, "reason" => reason);
        Self {
            up: metrics::gauge!(metric::BUS_UP),
            queue: metrics::gauge!(metric::BUS_QUEUE),
            sent: Message::KINDS.map(|kind| metrics::counter!(metric::BUS_SENT, "kind" => kind)),
            received: Message::KINDS.map(|kind| metrics::counter!(metric::BUS_RECEIVED, "kind" => kind)),
            refused: ["overloaded", "down", "invalid"]
                .map(|reason| metrics::counter!(metric::BUS_REFUSED, "reason" => reason)),
            lost_by_connection: lost("connection"),
            lost_by_mailbox: lost("mailbox"),
            late: lost("late"),
            unreadable: lost("unreadable"),
        }
    }
}

impl Counts {
    const fn refused(&self, error: Error) -> &metrics::Counter {
        match error {
            Error::Overloaded => &self.refused[0],
            Error::Down => &self.refused[1],
            Error::TooLarge(_) | Error::Encoding => &self.refused[2],
        }
    }
}
