//! The scenarios: what is prepared, what is run, what is reported.
//!
//! Here: what they share (the server, its folder, preparing instances, one measured run). Not here: how load is made
//! (`drive.rs`). Tests: `tests/it/load.rs`.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{
    super::check_history::check::Verdict,
    Error,
    args::{Args, Engine, Rate, Scenario, address},
    drive::{self, Load, Outcome, Pace, Span, Work},
    history::{self, Logs},
    http::{Job, MakeJob},
    job::{Address, Choice, Deal, PREFIX, Post, Repeat, stimulus_body},
    machine::{Group, Machine},
    record::Progress,
    report::{Figure, Report, build, rows},
    schedule::Random,
    server::{Folder, Recipe, Server},
};

mod activation;
mod attention;
mod cache;
mod cache_memory;
mod ceiling;
mod idle_memory;
mod start_stop;
mod steady;

/// After the window, how long answers are waited for.
const GRACE: Duration = Duration::from_secs(10);
/// Connections that prepare.
const PREPARING_CONNECTIONS: usize = 256;
/// Longest wait for a server's clean end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// One scenario being measured.
struct Bench<'a> {
    args: &'a Args,
    stop: Arc<AtomicBool>,
    runs: Vec<Vec<Figure>>,
    notes: Vec<String>,
    settings: Vec<(String, String)>,
    stale_reads: Option<u64>,
}

/// The server in front of the scenario.
struct Target {
    // Before the folder: the server ends first.
    server: Option<Server>,
    folder: Option<Folder>,
    /// The node that is asked what is the same at all of them.
    http: SocketAddr,
    /// All nodes.
    nodes: Vec<SocketAddr>,
    /// Where devices connect.
    mqtt: Vec<SocketAddr>,
    processes: Vec<Group>,
}

/// Measures what the flags say.
///
/// # Errors
/// [`Error`] when the server cannot be started or reached, or an instance not be prepared.
pub async fn run(args: &Args, stop: Arc<AtomicBool>) -> Result<Report, Error> {
    let speaks = matches!(args.scenario, Scenario::PostDurable | Scenario::MqttQos1 | Scenario::Mixed);
    if args.history.is_some() && !speaks {
        return Err(Error::Argument("--history goes with post-durable, mqtt-qos1 and mixed".into()));
    }
    let settings = vec![
        ("instances".into(), args.instances().to_string()),
        ("connections".into(), args.connections.to_string()),
        ("generator threads".into(), args.threads.to_string()),
        ("duration".into(), format!("{:?}", args.duration)),
        ("warm-up".into(), format!("{:?}", args.warmup)),
    ];
    let mut bench = Bench { args, stop, runs: Vec::new(), notes: Vec::new(), settings, stale_reads: None };
    let (verdict, machine) = match args.scenario {
        Scenario::PostDurable | Scenario::ReadState | Scenario::MqttQos1 | Scenario::Mixed => bench.steady().await?,
        Scenario::Activation => (None, bench.activation().await?),
        Scenario::IdleMemory => (None, bench.idle_memory().await?),
        Scenario::Attention => (None, bench.attention().await?),
        Scenario::StartStop => bench.start_stop().await?,
        Scenario::Cache => (None, bench.cache().await?),
        Scenario::CacheMemory => (None, bench.cache_memory().await?),
    };
    Ok(Report {
        scenario: args.scenario.name().into(),
        generator: bench.generator(),
        settings: bench.settings,
        machine,
        build: build(),
        seed: args.seed,
        rows: rows(&bench.runs),
        notes: bench.notes,
        verdict,
        stale_reads: bench.stale_reads,
        interrupted: bench.stop.load(Ordering::Relaxed),
    })
}

async fn addresses(names: &[String]) -> Result<Vec<SocketAddr>, Error> {
    let mut all = Vec::with_capacity(names.len());
    for name in names {
        all.push(address(name).await.map_err(Error::Argument)?);
    }
    Ok(all)
}

