//! activation: a restarted server knows its instances and has none in memory; each is spoken to once.
//!
//! The cost of an activation is what the first stimulus of a cold instance takes beyond the second one of a warm
//! instance. The operating system's cache stays warm over the restart: this measures the runtime, not the disk.

use std::sync::Arc;

use super::{
    super::{
        Error,
        drive::{self, Load, Outcome, Pace, Span},
        http::Job,
        job::{Choice, Deal, Post, stimulus_body},
        machine::Machine,
        report::Figure,
        server,
    },
    Bench, STOP_LIMIT,
};

/// Instances that are activated one at a time, for a latency without queueing.
const LONE: u64 = 1_000;
/// Counts activations on the server's Prometheus page.
const ACTIVATIONS: &str = crate::telemetry::metric::ACTIVATIONS;

impl Bench<'_> {
    /// Creates the instances, then restarts the server for each run.
    pub(super) async fn activation(&mut self) -> Result<Machine, Error> {
        if !self.args.url.is_empty() {
            return Err(Error::Argument("activation restarts the server: leave --url away".into()));
        }
        let mut target = self.target().await?;
        let machine = self.machine(&target);
        let Some(folder) = target.folder.take() else { return Err(Error::Server("no data folder".into())) };
        self.create_instances(target.http).await?;
        self.finish(target).await?;
        for _ in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let mut server = self.recipe(folder.path(), "data", &[])?.start().await?;
            let figures = self.activate(&server).await;
            server.stop(STOP_LIMIT).await?;
            self.runs.push(figures?);
        }
        self.notes.push(format!(
            "'one at a time' has one operation in flight, over {} instances; the others have {} in flight",
            LONE.min(self.args.instances() / 2),
            self.args.connections
        ));
        Ok(machine)
    }

    async fn activate(&self, server: &server::Server) -> Result<Vec<Figure>, Error> {
        let count = self.args.instances();
        let lone = LONE.min(count / 2);
        let before = server::metric(server.http, ACTIVATIONS).await?;
        let alone_cold = self.pass(server, 0..lone, 1, "cold, one at a time").await?;
        let alone_warm = self.pass(server, 0..lone, 1, "warm, one at a time").await?;
        let cold = self.pass(server, lone..count, self.args.connections(), "cold").await?;
        let activated = server::metric(server.http, ACTIVATIONS).await?;
        let warm = self.pass(server, lone..count, self.args.connections(), "warm").await?;
        let p50 = |outcome: &Outcome| outcome.records.first().map_or(0.0, |r| r.latency.ms(0.5));
        let p99 = |outcome: &Outcome| outcome.records.first().map_or(0.0, |r| r.latency.ms(0.99));
        let cpu = cold.cpu_per_1k() - warm.cpu_per_1k();
        let mut figures = vec![
            Figure::new("server CPU of 1k activations (cold - warm)", "ms", cpu),
            Figure::new("server CPU / 1k op, cold", "ms", cold.cpu_per_1k()),
            Figure::new("server CPU / 1k op, warm", "ms", warm.cpu_per_1k()),
            Figure::new("activation and first turn", "op/s", cold.throughput()),
            Figure::new("second turn", "op/s", warm.throughput()),
            Figure::new("activation alone p50 (cold - warm), one at a time", "ms", p50(&alone_cold) - p50(&alone_warm)),
            Figure::new("cold p50, one at a time", "ms", p50(&alone_cold)),
            Figure::new("cold p99, one at a time", "ms", p99(&alone_cold)),
            Figure::new("warm p50, one at a time", "ms", p50(&alone_warm)),
            Figure::new("warm p99, one at a time", "ms", p99(&alone_warm)),
        ];
        if let (Some(before), Some(after)) = (before, activated) {
            figures.push(Figure::new("activations counted by the server", "", after - before));
        }
        Ok(figures)
    }

    /// One stimulus for each instance of the range.
    async fn pass(
        &self,
        server: &server::Server,
        range: std::ops::Range<u64>,
        connections: usize,
        label: &str,
    ) -> Result<Outcome, Error> {
        let (address, deal) = (self.address(server.http), Deal::new(range));
        let body = stimulus_body("touch", false, self.payload());
        let make =
            move |_| -> Box<dyn Job> { Box::new(Post::new(&address, &body, 0, Choice::EachOnce(deal.clone()), false)) };
        let load: Load = self.http_load(&[server.http], connections, Pace::Closed, self.args.seed, Arc::new(make));
        let outcome = drive::drive(&[load], Span::UNTIL_DONE, &[server.group()], &self.progress(), label).await?;
        let trouble = outcome.records.iter().flat_map(|r| r.trouble()).map(|f| format!("{}: {}", f.name, f.value));
        let trouble: Vec<String> = trouble.collect();
        match trouble.is_empty() || self.stopped() {
            true => Ok(outcome),
            false => Err(Error::Server(format!("{label}: {}", trouble.join(", ")))),
        }
    }
}
