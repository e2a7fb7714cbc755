//! Settings: one struct per section, defaults from `config/default.toml`, then file, environment, flags.
//!
//! Owns: the structs (here), layers and decoding (`load.rs`), ranges and settings that need each other (`check.rs`), the
//! printed form (`print.rs`), what is wrong and where (`error.rs`),
//! what changes while a node runs (`live.rs`, `watch.rs`).
//! Not here: validation of things only their owner understands (rules, topics, log filters).
//! A new key: a field here, a line with its comment in `config/default.toml`, a range in `check.rs`.
//! Tests: at the foot of each file; `tests/it/config.rs` drives the binary.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::types::{InstanceId, Roles, Scope, TenantId, profile::EngineName};

mod check;
pub mod env;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod live;
mod load;
pub mod preset;
mod print;
mod scaling;
pub mod tools;
mod tree;
pub mod watch;

pub use error::{Error, Origin, Problem};
pub use load::{DEFAULT_TOML, Loaded, Sources, USUAL_FILE, load};
pub use scaling::{Scaling, ScalingConfig};

/// Everything.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The process.
    pub node: Node,
    /// The HTTP door.
    pub http: Http,
    /// The MQTT door.
    pub mqtt: Mqtt,
    /// The durable truth.
    pub store: Store,
    /// Shards.
    pub cluster: Cluster,
    /// The bus between nodes.
    pub redis: Redis,
    /// Scale.
    pub scaling: Scaling,
    /// What is cached for how long.
    pub cache: Cache,
    /// Instances.
    pub instances: Instances,
    /// Engines and providers.
    pub cognition: Cognition,
    /// What instances remember.
    pub memory: Memory,
    /// What engines may call.
    pub tools: tools::Tools,
    /// Sending effects.
    pub delivery: Delivery,
    /// Credentials.
    pub auth: Auth,
    /// Logs and metrics.
    pub telemetry: Telemetry,
    /// Faults on demand, only in builds with the `faults` feature.
    #[serde(default, skip_serializing_if = "Faults::is_none")]
    pub faults: Faults,
}

impl Config {
    /// Whether this node is one of several: as set, or else whether its store can be shared.
    pub fn scales_out(&self) -> bool {
        self.scaling.limits.horizontal_scaling_enabled.unwrap_or(self.store.backend == Backend::Postgres)
    }
}

/// `[node]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Name in logs and metrics; the host's name when empty.
    pub name: String,
    /// Folder of everything durable.
    pub data_dir: PathBuf,
    /// Threads that run instances; 0 = one per core.
    pub arbiters: usize,
    /// Longest graceful stop, in seconds.
    pub drain_seconds: u64,
    /// How long to serve on while readiness already says no, in seconds.
    pub leave_seconds: u64,
    /// The work this node takes.
    pub roles: Roles,
    /// How many instances it takes compared to other nodes.
    pub weight: u32,
}

impl Node {
    /// The configured name, or else the host's.
    pub fn name(&self) -> String {
        if !self.name.is_empty() {
            return self.name.clone();
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").or_else(|_| std::env::var("HOSTNAME"));
        host.map_or_else(|_| String::from("node"), |host| host.trim().to_owned())
    }
}

/// `[http]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    /// Address; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Where clients reach this door, `http://` or `https://`; told to nobody when absent.
    #[serde(default)]
    pub advertise: Option<String>,
    /// Threads; 0 = one per core.
    pub workers: usize,
    /// Largest request body, in KiB.
    pub max_body_kb: usize,
    /// Most connections at once.
    pub max_connections: usize,
    /// Longest wait for a request's head, in seconds.
    pub header_seconds: u64,
    /// Idle connections are closed after this, in seconds.
    pub keep_alive_seconds: u64,
    /// Longest `?wait=`, in seconds.
    pub max_wait_seconds: u64,
}

/// How the MQTT door works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MqttMode {
    /// A listener in this process.
    Embedded,
    /// A client of an external broker.
    External,
    /// None.
    Off,
}

/// Who of several nodes takes messages from an external broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readers {
    /// Each node, under a session of its own.
    All,
    /// One at a time, under a session of the cluster's.
    One,
}

