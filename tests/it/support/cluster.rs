//! Three nodes over one PostgreSQL database, and a Redis if wanted: real processes, and a balancer's view of them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Http, Node, PATIENCE, node::Builder, postgres, redis::Redis, wait_until};

/// A cluster.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub redis: Option<Redis>,
    token: Option<String>,
}

impl Cluster {
    /// Three nodes, with a bus.
    pub async fn start() -> Self {
        Self::build(3, true, |builder| builder).await
    }

    /// So many nodes, each changed by `change` before it starts.
    pub async fn build(count: usize, bus: bool, change: impl Fn(Builder) -> Builder) -> Self {
        let cluster = Self::build_uneven(count, bus, |_, builder| change(builder)).await;
        cluster.until_even().await;
        cluster
    }

    /// Three nodes with a bus that ask for tokens; `token` is one that may do everything.
    pub async fn guarded(tokens: &str, token: &str) -> Self {
        let mut cluster = Self::build_uneven(3, true, |_, builder| builder.config(tokens)).await;
        cluster.token = Some(token.into());
        cluster.until_even().await;
        cluster
    }

    /// As [`Cluster::build`], each node changed by its number; not waiting for equal shares.
    pub async fn build_uneven(count: usize, bus: bool, change: impl Fn(usize, Builder) -> Builder) -> Self {
        let redis = if bus { Some(Redis::start().await) } else { None };
        let database = postgres::shared().database().await;
        let mut nodes = Vec::new();
        for number in 0..count {
            let config = format!(
                "[node]\nname = \"n{number}\"\nleave_seconds = 1\n[store]\nbackend = \"postgres\"\n[store.postgres]\n\
                 url = \"{database}\"\nlanes = 2\n[scaling]\nconnection_pool_size = 4\npool_overflow = 0\n[cluster]\nshards = 24\n[redis]\nurl = \"{}\"\n",
                redis.as_ref().map(Redis::url).unwrap_or_default(),
            );
            nodes.push(change(number, Node::builder().config(&config).stable_ports()).start().await);
        }
        Self { nodes, redis, token: None }
    }

    /// Ends a node in order. Does what a balancer does: it asks for readiness, and stops sending when the answer is no.
    pub async fn retire(&mut self, node: usize, shut: &AtomicBool) {
        let door = self.client(node);
        self.nodes[node].signal(Signal::SIGTERM);
        wait_until("readiness says no", PATIENCE, async || door.get("/health/ready").await.status == 503).await;
        shut.store(true, Ordering::Release);
        assert!(self.nodes[node].wait_exit(PATIENCE).await.success());
    }

    /// A client of a node.
    pub fn client(&self, node: usize) -> Http {
        let client = self.nodes[node % self.nodes.len()].client();
        self.token.as_deref().map_or(client.clone(), |token| client.with_token(token))
    }

    /// Waits until each live node owns its share of the shards.
    pub async fn until_even(&self) {
        let least = 24 / self.nodes.len() as u64 - 1;
        wait_until("every node owns its share", PATIENCE, async || {
            let rows = self.rows(0).await;
            rows.iter().filter(|row| row["status"] == "live").count() == self.nodes.len()
                && rows.iter().all(|row| row["status"] != "live" || row["shards"].as_u64() >= Some(least))
        })
        .await;
    }

    /// The nodes as one of them lists them.
    pub async fn rows(&self, asked: usize) -> Vec<Value> {
        let nodes = self.client(asked).get("/v1/cluster/nodes").await.expect(200);
        nodes["items"].as_array().cloned().unwrap_or_default()
    }

    /// The number of the node that owns an instance.
    pub async fn owner(&self, instance: &str) -> usize {
        let about = self.client(0).get(&format!("/v1/instances/{instance}")).await.expect(200);
        about["node"].as_str().and_then(|name| name.strip_prefix('n')?.parse().ok()).expect("a node of the cluster")
    }
}

/// One who sends texts to an instance of its own, one after the other, by a different node each time, and again under the
/// same id until it is accepted.
pub struct Sender {
    pub number: usize,
    pub doors: Vec<Http>,
    /// Doors a balancer would not use at present.
    pub shut: Arc<Vec<AtomicBool>>,
    /// Refusals and broken connections.
    pub failures: Vec<String>,
    pub sent: usize,
}

impl Sender {
    /// Sends until it is told to stop.
    pub async fn run(mut self, stop: Arc<AtomicBool>) -> Self {
        while !stop.load(Ordering::Acquire) {
            self.send().await;
        }
        self
    }

    /// The instance it talks to.
    pub fn instance(&self) -> String {
        format!("i{}", self.number)
    }

    async fn send(&mut self) {
        self.sent += 1;
        let body = json!({
            "id": format!("{}-{}", self.number, self.sent),
            "sender": format!("sender{}", self.number),
            "content": self.sent.to_string(),
        });
        for attempt in 0.. {
            assert!(attempt < 2000, "sender {} gets nowhere: {:?}", self.number, self.failures.last());
            let at = (self.number + self.sent + attempt) % self.doors.len();
            if self.shut[at].load(Ordering::Acquire) {
                tokio::task::yield_now().await;
                continue;
            }
            let path = format!("/v1/instances/{}/stimuli", self.instance());
            let request = self.doors[at].request(reqwest::Method::POST, &path).json(&body);
            match Http::try_send(request.timeout(Duration::from_secs(10))).await {
                Ok(answer) if answer.status.is_success() => return,
                Ok(answer) => self.failures.push(format!("{} {}", answer.status, answer.text)),
                Err(error) => self.failures.push(format!("{error:?}")),
            }
        }
    }
}

/// Runs senders while something happens, and gives them back.
pub async fn under_flow(
    cluster: &Cluster,
    count: usize,
    shut: &Arc<Vec<AtomicBool>>,
    act: impl Future<Output = ()>,
) -> Vec<Sender> {
    let doors: Vec<Http> = cluster.nodes.iter().map(Node::client).collect();
    run_flow(doors, count, shut, act).await
}

/// As [`under_flow`], over doors that were opened before.
pub async fn run_flow(
    doors: Vec<Http>,
    count: usize,
    shut: &Arc<Vec<AtomicBool>>,
    act: impl Future<Output = ()>,
) -> Vec<Sender> {
    let stop = Arc::new(AtomicBool::new(false));
    let senders: Vec<_> = (0..count)
        .map(|number| Sender { number, doors: doors.clone(), shut: shut.clone(), failures: Vec::new(), sent: 0 })
        .map(|sender| tokio::spawn(sender.run(stop.clone())))
        .collect();
    act.await;
    stop.store(true, Ordering::Release);
    let mut ended = Vec::new();
    for sender in senders {
        ended.push(sender.await.expect("the sender ends"));
    }
    ended
}

/// Doors that are all open.
pub fn all_open(count: usize) -> Arc<Vec<AtomicBool>> {
    Arc::new((0..count).map(|_| AtomicBool::new(false)).collect())
}

/// What was accepted is decided once, in the order it was sent, whichever node is asked.
pub async fn check_history(http: &Http, senders: &[Sender]) {
    for sender in senders {
        let decided = http.until_decided(&sender.instance(), sender.sent).await;
        let expected: Vec<_> = (1..=sender.sent).map(|number| number.to_string()).collect();
        assert_eq!(decided, expected, "instance {}", sender.instance());
    }
}
