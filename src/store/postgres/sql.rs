//! A statement with the types of its parameters, and a connection that runs it: prepared where sessions are ours alone, unnamed
//! behind a pooler that gives each transaction another session.
//!
//! Invariant: once prepared, a statement is on its way when its future was polled once, so that several are sent in one
//! round trip in the order in which they are first polled.

use std::time::Instant;

use deadpool_postgres::Object;
use tokio_postgres::{
    Row, Statement,
    types::{ToSql, Type},
};

use super::{connect::Failure, connections::Held};
use crate::{scaling::pool::Place, store::slow, telemetry::metric};

/// A statement.
#[derive(Debug)]
pub(super) struct Sql {
    /// Its text.
    pub text: &'static str,
    /// The types of its parameters.
    pub types: &'static [Type],
}

/// A parameter.
pub(super) type Param<'a> = &'a (dyn ToSql + Sync);

/// A connection.
pub(super) struct Conn {
    client: Object,
    prepared: bool,
    /// Given back when the connection is.
    _place: Place,
}

impl Conn {
    /// Wraps a pool's connection.
    pub(super) fn new(held: Held, prepared: bool) -> Self {
        Self { client: held.client, prepared, _place: held.place }
    }

    /// Whether the server has gone away.
    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Closes it: its transaction is not over.
    pub(super) fn discard(self) {
        drop(Object::take(self.client));
    }

    /// Makes sure that the statement can be sent at once.
    pub(super) async fn prepare(&self, sql: &Sql) -> Result<(), Failure> {
        if self.prepared {
            let began = Instant::now();
            let prepared = self.statement(sql).await;
            slow::note("postgres", sql.text, began.elapsed());
            prepared?;
        }
        Ok(())
    }

    /// The statement as it stands prepared on this connection, prepared now if it does not.
    async fn statement(&self, sql: &Sql) -> Result<Statement, Failure> {
        let known = self.client.statement_cache.size();
        let statement = self.client.prepare_typed_cached(sql.text, sql.types).await?;
        // Several are prepared at once on one connection: the figures are about right.
        let result = if self.client.statement_cache.size() > known { "miss" } else { "hit" };
        metrics::counter!(metric::STORE_STATEMENTS, "result" => result).increment(1);
        Ok(statement)
    }

    /// Runs a statement.
    pub(super) async fn run(&self, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Failure> {
        let began = Instant::now();
        let rows = if self.prepared {
            let statement = self.statement(sql).await?;
            self.client.query(&statement, params).await
        } else {
            let typed: Vec<(Param<'_>, Type)> = params.iter().copied().zip(sql.types.iter().cloned()).collect();
            self.client.query_typed(sql.text, &typed).await
        };
        slow::note("postgres", sql.text, began.elapsed());
        Ok(rows?)
    }

    /// Runs statements without parameters.
    pub(super) async fn batch(&self, text: &str) -> Result<(), Failure> {
        Ok(self.client.batch_execute(text).await?)
    }
}