/// `[mqtt]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mqtt {
    /// Embedded, external or off.
    pub mode: MqttMode,
    /// Embedded: address; port 0 picks a free one.
    pub listen: SocketAddr,
    /// Embedded: TLS address, with `tls_cert` and `tls_key`.
    #[serde(default)]
    pub tls_listen: Option<SocketAddr>,
    /// PEM certificate chain.
    #[serde(default)]
    pub tls_cert: Option<PathBuf>,
    /// PEM private key.
    #[serde(default)]
    pub tls_key: Option<PathBuf>,
    /// Largest packet, in KiB.
    pub max_packet_kb: u32,
    /// Most connections at once.
    pub max_connections: usize,
    /// Most unacknowledged publishes taken from one connection; sent as receive maximum on MQTT 5.
    pub receive_maximum: u16,
    /// Most messages waiting for one session.
    pub max_queued: usize,
    /// Longest session life after a disconnect, in seconds.
    pub max_session_expiry_seconds: u32,
    /// Keep-alive for clients that ask for none, in seconds; 0 = none.
    pub default_keep_alive_seconds: u16,
    /// Plain pub/sub within the tenant on topics outside `sophont/`.
    pub plain_topics: bool,
    /// External: broker, `mqtt://HOST:PORT` or `mqtts://HOST:PORT`.
    #[serde(default)]
    pub url: String,
    /// External: client id; stable, so that the session resumes.
    #[serde(default)]
    pub client_id: String,
    /// External: user name.
    #[serde(default)]
    pub username: String,
    /// External: environment variable that holds the password.
    #[serde(default)]
    pub password_env: String,
    /// External: PEM file with the broker's CA; the system's roots when absent.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// External: shared subscription group; empty = a plain subscription.
    #[serde(default)]
    pub share_group: String,
    /// External: who of several nodes takes messages from the broker.
    pub readers: Readers,
}

/// Where the truth is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// One file in the data folder.
    Sqlite,
    /// A database that many nodes share.
    Postgres,
    /// Nothing survives: for trying things and for tests.
    Memory,
}

/// What a commit waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// fsync before each acknowledgement: survives power loss.
    Full,
    /// The operating system has it: survives kill -9, a power cut may lose the last seconds.
    Normal,
    /// No syncs at all.
    Off,
}

/// `[store]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Store {
    /// Backend.
    pub backend: Backend,
    /// Durability.
    pub durability: Durability,
    /// Most units in one group commit.
    pub max_batch: usize,
    /// Most units waiting for the writer.
    pub max_queue: usize,
    /// SQLite: most threads and connections that read; 0 = one per core.
    pub readers: usize,
    /// Page cache of each connection, in MiB.
    pub cache_mb: usize,
    /// Statements that take as long are logged, in milliseconds; 0: none.
    pub slow_query_ms: u64,
    /// `[store.postgres]`
    pub postgres: Postgres,
}

/// How connections to PostgreSQL are protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PostgresTls {
    /// Not at all.
    Off,
    /// TLS; the server's certificate must be good and for its name.
    Verify,
}

/// Whether rows of a tenant are read as a role that sees no other tenant's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowSecurity {
    /// If there is such a role or it may be made.
    Auto,
    /// Or the node does not start.
    Require,
    /// As the role that writes.
    Off,
}

/// `[store.postgres]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Postgres {
    /// Where the database is; without a password.
    #[serde(default)]
    pub url: String,
    /// Environment variable that holds the address, password and all; it goes before `url`.
    #[serde(default)]
    pub url_env: String,
    /// Where the server itself is, when `url` is that of a pooler.
    #[serde(default)]
    pub direct_url: String,
    /// As `url_env`, for `direct_url`.
    #[serde(default)]
    pub direct_url_env: String,
    /// A read replica; none when empty.
    #[serde(default)]
    pub replica_url: String,
    /// As `url_env`, for `replica_url`.
    #[serde(default)]
    pub replica_url_env: String,
    /// Whether a pooler in transaction mode stands between.
    pub pooler: bool,
    /// TLS.
    pub tls: PostgresTls,
    /// PEM file with the authorities to trust; the system's when absent.
    pub tls_ca: Option<PathBuf>,
    /// Row-level security of reads.
    pub row_security: RowSecurity,
    /// Connections that commit.
    pub lanes: usize,
    /// Longest wait for the server to answer when connecting, in milliseconds.
    pub connect_ms: u64,
    /// Longest statement, in milliseconds.
    pub statement_ms: u64,
    /// Longest wait for a lock, in milliseconds.
    pub lock_ms: u64,
    /// How long the server waits in the middle of a transaction for a node that is silent, in milliseconds.
    pub idle_in_transaction_ms: u64,
}

/// `[cluster]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Hash slices of instances.
    pub shards: u32,
    /// How long a silent node keeps what it owns, in seconds.
    pub lease_seconds: u64,
    /// Most shards on the move at once.
    pub max_moves: usize,
}

