//! The third tier: a file of its own in the data folder for what is dear to make again. It survives restarts, and its loss is
//! harmless: a file that cannot be read is thrown away.
//!
//! Not here: the thread it is used from (`actors`). Invariants: bounded in bytes; nothing waits for the disk (no sync).
//! Tests: at the foot.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, params};

use super::entry;

/// The system's or the library's reason.
#[derive(Debug, thiserror::Error)]
#[error("the cache's file: {0}")]
pub(super) struct Error(#[from] rusqlite::Error);

/// How work on the file ends.
pub(super) type Result<T> = std::result::Result<T, Error>;

/// The file's name in the data folder.
const FILE: &str = "cache.db";
/// Rows dropped at once when it is full, as a share of the size.
const SHED: u64 = 10;
/// An entry that is read is counted as used at most this often, in milliseconds.
const USED_AGAIN: i64 = 60_000;

const SCHEMA: &str = "
    PRAGMA auto_vacuum = INCREMENTAL;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = OFF;
    PRAGMA busy_timeout = 50;
    PRAGMA journal_size_limit = 4194304;
    CREATE TABLE IF NOT EXISTS entries (
        key TEXT PRIMARY KEY, usable INTEGER NOT NULL, used INTEGER NOT NULL, bytes INTEGER NOT NULL, frozen BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS entries_by_use ON entries (used, bytes);";

/// The open file.
pub(super) struct Shelf {
    file: Connection,
    bytes: u64,
    entries: u64,
    most: u64,
}

impl Shelf {
    /// Opens the file in a folder, for at most so many bytes; makes it when it is not there or of no use.
    ///
    /// # Errors
    /// The system's or the library's reason.
    pub fn open(folder: &Path, most: u64) -> Result<Self> {
        if let Err(error) = std::fs::create_dir_all(folder) {
            tracing::debug!(%error, "the folder of the cache's file");
        }
        let path = folder.join(FILE);
        Self::try_open(&path, most).or_else(|error| {
            tracing::warn!(%error, "the cache's file is of no use and is made anew");
            remove(&path);
            Self::try_open(&path, most)
        })
    }

    fn try_open(path: &Path, most: u64) -> Result<Self> {
        let file = Connection::open(path)?;
        file.execute_batch(SCHEMA)?;
        let count = "SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM entries";
        let (entries, bytes) = file.query_row(count, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(Self { file, bytes, entries, most })
    }

    /// What is there under a key.
    ///
    /// # Errors
    /// The library's reason.
    pub fn get(&self, key: &str, now: i64) -> Result<Option<Vec<u8>>> {
        let mut find = self.file.prepare_cached("SELECT frozen, used FROM entries WHERE key = ?1 AND usable > ?2")?;
        let found: Option<(Vec<u8>, i64)> =
            find.query_row(params![key, now], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        let Some((frozen, used)) = found else { return Ok(None) };
        if now - used > USED_AGAIN {
            self.file.prepare_cached("UPDATE entries SET used = ?2 WHERE key = ?1")?.execute(params![key, now])?;
        }
        Ok(Some(frozen))
    }

    /// Puts an entry in unless what is there is newer; returns how many had to go for it.
    ///
    /// # Errors
    /// The library's reason.
    pub fn put(&mut self, key: &str, frozen: &[u8], usable: i64, now: i64) -> Result<u64> {
        let held: Option<Vec<u8>> = self
            .file
            .prepare_cached("SELECT substr(frozen, 1, 16) FROM entries WHERE key = ?1")?
            .query_row([key], |row| row.get(0))
            .optional()?;
        if held.is_some_and(|held| entry::version(&held) > entry::version(frozen)) {
            return Ok(0);
        }
        self.remove(key)?;
        let bytes = (frozen.len() + key.len() + 64) as u64;
        if bytes > self.most / 4 {
            return Ok(0);
        }
        let insert = "INSERT INTO entries (key, usable, used, bytes, frozen) VALUES (?1, ?2, ?3, ?4, ?5)";
        self.file.prepare_cached(insert)?.execute(params![key, usable, now, bytes, frozen])?;
        self.bytes += bytes;
        self.entries += 1;
        self.shed(now)
    }

    /// Drops an entry.
    ///
    /// # Errors
    /// The library's reason.
    pub fn remove(&mut self, key: &str) -> Result<()> {
        let gone: Option<u64> = self
            .file
            .prepare_cached("DELETE FROM entries WHERE key = ?1 RETURNING bytes")?
            .query_row([key], |row| row.get(0))
            .optional()?;
        if let Some(bytes) = gone {
            self.bytes = self.bytes.saturating_sub(bytes);
            self.entries = self.entries.saturating_sub(1);
        }
        Ok(())
    }

    /// Another size; returns how many had to go for it.
    ///
    /// # Errors
    /// The library's reason.
    pub fn resize(&mut self, most: u64, now: i64) -> Result<u64> {
        self.most = most;
        let gone = self.shed(now)?;
        self.vacuum()?;
        self.file.execute_batch("PRAGMA wal_checkpoint(TRUNCATE);")?;
        Ok(gone)
    }

    /// Over its size it drops what is over, what ended, and then what was not used for longest.
    fn shed(&mut self, now: i64) -> Result<u64> {
        if self.bytes <= self.most {
            return Ok(0);
        }
        let mut gone = 0;
        let ended: Vec<u64> = self
            .file
            .prepare_cached("DELETE FROM entries WHERE usable <= ?1 RETURNING bytes")?
            .query_map([now], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        self.bytes = self.bytes.saturating_sub(ended.iter().sum());
        gone += ended.len() as u64;
        while self.bytes > self.most - self.most / SHED {
            let dropped: Vec<u64> = self
                .file
                .prepare_cached(
                    "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries ORDER BY used LIMIT 64) RETURNING bytes",
                )?
                .query_map([], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            if dropped.is_empty() {
                self.bytes = 0;
                break;
            }
            self.bytes = self.bytes.saturating_sub(dropped.iter().sum());
            gone += dropped.len() as u64;
        }
        self.entries = self.entries.saturating_sub(gone);
        self.vacuum()?;
        Ok(gone)
    }

    /// Pages that are free leave the file; a row is told for each, and whoever does not ask for the next ends it.
    fn vacuum(&self) -> Result<()> {
        let mut statement = self.file.prepare_cached("PRAGMA incremental_vacuum")?;
        let mut pages = statement.query([])?;
        while pages.next()?.is_some() {}
        Ok(())
    }

    /// Entries and their bytes.
    pub const fn measure(&self) -> (u64, u64) {
        (self.entries, self.bytes)
    }
}

fn remove(path: &Path) {
    for ending in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(ending);
        let _ = std::fs::remove_file(PathBuf::from(name));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn frozen(version: u64, bytes: usize) -> Vec<u8> {
        [format!("{version:016x}").into_bytes(), vec![b'x'; bytes]].concat()
    }

    #[test]
    fn it_survives_a_restart_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let mut shelf = Shelf::open(folder.path(), 1 << 20).unwrap();
        shelf.put("a", &frozen(2, 10), 100, 0).unwrap();
        shelf.put("a", &frozen(1, 10), 100, 0).unwrap();
        let before = shelf.measure();
        drop(shelf);
        let shelf = Shelf::open(folder.path(), 1 << 20).unwrap();
        assert_eq!(shelf.measure(), before);
        assert_eq!(shelf.get("a", 99).unwrap(), Some(frozen(2, 10)));
        assert_eq!(shelf.get("a", 100).unwrap(), None, "its time is over");
    }

    #[test]
    fn it_is_bounded_and_drops_what_was_not_used_for_longest() {
        let folder = tempfile::tempdir().unwrap();
        let mut shelf = Shelf::open(folder.path(), 100_000).unwrap();
        for n in 0..300 {
            shelf.put(&format!("k{n}"), &frozen(0, 1000), i64::MAX, n).unwrap();
            // The first one is used all the time.
            let _ = shelf.get("k0", n + 100_000 * n).unwrap();
            assert!(shelf.measure().1 <= 100_000, "{:?}", shelf.measure());
        }
        assert!(shelf.get("k0", 0).unwrap().is_some() && shelf.get("k1", 0).unwrap().is_none());
        let pages = |shelf: &Shelf| shelf.file.query_row("PRAGMA page_count", [], |row| row.get::<_, u64>(0)).unwrap();
        let before = pages(&shelf);
        shelf.resize(10_000, 0).unwrap();
        assert!(shelf.measure().1 <= 10_000 && pages(&shelf) < before / 2, "{} of {before} pages", pages(&shelf));
        let (entries, bytes) = shelf.measure();
        drop(shelf);
        assert_eq!(Shelf::open(folder.path(), 10_000).unwrap().measure(), (entries, bytes), "it counts right");
    }

    #[test]
    fn a_file_of_no_use_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), vec![7u8; 10_000]).unwrap();
        let mut shelf = Shelf::open(folder.path(), 1 << 20).unwrap();
        shelf.put("a", &frozen(2, 10), 100, 0).unwrap();
        assert_eq!(shelf.get("a", 0).unwrap(), Some(frozen(2, 10)));
    }
}
