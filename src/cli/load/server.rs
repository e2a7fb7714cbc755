//! The server under load: one that runs already, or one started for the purpose on free ports with a temporary folder.
//!
//! Invariants: a server started here is ended here, whatever happens (it is killed when its handle is dropped), and its
//! folder is removed unless it was asked for by name.

use std::{
    ffi::OsString,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::{Error, machine::Group, wire::http::Connection};

/// Longest wait for a server to be ready.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Recipe {
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
}

/// A server started here.
#[derive(Debug)]
pub struct Server {
    child: Child,
    /// Its process id.
    pub pid: u32,
    /// Its HTTP address.
    pub http: SocketAddr,
    /// Its MQTT address, when it listens.
    pub mqtt: Option<SocketAddr>,
    /// From the start of the process to `ready`.
    pub ready_in: Duration,
}

impl Recipe {
    /// A node with its data in a folder and some settings, `section.key=value`.
    pub fn node(program: PathBuf, data_dir: &Path, sets: &[String]) -> Self {
        let fixed = ["serve", "--http", "127.0.0.1:0", "--mqtt", "127.0.0.1:0", "--data-dir"];
        let mut arguments: Vec<OsString> = fixed.iter().map(OsString::from).collect();
        arguments.push(data_dir.into());
        arguments.extend(sets.iter().flat_map(|set| ["--set".into(), OsString::from(set)]));
        Self { program, arguments, log: data_dir.with_extension("log") }
    }

    /// A bare server that answers with so many bytes.
    pub fn ceiling(program: PathBuf, log: PathBuf, bytes: usize) -> Self {
        Self { program, arguments: vec!["load".into(), format!("--serve-ceiling={bytes}").into()], log }
    }

    /// Starts the server and waits until it serves.
    ///
    /// # Errors
    /// When it cannot be started, ends early, or is not ready in time; with the end of its log.
    pub async fn start(&self) -> Result<Server, Error> {
        let log = std::fs::File::create(&self.log).map_err(|e| Error::io("creating the server's log", e))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        // A group of its own: Ctrl-C is for the generator, which then ends the server in order.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).kill_on_drop(true).process_group(0);
        let begin = Instant::now();
        let mut child = command.spawn().map_err(|e| Error::io(format!("starting {}", self.program.display()), e))?;
        let ready = tokio::time::timeout(START_DEADLINE, await_ready(&mut child)).await;
        let ready_in = begin.elapsed();
        match ready {
            Ok(Ok((http, mqtt))) => {
                let pid = child.id().unwrap_or(0);
                Ok(Server { child, pid, http, mqtt, ready_in })
            }
            Ok(Err(what)) => Err(Error::Server(format!("{what}; the end of its log:\n{}", tail(&self.log)))),
            Err(_) => Err(Error::Server(format!("not ready within {START_DEADLINE:?}; see {}", self.log.display()))),
        }
    }
}

async fn await_ready(child: &mut Child) -> Result<(SocketAddr, Option<SocketAddr>), String> {
    let stdout = child.stdout.take().ok_or("the server has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let mut seen = Ready::default();
    loop {
        match lines.next_line().await {
            Ok(Some(line)) => {
                if seen.take(&line) {
                    break;
                }
            }
            Ok(None) => return Err("the server ended before it was ready".into()),
            Err(error) => return Err(format!("reading the server's output: {error}")),
        }
    }
    // What it prints later must go somewhere, or it would block.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let http = seen.http.ok_or("the server printed no HTTP address")?;
    Ok((http, seen.mqtt))
}

/// What the start-up lines said so far.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ready {
    http: Option<SocketAddr>,
    mqtt: Option<SocketAddr>,
}

impl Ready {
    /// Takes a line; whether it is the last one.
    fn take(&mut self, line: &str) -> bool {
        let line = line.trim();
        if let Some(addr) = line.strip_prefix("http listening on ") {
            self.http = addr.trim().parse().ok();
        } else if let Some(addr) = line.strip_prefix("mqtt listening on ") {
            self.mqtt = addr.trim().parse().ok();
        }
        line == "ready"
    }
}

fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(20).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

impl Server {
    /// Its process, to be measured.
    pub fn group(&self) -> Group {
        Group { name: "server".into(), pids: vec![self.pid] }
    }

    /// Asks the server to stop; how long it took.
    ///
    /// # Errors
    /// When it does not end within the limit (it is killed then), or not in order.
    pub async fn stop(&mut self, limit: Duration) -> Result<Duration, Error> {
        let begin = Instant::now();
        let pid = i32::try_from(self.pid).map_err(|_| Error::Server("no process id".into()))?;
        kill(Pid::from_raw(pid), Signal::SIGTERM).map_err(|e| Error::io("stopping the server", io::Error::from(e)))?;
        match tokio::time::timeout(limit, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(begin.elapsed()),
            Ok(Ok(status)) => Err(Error::Server(format!("the server ended with {status}"))),
            Ok(Err(error)) => Err(Error::io("waiting for the server's end", error)),
            Err(_) => {
                let _ = self.child.kill().await;
                Err(Error::Server(format!("the server did not end within {limit:?} of SIGTERM and was killed")))
            }
        }
    }
}

/// A folder that goes away.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Folder {
    /// A new folder below `base`, or below the system's temporary folder.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new(base: Option<&Path>, keep: bool) -> Result<Self, Error> {
        let base = base.map_or_else(std::env::temp_dir, Path::to_path_buf);
        let path = base.join(format!("sophont-load-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(|e| Error::io(format!("creating {}", path.display()), e))?;
        Ok(Self { path, keep })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// The sum of a metric's samples on the server's Prometheus page; `None` when there is none.
///
/// # Errors
/// When the page cannot be read.
pub async fn metric(addr: SocketAddr, name: &str) -> Result<Option<f64>, Error> {
    let failed = |e| Error::io("reading /metrics", e);
    let mut connection = Connection::connect(addr).await.map_err(failed)?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {addr}\r\n\r\n");
    let answer = connection.exchange(request.as_bytes()).await.map_err(failed)?;
    Ok(sum_metric(&String::from_utf8_lossy(answer.body), name))
}

fn sum_metric(page: &str, name: &str) -> Option<f64> {
    let samples = page.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = match rest.strip_prefix('{') {
            Some(labels) => labels.rsplit_once('}')?.1,
            None => rest,
        };
        rest.strip_prefix(' ')?.split(' ').next()?.parse::<f64>().ok()
    });
    samples.fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn start_up_lines_are_read_in_any_order() {
        let mut ready = Ready::default();
        assert!(!ready.take("mqtt listening on 127.0.0.1:1883"));
        assert!(!ready.take("something else"));
        assert!(!ready.take("http listening on 127.0.0.1:8080\r"));
        assert!(ready.take("ready"));
        assert_eq!(ready.http, Some("127.0.0.1:8080".parse().unwrap()));
        assert_eq!(ready.mqtt, Some("127.0.0.1:1883".parse().unwrap()));
    }

    #[test]
    fn samples_of_a_metric_are_summed() {
        let page = "# HELP a x\na{k=\"v}\"} 2\na{k=\"w\"} 3.5 1700000000\na_total 9\nb 1\n";
        assert_eq!(sum_metric(page, "a"), Some(5.5));
        assert_eq!(sum_metric(page, "b"), Some(1.0));
        assert_eq!(sum_metric(page, "c"), None);
    }

    #[test]
    fn a_folder_goes_away_unless_kept() {
        let base = tempfile::tempdir().unwrap();
        let folder = Folder::new(Some(base.path()), false).unwrap();
        let path = folder.path().to_path_buf();
        assert!(path.is_dir());
        drop(folder);
        assert!(!path.exists());
        drop(Folder::new(Some(base.path()), true).unwrap());
        assert!(path.exists());
    }
}
