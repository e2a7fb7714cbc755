//! The process of an MCP server: what it is given, what it last said on its standard error, and its end.
//!
//! Invariant: what it started (`npx`, `uvx` and shells start the server proper) ends with it. It leads a group of its own, which is
//! killed as one; and whatever left that group (`setsid`, daemons) is known by a mark in its environment, which children inherit.
//! What leaves the group and wipes its environment, both, stays.

use std::{
    fs,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use tokio::{
    io::AsyncReadExt as _,
    process::{Child, ChildStderr, ChildStdin, ChildStdout, Command},
};

use crate::config::tools::McpServer;

/// Variables every server gets.
const COMMON: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
/// The variable that marks what belongs to a server, with a value of its own for each start.
const MARK: &str = "SOPHONT_SERVER";
/// Most looks for what is marked: what is about to be killed may just have started something.
const LOOKS: usize = 8;
/// How much of its standard error is kept, in bytes.
const LAST_WORDS: usize = 2048;

/// A running server. Dropping it kills it with all of its group.
pub(super) struct Process {
    child: Child,
    mark: String,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Process {
    pub(super) fn start(settings: &McpServer) -> Result<Self, String> {
        let mark = uuid::Uuid::new_v4().simple().to_string();
        let mut command = Command::new(&settings.command);
        let passed = COMMON.iter().copied().chain(settings.pass_env.iter().map(String::as_str));
        let passed = passed.filter_map(|name| Some((name, std::env::var_os(name)?)));
        command
            .args(&settings.args)
            .env_clear()
            .envs(passed)
            .envs(&settings.env)
            .env(MARK, &mark)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut child = command.spawn().map_err(|error| format!("{} cannot be started: {error}", settings.command))?;
        let said = Arc::new(Mutex::new(Vec::new()));
        if let Some(errors) = child.stderr.take() {
            tokio::spawn(listen(errors, said.clone()));
        }
        Ok(Self { child, mark, said })
    }

    /// Its standard output and input, once.
    pub(super) fn pipes(&mut self) -> Result<(ChildStdout, ChildStdin), String> {
        self.child.stdout.take().zip(self.child.stdin.take()).ok_or_else(|| String::from("it has no pipes"))
    }

    /// Ends it and what it started, at once. Nobody waits for the process before it is dropped, so until then no other group
    /// can have its number.
    pub(super) fn kill(&self) {
        let group = self.child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(group) = group {
            // An error means that nothing of it is left.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        for _ in 0..LOOKS {
            let left = marked(&self.mark);
            if left.is_empty() {
                return;
            }
            for process in left {
                let _ = kill(process, Signal::SIGKILL);
            }
        }
    }

    /// What it last said on its standard error.
    pub(super) fn last_words(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Processes with this mark, as far as the system tells: none where there is no `/proc`. Takes some microseconds a process.
fn marked(mark: &str) -> Vec<Pid> {
    let entry = format!("{MARK}={mark}");
    let has = |environment: Vec<u8>| environment.split(|byte| *byte == 0).any(|one| one == entry.as_bytes());
    let all = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let numbers = all.filter_map(|found| found.file_name().to_str()?.parse::<i32>().ok());
    let marked = numbers.filter(|number| fs::read(format!("/proc/{number}/environ")).is_ok_and(has));
    marked.map(Pid::from_raw).collect()
}

async fn listen(mut errors: ChildStderr, said: Arc<Mutex<Vec<u8>>>) {
    let mut piece = [0; 1024];
    while let Ok(read @ 1..) = errors.read(&mut piece).await {
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        said.extend_from_slice(&piece[..read]);
        let over = said.len().saturating_sub(LAST_WORDS);
        said.drain(..over);
    }
}
