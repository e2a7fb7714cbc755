//! Opening: the lock on the data folder, connections and their settings, migrations, and what SQLite's errors mean.
//!
//! Tests: `tests/it/store_sqlite.rs`.

use std::{
    fs::{File, TryLockError},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
    time::Duration,
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension as _,
    config::DbConfig,
    trace::{TraceEvent, TraceEventCodes},
};

use crate::{
    config::{self, Durability},
    store::{Error, slow},
};

/// The database, within the data folder.
pub(super) const DATABASE: &str = "sophont.db";
/// The file whose lock says that a process uses the folder.
const LOCK: &str = "sophont.lock";
/// How long a connection waits for another of this process, for example a checkpoint at its end.
const BUSY: Duration = Duration::from_secs(5);
/// Most prepared statements a connection keeps.
const STATEMENTS: usize = 96;

mod migrations {
    refinery::embed_migrations!("migrations/sqlite");
}

/// What an error of SQLite means to the store.
pub(super) fn error(error: &rusqlite::Error) -> Error {
    let text = error.to_string();
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Error::Full(text),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Error::Locked(text),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Error::Corrupt(text),
        _ => Error::Backend(text),
    }
}

impl From<rusqlite::Error> for Error {
    fn from(cause: rusqlite::Error) -> Self {
        error(&cause)
    }
}

/// The data folder, taken for this process. Given back when dropped.
#[derive(Debug)]
pub(super) struct FolderLock(File);

impl Drop for FolderLock {
    /// Gives the lock itself back. Closing the file is not enough: a child process that was forked and has not yet reached
    /// its `exec` holds a copy of the descriptor, and the lock lives as long as the last copy.
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            tracing::warn!(%error, "the lock of the data folder was not given back");
        }
    }
}

/// Takes the data folder for this process.
///
/// # Errors
/// [`Error::Locked`] when another process has it, [`Error::Backend`] when the folder cannot be used.
pub(super) fn lock(folder: &Path) -> Result<FolderLock, Error> {
    let failed = |what: &str, e: &dyn std::fmt::Display| Error::Backend(format!("{what} {}: {e}", folder.display()));
    std::fs::create_dir_all(folder).map_err(|e| failed("cannot make the data folder", &e))?;
    let path = folder.join(LOCK);
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|e| failed("cannot open the lock file in", &e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let known = file.read_to_string(&mut holder).is_ok() && !holder.trim().is_empty();
            let holder = if known { format!(" (process {})", holder.trim()) } else { String::new() };
            return Err(Error::Locked(format!("{} is in use{holder}", folder.display())));
        }
        Err(TryLockError::Error(e)) => return Err(failed("cannot lock", &e)),
    }
    // Who holds it is told to whoever comes second; when it cannot be written, the lock holds all the same.
    let _ = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
    Ok(FolderLock(file))
}

fn settings(db: &mut Connection, config: &config::Store) -> Result<(), rusqlite::Error> {
    db.trace_v2(
        TraceEventCodes::SQLITE_TRACE_PROFILE,
        Some(|event: TraceEvent<'_>| {
            if let TraceEvent::Profile(statement, took) = event {
                // The text as it was prepared: values are bound to it, not in it.
                slow::note("sqlite", &statement.sql(), took);
            }
        }),
    )?;
    db.busy_timeout(BUSY)?;
    db.set_prepared_statement_cache_capacity(STATEMENTS);
    // The last connection to close would checkpoint and remove the log; `close` does so, a crash (or a drop) does not.
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let cache_kib = i64::try_from(config.cache_mb.saturating_mul(1024)).unwrap_or(i64::MAX);
    db.pragma_update(None, "cache_size", -cache_kib.max(1024))?;
    db.pragma_update(None, "temp_store", "MEMORY")
}

/// A connection that writes.
pub(super) fn writer(folder: &Path, config: &config::Store) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut db = Connection::open_with_flags(folder.join(DATABASE), flags)?;
    settings(&mut db, config)?;
    let mode: String = db.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if !mode.eq_ignore_ascii_case("wal") {
        return Err(Error::Backend(format!("the data folder allows no write-ahead log (journal mode {mode})")));
    }
    let synchronous = match config.durability {
        Durability::Full => "FULL",
        Durability::Normal => "NORMAL",
        Durability::Off => "OFF",
    };
    db.pragma_update(None, "synchronous", synchronous)?;
    // What is deleted is overwritten where that costs no write; see `Writer::overwrite` for where it must be gone.
    db.pragma_update(None, "secure_delete", "FAST")?;
    // Checkpoints are the checkpoint thread's work: none may hide in a commit.
    db.pragma_update(None, "wal_autocheckpoint", 0)?;
    Ok(db)
}

/// A connection that only reads. It maps nothing: a map is thrown away at the next read after each commit, and costs more
/// page faults than the page cache costs copies.
pub(super) fn reader(folder: &Path, config: &config::Store) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut db = Connection::open_with_flags(folder.join(DATABASE), flags)?;
    settings(&mut db, config)?;
    db.pragma_update(None, "query_only", true)?;
    Ok(db)
}

/// Brings the schema to what this build knows.
///
/// # Errors
/// [`Error::NewerSchema`] before anything is touched; otherwise what SQLite says.
pub(super) fn migrate(db: &mut Connection) -> Result<(), Error> {
    let runner = migrations::migrations::runner();
    let known = runner.get_migrations().iter().map(refinery::Migration::version).max().unwrap_or(0);
    let known = u32::try_from(known).unwrap_or(u32::MAX);
    let table: Option<i64> = db
        .query_row("SELECT 1 FROM sqlite_schema WHERE name = 'refinery_schema_history'", [], |row| row.get(0))
        .optional()?;
    if table.is_some() {
        let found: Option<u32> =
            db.query_row("SELECT max(version) FROM refinery_schema_history", [], |row| row.get(0))?;
        if let Some(found) = found.filter(|found| *found > known) {
            return Err(Error::NewerSchema { found, known });
        }
    }
    runner.run(db).map(drop).map_err(|e| Error::Backend(format!("the schema could not be brought up to date: {e}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_statement_is_named_without_its_values() {
        let folder = tempfile::tempdir().unwrap();
        let db = writer(folder.path(), &config::Config::default().store).unwrap();
        db.execute_batch("CREATE TABLE lamps (name TEXT)").unwrap();
        let page = Page::default();
        let writer = page.clone();
        let log = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        slow::set_threshold(Duration::from_millis(1));
        tracing::subscriber::with_default(log, || {
            // Long enough for any machine.
            let slow = "SELECT count(*) FROM lamps, (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n
                        WHERE x < 2000000) SELECT x FROM n WHERE x > 1999999) WHERE name <> ?1";
            db.execute("INSERT INTO lamps VALUES ('a')", []).unwrap();
            db.query_row(slow, ["geheim"], |row| row.get::<_, i64>(0)).unwrap();
        });
        slow::set_threshold(Duration::ZERO);
        let told = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        assert!(told.contains("slow statement") && told.contains("SELECT lamps"), "{told}");
        assert!(!told.contains("geheim"), "{told}");
    }

    #[test]
    fn a_copied_descriptor_does_not_keep_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path()).unwrap();
        assert!(matches!(lock(folder.path()), Err(Error::Locked(_))));
        // What a child between its fork and its exec has.
        let copy = held.0.try_clone().unwrap();
        drop(held);
        drop(lock(folder.path()).unwrap());
        drop(copy);
    }
}
