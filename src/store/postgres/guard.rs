//! As whom the rows of a tenant are read: a role that row-level security binds, which sees one tenant at a time.
//!
//! A read is a transaction that takes the role and names the tenant; all of it is sent at once, so it takes one round trip, as
//! the bare query would. What is asked across tenants (what waits, what is due, the feeds) and what is written goes as the owner
//! of the tables, whom the policies do not bind.
//!
//! Invariants: a read under guard whose role or tenant could not be set reads nothing; both end with the transaction.
//! Decision: `docs/adr/0010-row-level-security.md`. Tests: `tests/it/store_postgres.rs`.

use tokio_postgres::Row;

use super::{
    connect::{Failure, Target},
    sql::{Conn, Param, Sql},
};
use crate::{config::RowSecurity, store::Error, types::TenantId};

/// Opens a transaction of the role.
const TAKE: &str = "BEGIN READ ONLY; SET LOCAL ROLE sophont_reader";
/// What it reads.
const TABLES: &str = "instances, turns, seen, episodes, inbox, dead, turn_steps, blobs, memory_parts";

/// Whether the role may read what it must, and is bound by the policies.
const BOUND: Sql = Sql {
    text: "SELECT coalesce(bool_and(has_table_privilege(t, 'SELECT') AND row_security_active(t)), false)
           FROM unnest(ARRAY['instances', 'turns', 'seen', 'episodes', 'inbox', 'dead', 'turn_steps', 'blobs', 'memory_parts']) t",
    types: &[],
};
/// Whether the role as whom the node writes is bound itself.
const OWN: Sql = Sql {
    text: "SELECT row_security_active('turns'), quote_ident(current_user::text), current_user::text",
    types: &[],
};

impl Conn {
    /// Runs a statement that reads; with a tenant, as the role that sees no other. Once the statement is prepared all of it is on
    /// its way when the future was polled once.
    pub(super) async fn read(
        &self,
        guard: Option<&TenantId>,
        sql: &Sql,
        params: &[Param<'_>],
    ) -> Result<Vec<Row>, Failure> {
        let Some(tenant) = guard else { return self.run(sql, params).await };
        self.prepare(sql).await?;
        let begin = begin(tenant);
        // Sent in this order.
        let (begun, rows, ended) = futures_util::join!(self.batch(&begin), self.run(sql, params), self.batch("COMMIT"));
        begun?;
        let rows = rows?;
        ended?;
        Ok(rows)
    }
}

/// Opens a transaction of the role for a tenant, whose name needs no quotes: see `types::id`.
fn begin(tenant: &TenantId) -> String {
    format!("{TAKE}; SET LOCAL sophont.tenant = '{tenant}'")
}

/// Makes sure that there is a role to read as, as far as it is wanted and this node may; whether there is.
///
/// # Errors
/// [`Error::Backend`] when there is none and one is required, and when the policies bind the writing role itself.
pub(super) async fn establish(wanted: RowSecurity, writer: &Conn, direct: &Target) -> Result<bool, Error> {
    let own = writer.run(&OWN, &[]).await?;
    let own = own.first().ok_or_else(|| Error::Backend(String::from("PostgreSQL does not say who we are")))?;
    let column = |e: tokio_postgres::Error| Error::from(Failure::from(e));
    let (bound, quoted, name): (bool, &str, &str) =
        (own.try_get(0).map_err(column)?, own.try_get(1).map_err(column)?, own.try_get(2).map_err(column)?);
    if bound {
        return Err(Error::Backend(format!(
            "the role {name} of store.postgres.url does not own the tables, so their row-level security keeps it from \
             writing: GRANT their owner TO {quoted}, or make it their owner"
        )));
    }
    if wanted == RowSecurity::Off {
        return Ok(false);
    }
    let Err(first) = probe(writer).await else { return Ok(true) };
    let made = make(direct, (name, quoted)).await;
    let Err(second) = probe(writer).await else { return Ok(true) };
    let why = made.err().map_or(second, |failure| format!("{first}; {failure}"));
    let text = format!(
        "reads cannot go as the role sophont_reader, which sees one tenant at a time ({why}): as an administrator run \
         CREATE ROLE sophont_reader NOLOGIN; GRANT sophont_reader TO {quoted}"
    );
    match wanted {
        RowSecurity::Require => Err(Error::Backend(text)),
        RowSecurity::Auto | RowSecurity::Off => {
            tracing::warn!("{text}; until then they go as {name}, and only the queries themselves keep tenants apart");
            Ok(false)
        }
    }
}

/// Whether the role serves.
///
/// # Errors
/// Why it does not.
async fn probe(conn: &Conn) -> Result<(), String> {
    let tried = async {
        conn.batch(TAKE).await?;
        let rows = conn.run(&BOUND, &[]).await?;
        Ok::<_, Failure>(rows.first().map(|row| row.try_get::<_, bool>(0)).transpose()?)
    };
    let tried = tried.await;
    let ended = conn.batch("ROLLBACK").await;
    match (tried, ended) {
        (Ok(Some(true)), Ok(())) => Ok(()),
        (Ok(_), Ok(())) => Err(String::from("it may not read the tables, or no policy binds it")),
        (Err(failure), _) | (_, Err(failure)) => Err(failure.into_error().to_string()),
    }
}

/// Makes the role, lets the writing role take it, and lets it read. Each step by itself: an administrator may have done one.
///
/// # Errors
/// What the server does not allow.
async fn make(direct: &Target, (name, quoted): (&str, &str)) -> Result<(), String> {
    let (client, task) = direct.connect().await.map_err(|e| Failure::from(e).into_error().to_string())?;
    // Other databases of this server may make it at the same moment.
    let steps = [
        String::from(
            "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'sophont_reader') THEN \
             CREATE ROLE sophont_reader NOLOGIN; END IF; \
             EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$",
        ),
        format!(
            "DO $$ BEGIN IF NOT pg_has_role('{}', 'sophont_reader', 'MEMBER') THEN \
             GRANT sophont_reader TO {quoted}; END IF; END $$",
            name.replace('\'', "''")
        ),
        format!(
            "DO $$ BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO sophont_reader', current_schema()); END $$; \
             GRANT SELECT ON {TABLES} TO sophont_reader"
        ),
    ];
    let mut refused = Ok(());
    for step in steps {
        let done = client.batch_execute(&step).await;
        refused = refused.and(done.map_err(|e| Failure::from(e).into_error().to_string()));
    }
    drop(client);
    task.abort();
    refused
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_read_takes_the_role_before_it_names_the_tenant() {
        let tenant = TenantId::new("acme.eu_1").unwrap();
        let expected = "BEGIN READ ONLY; SET LOCAL ROLE sophont_reader; SET LOCAL sophont.tenant = 'acme.eu_1'";
        assert_eq!(begin(&tenant), expected);
    }
}
