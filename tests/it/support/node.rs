//! A node: the real binary in a process of its own, on free ports and a temporary data folder.
//!
//! With `SOPHONT_TEST_STORE=postgres` in the environment, nodes whose test does not configure the store keep everything in a
//! database instead, one for each data folder.

use std::{
    fs::{self, File, OpenOptions},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::{Http, PATIENCE, free_port, postgres, wait_for};

/// What to start, and how.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    config: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    data_dir: Option<PathBuf>,
    ports: Option<(u16, u16)>,
    no_mqtt: bool,
}

impl Builder {
    /// Adds TOML to the config file.
    pub fn config(mut self, toml: &str) -> Self {
        self.config.push_str(toml);
        self.config.push('\n');
        self
    }

    /// Adds a command line argument after the usual ones.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Uses this data folder, which the caller keeps, in place of a temporary one.
    pub fn data_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(path.into());
        self
    }

    /// Keeps the same ports over restarts, for clients that cannot be told new ones.
    pub fn stable_ports(mut self) -> Self {
        self.ports = Some((free_port(), free_port()));
        self
    }

    /// Does not expect the `mqtt listening on` line: the config turns the embedded listener off.
    pub fn without_mqtt_listener(mut self) -> Self {
        self.no_mqtt = true;
        self
    }

    /// Starts it and waits until it says `ready`.
    ///
    /// # Panics
    /// When it ends or stays silent; its standard error is printed.
    pub async fn start(self) -> Node {
        let home = TempDir::new().expect("a temporary folder");
        let mut node = Node::assemble(self, Arc::new(home));
        node.launch();
        node.until_ready().await;
        node
    }

    /// Starts it without waiting: for starts that must fail.
    pub fn launch(self) -> Node {
        let home = TempDir::new().expect("a temporary folder");
        let mut node = Node::assemble(self, Arc::new(home));
        node.launch();
        node
    }
}

/// A running (or stopped) node. Dropping it kills the process; if the test failed, its log is printed.
#[derive(Debug)]
pub struct Node {
    home: Arc<TempDir>,
    builder: Builder,
    child: Option<Child>,
    http: Option<SocketAddr>,
    mqtt: Option<SocketAddr>,
    started: Instant,
    ready_after: Duration,
}

impl Node {
    /// A node with the defaults.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// A node to be configured.
    pub fn builder() -> Builder {
        Builder::default()
    }

    fn assemble(builder: Builder, home: Arc<TempDir>) -> Self {
        Self {
            home,
            builder,
            child: None,
            http: None,
            mqtt: None,
            started: Instant::now(),
            ready_after: Duration::ZERO,
        }
    }

    /// The address of the HTTP door.
    pub fn http(&self) -> SocketAddr {
        self.http.expect("the node is not ready, so it has no HTTP address")
    }

    /// The address of the MQTT door.
    pub fn mqtt(&self) -> SocketAddr {
        self.mqtt.expect("the node is not ready or has no MQTT listener")
    }

    /// A client of the HTTP door, without a token.
    pub fn client(&self) -> Http {
        Http::new(self.http())
    }

    /// The data folder.
    pub fn data_dir(&self) -> PathBuf {
        self.builder.data_dir.clone().unwrap_or_else(|| self.home.path().join("data"))
    }

