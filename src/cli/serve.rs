//! `sophont serve`: starts a node, says where it listens, and drains it when asked to stop.
//!
//! Owns: the contract lines on standard output, what is shown to people, signals. Not here: how a node is built (`node`).
//! Tests: at the foot (what is shown); `tests/it/cli.rs` drives the binary.

use std::{io::IsTerminal, path::Path, process::ExitCode, time::Duration};

use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    Failure, SettingsArgs, out,
    reload::{Cause, Reload},
};
use crate::{
    config::{Backend, Config, Durability, Loaded, MqttMode},
    node::{self, Node},
    telemetry::{log, prometheus},
};

/// Exit code when the drain did not end in time.
const UNFINISHED: i32 = 3;
/// Exit codes after a second signal: 128 and the signal's number, as shells have it.
const INTERRUPTED: i32 = 130;
const TERMINATED: i32 = 143;
/// How much longer than configured a drain may take before the process ends without it.
const DRAIN_GRACE: Duration = Duration::from_secs(5);

/// Serves until a signal, then drains.
pub(super) fn run(args: &SettingsArgs) -> Result<ExitCode, Failure> {
    let mut reload = Reload::new(args);
    let loaded = args.load()?;
    reload.settle(&loaded);
    log::install(&loaded.config.telemetry, &loaded.config.node.name())
        .map_err(|error| Failure::new(error.to_string()))?;
    prometheus::install();
    warn(&loaded.config);
    node::system(serve(&loaded, reload))
}

async fn serve(loaded: &Loaded, mut reload: Reload) -> Result<ExitCode, Failure> {
    let config = &loaded.config;
    // Before the node starts, so that an early signal is not the default, which kills.
    let mut signals = Signals::new()?;
    let mut hangup = hangup()?;
    let node = tokio::select! {
        started = Node::start(config) => started.map_err(|error| Failure::of(&error))?,
        signal = signals.next() => {
            tracing::info!(signal = signal.name(), "stopped before it was ready");
            return Ok(ExitCode::SUCCESS);
        }
    };
    announce(loaded, &node);
    let signal = {
        let mut upkeep = interval(Duration::from_secs(prometheus::UPKEEP_SECONDS));
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                signal = signals.next() => break signal,
                _ = upkeep.tick() => prometheus::upkeep(),
                cause = reload.changed() => reload.now(&node, cause).await,
                _ = hangup.recv() => reload.now(&node, Cause::Signal).await,
            }
        }
    };
    tracing::info!(signal = signal.name(), "draining; a second signal stops at once");
    let patience = Duration::from_secs(config.node.drain_seconds) + DRAIN_GRACE;
    // Where the drain does not end, the process does, with the node as it is: its threads may be anywhere. Nothing is lost,
    // durable work is in the store and everything else was never acknowledged.
    let drain = timeout(patience, node.drain());
    tokio::pin!(drain);
    tokio::select! {
        ended = &mut drain => {
            if ended.is_ok() {
                tracing::info!("stopped");
                return Ok(ExitCode::SUCCESS);
            }
            tracing::error!(seconds = patience.as_secs(), "the drain did not end; what was accepted is decided after the next start");
            std::process::exit(UNFINISHED)
        }
        signal = signals.next() => {
            tracing::warn!(signal = signal.name(), "stopped at once; what was accepted is decided after the next start");
            std::process::exit(signal.exit_code())
        }
    }
}

/// The two signals that ask for an end.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    Interrupt,
    Terminate,
}

impl Asked {
    const fn name(self) -> &'static str {
        match self {
            Asked::Interrupt => "SIGINT",
            Asked::Terminate => "SIGTERM",
        }
    }

    const fn exit_code(self) -> i32 {
        match self {
            Asked::Interrupt => INTERRUPTED,
            Asked::Terminate => TERMINATED,
        }
    }
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::new(format!("cannot listen for signals: {error}")));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    /// The next signal. Cancel safe.
    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.interrupt.recv() => Asked::Interrupt,
            _ = self.terminate.recv() => Asked::Terminate,
        }
    }
}

/// SIGHUP: the settings are read again.
fn hangup() -> Result<Signal, Failure> {
    signal(SignalKind::hangup()).map_err(|error| Failure::new(format!("cannot listen for signals: {error}")))
}

/// Settings that are fine and that somebody may regret.
fn warn(config: &Config) {
    match (config.store.backend, config.store.durability) {
        (Backend::Memory, _) => tracing::warn!("store.backend is \"memory\": nothing survives the end of this process"),
        (Backend::Sqlite | Backend::Postgres, Durability::Full) => {}
        (Backend::Sqlite | Backend::Postgres, _) => {
            tracing::warn!("store.durability is not \"full\": a power cut may lose what was acknowledged last");
        }
    }
    if !config.faults.is_none() {
        tracing::warn!(faults = ?config.faults, "faults on demand are in force: promises are broken on purpose");
    }
}

