//! Measures the bus between nodes over a Redis server: messages a second, processor time for a thousand, time there and back.
//!
//! `cargo run --release --example bus -- redis://127.0.0.1:6379 [MESSAGES] [BYTES]`. Both nodes run in this process, so its
//! processor time is that of a sender and a receiver. Linux only.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use sophont::{
    cluster::bus::{
        Bus, Error, Health, Inbound, Inlet, Message,
        message::Relay,
        redis::{Options, RedisBus},
    },
    types::NodeId,
};
use tokio::runtime::Handle;

/// Messages there and back, one after the other.
const ROUNDS: usize = 2_000;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next().expect("the address of a Redis server");
    let mut number = |default: usize| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (count, bytes) = (number(200_000), number(300));
    let (a, mut at_a) = start(&url, "a").await;
    let (b, mut at_b) = start(&url, "b").await;

    let (own, server, began) = (own_seconds(), server_seconds(&url).await, Instant::now());
    let (sender, to) = (a.clone(), b.node().clone());
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        while sent < count {
            match sender.send(&to, &message(bytes)) {
                Ok(()) => sent += 1,
                Err(Error::Overloaded) => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(error) => panic!("{error}"),
            }
        }
    });
    for _ in 0..count {
        next(&mut at_b).await;
    }
    sending.await.unwrap();
    let seconds = began.elapsed().as_secs_f64();
    let thousand = |used: f64| used * 1e6 / count as f64;
    println!("{count} messages of {bytes} bytes in {seconds:.2} s: {:.0} a second", count as f64 / seconds);
    println!(
        "processor time for 1000 messages: both nodes {:.2} ms, Redis {:.2} ms",
        thousand(own_seconds() - own),
        thousand(server_seconds(&url).await - server)
    );

    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let began = Instant::now();
        a.send(b.node(), &message(bytes)).unwrap();
        next(&mut at_b).await;
        b.send(a.node(), &message(bytes)).unwrap();
        next(&mut at_a).await;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    println!(
        "there and back, nothing else under way: median {:?}, 99 of 100 within {:?}",
        times[ROUNDS / 2],
        times[ROUNDS * 99 / 100]
    );
    a.close(Duration::from_secs(5)).await;
    b.close(Duration::from_secs(5)).await;
}

async fn start(url: &str, name: &str) -> (Arc<RedisBus>, Inlet) {
    let options = Options {
        url: url.into(),
        ca: None,
        keys: format!("sophont:measure:{}", std::process::id()),
        timeout: Duration::from_secs(1),
        max_queue: 65_536,
        max_queue_bytes: 64 * 1024 * 1024,
        mailbox_entries: 10_000,
    };
    let (bus, inlet) = RedisBus::start(options, NodeId::generate(name), &Handle::current()).unwrap();
    let began = Instant::now();
    while bus.health() != Health::Up {
        assert!(began.elapsed() < Duration::from_secs(5), "no connection: {:?}", bus.health());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    (bus, inlet)
}

fn message(bytes: usize) -> Message {
    Message::Relay(Relay { kind: "measure".into(), body: vec![7; bytes].into() })
}

async fn next(inlet: &mut Inlet) {
    if let Inbound::Lost { to } = inlet.next().await.expect("the bus is open") {
        panic!("messages to {to:?} were lost");
    }
}

/// Processor time of this process, in seconds.
fn own_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let ticks: f64 =
        stat.rsplit(')').next().unwrap().split_whitespace().skip(11).take(2).map(|n| n.parse::<f64>().unwrap()).sum();
    ticks / 100.0
}

/// Processor time of the server, in seconds.
async fn server_seconds(url: &str) -> f64 {
    let mut connection = redis::Client::open(url).unwrap().get_multiplexed_async_connection().await.unwrap();
    let info: String = redis::cmd("INFO").arg("cpu").query_async(&mut connection).await.unwrap();
    let used =
        info.lines().filter_map(|line| line.strip_prefix("used_cpu_sys:").or(line.strip_prefix("used_cpu_user:")));
    used.map(|seconds| seconds.trim().parse::<f64>().unwrap()).sum()
}
