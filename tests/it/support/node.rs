//! A node: the real binary in a process of its own, on free ports and a temporary data folder.
//!
//! As `SOPHONT_TEST_STORE` says (`truth`), one whose test does not configure the store keeps everything in a database instead,
//! one for each data folder, or is three processes behind a balancer, which are started, told and killed together.

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

use super::{
    Http, PATIENCE,
    balancer::Balancer,
    free_port, postgres,
    truth::{About, Cluster, Truth, database},
    wait_for, wait_until,
};

/// What to start, and how.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    config: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    data_dir: Option<PathBuf>,
    ports: Option<(u16, u16)>,
    no_mqtt: bool,
    program: Option<PathBuf>,
    about: Option<About>,
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

    /// Takes an environment variable back.
    pub fn without_env(mut self, name: &str) -> Self {
        self.environment.retain(|(other, _)| other != name);
        self
    }

    /// Runs another build; `None` is the one under test.
    pub fn program(mut self, path: Option<PathBuf>) -> Self {
        self.program = path;
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

    /// Says why the test is not about every store.
    pub fn about(mut self, about: About) -> Self {
        self.about = Some(about);
        self
    }

    /// Whether the test puts the store where it wants it.
    fn has_store(&self) -> bool {
        let own = |text: &String| text.contains("store.") || text.contains("[store");
        own(&self.config) || self.arguments.iter().any(own)
    }

    fn truth(&self) -> Truth {
        if self.has_store() { Truth::Sqlite } else { Truth::of(self.about) }
    }

    /// Starts it and waits until it says `ready`.
    ///
    /// # Panics
    /// When it ends or stays silent; its standard error is printed.
    pub async fn start(self) -> Node {
        let mut node = Node::assemble(self);
        node.launch_all().await;
        node.until_ready().await;
        node
    }

    /// Starts it without waiting: for starts that must fail. One process, whatever store is asked for.
    pub fn launch(mut self) -> Node {
        self.about.get_or_insert(About::Process);
        let mut node = Node::assemble(self);
        node.launch(0);
        node
    }
}

/// A running (or stopped) node. Dropping it kills the process; if the test failed, its log is printed.
#[derive(Debug)]
pub struct Node {
    home: Arc<TempDir>,
    builder: Builder,
    processes: Vec<Process>,
    /// What several processes have in common.
    cluster: Option<Cluster>,
    /// The doors of several processes: HTTP and MQTT.
    front: Option<(Balancer, Balancer)>,
    started: Instant,
    ready_after: Duration,
}

/// One process of a node.
#[derive(Debug, Default)]
struct Process {
    child: Option<Child>,
    http: Option<SocketAddr>,
    mqtt: Option<SocketAddr>,
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

    fn assemble(builder: Builder) -> Self {
        let count = builder.truth().nodes();
        Self {
            home: Arc::new(TempDir::new().expect("a temporary folder")),
            builder,
            processes: (0..count).map(|_| Process::default()).collect(),
            cluster: None,
            front: (count > 1).then(|| (Balancer::start(), Balancer::start())),
            started: Instant::now(),
            ready_after: Duration::ZERO,
        }
    }

    /// How it was started, for another one beside it: the same settings, a home and ports of its own.
    pub fn twin(&self) -> Builder {
        Builder { ports: None, ..self.builder.clone() }
    }

    /// The address of the HTTP door.
    pub fn http(&self) -> SocketAddr {
        let front = self.front.as_ref().map(|(http, _)| http.address());
        front.or(self.processes[0].http).expect("the node is not ready, so it has no HTTP address")
    }

