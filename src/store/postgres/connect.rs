//! Getting a connection: addresses, TLS, session settings, migrations, and what PostgreSQL's errors mean.
//!
//! Invariants: connections live on the runtime the store was opened with, whoever asks for them; no secret is logged.
//! Tests: `tests/it/store_postgres.rs`.

use std::{fmt::Write as _, str::FromStr, sync::Arc, time::Duration};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Pool, RecyclingMethod};
use futures_util::{FutureExt, future::BoxFuture};
use secrecy::ExposeSecret as _;
use tokio::{runtime::Handle, task::JoinHandle};
use tokio_postgres::{Client, Config, NoTls, error::SqlState};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::{
    config::{self, Durability, PostgresTls},
    store::Error,
};

mod migrations {
    refinery::embed_migrations!("migrations/postgres");
}

/// The session lock under which one node at a time changes the schema.
const MIGRATING: i64 = 0x736f_7068_6f6e_7400;

/// Why a statement failed, by what it means for the transaction.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    /// The connection is gone, or leads to a server that takes no writes.
    Lost(String),
    /// The server ended the transaction; the same work may succeed when it is tried again.
    Again(String),
    /// The work itself is at fault, or the server cannot do it.
    Refused(Error),
    /// A row stands where the unit wants to write: its head is not the one in force.
    Taken,
}

impl Failure {
    /// What a caller is told when this was the last try.
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::Lost(text) => Error::Backend(format!("no connection to PostgreSQL: {text}")),
            Self::Again(text) => Error::Backend(text),
            Self::Refused(error) => error,
            Self::Taken => Error::Backend(String::from("the unit builds on a turn that is not the last")),
        }
    }
}

/// An error with its cause: the crate's own text leaves the server's out.
fn text(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => {
            std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}"))
        }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        let text = text(&error);
        let Some(code) = error.code() else {
            let io = std::error::Error::source(&error).is_some_and(|source| source.is::<std::io::Error>());
            return if io || error.is_closed() { Self::Lost(text) } else { Self::Refused(Error::Backend(text)) };
        };
        if *code == SqlState::UNIQUE_VIOLATION {
            return Self::Taken;
        }
        match code.code() {
            "53100" => Self::Refused(Error::Full(text)),
            "XX001" | "XX002" => Self::Refused(Error::Corrupt(text)),
            // Terminated, shutting down, starting, idle too long in a transaction, not (or no more) the primary, no slot.
            "57P01" | "57P02" | "57P03" | "57P05" | "25P03" | "25006" | "53300" => Self::Lost(text),
            // Deadlock and serialization, lock and statement timeouts, memory, and what follows from another failure.
            "55P03" | "57014" | "53200" | "25P02" => Self::Again(text),
            code if code.starts_with("40") => Self::Again(text),
            code if code.starts_with("08") => Self::Lost(text),
            _ => Self::Refused(Error::Backend(text)),
        }
    }
}

/// How this node reaches a server.
#[derive(Clone)]
pub(super) struct Target {
    config: Config,
    tls: Option<MakeRustlsConnect>,
    /// Statements that set the session up, where sessions are ours alone.
    setup: Option<String>,
    handle: Handle,
}

impl Target {
    /// The server behind an address, with the settings of `[store]`. `pooled`: behind a pooler that gives each transaction
    /// another session.
    ///
    /// # Errors
    /// [`Error::Backend`] when the address or the certificates cannot be used.
    pub(super) fn new(url: &str, config: &config::Store, pooled: bool, handle: Handle) -> Result<Self, Error> {
        let unusable = |e: &dyn std::fmt::Display| Error::Backend(format!("the address of PostgreSQL: {e}"));
        let mut target = Config::from_str(url).map_err(|e| unusable(&e))?;
        let postgres = &config.postgres;
        if target.get_connect_timeout().is_none() {
            target.connect_timeout(Duration::from_millis(postgres.connect_ms));
        }
        if target.get_application_name().is_none() {
            target.application_name("sophont");
        }
        target.keepalives_idle(Duration::from_secs(10));
        target.tcp_user_timeout(Duration::from_secs(20));
        let tls = match postgres.tls {
            PostgresTls::Off => None,
            PostgresTls::Verify => {
                target.ssl_mode(tokio_postgres::config::SslMode::Require);
                Some(tls(postgres.tls_ca.as_deref())?)
            }
        };
        let setup = (!pooled).then(|| settings(config, "SET SESSION"));
        Ok(Self { config: target, tls, setup, handle })
    }

    /// A connection of its own, set up.
    pub(super) async fn connect(&self) -> Result<(Client, JoinHandle<()>), tokio_postgres::Error> {
        let (target, tls) = (self.config.clone(), self.tls.clone());
        let opening = self.handle.spawn(async move {
            // The two kinds of connection differ in type and end the same way.
            let (client, connection): (Client, BoxFuture<'static, Result<(), tokio_postgres::Error>>) = match tls {
                None => {
                    let (client, connection) = target.connect(NoTls).await?;
                    (client, connection.boxed())
                }
                Some(tls) => {
                    let (client, connection) = target.connect(tls).await?;
                    (client, connection.boxed())
                }
            };
            let task = tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!("a connection to PostgreSQL ended: {}", text(&error));
                }
            });
            Ok((client, task))
        });
        let (client, task) = match opening.await {
            Ok(opened) => opened?,
            Err(_) => return Err(tokio_postgres::Error::__private_api_timeout()),
        };
        if let Some(setup) = &self.setup {
            client.batch_execute(setup).await?;
        }
        Ok((client, task))
    }

    /// Connections kept, at most `most`; who may have one is decided elsewhere.
    ///
    /// # Errors
    /// [`Error::Backend`].
    pub(super) fn pool(&self, most: usize) -> Result<Pool, Error> {
        let manager = Manager::from_connect(
            self.config.clone(),
            self.clone(),
            ManagerConfig { recycling_method: RecyclingMethod::Fast },
        );
        Pool::builder(manager)
            .max_size(most)
            .runtime(deadpool_postgres::Runtime::Tokio1)
            .build()
            .map_err(|e| Error::Backend(e.to_string()))
    }
}

