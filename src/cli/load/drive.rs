//! The coordinator of a run: starts generator threads, opens the measured window, reads the server's CPU at its edges.
//!
//! Each generator thread has one single-threaded runtime and its own connections; nothing is shared between threads but
//! a few counters. Not here: what the connections do (`http.rs`, `mqtt.rs`), what is run (`scenario`).
//! Cancel safety: dropping [`drive`] leaves threads to end on their own at the end of their window.

use std::{
    io::IsTerminal,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::{mpsc, watch};

use super::{
    Error, http,
    machine::{Group, Usage},
    mqtt,
    record::{Progress, Record, Window},
    report::{Figure, to_f64},
    schedule::Arrivals,
};

/// How operations start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// Open loop: so many a second, whatever the server does.
    Open {
        /// Operations a second.
        rate: f64,
        /// How they are spread.
        arrivals: Arrivals,
    },
    /// Closed loop: each connection starts its next operation when the last one is answered. Finds throughput; its
    /// latencies say nothing about what a user would see.
    Closed,
}

/// How long a run takes.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Before the window.
    pub warmup: Duration,
    /// The window; `None` = until the work is done.
    pub duration: Option<Duration>,
    /// After the window, for answers that are still due.
    pub grace: Duration,
}

impl Span {
    /// Until the work is done.
    pub const UNTIL_DONE: Span = Span { warmup: Duration::ZERO, duration: None, grace: Duration::from_secs(3600) };
}

/// One stream of load.
#[derive(Clone)]
pub struct Load {
    /// What it is called in the figures; empty when it is the only one.
    pub name: &'static str,
    /// Where to: connections take turns.
    pub addrs: Vec<SocketAddr>,
    /// Connections.
    pub connections: usize,
    /// Generator threads.
    pub threads: usize,
    /// How operations start.
    pub pace: Pace,
    /// Longest wait for one answer.
    pub deadline: Duration,
    /// Seed of arrivals and choices.
    pub seed: u64,
    /// What the connections do.
    pub work: Work,
}

/// What connections do.
#[derive(Clone)]
pub enum Work {
    /// Requests over HTTP/1.1.
    Http(Arc<http::MakeJob>),
    /// Publishes of devices.
    Mqtt(Arc<mqtt::Devices>),
}

/// What a thread is told.
#[derive(Clone)]
pub struct Orders {
    /// Its part of the load.
    pub load: Load,
    /// Which thread it is.
    pub thread: usize,
    /// Its connections, counted over all threads.
    pub connections: std::ops::Range<usize>,
    /// Counters.
    pub progress: Arc<Progress>,
    /// How long.
    pub span: Span,
    /// Comes with the start; closes when there will be none.
    pub start: watch::Receiver<Option<Instant>>,
    /// Tells that all connections stand.
    pub ready: mpsc::Sender<Result<(), Error>>,
}

impl Orders {
    /// Tells the coordinator whether the connections stand and waits for the start. `None` = do not start.
    pub async fn begin(&mut self, standing: Result<(), Error>) -> Option<Plan> {
        let failed = standing.is_err();
        self.ready.send(standing).await.ok()?;
        if failed {
            return None;
        }
        let start = (*self.start.wait_for(Option::is_some).await.ok()?)?;
        let from = start + self.span.warmup;
        let to = self.span.duration.map(|d| from + d);
        let give_up = to.unwrap_or(from) + self.span.grace;
        Some(Plan { start, window: Window { from, to }, give_up })
    }
}

/// The times of a run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// The schedule's zero.
    pub start: Instant,
    /// What counts.
    pub window: Window,
    /// Nothing is waited for beyond this.
    pub give_up: Instant,
}

/// What a run yields.
#[derive(Debug, Default)]
pub struct Outcome {
    /// One record a load, in order.
    pub records: Vec<Record>,
    /// Operations done within the window, over all loads.
    pub done: u64,
    /// Length of the window.
    pub window: Duration,
    /// What the server used within it; its memory and threads at its end.
    pub server: Usage,
    /// The same of each part of it.
    pub parts: Vec<(String, Usage)>,
    /// What the generator itself used within it.
    pub generator: Usage,
    /// Whether it was ended early.
    pub interrupted: bool,
}

