//! A real Redis server: in memory only, on a port of its own, to be killed, stopped and started again.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::{PATIENCE, free_port, program, tls::Certificates, wait_until};

/// A running (or stopped) server. Dropping it kills the process.
#[derive(Debug)]
pub struct Redis {
    home: TempDir,
    child: Option<Child>,
    address: SocketAddr,
    /// Talks to nobody but over TLS.
    tls: Option<Certificates>,
}

impl Redis {
    /// Starts one and waits until it takes connections.
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// One that talks to nobody but over TLS.
    pub async fn start_over_tls(certificates: &Certificates) -> Self {
        Self::start_with(Some(certificates.clone())).await
    }

    async fn start_with(tls: Option<Certificates>) -> Self {
        let home = TempDir::new().expect("a temporary folder");
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let mut server = Self { home, child: None, address, tls };
        server.start_again().await;
        server
    }

    /// The address of the one that tests share. A watching shell ends it when the test process is gone, however it went.
    pub async fn shared() -> String {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let script = format!(
            "'{}' --bind 127.0.0.1 --port {} --save '' --appendonly no --dir / >/dev/null 2>&1 & cat >/dev/null; kill -9 $!",
            program::find("redis-server").display(),
            address.port()
        );
        let mut watch = std::process::Command::new("/bin/sh");
        watch.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // The pipe stays open as long as this process lives.
        Box::leak(Box::new(watch.spawn().expect("a shell watches")));
        wait_until("the shared redis-server takes connections", PATIENCE, async || {
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
        .await;
        format!("redis://{address}")
    }

    /// Its address; the same after a restart.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "rediss" } else { "redis" }, self.address)
    }

    fn log_file(&self) -> PathBuf {
        self.home.path().join("redis.log")
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    /// Starts a killed server again, on the same port and without what it held.
    pub async fn start_again(&mut self) {
        assert!(self.child.is_none(), "kill the server before it is started again");
        let log = File::options().create(true).append(true).open(self.log_file()).expect("a file for the log");
        let mut command = Command::new(program::find("redis-server"));
        let port = self.address.port().to_string();
        match &self.tls {
            None => command.args(["--port", &port]),
            Some(tls) => {
                let files =
                    [("--tls-cert-file", &tls.cert), ("--tls-key-file", &tls.key), ("--tls-ca-cert-file", &tls.ca)];
                for (name, file) in files {
                    command.arg(name).arg(file);
                }
                command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"])
            }
        };
        let child = command
            .args(["--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(self.home.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the same file"))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .expect("redis-server starts");
        self.child = Some(child);
        let address = self.address;
        wait_until("redis-server takes connections", PATIENCE, async || {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            assert!(ended.is_none(), "redis-server ended with {ended:?}:\n{}", self.log());
            TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
        .await;
    }

    /// Kills it: what it held is gone.
    pub async fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        let mut child = self.child.take().expect("the server runs");
        tokio::time::timeout(PATIENCE, child.wait()).await.expect("the server ends").expect("its exit status");
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the server runs");
        let pid = i32::try_from(child.id().expect("the server runs")).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("the server takes the signal");
    }

    /// Gives it a command and returns what it answers.
    pub async fn command(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(program::find("redis-cli"));
        command.args(["-p", &self.address.port().to_string()]).args(arguments);
        let output = program::run(command, PATIENCE).await;
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the log of redis-server ---\n{}--- end of the log ---", self.log());
        }
    }
}
