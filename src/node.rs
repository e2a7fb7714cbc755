//! The composition root: builds the parts bottom up, plugs the ports, starts the doors last, and drains in reverse.
//!
//! Not here: any decision. Reading this file top to bottom is reading the house.
//! Tests: everything under `tests/it` that starts a node.

mod live;

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use actix_rt::Arbiter;
use async_trait::async_trait;
use tokio::sync::watch;

use crate::{
    cluster::{
        Router,
        member::{self, Member},
        shards::Shards,
    },
    config::{Backend, Config, MqttMode, live::Change},
    delivery::{Acceptor, Courier, Publisher},
    gateway::{
        auth::{self, Authenticator},
        http,
        mqtt::{
            embedded::{self, Broker},
            external::{self, Link},
            roam,
        },
    },
    instance::{
        Receipt, Until,
        environment::{Environment, Faults},
        toolkit::Toolkit,
    },
    runtime::{clock::Clock, drain::Drain},
    scaling::pool::Tally,
    store::{
        self, Store,
        memory::MemoryStore,
        ownership::{Alone, Ownership},
        postgres::{self, PostgresStore},
        roaming::Roaming,
        sqlite::{Options, SqliteStore},
    },
    telemetry::prometheus,
    types::{Fault, InstanceKey, Kind, Stimulus},
};

pub use live::Refused;