impl Load {
    /// Where a connection goes.
    ///
    /// # Errors
    /// When there is no address.
    pub fn addr(&self, connection: usize) -> Result<SocketAddr, Error> {
        let at = connection.checked_rem(self.addrs.len()).and_then(|at| self.addrs.get(at));
        at.copied().ok_or_else(|| Error::Argument("an address is missing".into()))
    }
}

/// Runs loads side by side and measures the server's processes meanwhile.
///
/// # Errors
/// When connections cannot be made at the start. What fails later is counted.
pub async fn drive(
    loads: &[Load],
    span: Span,
    server: &[Group],
    progress: &Arc<Progress>,
    label: &str,
) -> Result<Outcome, Error> {
    let (start, started) = watch::channel(None);
    let (ready, mut readies) = mpsc::channel(64);
    let (finished, mut results) = mpsc::channel::<(usize, Record)>(64);
    let mut threads = 0;
    for (at, load) in loads.iter().enumerate() {
        let count = load.threads.clamp(1, load.connections.max(1));
        for thread in 0..count {
            let share = |t: usize| load.connections * t / count;
            let orders = Orders {
                load: load.clone(),
                thread,
                connections: share(thread)..share(thread + 1),
                progress: progress.clone(),
                span,
                start: started.clone(),
                ready: ready.clone(),
            };
            let finished = finished.clone();
            std::thread::Builder::new()
                .name(format!("load-{at}-{thread}"))
                .spawn(move || {
                    let _ = finished.blocking_send((at, run_thread(orders)));
                })
                .map_err(|e| Error::io("starting a generator thread", e))?;
            threads += 1;
        }
    }
    drop((ready, finished));
    for _ in 0..threads {
        readies.recv().await.unwrap_or(Ok(()))?;
    }
    let begin = Instant::now() + Duration::from_millis(20);
    let _ = start.send(Some(begin));
    let mut outcome = Outcome { records: loads.iter().map(|_| Record::default()).collect(), ..Outcome::default() };
    watch_window(&mut outcome, begin, span, server, progress, label, &mut results, threads).await;
    outcome.interrupted = progress.stopped();
    Ok(outcome)
}

fn run_thread(orders: Orders) -> Record {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = orders.ready.blocking_send(Err(Error::io("starting a generator's runtime", error)));
            return Record::default();
        }
    };
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        match orders.load.work.clone() {
            Work::Http(make) => http::run(orders, make).await,
            Work::Mqtt(devices) => mqtt::run(orders, devices).await,
        }
    })
}

/// Waits through warm-up and window, reading usage at its edges, then for the threads.
#[allow(clippy::too_many_arguments)] // one caller; a struct would only rename them
async fn watch_window(
    outcome: &mut Outcome,
    begin: Instant,
    span: Span,
    server: &[Group],
    progress: &Progress,
    label: &str,
    results: &mut mpsc::Receiver<(usize, Record)>,
    mut threads: usize,
) {
    let own = [std::process::id()];
    let look = || -> Vec<Usage> { server.iter().map(|group| Usage::of_families(&group.pids)).collect() };
    let bar = bar(label, span);
    let open = begin + span.warmup;
    let close = span.duration.map(|d| open + d);
    let mut opened: Option<(Instant, u64, Vec<Usage>, Usage)> = None;
    let mut closed = false;
    while threads > 0 {
        let edge = if opened.is_none() { Some(open) } else { close.filter(|_| !closed) };
        let tick = Instant::now() + Duration::from_millis(200);
        let wake = edge.map_or(tick, |e| e.min(tick));
        tokio::select! {
            result = results.recv() => match result {
                Some((at, record)) => {
                    if let Some(total) = outcome.records.get_mut(at) {
                        total.merge(record);
                    }
                    threads -= 1;
                }
                None => threads = 0,
            },
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        let now = Instant::now();
        if opened.is_none() && now >= open {
            opened = Some((now, progress.done(), look(), Usage::of(&own)));
        }
        let over = threads == 0 || close.is_some_and(|c| now >= c) || (progress.stopped() && opened.is_some());
        if let Some((since, done, before, generator)) = &opened
            && over
            && !closed
        {
            closed = true;
            outcome.window = now - *since;
            outcome.done = progress.done() - done;
            let used = look().into_iter().zip(before).map(|(usage, before)| usage.since(*before));
            outcome.parts = server.iter().map(|group| group.name.clone()).zip(used).collect();
            outcome.server = outcome.parts.iter().fold(Usage::default(), |sum, (_, usage)| sum.and(*usage));
            outcome.generator = Usage::of(&own).since(*generator);
        }
        show(&bar, begin, span, progress);
    }
    bar.finish_and_clear();
}

fn bar(label: &str, span: Span) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let total = span.duration.map(|d| (span.warmup + d).as_millis());
    let bar = match total.and_then(|t| u64::try_from(t).ok()) {
        Some(total) => ProgressBar::new(total),
        None => ProgressBar::new_spinner(),
    };
    let style = if total.is_some() { "{prefix} [{bar:30}] {msg}" } else { "{prefix} {spinner} {msg}" };
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_prefix(label.to_owned());
    bar
}