impl Connect for Target {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        Target::connect(self).boxed()
    }
}

/// The settings of a session or, with `SET LOCAL`, of a transaction.
pub(super) fn settings(config: &config::Store, set: &str) -> String {
    let postgres = &config.postgres;
    let commit = match config.durability {
        Durability::Full => "on",
        Durability::Normal | Durability::Off => "off",
    };
    let mut all = format!(
        "{set} statement_timeout = {}; {set} lock_timeout = {}; {set} idle_in_transaction_session_timeout = {}",
        postgres.statement_ms, postgres.lock_ms, postgres.idle_in_transaction_ms
    );
    // Statements over arrays look cheaper planned anew for each array, and the planning costs more than it gains.
    let _ = write!(all, "; {set} plan_cache_mode = force_generic_plan");
    // A server that waits for more than its own disk (remote_apply) is left as it is; one that waits for less is not.
    all.push_str(&match config.durability {
        Durability::Full => format!(
            "; SELECT set_config('synchronous_commit', '{commit}', {}) WHERE current_setting('synchronous_commit') IN ('off', 'local')",
            set == "SET LOCAL"
        ),
        Durability::Normal | Durability::Off => format!("; {set} synchronous_commit = {commit}"),
    });
    all
}

fn tls(ca: Option<&std::path::Path>) -> Result<MakeRustlsConnect, Error> {
    use rustls_pki_types::pem::PemObject as _;
    let Some(path) = ca else {
        let (tls, unread) = MakeRustlsConnect::with_native_certs()
            .map_err(|e| Error::Backend(format!("the system's certificates cannot be used: {e:?}")))?;
        if !unread.is_empty() {
            tracing::warn!(count = unread.len(), "some of the system's certificates cannot be read");
        }
        return Ok(tls);
    };
    let unusable = |e: &dyn std::fmt::Display| Error::Backend(format!("{}: {e}", path.display()));
    let mut roots = rustls::RootCertStore::empty();
    for certificate in rustls_pki_types::CertificateDer::pem_file_iter(path).map_err(|e| unusable(&e))? {
        roots.add(certificate.map_err(|e| unusable(&e))?).map_err(|e| unusable(&e))?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| unusable(&e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// An address from `[store.postgres]`: the setting, or what the variable it names holds.
///
/// # Errors
/// [`Error::Backend`] when there is none.
pub(super) fn url(name: &str, plain: &str, variable: &str) -> Result<Option<secrecy::SecretString>, Error> {
    if !variable.is_empty() {
        let value = std::env::var(variable)
            .map_err(|_| Error::Backend(format!("{name}: the environment variable {variable} is not set")))?;
        return Ok(Some(value.into()));
    }
    Ok((!plain.is_empty()).then(|| String::from(plain).into()))
}

/// Brings the schema to what this build knows, one node at a time.
///
/// # Errors
/// [`Error::NewerSchema`] before anything is touched; otherwise what PostgreSQL says.
pub(super) async fn migrate(target: &Target) -> Result<(), Error> {
    let failed = |e: tokio_postgres::Error| Failure::from(e).into_error();
    let (mut client, task) = target.connect().await.map_err(failed)?;
    let migrated = async {
        // Another node may take its time with a large table.
        client.batch_execute("SET statement_timeout = 0; SET lock_timeout = 0").await.map_err(failed)?;
        client.execute("SELECT pg_advisory_lock($1)", &[&MIGRATING]).await.map_err(failed)?;
        let runner = migrations::migrations::runner();
        let known = runner.get_migrations().iter().map(refinery::Migration::version).max().unwrap_or(0);
        let known = u32::try_from(known).unwrap_or(u32::MAX);
        let table = "SELECT to_regclass('refinery_schema_history') IS NOT NULL";
        if client.query_one(table, &[]).await.map_err(failed)?.get(0) {
            let newest = "SELECT max(version)::bigint FROM refinery_schema_history";
            let found: Option<i64> = client.query_one(newest, &[]).await.map_err(failed)?.get(0);
            let found = found.and_then(|found| u32::try_from(found).ok()).unwrap_or(0);
            if found > known {
                return Err(Error::NewerSchema { found, known });
            }
            if found == known {
                return Ok(());
            }
        }
        let done = runner.run_async(&mut client).await;
        done.map(drop).map_err(|e| Error::Backend(format!("the schema could not be brought up to date: {e}")))
    }
    .await;
    drop(client);
    task.abort();
    migrated
}

/// Reads an address out of its wrapping, for the connection only.
pub(super) fn expose(url: &secrecy::SecretString) -> &str {
    url.expose_secret()
}
