//! What tests stand on: a real node, a real broker, real clients, and waiting for named conditions.
//!
//! Invariants: nothing waits without a deadline; nothing sleeps outside [`wait_for`]; every port is free and every folder
//! temporary, so tests run at the same time; a missing program fails the test with the command that installs it.
#![allow(dead_code, unused_imports, reason = "capability files take what they need")]

use std::{
    path::PathBuf,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

pub mod balancer;
pub mod cluster;
pub mod device;
pub mod http;
pub mod load;
pub mod mosquitto;
pub mod node;
pub mod postgres;
pub mod program;
pub mod redis;
pub mod tls;
pub mod truth;

pub use http::{Answer, Http};
pub use mosquitto::Mosquitto;
pub use node::Node;
pub use postgres::Postgres;
pub use truth::About;

/// How long a thing that should be quick may take on a machine busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Asks again and again until there is an answer.
///
/// # Panics
/// When there is none by the deadline; the message names `what`.
pub async fn wait_for<T>(what: &str, deadline: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let started = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(started.elapsed() < deadline, "waited {:?} in vain for: {what}", started.elapsed());
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

/// As [`wait_for`], for a condition.
///
/// # Panics
/// When it does not hold by the deadline.
pub async fn wait_until(what: &str, deadline: Duration, mut holds: impl AsyncFnMut() -> bool) {
    wait_for(what, deadline, async || holds().await.then_some(())).await;
}

/// A port nobody listens on, below the range the system takes for outgoing connections, so that it stays free while a
/// server is stopped and started again. Never the same twice within the test binary.
pub fn free_port() -> u16 {
    const FIRST: u16 = 12_000;
    const COUNT: u16 = 20_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(u64::from(std::process::id()).wrapping_mul(7919) % u64::from(COUNT)).unwrap();
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + u16::try_from((u32::from(start) + u32::from(step)) % u32::from(COUNT)).unwrap();
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between {FIRST} and {}", FIRST + COUNT);
}

/// Taken by a test that opens so many sockets that two of its kind would not fit into the files a process may open.
pub async fn seldom() -> tokio::sync::MutexGuard<'static, ()> {
    static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    ONE.lock().await
}

/// Resident memory of a process, in KiB.
pub fn resident_kb(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line VmRSS");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// The sum of a metric's series on a node's page, or on the pages of all nodes behind a balancer; with labels in braces, the
/// one series.
pub async fn metric(http: &Http, name: &str) -> f64 {
    let value = |line: &str| {
        let rest = line.strip_prefix(name)?;
        (rest.starts_with([' ', '{'])).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok()).flatten()
    };
    let mut sum = 0.0;
    for node in http.each() {
        sum += node.get("/metrics").await.text.lines().filter_map(value).sum::<f64>();
    }
    sum
}

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