    /// The address of the MQTT door.
    pub fn mqtt(&self) -> SocketAddr {
        let front = self.front.as_ref().map(|(_, mqtt)| mqtt.address());
        front.or(self.processes[0].mqtt).expect("the node is not ready or has no MQTT listener")
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

    /// The arguments with which a program reads what this node has stored, without the node.
    pub fn stored(&self) -> [String; 2] {
        let path = |path: PathBuf| path.to_str().expect("a path in UTF-8").to_owned();
        if self.builder.truth() == Truth::Sqlite {
            return [String::from("--data-dir"), path(self.data_dir())];
        }
        let file = self.home.path().join("stored.toml");
        let url = postgres::database_of(&self.data_dir());
        let config = format!("[store]\nbackend = \"postgres\"\n[store.postgres]\nurl = \"{url}\"\n");
        let shards = self.cluster.as_ref().map(|_| format!("[cluster]\nshards = {}\n", Cluster::SHARDS));
        fs::write(&file, config + &shards.unwrap_or_default()).expect("a config file is written");
        [String::from("--config"), path(file)]
    }

    /// The process id; of several, the first one's.
    pub fn pid(&self) -> u32 {
        self.processes[0].child.as_ref().and_then(Child::id).expect("the node is not running")
    }

    /// Time from the start of the process until it said `ready`.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    fn file(&self, process: usize, name: &str) -> PathBuf {
        self.home.path().join(if process == 0 { name.to_owned() } else { format!("{process}-{name}") })
    }

    fn read(&self, process: usize, name: &str) -> String {
        fs::read_to_string(self.file(process, name)).unwrap_or_default()
    }

    /// What it wrote to standard error since the first start.
    pub fn log(&self) -> String {
        (0..self.processes.len()).map(|process| self.read(process, "stderr.log")).collect()
    }

    /// What it wrote to standard output since the last start; of several processes, the first one.
    pub fn stdout(&self) -> String {
        self.read(0, "stdout.log")
    }

    async fn launch_all(&mut self) {
        if self.processes.len() > 1 && self.cluster.is_none() {
            self.cluster = Some(Cluster::new().await);
        }
        self.started = Instant::now();
        (0..self.processes.len()).for_each(|process| self.launch(process));
    }