/// `[redis]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    /// Server of the bus between nodes, `redis://` or `rediss://`; none when empty.
    pub url: String,
    /// Environment variable that holds the whole address; goes before `url`.
    pub url_env: String,
    /// PEM file with the CA of the server; the system's roots when absent.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// What all keys begin with.
    pub prefix: String,
    /// Longest wait for a connection or an answer of the server, in milliseconds.
    pub timeout_ms: u64,
    /// How long another node may take to answer for forwarded stimuli, in milliseconds.
    pub answer_ms: u64,
    /// Most messages waiting to be sent.
    pub max_queue: usize,
    /// Most bytes of them, in MiB.
    pub max_queue_mb: usize,
    /// Most entries the server keeps for a node that is behind.
    pub mailbox_entries: usize,
}

impl Redis {
    /// Those settings, without a server.
    #[must_use]
    pub fn off(&self) -> Self {
        Self { url: String::new(), url_env: String::new(), ..self.clone() }
    }

    /// Whether there is no bus.
    pub const fn is_off(&self) -> bool {
        self.url.is_empty() && self.url_env.is_empty()
    }
}

/// `[cache]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    /// By how much a time to live is shortened at random, in percent.
    pub jitter_percent: u64,
    /// How long it is remembered that there is nothing, in seconds.
    pub negative_seconds: u64,
    /// `[cache.ttl]`
    pub ttl: CacheTtl,
    /// `[cache.stale]`
    pub stale: CacheStale,
}

/// `[cache.ttl]`: how long each data type is fresh, in seconds; 0: it is not held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheTtl {
    /// States, for readers that do not mind.
    pub state: u64,
    /// Profiles made ready, in memory only.
    pub profile: u64,
    /// Instances as they left memory, in memory only.
    pub snapshot: u64,
    /// Results of recall, in memory only.
    pub recall: u64,
    /// Embeddings.
    pub embedding: u64,
    /// Answers of models.
    pub answer: u64,
    /// Results of tools that allow it.
    pub tool: u64,
}

/// `[cache.stale]`: for how long a data type is served beyond that while a fresh value is loaded, in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheStale {
    /// Results of tools.
    pub tool: u64,
}

/// As in `config/default.toml`.
impl Default for Cache {
    fn default() -> Self {
        Self { jitter_percent: 10, negative_seconds: 10, ttl: CacheTtl::default(), stale: CacheStale::default() }
    }
}

/// As in `config/default.toml`.
impl Default for CacheTtl {
    fn default() -> Self {
        Self { state: 30, profile: 3600, snapshot: 3600, recall: 3600, embedding: 604_800, answer: 86_400, tool: 300 }
    }
}

/// As in `config/default.toml`.
impl Default for CacheStale {
    fn default() -> Self {
        Self { tool: 60 }
    }
}

/// `[instances]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instances {
    /// An instance without stimuli leaves memory after this many seconds.
    pub idle_passivate_seconds: u64,
    /// Most stimuli waiting for one instance.
    pub max_inbox: usize,
    /// How often the store is searched for waiting stimuli nobody was woken for, in seconds.
    pub scan_seconds: u64,
}

/// `[cognition]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cognition {
    /// Engine of profiles that name none.
    pub default_engine: EngineName,
    /// Provider of profiles that name none; the only one when there is just one.
    #[serde(default)]
    pub default_provider: String,
    /// Longest thinking for one turn, in seconds.
    pub think_seconds: u64,
    /// Most answers and tool results of one turn.
    pub max_steps: u32,
    /// Most tokens of all model calls of one turn together.
    pub max_tokens_per_turn: u64,
    /// Providers by name.
    #[serde(default)]
    pub providers: BTreeMap<String, Provider>,
}

/// `[cognition.providers.NAME]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Up to and including `/v1`.
    pub base_url: String,
    /// Environment variable that holds the key; none when empty.
    #[serde(default)]
    pub api_key_env: String,
    /// Model when the profile names none.
    #[serde(default)]
    pub model: String,
    /// Calls at once.
    #[serde(default = "four")]
    pub max_concurrent: usize,
    /// Calls waiting.
    #[serde(default = "thousand")]
    pub max_waiting: usize,
    /// Longest wait for the next byte of an answer, in seconds.
    #[serde(default = "sixty")]
    pub idle_seconds: u64,
    /// Most tokens of an answer.
    #[serde(default = "thousand_u32")]
    pub max_tokens: u32,
    /// The model's window: tokens of everything it is told and of its answer together.
    #[serde(default = "window")]
    pub context_tokens: u32,
}

const fn four() -> usize {
    4
}
const fn thousand() -> usize {
    1000
}
const fn thousand_u32() -> u32 {
    1000
}
const fn window() -> u32 {
    8192
}
const fn sixty() -> u64 {
    60
}

