//! Where the nodes of tests keep the truth, and how many share it: `SOPHONT_TEST_STORE`.
//!
//! | value | a `Node` is |
//! |---|---|
//! | none, `sqlite` | one process with its data folder |
//! | `postgres` | one process with a database of its own |
//! | `cluster` | three processes on one database and one Redis, behind a balancer that goes round |
//!
//! A test that configures the store itself is left alone. One that is not about every store says so with [`About`], and runs
//! where it has a meaning: nothing is skipped.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{postgres, redis::Redis};

/// What `SOPHONT_TEST_STORE` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// A data folder.
    Sqlite,
    /// A database.
    Postgres,
    /// A database, shared by three.
    Cluster,
}

/// Why a test is about less than every store: the whole list of exceptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// The data folder: its name in the log, its lock, its files. Runs on SQLite.
    Folder,
    /// One process: its memory, its log, its connections, limits and figures that each node has for itself. Runs on one node.
    Process,
}

/// What is asked for.
///
/// # Panics
/// When it is none of those.
pub fn asked() -> Truth {
    match std::env::var("SOPHONT_TEST_STORE").as_deref() {
        Err(_) | Ok("" | "sqlite") => Truth::Sqlite,
        Ok("postgres") => Truth::Postgres,
        Ok("cluster") => Truth::Cluster,
        Ok(other) => panic!("SOPHONT_TEST_STORE is sqlite, postgres or cluster, not '{other}'"),
    }
}

impl Truth {
    /// What is asked for, for a test about this.
    pub fn of(about: Option<About>) -> Self {
        match (asked(), about) {
            (_, Some(About::Folder)) => Self::Sqlite,
            (Self::Cluster, Some(About::Process)) => Self::Postgres,
            (asked, _) => asked,
        }
    }

    /// How many nodes share it.
    pub const fn nodes(self) -> usize {
        if matches!(self, Self::Cluster) { 3 } else { 1 }
    }
}

/// The settings with which nodes are a cluster of their own on a database.
#[derive(Debug, Clone)]
pub struct Cluster {
    name: String,
    redis: String,
}

impl Cluster {
    /// Shards of such a cluster: few, so that it is soon complete.
    pub const SHARDS: u64 = 24;

    /// A new one, on the Redis that tests share.
    pub async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        static REDIS: tokio::sync::OnceCell<String> = tokio::sync::OnceCell::const_new();
        let redis = REDIS.get_or_init(|| async { Redis::shared().await }).await;
        let name = format!("tests-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Self { name, redis: redis.clone() }
    }

    /// The arguments of one of its nodes.
    pub fn arguments(&self, number: usize) -> Vec<String> {
        let settings = [
            format!("node.name=n{number}"),
            format!("cluster.name={}", self.name),
            format!("cluster.shards={}", Self::SHARDS),
            format!("cluster.max_moves={}", Self::SHARDS),
            format!("redis.url={}", self.redis),
            String::from("store.postgres.lanes=2"),
            String::from("scaling.connection_pool_size=4"),
            String::from("scaling.pool_overflow=0"),
        ];
        settings.into_iter().flat_map(|setting| [String::from("--set"), setting]).collect()
    }
}

/// The arguments with which a node keeps everything in a database, for itself or with others.
///
/// Nobody waits for the lease of one that is alone: when it was killed, its session tells. With a long one it does not lose its
/// shards for being late where a machine is full of other work.
pub fn database(url: &str, truth: Truth) -> Vec<String> {
    let mut arguments = postgres::arguments(url);
    if truth == Truth::Postgres {
        arguments.extend(["--set", "cluster.lease_seconds=20"].map(String::from));
    }
    arguments
}
