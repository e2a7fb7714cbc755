//! The threads that read, each with a connection of its own, behind one pool of places.
//!
//! Not here: what is read (`query`, `recall`), who waits for how long (`scaling::pool`). Invariants: a thread takes one read at
//! a time, and there are as many threads as places; one whose caller is gone is skipped.
//! Tests: `tests/it/store_contract.rs`, `tests/it/settings.rs`.

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
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
use crate::{
    config,
    scaling::pool::{self, Limits, Places},
    store::Error,
};

/// Reads between their place and their thread: none waits there but for a moment.
const MAX_WAITING: usize = 16_384;
/// A thread without work looks up so often, and ends when there are too many.
const LOOK: Duration = Duration::from_secs(10);

/// What a read works with.
pub(super) struct View {
    /// A connection that only reads.
    pub db: Connection,
    /// What is not folded.
    pub shared: Arc<Shared>,
}

type Task = Box<dyn FnOnce(Result<&View, Error>) + Send>;

/// The pool.
pub(super) struct Readers(Arc<Crew>);

/// What the threads share.
struct Crew {
    folder: PathBuf,
    config: config::Store,
    shared: Arc<Shared>,
    tasks: Queue<Task>,
    places: Arc<Places>,
    /// More threads than cores only cost memory.
    most: usize,
    threads: Mutex<BTreeMap<usize, JoinHandle<()>>>,
}

impl Readers {
    /// Opens the connections and starts their threads.
    pub(super) fn start(
        folder: &Path,
        config: &config::Store,
        limits: Limits,
        shared: &Arc<Shared>,
    ) -> Result<Self, Error> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = if config.readers == 0 { cores } else { config.readers };
        let crew = Crew {
            folder: folder.to_path_buf(),
            config: config.clone(),
            shared: Arc::clone(shared),
            tasks: Queue::new(MAX_WAITING),
            places: Places::new("sqlite_readers", bounded(limits, most)),
            most,
            threads: Mutex::default(),
        };
        let readers = Self(Arc::new(crew));
        match readers.0.grow() {
            Ok(()) => Ok(readers),
            Err(error) => {
                readers.stop();
                Err(error)
            }
        }
    }

    /// Runs a read on one of the threads. Cancel safe: dropping the future abandons the read.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let place = self.0.places.take().await.map_err(|refused| match refused {
            pool::Refused::Full | pool::Refused::Late => Error::Overloaded,
            pool::Refused::Closed => Error::Closed,
        })?;
        let (answer, end) = oneshot::channel();
        let task: Task = Box::new(move |view| {
            if !answer.is_closed() {
                drop(answer.send(view.and_then(read)));
            }
            drop(place);
        });
        self.0.tasks.push(task).map_err(|(_, refused)| match refused {
            Refused::Full => Error::Overloaded,
            Refused::Closed => Error::Closed,
        })?;
        end.await.unwrap_or(Err(Error::Closed))
    }

    /// The places, for figures.
    pub(super) fn places(&self) -> &Arc<Places> {
        &self.0.places
    }

    /// From here on so many read at once. Threads that are missing are started; one that cannot be is told in the log, and its
    /// reads are done by the others.
    pub(super) fn resize(&self, limits: Limits) {
        self.0.places.resize(bounded(limits, self.0.most));
        if let Err(error) = self.0.grow() {
            tracing::error!(%error, "not all threads that read could be started");
        }
    }

    /// Refuses reads from here on; those that wait fail with [`Error::Closed`]. Returns when the threads are gone.
    pub(super) fn stop(&self) {
        self.0.places.close();
        drop(self.0.tasks.abandon());
        let threads = std::mem::take(&mut *self.0.threads());
        threads.into_values().for_each(super::join);
    }
}

fn bounded(limits: Limits, most: usize) -> Limits {
    Limits { size: limits.size.clamp(1, most.max(1)), overflow: 0, waiting: MAX_WAITING, ..limits }
}

impl Crew {
    fn threads(&self) -> MutexGuard<'_, BTreeMap<usize, JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the threads that are missing.
    fn grow(self: &Arc<Self>) -> Result<(), Error> {
        let mut threads = self.threads();
        threads.retain(|_, thread| !thread.is_finished());
        for number in 0..self.places.limits().size {
            if threads.contains_key(&number) {
                continue;
            }
            let view = self.view()?;
            let crew = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("store-read-{number}"))
                .spawn(move || crew.work(number, view))
                .map_err(|e| Error::Backend(format!("no thread for reads: {e}")))?;
            threads.insert(number, thread);
        }
        Ok(())
    }

    fn view(&self) -> Result<View, Error> {
        Ok(View { db: schema::reader(&self.folder, &self.config)?, shared: Arc::clone(&self.shared) })
    }

    fn work(&self, number: usize, mut view: View) {
        let mut opened = Instant::now();
        let mut batch = VecDeque::with_capacity(1);
        // One at a time: the next read may go to another thread.
        while self.tasks.take(&mut batch, LOOK, |_| false) != Woken::Closed {
            batch.drain(..).for_each(|task| task(Ok(&view)));
            let limits = self.places.limits();
            if number >= limits.size {
                return;
            }
            if opened.elapsed() > limits.recycle
                && let Ok(new) = self.view()
            {
                (view, opened) = (new, Instant::now());
            }
        }
    }
}
