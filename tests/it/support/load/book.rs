//! What all senders write down: the log, when who was served, and what should not have happened.

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use sophont::{
    cli::check_history::log::{Answer, Event, Log, Send, What},
    runtime::clock::Clock,
};

/// Most surprises kept word for word.
const MAX_SURPRISES: usize = 20;

/// The book of a load.
#[derive(Debug, Default)]
pub struct Book {
    pages: Mutex<Pages>,
    accepted: AtomicU64,
    forgotten_sessions: AtomicU64,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct Pages {
    log: Log,
    file: Option<BufWriter<File>>,
    served: HashMap<String, Vec<Instant>>,
    surprises: Vec<String>,
}

impl Book {
    /// A book that is written to a file too.
    pub fn in_file(path: &Path) -> Self {
        let file = Some(BufWriter::new(File::create(path).expect("a file for the log")));
        Self { pages: Mutex::new(Pages { file, ..Pages::default() }), ..Self::default() }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().expect("the book")
    }

    fn write(&self, event: Event) {
        let mut pages = self.pages();
        if let Some(file) = &mut pages.file {
            event.write(file).expect("the log is written");
        }
        assert!(pages.log.push(event), "it was sent before");
    }

    /// Writes down what is about to leave.
    pub fn sends(&self, send: Send) {
        self.write(Event::Sent(Send { at: Some(Clock::System.now().0), ..send }));
    }

    /// Writes down an answer.
    pub fn answered(&self, instance: &str, id: &str, what: What, turn: Option<u64>, content: Option<String>) {
        let at = Some(Clock::System.now().0);
        let (instance, id) = (instance.to_owned(), id.to_owned());
        if matches!(what, What::Accepted | What::Decided) {
            self.accepted.fetch_add(1, Ordering::Relaxed);
        }
        self.write(Event::Answer(Answer { at, client: None, instance, id, what, turn, content, code: None }));
    }

    /// A node served an instance just now. What a broker takes for it does not count.
    pub fn served_now(&self, instance: &str) {
        self.pages().served.entry(instance.to_owned()).or_default().push(Instant::now());
    }

    /// Writes down what no server should answer, whatever happens to it.
    pub fn is_surprised(&self, what: String) {
        let mut pages = self.pages();
        if pages.surprises.len() < MAX_SURPRISES {
            pages.surprises.push(what);
        }
    }

    /// A device that had a session was told that there is none.
    pub fn forgot_a_session(&self) {
        self.forgotten_sessions.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells the senders to come to an end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether they shall.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// How many stimuli were accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// How often a device that had a session was told that there is none.
    pub fn forgotten_sessions(&self) -> u64 {
        self.forgotten_sessions.load(Ordering::Relaxed)
    }

    /// What should not have happened, in words.
    pub fn surprises(&self) -> Vec<String> {
        self.pages().surprises.clone()
    }

    /// How often an instance was served so far.
    pub fn times_served(&self, instance: &str) -> usize {
        self.pages().served.get(instance).map_or(0, Vec::len)
    }

    /// When each instance was served, in order.
    pub fn served(&self) -> HashMap<String, Vec<Instant>> {
        self.pages().served.clone()
    }

    /// Looks into the log.
    pub fn read<T>(&self, look: impl FnOnce(&Log) -> T) -> T {
        look(&self.pages().log)
    }

    /// Brings the file up to date.
    pub fn flush(&self) {
        if let Some(file) = &mut self.pages().file {
            file.flush().expect("the log is written");
        }
    }
}
