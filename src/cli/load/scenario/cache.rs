//! cache: reads and writes of states as they come in life, and a check of each read against what was acknowledged before it.
//!
//! The workload: instances are chosen by Zipf's law (the n-th most wanted is wanted 1/n as often as the first); of 100 operations 80
//! read the state, 10 read it with `?consistency=eventual`, 10 write it; sizes differ by instance from a sixteenth of the payload to
//! all of it. What was acknowledged is known by version: a read without `eventual` that began after a write was acknowledged must
//! not show an older one.
//! Here: that, and the shares of the tiers from the servers' metrics pages. Tests: at the foot; `tests/it/load.rs`.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    super::{
        Error, drive,
        http::Job,
        job::{Address, Choice, Deal, Repeat},
        machine::Machine,
        report::{Figure, to_f64},
        schedule::Random,
        wire::{
            http::Connection,
            template::{Slot, Template, number_after},
        },
    },
    Bench, Target,
};
use crate::telemetry::metric;

/// Of 100 operations.
const STRONG: u64 = 80;
const EVENTUAL: u64 = 10;
/// What tells the choices of the warm-up from those that are measured.
const WARMING: u64 = 0x5bd1_e995_0000_0000;
/// Sizes of states.
const SIZES: u64 = 5;

/// What was acknowledged, and what was read that is older.
struct Board {
    /// By instance: the newest version that was acknowledged, and how many writes were, each of which makes a version.
    written: Vec<(AtomicU64, AtomicU64)>,
    reads: AtomicU64,
    stale: AtomicU64,
    eventual: AtomicU64,
    eventual_old: AtomicU64,
    first: std::sync::OnceLock<String>,
    /// Numbers that are written, each once: a write that changes nothing would make no version.
    next: AtomicU64,
}

impl Board {
    fn new(instances: u64) -> Arc<Self> {
        // The first version was written before.
        let written = (0..instances).map(|_| (AtomicU64::new(1), AtomicU64::new(1))).collect();
        Arc::new(Self {
            written,
            reads: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            eventual: AtomicU64::new(0),
            eventual_old: AtomicU64::new(0),
            first: std::sync::OnceLock::new(),
            next: AtomicU64::new(100_000_000),
        })
    }

    /// The newest version of an instance that was acknowledged so far.
    fn acknowledged(&self, instance: u64) -> u64 {
        let newest = |(version, count): &(AtomicU64, AtomicU64)| {
            version.load(Ordering::SeqCst).max(count.load(Ordering::SeqCst))
        };
        self.of(instance).map_or(0, newest)
    }

    fn of(&self, instance: u64) -> Option<&(AtomicU64, AtomicU64)> {
        self.written.get(usize::try_from(instance).ok()?)
    }

    /// A write was acknowledged with this version. It is counted, too, so that a server that tells an old version is found.
    fn wrote(&self, instance: u64, version: u64) {
        if let Some((newest, count)) = self.of(instance) {
            newest.fetch_max(version, Ordering::SeqCst);
            count.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A read that began when `least` had been acknowledged showed `version`.
    fn read(&self, instance: u64, least: u64, version: u64, eventual: bool) {
        let (reads, old) = if eventual { (&self.eventual, &self.eventual_old) } else { (&self.reads, &self.stale) };
        reads.fetch_add(1, Ordering::Relaxed);
        if version < least {
            old.fetch_add(1, Ordering::Relaxed);
            if !eventual {
                let _ = self
                    .first
                    .set(format!("instance {instance} showed version {version} after {least} was acknowledged"));
            }
        }
    }
}

/// Instances by Zipf's law.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(instances: u64) -> Arc<Self> {
        let mut sum = 0.0;
        let sums = (1..=instances).map(|rank| {
            sum += 1.0 / to_f64(rank);
            sum
        });
        Arc::new(Self(sums.collect()))
    }

    /// The instance at a place in `[0, 1)`. Ranks are spread over the numbers, so that neighbours are not alike.
    fn at(&self, unit: f64) -> u64 {
        let wanted = unit * self.0.last().copied().unwrap_or(0.0);
        let rank = self.0.partition_point(|sum| *sum <= wanted) as u64;
        let count = self.0.len() as u64;
        (rank.min(count.saturating_sub(1)) * 7919) % count.max(1)
    }
}