    /// A folder for the test's own files, removed with the node.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("the node is not running")
    }

    /// Time from the start of the process until it said `ready`.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// What it wrote to standard error since the first start.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("stderr.log")).unwrap_or_default()
    }

    /// What it wrote to standard output since the last start.
    pub fn stdout(&self) -> String {
        fs::read_to_string(self.home.path().join("stdout.log")).unwrap_or_default()
    }

    /// The arguments that put the store elsewhere, if the environment says so.
    fn database(&self) -> Vec<String> {
        let wanted = std::env::var("SOPHONT_TEST_STORE").is_ok_and(|store| store == "postgres");
        let own = |text: &String| text.contains("store.") || text.contains("[store");
        if !wanted || own(&self.builder.config) || self.builder.arguments.iter().any(own) {
            return Vec::new();
        }
        postgres::arguments(&postgres::database_of(&self.data_dir()))
    }

    fn launch(&mut self) {
        let home = self.home.path();
        let config = home.join("sophont.toml");
        fs::write(&config, &self.builder.config).expect("the config file is written");
        let (http, mqtt) = self.builder.ports.unwrap_or((0, 0));
        let stdout = File::create(home.join("stdout.log")).expect("a file for standard output");
        let stderr = OpenOptions::new().create(true).append(true).open(home.join("stderr.log"));
        self.started = Instant::now();
        let child = Command::new(program())
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--http", &format!("127.0.0.1:{http}"), "--mqtt", &format!("127.0.0.1:{mqtt}")])
            .args(&self.builder.arguments)
            .args(self.database())
            .envs(self.builder.environment.iter().cloned())
            .current_dir(home)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr.expect("a file for standard error"))
            .kill_on_drop(true)
            .spawn()
            .expect("the sophont binary starts");
        (self.http, self.mqtt) = (None, None);
        self.child = Some(child);
    }

    /// Waits for `ready` and takes the addresses.
    ///
    /// # Panics
    /// When it ends first or the deadline passes.
    pub async fn until_ready(&mut self) {
        let stdout = wait_for("the node says `ready`", PATIENCE, async || {
            let stdout = self.stdout();
            if stdout.lines().any(|line| line.trim() == "ready") {
                return Some(stdout);
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "the node ended with {ended:?} before it was ready; it printed:\n{stdout}");
            None
        })
        .await;
        self.ready_after = self.started.elapsed();
        self.http = Some(address(&stdout, "http listening on ").unwrap_or_else(|| {
            panic!("no line `http listening on ADDRESS` before `ready` in:\n{stdout}");
        }));
        self.mqtt = address(&stdout, "mqtt listening on ");
        assert!(
            self.mqtt.is_some() || self.builder.no_mqtt,
            "no line `mqtt listening on ADDRESS` before `ready` in:\n{stdout}"
        );
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("the node takes the signal");
    }

    /// SIGKILL, and waits until it is gone.
    pub async fn kill9(&mut self) {
        self.signal(Signal::SIGKILL);
        self.wait_exit(PATIENCE).await;
    }

    /// SIGTERM: asks it to drain. Does not wait.
    pub fn term(&self) {
        self.signal(Signal::SIGTERM);
    }

    /// Waits until the process ends.
    ///
    /// # Panics
    /// When it still runs at the deadline.
    pub async fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        let child = self.child.as_mut().expect("the node was started");
        let ended = tokio::time::timeout(deadline, child.wait()).await;
        let status = ended.unwrap_or_else(|_| panic!("the node still runs after {deadline:?}"));
        self.child = None;
        status.expect("the node's exit status")
    }

    /// Drains it and starts it again on the same data folder.
    pub async fn restart(&mut self) {
        self.term();
        let status = self.wait_exit(PATIENCE).await;
        assert!(status.success(), "the node drained with {status}");
        self.start_again().await;
    }

    /// Starts a stopped node again on the same data folder.
    pub async fn start_again(&mut self) {
        assert!(self.child.is_none(), "stop the node before it is started again");
        self.launch();
        self.until_ready().await;
    }

    /// Starts a stopped node and kills it before it is ready: at once, or as soon as it printed a line.
    pub async fn start_and_kill_early(&mut self, at_once: bool) {
        assert!(self.child.is_none(), "stop the node before it is started again");
        self.launch();
        if !at_once {
            wait_for("the node prints a line or ends", PATIENCE, async || {
                let ended = self.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
                (ended || !self.stdout().is_empty()).then_some(())
            })
            .await;
        }
        self.kill9().await;
    }

    /// Changes how a stopped node will be started.
    pub fn reconfigure(&mut self, change: impl FnOnce(Builder) -> Builder) {
        let builder = std::mem::take(&mut self.builder);
        self.builder = change(Builder { config: String::new(), ..builder });
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(200).collect();
            eprintln!("--- the node's log, last {} lines ---", tail.len());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
            eprintln!("--- end of the node's log ---");
        }
    }
}

/// The program under test: the one that was built with the tests, or another (`SOPHONT_TEST_PROGRAM`), to measure a release
/// build or to judge an older one.
pub fn program() -> PathBuf {
    std::env::var_os("SOPHONT_TEST_PROGRAM").map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_sophont")), PathBuf::from)
}

fn address(stdout: &str, before: &str) -> Option<SocketAddr> {
    stdout.lines().find_map(|line| line.trim().strip_prefix(before)?.trim().parse().ok())
}

/// Runs the binary to its end: for `config check`, `inspect` and the like.
///
/// # Panics
/// When it does not end by the deadline.
pub async fn run(arguments: &[&str]) -> std::process::Output {
    let child = Command::new(program()).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let ended = tokio::time::timeout(PATIENCE, child).await;
    ended.unwrap_or_else(|_| panic!("sophont {arguments:?} did not end")).expect("sophont runs")
}
