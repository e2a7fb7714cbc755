//! The second tier over Redis: written entries that all nodes of a cluster share.
//!
//! Owns: the connection and its breaker, the guard that lets one node load. Not here: what an entry says of itself (`entry`).
//! Invariants: without a connection a read or write costs nothing; one that fails or is late closes the connection for all, and
//! it is the keeper alone who tries again. What is in Redis may be lost, old or emptied at any time.
//! Tests: `tests/it/cache.rs` with a real server.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use redis::{Cmd, FromRedisValue, aio::MultiplexedConnection};
use tokio::sync::Notify;

use super::{breaker::Breaker, figures::Figures, ledger::Ledger, slot::Slot};
use crate::{config, types::Millis};

/// A cache that takes longer than this to answer is none.
const LATEST: Duration = Duration::from_millis(250);
/// How often a connection that nobody used is tried.
const PING: Duration = Duration::from_secs(1);
/// How long a node that loads something keeps the others from it.
const GUARD: Duration = Duration::from_secs(3);
/// The form of keys and values: another build's are other keys.
const FORM: &str = "c1";

/// Puts an entry in unless what is there is newer. The version stands in the first 16 characters.
const PUT: &str = "local held = redis.call('GETRANGE', KEYS[1], 0, 15) \
    if held > string.sub(ARGV[1], 1, 16) then return 0 end \
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) return 1";
/// Takes a guard away if it is still ours.
const FREE: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

/// The way to Redis. Cheap to clone.
#[derive(Clone)]
pub(super) struct Link(Arc<Inner>);

struct Inner {
    client: redis::Client,
    keys: String,
    timeout: Duration,
    connection: ArcSwapOption<MultiplexedConnection>,
    breaker: Breaker,
    /// The connection is gone.
    gone: Notify,
    /// What this node wrote and how much that is.
    ledger: Mutex<Ledger>,
    figures: Arc<Figures>,
}

/// Whether this node is the one to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guard {
    /// It is, until the guard is freed.
    Mine,
    /// Another one loads at present.
    Theirs,
    /// Nobody knows: Redis is away.
    Unknown,
}

impl Link {
    /// To the server of the settings; not connected yet. This node keeps at most so many bytes there.
    ///
    /// # Errors
    /// In words, when the address cannot be used.
    pub fn new(config: &config::Redis, cluster: &str, bytes: u64, figures: Arc<Figures>) -> Result<Self, String> {
        let url = match config.url_env.as_str() {
            "" => config.url.clone(),
            name => std::env::var(name).map_err(|_| format!("the environment variable {name} is not set"))?,
        };
        let client = match &config.ca_file {
            None => redis::Client::open(url),
            Some(file) => {
                let ca = std::fs::read(file).map_err(|error| format!("redis.ca_file: {error}"))?;
                redis::Client::build_with_tls(url, redis::TlsCertificates { client_tls: None, root_cert: Some(ca) })
            }
        };
        figures.limit(1, bytes);
        Ok(Self(Arc::new(Inner {
            client: client.map_err(|error| error.to_string())?,
            keys: format!("{}:{cluster}:{FORM}:", config.prefix),
            timeout: Duration::from_millis(config.timeout_ms).min(LATEST),
            connection: ArcSwapOption::empty(),
            breaker: Breaker::default(),
            gone: Notify::new(),
            ledger: Mutex::new(Ledger::new(bytes)),
            figures,
        })))
    }

    /// Connects, and again whenever the connection is gone, without end.
    pub async fn keep(&self) {
        let inner = &self.0;
        loop {
            if inner.connection.load().is_none() {
                let now = Instant::now();
                if inner.breaker.allows(now) && !self.connect().await {
                    inner.breaker.failed(Instant::now());
                }
            } else if self.run::<String>(&redis::cmd("PING")).await.is_some() {
                inner.breaker.closed();
            }
            let pause = if inner.connection.load().is_none() { PING / 10 } else { PING };
            let _ = tokio::time::timeout(pause, inner.gone.notified()).await;
        }
    }

