//! Programs that tests drive: found, run to their end with a deadline, or failed with the command that installs them.

use std::{
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use tokio::{io::AsyncWriteExt, process::Command};

use super::root;

/// Where a program is.
///
/// # Panics
/// When it is not installed: a test that cannot run has failed.
pub fn find(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| file.is_file());
    found.unwrap_or_else(|| panic!("the program `{name}` is not installed: run tests/install"))
}

/// The Python of the tests' own environment, which has paho-mqtt and MCP servers.
///
/// # Panics
/// When the environment was not made.
pub fn python() -> PathBuf {
    let python = root().join("target/test-venv/bin/python");
    assert!(python.is_file(), "there is no {}: run tests/install", python.display());
    python
}

/// Runs a program to its end and returns what it said.
///
/// # Panics
/// When it does not start, or still runs at the deadline (it is killed then).
pub async fn run(command: Command, deadline: Duration) -> Output {
    feed(command, b"", deadline).await
}

/// As [`run`], with standard input.
///
/// # Panics
/// As [`run`].
pub async fn feed(mut command: Command, input: &[u8], deadline: Duration) -> Output {
    let name = format!("{:?}", command.as_std());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut stdin = child.stdin.take().expect("standard input is piped");
    let whole = async {
        // A program that does not read its input closes the pipe; that is its right.
        let _ = stdin.write_all(input).await;
        drop(stdin);
        child.wait_with_output().await.unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    tokio::time::timeout(deadline, whole).await.unwrap_or_else(|_| panic!("{name} still runs after {deadline:?}"))
}

/// As [`run`], and returns standard output.
///
/// # Panics
/// Also when it fails; its standard error is in the message.
pub async fn succeed(command: Command, deadline: Duration) -> String {
    let name = format!("{:?}", command.as_std());
    let output = run(command, deadline).await;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} ended with {}:\n{stderr}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a Python script of `tests/it/paho` with paho-mqtt at hand.
///
/// # Panics
/// As [`succeed`].
pub async fn paho(script: &str, arguments: &[&str], deadline: Duration) -> String {
    let mut command = Command::new(python());
    command.arg(root().join("tests/it/paho").join(script)).args(arguments);
    succeed(command, deadline).await
}