enum Doing {
    Strong,
    Eventual,
    Write,
}

/// What one connection does.
struct Mixed {
    random: Random,
    zipf: Arc<Zipf>,
    board: Arc<Board>,
    strong: Template,
    eventual: Template,
    writes: Vec<Template>,
    doing: Doing,
    instance: u64,
    least: u64,
    seq: u64,
}

impl Mixed {
    fn new(address: &Address, size: usize, random: Random, zipf: Arc<Zipf>, board: Arc<Board>) -> Self {
        let writes = (0..SIZES).map(|step| Repeat::patch_template(address, size >> step)).collect();
        Self {
            random,
            zipf,
            board,
            strong: address.request("GET", "/state", &Template::default()),
            eventual: address.request("GET", "/state?consistency=eventual", &Template::default()),
            writes,
            doing: Doing::Strong,
            instance: 0,
            least: 0,
            seq: 0,
        }
    }
}

impl Job for Mixed {
    fn next(&mut self) -> Option<&[u8]> {
        self.instance = self.zipf.at(self.random.unit());
        self.doing = match self.random.below(100) {
            n if n < STRONG => Doing::Strong,
            n if n < STRONG + EVENTUAL => Doing::Eventual,
            _ => Doing::Write,
        };
        self.seq = self.board.next.fetch_add(1, Ordering::Relaxed);
        self.least = self.board.acknowledged(self.instance);
        let request = match self.doing {
            Doing::Strong => &mut self.strong,
            Doing::Eventual => &mut self.eventual,
            Doing::Write => {
                let size = usize::try_from(self.instance % SIZES).unwrap_or(0);
                &mut self.writes[size]
            }
        };
        request.set(Slot::Instance, self.instance);
        request.set(Slot::Seq, self.seq);
        Some(request.bytes())
    }

    fn answered(&mut self, status: u16, body: &[u8]) -> bool {
        if status != 200 {
            return false;
        }
        let Some(version) = number_after(body, b"\"version\":") else { return false };
        match self.doing {
            Doing::Strong => self.board.read(self.instance, self.least, version, false),
            Doing::Eventual => self.board.read(self.instance, self.least, version, true),
            Doing::Write => self.board.wrote(self.instance, version),
        }
        true
    }
}