    fn launch(&mut self, process: usize) {
        let home = self.home.path();
        let config = home.join("sophont.toml");
        if process == 0 {
            // Once: another process may be reading it by now.
            fs::write(&config, &self.builder.config).expect("the config file is written");
        }
        let ports = self.builder.ports.filter(|_| self.processes.len() == 1);
        let (http, mqtt) = ports.unwrap_or((0, 0));
        let stdout = File::create(self.file(process, "stdout.log")).expect("a file for standard output");
        let stderr = OpenOptions::new().create(true).append(true).open(self.file(process, "stderr.log"));
        let truth = self.builder.truth();
        let mut arguments = Vec::new();
        if truth != Truth::Sqlite {
            arguments = database(&postgres::database_of(&self.data_dir()), truth);
        }
        arguments.extend(self.cluster.iter().flat_map(|cluster| cluster.arguments(process)));
        let child = Command::new(self.builder.program.clone().unwrap_or_else(program))
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(self.data_dir())
            .args(["--http", &format!("127.0.0.1:{http}"), "--mqtt", &format!("127.0.0.1:{mqtt}")])
            .args(&self.builder.arguments)
            .args(arguments)
            .envs(self.builder.environment.iter().cloned())
            .current_dir(home)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr.expect("a file for standard error"))
            .kill_on_drop(true)
            .spawn()
            .expect("the sophont binary starts");
        self.processes[process] = Process { child: Some(child), http: None, mqtt: None };
    }

    /// Waits for `ready` and takes the addresses.
    ///
    /// # Panics
    /// When it ends first or the deadline passes.
    pub async fn until_ready(&mut self) {
        for process in 0..self.processes.len() {
            self.until_one_is_ready(process).await;
        }
        self.ready_after = self.started.elapsed();
        if let Some((http, mqtt)) = &self.front {
            http.set(self.processes.iter().filter_map(|process| process.http).collect());
            mqtt.set(self.processes.iter().filter_map(|process| process.mqtt).collect());
            self.until_shared_out().await;
        }
    }

    async fn until_one_is_ready(&mut self, number: usize) {
        let stdout = wait_for("the node says `ready`", PATIENCE, async || {
            let stdout = self.read(number, "stdout.log");
            if stdout.lines().any(|line| line.trim() == "ready") {
                return Some(stdout);
            }
            let ended = self.processes[number].child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "the node ended with {ended:?} before it was ready; it printed:\n{stdout}");
            None
        })
        .await;
        let http = address(&stdout, "http listening on ").unwrap_or_else(|| {
            panic!("no line `http listening on ADDRESS` before `ready` in:\n{stdout}");
        });
        let mqtt = address(&stdout, "mqtt listening on ");
        assert!(
            mqtt.is_some() || self.builder.no_mqtt,
            "no line `mqtt listening on ADDRESS` before `ready` in:\n{stdout}"
        );
        let process = &mut self.processes[number];
        (process.http, process.mqtt) = (Some(http), mqtt);
    }

    /// Each process owns its share of the shards, and those of an earlier life own none.
    async fn until_shared_out(&self) {
        let least = Cluster::SHARDS / self.processes.len() as u64 - 1;
        let client = postgres::connect(&postgres::database_of(&self.data_dir())).await;
        wait_until("each process owns its share", PATIENCE, async || {
            let rows = client.query("SELECT count(*) FROM shards GROUP BY node", &[]).await.unwrap_or_default();
            let owned: Vec<u64> = rows.iter().map(|row| row.get::<_, i64>(0).unsigned_abs()).collect();
            owned.len() == self.processes.len() && owned.iter().all(|owned| *owned >= least)
        })
        .await;
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        for process in &self.processes {
            let pid = process.child.as_ref().and_then(Child::id).expect("the node is not running");
            let pid = i32::try_from(pid).expect("a process id");
            kill(Pid::from_raw(pid), signal).expect("the node takes the signal");
        }
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

    /// Waits until the process ends; of several, all of them: the status of one that failed, if any did.
    ///
    /// # Panics
    /// When it still runs at the deadline.
    pub async fn wait_exit(&mut self, deadline: Duration) -> ExitStatus {
        let until = tokio::time::Instant::now() + deadline;
        let mut all = Vec::new();
        for process in &mut self.processes {
            let child = process.child.as_mut().expect("the node was started");
            let ended = tokio::time::timeout_at(until, child.wait()).await;
            let status = ended.unwrap_or_else(|_| panic!("the node still runs after {deadline:?}"));
            process.child = None;
            all.push(status.expect("the node's exit status"));
        }
        all.iter().find(|status| !status.success()).copied().unwrap_or(all[0])
    }

    /// Drains it and starts it again on the same data folder.
    pub async fn restart(&mut self) {
        self.term();
        let status = self.wait_exit(PATIENCE).await;
        assert!(status.success(), "the node drained with {status}");
        self.start_again().await;
    }

    fn assert_stopped(&self) {
        let runs = self.processes.iter().any(|process| process.child.is_some());
        assert!(!runs, "stop the node before it is started again");
    }

    /// Starts a stopped node again on the same data folder.
    pub async fn start_again(&mut self) {
        self.assert_stopped();
        self.launch_all().await;
        self.until_ready().await;
    }

    /// Starts a stopped node and kills it before it is ready: at once, or as soon as it printed a line.
    pub async fn start_and_kill_early(&mut self, at_once: bool) {
        self.assert_stopped();
        self.launch_all().await;
        if !at_once {
            wait_for("the node prints a line or ends", PATIENCE, async || {
                let child = self.processes[0].child.as_mut();
                let ended = child.is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
                (ended || !self.stdout().is_empty()).then_some(())
            })
            .await;
        }
        self.kill9().await;
    }

    /// Changes how a stopped node will be started, but for the config file.
    pub fn change(&mut self, change: impl FnOnce(Builder) -> Builder) {
        self.assert_stopped();
        self.builder = change(std::mem::take(&mut self.builder));
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
