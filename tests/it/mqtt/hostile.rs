//! Crowds and bad company at the MQTT door of a real node: flat memory, a healthy neighbour, an end for those who hang.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::raw::{Hello, Raw};
use crate::support::{About, Node, PATIENCE, metric, resident_kb, seldom, wait_until};

const TOPIC: &str = "sophont/default/neighbour/in/chat";

/// A device that says something and gets its ack and its answer.
async fn is_well(device: &mut Raw, id: u16) {
    device.publish(TOPIC, "are you well?", 1, id).await;
    let (mut is_acked, mut is_answered) = (false, false);
    while !(is_acked && is_answered) {
        let (first, body) = device.packet().await.expect("the neighbour stays connected");
        match first & 0xf0 {
            0x40 => is_acked = body[..2] == id.to_be_bytes(),
            0x30 => is_answered = String::from_utf8_lossy(&body).contains("out/reply"),
            other => panic!("{other:#x}"),
        }
    }
}

async fn neighbour(node: &Node) -> Raw {
    let (mut device, _) = Raw::connect(node.mqtt(), Hello::v5("neighbour")).await;
    device.subscribe("sophont/default/neighbour/out/reply", 0).await;
    is_well(&mut device, 1).await;
    device
}

#[tokio::test]
async fn ten_thousand_idle_connections_cost_little_each_and_nobody_notices() {
    const HALF: usize = 5_000;
    let _alone = seldom().await;
    let node = Node::builder().about(About::Process).start().await;
    let mut device = neighbour(&node).await;
    let mut idle = Vec::with_capacity(2 * HALF);
    let mut resident = vec![resident_kb(node.pid())];
    for half in 0..2 {
        for number in 0..HALF {
            let client = format!("idle-{half}-{number}");
            // Half of them speak MQTT 5, a few keep their session, as devices do.
            let hello = if number % 2 == 0 { Hello::v5(&client) } else { Hello::v3(&client) };
            let hello = if number % 10 == 0 { hello.lasting() } else { hello };
            idle.push(Raw::connect(node.mqtt(), hello).await.0);
        }
        for id in 2..22 {
            is_well(&mut device, id).await;
        }
        resident.push(resident_kb(node.pid()));
    }
    assert_eq!(metric(&node.client(), "sophont_mqtt_connections").await, 10_001.0);
    let grown = [resident[1].saturating_sub(resident[0]), resident[2].saturating_sub(resident[1])];
    println!("{HALF} idle connections hold {} KiB, {HALF} more {} KiB", grown[0], grown[1]);
    assert!(grown[1] < HALF as u64 * 16, "{HALF} more idle connections hold {} KiB", grown[1]);
    drop(idle);
    wait_until("their places are free again", PATIENCE, async || {
        metric(&node.client(), "sophont_mqtt_connections").await == 1.0
    })
    .await;
    is_well(&mut device, 22).await;
}

/// Reads to the end of the stream.
async fn ended(name: &str, stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let end = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    assert!(end.is_ok(), "{name}: still open");
    rest
}

#[tokio::test]
async fn who_never_says_who_it_is_or_falls_silent_is_let_go() {
    let node = Node::start().await;
    let mut device = neighbour(&node).await;
    let connect = Hello::v5("slow").packet();
    // Never a byte; the first half of a CONNECT and nothing more; a byte now and then, for ever.
    let mut silent = TcpStream::connect(node.mqtt()).await.unwrap();
    let mut half = TcpStream::connect(node.mqtt()).await.unwrap();
    half.write_all(&connect[..connect.len() / 2]).await.unwrap();
    let (mut slow, mut dripping) = TcpStream::connect(node.mqtt()).await.unwrap().into_split();
    let drip = tokio::spawn(async move {
        let mut pace = tokio::time::interval(std::time::Duration::from_millis(500));
        // A string's length says 65535: it would never be whole.
        for byte in [0x10, 0xff, 0xff, 0x7f, 0, 4].into_iter().chain(std::iter::repeat(b'M')) {
            pace.tick().await;
            if dripping.write_all(&[byte]).await.is_err() {
                break;
            }
        }
    });
    // Let in, with a keep-alive of a second, and not heard of again; with half a packet, too.
    let mut quiet = Raw::connect(node.mqtt(), Hello { keep_alive: 1, ..Hello::v5("quiet") }).await.0;
    let mut stuck = Raw::connect(node.mqtt(), Hello { keep_alive: 1, ..Hello::v5("stuck") }).await.0;
    stuck.send(&[0x30, 0x7f, 0]).await;
    is_well(&mut device, 2).await;
    for (name, raw) in [("quiet", &mut quiet), ("stuck", &mut stuck)] {
        let (first, body) = raw.packet().await.expect("a DISCONNECT");
        assert_eq!((first, body[0]), (0xe0, 0x8d), "{name}: keep-alive timeout");
        assert!(raw.packet().await.is_none(), "{name}: closed");
    }
    for (name, stream) in [("silent", &mut silent), ("half", &mut half)] {
        assert_eq!(ended(name, stream).await, b"", "{name}: nothing is said to a stranger");
    }
    let mut rest = Vec::new();
    assert!(timeout(PATIENCE, slow.read_to_end(&mut rest)).await.is_ok(), "dripping: still open");
    drip.await.unwrap();
    assert_eq!(metric(&node.client(), "sophont_mqtt_connections").await, 1.0);
    is_well(&mut device, 3).await;
}

#[tokio::test]
async fn who_takes_no_bytes_is_let_go() {
    let node = Node::builder().about(About::Process).start().await;
    let mut device = neighbour(&node).await;
    // A small window, so that little fits between the node and the one that does not read.
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let deaf = socket.connect(node.mqtt()).await.unwrap();
    let mut deaf = Raw::over(deaf, Hello { keep_alive: 0, ..Hello::v3("deaf") }).await.0;
    deaf.subscribe("noise", 0).await;
    let before = resident_kb(node.pid());
    let noise = "x".repeat(60 * 1024);
    for id in 1..=300 {
        device.publish("noise", &noise, 1, id).await;
        assert_eq!(device.ack(0x40).await, (id, 0));
    }
    let grown = resident_kb(node.pid()).saturating_sub(before);
    assert!(grown < 128 * 1024, "18 MiB past a deaf client hold {grown} KiB");
    let dropped = "sophont_mqtt_dropped_total{reason=\"stalled_connection\"}";
    wait_until("the deaf one is let go", 2 * PATIENCE, async || metric(&node.client(), dropped).await == 1.0).await;
    wait_until("its place is free", PATIENCE, async || metric(&node.client(), "sophont_mqtt_connections").await == 1.0)
        .await;
    is_well(&mut device, 301).await;
}
