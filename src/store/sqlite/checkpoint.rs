//! Moving the write-ahead log into the database, off the commit path.
//!
//! A thread of its own does the bulk when the log is long. Because commits go on meanwhile, it alone would never reach the
//! log's end, and the log would never start over; so the writer does the last few pages itself, between two commits.
//!
//! The length of the log comes from SQLite's own hook, called after each commit.
//!
//! Tests: `tests/it/store_sqlite.rs` checks that closing leaves no log behind; how long the log grows under load, and the
//! hand-over to the writer, are not tested yet.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU8, Ordering},
    },
    time::Duration,
};

use rusqlite::Connection;

use super::queue::{Queue, Woken};
use crate::store::Error;

/// A log of so many pages (64 MiB) is moved.
const LONG: i32 = 16_384;
/// So many pages the writer moves itself: a few milliseconds.
const FEW: i32 = 1024;
/// The thread looks up now and then, only to see whether the store is gone.
const LOOK: Duration = Duration::from_secs(3600);

const RESTS: u8 = 0;
const RUNS: u8 = 1;
const RAN: u8 = 2;

/// What writer and checkpoint thread tell each other. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Checkpoints(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Pages in the log after the last commit.
    pages: AtomicI32,
    /// Of these, moved.
    moved: AtomicI32,
    state: AtomicU8,
    calls: Queue<()>,
}

impl Checkpoints {
    /// Nothing is known of the log yet.
    pub(super) fn new() -> Self {
        let (pages, moved) = (AtomicI32::new(0), AtomicI32::new(0));
        Self(Arc::new(Inner { pages, moved, state: AtomicU8::new(RESTS), calls: Queue::new(1) }))
    }

    /// Follows the length of the log on the writer's connection.
    pub(super) fn follow(&self, db: &mut Connection) -> Result<(), Error> {
        let inner = Arc::clone(&self.0);
        db.wal_hook(Some(move |_: &mut rusqlite::hooks::Wal, pages| {
            inner.pages.store(pages, Ordering::Release);
            Ok(())
        }))?;
        Ok(())
    }

    /// After each commit: calls the thread when the log is long; true when the writer shall move what is left.
    pub(super) fn writer_should_finish(&self) -> bool {
        let pages = self.0.pages.load(Ordering::Acquire);
        if pages < LONG {
            return false;
        }
        match self.0.state.load(Ordering::Acquire) {
            RUNS => false,
            RAN if pages - self.0.moved.load(Ordering::Acquire) <= FEW => {
                self.0.state.store(RESTS, Ordering::Release);
                true
            }
            _ => {
                self.0.state.store(RUNS, Ordering::Release);
                // Full means that it is called already.
                let _ = self.0.calls.push(());
                false
            }
        }
    }

    /// The thread's work, until `stop`.
    pub(super) fn run(&self, db: &Connection) {
        let mut calls = VecDeque::new();
        while self.0.calls.take(&mut calls, LOOK, |()| true) != Woken::Closed {
            if calls.drain(..).count() == 0 {
                continue;
            }
            let pass = db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i32>(2));
            match pass {
                Ok(moved) => self.0.moved.store(moved, Ordering::Release),
                Err(error) => tracing::warn!(%error, "a checkpoint failed, it is tried again with the next commits"),
            }
            self.0.state.store(RAN, Ordering::Release);
        }
    }

    /// Ends the thread.
    pub(super) fn stop(&self) {
        drop(self.0.calls.abandon());
    }
}