/// What somebody who starts a node wants to know.
struct Facts {
    node: String,
    http: String,
    mqtt: String,
    data: String,
    tenant: String,
    engine: String,
    file: String,
    first: String,
}

impl Facts {
    fn of(loaded: &Loaded, node: &Node) -> Self {
        let config = &loaded.config;
        let mqtt = match (config.mqtt.mode, node.mqtt, node.mqtts) {
            (MqttMode::Embedded, Some(plain), Some(tls)) => format!("mqtt://{plain}  mqtts://{tls}"),
            (MqttMode::Embedded, Some(plain), None) => format!("mqtt://{plain}"),
            (MqttMode::External, ..) => format!("client of {}", config.mqtt.url),
            _ => String::from("off"),
        };
        let data = match config.store.backend {
            Backend::Memory => String::from("in memory only"),
            Backend::Postgres => String::from("in PostgreSQL"),
            Backend::Sqlite => {
                let durability = format!("{:?}", config.store.durability).to_lowercase();
                format!("{} (sqlite, durability {durability})", absolute(&config.node.data_dir))
            }
        };
        let tenant = match config.auth.tokens.len() {
            0 => format!("{}, no login: open to this machine only", config.auth.default_tenant),
            count => format!("by token, {count} configured"),
        };
        let engine = match config.cognition.providers.len() {
            0 => format!("{}, no model provider", config.cognition.default_engine.as_str()),
            _ => {
                let names: Vec<_> = config.cognition.providers.keys().map(String::as_str).collect();
                format!("{}, model providers: {}", config.cognition.default_engine.as_str(), names.join(", "))
            }
        };
        let token = if config.auth.tokens.is_empty() { "" } else { " --token-env VARIABLE" };
        Self {
            node: config.node.name(),
            http: format!("http://{}", node.http),
            mqtt,
            data,
            tenant,
            engine,
            file: loaded.file.as_ref().map_or_else(|| String::from("none, defaults"), |path| absolute(path)),
            first: format!("sophont chat lamp --url http://{}{token}", node.http),
        }
    }

    /// The block for people.
    fn block(&self) -> String {
        let rows = [
            ("http", format!("{0}  (docs: {0}/docs)", self.http)),
            ("mqtt", self.mqtt.clone()),
            ("data", self.data.clone()),
            ("config", self.file.clone()),
            ("tenant", self.tenant.clone()),
            ("engine", self.engine.clone()),
            ("try", self.first.clone()),
        ];
        let mut block = format!("\nSophont {}, node {}\n", env!("CARGO_PKG_VERSION"), self.node);
        for (name, value) in rows {
            block.push_str(&format!("  {name:<7} {value}\n"));
        }
        block.push_str("  Ctrl-C drains, a second one stops at once\n\n");
        block
    }
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

/// Tells where the node listens: contract lines for programs, a block for people or one line for the log.
fn announce(loaded: &Loaded, node: &Node) {
    let facts = Facts::of(loaded, node);
    if std::io::stderr().is_terminal() {
        out::err(&facts.block());
    } else {
        let Facts { node: _, http, mqtt, data, tenant, engine, file, first } = &facts;
        tracing::info!(
            http,
            mqtt,
            data,
            config = file,
            tenant,
            engine,
            first,
            version = env!("CARGO_PKG_VERSION"),
            "ready"
        );
    }
    let mut lines = format!("http listening on {}\n", node.http);
    if let Some(mqtt) = node.mqtt {
        lines.push_str(&format!("mqtt listening on {mqtt}\n"));
    }
    if let Some(mqtts) = node.mqtts {
        lines.push_str(&format!("mqtts listening on {mqtts}\n"));
    }
    lines.push_str("ready\n");
    out::out(&lines);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_block_has_a_line_for_each_fact() {
        let facts = Facts {
            node: "n".into(),
            http: "http://127.0.0.1:1".into(),
            mqtt: "mqtt://127.0.0.1:2".into(),
            data: "/d (sqlite, durability full)".into(),
            tenant: "default, no login: open to this machine only".into(),
            engine: "reflex, no model provider".into(),
            file: "none, defaults".into(),
            first: "sophont chat lamp --url http://127.0.0.1:1".into(),
        };
        let block = facts.block();
        for line in [
            "  http    http://127.0.0.1:1  (docs: http://127.0.0.1:1/docs)\n",
            "  data    /d",
            "  try     sophont chat lamp",
        ] {
            assert!(block.contains(line), "{line} is not in\n{block}");
        }
    }
}