fn show(bar: &ProgressBar, begin: Instant, span: Span, progress: &Progress) {
    if bar.is_hidden() {
        return;
    }
    let elapsed = begin.elapsed();
    if span.duration.is_some() {
        bar.set_position(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    } else {
        bar.tick();
    }
    let rate = to_f64(progress.done()) / elapsed.as_secs_f64().max(0.001);
    let phase = if elapsed < span.warmup { "warm-up, " } else { "" };
    bar.set_message(format!(
        "{phase}{} done, {rate:.0}/s, {} bad",
        progress.done(),
        progress.bad.load(Ordering::Relaxed)
    ));
}

impl Outcome {
    /// Operations a second within the window.
    pub fn throughput(&self) -> f64 {
        to_f64(self.done) / self.window.as_secs_f64().max(1e-9)
    }

    /// Server CPU milliseconds for 1,000 operations.
    pub fn cpu_per_1k(&self) -> f64 {
        to_f64(self.server.cpu_ms) * 1000.0 / to_f64(self.done.max(1))
    }

    /// The figures every run has: CPU first, then throughput, latencies, memory, and the generator's own doings.
    pub fn figures(&self, loads: &[Load], measured: bool) -> Vec<Figure> {
        let mut out = Vec::new();
        let per_1k = |n: u64| to_f64(n) * 1000.0 / to_f64(self.done.max(1));
        if measured {
            out.push(Figure::new("server CPU / 1k op", "ms", self.cpu_per_1k()));
        }
        if self.parts.len() > 1 {
            let part = |(name, usage): &(String, Usage)| {
                Figure::new(format!("CPU of {name} / 1k op"), "ms", per_1k(usage.cpu_ms))
            };
            out.extend(self.parts.iter().map(part));
        }
        out.push(Figure::new("throughput", "op/s", self.throughput()));
        for (load, record) in loads.iter().zip(&self.records) {
            let name = |what: &str| [load.name, what].join(" ").trim().to_owned();
            out.extend(record.latency.figures(&name("latency")));
            out.extend(record.reply.figures(&name("reply on topic")));
            out.extend(record.trouble());
        }
        if measured {
            let cores = to_f64(self.server.cpu_ms) / 1000.0 / self.window.as_secs_f64().max(1e-9);
            out.push(Figure::new("server cores used", "", cores));
            out.push(Figure::new("server memory", "MiB", to_f64(self.server.rss_kib) / 1024.0));
            out.push(Figure::new("server threads", "", to_f64(self.server.threads)));
            out.push(Figure::new("server context switches / 1k op", "", per_1k(self.server.switches)));
        }
        out.push(Figure::new("generator CPU / 1k op", "ms", per_1k(self.generator.cpu_ms)));
        for (load, record) in loads.iter().zip(&self.records) {
            if matches!(load.pace, Pace::Open { .. }) && !record.lag.is_empty() {
                let name = [load.name, "generator lag p99"].join(" ").trim().to_owned();
                out.push(Figure::new(name, "ms", record.lag.ms(0.99)));
            }
        }
        out
    }
}
