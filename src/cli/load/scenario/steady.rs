//! post-durable, read-state, mqtt-qos1 and mixed: a warm server under a steady load.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use super::{
    super::{
        super::check_history::check::Verdict,
        Error,
        args::{Engine, Rate, Scenario},
        drive::{self, Load, Pace, Span, Work},
        history::{self, Logs},
        http::Job,
        job::{Choice, PREFIX, Repeat, device_payload},
        machine::Machine,
        mqtt::Devices,
        ramp::Search,
        report::{Figure, human},
        schedule::Random,
    },
    Bench, Target,
};
use crate::runtime::clock::Clock;

/// Senders over MQTT are numbered from here, so that they differ from those over HTTP.
const FIRST_DEVICE: u32 = 50_000;
/// Where a ramp begins, in operations a second.
const RAMP_START: f64 = 1_000.0;
/// A ramp's step measures this much of a run.
const RAMP_SHARE: f64 = 0.5;

impl Bench<'_> {
    /// Prepares, measures, verifies.
    pub(super) async fn steady(&mut self) -> Result<(Option<Verdict>, Machine), Error> {
        let target = self.target().await?;
        let machine = self.machine(&target);
        self.describe();
        self.create_instances(target.http).await?;
        if self.args.scenario == Scenario::ReadState {
            self.write_states(&target).await?;
        }
        let mut pace = self.pace();
        if self.args.ramp && !self.stopped() {
            pace = self.ramp(&target).await?;
        }
        let mut logs = Logs::new();
        for run in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let mut figures = self.measure(&target, pace, run, &mut logs).await?;
            if self.args.ceiling {
                let own = figure(&figures, "throughput");
                let cpu = figure(&figures, "server CPU / 1k op");
                figures.extend(self.ceiling(target.http, own, cpu, pace).await?);
            }
            self.runs.push(figures);
        }
        if let Some(path) = &self.args.history {
            history::write(path, &logs, PREFIX, (Instant::now(), Clock::System.now()))?;
        }
        let verdict = match self.args.verify {
            true => Some(self.verify(target.http, &logs).await?),
            false => None,
        };
        self.finish(target).await?;
        Ok((verdict, machine))
    }

    fn describe(&mut self) {
        let args = self.args;
        let engine = match args.engine {
            Engine::Reflex => "reflex (one rule that always holds, sets a value, replies)",
            Engine::Scripted => "scripted, no delay",
            Engine::Default => "the tenant's default",
        };
        self.set("engine", engine);
        self.set("payload", format!("{} B", self.payload()));
        if args.scenario != Scenario::ReadState {
            self.set("ids chosen by the sender", args.ids || args.keeps_log());
        }
        if matches!(args.scenario, Scenario::MqttQos1 | Scenario::Mixed) {
            self.set("window of a device", args.window);
            self.set("replies", if args.no_replies { "not subscribed" } else { "subscribed with QoS 1" });
        }
    }

    pub(super) fn payload(&self) -> usize {
        let usual = if self.args.scenario == Scenario::ReadState { 256 } else { 512 };
        self.args.payload.unwrap_or(usual)
    }

    async fn write_states(&self, target: &Target) -> Result<(), Error> {
        let (address, size) = (self.address(target.http), self.payload());
        let deal = super::Deal::new(0..self.args.instances());
        let job =
            move |_| -> Box<dyn Job> { Box::new(Repeat::patch_state(&address, size, Choice::EachOnce(deal.clone()))) };
        self.prepare(target.http, "writing states", Arc::new(job)).await.map(|_| ())
    }

    /// The streams of load of the scenario.
    fn loads(&self, target: &Target, pace: Pace, run: u32) -> Vec<Load> {
        let args = self.args;
        let seed = args.seed.wrapping_add(u64::from(run) << 32);
        match args.scenario {
            Scenario::MqttQos1 => vec![self.devices(target, pace, seed, run)],
            Scenario::Mixed => {
                let half = match pace {
                    Pace::Open { rate, arrivals } => Pace::Open { rate: rate / 2.0, arrivals },
                    Pace::Closed => Pace::Closed,
                };
                let http = Load { name: "HTTP", ..self.posting(target, half, seed, run) };
                let mqtt = Load { name: "MQTT", ..self.devices(target, half, seed, run) };
                vec![http, mqtt]
            }
            Scenario::ReadState => {
                let (address, instances) = (self.address(target.http), args.instances());
                let make = Arc::new(move |number: usize| -> Box<dyn Job> {
                    let choice = Choice::Uniform { random: Random::new(seed, number as u64), instances };
                    Box::new(Repeat::read_state(&address, choice))
                });
                vec![self.http_load(&target.nodes, args.connections(), pace, seed, make)]
            }
            _ => vec![self.posting(target, pace, seed, run)],
        }
    }

    fn posting(&self, target: &Target, pace: Pace, seed: u64, run: u32) -> Load {
        let args = self.args;
        let make = self.posts(target.http, &self.nonce(run), args.ids || args.keeps_log(), args.keeps_log());
        self.http_load(&target.nodes, args.connections(), pace, seed, make)
    }

    fn devices(&self, target: &Target, pace: Pace, seed: u64, run: u32) -> Load {
        let args = self.args;
        let devices = Devices {
            count: args.connections(),
            instances: args.instances().max(u64::from(args.connections)),
            prefix: PREFIX.into(),
            tenant: args.tenant.clone(),
            login: args.token.clone().map(|token| (args.tenant.clone(), token)),
            window: args.window,
            replies: (!args.no_replies).then_some(1),
            nonce: self.nonce(run),
            first_sender: FIRST_DEVICE,
            payload: device_payload(self.payload()),
            log: args.keeps_log(),
        };
        Load {
            name: "",
            addrs: target.mqtt.clone(),
            connections: args.connections(),
            threads: args.threads(),
            pace,
            deadline: args.timeout,
            seed,
            work: Work::Mqtt(Arc::new(devices)),
        }
    }

    async fn measure(&mut self, target: &Target, pace: Pace, run: u32, logs: &mut Logs) -> Result<Vec<Figure>, Error> {
        let loads = self.loads(target, pace, run);
        let label = format!("run {} of {}", run + 1, self.args.runs);
        let mut outcome = drive::drive(&loads, self.span(), &target.processes, &self.progress(), &label).await?;
        for record in &mut outcome.records {
            let log = std::mem::take(&mut record.log);
            if !log.is_empty() {
                logs.push((self.nonce(run), log));
            }
            if let Some(failure) = &record.first_failure {
                self.notes.push(format!("run {}: first failure: {failure}", run + 1));
            }
        }
        Ok(outcome.figures(&loads, !target.processes.is_empty()))
    }

    /// Finds the rate to measure at.
    async fn ramp(&mut self, target: &Target) -> Result<Pace, Error> {
        let mut search = Search::new(RAMP_START);
        let full = self.span();
        let span = Span {
            warmup: full.warmup.mul_f64(RAMP_SHARE),
            duration: full.duration.map(|d| d.mul_f64(RAMP_SHARE)),
            ..full
        };
        let pace = |rate| Pace::Open { rate, arrivals: self.args.arrivals };
        let mut tried = Vec::new();
        let mut step = 1000; // runs of a ramp have nonces of their own
        while let Some(rate) = search.next() {
            if self.stopped() {
                break;
            }
            let loads = self.loads(target, pace(rate), step);
            step += 1;
            let label = format!("ramp, {} op/s", human(rate));
            let outcome = drive::drive(&loads, span, &target.processes, &self.progress(), &label).await?;
            let within = outcome.records.iter().all(|record| {
                let clean = record.failed == 0 && record.unanswered == 0 && record.refused.is_empty();
                clean && record.latency.ms(0.99) <= self.args.p99_ms
            });
            let p99 = outcome.records.iter().map(|r| r.latency.ms(0.99)).fold(0.0, f64::max);
            tried.push(format!("{} op/s: {} ms", human(rate), human(p99)));
            search.tried(within);
        }
        let pace = search.best().map(pace);
        self.notes.push(format!("ramp, p99 within {} ms; {}", self.args.p99_ms, tried.join("; ")));
        match pace {
            Some(Pace::Open { rate, arrivals }) => {
                self.set("rate found by ramp", format!("{} op/s", human(rate)));
                Ok(Pace::Open { rate, arrivals })
            }
            _ if self.stopped() => Ok(self.pace()),
            _ => Err(Error::Server(format!("no rate keeps p99 within {} ms: {}", self.args.p99_ms, tried.join("; ")))),
        }
    }

    /// The same load on a bare server, and our share of it.
    async fn ceiling(
        &mut self,
        node: SocketAddr,
        own: Option<f64>,
        cpu: Option<f64>,
        pace: Pace,
    ) -> Result<Vec<Figure>, Error> {
        if matches!(self.args.rate, Rate::PerSecond(_)) && self.runs.is_empty() {
            self.notes.push("the share of the ceiling's throughput means something with --rate max only".into());
        }
        let outcome = self.measure_ceiling(node, pace).await?;
        let bare = outcome.throughput();
        let mut figures = vec![
            Figure::new("ceiling: server CPU / 1k op", "ms", outcome.cpu_per_1k()),
            Figure::new("ceiling: throughput", "op/s", bare),
        ];
        if let Some(own) = own {
            figures.push(Figure::new("share of the ceiling's throughput", "%", own / bare.max(1e-9) * 100.0));
        }
        if let Some(cpu) = cpu {
            figures.push(Figure::new("ceiling's CPU / our CPU", "%", outcome.cpu_per_1k() / cpu.max(1e-9) * 100.0));
        }
        Ok(figures)
    }
}

fn figure(figures: &[Figure], name: &str) -> Option<f64> {
    figures.iter().find(|f| f.name == name).map(|f| f.value)
}