/// Why a node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address cannot be bound.
    #[error("cannot listen on {address} for {door}")]
    Bind {
        /// HTTP, MQTT, MQTT over TLS.
        door: &'static str,
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The data folder cannot be used.
    #[error("cannot use the data folder {}", path.display())]
    DataDir {
        /// The folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// It cannot take part in its cluster.
    #[error("cannot join the cluster: {0}")]
    Cluster(#[from] member::Error),
    /// Credentials are wrong or missing.
    #[error(transparent)]
    Auth(#[from] auth::Error),
    /// What a part refused at its start, in its own words.
    #[error("{0}")]
    Part(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Bind { .. } | Error::DataDir { .. } | Error::Part(_) => Kind::Unavailable,
            Error::Store(error) => error.kind(),
            Error::Cluster(error) => error.kind(),
            Error::Auth(error) => error.kind(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Error::Bind { .. } => Some(String::from(
                "another process may hold the address: choose another with --http or --mqtt; port 0 picks a free one",
            )),
            Error::DataDir { .. } => Some(String::from("choose a folder this user may write with --data-dir")),
            Error::Store(error) => error.hint(),
            Error::Cluster(error) => error.hint(),
            Error::Auth(error) => error.hint(),
            Error::Part(_) => None,
        }
    }
}

fn part(error: impl std::fmt::Display) -> Error {
    Error::Part(error.to_string())
}

/// How often pools are looked at.
const POOLS: Duration = Duration::from_secs(1);

/// Runs a future on this thread inside the actor system that [`Node::start`] needs.
pub fn system<F: Future>(main: F) -> F::Output {
    actix_rt::System::new().block_on(main)
}

/// A running node. Dropping it does not stop it; [`Node::drain`] does.
pub struct Node {
    /// Where HTTP listens.
    pub http: SocketAddr,
    /// Where MQTT listens, when embedded.
    pub mqtt: Option<SocketAddr>,
    /// Where MQTT over TLS listens, when configured.
    pub mqtts: Option<SocketAddr>,
    router: Router,
    member: Member,
    drain: Drain,
    server: http::ServerHandle,
    door: Door,
    courier: Courier,
    arbiters: Vec<Arbiter>,
    edge: Edge,
    store: Arc<dyn Store>,
    toolkit: Arc<Toolkit>,
    live: live::Live,
    patience: Duration,
    leave: Duration,
}

/// The runtime of everything that is no actor. Unlike the runtime itself it may be dropped anywhere, so that a start that
/// fails halfway ends with its error.
struct Edge {
    handle: tokio::runtime::Handle,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Edge {
    fn new(runtime: tokio::runtime::Runtime) -> Self {
        Self { handle: runtime.handle().clone(), runtime: Some(runtime) }
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The MQTT door as configured.
enum Door {
    Embedded(Arc<Broker>),
    External(Arc<Link>),
    Off,
}

/// Bound before anything else is built: what cannot be had is said at once.
struct Listeners {
    http: TcpListener,
    mqtt: Option<TcpListener>,
    mqtts: Option<TcpListener>,
}

impl Listeners {
    fn bind(config: &Config, has_tokens: bool) -> Result<Self, Error> {
        let bind = |door: &'static str, address: SocketAddr| {
            auth::check_bind(door, address, has_tokens)?;
            let listener = TcpListener::bind(address).map_err(|source| Error::Bind { door, address, source })?;
            listener.set_nonblocking(true).map_err(|source| Error::Bind { door, address, source })?;
            Ok::<_, Error>(listener)
        };
        let embedded = config.mqtt.mode == MqttMode::Embedded;
        Ok(Self {
            http: bind("HTTP", config.http.listen)?,
            mqtt: embedded.then(|| bind("MQTT", config.mqtt.listen)).transpose()?,
            mqtts: config
                .mqtt
                .tls_listen
                .filter(|_| embedded)
                .map(|address| bind("MQTT over TLS", address))
                .transpose()?,
        })
    }
}

impl Node {
    /// Starts everything, doors last. Must be called inside an actix system.
    ///
    /// # Errors
    /// [`Error`] says what is in the way.
    pub async fn start(config: &Config) -> Result<Self, Error> {
        let auth = Arc::new(Authenticator::new(&config.auth)?);
        let listeners = Listeners::bind(config, auth.has_tokens())?;
        let address = |listener: &TcpListener| listener.local_addr().ok();
        let (mqtt, mqtts) = (listeners.mqtt.as_ref().and_then(address), listeners.mqtts.as_ref().and_then(address));
        let http = listeners.http.local_addr().map_err(part)?;

        let clock = Clock::System;
        let drain = Drain::default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let edge = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(cores)
            .thread_name("sophont-edge")
            .enable_all()
            .build()
            .map(Edge::new)
            .map_err(part)?;

        store::set_slow_threshold(live::slow(config));
        let (store, ownership, roaming) = open_store(config, &clock, &edge.handle).await?;
        let mut environment = Environment::new(config, store.clone(), clock.clone()).map_err(part)?;
        let toolkit = Toolkit::new(
            &config.tools,
            config.delivery.max_hops,
            environment.memory.clone(),
            environment.cache.clone(),
        );
        let toolkit = Arc::new(toolkit.map_err(part)?);
        // Tools on demand, of a test, stand in for the node's.
        environment.toolbox = Faults::toolbox(&config.faults).unwrap_or_else(|| toolkit.clone());
        let count = if config.node.arbiters == 0 { cores } else { config.node.arbiters };
        let arbiters: Vec<_> = (0..count).map(|_| Arbiter::new()).collect();
        let handles: Vec<_> = arbiters.iter().map(Arbiter::handle).collect();
        let arbiter = handles.first().cloned().ok_or_else(|| part("there is no arbiter"))?;
        let arbiters = with_cache(arbiters, &environment);
        let environment = Arc::new(environment);
        let shards = Shards::new(environment.clone(), config.cluster.shards, handles);
        let member = Member::start(member::Parts {
            config,
            addresses: addresses(config, http, mqtt),
            ownership,
            store: store.clone(),
            environment: environment.clone(),
            shards: shards.clone(),
            drain: drain.clone(),
            arbiter,
            handle: edge.handle.clone(),
        })
        .await?;
        let router = Router::new(environment.clone(), shards, Some(member.clone()));

        let door = match config.mqtt.mode {
            MqttMode::Off => Door::Off,
            MqttMode::External => {
                let parts = external::Parts {
                    config: config.mqtt.clone(),
                    node: config.node.name(),
                    inward: Arc::new(router.clone()),
                    clock: clock.clone(),
                    drain: drain.clone(),
                    handle: edge.handle.clone(),
                    turn: Some(external::Turn { scope: member.scope(), cluster: config.cluster.name.clone() }),
                };
                Door::External(Link::start(parts).map_err(part)?)
            }
            MqttMode::Embedded => {
                let parts = embedded::Parts {
                    store: store.clone(),
                    router: router.clone(),
                    auth: auth.clone(),
                    config: config.mqtt.clone(),
                    clock: clock.clone(),
                    drain: drain.clone(),
                    handle: edge.handle.clone(),
                    roam: roaming.map(|sessions| roam::Parts { sessions, bus: member.forwarder().bus().clone() }),
                };
                let sockets = embedded::Listeners { plain: listeners.mqtt, tls: listeners.mqtts };
                let broker = Broker::start(parts, sockets).await.map_err(part)?;
                let hears = broker.clone();
                member.on_relay(move |from, relay| hears.hear(from, &relay));
                Door::Embedded(broker)
            }
        };
        let publisher: Option<Arc<dyn Publisher>> = match &door {
            Door::Embedded(broker) => Some(broker.clone()),
            Door::External(link) => Some(link.clone()),
            Door::Off => None,
        };
        let courier = Courier::start(crate::delivery::Parts {
            store: store.clone(),
            scope: member.scope().borrow().clone(),
            publisher,
            acceptor: Arc::new(Local(router.clone())),
            config: config.delivery.clone(),
            clock: clock.clone(),
            drain: drain.clone(),
            handle: edge.handle.clone(),
        })
        .map_err(part)?;
        edge.handle.spawn(Courier::follow(courier.scope(), member.scope()));
        if router.memory().backfills() {
            edge.handle.spawn(embed(router.clone(), drain.clone()));
        }
        edge.handle.spawn(checkpoint(router.clone(), drain.clone()));
        member.deliver_with(courier.leaving());
        let (scan_period, period) = watch::channel(live::scan_period(config));
        edge.handle.spawn(scan(router.clone(), drain.clone(), period));
        let pools = pools(&*store, &environment, &toolkit);
        edge.handle.spawn(tend(pools.clone(), drain.clone()));
        let live = live::Live::new(
            config.clone(),
            live::Parts {
                store: store.clone(),
                member: member.clone(),
                environment,
                toolkit: toolkit.clone(),
                auth: auth.clone(),
                scan: scan_period,
            },
            clock.clone(),
        );

        let parts = http::Parts {
            router: router.clone(),
            operations: member.operations().clone(),
            auth: auth.clone(),
            config: config.http.clone(),
            clock,
            node: Arc::from(config.node.name()),
            metrics: Arc::new(prometheus::render),
            checks: checks(&member, pools),
            extra: match &door {
                Door::Embedded(broker) => http::websocket::route(broker.clone(), auth),
                Door::External(_) | Door::Off => Arc::new(|_| ()),
            },
        };
        let server = http::serve(listeners.http, parts, drain.clone()).map_err(part)?;
        let handle = server.handle();
        actix_rt::spawn(server);
        let patience = Duration::from_secs(config.node.drain_seconds);
        let leave = Duration::from_secs(config.node.leave_seconds);
        Ok(Self {
            http,
            mqtt,
            mqtts,
            router,
            member,
            drain,
            server: handle,
            door,
            courier,
            arbiters,
            edge,
            store,
            toolkit,
            live,
            patience,
            leave,
        })
    }

    /// Stops in reverse: nothing new is taken, what is in hand is finished, effects leave, the store is closed.
    /// Ends within the configured patience; what is not finished then was accepted durably and is decided after the next
    /// start.
    pub async fn drain(self) {
        let began = std::time::Instant::now();
        let left = || self.patience.saturating_sub(began.elapsed());
        self.drain.leave();
        let (handed_off, ()) =
            tokio::join!(self.member.membership().drain(left() / 2), tokio::time::sleep(self.leave.min(left())),);
        tracing::debug!(handed_off, "this node's shards");
        self.drain.begin();
        let _ = tokio::time::timeout(left(), self.server.stop(true)).await;
        if let Door::Embedded(broker) = &self.door {
            let _ = tokio::time::timeout(left(), broker.idle()).await;
        }
        self.router.drain();
        if tokio::time::timeout(left(), self.router.idle()).await.is_err() {
            tracing::warn!(instances = self.router.busy(), "work in hand is left for the next start");
        }
        self.member.idle(left()).await;
        self.courier.finish(left().max(Duration::from_millis(200))).await;
        if let Door::External(link) = &self.door {
            link.close(left().max(Duration::from_millis(200))).await;
        }
        self.member.leave(left().max(Duration::from_millis(200))).await;
        self.drain.stop();
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
        // A store may work on the edge's runtime: it goes first.
        self.toolkit.close().await;
        let store = self.store;
        let closed = tokio::task::spawn_blocking(move || store.close()).await;
        if closed.is_err() {
            tracing::error!("the store did not close cleanly");
        }
        drop(self.edge);
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<Config> {
        self.live.config()
    }

    /// Goes by new settings from here on, by all of them or none; returns what changed. Cancelling it leaves all or none
    /// in force.
    ///
    /// # Errors
    /// [`Refused`] says what keeps the settings as they are.
    pub async fn adopt(&self, new: Config) -> Result<Vec<Change>, Refused> {
        self.live.adopt(new).await
    }

    /// The way into instances, for tests that build a node in their own process.
    pub fn router(&self) -> &Router {
        &self.router
    }
}

/// Starts the cache's actors on two more threads: one of them waits for the disk.
fn with_cache(mut arbiters: Vec<Arbiter>, environment: &Environment) -> Vec<Arbiter> {
    let (cache, disk) = (Arbiter::new(), Arbiter::new());
    environment.cache.start(cache.handle(), disk.handle());
    arbiters.extend([cache, disk]);
    arbiters
}

/// Where other nodes and operators reach this one.
fn addresses(config: &Config, http: SocketAddr, mqtt: Option<SocketAddr>) -> Vec<String> {
    let door = |name: &str, address: SocketAddr| format!("{name}={address}");
    let mut addresses = vec![door("http", http)];
    addresses.extend(config.http.advertise.iter().map(|url| format!("advertise={url}")));
    addresses.extend(mqtt.map(|address| door("mqtt", address)));
    if config.mqtt.mode == MqttMode::External {
        addresses.push(format!("broker={}", config.mqtt.url));
    }
    addresses
}

/// All pools of the node: connections, threads, calls of models and tools.
fn pools(store: &dyn Store, environment: &Environment, toolkit: &Toolkit) -> Vec<Arc<Tally>> {
    let mut pools: Vec<_> = store.pools().iter().map(|pool| pool.tally().clone()).collect();
    pools.extend(environment.minds.engines().pools());
    pools.extend(toolkit.pools());
    pools
}

/// What readiness says: a node that is no member cannot serve; without a bus, full, or with pools that are too small it can.
fn checks(member: &Member, pools: Vec<Arc<Tally>>) -> Vec<http::Check> {
    let (one, other, third) = (member.clone(), member.clone(), member.clone());
    let strain = move || {
        let strained: Vec<String> = pools.iter().filter_map(|pool| pool.strain()).collect();
        if strained.is_empty() { Ok(()) } else { Err(strained.join("; ")) }
    };
    vec![
        http::Check { name: "load", needed: false, probe: Box::new(move || third.has_room()) },
        http::Check { name: "pools", needed: false, probe: Box::new(strain) },
        http::Check { name: "membership", needed: true, probe: Box::new(move || one.is_member()) },
        http::Check { name: "bus", needed: false, probe: Box::new(move || other.has_bus()) },
    ]
}

/// A store, who keeps account of its shards' owners, and of MQTT sessions, where several nodes may use it.
type Opened = (Arc<dyn Store>, Arc<dyn Ownership>, Option<Arc<dyn Roaming>>);

async fn open_store(config: &Config, clock: &Clock, handle: &tokio::runtime::Handle) -> Result<Opened, Error> {
    match config.store.backend {
        Backend::Memory => Ok((Arc::new(MemoryStore::new()), Arc::new(Alone::default()), None)),
        Backend::Postgres => {
            let options = postgres::Options {
                #[cfg(feature = "faults")]
                dedupe: !config.faults.dedupe_off,
                #[cfg(feature = "faults")]
                fenced: !config.faults.fence_off,
                #[cfg(feature = "faults")]
                disk_full_file: config.faults.disk_full_file.clone(),
                pool: live::pool(config),
                ..postgres::Options::default()
            };
            let (shards, handle) = (config.cluster.shards, handle.clone());
            let store = PostgresStore::open_with(&config.store, shards, clock.clone(), handle, options).await?;
            Ok((store.clone(), store.clone(), Some(store)))
        }
        Backend::Sqlite => {
            let path = &config.node.data_dir;
            std::fs::create_dir_all(path).map_err(|source| Error::DataDir { path: path.clone(), source })?;
            let options = Options {
                #[cfg(feature = "faults")]
                dedupe: !config.faults.dedupe_off,
                #[cfg(feature = "faults")]
                disk_full_file: config.faults.disk_full_file.clone(),
                pool: live::pool(config),
                ..Options::default()
            };
            let store = SqliteStore::open_with(path, &config.store, clock.clone(), options)?;
            Ok((store, Arc::new(Alone::default()), None))
        }
    }
}

/// Looks at pools, and tells which are too small.
async fn tend(pools: Vec<Arc<Tally>>, drain: Drain) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(POOLS) => {}
            () = drain.stopped() => return,
        }
        for pool in &pools {
            if let Some(words) = pool.look(std::time::Instant::now()) {
                tracing::warn!(pool = pool.name(), "a pool is too small for what is asked of it: {words}");
            }
        }
    }
}

/// Looks for waiting stimuli nobody was woken for: at once after a start, then now and then.
/// Brings vectors to episodes that were written without, until the node drains.
async fn embed(router: Router, drain: Drain) {
    let deliver = async |key: InstanceKey, stimulus: Stimulus| {
        matches!(router.deliver(&key, stimulus, Until::Decided).await, Ok(Receipt::Decided { .. }))
    };
    tokio::select! {
        () = router.memory().backfill(deliver) => {}
        () = drain.draining() => {}
    }
}

/// Keeps what memories are made of in the store, until the node drains.
async fn checkpoint(router: Router, drain: Drain) {
    tokio::select! {
        () = router.memory().checkpoints() => {}
        () = drain.draining() => {}
    }
}

async fn scan(router: Router, drain: Drain, mut period: watch::Receiver<Duration>) {
    loop {
        match router.wake_waiting().await {
            Ok(0) => {}
            Ok(woken) => tracing::debug!(woken, "instances with stimuli waiting were woken"),
            Err(error) => tracing::warn!(%error, "the scan for waiting stimuli failed"),
        }
        let pause = *period.borrow_and_update();
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // A shorter period begins at once. Without a sender the node is gone.
            changed = period.changed() => if changed.is_err() { return },
            () = drain.draining() => return,
        }
    }
}

/// The port of delivery into instances.
struct Local(Router);

#[async_trait]
impl Acceptor for Local {
    async fn accept(&self, key: InstanceKey, stimulus: Stimulus) -> Result<(), String> {
        self.0.deliver(&key, stimulus, Until::Accepted).await.map(drop).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use crate::{cluster, gateway::mqtt, store, types::turn};

    /// Nodes of two builds read what each other stored. A form that is raised here has to be one that every build which
    /// the protocol lets beside this one reads already: docs/adr/0012 says how. Then the numbers here change, too.
    #[test]
    fn what_is_written_is_read_by_all_builds_of_the_protocol() {
        let [row, blob] = store::record::WRITTEN;
        let step = store::journal::WRITTEN;
        let written = [turn::RECORD_VERSION, row, blob, mqtt::record::VERSION, cluster::bus::frame::VERSION, step];
        assert_eq!((cluster::PROTOCOL.min, written), (1, [1; 6]), "records, rows, blobs, MQTT records, frames, steps");
    }
}
