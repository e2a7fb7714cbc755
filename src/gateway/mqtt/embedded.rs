//! The broker in this process: everything its connections share, its start from the store, and its listeners.
//!
//! Not here: one connection (`handshake`, `connection`), one tenant (`registry`), what happens after a connection (`will`).
//!
//! Invariants: a publish is reported as settled only when its rows are durable; the store is called with no lock of a
//! session held. Tests: `tests/it/mqtt.rs`.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{Notify, oneshot},
};
use tokio_rustls::TlsAcceptor;

use super::{
    handshake,
    inbound::{Reason, Refusal},
    outbox::Ended,
    packet::code,
    record::{self, Message},
    registry::{Space, restore_item},
    roam::{self, Roam},
    session::{Link, Session},
    tls,
    will::{self, Schedule},
};
use crate::{
    cluster::Router,
    config,
    delivery::{self, Publisher},
    gateway::auth::Authenticator,
    instance::{self, Receipt, Until, inbox::Line},
    runtime::{clock::Clock, drain::Drain},
    store::{self, Done, MqttRow, MqttWrite, Store},
    telemetry::metric,
    types::{
        InstanceKey, Millis, Stimulus, TenantId,
        limits::{MAX_RETAINED, MAX_RETAINED_BYTES},
    },
};

/// Longest TLS handshake.
const TLS_HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections above the limit that are told so, before the rest is dropped without a word.
const POLITE_REFUSALS: usize = 256;
/// Pause after a failed accept (no file descriptors left), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The way of stimuli inward. A port of this door, so that it can be driven without instances.
pub trait Inward: Send + Sync + 'static {
    /// Sends a stimulus on its way, in the order of the calls; behind one of its line that is not taken, it is not taken
    /// either. The receiver yields the end; closed without an answer
    /// means [`instance::Error::Crashed`].
    ///
    /// # Errors
    /// It is not on its way.
    fn submit(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        until: Until,
        line: Option<&Line>,
    ) -> Result<oneshot::Receiver<Result<Receipt, instance::Error>>, instance::Error>;
}

impl Inward for Router {
    fn submit(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        until: Until,
        line: Option<&Line>,
    ) -> Result<oneshot::Receiver<Result<Receipt, instance::Error>>, instance::Error> {
        match line {
            Some(line) => self.submit_in_line(key, stimulus, until, line),
            None => Router::submit(self, key, stimulus, None, until),
        }
    }
}

/// What the broker is made of.
pub struct Parts {
    /// Where sessions, queues and retained values are kept.
    pub store: Arc<dyn Store>,
    /// The way to instances.
    pub router: Router,
    /// Who may come in.
    pub auth: Arc<Authenticator>,
    /// `[mqtt]`.
    pub config: config::Mqtt,
    /// Time.
    pub clock: Clock,
    /// When to stop.
    pub drain: Drain,
    /// A multi-thread runtime; connection tasks run there.
    pub handle: Handle,
    /// The other brokers, where several nodes use the store.
    pub roam: Option<roam::Parts>,
}

/// Where the broker listens: bound sockets, handed in.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Plain TCP.
    pub plain: Option<std::net::TcpListener>,
    /// TLS, with `tls_cert` and `tls_key` of the configuration.
    pub tls: Option<std::net::TcpListener>,
}

