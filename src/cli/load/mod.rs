//! `sophont load`: measures a server under load and checks what it promised.
//!
//! Owns: scenarios, an open-loop generator over HTTP and MQTT, the reading of the server's CPU and memory, tables and
//! comparison. Not here: the server, and the history checker (`check_history`).
//!
//! Invariants: latency counts from the intended start; the generator says how late it was itself; closed-loop figures are
//! marked as such; a server started here is ended here. Tests: at the foot of each file, and `tests/it/load.rs`.

use std::{
    io,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

pub use args::Args;

use crate::{
    gateway,
    types::{Fault, Kind},
};
use report::Report;

use super::check_history::check::Verdict;

mod args;
mod drive;
mod history;
mod http;
mod job;
mod machine;
mod mqtt;
mod ramp;
mod record;
mod report;
mod scenario;
mod schedule;
mod server;
mod wire;

/// Why a measurement could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system said no.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What it said.
        source: io::Error,
    },
    /// The server did not do as it should.
    #[error("{0}")]
    Server(String),
    /// Flags that do not go together.
    #[error("{0}")]
    Argument(String),
    /// A report that cannot be read.
    #[error("'{file}' is no report: {source}")]
    Report {
        /// The file.
        file: String,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl Error {
    fn io(what: impl Into<String>, source: io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Io { .. } | Error::Server(_) => Kind::Unavailable,
            Error::Argument(_) | Error::Report { .. } => Kind::Invalid,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
                Some("start the server first, or leave --url away and one is started for the measurement".into())
            }
            _ => None,
        }
    }
}

/// Runs the command; call it outside of any runtime. Failure when the checker found a violation.
///
/// # Errors
/// [`Error`] when there is nothing to print.
pub fn run(args: &Args) -> Result<ExitCode, Error> {
    if let Some(bytes) = args.serve_ceiling {
        gateway::http::ceiling::serve(bytes).map_err(|e| Error::io("the bare server", e))?;
        return Ok(ExitCode::SUCCESS);
    }
    // Read first: a bad file should not cost a measurement.
    let earlier = args.compare.as_deref().map(read_report).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("starting the coordinator", e))?;
    let stop = Arc::new(AtomicBool::new(false));
    let report = runtime.block_on(async {
        tokio::spawn(stop_on_ctrl_c(stop.clone()));
        scenario::run(args, stop.clone()).await
    })?;
    print(&report, earlier.as_ref());
    if let Some(path) = &args.json {
        let text = serde_json::to_vec_pretty(&report).map_err(|e| Error::io("writing the report", e.into()))?;
        std::fs::write(path, text).map_err(|e| Error::io(format!("writing {}", path.display()), e))?;
    }
    let clean = report.verdict.as_ref().is_none_or(Verdict::is_clean) && report.stale_reads.unwrap_or(0) == 0;
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn read_report(path: &std::path::Path) -> Result<Report, Error> {
    let text = std::fs::read(path).map_err(|e| Error::io(format!("reading {}", path.display()), e))?;
    serde_json::from_slice(&text).map_err(|source| Error::Report { file: path.display().to_string(), source })
}

fn print(report: &Report, earlier: Option<&Report>) {
    println!("{}", report.table());
    if let Some(earlier) = earlier {
        println!("{}", report.compare(earlier));
    }
}

/// The first Ctrl-C ends the run in order, so that what there is gets printed; a second one ends at once.
async fn stop_on_ctrl_c(stop: Arc<AtomicBool>) {
    if tokio::signal::ctrl_c().await.is_err() {
        return;
    }
    stop.store(true, Ordering::Relaxed);
    eprintln!("stopping; once more to stop at once");
    if tokio::signal::ctrl_c().await.is_ok() {
        std::process::exit(130);
    }
}