impl Bench<'_> {
    /// Prepares, measures, checks.
    pub(super) async fn cache(&mut self) -> Result<Machine, Error> {
        let target = self.target().await?;
        let machine = self.machine(&target);
        let size = self.args.payload.unwrap_or(4096);
        self.set("choice", "Zipf, exponent 1");
        self.set("operations", "80 % strong reads, 10 % eventual reads, 10 % writes");
        self.set("states", format!("{} B to {size} B", size >> (SIZES - 1)));
        self.set("nodes", target.nodes.len());
        self.write_all(&target, size).await?;
        let (zipf, board) = (Zipf::new(self.args.instances()), Board::new(self.args.instances()));
        for run in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let figures = self.measure_cache(&target, size, run, &zipf, &board).await?;
            self.runs.push(figures);
        }
        let stale = board.stale.load(Ordering::SeqCst);
        self.stale_reads = Some(stale);
        if let Some(first) = board.first.get() {
            self.notes.push(format!("the first stale read: {first}"));
        }
        self.finish(target).await?;
        Ok(machine)
    }

    async fn write_all(&self, target: &Target, size: usize) -> Result<(), Error> {
        let (address, deal) = (self.address(target.http), Deal::new(0..self.args.instances()));
        let job = move |number: usize| -> Box<dyn Job> {
            let size = size >> (number as u64 % SIZES);
            Box::new(Repeat::patch_state(&address, size, Choice::EachOnce(deal.clone())))
        };
        self.prepare(target.http, "writing states", Arc::new(job)).await.map(drop)
    }

    async fn measure_cache(
        &self,
        target: &Target,
        size: usize,
        run: u32,
        zipf: &Arc<Zipf>,
        board: &Arc<Board>,
    ) -> Result<Vec<Figure>, Error> {
        let seed = self.args.seed.wrapping_add(u64::from(run) << 32);
        let (address, zipf, shared) = (self.address(target.http), zipf.clone(), board.clone());
        let load_of = |seed: u64| {
            let (address, zipf, shared) = (address.clone(), zipf.clone(), shared.clone());
            let make = Arc::new(move |number: usize| -> Box<dyn Job> {
                let random = Random::new(seed, number as u64);
                Box::new(Mixed::new(&address, size, random, zipf.clone(), shared.clone()))
            });
            self.http_load(&target.nodes, self.args.connections(), self.pace(), seed, make)
        };
        // What is measured chooses anew: the choices of the warm-up made again would all be held.
        let (warming, load) = (load_of(seed ^ WARMING), load_of(seed));
        let label = format!("run {} of {}", run + 1, self.args.runs);
        let stale = board.stale.load(Ordering::SeqCst);
        let (reads, old) = (board.eventual.load(Ordering::SeqCst), board.eventual_old.load(Ordering::SeqCst));
        // The warm-up is a run of its own: what is counted begins with what it left behind.
        let full = self.span();
        if !full.warmup.is_zero() {
            let span = drive::Span { warmup: std::time::Duration::ZERO, duration: Some(full.warmup), ..full };
            drive::drive(&[warming], span, &[], &self.progress(), "warming up").await?;
        }
        let before = self.pages(&target.nodes).await?;
        let span = drive::Span { warmup: std::time::Duration::ZERO, ..full };
        let loads = [load];
        let outcome = drive::drive(&loads, span, &target.processes, &self.progress(), &label).await?;
        let after = self.pages(&target.nodes).await?;
        let mut figures = shares(&before, &after);
        figures.push(Figure::new("stale reads", "", to_f64(board.stale.load(Ordering::SeqCst) - stale)));
        let reads = board.eventual.load(Ordering::SeqCst) - reads;
        let old = board.eventual_old.load(Ordering::SeqCst) - old;
        figures.push(Figure::new("eventual reads that were older", "%", percent(to_f64(old), to_f64(reads))));
        figures.extend(outcome.figures(&loads, !target.processes.is_empty()));
        Ok(figures)
    }

    /// The cache's samples on the metrics pages of all nodes, added up.
    async fn pages(&self, nodes: &[SocketAddr]) -> Result<Samples, Error> {
        let mut samples = Samples::default();
        for &node in nodes {
            let failed = |e| Error::io("reading /metrics", e);
            let mut connection = Connection::connect(node).await.map_err(failed)?;
            let token = self.args.token.as_ref();
            let token = token.map_or(String::new(), |token| format!("authorization: Bearer {token}\r\n"));
            let request = format!("GET /metrics HTTP/1.1\r\nhost: {node}\r\n{token}\r\n");
            let answer = connection.exchange(request.as_bytes()).await.map_err(failed)?;
            samples.add(&String::from_utf8_lossy(answer.body));
        }
        Ok(samples)
    }
}

/// What is read on the metrics pages.
const WATCHED: [&str; 7] = [
    metric::CACHE_READS,
    metric::CACHE_OWNER_ANSWERS,
    metric::CACHE_WAITS,
    metric::CACHE_LOADS,
    metric::CACHE_EVICTIONS,
    metric::CACHE_BYTES,
    metric::CACHE_LIMIT,
];

/// Samples by name and labels.
#[derive(Default)]
struct Samples(BTreeMap<String, f64>);

impl Samples {
    fn add(&mut self, page: &str) {
        for line in page.lines().filter(|line| WATCHED.iter().any(|name| line.starts_with(name))) {
            if let Some((name, value)) = line.rsplit_once(' ')
                && let Ok(value) = value.parse::<f64>()
            {
                *self.0.entry(name.to_owned()).or_default() += value;
            }
        }
    }

    /// The sum of those of a name whose labels have all of these.
    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let fits = |key: &str| {
            key.strip_prefix(name).is_some_and(|rest| {
                (rest.is_empty() || rest.starts_with('{')) && labels.iter().all(|label| rest.contains(label))
            })
        };
        self.0.iter().filter(|(key, _)| fits(key)).map(|(_, value)| value).sum()
    }
}

fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole * 100.0 } else { 0.0 }
}

