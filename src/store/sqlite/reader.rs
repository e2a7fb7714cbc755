//! The threads that read, each with a connection of its own, behind one bounded queue.
//!
//! Not here: what is read (`query`, `recall`). Invariants: a read that waited longer than its deadline is refused, not run;
//! one whose caller is gone is skipped. Tests: `tests/it/store_contract.rs`.

use std::{
    collections::VecDeque,
    path::Path,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rusqlite::Connection;
use tokio::sync::oneshot;

use super::{
    queue::{Queue, Refused, Woken},
    schema,
    writer::Shared,
};
use crate::{config, store::Error};

/// Most reads that wait.
const MAX_WAITING: usize = 16_384;
/// Longest wait of a read for a thread.
const DEADLINE: Duration = Duration::from_secs(10);
/// A thread without work looks up now and then.
const LOOK: Duration = Duration::from_secs(3600);

/// What a read works with.
pub(super) struct View {
    /// A connection that only reads.
    pub db: Connection,
    /// What is not folded.
    pub shared: Arc<Shared>,
}

type Task = Box<dyn FnOnce(Result<&View, Error>) + Send>;

struct Waiting {
    task: Task,
    since: Instant,
}

/// The pool.
pub(super) struct Readers {
    tasks: Arc<Queue<Waiting>>,
}

impl Readers {
    /// Opens the connections and starts their threads.
    pub(super) fn start(
        folder: &Path,
        config: &config::Store,
        shared: &Arc<Shared>,
    ) -> Result<(Self, Vec<JoinHandle<()>>), Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = if config.readers == 0 { cores } else { config.readers };
        let tasks = Arc::new(Queue::new(MAX_WAITING));
        let mut threads = Vec::with_capacity(count);
        for index in 0..count {
            let view = View { db: schema::reader(folder, config)?, shared: Arc::clone(shared) };
            let tasks = Arc::clone(&tasks);
            let name = format!("store-read-{index}");
            let thread = std::thread::Builder::new()
                .name(name)
                .spawn(move || work(&tasks, view))
                .map_err(|e| Error::Backend(format!("no thread for reads: {e}")))?;
            threads.push(thread);
        }
        Ok((Self { tasks }, threads))
    }

    /// Runs a read on one of the threads. Cancel safe: dropping the future abandons it.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (answer, end) = oneshot::channel();
        let task: Task = Box::new(move |view| {
            if !answer.is_closed() {
                drop(answer.send(view.and_then(read)));
            }
        });
        self.tasks.push(Waiting { task, since: Instant::now() }).map_err(|(_, refused)| match refused {
            Refused::Full => Error::Overloaded,
            Refused::Closed => Error::Closed,
        })?;
        end.await.unwrap_or(Err(Error::Closed))
    }

    /// Refuses reads from here on; those that wait fail with [`Error::Closed`].
    pub(super) fn stop(&self) {
        drop(self.tasks.abandon());
    }
}

fn work(tasks: &Queue<Waiting>, view: View) {
    let mut batch = VecDeque::with_capacity(1);
    // One at a time: the next read may go to another thread.
    while tasks.take(&mut batch, LOOK, |_| false) != Woken::Closed {
        for Waiting { task, since } in batch.drain(..) {
            if since.elapsed() > DEADLINE {
                task(Err(Error::Overloaded));
            } else {
                task(Ok(&view));
            }
        }
    }
}
