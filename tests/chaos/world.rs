//! The processes that can be hurt: nodes, the servers they stand on, and a proxy on every way between them.
//!
//! Not here: what is done to them and when (`fault.rs`), the load (`support/load`).

use std::{collections::HashMap, net::SocketAddr, path::Path, time::Duration};

use nix::sys::signal::Signal;

use crate::{
    fault::{End, Fault, Flow, Server, Terrain, What},
    proxy::Proxy,
    support::{Http, Mosquitto, Node, PATIENCE, load::Doors, postgres::Postgres, redis::Redis, wait_until},
};

/// Longest time a node may take to drain.
const DRAIN: Duration = Duration::from_secs(60);

/// Everything there is.
#[derive(Debug)]
pub struct World {
    members: Vec<Member>,
    servers: Servers,
}

/// The servers beside the nodes.
#[derive(Debug, Default)]
struct Servers {
    postgres: Option<Postgres>,
    redis: Option<Redis>,
    broker: Option<Mosquitto>,
}

/// A node and the ways to and from it.
#[derive(Debug)]
struct Member {
    node: Node,
    clients: Vec<Proxy>,
    servers: HashMap<Server, Proxy>,
}

impl Member {
    /// Starts a node whose ways to servers are there already.
    async fn start(config: &str, servers: HashMap<Server, Proxy>, embedded: bool) -> Self {
        let builder = Node::builder().stable_ports().config(config);
        let builder = if embedded { builder } else { builder.without_mqtt_listener() };
        let node = builder.start().await;
        let mut clients = vec![Proxy::start(node.http()).await];
        if embedded {
            clients.push(Proxy::start(node.mqtt()).await);
        }
        Self { node, clients, servers }
    }
}

impl World {
    /// One node with SQLite, devices connected to it.
    pub async fn one_node(config: &str) -> Self {
        let members = vec![Member::start(config, HashMap::new(), true).await];
        Self { members, servers: Servers::default() }
    }

    /// One node with SQLite behind Mosquitto.
    pub async fn behind_a_broker(config: &str) -> Self {
        // What waits for a node that is away is unbounded here, so that none of it is dropped by the broker; and none of it
        // stands in a queue behind what is in flight, where Mosquitto 2.0 lets newer messages overtake it now and then.
        let broker = Mosquitto::builder().config("max_queued_messages 0\nmax_inflight_messages 0").start().await;
        let way = Proxy::start(broker.address()).await;
        let config =
            format!("{config}\n[mqtt]\nmode = \"external\"\nurl = \"mqtt://{}\"\nclient_id = \"chaos\"", way.address());
        let member = Member::start(&config, HashMap::from([(Server::Broker, way)]), false).await;
        Self { members: vec![member], servers: Servers { broker: Some(broker), ..Servers::default() } }
    }

    /// One node on PostgreSQL, devices connected to it.
    pub async fn on_postgres(config: &str) -> Self {
        let postgres = start_postgres().await;
        let way = Proxy::start(of(postgres.port())).await;
        let config = format!("{config}\n{}", on(&way));
        let member = Member::start(&config, HashMap::from([(Server::Postgres, way)]), true).await;
        Self { members: vec![member], servers: Servers { postgres: Some(postgres), ..Servers::default() } }
    }

    /// So many nodes on one PostgreSQL and one Redis, devices connected to any of them.
    pub async fn cluster(nodes: usize, config: &str) -> Self {
        let (postgres, redis) = (start_postgres().await, Redis::start().await);
        let bus: SocketAddr = redis.url().trim_start_matches("redis://").parse().expect("the address of Redis");
        let mut members = Vec::new();
        for n in 0..nodes {
            let (store, hints) = (Proxy::start(of(postgres.port())).await, Proxy::start(bus).await);
            let (on, bus) = (on(&store), format!("[redis]\nurl = \"redis://{}\"", hints.address()));
            let config = format!("{config}\n[node]\nname = \"node-{n}\"\n{on}\n{bus}");
            let ways = HashMap::from([(Server::Postgres, store), (Server::Redis, hints)]);
            members.push(Member::start(&config, ways, true).await);
        }
        Self { members, servers: Servers { postgres: Some(postgres), redis: Some(redis), broker: None } }
    }

    /// What can go wrong here.
    pub fn terrain(&self) -> Terrain {
        let Servers { postgres, redis, broker } = &self.servers;
        let there = [
            (postgres.is_some(), Server::Postgres),
            (redis.is_some(), Server::Redis),
            (broker.is_some(), Server::Broker),
        ];
        let servers = there.into_iter().filter_map(|(there, server)| there.then_some(server)).collect();
        Terrain { nodes: self.members.len(), servers }
    }

    /// Where senders knock: always at proxies.
    pub fn doors(&self) -> Doors {
        let http = self.members.iter().map(|member| Http::new(member.clients[0].address())).collect();
        let embedded = || self.members.iter().filter_map(|member| member.clients.get(1)).map(Proxy::address).collect();
        let mqtt = self.servers.broker.as_ref().map_or_else(embedded, |broker| vec![broker.address()]);
        Doors { http, mqtt }
    }

    /// A node's own door, past the proxies.
    pub fn http(&self, node: usize) -> Http {
        self.members[node].node.client()
    }

    /// All nodes' own doors.
    pub fn urls(&self) -> Vec<String> {
        self.members.iter().map(|member| format!("http://{}", member.node.http())).collect()
    }