impl Bench<'_> {
    fn generator(&self) -> String {
        let args = self.args;
        match (args.scenario, args.rate) {
            (Scenario::Activation | Scenario::IdleMemory | Scenario::CacheMemory, _) => "closed loop".into(),
            (Scenario::Attention, _) => {
                "open loop, uniform arrivals of the person, Poisson arrivals of the streams".into()
            }
            (_, Rate::PerSecond(rate)) => {
                format!("open loop, {} op/s, {:?} arrivals", super::report::human(rate), args.arrivals)
            }
            (Scenario::MqttQos1, Rate::Max) => format!(
                "closed loop, {} devices with {} in flight each: throughput only, the latencies are the queue's",
                args.connections, args.window
            ),
            (_, Rate::Max) => {
                format!("closed loop, {} in flight: throughput only, the latencies are the queue's", args.connections)
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn set(&mut self, name: &str, value: impl ToString) {
        self.settings.push((name.into(), value.to_string()));
    }

    fn progress(&self) -> Arc<Progress> {
        Arc::new(Progress { stop: self.stop.clone(), ..Progress::default() })
    }

    fn pace(&self) -> Pace {
        match self.args.rate {
            Rate::PerSecond(rate) => Pace::Open { rate, arrivals: self.args.arrivals },
            Rate::Max => Pace::Closed,
        }
    }

    fn span(&self) -> Span {
        Span { warmup: self.args.warmup, duration: Some(self.args.duration), grace: GRACE }
    }

    fn address(&self, host: SocketAddr) -> Address {
        Address { host, token: self.args.token.clone() }
    }

    /// The program that serves: the one named, or this one.
    fn program(&self) -> Result<PathBuf, Error> {
        let own = || std::env::current_exe().map_err(|e| Error::io("finding this program", e));
        self.args.program.clone().map_or_else(own, Ok)
    }

    /// How a server is started, with its data in `folder`.
    fn recipe(&self, folder: &Path, name: &str, sets: &[&str]) -> Result<Recipe, Error> {
        let sets: Vec<String> = sets.iter().map(|&set| set.into()).chain(self.args.set.iter().cloned()).collect();
        Ok(Recipe::node(self.program()?, &folder.join(name), &sets))
    }

    fn folder(&self) -> Result<Folder, Error> {
        Folder::new(self.args.data_dir.as_deref(), self.args.keep)
    }

    /// The running server that was named, or a new one.
    async fn target(&self) -> Result<Target, Error> {
        let nodes = addresses(&self.args.url).await?;
        if let Some(&http) = nodes.first() {
            let (mqtt, processes) = (addresses(&self.args.mqtt).await?, Group::all(&self.args.server_pid));
            return Ok(Target { server: None, folder: None, http, nodes, mqtt, processes });
        }
        let folder = self.folder()?;
        let size = format!("scaling.cache_l1_size_mb={}", self.args.cache_mb);
        let mut sets: Vec<&str> = Vec::new();
        if self.args.scenario == Scenario::Cache {
            sets.push(&size);
        }
        if self.args.drop_invalidations {
            sets.push("faults.drop_invalidations=true");
        }
        let server = self.recipe(folder.path(), "data", &sets)?.start().await?;
        let (http, processes) = (server.http, vec![server.group()]);
        let mqtt = vec![server.mqtt.unwrap_or(http)];
        Ok(Target { server: Some(server), folder: Some(folder), http, nodes: vec![http], mqtt, processes })
    }

    /// The box, and the disk below the target's data when that is known.
    fn machine(&self, target: &Target) -> Machine {
        let folder = target.folder.as_ref().map(|f| f.path().to_path_buf());
        let folder: Option<PathBuf> = folder.or_else(|| self.args.data_dir.clone());
        Machine::look(folder.as_deref())
    }

    /// A load over HTTP.
    fn http_load(&self, to: &[SocketAddr], connections: usize, pace: Pace, seed: u64, make: Arc<MakeJob>) -> Load {
        Load {
            name: "",
            addrs: to.to_vec(),
            connections,
            threads: self.args.threads(),
            pace,
            deadline: self.args.timeout,
            seed,
            work: Work::Http(make),
        }
    }

    /// Runs jobs that end on their own, all connections busy, and insists that each operation succeeds.
    async fn prepare(&self, addr: SocketAddr, what: &str, make: Arc<MakeJob>) -> Result<Outcome, Error> {
        let load = self.http_load(&[addr], PREPARING_CONNECTIONS, Pace::Closed, self.args.seed, make);
        let outcome = drive::drive(&[load], Span::UNTIL_DONE, &[], &self.progress(), what).await?;
        let record = outcome.records.first();
        let refused = record.map_or(0, |r| r.refused.values().sum::<u64>() + r.failed);
        if refused > 0 && !self.stopped() {
            let detail = record.map(|r| format!("{:?} {:?}", r.refused, r.first_failure)).unwrap_or_default();
            return Err(Error::Server(format!("{what}: {refused} operations were refused or failed: {detail}")));
        }
        Ok(outcome)
    }

    /// Gives each instance its profile, then one stimulus, so that what is measured is not its creation.
    async fn create_instances(&self, addr: SocketAddr) -> Result<(), Error> {
        self.put_profiles(addr, 0..self.args.instances()).await?;
        self.touch(addr, 0..self.args.instances()).await.map(|_| ())
    }

    async fn put_profiles(&self, addr: SocketAddr, range: std::ops::Range<u64>) -> Result<(), Error> {
        if self.args.engine == Engine::Default {
            return Ok(());
        }
        let (address, deal, engine) = (self.address(addr), Deal::new(range), self.args.engine);
        let job = move |_| -> Box<dyn Job> {
            Box::new(Repeat::put_profile(&address, engine, Choice::EachOnce(deal.clone())))
        };
        self.prepare(addr, "creating instances", Arc::new(job)).await.map(|_| ())
    }

    /// One stimulus for each instance of the range.
    async fn touch(&self, addr: SocketAddr, range: std::ops::Range<u64>) -> Result<Outcome, Error> {
        let (address, deal) = (self.address(addr), Deal::new(range));
        let body = stimulus_body("touch", false, self.args.payload.unwrap_or(512));
        let job =
            move |_| -> Box<dyn Job> { Box::new(Post::new(&address, &body, 0, Choice::EachOnce(deal.clone()), false)) };
        self.prepare(addr, "first stimuli", Arc::new(job)).await
    }

    /// Jobs that POST to instances at random.
    fn posts(&self, addr: SocketAddr, nonce: &str, ids: bool, log: bool) -> Arc<MakeJob> {
        let (address, instances, seed) = (self.address(addr), self.args.instances(), self.args.seed);
        let body = stimulus_body(nonce, ids, self.args.payload.unwrap_or(512));
        Arc::new(move |number| -> Box<dyn Job> {
            let choice = Choice::Uniform { random: Random::new(seed, number as u64), instances };
            Box::new(Post::new(&address, &body, number, choice, log))
        })
    }

    /// Tells the runs of all generators against one server apart, across restarts of the generator too.
    fn nonce(&self, run: u32) -> String {
        format!("p{}r{run}", std::process::id())
    }

    async fn verify(&mut self, addr: SocketAddr, logs: &Logs) -> Result<Verdict, Error> {
        history::check(addr, self.args.token.as_deref(), PREFIX, logs).await
    }

    /// Ends a server that was started here.
    async fn finish(&mut self, mut target: Target) -> Result<(), Error> {
        if let Some(server) = target.server.as_mut() {
            server.stop(STOP_LIMIT).await?;
        }
        Ok(())
    }
}
