//! The command line: parses, calls, prints. Not here: what the commands do inside a node (`node`).
//!
//! Owns: the commands and their arguments, exit codes ([`Failure`]), and what people read on a terminal. Standard output is
//! for answers and contract lines, standard error for everything else.
//! Tests: at the foot of each file; `tests/it/config.rs` and `tests/it/cli.rs` drive the binary.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, error::ErrorKind};

use crate::config::{
    self, Loaded, Problem, Sources,
    preset::{self, Preset},
};

pub mod chat;
pub mod check_history;
mod cluster;
mod door;
mod failure;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod inspect;
pub mod load;
mod out;
mod reload;
mod serve;
mod settings;

pub use failure::Failure;

/// A runtime for consciousness instances: durable, stateful AI agents, one supervised actor each.
#[derive(Debug, Parser)]
#[command(
    name = "sophont",
    version,
    args_conflicts_with_subcommands = true,
    after_help = AFTER_HELP
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    settings: SettingsArgs,
}

const AFTER_HELP: &str = "\
Without a command, `serve` is meant. Without any file or flag: HTTP on 127.0.0.1:8080, MQTT on 127.0.0.1:1883, data in
./data, no login (both doors are open to this machine only).

First steps, with the node running:
  sophont chat lamp
  curl -s http://127.0.0.1:8080/v1/instances/lamp/stimuli -H 'content-type: application/json' -d '{\"content\":\"hello\"}'

Settings come from the defaults, then --preset, then --config or ./sophont.toml, then SOPHONT__SECTION__KEY, then --set, then the flags
above; `sophont config print` shows them all.

Exit codes: 0 done; 1 it could not start or failed; 2 wrong usage; 3 the drain ran out of time (nothing accepted is lost);
130 and 143 stopped at once by a second Ctrl-C or SIGTERM.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a node (the default).
    Serve(SettingsArgs),
    /// Check or print the settings.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Talk to an instance: line by line on a terminal, or with messages piped in, one a line.
    Chat(chat::ChatArgs),
    /// Show an instance: profile, state, inbox, last turns, dead letters.
    Inspect(inspect::InspectArgs),
    /// Say `ready` when a node takes work, for scripts and container health checks.
    Health(door::DoorArgs),
    /// Hold what clients wrote down against what is stored: which promises were kept.
    CheckHistory(check_history::CheckArgs),
    /// List the nodes of the cluster.
    Nodes(cluster::ListArgs),
    /// List the shards of the cluster and who owns them.
    Shards(cluster::ListArgs),
    /// Ask something of a node.
    #[command(subcommand)]
    Node(cluster::NodeCommand),
    /// Measure a server under load, and check what it promised.
    Load(Box<load::Args>),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Say `ok`, or everything that is wrong.
    Check(SettingsArgs),
    /// Print the settings in force as TOML, each with where it came from; secrets are hidden.
    Print(SettingsArgs),
}

/// Where settings come from.
#[derive(Debug, Clone, Default, Args)]
pub struct SettingsArgs {
    /// Configuration file; ./sophont.toml when it exists and none is named.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Settings for so many users: 1, 2-10, 10-50, 50-500 or 500+. Everything else goes before them.
    #[arg(long, value_name = "NAME", value_parser = preset)]
    preset: Option<Preset>,
    /// Folder of everything durable (node.data_dir).
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address of the HTTP door (http.listen); port 0 picks a free one.
    #[arg(long, value_name = "ADDR")]
    http: Option<String>,
    /// Address of the MQTT door (mqtt.listen); port 0 picks a free one.
    #[arg(long, value_name = "ADDR")]
    mqtt: Option<String>,
    /// One setting, such as store.durability=normal; may be repeated.
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

fn preset(name: &str) -> Result<Preset, String> {
    Preset::named(name).ok_or_else(|| format!("there are presets for {} users", preset::names()))
}

impl SettingsArgs {
    fn sources(&self) -> Sources {
        let mut flags = Vec::new();
        if let Some(folder) = &self.data_dir {
            flags.push(("--data-dir", "node", "data_dir", folder.to_string_lossy().into_owned()));
        }
        if let Some(address) = &self.http {
            flags.push(("--http", "http", "listen", address.clone()));
        }
        if let Some(address) = &self.mqtt {
            flags.push(("--mqtt", "mqtt", "listen", address.clone()));
        }
        let text = |text: OsString| text.to_string_lossy().into_owned();
        let env = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        Sources { preset: self.preset, file: self.config.clone(), env, set: self.set.clone(), flags }
    }

    /// Reads all layers, and has the settings checked that only their owner understands.
    fn load(&self) -> Result<Loaded, config::Error> {
        let loaded = config::load(&self.sources())?;
        match crate::telemetry::log::filter(&loaded.config.telemetry.log) {
            Ok(_) => Ok(loaded),
            Err(error) => {
                let problem: Problem = loaded.problem("telemetry", "log", error.to_string(), None);
                Err(config::Error::Problems(vec![problem]))
            }
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let done = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Nobody to tell when the terminal is gone.
            let _ = error.print();
            return ExitCode::from(if done { 0 } else { failure::USAGE });
        }
    };
    // One provider for the whole process, whichever crate asks for TLS first. Only this call can be the first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match run(cli) {
        Ok(code) => code,
        Err(failure) => failure.tell(),
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    match cli.command {
        None => serve::run(&cli.settings),
        Some(Command::Serve(settings)) => serve::run(&settings),
        Some(Command::Config(ConfigCommand::Check(settings))) => settings::check(&settings),
        Some(Command::Config(ConfigCommand::Print(settings))) => settings::print(&settings),
        Some(Command::Chat(args)) => chat::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Health(args)) => inspect::health(&args),
        Some(Command::CheckHistory(args)) => check_history::run(&args),
        Some(Command::Nodes(args)) => cluster::nodes(&args),
        Some(Command::Shards(args)) => cluster::shards(&args),
        Some(Command::Node(command)) => cluster::node(&command),
        Some(Command::Load(args)) => load::run(&args).map_err(|error| Failure::of(&error)),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_is_the_default_and_takes_the_same_flags() {
        let with = |words: &[&str]| Cli::try_parse_from([&["sophont"], words].concat());
        assert!(with(&[]).is_ok_and(|cli| cli.command.is_none()));
        assert!(with(&["--http", "127.0.0.1:0", "--set", "a.b=1"]).is_ok_and(|cli| cli.settings.set.len() == 1));
        assert!(with(&["serve", "--mqtt", "127.0.0.1:0"]).is_ok());
        assert!(with(&["config", "check", "--config", "f"]).is_ok());
        assert!(with(&["config"]).is_err());
        assert!(with(&["chat"]).is_err());
    }
}
