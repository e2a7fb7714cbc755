//! idle-memory: what an active instance with a small state costs while nothing happens to it.
//!
//! The first quarter of the instances fills the server's bounded caches; the slope over the rest is the cost of one.

use std::{sync::Arc, time::Duration};

use super::{
    super::{
        Error,
        http::Job,
        job::{Choice, Deal, Repeat},
        machine::{Machine, Usage},
        report::{Figure, to_f64},
        server,
    },
    Bench, STOP_LIMIT,
};

/// How long memory must not have grown to count as settled, and how long that is waited for.
const SETTLED_FOR: Duration = Duration::from_secs(2);
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// Growth within the settling time that is still rest, in KiB.
const REST_KIB: u64 = 512;
/// Instances in memory, on the server's Prometheus page.
const ACTIVE: &str = crate::telemetry::metric::ACTIVE;

impl Bench<'_> {
    /// Starts a fresh server for each run.
    pub(super) async fn idle_memory(&mut self) -> Result<Machine, Error> {
        if !self.args.url.is_empty() {
            return Err(Error::Argument("idle-memory needs a server of its own: leave --url away".into()));
        }
        let folder = self.folder()?;
        let machine = Machine::look(Some(folder.path()));
        let room = format!("scaling.max_consciousness_instances={}", self.args.instances() * 2);
        let size = self.payload_of_state();
        self.set("state", format!("{size} B"));
        for run in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let sets = [room.as_str(), "instances.idle_passivate_seconds=86400"];
            let mut server = self.recipe(folder.path(), &format!("run-{run}"), &sets)?.start().await?;
            let figures = self.fill(&server, size).await;
            server.stop(STOP_LIMIT).await?;
            self.runs.push(figures?);
        }
        Ok(machine)
    }

    fn payload_of_state(&self) -> usize {
        self.args.payload.unwrap_or(256)
    }

    async fn fill(&self, server: &server::Server, size: usize) -> Result<Vec<Figure>, Error> {
        let count = self.args.instances();
        let quarter = count / 4;
        let empty = settled_rss(server.pid).await;
        self.write(server, 0..quarter, size).await?;
        let filled = settled_rss(server.pid).await;
        self.write(server, quarter..count, size).await?;
        let full_at_once = Usage::of(&[server.pid]).rss_kib;
        let full = settled_rss(server.pid).await;
        let active = server::metric(server.http, ACTIVE).await?;
        let bytes = |from: u64, to: u64, n: u64| to_f64(to.saturating_sub(from)) * 1024.0 / to_f64(n.max(1));
        let mib = |kib: u64| to_f64(kib) / 1024.0;
        let slope = bytes(filled, full, count - quarter);
        let mut figures = vec![
            Figure::new("memory of one more active instance", "B", slope),
            Figure::new("memory of all, by their number", "B", bytes(empty, full, count)),
            Figure::new("server memory, empty", "MiB", mib(empty)),
            Figure::new("server memory, a quarter of the instances", "MiB", mib(filled)),
            Figure::new("server memory, all, settled", "MiB", mib(full)),
            Figure::new("server memory, all, at once", "MiB", mib(full_at_once)),
            Figure::new("1M instances by the slope", "MiB", mib(empty) + slope * 1e6 / 1024.0 / 1024.0),
        ];
        if let Some(active) = active {
            figures.push(Figure::new("active instances counted by the server", "", active));
        }
        Ok(figures)
    }

    /// Creates instances (their first stimulus would do the same) and writes a state into each.
    async fn write(&self, server: &server::Server, range: std::ops::Range<u64>, size: usize) -> Result<(), Error> {
        let (address, deal) = (self.address(server.http), Deal::new(range));
        let make =
            move |_| -> Box<dyn Job> { Box::new(Repeat::patch_state(&address, size, Choice::EachOnce(deal.clone()))) };
        self.prepare(server.http, "writing states", Arc::new(make)).await.map(|_| ())
    }
}

/// Resident memory once it has stopped growing.
async fn settled_rss(pid: u32) -> u64 {
    let begin = std::time::Instant::now();
    let mut before = Usage::of(&[pid]).rss_kib;
    loop {
        tokio::time::sleep(SETTLED_FOR).await;
        let now = Usage::of(&[pid]).rss_kib;
        if now.abs_diff(before) <= REST_KIB || begin.elapsed() > SETTLE_LIMIT {
            return now;
        }
        before = now;
    }
}
