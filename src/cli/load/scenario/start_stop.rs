//! start-stop: a first start on an empty folder, a clean stop in the middle of a load, and what the next start still has.

use std::{path::Path, time::Duration};

use super::{
    super::{
        super::check_history::check::Verdict,
        Error,
        drive::{self, Span},
        history::Logs,
        machine::Machine,
        report::{Figure, to_f64},
    },
    Bench, STOP_LIMIT,
};

impl Bench<'_> {
    /// A fresh folder for each run.
    pub(super) async fn start_stop(&mut self) -> Result<(Option<Verdict>, Machine), Error> {
        if !self.args.url.is_empty() {
            return Err(Error::Argument("start-stop needs a server of its own: leave --url away".into()));
        }
        let folder = self.folder()?;
        let machine = Machine::look(Some(folder.path()));
        let mut verdict = Verdict::default();
        for run in 0..self.args.runs {
            if self.stopped() {
                break;
            }
            let (figures, found) = self.start_and_stop(folder.path(), run).await?;
            verdict.merge(found);
            self.runs.push(figures);
        }
        Ok((Some(verdict), machine))
    }

    async fn start_and_stop(&mut self, folder: &Path, run: u32) -> Result<(Vec<Figure>, Verdict), Error> {
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        let recipe = self.recipe(folder, &format!("run-{run}"), &[])?;
        let mut server = recipe.start().await?;
        let first_start = server.ready_in;
        self.put_profiles(server.http, 0..self.args.instances()).await?;

        let make = self.posts(server.http, &self.nonce(run), true, true);
        let load = self.http_load(&[server.http], self.args.connections(), self.pace(), self.args.seed, make);
        let span = Span { grace: Duration::from_secs(2), ..self.span() };
        // The load goes on for the whole window; the server is asked to stop in the middle of it.
        let middle = span.warmup + self.args.duration / 2;
        let progress = self.progress();
        let loads = [load];
        let (outcome, stopped) = tokio::join!(drive::drive(&loads, span, &[], &progress, "load"), async {
            tokio::time::sleep(middle).await;
            server.stop(STOP_LIMIT).await
        });
        let (mut outcome, stopped) = (outcome?, stopped?);
        let logs: Logs = outcome.records.iter_mut().map(|r| (self.nonce(run), std::mem::take(&mut r.log))).collect();
        let acked = logs.iter().flat_map(|(_, log)| log).filter(|entry| entry.is_accepted()).count();

        let mut server = recipe.start().await?;
        let second_start = server.ready_in;
        let verdict = self.verify(server.http, &logs).await?;
        let idle_stop = server.stop(STOP_LIMIT).await?;
        let figures = vec![
            Figure::new("first start to ready", "ms", ms(first_start)),
            Figure::new("clean stop under load", "ms", ms(stopped)),
            Figure::new("start on its data to ready", "ms", ms(second_start)),
            Figure::new("clean stop without load", "ms", ms(idle_stop)),
            Figure::new("acknowledged before the stop", "op", to_f64(acked as u64)),
            Figure::new("acknowledged and lost", "op", to_f64(verdict.lost)),
        ];
        Ok((figures, verdict))
    }
}