/// Where reads ended.
fn shares(before: &Samples, after: &Samples) -> Vec<Figure> {
    let grown = |name: &str, labels: &[&str]| after.sum(name, labels) - before.sum(name, labels);
    let reads = |tier: &str, results: &[&str]| {
        let one =
            |result: &&str| grown(metric::CACHE_READS, &[&format!("tier=\"{tier}\""), &format!("result=\"{result}\"")]);
        results.iter().map(one).sum::<f64>()
    };
    const SERVED: [&str; 3] = ["hit", "validated", "stale"];
    let (served, missed) = (reads("l1", &SERVED), reads("l1", &["miss"]));
    let owners = grown(metric::CACHE_OWNER_ANSWERS, &["result=\"newer\""]);
    let (second, asked) = (reads("l2", &SERVED), reads("l2", &SERVED) + reads("l2", &["miss"]));
    vec![
        Figure::new("L1 hits", "%", percent(served, served + missed)),
        Figure::new("of them validated by the owner", "%", percent(reads("l1", &["validated"]), served)),
        Figure::new("L2 hits, of what was asked of L2", "%", percent(second, asked)),
        Figure::new("L2 hits, of L1's misses", "%", percent(second, missed)),
        Figure::new("answers from the owner's memory", "1", owners),
        Figure::new("L1 misses", "1", missed),
        Figure::new("waited for a load under way", "1", grown(metric::CACHE_WAITS, &[])),
        Figure::new("loads from the store", "1", grown(metric::CACHE_LOADS, &["type=\"state\""])),
        Figure::new("L1 evictions", "1", grown(metric::CACHE_EVICTIONS, &["tier=\"l1\""])),
        Figure::new(
            "bytes in L1 at the end",
            "MiB",
            after.sum(metric::CACHE_BYTES, &["tier=\"l1\""]) / 1024.0 / 1024.0,
        ),
        Figure::new("L1's size", "MiB", after.sum(metric::CACHE_LIMIT, &["tier=\"l1\""]) / 1024.0 / 1024.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_wanted_is_wanted_most() {
        let zipf = Zipf::new(1000);
        let mut random = Random::new(1, 1);
        let mut counts = BTreeMap::<u64, u32>::new();
        (0..100_000).for_each(|_| *counts.entry(zipf.at(random.unit())).or_default() += 1);
        // H(1000) is about 7.49: the first has 13.4 % of all, the second half of that.
        let share = |rank: u64| f64::from(counts.get(&(rank * 7919 % 1000)).copied().unwrap_or(0)) / 100_000.0;
        assert!((share(0) - 0.1336).abs() < 0.01 && (share(1) - 0.0668).abs() < 0.007, "{} {}", share(0), share(1));
        assert!(counts.keys().all(|instance| *instance < 1000) && counts.len() > 900);
    }

    #[test]
    fn a_read_is_held_against_what_was_acknowledged_before_it_began() {
        let board = Board::new(2);
        board.wrote(1, 5);
        assert_eq!((board.acknowledged(0), board.acknowledged(1)), (1, 5));
        let least = board.acknowledged(1);
        board.wrote(1, 6);
        board.read(1, least, 5, false);
        assert_eq!(board.stale.load(Ordering::SeqCst), 0, "6 was acknowledged after it began");
        board.read(1, board.acknowledged(1), 5, true);
        assert_eq!(board.stale.load(Ordering::SeqCst), 0, "it did not mind");
        // A server that lies about the version is not believed.
        board.wrote(0, 1);
        assert_eq!(board.acknowledged(0), 2);
        board.read(1, board.acknowledged(1), 5, false);
        assert_eq!((board.stale.load(Ordering::SeqCst), board.eventual_old.load(Ordering::SeqCst)), (1, 1));
        assert!(board.first.get().is_some_and(|first| first.contains("version 5 after 6")));
    }

    #[test]
    fn shares_are_of_what_grew() {
        let page = |hit: u32, miss: u32| {
            let mut samples = Samples::default();
            samples.add(&format!(
                "sophont_cache_reads_total{{tier=\"l1\",type=\"state\",result=\"hit\"}} {hit}\n\
                 sophont_cache_reads_total{{tier=\"l1\",type=\"state\",result=\"miss\"}} {miss}\nother 1\n"
            ));
            samples
        };
        let figures = shares(&page(100, 10), &page(190, 20));
        assert!((figures[0].value - 90.0).abs() < 1e-9, "{:?}", figures[0]);
    }
}
