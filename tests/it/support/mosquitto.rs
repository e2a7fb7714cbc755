//! A real Mosquitto: the external broker, and its two command line clients.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::{PATIENCE, free_port, program, tls::Certificates, wait_until};

/// What to start.
#[derive(Debug, Clone, Default)]
pub struct Builder {
    lines: String,
    tls: bool,
    password: Option<(String, String)>,
}

impl Builder {
    /// Adds lines to its configuration.
    pub fn config(mut self, lines: &str) -> Self {
        self.lines.push_str(lines);
        self.lines.push('\n');
        self
    }

    /// Also listens with TLS, with certificates made for it.
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    /// Lets nobody in but this user.
    pub fn password(mut self, user: &str, password: &str) -> Self {
        self.password = Some((user.into(), password.into()));
        self
    }

    /// Starts it and waits until it takes connections.
    pub async fn start(self) -> Mosquitto {
        let home = TempDir::new().expect("a temporary folder");
        let certificates = if self.tls { Some(Certificates::make(home.path()).await) } else { None };
        // Started by root it would become another user, who cannot read the folder; started by others it ignores the line.
        let mut config = format!(
            "per_listener_settings false\nuser root\npersistence true\npersistence_location {}/\nlog_type all\n\
             connection_messages true\n",
            home.path().display()
        );
        match &self.password {
            None => config.push_str("allow_anonymous true\n"),
            Some((user, password)) => {
                let file = home.path().join("passwords");
                let mut command = Command::new(program::find("mosquitto_passwd"));
                command.arg("-b").arg("-c").arg(&file).args([user, password]);
                program::succeed(command, PATIENCE).await;
                config.push_str(&format!("allow_anonymous false\npassword_file {}\n", file.display()));
            }
        }
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        config.push_str(&format!("{}\nlistener {} 127.0.0.1\n", self.lines, address.port()));
        let tls_address = certificates.as_ref().map(|files| {
            let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
            let (cert, key, ca) = (files.cert.display(), files.key.display(), files.ca.display());
            config.push_str(&format!("listener {} 127.0.0.1\n", address.port()));
            config.push_str(&format!("certfile {cert}\nkeyfile {key}\ncafile {ca}\n"));
            address
        });
        fs::write(home.path().join("mosquitto.conf"), config).expect("the broker's configuration is written");
        let mut broker = Mosquitto { home, child: None, address, tls_address, certificates };
        broker.start_again().await;
        broker
    }
}

/// A running (or stopped) broker. Dropping it kills the process.
#[derive(Debug)]
pub struct Mosquitto {
    home: TempDir,
    child: Option<Child>,
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    certificates: Option<Certificates>,
}

impl Mosquitto {
    /// A broker without TLS that lets everybody in.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// A broker to be configured.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Its address; the same after a restart.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address with TLS.
    pub fn tls_address(&self) -> SocketAddr {
        self.tls_address.expect("the broker was started with tls()")
    }

    /// The certificates it serves TLS with.
    pub fn certificates(&self) -> &Certificates {
        self.certificates.as_ref().expect("the broker was started with tls()")
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.home.path().join("mosquitto.log")
    }

    /// Starts a stopped broker again, on the same ports and with what it kept.
    pub async fn start_again(&mut self) {
        assert!(self.child.is_none(), "stop the broker before it is started again");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("a file for the broker's log");
        let child = Command::new(program::find("mosquitto"))
            .arg("-c")
            .arg(self.home.path().join("mosquitto.conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the same file"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("mosquitto starts");
        self.child = Some(child);
        let address = self.address;
        wait_until("mosquitto takes connections", PATIENCE, async || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "mosquitto ended with {ended:?}:\n{}", self.log());
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
        .await;
    }

    /// Sends it a signal and does not wait for anything.
    pub fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().and_then(Child::id).expect("the broker runs");
        kill(Pid::from_raw(i32::try_from(pid).expect("a process id")), signal).expect("the broker takes the signal");
    }

    /// Stops it; with SIGTERM it saves what it keeps, with SIGKILL it does not.
    pub async fn stop(&mut self, signal: Signal) {
        self.signal(signal);
        let mut child = self.child.take().expect("the broker runs");
        let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
        ended.expect("the broker ends").expect("its exit status");
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the broker's log ---\n{}--- end of the broker's log ---", self.log());
        }
    }
}

/// Runs `mosquitto_pub` against a broker or node.
pub async fn publish(to: SocketAddr, arguments: &[&str]) -> Output {
    let mut command = Command::new(program::find("mosquitto_pub"));
    command.args(of(to)).args(arguments);
    program::run(command, PATIENCE).await
}

/// A `mosquitto_sub` in the background whose lines are collected in a file. Dropping it ends it.
#[derive(Debug)]
pub struct Subscriber {
    _child: Child,
    _home: TempDir,
    lines: PathBuf,
    errors: PathBuf,
}

impl Subscriber {
    /// Starts it and waits until the broker granted every subscription (one per `-t` in `arguments`).
    pub async fn start(to: SocketAddr, arguments: &[&str]) -> Self {
        let home = TempDir::new().expect("a temporary folder");
        let (lines, errors) = (home.path().join("lines"), home.path().join("errors"));
        // Into a file it would write only full buffers: lines are wanted as they come.
        let mut command = Command::new(program::find("stdbuf"));
        command.arg("-oL").arg(program::find("mosquitto_sub")).args(of(to)).args(arguments);
        command.arg("-d").kill_on_drop(true).stdin(Stdio::null());
        command.stdout(File::create(&lines).expect("a file")).stderr(File::create(&errors).expect("a file"));
        let child = command.spawn().expect("mosquitto_sub starts");
        let subscriber = Self { _child: child, _home: home, lines, errors };
        wait_until("mosquitto_sub is subscribed", PATIENCE, async || {
            subscriber.raw().lines().any(|line| line.starts_with("Subscribed"))
        })
        .await;
        subscriber
    }

    fn raw(&self) -> String {
        read(&self.lines)
    }

    /// The messages so far, one a line in the format that was asked for; the client's own debug lines are left out.
    pub fn messages(&self) -> Vec<String> {
        let own = |line: &&str| !line.starts_with("Client ") && !line.starts_with("Subscribed");
        self.raw().lines().filter(own).map(String::from).collect()
    }

    /// Waits until there are at least `count` messages, and returns them.
    pub async fn wait(&self, count: usize) -> Vec<String> {
        let what = format!("{count} messages at mosquitto_sub; so far {:?}{}", self.messages(), read(&self.errors));
        super::wait_for(&what, PATIENCE, async || Some(self.messages()).filter(|messages| messages.len() >= count))
            .await
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn of(to: SocketAddr) -> [String; 4] {
    ["-h".into(), to.ip().to_string(), "-p".into(), to.port().to_string()]
}
