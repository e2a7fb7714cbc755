//! A copy of the whole database at one moment, made while a node may go on writing.
//!
//! Tests: `tests/it/check_history.rs`.

use std::{path::Path, time::Duration};

use rusqlite::{Connection, OpenFlags, backup::Backup};

use super::schema::DATABASE;
use crate::store::Error;

/// Copies the database of a data folder into another folder, which is made. The source is only read.
///
/// # Errors
/// When there is no database, or what SQLite says.
pub fn copy(folder: &Path, to: &Path) -> Result<(), Error> {
    let from = folder.join(DATABASE);
    if !from.is_file() {
        return Err(Error::Backend(format!("there is no {DATABASE} in {}", folder.display())));
    }
    std::fs::create_dir_all(to).map_err(|e| Error::Backend(format!("cannot make {}: {e}", to.display())))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let source = Connection::open_with_flags(from, flags)?;
    let mut target = Connection::open(to.join(DATABASE))?;
    // All pages in one step: one read transaction, so one moment, whatever is written meanwhile.
    Backup::new(&source, &mut target)?.run_to_completion(i32::MAX, Duration::ZERO, None)?;
    Ok(())
}