    async fn connect(&self) -> bool {
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.0.timeout * 4))
            .set_response_timeout(Some(self.0.timeout));
        match self.0.client.get_multiplexed_async_connection_with_config(&config).await {
            Ok(connection) => {
                self.0.connection.store(Some(Arc::new(connection)));
                self.0.breaker.closed();
                self.0.figures.up(1, true);
                true
            }
            Err(error) => {
                tracing::debug!(%error, "the cache in Redis is left alone for a while");
                self.0.figures.up(1, false);
                false
            }
        }
    }

    /// Whether it answers.
    pub fn is_up(&self) -> bool {
        self.0.connection.load().is_some()
    }

    async fn run<T: FromRedisValue>(&self, command: &Cmd) -> Option<T> {
        let Some(connection) = self.0.connection.load_full() else {
            self.0.figures.skipped(1);
            return None;
        };
        let mut own = (*connection).clone();
        match tokio::time::timeout(self.0.timeout, command.query_async(&mut own)).await {
            Ok(Ok(answer)) => Some(answer),
            end => {
                let before = self.0.connection.compare_and_swap(&connection, None);
                if before.as_ref().is_some_and(|before| Arc::ptr_eq(before, &connection)) {
                    let reason = end.err().map_or_else(|| String::from("an error"), |late| late.to_string());
                    tracing::debug!(reason, "the cache in Redis is left alone until it answers again");
                    self.0.breaker.failed(Instant::now());
                    self.0.figures.up(1, false);
                    self.0.gone.notify_one();
                }
                None
            }
        }
    }

    fn key(&self, slot: &Slot) -> String {
        format!("{}{}", self.0.keys, slot.text())
    }

    fn guard_of(&self, slot: &Slot) -> String {
        format!("{}guard/{}", self.0.keys, slot.text())
    }

    /// What is there.
    pub async fn get(&self, slot: &Slot) -> Option<Vec<u8>> {
        self.run::<Option<Vec<u8>>>(redis::cmd("GET").arg(self.key(slot))).await?
    }

    /// Puts an entry in unless what is there is newer; what this node wrote longest ago goes when it has written too much.
    pub async fn put(&self, slot: &Slot, frozen: &[u8], usable: Millis, now: Millis) {
        let left = usable.0.saturating_sub(now.0).max(1);
        let key = self.key(slot);
        let command = redis::cmd("EVAL").arg(PUT).arg(1).arg(&key).arg(frozen).arg(left).to_owned();
        if self.run::<i64>(&command).await != Some(1) {
            return;
        }
        let over = self.ledger(|ledger| {
            let over = ledger.wrote(key, frozen.len() + super::entry::OVERHEAD);
            self.0.figures.holds(1, ledger.len(), ledger.bytes());
            over
        });
        if !over.is_empty() {
            self.0.figures.evicted(1, slot.kind, over.len() as u64);
            let _ = self.run::<i64>(redis::cmd("UNLINK").arg(&over)).await;
        }
    }

    /// Drops an entry.
    pub async fn remove(&self, slot: &Slot) {
        let key = self.key(slot);
        self.ledger(|ledger| ledger.dropped(&key));
        let _ = self.run::<i64>(redis::cmd("UNLINK").arg(&key)).await;
    }

    /// Another size for what this node keeps there.
    pub async fn resize(&self, bytes: u64) {
        self.0.figures.limit(1, bytes);
        let over = self.ledger(|ledger| ledger.resize(bytes));
        for keys in over.chunks(1000) {
            let _ = self.run::<i64>(redis::cmd("UNLINK").arg(keys)).await;
        }
    }

    /// Asks to be the one that loads.
    pub async fn guard(&self, slot: &Slot, token: u64) -> Guard {
        let milliseconds = u64::try_from(GUARD.as_millis()).unwrap_or(u64::MAX);
        let mut command = redis::cmd("SET");
        command.arg(self.guard_of(slot)).arg(token).arg("NX").arg("PX").arg(milliseconds);
        match self.run::<Option<String>>(&command).await {
            Some(Some(_)) => Guard::Mine,
            Some(None) => Guard::Theirs,
            None => Guard::Unknown,
        }
    }

    /// Is no longer the one that loads.
    pub async fn free(&self, slot: &Slot, token: u64) {
        let _ = self.run::<i64>(redis::cmd("EVAL").arg(FREE).arg(1).arg(self.guard_of(slot)).arg(token)).await;
    }

    /// Entries this node wrote, and their bytes.
    pub fn measure(&self) -> (u64, u64) {
        self.ledger(|ledger| (ledger.len(), ledger.bytes()))
    }

    fn ledger<T>(&self, work: impl FnOnce(&mut Ledger) -> T) -> T {
        work(&mut self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