    /// A folder for the run's own files.
    pub fn home(&self) -> &Path {
        self.members[0].node.home()
    }

    /// Lets a fault happen, and mends it.
    pub async fn suffer(&mut self, fault: Fault) {
        self.begin(fault.what, fault.hold).await;
        if let Some(also) = fault.also {
            hold(fault.hold / 2).await;
            self.begin(also, fault.hold).await;
        }
        hold(fault.hold).await;
        let mut all: Vec<What> = [Some(fault.what), fault.also].into_iter().flatten().collect();
        all.sort_by_key(|what| what.mended());
        for what in all {
            self.mend(what).await;
        }
    }

    async fn begin(&mut self, what: What, hold: Duration) {
        match what {
            What::Kill(n) => self.members[n].node.kill9().await,
            What::KillTwice(n) => {
                let node = &mut self.members[n].node;
                node.kill9().await;
                node.start_and_kill_early(hold.as_millis().is_multiple_of(2)).await;
            }
            What::Freeze(n) => self.members[n].node.signal(Signal::SIGSTOP),
            What::Drain(n) => {
                let node = &mut self.members[n].node;
                node.term();
                let status = node.wait_exit(DRAIN).await;
                assert!(status.success(), "node {n} drained with {status}");
            }
            What::Link(n, end, flow) => self.link(n, end, flow),
            What::Restart(server, hard) => {
                self.stop(server, if hard { Signal::SIGKILL } else { Signal::SIGTERM }).await;
            }
            What::Stop(server) => self.signal(server, Signal::SIGSTOP),
        }
    }

    async fn mend(&mut self, what: What) {
        match what {
            What::Kill(n) | What::KillTwice(n) | What::Drain(n) => self.members[n].node.start_again().await,
            What::Freeze(n) => self.members[n].node.signal(Signal::SIGCONT),
            What::Link(n, end, _) => self.link(n, end, Flow::Open),
            What::Restart(server, _) => self.start(server).await,
            What::Stop(server) => self.signal(server, Signal::SIGCONT),
        }
    }

    fn link(&self, node: usize, end: End, flow: Flow) {
        let member = &self.members[node];
        match end {
            End::Clients => member.clients.iter().for_each(|proxy| proxy.set(flow)),
            End::Server(server) => member.servers[&server].set(flow),
        }
    }

    async fn stop(&mut self, server: Server, signal: Signal) {
        let Servers { postgres, redis, broker } = &mut self.servers;
        match server {
            Server::Postgres => {
                let mode = if signal == Signal::SIGKILL { "immediate" } else { "fast" };
                apart(postgres, move |postgres| postgres.stop(mode)).await;
            }
            // What it holds are hints: it keeps nothing over a restart either way.
            Server::Redis => redis.as_mut().expect("Redis").kill().await,
            Server::Broker => broker.as_mut().expect("a broker").stop(signal).await,
        }
    }

    async fn start(&mut self, server: Server) {
        let Servers { postgres, redis, broker } = &mut self.servers;
        match server {
            Server::Postgres => apart(postgres, Postgres::start_again).await,
            Server::Redis => redis.as_mut().expect("Redis").start_again().await,
            Server::Broker => broker.as_mut().expect("a broker").start_again().await,
        }
    }

    /// A server that is stopped answers nobody; one of many processes is stopped by its ways.
    fn signal(&mut self, server: Server, signal: Signal) {
        let flow = if signal == Signal::SIGSTOP { Flow::Stalled } else { Flow::Open };
        match (server, &self.servers) {
            (Server::Broker, Servers { broker: Some(broker), .. }) => broker.signal(signal),
            (Server::Redis, Servers { redis: Some(redis), .. }) => redis.signal(signal),
            _ => self.members.iter().for_each(|member| member.servers[&server].set(flow)),
        }
    }

    /// SIGKILL of all nodes at once, and a start of all.
    pub async fn kill_all(&mut self) {
        for member in &mut self.members {
            member.node.kill9().await;
        }
        for member in &mut self.members {
            member.node.start_again().await;
        }
    }

    /// Waits until nothing waits in any inbox.
    pub async fn until_decided(&self, instances: &[String]) {
        let http = self.http(0);
        for instance in instances {
            wait_until(&format!("the inbox of {instance} is empty"), 4 * PATIENCE, async || {
                let shown = http.get(&format!("/v1/instances/{instance}")).await;
                shown.status.is_success() && shown.json()["inbox"] == 0
            })
            .await;
        }
    }
}

/// Starting and stopping PostgreSQL blocks, and the load goes on meanwhile.
async fn apart(postgres: &mut Option<Postgres>, work: impl FnOnce(&mut Postgres) + Send + 'static) {
    let mut taken = postgres.take().expect("PostgreSQL");
    let back = tokio::task::spawn_blocking(move || {
        work(&mut taken);
        taken
    });
    *postgres = Some(back.await.expect("PostgreSQL does as it is told"));
}

async fn start_postgres() -> Postgres {
    tokio::task::spawn_blocking(Postgres::start).await.expect("PostgreSQL starts")
}

fn of(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Settings of a node that reaches PostgreSQL by this way.
fn on(way: &Proxy) -> String {
    let url = format!("postgres://postgres@{}/postgres", way.address());
    format!("[store]\nbackend = \"postgres\"\n[store.postgres]\nurl = \"{url}\"")
}

/// Lets a fault last. The only wait here that is for time: how long it lasts is what the fault is.
async fn hold(time: Duration) {
    let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
}