/// `[memory]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Memory for the episodes of instances that were asked lately, in MiB.
    pub cache_mb: usize,
    /// Where vectors of texts come from.
    pub embedder: Embedder,
    /// So many vectors of one instance are compared one by one; more get an index.
    pub exact_vectors: usize,
    /// The server of `embedder = "endpoint"`.
    pub endpoint: EmbedderEndpoint,
    /// The model of `embedder = "model"`.
    pub model: EmbedderModel,
}

/// `[memory.model]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedderModel {
    /// Folder of a static embedding model: `tokenizer.json`, `model.safetensors`, `config.json`.
    pub path: PathBuf,
}

/// Why `embedder = "model"` is refused by a build without them.
pub const NO_MODELS: &str = "this build has no embedding models";

/// `[memory.endpoint]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbedderEndpoint {
    /// Up to and including `/v1`.
    pub base_url: String,
    /// Environment variable that holds the key; none when empty.
    pub api_key_env: String,
    /// Model.
    pub model: String,
    /// Texts of one request.
    pub max_batch: usize,
    /// How long texts are gathered for a request, in milliseconds.
    pub wait_ms: u64,
    /// Requests at once.
    pub max_concurrent: usize,
    /// Longest request, in milliseconds.
    pub timeout_ms: u64,
}

/// Where vectors of texts come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Embedder {
    /// The built-in one: hashed words and parts of words.
    Lexical,
    /// A model server that speaks the OpenAI embeddings protocol.
    Endpoint,
    /// A static embedding model in a folder; in builds with the cargo feature `static-embeddings`.
    Model,
    /// Nowhere: texts are found by their words, and by vectors the client sends.
    Off,
}

/// `[delivery]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delivery {
    /// Hosts (`host` or `host:port`) webhooks may call; none when empty.
    pub webhook_allow: Vec<String>,
    /// Longest webhook call, in seconds.
    pub webhook_seconds: u64,
    /// Tries before an effect is given up.
    pub max_tries: u32,
    /// Most hops from instance to instance that one stimulus from outside may lead to, one after the other.
    pub max_hops: u32,
}

/// `[auth]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// Tenant of callers on loopback without a token.
    pub default_tenant: TenantId,
    /// Static tokens. With any configured, loopback needs one too.
    #[serde(default)]
    pub tokens: Vec<Token>,
}

/// `[[auth.tokens]]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// The secret itself, or
    #[serde(default, serialize_with = "print::hide", skip_serializing_if = "Option::is_none")]
    pub token: Option<secrecy::SecretString>,
    /// the environment variable that holds it.
    #[serde(default)]
    pub token_env: String,
    /// Tenant.
    pub tenant: TenantId,
    /// User or device name.
    pub name: String,
    /// Whether it is a device.
    #[serde(default)]
    pub device: bool,
    /// The only instance it may touch.
    #[serde(default)]
    pub instance: Option<InstanceId>,
    /// Rights.
    #[serde(default = "read_write")]
    pub scopes: Vec<Scope>,
}

fn read_write() -> Vec<Scope> {
    vec![Scope::Read, Scope::Write]
}

/// Form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    /// For people.
    Human,
    /// A JSON object a line.
    Json,
}

/// `[telemetry]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Telemetry {
    /// Filter, such as `info` or `sophont=debug,warn`.
    pub log: String,
    /// Form.
    pub log_format: LogFormat,
}

/// `[faults]`, for tests. A build without the `faults` feature refuses any of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Acknowledge before the commit: the negative control of the crash test.
    pub ack_before_commit: bool,
    /// A turn whose stimulus has this text panics.
    pub panic_on: String,
    /// Engines have the tools `touch` (never called twice) and `look`, which are POSTs below this address.
    pub tools_url: String,
    /// The store reports a full disk while this file exists.
    pub disk_full_file: Option<PathBuf>,
    /// Do not recognise repeated stimulus ids.
    pub dedupe_off: bool,
    /// Write for shards that others took, and never notice that they did: the negative control of the cluster tests.
    pub fence_off: bool,
    /// Nodes do not hear which states are stale.
    pub drop_invalidations: bool,
    /// Nodes do not hear who listens to answers at the doors of others.
    pub drop_listens: bool,
    /// Cached states are served whoever changed them meanwhile: the negative control of the cache's tests.
    pub cache_blind: bool,
    /// How busy the node says it is, in thousandths, in place of how busy it is.
    pub busy_permille: Option<u32>,
    /// How much of its memory the node says it uses, in thousandths, in place of how much it uses.
    pub memory_permille: Option<u32>,
    /// The version of the cluster's protocol that the node claims to speak, and no other.
    pub protocol: Option<u32>,
}

impl Faults {
    /// Whether nothing is broken on purpose.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}
