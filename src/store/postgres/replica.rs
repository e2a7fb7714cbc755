//! Reads from a streaming replica that see everything that was committed when they began, on any node.
//!
//! The primary is asked once, for many reads together, how far its log goes; a read stands if the replica has replayed the log
//! so far, and is asked of the primary otherwise. Invariant: the primary is asked after the read began.
//! Tests: `tests/it/store_postgres.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Mutex, time::Instant};
use tokio_postgres::{Row, types::Type};

use super::{
    connect::Failure,
    connections::Connections,
    sql::{Conn, Param, Sql},
};

use crate::types::TenantId;

/// How long a replica that failed is left alone.
const REST: Duration = Duration::from_secs(1);

/// Up to here the log is on the primary's disk: whatever was acknowledged is.
const FLUSHED: Sql = Sql { text: "SELECT pg_current_wal_flush_lsn()::text", types: &[] };
/// Up to here it is written at all, for those who do not wait for the disk.
const WRITTEN: Sql = Sql { text: "SELECT pg_current_wal_insert_lsn()::text", types: &[] };
const REACHED: Sql = Sql {
    text: "SELECT pg_is_in_recovery() AND coalesce(pg_last_wal_replay_lsn() >= $1::text::pg_lsn, false)",
    types: &[Type::TEXT],
};

/// A replica.
pub(super) struct Replica {
    pool: Arc<Connections>,
    /// Whether acknowledgements wait for the disk.
    flushes: bool,
    prepared: bool,
    /// Questions to the primary that have begun.
    begun: AtomicU64,
    /// The number of the last one that was answered, and the answer.
    last: Mutex<(u64, Arc<str>)>,
    /// Until when it is left alone.
    resting: std::sync::Mutex<Option<Instant>>,
    /// Reads that stood.
    served: AtomicU64,
}

impl Replica {
    /// A replica behind this pool.
    pub(super) fn new(pool: Arc<Connections>, flushes: bool, prepared: bool) -> Self {
        Self {
            pool,
            flushes,
            prepared,
            begun: AtomicU64::new(0),
            last: Mutex::new((0, Arc::from(""))),
            resting: std::sync::Mutex::new(None),
            served: AtomicU64::new(0),
        }
    }

    /// Reads that stood so far.
    pub(super) fn served(&self) -> u64 {
        self.served.load(Ordering::Relaxed)
    }

    /// Its connections.
    pub(super) const fn connections(&self) -> &Arc<Connections> {
        &self.pool
    }

    /// Closes its connections.
    pub(super) fn close(&self) {
        self.pool.close();
    }

    /// What the replica has, if that is everything.
    pub(super) async fn rows(
        &self,
        primary: &Connections,
        guard: Option<&TenantId>,
        sql: &Sql,
        params: &[Param<'_>],
    ) -> Option<Vec<Row>> {
        let mut resting = *self.resting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if resting.take_if(|until| Instant::now() < *until).is_some() {
            return None;
        }
        match self.try_rows(primary, guard, sql, params).await {
            Ok(rows) => {
                self.served.fetch_add(u64::from(rows.is_some()), Ordering::Relaxed);
                rows
            }
            Err(failure) => {
                tracing::debug!(?failure, "the replica cannot be read, the primary is");
                let until = Instant::now() + REST;
                *self.resting.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(until);
                None
            }
        }
    }

    async fn try_rows(
        &self,
        primary: &Connections,
        guard: Option<&TenantId>,
        sql: &Sql,
        params: &[Param<'_>],
    ) -> Result<Option<Vec<Row>>, Failure> {
        let end = self.end_of_log(primary).await?;
        let conn = Conn::new(self.pool.get().await?, self.prepared);
        conn.prepare(&REACHED).await?;
        conn.prepare(sql).await?;
        // In this order: what was replayed at the first stands at the second.
        let end: [Param<'_>; 1] = [&&*end];
        let (reached, rows) = futures_util::future::join(conn.run(&REACHED, &end), conn.read(guard, sql, params)).await;
        let reached = reached?.first().map(|row| row.try_get::<_, bool>(0)).transpose()?;
        Ok(if reached == Some(true) { Some(rows?) } else { None })
    }

    /// How far the primary's log went at some time after this was called.
    async fn end_of_log(&self, primary: &Connections) -> Result<Arc<str>, Failure> {
        let needed = self.begun.load(Ordering::Acquire) + 1;
        let mut last = self.last.lock().await;
        if last.0 >= needed {
            return Ok(Arc::clone(&last.1));
        }
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let conn = Conn::new(primary.get().await?, self.prepared);
        let found = conn.run(if self.flushes { &FLUSHED } else { &WRITTEN }, &[]).await?;
        let end = found.first().map(|row| row.try_get::<_, &str>(0)).transpose()?.unwrap_or_default();
        *last = (number, Arc::from(end));
        Ok(Arc::clone(&last.1))
    }
}
