//! What leaves a cluster whose shards move in good order: each effect once, though its instance goes from node to node.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{
    Http, PATIENCE,
    cluster::{Cluster, Sender, all_open, run_flow},
    node, wait_until,
};

/// Instances, each with a sender of its own.
const SENDERS: usize = 9;

/// A web server that counts how often each effect came.
struct Receiver {
    address: SocketAddr,
    came: Arc<Mutex<BTreeMap<String, u32>>>,
}

impl Receiver {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let came: Arc<Mutex<BTreeMap<String, u32>>> = Arc::default();
        let counts = came.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(receive(stream, counts.clone()));
            }
        });
        Self { address, came }
    }

    fn came(&self) -> BTreeMap<String, u32> {
        self.came.lock().unwrap().clone()
    }
}

/// Takes what a connection brings; a connection that ends in the middle brings nothing.
async fn receive(mut stream: TcpStream, counts: Arc<Mutex<BTreeMap<String, u32>>>) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
        let header = |name: &str| text.split(name).nth(1)?.split("\r\n").next().map(str::trim);
        if let Some(end) = text.find("\r\n\r\n")
            && bytes.len() >= end + 4 + header("content-length:")?.parse::<usize>().ok()?
        {
            *counts.lock().unwrap().entry(header("idempotency-key:")?.to_owned()).or_default() += 1;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.ok()?;
            bytes.clear();
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// A profile that calls out at each turn.
fn calling(address: SocketAddr) -> Value {
    let webhook = json!({"url": format!("http://{address}/"), "body": "{{stimulus.content}}"});
    json!({"engine": "reflex", "reflexes": [{"when": "true", "do": [{"reply": "{{stimulus.content}}"}, {"webhook": webhook}]}]})
}

/// A cluster whose instances call out.
async fn cluster(nodes: usize, receiver: &Receiver) -> Cluster {
    let allow = format!("[delivery]\nwebhook_allow = [\"{}\"]", receiver.address);
    let cluster = Cluster::build(nodes, true, |builder| builder.config(&allow)).await;
    for number in 0..SENDERS {
        cluster.client(0).put_instance(&format!("i{number}"), &calling(receiver.address)).await;
    }
    cluster
}

/// Waits for the effects of all turns, and says which came more than once.
async fn doubled(http: &Http, senders: &[Sender], receiver: &Receiver) -> Vec<(String, u32)> {
    let mut turns = 0;
    for sender in senders {
        assert!(sender.failures.is_empty(), "{:?}", sender.failures);
        turns += http.until_decided(&sender.instance(), sender.sent).await.len();
    }
    assert!(turns > SENDERS);
    wait_until("each effect came", PATIENCE, async || receiver.came().len() >= turns).await;
    // Doubles come when a new owner reads the log, long before the last effect of the last turn: those are waited for.
    receiver.came().into_iter().filter(|(_, times)| *times != 1).collect()
}

#[tokio::test]
async fn a_drained_nodes_effects_come_once() {
    let receiver = Receiver::start().await;
    let cluster = cluster(3, &receiver).await;
    let url = format!("http://{}", cluster.nodes[0].http());
    let doors: Vec<_> = [0, 2].map(|node| cluster.client(node)).into();
    let senders = run_flow(doors, SENDERS, &all_open(2), async {
        wait_until("effects leave", PATIENCE, async || receiver.came().len() > 50).await;
        let ended = node::run(&["node", "drain", "n1", "--url", &url]).await;
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
        let before = receiver.came().len();
        wait_until("effects go on leaving", PATIENCE, async || receiver.came().len() > before + 50).await;
    })
    .await;
    assert_eq!(doubled(&cluster.client(0), &senders, &receiver).await, []);
}

#[tokio::test]
async fn effects_come_once_while_a_node_joins_and_leaves() {
    let receiver = Receiver::start().await;
    let mut cluster = cluster(2, &receiver).await;
    let doors: Vec<_> = vec![cluster.client(0)];
    let senders = run_flow(doors, SENDERS, &all_open(1), async {
        wait_until("effects leave", PATIENCE, async || receiver.came().len() > 50).await;
        // It leaves in good order, and comes back to get its share.
        cluster.nodes[1].term();
        assert!(cluster.nodes[1].wait_exit(PATIENCE).await.success());
        cluster.nodes[1].start_again().await;
        cluster.until_even().await;
        let before = receiver.came().len();
        wait_until("effects go on leaving", PATIENCE, async || receiver.came().len() > before + 50).await;
    })
    .await;
    assert_eq!(doubled(&cluster.client(0), &senders, &receiver).await, []);
}
