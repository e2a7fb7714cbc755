//! The flags of `sophont load`.

use std::{net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use super::schedule::Arrivals;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Scenario {
    /// POST a stimulus, wait for the committed turn.
    PostDurable,
    /// GET a hot instance's state.
    ReadState,
    /// Devices publish with QoS 1 and await PUBACK and the reply on the topic.
    MqttQos1,
    /// First stimulus of cold instances after a restart.
    Activation,
    /// Memory of active idle instances.
    IdleMemory,
    /// HTTP and MQTT side by side, half the rate each.
    Mixed,
    /// A person among noisy streams in one instance, whose engine takes its time.
    Attention,
    /// First start to serving; a clean stop under load, with nothing lost.
    StartStop,
    /// Reads and writes of states by Zipf's law: shares of the cache's tiers, and that no read is stale.
    Cache,
    /// Memory of a cache while values of all sizes come and go, and after it was made smaller.
    CacheMemory,
}

impl Scenario {
    /// As it is written on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Scenario::PostDurable => "post-durable",
            Scenario::ReadState => "read-state",
            Scenario::MqttQos1 => "mqtt-qos1",
            Scenario::Activation => "activation",
            Scenario::IdleMemory => "idle-memory",
            Scenario::Mixed => "mixed",
            Scenario::Attention => "attention",
            Scenario::StartStop => "start-stop",
            Scenario::Cache => "cache",
            Scenario::CacheMemory => "cache-memory",
        }
    }

    /// Instances when the flag is absent.
    pub const fn default_instances(self) -> u64 {
        match self {
            Scenario::PostDurable => 100_000,
            Scenario::ReadState | Scenario::MqttQos1 | Scenario::Mixed | Scenario::StartStop => 10_000,
            Scenario::Cache | Scenario::CacheMemory => 20_000,
            Scenario::Activation => 50_000,
            Scenario::Attention => 1,
            Scenario::IdleMemory => 200_000,
        }
    }
}

/// Who decides the turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Engine {
    /// A profile with one rule that always holds, sets a value in the state and replies.
    Reflex,
    /// A profile with the scripted engine and no delay; the state does not change.
    Scripted,
    /// Whatever an unknown instance gets.
    Default,
}

/// How fast operations start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// So many a second, open loop.
    PerSecond(f64),
    /// As many as the server answers, closed loop.
    Max,
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            return Ok(Rate::Max);
        }
        match text.parse::<f64>() {
            Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Rate::PerSecond(rate)),
            _ => Err("a number above 0, or 'max'".into()),
        }
    }
}

