//! `sophont serve`: runs a node until it is told to stop.
//!
//! Standard output has the contract lines, one for each bound door and `ready`; people read the rest on standard error.
//! Tests: `tests/it/cli.rs`.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, SettingsArgs, out};
use crate::{
    node::{self, Node},
    telemetry,
};

/// Exit code when a second signal cut the graceful stop short.
const CUT_SHORT: u8 = 130;

/// Runs the node.
pub fn run(settings: &SettingsArgs) -> Result<ExitCode, Failure> {
    let loaded = settings.load().map_err(|error| Failure::of(&error))?;
    let config = loaded.config;
    telemetry::log::install(&config.telemetry, &config.node.name()).map_err(|error| Failure::new(error.to_string()))?;
    telemetry::prometheus::install();
    node::system(async move {
        let failed = |error: std::io::Error| Failure::new(format!("signals cannot be received: {error}"));
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let node = Node::start(&config).await.map_err(|error| Failure::of(&error))?;
        out::out(&format!("http listening on {}\n", node.http));
        if let Some(address) = node.mqtt {
            out::out(&format!("mqtt listening on {address}\n"));
        }
        if let Some(address) = node.mqtts {
            out::out(&format!("mqtts listening on {address}\n"));
        }
        out::out("ready\n");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: new work is refused, work in hand is finished; a second signal stops at once");
        tokio::select! {
            () = node.drain() => Ok(ExitCode::SUCCESS),
            _ = terminate.recv() => Ok(ExitCode::from(CUT_SHORT)),
            _ = interrupt.recv() => Ok(ExitCode::from(CUT_SHORT)),
        }
    })
}
