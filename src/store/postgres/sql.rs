//! A statement with the types of its parameters, and a connection that runs it: prepared where sessions are ours alone, unnamed
//! behind a pooler that gives each transaction another session.
//!
//! Invariant: once prepared, a statement is on its way when its future was polled once, so that several are sent in one
//! round trip in the order in which they are first polled.

use deadpool_postgres::Object;
use tokio_postgres::{
    Row,
    types::{ToSql, Type},
};

use super::connect::Failure;

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
}

impl Conn {
    /// Wraps a pool's connection.
    pub(super) fn new(client: Object, prepared: bool) -> Self {
        Self { client, prepared }
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
            self.client.prepare_typed_cached(sql.text, sql.types).await?;
        }
        Ok(())
    }

    /// Runs a statement.
    pub(super) async fn run(&self, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Failure> {
        if self.prepared {
            let statement = self.client.prepare_typed_cached(sql.text, sql.types).await?;
            return Ok(self.client.query(&statement, params).await?);
        }
        let typed: Vec<(Param<'_>, Type)> = params.iter().copied().zip(sql.types.iter().cloned()).collect();
        Ok(self.client.query_typed(sql.text, &typed).await?)
    }

    /// Runs statements without parameters.
    pub(super) async fn batch(&self, text: &str) -> Result<(), Failure> {
        Ok(self.client.batch_execute(text).await?)
    }
}