/// A process by its id, and what to call it.
fn process(text: &str) -> Result<(String, u32), String> {
    let (name, pid) = text.split_once('=').unwrap_or(("server", text));
    let pid = pid.parse().map_err(|_| format!("'{pid}' is no process id"))?;
    Ok((name.to_owned(), pid))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().map_err(|e| e.to_string())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// Measures a server under load and prints the figures.
///
/// Without --url a server is started on free ports with a temporary data folder, and ended afterwards.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// What to measure.
    #[arg(long, value_enum, default_value = "post-durable")]
    pub scenario: Scenario,
    /// A running server's HTTP address, such as http://127.0.0.1:8080. Repeat for several nodes: connections are spread.
    #[arg(long, value_name = "URL", conflicts_with = "spawn")]
    pub url: Vec<String>,
    /// A running server's or broker's MQTT address. Repeat for several.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:1883")]
    pub mqtt: Vec<String>,
    /// Process of a running server, for its CPU and memory, with those it started. Repeat for several; with a name before
    /// it, such as postgres=4711, its CPU is told apart.
    #[arg(long, value_name = "[NAME=]PID", requires = "url", value_parser = process)]
    pub server_pid: Vec<(String, u32)>,
    /// Start a server for the measurement. The default without --url.
    #[arg(long)]
    pub spawn: bool,
    /// The program to start; this one when absent.
    #[arg(long, value_name = "FILE", conflicts_with = "url")]
    pub program: Option<PathBuf>,
    /// A setting of the started server, section.key=value. Repeat for several.
    #[arg(long, value_name = "SETTING", conflicts_with = "url")]
    pub set: Vec<String>,
    /// Where temporary data folders are made: choose the disk you want to measure. With --url: the server's own folder,
    /// to measure its disk.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Keep the temporary folder and the server's log.
    #[arg(long)]
    pub keep: bool,
    /// Operations a second (open loop), or `max` (closed loop, to find throughput).
    #[arg(long, default_value = "10000")]
    pub rate: Rate,
    /// How arrivals of an open loop are spread.
    #[arg(long, value_enum, default_value = "poisson")]
    pub arrivals: Arrivals,
    /// Connections: over HTTP also the most operations in flight.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub connections: u32,
    /// Most unacknowledged publishes of one MQTT device.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    pub window: u16,
    /// Instances that are spoken to, uniformly.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=9_999_999))]
    pub instances: Option<u64>,
    /// Measured time of one run, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub duration: Duration,
    /// Time before it that does not count, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    pub warmup: Duration,
    /// Size of a request's body or a publish's payload, in bytes; of the state in read-state and idle-memory.
    #[arg(long, value_name = "BYTES")]
    pub payload: Option<usize>,
    /// Who decides the turns.
    #[arg(long, value_enum, default_value = "reflex")]
    pub engine: Engine,
    /// Send a stimulus id with each POST, as a client that may repeat itself does. MQTT always does.
    #[arg(long)]
    pub ids: bool,
    /// Do not subscribe to the replies over MQTT.
    #[arg(long)]
    pub no_replies: bool,
    /// Seed of arrivals and choices.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How often to measure.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub runs: u32,
    /// Generator threads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Longest wait for one answer, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub timeout: Duration,
    /// Afterwards read all turns back and check that each acknowledged stimulus is there once and in order.
    #[arg(long)]
    pub verify: bool,
    /// Write what was sent and answered to this file, for `sophont check-history`.
    #[arg(long, value_name = "FILE")]
    pub history: Option<PathBuf>,
    /// First find the highest rate whose p99 stays within --p99-ms, then measure at it.
    #[arg(long)]
    pub ramp: bool,
    /// The bound of --ramp, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 25.0)]
    pub p99_ms: f64,
    /// Also measure a bare actix-web server in the same run, as the ceiling (read-state, post-durable).
    #[arg(long)]
    pub ceiling: bool,
    /// Bearer token, and password over MQTT.
    #[arg(long, env = "SOPHONT_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// Tenant in MQTT topics.
    #[arg(long, default_value = "default")]
    pub tenant: String,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Compare with a report written earlier.
    #[arg(long, value_name = "FILE")]
    pub compare: Option<PathBuf>,
    /// Size of the first tier in cache and cache-memory, in MiB; that of a running server stays as it is.
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub cache_mb: u64,
    /// In cache: the started server does not hear which states are stale. Needs a build with the feature `faults`.
    #[arg(long, conflicts_with = "url")]
    pub drop_invalidations: bool,
    /// Be the bare server that answers with so many bytes; used by --ceiling.
    #[arg(long, value_name = "BYTES", hide = true)]
    pub serve_ceiling: Option<usize>,
}

impl Args {
    /// Instances, by flag or by scenario.
    pub fn instances(&self) -> u64 {
        self.instances.unwrap_or(self.scenario.default_instances())
    }

    /// Whether each stimulus and its answer are kept.
    pub const fn keeps_log(&self) -> bool {
        self.verify || self.history.is_some()
    }

    /// Connections as a count.
    pub fn connections(&self) -> usize {
        usize::try_from(self.connections).unwrap_or(usize::MAX)
    }

    /// Generator threads as a count.
    pub fn threads(&self) -> usize {
        usize::try_from(self.threads).unwrap_or(1)
    }
}

/// The address in `http://HOST:PORT` (or without the scheme); names are looked up.
///
/// # Errors
/// In words, when it is none or no such host is known.
pub async fn address(url: &str) -> Result<SocketAddr, String> {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("mqtt://")).unwrap_or(url);
    if rest.contains("://") {
        return Err(format!("'{url}': the generator speaks plain http:// and mqtt:// only"));
    }
    let rest = rest.trim_end_matches('/');
    let found = tokio::net::lookup_host(rest).await.map_err(|e| format!("'{url}': {e}"))?.next();
    found.ok_or_else(|| format!("'{url}' has no address"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_number_or_max() {
        assert_eq!("max".parse(), Ok(Rate::Max));
        assert_eq!("1e3".parse(), Ok(Rate::PerSecond(1000.0)));
        for bad in ["0", "-1", "inf", "fast", ""] {
            assert!(bad.parse::<Rate>().is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn addresses_come_with_or_without_a_scheme() {
        for text in ["http://127.0.0.1:80/", "127.0.0.1:80", "mqtt://127.0.0.1:80"] {
            assert_eq!(address(text).await.unwrap(), "127.0.0.1:80".parse().unwrap());
        }
        assert!(address("https://127.0.0.1:80").await.unwrap_err().contains("plain"));
        assert!(address("127.0.0.1").await.is_err());
    }
}