/// Why the broker cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be read.
    #[error("MQTT rows cannot be read: {0}")]
    Store(#[from] store::Error),
    /// A row that cannot be understood.
    #[error("an MQTT row cannot be read: {0}")]
    Record(#[from] record::Error),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] tls::Error),
    /// A listener cannot be used.
    #[error("an MQTT listener cannot be used: {0}")]
    Listener(#[from] std::io::Error),
}

impl crate::types::Fault for Error {
    fn kind(&self) -> crate::types::Kind {
        match self {
            Error::Store(error) => error.kind(),
            Error::Tls(_) => crate::types::Kind::Invalid,
            Error::Record(_) | Error::Listener(_) => crate::types::Kind::Internal,
        }
    }
}

/// Counters asked for on every message.
pub(super) struct Meters {
    pub received: metrics::Counter,
    pub sent: metrics::Counter,
    pub acked: metrics::Counter,
    connections: metrics::Gauge,
}

impl Meters {
    fn new() -> Self {
        Self {
            received: metrics::counter!(metric::MQTT_MESSAGES, "direction" => "in"),
            sent: metrics::counter!(metric::MQTT_MESSAGES, "direction" => "out"),
            acked: metrics::counter!(metric::MQTT_ACKS, "reason" => "success"),
            connections: metrics::gauge!(metric::MQTT_CONNECTIONS),
        }
    }
}

/// Counts messages that reach nobody though somebody was meant.
pub(super) fn count_dropped(reason: &'static str, count: u64) {
    if count > 0 {
        metrics::counter!(metric::MQTT_DROPPED, "reason" => reason).increment(count);
    }
}

/// Whether a publish is settled.
pub enum Settled {
    /// Nothing had to be written.
    Now,
    /// True when the rows are durable, false when the store refused them.
    Rows(oneshot::Receiver<bool>),
}

/// The broker. Shared by all its connections.
pub struct Broker {
    pub(super) store: Arc<dyn Store>,
    pub(super) inward: Arc<dyn Inward>,
    pub(super) auth: Arc<Authenticator>,
    pub(super) config: config::Mqtt,
    pub(super) clock: Clock,
    pub(super) drain: Drain,
    pub(super) schedule: Schedule,
    pub(super) meters: Meters,
    handle: Handle,
    spaces: RwLock<HashMap<TenantId, Arc<Space>>>,
    connections: AtomicUsize,
    ended: Notify,
    /// The other brokers, where several nodes use the store.
    pub(super) roam: Option<Arc<Roam>>,
}

impl Broker {
    /// Reads what the store kept, and begins to listen.
    ///
    /// # Errors
    /// [`Error`]: nothing is listening then.
    pub async fn start(parts: Parts, listeners: Listeners) -> Result<Arc<Self>, Error> {
        let inward = Arc::new(parts.router.clone());
        Self::start_with(
            inward,
            parts.store,
            parts.auth,
            parts.config,
            parts.clock,
            parts.drain,
            parts.handle,
            listeners,
            parts.roam,
        )
        .await
    }

    /// As [`Broker::start`], with another way inward than the router.
    ///
    /// # Errors
    /// As [`Broker::start`].
    #[allow(clippy::too_many_arguments, reason = "the parts, taken apart")]
    pub async fn start_with(
        inward: Arc<dyn Inward>,
        store: Arc<dyn Store>,
        auth: Arc<Authenticator>,
        config: config::Mqtt,
        clock: Clock,
        drain: Drain,
        handle: Handle,
        listeners: Listeners,
        roam: Option<roam::Parts>,
    ) -> Result<Arc<Self>, Error> {
        let (roam, signs) = roam.map(Roam::new).unzip();
        let acceptor = match &listeners.tls {
            None => None,
            Some(_) => Some(tls::acceptor(config.tls_cert.as_deref(), config.tls_key.as_deref())?),
        };
        let broker = Arc::new(Self {
            store,
            inward,
            auth,
            config,
            clock,
            drain,
            schedule: Schedule::default(),
            meters: Meters::new(),
            handle: handle.clone(),
            spaces: RwLock::default(),
            connections: AtomicUsize::new(0),
            ended: Notify::new(),
            roam: roam.clone(),
        });
        if let (Some(roam), Some(signs)) = (roam, signs) {
            let since = roam::follow::begin(&broker, &roam).await?;
            handle.spawn(roam::follow::rows(broker.clone(), roam.clone(), since));
            handle.spawn(roam::follow::mail(broker.clone(), roam.clone()));
            handle.spawn(roam::follow::signs(broker.clone(), roam, signs));
        } else {
            broker.restore(broker.store.mqtt_rows().await?)?;
        }
        let _inside = handle.enter();
        for (listener, acceptor) in [(listeners.plain, None), (listeners.tls, acceptor)] {
            if let Some(listener) = listener {
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                handle.spawn(broker.clone().accept(listener, acceptor));
            }
        }
        handle.spawn(will::follow(broker.clone()));
        handle.spawn(broker.clone().close_on_drain());
        handle.spawn(broker.clone().close_whose_right_ended());
        Ok(broker)
    }

    /// The space of a tenant.
    pub(super) fn space(&self, tenant: &TenantId) -> Arc<Space> {
        if let Some(space) = self.spaces.read().unwrap_or_else(PoisonError::into_inner).get(tenant) {
            return space.clone();
        }
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        spaces.entry(tenant.clone()).or_insert_with(|| Arc::new(Space::new(tenant.clone(), self.roam.clone()))).clone()
    }

    /// The spaces of all tenants.
    pub(super) fn spaces(&self) -> Vec<Arc<Space>> {
        self.spaces.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Whoever waits for the end of the last connection looks again.
    pub(super) fn look_at_end(&self) {
        self.ended.notify_waiters();
    }

    /// Puts everything back as the store kept it. Nobody is connected now: what was connected is treated as lost just now.
    fn restore(&self, rows: Vec<MqttRow>) -> Result<(), Error> {
        let now = self.clock.now();
        let mut sessions: HashMap<(TenantId, String), (Arc<Session>, bool)> = HashMap::new();
        let mut writes = Vec::new();
        for row in rows {
            match row {
                MqttRow::Session { tenant, client, record } => {
                    let record: record::Session = record::decode(&record)?;
                    let was_connected = record.disconnected_at.is_none();
                    let session = Arc::new(Session::restored(tenant.clone(), Arc::from(&*client), record));
                    sessions.insert((tenant, client), (session, was_connected));
                }
                MqttRow::Queued { tenant, client, order, record } => {
                    let Some((session, was_connected)) = sessions.get(&(tenant.clone(), client.clone())) else {
                        writes.push(MqttWrite::DropSession { tenant, client, hold: 0 });
                        continue;
                    };
                    let mut state = session.lock();
                    match restore_item(order, record::decode(&record)?, *was_connected) {
                        Some(item) => state.outbox.restore(item),
                        None => state.outbox.restore_released(order),
                    }
                }
                MqttRow::Retained { tenant, topic, record } => {
                    let mut message: Message = record::decode(&record)?;
                    if is_stale_presence(&topic, &message) {
                        message.payload = bytes::Bytes::from_static(b"offline");
                        writes.push(MqttWrite::Retain {
                            tenant: tenant.clone(),
                            topic,
                            record: record::encode(&message)?,
                        });
                    }
                    self.space(&tenant).retained_mut().set(&Arc::new(message), usize::MAX, usize::MAX);
                }
            }
        }
        for (session, was_connected) in sessions.into_values() {
            self.restore_session(&session, was_connected, now, &mut writes)?;
        }
        self.write_unwatched(writes);
        Ok(())
    }

    fn restore_session(
        &self,
        session: &Arc<Session>,
        was_connected: bool,
        now: Millis,
        writes: &mut Vec<MqttWrite>,
    ) -> Result<(), Error> {
        let mut state = session.lock();
        if was_connected {
            state.disconnected_at = Some(now);
            writes.push(session.put(&state)?);
        }
        let delay = state.will.as_ref().map(|will| i64::from(will.delay_seconds) * 1000);
        state.will_at = delay.and_then(|delay| state.disconnected_at.map(|at| at.plus(delay)));
        let next = will::next_look(&state);
        self.schedule.set(session, &mut state, next);
        drop(state);
        self.space(&session.tenant).restore(session.clone());
        Ok(())
    }

    /// Serves one connection over any byte stream, on the broker's runtime.
    pub fn serve_stream(
        self: &Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: SocketAddr,
    ) -> tokio::task::JoinHandle<()> {
        let Some(place) = Place::take(self) else {
            count_dropped("max_connections", 1);
            return self.handle.spawn(async {});
        };
        self.handle.spawn(handshake::serve(self.clone(), stream, peer, place))
    }

    /// Number of connections.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Acquire)
    }

    /// Returns when no connection is left. For the end of a drain. Cancel safe.
    pub async fn idle(&self) {
        loop {
            let ended = self.ended.notified();
            if self.connections() == 0 && self.roam.as_ref().is_none_or(|roam| roam.unsigned() == 0) {
                return;
            }
            ended.await;
        }
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, tls: Option<TlsAcceptor>) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.drain.draining() => return,
            };
            match accepted {
                Ok((stream, peer)) => self.welcome(stream, peer, tls.clone()),
                Err(error) => {
                    tracing::warn!(%error, "an MQTT connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr, tls: Option<TlsAcceptor>) {
        // Small packets are written in batches already: waiting for more only costs time.
        drop(stream.set_nodelay(true));
        let Some(tls) = tls else {
            drop(self.serve_stream(stream, peer));
            return;
        };
        let Some(place) = Place::take(self) else { return count_dropped("max_connections", 1) };
        let broker = self.clone();
        drop(self.handle.spawn(async move {
            match tokio::time::timeout(TLS_HANDSHAKE, tls.accept(stream)).await {
                Ok(Ok(stream)) => handshake::serve(broker, stream, peer, place).await,
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
            }
        }));
    }

    async fn close_on_drain(self: Arc<Self>) {
        self.drain.draining().await;
        self.close(code::SHUTTING_DOWN, |_| true);
    }

    /// Whoever is let in while this looks around is asked once more at the end of the handshake.
    async fn close_whose_right_ended(self: Arc<Self>) {
        let mut changes = self.auth.changes();
        loop {
            tokio::select! {
                () = self.drain.draining() => return,
                Ok(()) = changes.changed() => self.close(code::NOT_AUTHORIZED, |link| link.pass.is_over()),
            }
        }
    }

    /// Has those connections end, for this reason code.
    fn close(&self, reason: u8, which: impl Fn(&Link) -> bool) {
        for session in self.spaces().iter().flat_map(|space| space.sessions()) {
            let link = session.lock().link.clone();
            if let Some(link) = link.filter(|link| which(link)) {
                link.close(reason);
            }
        }
    }

    /// Hands a message to everybody in its tenant who wants it, and keeps it if it is to be retained.
    ///
    /// # Errors
    /// A refusal when the tenant may not keep more retained values.
    pub(super) fn distribute(
        &self,
        space: &Arc<Space>,
        message: Message,
        from: Option<&str>,
    ) -> Result<Settled, Refusal> {
        let internal = |error: record::Error| Refusal::new(Reason::Unspecified, error.to_string());
        let message = Arc::new(message);
        let retain = if message.retain {
            let record = if message.payload.is_empty() {
                bytes::Bytes::new()
            } else {
                record::encode(&*message).map_err(internal)?
            };
            Some(MqttWrite::Retain { tenant: space.tenant.clone(), topic: message.topic.clone(), record })
        } else {
            None
        };
        if let Some(roam) = self.roam.as_ref().filter(|_| retain.is_some()) {
            // They are read in the store: there is nothing to keep here.
            if roam.is_full(&space.tenant) && !message.payload.is_empty() {
                return Err(Refusal::new(Reason::Quota, "the tenant keeps too many retained values"));
            }
            return self.hand_out(space, &message, from, retain);
        }
        // Retained values of one topic reach store and memory in the same order: the lock is kept over both.
        let mut retained = retain.is_some().then(|| space.retained_mut());
        if let Some(retained) = &mut retained
            && !retained.set(&message, MAX_RETAINED, MAX_RETAINED_BYTES)
        {
            return Err(Refusal::new(Reason::Quota, "the tenant keeps too many retained values"));
        }
        self.hand_out(space, &message, from, retain)
    }

    /// Hands a message to everybody in its tenant who wants it. `retain`: written in the same step.
    ///
    /// # Errors
    /// A refusal when its rows cannot be encoded, which the types rule out.
    pub(super) fn hand_out(
        &self,
        space: &Arc<Space>,
        message: &Arc<Message>,
        from: Option<&str>,
        retain: Option<MqttWrite>,
    ) -> Result<Settled, Refusal> {
        let internal = |error: record::Error| Refusal::new(Reason::Unspecified, error.to_string());
        let mut routed = space.route(message, from, self.config.max_queued).map_err(internal)?;
        count_dropped("queue_full", routed.dropped);
        if let Some(roam) = self.roam.as_ref().filter(|_| !routed.aims.is_empty()) {
            roam.spread(&space.tenant, message, from, std::mem::take(&mut routed.aims));
        }
        routed.writes.extend(retain);
        if routed.writes.is_empty() {
            return Ok(Settled::Now);
        }
        let (tell, done) = oneshot::channel();
        let held = Arc::new(std::mem::take(&mut routed.held));
        let behind = held.clone();
        let posted = self.roam.clone().filter(|_| !routed.posted.is_empty()).map(|roam| (roam, routed.posted));
        let end = Done::new(move |end| {
            let is_durable = end.is_ok();
            for (session, order, qos) in behind.iter() {
                settle(session, *order, if is_durable { *qos == 2 } else { false }, is_durable);
            }
            if let Some((roam, nodes)) = posted.filter(|_| is_durable) {
                roam.posted(&nodes);
            }
            let _ = tell.send(is_durable);
        });
        self.store.mqtt(routed.writes, end);
        // The rows are in the writer's queue now, so an acknowledgement cannot overtake them.
        for (session, order, qos) in held.iter() {
            if *qos == 1 {
                settle(session, *order, true, true);
            }
        }
        Ok(Settled::Rows(done))
    }

    /// Replaces a stored message by the mark that its receiver has it. True when that is durable.
    pub(super) fn release_row(&self, session: &Session, ended: Ended) -> oneshot::Receiver<bool> {
        let (tell, done) = oneshot::channel();
        if let Ok(record) = record::encode(&record::Queued::Release) {
            let writes = vec![session.dequeue(ended.order), session.enqueue(ended.order, record, false)];
            self.store.mqtt(
                writes,
                Done::new(move |end| {
                    let _ = tell.send(end.is_ok());
                }),
            );
        }
        done
    }

    /// Writes rows whose loss costs nothing but a repeat.
    pub(super) fn write_unwatched(&self, writes: Vec<MqttWrite>) {
        if !writes.is_empty() {
            self.store.mqtt(
                writes,
                Done::new(|end| {
                    if let Err(rejection) = end {
                        tracing::warn!(?rejection, "MQTT rows were not written");
                    }
                }),
            );
        }
    }

    /// Writes rows and waits until they are durable.
    pub(super) async fn write(&self, writes: Vec<MqttWrite>) -> bool {
        if writes.is_empty() {
            return true;
        }
        let (done, end) = Done::channel();
        self.store.mqtt(writes, done);
        matches!(end.await, Ok(Ok(_)))
    }
}

/// A message's row is written, or cannot be.
pub(super) fn settle(session: &Arc<Session>, order: i64, may_go: bool, is_kept: bool) {
    let mut state = session.lock();
    if !is_kept {
        state.outbox.retract(order);
        return;
    }
    if may_go {
        state.outbox.release(order);
        let link = state.link.clone();
        drop(state);
        if let Some(link) = link {
            link.wake();
        }
    }
}

/// Presence a crash left behind: nobody is connected at start.
fn is_stale_presence(topic: &str, message: &Message) -> bool {
    let mut levels = topic.split('/');
    levels.next() == Some(super::inbound::ROOT) && levels.nth(2) == Some("presence") && message.payload == "online"
}

/// A place among the connections; given back when dropped.
pub(super) struct Place {
    broker: Arc<Broker>,
    /// Whether the limit is exceeded: the client is to be told so.
    pub is_over: bool,
}

impl Place {
    fn take(broker: &Arc<Broker>) -> Option<Self> {
        let count = broker.connections.fetch_add(1, Ordering::AcqRel) + 1;
        broker.meters.connections.increment(1.0);
        let place = Self { broker: broker.clone(), is_over: count > broker.config.max_connections };
        (count <= broker.config.max_connections + POLITE_REFUSALS).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.broker.connections.fetch_sub(1, Ordering::AcqRel);
        self.broker.meters.connections.decrement(1.0);
        self.broker.ended.notify_waiters();
    }
}

#[async_trait]
impl Publisher for Broker {
    async fn publish(&self, message: delivery::Message) -> Result<(), String> {
        let space = self.space(&message.tenant);
        let message = Message {
            topic: message.topic,
            payload: message.payload,
            qos: 1,
            retain: message.retain,
            is_utf8: message.json,
            content_type: message.json.then(|| String::from("application/json")),
            response_topic: None,
            correlation: message.correlation.map(bytes::Bytes::from),
            properties: vec![(String::from("effect"), message.effect_id)],
            expires_at: None,
        };
        match self.distribute(&space, message, None) {
            Ok(Settled::Now) => Ok(()),
            Ok(Settled::Rows(done)) => match done.await {
                Ok(true) => Ok(()),
                _ => Err(String::from("the store did not take the message's rows")),
            },
            Err(refusal) => Err(refusal.to_string()),
        }
    }
}
